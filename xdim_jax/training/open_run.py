"""From a config and a workdir to a run that is ready for its first step: weights, data, program, checkpoints."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from xdim_jax.base import log
from xdim_jax.base.config import Config
from xdim_jax.base.files import write_json
from xdim_jax.base.signals import StopRequest
from xdim_jax.data import pipeline
from xdim_jax.data.case import Dataset
from xdim_jax.inference import sliding_window
from xdim_jax.inference.output import make_output
from xdim_jax.nets import networks
from xdim_jax.runs import checkpoint, environment
from xdim_jax.runs.records import close_recorder, open_recorder, read_records
from xdim_jax.runs.state import TrainState
from xdim_jax.runs.trackers import open_trackers
from xdim_jax.runs.workdir import claim_workdir
from xdim_jax.training import mesh
from xdim_jax.training.check import FREE_KEYS, whole_size
from xdim_jax.training.initial_weights import REPORT_FILE, initialise
from xdim_jax.training.loop import Progress, Run
from xdim_jax.training.mesh import Devices
from xdim_jax.training.program import Program, make_network, make_program
from xdim_jax.training.run_data import find_data
from xdim_jax.training.validation import make_validation


@dataclasses.dataclass(frozen=True)
class Shared:
    """What runs of one program have in common, so that it is traced and compiled once.

    Attributes:
        init: see `xdim_jax.training.program.Program.init`, jitted.
        segmenter: that validates.
    """

    init: Callable[[Any, Any], TrainState]
    segmenter: sliding_window.Segmenter


@dataclasses.dataclass(frozen=True)
class Ready:
    """A run before its first step, or before the one it goes on with.

    Attributes:
        run: what does not change from step to step.
        program: that it computes.
        state, progress: to begin with.
        validated: whether a validation of this state is on record.
        open_stream: batches from there on.
        shared: with runs of the same program.
    """

    run: Run
    program: Program
    state: TrainState
    progress: Progress
    validated: bool
    open_stream: Callable[[], Iterator[dict[str, Any]]]
    shared: Shared

    def close(self) -> None:
        """Waits for what is being written. Raises UserError if it cannot be."""
        close_recorder(self.run.recorder)
        checkpoint.close(self.run.checkpoints)


def prepare(
    config: Config,
    dataset: Dataset,
    workdir: Path,
    stop: StopRequest,
    devices: Devices,
    *,
    shared: Shared | None = None,
    own_disks: bool = False,
) -> Ready:
    """Makes a run, or takes up one that the workdir holds; close it with `Ready.close`.

    Args:
        config: of a recipe, as `xdim_jax.training.check.check_config` leaves it.
        dataset: what it is trained on.
        workdir: of the run; made if it does not exist.
        stop: heard by the loop.
        devices: that hold the state.
        shared: of another run whose program is the same.
        own_disks: each process has a workdir of its own, and process 0's is the one that is kept.

    Raises:
        UserError: weights or data cannot be used, or the workdir is of another config or cannot be written.
    """
    first = jax.process_index() == 0
    graphdef, params, stats = make_network(config, axis=devices.axis)
    log.say(
        f"network    {config.model.name}, {networks.count_parameters(params):,} parameters, {config.train.precision}"
    )
    started = checkpoint.exist(workdir)
    mesh.barrier("looked")  # before the first process writes
    report = None
    if started:
        log.say("weights    of the run so far")
    else:
        params, stats, report = initialise(config, params, stats)
    if first:
        claim_workdir(workdir, config, free=FREE_KEYS, started=started)
        if report is not None:
            write_json(workdir / REPORT_FILE, report)
    output = make_output(config.output, dataset)
    found = find_data(config, dataset, output, workdir, started=started, first=first)
    count = len(pipeline.records(found.train, config.data.sampling, config.data.patches_per_case))
    per_epoch = pipeline.steps_per_epoch(count, config.data.batch)
    network = (graphdef, params, stats)
    program, params, stats = make_program(config, dataset, per_epoch=per_epoch, axis=devices.axis, network=network)
    if shared is None:
        shared = Shared(jax.jit(program.init), sliding_window.make_segmenter(config, program.forward, output))
    log.say(
        f"data       {dataset.name}, {len(found.train)} training, {len(found.validation)} validation cases, "
        f"fold {config.data.fold}"
    )
    log.say(f"steps      {config.train.epochs} epochs x {per_epoch} = {config.train.epochs * per_epoch}")
    log.say(f"workdir    {workdir}")

    state = devices.put_state(shared.init(params, stats))
    del network, params, stats  # the state has copies
    regions = len(dataset.regions.names)
    progress = Progress([0.0] * regions, [0] * regions)
    checkpoints = checkpoint.open_checkpoints(workdir, log.warn, alone=own_disks)
    restored = checkpoint.restore_latest(checkpoints, state, log.warn)
    if restored:
        state, progress = restored[0], Progress(**restored[1])
    start = int(state.step)
    if first:
        environment.record_start(workdir, start)
    log.say(f"resume     from step {start}" if restored else "resume     nothing to resume, starting at step 0")

    run = Run(
        config=config.train,
        per_epoch=per_epoch,
        step=program.step,
        key=devices.put_state(jax.random.key(config.seed)),
        schedule=program.schedule,
        devices=devices,
        checkpoints=checkpoints,
        recorder=open_recorder(workdir, start, writes=first, trackers=open_trackers(config, workdir) if first else ()),
        validate=make_validation(
            shared.segmenter, config.predict, dataset, found.validation, overlays=config.train.overlays
        ),
        stop=stop,
        regions=dataset.regions.names,
        workdir=workdir,
    )

    def open_stream() -> Iterator[dict[str, Any]]:
        return pipeline.make_stream(
            found.train,
            sampling=config.data.sampling,
            size=whole_size(config.data.patch),
            flat=networks.spatial_axes(config.model) == 2,
            foreground=config.data.foreground,
            patches_per_case=config.data.patches_per_case,
            batch=config.data.batch,
            seed=config.seed,
            start_step=start,
            threads=config.data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            facts=found.facts,
            activity=run.activity,
        )

    validated = any(r["kind"] == "validation" and r["step"] == start for r in read_records(workdir))
    return Ready(run, program, state, progress, validated, open_stream, shared)
