"""Transposed convolution of any stride, computed as one small convolution for each phase of the stride.

A phase consists of the outputs whose indices are equal modulo the stride. The transposed convolution is used
for the convolution of an upsampled array (`xdim_jax.ops.upsampled`) and for the gradient of a strided convolution
(`xdim_jax.ops.dense`).
"""

import functools
import itertools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xdim_jax.ops.layout import Ints, Pairs, conv_reference, delay_until, shift_planes
from xdim_jax.ops.slabs import kernel_gradient


class Axis(NamedTuple):
    """A transposed convolution along one axis, with ``size`` outputs.

    It is defined by ``y[stride * i + tap - crop] += x[i] * kernel[tap]``.
    """

    stride: int
    crop: int
    size: int

    def first_tap(self, phase: int, taps: int) -> tuple[int, tuple[int, int]]:
        """Describe the outputs ``stride * i + phase`` as a correlation of the input with some of the taps.

        Args:
            phase: Index of the outputs modulo the stride.
            taps: Number of taps of the kernel.

        Returns:
            The first tap of the correlation, which then has the taps ``first, first - stride, first - 2 stride, ...``;
            and its padding ``(before, after)``, which may be negative.
        """
        last = (phase + self.crop) % self.stride
        first = last + (taps - 1 - last) // self.stride * self.stride
        before, after = ((phase + self.crop - tap) // self.stride for tap in (first, last))
        return first, (-before, after)


Axes = tuple[Axis, Axis, Axis]


def transposed_conv(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """Compute a transposed convolution.

    For each phase of the strides in the plane, one 2D convolution computes the contributions of all taps along the
    depth. These are shifted by the positions of their taps and added, and the phases are interleaved.

    Args:
        x: Array ``(B, D, H, W, C)``.
        kernel: Array ``(*taps, C, O)``.
        axes: Stride, crop and output size along each axis. In the plane, the output size must be the stride times the
            input size, and the kernel must be at least as long as the stride.

    Returns:
        Array ``(B, *size, O)``.
    """
    y: jax.Array = _transposed_conv(x, kernel, axes)  # pyright: ignore[reportAssignmentType]
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _transposed_conv(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    columns = _columns(kernel)
    planes = x.reshape(-1, *x.shape[2:])
    parts = []
    for phase in _phases(axes):
        part, pads = _phase_kernel(columns, axes, phase)
        y = conv_reference(planes, part, (1, 1), pads)
        parts.append(_add_depth_taps(y.reshape(*x.shape[:-1], kernel.shape[0], -1), axes[0]))
    width = axes[2].stride
    rows = [_interleave(parts[i : i + width], 3) for i in range(0, len(parts), width)]
    return _interleave(rows, 2)


def _columns(kernel: jax.Array) -> jax.Array:
    """Return the kernel with the taps along the depth as output channels: ``(kh, kw, C, kd O)``."""
    columns = kernel.transpose(1, 2, 3, 0, 4)
    return columns.reshape(*columns.shape[:3], -1)


def _phases(axes: Axes) -> list[Ints]:
    """Return the phases of the strides in the plane."""
    return list(itertools.product(range(axes[1].stride), range(axes[2].stride)))


def _phase_kernel(columns: jax.Array, axes: Axes, phase: Ints) -> tuple[jax.Array, Pairs]:
    """Return the kernel and the padding of the correlation that computes one phase in the plane."""
    part = jnp.flip(columns, (0, 1))
    pads = []
    for i, (axis, p) in enumerate(zip(axes[1:], phase, strict=True)):
        first, pad = axis.first_tap(p, columns.shape[i])
        part = lax.slice_in_dim(part, columns.shape[i] - 1 - first, None, axis.stride, axis=i)
        pads.append(pad)
    return part, tuple(pads)


def _interleave(parts: list[jax.Array], axis: int) -> jax.Array:
    """Interleave arrays along an axis: element i of part p becomes element ``len(parts) * i + p``."""
    if len(parts) == 1:
        return parts[0]
    y = jnp.stack(parts, axis + 1)
    return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def _add_depth_taps(y: jax.Array, axis: Axis) -> jax.Array:
    """Shift the contribution of each tap along the depth, and add: (B, D, H, W, taps, O) to (B, size, H, W, O)."""
    parts = [shift_planes(y[..., t, :], t - axis.crop, axis.size, axis.stride) for t in range(y.shape[-2])]
    return functools.reduce(operator.add, parts)


def _transposed_conv_fwd(x, kernel, axes):
    return _transposed_conv(x, kernel, axes), (x, kernel)


def _transposed_conv_bwd(axes, residuals, g):
    x, kernel = residuals
    columns, planes, dx, dkernel = _columns(kernel), None, None, None
    for phase in _phases(axes):
        g_phase = _phase_of_gradient(g, kernel.shape[0], x.shape[1], phase, axes, planes)
        dk = _kernel_gradient_of_phase(x, g_phase, kernel.shape[:3], axes, phase)
        part, pads = _phase_kernel(delay_until(columns, dk), axes, phase)
        back = tuple((after, first) for first, after in pads)
        planes = conv_reference(g_phase, jnp.swapaxes(jnp.flip(part, (0, 1)), 2, 3), (1, 1), back)
        dx = planes if dx is None else dx + planes
        dkernel = dk if dkernel is None else dkernel + dk
    assert dx is not None and dkernel is not None
    return dx.reshape(x.shape), _from_columns(dkernel, kernel.shape[0])


_transposed_conv.defvjp(_transposed_conv_fwd, _transposed_conv_bwd)


def transposed_conv_kernel_gradient(x: jax.Array, g: jax.Array, window: Ints, axes: Axes) -> jax.Array:
    """Return the gradient of the kernel of `transposed_conv`, ``(*window, C, O)``.

    Args:
        x: Input of `transposed_conv`.
        g: Gradient of its output.
        window: Size of the kernel along each axis.
        axes: See `transposed_conv`.
    """
    total, part = None, None
    for phase in _phases(axes):
        g_phase = _phase_of_gradient(g, window[0], x.shape[1], phase, axes, part)
        part = _kernel_gradient_of_phase(x, g_phase, window, axes, phase)
        total = part if total is None else total + part
    assert total is not None
    return _from_columns(total, window[0])


def _kernel_gradient_of_phase(x: jax.Array, g_phase: jax.Array, window: Ints, axes: Axes, phase: Ints) -> jax.Array:
    """Return the contribution of one phase to the gradient of the kernel, in the layout of `_columns`."""
    correlations = [axis.first_tap(p, n) for axis, p, n in zip(axes[1:], phase, window[1:], strict=True)]
    taps = tuple(before + after + 1 for _, (before, after) in correlations)
    part = kernel_gradient(x.reshape(-1, *x.shape[2:]), g_phase, taps, tuple(pads for _, pads in correlations))
    pads = [  # zeros for the taps of other phases
        (first % axis.stride, n - 1 - first, axis.stride - 1)
        for axis, (first, _), n in zip(axes[1:], correlations, window[1:], strict=True)
    ]
    return lax.pad(jnp.flip(part, (0, 1)), jnp.zeros((), part.dtype), [*pads, (0, 0, 0), (0, 0, 0)])


def _from_columns(columns: jax.Array, taps: int) -> jax.Array:
    """Invert `_columns`."""
    return columns.reshape(*columns.shape[:3], taps, -1).transpose(3, 0, 1, 2, 4)


def _phase_of_gradient(g: jax.Array, taps: int, depth: int, phase: Ints, axes: Axes, done: jax.Array | None):
    """For each input plane, return the gradients of the outputs of one phase to which the plane contributes.

    The result is ``(B D, H, W, taps O)``: the taps along the depth are channels. It may be larger than ``g``, so it is
    computed after ``done``, a result of the previous phase, to keep only one such array in memory.
    """
    stride, crop, size = axes[0]
    length = stride * (depth - 1) + taps
    g = g[:, :, phase[0] :: axes[1].stride, phase[1] :: axes[2].stride]
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), (crop, length - crop - size, 0), *[(0, 0, 0)] * 3])
    slices = [lax.slice_in_dim(g, t, t + stride * (depth - 1) + 1, stride, axis=1) for t in range(taps)]
    slices = slices if done is None else [delay_until(s, done) for s in slices]
    return jnp.concatenate(slices, -1).reshape(-1, *g.shape[2:4], taps * g.shape[-1])
