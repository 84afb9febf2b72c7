"""Lesion-wise metrics of BraTS 2023 and 2024: each lesion is scored, and false and missed lesions are penalised.

The rules are in docs/challenges.md, sections "BraTS 2023" and "BraTS 2024". Volumes are in mm^3. HD95 is the metric
``hd95_surfel`` of `xdim_jax.scoring.masks`, in mm.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, find_objects, generate_binary_structure, label

from xdim_jax.scoring.masks import METRICS, Geometry, Pair

_DILATION_NEIGHBOURS = generate_binary_structure(3, 2)  # 18: faces and edges
_COMPONENT_NEIGHBOURS = np.ones((3, 3, 3), bool)  # 26: faces, edges and corners


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Parameters of one part of the challenge, see `COHORTS`.

    Attributes:
        dilation: Number of dilation steps, both for merging lesions of the reference that are close to each other, and
            for matching a lesion with predicted components.
        ignored_volume: Largest volume of lesions that are not counted, in mm^3.
    """

    dilation: int
    ignored_volume: float


# part of the challenge -> parameters: glioma of adults, glioma in Sub-Saharan Africa, glioma of children, meningioma,
# metastases
COHORTS = {
    "GLI": Cohort(3, 50),
    "SSA": Cohort(3, 50),
    "PED": Cohort(3, 50),
    "MEN": Cohort(1, 50),
    "MET": Cohort(1, 2),
}
_VOLUME_TOLERANCE = 1 + 1e-5  # factor of the ignored volume, because a spacing of 1 mm may have a rounding error
PENALTY_2023, PENALTY_2024 = 374.0, 337.0  # HD95 of a missed or false lesion, in mm


def dilate(mask: np.ndarray, steps: int) -> np.ndarray:
    """Dilate a mask ``steps`` times with the 18 neighbours of a voxel."""
    return binary_dilation(mask, _DILATION_NEIGHBOURS, iterations=steps) if steps else mask


def label_components(mask: np.ndarray) -> np.ndarray:
    """Return a label map of the 26-connected components of a mask: 1, 2, ... inside the components, 0 outside."""
    found: Any = label(mask, _COMPONENT_NEIGHBOURS)
    return found[0]


def label_merged(mask: np.ndarray, steps: int) -> np.ndarray:
    """Return the same as `label_components`, but with one label for components that touch after ``steps`` dilations."""
    return np.where(mask, label_components(dilate(mask, steps)), 0)


@dataclasses.dataclass(frozen=True)
class LesionScores:
    """Lesion-wise results of one structure.

    Attributes:
        scores: Metric -> sum over counted lesions and false components, divided by their number.
        tp: Number of counted lesions that were found.
        fp: Number of predicted components that match no lesion.
        fn: Number of counted lesions that were missed.
    """

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
) -> LesionScores:
    """Score the lesions of one structure.

    A predicted component matches a lesion if it touches the dilated lesion. Each lesion is compared with the union of
    all components that match it.

    Args:
        pred: Label map (D, H, W) of the predicted components: 1, 2, ..., and 0 outside.
        ref: Label map (D, H, W) of the lesions of the reference: 1, 2, ..., and 0 outside.
        geometry: Positions of the voxels.
        cohort: Dilation and ignored volume.
        penalty: Value in mm of distance metrics for a missed lesion or a false component. Overlap metrics are 0.
        metrics: Names of metrics in `xdim_jax.scoring.masks.METRICS`.

    Returns:
        Scores and counts. If there is no counted lesion and no false component, overlaps are 1 and distances 0.
    """
    sums = dict.fromkeys(metrics, 0.0)
    counted = tp = 0
    matched: set[int] = set()
    steps, boxes = cohort.dilation, find_objects(pred)
    for number, box in enumerate(find_objects(ref), 1):
        if box is None:
            continue
        around = tuple(slice(max(s.start - steps, 0), s.stop + steps) for s in box)
        matches = np.unique(pred[around][dilate(ref[around] == number, steps)])
        matches = matches[matches > 0]
        matched.update(matches.tolist())
        volume = np.count_nonzero(ref[box] == number) * geometry.voxel_volume
        if volume <= cohort.ignored_volume * _VOLUME_TOLERANCE:
            continue
        counted += 1
        tp += bool(matches.size)
        part = _enclosing_box([box, *(boxes[c - 1] for c in matches)], pred.shape)
        pair = Pair(np.isin(pred[part], matches), ref[part] == number, geometry)
        for name in metrics:
            value = METRICS[name].measure(pair) if matches.size else math.nan
            missed = penalty if METRICS[name].unit else 0.0
            sums[name] += missed if math.isnan(value) else value
    fp = len(set(np.unique(pred).tolist()) - {0} - matched)
    scores = {}
    for name, total in sums.items():
        is_distance = bool(METRICS[name].unit)
        count = counted + fp
        scores[name] = (total + penalty * fp * is_distance) / count if count else float(not is_distance)
    return LesionScores(scores, tp, fp, counted - tp)


def _enclosing_box(boxes: Sequence[tuple[slice, ...]], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the smallest box around all boxes, enlarged by one voxel but not beyond the image."""
    return tuple(
        slice(max(min(b[a].start for b in boxes) - 1, 0), min(max(b[a].stop for b in boxes) + 1, n))
        for a, n in enumerate(shape)
    )


def lesionwise_2023(pred: np.ndarray, ref: np.ndarray, geometry: Geometry, cohort: Cohort) -> LesionScores:
    """Score two masks by the rules of 2023: close lesions of the reference are merged, predicted ones are not."""
    predicted, lesions = label_components(pred), label_merged(ref, cohort.dilation)
    return score_lesions(predicted, lesions, geometry, cohort=cohort, penalty=PENALTY_2023)


# -- 2024, glioma after treatment ---------------------------------------------------------------------------------

# structure -> dilation steps, see `_dilation_2024`; for SNFH, the platform has 3 instead of 5 because of a misspelling
_DILATIONS_2024 = {"NETC": 5, "RC": 5}
_OTHER_DILATION_2024 = 3
# structure -> ignored size, see `_ignored_size_2024`
_IGNORED_SIZES_2024 = {"ET": 10}
_OTHER_IGNORED_SIZE_2024 = 20
# structure -> neighbouring structures that merge its components, in this order
_MERGING_NEIGHBOURS_2024 = {
    "NETC": ("ET", "RC"),
    "ET": ("NETC", "RC"),
    "RC": ("ET", "NETC"),
    "SNFH": ("ET", "RC", "NETC"),
}


def _dilation_2024(structure: str) -> int:
    """Return the dilation steps for merging components, and for matching lesions with predicted components."""
    return _DILATIONS_2024.get(structure, _OTHER_DILATION_2024)


def _ignored_size_2024(structure: str) -> int:
    """Return the size up to which predicted components (in voxels) and lesions (in mm^3) are ignored."""
    return _IGNORED_SIZES_2024.get(structure, _OTHER_IGNORED_SIZE_2024)


def label_lesions_2024(masks: Mapping[str, np.ndarray], *, predicted: bool) -> dict[str, np.ndarray]:
    """Return label maps of the lesions of every structure.

    1. Components that touch after dilation are merged.
    2. Small components of a prediction are removed.
    3. Components of a structure that touch the same component of a neighbouring structure are merged.

    Args:
        masks: Structure -> mask.
        predicted: True for a prediction, False for a reference.

    Returns:
        Structure -> label map: 1, 2, ... inside the lesions, 0 outside.
    """
    numbered = {}
    for name, mask in masks.items():
        found = label_merged(mask, _dilation_2024(name))
        if predicted:
            small = np.bincount(found.ravel()) <= _ignored_size_2024(name)
            small[0] = False
            found = np.where(small[found], 0, found)
        numbered[name] = found
    merged = dict(numbered)
    for name, neighbours in _MERGING_NEIGHBOURS_2024.items():
        for neighbour in neighbours:
            merged[name] = _merge_touching(merged[name], numbered[neighbour])
    return merged


def _merge_touching(lesions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Merge lesions that touch the same lesion of another structure.

    If a lesion touches several lesions of the other structure, only the one with the lowest label is used. If there is
    only one contact in total, ``lesions`` is returned unchanged.
    """
    contacts = []
    for number, box in enumerate(find_objects(lesions), 1):
        if box is None:
            continue
        around = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        touched = np.unique(others[around][dilate(lesions[around] == number, 1)])
        contacts += [(number, int(other)) for other in touched if other]
    if len(contacts) < 2:
        return lesions
    first: dict[int, int] = {}
    for number, other in contacts:
        first.setdefault(number, other)
    highest = int(lesions.max())
    renumbered = np.arange(highest + 1)
    for number, other in first.items():
        renumbered[number] = highest + other
    return renumbered[lesions]


def lesionwise_2024(
    pred: Mapping[str, np.ndarray], ref: Mapping[str, np.ndarray], geometry: Geometry
) -> dict[str, LesionScores]:
    """Score the masks of all structures by the rules of 2024 for glioma after treatment."""
    predicted, lesions = label_lesions_2024(pred, predicted=True), label_lesions_2024(ref, predicted=False)
    return {
        name: score_lesions(
            predicted[name],
            lesions[name],
            geometry,
            cohort=Cohort(_dilation_2024(name), _ignored_size_2024(name)),
            penalty=PENALTY_2024,
            metrics=("dice", "hd95_surfel", "nsd_0.5", "nsd_1.0"),
        )
        for name in ref
    }
