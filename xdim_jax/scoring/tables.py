"""Tables of results as Markdown and LaTeX: the tables of the paper with added results, and tables of all metrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from xdim_jax.scoring.results import number, percent
from xdim_jax.scoring.rules import Column

# Table 2 of the paper, CAMUS test set, Omnia-Net: (instant, structure) -> Dice, MAD (mm), HD (mm)
_TABLE_2 = {
    ("ED", "LV_endo"): ("0.945", "1.5", "4.8"),
    ("ED", "LV_epi"): ("0.956", "1.8", "5.4"),
    ("ES", "LV_endo"): ("0.922", "1.6", "4.8"),
    ("ES", "LV_epi"): ("0.951", "1.8", "5.9"),
}
# Table 3 of the paper, CAMUS test set, Omnia-Net: correlation
_TABLE_3 = {"ef": "0.896", "edv": "0.980", "esv": "0.974"}
# Table 4 of the paper, CHAOS test set: task -> mean score, DICE, RAVD (%), ASSD (mm) and MSSD (mm), each metric
# followed by its score
_TABLE_4 = {
    "1": (
        "73.62 ± 12.66", "0.96 ± 0.02", "96.08 ± 1.82", "2.78 ± 2.28", "50.10 ± 33.21",
        "1.45 ± 1.61", "90.36 ± 10.76", "27.50 ± 23.28", "57.92 ± 25.43",
    ),
    "2": (
        "82.98 ± 6.12", "0.98 ± 0.00", "98.08 ± 0.3", "1.48 ± 0.95", "70.31 ± 19.0",
        "0.67 ± 0.12", "95.54 ± 0.79", "19.2 ± 12.69", "68.0 ± 21.14",
    ),
    "3": (
        "72.88 ± 12.15", "0.95 ± 0.02", "95.29 ± 1.55", "3.12 ± 2.38", "46.16 ± 31.92",
        "1.42 ± 0.96", "90.55 ± 6.37", "25.37 ± 17.17", "59.51 ± 23.54",
    ),
    "4": (
        "61.80 ± 16.12", "0.90 ± 0.06", "85.45 ± 20.83", "7.6 ± 8.48", "25.29 ± 24.71",
        "2.98 ± 2.81", "80.63 ± 18.24", "29.71 ± 21.22", "55.81 ± 26.5",
    ),
    "5": (
        "69.32 ± 8.54", "0.93 ± 0.03", "91.76 ± 6.82", "7.67 ± 4.97", "22.38 ± 19.49",
        "1.46 ± 1.5", "91.19 ± 6.45", "18.83 ± 11.11", "71.94 ± 12.14",
    ),
    "average": (
        "72.12 ± 11.12", "0.94 ± 0.03", "93.33 ± 6.26", "4.53 ± 3.21", "42.85 ± 25.67",
        "1.6 ± 1.4", "89.65 ± 8.52", "24.12 ± 17.09", "62.63 ± 21.75",
    ),
}  # fmt: skip
# Tables 5 and 6 of the paper, BraTS 2022 validation set: network -> statistic -> Dice of WT, TC, ET in percent
_TABLE_5_6 = {
    "DS-Net (paper, Table 5)": {
        "mean": ("91.69", "83.23", "81.75"),
        "median": ("93.45", "93.10", "89.17"),
        "25 % quartile": ("89.51", "83.89", "81.98"),
        "75 % quartile": ("96.09", "96.34", "94.11"),
    },
    "DX-Net (paper, Table 6)": {
        "mean": ("91.22", "84.77", "83.88"),
        "median": ("94.15", "93.46", "89.74"),
        "25 % quartile": ("90.08", "85.56", "83.49"),
        "75 % quartile": ("96.46", "96.48", "94.92"),
    },
}
_STATISTICS = {"mean": "mean", "median": "median", "25 % quartile": "q25", "75 % quartile": "q75"}
_OURS, _PAPER = "this evaluation", "paper"
_CAMUS_NOTE = "The numbers of the paper are from the test set of the challenge, both views together."


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells.

    Attributes:
        title: Title.
        header: Column titles.
        rows: Cells of each row.
        note: Text below the table; may be empty.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as GitHub Markdown."""
        lines = [f"**{self.title}**", "", _markdown_row(self.header), _markdown_row(["---"] * len(self.header))]
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"

    def latex(self) -> str:
        """Return the table as LaTeX. It needs the package booktabs."""
        lines = [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_escape(self.title)}. {_escape(self.note)}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            r"    \toprule",
            _latex_row(self.header),
            r"    \midrule",
            *map(_latex_row, self.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _latex_row(cells: Sequence[str]) -> str:
    """Return a row of a LaTeX table."""
    return f"    {' & '.join(map(_escape, cells))} \\\\"


def _escape(text: str) -> str:
    """Escape the special characters of LaTeX."""
    known = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$"}
    known |= {c: f"\\{c}" for c in "&%_#${}"}
    return "".join(known.get(c, c) for c in text)


def make_tables(summary: Mapping[str, Any], columns: Mapping[str, Column]) -> list[Table]:
    """Return all tables of a summary.

    Args:
        summary: Content of ``summary.json``.
        columns: Metric -> column.

    Returns:
        The tables of the paper for the challenge, if it has any, then those of all metrics.
    """
    return [*paper_tables(summary), *metric_tables(summary, columns)]


def paper_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the paper for CAMUS, CHAOS or BraTS 2022 with the results added; none for other rules."""
    make = {"camus": _camus, "chaos": _chaos, "brats2022": _brats}.get(summary["rules"])
    return make(summary) if make else []


def _camus(summary: Mapping[str, Any]) -> list[Table]:
    """Return Table 2, and Table 3 if the volumes of at least one patient are known."""
    tables = [_camus_segmentation(summary)]
    if summary["volumes"]["patients"]:
        tables.append(_camus_volumes(summary["volumes"]))
    return tables


def _camus_segmentation(summary: Mapping[str, Any]) -> Table:
    """Return Table 2: Dice, MAD and HD of every structure at ED and ES."""
    header, ours, paper = [""], [_OURS], [f"{_PAPER}, Table 2"]
    names = {"LV_endo": "LV endo", "LV_epi": "LV epi", "LA": "LA"}
    for instant in ("ED", "ES"):
        for structure, name in names.items():
            values = summary["groups"].get(instant, {}).get(structure)
            published = _TABLE_2.get((instant, structure), ("-",) * 3)
            for k, (metric, title, digits) in enumerate((("dice", "Dice", 3), ("mad", "MAD", 2), ("hd", "HD", 2))):
                header.append(f"{instant} {name} {title}")
                ours.append(number(values[metric]["mean"], digits) if values else "-")
                paper.append(published[k])
    note = f"{_CAMUS_NOTE} MAD and HD are in mm."
    return Table("CAMUS, segmentation (Table 2)", tuple(header), (tuple(paper), tuple(ours)), note)


def _camus_volumes(volumes: Mapping[str, Any]) -> Table:
    """Return Table 3: agreement of volumes and ejection fraction with the reference."""
    header = ("", "correlation, paper", "correlation", "bias ± sd", "mean absolute error")
    rows = []
    for name, title, unit in (("ef", "EF", "%"), ("edv", "EDV", "ml"), ("esv", "ESV", "ml")):
        a = volumes["agreement"][name]
        bias = f"{number(a['bias'], 1)} ± {number(a['sd'], 1)} {unit}"
        rows.append((title, _TABLE_3[name], number(a["correlation"], 3), bias, f"{number(a['mae'], 1)} {unit}"))
    excluded = len(volumes["failed"]) + len(volumes["incomplete"])
    note = f"{volumes['patients']} patients; {excluded} excluded. {_CAMUS_NOTE}"
    return Table("CAMUS, volumes (Table 3)", header, tuple(rows), note)


def _chaos(summary: Mapping[str, Any]) -> list[Table]:
    """Return Table 4: metrics and scores of every task."""
    metrics = ("score", "dice", "dice_score", "ravd", "ravd_score", "assd", "assd_score", "mssd", "mssd_score")
    header = ("", "", "mean score", "DICE", "DICE score", "RAVD (%)", "RAVD score")
    header += ("ASSD (mm)", "ASSD score", "MSSD (mm)", "MSSD score")
    rows = []
    for task, values in summary["tasks"].items():
        absent = f", without {' and '.join(values['absent'])}" if values.get("absent") else ""
        cells = [f"{number(values[m]['mean'], 2)} ± {number(values[m]['sd'], 2)}" for m in metrics]
        rows += [(f"task {task}", _PAPER, *_TABLE_4[task]), ("", f"{_OURS}, {values['cases']} cases{absent}", *cells)]
    note = "The numbers of the paper are from the test set of the challenge. Mean ± sd over cases."
    if len(summary["tasks"]) == len(_TABLE_4) - 1:
        average = [number(summary["average"][m], 2) for m in metrics]
        rows += [("average", _PAPER, *_TABLE_4["average"]), ("", f"{_OURS}, all 5 tasks", *average)]
    else:
        note += " The average of the paper is over five tasks, and is not comparable with fewer tasks."
    return [Table("CHAOS (Table 4)", header, tuple(rows), note)]


def _brats(summary: Mapping[str, Any]) -> list[Table]:
    """Return Tables 5 and 6 as one table: statistics of the Dice of WT, TC and ET."""
    names = ("WT", "TC", "ET")
    rows: list[tuple[str, ...]] = [
        (source, statistic, *cells) for source, table in _TABLE_5_6.items() for statistic, cells in table.items()
    ]
    for title, key in _STATISTICS.items():
        rows.append((_OURS, title, *(percent(summary["structures"][n]["dice"][key]) for n in names)))
    note = "Dice in percent. The numbers of the paper are from the 219 cases of the BraTS 2022 validation set."
    return [Table("BraTS (Tables 5 and 6)", ("", "", *names), tuple(rows), note)]


def metric_tables(summary: Mapping[str, Any], columns: Mapping[str, Column]) -> list[Table]:
    """Return tables of the statistics of every metric: one over all cases, and one for each group.

    Args:
        summary: Content of ``summary.json``.
        columns: Metric -> column.
    """
    header = (
        "",
        "metric",
        "mean",
        "95 % confidence interval",
        "sd",
        "median",
        "q25",
        "q75",
        "min",
        "max",
        "cases",
        "excluded",
    )
    tables = []
    skipped = summary.get("skipped", [])
    note = f"{len(skipped)} cases without a usable prediction are omitted: {', '.join(skipped)}." if skipped else ""
    groups = {g: t for g, t in summary["groups"].items() if t != summary["structures"]}  # skip a group of all cases
    for group, table in {"all cases": summary["structures"], **groups}.items():
        rows = []
        for structure, metrics in table.items():
            for metric, v in metrics.items():
                c = columns.get(metric, Column(metric))
                d = c.digits
                unit = f", {c.unit}" if c.unit else ""
                interval = "-" if v["low"] is None else f"{number(v['low'], d)} to {number(v['high'], d)}"
                cells = [number(v[k], d) for k in ("sd", "median", "q25", "q75", "min", "max")]
                counts = (str(v["count"]), str(v["missing"]))
                rows.append((structure, f"{c.title}{unit}", number(v["mean"], d), interval, *cells, *counts))
        tables.append(Table(f"{summary['title']}, {group}", header, tuple(rows), note))
    return tables
