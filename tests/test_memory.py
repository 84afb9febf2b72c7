"""What is said before a prediction about memory holds: measured by the allocations of Python and numpy."""

import gzip
import math
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Extension

from tests.dicom_files import write_series
from xdim_jax.base.problem import DataError
from xdim_jax.data import regions
from xdim_jax.data.case import Case
from xdim_jax.data.images.grid import Grid
from xdim_jax.data.images.image import read_grid, read_image, voxel_type
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.data.labels import Labels
from xdim_jax.data.prepare import Preparation, needed_bytes, prepare
from xdim_jax.data.reading import encode_label, read_case

SHAPE = (120, 130, 70)  # x, y, z
LABELS = Labels("own", ("background", "a", "b"), (0, 1, 2))


def nifti(folder: Path, dtype, slope=1.0, channels=1, name="a.nii.gz"):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, (*SHAPE, channels) if channels > 1 else SHAPE).astype(dtype)
    values[:20] = 0
    if dtype == np.int16:
        values[0, 0, 0] = -(2**15)  # what scanners pad with
    image = nib.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, 1.0]))
    image.header.set_slope_inter(slope, 0)
    nib.save(image, folder / name)
    return folder / name


def metaimage(folder: Path):
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=SHAPE[::-1]).astype(np.float32))
    sitk.WriteImage(image, str(folder / "a.mha"))
    return folder / "a.mha"


def series(folder: Path):
    write_series(folder / "s", np.random.default_rng(0).integers(-500, 500, SHAPE[::-1]).astype(np.int16), (2, 1, 1))
    return tuple(sorted((folder / "s").iterdir(), reverse=True))


SOURCES = {
    "int16": lambda f: [nifti(f, np.int16)],
    "scaled": lambda f: [nifti(f, np.int16, 0.5)],
    "float64": lambda f: [nifti(f, np.float64)],
    "uint16": lambda f: [nifti(f, np.uint16)],
    "float32 on disk as it is": lambda f: [nifti(f, np.float32, name="a.nii")],
    "four channels in a file": lambda f: [nifti(f, np.float32, channels=4)],
    "four files": lambda f: [nifti(f, np.int16, name=f"{k}.nii.gz") for k in range(4)],
    "MetaImage": lambda f: [metaimage(f)],
    "DICOM": lambda f: [series(f)],
}
SETTINGS = {
    "finer and coarser": Preparation(spacing=(0.4, 3, 3), normalise="zscore_nonzero"),
    "as stored": Preparation(),
    "cropped": Preparation(crop="nonzero", normalise="zscore_nonzero"),
    "coarser": Preparation(spacing=(4, 2, 2)),
    "finer": Preparation(spacing=(1, 1, 1), normalise="zscore_nonzero", crop="nonzero"),
    "window": Preparation(window=(40, 30.5)),
    "coarser, window": Preparation(window=(40, 30.5), spacing=(2, 1.5, 1.5)),
}


def peak_of(function):
    tracemalloc.start()
    try:
        kept = function()
        return tracemalloc.get_traced_memory()[1], kept
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_reading_and_preparing_stay_below_what_is_said(source, settings, tmp_path):
    sources, preparation = SOURCES[source](tmp_path), SETTINGS[settings]
    channels = 4 if "four" in source else 1
    case = Case("a", "a", tuple(sources), ("CT",) * channels, None, LABELS)
    stored = [voxel_type(s) for s in sources]
    said, stays = needed_bytes(stored, channels, read_grid(sources[0]), preparation)
    read_case(case)  # libraries are imported

    peak, prepared = peak_of(lambda: prepare(case, read_case(case), preparation))
    assert prepared.raw.nbytes <= stays
    slack = 20 * 2**20 / 8  # buffers that do not grow with the image
    assert peak <= said + slack
    assert peak >= 0.45 * said, "so much more is said that it says nothing"
    if settings == "as stored":
        image = 4 * channels * math.prod(SHAPE)
        assert peak <= 2.05 * image + slack, "twice the float32 image"


def test_after_the_network_little_is_added():
    """Post-processing and writing, in bytes per voxel; the largest part of a region of many."""
    rng = np.random.default_rng(0)
    label = (rng.random(SHAPE[::-1]) < 0.3).astype(np.uint8)
    sets = regions.Regions({"a": (1,), "b": (2,)})
    peak, _ = peak_of(lambda: regions.keep_largest(label, sets, sets.names))
    assert peak <= 10 * label.size + 2**20  # the map itself is the eleventh
    case = Case("a", "a", (), ("CT",), None, LABELS)
    peak, _ = peak_of(lambda: encode_label(case, label))
    assert peak <= 3 * label.size + 2**20


def test_writing_a_label_map_holds_no_second_one(tmp_path):
    label = np.zeros(SHAPE[::-1], np.uint8)
    grid = Grid(SHAPE, np.diag([1.0, -1.0, 2.0, 1.0]))
    peak, _ = peak_of(lambda: write_volume(tmp_path / "a.nii.gz", label, grid))
    assert peak <= label.size + 2**20


# -- reading as nibabel does --------------------------------------------------------------------------------------


def made(folder: Path, kind) -> Path:
    rng = np.random.default_rng(1)
    name, build = "a.nii.gz", nib.Nifti1Image
    values = rng.integers(-300, 300, (5, 6, 7)).astype(np.int16)
    if kind == "scaled, offset":
        values = values.view(np.uint16)
    if kind == "float64":
        values = rng.normal(size=(5, 6, 7))
    if kind == "NIfTI-2, not compressed":
        name, build = "a.nii", nib.Nifti2Image
    image = build(values, np.diag([1.0, 1.0, 2.0, 1.0]))
    if kind == "big endian":
        image = build(values.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
    if kind == "scaled, offset":
        image.header.set_slope_inter(0.1, -7)
    if kind == "extension":
        image.header.extensions.append(Nifti1Extension("comment", b"as long as this " * 9))
    if kind == "no scaling":
        image.header.set_slope_inter(np.nan, np.nan)
    nib.save(image, folder / name)
    return folder / name


KINDS = ["plain", "scaled, offset", "float64", "NIfTI-2, not compressed", "big endian", "extension", "no scaling"]


@pytest.mark.parametrize("kind", KINDS)
def test_voxels_are_those_that_nibabel_reads(kind, tmp_path):
    path = made(tmp_path, kind)
    expected = nib.load(path)
    array, grid = read_image(path)
    np.testing.assert_array_equal(array[..., 0], grid.to_memory(expected.get_fdata().astype(np.float32)))
    np.testing.assert_array_equal(grid.affine, expected.affine)
    assert array.dtype == voxel_type(path)[0]
    assert (array.dtype == np.float32) == (kind in ("scaled, offset", "float64"))


def test_a_file_that_ends_early_says_how_early(tmp_path):
    path = made(tmp_path, "NIfTI-2, not compressed")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="10 bytes"):
        read_image(path)


def test_values_beyond_float32_are_named_as_infinite(tmp_path):
    values = np.ones((5, 6, 7))
    values[1, 2, 3] = 1e300
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="1 NaN or infinite"):
        read_case(Case("a", "a", (tmp_path / "a.nii.gz",), ("CT",), None, LABELS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "30000 x 30000 x 30000 voxels"),
        ({"dim": [1, 5, 1, 1, 1, 1, 1, 1]}, "has shape 5"),
        ({"dim": [3, 5, 0, 7, 1, 1, 1, 1]}, "has shape 5 x 0 x 7"),
        ({"dim": [3, 5, -6, 7, 1, 1, 1, 1]}, r"has shape 5 x -6 x 7|negative dimensions"),
    ],
)
def test_sizes_that_cannot_be(change, message, tmp_path):
    path = made(tmp_path, "plain")
    image = nib.load(path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for field, value in change.items():
        header[field] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)))
    assert image.shape == (5, 6, 7)
    for read in (read_grid, read_image):
        with pytest.raises(DataError, match=message):
            read(path)


def test_values_beyond_float32_are_named_in_one_of_several_files(tmp_path):
    for k in range(2):
        values = np.ones((4, 5, 6))
        values[1, 2, 3] = 1e300 * k
        sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / f"{k}.mha"))
    case = Case("a", "a", tuple(tmp_path / f"{k}.mha" for k in range(2)), ("T1", "T2"), None, LABELS)
    with pytest.raises(DataError, match=r"1.mha .*1 NaN or infinite"):
        read_case(case)
