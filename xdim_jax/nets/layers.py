"""Building blocks of the networks, for 2D and 3D, channels last.

When a network is built, random kernels are sampled by NumPy, because an eager ``jax.random`` call compiles a program
for each shape. Under a JAX transformation they are sampled by ``jax.random``. The numbers differ, but not their
distribution.

Activations have the dtype of the image: kernels and biases are cast to it where they are used, and norms compute in
float32 or better and cast their result. As in Flax, ``model.train()`` and ``model.eval()`` select the mode: they set
``use_running_average`` and ``deterministic``.
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

PADDINGS = ("symmetric", "same")  # paddings of encoders; a single layer may also have "valid" (no padding)
NORMS = ("batch", "instance", "instance_noaffine")
DEPTH_PADDINGS = ("zero", "edge", "renorm")
SQUEEZES = ("volume", "slice")
LEVELS = 5  # an encoder halves its input five times

HE_GAIN = math.sqrt(2)  # He et al. 2015: preserves the variance if a ReLU follows
TORCH_GAIN = math.sqrt(1 / 3)  # same variance as PyTorch's default initialisation, uniform(+-1 / sqrt(fan_in))


def check_choice(what: str, value: object, known: tuple[object, ...]) -> None:
    """Raise ValueError with a list of the known values if ``value`` is not one of them."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(map(str, known))}")


@dataclasses.dataclass(frozen=True)
class Depth:
    """Options for the spatial axis of a 3D network that the corresponding 2D network does not have.

    Attributes:
        axis: Position of the axis: 0 for depth (or time), 1 for height, 2 for width.
        padding: Padding along this axis: ``zero``, as in the authors' code; ``edge``, which repeats the outermost
            slice; ``renorm``, which pads with zeros and divides by the fraction of the kernel that is inside the
            volume. `xdim_jax.nets.inflate` states with which paddings inflation is exact.
        squeeze: Squeeze-and-excitation pools over the ``volume``, as in the authors' code, or over each ``slice``.
        strides: For each of the five levels, finest first, the stride along this axis: 2 as in the plane, or 1 to keep
            all slices.
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
    """Settings of all layers of a network.

    Attributes:
        ndim: Number of spatial axes, 2 or 3.
        norm: ``batch``, ``instance`` (affine) or ``instance_noaffine``.
        eps: eps of every norm.
        padding: ``symmetric`` (``k // 2`` on both sides) or TensorFlow's ``same``.
        depth: Options of the depth axis of a 3D network.
        level: Level of the inputs of the layers: an input of level i has 1/2^i of the size of the image in the plane.
    """

    ndim: int
    norm: str = "batch"
    eps: float = 1e-5
    padding: str = "symmetric"
    depth: Depth = dataclasses.field(default_factory=Depth)
    level: int = 0

    def __post_init__(self):
        check_choice("number of spatial axes", self.ndim, (2, 3))
        check_choice("norm", self.norm, NORMS)
        check_choice("padding", self.padding, PADDINGS)
        if not 0 < self.eps < 1:
            raise ValueError(f"eps of a norm must be above 0 and below 1; got {self.eps}")

    def at(self, level: int) -> "Style":
        """Return the same settings for layers whose inputs have another level."""
        return dataclasses.replace(self, level=level)

    def window(self, k: int, along_depth: int | None = None) -> tuple[int, ...]:
        """Return ``k`` for every axis, except ``along_depth`` (if given) for the depth axis of a 3D network."""
        sides = [k] * self.ndim
        if self.ndim == 3 and along_depth is not None:
            sides[self.depth.axis] = along_depth
        return tuple(sides)

    def strides(self, level: int) -> tuple[int, ...]:
        """Return the strides of the downsampling layer of a level: 2 in the plane, and 1 or 2 along the depth axis."""
        return self.window(2, self.depth.strides[level])

    @property
    def level_strides(self) -> tuple[tuple[int, ...], ...]:
        """The strides of every level along every axis, finest level first."""
        return tuple(self.strides(level) for level in range(LEVELS))


def named_stage(owner: nnx.Module, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a part of a network inside a named scope, so that profiles show its name.

    Args:
        owner: Network. If the name is in ``owner.remat``, the backward pass recomputes the activations of the part.
        name: Name of the part.
        call: The part.
    """
    recomputes = name in getattr(owner, "remat", ())

    def named(*arguments: Any) -> Any:
        with jax.named_scope(name):
            if recomputes:
                return nnx.remat(lambda module, *rest: module(*rest))(call, *arguments)
            return call(*arguments)

    return named


class ShapesOnly(nnx.Rngs):
    """Replaces random numbers if only the shapes of a module are needed: kernels are zeros, so tracing is faster."""


def random_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], gain: float) -> jax.Array:
    """Return a random kernel with a normal distribution.

    Args:
        rngs: Random numbers, or `ShapesOnly`.
        shape: Shape ``(*kernel, in / groups, out)``.
        gain: Standard deviation times ``sqrt(fan_in)``.
    """
    if isinstance(rngs, ShapesOnly):
        return jnp.zeros(shape)
    key = rngs.params()
    std = gain / math.sqrt(math.prod(shape[:-1]))
    if isinstance(key, Tracer):
        return std * jax.random.normal(key, shape)
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(std))


def constant(value: float, size: int) -> jax.Array:
    """Return an array ``(size,)`` of one value. NumPy creates it, so that no program is compiled."""
    return jnp.asarray(np.full(size, value, jnp.result_type(float)))


class Conv(nnx.Module):
    """Convolution.

    Args:
        channels: Number of input channels.
        filters: Number of output channels.
        kernel: Size of the kernel, one number for all axes or one number per axis.
        style: Number of axes, padding, depth options and level.
        strides: One number per axis; None for 1.
        padding: Padding; None for the padding of the style. ``valid`` means no padding.
        depthwise: True for one kernel per channel.
        bias: True to add a bias.
        gain: Gain of the random kernel; see `random_kernel`.
        norm: Attribute name of the norm that normalises the output, in the module that has this convolution; None if
            there is none. The inflation rule ``repeat`` corrects the statistics of this norm.
        rngs: Random numbers of the kernel.
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
        self.level = style.level
        self.groups = channels if depthwise else 1
        self.norm = norm
        self.kernel = nnx.Param(random_kernel(rngs, (*window, channels // self.groups, filters), gain))
        self.bias = nnx.Param(constant(0, filters)) if bias else None

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
    """Return, for each output, the factor that corrects for the taps of the kernel outside the volume.

    The factor is the sum of the absolute values of the kernel over all taps, divided by the sum over the taps inside
    the volume. Partial convolutions (Liu et al. 2018) count taps instead. With absolute values, the correction is exact
    if all slices are identical and the kernel is a 2D kernel times a non-negative profile along the axis. For example,
    the factor of a kernel with only a middle tap is 1.

    Args:
        kernel: Kernel of the convolution.
        axis: Depth axis.
        n: Number of slices of the input.
        stride: Stride along the axis.
        pad: Padding along the axis.

    Returns:
        Array ``(outputs along the axis, filters)``.
    """
    k = kernel.shape[axis]
    mass = jnp.sum(jnp.abs(kernel), [i for i in range(kernel.ndim - 1) if i != axis])  # (k, filters)
    starts = np.arange((n + sum(pad) - k) // stride + 1) * stride - pad[0]
    taps = starts[:, None] + np.arange(k)
    inside = jnp.asarray((taps >= 0) & (taps < n), mass.dtype) @ mass
    return jnp.where(inside > 0, jnp.sum(mass, 0) / jnp.where(inside > 0, inside, 1), 1)


class ConvTranspose(nnx.Module):
    """Transposed convolution with bias; kernel ``(*kernel, in, out)`` in PyTorch's tap order.

    Args:
        channels: Number of input channels.
        filters: Number of output channels.
        kernel: Size of the kernel along each axis.
        strides: One number per axis; None for the size of the kernel.
        crop: PyTorch's ``padding``: number of outputs to remove at the start of each axis, and also at the end if
            `__call__` is given no size; None for 0.
        rngs: Random numbers of the kernel.
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
        # mean number of taps that contribute to an output
        overlap = math.prod(k / s for k, s in zip(kernel, self.strides, strict=True))
        gain = HE_GAIN * math.sqrt(math.prod(kernel) / overlap)
        self.kernel = nnx.Param(random_kernel(rngs, (*kernel, channels, filters), gain))
        self.bias = nnx.Param(constant(0, filters))

    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        """Map ``(batch, *spatial, in)`` to ``(batch, *size, out)``; see `xdim_jax.ops.conv_transpose`."""
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
    """Upsample an array, concatenate it with a skip connection, and apply a convolution.

    Args:
        conv: Convolution with 3 taps along every axis, stride 1 and no bias.
        x: Array ``(batch, *spatial, in)``.
        skip: Array ``(batch, *size, more)``, whose channels follow the upsampled ones; or None.
        factors: Upsampling factors.
        trans: Transposed convolution that upsamples; None for nearest neighbours.
        size: Spatial size after upsampling; None for ``factors`` times the size of ``x``.

    Returns:
        Array ``(batch, *size, out)``.
    """
    if x.ndim == 4 or conv.depth.padding == "zero":
        transposed = None if trans is None else ops.TransposedConv(trans.kernel[...], trans.bias[...], trans.crop)
        return ops.conv_upsampled(x, skip, conv.kernel[...], factors=factors, size=size, transposed=transposed)
    x = ops.upsample(x, factors, size) if trans is None else trans(x, size)
    return conv(x if skip is None else jnp.concatenate([x, skip], -1))


class Dense(nnx.Module):
    """An affine map of the channels, the same for every voxel (PyTorch's ``Linear``)."""

    def __init__(self, channels: int, filters: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(random_kernel(rngs, (channels, filters), HE_GAIN))
        self.bias = nnx.Param(constant(0, filters))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.pointwise(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """Normalisation with the activation that follows it.

    Instance norm uses the statistics of each sample and channel, in training and in evaluation. Batch norm uses the
    statistics of the batch in training and running averages in evaluation. As in PyTorch, the running averages have a
    momentum of 0.1 (0.9 in Flax's convention) and contain the unbiased variance.

    Args:
        channels: Number of channels.
        style: Kind of norm, and eps.
        activation: Activation, see `xdim_jax.ops.activate`; None for no activation.
    """

    def __init__(self, channels: int, style: Style, activation: str | None = None):
        self.kind, self.eps, self.activation = style.norm, style.eps, activation
        self.momentum = 0.9
        self.use_running_average = False
        self.axis: str | None = None  # name of the pmap axis over which batch statistics are averaged
        affine = style.norm != "instance_noaffine"
        self.scale = nnx.Param(constant(1, channels)) if affine else None
        self.bias = nnx.Param(constant(0, channels)) if affine else None
        if style.norm == "batch":
            self.mean = nnx.BatchStat(constant(0, channels))
            self.var = nnx.BatchStat(constant(1, channels))

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
        # `self.mean[...] = ...` would request the sharding of a traced array, which has none. JAX then builds an error
        # message, which takes half of the tracing time although Flax discards the error
        self.mean.set_value(self.momentum * self.mean[...] + (1 - self.momentum) * mean.reshape(-1))
        self.var.set_value(self.momentum * self.var[...] + (1 - self.momentum) * unbiased)
        return y


class LayerNorm(nnx.Module):
    """Layer norm: standardisation of every voxel over its channels, with scale and shift."""

    def __init__(self, channels: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(constant(1, channels))
        self.bias = nnx.Param(constant(0, channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class SqueezeExcite(nnx.Module):
    """Squeeze-and-excitation (Hu et al. 2018): a gate for every channel, computed from the means of all channels.

    Args:
        channels: Number of channels.
        reduced: Number of channels between the two convolutions.
        style: Number of axes and depth options.
        rngs: Random numbers of the kernels.
    """

    def __init__(self, channels: int, reduced: int, style: Style, *, rngs: nnx.Rngs):
        self.conv_reduce = Conv(channels, reduced, 1, style=style, bias=True, rngs=rngs)
        self.conv_expand = Conv(reduced, channels, 1, style=style, bias=True, rngs=rngs)
        self.per_slice = style.depth.axis if style.ndim == 3 and style.depth.squeeze == "slice" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = tuple(1 + axis for axis in range(x.ndim - 2) if axis != self.per_slice)
        return ops.squeeze_excite(x, lambda m: self.conv_expand(ops.activate(self.conv_reduce(m), "silu")), axes=axes)


class DropPath(nnx.Module):
    """Stochastic depth (Huang et al. 2016).

    In training, a residual branch is replaced by 0 for random samples, and divided by the keep probability for the
    others. In evaluation, it is unchanged.
    """

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"a drop-path rate must be in [0, 1); got {rate}")
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        if self.deterministic or self.rate == 0:
            return x
        if rngs is None:
            raise ValueError("a network in training mode needs rngs=nnx.Rngs(dropout=key) for its stochastic depth")
        keep = jax.random.bernoulli(rngs.dropout(), 1 - self.rate, (x.shape[0], *(1,) * (x.ndim - 1)))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))
