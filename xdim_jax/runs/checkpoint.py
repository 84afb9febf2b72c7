"""Checkpoints with orbax: training states, from which a run resumes, and the best weights, for prediction.

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
import threading
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

KEPT = 2  # number of latest states to keep; if the newest is damaged, the run resumes from the previous one
LATEST_FOLDER, BEST_FOLDER = "checkpoints", "best"
_TRIES = 5  # number of attempts to read weights, which a training run may replace while they are read
_WRITES = 10  # attempts to close a manager, which raises one error at a time; more than one save has files
_SCORE = "dice"
_PARTIAL = ".orbax-checkpoint-tmp"  # part of the name of a checkpoint that orbax has not finished


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The two checkpoint managers of a workdir. Close them with `close`.

    Attributes:
        latest: Manager of the latest states.
        best: Manager of the best weights.
        alone: False if all processes save together into one shared folder. True if each process has its own disk; then
            only process 0 has managers, and saves the state, of which every process has a complete copy.
    """

    latest: ocp.CheckpointManager | None
    best: ocp.CheckpointManager | None
    alone: bool = False


_LOGGERS = ("absl", "asyncio")  # orbax logs every save and restore at INFO
_quiet_lock = threading.Lock()
_quiet_blocks = 0  # number of threads inside `_quiet`
_levels: dict[str, int] = {}  # levels of the loggers before that


def silence_orbax() -> None:
    """Silence the messages of orbax for the rest of the process.

    If a write fails, orbax raises an error. In addition, its background threads may later print messages about arrays
    whose writes were still pending: log lines, warnings about coroutines that were never awaited, and "Event loop is
    closed". These messages add no information.

    Only entry points should call this function, because it changes global state.
    """
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def ignore_closed_loops(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            report(event)

    sys.unraisablehook = ignore_closed_loops


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of orbax inside the block, and restore the levels of its loggers afterwards."""
    global _quiet_blocks
    with _quiet_lock:  # several threads may load models: the first one silences, the last one restores
        if not _quiet_blocks:
            _levels.update({name: logging.getLogger(name).level for name in _LOGGERS})
        _quiet_blocks += 1
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_blocks -= 1
            if not _quiet_blocks:
                for name, level in _levels.items():
                    logging.getLogger(name).setLevel(level)


def exists(workdir: Path) -> bool:
    """Return True if a run in this workdir has saved a state or its best weights."""
    return any(_newest(workdir / folder) for folder in (LATEST_FOLDER, BEST_FOLDER))


def can_resume(workdir: Path) -> bool:
    """Return True if a run in this workdir has saved a state. Best weights alone are not enough to resume."""
    return _newest(workdir / LATEST_FOLDER) is not None


def open_checkpoints(
    workdir: Path, warn: Callable[[str], None] = lambda line: None, *, alone: bool = False
) -> Checkpoints:
    """Open the checkpoint folders, and create them if necessary.

    Incomplete checkpoints of a run that was killed are deleted.

    Args:
        workdir: Folder of the run.
        warn: Called with a warning for each checkpoint that is deleted.
        alone: See `Checkpoints`; has no effect in runs with one process.

    Raises:
        UserError: The folders cannot be created.
    """
    alone = alone and jax.process_count() > 1
    if alone and jax.process_index():
        return Checkpoints(None, None, alone)
    for partial in sorted(workdir.glob(f"*/*{_PARTIAL}*")):
        warn(f"{partial.parent.name}/{partial.name.partition('.')[0]} is incomplete and was deleted")
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
    """Wait for running saves, and close the managers.

    Raises:
        UserError: A running save has failed.
    """
    errors = []
    for manager in (m for m in (checkpoints.latest, checkpoints.best) if m is not None):
        # one save writes several files in the background. Orbax raises each of their errors once, and closes afterwards
        for _ in range(_WRITES):
            try:
                _guarded(manager, manager.close)
                break
            except UserError as error:
                errors.append(error)
    if errors:
        raise errors[0]


def save_latest(checkpoints: Checkpoints, state: TrainState, progress: dict[str, Any]) -> None:
    """Start to save a state in the background. Do nothing if a checkpoint of this step exists.

    Args:
        checkpoints: Open checkpoint folders.
        state: State to save.
        progress: Values to save as JSON with the state.

    Raises:
        UserError: This save, or the previous one, has failed.
    """
    manager = checkpoints.latest
    if manager is None:
        return
    step = int(state.step)
    state = _local_copy(state) if checkpoints.alone else state
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
    if step not in manager.all_steps():
        _guarded(manager, lambda: manager.save(step, args=items, force=True))


def save_best(checkpoints: Checkpoints, step: int, params: Any, stats: Any, score: float) -> bool:
    """Save the weights if their score is the best so far, and wait until they are complete.

    The previous best weights are deleted only afterwards, so a reader always finds complete weights.

    Args:
        checkpoints: Open checkpoint folders.
        step: Number of completed steps.
        params: Parameters.
        stats: Running statistics.
        score: Mean validation Dice.

    Returns:
        True if the best weights are now those of this step; always False in processes without checkpoint folders.

    Raises:
        UserError: The weights cannot be written.
    """
    latest, best = checkpoints.latest, checkpoints.best
    if latest is None or best is None:
        return False
    kept = best.best_step()
    if kept is not None and (best.metrics(kept) or {}).get(_SCORE, -1.0) >= score:
        # a resumed run repeats a validation whose score was not recorded; its weights may have been saved already
        return kept == step
    weights = {"params": params, "stats": stats}
    items = ocp.args.Composite(weights=ocp.args.StandardSave(_local_copy(weights) if checkpoints.alone else weights))
    if step not in best.all_steps():
        # orbax numbers its barriers with one counter for both managers. If both saved at the same time, processes could
        # reach the barriers in different orders and wait forever
        _guarded(latest, latest.wait_until_finished)
        _guarded(best, lambda: best.save(step, args=items, metrics={_SCORE: score}, force=True))
        _guarded(best, best.wait_until_finished)
    return True


def _local_copy(tree: Any) -> Any:
    """Return this process's copy of arrays that are replicated over all processes, as NumPy arrays."""
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), tree)


def _guarded(manager: ocp.CheckpointManager, action: Callable[[], Any]) -> None:
    """Run a save, or wait for one. A failure becomes a UserError, and incomplete files are deleted."""
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
            "complete; free some space, and run the same command again to resume"
        ) from error


def restore_latest(
    checkpoints: Checkpoints, like: TrainState, warn: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """Read the newest state that can be read. Newer, damaged checkpoints are moved to another folder.

    Args:
        checkpoints: Open checkpoint folders.
        like: State with the shapes and shardings of the result; the checkpoint may have been written on other devices.
        warn: Called with a warning for each damaged checkpoint.

    Returns:
        The state, and the progress that was saved with it; None if there is no checkpoint.

    Raises:
        UserError: There are checkpoints, but none can be read.
    """
    if checkpoints.alone:
        return _restore_for_all(checkpoints, like, warn)
    assert checkpoints.latest is not None
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    return _restore(checkpoints.latest, target, warn, shared=jax.process_count() > 1)


def _restore_for_all(
    checkpoints: Checkpoints, like: TrainState, warn: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """Read the checkpoint in process 0, and send it to the other processes."""
    from jax.experimental import multihost_utils

    found = None
    if checkpoints.latest is not None:
        found = _restore(checkpoints.latest, _local_copy(like), warn)
    text = json.dumps(found[1]).encode() if found else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    if not length:
        return None
    text = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(length, b" "), np.uint8))
    state = multihost_utils.broadcast_one_to_all(found[0] if found else _local_copy(like))
    put = lambda a, old: jax.make_array_from_callback(old.shape, old.sharding, lambda i: np.asarray(a)[i])  # noqa: E731
    return jax.tree.map(put, state, like), json.loads(bytes(np.asarray(text)))


def _restore(
    manager: ocp.CheckpointManager, target: Any, warn: Callable[[str], None], *, shared: bool = False
) -> tuple[Any, dict[str, Any]] | None:
    """Read the newest checkpoint of a folder that can be read, see `restore_latest`.

    With ``shared``, all processes read the folder; process 0 moves damaged checkpoints and warns, and the others wait.
    """
    first = not shared or jax.process_index() == 0
    reason = ""
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore())
        try:
            restored = manager.restore(step, args=items)
        except Exception as error:  # orbax and tensorstore raise many types of errors for a damaged file
            reason = first_line(error)
            if _may_be_temporary(error):
                raise UserError(
                    f"checkpoint {step} in {manager.directory} cannot be read now ({reason}); no file was changed. "
                    "When the memory or the disk is available again, run the same command again"
                ) from error
            if first:
                warn(f"checkpoint {step} in {manager.directory} cannot be read ({reason}); trying the previous one")
            continue
        for broken in (s for s in steps if s > step and first):
            aside = Path(manager.directory).parent / f"damaged-checkpoint-{broken}"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.move(Path(manager.directory) / str(broken), aside)  # the folder may be a link to another file system
            warn(f"moved the damaged checkpoint {broken} to {aside}")
        if shared:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints are moved")
        manager.reload()
        return restored["state"], restored["progress"]
    if steps:
        raise UserError(
            f"no checkpoint in {manager.directory} can be read (steps {steps}; {reason}): they are damaged or belong "
            f"to another network. Give another --workdir, or delete {Path(manager.directory).parent} to start again"
        )
    return None


def _may_be_temporary(error: Exception) -> bool:
    """Return whether an error is one of memory, of a disk or of permissions, rather than of a damaged checkpoint.

    tensorstore raises ValueError with the status of the failed operation in its text.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ETIMEDOUT)
    words = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", os.strerror(errno.EIO))
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def load_weights(workdir: Path, params: Any, stats: Any) -> tuple[Any, Any, str]:
    """Read the weights of a run for prediction.

    These are the weights of the best validation. Before the first validation, they are those of the latest state: the
    moving average if there is one, else the slow weights of LookAhead, else the parameters.

    Args:
        workdir: Folder of the run.
        params, stats: Trees with the shapes of the result.

    Returns:
        Parameters, running statistics, and their origin as text.

    Raises:
        UserError: The workdir has no checkpoint, or the checkpoint does not fit the network.
    """
    for _ in range(_TRIES):
        if best := _newest(workdir / BEST_FOLDER):
            folder, source = best / "weights", f"best validation, step {best.name}"
        elif latest := _newest(workdir / LATEST_FOLDER):
            folder, source = latest / "state", f"latest state, step {latest.name}"
        else:
            raise UserError(
                f"{workdir} has no complete checkpoint ({BEST_FOLDER}/<step> or {LATEST_FOLDER}/<step>): train first "
                f"with python -m xdim_jax.train --config=... --workdir={workdir}"
            )
        try:
            with _quiet():
                return *_read(folder, {"params": params, "stats": stats}), source
        except (ValueError, KeyError, OSError) as error:
            now = _newest(workdir / BEST_FOLDER) or _newest(workdir / LATEST_FOLDER)
            if now != folder.parent:  # the run has replaced them by newer weights
                continue
            raise UserError(
                f"{folder} does not fit the network of {workdir}/{CONFIG_FILE}, or is damaged: {first_line(error)}"
            ) from error
    raise UserError(f"{workdir}: a run replaced its weights {_TRIES} times while they were read; try again later")


def _newest(folder: Path) -> Path | None:
    try:
        steps = [Path(entry) for entry in os.scandir(folder) if entry.name.isdigit()]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read: {error.strerror or error}; check its permissions and the disk"
        ) from error
    return max(steps, key=lambda p: int(p.name), default=None)


def _read(folder: Path, weights: dict[str, Any]) -> tuple[Any, Any]:
    """Read the parameters and statistics for evaluation, without the other arrays of a state.

    Names and shapes are compared first, because orbax raises no error if the checkpoint lacks an array.
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
    """Describe the leaves that only one tree has, or whose shapes differ.

    Keys are compared as strings, because orbax stores the indices of lists as strings.
    """
    trees = [
        {".".join(str(k.key) for k in path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (found, wanted)
    ]
    return [
        f"{name} is {trees[0].get(name, 'absent')} in the checkpoint, {trees[1].get(name, 'absent')} in the network"
        for name in sorted(trees[0].keys() | trees[1].keys())
        if trees[0].get(name) != trees[1].get(name)
    ]
