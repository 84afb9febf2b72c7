"""Helpers of the operations: padding, dimension numbers, splitting and shifting axes, the order of computation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pairs = tuple[tuple[int, int], ...]
Ints = tuple[int, ...]


def same_padding(size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> Pairs:
    """Return TensorFlow's "SAME" padding, with which the ``tf_efficientnet_*`` weights were trained.

    If the number of padding elements of an axis is odd, one more is added at the end than at the start.

    Args:
        size: Spatial size of the input.
        kernel: Size of the kernel along each axis.
        strides: One number per axis.
    """
    pairs = []
    for n, k, s in zip(size, kernel, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pairs.append((total // 2, total - total // 2))
    return tuple(pairs)


def symmetric_padding(kernel: Sequence[int]) -> Pairs:
    """Return a padding of ``k // 2`` elements on both sides of each axis, as is usual in PyTorch."""
    return tuple((k // 2, k // 2) for k in kernel)


def conv_reference(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs, groups: int = 1) -> jax.Array:
    """Compute a convolution as one ``lax`` call; see `xdim_jax.ops.conv` for the arguments."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout(x.ndim - 2), feature_group_count=groups
    )


def layout(ndim: int) -> tuple[str, str, str]:
    """Return the dimension numbers for ``lax``: input, kernel, output."""
    axes = "DHW"[3 - ndim :]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def split_axes(x: jax.Array, first: int, outer: Sequence[int], inner: Sequence[int]) -> jax.Array:
    """Split each axis ``first + i`` into two axes, ``outer[i]`` blocks of ``inner[i]`` elements."""
    pairs = [n for pair in zip(outer, inner, strict=True) for n in pair]
    return x.reshape(*x.shape[:first], *pairs, *x.shape[first + len(outer) :])


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of ``n`` that is at most ``limit``, or 1 if there is none."""
    return max((d for d in range(1, n + 1) if n % d == 0 and d <= limit), default=1)


def shift_planes(x: jax.Array, by: int, size: int, stride: int = 1) -> jax.Array:
    """Copy plane i to position ``stride * i + by`` of an array of zeros with ``size`` planes.

    Planes are taken along the first spatial axis. Planes whose new position is outside the array are dropped. This is
    one ``lax.pad``, which XLA fuses into the sum that uses it.
    """
    end = by + stride * (x.shape[1] - 1) + 1
    if (by, end, stride) == (0, size, 1):
        return x
    pads = [(0, 0, 0), (by, size - end, stride - 1), *[(0, 0, 0)] * (x.ndim - 2)]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def delay_until(x: jax.Array, other: jax.Array) -> jax.Array:
    """Return ``x`` with a false dependency on ``other``, which delays its computation until ``other`` is available.

    Backward passes use this for arrays that they recompute from the residuals. Without it, XLA on CPU computes all of
    these arrays right after the forward pass, and keeps them in memory until they are used. Optimisation barriers have
    no effect, because XLA on CPU removes them before common-subexpression elimination and scheduling.

    With several devices, ``x`` is returned unchanged, because reading one element of a distributed array needs
    communication.
    """
    return x if jax.device_count() > 1 else x + (0 * other[(0,) * other.ndim]).astype(x.dtype)
