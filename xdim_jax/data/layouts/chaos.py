"""CHAOS as it lies on disk (spec: challenges, section 2.6): abdominal CT and MR as DICOM, masks as PNG.

    Train_Sets/CT/<id>/DICOM_anon/*.dcm                            Ground/liver_GT_000.png
    Train_Sets/MR/<id>/T1DUAL/DICOM_anon/{InPhase,OutPhase}/*.dcm  Ground/IMG-....png, named after the in-phase file
    Train_Sets/MR/<id>/T2SPIR/DICOM_anon/*.dcm                     Ground/IMG-....png      (Test_Sets has no Ground)

A case is one series of a patient: ``CT_1``, ``MR_1_T1DUAL``, ``MR_1_T2SPIR``. Slices are in the order of the file
names, which defines orientation in CHAOS, and the k-th mask belongs to the k-th slice; the affine comes from the
slices' positions, so in memory slices run upwards whatever the names' order.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import ERROR, WARNING, DataError, Problem, errors
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images.dicom import files_in_order, read_header
from xdim_jax.data.images.image import Source, where
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import Regions

ORGANS = ("liver", "right kidney", "left kidney", "spleen")
MR_LABELS = Labels(
    "CHAOS MR",
    ("background", *ORGANS),
    (0, 63, 126, 189, 252),
    ((55, 70), (110, 135), (175, 200), (240, 255)),
)
TESTING = "test_"  # before the ids of Test_Sets, which has numbers of its own, where Train_Sets is beside it
CT_LABELS = Labels("CHAOS CT", ("background", "liver"), (0, 63), ((0, 255),))  # any grey; results have 63

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
    """CHAOS for one of its tasks.

    Args:
        task: 1 CT and MR, liver; 2 CT, liver; 3 MR, liver; 4 CT and MR, liver on CT and four organs on MR; 5 MR, four
            organs.
        phase: of T1-DUAL: "in" (after which the masks are named), "out", "each" (two cases with one mask), or "both"
            (two channels; only without T2-SPIR and CT, which have one, so those are left out).

    Raises:
        UserError: an unknown task or phase.
    """
    if not isinstance(task, int) or task not in TASKS:
        raise UserError(f"config.data.task={task!r}: expected a number from 1 to 5")
    if phase not in PHASES:
        raise UserError(f"config.data.phase={phase!r}: known: {', '.join(PHASES)}")
    if phase == "both" and TASKS[task][0] != ("MR",):
        raise UserError(f"config.data.phase=both: two channels, which CT does not have; task {task} has CT")
    modalities, structures = TASKS[task]
    labels = MR_LABELS.select(structures)
    channels = ("in-phase", "out-phase") if phase == "both" else ("image",)
    return Dataset(
        "CHAOS",
        LAYOUT,
        channels,
        labels,
        Regions({name: (index,) for index, name in enumerate(structures, 1)}),
        lambda root, need_labels: scan(root, modalities, labels, phase, need_labels),
        holds_ct="CT" in modalities,
        annotated=(lambda case: ("liver",) if case.info["modality"] == "CT" else structures) if task == 4 else None,
        same_structures=modalities == ("MR",) or structures == ("liver",),
        inspect=inspect,
    )


def inspect(case: Case, image: np.ndarray) -> list[Problem]:
    """Hounsfield units on CT, which has air around the patient; magnitudes on MR."""
    low, ct = float(image.min()), case.info["modality"] == "CT"
    if low <= -500 if ct else low >= 0:
        return []
    expected, step = "magnitudes of 0 or more", "check modality and rescale intercept"
    if ct:
        expected = "Hounsfield units, with air near -1000"
    found = f"has values from {low:g}"
    return [Problem("intensity_range", where(case.images[0]), found, expected, step, case.case_id, WARNING)]


def scan(root: Path, modalities: tuple[str, ...], mr_labels: Labels, phase: str, need_labels: bool) -> Scan:
    """The series below ``root``, which holds CT and MR, or holds Train_Sets and Test_Sets, which do."""
    cases: list[Case] = []
    incomplete: list[Case] = []
    problems: list[Problem] = []
    below = [b for b in sorted(root.glob("*/")) if b.name != "__MACOSX"]
    bases = [b for b in [root, *below] if (b / "CT").is_dir() or (b / "MR").is_dir()]
    tests = [b for b in bases if b.name.lower().startswith("test")]
    if need_labels and len(bases) > len(tests):
        bases = [b for b in bases if b not in tests]
    for base in bases:
        group = TESTING if base in tests and len(bases) > 1 else ""
        for modality in modalities:
            for folder in _numbered(base / modality):
                patient = f"{group}{modality}_{folder.name}"
                series = [folder] if modality == "CT" else [folder / "T1DUAL", folder / "T2SPIR"]
                for path in series:
                    labels = mr_labels if modality == "MR" else CT_LABELS
                    name = patient if modality == "CT" else f"{patient}_{path.name}"
                    found, wrong = _series(path, name, patient, modality, labels, phase, need_labels)
                    (incomplete if errors(wrong) else cases).extend(found)
                    problems += wrong
    return Scan(cases, problems, incomplete=tuple(incomplete))


def _numbered(folder: Path) -> list[Path]:
    """Patient folders in the order of their numbers."""
    below = [p for p in folder.glob("*/") if p.name.isdigit()]
    return sorted(below, key=lambda p: int(p.name))


def _series(
    folder: Path, name: str, patient: str, modality: str, labels: Labels, phase: str, need_labels: bool
) -> tuple[list[Case], list[Problem]]:
    sequence = folder.name if modality == "MR" else "CT"
    info = {"modality": modality, "sequence": sequence}
    if not folder.is_dir():
        found, step = f"is missing series {sequence}", "fetch the patient again, or go on without the series"
        return [], [Problem("missing_view", folder.parent, found, "T1DUAL and T2SPIR", step, name, WARNING)]
    dicom = folder / "DICOM_anon"
    if sequence == "T1DUAL":
        phases, problems = _phases(dicom, name)
    else:
        files = files_in_order(dicom, ".dcm")
        phases, problems = ({"image": files} if files else {}), []
        if not files:
            problems.append(_no_images(dicom, name))
    masks = files_in_order(folder / "Ground", ".png")
    if not masks and need_labels:
        step = "fetch it again, or give Train_Sets as the root"
        problems.append(
            Problem("missing_label", folder / "Ground", "holds no PNG", "one mask for each slice", step, name, ERROR)
        )
    problems += _strangers(folder / "Ground", ".png", name) + _strangers(dicom, ".dcm", name)
    for files in phases.values():
        if masks and len(masks) != len(files):
            found = f"holds {len(masks)} masks for the {len(files)} slices of {files[0].parent.name}"
            step = "fetch both folders again"
            problems.append(Problem("slice_count", folder / "Ground", found, "one for each slice", step, name))
            break
    if "in" in phases and masks and len(masks) == len(phases["in"]):
        for image, mask in zip(phases["in"], masks, strict=True):
            if image.stem != mask.stem:
                found, step = f"comes {masks.index(mask) + 1}., where {image.name} does", "check the order of the masks"
                expected = "masks named after the in-phase slices"
                problems.append(Problem("slice_name", mask, found, expected, step, name, WARNING))
                break
    if not phases:
        return [], problems
    base = Case(name, patient, (), ("image",), masks or None, labels, info=info)
    return _choose(base, phases, phase), problems


def _choose(base: Case, phases: dict[str, tuple[Path, ...]], phase: str) -> list[Case]:
    """The cases that ``phase`` asks for."""

    def case(*sources: Source, suffix: str = "", channels: tuple[str, ...] = ("image",)) -> Case:
        return dataclasses.replace(base, case_id=base.case_id + suffix, images=sources, channels=channels)

    if len(phases) == 1 and "image" not in phases:  # one of two: for verify
        return [case(*phases.values())]
    if "image" in phases:
        return [] if phase == "both" else [case(phases["image"])]
    choices: dict[str, Callable[[], list[Case]]] = {
        "in": lambda: [dataclasses.replace(case(phases["in"]), beside=(phases["out"],))],
        "out": lambda: [dataclasses.replace(case(phases["out"]), beside=(phases["in"],))],
        "each": lambda: [case(phases[p], suffix=f"_{p}") for p in ("in", "out")],
        "both": lambda: [case(phases["in"], phases["out"], channels=("in-phase", "out-phase"))],
    }
    return choices[phase]()


def _phases(dicom: Path, name: str) -> tuple[dict[str, tuple[Path, ...]], list[Problem]]:
    """In- and out-phase files: by folder, or, where both lie in one, by echo time (in-phase is the longer echo)."""
    found = {"in": files_in_order(dicom / "InPhase", ".dcm"), "out": files_in_order(dicom / "OutPhase", ".dcm")}
    merged = files_in_order(dicom, ".dcm")
    if merged and not any(found.values()):
        try:
            echoes = {path: read_header(path).echo_time for path in merged}
        except DataError as error:
            return {}, error.of_case(name)
        times = sorted({t for t in echoes.values() if t is not None})
        if len(times) != 2:
            said = f"holds both phases with echo times {', '.join(f'{t:g}' for t in times) or 'unknown'}"
            step = "part the files into InPhase and OutPhase"
            return {}, [Problem("missing_image", dicom, said, "two echo times", step, name)]
        for key, time in (("out", times[0]), ("in", times[1])):
            found[key] = tuple(p for p in merged if echoes[p] == time)
    problems = [_no_images(dicom / f"{key.title()}Phase", name) for key, files in found.items() if not files]
    if not problems and len(found["in"]) != len(found["out"]):
        said = f"holds {len(found['in'])} in-phase and {len(found['out'])} out-phase slices"
        step = "fetch the series again"
        problems.append(Problem("slice_count", dicom, said, "one of each at every place", step, name))
    return {key: files for key, files in found.items() if files}, problems


def _no_images(folder: Path, name: str) -> Problem:
    return Problem("missing_image", folder, "holds no DICOM file", "*.dcm", "fetch the series again", name)


def _strangers(folder: Path, suffix: str, name: str) -> list[Problem]:
    if not folder.is_dir():
        return []
    return [
        Problem("extra_file", p, f"is no {suffix} file", f"{suffix} files alone", "move it away", name, WARNING)
        for p in sorted(folder.iterdir())
        if p.suffix.lower() in _IMAGES and p.suffix.lower() != suffix and not p.name.startswith(".")
    ]
