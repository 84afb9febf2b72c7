"""The U-Net around an encoder: Omnia-Net in 2D, DX-Net in 3D, and the inner network of DS-Net."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx

from xdim_jax.base.errors import UserError
from xdim_jax.nets.encoders import make_encoder
from xdim_jax.nets.layers import (
    LEVELS,
    TORCH_GAIN,
    Conv,
    ConvTranspose,
    Depth,
    Norm,
    Style,
    check_choice,
    conv_upsampled,
    named_stage,
)

DECODER_EPS = 1e-5  # eps of every norm outside the encoder, as in the released code
ACTIVATIONS = ("relu", "silu")
UPSAMPLINGS = ("nearest", "transposed")


class ConvNorm(nnx.Module):
    """A convolution of kernel size 3 along each of the n spatial axes ("3^n convolution"), a norm and an activation."""

    def __init__(
        self,
        channels: int,
        filters: int,
        *,
        style: Style,
        activation: str,
        strides: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(channels, filters, 3, style=style, strides=strides, norm="norm", rngs=rngs)
        self.norm = Norm(filters, style, activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class UpStage(nnx.Module):
    """A decoder stage (paper, Sect. 2.1.1 and 2.2.1).

    It consists of upsampling, concatenation with the skip connection (upsampled channels first), and two `ConvNorm`.

    Args:
        channels: Number of channels of the input.
        skip: Number of channels of the skip connection; 0 if there is none.
        filters: Number of output channels.
        strides: Upsampling factor along each axis.
        upsampling: ``nearest`` or ``transposed``.
        style: Settings of all layers.
        activation: Activation after each norm.
        rngs: Random numbers of the kernels.
    """

    def __init__(
        self,
        channels: int,
        skip: int,
        filters: int,
        *,
        strides: tuple[int, ...],
        upsampling: str,
        style: Style,
        activation: str,
        rngs: nnx.Rngs,
    ):
        self.strides = strides
        self.trans = ConvTranspose(channels, channels, strides, rngs=rngs) if upsampling == "transposed" else None
        self.conv1 = ConvNorm(channels + skip, filters, style=style, activation=activation, rngs=rngs)
        self.conv2 = ConvNorm(filters, filters, style=style, activation=activation, rngs=rngs)

    def __call__(self, x: jax.Array, skip: jax.Array | None) -> jax.Array:
        x = conv_upsampled(self.conv1.conv, x, skip, self.strides, trans=self.trans)
        return self.conv2(self.conv1.norm(x))


class UNet(nnx.Module):
    """An encoder, and a decoder that combines its features from coarse to fine.

    The members are documented in `xdim_jax.nets.networks.Network`. The subclasses set the number of spatial axes; the
    recipes in configs/ set the values that distinguish the networks of the paper (docs/networks.md).

    Args:
        in_channels: Number of channels of the image.
        out_channels: Number of logits per voxel.
        encoder: ``name``, ``eps``, ``padding`` and ``drop_path``; see `xdim_jax.nets.encoders.make_encoder`.
        norm: Norm of all layers, including those of an encoder that is not a ConvNeXt: ``batch``, ``instance`` or
            ``instance_noaffine``.
        activation: Activation of the decoder and of the full-resolution block, ``relu`` or ``silu``.
        upsampling: ``nearest`` or ``transposed`` (convolution).
        filters: Number of filters of each decoder stage, coarsest first.
        full_resolution: True to put a block (convolution, norm, activation) of ``filters[-1]`` filters before the
            encoder. The output of the block is also the skip connection of the last decoder stage (paper, Fig. 2 and
            Sect. 3.2).
        deep_supervision: True to compute logits also from each of the four coarser decoder stages, by a convolution of
            kernel size 1.
        depth: Fields of `xdim_jax.nets.layers.Depth`, for 3D.
    """

    ndim: ClassVar[int]
    fixed_axes: ClassVar[int] = 0
    encoder_path: ClassVar[tuple[str, ...]] = ("encoder",)
    remat: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        encoder: Mapping[str, Any],
        norm: str,
        activation: str,
        upsampling: str,
        filters: Sequence[int],
        full_resolution: bool = True,
        deep_supervision: bool = False,
        depth: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("upsampling", upsampling, UPSAMPLINGS)
        if len(filters) != LEVELS:
            raise ValueError(f"filters={tuple(filters)}: expected {LEVELS} numbers, coarsest decoder stage first")
        if self.ndim == 2 and depth:
            raise ValueError(f"a 2D network has no depth options; got depth={dict(depth)}")
        style = Style(self.ndim, norm, DECODER_EPS, depth=Depth(**(depth or {})))
        self.level_strides = style.level_strides
        width, full = (filters[-1], filters[-1]) if full_resolution else (in_channels, 0)
        self.conv = Conv(in_channels, full, 3, style=style, norm="norm", rngs=rngs) if full else None
        self.norm = Norm(full, style, activation) if full else None
        self.encoder = make_encoder(channels=width, ndim=self.ndim, norm=norm, depth=depth, rngs=rngs, **encoder)
        *skips, width = (full, *self.encoder.channels)
        self.decoder = nnx.List([])
        for level in reversed(range(LEVELS)):
            self.decoder.append(
                UpStage(
                    width,
                    skips[level],
                    filters[LEVELS - 1 - level],
                    strides=self.level_strides[level],
                    upsampling=upsampling,
                    style=style.at(level),
                    activation=activation,
                    rngs=rngs,
                )
            )
            width = filters[LEVELS - 1 - level]
        self.last = Conv(width, out_channels, 3, style=style, bias=True, gain=TORCH_GAIN, rngs=rngs)
        coarse = filters[:-1] if deep_supervision else ()
        self.heads = nnx.List(
            [Conv(n, out_channels, 1, style=style, bias=True, gain=TORCH_GAIN, rngs=rngs) for n in coarse]
        )

    @property
    def stages(self) -> tuple[str, ...]:
        return ("encoder", *(f"decoder{i + 1}" for i in range(LEVELS)))

    @property
    def parts(self) -> tuple[str, ...]:
        return ("conv", *self.stages, "last")

    @classmethod
    def size_problems(cls, section: Mapping[str, Any], size: Sequence[int]) -> list[str]:
        level_strides = cls._level_strides(section)
        problems = side_problems(size, level_strides)
        if not problems and section["norm"] != "batch" and set(_coarsest_size(size, level_strides)) == {1}:
            problems.append(
                "the coarsest level has one voxel, but the norm needs at least two; make at least one side "
                f"{2 * max(size)}"
            )
        return problems

    @classmethod
    def check_space(cls, section: Mapping[str, Any], size: Sequence[int], devices: int) -> None:
        planes = _coarsest_size(size, cls._level_strides(section))[0]
        if planes % devices:
            step = size[0] // planes * devices
            low = max(size[0] // step, 1) * step
            raise UserError(
                f"config.mesh.space={devices} does not divide the {planes} planes at the coarsest level of "
                f"config.data.patch={tuple(size)}; make the first side {low} or {low + step}"
            )

    @classmethod
    def _level_strides(cls, section: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
        return Style(cls.ndim, depth=Depth(**(section.get("depth") or {}))).level_strides

    def features(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array | None]:
        return self._encode(image, rngs)[1:]

    def _encode(self, image: jax.Array, rngs: nnx.Rngs | None) -> list[Any]:
        """Return the output of the full-resolution block (None without it) and the five features of the encoder."""
        if problems := side_problems(image.shape[1:-1], self.level_strides):
            raise ValueError(f"an image of {image.shape[1:-1]} does not fit this network; {'; '.join(problems)}")
        encode = named_stage(self, "encoder", self.encoder)
        if self.conv is None or self.norm is None:
            return [None, *encode(image, rngs)]
        with jax.named_scope("conv"):
            x = self.norm(self.conv(image))
        return [x, *encode(x, rngs)]

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None, *, levels: bool = False) -> Any:
        """Return logits, as `Network` describes.

        Raises:
            ValueError: A side cannot be halved at every level; the message gives axis, level and nearest valid sizes.
        """
        *skips, x = self._encode(image, rngs)
        coarse = []
        for i, (decode, skip) in enumerate(zip(self.decoder, reversed(skips), strict=True)):
            x = named_stage(self, f"decoder{i + 1}", decode)(x, skip)
            if levels and i < len(self.heads):
                coarse.append(self.heads[i](x))
        with jax.named_scope("last"):
            logits = self.last(x)
        return [logits, *reversed(coarse)] if levels else logits


class OmniaNet(UNet):
    """Omnia-Net (paper, Sect. 2.1.1), and any other 2D network of the class `UNet`."""

    ndim: ClassVar[int] = 2


class DXNet(UNet):
    """DX-Net (paper, Sect. 2.2), and any other 3D network of the class `UNet`."""

    ndim: ClassVar[int] = 3


def _coarsest_size(size: Sequence[int], level_strides: Sequence[Sequence[int]]) -> list[int]:
    """Return the sides of the coarsest level."""
    return [n // math.prod(strides[i] for strides in level_strides) for i, n in enumerate(size)]


def side_problems(size: Sequence[int], level_strides: Sequence[Sequence[int]]) -> list[str]:
    """Return a sentence for each side that is not divisible at every level, with axis, level and nearest valid sizes.

    Args:
        size: Spatial sides of an image.
        level_strides: Strides along each spatial axis, for each level, finest first.
    """
    problems = []
    for i, (axis, n) in enumerate(zip("DHW"[-len(size) :], size, strict=True)):
        step, scale = 1, 1
        for strides in level_strides:
            step *= strides[i]
        for strides in level_strides:
            if n > 0 and (n // scale) % strides[i] == 0:
                scale *= strides[i]
                continue
            low, high = n // step * step, (n // step + 1) * step
            sizes = f"{low} or {high}" if low > 0 else f"{step} or {2 * step}"
            problems.append(
                f"axis {axis} is {n}: {max(n, 0) // scale} at level 1/{scale} cannot be halved; use {sizes}"
            )
            break
    return problems
