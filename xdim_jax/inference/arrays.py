"""Conversion of an array with any order of axes to a case in memory, and of results back to this order."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case, Dataset, Volume
from xdim_jax.data.images.grid import make_grid
from xdim_jax.inference.inputs import check_modality


@dataclasses.dataclass(frozen=True)
class ArrayCase:
    """An array as a case.

    Attributes:
        case: The case.
        volume: Its image ``(D, H, W, C)`` and voxel grid.
        axes: Names of the spatial axes of the array, a permutation of ``zyx`` or ``yx``.
    """

    case: Case
    volume: Volume
    axes: str

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Convert ``(D, H, W)`` or ``(D, H, W, channels)`` to the spatial axes of the array; channels stay last."""
        grid = self.volume.grid
        channels = values.reshape(*values.shape[:3], -1)
        xyz = np.stack([grid.to_file(channels[..., k]) for k in range(channels.shape[3])], -1)
        if "z" not in self.axes:
            xyz = xyz[:, :, 0]
        ordered = xyz.transpose(*("xyz".index(a) for a in self.axes), xyz.ndim - 1)
        return ordered if values.ndim > 3 else ordered[..., 0]


def array_case(
    image: np.ndarray,
    axes: str,
    spacing: Sequence[float] | None,
    affine: np.ndarray | None,
    dataset: Dataset,
    modality: str,
) -> ArrayCase:
    """Convert an array to a case.

    Args:
        image: The array.
        axes: Names of its axes, see `xdim_jax.inference.predictor.Predictor.predict`.
        spacing: Voxel size in mm along the spatial axes, in the order of ``axes``; None for 1 mm.
        affine: Affine from voxel indices (x, y, z) to mm in the RAS+ frame; replaces ``spacing``.
        dataset: Data set on which the network was trained.
        modality: CT, MR or empty.

    Raises:
        UserError: The axes, spacing, channels or values cannot be used.
    """
    if image.dtype.name == "bfloat16":
        image = image.astype(np.float32)
    _check(image, axes, dataset, modality)
    spatial = axes.replace("c", "")
    if spacing is None:
        spacing = (1.0,) * len(spatial)
    elif np.ndim(spacing) != 1:
        raise UserError(f"spacing={spacing}: expected one number for each of {', '.join(spatial)}")
    spacing = tuple(spacing)
    if affine is not None and np.shape(affine) != (4, 4):
        raise UserError(f"affine has the shape {np.shape(affine)}: expected (4, 4)")
    if affine is None:
        if len(spacing) != len(spatial) or not all(0 < s < np.inf for s in spacing):
            raise UserError(f"spacing={spacing}: expected mm above 0 along {', '.join(spatial)}")
        size = dict(zip(spatial, spacing, strict=True))
        # x, y, z of the array point to left, posterior, superior; the affine maps them to right, anterior, superior
        affine = np.diag([-size["x"], -size["y"], size.get("z", 1.0), 1.0])
    xyzc = _to_xyzc(image, axes)
    grid = make_grid(Path("image"), xyzc.shape[:3], affine, axes=dataset.axes)
    info = {"modality": modality} if modality else {}
    case = Case("array", "array", (), dataset.channels, None, dataset.labels, dataset.axes, info=info)
    return ArrayCase(case, Volume("array", np.ascontiguousarray(grid.to_memory(xyzc), np.float32), None, grid), spatial)


def _to_xyzc(image: np.ndarray, axes: str) -> np.ndarray:
    """Transpose an array to the axes x, y, z, c; z and c have size 1 if the array lacks them."""
    for name in "zc":
        if name not in axes:
            image, axes = image[..., None], axes + name
    return image.transpose([axes.index(a) for a in "xyzc"])


def _check(image: np.ndarray, axes: str, dataset: Dataset, modality: str) -> None:
    """Raise UserError if the array does not fit its axes, the channels or the modalities of the data set."""
    if image.dtype.kind not in "biuf":
        raise UserError(f"image has the type {image.dtype}: expected an array of real numbers, or paths of images")
    if len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes) <= set("zyxc"):
        raise UserError(f"axes={axes!r}: expected y and x, and z and c if the array has these axes, each once")
    if image.ndim != len(axes):
        raise UserError(f"image of shape {image.shape} has {image.ndim} axes, but axes={axes!r} names {len(axes)}")
    channels = image.shape[axes.index("c")] if "c" in axes else 1
    if channels != len(dataset.channels):
        known = ", ".join(dataset.channels)
        raise UserError(f"image of shape {image.shape} has {channels} channels; expected {known}")
    if min(image.shape) < 1:
        raise UserError(f"image of shape {image.shape} is empty; expected at least one voxel along every axis")
    with np.errstate(over="ignore"):
        finite = np.isfinite(image.astype(np.float32, copy=False))
    if not finite.all():
        raise UserError(
            f"image has {np.count_nonzero(~finite)} values that are NaN, infinite or too large for 32 bits; replace "
            "them"
        )
    check_modality(dataset, modality)
    if dataset.holds_ct and modality not in ("CT", "MR"):
        raise UserError(f"modality={modality!r}: expected CT or MR; the network was trained on both")
