"""NIfTI in and out: arrays in one orientation inside, the source grid outside.

In memory every volume is ``(D, H, W)`` = (z, y, x) with axes running superior, posterior, left (z, y, x of the LPS
frame, in which BraTS is stored), so that a network sees the same anatomy whatever axis order a file was saved in.
Writing goes back to the file's own axes, affine and header.
"""

import contextlib
import dataclasses
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
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


def _load(path: Path) -> Any:
    """The whole file, so that gzip's checksum at its end is looked at: nibabel stops at the last voxel."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    kind = nib.Nifti2Image if data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Image
    return kind.from_bytes(data)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except Exception as error:  # nibabel and zlib raise many kinds for damaged files
        size = f"{path.stat().st_size} bytes" if path.is_file() else "not a file"
        raise UserError(
            f"{path} cannot be read as NIfTI ({type(error).__name__}: {error}); it is {size}, perhaps a truncated or "
            "damaged download: fetch it again"
        ) from error


def _grid(path: Path, shape: tuple[int, ...], image: Any) -> Grid:
    affine = np.asarray(image.affine)
    usable = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12
    with _reading(path):
        usable = usable and not np.isnan(io_orientation(affine)).any()
    if not usable:
        raise UserError(f"{path} has an affine without volume:\n{affine}\nrestore its sform or qform")
    return Grid(tuple(shape[:3]), affine, image.header)


def read_grid(path: Path) -> Grid:
    """Reads the header alone. Raises UserError as `read_volume` does, for what a header shows."""
    with _reading(path):
        image: Any = nib.load(path)
        shape = image.shape
    return _grid(path, shape, image)


def read_volume(path: Path) -> tuple[np.ndarray, Grid]:
    """Reads a 3D image as ``(D, H, W)`` in the file's own scaled values.

    Raises:
        UserError: missing, truncated or not NIfTI; not three axes; no usable affine.
    """
    with _reading(path):
        image = _load(path)
        array = np.asanyarray(image.dataobj)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path} holds {array.dtype} voxels; expected real numbers")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise UserError(f"{path} has shape {array.shape}; expected one 3D volume")
    grid = _grid(path, array.shape, image)
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
