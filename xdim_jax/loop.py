"""The training loop: steps, progress lines, checkpoints, validation, and leaving cleanly."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xdim_jax import checkpoint, log, mesh
from xdim_jax.errors import UserError
from xdim_jax.log import Recorder, duration, record, say
from xdim_jax.optim import Schedule, slow
from xdim_jax.step import TrainState

_SHOWN_LOSSES = 5  # last losses in the message about a NaN


@dataclasses.dataclass
class Progress:
    """What goes from step to step beside the state; saved with every checkpoint."""

    score_sum: list[float]  # hard Dice per region, summed over the steps of this epoch
    score_steps: int = 0
    validates: bool = False  # the training score has passed train.validate_after_score


@dataclasses.dataclass
class StopRequest:
    """The signal that asked the run to stop; 0: none."""

    signal: int = 0


class InterruptedValidationError(Exception):
    """Raised inside a validation when a stop was asked for."""


Validation = Callable[[Any, StopRequest], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What does not change from step to step. ``config`` is the ``train`` section."""

    config: Mapping[str, Any]
    per_epoch: int
    step: Callable[..., Any]
    key: jax.Array
    schedule: Schedule
    mesh: Mesh
    checkpoints: checkpoint.Checkpoints
    recorder: Recorder
    validate: Validation
    stop: StopRequest
    regions: tuple[str, ...]  # names of the network's channels

    @property
    def total(self) -> int:
        return self.per_epoch * self.config["epochs"]


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C set the request instead of killing the process; a second Ctrl-C kills."""
    stop = StopRequest()

    def handle(number: int, _frame: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        say(f"{signal.Signals(number).name}: saving after this step")

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def fit(
    run: Run, state: TrainState, progress: Progress, stream: Iterator[dict[str, Any]], *, validated: bool
) -> TrainState:
    """Goes on from ``state`` to the last step, or to a stop request.

    ``validated``: the validation that falls on the state's step, if any, is on record already.

    Raises:
        UserError: the loss is not finite; the data cannot be read; a checkpoint cannot be written.
    """
    start = int(state.step)
    if start and start % run.per_epoch == 0 and not validated and _due(run, progress, start):
        _validate(run, state)
        if run.stop.signal:
            return state
    compiled, pending, losses = None, [], []
    saved = interval = time.monotonic()
    for done in range(start + 1, run.total + 1):
        try:
            batch = mesh.put_batch(next(stream), run.mesh)
        except UserError:  # a file that cannot be read: the steps so far are not lost
            if done - 1 > start:
                _take_scores(progress, jax.device_get(pending))
                checkpoint.save_latest(run.checkpoints, state, dataclasses.asdict(progress))
            raise
        if compiled is None:
            compiled = _compile(run, state, batch)
            saved = interval = time.monotonic()
        state, metrics = compiled(state, batch, run.key)
        pending.append(metrics)
        epoch_ends = done % run.per_epoch == 0
        stopping = bool(run.stop.signal)
        saving = epoch_ends or stopping or time.monotonic() - saved > 60 * run.config["checkpoint_minutes"]
        if not (saving or done % run.config["log_every"] == 0):
            continue
        values = jax.device_get(pending)
        losses = _check_finite(done, values, losses)
        _report(run, done, values, (time.monotonic() - interval) / len(values))
        _take_scores(progress, values)
        if epoch_ends:
            _end_epoch(run, done, progress)
        if saving:
            checkpoint.save_latest(run.checkpoints, state, dataclasses.asdict(progress))
            saved = time.monotonic()
        if epoch_ends and _due(run, progress, done):
            _validate(run, state)
        # a signal that came after the save waits for the next step; past an epoch's end the step would hide from
        # the resumed run that this epoch's validation is missing
        if stopping or (epoch_ends and run.stop.signal):
            break
        pending, interval = [], time.monotonic()
    return state


def _compile(run: Run, state: TrainState, batch: dict[str, jax.Array]) -> Any:
    say("compile    train step ...")
    begin = time.monotonic()
    shardings = (mesh.replicated(run.mesh),) * 2
    step = jax.jit(run.step, donate_argnums=0, out_shardings=shardings)
    compiled = step.lower(state, batch, run.key).compile()
    say(f"compile    train step took {duration(time.monotonic() - begin)}")
    return compiled


def _take_scores(progress: Progress, values: list[dict[str, Any]]) -> None:
    for value in values:
        progress.score_sum = [s + float(v) for s, v in zip(progress.score_sum, value["score"], strict=True)]
    progress.score_steps += len(values)


def _check_finite(done: int, values: list[dict[str, Any]], before: list[float]) -> list[float]:
    """The last losses; the update is looked at too, so that no state that it broke is ever saved."""
    new = [float(v["loss"]) for v in values]
    for i, value in enumerate(values):
        if not all(math.isfinite(value[k]) for k in ("loss", "grad_norm", "update_norm")):
            raise log.NotFiniteError(done - len(new) + i + 1, (before + new[: i + 1])[-_SHOWN_LOSSES:])
    return (before + new)[-_SHOWN_LOSSES:]


def _report(run: Run, done: int, values: list[dict[str, Any]], seconds: float) -> None:
    means = {k: np.mean([v[k] for v in values], 0) for k in values[0]}
    scores = dict(zip(run.regions, means.pop("score").tolist(), strict=True))
    rate = float(run.schedule(done - 1))
    epoch = -(-done // run.per_epoch)
    shown = " ".join(f"{name} {score:.3f}" for name, score in scores.items())
    say(
        f"step {done}/{run.total}  epoch {epoch}/{run.config['epochs']}  loss {float(means['loss']):.4f}  {shown}  "
        f"lr {rate:.2e}  {seconds:.2f} s/step  left {duration(seconds * (run.total - done))}"
    )
    record(
        run.recorder,
        "train",
        done,
        {k: float(v) for k, v in means.items()}
        | {f"score_{k}": v for k, v in scores.items()}
        | {"epoch": done / run.per_epoch, "learning_rate": rate, "seconds_per_step": seconds},
    )


def _end_epoch(run: Run, done: int, progress: Progress) -> None:
    scores = [s / progress.score_steps for s in progress.score_sum]
    mean = sum(scores) / len(scores)
    record(run.recorder, "epoch", done, {"epoch": done / run.per_epoch, "score": mean})
    threshold = run.config["validate_after_score"]
    if not progress.validates and mean > threshold:
        progress.validates = True
        say(f"epoch score {mean:.3f} has passed {threshold}: validation begins")
    progress.score_sum, progress.score_steps = [0.0] * len(scores), 0


def _due(run: Run, progress: Progress, done: int) -> bool:
    """Validation once the training score has passed the gate (paper, Sect. 3.1.3), and always at the end."""
    epoch = done // run.per_epoch
    return done == run.total or (progress.validates and epoch % run.config["validate_every"] == 0)


def _validate(run: Run, state: TrainState) -> None:
    step, begin = int(state.step), time.monotonic()
    weights = slow(state.params)
    try:
        scores = run.validate((weights, state.stats), run.stop)
    except InterruptedValidationError:
        return
    dice = sum(scores.values()) / len(scores)
    if not math.isfinite(dice):
        raise UserError(f"the validation Dice at step {step} is {dice}; look at the validation cases in split.json")
    checkpoint.save_best(run.checkpoints, step, weights, state.stats, dice)  # whole before it is on record
    shown = " ".join(f"{name} {score:.3f}" for name, score in scores.items())
    say(f"validation at step {step}: Dice {dice:.3f} ({shown}), took {duration(time.monotonic() - begin)}")
    record(run.recorder, "validation", step, {"dice": dice} | {f"dice_{k}": v for k, v in scores.items()})
