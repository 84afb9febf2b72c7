"""The networks. `build` makes one from the ``model`` section of a config."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xdim_jax.efficientnet import REDUCTION, EfficientNet
from xdim_jax.layers import TORCH_GAIN, Conv, ConvTranspose, Norm

DECODER_EPS = 1e-5  # every norm outside the encoder (spec: architecture, section 1)


class ConvNorm(nnx.Module):
    """3^n convolution, norm, activation."""

    def __init__(self, channels: int, filters: int, ndim: int, *, norm: str, activation: str, rngs: nnx.Rngs):
        self.conv = Conv(channels, filters, (3,) * ndim, rngs=rngs)
        self.norm = Norm(filters, kind=norm, eps=DECODER_EPS, activation=activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class TransposedUp(nnx.Module):
    """Decoder stage: transposed convolution x2, concatenation with the skip, two `ConvNorm` (paper, Sect. 2.2.1)."""

    def __init__(self, channels: int, skip: int, filters: int, *, ndim: int, norm: str, rngs: nnx.Rngs):
        self.trans = ConvTranspose(channels, channels, (2,) * ndim, rngs=rngs)
        self.conv1 = ConvNorm(channels + skip, filters, ndim, norm=norm, activation="silu", rngs=rngs)
        self.conv2 = ConvNorm(filters, filters, ndim, norm=norm, activation="silu", rngs=rngs)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return self.conv2(self.conv1(jnp.concatenate([self.trans(x), skip], -1)))


class DXNet(nnx.Module):
    """DX-Net: a U-Net around a 3D EfficientNet encoder (paper, Sect. 2.2.1 and Fig. 6; spec: architecture, section 4).

    A full-resolution block of 16 filters comes first and is the last skip. Norms are affine instance norms, as the
    paper says for its batch size of 1.
    DEVIATION from the released code, towards the paper: that code has BatchNorm3d everywhere (``norm="batch"``
    gives it) and is fixed to one input channel and five outputs.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        encoder: str,
        norm: str,
        eps: float,
        padding: str,
        drop_path: float,
        filters: Sequence[int],
        rngs: nnx.Rngs,
    ):
        *decoder_filters, full = filters
        self.conv = Conv(in_channels, full, (3, 3, 3), rngs=rngs)
        self.norm = Norm(full, kind=norm, eps=DECODER_EPS, activation="silu")
        self.encoder = EfficientNet(
            encoder, full, ndim=3, norm=norm, eps=eps, padding=padding, drop_path=drop_path, rngs=rngs
        )
        *skips, width = (full, *self.encoder.channels)
        self.decoder = nnx.List([])
        for skip, stage_filters in zip(reversed(skips), (*decoder_filters, full), strict=True):
            self.decoder.append(TransposedUp(width, skip, stage_filters, ndim=3, norm=norm, rngs=rngs))
            width = stage_filters
        self.last = Conv(width, out_channels, (3, 3, 3), bias=True, gain=TORCH_GAIN, rngs=rngs)

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """``(batch, D, H, W, in_channels)``, sides multiples of 32, to logits ``(batch, D, H, W, out_channels)``."""
        x = self.norm(self.conv(image))
        *skips, x = (x, *self.encoder(x, rngs))
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip)
        return self.last(x)


def _build_dxnet(config: Mapping[str, Any], rngs: nnx.Rngs) -> DXNet:
    options = {k: v for k, v in config.items() if k != "name"}
    return DXNet(**options, rngs=rngs)


NETWORKS: dict[str, Callable[[Mapping[str, Any], nnx.Rngs], nnx.Module]] = {"dxnet": _build_dxnet}


def build(config: Mapping[str, Any], *, seed: int) -> nnx.Module:
    """The network that the ``model`` section of a config describes, with random weights, in training mode.

    Raises:
        ValueError: unknown network, encoder, norm or padding.
    """
    name = config["name"]
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[name](config, nnx.Rngs(seed))


def check_patch(config: Mapping[str, Any], patch: Sequence[int]) -> None:
    """Raises ValueError, naming axis and nearest legal sizes, if the network cannot take such a patch."""
    if len(patch) != 3:
        raise ValueError(f"data.patch has {len(patch)} axes, {tuple(patch)}; {config['name']} takes 3 (D, H, W)")
    problems = []
    for axis, n in zip("DHW", patch, strict=True):
        if n <= 0 or n % REDUCTION:
            low = max(n // REDUCTION, 1) * REDUCTION
            high = low if n < low else low + REDUCTION
            problems.append(f"axis {axis} is {n}: use {low}" + (f" or {high}" if high != low else ""))
    if problems:
        raise ValueError(
            f"data.patch={tuple(patch)} does not fit {config['name']}, whose coarsest level (1/{REDUCTION}) needs "
            f"sides that are multiples of {REDUCTION}; " + "; ".join(problems)
        )
    if all(n == REDUCTION for n in patch):
        raise ValueError(
            f"data.patch={tuple(patch)} leaves one voxel at level 1/{REDUCTION}, where a norm over space has "
            f"nothing to normalise; make at least one side {2 * REDUCTION}"
        )


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
