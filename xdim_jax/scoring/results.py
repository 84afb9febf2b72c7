"""Result files of the commands, and statistics over cases.

``evaluate`` writes ``cases.csv`` with one row per value, ``summary.json``, ``tables.md``, ``tables.tex`` and
``evaluate.json``. ``predict`` writes ``predict.json``. Other commands read these files.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import atomic_path, read_json
from xdim_jax.scoring.rules import Rules, ScoredCase, Values

CASES_FILE, SUMMARY_FILE, EVALUATE_FILE, PREDICT_FILE = "cases.csv", "summary.json", "evaluate.json", "predict.json"
TABLES_FILES = ("tables.md", "tables.tex")
CALIBRATION_FILE = "calibration.json"  # only with evaluate --calibration
_FIRST_COLUMNS, _LAST_COLUMNS = ["case_id"], ["structure", "metric", "value"]
BOOTSTRAP_SAMPLES = 5000
_REWRITE = "write it with python -m xdim_jax.evaluate"


def check_output(folder: Path) -> None:
    """Raise UserError if an evaluation would replace a file of another origin in its output folder.

    ``cases.csv`` can also be the table of a data set (`xdim_jax.data.layouts.table`).
    """
    path = folder / CASES_FILE
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        columns = file.readline().strip().split(",")
    if columns[-len(_LAST_COLUMNS) :] != _LAST_COLUMNS:
        raise UserError(f"{path} is not the result of an evaluation, and would be replaced; give another --out")


def write_cases(path: Path, scored: Sequence[ScoredCase], attributes: Sequence[str] = ()) -> None:
    """Write one row for each case, structure and metric. The file appears only when it is complete.

    Args:
        path: File to write.
        scored: Scored cases.
        attributes: Names of the attributes of cases that become columns.
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_FIRST_COLUMNS, *attributes, *_LAST_COLUMNS])
        for case in scored:
            cells = [case.attributes.get(name, "") for name in attributes]
            for structure, values in case.values.items():
                for metric, value in values.items():
                    writer.writerow([case.case_id, *cells, structure, metric, repr(float(value))])


def read_cases(path: Path, patients: Mapping[str, str] | None = None) -> list[ScoredCase]:
    """Read a file written by `write_cases`.

    Args:
        path: The file.
        patients: Case id -> patient. For a case that is not listed, the case id is also the patient id.

    Raises:
        UserError: The file does not exist, has other columns, or cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {_REWRITE}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file ({error}); {_REWRITE}") from error
    if columns[:1] != _FIRST_COLUMNS or columns[-3:] != _LAST_COLUMNS:
        expected = ", ".join([*_FIRST_COLUMNS, "...", *_LAST_COLUMNS])
        raise UserError(f"{path} has the columns {', '.join(columns)}; expected {expected}; {_REWRITE}")
    found: dict[tuple[str, ...], Values] = {}
    attributes = columns[1:-3]
    for number, row in enumerate(rows, 2):
        try:
            if None in row:
                raise ValueError
            value = float(row["value"])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path} line {number}: expected {len(columns)} fields, and a number in the last one; {_REWRITE}"
            ) from error
        values = found.setdefault((row["case_id"], *(row[name] for name in attributes)), {})
        values.setdefault(row["structure"], {})[row["metric"]] = value
    if not found:
        raise UserError(f"{path} has no cases; {_REWRITE}")
    return [
        ScoredCase(
            key[0], (patients or {}).get(key[0], key[0]), dict(zip(attributes, key[1:], strict=True)), values, {}
        )
        for key, values in found.items()
    ]


def read_prediction_record(pred: Path) -> dict[str, Any]:
    """Return the content of ``predict.json`` in a folder of predictions; empty if there is no such file.

    Raises:
        UserError: The file is not JSON, or not a JSON object.
    """
    path = pred / PREDICT_FILE
    record = read_json(path) if path.is_file() else {}
    if not isinstance(record, dict):
        raise UserError(f"{path} is not the record of a prediction: expected a JSON object; predict again")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``evaluate.json`` in the folder of an evaluation.

    Returns:
        A dictionary with ``rules``, ``pred``, ``ref``, ``options`` and ``cases``.

    Raises:
        UserError: The file does not exist or is not complete.
    """
    path = folder / EVALUATE_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_REWRITE} --out={folder}")
    record = read_json(path)
    types = {"rules": str, "pred": str, "ref": str, "options": dict, "cases": dict}
    wrong = [k for k, kind in types.items() if not isinstance(record, dict) or not isinstance(record.get(k), kind)]
    if wrong or any(not isinstance(v, dict) or "patient" not in v for v in record["cases"].values()):
        raise UserError(
            f"{path}: {', '.join(wrong) or 'the patient of a case'} is missing or has a wrong type; {_REWRITE} "
            f"--out={folder}"
        )
    return record


def statistics(values: Sequence[float], patients: Sequence[str] | None = None) -> dict[str, float | None]:
    """Return the statistics of a metric over cases.

    Args:
        values: A value for each case. NaN is excluded.
        patients: The patient of each case. None for no confidence interval.

    Returns:
        ``count``: number of values. ``missing``: number of values that are NaN or infinite. ``mean``, ``sd`` (ddof 1),
        ``median``, ``q25`` and ``q75`` (linearly interpolated), ``min``, ``max``. ``low`` and ``high``: 95 % confidence
        interval of the mean, see `bootstrap_interval`. A statistic is None if there are too few values.
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
    low, high = bootstrap_interval(some, np.asarray(patients)[known]) if patients is not None else (None, None)
    return found | {"low": low, "high": high}


def bootstrap_interval(values: np.ndarray, patients: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 95 % confidence interval of a mean, by a percentile bootstrap over patients.

    Patients are resampled instead of cases, because the cases of a patient are not independent.

    Args:
        values: A value for each case.
        patients: The patient of each case.

    Returns:
        Lower and upper limit; None if there are fewer than two patients.
    """
    _, index = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    if len(sums) < 2:
        return None, None
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), BOOTSTRAP_SAMPLES)
    low, high = np.percentile(weights @ sums / (weights @ counts), [2.5, 97.5])
    return float(low), float(high)


def structure_statistics(scored: Sequence[ScoredCase]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the `statistics` of every metric of every structure."""
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


def unique_cases(scored: Sequence[ScoredCase]) -> dict[str, ScoredCase]:
    """Return one result for each case id. If a case has one per task, this is the one with the most structures."""
    unique: dict[str, ScoredCase] = {}
    for case in scored:
        if case.case_id not in unique or len(case.values) > len(unique[case.case_id].values):
            unique[case.case_id] = case
    return unique


def summarise(rules: Rules, scored: Sequence[ScoredCase], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``summary.json``: statistics over all cases and over groups, and numbers of empty masks.

    Args:
        rules: Rules of the challenge.
        scored: Scored cases. If a case occurs once for each task, the statistics over all cases count it once.
        extra: Additional entries, from ``Rules.aggregate``.
    """
    unique = unique_cases(scored)
    groups: dict[str, list[ScoredCase]] = {}
    for case in scored:
        for group in rules.groups(case.attributes):
            groups.setdefault(group, []).append(case)
    empty: dict[str, dict[str, int]] = {}
    for case in unique.values():
        for structure in case.values:
            counts = empty.setdefault(structure, {"pred": 0, "ref": 0, "both": 0})
            if (which := case.empty.get(structure)) is not None:
                counts[which] += 1
    return {
        "rules": rules.name,
        "title": rules.title,
        "cases": len(unique),
        "structures": structure_statistics(list(unique.values())),
        "groups": {group: structure_statistics(cases) for group, cases in sorted(groups.items())},
        "empty": empty,
        "unreadable": sorted({c.case_id for c in scored if c.problem}),
        "identical": sorted({c.case_id for c in scored if c.identical}),
        **extra,
    }


def percent(share: float | None) -> str:
    """Format a fraction in percent with two decimals, as in the tables of the paper; None as a dash."""
    return "-" if share is None else f"{100 * share:.2f}"


def number(value: float | None, digits: int) -> str:
    """Format a number with a fixed number of decimals; None as a dash."""
    return "-" if value is None else f"{value:.{digits}f}"
