"""Images in any supported format: NIfTI, MetaImage and NRRD files, and series of DICOM slices."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import Problem, data_error
from xdim_jax.data.images import dicom, metaimage, names, nifti
from xdim_jax.data.images.grid import Axes, Grid

SUFFIXES = (*nifti.SUFFIXES, *metaimage.SUFFIXES)

# an image of a case: one file, or the files of a series in order
Source = Path | tuple[Path, ...]


def strip_suffix(name: str) -> str | None:
    """Return a file name, in Unicode normal form C, without its image suffix; None if it has no image suffix."""
    return names.strip(name, SUFFIXES)


def images_in(folder: Path) -> list[tuple[str, Path]]:
    """Return the image files in a folder with their names without suffix; hidden files are omitted."""
    if not folder.is_dir():
        return []
    found = [(strip_suffix(p.name), p) for p in sorted(folder.iterdir()) if not names.is_hidden(p) and p.is_file()]
    return [(name, path) for name, path in found if name is not None]


def unique_images(images: Sequence[tuple[str, Path]], case_id: str = "") -> tuple[dict[str, Path], list[Problem]]:
    """Return name -> image, and a problem for each further image with the same name.

    Args:
        images: Result of `images_in`.
        case_id: Case of the images; empty if the name of an image is its case.
    """
    found: dict[str, Path] = {}
    problems = []
    for name, path in images:
        if name in found:
            problems.append(same_name(path, found[name], case_id or name))
        found.setdefault(name, path)
    return found, problems


def same_name(path: Path, other: Path, case_id: str) -> Problem:
    """Return the problem of two files whose names differ only in the suffix or in the Unicode form."""
    return Problem(
        "duplicate_case",
        path,
        found=f"and {other.name} have the same name without suffix",
        expected="one file",
        suggestion="keep one",
        case_id=case_id,
    )


def source_path(source: Source) -> Path:
    """Return the path of an image for messages: the file, or the folder of a series."""
    return source if isinstance(source, Path) else source[0].parent


def files_of(source: Source) -> tuple[Path, ...]:
    """Return all files of an image; of a MetaImage header, also those with the pixels."""
    return (source, *metaimage.pixel_files(source)) if isinstance(source, Path) else source


def source_to_json(source: Source) -> str | list[str]:
    """Return the absolute path of a file, or those of the files of a series."""
    return str(source.absolute()) if isinstance(source, Path) else [str(path.absolute()) for path in source]


def source_from_json(value: str | list[str]) -> Source:
    """Return the image from the result of `source_to_json`; the path of a folder stands for its ``.dcm`` files."""
    if isinstance(value, list):
        return tuple(map(Path, value))
    return dicom.files_in_order(path, ".dcm") if (path := Path(value)).is_dir() else path


def _reader(path: Path) -> tuple[str, Any]:
    """Return the name of the format of a file, and the module that reads it."""
    is_metaimage = names.strip(path.name, metaimage.SUFFIXES) is not None
    return ("MetaImage or NRRD", metaimage) if is_metaimage else ("NIfTI", nifti)


@contextlib.contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        path = Path(error.filename or source_path(source))
        raise data_error(
            Problem("unreadable", path, found="does not exist", expected="a file", suggestion="download it again")
        ) from error
    except Exception as error:  # nibabel, zlib, ITK and pydicom raise many types for damaged files
        name = "DICOM" if isinstance(source, tuple) else _reader(source)[0]
        raise dicom.unreadable(source_path(source), name, error) from error


def read_grid(source: Source, axes: Axes = "anatomical") -> Grid:
    """Read the grid of an image from its header, without the voxels.

    Args:
        source: File or series.
        axes: How file axes are converted to axes in memory.

    Raises:
        DataError: The header has a problem for which `read_image` raises an error.
    """
    with _reading(source):
        if isinstance(source, tuple):
            return dicom.series_grid([s for path in source for s in dicom.read_headers(path)], axes)
        _check_exists(source)
        return _reader(source)[1].load_grid(source, axes)


def voxel_type(source: Source) -> tuple[np.dtype, int]:
    """Predict the memory that `read_image` needs, from the header alone.

    Returns:
        The dtype of the array, and the peak memory while it is read, in bytes per voxel.

    Raises:
        DataError: The header cannot be read, see `read_grid`.
    """
    if isinstance(source, tuple):
        return dicom.VOXEL_TYPE
    with _reading(source):
        _check_exists(source)
        return _reader(source)[1].voxel_type(source)


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))


def read_image(source: Source, axes: Axes = "anatomical") -> tuple[np.ndarray, Grid]:
    """Read an image and its grid.

    Args:
        source: File or series.
        axes: How file axes are converted to axes in memory.

    Returns:
        The array ``(D, H, W, C)``, with the scaling of the file applied; and the grid.

    Raises:
        DataError: The file is missing, truncated or in another format, its voxels are not real numbers, it has fewer
            than two or more than four axes, or it has no usable affine.
    """
    with _reading(source):
        if isinstance(source, tuple):
            array, grid = dicom.load(source, axes)
        else:
            _check_exists(source)
            array, grid = _reader(source)[1].load(source, axes)
    if array.dtype.kind not in "biuf":
        raise data_error(
            Problem(
                "dtype",
                source_path(source),
                found=f"contains {array.dtype} voxels",
                expected="real numbers",
                suggestion="convert the file",
            )
        )
    array = array.reshape(array.shape + (1,) * (4 - array.ndim))
    if array.ndim != 4:
        raise data_error(
            Problem(
                "shape",
                source_path(source),
                found=f"has shape {array.shape}",
                expected="two to four axes",
                suggestion="split the file",
            )
        )
    return grid.to_memory(array), grid


def read_volume(source: Source, axes: Axes = "anatomical") -> tuple[np.ndarray, Grid]:
    """Read an image of one channel and its grid, like `read_image`, but as an array ``(D, H, W)``.

    Raises:
        DataError: See `read_image`; also raised if the image has more than one channel.
    """
    array, grid = read_image(source, axes)
    if array.shape[3] != 1:
        raise data_error(
            Problem(
                "shape",
                source_path(source),
                found=f"has shape {(*grid.shape, array.shape[3])}",
                expected="one 3D volume",
                suggestion="split it along its last axis",
            )
        )
    return array[..., 0], grid
