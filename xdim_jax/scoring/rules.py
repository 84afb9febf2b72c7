"""What the rules of every challenge consist of, and the scoring of one case by them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, shorten
from xdim_jax.data.images.dicom import load_masks
from xdim_jax.data.images.grid import Axes, Grid, compare_grids
from xdim_jax.data.images.image import Source, read_grid, read_volume, strip, where
from xdim_jax.scoring.masks import METRICS, Geometry, Pair

BESIDE = ("probabilities", "uncertainty")  # folders of predict, beside the label maps
_LABEL_TOLERANCE = 1e-3  # copies exist whose labels are floats, off by rounding

# structure -> mask
Masks = Mapping[str, np.ndarray]
# structure -> metric -> value
Values = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Coding:
    """What the values of label files mean.

    Attributes:
        name: for messages.
        structures: name to the values that belong to it; a value may belong to several.
        greys: for coded masks: value to the greys ``low < grey <= high`` that are read as it; other greys are
            background. Without them only the values of structures, 0 and ``others`` may occur.
        others: values that are known and belong to no structure.
        several: the coding of maps that hold more than one value beside 0; None: the same.
        step: what to do about an unknown value.
    """

    name: str
    structures: Mapping[str, tuple[int, ...]]
    greys: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    others: tuple[int, ...] = ()
    several: "Coding | None" = None
    step: str = "map the values, or give the right --rules"

    def masks(self, values: np.ndarray, path: Path) -> Masks:
        """Masks of all structures. Raises UserError for values that mean nothing."""
        if self.several is not None and len(np.unique(values[values != 0])) > 1:
            return self.several.masks(values, path)
        if self.greys:
            label = np.zeros(values.shape, np.uint8)
            for value, (low, high) in self.greys.items():
                label[(values > low) & (values <= high)] = value
            if not label.any() and values.any():
                found = shorten([f"{v:g}" for v in np.unique(values[values != 0])])
                wanted = ", ".join(map(str, self.greys))
                raise UserError(
                    f"{path} holds values {found}, which are no structure of {self.name}: expected {wanted}"
                )
        else:
            known = sorted({0, *self.others, *(v for values in self.structures.values() for v in values)})
            found = np.unique(values).astype(np.float64)
            unknown = [v for v in found if not np.isfinite(v) or min(abs(v - k) for k in known) > _LABEL_TOLERANCE]
            if unknown:
                shown = shorten([f"{v:g}" for v in unknown])
                only = known if len(known) < 20 else f"whole numbers from {known[0]} to {known[-1]}"
                raise UserError(f"{path} holds label {shown}; {self.name} has only {only}: {self.step}")
            label = np.rint(values)
        return {name: np.isin(label, members) for name, members in self.structures.items()}


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """A label map on disk.

    Attributes:
        case_id: of the case.
        source: a file, or the PNG masks of all slices in order.
        patient: cases of one patient are drawn together where means get an interval.
        facts: further columns of the results, e.g. view and instant.
        grid: of PNG masks: the image whose slices they are.
        axes: how file axes come into memory.
    """

    case_id: str
    source: Source
    patient: str
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grid: Source | None = None
    axes: Axes = "anatomical"

    @property
    def path(self) -> Path:
        """What messages name."""
        return where(self.source)

    def load(self) -> tuple[np.ndarray, Grid]:
        """Values of the file (D, H, W), and its grid. Raises UserError for what cannot be read."""
        if isinstance(self.source, Path):
            return read_volume(self.source, self.axes)
        assert self.grid is not None, self.case_id
        grid, values = read_grid(self.grid, self.axes), load_masks(self.source)
        if values.shape != tuple(grid.shape):
            raise UserError(
                f"{self.path} holds {values.shape[2]} masks of {values.shape[1]} x {values.shape[0]} pixels; "
                f"{where(self.grid)} has {grid.shape[2]} slices of {grid.shape[1]} x {grid.shape[0]}: write one mask "
                "for each slice"
            )
        return grid.to_memory(values), grid


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric in results: its title, unit, digits in tables, and whether higher is better (None: neither)."""

    title: str
    unit: str = ""
    digits: int = 3
    higher: bool | None = True


def column(metric: str) -> Column:
    """Of a metric of `xdim_jax.scoring.masks`."""
    m = METRICS[metric]
    return Column(m.title, m.unit, m.digits, m.higher)


@dataclasses.dataclass(frozen=True)
class Job:
    """One case to score: the prediction may be missing. ``structures``: those that count here; None: all."""

    ref: LabelMap
    pred: LabelMap | None
    facts: Mapping[str, str]
    structures: tuple[str, ...] | None = None

    def predicted(self) -> LabelMap:
        """The prediction; PNG masks lie on the slices of the reference's image."""
        assert self.pred is not None, self.ref.case_id
        return dataclasses.replace(self.pred, grid=self.pred.grid or self.ref.grid or self.ref.source)


def no_groups(facts: Mapping[str, str]) -> tuple[str, ...]:
    """All cases are one group."""
    return ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """How one challenge scores.

    Attributes:
        name: of ``--rules``.
        title: of tables.
        layout: what a folder of label maps may look like, for messages.
        facts: names of the columns that it adds to the results.
        columns: its metrics, in order.
        headline: those that the log shows.
        find: label maps of a folder by case id, for references or predictions.
        coding: of a label map.
        score: masks of the prediction and the reference to values.
        worst: values of a case whose prediction is missing or cannot be read.
        border: see `xdim_jax.scoring.masks.Pair`.
        groups: into which groups of the summary a case goes by its facts, beside all cases together.
        pair: which prediction goes with which reference; None: by case id.
        volumetric: True if reports show three orthogonal planes, False if they show slices.
        whole: what is computed of all cases of a patient or a task, for the summary: rows, and a table of its own.
    """

    name: str
    title: str
    layout: str
    columns: Mapping[str, Column]
    headline: tuple[str, ...]
    find: Callable[[Path], dict[str, LabelMap]]
    coding: Callable[[LabelMap], Coding | None]
    score: Callable[[Masks, Masks, Geometry], Values]
    worst: Callable[[Masks, Geometry], Values]
    facts: tuple[str, ...] = ()
    border: bool = True
    groups: Callable[[Mapping[str, str]], tuple[str, ...]] = no_groups
    pair: Callable[[Path, dict[str, LabelMap]], tuple[list[Job], list[str]]] | None = None
    volumetric: bool = True
    whole: Any = None

    def jobs(self, pred: Path, ref: Path) -> tuple[list[Job], list[str]]:
        """What is to be scored, and the predictions that have no reference. Raises UserError for unusable folders."""
        references = self.find(ref)
        if self.pair is not None:
            return self.pair(pred, references)
        predictions = self.find(pred)
        found = [Job(m, predictions.get(case), m.facts) for case, m in sorted(references.items())]
        return found, sorted(predictions.keys() - references.keys())


@dataclasses.dataclass(frozen=True)
class Scored:
    """A scored case.

    Attributes:
        case_id, patient, facts: of the label map.
        values: structure to metric to value; NaN where the rules leave it out.
        empty: structure to which masks are empty: ``pred``, ``ref`` or ``both``.
        problem: why the prediction cannot be used; then the values are the worst.
    """

    case_id: str
    patient: str
    facts: Mapping[str, str]
    values: Values
    empty: Mapping[str, str]
    problem: str = ""


def score_case(rules: Rules, ref: LabelMap, pred: LabelMap | None, more: Sequence[str] = ()) -> Scored:
    """Scores one case.

    Args:
        rules: of the challenge.
        ref, pred: on disk; without a prediction the values are the worst.
        more: further metrics by name, beside those of the rules.

    Raises:
        UserError: the reference cannot be used.
    """
    values, grid = ref.load()
    geometry = geometry_of(values.shape, grid)
    problem, predicted = ("" if pred else f"no prediction for {ref.path}"), None
    if pred is not None:
        pred = Job(ref, pred, {}).predicted()
        try:
            predicted, pred_grid = pred.load()
            if apart := compare_grids(pred.path, pred_grid, ref.path, grid):
                raise UserError("; ".join(map(str, apart)))
        except UserError as error:
            predicted, problem = None, str(error)
    coding = coding_of(rules, ref, values, predicted)
    wanted = coding.masks(values, ref.path)
    masks: Masks = {}
    if pred is not None and predicted is not None:
        try:
            masks = coding.masks(predicted, pred.path)
        except UserError as error:
            problem = str(error)
    if problem:
        worst = rules.worst(wanted, geometry)
        values_of = {
            s: v | {m: (0.0 if m == "dice" else math.nan) for m in more if m not in v} for s, v in worst.items()
        }
        empty = {s: "both" if not wanted[s].any() else "pred" for s in wanted}
    else:
        values_of = rules.score(masks, wanted, geometry)
        (found, plane), (truth, _) = flat(masks, geometry), flat(wanted, geometry)
        for name in wanted if more else ():
            pair = Pair(found[name], truth[name], plane, border=rules.border)
            values_of[name] |= {m: METRICS[m].measure(pair) for m in more if m not in values_of[name]}
        empty = {s: _empty(bool(masks[s].any()), bool(wanted[s].any())) for s in wanted}
    return Scored(ref.case_id, ref.patient, ref.facts, values_of, {s: e for s, e in empty.items() if e}, problem)


def _empty(pred: bool, ref: bool) -> str:
    return {(True, True): "", (False, True): "pred", (True, False): "ref", (False, False): "both"}[pred, ref]


def coding_of(rules: Rules, ref: LabelMap, values: np.ndarray, predicted: np.ndarray | None) -> Coding:
    """Of a case; where the rules name no structures, every whole number but 0 in either map is one."""
    if (known := rules.coding(ref)) is not None:
        return known
    found = np.unique(np.concatenate([np.unique(a) for a in (values, predicted) if a is not None]))
    whole = sorted(
        {round(float(v)) for v in found if np.isfinite(v) and abs(v - round(float(v))) <= _LABEL_TOLERANCE} - {0}
    )
    return Coding("a label map", {str(v): (v,) for v in whole})


def geometry_of(shape: Sequence[int], grid: Grid) -> Geometry:
    """Of an array in memory; the planes of a single-slice image are measured in 2D (see `flat`)."""
    affine = grid.in_memory[1][:3, :3][:, ::-1]  # columns: steps along D, H, W
    return Geometry(tuple(shape), grid.spacing, affine)


def flat(masks: Masks, geometry: Geometry) -> tuple[Masks, Geometry]:
    """Images of one slice as 2D: (H, W)."""
    if geometry.shape[0] != 1:
        return masks, geometry
    return {name: mask[0] for name, mask in masks.items()}, Geometry(geometry.shape[1:], geometry.spacing[1:])


def check_folder(folder: Path, layout: str) -> None:
    """Raises UserError if there is no such folder."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--pred or --ref: {folder} {what}; expected a folder of label maps, {layout}")


def find_files(folder: Path, layout: str, name_of: Callable[[Path], str | None]) -> dict[str, Path]:
    """Files of a folder by case id.

    Args:
        folder: of label maps.
        layout: for messages.
        name_of: the case id of a file; None for files that are no label map.

    Raises:
        UserError: no such folder, no label map in it, or two files for one case.
    """
    check_folder(folder, layout)
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*")]):
        if path.parent.name in BESIDE or path.name.startswith(".") or strip(path.name) is None or not path.is_file():
            continue
        case = name_of(path)
        if case is None:
            continue
        if case in found:
            raise UserError(f"two label maps for case {case}: {found[case]} and {path}; keep one")
        found[case] = path
    if not found:
        there = shorten(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
        raise UserError(f"no label map in {folder}: expected {layout}; found {there or 'an empty folder'}")
    return found
