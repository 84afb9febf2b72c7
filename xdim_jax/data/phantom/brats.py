"""Phantoms in the layout of BraTS: a skull-stripped head with a tumour, in four modalities.

The head is an ellipsoidal brain (grey matter, white matter, ventricles) with a lesion that consists of edema, an
enhancing rim and a necrotic centre; every fifth case has no enhancing part. The four modalities show the tissues with
contrasts similar to those of the real sequences, a smooth bias field and noise. All shapes are ellipsoids that are
deformed by smooth random fields, and their sizes are relative to the size of the volume.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import atomic_path
from xdim_jax.data.images.nifti import save_image
from xdim_jax.data.layouts.brats import MODALITIES, get_convention
from xdim_jax.data.phantom.common import Difficulty, claim_folder, scale_contrast, smooth_field
from xdim_jax.data.regions import ED, ET, NCR

_TISSUES = ("grey", "white", "fluid", "edema", "necrosis", "enhancing")
# relative signals of these tissues in each sequence
_CONTRAST = {
    "flair": (0.75, 0.62, 0.25, 1.20, 0.50, 1.00),
    "t1": (0.62, 0.85, 0.30, 0.58, 0.42, 0.62),
    "t1ce": (0.62, 0.85, 0.30, 0.58, 0.38, 1.40),
    "t2": (0.78, 0.60, 1.25, 1.05, 1.12, 0.95),
}
_SIGNAL = 600.0  # stored value for a relative signal of 1
_MIN_SIDE = 32  # smallest number of voxels along an axis, below which parts of the lesion vanish


def brats_case(
    shape: tuple[int, int, int], rng: np.random.Generator, *, enhancing: bool, difficulty: Difficulty
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Generate one head.

    Args:
        shape: Voxels along x, y, z.
        rng: Source of all random numbers.
        enhancing: False for a tumour without enhancing part.
        difficulty: Noise, bias field and contrast.

    Returns:
        Images int16 (x, y, z) by modality, exactly 0 in the background; and tissue indices uint8 (x, y, z).
    """
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)

    def ellipsoid(centre: np.ndarray, radii: np.ndarray, deformation: float) -> np.ndarray:
        """Return the distance from the centre of a deformed ellipsoid, in units of its radii: below 1 inside."""
        r = np.sqrt(sum(((a - c) / s) ** 2 for a, c, s in zip((x, y, z), centre, radii, strict=True)))
        return r * (1 + deformation * smooth_field(shape, rng, cells=6))

    head = ellipsoid(np.zeros(3), np.array([0.72, 0.85, 0.78]), 0.04)
    brain = head < 1
    white = (head < 0.80 + 0.08 * smooth_field(shape, rng, cells=12)) & brain
    side = np.array([0.16, 0.0, 0.05])
    ventricles = np.zeros(shape, bool)
    for sign in (-1, 1):
        ventricles |= ellipsoid(side * [sign, 1, 1], np.array([0.09, 0.32, 0.16]), 0.15) < 1

    # the centre of the lesion is well inside the white matter of one hemisphere
    centre = rng.uniform([0.15, -0.35, -0.25], [0.38, 0.35, 0.30]) * [rng.choice([-1, 1]), 1, 1]
    size = rng.uniform(0.24, 0.40) * rng.uniform(0.85, 1.15, 3)
    edema = (ellipsoid(centre, size, 0.25) < 1) & brain
    core = (ellipsoid(centre, size * rng.uniform(0.55, 0.72), 0.15) < 1) & edema
    necrosis = (ellipsoid(centre, size * rng.uniform(0.38, 0.50), 0.15) < 1) & core
    label = np.zeros(shape, np.uint8)
    label[edema] = ED
    label[core] = ET if enhancing else NCR
    label[necrosis] = NCR

    images = {}
    noises = rng.standard_normal((len(MODALITIES), *shape), np.float32) * difficulty.noise
    for modality, noise in zip(MODALITIES, noises, strict=True):
        signals = scale_contrast(dict(zip(_TISSUES, _CONTRAST[modality], strict=True)), difficulty.contrast)
        signal = np.where(white, signals["white"], signals["grey"]).astype(np.float32)
        signal[ventricles] = signals["fluid"]
        for index, tissue in ((ED, "edema"), (NCR, "necrosis"), (ET, "enhancing")):
            signal[label == index] = signals[tissue]
        signal = gaussian_filter(signal, 0.6) * np.exp(difficulty.bias * smooth_field(shape, rng, cells=3))
        values = np.maximum((signal * rng.uniform(0.8, 1.2) + noise) * _SIGNAL, 1)  # never exactly 0 in the brain
        images[modality] = np.where(brain, np.rint(values), 0).astype(np.int16)
    return images, label


def write_brats(
    root: Path,
    *,
    cases: int,
    convention: str = "brats2021",
    shape: tuple[int, int, int] = (240, 240, 155),
    seed: int = 0,
    first: int = 0,
    difficulty: Difficulty | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write phantoms in the layout of BraTS; existing complete cases are kept.

    The geometry is the same as in the challenge: voxels of 1 mm, affine diag(-1, -1, 1), translation (0, ny - 1, 0).

    Args:
        root: Folder of the cases and of ``phantom.json``, the record of the settings.
        cases: Number of cases.
        convention: Convention of file names and label values, see `xdim_jax.data.layouts.brats`.
        shape: Voxels along x, y, z.
        seed: Seed of all cases.
        first: Number of the first case; case n depends only on n and the settings.
        difficulty: Noise, bias field and contrast; None for the default values.
        progress: Called with a line of text after each case.

    Returns:
        The case folders.

    Raises:
        UserError: The shape is too small, the folder contains phantoms of other settings, or a file cannot be written.
    """
    if len(shape) != 3 or min(shape) < _MIN_SIDE:
        raise UserError(f"phantom shape {tuple(shape)}: expected three numbers (x,y,z) of at least {_MIN_SIDE} voxels")
    difficulty = difficulty or Difficulty()
    generation = get_convention(convention)
    settings = {
        "dataset": "brats",
        "shape": list(shape),
        "seed": seed,
        "convention": convention,
    }
    settings |= dataclasses.asdict(difficulty)
    claim_folder(root, settings)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = shape[1] - 1
    names = dict(zip(MODALITIES, generation.modalities, strict=True))
    folders = []
    for n in range(first, first + cases):
        case = f"BraTS2021_{n:05d}" if generation.separator == "_" else f"BraTS-GLI-{n:05d}-000"
        folder = Path(root) / case
        folders.append(folder)
        if folder.is_dir():
            continue
        rng = np.random.default_rng([seed, n])
        images, label = brats_case(shape, rng, enhancing=n % 5 != 4, difficulty=difficulty)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            parts = {names[m]: image for m, image in images.items()} | {"seg": generation.labels.encode(label)}
            for part, array in parts.items():
                image = nib.Nifti1Image(array, affine)
                image.header.set_xyzt_units("mm")
                save_image(image, temporary / f"{generation.file_name(case, part)}.nii.gz")
        progress(f"phantom {case}: {shape[0]}x{shape[1]}x{shape[2]}, {np.count_nonzero(label)} lesion voxels")
    return folders
