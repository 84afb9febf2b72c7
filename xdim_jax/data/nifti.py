"""NIfTI in and out."""

import gzip
import math
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
_DENSEST = 1032  # bytes that gzip can put into one
_CHUNK = 2**17  # voxels that are scaled, and bytes that are skipped, at once


def load(path: Path, axes: Axes) -> tuple[np.ndarray, Grid]:
    """The array in the file's axes, scaled, and its grid; float32 where values are scaled or stored as float64.

    Voxels are read into the array that is returned, with no second copy, and the whole file is read: gzip's checksum,
    behind the last voxel, is looked at, which nibabel alone does not reach.
    """
    with _open(path) as file:
        header = _read_header(path, file)
        array = _read_voxels(file, header)
        while file.read(_CHUNK):
            pass
    return array, _grid(path, header, axes)


def load_grid(path: Path, axes: Axes) -> Grid:
    """Reads the header alone."""
    with _open(path) as file:
        return _grid(path, _read_header(path, file), axes)


def voxel_type(path: Path) -> tuple[np.dtype, int]:
    """Of the array that `load` returns, and the bytes per voxel that it takes; reads the header alone."""
    with _open(path) as file:
        dtype, _, _ = _scaling(_read_header(path, file))
    return dtype, dtype.itemsize


def _open(path: Path) -> Any:
    return (gzip.open if path.suffix == ".gz" else open)(path, "rb")


def _grid(path: Path, header: Any, axes: Axes) -> Grid:
    return make_grid(path, header.get_data_shape(), header.get_best_affine(), header=header, axes=axes)


def _read_header(path: Path, file: Any) -> Any:
    """Leaves the file at the first voxel.

    Raises:
        DataError: a voxel size of zero that the affine is made of: nibabel would take it for 1 mm.
    """
    data = file.read(nib.Nifti2Header.template_dtype.itemsize)
    kind: Any = nib.Nifti2Header if data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
    raw = kind(data[: kind.template_dtype.itemsize], check=False)
    axes = min(max(int(raw["dim"][0]), 1), 3)
    sizes = np.abs(raw["pixdim"][1 : axes + 1])
    if raw["sform_code"] <= 0 and not (sizes > 0).all():
        found = f"has voxels of {' x '.join(f'{s:g}' for s in sizes)} mm"
        step = "restore its pixdim or its sform"
        raise data_error([Problem("no_geometry", path, found, "voxel sizes above zero", step)], "")
    file.seek(0)
    header = kind.from_fileobj(file)
    size, stored = path.stat().st_size, math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if stored > _DENSEST * size:
        found = f"says {' x '.join(map(str, header.get_data_shape()))} voxels, but has {size} bytes"
        raise data_error([Problem("unreadable", path, found, "as many voxels as it says", "fetch the file again")], "")
    file.seek(header.get_data_offset())
    return header


def _scaling(header: Any) -> tuple[np.dtype, float, float]:
    """Of the array that is made: its type, slope and intercept."""
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    slope, inter = 1.0 if slope is None else slope, inter or 0.0
    real = dtype.kind in "iuf"
    change = real and ((slope, inter) != (1.0, 0.0) or (dtype.kind == "f" and dtype.itemsize > 4))
    return np.dtype(np.float32) if change else dtype, slope, inter


def _read_voxels(file: Any, header: Any) -> np.ndarray:
    stored = header.get_data_dtype()
    dtype, slope, inter = _scaling(header)
    array = np.empty(header.get_data_shape(), dtype, order="F")
    flat = array.reshape(-1, order="F")
    if dtype == stored:
        _fill(file, flat)
        return array
    part = np.empty(min(_CHUNK, flat.size), stored)
    with np.errstate(over="ignore"):  # beyond float32: infinite, which readers of images refuse
        for i in range(0, flat.size, _CHUNK):
            into = flat[i : i + _CHUNK]
            _fill(file, part[: into.size])
            into[:] = part[: into.size] * np.float64(slope) + inter
    return array


def _fill(file: Any, array: np.ndarray) -> None:
    """Raises EOFError where the file ends first."""
    view: Any = array.view(np.uint8)
    left = memoryview(view)
    while left:  # in pieces: gzip decompresses into memory of its own, since Python 3.12 twice as much as is read
        if not (count := file.readinto(left[: 4 * _CHUNK])):
            raise EOFError(f"ends {left.nbytes} bytes before the last voxel")
        left = left[count:]


def read_note(path: Path) -> str:
    """The description in the header of a NIfTI-1 file; empty for files that are not there or cannot be read."""
    try:
        with _open(path) as file:
            header = file.read(_DESCRIPTION.stop)
    except (OSError, EOFError, zlib.error):
        return ""
    return header[_DESCRIPTION].split(b"\0")[0].decode("ascii", "replace")


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
