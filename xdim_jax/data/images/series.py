"""DICOM series below a folder, as an archive (PACS) exports them.

File names have no meaning, and can have any suffix or none. Files are grouped by PatientID, StudyInstanceUID and
SeriesInstanceUID, and sorted by ImagePositionPatient along the normal of the slices. A file with several frames is a
series of its own. Localizers, secondary captures, segmentations and reports are omitted. A single slice of CT, MR or
PET is omitted if its study also has larger series.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import shorten
from xdim_jax.base.problem import ERROR, WARNING, Problem
from xdim_jax.data.images import dicom
from xdim_jax.data.images.dicom import Slice
from xdim_jax.data.images.names import is_companion, natural_key, strip

_OTHER_FORMATS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".png", ".jpg", ".jpeg", ".zip", ".gz", ".tar", ".raw")
_TAGS = (
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription"),
    *("Modality", "ImageType", "SOPClassUID"),
    *("EchoTime", "AcquisitionNumber", "TemporalPositionIdentifier", "DiffusionBValue"),
)
_GEOMETRY = (
    *("NumberOfFrames", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SliceThickness", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_NO_IMAGES = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "PR", "KO", "SR", "REG", "DOC")  # modalities
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # SOP class of screenshots; ...7.1 to ...7.4 have several frames
_VOLUMETRIC = ("CT", "MR", "PT")  # a single slice of these modalities, next to larger series, is a planning image
UNKNOWN_FORMAT = "is not an image in a known format"  # a reason for which `find_series` omits a file
# tags that can distinguish the volumes of a series with several slices at each position
_VOLUME_TAGS = ("EchoTime", "TemporalPositionIdentifier", "DiffusionBValue", "AcquisitionNumber")


@dataclasses.dataclass(frozen=True)
class Series:
    """A DICOM series, or one of its volumes.

    Attributes:
        name: PatientID and SeriesNumber, as in ``P01_3``; if the headers lack them, the names of the last two folders.
            If names would not be unique, the number of the volume, the folder or another number is appended.
        files: The files, sorted by position; by name if positions are missing.
        uid: SeriesInstanceUID.
        number: SeriesNumber.
        description: SeriesDescription.
        modality: Modality, e.g. CT or MR.
        frames: Number of slices.
        problems: Problems of the headers, see `xdim_jax.data.images.dicom.series_problems`.
    """

    name: str
    files: tuple[Path, ...]
    uid: str
    number: str
    description: str
    modality: str
    frames: int
    problems: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        described = f" ({self.description})" if self.description else ""
        return f"{self.name}{described}, {self.modality or 'unknown modality'}, {len(self.files)} files"

    def matches(self, selector: str) -> bool:
        """Return whether a text is the name, UID or number of the series, or its description (ignoring case)."""
        return selector in (self.name, self.uid, self.number) or selector.lower() == self.description.lower()


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    tags: Mapping[str, str]
    slices: tuple[Slice, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """The DICOM series among some files.

    Attributes:
        series: The series, sorted by name. A series has an error if it is the only series in a folder with a
            damaged file, because this file is probably one of its slices. If the folder has other series as well, they
            all have a warning instead.
        left_out: Files that belong to no series and are no images of patients, with the reason. Files that are known to
            accompany images, and files of other image formats, are not listed.
        damaged: Files that are probably images, but cannot be read, with the reason.
    """

    series: list[Series]
    left_out: dict[Path, str]
    damaged: dict[Path, str]


def find_series(folder: Path, files: Iterable[Path]) -> Found:
    """Find the DICOM series among the given files.

    Args:
        folder: Folder that contains the files.
        files: The files.
    """
    groups: dict[Hashable, list[_File]] = defaultdict(list)
    left_out: dict[Path, str] = {}
    damaged: dict[Path, str] = {}
    for path in files:
        if is_companion(path) or strip(path.name, _OTHER_FORMATS) is not None:
            continue
        try:
            file = _read(path)
        except Exception:  # pydicom raises many types for damaged or unusual headers
            if not path.exists():
                damaged[path] = "is a link to a file that does not exist"
            elif path.suffix.lower() == ".dcm" or _has_mark(path):
                damaged[path] = "cannot be read as DICOM"
            else:
                left_out[path] = UNKNOWN_FORMAT
            continue
        modality, kind = file.tags["Modality"], file.tags["SOPClassUID"]
        if modality in _NO_IMAGES:
            left_out[path] = f"has no image ({modality})"
        elif not file.slices[0].size[0] and (not modality or _is_image(kind)):
            damaged[path] = "ends within its header"
        elif not file.slices[0].size[0]:
            left_out[path] = f"has no image ({modality})"
        elif f"{kind}.".startswith(f"{_SECONDARY_CAPTURE}."):
            left_out[path] = "is a secondary capture"
        elif "LOCALIZER" in file.tags["ImageType"].upper():
            left_out[path] = "is a localizer"
        elif len(file.slices) > 1:
            groups[path].append(file)
        else:
            series = file.tags["SeriesInstanceUID"] or path.parent
            groups[file.tags["PatientID"], file.tags["StudyInstanceUID"], series].append(file)
    patterns = {(file.path.parent, _pattern(file.path)) for group in groups.values() for file in group}
    for path in [p for p in left_out if (p.parent, _pattern(p)) in patterns and p.exists() and not p.stat().st_size]:
        del left_out[path]
        damaged[path] = "is empty"
    found: list[tuple[Hashable, Series]] = []  # with their studies
    for group in groups.values():
        series, dropped = _split(sorted(group, key=lambda f: natural_key(f.path)))
        found += [(_study(group[0]), s) for s in series]
        left_out |= dropped
    large = {study for study, s in found if s.frames > 1}
    single = [s for study, s in found if study in large and s.frames == 1 and s.modality in _VOLUMETRIC]
    left_out |= {s.files[0]: "is the only slice of its series" for s in single}
    kept = _with_unique_names([s for _, s in found if s not in single], folder)
    return Found(sorted(_mark_incomplete(kept, damaged), key=lambda s: s.name), left_out, damaged)


def _pattern(path: Path) -> str:
    """Return the name of a file without its digits, which is the same for the slices of a series."""
    return re.sub(r"\d+", "", path.name.lower())


def _study(file: _File) -> Hashable:
    """Return the patient and the study of a file; its folder if the header has neither."""
    study = file.tags["PatientID"], file.tags["StudyInstanceUID"]
    return study if any(study) else file.path.parent


def _is_image(uid: str) -> bool:
    """Return whether a SOPClassUID is that of images, rather than of raw data, spectra or documents."""
    from pydicom.uid import UID

    return "Image Storage" in UID(uid).name


def _mark_incomplete(series: Sequence[Series], damaged: Mapping[Path, str]) -> list[Series]:
    """Add a problem to every series in a folder with damaged files: an error if it is alone there, else a warning."""
    folders = Counter(folder for s in series for folder in {path.parent for path in s.files})
    marked = []
    for s in series:
        own = {path.parent for path in s.files}
        if found := [path for path in damaged if path.parent in own]:
            alone = any(folders[path.parent] == 1 for path in found)
            problem = Problem(
                "unreadable",
                found[0].parent,
                found=f"has {len(found)} damaged files, which may be slices of the series {s.name}: "
                f"{shorten([path.name for path in found])}",
                expected="files that can be read",
                suggestion="copy the series again, or move the damaged files to another folder"
                if alone
                else "check that the series is complete",
                severity=ERROR if alone else WARNING,
            )
            s = dataclasses.replace(s, problems=(*s.problems, problem))
        marked.append(s)
    return marked


def _read(path: Path) -> _File:
    data = dicom.read_file(path, stop_before_pixels=True, specific_tags=[*_TAGS, *_GEOMETRY])
    tags = {name: _text(data.get(name)) for name in _TAGS}
    return _File(path, tags, tuple(dicom.headers_of(path, data)))


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _has_mark(path: Path) -> bool:
    """Return whether a file has the prefix ``DICM`` after a preamble of 128 bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _split(files: Sequence[_File]) -> tuple[list[Series], dict[Path, str]]:
    """Divide the files of a series into volumes. A volume is a stack of parallel slices of one size, one per position.

    Returns:
        The volumes; and the omitted files with the reason: single slices (scouts), if there are larger stacks.
    """
    if len(files[0].slices) > 1:
        return [_make_series(files, "")], {}
    stacks: list[list[_File]] = []
    for file in files:
        stack = next((stack for stack in stacks if _is_parallel(stack[0].slices[0], file.slices[0])), None)
        if stack is None:
            stacks.append([file])
        else:
            stack.append(file)
    largest = max(map(len, stacks))
    dropped = {
        stack[0].path: "is a single slice whose orientation, size or pixel size differs from the rest of its series"
        for stack in stacks
        if len(stack) == 1 and largest > 1
    }
    kept = [stack for stack in stacks if stack[0].path not in dropped]
    volumes = [volume for stack in kept for volume in _volumes(stack)]
    return [_make_series(v, str(i) if len(volumes) > 1 else "") for i, v in enumerate(volumes, 1)], dropped


def _is_parallel(a: Slice, b: Slice) -> bool:
    """Return whether two slices have the same size and, up to rounding, the same orientation and pixel size."""
    return (
        a.size == b.size and _are_close(a.orientation, b.orientation, 0.01) and _are_close(a.spacing, b.spacing, 1e-3)
    )


def _are_close(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether two arrays differ by at most ``tolerance``, or are both None."""
    if a is None or b is None:
        return a is b
    return bool(np.abs(np.subtract(a, b)).max() <= tolerance)


def _volumes(stack: list[_File]) -> list[list[_File]]:
    """Divide a stack with several slices at every position into volumes, by the first tag that distinguishes them."""
    if not all(_is_placed(f.slices[0]) for f in stack):
        return [stack]  # `dicom.series_problems` reports the missing tags
    stack = sorted(stack, key=lambda f: f.slices[0].height)
    count = _slices_per_position([f.slices[0] for f in stack])
    if count == 1:
        return [stack]
    for tag in _VOLUME_TAGS:
        parts: dict[str, list[_File]] = defaultdict(list)
        for file in stack:
            parts[file.tags[tag]].append(file)
        if len(parts) == count and len({len(part) for part in parts.values()}) == 1:
            return [parts[key] for key in sorted(parts, key=_number_key)]
    return [stack]


def _is_placed(s: Slice) -> bool:
    """Return whether the header of a slice has its position and orientation."""
    return s.position is not None and s.orientation is not None


def _slices_per_position(slices: Sequence[Slice]) -> int:
    """Return the number of slices at each position; 1 if the number is not the same at all positions, or if
    all slices are at one position.

    If only some positions have several slices, these are duplicates, which `dicom.series_problems` reports.
    """
    positions = Counter(round(s.height, 2) for s in slices)
    counts = set(positions.values())
    return counts.pop() if len(counts) == 1 and len(positions) > 1 else 1


def _number_key(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def _make_series(files: Sequence[_File], part: str) -> Series:
    """Return a series; ``part`` is the number of the volume if the series has several, and empty otherwise."""
    tags, path = files[0].tags, files[0].path.absolute()
    name = f"{tags['PatientID']}_{tags['SeriesNumber']}" if tags["PatientID"] and tags["SeriesNumber"] else ""
    name = name or f"{path.parent.parent.name}_{path.parent.name}"
    slices = [s for f in files for s in f.slices]
    return Series(
        _safe(f"{name}_{part}" if part else name),
        tuple(f.path for f in files),
        tags["SeriesInstanceUID"],
        tags["SeriesNumber"],
        tags["SeriesDescription"],
        tags["Modality"],
        len(slices),
        tuple(_mixed(slices) or dicom.series_problems(slices)),
    )


def _mixed(slices: Sequence[Slice]) -> list[Problem]:
    """Return a problem if every position has several slices."""
    count = _slices_per_position(slices) if all(map(_is_placed, slices)) else 1
    if count == 1:
        return []
    return [
        Problem(
            "duplicate_slice",
            slices[0].path.parent,
            found=f"has {count} slices at each position, and no known tag distinguishes them",
            expected="one volume per series",
            suggestion="export each volume as a separate series",
        )
    ]


def _safe(name: str) -> str:
    """Return a name that can be a file name: characters other than letters, digits and ``_.+-`` become ``-``."""
    return re.sub(r"[^\w.+-]+", "-", name).strip(".") or "series"


def _parts_below(path: Path, folder: Path) -> tuple[str, ...]:
    """Return the parts of ``path`` below ``folder``, or its last part if it is not below ``folder``."""
    return path.relative_to(folder).parts if path.is_relative_to(folder) else path.absolute().parts[-1:]


def _with_unique_names(series: Sequence[Series], folder: Path) -> list[Series]:
    """Make the names of the series unique.

    The folder of the files, below ``folder``, is appended to names that occur several times. If this does not make them
    unique, a number is appended, too.
    """

    def extend(series: Sequence[Series], suffix: Callable[[int, Series], str]) -> list[Series]:
        counts = Counter(s.name for s in series)
        return [
            dataclasses.replace(s, name=_safe(f"{s.name}_{suffix(i, s)}")) if counts[s.name] > 1 else s
            for i, s in enumerate(series, 1)
        ]

    series = extend(series, lambda i, s: "_".join(_parts_below(s.files[0].parent, folder)))
    return extend(series, lambda i, s: str(i))
