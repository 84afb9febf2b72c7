"""Checkpoints with orbax: the whole state to resume from, and the best weights to predict with.

<workdir>/checkpoints/<step>/   the two latest training states, written in the background
<workdir>/best/<step>/          weights and running statistics of the best validation
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.runs.state import TrainState
from xdim_jax.runs.workdir import CONFIG_FILE

KEPT = 2  # latest states: should the newest turn out damaged, the one before is whole
LATEST_FOLDER, BEST_FOLDER = "checkpoints", "best"
_TRIES = 5  # to read weights that a run may replace at any time
_SCORE = "dice"
_PARTIAL = ".orbax-checkpoint-tmp"  # in the name of what orbax has not finished


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The two managers of a workdir; close with `close`.

    All processes of a run save together, into one folder. Where each has a disk of its own, process 0 does it ``alone``
    (every process holds the whole state); the others have no managers.
    """

    latest: ocp.CheckpointManager | None
    best: ocp.CheckpointManager | None
    alone: bool = False


_LOGGERS = ("absl", "asyncio")  # orbax logs every save and restore at INFO


def quieten_process() -> None:
    """Silence messages of orbax for the rest of the process. For entry points only, because it changes global state.

    If a write fails, orbax raises an error, and in addition every other array of that save logs, warns that a coroutine
    was never awaited, or reports a closed event loop. These messages come from background threads, at any time.
    """
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _ignore_closed_loops


def _ignore_closed_loops(event: Any) -> None:
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of orbax inside the block, and restore the levels of its loggers afterwards."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def exist(workdir: Path) -> bool:
    """Whether a run in this workdir has saved anything."""
    return any(_newest(workdir / folder) for folder in (LATEST_FOLDER, BEST_FOLDER))


def open_checkpoints(
    workdir: Path, warn: Callable[[str], None] = lambda line: None, *, alone: bool = False
) -> Checkpoints:
    """Opens (or makes) the checkpoint folders; half-written ones that a kill left behind are removed with a warning.

    ``alone``: see `Checkpoints`; of no effect where there is one process.
    """
    alone = alone and jax.process_count() > 1
    if alone and jax.process_index():
        return Checkpoints(None, None, alone)
    for partial in sorted(workdir.glob(f"*/*{_PARTIAL}*")):
        warn(f"{partial.parent.name}/{partial.name.partition('.')[0]} was not written to its end: not used, removed")
    score: Callable[[Any], float] = lambda metrics: metrics[_SCORE]  # noqa: E731
    extra: dict[str, Any] = {}
    if alone:
        extra["multiprocessing_options"] = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    best = checkpoint_managers.BestN(get_metric_fn=score, n=1, reverse=False)
    return Checkpoints(
        _manager(workdir / LATEST_FOLDER, checkpoint_managers.LatestN(KEPT), **extra),
        _manager(workdir / BEST_FOLDER, best, best_fn=score, **extra),
        alone,
    )


def _manager(folder: Path, policy: Any, **extra: Any) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, cleanup_tmp_directories=True, create=False, **extra
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(folder.absolute(), options=options)
    except OSError as error:
        raise UserError(f"cannot write checkpoints in {folder}: {error}; choose another --workdir") from error


def close(checkpoints: Checkpoints) -> None:
    """Waits for saves under way and closes.

    Raises:
        UserError: a save under way failed.
    """
    errors = []
    for manager in (m for m in (checkpoints.latest, checkpoints.best) if m is not None):
        try:
            _guarded(manager, manager.wait_until_finished)
        except UserError as error:
            errors.append(error)
        manager.close()
    if errors:
        raise errors[0]


def save_latest(checkpoints: Checkpoints, state: TrainState, progress: dict[str, Any]) -> None:
    """Starts saving the state after step ``state.step`` in the background; a step that is there already is kept.

    Raises:
        UserError: this save, or the one before it, could not be written.
    """
    manager = checkpoints.latest
    if manager is None:
        return
    step = int(state.step)
    state = _held(state) if checkpoints.alone else state
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
    if step not in manager.all_steps():
        _guarded(manager, lambda: manager.save(step, args=items, force=True))


def save_best(checkpoints: Checkpoints, step: int, params: Any, stats: Any, score: float) -> None:
    """Saves the weights if no score so far is as good, and waits until they are whole.

    The one before is removed after that, so the newest folder is the best whenever the process ends. A state still
    being written is waited for: orbax numbers its barriers over both managers, and with several processes two saves
    at once may meet at the wrong one.
    """
    latest, best = checkpoints.latest, checkpoints.best
    if latest is None or best is None:
        return
    kept = best.best_step()
    if kept is not None and (best.metrics(kept) or {}).get(_SCORE, -1.0) >= score:
        return
    weights = {"params": params, "stats": stats}
    items = ocp.args.Composite(weights=ocp.args.StandardSave(_held(weights) if checkpoints.alone else weights))
    if step not in best.all_steps():
        _guarded(latest, latest.wait_until_finished)
        _guarded(best, lambda: best.save(step, args=items, metrics={_SCORE: score}, force=True))
        _guarded(best, best.wait_until_finished)


def _held(tree: Any) -> Any:
    """The arrays of this process, of trees that every process holds whole."""
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), tree)


def _guarded(manager: ocp.CheckpointManager, action: Callable[[], Any]) -> None:
    """Runs a save or a wait for one; a failure becomes one message, and what it left half-written is removed."""
    try:
        action()
        manager.check_for_errors()
    except Exception as error:
        folder = Path(manager.directory)
        for partial in folder.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        full = os.strerror(errno.ENOSPC)
        reason = full if full in str(error) else first_line(error)
        raise UserError(
            f"cannot write the checkpoint in {folder} ({free:.0f} MiB free there): {reason}. Earlier checkpoints are "
            "whole; make room and run the same command again to resume"
        ) from error


def restore_latest(
    checkpoints: Checkpoints, like: TrainState, warn: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state that can be read, with its progress record; None when there is none.

    ``like`` gives shapes and shardings, so that a state saved on other devices is laid out anew. A damaged checkpoint
    is moved aside with a warning.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    if checkpoints.alone:
        return _restore_for_all(checkpoints, like, warn)
    assert checkpoints.latest is not None
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    return _restore(checkpoints.latest, target, warn)


def _restore_for_all(
    checkpoints: Checkpoints, like: TrainState, warn: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """Process 0 reads, and tells the others."""
    from jax.experimental import multihost_utils

    found = None
    if checkpoints.latest is not None:
        found = _restore(checkpoints.latest, _held(like), warn)
    text = json.dumps(found[1]).encode() if found else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    if not length:
        return None
    text = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(length, b" "), np.uint8))
    state = multihost_utils.broadcast_one_to_all(found[0] if found else _held(like))
    put = lambda a, old: jax.make_array_from_callback(old.shape, old.sharding, lambda i: np.asarray(a)[i])  # noqa: E731
    return jax.tree.map(put, state, like), json.loads(bytes(np.asarray(text)))


def _restore(
    manager: ocp.CheckpointManager, target: Any, warn: Callable[[str], None]
) -> tuple[Any, dict[str, Any]] | None:
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        try:
            restored = manager.restore(step, args=items)
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            reason = first_line(error)
            warn(f"checkpoint {step} in {manager.directory} cannot be read ({reason}); trying the one before it")
            continue
        for broken in (s for s in steps if s > step):
            aside = Path(manager.directory).parent / f"damaged-checkpoint-{broken}"
            shutil.rmtree(aside, ignore_errors=True)
            (Path(manager.directory) / str(broken)).rename(aside)
            warn(f"moved the damaged checkpoint {broken} to {aside}")
        manager.reload()
        return restored["state"], restored["progress"]
    if steps:
        raise UserError(
            f"no checkpoint in {manager.directory} can be read (steps {steps}); they are damaged or belong to another "
            "network. Give a new --workdir, or remove that folder to start again"
        )
    return None


def load_weights(workdir: Path, params: Any, stats: Any) -> tuple[Any, Any, str]:
    """Weights to predict with: the best validation's, or, if none was kept yet, those of the latest state that would be
    validated: the moving average, the slow weights, or the only ones.

    Args:
        params, stats: trees of the right shapes.

    Returns:
        params, stats, and where they came from.

    Raises:
        UserError: the workdir has no checkpoint, or it does not fit the network.
    """
    for _ in range(_TRIES):
        if best := _newest(workdir / BEST_FOLDER):
            folder, source = best / "weights", f"best validation, step {best.name}"
        elif latest := _newest(workdir / LATEST_FOLDER):
            folder, source = latest / "state", f"latest state, step {latest.name}"
        else:
            raise UserError(
                f"{workdir} holds no finished checkpoint ({BEST_FOLDER}/<step> or {LATEST_FOLDER}/<step>): train first "
                f"with python -m xdim_jax.train --config=... --workdir={workdir}"
            )
        try:
            with _quiet():
                return *_read(folder, {"params": params, "stats": stats}), source
        except (ValueError, KeyError, OSError) as error:
            now = _newest(workdir / BEST_FOLDER) or _newest(workdir / LATEST_FOLDER)
            if now != folder.parent:  # a run that goes on put newer weights in its place
                continue
            raise UserError(
                f"{folder} does not fit the network of {workdir}/{CONFIG_FILE}, or is damaged: {first_line(error)}"
            ) from error
    raise UserError(f"{workdir}: a run replaced its weights {_TRIES} times while they were read; try again later")


def _newest(folder: Path) -> Path | None:
    steps = [p for p in folder.glob("*") if p.name.isdigit()]
    return max(steps, key=lambda p: int(p.name), default=None)


def _read(folder: Path, weights: dict[str, Any]) -> tuple[Any, Any]:
    """Reads the parameters and statistics that are evaluated, and nothing else of a state.

    orbax leaves a leaf that the checkpoint lacks unfilled without a word, so names and shapes are compared first.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        described = reader.metadata(folder.absolute()).item_metadata
        if described is None:
            raise FileNotFoundError(errno.ENOENT, "no checkpoint", str(folder))
        found = described.tree
        average = bool(found.get("ema"))
        pair = not average and set(found["params"]) == {"fast", "slow"}
        inside = found["ema"] if average else found
        inside = {k: inside.get(k, {}) for k in weights}
        if pair:
            inside["params"] = inside["params"]["slow"]
        if differences := _differences(inside, weights):
            raise ValueError("; ".join(differences[:3]) + (f"; {len(differences)} in all" if differences[3:] else ""))
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
        if pair:
            target["params"] = {"slow": target["params"]}
        target = {"ema": target} if average else target
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        tree = reader.restore(folder.absolute(), args=args)
    tree = tree["ema"] if average else tree
    return tree["params"]["slow"] if pair else tree["params"], tree["stats"]


def _differences(found: Any, wanted: Any) -> list[str]:
    """Leaves that only one tree has, or that differ in shape; the integer keys of lists are strings on disk."""
    trees = [
        {".".join(str(k.key) for k in path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (found, wanted)
    ]
    return [
        f"{name} is {trees[0].get(name, 'absent')} in the checkpoint, {trees[1].get(name, 'absent')} in the network"
        for name in sorted(trees[0].keys() | trees[1].keys())
        if trees[0].get(name) != trees[1].get(name)
    ]
