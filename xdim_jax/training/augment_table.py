"""What augmentation there is, and its settings; `xdim_jax.training.augment` does it, on the device."""

from collections.abc import Mapping
from typing import Any

from xdim_jax.base.errors import UserError

# transform -> its settings, with values that are usual; p is the probability that a sample (or channel) gets it
DEFAULTS: dict[str, dict[str, Any]] = {
    "scale": {"p": 0.0, "low": 0.8, "high": 1.25},  # factor of size, the same along all axes
    # about every axis, in voxels: where slices are thicker than wide, keep to their plane (plane)
    "rotate": {"p": 0.0, "degrees": 15.0, "plane": False},
    "translate": {"p": 0.0, "share": 0.1},  # of the side, along every axis
    "shear": {"p": 0.0, "amount": 0.1},  # tangent of the angle, for every pair of axes
    "flip": {"p": 0.0, "axes": ()},  # each of these spatial axes, each with probability p
    "elastic": {"p": 0.0, "cells": 5, "share": 0.015},  # displacements drawn at cells; sd: share of the side
    "blur": {"p": 0.0, "low": 0.5, "high": 1.5},  # standard deviation in voxels
    "noise": {"p": 0.0, "sd": 0.1},  # uniform from 0 to sd, in units of the standardised image
    "brightness": {"p": 0.0, "low": 0.75, "high": 1.25},  # factor, by channel
    "contrast": {"p": 0.0, "low": 0.75, "high": 1.25},  # factor about the mean, in the old range, by channel
    "lowres": {"p": 0.0, "low": 0.5, "high": 1.0},  # share of the voxels per side that are left, by channel
    "gamma": {"p": 0.0, "low": 0.7, "high": 1.5},  # exponent, on the range of the channel
    "window": {"p": 0.0, "level": 0.1, "low": 0.7, "high": 1.0},  # of the range: shift of the level, width
    "cutout": {"p": 0.0, "share": 0.25},  # of the side: a box of zeros
}
# smallest and largest value of a setting, where it has these names
_LIMITS = {"degrees": (0, 180), "share": (0, 1), "amount": (0, 1), "cells": (2, 64), "sd": (0, 10), "level": (0, 0.5)}
_LARGEST_BLUR = 10  # the filter's taps are unrolled


def settings(section: Mapping[str, Mapping[str, Any]], ndim: int) -> dict[str, dict[str, Any]]:
    """The full settings of a config's ``augment`` section, which names the transforms that differ from `DEFAULTS`.

    Raises:
        UserError: unknown transforms or settings, probabilities outside 0 to 1, an axis that is not there: all at once.
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
        problems.append("config.augment.lowres.high and window.high are shares: expected at most 1")
    if full["flip"]["p"] > 0 and not full["flip"]["axes"]:
        problems.append("config.augment.flip has no axes: give the spatial axes to flip, e.g. axes=(2,)")
    if bad := [a for a in full["flip"]["axes"] if not 0 <= a < ndim]:
        problems.append(f"config.augment.flip.axes={tuple(full['flip']['axes'])}: {bad} is not among 0 to {ndim - 1}")
    if problems:
        raise UserError("\n".join(problems))
    return full
