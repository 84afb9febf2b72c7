"""The cases of an input path: image files, folders of DICOM slices, and folders of cases."""

from collections.abc import Sequence
from pathlib import Path

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.problem import ERROR
from xdim_jax.data.case import Case, Dataset, case_from_files, scan_cases
from xdim_jax.data.images.dicom import files_in_order
from xdim_jax.data.images.image import strip_suffix


def find_cases(
    dataset: Dataset, paths: Sequence[Path], *, modality: str = ""
) -> tuple[list[Case], dict[str, list[str]]]:
    """Find the cases in the given paths.

    Args:
        dataset: Data set that the network was trained on.
        paths: The files of one case, one per channel. Or one path: an image, a folder in the data set's layout, one of
            its case folders, a folder of DICOM slices, or (for one channel) a folder of any images.
        modality: CT or MR. Needed if the data set has both and the path does not determine which one.

    Returns:
        The usable cases, and for the other cases: case id -> reasons why it cannot be used.

    Raises:
        UserError: A path does not exist, or two images of a folder have the same case id.
    """
    problems: dict[str, list[str]] = {}
    if len(paths) > 1 or paths[0].is_file():
        return [case_from_files(paths, dataset, modality)], {}
    folder = paths[0]
    if not folder.exists():
        raise UserError(f"{folder}: no such file or folder; expected an image, a folder of DICOM slices, or of cases")
    if slices := files_in_order(folder, ".dcm"):
        return [case_from_files([slices], dataset, modality)], {}
    if folder.is_dir() and len(dataset.channels) == 1 and (images := _images_in(dataset, folder)):
        found = [case_from_files([path], dataset, modality) for path in images]
        names = [case.case_id for case in found]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(
                f"{folder}: several images would be written to {shorten([f'{n}.nii.gz' for n in twice])}; put them "
                "into different folders, and predict each folder with another --output"
            )
        return found, {}
    scan = scan_cases(dataset, folder, need_labels=False)
    for problem in scan.problems:
        if problem.severity == ERROR and problem.kind != "patient_in_two_folds":
            problems.setdefault(problem.case_id or str(problem.path), []).append(str(problem))
        else:
            log.warn(str(problem))
    return [case for case in scan.cases if case.case_id not in problems], problems


def _images_in(dataset: Dataset, folder: Path) -> list[Path]:
    """Return the image files of a folder; an empty list if the folder has the data set's layout."""
    images = sorted(p for p in folder.iterdir() if p.is_file() and strip_suffix(p.name) and not p.name.startswith("."))
    return images if images and not dataset.scan(folder, False).cases else []
