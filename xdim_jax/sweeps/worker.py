"""A worker: takes trials of a study, trains each as a process of its own, and tells the study how it went."""

import ctypes
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base import bucket, log
from xdim_jax.base.log import LOG_FILE
from xdim_jax.base.signals import REQUEUE, StopRequest
from xdim_jax.runs.records import read_records
from xdim_jax.sweeps import study as studies
from xdim_jax.sweeps.space import Suggest, overrides_of

_LINES = 3  # of it, in the error of a trial that failed


@dataclasses.dataclass(frozen=True)
class Job:
    """What all trials share.

    Attributes:
        config: ``FILE[:WORDS]``.
        overrides: ``--config.<key>=<value>``, before those of the trial.
        suggest: draws a trial's parameters.
        root: the trials' workdirs lie below it; a folder, or gs://, s3://.
        trials: that the study is to have.
        command: that trains, before its flags.
    """

    config: str
    overrides: Sequence[str]
    suggest: Suggest
    root: str | Path
    trials: int
    command: Sequence[str] = (sys.executable, "-m", "xdim_jax.train")


def address_of(root: str | Path, origin: int) -> str:
    """The workdir of a trial: a path, or an address in a bucket."""
    return f"{root}/{studies.name_of(origin)}"


def workdir_of(root: str | Path, origin: int) -> Path:
    """The folder of this machine that is, or stands for, the workdir of a trial."""
    address = address_of(root, origin)
    return bucket.local_folder(address) if bucket.is_address(address) else Path(address)


def work(
    study: Any,
    job: Job,
    stop: StopRequest,
    *,
    beat: float = studies.BEAT,
    grace: float = studies.GRACE,
    wait: bool = True,
) -> int:
    """Trains trials until the study has all of them; returns the exit status.

    With ``wait`` it stays until those of other workers have ended, so that a trial whose worker dies is not lost.
    """
    while not stop.signal:
        revive(study, grace)
        trial = studies.take(study, job.trials)
        if trial is not None:
            with studies.Beat(study, trial, beat):
                _train(study, trial, job, stop, beat)
        elif not stay(study, stop, wait=wait, seconds=min(beat, 2.0)):
            break
    return stop.status if stop.signal else 0


def revive(study: Any, grace: float) -> None:
    """Queues the trials of workers that are dead, and says so."""
    for origin in studies.revive(study, grace):
        log.say(f"trial {origin}: its worker is gone; it goes on from its last checkpoint")


def stay(study: Any, stop: StopRequest, *, wait: bool, seconds: float) -> bool:
    """Whether a worker that finds nothing to take stays; it then has waited for a while."""
    if not wait or all(map(studies.settled, studies.by_origin(study).values())):
        return False
    _sleep(seconds, stop)
    return True


def _sleep(seconds: float, stop: StopRequest) -> None:
    end = time.monotonic() + seconds
    while not stop.signal and time.monotonic() < end:
        time.sleep(0.1)


def draw(trial: Any, job: Job) -> None:
    """A trial's parameters."""
    job.suggest(trial)
    settings = " ".join(f"{name}={studies.shown(value)}" for name, value in trial.params.items())
    log.say(f"trial {studies.origin_of(trial)}: {settings}")


def _train(study: Any, trial: Any, job: Job, stop: StopRequest, beat: float) -> None:
    draw(trial, job)
    workdir = workdir_of(job.root, studies.origin_of(trial))
    workdir.mkdir(parents=True, exist_ok=True)
    address = address_of(job.root, studies.origin_of(trial))
    command = [*job.command, f"--config={job.config}", f"--workdir={address}"]
    with open(workdir / LOG_FILE, "ab") as output:
        child = subprocess.Popen(
            [*command, *job.overrides, *overrides_of(trial.params)],
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
    told, looked, pruned, asked = 0, time.monotonic(), False, False
    while child.poll() is None:
        time.sleep(0.2)
        told, before = report(trial, workdir, told), told
        pruned = pruned or (not asked and told > before and trial.should_prune())
        gone = False
        if time.monotonic() - looked > beat:
            looked, gone = time.monotonic(), studies.lost(study, trial)
        if not asked and (stop.signal or pruned or gone):
            child.send_signal(signal.SIGTERM)  # it saves, and ends
            asked = True
    report(trial, workdir, told)
    tell(study, trial, workdir, child.returncode, pruned=pruned, stopped=bool(stop.signal))


def _die_with_parent() -> None:
    """In the child: a worker that is killed takes its training along, which else went on beside its successor."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def report(trial: Any, workdir: Path, told: int) -> int:
    """Tells the study of validations that are new; returns how many it knows."""
    scores = validations(workdir)
    for number in range(told, len(scores)):
        trial.report(scores[number], number + 1)
    return len(scores)


def validations(workdir: Path) -> list[float]:
    """The Dice of every validation so far."""
    return [r["dice"] for r in read_records(workdir) if r["kind"] == "validation"]


def tell(
    study: Any, trial: Any, workdir: Path, status: int, *, pruned: bool, stopped: bool = False, error: str = ""
) -> None:
    """How a trial's training ended, by its exit status and its record; the log's last lines, where no error is said."""
    origin, scores = studies.origin_of(trial), validations(workdir)
    if status == 0 and scores:
        mine = studies.finish(study, trial, "COMPLETE", max(scores))
        text = f"Dice {max(scores):.4f}"
    elif pruned:
        mine, text = studies.finish(study, trial, "PRUNED"), f"pruned after {len(scores)} validations"
    elif stopped or status == REQUEUE or status < 0:  # it can go on from its checkpoint, here or elsewhere
        mine, text = studies.finish(study, trial, "FAIL"), "given back"
    else:
        text = f"failed with status {status}: {error or _last_lines(workdir / LOG_FILE)}"
        mine = studies.finish(study, trial, "FAIL", error=text)
    log.say(f"trial {origin}: {text if mine else 'taken over by another worker'}")


def _last_lines(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-_LINES:])
