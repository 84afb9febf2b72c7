"""What the mains leave beside their output, and read of one another: file names and formats.

``evaluate`` writes ``cases.csv`` in long form, ``summary.json`` and ``evaluate.json``; ``predict`` writes
``predict.json``.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdim_jax import metrics
from xdim_jax.errors import UserError
from xdim_jax.files import atomic_path

CASES_FILE, SUMMARY_FILE, EVALUATE_FILE, PREDICT_FILE = "cases.csv", "summary.json", "evaluate.json", "predict.json"
_COLUMNS = ["case_id", "structure", "metric", "value"]

# case -> structure -> metric -> value
Scores = dict[str, dict[str, dict[str, float]]]


def summarise(scores: Scores, *, rules: str, convention: str) -> dict[str, Any]:
    """Statistics over cases per structure and metric, and how often a structure is empty by the rules."""
    structures = next(iter(scores.values()))
    table: dict[str, Any] = {}
    for structure in structures:
        table[structure] = {
            metric: metrics.summarise([regions[structure][metric] for regions in scores.values()])
            for metric in metrics.BRATS_METRICS
        }
    return {"rules": rules, "convention": convention, "cases": len(scores), "structures": table}


def write_cases(path: Path, scores: Scores) -> None:
    """One row per case, structure and metric; whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for case, regions in scores.items():
            for structure, values in regions.items():
                for metric, value in values.items():
                    writer.writerow([case, structure, metric, repr(float(value))])


def read_cases(path: Path) -> Scores:
    """Reads what `write_cases` wrote. Raises UserError if the file is missing or has other columns."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; write it with python -m xdim_jax.evaluate") from error
    scores: Scores = {}
    for row in rows:
        if list(row) != _COLUMNS:
            raise UserError(f"{path} has the columns {', '.join(map(str, row))}; expected {', '.join(_COLUMNS)}")
        metric = scores.setdefault(row["case_id"], {}).setdefault(row["structure"], {})
        metric[row["metric"]] = float(row["value"])
    if not scores:
        raise UserError(f"{path} holds no case")
    return scores


def percent(share: float | None) -> str:
    """A share in percent with two digits, as the paper's tables; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f}"


def format_summary(summary: Mapping[str, Any]) -> list[str]:
    """The summary as aligned lines: the paper's Table 5 and 6 (Dice in percent), and the other metrics' means."""
    rows: list[tuple[str, ...]] = [("", "Dice mean", "sd", "median", "q25", "q75", "HD95 mean", "sens.", "spec.")]
    for structure, values in summary["structures"].items():
        dice = [percent(values["dice"][k]) for k in ("mean", "sd", "median", "q25", "q75")]
        rest = [f"{values[m]['mean']:.{d}f}" for m, d in (("hd95", 2), ("sensitivity", 3), ("specificity", 4))]
        rows.append((structure, *dice, *rest))
    return ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
