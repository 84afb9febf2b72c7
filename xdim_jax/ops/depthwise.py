"""Fast implementation of the depthwise convolution: a sum of shifted arrays, each multiplied by a tap."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from xdim_jax.ops.layout import Ints, Pairs, largest_divisor, split_axes

_UNROLLED_TAPS = 27  # with more taps in one fusion, XLA on CPU does not vectorise the loop
_ADDED_PARTS = 16  # number of parts of an array that are added elementwise before the sum over space


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs) -> jax.Array:
    """Compute a depthwise convolution; see `xdim_jax.ops.conv` for the arguments.

    If the kernel has more than 27 taps, the program has a loop over the taps along the first axis.
    """
    ndim = len(strides)
    window, taps = kernel.shape[:ndim], kernel.reshape(*kernel.shape[:ndim], -1)
    phases, out = _phases(x, window, strides, padding)
    if math.prod(window) <= _UNROLLED_TAPS:
        return _tap_sum(phases, taps, strides, out, range(window[0]))

    def body(a, y):
        plane = lax.dynamic_index_in_dim(taps, a, 0)
        rows = lax.dynamic_index_in_dim(phases, a % strides[0], 1 + ndim)
        rows = lax.dynamic_slice_in_dim(rows, a // strides[0], out[0], 1)
        return y + _tap_sum(rows, plane, (1, *strides[1:]), out, range(1))

    return lax.fori_loop(0, window[0], body, jnp.zeros((x.shape[0], *out, x.shape[-1]), x.dtype))


def _phases(x: jax.Array, window: Ints, strides: Ints, padding: Pairs) -> tuple[jax.Array, Ints]:
    """Pad, and split every axis into the phases of its stride s: phase r has the elements r, r + s, r + 2 s, ...

    Returns:
        Array ``(B, *(m / s), *s, C)``, where m is the size of an axis after padding, a multiple of s; and the spatial
        size of the output.
    """
    ndim = len(strides)
    pads, out = [], []
    for n, k, s, (before, after) in zip(x.shape[1:-1], window, strides, padding, strict=True):
        size = (n + before + after - k) // s + 1
        length = (size - 1 + -(-k // s)) * s
        pads.append((before, length - n - before, 0))
        out.append(size)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    x = split_axes(x, 1, [n // s for n, s in zip(x.shape[1:-1], strides, strict=True)], strides)
    x = x.transpose(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)
    return x, tuple(out)


def _tap_inputs(phases: jax.Array, tap: Ints, strides: Ints, out: Ints) -> jax.Array:
    """Return the inputs that are multiplied by one tap of the kernel, one for each output voxel."""
    start = [a // s for a, s in zip(tap, strides, strict=True)]
    phase = [a % s for a, s in zip(tap, strides, strict=True)]
    batch, channels = phases.shape[0], phases.shape[-1]
    stop = [batch, *(a + n for a, n in zip(start, out, strict=True)), *(a + 1 for a in phase), channels]
    return lax.reshape(lax.slice(phases, [0, *start, *phase, 0], stop), (batch, *out, channels))


def _tap_sum(phases: jax.Array, taps: jax.Array, strides: Ints, out: Ints, first: range) -> jax.Array:
    """Return the sum over taps of their inputs times their weights.

    This function calls lax instead of jnp, because the checks of jnp add seconds to tracing.

    Args:
        phases: Array from `_phases`.
        taps: Kernel ``(*kernel, C)``.
        strides: One number per spatial axis.
        out: Spatial size of the output.
        first: Positions of the taps along the first spatial axis that are summed.
    """
    total, shape = None, (phases.shape[0], *out, phases.shape[-1])
    for tap in _indices(first, *map(range, taps.shape[1:-1])):
        weight = lax.slice(taps, [*tap, 0], [*(a + 1 for a in tap), taps.shape[-1]])
        weight = lax.broadcast_in_dim(lax.reshape(weight, taps.shape[-1:]), shape, (len(shape) - 1,))
        part = lax.mul(_tap_inputs(phases, tap, strides, out), weight)
        total = part if total is None else lax.add(total, part)
    assert total is not None
    return total


def _indices(*ranges: range) -> list[Ints]:
    indices: list[Ints] = [()]
    for r in ranges:
        indices = [(*index, i) for index in indices for i in r]
    return indices


def _depthwise_fwd(x, kernel, strides, padding):
    return depthwise(x, kernel, strides, padding), (x, kernel)


def _depthwise_bwd(strides, padding, residuals, g):
    x, kernel = residuals
    return (
        _depthwise_input_gradient(g, kernel, x.shape[1:-1], strides, padding),
        _depthwise_kernel_gradient(x, g, kernel.shape, strides, padding),
    )


depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


def _depthwise_input_gradient(g: jax.Array, kernel: jax.Array, size: Ints, strides: Ints, padding: Pairs) -> jax.Array:
    """Return the gradient of the input: for phase r of the stride, a convolution with the taps ``kernel[r::s]``."""
    ndim = len(strides)
    if set(strides) == {1}:
        back = tuple(
            (k - 1 - before, n - m + before)
            for k, n, m, (before, _) in zip(kernel.shape[:ndim], size, g.shape[1:-1], padding, strict=True)
        )
        return depthwise(g, jnp.flip(kernel, tuple(range(ndim))), strides, back)
    # the gradient at index s j + r of the padded input is the sum over m of kernel[s m + r] * g[j - m]
    lengths = [-(-(n + before) // s) for n, s, (before, _) in zip(size, strides, padding, strict=True)]
    parts = []
    for phase in _indices(*map(range, strides)):
        part = kernel[tuple(slice(r, None, s) for r, s in zip(phase, strides, strict=True))]
        taps = part.shape[:ndim]
        if 0 in taps:
            parts.append(jnp.zeros((g.shape[0], *lengths, g.shape[-1]), g.dtype))
            continue
        back = tuple((t - 1, n - m) for t, n, m in zip(taps, lengths, g.shape[1:-1], strict=True))
        parts.append(depthwise(g, jnp.flip(part, tuple(range(ndim))), (1,) * ndim, back))
    stacked = jnp.stack(parts).reshape(*strides, g.shape[0], *lengths, g.shape[-1])
    # (*s, B, *j, C) -> (B, j0, s0, j1, s1, ..., C)
    order = [ndim, *(axis for i in range(ndim) for axis in (ndim + 1 + i, i)), 2 * ndim + 1]
    full = stacked.transpose(order).reshape(
        g.shape[0], *(n * s for n, s in zip(lengths, strides, strict=True)), g.shape[-1]
    )
    crop = [slice(before, before + n) for n, (before, _) in zip(size, padding, strict=True)]
    return full[(slice(None), *crop)]


def _depthwise_kernel_gradient(
    x: jax.Array, g: jax.Array, shape: Sequence[int], strides: Ints, padding: Pairs
) -> jax.Array:
    """Return the gradient of the kernel: for each tap, the sum over voxels of its inputs times ``g``.

    The program has a loop over the taps along all axes but the last.
    """
    ndim = len(strides)
    window = tuple(shape[:ndim])
    phases, out = _phases(x, window, strides, padding)
    last, outer = window[-1], window[:-1]

    def body(i, grad):
        rows, index = phases, i
        for axis in reversed(range(ndim - 1)):  # the inputs of the tap along this axis
            a, index = index % outer[axis], index // outer[axis]
            rows = lax.dynamic_index_in_dim(rows, a % strides[axis], 1 + ndim + axis)
            rows = lax.dynamic_slice_in_dim(rows, a // strides[axis], out[axis], 1 + axis)
        inner = (1,) * (ndim - 1) + (strides[-1],)
        sums = [_space_sum(_tap_inputs(rows, (0,) * (ndim - 1) + (c,), inner, out), g) for c in range(last)]
        return lax.dynamic_update_index_in_dim(grad, jnp.stack(sums), i, 0)

    grad = lax.fori_loop(0, math.prod(outer), body, jnp.zeros((math.prod(outer), last, x.shape[-1]), x.dtype))
    return grad.reshape(shape)


def _space_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the sum of ``a * b`` over all axes but the last.

    The product is first divided into parts, which are added elementwise. The remaining sum is computed as a matrix
    product with ones.
    """
    channels = a.shape[-1]
    rows = largest_divisor(a.shape[1], _ADDED_PARTS)
    n = a.shape[1] // rows
    total = a[:, :n] * b[:, :n]
    for r in range(1, rows):
        total = total + a[:, r * n : (r + 1) * n] * b[:, r * n : (r + 1) * n]
    total = total.reshape(-1, channels)
    return (jnp.ones((1, total.shape[0]), total.dtype) @ total)[0]
