"""The VGG encoder with batch norm (Simonyan and Zisserman 2015), 16 and 19 layers, in 2D and 3D from the same code.

A U-Net with this encoder is similar to TernausNet and v16U-Net, on which the paper builds (Sect. 1.2).
"""

import jax
from flax import nnx

from xdim_jax import ops
from xdim_jax.nets.encoders.family import SYMMETRIC, Family
from xdim_jax.nets.layers import Conv, Norm, Style

CONVOLUTIONS = {"vgg16_bn": (2, 2, 3, 3, 3), "vgg19_bn": (2, 2, 4, 4, 4)}  # before each of the five poolings
WIDTHS = (64, 128, 256, 512, 512)


class Pool(nnx.Module):
    """Max pooling over blocks as large as the strides. Along a depth axis of stride 1 a block has one slice."""

    def __init__(self, strides: tuple[int, ...]):
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.max_pool(x, self.strides, self.strides, ((0, 0),) * len(self.strides))


class Identity(nnx.Module):
    """The identity, at the position of timm's ReLU, so that the other layers have the same indices as in timm.

    The ReLU itself is part of the preceding `Norm`.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class VGG(nnx.Module):
    """VGG with five features: the inputs of the second to fifth pooling, and the output of the fifth.

    See `xdim_jax.nets.encoders.efficientnet.EfficientNet` for the arguments. There are no residual branches, so
    ``drop_path`` has no effect.
    """

    def __init__(self, name: str, channels: int, *, style: Style, drop_path: float, rngs: nnx.Rngs):
        del drop_path
        self.features = nnx.List([])
        for level, (count, filters) in enumerate(zip(CONVOLUTIONS[name], WIDTHS, strict=True)):
            for _ in range(count):
                norm = str(len(self.features) + 1)
                conv = Conv(channels, filters, 3, style=style.at(level), bias=True, norm=norm, rngs=rngs)
                self.features.append(conv)
                self.features.append(Norm(filters, style, "relu"))
                self.features.append(Identity())
                channels = filters
            self.features.append(Pool(style.strides(level)))
        self.channels = (*WIDTHS[1:], WIDTHS[-1])

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """Map ``(batch, *spatial, channels)`` to features ``(batch, *spatial / 2^i, channels_i)``, i = 1 to 5."""
        features = []
        for layer in self.features:
            if isinstance(layer, Pool):
                features.append(x)
            x = layer(x)
        return [*features[1:], x]


FAMILY = Family(
    members=tuple(CONVOLUTIONS),
    stem="features.0",
    make=VGG,
    unused=("pre_logits.", "head."),
    timm={name: (name, SYMMETRIC) for name in CONVOLUTIONS},
    feature_layers={
        "vgg16_bn": ("features.12", "features.22", "features.32", "features.42", "features.43"),
        "vgg19_bn": ("features.12", "features.25", "features.38", "features.51", "features.52"),
    },
)
