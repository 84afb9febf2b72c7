"""What the mains leave beside their output, and read of one another: file names, formats, statistics over cases.

``evaluate`` writes ``cases.csv`` in long form, ``summary.json``, ``tables.md``, ``tables.tex`` and ``evaluate.json``;
``predict`` writes ``predict.json``.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import atomic_path, read_json
from xdim_jax.scoring.rules import Rules, Scored, Values

CASES_FILE, SUMMARY_FILE, EVALUATE_FILE, PREDICT_FILE = "cases.csv", "summary.json", "evaluate.json", "predict.json"
TABLES_FILES = ("tables.md", "tables.tex")
_FIRST, _LAST = ["case_id"], ["structure", "metric", "value"]
DRAWS = 5000  # of the bootstrap
_AGAIN = "write it with python -m xdim_jax.evaluate"


def write_cases(path: Path, scored: Sequence[Scored], facts: Sequence[str] = ()) -> None:
    """One row per case, structure and metric, with the facts as further columns; whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_FIRST, *facts, *_LAST])
        for case in scored:
            known = [case.facts.get(name, "") for name in facts]
            for structure, values in case.values.items():
                for metric, value in values.items():
                    writer.writerow([case.case_id, *known, structure, metric, repr(float(value))])


def read_cases(path: Path, patients: Mapping[str, str] | None = None) -> list[Scored]:
    """Reads what `write_cases` wrote. Raises UserError if the file is missing or has other columns."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {_AGAIN}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table ({error}); {_AGAIN}") from error
    if columns[:1] != _FIRST or columns[-3:] != _LAST:
        expected = ", ".join([*_FIRST, "...", *_LAST])
        raise UserError(f"{path} has the columns {', '.join(columns)}; expected {expected}; {_AGAIN}")
    found: dict[tuple[str, ...], Values] = {}
    facts = columns[1:-3]
    for number, row in enumerate(rows, 2):
        try:
            if None in row:
                raise ValueError
            value = float(row["value"])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path} line {number} has not {len(columns)} fields, or no number last; {_AGAIN}"
            ) from error
        values = found.setdefault((row["case_id"], *(row[f] for f in facts)), {})
        values.setdefault(row["structure"], {})[row["metric"]] = value
    if not found:
        raise UserError(f"{path} holds no case; {_AGAIN}")
    return [
        Scored(key[0], (patients or {}).get(key[0], key[0]), dict(zip(facts, key[1:], strict=True)), values, {})
        for key, values in found.items()
    ]


def read_record(folder: Path) -> dict[str, Any]:
    """What an evaluation compared: ``rules``, ``pred``, ``ref``, ``options``, ``cases``. Raises UserError."""
    path = folder / EVALUATE_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_AGAIN} --out={folder}")
    record = read_json(path)
    wanted = {"rules": str, "pred": str, "ref": str, "options": dict, "cases": dict}
    wrong = [k for k, kind in wanted.items() if not isinstance(record, dict) or not isinstance(record.get(k), kind)]
    if wrong or any(not isinstance(v, dict) or "patient" not in v for v in record["cases"].values()):
        raise UserError(f"{path} lacks {', '.join(wrong) or 'the patients of its cases'}; {_AGAIN} --out={folder}")
    return record


def statistics(values: Sequence[float], patients: Sequence[str] | None = None) -> dict[str, float | None]:
    """Of a metric over cases; what is NaN is left out and counted.

    Returns:
        count, missing; mean, sd (ddof 1), median, quartiles (linear), min, max; with ``patients``, low and high: the
        95 % confidence interval of the mean (percentile bootstrap over patients). None where there are too few.
    """
    array = np.asarray(values, np.float64)
    known = np.isfinite(array)
    some = array[known]
    found: dict[str, float | None] = {"count": int(some.size), "missing": int((~known).sum())}
    names = ("mean", "sd", "median", "q25", "q75", "min", "max", "low", "high")
    if not some.size:
        return found | dict.fromkeys(names)
    q25, median, q75 = np.percentile(some, [25, 50, 75])
    found |= {
        "mean": float(some.mean()),
        "sd": float(some.std(ddof=1)) if some.size > 1 else None,
        "median": float(median),
        "q25": float(q25),
        "q75": float(q75),
        "min": float(some.min()),
        "max": float(some.max()),
    }
    low, high = interval(some, np.asarray(patients)[known]) if patients is not None else (None, None)
    return found | {"low": low, "high": high}


def interval(values: np.ndarray, patients: np.ndarray) -> tuple[float | None, float | None]:
    """95 % confidence interval of a mean, by drawing patients with replacement; None for fewer than two patients."""
    _, index = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    if len(sums) < 2:
        return None, None
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), DRAWS)
    low, high = np.percentile(drawn @ sums / (drawn @ counts), [2.5, 97.5])
    return float(low), float(high)


def table_of(scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Structure to metric to `statistics`."""
    structures: dict[str, list[tuple[str, Mapping[str, float]]]] = {}
    for case in scored:
        for structure, values in case.values.items():
            structures.setdefault(structure, []).append((case.patient, values))
    table = {}
    for structure, cases in structures.items():
        patients = [patient for patient, _ in cases]
        metrics = dict.fromkeys(m for _, values in cases for m in values)
        table[structure] = {m: statistics([v.get(m, math.nan) for _, v in cases], patients) for m in metrics}
    return table


def each_once(scored: Sequence[Scored]) -> dict[str, Scored]:
    """By case id; of a case that counts for several tasks, the one with most structures."""
    once: dict[str, Scored] = {}
    for case in scored:
        if case.case_id not in once or len(case.values) > len(once[case.case_id].values):
            once[case.case_id] = case
    return once


def summarise(rules: Rules, scored: Sequence[Scored], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics over all cases and over the rules' groups, and how often which masks are empty.

    Args:
        rules: of the challenge.
        scored: a case may occur several times, once for each task; over all cases it counts once.
        extra: what the rules compute of all cases together.
    """
    once = each_once(scored)
    groups: dict[str, list[Scored]] = {}
    for case in scored:
        for group in rules.groups(case.facts):
            groups.setdefault(group, []).append(case)
    empty: dict[str, dict[str, int]] = {}
    for case in once.values():
        for structure in case.values:
            counts = empty.setdefault(structure, {"pred": 0, "ref": 0, "both": 0})
            if (which := case.empty.get(structure)) is not None:
                counts[which] += 1
    return {
        "rules": rules.name,
        "title": rules.title,
        "cases": len(once),
        "structures": table_of(list(once.values())),
        "groups": {group: table_of(cases) for group, cases in sorted(groups.items())},
        "empty": empty,
        "unreadable": sorted({c.case_id for c in scored if c.problem}),
        **extra,
    }


def percent(share: float | None) -> str:
    """A share in percent with two digits, as the paper's tables; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f}"


def number(value: float | None, digits: int) -> str:
    """A dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"
