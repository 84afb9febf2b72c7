"""NIfTI in and out: arrays in one orientation inside, the source grid outside.

In memory every volume is ``(D, H, W)`` = (z, y, x) with axes running superior, posterior, left (z, y, x of the LPS
frame, in which BraTS is stored), so that a network sees the same anatomy whatever axis order a file was saved in.
Writing goes back to the file's own axes, affine and header.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from xdim_jax.errors import UserError
from xdim_jax.files import atomic_path

_CANONICAL = axcodes2ornt(("L", "P", "S"))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie: its own shape, affine (mm) and header, before reorientation."""

    shape: tuple[int, ...]
    affine: np.ndarray
    header: nib.Nifti1Header

    @property
    def to_canonical(self) -> np.ndarray:
        """nibabel's orientation transform from the file's axes to (L, P, S)."""
        return ornt_transform(io_orientation(self.affine), _CANONICAL)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along D, H, W."""
        lengths = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        x, y, z = lengths[np.argsort(self.to_canonical[:, 0])]
        return float(z), float(y), float(x)


def read_volume(path: Path) -> tuple[np.ndarray, Grid]:
    """Reads a 3D image as ``(D, H, W)`` in the file's own scaled values.

    Raises:
        UserError: missing, truncated or not NIfTI; not three axes; no usable affine.
    """
    try:
        image: Any = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ImageFileError, EOFError, zlib.error, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as NIfTI ({type(error).__name__}: {error}); the file is "
            f"{path.stat().st_size} bytes, perhaps a truncated download: fetch it again"
        ) from error
    if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image):
        raise UserError(f"{path} is {type(image).__name__}; expected NIfTI (.nii or .nii.gz)")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    affine = np.asarray(image.affine)
    if array.ndim != 3:
        raise UserError(f"{path} has shape {array.shape}; expected one 3D volume")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{path} has an affine without volume:\n{affine}\nrestore its sform or qform")
    grid = Grid(array.shape, affine, image.header)
    return nib.apply_orientation(array, grid.to_canonical).transpose(2, 1, 0), grid


def write_volume(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Writes a ``(D, H, W)`` array on ``grid``, with its affine and header; whole or not at all.

    Raises:
        ValueError: the array is not of the grid's size.
        UserError: the file cannot be written.
    """
    back = ornt_transform(_CANONICAL, io_orientation(grid.affine))
    volume = nib.apply_orientation(array.transpose(2, 1, 0), back)
    if volume.shape != grid.shape:
        raise ValueError(f"array of shape {array.shape} (D, H, W) is not on the grid {grid.shape} of {path}")
    header = grid.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # a display window for intensities hides labels
    with atomic_path(path) as temporary:
        nib.save(nib.Nifti1Image(volume, grid.affine, header), temporary)
