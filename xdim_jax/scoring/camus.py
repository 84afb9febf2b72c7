"""CAMUS: Dice, MAD and HD of LV_endo, LV_epi and LA at ED and ES, and volumes (docs/challenges.md)."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.data.images.image import strip
from xdim_jax.scoring import simpson
from xdim_jax.scoring.masks import Geometry, Pair, measure
from xdim_jax.scoring.rules import Coding, Column, Job, LabelMap, Masks, Rules, Scored, Values, find_files, flat

CODING = Coding("CAMUS", {"LV_endo": (1,), "LV_epi": (1, 2), "LA": (3,)})
CAVITY = "LV_endo"
LAYOUT = "patient0001_{2CH,4CH}_{ED,ES}[_gt].{nii.gz,mhd,...}, in one folder or one for each patient"
TESTING = "testing_"  # before patients of the older release's testing folder, which are numbered anew
_NAME = re.compile(rf"({TESTING})?(patient\d+)_([24]CH)_(ED|ES)(_gt)?")
_COLUMNS = {"dice": Column("Dice"), "mad": Column("MAD", "mm", 2, False), "hd": Column("HD", "mm", 2, False)}


def find(folder: Path) -> dict[str, LabelMap]:
    """Label maps below a folder; where some are called ``_gt``, the others are images."""

    def match(path: Path) -> re.Match[str] | None:
        return _NAME.fullmatch(strip(path.name) or "")

    marked = any((m := match(p)) and m[5] for p in folder.rglob("*_gt.*")) if folder.is_dir() else False
    facts: dict[str, Mapping[str, str]] = {}

    def name_of(path: Path) -> str | None:
        m = match(path)
        if m is None or (marked and not m[5]):
            return None
        testing = bool(m[1]) or "testing" in path.relative_to(folder).parts  # numbered anew in the older release
        patient = f"{TESTING}{m[2]}" if testing else m[2]
        case = f"{patient}_{m[3]}_{m[4]}"
        facts[case] = {"patient": patient, "view": m[3], "instant": m[4]}
        return case

    return {
        case: LabelMap(
            case,
            path,
            facts[case]["patient"],
            {key: facts[case][key] for key in ("view", "instant")},
            axes="stored",
        )
        for case, path in find_files(folder, LAYOUT, name_of).items()
    }


def score(pred: Masks, ref: Masks, geometry: Geometry) -> Values:
    """Per structure; MAD and HD are not defined, and left out of means, where a mask is empty."""
    pred, plane = flat(pred, geometry)
    ref, _ = flat(ref, geometry)
    found = {}
    for name in ref:
        pair = Pair(pred[name], ref[name], plane)
        values = measure(pair, ("dice", "assd_mean", "hd"))
        dice = 1.0 if math.isnan(values["dice"]) else values["dice"]
        found[name] = {"dice": dice, "mad": values["assd_mean"], "hd": values["hd"]}
    return found


def worst(ref: Masks, geometry: Geometry) -> Values:
    """A missing image: Dice 0, and no distances."""
    return {name: {"dice": 0.0, "mad": math.nan, "hd": math.nan} for name in ref}


def patient_volumes(maps: Mapping[tuple[str, str], LabelMap], *, step: str, contour: str) -> simpson.Volumes:
    """Volumes of a patient from four label maps. Raises UserError for one that cannot be read."""
    masks = {}
    for key, label_map in maps.items():
        values, grid = label_map.load()
        masks[key] = (CODING.masks(values, label_map.path)[CAVITY][0], grid.spacing[1:])
    return simpson.volumes(masks, step=step, contour=contour)


def _volumes_of(
    sides: tuple[Mapping[tuple[str, str], LabelMap], ...], step: str, contour: str
) -> list[simpson.Volumes]:
    return [patient_volumes(maps, step=step, contour=contour) for maps in sides]


def whole(
    jobs: Sequence[Job],
    scored: Sequence[Scored],
    run: Callable[..., Any],
    *,
    step: str = "largest",
    contour: str = "official",
) -> tuple[list[Scored], dict[str, Any]]:
    """Volumes and ejection fraction of every patient with four images, and how well they agree over patients."""
    patients: dict[str, dict[tuple[str, str], Job]] = {}
    for job, result in zip(jobs, scored, strict=True):
        if not result.problem:
            patients.setdefault(job.ref.patient, {})[job.facts["view"], job.facts["instant"]] = job
    complete = {p: found for p, found in patients.items() if len(found) == 4}
    sides = [
        ({k: j.pred for k, j in found.items()}, {k: j.ref for k, j in found.items()}) for found in complete.values()
    ]
    rows, pairs = [], {}
    for patient, (pred, ref) in zip(
        complete, run(functools.partial(_volumes_of, step=step, contour=contour), sides), strict=True
    ):
        values = {}
        for suffix, v in (("", pred), ("_ref", ref)):
            edv, esv = v.rounded
            values |= {f"edv{suffix}": edv, f"esv{suffix}": esv, f"ef{suffix}": v.ef}
            values |= {f"edv_raw{suffix}": v.edv, f"esv_raw{suffix}": v.esv}
        rows.append(Scored(patient, patient, {"view": "", "instant": ""}, {"LV volume": values}, {}))
        pairs[patient] = values
    failed = sorted(p for p, v in pairs.items() if not all(map(math.isfinite, v.values())))
    usable = [v for p, v in pairs.items() if p not in failed]
    agreement = {
        name: agree([v[name] for v in usable], [v[f"{name}_ref"] for v in usable]) for name in ("ef", "edv", "esv")
    }
    lacking = sorted({j.ref.patient for j in jobs} - complete.keys())
    summary = {
        "agreement": agreement,
        "patients": len(usable),
        "failed": failed,
        "incomplete": lacking,
        "step": step,
        "contour": contour,
    }
    return rows, {"volumes": summary}


def agree(pred: Sequence[float], ref: Sequence[float]) -> dict[str, float | None]:
    """Pearson's correlation, bias (mean of prediction minus reference), sd of the differences (ddof 1) and mean
    absolute error; None where there are too few patients, or no spread."""
    p, r = np.asarray(pred, float), np.asarray(ref, float)
    difference = p - r
    spread = p.size > 1 and p.std() > 0 and r.std() > 0
    return {
        "correlation": float(np.corrcoef(p, r)[0, 1]) if spread else None,
        "bias": float(difference.mean()) if p.size else None,
        "sd": float(difference.std(ddof=1)) if p.size > 1 else None,
        "mae": float(np.abs(difference).mean()) if p.size else None,
    }


def _coding(label_map: LabelMap) -> Coding:
    return CODING


def _groups(facts: Mapping[str, str]) -> tuple[str, ...]:
    return facts["instant"], f"{facts['view']} {facts['instant']}"


def rules(step: str = "largest", contour: str = "official") -> Rules:
    """The rules of CAMUS, with the options of `xdim_jax.scoring.simpson.volumes`."""
    return Rules(
        "camus",
        "CAMUS",
        LAYOUT,
        _COLUMNS,
        tuple(_COLUMNS),
        find,
        _coding,
        score,
        worst,
        facts=("view", "instant"),
        groups=_groups,
        volumetric=False,
        whole=functools.partial(whole, step=step, contour=contour),
    )
