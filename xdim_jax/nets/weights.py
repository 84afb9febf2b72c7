"""Weights as named arrays: the file format, and loading them into a network.

A weights file is a safetensors file with the weights of an encoder or of a network. Its arrays are named by their path
in the encoder (``blocks.0.0.conv_dw.kernel``) or in the network (``encoder.blocks.0.0.conv_dw.kernel``), and have the
layout of this package (channels last). The header has an entry
``xdim_jax``, which is JSON with the keys ``format``, ``kind`` (``encoder`` or ``network``), ``model`` (description of
the encoder or network), ``source`` (origin of the weights) and, if it is known, ``names`` (meaning of the channels of a
network, see `xdim_jax.nets.fine_tuning.Names`). Arrays whose names start with ``unused/`` are parts of
the source that no network of this package uses. They keep the names and the layout of the source, so that the weights
can be converted back without loss.

By default, the arrays of the file that are not under ``unused/`` and those of the encoder or network must have the same
names and shapes; otherwise loading raises an error that lists the differences. For the exceptions see `load`.
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
from xdim_jax.nets.fine_tuning import FREE, Names, adapt_arrays, adapt_inputs
from xdim_jax.nets.inflate import Inflation, inflate_arrays
from xdim_jax.nets.input_channels import adapt_channels
from xdim_jax.nets.layers import Depth, ShapesOnly

FORMAT = "xdim_jax weights 1"
UNUSED = "unused/"
# properties of an encoder that must be as in its training, unless the caller accepts a difference
CHECKED = ("padding", "eps", "depth")
_SHOWN = 4  # number of names in each list of an error message


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of an encoder or a network, and its description.

    Attributes:
        kind: ``encoder`` or ``network``.
        model: For a network, the ``model`` section of its config. For an encoder, the arguments of
            `xdim_jax.nets.encoders.make_encoder` except ``drop_path``; the argument ``channels`` has the key
            ``in_channels``.
        arrays: Arrays by their path in the encoder or network.
        names: Meaning of the channels of a network; None if it is not known.
        unused: Parts of the source that no network uses, with the names and the layout of the source.
        source: Origin of the weights, for reports.
    """

    kind: str
    model: dict[str, Any]
    arrays: dict[str, np.ndarray]
    unused: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: Names | None = None


# -- files --------------------------------------------------------------------------------------------------------


def write_weights(path: Path, weights: Weights) -> None:
    """Write a weights file atomically. Raises UserError if it cannot be written."""
    record = {"format": FORMAT, "kind": weights.kind, "model": weights.model, "source": weights.source}
    if weights.names is not None:
        record["names"] = dataclasses.asdict(weights.names)
    arrays = weights.arrays | {UNUSED + name: array for name, array in weights.unused.items()}
    write_arrays(path, arrays, {"xdim_jax": json.dumps(record)})


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with the default permissions (umask).

    Args:
        path: File to write.
        arrays: Arrays by name.
        metadata: Entries of the header.

    Raises:
        UserError: The file cannot be written.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
        temporary.chmod(mode)  # safetensors writes files that only their owner can read


def read_weights(path: Path) -> Weights:
    """Read a file that `write_weights` wrote.

    Raises:
        UserError: The file is missing, damaged, or has another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; to create weights files, see python -m weight_port --help")
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); create it again with python -m weight_port"
        ) from error
    try:
        record = json.loads(metadata.get("xdim_jax", "{}"))
    except json.JSONDecodeError:
        record = {}
    record = record if isinstance(record, dict) else {}
    if record.get("format") != FORMAT:
        raise UserError(
            f"{path} does not have the format of this package (found {record.get('format', 'no xdim_jax header')}, "
            f"expected {FORMAT!r}): convert it with python -m weight_port --source=timm --model=<timm's name> "
            f"--from-file={path} --out=<name>.safetensors"
        )
    if missing := {"kind", "model", "source"} - record.keys():
        raise UserError(f"the header of {path} lacks {', '.join(sorted(missing))}: convert the weights again")
    kinds = {"encoder": {"name", "in_channels", "ndim", "norm"}, "network": {"name"}}
    mappings = isinstance(record["model"], dict) and isinstance(record["source"], dict)
    if not mappings or record["kind"] not in kinds or kinds[record["kind"]] - record["model"].keys():
        raise UserError(f"the header of {path} is damaged (kind {record['kind']!r}): convert the weights again")
    return Weights(
        record["kind"],
        networks.plain_dict(record["model"]),
        {name: array for name, array in arrays.items() if not name.startswith(UNUSED)},
        {name.removeprefix(UNUSED): array for name, array in arrays.items() if name.startswith(UNUSED)},
        record["source"],
        _read_names(record.get("names"), path),
    )


def _read_names(record: Any, path: Path) -> Names | None:
    """Return the names in the header of a file; None if it has none. Raises UserError if they are damaged."""
    if record is None:
        return None
    try:
        return Names(tuple(record["channels"]), tuple(record["outputs"]), record["activation"])
    except (TypeError, KeyError) as error:
        expected = ", ".join(field.name for field in dataclasses.fields(Names))
        raise UserError(
            f"the names in the header of {path} are damaged: found {record!r}, expected {expected}. Write the "
            "weights file again"
        ) from error


# -- trees and names ----------------------------------------------------------------------------------------------


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by their dotted paths. The indices of lists are written as digits."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def replace_leaves(tree: Mapping[Any, Any], leaves: Mapping[str, Any], prefix: str = "") -> dict[Any, Any]:
    """Return a copy of a nested dict with some leaves replaced.

    Args:
        tree: Nested dict.
        leaves: New leaves by their dotted paths.
        prefix: Path of ``tree`` itself, with a dot at the end.
    """
    return {
        key: replace_leaves(value, leaves, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else leaves.get(f"{prefix}{key}", value)
        for key, value in tree.items()
    }


def module_leaves(module: nnx.Module) -> dict[str, Any]:
    """Return the parameters and running statistics of a module (abstract or not) by path."""
    params, stats = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
    return flatten(nnx.to_pure_dict(params)) | flatten(nnx.to_pure_dict(stats))


def check_leaves(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, hint: str = "") -> None:
    """Check that two sets of arrays have the same names and shapes.

    Args:
        found: Arrays of the source, by name.
        wanted: Arrays of the network, by name.
        what: Subject of the error message, such as ``the weights``.
        hint: Last line of the error message, which suggests the next step.

    Raises:
        UserError: Names or shapes differ; the message lists the differences.
    """
    extra = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in found
        if name in wanted and tuple(found[name].shape) != tuple(wanted[name].shape)
    ]
    if extra or missing or shapes:
        raise UserError(
            f"{what} do not fit the network.\n  only in the source ({len(extra)}): {_shown(extra)}\n  only in the "
            f"network ({len(missing)}): {_shown(missing)}\n  with another shape ({len(shapes)}): {_shown(shapes)}"
            + (f"\n{hint}" if hint else "")
        )


def _shown(names: Sequence[str]) -> str:
    return shorten(names, _SHOWN) or "none"


# -- encoders -----------------------------------------------------------------------------------------------------


def encoder_section(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Describe the encoder of a network.

    Args:
        config: The ``model`` section of the network.

    Returns:
        The prefix that the encoder's arrays have in the network (``encoder.``), and the encoder's description, as in
        `Weights.model`.
    """
    *path, last = networks.get_network(config).encoder_path
    outer = networks.plain_dict(config)
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
    """Build the encoder that a section describes (see `Weights.model`), with shapes in place of arrays."""
    options = dict(section)
    name, channels = options.pop("name"), options.pop("in_channels")
    return nnx.eval_shape(lambda: make_encoder(name, channels, rngs=ShapesOnly(), **options))


def encoder_weights(weights: Weights) -> Weights:
    """Return the weights of the encoder of a network. Weights of an encoder are returned unchanged."""
    if weights.kind == "encoder":
        return weights
    prefix, section = encoder_section(weights.model)
    arrays = {n.removeprefix(prefix): a for n, a in weights.arrays.items() if n.startswith(prefix)}
    first = _first_layer(weights.model, weights.arrays) == f"{prefix}{get_family(section['name']).stem}.kernel"
    return Weights("encoder", section, arrays, {}, weights.source, weights.names if first else None)


def _check_accepted(accept: Sequence[str]) -> None:
    """Raise UserError if a property to accept is unknown."""
    if unknown := set(accept) - set(CHECKED):
        raise UserError(f"unknown property to accept: {', '.join(sorted(unknown))}; known: {', '.join(CHECKED)}")


def has_batch_norm(section: Mapping[str, Any]) -> bool:
    """Return whether an encoder has running statistics. ConvNeXt has layer norms, whatever the section says."""
    return any(name.endswith(".mean") for name in module_leaves(abstract_encoder(section)))


def adapt_encoder(
    weights: Weights,
    section: Mapping[str, Any],
    *,
    inflation: Inflation,
    channel_rule: str | None = None,
    channel_map: Sequence[int] = (),
    accept: Sequence[str] = (),
) -> tuple[Weights, dict[str, str]]:
    """Adapt the weights of an encoder to other input channels, to a norm without running statistics, or to 3D.

    Args:
        weights: Weights of an encoder.
        section: Description of the target encoder, see `Weights.model`.
        inflation: Rules of inflation, used if the source is 2D and the target is 3D.
        channel_rule: Rule of `xdim_jax.nets.input_channels`, which is applied even if the numbers of channels are
            equal. With None, ``cycle`` is applied if they differ, and no rule otherwise.
        channel_map: See `xdim_jax.nets.input_channels`.
        accept: Properties among `CHECKED` that may differ.

    Returns:
        The adapted weights, and how each array was obtained.

    Raises:
        UserError: The target is another encoder, a property that is not in ``accept`` differs, the source is 3D and
            the target is 2D, or the target has batch norm and the source has none.
    """
    found, wanted = weights.model, dict(section)
    if found["name"] != wanted["name"]:
        raise UserError(f"the weights belong to {found['name']}, but the network's encoder is {wanted['name']}")
    if found["ndim"] > wanted["ndim"]:
        raise UserError(f"the weights are {found['ndim']}D, but the network's encoder is {wanted['ndim']}D")
    _check_accepted(accept)
    problems = [
        f"the weights were trained with {key}={found[key]}, the network has {key}={wanted[key]}: change the "
        f"network, or accept the difference (--config.init.accept={key}; in Python, accept=({key!r},))"
        for key in CHECKED
        if key not in accept and key in found and key in wanted and found[key] != wanted[key]
    ]
    axes = networks.depth_axis(found), networks.depth_axis(wanted)
    if found["ndim"] == wanted["ndim"] == 3 and axes[0] != axes[1]:
        problems.append(
            f"the weights were inflated along axis {axes[0]}, but the depth axis of the network is {axes[1]}: inflate "
            f"the 2D weights again, along axis {axes[1]}"
        )
    if wanted["norm"] == "batch" != found["norm"] and has_batch_norm(wanted):
        problems.append(
            f"the weights have {found['norm']} norm, so the statistics for batch norm are missing: "
            f"give the network the same norm (--config.model.norm={found['norm']}), or take other weights"
        )
    if problems:
        raise join_problems(problems, "properties of the encoder differ")
    arrays, done = dict(weights.arrays), dict.fromkeys(weights.arrays, "copied")
    unused = weights.unused
    stem = get_family(found["name"]).stem + ".kernel"
    rule = channel_rule or ("cycle" if found["in_channels"] != wanted["in_channels"] else "")

    def adapt_stem() -> None:
        options: dict[str, Any] = {"channel_map": channel_map, "seed": inflation.seed}
        if stem not in arrays:
            raise UserError(f"the weights lack {stem}; take a complete file")
        try:
            arrays[stem] = adapt_channels(arrays[stem], wanted["in_channels"], rule, **options)
        except ValueError as error:
            raise UserError(str(error)) from error
        done[stem] = f"channels by {rule}"

    if rule:
        adapt_stem()
        found = found | {"in_channels": wanted["in_channels"]}
    if found["ndim"] < wanted["ndim"]:
        target = {**found, "ndim": wanted["ndim"], "depth": wanted.get("depth"), "eps": wanted["eps"]}
        flat = abstract_encoder(found)
        check_leaves(arrays, module_leaves(flat), "the weights")
        axis = (target["depth"] or {}).get("axis", 0)
        arrays, inflated = inflate_arrays(arrays, flat, abstract_encoder(target), inflation, axis)
        done = {n: _joined(done[n], inflated[n]) for n in arrays}
        if rule == "randn":  # again: every slice of the kernel has its own random numbers
            adapt_stem()
        found, unused = target, {}  # the unused weights may have a classification head, which is 2D
    if found["norm"] != wanted["norm"]:
        unused = {}  # the unused weights may have a classification head with batch norm
        kept = module_leaves(abstract_encoder({**found, "norm": wanted["norm"]}))
        for name in [n for n in arrays if n not in kept]:
            if name.rpartition(".")[2] in ("mean", "var", "scale", "bias"):
                del arrays[name]
                done[name] = f"dropped: the network has {wanted['norm']} norm"
    return Weights("encoder", {**found, **wanted}, arrays, unused, weights.source), done


def _joined(*steps: str) -> str:
    """Return how an array was obtained in several steps."""
    return " then ".join(step for step in steps if step != "copied") or "copied"


# -- networks -----------------------------------------------------------------------------------------------------


def _match_channels(weights: Weights, stem: str, source: Names, target: Names) -> tuple[Weights, str]:
    """Return weights of an encoder with input channels matched by name, and how the stem was obtained.

    The encoder must be the first layer of the network, so that its input channels are those of the image.
    """
    unique = all(len(set(n.channels)) == len(n.channels) for n in (source, target))
    if source.channels == target.channels or not unique:
        return weights, "copied"
    kernel, how = adapt_inputs(weights.arrays[stem], source.channels, target.channels)
    section = {**weights.model, "in_channels": len(target.channels)}
    return dataclasses.replace(weights, model=section, arrays={**weights.arrays, stem: kernel}), how


def inflate_network(
    weights: Weights, depth: Mapping[str, Any], inflation: Inflation, *, eps: float | None = None
) -> tuple[Weights, dict[str, str]]:
    """Inflate the weights of a whole 2D network, including its decoder.

    In evaluation mode and with batch norm, rule ``centre``, depth strides 1 and squeeze ``slice``, the 3D network
    computes the output of the 2D network slice by slice, for every volume. Otherwise it does so at most for volumes of
    identical slices, and only under the conditions in the table of `xdim_jax.nets.inflate`.

    Args:
        weights: Weights of an Omnia-Net.
        depth: Fields of `xdim_jax.nets.layers.Depth`.
        inflation: The rules.
        eps: eps of the norms in the encoder of the target network; None for that of ``weights.model``. Only the rule
            ``repeat`` uses it.

    Returns:
        Weights whose model is a ``dxnet`` section with the norm, activation and upsampling of the 2D network, and how
        each array was obtained.

    Raises:
        UserError: The weights do not belong to an Omnia-Net.
    """
    if weights.kind != "network" or weights.model["name"] != "omnianet":
        volumetric = weights.model["name"] == "dxnet"
        raise UserError(
            f"only an Omnia-Net can be inflated as a whole; found {weights.kind} {weights.model['name']}. "
            + (
                "These weights are 3D already; load them without inflation"
                if volumetric
                else "To initialise a DX-Net from these weights, inflate their encoder alone (--part=encoder)"
            )
        )
    depth = dataclasses.asdict(Depth(**depth))
    section = {**weights.model, "name": "dxnet", "depth": depth}
    used = section if eps is None else {**section, "encoder": {**section["encoder"], "eps": eps}}
    source, target = networks.build_abstract(weights.model), networks.build_abstract(used)
    check_leaves(weights.arrays, module_leaves(source), "the weights")
    arrays, done = inflate_arrays(weights.arrays, source, target, inflation, depth["axis"])
    check_leaves(arrays, module_leaves(target), "the inflated weights")
    return Weights("network", section, arrays, {}, weights.source, weights.names), done


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
    names: Names | None = None,
) -> tuple[Any, Any, dict[str, str]]:
    """Load the weights of an encoder into the encoder of a network, or the weights of a network into a whole network.

    If both ``weights.names`` and ``names`` are given, weights of a network are adapted if the image channels, the
    outputs, deep supervision, or the depth strides or padding differ; see `xdim_jax.nets.fine_tuning`.

    Args:
        config: The ``model`` section of the network.
        params: Parameters of the network, a nested dict. Their dtypes are preserved.
        stats: Running statistics of the network, a nested dict.
        weights: Weights of an encoder, or of a network. If they are weights of a network and ``require`` is True,
            ``weights.model`` must equal ``config`` except for the rate of stochastic depth, the properties in
            ``accept`` and, if both ``weights.names`` and ``names`` are given, the keys in
            `xdim_jax.nets.fine_tuning.FREE`. Weights of an Omnia-Net are inflated for a DX-Net, see `inflate_network`.
        inflation: Rules with which a 2D encoder or network is inflated for a 3D network; None for the default rules.
        channel_rule: Rule of `xdim_jax.nets.input_channels`, used for weights of an encoder if the numbers of channels
            differ. With ``cycle``, the channels are matched by name instead if the encoder is the first layer of the
            network, both ``weights.names`` and ``names`` are given, and no two channels have the same name.
        accept: Properties among `CHECKED` that may differ between the encoders. The depth axis may not.
        require: True to raise an error if the model sections differ, or if an array exists on one side only or has
            another shape. False to skip such arrays; those of the network keep their values. If both
            ``weights.names`` and ``names`` are given, there are two exceptions: arrays of another shape are adapted if
            possible, and arrays of deep supervision that exist on one side only are skipped. 2D weights that are
            inflated must be complete in any case.
        names: Meaning of the channels of the network; None if it is not known.

    Returns:
        Parameters, running statistics, and how each array was obtained, by its path in the network.

    Raises:
        UserError: The weights do not fit.
    """
    prefix = ""
    if weights.kind == "encoder":
        prefix, section = encoder_section(config)
        stem, how = f"{get_family(section['name']).stem}.kernel", "copied"
        reads_image = _first_layer(config, flatten(params)) == prefix + stem and stem in weights.arrays
        if reads_image and channel_rule == "cycle" and names is not None and weights.names is not None:
            weights, how = _match_channels(weights, stem, weights.names, names)
        rule = channel_rule if weights.model["in_channels"] != section["in_channels"] else None
        weights, done = adapt_encoder(
            weights, section, inflation=inflation or Inflation(), channel_rule=rule, accept=accept
        )
        if stem in done:
            done[stem] = _joined(how, done[stem])
    else:
        done = dict.fromkeys(weights.arrays, "copied")
        section = networks.plain_dict(config)
        if (weights.model["name"], section["name"]) == ("omnianet", "dxnet"):
            section["depth"] = dataclasses.asdict(Depth(**(section.get("depth") or {})))
            eps = section["encoder"].get("eps", 1e-5)
            weights, done = inflate_network(weights, section["depth"], inflation or Inflation(), eps=eps)
        problems = network_differences(weights, section, names, accept)
        if problems and require:
            text = join_problems(problems, "properties of the network differ from those of the weights")
            raise UserError(
                f"{text}. Change the config, accept the difference with config.init.accept (padding, eps, depth), or "
                "load the encoder alone with config.init.part=encoder"
            )
        axes = networks.depth_axis(weights.model), networks.depth_axis(section)
        volumes = all(networks.spatial_axes(m) == 3 for m in (weights.model, section))
        if volumes and axes[0] != axes[1]:
            raise UserError(
                f"the kernels of the weights have their depth along axis {axes[0]}, those of the network along axis "
                f"{axes[1]}: set config.model.depth.axis, or inflate the 2D weights again"
            )
        if names is not None and weights.names is not None:
            wanted = flatten(params) | flatten(stats)
            first = _first_layer(section, wanted)
            adapted, changes = adapt_arrays(weights.arrays, wanted, first, weights.names, names, require=require)
            done = {n: _joined(done.get(n, "copied"), what) for n, what in changes.items()}
            cast = {name: jnp.asarray(array, wanted[name].dtype) for name, array in adapted.items()}
            return replace_leaves(params, cast), replace_leaves(stats, cast), done
    arrays = {prefix + name: array for name, array in weights.arrays.items()}
    done = {prefix + name: what for name, what in done.items()}
    wanted = {name: leaf for name, leaf in (flatten(params) | flatten(stats)).items() if name.startswith(prefix)}
    if require:
        check_leaves(arrays, wanted, "the weights")
    for name in list(arrays):
        if name not in wanted or tuple(arrays[name].shape) != tuple(wanted[name].shape):
            done[name] = "omitted: " + ("another shape" if name in wanted else "not in the network")
            del arrays[name]
    cast = {name: jnp.asarray(array, wanted[name].dtype) for name, array in arrays.items()}
    return replace_leaves(params, cast), replace_leaves(stats, cast), done


def _first_layer(section: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the name of the kernel of the first convolution of a network."""
    for name in ("conv.kernel", "conv1.conv.kernel"):
        if name in wanted:
            return name
    return f"encoder.{get_family(section['encoder']['name']).stem}.kernel"


def flatten_model(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a model section by dotted key, with the defaults of keys that the section lacks."""
    keys = {"deep_supervision": False} | flatten(section)
    for prefix in [key.removesuffix("encoder.name") for key in keys if key.endswith("encoder.name")]:
        defaults = {
            "encoder.padding": "symmetric",
            "encoder.eps": 1e-5,
            "full_resolution": True,
            "deep_supervision": False,
        }
        keys = {f"{prefix}{key}": value for key, value in defaults.items()} | keys
    return keys


def network_differences(
    weights: Weights, section: Mapping[str, Any], names: Names | None = None, accept: Sequence[str] = ()
) -> list[str]:
    """Return a message for each key that differs between the model section of a network and that of its weights.

    Args:
        weights: Weights of a network.
        section: Model section of the network.
        names: Meaning of the channels of the network. If it and ``weights.names`` are given, the keys in
            `xdim_jax.nets.fine_tuning.FREE` may differ.
        accept: Properties among `CHECKED` that may differ.

    Raises:
        UserError: ``accept`` has a name that is not in `CHECKED`.
    """
    _check_accepted(accept)
    free = FREE if names is not None and weights.names is not None else ()
    accepted: dict[str, tuple[str, ...]] = {
        "padding": ("encoder.padding",),
        "eps": ("encoder.eps",),
        "depth": ("depth.padding", "depth.squeeze", "depth.strides"),
    }
    endings = tuple(ending for key in accept for ending in accepted[key])
    both = [dict(s) for s in (weights.model, section)]
    for one in both:
        if one["name"] == "dxnet":  # an absent section has the default values
            one["depth"] = dataclasses.asdict(Depth(**(one.get("depth") or {})))
    flat = [{k: v for k, v in flatten_model(s).items() if not k.endswith("drop_path")} for s in both]
    return [
        f"{key} is {flat[0].get(key)!r} in the weights, {flat[1].get(key)!r} in the config"
        for key in sorted(flat[0].keys() | flat[1].keys())
        if key not in free and not key.endswith(endings) and flat[0].get(key) != flat[1].get(key)
    ]
