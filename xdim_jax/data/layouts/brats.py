"""BraTS as it lies on disk (spec: challenges, sections 3.5 and 4.1).

    <root>/BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz             convention brats2021 (2019-2022)
    <root>/BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz      conventions brats2023, brats2024

Case folders may lie one level deeper (``HGG/``, ``LGG/``); files may be ``.nii``. The convention says what the label
values mean and is never guessed from them: label 4 is the enhancing tumour up to 2022 and a resection cavity in 2024.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import WARNING, Problem
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images import nifti
from xdim_jax.data.images.image import where
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import BRATS, BRATS_2024, TISSUES

MODALITIES: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")  # the order of the image channels


@dataclasses.dataclass(frozen=True)
class Convention:
    """File names and label values of one generation of the challenge."""

    name: str
    separator: str
    modalities: tuple[str, ...]  # as `MODALITIES`, in this generation's words
    labels: Labels

    def file_name(self, case: str, part: str) -> str:
        return f"{case}{self.separator}{part}"

    def layout(self) -> str:
        """The expected tree, for messages."""
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
    ),
    "brats2023": Convention(
        "brats2023",
        "-",
        _NEW_NAMES,
        Labels("brats2023", TISSUES, (0, 1, 2, 3), elsewhere=((4, "brats2021 (ET)"), (4, "brats2024 (RC)"))),
    ),
    "brats2024": Convention("brats2024", "-", _NEW_NAMES, Labels("brats2024", (*TISSUES, "RC"), (0, 1, 2, 3, 4))),
}


def get_convention(name: str) -> Convention:
    """Raises UserError, listing the known names, for an unknown one."""
    if name not in CONVENTIONS:
        raise UserError(f"config.data.convention={name!r} is unknown; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def dataset(convention: str) -> Dataset:
    """BraTS of one convention. Raises UserError for an unknown one."""
    found = get_convention(convention)
    return Dataset(
        "BraTS",
        found.layout(),
        MODALITIES,
        found.labels,
        BRATS_2024 if found.name == "brats2024" else BRATS,
        lambda root, need_labels: scan(root, found, need_labels),
        same_structures=False,  # some cases have no enhancing tumour, some no necrosis
        inspect=inspect,
    )


_BACKGROUND = 0.05  # smallest share of exact zeros in a skull-stripped image


def inspect(case: Case, image: np.ndarray) -> list[Problem]:
    """Skull-stripped magnitudes: not negative, and exactly 0 outside the brain."""
    problems = []
    for source, name, channel in zip(case.images, case.channels, np.moveaxis(image, -1, 0), strict=True):
        zeros = np.count_nonzero(channel == 0) / channel.size
        found = ""
        if zeros < _BACKGROUND:
            found, step = (
                f"is 0 on {100 * zeros:.1f} % of its voxels ({name})",
                "strip the skull, and set the rest to 0",
            )
        elif channel.min() < 0:
            found, step = f"has values down to {channel.min():g} ({name})", "restore the raw intensities"
        if found:
            expected = "a skull-stripped image, 0 outside the brain"
            problems.append(Problem("intensity_range", where(source), found, expected, step, case.case_id, WARNING))
    return problems


def scan(root: Path, convention: Convention, need_labels: bool) -> Scan:
    """The complete cases below ``root``, which may also be one case folder, and what is wrong with the others."""
    below = [p for p in [root, *root.glob("*/"), *root.glob("*/*/")] if not p.name.startswith(".")]
    below = [p for p in below if "__MACOSX" not in p.parts]
    folders = sorted(p for p in below if _is_case(p))
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    incomplete: list[Case] = []
    for folder in folders:
        case, missing = _find_files(folder, convention, need_labels)
        if case.case_id in cases:
            twin = cases[case.case_id].files[0].parent
            found = f"and {twin} are both case {case.case_id}"
            problems.append(Problem("duplicate_case", folder, found, "one folder", "keep one", case.case_id))
        elif missing:
            problems += _missing(folder, convention, missing)
            if case.images:
                incomplete.append(case)
        else:
            cases[case.case_id] = case
            problems += _surplus(folder, case)
    for folder in below:
        if folder not in folders and folder != root and _looks_like_a_broken_case(folder):
            found = "is empty, or holds NIfTI files that are not named after it"
            step = f"rename it, or move it out of {root}"
            problems.append(Problem("extra_file", folder, found, convention.layout(), step, folder.name))
    return Scan(list(cases.values()), problems, incomplete=tuple(incomplete))


def _looks_like_a_broken_case(folder: Path) -> bool:
    names = [p.name for p in folder.iterdir()]
    return not names or any(n.endswith(nifti.SUFFIXES) for n in names)


def _is_case(folder: Path) -> bool:
    return any(
        p.name.startswith(folder.name) and p.name.endswith(nifti.SUFFIXES) for p in folder.iterdir() if p.is_file()
    )


def _find_files(folder: Path, convention: Convention, need_labels: bool) -> tuple[Case, list[str]]:
    def find(part: str) -> Path | None:
        stem = convention.file_name(folder.name, part)
        return next((p for s in nifti.SUFFIXES if (p := folder / f"{stem}{s}").is_file()), None)

    images = {part: find(part) for part in convention.modalities}
    label = find("seg") or next(
        (p for p in sorted(folder.glob("*_Segm.nii*")) if not p.name.startswith(".")), None
    )  # BraTS20_Training_355
    missing = [part for part, path in images.items() if path is None]
    if need_labels and label is None:
        missing.append("seg")
    patient = folder.name.rsplit("-", 1)[0] if convention.separator == "-" else folder.name  # drops the time point
    there = {name: p for name, p in zip(MODALITIES, images.values(), strict=True) if p is not None}
    return Case(folder.name, patient, tuple(there.values()), tuple(there), label, convention.labels), missing


def _missing(folder: Path, convention: Convention, missing: list[str]) -> list[Problem]:
    for other in CONVENTIONS.values():
        if other.separator != convention.separator and not _find_files(folder, other, False)[1]:
            found = f"has files named as in {other.name}, but the convention is {convention.name}"
            step = f"give --config.data.convention={other.name} (train) or --convention={other.name}"
            return [Problem("wrong_convention", folder, found, convention.layout(), step, folder.name)]
    step = "fetch the case again or move it out of the data root"
    return [
        Problem(
            "missing_label" if part == "seg" else "missing_image",
            folder,
            f"is missing {convention.file_name(folder.name, part)}.nii.gz",
            convention.layout(),
            step,
            folder.name,
        )
        for part in missing
    ]


def _surplus(folder: Path, case: Case) -> list[Problem]:
    others = [p for p in sorted(folder.iterdir()) if p.name.endswith(nifti.SUFFIXES) and not p.name.startswith(".")]
    found = "belongs to none of the modalities"
    return [
        Problem("extra_file", p, found, ", ".join(MODALITIES) + " and seg", "move it away", case.case_id, WARNING)
        for p in others
        if p not in case.files and not p.name.endswith(("seg.nii.gz", "seg.nii"))
    ]


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
        for suffix in nifti.SUFFIXES:
            stem = stem.removesuffix(suffix)
        named = [m for m in convention.modalities if stem.endswith(f"{convention.separator}{m}")]
        if named and wanted not in named:
            raise UserError(f"{path} is {named[0]} by its name, where {wanted} is expected; the order is {order}")
        stems.append(stem.removesuffix(f"{convention.separator}{wanted}") if named else "")
    if len(set(filter(None, stems))) > 1:
        raise UserError(f"the files are of different cases: {', '.join(sorted(set(stems)))}; give those of one")
    name = stems[0] or paths[0].name.split(".")[0]
    return Case(name, name, tuple(paths), MODALITIES, None, convention.labels)
