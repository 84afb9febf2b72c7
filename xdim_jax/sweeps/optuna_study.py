"""Studies with workers on any number of machines.

Optuna stores the study in a journal file or in a database. This module adds a limit on the number of trials, and
resumes trials whose worker has died:

- While a worker trains a trial, it stores a heartbeat in the trial every few seconds: the current time.
- If the heartbeats stop, any other worker marks the trial as failed and queues its parameters again.
- The queued parameters become a new Optuna trial, which is a further *attempt* at the same trial of the sweep. All
  attempts have the same *origin*: the number of the first attempt. The workdir is named after the origin, so the new
  attempt resumes training from the last checkpoint.

Optuna's own heartbeat and retry callback are not used, because they support databases only, not journal files, and
require `Study.optimize`, which cannot train several trials in one program.
"""

import itertools
import logging
import math
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.log import warn
from xdim_jax.base.signals import StopRequest

T = TypeVar("T")

HEARTBEAT_SECONDS = 20.0  # time between two heartbeats
GRACE_SECONDS = 120.0  # time without a heartbeat after which a worker counts as dead
_ATTEMPTS = 30  # attempts of `retry` to reach a storage whose error may not go away
MAX_ATTEMPTS = 5  # maximum number of attempts at a trial, without those that a signal stopped

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "asha")

# names of the user attributes of trials in the storage
_ORIGIN = "origin"  # number of the first attempt
_HEARTBEAT = "alive"  # time of the last heartbeat, seconds since the epoch
_STOPPED = "stopped"  # set if a signal stopped the attempt, which saved its state; it does not count as an attempt
_ERROR = "error"  # error message of a failed training; there is no further attempt
_SURPLUS = "surplus"  # set if the trial does not count, see `claim_trial`


def import_optuna() -> Any:
    """Return the module optuna, with its log reduced to warnings. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a sweep needs optuna: pip install 'xdim_jax[sweep]'") from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


def storage_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a storage that cannot be reached for a while."""
    exceptions = import_optuna().exceptions
    return exceptions.StorageInternalError, OSError


def retry(call: Callable[[], T], stop: StopRequest, seconds: float) -> T:
    """Call a function until the storage can be reached, with some seconds between the attempts.

    After a signal there is no further attempt, and the error of the storage is raised. So is an OSError, such as that
    of a file on a network drive, after `_ATTEMPTS` attempts.
    """
    for attempt in itertools.count(1):
        try:
            return call()
        except storage_errors() as error:  # e.g. the database restarts
            if stop.signal or (isinstance(error, OSError) and attempt == _ATTEMPTS):
                raise
            warn(f"the study cannot be reached ({first_line(error)}); trying again in {seconds:g} s")
            wait(stop, seconds)
    raise AssertionError


def wait(stop: StopRequest, seconds: float) -> None:
    """Wait for some seconds, or until a signal arrives."""
    end = time.monotonic() + seconds
    while not stop.signal and time.monotonic() < end:
        time.sleep(0.1)


def open_storage(text: str) -> Any:
    """Open a storage of optuna.

    Args:
        text: Path of a journal file, or URL of a database: ``sqlite:///sweep.db``,
            ``postgresql://user:password@host/name``.

    Returns:
        An `optuna.storages.BaseStorage`.

    Raises:
        UserError: The storage cannot be opened.
    """
    optuna = import_optuna()
    url = text.replace("postgresql://", "postgresql+psycopg://", 1)
    # sqlite: seconds to wait for the lock of another worker; other databases: reconnect after a lost connection
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    attempt = 0
    while True:
        try:
            if "://" not in text:
                Path(text).parent.mkdir(parents=True, exist_ok=True)
                return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(text))
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except Exception as error:  # each database driver has its own exceptions
            attempt += 1
            if "exists" in str(error) and attempt < 10:  # another worker is creating the same tables
                time.sleep(random.uniform(0.1, 1.0))
                continue
            reason = first_line(error)
            raise UserError(
                f"--storage={without_password(text)} cannot be opened: {reason}; give the path of a journal file, or "
                "<dialect>://<user>:<password>@<host>/<database> (PostgreSQL: pip install 'psycopg[binary]')"
            ) from error


def without_password(storage: str) -> str:
    """Return the address of a database for messages, with ``***`` in place of the password."""
    if "://" not in storage:
        return storage
    shown = re.sub(r"(://[^:/]*):[^@]*@", r"\1:***@", storage)
    return re.sub(r"(password=)[^&]*", r"\1***", shown)


def open_study(storage: Any, name: str, *, sampler: Any = None, pruner: Any = None, create: bool = True) -> Any:
    """Open a study that maximises the score.

    Args:
        storage: Result of `open_storage`.
        name: Name of the study.
        sampler: Result of `make_sampler`; None for optuna's default.
        pruner: Result of `make_pruner`; None for optuna's default.
        create: True to create the study if it does not exist.

    Returns:
        An `optuna.Study`.

    Raises:
        UserError: The study does not exist, and ``create`` is False.
    """
    optuna = import_optuna()
    if create:
        return optuna.create_study(
            study_name=name, storage=storage, sampler=sampler, pruner=pruner, direction="maximize", load_if_exists=True
        )
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        known = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise UserError(f"--study={name} is not in this storage; its studies are: {known}") from error


def record_search(study: Any, settings: dict[str, Any]) -> None:
    """Store the settings of the search in a new study. For an existing study, check that they are the same.

    Args:
        study: The study.
        settings: Name -> value. The values must be serialisable as JSON.

    Raises:
        UserError: The study was started with other settings.
    """
    known = study.user_attrs
    for key, value in settings.items():
        if key not in known:
            study.set_user_attr(key, value)
        elif known[key] != value:
            raise UserError(
                f"--study={study.study_name} was started with another {key}: {known[key]!r}, but this command has "
                f"{value!r}. Give the same arguments, or another --study"
            )


# -- samplers and pruners -----------------------------------------------------------------------------------------


def grid_size(distributions: dict[str, Any]) -> int:
    """Return the number of points of the grid over a space. Raises UserError as `_grid_values` does."""
    return math.prod(len(values) for values in _grid_values(distributions).values())


def _grid_values(distributions: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the values of every parameter. Raises UserError for a continuous or a logarithmic range."""
    grid: dict[str, list[Any]] = {}
    for key, d in distributions.items():
        if hasattr(d, "choices"):
            grid[key] = list(d.choices)
        elif d.step and not d.log:
            grid[key] = [d.low + i * d.step for i in range(round((d.high - d.low) / d.step) + 1)]
        else:
            raise UserError(
                f"--sampler=grid: {key} is a continuous or a logarithmic range; give it step=... without log, or use "
                "choices"
            )
    return grid


def _seeded(kind: Any, seed: int | None, **options: Any) -> Any:
    """Return a sampler whose draws depend on the seed and on the number of the trial.

    With one random stream for each process, all workers with the same seed would draw the same trials.
    """
    if seed is None:
        return kind(**options)

    def of_trial(*entropy: int) -> Any:
        return kind(seed=int(np.random.SeedSequence([seed, *entropy]).generate_state(1)[0]), **options)

    class Seeded(kind):
        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return of_trial(trial.number).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            own = of_trial(trial.number, zlib.crc32(param_name.encode()))
            return own.sample_independent(study, trial, param_name, param_distribution)

    return Seeded(seed=seed, **options)


def make_sampler(name: str, distributions: dict[str, Any], seed: int | None) -> Any:
    """Return a sampler of optuna.

    Args:
        name: One of `SAMPLERS`.
        distributions: Distributions of the space by name, see `xdim_jax.sweeps.space.explore`.
        seed: Seed of the sampler; with None it is random. The samplers ``random`` and ``tpe`` combine it with the
            number of the trial, so that the random numbers of a trial do not depend on the worker that runs it.
            ``grid`` does not use it, because all workers need the same order of the points.

    Raises:
        UserError: The sampler is a grid, and the space has a continuous or a logarithmic range.
    """
    samplers = import_optuna().samplers
    if name == "random":
        return _seeded(samplers.RandomSampler, seed)
    if name == "tpe":  # constant_liar: parallel workers avoid the neighbourhood of running trials
        return _seeded(samplers.TPESampler, seed, constant_liar=True)

    class Grid(samplers.GridSampler):
        """A grid sampler that never calls `Study.stop`, because that call is an error outside of `Study.optimize`."""

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            pass

    return Grid(_grid_values(distributions), seed=0)


def make_pruner(name: str, *, warmup: int) -> Any:
    """Return a pruner of optuna.

    Args:
        name: One of `PRUNERS`.
        warmup: Number of validations of a trial before it may be pruned.
    """
    pruners = import_optuna().pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup)
    if name == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=max(warmup, 1), reduction_factor=3)
    return pruners.NopPruner()


# -- trials and their attempts ------------------------------------------------------------------------------------


def origin_of(trial: Any) -> int:
    """Return the number of the first attempt at a trial."""
    return trial.user_attrs.get(_ORIGIN, trial.number)


def trial_name(origin: int) -> str:
    """Return the name of a trial, which is also the name of its workdir."""
    return f"trial{origin:04d}"


def format_value(value: Any) -> str:
    """Return the value of a parameter as text for logs and tables."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def training_seconds(attempt: Any) -> float | None:
    """Return the duration of an attempt; None if it has not ended.

    If its worker died, it ended with the last heartbeat, and not when another worker noticed this.
    """
    if attempt.duration is None:
        return None
    seconds = attempt.duration.total_seconds()
    died = attempt.state.name == "FAIL" and not {_STOPPED, _ERROR} & attempt.user_attrs.keys()
    if died and _HEARTBEAT in attempt.user_attrs:
        seconds = min(seconds, max(attempt.user_attrs[_HEARTBEAT] - attempt.datetime_start.timestamp(), 0.0))
    return seconds


def group_attempts(study: Any) -> dict[int, list[Any]]:
    """Return origin -> attempts at the trial, in the order of creation. Surplus trials are omitted."""
    groups: dict[int, list[Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        if _SURPLUS not in trial.user_attrs:
            groups.setdefault(origin_of(trial), []).append(trial)
    return groups


def deciding_attempt(attempts: Sequence[Any]) -> Any:
    """Return the attempt that determines the state of a trial.

    This is the attempt that is complete or pruned; if there is none, the active one; else the last failed one.
    """
    ended = [t for t in attempts if t.state.name in ("COMPLETE", "PRUNED")]
    active = [t for t in attempts if t.state.name in ("RUNNING", "WAITING")]
    return (ended or active or attempts[-1:])[0]


def has_ended(attempts: Sequence[Any]) -> bool:
    """Return whether a trial is complete or pruned, or has failed without a further attempt."""
    last = deciding_attempt(attempts)
    if last.state.name == "FAIL":
        return _ERROR in last.user_attrs or sum(_STOPPED not in t.user_attrs for t in attempts) >= MAX_ATTEMPTS
    return last.state.is_finished()


def claim_trial(study: Any, limit: int) -> Any | None:
    """Claim a trial for this worker: a queued trial, or a new one if the study has fewer than ``limit`` trials.

    Optuna cannot lock a study, so several workers may create more trials than the limit, or claim two attempts at the
    same trial. Therefore each worker checks its trial after claiming it. If other workers were earlier, it marks its
    trial as surplus, and starts again.

    Args:
        study: The study.
        limit: Maximum number of trials in the study.

    Returns:
        An `optuna.Trial`, or None if there is no trial to claim.
    """
    state = import_optuna().trial.TrialState
    while True:
        waiting = study.get_trials(deepcopy=False, states=(state.WAITING,))
        if not waiting and len(group_attempts(study)) >= limit:
            return None
        trial = study.ask()
        trial.set_user_attr(_HEARTBEAT, time.time())
        groups = group_attempts(study)
        origin = trial.user_attrs.get(_ORIGIN)
        if origin is None:  # a new trial counts if it is among the first ``limit`` trials
            surplus = sum(first < trial.number for first in groups) >= limit
            trial.set_user_attr(_SURPLUS if surplus else _ORIGIN, trial.number)
        else:  # of several running attempts at a queued trial, only the first counts
            others = [t for t in groups.get(origin, ()) if t.number != trial.number]
            surplus = any(
                t.state.name in ("COMPLETE", "PRUNED") or (t.state.name == "RUNNING" and t.number < trial.number)
                for t in others
            )
            if surplus:
                trial.set_user_attr(_SURPLUS, trial.number)
        if not surplus:
            return trial
        finish_trial(study, trial, "FAIL")


def finish_trial(
    study: Any, trial: Any, state: str, value: float | None = None, error: str = "", *, stopped: bool = False
) -> bool:
    """Store the final state of a trial.

    Args:
        study: The study.
        trial: An `optuna.Trial`, or its number if there is no ``error``.
        state: "COMPLETE", "PRUNED" or "FAIL".
        value: Score of a complete trial.
        error: Error message if training failed; there will be no further attempt.
        stopped: True if a signal stopped the trial, which has saved its state.

    Returns:
        True if the state was stored; False if another worker has already marked the trial as failed, see
        `requeue_dead_trials`.
    """
    optuna = import_optuna()
    try:
        if stopped:
            trial.set_user_attr(_STOPPED, True)
        if error:
            trial.set_user_attr(_ERROR, error)
        study.tell(trial, value, state=optuna.trial.TrialState[state])
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):  # ValueError: `tell` found a trial that has ended
        return False
    return True


def report_score(trial: Any, score: float, number: int) -> bool:
    """Report the score of validation ``number`` of a trial.

    Returns:
        True if the score was stored; False if another worker has already marked the trial as failed, see
        `requeue_dead_trials`.
    """
    try:
        trial.report(score, number)
    except import_optuna().exceptions.UpdateFinishedTrialError:
        return False
    return True


def is_running(study: Any, trial: Any) -> bool:
    """Return False if another worker has marked this trial as failed, see `requeue_dead_trials`."""
    running = study.get_trials(deepcopy=False, states=(import_optuna().trial.TrialState.RUNNING,))
    return any(other.number == trial.number for other in running)


def requeue_dead_trials(study: Any, grace: float = GRACE_SECONDS) -> list[int]:
    """Mark running trials of dead workers as failed, and queue a further attempt at every interrupted trial.

    Several workers may call this at the same time. If two of them queue the same trial, `claim_trial` drops one.

    Args:
        study: The study.
        grace: Seconds after which a worker without a heartbeat counts as dead.

    Returns:
        The origins of the queued trials.
    """
    running = import_optuna().trial.TrialState.RUNNING
    now = time.time()
    for trial in study.get_trials(deepcopy=False, states=(running,)):
        last_heartbeat = trial.user_attrs.get(_HEARTBEAT) or trial.datetime_start.timestamp()
        if now - last_heartbeat > grace:
            finish_trial(study, trial.number, "FAIL")
    queued = []
    for origin, attempts in group_attempts(study).items():
        if not has_ended(attempts) and deciding_attempt(attempts).state.name == "FAIL":
            # an attempt whose worker died early may not have all parameters
            params = max((t.params for t in attempts), key=len)
            study.enqueue_trial(dict(params), user_attrs={_ORIGIN: origin})
            queued.append(origin)
    return queued


class Heartbeat:
    """A context manager that writes the heartbeats of a trial from a thread.

    Args:
        trial: The trial that this worker has claimed.
        seconds: Time between two heartbeats.
    """

    def __init__(self, trial: Any, seconds: float = HEARTBEAT_SECONDS):
        self._trial, self._seconds = trial, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        """Write heartbeats until the trial ends or the context exits."""
        ended = import_optuna().exceptions.UpdateFinishedTrialError
        while not self._stop.wait(self._seconds):
            try:
                self._trial.set_user_attr(_HEARTBEAT, time.time())
            except ended:
                return
            except Exception as error:  # e.g. the database does not answer for a while
                if not self._stop.is_set():
                    name = type(error).__name__
                    warn(f"trial {origin_of(self._trial)}: the heartbeat cannot be written to the study: {name}")
