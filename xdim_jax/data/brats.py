"""BraTS as it lies on disk (spec: challenges, sections 3.5 and 4.1): list the cases of a folder, read one.

    <root>/BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz             convention brats2021 (2019-2022)
    <root>/BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz      convention brats2023

Case folders may lie one level deeper (``HGG/``, ``LGG/``); files may be ``.nii``. The convention says what the label
values mean and is never guessed from them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdim_jax.data.nifti import Grid, read_grid, read_volume
from xdim_jax.errors import UserError, join_problems
from xdim_jax.regions import ED, ET, NCR

MODALITIES: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")  # the order of the image channels
_SUFFIXES = (".nii.gz", ".nii")
_SHIFT_TOLERANCE = 0.01  # of a voxel, at the volume's corners


@dataclasses.dataclass(frozen=True)
class Convention:
    """File names and label values of one generation of the challenge."""

    name: str
    separator: str
    modalities: tuple[str, ...]  # as `MODALITIES`, in this generation's words
    labels: dict[int, int]  # value on disk -> tissue index

    def file_name(self, case: str, part: str) -> str:
        return f"{case}{self.separator}{part}"

    def layout(self) -> str:
        """The expected tree, for messages."""
        case = {"brats2021": "BraTS2021_00000", "brats2023": "BraTS-GLI-00000-000"}[self.name]
        parts = ",".join((*self.modalities, "seg"))
        return f"<root>/{case}/{case}{self.separator}{{{parts}}}.nii.gz"


CONVENTIONS = {
    "brats2021": Convention("brats2021", "_", ("flair", "t1", "t1ce", "t2"), {0: 0, 1: NCR, 2: ED, 4: ET}),
    "brats2023": Convention("brats2023", "-", ("t2f", "t1n", "t1c", "t2w"), {0: 0, 1: NCR, 2: ED, 3: ET}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One examination: the files of its modalities and, where there is one, of its reference labels."""

    case_id: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None
    convention: Convention


@dataclasses.dataclass(frozen=True)
class Volume:
    """A case in memory: ``image`` float32 (D, H, W, 4), ``label`` uint8 (D, H, W) of tissue indices or None."""

    case_id: str
    image: np.ndarray
    label: np.ndarray | None
    grid: Grid


def get_convention(name: str) -> Convention:
    """Raises UserError, listing the known names, for an unknown one."""
    if name not in CONVENTIONS:
        raise UserError(f"config.data.convention={name!r} is unknown; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def list_cases(root: Path, convention: Convention, *, need_labels: bool) -> list[Case]:
    """The cases below ``root``, by name. ``root`` may also be one case folder.

    Raises:
        UserError: no such folder; no case in it; files of another convention; and, all at once, every case with a
            missing modality or (``need_labels``) a missing segmentation.
    """
    cases, problems = scan_cases(root, convention, need_labels=need_labels)
    if problems:
        raise join_problems(list(problems.values()), f"incomplete cases below {root}")
    return cases


def scan_cases(root: Path, convention: Convention, *, need_labels: bool) -> tuple[list[Case], dict[str, str]]:
    """The complete cases below ``root``, and what is wrong with each of the others.

    Raises:
        UserError: no such folder, or no case in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected {convention.layout()}")
    below = [p for p in [root, *root.glob("*/"), *root.glob("*/*/")] if not p.name.startswith(".")]
    folders = sorted(p for p in below if _is_case(p))
    if not folders:
        found = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))[:5]
        raise UserError(
            f"no BraTS case below {root}: expected {convention.layout()}; found "
            + (f"{', '.join(found)}, ..." if found else "an empty folder")
        )
    cases: dict[str, Case] = {}
    problems: dict[str, str] = {}
    for folder in folders:
        case, missing = _find_files(folder, convention, need_labels)
        if case.case_id in cases:
            twin = cases[case.case_id].images[0].parent
            problems[case.case_id] = f"{folder} and {twin} are both case {case.case_id}; keep one"
        elif missing:
            problems[case.case_id] = _missing_message(folder, convention, missing)
        else:
            cases[case.case_id] = case
    for folder in below:
        if folder not in folders and folder != root and _looks_like_a_broken_case(folder):
            problems[folder.name] = (
                f"{folder} is empty, or holds NIfTI files that are not named after it; expected "
                f"{convention.layout()}: rename it, or move it out of {root}"
            )
    return list(cases.values()), problems


def _looks_like_a_broken_case(folder: Path) -> bool:
    names = [p.name for p in folder.iterdir()]
    return not names or any(n.endswith(_SUFFIXES) for n in names)


def check_grids(cases: Sequence[Case]) -> None:
    """Compares shape and affine of all files of all cases by their headers alone.

    Raises:
        UserError: every unreadable header and every file that does not lie on its case's grid, at once.
    """
    problems = []
    for case in cases:
        first = None
        for path in [*case.images, *([case.label] if case.label else [])]:
            try:
                grid = read_grid(path)
            except UserError as error:
                problems.append(str(error))
                continue
            first = first or grid
            if problem := _grid_problem(path, grid, case.images[0], first):
                problems.append(problem)
    if problems:
        raise join_problems(problems, "files that do not fit their case")


def _is_case(folder: Path) -> bool:
    return any(p.name.startswith(folder.name) and p.name.endswith(_SUFFIXES) for p in folder.iterdir() if p.is_file())


def _find_files(folder: Path, convention: Convention, need_labels: bool) -> tuple[Case, list[str]]:
    def find(part: str) -> Path | None:
        stem = convention.file_name(folder.name, part)
        return next((p for s in _SUFFIXES if (p := folder / f"{stem}{s}").is_file()), None)

    images = {part: find(part) for part in convention.modalities}
    label = find("seg") or next(iter(sorted(folder.glob("*_Segm.nii*"))), None)  # BraTS20_Training_355
    missing = [part for part, path in images.items() if path is None]
    if need_labels and label is None:
        missing.append("seg")
    patient = folder.name.rsplit("-", 1)[0] if convention.separator == "-" else folder.name  # drops the time point
    paths = tuple(p for p in images.values() if p is not None)
    return Case(folder.name, patient, paths, label, convention), missing


def _missing_message(folder: Path, convention: Convention, missing: list[str]) -> str:
    for other in CONVENTIONS.values():
        if other is not convention and not _find_files(folder, other, False)[1]:
            return (
                f"{folder} has files named as in {other.name}, but the convention is {convention.name}: give "
                f"--config.data.convention={other.name} (train) or --convention={other.name}"
            )
    names = ", ".join(f"{convention.file_name(folder.name, part)}.nii.gz" for part in missing)
    return f"{folder}: missing {names}; fetch the case again or move it out of the data root"


def case_from_files(paths: Sequence[Path], convention: Convention) -> Case:
    """A case from its modality files, given in the order of `MODALITIES`.

    Raises:
        UserError: not one existing file per modality.
    """
    order = ", ".join(convention.modalities)
    if len(paths) != len(MODALITIES):
        raise UserError(f"{len(paths)} files given; expected one per modality, in the order {order}")
    if absent := [str(p) for p in paths if not p.is_file()]:
        raise UserError(f"{', '.join(absent)}: no such file; expected one per modality, in the order {order}")
    stems = []
    for path, wanted in zip(paths, convention.modalities, strict=True):
        stem = path.name
        for suffix in _SUFFIXES:
            stem = stem.removesuffix(suffix)
        named = [m for m in convention.modalities if stem.endswith(f"{convention.separator}{m}")]
        if named and wanted not in named:
            raise UserError(f"{path} is {named[0]} by its name, where {wanted} is expected; the order is {order}")
        stems.append(stem.removesuffix(f"{convention.separator}{wanted}") if named else "")
    if len(set(filter(None, stems))) > 1:
        raise UserError(f"the files are of different cases: {', '.join(sorted(set(stems)))}; give those of one")
    name = stems[0] or paths[0].name.split(".")[0]
    return Case(name, name, tuple(paths), None, convention)


def without_label(case: Case) -> Case:
    """The case as a network sees it: its reference is not read."""
    return dataclasses.replace(case, label=None)


def read_case(case: Case) -> Volume:
    """Reads all files of a case and checks that they lie on one grid and hold what they should.

    Raises:
        UserError: every problem of the case at once: unreadable files, shapes or affines that differ, NaN or
            infinite intensities, label values that the convention does not have.
    """
    problems: list[str] = []
    arrays: list[np.ndarray] = []
    grids: list[Grid] = []
    paths = [*case.images, *([case.label] if case.label else [])]
    for path in paths:
        try:
            array, grid = read_volume(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if grids and (problem := _grid_problem(path, grid, case.images[0], grids[0])):
            problems.append(problem)
        if path is not case.label and not np.isfinite(array).all():
            count = np.count_nonzero(~np.isfinite(array))
            problems.append(
                f"{path} holds {count} NaN or infinite voxels; expected finite intensities: repair the file"
            )
        arrays.append(array)
        grids.append(grid)
    label = None
    if not problems and case.label:
        label, unknown = decode_label(arrays.pop(), case.convention)
        if unknown:
            problems.append(_label_message(case.label, unknown, case.convention))
    if problems:
        raise join_problems(problems, f"problems in case {case.case_id}")
    return Volume(case.case_id, np.stack(arrays, -1).astype(np.float32, copy=False), label, grids[0])


def _grid_problem(path: Path, grid: Grid, first_path: Path, first: Grid) -> str | None:
    if grid.shape != first.shape:
        return f"{path} has shape {grid.shape}, but {first_path.name} has {first.shape}; expected one shape per case"
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in grid.shape], [1], indexing="ij"), -1).reshape(-1, 4)
    shift = np.abs(corners @ (np.linalg.solve(first.affine, grid.affine) - np.eye(4)).T).max()
    if shift > _SHIFT_TOLERANCE:
        return (
            f"{path} lies up to {shift:.2f} voxels away from {first_path.name} by its affine; expected co-registered "
            f"files (within {_SHIFT_TOLERANCE} voxels): resample it or restore its header"
        )
    return None


def decode_label(values: np.ndarray, convention: Convention) -> tuple[np.ndarray, list[float]]:
    """Values on disk to tissue indices uint8, and the values that the convention does not have."""
    rounded = np.rint(values).astype(np.int64)
    known = np.array(sorted(convention.labels))
    unknown = np.unique(values[(np.abs(values - rounded) > 1e-3) | ~np.isin(rounded, known)]).tolist()
    label = np.zeros(values.shape, np.uint8)
    for value, tissue in convention.labels.items():
        label[rounded == value] = tissue
    return label, unknown


def _label_message(path: Path, unknown: list[float], convention: Convention) -> str:
    shown = ", ".join(f"{v:g}" for v in unknown[:6]) + (", ..." if len(unknown) > 6 else "")
    known = ", ".join(str(v) for v in sorted(convention.labels))
    fits = [c.name for c in CONVENTIONS.values() if c is not convention and set(unknown) <= set(c.labels)]
    hint = f" (those values exist in {fits[0]}: is the convention right?)" if fits else ""
    return f"{path} holds label {shown}; {convention.name} has only {known}{hint}"


def encode_label(label: np.ndarray, convention: Convention) -> np.ndarray:
    """Tissue indices to the values of the convention, uint8."""
    table = np.zeros(len(convention.labels), np.uint8)
    for value, tissue in convention.labels.items():
        table[tissue] = value
    return table[label]
