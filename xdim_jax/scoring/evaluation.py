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
import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.base.files import write_json, write_text
from xdim_jax.scoring import results, tables
from xdim_jax.scoring.results import number
from xdim_jax.scoring.rules import Job, LabelMap, Rules, Scored, score_case


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
