"""Train and compare several settings (arms), for example inflation rules, or random and pre-trained weights.

    python -m xdim_jax.study run --plan=plan.toml --workdir=runs/study --config.data.root=/data/CAMUS_public
    python -m xdim_jax.study report --workdir=runs/study

run trains every arm of the plan with every number of training patients, seed and fold. Each is an ordinary run in
<workdir>/<arm>/n<patients>/seed<seed>, or seed<seed>_fold<fold> if the plan has folds. Finished runs are skipped and
interrupted runs are resumed, so the same command continues a study. When all runs are finished, it writes the report.

report writes results.csv (the Dice of every run, validation, case and region), tables.md and study.html (learning
curves, and paired tests with Holm's correction), sizes.png and steps.png (Dice over the number of training patients and
over the steps). It uses the runs that are finished. configs/studies/ has plans.
"""

if __name__ == "__main__":  # see xdim_jax/train.py
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

import argparse
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import atomic_path, write_text
from xdim_jax.base.signals import REQUEUE, catch_signals
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import checkpoint
from xdim_jax.studies.plan import PLAN_FILE, Plan, keep_plan, read_plan
from xdim_jax.studies.results import RESULTS_FILE, collect, compare_arms, write_results
from xdim_jax.studies.train import check_plan, train_plan
from xdim_jax.training.pack import LAYOUTS


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    options, overrides = _parser().parse_known_args(argv)
    if bucket.is_address(options.workdir):
        raise UserError(f"--workdir={options.workdir}: expected a local folder; copy it to a bucket after the training")
    options.workdir = Path(options.workdir)
    if options.command == "report":
        if overrides:
            raise UserError(f"unknown argument {overrides[0]}; report takes --workdir only")
        if not (options.workdir / PLAN_FILE).is_file():
            raise UserError(f"--workdir={options.workdir} is not the folder of a study: it has no {PLAN_FILE}")
        write_report(read_plan(options.workdir / PLAN_FILE), options.workdir)
        return 0
    plan = read_plan(options.plan)
    check_plan(plan, overrides)
    plan = keep_plan(options.plan, options.workdir)
    with catch_signals() as stop:
        stop.busy = True
        cache_programs()
        checkpoint.silence_orbax()
        status = train_plan(plan, options.workdir, overrides, stop, slots=options.pack, layout=options.layout)
    if not status:
        write_report(plan, options.workdir)
    return status


def write_report(plan: Plan, workdir: Path) -> None:
    """Write results.csv, tables.md, study.html and two figures. Raises UserError if no run is finished."""
    from xdim_jax.studies import page  # imports matplotlib, which training does not need

    scores = collect(plan, workdir)
    tests = compare_arms(scores, plan.sizes, list(plan.arms))
    write_results(workdir / RESULTS_FILE, plan, workdir)
    write_text(workdir / "tables.md", "\n".join(t.markdown() for t in page.make_tables(plan, scores, tests)))
    write_text(workdir / "study.html", page.render(plan, (workdir / PLAN_FILE).read_text("utf-8"), scores, tests))
    for name, picture in (("sizes.png", page.draw_sizes(plan, scores)), ("steps.png", page.draw_steps(plan, scores))):
        with atomic_path(workdir / name) as temporary:
            temporary.write_bytes(base64.b64decode(picture.png))
    for line in page.format_lines(plan, scores, tests):
        log.say(line)
    log.say(f"report     {workdir / 'study.html'}, tables.md, {RESULTS_FILE}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "xdim_jax.study",
        __doc__ or "",
        f"exit status: 0 done; 2 unusable input, or some runs failed; {REQUEUE} stopped by SIGTERM, SIGUSR1 or "
        "SIGHUP, and 130 by Ctrl-C:\nrun the same command again to resume.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report")
    train = commands.add_parser("run", help="train all runs that are not finished, and write the report")
    train.add_argument(
        "--plan", type=Path, required=True, metavar="FILE", help="the plan, see xdim_jax/studies/plan.py"
    )
    train.add_argument("--pack", type=int, default=1, metavar="K", help="train up to K runs in one program; default: 1")
    train.add_argument("--layout", choices=LAYOUTS, default="auto", help="layout of a pack, see docs/sweeps.md")
    report = commands.add_parser("report", help="write the report of the runs that are finished")
    for command in (train, report):
        command.add_argument("--workdir", required=True, help="folder of the study")
    return parser


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
