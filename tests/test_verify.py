"""``verify`` finds every fault that is seeded into clean data, names what is damaged, and blames nothing else.

What is expected of a fault follows from the fault: an error keeps a case from being used, a warning is for a person to
look at.
"""

import dataclasses
import gzip
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import ERROR, KINDS, WARNING, DataError, Problem
from xdim_jax.data import phantom
from xdim_jax.data.__main__ import command, main
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.verify import verify

# -- clean data ---------------------------------------------------------------------------------------------------

TWO_CHANNELS = {"0": "T1", "1": "T2"}
TASK_NAMES = [f"organ_{i:03d}" for i in (1, 2, 4, 7)]  # numbers need not follow one another


def _images(seed: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright organ and a spot in it, and their labels."""
    rng = np.random.default_rng(seed)
    label = np.zeros((20, 18, 16), np.uint8)
    label[5:15, 5:13, 4:12] = 1
    label[8:11, 8:11, 6 : 8 + seed % 3] = 2
    return (rng.normal(100, 10, (*label.shape, channels)) + 50 * label[..., None]).astype(np.int16), label


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), path)


def write_nnunet(root: Path) -> None:
    """Four cases of two channels as nnU-Net's version 2 wants them, with its list of folds."""
    for seed, name in enumerate(TASK_NAMES):
        image, label = _images(seed, 2)
        for channel in range(2):
            _save(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image[..., channel])
        _save(root / "labelsTr" / f"{name}.nii.gz", label)
    card = {"channel_names": TWO_CHANNELS, "labels": {"background": 0, "organ": 1, "spot": 2}}
    card |= {"numTraining": len(TASK_NAMES), "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(card))
    folds = [{"train": TASK_NAMES[:2], "val": TASK_NAMES[2:]}, {"train": TASK_NAMES[2:], "val": TASK_NAMES[:2]}]
    (root / "splits_final.json").write_text(json.dumps(folds))


def write_decathlon(root: Path) -> None:
    """Four training cases and a test case of two channels along the fourth axis."""
    for seed, name in enumerate(TASK_NAMES):
        image, label = _images(seed, 2)
        _save(root / "imagesTr" / f"{name}.nii.gz", image)
        _save(root / "labelsTr" / f"{name}.nii.gz", label)
    _save(root / "imagesTs" / "organ_009.nii.gz", _images(9, 2)[0])
    card = {"name": "Organ", "tensorImageSize": "4D", "modality": TWO_CHANNELS}
    card |= {"labels": {"0": "background", "1": "organ", "2": "spot"}, "numTraining": 4, "numTest": 1}
    card["training"] = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in TASK_NAMES]
    card["test"] = ["./imagesTs/organ_009.nii.gz"]
    (root / "dataset.json").write_text(json.dumps(card))


BRATS, CAMUS, CHAOS = {"cases": 3, "shape": (48, 48, 40)}, {"shape": (96, 72), "frames": 4}, {"shape": (64, 64, 16)}
CLEAN: dict[str, Callable[[Path], Any]] = {
    "brats2021": lambda root: phantom.write_brats(root, convention="brats2021", **BRATS),
    "brats2023": lambda root: phantom.write_brats(root, convention="brats2023", **BRATS),
    "camus": lambda root: phantom.write_camus(root, cases=3, layout="nifti", **CAMUS),
    "metaimage": lambda root: phantom.write_camus(root, cases=3, layout="metaimage", **CAMUS),
    "camus10": lambda root: phantom.write_camus(root, cases=10, layout="nifti", **CAMUS),
    "chaos": lambda root: phantom.write_chaos(root, cases=2, **CHAOS),
    "nnunet": write_nnunet,
    "decathlon": write_decathlon,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "brats2021": {"dataset": "brats", "convention": "brats2021"},
    "brats2023": {"dataset": "brats", "convention": "brats2023"},
    "camus": {"dataset": "camus"},
    "metaimage": {"dataset": "camus"},
    "camus10": {"dataset": "camus"},
    "chaos": {"dataset": "chaos", "task": 4},
    "nnunet": {"dataset": "nnunet"},
    "decathlon": {"dataset": "decathlon"},
}
WITH_FRAMES = {"instants": ("ED", "ES", "half_sequence")}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The clean data set of a name, written when it is first asked for. Read only."""
    base, written = tmp_path_factory.mktemp("clean"), set()

    def get(name: str) -> Path:
        if name not in written:
            CLEAN[name](base / name)
            written.add(name)
        return base / name

    return get


@pytest.fixture
def copy(clean: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a clean data set, to be damaged."""
    return lambda name: Path(shutil.copytree(clean(name), tmp_path / name))


def find(name: str, root: Path, need_labels: bool = True, **options: Any) -> list[Problem]:
    """What `verify` says of a data set, none of which may lack words."""
    findings = verify(get_dataset({**OPTIONS[name], "root": str(root), **options}), root, need_labels=need_labels)
    for p in findings.problems:
        assert p.kind in KINDS and p.severity in (ERROR, WARNING)
        assert str(p.path) and p.found and p.expected and p.suggestion, p
    return findings.problems


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("brats2021", {}),
        ("brats2023", {}),
        ("brats2023", {"convention": "brats2024"}),  # the same names, and one label more
        ("camus", {}),
        ("camus", WITH_FRAMES),
        ("metaimage", {}),
        ("metaimage", WITH_FRAMES),
        ("camus10", {}),
        *[("chaos", {"task": task, "phase": phase}) for task in (1, 2, 3, 4, 5) for phase in ("in", "out", "each")],
        ("chaos", {"task": 5, "phase": "both"}),
        ("nnunet", {}),
        ("decathlon", {}),
    ],
    ids=str,
)
def test_clean_data_have_no_problem(clean, name, options):
    """A checker that cries wolf is switched off."""
    assert find(name, clean(name), **options) == []


# -- tools to damage files ----------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray] | None = None, affine: Any = None) -> None:
    """Rewrites a NIfTI file with another array, another affine, or both; ``affine`` may be a function."""
    image: Any = nib.load(path)
    array, place = np.asarray(image.dataobj).copy(), image.affine
    array = change(array) if change else array
    place = affine(place.copy()) if callable(affine) else place
    nib.save(nib.Nifti1Image(array, place), path)


def put(value: Any, where: Any = ..., dtype: Any = None) -> Callable[[np.ndarray], np.ndarray]:
    """A change that writes ``value`` at an index, or where a function of the array says so."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype or array.dtype)
        array[where(array) if callable(where) else where] = value
        return array

    return change


def shift(x: float) -> Callable[[np.ndarray], np.ndarray]:
    """Moves an affine along the first axis by ``x`` voxels."""

    def move(affine: np.ndarray) -> np.ndarray:
        affine[:3, 3] += x * affine[:3, 0]
        return affine

    return move


def scale(*factors: float) -> Callable[[np.ndarray], np.ndarray]:
    """Stretches the voxels of an affine."""
    return lambda affine: affine @ np.diag([*factors, 1.0])


PIXDIM, QFORM_CODE = 76, 252  # where they lie in a NIfTI header


def patch(path: Path, offset: int, layout: str, *values: float) -> None:
    """Overwrites bytes of a NIfTI header."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{layout}", data, offset, *values)
    path.write_bytes(gzip.compress(bytes(data), 1))


def cut(path: Path, share: float = 0.6) -> None:
    """Truncates a file, as a broken download does."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip_checksum(path: Path) -> None:
    """One bit of gzip's CRC-32, which lies eight bytes before the end."""
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(bytes(data))


def reword(path: Path, old: str, new: str) -> None:
    """Replaces words in a text file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def append(path: Path, line: str) -> None:
    """Adds a line to a text file."""
    path.write_text(path.read_text() + line + "\n")


def tags(path: Path, **values: Any) -> None:
    """Sets tags of a DICOM file; None deletes one."""
    data = pydicom.dcmread(path)
    for tag, value in values.items():
        if value is None:
            delattr(data, tag)
        else:
            setattr(data, tag, value)
    data.save_as(path)


def pixels(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the stored values of a DICOM file."""
    data = pydicom.dcmread(path)
    array = np.ascontiguousarray(change(data.pixel_array.copy()))
    data.PixelData, (data.Rows, data.Columns) = array.tobytes(), array.shape
    data.save_as(path)


def paint(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the values of a PNG file."""
    with Image.open(path) as image:
        array = np.array(image)
    Image.fromarray(change(array)).save(path)


def listing(folder: Path) -> list[Path]:
    """The files of a folder in the order of their names, which CHAOS pads with zeros."""
    return sorted(folder.iterdir())


def permute(files: list[Path], order: list[int]) -> None:
    """Gives the k-th name the contents of file ``order[k]``."""
    contents = [p.read_bytes() for p in files]
    for path, k in zip(files, order, strict=True):
        path.write_bytes(contents[k])


def brats(root: Path, case: int, part: str) -> Path:
    return root / f"BraTS2021_{case:05d}" / f"BraTS2021_{case:05d}_{part}.nii.gz"


def gli(root: Path, case: int, part: str) -> Path:
    return root / f"BraTS-GLI-{case:05d}-000" / f"BraTS-GLI-{case:05d}-000-{part}.nii.gz"


def echo(root: Path, patient: int, part: str) -> Path:
    return root / "database_nifti" / f"patient{patient:04d}" / f"patient{patient:04d}_{part}.nii.gz"


def old_echo(root: Path, patient: int, part: str) -> Path:
    return root / "training" / f"patient{patient:04d}" / f"patient{patient:04d}_{part}"


def info(root: Path, patient: int, view: str) -> Path:
    return root / "database_nifti" / f"patient{patient:04d}" / f"Info_{view}.cfg"


CT, CT_GROUND = "CT/1/DICOM_anon", "CT/1/Ground"
IN, OUT = "MR/1/T1DUAL/DICOM_anon/InPhase", "MR/1/T1DUAL/DICOM_anon/OutPhase"
T2, T2_GROUND = "MR/2/T2SPIR/DICOM_anon", "MR/2/T2SPIR/Ground"


# -- damages that need more than a line ---------------------------------------------------------------------------


def as_other_convention(root: Path) -> None:
    """Case 1 takes the names of 2023."""
    folder = root / "BraTS-GLI-00009-000"
    folder.mkdir()
    for old, new in {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}.items():
        brats(root, 1, old).rename(folder / f"{folder.name}-{new}.nii.gz")
    (root / "BraTS2021_00001").rmdir()


def twin_brats(root: Path) -> None:
    for part in ("flair", "t1", "t1ce", "t2"):
        shutil.copy(brats(root, 0, part), brats(root, 2, part))


def same_time_point_again(root: Path) -> None:
    """A second examination of patient 1 that is the first one."""
    folder = Path(shutil.copytree(root / "BraTS-GLI-00001-000", root / "BraTS-GLI-00001-001"))
    for path in listing(folder):
        path.rename(folder / path.name.replace("00001-000", "00001-001"))


def into_metres(root: Path) -> None:
    for path in listing(root / "BraTS2021_00001"):
        edit(path, affine=scale(1000, 1000, 1000))


def in_subfolder_again(root: Path) -> None:
    shutil.copytree(root / "BraTS2021_00001", root / "HGG" / "BraTS2021_00001")


def without_scale(path: Path) -> None:
    """Voxel sizes of zero, and no form that could tell them."""
    patch(path, PIXDIM + 4, "3f", 0, 0, 0)
    patch(path, QFORM_CODE, "2h", 0, 0)


def case_without_scale(root: Path) -> None:
    """All files of a case, so that none of them differs from the others."""
    for path in listing(root / "BraTS2021_00001"):
        without_scale(path)


def gap(root: Path) -> None:
    """A slice and its mask are gone, so the numbers still agree."""
    listing(root / CT)[7].unlink()
    listing(root / CT_GROUND)[7].unlink()


def same_place(root: Path) -> None:
    files = listing(root / CT)
    tags(files[8], ImagePositionPatient=pydicom.dcmread(files[7]).ImagePositionPatient)


def same_pixels(root: Path) -> None:
    files = listing(root / CT)
    first = pydicom.dcmread(files[7]).pixel_array
    pixels(files[8], lambda _: first)


def no_intercept(root: Path) -> None:
    for path in listing(root / CT):
        tags(path, RescaleIntercept=None, RescaleSlope=None)


def smaller_out_phase(root: Path) -> None:
    for path in listing(root / OUT):
        pixels(path, lambda a: a[:-4])


def turned_slice(root: Path) -> None:
    tags(listing(root / IN)[2], ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


def wrong_greys(root: Path) -> None:
    """Masks drawn with 1, 2, 3, 4, as other programs write them."""
    for path in listing(root / T2_GROUND):
        paint(path, lambda a: (a // 63).astype(np.uint8))


def swap_split(path: Path, old: list[str], new: list[str]) -> None:
    folds = json.loads(path.read_text())
    folds[0]["train"] = new
    assert old != new
    path.write_text(json.dumps(folds))


def list_absent(root: Path) -> None:
    card = json.loads((root / "dataset.json").read_text())
    card["training"].append({"image": "./imagesTr/organ_099.nii.gz", "label": "./labelsTr/organ_099.nii.gz"})
    card["numTraining"] = 5
    (root / "dataset.json").write_text(json.dumps(card))


# -- the faults ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """A damage and the finding it must lead to.

    ``names``: file or folder that path or text must name. ``case``: what the ids of all blamed cases hold; "" where a
    fault is of no case. ``also``: kinds that the same damage may bring in the same case. ``says``: words of ``found``.
    ``times``: how often it may be said, where a damage is of several files or leaves several images out.
    """

    data: str
    damage: Callable[[Path], Any]
    kind: str
    severity: str
    names: str
    case: str
    also: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    times: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


B0, B1, B2 = "BraTS2021_00000", "BraTS2021_00001", "BraTS2021_00002"
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def of_brats(part: str, damage: Callable[[Path], Any], kind: str, severity: str, **more: Any) -> Fault:
    """A fault in one file of case 1, which must be named."""
    return Fault("brats2021", lambda r: damage(brats(r, 1, part)), kind, severity, f"{B1}_{part}.nii.gz", B1, **more)


BRATS_FAULTS = {
    "missing modality": of_brats("t1ce", lambda p: p.unlink(), "missing_image", ERROR),
    "missing modality of 2023": Fault(
        "brats2023",
        lambda r: gli(r, 1, "t2f").unlink(),
        "missing_image",
        ERROR,
        "BraTS-GLI-00001-000-t2f.nii.gz",
        "BraTS-GLI-00001-000",
    ),
    "missing label": of_brats("seg", lambda p: p.unlink(), "missing_label", ERROR),
    "extra modality file": Fault(
        "brats2021",
        lambda r: shutil.copy(brats(r, 1, "t1"), brats(r, 1, "dwi")),
        "extra_file",
        WARNING,
        f"{B1}_dwi.nii.gz",
        B1,
    ),
    "truncated": of_brats("t2", cut, "unreadable", ERROR),
    "empty file": of_brats("t2", lambda p: cut(p, 0), "unreadable", ERROR),
    "truncated label": of_brats("seg", cut, "unreadable", ERROR),
    "not a NIfTI": of_brats("t1", lambda p: p.write_text("<html>404 Not Found</html>"), "unreadable", ERROR),
    "gzip that holds no NIfTI": of_brats(
        "t1", lambda p: p.write_bytes(gzip.compress(b"no image " * 100)), "unreadable", ERROR
    ),
    "flipped bit in the checksum": of_brats("t1", flip_checksum, "unreadable", ERROR),
    "shape": of_brats("t1", lambda p: edit(p, lambda a: a[:-1]), "shape", ERROR, says=("47", "48")),
    "shape of the label": of_brats("seg", lambda p: edit(p, lambda a: a[:, :, 1:]), "shape", ERROR),
    "shift by 1.5 voxels": of_brats("t1", lambda p: edit(p, affine=shift(1.5)), "affine", ERROR, says=("1.5",)),
    "label shifted by 1.5 voxels": of_brats(
        "seg", lambda p: edit(p, affine=shift(1.5)), "affine", ERROR, says=("1.5",)
    ),
    "flipped orientation": of_brats(
        "t2", lambda p: edit(p, affine=lambda m: np.diag([1.0, 1.0, 1.0, 1.0])), "affine", ERROR
    ),
    "spacing of one modality": of_brats(
        "t2", lambda p: edit(p, affine=scale(1, 1, 1.2)), "spacing", ERROR, says=("1.2",)
    ),
    "NaN": of_brats(
        "flair", lambda p: edit(p, put(np.nan, (24, 24, slice(20, 23)), np.float32)), "not_finite", ERROR, says=("3",)
    ),
    "infinity": of_brats("t1", lambda p: edit(p, put(np.inf, (24, 24, 20), np.float32)), "not_finite", ERROR),
    "label 3 in brats2021": of_brats(
        "seg", lambda p: edit(p, put(3, lambda a: a == 4)), "label_value", ERROR, says=("3",)
    ),
    "label 4 in brats2023": Fault(
        "brats2023",
        lambda r: edit(gli(r, 1, "seg"), put(4, lambda a: a == 3)),
        "label_value",
        ERROR,
        "BraTS-GLI-00001-000-seg.nii.gz",
        "BraTS-GLI-00001-000",
        says=("4",),
    ),
    "labels 0 and 255": of_brats(
        "seg", lambda p: edit(p, put(255, lambda a: a > 0)), "label_scale", ERROR, says=("255",)
    ),
    "fractions as labels": of_brats(
        "seg", lambda p: edit(p, put(0.5, lambda a: a == 1, np.float32)), "dtype", ERROR, says=("0.5",)
    ),
    "NaN as label": of_brats("seg", lambda p: edit(p, put(np.nan, lambda a: a == 1, np.float32)), "dtype", ERROR),
    "empty label map": of_brats("seg", lambda p: edit(p, put(0)), "empty_label", WARNING),
    "constant image": of_brats("t1", lambda p: edit(p, put(0)), "constant", ERROR),
    "constant slice inside": of_brats(
        "t1", lambda p: edit(p, put(0, np.s_[:, :, 20])), "empty_slice", WARNING, says=("20",)
    ),
    "identical slices": of_brats(
        "t1",
        lambda p: edit(p, lambda a: a[:, :, [*range(21), 20, *range(22, 40)]]),
        "duplicate_slice",
        WARNING,
        says=("21",),
    ),
    "one image in two patients": Fault("brats2021", twin_brats, "duplicate_content", ERROR, B2, B2, says=(B0,)),
    "one modality in two patients": Fault(
        "brats2021",
        lambda r: shutil.copy(brats(r, 0, "t2"), brats(r, 2, "t2")),
        "duplicate_content",
        ERROR,
        f"{B2}_t2.nii.gz",
        B2,
        says=(B0,),
    ),
    "one image at two time points": Fault(  # no leak between patients
        "brats2023", same_time_point_again, "duplicate_content", WARNING, "BraTS-GLI-00001-001", "BraTS-GLI-00001-00"
    ),
    "not skull-stripped": of_brats("t1", lambda p: edit(p, lambda a: a + 100), "intensity_range", WARNING),
    "part of the brain": of_brats("flair", lambda p: edit(p, put(0, np.s_[..., 20:])), "coverage", WARNING),
    "standardised intensities": of_brats(
        "t1",
        lambda p: edit(p, lambda a: np.where(a > 0, (a - a[a > 0].mean()) / a.std(), 0).astype("f4")),
        "intensity_range",
        WARNING,
    ),
    "voxel size of zero": of_brats("t1", without_scale, "no_geometry", ERROR),
    "voxel size of zero in the label": of_brats("seg", without_scale, "no_geometry", ERROR),
    "voxel size of zero in all files of a case": Fault(
        "brats2021", case_without_scale, "no_geometry", ERROR, B1, B1, times=5
    ),
    "singular sform": of_brats(
        "t1", lambda p: patch(p, 280, "4f", 0, 0, 0, 0), "no_geometry", ERROR, also=("spacing",)
    ),
    "pixdim against sform": of_brats(
        "t1", lambda p: patch(p, PIXDIM + 4, "3f", 2, 2, 2), "spacing", WARNING, says=("2", "1")
    ),
    "metres as millimetres": Fault("brats2021", into_metres, "implausible_spacing", WARNING, B1, B1, says=("1000",)),
    "4D modality": of_brats(
        "t1", lambda p: edit(p, lambda a: np.stack([a, a + 1], -1)), "shape", ERROR, says=("48", "40", "2")
    ),
    "2D modality": of_brats("t1", lambda p: edit(p, lambda a: a[:, :, 20]), "shape", ERROR),
    "complex voxels": of_brats(
        "t1", lambda p: edit(p, lambda a: a.astype(np.complex64)), "dtype", ERROR, says=("complex",)
    ),
    "complex label": of_brats("seg", lambda p: edit(p, lambda a: a.astype(np.complex64)), "dtype", ERROR),
    "colours": of_brats("t1", lambda p: edit(p, lambda a: np.zeros(a.shape, RGB)), "dtype", ERROR),
    "case in two folders": Fault("brats2021", in_subfolder_again, "duplicate_case", ERROR, f"HGG/{B1}", B1),
    "names of another convention": Fault(
        "brats2021",
        as_other_convention,
        "wrong_convention",
        ERROR,
        "BraTS-GLI-00009-000",
        "BraTS-GLI-00009-000",
        says=("brats2023",),
    ),
    "empty case folder": Fault(
        "brats2021", lambda r: [p.unlink() for p in listing(r / B1)], "extra_file", ERROR, B1, B1
    ),
}

P1, P2, P3 = "patient0001", "patient0002", "patient0003"


def of_echo(part: str, damage: Callable[[Path], Any], kind: str, severity: str, **more: Any) -> Fault:
    """A fault in one file of patient 2, which must be named, and no other image of the patient be blamed."""
    name = f"{P2}_{part}"
    case = name.removesuffix("_gt")
    return Fault("camus", lambda r: damage(echo(r, 2, part)), kind, severity, f"{name}.nii.gz", case, **more)


ATRIUM = Fault(
    "camus10",
    lambda r: edit(echo(r, 4, "2CH_ED_gt"), put(0, lambda a: a == 3)),
    "missing_structure",
    WARNING,
    "patient0004_2CH_ED_gt.nii.gz",
    "patient0004_2CH_ED",
)

CAMUS_FAULTS = {
    "missing view": Fault(
        "camus",
        lambda r: [p.unlink() for p in listing(r / "database_nifti" / P2) if "4CH" in p.name],
        "missing_view",
        WARNING,
        P2,
        P2,
        says=("4CH",),
        times=2,  # ED and ES
    ),
    "missing instant": Fault(
        "camus",
        lambda r: [echo(r, 2, f"2CH_ES{end}").unlink() for end in ("", "_gt")],
        "missing_view",
        WARNING,
        P2,
        P2,
        says=("2CH", "ES"),
    ),
    "missing _gt": Fault(
        "camus", lambda r: echo(r, 2, "2CH_ED_gt").unlink(), "missing_label", ERROR, f"{P2}_2CH_ED", P2
    ),
    "_gt without image": Fault(
        "camus",
        lambda r: echo(r, 2, "2CH_ED").unlink(),
        "missing_image",
        ERROR,
        f"{P2}_2CH_ED",
        P2,
        also=("missing_view",),
    ),
    "file in another patient's folder": Fault(
        "camus",
        lambda r: echo(r, 3, "2CH_ED").rename(r / "database_nifti" / P1 / f"{P3}_2CH_ED.nii.gz"),
        "extra_file",
        ERROR,
        f"{P1}/{P3}_2CH_ED.nii.gz",
        P3,
        also=("missing_image", "missing_view"),
        says=(P1,),
    ),
    "copy in another patient's folder": Fault(
        "camus",
        lambda r: shutil.copy(echo(r, 1, "2CH_ED"), r / "database_nifti" / P3 / f"{P1}_2CH_ED.nii.gz"),
        "duplicate_case",
        ERROR,
        f"{P3}/{P1}_2CH_ED.nii.gz",
        P1,
        also=("extra_file",),
        says=(f"{P1}/{P1}_2CH_ED",),
    ),
    "ED is no number": Fault(
        "camus", lambda r: reword(info(r, 2, "2CH"), "ED: 1", "ED: first"), "missing_info", WARNING, "Info_2CH.cfg", P2
    ),
    "ED is frame 0": Fault(  # frames count from 1
        "camus", lambda r: reword(info(r, 2, "2CH"), "ED: 1", "ED: 0"), "missing_info", WARNING, "Info_2CH.cfg", P2
    ),
    "ED beyond the last frame": Fault(  # the sequence has four
        "camus", lambda r: reword(info(r, 2, "2CH"), "ED: 1", "ED: 9"), "missing_info", WARNING, "Info_2CH.cfg", P2
    ),
    "unknown image quality": Fault(
        "camus",
        lambda r: reword(info(r, 2, "4CH"), f"ImageQuality: {quality_of(info(r, 2, '4CH'))}", "ImageQuality: Fair"),
        "missing_info",
        WARNING,
        "Info_4CH.cfg",
        P2,
        says=("Fair",),
    ),
    "cfg missing": Fault("camus", lambda r: info(r, 2, "4CH").unlink(), "missing_info", WARNING, P2, P2, says=("4CH",)),
    "intensities beyond 255": of_echo(
        "2CH_ED", lambda p: edit(p, lambda a: a.astype(np.int16) * 16), "intensity_range", WARNING, says=("4080",)
    ),
    "intensities scaled to 1": of_echo(
        "2CH_ED", lambda p: edit(p, lambda a: (a / 255).astype(np.float32)), "intensity_range", WARNING
    ),
    "truncated echo": of_echo("2CH_ES", cut, "unreadable", ERROR),
    "label of another shape": of_echo("4CH_ED_gt", lambda p: edit(p, lambda a: a[2:]), "shape", ERROR),
    "label 7": of_echo("4CH_ED_gt", lambda p: edit(p, put(7, np.s_[:3, :3])), "label_value", ERROR, says=("7",)),
    "one echo in two patients": Fault(
        "camus",
        lambda r: shutil.copy(echo(r, 1, "2CH_ED"), echo(r, 3, "2CH_ED")),
        "duplicate_content",
        ERROR,
        f"{P3}_2CH_ED.nii.gz",
        f"{P3}_2CH_ED",
        says=(f"{P1}_2CH_ED",),
    ),
    "one echo at both instants": Fault(  # no leak between patients
        "camus",
        lambda r: shutil.copy(echo(r, 1, "2CH_ED"), echo(r, 1, "2CH_ES")),
        "duplicate_content",
        WARNING,
        f"{P1}_2CH_E",
        f"{P1}_2CH_E",
    ),
    "identical frames": of_echo(
        "2CH_half_sequence",
        lambda p: edit(p, lambda a: a[..., [0, 1, 1, 3]]),
        "duplicate_slice",
        WARNING,
        options=WITH_FRAMES,
    ),
    "frames of image and label differ": of_echo(
        "2CH_half_sequence_gt", lambda p: edit(p, lambda a: a[..., :3]), "shape", ERROR, options=WITH_FRAMES
    ),
    "atrium missing in one of ten": dataclasses.replace(
        ATRIUM, says=("left atrium", "9"), options={"views": ("2CH",), "instants": ("ED",)}
    ),
    "atrium missing in one of forty": dataclasses.replace(ATRIUM, says=("left atrium", "39")),
    "patient in training and validation": Fault(
        "camus",
        lambda r: append(
            r / "database_split/subgroup_training.txt", (r / "database_split/subgroup_validation.txt").read_text()
        ),
        "patient_in_two_folds",
        ERROR,
        "database_split/subgroup_",
        "patient",
    ),
    "patient in training and testing": Fault(
        "metaimage",
        lambda r: append(
            r / "listSubGroups/subGroup3_training.txt", (r / "listSubGroups/subGroup3_testing.txt").read_text()
        ),
        "patient_in_two_folds",
        ERROR,
        "listSubGroups/subGroup3_",
        "patient",
    ),
    "split names an absent patient": Fault(
        "camus",
        lambda r: append(r / "database_split/subgroup_testing.txt", "patient0999"),
        "missing_file",
        WARNING,
        "subgroup_testing.txt",
        "",
        says=("patient0999",),
    ),
    "split that is no text": Fault(
        "camus",
        lambda r: (r / "database_split/subgroup_testing.txt").write_bytes(b"\xff\xfep\0a\0t\0"),
        "unreadable",
        ERROR,
        "subgroup_testing.txt",
        "",
    ),
    "raw file missing": Fault(
        "metaimage",
        lambda r: old_echo(r, 2, "2CH_ED.raw").unlink(),
        "unreadable",
        ERROR,
        f"{P2}_2CH_ED.mhd",
        f"{P2}_2CH_ED",
    ),
    "raw file truncated": Fault(
        "metaimage",
        lambda r: cut(old_echo(r, 2, "2CH_ED.raw")),
        "unreadable",
        ERROR,
        f"{P2}_2CH_ED.mhd",
        f"{P2}_2CH_ED",
    ),
    "spacing of the label": Fault(
        "metaimage",
        lambda r: reword(old_echo(r, 2, "2CH_ED_gt.mhd"), "ElementSpacing = 1.77", "ElementSpacing = 2.77"),
        "spacing",
        ERROR,
        f"{P2}_2CH_ED_gt.mhd",
        f"{P2}_2CH_ED",
    ),
}


def quality_of(path: Path) -> str:
    """The image quality that a clean cfg file has."""
    return next(line.partition(": ")[2] for line in path.read_text().splitlines() if line.startswith("ImageQuality"))


CHAOS_FAULTS = {
    "missing slice": Fault("chaos", gap, "slice_gap", ERROR, "i0008,0000b.dcm", "CT_1", also=("slice_name",)),
    "two slices at one place": Fault(
        "chaos", same_place, "duplicate_slice", ERROR, "i0008,0000b.dcm", "CT_1", also=("slice_gap",)
    ),
    "two slices of one image": Fault("chaos", same_pixels, "duplicate_slice", WARNING, CT, "CT_1", says=("slices",)),
    "missing mask": Fault(
        "chaos",
        lambda r: listing(r / CT_GROUND)[4].unlink(),
        "slice_count",
        ERROR,
        CT_GROUND,
        "CT_1",
        says=("15", "16"),
    ),
    "missing DICOM file": Fault(
        "chaos", lambda r: listing(r / T2)[2].unlink(), "slice_count", ERROR, "MR/2/T2SPIR", "MR_2", also=("slice_gap",)
    ),
    "masks of CT in reverse order": Fault(
        "chaos",
        lambda r: permute(listing(r / CT_GROUND), [*range(15, -1, -1)]),
        "label_order",
        WARNING,
        CT_GROUND,
        "CT_1",
    ),
    "masks of MR in reverse order": Fault(
        "chaos",
        lambda r: permute(listing(r / T2_GROUND), [*range(5, -1, -1)]),
        "label_order",
        WARNING,
        T2_GROUND,
        "MR_2",
    ),
    "truncated DICOM": Fault(
        "chaos", lambda r: cut(listing(r / CT)[5]), "unreadable", ERROR, "i0005,0000b.dcm", "CT_1"
    ),
    "DICOM cut in its header": Fault(
        "chaos", lambda r: cut(listing(r / CT)[5], 0.01), "unreadable", ERROR, "i0005,0000b.dcm", "CT_1"
    ),
    "truncated PNG": Fault(
        "chaos", lambda r: cut(listing(r / CT_GROUND)[5]), "unreadable", ERROR, "liver_GT_005.png", "CT_1"
    ),
    "not DICOM": Fault(
        "chaos",
        lambda r: listing(r / OUT)[3].write_text("no image"),
        "unreadable",
        ERROR,
        "OutPhase/IMG-0004-00007.dcm",
        "MR_1",
        options={"phase": "each"},
    ),
    "pixel spacing of zero": Fault(
        "chaos",
        lambda r: tags(listing(r / IN)[2], PixelSpacing=[0, 0]),
        "no_geometry",
        ERROR,
        "IMG-0004-00006.dcm",
        "MR_1",
        says=("PixelSpacing",),
    ),
    "position missing": Fault(
        "chaos",
        lambda r: tags(listing(r / CT)[3], ImagePositionPatient=None),
        "no_geometry",
        ERROR,
        "i0003,0000b.dcm",
        "CT_1",
        says=("ImagePositionPatient",),
    ),
    "pixel spacing of one slice": Fault(
        "chaos", lambda r: tags(listing(r / CT)[3], PixelSpacing=[3, 3]), "spacing", ERROR, "i0003,0000b.dcm", "CT_1"
    ),
    "size of one slice": Fault(
        "chaos", lambda r: pixels(listing(r / CT)[3], lambda a: a[:32]), "shape", ERROR, "i0003,0000b.dcm", "CT_1"
    ),
    "slice of another plane": Fault("chaos", turned_slice, "affine", ERROR, "IMG-0004-00006.dcm", "MR_1"),
    "fewer out-phase slices": Fault(
        "chaos",
        lambda r: listing(r / OUT)[-1].unlink(),
        "slice_count",
        ERROR,
        "MR/1/T1DUAL",
        "MR_1",
        says=("6", "5"),
        times=2,  # they fit neither the in-phase nor the masks
    ),
    "smaller out-phase slices": Fault(
        "chaos", smaller_out_phase, "shape", ERROR, "MR/1/T1DUAL", "MR_1", options={"phase": "each"}
    ),
    "smaller out-phase slices under the mask of the in-phase": Fault(  # one mask is for both, so they must agree
        "chaos", smaller_out_phase, "shape", ERROR, "MR/1/T1DUAL", "MR_1"
    ),
    "out-phase missing": Fault(
        "chaos", lambda r: shutil.rmtree(r / OUT), "missing_image", ERROR, "OutPhase", "MR_1", also=("slice_count",)
    ),
    "a grey value that is no organ": Fault(  # between liver, up to 70, and right kidney, from 110
        "chaos",
        lambda r: paint(listing(r / T2_GROUND)[2], put(100, np.s_[2:6, 2:6])),
        "label_value",
        WARNING,
        T2_GROUND,
        "MR_2",
        says=("100",),
    ),
    "masks of 1 to 4": Fault(
        "chaos", wrong_greys, "label_value", ERROR, T2_GROUND, "MR_2", also=("empty_label",), says=("1, 2, 3, 4",)
    ),
    "T2SPIR missing": Fault(
        "chaos", lambda r: shutil.rmtree(r / "MR/2/T2SPIR"), "missing_view", WARNING, "MR/2", "MR_2", says=("T2SPIR",)
    ),
    "CT without intercept": Fault("chaos", no_intercept, "intensity_range", WARNING, CT, "CT_1"),
    "names not in the order of positions": Fault(
        "chaos",
        lambda r: permute(listing(r / CT), [0, 1, 2, 3, 5, 4, *range(6, 16)]),
        "slice_order",
        ERROR,
        "i0005,0000b.dcm",
        "CT_1",
        also=("slice_gap",),
    ),
    "mask not named after its slice": Fault(
        "chaos",
        lambda r: listing(r / "MR/1/T1DUAL/Ground")[5].rename(r / "MR/1/T1DUAL/Ground/IMG-0004-00013.png"),
        "slice_name",
        WARNING,
        "IMG-0004-00013.png",
        "MR_1",
    ),
    "masks of another size": Fault(
        "chaos",
        lambda r: [paint(p, lambda a: a[:-2]) for p in listing(r / T2_GROUND)],
        "shape",
        ERROR,
        T2_GROUND,
        "MR_2",
    ),
    "no mask": Fault(
        "chaos", lambda r: [p.unlink() for p in listing(r / CT_GROUND)], "missing_label", ERROR, CT_GROUND, "CT_1"
    ),
    "empty masks": Fault(
        "chaos",
        lambda r: [paint(p, lambda a: a & False) for p in listing(r / CT_GROUND)],
        "empty_label",
        WARNING,
        CT_GROUND,
        "CT_1",
    ),
    "one series in two patients": Fault(
        "chaos",
        lambda r: [shutil.copy(p, r / "CT/2/DICOM_anon") for p in listing(r / CT)],
        "duplicate_content",
        ERROR,
        "CT/2/DICOM_anon",
        "CT_2",
        also=("label_order",),
        says=("CT_1",),
    ),
}

C1, C2, C3, C4 = TASK_NAMES
TASK_FAULTS = {
    "missing channel": Fault(
        "nnunet", lambda r: (r / f"imagesTr/{C2}_0001.nii.gz").unlink(), "missing_image", ERROR, f"{C2}_0001", C2
    ),
    "surplus channel": Fault(
        "nnunet",
        lambda r: shutil.copy(r / f"imagesTr/{C2}_0001.nii.gz", r / f"imagesTr/{C2}_0002.nii.gz"),
        "extra_file",
        WARNING,
        f"{C2}_0002.nii.gz",
        C2,
    ),
    "label without image": Fault(
        "nnunet",
        lambda r: shutil.copy(r / f"labelsTr/{C2}.nii.gz", r / "labelsTr/organ_050.nii.gz"),
        "extra_file",
        WARNING,
        "labelsTr/organ_050.nii.gz",
        "organ_050",
    ),
    "image without label": Fault(
        "nnunet", lambda r: (r / f"labelsTr/{C2}.nii.gz").unlink(), "missing_label", ERROR, C2, C2
    ),
    "undeclared label": Fault(
        "nnunet",
        lambda r: edit(r / f"labelsTr/{C2}.nii.gz", put(5, lambda a: a == 2)),
        "label_value",
        ERROR,
        f"labelsTr/{C2}.nii.gz",
        C2,
        says=("5",),
    ),
    "channels that differ in shape": Fault(
        "nnunet",
        lambda r: edit(r / f"imagesTr/{C2}_0001.nii.gz", lambda a: a[1:]),
        "shape",
        ERROR,
        f"{C2}_0001.nii.gz",
        C2,
    ),
    "case in train and val": Fault(
        "nnunet",
        lambda r: swap_split(r / "splits_final.json", [C1, C2], [C1, C2, C3]),
        "patient_in_two_folds",
        ERROR,
        "splits_final.json",
        C3,
        says=(C3,),
    ),
    "folds name an absent case": Fault(
        "nnunet",
        lambda r: swap_split(r / "splits_final.json", [C1, C2], [C1, C2, "organ_099"]),
        "missing_file",
        WARNING,
        "splits_final.json",
        "",
        says=("organ_099",),
    ),
    "folds that are no JSON": Fault(
        "nnunet", lambda r: (r / "splits_final.json").write_text("[{"), "dataset_json", ERROR, "splits_final.json", ""
    ),
    "listed case absent": Fault(
        "decathlon", list_absent, "missing_file", ERROR, "dataset.json", "", says=("organ_099",)
    ),
    "wrong number of channels": Fault(
        "decathlon",
        lambda r: edit(r / f"imagesTr/{C2}.nii.gz", lambda a: np.concatenate([a, a[..., :1]], -1)),
        "shape",
        ERROR,
        f"imagesTr/{C2}.nii.gz",
        C2,
        says=("3",),
    ),
    "one channel where there are two": Fault(
        "decathlon",
        lambda r: edit(r / f"imagesTr/{C2}.nii.gz", lambda a: a[..., 0]),
        "shape",
        ERROR,
        f"imagesTr/{C2}.nii.gz",
        C2,
    ),
    "label of two channels": Fault(
        "decathlon",
        lambda r: edit(r / f"labelsTr/{C2}.nii.gz", lambda a: np.stack([a, a], -1)),
        "shape",
        ERROR,
        f"labelsTr/{C2}.nii.gz",
        C2,
    ),
    "second channel constant": Fault(
        "decathlon",
        lambda r: edit(r / f"imagesTr/{C2}.nii.gz", put(0, np.s_[..., 1])),
        "constant",
        ERROR,
        f"imagesTr/{C2}.nii.gz",
        C2,
        says=("T2",),
    ),
    "truncated file of the Decathlon": Fault(
        "decathlon", lambda r: cut(r / f"imagesTr/{C2}.nii.gz"), "unreadable", ERROR, f"imagesTr/{C2}.nii.gz", C2
    ),
}

FAULTS = BRATS_FAULTS | CAMUS_FAULTS | CHAOS_FAULTS | TASK_FAULTS


def matches(problem: Problem, fault: Fault) -> bool:
    text = f"{Path(problem.path).as_posix()} {problem.found}"
    words = all(word in problem.found for word in fault.says)
    return problem.kind == fault.kind and problem.severity == fault.severity and fault.names in text and words


def show(problems: list[Problem]) -> str:
    return "\n".join(f"{p.severity} {p.kind} [{p.case_id}] {p}" for p in problems) or "no problem"


def concerns(problem: Problem, fault: Fault) -> bool:
    """Whether a finding is of the damaged case; one of no case must at least name it."""
    if problem.case_id:
        return bool(fault.case) and fault.case in problem.case_id
    return not fault.case or fault.case in f"{problem.path} {problem.found}"


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_and_nothing_else_is_blamed(copy, name):
    """One damage, one finding that leads to it: the file or case by name, and no other kind or case."""
    fault = FAULTS[name]
    root = copy(fault.data)
    fault.damage(root)
    problems = find(fault.data, root, **fault.options)
    hits = [p for p in problems if matches(p, fault)]
    assert hits, f"expected {fault.severity} {fault.kind}; verify says\n{show(problems)}"
    assert {p.kind for p in problems} <= {fault.kind, *fault.also}, show(problems)
    assert all(concerns(p, fault) for p in problems), show(problems)
    assert len(hits) <= fault.times, f"said more than once:\n{show(problems)}"


# -- what is no fault ---------------------------------------------------------------------------------------------


def plain_nifti(root: Path) -> None:
    for part in ("flair", "seg"):
        path = brats(root, 1, part)
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


def as_2020(root: Path) -> None:
    """The names of 2020, in HGG and LGG, with the tables beside them and the odd label of case 355."""
    for number, grade in ((0, "HGG"), (1, "HGG"), (2, "LGG")):
        name = f"BraTS20_Training_{number + 354:03d}"
        folder = root / grade / name
        folder.mkdir(parents=True)
        for part in ("flair", "t1", "t1ce", "t2", "seg"):
            brats(root, number, part).rename(folder / f"{name}_{part}.nii.gz")
        (root / f"BraTS2021_{number:05d}").rmdir()
    folder = root / "HGG" / "BraTS20_Training_355"
    label = folder / "BraTS20_Training_355_seg.nii.gz"
    (folder / "W39_1998.09.19_Segm.nii").write_bytes(gzip.decompress(label.read_bytes()))
    label.unlink()
    for table in ("name_mapping.csv", "survival_info.csv"):
        (root / table).write_text("BraTS20ID,Age\n")


def hidden_files(root: Path, suffix: str) -> None:
    """What macOS adds to archives: one beside every file."""
    for path in list(root.rglob(f"*{suffix}")):
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7")


def system_folders(root: Path) -> None:
    """Copies of a case in the folders of operating systems: deleted files, which are not data."""
    first = min((p for p in root.rglob("*") if p.is_file()), key=lambda p: (-len(p.parts), p))
    for name in (".Trash-1000", "$RECYCLE.BIN", "lost+found", "__MACOSX"):
        copied = root / name / "files" / first.relative_to(root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(first.parent, copied.parent, dirs_exist_ok=True)


def citations(*folders: str) -> Callable[[Path], None]:
    """Files that are of no case and do no harm."""

    def add(root: Path) -> None:
        for folder in folders:
            (root / folder / "MANDATORY_CITATION.md").write_text("cite")

    return add


def backwards(root: Path) -> None:
    """A patient whose sequence runs from ES to ED."""
    for end in ("", "_gt"):
        edit(echo(root, 2, f"2CH_half_sequence{end}"), lambda a: a[..., ::-1])
    reword(info(root, 2, "2CH"), "ED: 1\nES: 4", "ED: 4\nES: 1")


def unlabelled_test_patient(root: Path) -> None:
    """A test patient of the older release, whose number is also one of training."""
    folder = root / "testing" / P1
    shutil.copytree(root / "training" / P3, folder)
    shutil.rmtree(root / "training" / P3)
    for path in listing(folder):
        if "_gt" in path.name:
            path.unlink()
            continue
        if path.suffix == ".mhd":
            reword(path, P3, P1)
        path.rename(folder / path.name.replace(P3, P1))
    for path in (root / "listSubGroups").iterdir():
        path.unlink()


def merged_phases(root: Path) -> None:
    for folder in (IN, OUT):
        for path in listing(root / folder):
            path.rename(root / "MR/1/T1DUAL/DICOM_anon" / path.name)
        (root / folder).rmdir()


def from_below(root: Path) -> None:
    """A CT whose positions rise with the names."""
    for folder in (CT, CT_GROUND):
        permute(listing(root / folder), [*range(15, -1, -1)])


def twice_the_labels(value: int) -> Callable[[Path], None]:
    """CT masks in another grey: everything above 0 is liver."""

    def write(root: Path) -> None:
        for path in listing(root / CT_GROUND):
            paint(path, lambda a: a.astype(np.uint8) * np.uint8(value))

    return write


def below_train_sets(root: Path) -> None:
    (root / "Train_Sets").mkdir()
    for name in ("CT", "MR"):
        (root / name).rename(root / "Train_Sets" / name)


def with_test_sets(root: Path) -> None:
    """Patients 2 are of the test set, which has no masks."""
    for side, number in (("Train_Sets", 1), ("Test_Sets", 2)):
        for name in ("CT", "MR"):
            (root / side / name).mkdir(parents=True)
            (root / name / str(number)).rename(root / side / name / str(number))
    for folder in list((root / "Test_Sets").rglob("Ground")):
        shutil.rmtree(folder)
    for name in ("CT", "MR"):
        (root / name).rmdir()


def overlapping_labels(root: Path) -> None:
    """Regions of several labels, as nnU-Net's version 2 has them."""
    card = json.loads((root / "dataset.json").read_text())
    card |= {"labels": {"background": 0, "whole": [1, 2], "spot": [2]}, "regions_class_order": [1, 2]}
    (root / "dataset.json").write_text(json.dumps(card))


HARMLESS: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any]]] = {
    "shift by 0.001 voxels": ("brats2021", lambda r: edit(brats(r, 1, "t1"), affine=shift(0.001)), {}),
    "labels as float": ("brats2021", lambda r: edit(brats(r, 1, "seg"), lambda a: a.astype(np.float32)), {}),
    "labels off by rounding": ("brats2021", lambda r: edit(brats(r, 1, "seg"), lambda a: a * np.float32(0.99999)), {}),
    "images as float": ("brats2021", lambda r: edit(brats(r, 1, "t1"), lambda a: a.astype(np.float32)), {}),
    "no enhancing tumour": ("brats2021", lambda r: edit(brats(r, 1, "seg"), put(1, lambda a: a == 4)), {}),
    "NIfTI without gzip": ("brats2021", plain_nifti, {}),
    "BraTS 2020": ("brats2021", as_2020, {}),
    "validation data": (
        "brats2021",
        lambda r: [p.unlink() for p in r.rglob("*_seg.nii.gz")],
        {"need_labels": False},
    ),
    "hidden files in BraTS": ("brats2021", lambda r: hidden_files(r, ".nii.gz"), {}),
    "hidden files in CAMUS": ("camus", lambda r: hidden_files(r, ".*"), {}),
    "hidden files in CHAOS": ("chaos", lambda r: hidden_files(r, ".*"), {}),
    "hidden files in nnU-Net": ("nnunet", lambda r: hidden_files(r, ".nii.gz"), {}),
    "hidden files in the Decathlon": ("decathlon", lambda r: hidden_files(r, ".nii.gz"), {}),
    "recycle bins in BraTS": ("brats2021", system_folders, {}),
    "recycle bins in CAMUS": ("camus", system_folders, {}),
    "recycle bins in CHAOS": ("chaos", system_folders, {}),
    "recycle bins in nnU-Net": ("nnunet", system_folders, {}),
    "recycle bins in the Decathlon": ("decathlon", system_folders, {}),
    "other files in CAMUS": ("camus", citations("", "database_nifti", f"database_nifti/{P1}", "database_split"), {}),
    "other files in CHAOS": ("chaos", citations("", "CT", "CT/1", "MR/1", "MR/1/T1DUAL", "MR/2/T2SPIR"), {}),
    "other files beside slices": ("chaos", citations(CT, IN, T2), {}),
    "other files beside masks": ("chaos", citations(CT_GROUND, T2_GROUND), {}),
    "sequence from ES to ED": ("camus", backwards, WITH_FRAMES),
    "test patients without labels": ("metaimage", unlabelled_test_patient, {}),
    "phases in one folder": ("chaos", merged_phases, {"phase": "each"}),
    "slices from below": ("chaos", from_below, {}),
    "CT masks of 255": ("chaos", twice_the_labels(255), {}),
    "CT masks of 63": ("chaos", twice_the_labels(63), {}),
    "Train_Sets": ("chaos", below_train_sets, {}),
    "Train_Sets and Test_Sets": ("chaos", with_test_sets, {}),
    "Test_Sets to predict": ("chaos", with_test_sets, {"need_labels": False}),
    "labels that overlap": ("nnunet", overlapping_labels, {}),
    "lines of Windows": (
        "camus",
        lambda r: [
            p.write_bytes(p.read_bytes().replace(b"\n", b"\r\n")) for p in [*r.rglob("*.txt"), *r.rglob("*.cfg")]
        ],
        {},
    ),
    "a split in which a side is empty": (
        "camus",
        lambda r: (r / "database_split/subgroup_testing.txt").write_text("\n"),
        {},
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_irregularities_of_real_copies_are_no_problem(copy, name):
    """Public copies differ in names, types and extra files; none of that needs a person."""
    data, change, options = HARMLESS[name]
    root = copy(data)
    change(root)
    problems = find(data, root, **options)
    assert problems == [], show(problems)


# -- several faults at once ---------------------------------------------------------------------------------------

TOGETHER = {
    "brats2021": ["extra modality file", "one image in two patients"],
    "camus": ["missing view", "intensities beyond 255", "one echo in two patients", "split names an absent patient"],
    "chaos": ["truncated DICOM", "T2SPIR missing", "fewer out-phase slices"],
    "nnunet": ["surplus channel", "label without image", "case in train and val"],
    "decathlon": ["wrong number of channels", "listed case absent"],
}


@pytest.mark.parametrize("data", TOGETHER)
def test_faults_of_several_cases_are_found_in_one_pass(copy, data):
    """The list must be whole, not end at the first fault; that of the other case must not hide any."""
    root = copy(data)
    for name in TOGETHER[data]:
        FAULTS[name].damage(root)
    problems = find(data, root)
    for name in TOGETHER[data]:
        assert any(matches(p, FAULTS[name]) for p in problems), f"{name} not in\n{show(problems)}"
    assert {p.kind for p in problems} == {FAULTS[name].kind for name in TOGETHER[data]}, show(problems)


def test_every_case_has_a_fault_of_its_own(copy):
    """Each finding carries the id of its case, and is said for that case alone."""
    root = copy("brats2021")
    edit(brats(root, 0, "flair"), put(np.nan, (24, 24, 20), np.float32))
    brats(root, 1, "t1ce").unlink()
    brats(root, 1, "seg").unlink()
    edit(brats(root, 2, "t2"), affine=shift(1.5))
    problems = find("brats2021", root)
    wanted = [(B0, "not_finite"), (B1, "missing_image"), (B1, "missing_label"), (B2, "affine")]
    assert sorted((p.case_id, p.kind) for p in problems) == wanted, show(problems)


def truncated_and_not_finite(root: Path) -> None:
    cut(brats(root, 1, "t1"))
    edit(brats(root, 1, "t2"), put(np.nan, (24, 24, 20), np.float32))


def missing_and_truncated(root: Path) -> None:
    brats(root, 1, "t1").unlink()
    cut(brats(root, 1, "t2"))


def shapes_and_labels(root: Path) -> None:
    edit(brats(root, 1, "t2"), lambda a: a[1:])
    edit(brats(root, 1, "seg"), put(3, lambda a: a == 4))


def image_and_label(root: Path) -> None:
    cut(brats(root, 1, "flair"))
    edit(brats(root, 1, "seg"), put(3, lambda a: a == 4))


def two_of_each(root: Path) -> None:
    for k in (3, 9):
        cut(listing(root / CT)[k])


def two_masks(root: Path) -> None:
    for k in (3, 9):
        cut(listing(root / CT_GROUND)[k])


def count_and_truncated(root: Path) -> None:
    listing(root / CT_GROUND)[15].unlink()
    cut(listing(root / CT)[5])


def slices_and_masks(root: Path) -> None:
    cut(listing(root / CT)[5], 0.01)
    cut(listing(root / CT_GROUND)[5])


def slice_without_its_gap(root: Path) -> None:
    listing(root / T2)[2].unlink()


def elsewhere_with_bad_facts(root: Path) -> None:
    FAULTS["file in another patient's folder"].damage(root)
    reword(info(root, 3, "2CH"), f"ImageQuality: {quality_of(info(root, 3, '2CH'))}", "ImageQuality: Fair")


def place_and_values(root: Path) -> None:
    edit(brats(root, 1, "seg"), put(3, lambda a: a == 4))
    edit(brats(root, 1, "seg"), affine=shift(1.5))


ONE_CASE: dict[str, tuple[str, Callable[[Path], None], set[tuple[str, str]]]] = {
    "truncated t1, NaN in t2": (
        "brats2021",
        truncated_and_not_finite,
        {("unreadable", f"{B1}_t1.nii.gz"), ("not_finite", f"{B1}_t2.nii.gz")},
    ),
    "missing t1, truncated t2": (
        "brats2021",
        missing_and_truncated,
        {("missing_image", B1), ("unreadable", f"{B1}_t2.nii.gz")},
    ),
    "shape of t2, label 3": (
        "brats2021",
        shapes_and_labels,
        {("shape", f"{B1}_t2.nii.gz"), ("label_value", f"{B1}_seg.nii.gz")},
    ),
    "truncated flair, label 3": (
        "brats2021",
        image_and_label,
        {("unreadable", f"{B1}_flair.nii.gz"), ("label_value", f"{B1}_seg.nii.gz")},
    ),
    "label 3, label shifted": (
        "brats2021",
        place_and_values,
        {("affine", f"{B1}_seg.nii.gz"), ("label_value", f"{B1}_seg.nii.gz")},
    ),
    "two truncated slices": (
        "chaos",
        two_of_each,
        {("unreadable", "i0003,0000b.dcm"), ("unreadable", "i0009,0000b.dcm")},
    ),
    "two truncated masks": (
        "chaos",
        two_masks,
        {("unreadable", "liver_GT_003.png"), ("unreadable", "liver_GT_009.png")},
    ),
    "mask missing, slice truncated": (
        "chaos",
        count_and_truncated,
        {("slice_count", "Ground"), ("unreadable", "i0005,0000b.dcm")},
    ),
    "slice missing, masks whole": (  # which one is missing, the positions tell
        "chaos",
        slice_without_its_gap,
        {("slice_count", "Ground"), ("slice_gap", "IMG-0004-00004.dcm")},
    ),
    "file elsewhere, bad quality at home": (
        "camus",
        elsewhere_with_bad_facts,
        {
            ("extra_file", f"{P3}_2CH_ED.nii.gz"),
            ("missing_image", f"{P3}_2CH_ED_gt.nii.gz"),
            ("missing_view", "camus"),
            ("missing_info", "Info_2CH.cfg"),
        },
    ),
    "slice no DICOM, mask truncated": (
        "chaos",
        slices_and_masks,
        {("unreadable", "i0005,0000b.dcm"), ("unreadable", "liver_GT_005.png")},
    ),
}


@pytest.mark.parametrize("name", ONE_CASE)
def test_faults_of_one_case_are_found_in_one_pass(copy, name):
    """A second download should not be needed to learn of the second broken file."""
    data, damage, wanted = ONE_CASE[name]
    root = copy(data)
    damage(root)
    problems = find(data, root)
    assert {(p.kind, Path(p.path).name) for p in problems} == wanted, show(problems)


def test_displacement_is_given_in_voxels_of_the_image(copy):
    """1.5 voxels are 3 mm along the axis of 2 mm: what a person can act on is the number of voxels."""
    root = copy("nnunet")

    def along_z(affine: np.ndarray) -> np.ndarray:
        affine[2, 3] += 3.0
        return affine

    edit(root / f"imagesTr/{C2}_0001.nii.gz", affine=along_z)
    (problem,) = find("nnunet", root)
    assert problem.kind == "affine" and "1.5" in problem.found


# -- data sets that cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["nnunet", "decathlon"])
@pytest.mark.parametrize(
    "text",
    [
        None,
        "{not JSON",
        "[]",
        "{}",
        '{"labels": {"background": 0, "organ": 1}}',
        '{"channel_names": {"0": "CT"}}',
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": "one"}}',
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "training": [{}]}',
    ],
    ids=["missing", "no JSON", "a list", "empty", "no channels", "no labels", "label in words", "list without files"],
)
def test_dataset_json_that_cannot_be_used(copy, data, text):
    """Without it there is neither channel nor label, so it is an error that names the file."""
    root = copy(data)
    path = root / "dataset.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=r"dataset\.json") as raised:
        find(data, root)
    assert [(p.kind, p.severity, Path(p.path)) for p in raised.value.problems] == [("dataset_json", ERROR, path)]


# -- the command line ---------------------------------------------------------------------------------------------


def arguments(name: str, root: Path, *more: str) -> list[str]:
    """``verify`` with the flags of a data set."""
    flags = [f"--{key}={value}" for key, value in OPTIONS[name].items()]
    return ["verify", f"--root={root}", *flags, *more]


def test_command_says_that_clean_data_are_clean(clean, capsys):
    assert main(arguments("brats2021", clean("brats2021"))) == 0
    out = capsys.readouterr().out
    assert "3 cases" in out and "no problem" in out


def test_command_prints_a_table_and_fails_for_errors(copy, capsys):
    """Every finding has its file, what was found, what was expected and what to do."""
    root = copy("brats2021")
    cut(brats(root, 1, "t2"))
    edit(brats(root, 2, "seg"), put(3, lambda a: a == 4))
    problems = find("brats2021", root)
    assert main(arguments("brats2021", root)) == 1
    lines = capsys.readouterr().out.splitlines()
    for p in problems:
        words = (p.severity, p.kind, Path(p.path).name, p.found)
        (at,) = [i for i, line in enumerate(lines) if all(word in line for word in words)]
        block = " ".join(lines[at : at + 2])
        assert p.expected in block and p.suggestion in block
    assert len(problems) == 2
    assert "2 errors" in lines[-1] and "0 warnings" in lines[-1]


def test_warnings_alone_fail_only_when_strict(copy, capsys):
    root = copy("camus")
    FAULTS["missing view"].damage(root)
    assert main(arguments("camus", root)) == 0
    assert "missing_view" in capsys.readouterr().out
    assert main(arguments("camus", root, "--strict")) == 1
    assert main(arguments("camus", root, "--views=2CH", "--strict")) == 0, "the other view is not asked for"


def test_strict_passes_clean_data(clean):
    assert main(arguments("chaos", clean("chaos"), "--phase=each", "--strict")) == 0


@pytest.mark.parametrize("to_file", [True, False], ids=["file", "screen"])
def test_json_holds_what_the_table_says(copy, tmp_path, capsys, to_file):
    """For programs: all five words of every finding, as plain strings."""
    root = copy("camus")
    FAULTS["missing _gt"].damage(root)
    FAULTS["split names an absent patient"].damage(root)
    path = tmp_path / "findings.json"
    status = main(arguments("camus", root, "--json", str(path) if to_file else "-"))
    report = json.loads(path.read_text() if to_file else capsys.readouterr().out)
    assert status == 1
    assert (report["errors"], report["warnings"]) == (1, 1)
    assert Path(report["root"]) == root
    found = {(p["kind"], p["severity"]): p for p in report["problems"]}
    assert set(found) == {("missing_label", "error"), ("missing_file", "warning")}
    for problem in report["problems"]:
        assert problem.keys() == {"path", "found", "expected", "suggestion", "kind", "case_id", "severity"}
        assert all(isinstance(value, str) for value in problem.values())
    assert f"{P2}_2CH_ED" in found["missing_label", "error"]["path"]
    assert "patient0999" in found["missing_file", "warning"]["found"]


def test_json_of_clean_data_is_written_too(clean, tmp_path):
    """A program that reads the file must not take the absence of problems for the absence of a run."""
    path = tmp_path / "findings.json"
    assert main(arguments("nnunet", clean("nnunet"), f"--json={path}")) == 0
    report = json.loads(path.read_text())
    assert (report["cases"], report["errors"], report["warnings"], report["problems"]) == (4, 0, 0, [])


def test_instants_are_chosen_by_flag(copy):
    """What is not asked for is not judged."""
    root = copy("camus")
    FAULTS["identical frames"].damage(root)
    assert main(arguments("camus", root, "--instants=ED,ES", "--strict")) == 0
    assert main(arguments("camus", root, "--instants=ED,half_sequence", "--strict")) == 1
    assert main(arguments("camus", root, "--strict")) == 1, "by default all instants are"


@pytest.mark.parametrize("where", ["out-phase", "CT"])
def test_no_file_is_passed_over_by_default(copy, where):
    root = copy("chaos")
    folder = root / ("CT/1/DICOM_anon" if where == "CT" else "MR/1/T1DUAL/DICOM_anon/OutPhase")
    path = sorted(folder.iterdir())[2]
    path.write_bytes(path.read_bytes()[:-500])
    findings = verify(get_dataset({"dataset": "chaos", "task": 5}), root)
    assert bool(findings.errors) == (where == "out-phase"), "the phases of a series belong together"
    assert main(["verify", "--dataset=chaos", f"--root={root}"]) == 1


def test_three_patients_in_two_folds_are_three_findings(copy):
    root = copy("camus")
    lists = root / "database_split"
    (lists / "subgroup_testing.txt").write_text((lists / "subgroup_training.txt").read_text())
    names = set((lists / "subgroup_training.txt").read_text().split())
    found = verify(get_dataset({"dataset": "camus"}), root).problems
    assert names and {p.case_id for p in found if p.kind == "patient_in_two_folds"} == names


def test_labels_are_not_needed_when_the_user_says_so(copy):
    root = copy("brats2021")
    brats(root, 1, "seg").unlink()
    assert main(arguments("brats2021", root)) == 1
    assert main(arguments("brats2021", root, "--no-labels", "--strict")) == 0


UNUSABLE: dict[str, Callable[[Path], list[str]]] = {
    "no folder": lambda root: arguments("camus", root / "absent"),
    "a file as folder": lambda root: arguments("camus", root / "a.txt"),
    "nothing in it": lambda root: arguments("chaos", root / "empty"),
    "no convention": lambda root: ["verify", "--dataset=brats", f"--root={root}"],
    "option of another data set": lambda root: arguments("camus", root, "--task=4"),
    "unknown view": lambda root: arguments("camus", root, "--views=3CH"),
    "no dataset.json": lambda root: arguments("decathlon", root),
    "unknown flag": lambda root: arguments("camus", root, "--thorough"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_input_is_one_message_and_status_2(tmp_path, capsys, monkeypatch, name):
    """A script must be able to tell bad data from a bad call."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    argv = UNUSABLE[name](tmp_path)
    with pytest.raises(UserError):
        main(argv)
    monkeypatch.setattr(sys, "argv", ["xdim-data", *argv])
    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().startswith("error: ")
