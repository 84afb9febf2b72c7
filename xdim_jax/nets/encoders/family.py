"""The description of an encoder family, and the padding and eps with which pre-trained weights were trained."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# padding and eps with which weights were trained: those of timm's ``tf_*`` models, and those of the authors' networks
CONVENTIONS: dict[str, dict[str, Any]] = {
    "timm": {"padding": "same", "eps": 1e-3},
    "authors": {"padding": "symmetric", "eps": 1e-5},
}
SYMMETRIC = CONVENTIONS["authors"]  # also the convention of timm's models that were not trained in TensorFlow


class Family(NamedTuple):
    """An encoder family. The attributes of its module have timm's names, so the path of a layer is its name in timm.

    Attributes:
        members: Names of the encoders of the family, for configs.
        stem: Path of the first convolution.
        make: Function ``(name, channels, *, style, drop_path, rngs)`` that builds the module.
        unused: Prefixes of timm's names of those weights that no segmentation network uses (the classifier).
        timm: For each name of an architecture in timm: the name of the member, and the padding and eps with which
            its weights were trained.
        feature_layers: For each member: the layers of timm's model whose outputs are the five features; None for a
            level without a feature.
    """

    members: tuple[str, ...]
    stem: str
    make: Callable[..., Any]
    unused: tuple[str, ...]
    timm: Mapping[str, tuple[str, Mapping[str, Any]]]
    feature_layers: Mapping[str, tuple[str | None, ...]]
