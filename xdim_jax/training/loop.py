"""The training loop: steps, progress lines, checkpoints, validation, and leaving cleanly."""

import collections
import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax import ops
from xdim_jax.base.errors import UserError
from xdim_jax.base.log import duration, say
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.pipeline import Activity
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import NotFiniteError, Recorder, read_records, record, record_pictures, record_steps
from xdim_jax.runs.state import TrainState, evaluated
from xdim_jax.training import mesh, validation
from xdim_jax.training.mesh import Devices
from xdim_jax.training.optim import Schedule
from xdim_jax.training.validation import InterruptedValidationError, Validation
from xdim_jax.training.watchdog import Watchdog

_SHOWN_LOSSES = 5  # last losses in the message about a NaN
_STOP, _SAVE = 2, 1  # what a process asks all others for
_LAG = 2  # steps after which it is heard: by then the step is done, so that reading it waits for nothing


@dataclasses.dataclass
class Progress:
    """What goes from step to step beside the state; saved with every checkpoint."""

    score_sum: list[float]  # hard Dice per region, summed over the steps of this epoch
    score_steps: list[int]  # steps that had the region
    validates: bool = False  # the training score has passed train.validate_after_score


@dataclasses.dataclass(frozen=True)
class Run:
    """What does not change from step to step. ``config`` is the ``train`` section."""

    config: Mapping[str, Any]
    per_epoch: int
    step: Callable[..., Any]
    key: jax.Array
    schedule: Schedule
    devices: Devices
    checkpoints: checkpoint.Checkpoints
    recorder: Recorder
    validate: Validation
    stop: StopRequest
    regions: tuple[str, ...]  # names of what is scored
    workdir: Path
    activity: Activity = dataclasses.field(default_factory=Activity)

    @property
    def total(self) -> int:
        return self.per_epoch * self.config["epochs"]


def fit(
    run: Run, state: TrainState, progress: Progress, stream: Iterator[dict[str, Any]], *, validated: bool
) -> TrainState:
    """Goes on from ``state`` to the last step, to a stop request, or until the score no longer rises.

    ``validated``: the validation that falls on the state's step, if any, is on record already.

    Raises:
        UserError: the loss is not finite; the data cannot be read; a checkpoint cannot be written.
    """
    course = Course(run, int(state.step), progress)
    course.resume(state, validated=validated)
    if course.goes_on:
        with contextlib.ExitStack() as stack:
            watchdog = stack.enter_context(Watchdog(run.config["watchdog_seconds"], run.activity, say))
            profile = stack.enter_context(_Profile(run, course.done))
            state = _steps(course, state, stream, watchdog, profile)
    return state


def _steps(
    course: "Course", state: TrainState, stream: Iterator[dict[str, Any]], watchdog: Watchdog, profile: "_Profile"
) -> TrainState:
    run, compiled = course.run, None
    while course.goes_on:
        batch = run.devices.put_batch(course.read(functools.partial(watchdog.next, stream), state))
        if compiled is None:
            compiled = compile_step(run.devices.lower, run.step, state, batch, run.key)
            course.begin()
        profile.before(course.done + 1)
        state, metrics = compiled(state, batch, run.key)
        profile.after(course.done + 1, metrics)
        course.take(metrics, state)
    return state


Pick = Callable[[Any], TrainState]


class Course:
    """What surrounds the steps of one run: the record, checkpoints, validation, and when it ends.

    The steps themselves are taken by whoever holds the program: for every one of them, `read` and then `take`.

    Args:
        run: what does not change.
        start: steps that are done.
        progress: of the run so far.
        slot: where the run's metrics lie along a first axis, if steps are those of several runs at once.
        pick: takes the run's own state out of what `read` and `take` are given.

    Attributes:
        done: steps.
        goes_on: whether there is a further step to take.
    """

    def __init__(self, run: Run, start: int, progress: Progress, *, slot: int | None = None, pick: Pick | None = None):
        self.run, self.progress = run, progress
        self._slot, self._pick = slot, pick
        self.done, self.goes_on = start, start < run.total
        self._start = start
        self._pending: list[Any] = []  # metrics that were not looked at yet
        self._digests: list[list[int]] = []
        self._losses: list[float] = []
        self._agreement = _Agreement(run)
        self._saved = self._interval = time.monotonic()

    def resume(self, state: Any, *, validated: bool) -> None:
        """Before the first step: validates where the run before was stopped in between, and looks whether to go on."""
        run = self.run
        if self.done and self.done % run.per_epoch == 0 and not validated and _due(run, self.progress, self.done):
            _validate(run, self._own(state))
        if _stopped(run) or (self.goes_on and _stale(run)):
            self.goes_on = False

    def begin(self) -> None:
        """From now on there is something to lose: the program is compiled."""
        self._saved = self._interval = time.monotonic()
        self.run.stop.busy = True

    def read(self, next_batch: Callable[[], dict[str, Any]], state: Any) -> dict[str, np.ndarray]:
        """The batch of the next step, with this process's wishes.

        Raises:
            UserError: a file cannot be read; ``state``, of the steps so far, is saved by a process that is alone. Of
                several, the others are in the next step, and would not be there to save with this one.
        """
        try:
            batch = next_batch()
        except UserError:
            if self.done > self._start and jax.process_count() == 1:
                values = self._values()
                _check_finite(self.done, values, self._losses)
                _record_steps(self.run, self.done, values, self._digests)
                _take_scores(self.progress, values)
                self._save(state)
            raise
        self._digests.append(batch["digest"].tolist())
        wishes = self._agreement.say(len(self._digests[-1]), self._saved)
        return {k: v for k, v in batch.items() if k != "digest"} | wishes

    def take(self, metrics: dict[str, Any], state: Any) -> None:
        """After a step: what it gave, and the state that it left.

        Raises:
            UserError: the loss is not finite; a checkpoint cannot be written.
        """
        run = self.run
        self.done = done = self.done + 1
        ask = self._agreement.hear(metrics, self._saved)
        self._pending.append(metrics)
        epoch_ends, stopping = done % run.per_epoch == 0, ask >= _STOP
        every = run.config["checkpoint_steps"]
        saving = epoch_ends or ask > 0 or (every > 0 and done % every == 0)
        self.goes_on = done < run.total
        if not (saving or done % run.config["log_every"] == 0):
            return
        values = self._values()
        self._losses = _check_finite(done, values, self._losses)
        _record_steps(run, done, values, self._digests)
        _report(run, done, values, (time.monotonic() - self._interval) / len(values))
        _take_scores(self.progress, values)
        if epoch_ends:
            _end_epoch(run, done, self.progress)
        if saving:
            self._save(state)
            self._saved = time.monotonic()
        if epoch_ends and _due(run, self.progress, done):
            _validate(run, self._own(state))
            if done < run.total and _stale(run):
                self.goes_on = False
                return
        # a signal that came after the save waits for the next step; past an epoch's end the step would hide from
        # the resumed run that this epoch's validation is missing
        if stopping or (epoch_ends and _stopped(run)):
            self.goes_on = False
            return
        self._pending, self._digests, self._interval = [], [], time.monotonic()

    def _values(self) -> list[dict[str, Any]]:
        values = jax.device_get(self._pending)
        return values if self._slot is None else [{k: v[self._slot] for k, v in value.items()} for value in values]

    def _own(self, state: Any) -> TrainState:
        return state if self._pick is None else self._pick(state)

    def _save(self, state: Any) -> None:
        checkpoint.save_latest(self.run.checkpoints, self._own(state), dataclasses.asdict(self.progress))


def _stopped(run: Run) -> bool:
    """Whether a signal has reached this process or another."""
    if not mesh.agree(run.stop.signal > 0):
        return False
    run.stop.signal = run.stop.signal or signal.SIGTERM
    return True


class _Agreement:
    """What processes ask for: to save now, or to stop. All hear it at the same step.

    A process that is alone hears itself at once. Several put it into the batch; the step gives back the largest of all
    (see `xdim_jax.training.step.make_train_step`), which is read `_LAG` steps later.
    """

    def __init__(self, run: Run):
        self._run, self._alone = run, jax.process_count() == 1
        self._heard: collections.deque[Any] = collections.deque()

    def _wish(self, saved: float) -> int:
        if self._run.stop.signal:
            return _STOP
        return _SAVE if time.monotonic() - saved > 60 * self._run.config["checkpoint_minutes"] else 0

    def say(self, samples: int, saved: float) -> dict[str, np.ndarray]:
        """What goes into the batch."""
        return {} if self._alone else {"ask": np.full(samples, self._wish(saved), np.int32)}

    def hear(self, metrics: dict[str, Any], saved: float) -> int:
        """What is asked for, after a step."""
        if self._alone:
            return self._wish(saved)
        self._heard.append(metrics.pop("ask"))
        if len(self._heard) <= _LAG:
            return 0
        ask = int(jax.device_get(self._heard.popleft()))
        if ask == _SAVE:
            self._heard.clear()  # the wishes on their way are the same one
        if ask == _STOP:
            self._run.stop.signal = self._run.stop.signal or signal.SIGTERM
        return ask


class _Profile:
    """A profile of some steps, into ``<workdir>/profile``."""

    def __init__(self, run: Run, start: int):
        first = start + 1 + run.config["profile_start"]
        self._first, self._last = first, first + run.config["profile_steps"] - 1
        self._folder, self._open = run.workdir / "profile", False

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Begins with the first step."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._open = True

    def after(self, step: int, results: Any) -> None:
        """Ends after the last one."""
        if self._open and step == self._last:
            jax.block_until_ready(results)
            self._stop()
            say(f"profile    of {self._last - self._first + 1} steps in {self._folder}: tensorboard, or Perfetto")

    def _stop(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


def compile_step(lower: Callable[..., Any], *arguments: Any) -> Any:
    """What ``lower(*arguments)`` gives, compiled: in a thread, so that a signal is heard meanwhile."""
    say("compile    train step ...")
    begin = time.monotonic()
    with ops.counted() as forms:
        lowered = lower(*arguments)
    for words, count in forms.most_common():
        say(f"           {count:4d} {words}")
    outcome: list[Any] = []

    def compile_it() -> None:
        try:
            outcome.append((ops.compile_program(lowered), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=compile_it, name="compile", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    compiled, error = outcome[0]
    if error is not None:
        raise error
    ops.keep_freed_memory()
    say(f"compile    train step took {duration(time.monotonic() - begin)}")
    return compiled


def _take_scores(progress: Progress, values: Sequence[Mapping[str, Any]]) -> None:
    for value in values:
        scores = np.asarray(value["score"], np.float64)
        known = np.isfinite(scores)
        progress.score_sum = (np.asarray(progress.score_sum) + np.where(known, scores, 0)).tolist()
        progress.score_steps = (np.asarray(progress.score_steps) + known).tolist()


def _check_finite(done: int, values: list[dict[str, Any]], before: list[float]) -> list[float]:
    """The last losses; the update is looked at too, so that no state that it broke is ever saved."""
    new = [float(v["loss"]) for v in values]
    for i, value in enumerate(values):
        if not all(math.isfinite(value[k]) for k in ("loss", "grad_norm", "update_norm")):
            raise NotFiniteError(done - len(new) + i + 1, (before + new[: i + 1])[-_SHOWN_LOSSES:])
    return (before + new)[-_SHOWN_LOSSES:]


def _record_steps(run: Run, done: int, values: list[dict[str, Any]], digests: list[list[int]]) -> None:
    entries = []
    shares = mesh.gather(np.array(digests, np.uint32))  # (processes, steps, samples of a process)
    for i, (value, digest) in enumerate(zip(values, np.concatenate(shares, 1).tolist(), strict=True)):
        numbers = {k: float(value[k]) for k in ("loss", "grad_norm", "update_norm")}
        entries.append({"step": done - len(values) + i + 1, **numbers, "batch": digest})
    record_steps(run.recorder, entries)


def _report(run: Run, done: int, values: list[dict[str, Any]], seconds: float) -> None:
    scores = _mean_scores([v["score"] for v in values])
    means = {k: float(np.mean([v[k] for v in values])) for k in values[0] if k != "score"}
    rate = float(run.schedule(done - 1))
    epoch = -(-done // run.per_epoch)
    shown = " ".join(f"{name} {score:.3f}" for name, score in zip(run.regions, scores, strict=True))
    say(
        f"step {done}/{run.total}  epoch {epoch}/{run.config['epochs']}  loss {means['loss']:.4f}  {shown}  "
        f"lr {rate:.2e}  {seconds:.2f} s/step  left {duration(seconds * (run.total - done))}"
    )
    record(
        run.recorder,
        "train",
        done,
        means
        | {f"score_{k}": v for k, v in zip(run.regions, scores, strict=True)}
        | {"epoch": done / run.per_epoch, "learning_rate": rate, "seconds_per_step": seconds},
    )


def _mean_scores(scores: Sequence[Any]) -> list[float]:
    """Per region, over the steps that had it; NaN where none had."""
    table = np.asarray(scores, np.float64)
    known = np.isfinite(table)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, table, 0).sum(0) / np.maximum(count, 1), np.nan).tolist()


def _end_epoch(run: Run, done: int, progress: Progress) -> None:
    scores = [s / n for s, n in zip(progress.score_sum, progress.score_steps, strict=True) if n]
    mean = sum(scores) / max(len(scores), 1)
    record(run.recorder, "epoch", done, {"epoch": done / run.per_epoch, "score": mean})
    threshold = run.config["validate_after_score"]
    if not progress.validates and mean > threshold:
        progress.validates = True
        if threshold > 0:
            say(f"epoch score {mean:.3f} has passed {threshold}: validation begins")
    progress.score_sum, progress.score_steps = [0.0] * len(run.regions), [0] * len(run.regions)


def _due(run: Run, progress: Progress, done: int) -> bool:
    """Validation once the training score has passed the gate (paper, Sect. 3.1.3), and always at the end."""
    epoch = done // run.per_epoch
    return done == run.total or (progress.validates and epoch % run.config["validate_every"] == 0)


def _validate(run: Run, state: TrainState) -> None:
    step, begin = int(state.step), time.monotonic()
    weights = evaluated(state)
    try:
        scores, pictures = run.validate(weights, run.stop)
    except InterruptedValidationError:
        return
    dice = sum(scores.values()) / len(scores)
    if not math.isfinite(dice):
        raise UserError(f"the validation Dice at step {step} is {dice}; look at the validation cases in split.json")
    checkpoint.save_best(run.checkpoints, step, *weights, dice)  # whole before it is on record
    shown = " ".join(f"{name} {score:.3f}" for name, score in scores.items())
    say(f"validation at step {step}: Dice {dice:.3f} ({shown}), took {duration(time.monotonic() - begin)}")
    if run.recorder.jsonl is not None:
        validation.keep_pictures(run.workdir, pictures)
    record_pictures(run.recorder, step, pictures)
    record(run.recorder, "validation", step, {"dice": dice} | {f"dice_{k}": v for k, v in scores.items()})


def _stale(run: Run) -> bool:
    """Whether ``train.patience`` validations have gone by without a better score; counted on the record."""
    patience = run.config["patience"]
    if not patience:
        return False
    scores = [r["dice"] for r in read_records(run.workdir) if r["kind"] == "validation"]
    waited = len(scores) - 1 - int(np.argmax(scores)) if scores else 0
    if mesh.gather(np.array(waited))[0] < patience:  # process 0 has written the record
        return False
    say(f"ends early: {patience} validations without a better Dice than {max(scores):.3f} (config.train.patience)")
    return True
