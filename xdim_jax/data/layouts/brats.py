"""The layout of BraTS on disk; see docs/challenges.md, sections "BraTS: files" and "BraTS: labels and regions".

    <root>/BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz             convention brats2021 (2018-2022)
    <root>/BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz      conventions brats2023, brats2024

Case folders may be one level deeper (``HGG/``, ``LGG/``), and files may be ``.nii``. The user must specify the
convention, because it cannot be inferred from the label values: label 4 is the enhancing tumour up to 2022 and a
resection cavity in 2024.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import WARNING, Problem
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images import nifti
from xdim_jax.data.images.image import images_in, source_path, unique_images
from xdim_jax.data.images.names import normalised, strip, subfolders
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
        """Return the name of a file of a case, without suffix; ``part`` is a modality or ``seg`` for the reference."""
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


_MIN_COVERAGE = 0.9  # smallest accepted number of nonzero voxels, relative to the largest in an image of the case
_MIN_ZEROS = 0.05  # smallest fraction of voxels that are 0 in a skull-stripped image


def inspect(case: Case, image: np.ndarray) -> list[Problem]:
    """Return a problem for each image that has negative values, is not skull-stripped, or misses a part of the brain.

    A part of the brain is assumed to be missing if the image has far fewer nonzero voxels than another image of the
    case, see `_MIN_COVERAGE`.
    """
    problems = _coverage_problems(case, image)
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
                expected="a skull-stripped image: 0 outside the brain, and no negative values",
                suggestion=step,
                severity=WARNING,
            )
        )
    return problems


def _coverage_problems(case: Case, image: np.ndarray) -> list[Problem]:
    """Return a problem for each image that covers much less of the brain than another image of the case."""
    counts = [int(np.count_nonzero(channel)) for channel in np.moveaxis(image, -1, 0)]
    size = image[..., 0].size
    stripped = [count for count in counts if count <= (1 - _MIN_ZEROS) * size]
    largest = max(stripped, default=0)
    return [
        Problem(
            "coverage",
            source_path(source),
            found=f"covers {count} voxels of the brain ({name}), but {case.channels[counts.index(largest)]} covers "
            f"{largest}",
            expected="images of the same part of the brain",
            suggestion="check the images: where one of them is 0, the input differs from that in training",
            severity=WARNING,
        )
        for source, name, count in zip(case.images, case.channels, counts, strict=True)
        if 0 < count < _MIN_COVERAGE * largest
    ]


def scan(root: Path, convention: Convention, need_labels: bool) -> Scan:
    """List the cases below ``root``, which may be the folder of a single case, and the problems of all folders."""
    tops = subfolders(root)
    below = [root, *tops, *(folder for top in tops for folder in subfolders(top))]
    folders = sorted(p for p in below if _is_case(p))
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    incomplete: list[Case] = []
    for folder in folders:
        case, missing, same_name = _find_files(folder, convention, need_labels)
        problems += same_name
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
    return not any(folder.iterdir()) or bool(_niftis(folder))


def _is_case(folder: Path) -> bool:
    return any(stem.startswith(normalised(folder.name)) for stem, _ in _niftis(folder))


def _niftis(folder: Path) -> list[tuple[str, Path]]:
    """Return the NIfTI files in a folder with their names without suffix."""
    return [(name, p) for name, p in images_in(folder) if strip(p.name, nifti.SUFFIXES) is not None]


def _find_files(folder: Path, convention: Convention, need_labels: bool) -> tuple[Case, list[str], list[Problem]]:
    """Return the case with the existing files, the missing parts, and a problem for each part that is found twice.

    The parts are the names of the modalities in the convention, and ``seg``.
    """
    name = normalised(folder.name)
    files, problems = unique_images(_niftis(folder), name)
    images = {part: files.get(convention.file_name(name, part)) for part in convention.modalities}
    label = files.get(convention.file_name(name, "seg"))
    if label is None:  # the segmentation of BraTS20_Training_355 has another name
        label = next((path for stem, path in files.items() if stem.endswith("_Segm")), None)
    missing = [part for part, path in images.items() if path is None]
    if need_labels and label is None:
        missing.append("seg")
    patient = name.rsplit("-", 1)[0] if convention.separator == "-" else name  # without the time point
    existing = {key: p for key, p in zip(MODALITIES, images.values(), strict=True) if p is not None}
    case = Case(name, patient, tuple(existing.values()), tuple(existing), label, convention.labels)
    return case, missing, problems


def _missing_files(folder: Path, convention: Convention, missing: list[str]) -> list[Problem]:
    """Return a problem for each missing file, or a single one if the files are named by another convention."""
    name = normalised(folder.name)
    spellings = {_spelling(stem): path for stem, path in _niftis(folder)}
    for other in CONVENTIONS.values():
        if other.separator != convention.separator and not _find_files(folder, other, False)[1]:
            return [
                Problem(
                    "wrong_convention",
                    folder,
                    found=f"has files named as in {other.name}, but the convention is {convention.name}",
                    expected=convention.layout(),
                    suggestion=f"give --config.data.convention={other.name} (train) or --convention={other.name}",
                    case_id=name,
                )
            ]
    problems = []
    for part in missing:
        wanted = convention.file_name(name, part)
        other = spellings.get(_spelling(wanted))
        problems.append(
            Problem(
                "missing_label" if part == "seg" else "missing_image",
                folder,
                found=f"is missing {wanted}.nii.gz" + (f", but has {other.name}" if other else ""),
                expected=convention.layout(),
                suggestion=f"rename {other.name}" if other else "download the case again, or move it to another folder",
                case_id=name,
            )
        )
    return problems


def _spelling(stem: str) -> str:
    """Return a name in lower case, without separators and spaces."""
    return re.sub(r"[-_ .]+", "", stem).lower()


def _extra_files(folder: Path, case: Case) -> list[Problem]:
    """Return a problem for each image file that belongs to no modality."""
    others = [p for stem, p in _niftis(folder) if not stem.endswith("seg")]
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
        if p not in case.files
    ]


def case_from_files(paths: Sequence[Path], convention: Convention) -> Case:
    """Return a case made from its image files.

    Args:
        paths: One file per modality, in the order of `MODALITIES`.
        convention: Convention of the file names.

    Raises:
        UserError: The number of files is wrong, a file is missing, or the names show several cases or another order.
    """
    order = ", ".join(convention.modalities)
    if len(paths) != len(MODALITIES):
        raise UserError(f"{len(paths)} files given; expected one per modality, in the order {order}")
    if absent := [str(p) for p in paths if not p.is_file()]:
        raise UserError(f"{', '.join(absent)}: no such file; expected one per modality, in the order {order}")
    found = [_modality_of(path) for path in paths]
    for (_, modality), path, wanted in zip(found, paths, MODALITIES, strict=True):
        if modality not in ("", wanted):
            names = dict(zip(MODALITIES, convention.modalities, strict=True))
            raise UserError(
                f"{path} is {names.get(modality, modality)} by its name, but {names[wanted]} is expected at this "
                f"place; the order is {order}"
            )
    stems = {stem for stem, modality in found if modality}
    if len(stems) > 1:
        raise UserError(f"the files belong to different cases: {', '.join(sorted(stems))}; give the files of one case")
    name = next(iter(stems), "") or found[0][0] or paths[0].absolute().parent.name
    return Case(name, name, tuple(paths), MODALITIES, None, convention.labels)


# names of the modalities in file names of all conventions, and of other data sets
_ALIASES = {
    "flair": ("flair", "t2f", "t2flair"),
    "t1": ("t1", "t1n", "t1w"),
    "t1ce": ("t1ce", "t1c", "t1gd", "t1post"),
    "t2": ("t2", "t2w"),
}


def _modality_of(path: Path) -> tuple[str, str]:
    """Return the case and the modality in a file name.

    The case is empty if the name is only a modality, such as ``flair.nii.gz``. If the name has no modality, the result
    is the whole name and an empty string.
    """
    stem = strip(path.name, nifti.SUFFIXES) or path.stem
    case, separator, last = re.fullmatch(r"(.*?)([-_. ]?)([^-_. ]*)", stem).groups()  # pyright: ignore
    modality = next((m for m, names in _ALIASES.items() if last.lower() in names), "")
    return (case if modality and (separator or not case) else stem), modality
