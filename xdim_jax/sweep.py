"""Searches a space of configs; run again, or on other machines too, the same command joins in as one more worker.

Every trial is a run of xdim_jax.train in <workdir>/trial<number>, which evaluate, predict and report understand. Its
score is the best validation Dice. The trial of a worker that dies goes on elsewhere, from its last checkpoint.

The space is a Python file with a function suggest(trial) of optuna's suggest_* calls on config paths:

    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-4, 3e-3, log=True)
        trial.suggest_categorical("model.activation", ["relu", "silu"])
"""

if __name__ == "__main__":  # see xdim_jax/train.py: a pack trains in this process
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import REQUEUE, catch_signals
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import checkpoint
from xdim_jax.sweeps import study as studies
from xdim_jax.sweeps.arguments import add_study_arguments, storage_of
from xdim_jax.sweeps.dry import rehearse
from xdim_jax.sweeps.packed import PackedWorker
from xdim_jax.sweeps.space import check_space, load_space
from xdim_jax.sweeps.worker import Job, work
from xdim_jax.training.check import resolve_config
from xdim_jax.training.initial_weights import read_start
from xdim_jax.training.needs import parse_bytes
from xdim_jax.training.pack import LAYOUTS, check_packable


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    if argv and argv[0] == "report":
        from xdim_jax.sweeps import page

        return page.main(argv[1:])
    parser = make_parser(
        "xdim_jax.sweep",
        __doc__ or "",
        f"exit status: 0 all trials have ended, 2 unusable input, {REQUEUE} stopped by SIGTERM or SIGUSR1, the trial "
        "given back\n\nexamples:\n"
        "  python -m xdim_jax.sweep --config=configs/camus_omnianet.py:phantom --space=configs/sweeps/optimiser.py \\\n"
        "      --trials=20 --workdir=runs/sweep\n"
        "  python -m xdim_jax.sweep report --workdir=runs/sweep --out=sweep.html",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:WORDS]", help="a recipe; --config.<key>=<value> overrides it")
    add("--space", required=True, type=Path, metavar="FILE", help="what is varied")
    add("--trials", required=True, type=int, metavar="N", help="trials of the study, of all workers together")
    add("--workdir", required=True, help="folder of the trials, or gs://, s3://; all workers must see it")
    add_study_arguments(parser)
    add("--sampler", choices=studies.SAMPLERS, default="tpe", help="default: %(default)s")
    add("--pruner", choices=studies.PRUNERS, default="none", help="ends trials that lag behind; default: %(default)s")
    add("--pruner-warmup", type=int, default=1, metavar="N", help="validations before a trial may be pruned")
    add("--seed", type=int, help="of the sampler of this worker")
    add("--grace", type=float, default=studies.GRACE, metavar="S", help="seconds after which a silent worker is dead")
    add(
        "--pack",
        type=int,
        default=0,
        metavar="K",
        help="train up to K trials of one shape in one program; 0: each alone",
    )
    add(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="of a pack: see xdim_jax/training/pack.py; default: %(default)s",
    )
    add("--dry-run", action="store_true", help="compile every program that the space asks for, and say whether it fits")
    add("--budget", metavar="SIZE", help="of a dry run: memory of a device, e.g. 16GiB; default: this one's")
    add("--no-wait", action="store_true", help="end when there is nothing to take, not when all trials have ended")
    options, overrides = parser.parse_known_args(argv)
    if options.trials < 1:
        raise UserError(f"--trials={options.trials}: expected a number above 0")
    if options.pack < 0:
        raise UserError(f"--pack={options.pack}: expected 0, or a number of trials")
    if options.grace <= 0:
        raise UserError(f"--grace={options.grace}: expected seconds above 0")
    config = load_config(options.config, overrides)
    resolve_config(config, needs_data=not options.dry_run)
    suggest, text = load_space(options.space)
    distributions = check_space(suggest, options.space, options.config, overrides)
    if options.pack:
        check_packable(config, options.pack, options.layout)
    if options.dry_run:
        cache_programs()
        budget = parse_bytes(options.budget) if options.budget else None
        rehearse(suggest, options.config, overrides, slots=options.pack, layout=options.layout, budget=budget)
        return 0
    if config.init.weights and "init.weights" not in distributions:  # every trial would fail for want of them
        read_start(config.init)
    sampler = studies.make_sampler(options.sampler, distributions, options.seed)
    size = studies.grid_size(sampler)
    if size is not None and size < options.trials:
        raise UserError(f"--trials={options.trials}: the grid has {size} points; give --trials={size} or fewer")
    study = studies.open_study(
        studies.open_storage(storage_of(options)),
        options.study,
        sampler=sampler,
        pruner=studies.make_pruner(options.pruner, warmup=options.pruner_warmup),
    )
    facts = {"config": options.config, "overrides": sorted(overrides), "space": text}
    studies.agree(study, facts)
    done = sum(map(studies.settled, studies.by_origin(study).values()))
    log.say(f"study      {options.study} in {storage_of(options)}: {done} of {options.trials} trials have ended")
    job = Job(options.config, overrides, suggest, options.workdir, options.trials)
    with catch_signals() as stop:
        stop.busy = True
        beat = min(studies.BEAT, options.grace / 4)
        if options.pack:
            cache_programs()
            checkpoint.quieten_process()
            packed = PackedWorker(
                study, job, stop, slots=options.pack, layout=options.layout, beat=beat, grace=options.grace
            )
            status = packed.work(wait=not options.no_wait)
        else:
            status = work(study, job, stop, beat=beat, grace=options.grace, wait=not options.no_wait)
    if not status:
        log.say(f"report     python -m xdim_jax.sweep report --workdir={options.workdir} --out=<file>.html")
    return status


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
