"""CAMUS as it lies on disk (spec: challenges, section 1.4): 2D echocardiography of the left heart.

    CAMUS_public/database_nifti/patient0001/patient0001_{2CH,4CH}_{ED,ES,half_sequence}[_gt].nii.gz   NIfTI release
                                           /Info_{2CH,4CH}.cfg
    CAMUS_public/database_split/subgroup_{training,validation,testing}.txt
    {training,testing}/patient0001/patient0001_2CH_ED[_gt].mhd + .raw                                 older release
    listSubGroups/subGroup1_{training,validation,testing}.txt

One case is one frame (ED or ES of one view) or one half sequence, whose frames lie along D. Images stay as stored:
rows go away from the probe. Facts of the examination are in ``Case.info``: view, instant, group, and what the cfg file
holds (``ImageQuality``, ``EF``, ``ED``, ``ES``, ...).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import ERROR, WARNING, Problem
from xdim_jax.data.case import Case, Dataset, Scan
from xdim_jax.data.images.grid import Axes
from xdim_jax.data.images.image import where
from xdim_jax.data.labels import Labels
from xdim_jax.data.regions import Regions

LABELS = Labels("CAMUS", ("background", "LV cavity", "myocardium", "left atrium"), (0, 1, 2, 3))
REGIONS = Regions({"LV_endo": (1,), "LV_epi": (1, 2), "LA": (3,)})
VIEWS, INSTANTS, QUALITIES = ("2CH", "4CH"), ("ED", "ES"), ("Good", "Medium", "Poor")
LAYOUT = "<root>/database_nifti/patient0001/patient0001_{2CH,4CH}_{ED,ES}[_gt].nii.gz, or .mhd below training/"
_FILE = re.compile(r"(patient\d+)_(\dCH)_(ED|ES|half_sequence|sequence)(_gt)?\.(nii\.gz|nii|mhd|mha)")
_FRAMES = "half_sequence"

_Parts = dict[tuple[str, str], dict[str, Path]]  # (view, instant) -> image and gt


def dataset(
    views: Sequence[str] = VIEWS, instants: Sequence[str] = INSTANTS, quality: Sequence[str] = QUALITIES
) -> Dataset:
    """CAMUS, or a part of it.

    Args:
        views: of 2CH and 4CH.
        instants: of ED, ES and half_sequence.
        quality: of Good, Medium and Poor; with fewer than all, images whose quality is not known are left out.

    Raises:
        UserError: an unknown view, instant or quality.
    """
    for name, chosen, known in (
        ("views", views, VIEWS),
        ("instants", instants, (*INSTANTS, _FRAMES)),
        ("quality", quality, QUALITIES),
    ):
        if not chosen or set(chosen) - set(known):
            raise UserError(f"config.data.{name}={tuple(chosen)}: expected one or more of {', '.join(known)}")
    return Dataset(
        "CAMUS",
        LAYOUT,
        ("ultrasound",),
        LABELS,
        REGIONS,
        lambda root, need_labels: scan(root, views, instants, quality, need_labels),
        axes="stored",
        inspect=inspect,
    )


def inspect(case: Case, image: np.ndarray) -> list[Problem]:
    """Grey values of 0 to 255."""
    low, high = float(image.min()), float(image.max())
    if low >= 0 and 2 <= high <= 255:
        return []
    found, step = f"has values from {low:g} to {high:g}", "restore the raw grey values"
    return [Problem("intensity_range", where(case.images[0]), found, "0 to 255", step, case.case_id, WARNING)]


def read_info(path: Path) -> dict[str, str]:
    """``Key: value`` lines of a cfg file; blank lines and lines without a colon are passed over."""
    info = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip():
            info[key.strip()] = value.strip()
    for old, new in (("LVef", "EF"), ("LVedv", "EDV"), ("LVesv", "ESV")):  # the older release's words
        if old in info:
            info.setdefault(new, info[old])
    return info


def scan(root: Path, views: Sequence[str], instants: Sequence[str], quality: Sequence[str], need_labels: bool) -> Scan:
    """The images below ``root``; a missing view or instant is a warning, because every image is a case of its own."""
    patients, problems = _find(root)
    cases = []
    incomplete: dict[str, list[str]] = {}
    without_facts: list[str] = []
    for (group, patient), (folder, parts) in sorted(patients.items()):
        name = f"{group}_{patient}" if group else patient
        alone = sum(other == folder for other, _ in patients.values()) == 1  # else a cfg file could be anyone's
        for view in views:
            info, found = _facts(folder, view, name) if alone else ({}, [])
            problems += found
            if not info and any(v == view for v, _ in parts):
                without_facts.append(f"{name} {view}")
            for instant in instants:
                paths = parts.get((view, instant), {})
                if instant == _FRAMES and not paths:
                    paths = parts.get((view, "sequence"), {})  # the older release's name
                case_id = f"{name}_{view}_{instant}"
                if "image" not in paths:
                    incomplete.setdefault(f"{view} {instant}", []).append(name)
                    if "gt" in paths:
                        problems.append(_without(paths["gt"], "image", case_id))
                    continue
                if "gt" not in paths and need_labels and group != "testing":
                    problems.append(_without(paths["image"], "gt", case_id))
                    continue
                if set(quality) < set(QUALITIES) and info.get("ImageQuality") not in quality:
                    continue
                axes: Axes = "reversed" if instant == _FRAMES and _is_reversed(info) else "stored"
                facts = {"view": view, "instant": instant, **({"group": group} if group else {}), **info}
                if "gt" in paths or not need_labels:
                    label = paths.get("gt")
                    cases.append(
                        Case(case_id, name, (paths["image"],), ("ultrasound",), label, LABELS, axes, info=facts)
                    )
    problems += _missing_views(root, incomplete, len(patients))
    if without_facts:
        found = f"has no Info_<view>.cfg for {len(without_facts)} views: {shorten(without_facts)}"
        step = "go on without it: quality and the direction of half sequences are not known"
        problems.append(Problem("missing_info", root, found, "one beside each view", step, "", WARNING))
    splits, found = _splits(root, {f"{g}_{p}" if g else p for g, p in patients})
    return Scan(cases, problems + found, splits)


def _find(root: Path) -> tuple[dict[tuple[str, str], tuple[Path, _Parts]], list[Problem]]:
    """Folder and files of every patient; test patients of the older release are numbered anew, so a group is kept."""
    patients: dict[tuple[str, str], tuple[Path, _Parts]] = {}
    problems = []
    for path in sorted([*root.glob("*"), *root.glob("*/*"), *root.glob("*/*/*"), *root.glob("*/*/*/*")]):
        if path.name.startswith(".") or "__MACOSX" in path.parts or not (match := _FILE.fullmatch(path.name)):
            continue
        patient, view, instant, gt, _ = match.groups()
        group = "testing" if "testing" in path.relative_to(root).parts else ""
        folder, parts = patients.get((group, patient), (path.parent, {}))
        home = path.parent if path.parent.name == patient else folder  # where the patient's cfg files lie
        patients[group, patient] = home, parts
        files, role = parts.setdefault((view, instant), {}), "gt" if gt else "image"
        if role in files:
            found = f"and {files[role]} are both {path.name.split('.')[0]}"
            problems.append(Problem("duplicate_case", path, found, "one file", "keep one", patient))
        elif path.parent.name.startswith("patient") and path.parent.name != patient:
            found = f"lies in the folder of {path.parent.name}"
            problems.append(Problem("extra_file", path, found, f"a file of {path.parent.name}", "move it", patient))
        else:
            files[role] = path
    return patients, problems


def _facts(folder: Path, view: str, patient: str) -> tuple[dict[str, str], list[Problem]]:
    path = folder / f"Info_{view}.cfg"
    if not path.is_file():
        return {}, []
    info, problems = read_info(path), []
    for key in ("ED", "ES", "NbFrame"):
        if key in info and info[key].removesuffix(".0").isdigit():
            info[key] = info[key].removesuffix(".0")
        elif key in info:
            found, step = f"has {key}: {info[key]!r}", "correct the line"
            problems.append(Problem("missing_info", path, found, "a number of a frame, from 1", step, patient, WARNING))
            del info[key]
    frames = info.get("NbFrame")
    for key in ("ED", "ES"):
        if key in info and (int(info[key]) < 1 or (frames is not None and int(info[key]) > int(frames))):
            found, step = f"has {key}: {info[key]} of {frames or 'unknown'} frames", "correct the line"
            problems.append(Problem("missing_info", path, found, "a frame, counted from 1", step, patient, WARNING))
    if (q := info.get("ImageQuality")) is not None and q not in QUALITIES:
        found = f"has ImageQuality: {q!r}"
        problems.append(
            Problem("missing_info", path, found, ", ".join(QUALITIES), "correct the line", patient, WARNING)
        )
    return info, problems


def _is_reversed(info: Mapping[str, str]) -> bool:
    """In some patients ED comes after ES in the half sequence; frames are then read in reverse order."""
    return "ED" in info and "ES" in info and int(info["ED"]) > int(info["ES"])


def _without(path: Path, role: str, case_id: str) -> Problem:
    kind = "missing_image" if role == "image" else "missing_label"
    found = "has no image beside it" if role == "image" else "has no reference (_gt) beside it"
    return Problem(kind, path, found, "image and _gt of one name", "fetch the patient again", case_id, ERROR)


def _missing_views(root: Path, incomplete: Mapping[str, Sequence[str]], patients: int) -> list[Problem]:
    """One finding for each image of a patient that others have; one alone for what nobody has."""
    problems = []
    for what, names in incomplete.items():
        if len(names) == patients:
            found, step = (
                f"holds no {what} of any patient",
                "go on without it: volumes by Simpson's rule need both views",
            )
            problems.append(Problem("missing_view", root, found, f"{what} of every patient", step, "", WARNING))
            continue
        for name in names:
            found, step = f"lacks {what} of {name}", "fetch the patient again, or go on without it"
            problems.append(Problem("missing_view", root, found, "two views at two instants", step, name, WARNING))
    return problems


def _splits(root: Path, patients: set[str]) -> tuple[tuple[dict[str, tuple[str, ...]], ...], list[Problem]]:
    """Official splits: one in ``database_split``, ten in ``listSubGroups``."""
    folds: dict[int, dict[str, tuple[str, ...]]] = {}
    problems = []
    for base in (root, root.parent):
        lists = [*sorted(base.glob("database_split/subgroup_*.txt")), *sorted(base.glob("listSubGroups/subGroup*.txt"))]
        if lists:
            break
    else:
        lists = []
    for path in lists:
        match = re.fullmatch(r"sub[gG]roup(\d*)_(training|validation|testing)\.txt", path.name)
        if not match:
            continue
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            step = "write one patient a line"
            problems.append(Problem("unreadable", path, f"cannot be read as text ({error})", "UTF-8 text", step))
            continue
        names = tuple(line.strip() for line in lines if line.strip())
        sides = folds.setdefault(int(match[1] or 0), {})
        sides[match[2]] = names
        if absent := sorted(set(names) - patients):
            found = f"names {len(absent)} patients that are not there: {shorten(absent)}"
            step = "fetch them, or correct the list"
            problems.append(Problem("missing_file", path, found, "patients of this copy", step, "", WARNING))
    for number, sides in folds.items():
        seen: dict[str, str] = {}
        for side, names in sides.items():
            for name in names:
                if name in seen:
                    where = next(p for p in lists if p.name.endswith(f"{side}.txt") and _number(p) == number)
                    found = f"lists {name}, which {seen[name]} has too"
                    step = "keep the patient on one side"
                    problems.append(Problem("patient_in_two_folds", where, found, "each patient once", step, name))
                seen[name] = side
    return tuple(folds[k] for k in sorted(folds)), problems


def _number(path: Path) -> int:
    digits = re.sub(r"\D", "", path.stem)
    return int(digits or 0)
