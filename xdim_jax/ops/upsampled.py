"""A 3^n convolution of an upsampled array concatenated with a skip, computed without the upsampled array.

Upsampling (by repetition or by a transposed convolution) and the following convolution are together one linear map,
``y[s i + t - c] += x[i] @ W[t]``: a transposed convolution. Each tap of its kernel W is a sum over the pairs of taps of
the two maps that connect the same input and output. It needs fewer products than the two maps: in 3D with factor 2 and
per output voxel, 8 instead of 27 plus those of the upsampling. Neither the upsampled array nor its concatenation with
the skip is ever in memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.ops.convolution import conv
from xdim_jax.ops.dense import dense
from xdim_jax.ops.form import active_form, count_use, forced_form
from xdim_jax.ops.layout import Ints, moved
from xdim_jax.ops.resize import conv_transpose, upsample
from xdim_jax.ops.scatter import Axis, scatter

_TAPS = 3
_WORTH = 2  # compose the kernels if this saves more than twice the products that it needs


class Expand(NamedTuple):
    """A transposed convolution with bias: kernel, bias and crop, as in `xdim_jax.ops.conv_transpose`."""

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
    """Return ``conv(concatenate([upsample(x), skip]))`` with 3 taps, stride 1 and symmetric padding.

    Args:
        x: Array ``(batch, *spatial, in)``.
        skip: Array ``(batch, *size, more)``, or None.
        kernel: Array ``(3, ..., 3, middle + more, out)``; ``middle`` is the number of channels after upsampling.
        factors: Upsampling factors; with ``expand``, its strides.
        size: Spatial size after upsampling; None for ``factors`` times that of ``x``.
        expand: Transposed convolution that upsamples; None for nearest neighbours.

    Returns:
        Array ``(batch, *size, out)``.

    Raises:
        ValueError: The kernel does not have 3 taps along every axis, or not the channels of both inputs.
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
    count_use("composed with upsampling")
    own, rest = kernel[..., :middle, :], kernel[..., middle:, :].astype(x.dtype)
    y = _composed(x, own, factors, size, expand)
    return y if skip is None else y + dense(skip, rest, (1,) * len(factors), pads)


def _upsampled(x: jax.Array, factors: Ints, size: Ints, expand: Expand | None) -> jax.Array:
    if expand is None:
        return upsample(x, factors, size)
    y = conv_transpose(x, expand.kernel.astype(x.dtype), strides=factors, crop=expand.crop, size=size)
    return y + expand.bias.astype(x.dtype)


def _composes(x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, expand: Expand | None) -> bool:
    """Return True if the fast implementation is selected, supports this geometry, and saves enough products."""
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
    """Return the kernel of the composed transposed convolution, ``(*taps, in, out)``."""
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
    """Return ``(taps + 2, taps, 3)``: 1 where taps r of upsampling and t of the kernel give tap ``r - t + 2``."""
    tap, r, t = np.ogrid[: taps + _TAPS - 1, :taps, :_TAPS]
    return (tap == r - t + _TAPS - 1).astype(np.float32)


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the outer product of two arrays of three axes, each pair of axes merged into one."""
    return np.einsum("art,bsu->abrstu", a, b).reshape(*(m * n for m, n in zip(a.shape, b.shape, strict=True)))


def _inside(bias: jax.Array, size: Ints) -> jax.Array:
    """Return what the bias of the transposed convolution adds to every output of the following convolution.

    Near the border fewer taps contribute, because the padding has no bias.

    Args:
        bias: What each tap contributes, ``(3, ..., 3, out)``.
        size: Spatial size of the output.
    """
    for axis, n in reversed(list(enumerate(size))):
        if axis > 0:
            reached = np.arange(n)[:, None] + np.arange(_TAPS) - 1
            inside = jnp.asarray((reached >= 0) & (reached < n), bias.dtype)
            bias = jnp.moveaxis(jnp.tensordot(inside, bias, ((1,), (axis,))), 0, axis)
    first, last = moved(bias[:1][None], 0, size[0])[0], moved(bias[2:][None], size[0] - 1, size[0])[0]
    return bias[0] + bias[1] + bias[2] - first - last  # no sum over an axis, which XLA would not fuse


def _beyond(x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, expand: Expand) -> jax.Array | float:
    """Return the excess of the composed map in the first and the last plane of the output.

    The composed map includes planes of the transposed convolution that ``crop`` and ``size`` leave out, but
    the convolution has zero padding there.
    """
    (depth, *plane), (taps, *_), stride, crop = size, expand.kernel.shape, factors[0], expand.crop[0]
    begin, end = -crop, stride * (x.shape[1] - 1) + taps - crop  # planes of the transposed convolution
    total: jax.Array | float = 0.0
    for place, at, tap in ((0, -1, 0), (depth - 1, depth, 2)):
        if not begin <= at < end:
            continue
        low = max(-(-(at + crop - taps + 1) // stride), 0)  # the planes of x that reach plane ``at``
        high = min((at + crop) // stride, x.shape[1] - 1)
        own = expand._replace(bias=jnp.zeros_like(expand.bias), crop=(at + crop - stride * low, *expand.crop[1:]))
        there = _upsampled(x[:, low : high + 1], factors, (1, *plane), own)
        flat = dense(there[:, 0], kernel[tap].astype(x.dtype), (1, 1), ((1, 1), (1, 1)))
        total = total + moved(flat[:, None], place, depth)
    return total
