"""What all data sets share: a case on disk, a case in memory, and reading one into the other."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import ERROR, WARNING, DataError, Problem, data_error, errors
from xdim_jax.data.images.dicom import load_masks
from xdim_jax.data.images.grid import Axes, Grid, compare_grids
from xdim_jax.data.images.image import Source, files_of, read_grid, read_image, strip, where
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import Regions


@dataclasses.dataclass(frozen=True)
class Case:
    """One image to segment on disk: a volume, a series of slices, or a single image.

    Attributes:
        case_id: unique in its data set; the name of its prediction.
        patient: cases of one patient never lie on both sides of a split.
        images: one source per channel, or one that holds all channels.
        channels: names, in the order of the channels.
        label: reference labels, on the grid of the first image; of PNG files, one for each of its slices.
        labels: what the values of the label files mean.
        axes: how file axes come into memory.
        beside: other series that share the label; they must lie on the same grid, and only `verify` reads them.
        info: facts of the examination, e.g. view, instant, quality, modality.
    """

    case_id: str
    patient: str
    images: tuple[Source, ...]
    channels: tuple[str, ...]
    label: Source | None
    labels: Labels
    axes: Axes = "anatomical"
    beside: tuple[Source, ...] = ()
    info: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the case."""
        sources = [*self.images, *([self.label] if self.label else [])]
        return tuple(path for source in sources for path in files_of(source))


@dataclasses.dataclass(frozen=True)
class Volume:
    """A case in memory: ``image`` float32 (D, H, W, C), ``label`` uint8 (D, H, W) of label indices or None."""

    case_id: str
    image: np.ndarray
    label: np.ndarray | None
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Scan:
    """What lies below a folder: the usable cases, what is wrong with the others, and the splits that come with them.

    ``splits`` holds, for every official fold, side (training, validation, testing) to patients. ``incomplete`` are
    cases that lack something, with the files that are there: `verify` looks into them all the same.
    """

    cases: list[Case]
    problems: list[Problem]
    splits: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    incomplete: tuple[Case, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How one data set lies on disk, and what it means.

    Attributes:
        name: of the data set.
        layout: the expected tree, for messages.
        channels: names of the image channels.
        labels: of the label maps in memory and of predictions.
        regions: what a network predicts and what is scored.
        scan: ``scan(root, need_labels)``.
        axes: how file axes come into memory.
        holds_ct: some of its cases are CT, in HU; they say so in their info.
        annotated: the regions that the reference of a case shows, where some show fewer than all; else None.
        same_structures: every case is expected to hold every structure.
        inspect: ``inspect(case, image)`` finds intensities that do not look like the data set's images.
    """

    name: str
    layout: str
    channels: tuple[str, ...]
    labels: Labels
    regions: Regions
    scan: Callable[[Path, bool], Scan]
    axes: Axes = "anatomical"
    holds_ct: bool = False
    annotated: Callable[[Case], tuple[str, ...]] | None = None
    same_structures: bool = True
    inspect: Callable[[Case, np.ndarray], list[Problem]] = lambda case, image: []


def scan_cases(dataset: Dataset, root: Path, *, need_labels: bool) -> Scan:
    """The cases below ``root`` by name, and every problem that names and folders show.

    Raises:
        UserError: no such folder, or no case in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected {dataset.layout}")
    scan = dataset.scan(root, need_labels)
    if not scan.cases and not errors(scan.problems):
        found = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))[:5]
        raise UserError(
            f"no {dataset.name} case below {root}: expected {dataset.layout}; found "
            + (f"{', '.join(found)}, ..." if found else "an empty folder")
            + "".join(f"\n  - {problem}" for problem in scan.problems)
        )
    return scan


def list_cases(dataset: Dataset, root: Path, *, need_labels: bool) -> list[Case]:
    """The cases below ``root``, by name.

    Raises:
        UserError: no such folder; no case in it; and, all at once, every error that names and folders show.
    """
    return usable_cases(scan_cases(dataset, root, need_labels=need_labels), root)


def usable_cases(scan: Scan, root: Path) -> list[Case]:
    """The cases of a scan without errors. Raises DataError with all of them."""
    if fatal := errors(scan.problems):
        raise data_error(fatal, f"incomplete or misplaced files below {root}")
    return scan.cases


def case_from_files(sources: Sequence[Source], dataset: Dataset, modality: str = "") -> Case:
    """A case from its files (or series of slices), one per channel in the data set's order, or one that holds all.

    Raises:
        UserError: another number of files, a file that does not exist, or no modality where the data set has two.
    """
    paths = [where(source) for source in sources]
    order = ", ".join(dataset.channels)
    if len(paths) not in (1, len(dataset.channels)):
        raise UserError(f"{len(paths)} files given; expected one per channel, in the order {order}")
    if absent := [str(p) for s in sources for p in files_of(s) if not p.is_file()]:
        raise UserError(f"{', '.join(absent)}: no such file; expected one per channel, in the order {order}")
    if dataset.holds_ct and not modality:
        raise UserError(
            f"{paths[0]} does not tell whether it is CT or MR; say so with --modality, or give a folder in the layout "
            f"of {dataset.name}, {dataset.layout}"
        )
    first = paths[0].absolute()  # of a series: its folder, whose name may hold dots
    name = first.name if isinstance(sources[0], tuple) else (strip(first.name) or first.stem).removesuffix("_0000")
    info = {"modality": modality} if modality else {}
    return Case(name, name, tuple(sources), dataset.channels, None, dataset.labels, dataset.axes, info=info)


def without_label(case: Case) -> Case:
    """The case as a network sees it: its reference is not read."""
    return dataclasses.replace(case, label=None)


def check_grids(cases: Sequence[Case]) -> None:
    """Compares shape, voxel size and affine of all files of all cases by their headers alone.

    Raises:
        DataError: every unreadable header and every file that does not lie on its case's grid, at once.
    """
    problems = []
    for case in cases:
        first = None
        for source in [*case.images, *([case.label] if case.label and not _is_masks(case.label) else [])]:
            try:
                grid = read_grid(source, case.axes)
            except DataError as error:
                problems += error.problems
                continue
            first = first or grid
            problems += compare_grids(where(source), grid, where(case.images[0]), first, case.case_id)
    if problems:
        raise data_error(problems, "files that do not fit their case")


def _is_masks(source: Source) -> bool:
    return isinstance(source, tuple) and source[0].suffix.lower() == ".png"


def read_case(case: Case) -> Volume:
    """Reads all files of a case and checks that they lie on one grid and hold what they should.

    Raises:
        DataError: every problem of the case at once: unreadable files, shapes or affines that differ, NaN or
            infinite intensities, label values that the convention does not have.
    """
    volume, problems = load_case(case)
    if volume is None or errors(problems):
        raise data_error(errors(problems), f"problems in case {case.case_id}")
    return volume


def load_case(case: Case) -> tuple[Volume | None, list[Problem]]:
    """The case as far as it can be read, and everything wrong with it; None where arrays do not fit together."""
    problems: list[Problem] = []
    image: np.ndarray | None = None
    grids: list[Grid] = []
    whole = True
    per_file = len(case.channels) // len(case.images)
    for k, source in enumerate(case.images):
        try:
            array, grid = read_image(source, "stored" if grids and grids[0].flat else case.axes)
        except DataError as error:
            problems += error.of_case(case.case_id)
            continue
        path = where(source)
        if array.shape[3] != per_file:
            shape = (*grid.shape, array.shape[3])
            expected = f"{per_file} channel{'s' * (per_file > 1)} in a file"
            problems.append(
                Problem("shape", path, f"has shape {shape}", expected, "split or stack the file", case.case_id)
            )
            continue
        if grids:
            problems += compare_grids(path, grid, where(case.images[0]), grids[0], case.case_id)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            if image is None and len(case.images) == 1:
                image = array = array.astype(np.float32, copy=False)
            else:  # file by file into one array, so that there is never a second one of all channels
                image = np.empty((*array.shape[:3], len(case.channels)), np.float32) if image is None else image
                whole = whole and image.shape[:3] == array.shape[:3]
                if image.shape[:3] == array.shape[:3]:
                    place = image[..., k * per_file : (k + 1) * per_file]
                    place[:] = array
                    array = place
        if count := sum(plane.size - np.count_nonzero(np.isfinite(plane)) for plane in array):
            found, expected = f"holds {count} NaN or infinite voxels", "finite intensities"
            problems.append(Problem("not_finite", path, found, expected, "repair the file", case.case_id))
        grids.append(grid)
    label = None
    if case.label:
        label, found = _load_label(case, case.label, grids[0] if grids else None)
        problems += found
    if image is None or len(grids) < len(case.images) or not whole:
        return None, problems
    return Volume(case.case_id, image, label, grids[0]), problems


def read_label(case: Case) -> np.ndarray:
    """The reference of a case alone, label indices uint8 (D, H, W). Raises DataError as `read_case` does."""
    assert case.label is not None, case.case_id
    label, problems = _load_label(case, case.label, read_grid(case.images[0], case.axes))
    if label is None or errors(problems):
        raise data_error(errors(problems), f"problems in the labels of case {case.case_id}")
    return label


def _load_label(case: Case, source: Source, grid: Grid | None) -> tuple[np.ndarray | None, list[Problem]]:
    """Label indices on the grid of the image, and everything wrong with them; without a grid, the latter alone."""
    path, problems = where(source), []
    try:
        if _is_masks(source):
            assert isinstance(source, tuple)
            values = load_masks(source)
            if grid is None:
                return None, label_problems(case.labels, path, values, case.labels.decode(values)[1], case.case_id)
            if values.shape != grid.shape:
                found = f"holds {values.shape[2]} masks of {values.shape[1]} x {values.shape[0]} pixels"
                expected = f"{grid.shape[2]} of {grid.shape[1]} x {grid.shape[0]}, one for each slice of the image"
                kind = "shape" if values.shape[2] == grid.shape[2] else "slice_count"
                return None, [Problem(kind, path, found, expected, "fetch the masks again", case.case_id)]
            values = grid.to_memory(values)
        else:
            stored, label_grid = read_image(source, "stored" if grid and grid.flat else case.axes)
            if grid is not None:
                problems += compare_grids(path, label_grid, where(case.images[0]), grid, case.case_id)
            if stored.shape[3] != 1:
                shape = (*label_grid.shape, stored.shape[3])
                problems.append(
                    Problem("shape", path, f"has shape {shape}", "one label map", "split the file", case.case_id)
                )
            values = stored[..., 0]
    except DataError as error:
        return None, error.of_case(case.case_id)
    label, unknown = case.labels.decode(values)
    problems += label_problems(case.labels, path, values, unknown, case.case_id)
    misplaced = grid is None or any(p.kind in ("shape", "slice_count") for p in problems)
    return None if misplaced else label, problems


def encode_label(case: Case, label: np.ndarray) -> np.ndarray:
    """Label indices to the values of the case's convention.

    Structures that it does not have become background: of CHAOS's CT only the liver is asked for, whatever a network
    that knows more finds there.
    """
    return case.labels.encode(np.where(label < len(case.labels.values), label, 0))


def label_problems(
    labels: Labels, path: Path, values: np.ndarray, unknown: Sequence[float], case_id: str
) -> list[Problem]:
    """What is wrong with the values of a label map."""
    if not unknown:
        return []
    shown = shorten([f"{v:g}" for v in unknown], 6)
    known = ", ".join(str(v) for v in labels.values)
    if labels.ranges:
        alone = not labels.decode(values)[0].any()
        found = f"holds {'only ' * alone}values {shown}, which are no structure"
        expected = f"the grey values {known} of {labels.name}"
        step = "map the values" if alone else "look at it: they are read as background"
        return [Problem("label_value", path, found, expected, step, case_id, ERROR if alone else WARNING)]
    if set(unknown) == {255.0} and set(np.unique(values).tolist()) <= {0, 255}:
        found, step = "holds values 0 and 255", "divide it by 255"
        return [Problem("label_scale", path, found, f"the labels {known} of {labels.name}", step, case_id)]
    if any(v != int(v) for v in unknown if np.isfinite(v)) or not np.isfinite(unknown).all():
        found, step = f"holds label {shown}", "resample labels by nearest neighbour and store whole numbers"
        return [Problem("dtype", path, found, f"whole numbers; {labels.name} has only {known}", step, case_id)]
    step = "map the values, or leave the case out"
    if fits := [name for value, name in labels.elsewhere if value in unknown]:
        step = f"{' and '.join(fits)} have it: is the convention right?"
    found = f"holds label {shown}"
    return [Problem("label_value", path, found, f"the labels of {labels.name}, which has only {known}", step, case_id)]


def describe(dataset: Dataset) -> dict[str, Any]:
    """What a trained network needs to know of its data, for the workdir."""
    return {
        "dataset": dataset.name,
        "channels": list(dataset.channels),
        "labels": dataset.labels.to_json(),
        "regions": {name: list(labels) for name, labels in dataset.regions.sets.items()},
    }
