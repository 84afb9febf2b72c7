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

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.data.case import scan_cases, usable_cases
from xdim_jax.data.images.dicom import files_in_order
from xdim_jax.data.images.image import strip_suffix
from xdim_jax.data.images.names import files_below, strip
from xdim_jax.data.layouts.chaos import TEST_PREFIX, dataset
from xdim_jax.scoring.masks import Geometry, Pair, measure
from xdim_jax.scoring.rules import (
    Coding,
    Column,
    Job,
    LabelMap,
    Masks,
    Rules,
    ScoredCase,
    Values,
    check_folder,
    find_files,
)

ORGANS = {"liver": (63,), "right kidney": (126,), "left kidney": (189,), "spleen": (252,)}
MR = Coding("CHAOS MR", ORGANS, {63: (55, 70), 126: (110, 135), 189: (175, 200), 252: (240, 255)})
# foreground on CT is 255 or 1 in references, and 63 in predictions; a file with several nonzero values is read with the
# grey ranges of MR
CT = Coding(
    "CHAOS CT", {"liver": (63,)}, {63: (0, 255)}, if_several=Coding("CHAOS CT", {"liver": (63,)}, MR.grey_ranges)
)
# task -> modalities and organs
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "1": (("CT", "MR"), ("liver",)),
    "2": (("CT",), ("liver",)),
    "3": (("MR",), ("liver",)),
    "4": (("CT", "MR"), tuple(ORGANS)),
    "5": (("MR",), tuple(ORGANS)),
}
LAYOUT = (
    "<case id>.nii.gz, with case ids such as CT_1, MR_1_T1DUAL and MR_1_T2SPIR; or one PNG mask per slice, in the "
    "order of the slices. The PNG masks of a case may be in a folder as in the challenge (CT/1/, MR/1/T2SPIR/), in a "
    "folder named after the case id or, if there is only one case, in the folder itself"
)
# metric -> threshold: a lower DICE, or a higher RAVD (%), ASSD (mm) or MSSD (mm), has the score 0
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
_CASE = re.compile(rf"({TEST_PREFIX})?(CT_\d+|MR_\d+_(T1DUAL|T2SPIR))")
_RESULT_FOLDER = re.compile(r"(?:.*/)?(CT/(\d+)|MR/(\d+)/(T1DUAL|T2SPIR))(?:/.*)?")


# -- metrics and scores -------------------------------------------------------------------------------------------


def to_score(metric: str, value: float) -> float:
    """Return the score of a metric value, from 0 to 100.

    NaN and values beyond the threshold of the metric have the score 0.
    """
    threshold = _THRESHOLDS[metric]
    if metric == "dice":
        return 100 * value if value >= threshold else 0.0
    return 100 - 100 / threshold * value if value <= threshold else 0.0


def with_scores(values: Mapping[str, float], score_0: Sequence[str] = ()) -> dict[str, float]:
    """Add the score of each metric, and their mean, to the four metrics of an organ.

    Args:
        values: Metric -> value.
        score_0: Metrics whose score is 0 regardless of their value.
    """
    scores = {f"{m}_score": 0.0 if m in score_0 else to_score(m, values[m]) for m in _THRESHOLDS}
    return {"score": sum(scores.values()) / 4, **values, **scores}


def score(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """Score all organs of a case.

    If the reference of an organ is empty, all values are NaN, and are excluded from means. If only the prediction is
    empty, all scores are 0, RAVD is 100 %, and ASSD and MSSD are the diagonal of the image in mm. They are also the
    diagonal, with the score 0, if a mask has no surface because it fills the image.
    """
    found = {}
    for name in ref:
        pair = Pair(pred[name], ref[name], geometry, border=False)
        if not pair.g:
            found[name] = dict.fromkeys(_COLUMNS, math.nan)
            continue
        measured = measure(pair, ("dice", "ravd", "assd_pooled", "hd"))
        values = {
            "dice": measured["dice"],
            "ravd": measured["ravd"],
            "assd": measured["assd_pooled"],
            "mssd": measured["hd"],
        }
        undefined = [m for m, value in values.items() if math.isnan(value)]
        values |= dict.fromkeys(undefined, geometry.diagonal)
        found[name] = with_scores(values, undefined if pair.p else tuple(_THRESHOLDS))
    return found


def score_missing(ref: Masks, geometry: Geometry) -> Values:
    """Return the values of a case without a usable prediction: those of an empty prediction."""
    return score({name: np.zeros_like(mask) for name, mask in ref.items()}, ref, geometry)


# -- files --------------------------------------------------------------------------------------------------------


def find(folder: Path) -> dict[str, LabelMap]:
    """Return the references in a folder by case id: PNG masks with DICOM images as in the challenge, or label maps."""
    check_folder(folder, LAYOUT)
    if not any(strip(path.name, (".dcm",)) for path in files_below(folder)):
        return find_label_maps(folder)
    found = {}
    references = dataset(4, "in")  # task 4 has CT and MR
    for case in usable_cases(scan_cases(references, folder, need_labels=True), folder):
        assert isinstance(case.label, tuple)
        attributes = _attributes(case.case_id)
        found[case.case_id] = LabelMap(case.case_id, case.label, case.patient, attributes, case.images[0], case.axes)
    return found


def find_label_maps(folder: Path) -> dict[str, LabelMap]:
    """Return the label maps in a folder by case id. Raises UserError if there are none, or two for one case."""
    found = find_files(folder, LAYOUT, _case_of_file)
    return {case: LabelMap(case, path, _patient(case), _attributes(case)) for case, path in found.items()}


def _case_of_file(path: Path) -> str | None:
    """Return the case id of a label map; None for other files.

    The two phases of T1-DUAL have the same reference. The prediction for the in-phase image is scored, and that for the
    out-of-phase image is ignored.
    """
    stem = (strip_suffix(path.name) or "").removesuffix("_seg").removesuffix("_in")
    return stem if _CASE.fullmatch(stem) else None


def _attributes(case: str) -> dict[str, str]:
    """Return modality and sequence of a case."""
    parts = case.removeprefix(TEST_PREFIX).split("_")
    return {"modality": parts[0], "sequence": parts[2] if parts[0] == "MR" else "CT"}


def _patient(case: str) -> str:
    """Return the patient of a case: the case id without the sequence."""
    return "_".join(case.split("_")[: 3 if case.startswith(TEST_PREFIX) else 2])


def _find_predictions(folder: Path, references: Mapping[str, LabelMap]) -> dict[str, LabelMap]:
    """Return the predictions in a folder by case id: PNG files as in a submission, and label maps."""
    pngs = sorted({path.parent for path in files_below(folder) if strip(path.name, (".png",)) is not None})
    found: dict[str, LabelMap] = {}
    unknown: list[Path] = []
    has_maps = folder.is_dir() and any(strip_suffix(p.name) for p in folder.iterdir())
    for subfolder in pngs:
        match = _RESULT_FOLDER.fullmatch(str(subfolder.relative_to(folder)))
        if match is not None:
            case = f"CT_{match[2]}" if match[2] else f"MR_{match[3]}_{match[4]}"
        elif _CASE.fullmatch(subfolder.name):
            case = subfolder.name
        elif subfolder == folder and len(references) == 1 and not has_maps:
            case = next(iter(references))
        else:
            unknown.append(subfolder)
            continue
        if case in found:
            raise UserError(
                f"there are two folders of masks for case {case}: {found[case].path} and {subfolder}; keep one"
            )
        files = files_in_order(subfolder, ".png")
        ref = references.get(case)
        axes = ref.axes if ref else "anatomical"
        found[case] = LabelMap(case, files, _patient(case), _attributes(case), None, axes)
    if unknown:
        shown = f"{shorten([str(p) for p in unknown])}: PNG files whose folder is not named after a case"
        if not found and not has_maps:
            raise UserError(f"{shown}; expected {LAYOUT}; the references are {shorten(sorted(references))}")
        log.warn(f"{shown} are not read")
    if not found or has_maps:
        for case, label_map in find_label_maps(folder).items():
            if case in found:
                raise UserError(
                    f"there are two label maps for case {case}: {found[case].path} and {label_map.path}; keep one"
                )
            found[case] = label_map
    return found


# -- tasks --------------------------------------------------------------------------------------------------------


def pair_predictions(pred: Path, references: dict[str, LabelMap], tasks: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Return a job for each task and each of its cases, and the ids of predictions without a reference.

    Args:
        pred: Folder of predictions. It has a subfolder ``Task1`` to ``Task5`` for each task, or one set of predictions
            for all tasks.
        references: References by case id.
        tasks: Tasks to score. Empty for all tasks with a subfolder or, if there are no subfolders, all tasks whose
            modalities the references have.

    Raises:
        UserError: The predictions of a task are missing, or no reference belongs to the tasks.
    """
    jobs: list[Job] = []
    unmatched: set[str] = set()
    folders = {task: pred / f"Task{task}" for task in TASKS}
    existing = [task for task, folder in folders.items() if folder.is_dir()]
    if existing and (absent := [folders[task].name for task in tasks if task not in existing]):
        names = ", ".join(folders[task].name for task in existing)
        raise UserError(
            f"{pred} has the folders {names}, but not {', '.join(absent)}; omit --task to score all existing folders"
        )
    known = {ref.attributes["modality"] for ref in references.values()}
    chosen = tasks or existing or [task for task in TASKS if known.issuperset(TASKS[task][0])]
    for task in chosen:
        if known and (absent := set(TASKS[task][0]) - known):
            log.warn(f"task {task} is scored without {' and '.join(sorted(absent))}, of which there are no references")
    wanted = {modality for task in chosen for modality in TASKS[task][0]}
    of_tasks = {case: ref for case, ref in references.items() if ref.attributes["modality"] in wanted}
    shared = None if existing else _find_predictions(pred, of_tasks)
    for task in chosen:
        modalities, organs = TASKS[task]
        predictions = shared or _find_predictions(folders[task], of_tasks)
        unmatched |= predictions.keys() - references.keys()
        for case, ref in sorted(references.items()):
            if ref.attributes["modality"] in modalities:
                scored_organs = organs if ref.attributes["modality"] == "MR" else ("liver",)
                jobs.append(Job(ref, predictions.get(case), {"task": task, **ref.attributes}, scored_organs))
    if not jobs:
        raise UserError(
            f"{pred}: none of the references {', '.join(references)} belongs to task {', '.join(chosen)}; give another "
            "--task"
        )
    return jobs, sorted(unmatched)


def aggregate(
    jobs: Sequence[Job], scored: Sequence[ScoredCase], run: Callable[..., Any]
) -> tuple[list[ScoredCase], dict[str, Any]]:
    """Compute the mean and sd (ddof 1) of every metric over the cases of each task, and the average of these means.

    The value of a case is the mean over its organs that the reference contains. A case without any is excluded.

    Returns:
        No further rows, and the entries ``tasks`` and ``average`` of the summary.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(job.attributes["task"] for job in jobs):
        cases: list[dict[str, float]] = []
        for job, result in zip(jobs, scored, strict=True):
            organs = [v for v in result.values.values() if not math.isnan(v["score"])]
            if job.attributes["task"] == task and organs:
                cases.append({m: float(np.mean([v[m] for v in organs])) for m in _COLUMNS})
        found = {job.ref.attributes.get("modality") for job in jobs if job.attributes["task"] == task}
        absent = sorted(set(TASKS[task][0]) - found)
        tasks[task] = {"cases": len(cases), "absent": absent} | {m: _mean_and_sd(c[m] for c in cases) for m in _COLUMNS}
    means = {m: [t[m]["mean"] for t in tasks.values() if t[m]["mean"] is not None] for m in _COLUMNS}
    average = {m: float(np.mean(v)) if v else None for m, v in means.items()}
    return [], {"tasks": tasks, "average": average}


def _mean_and_sd(values: Iterable[float]) -> dict[str, float | None]:
    """Return mean and sd (ddof 1); None if there are too few values."""
    array = np.asarray(list(values))
    mean, sd = (float(array.mean()) if array.size else None), (float(array.std(ddof=1)) if array.size > 1 else None)
    return {"mean": mean, "sd": sd}


# -- rules --------------------------------------------------------------------------------------------------------


def coding_of(label_map: LabelMap) -> Coding:
    """Return the coding of the modality of a label map."""
    return CT if label_map.attributes["modality"] == "CT" else MR


def _groups(attributes: Mapping[str, str]) -> tuple[str, ...]:
    """Return the group of a case: its task."""
    return (f"task {attributes['task']}",)


def rules(tasks: Sequence[str] = ()) -> Rules:
    """Return the rules of CHAOS for some of its tasks; empty for all tasks that can be scored."""
    return Rules(
        name="chaos",
        title="CHAOS",
        layout=LAYOUT,
        columns=_COLUMNS,
        main_metrics=("score", "dice", "ravd", "assd", "mssd"),
        find=find,
        coding=coding_of,
        score=score,
        score_missing=score_missing,
        attributes=("task", "modality", "sequence"),
        border=False,
        groups=_groups,
        volumetric=False,
        pair=functools.partial(pair_predictions, tasks=tuple(tasks)),
        aggregate=aggregate,
    )
