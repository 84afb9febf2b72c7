"""Parts of an evaluation: scoring of all cases in several processes, result files, and log lines."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.base.files import write_json, write_text
from xdim_jax.scoring import results, tables
from xdim_jax.scoring.results import number
from xdim_jax.scoring.rules import Job, LabelMap, Rules, ScoredCase, score_case


def write_evaluation(
    folder: Path, rules: Rules, scored: Sequence[ScoredCase], summary: dict[str, Any], shown: Sequence[tables.Table]
) -> None:
    """Write the result files of an evaluation, except ``evaluate.json``.

    Args:
        folder: Folder of the files.
        rules: Rules of the challenge.
        scored: Rows of ``cases.csv``.
        summary: Content of ``summary.json``.
        shown: Tables in ``tables.md`` and ``tables.tex``.
    """
    results.write_cases(folder / results.CASES_FILE, scored, rules.attributes)
    write_json(folder / results.SUMMARY_FILE, summary)
    markdown, latex = results.TABLES_FILES
    write_text(folder / markdown, "\n".join(table.markdown() for table in shown))
    write_text(folder / latex, "\n".join(table.latex() for table in shown))


def score_jobs(
    rules: Rules, jobs: Sequence[Job], extra_metrics: Sequence[str] = (), *, processes: int = 1
) -> tuple[list[ScoredCase], list[ScoredCase], dict[str, Any]]:
    """Score all jobs. If several jobs have the same reference and prediction, these are scored only once.

    Args:
        rules: Rules of the challenge.
        jobs: Jobs.
        extra_metrics: Names of metrics to compute in addition to those of the rules.
        processes: Maximum number of processes.

    Returns:
        The scores of each job, in the order of the jobs; additional rows of ``cases.csv``; additional entries of the
        summary. ``Rules.aggregate`` computes the last two; they are empty if it is None.

    Raises:
        UserError: References cannot be used (the message lists all of them), or a process was killed.
    """
    keys = [_key(job) for job in jobs]
    unique = {key: (job.ref, job.pred) for key, job in zip(keys, jobs, strict=True)}
    with parallel_map(max(min(processes, len(unique)), 1)) as run:
        score = functools.partial(_score, rules, extra_metrics=tuple(extra_metrics))
        outcomes = dict(zip(unique, run(score, unique.values()), strict=True))
        if failures := [str(error) for error in outcomes.values() if isinstance(error, UserError)]:
            raise join_problems(failures, "references cannot be used")
        scored = []
        for key, job in zip(keys, jobs, strict=True):
            found = outcomes[key]
            kept = {s: v for s, v in found.values.items() if job.structures is None or s in job.structures}
            empty = {s: which for s, which in found.empty.items() if s in kept}
            scored.append(dataclasses.replace(found, attributes=job.attributes, values=kept, empty=empty))
        rows, extra = rules.aggregate(jobs, scored, run) if rules.aggregate else ([], {})
    return scored, rows, extra


def _key(job: Job) -> tuple[Any, Any]:
    """Return the files of a job."""
    return job.ref.source, job.pred.source if job.pred else None


def _score(
    rules: Rules, maps: tuple[LabelMap, LabelMap | None], extra_metrics: Sequence[str]
) -> ScoredCase | UserError:
    """Score a reference and a prediction. Return the error if the reference cannot be used."""
    try:
        return score_case(rules, *maps, extra_metrics)
    except UserError as error:
        return error


@contextlib.contextmanager
def parallel_map(processes: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]]:
    """Context manager that yields a function like ``map`` that runs in several processes; for one process, ``map``.

    Raises:
        UserError: A process was killed.
    """
    if processes == 1:
        yield map
        return
    executor = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield executor.map
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a scoring process was killed, probably because memory was exhausted; use fewer processes with --jobs"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def describe(summary: dict[str, Any], rules: Rules) -> list[str]:
    """Return log lines about an evaluation: means of the main metrics, and results over the whole data set."""
    return [*_mean_lines(summary, rules), *_aggregate_lines(summary), *_empty_lines(summary)]


def _mean_lines(summary: dict[str, Any], rules: Rules) -> list[str]:
    """Return a table of the means of the main metrics, for every group if the rules have groups."""
    shown = list(rules.main_metrics)
    rows = [["", "", *(rules.columns[m].title + (f" ({u})" if (u := rules.columns[m].unit) else "") for m in shown)]]
    # CAMUS also has groups of one view and instant, such as "2CH ED"; the log shows only "ED" and "ES"
    groups = {g: t for g, t in summary["groups"].items() if rules.name != "camus" or " " not in g}
    for group, table in (groups or {"": summary["structures"]}).items():
        for structure, values in table.items():
            rows.append([group, structure, *(number(values[m]["mean"], rules.columns[m].digits) for m in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def _aggregate_lines(summary: dict[str, Any]) -> list[str]:
    """Return a line for each result that ``Rules.aggregate`` added to the summary."""
    lines = []
    for name, a in summary.get("volumes", {}).get("agreement", {}).items():
        if a["bias"] is not None:
            unit = "%" if name == "ef" else "ml"
            lines.append(
                f"{name.upper()}: correlation {number(a['correlation'], 3)}, bias {number(a['bias'], 1)} {unit}"
            )
    if outliers := summary.get("outliers"):
        text = ", ".join(f"{name} {found['count']} of {found['images']}" for name, found in outliers.items())
        lines.append(f"outliers (contours with a larger MAD or HD than between two cardiologists): {text}")
    titles = {"reasons": "no volumes", "implausible": "implausible volumes, expected 0 < ESV < EDV < 600 ml"}
    for key, words in titles.items():
        for patient, text in summary.get("volumes", {}).get(key, {}).items():
            lines.append(f"warning: {patient}: {words} ({text})")
    for task, values in summary.get("tasks", {}).items():
        lines.append(f"task {task}: score {number(values['score']['mean'], 2)} over {values['cases']} cases")
    if tuned := summary.get("min_et"):
        best, dice = tuned["best"], tuned["dice"]
        lines.append(
            f"the mean Dice of ET is highest with --min_et={best} of xdim_jax.predict: {dice[str(best)]:.4f}; with "
            f"--min_et=0 it is {dice['0']:.4f}"
        )
    return lines


def _empty_lines(summary: dict[str, Any]) -> list[str]:
    """Return a line with the numbers of empty masks, if there are any."""
    places = {"pred": "in the prediction", "ref": "in the reference", "both": "in both"}
    counts = [
        f"{structure} {found[which]} {place}"
        for structure, found in summary["empty"].items()
        for which, place in places.items()
        if found[which]
    ]
    return [f"empty masks: {', '.join(counts)}"] if counts else []
