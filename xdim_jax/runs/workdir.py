"""Names of the files in the workdir of a run, and its resolved config."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from xdim_jax.base.config import Config, differences
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json

# in the workdir of a run: its resolved config, and what it was trained on (channels, labels, regions)
CONFIG_FILE, DATA_FILE = "config.json", "data.json"
SPLIT_FILE = "split.json"  # which cases it trains on and validates


def find_members(workdirs: Sequence[Path]) -> list[Path]:
    """Workdirs of runs; that of a cross-validation stands for its folds."""
    found: list[Path] = []
    for workdir in workdirs:
        folds = sorted(workdir.glob(f"fold*/{CONFIG_FILE}"))
        found += [workdir] if (workdir / CONFIG_FILE).is_file() or not folds else [f.parent for f in folds]
    return list({folder.resolve(): folder for folder in found}.values())


def claim_workdir(workdir: Path, config: Config, *, free: Sequence[str], started: bool) -> None:
    """Writes the resolved config; a run that has ``started`` must have the same one, but for the ``free`` keys.

    Raises:
        UserError: the workdir belongs to another config (every difference is listed), or cannot be written.
    """
    path = workdir / CONFIG_FILE
    if started:
        differing = [
            f"{key}: {found!r} there, {wanted!r} asked for"
            for key, found, wanted in differences(read_config(workdir), config, free=free)
        ]
        if differing:
            raise UserError(
                f"{workdir} holds a run of another config; give another --workdir, or the same config to resume it. "
                "Differences:\n  " + "\n  ".join(differing)
            )
    write_json(path, config.to_dict())


def read_config(workdir: Path) -> Config:
    """The resolved config of a run. Raises UserError if the folder is not a workdir."""
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}; give the --workdir of xdim_jax.train"
        )
    config = read_json(workdir / CONFIG_FILE)
    if not isinstance(config, dict) or not {"model", "data", "predict"} <= config.keys():
        raise UserError(f"{workdir / CONFIG_FILE} is not the config of a run: it lacks model, data or predict")
    return ConfigDict(config)
