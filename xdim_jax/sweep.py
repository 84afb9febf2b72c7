"""Search for hyperparameters with the best validation Dice.

The command is a worker, which trains trials of a study. To train several trials concurrently, run the same command
several times, on one machine or on several machines that can access the storage of the study. Each trial is a run of
xdim_jax.train in <workdir>/trial<number>, or in <workdir>/<study>/trial<number> if --study is given, so evaluate,
predict and report accept it. Its score is the best validation Dice. If a worker dies, another worker resumes its trial
from the last checkpoint.

The search space is a Python file with a function suggest(trial), which calls the methods suggest_* of an Optuna trial
with config keys as names:

    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-4, 3e-3, log=True)
        trial.suggest_categorical("model.activation", ["relu", "silu"])

"python -m xdim_jax.sweep report --help" describes the report of a sweep.
"""

if __name__ == "__main__":  # this may restart the process, so it comes before the imports, which take seconds
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_text
from xdim_jax.base.signals import REQUEUE, StopRequest, catch_signals
from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import checkpoint
from xdim_jax.sweeps import optuna_study as studies
from xdim_jax.sweeps.dry_run import dry_run
from xdim_jax.sweeps.packed import PackedWorker
from xdim_jax.sweeps.space import check_space, load_space
from xdim_jax.sweeps.worker import Job, run_worker
from xdim_jax.training.absent_devices import names as target_names
from xdim_jax.training.absent_devices import open_target
from xdim_jax.training.check import resolve_config
from xdim_jax.training.initial_weights import read_initial_weights
from xdim_jax.training.needs import parse_bytes
from xdim_jax.training.pack import LAYOUTS, check_packable

_STUDY = "sweep"  # default name of a study


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    if argv and argv[0] == "report":
        return _write_report(_report_parser().parse_args(argv[1:]))
    options, overrides = _parser().parse_known_args(argv)
    _check_options(options)
    # from the start: the exit status of a worker that is stopped early lets the scheduler queue it again
    with catch_signals() as stop:
        return _run(options, overrides, stop)


def _run(options: argparse.Namespace, overrides: Sequence[str], stop: StopRequest) -> int:
    """Check the sweep, then train its trials or, with ``--dry-run``, plan them; return the exit status."""
    config = load_config(options.config, overrides)
    resolve_config(config, needs_data=not options.dry_run)
    if config.data.fold == ALL_FOLDS:
        raise UserError(f"--config={options.config} trains all folds; a trial trains one fold: give :fold=<number>")
    suggest, space = load_space(options.space)
    distributions = check_space(suggest, options.space, options.config, overrides)
    if options.pack:
        check_packable(config, options.pack, options.layout)
    if options.dry_run:
        cache_programs()
        budget = parse_bytes(options.budget) if options.budget else None
        target = open_target(options.target) if options.target else None
        slots, layout = options.pack, options.layout
        dry_run(suggest, options.config, overrides, slots=slots, layout=layout, budget=budget, target=target)
        return 0
    if config.init.weights and "init.weights" not in distributions:
        if "model.encoder.name" in distributions:
            raise UserError(
                f"--space={options.space} has several encoders, but config.init.weights={config.init.weights} belongs "
                "to one of them; give a recipe with random weights (:scratch), or remove model.encoder.name"
            )
        read_initial_weights(config.init)  # report an error now, instead of once for every trial
    if options.sampler == "grid":
        _check_grid(options.trials, studies.grid_size(distributions))
    study = _open_study(options, distributions)
    studies.record_search(study, {"config": options.config, "overrides": sorted(overrides), "space": space})
    ended = sum(map(studies.has_ended, studies.group_attempts(study).values()))
    storage = studies.without_password(_storage(options))
    log.say(f"study      {options.study} in {storage}: {ended} of {options.trials} trials have ended")
    # another study in the same workdir has its own trials
    root = options.workdir if options.study == _STUDY else f"{options.workdir}/{options.study}"
    status = _work(study, Job(options.config, overrides, suggest, root, options.trials), options, stop)
    if not status:
        more = "" if options.study == _STUDY else f" --study={options.study}"
        more += f" --storage={studies.without_password(options.storage)}" if options.storage else ""
        log.say(f"report     python -m xdim_jax.sweep report --workdir={options.workdir}{more} --out=<file>.html")
    return status


def _check_options(options: argparse.Namespace) -> None:
    """Raise UserError if a number is out of range, or if options exclude each other."""
    if options.trials < 1:
        raise UserError(f"--trials={options.trials}: expected a number above 0")
    if options.pack < 0:
        raise UserError(f"--pack={options.pack}: expected a number of trials, or 0 to train each trial alone")
    if options.target and not options.dry_run:
        raise UserError(f"--target={options.target} needs --dry-run: trials are trained on the devices of this machine")
    if options.target and options.pack:
        raise UserError(
            f"--target={options.target} and --pack={options.pack} exclude each other: packs are compiled for the "
            "devices of this machine only"
        )
    if options.budget and not options.dry_run:
        raise UserError(f"--budget={options.budget} needs --dry-run, which compares it with the memory of each trial")
    if options.layout != "auto" and not options.pack:
        raise UserError(f"--layout={options.layout} needs --pack: it is the layout of several trials in one program")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise UserError(f"--seed={options.seed}: expected 0 to {2**32 - 1}")
    if options.pruner_warmup < 0:
        raise UserError(f"--pruner-warmup={options.pruner_warmup}: expected 0 or more validations")
    if options.grace <= 0:
        raise UserError(f"--grace={options.grace}: expected seconds above 0")


def _check_grid(trials: int, size: int) -> None:
    """Raise UserError if there are more trials than points of the grid."""
    if size < trials:
        raise UserError(f"--trials={trials}: the grid has {size} points; give --trials={size} or fewer")


def _storage(options: argparse.Namespace) -> str:
    """Return ``--storage``, or its default in the workdir. Raises UserError if the workdir is in a bucket."""
    if not options.storage and bucket.is_address(options.workdir):
        raise UserError(
            f"--workdir={options.workdir}: the study cannot be stored in a bucket; give --storage=postgresql://..., or "
            "the path of a journal file that all workers can access"
        )
    return options.storage or str(Path(options.workdir) / "study.journal")


def _open_study(options: argparse.Namespace, distributions: dict[str, Any]) -> Any:
    """Open the study of ``--study`` and ``--storage``; create it if it does not exist."""
    return studies.open_study(
        studies.open_storage(_storage(options)),
        options.study,
        sampler=studies.make_sampler(options.sampler, distributions, options.seed),
        pruner=studies.make_pruner(options.pruner, warmup=options.pruner_warmup),
    )


def _work(study: Any, job: Job, options: argparse.Namespace, stop: StopRequest) -> int:
    """Train trials until all have ended, or until a signal arrives; return the exit status."""
    heartbeat, grace, wait = min(studies.HEARTBEAT_SECONDS, options.grace / 4), options.grace, not options.no_wait
    stop.busy = True
    if not options.pack:
        return run_worker(study, job, stop, heartbeat=heartbeat, grace=grace, wait=wait)
    cache_programs()
    checkpoint.silence_orbax()
    worker = PackedWorker(study, job, stop, slots=options.pack, layout=options.layout, heartbeat=heartbeat, grace=grace)
    return worker.run(wait=wait)


def _write_report(options: argparse.Namespace) -> int:
    """Write the report of a study, and log the best trial."""
    from xdim_jax.sweeps import page  # imports matplotlib, which workers do not need

    storage = _storage(options)
    if "://" not in storage and not Path(storage).is_file():
        raise UserError(f"--storage={storage} does not exist; give the --workdir of a sweep, or its --storage")
    study = studies.open_study(studies.open_storage(storage), options.study, create=False)
    write_text(options.out, page.render(study))
    log.say(f"report     {options.out.absolute()}")
    ranked = page.rank_trials(studies.group_attempts(study))
    for origin, trial in page.complete_trials(ranked)[:1]:
        log.say(f"best       trial {origin}: Dice {trial.value:.4f}, {page.format_parameters(trial)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "xdim_jax.sweep",
        __doc__ or "",
        "Any value of the config can be overridden for all trials: --config.<key>=<value>\n\n"
        f"Exit status: 0 all trials have ended; 2 unusable input; {REQUEUE} stopped by SIGTERM, SIGUSR1 or SIGHUP, "
        "and 130 by\nCtrl-C: the trial is queued again.\n\n"
        "examples:\n"
        "  python -m xdim_jax.sweep --config=configs/camus_omnianet.py:phantom --space=configs/sweeps/optimiser.py \\\n"
        "      --trials=20 --workdir=runs/sweep\n"
        "  python -m xdim_jax.sweep report --workdir=runs/sweep --out=sweep.html",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT,...]", help="a recipe, e.g. configs/brats_dxnet.py")
    add("--space", required=True, type=Path, metavar="FILE", help="search space, e.g. configs/sweeps/optimiser.py")
    add("--trials", required=True, type=int, metavar="N", help="number of trials of the study, over all workers")
    add("--workdir", required=True, help="folder of the trials (also gs://, s3://); all workers need access to it")
    _add_study_arguments(parser)
    add("--sampler", choices=studies.SAMPLERS, default="tpe", help="default: %(default)s")
    add(
        "--pruner",
        choices=studies.PRUNERS,
        default="none",
        help="rule that stops trials with a low validation Dice early; default: %(default)s",
    )
    add(
        "--pruner-warmup",
        type=int,
        default=1,
        metavar="N",
        help="number of validations before a trial may be pruned; default: %(default)s",
    )
    add("--seed", type=int, help="seed of the samplers tpe and random of this worker; grid needs none")
    add(
        "--grace",
        type=float,
        default=studies.GRACE_SECONDS,
        metavar="S",
        help="seconds after which a worker without a heartbeat counts as dead; default: %(default)s",
    )
    add(
        "--pack",
        type=int,
        default=0,
        metavar="K",
        help="train up to K trials in one program; default: 0, one trial after the other",
    )
    add("--layout", choices=LAYOUTS, default="auto", help="layout of a pack, see docs/sweeps.md; default: %(default)s")
    add(
        "--dry-run",
        action="store_true",
        help="only compile every program of the search space, and check whether its memory fits",
    )
    add(
        "--budget",
        metavar="SIZE",
        help="for --dry-run: memory of a device, e.g. 16GiB; default: memory of the target, or of this machine",
    )
    add("--target", metavar="DEVICE", help=f"for --dry-run: devices that this machine does not have: {target_names()}")
    add(
        "--no-wait",
        action="store_true",
        help="exit as soon as there is no trial to start, without waiting for the trials of other workers",
    )
    return parser


def _report_parser() -> argparse.ArgumentParser:
    """Return the parser of ``sweep report``."""
    parser = make_parser(
        "xdim_jax.sweep report",
        "Write a report about a sweep as one HTML file: the trials from best to worst, the importance of the "
        "parameters,\na plot of all parameters in parallel coordinates, and the validation curves.",
        "Exit status: 0 done; 2 unusable input.",
    )
    parser.add_argument("--workdir", default=".", help="folder of the trials; default: the current folder")
    _add_study_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, help="HTML file to write")
    return parser


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a study."""
    parser.add_argument(
        "--study", default=_STUDY, metavar="NAME", help="name of the study in its storage; default: %(default)s"
    )
    parser.add_argument(
        "--storage",
        default="",
        metavar="PATH|URL",
        help="a journal file, sqlite:///<path> or postgresql://...; default: <workdir>/study.journal",
    )


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
