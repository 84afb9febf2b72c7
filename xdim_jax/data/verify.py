"""Finds everything wrong with a data set in one pass: names, headers, contents, and cases against one another."""

import concurrent.futures
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import shorten
from xdim_jax.base.problem import ERROR, KINDS, WARNING, DataError, Problem, errors
from xdim_jax.data.case import Case, Dataset, Volume, load_case, scan_cases
from xdim_jax.data.images import dicom, nifti
from xdim_jax.data.images.grid import compare_grids
from xdim_jax.data.images.image import Source, files_of, read_grid, read_image, where

_PLAUSIBLE_MM = (0.01, 50.0)
_RARE = 10  # a structure that one case of so many lacks, or fewer, is worth a warning
_REVERSED_GAIN = 0.8  # of the intensities' spread inside the structures, when label slices are turned round
_FEW = 3  # labelled slices, below which the order of label slices is not judged


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What one case holds: its problems, a digest of each channel, and the structures in its label map."""

    case: Case
    problems: list[Problem]
    digests: tuple[str, ...]
    structures: frozenset[int] | None


@dataclasses.dataclass(frozen=True)
class Findings:
    """The outcome for a data set."""

    cases: int
    problems: list[Problem]

    @property
    def errors(self) -> int:
        return len(errors(self.problems))


def verify(
    dataset: Dataset,
    root: Path,
    *,
    need_labels: bool = True,
    jobs: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """All findings, by case. Each of ``jobs`` threads holds one case in memory.

    Raises:
        UserError: no such folder, or no case in it.
    """
    scan = scan_cases(dataset, root, need_labels=need_labels)
    inspections = []
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        cases = [*scan.cases, *scan.incomplete]
        for inspection in pool.map(lambda case: inspect(case, dataset), cases):
            inspections.append(inspection)
            progress(len(inspections), len(cases))
    problems = _once([*scan.problems, *(p for i in inspections for p in i.problems)])
    problems += _twins(inspections) + _absences(inspections, dataset)
    order = {kind: i for i, kind in enumerate(KINDS)}
    problems.sort(key=lambda p: (p.severity, p.case_id, order[p.kind], str(p.path)))
    return Findings(len(scan.cases), problems)


def inspect(case: Case, dataset: Dataset) -> Inspection:
    """Reads a case whole and looks at what it holds."""
    volume, problems = load_case(case)
    problems = _once([*_headers(case), *problems, *_beside(case)])
    if volume is None:
        return Inspection(case, problems, (), None)
    problems += _spacing(case, volume) + _image(case, volume) + dataset.inspect(case, volume.image)
    structures = None
    if volume.label is not None:
        structures = frozenset(np.unique(volume.label).tolist()) - {0}
        if not any(p.kind in ("label_scale", "label_value", "dtype") for p in problems):
            problems += _label(case, volume, structures)
    return Inspection(case, problems, tuple(map(_digest, np.moveaxis(volume.image, -1, 0))), structures)


def _once(problems: Sequence[Problem]) -> list[Problem]:
    """What header and content show alike, or two cases that share files, is said once: as it was found first."""

    def key(p: Problem) -> tuple[str, ...]:
        alone = p.kind in ("unreadable", "slice_count")  # one of them on a file is all there is to say
        return (p.kind, str(p.path)) if alone else (p.kind, str(p.path), p.found)

    return list({key(p): p for p in reversed(problems)}.values())[::-1]


def _digest(channel: np.ndarray) -> str:
    """Of what a channel holds; "" for one that is constant."""
    if channel.min() == channel.max():
        return ""
    return hashlib.blake2b(repr(channel.shape).encode() + np.ascontiguousarray(channel).tobytes()).hexdigest()


# -- headers ------------------------------------------------------------------------------------------------------


def _headers(case: Case) -> list[Problem]:
    problems = []
    for source in (*case.images, *case.beside):
        problems += _series_headers(source, case.case_id) if isinstance(source, tuple) else []
    for source in case.beside:
        if len(files_of(source)) != len(files_of(case.images[0])):  # said by the listing
            continue
        try:
            pair = [read_grid(s, case.axes) for s in (source, case.images[0])]
        except DataError:  # said above
            continue
        problems += compare_grids(where(source), pair[0], where(case.images[0]), pair[1], case.case_id)
    for path in [*case.images, case.label]:
        if isinstance(path, Path) and path.name.endswith(nifti.SUFFIXES):
            problems += _nifti_header(path, case.case_id)
    return problems


def _series_headers(files: Sequence[Path], case_id: str) -> list[Problem]:
    slices, problems = [], []
    for path in files:
        try:
            slices.append(dicom.read_header(path))
        except DataError as error:
            problems += error.of_case(case_id)
    return problems or dicom.series_problems(slices, case_id)


def _nifti_header(path: Path, case_id: str) -> list[Problem]:
    """A header that says two things: programs that read the one and the other would disagree."""
    import nibabel as nib

    try:
        header: Any = nib.load(path).header  # pyright: ignore[reportAttributeAccessIssue]
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
        zooms = np.array(header.get_zooms()[:3], np.float64)
    except Exception:  # what cannot be read is found when the case is loaded
        return []
    problems = []
    if sform is not None:
        lengths = np.sqrt((sform[:3, :3] ** 2).sum(0))[: len(zooms)]
        if not np.allclose(lengths, zooms, rtol=1e-2):
            found = f"has voxel sizes {_sizes(zooms)} in pixdim and {_sizes(lengths)} in its sform"
            step = "write it anew with the right one"
            problems.append(Problem("spacing", path, found, "one voxel size", step, case_id, WARNING))
        elif qform is not None:
            corner = np.ones(4)
            corner[: len(zooms)] = header.get_data_shape()[: len(zooms)]
            shift = np.abs((sform - qform) @ corner)[:3].max() / max(lengths.min(), 1e-6)
            if shift > 0.5:
                found = f"has an sform and a qform that differ by {shift:.2f} voxels"
                step = "write it anew with the right one; the sform is read here"
                problems.append(Problem("affine", path, found, "one place in space", step, case_id, WARNING))
    return problems


def _sizes(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def _spacing(case: Case, volume: Volume) -> list[Problem]:
    spacing = volume.grid.spacing[1:] if volume.grid.flat or case.axes != "anatomical" else volume.grid.spacing
    if all(_PLAUSIBLE_MM[0] <= s <= _PLAUSIBLE_MM[1] for s in spacing):
        return []
    found, step = f"has voxels of {_sizes(spacing[::-1])} mm", "restore its header; sizes are in mm"
    expected = f"{_PLAUSIBLE_MM[0]} to {_PLAUSIBLE_MM[1]:g} mm"
    return [Problem("implausible_spacing", where(case.images[0]), found, expected, step, case.case_id, WARNING)]


def _beside(case: Case) -> list[Problem]:
    """Series that share the label, looked at for themselves."""
    problems = []
    for source in case.beside:
        try:
            array, grid = read_image(source, case.axes)
        except DataError as error:
            problems += error.of_case(case.case_id)
            continue
        alone = dataclasses.replace(case, images=(source,), channels=case.channels[:1], beside=())
        problems += _image(alone, Volume(case.case_id, array.astype(np.float32), None, grid))
    return problems


# -- contents -----------------------------------------------------------------------------------------------------


def _source(case: Case, channel: int) -> Source:
    return case.images[min(channel, len(case.images) - 1)]  # one file may hold all channels


def _image(case: Case, volume: Volume) -> list[Problem]:
    problems = []
    for c, name in enumerate(case.channels):
        channel, path = volume.image[..., c], where(_source(case, c))
        if float(channel.min()) == float(channel.max()):
            found, step = f"is {float(channel.min()):g} everywhere ({name})", "fetch it again"
            problems.append(Problem("constant", path, found, "an image", step, case.case_id))
            continue
        flat = [bool(plane.min() == plane.max()) for plane in channel]
        inside = [k for k, constant in enumerate(flat) if not constant]
        if gaps := [k for k in range(min(inside, default=0), max(inside, default=0)) if flat[k]]:
            found = f"has constant slices inside, of {len(channel)}: {shorten(gaps, 6)} ({name})"
            step = "fetch it again, or leave it out"
            problems.append(Problem("empty_slice", path, found, "an image in every slice", step, case.case_id, WARNING))
        if same := [k for k in range(1, len(channel)) if not flat[k] and (channel[k] == channel[k - 1]).all()]:
            found = f"has slices that equal the one before, of {len(channel)}: {shorten(same, 6)} ({name})"
            step = "remove the copies, or fetch it again"
            problems.append(Problem("duplicate_slice", path, found, "different slices", step, case.case_id, WARNING))
    return problems


def _label(case: Case, volume: Volume, structures: frozenset[int]) -> list[Problem]:
    assert case.label is not None and volume.label is not None
    path = where(case.label)
    if not structures:
        found, step = "holds no structure", "check that it is the right file, or leave the case out"
        expected = ", ".join(case.labels.structures[1:])
        return [Problem("empty_label", path, found, expected, step, case.case_id, WARNING)]
    if isinstance(case.label, tuple) and _seems_reversed(volume.image[..., 0], volume.label):
        found = "fits the image better when its slices are taken in reverse order"
        step = "pair masks and slices by rank of their names; rename the masks if they were exported backwards"
        return [Problem("label_order", path, found, "masks in the order of the slices", step, case.case_id, WARNING)]
    return []


def _seems_reversed(image: np.ndarray, label: np.ndarray) -> bool:
    """Whether the structures are more homogeneous under the label slices in reverse order.

    An organ has about one intensity, so a mask on the wrong slice takes in its surroundings.
    """
    if np.count_nonzero(label.any((1, 2))) < _FEW:
        return False

    def spread(order: np.ndarray) -> float:
        deviations = []
        for index in np.unique(order)[1:]:
            values = image[order == index]
            low, high = np.percentile(values, [25, 75])
            deviations.append((high - low + values.std()) * len(values))
        return float(np.sum(deviations) / np.count_nonzero(order))

    return spread(label[::-1]) < _REVERSED_GAIN * spread(label)


# -- cases against one another ------------------------------------------------------------------------------------


def _twins(inspections: Sequence[Inspection]) -> list[Problem]:
    first: dict[str, Case] = {}
    problems = []
    for inspection in inspections:
        case = inspection.case
        shared: dict[str, list[int]] = defaultdict(list)  # other case -> channels that it has too
        for c, digest in enumerate(inspection.digests):
            if digest and (twin := first.setdefault(digest, case)) is not case:
                shared[twin.case_id].append(c)
        for name, channels in shared.items():
            twin = next(case for case in first.values() if case.case_id == name)
            leak = twin.patient != case.patient
            some = f" ({', '.join(case.channels[c] for c in channels)})" if len(channels) < len(case.channels) else ""
            found = f"holds the same image as {name}{some}"
            step = "keep one: in training and in validation they would leak" if leak else "keep one"
            severity, path = ERROR if leak else WARNING, where(_source(case, channels[0]))
            problems.append(Problem("duplicate_content", path, found, "different images", step, case.case_id, severity))
    return problems


def _absences(inspections: Sequence[Inspection], dataset: Dataset) -> list[Problem]:
    """Structures that nearly all cases of one kind of image have."""
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
                found, step = f"holds no {name}, which {len(group) - len(without)} other cases hold", "look at it"
                path = where(case.label)
                problems.append(Problem("missing_structure", path, found, name, step, case.case_id, WARNING))
    return problems


# -- the table ----------------------------------------------------------------------------------------------------


def format_findings(findings: Findings, root: Path) -> list[str]:
    """One block of lines per finding, in columns, and a count by kind."""
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
