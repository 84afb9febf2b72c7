"""The record of a run: ``*.jsonl`` files, TensorBoard and other experiment trackers."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import atomic_path, write_error
from xdim_jax.base.log import warn
from xdim_jax.runs.tensorboard import FOLDER, EventFile

METRICS_FILE = "metrics.jsonl"
VALIDATIONS_FILE = "validations.jsonl"  # Dice of every validation case and region, at every validation
STEPS_FILE = "steps.jsonl"  # for every step: unrounded loss and norms, and digests of the samples, for verify_run


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Open record files and trackers of a run; None or empty in processes that write no records.

    Attributes:
        jsonl: Open `METRICS_FILE`.
        validations: Open `VALIDATIONS_FILE`.
        steps: Open `STEPS_FILE`.
        tensorboard: TensorBoard's event file.
        trackers: Trackers, see `xdim_jax.runs.trackers`.
    """

    jsonl: IO[str] | None = None
    validations: IO[str] | None = None
    steps: IO[str] | None = None
    tensorboard: EventFile | None = None
    trackers: list[Any] = dataclasses.field(default_factory=list)


def read_records(workdir: Path, file: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first.

    Reading ends at the first line that is not a record, because the last line of a killed run may be incomplete.

    Args:
        workdir: Folder of the run.
        file: `METRICS_FILE`, `VALIDATIONS_FILE` or `STEPS_FILE`.
    """
    path = workdir / file
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(entry, dict) or "step" not in entry:
            break
        records.append(entry)
    return records


def open_recorder(workdir: Path, step: int, *, writes: bool, trackers: Sequence[Any] = ()) -> Recorder:
    """Open the record files of a run.

    Args:
        workdir: Folder of the run.
        step: Number of completed steps. Records of later steps, from a run that was killed, are deleted.
        writes: True if this process writes records.
        trackers: Open trackers, see `xdim_jax.runs.trackers`.

    Raises:
        UserError: The workdir cannot be written.
    """
    if not writes:
        return Recorder()
    names = (METRICS_FILE, VALIDATIONS_FILE, STEPS_FILE)
    for name in names:
        kept = [r for r in read_records(workdir, name) if r["step"] <= step]
        with atomic_path(workdir / name) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    try:
        tensorboard = EventFile(workdir, step)
        metrics, validations, steps = (open(workdir / name, "a", encoding="utf-8") for name in names)  # noqa: SIM115
        return Recorder(metrics, validations, steps, tensorboard, list(trackers))
    except OSError as error:
        raise write_error(workdir / FOLDER, error) from error


def record(recorder: Recorder, kind: str, step: int, values: Mapping[str, float]) -> None:
    """Append a record to `METRICS_FILE`, TensorBoard and the trackers.

    Args:
        recorder: Open record files.
        kind: Kind of the record, e.g. "train", "epoch" or "validation".
        step: Number of completed steps.
        values: Values by name. NaN and infinity become null in JSON, and are omitted in TensorBoard and trackers.

    Raises:
        UserError: A file cannot be written.
    """
    if recorder.jsonl is None or recorder.tensorboard is None:
        return
    entry = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
    entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    scalars = {f"{kind}/{name}": value for name, value in values.items() if math.isfinite(value)}
    try:
        recorder.jsonl.write(json.dumps(entry) + "\n")
        recorder.jsonl.flush()
        os.fsync(recorder.jsonl.fileno())
    except OSError as error:
        raise write_error(Path(recorder.jsonl.name), error) from error
    for name, value in scalars.items():
        recorder.tensorboard.add_scalar(name, value, step)
    recorder.tensorboard.flush()
    _call_trackers(recorder, lambda tracker: tracker.scalars(step, scalars))


def _call_trackers(recorder: Recorder, call: Callable[[Any], None]) -> None:
    """Call a function for every tracker. A tracker that fails (no server, full disk) is removed with a warning."""
    for tracker in list(recorder.trackers):
        try:
            call(tracker)
        except Exception as error:
            recorder.trackers.remove(tracker)
            with contextlib.suppress(Exception):  # else the next run of this process would be logged into this one
                tracker.close()
            reason = first_line(error)
            warn(f"{type(tracker).__name__.strip('_').lower()} has failed and is no longer used: {reason}")


def record_cases(recorder: Recorder, step: int, cases: Mapping[str, Mapping[str, float]]) -> None:
    """Append the Dice of every validation case by region. Raises UserError if they cannot be written."""
    if recorder.validations is None:
        return
    try:
        recorder.validations.write(json.dumps({"step": step, "cases": cases}) + "\n")
        recorder.validations.flush()
    except OSError as error:
        raise write_error(Path(recorder.validations.name), error) from error


def record_steps(recorder: Recorder, entries: Sequence[Mapping[str, Any]]) -> None:
    """Append the records of steps to `STEPS_FILE`. Raises UserError if they cannot be written."""
    if recorder.steps is None:
        return
    try:
        recorder.steps.write("".join(json.dumps(entry) + "\n" for entry in entries))
        recorder.steps.flush()
    except OSError as error:
        raise write_error(Path(recorder.steps.name), error) from error


def record_pictures(recorder: Recorder, step: int, pictures: Mapping[str, np.ndarray]) -> None:
    """Write pictures to TensorBoard and the trackers.

    Args:
        recorder: Open record files.
        step: Number of completed steps.
        pictures: Pictures by name, uint8 (H, W, 3).
    """
    if recorder.tensorboard is None:
        return
    for name, picture in pictures.items():
        recorder.tensorboard.add_picture(f"validation/{name}", picture, step)
    recorder.tensorboard.flush()
    _call_trackers(recorder, lambda tracker: tracker.pictures(step, pictures))


def close_recorder(recorder: Recorder) -> None:
    """Close the files. If the last buffered values cannot be written, log a warning."""
    _call_trackers(recorder, lambda tracker: tracker.close())
    for file in (recorder.jsonl, recorder.validations, recorder.steps, recorder.tensorboard):
        try:
            if file is not None:
                file.close()
        except OSError as error:
            warn(str(write_error(Path(METRICS_FILE), error)))


class NotFiniteError(UserError):
    """The loss, the gradient or the update of a step is not finite."""

    def __init__(self, step: int, losses: list[float]):
        shown = ", ".join(f"{x:.4g}" for x in losses)
        super().__init__(
            f"the loss, the gradient or the update is not finite at step {step} (last losses: {shown}). The saved "
            "checkpoints are from earlier steps and are not affected. Check the intensities of the training "
            "data, or give a lower --config.optim.schedule.peak with another --workdir"
        )
