"""Check, record and log the metrics of training steps.

The metrics of a step are those that `xdim_jax.training.step.make_train_step` returns: ``loss`` and its parts,
``grad_norm``, ``update_norm``, and ``score``, the hard Dice of each region (NaN if no sample has the region annotated).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xdim_jax.base.log import duration, say
from xdim_jax.runs.records import NotFiniteError, Recorder, record, record_steps
from xdim_jax.training import mesh

Metrics = Mapping[str, Any]
_SHOWN_LOSSES = 5  # number of losses in the message about a loss that is not finite


def check_finite(done: int, metrics: Sequence[Metrics], losses: Sequence[float]) -> list[float]:
    """Check that loss, gradient and update of the last steps are finite.

    The update is checked in addition to the loss, so that a state with a NaN is never saved.

    Args:
        done: Number of completed steps.
        metrics: Metrics of the last steps, oldest first.
        losses: Losses of earlier steps, for the message.

    Returns:
        The last few losses, for the next call.

    Raises:
        NotFiniteError: The loss, the gradient or the update of a step is not finite.
    """
    new = [float(m["loss"]) for m in metrics]
    for i, values in enumerate(metrics):
        if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm", "update_norm")):
            raise NotFiniteError(done - len(new) + i + 1, [*losses, *new[: i + 1]][-_SHOWN_LOSSES:])
    return [*losses, *new][-_SHOWN_LOSSES:]


def record_every_step(recorder: Recorder, done: int, metrics: Sequence[Metrics], digests: list[list[int]]) -> None:
    """Append a record for each of the last steps to ``steps.jsonl``: loss, norms, and digests of the batch.

    Args:
        recorder: Record of the run.
        done: Number of completed steps.
        metrics: Metrics of the last steps, oldest first.
        digests: For each of these steps, the digests of the samples that this process has read. The record has those of
            all processes.
    """
    shares = mesh.gather(np.array(digests, np.uint32))  # (processes, steps, samples of one process)
    entries = []
    for i, (values, digest) in enumerate(zip(metrics, np.concatenate(shares, 1).tolist(), strict=True)):
        numbers = {k: float(values[k]) for k in ("loss", "grad_norm", "update_norm")}
        entries.append({"step": done - len(metrics) + i + 1, **numbers, "batch": digest})
    record_steps(recorder, entries)


def report_progress(
    recorder: Recorder,
    metrics: Sequence[Metrics],
    *,
    done: int,
    total: int,
    per_epoch: int,
    regions: Sequence[str],
    learning_rate: float,
    seconds: float,
    runs: int,
) -> None:
    """Log a line about the progress, and write a record with the means over the last steps.

    Args:
        recorder: Record of the run.
        metrics: Metrics of the last steps.
        done: Number of completed steps.
        total: Number of steps of the whole run.
        per_epoch: Steps per epoch.
        regions: Names of the scored regions.
        learning_rate: Learning rate of the last step.
        seconds: Seconds per step.
        runs: Number of runs that shared the steps. It is recorded if there are several, because ``seconds`` is then
            not the time of one run.
    """
    scores = mean_scores([m["score"] for m in metrics])
    means = {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0] if k != "score"}
    shown = " ".join(f"{name} {score:.3f}" for name, score in zip(regions, scores, strict=True))
    say(
        f"step {done}/{total}  epoch {-(-done // per_epoch)}/{total // per_epoch}  loss {means['loss']:.4f}  {shown}  "
        f"lr {learning_rate:.2e}  {seconds:.2f} s/step  left {duration(seconds * (total - done))}"
    )
    by_region = {f"score_{k}": v for k, v in zip(regions, scores, strict=True)}
    rest = {"epoch": done / per_epoch, "learning_rate": learning_rate, "seconds_per_step": seconds}
    rest |= {"runs": runs} if runs > 1 else {}
    record(recorder, "train", done, means | by_region | rest)


def mean_scores(scores: Sequence[Any]) -> list[float]:
    """Return the mean score of each region over the steps in which it is finite; NaN if there is none."""
    table = np.asarray(scores, np.float64)
    known = np.isfinite(table)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, table, 0).sum(0) / np.maximum(count, 1), np.nan).tolist()
