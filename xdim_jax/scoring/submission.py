"""Conversion of predictions to the files that a challenge expects.

Each ``pack_*`` function first checks all label maps, and then returns functions that write them. So nothing is written
if a check fails.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.data.images import metaimage
from xdim_jax.data.images.grid import Grid, compare_grids
from xdim_jax.data.images.image import read_grid, source_from_json, source_path
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.scoring import brats, camus, chaos
from xdim_jax.scoring.results import PREDICT_FILE
from xdim_jax.scoring.rules import Coding, LabelMap

Images = dict[str, list[Any]]  # case id -> images, from ``predict.json``
# function that writes the files of one case into a folder, and returns their number
Writer = Callable[[Path], int]


def pack_camus(pred: Path, images: Images, suffix: str) -> list[Writer]:
    """Return writers for CAMUS: one file per view and instant, such as ``patient0001_2CH_ED.mhd`` with its ``.raw``.

    Args:
        pred: Folder of predicted label maps.
        images: Case id -> image files, from ``predict.json``.
        suffix: ``mhd`` or ``nii.gz``.

    Raises:
        UserError: Lists all label maps that are missing or cannot be used.
    """
    write = metaimage.write if suffix == "mhd" else write_volume
    maps, images = _keep_test_cases(camus.find(pred), images, camus.TEST_PREFIX)
    checked = _check_label_maps(maps, images, lambda m: camus.CODING)
    return [functools.partial(_write_file, label_map, grid, f".{suffix}", write) for label_map, grid in checked]


def pack_brats(pred: Path, images: Images, convention: str) -> list[Writer]:
    """Return writers for BraTS: one file ``<case id>.nii.gz`` per case.

    Args:
        pred: Folder of predicted label maps.
        images: Case id -> image files, from ``predict.json``.
        convention: Convention of the label values, a key of `xdim_jax.scoring.brats.CODINGS`.

    Raises:
        UserError: Lists all label maps that are missing or cannot be used.
    """
    checked = _check_label_maps(brats.find(pred), images, lambda m: brats.CODINGS[convention])
    return [functools.partial(_write_file, label_map, grid, ".nii.gz", write_volume) for label_map, grid in checked]


def pack_chaos(pred: Path, images: Images, tasks: Sequence[str]) -> list[Writer]:
    """Return writers for CHAOS: one PNG file per slice, numbered in the order of the DICOM file names.

    Args:
        pred: Folder of predicted label maps.
        images: Case id -> image files, from ``predict.json``.
        tasks: Tasks of the challenge.

    Raises:
        UserError: Lists all label maps that are missing or cannot be used; or a task has no case of one of its
            modalities.
    """
    # the two phases of T1-DUAL have one result; the prediction of the in-phase is used
    images = {name.removesuffix("_in"): files for name, files in images.items() if not name.endswith("_out")}
    maps, images = _keep_test_cases(chaos.find_label_maps(pred), images, chaos.TEST_PREFIX)
    checked = _check_label_maps(maps, images, chaos.coding_of)
    writers = [
        functools.partial(_write_slices, label_map, grid, task)
        for task in sorted(set(tasks))
        for label_map, grid in checked
        if label_map.attributes["modality"] in chaos.TASKS[task][0]
    ]
    present = {label_map.attributes["modality"] for label_map, _ in checked}
    if absent := [f"task {t} needs {m}" for t in sorted(set(tasks)) for m in chaos.TASKS[t][0] if m not in present]:
        raise UserError(
            f"{', '.join(absent)}, but {pred} has only {' and '.join(sorted(present)) or 'no case'}; predict these "
            "cases, or give another --task"
        )
    return writers


def _keep_test_cases(maps: dict[str, LabelMap], images: Images, prefix: str) -> tuple[dict[str, LabelMap], Images]:
    """Remove training cases, unless all cases are training cases.

    Test and training patients have the same numbers; only the prefix of their ids differs.
    """
    if others := [name for name in images if not name.startswith(prefix)]:
        if len(others) == len(images):
            return maps, images
        log.warn(f"{len(others)} cases are not in the test set and are not converted: {shorten(others)}")
    return (
        {name: m for name, m in maps.items() if name.startswith(prefix)},
        {name: files for name, files in images.items() if name.startswith(prefix)},
    )


def _check_label_maps(
    maps: dict[str, LabelMap], images: Images, coding: Callable[[LabelMap], Coding]
) -> list[tuple[LabelMap, Grid]]:
    """Check that each label map has known values and the grid of its image.

    Args:
        maps: Case id -> label map.
        images: Case id -> image files.
        coding: Function that returns the coding of a label map.

    Returns:
        Each label map with the grid of its image.

    Raises:
        UserError: Lists all label maps that are missing or cannot be used.
    """
    problems: list[str] = []
    checked = []
    for case, label_map in sorted(maps.items()):
        if case not in images:
            problems.append(f"{label_map.path} is not listed in {PREDICT_FILE}; predict it again")
            continue
        try:
            values, grid = label_map.load()
            coding(label_map).masks(values, label_map.path)
            source = source_from_json(images[case][0])
            image_grid = read_grid(source, label_map.axes)
            problems += map(str, compare_grids(label_map.path, grid, source_path(source), image_grid))
            checked.append((label_map, image_grid))
        except UserError as error:
            problems.append(str(error))
    if absent := sorted(images.keys() - maps.keys()):
        problems.append(
            f"{len(absent)} cases that {PREDICT_FILE} lists have no label map: {shorten(absent)}; predict them again"
        )
    if problems:
        raise join_problems(problems, "problems; nothing was written")
    return checked


def _read_labels(label_map: LabelMap) -> np.ndarray:
    """Return the values of a label map as uint8."""
    return np.rint(label_map.load()[0]).astype(np.uint8)


def _write_file(
    label_map: LabelMap, grid: Grid, suffix: str, write: Callable[[Path, np.ndarray, Grid], None], folder: Path
) -> int:
    """Write a label map to one file, named after the case without `camus.TEST_PREFIX`; return the number of files."""
    write(folder / f"{label_map.case_id.removeprefix(camus.TEST_PREFIX)}{suffix}", _read_labels(label_map), grid)
    return 1


def _write_slices(label_map: LabelMap, grid: Grid, task: str, folder: Path) -> int:
    """Write the organs of one task of CHAOS to one PNG file per slice; return the number of files."""
    modality, patient = label_map.case_id.removeprefix(chaos.TEST_PREFIX).split("_")[:2]
    series = Path(modality, patient) if modality == "CT" else Path(modality, patient, label_map.attributes["sequence"])
    results = folder / f"Task{task}" / series / "Results"
    results.mkdir(parents=True)
    values = label_map.load()[0]
    masks = chaos.coding_of(label_map).masks(values, label_map.path)
    label = np.zeros(values.shape, np.uint8)
    for organ in chaos.TASKS[task][1]:
        if organ in masks:  # CT has the liver only
            label[masks[organ]] = chaos.ORGANS[organ][0]
    greys = grid.to_file(label)  # (x, y, slice); the slices are in the order of the DICOM file names
    for k in range(greys.shape[2]):
        Image.fromarray(np.ascontiguousarray(greys[:, :, k].T)).save(results / f"img{k:03d}.png")
    return greys.shape[2]
