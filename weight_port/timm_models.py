"""timm's classifiers as encoders: their names, how they were trained, and the way back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weight_port.names import export_state, import_state
from weight_port.sources import Source, download, import_timm, read_source
from xdim_jax.base.errors import UserError
from xdim_jax.nets.encoders import FAMILIES, get_family
from xdim_jax.nets.weights import Weights, abstract_encoder

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
# how the images of a training were normalised; other tags are asked of timm where it is installed
INPUTS = {"ns_jft_in1k": IMAGENET, "aa_in1k": IMAGENET, "in1k": IMAGENET, "ra_in1k": IMAGENET, "ap_in1k": HALF}

# timm's architecture to our encoder, and the padding and eps of its training
ARCHITECTURES = {name: known for family in FAMILIES for name, known in family.timm.items()}


class TimmName(NamedTuple):
    """``tf_efficientnet_b0.ns_jft_in1k``: architecture and tag (empty where none was given)."""

    architecture: str
    tag: str

    @property
    def full(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def parse_name(name: str) -> TimmName:
    """A timm model name, today's or the older ``tf_efficientnet_b0_ns``.

    Raises:
        UserError: an architecture that has no encoder here; lists the known ones.
    """
    architecture, _, tag = name.partition(".")
    if old := re.fullmatch(r"(tf_efficientnet_b\d)_(ns|ap)", architecture):
        architecture, tag = old[1], {"ns": "ns_jft_in1k", "ap": "ap_in1k"}[old[2]]
    if architecture not in ARCHITECTURES:
        raise UserError(f"--model: unknown model {name!r}; known: {', '.join(ARCHITECTURES)}, each with timm's tag")
    return TimmName(architecture, tag)


def from_timm(model: str, from_file: Path | None = None) -> Weights:
    """A timm classifier's weights as those of an encoder.

    Args:
        model: timm's name, e.g. ``tf_efficientnet_b0.ns_jft_in1k``.
        from_file: safetensors or .pth; default: the hub.

    Raises:
        UserError: unknown model, unreadable file, or weights of another architecture.
    """
    name = parse_name(model)
    return convert(read_source(from_file or fetch(name)), name)


def fetch(name: TimmName) -> Path:
    """The model's file from the hub. Raises UserError where no tag says which training, or the hub is out of reach."""
    if not name.tag:
        raise UserError(
            f"--model={name.full}: which training? Add timm's tag, e.g. {name.architecture}.ns_jft_in1k, or --from-file"
        )
    return download(f"timm/{name.full}")


def convert(source: Source, name: TimmName) -> Weights:
    """What `from_timm` does, on arrays that are read already."""
    encoder, convention = ARCHITECTURES[name.architecture]
    family = get_family(encoder)
    stem = source.state.get(f"{family.stem}.weight")
    channels = 3 if stem is None or stem.ndim != 4 else int(stem.shape[1])
    section = {"name": encoder, "in_channels": channels, "ndim": 2, "norm": "batch", **convention}
    what = f"the weights of {source.record['file']} (as --model={name.full})"
    hint = "Is the file of another model? Name the one that it is of: --model=<timm's name>"
    arrays, unused = import_state(source.state, abstract_encoder(section), _same, family.unused, what, hint)
    record = {"from": "timm", "model": name.full, **source.record, "input": _input_of(name)}
    return Weights("encoder", section, arrays, unused, record)


def _same(path: str) -> str:
    return path  # attributes here are named as timm's


def _input_of(name: TimmName) -> dict[str, list[float]] | None:
    if name.tag in INPUTS:
        return INPUTS[name.tag]
    timm = import_timm()
    config = timm.get_pretrained_cfg(name.full) if timm and name.tag else None
    return {"mean": list(config.mean), "std": list(config.std)} if config else None


def to_timm(weights: Weights) -> dict[str, np.ndarray]:
    """An encoder's weights as timm names and lays them out; the classifier is there if they came from timm.

    Raises:
        UserError: not a 2D encoder with batch norm, or one that no architecture of timm computes like.
    """
    if weights.kind != "encoder" or weights.model["ndim"] != 2 or weights.model["norm"] != "batch":
        raise UserError(
            f"timm has 2D encoders with batch norm; these weights are: {weights.kind}, {_told(weights.model)}. "
            "Of a network, port the encoder first: --source=xdim --part=encoder"
        )
    if not matching(weights.model):
        raise UserError(
            f"no architecture of timm computes as this encoder does: {_told(weights.model)}; known: "
            + ", ".join(f"{a} ({_told({'name': e, **c})})" for a, (e, c) in ARCHITECTURES.items())
        )
    unused = weights.unused if weights.source.get("from") == "timm" else {}
    return export_state(weights.arrays, unused, abstract_encoder(weights.model), _same)


def matching(section: Mapping[str, Any]) -> list[str]:
    """timm's architectures with this encoder, padding and eps."""
    return [
        architecture
        for architecture, (encoder, convention) in ARCHITECTURES.items()
        if encoder == section["name"] and all(section[k] == v for k, v in convention.items())
    ]


def _told(section: Mapping[str, Any]) -> str:
    keys = ("name", "ndim", "norm", "padding", "eps")
    return ", ".join(f"{section[k]}" if k == "name" else f"{k} {section[k]}" for k in keys if k in section)
