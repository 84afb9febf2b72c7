"""DICOM series, and stacks of PNG masks beside them (spec: challenges, section 2.6).

A series is a list of files whose order is given: that of the file names, by which CHAOS defines it. The affine comes
from the slices' positions, and never from SliceThickness, which need not be the distance of slices.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.problem import ERROR, WARNING, DataError, Problem, data_error, errors
from xdim_jax.data.images.grid import Axes, Grid, make_grid

_UNEVEN, _GAP = 0.1, 0.5  # share of the usual step by which a step may differ: to be looked at; a slice is missing


@dataclasses.dataclass(frozen=True)
class Slice:
    """What the header of one file says. Positions and directions in mm, LPS; None: the tag is missing or unusable."""

    path: Path
    size: tuple[int, int]  # rows, columns
    position: np.ndarray | None
    orientation: np.ndarray | None  # along a row, down a column
    spacing: tuple[float, float] | None  # between rows, between columns
    echo_time: float | None
    series: str


def natural(path: Path) -> list[Any]:
    """Sorts names with numbers by the numbers: img2 before img10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def files_in_order(folder: Path, *suffixes: str) -> tuple[Path, ...]:
    """The files of a folder in natural order of their names; hidden ones (``._*`` of macOS) are left out."""
    if not folder.is_dir():
        return ()
    found = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return tuple(sorted((p for p in found if p.suffix.lower() in suffixes), key=natural))


def read_header(path: Path) -> Slice:
    """Reads everything but the pixels. Raises DataError for a file that is not DICOM."""
    return _header(path, _read(path, stop_before_pixels=True))


def _read(path: Path, **options: Any) -> Any:
    import pydicom  # not needed for the other formats

    try:
        return pydicom.dcmread(path, **options)
    except Exception as error:  # pydicom raises many kinds for damaged files
        raise unreadable(path, "DICOM", error) from error


def _header(path: Path, data: Any) -> Slice:
    def numbers(tag: str, count: int) -> np.ndarray | None:
        value = data.get(tag)
        if value is None or isinstance(value, str) or len(value) != count:
            return None
        array = np.array([float(v) for v in value])
        return array if np.isfinite(array).all() else None

    spacing = numbers("PixelSpacing", 2)
    echo = data.get("EchoTime")
    return Slice(
        path,
        (int(data.get("Rows", 0)), int(data.get("Columns", 0))),
        numbers("ImagePositionPatient", 3),
        numbers("ImageOrientationPatient", 6),
        (float(spacing[0]), float(spacing[1])) if spacing is not None else None,
        float(echo) if echo not in (None, "") else None,
        str(data.get("SeriesInstanceUID", "")),
    )


def series_problems(slices: Sequence[Slice], case_id: str = "") -> list[Problem]:
    """Everything in the headers of a series that does not fit."""
    first, problems = slices[0], []
    for s in slices:
        if s.size != first.size:
            found = f"has {s.size[0]} x {s.size[1]} pixels, but {first.path.name} has {first.size[0]} x {first.size[1]}"
            problems.append(Problem("shape", s.path, found, "one size per series", "fetch the series again", case_id))
        tags = {"ImagePositionPatient": s.position, "ImageOrientationPatient": s.orientation, "PixelSpacing": s.spacing}
        if missing := [tag for tag, value in tags.items() if value is None]:
            found, step = f"lacks {', '.join(missing)}", "restore the tags, or leave the series out"
            problems.append(Problem("no_geometry", s.path, found, "the tags of an image in space", step, case_id))
        elif s.spacing is not None and min(s.spacing) <= 0:
            found, step = f"has PixelSpacing {s.spacing[0]:g} x {s.spacing[1]:g}", "restore the tag"
            problems.append(Problem("no_geometry", s.path, found, "pixels larger than zero", step, case_id))
    if problems:
        return problems
    assert first.spacing is not None and first.orientation is not None
    for s in slices[1:]:
        assert s.spacing is not None and s.orientation is not None
        if not np.allclose(s.spacing, first.spacing, rtol=1e-3):
            found = f"has pixels of {s.spacing[0]:g} mm, but {first.path.name} has {first.spacing[0]:g}"
            problems.append(
                Problem("spacing", s.path, found, "one pixel size per series", "part the series by folder", case_id)
            )
        if not np.allclose(s.orientation, first.orientation, atol=1e-3):
            found = f"is turned against {first.path.name}"
            problems.append(Problem("affine", s.path, found, "parallel slices", "part the series by folder", case_id))
    return problems or _step_problems(slices, case_id)


def _step_problems(slices: Sequence[Slice], case_id: str) -> list[Problem]:
    if len(slices) < 2:
        return []
    first = slices[0]
    assert first.orientation is not None
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    along = np.array([s.position @ normal for s in slices if s.position is not None])
    steps = np.diff(along)
    usual = float(np.median(np.abs(steps)))
    problems = []
    for i, step in enumerate(steps):
        pair = f"{slices[i].path.name} and {slices[i + 1].path.name}"
        where = slices[i + 1].path
        if abs(step) < 1e-3:
            found, do = f"lies where {slices[i].path.name} does", "remove one of the two"
            problems.append(Problem("duplicate_slice", where, found, "one slice at a place", do, case_id))
        elif np.sign(step) != np.sign(along[-1] - along[0]):
            found = f"lies behind {slices[i].path.name}, against the direction of the series"
            do = "name the files in the order of their positions"
            problems.append(Problem("slice_order", where, found, "names in the order of positions", do, case_id))
        elif abs(abs(step) - usual) > _UNEVEN * usual:
            found = f"leaves {abs(step):.2f} mm between {pair}, where the usual step is {usual:.2f} mm"
            do = "fetch the missing slice, or resample the series"
            severity = ERROR if abs(abs(step) - usual) > _GAP * usual else WARNING
            problems.append(Problem("slice_gap", where, found, "equal steps", do, case_id, severity))
    return problems


def series_grid(slices: Sequence[Slice], axes: Axes) -> Grid:
    """The grid of a series in the given order: columns, rows, slices.

    Raises:
        DataError: the headers do not fit together.
    """
    first, last = slices[0], slices[-1]
    if fatal := errors(series_problems(slices)):
        raise data_error(fatal, "slices that do not fit together")
    assert first.position is not None and last.position is not None
    assert first.orientation is not None and first.spacing is not None
    across, down = first.orientation[:3], first.orientation[3:]
    affine = np.eye(4)
    affine[:3, 0] = across * first.spacing[1]
    affine[:3, 1] = down * first.spacing[0]
    alone = np.cross(across, down) * first.spacing[0]  # one slice has no step; any makes a volume of it
    affine[:3, 2] = (last.position - first.position) / (len(slices) - 1) if len(slices) > 1 else alone
    affine[:3, 3] = first.position
    affine[:2] *= -1  # DICOM's frame is LPS, nibabel's RAS
    return make_grid(first.path.parent, (first.size[1], first.size[0], len(slices)), affine, axes=axes)


def load(files: Sequence[Path], axes: Axes) -> tuple[np.ndarray, Grid]:
    """The stored values with slope and intercept applied, ``(x, y, z)`` in the given order, and the grid."""
    headers, planes, problems = [], [], []
    for path in files:
        try:
            data = _read(path)
            planes.append(_rescaled(path, data))
            headers.append(_header(path, data))  # of the slice as it was read nothing else is kept
        except DataError as error:
            problems += error.problems
    if problems:
        raise data_error(problems, "damaged slices")
    grid = series_grid(headers, axes)
    real = any(plane.dtype.kind == "f" for plane in planes)
    array = np.empty((len(planes), *planes[0].shape), np.float32 if real else np.int32)
    for k in range(len(array)):
        array[k] = planes.pop(0)  # a plane is freed as soon as it is copied
    return array.transpose(2, 1, 0), grid


VOXEL_TYPE = np.dtype(np.int32), 4  # as `load` returns them, or float32; and bytes per voxel that it takes


def _rescaled(path: Path, data: Any) -> np.ndarray:
    try:
        pixels = data.pixel_array
    except Exception as error:  # pydicom and its decoders raise many kinds for damaged pixels
        raise unreadable(path, "DICOM", error) from error
    if pixels.ndim != 2:
        found = f"has pixels of shape {pixels.shape}"
        raise data_error([Problem("shape", path, found, "one grey plane", "split it, or save it without colours")], "")
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    if slope.is_integer() and intercept.is_integer():
        return pixels.astype(np.int32) * int(slope) + int(intercept)
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def load_masks(files: Sequence[Path]) -> np.ndarray:
    """Grey values of PNG files in the given order, uint8 ``(x, y, z)``; a mask of one bit gives 0 and 1."""
    planes: list[np.ndarray] = []
    problems = []
    for path in files:
        try:
            plane = _read_mask(path)
        except DataError as error:
            problems += error.problems
            continue
        if planes and plane.shape != planes[0].shape:
            found = f"has {plane.shape[0]} x {plane.shape[1]} pixels, but others have "
            found += f"{planes[0].shape[0]} x {planes[0].shape[1]}"
            problems.append(Problem("shape", path, found, "one size per series", "fetch the masks again"))
        planes.append(plane)
    if problems:
        raise data_error(problems, "damaged masks")
    return np.stack(planes, -1).swapaxes(0, 1)


def _read_mask(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            plane = np.asarray(image)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise unreadable(path, "PNG", error) from error
    if plane.ndim == 3 and (plane == plane[..., :1]).all():  # grey, saved as colours
        plane = plane[..., 0]
    if plane.ndim != 2:
        found = f"has an array of shape {plane.shape}"
        raise data_error([Problem("shape", path, found, "one grey plane", "save it without colours")], "")
    return np.minimum(plane, 255).astype(np.uint8)  # what is brighter is a structure too


def unreadable(path: Path, form: str, error: Exception) -> DataError:
    """The error for a file that a library could not read."""
    size = f"{path.stat().st_size} bytes" if path.is_file() else "not a file"
    found = f"cannot be read as {form} ({type(error).__name__}: {error}); it is {size}"
    step = "perhaps a truncated or damaged download: fetch it again"
    return data_error([Problem("unreadable", path, found, f"a whole {form} file", step)], "")
