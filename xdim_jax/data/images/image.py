"""Images of any format: NIfTI, MetaImage and NRRD files, and series of DICOM slices."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import Problem, data_error
from xdim_jax.data.images import dicom, metaimage, nifti
from xdim_jax.data.images.grid import Axes, Grid

SUFFIXES = (*nifti.SUFFIXES, *metaimage.SUFFIXES)

# an image of a case: one file, or the files of a series in order
Source = Path | tuple[Path, ...]


def strip(name: str) -> str | None:
    """A file name without the suffix of an image; None for other files."""
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), None)


def where(source: Source) -> Path:
    """The path that messages name: the file, or the folder of a series."""
    return source if isinstance(source, Path) else source[0].parent


def files_of(source: Source) -> tuple[Path, ...]:
    """All files of an image."""
    return (source,) if isinstance(source, Path) else source


def source_at(path: Path) -> Source:
    """What `where` named: a file, or the series of DICOM slices in a folder."""
    return dicom.files_in_order(path, ".dcm") if path.is_dir() else path


def _reader(path: Path) -> tuple[str, Any]:
    """What the format is called, and the module that reads it, by the name."""
    return ("MetaImage or NRRD", metaimage) if path.name.endswith(metaimage.SUFFIXES) else ("NIfTI", nifti)


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        path = Path(error.filename or where(source))
        problem = Problem("unreadable", path, "does not exist", "a file", "fetch it again")
        raise data_error([problem], "") from error
    except Exception as error:  # nibabel, zlib, ITK and pydicom raise many kinds for damaged files
        form = "DICOM" if isinstance(source, tuple) else _reader(source)[0]
        raise dicom.unreadable(where(source), form, error) from error


def read_grid(source: Source, axes: Axes = "anatomical") -> Grid:
    """Reads the header alone.

    Raises:
        DataError: as `read_image` does, for what a header shows.
    """
    with _reading(source):
        if isinstance(source, tuple):
            return dicom.series_grid([dicom.read_header(path) for path in source], axes)
        _exists(source)
        return _reader(source)[1].load_grid(source, axes)


def voxel_type(source: Source) -> tuple[np.dtype, int]:
    """Of the array that `read_image` returns, and the bytes per voxel that it takes at its peak; from the header.

    Raises:
        DataError: as `read_grid` does.
    """
    if isinstance(source, tuple):
        return dicom.VOXEL_TYPE
    with _reading(source):
        _exists(source)
        return _reader(source)[1].voxel_type(source)


def _exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))


def read_image(source: Source, axes: Axes = "anatomical") -> tuple[np.ndarray, Grid]:
    """Reads an image as ``(D, H, W, C)`` in the file's own scaled values.

    Raises:
        DataError: missing, truncated or of another format; fewer than two or more than four axes; no usable affine.
    """
    with _reading(source):
        if isinstance(source, tuple):
            array, grid = dicom.load(source, axes)
        else:
            _exists(source)
            array, grid = _reader(source)[1].load(source, axes)
    path = where(source)
    if array.dtype.kind not in "biuf":
        problem = Problem("dtype", path, f"holds {array.dtype} voxels", "real numbers", "convert the file")
        raise data_error([problem], "")
    array = array.reshape(array.shape + (1,) * (4 - array.ndim))
    if array.ndim != 4:
        problem = Problem("shape", path, f"has shape {array.shape}", "two to four axes", "split the file")
        raise data_error([problem], "")
    return grid.to_memory(array), grid


def read_volume(source: Source, axes: Axes = "anatomical") -> tuple[np.ndarray, Grid]:
    """Reads an image of one channel as ``(D, H, W)``.

    Raises:
        DataError: as `read_image` does, and for more than one channel.
    """
    array, grid = read_image(source, axes)
    if array.shape[3] != 1:
        shape = (*grid.shape, array.shape[3])
        problem = Problem("shape", where(source), f"has shape {shape}", "one 3D volume", "split it by its last axis")
        raise data_error([problem], "")
    return array[..., 0], grid
