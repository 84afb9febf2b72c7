"""The augmentation transforms and their settings. `xdim_jax.training.augment` computes them on the device."""

from collections.abc import Mapping
from typing import Any

from xdim_jax.base.errors import UserError

# transform -> its default settings. p is the probability that a sample (or channel) is transformed. A value is drawn
# uniformly between low and high for each sample, or, where the comment says "by channel", for each of its channels.
DEFAULTS: dict[str, dict[str, Any]] = {
    "scale": {"p": 0.0, "low": 0.8, "high": 1.25},  # factor of the size (drawn log-uniformly), equal for all axes
    # largest angle about every axis, in voxel coordinates. These ignore the spacing: use plane=True for volumes with
    # thick slices, to rotate only within the plane of the slices
    "rotate": {"p": 0.0, "degrees": 15.0, "plane": False},
    "translate": {"p": 0.0, "share": 0.1},  # largest shift along an axis, as a fraction of the image size along it
    "shear": {"p": 0.0, "amount": 0.1},  # largest tangent of the shear angle, for every pair of axes
    # spatial axes, each flipped with probability p. In a config, `xdim_jax.training.check` replaces () by all axes, but
    # without W (left-right) if the name of a structure contains a side, such as "left kidney"
    "flip": {"p": 0.0, "axes": ()},
    # a displacement field that is interpolated from random displacements at ``cells`` points per axis; share: standard
    # deviation of the random displacements, as a fraction of the image size along the axis
    "elastic": {"p": 0.0, "cells": 5, "share": 0.015},
    "blur": {"p": 0.0, "low": 0.5, "high": 1.5},  # standard deviation in voxels
    "noise": {"p": 0.0, "sd": 0.1},  # largest standard deviation, in units of the standardised image
    "brightness": {"p": 0.0, "low": 0.75, "high": 1.25},  # factor, by channel
    # factor of the difference between intensity and mean, by channel; the result is clipped to the old intensity range
    "contrast": {"p": 0.0, "low": 0.75, "high": 1.25},
    # fraction of the voxels per axis that remains, the same for all channels; each channel is transformed with
    # probability p
    "lowres": {"p": 0.0, "low": 0.5, "high": 1.0},
    "gamma": {"p": 0.0, "low": 0.7, "high": 1.5},  # exponent, applied to the intensities scaled to [0, 1], by channel
    # level: largest shift of the centre of the window; low, high: its width; as fractions of the intensity range, by
    # channel
    "window": {"p": 0.0, "level": 0.1, "low": 0.7, "high": 1.0},
    "cutout": {"p": 0.0, "share": 0.25},  # side of a box of zeros, as a fraction of the side of the image
}
# Each transform has its own random stream. The numbers must never change: with other numbers, the same seed would give
# other samples. A new transform gets the next free number.
STREAMS = {
    "scale": 0,
    "rotate": 1,
    "translate": 2,
    "shear": 3,
    "flip": 4,
    "elastic": 5,
    "blur": 6,
    "noise": 7,
    "brightness": 8,
    "contrast": 9,
    "lowres": 10,
    "gamma": 11,
    "window": 12,
    "cutout": 13,
}
# smallest and largest value of a setting, by its name
_LIMITS = {"degrees": (0, 180), "share": (0, 1), "amount": (0, 1), "cells": (2, 64), "sd": (0, 10), "level": (0, 0.5)}
_LARGEST_BLUR = 10  # in voxels; limits the size of the compiled program, in which the loop over the taps is unrolled


def settings(section: Mapping[str, Mapping[str, Any]], ndim: int) -> dict[str, dict[str, Any]]:
    """Return the settings of all transforms: `DEFAULTS`, updated by the ``augment`` section of a config.

    Args:
        section: The ``augment`` section of a config.
        ndim: Number of spatial axes.

    Raises:
        UserError: Transforms or settings are unknown, or values are out of range. The message lists all of them.
    """
    full = {name: dict(values) for name, values in DEFAULTS.items()}
    problems = []
    for name, values in section.items():
        if name not in full:
            problems.append(f"config.augment.{name} is unknown; known: {', '.join(DEFAULTS)}")
            continue
        for key, value in values.items():
            if key not in full[name]:
                problems.append(f"config.augment.{name}.{key} is unknown; known: {', '.join(DEFAULTS[name])}")
            else:
                full[name][key] = value
    for name, values in full.items():
        if not 0 <= values["p"] <= 1:
            problems.append(f"config.augment.{name}.p={values['p']}: expected 0 to 1")
        if "low" in values and not 0 < values["low"] <= values["high"]:
            problems.append(f"config.augment.{name}: expected 0 < low <= high, found {values['low']}, {values['high']}")
        for key, value in values.items():
            if key in _LIMITS and not _LIMITS[key][0] <= value <= _LIMITS[key][1]:
                problems.append(f"config.augment.{name}.{key}={value}: expected {_LIMITS[key][0]} to {_LIMITS[key][1]}")
    if full["blur"]["high"] > _LARGEST_BLUR:
        problems.append(f"config.augment.blur.high={full['blur']['high']}: expected at most {_LARGEST_BLUR} voxels")
    if full["lowres"]["high"] > 1 or full["window"]["high"] > 1:
        problems.append("config.augment.lowres.high and config.augment.window.high are fractions: expected at most 1")
    if full["flip"]["p"] > 0 and not full["flip"]["axes"]:
        problems.append("config.augment.flip has no axes: give the spatial axes to flip, e.g. axes=(2,)")
    if bad := [a for a in full["flip"]["axes"] if not (isinstance(a, int) and 0 <= a < ndim)]:
        problems.append(f"config.augment.flip.axes={tuple(full['flip']['axes'])}: {bad} is not among 0 to {ndim - 1}")
    if problems:
        raise UserError("\n".join(problems))
    return full
