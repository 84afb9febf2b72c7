"""Volumes of the left ventricle by Simpson's biplane rule, as CAMUS computes them (docs/challenges.md).

The quirks of the official computation are kept, because the challenge's ejection fractions come from it: no half-width
below 8 pixels, and one step for both instants, so that the end-systolic volume is taken over the end-diastolic length.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import label

VIEWS, INSTANTS = ("2CH", "4CH"), ("ED", "ES")
STEPS, CONTOURS = ("largest", "per_instant"), ("official", "largest_part")
_DISCS = 20
_STEEPEST = 45.0  # degrees: the base runs from left to right
_STRAY = 8.0  # pixels that the contour may leave the base line
_FIRST, _STRIDE = 8.0, 0.5  # pixels: where the walk to the wall begins, and its step


@dataclasses.dataclass(frozen=True)
class Discs:
    """A ventricle in one view, cut into discs: their diameters from base to apex, and their height, mm."""

    diameters: np.ndarray
    height: float


@dataclasses.dataclass(frozen=True)
class Volumes:
    """Of one patient. ``edv`` and ``esv`` in ml; ``ef`` in percent, from the volumes rounded to whole ml."""

    edv: float
    esv: float

    @property
    def rounded(self) -> tuple[float, float]:
        """EDV and ESV in whole ml, half to even."""
        return float(np.rint(self.edv)), float(np.rint(self.esv))

    @property
    def ef(self) -> float:
        """NaN without an end-diastolic volume."""
        edv, esv = self.rounded
        return 100 * (edv - esv) / edv if edv else math.nan


UNKNOWN = Volumes(math.nan, math.nan)


def volumes(
    masks: Mapping[tuple[str, str], tuple[np.ndarray, Sequence[float]]],
    *,
    step: str = "largest",
    contour: str = "official",
) -> Volumes:
    """Volumes of a patient.

    Args:
        masks: for every (view, instant), the mask of the cavity (rows, columns) and the spacing (row, column) in mm.
        step: ``largest``: one height of all discs, as the official code; ``per_instant``: the larger of the two views.
        contour: ``official``: the first contour found; ``largest_part``: only the largest 4-connected part is cut.

    Returns:
        NaN where a mask is empty or shows no base.
    """
    if step not in STEPS or contour not in CONTOURS:
        raise ValueError(f"step={step!r}, contour={contour!r}: expected one of {STEPS} and of {CONTOURS}")
    cut = {key: discs(mask, spacing, contour=contour) for key, (mask, spacing) in masks.items()}
    if any(found is None for found in cut.values()):
        return UNKNOWN
    known = {key: found for key, found in cut.items() if found is not None}
    litres = []
    for instant in INSTANTS:
        two, four = (known[view, instant] for view in VIEWS)
        heights = known.values() if step == "largest" else (two, four)
        height = max(found.height for found in heights)
        litres.append(math.pi / 4 * height * float(two.diameters @ four.diameters) / 1000)
    return Volumes(*litres)


def discs(mask: np.ndarray, spacing: Sequence[float], *, contour: str = "official") -> Discs | None:
    """One view of a ventricle; None where the mask is empty or has no base."""
    from skimage.measure import find_contours

    mask = isotropic(np.asarray(mask, bool), spacing)
    if contour == "largest_part" and mask.any():
        found: Any = label(mask)
        parts = found[0]
        mask = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    usable = mask.any() and min(mask.shape) > 1
    contours = find_contours(mask.astype(np.float64), 0.5) if usable else []
    if not contours or (base := base_line(contours[0])) is None:
        return None
    points = contours[0]
    left, right = base  # indices i > j
    middle = points[int(right + round((left - right) / 2))]
    apex = points[int(np.argmax(((points - middle) ** 2).sum(1)))]
    axis = apex - middle
    length = math.hypot(*axis)
    if not length:
        return None
    normal = np.array([-axis[1], axis[0]]) / length
    widths = [
        sum(_to_wall(mask, middle + axis * (k / _DISCS), sign * normal) for sign in (1, -1)) for k in range(_DISCS)
    ]
    pixel = float(min(spacing))
    return Discs(np.array(widths) * pixel, length * pixel / _DISCS)


def isotropic(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Nearest neighbour at half-pixel centres, onto square pixels of the smaller spacing."""
    index = []
    for n, s in zip(mask.shape, spacing, strict=True):
        new = round(n * float(s) / float(min(spacing)))
        index.append(np.minimum(np.floor((np.arange(new) + 0.5) * n / new).astype(int), n - 1))
    return mask[np.ix_(*index)]


def base_line(points: np.ndarray) -> tuple[int, int] | None:
    """Indices ``i > j`` of the longest chord that may be the base: j lies to the right of i, the chord is no steeper
    than 45 degrees, and the contour between them stays within 8 pixels of its line. Ties: the smallest i, then j."""
    i, j = np.tril_indices(len(points), -1)
    i, j = i[(kept := i >= 2)], j[kept]
    way = points[j] - points[i]
    flat = np.abs(np.degrees(np.arctan2(way[:, 0], way[:, 1]))) <= _STEEPEST
    i, j, way = i[flat], j[flat], way[flat]
    length = np.hypot(way[:, 0], way[:, 1])
    for k in np.lexsort((j, i, -length)):
        between = points[j[k] + 1 : i[k]] - points[i[k]]
        stray = np.abs(between[:, 0] * way[k, 1] - between[:, 1] * way[k, 0]) / length[k] if length[k] else np.inf
        if np.all(stray <= _STRAY):
            return int(i[k]), int(j[k])
    return None


def _to_wall(mask: np.ndarray, start: np.ndarray, direction: np.ndarray) -> float:
    """Pixels from a point to the first place outside the mask or the image, looked for from 8 pixels on."""
    steps = _FIRST + _STRIDE * np.arange(2 * sum(mask.shape))
    at = np.rint(start + steps[:, None] * direction).astype(int)
    within = ((at >= 0) & (at < mask.shape)).all(1)
    inside = np.zeros(len(at), bool)
    inside[within] = mask[tuple(at[within].T)]
    return float(steps[int(np.argmin(inside))])
