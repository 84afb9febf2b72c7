"""Conversion of the authors' released networks to this package and back.

docs/networks.md describes the authors' code. Their networks contain a classification head that is never used. Its
arrays are kept under ``unused/``. The reverse conversion writes these arrays, because ``load_state_dict`` expects them.
If they were not kept, it writes a kernel of zeros and an identity norm.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weight_port.names import export_state, import_state
from weight_port.sources import Source, read_source
from xdim_jax.base.errors import UserError
from xdim_jax.nets import networks
from xdim_jax.nets.encoders import CONVENTIONS
from xdim_jax.nets.encoders.efficientnet import MEMBERS, scaled_channels
from xdim_jax.nets.weights import Weights, abstract_encoder, encoder_section, flatten_model

HEAD = 1280  # filters of the classification head of EfficientNet-B0; other sizes except Lite multiply it by their width
_DEPTH = {"axis": 0, "padding": "zero", "squeeze": "volume", "strides": (2, 2, 2, 2, 2)}
_DROP_PATH = 0.4  # rate of stochastic depth of every released network


def _encoder(size: str) -> dict[str, Any]:
    return {"name": f"efficientnet_{size}", **CONVENTIONS["authors"], "drop_path": _DROP_PATH}


def _unet(name: str, size: str, activation: str, upsampling: str, **extra: Any) -> dict[str, Any]:
    return {
        "name": name,
        "activation": activation,
        "upsampling": upsampling,
        "deep_supervision": False,
        "encoder": _encoder(size),
        **extra,
    }


# the released networks; numbers of channels and filters and the kind of norm are read from the file
NETWORKS: dict[str, dict[str, Any]] = {
    "encoder-b0": {"name": "efficientnet_b0", "ndim": 2, **CONVENTIONS["authors"]},
    "encoder-b4": {"name": "efficientnet_b4", "ndim": 2, **CONVENTIONS["authors"]},
    "encoder3d-b0": {"name": "efficientnet_b0", "ndim": 3, **CONVENTIONS["authors"], "depth": _DEPTH},
    "omnianet-b0": _unet("omnianet", "b0", "relu", "nearest"),
    "omnianet-b4": _unet("omnianet", "b4", "relu", "nearest"),
    "dxnet": _unet("dxnet", "b0", "silu", "transposed", depth=_DEPTH),
    "dsnet": {
        "name": "dsnet",
        "decoder": "transposed",
        "affine": False,
        "deep_supervision": False,
        "inner": {
            "activation": "silu",
            "upsampling": "transposed",
            "full_resolution": False,
            "encoder": _encoder("b0"),
        },
    },
}

_ENCODER_NAMES = ((r"^conv_stem\b", "conv1"), (r"^bn1\b", "bnorm1"), (r"^blocks\.(\d+)\.", r"enc\1."))
_UNET_NAMES = ((r"^decoder\.(\d+)\.", lambda m: f"decoder{int(m[1]) + 1}."),)
_DSNET_NAMES = (
    (r"^conv([12])\.conv$", r"conv\1"),
    (r"^conv([12])\.norm$", r"norm\1"),
    (r"^enc\.(\d+)\.conv1\.(conv|norm)$", lambda m: f"enc{int(m[1]) + 3}.0.{m[2]}"),
    (r"^enc\.(\d+)\.conv2\.(conv|norm)$", lambda m: f"enc{int(m[1]) + 3}.0.{m[2]}2"),
    (r"^dec\.(\d+)\.", lambda m: f"dec{int(m[1]) + 1}."),
)


def rename_encoder(path: str) -> str:
    """Return the authors' name of a layer of the encoder, such as ``enc3.0.conv_dw`` for ``blocks.3.0.conv_dw``."""
    return _substituted(path, _ENCODER_NAMES)


def rename_unet(path: str) -> str:
    """Return the authors' name of a layer of a U-Net, such as ``decoder1.conv1.conv`` for ``decoder.0.conv1.conv``."""
    if path.startswith("encoder."):
        return "encoder." + rename_encoder(path.removeprefix("encoder."))
    return _substituted(path, _UNET_NAMES)


def rename_dsnet(path: str) -> str:
    """Return the authors' name of a layer of DS-Net, such as ``enc3.0.conv2`` for ``enc.0.conv2.conv``."""
    if path.startswith("inner."):
        return "model2D." + rename_unet(path.removeprefix("inner."))
    return _substituted(path, _DSNET_NAMES)


def _substituted(path: str, rules: Any) -> str:
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def from_authors(network: str, from_file: Path) -> Weights:
    """Convert a released file, or a state_dict of a network trained with the authors' code.

    Args:
        network: A key of `NETWORKS`.
        from_file: File of type .pth, .pt or .safetensors.

    Raises:
        UserError: The network is unknown, the file cannot be read, or the weights belong to another architecture.
    """
    if network not in NETWORKS:
        raise UserError(f"--network: unknown network {network!r}; known: {', '.join(NETWORKS)}")
    return convert(read_source(from_file), network)


def convert(source: Source, network: str) -> Weights:
    """Convert the arrays of a file that has already been read; see `from_authors`."""
    section = _complete_section(NETWORKS[network], _StateDict(source, network))
    module, rename, prefix = structure(section)
    what = f"the weights of {source.record['file']} (as --network={network})"
    unused = tuple(f"{prefix}{part}" for part in ("conv_head.", "norm_head."))
    hint = f"If the file contains another network, give its name with --network. Known: {', '.join(NETWORKS)}"
    arrays, ignored = import_state(source.state, module, rename, unused, what, hint)
    kind = "encoder" if "ndim" in section else "network"
    return Weights(kind, section, arrays, ignored, {"from": "authors", "network": network, **source.record})


def to_authors(weights: Weights) -> dict[str, np.ndarray]:
    """Return a state_dict that the authors' code can load.

    Raises:
        UserError: The authors' code does not have this network.
    """
    section = weights.model
    _check_known(section, "encoder" if weights.kind == "encoder" else "network")
    module, rename, prefix = structure(section)
    unused = weights.unused if weights.source.get("from") == "authors" else {}
    state = export_state(weights.arrays, unused, module, rename)
    for name, array in _empty_head(section, state, prefix).items():
        state.setdefault(name, array)
    return state


def _check_known(section: Mapping[str, Any], kind: str) -> None:
    """Raise UserError if the authors' code lacks a network; the message compares it with the most similar one."""
    differences = {
        name: _differences(flatten_model(known), flatten_model(section))
        for name, known in NETWORKS.items()
        if ("ndim" in known if kind == "encoder" else known["name"] == section["name"])
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        raise UserError(
            f"the authors' code does not have the network of these weights. The most similar one is {nearest}, but\n  "
            + "\n  ".join(differences[nearest])
        )


def _differences(known: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Describe the differences, except in keys that are read from a file or have no effect in evaluation mode."""
    ignored = ("in_channels", "out_channels", "filters", "norm", "images", "drop_path")
    return [
        f"{key} is {found.get(key)!r} in the weights, {known.get(key)!r} in the authors' code"
        for key in sorted(known.keys() | found.keys())
        if key.rpartition(".")[2] not in ignored and known.get(key) != found.get(key)
    ]


def structure(section: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """Return the abstract module, the function that renames its layers, and the authors' prefix of its encoder."""
    if "ndim" in section:
        return abstract_encoder(section), rename_encoder, ""
    if section["name"] == "dsnet":
        return networks.build_abstract(section), rename_dsnet, "model2D.encoder."
    return networks.build_abstract(section), rename_unet, "encoder."


class _StateDict:
    """A state_dict, from which properties of the network are read."""

    def __init__(self, source: Source, network: str):
        self.state, self.file, self.network = source.state, source.record["file"], network

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Return the shape of an array. Raises UserError if it is missing or does not have ``rank`` axes."""
        shape = tuple(self.state[name].shape) if name in self.state else None
        if shape is None or len(shape) != rank:
            names = ", ".join(list(self.state)[:4])
            found = f"its shape is {shape}" if shape else f"it is missing; the file has {names}, ..."
            raise UserError(
                f"--network={self.network}: expected {name} with {rank} axes in {self.file}, but {found}. If the file "
                f"contains another network, give its name. Known: {', '.join(NETWORKS)}"
            )
        return shape

    def norm(self, path: str) -> str:
        """Return the kind of the norm at a path: ``batch``, ``instance`` or ``instance_noaffine``."""
        if f"{path}.running_var" in self.state:
            return "batch"
        return "instance" if f"{path}.weight" in self.state else "instance_noaffine"


def _complete_section(section: dict[str, Any], state: _StateDict) -> dict[str, Any]:
    """Return an entry of `NETWORKS`, completed by the properties that are read from a file."""
    if "ndim" in section:
        channels = state.shape("conv1.weight", section["ndim"] + 2)[1]
        return {**section, "in_channels": channels, "norm": state.norm("bnorm1")}
    if section["name"] == "dsnet":
        filters = [state.shape(f"{name}.weight", 5)[0] for name in ("conv1", "conv2", "enc3.0.conv2", "enc4.0.conv2")]
        inner = {
            **section["inner"],
            "norm": state.norm("model2D.decoder1.conv1.norm"),
            "filters": tuple(state.shape(f"model2D.decoder{i}.conv2.conv.weight", 4)[0] for i in range(1, 6)),
        }
        return {
            **section,
            "in_channels": state.shape("conv1.weight", 5)[1],
            "out_channels": state.shape("last.weight", 5)[0],
            "filters": tuple(filters),
            "images": state.shape("enc5.0.conv2.weight", 5)[0],
            "affine": state.norm("norm1") == "instance",
            "inner": inner,
        }
    rank = networks.spatial_axes(section) + 2
    return {
        **section,
        "in_channels": state.shape("conv.weight", rank)[1],
        "out_channels": state.shape("last.weight", rank)[0],
        "norm": state.norm("norm"),
        "filters": tuple(state.shape(f"decoder{i}.conv2.conv.weight", rank)[0] for i in range(1, 6)),
    }


def _empty_head(section: Mapping[str, Any], state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return arrays for the unused classification head: zeros, and an identity norm of the encoder's kind."""
    encoder = section if "ndim" in section else encoder_section(section)[1]
    if not encoder["name"].startswith("efficientnet"):
        return {}
    member = MEMBERS[encoder["name"].removeprefix("efficientnet_")]
    filters = HEAD if member.lite else scaled_channels(HEAD, member.width)
    last = max(n for n in state if re.fullmatch(re.escape(prefix) + r"enc6\.\d+\.conv_pwl\.weight", n))
    head = {f"{prefix}conv_head.weight": np.zeros((filters, state[last].shape[0], *(1,) * encoder["ndim"]), np.float32)}
    norm = f"{prefix}norm_head."
    if encoder["norm"] != "instance_noaffine":
        head |= {norm + "weight": np.ones(filters, np.float32), norm + "bias": np.zeros(filters, np.float32)}
    if encoder["norm"] == "batch":
        head |= {
            norm + "running_mean": np.zeros(filters, np.float32),
            norm + "running_var": np.ones(filters, np.float32),
        }
        head |= {norm + "num_batches_tracked": np.zeros((), np.int64)}
    return head
