"""Networks that are traced and compiled in no time, and a training run of six steps with one of them."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from xdim_jax import ops
from xdim_jax.nets import layers, networks

RECIPE = "configs/camus_omnianet.py:phantom"
# 4 patients of 4 images, two folds: 2 steps in an epoch
SHAPES = [
    "--config.data.patch=(32,32)",
    "--config.data.prepare.size=(32,32)",
    "--config.data.batch=4",
    "--config.data.folds=2",
    "--config.augment.noise.p=0.5",
    "--config.optim.lookahead.period=2",
    "--config.train.log_every=1",
]
# 6 steps in all
SMALL = [
    *SHAPES,
    "--config.optim.ema=0.9",
    "--config.train.epochs=3",
    "--config.train.validate_every=1",
]


class Pixelwise(nnx.Module):
    """Logits are a linear map of each pixel."""

    stages = ()

    def __init__(self, channels, seed):
        self.kernel = nnx.Param(0.1 * jax.random.normal(jax.random.key(seed), (1, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.use_running_average = False

    def __call__(self, image, rngs=None, levels=False):
        logits = image @ self.kernel[...] + self.bias[...]
        return [logits] if levels else logits


def use_pixelwise(setattr_):
    """Replace every network by `Pixelwise`."""
    setattr_(networks, "build", lambda config, seed: Pixelwise(config["out_channels"], seed or 0))


class OneConvolution(nnx.Module):
    """Logits are a convolution of 3 voxels along each axis: mirror images and borders of windows matter."""

    stages = ()

    def __init__(self, ndim, inputs, outputs, seed):
        self.kernel = nnx.Param(0.3 * jax.random.normal(jax.random.key(seed), (*(3,) * ndim, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.use_running_average = False

    def __call__(self, image, rngs=None, levels=False):
        axes = "DHW"[-(self.kernel.ndim - 2) :]
        layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        strides = (1,) * len(axes)
        kernel = self.kernel[...].astype(image.dtype)
        logits = jax.lax.conv_general_dilated(image, kernel, strides, "SAME", dimension_numbers=layout)
        logits = logits + self.bias[...].astype(image.dtype)
        return [logits] if levels else logits


class ThreeConvolutions(nnx.Module):
    """Convolutions by `ops.conv`, drop path around the second one; nearly a third of a step is the forward pass."""

    stages = parts = ()

    def __init__(self, ndim, inputs, outputs, seed, drop=0.0):
        rngs, channels = nnx.Rngs(seed), (inputs, 8, 8, outputs)
        self.kernels = nnx.List(
            [
                nnx.Param(0.3 * jax.random.normal(rngs.params(), (*(3,) * ndim, a, b)))
                for a, b in itertools.pairwise(channels)
            ]
        )
        self.drop = layers.DropPath(drop)

    def __call__(self, image, rngs=None, levels=False):
        first, second, last = (kernel[...] for kernel in self.kernels)
        x = self._conv(image, first)
        x = jax.nn.silu(x + self.drop(self._conv(x, second), rngs))
        logits = self._conv(x, last)
        return [logits] if levels else logits

    def _conv(self, x, kernel):
        ndim = x.ndim - 2
        return ops.conv(x, kernel.astype(x.dtype), strides=(1,) * ndim, padding=((1, 1),) * ndim)


def use_three_convolutions(setattr_, drop=0.0):
    """Replace every network by `ThreeConvolutions`."""

    def build(config, seed):
        ndim = networks.get_network(config).ndim
        return ThreeConvolutions(ndim, config["in_channels"], config["out_channels"], seed or 0, drop)

    setattr_(networks, "build", build)


def use_one_convolution(setattr_):
    """Replace every network by `OneConvolution`."""

    def build(config, seed):
        ndim = networks.get_network(config).ndim
        return OneConvolution(ndim, config["in_channels"], config["out_channels"], seed or 0)

    setattr_(networks, "build", build)
