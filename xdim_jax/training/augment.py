"""Augmentation on the device: batched, jitted, in 2D and 3D, as a part of the training step.

Every sample has 64 random bits of its own (``batch["key"]``, see `xdim_jax.data.pipeline`). So its augmentation depends
only on the seed and on its position in the stream, not on devices, processes or threads. All geometric transforms of a
sample are composed into one map of coordinates: the image is interpolated once (linearly), and the label once (nearest
neighbour). A transform with probability 0 is not part of the program.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.training.augment_table import STREAMS, settings

_GEOMETRIC = ("scale", "rotate", "translate", "shear", "flip", "elastic")

Batch = dict[str, jax.Array]


def make_augment(section: Mapping[str, Mapping[str, Any]], ndim: int) -> Callable[[Batch], Batch] | None:
    """Build ``augment(batch) -> batch`` for images ``(B, *spatial, C)`` and labels ``(B, *spatial)``.

    Returns:
        The function, or None if every probability is 0.

    Raises:
        UserError: See `xdim_jax.training.augment_table.settings`.
    """
    full = settings(section, ndim)
    on = {name: values for name, values in full.items() if values["p"] > 0}
    if not on:
        return None

    def augment(batch: Batch) -> Batch:
        image, label = jax.vmap(functools.partial(augment_sample, on))(batch["key"], batch["image"], batch["label"])
        return {**batch, "image": image, "label": label}

    return augment


def augment_sample(
    on: Mapping[str, Mapping[str, Any]], key: jax.Array, image: jax.Array, label: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augment one sample: key uint32 (2,), image float32 ``(*spatial, C)``, label ``(*spatial)``."""
    root = jax.random.wrap_key_data(key)
    # every transform has its own key, so switching one off does not change the others
    keys = {name: jax.random.fold_in(root, number) for name, number in STREAMS.items()}
    if any(name in on for name in _GEOMETRIC):
        at = coordinates(on, keys, label.shape)
        image, label = sample_linear(image, at), sample_nearest(label, at)
    for name, function in _INTENSITY.items():
        if name in on:
            image = function(on[name], keys[name], image)
    return image, label


def _chosen(key: jax.Array, p: float, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, 0), shape) < p


def _uniform(key: jax.Array, low: float, high: float, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, 1), shape, minval=low, maxval=high)


# -- geometry -----------------------------------------------------------------------------------------------------


def matrix(on: Mapping[str, Mapping[str, Any]], keys: Mapping[str, jax.Array], ndim: int) -> jax.Array:
    """Return the linear map from output to input coordinates, relative to the centre, in voxels, ``(ndim, ndim)``."""
    out = jnp.eye(ndim)
    if "flip" in on:
        flipped = _chosen(keys["flip"], on["flip"]["p"], (ndim,))
        allowed = jnp.asarray([axis in tuple(on["flip"]["axes"]) for axis in range(ndim)])
        out = out * jnp.where(flipped & allowed, -1.0, 1.0)
    if "scale" in on:
        low, high = (math.log(on["scale"][k]) for k in ("low", "high"))
        factor = jnp.exp(_uniform(keys["scale"], low, high))
        out = out / jnp.where(_chosen(keys["scale"], on["scale"]["p"]), factor, 1.0)
    if "shear" in on:
        amount = on["shear"]["amount"]
        slopes = _uniform(keys["shear"], -amount, amount, (ndim, ndim)) * (1 - jnp.eye(ndim))
        out = out @ (jnp.eye(ndim) + jnp.where(_chosen(keys["shear"], on["shear"]["p"]), slopes, 0.0))
    if "rotate" in on:
        limit = math.radians(on["rotate"]["degrees"])
        planes = [(ndim - 2, ndim - 1)] if on["rotate"]["plane"] else _planes(ndim)
        angles = _uniform(keys["rotate"], -limit, limit, (len(planes),))
        angles = jnp.where(_chosen(keys["rotate"], on["rotate"]["p"]), angles, 0.0)
        for i, plane in enumerate(planes):
            out = out @ _rotation(ndim, plane, angles[i])
    return out


def _planes(ndim: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(ndim) for b in range(a + 1, ndim)]


def _rotation(ndim: int, plane: tuple[int, int], angle: jax.Array) -> jax.Array:
    a, b = plane
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.eye(ndim).at[a, a].set(cos).at[b, b].set(cos)
    return turn.at[a, b].set(-sin).at[b, a].set(sin)


def coordinates(
    on: Mapping[str, Mapping[str, Any]], keys: Mapping[str, jax.Array], shape: tuple[int, ...]
) -> list[jax.Array]:
    """Return the input coordinates of every output voxel, in voxels: one array of ``shape`` per axis."""
    ndim = len(shape)
    linear = matrix(on, keys, ndim)
    centre = [(n - 1) / 2 for n in shape]
    offsets = [jnp.arange(n) - c for n, c in zip(shape, centre, strict=True)]
    shift = jnp.zeros(ndim)
    if "translate" in on:
        share = on["translate"]["share"]
        shift = _uniform(keys["translate"], -share, share, (ndim,)) * jnp.asarray(shape)
        shift = jnp.where(_chosen(keys["translate"], on["translate"]["p"]), shift, 0.0)
    at = []
    for axis in range(ndim):
        place = centre[axis] + shift[axis]
        for other in range(ndim):
            line = offsets[other].reshape([-1 if i == other else 1 for i in range(ndim)])
            place = place + linear[axis, other] * line
        at.append(place)
    if "elastic" in on:
        cells = on["elastic"]["cells"]
        coarse = [min(cells, n) for n in shape]
        field = jax.random.normal(jax.random.fold_in(keys["elastic"], 1), (ndim, *coarse))
        smooth = jax.image.resize(field, (ndim, *shape), "cubic") * _chosen(keys["elastic"], on["elastic"]["p"])
        share = on["elastic"]["share"]
        at = [a + share * n * smooth[i] for i, (a, n) in enumerate(zip(at, shape, strict=True))]
    return at


def sample_linear(image: jax.Array, at: list[jax.Array]) -> jax.Array:
    """Interpolate ``(*spatial, C)`` linearly at coordinates in voxels. Values outside of the image are 0."""
    ndim, channels = image.ndim - 1, image.shape[-1]
    padded = jnp.pad(image, [(1, 1)] * ndim + [(0, 0)])  # a border of zeros, so that no index is out of bounds
    flat = padded.reshape(-1, channels)
    strides = np.cumprod([1, *padded.shape[ndim - 1 : 0 : -1]])[::-1]
    lower, weight = [], []
    for place, n in zip(at, image.shape[:ndim], strict=True):
        place = jnp.clip(place, -1, n) + 1
        floor = jnp.minimum(jnp.floor(place), n)
        lower.append(floor.astype(jnp.int32))
        weight.append(place - floor)
    base = functools.reduce(jnp.add, [i * int(s) for i, s in zip(lower, strides, strict=True)])
    total = jnp.zeros((*base.shape, channels), image.dtype)
    for corner in np.ndindex(*[2] * ndim):
        share = functools.reduce(jnp.multiply, [w if c else 1 - w for c, w in zip(corner, weight, strict=True)])
        index = base + int(np.dot(corner, strides))
        total = total + share[..., None] * flat.at[index].get(mode="promise_in_bounds")
    return total


def sample_nearest(label: jax.Array, at: list[jax.Array]) -> jax.Array:
    """Return the values of ``(*spatial)`` at the nearest voxels. Values outside of the label map are 0."""
    index, inside = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    for place, n in zip(at, label.shape, strict=True):
        near = jnp.floor(place + 0.5).astype(jnp.int32)
        inside = inside & (near >= 0) & (near < n)
        index = index * n + jnp.clip(near, 0, n - 1)
    return jnp.where(inside, label.reshape(-1).at[index].get(mode="promise_in_bounds"), 0)


# -- intensities --------------------------------------------------------------------------------------------------


def _by_channel(values: Mapping[str, Any], key: jax.Array, image: jax.Array, changed: jax.Array) -> jax.Array:
    """Return the changed image for each channel with probability p, else the original channel."""
    return jnp.where(_chosen(key, values["p"], (image.shape[-1],)), changed, image)


def _range(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(image.ndim - 1))
    low, high = image.min(axes), image.max(axes)
    return low, jnp.maximum(high - low, 1e-6)


def _noise(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    sd = _uniform(key, 0.0, values["sd"]) * _chosen(key, values["p"])
    return image + sd * jax.random.normal(jax.random.fold_in(key, 2), image.shape)


def _brightness(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    factor = _uniform(key, values["low"], values["high"], (image.shape[-1],))
    return _by_channel(values, key, image, image * factor)


def _contrast(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    factor = _uniform(key, values["low"], values["high"], (image.shape[-1],))
    low, span = _range(image)
    mean = image.mean(tuple(range(image.ndim - 1)))
    return _by_channel(values, key, image, jnp.clip((image - mean) * factor + mean, low, low + span))


def _gamma(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    exponent = _uniform(key, values["low"], values["high"], (image.shape[-1],))
    low, span = _range(image)
    return _by_channel(values, key, image, low + span * jnp.clip((image - low) / span, 0, 1) ** exponent)


def _window(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Clip to a window of random level and width, and stretch the result to the old range."""
    channels = (image.shape[-1],)
    low, span = _range(image)
    width = _uniform(key, values["low"], values["high"], channels)
    level = 0.5 + _uniform(jax.random.fold_in(key, 2), -values["level"], values["level"], channels)
    share = jnp.clip(((image - low) / span - level) / width + 0.5, 0, 1)
    return _by_channel(values, key, image, low + span * share)


def _blur(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    sigma = _uniform(key, values["low"], values["high"])
    return jnp.where(_chosen(key, values["p"]), gaussian_blur(image, sigma, values["high"]), image)


def gaussian_blur(image: jax.Array, sigma: jax.Array, largest: float) -> jax.Array:
    """Blur ``(*spatial, C)`` with a Gaussian of ``sigma`` voxels, cut at 4 ``largest``; edge values are repeated."""
    radius = math.ceil(4 * largest)
    steps = jnp.arange(-radius, radius + 1)
    taps = jnp.exp(-0.5 * (steps / sigma) ** 2)
    taps = taps / taps.sum()
    for axis in range(image.ndim - 1):
        n = image.shape[axis]
        padded = jnp.pad(image, [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)], mode="edge")
        image = sum(taps[i] * jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(2 * radius + 1))  # pyright: ignore
    return image


def _lowres(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Simulate a lower resolution: nearest-neighbour sampling on a coarser grid, linear interpolation back."""
    share = _uniform(key, values["low"], values["high"])
    return _by_channel(values, key, image, coarsen(image, share))


def coarsen(image: jax.Array, share: jax.Array) -> jax.Array:
    """Sample ``(*spatial, C)`` on a grid with ``share`` of the voxels per side, and interpolate back."""
    for axis in range(image.ndim - 1):
        n = image.shape[axis]
        count = jnp.maximum(jnp.round(n * share), 1)
        place = jnp.clip((jnp.arange(n) + 0.5) * count / n - 0.5, 0, count - 1)  # position on the coarse grid
        lower = jnp.floor(place)
        upper = jnp.minimum(lower + 1, count - 1)
        weight = (place - lower).reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        low, high = (jnp.floor((cell + 0.5) * n / count).astype(jnp.int32) for cell in (lower, upper))
        image = jnp.take(image, low, axis) * (1 - weight) + jnp.take(image, high, axis) * weight
    return image


def _cutout(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    shape = image.shape[:-1]
    start = jax.random.uniform(jax.random.fold_in(key, 1), (len(shape),)) * (1 - values["share"])
    inside = _chosen(key, values["p"])
    for axis, n in enumerate(shape):
        place = (jnp.arange(n) + 0.5) / n
        line = (place >= start[axis]) & (place < start[axis] + values["share"])
        inside = inside & line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return jnp.where(inside[..., None], 0.0, image)


_INTENSITY: dict[str, Callable[..., jax.Array]] = {
    "blur": _blur,
    "noise": _noise,
    "brightness": _brightness,
    "contrast": _contrast,
    "lowres": _lowres,
    "gamma": _gamma,
    "window": _window,
    "cutout": _cutout,
}
