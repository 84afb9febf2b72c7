"""Checks of a data set: file names, headers, contents, and comparisons between cases."""

import concurrent.futures
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import shorten
from xdim_jax.base.problem import ERROR, KINDS, WARNING, DataError, Problem, errors, in_case
from xdim_jax.data.case import Case, Dataset, Volume, scan_cases
from xdim_jax.data.images import dicom, names, nifti
from xdim_jax.data.images.grid import compare_grids
from xdim_jax.data.images.image import Source, files_of, read_grid, read_image, source_path
from xdim_jax.data.labels import IGNORE, is_structure
from xdim_jax.data.reading import load_case

_PLAUSIBLE_MM = (0.01, 50.0)  # range of plausible voxel sizes
_RARE = 10  # a missing structure is reported if at most one case in 10 lacks it
# label slices are reported as reversed if reversing them reduces the spread of intensities to less than this fraction
_REVERSED_GAIN = 0.8
_MIN_SLICES = 3  # smallest number of labelled slices for this check


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of reading one case.

    Attributes:
        case: The case.
        problems: All problems of its files.
        digests: A digest of each channel; empty if the case could not be read.
        structures: Label indices in its reference; None if it has no readable reference.
    """

    case: Case
    problems: list[Problem]
    digests: tuple[str, ...]
    structures: frozenset[int] | None


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of checking a data set.

    Attributes:
        cases: Number of complete cases.
        problems: All problems.
    """

    cases: int
    problems: list[Problem]

    @property
    def errors(self) -> int:
        """Number of problems that are errors."""
        return len(errors(self.problems))


def verify(
    dataset: Dataset,
    root: Path,
    *,
    need_labels: bool = True,
    jobs: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Check all cases of a data set.

    Args:
        dataset: Data set to check.
        root: Folder of the data set.
        need_labels: True if a case without reference is an error.
        jobs: Number of threads; each has one case in memory.
        progress: Called with the number of inspected cases and the number of all cases.

    Returns:
        All problems, sorted by severity, case, kind and path.

    Raises:
        UserError: The folder does not exist, or contains no case.
    """
    scan = scan_cases(dataset, root, need_labels=need_labels)
    inspections = []
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        cases = [*scan.cases, *scan.incomplete]
        for inspection in pool.map(lambda case: inspect(case, dataset), cases):
            inspections.append(inspection)
            progress(len(inspections), len(cases))
    problems = _without_repetitions([*scan.problems, *(p for i in inspections for p in i.problems)])
    problems += _duplicates(inspections) + _missing_structures(inspections, dataset)
    order = {kind: i for i, kind in enumerate(KINDS)}
    problems.sort(key=lambda p: (p.severity, p.case_id, order[p.kind], str(p.path)))
    return Findings(len(scan.cases), problems)


def inspect(case: Case, dataset: Dataset) -> Inspection:
    """Read a case completely and check its contents."""
    volume, problems = load_case(case)
    problems = _without_repetitions([*_check_headers(case), *problems, *_check_same_grid(case)])
    digests, structures = (), None
    if volume is not None:
        problems += _check_spacing(case, volume) + _check_image(case, volume) + dataset.inspect(case, volume.image)
        digests = tuple(map(_digest, np.moveaxis(volume.image, -1, 0)))
        if volume.label is not None:
            structures = frozenset(np.unique(volume.label).tolist()) - {0, IGNORE}
            if not any(p.kind in ("label_scale", "label_value", "dtype") for p in problems):
                problems += _check_label(case, volume, structures)
    return Inspection(case, in_case(case.case_id, problems), digests, structures)


def _without_repetitions(problems: Sequence[Problem]) -> list[Problem]:
    """Keep the first of identical problems. They occur if header and voxels are both checked, or cases share a file."""

    def key(p: Problem) -> tuple[str, ...]:
        once_per_file = p.kind in ("unreadable", "slice_count")
        return (p.kind, str(p.path)) if once_per_file else (p.kind, str(p.path), p.found)

    return list({key(p): p for p in reversed(problems)}.values())[::-1]


def _digest(channel: np.ndarray) -> str:
    """Return a digest of the shape and the values; empty for a constant channel."""
    if channel.min() == channel.max():
        return ""
    return hashlib.blake2b(repr(channel.shape).encode() + np.ascontiguousarray(channel).tobytes()).hexdigest()


# -- headers ------------------------------------------------------------------------------------------------------


def _check_headers(case: Case) -> list[Problem]:
    problems = []
    for source in (*case.images, *case.same_grid):
        problems += _check_series_headers(source) if isinstance(source, tuple) else []
    for source in case.same_grid:
        if len(files_of(source)) != len(files_of(case.images[0])):  # reported when the folder was listed
            continue
        try:
            grid, first = (read_grid(s, case.axes) for s in (source, case.images[0]))
        except DataError:  # reported above
            continue
        problems += compare_grids(source_path(source), grid, source_path(case.images[0]), first)
    for path in [*case.images, case.label]:
        if isinstance(path, Path) and names.strip(path.name, nifti.SUFFIXES) is not None:
            problems += _check_nifti_header(path)
    return problems


def _check_series_headers(files: Sequence[Path]) -> list[Problem]:
    slices, problems = [], []
    for path in files:
        try:
            slices += dicom.read_headers(path)
        except DataError as error:
            problems += error.problems
    return problems or dicom.series_problems(slices)


def _check_nifti_header(path: Path) -> list[Problem]:
    """Return a problem if a header contradicts itself, because other programs may then read a different geometry."""
    import nibabel as nib

    try:
        header: Any = nib.load(path).header  # pyright: ignore[reportAttributeAccessIssue]
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
        zooms = np.array(header.get_zooms()[:3], np.float64)
    except Exception:  # unreadable files are reported when the case is loaded
        return []
    if sform is None:
        return []
    lengths = np.sqrt((sform[:3, :3] ** 2).sum(0))[: len(zooms)]
    if not np.allclose(lengths, zooms, rtol=1e-2):
        return [
            Problem(
                "spacing",
                path,
                found=f"has voxel sizes {_sizes(zooms)} in pixdim and {_sizes(lengths)} in its sform",
                expected="one voxel size",
                suggestion="write the file again with the correct voxel size",
                severity=WARNING,
            )
        ]
    if qform is not None:
        corner = np.ones(4)
        corner[: len(zooms)] = header.get_data_shape()[: len(zooms)]
        shift = np.abs((sform - qform) @ corner)[:3].max() / max(lengths.min(), 1e-6)
        if shift > 0.5:
            return [
                Problem(
                    "affine",
                    path,
                    found=f"has an sform and a qform that differ by {shift:.2f} voxels",
                    expected="one position in space",
                    suggestion="write the file again with the correct affine; xdim_jax reads the sform",
                    severity=WARNING,
                )
            ]
    return []


def _sizes(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def _check_spacing(case: Case, volume: Volume) -> list[Problem]:
    spacing = volume.grid.spacing[1:] if volume.grid.flat or case.axes != "anatomical" else volume.grid.spacing
    if all(_PLAUSIBLE_MM[0] <= s <= _PLAUSIBLE_MM[1] for s in spacing):
        return []
    return [
        Problem(
            "implausible_spacing",
            source_path(case.images[0]),
            found=f"has voxels of {_sizes(spacing[::-1])} mm",
            expected=f"{_PLAUSIBLE_MM[0]} to {_PLAUSIBLE_MM[1]:g} mm",
            suggestion="correct the voxel size in the header if it is wrong; its unit is mm",
            severity=WARNING,
        )
    ]


def _check_same_grid(case: Case) -> list[Problem]:
    """Check the images of other series to which the reference also applies."""
    problems = []
    for source in case.same_grid:
        try:
            array, grid = read_image(source, case.axes)
        except DataError as error:
            problems += error.problems
            continue
        other = dataclasses.replace(case, images=(source,), channels=case.channels[:1], same_grid=())
        problems += _check_image(other, Volume(case.case_id, array.astype(np.float32), None, grid))
    return problems


# -- contents -----------------------------------------------------------------------------------------------------


def _source(case: Case, channel: int) -> Source:
    return case.images[min(channel, len(case.images) - 1)]  # one file may contain all channels


def _check_image(case: Case, volume: Volume) -> list[Problem]:
    problems = []
    for c, name in enumerate(case.channels):
        channel, path = volume.image[..., c], source_path(_source(case, c))
        if float(channel.min()) == float(channel.max()):
            problems.append(
                Problem(
                    "constant",
                    path,
                    found=f"is {float(channel.min()):g} everywhere ({name})",
                    expected="an image",
                    suggestion="download it again",
                )
            )
            continue
        constant = [bool(plane.min() == plane.max()) for plane in channel]
        inside = [k for k, flat in enumerate(constant) if not flat]
        if gaps := [k for k in range(min(inside, default=0), max(inside, default=0)) if constant[k]]:
            problems.append(
                Problem(
                    "empty_slice",
                    path,
                    found=f"has constant slices between others: {shorten(gaps, 6)} of {len(channel)} ({name})",
                    expected="an image in every slice",
                    suggestion="download it again, or omit the case",
                    severity=WARNING,
                )
            )
        if same := [k for k in range(1, len(channel)) if not constant[k] and (channel[k] == channel[k - 1]).all()]:
            problems.append(
                Problem(
                    "duplicate_slice",
                    path,
                    found=f"has slices identical to the previous slice: {shorten(same, 6)} of {len(channel)} ({name})",
                    expected="different slices",
                    suggestion="remove the copies, or download it again",
                    severity=WARNING,
                )
            )
    return problems


def _check_label(case: Case, volume: Volume, structures: frozenset[int]) -> list[Problem]:
    assert case.label is not None and volume.label is not None
    if not structures:
        return [
            Problem(
                "empty_label",
                source_path(case.label),
                found="contains no structure",
                expected=", ".join(case.labels.structures[1:]),
                suggestion="check that it is the right file, or omit the case",
                severity=WARNING,
            )
        ]
    if isinstance(case.label, tuple) and _seems_reversed(volume.image[..., 0], volume.label):
        return [
            Problem(
                "label_order",
                source_path(case.label),
                found="fits the image better if its slices are read in reverse order",
                expected="masks in the order of the slices",
                suggestion="masks and slices are matched in the order of their file names: rename the masks if they "
                "were exported in reverse order",
                severity=WARNING,
            )
        ]
    return []


def _seems_reversed(image: np.ndarray, label: np.ndarray) -> bool:
    """Return whether the intensities in the structures are more homogeneous with the label slices in reverse order.

    The intensities of an organ are similar, whereas a mask on a wrong slice also contains its surroundings.
    """
    if np.count_nonzero(label.any((1, 2))) < _MIN_SLICES:
        return False

    def spread(label: np.ndarray) -> float:
        deviations = []
        for index in np.unique(label[is_structure(label)]):
            values = image[label == index]
            low, high = np.percentile(values, [25, 75])
            deviations.append((high - low + values.std()) * len(values))
        return float(np.sum(deviations) / np.count_nonzero(label))

    return spread(label[::-1]) < _REVERSED_GAIN * spread(label)


# -- comparisons between cases ------------------------------------------------------------------------------------


def _duplicates(inspections: Sequence[Inspection]) -> list[Problem]:
    """Return a problem for each case that contains an image of an earlier case."""
    first: dict[str, Case] = {}
    problems = []
    for inspection in inspections:
        case = inspection.case
        shared: dict[str, list[int]] = defaultdict(list)  # earlier case -> channels that are in both
        for c, digest in enumerate(inspection.digests):
            if digest and (earlier := first.setdefault(digest, case)) is not case:
                shared[earlier.case_id].append(c)
        for name, channels in shared.items():
            earlier = next(case for case in first.values() if case.case_id == name)
            leak = earlier.patient != case.patient
            some = f" ({', '.join(case.channels[c] for c in channels)})" if len(channels) < len(case.channels) else ""
            problems.append(
                Problem(
                    "duplicate_content",
                    source_path(_source(case, channels[0])),
                    found=f"contains the same image as {name}{some}",
                    expected="different images",
                    suggestion="keep one: otherwise the same image may be used for training and for validation"
                    if leak
                    else "keep one",
                    case_id=case.case_id,
                    severity=ERROR if leak else WARNING,
                )
            )
    return problems


def _missing_structures(inspections: Sequence[Inspection], dataset: Dataset) -> list[Problem]:
    """Return a problem for each structure that a case lacks although nearly all cases of its modality have it."""
    if not dataset.same_structures:
        return []
    groups: dict[str, list[Inspection]] = defaultdict(list)
    for inspection in inspections:
        if inspection.structures:
            groups[inspection.case.info.get("modality", "")].append(inspection)
    problems = []
    for group in groups.values():
        for index, name in enumerate(dataset.labels.structures[1:], 1):
            without = [i.case for i in group if i.structures is not None and index not in i.structures]
            if not without or len(without) * _RARE > len(group):
                continue
            for case in without:
                assert case.label is not None
                problems.append(
                    Problem(
                        "missing_structure",
                        source_path(case.label),
                        found=f"contains no {name}, but {len(group) - len(without)} other cases do",
                        expected=name,
                        suggestion="check whether the image contains it",
                        case_id=case.case_id,
                        severity=WARNING,
                    )
                )
    return problems


# -- the report ---------------------------------------------------------------------------------------------------


def format_findings(findings: Findings, root: Path) -> list[str]:
    """Return the lines of a report: two lines for each problem, in columns, and the number of problems by kind."""
    rows: list[str] = []
    if not findings.problems:
        return [f"{findings.cases} cases, no problem found"]
    width = max(len(p.kind) for p in findings.problems)
    for p in findings.problems:
        path = _relative(p.path, root)
        rows.append(f"{p.severity:<8} {p.kind:<{width}}  {path} {p.found}")
        rows.append(f"{'':<8} {'':<{width}}  expected {p.expected}; {p.suggestion}")
    rows.append("")
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for p in findings.problems:
        counts[p.severity, p.kind] += 1
    for (severity, kind), count in sorted(counts.items()):
        rows.append(f"{severity:<8} {kind:<{width}}  {count:>5}  {KINDS[kind]}")
    warnings = len(findings.problems) - findings.errors
    rows.append(f"{findings.cases} cases, {findings.errors} errors, {warnings} warnings")
    return rows


def _relative(path: Path | str, root: Path) -> str:
    try:
        return str(Path(path).relative_to(root)) if Path(path) != root else str(path)
    except ValueError:
        return str(path)
