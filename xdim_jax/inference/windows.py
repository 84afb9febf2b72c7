"""Positions and weights of sliding windows, and the resampling of predicted slices to the source grid."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from xdim_jax.data.prepare import Prepared, resample

SIGMA = 1 / 8  # standard deviation of the weights as a fraction of the patch, as in nnU-Net
_FLOOR = 1e-3  # smallest weight, so that division by the sum of weights remains accurate in corners with one window
_MULTIPLE = 32  # H and W of buffer and resampled slices are rounded up to multiples of this, to compile few programs


@dataclasses.dataclass(frozen=True)
class Windows:
    """Settings: how volumes are divided into windows, and along which axes windows are flipped.

    Attributes:
        patch: Size of a window (D, H, W).
        overlap: For each axis, the fraction of a window that its neighbour covers, in [0, 1).
        batch: Number of windows that are computed at once.
        flips: For each forward pass, the axes (0: D, 1: H, 2: W) along which the window is flipped. ``((),)`` for one
            pass without flips.
        slices: True if the network is 2D; a window may then have fewer slices than the patch.
    """

    patch: tuple[int, int, int]
    overlap: tuple[float, float, float]
    batch: int = 1
    flips: tuple[tuple[int, ...], ...] = ((),)
    slices: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes and positions of windows in one volume.

    Attributes:
        size: Size of the prepared volume, D, H, W.
        target: Size of the same region on the source grid, D, H, W.
        patch: Size of a window.
        before: Number of zeros before the first voxel along each axis. A volume that is smaller than the patch is
            padded on both sides.
        starts: For each axis, the indices in the padded volume at which windows begin.
        plane: H and W of the buffer, see `xdim_jax.inference.sliding_window`.
        batch: Number of windows that are computed at once.
    """

    size: tuple[int, ...]
    target: tuple[int, ...]
    patch: tuple[int, int, int]
    before: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    plane: tuple[int, int]
    batch: int

    @property
    def resized(self) -> bool:
        """True if slices are resized to the source grid."""
        return self.size[1:] != self.target[1:]

    @property
    def out(self) -> tuple[int, int]:
        """H and W of slices after resampling to the source grid, rounded up if they are resized."""
        if not self.resized:
            return self.plane
        return _round_up(self.target[1], _MULTIPLE), _round_up(self.target[2], _MULTIPLE)

    @functools.cached_property
    def taps(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices and weights of slices of the padded volume, from which slices of the source grid are interpolated.

        Both arrays have the shape ``(D, T)``. D is the number of slices of the source grid, and T the largest number
        of slices from which one of them is interpolated.
        """
        if self.size[0] == self.target[0]:
            return np.arange(self.size[0])[:, None] + self.before[0], np.ones((self.size[0], 1), np.float32)
        matrix = resampling_matrix(self.size[0], self.target[0])
        nonzero = matrix != 0
        first, last = nonzero.argmax(1), self.size[0] - 1 - nonzero[:, ::-1].argmax(1)
        slices = np.minimum(first[:, None] + np.arange(int((last - first).max()) + 1), self.size[0] - 1)
        weights = np.where(slices <= last[:, None], np.take_along_axis(matrix, slices, 1), 0)
        weights[:, 1:][slices[:, 1:] == slices[:, :-1]] = 0  # a slice that was clipped to the last one counts once
        return slices + self.before[0], weights.astype(np.float32)

    @property
    def buffer_slices(self) -> int:
        """Number of slices in the buffer: those of a window, and earlier ones that are needed for interpolation.

        It is rounded up, so that volumes of similar sizes have the same program; but not for a single slice, which may
        be large.
        """
        count = self.patch[0] + (self.taps[0].shape[1] if self.size[0] != self.target[0] else 0)
        return count if count == 1 else _round_up(count, 8)

    @property
    def plane_matrices(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Matrices that resize H and W of the buffer to `out`; None if slices are not resized."""
        if not self.resized:
            return None
        height, width = (
            _embed(
                resampling_matrix(self.size[axis], self.target[axis]),
                (self.out[axis - 1], self.plane[axis - 1]),
                self.before[axis],
            )
            for axis in (1, 2)
        )
        return height, width


def make_layout(windows: Windows, size: tuple[int, ...], target: tuple[int, ...]) -> Layout:
    """Return the layout of a volume.

    Args:
        windows: Settings of the windows.
        size: Size of the prepared volume, D, H, W.
        target: Size of the same region on the source grid, D, H, W.
    """
    patch = windows.patch
    patch = (min(size[0], patch[0]) if windows.slices else patch[0], patch[1], patch[2])
    before = tuple(max(p - n, 0) // 2 for n, p in zip(size, patch, strict=True))  # centred, as in training
    padded = [max(n, p) for n, p in zip(size, patch, strict=True)]
    starts = [window_starts(n, p, o) for n, p, o in zip(padded, patch, windows.overlap, strict=True)]
    plane = (_round_up(padded[1], _MULTIPLE), _round_up(padded[2], _MULTIPLE))
    batch = min(windows.batch, len(starts[1]) * len(starts[2]))
    return Layout(size, target, patch, before, tuple(map(tuple, starts)), plane, batch)


def gaussian_weights(patch: Sequence[int]) -> np.ndarray:
    """Return the weight of every voxel of a window, float32 of shape ``patch``, with 1 at the centre."""
    weights = np.ones((), np.float64)
    for n in patch:
        profile = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (SIGMA * n)) ** 2)
        weights = weights[..., None] * profile
    return np.maximum(weights / weights.max(), _FLOOR).astype(np.float32)


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Return the starts of the fewest evenly spaced windows that cover ``size`` and overlap by at least ``overlap``."""
    if size <= patch:
        return [0]
    count = -(-(size - patch) // max(int(patch * (1 - overlap)), 1)) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


@functools.lru_cache(64)
def resampling_matrix(old: int, new: int) -> np.ndarray:
    """Return the matrix ``(new, old)`` that `xdim_jax.data.prepare.resample` applies along an axis."""
    identity = np.eye(old, dtype=np.float32).reshape(old, 1, 1, old)
    return resample(identity, (new, 1, 1))[:, 0, 0]


def read_window(prepared: Prepared, layout: Layout, start: tuple[int, ...]) -> np.ndarray:
    """Return the image of a window, float32 ``(*patch, C)``, with zeros outside the volume."""
    part, pads = [], []
    for s, b, p, n in zip(start, layout.before, layout.patch, layout.size, strict=True):
        first = s - b
        begin, end = max(first, 0), min(first + p, n)
        part.append(slice(begin, end))
        pads.append((begin - first, first + p - end))
    image = prepared.image(tuple(part))
    return np.pad(image, [*pads, (0, 0)]) if any(map(any, pads)) else image


def batched(starts: Iterable[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    """Divide the starts of windows into batches of ``size``; the last batch may be smaller."""
    every = list(starts)
    return [every[i : i + size] for i in range(0, len(every), size)]


def _round_up(n: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-n // multiple) * multiple


def _embed(matrix: np.ndarray, shape: tuple[int, int], column: int) -> np.ndarray:
    """Return a matrix of zeros with the given shape, into which a matrix is copied at row 0 and the given column."""
    out = np.zeros(shape, np.float32)
    out[: matrix.shape[0], column : column + matrix.shape[1]] = matrix
    return out
