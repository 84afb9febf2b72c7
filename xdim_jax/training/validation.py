"""Validation of whole cases during training: Dice per region, and pictures of some of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from xdim_jax.base.files import atomic_path
from xdim_jax.base.signals import StopRequest
from xdim_jax.data import case as data_case
from xdim_jax.data import store
from xdim_jax.data.case import Case, Dataset
from xdim_jax.inference import sliding_window
from xdim_jax.pages.colours import PALETTE, to_rgb
from xdim_jax.scoring import masks
from xdim_jax.training import mesh

OVERLAYS = "overlays"  # folder of the workdir


class InterruptedValidationError(Exception):
    """Raised inside a validation when a stop was asked for."""


# (params, stats), stop -> mean Dice per region; pictures by case id, uint8 (H, W, 3)
Validation = Callable[[Any, StopRequest], tuple[dict[str, float], dict[str, np.ndarray]]]


def make_validation(
    segmenter: sliding_window.Segmenter,
    options: Any,
    dataset: Dataset,
    cases: Sequence[tuple[Case, store.Entry]],
    *,
    overlays: int,
) -> Validation:
    """Validation of whole images on their own grid: mean Dice per region over the cases, after post-processing.

    A region that is empty in both maps counts 1, as on the BraTS platform; one that a case's reference does not show
    (CHAOS task 4) is left out. Several processes share the cases. The first ``overlays`` cases are drawn. ``options``
    is the ``predict`` section of a config.
    """
    names = dataset.regions.names

    def validate(weights: Any, stop: StopRequest) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        weights = mesh.local(weights)
        scores = np.full((len(cases), len(names)), np.nan)
        pictures = {}
        for first in range(0, len(cases), jax.process_count()):
            if mesh.agree(stop.signal > 0):
                raise InterruptedValidationError
            number = first + jax.process_index()
            if number >= len(cases):
                continue
            case, entry = cases[number]
            prepared = entry.load()
            label = sliding_window.segment(segmenter, weights, prepared, options)
            volume = data_case.read_case(case) if number < overlays else None
            truth = data_case.read_label(case) if volume is None or volume.label is None else volume.label
            predicted, reference = dataset.regions.encode(label), dataset.regions.encode(truth)
            shown = names if dataset.annotated is None else dataset.annotated(case)
            for r, name in enumerate(names):
                if name in shown:
                    dice = masks.dice(predicted[..., r], reference[..., r])
                    scores[number, r] = 1.0 if np.isnan(dice) else dice
            if volume is not None:
                pictures[case.case_id] = draw(volume.image[..., 0], truth, label)
        every = mesh.gather(scores)  # (processes, cases, regions), NaN where another process has the case
        known = np.isfinite(every)
        total, count = np.where(known, every, 0).sum((0, 1)), known.sum((0, 1))
        return {name: float(t / n) if n else 1.0 for name, t, n in zip(names, total, count, strict=True)}, pictures

    return validate


_COLOURS = np.array([to_rgb(colour) for colour in PALETTE])  # of the structures, in order


def draw(image: np.ndarray, reference: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The slice with most structure: image, reference and prediction side by side, uint8 (H, 3 W, 3).

    Args:
        image: (D, H, W), any range.
        reference, predicted: label indices (D, H, W).
    """
    structure = reference if reference.any() else predicted  # an early prediction may be everywhere
    at = int(np.argmax((structure > 0).sum((1, 2))))
    plane = image[at].astype(np.float32)
    low, high = np.percentile(plane, [1, 99])
    grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1)[..., None] * 255
    grey = np.repeat(grey, 3, -1)
    panels = [grey]
    for label in (reference[at], predicted[at]):
        colour = _COLOURS[(np.maximum(label, 1) - 1) % len(_COLOURS)]
        panels.append(np.where(label[..., None] > 0, 0.5 * grey + 0.5 * colour, grey))
    return np.concatenate(panels, 1).round().astype(np.uint8)


def keep_pictures(workdir: Path, pictures: dict[str, np.ndarray]) -> None:
    """The latest pictures as ``overlays/<case id>.png``. Raises UserError if the disk refuses them."""
    for case_id, picture in pictures.items():
        with atomic_path(workdir / OVERLAYS / f"{case_id}.png") as temporary:
            Image.fromarray(picture).save(temporary, format="png")
