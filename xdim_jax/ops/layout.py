"""What the operations share: padding, axis names, and cutting axes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pairs = tuple[tuple[int, int], ...]
Ints = tuple[int, ...]


def same_padding(size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> Pairs:
    """TensorFlow's "SAME" padding, as the ``tf_efficientnet_*`` weights were trained: the odd pixel goes after."""
    pairs = []
    for n, k, s in zip(size, kernel, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pairs.append((total // 2, total - total // 2))
    return tuple(pairs)


def symmetric_padding(kernel: Sequence[int]) -> Pairs:
    """``k // 2`` on both sides, as PyTorch networks are usually written (spec: architecture, section 1)."""
    return tuple((k // 2, k // 2) for k in kernel)


def conv_reference(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs, groups: int = 1) -> jax.Array:
    """The convolution as one ``lax`` call."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout(x.ndim - 2), feature_group_count=groups
    )


def layout(ndim: int) -> tuple[str, str, str]:
    """Dimension numbers for ``lax``: input, kernel, output."""
    axes = "DHW"[3 - ndim :]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def split_axes(x: jax.Array, first: int, outer: Sequence[int], inner: Sequence[int]) -> jax.Array:
    """Cuts axis ``first + i`` into ``outer[i]`` blocks of ``inner[i]``."""
    pairs = [n for pair in zip(outer, inner, strict=True) for n in pair]
    return x.reshape(*x.shape[:first], *pairs, *x.shape[first + len(outer) :])


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of ``n`` that is at most ``limit``; 1 if there is none."""
    return max((d for d in range(1, n + 1) if n % d == 0 and d <= limit), default=1)


def moved(x: jax.Array, by: int, size: int, stride: int = 1) -> jax.Array:
    """Plane i moved to ``stride * i + by`` along the first spatial axis, cut to ``size``, filled up with zeros.

    A pad, which is fused into the sum that takes it.
    """
    end = by + stride * (x.shape[1] - 1) + 1
    if (by, end, stride) == (0, size, 1):
        return x
    pads = [(0, 0, 0), (by, size - end, stride - 1), *[(0, 0, 0)] * (x.ndim - 2)]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def delayed(x: jax.Array, other: jax.Array) -> jax.Array:
    """``x``, not to be had before the other: for what a backward pass computes again, or from what was kept.

    XLA on CPU drops optimisation barriers before it merges equal computations and before it puts them in order: what
    needs no gradient is computed right after the forward pass, and all at once, and lies in memory until it is used.
    With several devices it is ``x`` as it is: one number of an array that lies on all of them would be a message.
    """
    return x if jax.device_count() > 1 else x + (0 * other[(0,) * other.ndim]).astype(x.dtype)
