"""The ConvNeXt-Tiny encoder (Liu et al. 2022), in 2D and 3D from the same code.

Its weights were trained with eps 1e-6.
"""

import jax
from flax import nnx

from xdim_jax import ops
from xdim_jax.nets.encoders.family import SYMMETRIC, Family
from xdim_jax.nets.layers import Conv, Dense, DropPath, LayerNorm, Style, constant

REPEATS = {"convnext_tiny": (3, 3, 9, 3)}
WIDTHS = (96, 192, 384, 768)
LAYER_SCALE = 1e-6  # initial value of the factors that scale the channels of a block's output


class Mlp(nnx.Module):
    """Two affine maps of the channels, with a GELU between them."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.fc1 = Dense(channels, 4 * channels, rngs=rngs)
        self.fc2 = Dense(4 * channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ops.activate(self.fc1(x), "gelu"))


class Block(nnx.Module):
    """A residual block: a depthwise convolution of size 7 along each axis, layer norm, MLP, a factor per channel."""

    def __init__(self, channels: int, *, style: Style, drop_path: float, rngs: nnx.Rngs):
        self.conv_dw = Conv(channels, channels, 7, style=style, depthwise=True, bias=True, norm="norm", rngs=rngs)
        self.norm = LayerNorm(channels, style.eps)
        self.mlp = Mlp(channels, rngs)
        self.gamma = nnx.Param(constant(LAYER_SCALE, channels))
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return x + self.drop_path(self.mlp(self.norm(self.conv_dw(x))) * self.gamma[...].astype(x.dtype), rngs)


class Stage(nnx.Module):
    """A layer norm and a convolution as long as its strides (not in the first stage), then the blocks."""

    def __init__(
        self,
        channels: int,
        filters: int,
        *,
        strides: tuple[int, ...] | None,
        style: Style,
        drop_paths: list[float],
        rngs: nnx.Rngs,
    ):
        self.downsample = nnx.List([])
        if strides:
            conv = Conv(channels, filters, strides, style=style, strides=strides, padding="valid", bias=True, rngs=rngs)
            self.downsample.append(LayerNorm(channels, style.eps))
            self.downsample.append(conv)
            style = style.at(style.level + 1)
        self.blocks = nnx.List([Block(filters, style=style, drop_path=rate, rngs=rngs) for rate in drop_paths])

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        for layer in self.downsample:
            x = layer(x)
        for block in self.blocks:
            x = block(x, rngs)
        return x


class ConvNeXt(nnx.Module):
    """ConvNeXt with four features, at 1/4 to 1/32. There is none at 1/2, because the stem has stride 4.

    See `xdim_jax.nets.encoders.efficientnet.EfficientNet` for the arguments. There are two differences: block i of n
    has the stochastic-depth rate ``drop_path * i / (n - 1)``, and all norms are layer norms for any ``style.norm``. The
    kernels of the stem and of the other strided convolutions are as long as their strides, also along the depth.
    """

    def __init__(self, name: str, channels: int, *, style: Style, drop_path: float, rngs: nnx.Rngs):
        strides = tuple(a * b for a, b in zip(style.strides(0), style.strides(1), strict=True))
        stem = Conv(
            channels, WIDTHS[0], strides, style=style, strides=strides, padding="valid", bias=True, norm="1", rngs=rngs
        )
        self.stem = nnx.List([stem, LayerNorm(WIDTHS[0], style.eps)])
        repeats = REPEATS[name]
        last, built, width = max(sum(repeats) - 1, 1), 0, WIDTHS[0]
        self.stages = nnx.List([])
        for i, (count, filters) in enumerate(zip(repeats, WIDTHS, strict=True)):
            self.stages.append(
                Stage(
                    width,
                    filters,
                    strides=style.strides(i + 1) if i else None,
                    style=style.at(i + 1 if i else 2),
                    drop_paths=[drop_path * (built + j) / last for j in range(count)],
                    rngs=rngs,
                )
            )
            built, width = built + count, filters
        self.channels = (0, *WIDTHS)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array | None]:
        """Map ``(batch, *spatial, channels)`` to None, then ``(batch, *spatial / 2^i, channels_i)`` for i = 2 to 5."""
        conv, norm = self.stem
        x = norm(conv(x))
        features: list[jax.Array | None] = [None]
        for stage in self.stages:
            x = stage(x, rngs)
            features.append(x)
        return features


FAMILY = Family(
    members=tuple(REPEATS),
    stem="stem.0",
    make=ConvNeXt,
    unused=("head.",),
    timm={name: (name, {**SYMMETRIC, "eps": 1e-6}) for name in REPEATS},
    feature_layers=dict.fromkeys(REPEATS, (None, "stages.0", "stages.1", "stages.2", "stages.3")),
)
