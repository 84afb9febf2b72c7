"""Regions: named sets of labels that a network predicts, such as the nested regions of BraTS.

In memory a label map contains indices of the structures of a data set. The values in its files (in BraTS, 4 is ET up to
2022 and a resection cavity in 2024) are converted by `xdim_jax.data.labels`. A network predicts one channel per region,
and regions may be nested. docs/challenges.md, section "BraTS: labels and regions", describes the regions of BraTS.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import find_objects
from scipy.ndimage import label as connected


@dataclasses.dataclass(frozen=True)
class Regions:
    """Named sets of label indices, any two of which are disjoint or nested.

    Every region has exactly one own label: a label that belongs to none of the regions nested inside it. Therefore
    predicted regions can be converted to a label map.

    Attributes:
        sets: Label indices of each region, in the order of the network's channels.

    Raises:
        ValueError: Two regions are equal or overlap in part, or a region does not have exactly one own label.
    """

    sets: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        items = [(name, set(labels)) for name, labels in self.sets.items()]
        for i, (name, labels) in enumerate(items):
            for other, rest in items[:i]:
                if labels == rest or (labels & rest and not (labels < rest or rest < labels)):
                    raise ValueError(f"regions {other} {sorted(rest)} and {name} {sorted(labels)} overlap")
        for name, labels in items:
            inner = set().union(*(rest for _, rest in items if rest < labels))
            if len(labels - inner) != 1:
                raise ValueError(
                    f"region {name}: the labels {sorted(labels - inner)} belong to no region nested inside it; "
                    "expected exactly one such label, so that a label map can be computed from predicted regions"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the channels."""
        return tuple(self.sets)

    def own_label(self, name: str) -> int:
        """Return the label of a region that belongs to none of the regions nested inside it."""
        labels = set(self.sets[name])
        return (labels - set().union(*(set(v) for v in self.sets.values() if set(v) < labels))).pop()

    def enclosing_label(self, name: str) -> int:
        """Return the own label of the smallest region that encloses this one; 0 if there is none."""
        inner = set(self.sets[name])
        enclosing = [other for other, labels in self.sets.items() if inner < set(labels)]
        return self.own_label(min(enclosing, key=lambda other: len(self.sets[other]))) if enclosing else 0

    @functools.cached_property
    def _forest(self) -> list["_Node"]:
        """The outermost regions, as the roots of trees of nested regions."""

        def inside(outer: set[int] | None) -> list[_Node]:
            below = [(c, set(v)) for c, v in enumerate(self.sets.values()) if outer is None or set(v) < outer]
            nodes = []
            for channel, labels in below:
                if any(labels < other for _, other in below):
                    continue
                inner = set().union(*(other for _, other in below if other < labels))
                nodes.append(_Node(channel, (labels - inner).pop(), inside(labels)))
            return nodes

        return inside(None)

    def encode(self, label: Any, xp: Any = np) -> Any:
        """Convert a label map ``(..., D, H, W)`` to masks ``bool (..., D, H, W, R)``.

        Args:
            label: Label indices.
            xp: Array library: numpy, or ``jax.numpy`` inside a jitted program.
        """
        return xp.stack([self.mask(label, name) for name in self.names], -1)

    def mask(self, label: Any, name: str) -> Any:
        """Return the mask of a region, of the same shape as a label map."""
        # comparisons instead of isin, which flattens arrays that are sharded over several devices
        return functools.reduce(operator.or_, (label == i for i in self.sets[name]))

    def decode(self, scores: Any, threshold: float | Mapping[str, float] = 0.5, xp: Any = np) -> Any:
        """Convert scores to a label map.

        Outer regions are written first and inner regions over them, so that predicted regions become nested (paper,
        Sect. 3.1.3: ET is kept unaltered, NCR is extracted from TC and ED from WT). A voxel can belong to only
        one of several disjoint regions: that with the largest score, where a region has the largest score of itself and
        all regions inside it (the first one if these are equal). It belongs to this region if the score of the region
        itself is above its threshold.

        Args:
            scores: Probabilities or masks ``(..., R)``.
            threshold: Score above which a voxel is in a region: one number for all regions, or one for each by name.
            xp: Array library: numpy, or ``jax.numpy`` inside a jitted program.

        Returns:
            Label indices, uint8 ``(...)``.
        """
        limits = threshold if isinstance(threshold, Mapping) else dict.fromkeys(self.names, threshold)

        def write(label: Any, nodes: list[_Node], where: Any) -> Any:
            highest = [functools.reduce(xp.maximum, (scores[..., c] for c in n.channels)) for n in nodes]
            best = xp.argmax(xp.stack(highest), 0) if len(nodes) > 1 else None
            for i, node in enumerate(nodes):
                here = where if best is None else best == i if where is None else where & (best == i)
                inside = scores[..., node.channel] > limits[self.names[node.channel]]
                label = xp.where(inside if here is None else inside & here, np.uint8(node.label), label)
                if node.inner:
                    label = write(label, node.inner, here)
            return label

        return write(xp.zeros(scores.shape[:-1], np.uint8), self._forest, None)


@dataclasses.dataclass(frozen=True)
class _Node:
    """A region: its channel, its own label, and the regions directly inside it."""

    channel: int
    label: int
    inner: list["_Node"]

    @property
    def channels(self) -> list[int]:
        """The channels of this region and of all regions inside it."""
        return [self.channel, *(c for node in self.inner for c in node.channels)]


# BraTS: indices of the tissues, and the regions; each region is a part of the one before it
TISSUES = ("background", "NCR", "ED", "ET")
NCR, ED, ET, RC = 1, 2, 3, 4  # RC: resection cavity, since 2024, not a part of the other regions
BRATS = Regions({"WT": (NCR, ED, ET), "TC": (NCR, ET), "ET": (ET,)})
BRATS_2024 = Regions({**BRATS.sets, "RC": (RC,)})


def keep_largest(label: np.ndarray, regions: Regions, names: Sequence[str]) -> np.ndarray:
    """Keep only the largest 26-connected component of each named region.

    The other components get the enclosing region's own label, or become background if there is no enclosing region.

    Args:
        label: Label indices (D, H, W).
        regions: Regions of the label map.
        names: Names of the regions.

    Returns:
        A changed copy; ``label`` itself if there are no names.
    """
    if not names:
        return label
    label = label.copy()
    for name in sorted(names, key=lambda n: -len(regions.sets[n])):  # outer regions first
        mask = regions.mask(label, name)
        boxes = find_objects(mask.view(np.uint8))
        if not boxes:
            continue
        box = boxes[0]
        found: Any = connected(mask[box], np.ones((3,) * mask.ndim, bool))
        parts, count = found
        if count > 1:
            sizes = sum(np.bincount(plane.ravel(), minlength=count + 1) for plane in parts)
            largest = 1 + int(np.argmax(np.asarray(sizes)[1:]))
            label[box][mask[box] & (parts != largest)] = regions.enclosing_label(name)
    return label


def drop_small_components(label: np.ndarray, regions: Regions, smallest: Mapping[str, int]) -> np.ndarray:
    """Drop the 26-connected components of regions that have fewer voxels than a given number.

    They get the enclosing region's own label, or become background if there is no enclosing region.

    Args:
        label: Label indices (D, H, W).
        regions: Regions of the label map.
        smallest: Name of a region -> number of voxels of the smallest component that is kept.

    Returns:
        A changed copy; ``label`` itself if nothing is dropped.
    """
    for name in sorted(smallest, key=lambda n: -len(regions.sets[n])):  # outer regions first
        mask = regions.mask(label, name)
        boxes = find_objects(mask.view(np.uint8))
        if smallest[name] <= 1 or not boxes:
            continue
        box = boxes[0]
        found: Any = connected(mask[box], np.ones((3,) * mask.ndim, bool))
        parts, count = found
        sizes = np.asarray(sum(np.bincount(plane.ravel(), minlength=count + 1) for plane in parts))
        dropped = sizes < smallest[name]
        dropped[0] = False
        if dropped.any():
            label = label.copy()
            label[box][dropped[parts]] = regions.enclosing_label(name)
    return label


def drop_small_et(label: np.ndarray, minimum: int) -> np.ndarray:
    """Relabel ET as NCR if there are fewer than ``minimum`` voxels of ET (paper, Sect. 3.1.3).

    Args:
        label: Label indices of BraTS.
        minimum: Number of voxels; 0 to keep every ET.

    Returns:
        A changed copy; ``label`` itself if nothing changes.
    """
    et = label == ET
    if np.count_nonzero(et) >= minimum:
        return label
    return np.where(et, np.uint8(NCR), label)
