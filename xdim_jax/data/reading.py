"""Read a case: the channels of the image and the label map. They must be on one grid and have valid values."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdim_jax.base.errors import shorten
from xdim_jax.base.problem import ERROR, WARNING, DataError, Problem, data_error, errors, in_case
from xdim_jax.data.case import Case, Volume
from xdim_jax.data.images.dicom import load_masks
from xdim_jax.data.images.grid import Grid, compare_grids
from xdim_jax.data.images.image import Source, read_grid, read_image, source_path
from xdim_jax.data.labels import Labels


def check_grids(cases: Sequence[Case]) -> None:
    """Compare shape, voxel size and affine of all files of each case, reading only headers.

    PNG masks have no grid and are not compared.

    Raises:
        DataError: Lists every unreadable header, and every file that is not on the grid of its case.
    """
    problems = []
    for case in cases:
        first: tuple[Path, Grid] | None = None
        for source in [*case.images, *([case.label] if case.label and not _is_masks(case.label) else [])]:
            try:
                grid = read_grid(source, "stored" if first and first[1].flat else case.axes)
            except DataError as error:
                problems += error.problems
                continue
            first = first or (source_path(source), grid)
            problems += compare_grids(source_path(source), grid, *first)
    if problems:
        raise data_error(*problems, summary="files that are unreadable or not on the grid of their case")


def _is_masks(source: Source) -> bool:
    return isinstance(source, tuple) and source[0].suffix.lower() == ".png"


def read_case(case: Case) -> Volume:
    """Read all files of a case, and check that they are on one grid and have valid contents.

    Raises:
        DataError: Lists every problem of the case: unreadable files, different shapes or affines, NaN or infinite
            intensities, label values that are not in the convention.
    """
    volume, problems = load_case(case)
    if volume is None or errors(problems):
        raise data_error(*errors(problems), summary=f"problems in case {case.case_id}")
    return volume


def load_case(case: Case) -> tuple[Volume | None, list[Problem]]:
    """Read a case, and return its problems instead of raising an error.

    Returns:
        The case, or None if a channel cannot be used; and all its problems.
    """
    image, grid, problems = _load_images(case)
    label = None
    if case.label:
        label, found = _load_label(case, case.label, grid)
        problems += found
    volume = None if image is None or grid is None else Volume(case.case_id, image, label, grid)
    return volume, in_case(case.case_id, problems)


def _load_images(case: Case) -> tuple[np.ndarray | None, Grid | None, list[Problem]]:
    """Read all channels.

    Returns:
        float32 (D, H, W, C), or None if a file cannot be used; the grid of the first usable file; all problems.
    """
    problems: list[Problem] = []
    image: np.ndarray | None = None
    grid: Grid | None = None
    first = None  # the file with this grid
    complete = True
    per_file = len(case.channels) // len(case.images)
    for k, source in enumerate(case.images):
        path = source_path(source)
        try:
            array, own_grid = read_image(source, "stored" if grid and grid.flat else case.axes)
        except DataError as error:
            problems += error.problems
            complete = False
            continue
        if array.shape[3] != per_file:
            problems.append(
                Problem(
                    "shape",
                    path,
                    found=f"has shape {(*own_grid.shape, array.shape[3])}",
                    expected=f"{per_file} channel{'s' * (per_file > 1)} per file",
                    suggestion="split or stack the file",
                )
            )
            complete = False
            continue
        if grid is None or first is None:
            grid, first = own_grid, path
            problems += _unknown_orientation(path, grid)
        problems += compare_grids(path, own_grid, first, grid)
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are then reported
            if image is None and len(case.images) == 1:
                image = array = array.astype(np.float32, copy=False)
            else:  # copy each file into one array; stacking all channels at the end would need twice the memory
                image = np.empty((*array.shape[:3], len(case.channels)), np.float32) if image is None else image
                if image.shape[:3] == array.shape[:3]:
                    channels = image[..., k * per_file : (k + 1) * per_file]
                    channels[:] = array
                    array = channels
                else:
                    complete = False
        if count := sum(plane.size - np.count_nonzero(np.isfinite(plane)) for plane in array):
            problems.append(
                Problem(
                    "not_finite",
                    path,
                    found=f"contains {count} NaN or infinite voxels",
                    expected="finite intensities",
                    suggestion="repair the file",
                )
            )
    return image if complete else None, grid, problems


def _unknown_orientation(path: Path, grid: Grid) -> list[Problem]:
    """Return a warning if the orientation of a volume matters, but its NIfTI header does not contain it."""
    if grid.header is None or grid.flat or grid.axes != "anatomical":
        return []
    if int(grid.header["sform_code"]) > 0 or int(grid.header["qform_code"]) > 0:
        return []
    return [
        Problem(
            "no_geometry",
            path,
            found="has neither a sform nor a qform, so its orientation is unknown; x is read as right to left, y as "
            "posterior to anterior, z as inferior to superior",
            expected="an affine",
            suggestion="check the orientation, and store it in the header",
            severity=WARNING,
        )
    ]


def read_label(case: Case) -> np.ndarray:
    """Read only the reference of a case, as label indices uint8 (D, H, W). Raises DataError, see `read_case`."""
    assert case.label is not None, case.case_id
    label, problems = _load_label(case, case.label, read_grid(case.images[0], case.axes))
    if label is None or errors(problems):
        raise data_error(*errors(problems), summary=f"problems in the labels of case {case.case_id}")
    return label


def _load_label(case: Case, source: Source, grid: Grid | None) -> tuple[np.ndarray | None, list[Problem]]:
    """Read the reference of a case.

    Args:
        case: Case of the reference.
        source: Files of the reference.
        grid: Grid of the image; None if the image could not be read.

    Returns:
        Label indices, uint8 (D, H, W), or None if the reference cannot be read, its shape is not that of the grid, or
        the grid is None; and all problems.
    """
    path, problems = source_path(source), []
    try:
        if _is_masks(source):
            assert isinstance(source, tuple)
            values = load_masks(source)
            if grid is None:
                return None, label_problems(case.labels, path, values, case.labels.decode(values)[1])
            if values.shape != grid.shape:
                return None, [
                    Problem(
                        "shape" if values.shape[2] == grid.shape[2] else "slice_count",
                        path,
                        found=f"contains {values.shape[2]} masks of {values.shape[1]} x {values.shape[0]} pixels",
                        expected=f"{grid.shape[2]} of {grid.shape[1]} x {grid.shape[0]}, one for each slice of the "
                        "image",
                        suggestion="download the masks again",
                    )
                ]
            values = grid.to_memory(values)
        else:
            stored, label_grid = read_image(source, "stored" if grid and grid.flat else case.axes)
            if grid is not None:
                problems += compare_grids(path, label_grid, source_path(case.images[0]), grid)
            if stored.shape[3] != 1:
                problems.append(
                    Problem(
                        "shape",
                        path,
                        found=f"has shape {(*label_grid.shape, stored.shape[3])}",
                        expected="one label map",
                        suggestion="split the file",
                    )
                )
            values = stored[..., 0]
    except DataError as error:
        return None, error.problems
    label, unknown = case.labels.decode(values)
    problems += label_problems(case.labels, path, values, unknown)
    misplaced = grid is None or any(p.kind in ("shape", "slice_count") for p in problems)
    return None if misplaced else label, problems


def encode_label(case: Case, label: np.ndarray) -> np.ndarray:
    """Convert label indices to the label values of the case's convention.

    Structures that are not in the convention become background. In CHAOS, for example, CT has labels only for the
    liver, but a network that was also trained on MR may predict other organs on CT.

    Args:
        case: Case with the convention.
        label: Label indices (D, H, W).

    Returns:
        Label values of the same shape, see `Labels.encode` for their dtype.
    """
    return case.labels.encode(np.where(label < len(case.labels.values), label, 0))


def label_problems(labels: Labels, path: Path, values: np.ndarray, unknown: Sequence[float]) -> list[Problem]:
    """Check the values of a label map, and return their problems.

    Args:
        labels: Convention of the label map.
        path: File or folder of the label map.
        values: Stored values.
        unknown: Values that are not in the convention, from `Labels.decode`.
    """
    if not unknown:
        return []
    listed = shorten([f"{v:g}" for v in unknown], 6)
    known = ", ".join(str(v) for v in labels.values)
    if labels.ranges:
        alone = not labels.decode(values)[0].any()
        return [
            Problem(
                "label_value",
                path,
                found=f"contains {'only ' * alone}the values {listed}, which belong to no structure",
                expected=f"the grey values {known} of {labels.name}",
                suggestion="convert the label map to these values"
                if alone
                else "check these voxels: they are read as background",
                severity=ERROR if alone else WARNING,
            )
        ]
    if set(unknown) == {255.0} and set(np.unique(values).tolist()) <= {0, 255}:
        return [
            Problem(
                "label_scale",
                path,
                found="contains the values 0 and 255",
                expected=f"the labels {known} of {labels.name}",
                suggestion="divide it by 255",
            )
        ]
    if any(v != int(v) for v in unknown if np.isfinite(v)) or not np.isfinite(unknown).all():
        return [
            Problem(
                "dtype",
                path,
                found=f"contains label {listed}",
                expected=f"integers; the labels of {labels.name} are {known}",
                suggestion="resample label maps by nearest neighbour, and store integers",
            )
        ]
    step = "convert the label map to these labels, or omit the case"
    if fits := [name for value, name in labels.elsewhere if value in unknown]:
        step = f"the label exists in {' and '.join(fits)}: check the convention"
    return [
        Problem(
            "label_value",
            path,
            found=f"contains label {listed}",
            expected=f"the labels of {labels.name}, which are {known}",
            suggestion=step,
        )
    ]
