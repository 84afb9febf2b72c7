"""MetaImage and NRRD, read with SimpleITK."""

from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.data.grid import Axes, Grid, make_grid

SUFFIXES = (".mhd", ".mha", ".nrrd")


def load(path: Path, axes: Axes) -> tuple[np.ndarray, Grid]:
    """The array in the file's axes ``(x, y[, z][, c])``, and its grid."""
    import SimpleITK as sitk  # a large library that most runs do not need

    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)  # z, y, x[, components]
    n = image.GetDimension()
    array = array.transpose(*range(n)[::-1], *range(n, array.ndim))
    return array, _grid(path, image, axes)


def load_grid(path: Path, axes: Axes) -> Grid:
    """Reads the header alone."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return _grid(path, reader, axes)


def _grid(path: Path, image: Any, axes: Axes) -> Grid:
    n = min(image.GetDimension(), 3)
    full = image.GetDimension()
    affine = np.eye(4)
    direction = np.reshape(image.GetDirection(), (full, full))[:n, :n]
    affine[:n, :n] = direction * np.asarray(image.GetSpacing()[:n])
    affine[:n, 3] = image.GetOrigin()[:n]
    affine[:2] *= -1  # ITK's frame is LPS, nibabel's RAS
    return make_grid(path, tuple(image.GetSize()), affine, axes=axes)
