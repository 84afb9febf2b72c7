"""Open a run, given its config and workdir: prepare it for its first step, or for the step at which it resumes."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import jax

from xdim_jax.base import log
from xdim_jax.base.config import Config
from xdim_jax.base.files import read_json, write_json
from xdim_jax.base.lock import lock_workdir
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.case import Dataset
from xdim_jax.inference.model import make_names
from xdim_jax.inference.output import make_output
from xdim_jax.inference.sliding_window import Segmenter, make_segmenter
from xdim_jax.nets import networks
from xdim_jax.runs import checkpoint, environment
from xdim_jax.runs.records import close_recorder, open_recorder, read_records
from xdim_jax.runs.state import TrainState
from xdim_jax.runs.trackers import open_trackers
from xdim_jax.runs.workdir import SPLIT_FILE, claim_workdir
from xdim_jax.training import mesh
from xdim_jax.training.check import CONTINUE_KEYS, FREE_KEYS
from xdim_jax.training.choose_ops import is_measured, program_key
from xdim_jax.training.earlier_runs import describe_split, find_seen_patients
from xdim_jax.training.initial_weights import REPORT_FILE, initialise
from xdim_jax.training.label_maps import make_label_maps
from xdim_jax.training.loop import Progress, Run
from xdim_jax.training.mesh import Devices
from xdim_jax.training.program import Program, make_network, make_program
from xdim_jax.training.run_data import RunData, find_data
from xdim_jax.training.validation import make_validation


@dataclasses.dataclass(frozen=True)
class SharedPrograms:
    """Functions that are shared by runs with the same program, so that each is traced and compiled once.

    Attributes:
        init: The jitted `xdim_jax.training.program.Program.init`.
        segmenter: Function that segments the validation cases.
    """

    init: Callable[[Any, Any], TrainState]
    segmenter: Segmenter


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run that is ready for its next step. Close it with `close`.

    Attributes:
        run: The parts that do not change from step to step.
        program: The functions of the run.
        state: Training state to start from.
        progress: Progress to start from.
        validated: True if a validation of this state is recorded.
        open_stream: Function that opens the stream of batches, starting with that of the next step.
        shared: Functions that further runs with the same program can use.
        lock: Lock of the workdir; None in processes other than the first, and if the file system has no locks.
    """

    run: Run
    program: Program
    state: TrainState
    progress: Progress
    validated: bool
    open_stream: Callable[[], Iterator[dict[str, Any]]]
    shared: SharedPrograms
    lock: IO[bytes] | None = None

    def close(self) -> None:
        """Wait until records and checkpoints are written, and close them. Raises UserError if writing has failed."""
        try:
            close_recorder(self.run.recorder)
            checkpoint.close(self.run.checkpoints)
        finally:
            if self.lock is not None:
                self.lock.close()


def open_run(
    config: Config,
    dataset: Dataset,
    workdir: Path,
    stop: StopRequest,
    devices: Devices,
    *,
    shared: SharedPrograms | None = None,
    separate_disks: bool = False,
) -> OpenRun:
    """Start a run, or resume the run in ``workdir``, which is locked until the run is closed.

    Args:
        config: Config of a recipe, as `xdim_jax.training.check.resolve_config` returns it.
        dataset: Data set on which the network is trained.
        workdir: Folder of the run; created if it does not exist.
        stop: Record of received signals.
        devices: Devices on which the run is trained.
        shared: Functions of another run with the same program.
        separate_disks: True if each process has its own workdir, because the run is stored in a bucket. Only the
            workdir of process 0 has records and checkpoints, and only this one is uploaded.

    Raises:
        UserError: Weights or data cannot be used, or the workdir belongs to another config, cannot be written, or is in
            use by another process.
    """
    lock = lock_workdir(workdir) if jax.process_index() == 0 else None
    try:
        opened = _open_locked_run(config, dataset, workdir, stop, devices, shared=shared, separate_disks=separate_disks)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return dataclasses.replace(opened, lock=lock)


def _open_locked_run(
    config: Config,
    dataset: Dataset,
    workdir: Path,
    stop: StopRequest,
    devices: Devices,
    *,
    shared: SharedPrograms | None,
    separate_disks: bool,
) -> OpenRun:
    """Start or resume a run, see `open_run`."""
    started, resumes = checkpoint.exists(workdir), checkpoint.can_resume(workdir)
    mesh.barrier("checked")  # process 0 must not write before all processes have checked
    network = _start_network(config, dataset, workdir, devices, started=started, resumes=resumes)
    output = make_output(config.output, dataset)
    first = jax.process_index() == 0
    data = find_data(
        config.data,
        config.seed,
        dataset,
        output,
        workdir,
        started=started,
        first=first,
        separate_disks=separate_disks,
    )
    if first:
        _warn_of_seen_patients(config, data, workdir)
    per_epoch = data.steps_per_epoch(config.data)
    program, params, stats = make_program(config, dataset, per_epoch=per_epoch, axis=devices.axis, network=network)
    if shared is None:
        predict = config.predict
        segmenter = make_segmenter(
            program.forward, output, config.data.patch, predict.overlap, threshold=predict.threshold
        )
        shared = SharedPrograms(jax.jit(program.init), segmenter)
    _describe(config, dataset, data, per_epoch, workdir)
    state = devices.put_state(shared.init(params, stats))
    del network, params, stats  # the state has copies of them
    checkpoints = checkpoint.open_checkpoints(workdir, log.warn, alone=separate_disks)
    state, progress = _restore(checkpoints, state, regions=len(dataset.regions.names))
    start = int(state.step)
    if first:
        environment.record_start(workdir, start)
    trackers = open_trackers(config, workdir) if first else ()
    label_maps = make_label_maps(config, dataset, workdir)
    run = Run(
        config=config.train,
        per_epoch=per_epoch,
        step=program.step,
        key=devices.put_state(jax.random.key(config.seed)),
        schedule=program.schedule,
        devices=devices,
        checkpoints=checkpoints,
        recorder=open_recorder(workdir, start, writes=first, trackers=trackers),
        validate=make_validation(
            shared.segmenter,
            dataset,
            data.validation,
            label_maps=label_maps,
            min_et=config.predict.get("min_et", 0),
            overlays=config.train.overlays,
        ),
        label_maps=label_maps,
        stop=stop,
        regions=dataset.regions.names,
        workdir=workdir,
        ops_key=program_key(config, devices) if is_measured(config.train.ops, devices) else None,
    )
    validated = any(r["kind"] == "validation" and r["step"] == start for r in read_records(workdir))

    def open_stream() -> Iterator[dict[str, Any]]:
        return data.open_stream(config.data, seed=config.seed, start_step=start, activity=run.activity)

    return OpenRun(run, program, state, progress, validated, open_stream, shared)


def _start_network(
    config: Config, dataset: Dataset, workdir: Path, devices: Devices, *, started: bool, resumes: bool
) -> tuple[Any, Any, Any]:
    """Build the network with its initial weights, and write the config to the workdir.

    If the run ``resumes`` from a checkpoint, the network is randomly initialised, because the checkpoint replaces its
    weights. A run that has ``started`` but cannot be resumed has best weights and no state, for example because the
    folder of the checkpoints was deleted; it starts again.
    """
    graphdef, params, stats = make_network(config.model, seed=config.seed, remat=config.train.remat, axis=devices.axis)
    count = networks.count_parameters(params)
    log.say(f"network    {config.model.name}, {count:,} parameters, {config.train.precision}")
    report = None
    if resumes:
        log.say("weights    from the last checkpoint of this run")
    else:
        params, stats, report = initialise(
            config.init, config.model, config.seed, params, stats, make_names(dataset, config.output)
        )
    if jax.process_index() == 0:
        changed = claim_workdir(workdir, config, ignored=FREE_KEYS, continued=CONTINUE_KEYS, started=started)
        for key, before, now in changed:
            log.say(f"changed    config.{key}: {before} before, {now} from now on")
        if report is not None:
            write_json(workdir / REPORT_FILE, report)
        elif not resumes:
            (workdir / REPORT_FILE).unlink(missing_ok=True)  # it describes a run that ended before its first checkpoint
    return graphdef, params, stats


def _warn_of_seen_patients(config: Config, data: RunData, workdir: Path) -> None:
    """Warn if the run from which the initial weights come was trained on validation patients of this one."""
    report, split = workdir / REPORT_FILE, read_json(workdir / SPLIT_FILE)
    if not report.is_file():
        return
    validation = [case for case, _ in data.validation]
    if seen := find_seen_patients(read_json(report)["source"], Path(split["root"]), validation):
        log.warn(
            f"{seen.text}. Train in another --workdir, with the split of that run "
            f"({describe_split(seen.workdir, config)}) or from weights that were not trained on these patients"
        )


def _describe(config: Config, dataset: Dataset, data: RunData, per_epoch: int, workdir: Path) -> None:
    """Log the data, the number of steps and the workdir of the run."""
    counts = f"{len(data.train)} training, {len(data.validation)} validation cases"
    log.say(f"data       {dataset.name}, {counts}, fold {config.data.fold}")
    log.say(f"steps      {config.train.epochs} epochs x {per_epoch} = {config.train.epochs * per_epoch}")
    for problem in _schedule_problems(config.optim.schedule, config.train.epochs):
        log.warn(problem)
    log.say(f"validate   {_describe_validation(config.train, per_epoch)}")
    log.say(f"workdir    {workdir}")


def _schedule_problems(schedule: Config, epochs: int) -> Iterator[str]:
    """Yield a message for a warm-up that the run does not complete, and for a constant phase that it does not leave."""
    constant = schedule.name == "constant_then_cosine" and schedule.constant_epochs >= epochs
    for key, too_long, missed in (
        ("warmup_epochs", schedule.warmup_epochs > epochs, "reaches its peak"),
        ("constant_epochs", constant, "decreases"),
    ):
        if too_long:
            yield (
                f"config.optim.schedule.{key}={schedule[key]:g}, but config.train.epochs={epochs}: the learning rate "
                f"never {missed}; lower the first value, or raise the second one"
            )


def _describe_validation(train: Config, per_epoch: int) -> str:
    """Return the times of the validations as text."""
    every, threshold = train.validate_every, train.validate_after_score
    begin = f", after the training score of an epoch has exceeded {threshold:g}" if threshold > 0 else ""
    if every >= train.epochs:
        return "at the end"
    epochs = "epoch" if every == 1 else f"{every} epochs"
    return f"every {epochs} ({every * per_epoch} steps){begin}, and at the end"


def _restore(checkpoints: checkpoint.Checkpoints, state: TrainState, *, regions: int) -> tuple[TrainState, Progress]:
    """Return state and progress of the latest checkpoint, or the given state if there is no checkpoint."""
    restored = checkpoint.restore_latest(checkpoints, state, log.warn)
    if not restored:
        log.say("resume     there is no checkpoint, starting at step 0")
        return state, Progress([0.0] * regions, [0] * regions)
    log.say(f"resume     from step {int(restored[0].step)}")
    return restored[0], Progress(**restored[1])
