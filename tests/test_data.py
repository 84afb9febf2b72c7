"""BraTS on disk, label maps that are written, and folds."""

import shutil

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import CONVENTION
from xdim_jax.base.errors import UserError
from xdim_jax.data import phantom, regions, splits
from xdim_jax.data.case import Case, list_cases, scan_cases
from xdim_jax.data.images import nifti
from xdim_jax.data.images.image import read_volume
from xdim_jax.data.labels import Labels
from xdim_jax.data.layouts import brats
from xdim_jax.data.reading import check_grids, read_case

pytestmark = pytest.mark.quick

BRATS_FILES = brats.get_convention("brats2021")
BRATS, NEW = brats.dataset("brats2021"), brats.dataset("brats2023")


def rewrite(path, function):
    """Applies ``function(array, affine) -> array, affine`` to a NIfTI file."""
    image = nib.load(path)
    array, affine = function(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def root(phantoms, tmp_path):
    """Two cases that a test may damage."""
    for case in sorted(phantoms.iterdir())[:2]:
        shutil.copytree(case, tmp_path / "data" / case.name)
    return tmp_path / "data"


def part(root, case, name):
    return root / f"BraTS2021_{case:05d}" / f"BraTS2021_{case:05d}_{name}.nii.gz"


# -- phantoms -----------------------------------------------------------------------------------------------------


def test_phantoms_have_the_real_layout(phantoms):
    folder = phantoms / "BraTS2021_00000"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"BraTS2021_00000_{name}.nii.gz" for name in ("flair", "seg", "t1", "t1ce", "t2")
    ]
    image = nib.load(folder / "BraTS2021_00000_t1ce.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(image.affine[:3, 3], [0, 63, 0])
    assert image.header.get_zooms() == (1, 1, 1)
    label = np.asarray(nib.load(folder / "BraTS2021_00000_seg.nii.gz").dataobj)
    assert set(np.unique(label)) == {0, 1, 2, 4}
    brain = np.asarray(image.dataobj)
    assert brain[0, 0, 0] == 0 and (brain[label > 0] > 0).all()


def test_phantoms_depend_on_seed_and_number_alone(phantoms, tmp_path):
    phantom.write_brats(tmp_path, cases=1, first=3, convention=CONVENTION, shape=(64, 64, 64))
    again, first = (nib.load(part(r, 3, "t2")) for r in (tmp_path, phantoms))
    np.testing.assert_array_equal(again.dataobj, first.dataobj)
    other = nib.load(part(phantoms, 2, "t2"))
    assert (np.asarray(other.dataobj) != np.asarray(first.dataobj)).any()
    kept = part(tmp_path, 3, "t2").stat().st_mtime_ns
    phantom.write_brats(tmp_path, cases=1, first=3, convention=CONVENTION, shape=(64, 64, 64))
    assert part(tmp_path, 3, "t2").stat().st_mtime_ns == kept, "whole cases are kept"


def test_every_fifth_phantom_has_no_enhancing_tumour(phantoms):
    cases = list_cases(BRATS, phantoms, need_labels=True)
    has = [bool((read_case(c).label == regions.ET).any()) for c in cases]
    assert has == [True, True, True, True, False, True]


def test_phantoms_of_other_settings_are_not_taken_for_these(phantoms):
    with pytest.raises(UserError, match=r"'seed': 0.*'seed': 1"):
        phantom.write_brats(phantoms, cases=1, convention=CONVENTION, shape=(64, 64, 64), seed=1)


def test_phantom_refuses_a_tiny_shape(tmp_path):
    with pytest.raises(UserError, match="at least 32"):
        phantom.write_brats(tmp_path, cases=1, convention=CONVENTION, shape=(16, 64, 64))


# -- reading ------------------------------------------------------------------------------------------------------


def test_read_case_has_channels_in_order_and_axes_z_y_x(phantoms):
    case = list_cases(BRATS, phantoms, need_labels=True)[0]
    volume = read_case(case)
    t1ce = np.asarray(nib.load(part(phantoms, 0, "t1ce")).dataobj)
    assert volume.image.dtype == np.float32 and volume.image.shape == (64, 64, 64, 4)
    np.testing.assert_array_equal(volume.image[..., 2], t1ce.transpose(2, 1, 0))
    seg = np.asarray(nib.load(part(phantoms, 0, "seg")).dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.label == regions.ET, seg == 4)
    np.testing.assert_array_equal(BRATS.labels.encode(volume.label), seg)


def test_2023_names_labels_and_patients(tmp_path):
    phantom.write_brats(tmp_path, cases=1, convention="brats2023", shape=(32, 32, 32))
    shutil.copytree(tmp_path / "BraTS-GLI-00000-000", tmp_path / "BraTS-GLI-00000-001")
    for path in (tmp_path / "BraTS-GLI-00000-001").iterdir():
        path.rename(path.with_name(path.name.replace("-000-", "-001-")))
    cases = list_cases(NEW, tmp_path, need_labels=True)
    assert [c.case_id for c in cases] == ["BraTS-GLI-00000-000", "BraTS-GLI-00000-001"]
    assert {c.patient for c in cases} == {"BraTS-GLI-00000"}
    seg = np.asarray(nib.load(tmp_path / cases[0].case_id / "BraTS-GLI-00000-000-seg.nii.gz").dataobj)
    assert set(np.unique(seg)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(read_case(cases[0]).label == regions.ET, seg.transpose(2, 1, 0) == 3)
    with pytest.raises(UserError, match="convention=brats2023"):
        list_cases(BRATS, tmp_path, need_labels=True)


def test_old_layouts(root):
    """HGG/LGG one level deeper, .nii without gz, and the odd name of BraTS20_Training_355's segmentation."""
    nested = root.parent / "nested" / "HGG"
    shutil.copytree(root, nested)
    image = nib.load(part(nested, 0, "t1"))
    nib.save(image, part(nested, 0, "t1").with_suffix(""))
    part(nested, 0, "t1").unlink()
    part(nested, 1, "seg").rename(part(nested, 1, "seg").with_name("W39_1998.09.19_Segm.nii.gz"))
    cases = list_cases(BRATS, nested.parent, need_labels=True)
    assert len(cases) == 2 and cases[0].images[1].name.endswith("_t1.nii")
    assert cases[1].label.name.startswith("W39")
    assert len(list_cases(BRATS, root / "BraTS2021_00001", need_labels=True)) == 1, "one case folder"


def test_validation_cases_need_no_labels(root):
    part(root, 0, "seg").unlink()
    assert list_cases(BRATS, root, need_labels=False)[0].label is None


def read_all(root):
    for case in list_cases(BRATS, root, need_labels=True):
        read_case(case)


def truncate(path):
    path.write_bytes(path.read_bytes()[:3000])


def spoil(path, value):
    rewrite(path, lambda a, affine: (np.where(a == a.max(), value, a).astype(np.float32), affine))


def clear(root):
    for folder in list(root.iterdir()):
        shutil.rmtree(folder)


def shift(array, affine):
    affine[0, 3] += 1.5
    return array, affine


FAULTS = {
    "truncated": (lambda r: truncate(part(r, 1, "t2")), ["BraTS2021_00001_t2.nii.gz", "truncated"]),
    "not nifti": (lambda r: part(r, 0, "t1").write_bytes(b"hello"), ["BraTS2021_00000_t1.nii.gz", "NIfTI"]),
    "missing": (lambda r: part(r, 1, "t1ce").unlink(), ["BraTS2021_00001 is missing BraTS2021_00001_t1ce.nii.gz"]),
    "no label": (lambda r: part(r, 1, "seg").unlink(), ["missing BraTS2021_00001_seg.nii.gz"]),
    "shape": (
        lambda r: rewrite(part(r, 0, "t2"), lambda a, affine: (a[:-1], affine)),
        ["BraTS2021_00000_t2.nii.gz", "(63, 64, 64)", "(64, 64, 64)"],
    ),
    "affine": (lambda r: rewrite(part(r, 0, "seg"), shift), ["BraTS2021_00000_seg.nii.gz", "1.50 voxels"]),
    "label 3": (
        lambda r: rewrite(part(r, 0, "seg"), lambda a, affine: (np.where(a == 4, 3, a).astype(np.uint8), affine)),
        ["BraTS2021_00000_seg.nii.gz contains label 3", "0, 1, 2, 4", "brats2023"],
    ),
    "label 0.5": (
        lambda r: rewrite(part(r, 0, "seg"), lambda a, affine: ((a / 2).astype(np.float32), affine)),
        ["label 0.5"],
    ),
    "nan": (lambda r: spoil(part(r, 0, "flair"), np.nan), ["BraTS2021_00000_flair.nii.gz contains", "NaN"]),
    "four axes": (
        lambda r: rewrite(part(r, 0, "t1"), lambda a, affine: (np.stack([a, a], -1), affine)),
        ["BraTS2021_00000_t1.nii.gz has shape (64, 64, 64, 2)"],
    ),
    "empty": (clear, ["no BraTS case", "empty folder", "_{flair,t1,t1ce,t2,seg}"]),
    "other files": (lambda r: (clear(r), (r / "notes.txt").touch()), ["no BraTS case", "notes.txt"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(root, fault):
    damage, words = FAULTS[fault]
    damage(root)
    with pytest.raises(UserError) as error:
        read_all(root)
    for word in words:
        assert word in str(error.value)


def test_all_problems_of_all_cases_at_once(root):
    part(root, 0, "t1").unlink()
    part(root, 0, "t2").unlink()
    part(root, 1, "seg").unlink()
    with pytest.raises(UserError, match="3 incomplete or misplaced files") as error:
        read_all(root)
    for name in ("00000_t1.nii.gz", "00000_t2.nii.gz", "00001_seg.nii.gz"):
        assert name in str(error.value)


def test_all_problems_inside_a_case_at_once(root):
    truncate(part(root, 0, "t1"))
    rewrite(part(root, 0, "t2"), lambda a, affine: (a[:-1], affine))
    with pytest.raises(UserError, match="2 problems in case BraTS2021_00000"):
        read_all(root)


def test_a_flipped_bit_inside_is_seen(root):
    """nibabel alone stops before gzip's checksum and would give other voxels."""
    data = bytearray(part(root, 0, "t2").read_bytes())
    data[-5] ^= 1  # in the checksum itself: the voxels are whole
    part(root, 0, "t2").write_bytes(data)
    with pytest.raises(UserError, match=r"BraTS2021_00000_t2\.nii\.gz cannot be read"):
        read_all(root)


def test_headers_of_all_cases_are_compared_at_once(root):
    rewrite(part(root, 0, "t2"), lambda a, affine: (a[:-1], affine))
    rewrite(part(root, 1, "seg"), shift)
    with pytest.raises(UserError, match="2 files that are unreadable or not on the grid") as error:
        check_grids(list_cases(BRATS, root, need_labels=True))
    assert "00000_t2" in str(error.value) and "00001_seg" in str(error.value)


def test_folders_that_are_nearly_cases_are_not_passed_over(root):
    part(root, 0, "t1").parent.rename(root / "renamed")
    (root / "BraTS2021_00007").mkdir()
    scan = scan_cases(BRATS, root, need_labels=True)
    assert [c.case_id for c in scan.cases] == ["BraTS2021_00001"]
    assert {p.case_id for p in scan.problems} == {"renamed", "BraTS2021_00007"}


def test_one_case_in_two_places_is_refused(root):
    shutil.copytree(root / "BraTS2021_00000", root / "HGG" / "BraTS2021_00000")
    with pytest.raises(UserError, match="are both case BraTS2021_00000"):
        read_all(root)


def test_files_of_a_case_are_checked_by_their_names(root, tmp_path):
    paths = [part(root, 0, m) for m in ("flair", "t1", "t1ce", "t2")]
    assert brats.case_from_files(paths, BRATS_FILES).case_id == "BraTS2021_00000"
    with pytest.raises(UserError, match=r"t2\.nii\.gz is t2 .*flair"):
        brats.case_from_files(paths[::-1], BRATS_FILES)
    with pytest.raises(UserError, match="different cases"):
        brats.case_from_files([*paths[:3], part(root, 1, "t2")], BRATS_FILES)
    unnamed = [tmp_path / f"{n}.nii.gz" for n in "abcd"]
    for path, source in zip(unnamed, paths, strict=True):
        shutil.copy(source, path)
    assert brats.case_from_files(unnamed, BRATS_FILES).case_id == "a"


def test_labels_as_floats_are_rounded(root):
    """Copies exist whose labels are float32, off by rounding."""
    case = list_cases(BRATS, root, need_labels=True)[0]
    expected = read_case(case).label
    rewrite(part(root, 0, "seg"), lambda a, affine: ((a + 1e-5).astype(np.float32), affine))
    label = read_case(case).label
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, expected)


# -- written files ------------------------------------------------------------------------------------------------


def test_written_label_maps_keep_the_header_but_not_its_scaling(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
    image.header.set_slope_inter(2.0, 5.0)
    image.header["cal_max"], image.header["descrip"] = 900, b"scanner 7"
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "in.nii.gz")
    _, grid = read_volume(tmp_path / "in.nii.gz")
    nifti.write_volume(tmp_path / "out.nii.gz", np.full((4, 4, 4), 4, np.uint8), grid)
    out = nib.load(tmp_path / "out.nii.gz")
    assert out.get_data_dtype() == np.uint8 and (np.asarray(out.dataobj) == 4).all()
    assert out.header["descrip"].item() == b"scanner 7" and out.header.get_xyzt_units()[0] == "mm"
    assert out.header["cal_max"] == 0
    with pytest.raises(ValueError, match="not on the grid"):
        nifti.write_volume(tmp_path / "out.nii.gz", np.zeros((4, 4, 3), np.uint8), grid)


# -- folds --------------------------------------------------------------------------------------------------------


def test_folds_part_patients_evenly_and_forget_the_order():
    names = [f"p{i}" for i in range(23)]
    folds = splits.assign_folds(names, 5, seed=0)
    assert sorted(np.bincount(list(folds.values()))) == [4, 4, 5, 5, 5]
    assert splits.assign_folds(reversed(names), 5, seed=0) == folds
    assert splits.assign_folds(names, 5, seed=1) != folds
    # the rank of `printf 0:pN | sha256sum` among the 23, modulo 5: the assignment must not drift between versions
    assert [folds[f"p{i}"] for i in range(6)] == [2, 1, 0, 3, 0, 3]


def test_a_patient_is_on_one_side():
    cases = [
        Case(f"p{i // 3}-{i % 3}", f"p{i // 3}", (), ("x",), None, Labels("", ("", "a"), (0, 1))) for i in range(30)
    ]
    validated = []
    for fold in range(5):
        train, validation = splits.split_cases(cases, fold=fold, folds=5, seed=0)
        assert not {c.patient for c in train} & {c.patient for c in validation}
        assert len(train) + len(validation) == 30
        validated += [c.case_id for c in validation]
    assert sorted(validated) == sorted(c.case_id for c in cases), "every case is validated once"
    with pytest.raises(UserError, match="fold=5"):
        splits.split_cases(cases, fold=5, folds=5, seed=0)
    with pytest.raises(UserError, match="10 patients"):
        splits.split_cases(cases, fold=0, folds=11, seed=0)


def test_a_flat_image_and_its_mask_with_three_axes_are_on_one_grid(tmp_path):
    """Headers are compared as the files are read: both as they are stored, because the image has two axes."""
    image, label = tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((20, 40), np.float32), np.eye(4)), image)
    nib.save(nib.Nifti1Image(np.ones((20, 40, 1), np.uint8), np.eye(4)), label)
    case = Case("a", "a", (image,), ("T1",), label, Labels("own", ("background", "organ"), (0, 1)))
    check_grids([case])
    assert read_case(case).label.shape == (1, 40, 20)
