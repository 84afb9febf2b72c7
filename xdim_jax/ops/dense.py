"""Fast implementation of the dense convolution: 2D convolutions and matrix products."""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from xdim_jax.ops.implementation import count_use
from xdim_jax.ops.layout import Ints, Pairs, conv_reference, delay_until, shift_planes, split_axes
from xdim_jax.ops.slabs import kernel_gradient
from xdim_jax.ops.transposed import Axis, transposed_conv, transposed_conv_kernel_gradient
from xdim_jax.ops.winograd import is_suitable, winograd, winograd_gradient

_MANY_OUTPUTS = 3  # ratio of output to input channels; see `_dense_unit`


def dense(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> jax.Array:
    """Compute a dense convolution; see `xdim_jax.ops.conv` for the arguments.

    A strided 3D convolution is computed as a 2D convolution for every output slice: the input slices on which the
    output slice depends are concatenated as channels. If the strides divide the sides of the plane exactly, the forward
    pass is XLA's strided 2D convolution, and the backward pass computes one convolution per phase of the stride (see
    `xdim_jax.ops.transposed`). Otherwise space-to-depth converts the 2D convolution to one of stride 1.
    """
    if max(strides) > 1 and _divides_plane(x.shape, kernel.shape, strides, padding):
        count_use("dense, strided")
        return _strided(x, kernel, strides, padding)
    if x.ndim == 5 and max(strides) > 1:
        (x, kernel), strides, padding = _fold_depth(x, kernel, strides[0], padding[0]), strides[1:], padding[1:]
        batch, depth = x.shape[:2]
        y = dense(x.reshape(batch * depth, *x.shape[2:]), kernel, strides, padding)
        return y.reshape(batch, depth, *y.shape[1:])
    if max(strides) > 1:
        x, kernel = _space_to_depth(x, kernel, strides, padding)
        padding = ((0, 0),) * len(strides)
    count_use("dense by Winograd" if is_suitable(x, kernel, padding) else "dense by 2D convolutions")
    return _dense_unit(x, kernel, padding)


def _fold_depth(x: jax.Array, kernel: jax.Array, stride: int, pad: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Convert a convolution over the depth to more input channels: one group of channels for each tap along the depth.

    The array (B, D, H, W, C) becomes (B, D', H, W, k C), where D' is the number of output slices, and the kernel
    (k, kh, kw, C, O) becomes (kh, kw, k C, O).
    """
    taps, channels = kernel.shape[0], kernel.shape[3]
    x = jnp.pad(x, [(0, 0), pad, (0, 0), (0, 0), (0, 0)])
    depth = (x.shape[1] - taps) // stride + 1
    slices = [lax.slice_in_dim(x, a, a + (depth - 1) * stride + 1, stride, axis=1) for a in range(taps)]
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], taps * channels, -1)
    return jnp.concatenate(slices, -1), kernel


def _divides_plane(shape: Ints, kernel: Ints, strides: Ints, padding: Pairs) -> bool:
    """Return whether `_strided` supports a convolution.

    The plane must be strided, each side of the output plane must be the side of the input divided by the stride, and
    the padding at the start must be at most the size of the kernel minus the stride.
    """
    plane = zip(shape[-3:-1], kernel[-4:-2], strides[-2:], padding[-2:], strict=True)
    return max(strides[-2:]) > 1 and all(
        0 <= before <= k - s and n % s == 0 and (n + before + after - k) // s + 1 == n // s
        for n, k, s, (before, after) in plane
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _strided(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> jax.Array:
    """Compute a strided convolution for which `_divides_plane` is True."""
    if x.ndim == 4:
        return conv_reference(x, kernel, strides, padding)
    x, kernel = _fold_depth(x, kernel, strides[0], padding[0])
    y = conv_reference(x.reshape(-1, *x.shape[2:]), kernel, strides[1:], padding[1:])
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _strided_fwd(x, kernel, strides, padding):
    return _strided(x, kernel, strides, padding), (x, kernel)


def _strided_bwd(strides, padding, residuals, g):
    """Compute the gradients with `transposed_conv`, which is the transpose of a strided convolution."""
    x, kernel = residuals
    if x.ndim == 4:  # an image is a volume of one slice
        dx, dkernel = _strided_bwd((1, *strides), ((0, 0), *padding), (x[:, None], kernel[None]), g[:, None])
        return dx[:, 0], dkernel[0]
    depth, height, width = (
        Axis(s, before, n) for s, (before, _), n in zip(strides, padding, x.shape[1:4], strict=True)
    )
    axes = (depth, height, width)
    dkernel = transposed_conv_kernel_gradient(g, delay_until(x, g), kernel.shape[:3], axes)
    dx = transposed_conv(g, jnp.swapaxes(delay_until(kernel, dkernel), 3, 4), axes)
    return dx, jnp.swapaxes(dkernel, 3, 4)


_strided.defvjp(_strided_fwd, _strided_bwd)


def _space_to_depth(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> tuple[jax.Array, jax.Array]:
    """Convert to a convolution of stride 1: a stride s gives s times as many channels, and ceil(k / s) taps."""
    ndim = len(strides)
    pads, blocks = [], []
    for n, k, s, (before, after) in zip(x.shape[1:-1], kernel.shape[:ndim], strides, padding, strict=True):
        out = (n + before + after - k) // s + 1
        taps = -(-k // s)
        length = (out - 1 + taps) * s  # covers every block that an output reads
        pads.append((before, length - n - before, 0))
        blocks.append(taps)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    kernel = jnp.pad(
        kernel,
        [(0, t * s - k) for k, t, s in zip(kernel.shape[:ndim], blocks, strides, strict=True)] + [(0, 0)] * 2,
    )
    inner = [n // s for n, s in zip(x.shape[1:-1], strides, strict=True)]
    x = split_axes(x, 1, inner, strides)
    kernel = split_axes(kernel, 0, blocks, strides)
    # move the phases to the axes before the channels
    x = x.transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    kernel = kernel.transpose(*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2), 2 * ndim, 2 * ndim + 1)
    x = x.reshape(x.shape[0], *inner, -1)
    return x, kernel.reshape(*blocks, x.shape[-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense_unit(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """Compute a dense convolution of stride 1.

    In 3D, one 2D convolution of all planes computes the contributions of all taps along the depth as separate output
    channels, which are then shifted by the positions of their taps and added. If the output has at least
    `_MANY_OUTPUTS` times as many channels as the input, the input slices of all taps are instead concatenated as
    channels before the 2D convolution. Winograd's algorithm is used where it is faster.
    """
    if is_suitable(x, kernel, padding):
        return winograd(x, kernel, padding)
    if x.ndim == 4:
        return conv_reference(x, kernel, (1, 1), padding)
    batch, depth, height, width, channels = x.shape
    taps, out = kernel.shape[0], kernel.shape[-1]
    if taps == 1 or out >= _MANY_OUTPUTS * channels:
        x, columns = _fold_depth(x, kernel, 1, padding[0])
        y = conv_reference(x.reshape(-1, height, width, x.shape[-1]), columns, (1, 1), padding[1:])
        return y.reshape(batch, -1, *y.shape[1:])
    planes = x.reshape(batch * depth, height, width, channels)
    columns = kernel.transpose(1, 2, 3, 0, 4).reshape(*kernel.shape[1:4], taps * out)
    y = conv_reference(planes, columns, (1, 1), padding[1:])
    y = y.reshape(batch, depth, *y.shape[1:3], taps, out)
    depth_out = depth + sum(padding[0]) - taps + 1
    parts = [shift_planes(y[..., a, :], padding[0][0] - a, depth_out) for a in reversed(range(taps))]
    return functools.reduce(operator.add, parts)


def _dense_unit_fwd(x, kernel, padding):
    return _dense_unit(x, kernel, padding), (x, kernel)


def _dense_unit_bwd(padding, residuals, g):
    x, kernel = residuals
    window = kernel.shape[:-2]
    if is_suitable(x, kernel, padding):
        dkernel = winograd_gradient(x, g, window, padding)
    else:
        dkernel = kernel_gradient(delay_until(x, g), g, window, padding)
    # the gradient of the input is a convolution with reversed kernel, swapped channels and complementary padding
    back = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in zip(window, padding, strict=True))
    reversed_kernel = jnp.swapaxes(jnp.flip(delay_until(kernel, dkernel), tuple(range(len(window)))), -1, -2)
    return _dense_unit(g, reversed_kernel, back), dkernel


_dense_unit.defvjp(_dense_unit_fwd, _dense_unit_bwd)
