"""The earlier runs whose weights a run starts from, and validation patients on which they were trained.

The validation scores of such patients are too high, and so is the score by which the best weights are chosen.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xdim_jax.base.config import Config, leaves
from xdim_jax.base.errors import shorten
from xdim_jax.base.files import read_json
from xdim_jax.data.case import Case
from xdim_jax.runs.workdir import SPLIT_FILE, read_config
from xdim_jax.training.initial_weights import REPORT_FILE

_SPLIT_KEYS = ("seed", "data.split", "data.folds", "data.fold")  # keys on which the validation patients depend


class Seen(NamedTuple):
    """Validation patients on which an earlier run was trained: the run's workdir, and the fact as text."""

    workdir: Path
    text: str


def find_seen_patients(source: Mapping[str, Any], root: Path, validation: Sequence[Case]) -> Seen | None:
    """Find the validation patients on which the earlier runs were trained.

    Args:
        source: Origin of the initial weights, see `xdim_jax.nets.weights.Weights`.
        root: Folder of the data. Only runs with the same folder are compared.
        validation: The validation cases.

    Returns:
        The first earlier run with such patients; None if there is none.
    """
    patients = {case.patient for case in validation}
    for workdir in earlier_runs(source):
        if not (workdir / SPLIT_FILE).is_file():
            continue
        split = read_json(workdir / SPLIT_FILE)
        seen = patients & {split["patients"][case] for case in split["train"]}
        if seen and Path(split["root"]).resolve() == root.resolve():
            return Seen(
                workdir,
                f"{len(seen)} of {len(patients)} validation patients ({shorten(sorted(seen))}) were training patients "
                f"of {workdir}, from which the initial weights come, so their validation scores are too high",
            )
    return None


def earlier_runs(source: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the workdir from which weights come, and the workdirs from which that run started, the last run first."""
    known = set()
    while (name := source.get("workdir")) and name not in known:
        known.add(name)
        yield Path(name)
        report = Path(name) / REPORT_FILE
        source = read_json(report)["source"] if report.is_file() else {}


def describe_split(workdir: Path, config: Config) -> str:
    """Return, as text, the keys in which the split of an earlier run differs from a config, with the earlier values."""
    before, now = (dict(leaves(c)) for c in (read_config(workdir), config))
    changed = [f"config.{key}={before[key]}" for key in _SPLIT_KEYS if before.get(key, now[key]) != now[key]]
    return ", ".join(changed) or "its settings are the same, but the folder has other patients now"
