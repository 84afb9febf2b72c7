"""The description of an encoder family, and the conventions of the trainings that weights come from."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# padding and eps of the trainings: TensorFlow's EfficientNets in timm (``tf_*``), and the files of the authors
CONVENTIONS: dict[str, dict[str, Any]] = {
    "timm": {"padding": "same", "eps": 1e-3},
    "authors": {"padding": "symmetric", "eps": 1e-5},
}
SYMMETRIC = CONVENTIONS["authors"]  # also the convention of timm's models that were not trained in TensorFlow


class Family(NamedTuple):
    """An encoder family. The attributes of its module have timm's names, so the path of a weight is its name in timm.

    Attributes:
        members: Names that a config may give.
        stem: Path of the first convolution.
        make: Function ``(name, channels, *, style, drop_path, rngs)`` that builds the module.
        unused: Prefixes of timm's weights that no segmentation network uses (the classifier).
        timm: timm's architectures, each with the member that it is and the padding and eps of its training.
        taps: For each member, the layers of timm's model whose outputs are the five features; None for a level
            without a feature.
    """

    members: tuple[str, ...]
    stem: str
    make: Callable[..., Any]
    unused: tuple[str, ...]
    timm: Mapping[str, tuple[str, Mapping[str, Any]]]
    taps: Mapping[str, tuple[str | None, ...]]
