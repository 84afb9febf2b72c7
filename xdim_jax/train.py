"""Train the network of a recipe. The same command resumes an interrupted run."""

if __name__ == "__main__":  # this may restart the process, so it comes before the imports, which take seconds
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import REQUEUE, StopRequest, catch_signals, install_handlers, say_stopped
from xdim_jax.data.case import Dataset
from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import checkpoint
from xdim_jax.training import crossval, mesh, pack
from xdim_jax.training.check import resolve_config
from xdim_jax.training.train import train_one_by_one, train_run


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    options, overrides = _parser().parse_known_args(argv)
    config = load_config(options.config, overrides)
    if options.pack and config.data.fold != ALL_FOLDS:
        raise UserError(
            f"--pack={options.pack} needs the variant fold=all; to pack the runs of a sweep, use "
            "python -m xdim_jax.sweep --pack"
        )
    if options.layout != "auto" and not options.pack:
        raise UserError(f"--layout={options.layout} is the layout of a pack; give --pack, or omit it")
    with catch_signals() as stop:
        mesh.join_processes(options.coordinator, options.processes, options.process)
        install_handlers(stop)  # again, because JAX installs its own handler if there are several processes
        if jax.process_index():
            log.quieten()
        resolved, dataset = resolve_config(config)
        if options.pack:
            pack.check_packable(resolved, options.pack, options.layout)
        cache_programs()
        checkpoint.silence_orbax()
        first = not jax.process_index()
        if not first:
            mesh.barrier("opened")  # process 0 may first upload files of an earlier command
        with bucket.workdir(options.workdir, writes=first) as workdir:
            if first:
                mesh.barrier("opened")
            mesh.barrier("fetched")  # process 0 must not change the bucket before all processes have read it
            status = _train(options, resolved, dataset, workdir, stop)
        if status:
            say_stopped(stop)
        return status


def _train(options: argparse.Namespace, config: Config, dataset: Dataset, workdir: Path, stop: StopRequest) -> int:
    """Train one run or all folds in a local workdir; return the exit status, which is not 0 after a signal."""
    separate_disks = bucket.is_address(options.workdir)
    if config.data.fold != ALL_FOLDS:
        return train_run(config, dataset, workdir, stop, separate_disks=separate_disks)
    if options.pack:
        train = functools.partial(pack.train_runs, slots=options.pack, layout=options.layout, stop=stop)
    else:
        train = functools.partial(train_one_by_one, stop=stop, separate_disks=separate_disks)
    return crossval.train_folds(config, workdir, train)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "xdim_jax.train",
        (__doc__ or "") + "\n\nThe command writes to the workdir: config.json, split.json, data.json, pretrained.json, "
        "environment.json,\nmetrics.jsonl, steps.jsonl, tensorboard/, overlays/, checkpoints/, best/.",
        "Any value of the config can be overridden: --config.<key>=<value>, e.g. --config.data.root=/data/BraTS\n\n"
        f"Exit status: 0 done; 2 unusable input; {REQUEUE} stopped by SIGTERM, SIGUSR1 or SIGHUP, and 130 by Ctrl-C: "
        "everything is\nsaved, run the same command again to resume.\n\n"
        "examples:\n"
        "  python -m xdim_jax.train --config=configs/brats_dxnet.py:phantom --workdir=runs/demo\n"
        "  python -m xdim_jax.train --config=configs/brats_dxnet.py --workdir=runs/dx \\\n"
        "      --config.data.root=/data/BraTS2021_Training_Data\n"
        "  python -m xdim_jax.train --config=configs/camus_omnianet.py:fold=all --workdir=runs/camus \\\n"
        "      --config.data.root=/data/CAMUS_public",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT,...]", help="a recipe, e.g. configs/brats_dxnet.py"
    )
    parser.add_argument(
        "--workdir", required=True, help="folder of the run (also gs://, s3://), created if it does not exist"
    )
    group = parser.add_argument_group(
        "several processes", "all processes of a run are started by the same command, except for --process"
    )
    group.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="address of process 0; auto: the launcher provides it (SLURM, Open MPI, TPU pods)",
    )
    group.add_argument(
        "--processes", type=int, metavar="N", help="number of processes, if the launcher does not provide it"
    )
    group.add_argument(
        "--process", type=int, metavar="I", help="index of this process, from 0, if the launcher does not provide it"
    )
    group = parser.add_argument_group("folds")
    group.add_argument("--pack", type=int, default=0, metavar="K", help="with fold=all: train K folds in one program")
    group.add_argument(
        "--layout", choices=pack.LAYOUTS, default="auto", help="layout of a pack, see docs/sweeps.md; default: auto"
    )
    return parser


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
