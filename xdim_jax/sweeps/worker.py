"""A worker: it claims trials of a study, trains each in a separate process, and stores the results in the study."""

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
from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import write_error
from xdim_jax.base.log import LOG_FILE
from xdim_jax.base.signals import REQUEUE, StopRequest
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.sweeps import optuna_study as studies
from xdim_jax.sweeps.space import Suggest, overrides_of

STOPPED_BY_USER = 130  # exit status of training after Ctrl-C
_MAX_FAILURES = 3  # number of consecutive trials that fail before their first step, after which a worker stops
_ERROR_LINES = 3  # number of last log lines that are stored as the error of a failed trial


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings that all trials of a sweep have in common.

    Attributes:
        config: Recipe, as ``FILE[:VARIANT,...]``.
        overrides: Arguments ``--config.<key>=<value>``; the parameters of a trial follow them and take precedence.
        suggest: Function that samples the parameters of a trial, see `xdim_jax.sweeps.space`.
        root: Folder of the workdirs of all trials, or an address in a bucket (gs://, s3://).
        trials: Number of trials in the study.
        command: Training command without its arguments.
    """

    config: str
    overrides: Sequence[str]
    suggest: Suggest
    root: str | Path
    trials: int
    command: Sequence[str] = (sys.executable, "-m", "xdim_jax.train")


def trial_address(root: str | Path, origin: int) -> str:
    """Return the workdir of a trial: a path, or an address in a bucket."""
    return f"{root}/{studies.trial_name(origin)}"


def local_workdir(root: str | Path, origin: int) -> Path:
    """Return the local workdir of a trial. For a workdir in a bucket, this is the folder of its local copy."""
    address = trial_address(root, origin)
    return bucket.local_folder(address) if bucket.is_address(address) else Path(address)


def run_worker(
    study: Any,
    job: Job,
    stop: StopRequest,
    *,
    heartbeat: float = studies.HEARTBEAT_SECONDS,
    grace: float = studies.GRACE_SECONDS,
    wait: bool = True,
) -> int:
    """Train trials until all trials of the study have ended.

    Args:
        study: Study, see `xdim_jax.sweeps.optuna_study.open_study`.
        job: Settings of the trials.
        stop: Record of received signals; a signal stops the current trial and the worker.
        heartbeat: Seconds between two heartbeats.
        grace: Seconds after which a worker without a heartbeat counts as dead.
        wait: If no trial can be claimed, True to wait until the trials of other workers have ended, and to resume
            them if their workers die; False to return at once.

    Returns:
        The exit status.

    Raises:
        UserError: Several trials in a row have failed before their first step, so this machine probably cannot train.
    """
    failures, able = 0, False

    def claim() -> Any:
        requeue_dead_trials(study, grace)
        return studies.claim_trial(study, job.trials)

    def has_others() -> bool:
        return wait_for_others(study, stop, seconds=min(heartbeat, 2.0))

    while not stop.signal:
        try:
            trial = studies.retry(claim, stop, heartbeat)
            if trial is None and not (wait and studies.retry(has_others, stop, heartbeat)):
                break
        except studies.storage_errors():
            if not stop.signal:
                raise
            break
        if trial is not None:
            with studies.Heartbeat(trial, heartbeat):
                error = _train(study, trial, job, stop, heartbeat)
            started = (local_workdir(job.root, studies.origin_of(trial)) / STEPS_FILE).is_file()
            able = able or started  # later failures, e.g. for a patch that is too large, are due to the parameters
            failures = failures + 1 if error and not started else 0
            if not able:
                check_failures(failures, error)
    return stop.status if stop.signal else 0


def check_failures(count: int, error: str) -> None:
    """Raise UserError if so many trials in a row have failed before their first step that this machine cannot train."""
    if count >= _MAX_FAILURES:
        raise UserError(
            f"{count} trials in a row have failed before their first step on this machine, so this worker stops and "
            f"leaves the others to other workers. The last one {error}. Correct the cause, and run the same command "
            "again"
        )


def requeue_dead_trials(study: Any, grace: float) -> None:
    """Call `xdim_jax.sweeps.optuna_study.requeue_dead_trials`, and log the numbers of the queued trials."""
    for origin in studies.requeue_dead_trials(study, grace):
        log.say(f"trial {origin}: interrupted and queued again; it will resume from its last checkpoint")


def wait_for_others(study: Any, stop: StopRequest, *, seconds: float) -> bool:
    """Return False if all trials have ended; otherwise wait for some seconds, and return True."""
    if all(map(studies.has_ended, studies.group_attempts(study).values())):
        return False
    studies.wait(stop, seconds)
    return True


def suggest_parameters(trial: Any, job: Job) -> None:
    """Sample the parameters of a trial, and log them."""
    job.suggest(trial)
    settings = " ".join(f"{name}={studies.format_value(value)}" for name, value in trial.params.items())
    log.say(f"trial {studies.origin_of(trial)}: {settings}")


def _train(study: Any, trial: Any, job: Job, stop: StopRequest, heartbeat: float) -> str:
    """Train a trial in a new process. Returns the error if training failed, else "".

    The process receives SIGTERM if this worker receives a signal, if the trial is pruned, or if another worker has
    marked the trial as failed.
    """
    workdir = local_workdir(job.root, studies.origin_of(trial))
    try:
        studies.retry(lambda: suggest_parameters(trial, job), stop, heartbeat)
    except studies.storage_errors():
        if not stop.signal:
            raise
        return ""  # another worker will queue the trial again
    address = trial_address(job.root, studies.origin_of(trial))
    command = [*job.command, f"--config={job.config}", f"--workdir={address}"]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        output = open(workdir / LOG_FILE, "ab")  # noqa: SIM115
    except OSError as error:
        raise write_error(workdir / LOG_FILE, error) from error
    with output:
        child = subprocess.Popen(
            [*command, *job.overrides, *overrides_of(trial.params)],
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_kill_when_parent_dies,
        )
    reported, checked_at, pruned, terminated, taken_over = 0, time.monotonic(), False, False, False
    while child.poll() is None:
        time.sleep(0.2)
        if taken_over:  # the child process is about to end
            continue
        try:
            before = reported
            reported = report_validations(trial, workdir, reported)
            pruned = pruned or (not terminated and reported > before and trial.should_prune())
            if time.monotonic() - checked_at > heartbeat:
                checked_at, taken_over = time.monotonic(), not studies.is_running(study, trial)
        except studies.storage_errors() as error:  # e.g. the database restarts: training continues
            log.warn(f"the study cannot be reached ({first_line(error)}); trying again in {heartbeat:g} s")
            checked_at = _wait(child, stop, heartbeat)
        if not terminated and (stop.signal or pruned or taken_over):
            child.send_signal(signal.SIGTERM)  # training saves a checkpoint and exits
            terminated = True

    def finish() -> str:
        report_validations(trial, workdir, reported)
        return record_result(study, trial, workdir, child.returncode, pruned=pruned, stopped=bool(stop.signal))

    try:
        return studies.retry(finish, stop, heartbeat)
    except studies.storage_errors() as error:
        if not stop.signal:
            raise
        log.warn(f"{workdir}: the result could not be stored ({first_line(error)}); another worker will resume it")
        return ""


def _wait(child: subprocess.Popen[bytes], stop: StopRequest, seconds: float) -> float:
    """Wait for some seconds, or until the process ends or a signal arrives. Returns the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and child.poll() is None and not stop.signal:
        time.sleep(0.1)
    return time.monotonic()


def _kill_when_parent_dies() -> None:
    """Ask Linux to kill this training process when the worker dies, because another worker will resume the trial."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # exists on Linux only
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def report_validations(trial: Any, workdir: Path, reported: int) -> int:
    """Report new validation scores to the study.

    Args:
        trial: The trial.
        workdir: Its workdir.
        reported: Number of validations that have already been reported.

    Returns:
        The number of validations that have now been reported. If another worker has marked the trial as failed, nothing
        more is reported.
    """
    scores = validation_scores(workdir)
    for number in range(reported, len(scores)):
        if not studies.report_score(trial, scores[number], number + 1):
            return number
    return len(scores)


def validation_scores(workdir: Path) -> list[float]:
    """Return the Dice of every validation so far."""
    return [r["dice"] for r in read_records(workdir) if r["kind"] == "validation"]


def record_result(
    study: Any, trial: Any, workdir: Path, status: int, *, pruned: bool, stopped: bool = False, error: str = ""
) -> str:
    """Store the result of a trial in the study, and log it. Returns the error if training failed, else "".

    Args:
        study: The study.
        trial: The trial.
        workdir: Its workdir. The score is the best validation Dice in its record.
        status: Exit status of training; negative if a signal killed the process.
        pruned: True if the trial was stopped because it was pruned.
        stopped: True if the trial was stopped because this worker received a signal.
        error: Error message if training failed; empty to use the last lines of the log.
    """
    origin, scores, failed = studies.origin_of(trial), validation_scores(workdir), ""
    if status == 0 and scores:
        stored = studies.finish_trial(study, trial, "COMPLETE", max(scores))
        text = f"complete, best validation Dice {max(scores):.4f}"
    elif pruned:
        stored, text = studies.finish_trial(study, trial, "PRUNED"), f"pruned after {len(scores)} validations"
    elif stopped or status == REQUEUE or status < 0:  # this or another worker can resume it from its checkpoint
        orderly = status in (REQUEUE, STOPPED_BY_USER)
        stored, text = studies.finish_trial(study, trial, "FAIL", stopped=orderly), "stopped; a worker will resume it"
        if studies.has_ended(studies.group_attempts(study).get(origin, [trial])):
            text = f"interrupted {studies.MAX_ATTEMPTS} times without a clean stop; it will not be resumed"
    else:
        text = failed = f"failed with status {status}: {error or _last_lines(workdir / LOG_FILE)}"
        stored = studies.finish_trial(study, trial, "FAIL", error=text)
    log.say(f"trial {origin}: {text if stored else 'another worker has taken it over'}")
    return failed


def _last_lines(path: Path) -> str:
    """Return the last lines of a log in one line; empty if there is no log."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-_ERROR_LINES:])
