"""Segmentation metrics by the challenges' rules, in numpy and scipy (spec: challenges, sections 0 and 3).

This module judges the product, so it shares no code with it. Masks are boolean arrays of any rank; distances are in
voxels unless a spacing is given.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

# label values on disk -> region, by convention
BRATS_REGIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "brats2021": {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
    "brats2023": {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},
}
BRATS_METRICS = ("dice", "hd95", "sensitivity", "specificity")
# what the 2021/2022 platform gives a prediction that it cannot read
BRATS_UNREADABLE = {"dice": 0.0, "hd95": 374.0, "sensitivity": 0.0, "specificity": 0.0}


def dice(pred: np.ndarray, ref: np.ndarray) -> float:
    """``2 |P and G| / (|P| + |G|)``; NaN when both are empty, for the caller's rule to decide."""
    total = np.count_nonzero(pred) + np.count_nonzero(ref)
    return 2 * np.count_nonzero(pred & ref) / total if total else math.nan


def surface(mask: np.ndarray, *, border: bool) -> np.ndarray:
    """Mask voxels with a face neighbour outside the mask; ``border``: beyond the array's edge counts as outside."""
    inside: Any = binary_erosion(mask, generate_binary_structure(mask.ndim, 1), border_value=0 if border else 1)
    return mask & ~inside


def surface_distances(
    pred: np.ndarray, ref: np.ndarray, spacing: Sequence[float] | None = None, *, border: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from every surface voxel of P to the nearest of G, and from G to P.

    Works in the bounding box of both masks with a margin of one voxel, kept inside the image so that a real image
    edge stays one: exact, and many times faster.

    Raises:
        ValueError: a mask is empty.
    """
    if not pred.any() or not ref.any():
        raise ValueError("surface distances need two masks that are not empty")
    box = _bounding_box(pred | ref, margin=1)
    surface_p, surface_g = surface(pred[box], border=border), surface(ref[box], border=border)
    to_g = distance_transform_edt(~surface_g, sampling=spacing)
    to_p = distance_transform_edt(~surface_p, sampling=spacing)
    return np.asarray(to_g)[surface_p], np.asarray(to_p)[surface_g]


def _bounding_box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    box = []
    for axis, n in enumerate(mask.shape):
        profile = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(int(profile[0]) - margin, 0), min(int(profile[-1]) + 1 + margin, n)))
    return tuple(box)


def assd_mean(pred: np.ndarray, ref: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """Mean of the two directed mean surface distances: the MAD of CAMUS (spec: challenges, section 1.2)."""
    to_ref, to_pred = surface_distances(pred, ref, spacing)
    return float(to_ref.mean() + to_pred.mean()) / 2


def hausdorff(pred: np.ndarray, ref: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """Largest of all surface distances, in both directions."""
    return float(np.concatenate(surface_distances(pred, ref, spacing)).max())


def hd95_pooled(pred: np.ndarray, ref: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """95th percentile (linear) of both directed lists of surface distances put together; image edge is outside."""
    return float(np.percentile(np.concatenate(surface_distances(pred, ref, spacing)), 95))


def brats2022_region(pred: np.ndarray, ref: np.ndarray) -> dict[str, float]:
    """Dice, HD95 (voxels), sensitivity and specificity of one region, with the platform's rules for empty masks.

    Both empty: 1, 0, 1, 1. One empty: Dice 0 and HD95 the image's diagonal in voxels; sensitivity 0; specificity as
    counted (spec: challenges, section 3.2).
    """
    tp = np.count_nonzero(pred & ref)
    fp = np.count_nonzero(pred & ~ref)
    fn = np.count_nonzero(~pred & ref)
    tn = pred.size - tp - fp - fn
    specificity = tn / (tn + fp) if tn + fp else 1.0
    if tp + fp and tp + fn:
        return {
            "dice": dice(pred, ref),
            "hd95": hd95_pooled(pred, ref),
            "sensitivity": tp / (tp + fn),
            "specificity": specificity,
        }
    if not (tp + fp or tp + fn):
        return {"dice": 1.0, "hd95": 0.0, "sensitivity": 1.0, "specificity": 1.0}
    return {"dice": 0.0, "hd95": math.hypot(*pred.shape), "sensitivity": 0.0, "specificity": specificity}


def brats2022_case(pred: np.ndarray, ref: np.ndarray, convention: str) -> dict[str, dict[str, float]]:
    """Region to metrics for two label maps in the values of ``convention``.

    Raises:
        ValueError: shapes differ, or the convention is unknown.
    """
    if pred.shape != ref.shape:
        raise ValueError(f"prediction {pred.shape} and reference {ref.shape} differ in shape")
    if convention not in BRATS_REGIONS:
        raise ValueError(f"unknown convention {convention!r}; known: {', '.join(BRATS_REGIONS)}")
    regions = BRATS_REGIONS[convention]
    return {name: brats2022_region(np.isin(pred, values), np.isin(ref, values)) for name, values in regions.items()}


def summarise(values: Sequence[float]) -> dict[str, float | None]:
    """Count, mean, sd (ddof 1; None for one value), median, quartiles (linear), minimum and maximum over cases."""
    array = np.asarray(values, np.float64)
    q25, median, q75 = np.percentile(array, [25, 50, 75])
    return {
        "count": int(array.size),
        "mean": float(array.mean()),
        "sd": float(array.std(ddof=1)) if array.size > 1 else None,
        "median": float(median),
        "q25": float(q25),
        "q75": float(q75),
        "min": float(array.min()),
        "max": float(array.max()),
    }
