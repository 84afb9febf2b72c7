"""Phantoms in the layout of CHAOS: an abdomen on CT, and on MR as T1 in-phase, T1 out-phase and T2.

Tissues have HU on CT and relative signals on MR. Out-phase images are dark at the borders between water and fat, whose
signals cancel each other. Slices are DICOM files with correct positions. As in the data set, the order of the file
names is from superior to inferior on CT and from inferior to superior on MR, and SliceThickness differs from the slice
spacing. CT masks have one bit per pixel and contain only the liver, although the images also show the other organs.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import atomic_path
from xdim_jax.data.layouts.chaos import MR_LABELS, ORGANS
from xdim_jax.data.phantom.common import Difficulty, claim_folder, scale_contrast, smooth_field

_TISSUES = ("air", "fat", "muscle", "bone", *ORGANS)
_HU: dict[str, float] = dict(zip(_TISSUES, (-1000, -100, 55, 420, 110, 180, 180, 135), strict=True))
_SIGNAL: dict[str, dict[str, float]] = {
    "in": dict(zip(_TISSUES, (0.0, 1.20, 0.50, 0.25, 0.80, 0.55, 0.55, 0.45), strict=True)),
    "out": dict(zip(_TISSUES, (0.0, 1.05, 0.48, 0.22, 0.72, 0.52, 0.52, 0.43), strict=True)),
    "spir": dict(zip(_TISSUES, (0.0, 0.15, 0.25, 0.10, 0.40, 1.00, 1.00, 0.85), strict=True)),
}
_ECHO_TIMES = {"in": 4.6, "out": 2.3, "spir": 70.0}
_MR_UNITS = 900.0  # stored value for a relative signal of 1
_SIZE_MM = (390.0, 330.0, 180.0)  # field of view along x, y, z
_MIN_SHAPE = (64, 64, 16)  # voxels of CT along x, y, z


def abdomen(shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Generate an abdomen.

    Args:
        shape: Slices, rows, columns.
        rng: Source of all random numbers.

    Returns:
        Indices of `_TISSUES`, uint8 (slices, rows, columns). Slices are ordered from inferior to superior, rows from
        anterior to posterior, and columns from the patient's right to left.
    """
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)

    def ellipsoid(
        cx: float, cy: float, cz: float, rx: float, ry: float, rz: float, deformation: float = 0.10
    ) -> np.ndarray:
        """Return the distance from the centre of a deformed ellipsoid, in units of its radii: below 1 inside."""
        cx, cy, cz = (c + rng.normal(0, 0.015) for c in (cx, cy, cz))
        scale = rng.uniform(0.92, 1.08)
        r = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2) / scale
        return r * (1 + deformation * smooth_field(shape, rng, cells=5))

    index = {name: i for i, name in enumerate(_TISSUES)}
    label = np.zeros(shape, np.uint8)
    body = ellipsoid(0, 0, 0, 0.86, 0.80, 9.0, 0.03)
    label[body < 1] = index["fat"]
    label[body < 0.88] = index["muscle"]
    label[body < 0.82] = index["fat"]
    label[ellipsoid(0, 0.10, 0, 0.52, 0.40, 9.0) < 1] = index["muscle"]  # bowel and vessels
    label[ellipsoid(0, 0.50, 0, 0.12, 0.16, 9.0, 0.03) < 1] = index["bone"]
    # the right side of the patient is on the left of the picture
    for name, side in (("right kidney", -1), ("left kidney", 1)):
        lower = -0.35 if side < 0 else -0.25
        kidney = ellipsoid(side * 0.34, 0.36, lower, 0.13, 0.15, 0.50)
        label[kidney < 1] = index[name]
        label[(kidney < 0.35)] = index["fat"]  # renal pelvis
    liver = np.minimum(ellipsoid(-0.34, -0.10, 0.30, 0.42, 0.50, 0.75), ellipsoid(0.02, -0.32, 0.45, 0.38, 0.24, 0.45))
    free = (label != index["right kidney"]) & (label != index["bone"])
    label[(liver < 1) & (body < 0.80) & free] = index["liver"]
    spleen = ellipsoid(0.52, 0.24, 0.35, 0.15, 0.28, 0.42)
    label[(spleen < 1) & (body < 0.80) & (label != index["left kidney"])] = index["spleen"]
    return label


def _paint(tissue: np.ndarray, values: dict[str, float], difficulty: Difficulty) -> np.ndarray:
    organs = scale_contrast({name: v for name, v in values.items() if name != "air"}, difficulty.contrast)
    table = np.array([values["air"], *organs.values()], np.float32)
    return gaussian_filter(table[tissue], (0.3, 0.7, 0.7))


def paint_ct(tissue: np.ndarray, difficulty: Difficulty, rng: np.random.Generator) -> np.ndarray:
    """Return a CT image in HU, int16. The standard deviation of its noise is 300 HU times ``difficulty.noise``."""
    hu = _paint(tissue, _HU, difficulty) + 300 * difficulty.noise * rng.standard_normal(tissue.shape, np.float32)
    return np.clip(np.rint(hu), -1000, 2434).astype(np.int16)


def paint_mr(
    tissue: np.ndarray, sequence: str, difficulty: Difficulty, rng: np.random.Generator, bias: np.ndarray
) -> np.ndarray:
    """Return an MR image with magnitudes of 12 bits, uint16.

    Args:
        tissue: Tissue indices (slices, rows, columns).
        sequence: in, out or spir.
        difficulty: Noise, bias field and contrast.
        rng: Source of random numbers.
        bias: Smooth field of the same shape, which is scaled by ``difficulty.bias``.
    """
    signal = _paint(tissue, _SIGNAL[sequence], difficulty)
    if sequence == "out":  # the signals of water and fat in one voxel cancel each other
        fat = gaussian_filter((tissue == 1) * np.float32(1), (0, 1.0, 1.0))
        water = gaussian_filter((tissue > 1) * np.float32(1), (0, 1.0, 1.0))
        signal = signal * (1 - 2.4 * np.minimum(fat, water))
    signal = np.maximum(signal, 0) * np.exp(difficulty.bias * bias)
    real, imaginary = rng.standard_normal((2, *tissue.shape), np.float32) * difficulty.noise
    return np.clip(np.rint(np.hypot(signal + real, imaginary) * _MR_UNITS), 0, 4095).astype(np.uint16)


def write_chaos(
    root: Path,
    *,
    cases: int,
    shape: tuple[int, int, int] = (512, 512, 80),
    seed: int = 0,
    first: int = 1,
    labels: bool = True,
    difficulty: Difficulty | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write phantoms in the layout of CHAOS; existing complete patients are kept.

    Args:
        root: Folder of the data set and of ``phantom.json``, the record of the settings.
        cases: Number of CT patients, and also of MR patients.
        shape: Columns, rows, slices of CT; MR has half the columns and rows, and three eighths of the slices.
        seed: Seed of all patients.
        first: Number of the first patient; patient n depends only on n and the settings.
        labels: False to write no references (no folder Ground), as in Test_Sets.
        difficulty: Noise, bias field and contrast; None for the default values.
        progress: Called with a line of text after each patient.

    Returns:
        The patient folders.

    Raises:
        UserError: The shape is too small, the folder contains phantoms of other settings, or a file cannot be written.
    """
    if len(shape) != 3 or any(n < m for n, m in zip(shape, _MIN_SHAPE, strict=True)):
        raise UserError(f"phantom shape {tuple(shape)}: expected three numbers (x,y,z) of at least {_MIN_SHAPE} voxels")
    mr_shape = (shape[0] // 2, shape[1] // 2, shape[2] * 3 // 8)
    difficulty = difficulty or Difficulty()
    settings = {"dataset": "chaos", "shape": list(shape)}
    settings |= {"seed": seed, "labels": labels} | dataclasses.asdict(difficulty)
    claim_folder(root, settings)
    folders = []
    for n in range(first, first + cases):
        for modality, size, write in (("CT", shape, _write_ct), ("MR", mr_shape, _write_mr)):
            folder = Path(root) / modality / str(n)
            folders.append(folder)
            if folder.is_dir():
                continue
            rng = np.random.default_rng([seed, n, modality == "MR"])
            tissue = abdomen((size[2], size[1], size[0]), rng)
            with atomic_path(folder) as temporary:
                temporary.mkdir(parents=True)
                write(temporary, tissue, rng, labels, difficulty)
            progress(f"phantom {modality} {n}: {size[0]}x{size[1]}x{size[2]}")
    return folders


def _organs(tissue: np.ndarray) -> np.ndarray:
    """Convert tissue indices to indices of the four organs; other tissues become 0."""
    return np.where(tissue >= len(_TISSUES) - len(ORGANS), tissue - (len(_TISSUES) - len(ORGANS) - 1), 0)


def _write_ct(folder: Path, tissue: np.ndarray, rng: np.random.Generator, labels: bool, difficulty: Difficulty) -> None:
    hu = paint_ct(tissue, difficulty, rng)[::-1]  # file names are ordered from superior to inferior
    liver = (_organs(tissue) == 1)[::-1]
    series = _Series("CT", "CT", tissue.shape, rng, downwards=True)
    for k, plane in enumerate(hu):
        series.save(folder / "DICOM_anon" / f"i{k:04d},0000b.dcm", (plane + 1000).astype(np.uint16), k, intercept=-1000)
        if labels:
            _save_png(folder / "Ground" / f"liver_GT_{k:03d}.png", liver[k])


def _write_mr(folder: Path, tissue: np.ndarray, rng: np.random.Generator, labels: bool, difficulty: Difficulty) -> None:
    bias = smooth_field(tissue.shape, rng, cells=3)
    grey = MR_LABELS.encode(_organs(tissue))
    for sequence, phases in (("T1DUAL", ("in", "out")), ("T2SPIR", ("spir",))):
        for phase in phases:
            series = _Series("MR", phase, tissue.shape, rng, downwards=False, echo_time=_ECHO_TIMES[phase])
            base = folder / sequence / "DICOM_anon"
            base = base / {"in": "InPhase", "out": "OutPhase", "spir": ""}[phase]
            for k, plane in enumerate(paint_mr(tissue, phase, difficulty, rng, bias)):
                number = 2 * k + (2 if phase == "in" else 1) if sequence == "T1DUAL" else k + 1
                name = f"IMG-0004-{number:05d}"
                series.save(base / f"{name}.dcm", plane, k)
                if labels and phase != "out":
                    _save_png(folder / sequence / "Ground" / f"{name}.png", grey[k])


class _Series:
    """Writer of the slices of one series."""

    def __init__(
        self,
        modality: str,
        name: str,
        shape: tuple[int, ...],
        rng: np.random.Generator,
        *,
        downwards: bool,
        echo_time: float | None = None,
    ):
        from pydicom.uid import generate_uid

        slices, rows, columns = shape
        side = round(min(_SIZE_MM[1] / rows, _SIZE_MM[0] / columns), 4)  # pixels are square, as in the data set
        self.spacing = (side, side)
        self.step = round(_SIZE_MM[2] / slices, 3) * (-1 if downwards else 1)
        self.start = 1690.5 if downwards else -60.0
        self.origin = (-self.spacing[1] * columns / 2, -self.spacing[0] * rows / 2)
        self.modality, self.name, self.echo_time = modality, name, echo_time
        entropy = [str(int(v)) for v in rng.integers(0, 2**62, 2)]
        self.study, self.series = (generate_uid(entropy_srcs=[kind, *entropy]) for kind in ("study", "series"))

    def save(self, path: Path, pixels: np.ndarray, k: int, *, intercept: int = 0) -> None:
        """Write slice k, uint16 (rows, columns)."""
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage if self.modality == "CT" else MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[self.series, str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data: Any = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Modality, data.SeriesDescription, data.PatientID = self.modality, self.name, "phantom"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.InstanceNumber = self.study, self.series, k + 1
        data.ImagePositionPatient = [*self.origin, round(self.start + k * self.step, 3)]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing = list(self.spacing)
        data.SliceThickness = round(abs(self.step) * 1.6, 3)  # differs from the slice spacing
        if self.echo_time is not None:
            data.EchoTime = self.echo_time
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        if self.modality == "CT":
            data.RescaleIntercept, data.RescaleSlope = intercept, 1
        data.PixelData = np.ascontiguousarray(pixels).tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(path, enforce_file_format=True)


def _save_png(path: Path, plane: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plane).save(path)
