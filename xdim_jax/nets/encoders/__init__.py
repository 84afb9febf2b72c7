"""The encoders: image classifiers that return features at five scales, each in 2D and 3D from the same code.

An encoder family is one file with an ``nnx.Module`` and a `Family`. The constructor of the module takes ``(name,
channels, *, style, drop_path, rngs)``. The attribute ``channels`` of the module has the number of channels of each
feature (0 for a level without a feature). The module maps an image ``(batch, *spatial, channels)`` to a list of five
features with 1/2, 1/4, 1/8, 1/16 and 1/32 of the spatial size (None for a level without a feature).
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
    """Return the family of an encoder.

    Raises:
        ValueError: The name is unknown; the message lists the known names.
    """
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
    """Build a randomly initialised encoder, in training mode.

    Args:
        name: A key of `ENCODERS`.
        channels: Number of channels of the image.
        ndim: Number of spatial axes, 2 or 3.
        norm: ``batch``, ``instance`` or ``instance_noaffine``. ConvNeXt always has layer norms.
        eps: eps of every norm; see `CONVENTIONS` for the two values with which EfficientNets were trained.
        padding: ``symmetric`` or ``same``; see `CONVENTIONS`.
        drop_path: Rate of stochastic depth; see docs/networks.md for the rate of each block.
        depth: Fields of `xdim_jax.nets.layers.Depth`, for 3D; None for the defaults.
        rngs: Random numbers of the weights.

    Raises:
        ValueError: The name, norm, padding or a depth option is unknown.
    """
    style = Style(ndim, norm, eps, padding, Depth(**(depth or {})))
    return get_family(name).make(name, channels, style=style, drop_path=drop_path, rngs=rngs)
