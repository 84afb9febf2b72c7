"""Trains a network from a config; run again with the same arguments, it resumes."""

if __name__ == "__main__":  # before the imports, which take seconds and would be done twice
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

import functools
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from xdim_jax import ops
from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import REQUEUE, StopRequest, catch_signals, listen
from xdim_jax.data.case import Dataset
from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.nets import networks
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import environment
from xdim_jax.training import crossval, mesh, open_run, pack
from xdim_jax.training.check import check_config
from xdim_jax.training.loop import fit
from xdim_jax.training.mesh import make_devices


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = make_parser(
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
    parser.add_argument(
        "--workdir", required=True, help="folder of the run, made if it does not exist; or gs://, s3://"
    )
    group = parser.add_argument_group("several processes", "each process of a run gets the same command")
    group.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="of process 0; auto: the launcher tells (SLURM, Open MPI, TPU pods)",
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many, where the launcher does not tell")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
    group = parser.add_argument_group("folds")
    group.add_argument("--pack", type=int, default=0, metavar="K", help="with fold=all: K folds in one program")
    group.add_argument(
        "--layout", choices=pack.LAYOUTS, default="auto", help="of a pack, see xdim_jax/training/pack.py"
    )
    options, overrides = parser.parse_known_args(argv)
    config = load_config(options.config, overrides)
    if options.pack and config.data.fold != ALL_FOLDS:
        raise UserError(f"--pack={options.pack} goes with :fold=all; runs of a sweep: python -m xdim_jax.sweep --pack")
    with catch_signals() as stop:
        mesh.join_processes(options.coordinator, options.processes, options.process)
        listen(stop)  # JAX has a handler of its own where there are several processes
        if jax.process_index():
            log.quieten()
        dataset = check_config(config)
        if options.pack:
            pack.check_packable(config, options.pack, options.layout)
        cache_programs()
        with bucket.workdir(options.workdir, writes=not jax.process_index()) as workdir:
            mesh.barrier("fetched")  # by all, before the first changes what is there
            own_disks = bucket.is_address(options.workdir)
            if config.data.fold == ALL_FOLDS:
                every = functools.partial(
                    train_all, stop=stop, slots=options.pack, layout=options.layout, own_disks=own_disks
                )
                return crossval.train_folds(config, workdir, every)
            return train(config, dataset, workdir, stop, own_disks=own_disks)


def train_all(runs: crossval.Runs, stop: StopRequest, slots: int, layout: str, *, own_disks: bool = False) -> int:
    """Trains runs one after the other, or up to ``slots`` at a time; returns the first exit status that is not 0."""
    if slots:
        pack.train_all(runs, slots, layout, stop)
        return stop.status if stop.signal else 0
    for number, (config, workdir) in enumerate(runs):
        log.say(f"fold       {number} of {len(runs)}, {workdir}")
        if status := train(config, check_config(config), workdir, stop, own_disks=own_disks):
            return status
    return 0


def train(config: Config, dataset: Dataset, workdir: Path, stop: StopRequest, *, own_disks: bool = False) -> int:
    """Runs the recipe to its end, or until a signal; see `open_run.prepare`. Returns the exit status."""
    options = config.mesh
    devices = make_devices(
        options.data,
        options.space,
        batch=config.data.batch,
        parallel=options.parallel,
        accumulate=config.train.accumulate,
    )
    networks.check_space(config.model, config.data.patch, devices.mesh.shape["space"])
    log.say(f"devices    {environment.devices()} in {jax.process_count()} processes")
    log.say(f"mesh       data {devices.mesh.shape['data']} x space {devices.mesh.shape['space']}, {devices.parallel}")
    form = "sharded" if devices.mesh.shape["space"] > 1 else config.train.ops
    log.say(f"operations {ops.describe_forms(form)}")
    ready = open_run.prepare(config, dataset, workdir, stop, devices, own_disks=own_disks)
    try:
        fit(ready.run, ready.state, ready.progress, ready.open_stream(), validated=ready.validated)
    finally:
        ready.close()
        stop.busy = False
    if stop.signal:
        log.say(f"stopped    by {signal.Signals(stop.signal).name}, all saved; run the same command to go on")
        return stop.status
    log.say(
        f"done       predict with: python -m xdim_jax.predict --workdir={workdir} --input=<cases> --output=<folder>"
    )
    return 0


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
