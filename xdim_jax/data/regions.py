"""Structures as sets of labels, and the nested regions that BraTS scores (spec: challenges, section 3.1).

Inside the package a label map holds the indices of a data set's tissues; the data set's own values (4 is ET up to 2022
and a resection cavity in 2024) exist only in its files, see `xdim_jax.data.labels`. A network predicts one channel per
region; regions may lie inside one another.
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
    """Named sets of label indices. Any two are disjoint or one lies in the other.

    Raises:
        ValueError: two regions overlap in part or are equal, or a region has not exactly one label that no region
            inside it has, so that labels could not be told from regions.
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
                    f"region {name} has the labels {sorted(labels - inner)} of its own; expected exactly one, so that "
                    "a label map can be made from predicted regions"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the channels."""
        return tuple(self.sets)

    def around(self, name: str) -> int:
        """The label that only the region has that this one lies in; 0 where it lies in none."""
        inner = set(self.sets[name])
        outer = [set(v) for v in self.sets.values() if inner < set(v)]
        if not outer:
            return 0
        near = min(outer, key=len)
        return (near - set().union(*(set(v) for v in self.sets.values() if set(v) < near))).pop()

    @functools.cached_property
    def _forest(self) -> list["_Node"]:
        """Outermost regions, each with those inside it."""

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
        """Label map ``(..., D, H, W)`` to masks ``bool (..., D, H, W, R)``.

        ``xp`` is the array library: numpy, or ``jax.numpy`` inside a jitted program.
        """
        # comparisons, not isin, which flattens what may lie on several devices
        return xp.stack([functools.reduce(operator.or_, (label == i for i in v)) for v in self.sets.values()], -1)

    def decode(self, scores: Any, threshold: float | Mapping[str, float] = 0.5, xp: Any = np) -> Any:
        """Scores ``(..., R)`` (probabilities, or masks) to a label map uint8; ``threshold``: of all, or by region.

        Outer regions are written first and inner ones over them, so regions that are not nested are made so (paper,
        Sect. 3.1.3: ET is kept unaltered, NCR is extracted from TC and ED from WT). Between regions that lie apart
        decides the highest score of each with all that lies inside it; the first wins a tie.
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
    """A region: its channel, the label that no region inside it has, and those regions."""

    channel: int
    label: int
    inner: list["_Node"]

    @property
    def channels(self) -> list[int]:
        """Its own and those of all regions inside it."""
        return [self.channel, *(c for node in self.inner for c in node.channels)]


# BraTS: indices of the tissues, and the regions; nested, each a part of the one before
TISSUES = ("background", "NCR", "ED", "ET")
NCR, ED, ET, RC = 1, 2, 3, 4  # RC: resection cavity, since 2024, part of no region above
BRATS = Regions({"WT": (NCR, ED, ET), "TC": (NCR, ET), "ET": (ET,)})
BRATS_2024 = Regions({**BRATS.sets, "RC": (RC,)})


def keep_largest(label: np.ndarray, regions: Regions, names: Sequence[str]) -> np.ndarray:
    """Keeps the largest 26-connected part of each named region; the others become what lies around the region: the own
    label of the region that it lies in, or background."""
    if not names:
        return label
    label = label.copy()
    for name in sorted(names, key=lambda n: -len(regions.sets[n])):  # outer regions first
        mask = functools.reduce(operator.or_, (label == i for i in regions.sets[name]))
        boxes = find_objects(mask.view(np.uint8))
        if not boxes:
            continue
        box = boxes[0]
        found: Any = connected(mask[box], np.ones((3,) * mask.ndim, bool))
        parts, count = found
        if count > 1:
            sizes = sum(np.bincount(plane.ravel(), minlength=count + 1) for plane in parts)
            largest = 1 + int(np.argmax(np.asarray(sizes)[1:]))
            label[box][mask[box] & (parts != largest)] = regions.around(name)
    return label


def drop_small_et(label: np.ndarray, minimum: int) -> np.ndarray:
    """Relabels ET as NCR when the whole case has fewer than ``minimum`` voxels of it (paper, Sect. 3.1.3); 0: never."""
    et = label == ET
    if np.count_nonzero(et) >= minimum:
        return label
    return np.where(et, np.uint8(NCR), label)
