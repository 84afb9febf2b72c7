"""Upsampling, concatenation with a skip connection, and a convolution with 3 taps per axis, in one operation.

Upsampling (by repetition or by a transposed convolution) and the following convolution are together one linear map,
``y[s i + t - c] += x[i] @ W[t]``: a transposed convolution of stride s and crop c. Each tap t of its kernel W is a sum
over the pairs of taps of the two maps that connect the same input and output. The composed map needs fewer products:
in 3D with factor 2, it needs 8 products per output voxel, while the convolution alone needs 27. The upsampled array and
its concatenation with the skip connection are not stored in memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.ops.convolution import conv
from xdim_jax.ops.dense import dense
from xdim_jax.ops.implementation import active_implementation, count_use, requested_implementation
from xdim_jax.ops.layout import Ints, shift_planes
from xdim_jax.ops.resize import conv_transpose, upsample
from xdim_jax.ops.transposed import Axis, transposed_conv

_TAPS = 3
_MIN_SAVING = 2  # kernels are composed if this saves more than twice the products that are needed to compose them


class TransposedConv(NamedTuple):
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
    transposed: TransposedConv | None = None,
) -> jax.Array:
    """Compute ``conv(concatenate([upsample(x), skip]))`` with 3 taps per axis, stride 1 and symmetric padding.

    Args:
        x: Array ``(batch, *spatial, in)``.
        skip: Array ``(batch, *size, more)``, or None.
        kernel: Array ``(3, ..., 3, middle + more, out)``; ``middle`` is the number of channels after upsampling.
        factors: Upsampling factors; with ``transposed``, its strides.
        size: Spatial size after upsampling; None for ``factors`` times the size of ``x``.
        transposed: Transposed convolution that upsamples; None for nearest neighbours.

    Returns:
        Array ``(batch, *size, out)``.

    Raises:
        ValueError: The kernel does not have 3 taps along every axis, or its number of input channels is wrong.
    """
    size = size or tuple(n * f for n, f in zip(x.shape[1:-1], factors, strict=True))
    middle = x.shape[-1] if transposed is None else transposed.kernel.shape[-1]
    more = 0 if skip is None else skip.shape[-1]
    if set(kernel.shape[:-2]) != {_TAPS} or kernel.shape[-2] != middle + more:
        raise ValueError(
            f"conv_upsampled: kernel{kernel.shape} does not fit: expected {_TAPS} taps along every axis and {middle} + "
            f"{more} input channels"
        )
    pads = ((1, 1),) * len(factors)
    if not _should_compose(x, kernel[..., :middle, :], factors, size, transposed):
        x = _upsampled(x, factors, size, transposed)
        x = x if skip is None else jnp.concatenate([x, skip], -1)
        return conv(x, kernel.astype(x.dtype), strides=(1,) * len(factors), padding=pads)
    count_use("composed with upsampling")
    x_kernel, skip_kernel = kernel[..., :middle, :], kernel[..., middle:, :].astype(x.dtype)
    y = _composed(x, x_kernel, factors, size, transposed)
    return y if skip is None else y + dense(skip, skip_kernel, (1,) * len(factors), pads)


def _upsampled(x: jax.Array, factors: Ints, size: Ints, transposed: TransposedConv | None) -> jax.Array:
    if transposed is None:
        return upsample(x, factors, size)
    y = conv_transpose(x, transposed.kernel.astype(x.dtype), strides=factors, crop=transposed.crop, size=size)
    return y + transposed.bias.astype(x.dtype)


def _should_compose(
    x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, transposed: TransposedConv | None
) -> bool:
    """Return whether the fast implementation is selected, supports this geometry, and saves enough products."""
    if requested_implementation() == "sharded" or active_implementation() == "reference":
        return False
    window = factors if transposed is None else transposed.kernel.shape[: len(factors)]
    crop = (0,) * len(factors) if transposed is None else transposed.crop
    exact = [
        f == k and c == 0 and m == n * f
        for f, k, c, m, n in zip(factors, window, crop, size, x.shape[1:-1], strict=True)
    ]
    if not all(exact[-2:]) or not (exact[0] or transposed is not None) or factors[0] > window[0] + _TAPS - 1:
        return False
    if transposed is None:
        return True
    channels, middle, out = *transposed.kernel.shape[-2:], kernel.shape[-1]
    taps = math.prod((k + _TAPS - 1) / f for f, k in zip(factors, window, strict=True))
    for_output = (_TAPS ** len(factors) * middle - taps * channels) * out
    for_output += math.prod(k / f for f, k in zip(factors, window, strict=True)) * channels * middle
    composing = math.prod(window) * _TAPS ** len(factors) * channels * middle * out
    return x.shape[0] * math.prod(size) * for_output > _MIN_SAVING * composing


def _composed(
    x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, transposed: TransposedConv | None
) -> jax.Array:
    """Compute ``conv(upsample(x))`` as one transposed convolution; see `conv_upsampled` for the arguments."""
    ndim = len(factors)
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    crop = (0,) * ndim if transposed is None else transposed.crop
    columns = _compose_kernels(
        None if transposed is None else transposed.kernel.astype(wide.dtype), wide, factors
    ).astype(x.dtype)
    *depth, height, width = (Axis(f, c + 1, m) for f, c, m in zip(factors, crop, size, strict=True))
    if ndim == 2:  # an image is a volume of one slice
        y = transposed_conv(x[:, None], columns[None], (Axis(1, 0, 1), height, width))[:, 0]
    else:
        y = transposed_conv(x, columns, (depth[0], height, width))
    if transposed is None:
        return y
    bias = jnp.tensordot(wide, transposed.bias.astype(wide.dtype), ((ndim,), (0,)))  # (3, ..., 3, out)
    y = y + _sum_bias(bias, size).astype(x.dtype)
    return y - _border_excess(x, kernel, factors, size, transposed) if ndim == 3 else y


def _compose_kernels(transposed: jax.Array | None, kernel: jax.Array, factors: Ints) -> jax.Array:
    """Return the kernel of the composed transposed convolution, ``(*taps, in, out)``."""
    ndim = len(factors)
    window = factors if transposed is None else transposed.shape[:ndim]
    tap_pairs = functools.reduce(_outer, [_tap_pairs(k) for k in window])  # (taps, window, 3^n)
    if transposed is None:
        columns = jnp.asarray(tap_pairs.sum(1), kernel.dtype) @ kernel.reshape(_TAPS**ndim, -1)
        shape = kernel.shape[ndim:]
    else:
        channels, middle = transposed.shape[ndim:]
        pairs = transposed.reshape(-1, middle) @ jnp.moveaxis(kernel, ndim, 0).reshape(middle, -1)  # products of taps
        pairs = pairs.reshape(math.prod(window), channels, _TAPS**ndim, -1).transpose(0, 2, 1, 3)
        shape = (channels, kernel.shape[-1])
        columns = jnp.asarray(tap_pairs.reshape(len(tap_pairs), -1), kernel.dtype) @ pairs.reshape(-1, math.prod(shape))
    return columns.reshape(*(k + _TAPS - 1 for k in window), *shape)


def _tap_pairs(taps: int) -> np.ndarray:
    """Return the pairs of taps that belong to each composed tap.

    Tap r of the upsampling and tap t of the convolution belong to the composed tap ``r - t + 2``.

    Returns:
        Array ``(taps + 2, taps, 3)``: 1 where the composed tap, r and t belong together, else 0.
    """
    tap, r, t = np.ogrid[: taps + _TAPS - 1, :taps, :_TAPS]
    return (tap == r - t + _TAPS - 1).astype(np.float32)


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the outer product of two arrays with three axes, in which corresponding axes are merged."""
    return np.einsum("art,bsu->abrstu", a, b).reshape(*(m * n for m, n in zip(a.shape, b.shape, strict=True)))


def _sum_bias(bias: jax.Array, size: Ints) -> jax.Array:
    """Return the contribution of the transposed convolution's bias to every output of the following convolution.

    Near the border fewer taps contribute, because the bias is not added to the zero padding.

    Args:
        bias: Contribution of each tap of the convolution, ``(3, ..., 3, out)``.
        size: Spatial size of the output.

    Returns:
        Array ``(*size, out)``.
    """
    for axis, n in reversed(list(enumerate(size))):
        if axis > 0:
            position = np.arange(n)[:, None] + np.arange(_TAPS) - 1  # input position of each output and tap
            inside = jnp.asarray((position >= 0) & (position < n), bias.dtype)
            bias = jnp.moveaxis(jnp.tensordot(inside, bias, ((1,), (axis,))), 0, axis)
    first, last = shift_planes(bias[:1][None], 0, size[0])[0], shift_planes(bias[2:][None], size[0] - 1, size[0])[0]
    return bias[0] + bias[1] + bias[2] - first - last  # not jnp.sum(bias, 0), which XLA does not fuse


def _border_excess(
    x: jax.Array, kernel: jax.Array, factors: Ints, size: Ints, transposed: TransposedConv
) -> jax.Array | float:
    """Return the part of the composed map that must be subtracted in the first and the last plane of the output.

    The transposed convolution may compute planes before the first plane and after the last plane of the output, which
    ``crop`` and ``size`` remove. The following convolution reads zero padding in their place, but the composed map
    includes the removed planes. The result is 0.0 if there are no such planes.
    """
    (depth, *plane), (taps, *_), stride, crop = size, transposed.kernel.shape, factors[0], transposed.crop[0]
    begin, end = -crop, stride * (x.shape[1] - 1) + taps - crop  # planes of the transposed convolution
    total: jax.Array | float = 0.0
    for output, removed, tap in ((0, -1, 0), (depth - 1, depth, 2)):
        if not begin <= removed < end:
            continue
        low = max(-(-(removed + crop - taps + 1) // stride), 0)  # the planes of x that contribute to plane `removed`
        high = min((removed + crop) // stride, x.shape[1] - 1)
        crops = (removed + crop - stride * low, *transposed.crop[1:])
        without_bias = transposed._replace(bias=jnp.zeros_like(transposed.bias), crop=crops)
        upsampled = _upsampled(x[:, low : high + 1], factors, (1, *plane), without_bias)
        excess = dense(upsampled[:, 0], kernel[tap].astype(x.dtype), (1, 1), ((1, 1), (1, 1)))
        total = total + shift_planes(excess[:, None], output, depth)
    return total
