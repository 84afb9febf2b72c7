"""The ResNet encoder (He et al. 2016) with 18, 34 and 50 layers, in 2D and 3D from the same code."""

import jax
from flax import nnx

from xdim_jax import ops
from xdim_jax.nets.encoders.family import SYMMETRIC, Family
from xdim_jax.nets.layers import Conv, DropPath, Norm, Style

REPEATS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
BOTTLENECK = {"resnet50": 4}  # ratio of the channels of a block's last and first convolution; others: no bottleneck
WIDTHS = (64, 128, 256, 512)
STEM_CHANNELS = 64


class Block(nnx.Module):
    """Two 3^n convolutions, or a bottleneck (1^n, 3^n, 1^n), where n is the number of spatial axes.

    The first 3^n convolution has the stride, as in timm. ``width`` is its number of output channels. A bottleneck has
    ``width * widening`` output channels; ``widening`` 0 means two 3^n convolutions.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        widening: int,
        strides: tuple[int, ...] | None,
        style: Style,
        drop_path: float,
        rngs: nnx.Rngs,
    ):
        filters = width * max(widening, 1)
        strided = style.at(style.level + 1) if strides else style
        if widening:
            self.conv1 = Conv(channels, width, 1, style=style, norm="bn1", rngs=rngs)
            self.conv2 = Conv(width, width, 3, style=style, strides=strides, norm="bn2", rngs=rngs)
            self.conv3 = Conv(width, filters, 1, style=strided, norm="bn3", rngs=rngs)
            self.bn3 = Norm(filters, style)
        else:
            self.conv1 = Conv(channels, width, 3, style=style, strides=strides, norm="bn1", rngs=rngs)
            self.conv2 = Conv(width, width, 3, style=strided, norm="bn2", rngs=rngs)
        self.bn1 = Norm(width, style, "relu")
        self.bn2 = Norm(width, style, "relu" if widening else None)
        self.widened = bool(widening)
        self.downsample = nnx.List([])
        if strides or channels != filters:
            self.downsample.append(Conv(channels, filters, 1, style=style, strides=strides, norm="1", rngs=rngs))
            self.downsample.append(Norm(filters, style))
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        if self.widened:
            y = self.bn3(self.conv3(y))
        for layer in self.downsample:
            x = layer(x)
        return ops.activate(x + self.drop_path(y, rngs), "relu")


class ResNet(nnx.Module):
    """ResNet with five features: the outputs of the stem and of the four stages.

    See `xdim_jax.nets.encoders.efficientnet.EfficientNet` for the arguments, with one difference: block i of n has the
    stochastic-depth rate ``drop_path * i / (n - 1)``.
    """

    def __init__(self, name: str, channels: int, *, style: Style, drop_path: float, rngs: nnx.Rngs):
        self.conv1 = Conv(channels, STEM_CHANNELS, 7, style=style, strides=style.strides(0), norm="bn1", rngs=rngs)
        self.bn1 = Norm(STEM_CHANNELS, style, "relu")
        # if the depth stride is 1, the pooling does not combine slices
        self.pool_window = style.window(3, 3 if style.depth.strides[1] > 1 else 1)
        self.pool_strides = style.strides(1)
        self.same = style.padding == "same"
        repeats, widening = REPEATS[name], BOTTLENECK.get(name, 0)
        last, built, width = max(sum(repeats) - 1, 1), 0, STEM_CHANNELS
        sizes = [STEM_CHANNELS]
        for stage, (count, filters) in enumerate(zip(repeats, WIDTHS, strict=True)):
            blocks = nnx.List([])
            for i in range(count):
                down = stage > 0 and i == 0
                block = Block(
                    width,
                    filters,
                    widening=widening,
                    strides=style.strides(stage + 1) if down else None,
                    style=style.at(stage + 1 if down else stage + 2),
                    drop_path=drop_path * built / last,
                    rngs=rngs,
                )
                blocks.append(block)
                built, width = built + 1, filters * max(widening, 1)
            setattr(self, f"layer{stage + 1}", blocks)
            sizes.append(width)
        self.channels = tuple(sizes)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """Map ``(batch, *spatial, channels)`` to features ``(batch, *spatial / 2^i, channels_i)``, i = 1 to 5."""
        x = self.bn1(self.conv1(x))
        features = [x]
        if self.same:
            padding = ops.same_padding(x.shape[1:-1], self.pool_window, self.pool_strides)
        else:
            padding = ops.symmetric_padding(self.pool_window)
        x = ops.max_pool(x, self.pool_window, self.pool_strides, padding)
        for blocks in (getattr(self, f"layer{i}") for i in range(1, 5)):
            for block in blocks:
                x = block(x, rngs)
            features.append(x)
        return features


FAMILY = Family(
    members=tuple(REPEATS),
    stem="conv1",
    make=ResNet,
    unused=("fc.",),
    timm={name: (name, SYMMETRIC) for name in REPEATS},
    feature_layers=dict.fromkeys(REPEATS, ("act1", "layer1", "layer2", "layer3", "layer4")),
)
