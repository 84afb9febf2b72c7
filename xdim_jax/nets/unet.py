"""The U-Net around an encoder: Omnia-Net in 2D, DX-Net in 3D, and the inner network of DS-Net."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

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
    stage,
)

DECODER_EPS = 1e-5  # every norm outside the encoder (spec: architecture, section 1)
ACTIVATIONS = ("relu", "silu")
UPSAMPLINGS = ("nearest", "transposed")


class ConvNorm(nnx.Module):
    """3^n convolution, norm, activation."""

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
    """Decoder stage: upsampling, concatenation [upsampled, skip], two `ConvNorm` (paper, Sect. 2.1.1 and 2.2.1)."""

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
    """An encoder, and a decoder that joins its features from coarse to fine.

    With ``full_resolution`` a block of ``filters[-1]`` filters comes before the encoder and is the last skip (paper,
    Fig. 2 and Sect. 3.2). The values that make it each of the paper's networks are in `xdim_jax.nets.networks`.

    Args:
        ndim: spatial axes, 2 or 3.
        in_channels: of the image.
        out_channels: logits per voxel.
        encoder: ``name``, ``eps``, ``padding``, ``drop_path``; see `xdim_jax.nets.encoders.make_encoder`.
        norm: of all layers, encoder included: ``batch``, ``instance`` or ``instance_noaffine``.
        activation: of the decoder and the first block, ``relu`` or ``silu``.
        upsampling: ``nearest`` or ``transposed`` (convolution).
        filters: of the decoder stages, coarsest first.
        full_resolution: see above.
        deep_supervision: 1^n convolutions to logits on the four coarser decoder stages.
        depth: fields of `xdim_jax.nets.layers.Depth`, for 3D.
    """

    def __init__(
        self,
        *,
        ndim: int,
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
        if ndim == 2 and depth:
            raise ValueError(f"a 2D network has no depth options; got depth={dict(depth)}")
        style = Style(ndim, norm, DECODER_EPS, depth=Depth(**(depth or {})))
        self.level_strides = tuple(style.strides(level) for level in range(LEVELS))
        width, full = (filters[-1], filters[-1]) if full_resolution else (in_channels, 0)
        self.conv = Conv(in_channels, full, 3, style=style, norm="norm", rngs=rngs) if full else None
        self.norm = Norm(full, style, activation) if full else None
        self.encoder = make_encoder(channels=width, ndim=ndim, norm=norm, depth=depth, rngs=rngs, **encoder)
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
                    style=style,
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
        """Names of the parts whose activations can be computed again (see `xdim_jax.nets.layers.stage`)."""
        return ("encoder", *(f"decoder{i + 1}" for i in range(LEVELS)))

    @property
    def parts(self) -> tuple[str, ...]:
        """Names that operations have in profiles: the stages, and what lies before and behind them."""
        return ("conv", *self.stages, "last")

    def features(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array | None]:
        """The encoder's five features of an image, finest first."""
        return self._encode(image, rngs)[1:]

    def _encode(self, image: jax.Array, rngs: nnx.Rngs | None) -> list[Any]:
        """The full-resolution feature (or None), and the encoder's five."""
        if problems := side_problems(image.shape[1:-1], self.level_strides):
            raise ValueError(f"an image of {image.shape[1:-1]} does not fit this network; {'; '.join(problems)}")
        encode = stage(self, "encoder", self.encoder)
        if self.conv is None or self.norm is None:
            return [None, *encode(image, rngs)]
        with jax.named_scope("conv"):
            x = self.norm(self.conv(image))
        return [x, *encode(x, rngs)]

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None, *, levels: bool = False) -> Any:
        """``(batch, *spatial, in_channels)`` to logits ``(batch, *spatial, out_channels)``.

        With ``levels``, a list: the logits, then those of the deep-supervision heads from fine to coarse.

        Raises:
            ValueError: a side cannot be halved often enough; names level, axis and the nearest sizes that can.
        """
        *skips, x = self._encode(image, rngs)
        coarse = []
        for i, (decode, skip) in enumerate(zip(self.decoder, reversed(skips), strict=True)):
            x = stage(self, f"decoder{i + 1}", decode)(x, skip)
            if levels and i < len(self.heads):
                coarse.append(self.heads[i](x))
        with jax.named_scope("last"):
            logits = self.last(x)
        return [logits, *reversed(coarse)] if levels else logits


def side_problems(size: Sequence[int], level_strides: Sequence[Sequence[int]]) -> list[str]:
    """Per side that does not divide at every level: axis, level, and the nearest sizes that do."""
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
                f"axis {axis} is {n}: level 1/{scale * strides[i]} would halve {max(n, 0) // scale}; use {sizes}"
            )
            break
    return problems
