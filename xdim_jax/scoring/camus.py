"""CAMUS: Dice, MAD and HD of LV_endo, LV_epi and LA at ED and ES, and volumes (docs/challenges.md)."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.data.images.image import strip_suffix
from xdim_jax.data.images.names import files_below
from xdim_jax.scoring import simpson
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
    find_files,
    squeeze_slice,
)

CODING = Coding("CAMUS", {"LV_endo": (1,), "LV_epi": (1, 2), "LA": (3,)})
CAVITY = "LV_endo"
LAYOUT = "patient0001_{2CH,4CH}_{ED,ES}[_gt].{nii.gz,mhd,...}, in one folder or one for each patient"
# prefix of the ids of test patients in the older release, in which their numbers also start from 1
TEST_PREFIX = "testing_"
_NAME = re.compile(rf"({TEST_PREFIX})?(patient\d+)_([24]CH)_(ED|ES)(_gt)?")
_COLUMNS = {"dice": Column("Dice"), "mad": Column("MAD", "mm", 2, False), "hd": Column("HD", "mm", 2, False)}

# (instant, structure) -> the largest mean MAD and HD in mm between two of the three cardiologists (paper, Table 2)
OBSERVERS = {
    ("ED", "LV_endo"): (3.3, 8.2),
    ("ED", "LV_epi"): (3.5, 8.0),
    ("ES", "LV_endo"): (4.0, 8.8),
    ("ES", "LV_epi"): (3.9, 8.6),
}

# (view, instant) -> label map of one patient
_PatientMaps = Mapping[tuple[str, str], LabelMap]


def find(folder: Path) -> dict[str, LabelMap]:
    """Return the label maps in a folder by case id. If some names end in ``_gt``, the other files are images."""

    def match(path: Path) -> re.Match[str] | None:
        return _NAME.fullmatch(strip_suffix(path.name) or "")

    only_gt = any((m := match(path)) and m[5] for path in files_below(folder))
    attributes: dict[str, dict[str, str]] = {}
    patients: dict[str, str] = {}

    def name_of(path: Path) -> str | None:
        m = match(path)
        if m is None or (only_gt and not m[5]):
            return None
        is_test = bool(m[1]) or "testing" in path.relative_to(folder).parts
        patient = f"{TEST_PREFIX}{m[2]}" if is_test else m[2]
        case = f"{patient}_{m[3]}_{m[4]}"
        patients[case], attributes[case] = patient, {"view": m[3], "instant": m[4]}
        return case

    return {
        case: LabelMap(case, path, patients[case], attributes[case], axes="stored")
        for case, path in find_files(folder, LAYOUT, name_of).items()
    }


def score(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """Score all structures of an image.

    If both masks are empty, Dice is 1. If a mask is empty, MAD and HD are NaN, and are excluded from means.
    """
    pred, plane = squeeze_slice(pred, geometry)
    ref, _ = squeeze_slice(ref, geometry)
    found = {}
    for name in ref:
        values = measure(Pair(pred[name], ref[name], plane), ("dice", "assd_mean", "hd"))
        dice = 1.0 if math.isnan(values["dice"]) else values["dice"]
        found[name] = {"dice": dice, "mad": values["assd_mean"], "hd": values["hd"]}
    return found


def score_missing(ref: Masks, geometry: Geometry) -> Values:
    """Return the values of an image without a usable prediction: Dice 0, and NaN for distances."""
    return {name: {"dice": 0.0, "mad": math.nan, "hd": math.nan} for name in ref}


def patient_volumes(maps: _PatientMaps, *, step: str, contour: str) -> simpson.Volumes:
    """Compute the volumes of a patient.

    Args:
        maps: (view, instant) -> label map, for the two views and two instants.
        step: Height of the discs, see `xdim_jax.scoring.simpson.volumes`.
        contour: Part of the ventricle that is divided into discs, see `xdim_jax.scoring.simpson.volumes`.

    Raises:
        UserError: A label map cannot be read.
    """
    masks = {}
    for key, label_map in maps.items():
        values, grid = label_map.load()
        masks[key] = (CODING.masks(values, label_map.path)[CAVITY][0], grid.spacing[1:])
    return simpson.volumes(masks, step=step, contour=contour)


def _predicted_and_reference_volumes(
    maps: tuple[_PatientMaps, _PatientMaps], step: str, contour: str
) -> list[simpson.Volumes]:
    """Return the predicted volumes and the reference volumes of a patient."""
    return [patient_volumes(m, step=step, contour=contour) for m in maps]


def aggregate(
    jobs: Sequence[Job],
    scored: Sequence[ScoredCase],
    run: Callable[..., Any],
    *,
    step: str = "largest",
    contour: str = "official",
) -> tuple[list[ScoredCase], dict[str, Any]]:
    """Compute volumes and ejection fraction of patients, and the agreement of prediction and reference.

    Only patients whose four images (two views, two instants) all have a usable prediction are included.

    Args:
        jobs: All jobs.
        scored: Scores of each job.
        run: Parallel ``map``.
        step: Height of the discs, see `xdim_jax.scoring.simpson.volumes`.
        contour: Part of the ventricle that is divided into discs, see `xdim_jax.scoring.simpson.volumes`.

    Returns:
        A row for each patient, with predicted and reference volumes; and the entries ``volumes`` and ``outliers`` of
        the summary.
    """
    patients: dict[str, dict[tuple[str, str], Job]] = {}
    for job, result in zip(jobs, scored, strict=True):
        if not result.problem:
            patients.setdefault(job.ref.patient, {})[job.attributes["view"], job.attributes["instant"]] = job
    complete = {p: images for p, images in patients.items() if len(images) == 4}
    maps = [
        ({k: j.pred for k, j in images.items()}, {k: j.ref for k, j in images.items()}) for images in complete.values()
    ]
    compute = functools.partial(_predicted_and_reference_volumes, step=step, contour=contour)
    found = dict(zip(complete, run(compute, maps), strict=True))
    values = {patient: _volume_values(pred, ref) for patient, (pred, ref) in found.items()}
    rows = [ScoredCase(p, p, {"view": "", "instant": ""}, {"LV volume": v}, {}) for p, v in values.items()]
    failed = sorted(p for p, v in values.items() if not all(map(math.isfinite, v.values())))
    usable = [v for p, v in values.items() if p not in failed]
    summary = {
        "agreement": {
            name: agreement([v[name] for v in usable], [v[f"{name}_ref"] for v in usable])
            for name in ("ef", "edv", "esv")
        },
        "patients": len(usable),
        "failed": failed,
        "reasons": _texts(found, "reason"),
        "implausible": _texts(found, "implausible"),
        "incomplete": sorted({j.ref.patient for j in jobs} - complete.keys()),
        "step": step,
        "contour": contour,
    }
    return rows, {"volumes": summary, "outliers": find_outliers(scored)}


def find_outliers(scored: Sequence[ScoredCase]) -> dict[str, Any]:
    """Return the contours that are farther from the reference than two cardiologists are from each other.

    A contour is an outlier if its MAD or HD is above `OBSERVERS`, or if it cannot be measured because the prediction is
    empty or missing. Empty references are not counted.

    Returns:
        Instant and structure, such as ``ED LV_endo`` -> ``images`` (number of images), ``count`` (number of outliers)
        and ``cases`` (their ids).
    """
    found: dict[str, Any] = {}
    for (instant, structure), (mad, hd) in OBSERVERS.items():
        having = [
            case
            for case in scored
            if case.attributes.get("instant") == instant and case.empty.get(structure) not in ("ref", "both")
        ]
        far = [
            case.case_id
            for case in having
            if not (case.values[structure]["mad"] <= mad and case.values[structure]["hd"] <= hd)  # NaN is an outlier
        ]
        if having:
            found[f"{instant} {structure}"] = {"images": len(having), "count": len(far), "cases": sorted(far)}
    return found


def _texts(found: Mapping[str, Sequence[simpson.Volumes]], attribute: str) -> dict[str, str]:
    """Return patient -> texts of an attribute of the predicted and of the reference volumes, without empty ones."""
    texts = {
        patient: "; ".join(
            f"{which}: {text}"
            for which, v in zip(("prediction", "reference"), both, strict=True)
            if (text := getattr(v, attribute))
        )
        for patient, both in found.items()
    }
    return {patient: text for patient, text in texts.items() if text}


def _volume_values(pred: simpson.Volumes, ref: simpson.Volumes) -> dict[str, float]:
    """Return rounded volumes, unrounded volumes and EF of a patient; reference values have the suffix ``_ref``."""
    values = {}
    for suffix, v in (("", pred), ("_ref", ref)):
        edv, esv = v.rounded
        values |= {f"edv{suffix}": edv, f"esv{suffix}": esv, f"ef{suffix}": v.ef}
        values |= {f"edv_raw{suffix}": v.edv, f"esv_raw{suffix}": v.esv}
    return values


def agreement(pred: Sequence[float], ref: Sequence[float]) -> dict[str, float | None]:
    """Return statistics of the agreement of predicted and reference values.

    Returns:
        ``correlation``: Pearson's correlation. ``bias``: mean of prediction minus reference. ``sd``: standard deviation
        of these differences (ddof 1). ``mae``: mean absolute error. A statistic is None if there are too few values;
        the correlation is also None if predicted or reference values are constant.
    """
    p, r = np.asarray(pred, float), np.asarray(ref, float)
    difference = p - r
    has_spread = p.size > 1 and p.std() > 0 and r.std() > 0
    return {
        "correlation": float(np.corrcoef(p, r)[0, 1]) if has_spread else None,
        "bias": float(difference.mean()) if p.size else None,
        "sd": float(difference.std(ddof=1)) if p.size > 1 else None,
        "mae": float(np.abs(difference).mean()) if p.size else None,
    }


def _coding(label_map: LabelMap) -> Coding:
    """Return the same coding for all label maps. Unlike a lambda, this function can be pickled."""
    return CODING


def _groups(attributes: Mapping[str, str]) -> tuple[str, ...]:
    """Return the groups of an image: its instant, and its view and instant."""
    return attributes["instant"], f"{attributes['view']} {attributes['instant']}"


def rules(step: str = "largest", contour: str = "official") -> Rules:
    """Return the rules of CAMUS. The options are those of `xdim_jax.scoring.simpson.volumes`."""
    return Rules(
        name="camus",
        title="CAMUS",
        layout=LAYOUT,
        columns=_COLUMNS,
        main_metrics=tuple(_COLUMNS),
        find=find,
        coding=_coding,
        score=score,
        score_missing=score_missing,
        attributes=("view", "instant"),
        groups=_groups,
        volumetric=False,
        aggregate=functools.partial(aggregate, step=step, contour=contour),
    )
