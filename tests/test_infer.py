"""Sliding windows against whole-volume answers that are known without them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from xdim_jax import infer, output, regions
from xdim_jax.data.case import Case, Volume
from xdim_jax.data.grid import Grid
from xdim_jax.data.labels import Labels
from xdim_jax.data.prepare import Preparation, prepare

BRATS = output.Output("sigmoid", regions.BRATS, regions.TISSUES)


@pytest.mark.parametrize(
    ("size", "patch", "overlap", "starts"),
    [
        (64, 64, 0.5, [0]),
        (50, 64, 0.5, [0]),
        (65, 64, 0.5, [0, 1]),
        (128, 64, 0.5, [0, 32, 64]),
        (240, 128, 0.5, [0, 56, 112]),
        (10, 4, 0.0, [0, 3, 6]),
    ],
)
def test_windows_cover_with_the_overlap(size, patch, overlap, starts):
    assert infer.window_starts(size, patch, overlap) == starts
    gaps = np.diff(starts)
    assert all(g <= patch * (1 - overlap) for g in gaps)


def test_gaussian_weights_are_separable_symmetric_and_positive():
    weights = infer.gaussian_weights((4, 6, 9))
    assert weights.shape == (4, 6, 9) and weights.dtype == np.float32
    assert weights.max() == 1 and weights.min() > 0
    np.testing.assert_array_equal(weights, weights[::-1, ::-1, ::-1])
    # sigma is an eighth of the side: one sigma from the middle of 9 voxels is 1.125 voxels
    line = infer.gaussian_weights((1, 1, 9))[0, 0]
    assert line[5] == pytest.approx(np.exp(-0.5 * (1 / 1.125) ** 2), rel=1e-6)


@pytest.mark.parametrize("size", [(40, 50, 33), (16, 70, 32), (5, 7, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_voxelwise_network_is_blended_to_its_whole_volume_answer(size, overlap, rng):
    """Every window gives the right probability at every voxel, so any weights must blend to it."""
    image = rng.normal(size=(*size, 2)).astype(np.float32)
    forward = lambda weights, x: jnp.stack([x[..., 0] * weights, x[..., 1]], -1)  # noqa: E731
    predict = infer.make_volume_predictor(forward, BRATS, patch=(32, 32, 32), overlap=overlap)
    probs = predict(jnp.float32(3.0), image)
    expected = 1 / (1 + np.exp(-image * np.array([3.0, 1.0])))
    np.testing.assert_allclose(probs, expected, atol=1e-6)


def test_windows_are_weighted_by_the_gaussian():
    """A network that answers with the position in its window: the blend is the weighted mean, written out."""
    ramp = jnp.arange(4.0).reshape(1, 4, 1, 1, 1)
    forward = lambda weights, x: jnp.broadcast_to(ramp, (1, 4, 4, 4, 1))  # noqa: E731
    probs = infer.make_volume_predictor(forward, BRATS, patch=(4, 4, 4), overlap=0.5)(
        None, np.zeros((6, 4, 4, 1), np.float32)
    )
    gauss = infer.gaussian_weights((4, 1, 1))[:, 0, 0]
    sigmoid = 1 / (1 + np.exp(-np.arange(4.0)))
    # voxel 3 is at place 3 of window 0 and at place 1 of window 2
    expected = (gauss[3] * sigmoid[3] + gauss[1] * sigmoid[1]) / (gauss[3] + gauss[1])
    assert probs[3, 2, 2, 0] == pytest.approx(expected, rel=1e-5)
    assert probs[0, 2, 2, 0] == pytest.approx(0.5, rel=1e-5)


def test_segment_puts_the_box_back_and_drops_small_et():
    image = np.zeros((6, 7, 8, 4), np.float32)
    image[2:5, 1:6, 3:7] = np.random.default_rng(0).normal(5, 1, (3, 5, 4, 4))
    case = Case("case", "case", (Path("a.nii"),), ("a", "b", "c", "d"), None, Labels("", ("", "x"), (0, 1)))
    volume = Volume("case", image, None, Grid((8, 7, 6), np.eye(4)))
    prepared = prepare(case, volume, Preparation(crop="nonzero", normalise="zscore_nonzero"))
    probs = np.zeros((3, 5, 4, 3), np.float32)
    probs[0, 0, 0] = (0.9, 0.9, 0.9)
    probs[2, 4, 3] = (0.6, 0.2, 0.1)
    options = {"threshold": 0.5, "min_et": 0}
    label = infer.segment(lambda weights, x: probs, None, prepared, BRATS, options)
    assert label.shape == (6, 7, 8) and np.count_nonzero(label) == 2
    assert label[2, 1, 3] == regions.ET and label[4, 5, 6] == regions.ED
    label = infer.segment(lambda weights, x: probs, None, prepared, BRATS, options | {"min_et": 2})
    assert label[2, 1, 3] == regions.NCR


def test_a_2d_network_sees_every_slice_once_and_in_order(rng):
    """Its answer for a slice depends on that slice alone, so blending must give it back at its place."""
    image = rng.normal(size=(19, 32, 32, 1)).astype(np.float32)
    seen = []

    def forward(weights, x):
        jax.debug.callback(lambda n: seen.append(int(n)), x.shape[0])
        return jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)

    config = ConfigDict({"data": {"patch": (32, 32)}, "predict": {"overlap": 0.5}})
    probs = infer.make_network_predictor(config, forward, BRATS)(None, image)
    jax.effects_barrier()
    expected = 1 / (1 + np.exp(-image.mean((1, 2), keepdims=True)))
    np.testing.assert_allclose(probs, np.broadcast_to(expected, image.shape), atol=1e-6)
    assert seen == [8, 8, 8], "in batches of slices"
    infer.make_network_predictor(config, forward, BRATS)(None, image[:1])
    jax.effects_barrier()
    assert seen[3:] == [1], "a single image is not filled up"
