"""The layout of BraTS on disk; see docs/challenges.md, sections "BraTS: files" and "BraTS: labels and regions".

    <root>/BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz             convention brats2021 (2019-2022)
    <root>/BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz      conventions brats2023, brats2024

Case folders may be one level deeper (``HGG/``, ``LGG/``), and files may be ``.nii``. The user must name the convention,
because it cannot be inferred from the label values: label 4 is the enhancing tumour up to 2022 and a resection cavity
in 2024.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import WARNING, Problem
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images import nifti
from xdim_jax.data.images.image import source_path
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import BRATS, BRATS_2024, TISSUES, Regions

MODALITIES: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")  # names of the image channels, in their order


@dataclasses.dataclass(frozen=True)
class Convention:
    """File names, label values and scoring rules of one generation of the challenge.

    Attributes:
        name: Name of the convention.
        separator: Character between the name of a case and the name of a modality.
        modalities: Names of the `MODALITIES` in file names, in the same order.
        labels: Meaning of the label values.
        regions: Regions that are predicted and scored.
        rules: Name of the scoring rules, see `xdim_jax.scoring.challenges`.
    """

    name: str
    separator: str
    modalities: tuple[str, ...]
    labels: Labels
    regions: Regions
    rules: str

    def file_name(self, case: str, part: str) -> str:
        """Return the name, without suffix, of the file with a modality or the reference (``seg``) of a case."""
        return f"{case}{self.separator}{part}"

    def layout(self) -> str:
        """Return the expected tree of files, for messages."""
        case = "BraTS2021_00000" if self.separator == "_" else "BraTS-GLI-00000-000"
        parts = ",".join((*self.modalities, "seg"))
        return f"<root>/{case}/{case}{self.separator}{{{parts}}}.nii.gz"


_NEW_NAMES = ("t2f", "t1n", "t1c", "t2w")
CONVENTIONS = {
    "brats2021": Convention(
        "brats2021",
        "_",
        ("flair", "t1", "t1ce", "t2"),
        Labels("brats2021", TISSUES, (0, 1, 2, 4), elsewhere=((3, "brats2023 (ET)"), (3, "brats2024 (ET)"))),
        BRATS,
        rules="brats2022",
    ),
    "brats2023": Convention(
        "brats2023",
        "-",
        _NEW_NAMES,
        Labels("brats2023", TISSUES, (0, 1, 2, 3), elsewhere=((4, "brats2021 (ET)"), (4, "brats2024 (RC)"))),
        BRATS,
        rules="brats2023",
    ),
    "brats2024": Convention(
        "brats2024",
        "-",
        _NEW_NAMES,
        Labels("brats2024", (*TISSUES, "RC"), (0, 1, 2, 3, 4)),
        BRATS_2024,
        rules="brats2024",
    ),
}


def get_convention(name: str) -> Convention:
    """Return a convention. Raises UserError, listing the known names, if the name is unknown."""
    if name not in CONVENTIONS:
        raise UserError(f"config.data.convention={name!r} is unknown; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def dataset(convention: str) -> Dataset:
    """Return BraTS in one convention. Raises UserError if the convention is unknown."""
    found = get_convention(convention)
    return Dataset(
        name="BraTS",
        layout=found.layout(),
        channels=MODALITIES,
        labels=found.labels,
        regions=found.regions,
        scan=lambda root, need_labels: scan(root, found, need_labels),
        same_structures=False,  # some cases have no enhancing tumour, some have no necrosis
        inspect=inspect,
        case_from_files=lambda paths: case_from_files(paths, found),
    )


def scoring(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of the scoring rules for the ``data`` section of a config."""
    return get_convention(data["convention"]).rules, {"convention": data["convention"]}


_MIN_ZEROS = 0.05  # smallest fraction of voxels that are 0 in a skull-stripped image


def inspect(case: Case, image: np.ndarray) -> list[Problem]:
    """Return a problem for each image that has negative values, or too few zeros to be skull-stripped."""
    problems = []
    for source, name, channel in zip(case.images, case.channels, np.moveaxis(image, -1, 0), strict=True):
        zeros = np.count_nonzero(channel == 0) / channel.size
        if zeros < _MIN_ZEROS:
            found = f"is 0 in only {100 * zeros:.1f} % of its voxels ({name})"
            step = "strip the skull, and set the voxels outside the brain to 0"
        elif channel.min() < 0:
            found = f"has values down to {channel.min():g} ({name})"
            step = "restore the raw intensities"
        else:
            continue
        problems.append(
            Problem(
                "intensity_range",
                source_path(source),
                found=found,
                expected="a skull-stripped image, 0 outside the brain",
                suggestion=step,
                severity=WARNING,
            )
        )
    return problems


def scan(root: Path, convention: Convention, need_labels: bool) -> Scan:
    """List the cases below ``root``, which may also be the folder of a single case, and the problems of all folders."""
    below = [p for p in [root, *root.glob("*/"), *root.glob("*/*/")] if not p.name.startswith(".")]
    below = [p for p in below if "__MACOSX" not in p.parts]
    folders = sorted(p for p in below if _is_case(p))
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    incomplete: list[Case] = []
    for folder in folders:
        case, missing = _find_files(folder, convention, need_labels)
        if case.case_id in cases:
            problems.append(
                Problem(
                    "duplicate_case",
                    folder,
                    found=f"and {cases[case.case_id].files[0].parent} are both case {case.case_id}",
                    expected="one folder",
                    suggestion="keep one",
                    case_id=case.case_id,
                )
            )
        elif missing:
            problems += _missing_files(folder, convention, missing)
            if case.images:
                incomplete.append(case)
        else:
            cases[case.case_id] = case
            problems += _extra_files(folder, case)
    for folder in below:
        if folder not in folders and folder != root and _looks_like_a_broken_case(folder):
            problems.append(
                Problem(
                    "extra_file",
                    folder,
                    found="is empty, or contains NIfTI files that are not named after it",
                    expected=convention.layout(),
                    suggestion=f"rename it, or move it out of {root}",
                    case_id=folder.name,
                )
            )
    return Scan(list(cases.values()), problems, incomplete=tuple(incomplete))


def _looks_like_a_broken_case(folder: Path) -> bool:
    names = [p.name for p in folder.iterdir()]
    return not names or any(n.endswith(nifti.SUFFIXES) for n in names)


def _is_case(folder: Path) -> bool:
    return any(
        p.name.startswith(folder.name) and p.name.endswith(nifti.SUFFIXES) for p in folder.iterdir() if p.is_file()
    )


def _find_files(folder: Path, convention: Convention, need_labels: bool) -> tuple[Case, list[str]]:
    """Return the case with the files that exist, and the parts that are missing."""

    def find(part: str) -> Path | None:
        stem = convention.file_name(folder.name, part)
        return next((p for s in nifti.SUFFIXES if (p := folder / f"{stem}{s}").is_file()), None)

    images = {part: find(part) for part in convention.modalities}
    label = find("seg")
    if label is None:  # BraTS20_Training_355 has a segmentation of another name
        label = next((p for p in sorted(folder.glob("*_Segm.nii*")) if not p.name.startswith(".")), None)
    missing = [part for part, path in images.items() if path is None]
    if need_labels and label is None:
        missing.append("seg")
    patient = folder.name.rsplit("-", 1)[0] if convention.separator == "-" else folder.name  # without the time point
    existing = {name: p for name, p in zip(MODALITIES, images.values(), strict=True) if p is not None}
    return Case(folder.name, patient, tuple(existing.values()), tuple(existing), label, convention.labels), missing


def _missing_files(folder: Path, convention: Convention, missing: list[str]) -> list[Problem]:
    """Return a problem for each missing file, or a single one if the files are named by another convention."""
    for other in CONVENTIONS.values():
        if other.separator != convention.separator and not _find_files(folder, other, False)[1]:
            return [
                Problem(
                    "wrong_convention",
                    folder,
                    found=f"has files named as in {other.name}, but the convention is {convention.name}",
                    expected=convention.layout(),
                    suggestion=f"give --config.data.convention={other.name} (train) or --convention={other.name}",
                    case_id=folder.name,
                )
            ]
    return [
        Problem(
            "missing_label" if part == "seg" else "missing_image",
            folder,
            found=f"is missing {convention.file_name(folder.name, part)}.nii.gz",
            expected=convention.layout(),
            suggestion="fetch the case again or move it out of the data root",
            case_id=folder.name,
        )
        for part in missing
    ]


def _extra_files(folder: Path, case: Case) -> list[Problem]:
    """Return a problem for each image file that belongs to no modality."""
    others = [p for p in sorted(folder.iterdir()) if p.name.endswith(nifti.SUFFIXES) and not p.name.startswith(".")]
    return [
        Problem(
            "extra_file",
            p,
            found="belongs to none of the modalities",
            expected=", ".join(MODALITIES) + " and seg",
            suggestion="move it to another folder",
            case_id=case.case_id,
            severity=WARNING,
        )
        for p in others
        if p not in case.files and not p.name.endswith(("seg.nii.gz", "seg.nii"))
    ]


def case_from_files(paths: Sequence[Path], convention: Convention) -> Case:
    """Return a case made from its image files.

    Args:
        paths: One file per modality, in the order of `MODALITIES`.
        convention: Convention of the file names.

    Raises:
        UserError: There is not one existing file per modality, or the names show another order or different cases.
    """
    order = ", ".join(convention.modalities)
    if len(paths) != len(MODALITIES):
        raise UserError(f"{len(paths)} files given; expected one per modality, in the order {order}")
    if absent := [str(p) for p in paths if not p.is_file()]:
        raise UserError(f"{', '.join(absent)}: no such file; expected one per modality, in the order {order}")
    stems = []
    for path, wanted in zip(paths, convention.modalities, strict=True):
        stem = path.name
        for suffix in nifti.SUFFIXES:
            stem = stem.removesuffix(suffix)
        named = [m for m in convention.modalities if stem.endswith(f"{convention.separator}{m}")]
        if named and wanted not in named:
            raise UserError(f"{path} is {named[0]} by its name, but {wanted} is expected; the order is {order}")
        stems.append(stem.removesuffix(f"{convention.separator}{wanted}") if named else "")
    if len(set(filter(None, stems))) > 1:
        raise UserError(
            f"the files belong to different cases: {', '.join(sorted(set(stems)))}; give the files of one case"
        )
    name = stems[0] or paths[0].name.split(".")[0]
    return Case(name, name, tuple(paths), MODALITIES, None, convention.labels)
