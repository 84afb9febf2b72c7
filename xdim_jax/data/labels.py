"""Label conventions: the label values in the files of a data set, and their meaning."""

import dataclasses
from collections.abc import Mapping

import numpy as np

IGNORE = 255  # index of voxels that are not annotated; they are excluded from training and scoring
_TOLERANCE = 1e-3  # some copies of data sets store labels as floats with rounding errors


@dataclasses.dataclass(frozen=True)
class Labels:
    """The label convention of a data set. It is never inferred from the values in a file.

    Attributes:
        name: Name for messages, e.g. ``brats2021``.
        structures: Names of the structures by index; the first is the background.
        values: Value written for each index, in the order of ``structures``.
        ranges: For each index but 0, the values ``low < value <= high`` that are read as this index; all other values
            are background. Empty if every value must be one of ``values``.
        others: Ranges of values that are known, but are read as background.
        ignore: Value of voxels that are not annotated, which are read as `IGNORE`; None if there is no such value.
        elsewhere: Pairs (value, name of another convention that defines this value), for hints in messages.
    """

    name: str
    structures: tuple[str, ...]
    values: tuple[int, ...]
    ranges: tuple[tuple[float, float], ...] = ()
    others: tuple[tuple[float, float], ...] = ()
    elsewhere: tuple[tuple[int, str], ...] = ()
    ignore: int | None = None

    def decode(self, values: np.ndarray) -> tuple[np.ndarray, list[float]]:
        """Convert the values of a file to label indices.

        Args:
            values: Values of any shape and dtype.

        Returns:
            Indices, uint8, of the same shape, with `IGNORE` for voxels that are not annotated; and the values that the
            convention does not define.
        """
        label = np.zeros(values.shape, np.uint8)
        if self.ranges:
            for index, (low, high) in enumerate(self.ranges, 1):
                label[(values > low) & (values <= high)] = index
            left = np.unique(values[(label == 0) & (values != 0)])
            return label, [float(v) for v in left if not any(low < v <= high for low, high in self.others)]
        found = np.unique(values)
        unknown = []
        for value in found:
            if self.ignore is not None and abs(float(value) - self.ignore) <= _TOLERANCE:
                label[values == value] = IGNORE
                continue
            near = [i for i, v in enumerate(self.values) if abs(float(value) - v) <= _TOLERANCE]
            if not near:
                unknown.append(float(value))
            elif near[0]:
                label[values == value] = near[0]
        return label, unknown

    def encode(self, label: np.ndarray) -> np.ndarray:
        """Convert indices to the values of the convention: uint8, or uint16 if a value is above 255."""
        largest = max(*self.values, self.ignore or 0)
        values = np.array(self.values, np.uint8 if largest < 256 else np.uint16)
        if self.ignore is None:
            return values[label]
        return np.where(label == IGNORE, values.dtype.type(self.ignore), values[np.where(label == IGNORE, 0, label)])

    def select(self, structures: tuple[str, ...]) -> "Labels":
        """Return a convention for the same files with some of the structures. The others are read as background."""
        kept = [self.structures.index(name) for name in structures]
        assert self.ranges, "without ranges every value must be a structure"
        return Labels(
            self.name,
            (self.structures[0], *structures),
            (self.values[0], *(self.values[i] for i in kept)),
            tuple(self.ranges[i - 1] for i in kept),
            tuple(r for i, r in enumerate(self.ranges, 1) if i not in kept),
        )

    def to_json(self) -> Mapping[str, object]:
        """Return the convention as JSON values; see `from_json`."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "ignore" or v is not None}

    @staticmethod
    def from_json(value: Mapping[str, object]) -> "Labels":
        """Return the convention from the result of `to_json`."""

        def frozen(v: object) -> object:
            return tuple(frozen(x) for x in v) if isinstance(v, list | tuple) else v

        return Labels(**{key: frozen(v) for key, v in value.items()})  # pyright: ignore[reportArgumentType]


def is_structure(label: np.ndarray) -> np.ndarray:
    """Return a mask of the voxels that belong to a structure: annotated, and not background."""
    return (label > 0) & (label != IGNORE)
