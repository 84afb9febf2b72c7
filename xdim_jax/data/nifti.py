"""NIfTI in and out."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from xdim_jax.data.grid import Axes, Grid, make_grid
from xdim_jax.data.problem import Problem, data_error
from xdim_jax.files import atomic_path

SUFFIXES = (".nii.gz", ".nii")
_DESCRIPTION = slice(148, 228)  # bytes of a NIfTI-1 header


def load(path: Path, axes: Axes) -> tuple[np.ndarray, Grid]:
    """The array in the file's axes, scaled, and its grid; the whole file is read.

    gzip's checksum at the end is looked at, which nibabel alone does not reach: it stops at the last voxel.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    kind = nib.Nifti2Image if _is_second(data) else nib.Nifti1Image
    _check_sizes(path, data)
    image: Any = kind.from_bytes(data)
    array = np.asanyarray(image.dataobj)
    return array, make_grid(path, image.shape, image.affine, header=image.header, axes=axes)


def _is_second(data: bytes) -> bool:
    return data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")


def _check_sizes(path: Path, data: bytes) -> None:
    """Raises DataError for a voxel size of zero that the affine is made of: nibabel would take it for 1 mm."""
    kind = nib.Nifti2Header if _is_second(data) else nib.Nifti1Header
    header: Any = kind(data[: kind.template_dtype.itemsize], check=False)
    axes = min(max(int(header["dim"][0]), 1), 3)
    sizes = np.abs(header["pixdim"][1 : axes + 1])
    if header["sform_code"] <= 0 and not (sizes > 0).all():
        found = f"has voxels of {' x '.join(f'{s:g}' for s in sizes)} mm"
        step = "restore its pixdim or its sform"
        raise data_error([Problem("no_geometry", path, found, "voxel sizes above zero", step)], "")


def read_note(path: Path) -> str:
    """The description in the header of a NIfTI-1 file; empty for files that are not there or cannot be read."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(_DESCRIPTION.stop)
    except (OSError, EOFError, zlib.error):
        return ""
    return header[_DESCRIPTION].split(b"\0")[0].decode("ascii", "replace")


def load_grid(path: Path, axes: Axes) -> Grid:
    """Reads the header alone."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        _check_sizes(path, file.read(nib.Nifti2Header.template_dtype.itemsize))
    image: Any = nib.load(path)
    return make_grid(path, image.shape, image.affine, header=image.header, axes=axes)


def write_volume(path: Path, array: np.ndarray, grid: Grid, note: str = "") -> None:
    """Writes a ``(D, H, W)`` array on ``grid``, with its affine and, if it has one, header; whole or not at all.

    ``note``: at most 79 letters, for the header's description; see `read_note`.

    Raises:
        ValueError: the array is not of the grid's size.
        UserError: the file cannot be written.
    """
    volume = grid.to_file(array)
    if grid.header is None:
        header = nib.Nifti1Header()
        header.set_xyzt_units("mm")
    else:
        header = grid.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # a display window for intensities hides labels
    image = nib.Nifti1Image(volume, grid.affine, header)
    if note:
        image.header["descrip"] = note.encode("ascii")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
