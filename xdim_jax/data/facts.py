"""Facts about the cases of a data set: voxel sizes, sizes, intensities, and the fraction of voxels that a window clips.

The facts of a case are measured when it is prepared, and are kept in the store. `describe` returns three lines about
them for the log, and warnings about values of ``config.data.prepare`` that should be set.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case, Volume
from xdim_jax.data.labels import is_structure
from xdim_jax.data.prepare import Preparation, ct_channels

_PERCENTILES = (0.5, 50, 99.5)
_SAMPLES = 200_000  # number of voxels from which percentiles are computed
_MAX_RATIO = 2.0  # ratio of voxel sizes in a data set above which a warning is given
_CLIPPED = 0.2  # fraction of the foreground outside of the window above which a warning is given
_ERASED = 0.8  # fraction of the foreground outside of the window above which the window is an error


def measure(case: Case, volume: Volume, settings: Preparation) -> dict[str, Any]:
    """Return the facts of a case as JSON values.

    Returns:
        ``spacing``: Voxel size (D, H, W) in mm. ``size``: Number of voxels (D, H, W). ``percentiles``: The percentiles
        0.5, 50 and 99.5 of the intensities of each channel. ``ct``: Indices of the channels in HU. ``clipped``:
        Fraction of the labelled voxels whose intensity in a CT channel is outside of the window; None if there is no
        window, no CT channel, or no labelled voxel.
    """
    channels = [plane.reshape(-1) for plane in np.moveaxis(volume.image, -1, 0)]
    ct = ct_channels(case.channels, case.info.get("modality", ""))
    clipped = None
    if settings.window and ct and volume.label is not None and is_structure(volume.label).any():
        centre, width = settings.window
        values = volume.image[is_structure(volume.label)][:, ct]
        clipped = float((np.abs(values - centre) > width / 2).mean())
    return {
        "spacing": [float(s) for s in volume.grid.spacing],
        "size": [int(n) for n in volume.image.shape[:3]],
        "percentiles": [[float(v) for v in np.percentile(sample(channel), _PERCENTILES)] for channel in channels],
        "ct": list(ct),
        "clipped": clipped,
    }


def sample(values: np.ndarray) -> np.ndarray:
    """Return 200 000 of the values (N,), drawn at random with a fixed seed; all of them if there are fewer.

    They are drawn at random, because every n-th value could always be in the same columns of an image.
    """
    if values.size <= _SAMPLES:
        return values
    return values[np.random.default_rng(0).integers(values.size, size=_SAMPLES)]


def describe(
    facts: Sequence[Mapping[str, Any]], channels: Sequence[str], settings: Preparation
) -> tuple[list[str], list[str]]:
    """Describe the cases of a data set.

    Args:
        facts: Result of `measure` for each case.
        channels: Names of the channels.
        settings: How the cases are prepared.

    Returns:
        Lines for the log; and warnings.

    Raises:
        UserError: The window clips more than 80 % of the foreground (median over cases).
    """
    if not facts:
        return [], []
    spacing, size = (np.array([f[key] for f in facts]) for key in ("spacing", "size"))
    lines = [
        f"voxels     {_ranges(spacing, '.3g')} mm (D, H, W)",
        f"sizes      {_ranges(size, '.0f')} voxels (D, H, W)",
        "intensity  " + "; ".join(_intensity(facts, i, name) for i, name in enumerate(channels)),
    ]
    warnings = []
    ratios = spacing.max(0) / spacing.min(0)
    fixed = [(bool(settings.spacing) and settings.spacing[a] > 0) or (a > 0 and bool(settings.size)) for a in range(3)]
    if different := [axis for axis in range(3) if ratios[axis] > _MAX_RATIO and not fixed[axis]]:
        median = ",".join(f"{v:.3g}" for v in np.median(spacing, 0))
        names = " and ".join(f"along {'DHW'[a]} from {_ends(spacing[:, a], '.3g')}" for a in different)
        warnings.append(
            f"voxel sizes differ ({names} mm), but the cases are not resampled to one voxel size; to resample them to "
            f"the median: --config.data.prepare.spacing=({median})"
        )
    if any(f["ct"] for f in facts) and not settings.window:
        warnings.append(
            "CT images are not clipped to an intensity window; for abdominal soft tissue: "
            "--config.data.prepare.window=(60,400), which is centre and width in HU"
        )
    return lines, warnings + _check_window([f["clipped"] for f in facts if f["clipped"] is not None], settings)


def _check_window(clipped: Sequence[float], settings: Preparation) -> list[str]:
    """Return a warning if the window clips much of the foreground. Raises UserError if it clips nearly all of it."""
    if not clipped:
        return []
    centre, width = settings.window
    median = float(np.median(clipped))
    text = (
        f"config.data.prepare.window=({centre:g},{width:g}) is centre and width, from {centre - width / 2:g} to "
        f"{centre + width / 2:g} HU, and clips {100 * median:.0f} % of the labelled voxels (median over cases)"
    )
    if median > _ERASED:
        as_limits = f"({(centre + width) / 2:g},{width - centre:g})"
        step = f"if {centre:g} and {width:g} are the limits, give {as_limits}" if centre < width else "give another one"
        raise UserError(f"{text}; {step}")
    return [f"{text}; if that is not intended, give another window"] if median > _CLIPPED else []


def _intensity(facts: Sequence[Mapping[str, Any]], channel: int, name: str) -> str:
    """Return the median over cases of the percentiles of a channel, as text."""
    low, middle, high = np.median([f["percentiles"][channel] for f in facts], 0)
    return f"{name} {low:.4g} to {high:.4g}, median {middle:.4g}"


def _ranges(values: np.ndarray, spec: str) -> str:
    return " x ".join(_ends(values[:, axis], spec) for axis in range(values.shape[1]))


def _ends(values: np.ndarray, spec: str) -> str:
    """Return the smallest and largest value as text, or one number if both have the same text."""
    low, high = format(float(values.min()), spec), format(float(values.max()), spec)
    return low if low == high else f"{low} to {high}"
