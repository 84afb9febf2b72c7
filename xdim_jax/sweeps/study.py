"""A study that any number of workers on any machines share: who may train what, and what becomes of a worker's trial
when the worker dies.

optuna keeps the trials: in a journal file, or a database. What it leaves open is settled here, for every storage alike.
A worker that trains a trial says every so often that it lives. When it no longer does, any other worker gives the trial
up and queues its parameters again, as a new trial of the same *origin*: the number of the first one, which names the
workdir, so that training goes on from its last checkpoint. Of an origin one trial runs at a time, and one ends.
"""

import logging
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.log import warn

BEAT = 20.0  # seconds between signs of life
GRACE = 120.0  # seconds without one, after which a worker counts as dead
ATTEMPTS = 5  # that a trial gets, each time from its last checkpoint

_ORIGIN, _ALIVE, _ERROR, _SURPLUS = "origin", "alive", "error", "surplus"


def import_optuna() -> Any:
    """optuna, quiet. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a sweep needs optuna: pip install 'xdim_jax[sweep]'") from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


def open_storage(text: str) -> Any:
    """A storage of optuna's.

    Args:
        text: a path, of a journal file; or the URL of a database: ``sqlite:///sweep.db``,
            ``postgresql://user:password@host/name``.

    Raises:
        UserError: it cannot be opened.
    """
    optuna = import_optuna()
    url = text.replace("postgresql://", "postgresql+psycopg://", 1)
    # workers of one sqlite file wait for each other; a connection that a database has closed is opened anew
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    attempt = 0
    while True:
        try:
            if "://" not in text:
                Path(text).parent.mkdir(parents=True, exist_ok=True)
                return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(text))
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except Exception as error:  # whatever the database's driver raises
            attempt += 1
            if "exists" in str(error) and attempt < 10:  # several first workers make the tables at once
                time.sleep(random.uniform(0.1, 1.0))
                continue
            reason = first_line(error)
            raise UserError(
                f"--storage={text} cannot be opened: {reason}; give a path for a journal file, or "
                "<dialect>://<user>:<password>@<host>/<database> (PostgreSQL: pip install 'psycopg[binary]')"
            ) from error


def grid_size(sampler: Any) -> int | None:
    """The number of points of a grid; None for other samplers."""
    return len(sampler._all_grids) if hasattr(sampler, "_all_grids") else None


SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "asha")


def make_sampler(name: str, distributions: dict[str, Any], seed: int | None) -> Any:
    """A sampler of optuna's.

    Raises:
        UserError: a grid over a range without steps.
    """
    samplers = import_optuna().samplers
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "tpe":  # constant_liar: workers that run at once do not look in one place
        return samplers.TPESampler(seed=seed, constant_liar=True)

    class Grid(samplers.GridSampler):
        """Ends nothing after its last point: that is the study's limit."""

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            pass

    grid: dict[str, list[Any]] = {}
    for key, d in distributions.items():
        if hasattr(d, "choices"):
            grid[key] = list(d.choices)
        elif d.step and not d.log:
            grid[key] = [d.low + i * d.step for i in range(round((d.high - d.low) / d.step) + 1)]
        else:
            raise UserError(f"--sampler=grid: {key} is a range without steps; give it step=..., or choices")
    return Grid(grid, seed=seed)


def make_pruner(name: str, *, warmup: int) -> Any:
    """A pruner of optuna's; ``warmup`` validations are waited for."""
    pruners = import_optuna().pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup)
    if name == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=max(warmup, 1), reduction_factor=3)
    return pruners.NopPruner()


def open_study(storage: Any, name: str, *, sampler: Any = None, pruner: Any = None, create: bool = True) -> Any:
    """A study, which maximises.

    Raises:
        UserError: there is none of that name, and none is to be made.
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
        raise UserError(f"--study={name} is not in this storage; studies there: {known}") from error


def agree(study: Any, facts: dict[str, Any]) -> None:
    """The first worker writes down what is searched; a later one must mean the same.

    Raises:
        UserError: it does not.
    """
    known = study.user_attrs
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)
        elif known[key] != value:
            raise UserError(
                f"--study={study.study_name} searches with another {key}: {known[key]!r} there, {value!r} here; "
                "give the same arguments, or another --study"
            )


def origin_of(trial: Any) -> int:
    """The number that a trial's workdir has."""
    return trial.user_attrs.get(_ORIGIN, trial.number)


def name_of(origin: int) -> str:
    """Of a trial, and of its workdir."""
    return f"trial{origin:04d}"


def shown(value: Any) -> str:
    """A parameter's value in a line or a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def by_origin(study: Any) -> dict[int, list[Any]]:
    """Trials, but for those that were one too many, in order."""
    groups: dict[int, list[Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        if _SURPLUS not in trial.user_attrs:
            groups.setdefault(origin_of(trial), []).append(trial)
    return groups


def outcome(trials: Sequence[Any]) -> Any:
    """Of the trials of an origin, the one that tells how it stands."""
    ended = [t for t in trials if t.state.name in ("COMPLETE", "PRUNED")]
    active = [t for t in trials if t.state.name in ("RUNNING", "WAITING")]
    return (ended or active or trials[-1:])[0]


def settled(trials: Sequence[Any]) -> bool:
    """Whether nothing more will come of an origin: it ended, or failed for good."""
    last = outcome(trials)
    if last.state.name == "FAIL":
        return _ERROR in last.user_attrs or len(trials) >= ATTEMPTS
    return last.state.is_finished()


def take(study: Any, limit: int) -> Any | None:
    """A trial for this worker: one that was given up, or else a new one while there are fewer than ``limit``."""
    state = import_optuna().trial.TrialState
    while True:
        waiting = study.get_trials(deepcopy=False, states=(state.WAITING,))
        if not waiting and len(by_origin(study)) >= limit:
            return None
        trial = study.ask()
        trial.set_user_attr(_ALIVE, time.time())
        groups = by_origin(study)
        origin = trial.user_attrs.get(_ORIGIN)
        if origin is None:  # several workers may have asked at once: the first ones of the study are within the limit
            surplus = sum(first < trial.number for first in groups) >= limit
            trial.set_user_attr(_SURPLUS if surplus else _ORIGIN, trial.number)
        else:
            others = [t for t in groups.get(origin, ()) if t.number != trial.number]
            surplus = any(
                t.state.name in ("COMPLETE", "PRUNED") or (t.state.name == "RUNNING" and t.number < trial.number)
                for t in others
            )
            if surplus:
                trial.set_user_attr(_SURPLUS, trial.number)
        if not surplus:
            return trial
        finish(study, trial, "FAIL")


def finish(study: Any, trial: Any, state: str, value: float | None = None, error: str = "") -> bool:
    """Ends a trial; False if it is this worker's no longer. With an ``error``, of its own, it is not tried again."""
    optuna = import_optuna()
    try:
        if error:
            trial.set_user_attr(_ERROR, error)
        study.tell(trial, value, state=optuna.trial.TrialState[state])
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):  # told already, by a worker that gave it up
        return False
    return True


def lost(study: Any, trial: Any) -> bool:
    """Whether another worker has given up this worker's trial."""
    return study._storage.get_trial(trial._trial_id).state.is_finished()


def revive(study: Any, grace: float = GRACE) -> list[int]:
    """Gives up trials whose workers are dead, and queues what nobody runs; returns the origins that were queued.

    Workers may do this at once: a trial that two of them queue is dropped by one of those that take it.
    """
    optuna = import_optuna()
    now = time.time()
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        seen = trial.user_attrs.get(_ALIVE) or trial.datetime_start.timestamp()
        if now - seen > grace:
            try:
                study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
    queued = []
    for origin, trials in by_origin(study).items():
        if not settled(trials) and outcome(trials).state.name == "FAIL":
            params = max((t.params for t in trials), key=len)  # a worker may have died while it drew them
            study.enqueue_trial(dict(params), user_attrs={_ORIGIN: origin})
            queued.append(origin)
    return queued


class Beat:
    """Says that a worker lives, while it trains a trial."""

    def __init__(self, study: Any, trial: Any, seconds: float = BEAT):
        self._study, self._trial, self._seconds = study, trial, seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Beat":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            try:
                self._study._storage.set_trial_user_attr(self._trial._trial_id, _ALIVE, time.time())
            except Exception as error:  # ended, or the storage is away for a while
                if not self._end.is_set() and "finished" not in str(error):
                    warn(f"trial {self._trial.number}: no sign of life could be written: {type(error).__name__}")
