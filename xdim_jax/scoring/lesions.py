"""BraTS 2023 and 2024: every lesion has a score of its own, and a false lesion costs as much as a missed one.

The rules are in docs/challenges.md, sections on BraTS 2023 and 2024.

Volumes are in mm^3. HD95 is that of surface areas (`xdim_jax.scoring.masks`, ``hd95_surfel``).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, find_objects, generate_binary_structure, label

from xdim_jax.scoring.masks import METRICS, Geometry, Pair

_NEIGHBOURS = generate_binary_structure(3, 2)  # 18: faces and edges; of dilations
_CONNECTED = np.ones((3, 3, 3), bool)  # 26; of components


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Parameters of one part of the challenge.

    Attributes:
        dilation: steps by which lesions are grown before those that meet count as one, and before predicted components
            are looked for.
        volume: lesions of at most so many mm^3 are left out of the sums.
    """

    dilation: int
    volume: float


COHORTS = {
    "GLI": Cohort(3, 50),
    "SSA": Cohort(3, 50),
    "PED": Cohort(3, 50),
    "MEN": Cohort(1, 50),
    "MET": Cohort(1, 2),
}
_EXACT = 1 + 1e-5  # a voxel of 1 mm whose affine was rounded is one
PENALTY_2023, PENALTY_2024 = 374.0, 337.0  # HD95 of a lesion that is missed or false, mm


def grow(mask: np.ndarray, steps: int) -> np.ndarray:
    """Dilation with the 18 neighbours."""
    return binary_dilation(mask, _NEIGHBOURS, iterations=steps) if steps else mask


def components(mask: np.ndarray) -> np.ndarray:
    """Numbers of the 26-connected components, from 1."""
    found: Any = label(mask, _CONNECTED)
    return found[0]


def merged(mask: np.ndarray, steps: int) -> np.ndarray:
    """Components of a mask, those that meet when all are grown by ``steps`` counted as one."""
    return np.where(mask, components(grow(mask, steps)), 0)


@dataclasses.dataclass(frozen=True)
class Counted:
    """What became of the lesions of one structure: sums over those above the volume, and numbers."""

    scores: Mapping[str, float]
    tp: int
    fp: int
    fn: int


def score_lesions(
    pred: np.ndarray,
    ref: np.ndarray,
    geometry: Geometry,
    *,
    cohort: Cohort,
    penalty: float,
    metrics: Sequence[str] = ("dice", "hd95_surfel"),
) -> Counted:
    """Scores of numbered lesions: the sum over lesions and false components, divided by their number.

    Args:
        pred, ref: numbers of components and lesions, 0 outside.
        penalty: HD95 of a lesion without a match and of a false component.
        metrics: of a lesion against the union of all components that it meets when grown. Where nothing is to be
            found and nothing was, overlaps are 1 and distances 0.
    """
    sums = dict.fromkeys(metrics, 0.0)
    kept = tp = 0
    matched: set[int] = set()
    steps, boxes = cohort.dilation, find_objects(pred)
    for number, box in enumerate(find_objects(ref), 1):
        if box is None:
            continue
        around = tuple(slice(max(s.start - steps, 0), s.stop + steps) for s in box)
        met = np.unique(pred[around][grow(ref[around] == number, steps)])
        met = met[met > 0]
        matched.update(met.tolist())
        if np.count_nonzero(ref[box] == number) * geometry.voxel <= cohort.volume * _EXACT:
            continue
        kept += 1
        tp += bool(met.size)
        near = _union([box, *(boxes[c - 1] for c in met)], pred.shape)
        pair = Pair(np.isin(pred[near], met), ref[near] == number, geometry)
        for name in metrics:
            value = METRICS[name].measure(pair) if met.size else math.nan
            missed = penalty if METRICS[name].unit else 0.0
            sums[name] += missed if math.isnan(value) else value
    fp = len(set(np.unique(pred).tolist()) - {0} - matched)
    scores = {}
    for name, total in sums.items():
        distance = bool(METRICS[name].unit)
        count = kept + fp
        scores[name] = (total + penalty * fp * distance) / count if count else float(not distance)
    return Counted(scores, tp, fp, kept - tp)


def _union(boxes: Sequence[tuple[slice, ...]], shape: Sequence[int]) -> tuple[slice, ...]:
    """The box around all boxes, with a margin of one voxel inside the image."""
    return tuple(
        slice(max(min(b[a].start for b in boxes) - 1, 0), min(max(b[a].stop for b in boxes) + 1, n))
        for a, n in enumerate(shape)
    )


def lesionwise_2023(pred: np.ndarray, ref: np.ndarray, geometry: Geometry, cohort: Cohort) -> Counted:
    """Two masks by the rules of 2023: close lesions of the reference are one; predicted ones are as they are."""
    return score_lesions(components(pred), merged(ref, cohort.dilation), geometry, cohort=cohort, penalty=PENALTY_2023)


# -- 2024, glioma after treatment ---------------------------------------------------------------------------------

# steps by which components of a tissue are grown to be merged; the platform's SNFH was meant to have 5, but has 3
_MERGE_2024 = {"NETC": 5, "RC": 5}
_SMALL_2024 = {"ET": 10}  # voxels; else 20
# tissue -> those whose components join its own, one after the other
_JOIN_2024 = {
    "NETC": ("ET", "RC"),
    "ET": ("NETC", "RC"),
    "RC": ("ET", "NETC"),
    "SNFH": ("ET", "RC", "NETC"),
}


def lesions_2024(masks: Mapping[str, np.ndarray], *, predicted: bool) -> dict[str, np.ndarray]:
    """Numbered lesions of every structure.

    Components that meet when grown are one; predicted ones of few voxels are dropped; then components of a tissue
    that touch one and the same component of a neighbouring tissue are one.
    """
    numbered = {}
    for name, mask in masks.items():
        found = merged(mask, _MERGE_2024.get(name, 3))
        if predicted:
            few = np.bincount(found.ravel()) <= _SMALL_2024.get(name, 20)
            few[0] = False
            found = np.where(few[found], 0, found)
        numbered[name] = found
    joined = dict(numbered)
    for name, others in _JOIN_2024.items():
        for other in others:
            joined[name] = _join(joined[name], numbered[other])
    return joined


def _join(lesions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Lesions whose first touching neighbour is the same become one; a single contact changes nothing."""
    touching = []
    for number, box in enumerate(find_objects(lesions), 1):
        if box is None:
            continue
        around = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        met = np.unique(others[around][grow(lesions[around] == number, 1)])
        touching += [(number, int(other)) for other in met if other]
    if len(touching) < 2:
        return lesions
    first: dict[int, int] = {}
    for number, other in touching:
        first.setdefault(number, other)
    highest = int(lesions.max())
    renamed = np.arange(highest + 1)
    for number, other in first.items():
        renamed[number] = highest + other
    return renamed[lesions]


def lesionwise_2024(
    pred: Mapping[str, np.ndarray], ref: Mapping[str, np.ndarray], geometry: Geometry
) -> dict[str, Counted]:
    """Masks of all structures by the rules of 2024 for glioma after treatment."""
    found, wanted = lesions_2024(pred, predicted=True), lesions_2024(ref, predicted=False)
    return {
        name: score_lesions(
            found[name],
            wanted[name],
            geometry,
            cohort=Cohort(3, _SMALL_2024.get(name, 20)),
            penalty=PENALTY_2024,
            metrics=("dice", "hd95_surfel", "nsd_0.5", "nsd_1.0"),
        )
        for name in ref
    }
