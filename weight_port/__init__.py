"""Conversion of weights from PyTorch to xdim_jax and back: timm's classifiers and the authors' released networks.

This is the only package that may import torch or timm. It imports them only when they are needed; safetensors files are
converted without them. ``python -m weight_port --help`` describes the command, and the functions of this package do the
same in Python.
"""

from weight_port.authors import NETWORKS, from_authors, to_authors
from weight_port.pypi import from_pypi, to_pypi
from weight_port.sources import Source, download, read_source
from weight_port.timm_models import from_timm, to_timm

__all__ = [
    "NETWORKS",
    "Source",
    "download",
    "from_authors",
    "from_pypi",
    "from_timm",
    "read_source",
    "to_authors",
    "to_pypi",
    "to_timm",
]
