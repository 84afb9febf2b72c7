"""Cross-validation: one run per fold, below one workdir, and a summary of all folds.

    <workdir>/fold0/ ... fold4/      workdirs of the runs
    <workdir>/crossval.json          the best validation of each fold, their means and standard deviations

One command can train all folds (``:fold=all``). Alternatively, each fold is trained by a separate job, e.g. with
``:fold=2`` and ``--workdir=<workdir>/fold2``. A later ``:fold=all`` on the same workdir then trains only the folds that
are not finished, and writes the summary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax.base import log
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_json
from xdim_jax.data.case import Case, scan_cases, usable_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.reading import check_grids
from xdim_jax.data.splits import limit_patients
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import read_records
from xdim_jax.training.run_data import check_annotated, check_sizes, split_found_cases

CROSSVAL_FILE = "crossval.json"

Runs = list[tuple[Config, Path]]


def train_folds(config: Config, workdir: Path, train: Callable[[Runs], int]) -> int:
    """Train every fold that is not finished, and write the summary.

    Args:
        config: Config of a recipe whose ``data.fold`` means all folds; it is not changed.
        workdir: Folder of the cross-validation.
        train: Function that trains runs, given by config and workdir, and returns an exit status.

    Returns:
        The exit status of ``train``.

    Raises:
        UserError: The list in the data folder has fewer than two folds, a fold has no validation, or ``workdir`` is
            that of a single run.
    """
    folds = _count_folds(config.data)
    _check_cases(config, folds)
    if checkpoint.exists(workdir):
        raise UserError(f"{workdir} is the workdir of a single run; give another --workdir for fold=all")
    runs = []
    for fold in range(folds):
        chosen = config.copy_and_resolve_references()
        chosen.data.fold = fold
        runs.append((chosen, workdir / f"fold{fold}"))
    if status := train(runs):
        return status
    if jax.process_index() == 0:
        summary = summarise(workdir, folds)
        write_json(workdir / CROSSVAL_FILE, summary)
        for line in format_summary(summary):
            log.say(line)
    return 0


def _check_cases(config: Config, folds: int) -> None:
    """Raise UserError if a fold cannot be trained, before the first fold is trained.

    It cannot if it has no annotated validation case, or if a training case is too large for the sampling.
    """
    data = config.data
    dataset = get_dataset(data)
    if not data.root:
        return
    scan = scan_cases(dataset, Path(data.root), need_labels=True)
    cases = usable_cases(scan, Path(data.root))
    check_grids(cases)
    trained: dict[str, Case] = {}
    for fold in range(folds):
        chosen = config.copy_and_resolve_references().data
        chosen.fold = fold
        train, validation = split_found_cases(chosen, config.seed, cases, scan.splits)
        check_annotated(dataset, validation, fold)
        trained |= {case.case_id: case for case in limit_patients(train, data.train_patients, config.seed)}
    check_sizes(data, dataset, Path(data.root), list(trained.values()))


def _count_folds(data: Any) -> int:
    """Return the number of folds: that of the config, or with split=official that of the list in the data folder."""
    if data.split != "official":
        return data.folds
    if not data.root:
        raise UserError(
            "fold=all with config.data.split=official needs the list of folds in the data folder; give "
            "--config.data.root=<folder>"
        )
    splits = scan_cases(get_dataset(data), Path(data.root), need_labels=True).splits
    if len(splits) < 2:
        raise UserError(
            f"fold=all with config.data.split=official: the list in {data.root} has {len(splits)} folds, expected two "
            "or more; remove fold=all, or give --config.data.split=folds"
        )
    return len(splits)


def summarise(workdir: Path, folds: int) -> dict[str, Any]:
    """Return the best validation of each fold, and mean and standard deviation (ddof 1) over the folds.

    The score of a region is averaged over the folds that have it: a fold has no score of a region that is annotated in
    none of its validation cases. A score of a single fold has no standard deviation.

    Raises:
        UserError: A fold has no recorded validation.
    """
    best = {}
    for fold in range(folds):
        records = [r for r in read_records(workdir / f"fold{fold}") if r["kind"] == "validation"]
        if not records:
            raise UserError(f"{workdir / f'fold{fold}'} has no recorded validation; train fold {fold} to its end first")
        chosen = max(records, key=lambda r: r["dice"])
        best[f"fold{fold}"] = {k: v for k, v in chosen.items() if k == "step" or k.startswith("dice")}
    keys = dict.fromkeys(k for scores in best.values() for k in scores if k != "step")
    values = {k: [scores[k] for scores in best.values() if k in scores] for k in keys}
    return {
        "folds": best,
        "mean": {k: float(np.mean(v)) for k, v in values.items()},
        "sd": {k: float(np.std(v, ddof=1)) for k, v in values.items() if len(v) > 1},
    }


def format_summary(summary: dict[str, Any]) -> list[str]:
    """Return the summary as aligned lines of text, with ``-`` for a value that does not exist."""
    keys = list(summary["mean"])
    lines = {**summary["folds"], "mean": summary["mean"], "sd": summary["sd"]}
    rows = [("", *keys), *((name, *(f"{s[k]:.3f}" if k in s else "-" for k in keys)) for name, s in lines.items())]
    width = max(len(cell) for row in rows for cell in row)
    return ["  ".join(f"{cell:>{width}}" for cell in row) for row in rows]
