"""The preparation of a case for a network: crop, resampling, intensity window, standardisation; and its inverse.

Standardisation is the last step, and is applied when a prepared case or a part of it is read. Prepared cases can
therefore be stored as int16, and a part is bitwise identical to the same part of the whole image.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case, Dataset, Volume
from xdim_jax.data.images.grid import Grid

Box = tuple[slice, slice, slice]
CROPS = ("none", "nonzero")
NORMS = ("zscore", "zscore_nonzero", "none")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The ``data.prepare`` section of a config.

    Attributes:
        crop: "nonzero" to crop to the bounding box of the voxels that are not 0 in at least one channel; or "none".
        spacing: Spacing in mm along D, H, W after resampling; 0 to keep an axis, empty to keep all.
        size: Pixels along H, W to which every slice is resampled, whatever its voxel size; empty to keep the size.
        window: Centre and width in HU of the window to which CT images are clipped; empty for no window. Other
            modalities are never clipped.
        ct_statistics: Mean and standard deviation in HU with which CT images are standardised, for example those of the
            labelled voxels of a data set; empty to standardise each image by ``normalise``. Other modalities are not
            affected.
        normalise: "zscore" to standardise each channel by its mean and standard deviation; "zscore_nonzero" to use only
            its nonzero voxels, and to keep zeros; or "none".

    Raises:
        UserError: A value is not allowed. The message lists all such values; if one is not a tuple of numbers, only
            this one.
    """

    crop: str = "none"
    spacing: tuple[float, ...] = ()
    size: tuple[int, ...] = ()
    window: tuple[float, ...] = ()
    ct_statistics: tuple[float, ...] = ()
    normalise: str = "zscore"

    def __post_init__(self) -> None:
        wrong = []
        if self.crop not in CROPS:
            wrong.append(f"crop={self.crop!r}: expected one of {', '.join(CROPS)}")
        if self.normalise not in NORMS:
            wrong.append(f"normalise={self.normalise!r}: expected one of {', '.join(NORMS)}")
        numbers = {"spacing": self.spacing, "size": self.size, "window": self.window}
        numbers["ct_statistics"] = self.ct_statistics
        for name, values in numbers.items():
            if not isinstance(values, list | tuple) or not all(
                isinstance(v, int | float) and math.isfinite(v) for v in values
            ):
                raise UserError(f"config.data.prepare.{name}={values!r}: expected a tuple of numbers")
            kind = int if name == "size" else float  # 1 and 1.0 have the same digest
            object.__setattr__(self, name, tuple(kind(v) for v in values))
        if self.spacing and (len(self.spacing) != 3 or any(v and not 1e-5 <= v <= 100 for v in self.spacing)):
            wrong.append(f"spacing={self.spacing}: expected 0.00001 to 100 mm along D,H,W, or 0 to keep an axis")
        if self.size and (len(self.size) != 2 or not 1 <= min(self.size) <= max(self.size) <= 4096):
            wrong.append(f"size={self.size}: expected 1 to 4096 pixels along H,W")
        if self.size and any(self.spacing):
            wrong.append(f"size={self.size} and spacing={self.spacing} cannot be combined; give one of them")
        if self.window and (len(self.window) != 2 or self.window[1] <= 0):
            wrong.append(f"window={self.window}: expected centre and width in HU, the width above 0")
        if self.ct_statistics and (len(self.ct_statistics) != 2 or self.ct_statistics[1] <= 0):
            wrong.append(
                f"ct_statistics={self.ct_statistics}: expected mean and standard deviation in HU, the latter above 0"
            )
        if wrong:
            raise UserError("\n".join(f"config.data.prepare.{line}" for line in wrong))

    @staticmethod
    def from_config(section: Mapping[str, Any]) -> "Preparation":
        """Return the preparation of a ``data.prepare`` section. Raises UserError if a value is not allowed."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in section.items()}
        if unknown := values.keys() - {f.name for f in dataclasses.fields(Preparation)}:
            raise UserError(f"config.data.prepare has unknown keys: {', '.join(sorted(unknown))}")
        return Preparation(**values)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared case, and its position in the source array.

    Attributes:
        raw: int16 or float32 (D, H, W, C), cropped, resampled and clipped, but not yet standardised.
        label: Label indices, uint8 (D, H, W); None if the case has no reference.
        shift: One number per channel; the input of the network is ``(raw - shift) * scale``.
        scale: One number per channel.
        masked: For each channel, True if standardisation leaves voxels that are 0 unchanged. Stores of earlier
            versions have one value for all channels.
        box: Box of the source array to which the case was cropped.
        source: Shape (D, H, W) of the source array.
        spacing: Spacing in mm along D, H, W of the prepared grid.
    """

    raw: np.ndarray
    label: np.ndarray | None
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    masked: bool | Sequence[bool]
    box: Box
    source: tuple[int, ...]
    spacing: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (D, H, W) of the prepared grid."""
        return self.raw.shape[:3]

    def image(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Return the standardised image, or a part of it, as float32 (D, H, W, C)."""
        raw = np.asarray(self.raw[part])
        out = (raw.astype(np.float32) - np.array(self.shift, np.float32)) * np.array(self.scale, np.float32)
        if np.any(self.masked):
            out[(raw == 0) & self.masked] = 0
        return np.ascontiguousarray(out)

    def restore(self, scores: np.ndarray) -> np.ndarray:
        """Resample scores ``(D, H, W, R)`` from the prepared grid to the source grid; outside the box they are 0."""
        inside = resample(scores, tuple(b.stop - b.start for b in self.box))
        if inside.shape[:3] == tuple(self.source):
            return inside
        out = np.zeros((*self.source, scores.shape[-1]), scores.dtype)
        out[self.box] = inside
        return out


def prepare(case: Case, volume: Volume, settings: Preparation) -> Prepared:
    """Crop, resample and clip a case, and compute shift and scale for its standardisation.

    Args:
        case: Case, whose channels and modality decide which channels are CT.
        volume: Images and reference of the case.
        settings: How the case is prepared.
    """
    image, label = volume.image, volume.label
    box = nonzero_box(image) if settings.crop == "nonzero" else _whole(image.shape)
    image, label = image[box], label if label is None else label[box]
    shape = target_shape(image.shape[:3], volume.grid.spacing, settings)
    spacing = tuple(s * n / m for s, n, m in zip(volume.grid.spacing, image.shape, shape, strict=False))
    ct = ct_channels(case.channels, case.info.get("modality", ""))
    zeros = settings.normalise == "zscore_nonzero"
    # in CT that is standardised by fixed numbers, 0 HU is water, and not background
    masked = [zeros and not (settings.ct_statistics and channel in ct) for channel in range(image.shape[3])]
    background = (image == 0) & masked if shape != image.shape[:3] and zeros else None
    if shape != image.shape[:3]:
        image = resample(image, shape)
        label = label if label is None else resample_nearest(label, shape)
        if background is not None:  # interpolation makes background voxels next to the foreground nonzero
            image[resample_nearest(background, shape)] = 0
    limits = None
    if settings.window and ct:
        centre, width = settings.window
        limits = [(-np.inf, np.inf)] * image.shape[3]
        for channel in ct:
            limits[channel] = (centre - width / 2, centre + width / 2)
    raw = _compact(image, limits)
    shift, scale = _statistics(raw, settings.normalise)
    if settings.ct_statistics:
        mean, sd = settings.ct_statistics
        shift = tuple(mean if channel in ct else value for channel, value in enumerate(shift))
        scale = tuple(1 / sd if channel in ct else value for channel, value in enumerate(scale))
    return Prepared(raw, label, shift, scale, masked, box, volume.image.shape[:3], spacing)


def needed_bytes(
    stored: Sequence[tuple[np.dtype, int]], channels: int, grid: Grid, settings: Preparation
) -> tuple[int, int]:
    """Estimate the memory that is needed to read and prepare a case, from the headers of its files.

    Args:
        stored: Result of `xdim_jax.data.images.image.voxel_type` for every image file.
        channels: Number of channels of the image.
        grid: Grid of the source.
        settings: How the case is prepared.

    Returns:
        The number of bytes at the peak, and the number of bytes of the prepared case.
    """
    source = grid.memory_geometry[0][::-1]
    shape = target_shape(source, grid.spacing, settings)
    n, m = math.prod(source), math.prod(shape)
    image = 4 * channels * n
    one = len(stored) == 1
    reading = max(
        n * channels // len(stored) * peak + (0 if one and dtype == np.float32 else image) for dtype, peak in stored
    )
    whole = not settings.window or all((settings.window[0] + s * settings.window[1] / 2).is_integer() for s in (-1, 1))
    short = shape == source and whole and all(d.kind in "iu" and np.can_cast(d, np.int16) for d, _ in stored)
    kept = (2 if short else 4) * channels * m
    preparing = image + kept
    if settings.crop == "nonzero":
        preparing = max(preparing + n, image + 3 * n)
    if shape != source:
        smooth = 4 * n * any(t < s for s, t in zip(source, shape, strict=True))
        # the mask of the background, and copies for resampling it
        masks = 3 * channels * max(n, m) if settings.normalise == "zscore_nonzero" else 0
        preparing = image + 4 * channels * m + masks + max(smooth, kept)
    return max(reading, preparing), kept


def ct_channels(channels: Sequence[str], modality: str) -> list[int]:
    """Return the indices of the channels in HU: all of a CT case, else those with the name CT, as in nnU-Net."""
    return [i for i, name in enumerate(channels) if modality == "CT" or name.upper() == "CT"]


def check_preparation(dataset: Dataset, settings: Preparation) -> None:
    """Raise UserError if there are settings for CT, but the data set has no CT images."""
    name = "window" if settings.window else "ct_statistics"
    if getattr(settings, name) and not dataset.holds_ct and not ct_channels(dataset.channels, ""):
        raise UserError(
            f"config.data.prepare.{name}={getattr(settings, name)} is for CT images, but {dataset.name} has only the "
            f"channels {', '.join(dataset.channels)}; name the channel CT in dataset.json, or remove this setting"
        )


def target_shape(shape: tuple[int, ...], spacing: tuple[float, ...], settings: Preparation) -> tuple[int, ...]:
    """Return the shape (D, H, W) that an array with the given shape and spacing (mm) has after resampling."""
    if settings.size:
        return (shape[0], *settings.size)
    wanted = settings.spacing or (0.0, 0.0, 0.0)
    return tuple(
        max(round(n * s / w), 1) if w and abs(s - w) > 1e-3 * w else n
        for n, s, w in zip(shape, spacing, wanted, strict=True)
    )


def _whole(shape: tuple[int, ...]) -> Box:
    return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])


def nonzero_box(image: np.ndarray) -> Box:
    """Return the bounding box of the voxels that are not 0 in at least one channel (paper, Sect. 3.1.3).

    Args:
        image: (D, H, W, C).

    Returns:
        The box; the whole volume if all voxels are 0.
    """
    mask = np.empty(image.shape[:3], bool)
    for plane, into in zip(image, mask, strict=True):
        np.any(plane != 0, -1, out=into)
    box = []
    for axis in range(3):
        profile = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(profile[0]), int(profile[-1]) + 1) if profile.size else slice(0, mask.shape[axis]))
    return box[0], box[1], box[2]


def _statistics(image: np.ndarray, normalise: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return shift and scale of every channel. The scale is 0 if a channel is constant or has no nonzero voxels."""
    channels = np.moveaxis(image, -1, 0)
    if normalise == "none":
        return (0.0,) * len(channels), (1.0,) * len(channels)
    shift, scale = [], []
    for channel in channels:
        mean, std = _moments(channel, masked=normalise == "zscore_nonzero")
        shift.append(mean)
        scale.append(1 / std if std > 0 else 0.0)
    return tuple(shift), tuple(scale)


def _moments(channel: np.ndarray, *, masked: bool) -> tuple[float, float]:
    """Return mean and standard deviation in double precision.

    They are computed slice by slice, to avoid a double-precision copy of the volume.
    """

    def planes() -> Iterator[np.ndarray]:
        return (p[p != 0] if masked else p for p in channel)

    count = sum(p.size for p in planes())
    if not count:
        return 0.0, 0.0
    mean = sum(float(p.sum(dtype=np.float64)) for p in planes()) / count
    square = sum(float(((p.astype(np.float64) - mean) ** 2).sum()) for p in planes())
    return mean, math.sqrt(square / count)


def _compact(image: np.ndarray, limits: Sequence[tuple[float, float]] | None) -> np.ndarray:
    """Return the image clipped to the limits of every channel: int16 if that is exact, else float32.

    The result may be ``image`` itself.
    """
    bounds = np.array(limits, np.float32).T if limits else None
    whole = _clipped(image, bounds, np.int16)
    if whole is not None:
        return whole
    if bounds is None:
        return np.ascontiguousarray(image, np.float32)
    clipped = _clipped(image, bounds, np.float32)
    assert clipped is not None
    return clipped


def _clipped(image: np.ndarray, bounds: np.ndarray | None, dtype: Any) -> np.ndarray | None:
    """Return a clipped copy of another dtype; None if it cannot represent all values."""
    out = np.empty(image.shape, dtype)
    for plane, into in zip(image, out, strict=True):
        values = plane if bounds is None else np.clip(plane, *bounds)
        if dtype == np.int16 and values.size and not -(2**15) <= values.min() <= values.max() < 2**15:
            return None
        into[:] = values
        if not (into == values).all():
            return None
    return out


def resample(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample an image linearly to another number of voxels over the same extent.

    If voxels become larger along an axis by a factor ``s``, the image is first smoothed along this axis to prevent
    aliasing, by a Gaussian with a standard deviation of ``(s - 1) / 2`` voxels of the image.

    Args:
        image: (D, H, W, C).
        shape: New shape (D, H, W).

    Returns:
        The resampled image, float32; ``image`` itself if it already has the shape.
    """
    if image.shape[:3] == tuple(shape):
        return image
    factors = [m / n for n, m in zip(image.shape[:3], shape, strict=True)]
    sigma = [max(1 / f - 1, 0) / 2 for f in factors]
    out = np.empty((*shape, image.shape[3]), np.float32)
    for k, channel in enumerate(np.moveaxis(image.astype(np.float32, copy=False), -1, 0)):
        if any(sigma):
            channel = channel.copy()
            gaussian_filter(channel, sigma, output=channel, mode="nearest")
        zoom(channel, factors, out[..., k], order=1, mode="nearest", grid_mode=True)
    return out


def resample_nearest(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample an array to another shape (D, H, W). The value of a new voxel is the one at its centre."""
    sizes = sorted(zip(label.shape[:3], shape, range(3), strict=True), key=lambda s: s[1] / s[0])
    for n, m, axis in sizes:  # axes that become smaller first, to save memory
        if n != m:
            label = np.take(label, [(2 * i + 1) * n // (2 * m) for i in range(m)], axis)
    return np.ascontiguousarray(label)
