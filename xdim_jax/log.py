"""What a run tells: lines on the terminal, ``metrics.jsonl``, and TensorBoard scalars."""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from xdim_jax.errors import UserError
from xdim_jax.files import atomic_path, write_error

METRICS_FILE = "metrics.jsonl"


def say(line: str) -> None:
    """One line on the terminal, at once."""
    print(line, flush=True)


def warn(line: str) -> None:
    """A warning line."""
    say(f"warning: {line}")


def bar(title: str) -> Callable[[int, int], None]:
    """``show(done, total)``: a progress bar on a terminal; elsewhere a line for every tenth."""
    shown: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            if not shown:
                shown.append(tqdm(total=total, desc=title, unit="case"))
            shown[0].update(done - shown[0].n)
            if done == total:
                shown[0].close()
        elif done == total or done * 10 // total > (done - 1) * 10 // total:
            say(f"{title:<10} {done}/{total} cases")

    return show


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    minutes, s = divmod(total, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Open files of a run's record; ``None`` members on processes that do not write."""

    jsonl: IO[str] | None
    tensorboard: SummaryWriter | None


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; an unfinished last line (the run was killed) is left out."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(entry, dict) or not {"kind", "step"} <= entry.keys():
            break
        records.append(entry)
    return records


def open_recorder(workdir: Path, step: int, *, writes: bool) -> Recorder:
    """Opens the record to go on after ``step``; what a killed run had written beyond it is dropped.

    Raises:
        UserError: the workdir cannot be written.
    """
    if not writes:
        return Recorder(None, None)
    kept = [r for r in read_records(workdir) if r["step"] <= step]
    path = workdir / METRICS_FILE
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    try:
        tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        return Recorder(open(path, "a", encoding="utf-8"), tensorboard)
    except OSError as error:
        raise write_error(workdir / "tensorboard", error) from error


def record(recorder: Recorder, kind: str, step: int, values: dict[str, float]) -> None:
    """Appends one record and its scalars. Raises UserError if the disk refuses it."""
    if recorder.jsonl is None or recorder.tensorboard is None:
        return
    entry = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
    try:
        recorder.jsonl.write(json.dumps(entry) + "\n")
        recorder.jsonl.flush()
        os.fsync(recorder.jsonl.fileno())
        for name, value in values.items():
            recorder.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        recorder.tensorboard.flush()
    except OSError as error:
        raise write_error(Path(recorder.jsonl.name), error) from error


def close_recorder(recorder: Recorder) -> None:
    """Closes the files; losing the last buffered scalars to a full disk is not an error of its own."""
    for file in (recorder.jsonl, recorder.tensorboard):
        try:
            if file is not None:
                file.close()
        except OSError as error:
            warn(str(write_error(Path(METRICS_FILE), error)))


class NotFiniteError(UserError):
    """The loss became NaN or infinite."""

    def __init__(self, step: int, losses: list[float]):
        shown = ", ".join(f"{x:.4g}" for x in losses)
        super().__init__(
            f"the loss or the update is not finite at step {step} (last losses: {shown}). Checkpoints are only of "
            "steps before. Look at the intensities of the training data, or give a lower "
            "--config.optim.schedule.peak with another --workdir"
        )
