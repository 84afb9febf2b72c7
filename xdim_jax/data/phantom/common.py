"""What the phantoms share: smooth random fields, difficulty, and the record of their settings."""

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
    """How hard the phantoms are.

    Attributes:
        noise: standard deviation of the noise, in units of the tissues' signal; of ultrasound, the strength of speckle
            is fixed and this adds to it.
        bias: standard deviation of the (logarithmic) bias field.
        contrast: 1 for the usual contrast of tissues; towards 0 their intensities overlap more and more.
    """

    noise: float = 0.06
    bias: float = 0.10
    contrast: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.noise <= 10 and 0 <= self.bias <= 10 and 0 <= self.contrast <= 1):
            raise UserError(f"phantom difficulty {self}: expected noise and bias of 0 to 10, contrast of 0 to 1")


def smooth_field(shape: tuple[int, ...], rng: np.random.Generator, cells: int) -> np.ndarray:
    """A random field of standard deviation about 1 that varies over ``1 / cells`` of the image."""
    coarse = rng.standard_normal((cells + 2,) * len(shape)).astype(np.float32)
    middle = tuple(-(-n // 3) for n in shape)  # cubic on a third of the voxels, linear from there
    field = _resize(_resize(coarse, middle, order=3), shape, order=1)
    return np.clip(field / max(float(field.std()), 1e-6), -2.5, 2.5)


def _resize(field: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    factors = [n / m for n, m in zip(shape, field.shape, strict=True)]
    return np.asarray(zoom(field, factors, order=order, mode="nearest", grid_mode=True))


def blend(values: Mapping[Any, float], contrast: float) -> dict[Any, float]:
    """Signals moved towards their mean: contrast 1 leaves them, 0 makes them equal."""
    mean = sum(values.values()) / len(values)
    return {key: mean + contrast * (value - mean) for key, value in values.items()}


def claim_folder(root: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of the phantoms in a folder. Raises UserError if it holds phantoms of other settings."""
    record = Path(root) / SETTINGS_FILE
    if record.exists() and (found := read_json(record)) != settings:
        raise UserError(f"{root} holds phantoms made with {found}, not {settings}; give another folder, or remove it")
    write_json(record, settings)
