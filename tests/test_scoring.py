"""Metrics, edge cases, scores and statistics against independent code, geometry, or by hand."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import generate_binary_structure
from scipy.spatial import KDTree
from scipy.stats import wilcoxon

from tests.reference_scores import DISTANCES, brute
from xdim_jax.scoring import brats, camus, chaos, generic, masks, paired, results, tables
from xdim_jax.scoring.masks import METRICS, Geometry, Pair
from xdim_jax.scoring.rules import Job, LabelMap, ScoredCase

pytestmark = pytest.mark.quick


def box(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


def all_metrics(pred, ref, geometry=None, *, border=True):
    pair = Pair(pred, ref, geometry, border=border)
    return {name: metric.measure(pair) for name, metric in METRICS.items()}


# -- brute force ----------------------------------------------------------------------------------------------------


def surfels_hd95(pred, ref, spacing):
    """By the package itself on the whole image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import surface_distance

        found = surface_distance.compute_surface_distances(ref, pred, tuple(spacing))
        return surface_distance.compute_robust_hausdorff(found, 95)


def surfels_hd95_by_hand(pred, ref, spacing):
    """Corners between voxels whose neighbourhood is neither empty nor full, weighted by the package's own table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from surface_distance import lookup_tables

    ndim = pred.ndim
    if ndim == 3:
        area = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    else:
        area = lookup_tables.create_table_neighbour_code_to_contour_length(spacing)
    points, weights = [], []
    for mask in (pred, ref):
        padded = np.pad(mask, 1).astype(int)
        code = np.zeros([n - 1 for n in padded.shape], int)
        for k, corner in enumerate(itertools.product((0, 1), repeat=ndim)):
            part = tuple(slice(c, c + n) for c, n in zip(corner, code.shape, strict=True))
            code += padded[part] << (2**ndim - 1 - k)
        there = (code > 0) & (code < 2 ** (2**ndim) - 1)
        points.append(np.argwhere(there) * spacing)
        weights.append(area[code[there]])
    worst = []
    for here, other, weight in ((0, 1, weights[0]), (1, 0, weights[1])):
        distance = KDTree(points[other]).query(points[here])[0]
        order = np.argsort(distance, kind="stable")
        share = np.cumsum(weight[order]) / weight.sum()
        worst.append(distance[order][np.argmax(share >= 0.95)])
    return max(worst)


def random_pair(rng, shape):
    """Noise of different densities, or two boxes, some of them at the edge."""
    if rng.random() < 0.5:
        pair = [rng.random(shape) > rng.uniform(0.4, 0.98) for _ in range(2)]
    else:
        pair = []
        for _ in range(2):
            low = [rng.integers(0, n - 1) for n in shape]
            pair.append(box(shape, *((a, rng.integers(a + 1, n + 1)) for a, n in zip(low, shape, strict=True))))
    for mask in pair:
        if not mask.any():
            mask[tuple(n // 2 for n in shape)] = True
    return pair


def check(pred, ref, geometry, axes, border):
    found, expected = all_metrics(pred, ref, geometry, border=border), brute(pred, ref, axes, border)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("shape", [(9, 13), (6, 8, 7)])
@pytest.mark.parametrize("seed", range(5))
def test_every_metric_equals_brute_force(seed, shape, border):
    rng = np.random.default_rng([seed, len(shape)])
    spacing = tuple(rng.uniform(0.4, 4, len(shape)))
    pred, ref = random_pair(rng, shape)
    check(pred, ref, Geometry(shape, spacing), np.diag(spacing), border)


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_skewed_axes_equal_brute_force(seed, border):
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.5, 3, 3)
    unit = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    unit[:, 0] += 0.4 * unit[:, 1]  # a tilted gantry
    axes = unit / np.linalg.norm(unit, axis=0) * spacing
    geometry = Geometry((7, 8, 6), tuple(spacing), axes)
    assert geometry.skewed
    pred, ref = random_pair(rng, (7, 8, 6))
    check(pred, ref, geometry, axes, border)
    corners = np.array(list(itertools.product((0, 7), (0, 8), (0, 6)))) @ axes.T
    longest = max(np.linalg.norm(a - b) for a in corners for b in corners)
    assert geometry.diagonal == pytest.approx(longest)


@pytest.mark.parametrize("border", [True, False])
def test_rotated_axes_are_not_skewed_and_equal_brute_force(border):
    rng = np.random.default_rng(3)
    spacing = np.array([1.9, 0.77, 1.31])
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0] * spacing
    geometry = Geometry((7, 8, 6), tuple(spacing), axes)
    assert not geometry.skewed
    pred, ref = random_pair(rng, (7, 8, 6))
    check(pred, ref, geometry, axes, border)


@pytest.mark.parametrize(("tilt", "skewed"), [(0.0, False), (9e-4, False), (1.1e-3, True), (-1.1e-3, True)])
def test_from_a_thousandth_on_axes_are_skewed(tilt, skewed):
    """The slice step deviates from the normal by more than 1e-3."""
    axes = np.diag([3.0, 1.0, 1.0])
    axes[1, 0] = 3.0 * tilt
    assert Geometry((4, 4, 4), (3.0, 1.0, 1.0), axes).skewed == skewed


DEGENERATE_3D = {
    "voxel": box((5, 6, 4), (2, 3), (3, 4), (1, 2)),
    "corner": box((5, 6, 4), (0, 1), (0, 1), (0, 1)),
    "line": box((5, 6, 4), (2, 3), (0, 6), (1, 2)),
    "slice": box((5, 6, 4), (2, 3), (0, 6), (0, 4)),
    "slab at the edge": box((5, 6, 4), (0, 2), (0, 6), (0, 4)),
    "full": np.ones((5, 6, 4), bool),
    "empty": np.zeros((5, 6, 4), bool),
    "shell": box((5, 6, 4), (0, 5), (0, 6), (0, 4)) & ~box((5, 6, 4), (1, 4), (1, 5), (1, 3)),
}


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize(("a", "b"), [*itertools.product(DEGENERATE_3D, repeat=2)])
def test_degenerate_masks_equal_brute_force(a, b, border):
    spacing = (3.0, 0.8, 1.2)
    pred, ref = DEGENERATE_3D[a], DEGENERATE_3D[b]
    check(pred, ref, Geometry(pred.shape, spacing), np.diag(spacing), border)
    for two in (pred[2], pred[:, 3]):
        other = ref[2] if two.shape == (6, 4) else ref[:, 3]
        check(two, other, Geometry(two.shape, (0.8, 1.2)), np.diag([0.8, 1.2]), border)


@pytest.mark.parametrize("shape", [(11, 14), (7, 9, 8)])
@pytest.mark.parametrize("seed", range(6))
def test_surfel_hd95_equals_the_package_on_the_whole_image(seed, shape):
    rng = np.random.default_rng([seed, len(shape), 7])
    spacing = tuple(rng.uniform(0.4, 3, len(shape)))
    pred, ref = random_pair(rng, shape)
    found = all_metrics(pred, ref, Geometry(shape, spacing))["hd95_surfel"]
    assert found == pytest.approx(surfels_hd95(pred, ref, spacing), abs=1e-9)
    assert found == pytest.approx(surfels_hd95_by_hand(pred, ref, spacing), abs=1e-9)


@pytest.mark.parametrize(("a", "b"), [*itertools.product(sorted(set(DEGENERATE_3D) - {"empty"}), repeat=2)])
def test_surfel_hd95_of_degenerate_masks(a, b):
    pred, ref = DEGENERATE_3D[a], DEGENERATE_3D[b]
    found = all_metrics(pred, ref, Geometry(pred.shape, (3.0, 0.8, 1.2)))["hd95_surfel"]
    assert found == pytest.approx(surfels_hd95(pred, ref, (3.0, 0.8, 1.2)), abs=1e-9)


@pytest.mark.parametrize(("p", "g"), [(0, 1), (1, 0), (0, 0)])
def test_distances_to_an_empty_mask_are_not_numbers(p, g):
    pred, ref = (np.full((4, 5, 6), bool(v)) & (np.arange(6) < 3) for v in (p, g))
    found = all_metrics(pred, ref)
    assert all(math.isnan(found[name]) for name in (*DISTANCES, "hd95_surfel"))


@pytest.mark.parametrize("seed", range(4))
def test_overlap_and_surfaces_equal_simpleitk(seed):
    """Dice, Jaccard, and contours with Maurer's distance map; masks off the edge, which SimpleITK treats otherwise."""
    rng = np.random.default_rng(seed)
    spacing = (2.5, 0.8, 1.1)
    pair = [np.pad(rng.random((6, 9, 8)) > 0.6, 2) for _ in range(2)]
    images = []
    for mask in pair:
        images.append(sitk.GetImageFromArray(mask.astype(np.uint8)))
        images[-1].SetSpacing(spacing[::-1])
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(images[1], images[0])
    contours = [sitk.LabelContour(image, False) for image in images]
    maps = [
        sitk.GetArrayFromImage(
            sitk.SignedMaurerDistanceMap(c, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
        )
        for c in contours
    ]
    on = [sitk.GetArrayFromImage(c) > 0 for c in contours]
    to_ref, to_pred = np.maximum(maps[1][on[0]], 0), np.maximum(maps[0][on[1]], 0)
    found = all_metrics(*pair, Geometry(pair[0].shape, spacing))
    assert found["dice"] == pytest.approx(overlap.GetDiceCoefficient(), abs=1e-9)
    assert found["iou"] == pytest.approx(overlap.GetJaccardCoefficient(), abs=1e-9)
    assert found["hd"] == pytest.approx(max(to_ref.max(), to_pred.max()), abs=1e-5)
    assert found["assd_mean"] == pytest.approx((to_ref.mean() + to_pred.mean()) / 2, abs=1e-5)
    pooled = np.concatenate([to_ref, to_pred])
    assert found["assd_pooled"] == pytest.approx(pooled.mean(), abs=1e-5)
    assert found["hd95_pooled"] == pytest.approx(np.percentile(pooled, 95), abs=1e-5)


def test_hausdorff_of_two_apart_boxes_equals_simpleitk():
    """For boxes that do not meet, the distance of whole sets and of surfaces is one."""
    spacing = (2.0, 0.5, 1.5)
    a, b = box((20, 20, 20), (2, 5), (3, 9), (2, 8)), box((20, 20, 20), (8, 15), (12, 18), (10, 13))
    images = [sitk.GetImageFromArray(m.astype(np.uint8)) for m in (a, b)]
    for image in images:
        image.SetSpacing(spacing[::-1])
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*images)
    found = all_metrics(a, b, Geometry(a.shape, spacing))
    assert found["hd"] == pytest.approx(hausdorff.GetHausdorffDistance(), abs=1e-5)


# -- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1.0, 2.5])
def test_two_parallel_plates(step):
    """Plates of one voxel, 5 voxels apart: every distance is 5 steps."""
    a, b = box((20, 12, 12), (3, 4), (2, 10), (2, 10)), box((20, 12, 12), (8, 9), (2, 10), (2, 10))
    found = all_metrics(a, b, Geometry(a.shape, (step, 1.0, 1.0)))
    for name in ("assd_mean", "assd_pooled", "hd", "hd95_pooled", "hd95_maxdir"):
        assert found[name] == 5 * step
    assert (found["dice"], found["nsd_2.0"], found["ravd"]) == (0, 0, 0)
    assert found["volume"] == pytest.approx(64 * step / 1000)


def test_mean_and_pooled_differ_where_sizes_differ():
    """A voxel 4 from a line of 9: the line's distances are 4, sqrt(17), sqrt(20), 5 and sqrt(32), by hand."""
    voxel, line = box((9, 9), (4, 5), (0, 1)), box((9, 9), (0, 9), (4, 5))
    line_mean = (4 + 2 * (math.sqrt(17) + math.sqrt(20) + 5 + math.sqrt(32))) / 9
    found = all_metrics(voxel, line)
    assert found["assd_mean"] == pytest.approx((4 + line_mean) / 2)
    assert found["assd_pooled"] == pytest.approx((4 + 9 * line_mean) / 10)
    # the last two of ten are sqrt(32); rank 0.95 * 9 = 8.55 lies between them
    assert found["hd95_pooled"] == pytest.approx(math.sqrt(32))
    assert found["hd"] == pytest.approx(math.sqrt(32))


def test_hd95_is_not_the_maximum():
    """A row of 39 pixels on a row of 40 of which one is 10 off: pooled ranks by hand."""
    ref = box((12, 60), (0, 1), (0, 40))
    pred = box((12, 60), (0, 1), (0, 39)) | box((12, 60), (10, 11), (39, 40))
    found = all_metrics(pred, ref)
    # distances of P: 39 zeros and 10; of G: 39 zeros and 1 (the pixel whose neighbour is there)
    assert found["hd"] == 10
    assert found["hd95_pooled"] == 0  # rank 75.05 of 0..79; the last two places are 1 and 10
    assert found["hd95_maxdir"] == pytest.approx(0.05 * 10 if 0.95 * 39 > 38 else 0)
    assert found["assd_pooled"] == pytest.approx(11 / 80)


def test_shifted_cube_by_hand():
    """A 4^3 cube against itself moved by one: |P and G| = 48 of 64."""
    a, b = box((10, 10, 10), (2, 6), (2, 6), (2, 6)), box((10, 10, 10), (3, 7), (2, 6), (2, 6))
    found = all_metrics(a, b)
    assert (found["dice"], found["sensitivity"], found["precision"]) == (0.75, 0.75, 0.75)
    assert found["iou"] == 48 / 80
    assert found["specificity"] == (1000 - 64 - 16) / (1000 - 64)
    assert (found["hd"], found["hd95_pooled"], found["nsd_1.0"]) == (1, 1, 1)
    assert found["hd95_surfel"] == 1
    assert 0 < found["nsd_0.5"] < 1


def test_two_concentric_spheres():
    """Radii of 8 and 12 mm on an anisotropic grid: every distance is 4 mm but for the size of a voxel."""
    spacing = (1.5, 0.8, 0.8)
    z, y, x = np.meshgrid(
        *[(np.arange(n) - n // 2) * s for n, s in zip((21, 36, 36), spacing, strict=True)], indexing="ij"
    )
    radius = np.sqrt(x**2 + y**2 + z**2)
    found = all_metrics(radius <= 8, radius <= 12, Geometry(radius.shape, spacing))
    for name in ("assd_mean", "assd_pooled", "hd95_pooled", "hd95_maxdir", "hd95_surfel", "hd"):
        assert found[name] == pytest.approx(4, abs=0.6 if name == "hd" else 0.4), name
    assert found["volume"] == pytest.approx(4 / 3 * math.pi * 8**3 / 1000, rel=0.02)
    assert found["volume_ref"] == pytest.approx(4 / 3 * math.pi * 12**3 / 1000, rel=0.02)
    assert found["dice"] == pytest.approx(2 * 8**3 / (8**3 + 12**3), abs=0.01)


def test_border_decides_whether_the_image_edge_is_surface():
    full = np.ones((3, 3, 3), bool)
    assert masks.surface(full, border=True).sum() == 26
    assert masks.surface(full, border=False).sum() == 0
    half = box((4, 4), (0, 2), (0, 4))
    assert masks.surface(half, border=False).tolist() == box((4, 4), (1, 2), (0, 4)).tolist()


def test_surfaces_have_the_cross_as_neighbourhood():
    """The centre of a block whose corners alone are missing is not surface."""
    mask = np.ones((3, 3), bool)
    mask[::2, ::2] = False
    assert not masks.surface(mask, border=True)[1, 1]
    assert generate_binary_structure(2, 1).sum() == 5


def test_cropping_keeps_a_real_edge_and_invents_none():
    a, b = box((8, 8, 8), (0, 3), (0, 8), (0, 8)), box((8, 8, 8), (2, 5), (2, 6), (2, 6))
    for border in (True, False):
        check(a, b, Geometry(a.shape, (1.0, 1.0, 1.0)), np.eye(3), border)
        larger = [np.pad(m, ((0, 9), (0, 0), (0, 0))) for m in (a, b)]
        near = all_metrics(a, b, border=border)
        far = all_metrics(*larger, border=border)
        assert near["hd"] == far["hd"] and near["assd_pooled"] == far["assd_pooled"]


def test_shapes_must_agree_and_names_must_be_known():
    with pytest.raises(ValueError, match="differ in shape"):
        Pair(np.zeros((3, 4), bool), np.zeros((4, 3), bool))
    with pytest.raises(KeyError, match="hd96"):
        masks.measure(Pair(np.ones((2, 2), bool), np.ones((2, 2), bool)), ["hd96"])


# -- the tables of edge cases --------------------------------------------------------------------------------------

EMPTY, SOME = np.zeros((1, 8, 9), bool), box((1, 8, 9), (0, 1), (2, 5), (3, 7))
FLAT = Geometry((1, 8, 9), (1.0, 0.5, 0.25))


@pytest.mark.parametrize(
    ("pred", "ref", "dice"), [(EMPTY, SOME, 0.0), (SOME, EMPTY, 0.0), (EMPTY, EMPTY, 1.0)], ids=["P", "G", "both"]
)
def test_camus_empty_masks(pred, ref, dice):
    """See docs/evaluation.md, section Empty and missing masks."""
    found = camus.score({"LA": pred}, {"LA": ref}, FLAT)["LA"]
    assert found["dice"] == dice
    assert math.isnan(found["mad"]) and math.isnan(found["hd"])


def test_camus_is_measured_in_the_plane():
    """A one-slice volume has no surface above and below; rows of 0.5 mm, columns of 0.25 mm."""
    moved = box((1, 8, 9), (0, 1), (3, 6), (3, 7))
    found = camus.score({"LA": moved}, {"LA": SOME}, FLAT)["LA"]
    expected = brute(moved[0], SOME[0], np.diag([0.5, 0.25]), True)
    assert found["mad"] == pytest.approx(expected["assd_mean"])
    assert found["hd"] == pytest.approx(expected["hd"]) == pytest.approx(0.5)
    assert found["dice"] == pytest.approx(2 * 8 / 24)


def test_camus_structures():
    """The epicardium is cavity and muscle together."""
    label = np.array([[[0, 1, 2, 3]]])
    found = camus.CODING.masks(label, Path("label"))
    assert {name: m[0, 0].tolist() for name, m in found.items()} == {
        "LV_endo": [False, True, False, False],
        "LV_epi": [False, True, True, False],
        "LA": [False, False, False, True],
    }


def test_camus_missing_image():
    found = camus.score_missing({"LA": SOME, "LV_endo": EMPTY}, FLAT)
    assert found["LA"]["dice"] == 0 and math.isnan(found["LA"]["mad"]) and math.isnan(found["LA"]["hd"])


BLOCK = Geometry((6, 8, 10), (3.0, 2.0, 1.0))
DIAGONAL = math.sqrt(18**2 + 16**2 + 10**2)
ORGAN, NOTHING, ALL = box(BLOCK.shape, (1, 4), (2, 6), (3, 8)), np.zeros(BLOCK.shape, bool), np.ones(BLOCK.shape, bool)


def test_chaos_prediction_empty():
    """An empty prediction: DICE 0, RAVD 100, the cuboid's diagonal in mm, and four scores of 0, also where the diagonal
    of a small image is within the threshold of 60 mm."""
    found = chaos.score({"liver": NOTHING}, {"liver": ORGAN}, BLOCK)["liver"]
    assert (found["dice"], found["ravd"]) == (0, 100)
    assert found["assd"] == pytest.approx(DIAGONAL) and found["mssd"] == pytest.approx(DIAGONAL)
    assert [found[k] for k in ("score", "dice_score", "ravd_score", "assd_score", "mssd_score")] == [0] * 5
    assert chaos.score_missing({"liver": ORGAN}, BLOCK)["liver"] == found


@pytest.mark.parametrize("pred", [ORGAN, NOTHING])
def test_chaos_reference_empty(pred):
    found = chaos.score({"spleen": pred}, {"spleen": NOTHING}, BLOCK)["spleen"]
    assert found and all(math.isnan(v) for v in found.values())


@pytest.mark.parametrize(("pred", "ref"), [(ALL, ORGAN), (ORGAN, ALL), (ALL, ALL)])
def test_chaos_mask_that_fills_the_image(pred, ref):
    """Without a surface the two distances are the worst, and only those."""
    found = chaos.score({"liver": pred}, {"liver": ref}, BLOCK)["liver"]
    p, g, both = pred.sum(), ref.sum(), (pred & ref).sum()
    assert found["dice"] == pytest.approx(2 * both / (p + g))
    assert found["ravd"] == pytest.approx(100 * abs(p - g) / g)
    assert found["assd"] == pytest.approx(DIAGONAL) and found["mssd"] == pytest.approx(DIAGONAL)
    assert (found["assd_score"], found["mssd_score"]) == (0, 0)


def test_chaos_edge_of_the_image_is_no_surface():
    """Slabs that leave the image on five sides meet its inside in one plane each: 2 slices of 3 mm apart."""
    a, b = box(BLOCK.shape, (0, 2), (0, 8), (0, 10)), box(BLOCK.shape, (0, 4), (0, 8), (0, 10))
    found = chaos.score({"liver": a}, {"liver": b}, BLOCK)["liver"]
    assert found["assd"] == 6 and found["mssd"] == 6
    assert found["ravd"] == 50
    assert found["dice"] == pytest.approx(2 / 3)
    scores = (0, 0, 100 - 20 / 3 * 6, 100 - 5 / 3 * 6)
    assert found["score"] == pytest.approx(sum(scores) / 4)


@pytest.mark.parametrize(
    ("metric", "value", "score"),
    [
        ("dice", 1.0, 100),
        ("dice", 0.8, 80),
        ("dice", math.nextafter(0.8, 0), 0),
        ("dice", 0.9, 90),
        ("dice", 0.0, 0),
        ("ravd", 0.0, 100),
        ("ravd", 1.0, 80),
        ("ravd", 4.99, 0.2),
        ("ravd", 5.0, 0),
        ("ravd", math.nextafter(5, 6), 0),
        ("ravd", 6.0, 0),
        ("assd", 0.0, 100),
        ("assd", 3.0, 80),
        ("assd", 15.0, 0),
        ("assd", 16.0, 0),
        ("mssd", 0.0, 100),
        ("mssd", 6.0, 90),
        ("mssd", 60.0, 0),
        ("mssd", 61.0, 0),
        ("dice", math.nan, 0),
        ("mssd", math.inf, 0),
    ],
)
def test_chaos_scores_at_the_thresholds(metric, value, score):
    assert chaos.to_score(metric, value) == pytest.approx(score, abs=1e-9)


def test_paper_table_4_obeys_the_scores():
    """A mean score is the mean of four, and the average that of the five tasks."""
    values = chaos.with_scores({"dice": 0.9808, "ravd": (100 - 70.31) / 20, "assd": 0.15 * 4.46, "mssd": 0.6 * 32})
    assert values["score"] == pytest.approx(82.98, abs=0.005)
    means = []
    for task, row in tables._TABLE_4.items():
        cells = [float(cell.split(" ")[0]) for cell in row]
        if task != "average":
            assert cells[0] == pytest.approx(sum(cells[2::2]) / 4, abs=0.0051), task
            means.append(cells)
    average = [float(cell.split(" ")[0]) for cell in tables._TABLE_4["average"]]
    assert len(means) == 5
    assert average == pytest.approx(np.mean(means, 0).tolist(), abs=0.0101)


SHAPE_2022 = (240, 240, 155)


def test_brats_2022_empty_masks():
    """Empty masks; the diagonal of a BraTS volume is 373.1287 voxels."""
    empty, one = np.zeros(SHAPE_2022, bool), box(SHAPE_2022, (0, 1), (0, 1), (0, 1))
    assert brats.score_region_2022(empty, empty) == {"dice": 1, "hd95": 0, "sensitivity": 1, "specificity": 1}
    missed, false_alarm = brats.score_region_2022(empty, one), brats.score_region_2022(one, empty)
    for found in (missed, false_alarm):
        assert (found["dice"], found["sensitivity"]) == (0, 0)
        assert found["hd95"] == pytest.approx(373.1287, abs=1e-4)
    assert missed["specificity"] == 1
    assert false_alarm["specificity"] == pytest.approx(1 - 1 / (240 * 240 * 155), abs=1e-15)
    assert false_alarm["specificity"] < 1


def test_brats_2022_counts_voxels_not_mm():
    a, b = box((20, 12, 12), (3, 4), (2, 10), (2, 10)), box((20, 12, 12), (8, 9), (2, 10), (2, 10))
    found = brats.score_2022({"WT": a}, {"WT": b}, Geometry(a.shape, (2.0, 3.0, 4.0)))["WT"]
    assert found == {"dice": 0, "hd95": 5, "sensitivity": 0, "specificity": 1 - 64 / (20 * 144 - 64)}


def test_brats_2022_unreadable():
    found = brats.score_missing_2022({"ET": ORGAN, "WT": NOTHING}, BLOCK)
    assert found == {name: {"dice": 0, "hd95": 374, "sensitivity": 0, "specificity": 0} for name in ("ET", "WT")}


@pytest.mark.parametrize(
    ("convention", "members"),
    [
        ("brats2021", {"WT": {1, 2, 4}, "TC": {1, 4}, "ET": {4}}),
        ("brats2023", {"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}}),
        (
            "brats2024",
            {"WT": {1, 2, 3}, "TC": {1, 3}, "NETC": {1}, "SNFH": {2}, "ET": {3}, "RC": {4}},
        ),
    ],
)
def test_brats_regions_by_convention(convention, members):
    """See docs/challenges.md, sections on BraTS."""
    values = sorted(set().union(*members.values()))
    found = brats.CODINGS[convention].masks(np.array([[[0, *values]]]), Path("label"))
    assert {
        name: {v for v, m in zip(values, mask[0, 0, 1:], strict=True) if m} for name, mask in found.items()
    } == members


def test_brats_2023_whole_image_by_hand():
    """Both empty: 1, 0, sensitivity 1; one empty 0 and 374."""
    grid = Geometry((6, 6, 6), (1.0, 1.0, 1.0))
    none, cube = np.zeros((6, 6, 6), bool), box((6, 6, 6), (1, 4), (1, 4), (1, 4))
    keys = ("dice_whole", "hd95_whole", "sensitivity", "specificity")

    def whole(pred, ref):
        found = brats.score_2023({"WT": pred}, {"WT": ref}, grid)["WT"]
        return [found[k] for k in keys]

    assert whole(none, none) == [1, 0, 1, 1]
    assert whole(none, cube) == [0, 374, 0, 1]
    assert whole(cube, none) == [0, 374, 0, pytest.approx(1 - 27 / 216)]
    assert whole(cube, cube) == [1, 0, 1, 1]


# -- generic ---------------------------------------------------------------------------------------------------------


def test_generic_leaves_undefined_values_out():
    found = generic.score({"a": EMPTY}, {"a": EMPTY}, FLAT, metrics=("dice", "hd"))["a"]
    assert math.isnan(found["dice"]) and math.isnan(found["hd"])
    found = generic.score({"a": SOME}, {"a": EMPTY}, FLAT, metrics=("dice", "hd"))["a"]
    assert found["dice"] == 0 and math.isnan(found["hd"])


# -- aggregation -----------------------------------------------------------------------------------------------------


def label_map(case, **attributes):
    return LabelMap(case, Path(case), case.rpartition("_")[0], attributes)


def organ(score, **others):
    return dict.fromkeys(chaos._COLUMNS, score) | others


def test_chaos_tasks_by_hand():
    """Threshold, then the mean over organs of a case, then over cases; an organ that is not evaluated is omitted."""
    mr = {"liver": organ(100), "right kidney": organ(80), "left kidney": organ(60), "spleen": organ(40)}
    ct, partial = {"liver": organ(90)}, {"liver": organ(50), "spleen": organ(math.nan)}
    rows = [("MR_1_T2SPIR", "4", mr), ("CT_1", "4", ct), ("MR_2_T2SPIR", "4", partial), ("CT_1", "2", ct)]
    jobs = [Job(label_map(case), None, {"task": task}) for case, task, _ in rows]
    scored = [ScoredCase(case, case, {"task": task}, values, {}) for case, task, values in rows]
    extra, found = chaos.aggregate(jobs, scored, map)
    assert extra == []
    assert found["tasks"]["4"]["cases"] == 3
    assert found["tasks"]["4"]["score"] == pytest.approx({"mean": 70, "sd": 20})  # 70, 90, 50
    assert found["tasks"]["2"]["score"] == {"mean": 90, "sd": None}
    assert found["average"]["score"] == pytest.approx(80)


def test_chaos_averages_scores_not_values():
    """Two cases with RAVD 0 and 10: scores 100 and 0, mean 50; the mean RAVD of 5 would score 0."""
    scored, jobs = [], []
    for case, ravd in (("CT_1", 0.0), ("CT_2", 10.0)):
        values = chaos.with_scores({"dice": 1.0, "ravd": ravd, "assd": 0.0, "mssd": 0.0})
        jobs.append(Job(label_map(case), None, {"task": "2"}))
        scored.append(ScoredCase(case, case, {"task": "2"}, {"liver": values}, {}))
    found = chaos.aggregate(jobs, scored, map)[1]["tasks"]["2"]
    assert found["ravd"]["mean"] == 5
    assert found["ravd_score"]["mean"] == 50
    assert found["score"]["mean"] == pytest.approx((100 + 75) / 2)


def test_chaos_tasks_are_those_of_the_challenge():
    """See docs/challenges.md, CHAOS: tasks."""
    four = {"liver", "right kidney", "left kidney", "spleen"}
    expected = {
        "1": ({"CT", "MR"}, {"liver"}),
        "2": ({"CT"}, {"liver"}),
        "3": ({"MR"}, {"liver"}),
        "4": ({"CT", "MR"}, four),
        "5": ({"MR"}, four),
    }
    assert {task: (set(m), set(o)) for task, (m, o) in chaos.TASKS.items()} == expected


@pytest.mark.parametrize(
    ("grey", "organ"),
    [
        *((g, None) for g in (0, 1, 55, 71, 110, 136, 175, 201, 240)),
        *((g, "liver") for g in (56, 63, 70)),
        *((g, "right kidney") for g in (111, 126, 135)),
        *((g, "left kidney") for g in (176, 189, 200)),
        *((g, "spleen") for g in (241, 252, 255)),
    ],
)
def test_chaos_greys(grey, organ):
    """See docs/challenges.md, CHAOS: files."""
    found = chaos.MR.masks(np.array([[[grey, 63]]]), Path("mask"))
    assert [name for name, m in found.items() if m[0, 0, 0]] == ([organ] if organ else [])
    assert found["liver"][0, 0, 1]
    assert chaos.CT.masks(np.full((1, 1, 1), grey), Path("mask"))["liver"].any() == (grey > 0)


def test_platform_2022_by_hand():
    """Every row is computed over the cases and the rows above it."""
    values = [0.9, 0.5, 0.7, 0.0]
    mean = 2.1 / 4
    column = [*values, mean]
    sd = math.sqrt(sum((v - sum(column) / 5) ** 2 for v in column) / 4)
    column.append(sd)
    ordered = sorted(column)
    median = (ordered[2] + ordered[3]) / 2
    column.append(median)
    ordered = sorted(column)
    q25 = (ordered[1] + ordered[2]) / 2  # rank 1.5 of 0..6
    column.append(q25)
    ordered = sorted(column)
    q75 = ordered[5] + 0.25 * (ordered[6] - ordered[5])  # rank 5.25 of 0..7
    expected = {"mean": mean, "sd": sd, "median": median, "q25": q25, "q75": q75}
    assert brats.platform_statistics(values) == pytest.approx(expected)
    np.testing.assert_allclose(brats.platform_statistics(values)["q75"], np.percentile(column, 75))


def test_platform_2022_differs_from_clean_statistics():
    values = np.random.default_rng(0).uniform(0, 1, 20)
    platform, clean = brats.platform_statistics(values), results.statistics(values)
    assert platform["mean"] == pytest.approx(clean["mean"])
    assert platform["sd"] != pytest.approx(clean["sd"], rel=1e-3)


def test_statistics_by_hand():
    found = results.statistics([0.2, math.nan, 0.4, 0.6, 0.8, 1.0, math.nan])
    assert (found["count"], found["missing"]) == (5, 2)
    expected = {"mean": 0.6, "sd": math.sqrt(0.1), "median": 0.6, "q25": 0.4, "q75": 0.8, "min": 0.2, "max": 1.0}
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert found["low"] is None and found["high"] is None  # no patients given


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_statistics_of_nothing(values):
    found = results.statistics(values, ["a"] * len(values))
    assert (found["count"], found["missing"]) == (0, len(values))
    assert all(found[k] is None for k in ("mean", "sd", "median", "q25", "q75", "min", "max", "low", "high"))


def test_statistics_of_one_case():
    found = results.statistics([0.5], ["a"])
    assert (found["mean"], found["median"], found["min"], found["max"]) == (0.5, 0.5, 0.5, 0.5)
    assert found["sd"] is None and found["low"] is None and found["high"] is None


def test_statistics_draw_only_patients_with_a_value():
    """The patient without a value must not be drawn: the interval is that of the two others."""
    found = results.statistics([0.0, 1.0, math.nan], ["a", "b", "c"])
    assert (found["low"], found["high"]) == (0, 1)


def test_interval_of_two_patients():
    """The mean of two draws is 0, 1/2 or 1, with 1/4, 1/2, 1/4."""
    assert results.bootstrap_interval(np.array([0.0, 1.0]), np.array(["a", "b"])) == (0, 1)


def test_interval_of_equal_values():
    low, high = results.bootstrap_interval(np.full(7, 0.3), np.arange(7))
    assert low == pytest.approx(0.3) and high == pytest.approx(0.3)


def test_interval_of_one_patient_is_unknown():
    assert results.bootstrap_interval(np.array([0.1, 0.9, 0.5]), np.array(["a", "a", "a"])) == (None, None)


def test_interval_draws_patients_not_cases():
    """Five cases each of two patients: as patients the ends are 0 and 1; as ten cases they lie inside."""
    values = np.repeat([0.0, 1.0], 5)
    assert results.bootstrap_interval(values, np.repeat(["a", "b"], 5)) == (0, 1)
    low, high = results.bootstrap_interval(values, np.arange(10))
    assert 0.1 <= low <= 0.3 and 0.7 <= high <= 0.9


def test_interval_weighs_cases_of_uneven_patients():
    """All 256 draws of four patients, of which one has most cases: means over cases, not over patients."""
    groups = {"a": [0.0], "b": [1.0] * 9, "c": [0.5] * 3, "d": [0.25] * 3}
    values = np.concatenate([*groups.values()])
    patients = np.array([name for name, cases in groups.items() for _ in cases])
    drawn, of_means = [], []
    for draw in itertools.product(groups, repeat=4):
        drawn.append(np.mean(np.concatenate([groups[p] for p in draw])))
        of_means.append(np.mean([np.mean(groups[p]) for p in draw]))
    ends, other = (np.percentile(d, [2.5, 97.5], method="inverted_cdf") for d in (drawn, of_means))
    assert results.bootstrap_interval(values, patients) == pytest.approx(ends.tolist(), abs=0.03)
    assert np.abs(ends - other).max() > 0.1


def test_interval_of_many_is_that_of_the_normal_law():
    values = np.random.default_rng(5).normal(3, 2, 400)
    low, high = results.bootstrap_interval(values, np.arange(400))
    error = values.std(ddof=1) / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


# -- comparison ------------------------------------------------------------------------------------------------------


def run(values, metric="dice", structure="WT"):
    return [ScoredCase(f"c{i}", f"p{i}", {}, {structure: {metric: float(v)}}, {}) for i, v in enumerate(values)]


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.5, 0.6, 0.04]) == pytest.approx([1.0, 1.0, 0.12])
    assert paired.holm([0.2]) == [0.2]
    assert paired.holm([]) == []


def test_wilcoxon_by_counting_signs():
    """Six differences of one sign: 2 of the 64 ways to sign them are as extreme."""
    a, b = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.11, 0.22, 0.33, 0.44, 0.55, 0.66]
    (found,) = paired.compare(run(a), run(b))
    assert found.p == pytest.approx(2 / 64)
    assert (found.cases, found.p_holm) == (6, found.p)
    assert found.mean == pytest.approx(0.035) and found.b - found.a == pytest.approx(0.035)


def test_wilcoxon_equals_scipy():
    rng = np.random.default_rng(2)
    a, b = rng.uniform(0, 1, (2, 30))
    (found,) = paired.compare(run(a), run(b))
    assert found.p == pytest.approx(wilcoxon(a, b).pvalue)
    assert found.mean == pytest.approx((b - a).mean())
    assert found.low < found.mean < found.high


def test_compare_takes_common_finite_cases():
    a = run([0.1, math.nan, 0.3, 0.4])
    b = run([0.2, 0.5, math.nan, 0.5, 0.9])
    (found,) = paired.compare(a, b)
    assert found.cases == 2
    assert paired.count_single(a, b) == {("WT", "dice"): (1, 1)}
    # B predicts nothing anywhere: there is no row, but the numbers are given
    none = run([math.nan] * 4)
    assert paired.count_single(a, none, ["dice"]) == {("WT", "dice"): (3, 0)}
    assert paired.count_single(a, none, ["hd95"]) == {} == paired.count_single(a, a)
    assert found.a == pytest.approx(0.25) and found.b == pytest.approx(0.35) and found.mean == pytest.approx(0.1)


def test_compare_with_itself():
    (found,) = paired.compare(run([0.1, 0.5, 0.7]), run([0.1, 0.5, 0.7]))
    assert (found.mean, found.low, found.high, found.p, found.p_holm) == (0, 0, 0, 1, 1)


def test_compare_with_some_equal_cases():
    """Zeros are left out of the ranks: 5 differences of one sign remain, whatever the variant used for p."""
    (found,) = paired.compare(run([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), run([0.1, 0.22, 0.33, 0.44, 0.55, 0.66]))
    assert 0.02 <= found.p <= 2 / 32


def test_compare_corrects_over_all_tests_shown():
    rng = np.random.default_rng(4)
    a = [
        ScoredCase(f"c{i}", f"p{i}", {}, {s: {"dice": rng.random(), "hd": rng.random()} for s in "xy"}, {})
        for i in range(9)
    ]
    b = [
        ScoredCase(f"c{i}", f"p{i}", {}, {s: {"dice": rng.random(), "hd": rng.random()} for s in "xy"}, {})
        for i in range(9)
    ]
    every = paired.compare(a, b)
    assert {(d.structure, d.metric) for d in every} == {(s, m) for s in "xy" for m in ("dice", "hd")}
    smallest = min(every, key=lambda d: d.p)
    assert smallest.p_holm == pytest.approx(min(1, 4 * smallest.p))
    some = paired.compare(a, b, ["dice"])
    assert {d.metric for d in some} == {"dice"} and len(some) == 2
    assert min(d.p_holm for d in some) == pytest.approx(min(1, 2 * min(d.p for d in some)))
    with pytest.raises(ValueError, match="common"):
        paired.compare(a, b, ["volume"])


def test_wilcoxon_is_over_patients():
    """Six patients with four images each, all better: 2 of the 64 ways to sign six patients are as extreme."""
    values = [(f"c{i}", f"p{i // 4}") for i in range(24)]
    first = [ScoredCase(c, p, {}, {"WT": {"dice": 0.5}}, {}) for c, p in values]
    second = [ScoredCase(c, p, {}, {"WT": {"dice": 0.51 + 0.01 * i}}, {}) for i, (c, p) in enumerate(values)]
    (found,) = paired.compare(first, second)
    assert found.cases == 24 and found.p == pytest.approx(2 / 64)


def test_compare_takes_the_patients_of_the_evaluation_that_knows_them():
    """Another program's predictions are scored without patients: each case is then named after itself."""
    known = [ScoredCase(f"c{i}", f"p{i // 5}", {}, {"WT": {"dice": 0.0}}, {}) for i in range(10)]
    unknown = [ScoredCase(f"c{i}", f"c{i}", {}, {"WT": {"dice": float(i >= 5)}}, {}) for i in range(10)]
    for first, second in ((known, unknown), (unknown, known)):
        (found,) = paired.compare(first, second)
        assert abs(found.mean) == 0.5 and found.high - found.low == 1, "two patients, whose differences are 0 and 1"
    other = [ScoredCase(f"c{i}", f"q{i // 5}", {}, {"WT": {"dice": 0.0}}, {}) for i in range(10)]
    with pytest.raises(ValueError, match="patients p0 and q0"):
        paired.compare(known, other)


def test_compare_interval_draws_patients():
    """Two patients with five cases each, whose differences are 0 and 1."""
    first = [ScoredCase(f"c{i}", f"p{i // 5}", {}, {"WT": {"dice": 0.0}}, {}) for i in range(10)]
    second = [ScoredCase(f"c{i}", f"p{i // 5}", {}, {"WT": {"dice": float(i >= 5)}}, {}) for i in range(10)]
    (found,) = paired.compare(first, second)
    assert (found.low, found.high, found.mean) == (0, 1, 0.5)


def ball(shape, radius):
    place = np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij", sparse=True)
    return sum(p**2 for p in place) < radius**2


@pytest.mark.parametrize("ref", [ball((40, 50, 60), 10), np.ones((40, 50, 60), bool)])
def test_a_tree_and_a_map_find_the_same_distances(ref):
    grid = Geometry(ref.shape, (0.7, 1.1, 2.3))
    full = masks.surface(np.ones(ref.shape, bool), border=True)
    other = masks.surface(ref, border=True)
    for source, target in ((full, other), (other, full)):
        by_tree, by_map = (
            masks._distances(source, target, grid, nearest)
            for nearest in (masks._nearest_by_tree, masks._nearest_by_map)
        )
        np.testing.assert_allclose(by_tree, by_map, rtol=1e-13)


SHAPE = (120, 120, 120)
FULL = np.ones(SHAPE, bool)


@pytest.mark.parametrize(
    ("pred", "ref", "tree"),
    [
        (ball(SHAPE, 50), np.roll(ball(SHAPE, 50), 2, 0), True),
        (FULL, FULL, True),
        (FULL, box(SHAPE, *((60, 61),) * 3), True),  # a single voxel
        (FULL, box(SHAPE, *((3, 117),) * 3), True),
        (np.ones((512, 512), bool), ball((512, 512), 100), True),
        (FULL, ball(SHAPE, 20), False),
        (np.indices(SHAPE).sum(0) % 2 > 0, ball(SHAPE, 20), False),  # every voxel is surface
    ],
)
def test_the_search_for_nearest_voxels_depends_on_counts_only(pred, ref, tree, monkeypatch):
    """Flat faces far from the other surface, and dense surfaces, are searched with a map; all else with a tree."""
    used = []
    for name in ("_nearest_by_tree", "_nearest_by_map"):
        monkeypatch.setattr(masks, name, lambda points, *_, name=name: used.append(name) or points)
    masks.surface_distances(pred, ref)
    assert used == ["_nearest_by_tree" if tree else "_nearest_by_map"] * 2


def test_skewed_axes_are_searched_with_a_tree(monkeypatch):
    monkeypatch.setattr(masks, "_nearest_by_map", None)
    axes = np.eye(3)
    axes[0, 1] = 0.1
    found = masks.surface_distances(FULL, ball(SHAPE, 20), Geometry(SHAPE, (1.0, 1.0, 1.0), axes))
    assert all(distances.size for distances in found)
