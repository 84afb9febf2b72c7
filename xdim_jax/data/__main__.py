"""Data sets on disk: check them, prepare them for training, or write synthetic ones in their layouts."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.files import write_json
from xdim_jax.base.problem import KINDS
from xdim_jax.data import phantom
from xdim_jax.data.case import Dataset, list_cases
from xdim_jax.data.layouts import brats, camus, chaos
from xdim_jax.data.layouts.datasets import DATASETS, get_dataset
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.store import default_folder, prepare_cases, store_key
from xdim_jax.data.store_backends import open_shelf
from xdim_jax.data.verify import format_findings, verify

_OPTIONS = ("convention", "views", "instants", "quality", "task", "phase")  # flags that are a data set's own


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = make_parser("xdim_jax.data", __doc__ or "", "exit status: 0 done, 1 verify found errors, 2 unusable input")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_verify(commands)
    _add_prepare(commands)
    _add_phantom(commands)
    options, overrides = parser.parse_known_args(argv)
    if overrides and options.command != "prepare":
        raise UserError(f"unknown arguments {' '.join(overrides)}; see python -m xdim_jax.data {options.command} -h")
    if options.command == "prepare":
        return _prepare(options, overrides)
    return _verify(options) if options.command == "verify" else _phantom(options)


def _add_dataset(parser: argparse.ArgumentParser, names: Sequence[str], *, required: bool = True) -> None:
    parser.add_argument("--dataset", choices=names, required=required)
    parser.add_argument("--root", type=Path, required=required, help="folder of the data set")
    parser.add_argument("--convention", choices=sorted(brats.CONVENTIONS), help="of BraTS; never guessed")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--views", help=f"of CAMUS, with commas (default {','.join(camus.VIEWS)})")
    parser.add_argument("--instants", help=f"of CAMUS (default {','.join(camus.INSTANTS)}; half_sequence)")
    parser.add_argument("--quality", help=f"of CAMUS (default {','.join(camus.QUALITIES)})")
    parser.add_argument("--task", type=int, choices=list(chaos.TASKS), help="of CHAOS (default 5; 4 reads CT and MR)")
    parser.add_argument("--phase", choices=chaos.PHASES, help="of T1-DUAL (default in)")


# -- verify -------------------------------------------------------------------------------------------------------


def _add_verify(commands: Any) -> None:
    kinds = "\n".join(f"  {kind:<22}{meaning}" for kind, meaning in KINDS.items())
    parser = commands.add_parser(
        "verify",
        help="find everything wrong with a data set",
        description="Reads every file and lists all problems: file, found, expected, what to do.\n\nkinds:\n" + kinds,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_dataset(parser, list(DATASETS))
    _add_options(parser)
    parser.add_argument("--no-labels", action="store_true", help="the cases need no reference labels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there as well; - is the screen")
    parser.add_argument("--strict", action="store_true", help="warnings count as errors in the exit status")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once (default: all cores)")


def _verify(options: argparse.Namespace) -> int:
    dataset = get_dataset({**DATASETS[options.dataset].everything, **_section(options)})
    to_screen = options.json == Path("-")
    progress = {} if to_screen else {"progress": log.bar("verify")}
    findings = verify(dataset, options.root, need_labels=not options.no_labels, jobs=options.jobs, **progress)
    report = {
        "dataset": dataset.name,
        "root": str(options.root.absolute()),
        "cases": findings.cases,
        "errors": findings.errors,
        "warnings": len(findings.problems) - findings.errors,
        "problems": [p.to_json() for p in findings.problems],
    }
    if to_screen:
        print(json.dumps(report, indent=2))
    else:
        for line in format_findings(findings, options.root):
            log.say(line)
        if options.json:
            write_json(options.json, report)
    return 1 if findings.errors or (options.strict and findings.problems) else 0


def _section(options: argparse.Namespace) -> dict[str, Any]:
    """The flags as the ``data`` section of a config. Raises UserError for a flag that the data set does not have."""
    known = DATASETS[options.dataset].options
    section: dict[str, Any] = {"dataset": options.dataset, "root": str(options.root or "")}
    for key in _OPTIONS:
        value = getattr(options, key, None)
        if value is None:
            continue
        if key not in known:
            raise UserError(f"--{key} is not an option of --dataset={options.dataset}; it has: {', '.join(known)}")
        section[key] = tuple(value.split(",")) if isinstance(known[key], tuple) else value
    return section


# -- prepare ------------------------------------------------------------------------------------------------------


_PREPARE = """Crops, resamples and standardises every case, and writes the store of arrays that training reads.
Training does the same where the store is missing; several runs share one store. Run again, it goes on where it was,
and prepares only what is new or has changed.

With --config: as a recipe says. With --dataset: as the paper does (BraTS: brain crop, z-score of non-zero voxels;
CAMUS: z-score of each image; CHAOS: slices of 512x512, a window on CT, z-score).

examples:
  python -m xdim_jax.data prepare --config=configs/brats_dxnet.py --config.data.root=/data/BraTS2021_Training_Data
  python -m xdim_jax.data prepare --dataset=camus --root=/data/CAMUS_public --store=/scratch/camus
"""


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="prepare a data set for training, once",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE[:WORDS]", help="a recipe; takes --config.<key>=<value> too")
    _add_dataset(parser, list(DATASETS), required=False)
    _add_options(parser)
    parser.add_argument("--store", help="folder to write to, or gs://, s3:// (default: <root>_prepared)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once (default: all cores)")


def _prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if bool(options.config) == bool(options.dataset):
        raise UserError("give either --config=<recipe>, or --dataset=<name> and --root=<folder>")
    if options.config:
        if surplus := [f"--{key}" for key in ("root", *_OPTIONS) if getattr(options, key) is not None]:
            raise UserError(f"{', '.join(surplus)} goes with --dataset; with --config, write --config.data.<key>")
        data = load_config(options.config, overrides).data
    else:
        if overrides:
            raise UserError(f"unknown arguments {' '.join(overrides)}; --config.<key> goes with --config")
        data = _section(options)
    if not data["root"]:
        raise UserError("give " + ("--config.data.root" if options.config else "--root") + "=<folder of the data>")
    root = Path(data["root"])
    dataset = get_dataset(data)
    settings = Preparation.from_config(data["prepare"]) if options.config else _papers(options.dataset, dataset)
    cases = list_cases(dataset, root, need_labels=True)
    folder = options.store or data.get("store", "") or default_folder(root)
    prepare_cases(dataset, cases, settings, folder, jobs=options.jobs, say=log.say, progress=log.bar("prepare"))
    shelf = open_shelf(folder, store_key(dataset, settings)[0])
    size = sum(map(shelf.size, {place for case in cases for place in shelf.places(case.case_id)}))
    log.say(f"done       {len(cases)} cases in {shelf}, {gib(size)}")
    return 0


def _papers(name: str, dataset: Dataset) -> Preparation:
    """How the paper prepares a data set; a window is for CT."""
    settings = DATASETS[name].preparation
    return settings if dataset.holds_ct else dataclasses.replace(settings, window=())


# -- phantom ------------------------------------------------------------------------------------------------------

_LARGEST = 1024  # side of a phantom


def _add_phantom(commands: Any) -> None:
    parser = commands.add_parser("phantom", help="write synthetic cases", description=phantom.__doc__)
    _add_dataset(parser, ["brats", "camus", "chaos"])
    parser.add_argument(
        "--cases", type=int, default=10, help="patients; of CHAOS, of CT and of MR (default %(default)s)"
    )
    parser.add_argument("--first", type=int, help="number of the first (default 0; CAMUS and CHAOS 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shape",
        metavar="X,Y[,Z]",
        help="voxels (default: BraTS 240,240,155; CAMUS 549,389; CHAOS CT 512,512,80, from which MR follows)",
    )
    parser.add_argument("--layout", choices=["nifti", "metaimage"], help="release of CAMUS (default nifti)")
    parser.add_argument("--noise", type=float, help="standard deviation, in units of signal (default 0.06)")
    parser.add_argument("--bias", type=float, help="standard deviation of the bias field (default 0.1)")
    parser.add_argument("--contrast", type=float, help="of tissues, 0 to 1 (default 1)")


def _phantom(options: argparse.Namespace) -> int:
    if options.cases < 1:
        raise UserError(f"--cases={options.cases}: expected 1 or more")
    if options.seed < 0 or (options.first or 0) < 0:
        raise UserError(f"--seed={options.seed}, --first={options.first}: expected 0 or more")
    for flag, name in (("convention", "brats"), ("layout", "camus")):
        if getattr(options, flag) is not None and options.dataset != name:
            raise UserError(f"--{flag} is an option of --dataset={name}")
    chosen = {key: getattr(options, key) for key in ("noise", "bias", "contrast")}
    difficulty = phantom.Difficulty(**{key: value for key, value in chosen.items() if value is not None})
    shared: dict[str, Any] = {"cases": options.cases, "seed": options.seed, "difficulty": difficulty}
    shared |= {"progress": log.say} | ({} if options.first is None else {"first": options.first})
    shape = _shape(options.shape, 2 if options.dataset == "camus" else 3) if options.shape else None
    shared |= {"shape": shape} if shape else {}
    if options.dataset == "brats":
        shared["convention"] = options.convention or "brats2021"
    elif options.dataset == "camus":
        shared["layout"] = options.layout or "nifti"
    phantom.WRITERS[options.dataset][0](options.root, **shared)
    return 0


def _shape(text: str, sides: int) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.split(","))
    except ValueError as error:
        raise UserError(f"--shape={text}: expected {sides} numbers with commas") from error
    if len(shape) != sides or max(shape) > _LARGEST:
        raise UserError(f"--shape={text}: expected {sides} numbers with commas, at most {_LARGEST}")
    return shape


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
