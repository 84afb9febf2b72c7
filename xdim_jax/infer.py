"""Whole volumes from a network that takes patches: sliding windows with Gaussian weights, then labels."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax import regions
from xdim_jax.data.prepare import Prepared
from xdim_jax.output import Output

SIGMA = 1 / 8  # of the patch: a window's weight falls to 3e-4 at the middle of its faces (nnU-Net's choice)
_FLOOR = 1e-3  # smallest weight, so that a corner seen by one window only is not divided by zero
_BUCKET = 32  # accumulators are rounded up to it, so that few programs are compiled

# weights, image (D, H, W, C) float32 -> probabilities (D, H, W, channels) float32
VolumePredictor = Callable[[Any, np.ndarray], np.ndarray]


def gaussian_weights(patch: Sequence[int]) -> np.ndarray:
    """Weight of every voxel of a window, float32 of shape ``patch``, 1 at the centre."""
    weights = np.ones((), np.float64)
    for n in patch:
        profile = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (SIGMA * n)) ** 2)
        weights = weights[..., None] * profile
    return np.maximum(weights / weights.max(), _FLOOR).astype(np.float32)


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Starts of the fewest evenly spread windows that cover ``size`` and overlap by at least ``overlap``."""
    if size <= patch:
        return [0]
    count = -(-(size - patch) // max(int(patch * (1 - overlap)), 1)) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


def make_volume_predictor(
    forward: Callable[[Any, jax.Array], jax.Array],
    output: Output,
    *,
    patch: tuple[int, int, int],
    overlap: float | tuple[float, float, float],
) -> VolumePredictor:
    """Probabilities of whole volumes.

    Args:
        forward: weights and ``(1, *patch, C)`` to logits ``(1, *patch, channels)``; one shape, so compiled once.
        output: what the channels mean.
        patch: window size; smaller volumes are padded with zeros.
        overlap: share of a window that its neighbour covers, in [0, 1); of all axes, or by axis.
    """
    overlaps = overlap if isinstance(overlap, tuple) else (overlap,) * 3
    gauss = gaussian_weights(patch)[..., None]

    @jax.jit
    def window(weights: Any, image: jax.Array) -> jax.Array:
        return output.probabilities(forward(weights, image[None])[0]) * gauss

    def add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        index = (start[0], start[1], start[2], 0)
        old = jax.lax.dynamic_slice(total, index, part.shape)
        return jax.lax.dynamic_update_slice(total, old + part, index)

    accumulate = jax.jit(add, donate_argnums=0)

    def predict(weights: Any, image: np.ndarray) -> np.ndarray:
        size = image.shape[:3]
        before = [max(p - n, 0) // 2 for n, p in zip(size, patch, strict=True)]  # centred, as training patches are
        pads = [(low, max(p - n, 0) - low) for n, p, low in zip(size, patch, before, strict=True)]
        image = np.pad(image, [*pads, (0, 0)])
        padded = [-(-n // _BUCKET) * _BUCKET for n in image.shape[:3]]
        norm = np.zeros((*padded, 1), np.float32)
        total = None
        starts = [window_starts(n, p, o) for n, p, o in zip(image.shape[:3], patch, overlaps, strict=True)]
        for start in itertools.product(*starts):
            box = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
            part = window(weights, jnp.asarray(image[box]))
            if total is None:
                total = jnp.zeros((*padded, part.shape[-1]), jnp.float32)
            total = accumulate(total, part, jnp.asarray(start))
            norm[box] += gauss
        assert total is not None
        inside = tuple(slice(low, low + n) for low, n in zip(before, size, strict=True))
        return np.asarray(total)[inside] / norm[inside]

    return predict


_SLICES = 8  # of a 2D network's batch: so many slices of a volume at once


def make_network_predictor(
    config: Any, forward: Callable[[Any, jax.Array], jax.Array], output: Output
) -> VolumePredictor:
    """The predictor of whole volumes for the network of a run's config, in 2D or 3D."""
    patch, overlap = tuple(config.data.patch), config.predict.overlap
    if len(patch) == 3:
        return make_volume_predictor(forward, output, patch=patch, overlap=overlap)
    return _by_slices(forward, output, (patch[0], patch[1]), overlap)


def _by_slices(
    forward: Callable[[Any, jax.Array], jax.Array], output: Output, patch: tuple[int, int], overlap: float
) -> VolumePredictor:
    """A 2D network on volumes: slices become its batch, in order; a window is some slices deep."""

    @functools.cache
    def predictor(depth: int) -> VolumePredictor:
        return make_volume_predictor(
            lambda weights, volume: forward(weights, volume[0])[None],
            output,
            patch=(depth, *patch),
            overlap=(0.0, overlap, overlap),
        )

    return lambda weights, image: predictor(min(len(image), _SLICES))(weights, image)


def segment(
    predict: VolumePredictor, weights: Any, prepared: Prepared, output: Output, config: Mapping[str, Any]
) -> np.ndarray:
    """Label indices uint8 (D, H, W) on the source grid.

    Probabilities become labels as `xdim_jax.output` says, at ``config["threshold"]``; where the config has ``min_et``
    (BraTS), fewer voxels of ET become NCR.
    """
    scores = prepared.restore(predict(weights, prepared.image()))
    label = output.decode(scores, config["threshold"])
    return regions.drop_small_et(label, config["min_et"]) if config.get("min_et") else label
