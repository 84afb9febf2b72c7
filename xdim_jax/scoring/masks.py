"""Metrics of a predicted and a reference mask (docs/evaluation.md, section Metrics by name).

Masks are boolean arrays of any rank. Distances are in mm when a spacing is given, else in voxels. A surface is the mask
without its erosion by the cross (4 neighbours in 2D, 6 in 3D); all surfaces but those of `hd95_surfel` are voxels.
"""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure
from scipy.spatial import KDTree

_TRIED = 50  # queries of a tree, for their time
_MAP_SECONDS = 2e-7  # for each voxel of a distance map
_SKEW = 1e-3  # largest cosine between two axes that count as perpendicular


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the voxels of an array lie.

    Attributes:
        shape: of the array.
        spacing: distance of neighbours along each array axis, mm.
        axes: ``(3, 3)``, column k the step in mm along array axis k, where these may be skewed; else None.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axes: np.ndarray | None = None

    @property
    def skewed(self) -> bool:
        """Whether two axes are not perpendicular (a tilted gantry)."""
        if self.axes is None:
            return False
        unit = self.axes / np.linalg.norm(self.axes, axis=0)
        return bool(np.abs(unit.T @ unit - np.eye(len(unit))).max() > _SKEW)

    @property
    def voxel(self) -> float:
        """Volume of a voxel (area of a pixel), in mm."""
        return (
            abs(float(np.linalg.det(self.axes))) if self.skewed and self.axes is not None else math.prod(self.spacing)
        )

    @property
    def diagonal(self) -> float:
        """Of the whole image, mm."""
        return math.hypot(*(n * s for n, s in zip(self.shape, self.spacing, strict=True)))


def voxels(shape: Sequence[int]) -> Geometry:
    """A grid whose unit is the voxel."""
    return Geometry(tuple(shape), (1.0,) * len(shape))


def surface(mask: np.ndarray, *, border: bool) -> np.ndarray:
    """Mask voxels with a face neighbour outside the mask; ``border``: beyond the array's edge counts as outside."""
    inside: Any = binary_erosion(mask, generate_binary_structure(mask.ndim, 1), border_value=0 if border else 1)
    return mask & ~inside


def surface_distances(
    pred: np.ndarray, ref: np.ndarray, geometry: Geometry | None = None, *, border: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from every surface voxel of P to the nearest of G, and from G to P.

    Works in the bounding box of both masks with a margin of one voxel, kept inside the image so that a real image
    edge stays one: exact, and many times faster. Without a surface (an empty mask; with ``border`` off, one that fills
    the image) both lists are empty.
    """
    if not pred.any() or not ref.any():
        return np.zeros(0), np.zeros(0)
    geometry = geometry or voxels(pred.shape)
    box = bounding_box(pred | ref, margin=1)
    surface_p, surface_g = surface(pred[box], border=border), surface(ref[box], border=border)
    if not surface_p.any() or not surface_g.any():
        return np.zeros(0), np.zeros(0)
    return _to_nearest(surface_p, surface_g, geometry), _to_nearest(surface_g, surface_p, geometry)


def _to_nearest(surface: np.ndarray, other: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Distances from every voxel of a surface to the nearest of another; of whole steps, so that voxels that lie
    equally far apart have equal distances.

    A tree of surface voxels is mostly much faster than a distance map of the box, but slower where many are about
    equally near, as the faces of a mask that fills the image are: some voxels are tried first.
    """
    points, others = np.argwhere(surface), np.argwhere(other)
    step = geometry.axes if geometry.skewed and geometry.axes is not None else np.diag(geometry.spacing)
    tree, places = KDTree(others @ step.T, balanced_tree=False, compact_nodes=False), points @ step.T
    begin = time.perf_counter()
    tree.query(places[:: -(-len(points) // _TRIED)])
    seconds = (time.perf_counter() - begin) * len(points) / _TRIED
    if seconds < _MAP_SECONDS * surface.size or geometry.skewed:
        nearest = others[tree.query(places)[1]]
    else:
        index: Any = distance_transform_edt(
            ~other, sampling=geometry.spacing, return_distances=False, return_indices=True
        )
        nearest = index[:, surface].T
    return np.linalg.norm((points - nearest) @ step.T, axis=1)


def bounding_box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty, with a margin that ends at the image's edges."""
    box = []
    for axis, n in enumerate(mask.shape):
        profile = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(int(profile[0]) - margin, 0), min(int(profile[-1]) + 1 + margin, n)))
    return tuple(box)


class Pair:
    """A predicted and a reference mask; what several metrics need is found once, when the first asks.

    Args:
        pred, ref: boolean, of one shape.
        geometry: mm; None: voxels.
        border: beyond the image's edge counts as outside, so mask voxels there are surface (MedPy, CAMUS, BraTS); off:
            they are not (CHAOS).
    """

    def __init__(self, pred: np.ndarray, ref: np.ndarray, geometry: Geometry | None = None, *, border: bool = True):
        if pred.shape != ref.shape:
            raise ValueError(f"prediction {pred.shape} and reference {ref.shape} differ in shape")
        self.pred, self.ref, self.border = pred, ref, border
        self.geometry = geometry or voxels(pred.shape)
        self.tp = int(np.count_nonzero(pred & ref))
        self.p, self.g = int(np.count_nonzero(pred)), int(np.count_nonzero(ref))

    @functools.cached_property
    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """Of `surface_distances`; empty lists where a mask has no surface."""
        return surface_distances(self.pred, self.ref, self.geometry, border=self.border)

    @functools.cached_property
    def surfels(self) -> dict[str, Any]:
        """Distances and areas by DeepMind's surface-distance, in the bounding box of two masks that are not empty."""
        import surface_distance

        box = bounding_box(self.pred | self.ref, margin=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # names that SciPy 2 will drop
            return surface_distance.compute_surface_distances(
                self.ref[box], self.pred[box], tuple(map(float, self.geometry.spacing))
            )


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else math.nan


def dice(pred: np.ndarray, ref: np.ndarray) -> float:
    """``2 |P and G| / (|P| + |G|)``; NaN when both are empty, for the caller's rule to decide."""
    return _ratio(2 * np.count_nonzero(pred & ref), np.count_nonzero(pred) + np.count_nonzero(ref))


def _specificity(pair: Pair) -> float:
    negative = pair.ref.size - pair.g
    return _ratio(negative - (pair.p - pair.tp), negative)


def _millilitres(pair: Pair, count: int) -> float:
    """NaN for planes."""
    return count * pair.geometry.voxel / 1000 if pair.ref.ndim == 3 else math.nan


def _of_distances(measure: Callable[[np.ndarray, np.ndarray], Any]) -> Callable[[Pair], float]:
    """Of the two directed lists; NaN where a mask has no surface."""
    return lambda pair: float(measure(*pair.distances)) if pair.distances[0].size else math.nan


def _of_all(measure: Callable[[np.ndarray], Any]) -> Callable[[Pair], float]:
    """Of both lists put together."""
    return _of_distances(lambda to_ref, to_pred: measure(np.concatenate([to_ref, to_pred])))


def _hd95_surfel(pair: Pair) -> float:
    if not pair.p or not pair.g:
        return math.nan
    import surface_distance

    return float(surface_distance.compute_robust_hausdorff(pair.surfels, 95))


def _nsd(tolerance: float) -> Callable[[Pair], float]:
    return _of_distances(lambda p, g: (np.mean(p <= tolerance) + np.mean(g <= tolerance)) / 2)


def _higher_of_two(p: np.ndarray, g: np.ndarray) -> Any:
    return max(np.percentile(p, 95), np.percentile(g, 95))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric by name.

    Attributes:
        title: of a table's column.
        unit: of its values.
        digits: that a table shows.
        higher: is better; None for numbers that are neither.
        measure: of a pair of masks; NaN where it is not defined for them.
    """

    title: str
    unit: str
    digits: int
    higher: bool | None
    measure: Callable[[Pair], float]


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "", 3, True, lambda m: _ratio(2 * m.tp, m.p + m.g)),
    "iou": Metric("IoU", "", 3, True, lambda m: _ratio(m.tp, m.p + m.g - m.tp)),
    "sensitivity": Metric("sensitivity", "", 3, True, lambda m: _ratio(m.tp, m.g)),
    "specificity": Metric("specificity", "", 4, True, _specificity),
    "precision": Metric("precision", "", 3, True, lambda m: _ratio(m.tp, m.p)),
    "ravd": Metric("RAVD", "%", 2, False, lambda m: _ratio(100 * abs(m.p - m.g), m.g)),
    "assd_mean": Metric("ASSD (mean of two)", "mm", 2, False, _of_distances(lambda p, g: (p.mean() + g.mean()) / 2)),
    "assd_pooled": Metric("ASSD (pooled)", "mm", 2, False, _of_all(np.mean)),
    "hd": Metric("HD", "mm", 2, False, _of_all(np.max)),
    "hd95_pooled": Metric("HD95 (pooled)", "mm", 2, False, _of_all(lambda d: np.percentile(d, 95))),
    "hd95_maxdir": Metric("HD95 (max of two)", "mm", 2, False, _of_distances(_higher_of_two)),
    "hd95_surfel": Metric("HD95 (surfels)", "mm", 2, False, _hd95_surfel),
    "nsd_0.5": Metric("NSD at 0.5 mm", "", 3, True, _nsd(0.5)),
    "nsd_1.0": Metric("NSD at 1 mm", "", 3, True, _nsd(1.0)),
    "nsd_2.0": Metric("NSD at 2 mm", "", 3, True, _nsd(2.0)),
    "volume": Metric("volume", "ml", 2, None, lambda m: _millilitres(m, m.p)),
    "volume_ref": Metric("volume of the reference", "ml", 2, None, lambda m: _millilitres(m, m.g)),
}  # fmt: skip


def measure(pair: Pair, names: Sequence[str]) -> dict[str, float]:
    """The named metrics of a pair. Raises KeyError for an unknown name."""
    return {name: METRICS[name].measure(pair) for name in names}
