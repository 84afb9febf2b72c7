"""Files of every data set as they lie on disk, written here with nibabel, SimpleITK, pydicom and Pillow alone.

Reader and phantoms are the project's own, so a fault that both share would not show in a test that writes with one and
reads with the other. The files under test are therefore made by hand, with values that tell where a voxel belongs.
"""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from scipy.ndimage import binary_dilation, distance_transform_edt

from tests.dicom_files import save_dicom
from xdim_jax.base.errors import UserError
from xdim_jax.data import phantom
from xdim_jax.data.case import list_cases, scan_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.images import dicom
from xdim_jax.data.images.image import read_grid, read_image, read_volume
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.data.reading import encode_label, read_case, read_label

# a small anatomy: ANATOMY[z, y, x] with axes to superior, posterior, left, and where its voxels lie in mm, LPS
SIZE = np.array([3, 4, 5])  # x, y, z
STEP = np.array([1.0, 1.5, 2.5])
ORIGIN = np.array([10.0, -20.0, 5.0])
ANATOMY = np.fromfunction(lambda z, y, x: 100 * x + 10 * y + z, SIZE[::-1], dtype=int).astype(np.uint8)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def ids(cases):
    return [case.case_id for case in cases]


def cases_of(section, root, *, need_labels=True):
    return list_cases(get_dataset(section), root, need_labels=need_labels)


def by_id(section, root, *, need_labels=True):
    return {case.case_id: case for case in cases_of(section, root, need_labels=need_labels)}


def names_below(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def save_nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def save_meta(path, array, spacing, *, origin=None, direction=None):
    """``array`` in ITK's order (z, y, x) or (y, x), ``spacing`` in the file's (x, y, z) or (x, y)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing])
    if origin is not None:
        image.SetOrigin([float(o) for o in origin])
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    sitk.WriteImage(image, str(path))


def save_png(path, plane, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(plane)
    assert mode is None or image.mode == mode
    image.save(path)


def save_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


# -- orientation: NIfTI and MetaImage -----------------------------------------------------------------------------

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def stored(order, signs):
    """The anatomy in file axes ``(i, j, k)``: axis i runs along ``order[i]``, backwards if its sign is negative.

    Returns the array and the affine in LPS.
    """
    index = np.indices(SIZE[list(order)])
    place = [None, None, None]
    affine = np.eye(4)
    affine[:3, 3] = ORIGIN
    affine[:3, :3] = 0
    for axis, (along, sign) in enumerate(zip(order, signs, strict=True)):
        last = SIZE[along] - 1
        place[along] = index[axis] if sign > 0 else last - index[axis]
        affine[along, axis] = sign * STEP[along]
        if sign < 0:
            affine[along, 3] += last * STEP[along]
    x, y, z = place
    return ANATOMY[z, y, x], affine


def test_there_are_48_orientations():
    """The six orders of axes and eight signs are all different files."""
    assert len({stored(*o)[0].tobytes() + bytes(stored(*o)[0].shape) for o in ORIENTATIONS}) == 48


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_nifti_of_any_orientation_is_read_alike_and_written_back(tmp_path, order, signs):
    """A network must see one anatomy, and a prediction must lie on the voxels of the file it was made of."""
    array, lps = stored(order, signs)
    path = tmp_path / "image.nii.gz"
    save_nifti(path, array, LPS_TO_RAS @ lps)
    volume, grid = read_volume(path)
    np.testing.assert_array_equal(volume, ANATOMY)
    assert grid.spacing == pytest.approx(STEP[::-1])
    assert tuple(grid.shape) == array.shape
    write_volume(tmp_path / "label.nii.gz", volume, grid)
    back = nib.load(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), array)
    np.testing.assert_array_equal(back.affine, nib.load(path).affine)
    np.testing.assert_allclose(back.affine, LPS_TO_RAS @ lps, atol=1e-5)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_metaimage_of_any_orientation_is_read_alike_and_written_back(tmp_path, order, signs):
    """The same with ITK's direction matrix, which is LPS; what is written is NIfTI, which is RAS."""
    array, lps = stored(order, signs)
    spacing = np.abs(lps[:3, :3]).sum(0)
    path = tmp_path / "image.mha"
    save_meta(path, array.transpose(2, 1, 0), spacing, origin=lps[:3, 3], direction=lps[:3, :3] / spacing)
    volume, grid = read_volume(path)
    np.testing.assert_array_equal(volume, ANATOMY)
    assert grid.spacing == pytest.approx(STEP[::-1])
    np.testing.assert_allclose(grid.affine, LPS_TO_RAS @ lps, atol=1e-5)
    write_volume(tmp_path / "label.nii.gz", volume, grid)
    back = nib.load(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), array)
    np.testing.assert_allclose(back.affine, LPS_TO_RAS @ lps, atol=1e-5)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "mha", "mhd", "nrrd"])
def test_suffixes(tmp_path, suffix):
    """One anatomy in every format, and a header that says the same when it is read alone."""
    array, lps = stored((1, 2, 0), (-1, 1, -1))
    path = tmp_path / f"image.{suffix}"
    if suffix.startswith("nii"):
        save_nifti(path, array, LPS_TO_RAS @ lps)
    else:
        spacing = np.abs(lps[:3, :3]).sum(0)
        save_meta(path, array.transpose(2, 1, 0), spacing, origin=lps[:3, 3], direction=lps[:3, :3] / spacing)
    image, grid = read_image(path)
    assert image.shape == (*ANATOMY.shape, 1)
    np.testing.assert_array_equal(image[..., 0], ANATOMY)
    alone = read_grid(path)
    assert tuple(alone.shape) == tuple(grid.shape) == array.shape
    np.testing.assert_allclose(alone.affine, LPS_TO_RAS @ lps, atol=1e-5)


def test_oblique_nifti_goes_to_the_nearest_axes(tmp_path):
    """Tilted acquisitions are turned by whole axes, never resampled, and keep their true affine."""
    array, lps = stored((2, 0, 1), (1, -1, -1))
    a = np.radians(20)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    affine = LPS_TO_RAS @ tilt @ lps
    save_nifti(tmp_path / "image.nii.gz", array, affine)
    volume, grid = read_volume(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(volume, ANATOMY)
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    assert grid.spacing == pytest.approx(STEP[::-1])


def test_nifti_slope_and_intercept_are_applied(tmp_path):
    """Stored integers are not intensities where the header scales them."""
    image = nib.Nifti1Image(ANATOMY.transpose(2, 1, 0).astype(np.int16), LPS_TO_RAS)
    image.header.set_slope_inter(0.5, -20)
    nib.save(image, tmp_path / "image.nii.gz")
    raw = np.asarray(nib.load(tmp_path / "image.nii.gz").dataobj.get_unscaled()).transpose(2, 1, 0)
    volume, _ = read_volume(tmp_path / "image.nii.gz")
    np.testing.assert_allclose(volume, raw * 0.5 - 20)


# -- orientation: DICOM -------------------------------------------------------------------------------------------

ACROSS_DOWN = {  # along a row, down a column; LPS
    "axial": ((1, 0, 0), (0, 1, 0)),
    "axial, turned round": ((-1, 0, 0), (0, -1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "coronal, from the back and upside down": ((-1, 0, 0), (0, 0, 1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "sagittal, from the right and upside down": ((0, -1, 0), (0, 0, 1)),
}


def save_anatomy(folder, across, down, side, *, turn=None, name="IMG-{:05d}.dcm", **tags):
    """The anatomy as a series whose slices follow ``side * across x down``.

    Returns the files in the order of names, and the true place in mm (LPS) of every voxel, (columns, rows, slices, 3).
    """
    across, down = np.array(across), np.array(down)
    normal = side * np.cross(across, down)
    turn = np.eye(3) if turn is None else turn
    start = sum(np.where(d < 0, SIZE - 1, 0) for d in (across, down, normal))
    columns, rows, slices = (int(SIZE @ np.abs(d)) for d in (across, down, normal))
    spacing = [float(STEP @ np.abs(down)), float(STEP @ np.abs(across))]
    paths, places = [], np.zeros((columns, rows, slices, 3))
    for k in range(slices):
        pixels = np.zeros((rows, columns), np.uint16)
        for r, c in itertools.product(range(rows), range(columns)):
            index = start + c * across + r * down + k * normal
            places[c, r, k] = turn @ (ORIGIN + STEP * index)
            x, y, z = index
            pixels[r, c] = ANATOMY[z, y, x]
        paths.append(folder / name.format(k + 1))
        position = [float(f"{v:.8f}") for v in places[0, 0, k]]
        orientation = [float(f"{v:.8f}") for v in (*(turn @ across), *(turn @ down))]
        save_dicom(
            paths[-1],
            pixels,
            ImagePositionPatient=position,
            ImageOrientationPatient=orientation,
            PixelSpacing=spacing,
            **tags,
        )
    return tuple(paths), places


def assert_lies_at(grid, places):
    """The affine takes the indices of the file, in the order of names, to the places in mm."""
    index = np.stack(np.indices(places.shape[:3]), -1)
    assert tuple(grid.shape) == places.shape[:3]
    ras = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    np.testing.assert_allclose(ras, places * [-1, -1, 1], atol=1e-4)


@pytest.mark.parametrize("side", [1, -1], ids=["along the normal", "against it"])
@pytest.mark.parametrize("plane", ACROSS_DOWN)
def test_dicom_of_any_plane_gives_the_anatomy_and_true_positions(tmp_path, plane, side):
    """Names may run against the positions: the volume is the anatomy all the same, and no slice is out of place."""
    paths, places = save_anatomy(tmp_path, *ACROSS_DOWN[plane], side)
    volume, grid = read_volume(paths)
    np.testing.assert_array_equal(volume, ANATOMY)
    assert grid.spacing == pytest.approx(STEP[::-1]), "from positions; SliceThickness says 3.2"
    assert_lies_at(grid, places)
    for k, path in enumerate(paths):
        position = np.array(pydicom.dcmread(path).ImagePositionPatient, float)
        np.testing.assert_allclose(grid.affine @ [0, 0, k, 1], LPS_TO_RAS @ [*position, 1], atol=1e-5)
    np.testing.assert_allclose(read_grid(paths).affine, grid.affine)
    write_volume(tmp_path / "label.nii.gz", volume, grid)
    back = nib.load(tmp_path / "label.nii.gz")
    np.testing.assert_allclose(back.affine, grid.affine, atol=1e-5)
    first = np.stack([pydicom.dcmread(p).pixel_array for p in paths], -1).swapaxes(0, 1)
    np.testing.assert_array_equal(np.asarray(back.dataobj), first)


@pytest.mark.parametrize("side", [1, -1])
def test_oblique_dicom_keeps_its_true_affine(tmp_path, side):
    """A tilted axial series reads as an axial one, and its affine holds the tilt."""
    a = np.radians(15)
    turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    paths, places = save_anatomy(tmp_path, *ACROSS_DOWN["axial"], side, turn=turn)
    volume, grid = read_volume(paths)
    np.testing.assert_array_equal(volume, ANATOMY)
    assert_lies_at(grid, places)
    assert grid.spacing == pytest.approx(STEP[::-1], rel=1e-5)


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"), [(1, -1000, np.uint16), (0.5, -3.25, np.uint16), (2, 7, np.int16)]
)
def test_dicom_rescale(tmp_path, slope, intercept, dtype):
    """HU = stored * slope + intercept, with fractions, and with stored values below zero."""
    values = np.array([[0, 1, 7], [1000, 2434, 33]], dtype) - (5 if dtype == np.int16 else 0)
    values = values.astype(dtype)
    paths = []
    for k in range(2):
        paths.append(tmp_path / f"{k}.dcm")
        position = [0, 0, 2.0 * k]
        save_dicom(paths[-1], values, ImagePositionPatient=position, RescaleSlope=slope, RescaleIntercept=intercept)
    volume, _ = read_volume(tuple(paths))
    np.testing.assert_array_equal(volume, np.stack([values * float(slope) + intercept] * 2))


def test_dicom_rescale_is_that_of_each_slice(tmp_path):
    """Some exports scale every slice by its own slope."""
    values = np.array([[1, 2], [3, 4]], np.uint16)
    for k, slope in enumerate((1, 0.25, 3)):
        save_dicom(tmp_path / f"{k}.dcm", values, ImagePositionPatient=[0, 0, k], RescaleSlope=slope)
    volume, _ = read_volume(tuple(tmp_path / f"{k}.dcm" for k in range(3)))
    np.testing.assert_array_equal(volume, [values * 1.0, values * 0.25, values * 3.0])


def test_dicom_without_rescale_and_with_uids_of_their_own(tmp_path):
    """MR has no rescale tags; a folder is one series whatever its SeriesInstanceUIDs are."""
    for k in range(3):
        save_dicom(
            tmp_path / f"{k}.dcm",
            np.full((2, 2), k, np.uint16),
            ImagePositionPatient=[0, 0, 4.0 * k],
            SeriesInstanceUID=f"1.2.3.{k + 1}",
        )
    volume, grid = read_volume(tuple(tmp_path / f"{k}.dcm" for k in range(3)))
    np.testing.assert_array_equal(volume[:, 0, 0], [0, 1, 2])
    assert grid.spacing == pytest.approx((4, 1, 1))


# -- CHAOS --------------------------------------------------------------------------------------------------------

GREY = np.array([0, 63, 126, 189, 252], np.uint8)  # background, liver, right kidney, left kidney, spleen
FIVE = ("background", "liver", "right kidney", "left kidney", "spleen")


def save_chaos(series, images, names, masks=None, mask_names=None, *, ground=None, step=-2.0, **tags):
    """Slices ``images`` (N, rows, columns) at z = 100, 100 + step, ...; masks go to Ground beside DICOM_anon."""
    for k, (plane, name) in enumerate(zip(images, names, strict=True)):
        save_dicom(series / name, plane.astype(np.uint16), ImagePositionPatient=[0, 0, 100 + k * step], **tags)
    if masks is not None:
        for plane, name in zip(masks, mask_names, strict=True):
            save_png((ground or series.parent / "Ground") / name, plane)


def save_ct(root, number, rng, *, slices=3, ground=True):
    """A CT patient whose liver is where the image is above 500; z falls with the name, as in the data set."""
    images = rng.integers(0, 1000, (slices, 4, 5))
    save_chaos(
        root / "CT" / str(number) / "DICOM_anon",
        images,
        [f"IMG-0002-{k + 1:05d}.dcm" for k in range(slices)],
        images > 500 if ground else None,
        [f"liver_GT_{k:03d}.png" for k in range(slices)],
        Modality="CT",
        RescaleSlope=1,
        RescaleIntercept=-1000,
    )
    return images


def save_mr(root, number, rng, *, slices=3, ground=True):
    """An MR patient with both sequences; the label index of a voxel is its image value // 200, in either sequence."""
    images = {}
    base = root / "MR" / str(number)
    dual = [f"IMG-0004-{2 * k + 2:05d}" for k in range(slices)]
    odd = [f"IMG-0004-{2 * k + 1:05d}" for k in range(slices)]
    single = [f"IMG-0009-{k + 1:05d}" for k in range(slices)]
    for sequence, names in (("T1DUAL", dual), ("T2SPIR", single)):
        image = images[sequence] = rng.integers(0, 1000, (slices, 4, 5))
        dicom = base / sequence / "DICOM_anon"
        save_chaos(
            dicom / "InPhase" if sequence == "T1DUAL" else dicom,
            image,
            [f"{n}.dcm" for n in names],
            GREY[image // 200] if ground else None,
            [f"{n}.png" for n in names],
            ground=base / sequence / "Ground",
            step=6.0,
            EchoTime=4.6 if sequence == "T1DUAL" else 70.0,
        )
        if sequence == "T1DUAL":
            save_chaos(dicom / "OutPhase", image + 3000, [f"{n}.dcm" for n in odd], step=6.0, EchoTime=2.3)
    return images


def test_ct_slices_and_masks_are_paired_by_rank(tmp_path, rng):
    """DICOM names start at 1 and masks at 0; z falls with the name. The k-th belong together, and D runs upwards."""
    images = save_ct(tmp_path, 1, rng, slices=12)
    (case,) = cases_of({"dataset": "chaos", "task": 2}, tmp_path)
    volume = read_case(case)
    assert volume.image.dtype == np.float32 and volume.label.dtype == np.uint8
    np.testing.assert_array_equal(volume.image[..., 0], images[::-1] - 1000)
    np.testing.assert_array_equal(volume.label, images[::-1] > 500)
    np.testing.assert_array_equal(read_label(case), volume.label)
    assert volume.grid.spacing == pytest.approx((2, 1, 1)), "SliceThickness says 3.2"
    np.testing.assert_allclose(volume.grid.affine @ [0, 0, 11, 1], [0, 0, 100 - 11 * 2, 1])


def test_names_are_in_natural_order(tmp_path, rng):
    """img2 comes before img10, in both folders."""
    images = rng.integers(0, 1000, (12, 4, 5))
    save_chaos(
        tmp_path / "CT" / "1" / "DICOM_anon",
        images,
        [f"img{k + 1}.dcm" for k in range(12)],
        images > 500,
        [f"img{k}.png" for k in range(12)],
        step=2.0,
    )
    (case,) = cases_of({"dataset": "chaos", "task": 2}, tmp_path)
    volume = read_case(case)
    np.testing.assert_array_equal(volume.image[..., 0], images)
    np.testing.assert_array_equal(volume.label, images > 500)


def test_files_of_macos_archives_are_ignored(tmp_path, rng):
    """``._*`` files have the suffixes of images and are none."""
    images = save_ct(tmp_path, 1, rng)
    for name in ("DICOM_anon/._IMG-0002-00001.dcm", "Ground/._liver_GT_000.png", "DICOM_anon/.DS_Store"):
        (tmp_path / "CT" / "1" / name).write_bytes(b"\0\5\26\7 Mac OS X")
    (case,) = cases_of({"dataset": "chaos", "task": 2}, tmp_path)
    np.testing.assert_array_equal(read_case(case).label, images[::-1] > 500)


@pytest.mark.parametrize("grey", [True, 1, 63, 255])
def test_ct_masks_of_any_grey_are_liver(tmp_path, rng, grey):
    """One bit, 0/1, 0/63 as in results, 0/255: foreground is what is above 0."""
    images = save_ct(tmp_path, 1, rng)
    masks = images > 500 if grey is True else ((images > 500) * grey).astype(np.uint8)
    for k, plane in enumerate(masks):
        save_png(tmp_path / "CT/1/Ground" / f"liver_GT_{k:03d}.png", plane, "1" if grey is True else "L")
    for task in (1, 2, 4):
        section = {"dataset": "chaos", "task": task}
        case = by_id(section, tmp_path)["CT_1"]
        assert set(np.unique(read_label(case))) == {0, 1}
        np.testing.assert_array_equal(read_label(case) == 1, images[::-1] > 500)
        assert get_dataset(section).labels.structures[1] == "liver"


def test_masks_of_16_bits_are_refused_if_they_have_several_greys(tmp_path):
    """Converted with a factor of 257, every organ would become the brightest one; one grey is the liver of CT."""
    greys = np.array([[0, 63, 126], [189, 252, 0]], np.uint16) * 257
    Image.fromarray(greys).save(tmp_path / "mr.png")
    with pytest.raises(UserError, match=r"mr\.png .*16191.*0 to 255"):
        dicom.load_masks([tmp_path / "mr.png"])
    Image.fromarray((greys > 0).astype(np.uint16) * 65535).save(tmp_path / "ct.png")
    np.testing.assert_array_equal(dicom.load_masks([tmp_path / "ct.png"])[..., 0].T > 0, greys > 0)


@pytest.mark.parametrize("components", [1, 3])
def test_planes_of_metaimage_have_one_slice(components, tmp_path, rng):
    pixels = rng.integers(0, 255, (5, 4, *([3] if components == 3 else []))).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=components == 3), str(tmp_path / "plane.mha"))
    image, grid = read_image(tmp_path / "plane.mha")
    assert image.shape == (1, 5, 4, components) and tuple(grid.shape) == (4, 5, 1)
    np.testing.assert_array_equal(image[0], pixels.reshape(5, 4, components))


def test_mr_labels_are_decoded_by_ranges(tmp_path):
    """(55,70] liver, (110,135] right kidney, (175,200] left kidney, (240,255] spleen, all else background."""
    grey = [0, 1, 55, 56, 63, 70, 71, 110, 111, 126, 135, 136, 175, 176, 189, 200, 201, 240, 241, 252, 255]
    index = [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 0, 0, 3, 3, 3, 0, 0, 4, 4, 4]
    mask = np.array([[grey, grey[::-1]]] * 2, np.uint8)
    save_chaos(
        tmp_path / "MR/1/T2SPIR/DICOM_anon",
        np.ones(mask.shape),
        ["a1.dcm", "a2.dcm"],
        mask,
        ["a1.png", "a2.png"],
        step=5.0,
    )
    dataset = get_dataset({"dataset": "chaos", "task": 5})
    assert dataset.labels.structures == FIVE
    (case,) = [c for c in dataset.scan(tmp_path, True).cases if c.case_id == "MR_1_T2SPIR"]
    np.testing.assert_array_equal(read_label(case), [[index, index[::-1]]] * 2)
    (case,) = cases_of({"dataset": "chaos", "task": 3}, tmp_path)
    liver = [int(i == 1) for i in index]
    np.testing.assert_array_equal(read_label(case), [[liver, liver[::-1]]] * 2)


@pytest.mark.parametrize(
    ("task", "modalities", "structures"),
    [
        (1, ("CT", "MR"), FIVE[:2]),
        (2, ("CT",), FIVE[:2]),
        (3, ("MR",), FIVE[:2]),
        (4, ("CT", "MR"), FIVE),
        (5, ("MR",), FIVE),
    ],
)
def test_chaos_tasks(tmp_path, rng, task, modalities, structures):
    """Which series are cases, by number of the patient, and which structures they have."""
    ct = {n: save_ct(tmp_path, n, rng) for n in (10, 2)}
    mr = {n: save_mr(tmp_path, n, rng) for n in (13, 5)}
    dataset = get_dataset({"dataset": "chaos", "task": task})
    cases = list_cases(dataset, tmp_path, need_labels=True)
    expected = ["CT_2", "CT_10"] if "CT" in modalities else []
    if "MR" in modalities:
        expected += ["MR_5_T1DUAL", "MR_5_T2SPIR", "MR_13_T1DUAL", "MR_13_T2SPIR"]
    assert ids(cases) == expected
    assert dataset.labels.structures == structures
    assert len({c.patient for c in cases}) == 2 * len(modalities)
    for case in cases:
        modality, number, *sequence = case.case_id.split("_")
        assert case.patient == f"{modality}_{number}"
        assert case.info["modality"] == modality
        if modality == "CT":
            expected_label = ct[int(number)][::-1] > 500
        else:
            expected_label = mr[int(number)][sequence[0]] // 200
            if len(structures) == 2:
                expected_label = expected_label == 1
        np.testing.assert_array_equal(read_case(case).label, expected_label, err_msg=case.case_id)


def test_train_and_test_sets(tmp_path, rng):
    """The root may be the archive's folder or one of its two sides; test patients have no reference."""
    save_ct(tmp_path / "Train_Sets", 1, rng)
    save_ct(tmp_path / "Test_Sets", 3, rng, ground=False)
    section = {"dataset": "chaos", "task": 2}
    assert ids(cases_of(section, tmp_path)) == ["CT_1"]
    assert ids(cases_of(section, tmp_path / "Train_Sets")) == ["CT_1"]
    assert len(cases_of(section, tmp_path, need_labels=False)) == 2
    (case,) = cases_of(section, tmp_path / "Test_Sets", need_labels=False)
    assert case.label is None
    volume = read_case(case)
    assert volume.label is None and volume.image.shape == (3, 4, 5, 1)
    with pytest.raises(UserError, match="Ground"):
        cases_of(section, tmp_path / "Test_Sets")


def test_phases(tmp_path, rng):
    """In- and out-phase have one mask between them: one of them, each, or both as channels."""
    image = save_mr(tmp_path, 1, rng)["T1DUAL"]
    label = image // 200

    def read(phase):
        cases = cases_of({"dataset": "chaos", "task": 5, "phase": phase}, tmp_path)
        return {c.case_id: read_case(c) for c in cases if c.info["sequence"] == "T1DUAL"}

    (volume,) = read("in").values()
    np.testing.assert_array_equal(volume.image[..., 0], image)
    np.testing.assert_array_equal(volume.label, label)
    (volume,) = read("out").values()
    np.testing.assert_array_equal(volume.image[..., 0], image + 3000)
    np.testing.assert_array_equal(volume.label, label)
    first, second = read("each").values()
    assert {int(first.image[0, 0, 0, 0]), int(second.image[0, 0, 0, 0])} == {image[0, 0, 0], image[0, 0, 0] + 3000}
    np.testing.assert_array_equal(first.label, label)
    np.testing.assert_array_equal(second.label, label)
    (volume,) = read("both").values()
    np.testing.assert_array_equal(volume.image, np.stack([image, image + 3000], -1))
    np.testing.assert_array_equal(volume.label, label)
    assert get_dataset({"dataset": "chaos", "task": 5, "phase": "both"}).channels == ("in-phase", "out-phase")


@pytest.mark.parametrize("in_phase_is_even", [True, False])
def test_phases_of_one_folder_are_split_by_echo_time(tmp_path, rng, in_phase_is_even):
    """The longer echo is in-phase, whatever the numbers are."""
    images = rng.integers(0, 1000, (3, 4, 5))
    names = [[f"IMG-0004-{2 * k + first:05d}" for k in range(3)] for first in (1, 2)]
    out, even = names if in_phase_is_even else names[::-1]
    dicom = tmp_path / "MR/1/T1DUAL/DICOM_anon"
    masks = [f"{n}.png" for n in even]
    save_chaos(dicom, images, [f"{n}.dcm" for n in even], GREY[images // 200], masks, step=6.0, EchoTime=4.6)
    save_chaos(dicom, images + 3000, [f"{n}.dcm" for n in out], step=6.0, EchoTime=2.3)
    (case,) = cases_of({"dataset": "chaos", "task": 5, "phase": "in"}, tmp_path)
    volume = read_case(case)
    np.testing.assert_array_equal(volume.image[..., 0], images)
    np.testing.assert_array_equal(volume.label, images // 200)
    (case,) = cases_of({"dataset": "chaos", "task": 5, "phase": "out"}, tmp_path)
    np.testing.assert_array_equal(read_case(case).image[..., 0], images + 3000)


def test_phases_that_do_not_fit_are_refused(tmp_path, rng):
    """Both phases share one mask, so a slice more in one of them must not pass."""
    save_mr(tmp_path, 1, rng)
    extra = tmp_path / "MR/1/T1DUAL/DICOM_anon/OutPhase/IMG-0004-00007.dcm"
    save_dicom(extra, np.zeros((4, 5), np.uint16), ImagePositionPatient=[0, 0, 118], EchoTime=2.3)
    with pytest.raises(UserError, match="slices"):
        cases_of({"dataset": "chaos", "task": 5}, tmp_path)


def test_phases_of_different_size_are_refused(tmp_path, rng):
    """An out-phase of another matrix does not fit the mask, which is drawn on the in-phase."""
    save_mr(tmp_path, 1, rng)
    out = tmp_path / "MR/1/T1DUAL/DICOM_anon/OutPhase"
    for k, path in enumerate(sorted(out.iterdir())):
        save_dicom(path, np.zeros((5, 5), np.uint16), ImagePositionPatient=[0, 0, 100 + 6 * k], EchoTime=2.3)
    for phase, sizes in (("out", "4 x 5 .* 5 x 5"), ("both", r"\(5, 5, 3\).*\(5, 4, 3\)")):
        (case,) = (
            c
            for c in cases_of({"dataset": "chaos", "task": 5, "phase": phase}, tmp_path)
            if c.info["sequence"] == "T1DUAL"
        )
        with pytest.raises(UserError, match=sizes):
            read_case(case)


def test_a_missing_mask_is_refused(tmp_path, rng):
    """With one mask less, pairing by rank would shift all the others."""
    save_ct(tmp_path, 1, rng)
    (tmp_path / "CT/1/Ground/liver_GT_001.png").unlink()
    with pytest.raises(UserError, match="2 masks for the 3 slices"):
        cases_of({"dataset": "chaos", "task": 2}, tmp_path)


# -- CAMUS --------------------------------------------------------------------------------------------------------

CAMUS = {"dataset": "camus", "views": ("2CH", "4CH"), "instants": ("ED", "ES"), "quality": ("Good", "Medium", "Poor")}
ROWS, COLUMNS = 6, 4
DEPTH_MM, LATERAL_MM = 0.154, 0.308
CODES = {("2CH", "ED"): 0, ("2CH", "ES"): 1, ("4CH", "ED"): 2, ("4CH", "ES"): 3}


def frame(code):
    """A picture (rows, columns) whose values tell row, column and which picture it is, and its labels."""
    row, column = np.indices((ROWS, COLUMNS))
    return (60 * code + 10 * row + column).astype(np.uint8), ((row + 2 * column + code) % 4).astype(np.uint8)


def save_ultrasound(path, array):
    """``array`` is (rows, columns) or (frames, rows, columns): NIfTI has (x, y[, t]), MetaImage always three axes."""
    if ".nii" in path.name:
        affine = np.diag([-LATERAL_MM, -DEPTH_MM, 1, 1])  # the signs are those of the release; they mean nothing
        save_nifti(path, array.transpose(*range(array.ndim)[::-1]), affine)
    else:
        save_meta(path, array if array.ndim == 3 else array[None], (LATERAL_MM, DEPTH_MM, 1))


def cfg(frames=4, *, reverse=False, quality="Good", **more):
    ed, es = (frames, 1) if reverse else (1, frames)
    facts = {"ED": ed, "ES": es, "NbFrame": frames, "Sex": "F", "Age": 56, "ImageQuality": quality} | more
    return "".join(f"{key}: {value}\n" for key, value in facts.items())


def save_patient(folder, *, suffix=".nii.gz", views=("2CH", "4CH"), frames=0, reverse=False, gt=True, info=None):
    """One patient in ``folder``, which has his name."""
    name = folder.name
    for view in views:
        pictures = {i: frame(CODES[view, i]) for i in ("ED", "ES")}
        if frames:
            between = [frame(CODES[view, "ED"])[0] // 2 + k for k in range(frames - 2)]
            images = np.stack([pictures["ED"][0], *between, pictures["ES"][0]])
            labels = np.stack([pictures["ED"][1], *([pictures["ES"][1]] * (frames - 1))])
            order = slice(None, None, -1 if reverse else 1)
            pictures["half_sequence"] = images[order], labels[order]
        for instant, (image, label) in pictures.items():
            save_ultrasound(folder / f"{name}_{view}_{instant}{suffix}", image)
            if gt:
                save_ultrasound(folder / f"{name}_{view}_{instant}_gt{suffix}", label)
        text = cfg(frames or 4, reverse=reverse, EF=55) if info is None else info
        (folder / f"Info_{view}.cfg").write_bytes(text.encode())


@pytest.mark.parametrize("suffix", [".nii.gz", ".mhd"])
def test_camus_is_read_as_stored(tmp_path, suffix):
    """Rows go away from the probe in either release, whatever signs the affine has; spacing is (row, column)."""
    parent = "database_nifti" if suffix == ".nii.gz" else "training"
    for n in (1, 2):
        save_patient(tmp_path / parent / f"patient000{n}", suffix=suffix)
    (tmp_path / parent / "patient0001" / "MANDATORY_CITATION.md").write_text("cite")
    cases = by_id(CAMUS, tmp_path)
    assert list(cases) == [
        f"patient000{n}_{view}_{instant}" for n in (1, 2) for view in ("2CH", "4CH") for instant in ("ED", "ES")
    ]
    assert {c.patient for c in cases.values()} == {"patient0001", "patient0002"}
    for (view, instant), code in CODES.items():
        case = cases[f"patient0002_{view}_{instant}"]
        assert (case.info["view"], case.info["instant"]) == (view, instant)
        volume = read_case(case)
        image, label = frame(code)
        np.testing.assert_array_equal(volume.image, image[None, ..., None])
        np.testing.assert_array_equal(volume.label, label[None])
        assert volume.image.dtype == np.float32
        assert volume.grid.spacing[1:] == pytest.approx((DEPTH_MM, LATERAL_MM))
    structures = get_dataset(CAMUS).labels.structures
    assert structures == ("background", "LV cavity", "myocardium", "left atrium")


@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_camus_prediction_has_the_axes_of_its_file(tmp_path, signs):
    """A 2D NIfTI file goes back to a 2D one with the same affine."""
    image, _ = frame(1)
    affine = np.diag([signs[0] * LATERAL_MM, signs[1] * DEPTH_MM, 1, 1])
    save_nifti(tmp_path / "patient0001" / "patient0001_2CH_ED.nii.gz", image.T, affine)
    (case,) = cases_of(CAMUS, tmp_path, need_labels=False)
    volume = read_case(case)
    np.testing.assert_array_equal(volume.image[0, ..., 0], image)
    write_volume(tmp_path / "label.nii.gz", volume.image[..., 0].astype(np.uint8), volume.grid)
    back = nib.load(tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), image.T)
    np.testing.assert_allclose(back.affine, affine, atol=1e-6)


def test_camus_nifti_of_three_axes(tmp_path):
    """Copies exist whose single frames have a third axis of 1; predictions keep it."""
    image, label = frame(0)
    affine = np.diag([-LATERAL_MM, -DEPTH_MM, 1, 1])
    for end, array in (("", image), ("_gt", label)):
        save_nifti(tmp_path / "patient0001" / f"patient0001_2CH_ED{end}.nii.gz", array.T[..., None], affine)
    (case,) = cases_of(CAMUS, tmp_path)
    volume = read_case(case)
    np.testing.assert_array_equal(volume.image, image[None, ..., None])
    np.testing.assert_array_equal(volume.label, label[None])
    write_volume(tmp_path / "label.nii.gz", volume.label, volume.grid)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj), label.T[..., None])


def test_camus_metaimage_of_two_axes(tmp_path):
    """Copies exist whose single frames have lost the third axis."""
    image, label = frame(0)
    for end, array in (("", image), ("_gt", label)):
        save_meta(tmp_path / "patient0001" / f"patient0001_2CH_ED{end}.mhd", array, (LATERAL_MM, DEPTH_MM))
    (case,) = cases_of(CAMUS, tmp_path)
    volume = read_case(case)
    np.testing.assert_array_equal(volume.image[0, ..., 0], image)
    np.testing.assert_array_equal(volume.label[0], label)
    assert volume.grid.spacing[1:] == pytest.approx((DEPTH_MM, LATERAL_MM))


@pytest.mark.parametrize("root", ["CAMUS_public", "CAMUS_public/database_nifti", "."])
def test_camus_root_may_be_the_release_or_the_folder_of_patients(tmp_path, root):
    """Users give either, or the folder above."""
    save_patient(tmp_path / "CAMUS_public/database_nifti/patient0001")
    assert len(cases_of(CAMUS, tmp_path / root)) == 4


def test_camus_test_patients_restart_numbering(tmp_path):
    """training/patient0001 and testing/patient0001 are two people, the second perhaps without a reference."""
    save_patient(tmp_path / "training/patient0001", suffix=".mhd")
    save_patient(tmp_path / "testing/patient0001", suffix=".mhd", gt=False)
    cases = cases_of(CAMUS, tmp_path, need_labels=False)
    assert len(cases) == len(set(ids(cases))) == 8
    assert len({c.patient for c in cases}) == 2
    assert sum(c.label is None for c in cases) == 4
    labelled = cases_of(CAMUS, tmp_path)
    assert len(labelled) == 4 and all("training" in str(c.images[0]) for c in labelled)
    save_patient(tmp_path / "testing/patient0001", suffix=".mhd", gt=True)
    assert len(cases_of(CAMUS, tmp_path)) == 8


def test_camus_cfg_is_read_tolerantly(tmp_path):
    """Split at the first colon, strip; blank lines, lines without a colon and unknown keys do no harm."""
    text = "\r\n".join(
        [
            "ED : 1",
            "",
            "ES:4",
            "\tNbFrame:   4  ",
            "Sex: F",
            "   ",
            "ImageQuality :  Good ",
            "EF: 55.5",
            "no colon here",
            "Remark: seen at 12:30",
            "Probe: unknown",
            "",
        ]
    )
    save_patient(tmp_path / "patient0001", info=text)
    case = cases_of(CAMUS | {"quality": ("Good",)}, tmp_path)[0]
    expected = {"ED": "1", "ES": "4", "NbFrame": "4", "ImageQuality": "Good", "EF": "55.5", "Remark": "seen at 12:30"}
    assert {key: case.info[key] for key in expected} == expected


def test_camus_old_keys(tmp_path):
    """The older release says LVef where the newer says EF."""
    text = cfg(LVedv=110.5, LVesv=48.1, LVef=56.5)
    save_patient(tmp_path / "training/patient0001", suffix=".mhd", info=text)
    info = cases_of(CAMUS, tmp_path)[0].info
    assert float(info["EF"]) == 56.5
    assert float(info["LVef"]) == 56.5 and float(info["LVedv"]) == 110.5


def test_a_frame_number_beyond_the_frames_says_nothing_about_the_direction(tmp_path):
    found = {**CAMUS, "instants": ("half_sequence", "ED")}
    save_patient(tmp_path / "patient0002", frames=4, info=cfg(4).replace("ED: 1", "ED: 9"))
    cases = by_id(found, tmp_path)
    sequence = cases["patient0002_4CH_half_sequence"]
    assert sequence.axes == "stored" and "ED" not in sequence.info and sequence.info["ES"] == "4"


def test_camus_quality_is_that_of_each_view(tmp_path):
    """A patient's views differ in quality; the filter takes images, not patients."""
    folders = [tmp_path / "database_nifti" / f"patient000{n}" for n in (1, 2)]
    for folder in folders:
        save_patient(folder)
    for folder, view, quality in (
        (folders[0], "2CH", "Good"),
        (folders[0], "4CH", "Poor"),
        (folders[1], "2CH", "Medium"),
        (folders[1], "4CH", "Good"),
    ):
        (folder / f"Info_{view}.cfg").write_text(cfg(quality=quality))

    def chosen(*quality):
        return {c.case_id[:15] for c in cases_of(CAMUS | {"quality": quality}, tmp_path)}

    assert chosen("Good") == {"patient0001_2CH", "patient0002_4CH"}
    assert chosen("Poor", "Medium") == {"patient0001_4CH", "patient0002_2CH"}
    assert len(chosen("Good", "Medium", "Poor")) == 4


@pytest.mark.parametrize("suffix", [".nii.gz", ".mhd"])
@pytest.mark.parametrize("reverse", [False, True])
def test_camus_half_sequence_starts_at_ed(tmp_path, suffix, reverse):
    """Where ED is the last frame, frames are read backwards, and predictions go back to the order of the file."""
    save_patient(tmp_path / "patient0007", suffix=suffix, frames=5, reverse=reverse)
    cases = by_id(CAMUS | {"instants": ("ED", "ES", "half_sequence")}, tmp_path)
    assert len(cases) == 6
    ed, es, half = (read_case(cases[f"patient0007_4CH_{i}"]) for i in ("ED", "ES", "half_sequence"))
    assert half.image.shape == (5, ROWS, COLUMNS, 1)
    np.testing.assert_array_equal(ed.image[0, ..., 0], frame(2)[0], "single frames are right as they are")
    np.testing.assert_array_equal(es.image[0, ..., 0], frame(3)[0])
    np.testing.assert_array_equal(half.image[[0, -1]], np.concatenate([ed.image, es.image]))
    np.testing.assert_array_equal(half.label[[0, -1]], np.concatenate([ed.label, es.label]))
    np.testing.assert_array_equal(half.label[0], frame(2)[1])
    assert half.grid.spacing[1:] == pytest.approx((DEPTH_MM, LATERAL_MM))
    np.testing.assert_array_equal(read_label(cases["patient0007_4CH_half_sequence"]), half.label)
    write_volume(tmp_path / "label.nii.gz", half.label, half.grid)
    back = np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj)
    order = slice(None, None, -1 if reverse else 1)
    np.testing.assert_array_equal(back.transpose(2, 1, 0), half.label[order])


def test_camus_sequence_by_its_older_name(tmp_path):
    """The older release says ``sequence``, without a reference for its frames."""
    folder = tmp_path / "training/patient0001"
    save_patient(folder, suffix=".mhd")
    frames = np.stack([frame(0)[0], frame(1)[0]])
    save_ultrasound(folder / "patient0001_2CH_sequence.mhd", frames)
    section = CAMUS | {"views": ("2CH",), "instants": ("half_sequence",)}
    (case,) = cases_of(section, tmp_path, need_labels=False)
    np.testing.assert_array_equal(read_case(case).image[..., 0], frames)


def test_camus_missing_views_leave_the_others_usable(tmp_path):
    """Every image is a case of its own; a copy that lacks one is no reason to stop."""
    for n in (1, 2, 3):
        save_patient(tmp_path / f"database_nifti/patient000{n}", views=("2CH",) if n == 2 else ("2CH", "4CH"))
    for path in (tmp_path / "database_nifti/patient0003").glob("*_2CH_ES*"):
        path.unlink()
    scan = scan_cases(get_dataset(CAMUS), tmp_path, need_labels=True)
    problems = [(p.kind, p.case_id) for p in scan.problems]
    assert problems == [("missing_view", "patient0002")] * 2 + [("missing_view", "patient0003")]
    cases = cases_of(CAMUS, tmp_path)
    assert [sum(c.patient == f"patient000{n}" for c in cases) for n in (1, 2, 3)] == [4, 2, 3]
    for case in cases:
        read_case(case)


def test_camus_flat_copy(tmp_path):
    """Some public copies have all files in one folder."""
    for n in (1, 2):
        save_patient(tmp_path / f"made/patient000{n}")
        for path in (tmp_path / f"made/patient000{n}").glob("patient*"):
            (tmp_path / "flat").mkdir(exist_ok=True)
            path.rename(tmp_path / "flat" / path.name)
    cases = by_id(CAMUS, tmp_path / "flat")
    assert len(cases) == 8
    np.testing.assert_array_equal(read_case(cases["patient0002_4CH_ES"]).image[0, ..., 0], frame(3)[0])


def test_camus_flat_copy_does_not_share_one_cfg(tmp_path):
    """In one folder the cfg files of all patients have one name: which patient the last one is of is not known.

    Its quality would choose images, and its ED and ES would turn sequences, of all the others.
    """
    for n in (1, 2):
        save_patient(tmp_path / f"made/patient000{n}", frames=3, reverse=n == 2)
        (tmp_path / "flat").mkdir(exist_ok=True)
        for path in (tmp_path / f"made/patient000{n}").iterdir():
            path.replace(tmp_path / "flat" / path.name)
    cases = by_id(CAMUS | {"instants": ("ED", "half_sequence")}, tmp_path / "flat")
    assert "ImageQuality" not in cases["patient0001_2CH_ED"].info
    half, ed = (read_case(cases[f"patient0001_2CH_{part}"]) for part in ("half_sequence", "ED"))
    np.testing.assert_array_equal(half.image[0], ed.image[0])


def test_camus_chosen_views_and_instants(tmp_path):
    save_patient(tmp_path / "patient0001", frames=3)
    assert ids(cases_of(CAMUS | {"views": ("4CH",), "instants": ("ES",)}, tmp_path)) == ["patient0001_4CH_ES"]
    section = CAMUS | {"instants": ("half_sequence",)}
    assert ids(cases_of(section, tmp_path)) == ["patient0001_2CH_half_sequence", "patient0001_4CH_half_sequence"]


def test_camus_split_of_the_release(tmp_path):
    """The split is read from the files, blank lines and trailing spaces included, and never from ranges."""
    for n in (1, 2, 3):
        save_patient(tmp_path / f"database_nifti/patient000{n}")
    folder = tmp_path / "database_split"
    folder.mkdir()
    sides = {"training": "patient0003\n\n", "validation": "patient0001 \r\n", "testing": "patient0002"}
    for side, text in sides.items():
        (folder / f"subgroup_{side}.txt").write_bytes(text.encode())
    for root in (tmp_path, tmp_path / "database_nifti"):
        (split,) = scan_cases(get_dataset(CAMUS), root, need_labels=True).splits
        assert {side: tuple(names) for side, names in split.items()} == {
            "training": ("patient0003",),
            "validation": ("patient0001",),
            "testing": ("patient0002",),
        }


def test_camus_ten_folds_of_the_older_release(tmp_path):
    """subGroup10 is the tenth fold, not the second."""
    names = [f"patient{n:04d}" for n in range(1, 11)]
    for name in names:
        save_patient(tmp_path / "training" / name, suffix=".mhd", views=("2CH",))
    folder = tmp_path / "listSubGroups"
    folder.mkdir()
    for k in range(10):
        turned = names[k:] + names[:k]
        parts = {"testing": turned[:1], "validation": turned[1:2], "training": turned[2:]}
        for side, part in parts.items():
            (folder / f"subGroup{k + 1}_{side}.txt").write_text("\n".join(part))
    splits = scan_cases(get_dataset(CAMUS), tmp_path, need_labels=True).splits
    assert [s["testing"] for s in splits] == [(name,) for name in names]
    assert all(len(s["training"]) == 8 for s in splits)


# -- BraTS --------------------------------------------------------------------------------------------------------

BRATS_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # stored LPS, as the challenge's files are
BRATS_AFFINE[1, 3] = 239
OLD, NEW = ("flair", "t1", "t1ce", "t2"), ("t2f", "t1n", "t1c", "t2w")


def save_brats(folder, parts=OLD, between="_", *, values=(0, 1, 2, 4), suffix=".nii.gz", seg=True, dtype=np.uint8):
    """A case whose modality m at (x, y, z) is 1000 m + 100 x + 10 y + z, and its label values (x, y, z)."""
    x, y, z = np.indices((5, 4, 3))
    for m, part in enumerate(parts):
        image = (1000 * m + 100 * x + 10 * y + z).astype(np.int16)
        save_nifti(folder / f"{folder.name}{between}{part}{suffix}", image, BRATS_AFFINE)
    label = np.array(values, np.uint8)[(x + y + z) % len(values)]
    if seg:
        save_nifti(folder / f"{folder.name}{between}seg{suffix}", label.astype(dtype), BRATS_AFFINE)
    return label


def assert_is_brats(case, label, structures):
    """Channels flair, t1, t1ce, t2; axes z, y, x as stored; ``structures`` maps a value of the file to its name."""
    x, y, z = np.indices((5, 4, 3))
    volume = read_case(case)
    assert volume.image.shape == (3, 4, 5, 4) and volume.image.dtype == np.float32
    for m in range(4):
        np.testing.assert_array_equal(volume.image[..., m], (1000 * m + 100 * x + 10 * y + z).transpose(2, 1, 0))
    names = np.array(case.labels.structures)[volume.label]
    for value, name in structures.items():
        np.testing.assert_array_equal(names == name, label.transpose(2, 1, 0) == value)


OLD_TISSUES, NEW_TISSUES = {1: "NCR", 2: "ED", 4: "ET"}, {1: "NCR", 2: "ED", 3: "ET"}


@pytest.mark.parametrize(
    "layout", ["BraTS2021_Training_Data", "MICCAI_BraTS2020_TrainingData", "MICCAI_BraTS_2019_Data_Training"]
)
def test_brats_layouts_up_to_2022(tmp_path, layout):
    """2021; 2020 with its tables; 2019, which parts cases by grade; and copies that are not compressed."""
    root = tmp_path / layout
    suffix = ".nii.gz"
    if "2021" in layout:
        folders = [root / "BraTS2021_00000", root / "BraTS2021_00003"]
    elif "2020" in layout:
        folders, suffix = [root / "BraTS20_Training_001", root / "BraTS20_Training_355"], ".nii"
        root.mkdir()
        for name in ("name_mapping.csv", "survival_info.csv"):
            (root / name).write_text("a,b\n")
    else:
        folders = [root / "HGG/BraTS19_CBICA_AAB_1", root / "LGG/BraTS19_TCIA09_141_1"]
    labels = [save_brats(folder, suffix=suffix) for folder in folders]
    if "2020" in layout:
        (folders[1] / "BraTS20_Training_355_seg.nii").rename(folders[1] / "W39_1998.09.19_Segm.nii")
    cases = cases_of({"dataset": "brats", "convention": "brats2021"}, root)
    assert ids(cases) == [folder.name for folder in folders]
    assert len({c.patient for c in cases}) == 2
    for case, label in zip(cases, labels, strict=True):
        assert_is_brats(case, label, OLD_TISSUES)


def test_brats_2023_names_and_time_points(tmp_path):
    """t2f is flair, t1n t1, t1c t1ce, t2w t2; the last field is the time point, so two folders are one patient."""
    root = tmp_path / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    names = ["BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000"]
    labels = [save_brats(root / name, NEW, "-", values=(0, 1, 2, 3)) for name in names]
    cases = cases_of({"dataset": "brats", "convention": "brats2023"}, root)
    assert ids(cases) == names
    assert cases[0].patient == cases[1].patient != cases[2].patient
    for case, label in zip(cases, labels, strict=True):
        assert_is_brats(case, label, NEW_TISSUES)


def test_brats_2024_has_a_resection_cavity(tmp_path):
    """4 is RC here and ET up to 2022; RC is no part of WT or TC."""
    label = save_brats(tmp_path / "BraTS-GLI-00005-100", NEW, "-", values=(0, 1, 2, 3, 4))
    dataset = get_dataset({"dataset": "brats", "convention": "brats2024"})
    (case,) = list_cases(dataset, tmp_path, need_labels=True)
    structures = case.labels.structures
    assert "RC" in structures and len(structures) == 5
    assert_is_brats(case, label, {3: "ET", 4: "RC"})
    cavity = structures.index("RC")
    assert all(cavity not in dataset.regions.sets[name] for name in ("WT", "TC", "ET"))


def test_brats_labels_of_any_type(tmp_path):
    """Copies store labels as floats, a little off; they are rounded before they are compared."""
    folder = tmp_path / "BraTS2021_00001"
    label = save_brats(folder, dtype=np.float32)
    save_nifti(folder / "BraTS2021_00001_seg.nii.gz", (label * np.float32(1.00001)).astype(np.float32), BRATS_AFFINE)
    (case,) = cases_of({"dataset": "brats", "convention": "brats2021"}, tmp_path)
    assert_is_brats(case, label, OLD_TISSUES)


@pytest.mark.parametrize(
    ("convention", "parts", "between", "values", "wrong"),
    [("brats2021", OLD, "_", (0, 1, 2, 3), "3"), ("brats2023", NEW, "-", (0, 1, 2, 3, 4), "4")],
)
def test_brats_labels_of_another_convention_are_refused(tmp_path, convention, parts, between, values, wrong):
    """3 does not occur up to 2022, nor 4 in 2023; which convention it is cannot be guessed."""
    name = "BraTS2021_00001" if between == "_" else "BraTS-GLI-00001-000"
    save_brats(tmp_path / name, parts, between, values=values)
    (case,) = cases_of({"dataset": "brats", "convention": convention}, tmp_path)
    for read in (read_case, read_label):
        with pytest.raises(UserError, match=rf"label {wrong}\b"):
            read(case)


def test_brats_root_may_be_one_case(tmp_path):
    """To look at a single folder."""
    label = save_brats(tmp_path / "BraTS2021_00001")
    (case,) = cases_of({"dataset": "brats", "convention": "brats2021"}, tmp_path / "BraTS2021_00001")
    assert_is_brats(case, label, OLD_TISSUES)


def test_brats_validation_has_no_seg(tmp_path):
    save_brats(tmp_path / "BraTS2021_00001", seg=False)
    section = {"dataset": "brats", "convention": "brats2021"}
    (case,) = cases_of(section, tmp_path, need_labels=False)
    assert case.label is None and read_case(case).label is None
    with pytest.raises(UserError, match="seg"):
        cases_of(section, tmp_path)


# -- nnU-Net and Decathlon ----------------------------------------------------------------------------------------


def save_raw(root, card, cases=("a", "b"), *, channels=1, suffix=".nii.gz", values=(0, 1, 2), flat=False):
    """nnU-Net's raw format with a non-trivial orientation: channel c of a case is the anatomy + c."""
    save_json(root / "dataset.json", card)
    labels = np.array(values, np.uint8)[ANATOMY % len(values)]
    for case in cases:
        files = {f"imagesTr/{case}_{c:04d}": ANATOMY.astype(np.int16) + c for c in range(channels)}
        files[f"labelsTr/{case}"] = labels
        for name, array in files.items():
            array = array[0] if flat else array
            save_as(root / f"{name}{suffix}", array)
    return labels[:1] if flat else labels


def save_as(path, array):
    """An array (z, y, x) in LPS, or (y, x), in the format of the suffix; volumes are stored upside down."""
    flat = array.ndim == 2
    if ".nii" in path.name:
        if flat:
            return save_nifti(path, array.T, np.diag([*STEP[:2], 1.0, 1.0]))
        affine = LPS_TO_RAS @ np.array(
            [[1, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, -2.5, 2.5 * (len(array) - 1)], [0, 0, 0, 1]]
        )
        return save_nifti(path, array[::-1].transpose(2, 1, 0), affine)
    if flat:
        return save_meta(path, array, STEP[:2])
    origin = (0, 0, 2.5 * (len(array) - 1))
    return save_meta(path, array[::-1], STEP, origin=origin, direction=np.diag([1, 1, -1]))


V2 = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "liver": 1, "spleen": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def section(name, root):
    return {"dataset": name, "root": str(root)}


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nii", ".nrrd"])
def test_nnunet_v2(tmp_path, ending):
    """One file per channel, names from channel_names, and the file ending that the description gives."""
    labels = save_raw(tmp_path, V2 | {"file_ending": ending}, channels=2, suffix=ending)
    dataset = get_dataset(section("nnunet", tmp_path))
    assert dataset.channels == ("T1", "T2")
    assert dataset.labels.structures == ("background", "liver", "spleen")
    cases = list_cases(dataset, tmp_path, need_labels=True)
    assert ids(cases) == ["a", "b"]
    for case in cases:
        volume = read_case(case)
        np.testing.assert_array_equal(volume.image, np.stack([ANATOMY, ANATOMY.astype(float) + 1], -1))
        np.testing.assert_array_equal(volume.label, labels)
        assert volume.grid.spacing == pytest.approx(STEP[::-1])


def test_nnunet_label_on_another_grid_is_refused(tmp_path):
    """The same array upside down and elsewhere is another anatomy, though the shapes agree."""
    save_raw(tmp_path, V2, channels=2)
    image = nib.load(tmp_path / "labelsTr/a.nii.gz")
    for affine in (image.affine @ np.diag([1, -1, 1, 1]), image.affine + np.eye(4)[:, [1, 2, 3, 0]]):
        save_nifti(tmp_path / "labelsTr/a.nii.gz", np.asarray(image.dataobj), affine)
        with pytest.raises(UserError, match=r"labelsTr/a\.nii\.gz"):
            read_case(cases_of(section("nnunet", tmp_path), tmp_path)[0])


def test_nnunet_v2_region_labels(tmp_path):
    """A label may be a list of values: regions that lie inside one another."""
    card = V2 | {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        "regions_class_order": [1, 2, 3],
    }
    labels = save_raw(tmp_path, card, values=(0, 1, 2, 3))
    dataset = get_dataset(section("nnunet", tmp_path))
    label = read_case(list_cases(dataset, tmp_path, need_labels=True)[0]).label
    assert set(dataset.regions.sets) == {"whole", "core", "enhancing"}
    for name, values in (("whole", (1, 2, 3)), ("core", (2, 3)), ("enhancing", (3,))):
        np.testing.assert_array_equal(np.isin(label, dataset.regions.sets[name]), np.isin(labels, values), name)


def test_nnunet_v1(tmp_path):
    """``modality`` in place of channel_names, labels from value to name, and a list of the training files."""
    card = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "numTraining": 2,
        "numTest": 1,
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in "ab"],
        "test": ["./imagesTs/c.nii.gz"],
    }
    labels = save_raw(tmp_path, card)
    save_as(tmp_path / "imagesTs/c_0000.nii.gz", ANATOMY)
    dataset = get_dataset(section("nnunet", tmp_path))
    assert dataset.channels == ("CT",) and dataset.labels.structures == ("background", "liver", "spleen")
    cases = list_cases(dataset, tmp_path, need_labels=True)
    assert ids(cases) == ["a", "b"]
    np.testing.assert_array_equal(read_case(cases[0]).label, labels)
    cases = list_cases(dataset, tmp_path, need_labels=False)
    assert ids(cases) == ["a", "b", "c"] and cases[2].label is None
    np.testing.assert_array_equal(read_case(cases[2]).image[..., 0], ANATOMY)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_nnunet_of_2d_images(tmp_path, ending):
    """A file of two axes is one slice as it is stored, and is written back with two axes."""
    labels = save_raw(tmp_path, V2 | {"file_ending": ending}, channels=2, suffix=ending, flat=True)
    case = cases_of(section("nnunet", tmp_path), tmp_path)[0]
    volume = read_case(case)
    assert volume.image.shape == (1, 4, 3, 2)
    np.testing.assert_array_equal(volume.image[..., 0], ANATOMY[:1])
    np.testing.assert_array_equal(volume.label, labels)
    assert volume.grid.spacing[1:] == pytest.approx((1.5, 1.0))
    write_volume(tmp_path / "label.nii.gz", volume.label, volume.grid)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj), labels[0].T)


def test_nnunet_case_names_with_digits_and_underscores(tmp_path):
    """Only the last four digits are the channel's number."""
    names = ("liver_0001_07", "liver_2", "p.3_x")
    save_raw(tmp_path, V2, names, channels=2)
    cases = cases_of(section("nnunet", tmp_path), tmp_path)
    assert sorted(ids(cases)) == sorted(names)
    assert all(len(c.images) == 2 for c in cases)


def test_nnunet_label_values_need_not_be_consecutive(tmp_path):
    """Structures have indices in memory; the values of the files come back when a prediction is written."""
    card = V2 | {"labels": {"background": 0, "liver": 63, "spleen": 252}}
    labels = save_raw(tmp_path, card, channels=2, values=(0, 63, 252))
    case = cases_of(section("nnunet", tmp_path), tmp_path)[0]
    label = read_case(case).label
    assert np.array(case.labels.structures)[label][labels == 252].tolist() == ["spleen"] * (labels == 252).sum()
    assert set(np.unique(label)) == {0, 1, 2}


def test_nnunet_missing_channel_or_label_is_refused(tmp_path):
    save_raw(tmp_path, V2, channels=2)
    (tmp_path / "imagesTr/a_0001.nii.gz").unlink()
    (tmp_path / "labelsTr/b.nii.gz").unlink()
    with pytest.raises(UserError, match=r"(?s)a_0001.*T2") as error:
        cases_of(section("nnunet", tmp_path), tmp_path)
    assert "labelsTr" in str(error.value), "all findings at once"


def test_nnunet_splits_final(tmp_path):
    """nnU-Net's own file of folds, with its words train and val."""
    save_raw(tmp_path, V2, ("a", "b", "c"), channels=2)
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    save_json(tmp_path / "splits_final.json", folds)
    splits = scan_cases(get_dataset(section("nnunet", tmp_path)), tmp_path, need_labels=True).splits
    assert [(tuple(s["training"]), tuple(s["validation"])) for s in splits] == [
        (("a", "b"), ("c",)),
        (("b", "c"), ("a",)),
    ]


@pytest.mark.parametrize("count", [1, 4])
def test_decathlon(tmp_path, count):
    """One file per case, channels along a fourth axis if there are several; archives hold files of macOS."""
    names = ["BRATS_001", "BRATS_002"]
    card = {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": {str(c): f"m{c}" for c in range(count)},
        "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "numTraining": 2,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/BRATS_485.nii.gz"],
    }
    save_json(tmp_path / "dataset.json", card)
    array, lps = stored((1, 0, 2), (-1, 1, -1))
    image = np.stack([array.astype(np.int16) + 1000 * c for c in range(count)], -1)
    for path in (*(f"imagesTr/{n}" for n in names), "imagesTs/BRATS_485"):
        save_nifti(tmp_path / f"{path}.nii.gz", image if count > 1 else image[..., 0], LPS_TO_RAS @ lps)
        (tmp_path / path).with_name(f"._{Path(path).name}.nii.gz").write_bytes(b"Mac OS X")
    for name in names:
        save_nifti(tmp_path / f"labelsTr/{name}.nii.gz", array % 3, LPS_TO_RAS @ lps)
        (tmp_path / f"labelsTr/._{name}.nii.gz").write_bytes(b"Mac OS X")
    dataset = get_dataset(section("decathlon", tmp_path))
    assert dataset.channels == tuple(f"m{c}" for c in range(count))
    assert dataset.labels.structures == ("background", "edema", "tumour")
    cases = list_cases(dataset, tmp_path, need_labels=True)
    assert ids(cases) == names
    for case in cases:
        volume = read_case(case)
        assert volume.image.shape == (*ANATOMY.shape, count)
        for c in range(count):
            np.testing.assert_array_equal(volume.image[..., c], ANATOMY.astype(int) + 1000 * c)
        np.testing.assert_array_equal(volume.label, ANATOMY % 3)
    assert ids(list_cases(dataset, tmp_path, need_labels=False)) == [*names, "BRATS_485"]


# -- archives made on macOS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["camus", "chaos", "brats"])
def test_the_twin_tree_of_macos_archives_is_ignored(tmp_path, rng, name):
    """Such a zip holds a second tree, __MACOSX, with ``._`` files: no case, and no reason to stop."""
    if name == "camus":
        data = CAMUS
        save_patient(tmp_path / "database_nifti/patient0001")
    elif name == "chaos":
        data = {"dataset": "chaos", "task": 2}
        save_ct(tmp_path, 1, rng)
    else:
        data = {"dataset": "brats", "convention": "brats2021"}
        save_brats(tmp_path / "BraTS2021_00001")
    expected = ids(cases_of(data, tmp_path))
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        twin = tmp_path / "__MACOSX" / path.relative_to(tmp_path)
        twin.parent.mkdir(parents=True, exist_ok=True)
        twin.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    assert ids(cases_of(data, tmp_path)) == expected


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "known"),
    [
        ({"dataset": "acdc"}, ("acdc", "camus", "chaos", "brats", "nnunet", "decathlon")),
        ({"dataset": "brats"}, ("convention", "brats2021", "brats2023", "brats2024")),
        ({"dataset": "brats", "convention": "brats2020x"}, ("brats2020x", "brats2021", "brats2023", "brats2024")),
        ({"dataset": "chaos", "task": 6}, ("task", "6", "1", "5")),
        ({"dataset": "chaos", "task": 0}, ("task", "1", "5")),
        ({"dataset": "chaos", "task": 5, "phase": "mean"}, ("mean", "in", "out", "each", "both")),
        (CAMUS | {"views": ("3CH",)}, ("3CH", "2CH", "4CH")),
        (CAMUS | {"instants": ("systole",)}, ("systole", "ED", "ES", "half_sequence")),
        (CAMUS | {"quality": ("Bad",)}, ("Bad", "Good", "Medium", "Poor")),
        (CAMUS | {"views": ()}, ("views", "2CH", "4CH")),
        ({"dataset": "nnunet"}, ("root",)),
        ({"dataset": "decathlon"}, ("root",)),
    ],
)
def test_unknown_choices_name_the_known_ones(data, known):
    """A user who mistypes must not have to look into the code."""
    with pytest.raises(UserError) as error:
        get_dataset(data)
    for word in known:
        assert word in str(error.value)


@pytest.mark.parametrize("data", [CAMUS, {"dataset": "chaos"}, {"dataset": "brats", "convention": "brats2021"}])
def test_a_folder_without_cases_is_refused(tmp_path, data):
    """The message says what was looked for, and where."""
    (tmp_path / "notes.txt").write_text("nothing here")
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="expected") as error:
            cases_of(data, root, need_labels=False)
        assert str(root) in str(error.value)


TWICE = '{"channel_names": {"0": "CT"}, "labels": {"0": "background", "1": "organ", "2": "organ"}}'
NESTED = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": {"a": 1}, "ignore": 2}}'
ONLY_IGNORE = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "ignore": 1}}'
IGNORED_ZERO = '{"channel_names": {"0": "CT"}, "labels": {"organ": 1, "tumour": 2, "ignore": 0}}'
LISTED = '{"channel_names": {"0": "CT"}, "labels": {"0": "background", "1": ["organ"], "2": ["organ"]}}'


@pytest.mark.parametrize(
    "text",
    [
        None, "{", "[]", '{"labels": {"a": 0, "b": 1}}', '{"channel_names": {"0": "CT"}}', TWICE, LISTED,
        NESTED, ONLY_IGNORE, IGNORED_ZERO,
    ],
)  # fmt: skip
def test_unusable_dataset_json_is_refused(tmp_path, text):
    """Absent, no JSON, no object, no channels, no labels, two values with one name, no numbers, nothing to learn."""
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    for name in ("nnunet", "decathlon"):
        with pytest.raises(UserError, match=r"dataset\.json"):
            get_dataset(section(name, tmp_path))


# -- phantoms: CAMUS ----------------------------------------------------------------------------------------------


def content(root):
    """Relative path to bytes of every file but the record of settings, NIfTI without its compression."""
    files = {}
    for path in sorted(p for p in Path(root).rglob("*") if p.is_file() and p.name != phantom.SETTINGS_FILE):
        data = path.read_bytes()
        files[str(path.relative_to(root))] = gzip.decompress(data) if path.suffix == ".gz" else data
    return files


def read_cfg(path):
    return dict(line.split(": ", 1) for line in path.read_text().splitlines() if line)


def picture(path):
    """A file of the phantom as (rows, columns) or (frames, rows, columns), and its spacing (row, column)."""
    if path.suffix == ".gz":
        image = nib.load(path)
        array, spacing = np.asarray(image.dataobj).T, image.header.get_zooms()
    else:
        image = sitk.ReadImage(str(path))
        array, spacing = sitk.GetArrayFromImage(image), image.GetSpacing()
        array = array[0] if array.ndim == 3 and len(array) == 1 else array
    return array, (float(spacing[1]), float(spacing[0]))


@pytest.fixture(scope="module")
def camus(tmp_path_factory):
    """Three patients, the second of which is number 7, in either layout."""
    roots = {}
    for layout in ("nifti", "metaimage"):
        roots[layout] = tmp_path_factory.mktemp(f"camus_{layout}")
        phantom.write_camus(roots[layout], cases=3, first=6, shape=(96, 72), layout=layout, frames=4)
    return roots


@pytest.mark.parametrize("layout", ["nifti", "metaimage"])
def test_camus_phantom_lies_as_the_release_does(camus, layout):
    """Names, cfg keys, image size and labels."""
    root = camus[layout]
    parent = root / ("database_nifti" if layout == "nifti" else "training")
    assert names_below(parent) == ["patient0006", "patient0007", "patient0008"]
    endings = [".nii.gz"] if layout == "nifti" else [".mhd", ".raw"]
    for n in (6, 7, 8):
        folder = parent / f"patient{n:04d}"
        expected = ["Info_2CH.cfg", "Info_4CH.cfg"] + [
            f"{folder.name}_{view}_{part}{gt}{ending}"
            for view in ("2CH", "4CH")
            for part in ("ED", "ES", "half_sequence")
            for gt in ("", "_gt")
            for ending in endings
        ]
        assert names_below(folder) == sorted(expected)
        ef = set()
        for view in ("2CH", "4CH"):
            facts = read_cfg(folder / f"Info_{view}.cfg")
            keys = {"EF"} if layout == "nifti" else {"LVedv", "LVesv", "LVef"}
            assert set(facts) == {"ED", "ES", "NbFrame", "Sex", "Age", "ImageQuality", "FrameRate"} | keys
            assert facts["ImageQuality"] in ("Good", "Medium", "Poor") and facts["NbFrame"] == "4"
            assert (facts["ED"], facts["ES"]) == (("4", "1") if n % 7 == 0 else ("1", "4"))
            ef.add(facts["EF" if layout == "nifti" else "LVef"])
            for part in ("ED", "ES"):
                image, spacing = picture(folder / f"{folder.name}_{view}_{part}{endings[0]}")
                label, _ = picture(folder / f"{folder.name}_{view}_{part}_gt{endings[0]}")
                assert image.shape == label.shape == (72, 96), "shape is lateral x depth"
                assert set(np.unique(label)) == {0, 1, 2, 3}
                assert image.dtype == np.uint8 and np.ptp(image) > 200
                assert all(0.1 < s < 3 for s in spacing)
                rows = [np.nonzero(label == v)[0].mean() for v in (1, 3)]
                assert rows[0] < rows[1], "the probe is on top, over the apex; the atrium lies deepest"
        assert len(ef) == 1, "EF is the patient's, equal in both files"


@pytest.mark.parametrize("layout", ["nifti", "metaimage"])
def test_camus_phantom_sequences(camus, layout):
    """Numbers divisible by 7 have ES first; the frames at the ends are the single frames."""
    parent = camus[layout] / ("database_nifti" if layout == "nifti" else "training")
    ending = ".nii.gz" if layout == "nifti" else ".mhd"
    for n, view, gt in itertools.product((6, 7, 8), ("2CH", "4CH"), ("", "_gt")):
        name = f"patient{n:04d}"
        ed, es, half = (
            picture(parent / name / f"{name}_{view}_{part}{gt}{ending}")[0] for part in ("ED", "ES", "half_sequence")
        )
        assert half.shape == (4, 72, 96)
        first, last = (es, ed) if n % 7 == 0 else (ed, es)
        np.testing.assert_array_equal(half[0], first)
        np.testing.assert_array_equal(half[-1], last)
        if gt:
            assert (ed == 1).sum() > (es == 1).sum()


def test_camus_phantom_is_read_back(camus):
    """Both layouts hold the same hearts, and the reader turns the reversed sequence."""
    data = CAMUS | {"instants": ("ED", "ES", "half_sequence")}
    volumes = {layout: {c.case_id: read_case(c) for c in cases_of(data, root)} for layout, root in camus.items()}
    assert len(volumes["nifti"]) == 18
    for name, volume in volumes["nifti"].items():
        np.testing.assert_array_equal(volume.label, volumes["metaimage"][name].label, name)
        np.testing.assert_array_equal(volume.image, volumes["metaimage"][name].image, name)
    half, ed = (volumes["nifti"][f"patient0007_2CH_{part}"] for part in ("half_sequence", "ED"))
    np.testing.assert_array_equal(half.label[0], ed.label[0])
    assert scan_cases(get_dataset(data), camus["nifti"], need_labels=True).problems == []


def cavity(label, spacing):
    """Area of the cavity in mm^2, and its length in mm from the middle of its base to the point farthest from it."""
    inside = label == 1
    base = inside & (distance_transform_edt(label != 3, sampling=spacing) < 3)
    points = np.argwhere(inside) * spacing
    middle = (np.argwhere(base) * spacing).mean(0)
    length = np.sqrt(((points - middle) ** 2).sum(1)).max()
    return inside.sum() * spacing[0] * spacing[1], length


def volume_ml(folder, part, ending):
    """V = 8 A_2CH A_4CH / (3 pi L) from the masks of both views, L the mean of the two lengths."""
    paths = [folder / f"{folder.name}_{view}_{part}_gt{ending}" for view in ("2CH", "4CH")]
    areas, lengths = zip(*(cavity(*picture(path)) for path in paths), strict=True)
    return 8 * areas[0] * areas[1] / (3 * np.pi * np.mean(lengths)) / 1000


@pytest.mark.parametrize("shape", [(549, 389), (300, 220)])
def test_camus_phantom_ejection_fraction_is_that_of_the_masks(tmp_path, shape):
    """The area-length method, with the files alone, gives the EF that the cfg states."""
    cases = 2 if shape[0] > 400 else 6
    for folder in phantom.write_camus(tmp_path, cases=cases, first=5, shape=shape, frames=2):
        end, small = (volume_ml(folder, part, ".nii.gz") for part in ("ED", "ES"))
        assert 40 < end < 300
        stated = float(read_cfg(folder / "Info_4CH.cfg")["EF"])
        assert 100 * (end - small) / end == pytest.approx(stated, abs=4), folder.name


def test_camus_phantom_volumes_are_those_of_the_masks(tmp_path):
    """The older release states volumes in ml too."""
    (folder,) = phantom.write_camus(tmp_path, cases=1, shape=(300, 220), frames=2, layout="metaimage")
    facts = read_cfg(folder / "Info_2CH.cfg")
    for part, key in (("ED", "LVedv"), ("ES", "LVesv")):
        assert volume_ml(folder, part, ".mhd") == pytest.approx(float(facts[key]), rel=0.06)
    ejection = 100 * (1 - float(facts["LVesv"]) / float(facts["LVedv"]))
    assert ejection == pytest.approx(float(facts["LVef"]), abs=0.3)


def test_camus_phantom_splits_are_of_patients(tmp_path):
    """Every patient stands on exactly one side."""
    phantom.write_camus(tmp_path, cases=4, shape=(64, 64), frames=2)
    folder = tmp_path / "database_split"
    names = [f"subgroup_{side}.txt" for side in ("testing", "training", "validation")]
    assert names_below(folder) == names
    listed = [line for name in names for line in (folder / name).read_text().split()]
    assert sorted(listed) == [f"patient000{n}" for n in range(1, 5)]


# -- phantoms: CHAOS ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    root = tmp_path_factory.mktemp("chaos")
    phantom.write_chaos(root, cases=1, shape=(64, 64, 16))
    return root


def read_dicoms(folder):
    return [pydicom.dcmread(p) for p in sorted(folder.glob("*.dcm"))]


def hounsfield(slices):
    return np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])


def test_chaos_phantom_ct(chaos):
    """Names, tags and masks of CT: z falls with the name, SliceThickness is wrong, masks have one bit and the liver."""
    folder = chaos / "CT" / "1"
    assert names_below(folder / "DICOM_anon") == [f"i{k:04d},0000b.dcm" for k in range(16)]
    assert names_below(folder / "Ground") == [f"liver_GT_{k:03d}.png" for k in range(16)]
    slices = read_dicoms(folder / "DICOM_anon")
    assert all((s.Rows, s.Columns, s.Modality, s.BitsAllocated) == (64, 64, "CT", 16) for s in slices)
    z = np.array([float(s.ImagePositionPatient[2]) for s in slices])
    steps = np.diff(z)
    assert (steps < 0).all() and np.ptp(steps) < 1e-2
    assert all(abs(float(s.SliceThickness) + steps.mean()) > 0.2 for s in slices)
    assert all((s.RescaleSlope, s.RescaleIntercept) == (1, -1000) for s in slices)
    assert all(s.PixelRepresentation == 0 for s in slices)
    masks = []
    for path in sorted((folder / "Ground").glob("*.png")):
        with Image.open(path) as image:
            assert image.mode == "1" and image.size == (64, 64)
            masks.append(np.asarray(image))
    assert np.stack(masks).any()
    assert hounsfield(slices).min() <= -900, "air"


def test_chaos_phantom_liver_is_brighter_than_what_surrounds_it(chaos):
    """In HU, by the masks of the same rank; and in reverse order the masks would not fit."""
    folder = chaos / "CT" / "1"
    hu = hounsfield(read_dicoms(folder / "DICOM_anon"))
    liver = np.stack([np.asarray(Image.open(p)) for p in sorted((folder / "Ground").glob("*.png"))])
    ring = binary_dilation(liver, iterations=2) & ~binary_dilation(liver)
    ring &= hu > -500
    assert np.median(hu[liver]) > np.median(hu[ring]) + 30
    assert 60 < np.median(hu[liver]) < 160
    assert hu[liver].std() < hu[liver[::-1]].std()


def test_chaos_phantom_mr(chaos):
    """Names, phases, tags and grey values of MR."""
    folder = chaos / "MR" / "1"
    dual, spir = folder / "T1DUAL", folder / "T2SPIR"
    numbers = range(6)
    even = [f"IMG-0004-{2 * k + 2:05d}" for k in numbers]
    odd = [f"IMG-0004-{2 * k + 1:05d}" for k in numbers]
    assert names_below(dual / "DICOM_anon") == ["InPhase", "OutPhase"]
    assert names_below(dual / "DICOM_anon/InPhase") == [f"{n}.dcm" for n in even]
    assert names_below(dual / "DICOM_anon/OutPhase") == [f"{n}.dcm" for n in odd]
    assert names_below(dual / "Ground") == [f"{n}.png" for n in even]
    stems = [Path(n).stem for n in names_below(spir / "DICOM_anon")]
    assert len(stems) == 6 and all(s.startswith("IMG-") for s in stems)
    assert [Path(n).stem for n in names_below(spir / "Ground")] == stems
    inside, outside = (read_dicoms(dual / "DICOM_anon" / p) for p in ("InPhase", "OutPhase"))
    for a, b in zip(inside, outside, strict=True):
        assert a.EchoTime > b.EchoTime, "the longer echo is in-phase"
        assert list(a.ImagePositionPatient) == list(b.ImagePositionPatient)
        assert (a.Rows, a.Columns) == (b.Rows, b.Columns) == (32, 32)
    for series in (inside, outside, read_dicoms(spir / "DICOM_anon")):
        assert all(s.Modality == "MR" and s.pixel_array.max() < 4096 for s in series), "12 bit"
        z = np.array([float(s.ImagePositionPatient[2]) for s in series])
        assert all(abs(float(s.SliceThickness) - abs(np.diff(z)).mean()) > 0.2 for s in series)
    for ground in (dual / "Ground", spir / "Ground"):
        values = set()
        for path in sorted(ground.glob("*.png")):
            with Image.open(path) as image:
                assert image.mode == "L"
                values |= set(np.unique(np.asarray(image)).tolist())
        assert values == set(GREY.tolist())


def test_chaos_phantom_has_the_right_kidney_on_the_left_of_the_picture(chaos):
    """Right and left are the patient's; in memory W runs to his left."""
    for case in cases_of({"dataset": "chaos", "task": 5}, chaos):
        volume = read_case(case)
        names = case.labels.structures
        column = {n: np.argwhere(volume.label == names.index(n))[:, 2].mean() for n in names[1:]}
        assert column["right kidney"] < 16 < column["left kidney"]
        assert column["liver"] < column["spleen"]


def test_chaos_phantom_fat_is_dark_in_t2(chaos):
    """T2-SPIR suppresses fat, which is the brightest tissue of T1 in-phase."""
    folder = chaos / "MR" / "1"
    t1, t2 = (
        np.stack([s.pixel_array for s in read_dicoms(folder / part)])
        for part in ("T1DUAL/DICOM_anon/InPhase", "T2SPIR/DICOM_anon")
    )
    label = np.stack([np.asarray(Image.open(p)) for p in sorted((folder / "T2SPIR/Ground").glob("*.png"))])
    fat = (t1 > 0.75 * np.percentile(t1, 99)) & (label == 0)
    assert fat.mean() > 0.05
    assert np.median(t2[fat]) < 0.6 * np.median(t2[label == 63])
    assert np.median(t2[fat]) < 0.4 * np.median(t2[label == 126])


def test_chaos_phantom_is_read_back(chaos):
    """Without findings, for every task."""
    for task in range(1, 6):
        dataset = get_dataset({"dataset": "chaos", "task": task})
        scan = scan_cases(dataset, chaos, need_labels=True)
        assert scan.problems == []
        for case in scan.cases:
            volume = read_case(case)
            found = set(np.unique(volume.label))
            assert found == ({0, 1} if case.info["modality"] == "CT" else set(range(len(dataset.labels.structures))))
    ct = read_case(by_id({"dataset": "chaos", "task": 2}, chaos)["CT_1"])
    masks = [np.asarray(Image.open(p)) for p in sorted((chaos / "CT/1/Ground").glob("*.png"))]
    np.testing.assert_array_equal(ct.label[::-1], masks)


# -- phantoms: BraTS, and what all share --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "case", "between", "parts", "values"),
    [
        ("brats2021", "BraTS2021_00000", "_", OLD, {0, 1, 2, 4}),
        ("brats2023", "BraTS-GLI-00000-000", "-", NEW, {0, 1, 2, 3}),
    ],
)
def test_brats_phantom(tmp_path, convention, case, between, parts, values):
    """Names, geometry, an exact background, and the label values of the convention."""
    phantom.write_brats(tmp_path, cases=1, convention=convention, shape=(48, 48, 40))
    assert names_below(tmp_path / case) == sorted(f"{case}{between}{p}.nii.gz" for p in (*parts, "seg"))
    label = nib.load(tmp_path / case / f"{case}{between}seg.nii.gz")
    assert set(np.unique(label.dataobj)) == values
    for part in parts:
        image = nib.load(tmp_path / case / f"{case}{between}{part}.nii.gz")
        assert image.shape == label.shape == (48, 48, 40)
        expected = np.diag([-1.0, -1.0, 1.0, 1.0])
        expected[1, 3] = 47
        np.testing.assert_array_equal(image.affine, expected)
        array = np.asarray(image.dataobj)
        assert array.min() == 0 and (array == 0).mean() > 0.2 and (array[np.asarray(label.dataobj) > 0] > 0).all()
    (found,) = cases_of({"dataset": "brats", "convention": convention}, tmp_path)
    volume = read_case(found)
    names = np.array(found.labels.structures)[volume.label]
    stored_label = np.asarray(label.dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(names == "ET", stored_label == max(values))


WRITE = {
    "brats": lambda root, **more: phantom.write_brats(root, convention="brats2021", shape=(48, 48, 40), **more),
    "camus": lambda root, **more: phantom.write_camus(root, shape=(96, 72), frames=3, **more),
    "chaos": lambda root, **more: phantom.write_chaos(root, shape=(64, 64, 16), **more),
}
REFERENCES = {"brats": "_seg.", "camus": "_gt.", "chaos": "Ground"}


@pytest.mark.parametrize("change", [{"noise": 0.2}, {"bias": 0.4}, {"contrast": 0.3}])
@pytest.mark.parametrize("name", WRITE)
def test_difficulty_changes_images_and_not_labels(tmp_path, name, change):
    """So that the same reference can be made harder to find."""
    WRITE[name](tmp_path / "usual", cases=1)
    difficulty = dataclasses.replace(phantom.Difficulty(), **change)
    WRITE[name](tmp_path / "hard", cases=1, difficulty=difficulty)
    usual, hard = content(tmp_path / "usual"), content(tmp_path / "hard")
    assert set(usual) == set(hard)
    labels = {p for p in usual if REFERENCES[name] in p}
    # CT has no coil, and so no bias field
    images = {p for p in set(usual) - labels if p.endswith((".nii.gz", ".dcm"))}
    images = {p for p in images if not (p.startswith("CT") and "bias" in change)}
    assert labels and images
    assert all(usual[p] == hard[p] for p in labels)
    assert all(usual[p] != hard[p] for p in images)
    assert all(len(usual[p]) == len(hard[p]) for p in images)


@pytest.mark.parametrize("name", WRITE)
def test_a_phantom_depends_on_its_seed_and_number_alone(tmp_path, name):
    """Not on how many are written, nor on which came before."""
    first = 1 if name != "brats" else 0
    WRITE[name](tmp_path / "all", cases=2, seed=3)
    WRITE[name](tmp_path / "last", cases=1, first=first + 1, seed=3)
    WRITE[name](tmp_path / "other", cases=1, first=first + 1, seed=4)
    every, last, other = (content(tmp_path / part) for part in ("all", "last", "other"))
    files = {p for p in last if not p.startswith("database_split")}
    assert files and files < set(every)
    assert all(every[p] == last[p] for p in files)
    images = {p for p in files if p.endswith((".nii.gz", ".dcm"))}
    assert all(other[p] != last[p] for p in images), "another seed, another case"


def test_metaimage_phantoms_repeat_too(tmp_path):
    """The older layout as well."""
    for root, cases in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        phantom.write_camus(root, cases=cases, shape=(96, 72), frames=3, layout="metaimage")
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    files = {p for p in one if p.startswith("training")}
    assert files and all(one[p] == two[p] for p in files)


def test_structures_that_a_case_has_not_are_written_as_background(chaos):
    """A network of four organs on CT, of which the challenge asks for the liver alone."""
    ct, mr = (
        next(
            c
            for c in list_cases(get_dataset({"dataset": "chaos", "task": 4}), chaos, need_labels=True)
            if m in c.case_id
        )
        for m in ("CT", "T2SPIR")
    )
    label = np.arange(5, dtype=np.uint8)
    assert encode_label(ct, label).tolist() == [0, 63, 0, 0, 0]
    assert encode_label(mr, label).tolist() == [0, 63, 126, 189, 252]
