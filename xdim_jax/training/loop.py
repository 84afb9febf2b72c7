"""The training loop of one run, from its first step to its last.

`fit` repeats four operations:

1. It reads the next batch. Threads of `xdim_jax.data.pipeline` prepare batches in advance.
2. It copies the batch to the devices.
3. It calls the compiled training step. JAX returns before the devices have finished.
4. It calls `RunController.after_step`, which logs, saves, validates, and decides whether the run ends.

Metrics stay on the devices until they are needed: every ``log_every`` steps, before a checkpoint, and at the end of an
epoch. They are then fetched, checked to be finite, and recorded. An epoch ends with a record and a checkpoint. Once the
training score of an epoch has exceeded ``validate_after_score``, a validation follows every ``validate_every`` epochs.
The last step is always followed by a validation.

A signal does not interrupt a step. It sets a `StopRequest`, which the controller reads after each step; with several
processes, `xdim_jax.training.agreement` makes all of them stop after the same step. At most two steps are in the queue
of the devices, so that a run on slow devices soon ends after a signal.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.log import duration, say
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.pipeline import Activity
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import Recorder, read_records, record, record_cases, record_pictures
from xdim_jax.runs.state import TrainState, evaluation_weights
from xdim_jax.training import mesh, validation
from xdim_jax.training.agreement import SAVE, STOP, Agreement
from xdim_jax.training.choose_ops import compile_fastest
from xdim_jax.training.compiling import compile_step
from xdim_jax.training.label_maps import LabelMapWriter
from xdim_jax.training.mesh import Devices
from xdim_jax.training.optim import Schedule
from xdim_jax.training.profile import Profile
from xdim_jax.training.step_metrics import check_finite, record_every_step, report_progress
from xdim_jax.training.validation import InterruptedValidationError, Validation
from xdim_jax.training.watchdog import Watchdog


@dataclasses.dataclass
class Progress:
    """Values, other than the training state, that change from step to step. They are saved with every checkpoint.

    Attributes:
        score_sum: For each region, the sum of its training scores in this epoch, without steps that have none.
        score_steps: For each region, the number of these steps.
        validates: True once the training score of an epoch has exceeded ``train.validate_after_score``.
    """

    score_sum: list[float]
    score_steps: list[int]
    validates: bool = False

    def add(self, scores: Any) -> None:
        """Add the scores of one step; NaN means that no sample of the step had the region annotated."""
        values = np.asarray(scores, np.float64)
        known = np.isfinite(values)
        self.score_sum = (np.asarray(self.score_sum) + np.where(known, values, 0)).tolist()
        self.score_steps = (np.asarray(self.score_steps) + known).tolist()

    def end_epoch(self) -> float:
        """Return the mean score of the epoch over the regions, and start the next epoch."""
        scores = [s / n for s, n in zip(self.score_sum, self.score_steps, strict=True) if n]
        regions = len(self.score_sum)
        self.score_sum, self.score_steps = [0.0] * regions, [0] * regions
        return sum(scores) / max(len(scores), 1)


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that do not change from step to step.

    Attributes:
        config: The ``train`` section of the config.
        per_epoch: Steps per epoch.
        step: Training step, see `xdim_jax.training.step.make_train_step`.
        key: Random key of the run.
        schedule: Learning rate as a function of the step.
        devices: Devices on which the step runs.
        checkpoints: Open checkpoint folders.
        recorder: Open record files.
        validate: Validation function.
        label_maps: Writer of the label maps of validations.
        stop: Record of received signals.
        regions: Names of the scored regions.
        workdir: Folder of the run.
        ops_key: Key of this program in the record of measured implementations (`xdim_jax.training.choose_ops`); None
            if nothing is measured.
        activity: Current activity of the reading threads, for the watchdog.
    """

    config: Mapping[str, Any]
    per_epoch: int
    step: Callable[..., Any]
    key: jax.Array
    schedule: Schedule
    devices: Devices
    checkpoints: checkpoint.Checkpoints
    recorder: Recorder
    validate: Validation
    label_maps: LabelMapWriter
    stop: StopRequest
    regions: tuple[str, ...]
    workdir: Path
    ops_key: str | None = None
    activity: Activity = dataclasses.field(default_factory=Activity)

    @property
    def total(self) -> int:
        """Number of steps of the whole run."""
        return self.per_epoch * self.config["epochs"]


def fit(
    run: Run, state: TrainState, progress: Progress, stream: Iterator[dict[str, Any]], *, validated: bool
) -> TrainState:
    """Train from ``state`` to the last step, to a stop request, or until the score no longer improves.

    Args:
        run: The run.
        state: State to start from.
        progress: Progress to start from; updated in place.
        stream: Batches, starting with that of the next step.
        validated: True if the record already has a validation of ``state``.

    Returns:
        The last state.

    Raises:
        UserError: The loss is not finite, data cannot be read, or a checkpoint cannot be written.
    """
    controller = RunController(run, int(state.step), progress)
    controller.start(state, validated=validated)
    if controller.finished:
        return state
    compiled = None
    first_profiled = controller.steps_done + 1 + run.config["profile_start"]
    with (
        Watchdog(run.config["watchdog_seconds"], run.activity, say) as watchdog,
        Profile(run.workdir / "profile", first_profiled, run.config["profile_steps"]) as profile,
    ):
        while not controller.finished:
            batch = run.devices.put_batch(controller.next_batch(lambda: watchdog.next(stream), state))
            if compiled is None:
                compiled = _compile(run, state, batch)
                controller.program_is_compiled()
            number = controller.steps_done + 1
            profile.before(number)
            state, metrics = compiled(state, batch, run.key)
            profile.after(number, metrics)
            controller.after_step(metrics, state)
    return state


def _compile(run: Run, state: TrainState, batch: Any) -> Any:
    """Compile the training step of a run."""
    if run.ops_key is None:
        return compile_step(run.devices.lower, run.step, state, batch, run.key)
    return compile_fastest(run.workdir, run.ops_key, run.devices, run.step, state, batch, run.key)


class RunController:
    """Records, saves and validates one run, and decides when it ends.

    The caller computes the steps. It calls `next_batch` before each step, and `after_step` after it. One program can
    thus compute the steps of several runs (`xdim_jax.training.pack`), each of which has its own controller.

    Args:
        run: The run.
        start: Number of completed steps.
        progress: Progress so far; updated in place.
        slot: Index of this run along the first axis of the metrics, if a program computes the steps of several runs.
            None if metrics have no such axis.
        extract: Function that returns the state of this run, given the states of all runs of the program. None if the
            ``state`` arguments of the methods are the state of this run alone.

    Attributes:
        steps_done: Number of completed steps.
        finished: True if there is no further step.
    """

    def __init__(
        self,
        run: Run,
        start: int,
        progress: Progress,
        *,
        slot: int | None = None,
        extract: Callable[[Any], TrainState] | None = None,
    ):
        self.run, self.progress = run, progress
        self.steps_done, self.finished = start, start >= run.total
        self._start, self._slot, self._extract = start, slot, extract
        self._metrics: list[Any] = []  # metrics of the steps that are not recorded yet, on the devices
        self._digests: list[list[int]] = []  # digests of the samples of these steps
        self._runs = 1  # largest number of runs that shared one of these steps
        self._losses: list[float] = []  # losses of the last recorded steps, for messages
        self._agreement = Agreement()
        self._previous: Any = None  # loss of the previous step
        self._saved_at = self._recorded_at = time.monotonic()

    def start(self, state: Any, *, validated: bool) -> None:
        """Repeat an interrupted validation, and check whether the run has ended. Call this before the first step.

        Args:
            state: State before the first step.
            validated: True if the record has a validation of ``state``.
        """
        run, done = self.run, self.steps_done
        if done and done % run.per_epoch == 0 and not validated and self._validation_is_due():
            self._validate(state)
        if self._stop_is_agreed() or (not self.finished and self._out_of_patience()):
            self.finished = True

    def program_is_compiled(self) -> None:
        """Record that the step is compiled. From now on, a signal stops the run after a step, when it can be saved."""
        self._saved_at = self._recorded_at = time.monotonic()
        self.run.stop.busy = True

    def next_batch(self, read: Callable[[], dict[str, Any]], state: Any) -> dict[str, np.ndarray]:
        """Return the batch of the next step.

        Args:
            read: Function that returns the next batch of the stream.
            state: State after the last step.

        Raises:
            UserError: A file cannot be read. A run with one process saves ``state`` first. A run with several
                processes does not, because the others may already compute the next step, and all would have to take
                part in saving.
        """
        try:
            batch = read()
        except UserError:
            if self.steps_done > self._start and jax.process_count() == 1:
                self._record_metrics()
                self._save(state)
            raise
        self._digests.append(batch["digest"].tolist())
        request = self._agreement.attach(len(self._digests[-1]), self._request())
        return {k: v for k, v in batch.items() if k != "digest"} | request

    def after_step(self, metrics: dict[str, Any], state: Any, *, runs: int = 1) -> None:
        """Record the metrics, save and validate if due, and decide whether the run ends. Call this after each step.

        Args:
            metrics: Metrics of the step.
            state: State after the step.
            runs: Number of runs whose steps the program computed.

        Raises:
            UserError: The loss is not finite, or a checkpoint or a record cannot be written.
        """
        run = self.run
        self.steps_done += 1
        done = self.steps_done
        jax.block_until_ready(self._previous)
        self._previous = metrics["loss"]
        request = self._agreement.read(metrics, self._request())
        if request == STOP:
            run.stop.signal = run.stop.signal or signal.SIGTERM  # the signal may have reached another process
        self._metrics.append(metrics)
        self._runs = max(self._runs, runs)
        self.finished = done >= run.total
        epoch_ends = done % run.per_epoch == 0
        every = run.config["checkpoint_steps"]
        saves = epoch_ends or request > 0 or (every > 0 and done % every == 0)
        if not (saves or done % run.config["log_every"] == 0):
            return
        self._record_metrics(report=True)
        if epoch_ends:
            self._end_epoch()
        if saves:
            self._save(state)
            self._saved_at = time.monotonic()
        if epoch_ends and self._validation_is_due():
            self._validate(state)
            if not self.finished and self._out_of_patience():
                self.finished = True
                return
        # A signal that arrives after `request` was read takes effect after the next step. At the end of an epoch it
        # takes effect now, because it may have interrupted the validation. A resumed run repeats this validation only
        # if its last checkpoint is at the end of an epoch, so no further step may be computed.
        if request == STOP or (epoch_ends and self._stop_is_agreed()):
            self.finished = True
        self._recorded_at = time.monotonic()

    def _request(self) -> int:
        """Return the request of this process: `STOP` after a signal, `SAVE` if a checkpoint is due, else 0."""
        if self.run.stop.signal:
            return STOP
        return SAVE if time.monotonic() - self._saved_at > 60 * self.run.config["checkpoint_minutes"] else 0

    def _stop_is_agreed(self) -> bool:
        """Return whether a signal has reached any process. All processes must call this."""
        stop = self.run.stop
        if not mesh.agree(stop.signal > 0):
            return False
        stop.signal = stop.signal or signal.SIGTERM
        return True

    def _record_metrics(self, *, report: bool = False) -> None:
        """Fetch, check and record the metrics of the steps since the last call; with ``report``, log progress."""
        run, done = self.run, self.steps_done
        if not self._metrics:
            return
        metrics = jax.device_get(self._metrics)
        if self._slot is not None:
            metrics = [{k: v[self._slot] for k, v in values.items()} for values in metrics]
        self._losses = check_finite(done, metrics, self._losses)
        record_every_step(run.recorder, done, metrics, self._digests)
        if report:
            report_progress(
                run.recorder,
                metrics,
                done=done,
                total=run.total,
                per_epoch=run.per_epoch,
                regions=run.regions,
                learning_rate=float(run.schedule(done - 1)),
                seconds=(time.monotonic() - self._recorded_at) / len(metrics),
                runs=self._runs,
            )
        for values in metrics:
            self.progress.add(values["score"])
        self._metrics, self._digests, self._runs = [], [], 1

    def _end_epoch(self) -> None:
        """Record the training score of the epoch; validation begins once it exceeds ``validate_after_score``."""
        run = self.run
        score = self.progress.end_epoch()
        record(run.recorder, "epoch", self.steps_done, {"epoch": self.steps_done / run.per_epoch, "score": score})
        threshold = run.config["validate_after_score"]
        if not self.progress.validates and (threshold <= 0 or score > threshold):
            self.progress.validates = True
            if threshold > 0:
                say(f"the training score of this epoch, {score:.3f}, exceeds {threshold}: validation begins")

    def _save(self, state: Any) -> None:
        """Save a checkpoint."""
        checkpoint.save_latest(self.run.checkpoints, self._own(state), dataclasses.asdict(self.progress))

    def _own(self, state: Any) -> TrainState:
        """Return the state of this run, given a ``state`` argument."""
        return state if self._extract is None else self._extract(state)

    def _validation_is_due(self) -> bool:
        """Return True at the end of the run, and every ``validate_every`` epochs once validation has begun.

        The paper begins validation when the training score is high enough (Sect. 3.1.3).
        """
        run = self.run
        epoch = self.steps_done // run.per_epoch
        return self.steps_done == run.total or (self.progress.validates and epoch % run.config["validate_every"] == 0)

    def _validate(self, state: Any) -> None:
        """Validate, record the scores, and keep the weights if they are the best so far."""
        run, own = self.run, self._own(state)
        step, begin = int(own.step), time.monotonic()
        weights = evaluation_weights(own)
        try:
            scores, pictures, cases = run.validate(weights, run.stop)
        except InterruptedValidationError:
            run.label_maps.discard()
            return
        dice = sum(scores.values()) / len(scores) if scores else math.nan
        if not math.isfinite(dice):
            raise UserError(f"the validation Dice at step {step} is {dice}; check the validation cases in split.json")
        # before the score is recorded: a run that is killed in between validates again when it is resumed
        if checkpoint.save_best(run.checkpoints, step, *weights, dice):
            run.label_maps.keep()
        run.label_maps.discard()
        shown = " ".join(f"{name} {score:.3f}" for name, score in scores.items())
        say(f"validation at step {step}: Dice {dice:.3f} ({shown}), took {duration(time.monotonic() - begin)}")
        if run.recorder.jsonl is not None:
            validation.save_pictures(run.workdir, pictures)
        record_pictures(run.recorder, step, pictures)
        record_cases(run.recorder, step, cases)
        record(run.recorder, "validation", step, {"dice": dice} | {f"dice_{k}": v for k, v in scores.items()})

    def _out_of_patience(self) -> bool:
        """Return whether none of the last ``train.patience`` validations was better than the best one before them."""
        patience = self.run.config["patience"]
        if not patience:
            return False
        scores = [r["dice"] for r in read_records(self.run.workdir) if r["kind"] == "validation"]
        best = int(np.argmax(scores)) if scores else 0
        mine = [len(scores) - 1 - best, scores[best]] if scores else [0, 0.0]
        waited, highest = mesh.gather(np.array(mine, np.float32))[0]  # all processes use the record of process 0
        if waited < patience:
            return False
        say(
            f"ends early: the Dice of the last {patience} validations is not better than {highest:.3f} "
            "(config.train.patience)"
        )
        return True
