"""CHAOS: DICE, RAVD, ASSD and MSSD per case and organ, scores from 0 to 100, and the five tasks (docs/challenges.md).

A case is one series of a patient: ``CT_1``, ``MR_1_T1DUAL``, ``MR_1_T2SPIR``.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import list_cases
from xdim_jax.data.images.dicom import files_in_order
from xdim_jax.data.images.image import strip
from xdim_jax.data.layouts.chaos import TESTING, dataset
from xdim_jax.scoring.masks import Geometry, Pair, measure
from xdim_jax.scoring.rules import Coding, Column, Job, LabelMap, Masks, Rules, Scored, Values, check_folder, find_files

ORGANS = {"liver": (63,), "right kidney": (126,), "left kidney": (189,), "spleen": (252,)}
MR = Coding("CHAOS MR", ORGANS, {63: (55, 70), 126: (110, 135), 189: (175, 200), 252: (240, 255)})
# references have 255 or 1, results 63; a result with several greys is coded as of MR
CT = Coding("CHAOS CT", {"liver": (63,)}, {63: (0, 255)}, several=Coding("CHAOS CT", {"liver": (63,)}, MR.greys))
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "1": (("CT", "MR"), ("liver",)),
    "2": (("CT",), ("liver",)),
    "3": (("MR",), ("liver",)),
    "4": (("CT", "MR"), tuple(ORGANS)),
    "5": (("MR",), tuple(ORGANS)),
}
LAYOUT = "<case id>.nii.gz (CT_1, MR_1_T1DUAL, MR_1_T2SPIR), or PNG masks as in the challenge"
# metric -> its score, from the highest value that still gives points; for DICE from the lowest
_THRESHOLDS = {"dice": 0.8, "ravd": 5.0, "assd": 15.0, "mssd": 60.0}
_COLUMNS = {
    "score": Column("mean score", "", 2),
    "dice": Column("DICE"),
    "dice_score": Column("DICE score", "", 2),
    "ravd": Column("RAVD", "%", 2, False),
    "ravd_score": Column("RAVD score", "", 2),
    "assd": Column("ASSD", "mm", 2, False),
    "assd_score": Column("ASSD score", "", 2),
    "mssd": Column("MSSD", "mm", 2, False),
    "mssd_score": Column("MSSD score", "", 2),
}
_RESULT = re.compile(r"(?:.*/)?(CT/(\d+)|MR/(\d+)/(T1DUAL|T2SPIR))(?:/.*)?")


def to_score(metric: str, value: float) -> float:
    """Value of a metric to its score; every threshold still counts. 0 for what is not a number."""
    threshold = _THRESHOLDS[metric]
    if metric == "dice":
        return 100 * value if value >= threshold else 0.0
    return 100 - 100 / threshold * value if value <= threshold else 0.0


def with_scores(values: Mapping[str, float], void: Sequence[str] = ()) -> dict[str, float]:
    """The four metrics of an organ, their scores, and the mean of those; ``void``: metrics whose score is 0."""
    scores = {f"{m}_score": 0.0 if m in void else to_score(m, values[m]) for m in _THRESHOLDS}
    return {"score": sum(scores.values()) / 4, **values, **scores}


def score(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """Organs of a case. An organ that the reference lacks is not evaluated; one that the prediction lacks has RAVD 100,
    and the image's diagonal for both distances (also where a mask has no surface, because it fills the image)."""
    found = {}
    for name in ref:
        pair = Pair(pred[name], ref[name], geometry, border=False)
        if not pair.g:
            found[name] = dict.fromkeys(_COLUMNS, math.nan)
            continue
        values = measure(pair, ("dice", "ravd", "assd_pooled", "hd"))
        found[name] = {
            "dice": values["dice"],
            "ravd": values["ravd"],
            "assd": values["assd_pooled"],
            "mssd": values["hd"],
        }
        void = [m for m, value in found[name].items() if math.isnan(value)]
        found[name] |= dict.fromkeys(void, geometry.diagonal)
        found[name] = with_scores(found[name], void if pair.p else tuple(_THRESHOLDS))
    return found


def worst(ref: Masks, geometry: Geometry) -> Values:
    """A missing case: nothing was found."""
    return score({name: np.zeros_like(mask) for name, mask in ref.items()}, ref, geometry)


def find(folder: Path) -> dict[str, LabelMap]:
    """References: the challenge's folders with DICOM and PNG, or label maps by their case ids."""
    check_folder(folder, LAYOUT)
    if not any(True for _ in folder.rglob("*.dcm")):
        return find_label_maps(folder)
    found = {}
    for case in list_cases(dataset(4, "in"), folder, need_labels=True):
        assert isinstance(case.label, tuple)
        facts = _facts(case.case_id)
        found[case.case_id] = LabelMap(case.case_id, case.label, case.patient, facts, case.images[0], case.axes)
    return found


def find_label_maps(folder: Path) -> dict[str, LabelMap]:
    """Label maps by their case ids."""
    found = find_files(folder, LAYOUT, _named)
    return {case: LabelMap(case, path, _patient(case), _facts(case)) for case, path in found.items()}


def _named(path: Path) -> str | None:
    """In- and out-phase share one reference; where both are predicted, the in-phase counts."""
    stem = (strip(path.name) or "").removesuffix("_seg").removesuffix("_in")
    return stem if re.fullmatch(rf"({TESTING})?(CT_\d+|MR_\d+_(T1DUAL|T2SPIR))", stem) else None


def _facts(case: str) -> dict[str, str]:
    parts = case.removeprefix(TESTING).split("_")
    return {"modality": parts[0], "sequence": parts[2] if parts[0] == "MR" else "CT"}


def _patient(case: str) -> str:
    return "_".join(case.split("_")[: 3 if case.startswith(TESTING) else 2])


def _find_results(folder: Path, references: Mapping[str, LabelMap]) -> dict[str, LabelMap]:
    """Predictions: label maps by their case ids, or the PNG files of a submission."""
    pngs = sorted({p.parent for p in folder.rglob("*.png") if not p.name.startswith(".")}) if folder.is_dir() else []
    found: dict[str, LabelMap] = {}
    for below in pngs:
        match = _RESULT.fullmatch(str(below.relative_to(folder)))
        if match is None:
            continue
        case = f"CT_{match[2]}" if match[2] else f"MR_{match[3]}_{match[4]}"
        if case in found:
            raise UserError(f"two folders of masks for case {case}: {found[case].path} and {below}; keep one")
        files = files_in_order(below, ".png")
        ref = references.get(case)
        found[case] = LabelMap(case, files, _patient(case), _facts(case), None, ref.axes if ref else "anatomical")
    if not found or any(strip(p.name) for p in folder.iterdir()):
        for case, label_map in find_label_maps(folder).items():
            if case in found:
                raise UserError(f"two label maps for case {case}: {found[case].path} and {label_map.path}; keep one")
            found[case] = label_map
    return found


def pair(pred: Path, references: dict[str, LabelMap], tasks: Sequence[str]) -> tuple[list[Job], list[str]]:
    """One job for every task and case that belongs to it.

    Predictions lie in ``Task1`` to ``Task5``, or one set counts for all tasks. Without ``tasks``: all that there are.
    """
    jobs: list[Job] = []
    surplus: set[str] = set()
    folders = {task: pred / f"Task{task}" for task in TASKS}
    parted = any(f.is_dir() for f in folders.values())
    everywhere = None if parted else _find_results(pred, references)
    absent = [f"Task{task}" for task in tasks if parted and not folders[task].is_dir()]
    if absent:
        there = ", ".join(f.name for f in folders.values() if f.is_dir())
        raise UserError(
            f"{pred} has {there}, but no {' and no '.join(absent)}; leave --task out to score what is there"
        )
    for task in tasks or [t for t, f in folders.items() if f.is_dir()] or list(TASKS):
        modalities, organs = TASKS[task]
        predictions = everywhere or _find_results(folders[task], references)
        surplus |= predictions.keys() - references.keys()
        for case, ref in sorted(references.items()):
            if ref.facts["modality"] in modalities:
                counted = organs if ref.facts["modality"] == "MR" else ("liver",)
                jobs.append(Job(ref, predictions.get(case), {"task": task, **ref.facts}, counted))
    if not jobs:
        raise UserError(f"{pred}: no reference belongs to task {', '.join(tasks)}; they are {', '.join(references)}")
    return jobs, sorted(surplus)


def whole(
    jobs: Sequence[Job], scored: Sequence[Scored], run: Callable[..., Any]
) -> tuple[list[Scored], dict[str, Any]]:
    """The tasks: every case is the mean of its organs, every task the mean and sd (ddof 1) over its cases."""
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(job.facts["task"] for job in jobs):
        cases: list[dict[str, float]] = []
        for job, result in zip(jobs, scored, strict=True):
            organs = [v for v in result.values.values() if not math.isnan(v["score"])]
            if job.facts["task"] == task and organs:
                cases.append({m: float(np.mean([v[m] for v in organs])) for m in _COLUMNS})
        tasks[task] = {"cases": len(cases)} | {m: _spread(c[m] for c in cases) for m in _COLUMNS}
    means = {m: [t[m]["mean"] for t in tasks.values() if t[m]["mean"] is not None] for m in _COLUMNS}
    average = {m: float(np.mean(v)) if v else None for m, v in means.items()}
    return [], {"tasks": tasks, "average": average}


def _spread(values: Iterable[float]) -> dict[str, float | None]:
    array = np.asarray(list(values))
    mean, sd = (float(array.mean()) if array.size else None), (float(array.std(ddof=1)) if array.size > 1 else None)
    return {"mean": mean, "sd": sd}


def _coding(label_map: LabelMap) -> Coding:
    return CT if label_map.facts["modality"] == "CT" else MR


def _groups(facts: Mapping[str, str]) -> tuple[str, ...]:
    return (f"task {facts['task']}",)


def rules(tasks: Sequence[str] = ()) -> Rules:
    """The rules of CHAOS for some of its tasks; none named: for all that can be scored."""
    return Rules(
        "chaos",
        "CHAOS",
        LAYOUT,
        _COLUMNS,
        ("score", "dice", "ravd", "assd", "mssd"),
        find,
        _coding,
        score,
        worst,
        facts=("task", "modality", "sequence"),
        border=False,
        groups=_groups,
        volumetric=False,
        pair=functools.partial(pair, tasks=tuple(tasks)),
        whole=whole,
    )
