"""The layout of CAMUS on disk: 2D echocardiography of the left heart; see docs/challenges.md, section "CAMUS: files".

    CAMUS_public/database_nifti/patient0001/patient0001_{2CH,4CH}_{ED,ES,half_sequence}[_gt].nii.gz   NIfTI release
                                           /Info_{2CH,4CH}.cfg
    CAMUS_public/database_split/subgroup_{training,validation,testing}.txt
    {training,testing}/patient0001/patient0001_2CH_ED[_gt].mhd + .raw                                 older release
    listSubGroups/subGroup1_{training,validation,testing}.txt

A case is one frame (end-diastole ED or end-systole ES of one view), or a half sequence, i.e. all frames of a view from
one of these instants to the other, along D. Images keep their stored axes, so H points away from the probe.
``Case.info`` contains the view, the instant, the group (``testing`` for test patients of the older release; otherwise
there is none), and the values in the cfg file (``ImageQuality``, ``EF``, ``ED``, ``ES``, ...).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import WARNING, Problem
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images.grid import Axes
from xdim_jax.data.images.image import source_path
from xdim_jax.data.images.names import files_below
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import Regions

LABELS = Labels("CAMUS", ("background", "LV cavity", "myocardium", "left atrium"), (0, 1, 2, 3))
REGIONS = Regions({"LV_endo": (1,), "LV_epi": (1, 2), "LA": (3,)})
VIEWS, INSTANTS, QUALITIES = ("2CH", "4CH"), ("ED", "ES"), ("Good", "Medium", "Poor")
ALL_INSTANTS = (*INSTANTS, "half_sequence")
LAYOUT = "<root>/database_nifti/patient0001/patient0001_{2CH,4CH}_{ED,ES}[_gt].nii.gz, or .mhd below training/"
_FILE = re.compile(r"(patient\d+)_(\dCH)_(ED|ES|half_sequence|sequence)(_gt)?\.(?i:nii\.gz|nii|mhd|mha)")

_Parts = dict[tuple[str, str], dict[str, Path]]  # (view, instant) -> files of "image" and "gt"


def dataset(
    views: Sequence[str] = VIEWS, instants: Sequence[str] = INSTANTS, quality: Sequence[str] = QUALITIES
) -> Dataset:
    """Return CAMUS, or a part of it.

    Args:
        views: Some of 2CH and 4CH.
        instants: Some of ED, ES and half_sequence.
        quality: Some of Good, Medium and Poor. For training and validation, only images of these qualities are used;
            images of unknown quality only if all three are given. For prediction, all images are used.

    Raises:
        UserError: A view, instant or quality is unknown.
    """
    for name, chosen, known in (
        ("views", views, VIEWS),
        ("instants", instants, ALL_INSTANTS),
        ("quality", quality, QUALITIES),
    ):
        if not chosen or set(chosen) - set(known):
            raise UserError(f"config.data.{name}={tuple(chosen)}: expected one or more of {', '.join(known)}")
    return Dataset(
        name="CAMUS",
        layout=LAYOUT,
        channels=("ultrasound",),
        labels=LABELS,
        regions=REGIONS,
        scan=lambda root, need_labels: scan(root, views, instants, quality, need_labels),
        axes="stored",
        inspect=inspect,
    )


def scoring(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of the scoring rules for the ``data`` section of a config."""
    return "camus", {}


def inspect(case: Case, image: np.ndarray) -> list[Problem]:
    """Return a problem if the image does not have grey values of 0 to 255."""
    low, high = float(image.min()), float(image.max())
    if low >= 0 and 2 <= high <= 255:
        return []
    return [
        Problem(
            "intensity_range",
            source_path(case.images[0]),
            found=f"has values from {low:g} to {high:g}",
            expected="0 to 255",
            suggestion="restore the raw grey values",
            severity=WARNING,
        )
    ]


def read_info(path: Path) -> dict[str, str]:
    """Read the ``Key: value`` lines of a cfg file; blank lines and lines without a colon are ignored.

    The keys of the older release are also added under their new names: ``EF``, ``EDV`` and ``ESV``.
    """
    info = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip():
            info[key.strip()] = value.strip()
    for old, new in (("LVef", "EF"), ("LVedv", "EDV"), ("LVesv", "ESV")):  # names in the older release
        if old in info:
            info.setdefault(new, info[old])
    return info


def scan(root: Path, views: Sequence[str], instants: Sequence[str], quality: Sequence[str], need_labels: bool) -> Scan:
    """List the images below ``root``.

    A missing view or instant is only a warning: every image is a case of its own, and the patient's other images remain
    usable.

    Args:
        root: Folder of the data set.
        views, instants, quality: See `dataset`.
        need_labels: True if an image without reference is an error. Images of the group "testing" without reference are
            then omitted instead, see `_find_files`.
    """
    patients, problems = _find_files(root)
    cases = []
    incomplete: dict[str, list[str]] = {}  # "view instant" -> patients without this image
    without_info: list[str] = []
    for (group, patient), (folder, parts) in sorted(patients.items()):
        name = f"{group}_{patient}" if group else patient
        # if a folder contains several patients, it is unknown to which of them its cfg files belong
        one_patient = sum(other == folder for other, _ in patients.values()) == 1
        for view in views:
            info, found = _read_view_info(folder, view, name) if one_patient else ({}, [])
            problems += found
            if not info and any(v == view for v, _ in parts):
                without_info.append(f"{name} {view}")
            for instant in instants:
                paths = parts.get((view, instant), {})
                if instant == "half_sequence" and not paths:
                    paths = parts.get((view, "sequence"), {})  # its name in the older release
                case_id = f"{name}_{view}_{instant}"
                if "image" not in paths:
                    incomplete.setdefault(f"{view} {instant}", []).append(name)
                    if "gt" in paths:
                        problems.append(_without_image(paths["gt"], case_id))
                    continue
                # for prediction (no need_labels), images of every quality are listed
                if need_labels and set(quality) < set(QUALITIES) and info.get("ImageQuality") not in quality:
                    continue
                if "gt" not in paths and need_labels and group != "testing":
                    problems.append(_without_label(paths["image"], case_id))
                    continue
                axes: Axes = "reversed" if instant == "half_sequence" and _is_reversed(info) else "stored"
                properties = {"view": view, "instant": instant, **({"group": group} if group else {}), **info}
                if "gt" in paths or not need_labels:
                    label = paths.get("gt")
                    cases.append(
                        Case(case_id, name, (paths["image"],), ("ultrasound",), label, LABELS, axes, info=properties)
                    )
    problems += _missing_views(root, incomplete, len(patients))
    if without_info:
        problems.append(
            Problem(
                "missing_info",
                root,
                found=f"has no usable Info_<view>.cfg for {len(without_info)} views: {shorten(without_info)}",
                expected="Info_<view>.cfg for each view, in a folder that contains the images of one patient only",
                suggestion="continue without it: the quality and the direction of half sequences are then unknown",
                severity=WARNING,
            )
        )
    splits, found = _splits(root, {f"{g}_{p}" if g else p for g, p in patients}) if need_labels else ((), [])
    known = {path for _, parts in patients.values() for files in parts.values() for path in files.values()}
    return Scan(cases, problems + found, splits, known=frozenset(known))


def _find_files(root: Path) -> tuple[dict[tuple[str, str], tuple[Path, _Parts]], list[Problem]]:
    """Return the folder and the files of each (group, patient), and all problems.

    The group is "testing" for the test patients of the older release, because its training set has patients of the same
    names. Otherwise the group is empty. Files that are more than three folders below ``root`` are ignored.
    """
    patients: dict[tuple[str, str], tuple[Path, _Parts]] = {}
    problems = []
    for path in sorted(path for path in files_below(root) if len(path.relative_to(root).parts) <= 4):
        if not (match := _FILE.fullmatch(path.name)):
            continue
        patient, view, instant, gt = match.groups()
        group = "testing" if "testing" in path.relative_to(root).parts else ""
        folder, parts = patients.get((group, patient), (path.parent, {}))
        home = path.parent if path.parent.name == patient else folder  # the folder with the patient's cfg files
        patients[group, patient] = home, parts
        files, role = parts.setdefault((view, instant), {}), "gt" if gt else "image"
        if role in files:
            problems.append(
                Problem(
                    "duplicate_case",
                    path,
                    found=f"and {files[role]} are both {path.name.split('.')[0]}",
                    expected="one file",
                    suggestion="keep one",
                    case_id=patient,
                )
            )
        elif path.parent.name.startswith("patient") and path.parent.name != patient:
            problems.append(
                Problem(
                    "extra_file",
                    path,
                    found=f"is in the folder of {path.parent.name}",
                    expected=f"a file of {path.parent.name}",
                    suggestion="move it to the folder of its patient",
                    case_id=patient,
                )
            )
        else:
            files[role] = path
    return patients, problems


def _read_view_info(folder: Path, view: str, patient: str) -> tuple[dict[str, str], list[Problem]]:
    """Return the values in the cfg file of a view, without unusable frame numbers, and its problems."""
    frame = "the number of a frame, from 1 to NbFrame"
    path = folder / f"Info_{view}.cfg"
    if not path.is_file():
        return {}, []
    info, problems = read_info(path), []

    def report(found: str, expected: str) -> None:
        problems.append(
            Problem(
                "missing_info",
                path,
                found=f"has {found}",
                expected=expected,
                suggestion="correct the line",
                case_id=patient,
                severity=WARNING,
            )
        )

    for key in ("ED", "ES", "NbFrame"):
        if key in info and info[key].removesuffix(".0").isdigit():
            info[key] = info[key].removesuffix(".0")
        elif key in info:
            report(f"{key}: {info[key]!r}", "the number of frames" if key == "NbFrame" else frame)
            del info[key]
    frames = info.get("NbFrame")
    for key in ("ED", "ES"):
        if key in info and (int(info[key]) < 1 or (frames is not None and int(info[key]) > int(frames))):
            report(f"{key}: {info[key]}, and NbFrame: {frames or 'unknown'}", frame)
            del info[key]
    if (quality := info.get("ImageQuality")) is not None and quality not in QUALITIES:
        report(f"ImageQuality: {quality!r}", ", ".join(QUALITIES))
    return info, problems


def _is_reversed(info: Mapping[str, str]) -> bool:
    """Return whether ED follows ES in the half sequence. Its frames are then read in reverse order."""
    return "ED" in info and "ES" in info and int(info["ED"]) > int(info["ES"])


def _without_image(path: Path, case_id: str) -> Problem:
    return Problem(
        "missing_image",
        path,
        found="has no image of the same name",
        expected="an image and its _gt file",
        suggestion="download the patient again",
        case_id=case_id,
    )


def _without_label(path: Path, case_id: str) -> Problem:
    return Problem(
        "missing_label",
        path,
        found="has no reference (_gt) of the same name",
        expected="an image and its _gt file",
        suggestion="download the patient again",
        case_id=case_id,
    )


def _missing_views(root: Path, incomplete: Mapping[str, Sequence[str]], patients: int) -> list[Problem]:
    """Return a problem for each image that a patient lacks, or a single problem if all patients lack it."""
    problems = []
    for image, names in incomplete.items():
        if len(names) == patients and image.endswith("half_sequence"):
            continue  # the releases without half sequences are complete
        if len(names) == patients:
            problems.append(
                Problem(
                    "missing_view",
                    root,
                    found=f"contains no {image} of any patient",
                    expected=f"{image} of every patient",
                    suggestion="continue without it; volumes by Simpson's rule are computed only for patients with "
                    "ED and ES of both views",
                    severity=WARNING,
                )
            )
            continue
        problems += [
            Problem(
                "missing_view",
                root,
                found=f"lacks {image} of {name}",
                expected=f"{image} of every patient",
                suggestion="download the patient again, or continue without it",
                case_id=name,
                severity=WARNING,
            )
            for name in names
        ]
    return problems


def _splits(root: Path, patients: set[str]) -> tuple[tuple[dict[str, tuple[str, ...]], ...], list[Problem]]:
    """Return the official splits (one in ``database_split``, or ten in ``listSubGroups``), and their problems.

    Args:
        root: Folder of the data set. The lists are in this folder or next to it.
        patients: Names of the patients whose images were found.
    """
    lists: list[Path] = []
    for base in (root, root.parent):
        lists = [*sorted(base.glob("database_split/subgroup_*.txt")), *sorted(base.glob("listSubGroups/subGroup*.txt"))]
        if lists:
            break
    folds: dict[int, dict[str, tuple[str, ...]]] = {}
    problems = []
    for path in lists:
        match = re.fullmatch(r"sub[gG]roup(\d*)_(training|validation|testing)\.txt", path.name)
        if not match:
            continue
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(
                Problem(
                    "unreadable",
                    path,
                    found=f"cannot be read as text ({error})",
                    expected="UTF-8 text",
                    suggestion="write one patient per line",
                )
            )
            continue
        names = tuple(line.strip() for line in lines if line.strip())
        subsets = folds.setdefault(int(match[1] or 0), {})
        subsets[match[2]] = names
        if absent := sorted(set(names) - patients):
            problems.append(
                Problem(
                    "missing_file",
                    path,
                    found=f"lists {len(absent)} patients without images in this folder: {shorten(absent)}",
                    expected="only patients with images",
                    suggestion="download them, or correct the list",
                    severity=WARNING,
                )
            )
    return tuple(folds[k] for k in sorted(folds)), problems + _repeated_patients(folds, lists)


def _repeated_patients(folds: Mapping[int, Mapping[str, tuple[str, ...]]], lists: Sequence[Path]) -> list[Problem]:
    """Return a problem for each patient that a fold lists in more than one subset, or twice in one subset."""
    problems = []
    for number, subsets in folds.items():
        seen: dict[str, str] = {}
        for subset, names in subsets.items():
            for name in names:
                if name in seen:
                    problems.append(
                        Problem(
                            "patient_in_two_folds",
                            next(p for p in lists if p.name.endswith(f"{subset}.txt") and _number(p) == number),
                            found=f"lists {name}, who is already listed in the subset {seen[name]}",
                            expected="each patient once",
                            suggestion="keep the patient in one subset",
                            case_id=name,
                        )
                    )
                seen[name] = subset
    return problems


def _number(path: Path) -> int:
    """Return the number of the fold in the name of a list; 0 if it has none."""
    digits = re.sub(r"\D", "", path.stem)
    return int(digits or 0)
