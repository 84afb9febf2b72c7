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

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.base.files import read_json, write_json
from xdim_jax.base.huge_pages import prefer_huge_pages
from xdim_jax.data.datasets import scoring_rules
from xdim_jax.runs.workdir import find_members, read_config
from xdim_jax.scoring import challenges, results, tables
from xdim_jax.scoring.evaluation import describe, score_jobs, write_evaluation
from xdim_jax.scoring.masks import METRICS
from xdim_jax.scoring.rules import Job, ScoredCase, column


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = make_parser("xdim_jax.evaluate", __doc__ or "", "exit status: 0 done, 2 unusable input")
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
    write_evaluation(options.out, rules, scored + extra_rows, summary, tables.make_tables(summary, columns))
    record = {
        "pred": str(options.pred.absolute()),
        "ref": str(options.ref.absolute()),
        "rules": rules.name,
        "options": challenges.resolve_options(rules.name, options)
        | {"metrics": options.metrics, "missing": options.missing},
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
    from xdim_jax.inference import predictions  # with JAX, which scoring does without

    config = read_config(find_members([options.workdir])[0])
    usual, determined = scoring_rules(config.data.to_dict())
    options.rules = options.rules or usual
    for key, value in determined.items():  # those that rules of another challenge do not have are not needed
        if challenges.accepts(options.rules, key) and not getattr(options, key):
            setattr(options, key, value)
    options.pred = options.workdir / "predictions"
    options.out = options.out or options.workdir / "evaluation"
    options.ref, cases = predictions.predict_validation(options.workdir, options.pred)
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


def _with_absent(scored: Sequence[ScoredCase]) -> list[ScoredCase]:
    """Where label maps say which structures there are, one that both maps of a case lack is empty in both."""
    metrics = {s: tuple(v) for case in scored for s, v in case.values.items()}
    facts = {case.attributes.get("task") for case in scored}
    if facts != {None}:
        return list(scored)
    filled = []
    for case in scored:
        absent = [s for s in metrics if s not in case.values]
        values = {s: case.values.get(s, dict.fromkeys(metrics[s], math.nan)) for s in metrics}
        filled.append(dataclasses.replace(case, values=values, empty={**case.empty, **dict.fromkeys(absent, "both")}))
    return filled


def _not_evaluated(scored: Sequence[ScoredCase]) -> list[str]:
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


def command() -> NoReturn:
    """The console entry point."""
    if any(word.startswith("--workdir") for word in sys.argv):  # which predicts
        prefer_huge_pages()
    run(main)


if __name__ == "__main__":
    command()
