"""Structures as sets of labels, and the nested regions that BraTS scores (spec: challenges, section 3.1).

Inside the package a label map holds the indices of a data set's tissues; the data set's own values (4 is ET up to 2022
and a resection cavity in 2024) exist only in its files, see `xdim_jax.data.labels`. A network predicts one channel per
region; regions may lie inside one another.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np


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

    @cached_property
    def _levels(self) -> list[list[tuple[int, int]]]:
        """By depth of nesting, outermost first: channel, and the label that only this region has."""
        sets = [set(labels) for labels in self.sets.values()]
        levels: dict[int, list[tuple[int, int]]] = {}
        for channel, labels in enumerate(sets):
            depth = sum(labels < other for other in sets)
            inner = set().union(*(other for other in sets if other < labels))
            levels.setdefault(depth, []).append((channel, (labels - inner).pop()))
        return [levels[depth] for depth in sorted(levels)]

    def encode(self, label: Any, xp: Any = np) -> Any:
        """Label map ``(..., D, H, W)`` to masks ``bool (..., D, H, W, R)``.

        ``xp`` is the array library: numpy, or ``jax.numpy`` inside a jitted program.
        """
        return xp.stack([xp.isin(label, xp.asarray(labels)) for labels in self.sets.values()], -1)

    def decode(self, scores: np.ndarray, threshold: float = 0.5) -> np.ndarray:
        """Scores ``(..., R)`` (probabilities, or masks) to a label map uint8.

        Outer regions are written first and inner ones over them, so regions that are not nested are made so (paper,
        Sect. 3.1.3: ET is kept unaltered, NCR is extracted from TC and ED from WT). Among regions of one depth the
        highest score wins, the first in a tie.
        """
        label = np.zeros(scores.shape[:-1], np.uint8)
        for level in self._levels:
            channels, values = zip(*level, strict=True)
            if len(level) == 1:
                label[scores[..., channels[0]] > threshold] = values[0]
                continue
            part = scores[..., list(channels)]
            inside = part.max(-1) > threshold
            label[inside] = np.array(values, np.uint8)[part[inside].argmax(-1)]
        return label


# BraTS: indices of the tissues, and the regions; nested, each a part of the one before
TISSUES = ("background", "NCR", "ED", "ET")
NCR, ED, ET, RC = 1, 2, 3, 4  # RC: resection cavity, since 2024, part of no region above
BRATS = Regions({"WT": (NCR, ED, ET), "TC": (NCR, ET), "ET": (ET,)})
BRATS_2024 = Regions({**BRATS.sets, "RC": (RC,)})


def drop_small_et(label: np.ndarray, minimum: int) -> np.ndarray:
    """Relabels ET as NCR when the whole case has fewer than ``minimum`` voxels of it (paper, Sect. 3.1.3); 0: never."""
    et = label == ET
    if np.count_nonzero(et) >= minimum:
        return label
    return np.where(et, np.uint8(NCR), label)
