"""The encoders: 2D image classifiers, each in 2D and 3D from one code, that give features at five scales.

A family is one file with a module and a `Family`. The module takes ``(name, channels, style, drop_path, rngs)``, has
``channels`` (of the five features, 0 where there is none) and is called with an image ``(batch, *spatial, channels)``;
it returns five features at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's size, None where there is none.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from xdim_jax.nets.encoders import convnext, efficientnet, resnet, vgg
from xdim_jax.nets.encoders.family import CONVENTIONS, Family
from xdim_jax.nets.layers import Depth, Style

FAMILIES: tuple[Family, ...] = (efficientnet.FAMILY, resnet.FAMILY, vgg.FAMILY, convnext.FAMILY)
__all__ = ["CONVENTIONS", "ENCODERS", "FAMILIES", "Family", "get_family", "make_encoder"]

ENCODERS: dict[str, Family] = {name: family for family in FAMILIES for name in family.members}


def get_family(name: str) -> Family:
    """The family of an encoder. Raises ValueError, listing the known ones, for an unknown name."""
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")
    return ENCODERS[name]


def make_encoder(
    name: str,
    channels: int,
    *,
    ndim: int = 2,
    norm: str = "batch",
    eps: float = 1e-5,
    padding: str = "symmetric",
    drop_path: float = 0.0,
    depth: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs,
) -> Any:
    """An encoder with random weights, in training mode.

    Args:
        name: see `ENCODERS`.
        channels: of the image.
        ndim: spatial axes, 2 or 3.
        norm: ``batch``, ``instance`` or ``instance_noaffine``; the layer norms of ConvNeXt stay what they are.
        eps: of every norm; see `CONVENTIONS` for the two that EfficientNets were trained with.
        padding: ``symmetric`` or ``same``; see `CONVENTIONS`.
        drop_path: largest rate of stochastic depth.
        depth: fields of `xdim_jax.nets.layers.Depth`, for 3D.

    Raises:
        ValueError: unknown name, norm, padding or depth option.
    """
    style = Style(ndim, norm, eps, padding, Depth(**(depth or {})))
    return get_family(name).make(name, channels, style=style, drop_path=drop_path, rngs=rngs)
