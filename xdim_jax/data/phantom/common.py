"""Functions that all phantoms use: smooth random fields, the difficulty, and the record of the settings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import zoom

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json

SETTINGS_FILE = "phantom.json"


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """Settings that make phantoms easier or harder to segment.

    Attributes:
        noise: Standard deviation of the noise, in units of the signal of the tissues. In ultrasound, standard deviation
            of the logarithm of the echo amplitude, in addition to speckle of a fixed strength.
        bias: Standard deviation of the logarithmic bias field; in ultrasound, a quarter of it.
        contrast: 1 for the usual contrast of tissues, 0 for equal intensities.

    Raises:
        UserError: A value is out of range.
    """

    noise: float = 0.06
    bias: float = 0.10
    contrast: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.noise <= 10 and 0 <= self.bias <= 10 and 0 <= self.contrast <= 1):
            raise UserError(f"phantom difficulty {self}: expected noise and bias from 0 to 10, contrast from 0 to 1")


def smooth_field(shape: tuple[int, ...], rng: np.random.Generator, cells: int) -> np.ndarray:
    """Return a smooth random field with a mean near 0 and a standard deviation near 1.

    Args:
        shape: Shape of the field.
        rng: Source of random numbers.
        cells: The field interpolates ``cells + 2`` random values along each axis.
    """
    coarse = rng.standard_normal((cells + 2,) * len(shape)).astype(np.float32)
    # for speed, interpolate cubically only to a third of the resolution, and then linearly
    middle = tuple(-(-n // 3) for n in shape)
    field = _resize(_resize(coarse, middle, order=3), shape, order=1)
    return np.clip(field / max(float(field.std()), 1e-6), -2.5, 2.5)


def _resize(field: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    factors = [n / m for n, m in zip(shape, field.shape, strict=True)]
    return np.asarray(zoom(field, factors, order=order, mode="nearest", grid_mode=True))


def scale_contrast(values: Mapping[Any, float], contrast: float) -> dict[Any, float]:
    """Scale the differences of signals from their mean: 1 keeps the signals, 0 replaces them by their mean."""
    mean = sum(values.values()) / len(values)
    return {key: mean + contrast * (value - mean) for key, value in values.items()}


def claim_folder(root: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of the phantoms in a folder. Raises UserError if it contains phantoms of other settings."""
    record = Path(root) / SETTINGS_FILE
    if record.exists() and (found := read_json(record)) != settings:
        raise UserError(
            f"{root} contains phantoms made with {found}, not {settings}; give another folder, or remove it"
        )
    write_json(record, settings)
