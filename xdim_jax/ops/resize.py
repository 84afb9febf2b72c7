"""Operations that change the spatial size: transposed convolution, nearest-neighbour upsampling, pooling."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from xdim_jax.ops.implementation import count_use, requested_implementation
from xdim_jax.ops.layout import Ints, Pairs, layout


def conv_transpose(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Ints | None = None,
    crop: Ints | None = None,
    size: Sequence[int] | None = None,
) -> jax.Array:
    """Compute a transposed convolution without bias: ``out[s * i - p + t] += x[i] @ kernel[t]``, as PyTorch does.

    By default, on every platform, this is one matrix product and an overlap-add, forward and backward. The
    implementation ``reference`` is one ``lax`` convolution. If the kernel is as long as the stride, outputs do not
    overlap, and the overlap-add is a rearrangement. (``lax.conv_transpose`` has another convention, in which the kernel
    is reversed along every spatial axis.)

    Args:
        x: Array ``(batch, *spatial, in)``.
        kernel: Array ``(*kernel, in, out)``.
        strides: One number per axis; None for the size of the kernel.
        crop: Number of outputs p to remove at the start of every axis, and also at the end if ``size`` is None
            (PyTorch's ``padding``); None for 0.
        size: Spatial size of the output; None for ``(n - 1) s - 2 p + k``. Outputs that no tap reaches are 0.

    Returns:
        Array ``(batch, *size, out)``.
    """
    ndim = x.ndim - 2
    window, (channels, out) = kernel.shape[:ndim], kernel.shape[ndim:]
    strides = strides or window
    crop = crop or (0,) * ndim
    if size is None:
        sides = zip(x.shape[1:-1], window, strides, crop, strict=True)
        size = tuple((n - 1) * s - 2 * p + k for n, k, s, p in sides)
    count_use("transposed by XLA" if requested_implementation() == "reference" else "transposed as matrix products")
    if requested_implementation() == "reference":
        return _conv_transpose_reference(x, kernel, strides, crop, size)
    columns = jnp.moveaxis(kernel, ndim, 0).reshape(channels, -1)
    if requested_implementation() == "sharded":  # a reshape would merge distributed axes with others
        y = jnp.tensordot(x, columns, 1).reshape(*x.shape[:-1], *window, out)
    else:
        y = (x.reshape(-1, channels) @ columns).reshape(*x.shape[:-1], *window, out)
    if (
        window == strides
        and not any(crop)
        and all(m == n * k for m, n, k in zip(size, x.shape[1:-1], window, strict=True))
    ):
        # (B, D, H, W, kd, kh, kw, O) -> (B, D, kd, H, kh, W, kw, O)
        order = [0, *(axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)), 1 + 2 * ndim]
        return y.transpose(order).reshape(x.shape[0], *size, out)
    # along each axis, the n positions and their k taps become the m outputs:
    # (B, m.., n, n.., k, k.., O) -> (B, m.., m, n.., k.., O)
    for axis in range(ndim):
        y = _overlap_add(y, 1 + axis, 1 + ndim, strides[axis], crop[axis], size[axis])
    return y


def _overlap_add(y: jax.Array, axis: int, taps_axis: int, stride: int, crop: int, size: int) -> jax.Array:
    """Add tap t of position i to output ``stride * i + t``, along one axis.

    Of the result, ``size`` outputs are returned, starting at output ``crop``.

    The outputs of each phase (those with the same index modulo the stride) are computed as one sum of shifted arrays,
    and the phases are interleaved.
    """
    n, taps = y.shape[axis], y.shape[taps_axis]
    rounds = -(-taps // stride)
    phases = []
    for phase in range(stride):
        total = None
        for q in range(rounds):
            if phase + stride * q >= taps:
                continue
            part = lax.index_in_dim(y, phase + stride * q, taps_axis, keepdims=False)
            if rounds > 1:
                pads = [(0, 0)] * part.ndim
                pads[axis] = (q, rounds - 1 - q)
                part = jnp.pad(part, pads)
            total = part if total is None else total + part
        if total is None:  # the stride is longer than the kernel: no tap reaches this phase
            shape = [m for i, m in enumerate(y.shape) if i != taps_axis]
            shape[axis] = n + rounds - 1
            total = jnp.zeros(shape, y.dtype)
        phases.append(total)
    out = phases[0] if stride == 1 else jnp.stack(phases, axis + 1)
    out = out.reshape(*out.shape[:axis], -1, *out.shape[axis + (1 if stride == 1 else 2) :])
    missing = crop + size - out.shape[axis]
    if missing > 0:
        out = jnp.pad(out, [(0, missing) if i == axis else (0, 0) for i in range(out.ndim)])
    return out if crop == 0 and missing == 0 else lax.slice_in_dim(out, crop, crop + size, axis=axis)


def _conv_transpose_reference(x: jax.Array, kernel: jax.Array, strides: Ints, crop: Ints, size: Sequence[int]):
    ndim = x.ndim - 2
    pads = []
    for n, k, s, p, m in zip(x.shape[1:-1], kernel.shape[:ndim], strides, crop, size, strict=True):
        before = k - 1 - p
        pads.append((before, m + k - 1 - ((n - 1) * s + 1) - before))
    flipped = jnp.flip(kernel, tuple(range(ndim)))
    return lax.conv_general_dilated(x, flipped, (1,) * ndim, pads, lhs_dilation=strides, dimension_numbers=layout(ndim))


def upsample(x: jax.Array, factors: Ints, size: Sequence[int] | None = None) -> jax.Array:
    """Upsample by nearest neighbours: ``out[f * i + r] = x[i]``, cropped at the end of each axis to ``size``.

    Args:
        x: Array ``(batch, *spatial, channels)``.
        factors: One integer per spatial axis.
        size: Spatial size of the output; None for ``factors`` times the size of ``x``.

    Returns:
        Array ``(batch, *size, channels)``.

    Raises:
        ValueError: ``size`` is larger than ``factors`` times the size of ``x``.
    """
    for axis, factor in enumerate(factors, 1):
        if factor > 1:
            shape = (*x.shape[: axis + 1], factor, *x.shape[axis + 1 :])
            x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
            x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        if size is not None and x.shape[axis] != size[axis - 1]:
            if x.shape[axis] < size[axis - 1]:
                raise ValueError(
                    f"upsample: axis {axis - 1} has {x.shape[axis]} elements, but size={tuple(size)} requests more"
                )
            x = lax.slice_in_dim(x, 0, size[axis - 1], axis=axis)
    return x


def max_pool(x: jax.Array, window: Ints, strides: Ints, padding: Pairs) -> jax.Array:
    """Return the largest value in every window.

    Args:
        x: Array ``(batch, *spatial, channels)``.
        window: Size of the window along each spatial axis.
        strides: One number per spatial axis.
        padding: Number of padding elements ``(before, after)`` for each spatial axis. Their value is minus infinity.

    Returns:
        Array ``(batch, *spatial_out, channels)``.
    """
    if math.prod(window) == 1:
        return x
    pads = ((0, 0), *padding, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), pads)
