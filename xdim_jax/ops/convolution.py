"""Convolution, with the selection of its implementation."""

import jax
import jax.numpy as jnp

from xdim_jax.ops.dense import dense
from xdim_jax.ops.depthwise import depthwise
from xdim_jax.ops.implementation import active_implementation, count_use, requested_implementation
from xdim_jax.ops.layout import Ints, Pairs, conv_reference

# largest supported number of devices along the first axis: if the part of an array on one of so many devices could be
# no longer than the kernel, a dense convolution is computed per tap, see `_conv_per_tap`
_MAX_PARTS = 32


def conv(x: jax.Array, kernel: jax.Array, *, strides: Ints, padding: Pairs, groups: int = 1) -> jax.Array:
    """Compute a convolution without bias.

    Args:
        x: Array ``(batch, *spatial, in)``.
        kernel: Array ``(*kernel, in / groups, out)``.
        strides: One number per spatial axis.
        padding: Number of zeros ``(before, after)`` for each spatial axis.
        groups: 1 (dense) or the number of input channels (depthwise).

    Returns:
        Array ``(batch, *spatial_out, out)``.

    Raises:
        ValueError: The numbers of axes or channels do not match, or ``groups`` is neither of the two values.
    """
    ndim = x.ndim - 2
    if not kernel.ndim == x.ndim or len(strides) != ndim or len(padding) != ndim:
        raise ValueError(
            f"conv: x{x.shape} has {ndim} spatial axes; kernel{kernel.shape}, strides {strides} and padding {padding} "
            "must have the same number"
        )
    channels = x.shape[-1]
    if groups not in (1, channels) or kernel.shape[-2] * groups != channels:
        raise ValueError(f"conv: kernel{kernel.shape} with groups={groups} does not fit x{x.shape}")
    window = kernel.shape[:ndim]
    if groups == 1 and set(window) == {1} and set(strides) == {1} and not any(map(any, padding)):
        count_use("1x1 as matrix products")
        return pointwise(x, kernel)
    if requested_implementation() == "sharded" and (
        groups > 1 or (window[0] > 1 and x.shape[1] <= _MAX_PARTS * window[0])
    ):
        count_use(f"{'depthwise' if groups > 1 else 'dense'} by planes")
        return _conv_per_tap(x, kernel, strides, padding, groups)
    if active_implementation() == "fast" and groups == 1:
        return dense(x, kernel, strides, padding)
    if active_implementation() == "fast" and kernel.shape[-1] == channels:
        count_use("depthwise as shifted sums")
        return depthwise(x, kernel, strides, padding)
    count_use("depthwise by XLA" if groups > 1 else "dense by XLA")
    return conv_reference(x, kernel, strides, padding, groups)


def _conv_per_tap(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs, groups: int) -> jax.Array:
    """Compute one convolution per tap along the first spatial axis, and add them.

    This avoids a bug of XLA's partitioner (jaxlib 0.10.2) if the first spatial axis is distributed over devices and the
    kernel is longer than the part on one device. The gradient of a depthwise convolution with respect to its input is
    then too large, by a factor equal to the number of devices along the batch axis. The output and the gradients of a
    dense convolution are too large by the same factor if each of these devices has one sample, and if the kernel is
    cast (``train.precision=bfloat16``) or the convolution is in a loop (``train.accumulate``).
    """
    pads = [(0, 0), padding[0], *[(0, 0)] * (x.ndim - 2)]
    padded = jnp.pad(x, pads)
    taps, stride = kernel.shape[0], strides[0]
    count = (padded.shape[1] - taps) // stride + 1
    rest, total = ((0, 0), *padding[1:]), None
    for tap in range(taps):
        planes = jax.lax.slice_in_dim(padded, tap, tap + (count - 1) * stride + 1, stride, axis=1)
        part = conv_reference(planes, kernel[tap : tap + 1], (1, *strides[1:]), rest, groups)
        total = part if total is None else total + part
    assert total is not None
    return total


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute a convolution with one tap as a matrix product over all voxels.

    Args:
        x: Array ``(batch, *spatial, in)``.
        kernel: Array ``(1, ..., 1, in, out)``.

    Returns:
        Array ``(batch, *spatial, out)``.
    """
    channels, out = kernel.shape[-2:]
    if requested_implementation() == "sharded":  # a reshape would merge distributed axes with others
        return jnp.tensordot(x, kernel.reshape(channels, out), 1)
    return (x.reshape(-1, channels) @ kernel.reshape(channels, out)).reshape(*x.shape[:-1], out)
