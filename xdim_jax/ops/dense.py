"""Dense convolution from stride-1 2D convolutions and matrix products."""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from xdim_jax.ops.layout import Ints, Pairs, conv_reference, largest_divisor, split_axes

_MANY = 3  # times as many channels out as in
_SLAB_BYTES = 8 << 20  # columns of the weight gradient that stay in the last-level cache


def dense(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> jax.Array:
    """Dense convolution from stride-1 2D convolutions.

    A strided depth axis is unrolled into channels (its taps are the only slices that are read); strided
    in-plane axes are folded by space-to-depth, which turns the convolution into one of stride 1.
    """
    if x.ndim == 5 and strides[0] > 1:
        (x, kernel), strides, padding = _fold_depth(x, kernel, strides[0], padding[0]), strides[1:], padding[1:]
        batch, depth = x.shape[:2]
        y = dense(x.reshape(batch * depth, *x.shape[2:]), kernel, strides, padding)
        return y.reshape(batch, depth, *y.shape[1:])
    if any(s > 1 for s in strides):
        x, kernel = _space_to_depth(x, kernel, strides, padding)
        padding = ((0, 0),) * len(strides)
    return _dense_unit(x, kernel, padding)


def _fold_depth(x: jax.Array, kernel: jax.Array, stride: int, pad: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(B, D, H, W, C), (k, kh, kw, C, O) -> (B, D', H, W, k C), (kh, kw, k C, O)."""
    taps, channels = kernel.shape[0], kernel.shape[3]
    x = jnp.pad(x, [(0, 0), pad, (0, 0), (0, 0), (0, 0)])
    depth = (x.shape[1] - taps) // stride + 1
    slices = [lax.slice_in_dim(x, a, a + (depth - 1) * stride + 1, stride, axis=1) for a in range(taps)]
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], taps * channels, -1)
    return jnp.concatenate(slices, -1), kernel


def _space_to_depth(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> tuple[jax.Array, jax.Array]:
    """Folds every strided axis: stride s becomes s-fold channels and a kernel of ceil(k / s) taps."""
    ndim = len(strides)
    pads, blocks = [], []
    for n, k, s, (before, after) in zip(x.shape[1:-1], kernel.shape[:ndim], strides, padding, strict=True):
        out = (n + before + after - k) // s + 1
        taps = -(-k // s)
        length = (out - 1 + taps) * s  # every block that an output reads; the last may need more zeros, or fewer
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
    # the phases move in front of the channels
    x = x.transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    kernel = kernel.transpose(*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2), 2 * ndim, 2 * ndim + 1)
    x = x.reshape(x.shape[0], *inner, -1)
    return x, kernel.reshape(*blocks, x.shape[-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense_unit(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """Dense convolution of stride 1.

    3D: one 2D convolution of all planes that gives the depth taps as channels, then the sum of these, each moved by
    its tap; where that is much more than what comes in, planes are first put beside one another as channels.
    """
    if x.ndim == 4:
        return conv_reference(x, kernel, (1, 1), padding)
    batch, depth, height, width, channels = x.shape
    taps, out = kernel.shape[0], kernel.shape[-1]
    if taps == 1 or out >= _MANY * channels:
        x, columns = _fold_depth(x, kernel, 1, padding[0])
        y = conv_reference(x.reshape(-1, height, width, x.shape[-1]), columns, (1, 1), padding[1:])
        return y.reshape(batch, -1, *y.shape[1:])
    planes = x.reshape(batch * depth, height, width, channels)
    columns = kernel.transpose(1, 2, 3, 0, 4).reshape(*kernel.shape[1:4], taps * out)
    y = conv_reference(planes, columns, (1, 1), padding[1:])
    y = y.reshape(batch, depth, *y.shape[1:3], taps, out)
    depth_out = depth + sum(padding[0]) - taps + 1
    moved = [_moved(y[..., a, :], padding[0][0] - a, depth_out) for a in reversed(range(taps))]
    return functools.reduce(operator.add, moved)


def _moved(x: jax.Array, by: int, size: int) -> jax.Array:
    """Planes moved along depth, cut to ``size`` and filled up with zeros: fused into the sum that takes them."""
    pads = [(0, 0, 0), (by, size - by - x.shape[1], 0), *[(0, 0, 0)] * (x.ndim - 2)]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _dense_unit_fwd(x, kernel, padding):
    return _dense_unit(x, kernel, padding), (x, kernel)


def _dense_unit_bwd(padding, residuals, g):
    x, kernel = residuals
    window = kernel.shape[:-2]
    # the input's gradient is the same operation: kernel reversed, channels swapped, complementary padding
    back = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in zip(window, padding, strict=True))
    reversed_kernel = jnp.swapaxes(jnp.flip(kernel, tuple(range(len(window)))), -1, -2)
    return _dense_unit(g, reversed_kernel, back), _dense_kernel_gradient(x, g, window, padding)


_dense_unit.defvjp(_dense_unit_fwd, _dense_unit_bwd)


def _dense_kernel_gradient(x: jax.Array, g: jax.Array, window: Ints, padding: Pairs) -> jax.Array:
    """Sum over voxels of x (all taps along W) times g (all shifts along the other axes), slab by slab."""
    if x.ndim == 4:  # a 2D image is a volume of one slice
        grad = _dense_kernel_gradient(x[:, None], g[:, None], (1, *window), ((0, 0), *padding))
        return grad[0]
    batch, depth, height, _, channels = x.shape
    width, out = g.shape[3:]
    kd, kh, kw = window
    x = jnp.pad(x, [(0, 0)] * 3 + [padding[2], (0, 0)])
    shifts = [(k - 1 - before, k - 1 - after) for k, (before, after) in zip(window, padding, strict=True)]
    g = jnp.pad(g, [(0, 0), *shifts[:2], (0, 0), (0, 0)])

    row_bytes = batch * width * (kw * channels + kd * kh * out) * x.dtype.itemsize
    rows = largest_divisor(height, _SLAB_BYTES // row_bytes)
    planes = largest_divisor(depth, _SLAB_BYTES // (row_bytes * height)) if rows == height else 1
    steps_h = height // rows

    def slab(i, total):
        d, h = (i // steps_h) * planes, (i % steps_h) * rows
        xs = lax.dynamic_slice(x, (0, d, h, 0, 0), (batch, planes, rows, x.shape[3], channels))
        gs = lax.dynamic_slice(g, (0, d, h, 0, 0), (batch, planes + kd - 1, rows + kh - 1, width, out))
        columns = jnp.concatenate([xs[:, :, :, c : c + width] for c in range(kw)], -1)
        shifted = [
            gs[:, kd - 1 - a : kd - 1 - a + planes, kh - 1 - b : kh - 1 - b + rows]
            for a in range(kd)
            for b in range(kh)
        ]
        product = columns.reshape(-1, kw * channels).T @ jnp.concatenate(shifted, -1).reshape(-1, kd * kh * out)
        return total + product

    zero = jnp.zeros((kw * channels, kd * kh * out), x.dtype)
    grad = lax.fori_loop(0, (depth // planes) * steps_h, slab, zero)
    return grad.reshape(kw, channels, kd, kh, out).transpose(2, 3, 0, 1, 4)
