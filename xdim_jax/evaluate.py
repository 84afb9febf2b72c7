"""Scores label maps against references by the rules of a challenge, or by any metrics.

    camus      Dice, MAD, HD (mm) of LV_endo, LV_epi, LA at ED and ES; volumes and EF by Simpson's biplane rule
    chaos      DICE, RAVD, ASSD, MSSD and their scores of 0 to 100, per case, organ and task
    brats2022  Dice, HD95 (voxels), sensitivity, specificity of WT, TC, ET, as the platform of 2021 and 2022
    brats2023  lesion by lesion; brats2024: glioma after treatment
    generic    any two folders, any --metrics

With --workdir instead of --pred and --ref, the validation cases of a run are predicted into <workdir>/predictions and
scored by the rules of its data set, into <workdir>/evaluation unless --out says otherwise.

Writes to --out: cases.csv (case_id,...,structure,metric,value), summary.json (means with 95 % intervals over patients,
quartiles, empty masks), tables.md and tables.tex (the paper's tables, its row beside ours), and evaluate.json (what was
compared). Compare two of them with python -m xdim_jax.compare.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax import bucket, cli, log
from xdim_jax.errors import UserError, join_problems, shorten
from xdim_jax.files import find_members, read_json, write_json, write_text
from xdim_jax.process import prefer_huge_pages
from xdim_jax.scoring import challenges, results, tables
from xdim_jax.scoring.masks import METRICS
from xdim_jax.scoring.results import number
from xdim_jax.scoring.rules import Job, LabelMap, Rules, Scored, column, score_case


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = cli.make_parser("xdim_jax.evaluate", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument("--rules", choices=challenges.NAMES, help="of which challenge")
    parser.add_argument("--pred", type=Path, help="folder of predicted label maps")
    parser.add_argument("--ref", type=Path, help="folder of references, also the data set itself")
    parser.add_argument(
        "--workdir",
        help="of a run or a cross-validation (gs://, s3:// too): its validation cases, for --pred and --ref",
    )
    parser.add_argument("--out", type=Path, help="folder for the results; made if it does not exist")
    parser.add_argument(
        "--missing",
        choices=["error", "penalise"],
        default="error",
        help="a reference whose prediction is missing or unreadable: stop, or give it the challenge's worst values "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--metrics",
        default="",
        help=f"more metrics, with commas, in mm; for generic: all of them. Known: {', '.join(METRICS)}",
    )
    parser.add_argument("--jobs", type=int, default=_cores(), help="processes (default: all cores)")
    challenges.add_options(parser)
    options = parser.parse_args(argv)
    options.metrics = challenges.parse_metrics(options.metrics)
    if not options.workdir:
        return _evaluate(options)
    with bucket.workdir(options.workdir) as options.workdir:
        return _evaluate(options)


def _evaluate(options: Any) -> int:
    wanted = _validation(options) if options.workdir else None
    if absent := [f"--{name}" for name in ("rules", "pred", "ref", "out") if getattr(options, name) is None]:
        raise UserError(f"{' and '.join(absent)} missing: give --rules, --pred, --ref and --out, or --workdir")
    rules = challenges.make_rules(options.rules, options)
    if options.tune_min_et:
        _check_untouched(options.pred)
    jobs, surplus = rules.jobs(options.pred, options.ref)
    if wanted is not None:
        jobs = [job for job in jobs if job.ref.case_id in wanted]
    missing = list(dict.fromkeys(job.ref.case_id for job in jobs if job.pred is None))
    if missing and options.missing == "error":
        total = len({job.ref.case_id for job in jobs})
        raise UserError(
            f"{len(missing)} of {total} references in {options.ref} have no prediction in {options.pred}: "
            f"{shorten(missing)}. Predict them, or give --missing=penalise to score them as the challenge does"
        )
    if surplus:
        log.warn(f"{len(surplus)} predictions without a reference are left out: {shorten(surplus)}")

    scored, extra_rows, extra = score_jobs(rules, jobs, options.metrics, processes=options.jobs)
    problems = list(dict.fromkeys(case.problem for case in scored if case.problem))
    if problems and options.missing == "error":
        raise join_problems(problems, "cases that cannot be scored")
    for problem in problems:
        log.warn(f"{problem}: scored as unreadable")
    scored = _with_absent(scored)
    if not any(case.values for case in scored):
        raise UserError(f"{options.ref} and {options.pred} hold no structure, only background; name some with --labels")
    for line in _not_evaluated(scored):
        log.warn(line)
    summary = results.summarise(rules, scored, extra)
    columns = dict(rules.columns) | {m: column(m) for m in options.metrics if m not in rules.columns}
    write(options.out, rules, scored + extra_rows, summary, tables.make_tables(summary, columns))
    record = {
        "pred": str(options.pred.absolute()),
        "ref": str(options.ref.absolute()),
        "rules": rules.name,
        "options": challenges.resolved(rules.name, options) | {"metrics": options.metrics, "missing": options.missing},
        "cases": _record(jobs),
    }
    write_json(options.out / results.EVALUATE_FILE, record)
    for line in describe(summary, rules):
        log.say(line)
    log.say(f"done       {options.out}: {', '.join((results.CASES_FILE, results.SUMMARY_FILE, *results.TABLES_FILES))}")
    return 0


def _validation(options: Any) -> set[str]:
    """Predicts the validation cases of ``--workdir`` and fills in the other options; returns the cases' ids."""
    if options.pred or options.ref:
        raise UserError("--workdir stands for --pred and --ref: give one or the other")
    from xdim_jax import predict  # with JAX, which scoring does without

    config = cli.read_config(find_members([options.workdir])[0])
    data = config.data.to_dict()
    usual = {"camus": "camus", "chaos": "chaos", "brats": f"brats{data.get('convention', '')[-4:]}"}
    options.rules = options.rules or usual.get(data["dataset"], "generic").replace("brats2021", "brats2022")
    if options.rules.startswith("brats"):
        options.convention = options.convention or data["convention"]
    if options.rules == "chaos":
        options.task = options.task or [str(data["task"])]
    options.pred = options.workdir / "predictions"
    options.out = options.out or options.workdir / "evaluation"
    options.ref, cases = predict.predict_validation(options.workdir, options.pred)
    return cases


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_untouched(pred: Path) -> None:
    """Raises UserError if small ET was removed from the predictions already."""
    record = pred / results.PREDICT_FILE
    minimum = read_json(record).get("predict", {}).get("min_et", 0) if record.is_file() else 0
    if minimum:
        raise UserError(
            f"--tune_min_et: {record} says that ET below {minimum} voxels was removed; predict with --min_et=0 into "
            "another folder first"
        )


def _record(jobs: Sequence[Job]) -> dict[str, Any]:
    """Patient and files of every case; predictions may differ by task."""
    found: dict[str, Any] = {}
    for job in jobs:
        entry = found.setdefault(job.ref.case_id, {"patient": job.ref.patient, "ref": "", "pred": []})
        entry["ref"] = str(job.ref.path.absolute())
        path = str(job.pred.path.absolute()) if job.pred else None
        entry["pred"] += [path] if path and path not in entry["pred"] else []
    return found


def _with_absent(scored: Sequence[Scored]) -> list[Scored]:
    """Where label maps say which structures there are, one that both maps of a case lack is empty in both."""
    metrics = {s: tuple(v) for case in scored for s, v in case.values.items()}
    facts = {case.facts.get("task") for case in scored}
    if facts != {None}:
        return list(scored)
    filled = []
    for case in scored:
        absent = [s for s in metrics if s not in case.values]
        values = {s: case.values.get(s, dict.fromkeys(metrics[s], math.nan)) for s in metrics}
        filled.append(dataclasses.replace(case, values=values, empty={**case.empty, **dict.fromkeys(absent, "both")}))
    return filled


def _not_evaluated(scored: Sequence[Scored]) -> list[str]:
    """Structures whose metrics are all undefined because the reference lacks them, with their cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in scored:
        for structure, which in case.empty.items():
            values = case.values.get(structure, {})
            if which in ("ref", "both") and values and all(map(math.isnan, values.values())):
                found.setdefault((structure, which), []).append(case.case_id)
    return [
        f"{structure} is not in the reference of {shorten(list(dict.fromkeys(cases)))}, and not evaluated there"
        + ("; but it was predicted" if which == "ref" else "")
        for (structure, which), cases in found.items()
    ]


def write(
    folder: Path, rules: Rules, scored: Sequence[Scored], summary: dict[str, Any], made: Sequence[tables.Table]
) -> None:
    """All files of an evaluation but the record of what was compared."""
    results.write_cases(folder / results.CASES_FILE, scored, rules.facts)
    write_json(folder / results.SUMMARY_FILE, summary)
    markdown, latex = results.TABLES_FILES
    write_text(folder / markdown, "\n".join(table.markdown() for table in made))
    write_text(folder / latex, "\n".join(table.latex() for table in made))


def score_jobs(
    rules: Rules, jobs: Sequence[Job], more: Sequence[str] = (), *, processes: int = 1
) -> tuple[list[Scored], list[Scored], dict[str, Any]]:
    """Scores all jobs; a pair of files that several jobs name is scored once.

    Returns:
        a result for every job; further rows, and entries of the summary, that the rules make of all of them.

    Raises:
        UserError: a reference cannot be used (all of those at once).
    """
    keys = [_key(job) for job in jobs]
    unique = {key: (job.ref, job.pred) for key, job in zip(keys, jobs, strict=True)}
    workers = max(min(processes, len(unique)), 1)
    with _pool(workers) as run:
        score = functools.partial(_score, rules, more=tuple(more))
        outcomes = dict(zip(unique, run(score, unique.values()), strict=True))
        if failures := [str(error) for error in outcomes.values() if isinstance(error, UserError)]:
            raise join_problems(failures, "references that cannot be used")
        scored = []
        for key, job in zip(keys, jobs, strict=True):
            found = outcomes[key]
            kept = {s: v for s, v in found.values.items() if job.structures is None or s in job.structures}
            scored.append(Scored(found.case_id, found.patient, job.facts, kept, found.empty, found.problem))
        rows, extra = rules.whole(jobs, scored, run) if rules.whole else ([], {})
    return scored, rows, extra


def _key(job: Job) -> tuple[Any, Any]:
    return job.ref.source, job.pred.source if job.pred else None


def _score(rules: Rules, maps: tuple[LabelMap, LabelMap | None], more: Sequence[str]) -> Scored | UserError:
    try:
        return score_case(rules, *maps, more)
    except UserError as error:
        return error


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]]:
    """``run(function, items)`` in processes, or here where one is enough."""
    if workers == 1:
        yield map
        return
    executor = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield executor.map
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a scoring process was killed, perhaps for lack of memory; give fewer --jobs") from error
    finally:
        executor.shutdown(cancel_futures=True)


def describe(summary: dict[str, Any], rules: Rules) -> list[str]:
    """The means of the main metrics as aligned lines, by group where the rules have groups."""
    shown = list(rules.headline)
    rows = [["", "", *(rules.columns[m].title + (f" ({u})" if (u := rules.columns[m].unit) else "") for m in shown)]]
    groups = {g: t for g, t in summary["groups"].items() if rules.name != "camus" or " " not in g}
    for group, table in (groups or {"": summary["structures"]}).items():
        for structure, values in table.items():
            rows.append([group, structure, *(number(values[m]["mean"], rules.columns[m].digits) for m in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    for name, a in summary.get("volumes", {}).get("agreement", {}).items():
        if a["bias"] is not None:
            lines.append(f"{name.upper()}: correlation {number(a['correlation'], 3)}, bias {number(a['bias'], 1)}")
    for task, values in summary.get("tasks", {}).items():
        lines.append(f"task {task}: score {number(values['score']['mean'], 2)} over {values['cases']} cases")
    if tuned := summary.get("min_et"):
        at, dice = tuned["best"], tuned["dice"]
        lines.append(
            f"smallest ET: {at} voxels give ET Dice {dice[str(at)]:.4f}, none {dice['0']:.4f} (predict --min_et)"
        )
    counts = [
        f"{structure} {n} {where}"
        for structure, found in summary["empty"].items()
        for where, n in (
            ("in the prediction", found["pred"]),
            ("in the reference", found["ref"]),
            ("in both", found["both"]),
        )
        if n
    ]
    return [*lines, *([f"empty: {', '.join(counts)}"] if counts else [])]


def command() -> NoReturn:
    """The console entry point."""
    if any(word.startswith("--workdir") for word in sys.argv):  # which predicts
        prefer_huge_pages()
    cli.run(main)


if __name__ == "__main__":
    command()
