"""Building blocks of the networks: one code for 2D and 3D, channels last.

Kernels are drawn with numpy when a network is built (an eager ``jax.random`` call per layer compiles a program
per shape) and with ``jax.random`` under a transformation, so the two give different, equally distributed numbers.
The dtype of the activations is that of the image: kernels and biases are cast to it where they are used, norms compute
in float32 or better and return it.
Modes follow Flax: ``model.train()`` and ``model.eval()`` set ``use_running_average`` and ``deterministic``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from xdim_jax import ops

PADDINGS = ("symmetric", "same")  # of an encoder; single layers may have "valid", none
NORMS = ("batch", "instance", "instance_noaffine")
DEPTH_PADDINGS = ("zero", "edge", "renorm")
SQUEEZES = ("volume", "slice")
LEVELS = 5  # an encoder halves its input five times

HE_GAIN = math.sqrt(2)  # He et al. 2015: keeps the variance behind a rectifier
TORCH_GAIN = math.sqrt(1 / 3)  # the variance of torch's default uniform(+-1 / sqrt(fan_in))


def check_choice(what: str, value: object, known: tuple[object, ...]) -> None:
    """Raises ValueError, listing the known ones, if ``value`` is not one of them."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(map(str, known))}")


@dataclasses.dataclass(frozen=True)
class Depth:
    """How a 3D network treats the spatial axis that its 2D ancestor lacks (see `xdim_jax.nets.inflate`).

    Attributes:
        axis: 0 depth (or time), 1 height, 2 width.
        padding: along that axis: ``zero`` (as released); ``edge`` repeats the outermost slice, which makes inflation
            exact; ``renorm`` pads with zeros and divides by the share of the kernel that lies inside the volume.
        squeeze: squeeze-excite pools over the ``volume`` (as released) or every ``slice`` by itself.
        strides: along that axis, of the five levels; 2 as in the plane, or 1 to keep every slice.
    """

    axis: int = 0
    padding: str = "zero"
    squeeze: str = "volume"
    strides: tuple[int, ...] = (2,) * LEVELS

    def __post_init__(self):
        check_choice("depth axis", self.axis, (0, 1, 2))
        check_choice("depth padding", self.padding, DEPTH_PADDINGS)
        check_choice("squeeze", self.squeeze, SQUEEZES)
        object.__setattr__(self, "strides", tuple(self.strides))
        if len(self.strides) != LEVELS or not set(self.strides) <= {1, 2}:
            raise ValueError(f"depth strides are {LEVELS} numbers, each 1 or 2, finest level first; got {self.strides}")


@dataclasses.dataclass(frozen=True)
class Style:
    """What the layers of one network have in common.

    Attributes:
        ndim: spatial axes, 2 or 3.
        norm: ``batch``, ``instance`` (affine) or ``instance_noaffine``.
        eps: of every norm.
        padding: ``symmetric`` (``k // 2`` on both sides) or TF's ``same``.
        depth: of a 3D network.
    """

    ndim: int
    norm: str = "batch"
    eps: float = 1e-5
    padding: str = "symmetric"
    depth: Depth = dataclasses.field(default_factory=Depth)

    def __post_init__(self):
        check_choice("number of spatial axes", self.ndim, (2, 3))
        check_choice("norm", self.norm, NORMS)
        check_choice("padding", self.padding, PADDINGS)
        if not 0 < self.eps < 1:
            raise ValueError(f"eps of a norm is above 0 and below 1; got {self.eps}")

    def window(self, k: int, along_depth: int | None = None) -> tuple[int, ...]:
        """``k`` along every axis; along the depth axis of a 3D network ``along_depth``, if given."""
        sides = [k] * self.ndim
        if self.ndim == 3 and along_depth is not None:
            sides[self.depth.axis] = along_depth
        return tuple(sides)

    def strides(self, level: int) -> tuple[int, ...]:
        """Return the strides of the layer whose output has 1/2^(level + 1) of the size of the input."""
        return self.window(2, self.depth.strides[level])

    @property
    def level_strides(self) -> tuple[tuple[int, ...], ...]:
        """The strides of every level along every axis, finest level first."""
        return tuple(self.strides(level) for level in range(LEVELS))


def stage(owner: nnx.Module, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, a part of the network ``owner``, as a function whose operations have its name in profiles.

    If the name is in ``owner.remat``, the backward pass computes its activations again.
    """
    again = name in getattr(owner, "remat", ())

    def named(*arguments: Any) -> Any:
        with jax.named_scope(name):
            if again:
                return nnx.remat(lambda module, *rest: module(*rest))(call, *arguments)
            return call(*arguments)

    return named


def draw_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], gain: float) -> jax.Array:
    """Normal values of standard deviation ``gain / sqrt(fan_in)``; ``shape`` ends in ``(in / groups, out)``."""
    key = rngs.params()
    std = gain / math.sqrt(math.prod(shape[:-1]))
    if isinstance(key, Tracer):
        return std * jax.random.normal(key, shape)
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(std))


def filled(value: float, size: int) -> jax.Array:
    """``(size,)`` of one value: from numpy, for which nothing is compiled."""
    return jnp.asarray(np.full(size, value, jnp.result_type(float)))


class Conv(nnx.Module):
    """Convolution.

    Args:
        channels, filters: in and out.
        kernel: its size, one number for all axes or one per axis.
        style: gives the number of axes, the padding, and the treatment of depth.
        strides: one per axis; default 1.
        padding: instead of the style's; ``valid`` is none.
        norm: name of the sibling norm that takes the output, if one does: inflation by repetition, which multiplies
            the output, corrects that norm's statistics.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel: int | tuple[int, ...],
        *,
        style: Style,
        strides: tuple[int, ...] | None = None,
        padding: str | None = None,
        depthwise: bool = False,
        bias: bool = False,
        gain: float = HE_GAIN,
        norm: str | None = None,
        rngs: nnx.Rngs,
    ):
        if depthwise and channels != filters:
            raise ValueError(f"a depthwise convolution keeps its {channels} channels; got {filters} filters")
        window = style.window(kernel) if isinstance(kernel, int) else kernel
        self.strides = strides or (1,) * len(window)
        self.padding = padding or style.padding
        self.depth = style.depth
        self.groups = channels if depthwise else 1
        self.norm = norm
        self.kernel = nnx.Param(draw_kernel(rngs, (*window, channels // self.groups, filters), gain))
        self.bias = nnx.Param(filled(0, filters)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        window = kernel.shape[:-2]
        if self.padding == "same":
            padding = ops.same_padding(x.shape[1:-1], window, self.strides)
        elif self.padding == "symmetric":
            padding = ops.symmetric_padding(window)
        else:
            padding = ((0, 0),) * len(window)
        axis, scale = self.depth.axis, None
        if len(window) == 3 and any(padding[axis]):
            if self.depth.padding == "edge":
                x = jnp.pad(x, [padding[axis] if i == axis + 1 else (0, 0) for i in range(x.ndim)], mode="edge")
                padding = tuple((0, 0) if i == axis else pair for i, pair in enumerate(padding))
            elif self.depth.padding == "renorm":
                scale = _inverse_coverage(kernel, axis, x.shape[axis + 1], self.strides[axis], padding[axis])
        y = ops.conv(x, kernel, strides=self.strides, padding=padding, groups=self.groups)
        if scale is not None:
            y = y * scale.reshape([n if i in (axis + 1, y.ndim - 1) else 1 for i, n in enumerate(y.shape)])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _inverse_coverage(kernel: jax.Array, axis: int, n: int, stride: int, pad: tuple[int, int]) -> jax.Array:
    """Per output along ``axis`` and per filter: the kernel's absolute mass, divided by that which lies inside.

    Partial convolutions (Liu et al. 2018) count taps; here they weigh what they hold, so that it is exact for every
    kernel that is a profile along the axis times a 2D kernel: a middle tap alone never needs a correction.
    """
    k = kernel.shape[axis]
    mass = jnp.sum(jnp.abs(kernel), [i for i in range(kernel.ndim - 1) if i != axis])  # (k, filters)
    starts = np.arange((n + sum(pad) - k) // stride + 1) * stride - pad[0]
    taps = starts[:, None] + np.arange(k)
    inside = jnp.asarray((taps >= 0) & (taps < n), mass.dtype) @ mass
    return jnp.where(inside > 0, jnp.sum(mass, 0) / jnp.where(inside > 0, inside, 1), 1)


class ConvTranspose(nnx.Module):
    """Transposed convolution with bias; kernel ``(*kernel, in, out)`` in PyTorch's tap order.

    Strides are as long as the kernel unless given; ``crop`` outputs are left out before the first of an axis.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        crop: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        self.strides, self.crop = strides or kernel, crop or (0,) * len(kernel)
        overlap = math.prod(k / s for k, s in zip(kernel, self.strides, strict=True))  # taps that meet in an output
        gain = HE_GAIN * math.sqrt(math.prod(kernel) / overlap)
        self.kernel = nnx.Param(draw_kernel(rngs, (*kernel, channels, filters), gain))
        self.bias = nnx.Param(filled(0, filters))

    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        """``(batch, *spatial, in)`` to ``(batch, *size, out)``; see `xdim_jax.ops.conv_transpose`."""
        kernel = self.kernel[...].astype(x.dtype)
        y = ops.conv_transpose(x, kernel, strides=self.strides, crop=self.crop, size=size)
        return y + self.bias[...].astype(y.dtype)


def conv_upsampled(
    conv: Conv,
    x: jax.Array,
    skip: jax.Array | None,
    factors: tuple[int, ...],
    *,
    trans: ConvTranspose | None = None,
    size: tuple[int, ...] | None = None,
) -> jax.Array:
    """``conv`` of an upsampled array and, as further channels behind it, a skip.

    Args:
        conv: 3 taps along every axis, stride 1, without bias.
        x: ``(batch, *spatial, in)``.
        skip: ``(batch, *size, more)``, or none.
        factors: of the upsampling.
        trans: upsamples, in place of nearest neighbours.
        size: of what it gives; default: ``factors`` times that of ``x``.
    """
    if x.ndim == 4 or conv.depth.padding == "zero":
        expand = None if trans is None else ops.Expand(trans.kernel[...], trans.bias[...], trans.crop)
        return ops.conv_upsampled(x, skip, conv.kernel[...], factors=factors, size=size, expand=expand)
    x = ops.upsample(x, factors, size) if trans is None else trans(x, size)
    return conv(x if skip is None else jnp.concatenate([x, skip], -1))


class Dense(nnx.Module):
    """The same affine map of the channels at every voxel; PyTorch's ``Linear``."""

    def __init__(self, channels: int, filters: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(draw_kernel(rngs, (channels, filters), HE_GAIN))
        self.bias = nnx.Param(filled(0, filters))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.pointwise(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """Normalisation with the activation that follows it.

    ``instance``: statistics per sample and channel, in training and evaluation alike. ``batch``: statistics of
    the batch in training; running averages (Flax momentum 0.9 is PyTorch's 0.1, unbiased variance as in PyTorch)
    in evaluation.
    """

    def __init__(self, channels: int, style: Style, activation: str | None = None):
        self.kind, self.eps, self.activation = style.norm, style.eps, activation
        self.momentum = 0.9
        self.use_running_average = False
        self.axis: str | None = None  # of a pmap, whose devices share the statistics of the batch
        affine = style.norm != "instance_noaffine"
        self.scale = nnx.Param(filled(1, channels)) if affine else None
        self.bias = nnx.Param(filled(0, channels)) if affine else None
        if style.norm == "batch":
            self.mean = nnx.BatchStat(filled(0, channels))
            self.var = nnx.BatchStat(filled(1, channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        kind = jnp.promote_types(x.dtype, jnp.float32)
        scale = jnp.ones(x.shape[-1], kind) if self.scale is None else self.scale[...]
        bias = jnp.zeros(x.shape[-1], kind) if self.bias is None else self.bias[...]
        spatial = tuple(range(1, x.ndim - 1))
        if self.kind != "batch":
            return ops.normalise(x, scale, bias, axes=spatial, eps=self.eps, activation=self.activation)[0]
        if self.use_running_average:
            factor = scale * jax.lax.rsqrt(self.var[...] + self.eps)
            shift = bias - self.mean[...] * factor
            return ops.activate(x * factor + shift, self.activation).astype(x.dtype)
        options: dict[str, Any] = {"axes": (0, *spatial), "eps": self.eps, "activation": self.activation}
        y, mean, var = ops.normalise(x, scale, bias, **options, across=self.axis)
        count = x.size // x.shape[-1] * (1 if self.axis is None else jax.lax.axis_size(self.axis))
        unbiased = var.reshape(-1) * (count / max(count - 1, 1))
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean.reshape(-1)
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * unbiased
        return y


class LayerNorm(nnx.Module):
    """Normalisation of every voxel over its channels, affine."""

    def __init__(self, channels: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(filled(1, channels))
        self.bias = nnx.Param(filled(0, channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class SqueezeExcite(nnx.Module):
    """Scales every channel by a gate computed from the channels' means over space (Hu et al. 2018)."""

    def __init__(self, channels: int, reduced: int, style: Style, *, rngs: nnx.Rngs):
        self.conv_reduce = Conv(channels, reduced, 1, style=style, bias=True, rngs=rngs)
        self.conv_expand = Conv(reduced, channels, 1, style=style, bias=True, rngs=rngs)
        self.per_slice = style.depth.axis if style.ndim == 3 and style.depth.squeeze == "slice" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = tuple(1 + axis for axis in range(x.ndim - 2) if axis != self.per_slice)
        return ops.squeeze_excite(x, lambda m: self.conv_expand(ops.activate(self.conv_reduce(m), "silu")), axes=axes)


class DropPath(nnx.Module):
    """Stochastic depth: drops a residual branch per sample, and divides by the keep probability (Huang et al. 2016)."""

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"a drop-path rate is in [0, 1); got {rate}")
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        if self.deterministic or self.rate == 0:
            return x
        if rngs is None:
            raise ValueError("a network in training mode needs rngs=nnx.Rngs(dropout=key) for its stochastic depth")
        keep = jax.random.bernoulli(rngs.dropout(), 1 - self.rate, (x.shape[0], *(1,) * (x.ndim - 1)))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))
