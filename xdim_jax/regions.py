"""Tissues and the nested regions that BraTS scores, as sets (spec: challenges, section 3.1).

Inside the package a label map holds the indices of `TISSUES`; each data set's own values (4 is ET up to 2022 and a
resection cavity in 2024) exist only in its files, see `xdim_jax.data.brats.Convention`.
"""

from typing import Any

import numpy as np

TISSUES = ("background", "NCR", "ED", "ET")
NCR, ED, ET = 1, 2, 3

# nested: each is a part of the one before
REGIONS: dict[str, tuple[int, ...]] = {"WT": (NCR, ED, ET), "TC": (NCR, ET), "ET": (ET,)}


def encode(label: Any, xp: Any = np) -> Any:
    """Label map ``(..., D, H, W)`` of tissue indices to masks ``bool (..., D, H, W, 3)`` of WT, TC, ET.

    ``xp`` is the array library: numpy, or ``jax.numpy`` inside a jitted program.
    """
    return xp.stack([xp.isin(label, xp.asarray(tissues)) for tissues in REGIONS.values()], -1)


def decode(masks: np.ndarray) -> np.ndarray:
    """Masks ``bool (D, H, W, 3)`` of WT, TC, ET to a label map: ET, then TC without ET, then WT without TC.

    Masks that are not nested are made so by writing inside out (paper, Sect. 3.1.3: ET is kept unaltered, NCR is
    extracted from TC and ED from WT).
    """
    wt, tc, et = masks[..., 0], masks[..., 1], masks[..., 2]
    label = np.where(wt, np.uint8(ED), np.uint8(0))
    label[tc] = NCR
    label[et] = ET
    return label


def drop_small_et(label: np.ndarray, minimum: int) -> np.ndarray:
    """Relabels ET as NCR when the whole case has fewer than ``minimum`` voxels of it (paper, Sect. 3.1.3); 0: never."""
    et = label == ET
    if np.count_nonzero(et) >= minimum:
        return label
    return np.where(et, np.uint8(NCR), label)
