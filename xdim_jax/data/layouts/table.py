"""Cases in a table: a CSV file with one row per case, and a ``dataset.json`` that names channels and labels.

    <root>/dataset.json, cases.csv

Columns of ``cases.csv``:

    image       file of the image; with several channels, the columns ``image_0``, ``image_1``, ... instead
    label       file of the reference; empty for cases to predict, which training omits with a warning
    case        optional: id of the case; default: name of the image file without suffix and ``_0000``
    patient     optional: name of the patient; all cases of a patient are in the same fold; default: the case
    fold        optional: number (from 0) of the fold that validates on the case; for config.data.split=official
    annotated   optional: annotated regions, separated by ``|``, or ``none``; empty: as in ``dataset.json``, or all

Paths are relative to the folder of the table. ``dataset.json`` is that of nnU-Net's raw format (`nnunet`). Its keys
``channel_names`` (or ``modality``), ``labels`` and ``annotated`` are used; ``file_ending`` and ``training`` must be
valid, but have no effect.
"""

import csv
import dataclasses
import functools
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from xdim_jax.base.errors import shorten
from xdim_jax.base.problem import WARNING, Problem, data_error, errors
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images.image import strip_suffix
from xdim_jax.data.images.names import LABEL_ENDINGS, files_below, normalised
from xdim_jax.data.layouts import nnunet
from xdim_jax.data.layouts.nnunet import Description

LAYOUT = "<root>/{dataset.json,cases.csv}, with the columns image, label, and optionally case, patient, fold, annotated"
TABLE_FILE = "cases.csv"
_COLUMNS = ("case", "image", "label", "patient", "fold", "annotated")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        line: Number of the line in the file, from 1.
        values: Column -> text without leading and trailing whitespace.
    """

    line: int
    values: Mapping[str, str]


def dataset(root: Path | str) -> Dataset:
    """Return the data set of a table. Raises UserError if ``dataset.json`` or the table cannot be used."""
    root = Path(root)
    description = nnunet.read_dataset_json(root / "dataset.json")
    rows = read_rows(root / TABLE_FILE, len(description.channels))
    annotated = {case_id(row): _annotated(row.values["annotated"]) for row in rows if row.values.get("annotated")}
    known = set(description.regions.names)
    if wrong := {case: unknown for case, names in annotated.items() if (unknown := sorted(set(names) - known))}:
        case, names = next(iter(wrong.items()))
        raise _error(
            root / TABLE_FILE,
            found=f"has {len(wrong)} rows with unknown regions in the column annotated ({case}: {shorten(names)})",
            expected=f"some of {', '.join(sorted(known))}, separated by |, or none",
            suggestion="correct them",
        )
    return from_description(dataclasses.replace(description, annotated={**description.annotated, **annotated}))


def from_description(description: Description) -> Dataset:
    """Return the data set of a table that a ``dataset.json`` describes.

    For prediction, a folder without a table is read as nnU-Net's raw format.
    """
    scan = functools.partial(_scan, description=description)
    return nnunet.make_dataset("table", LAYOUT, description, scan)


def read_rows(path: Path, channels: int) -> list[Row]:
    """Read the table.

    Args:
        path: The table.
        channels: Number of channels.

    Raises:
        DataError: The file does not exist, is not a CSV file, lacks columns, or has cells that belong to no column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError as error:
        raise _error(
            path, "does not exist", "a table with one row per case", "write it, or use --dataset=nnunet"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _error(path, f"cannot be read ({error})", "a CSV file in UTF-8", "save it again") from error
    rows = _parse(path, text)
    names = [name.strip() for name in rows[0][1]] if rows else []
    images = image_columns(channels)
    if missing := [name for name in (*images, "label") if name not in names]:
        raise _error(
            path, f"lacks the columns {shorten(missing)}", ", ".join((*images, "label")), "name them in the first line"
        )
    columns = (*images, *(column for column in _COLUMNS if column != "image"))
    if unknown := [name for name in names if name and name not in columns]:
        raise _error(path, f"has unknown columns {shorten(unknown)}", ", ".join(columns), "remove or rename them")
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise _error(path, f"has several columns {shorten(repeated)}", "each column once", "remove or rename them")
    found, problems = [], []
    for line, cells in rows[1:]:
        values = dict.fromkeys([name for name in names if name], "")
        for name, cell in itertools.zip_longest(names, (cell.strip() for cell in cells), fillvalue=""):
            if name:
                values[name] = cell
            elif cell:
                expected = "a name in the first line for the column of every value"
                suggestion = "remove it, or put a value that contains the separator into double quotes"
                problems.append(
                    _problem(path, f"line {line} has {cell!r} in a column without a name", expected, suggestion)
                )
        found.append(Row(line, values))
    if problems:
        raise data_error(*problems)
    return found


def _parse(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the rows of a CSV file that are not empty, with the number of the line in which each begins.

    Raises:
        DataError: Quotation marks are unbalanced, a value contains a line break, or a value is too long.
    """
    lines = io.StringIO(text, newline="")  # lines end only at \r or \n; str.splitlines would also split at U+2028
    head = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    reader = csv.reader(lines, delimiter=";" if head.count(";") > head.count(",") else ",", strict=True)
    rows, line = [], 1
    try:
        for cells in reader:
            if long := [cell for cell in cells if "\n" in cell.strip() or "\r" in cell.strip()]:
                raise csv.Error(f"the value {long[0][:60]!r} contains a line break")
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise _error(
            path,
            f"cannot be read from line {line} on ({error})",
            'pairs of double quotes around a value, as in "a, b", in one line',
            'correct the quotes; a double quote inside of a value is written twice: ""',
        ) from error
    return rows


def image_columns(channels: int) -> tuple[str, ...]:
    """Return the names of the columns of the images."""
    return ("image",) if channels == 1 else tuple(f"image_{i}" for i in range(channels))


def case_id(row: Row) -> str:
    """Return the id of the case of a row."""
    image = row.values.get("image") or row.values.get("image_0") or ""
    name = strip_suffix(Path(image).name) or Path(image).stem
    return normalised(row.values.get("case") or name.removesuffix("_0000"))


def _annotated(text: str) -> tuple[str, ...]:
    """Return the regions in the column ``annotated``."""
    return () if text == "none" else tuple(name.strip() for name in text.split("|") if name.strip())


def _problem(path: Path, found: str, expected: str, suggestion: str) -> Problem:
    return Problem("table", path, found=found, expected=expected, suggestion=suggestion)


def _error(path: Path, found: str, expected: str, suggestion: str) -> Exception:
    return data_error(_problem(path, found, expected, suggestion))


def _scan(root: Path, need_labels: bool, *, description: Description) -> Scan:
    path = root / TABLE_FILE
    if not path.is_file():
        if need_labels:
            raise _error(path, "does not exist", "a table with one row per case", "write it, or give another --root")
        return nnunet.nnunet_from_description(description).scan(root, need_labels)
    rows = read_rows(path, len(description.channels))
    cases: dict[str, Case] = {}
    folds: dict[str, int] = {}
    problems: list[Problem] = []
    columns = image_columns(len(description.channels))

    def report(row: Row, case: str, found: str, expected: str, suggestion: str) -> None:
        where = f"line {row.line} {found}"
        problems.append(Problem("table", path, found=where, expected=expected, suggestion=suggestion, case_id=case))

    for row in rows:
        case, before = case_id(row), len(errors(problems))
        images = [row.values.get(column, "") for column in columns]
        label = row.values.get("label", "")
        if not all(images):
            empty = ", ".join(column for column, image in zip(columns, images, strict=True) if not image)
            report(row, case, f"lacks {empty}", f"file names in {', '.join(columns)}", "add them")
        if case.startswith(".") or "/" in case or "\\" in case or case.endswith(LABEL_ENDINGS):
            expected = (
                f"a name without / and \\ that starts with no dot, and ends with none of {', '.join(LABEL_ENDINGS)}"
            )
            report(row, case, f"has the case id {case!r}", expected, "give it another one (column case)")
        if not label and need_labels:
            found = f"line {row.line} has no label, so the case is not used"
            problems.append(
                Problem(
                    "table",
                    path,
                    found=found,
                    expected="a file with the reference",
                    suggestion="add it, or predict the case after training",
                    case_id=case,
                    severity=WARNING,
                )
            )
            continue
        if label and not need_labels and not (root / label).is_file():
            label = ""  # prediction does not need it
        for name in [*images, label]:
            if name and not (root / name).is_file():
                report(row, case, f"names {name}, which does not exist", "a file", "correct the path")
        if case in cases:
            report(
                row, case, f"is a second row of case {case}", "one row per case", "give the rows different ids (case)"
            )
        fold = row.values.get("fold", "") if need_labels else ""  # prediction does not need folds
        if fold and not (fold.isascii() and fold.isdigit()):
            report(row, case, f"has the fold {fold!r}", "an integer from 0", "correct it")
        if len(errors(problems)) > before:
            continue
        patient = normalised(row.values.get("patient") or case)
        if fold and folds.setdefault(patient, int(fold)) != int(fold):
            found = f"has fold {fold}, but another row of patient {patient} has fold {folds[patient]}"
            report(row, case, found, "all cases of a patient in one fold", "correct it")
            continue
        source = root / label if label else None
        files = tuple(root / name for name in images)
        cases[case] = Case(case, patient, files, description.channels, source, description.labels)
    if need_labels:
        problems += nnunet.unknown_annotated(root, description, {case_id(row) for row in rows}, TABLE_FILE)
    splits, wrong = _splits(path, cases, folds)
    return Scan(
        sorted(cases.values(), key=lambda c: c.case_id),
        problems + wrong,
        splits,
        known=frozenset(files_below(root)),  # the folder may contain other files
    )


def _splits(
    path: Path, cases: Mapping[str, Case], folds: Mapping[str, int]
) -> tuple[tuple[dict[str, tuple[str, ...]], ...], list[Problem]]:
    """Return the splits that the column ``fold`` defines: fold k validates on the patients with this number."""
    if not folds:
        return (), []
    without = sorted({c.patient for c in cases.values()} - folds.keys())
    numbers = sorted(set(folds.values()))
    found = f"has no fold for {len(without)} patients ({shorten(without)})" if without else f"has the folds {numbers}"
    if without or numbers != list(range(len(numbers))) or len(numbers) < 2:
        problem = Problem(
            "table",
            path,
            found=found,
            expected="a fold for every patient, and at least two folds, numbered 0, 1, ...",
            suggestion="correct the column fold, or remove it",
        )
        return (), [problem]
    patients: Sequence[str] = sorted(folds)
    return tuple(
        {
            "training": tuple(p for p in patients if folds[p] != fold),
            "validation": tuple(p for p in patients if folds[p] == fold),
        }
        for fold in numbers
    ), []
