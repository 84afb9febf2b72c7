"""Data structures for the scoring rules of a challenge, and scoring of one case.

`Rules` describes one challenge; `xdim_jax.scoring.challenges` lists all of them. `score_case` reads the two label maps
of a case, extracts a mask for each structure, and applies the rules to the masks.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.data.images.dicom import load_masks
from xdim_jax.data.images.grid import Axes, Grid, compare_grids
from xdim_jax.data.images.image import Source, read_grid, read_volume, source_path, strip_suffix
from xdim_jax.data.images.names import files_below, is_companion
from xdim_jax.scoring.masks import METRICS, Geometry, Pair

# subfolders that predict writes next to the label maps; they contain no label maps
EXTRA_OUTPUTS = ("probabilities", "uncertainty")
_MAX_LABELS = 256  # largest number of values of a label map whose structures are not named
_LABEL_TOLERANCE = 1e-3  # some published label files contain floats with rounding errors

# structure -> mask
Masks = Mapping[str, np.ndarray]
# structure -> metric -> value
Values = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Coding:
    """The meaning of the values in label files.

    Attributes:
        name: Name of the coding in messages.
        structures: Name of each structure -> values that belong to it. A value may belong to several structures.
        grey_ranges: Value -> range ``low < grey <= high`` of grey levels that are read as this value; other grey levels
            are background. If empty, the file may contain only 0, the values of the structures, ``ignored`` and
            ``excluded``.
        ignored: Other values that may occur and belong to no structure.
        excluded: Values of the reference at which predictions are not scored, because nothing is annotated there.
        if_several: Coding to use instead for files with several distinct nonzero values; None to use this coding.
        hint: Advice at the end of the message about an unknown value.
    """

    name: str
    structures: Mapping[str, tuple[int, ...]]
    grey_ranges: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    ignored: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    if_several: "Coding | None" = None
    hint: str = "correct the values, or check --rules (evaluate) or --challenge (submit)"

    def masks(self, values: np.ndarray, path: Path) -> Masks:
        """Return a mask for each structure.

        Args:
            values: Values of a label file.
            path: The file, for messages.

        Raises:
            UserError: The file has unknown values.
        """
        if self.if_several is not None and len(np.unique(values[values != 0])) > 1:
            return self.if_several.masks(values, path)
        label = self._labels_of_greys(values, path) if self.grey_ranges else self._rounded_labels(values, path)
        return {name: np.isin(label, members) for name, members in self.structures.items()}

    def _labels_of_greys(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Return, for each grey level, the value whose range contains it, or 0 if no range does.

        Raises:
            UserError: There are nonzero grey levels, but no range contains any of them.
        """
        label = np.zeros(values.shape, np.uint8)
        for value, (low, high) in self.grey_ranges.items():
            label[(values > low) & (values <= high)] = value
        if not label.any() and values.any():
            found = shorten([f"{v:g}" for v in np.unique(values[values != 0])])
            expected = ", ".join(map(str, self.grey_ranges))
            raise UserError(f"{path} has the values {found}, but {self.name} expects {expected}; {self.hint}")
        return label

    def scored_voxels(self, values: np.ndarray) -> np.ndarray:
        """Return a boolean array that is False where ``values``, those of a reference file, are excluded values."""
        return ~np.isin(np.rint(values), self.excluded)

    def _rounded_labels(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Return the values rounded to integers. Raises UserError if one of them is not a value of the coding."""
        known = sorted(
            {0, *self.ignored, *self.excluded, *(v for members in self.structures.values() for v in members)}
        )
        found = np.unique(values).astype(np.float64)
        above = np.searchsorted(known, found)  # an image has millions of values
        nearest = [np.array(known)[np.clip(above + i, 0, len(known) - 1)] for i in (-1, 0)]
        unknown = found[~(np.abs(found - nearest).min(0) <= _LABEL_TOLERANCE)]
        if len(unknown):
            shown = shorten([f"{v:g}" for v in unknown[:1000]])
            expected = known if len(known) < 20 else f"integers from {known[0]} to {known[-1]}"
            raise UserError(f"{path} has unknown labels: {shown}; {self.name} has only {expected}; {self.hint}")
        return np.rint(values)


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """A label map on disk.

    Attributes:
        case_id: Id of the case.
        source: A file, or the PNG masks of all slices in order.
        patient: Id of the patient. Confidence intervals are bootstrapped over patients.
        attributes: Additional columns of the results and their values, e.g. view and instant.
        grid: For PNG masks, the image whose slices they belong to.
        axes: Order of the axes in memory, see `xdim_jax.data.images.grid`.
    """

    case_id: str
    source: Source
    patient: str
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grid: Source | None = None
    axes: Axes = "anatomical"

    @property
    def path(self) -> Path:
        """Path to show in messages: the file, or the folder of the masks."""
        return source_path(self.source)

    def load(self) -> tuple[np.ndarray, Grid]:
        """Return the values (D, H, W) and their grid. Raises UserError if the files cannot be read."""
        if isinstance(self.source, Path):
            return read_volume(self.source, self.axes)
        assert self.grid is not None, self.case_id
        grid, values = read_grid(self.grid, self.axes), load_masks(self.source)
        if values.shape != tuple(grid.shape):
            raise UserError(
                f"{self.path} has {values.shape[2]} masks of {values.shape[1]} x {values.shape[0]} pixels, but "
                f"{source_path(self.grid)} has {grid.shape[2]} slices of {grid.shape[1]} x {grid.shape[0]}; write one "
                "mask of the same size for each slice"
            )
        return grid.to_memory(values), grid


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric in the results.

    Attributes:
        title: Column title in tables.
        unit: Unit of the values; empty if they have none.
        digits: Number of decimals in tables.
        higher_is_better: True or False; None if neither higher nor lower values are better.
    """

    title: str
    unit: str = ""
    digits: int = 3
    higher_is_better: bool | None = True


def column(metric: str) -> Column:
    """Return the column of a metric of `xdim_jax.scoring.masks`."""
    m = METRICS[metric]
    return Column(m.title, m.unit, m.digits, m.higher_is_better)


@dataclasses.dataclass(frozen=True)
class Job:
    """One case to score.

    Attributes:
        ref: Reference.
        pred: Prediction; None if there is none.
        attributes: Additional columns of the results and their values.
        structures: Structures whose values are kept; None for all.
    """

    ref: LabelMap
    pred: LabelMap | None
    attributes: Mapping[str, str]
    structures: tuple[str, ...] | None = None

    def prediction_with_grid(self) -> LabelMap:
        """Return the prediction. If its ``grid`` is None, return a copy with the grid of the reference.

        This is ``ref.grid`` or, if that is None too, ``ref.source``.
        """
        assert self.pred is not None, self.ref.case_id
        return dataclasses.replace(self.pred, grid=self.pred.grid or self.ref.grid or self.ref.source)


@dataclasses.dataclass(frozen=True)
class ScoredCase:
    """The scores of a case.

    Attributes:
        case_id: Id of the case.
        patient: Id of the patient.
        attributes: Additional columns of the results and their values.
        values: Structure -> metric -> value. NaN if the metric is not defined for the masks, or the rules exclude the
            value; means are taken over the other values.
        empty: Structure -> which of its masks are empty: ``pred``, ``ref`` or ``both``. A structure without an empty
            mask is not listed.
        problem: Reason why the prediction cannot be used; empty if it can be used. The values are then those of
            `Rules.score_missing`; additional metrics are 0, or NaN if they have a unit.
        identical: True if prediction and reference agree in every voxel, and at least one structure is not empty.
    """

    case_id: str
    patient: str
    attributes: Mapping[str, str]
    values: Values
    empty: Mapping[str, str]
    problem: str = ""
    identical: bool = False


def no_groups(attributes: Mapping[str, str]) -> tuple[str, ...]:
    """Return no group: the summary has only the statistics over all cases."""
    return ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """The scoring rules of one challenge.

    Attributes:
        name: Value of ``--rules``.
        title: Name of the challenge in tables.
        layout: Expected files in a folder of label maps, for messages.
        columns: Metrics of the challenge, in the order of the tables.
        main_metrics: Metrics that the log shows.
        find: Function that returns the label maps in a folder by case id. It is used for references and, if ``pair`` is
            None, for predictions.
        coding: Function that returns the coding of a label map, or None if every nonzero value is a structure.
        score: Function that scores the masks of a prediction against those of a reference.
        score_missing: Function that returns the values of a case whose prediction is missing or cannot be used
            (unreadable, on another grid, or with unknown labels), from the masks of the reference.
        attributes: Names of the additional columns of the results.
        border: True if positions beyond the edge of the image count as outside of every mask, so that the voxels of a
            mask at the edge belong to its surface; False if they count as inside.
        groups: Function that returns the groups of the summary to which a case belongs, from its attributes.
        pair: Function that assigns the predictions in a folder to references. It returns the jobs, and the ids of
            predictions without a reference. None to assign them by case id.
        volumetric: True if reports show three orthogonal planes of a case, False if they show slices.
        aggregate: Function of all jobs, their scores, and a parallel ``map``. It returns additional rows of the results
            and additional entries of the summary. None if there are no such values.
    """

    name: str
    title: str
    layout: str
    columns: Mapping[str, Column]
    main_metrics: tuple[str, ...]
    find: Callable[[Path], dict[str, LabelMap]]
    coding: Callable[[LabelMap], Coding | None]
    score: Callable[[Masks, Masks, Geometry], Values]
    score_missing: Callable[[Masks, Geometry], Values]
    attributes: tuple[str, ...] = ()
    border: bool = True
    groups: Callable[[Mapping[str, str]], tuple[str, ...]] = no_groups
    pair: Callable[[Path, dict[str, LabelMap]], tuple[list[Job], list[str]]] | None = None
    volumetric: bool = True
    aggregate: (
        Callable[[Sequence[Job], Sequence[ScoredCase], Callable[..., Any]], tuple[list[ScoredCase], dict[str, Any]]]
        | None
    ) = None

    def jobs(self, pred: Path, ref: Path) -> tuple[list[Job], list[str]]:
        """Return the jobs, and the ids of predictions without a reference.

        Args:
            pred: Folder of the predictions.
            ref: Folder of the references.

        Raises:
            UserError: A folder does not exist, or has no label maps, or has two for one case.
        """
        references = self.find(ref)
        if self.pair is not None:
            return self.pair(pred, references)
        predictions = self.find(pred)
        found = [Job(m, predictions.get(case), m.attributes) for case, m in sorted(references.items())]
        return found, sorted(predictions.keys() - references.keys())


def score_case(rules: Rules, ref: LabelMap, pred: LabelMap | None, extra_metrics: Sequence[str] = ()) -> ScoredCase:
    """Score one case.

    Args:
        rules: Rules of the challenge.
        ref: Reference.
        pred: Prediction. If it is None or cannot be used, the case gets the worst values, see `ScoredCase.problem`.
        extra_metrics: Names of metrics of `xdim_jax.scoring.masks` to be computed in addition to those of the rules.

    Returns:
        The scores, with ``problem`` if the prediction cannot be used.

    Raises:
        UserError: The reference cannot be used.
    """
    values, grid = ref.load()
    geometry = geometry_from_grid(values.shape, grid)
    predicted, problem = _load_prediction(ref, grid, pred)
    if predicted is not None and pred is not None and rules.coding(ref) is None:
        try:
            _labels_in(pred.path, predicted)
        except UserError as error:
            predicted, problem = None, str(error)
    coding = find_coding(rules, ref, values, predicted)
    ref_masks = coding.masks(values, ref.path)
    pred_masks: Masks = {}
    if pred is not None and predicted is not None:
        try:
            pred_masks = coding.masks(predicted, pred.path)
            if coding.excluded:
                scored = coding.scored_voxels(values)
                geometry = dataclasses.replace(geometry, unscored=int(np.count_nonzero(~scored)))
                pred_masks = {name: mask & scored for name, mask in pred_masks.items()}
        except UserError as error:
            problem = str(error)
    if problem:
        scores = rules.score_missing(ref_masks, geometry)
        for found in scores.values():
            found |= {m: math.nan if METRICS[m].unit else 0.0 for m in extra_metrics if m not in found}
        empty = {name: "pred" if mask.any() else "both" for name, mask in ref_masks.items()}
    else:
        scores = rules.score(pred_masks, ref_masks, geometry)
        if extra_metrics:
            _add_metrics(scores, pred_masks, ref_masks, geometry, extra_metrics, border=rules.border)
        which = {name: (not pred_masks[name].any(), not mask.any()) for name, mask in ref_masks.items()}
        names = {(True, False): "pred", (False, True): "ref", (True, True): "both"}
        empty = {name: names[key] for name, key in which.items() if key in names}
    same = not problem and all(np.array_equal(pred_masks[name], mask) for name, mask in ref_masks.items())
    identical = same and any(mask.any() for mask in ref_masks.values())
    return ScoredCase(ref.case_id, ref.patient, ref.attributes, scores, empty, problem, identical)


def _load_prediction(ref: LabelMap, grid: Grid, pred: LabelMap | None) -> tuple[np.ndarray | None, str]:
    """Return the values of a prediction, or None and the reason why it cannot be used."""
    if pred is None:
        return None, f"there is no prediction for {ref.path}"
    pred = Job(ref, pred, {}).prediction_with_grid()
    try:
        values, pred_grid = pred.load()
    except UserError as error:
        return None, str(error)
    if differences := compare_grids(pred.path, pred_grid, ref.path, grid):
        return None, "; ".join(map(str, differences))
    return values, ""


def _add_metrics(
    scores: Values, pred: Masks, ref: Masks, geometry: Geometry, metrics: Sequence[str], *, border: bool
) -> None:
    """Add metrics to the scores, unless the rules have already computed a metric of the same name."""
    pred, plane = squeeze_slice(pred, geometry)
    ref, _ = squeeze_slice(ref, geometry)
    for name in ref:
        pair = Pair(pred[name], ref[name], plane, border=border)
        scores[name] |= {m: METRICS[m].measure(pair) for m in metrics if m not in scores[name]}


def find_coding(rules: Rules, ref: LabelMap, values: np.ndarray, predicted: np.ndarray | None) -> Coding:
    """Return the coding of a case.

    Args:
        rules: Rules of the challenge.
        ref: Reference.
        values: Values of the reference.
        predicted: Values of the prediction; None if there is none.

    Returns:
        The coding of the rules. If they have none, a coding with one structure for each nonzero integer that occurs in
        the reference or in the prediction.

    Raises:
        UserError: The rules have no coding, and the reference has too many values.
    """
    if (known := rules.coding(ref)) is not None:
        return known
    whole = {*_labels_in(ref.path, values), *([] if predicted is None else _integers(predicted))} - {0}
    return Coding("a label map", {str(v): (v,) for v in sorted(whole)})


def _integers(values: np.ndarray) -> list[int]:
    """Return the integers that occur in an array, up to rounding errors."""
    found = np.unique(values).astype(np.float64)
    found = found[np.isfinite(found)]
    nearest = np.rint(found)
    return np.unique(nearest[np.abs(found - nearest) <= _LABEL_TOLERANCE]).astype(int).tolist()


def _labels_in(path: Path, values: np.ndarray) -> list[int]:
    """Return the integers in a label map. Raises UserError if there are too many for structures, as in an image."""
    whole = _integers(values)
    if len(whole) > _MAX_LABELS:
        raise UserError(
            f"{path} has {len(whole)} integers from {whole[0]} to {whole[-1]}: expected a label map with at most "
            f"{_MAX_LABELS} values, and this is probably an image. Give the folder of the label maps, or name the "
            "structures with --labels"
        )
    return whole


def geometry_from_grid(shape: Sequence[int], grid: Grid) -> Geometry:
    """Return the geometry of an array (D, H, W) with the given grid."""
    affine = grid.memory_geometry[1][:3, :3][:, ::-1]  # columns: steps along D, H, W
    return Geometry(tuple(shape), grid.spacing, affine)


def squeeze_slice(masks: Masks, geometry: Geometry) -> tuple[Masks, Geometry]:
    """Remove the axis along which masks have a single slice, so that they are measured in 2D.

    For an axial image this axis is D, for a coronal image H, and for a sagittal image W.

    Returns:
        The masks and their geometry; unchanged if there are several slices along every axis.
    """
    if 1 not in geometry.shape:
        return masks, geometry
    single = geometry.shape.index(1)
    others = [axis for axis in range(len(geometry.shape)) if axis != single]
    shape, spacing = tuple(geometry.shape[a] for a in others), tuple(geometry.spacing[a] for a in others)
    return {name: mask.take(0, single) for name, mask in masks.items()}, Geometry(
        shape, spacing, unscored=geometry.unscored
    )


def check_folder(folder: Path, layout: str) -> None:
    """Raise UserError if a path is not a folder. ``layout`` names the expected files, for the message."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--pred or --ref: {folder} {found}; expected a folder of label maps: {layout}")


def find_files(folder: Path, layout: str, name_of: Callable[[Path], str | None]) -> dict[str, Path]:
    """Return the label files in a folder, and up to three levels below it, by case id. Hidden folders are ignored.

    Args:
        folder: Folder of label maps.
        layout: Expected files, for messages.
        name_of: Function that returns the case id of a file; None if the file is not a label map.

    Raises:
        UserError: The folder does not exist, or has no label map, or has two files for one case.
    """
    check_folder(folder, layout)
    found: dict[str, Path] = {}
    unread: list[str] = []
    for path in files_below(folder):
        if path.parent.name in EXTRA_OUTPUTS and path.parent != folder:
            continue
        if strip_suffix(path.name) is None:
            unread += [] if is_companion(path) else [path.name]
            continue
        case = name_of(path)
        if case is None:
            continue
        if len(path.relative_to(folder).parts) > 4:
            raise UserError(
                f"{path} is {len(path.relative_to(folder).parts) - 1} folders below {folder}; expected a label map at "
                "most three folders below it: give a folder closer to the label maps, or move it to another place"
            )
        if case in found:
            raise UserError(f"there are two label maps for case {case}: {found[case]} and {path}; keep one")
        found[case] = path
    if unread:
        log.warn(f"{len(unread)} files in {folder} are not label maps and are not read: {shorten(unread)}")
    if not found:
        names = shorten(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
        raise UserError(f"no label map in {folder}: expected {layout}; found {names or 'an empty folder'}")
    return found
