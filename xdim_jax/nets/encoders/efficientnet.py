"""The EfficientNet encoder (Tan and Le 2019), B0 to B7 and Lite0 to Lite4, in 2D and 3D from the same code.

EfficientNet-Lite has ReLU6 in place of SiLU, and no squeeze-and-excitation. Its stem has the same width, and its first
and last stage have one block, in all sizes (R. Liu, EfficientNet-Lite, TensorFlow blog, 2020).

In 3D, by default, every kernel of size k becomes k x k x k and every stride acts on all three axes; nothing else
changes (paper, Sect. 2.2.1; docs/networks.md, section EfficientNet encoder). The options of
`xdim_jax.nets.layers.Depth` change this.

Attributes have timm's names, so that the path of a layer is its name in timm. The classification head is omitted,
because no network of the paper uses it.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
from flax import nnx

from xdim_jax.nets.encoders.family import CONVENTIONS, SYMMETRIC, Family
from xdim_jax.nets.layers import Conv, DropPath, Norm, SqueezeExcite, Style


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of EfficientNet-B0 (Tan and Le 2019, Table 1).

    Attributes:
        repeats: Number of blocks.
        kernel: Size of the depthwise kernels.
        stride: Stride of the first block; the other blocks have stride 1.
        expand: Number of channels inside a block divided by the number of its input channels.
        channels: Number of output channels.
    """

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STEM_CHANNELS = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
FEATURE_STAGES = (1, 2, 4, 6)  # stages whose output is a feature; the first feature is the output of the stem


class Member(NamedTuple):
    """A member of the family.

    Attributes:
        width: Multiplier of the numbers of channels.
        depth: Multiplier of the numbers of blocks.
        lite: True for an EfficientNet-Lite.
    """

    width: float
    depth: float
    lite: bool = False


MEMBERS = {
    "b0": Member(1.0, 1.0),
    "b1": Member(1.0, 1.1),
    "b2": Member(1.1, 1.2),
    "b3": Member(1.2, 1.4),
    "b4": Member(1.4, 1.8),
    "b5": Member(1.6, 2.2),
    "b6": Member(1.8, 2.6),
    "b7": Member(2.0, 3.1),
    "lite0": Member(1.0, 1.0, lite=True),
    "lite1": Member(1.0, 1.1, lite=True),
    "lite2": Member(1.1, 1.2, lite=True),
    "lite3": Member(1.2, 1.4, lite=True),
    "lite4": Member(1.4, 1.8, lite=True),
    # small networks for tests and demonstrations
    "toy": Member(0.25, 0.3),
    "lite_toy": Member(0.25, 0.3, lite=True),
}
PREFIX = "efficientnet_"


def scaled_channels(channels: int, width: float) -> int:
    """Return ``channels * width``, rounded to a multiple of 8.

    The result is the nearest multiple, or the next higher one if the nearest is less than 90 % of the exact value.

    Args:
        channels: Number of channels of EfficientNet-B0.
        width: Width multiplier.
    """
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def scaled_stages(name: str) -> tuple[int, tuple[Stage, ...]]:
    """Return the channels of the stem and the stages of one member of the family, e.g. ``efficientnet_b0``."""
    width, depth, lite = MEMBERS[name.removeprefix(PREFIX)]
    fixed = (0, len(STAGES) - 1) if lite else ()
    stages = tuple(
        dataclasses.replace(
            s,
            channels=scaled_channels(s.channels, width),
            repeats=s.repeats if i in fixed else math.ceil(s.repeats * depth),
        )
        for i, s in enumerate(STAGES)
    )
    return STEM_CHANNELS if lite else scaled_channels(STEM_CHANNELS, width), stages


class Block(nnx.Module):
    """A depthwise-separable block (``expand`` 1) or an inverted residual block.

    It has squeeze-and-excitation and SiLU. If ``lite``, it has ReLU6 and no squeeze-and-excitation.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        *,
        kernel: int,
        strides: tuple[int, ...] | None,
        expand: int,
        lite: bool,
        style: Style,
        drop_path: float,
        rngs: nnx.Rngs,
    ):
        width = channels * expand
        self.expanded = expand != 1
        activation = _activation(lite)

        def depthwise(norm: str) -> Conv:
            return Conv(width, width, kernel, style=style, strides=strides, depthwise=True, norm=norm, rngs=rngs)

        squeeze = None if lite else SqueezeExcite(width, round(channels / 4), style, rngs=rngs)
        if self.expanded:
            self.conv_pw = Conv(channels, width, 1, style=style, norm="bn1", rngs=rngs)
            self.bn1 = Norm(width, style, activation)
            self.conv_dw = depthwise("bn2")
            self.bn2 = Norm(width, style, activation)
            self.se = squeeze
            self.conv_pwl = Conv(width, filters, 1, style=style, norm="bn3", rngs=rngs)
            self.bn3 = Norm(filters, style)
        else:
            self.conv_dw = depthwise("bn1")
            self.bn1 = Norm(width, style, activation)
            self.se = squeeze
            self.conv_pw = Conv(width, filters, 1, style=style, norm="bn2", rngs=rngs)
            self.bn2 = Norm(filters, style)
        self.residual = strides is None and channels == filters
        self.drop_path = DropPath(drop_path)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        if self.expanded:
            y = self.bn1(self.conv_pw(x))
            y = self.bn2(self.conv_dw(y))
            y = self.bn3(self.conv_pwl(y if self.se is None else self.se(y)))
        else:
            y = self.bn1(self.conv_dw(x))
            y = self.bn2(self.conv_pw(y if self.se is None else self.se(y)))
        return x + self.drop_path(y, rngs) if self.residual else y


def _activation(lite: bool) -> str:
    return "relu6" if lite else "silu"


class EfficientNet(nnx.Module):
    """EfficientNet with five features, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size of the image.

    Args:
        name: Member of the family, such as ``efficientnet_b0``; see `MEMBERS`.
        channels: Number of channels of the image.
        style: Number of axes, norm, padding and depth options.
        drop_path: Rate r of stochastic depth. Block i of n (counted from 0) has the rate ``r * i / n``.
        rngs: Random numbers of the weights.
    """

    def __init__(self, name: str, channels: int, *, style: Style, drop_path: float, rngs: nnx.Rngs):
        stem, stages = scaled_stages(name)
        lite = MEMBERS[name.removeprefix(PREFIX)].lite
        self.conv_stem = Conv(channels, stem, 3, style=style, strides=style.strides(0), norm="bn1", rngs=rngs)
        self.bn1 = Norm(stem, style, _activation(lite))
        self.channels = (stem, *(stages[i].channels for i in FEATURE_STAGES))
        total, built, width, level = sum(s.repeats for s in stages), 0, stem, 1
        self.blocks = nnx.List([])
        for stage in stages:
            blocks = nnx.List([])
            for i in range(stage.repeats):
                down = i == 0 and stage.stride == 2
                block = Block(
                    width,
                    stage.channels,
                    kernel=stage.kernel,
                    strides=style.strides(level) if down else None,
                    expand=stage.expand,
                    lite=lite,
                    style=style.at(level),
                    drop_path=drop_path * built / total,
                    rngs=rngs,
                )
                blocks.append(block)
                built, width, level = built + 1, stage.channels, level + down
            self.blocks.append(blocks)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array]:
        """Map ``(batch, *spatial, channels)`` to features ``(batch, *spatial / 2^i, channels_i)``, i = 1 to 5."""
        x = self.bn1(self.conv_stem(x))
        features = [x]
        for i, blocks in enumerate(self.blocks):
            for block in blocks:
                x = block(x, rngs)
            if i in FEATURE_STAGES:
                features.append(x)
        return features


_NAMES = tuple(f"{PREFIX}{size}" for size in MEMBERS)
_IN_TIMM = tuple(name for name in _NAMES if not name.endswith("toy"))
FAMILY = Family(
    members=_NAMES,
    stem="conv_stem",
    make=EfficientNet,
    unused=("conv_head.", "bn2.", "classifier."),
    timm={f"tf_{name}": (name, CONVENTIONS["timm"]) for name in _IN_TIMM}
    | {name: (name, SYMMETRIC) for name in _IN_TIMM},
    feature_layers=dict.fromkeys(_NAMES, ("bn1", "blocks.1", "blocks.2", "blocks.4", "blocks.6")),
)
