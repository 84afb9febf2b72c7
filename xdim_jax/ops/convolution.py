"""Convolution: one entry that picks the form."""

import jax
import jax.numpy as jnp

from xdim_jax.ops.dense import dense
from xdim_jax.ops.depthwise import depthwise
from xdim_jax.ops.form import active_form, forced_form, take
from xdim_jax.ops.layout import Ints, Pairs, conv_reference


def conv(x: jax.Array, kernel: jax.Array, *, strides: Ints, padding: Pairs, groups: int = 1) -> jax.Array:
    """Convolution without bias.

    Args:
        x: ``(batch, *spatial, in)``.
        kernel: ``(*kernel, in / groups, out)``.
        strides: one per spatial axis.
        padding: zeros ``(before, after)`` per spatial axis.
        groups: 1 (dense) or the number of input channels (depthwise).

    Returns:
        ``(batch, *spatial_out, out)``.

    Raises:
        ValueError: the ranks do not fit, or ``groups`` is neither 1 nor depthwise.
    """
    ndim = x.ndim - 2
    if not kernel.ndim == x.ndim or len(strides) != ndim or len(padding) != ndim:
        raise ValueError(
            f"conv: x{x.shape} has {ndim} spatial axes, but kernel{kernel.shape}, strides {strides} "
            f"and padding {padding} do not"
        )
    channels = x.shape[-1]
    if groups not in (1, channels) or kernel.shape[-2] * groups != channels:
        raise ValueError(f"conv: kernel{kernel.shape} with groups={groups} does not fit x{x.shape}")
    window = kernel.shape[:ndim]
    if groups == 1 and set(window) == {1} and set(strides) == {1} and not any(map(any, padding)):
        take("1x1 as matrix products")
        return pointwise(x, kernel)
    if forced_form() == "sharded" and groups > 1:
        take("depthwise by planes")
        return _by_taps_of_first_axis(x, kernel, strides, padding, groups)
    if active_form() == "fast" and groups == 1:
        return dense(x, kernel, strides, padding)
    if active_form() == "fast" and kernel.shape[-1] == channels:
        take("depthwise as shifted sums")
        return depthwise(x, kernel, strides, padding)
    take("depthwise by XLA" if groups > 1 else "dense by XLA")
    return conv_reference(x, kernel, strides, padding, groups)


def _by_taps_of_first_axis(x: jax.Array, kernel: jax.Array, strides: Ints, padding: Pairs, groups: int) -> jax.Array:
    """One convolution per tap along the first spatial axis, each of one plane.

    Where that axis lies on several devices, XLA's partitioner (jaxlib 0.10.2) multiplies the input's gradient of a
    depthwise convolution by the number of devices that share a batch, if the kernel reaches past a device's planes.
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
    """1x1 convolution as one matrix product over all voxels."""
    channels, out = kernel.shape[-2:]
    if forced_form() == "sharded":  # reshaping would join axes that lie on several devices with others
        return jnp.tensordot(x, kernel.reshape(channels, out), 1)
    return (x.reshape(-1, channels) @ kernel.reshape(channels, out)).reshape(*x.shape[:-1], out)
