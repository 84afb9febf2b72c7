"""Building blocks of the networks: one code for 2D and 3D, channels last.

Kernels are drawn with numpy when a network is built (an eager ``jax.random`` call per layer compiles a program
per shape) and with ``jax.random`` under a transformation, so the two give different, equally distributed numbers.
Modes follow Flax: ``model.train()`` and ``model.eval()`` set ``use_running_average`` and ``deterministic``.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from xdim_jax import ops

PADDINGS = ("symmetric", "same")
NORMS = ("batch", "instance")

HE_GAIN = math.sqrt(2)  # He et al. 2015: keeps the variance behind a rectifier
TORCH_GAIN = math.sqrt(1 / 3)  # the variance of torch's default uniform(+-1 / sqrt(fan_in))


def draw_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], gain: float) -> jax.Array:
    """Normal values of standard deviation ``gain / sqrt(fan_in)``; ``shape`` ends in ``(in / groups, out)``."""
    key = rngs.params()
    std = gain / math.sqrt(math.prod(shape[:-1]))
    if isinstance(key, Tracer):
        return std * jax.random.normal(key, shape)
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(std))


class Conv(nnx.Module):
    """Convolution. ``kernel`` and ``strides`` name every spatial axis; padding ``symmetric`` or TF's ``same``."""

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        padding: str = "symmetric",
        depthwise: bool = False,
        bias: bool = False,
        gain: float = HE_GAIN,
        rngs: nnx.Rngs,
    ):
        if padding not in PADDINGS:
            raise ValueError(f"unknown padding {padding!r}; known: {', '.join(PADDINGS)}")
        if depthwise and channels != filters:
            raise ValueError(f"a depthwise convolution keeps its {channels} channels; got {filters} filters")
        self.strides = strides or (1,) * len(kernel)
        self.padding = padding
        self.groups = channels if depthwise else 1
        self.kernel = nnx.Param(draw_kernel(rngs, (*kernel, channels // self.groups, filters), gain))
        self.bias = nnx.Param(jnp.zeros(filters)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        window = self.kernel.shape[:-2]
        if self.padding == "same":
            padding = ops.same_padding(x.shape[1:-1], window, self.strides)
        else:
            padding = ops.symmetric_padding(window)
        y = ops.conv(x, self.kernel[...], strides=self.strides, padding=padding, groups=self.groups)
        return y if self.bias is None else y + self.bias[...]


class ConvTranspose(nnx.Module):
    """Transposed convolution, kernel = stride, with bias. Kernel ``(*kernel, in, out)`` in PyTorch's tap order."""

    def __init__(self, channels: int, filters: int, kernel: tuple[int, ...], *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(draw_kernel(rngs, (*kernel, channels, filters), HE_GAIN * math.prod(kernel) ** 0.5))
        self.bias = nnx.Param(jnp.zeros(filters))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.conv_transpose(x, self.kernel[...]) + self.bias[...]


class Norm(nnx.Module):
    """Normalisation, affine, with the activation that follows it.

    ``instance``: statistics per sample and channel, in training and evaluation alike. ``batch``: statistics of
    the batch in training; running averages (Flax momentum 0.9 is PyTorch's 0.1, unbiased variance as in PyTorch)
    in evaluation.
    """

    def __init__(self, channels: int, *, kind: str, eps: float, activation: str | None = None):
        if kind not in NORMS:
            raise ValueError(f"unknown norm {kind!r}; known: {', '.join(NORMS)}")
        self.kind, self.eps, self.activation = kind, eps, activation
        self.momentum = 0.9
        self.use_running_average = False
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        if kind == "batch":
            self.mean = nnx.BatchStat(jnp.zeros(channels))
            self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = self.scale[...], self.bias[...]
        spatial = tuple(range(1, x.ndim - 1))
        if self.kind == "instance":
            return ops.normalise(x, scale, bias, axes=spatial, eps=self.eps, activation=self.activation)[0]
        if self.use_running_average:
            factor = scale * jax.lax.rsqrt(self.var[...] + self.eps)
            shift = bias - self.mean[...] * factor
            return ops.activate(x * factor + shift, self.activation).astype(x.dtype)
        y, mean, var = ops.normalise(x, scale, bias, axes=(0, *spatial), eps=self.eps, activation=self.activation)
        count = x.size // x.shape[-1]
        unbiased = var.reshape(-1) * (count / max(count - 1, 1))
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean.reshape(-1)
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * unbiased
        return y


class SqueezeExcite(nnx.Module):
    """Scales every channel by a gate computed from the channels' means over space (Hu et al. 2018)."""

    def __init__(self, channels: int, reduced: int, ndim: int, *, rngs: nnx.Rngs):
        point = (1,) * ndim
        self.conv_reduce = Conv(channels, reduced, point, bias=True, rngs=rngs)
        self.conv_expand = Conv(reduced, channels, point, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = jnp.mean(x, tuple(range(1, x.ndim - 1)), keepdims=True)
        hidden = ops.activate(self.conv_reduce(pooled), "silu")
        return x * jax.nn.sigmoid(self.conv_expand(hidden))


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
