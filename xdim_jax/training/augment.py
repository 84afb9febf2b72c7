"""Augmentation on the device: batched, jitted, in 2D and 3D, as a part of the training step.

Every sample has its own random key of 64 bits (``batch["key"]``, see `xdim_jax.data.pipeline`). Its augmentation
therefore depends only on the seed and on its index in the sequence of samples, not on devices, processes or threads.
All geometric transforms of a sample are composed into one coordinate transform, so that image and label are
interpolated only once: the image linearly, the label by nearest neighbour. A transform with probability 0 is not part
of the program.

Arguments of many functions: ``active`` is a dictionary with the settings of the transforms whose probability is above
0, and ``keys`` has a random key for each transform. ``coords`` has the coordinates of the output voxels in the input,
in voxels, as one array per axis.
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


def make_augment(
    section: Mapping[str, Mapping[str, Any]], ndim: int, depth_axis: int = 0
) -> Callable[[Batch], Batch] | None:
    """Build the augmentation of a batch.

    Args:
        section: The ``augment`` section of a config.
        ndim: Number of spatial axes.
        depth_axis: The axis of a volume along which its slices are stacked, for rotations in the plane of the slices.

    Returns:
        A function ``augment(batch) -> batch`` that changes the entries ``image``, float32 ``(B, *spatial, C)``, and
        ``label``, ``(B, *spatial)``, given the random bits ``key``, uint32 ``(B, 2)``. None if every probability is 0.

    Raises:
        UserError: See `xdim_jax.training.augment_table.settings`.
    """
    full = settings(section, ndim)
    active = {name: values for name, values in full.items() if values["p"] > 0}
    if not active:
        return None
    full["rotate"]["depth_axis"] = depth_axis

    def augment(batch: Batch) -> Batch:
        image, label = jax.vmap(functools.partial(augment_sample, active))(batch["key"], batch["image"], batch["label"])
        return {**batch, "image": image, "label": label}

    return augment


def augment_sample(
    active: Mapping[str, Mapping[str, Any]], key: jax.Array, image: jax.Array, label: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augment one sample.

    Args:
        active: Settings of the transforms with a probability above 0.
        key: Random bits, uint32 (2,).
        image: float32 ``(*spatial, C)``.
        label: Label indices ``(*spatial)``.

    Returns:
        Image and label, of the same shapes.
    """
    # not JAX's default generator, which may differ between machines
    root = jax.random.wrap_key_data(key, impl="threefry2x32")
    # every transform has its own key, so switching one off does not change the others
    keys = {name: jax.random.fold_in(root, number) for name, number in STREAMS.items()}
    if any(name in active for name in _GEOMETRIC):
        coords = coordinates(active, keys, label.shape)
        image, label = sample_linear(image, coords), sample_nearest(label, coords)
    for name, function in _INTENSITY.items():
        if name in active:
            image = function(active[name], keys[name], image)
    return image, label


def _is_applied(key: jax.Array, p: float, shape: tuple[int, ...] = ()) -> jax.Array:
    """Return random booleans that are True with probability p."""
    return jax.random.uniform(jax.random.fold_in(key, 0), shape) < p


def _uniform(key: jax.Array, low: float, high: float, shape: tuple[int, ...] = ()) -> jax.Array:
    """Return random numbers that are uniform in [low, high)."""
    return jax.random.uniform(jax.random.fold_in(key, 1), shape, minval=low, maxval=high)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return what `jax.random.normal` returns, drawn along one axis: XLA for CPU then compiles it ten times faster."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


# -- geometry -----------------------------------------------------------------------------------------------------


def transform_matrix(active: Mapping[str, Mapping[str, Any]], keys: Mapping[str, jax.Array], ndim: int) -> jax.Array:
    """Return the matrix ``(ndim, ndim)`` that maps output to input coordinates, in voxels from the centre."""
    out = jnp.eye(ndim)
    if "flip" in active:
        flipped = _is_applied(keys["flip"], active["flip"]["p"], (ndim,))
        allowed = jnp.asarray([axis in tuple(active["flip"]["axes"]) for axis in range(ndim)])
        out = out * jnp.where(flipped & allowed, -1.0, 1.0)
    if "scale" in active:
        low, high = (math.log(active["scale"][k]) for k in ("low", "high"))
        factor = jnp.exp(_uniform(keys["scale"], low, high))
        out = out / jnp.where(_is_applied(keys["scale"], active["scale"]["p"]), factor, 1.0)
    if "shear" in active:
        amount = active["shear"]["amount"]
        slopes = _uniform(keys["shear"], -amount, amount, (ndim, ndim)) * (1 - jnp.eye(ndim))
        out = out @ (jnp.eye(ndim) + jnp.where(_is_applied(keys["shear"], active["shear"]["p"]), slopes, 0.0))
    if "rotate" in active:
        limit = math.radians(active["rotate"]["degrees"])
        planes = _planes(ndim)
        if active["rotate"]["plane"] and ndim == 3:
            planes = [plane for plane in planes if active["rotate"].get("depth_axis", 0) not in plane]
        angles = _uniform(keys["rotate"], -limit, limit, (len(planes),))
        angles = jnp.where(_is_applied(keys["rotate"], active["rotate"]["p"]), angles, 0.0)
        for i, plane in enumerate(planes):
            out = out @ _rotation(ndim, plane, angles[i])
    return out


def _planes(ndim: int) -> list[tuple[int, int]]:
    """Return all pairs of axes."""
    return [(a, b) for a in range(ndim) for b in range(a + 1, ndim)]


def _rotation(ndim: int, plane: tuple[int, int], angle: jax.Array) -> jax.Array:
    """Return the matrix of a rotation in the plane of two axes."""
    a, b = plane
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.eye(ndim).at[a, a].set(cos).at[b, b].set(cos)
    return rotation.at[a, b].set(-sin).at[b, a].set(sin)


def coordinates(
    active: Mapping[str, Mapping[str, Any]], keys: Mapping[str, jax.Array], shape: tuple[int, ...]
) -> list[jax.Array]:
    """Return the input coordinates of every output voxel, in voxels: for each axis an array of the given shape."""
    ndim = len(shape)
    linear = transform_matrix(active, keys, ndim)
    centre = [(n - 1) / 2 for n in shape]
    offsets = [jnp.arange(n) - c for n, c in zip(shape, centre, strict=True)]
    shift = jnp.zeros(ndim)
    if "translate" in active:
        share = active["translate"]["share"]
        shift = _uniform(keys["translate"], -share, share, (ndim,)) * jnp.asarray(shape)
        shift = jnp.where(_is_applied(keys["translate"], active["translate"]["p"]), shift, 0.0)
    coords = []
    for axis in range(ndim):
        position = centre[axis] + shift[axis]
        for other in range(ndim):
            line = offsets[other].reshape([-1 if i == other else 1 for i in range(ndim)])
            position = position + linear[axis, other] * line
        coords.append(position)
    if "elastic" in active:
        cells = active["elastic"]["cells"]
        coarse = [min(cells, n) for n in shape]
        field = _normal(jax.random.fold_in(keys["elastic"], 1), (ndim, *coarse))
        smooth = jax.image.resize(field, (ndim, *shape), "cubic") * _is_applied(keys["elastic"], active["elastic"]["p"])
        share = active["elastic"]["share"]
        coords = [a + share * n * smooth[i] for i, (a, n) in enumerate(zip(coords, shape, strict=True))]
    return coords


def sample_linear(image: jax.Array, coords: list[jax.Array]) -> jax.Array:
    """Interpolate an image ``(*spatial, C)`` linearly at the given coordinates. Outside of the image, it is 0."""
    ndim, channels = image.ndim - 1, image.shape[-1]
    padded = jnp.pad(image, [(1, 1)] * ndim + [(0, 0)])  # with a border of zeros, no index is out of bounds
    flat = padded.reshape(-1, channels)
    strides = np.cumprod([1, *padded.shape[ndim - 1 : 0 : -1]])[::-1]
    lower, weight = [], []
    for position, n in zip(coords, image.shape[:ndim], strict=True):
        position = jnp.clip(position, -1, n) + 1
        floor = jnp.minimum(jnp.floor(position), n)
        lower.append(floor.astype(jnp.int32))
        weight.append(position - floor)
    base = functools.reduce(jnp.add, [i * int(s) for i, s in zip(lower, strides, strict=True)])
    total = jnp.zeros((*base.shape, channels), image.dtype)
    for corner in np.ndindex(*[2] * ndim):
        share = functools.reduce(jnp.multiply, [w if c else 1 - w for c, w in zip(corner, weight, strict=True)])
        index = base + int(np.dot(corner, strides))
        total = total + share[..., None] * flat.at[index].get(mode="promise_in_bounds")
    return total


def sample_nearest(label: jax.Array, coords: list[jax.Array]) -> jax.Array:
    """Return the labels ``(*spatial)`` at the voxels nearest to the given coordinates. Outside, they are 0."""
    index, inside = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    for position, n in zip(coords, label.shape, strict=True):
        near = jnp.floor(position + 0.5).astype(jnp.int32)
        inside = inside & (near >= 0) & (near < n)
        index = index * n + jnp.clip(near, 0, n - 1)
    return jnp.where(inside, label.reshape(-1).at[index].get(mode="promise_in_bounds"), 0)


# -- intensities --------------------------------------------------------------------------------------------------


def _by_channel(values: Mapping[str, Any], key: jax.Array, image: jax.Array, changed: jax.Array) -> jax.Array:
    """Return an image whose channels are, each with probability p, those of ``changed``, and else of ``image``."""
    return jnp.where(_is_applied(key, values["p"], (image.shape[-1],)), changed, image)


def _range(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the minimum of each channel, and the difference between maximum and minimum."""
    axes = tuple(range(image.ndim - 1))
    low, high = image.min(axes), image.max(axes)
    return low, jnp.maximum(high - low, 1e-6)


def _noise(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Add Gaussian noise with a random standard deviation."""
    sd = _uniform(key, 0.0, values["sd"]) * _is_applied(key, values["p"])
    return image + sd * _normal(jax.random.fold_in(key, 2), image.shape)


def _brightness(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Multiply each channel by a random factor."""
    factor = _uniform(key, values["low"], values["high"], (image.shape[-1],))
    return _by_channel(values, key, image, image * factor)


def _contrast(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Multiply the distance of each channel from its mean by a random factor; clip to the old range."""
    factor = _uniform(key, values["low"], values["high"], (image.shape[-1],))
    low, span = _range(image)
    mean = image.mean(tuple(range(image.ndim - 1)))
    return _by_channel(values, key, image, jnp.clip((image - mean) * factor + mean, low, low + span))


def _gamma(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Raise each channel, scaled to [0, 1], to a random power; scale back to the old range."""
    exponent = _uniform(key, values["low"], values["high"], (image.shape[-1],))
    low, span = _range(image)
    return _by_channel(values, key, image, low + span * jnp.clip((image - low) / span, 0, 1) ** exponent)


def _window(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Clip each channel to a window of random level and width, and rescale the result to the old range."""
    channels = (image.shape[-1],)
    low, span = _range(image)
    width = _uniform(key, values["low"], values["high"], channels)
    level = 0.5 + _uniform(jax.random.fold_in(key, 2), -values["level"], values["level"], channels)
    share = jnp.clip(((image - low) / span - level) / width + 0.5, 0, 1)
    return _by_channel(values, key, image, low + span * share)


def _blur(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Blur the image with a Gaussian of random width."""
    sigma = _uniform(key, values["low"], values["high"])
    return jnp.where(_is_applied(key, values["p"]), gaussian_blur(image, sigma, values["high"]), image)


def gaussian_blur(image: jax.Array, sigma: jax.Array, largest: float) -> jax.Array:
    """Blur an image with a Gaussian; voxels beyond the edge have the value at the edge.

    Args:
        image: ``(*spatial, C)``.
        sigma: Standard deviation in voxels; may be traced.
        largest: Largest possible ``sigma``. The filter is cut off at a distance of 4 times this.
    """
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
    """Simulate a lower resolution, see `coarsen`."""
    share = _uniform(key, values["low"], values["high"])
    return _by_channel(values, key, image, coarsen(image, share))


def coarsen(image: jax.Array, share: jax.Array) -> jax.Array:
    """Sample an image on a coarser grid by nearest neighbour, and interpolate linearly back to the old grid.

    Args:
        image: ``(*spatial, C)``.
        share: Number of voxels per side of the coarser grid, as a fraction of the old number; a scalar.
    """
    for axis in range(image.ndim - 1):
        n = image.shape[axis]
        count = jnp.maximum(jnp.round(n * share), 1)
        position = jnp.clip((jnp.arange(n) + 0.5) * count / n - 0.5, 0, count - 1)  # position on the coarse grid
        lower = jnp.floor(position)
        upper = jnp.minimum(lower + 1, count - 1)
        weight = (position - lower).reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        low, high = (jnp.floor((cell + 0.5) * n / count).astype(jnp.int32) for cell in (lower, upper))
        image = jnp.take(image, low, axis) * (1 - weight) + jnp.take(image, high, axis) * weight
    return image


def _cutout(values: Mapping[str, Any], key: jax.Array, image: jax.Array) -> jax.Array:
    """Set a box at a random position to 0."""
    shape = image.shape[:-1]
    start = jax.random.uniform(jax.random.fold_in(key, 1), (len(shape),)) * (1 - values["share"])
    inside = _is_applied(key, values["p"])
    for axis, n in enumerate(shape):
        position = (jnp.arange(n) + 0.5) / n
        line = (position >= start[axis]) & (position < start[axis] + values["share"])
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
