"""Weights as named arrays: the file format, and putting them into a network.

A file is safetensors. Its arrays are named by their path in the network (``encoder.blocks.0.0.conv_dw.kernel``) and
laid out as there (channels last). The header's entry ``xdim_jax`` is JSON: format, kind (``encoder`` or ``network``),
``model`` (what the arrays belong to) and ``source`` (where they came from). Arrays under ``unused/`` are parts of the
source that no network here calls, kept as they were so that the way back loses nothing.

Putting weights into a network uses every array of the file once and fills every array of the network once, or raises
an error that lists both sides.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.base.files import atomic_path
from xdim_jax.nets import networks
from xdim_jax.nets.encoders import get_family, make_encoder
from xdim_jax.nets.inflate import Inflation, inflate_arrays
from xdim_jax.nets.input_channels import adapt_channels
from xdim_jax.nets.layers import Depth

FORMAT = "xdim_jax weights 1"
UNUSED = "unused/"
CHECKED = ("padding", "eps", "depth")  # how an encoder computes: part of what its weights mean
_SHOWN = 4  # names listed per side of a mismatch


@dataclasses.dataclass(frozen=True)
class Weights:
    """Named arrays and what they belong to.

    Attributes:
        kind: ``encoder`` or ``network``.
        model: for a network the ``model`` section of its config; for an encoder the arguments of
            `xdim_jax.nets.encoders.make_encoder` without ``drop_path``, its channels as ``in_channels``.
        arrays: by path.
        unused: parts of the source that no network calls, by the source's names and in its layout.
        source: where they came from, for the record.
    """

    kind: str
    model: dict[str, Any]
    arrays: dict[str, np.ndarray]
    unused: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)


# -- files --------------------------------------------------------------------------------------------------------


def write_weights(path: Path, weights: Weights) -> None:
    """Writes a file, whole or not at all."""
    record = {"format": FORMAT, "kind": weights.kind, "model": weights.model, "source": weights.source}
    arrays = weights.arrays | {UNUSED + name: array for name, array in weights.unused.items()}
    write_arrays(path, arrays, {"xdim_jax": json.dumps(record)})


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all, that others may read where they may read one's other files."""
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)  # for nobody else
        temporary.chmod(mode)


def read_weights(path: Path) -> Weights:
    """Reads a file that `write_weights` wrote.

    Raises:
        UserError: missing, damaged, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; weight files are made with python -m weight_port --help")
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); port it again with python -m weight_port"
        ) from error
    try:
        record = json.loads(metadata.get("xdim_jax", "{}"))
    except json.JSONDecodeError:
        record = {}
    record = record if isinstance(record, dict) else {}
    if record.get("format") != FORMAT:
        raise UserError(
            f"{path} holds weights that were not ported ({record.get('format', 'no xdim_jax header')}; expected "
            f"{FORMAT!r}): port them first with python -m weight_port --source=timm --model=<name of timm's> "
            f"--from-file={path} --out=<name>.safetensors"
        )
    if lacking := {"kind", "model", "source"} - record.keys():
        raise UserError(f"the header of {path} lacks {', '.join(sorted(lacking))}: port the weights again")
    return Weights(
        record["kind"],
        networks.plain(record["model"]),
        {name: array for name, array in arrays.items() if not name.startswith(UNUSED)},
        {name.removeprefix(UNUSED): array for name, array in arrays.items() if name.startswith(UNUSED)},
        record["source"],
    )


# -- trees and names ----------------------------------------------------------------------------------------------


def named(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by path; the integer keys of lists become numbers in it."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= named(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def replaced(tree: Mapping[Any, Any], leaves: Mapping[str, Any], prefix: str = "") -> dict[Any, Any]:
    """The tree with the leaves that ``leaves`` names in place of its own."""
    return {
        key: replaced(value, leaves, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else leaves.get(f"{prefix}{key}", value)
        for key, value in tree.items()
    }


def module_leaves(module: nnx.Module) -> dict[str, Any]:
    """Parameters and running statistics of a module (abstract or not) by path."""
    params, stats = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
    return named(nnx.to_pure_dict(params)) | named(nnx.to_pure_dict(stats))


def check_leaves(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, hint: str = "") -> None:
    """Raises UserError, listing both sides, unless both have the same names and shapes; ``hint``: the next step."""
    extra = [name for name in found if name not in wanted]
    lacking = [name for name in wanted if name not in found]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in found
        if name in wanted and tuple(found[name].shape) != tuple(wanted[name].shape)
    ]
    if extra or lacking or shapes:
        raise UserError(
            f"{what} do not fit the network.\n  only in the source ({len(extra)}): {_shown(extra)}\n  only in the "
            f"network ({len(lacking)}): {_shown(lacking)}\n  of another shape ({len(shapes)}): {_shown(shapes)}"
            + (f"\n{hint}" if hint else "")
        )


def _shown(names: Sequence[str]) -> str:
    return shorten(names, _SHOWN) or "none"


# -- encoders -----------------------------------------------------------------------------------------------------


def encoder_section(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Find the encoder of a network.

    Args:
        config: The ``model`` section of the network.

    Returns:
        The prefix that the encoder's arrays have in the network (``encoder.``), and the encoder's description, as in
        `Weights.model`.
    """
    *path, last = networks.get_network(config).encoder_path
    outer = networks.plain(config)
    for key in path:
        outer = outer[key]
    encoder, prefix = outer[last], ".".join((*path, last, ""))
    stem = module_leaves(networks.build_abstract(config))[f"{prefix}{get_family(encoder['name']).stem}.kernel"]
    section = {"name": encoder["name"], "in_channels": int(stem.shape[-2]), "ndim": len(stem.shape) - 2}
    section |= {"norm": outer["norm"], "eps": encoder.get("eps", 1e-5), "padding": encoder.get("padding", "symmetric")}
    if section["ndim"] == 3:
        section["depth"] = dataclasses.asdict(Depth(**(outer.get("depth") or {})))
    return prefix, section


def abstract_encoder(section: Mapping[str, Any]) -> Any:
    """The encoder that a section describes, with shapes in place of arrays."""
    options = dict(section)
    name, channels = options.pop("name"), options.pop("in_channels")
    return nnx.eval_shape(lambda: make_encoder(name, channels, rngs=nnx.Rngs(0), **options))


def part(weights: Weights) -> Weights:
    """The encoder of a whole network's weights; an encoder's as they are."""
    if weights.kind == "encoder":
        return weights
    prefix, section = encoder_section(weights.model)
    arrays = {n.removeprefix(prefix): a for n, a in weights.arrays.items() if n.startswith(prefix)}
    return Weights("encoder", section, arrays, {}, weights.source)


def adapt_encoder(
    weights: Weights,
    section: Mapping[str, Any],
    *,
    inflation: Inflation,
    channel_rule: str | None = None,
    channel_map: Sequence[int] = (),
    accept: Sequence[str] = (),
) -> tuple[Weights, dict[str, str]]:
    """The weights of an encoder for one with other input channels, another norm, or a further axis.

    Args:
        weights: of an encoder.
        section: of the encoder wanted, see `Weights.model`.
        inflation: rules, used when the source is 2D and the target 3D.
        channel_rule, channel_map: see `xdim_jax.nets.input_channels`; default: ``cycle`` where the numbers of channels
            differ.
        accept: properties among `CHECKED` that may differ.

    Returns:
        The weights, and what was done to each array.

    Raises:
        UserError: another encoder; a property that differs and is not accepted; a 3D source for a 2D target.
    """
    found, wanted = weights.model, dict(section)
    if found["name"] != wanted["name"]:
        raise UserError(f"the weights are of {found['name']}, the network's encoder is {wanted['name']}")
    if found["ndim"] > wanted["ndim"]:
        raise UserError(f"the weights are {found['ndim']}D, the network's encoder is {wanted['ndim']}D")
    if unknown := set(accept) - set(CHECKED):
        raise UserError(f"unknown property to accept: {', '.join(sorted(unknown))}; known: {', '.join(CHECKED)}")
    problems = [
        f"the weights were trained with {key}={found[key]}, the network has {key}={wanted[key]}: set it to that, or "
        f"put {key} among the accepted differences (accept={key}, config.init.accept={key})"
        for key in CHECKED
        if key not in accept and key in found and key in wanted and found[key] != wanted[key]
    ]
    if problems:
        raise join_problems(problems, "properties of the encoder differ")
    arrays, done = dict(weights.arrays), dict.fromkeys(weights.arrays, "copied")
    unused = weights.unused
    if channel_rule or found["in_channels"] != wanted["in_channels"]:
        rule = channel_rule or "cycle"
        stem = get_family(found["name"]).stem + ".kernel"
        options: dict[str, Any] = {"channel_map": channel_map, "seed": inflation.seed}
        try:
            arrays[stem] = adapt_channels(arrays[stem], wanted["in_channels"], rule, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        done[stem] = f"channels by {rule}"
        found = found | {"in_channels": wanted["in_channels"]}
    if found["ndim"] < wanted["ndim"]:
        target = {**found, "ndim": wanted["ndim"], "depth": wanted.get("depth")}
        flat = abstract_encoder(found)
        check_leaves(arrays, module_leaves(flat), "the weights")
        axis = (target["depth"] or {}).get("axis", 0)
        arrays, inflated = inflate_arrays(arrays, flat, abstract_encoder(target), inflation, axis)
        done = {n: " then ".join(w for w in (done[n], inflated[n]) if w != "copied") or "copied" for n in arrays}
        found, unused = target, {}  # a head that came along is 2D
    if found["norm"] == "batch" and wanted["norm"] != "batch":
        unused = {}  # a head that came along has batch norm
        kept = module_leaves(abstract_encoder({**found, "norm": wanted["norm"]}))
        for name in [n for n in arrays if n not in kept]:
            if name.rpartition(".")[2] in ("mean", "var", "scale", "bias"):
                del arrays[name]
                done[name] = f"dropped: {wanted['norm']} norm"
    return Weights("encoder", {**found, **wanted}, arrays, unused, weights.source), done


# -- networks -----------------------------------------------------------------------------------------------------


def inflate_network(weights: Weights, depth: Mapping[str, Any], inflation: Inflation) -> tuple[Weights, dict[str, str]]:
    """A whole 2D network, decoder included, as a 3D one.

    Args:
        weights: of an Omnia-Net.
        depth: fields of `xdim_jax.nets.layers.Depth`.
        inflation: rules.

    Returns:
        Weights whose model is a ``dxnet`` section with the 2D network's norm, activation and upsampling, and what was
        done to each array. In evaluation mode it gives the 2D network's output slice by slice: for every volume with
        rule ``centre``, depth strides 1 and squeeze ``slice``; for depth-constant volumes as `xdim_jax.nets.inflate`
        says.

    Raises:
        UserError: not an Omnia-Net.
    """
    if weights.kind != "network" or weights.model["name"] != "omnianet":
        raise UserError(
            f"only a whole Omnia-Net can be inflated, this is {weights.kind} {weights.model['name']}; for DX-Net "
            "inflate the encoder (--part=encoder)"
        )
    depth = dataclasses.asdict(Depth(**depth))
    section = {**weights.model, "name": "dxnet", "depth": depth}
    source, target = networks.build_abstract(weights.model), networks.build_abstract(section)
    check_leaves(weights.arrays, module_leaves(source), "the weights")
    arrays, done = inflate_arrays(weights.arrays, source, target, inflation, depth["axis"])
    check_leaves(arrays, module_leaves(target), "the inflated weights")
    return Weights("network", section, arrays, {}, weights.source), done


def load(
    config: Mapping[str, Any],
    params: Any,
    stats: Any,
    weights: Weights,
    *,
    inflation: Inflation | None = None,
    channel_rule: str = "cycle",
    accept: Sequence[str] = (),
    require: bool = True,
) -> tuple[Any, Any, dict[str, str]]:
    """Puts weights into a network: those of an encoder into its encoder, those of a network into all of it.

    Args:
        config: the ``model`` section of the network.
        params, stats: its trees; dtypes are kept.
        weights: of an encoder, or of a network with the same section (stochastic depth may differ).
        inflation, accept: see `adapt_encoder`; a 2D encoder is inflated for a 3D network.
        channel_rule: see `xdim_jax.nets.input_channels`, used where the numbers of channels differ.
        require: every array of the weights and of the network (or its encoder) must find its counterpart; else those
            that do not are left out, and those of the network stay as they are.

    Returns:
        params, stats, and what was done to each array, by its path in the network.

    Raises:
        UserError: the weights do not fit.
    """
    prefix = ""
    if weights.kind == "encoder":
        prefix, section = encoder_section(config)
        rule = channel_rule if weights.model["in_channels"] != section["in_channels"] else None
        weights, done = adapt_encoder(
            weights, section, inflation=inflation or Inflation(), channel_rule=rule, accept=accept
        )
    else:
        done = dict.fromkeys(weights.arrays, "copied")
        problems = _section_differences(weights.model, networks.plain(config))
        if problems and require:
            raise join_problems(problems, "properties of the network differ from the weights'")
    arrays = {prefix + name: array for name, array in weights.arrays.items()}
    done = {prefix + name: what for name, what in done.items()}
    wanted = {name: leaf for name, leaf in (named(params) | named(stats)).items() if name.startswith(prefix)}
    if require:
        check_leaves(arrays, wanted, "the weights")
    for name in list(arrays):
        if name not in wanted or tuple(arrays[name].shape) != tuple(wanted[name].shape):
            done[name] = "left out: " + ("of another shape" if name in wanted else "not in the network")
            del arrays[name]
    cast = {name: jnp.asarray(array, wanted[name].dtype) for name, array in arrays.items()}
    return replaced(params, cast), replaced(stats, cast), done


def _section_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    flat = [{k: v for k, v in named(s).items() if not k.endswith("drop_path")} for s in (found, wanted)]
    for section in flat:
        section.setdefault("deep_supervision", False)
    return [
        f"{key} is {flat[0].get(key)!r} in the weights, {flat[1].get(key)!r} in the config"
        for key in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(key) != flat[1].get(key)
    ]
