"""What an encoder family says about itself."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Family(NamedTuple):
    """An encoder family. The attributes of its module are named as timm's, so that a weight's path is its name there.

    Attributes:
        members: names that a config may give.
        stem: path of the convolution that meets the image.
        make: ``(name, channels, *, style, drop_path, rngs)`` to the module.
        unused: prefixes of timm's weights that no segmentation network calls (the classifier).
    """

    members: tuple[str, ...]
    stem: str
    make: Callable[..., Any]
    unused: tuple[str, ...]
