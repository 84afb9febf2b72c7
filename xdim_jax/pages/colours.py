"""Colours of structures in figures, and grey values of images."""

import numpy as np

# red, green, yellow and blue of the paper (Fig. 8, 10 and 12), and further colours
PALETTE = ("#d62728", "#2ca02c", "#ffd700", "#1f77b4", "#ff7f0e", "#9467bd", "#17becf", "#e377c2")
RED, GREEN, YELLOW, BLUE = PALETTE[:4]


# CT images are shown in the window for soft tissue. An image with values below _AIR and above _TISSUE is in HU
SOFT_TISSUE = (-140.0, 260.0)
_AIR, _TISSUE = -800.0, 100.0


def to_grey(plane: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """Return the grey values of a plane, from 0 to 1, float32.

    Args:
        plane: The plane.
        image: The image of the plane, from whose values CT is recognised; None for the plane itself.

    Returns:
        For CT, values in the window for soft tissue. Otherwise black and white are the 1st and the 99.5th percentile of
        the values above the minimum.
    """
    plane = plane.astype(np.float32)
    image = plane if image is None else image
    if float(image.min()) < _AIR and float(image.max()) > _TISSUE:
        low, high = SOFT_TISSUE
    else:
        inside = plane[plane > plane.min()]
        low, high = np.percentile(inside, [1, 99.5]) if inside.size else (0.0, 1.0)
        low = low if low < high else plane.min()
    return np.clip((plane - low) / max(float(high - low), 1e-6), 0, 1).astype(np.float32)


def to_rgb(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue from 0 to 255, given ``#rrggbb``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
