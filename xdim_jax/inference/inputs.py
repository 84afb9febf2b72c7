"""Find the cases to predict in the input paths: image files, DICOM series, and folders of cases."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import ERROR, errors
from xdim_jax.data.case import Case, Dataset, case_from_files, scan_cases
from xdim_jax.data.images import nifti
from xdim_jax.data.images.image import files_of, strip_suffix
from xdim_jax.data.images.names import files_below, is_companion, strip
from xdim_jax.data.images.series import UNKNOWN_FORMAT, Series, find_series
from xdim_jax.data.layouts import table
from xdim_jax.data.prepare import ct_channels

PREDICTION_MARK = "xdim_jax"  # first word of the note in the header of a prediction
_MAX_ID = 230  # bytes; file names have at most 255, and temporary files are named after the output
_NAMED_FILES = 20  # largest number of files that are named in a message


def find_cases(
    dataset: Dataset,
    paths: Sequence[Path],
    *,
    modality: str = "",
    series: Sequence[str] = (),
    output: Path | None = None,
) -> tuple[list[Case], dict[str, list[str]]]:
    """Find the cases in the given paths, and log which files are omitted.

    Args:
        dataset: Data set on which the network was trained.
        paths: The files of one case: one per channel, or one with all channels. Or one folder, in the layout of the
            data set or of a single case. If the network has one channel, also the files of a DICOM series, or a folder
            with any images and DICOM series in it and below it.
        modality: CT or MR. Needed if the data set has both and neither path nor DICOM tags specify it.
        series: Names, numbers, descriptions or UIDs of the DICOM series to use; all series if empty.
        output: Folder of the predictions. It must not be the folder of the images, nor contain files that the layout of
            the data set reads as cases.

    In a folder that does not have the layout of the data set, predictions of this package are not read as images.

    Returns:
        The usable cases; and for every other case its id (or path) -> the reasons why it cannot be used.

    Raises:
        UserError: A path does not exist or contains no image, two images have the same case id, a selected series does
            not exist, the files do not fit the channels of the network, or predictions would be read as cases.
    """
    check_modality(dataset, modality)
    found, problems = _find(dataset, paths, modality, series, output)
    cases = []
    for case in found:
        if not _is_text(case.case_id):
            problems[ascii(str(case.files[0].absolute()))] = [
                f"the name {case.case_id!a} is not valid UTF-8, perhaps because it comes from a system with another "
                "encoding: rename the file and its folders"
            ]
        elif (length := len(case.case_id.encode())) > _MAX_ID:
            problems[str(case.files[0].absolute())] = [
                f"the case id {case.case_id} has {length} bytes, expected at most {_MAX_ID}: shorten the names of the "
                "file and its folders"
            ]
        else:
            cases.append(case)
    return cases, problems


def is_prediction(path: Path) -> bool:
    """Return whether a file has the note of a prediction of this package, see `xdim_jax.inference.folder.make_note`."""
    return strip(path.name, nifti.SUFFIXES) is not None and nifti.read_note(path).startswith(PREDICTION_MARK)


def _find(
    dataset: Dataset, paths: Sequence[Path], modality: str, series: Sequence[str], output: Path | None
) -> tuple[list[Case], dict[str, list[str]]]:
    """See `find_cases`."""
    if absent := [str(path) for path in paths if not path.exists()]:
        raise UserError(
            f"{shorten(absent)}: no such file or folder; expected an image, a DICOM series, or a folder of cases"
        )
    # cases are named after their folder, so ``.`` and ``..`` are replaced by its real name
    paths = [path if path.name not in ("", "..") else path.resolve() for path in paths]
    files = [path for path in paths if path.is_file()]
    if len(files) == len(paths) and all(strip_suffix(path.name) is not None for path in files):
        if series:
            raise UserError(f"--series is for DICOM, but {files[0]} is an image of another format")
        return [case_from_files(files, dataset, modality)], {}
    if len(files) == len(paths):
        folder = files[0].parent
    elif len(paths) == 1:
        folder = paths[0]
        output = None if output is None else output.resolve()
        if output == folder.resolve():
            raise UserError(
                f"--output={folder} is the folder of the images: the next prediction would read the label maps as "
                "images. Give another --output"
            )
        if output is not None and folder.resolve() not in output.parents:
            output = None  # the images may be inside the output folder
        if not series and (len(dataset.channels) > 1 or _has_layout(dataset, folder)):
            return _cases_in_layout(dataset, folder, output)
        files = list(files_below(folder))
        if predictions := [path for path in files if is_prediction(path)]:
            log.say(f"omitted    {len(predictions)} predictions of xdim_jax: {_names(predictions, folder)}")
            omitted = set(predictions)
            files = [path for path in files if path not in omitted]
            if all(map(is_companion, files)):
                raise UserError(f"{folder} contains only predictions of xdim_jax; expected images")
    else:
        raise UserError(f"{len(paths)} paths given; expected one folder, or the files of one case")
    return _find_images(dataset, folder, files, modality, series, given=len(paths) > 1 or paths[0].is_file())


def _has_layout(dataset: Dataset, folder: Path) -> bool:
    """Return whether a folder has the layout of the data set.

    Return False if there is no case, or if every case lies directly in the folder, has no reference, and has the name
    of its file. Such a folder is read as a folder with any images.
    """
    if dataset.name == "table" and (folder / table.TABLE_FILE).is_file():
        return True
    cases = dataset.scan(folder, False).cases
    named_by_file = [
        case.label is None
        and case.files[0].parent == folder
        and (strip_suffix(case.files[0].name) or "").removesuffix("_0000") == case.case_id
        for case in cases
    ]
    return bool(cases) and not all(named_by_file)


def _is_inside(path: Path, folder: Path | None) -> bool:
    """Return whether ``path`` is or lies inside ``folder``, a resolved path; False if ``folder`` is None."""
    if folder is None:
        return False
    found = path.resolve()
    return folder in (found, *found.parents)


def _cases_in_layout(
    dataset: Dataset, folder: Path, output: Path | None = None
) -> tuple[list[Case], dict[str, list[str]]]:
    """Return the cases of a folder in the layout of the data set, and the problems of the others."""
    problems: dict[str, list[str]] = {}
    scan = scan_cases(dataset, folder, need_labels=False)
    wrong = [Path(problem.path) for problem in errors(scan.problems)]
    paths = [*(path for case in scan.cases for path in case.files), *wrong]
    if written := [path for path in paths if _is_inside(path, output)]:
        raise UserError(
            f"--output={output} is inside {folder}, so its files ({shorten([p.name for p in written])}) would be read "
            "as cases. Move this output folder to another place, and give the new path as --output"
        )
    for problem in scan.problems:
        if problem.severity == ERROR:
            problems.setdefault(problem.case_id or str(problem.path), []).append(str(problem))
        elif not _is_inside(Path(problem.path), output):  # files of the output folder are not read, as expected
            log.warn(str(problem))
    return [case for case in scan.cases if case.case_id not in problems], problems


def _find_images(
    dataset: Dataset, folder: Path, files: Sequence[Path], modality: str, selected: Sequence[str], *, given: bool
) -> tuple[list[Case], dict[str, list[str]]]:
    """Return a case for each image and each DICOM series among the files, and the problems of the other series.

    ``given`` is True if the user gave the files, and False if they are those of a folder.
    """
    images = [] if selected else [path for path in files if strip_suffix(path.name) is not None]
    dicom_files = find_series(folder, files)
    found, left_out, damaged = dicom_files.series, dicom_files.left_out, dicom_files.damaged
    if len(dataset.channels) > 1 and not found and not selected:
        unknown = [path for path in files if strip_suffix(path.name) is None]
        raise UserError(f"{_names(unknown, folder)} cannot be read; expected one image per channel")
    if not images and not found and not damaged:
        if set(left_out.values()) - {UNKNOWN_FORMAT}:
            raise UserError(f"{folder} contains no image: {_reasons(left_out, folder)}")
        if selected:
            raise UserError(f"--series: {folder} contains no DICOM series")
        if given:
            raise UserError(f"{_names(files, folder)} cannot be read; expected an image or a DICOM series")
        return _cases_in_layout(dataset, folder)  # raises an error that shows the layout if there is no case
    if len(dataset.channels) > 1:
        raise UserError(
            f"{folder} contains DICOM series, but the network has {len(dataset.channels)} channels "
            f"({', '.join(dataset.channels)}): convert the series to NIfTI, and give one file per channel"
        )
    found = _select(found, selected, folder)
    if left_out:
        log.warn(f"{len(left_out)} files are not used: {_reasons(left_out, folder)}")
    omitted = {*left_out, *damaged}
    unread = [p for p in files if strip_suffix(p.name) is None and not is_companion(p) and p not in omitted]
    used = {path for s in found for path in s.files}
    if unread := [p for p in unread if p not in used] if not selected else []:
        log.warn(f"{len(unread)} files are not read: {_names(unread, folder)}")
    problems: dict[str, list[str]] = {} if selected else _damaged_files(damaged, folder)
    cases = []
    for path in images:
        if absent := [str(p) for p in files_of(path) if not p.is_file()]:  # e.g. a link to a file that was not copied
            problems[_image_id(path, folder)] = [f"{shorten(absent)} does not exist; copy it, or remove {path}"]
        else:
            cases.append(_image_case(dataset, path, folder, modality))
    is_ct = bool(ct_channels(dataset.channels, ""))
    trained = ("CT", "MR") if dataset.holds_ct else ("CT",) if is_ct else ()
    for s in found:
        if trained and s.modality not in (*trained, "") and not (selected or modality):
            log.warn(
                f"series {s} is omitted: the network was trained on {' and '.join(trained)}. To predict it, select it "
                "with --series"
            )
            continue
        log.say(f"series     {s}")
        if not (trained or selected or modality) and not _may_be(s.modality, dataset.channels):
            log.warn(f"series {s}: the network was not trained on {s.modality}")
        if fatal := errors(s.problems):
            problems[s.name] = [str(p) for p in fatal]
        else:
            for problem in s.problems:
                log.warn(str(problem))
            known = s.modality if s.modality in ("CT", "MR") else ""
            case = case_from_files([s.files], dataset, modality or known)
            cases.append(dataclasses.replace(case, case_id=s.name, patient=s.name))
    counts = Counter(case.case_id for case in cases)
    if twice := [name for name, count in counts.items() if count > 1]:
        same = [str(case.files[0]) for case in cases if case.case_id == twice[0]]
        others = f", and the same for {shorten(twice[1:])}" if twice[1:] else ""
        raise UserError(
            f"{shorten(same)} would all be written to {twice[0]}.nii.gz{others}; rename them, or predict each with "
            "another --output"
        )
    if not cases and not problems:
        names = " or ".join(trained)
        raise UserError(
            f"{folder} contains no {names} series, but the network was trained on {names}; see the warnings"
        )
    return cases, problems


def _may_be(modality: str, channels: Sequence[str]) -> bool:
    """Return False for a series of CT or PET if the names of the channels of a network do not contain this modality."""
    words = {"CT": ("CT",), "PT": ("PT", "PET")}.get(modality)
    return words is None or any(word in name.upper() for word in words for name in channels)


def _is_text(name: str) -> bool:
    """Return whether a name of the file system has a valid encoding."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_modality(dataset: Dataset, modality: str) -> None:
    """Raise UserError if a modality is unknown, or if CT would apply to all of several channels.

    Only a network with one channel, or one that was trained on both CT and MR, can be told that images are CT.
    """
    if modality not in ("", "CT", "MR"):
        raise UserError(f"modality={modality!r}: expected CT or MR")
    if modality == "CT" and not dataset.holds_ct and len(dataset.channels) > 1:
        raise UserError(
            f"modality={modality!r} would apply to all channels ({', '.join(dataset.channels)}); the network was not "
            "trained on both CT and MR, so give none"
        )


def _damaged_files(damaged: Mapping[Path, str], folder: Path) -> dict[str, list[str]]:
    """Return folder -> a message about its damaged DICOM files, which may be those of a patient."""
    folders: dict[Path, dict[Path, str]] = {}
    for path, reason in damaged.items():
        folders.setdefault(path.parent, {})[path] = reason
    step = "copy them again, or move them to another folder if they are not needed"
    return {str(p.absolute()): [f"{_reasons(found, folder)}: {step}"] for p, found in folders.items()}


def _image_case(dataset: Dataset, path: Path, folder: Path, modality: str) -> Case:
    """Return the case of an image."""
    name = _image_id(path, folder)
    return dataclasses.replace(case_from_files([path], dataset, modality), case_id=name, patient=name)


def _image_id(path: Path, folder: Path) -> str:
    """Return the case id of an image: its path below the folder, with ``_`` between folders and name."""
    below = path.parent.relative_to(folder).parts if path.is_relative_to(folder) else path.parent.parts[-1:]
    return "_".join([*below, (strip_suffix(path.name) or path.stem).removesuffix("_0000")])


def _select(found: Sequence[Series], selected: Sequence[str], folder: Path) -> list[Series]:
    """Return the selected series; all if none is selected. Raises UserError if a selected series does not exist."""
    known = "; ".join(map(str, found)) or "none"
    if absent := [text for text in selected if not any(s.matches(text) for s in found)]:
        raise UserError(f"--series={','.join(absent)}: there is no such series in {folder}; known: {known}")
    chosen = [s for s in found if not selected or any(s.matches(text) for text in selected)]
    if len(chosen) < len(found):
        others = ", ".join(s.name for s in found if s not in chosen)
        log.say(f"omitted    series {others}, which are not in --series")
    return chosen


def _reasons(left_out: dict[Path, str], folder: Path) -> str:
    """Return the omitted files as text, grouped by their reasons."""
    reasons: dict[str, list[Path]] = {}
    for path, reason in left_out.items():
        reasons.setdefault(reason, []).append(path)
    return "; ".join(f"{_names(paths, folder)} {reason}" for reason, paths in reasons.items())


def _names(paths: Sequence[Path], folder: Path) -> str:
    return shorten([path.relative_to(folder) if path.is_relative_to(folder) else path for path in paths], _NAMED_FILES)
