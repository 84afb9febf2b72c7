"""The position of voxels in space, and the conversion between the axes of a file and the axes in memory.

In memory every volume is ``(D, H, W)`` = (z, y, x). Its axes point to superior, posterior and left (z, y, x of the LPS
frame), so the input of a network does not depend on the order of the axes in a file. Ultrasound images, which have no
anatomical frame, and 2D images keep their stored axes, with W along the rows of the picture. Output files have the
axes, the affine and the header of the input file.
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
_MIN_LENGTH = 1e-7  # in mm; smaller voxel sizes count as zero
_SHIFT_TOLERANCE = 0.01  # in voxels, at the corners of the volume

# how file axes are converted: by the affine, not at all, or by reversing the last axis only
Axes = Literal["anatomical", "stored", "reversed"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The voxel grid of a file.

    Attributes:
        shape: Voxels along the file's axes (x, y, z); 1 along z if the file has two axes.
        affine: 4 x 4 matrix from voxel indices to mm in the RAS+ frame.
        header: NIfTI header, or None for other formats.
        axes: How file axes are converted to axes in memory.
        flat: True if the file has only two axes.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    header: Any = None
    axes: Axes = "anatomical"
    flat: bool = False

    @property
    def orientation(self) -> np.ndarray:
        """nibabel's orientation transform from the file's axes to x, y, z in memory."""
        if self.axes == "anatomical" and not self.flat:
            return ornt_transform(io_orientation(self.affine), CANONICAL)
        return _REVERSED if self.axes == "reversed" else _AS_STORED

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along D, H, W."""
        lengths = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        x, y, z = lengths[np.argsort(self.orientation[:, 0])]
        return float(z), float(y), float(x)

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in ml; with a sheared affine, it is less than the product of the spacings."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def memory_geometry(self) -> tuple[tuple[int, ...], np.ndarray]:
        """Shape (x, y, z) and affine after the conversion to the axes in memory."""
        order = np.argsort(self.orientation[:, 0])
        return tuple(self.shape[i] for i in order), self.affine @ inv_ornt_aff(self.orientation, self.shape)

    def to_memory(self, array: np.ndarray) -> np.ndarray:
        """Convert an array from file axes ``(x, y, z, ...)`` to ``(D, H, W, ...)``."""
        reoriented = nib.apply_orientation(array, self.orientation)
        return reoriented.transpose(2, 1, 0, *range(3, reoriented.ndim))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Convert an array from ``(D, H, W)`` to the axes of the file.

        Raises:
            ValueError: The array does not have the shape of the grid.
        """
        inverse = np.empty_like(self.orientation)
        for source, (target, sign) in enumerate(self.orientation.astype(int)):
            inverse[target] = source, sign
        volume = nib.apply_orientation(array.transpose(2, 1, 0), inverse)
        if volume.shape != tuple(self.shape):
            raise ValueError(f"an array of shape {array.shape} (D, H, W) is not on the grid {self.shape}")
        return volume[..., 0] if self.flat else volume


def make_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray, *, header: Any = None, axes: Axes) -> Grid:
    """Return the grid of a file with two or more axes.

    Args:
        path: File, for messages.
        shape: Voxels along the file's axes; axes after the third are channels and are ignored.
        affine: 4 x 4 matrix from voxel indices to mm in the RAS+ frame.
        header: NIfTI header, or None for other formats.
        axes: How file axes are converted to axes in memory.

    Raises:
        DataError: An axis is missing or empty, a voxel size is zero, or the affine is not finite or is singular.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise data_error(
            Problem(
                "shape",
                path,
                found=f"has {'no axes' if not shape else 'shape ' + ' x '.join(map(str, shape))}",
                expected="two to four axes of at least one voxel",
                suggestion="download the file again",
            )
        )
    flat = len(shape) == 2
    affine = np.asarray(affine, np.float64)
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(0))
    usable = np.isfinite(affine).all() and lengths.min() > _MIN_LENGTH
    usable = usable and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-12  # the voxels may be small, e.g. 1e-5 mm
    usable = usable and not np.isnan(io_orientation(affine)).any()
    if not usable:
        raise data_error(
            Problem(
                "no_geometry",
                path,
                found=f"has a singular affine: {np.array2string(affine[:3], precision=4).replace(chr(10), '')}",
                expected="voxel sizes above zero and three independent axes",
                suggestion="restore its sform or qform",
            )
        )
    return Grid(tuple(shape[:3]) + (1,) * flat, affine, header, axes, flat)


def compare_grids(path: Path, grid: Grid, first_path: Path, first: Grid) -> list[Problem]:
    """Check that two files are on the same grid. The order of the axes in the files may differ.

    Args:
        path, grid: File, and its grid.
        first_path, first: File with which it is compared, and its grid.

    Returns:
        A problem if shape, voxel size or affine differs; an empty list if the grids are the same.
    """
    name = first_path.name
    (shape, affine), (first_shape, first_affine) = grid.memory_geometry, first.memory_geometry
    if shape != first_shape:
        return [
            Problem(
                "shape",
                path,
                found=f"has shape {_shape(grid)}, but {name} has {_shape(first)}",
                expected="one shape per case",
                suggestion="resample it, or download the case again",
            )
        ]
    if not np.allclose(grid.spacing, first.spacing, rtol=1e-3):
        size, first_size = (" x ".join(f"{s:.4g}" for s in g.spacing[::-1]) for g in (grid, first))
        return [
            Problem(
                "spacing",
                path,
                found=f"has voxels of {size} mm, but {name} has {first_size}",
                expected="one voxel size per case",
                suggestion="restore its header, or resample it to the grid of the other file",
            )
        ]
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in shape], [1], indexing="ij"), -1).reshape(-1, 4)
    shift = np.abs(corners @ (np.linalg.solve(first_affine, affine) - np.eye(4)).T).max()
    if shift > _SHIFT_TOLERANCE:
        return [
            Problem(
                "affine",
                path,
                found=f"is displaced by up to {shift:.2f} voxels from {name} according to its affine",
                expected=f"co-registered files (within {_SHIFT_TOLERANCE} voxels)",
                suggestion="resample it, or restore its header",
            )
        ]
    return []


def _shape(grid: Grid) -> tuple[int, ...]:
    return grid.shape[:2] if grid.flat else grid.shape
