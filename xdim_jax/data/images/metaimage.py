"""Reading MetaImage and NRRD files, and writing MetaImage files, with SimpleITK."""

from pathlib import Path
from typing import IO, Any

import numpy as np

from xdim_jax.data.images.grid import Axes, Grid, make_grid

_HEADER_LINES = 200  # number of lines at the start of a file that are searched for ElementDataFile
SUFFIXES = (".mhd", ".mha", ".nrrd")


def pixel_files(path: Path) -> tuple[Path, ...]:
    """Return the files with the pixels of an ``.mhd`` header; empty if the pixels are in the file itself."""
    if not path.name.lower().endswith(".mhd"):
        return ()
    try:
        with open(path, "rb") as file:
            for _ in range(_HEADER_LINES):
                key, _, value = file.readline(4096).decode(errors="replace").partition("=")
                if key.strip() == "ElementDataFile":
                    return tuple(path.parent / name for name in _listed(value.strip(), file))
    except (OSError, ValueError, TypeError):
        pass  # reading the image reports what is wrong
    return ()


def _listed(value: str, file: IO[bytes]) -> list[str]:
    """Return the names of the pixel files, given the value of ElementDataFile and the rest of the header."""
    first, *numbers = value.split()
    if first.upper() == "LOCAL":
        return []
    if first.upper() == "LIST":
        return [name for line in file if (name := line.decode(errors="replace").strip())]
    if "%" in first and len(numbers) == 3:  # a pattern, the first and the last number, and the step
        low, high, step = map(int, numbers)
        return [first % number for number in range(low, high + 1, step)]
    return [value]


def load(path: Path, axes: Axes) -> tuple[np.ndarray, Grid]:
    """Read the array in the axes of the file ``(x, y[, z][, c])``, and its grid."""
    import SimpleITK as sitk  # a large library that most runs do not need

    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)  # z, y, x[, components]
    n = image.GetDimension()
    array = array.transpose(*range(n)[::-1], *range(n, array.ndim))
    if n == 2 and array.ndim == 3:  # a plane of several components: the third axis is that of slices
        array = array[:, :, None]
    return array, _grid(path, image, axes)


def load_grid(path: Path, axes: Axes) -> Grid:
    """Read the grid from the header."""
    return _grid(path, _read_header(path), axes)


def voxel_type(path: Path) -> tuple[np.dtype, int]:
    """Return the dtype of the array from `load`, and its peak memory in bytes per voxel, including ITK's copy."""
    import SimpleITK as sitk

    dtype = sitk.GetArrayViewFromImage(sitk.Image([1] * 2, _read_header(path).GetPixelID())).dtype
    return dtype, 2 * dtype.itemsize


def _read_header(path: Path) -> Any:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Write a ``(D, H, W)`` array as uncompressed MetaImage: ``.mhd`` with a ``.raw`` file, or ``.mha``.

    A grid of one slice is written as a 2D image.

    Raises:
        ValueError: The array does not have the shape of the grid.
    """
    import SimpleITK as sitk

    volume = grid.to_file(array)
    n = 2 if volume.ndim == 2 or volume.shape[2] == 1 else 3
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.reshape(volume.shape[:n]).T))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine  # nibabel's frame is RAS, ITK's is LPS
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(0))
    image.SetSpacing([float(s) for s in lengths[:n]])
    image.SetOrigin([float(v) for v in affine[:n, 3]])
    direction = (affine[:3, :3] / lengths)[:n, :n]
    if abs(np.linalg.det(direction)) > 0.5:  # close to 0 for a 2D image that is not parallel to the x-y plane
        image.SetDirection([float(v) for v in direction.ravel()])
    sitk.WriteImage(image, str(path))


def _grid(path: Path, image: Any, axes: Axes) -> Grid:
    n = min(image.GetDimension(), 3)
    full = image.GetDimension()
    affine = np.eye(4)
    direction = np.reshape(image.GetDirection(), (full, full))[:n, :n]
    affine[:n, :n] = direction * np.asarray(image.GetSpacing()[:n])
    affine[:n, 3] = image.GetOrigin()[:n]
    affine[:2] *= -1  # ITK's frame is LPS, nibabel's is RAS
    return make_grid(path, tuple(image.GetSize()), affine, axes=axes)
