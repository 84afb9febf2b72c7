"""Cases and data sets: a case on disk, a case in memory, and the functions that list and read cases."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import ERROR, WARNING, DataError, Problem, data_error, errors, in_case
from xdim_jax.data.images import names
from xdim_jax.data.images.dicom import load_masks
from xdim_jax.data.images.grid import Axes, Grid, compare_grids
from xdim_jax.data.images.image import Source, files_of, read_grid, read_image, source_path, strip_suffix
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import Regions


@dataclasses.dataclass(frozen=True)
class Case:
    """One image to segment, on disk: a volume, a series of slices, or a single 2D image.

    Attributes:
        case_id: Unique name in the data set, which also names its prediction.
        patient: Name of the patient. All cases of a patient are in the same subset of a split.
        images: One source per channel, or one source with all channels.
        channels: Names of the channels, in their order.
        label: Source of the reference labels, on the grid of the first image: one file, or one PNG mask per slice. None
            if the case has no reference.
        labels: Meaning of the values in the label files.
        axes: How file axes are converted to axes in memory.
        same_grid: Other series of the same examination to which the reference also applies. `xdim_jax.data.verify`
            checks that they are on the grid of the image; nothing else reads them.
        info: Properties of the acquisition, e.g. view, instant, quality, modality.
    """

    case_id: str
    patient: str
    images: tuple[Source, ...]
    channels: tuple[str, ...]
    label: Source | None
    labels: Labels
    axes: Axes = "anatomical"
    same_grid: tuple[Source, ...] = ()
    info: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the images and of the reference."""
        sources = [*self.images, *([self.label] if self.label else [])]
        return tuple(path for source in sources for path in files_of(source))


@dataclasses.dataclass(frozen=True)
class Volume:
    """A case in memory.

    Attributes:
        case_id: Name of the case.
        image: float32 (D, H, W, C).
        label: Label indices, uint8 (D, H, W); None if the case has no reference.
        grid: Grid of the first image file.
    """

    case_id: str
    image: np.ndarray
    label: np.ndarray | None
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Scan:
    """The result of listing the cases below a folder.

    Attributes:
        cases: Complete cases.
        problems: Problems of the other files and folders.
        splits: Official folds that come with the data; each maps a subset (training, validation, testing) to patients.
        incomplete: Cases that lack files, with the files that exist; `xdim_jax.data.verify` inspects them, too.
        known: Files of the layout that belong to none of the cases, e.g. those of another view, task or subset.
    """

    cases: list[Case]
    problems: list[Problem]
    splits: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    incomplete: tuple[Case, ...] = ()
    known: frozenset[Path] = frozenset()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How a data set is stored on disk, and what its channels and labels mean.

    Attributes:
        name: Name of the data set, for messages.
        layout: Expected tree of files, for messages.
        channels: Names of the image channels.
        labels: Labels of the reference maps in memory and of predictions.
        regions: Regions that a network predicts and that are scored.
        scan: ``scan(root, need_labels)`` lists the cases below a folder.
        axes: How file axes are converted to axes in memory.
        holds_ct: True if some cases are CT in HU; the ``modality`` in their info tells which.
        annotated: ``annotated(case)`` returns the names of the regions annotated in the reference of a case; None if
            all references annotate all regions.
        partly_annotated: Case id -> annotated regions, if a list that comes with the data says so.
        same_structures: True if every case is expected to contain every structure.
        inspect: ``inspect(case, image)`` returns a problem for each channel with intensities that are implausible for
            the data set.
        case_from_files: ``case_from_files(paths)`` makes a case from files outside the layout, one per channel, and
            checks their names; None if file names carry no information.
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
    partly_annotated: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    same_structures: bool = True
    inspect: Callable[[Case, np.ndarray], list[Problem]] = lambda case, image: []
    case_from_files: Callable[[Sequence[Path]], Case] | None = None


def annotated_regions(dataset: Dataset, case: Case) -> tuple[str, ...]:
    """Return the names of the regions that are annotated in a case."""
    return dataset.regions.names if dataset.annotated is None else dataset.annotated(case)


def scan_cases(dataset: Dataset, root: Path, *, need_labels: bool) -> Scan:
    """List the cases below a folder, sorted by name, and the problems of file names and folders.

    Args:
        dataset: Data set of the cases.
        root: Folder of the data set.
        need_labels: True if a case without reference is an error.

    Raises:
        UserError: The folder does not exist, or contains no case.
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
    return dataclasses.replace(scan, problems=[*scan.problems, *_unread_files(dataset, root, scan)])


_NAMED_FILES = 20  # number of unread files that are named for each folder


def _unread_files(dataset: Dataset, root: Path, scan: Scan) -> list[Problem]:
    """Return a problem for each folder with files that are not read and not known to accompany images."""
    read = {path for case in (*scan.cases, *scan.incomplete) for path in case.files} | scan.known
    read |= {path for case in scan.cases for source in case.same_grid for path in files_of(source)}
    reported = {Path(problem.path) for problem in scan.problems} - {root}
    unread: dict[Path, list[str]] = {}
    for path in names.files_below(root):
        if path not in read and not names.is_companion(path) and reported.isdisjoint([path, *path.parents]):
            unread.setdefault(path.parent, []).append(path.name)
    return [
        Problem(
            "extra_file",
            folder,
            found=f"contains {len(files)} file{'s' * (len(files) > 1)} that are not read: "
            f"{shorten(files, _NAMED_FILES)}",
            expected=dataset.layout,
            suggestion="rename them if they belong to the data, or move them to another folder",
            severity=WARNING,
        )
        for folder, files in sorted(unread.items())
    ]


def list_cases(dataset: Dataset, root: Path, *, need_labels: bool) -> list[Case]:
    """Return the cases below a folder, sorted by name, and log warnings; see `scan_cases` for the arguments.

    Raises:
        UserError: The folder does not exist or contains no case, or there are errors in names and folders, which are
            all listed.
    """
    scan = scan_cases(dataset, root, need_labels=need_labels)
    cases = usable_cases(scan, root)
    for problem in scan.problems:
        log.warn(str(problem))
    return cases


def usable_cases(scan: Scan, root: Path) -> list[Case]:
    """Return the cases of a scan. Raises DataError with all errors of the scan, if there are any."""
    if fatal := errors(scan.problems):
        raise data_error(*fatal, summary=f"incomplete or misplaced files below {root}")
    return scan.cases


def case_from_files(sources: Sequence[Source], dataset: Dataset, modality: str = "") -> Case:
    """Return a case made from files (or series of slices) that need not be in the layout of the data set.

    Args:
        sources: One file or series per channel, in the order of the data set, or one with all channels.
        dataset: Data set with the meaning of channels and labels.
        modality: "CT" or "MR", needed if the data set has both.

    Raises:
        UserError: The number of files is wrong, a file does not exist, or the modality is needed and missing.
    """
    if dataset.case_from_files and all(isinstance(source, Path) for source in sources):
        return dataset.case_from_files([path for path in sources if isinstance(path, Path)])
    paths = [source_path(source) for source in sources]
    order = ", ".join(dataset.channels)
    if len(paths) not in (1, len(dataset.channels)):
        raise UserError(f"{len(paths)} files given; expected one per channel, in the order {order}")
    if absent := [str(p) for s in sources for p in files_of(s) if not p.is_file()]:
        raise UserError(f"{', '.join(absent)}: no such file; expected one per channel, in the order {order}")
    if dataset.holds_ct and not modality:
        raise UserError(
            f"{paths[0]} does not show whether it is CT or MR: give --modality, or a folder in the layout of "
            f"{dataset.name}, {dataset.layout}"
        )
    _check_channel_numbers(paths, order)
    first = paths[0].absolute()  # for a series, this is its folder, whose name may contain dots
    name = (
        first.name if isinstance(sources[0], tuple) else (strip_suffix(first.name) or first.stem).removesuffix("_0000")
    )
    info = {"modality": modality} if modality else {}
    return Case(name, name, tuple(sources), dataset.channels, None, dataset.labels, dataset.axes, info=info)


def _check_channel_numbers(paths: Sequence[Path], order: str) -> None:
    """Raise UserError if the names of files end with channel numbers (``_0000``) that contradict their order."""
    matches = [re.fullmatch(r".*_(\d{4})", strip_suffix(path.name) or "") for path in paths]
    numbers = [int(match[1]) for match in matches if match]
    if sorted(numbers) != list(range(len(paths))):  # these are no numbers of channels
        return
    for place, (path, number) in enumerate(zip(paths, numbers, strict=True)):
        if number != place:
            raise UserError(
                f"{path} is channel {number} by its name, but was given as number {place}; the order is {order}"
            )


def without_label(case: Case) -> Case:
    """Return the case without its reference, so that the reference is not read."""
    return dataclasses.replace(case, label=None)


def check_grids(cases: Sequence[Case]) -> None:
    """Compare shape, voxel size and affine of all files of each case, reading only headers.

    Raises:
        DataError: Lists every unreadable header, and every file that is not on the grid of its case.
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
            problems += compare_grids(source_path(source), grid, source_path(case.images[0]), first)
    if problems:
        raise data_error(*problems, summary="files that do not fit their case")


def _is_masks(source: Source) -> bool:
    return isinstance(source, tuple) and source[0].suffix.lower() == ".png"


def read_case(case: Case) -> Volume:
    """Read all files of a case, and check that they are on one grid and have valid contents.

    Raises:
        DataError: Lists every problem of the case: unreadable files, shapes or affines that differ, NaN or infinite
            intensities, label values that do not exist in the convention.
    """
    volume, problems = load_case(case)
    if volume is None or errors(problems):
        raise data_error(*errors(problems), summary=f"problems in case {case.case_id}")
    return volume


def load_case(case: Case) -> tuple[Volume | None, list[Problem]]:
    """Read a case, and return its problems instead of raising them.

    Returns:
        The case, or None if its image is incomplete; and all its problems.
    """
    image, grid, problems = _load_images(case)
    label = None
    if case.label:
        label, found = _load_label(case, case.label, grid)
        problems += found
    volume = None if image is None or grid is None else Volume(case.case_id, image, label, grid)
    return volume, in_case(case.case_id, problems)


def _load_images(case: Case) -> tuple[np.ndarray | None, Grid | None, list[Problem]]:
    """Read all channels.

    Returns:
        float32 (D, H, W, C), or None if a file cannot be used; the grid of the first usable file; all problems.
    """
    problems: list[Problem] = []
    image: np.ndarray | None = None
    grid: Grid | None = None
    complete = True
    per_file = len(case.channels) // len(case.images)
    for k, source in enumerate(case.images):
        path = source_path(source)
        try:
            array, own_grid = read_image(source, "stored" if grid and grid.flat else case.axes)
        except DataError as error:
            problems += error.problems
            complete = False
            continue
        if array.shape[3] != per_file:
            problems.append(
                Problem(
                    "shape",
                    path,
                    found=f"has shape {(*own_grid.shape, array.shape[3])}",
                    expected=f"{per_file} channel{'s' * (per_file > 1)} per file",
                    suggestion="split or stack the file",
                )
            )
            complete = False
            continue
        if grid:
            problems += compare_grids(path, own_grid, source_path(case.images[0]), grid)
        grid = grid or own_grid
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are then reported
            if image is None and len(case.images) == 1:
                image = array = array.astype(np.float32, copy=False)
            else:  # copy each file into one array; stacking all channels at the end would need twice the memory
                image = np.empty((*array.shape[:3], len(case.channels)), np.float32) if image is None else image
                if image.shape[:3] == array.shape[:3]:
                    channels = image[..., k * per_file : (k + 1) * per_file]
                    channels[:] = array
                    array = channels
                else:
                    complete = False
        if count := sum(plane.size - np.count_nonzero(np.isfinite(plane)) for plane in array):
            problems.append(
                Problem(
                    "not_finite",
                    path,
                    found=f"contains {count} NaN or infinite voxels",
                    expected="finite intensities",
                    suggestion="repair the file",
                )
            )
    return image if complete else None, grid, problems


def read_label(case: Case) -> np.ndarray:
    """Read only the reference of a case, as label indices uint8 (D, H, W). Raises DataError, see `read_case`."""
    assert case.label is not None, case.case_id
    label, problems = _load_label(case, case.label, read_grid(case.images[0], case.axes))
    if label is None or errors(problems):
        raise data_error(*errors(problems), summary=f"problems in the labels of case {case.case_id}")
    return label


def _load_label(case: Case, source: Source, grid: Grid | None) -> tuple[np.ndarray | None, list[Problem]]:
    """Read the reference of a case.

    Args:
        case: Case of the reference.
        source: Files of the reference.
        grid: Grid of the image; None if the image could not be read.

    Returns:
        Label indices on the grid of the image, or None if there is no grid or the reference does not fit it; and all
        problems.
    """
    path, problems = source_path(source), []
    try:
        if _is_masks(source):
            assert isinstance(source, tuple)
            values = load_masks(source)
            if grid is None:
                return None, label_problems(case.labels, path, values, case.labels.decode(values)[1])
            if values.shape != grid.shape:
                return None, [
                    Problem(
                        "shape" if values.shape[2] == grid.shape[2] else "slice_count",
                        path,
                        found=f"contains {values.shape[2]} masks of {values.shape[1]} x {values.shape[0]} pixels",
                        expected=f"{grid.shape[2]} of {grid.shape[1]} x {grid.shape[0]}, one for each slice of the "
                        "image",
                        suggestion="fetch the masks again",
                    )
                ]
            values = grid.to_memory(values)
        else:
            stored, label_grid = read_image(source, "stored" if grid and grid.flat else case.axes)
            if grid is not None:
                problems += compare_grids(path, label_grid, source_path(case.images[0]), grid)
            if stored.shape[3] != 1:
                problems.append(
                    Problem(
                        "shape",
                        path,
                        found=f"has shape {(*label_grid.shape, stored.shape[3])}",
                        expected="one label map",
                        suggestion="split the file",
                    )
                )
            values = stored[..., 0]
    except DataError as error:
        return None, error.problems
    label, unknown = case.labels.decode(values)
    problems += label_problems(case.labels, path, values, unknown)
    misplaced = grid is None or any(p.kind in ("shape", "slice_count") for p in problems)
    return None if misplaced else label, problems


def encode_label(case: Case, label: np.ndarray) -> np.ndarray:
    """Convert label indices to the values of the case's convention.

    Structures that the convention lacks become background. In CHAOS, for example, CT has labels only for the liver, but
    a network that was also trained on MR may predict other organs on CT.

    Args:
        case: Case with the convention.
        label: Label indices (D, H, W).
    """
    return case.labels.encode(np.where(label < len(case.labels.values), label, 0))


def label_problems(labels: Labels, path: Path, values: np.ndarray, unknown: Sequence[float]) -> list[Problem]:
    """Check the values of a label map, and return their problems.

    Args:
        labels: Convention of the label map.
        path: File or folder of the label map.
        values: Stored values.
        unknown: Values that do not exist in the convention, from `Labels.decode`.
    """
    if not unknown:
        return []
    listed = shorten([f"{v:g}" for v in unknown], 6)
    known = ", ".join(str(v) for v in labels.values)
    if labels.ranges:
        alone = not labels.decode(values)[0].any()
        return [
            Problem(
                "label_value",
                path,
                found=f"contains {'only ' * alone}the values {listed}, which belong to no structure",
                expected=f"the grey values {known} of {labels.name}",
                suggestion="map the values" if alone else "check these voxels: they are read as background",
                severity=ERROR if alone else WARNING,
            )
        ]
    if set(unknown) == {255.0} and set(np.unique(values).tolist()) <= {0, 255}:
        return [
            Problem(
                "label_scale",
                path,
                found="contains the values 0 and 255",
                expected=f"the labels {known} of {labels.name}",
                suggestion="divide it by 255",
            )
        ]
    if any(v != int(v) for v in unknown if np.isfinite(v)) or not np.isfinite(unknown).all():
        return [
            Problem(
                "dtype",
                path,
                found=f"contains label {listed}",
                expected=f"whole numbers; {labels.name} has only {known}",
                suggestion="resample labels by nearest neighbour and store whole numbers",
            )
        ]
    step = "map the values, or leave the case out"
    if fits := [name for value, name in labels.elsewhere if value in unknown]:
        step = f"the label exists in {' and '.join(fits)}: check the convention"
    return [
        Problem(
            "label_value",
            path,
            found=f"contains label {listed}",
            expected=f"the labels of {labels.name}, which are {known}",
            suggestion=step,
        )
    ]


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return the description of a data set for the workdir of a run, as JSON values.

    `xdim_jax.data.datasets.trained_dataset` uses it for prediction without the data.
    """
    described: dict[str, Any] = {
        "dataset": dataset.name,
        "channels": list(dataset.channels),
        "labels": dataset.labels.to_json(),
        "regions": {name: list(labels) for name, labels in dataset.regions.sets.items()},
    }
    if dataset.partly_annotated:
        described["annotated"] = {case: list(names) for case, names in dataset.partly_annotated.items()}
    return described
