"""Evaluation of a folder of predicted label maps against a folder of references, written to a result folder."""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.base.files import write_json
from xdim_jax.data.images.image import files_of
from xdim_jax.scoring import calibration, results, tables
from xdim_jax.scoring.evaluation import describe, score_jobs, write_evaluation
from xdim_jax.scoring.rules import Job, Rules, ScoredCase, column


def evaluate_folders(
    rules: Rules,
    pred: Path,
    ref: Path,
    out: Path,
    *,
    options: dict[str, Any],
    cases: Set[str] | None = None,
    metrics: Sequence[str] = (),
    missing: str = "error",
    processes: int = 1,
    patients: Mapping[str, str] | None = None,
    calibrated: bool = False,
) -> None:
    """Score all predictions of a folder, and write cases.csv, summary.json, the tables and evaluate.json.

    Args:
        rules: Rules of the challenge.
        pred: Folder of predicted label maps.
        ref: Folder of references.
        out: Folder for the results.
        options: Options of the rules, which are recorded in evaluate.json.
        cases: Ids of the cases that are scored; None for all. Each must have a reference.
        metrics: Names of metrics in addition to those of the rules.
        missing: What to do if a prediction is missing or unreadable. ``error``: raise UserError. ``penalise``: give the
            case the worst values of the challenge. ``skip``: omit the case, with a warning, and list it in
            evaluate.json.
        processes: Maximum number of scoring processes.
        calibrated: True to evaluate the probabilities and uncertainty maps in ``pred``, too.
        patients: Case id -> patient, for rules that do not define the patients; other cases are separate patients.

    Raises:
        UserError: A reference cannot be used, there is nothing to score, predictions are missing or unreadable, or
            ``cases.csv`` in the output folder is another file, e.g. the table of a data set.
    """
    results.check_output(out)
    if kept := [m for m in metrics if m in rules.columns and rules.name != "generic"]:
        log.warn(f"--metrics={','.join(kept)} is not added, because the rules {rules.name} have metrics of these names")
    if calibrated:
        calibration.check_probabilities(pred)
    jobs, surplus = rules.jobs(pred, ref)
    if patients:
        jobs = [
            dataclasses.replace(
                job, ref=dataclasses.replace(job.ref, patient=patients.get(job.ref.case_id, job.ref.patient))
            )
            for job in jobs
        ]
    if cases is not None:
        if absent := sorted(cases - {job.ref.case_id for job in jobs}):
            raise UserError(f"{len(absent)} of the cases to score have no reference in {ref}: {shorten(absent)}")
        jobs = [job for job in jobs if job.ref.case_id in cases]
    without = list(dict.fromkeys(job.ref.case_id for job in jobs if job.pred is None))
    if without and missing == "error":
        total = len({job.ref.case_id for job in jobs})
        raise UserError(
            f"{len(without)} of {total} references in {ref} have no prediction in {pred}: {shorten(without)}. Predict "
            "them, or give --missing=penalise to give them the worst values, or --missing=skip to omit them"
        )
    if all(job.pred is None for job in jobs) and missing == "skip":
        raise UserError(f"no reference in {ref} has a prediction in {pred}; expected at least one")
    _check_distinct(jobs)
    if surplus:
        log.warn(f"{len(surplus)} predictions without a reference are omitted: {shorten(surplus)}")
    skipped = set(without) if missing == "skip" else set()
    if missing == "skip":  # a case that lacks the prediction for one task of CHAOS is still scored for the other tasks
        jobs = [job for job in jobs if job.pred is not None]
    scored, extra_rows, extra = score_jobs(rules, jobs, metrics, processes=processes)
    problems = list(dict.fromkeys(case.problem for case in scored if case.problem))
    if problems and missing == "error":
        raise join_problems(problems, "cases that cannot be scored")
    for problem in problems:
        log.warn(f"{problem}: the case {'is omitted' if missing == 'skip' else 'gets the worst values'}")
    if problems and missing == "skip":  # again without these cases, because rules aggregate over all cases
        skipped |= {case.case_id for case in scored if case.problem}
        jobs = [job for job, case in zip(jobs, scored, strict=True) if not case.problem]
        if not jobs:
            raise UserError(f"no prediction in {pred} can be used; expected at least one")
        scored, extra_rows, extra = score_jobs(rules, jobs, metrics, processes=processes)
    if skipped:
        log.warn(f"{len(skipped)} cases are omitted: {shorten(sorted(skipped))}; the mean scores may be too good")
    scored = _add_absent_structures(scored, {job.ref.case_id: job.structures for job in jobs})
    if not any(case.values for case in scored):
        raise UserError(f"{ref} and {pred} contain no structure, only background; name the structures with --labels")
    for line in _unevaluated_structures(scored):
        log.warn(line)
    summary = results.summarise(rules, scored, extra) | {"skipped": sorted(skipped)}
    columns = dict(rules.columns) | {m: column(m) for m in metrics if m not in rules.columns}
    for name in (results.EVALUATE_FILE, results.CALIBRATION_FILE):  # written last; these are of an earlier evaluation
        if (out / name).exists():
            (out / name).unlink()
    write_evaluation(out, rules, scored + extra_rows, summary, tables.make_tables(summary, columns))
    record = {
        "pred": str(pred.absolute()),
        "ref": str(ref.absolute()),
        "rules": rules.name,
        "options": options | {"metrics": list(metrics), "missing": missing},
        "cases": _record(jobs),
        "skipped": sorted(skipped),
    }
    write_json(out / results.EVALUATE_FILE, record)
    for line in describe(summary, rules):
        log.say(line)
    if same := summary["identical"]:
        log.warn(
            f"{len(same)} of {summary['cases']} predictions are identical to their reference ({shorten(same)}): they "
            "are probably copies of the references, and their scores are meaningless"
        )
    if calibrated:
        usable = [job for job, case in zip(jobs, scored, strict=True) if job.pred is not None and not case.problem]
        found = calibration.calibrate(rules, usable, pred, out, processes=processes)
        for line in calibration.describe(found):
            log.say(line)
        for line in calibration.doubts(found):
            log.warn(line)
    log.say(f"done       {out}: {', '.join((results.CASES_FILE, results.SUMMARY_FILE, *results.TABLES_FILES))}")


def check_small_et_kept(pred: Path) -> None:
    """Raise UserError if small ET was removed from the predictions, because --tune_min_et needs all predicted ET."""
    record = pred / results.PREDICT_FILE
    minimum = results.read_prediction_record(pred).get("predict", {}).get("min_et", 0)
    if minimum:
        raise UserError(
            f"--tune_min_et: according to {record}, ET of fewer than {minimum} voxels was removed; first predict with "
            "--min_et=0 into another folder"
        )


def _check_distinct(jobs: Sequence[Job]) -> None:
    """Raise UserError if the prediction of a case is its reference file."""
    same = []
    for job in jobs:
        if job.pred is not None:
            pred, ref = (files_of(m.source)[0].resolve() for m in (job.pred, job.ref))
            same += [str(ref)] if pred == ref else []
    if same := list(dict.fromkeys(same)):
        raise UserError(
            f"{len(same)} references are also given as predictions: {shorten(same)}; give a --pred folder with "
            "predictions only"
        )


def _record(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return patient and files of every case. A case of several tasks may have a different prediction for each task."""
    found: dict[str, Any] = {}
    for job in jobs:
        entry = found.setdefault(job.ref.case_id, {"patient": job.ref.patient, "ref": "", "pred": []})
        entry["ref"] = str(job.ref.path.absolute())
        path = str(job.pred.path.absolute()) if job.pred else None
        entry["pred"] += [path] if path and path not in entry["pred"] else []
    return found


def _add_absent_structures(
    scored: Sequence[ScoredCase], annotated: Mapping[str, Sequence[str] | None]
) -> list[ScoredCase]:
    """Add NaN values to each case for structures that only other cases have.

    The masks of these structures are empty, unless the structure is not annotated in the case (``annotated``: case id
    -> structures, or None for all).

    This changes results only if the rules take the structures from the label maps, because a case then lacks the
    structures that are in neither of its maps. Results with tasks are returned unchanged, because CHAOS defines its
    structures.
    """
    metrics = {s: tuple(v) for case in scored for s, v in case.values.items()}
    if {case.attributes.get("task") for case in scored} != {None}:
        return list(scored)
    filled = []
    for case in scored:
        shown = annotated.get(case.case_id)
        absent = [s for s in metrics if s not in case.values and (shown is None or s in shown)]
        values = {s: case.values.get(s, dict.fromkeys(metrics[s], math.nan)) for s in metrics}
        filled.append(dataclasses.replace(case, values=values, empty={**case.empty, **dict.fromkeys(absent, "both")}))
    return filled


def _unevaluated_structures(scored: Sequence[ScoredCase]) -> list[str]:
    """Return a warning for each structure that is not in the reference of some cases, so that its metrics are NaN."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in scored:
        for structure, which in case.empty.items():
            values = case.values.get(structure, {})
            if which in ("ref", "both") and values and all(map(math.isnan, values.values())):
                found.setdefault((structure, which), []).append(case.case_id)
    return [
        f"{structure} is not in the reference of {shorten(list(dict.fromkeys(cases)))}, and is not evaluated there"
        + (", although it was predicted" if which == "ref" else "")
        for (structure, which), cases in found.items()
    ]
