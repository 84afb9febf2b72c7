"""Names of the main files in the workdir of a run, and access to its resolved config."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from xdim_jax.base.config import Config, differences
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json

CONFIG_FILE = "config.json"  # resolved config
DATA_FILE = "data.json"  # description of the data: channels, labels and regions
SPLIT_FILE = "split.json"  # training and validation cases


def find_members(workdirs: Sequence[Path]) -> list[Path]:
    """Return the workdirs of single runs, each once. A cross-validation contributes the workdirs of its folds."""
    found: list[Path] = []
    for workdir in workdirs:
        folds = sorted(workdir.glob(f"fold*/{CONFIG_FILE}"))
        found += [workdir] if (workdir / CONFIG_FILE).is_file() or not folds else [f.parent for f in folds]
    return list({folder.resolve(): folder for folder in found}.values())


def claim_workdir(workdir: Path, config: Config, *, ignored: Sequence[str], started: bool) -> None:
    """Write the resolved config into the workdir; if a run was started there, check that it has the same config.

    Args:
        workdir: Folder of the run.
        config: Config of the run.
        ignored: Dotted keys that may differ from the config of a started run.
        started: True if the run has been trained already.

    Raises:
        UserError: The workdir belongs to another config (the message lists all differences), or cannot be written.
    """
    path = workdir / CONFIG_FILE
    if started:
        differing = [
            f"{key}: {found!r} in {CONFIG_FILE}, {wanted!r} now"
            for key, found, wanted in differences(read_config(workdir), config, ignored=ignored)
        ]
        if differing:
            raise UserError(
                f"{workdir} has a run with another config; give another --workdir, or the same config to resume it. "
                "Differences:\n  " + "\n  ".join(differing)
            )
    write_json(path, config.to_dict())


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
