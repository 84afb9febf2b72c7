"""Cross-validation: one run per fold, below one workdir, and what they come to together.

    <workdir>/fold0/ ... fold4/      an ordinary run each
    <workdir>/crossval.json          the best validation of every fold, their means and standard deviations

Folds may be trained one after the other by one command (``:fold=all``), or as separate jobs
(``:fold=2 --workdir=<workdir>/fold2``); ``:fold=all`` on the same workdir then trains what is missing, and sums up.
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
from xdim_jax.data.case import scan_cases
from xdim_jax.data.layouts.datasets import get_dataset
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import read_records

CROSSVAL_FILE = "crossval.json"


Runs = list[tuple[Config, Path]]


def train_folds(config: Config, workdir: Path, train: Callable[[Runs], int]) -> int:
    """Trains every fold that is not done, and sums up; returns the exit status of ``train`` if it is not 0.

    Raises:
        UserError: the data's own list has no folds to go through, or the workdir is of a single run.
    """
    folds = _count(config)
    if checkpoint.exist(workdir):
        raise UserError(f"{workdir} is the workdir of a single run; give another for fold=all")
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


def _count(config: Config) -> int:
    """How many folds there are: as the config says, or as the list that came with the data has."""
    data = config.data
    if data.split != "official":
        return data.folds
    if not data.root:
        raise UserError(
            "fold=all with config.data.split=official goes through the list of the data: give config.data.root"
        )
    splits = scan_cases(get_dataset(data), Path(data.root), need_labels=True).splits
    if len(splits) < 2:
        raise UserError(
            f"fold=all with config.data.split=official: the list in {data.root} has {len(splits)} folds, expected two "
            "or more; leave fold=all out, or give --config.data.split=folds"
        )
    return len(splits)


def summarise(workdir: Path, folds: int) -> dict[str, Any]:
    """The best validation of every fold, and mean and standard deviation (ddof 1) over folds.

    Raises:
        UserError: a fold has no validation on record.
    """
    best = {}
    for fold in range(folds):
        records = [r for r in read_records(workdir / f"fold{fold}") if r["kind"] == "validation"]
        if not records:
            raise UserError(f"{workdir / f'fold{fold}'} has no validation on record; train fold {fold} to its end")
        chosen = max(records, key=lambda r: r["dice"])
        best[f"fold{fold}"] = {k: v for k, v in chosen.items() if k == "step" or k.startswith("dice")}
    keys = [k for k in best["fold0"] if k != "step"]
    table = np.array([[scores[k] for k in keys] for scores in best.values()])
    return {
        "folds": best,
        "mean": dict(zip(keys, table.mean(0).tolist(), strict=True)),
        "sd": dict(zip(keys, table.std(0, ddof=1).tolist(), strict=True)),
    }


def format_summary(summary: dict[str, Any]) -> list[str]:
    """The summary as aligned lines."""
    keys = list(summary["mean"])
    rows = [("", *keys), *((fold, *(f"{s[k]:.3f}" for k in keys)) for fold, s in summary["folds"].items())]
    rows += [(name, *(f"{summary[name][k]:.3f}" for k in keys)) for name in ("mean", "sd")]
    width = max(len(cell) for row in rows for cell in row)
    return ["  ".join(f"{cell:>{width}}" for cell in row) for row in rows]
