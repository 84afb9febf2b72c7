"""Conversion of timm's classifiers to encoders and back."""

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weight_port.names import export_state, import_state
from weight_port.sources import Source, download, import_timm, read_source
from xdim_jax.base.errors import UserError
from xdim_jax.nets.encoders import FAMILIES, get_family
from xdim_jax.nets.weights import Weights, abstract_encoder, has_batch_norm

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
# pattern of model names -> normalisation of the images in training; the first pattern that matches applies. For other
# names, the values are read from timm
INPUTS = {
    "tf_efficientnet_lite*": HALF,
    "*.ap_in1k": HALF,
    **dict.fromkeys(("*.ns_jft_in1k", "*.aa_in1k", "*.in1k", "*.ra_in1k"), IMAGENET),
}

# name of the timm architecture -> name of the encoder, and the padding and eps with which it was trained
ARCHITECTURES = {name: known for family in FAMILIES for name, known in family.timm.items()}


class TimmName(NamedTuple):
    """A name such as ``tf_efficientnet_b0.ns_jft_in1k``.

    Attributes:
        architecture: Part before the dot.
        tag: Part after the dot, which identifies the training; may be empty.
    """

    architecture: str
    tag: str

    @property
    def full(self) -> str:
        """The name with the tag, if there is one."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def parse_name(name: str) -> TimmName:
    """Split the name of a timm model. Older names such as ``tf_efficientnet_b0_ns`` are also accepted.

    Raises:
        UserError: This package has no encoder of the architecture; the message lists the known ones.
    """
    architecture, _, tag = name.partition(".")
    if old := re.fullmatch(r"(tf_efficientnet_b\d)_(ns|ap)", architecture):
        architecture, tag = old[1], {"ns": "ns_jft_in1k", "ap": "ap_in1k"}[old[2]]
    if architecture not in ARCHITECTURES:
        raise UserError(f"--model: unknown model {name!r}; known: {', '.join(ARCHITECTURES)}, each with a tag of timm")
    return TimmName(architecture, tag)


def from_timm(model: str, from_file: Path | None = None) -> Weights:
    """Convert the weights of a classifier of timm to weights of an encoder.

    Args:
        model: Name of the model in timm, e.g. ``tf_efficientnet_b0.ns_jft_in1k``.
        from_file: File of type .safetensors or .pth; None to download it from the Hugging Face hub.

    Raises:
        UserError: The model is unknown, the file cannot be read, or the weights belong to another architecture.
    """
    name = parse_name(model)
    return convert(read_source(from_file or fetch(name)), name)


def fetch(name: TimmName) -> Path:
    """Return the path of a model's file from the hub.

    Raises:
        UserError: The name has no tag, which identifies the training, or the download fails.
    """
    if not name.tag:
        raise UserError(
            f"--model={name.full} has no tag, which identifies the weights: add the tag of timm (as in "
            "tf_efficientnet_b0.ns_jft_in1k; timm.list_pretrained lists the tags of a model), or give --from-file"
        )
    return download(f"timm/{name.full}")


def convert(source: Source, name: TimmName) -> Weights:
    """Convert the arrays of a file that has already been read; see `from_timm`."""
    encoder, convention = ARCHITECTURES[name.architecture]
    family = get_family(encoder)
    stem = source.state.get(f"{family.stem}.weight")
    channels = 3 if stem is None or stem.ndim != 4 else int(stem.shape[1])
    section = {"name": encoder, "in_channels": channels, "ndim": 2, "norm": "batch", **convention}
    what = f"the weights of {source.record['file']} (as --model={name.full})"
    hint = "If the file contains another model, give its name: --model=<timm's name>"
    arrays, unused = import_state(source.state, abstract_encoder(section), _same_name, family.unused, what, hint)
    record = {"from": "timm", "model": name.full, **source.record, "input": input_normalisation(name)}
    return Weights("encoder", section, arrays, unused, record)


def _same_name(path: str) -> str:
    return path  # the attributes of the encoders have timm's names


def input_normalisation(name: TimmName) -> dict[str, list[float]] | None:
    """Return the mean and the standard deviation of images in training; None if they are not known."""
    for pattern, values in INPUTS.items():
        if fnmatch.fnmatchcase(name.full, pattern):
            return values
    timm = import_timm()
    try:
        config = timm.get_pretrained_cfg(name.full) if timm and name.tag else None
    except RuntimeError:  # timm does not know the tag, e.g. of the user's own weights
        return None
    return {"mean": list(config.mean), "std": list(config.std)} if config else None


def to_timm(weights: Weights) -> dict[str, np.ndarray]:
    """Convert the weights of an encoder to a state_dict of timm.

    If the weights were converted from timm, the state_dict includes the classifier.

    Raises:
        UserError: The encoder is not 2D or has no batch norm, or timm has no architecture with the same padding and
            eps.
    """
    other_norm = weights.kind == "encoder" and weights.model["norm"] != "batch" and _batch_norm_in_timm(weights.model)
    if weights.kind != "encoder" or weights.model["ndim"] != 2 or other_norm:
        raise UserError(
            f"expected weights of a 2D encoder with batch norm, found: {weights.kind}, {_properties(weights.model)}. "
            "Convert the encoder of a network first: --source=xdim --part=encoder"
        )
    if not matching_architectures(weights.model):
        raise UserError(
            f"no architecture of timm has these properties: {_properties(weights.model)}; known: "
            + ", ".join(f"{a} ({_properties({'name': e, **c})})" for a, (e, c) in ARCHITECTURES.items())
        )
    unused = weights.unused if weights.source.get("from") == "timm" else {}
    return export_state(weights.arrays, unused, abstract_encoder(weights.model), _same_name)


def _batch_norm_in_timm(section: Mapping[str, Any]) -> bool:
    """Return whether timm's encoder has batch norms; ConvNeXt has layer norms."""
    return has_batch_norm({**section, "norm": "batch"})


def matching_architectures(section: Mapping[str, Any]) -> list[str]:
    """Return timm's architectures with the encoder, padding and eps of a section (see `Weights.model`)."""
    return [
        architecture
        for architecture, (encoder, convention) in ARCHITECTURES.items()
        if encoder == section["name"] and all(section[k] == v for k, v in convention.items())
    ]


def _properties(section: Mapping[str, Any]) -> str:
    keys = ("name", "ndim", "norm", "padding", "eps")
    return ", ".join(f"{section[k]}" if k == "name" else f"{k} {section[k]}" for k in keys if k in section)
