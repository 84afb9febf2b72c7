"""Volumes of the left ventricle by Simpson's biplane rule, as CAMUS computes them (docs/challenges.md).

Two peculiarities of the official code are kept, because the ejection fractions of the challenge come from it:

- No half-width of a disc is below 8 pixels.
- All discs of a patient have the same height, also those at end-systole, where the ventricle is shorter. The
  end-systolic volume is therefore computed with the end-diastolic length.
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
_MAX_SLOPE = 45.0  # largest angle between the base and the horizontal, in degrees
_MAX_DEVIATION = 8.0  # largest distance of the contour from the line of the base, in pixels
_SMALLEST_PART = 0.5  # the first contour must enclose at least this fraction of the cavity
_LARGEST_ML = 600.0  # largest plausible volume of a left ventricle
_SEARCH_START, _SEARCH_STEP = 8.0, 0.5  # the wall is searched at distances of 8, 8.5, 9, ... pixels from the axis


@dataclasses.dataclass(frozen=True)
class Discs:
    """A ventricle in one view, divided into discs perpendicular to its long axis.

    Attributes:
        diameters: Diameters of the discs in mm, ordered from base to apex.
        height: Height of a disc, in mm.
    """

    diameters: np.ndarray
    height: float


@dataclasses.dataclass(frozen=True)
class Volumes:
    """Volumes of the left ventricle of one patient.

    Attributes:
        edv: End-diastolic volume in ml.
        esv: End-systolic volume in ml.
        reason: Why the volumes are NaN; empty if they are not.
    """

    edv: float
    esv: float
    reason: str = ""

    @property
    def implausible(self) -> str:
        """The volumes as text if they are not 0 < ESV < EDV < 600 ml; else empty."""
        if self.reason or 0 < self.esv < self.edv < _LARGEST_ML:
            return ""
        return f"EDV {self.edv:.0f} ml, ESV {self.esv:.0f} ml"

    @property
    def rounded(self) -> tuple[float, float]:
        """EDV and ESV in ml, rounded to integers, half to even."""
        return float(np.rint(self.edv)), float(np.rint(self.esv))

    @property
    def ef(self) -> float:
        """Ejection fraction in percent, computed from the rounded volumes. NaN if the EDV is 0."""
        edv, esv = self.rounded
        return 100 * (edv - esv) / edv if edv else math.nan


def volumes(
    masks: Mapping[tuple[str, str], tuple[np.ndarray, Sequence[float]]],
    *,
    step: str = "largest",
    contour: str = "official",
) -> Volumes:
    """Compute the volumes of a patient.

    Args:
        masks: (view, instant) -> mask of the cavity (rows, columns), and spacing (row, column) in mm. All four
            combinations of view and instant are needed.
        step: Height of the discs. "largest" for the largest height of the four masks, as in the official code;
            "per_instant" for the larger height of the two views at each instant.
        contour: Part of the cavity that is divided into discs. "official" for the first contour that is found, as in
            the official code; "largest_part" for the largest 4-connected part.

    Returns:
        The volumes; NaN, with a reason, if a mask cannot be divided into discs, see `discs`.

    Raises:
        ValueError: ``step`` or ``contour`` is unknown.
    """
    if step not in STEPS or contour not in CONTOURS:
        raise ValueError(f"step={step!r}, contour={contour!r}: expected one of {STEPS} and one of {CONTOURS}")
    divided = {key: discs(mask, spacing, contour=contour) for key, (mask, spacing) in masks.items()}
    reasons = [f"{' '.join(key)}: {found}" for key, found in divided.items() if isinstance(found, str)]
    if reasons:
        return Volumes(math.nan, math.nan, "; ".join(reasons))
    known = {key: found for key, found in divided.items() if isinstance(found, Discs)}
    millilitres = []
    for instant in INSTANTS:
        two, four = (known[view, instant] for view in VIEWS)
        heights = known.values() if step == "largest" else (two, four)
        height = max(found.height for found in heights)
        millilitres.append(math.pi / 4 * height * float(two.diameters @ four.diameters) / 1000)
    return Volumes(*millilitres)


def discs(mask: np.ndarray, spacing: Sequence[float], *, contour: str = "official") -> Discs | str:
    """Divide the ventricle in one view into discs.

    Args:
        mask: Mask of the cavity (rows, columns).
        spacing: Spacing (row, column) in mm.
        contour: See `volumes`.

    Returns:
        The discs; or a reason, if the mask is empty, has no base, consists of a single point, or if the first contour
        encloses less than half of the cavity. The volume would then be that of a stray piece.
    """
    from skimage.measure import find_contours

    mask = resample_isotropic(np.asarray(mask, bool), spacing)
    if contour == "largest_part" and mask.any():
        found: Any = label(mask)
        parts = found[0]
        mask = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    usable = mask.any() and min(mask.shape) > 1
    contours = find_contours(mask.astype(np.float64), 0.5) if usable else []
    if not contours:
        return "there is no cavity"
    points = contours[0]
    if (share := _enclosed_share(mask, points)) < _SMALLEST_PART:
        return f"the first contour encloses a stray piece with {100 * share:.0f} % of the cavity"
    if (base := base_line(points)) is None:
        return "the contour has no base"
    left, right = base  # indices of the contour points at its ends; left > right
    middle = points[int(right + round((left - right) / 2))]
    apex = points[int(np.argmax(((points - middle) ** 2).sum(1)))]
    axis = apex - middle
    length = math.hypot(*axis)
    if not length:
        return "the contour is a single point"
    normal = np.array([-axis[1], axis[0]]) / length
    widths = [
        sum(_distance_to_wall(mask, middle + axis * (k / _DISCS), sign * normal) for sign in (1, -1))
        for k in range(_DISCS)
    ]
    pixel = float(min(spacing))
    return Discs(np.array(widths) * pixel, length * pixel / _DISCS)


def _enclosed_share(mask: np.ndarray, contour: np.ndarray) -> float:
    """Return the fraction of a mask in the 4-connected part that a contour encloses.

    The contour lies half a pixel outside the part.
    """
    found: Any = label(mask)
    parts = found[0]
    inside = [np.floor(contour).astype(int), np.ceil(contour).astype(int)]
    numbers = np.concatenate([parts[tuple(points.T)] for points in inside])
    numbers = numbers[numbers > 0]
    if not numbers.size:
        return 0.0
    return float((parts == np.bincount(numbers).argmax()).sum() / mask.sum())


def resample_isotropic(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Resample a mask to square pixels of the smaller spacing, by nearest neighbour at the centres of the pixels."""
    index = []
    for n, s in zip(mask.shape, spacing, strict=True):
        new = round(n * float(s) / float(min(spacing)))
        index.append(np.minimum(np.floor((np.arange(new) + 0.5) * n / new).astype(int), n - 1))
    return mask[np.ix_(*index)]


def base_line(points: np.ndarray) -> tuple[int, int] | None:
    """Find the base: the longest chord of a contour that satisfies three conditions.

    The chord runs from left to right, from point i to point j with i > j. It is at most 45 degrees steep. The contour
    points between its ends are within 8 pixels of its line.

    Args:
        points: Contour points ``(n, 2)`` as (row, column).

    Returns:
        The indices (i, j). Of chords of equal length, the one with the smallest i, then j. None if there is no base.
    """
    i, j = np.tril_indices(len(points), -1)
    i, j = i[(kept := i >= 2)], j[kept]
    chord = points[j] - points[i]
    admissible = np.abs(np.degrees(np.arctan2(chord[:, 0], chord[:, 1]))) <= _MAX_SLOPE
    i, j, chord = i[admissible], j[admissible], chord[admissible]
    length = np.hypot(chord[:, 0], chord[:, 1])
    for k in np.lexsort((j, i, -length)):
        between = points[j[k] + 1 : i[k]] - points[i[k]]
        cross = np.abs(between[:, 0] * chord[k, 1] - between[:, 1] * chord[k, 0])
        deviation = cross / length[k] if length[k] else np.inf
        if np.all(deviation <= _MAX_DEVIATION):
            return int(i[k]), int(j[k])
    return None


def _distance_to_wall(mask: np.ndarray, start: np.ndarray, direction: np.ndarray) -> float:
    """Return the distance in pixels from a point to the first position outside the mask or the image, at least 8."""
    steps = _SEARCH_START + _SEARCH_STEP * np.arange(2 * sum(mask.shape))
    at = np.rint(start + steps[:, None] * direction).astype(int)
    within = ((at >= 0) & (at < mask.shape)).all(1)
    inside = np.zeros(len(at), bool)
    inside[within] = mask[tuple(at[within].T)]
    return float(steps[int(np.argmin(inside))])
