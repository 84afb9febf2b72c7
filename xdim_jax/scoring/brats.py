"""BraTS: the rules of the platform of 2021 and 2022, and the lesion-wise rules since 2023 (docs/challenges.md)."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.images.image import strip
from xdim_jax.scoring import lesions
from xdim_jax.scoring.masks import METRICS, Geometry, Pair, measure, voxels
from xdim_jax.scoring.rules import Coding, Column, Job, LabelMap, Masks, Rules, Scored, Values, find_files

_STEP = "is --convention right? ET is 4 in brats2021, 3 since brats2023"
# label values on disk -> region, by convention
CODINGS = {
    "brats2021": Coding("brats2021", {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}, step=_STEP),
    "brats2023": Coding("brats2023", {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}, step=_STEP),
    "brats2024": Coding(
        "brats2024",
        {"WT": (1, 2, 3), "TC": (1, 3), "NETC": (1,), "SNFH": (2,), "ET": (3,), "RC": (4,)},
        step=_STEP,
    ),
}
LAYOUT = "<case id>.nii.gz or <case id>/<case id>_seg.nii.gz"
_LABEL_ENDINGS = ("_seg", "-seg")
_MODALITIES = tuple(f"{s}{m}" for s in "_-" for m in ("flair", "t1", "t1ce", "t2", "t2f", "t1n", "t1c", "t2w"))
# what the 2021/2022 platform gives a prediction that it cannot read
UNREADABLE_2022 = {"dice": 0.0, "hd95": 374.0, "sensitivity": 0.0, "specificity": 0.0}
_COLUMNS = {
    "dice": Column("Dice"),
    "hd95": Column("HD95", "voxels", 2, False),
    "sensitivity": Column("sens."),
    "specificity": Column("spec.", "", 4),
}
_LESIONS = {
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
_LESIONS_2024 = {
    "dice": _LESIONS["dice"],
    "hd95": _LESIONS["hd95"],
    "nsd_0.5": Column("lesion-wise NSD, 0.5 mm"),
    "nsd_1.0": Column("lesion-wise NSD, 1 mm"),
    **{k: c for k, c in _LESIONS.items() if k.startswith("lesions")},
}


def find(folder: Path) -> dict[str, LabelMap]:
    """``<id>.nii.gz``, ``<id>_seg.nii.gz``, flat or one folder per case."""

    def name_of(path: Path) -> str | None:
        stem = strip(path.name) or ""
        if stem.endswith("_Segm") and path.parent != folder:
            return path.parent.name  # BraTS20_Training_355
        case = stem
        for ending in _LABEL_ENDINGS:
            case = case.removesuffix(ending)
        flat = path.parent == folder
        return None if (not flat and case == stem) or stem.endswith(_MODALITIES) else case

    found = find_files(folder, LAYOUT, name_of)
    return {case: LabelMap(case, path, _patient(case)) for case, path in found.items()}


def _patient(case: str) -> str:
    """Since 2023 a name ends in the number of the examination."""
    return case.rpartition("-")[0] if case.startswith("BraTS-") and case.count("-") == 3 else case


def region_2022(pred: np.ndarray, ref: np.ndarray) -> dict[str, float]:
    """Dice, HD95 (voxels), sensitivity and specificity of one region, with the platform's rules for empty masks.

    Both empty: 1, 0, 1, 1. One empty: Dice 0 and HD95 the image's diagonal in voxels; sensitivity 0; specificity as
    counted (docs/evaluation.md, section Empty and missing masks).
    """
    grid = voxels(pred.shape)
    pair = Pair(pred, ref, grid)
    specificity = METRICS["specificity"].measure(pair)
    specificity = 1.0 if math.isnan(specificity) else specificity
    if pair.p and pair.g:
        values = measure(pair, ("dice", "hd95_pooled", "sensitivity"))
        hd95 = values["hd95_pooled"]
        return {"dice": values["dice"], "hd95": hd95, "sensitivity": values["sensitivity"], "specificity": specificity}
    if not pair.p and not pair.g:
        return {"dice": 1.0, "hd95": 0.0, "sensitivity": 1.0, "specificity": 1.0}
    return {"dice": 0.0, "hd95": grid.diagonal, "sensitivity": 0.0, "specificity": specificity}


def score_2022(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """All regions of a case; distances in voxels, as the platform has them."""
    return {name: region_2022(pred[name], ref[name]) for name in ref}


def worst_2022(ref: Masks, geometry: Geometry) -> Values:
    """What the platform gives a prediction that it cannot read."""
    return {name: dict(UNREADABLE_2022) for name in ref}


def _whole_image(pair: Pair, penalty: float) -> dict[str, float]:
    """The "legacy" values of 2023: both empty: 1, 0, 1; one empty: Dice 0 and the penalty."""
    none = not pair.p and not pair.g
    specificity = METRICS["specificity"].measure(pair)
    return {
        "dice_whole": 1.0 if none else METRICS["dice"].measure(pair),
        "hd95_whole": 0.0 if none else METRICS["hd95_surfel"].measure(pair) if pair.p and pair.g else penalty,
        "sensitivity": 1.0 if none else pair.tp / pair.g if pair.g else 0.0,
        "specificity": 0.0 if math.isnan(specificity) else specificity,
    }


def _row(counted: lesions.Counted) -> dict[str, float]:
    renamed = {("hd95" if k == "hd95_surfel" else k): v for k, v in counted.scores.items()}
    return renamed | {"lesions_tp": counted.tp, "lesions_fp": counted.fp, "lesions_fn": counted.fn}


def score_2023(pred: Masks, ref: Masks, geometry: Geometry, cohort: str = "GLI") -> Values:
    """Lesion by lesion, and the whole image."""
    found = {}
    for name in ref:
        counted = lesions.lesionwise_2023(pred[name], ref[name], geometry, lesions.COHORTS[cohort])
        found[name] = _row(counted) | _whole_image(Pair(pred[name], ref[name], geometry), lesions.PENALTY_2023)
    return found


def worst_2023(ref: Masks, geometry: Geometry, cohort: str = "GLI") -> Values:
    """Every lesion missed: an empty prediction; but Dice 0 and the penalty also where there is nothing to find."""
    empty = {name: np.zeros_like(mask) for name, mask in ref.items()}
    poor = {"dice": 0.0, "dice_whole": 0.0, "hd95": lesions.PENALTY_2023, "hd95_whole": lesions.PENALTY_2023}
    found = score_2023(empty, ref, geometry, cohort)
    return {name: values | poor | {"sensitivity": 0.0, "specificity": 0.0} for name, values in found.items()}


def score_2024(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """Lesion by lesion, glioma after treatment."""
    return {name: _row(counted) for name, counted in lesions.lesionwise_2024(pred, ref, geometry).items()}


def worst_2024(ref: Masks, geometry: Geometry) -> Values:
    """Every lesion missed; Dice 0 and the penalty also where there is nothing to find."""
    found = score_2024({name: np.zeros_like(mask) for name, mask in ref.items()}, ref, geometry)
    poor = {"dice": 0.0, "hd95": lesions.PENALTY_2024, "nsd_0.5": 0.0, "nsd_1.0": 0.0}
    return {name: values | poor for name, values in found.items()}


def platform_2022(values: Sequence[float]) -> dict[str, float]:
    """Return the rows that the platform of 2021 and 2022 wrote below a column.

    The platform computed each row over the cases and the rows above it, so sd, median and quartiles are slightly wrong.
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


def platform_table(scored: Sequence[Scored]) -> dict[str, Any]:
    """`platform_2022` of every metric of every region."""
    return {
        region: {m: platform_2022([s.values[region][m] for s in scored]) for m in UNREADABLE_2022}
        for region in scored[0].values
    }


GRID = range(0, 751, 10)  # voxels: thresholds for the smallest ET that nnU-Net tried for BraTS 2020


def _et_of(coding: Coding, job: Job) -> tuple[int, float, float]:
    """Voxels of predicted ET, and the Dice of ET with them and without."""
    assert job.pred is not None
    pred, ref = (coding.masks(m.load()[0], m.path)["ET"] for m in (job.pred, job.ref))
    return int(np.count_nonzero(pred)), region_2022(pred, ref)["dice"], float(not ref.any())


def tune_min_et(coding: Coding, jobs: Sequence[Job], run: Callable[..., Any]) -> dict[str, Any]:
    """Mean Dice of ET over cases for every smallest ET volume, and the best of them (the smallest of equals)."""
    found = list(run(functools.partial(_et_of, coding), [job for job in jobs if job.pred is not None]))
    if not found:
        raise UserError("--tune_min_et: no prediction can be used")
    dice = {t: float(np.mean([without if n < t else usual for n, usual, without in found])) for t in GRID}
    best = max(dice, key=lambda t: (dice[t], -t))
    return {"best": best, "dice": {str(t): v for t, v in dice.items()}}


def _whole(
    jobs: Sequence[Job], scored: Sequence[Scored], run: Callable[..., Any], *, also: Sequence[str], coding: Coding
) -> tuple[list[Scored], dict[str, Any]]:
    extra: dict[str, Any] = {}
    if "platform_2022" in also:
        extra["platform_2022"] = platform_table(scored)
    if "tune_min_et" in also:
        usable = [job for job, result in zip(jobs, scored, strict=True) if not result.problem]
        extra["min_et"] = tune_min_et(coding, usable, run)
    return [], extra


def rules(year: str, convention: str = "", cohort: str = "GLI", also: Sequence[str] = ()) -> Rules:
    """The rules of a year.

    Args:
        year: brats2022, brats2023 or brats2024.
        convention: label values of the files; empty: the year's.
        cohort: of 2023.
        also: of 2022, ``platform_2022`` and ``tune_min_et``: further entries of the summary.
    """
    score, worst, columns, usual = {
        "brats2022": (score_2022, worst_2022, _COLUMNS, "brats2021"),
        "brats2023": (
            functools.partial(score_2023, cohort=cohort),
            functools.partial(worst_2023, cohort=cohort),
            _LESIONS,
            "brats2023",
        ),
        "brats2024": (score_2024, worst_2024, _LESIONS_2024, "brats2024"),
    }[year]
    coding = CODINGS[convention or usual]
    title = f"BraTS {year.removeprefix('brats')}" + (f" {cohort}" if year == "brats2023" else "")
    return Rules(
        year,
        title,
        LAYOUT,
        columns,
        tuple(columns)[:4],
        find,
        functools.partial(_same, coding),
        score,
        worst,
        whole=functools.partial(_whole, also=tuple(also), coding=coding) if also else None,
    )


def _same(coding: Coding, label_map: LabelMap) -> Coding:
    return coding


def conventions(year: str) -> Mapping[str, Coding]:
    """The conventions whose files a year's rules can score."""
    if year == "brats2024":
        return {"brats2024": CODINGS["brats2024"]}
    return {name: coding for name, coding in CODINGS.items() if name != "brats2024"}
