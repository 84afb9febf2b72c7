"""Region algebra by hand and over every combination."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from xdim_jax.data import regions
from xdim_jax.scoring import masks

pytestmark = pytest.mark.quick


def test_encode_and_decode_are_inverse():
    label = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    encoded = regions.BRATS.encode(label)
    # background, NCR, ED, ET as (WT, TC, ET)
    np.testing.assert_array_equal(encoded.reshape(4, 3), [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(regions.BRATS.decode(encoded), label)
    np.testing.assert_array_equal(regions.BRATS.encode(jnp.asarray(label), jnp), encoded)


def test_decode_of_masks_that_are_not_nested():
    """ED is written first, then NCR, then ET: an inner region is kept even where the outer one is missing."""
    for wt, tc, et in itertools.product([False, True], repeat=3):
        expected = regions.ET if et else regions.NCR if tc else regions.ED if wt else 0
        assert regions.BRATS.decode(np.array([[[[wt, tc, et]]]])).item() == expected


def test_regions_side_by_side_and_nested():
    """CAMUS: the cavity lies inside LV_epi, the atrium beside it."""
    camus = regions.Regions({"LV_endo": (1,), "LV_epi": (1, 2), "LA": (3,)})
    label = np.arange(4, dtype=np.uint8)
    np.testing.assert_array_equal(camus.encode(label), [[0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(camus.decode(camus.encode(label)), label)
    # endo, epi, LA: of those that lie apart the higher one, with what lies inside it
    scores = [[0.1, 0.6, 0.7], [0.1, 0.8, 0.7], [0.9, 0.1, 0.7], [0.6, 0.1, 0.7], [0.4, 0.4, 0.4]]
    np.testing.assert_array_equal(camus.decode(np.array(scores)), [3, 2, 1, 3, 0])
    np.testing.assert_array_equal(camus.decode(np.array(scores), threshold=0.3), [3, 2, 1, 3, 1])
    # WT, TC, ET, RC: a resection cavity that is sure is not painted over by a core that is hardly there
    assert regions.BRATS_2024.decode(np.array([0.2, 0.51, 0.1, 0.99])) == regions.RC


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"a": (1, 2), "b": (2, 3)}, "overlap"),
        ({"a": (1,), "b": (1,)}, "overlap"),
        ({"a": (1, 2)}, "exactly one"),
        ({"all": (1, 2), "a": (1,), "b": (2,)}, "exactly one"),
    ],
)
def test_regions_that_cannot_be_told_apart_are_refused(sets, words):
    with pytest.raises(ValueError, match=words):
        regions.Regions(sets)


@pytest.mark.parametrize(("minimum", "kept"), [(0, True), (3, True), (4, False)])
def test_small_et_becomes_necrosis(minimum, kept):
    label = np.zeros((2, 2, 2), np.uint8)
    label.flat[:3], label.flat[3] = regions.ET, regions.ED  # three voxels of ET
    out = regions.drop_small_et(label, minimum)
    assert np.count_nonzero(out == regions.ET) == (3 if kept else 0)
    assert np.count_nonzero(out == regions.NCR) == (0 if kept else 3)
    assert np.count_nonzero(out == regions.ED) == 1
    assert label.flat[0] == regions.ET, "the input is left as it was"


def test_only_the_largest_part_of_a_region_is_kept():
    """A stray ET within TC becomes NCR, a stray tumour background; parts that touch at a corner are one."""
    label = np.zeros((1, 6, 9), np.uint8)
    label[0, 0:4, 0:5] = regions.NCR
    label[0, 0, 0] = regions.ET
    label[0, 2:4, 3:5] = regions.ET
    label[0, 4, 5] = regions.ED  # at the corner of the tumour
    label[0, 5, 8] = regions.ED
    kept = regions.keep_largest(label, regions.BRATS, ("ET", "WT"))
    expected = label.copy()
    expected[0, 0, 0], expected[0, 5, 8] = regions.NCR, 0
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(regions.keep_largest(label, regions.BRATS, ()), label)
    empty = np.zeros_like(label)
    np.testing.assert_array_equal(regions.keep_largest(empty, regions.BRATS, ("ET",)), empty)


@pytest.mark.parametrize("seed", range(4))
def test_dice_of_a_case_is_that_of_its_masks(seed):
    """Nested and disjoint regions, ignored voxels, and a region that is not annotated; in 2D and 3D."""
    rng = np.random.default_rng(seed)
    shape = (5, 7, 6)[: 2 + seed % 2]
    sets = {"whole": (1, 2, 3), "core": (2, 3), "centre": (3,), "other": (7,), "absent": (9,), "not annotated": (4,)}
    label, truth = (rng.choice([0, 1, 2, 3, 4, 7, 255][: 6 + k], shape).astype(np.uint8) for k in (0, 1))
    dataset = SimpleNamespace(regions=regions.Regions(sets), annotated=lambda case: tuple(sets)[:-1])
    found = masks.region_dice(dataset, None, label, truth)
    assert list(found) == list(sets)[:-1]
    for name, value in found.items():
        pred, ref = np.isin(label, sets[name]) & (truth != 255), np.isin(truth, sets[name])
        np.testing.assert_equal(value, masks.dice(pred, ref))
    assert np.isnan(found["absent"])
