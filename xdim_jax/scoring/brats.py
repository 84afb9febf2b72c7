"""BraTS: the rules of the platform of 2021 and 2022, and the lesion-wise rules since 2023 (docs/challenges.md)."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.images.image import strip_suffix
from xdim_jax.scoring import lesions
from xdim_jax.scoring.masks import METRICS, Geometry, Pair, measure, voxel_geometry
from xdim_jax.scoring.rules import Coding, Column, Job, LabelMap, Masks, Rules, ScoredCase, Values, find_files

_HINT = "check --convention: ET is 4 in brats2021, and 3 since brats2023"
# convention -> values of each region in the files
CODINGS = {
    "brats2021": Coding("brats2021", {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}, hint=_HINT),
    "brats2023": Coding("brats2023", {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}, hint=_HINT),
    "brats2024": Coding(
        "brats2024",
        {"WT": (1, 2, 3), "TC": (1, 3), "NETC": (1,), "SNFH": (2,), "ET": (3,), "RC": (4,)},
        hint=_HINT,
    ),
}
LAYOUT = "<case id>.nii.gz or <case id>/<case id>_seg.nii.gz"
_LABEL_ENDINGS = ("_seg", "-seg")
_MODALITIES = tuple(f"{s}{m}" for s in "_-" for m in ("flair", "t1", "t1ce", "t2", "t2f", "t1n", "t1c", "t2w"))
# values that the platform of 2021 and 2022 assigned to an unreadable prediction
UNREADABLE_2022 = {"dice": 0.0, "hd95": 374.0, "sensitivity": 0.0, "specificity": 0.0}
_COLUMNS_2022 = {
    "dice": Column("Dice"),
    "hd95": Column("HD95", "voxels", 2, False),
    "sensitivity": Column("sens."),
    "specificity": Column("spec.", "", 4),
}
_COLUMNS_2023 = {
    "dice": Column("lesion-wise Dice"),
    "hd95": Column("lesion-wise HD95", "mm", 2, False),
    "lesions_tp": Column("lesions found", "", 1, None),
    "lesions_fp": Column("false lesions", "", 1, False),
    "lesions_fn": Column("lesions missed", "", 1, False),
    "dice_whole": Column("Dice"),
    "hd95_whole": Column("HD95", "mm", 2, False),
    "sensitivity": Column("sens."),
    "specificity": Column("spec.", "", 4),
}
_COLUMNS_2024 = {
    "dice": _COLUMNS_2023["dice"],
    "hd95": _COLUMNS_2023["hd95"],
    "nsd_0.5": Column("lesion-wise NSD, 0.5 mm"),
    "nsd_1.0": Column("lesion-wise NSD, 1 mm"),
    **{k: c for k, c in _COLUMNS_2023.items() if k.startswith("lesions")},
}
# thresholds of the ET volume, in voxels, that nnU-Net tried for BraTS 2020
MIN_ET_GRID = range(0, 751, 10)


def find(folder: Path) -> dict[str, LabelMap]:
    """Return the label maps in a folder by case id.

    The files are ``<id>.nii.gz``, ``<id>_seg.nii.gz`` or ``<id>-seg.nii.gz`` in the folder itself, and
    ``<id>_seg.nii.gz`` or ``<id>-seg.nii.gz`` in subfolders. Image files are ignored.
    """

    def name_of(path: Path) -> str | None:
        stem = strip_suffix(path.name) or ""
        if stem.endswith("_Segm") and path.parent != folder:
            return path.parent.name  # the reference of BraTS20_Training_355 is not named after the case
        case = stem
        for ending in _LABEL_ENDINGS:
            case = case.removesuffix(ending)
        in_case_folder = path.parent != folder
        return None if (in_case_folder and case == stem) or stem.endswith(_MODALITIES) else case

    found = find_files(folder, LAYOUT, name_of)
    return {case: LabelMap(case, path, _patient(case)) for case, path in found.items()}


def _patient(case: str) -> str:
    """Return the id of the patient. Since 2023 a case id ends with the number of the examination."""
    return case.rpartition("-")[0] if case.startswith("BraTS-") and case.count("-") == 3 else case


# -- 2021 and 2022 ------------------------------------------------------------------------------------------------


def score_region_2022(pred: np.ndarray, ref: np.ndarray) -> dict[str, float]:
    """Return Dice, HD95 (in voxels), sensitivity and specificity of one region, by the rules of 2021 and 2022.

    If both masks are empty, the values are 1, 0, 1, 1. If one mask is empty, Dice and sensitivity are 0, and HD95 is
    the diagonal of the image in voxels (docs/evaluation.md, section "Empty and missing masks").
    """
    geometry = voxel_geometry(pred.shape)
    pair = Pair(pred, ref, geometry)
    specificity = METRICS["specificity"].measure(pair)
    specificity = 1.0 if math.isnan(specificity) else specificity
    if pair.p and pair.g:
        values = measure(pair, ("dice", "hd95_pooled", "sensitivity"))
        hd95 = values["hd95_pooled"]
        return {"dice": values["dice"], "hd95": hd95, "sensitivity": values["sensitivity"], "specificity": specificity}
    if not pair.p and not pair.g:
        return {"dice": 1.0, "hd95": 0.0, "sensitivity": 1.0, "specificity": 1.0}
    return {"dice": 0.0, "hd95": geometry.diagonal, "sensitivity": 0.0, "specificity": specificity}


def score_2022(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """Score all regions of a case. Distances are in voxels, as on the platform, so ``geometry`` is not used."""
    return {name: score_region_2022(pred[name], ref[name]) for name in ref}


def score_missing_2022(ref: Masks, geometry: Geometry) -> Values:
    """Return the values of a case without a usable prediction."""
    return {name: dict(UNREADABLE_2022) for name in ref}


def platform_statistics(values: Sequence[float]) -> dict[str, float]:
    """Return the statistics that the platform of 2021 and 2022 wrote below a column of values.

    The platform appended each statistic to the column of values, and computed the next one over this longer column.
    Therefore sd, median and quartiles are slightly wrong.
    """
    column = [float(v) for v in values]
    rows: dict[str, float] = {}
    for name, statistic in (
        ("mean", np.mean),
        ("sd", functools.partial(np.std, ddof=1)),
        ("median", np.median),
        ("q25", functools.partial(np.percentile, q=25)),
        ("q75", functools.partial(np.percentile, q=75)),
    ):
        rows[name] = float(statistic(column))
        column.append(rows[name])
    return rows


def platform_table(scored: Sequence[ScoredCase]) -> dict[str, Any]:
    """Return `platform_statistics` of every metric of every region."""
    return {
        region: {m: platform_statistics([s.values[region][m] for s in scored]) for m in UNREADABLE_2022}
        for region in scored[0].values
    }


def _measure_et(coding: Coding, job: Job) -> tuple[int, float, float]:
    """Return the number of predicted ET voxels, the Dice of ET, and the Dice if all of these voxels are removed."""
    assert job.pred is not None
    pred, ref = (coding.masks(m.load()[0], m.path)["ET"] for m in (job.pred, job.ref))
    return int(np.count_nonzero(pred)), score_region_2022(pred, ref)["dice"], float(not ref.any())


def tune_min_et(coding: Coding, jobs: Sequence[Job], run: Callable[..., Any]) -> dict[str, Any]:
    """Find the threshold with the best mean Dice of ET, if all ET is removed from predictions with fewer ET voxels.

    Args:
        coding: Values of the regions in the files.
        jobs: Cases. Those without a prediction are ignored.
        run: Parallel ``map``.

    Returns:
        ``dice``: threshold in voxels, as a string -> mean Dice of ET over cases, if ET is removed from predictions with
        fewer voxels of ET. ``best``: the threshold (an integer) with the highest mean Dice; the smallest one if there
        are several.

    Raises:
        UserError: There is no usable prediction.
    """
    found = list(run(functools.partial(_measure_et, coding), [job for job in jobs if job.pred is not None]))
    if not found:
        raise UserError("--tune_min_et: none of the predictions can be used; omit the option to see the reasons")
    dice = {t: float(np.mean([removed if n < t else kept for n, kept, removed in found])) for t in MIN_ET_GRID}
    best = max(dice, key=lambda t: (dice[t], -t))
    return {"best": best, "dice": {str(t): v for t, v in dice.items()}}


def _aggregate_2022(
    jobs: Sequence[Job], scored: Sequence[ScoredCase], run: Callable[..., Any], *, also: Sequence[str], coding: Coding
) -> tuple[list[ScoredCase], dict[str, Any]]:
    """Return no further rows, and the entries of the summary for ``--platform_2022`` and ``--tune_min_et``."""
    extra: dict[str, Any] = {}
    if "platform_2022" in also:
        extra["platform_2022"] = platform_table(scored)
    if "tune_min_et" in also:
        usable = [job for job, result in zip(jobs, scored, strict=True) if not result.problem]
        extra["min_et"] = tune_min_et(coding, usable, run)
    return [], extra


# -- since 2023 ---------------------------------------------------------------------------------------------------


def _whole_image(pair: Pair, penalty: float) -> dict[str, float]:
    """Return the "legacy" metrics of 2023, which are computed on the whole image instead of lesion by lesion.

    If both masks are empty, Dice and sensitivity are 1, and HD95 is 0. If one mask is empty, Dice and sensitivity are
    0, and HD95 is the penalty.
    """
    both_empty = not pair.p and not pair.g
    specificity = METRICS["specificity"].measure(pair)
    return {
        "dice_whole": 1.0 if both_empty else METRICS["dice"].measure(pair),
        "hd95_whole": 0.0 if both_empty else METRICS["hd95_surfel"].measure(pair) if pair.p and pair.g else penalty,
        "sensitivity": 1.0 if both_empty else pair.tp / pair.g if pair.g else 0.0,
        "specificity": 0.0 if math.isnan(specificity) else specificity,
    }


def _lesion_values(found: lesions.LesionScores) -> dict[str, float]:
    """Return column -> value, from the lesion-wise scores and the numbers of lesions of one region."""
    renamed = {("hd95" if k == "hd95_surfel" else k): v for k, v in found.scores.items()}
    return renamed | {"lesions_tp": found.tp, "lesions_fp": found.fp, "lesions_fn": found.fn}


def score_2023(pred: Masks, ref: Masks, geometry: Geometry, cohort: str = "GLI") -> Values:
    """Score all regions of a case, lesion by lesion and on the whole image."""
    found = {}
    for name in ref:
        by_lesion = lesions.lesionwise_2023(pred[name], ref[name], geometry, lesions.COHORTS[cohort])
        pair = Pair(pred[name], ref[name], geometry)
        found[name] = _lesion_values(by_lesion) | _whole_image(pair, lesions.PENALTY_2023)
    return found


def score_missing_2023(ref: Masks, geometry: Geometry, cohort: str = "GLI") -> Values:
    """Return the values of a case without a usable prediction: all lesions are missed.

    Dice is 0, and HD95 is the penalty, even if the reference has no lesion.
    """
    empty = {name: np.zeros_like(mask) for name, mask in ref.items()}
    worst = {"dice": 0.0, "dice_whole": 0.0, "hd95": lesions.PENALTY_2023, "hd95_whole": lesions.PENALTY_2023}
    worst |= {"sensitivity": 0.0, "specificity": 0.0}
    return {name: values | worst for name, values in score_2023(empty, ref, geometry, cohort).items()}


def score_2024(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """Score all regions of a case lesion by lesion, by the rules for glioma after treatment."""
    return {name: _lesion_values(found) for name, found in lesions.lesionwise_2024(pred, ref, geometry).items()}


def score_missing_2024(ref: Masks, geometry: Geometry) -> Values:
    """Return the values of a case without a usable prediction: all lesions are missed.

    Overlaps are 0, and HD95 is the penalty, even if the reference has no lesion.
    """
    empty = {name: np.zeros_like(mask) for name, mask in ref.items()}
    worst = {"dice": 0.0, "hd95": lesions.PENALTY_2024, "nsd_0.5": 0.0, "nsd_1.0": 0.0}
    return {name: values | worst for name, values in score_2024(empty, ref, geometry).items()}


# -- rules --------------------------------------------------------------------------------------------------------


def rules(year: str, convention: str = "", cohort: str = "GLI", also: Sequence[str] = ()) -> Rules:
    """Return the rules of a year.

    Args:
        year: ``brats2022``, ``brats2023`` or ``brats2024``.
        convention: Convention of the label values in the files; empty for the convention of the year.
        cohort: Part of the challenge of 2023, a key of `xdim_jax.scoring.lesions.COHORTS`.
        also: Additional entries of the summary for 2022: ``platform_2022``, ``tune_min_et``.
    """
    score, score_missing, columns, default = {
        "brats2022": (score_2022, score_missing_2022, _COLUMNS_2022, "brats2021"),
        "brats2023": (
            functools.partial(score_2023, cohort=cohort),
            functools.partial(score_missing_2023, cohort=cohort),
            _COLUMNS_2023,
            "brats2023",
        ),
        "brats2024": (score_2024, score_missing_2024, _COLUMNS_2024, "brats2024"),
    }[year]
    coding = CODINGS[convention or default]
    return Rules(
        name=year,
        title=f"BraTS {year.removeprefix('brats')}" + (f" {cohort}" if year == "brats2023" else ""),
        layout=LAYOUT,
        columns=columns,
        main_metrics=tuple(columns)[:4],
        find=find,
        coding=functools.partial(_coding, coding),
        score=score,
        score_missing=score_missing,
        aggregate=functools.partial(_aggregate_2022, also=tuple(also), coding=coding) if also else None,
    )


def _coding(coding: Coding, label_map: LabelMap) -> Coding:
    """Return the same coding for all label maps. Unlike a lambda, this function can be pickled."""
    return coding


def conventions(year: str) -> Mapping[str, Coding]:
    """Return the conventions that have all structures of a year's rules."""
    if year == "brats2024":
        return {"brats2024": CODINGS["brats2024"]}
    return {name: coding for name, coding in CODINGS.items() if name != "brats2024"}
