"""Reading and writing NIfTI files.

nibabel parses and writes the headers. It is not used to read voxels, because nibabel 5.4 needs about four times the
memory of the float32 array for a scaled or float64 file (256 MiB for 256 x 256 x 256 voxels, compared with 67 MiB
here), and does not verify the checksum of gzip.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.wrapstruct import WrapStructError

from xdim_jax.base.files import atomic_path
from xdim_jax.base.problem import Problem, data_error
from xdim_jax.data.images.grid import Axes, Grid, make_grid

SUFFIXES = (".nii.gz", ".nii")
_MAX_COMPRESSION = 1032  # highest possible compression ratio of gzip
_CHUNK = 2**17  # number of voxels to scale at a time, or of bytes to skip at a time


def load(path: Path, axes: Axes) -> tuple[np.ndarray, Grid]:
    """Read the scaled array in the axes of the file, and its grid.

    The array is float32 if the file has a scaling or stores float64; otherwise it has the stored type. Voxels are read
    into the returned array without a second copy. The file is read to its end, because gzip verifies its checksum
    after the last voxel.
    """
    with _open(path) as file:
        header = _read_header(path, file)
        array = _read_voxels(file, header)
        while file.read(_CHUNK):
            pass
    return array, _grid(path, header, axes)


def load_grid(path: Path, axes: Axes) -> Grid:
    """Read the grid from the header."""
    with _open(path) as file:
        return _grid(path, _read_header(path, file), axes)


def voxel_type(path: Path) -> tuple[np.dtype, int]:
    """Return the dtype of the array from `load`, and its peak memory in bytes per voxel, from the header alone."""
    with _open(path) as file:
        dtype, _, _ = _scaling(_read_header(path, file))
    return dtype, dtype.itemsize


def _open(path: Path) -> Any:
    return (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb")


def _grid(path: Path, header: Any, axes: Axes) -> Grid:
    return make_grid(path, header.get_data_shape(), header.get_best_affine(), header=header, axes=axes)


def _read_header(path: Path, file: Any) -> Any:
    """Read the header, and move to the first voxel.

    Raises:
        DataError: A voxel size that the affine needs is zero (for which nibabel silently uses 1 mm), or the header
            declares more voxels than the file can contain.
    """
    data = file.read(nib.Nifti2Header.sizeof_hdr)
    kind: Any = nib.Nifti2Header if nib.Nifti2Header.may_contain_header(data) else nib.Nifti1Header
    raw = kind(data[: kind.sizeof_hdr], check=False)
    axes = min(max(int(raw["dim"][0]), 1), 3)
    sizes = np.abs(raw["pixdim"][1 : axes + 1])
    if raw["sform_code"] <= 0 and not (sizes > 0).all():
        raise data_error(
            Problem(
                "no_geometry",
                path,
                found=f"has voxels of {' x '.join(f'{s:g}' for s in sizes)} mm",
                expected="voxel sizes above zero",
                suggestion="restore its pixdim or its sform",
            )
        )
    unit = {1: "metres", 3: "micrometres"}.get(int(raw["xyzt_units"]) & 7)
    if unit is not None:
        raise data_error(
            Problem(
                "implausible_spacing",
                path,
                found=f"has voxel sizes in {unit}, by the unit in its header",
                expected="mm",
                suggestion="convert its voxel sizes, its sform and its qform to mm; or correct the unit (xyzt_units)",
            )
        )
    file.seek(0)
    header = kind.from_fileobj(file)
    size, stored = path.stat().st_size, math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if stored > _MAX_COMPRESSION * size:
        raise data_error(
            Problem(
                "unreadable",
                path,
                found=f"declares {' x '.join(map(str, header.get_data_shape()))} voxels, but has {size} bytes",
                expected="as many voxels as the header declares",
                suggestion="download the file again",
            )
        )
    file.seek(header.get_data_offset())
    return header


def _scaling(header: Any) -> tuple[np.dtype, float, float]:
    """Return the dtype of the loaded array, and the slope and the intercept that are applied to it."""
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
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which is reported as not_finite
        for i in range(0, flat.size, _CHUNK):
            into = flat[i : i + _CHUNK]
            _fill(file, part[: into.size])
            into[:] = part[: into.size] * np.float64(slope) + inter
    return array


def _fill(file: Any, array: np.ndarray) -> None:
    """Read the bytes of an array. Raises EOFError if the file is too short."""
    view: Any = array.view(np.uint8)
    left = memoryview(view)
    while left:  # read in parts, because gzip needs a buffer as large as a part, or twice as large since Python 3.12
        if not (count := file.readinto(left[: 4 * _CHUNK])):
            raise EOFError(f"ends {left.nbytes} bytes before the last voxel")
        left = left[count:]


def read_note(path: Path) -> str:
    """Return the description in the header of a NIfTI-1 file; empty if the file is missing or cannot be read."""
    try:
        with _open(path) as file:
            header: Any = nib.Nifti1Header(file.read(nib.Nifti1Header.sizeof_hdr), check=False)
    except (OSError, EOFError, zlib.error, WrapStructError):
        return ""
    return header["descrip"].item().split(b"\0")[0].decode("ascii", "replace")


def write_volume(path: Path, array: np.ndarray, grid: Grid, note: str = "") -> None:
    """Write a ``(D, H, W)`` array atomically, with the affine of its grid and, if there is one, the grid's header.

    Args:
        path: Name of the file, ``.nii`` or ``.nii.gz``.
        array: Voxels, stored with their own dtype.
        grid: Grid of the array.
        note: Description for the header, at most 79 ASCII characters; see `read_note`.

    Raises:
        ValueError: The array does not have the shape of the grid.
        UserError: The file cannot be written.
    """
    volume = grid.to_file(array)
    if grid.header is None:
        header = nib.Nifti1Header()
        header.set_xyzt_units("mm")
    else:
        header = grid.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # a display window for intensities would hide labels
    image = nib.Nifti1Image(volume, grid.affine, header)
    if note:
        image.header["descrip"] = note.encode("ascii")
    with atomic_path(path) as temporary:
        save_image(image, temporary)


def save_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image like ``nibabel.save``, but close the compressed file if the disk is full.

    Since Python 3.13, a compressed file that was not closed prints a traceback when it is garbage-collected.
    """
    if path.suffix.lower() != ".gz":
        nib.save(image, path)
        return
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as compressed:
        image.to_stream(compressed)
