"""Overlap and surface-distance metrics of two binary masks (docs/evaluation.md, section "Metrics by name").

Masks are boolean arrays of two or three dimensions. P is the predicted mask and G the reference mask. Distances are in
mm if a `Geometry` with a spacing is given, otherwise in voxels.

The surface of a mask consists of the mask voxels that have a face neighbour (4 in 2D, 6 in 3D) outside the mask. Only
``hd95_surfel`` uses another surface: that of DeepMind's surface-distance package.
"""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure
from scipy.spatial import KDTree

from xdim_jax.data.case import Case, Dataset, annotated_regions
from xdim_jax.data.labels import IGNORE

_MAX_COSINE = 1e-3  # axes count as perpendicular if the cosine of the angle between them is at most this


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The shape of an array and the positions of its voxels.

    Attributes:
        shape: Shape of the array.
        spacing: Distance of neighbouring voxels along each array axis, in mm.
        axes: ``(3, 3)`` matrix whose column k is the step in mm along array axis k. None if the axes are known to be
            perpendicular.
        unscored: Number of voxels that are not scored, because nothing is annotated there.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axes: np.ndarray | None = None
    unscored: int = 0

    @property
    def skewed(self) -> bool:
        """True if two axes are not perpendicular, as in CT with a tilted gantry."""
        if self.axes is None:
            return False
        unit = self.axes / np.linalg.norm(self.axes, axis=0)
        return bool(np.abs(unit.T @ unit - np.eye(len(unit))).max() > _MAX_COSINE)

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in mm^3, or area of a pixel in mm^2."""
        if self.skewed and self.axes is not None:
            return abs(float(np.linalg.det(self.axes)))
        return math.prod(self.spacing)

    @property
    def diagonal(self) -> float:
        """Length of the longest diagonal of the whole image, in mm."""
        sides = _step_matrix(self) * self.shape  # column k is the side along axis k
        signs = itertools.product((1, -1), repeat=len(self.shape))
        return max(math.hypot(*(sides @ sign)) for sign in signs)


def voxel_geometry(shape: Sequence[int]) -> Geometry:
    """Return a geometry with spacing 1, in which distances are numbers of voxels."""
    return Geometry(tuple(shape), (1.0,) * len(shape))


def surface(mask: np.ndarray, *, border: bool) -> np.ndarray:
    """Return the mask voxels that have a face neighbour outside the mask.

    Args:
        mask: Boolean array.
        border: True if positions beyond the edge of the array count as outside the mask.

    Returns:
        Boolean array of the same shape.
    """
    inside: Any = binary_erosion(mask, generate_binary_structure(mask.ndim, 1), border_value=0 if border else 1)
    return mask & ~inside


def surface_distances(
    pred: np.ndarray, ref: np.ndarray, geometry: Geometry | None = None, *, border: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of every surface voxel of one mask to the nearest surface voxel of the other mask.

    Only the bounding box of both masks is searched. The box has a margin of one voxel, except at the edge of the image,
    so the surfaces are those of the whole image.

    Args:
        pred: Predicted mask P.
        ref: Reference mask G, of the same shape.
        geometry: Positions of the voxels. None for distances in voxels.
        border: True if positions beyond the edge of the image count as outside a mask.

    Returns:
        Distances from P to G, and distances from G to P. Both are empty if a mask has no surface: it is empty or, with
        ``border=False``, fills the image.
    """
    if not pred.any() or not ref.any():
        return np.zeros(0), np.zeros(0)
    geometry = geometry or voxel_geometry(pred.shape)
    box = bounding_box(pred | ref, margin=1)
    pred, ref = pred[box], ref[box]
    surface_p, surface_g = surface(pred, border=border), surface(ref, border=border)
    if not surface_p.any() or not surface_g.any():
        return np.zeros(0), np.zeros(0)
    # a distance map is correct only for perpendicular axes
    use_tree = geometry.skewed or _tree_is_faster(pred, ref, surface_p, surface_g)
    nearest = _nearest_by_tree if use_tree else _nearest_by_map
    return _distances(surface_p, surface_g, geometry, nearest), _distances(surface_g, surface_p, geometry, nearest)


def _tree_is_faster(pred: np.ndarray, ref: np.ndarray, surface_p: np.ndarray, surface_g: np.ndarray) -> bool:
    """Return whether a KD-tree is expected to find nearest surface voxels faster than a distance map of the box."""
    # The rule uses counts only, so the same pair of masks is always measured in the same way. Its constants come
    # from measurements on pairs of ellipsoids, shells, cuboids and noise in 150^3 voxels, and on 2D masks. A map takes
    # 20 to 60 ns per voxel of the box. A query of the tree takes 0.5 to 3 us between the surfaces of similar masks, but
    # up to 270 us from a curved surface to a distant flat face, where many voxels are almost equally near.
    count_p, count_g = np.count_nonzero(surface_p), np.count_nonzero(surface_g)
    # few surface voxels: even comparing all pairs (2 ns each) takes no longer than a map, and the tree is faster
    if count_p * count_g <= 16 * pred.size:
        return True
    if 10 * (count_p + count_g) > pred.size:  # a large part of the box is surface, e.g. in noise
        return False
    # differing voxels / voxels of both surfaces is roughly half the distance between the surfaces, in voxels
    distant = np.count_nonzero(pred ^ ref) > 3 * (count_p + count_g)
    return not (distant and (_is_flat(surface_p) or _is_flat(surface_g)))


def _is_flat(mask: np.ndarray) -> bool:
    """Return whether one plane of the array (one line in 2D) contains more than a tenth of the voxels of a surface.

    The largest face of a cuboid has at least a sixth of its surface. For a ball with a radius of 15 voxels or more, a
    plane contains at most 6 %.
    """
    other_axes = [tuple(a for a in range(mask.ndim) if a != axis) for axis in range(mask.ndim)]
    largest = max(int(np.count_nonzero(mask, axis=axes).max()) for axes in other_axes)
    return 10 * largest > int(np.count_nonzero(mask))


def _distances(
    source: np.ndarray,
    target: np.ndarray,
    geometry: Geometry,
    nearest: Callable[[np.ndarray, np.ndarray, Geometry], np.ndarray],
) -> np.ndarray:
    """Return the distance of every voxel of one surface to the nearest voxel of another.

    The distance is computed from the difference of the two voxel indices. Pairs of voxels with the same difference
    therefore have bitwise equal distances, whichever function has found the nearest voxel.
    """
    points = np.argwhere(source)
    return np.linalg.norm((points - nearest(points, target, geometry)) @ _step_matrix(geometry).T, axis=1)


def _nearest_by_tree(points: np.ndarray, target: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return the indices ``(n, ndim)`` of the voxels of a surface that are nearest to points ``(n, ndim)``."""
    step, candidates = _step_matrix(geometry), np.argwhere(target)
    # in measurements, a balanced and compact tree was rarely faster
    tree = KDTree(candidates @ step.T, balanced_tree=False, compact_nodes=False)
    return candidates[tree.query(points @ step.T)[1]]


def _nearest_by_map(points: np.ndarray, target: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return the same as `_nearest_by_tree`, from a distance map of the whole box. The axes must be perpendicular."""
    index: Any = distance_transform_edt(~target, sampling=geometry.spacing, return_distances=False, return_indices=True)
    return index[(slice(None), *points.T)].T


def _step_matrix(geometry: Geometry) -> np.ndarray:
    """Return the matrix whose column k is the step in mm along array axis k; diagonal unless the axes are skewed."""
    return geometry.axes if geometry.skewed and geometry.axes is not None else np.diag(geometry.spacing)


def bounding_box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    """Return the smallest box around a mask that is not empty, enlarged by a margin but not beyond the array."""
    box = []
    for axis, n in enumerate(mask.shape):
        profile = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(int(profile[0]) - margin, 0), min(int(profile[-1]) + 1 + margin, n)))
    return tuple(box)


class Pair:
    """A predicted mask and a reference mask. Distances are computed only once for all metrics.

    Args:
        pred: Predicted mask P, boolean.
        ref: Reference mask G, boolean, of the same shape.
        geometry: Positions of the voxels. None for distances in voxels.
        border: True if positions beyond the edge of the image count as outside a mask, so that mask voxels at the edge
            are surface (MedPy, CAMUS, BraTS). False if they count as inside (CHAOS).

    Attributes:
        tp: Number of voxels in both masks.
        p: Number of voxels in P.
        g: Number of voxels in G.

    Raises:
        ValueError: The masks differ in shape.
    """

    def __init__(self, pred: np.ndarray, ref: np.ndarray, geometry: Geometry | None = None, *, border: bool = True):
        if pred.shape != ref.shape:
            raise ValueError(f"prediction {pred.shape} and reference {ref.shape} differ in shape")
        self.pred, self.ref, self.border = pred, ref, border
        self.geometry = geometry or voxel_geometry(pred.shape)
        self.tp = int(np.count_nonzero(pred & ref))
        self.p, self.g = int(np.count_nonzero(pred)), int(np.count_nonzero(ref))

    @functools.cached_property
    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """Result of `surface_distances`: distances from P to G and from G to P."""
        return surface_distances(self.pred, self.ref, self.geometry, border=self.border)

    @functools.cached_property
    def surfels(self) -> dict[str, Any]:
        """Result of ``surface_distance.compute_surface_distances`` (DeepMind). Both masks must have voxels.

        The package does not support skewed axes: it computes distances as if the axes were perpendicular.
        """
        import surface_distance

        box = bounding_box(self.pred | self.ref, margin=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the package uses SciPy names that SciPy 2 removes
            return surface_distance.compute_surface_distances(
                self.ref[box], self.pred[box], tuple(map(float, self.geometry.spacing))
            )


def _ratio(part: Any, whole: Any) -> float:
    """Return a quotient; NaN if the divisor is 0."""
    return float(part / whole) if whole else math.nan


def dice(pred: np.ndarray, ref: np.ndarray) -> float:
    """Return the Dice score ``2 |P and G| / (|P| + |G|)`` of two masks; NaN if both are empty."""
    return _ratio(2 * np.count_nonzero(pred & ref), np.count_nonzero(pred) + np.count_nonzero(ref))


def _specificity(pair: Pair) -> float:
    """Return the fraction of the scored voxels outside G that are also outside P; NaN if there is none outside G."""
    negative = pair.ref.size - pair.geometry.unscored - pair.g
    return _ratio(negative - (pair.p - pair.tp), negative)


def _millilitres(pair: Pair, count: int) -> float:
    """Return the volume of a number of voxels in ml; NaN for 2D masks."""
    return count * pair.geometry.voxel_volume / 1000 if pair.ref.ndim == 3 else math.nan


def _directed(function: Callable[[np.ndarray, np.ndarray], Any]) -> Callable[[Pair], float]:
    """Return a metric: a function of the distances from P to G and from G to P; NaN if a mask has no surface."""
    return lambda pair: float(function(*pair.distances)) if pair.distances[0].size else math.nan


def _pooled(function: Callable[[np.ndarray], Any]) -> Callable[[Pair], float]:
    """Return a metric: a function of the distances of both directions in one array; NaN if a mask has no surface."""
    return _directed(lambda p, g: function(np.concatenate([p, g])))


def _hd95_surfel(pair: Pair) -> float:
    """Return HD95 of DeepMind's surface-distance, which weights distances by area; NaN if a mask is empty."""
    if not pair.p or not pair.g:
        return math.nan
    import surface_distance

    return float(surface_distance.compute_robust_hausdorff(pair.surfels, 95))


def _nsd(tolerance: float) -> Callable[[Pair], float]:
    """Return a metric: the normalised surface Dice (NSD) at ``tolerance`` mm, as the mean of two fractions.

    For each mask, this is the fraction of its surface voxels that are at most ``tolerance`` mm from the other surface.
    Rounding errors of the voxel size, as in an oblique affine, do not matter.
    """
    limit = tolerance * (1 + 1e-5)
    return _directed(lambda p, g: (np.mean(p <= limit) + np.mean(g <= limit)) / 2)


def _larger_percentile(p: np.ndarray, g: np.ndarray) -> Any:
    """Return the larger of the 95th percentiles of the two directions."""
    return max(np.percentile(p, 95), np.percentile(g, 95))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a pair of masks.

    Attributes:
        title: Column title in tables.
        unit: Unit of the value; empty if it has none.
        digits: Number of decimals in tables.
        higher_is_better: True or False; None if neither higher nor lower values are better.
        measure: Function that returns the value for a pair; NaN if the metric is not defined for it.
    """

    title: str
    unit: str
    digits: int
    higher_is_better: bool | None
    measure: Callable[[Pair], float]


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "", 3, True, lambda m: _ratio(2 * m.tp, m.p + m.g)),
    "iou": Metric("IoU", "", 3, True, lambda m: _ratio(m.tp, m.p + m.g - m.tp)),
    "sensitivity": Metric("sensitivity", "", 3, True, lambda m: _ratio(m.tp, m.g)),
    "specificity": Metric("specificity", "", 4, True, _specificity),
    "precision": Metric("precision", "", 3, True, lambda m: _ratio(m.tp, m.p)),
    "ravd": Metric("RAVD", "%", 2, False, lambda m: _ratio(100 * abs(m.p - m.g), m.g)),
    "assd_mean": Metric("ASSD (mean of two)", "mm", 2, False, _directed(lambda p, g: (p.mean() + g.mean()) / 2)),
    "assd_pooled": Metric("ASSD (pooled)", "mm", 2, False, _pooled(np.mean)),
    "hd": Metric("HD", "mm", 2, False, _pooled(np.max)),
    "hd95_pooled": Metric("HD95 (pooled)", "mm", 2, False, _pooled(lambda d: np.percentile(d, 95))),
    "hd95_maxdir": Metric("HD95 (max of two)", "mm", 2, False, _directed(_larger_percentile)),
    "hd95_surfel": Metric("HD95 (surfels)", "mm", 2, False, _hd95_surfel),
    "nsd_0.5": Metric("NSD at 0.5 mm", "", 3, True, _nsd(0.5)),
    "nsd_1.0": Metric("NSD at 1 mm", "", 3, True, _nsd(1.0)),
    "nsd_2.0": Metric("NSD at 2 mm", "", 3, True, _nsd(2.0)),
    "volume": Metric("volume", "ml", 2, None, lambda m: _millilitres(m, m.p)),
    "volume_ref": Metric("volume of the reference", "ml", 2, None, lambda m: _millilitres(m, m.g)),
}  # fmt: skip


def measure(pair: Pair, names: Sequence[str]) -> dict[str, float]:
    """Return the named metrics of a pair. Raises KeyError for a name that is not in `METRICS`."""
    return {name: METRICS[name].measure(pair) for name in names}


def region_dice(dataset: Dataset, case: Case, label: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the Dice of every region that is annotated in a case; NaN for a region that is empty in both.

    Args:
        dataset: Data set of the case.
        case: The case.
        label: Predicted label indices (D, H, W).
        truth: Label indices of the reference; voxels that are not annotated do not count.
    """
    return dice_of_counts(dataset, case, count_labels(label, truth))


def count_labels(label: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the numbers of voxels (256, 256) by label index in ``label`` and in ``truth``, which are uint8 arrays."""
    counts = np.zeros(2**16, np.int64)
    # plane by plane, because bincount needs 8 bytes per voxel
    for plane, other in zip(np.atleast_2d(label), np.atleast_2d(truth), strict=True):
        counts += np.bincount((plane.astype(np.uint16) << 8 | other).ravel(), minlength=2**16)
    return counts.reshape(256, 256)


def dice_of_counts(dataset: Dataset, case: Case, counts: np.ndarray) -> dict[str, float]:
    """Return the values of `region_dice`, given the result of `count_labels`."""
    shown, found = annotated_regions(dataset, case), {}
    for name, labels in dataset.regions.sets.items():
        inside = list(labels)
        pred = counts[inside].sum() - counts[inside, IGNORE].sum()
        if name in shown:
            found[name] = _ratio(2 * counts[np.ix_(inside, inside)].sum(), pred + counts[:, inside].sum())
    return found
