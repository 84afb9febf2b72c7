"""A training run of six steps whose network is a linear map of each pixel, for test_resume and test_misuse."""

import jax
import jax.numpy as jnp
from flax import nnx

from xdim_jax.nets import networks

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
