"""Names of the main files in the workdir of a run, and access to its resolved config."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xdim_jax.base.config import Config, differences
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json

CONFIG_FILE = "config.json"  # resolved config
DATA_FILE = "data.json"  # description of the data: channels, labels and regions
SPLIT_FILE = "split.json"  # training and validation cases
PREDICTIONS_FOLDER = "predictions"  # label maps of the validation cases


def find_members(workdirs: Sequence[Path]) -> list[Path]:
    """Return the workdirs of single runs, each once. A cross-validation is replaced by the workdirs of its folds."""
    found: list[Path] = []
    for workdir in workdirs:
        folds = [
            f for f in sorted(workdir.glob(f"fold*/{CONFIG_FILE}")) if f.parent.name.removeprefix("fold").isdigit()
        ]
        found += [workdir] if (workdir / CONFIG_FILE).is_file() or not folds else [f.parent for f in folds]
    return list({folder.resolve(): folder for folder in found}.values())


def claim_workdir(
    workdir: Path, config: Config, *, ignored: Sequence[str], continued: Sequence[str] = (), started: bool
) -> list[tuple[str, Any, Any]]:
    """Write the resolved config into the workdir; if a run was started there, check that it has the same config.

    Args:
        workdir: Folder of the run.
        config: Config of the run.
        ignored: Dotted keys that may differ from the config of a started run.
        continued: Further keys that may differ; ``train.epochs`` may only increase.
        started: True if the run has a checkpoint.

    Returns:
        The ``continued`` keys that differ, with the previous and the new value.

    Raises:
        UserError: The workdir belongs to another config (the message lists all differences), or cannot be written; or
            its path has a character with which orbax cannot read checkpoints.
    """
    if glob.escape(str(workdir.absolute())) != str(workdir.absolute()):
        raise UserError(
            f"the path of the workdir, {workdir.absolute()}, has one of the characters [ ? *, with which checkpoints "
            "could not be read again; give another --workdir"
        )
    path = workdir / CONFIG_FILE
    changed: list[tuple[str, Any, Any]] = []
    if started:
        found = differences(read_config(workdir), config, ignored=ignored)
        changed = [d for d in found if d[0] in continued and not (d[0] == "train.epochs" and d[1] > d[2])]
        differing = [f"{key}: {before!r} in {CONFIG_FILE}, {now!r} now" for key, before, now in found]
        if len(changed) < len(found):
            free = ", ".join(f"config.{key}" for key in (*continued, *ignored))
            raise UserError(
                f"{workdir} has a run with another config; give another --workdir, or the same config to resume it. "
                + (f"Only {free} may change, and epochs may only increase. " if continued else "")
                + "Differences:\n  "
                + "\n  ".join(differing)
            )
    write_json(path, config.to_dict())
    return changed


def read_config(workdir: Path) -> Config:
    """Return the resolved config of a run. Raises UserError if the folder is not a workdir."""
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}; give the --workdir of xdim_jax.train"
        )
    config = read_json(workdir / CONFIG_FILE)
    if not isinstance(config, dict) or not {"model", "data", "predict"} <= config.keys():
        raise UserError(f"{workdir / CONFIG_FILE} is not the config of a run: model, data or predict is missing")
    return ConfigDict(config)
