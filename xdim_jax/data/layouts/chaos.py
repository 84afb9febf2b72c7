"""The layout of CHAOS on disk: abdominal CT and MR as DICOM, masks as PNG; see docs/challenges.md, "CHAOS: files".

    Train_Sets/CT/<id>/DICOM_anon/*.dcm                            Ground/liver_GT_000.png
    Train_Sets/MR/<id>/T1DUAL/DICOM_anon/{InPhase,OutPhase}/*.dcm  Ground/IMG-....png, named after the in-phase file
    Train_Sets/MR/<id>/T2SPIR/DICOM_anon/*.dcm                     Ground/IMG-....png      (Test_Sets has no Ground)

A case is one series of a patient: ``CT_1``, ``MR_1_T1DUAL``, ``MR_1_T2SPIR``. Slices are read in the order of the file
names, and the k-th mask belongs to the k-th slice. The affine is computed from the positions of the slices in the DICOM
headers, so slices in memory are ordered from inferior to superior, whatever the order of the file names is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import WARNING, DataError, Problem, errors, in_case
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images.dicom import files_in_order, read_headers
from xdim_jax.data.images.image import source_path
from xdim_jax.data.images.names import files_below, subfolders
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import Regions

ORGANS = ("liver", "right kidney", "left kidney", "spleen")
MR_LABELS = Labels(
    "CHAOS MR",
    ("background", *ORGANS),
    (0, 63, 126, 189, 252),
    ((55, 70), (110, 135), (175, 200), (240, 255)),
)
# in files, any grey value above 0 is the liver; predictions are written as 63
CT_LABELS = Labels("CHAOS CT", ("background", "liver"), (0, 63), ((0, 255),))
# prefix of the case ids of Test_Sets if Train_Sets is in the same folder: both number their patients from 1
TEST_PREFIX = "test_"

# task -> modalities and structures
TASKS: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    1: (("CT", "MR"), ("liver",)),
    2: (("CT",), ("liver",)),
    3: (("MR",), ("liver",)),
    4: (("CT", "MR"), ORGANS),
    5: (("MR",), ORGANS),
}
_IMAGES = (".dcm", ".png", ".jpg", ".jpeg", ".gz", ".nii")
PHASES = ("in", "out", "each", "both")
LAYOUT = "<root>/{CT/<id>,MR/<id>/T1DUAL,MR/<id>/T2SPIR}/{DICOM_anon/...dcm,Ground/...png}"


def dataset(task: int = 5, phase: str = "in") -> Dataset:
    """Return CHAOS for one of its tasks.

    Args:
        task: 1 CT and MR, liver; 2 CT, liver; 3 MR, liver; 4 CT and MR, liver on CT and four organs on MR; 5 MR, four
            organs.
        phase: Images of T1-DUAL to use: "in" (the masks are named after them), "out", "each" (two cases with the same
            masks), or "both" (one case with two channels). "both" omits T2-SPIR, which has one channel, and is not
            possible for tasks with CT.

    Raises:
        UserError: The task or the phase is unknown, or they cannot be combined.
    """
    if not isinstance(task, int) or task not in TASKS:
        raise UserError(f"config.data.task={task!r}: expected a number from 1 to 5")
    if phase not in PHASES:
        raise UserError(f"config.data.phase={phase!r}: expected one of {', '.join(PHASES)}")
    if phase == "both" and TASKS[task][0] != ("MR",):
        raise UserError(
            f"config.data.phase=both needs two channels, but CT in task {task} has one; give another phase, or task 3 "
            "or 5"
        )
    modalities, structures = TASKS[task]
    labels = MR_LABELS.select(structures)
    return Dataset(
        name="CHAOS",
        layout=LAYOUT,
        channels=("in-phase", "out-phase") if phase == "both" else ("image",),
        labels=labels,
        regions=Regions({name: (index,) for index, name in enumerate(structures, 1)}),
        scan=lambda root, need_labels: scan(root, modalities, labels, phase, need_labels),
        holds_ct="CT" in modalities,
        annotated=(lambda case: ("liver",) if case.info["modality"] == "CT" else structures) if task == 4 else None,
        same_structures=modalities == ("MR",) or structures == ("liver",),
        inspect=inspect,
    )


def scoring(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of the scoring rules for the ``data`` section of a config."""
    return "chaos", {"task": [str(data["task"])]}


def inspect(case: Case, image: np.ndarray) -> list[Problem]:
    """Return a problem if a CT image has no values of air (-500 HU or below), or an MR image has negative values."""
    low, ct = float(image.min()), case.info["modality"] == "CT"
    if low <= -500 if ct else low >= 0:
        return []
    return [
        Problem(
            "intensity_range",
            source_path(case.images[0]),
            found=f"has a minimum of {low:g}",
            expected="Hounsfield units, with air near -1000" if ct else "magnitudes of 0 or more",
            suggestion="check modality and rescale intercept",
            severity=WARNING,
        )
    ]


def scan(root: Path, modalities: tuple[str, ...], mr_labels: Labels, phase: str, need_labels: bool) -> Scan:
    """List the series below ``root``, which contains the folders CT and MR, or the folders Train_Sets and Test_Sets.

    Args:
        root: Folder of the data set.
        modalities: Some of CT and MR.
        mr_labels: Labels to read from the masks of MR; masks of CT contain only the liver.
        phase: Images of T1-DUAL to use, see `dataset`.
        need_labels: True if a series without masks is an error. Test_Sets is then not listed if Train_Sets exists.
    """
    cases: list[Case] = []
    incomplete: list[Case] = []
    problems: list[Problem] = []
    bases = [b for b in [root, *subfolders(root)] if (b / "CT").is_dir() or (b / "MR").is_dir()]
    tests = [b for b in bases if b.name.lower().startswith("test")]
    if need_labels and len(bases) > len(tests):
        bases = [b for b in bases if b not in tests]
    for base in bases:
        group = TEST_PREFIX if base in tests and len(bases) > 1 else ""
        for modality in modalities:
            problems += [] if (base / modality).is_dir() else [_no_modality(base, modality)]
            for folder in _numbered(base / modality):
                patient = f"{group}{modality}_{folder.name}"
                series = [folder] if modality == "CT" else [folder / "T1DUAL", folder / "T2SPIR"]
                for path in series:
                    labels = mr_labels if modality == "MR" else CT_LABELS
                    name = patient if modality == "CT" else f"{patient}_{path.name}"
                    found, wrong = _series(path, name, patient, modality, labels, phase, need_labels)
                    (incomplete if errors(wrong) else cases).extend(found)
                    problems += wrong
    folders = [folder for base in bases for modality in ("CT", "MR") for folder in _numbered(base / modality)]
    known = {path for folder in [*folders, *tests] for path in files_below(folder) if path.suffix.lower() in _IMAGES}
    return Scan(cases, problems, incomplete=tuple(incomplete), known=frozenset(known))


def _no_modality(base: Path, modality: str) -> Problem:
    return Problem(
        "missing_view",
        base,
        found=f"has no folder {modality}",
        expected="the modalities of the task",
        suggestion=f"download the {modality} data, or choose a task without {modality} (--task, --config.data.task)",
        severity=WARNING,
    )


def _numbered(folder: Path) -> list[Path]:
    """Return the patient folders in the order of their numbers."""
    below = [p for p in folder.glob("*/") if p.name.isdigit()]
    return sorted(below, key=lambda p: int(p.name))


def _series(
    folder: Path, name: str, patient: str, modality: str, labels: Labels, phase: str, need_labels: bool
) -> tuple[list[Case], list[Problem]]:
    """Return the cases of one series folder, with all problems of its files."""
    sequence = folder.name if modality == "MR" else "CT"
    if not folder.is_dir():
        return [], [
            Problem(
                "missing_view",
                folder.parent,
                found=f"is missing series {sequence}",
                expected="T1DUAL and T2SPIR",
                suggestion="download the patient again, or continue without the series",
                case_id=name,
                severity=WARNING,
            )
        ]
    dicom, ground = folder / "DICOM_anon", folder / "Ground"
    if sequence == "T1DUAL":
        phases, problems = _phases(dicom)
    else:
        files = files_in_order(dicom, ".dcm")
        phases, problems = ({"image": files}, []) if files else ({}, [_no_images(dicom)])
    masks = files_in_order(ground, ".png")
    if not masks and need_labels:
        problems.append(
            Problem(
                "missing_label",
                ground,
                found="contains no PNG",
                expected="one mask for each slice",
                suggestion="download it again, or give Train_Sets as the root",
            )
        )
    problems += _other_images(ground, ".png") + _other_images(dicom, ".dcm")
    if wrong := _mask_problems(ground, masks, phases):
        if need_labels:
            problems += wrong
        else:  # prediction does not need the reference
            masks = ()
    problems = in_case(name, problems)
    if not phases:
        return [], problems
    info = {"modality": modality, "sequence": sequence}
    base = Case(name, patient, (), ("image",), masks or None, labels, info=info)
    return _select_phase(base, phases, phase), problems


def _mask_problems(ground: Path, masks: Sequence[Path], phases: Mapping[str, tuple[Path, ...]]) -> list[Problem]:
    """Compare the masks with the slices: their number, and on T1-DUAL their names."""
    if not masks:
        return []
    problems = []
    for files in phases.values():
        if len(masks) != len(files):
            problems.append(
                Problem(
                    "slice_count",
                    ground,
                    found=f"contains {len(masks)} masks for the {len(files)} slices of {files[0].parent.name}",
                    expected="one for each slice",
                    suggestion="download both folders again",
                )
            )
            break
    images = phases.get("in", ())
    for k, (image, mask) in enumerate(zip(images, masks, strict=False), 1):
        if len(masks) == len(images) and image.stem != mask.stem:
            problems.append(
                Problem(
                    "slice_name",
                    mask,
                    found=f"is number {k} of the masks, but number {k} of the slices is {image.name}",
                    expected="masks named after the in-phase slices",
                    suggestion="check the order of the masks",
                    severity=WARNING,
                )
            )
            break
    return problems


def _select_phase(base: Case, phases: dict[str, tuple[Path, ...]], phase: str) -> list[Case]:
    """Return the cases of a series for a value of ``phase``, see `dataset`."""
    if "image" in phases:  # not T1-DUAL
        return [] if phase == "both" else [dataclasses.replace(base, images=(phases["image"],))]
    if len(phases) == 1:  # the other phase is missing: an incomplete case, for verify
        return [dataclasses.replace(base, images=tuple(phases.values()))]
    if phase == "both":
        channels = ("in-phase", "out-phase")
        return [dataclasses.replace(base, images=(phases["in"], phases["out"]), channels=channels)]
    if phase == "each":
        names = {name: f"{base.case_id}_{name}" for name in ("in", "out")}
        return [dataclasses.replace(base, case_id=names[name], images=(phases[name],)) for name in names]
    other = phases["out" if phase == "in" else "in"]
    return [dataclasses.replace(base, images=(phases[phase],), same_grid=(other,))]


def _phases(dicom: Path) -> tuple[dict[str, tuple[Path, ...]], list[Problem]]:
    """Return the in-phase and the out-phase files, and their problems.

    If both are in one folder, they are distinguished by their echo times: in-phase images have the longer one.
    """
    found = {"in": files_in_order(dicom / "InPhase", ".dcm"), "out": files_in_order(dicom / "OutPhase", ".dcm")}
    merged = files_in_order(dicom, ".dcm")
    if merged and not any(found.values()):
        try:
            echoes = {path: read_headers(path)[0].echo_time for path in merged}
        except DataError as error:
            return {}, error.problems
        times = sorted({t for t in echoes.values() if t is not None})
        if unknown := [path.name for path, t in echoes.items() if t is None]:
            return {}, [
                Problem(
                    "missing_image",
                    dicom,
                    found=f"has {len(unknown)} images without echo time: {shorten(unknown)}",
                    expected="EchoTime in every file, to distinguish the two phases",
                    suggestion="sort the files into the folders InPhase and OutPhase",
                )
            ]
        if len(times) != 2:
            return {}, [
                Problem(
                    "missing_image",
                    dicom,
                    found=f"has images with these echo times in ms: {', '.join(f'{t:g}' for t in times) or 'none'}",
                    expected="two echo times",
                    suggestion="sort the files into the folders InPhase and OutPhase",
                )
            ]
        for key, time in (("out", times[0]), ("in", times[1])):
            found[key] = tuple(p for p in merged if echoes[p] == time)
    problems = [_no_images(dicom / f"{key.title()}Phase") for key, files in found.items() if not files]
    if not problems and len(found["in"]) != len(found["out"]):
        problems.append(
            Problem(
                "slice_count",
                dicom,
                found=f"contains {len(found['in'])} in-phase and {len(found['out'])} out-phase slices",
                expected="an in-phase and an out-phase slice at each position",
                suggestion="download the series again",
            )
        )
    return {key: files for key, files in found.items() if files}, problems


def _no_images(folder: Path) -> Problem:
    return Problem(
        "missing_image",
        folder,
        found="contains no DICOM file",
        expected="*.dcm",
        suggestion="download the series again",
    )


def _other_images(folder: Path, suffix: str) -> list[Problem]:
    """Return a problem for each image in a folder whose suffix is not ``suffix``."""
    if not folder.is_dir():
        return []
    return [
        Problem(
            "extra_file",
            p,
            found=f"is not a {suffix} file",
            expected=f"only {suffix} files",
            suggestion="move it to another folder",
            severity=WARNING,
        )
        for p in sorted(folder.iterdir())
        if p.suffix.lower() in _IMAGES and p.suffix.lower() != suffix and not p.name.startswith(".")
    ]
