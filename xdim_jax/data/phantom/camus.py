"""Phantoms in both layouts of CAMUS: the left heart in two ultrasound views, from end-diastole to end-systole.

The left ventricle is half an ellipsoid with the long axis along the beam and the mitral plane as base. Its half-widths
differ between the two views. The axis is bent, which displaces the discs of the ventricle but keeps their areas, so the
volume and the ejection fraction are known exactly. The cfg files contain these exact values, not estimates from the
masks. Myocardium surrounds the ventricle, and the atrium is below it. Speckle is the magnitude of smoothed complex
noise, which becomes coarser with depth. The image shows the logarithm of the echo amplitude.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import atomic_path
from xdim_jax.data.images.nifti import save_image
from xdim_jax.data.layouts.camus import VIEWS
from xdim_jax.data.phantom.common import Difficulty, claim_folder, scale_contrast, smooth_field

_WIDTH_MM, _HEIGHT_MM = 170.0, 120.0  # size of the picture, for any number of pixels
_PROBE = (0.0, -4.0)  # lateral position and depth in mm of the point where the beams meet
_HALF_ANGLE = math.radians(43)
_MIN_SIDE = 64  # smallest number of pixels along a side
# echo amplitudes, whose logarithm the picture shows
_ECHO = {"blood": 0.08, "myocardium": 0.35, "tissue": 0.90, "valve": 1.2}
LAYOUTS = ("nifti", "metaimage")


@dataclasses.dataclass(frozen=True)
class Heart:
    """A left heart. In its methods, phase 0 is end-diastole and phase 1 is end-systole.

    Attributes:
        length: Length of the ventricle in mm at end-diastole.
        radius: Half-width of the base in mm at end-diastole, by view.
        tilt: Angle in radians between long axis and beam, by view.
        bend: Displacement in mm of the middle of the long axis, by view.
        apex: Depth of the apex in mm.
        ejection: Ejection fraction, 0 to 1.
        wall: Thickness of the myocardium in mm at end-diastole.
        atrium: Relative size of the atrium.
    """

    length: float
    radius: dict[str, float]
    tilt: dict[str, float]
    bend: dict[str, float]
    apex: float
    ejection: float
    wall: float
    atrium: float

    def scale(self, phase: float) -> tuple[float, float]:
        """Return the factors of length and radius; the factor of the volume is then ``length * radius^2``."""
        volume = 1 - self.ejection * phase
        length = 1 - 0.3 * self.ejection * phase
        return length, math.sqrt(volume / length)

    def volume(self, phase: float) -> float:
        """Return the volume in ml: two thirds of the base area times the length, ``2/3 pi r_2CH r_4CH l``."""
        length, radius = self.scale(phase)
        area = math.pi * self.radius["2CH"] * self.radius["4CH"] * radius**2
        return 2 / 3 * area * self.length * length / 1000


def draw_heart(rng: np.random.Generator) -> Heart:
    """Return a heart with random sizes in the range of adults."""
    return Heart(
        length=rng.uniform(68, 80),
        radius={view: rng.uniform(20, 26) for view in VIEWS},
        tilt={view: rng.uniform(-0.14, 0.14) for view in VIEWS},
        bend={view: rng.uniform(-7, 7) for view in VIEWS},
        apex=rng.uniform(14, 18),
        ejection=rng.uniform(0.30, 0.68),
        wall=rng.uniform(7, 9),
        atrium=rng.uniform(0.8, 1.15),
    )


def _grid(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Return lateral position and depth in mm of every pixel (H, W), and the pixel size in mm (depth, lateral)."""
    spacing = (_HEIGHT_MM / shape[0], _WIDTH_MM / shape[1])
    depth = (np.arange(shape[0]) + 0.5) * spacing[0]
    lateral = (np.arange(shape[1]) + 0.5) * spacing[1] - _WIDTH_MM / 2
    x, y = np.meshgrid(lateral, depth)
    return x.astype(np.float32), y.astype(np.float32), spacing


def draw_mask(heart: Heart, view: str, phase: float, shape: tuple[int, int]) -> np.ndarray:
    """Return the label map of a view, uint8 (H, W): 1 cavity, 2 myocardium, 3 atrium.

    Args:
        heart: Heart.
        view: One of `VIEWS`.
        phase: 0 for end-diastole, 1 for end-systole.
        shape: Pixels (H, W).
    """
    x, y, _ = _grid(shape)
    length, radius = (s * v for s, v in zip(heart.scale(phase), (heart.length, heart.radius[view]), strict=True))
    base = heart.apex + heart.length * (1 - 0.25 * (1 - heart.scale(phase)[0]))  # the base moves towards the apex
    tilt = heart.tilt[view]
    # position along the long axis (0 at the base, `length` at the apex) and across it
    u, v = x - math.sin(tilt) * 20, y - base
    along, across = -v * math.cos(tilt) + u * math.sin(tilt), u * math.cos(tilt) + v * math.sin(tilt)
    across = across + heart.bend[view] * (2 * along / length - 1) ** 2  # displaces discs, keeps their areas
    wall = heart.wall * (1 + 0.45 * phase * heart.ejection)
    inside = (along / length) ** 2 + (across / radius) ** 2 < 1
    outside = (along / (length + wall)) ** 2 + (across / (radius + wall)) ** 2 < 1
    size = heart.atrium * (0.9 + 0.2 * phase)
    across_atrium = u * math.cos(tilt) + v * math.sin(tilt) + heart.bend[view]
    atrium = ((along + 15 * size) / (18 * size)) ** 2 + (across_atrium / (24 * size)) ** 2 < 1
    label = np.zeros(shape, np.uint8)
    label[atrium & (along < 0)] = 3
    label[outside & (along >= -3)] = 2
    label[atrium & (along < 0) & (np.abs(across) < radius)] = 3
    label[(along < 0) & (along >= -3) & (np.abs(across) < radius) & (label == 2)] = 0
    label[inside & (along >= 0)] = 1
    return np.where(_sector(x, y), label, np.uint8(0))


def _sector(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the mask of the pixels that the ultrasound beams reach."""
    u, v = x - _PROBE[0], y - _PROBE[1]
    return (np.abs(np.arctan2(u, v)) < _HALF_ANGLE) & (np.hypot(u, v) < _HEIGHT_MM - _PROBE[1])


def _speckle(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return fully developed speckle with a mean of 1. Its grains become wider with depth, because beams diverge."""
    u, v = x - _PROBE[0], y - _PROBE[1]
    distance, angle = np.hypot(u, v), np.arctan2(u, v)
    shape = (400, 160)  # depths, beams
    noise = rng.standard_normal((2, *shape), np.float32)
    field = np.stack([gaussian_filter(n, (1.2, 1.4)) for n in noise])
    at = np.stack([distance / (_HEIGHT_MM + 10) * shape[0], (angle / _HALF_ANGLE + 1) / 2 * shape[1]])
    amplitude = np.hypot(*(map_coordinates(f, at, order=1, mode="nearest") for f in field))
    return amplitude / amplitude.mean()


def draw_frame(label: np.ndarray, rng: np.random.Generator, difficulty: Difficulty) -> np.ndarray:
    """Return an ultrasound image, uint8 (H, W), of a label map. It is 0 outside the sector and at least 1 inside."""
    x, y, _ = _grid((label.shape[0], label.shape[1]))
    echo = scale_contrast(_ECHO, difficulty.contrast)
    medium = np.full(label.shape, echo["tissue"], np.float32)
    for value, tissue in ((1, "blood"), (2, "myocardium"), (3, "blood")):
        medium[label == value] = echo[tissue]
    pixel = max(label.shape) / 550
    base = (gaussian_filter((label == 1) * 1.0, 3 * pixel) * gaussian_filter((label == 3) * 1.0, 3 * pixel)) * 8
    medium = gaussian_filter(medium, 1.2 * pixel) + np.minimum(base, 1) * echo["valve"]
    gain = np.exp(4 * difficulty.bias * smooth_field(label.shape, rng, cells=3)) * np.exp(-((y - 80) ** 2) / 2 / 70**2)
    amplitude = medium * gain * (0.25 + 0.75 * _speckle(x, y, rng))
    amplitude *= np.exp(difficulty.noise * rng.standard_normal(label.shape, np.float32))
    grey = 255 * np.clip(np.log(np.maximum(amplitude, 1e-4) / 0.03) / np.log(2.4 / 0.03), 0, 1)
    return np.where(_sector(x, y), np.maximum(np.rint(grey), 1), 0).astype(np.uint8)


def write_camus(
    root: Path,
    *,
    cases: int,
    shape: tuple[int, int] = (549, 389),
    layout: str = "nifti",
    seed: int = 0,
    first: int = 1,
    frames: int = 12,
    difficulty: Difficulty | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write phantoms in a layout of CAMUS; existing complete patients are kept.

    Every patient has ED, ES and a half sequence of both views, and the reference of each. Every seventh patient has
    reversed sequences, which begin with ES. Split files list four fifths of the patients for training, one tenth for
    validation and one tenth for testing.

    Args:
        root: Folder of the data set and of ``phantom.json``, the record of the settings.
        cases: Number of patients.
        shape: Pixels along x (lateral) and y (depth); the picture is 170 mm wide and 120 mm deep.
        layout: ``nifti`` as in the public release, or ``metaimage`` as in the older one.
        seed: Seed of all patients.
        first: Number of the first patient; patient n depends only on n and the settings.
        frames: Number of frames in a half sequence.
        difficulty: Noise, bias field and contrast; None for the default values.
        progress: Called with a line of text after each patient.

    Returns:
        The patient folders.

    Raises:
        UserError: The layout is unknown, the shape is too small, the folder contains phantoms of other settings, or a
            file cannot be written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"phantom layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if len(shape) != 2 or min(shape) < _MIN_SIDE:
        raise UserError(f"phantom shape {tuple(shape)}: expected two numbers (x,y) of at least {_MIN_SIDE} pixels")
    if frames < 2:
        raise UserError(f"{frames} frames: expected at least two, ED and ES")
    difficulty = difficulty or Difficulty()
    settings = {"dataset": "camus", "shape": list(shape), "seed": seed}
    settings |= {"layout": layout, "frames": frames} | dataclasses.asdict(difficulty)
    claim_folder(root, settings)
    names = [f"patient{n:04d}" for n in range(first, first + cases)]
    nifti = layout == "nifti"
    parent = Path(root) / ("database_nifti" if nifti else "training")
    for n, name in enumerate(names, first):
        folder = parent / name
        if folder.is_dir():
            continue
        rng = np.random.default_rng([seed, n])
        heart = draw_heart(rng)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for view in VIEWS:
                _write_view(temporary, name, view, heart, rng, (shape[1], shape[0]), nifti, frames, n, difficulty)
        progress(f"phantom {name}: EF {100 * heart.ejection:.0f} %, EDV {heart.volume(0):.0f} ml")
    _write_splits(Path(root), names, nifti)
    return [parent / name for name in names]


def _write_view(
    folder: Path,
    name: str,
    view: str,
    heart: Heart,
    rng: np.random.Generator,
    shape: tuple[int, int],
    nifti: bool,
    frames: int,
    number: int,
    difficulty: Difficulty,
) -> None:
    spacing = _grid(shape)[2]
    phases = [(1 - math.cos(math.pi * i / (frames - 1))) / 2 for i in range(frames)]
    masks = [draw_mask(heart, view, phase, shape) for phase in phases]
    images = [draw_frame(mask, rng, difficulty) for mask in masks]
    is_reversed = number % 7 == 0
    order = slice(None, None, -1 if is_reversed else 1)
    parts = {
        "ED": (images[0], masks[0]),
        "ES": (images[-1], masks[-1]),
        "half_sequence": (np.stack(images[order]), np.stack(masks[order])),
    }
    for part, (image, mask) in parts.items():
        for ending, array in (("", image), ("_gt", mask)):
            path = folder / f"{name}_{view}_{part}{ending}"
            (_save_nifti if nifti else _save_metaimage)(path, array, spacing)
    ed, es = (frames, 1) if is_reversed else (1, frames)
    quality = ("Good", "Good", "Medium", "Poor")[number % 4]
    info = {"ED": ed, "ES": es, "NbFrame": frames, "Sex": "FM"[number % 2], "Age": 40 + number % 40}
    info |= {"ImageQuality": quality, "FrameRate": 50}
    if nifti:
        info |= {"EF": round(100 * heart.ejection, 1)}
    else:
        edv, esv = heart.volume(0), heart.volume(1)
        info |= {"LVedv": round(edv, 1), "LVesv": round(esv, 1), "LVef": round(100 * heart.ejection, 1)}
    text = "".join(f"{key}: {value}\n" for key, value in info.items())
    (folder / f"Info_{view}.cfg").write_text(text, encoding="utf-8")


def _save_nifti(path: Path, array: np.ndarray, spacing: tuple[float, float]) -> None:
    affine = np.diag([-spacing[1], -spacing[0], 1.0, 1.0])  # as in the release
    image = nib.Nifti1Image(array.T if array.ndim == 2 else array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.header.set_zooms((spacing[1], spacing[0], *([1.0] * (array.ndim - 2))))
    save_image(image, path.with_name(f"{path.name}.nii.gz"))


def _save_metaimage(path: Path, array: np.ndarray, spacing: tuple[float, float]) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array if array.ndim == 3 else array[None])
    image.SetSpacing((spacing[1], spacing[0], 1.0))
    sitk.WriteImage(image, str(path.with_name(f"{path.name}.mhd")))


def _write_splits(root: Path, names: list[str], nifti: bool) -> None:
    tenth = max(len(names) // 10, min(len(names) // 3, 1))  # 0 for one or two patients, who are all in training
    last = len(names) - tenth
    subsets = {"training": names[: last - tenth], "validation": names[last - tenth : last], "testing": names[last:]}
    if not nifti:  # the older release has ten folds with different test patients
        for fold in range(10):
            order = names[fold * tenth :] + names[: fold * tenth]
            parts = {
                "training": order[2 * tenth :],
                "validation": order[tenth : 2 * tenth],
                "testing": order[:tenth],
            }
            _write_lists(root / "listSubGroups", f"subGroup{fold + 1}_", parts)
        return
    _write_lists(root / "database_split", "subgroup_", subsets)


def _write_lists(folder: Path, stem: str, subsets: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for subset, names in subsets.items():
        with atomic_path(folder / f"{stem}{subset}.txt") as path:
            path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
