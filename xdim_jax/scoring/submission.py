"""Packs predictions as a challenge wants them uploaded.

    camus   patient0001_{2CH,4CH}_{ED,ES}.mhd and .raw (or .nii.gz), labels 1, 2, 3, in one folder
    chaos   Task{n}/CT/<id>/Results/img000.png ..., Task{n}/MR/<id>/{T1DUAL,T2SPIR}/Results/..., greys 63, 126, 189,
            252, slices in the order of the DICOM files' names; --task says for which tasks
    brats   <case id>.nii.gz with the year's labels, on the grid of its image

--pred is a folder that xdim_jax.predict wrote: its predict.json says where the images are, which every label map is
compared with. Everything is checked before anything is written; --out becomes a folder, and with --zip also an archive.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.data.images import metaimage
from xdim_jax.data.images.grid import Grid, compare_grids
from xdim_jax.data.images.image import read_grid, source_at
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.scoring import brats, camus, chaos
from xdim_jax.scoring.results import PREDICT_FILE
from xdim_jax.scoring.rules import Coding, LabelMap

# writes the files of one case below a folder; returns how many
Writer = Callable[[Path], int]


def pack_camus(pred: Path, images: dict[str, list[str]], form: str) -> list[Writer]:
    """One image per view and instant. Raises UserError with everything that is wrong."""
    write = metaimage.write if form == "mhd" else write_volume
    maps, images = _tests_alone(camus.find(pred), images, camus.TESTING)
    found = _checked(maps, images, lambda m: camus.CODING)
    return [functools.partial(_one_file, label_map, grid, f".{form}", write) for label_map, grid in found]


def pack_brats(pred: Path, images: dict[str, list[str]], convention: str) -> list[Writer]:
    """One file per case. Raises UserError with everything that is wrong."""
    found = _checked(brats.find(pred), images, lambda m: brats.CODINGS[convention])
    return [functools.partial(_one_file, label_map, grid, ".nii.gz", write_volume) for label_map, grid in found]


def pack_chaos(pred: Path, images: dict[str, list[str]], tasks: Sequence[str]) -> list[Writer]:
    """PNG files of every slice, in the order of the DICOM names. Raises UserError with everything that is wrong."""
    coding = {"CT": chaos.CT, "MR": chaos.MR}
    # in- and out-phase share one result: the in-phase is taken
    images = {name.removesuffix("_in"): files for name, files in images.items() if not name.endswith("_out")}
    maps, images = _tests_alone(chaos.find_label_maps(pred), images, chaos.TESTING)
    found = _checked(maps, images, lambda m: coding[m.facts["modality"]])
    kept = [
        functools.partial(_slices, label_map, grid, task)
        for task in sorted(set(tasks))
        for label_map, grid in found
        if label_map.facts["modality"] in chaos.TASKS[task][0]
    ]
    if not kept:
        raise UserError(f"{pred}: none of its cases belongs to task {', '.join(tasks)}")
    return kept


def _tests_alone(
    maps: dict[str, LabelMap], images: dict[str, list[str]], mark: str
) -> tuple[dict[str, LabelMap], dict[str, list[str]]]:
    """Test patients have numbers of their own: where training patients were predicted too, those are left out."""
    if others := [name for name in images if not name.startswith(mark)]:
        if len(others) == len(images):
            return maps, images
        log.warn(f"{len(others)} cases are not of the test set and left out: {shorten(others)}")
    return (
        {name: m for name, m in maps.items() if name.startswith(mark)},
        {name: files for name, files in images.items() if name.startswith(mark)},
    )


def _checked(
    maps: dict[str, LabelMap], images: dict[str, list[str]], coding: Callable[[LabelMap], Coding]
) -> list[tuple[LabelMap, Grid]]:
    """Label maps on the grid of their image, with values that the challenge knows; the grid is the image's."""
    problems: list[str] = []
    found = []
    for case, label_map in sorted(maps.items()):
        if case not in images:
            problems.append(f"{label_map.path} is not in {PREDICT_FILE}; predict it anew")
            continue
        try:
            values, grid = label_map.load()
            coding(label_map).masks(values, label_map.path)
            image_grid = read_grid(source_at(Path(images[case][0])), label_map.axes)
            problems += map(str, compare_grids(label_map.path, grid, Path(images[case][0]), image_grid))
            found.append((label_map, image_grid))
        except UserError as error:
            problems.append(str(error))
    if absent := sorted(images.keys() - maps.keys()):
        problems.append(f"{len(absent)} cases of {PREDICT_FILE} have no label map: {shorten(absent)}; predict them")
    if problems:
        raise join_problems(problems, "problems, nothing was packed")
    return found


def _read(label_map: LabelMap) -> np.ndarray:
    return np.rint(label_map.load()[0]).astype(np.uint8)


def _one_file(
    label_map: LabelMap, grid: Grid, suffix: str, write: Callable[[Path, np.ndarray, Grid], None], folder: Path
) -> int:
    write(folder / f"{label_map.case_id.removeprefix(camus.TESTING)}{suffix}", _read(label_map), grid)
    return 1


def _slices(label_map: LabelMap, grid: Grid, task: str, folder: Path) -> int:
    modality, number = label_map.case_id.removeprefix(chaos.TESTING).split("_")[:2]
    series = Path(modality, number) if modality == "CT" else Path(modality, number, label_map.facts["sequence"])
    below = folder / f"Task{task}" / series / "Results"
    below.mkdir(parents=True)
    wanted = [value for organ in chaos.TASKS[task][1] for value in chaos.ORGANS[organ]]
    label = _read(label_map)
    greys = grid.to_file(np.where(np.isin(label, wanted), label, 0).astype(np.uint8))  # (x, y, slice by name)
    for k in range(greys.shape[2]):
        Image.fromarray(np.ascontiguousarray(greys[:, :, k].T)).save(below / f"img{k:03d}.png")
    return greys.shape[2]
