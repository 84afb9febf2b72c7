"""Where voxels lie, and one orientation inside whatever the file has.

In memory every volume is ``(D, H, W)`` = (z, y, x) with axes running superior, posterior, left (z, y, x of the LPS
frame), so that a network sees the same anatomy whatever axis order a file was saved in. Ultrasound, which has no
anatomical frame, and plain 2D images stay as stored: W along the rows of the picture. Writing goes back to the file's
own axes, affine and header.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from xdim_jax.base.problem import Problem, data_error

CANONICAL = axcodes2ornt(("L", "P", "S"))
_AS_STORED = np.array([[0, 1], [1, 1], [2, 1]])
_REVERSED = np.array([[0, 1], [1, 1], [2, -1]])
_SHIFT_TOLERANCE = 0.01  # of a voxel, at the volume's corners

# how the axes of a file come into memory: by its affine, as they are, or as they are with the last one reversed
Axes = Literal["anatomical", "stored", "reversed"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie: its own shape (x, y, z), affine (mm, RAS+) and NIfTI header, if it has one.

    ``flat``: the file has two axes only, so ``shape`` ends in 1.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    header: Any = None
    axes: Axes = "anatomical"
    flat: bool = False

    @property
    def turn(self) -> np.ndarray:
        """nibabel's orientation transform from the file's axes to x, y, z in memory."""
        if self.axes == "anatomical" and not self.flat:
            return ornt_transform(io_orientation(self.affine), CANONICAL)
        return _REVERSED if self.axes == "reversed" else _AS_STORED

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along D, H, W."""
        lengths = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        x, y, z = lengths[np.argsort(self.turn[:, 0])]
        return float(z), float(y), float(x)

    @property
    def in_memory(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Shape (x, y, z) and affine of the array once its axes are turned."""
        order = np.argsort(self.turn[:, 0])
        return tuple(self.shape[i] for i in order), self.affine @ inv_ornt_aff(self.turn, self.shape)

    def to_memory(self, array: np.ndarray) -> np.ndarray:
        """``(x, y, z, ...)`` in the file's axes to ``(D, H, W, ...)``."""
        turned = nib.apply_orientation(array, self.turn)
        return turned.transpose(2, 1, 0, *range(3, turned.ndim))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """``(D, H, W)`` to the file's axes. Raises ValueError for an array that is not of the grid's size."""
        back = np.empty_like(self.turn)
        for source, (target, sign) in enumerate(self.turn.astype(int)):
            back[target] = source, sign
        volume = nib.apply_orientation(array.transpose(2, 1, 0), back)
        if volume.shape != tuple(self.shape):
            raise ValueError(f"an array of shape {array.shape} (D, H, W) is not on the grid {self.shape}")
        return volume[..., 0] if self.flat else volume


def make_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray, *, header: Any = None, axes: Axes) -> Grid:
    """A grid of a file with two or more axes.

    Raises:
        DataError: an empty or missing axis, a voxel size of zero, or an affine that is not finite or without volume.
    """
    if len(shape) < 2 or min(shape) < 1:
        found = f"has {'no axes' if not shape else 'shape ' + ' x '.join(map(str, shape))}"
        problem = Problem("shape", path, found, "two to four axes of at least one voxel", "fetch the file again")
        raise data_error([problem], "")
    flat = len(shape) == 2
    affine = np.asarray(affine, np.float64)
    usable = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12
    usable = usable and not np.isnan(io_orientation(affine)).any()
    if not usable:
        problem = Problem(
            "no_geometry",
            path,
            f"has an affine without volume: {np.array2string(affine[:3], precision=4).replace(chr(10), '')}",
            "voxel sizes above zero and three independent axes",
            "restore its sform or qform",
        )
        raise data_error([problem], "")
    return Grid(tuple(shape[:3]) + (1,) * flat, affine, header, axes, flat)


def compare_grids(path: Path, grid: Grid, first_path: Path, first: Grid, case_id: str = "") -> list[Problem]:
    """What keeps two files from lying on one grid, whatever the order of their axes."""
    name = first_path.name
    (shape, affine), (first_shape, first_affine) = grid.in_memory, first.in_memory
    if shape != first_shape:
        found = f"has shape {_shape(grid)}, but {name} has {_shape(first)}"
        return [Problem("shape", path, found, "one shape per case", "resample it, or fetch the case again", case_id)]
    if not np.allclose(grid.spacing, first.spacing, rtol=1e-3):
        sizes = [" x ".join(f"{s:.4g}" for s in g.spacing[::-1]) for g in (grid, first)]
        found = f"has voxels of {sizes[0]} mm, but {name} has {sizes[1]}"
        step = "restore its header, or resample it to the other's grid"
        return [Problem("spacing", path, found, "one voxel size per case", step, case_id)]
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in shape], [1], indexing="ij"), -1).reshape(-1, 4)
    shift = np.abs(corners @ (np.linalg.solve(first_affine, affine) - np.eye(4)).T).max()
    if shift > _SHIFT_TOLERANCE:
        found = f"lies up to {shift:.2f} voxels away from {name} by its affine"
        expected = f"co-registered files (within {_SHIFT_TOLERANCE} voxels)"
        return [Problem("affine", path, found, expected, "resample it or restore its header", case_id)]
    return []


def _shape(grid: Grid) -> tuple[int, ...]:
    return grid.shape[:2] if grid.flat else grid.shape
