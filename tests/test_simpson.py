"""Simpson's biplane rule against a slow implementation of the steps in docs/challenges.md, and against geometry."""

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import pearsonr
from skimage.measure import find_contours

from tests.reference_scores import CAMUS_IMAGES, slow_view, slow_volumes, ventricle
from xdim_jax.scoring import camus, simpson
from xdim_jax.scoring.simpson import Volumes

pytestmark = pytest.mark.quick


# -- phantoms -------------------------------------------------------------------------------------------------------


def patient(shape, spacing, change=lambda mask, key: mask, **options):
    """Four masks of one pose, each a little different."""
    masks = {}
    for n, key in enumerate(CAMUS_IMAGES):
        shrink = 0.85 if key[1] == "ES" else 1.0
        own = {"length": 70.0 * shrink + n, "width": 22.0 * shrink - n / 2} | options
        masks[key] = change(ventricle(shape, spacing, **own), key), spacing
    return masks


def with_hole(mask, key):
    rows, cols = np.nonzero(mask)
    r, c = int(rows.mean()), int(cols.mean())
    mask[r - 2 : r + 3, c - 12 : c - 9] = False
    mask[r : r + 2, c : c + 2] = False
    return mask


def with_stray_below(mask, key):
    """Behind the ventricle in raster order, so that the first contour stays the ventricle's."""
    mask[-4:-1, 2:8] = True
    return mask


def with_stray_above(mask, key):
    mask[2:12, 4:16] = True
    return mask


def ragged(mask, key):
    rng = np.random.default_rng(CAMUS_IMAGES.index(key))
    edge = mask ^ np.roll(mask, 1, 1)
    return mask ^ (edge & (rng.random(mask.shape) < 0.3))


PATIENTS = {
    "straight": patient((96, 72), (1.0, 1.0)),
    "turned left": patient((96, 80), (1.0, 1.0), turn=-17.0),
    "turned right, fine columns": patient((90, 110), (1.1, 0.7), turn=12.0, shift=(-2.0, 3.0)),
    "old release": patient((120, 40), (0.77, 1.54), turn=8.0),
    "odd ratio": patient((61, 83), (1.37, 0.93), turn=-9.0, bend=9.0),
    "holes": patient((96, 72), (1.0, 1.0), with_hole, turn=5.0),
    "stray part below": patient((96, 72), (1.0, 1.0), with_stray_below),
    "stray part above": patient((96, 72), (1.0, 1.0), with_stray_above),
    "ragged": patient((96, 72), (1.0, 1.0), ragged, turn=-6.0),
    "cut by the edge below": patient((96, 72), (1.0, 1.0), shift=(20.0, 0.0)),
    "cut by the edge on the left": patient((96, 72), (1.0, 1.0), shift=(0.0, -22.0)),
    "small": patient((96, 72), (1.0, 1.0), length=25.0, width=9.0),
}


def rests_on_a_stray_piece(mask, spacing):
    """Whether the area inside of the first contour, by the shoelace formula, is less than half of the cavity."""
    mask = simpson.resample_isotropic(mask, spacing)
    first = {tuple(point + 1) for point in find_contours(mask.astype(float), 0.5)[0]}
    # with a margin all contours are closed, also those at the edge of the image
    closed = find_contours(np.pad(mask.astype(float), 1), 0.5)
    y, x = max(closed, key=lambda contour: len(first & set(map(tuple, contour)))).T
    return abs(np.dot(y, np.roll(x, 1)) - np.dot(x, np.roll(y, 1))) / 2 < 0.5 * mask.sum()


@pytest.mark.parametrize("step", ["largest", "per_instant"])
@pytest.mark.parametrize("name", PATIENTS)
def test_equals_the_slow_implementation(name, step):
    masks = PATIENTS[name]
    if any(rests_on_a_stray_piece(*masks[key]) for key in CAMUS_IMAGES):
        found = simpson.volumes(masks, step=step)
        assert math.isnan(found.edv) and math.isnan(found.esv) and "stray piece" in found.reason
        return
    if any(slow_view(*masks[key]) is None for key in CAMUS_IMAGES):
        found = simpson.volumes(masks, step=step)
        assert math.isnan(found.edv) and math.isnan(found.esv) and found.reason
        return
    found = simpson.volumes(masks, step=step)
    assert (found.edv, found.esv) == pytest.approx(slow_volumes(masks, step), abs=1e-8)
    edv, esv = (float(round(v)) for v in (found.edv, found.esv))
    assert found.rounded == (edv, esv)
    assert found.ef == pytest.approx(100 * (edv - esv) / edv)


def half_ellipse(width, height, centre):
    y, x = np.mgrid[:60, :60]
    return (y <= 50) & (((y - 50) / height) ** 2 + ((x - centre) / width) ** 2 <= 1)


def blob(seed):
    return gaussian_filter(np.random.default_rng(seed).standard_normal((40, 40)), 3.5) > 0.02


SHAPES = {
    **{f"ellipse {w} {h} {c}": half_ellipse(w, h, c) for w in (9, 14, 16) for h in (30, 41) for c in (29, 29.5)},
    **{f"blob {seed}": blob(seed) for seed in (0, 1, 9, 10, 14, 15, 21, 25, 33, 52)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_upright_and_wild_shapes_equal_the_slow_implementation(name):
    """Chords of one length, places half between two pixels, chords near 45 degrees: where the order of steps shows."""
    mask = SHAPES[name]
    found, slow = simpson.discs(mask, (1.0, 1.0)), slow_view(mask, (1.0, 1.0))
    if rests_on_a_stray_piece(mask, (1.0, 1.0)):
        assert "stray piece" in found
        return
    assert isinstance(found, str) == (slow is None)
    if slow is not None:
        assert found.diameters.tolist() == pytest.approx(slow[0])
        assert found.height == pytest.approx(slow[1])


def test_the_step_is_the_largest_of_four():
    masks = PATIENTS["straight"]
    default, own = simpson.volumes(masks), simpson.volumes(masks, step="per_instant")
    assert default.edv == pytest.approx(own.edv)
    assert default.esv > 1.1 * own.esv  # the systolic length is 15 % shorter


def test_heights_and_diameters_by_hand():
    """A rectangle of 60 rows and 30 columns: base and opposite side are flat; a diameter spans it to half a pixel."""
    mask = np.zeros((90, 70), bool)
    mask[15:75, 20:50] = True
    found = simpson.discs(mask, (0.5, 0.5))
    assert found.diameters.shape == (20,)
    slow = slow_view(mask, (0.5, 0.5))
    assert found.diameters.tolist() == pytest.approx(slow[0])
    assert found.height == pytest.approx(slow[1])
    assert 60 * 0.5 / 20 <= found.height <= math.hypot(60, 15.5) * 0.5 / 20 + 0.05


@pytest.mark.parametrize("spacing", [(0.5, 0.5), (0.4, 0.8)])
def test_half_an_ellipsoid(spacing):
    """2/3 pi L a b, within what 8 pixels of freedom at the base and 20 discs leave open."""
    size = round(110 / spacing[0]), round(80 / spacing[1])
    long, a, b = 80.0, 24.0, 28.0
    masks = {}
    for view, instant in CAMUS_IMAGES:
        shrink = 1.0 if instant == "ED" else 0.8
        width = (a if view == "2CH" else b) * shrink
        masks[view, instant] = ventricle(size, spacing, length=long * shrink, width=width), spacing
    found = simpson.volumes(masks, step="per_instant")
    edv = 2 / 3 * math.pi * long * a * b / 1000
    assert found.edv == pytest.approx(edv, rel=0.04)
    assert found.esv == pytest.approx(edv * 0.8**3, rel=0.04)
    assert found.ef == pytest.approx(100 * (1 - 0.8**3), abs=1.5)


def test_no_half_width_is_below_8_pixels():
    mask = np.zeros((60, 60), bool)
    mask[10:50, 28:32] = True  # 4 pixels wide
    found = simpson.discs(mask, (1.0, 1.0))
    np.testing.assert_array_equal(found.diameters, 16)


@pytest.mark.parametrize("key", CAMUS_IMAGES)
@pytest.mark.parametrize("kind", ["empty", "full", "no base"])
def test_failures_are_not_numbers(kind, key):
    """No cavity, no contour, or an open contour that is upright, so that no chord is flat."""
    shape = (96, 72)
    mask = {
        "empty": np.zeros(shape, bool),
        "full": np.ones(shape, bool),
        "no base": np.broadcast_to(np.arange(shape[1]) < 30, shape),
    }[kind]
    found = simpson.volumes(PATIENTS["straight"] | {key: (mask, (1.0, 1.0))})
    assert all(math.isnan(v) for v in (found.edv, found.esv, found.ef, *found.rounded))


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1)])
def test_an_image_of_one_row_is_a_failure(shape):
    found = simpson.volumes(PATIENTS["straight"] | {("2CH", "ES"): (np.ones(shape, bool), (1.0, 1.0))})
    assert math.isnan(found.edv) and math.isnan(found.esv)


@pytest.mark.parametrize("where", [(3, 4), (40, 2)])
def test_a_single_pixel_does_not_raise(where):
    mask = np.zeros((96, 72), bool)
    mask[where] = True
    found = simpson.volumes(PATIENTS["straight"] | {("2CH", "ES"): (mask, (1.0, 1.0))})
    expected = slow_view(mask, (1.0, 1.0))
    assert math.isnan(found.esv) == (expected is None)


def test_the_largest_part_alone():
    """With a stray part first in raster order: the official contour is the stray part's; the option drops it."""
    stray, clean = PATIENTS["stray part above"], PATIENTS["straight"]
    assert all(" ".join(key) in simpson.volumes(stray).reason for key in CAMUS_IMAGES)
    found = simpson.volumes(stray, contour="largest_part")
    assert (found.edv, found.esv) == pytest.approx(slow_volumes(clean), abs=1e-8)


def test_parts_are_connected_by_faces():
    """Two blocks that meet at a corner are two parts: the larger one alone remains."""
    mask = np.zeros((96, 72), bool)
    mask[20:70, 20:50] = True
    alone = simpson.discs(mask, (1.0, 1.0))
    mask[10:20, 10:20] = True
    found = simpson.discs(mask, (1.0, 1.0), contour="largest_part")
    assert found.height == alone.height and found.diameters.tolist() == alone.diameters.tolist()


def test_unknown_options():
    with pytest.raises(ValueError, match="per_view"):
        simpson.volumes(PATIENTS["straight"], step="per_view")
    with pytest.raises(ValueError, match="longest"):
        simpson.volumes(PATIENTS["straight"], contour="longest")


@pytest.mark.parametrize(
    ("edv", "esv", "rounded", "ef"),
    [
        (100.5, 50.5, (100, 50), 50.0),
        (101.5, 51.5, (102, 52), 100 * 50 / 102),
        (99.6, 33.4, (100, 33), 67.0),
        (0.5, 0.2, (0, 0), math.nan),
        (50.0, 60.0, (50, 60), -20.0),
    ],
)
def test_volumes_are_rounded_half_to_even_before_ef(edv, esv, rounded, ef):
    found = Volumes(edv, esv)
    assert found.rounded == rounded
    assert found.ef == pytest.approx(ef, nan_ok=True)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((10, 14), (1.0, 0.5)), ((9, 13), (0.308, 0.154)), ((11, 7), (1.37, 0.93)), ((5, 6), (1.0, 1.0))],
)
def test_isotropic_by_loops(shape, spacing):
    mask = np.random.default_rng(0).random(shape) > 0.5
    new = [round(n * s / min(spacing)) for n, s in zip(shape, spacing, strict=True)]
    expected = [
        [
            mask[math.floor((r + 0.5) * shape[0] / new[0]), math.floor((c + 0.5) * shape[1] / new[1])]
            for c in range(new[1])
        ]
        for r in range(new[0])
    ]
    assert simpson.resample_isotropic(mask, spacing).tolist() == expected


# -- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_equals_scipy_and_numpy():
    rng = np.random.default_rng(0)
    ref = rng.normal(100, 20, 30)
    pred = ref + rng.normal(3, 8, 30)
    found = camus.agreement(pred, ref)
    assert found == pytest.approx(
        {
            "correlation": pearsonr(pred, ref).statistic,
            "bias": np.mean(pred - ref),
            "sd": np.std(pred - ref, ddof=1),
            "mae": np.mean(np.abs(pred - ref)),
        }
    )


def test_agreement_by_hand():
    found = camus.agreement([1.0, 2.0, 6.0], [2.0, 4.0, 3.0])
    # means 3 and 3; products 2, -1, 0; squares 4 + 1 + 9 and 1 + 1 + 0; differences -1, -2, 3
    assert found["correlation"] == pytest.approx((2 - 1 + 0) / math.sqrt(14 * 2))
    assert found["bias"] == pytest.approx(0)
    assert found["sd"] == pytest.approx(math.sqrt(14 / 2))
    assert found["mae"] == pytest.approx(2)


def test_agreement_of_too_few():
    assert camus.agreement([], []) == {"correlation": None, "bias": None, "sd": None, "mae": None}
    assert camus.agreement([5.0], [3.0]) == {"correlation": None, "bias": 2, "sd": None, "mae": 2}
    assert camus.agreement([5.0, 5.0], [3.0, 4.0])["correlation"] is None


@pytest.mark.parametrize(
    ("edv", "esv", "plausible"),
    [
        (120, 60, True),
        (60, 120, False),
        (80, 80, False),
        (650, 90, False),
        (0, 0, False),
        (50, 0, False),
        (599, 1, True),
    ],
)
def test_volumes_that_no_heart_has_are_implausible(edv, esv, plausible):
    assert (Volumes(edv, esv).implausible == "") == plausible
