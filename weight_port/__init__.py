"""Weights from PyTorch to xdim_jax and back: timm's classifiers and the authors' released networks.

The only place that may import torch or timm, and it does so late: safetensors files are ported without either. The
command is ``python -m weight_port --help``; the functions below are the same in Python.
"""

from weight_port.authors import NETWORKS, from_authors, to_authors
from weight_port.sources import Source, download, read_source
from weight_port.timm_models import from_timm, to_timm

__all__ = ["NETWORKS", "Source", "download", "from_authors", "from_timm", "read_source", "to_authors", "to_timm"]
