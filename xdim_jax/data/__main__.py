"""Check data sets on disk, plan a recipe, prepare cases for training, or write synthetic cases in their layouts."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.files import write_json
from xdim_jax.base.host import count_cores
from xdim_jax.base.problem import KINDS
from xdim_jax.data import phantom
from xdim_jax.data.case import Dataset, list_cases
from xdim_jax.data.datasets import DATASETS, get_dataset
from xdim_jax.data.options import add_options, given_options, read_section
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.store import default_folder, describe_cases, open_store, prepare_cases
from xdim_jax.data.verify import format_findings, verify

_PHANTOMS = {name: entry.phantoms for name, entry in DATASETS.items() if entry.phantoms}


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    parser = make_parser("xdim_jax.data", __doc__ or "", "exit status: 0 done, 1 verify found errors, 2 unusable input")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_verify(commands)
    _add_plan(commands)
    _add_prepare(commands)
    _add_phantom(commands)
    options, overrides = parser.parse_known_args(argv)
    if overrides and options.command != "prepare":
        raise UserError(f"unknown arguments {' '.join(overrides)}; see python -m xdim_jax.data {options.command} -h")
    if options.command == "prepare":
        return _prepare(options, overrides)
    return {"verify": _verify, "plan": _plan, "phantom": _phantom}[options.command](options)


def _add_dataset(parser: argparse.ArgumentParser, names: Sequence[str], *, required: bool = True) -> None:
    """Add the flags --dataset and --root."""
    parser.add_argument("--dataset", choices=names, required=required, help="format of the data set")
    parser.add_argument("--root", type=Path, required=required, help="folder of the data set")


# -- verify -------------------------------------------------------------------------------------------------------


def _add_verify(commands: Any) -> None:
    """Add the command ``verify``."""
    kinds = "\n".join(f"  {kind:<22}{meaning}" for kind, meaning in KINDS.items())
    parser = commands.add_parser(
        "verify",
        help="find all problems of a data set",
        description="Read every file, and list all problems: the file, what was found, what was expected, and what to "
        "do.\n\nkinds of problems:\n" + kinds,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_dataset(parser, list(DATASETS))
    add_options(parser, defaults={name: entry.verify_options for name, entry in DATASETS.items()})
    parser.add_argument(
        "--no-labels", action="store_true", help="do not report missing reference labels, and do not check splits"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the problems to FILE; with -, print only JSON"
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 even if all problems are warnings")
    parser.add_argument(
        "--jobs", type=int, default=count_cores(), help="number of concurrent cases (default: one per core)"
    )


def _verify(options: argparse.Namespace) -> int:
    """Run the command ``verify``, and return its exit status."""
    dataset = get_dataset({**DATASETS[options.dataset].verify_options, **read_section(options, options.dataset)})
    to_screen = options.json == Path("-")
    progress = {} if to_screen else {"progress": log.progress_bar("verify")}
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
        log.write_result(json.dumps(report, indent=2))
    else:
        log.write_result("\n".join(format_findings(findings, options.root)))
        if options.json:
            write_json(options.json, report)
    return 1 if findings.errors or (options.strict and findings.problems) else 0


# -- plan ---------------------------------------------------------------------------------------------------------


_PLAN = """Measure every case, plan a recipe for the data and this machine, and write it as a Python file with a reason
for every value, with a page of figures beside it. Train with python -m xdim_jax.train --config=<this file>.

The plan chooses 2D or 3D, spacing, intensities, patch, batch, depth strides, initial weights and inflation rule,
sampling, loss, flips, folds and the number of steps. docs/planning.md lists the rules. The same data, machine and
options give the same recipe. The measurements are stored in the folder of the prepared cases.

example:
  python -m xdim_jax.data plan --root=/data/Dataset001_Name --hours=8 --out=recipe.py
"""


def _add_plan(commands: Any) -> None:
    """Add the command ``plan``."""
    parser = commands.add_parser(
        "plan",
        help="plan a recipe for a data set",
        description=_PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset", choices=list(DATASETS), default="nnunet", help="format of the data set (default: %(default)s)"
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set")
    add_options(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="file for the recipe, e.g. recipe.py")
    add(
        "--memory",
        default="",
        metavar="SIZE",
        help="memory for a training step, e.g. 16GiB (default: 90 %% of device memory; on CPU 60 %% of host memory)",
    )
    add("--hours", type=float, default=8.0, help="time for training all folds on this machine (default: %(default)s)")
    add("--folds", type=int, default=0, help="number of folds (default: 5, or the number of patients if it is smaller)")
    add("--store", default="", help="folder of the prepared cases (default: <root>_prepared)")
    add("--jobs", type=int, default=count_cores(), help="number of concurrent cases (default: one per core)")


def _plan(options: argparse.Namespace) -> int:
    """Run the command ``plan``, and return its exit status."""
    from xdim_jax.planning.plan_data import plan_recipe  # imports JAX, which the other commands do not need

    plan_recipe(
        read_section(options, options.dataset),
        options.out,
        memory=options.memory,
        hours=options.hours,
        folds=options.folds,
        store=options.store,
        jobs=options.jobs,
    )
    return 0


# -- prepare ------------------------------------------------------------------------------------------------------


_PREPARE = """Crop, resample and standardise every case, and write the arrays that training reads to a store.
The command is optional, because training itself prepares missing cases. Several runs can use the same store. The
command prepares only cases that are missing or have changed, so it can be repeated after an interruption.

With --config, the recipe defines the preparation. With --dataset, cases are prepared as in the paper (BraTS: crop to
the brain, z-score of nonzero voxels; CAMUS: z-score of each image; CHAOS: slices of 512x512, a window on CT, z-score).

examples:
  python -m xdim_jax.data prepare --config=configs/brats_dxnet.py --config.data.root=/data/BraTS2021_Training_Data
  python -m xdim_jax.data prepare --dataset=camus --root=/data/CAMUS_public --store=/scratch/camus
"""


def _add_prepare(commands: Any) -> None:
    """Add the command ``prepare``."""
    parser = commands.add_parser(
        "prepare",
        help="prepare a data set for training",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE[:VARIANT,...]", help="a recipe; --config.<key>=<value> overrides any value"
    )
    _add_dataset(parser, list(DATASETS), required=False)
    add_options(parser)
    parser.add_argument("--store", help="folder of the store (also gs://, s3://; default: <root>_prepared)")
    parser.add_argument(
        "--jobs", type=int, default=count_cores(), help="number of concurrent cases (default: one per core)"
    )


def _prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the command ``prepare``, and return its exit status."""
    if bool(options.config) == bool(options.dataset):
        raise UserError("give either --config=<recipe>, or --dataset=<name> and --root=<folder>")
    if options.config:
        if surplus := [f"--{key}" for key in ({"root": options.root} if options.root else {}) | given_options(options)]:
            raise UserError(f"{', '.join(surplus)} needs --dataset; with --config, give --config.data.<key>=<value>")
        data = load_config(options.config, overrides).data
    else:
        if overrides:
            raise UserError(f"unknown arguments {' '.join(overrides)}; --config.<key>=<value> needs --config")
        data = read_section(options, options.dataset)
    if not data["root"]:
        raise UserError("give " + ("--config.data.root" if options.config else "--root") + "=<folder of the data>")
    root = Path(data["root"])
    dataset = get_dataset(data)
    if options.config:
        settings = Preparation.from_config(data["prepare"])
    else:
        settings = _paper_preparation(options.dataset, dataset)
    cases = list_cases(dataset, root, need_labels=True)
    base = options.store or data.get("store", "") or default_folder(root)
    progress = log.progress_bar("prepare")
    prepared = prepare_cases(dataset, cases, settings, base, jobs=options.jobs, say=log.say, progress=progress)
    describe_cases(prepared, dataset, settings)
    backend = open_store(dataset, settings, base)
    entries = {entry for case in cases for entry in backend.find_entries(case.case_id)}
    log.say(f"done       {len(cases)} cases in {backend}, {gib(sum(map(backend.size, entries)))}")
    return 0


def _paper_preparation(name: str, dataset: Dataset) -> Preparation:
    """Return the preparation of a data set in the paper. If the data set has no CT, it has no intensity window."""
    settings = DATASETS[name].preparation
    return settings if dataset.holds_ct else dataclasses.replace(settings, window=())


# -- phantom ------------------------------------------------------------------------------------------------------

_MAX_SIDE = 1024  # maximum number of voxels along a side of a phantom


def _add_phantom(commands: Any) -> None:
    """Add the command ``phantom``."""
    parser = commands.add_parser("phantom", help="write synthetic cases", description=phantom.__doc__)
    _add_dataset(parser, list(_PHANTOMS))
    add_options(parser, {name: phantoms.options for name, phantoms in _PHANTOMS.items()})
    firsts = ", ".join(f"{name} {phantoms.first}" for name, phantoms in _PHANTOMS.items())
    shapes = "; ".join(f"{name} {','.join(map(str, phantoms.shape))}" for name, phantoms in _PHANTOMS.items())
    add = parser.add_argument
    add(
        "--cases",
        type=int,
        default=10,
        help="number of patients; for chaos, of CT patients and also of MR patients (default %(default)s)",
    )
    add("--first", type=int, help=f"number of the first patient (default: {firsts})")
    add("--seed", type=int, default=0, help="seed of the random numbers (default %(default)s)")
    add("--shape", metavar="X,Y[,Z]", help=f"number of voxels; for chaos, of CT images (default: {shapes})")
    add("--noise", type=float, help="standard deviation of the noise, in units of the signal (default 0.06)")
    add("--bias", type=float, help="standard deviation of the bias field (default 0.1)")
    add("--contrast", type=float, help="contrast of the tissues, 0 to 1 (default 1)")


def _phantom(options: argparse.Namespace) -> int:
    """Run the command ``phantom``, and return its exit status."""
    if options.cases < 1:
        raise UserError(f"--cases={options.cases}: expected 1 or more")
    if options.seed < 0 or (options.first or 0) < 0:
        raise UserError(f"--seed={options.seed}, --first={options.first}: expected 0 or more")
    phantoms = _PHANTOMS[options.dataset]
    for name, other in _PHANTOMS.items():
        for key in other.options.keys() - phantoms.options.keys():
            if getattr(options, key) is not None:
                raise UserError(f"--{key} is an option of --dataset={name}, not of --dataset={options.dataset}")
    difficulty = {key: getattr(options, key) for key in ("noise", "bias", "contrast")}
    phantoms.write(
        options.root,
        cases=options.cases,
        first=phantoms.first if options.first is None else options.first,
        seed=options.seed,
        shape=_shape(options.shape, len(phantoms.shape)) if options.shape else phantoms.shape,
        difficulty=phantom.Difficulty(**{key: value for key, value in difficulty.items() if value is not None}),
        progress=log.say,
        **{key: getattr(options, key) or option.default for key, option in phantoms.options.items()},
    )
    return 0


def _shape(text: str, sides: int) -> tuple[int, ...]:
    """Return the numbers of voxels in a comma-separated list. Raises UserError for anything else."""
    try:
        shape = tuple(int(n) for n in text.split(","))
    except ValueError as error:
        raise UserError(f"--shape={text}: expected {sides} numbers separated by commas") from error
    if len(shape) != sides or max(shape) > _MAX_SIDE:
        raise UserError(f"--shape={text}: expected {sides} numbers separated by commas, at most {_MAX_SIDE}")
    return shape


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
