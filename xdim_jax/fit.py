"""Train and evaluate an ensemble of networks on a folder of annotated cases, with all settings chosen automatically.

The steps are: verify the data, plan a recipe, prepare the cases, train all folds, choose post-processing by
cross-validation, evaluate, and write a report. The same command resumes an interrupted step and skips finished ones. To
edit the recipe before training begins, stop after the plan with --steps=plan, edit <workdir>/recipe.py, and run the
command again without --steps.

The command writes to the workdir: verify.json, recipe.py, recipe.html, fold0/ to fold4/, crossval.json,
postprocessing.json, predictions/ (every case, predicted by a network that was not trained on it), evaluation/ and
report.html. Predict other cases with python -m xdim_jax.predict --workdir=<workdir>.
"""

if __name__ == "__main__":  # this may restart the process, so it comes before the imports, which take seconds
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

import argparse
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax import evaluate, report
from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json
from xdim_jax.base.host import count_cores
from xdim_jax.base.signals import REQUEUE, StopRequest, catch_signals, say_stopped
from xdim_jax.data.case import describe, list_cases, meaning, scan_cases, usable_cases
from xdim_jax.data.datasets import DATASETS, get_dataset
from xdim_jax.data.images.names import files_below
from xdim_jax.data.options import add_options, read_section
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.data.store import default_folder, prepare_cases
from xdim_jax.data.verify import format_findings, verify
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.planning import postprocessing
from xdim_jax.planning.plan_data import absolute_store, check_hours, plan_recipe
from xdim_jax.runs import checkpoint
from xdim_jax.training import crossval
from xdim_jax.training.check import resolve_config
from xdim_jax.training.train import train_one_by_one

STEPS = ("verify", "plan", "prepare", "train", "evaluate")
_ASKED = {
    "section": "--dataset, --root or the options of the data set"
}  # key in the record of the plan -> its name in messages, if that is another
VERIFY_FILE = "verify.json"
RECIPE_FILE = "recipe.py"


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    options, overrides = _parser().parse_known_args(argv)
    last = STEPS.index(options.steps)
    _check_arguments(options, overrides, last)
    section = read_section(options, options.dataset) | {"root": str(options.root.absolute())}
    section = json.loads(json.dumps(section))  # as JSON, for comparison with the files in the workdir
    get_dataset(section)  # raises UserError before anything is read
    with catch_signals() as stop:
        return _run_steps(section, options, overrides, last, stop)


def _check_arguments(options: argparse.Namespace, overrides: Sequence[str], last: int) -> None:
    """Raise UserError for arguments that cannot be used, before the first step."""
    if unknown := [word for word in overrides if not word.startswith("--config.")]:
        raise UserError(f"unknown arguments {' '.join(unknown)}; see python -m xdim_jax.fit --help")
    if overrides and last < STEPS.index("prepare"):
        raise UserError(
            f"{' '.join(overrides)} has no effect on the plan; give it with --steps=prepare or later, or edit the "
            "recipe"
        )
    if own := [word for word in overrides if word.partition("=")[0] in ("--config.data.fold", "--config.data.root")]:
        raise UserError(f"{' '.join(own)}: fit trains all folds of the data in --root; omit it, or use xdim_jax.train")
    check_hours(options.hours)
    if bucket.is_address(options.workdir):
        raise UserError(f"--workdir={options.workdir}: expected a local folder; copy it to a bucket after the training")
    workdir, root = Path(options.workdir).resolve(), options.root.resolve()
    if workdir in (root, *root.parents):
        raise UserError(
            f"--workdir={options.workdir} is or contains the folder of the data, {options.root}: results would be "
            "mixed with the data; give another folder, which may also be inside of the data folder"
        )


def _run_steps(
    section: dict[str, Any], options: argparse.Namespace, overrides: Sequence[str], last: int, stop: StopRequest
) -> int:
    """Run all steps up to the last one, and return the exit status."""
    workdir = Path(options.workdir)
    written = [workdir, *([Path(options.store)] if options.store and not bucket.is_address(options.store) else [])]
    if status := _verify(section, workdir, options.jobs, written):
        return status
    if last < STEPS.index("plan"):
        return 0
    recipe = workdir / RECIPE_FILE
    _plan(section, recipe, options)
    if last < STEPS.index("prepare"):
        return 0
    config = load_config(f"{recipe}:fold=all", overrides)
    _prepare(config, options.jobs)
    if last < STEPS.index("train"):
        return 0
    if status := _train(config, workdir, stop):
        say_stopped(stop)
        return status
    if last < STEPS.index("evaluate"):
        return 0
    _evaluate(workdir, options.jobs)
    log.say(
        f"done       predict with: python -m xdim_jax.predict --workdir={workdir} --input=<cases> --output=<folder>"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "xdim_jax.fit",
        __doc__ or "",
        "Values of the recipe can be overridden: --config.<key>=<value>.\n\n"
        f"Exit status: 0 done; 1 verify found errors; 2 unusable input; {REQUEUE} stopped by SIGTERM, SIGUSR1 or "
        f"SIGHUP;\n130 stopped by Ctrl-C. After {REQUEUE} or 130, run the same command again to resume.\n\n"
        "example:\n  python -m xdim_jax.fit --root=/data/Dataset001_Name --workdir=runs/own --hours=8",
    )
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="nnunet", help="format of the data set (default: %(default)s)")
    add("--root", type=Path, required=True, help="folder of the data set")
    add("--workdir", required=True, help="folder for all results, created if it does not exist")
    add("--hours", type=float, default=8.0, help="hours for training all folds on this machine (default: %(default)s)")
    add(
        "--memory",
        default="",
        metavar="SIZE",
        help="memory of a training step per device, e.g. 16GiB (default: 90 %% of the device memory "
        "that JAX allocates; on a CPU, 60 %% of the host memory)",
    )
    add(
        "--folds",
        type=int,
        default=0,
        help="number of folds (default: as in the list of folds that comes with the data; without a list 5, or "
        "one per patient if there are fewer than 5 patients)",
    )
    add("--store", default="", help="folder of the prepared cases (default: <root>_prepared)")
    add(
        "--jobs",
        type=int,
        default=count_cores(),
        help="number of cases that are read concurrently (default: one per core)",
    )
    add("--steps", choices=STEPS, default=STEPS[-1], help="run the steps up to this one (default: %(default)s)")
    add_options(parser)
    return parser


def _verify(section: dict[str, Any], workdir: Path, jobs: int, written: Sequence[Path]) -> int:
    """Verify the data, unless the same files were verified before. Returns 1 if there are errors, else 0."""
    path, root = workdir / VERIFY_FILE, Path(section["root"])
    files = _digest(section, written)
    known = read_json(path) if path.is_file() else {}
    if isinstance(known, dict) and known.get("files") == files and known.get("section") == section:
        log.say(f"verify     {known['cases']} cases, already verified without errors")
        return 0
    findings = verify(get_dataset(section), root, jobs=jobs, progress=log.progress_bar("verify"))
    for line in format_findings(findings, root):
        log.say(line)
    if findings.errors:
        log.warn(f"{findings.errors} errors in {root}: correct them, and run the same command again")
        return 1
    problems = [problem.to_json() for problem in findings.problems]
    write_json(path, {"files": files, "section": section, "cases": findings.cases, "problems": problems})
    return 0


def _digest(section: dict[str, Any], written: Sequence[Path]) -> str:
    """Return a digest of the names, sizes and modification times of all files of the data.

    Files below the folders ``written``, into which this command writes, are not data, even if they are below the root.
    """
    root = Path(section["root"])
    cases = get_dataset(section).scan(root, False).cases if root.is_dir() else []
    real = root.resolve()
    own = [root / path.resolve().relative_to(real) for path in written if path.resolve().is_relative_to(real)]
    data = [path for path in files_below(root) if not any(path.is_relative_to(folder) for folder in own)]
    digest = hashlib.sha256()
    for path in sorted({*data, *(path for case in cases for path in case.files)}):
        try:
            state = path.stat()
        except OSError:  # `verify` reports the file if a case needs it
            digest.update(f"{path} absent\n".encode())
        else:
            digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _plan(section: dict[str, Any], recipe: Path, options: argparse.Namespace) -> None:
    """Plan the recipe, unless it exists. Raises UserError if it was planned for other data or with other options."""
    record = recipe.with_suffix(".json")
    root = Path(section["root"])
    dataset = get_dataset(section)
    cases = usable_cases(scan_cases(dataset, root, need_labels=True), root)
    asked = {
        "section": section,
        **meaning(describe(dataset)),
        "cases": [case.case_id for case in cases],
        "hours": options.hours,
        "memory": options.memory,
        "folds": options.folds,
        "store": absolute_store(options.store),
    }
    if recipe.is_file():
        if not record.is_file():
            raise UserError(
                f"{recipe} exists, but not {record.name}, which fit writes with it: expected a recipe that fit has "
                f"planned. Restore {record.name}, or delete {recipe} to plan again; or train your own recipe with "
                f"python -m xdim_jax.train --config={recipe}:fold=all"
            )
        known = read_json(record)
        if changed := [key for key in asked if key in known and known[key] != asked[key]]:
            raise UserError(
                f"{recipe} was planned with different values of {', '.join(_ASKED.get(key, key) for key in changed)}; "
                "give another --workdir, or delete this file to plan again"
            )
        log.say(f"plan       {recipe} exists and is used; delete it to plan again")
        return
    write_json(record, asked)  # before the recipe, whose existence means that the plan is complete
    plan_recipe(
        section,
        recipe,
        memory=options.memory,
        hours=options.hours,
        folds=options.folds,
        store=options.store,
        jobs=options.jobs,
    )


def _prepare(config: Config, jobs: int) -> None:
    """Prepare the cases that are not prepared yet."""
    dataset, root = get_dataset(config.data), Path(config.data.root)
    cases = list_cases(dataset, root, need_labels=True)
    settings = Preparation.from_config(config.data.prepare)
    base = config.data.store or default_folder(root)
    prepare_cases(dataset, cases, settings, base, jobs=jobs, say=log.say, progress=log.progress_bar("prepare"))


def _train(config: Config, workdir: Path, stop: StopRequest) -> int:
    """Train all folds that are not finished, and return the exit status."""
    assert config.data.fold == ALL_FOLDS
    resolved, _ = resolve_config(config)
    cache_programs()
    checkpoint.silence_orbax()
    return crossval.train_folds(resolved, workdir, functools.partial(train_one_by_one, stop=stop))


def _evaluate(workdir: Path, jobs: int) -> None:
    """Choose post-processing, predict the validation cases of all folds with it, score them, and write the report."""
    cache_programs()
    chosen = postprocessing.choose_postprocessing(workdir)
    log.say(f"chosen     post-processing: {postprocessing.describe(chosen)}")
    postprocessing.apply_postprocessing(workdir)
    evaluate.main([f"--workdir={workdir}", f"--jobs={jobs}"])
    report.main([f"--workdir={workdir}", f"--eval={workdir / 'evaluation'}", f"--out={workdir / 'report.html'}"])


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
