"""Lesion-wise scores of BraTS 2023 and 2024: volumes counted by hand, and a slow implementation of the rules."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label

from xdim_jax.scoring import lesions
from xdim_jax.scoring.lesions import COHORTS
from xdim_jax.scoring.masks import Geometry

pytestmark = pytest.mark.quick

SHAPE = (20, 20, 40)
TISSUES = ("WT", "TC", "NETC", "SNFH", "ET", "RC")


def box(*bounds, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


def bar(start, stop, *, side=4, shape=SHAPE):
    """A bar along the last axis, ``side`` x ``side`` thick."""
    return box((8, 8 + side), (8, 8 + side), (start, stop), shape=shape)


def mm(shape=SHAPE, spacing=(1.0, 1.0, 1.0)):
    return Geometry(tuple(shape), spacing)


def score(pred, ref, cohort="GLI", spacing=(1.0, 1.0, 1.0)):
    return lesions.lesionwise_2023(pred, ref, mm(pred.shape, spacing), COHORTS[cohort])


def numbers(counted):
    return counted.scores["dice"], counted.scores["hd95_surfel"], counted.tp, counted.fp, counted.fn


NONE = box((0, 0), (0, 0), (0, 0))


def test_parameters():
    """See docs/challenges.md, BraTS 2023: lesion by lesion."""
    expected = {"GLI": (3, 50), "SSA": (3, 50), "PED": (3, 50), "MEN": (1, 50), "MET": (1, 2)}
    assert {name: (c.dilation, c.ignored_volume) for name, c in COHORTS.items()} == expected


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_nothing_to_find_and_nothing_found():
    assert numbers(score(NONE, NONE)) == (1, 0, 0, 0, 0)


def test_perfect():
    ref = bar(2, 6) | bar(30, 34)
    assert numbers(score(ref, ref)) == (1, 0, 2, 0, 0)


def test_nothing_predicted():
    assert numbers(score(NONE, bar(2, 6) | bar(30, 34))) == (0, 374, 0, 0, 2)


@pytest.mark.parametrize("size", [1, 5])
def test_false_lesions_of_any_size(size):
    pred = bar(2, 2 + size, side=1) | bar(20, 20 + size, side=1)
    assert numbers(score(pred, NONE)) == (0, 374, 0, 2, 0)


def test_a_false_lesion_beside_a_perfect_one():
    ref = bar(2, 6)
    assert numbers(score(ref | bar(30, 31, side=1), ref)) == (0.5, 187, 1, 1, 0)


@pytest.mark.parametrize(("cohort", "gap", "count"), [("GLI", 6, 1), ("GLI", 7, 2), ("MEN", 2, 1), ("MEN", 3, 2)])
def test_lesions_that_meet_when_grown_are_one(cohort, gap, count):
    """Each grows by k voxels; where the two are side by side they are connected."""
    ref = bar(2, 7) | bar(7 + gap, 12 + gap)
    assert score(NONE, ref, cohort).fn == count
    # one component over both is compared with the merged lesion of 160 voxels, or with each of 80
    pred = bar(2, 12 + gap)
    size = 16 * (10 + gap)
    found = score(pred, ref, cohort)
    assert found.scores["dice"] == pytest.approx(2 * (160 / count) / (160 / count + size))
    assert (found.tp, found.fp, found.fn) == (count, 0, 0)


def test_growing_has_18_neighbours():
    """Voxels of a diagonal in space: two steps of 18 neighbours for (1, 1, 1), so at 3 of each a corner is out."""
    one = np.zeros((9, 9, 9), bool)
    one[4, 4, 4] = True
    grown = lesions.dilate(one, 1)
    assert grown.sum() == 19 and not grown[3, 3, 3] and grown[3, 3, 4]


def test_predicted_components_have_26_neighbours_and_are_not_grown():
    """Two voxels that meet at a corner are one false lesion; one voxel between two makes them two."""
    corner = box((1, 2), (1, 2), (1, 2)) | box((2, 3), (2, 3), (2, 3))
    apart = box((1, 2), (1, 2), (1, 2)) | box((1, 2), (1, 2), (3, 4))
    assert score(corner, NONE).fp == 1
    assert score(apart, NONE).fp == 2


def test_one_component_matches_two_lesions():
    ref, pred = bar(2, 6) | bar(30, 34), bar(2, 34)  # 64 voxels each, and 512
    found = score(pred, ref)
    assert (found.tp, found.fp, found.fn) == (2, 0, 0)
    assert found.scores["dice"] == pytest.approx(2 * 64 / (64 + 512))


def test_a_lesion_is_compared_with_the_union_of_its_components():
    ref = bar(4, 16)  # 192 voxels
    pred = bar(4, 8) | bar(12, 16)  # two of 64, apart
    found = score(pred, ref)
    assert (found.tp, found.fp, found.fn) == (1, 0, 0)
    assert found.scores["dice"] == pytest.approx(2 * 128 / (192 + 128))


def test_matched_components_count_whole():
    """What lies far outside the grown lesion counts against it."""
    ref, pred = bar(2, 6), bar(2, 38)
    found = score(pred, ref)
    assert found.scores["dice"] == pytest.approx(2 * 64 / (64 + 16 * 36))
    assert found.scores["hd95_surfel"] == 31, "the ends are 32 apart"


@pytest.mark.parametrize(("cohort", "gap", "matched"), [("GLI", 2, 1), ("GLI", 3, 0), ("MEN", 0, 1), ("MEN", 1, 0)])
def test_a_component_must_touch_the_grown_lesion(cohort, gap, matched):
    found = score(bar(8 + gap, 12 + gap), bar(4, 8), cohort)
    assert (found.tp, found.fp, found.fn) == (matched, 1 - matched, 1 - matched)
    assert found.scores["dice"] == 0
    if matched:
        assert 0 < found.scores["hd95_surfel"] < 20
    else:
        assert found.scores["hd95_surfel"] == 374  # (374 + 374) / 2


@pytest.mark.parametrize(
    ("cohort", "spacing", "count", "kept"),
    [
        ("GLI", (1.0, 1.0, 1.0), 50, False),
        ("GLI", (1.0, 1.0, 1.0), 51, True),
        ("GLI", (0.5, 1.0, 1.0), 100, False),
        ("GLI", (0.5, 1.0, 1.0), 101, True),
        ("MEN", (2.0, 1.0, 1.0), 25, False),
        ("MEN", (2.0, 1.0, 1.0), 26, True),
        ("MET", (1.0, 1.0, 1.0), 2, False),
        ("MET", (1.0, 1.0, 1.0), 3, True),
    ],
)
def test_the_volume_at_which_a_lesion_counts(cohort, spacing, count, kept):
    """Lesions of at most so many mm^3 are dropped."""
    ref = np.zeros(SHAPE, bool)
    inside = [*itertools.product(range(8, 12), range(8, 16), range(8, 18))][:count]
    ref[tuple(np.array(inside).T)] = True
    missed = (0, 374, 0, 0, 1) if kept else (1, 0, 0, 0, 0)
    assert numbers(score(NONE, ref, cohort, spacing)) == missed
    perfect = (1, 0, int(kept), 0, 0)
    assert numbers(score(ref, ref, cohort, spacing)) == perfect


@pytest.mark.parametrize("degrees", [7, 13, 30, 41, 45, 77, 133])
def test_a_turned_image_has_voxels_of_one_mm(degrees):
    """50 voxels of 1 mm are 50 mm^3 whatever way the image lies, though its affine's determinant is rounded."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    stored = turn.astype(np.float32).astype(np.float64)  # as a NIfTI header holds it
    grid = Geometry(SHAPE, (1.0, 1.0, 1.0), stored)
    ref = box((8, 13), (8, 13), (8, 10))
    found = lesions.lesionwise_2023(NONE, ref, grid, COHORTS["GLI"])
    assert numbers(found) == (1, 0, 0, 0, 0)


def test_small_lesions_absorb_components():
    """A component that matches a lesion below the threshold is not false."""
    assert numbers(score(bar(2, 12), bar(2, 3, side=1))) == (1, 0, 0, 0, 0)
    ref = bar(2, 3, side=1) | bar(30, 34)
    assert numbers(score(bar(2, 5) | bar(30, 34), ref)) == (1, 0, 1, 0, 0)


def test_all_cases_together_by_hand():
    """A perfect lesion, a missed one, a small missed one, and a false one: n = 2, FP = 1."""
    shape = (20, 20, 80)
    perfect, missed, small = bar(2, 6, shape=shape), bar(20, 24, shape=shape), bar(40, 41, shape=shape)
    false = bar(60, 64, shape=shape)
    found = score(perfect | false, perfect | missed | small)
    assert numbers(found) == (pytest.approx(1 / 3), pytest.approx(2 * 374 / 3), 1, 1, 1)


def test_hd95_by_hand():
    """A plate of 10 x 10 x 1 predicted 3 voxels off: every surface area is 3 mm from the other or nearer."""
    ref = box((3, 13), (3, 13), (10, 11))
    found = score(box((3, 13), (3, 13), (13, 14)), ref, spacing=(1.0, 1.0, 1.0))
    assert found.tp == 1 and found.scores["dice"] == 0
    assert found.scores["hd95_surfel"] == pytest.approx(3)


def test_lesions_at_the_edge_of_the_image():
    ref = box((0, 4), (0, 4), (0, 4)) | box((16, 20), (16, 20), (36, 40))
    assert numbers(score(ref, ref)) == (1, 0, 2, 0, 0)
    assert numbers(score(box((0, 4), (0, 4), (0, 4)), ref)) == (0.5, 187, 1, 0, 1)


# -- a slow implementation of section 4.2 ----------------------------------------------------------------------------


def slow_grow(mask, steps):
    """Voxels within ``steps`` moves along faces and edges."""
    for _ in range(steps):
        padded, grown = np.pad(mask, 1), mask.copy()
        for move in itertools.product((-1, 0, 1), repeat=3):
            if 0 < sum(map(abs, move)) <= 2:
                part = tuple(slice(1 + m, 1 + m + n) for m, n in zip(move, mask.shape, strict=True))
                grown |= padded[part]
        mask = grown
    return mask


def slow_components(mask):
    numbered, count = label(mask, np.ones((3, 3, 3)))
    return [numbered == k for k in range(1, count + 1)]


def slow_hd95(pred, ref, spacing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import surface_distance

        found = surface_distance.compute_surface_distances(ref, pred, spacing)
        return surface_distance.compute_robust_hausdorff(found, 95)


def slow_2023(pred, ref, spacing, steps, volume):
    predicted = slow_components(pred)
    matched, dices, distances, tp, fn = set(), [], [], 0, 0
    for grown in slow_components(slow_grow(ref, steps)):
        lesion = ref & grown
        region = slow_grow(lesion, steps)
        met = [k for k, component in enumerate(predicted) if (component & region).any()]
        matched |= set(met)
        if lesion.sum() * math.prod(spacing) <= volume:
            continue
        if met:
            tp += 1
            union = np.any([predicted[k] for k in met], 0)
            dices.append(2 * (union & lesion).sum() / (union.sum() + lesion.sum()))
            distances.append(slow_hd95(union, lesion, spacing))
        else:
            fn += 1
            dices.append(0.0)
            distances.append(374.0)
    fp = len(predicted) - len(matched)
    count = len(dices) + fp
    if not count:
        return 1, 0, tp, fp, fn
    return sum(dices) / count, (sum(distances) + 374 * fp) / count, tp, fp, fn


@pytest.mark.parametrize("cohort", ["GLI", "MEN", "MET"])
@pytest.mark.parametrize("seed", range(6))
def test_random_blobs_equal_the_slow_implementation(seed, cohort):
    rng = np.random.default_rng(seed)
    spacing = [(1.0, 1.0, 1.0), (0.8, 1.2, 1.0), (2.0, 0.5, 0.75)][seed % 3]
    field = gaussian_filter(rng.standard_normal((26, 28, 24)), 1.6)
    other = gaussian_filter(rng.standard_normal(field.shape), 1.6)
    ref = field > np.quantile(field, 0.95)
    pred = 0.7 * field + 0.7 * other > np.quantile(field, 0.95)
    steps, volume = {"GLI": (3, 50), "MEN": (1, 50), "MET": (1, 2)}[cohort]
    expected = slow_2023(pred, ref, spacing, steps, volume)
    assert numbers(score(pred, ref, cohort, spacing)) == pytest.approx(expected, abs=1e-9)
    assert expected[2] + expected[4] > 0  # something is kept


# -- 2024 ------------------------------------------------------------------------------------------------------------

WIDE = (20, 20, 60)


def score_2024(pred, ref):
    """Masks by tissue; those that are not given are empty."""
    pred, ref = ({t: masks.get(t, np.zeros(WIDE, bool)) for t in TISSUES} for masks in (pred, ref))
    found = lesions.lesionwise_2024(pred, ref, mm(WIDE))
    return {t: (*numbers(c), c.scores["nsd_0.5"], c.scores["nsd_1.0"]) for t, c in found.items()}


def wide(start, stop, **options):
    return bar(start, stop, shape=WIDE, **options)


def test_2024_nothing():
    assert score_2024({}, {}) == dict.fromkeys(TISSUES, (1, 0, 0, 0, 0, 1, 1))


@pytest.mark.parametrize("tissue", TISSUES)
def test_2024_missed_false_and_perfect(tissue):
    cube = wide(10, 14)
    assert score_2024({}, {tissue: cube})[tissue] == (0, 337, 0, 0, 1, 0, 0)
    assert score_2024({tissue: cube}, {})[tissue] == (0, 337, 0, 1, 0, 0, 0)
    assert score_2024({tissue: cube}, {tissue: cube})[tissue] == (1, 0, 1, 0, 0, 1, 1)


@pytest.mark.parametrize("tissue", TISSUES)
def test_2024_small_predicted_components_are_dropped(tissue):
    """At most 10 voxels of ET, at most 20 of others; lesions have the same thresholds."""
    most = 10 if tissue == "ET" else 20
    for size, false in ((most, 0), (most + 1, 1)):
        line = wide(5, 5 + size, side=1)
        assert line.sum() == size
        assert score_2024({tissue: line}, {})[tissue][3] == false
        assert score_2024({}, {tissue: line})[tissue][4] == false
        assert score_2024({tissue: line}, {tissue: line})[tissue][:2] == (1, 0)


@pytest.mark.parametrize(
    ("tissue", "gap", "count"),
    [
        *((t, 6, 1) for t in TISSUES),
        *((t, 7, 2) for t in ("WT", "TC", "ET", "SNFH")),
        *((t, 10, 1) for t in ("NETC", "RC")),
        *((t, 11, 2) for t in ("NETC", "RC")),
    ],
)
def test_2024_both_sides_are_merged(tissue, gap, count):
    """Three steps, five for NETC and RC (and for SNFH, where a slip leaves three)."""
    two = wide(5, 9) | wide(9 + gap, 13 + gap)
    assert score_2024({tissue: two}, {})[tissue][3] == count
    assert score_2024({}, {tissue: two})[tissue][4] == count


@pytest.mark.parametrize(
    ("tissue", "gap", "matched"),
    [*((t, 3, 0) for t in ("WT", "TC", "ET", "SNFH")), *((t, 2, 1) for t in ("WT", "ET", "SNFH"))]
    + [*((t, 4, 1) for t in ("NETC", "RC")), *((t, 5, 0) for t in ("NETC", "RC"))],
)
def test_2024_lesions_are_matched_over_as_many_steps_as_they_are_merged(tissue, gap, matched):
    """A dilation of n steps reaches a component behind n - 1 empty voxels: three steps, five for NETC and RC."""
    found = score_2024({tissue: wide(12 + gap, 20 + gap)}, {tissue: wide(5, 12)})[tissue]
    assert found[2:5] == (matched, 1 - matched, 1 - matched)


def test_2024_merged_components_are_measured_together():
    """Two lines of 6 voxels of ET: merged they are 12 and stay, apart both are dropped."""
    near, far = (wide(5, 11, side=1) | wide(11 + gap, 17 + gap, side=1) for gap in (6, 7))
    assert score_2024({"ET": near}, {})["ET"][3] == 1
    assert score_2024({"ET": far}, {})["ET"][3] == 0


@pytest.mark.parametrize(
    ("tissue", "neighbour"),
    [
        ("NETC", "ET"),
        ("NETC", "RC"),
        ("ET", "NETC"),
        ("ET", "RC"),
        ("RC", "ET"),
        ("RC", "NETC"),
        ("SNFH", "ET"),
        ("SNFH", "RC"),
        ("SNFH", "NETC"),
    ],
)
def test_2024_components_that_touch_a_common_component_are_joined(tissue, neighbour):
    two = wide(5, 9) | wide(29, 33)
    between = wide(9, 29)
    assert score_2024({}, {tissue: two})[tissue][4] == 2
    assert score_2024({}, {tissue: two, neighbour: between})[tissue][4] == 1
    assert score_2024({tissue: two, neighbour: between}, {})[tissue][3] == 1
    away = wide(10, 28)  # a voxel between: not touching
    assert score_2024({}, {tissue: two, neighbour: away})[tissue][4] == 2


def test_2024_unions_are_not_joined():
    two, between = wide(5, 9) | wide(29, 33), wide(9, 29)
    for tissue in ("WT", "TC"):
        assert score_2024({}, {tissue: two, "ET": between, "RC": between})[tissue][4] == 2


def test_2024_snfh_joins_nobody():
    two, between = wide(5, 9) | wide(29, 33), wide(9, 29)
    assert score_2024({}, {"ET": two, "SNFH": between})["ET"][4] == 2


def test_2024_half_found_by_hand():
    """One of two lesions found exactly."""
    ref = wide(5, 9) | wide(40, 44)
    assert score_2024({"ET": wide(5, 9)}, {"ET": ref})["ET"] == (0.5, 337 / 2, 1, 0, 1, 0.5, 0.5)


def test_2024_nsd_by_hand():
    """A plate moved by one voxel: every distance is 1 mm."""
    ref = box((3, 13), (3, 13), (10, 11), shape=WIDE)
    pred = box((3, 13), (3, 13), (11, 12), shape=WIDE)
    found = score_2024({"WT": pred}, {"WT": ref})["WT"]
    assert found == (0, pytest.approx(1), 1, 0, 0, 0, 1)
