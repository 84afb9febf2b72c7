"""Validation on whole cases during training. It returns the Dice of each region, and pictures of some cases."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xdim_jax.base import log
from xdim_jax.base.files import atomic_path
from xdim_jax.base.signals import StopRequest
from xdim_jax.base.threads import StoppedError
from xdim_jax.data import reading, store
from xdim_jax.data.case import Case, Dataset
from xdim_jax.data.labels import is_structure
from xdim_jax.inference.output import postprocess
from xdim_jax.inference.sliding_window import Segmenter
from xdim_jax.pages.colours import PALETTE, to_grey, to_rgb
from xdim_jax.scoring import masks
from xdim_jax.training import mesh
from xdim_jax.training.label_maps import LabelMapWriter

_PROGRESS_SECONDS = 20.0  # time between two lines about the progress of a validation
OVERLAYS = "overlays"  # folder of the pictures, in the workdir


class InterruptedValidationError(Exception):
    """A signal has interrupted a validation."""


class ValidationResult(NamedTuple):
    """The result of a validation.

    Attributes:
        scores: Mean Dice by region, without the regions that are annotated in no case.
        pictures: Pictures of some cases by case id, uint8 (H, W, 3).
        cases: Dice by case id and region, for the regions that are annotated in the case.
    """

    scores: dict[str, float]
    pictures: dict[str, np.ndarray]
    cases: dict[str, dict[str, float]]


# function of (params, stats) and the record of received signals
Validation = Callable[[Any, StopRequest], ValidationResult]


def make_validation(
    segmenter: Segmenter,
    dataset: Dataset,
    cases: Sequence[tuple[Case, store.Entry]],
    *,
    label_maps: LabelMapWriter,
    min_et: int,
    overlays: int,
) -> Validation:
    """Build the validation function. It scores whole cases on their original grid, after post-processing.

    The score of a region is its mean Dice over the cases. If a region is empty in prediction and reference, its Dice is
    1, as on the BraTS platform. A case in which a region is not annotated (CHAOS task 4) is excluded from the mean of
    this region; a region that is annotated in no case has no score. Several processes divide the cases among
    themselves.

    Args:
        segmenter: Function that segments prepared cases.
        dataset: Data set of the cases.
        cases: Validation cases: the case on disk, and the prepared case.
        label_maps: Object that receives the label map of each case.
        min_et: A predicted enhancing tumour with fewer voxels is relabelled as necrosis (BraTS).
        overlays: Number of cases, from the first one of process 0, of which pictures are drawn.
    """
    names = dataset.regions.names

    def validate(weights: Any, stop: StopRequest) -> ValidationResult:
        weights = mesh.local(weights)
        label_maps.begin(weights)
        scores = np.full((len(cases), len(names)), np.nan)
        pictures = {}
        incomplete = False
        show = log.progress_bar("validate", interval=_PROGRESS_SECONDS)
        for first in range(0, len(cases), jax.process_count()):
            if mesh.agree(stop.signal > 0):
                raise InterruptedValidationError
            number = first + jax.process_index()
            if number >= len(cases):
                continue
            case, entry = cases[number]
            prepared = entry.load()
            try:
                label = segmenter(weights, prepared, stopped=lambda: stop.signal > 0)
            except StoppedError:
                incomplete = True
                continue
            label = postprocess(label, dataset.regions, min_et=min_et)
            label_maps.write(case, label)
            drawn = jax.process_index() == 0 and first // jax.process_count() < overlays  # process 0 writes pictures
            volume = reading.read_case(case) if drawn else None
            truth = reading.read_label(case) if volume is None or volume.label is None else volume.label
            for name, value in masks.region_dice(dataset, case, label, truth).items():
                scores[number, names.index(name)] = 1.0 if np.isnan(value) else value
            show(min(first + jax.process_count(), len(cases)), len(cases))
            if volume is not None:
                dice = {name: float(d) for name, d in zip(names, scores[number], strict=True) if np.isfinite(d)}
                structures = dataset.labels.structures
                pictures[case.case_id] = draw(volume.image[..., 0], truth, label, structures, dice)
        if mesh.agree(incomplete):
            raise InterruptedValidationError
        every = mesh.gather(scores)  # (processes, cases, regions); NaN for the cases of other processes
        known = np.isfinite(every)
        total, count = np.where(known, every, 0).sum((0, 1)), known.sum((0, 1))
        mean = {name: float(t / n) for name, t, n in zip(names, total, count, strict=True) if n}
        dice = np.where(known.any(0), np.where(known, every, 0).sum(0), np.nan)  # one process validates each case
        by_case = {
            case.case_id: {name: float(d) for name, d in zip(names, row, strict=True) if np.isfinite(d)}
            for (case, _), row in zip(cases, dice, strict=True)
        }
        return ValidationResult(mean, pictures, by_case)

    return validate


_COLOURS = np.array([to_rgb(colour) for colour in PALETTE])  # colours of the labels 1, 2, ...


_CAPTION_HEIGHT = 14  # pixels
_MIN_PANEL = 192  # smallest width of a panel, in pixels; smaller images are enlarged by an integer factor


def draw(
    image: np.ndarray,
    reference: np.ndarray,
    predicted: np.ndarray,
    structures: Sequence[str] = (),
    scores: Mapping[str, float] | None = None,
) -> np.ndarray:
    """Draw image, reference and prediction side by side, in the slice with the most labelled pixels.

    Args:
        image: Image (D, H, W), with any range of values.
        reference: Label indices (D, H, W).
        predicted: Label indices (D, H, W).
        structures: Names of the labels, the background first, for a legend below the picture; empty for no legend.
        scores: Dice by region, which is written below the picture.

    Returns:
        RGB picture, uint8 (H, 3 W, 3). With a legend or scores, it is enlarged by an integer factor if it is small, and
        its height includes their lines.
    """
    reference = np.where(is_structure(reference), reference, 0)
    structure = reference if reference.any() else predicted  # early predictions may fill the whole volume
    at = int(np.argmax((structure > 0).sum((1, 2))))
    grey = np.repeat(to_grey(image[at], image)[..., None], 3, -1) * 255
    panels = [grey]
    for label in (reference[at], predicted[at]):
        colour = _COLOURS[(np.maximum(label, 1) - 1) % len(_COLOURS)]
        panels.append(np.where(label[..., None] > 0, 0.5 * grey + 0.5 * colour, grey))
    picture = np.concatenate(panels, 1).round().astype(np.uint8)
    if not structures and not scores:
        return picture
    factor = -(-_MIN_PANEL // image.shape[2])
    picture = np.repeat(np.repeat(picture, factor, 0), factor, 1)
    legend = [(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(structures[1:])]
    dice = [(f"{name} {value:.3f}", "#ffffff") for name, value in (scores or {}).items()]
    captions = [_caption(words, picture.shape[1]) for words in (legend, [("Dice:", "#ffffff"), *dice]) if words]
    return np.concatenate([picture, *captions])


def _caption(words: Sequence[tuple[str, str]], width: int) -> np.ndarray:
    """Draw words with their colours in lines on black. Returns RGB, uint8 (H, width, 3)."""
    font = ImageFont.load_default()
    lines: list[list[tuple[str, str, int]]] = [[]]
    x = 2
    for word, colour in words:
        length = int(font.getlength(word)) + 8
        if x + length > width and lines[-1]:
            lines.append([])
            x = 2
        lines[-1].append((word, colour, x))
        x += length
    strip = Image.new("RGB", (width, _CAPTION_HEIGHT * len(lines)))
    pen = ImageDraw.Draw(strip)
    for row, line in enumerate(lines):
        for word, colour, x in line:
            pen.text((x, row * _CAPTION_HEIGHT), word, fill=colour, font=font)
    return np.asarray(strip)


def save_pictures(workdir: Path, pictures: dict[str, np.ndarray]) -> None:
    """Write the pictures to ``overlays/<case id>.png``. Raises UserError if they cannot be written."""
    for case_id, picture in pictures.items():
        with atomic_path(workdir / OVERLAYS / f"{case_id}.png") as temporary:
            Image.fromarray(picture).save(temporary, format="png")
