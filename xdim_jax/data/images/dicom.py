"""DICOM series and stacks of PNG masks; see docs/challenges.md, section "CHAOS: files".

A series is a list of files in the order of its slices, or one file with several frames. `xdim_jax.data.images.series`
finds the series below a folder and sorts their files by position; in CHAOS the names of the files define the order. The
affine follows from the positions of the slices, and not from SliceThickness, which may differ from the slice spacing.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.problem import ERROR, WARNING, DataError, Problem, data_error, errors
from xdim_jax.data.images.grid import Axes, Grid, make_grid
from xdim_jax.data.images.names import natural_key

# relative deviations of the distance between two slices from the median slice spacing
_UNEVEN = 0.1  # a larger deviation is a warning
# In a volume, the slice spacing is constant. The offset of a slice is its distance from its place in the volume, in
# slice spacings.
_ROUNDING = 0.22  # smaller offsets can be rounding errors of the header
# A larger offset is an error. If an offset is above _ROUNDING, it is also an error, such as a missing slice, if the
# distance of two slices deviates from the median by more than this fraction, or if the largest distance exceeds the
# smallest one by more than this fraction.
_GAP = 0.5
_THICK = 1.75  # a slice thickness outside of 1 / _THICK to _THICK times the slice spacing is reported
_TILT = (
    1.0  # a larger angle in degrees between the normal of the slices and the line through their positions is reported
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Geometry of one slice, from the header of its file.

    Positions are in mm; positions and directions are in the LPS frame. A value is None if its tag is missing or
    unusable. Missing Rows or Columns are 0.
    """

    path: Path
    size: tuple[int, int]  # rows, columns
    position: np.ndarray | None
    orientation: np.ndarray | None  # direction along a row, then down a column
    spacing: tuple[float, float] | None  # between rows, between columns
    echo_time: float | None
    thickness: float | None = None
    frame: int = 0  # index of the frame in the file

    @property
    def name(self) -> str:
        """Name of the file; for the second and later frames also the number of the frame, from 1."""
        return f"{self.path.name}, frame {self.frame + 1}" if self.frame else self.path.name

    @property
    def height(self) -> float:
        """Position along the normal of the slice, in mm."""
        assert self.position is not None and self.orientation is not None
        return float(self.position @ np.cross(self.orientation[:3], self.orientation[3:]))


def files_in_order(folder: Path, *suffixes: str) -> tuple[Path, ...]:
    """Return the files with these suffixes in natural order, without hidden files (``._*`` of macOS).

    The result is empty if the folder does not exist.
    """
    if not folder.is_dir():
        return ()
    found = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return tuple(sorted((p for p in found if p.suffix.lower() in suffixes), key=natural_key))


def read_headers(path: Path) -> list[Slice]:
    """Read the geometry of the slices of a file, sorted by position, without the pixels.

    Raises:
        DataError: The file is not DICOM.
    """
    return headers_of(path, read_file(path, stop_before_pixels=True))


def read_file(path: Path, **options: Any) -> Any:
    """Read a file with ``pydicom.dcmread``, also without the preamble that old archives omit.

    Raises:
        DataError: The file is not DICOM.
    """
    import pydicom  # not needed for the other formats
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(path, **options)
    except InvalidDicomError as error:
        if (data := _read_without_preamble(path, options)) is None:
            raise unreadable(path, "DICOM", error) from error
        return data
    except Exception as error:  # pydicom raises many types for damaged files
        raise unreadable(path, "DICOM", error) from error


def _read_without_preamble(path: Path, options: dict[str, Any]) -> Any:
    """Read a file that begins with its first data element; None if it is not DICOM."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with open(path, "rb") as file:
        if file.read(2) not in (b"\x08\x00", b"\x00\x08", b"\x02\x00"):  # group 0008 (or 0002) of the first element
            return None
    try:
        data = pydicom.dcmread(path, force=True, **options)
        if not data.get("SOPClassUID") or not data.get("Modality"):
            return None
        if "TransferSyntaxUID" not in data.file_meta:
            implicit, little = data.original_encoding
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    except Exception:  # any bytes can follow
        return None
    return data


def headers_of(path: Path, data: Any) -> list[Slice]:
    """Return the geometry of the slices of a file that has been read, see `read_headers`."""
    count = int(data.get("NumberOfFrames") or 1)
    slices = [_header(path, data, frame) for frame in range(count)]
    if count > 1 and all(s.position is not None and s.orientation is not None for s in slices):
        slices.sort(key=lambda s: s.height)
    return slices


def _header(path: Path, data: Any, frame: int) -> Slice:
    def numbers(tag: str, count: int) -> np.ndarray | None:
        try:
            array = np.array([float(v) for v in _tag(data, frame, tag)])
        except (TypeError, ValueError):
            return None
        return array if array.shape == (count,) and np.isfinite(array).all() else None

    def number(tag: str) -> float | None:
        try:
            return float(_tag(data, frame, tag))
        except (TypeError, ValueError):
            return None

    spacing = numbers("PixelSpacing", 2)
    return Slice(
        path,
        (int(data.get("Rows") or 0), int(data.get("Columns") or 0)),
        numbers("ImagePositionPatient", 3),
        numbers("ImageOrientationPatient", 6),
        (float(spacing[0]), float(spacing[1])) if spacing is not None else None,
        number("EchoTime"),
        number("SliceThickness"),
        frame,
    )


# tag -> functional group sequence that contains it in a multi-frame image (DICOM PS3.3, C.7.6.16)
_GROUPS = {
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}


def _tag(data: Any, frame: int, tag: str) -> Any:
    """Return the value of a tag for a frame, from the group of the frame, the shared group, or the file; or None."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = data.get(groups) if tag in _GROUPS else None
        if sequence and index < len(sequence) and (group := sequence[index].get(_GROUPS[tag])) and tag in group[0]:
            return group[0].get(tag)
    return data.get(tag)


def series_problems(slices: Sequence[Slice]) -> list[Problem]:
    """Return the problems of the headers of a series.

    Each check is made only if the previous ones find no problem: missing tags and different sizes; different pixel
    sizes and orientations; distances between slices; tilt and thickness.
    """
    first, problems = slices[0], []
    for s in slices:
        if s.size != first.size:
            problems.append(
                Problem(
                    "shape",
                    s.path,
                    found=f"has {s.size[0]} x {s.size[1]} pixels, but {first.path.name} has "
                    f"{first.size[0]} x {first.size[1]}",
                    expected="one size per series",
                    suggestion="download the series again",
                )
            )
        tags = {"ImagePositionPatient": s.position, "ImageOrientationPatient": s.orientation, "PixelSpacing": s.spacing}
        if missing := [tag for tag, value in tags.items() if value is None]:
            problems.append(
                Problem(
                    "no_geometry",
                    s.path,
                    found=f"lacks {', '.join(missing)}",
                    expected="tags with position, orientation and pixel size",
                    suggestion="restore the tags, or omit the series",
                )
            )
        elif s.spacing is not None and min(s.spacing) <= 0:
            problems.append(
                Problem(
                    "no_geometry",
                    s.path,
                    found=f"has PixelSpacing {s.spacing[0]:g} x {s.spacing[1]:g}",
                    expected="pixel sizes above zero",
                    suggestion="restore the tag",
                )
            )
    return problems or _plane_problems(slices) or _step_problems(slices) or _axis_problems(slices)


def _plane_problems(slices: Sequence[Slice]) -> list[Problem]:
    """Return a problem for each slice whose pixel size or orientation differs from that of the first slice."""
    first, problems = slices[0], []
    assert first.spacing is not None and first.orientation is not None
    for s in slices[1:]:
        assert s.spacing is not None and s.orientation is not None
        if not np.allclose(s.spacing, first.spacing, rtol=1e-3):
            problems.append(
                Problem(
                    "spacing",
                    s.path,
                    found=f"has pixels of {s.spacing[0]:g} x {s.spacing[1]:g} mm{_frame(s)}, but {first.name} of "
                    f"{first.spacing[0]:g} x {first.spacing[1]:g} mm",
                    expected="one pixel size per series",
                    suggestion="put each series into its own folder",
                )
            )
        if not np.allclose(s.orientation, first.orientation, atol=1e-3):
            problems.append(
                Problem(
                    "affine",
                    s.path,
                    found=f"has a slice{_frame(s)} that is not parallel to {first.name}",
                    expected="parallel slices",
                    suggestion="put each series into its own folder",
                )
            )
    return problems


def _frame(s: Slice) -> str:
    """Return the number of the frame as text for a message about its file; empty for the first or only frame."""
    return f" in frame {s.frame + 1}" if s.frame else ""


def _step_problems(slices: Sequence[Slice]) -> list[Problem]:
    """Return a problem for each slice at a duplicate or uneven position, or in the wrong order."""
    if len(slices) < 2:
        return []
    first = slices[0]
    assert first.orientation is not None
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    along = np.array([s.position @ normal for s in slices if s.position is not None])
    steps = np.diff(along)
    usual, smallest, largest = (float(f(np.abs(steps))) for f in (np.median, np.min, np.max))
    offsets = np.abs(along - np.linspace(along[0], along[-1], len(along)))
    farthest, spacing = int(offsets.argmax()), abs(along[-1] - along[0]) / len(steps)
    misplaced = offsets[farthest] > _ROUNDING * spacing
    uneven = largest > (1 + _GAP) * smallest
    problems = []
    for i, step in enumerate(steps):
        previous, path, where = slices[i].name, slices[i + 1].path, _frame(slices[i + 1])
        if abs(step) < 1e-3:
            problems.append(
                Problem(
                    "duplicate_slice",
                    path,
                    found=f"has{where} the same position as {previous}",
                    expected="slices at different positions",
                    suggestion="remove one of the two",
                )
            )
        elif np.sign(step) != np.sign(along[-1] - along[0]):
            problems.append(
                Problem(
                    "slice_order",
                    path,
                    found=f"follows{where} {previous} by name, but precedes it by position",
                    expected="file names in the order of the positions",
                    suggestion="rename the files in the order of their positions",
                )
            )
        elif abs(abs(step) - usual) > _UNEVEN * usual:
            problems.append(
                Problem(
                    "slice_gap",
                    path,
                    found=f"has{where} a distance of {abs(step):.2f} mm to {previous}, but the median slice spacing is "
                    f"{usual:.2f} mm",
                    expected="a constant slice spacing",
                    suggestion="download the missing slice, or resample the series",
                    severity=ERROR if misplaced and (uneven or abs(abs(step) - usual) > _GAP * usual) else WARNING,
                )
            )
    if not errors(problems) and offsets[farthest] > _GAP * spacing:
        s = slices[farthest]
        problems.append(
            Problem(
                "slice_gap",
                s.path,
                found=f"has{_frame(s)} a distance of {offsets[farthest]:.2f} mm to the place that it would have with a "
                f"constant slice spacing of {spacing:.2f} mm",
                expected="a constant slice spacing",
                suggestion="resample the series",
            )
        )
    return problems


def _axis_problems(slices: Sequence[Slice]) -> list[Problem]:
    """Return a problem if the slices are tilted, and one if their thickness differs from the slice spacing."""
    if len(slices) < 2:
        return []
    first, last = slices[0], slices[-1]
    assert first.position is not None and last.position is not None and first.orientation is not None
    line = last.position - first.position
    pitch = float(np.linalg.norm(line)) / (len(slices) - 1)
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    angle = math.degrees(math.acos(min(1.0, abs(float(line @ normal)) / float(np.linalg.norm(line)))))
    problems = []
    if angle > _TILT:
        problems.append(
            Problem(
                "gantry_tilt",
                first.path.parent,
                found=f"has slices that are tilted by {angle:.1f} degrees against the axis of the series",
                expected="slices perpendicular to the axis",
                suggestion="resample the series, because the anatomy is sheared",
                severity=WARNING,
            )
        )
    if first.thickness and not 1 / _THICK < first.thickness / pitch < _THICK:
        problems.append(
            Problem(
                "spacing",
                first.path.parent,
                found=f"has SliceThickness {first.thickness:g} mm, but a slice spacing of {pitch:.4g} mm",
                expected="a thickness similar to the slice spacing",
                suggestion="no change is needed if the slices overlap or have gaps; xdim_jax uses the slice spacing",
                severity=WARNING,
            )
        )
    return problems


def series_grid(slices: Sequence[Slice], axes: Axes) -> Grid:
    """Return the grid of a series in the given order; its file axes are columns, rows, slices.

    Args:
        slices: Geometry of the slices.
        axes: How file axes are converted to axes in memory.

    Raises:
        DataError: The headers contradict each other.
    """
    first, last = slices[0], slices[-1]
    if fatal := errors(series_problems(slices)):
        raise data_error(*fatal, summary="slices that do not fit together")
    assert first.position is not None and last.position is not None
    assert first.orientation is not None and first.spacing is not None
    across, down = first.orientation[:3], first.orientation[3:]
    affine = np.eye(4)
    affine[:3, 0] = across * first.spacing[1]
    affine[:3, 1] = down * first.spacing[0]
    if len(slices) > 1:
        affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    else:  # the slice spacing is unknown, but must not be zero
        affine[:3, 2] = np.cross(across, down) * first.spacing[0]
    affine[:3, 3] = first.position
    affine[:2] *= -1  # DICOM's frame is LPS, nibabel's is RAS
    return make_grid(first.path.parent, (first.size[1], first.size[0], len(slices)), affine, axes=axes)


def load(files: Sequence[Path], axes: Axes) -> tuple[np.ndarray, Grid]:
    """Return the voxels ``(x, y, z)`` in the given order, with slope and intercept applied, and the grid.

    Raises:
        DataError: Files cannot be read, or their headers contradict each other.
    """
    headers, planes, problems = [], [], []
    for path in files:
        try:
            data = read_file(path)
            slices = headers_of(path, data)
            planes += _rescaled(path, data, slices)
            headers += slices  # `data` itself is not kept, because it contains the pixels
        except DataError as error:
            problems += error.problems
    if problems:
        raise data_error(*problems, summary="damaged slices")
    grid = series_grid(headers, axes)
    real = any(plane.dtype.kind == "f" for plane in planes)
    array = np.empty((len(planes), *planes[0].shape), np.float32 if real else np.int32)
    for k in range(len(array)):
        array[k] = planes.pop(0)  # each plane is freed as soon as it is copied
    return array.transpose(2, 1, 0), grid


# dtype of the array from `load` (or float32, which has the same size), and its peak memory in bytes per voxel
VOXEL_TYPE = np.dtype(np.int32), 4


def _rescaled(path: Path, data: Any, slices: Sequence[Slice]) -> list[np.ndarray]:
    """Return the planes of the slices of a file, with slope and intercept applied."""
    try:
        pixels = data.pixel_array
    except Exception as error:  # pydicom and its decoders raise many types for damaged pixels
        raise _undecodable(path, data, error) from error
    frames = pixels if pixels.ndim == 3 and len(slices) > 1 else pixels[None]
    if frames.ndim != 3 or len(frames) != len(slices):
        raise data_error(
            Problem(
                "shape",
                path,
                found=f"has pixels of shape {pixels.shape}",
                expected="one grey plane for each frame",
                suggestion="split it, or save it without colours",
            )
        )
    planes = []
    for s in slices:
        slope, intercept = (
            float(default if (value := _tag(data, s.frame, tag)) in (None, "") else value)
            for tag, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        if slope.is_integer() and intercept.is_integer():
            planes.append(frames[s.frame].astype(np.int32) * int(slope) + int(intercept))
        else:
            planes.append(frames[s.frame].astype(np.float32) * np.float32(slope) + np.float32(intercept))
    return planes


def _undecodable(path: Path, data: Any, error: Exception) -> DataError:
    """Return the error for pixels that cannot be decoded; it names the compression if no decoder is installed."""
    from pydicom.pixels.decoders.base import get_decoder

    syntax = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", None)
    try:
        missing = syntax is not None and syntax.is_compressed and not get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        missing = True
    if not missing:
        return unreadable(path, "DICOM", error)
    return data_error(
        Problem(
            "unreadable",
            path,
            found=f"is compressed as {getattr(syntax, 'name', syntax)}",
            expected="a compression with an installed decoder",
            suggestion="pip install python-gdcm, or export the series uncompressed",
        )
    )


def load_masks(files: Sequence[Path]) -> np.ndarray:
    """Return the grey values of PNG files in the given order, uint8 ``(x, y, z)``; those of a 1-bit mask are 0 and 1.

    Raises:
        DataError: Files cannot be read, or have different sizes.
    """
    planes: list[np.ndarray] = []
    problems = []
    for path in files:
        try:
            plane = _read_mask(path)
        except DataError as error:
            problems += error.problems
            continue
        if planes and plane.shape != planes[0].shape:
            problems.append(
                Problem(
                    "shape",
                    path,
                    found=f"has {plane.shape[0]} x {plane.shape[1]} pixels, but the first mask has "
                    f"{planes[0].shape[0]} x {planes[0].shape[1]}",
                    expected="one size per series",
                    suggestion="download the masks again",
                )
            )
        planes.append(plane)
    if problems:
        raise data_error(*problems, summary="damaged masks")
    return np.stack(planes, -1).swapaxes(0, 1)


def _read_mask(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            plane = np.asarray(image)
    except Exception as error:  # Pillow raises many types for damaged files
        raise unreadable(path, "PNG", error) from error
    if plane.ndim == 3 and (plane == plane[..., :1]).all():  # a grey image that was saved in colour
        plane = plane[..., 0]
    if plane.ndim != 2:
        raise data_error(
            Problem(
                "shape",
                path,
                found=f"has an array of shape {plane.shape}",
                expected="one grey plane",
                suggestion="save it without colours",
            )
        )
    values = np.unique(plane)
    if values[-1] > 255 and values[values > 0].size > 1:
        raise data_error(
            Problem(
                "label_scale",
                path,
                found=f"has the values {', '.join(map(str, values[:6]))}{', ...' if values.size > 6 else ''}",
                expected="grey values from 0 to 255",
                suggestion="save it with 8 bits, without a change of its values",
            )
        )
    return np.minimum(plane, 255).astype(np.uint8)  # the cast alone would convert 256 to 0, the background


def unreadable(path: Path, format_name: str, error: Exception) -> DataError:
    """Return the error for a file that a library could not read."""
    size = f"has {path.stat().st_size} bytes" if path.is_file() else "is not a file"
    return data_error(
        Problem(
            "unreadable",
            path,
            found=f"cannot be read as {format_name} ({type(error).__name__}: {error}); it {size}",
            expected=f"a complete {format_name} file",
            suggestion="the download may be truncated or damaged: download it again",
        )
    )
