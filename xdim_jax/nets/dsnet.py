"""DS-Net: a 3D encoder that compresses the depth only, a 2D U-Net, and a 3D decoder (paper, Sect. 2.1.2).

See docs/networks.md, section DS-Net. The depth is the first spatial axis. Strides of 3, 2, 2 and 4 compress it to three
planes. Each of the four channels of the result becomes a 2D image with the three planes as colour channels. The images
of all samples form the batch of the inner 2D network, so any batch size is possible.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx

from xdim_jax.base.errors import UserError
from xdim_jax.nets.layers import TORCH_GAIN, Conv, ConvTranspose, Style, check_choice, conv_upsampled, named_stage
from xdim_jax.nets.unet import DECODER_EPS, ConvNorm, OmniaNet, side_problems

PLANES = 3  # planes after compression: the colour channels of an image
DEPTH_STRIDES = (3, 2, 2, 4)  # strides of the four compressions
UPSAMPLINGS = ((5, 3, 0), (2, 2, 0), (3, 2, 1), (4, 3, 1))  # kernel, stride and crop of the transposed convolutions
DECODERS = ("transposed", "nearest")


def compressed_depth(depth: int) -> int:
    """Return the number of planes after the four compressions of a depth: 3 for depths 97 to 144."""
    for stride in DEPTH_STRIDES:
        depth = -(-depth // stride)
    return depth


VALID_DEPTHS = [d for d in range(1, 1000) if compressed_depth(d) == PLANES]


class Compress(nnx.Module):
    """Two `ConvNorm`; the second has a stride along the depth."""

    def __init__(self, channels: int, filters: int, stride: int, *, style: Style, rngs: nnx.Rngs):
        self.conv1 = ConvNorm(channels, filters, style=style, activation="silu", rngs=rngs)
        self.conv2 = ConvNorm(filters, filters, style=style, activation="silu", strides=(stride, 1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(self.conv1(x))


class Expand(nnx.Module):
    """Upsampling along the depth, concatenation with the skip connection, and one or two `ConvNorm`.

    ``decoder="transposed"`` has one `ConvNorm`, ``"nearest"`` has two. The upsampled array has as many planes as the
    skip connection: the output of a transposed convolution is cropped if it has more planes, and padded with zeros
    (before the bias is added) if it has fewer. Therefore every depth that is compressed to three planes can be used,
    not only the depth of 128 of the released code.
    """

    def __init__(
        self,
        channels: int,
        skip: int,
        filters: int,
        *,
        upsampling: tuple[int, int, int],
        stride: int,
        decoder: str,
        style: Style,
        rngs: nnx.Rngs,
    ):
        kernel, step, crop = upsampling
        self.stride = stride
        geometry: dict[str, Any] = {"kernel": (kernel, 1, 1), "strides": (step, 1, 1), "crop": (crop, 0, 0)}
        self.trans = ConvTranspose(channels, channels, **geometry, rngs=rngs) if decoder == "transposed" else None
        self.conv1 = ConvNorm(channels + skip, filters, style=style, activation="silu", rngs=rngs)
        second = decoder == "nearest"
        self.conv2 = ConvNorm(filters, filters, style=style, activation="silu", rngs=rngs) if second else None

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        factors = (self.stride, 1, 1) if self.trans is None else self.trans.strides
        x = conv_upsampled(self.conv1.conv, x, skip, factors, trans=self.trans, size=skip.shape[1:-1])
        x = self.conv1.norm(x)
        return x if self.conv2 is None else self.conv2(x)


class DSNet(nnx.Module):
    """DS-Net. The members are documented in `xdim_jax.nets.networks.Network`.

    Args:
        in_channels: Number of channels of the volume.
        out_channels: Number of logits per voxel.
        filters: Number of filters of the four 3D levels, finest first.
        images: Number of 2D images per sample.
        affine: True if the 3D instance norms have a scale and a shift.
        decoder: ``transposed`` for a transposed convolution and one block per stage, as in the released code;
            ``nearest`` for nearest-neighbour upsampling and two blocks, as in the paper.
        inner: Arguments of the inner `OmniaNet`, without the numbers of channels.
        deep_supervision: True to compute logits also from each of the three coarser decoder stages, by a convolution of
            kernel size 1.
    """

    ndim: ClassVar[int] = 3
    fixed_axes: ClassVar[int] = 1
    encoder_path: ClassVar[tuple[str, ...]] = ("inner", "encoder")
    remat: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        filters: Sequence[int],
        images: int,
        affine: bool,
        decoder: str,
        inner: Mapping[str, Any],
        deep_supervision: bool = False,
        rngs: nnx.Rngs,
    ):
        check_choice("decoder", decoder, DECODERS)
        if len(filters) != len(DEPTH_STRIDES):
            raise ValueError(f"filters={tuple(filters)}: expected {len(DEPTH_STRIDES)} numbers, finest level first")
        style = Style(3, "instance" if affine else "instance_noaffine", DECODER_EPS)
        widths = (*filters, images)
        self.conv1 = ConvNorm(in_channels, filters[0], style=style, activation="silu", rngs=rngs)
        self.conv2 = ConvNorm(
            filters[0], filters[1], style=style, activation="silu", strides=(DEPTH_STRIDES[0], 1, 1), rngs=rngs
        )
        self.enc = nnx.List(
            [
                Compress(widths[i], widths[i + 1], DEPTH_STRIDES[i], style=style, rngs=rngs)
                for i in range(1, len(DEPTH_STRIDES))
            ]
        )
        self.inner = OmniaNet(in_channels=PLANES, out_channels=PLANES, rngs=rngs, **inner)
        self.dec = nnx.List([])
        width = images
        for skip, upsampling, stride in zip(reversed(filters), UPSAMPLINGS, reversed(DEPTH_STRIDES), strict=True):
            self.dec.append(
                Expand(width, skip, skip, upsampling=upsampling, stride=stride, decoder=decoder, style=style, rngs=rngs)
            )
            width = skip
        self.last = Conv(width, out_channels, 3, style=style, bias=True, gain=TORCH_GAIN, rngs=rngs)
        coarse = tuple(reversed(filters[1:])) if deep_supervision else ()
        self.heads = nnx.List(
            [Conv(n, out_channels, 1, style=style, bias=True, gain=TORCH_GAIN, rngs=rngs) for n in coarse]
        )

    def _compress(self, image: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Return the 2D images ``(batch * images, H, W, 3)`` and the four skip connections, finest first."""
        if problems := volume_problems(image.shape[1:-1], self.inner.level_strides):
            raise ValueError(f"a volume of {image.shape[1:-1]} does not fit DS-Net; {'; '.join(problems)}")
        with jax.named_scope("conv1"):
            x = self.conv1(image)
        skips = [x]
        for name, block in zip(("conv2", "enc3", "enc4", "enc5"), (self.conv2, *self.enc), strict=True):
            x = named_stage(self, name, block)(x)
            skips.append(x)
        x = skips.pop()
        batch, planes, height, width, images = x.shape
        # (B, D, H, W, C) -> (B, C, H, W, D) -> (B C, H, W, D): channels become samples, planes become colours
        return x.transpose(0, 4, 2, 3, 1).reshape(batch * images, height, width, planes), skips

    @property
    def stages(self) -> tuple[str, ...]:
        own = ("conv2", "enc3", "enc4", "enc5", "inner", "dec1", "dec2", "dec3", "dec4")
        return (*own, *(f"inner.{name}" for name in self.inner.stages))

    @property
    def parts(self) -> tuple[str, ...]:
        own = [name for name in self.stages if not name.startswith("inner")]
        inner = [f"inner.{name}" for name in self.inner.parts]
        return ("conv1", *own[:4], *inner, *own[4:], "last")

    @classmethod
    def size_problems(cls, section: Mapping[str, Any], size: Sequence[int]) -> list[str]:
        problems = volume_problems(size, Style(2).level_strides)
        return problems or OmniaNet.size_problems(section["inner"], size[1:])

    @classmethod
    def check_space(cls, section: Mapping[str, Any], size: Sequence[int], devices: int) -> None:
        raise UserError(
            f"config.mesh.space={devices}: DS-Net converts the depth to colour channels, so the depth cannot be "
            "divided among devices; give --config.mesh.space=1 to divide the batch instead"
        )

    def features(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array | None]:
        """Return the five features of the 2D encoder, ``(batch * images, H / 2^i, W / 2^i, channels)``."""
        return self.inner.features(self._compress(image)[0], rngs)

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None, *, levels: bool = False) -> Any:
        """Return logits, as `Network` describes.

        Raises:
            ValueError: The depth is not between 97 and 144, or H or W is not a multiple of 32.
        """
        images, skips = self._compress(image)
        y = named_stage(self, "inner", self.inner)(images, rngs)
        # (B C, H, W, D) -> (B, C, H, W, D) -> (B, D, H, W, C)
        x = y.reshape(image.shape[0], -1, *y.shape[1:]).transpose(0, 4, 2, 3, 1)
        coarse = []
        for i, (expand, skip) in enumerate(zip(self.dec, reversed(skips), strict=True)):
            x = named_stage(self, f"dec{i + 1}", expand)(x, skip)
            if levels and i < len(self.heads):
                coarse.append(self.heads[i](x))
        with jax.named_scope("last"):
            logits = self.last(x)
        return [logits, *reversed(coarse)] if levels else logits


def volume_problems(size: Sequence[int], level_strides: Sequence[Sequence[int]]) -> list[str]:
    """Return a sentence for each side that DS-Net cannot process, with the axis, the level and the valid sizes.

    Args:
        size: Depth, height and width of a volume.
        level_strides: Strides of the inner network along height and width, for each level, finest first.
    """
    depth, *plane = size
    problems = []
    if depth not in VALID_DEPTHS:
        low, high = VALID_DEPTHS[0], VALID_DEPTHS[-1]
        near = f"{low} or {low + 1}" if depth < low else f"{high} or {high - 1}"
        problems.append(
            f"axis D is {depth}: compressed by {math.prod(DEPTH_STRIDES)}, it would have "
            f"{compressed_depth(max(depth, 0))} planes, not {PLANES}; use {low} to {high}, for example {near}"
        )
    return problems + side_problems(plane, level_strides)
