"""Host-side preparation of volumes, numpy only, and random patches."""

import numpy as np


def brain_box(image: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds every voxel of ``(D, H, W, C)`` that is not 0 in some channel (paper, Sect. 3.1.3).

    An image of zeros gives the whole volume.
    """
    mask = np.any(image != 0, -1)
    box = []
    for axis in range(3):
        profile = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(profile[0]), int(profile[-1]) + 1) if profile.size else slice(0, mask.shape[axis]))
    return box[0], box[1], box[2]


def zscore_nonzero(image: np.ndarray) -> np.ndarray:
    """Standardises the non-zero voxels of every channel of ``(D, H, W, C)``; the background stays 0 (Sect. 3.1.3).

    A channel without non-zero voxels, or constant on them, becomes 0.
    """
    out = np.zeros(image.shape, np.float32)
    for c in range(image.shape[-1]):
        channel = image[..., c]
        mask = channel != 0
        values = channel[mask].astype(np.float64)
        if values.size and (std := values.std()) > 0:
            out[..., c][mask] = (values - values.mean()) / std
    return out


def random_patch(
    image: np.ndarray,
    label: np.ndarray,
    size: tuple[int, int, int],
    tumour_probability: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a random patch from ``(D, H, W, C)`` and ``(D, H, W)``; what lies outside the volume is 0.

    With ``tumour_probability`` the patch holds a labelled voxel: a tissue that is present is drawn first, then one of
    its voxels, then a position of the patch that contains it. Otherwise every position is equally likely.
    """
    spans = [max(n - p, 0) for n, p in zip(label.shape, size, strict=True)]  # largest start along each axis
    starts = [int(rng.integers(0, span + 1)) for span in spans]
    tissues = np.unique(label)
    tissues = tissues[tissues > 0]
    if rng.random() < tumour_probability and tissues.size:
        candidates = np.flatnonzero(label == rng.choice(tissues))
        voxel = np.unravel_index(int(rng.choice(candidates)), label.shape)
        starts = [
            int(rng.integers(max(0, v - p + 1), min(v, span) + 1))
            for v, p, span in zip(voxel, size, spans, strict=True)
        ]
    box = tuple(slice(s, s + p) for s, p in zip(starts, size, strict=True))
    image, label = image[box], label[box]
    pads = [((p - n) // 2, p - n - (p - n) // 2) for p, n in zip(size, label.shape, strict=True)]
    return np.pad(image, [*pads, (0, 0)]), np.pad(label, pads)
