"""Region algebra by hand and over every combination."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from xdim_jax import regions


def test_encode_and_decode_are_inverse():
    label = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    masks = regions.encode(label)
    # background, NCR, ED, ET as (WT, TC, ET)
    np.testing.assert_array_equal(masks.reshape(4, 3), [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(regions.decode(masks), label)
    np.testing.assert_array_equal(regions.encode(jnp.asarray(label), jnp), masks)


def test_decode_of_masks_that_are_not_nested():
    """ED is written first, then NCR, then ET: an inner region is kept even where the outer one is missing."""
    for wt, tc, et in itertools.product([False, True], repeat=3):
        expected = regions.ET if et else regions.NCR if tc else regions.ED if wt else 0
        assert regions.decode(np.array([[[[wt, tc, et]]]])).item() == expected


@pytest.mark.parametrize(("minimum", "kept"), [(0, True), (3, True), (4, False)])
def test_small_et_becomes_necrosis(minimum, kept):
    label = np.zeros((2, 2, 2), np.uint8)
    label.flat[:3], label.flat[3] = regions.ET, regions.ED  # three voxels of ET
    out = regions.drop_small_et(label, minimum)
    assert np.count_nonzero(out == regions.ET) == (3 if kept else 0)
    assert np.count_nonzero(out == regions.NCR) == (0 if kept else 3)
    assert np.count_nonzero(out == regions.ED) == 1
    assert label.flat[0] == regions.ET, "the input is left as it was"
