"""Cases and data sets: a case on disk, a case in memory, and the functions that list cases."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import ERROR, WARNING, Problem, data_error, errors
from xdim_jax.data.images import names
from xdim_jax.data.images.grid import Axes, Grid
from xdim_jax.data.images.image import Source, files_of, source_path, strip_suffix
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
        same_grid: Other series of the same examination to which the reference also applies. Only
            `xdim_jax.data.verify` reads them, to check that they are on the grid of the image.
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
            Empty if cases are listed without references, for prediction; problems of the folds are not reported then.
        incomplete: Cases whose files have errors, e.g. a missing channel, with the files that exist;
            `xdim_jax.data.verify` inspects them, too.
        known: Files that are not reported as unread, e.g. those of another view, task or subset. Files of the cases may
            be among them.
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
        holds_ct: True if some cases are CT in HU; ``info["modality"]`` of a case specifies which.
        annotated: ``annotated(case)`` returns the names of the regions annotated in the reference of a case; None if
            all references annotate all regions.
        partly_annotated: Case id -> annotated regions, for the cases that ``dataset.json`` or ``cases.csv`` lists.
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
    if root.name in ("", ".."):  # cases may be named after their folder, so ``.`` is replaced by its real name
        root = root.resolve()
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
    return dataclasses.replace(
        scan, problems=[*scan.problems, *_duplicate_cases(scan.cases), *_unread_files(dataset, root, scan, need_labels)]
    )


def _duplicate_cases(cases: Sequence[Case]) -> list[Problem]:
    """Return a problem for each case whose id another case has: one prediction would replace the other."""
    known: dict[str, Case] = {}
    problems = []
    for case in cases:
        other = known.setdefault(case.case_id, case)
        if other is not case:
            problems.append(
                Problem(
                    "duplicate_case",
                    source_path(case.images[0]),
                    found=f"and {source_path(other.images[0])} are both the case {case.case_id}",
                    expected="a different name for each case",
                    suggestion="rename one of them, or give one of their folders as root",
                    case_id=case.case_id,
                )
            )
    return problems


_NAMED_FILES = 20  # number of unread files that are named for each folder


def _unread_files(dataset: Dataset, root: Path, scan: Scan, need_labels: bool) -> list[Problem]:
    """Return a problem for each folder with files that are not read and not known to accompany images.

    Links to images that do not exist are errors, because their cases would be lost.
    """
    read = {path for case in (*scan.cases, *scan.incomplete) for path in case.files} | scan.known
    read |= {path for case in scan.cases for source in case.same_grid for path in files_of(source)}
    reported = {Path(problem.path) for problem in scan.problems} - {root}
    unread: dict[Path, list[str]] = {}
    absent: list[Problem] = []
    for path in names.files_below(root):
        unknown = path not in read and reported.isdisjoint([path, *path.parents])
        if unknown and strip_suffix(path.name) is not None and not path.exists():  # a link, e.g. of git-annex
            needed = need_labels or "label" not in path.parent.name.lower()  # prediction does not need references
            absent.append(
                Problem(
                    "unreadable",
                    path,
                    found="is a link to a file that does not exist",
                    expected="an image",
                    suggestion="copy the file, or remove the link",
                    severity=ERROR if needed else WARNING,
                )
            )
        elif unknown and not names.is_companion(path):
            unread.setdefault(path.parent, []).append(path.name)
    return absent + [
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
        UserError: The number of files is wrong, a file does not exist, the numbers in the file names contradict the
            order, or the modality is needed and missing.
    """
    if dataset.case_from_files and all(isinstance(source, Path) for source in sources):
        return dataset.case_from_files([path for path in sources if isinstance(path, Path)])
    paths = [source_path(source) for source in sources]
    order = ", ".join(dataset.channels)
    if len(paths) not in (1, len(dataset.channels)):
        raise UserError(
            f"{len(paths)} files given; expected one per channel, in the order {order}, or one with all channels"
        )
    if absent := [str(p) for s in sources for p in files_of(s) if not p.is_file()]:
        raise UserError(f"{', '.join(absent)}: no such file; expected one per channel, in the order {order}")
    if dataset.holds_ct and not modality:
        raise UserError(
            f"the modality of {paths[0]} is unknown: give --modality=CT or MR, or a folder in the layout of "
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
    """Raise UserError if a file is given twice, or if names with channel numbers (``_0000``) contradict the order.

    The names of the channels of a case differ in their numbers only.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"{shorten([str(path) for path in paths])}: a file is given twice; expected one per channel")
    matches = [re.fullmatch(r"(.*)_(\d{4})", strip_suffix(path.name) or "") for path in paths]
    numbers = [int(match[2]) for match in matches if match]
    if sorted(numbers) != list(range(len(paths))):  # these are not numbers of channels
        return
    if len(cases := {match[1]: path for match, path in zip(matches, paths, strict=True) if match}) > 1:
        raise UserError(
            f"{shorten([str(path) for path in cases.values()])} belong to different cases by their names; expected "
            "the channels of one case"
        )
    for place, (path, number) in enumerate(zip(paths, numbers, strict=True)):
        if number != place:
            raise UserError(
                f"{path} is channel {number} by its name, but was given as number {place}; the order is {order}"
            )


def without_label(case: Case) -> Case:
    """Return the case without its reference, so that the reference is not read."""
    return dataclasses.replace(case, label=None)


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


def meaning(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a description (see `describe`) that define what a network learns, for comparisons.

    These are the channels, the labels without their name, the regions in the order of the network's channels, and the
    annotated regions of cases.
    """
    return {
        "channels": list(description["channels"]),
        "labels": json.loads(json.dumps({k: v for k, v in description["labels"].items() if k != "name"})),
        "regions": [[name, sorted(labels)] for name, labels in description["regions"].items()],
        "annotated": {case: sorted(names) for case, names in description.get("annotated", {}).items()},
    }
