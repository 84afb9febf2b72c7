"""A 3^n convolution of an upsampled array and a skip beside it, without making the upsampled array.

Upsampling, by repetition or by a transposed convolution, and the convolution behind it are one linear map:
``y[s i + t - c] += x[i] @ W[t]``, a transposed convolution whose kernel is the sum of all pairs of taps that meet.
It has fewer products than the two (3D, factor 2: 8 for an output voxel instead of 27 and the transposed convolution's
own), and neither the upsampled array nor its concatenation with the skip is ever in memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.ops.convolution import conv
from xdim_jax.ops.dense import dense
from xdim_jax.ops.form import active_form, forced_form, take
from xdim_jax.ops.layout import Ints, moved
from xdim_jax.ops.resize import conv_transpose, upsample
from xdim_jax.ops.scatter import Axis, scatter

_TAPS = 3
_WORTH = 2  # products saved, for each that composing the kernels takes


class Expand(NamedTuple):
    """A transposed convolution with bias, as `conv_transpose` has it: kernel, bias, and outputs left out."""

    kernel: jax.Array
    bias: jax.Array
    crop: Ints


def conv_upsampled(
    x: jax.Array,
    skip: jax.Array | None,
    kernel: jax.Array,
    *,
    factors: Ints,
    size: Ints | None = None,
    expand: Expand | None = None,
) -> jax.Array:
    """``conv(concatenate([upsample(x), skip]))``: stride 1, 3 taps and a zero on both sides along every axis.

    Args:
        x: ``(batch, *spatial, in)``.
        skip: ``(batch, *size, more)``, or none.
        kernel: ``(3, ..., 3, middle + more, out)``; ``middle`` are the channels that upsampling gives.
        factors: of the upsampling; of ``expand`` its strides.
        size: that upsampling gives; default: ``factors`` times that of ``x``.
        expand: upsample by this, in place of nearest neighbours.

    Returns:
        ``(batch, *size, out)``.

    Raises:
        ValueError: the kernel does not have 3 taps along every axis, or not the channels of both inputs.
    """
    size = size or tuple(n * f for n, f in zip(x.shape[1:-1], factors, strict=True))
    middle = x.shape[-1] if expand is None else expand.kernel.shape[-1]
    more = 0 if skip is None else skip.shape[-1]
    if set(kernel.shape[:-2]) != {_TAPS} or kernel.shape[-2] != middle + more:
        raise ValueError(f"conv_upsampled: kernel{kernel.shape} does not fit {middle} and {more} channels, 3 taps each")
    pads = ((1, 1),) * len(factors)
    if not _composes(x, kernel[..., :middle, :], factors, size, expand):
        x = _upsampled(x, factors, size, expand)
        x = x if skip is None else jnp.concatenate([x, skip], -1)
        return conv(x, kernel.astype(x.dtype), strides=(1,) * len(factors), padding=pads)
    take("composed with upsampling")
    own, rest = kernel[..., :middle, :], kernel[..., middle:, :].astype(x.dtype)
    y = _composed(x, own, factors, size, expand)
    return y if skip is None else y + dense(skip, rest, (1,) * len(factors), pads)


def _upsampled(x: jax.Array, factors: Ints, size: Ints, expand: Expand | None) -> jax.Array:
    if expand is None:
        return upsample(x, factors, size)
    y = conv_transpose(x, expand.kernel.astype(x.dtype), strides=factors, crop=expand.crop, size=size)
    return y + expand.bias.astype(x.dtype)


def _composes(x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, expand: Expand | None) -> bool:
    """Whether the form is the fast one, the geometry one that it knows, and the products that it saves many."""
    if forced_form() == "sharded" or active_form() == "reference":
        return False
    window = factors if expand is None else expand.kernel.shape[: len(factors)]
    crop = (0,) * len(factors) if expand is None else expand.crop
    exact = [
        f == k and c == 0 and m == n * f
        for f, k, c, m, n in zip(factors, window, crop, size, x.shape[1:-1], strict=True)
    ]
    if not all(exact[-2:]) or not (exact[0] or expand is not None) or factors[0] > window[0] + _TAPS - 1:
        return False
    if expand is None:
        return True
    channels, middle, out = *expand.kernel.shape[-2:], kernel.shape[-1]
    taps = math.prod((k + _TAPS - 1) / f for f, k in zip(factors, window, strict=True))
    for_output = (_TAPS ** len(factors) * middle - taps * channels) * out
    for_output += math.prod(k / f for f, k in zip(factors, window, strict=True)) * channels * middle
    composing = math.prod(window) * _TAPS ** len(factors) * channels * middle * out
    return x.shape[0] * math.prod(size) * for_output > _WORTH * composing


def _composed(x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, expand: Expand | None) -> jax.Array:
    ndim = len(factors)
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    crop = (0,) * ndim if expand is None else expand.crop
    columns = _compose(None if expand is None else expand.kernel.astype(wide.dtype), wide, factors).astype(x.dtype)
    *depth, height, width = (Axis(f, c + 1, m) for f, c, m in zip(factors, crop, size, strict=True))
    if ndim == 2:  # an image is a volume of one slice
        y = scatter(x[:, None], columns[None], (Axis(1, 0, 1), height, width))[:, 0]
    else:
        y = scatter(x, columns, (depth[0], height, width))
    if expand is None:
        return y
    bias = jnp.tensordot(wide, expand.bias.astype(wide.dtype), ((ndim,), (0,)))  # (3, ..., 3, out)
    y = y + _inside(bias, size).astype(x.dtype)
    return y - _beyond(x, kernel, factors, size, expand) if ndim == 3 else y


def _compose(expand: jax.Array | None, kernel: jax.Array, factors: Ints) -> jax.Array:
    """``(*taps, in, out)``: what a voxel gives to the outputs around it, first tap to the lowest."""
    ndim = len(factors)
    window = factors if expand is None else expand.shape[:ndim]
    meets = functools.reduce(_outer, [_meets(k) for k in window])  # (taps, window, 3^n)
    if expand is None:
        columns = jnp.asarray(meets.sum(1), kernel.dtype) @ kernel.reshape(_TAPS**ndim, -1)
        shape = kernel.shape[ndim:]
    else:
        channels, middle = expand.shape[ndim:]
        pairs = expand.reshape(-1, middle) @ jnp.moveaxis(kernel, ndim, 0).reshape(middle, -1)
        pairs = pairs.reshape(math.prod(window), channels, _TAPS**ndim, -1).transpose(0, 2, 1, 3)
        shape = (channels, kernel.shape[-1])
        columns = jnp.asarray(meets.reshape(len(meets), -1), kernel.dtype) @ pairs.reshape(-1, math.prod(shape))
    return columns.reshape(*(k + _TAPS - 1 for k in window), *shape)


def _meets(taps: int) -> np.ndarray:
    """``(taps + 2, taps, 3)``: 1 where tap r of the upsampling and tap t of the kernel give to tap ``r - t + 2``."""
    tap, r, t = np.ogrid[: taps + _TAPS - 1, :taps, :_TAPS]
    return (tap == r - t + _TAPS - 1).astype(np.float32)


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of two arrays of three axes, each pair of axes joined."""
    return np.einsum("art,bsu->abrstu", a, b).reshape(*(m * n for m, n in zip(a.shape, b.shape, strict=True)))


def _inside(bias: jax.Array, size: Ints) -> jax.Array:
    """What a constant, upsampled, adds to every output: of each tap's share, those that lie inside ``size``."""
    for axis, n in reversed(list(enumerate(size))):
        if axis > 0:
            reached = np.arange(n)[:, None] + np.arange(_TAPS) - 1
            inside = jnp.asarray((reached >= 0) & (reached < n), bias.dtype)
            bias = jnp.moveaxis(jnp.tensordot(inside, bias, ((1,), (axis,))), 0, axis)
    first, last = moved(bias[:1][None], 0, size[0])[0], moved(bias[2:][None], size[0] - 1, size[0])[0]
    return bias[0] + bias[1] + bias[2] - first - last  # not a sum over an axis: that would be no part of a fusion


def _beyond(x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, expand: Expand) -> jax.Array | float:
    """What planes of the transposed convolution that were cropped would give to the first and the last output."""
    (depth, *plane), (taps, *_), stride, crop = size, expand.kernel.shape, factors[0], expand.crop[0]
    begin, end = -crop, stride * (x.shape[1] - 1) + taps - crop  # that it has
    total: jax.Array | float = 0.0
    for place, at, tap in ((0, -1, 0), (depth - 1, depth, 2)):
        if not begin <= at < end:
            continue
        low = max(-(-(at + crop - taps + 1) // stride), 0)  # the planes of x that reach it
        high = min((at + crop) // stride, x.shape[1] - 1)
        own = expand._replace(bias=jnp.zeros_like(expand.bias), crop=(at + crop - stride * low, *expand.crop[1:]))
        there = _upsampled(x[:, low : high + 1], factors, (1, *plane), own)
        flat = dense(there[:, 0], kernel[tap].astype(x.dtype), (1, 1), ((1, 1), (1, 1)))
        total = total + moved(flat[:, None], place, depth)
    return total
