"""Trains a network from a config; run again with the same arguments, it resumes."""

if __name__ == "__main__":  # before the imports, which take seconds and would be done twice
    from xdim_jax.process import prefer_huge_pages

    prefer_huge_pages()

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from xdim_jax import checkpoint, cli, crossval, environment, log, mesh, models, ops
from xdim_jax.cases import find_data
from xdim_jax.data import pipeline
from xdim_jax.data.case import Dataset
from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.files import write_json
from xdim_jax.loop import Progress, Run, fit
from xdim_jax.mesh import make_devices
from xdim_jax.output import make_output
from xdim_jax.program import make_network, make_program
from xdim_jax.recipe import FREE_KEYS, check_config, whole_size
from xdim_jax.signals import REQUEUE, StopRequest, catch_signals, listen
from xdim_jax.start import REPORT_FILE, initialise
from xdim_jax.trackers import open_trackers
from xdim_jax.validation import make_validation


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = cli.make_parser(
        "xdim_jax.train",
        (__doc__ or "")
        + "\n\nWrites to the workdir: config.json, split.json, data.json, pretrained.json, environment.json, "
        "metrics.jsonl,\nsteps.jsonl, tensorboard/, overlays/, checkpoints/, best/.",
        "any value of the config can be overridden: --config.<key>=<value>, e.g. --config.data.root=/data/BraTS\n"
        f"exit status: 0 done, 2 unusable input; with everything saved, {REQUEUE} stopped by SIGTERM or SIGUSR1\n"
        "(requeue: run the same command again), 130 by Ctrl-C\n\n"
        "examples:\n"
        "  python -m xdim_jax.train --config=configs/brats_dxnet.py:phantom --workdir=runs/demo\n"
        "  python -m xdim_jax.train --config=configs/brats_dxnet.py --workdir=runs/dx \\\n"
        "      --config.data.root=/data/BraTS2021_Training_Data\n"
        "  python -m xdim_jax.train --config=configs/camus_omnianet.py:fold=all --workdir=runs/camus \\\n"
        "      --config.data.root=/data/CAMUS_public",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:WORDS]", help="a recipe, e.g. configs/brats_dxnet.py")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run; made if it does not exist")
    group = parser.add_argument_group("several processes", "each process of a run gets the same command")
    group.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="of process 0; auto: the launcher tells (SLURM, Open MPI, TPU pods)",
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many, where the launcher does not tell")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
    options, overrides = parser.parse_known_args(argv)
    config = cli.load_config(options.config, overrides)
    with catch_signals() as stop:
        mesh.join_processes(options.coordinator, options.processes, options.process)
        listen(stop)  # JAX has a handler of its own where there are several processes
        if jax.process_index():
            log.quieten()
        dataset = check_config(config)
        cli.cache_programs()
        if config.data.fold == ALL_FOLDS:
            return crossval.train_folds(
                config, options.workdir, lambda c, workdir: train(c, check_config(c), workdir, stop)
            )
        return train(config, dataset, options.workdir, stop)


def train(config: cli.Config, dataset: Dataset, workdir: Path, stop: StopRequest) -> int:
    """Runs the recipe to its end, or until a signal. Returns the exit status."""
    first = jax.process_index() == 0
    options = config.mesh
    devices = make_devices(
        options.data,
        options.space,
        batch=config.data.batch,
        parallel=options.parallel,
        accumulate=config.train.accumulate,
    )
    models.check_space(config.model, config.data.patch, devices.mesh.shape["space"])
    log.say(f"devices    {environment.devices()} in {jax.process_count()} processes")
    log.say(f"mesh       data {devices.mesh.shape['data']} x space {devices.mesh.shape['space']}, {devices.parallel}")
    graphdef, params, stats = make_network(config, axis=devices.axis)
    log.say(f"network    {config.model.name}, {models.count_parameters(params):,} parameters, {config.train.precision}")
    form = "sharded" if devices.mesh.shape["space"] > 1 else config.train.ops
    log.say(f"operations {ops.describe_forms(form)}")
    started = checkpoint.exist(workdir)
    mesh.barrier("looked")  # before the first process writes
    report = None
    if started:
        log.say("weights    of the run so far")
    else:
        params, stats, report = initialise(config, params, stats)
    if first:
        cli.claim_workdir(workdir, config, free=FREE_KEYS, started=started)
        if report is not None:
            write_json(workdir / REPORT_FILE, report)
    output = make_output(config.output, dataset)
    found = find_data(config, dataset, output, workdir, started=started, first=first)
    count = len(pipeline.records(found.train, config.data.sampling, config.data.patches_per_case))
    per_epoch = pipeline.steps_per_epoch(count, config.data.batch)
    network = (graphdef, params, stats)
    program, params, stats = make_program(config, dataset, per_epoch=per_epoch, axis=devices.axis, network=network)
    log.say(
        f"data       {dataset.name}, {len(found.train)} training, {len(found.validation)} validation cases, "
        f"fold {config.data.fold}"
    )
    log.say(f"steps      {config.train.epochs} epochs x {per_epoch} = {config.train.epochs * per_epoch}")
    log.say(f"workdir    {workdir}")

    state = devices.put_state(jax.jit(program.init)(params, stats))
    del network, params, stats  # the state has copies
    regions = len(dataset.regions.names)
    progress = Progress([0.0] * regions, [0] * regions)
    checkpoints = checkpoint.open_checkpoints(workdir, log.warn)
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
        recorder=log.open_recorder(
            workdir, start, writes=first, trackers=open_trackers(config, workdir) if first else ()
        ),
        validate=make_validation(program, dataset, found.validation, overlays=config.train.overlays),
        stop=stop,
        regions=dataset.regions.names,
        workdir=workdir,
    )
    stream = pipeline.make_stream(
        found.train,
        sampling=config.data.sampling,
        size=whole_size(config.data.patch),
        flat=models.spatial_axes(config.model) == 2,
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
    try:
        fit(run, state, progress, stream, validated=_validated(workdir, start))
    finally:
        log.close_recorder(run.recorder)
        checkpoint.close(checkpoints)
        stop.busy = False
    if stop.signal:
        log.say(f"stopped    by {signal.Signals(stop.signal).name}, all saved; run the same command to go on")
        return stop.status
    log.say(
        f"done       predict with: python -m xdim_jax.predict --workdir={workdir} --input=<cases> --output=<folder>"
    )
    return 0


def _validated(workdir: Path, step: int) -> bool:
    return any(r["kind"] == "validation" and r["step"] == step for r in log.read_records(workdir))


def command() -> NoReturn:
    """The console entry point."""
    cli.run(main)


if __name__ == "__main__":
    command()
