"""Files as hospitals have them: names, DICOM exports of an archive, and several patients in one output folder."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from ml_collections import ConfigDict
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import MPEG2MPML, UID, EnhancedMRImageStorage, generate_uid

import xdim_jax
from tests.dicom_files import save_dicom, write_series
from tests.test_predictor import make_workdir
from tests.test_verify import write_decathlon, write_nnunet
from xdim_jax import predict
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_json
from xdim_jax.data import phantom, regions, splits
from xdim_jax.data.case import Case, case_from_files, describe, scan_cases, usable_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.images.image import files_of, read_grid, read_image
from xdim_jax.data.images.names import files_below
from xdim_jax.data.images.series import find_series
from xdim_jax.data.labels import Labels
from xdim_jax.data.layouts import brats, nnunet
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.reading import read_case
from xdim_jax.data.store import prepare_cases
from xdim_jax.data.verify import verify
from xdim_jax.inference import folder as output_folder
from xdim_jax.inference import inputs
from xdim_jax.inference.group import common_postprocessing
from xdim_jax.inference.settings import POSTPROCESSING_FILE, PostProcessing, Settings, resolve
from xdim_jax.nets import networks
from xdim_jax.nets.functional import split_model
from xdim_jax.runs import checkpoint
from xdim_jax.runs.workdir import CONFIG_FILE, DATA_FILE
from xdim_jax.training import run_data

# -- names --------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("one_convolution")
LAYOUTS = {
    "nnunet": (write_nnunet, {}),
    "decathlon": (write_decathlon, {}),
    "brats": (
        lambda root: phantom.write_brats(root, cases=3, shape=(32, 32, 32)),
        {"convention": "brats2021"},
    ),
    "camus": (lambda root: phantom.write_camus(root, cases=2, shape=(96, 64)), {}),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    """A data set, its folder, and the number of its cases."""
    write, options = LAYOUTS[request.param]
    write(tmp_path / "data")
    data = get_dataset({"dataset": request.param, "root": str(tmp_path / "data"), **options})
    return data, tmp_path / "data", len(scan_cases(data, tmp_path / "data", need_labels=True).cases)


def images_of(root):
    return [p for p in files_below(root) if p.name.endswith((".nii.gz", ".nii"))]


def rename_all(root, change):
    for path in images_of(root):
        path.rename(path.with_name(change(path.name)))


def upper_suffix(name):
    stem, _, _ = name.partition(".nii")
    return stem + name[len(stem) :].upper()


def test_suffixes_in_capitals_are_read(layout):
    data, root, count = layout
    rename_all(root, upper_suffix)
    findings = verify(data, root)
    assert findings.cases == count and findings.problems == []


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["nnunet", "decathlon"])
def test_names_in_any_normal_form_are_one_name(name, form, tmp_path):
    """Images in one form and lists, labels and splits in the other, as after a copy through macOS."""
    write, options = LAYOUTS[name]
    write(tmp_path)
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    for path in images_of(tmp_path):
        of = form if path.parent.name.startswith("images") else other
        path.rename(path.with_name(unicodedata.normalize(of, path.name.replace("organ", "orgäne"))))
    for path in tmp_path.glob("*.json"):
        path.write_text(unicodedata.normalize(other, path.read_text().replace("organ_", "orgäne_")), "utf-8")
    data = get_dataset({"dataset": name, "root": str(tmp_path), **options})
    findings = verify(data, tmp_path)
    assert findings.cases == 4 and findings.problems == []


@pytest.mark.parametrize(
    "name", [".x.nii.gz", "._x.nii.gz", ".DS_Store", "Thumbs.db", "notes.txt", "__MACOSX/x.nii.gz", "list.xlsx"]
)
def test_files_that_are_known_to_be_no_data_are_not_mentioned(name, layout):
    data, root, count = layout
    for folder in {p.parent for p in images_of(root)} | {root}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    findings = verify(data, root)
    assert findings.cases == count and findings.problems == []


@pytest.mark.parametrize("name", ["x.nii.gz.part", "x.nii.gz.crdownload", "x.img", "x.zip", "IM0001", "x.nii~"])
def test_files_that_are_not_read_are_named(name, layout):
    """Beside the images, and in a folder of their own."""
    data, root, count = layout
    for folder in (images_of(root)[0].parent, root / "more"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
        findings = verify(data, root)
        assert findings.cases == count
        (problem,) = findings.problems
        assert problem.severity == "warning" and problem.path == folder and name in problem.found
        (folder / name).unlink()
    (root / "more").rmdir()


def test_an_image_in_two_formats_is_an_error(layout):
    """``x.nii`` beside ``x.nii.gz``: nobody knows which one is meant."""
    data, root, _ = layout
    for path in images_of(root)[:3]:
        twin = path.with_name(path.name.partition(".nii")[0] + (".nii" if path.name.endswith(".gz") else ".nii.gz"))
        twin.write_bytes(path.read_bytes())
        problems = [p for p in scan_cases(data, root, need_labels=True).problems if p.severity == "error"]
        assert problems and {p.kind for p in problems} == {"duplicate_case"}
        assert all(path.name in str(p) and twin.name in str(p) for p in problems)
        twin.unlink()


def test_another_spelling_of_a_brats_file_is_said(tmp_path):
    phantom.write_brats(tmp_path, cases=2, shape=(32, 32, 32))
    data = get_dataset({"dataset": "brats", "root": str(tmp_path), "convention": "brats2021"})
    folder = sorted(tmp_path.glob("BraTS*"))[0]
    for part, other in (("t2", "T2"), ("t1ce", "T1CE"), ("flair", "Flair"), ("seg", "SEG")):
        right = folder / f"{folder.name}_{part}.nii.gz"
        wrong = right.with_name(f"{folder.name}_{other}.nii.gz")
        right.rename(wrong)
        problems = [p for p in scan_cases(data, tmp_path, need_labels=True).problems if p.severity == "error"]
        assert len(problems) == 1 and wrong.name in problems[0].found and wrong.name in problems[0].suggestion
        wrong.rename(right)


NAMES = {
    "brats2021": ("_flair", "_t1", "_t1ce", "_t2"),
    "brats2023": ("-t2f", "-t1n", "-t1c", "-t2w"),
    "others": ("_FLAIR", "_T1w", "_T1Gd", "_T2w"),
}


@pytest.mark.parametrize("convention", ["brats2021", "brats2023", "brats2024"])
@pytest.mark.parametrize("names", NAMES)
def test_only_the_right_order_of_brats_files_is_accepted(names, convention, tmp_path):
    """Whatever convention the names follow, and whatever the run was trained on."""
    for name in NAMES[names]:
        (tmp_path / f"case{name}.nii.gz").touch()
    for order in itertools.permutations(range(4)):
        paths = [tmp_path / f"case{NAMES[names][i]}.nii.gz" for i in order]
        if order == (0, 1, 2, 3):
            assert brats.case_from_files(paths, brats.get_convention(convention)).case_id == "case"
            continue
        with pytest.raises(UserError, match="by its name") as error:
            brats.case_from_files(paths, brats.get_convention(convention))
        assert str(tmp_path) in str(error.value)


def test_channel_numbers_that_contradict_the_order_are_an_error(tmp_path):
    write_nnunet(tmp_path)
    data = get_dataset({"dataset": "nnunet", "root": str(tmp_path)})
    a, b = (tmp_path / "imagesTr" / f"organ_001_000{c}.nii.gz" for c in (0, 1))
    assert len(inputs.find_cases(data, [a, b])[0]) == 1
    with pytest.raises(UserError, match="channel 1 by its name"):
        inputs.find_cases(data, [b, a])


# -- DICOM --------------------------------------------------------------------------------------------------------


def volume_of(seed, shape=(6, 10, 8)):
    """``(z, y, x)``, from the feet to the head."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def save_slice(path, plane, z, uid, patient="P1", number=2, **more):
    usual = {
        "Modality": "CT",
        "PatientID": patient,
        "SeriesNumber": number,
        "SeriesInstanceUID": uid,
        "ImagePositionPatient": [0.0, 0.0, float(z)],
        "PixelSpacing": [0.7, 0.7],
        "SliceThickness": 2.5,
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
    }
    save_dicom(path, plane, **(usual | more))


def save_series(folder, volume, *, name=lambda k: f"{k:03d}.dcm", uid=None, order=None, **more):
    """Save a series of axial slices 2.5 mm apart; ``order``: the places of the slices in the order of the names."""
    uid = uid or generate_uid()
    places = range(len(volume)) if order is None else order
    for k, z in enumerate(places):
        save_slice(folder / name(k), volume[z], 2.5 * z, uid, **more)


def found_in(folder):
    """The volumes by name, ``(z, y, x)``, and the files that are left out."""
    found = find_series(folder, list(files_below(folder)))
    volumes = {s.name: read_image(s.files)[0][..., 0] for s in found.series}
    return volumes, {p.name: r for p, r in (found.left_out | found.damaged).items()}, found.series


RANDOM = np.random.default_rng(5).permutation(6)
EXPORTS = {
    "in order": {},
    "from the head": {"order": range(5, -1, -1)},
    "names in any order": {"order": RANDOM},
    "no suffix": {"name": lambda k: f"IM{k:05d}", "order": RANDOM},
    "UIDs": {"name": lambda k: f"1.2.826.0.1.{(k * 7919) % 997}.{k}", "order": RANDOM},
    "capitals": {"name": lambda k: f"I{k}.DCM"},
    "in folders": {"name": lambda k: f"D{k % 2}/{k}"},
}


@pytest.mark.parametrize("export", EXPORTS)
def test_names_of_dicom_files_have_no_meaning(export, tmp_path):
    save_series(tmp_path / "a", volume_of(0), **EXPORTS[export])
    volumes, left_out, _ = found_in(tmp_path)
    assert list(volumes) == ["P1_2"] and not left_out
    np.testing.assert_array_equal(volumes["P1_2"], volume_of(0))


def test_every_series_of_every_patient_is_found_and_what_is_left_out_is_said(tmp_path):
    """All in one folder, with names that tell nothing."""
    numbers = itertools.count()
    name = lambda k: f"{(next(numbers) * 7919) % 99991:05d}"  # noqa: E731
    contents = {}
    for patient, number in itertools.product(("P1", "P2"), (2, 3)):
        contents[f"{patient}_{number}"] = volume_of(len(contents))
        save_series(tmp_path, contents[f"{patient}_{number}"], name=name, patient=patient, number=number, order=RANDOM)
    localizer = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "number": 1}
    save_series(tmp_path, volume_of(8, (2, 10, 8)), name=lambda k: f"scout{k}", **localizer)
    uid = pydicom.dcmread(next(files_below(tmp_path))).SeriesInstanceUID
    turned = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
    save_slice(tmp_path / "coronal", volume_of(9)[0], 0, uid, **turned)  # one of another orientation in a series
    report = pydicom.dcmread(next(files_below(tmp_path)))
    for tag in ("PixelData", "Rows", "Columns"):
        delattr(report, tag)
    report.Modality = "SR"
    report.save_as(tmp_path / "report")
    (tmp_path / "damaged.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"broken" * 9)
    (tmp_path / "viewer.exe").write_bytes(b"MZ")
    (tmp_path / "README.txt").write_text("an archive")
    volumes, left_out, _ = found_in(tmp_path)
    assert volumes.keys() == contents.keys()
    for key, volume in contents.items():
        np.testing.assert_array_equal(volumes[key], volume)
    assert left_out.keys() == {"scout0", "scout1", "coronal", "report", "damaged.dcm", "viewer.exe"}
    assert "localizer" in left_out["scout0"] and "SR" in left_out["report"]


@pytest.mark.parametrize(
    "tags", [{"EchoTime": [2.3, 4.6]}, {"TemporalPositionIdentifier": [1, 2]}, {"AcquisitionNumber": [1, 2]}]
)
def test_volumes_that_share_a_series_are_separated(tags, tmp_path):
    """Two echoes, two times, two contrast phases at the same positions."""
    ((tag, values),) = tags.items()
    uid = generate_uid()
    for i, value in enumerate(values):
        save_series(tmp_path, volume_of(i), name=lambda k, i=i: f"{k}_{i}", uid=uid, order=RANDOM, **{tag: value})
    volumes, _, _ = found_in(tmp_path)
    assert list(volumes) == ["P1_2_1", "P1_2_2"]
    for i, name in enumerate(volumes):
        np.testing.assert_array_equal(volumes[name], volume_of(i))


def test_volumes_that_no_tag_separates_are_one_problem(tmp_path):
    uid = generate_uid()
    for i in range(2):
        save_series(tmp_path, volume_of(i), name=lambda k, i=i: f"{k}_{i}", uid=uid)
    series = find_series(tmp_path, list(files_below(tmp_path))).series
    (problem,) = series[0].problems
    assert problem.kind == "duplicate_slice" and "2 slices at each position" in problem.found


@pytest.mark.parametrize(("fault", "kind"), [("missing", "slice_gap"), ("twice", "duplicate_slice")])
def test_missing_and_duplicate_slices_are_told_apart(fault, kind, tmp_path):
    save_series(tmp_path, volume_of(0), order=RANDOM, uid="1.2.3.9")
    if fault == "missing":
        (tmp_path / f"{list(RANDOM).index(3):03d}.dcm").unlink()
    else:
        save_slice(tmp_path / "again", volume_of(0)[3], 7.5, "1.2.3.9")
    series = find_series(tmp_path, list(files_below(tmp_path))).series
    assert {p.kind for p in series[0].problems if p.severity == "error"} == {kind}


def test_a_gantry_tilt_and_a_wrong_thickness_are_said(tmp_path):
    tilt = np.radians(15)
    down = [1, 0, 0, 0, float(np.cos(tilt)), float(np.sin(tilt))]
    save_series(tmp_path / "tilted", volume_of(0), ImageOrientationPatient=down)
    save_series(tmp_path / "thick", volume_of(0), patient="P2", SliceThickness=10)
    save_series(tmp_path / "plain", volume_of(0), patient="P3")
    series = find_series(tmp_path, list(files_below(tmp_path))).series
    kinds = {s.name: {(p.kind, p.severity) for p in s.problems} for s in series}
    assert kinds == {"P1_2": {("gantry_tilt", "warning")}, "P2_2": {("spacing", "warning")}, "P3_2": set()}
    assert "15.0 degrees" in series[0].problems[0].found


SYNTAXES = {
    "RLE": gdcm.TransferSyntax.RLELossless,
    "JPEG lossless": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "JPEG-LS": gdcm.TransferSyntax.JPEGLSLossless,
    "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
}


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_compressed_pixels_are_read(syntax, tmp_path):
    """Compressed with GDCM's own tools, without pydicom."""
    save_series(tmp_path, volume_of(0), order=RANDOM)
    for path in list(files_below(tmp_path)):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(SYNTAXES[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        assert UID(pydicom.dcmread(path).file_meta.TransferSyntaxUID).is_compressed
    volumes, _, _ = found_in(tmp_path)
    np.testing.assert_array_equal(volumes["P1_2"], volume_of(0))


def test_a_compression_without_decoder_is_named(tmp_path, monkeypatch):
    save_series(tmp_path, volume_of(0))
    path = tmp_path / "000.dcm"
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = MPEG2MPML
    data["PixelData"].VR = "OB"
    data.PixelData = pydicom.encaps.encapsulate([b"\0" * 8])
    data.save_as(path)
    series = find_series(tmp_path, list(files_below(tmp_path))).series
    with pytest.raises(UserError, match="MPEG2") as error:
        read_image(series[0].files)
    assert "python-gdcm" in str(error.value)


def test_frames_of_one_file_are_sorted_by_position(tmp_path):
    """An enhanced MR image: geometry and rescaling in functional groups, frames in any order."""
    volume = volume_of(0)
    save_slice(
        tmp_path / "x", volume[0], 0, generate_uid(), Modality="MR", ImagePositionPatient=None, PixelSpacing=None
    )
    data = pydicom.dcmread(tmp_path / "x")
    for tag in ("ImageOrientationPatient", "SliceThickness", "RescaleSlope", "RescaleIntercept"):
        delattr(data, tag)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    data.NumberOfFrames = len(volume)

    def group(**sequences):
        out = Dataset()
        for name, values in sequences.items():
            item = Dataset()
            for tag, value in values.items():
                setattr(item, tag, value)
            setattr(out, name, Sequence([item]))
        return out

    data.SharedFunctionalGroupsSequence = Sequence(
        [
            group(
                PixelMeasuresSequence={"PixelSpacing": [0.7, 0.8], "SliceThickness": 2.5},
                PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
            )
        ]
    )
    data.PerFrameFunctionalGroupsSequence = Sequence(
        [
            group(
                PlanePositionSequence={"ImagePositionPatient": [0, 0, 2.5 * float(z)]},
                PixelValueTransformationSequence={"RescaleSlope": 2, "RescaleIntercept": int(z)},
            )
            for z in RANDOM
        ]
    )
    data.PixelData = np.ascontiguousarray(volume[RANDOM]).tobytes()
    data.save_as(tmp_path / "x")
    series = find_series(tmp_path, [tmp_path / "x"]).series
    array, grid = read_image(series[0].files)
    np.testing.assert_array_equal(array[..., 0], volume * 2 + np.arange(6)[:, None, None])
    assert grid.spacing == pytest.approx((2.5, 0.7, 0.8))


# -- prediction ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("own") / "run", flat=True, channels=("CT",))


def run(workdir, source, output, *more, code=0):
    assert predict.main([f"--workdir={workdir}", f"--input={source}", f"--output={output}", *more]) == code


def names_in(folder):
    return {p.name.removesuffix(".nii.gz") for p in folder.glob("*.nii.gz")}


def save_nifti(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume_of(seed, (36, 40, 3)), np.eye(4)), path)


def test_two_patients_never_share_an_output(workdir, tmp_path):
    """One after the other into one folder: DICOM is named after the patient, and files of one name are refused."""
    out = tmp_path / "out"
    for i, patient in enumerate(("P1", "P2")):
        save_series(tmp_path / patient / "DICOM_anon", volume_of(i, (3, 40, 36)), patient=patient)
        run(workdir, tmp_path / patient / "DICOM_anon", out)
    assert names_in(out) == {"P1_2", "P2_2"}

    for i, patient in enumerate(("pa", "pb")):  # without PatientID: the folders' names
        save_series(tmp_path / patient / "DICOM_anon", volume_of(i, (3, 40, 36)), patient=None)
        run(workdir, tmp_path / patient / "DICOM_anon", out)
    assert names_in(out) == {"P1_2", "P2_2", "pa_DICOM_anon", "pb_DICOM_anon"}

    for i, patient in enumerate(("qa", "qb")):
        save_nifti(tmp_path / patient / "CT.nii.gz", i)
    run(workdir, tmp_path / "qa" / "CT.nii.gz", out)
    before = (out / "CT.nii.gz").read_bytes()
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError) as error:
            run(workdir, tmp_path / "qb" / "CT.nii.gz", out, *more)
        assert str(tmp_path / "qa" / "CT.nii.gz") in str(error.value)
        assert str(tmp_path / "qb" / "CT.nii.gz") in str(error.value)
    assert (out / "CT.nii.gz").read_bytes() == before
    run(workdir, tmp_path / "qa" / "CT.nii.gz", out)  # the same image is no conflict


def test_one_file_is_never_a_request_for_its_folder(workdir, tmp_path):
    """A download that is not complete, an archive, and a series in a folder without DICOM."""
    save_nifti(tmp_path / "in" / "a.nii.gz", 0)
    for name in ("b.nii.gz.part", "b.zip", "b.json"):
        (tmp_path / "in" / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            run(workdir, tmp_path / "in" / name, tmp_path / "out")
    with pytest.raises(UserError, match="contains no DICOM series"):
        run(workdir, tmp_path / "in", tmp_path / "out", "--series=3")
    assert not names_in(tmp_path / "out")


def test_channels_of_two_patients_are_not_one_case(tmp_path):
    for name in ("a_0000", "a_0001", "b_0001"):
        save_nifti(tmp_path / f"{name}.nii.gz", 0)
    data = nnunet.nnunet_from_description(
        nnunet.Description(
            ("T1", "T2"), Labels("own", ("background", "organ"), (0, 1)), regions.Regions({"organ": (1,)})
        )
    )
    a0, a1, b1 = (tmp_path / f"{name}.nii.gz" for name in ("a_0000", "a_0001", "b_0001"))
    assert case_from_files([a0, a1], data).case_id == "a"
    for files, words in (([a0, b1], "different cases"), ([a0, a0], "given twice"), ([a1, a0], "channel 1")):
        with pytest.raises(UserError, match=words):
            case_from_files(files, data)


def test_an_unreadable_folder_below_the_data_is_an_error(tmp_path, monkeypatch):
    """The error of the system is simulated, because root can read every folder."""
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked cannot be read .*Permission denied"):
        list(files_below(tmp_path))


def test_a_file_that_is_no_prediction_is_never_replaced(workdir, tmp_path):
    save_nifti(tmp_path / "in" / "a.nii.gz", 0)
    save_nifti(tmp_path / "out" / "a.nii.gz", 1)
    before = (tmp_path / "out" / "a.nii.gz").read_bytes()
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="not a prediction"):
            run(workdir, tmp_path / "in", tmp_path / "out", *more)
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before


def test_a_tree_of_patients_is_predicted_whole(workdir, tmp_path, capsys):
    """Images with the same name in different folders, DICOM with the same numbers, and files that are not read."""
    root = tmp_path / "in"
    for i, patient in enumerate(("pa", "pb")):
        save_nifti(root / patient / "CT.nii.gz", i)
        save_series(root / patient / "st1" / "se1", volume_of(i, (3, 40, 36)), name=lambda k: f"I{k}", patient="ANON")
    shutil.copy(root / "pa" / "CT.nii.gz", root / "PC.NII.GZ")
    (root / "pa" / "incomplete.nii.gz.part").write_bytes(b"x")
    run(workdir, root, tmp_path / "out")
    expected = {"pa_CT", "pb_CT", "PC", "ANON_2_pa_st1_se1", "ANON_2_pb_st1_se1"}
    assert names_in(tmp_path / "out") == expected
    assert "pa/incomplete.nii.gz.part" in capsys.readouterr().out


def test_series_can_be_selected(workdir, tmp_path, capsys):
    for number, text in ((2, "portal venous"), (3, "native")):
        save_series(
            tmp_path / "in" / str(number), volume_of(number, (3, 40, 36)), number=number, SeriesDescription=text
        )
    for i, (selector, name) in enumerate((("3", "P1_3"), ("Portal Venous", "P1_2"), ("P1_3", "P1_3"))):
        run(workdir, tmp_path / "in", tmp_path / f"out{i}", f"--series={selector}")
        assert names_in(tmp_path / f"out{i}") == {name}
        said = capsys.readouterr().out
        assert ({"P1_2", "P1_3"} - {name}).pop() in next(t for t in said.splitlines() if t.startswith("omitted"))
    with pytest.raises(UserError, match=r"--series=9.*P1_2.*P1_3"):
        run(workdir, tmp_path / "in", tmp_path / "no", "--series=9")


def test_a_series_with_a_gap_fails_and_the_others_are_predicted(workdir, tmp_path, capsys):
    for patient in ("P1", "P2"):
        save_series(tmp_path / "in" / patient, volume_of(0, (5, 40, 36)), patient=patient)
    (tmp_path / "in" / "P1" / "002.dcm").unlink()
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert names_in(tmp_path / "out") == {"P2_2"}
    assert "P1_2 omitted" in capsys.readouterr().out


def test_lists_of_patients_that_cannot_be_used_do_not_prevent_prediction(tmp_path):
    phantom.write_camus(tmp_path, cases=3, shape=(64, 64), frames=2)
    data = get_dataset({"dataset": "camus", "root": str(tmp_path)})
    (tmp_path / "database_split" / "subgroup_testing.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="subgroup_testing"):
        usable_cases(scan_cases(data, tmp_path, need_labels=True), tmp_path)
    cases, problems = inputs.find_cases(data, [tmp_path])
    assert len({c.patient for c in cases}) == 3 and not problems


def test_dicom_of_both_modalities_needs_no_flag(tmp_path, capsys):
    """A network that was trained on CT and MR takes the modality from the headers."""
    data = get_dataset({"dataset": "chaos", "root": str(tmp_path), "task": 1, "phase": "in"})
    for modality in ("CT", "MR", "PT"):
        save_series(tmp_path / modality, volume_of(0), patient=modality, Modality=modality)
    cases, problems = inputs.find_cases(data, [tmp_path])
    assert {c.case_id: c.info["modality"] for c in cases} == {"CT_2": "CT", "MR_2": "MR"} and not problems
    out = capsys.readouterr().out
    assert re.search(r"PT_2.* is omitted: the network was trained on CT and MR", out)
    with pytest.raises(UserError, match="no CT or MR series"):
        inputs.find_cases(data, [tmp_path / "PT"])
    assert read_case(cases[0]).image.shape == (6, 10, 8, 1)


@pytest.mark.parametrize(
    ("heights", "wrong"),
    [
        ([0, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80], True),  # thin slices at the base of the skull
        ([0, 5, 15], True),
        ([0, 1, 3, 4, 6], True),
        ([0, 5, 10, 15, 17.5, 20], True),
        ([*np.arange(0, 40, 1.0), *np.arange(40, 84, 1.1)], True),  # every step is near the median
        ([0, 5, 10.2, 15.1, 20, 24.9], False),
        ([0, 0.2, 0.5, 0.8, 1.0, 1.2, 1.5], False),  # 0.25 mm, rounded to one decimal
    ],
)
def test_slices_that_are_not_on_a_grid_are_an_error(heights, wrong, tmp_path):
    """An affine has one slice spacing: the largest distance between a slice and its voxels is computed by hand."""
    uid = generate_uid()
    for k, z in enumerate(heights):
        save_slice(tmp_path / f"{k}", volume_of(0)[0], float(z), uid)
    (series,) = find_series(tmp_path, list(files_below(tmp_path))).series
    found = {p.kind for p in series.problems if p.severity == "error"}
    assert found == ({"slice_gap"} if wrong else set())
    if not wrong:
        first, step = heights[0], (heights[-1] - heights[0]) / (len(heights) - 1)
        assert max(abs(z - first - k * step) for k, z in enumerate(heights)) < 0.25 * step


DAMAGE = {
    "cut within the header": lambda content: content[:400],
    "cut after the modality": lambda content: content[: content.index(b"\x28\x00\x02\x00")],
    "empty": lambda content: b"",
    "without its beginning": lambda content: content[200:],
}


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [*itertools.product(DAMAGE, (".dcm", ""))][:-1],  # without beginning and suffix, nothing shows that it is DICOM
)
def test_a_series_with_a_damaged_file_is_not_predicted(damage, suffix, workdir, tmp_path, capsys):
    """The last slice, whose loss the positions of the others do not show."""
    name = lambda k: f"IM{k}{suffix}"  # noqa: E731
    for patient in ("P1", "P2"):
        save_series(tmp_path / "in" / patient, volume_of(0, (4, 40, 36)), patient=patient, name=name)
    path = tmp_path / "in" / "P1" / name(3)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert names_in(tmp_path / "out") == {"P2_2"} and path.name in capsys.readouterr().out


@pytest.mark.parametrize("noise", ["in turn", "from the middle on", "of the pixel size"])
def test_noise_in_the_headers_does_not_divide_a_series(noise, tmp_path):
    """Cosines and pixel sizes that differ in their last digits, beside a number at which rounding changes."""
    for k, plane in enumerate(volume_of(0)):
        other = k % 2 if noise == "in turn" else k >= 3
        sine = 0.125 + (1e-7 if other and noise != "of the pixel size" else -1e-7)
        axes = [np.sqrt(1 - sine**2), sine, 0.0, -sine, np.sqrt(1 - sine**2), 0.0]
        size = 0.7005 + (1e-7 if other and noise == "of the pixel size" else -1e-7)
        more = {"ImageOrientationPatient": [f"{v:.9f}" for v in axes], "PixelSpacing": [f"{size:.8f}"] * 2}
        save_slice(tmp_path / f"{k}.dcm", plane, 2.5 * k, "1.2.3", **more)
    volumes, left_out, series = found_in(tmp_path)
    assert list(volumes) == ["P1_2"] and not left_out and not series[0].problems
    np.testing.assert_array_equal(volumes["P1_2"], volume_of(0))


def test_a_damaged_file_among_several_series_is_a_warning_for_each(workdir, tmp_path, capsys):
    """A flat export: the file may belong to any of them."""
    for patient in ("P1", "P2"):
        save_series(tmp_path / "in", volume_of(0, (4, 40, 36)), patient=patient, name=lambda k: f"{patient}-{k}.dcm")  # noqa: B023
    path = tmp_path / "in" / "P1-3.dcm"
    path.write_bytes(path.read_bytes()[:400])
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert names_in(tmp_path / "out") == {"P1_2", "P2_2"}
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning") and path.name in line
    ]
    assert [name for line in warnings for name in ("P1_2", "P2_2") if name in line] == ["P1_2", "P2_2"]


def test_a_name_in_another_encoding_is_the_failure_of_its_case(workdir, tmp_path, capsys):
    """A name from an old network drive, in Latin-1."""
    (tmp_path / "in").mkdir()
    save_nifti(tmp_path / "in" / "ok.nii.gz", 1)
    try:
        shutil.copy(tmp_path / "in" / "ok.nii.gz", os.fsencode(tmp_path / "in") + b"/M\xfcller.nii.gz")
    except OSError:
        pytest.skip("this file system has no such names")
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert names_in(tmp_path / "out") == {"ok"} and "UTF-8" in capsys.readouterr().out
    cases = [f"M\udcfc{i}" for i in range(5)]
    assert sorted(splits.assign_folds(cases, 5, seed=0)) == cases


def test_a_mark_that_a_transfer_is_complete_is_no_slice(tmp_path):
    save_series(tmp_path, volume_of(0), name=lambda k: f"IM{k}")
    for name in ("DONE", "_SUCCESS"):
        (tmp_path / name).touch()
    volumes, left_out, series = found_in(tmp_path)
    assert list(volumes) == ["P1_2"] and not series[0].problems and set(left_out) == {"DONE", "_SUCCESS"}


def test_a_link_to_a_slice_that_was_not_copied_makes_its_series_incomplete(workdir, tmp_path, capsys):
    save_series(tmp_path / "in", volume_of(0, (4, 40, 36)), name=lambda k: f"IM{k}")
    (tmp_path / "in" / "IM3").unlink()
    (tmp_path / "in" / "IM3").symlink_to("../.git/annex/objects/x")
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert not names_in(tmp_path / "out") and "IM3" in capsys.readouterr().out


def test_links_that_no_case_needs_do_not_matter(tmp_path):
    """Other files of a clone with git-annex, and for prediction the references."""
    card = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    for name in "ab":
        save_nifti(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", ord(name))
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "func").mkdir()
    for link in ("labelsTr/a.nii.gz", "func/bold.nii.gz"):
        (tmp_path / link).symlink_to("../.git/annex/objects/x")
    (tmp_path / "cases.csv").write_text(
        "image,label\nimagesTr/a_0000.nii.gz,labelsTr/a.nii.gz\nimagesTr/b_0000.nii.gz,\n"
    )
    data = get_dataset({"dataset": "table", "root": str(tmp_path)})
    cases, problems = inputs.find_cases(data, [tmp_path])
    assert len(cases) == 2 and not problems
    data = get_dataset({"dataset": "nnunet", "root": str(tmp_path)})
    cases, problems = inputs.find_cases(data, [tmp_path])
    assert len(cases) == 2 and set(problems) == {str(tmp_path / "func" / "bold.nii.gz")}


def test_a_patient_whose_files_are_all_damaged_is_a_failure(workdir, tmp_path, capsys):
    for patient in ("P1", "P2"):
        save_series(tmp_path / "in" / patient, volume_of(0, (4, 40, 36)), patient=patient)
    for path in (tmp_path / "in" / "P1").iterdir():
        path.write_bytes(path.read_bytes()[:400])
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert names_in(tmp_path / "out") == {"P2_2"} and str(tmp_path / "in" / "P1") in capsys.readouterr().out


@pytest.mark.parametrize("syntax", ["implicit", "explicit"])
def test_files_without_preamble_are_read(syntax, tmp_path):
    """Old archives store the data set alone."""
    save_series(tmp_path / "in", volume_of(0), order=RANDOM)
    for path in (tmp_path / "in").iterdir():
        data = pydicom.dcmread(path)
        with open(tmp_path / "bare", "wb") as file:
            stream = pydicom.filebase.DicomFileLike(file)
            stream.is_little_endian, stream.is_implicit_VR = True, syntax == "implicit"
            pydicom.filewriter.write_dataset(stream, data)
        (tmp_path / "bare").replace(path)
        assert path.read_bytes()[128:132] != b"DICM"
    volumes, left_out, _ = found_in(tmp_path)
    assert not left_out
    np.testing.assert_array_equal(volumes["P1_2"], volume_of(0))


def test_patients_with_one_slice_are_kept_beside_patients_with_several(tmp_path):
    """One slice at the third lumbar vertebra each, to measure the body composition."""
    for i in range(3):
        save_series(tmp_path / f"P{i}", volume_of(i, (1 + i, 10, 8)), patient=f"P{i}", StudyInstanceUID=f"1.2.{i + 1}")
    save_slice(tmp_path / "scout", volume_of(9)[0], 0, generate_uid(), "P2", 9, StudyInstanceUID="1.2.3")
    volumes, left_out, _ = found_in(tmp_path)
    assert {name: len(v) for name, v in volumes.items()} == {"P0_2": 1, "P1_2": 2, "P2_2": 3}
    assert set(left_out) == {"scout"}


def test_series_of_another_modality_are_not_segmented_by_a_network_for_ct(workdir, tmp_path, capsys):
    for number, modality in ((2, "CT"), (3, "MR"), (4, "PT")):
        shape = (3, 40, 36)
        save_series(tmp_path / "in" / modality, volume_of(number, shape), number=number, Modality=modality)
    run(workdir, tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr().out
    assert names_in(tmp_path / "out") == {"P1_2"} and "P1_3" in said and "P1_4" in said
    run(workdir, tmp_path / "in", tmp_path / "out", "--series=3")
    assert names_in(tmp_path / "out") == {"P1_2", "P1_3"}
    with pytest.raises(UserError, match="CT"):
        run(workdir, tmp_path / "in" / "MR", tmp_path / "out")


def test_predictions_in_any_folder_are_not_images(workdir, tmp_path, capsys):
    """Earlier predictions below the images are skipped; an image inside the output folder is predicted."""
    save_nifti(tmp_path / "in" / "a.nii.gz", 0)
    run(workdir, tmp_path / "in", tmp_path / "in" / "fast", "--probabilities")
    save_nifti(tmp_path / "in" / "best" / "ct.nii.gz", 1)
    capsys.readouterr()
    run(workdir, tmp_path / "in", tmp_path / "in" / "best")
    assert names_in(tmp_path / "in" / "best") == {"a", "best_ct", "ct"}
    assert "2 predictions" in capsys.readouterr().out
    with pytest.raises(UserError, match="only predictions"):
        run(workdir, tmp_path / "in" / "fast", tmp_path / "out")


def test_other_files_of_a_case_are_never_deleted(workdir, tmp_path):
    """Probability and uncertainty maps of another program, without a label map beside them."""
    save_nifti(tmp_path / "in" / "a.nii.gz", 0)
    for part in ("probabilities/a.nii.gz", "uncertainty/a.nii.gz"):
        save_nifti(tmp_path / "out" / part, 1)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.nii.gz")}
    run(workdir, tmp_path / "in", tmp_path / "out", "--overwrite")
    assert len(files) == 2 and all(path.read_bytes() == content for path, content in files.items())
    with pytest.raises(UserError, match="not a prediction"):
        run(workdir, tmp_path / "in", tmp_path / "out", "--overwrite", "--probabilities", "--compress")
    assert all(path.read_bytes() == content for path, content in files.items())


def test_predictions_without_a_record_are_not_replaced_by_those_of_other_images(workdir, tmp_path):
    for folder in ("a", "b"):
        save_nifti(tmp_path / folder / "CT.nii.gz", len(folder) + ord(folder))
    run(workdir, tmp_path / "a", tmp_path / "out")
    (tmp_path / "out" / "predict.json").unlink()
    before = (tmp_path / "out" / "CT.nii.gz").read_bytes()
    with pytest.raises(UserError, match="other images"):
        run(workdir, tmp_path / "b", tmp_path / "out")
    run(workdir, tmp_path / "a", tmp_path / "out")  # the same image
    assert (tmp_path / "out" / "CT.nii.gz").read_bytes() == before


def test_a_series_that_has_become_complete_is_predicted_again(workdir, tmp_path):
    save_series(tmp_path / "in", volume_of(0, (5, 40, 36)))
    last = (tmp_path / "in" / "004.dcm").read_bytes()
    (tmp_path / "in" / "004.dcm").unlink()
    run(workdir, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "004.dcm").write_bytes(last)
    run(workdir, tmp_path / "in", tmp_path / "out")
    assert nib.load(tmp_path / "out" / "P1_2.nii.gz").shape == (36, 40, 5)


@pytest.mark.parametrize("layout", ["plain", "nnunet"])
def test_a_link_to_a_file_that_was_not_copied_is_a_failure_of_its_case(layout, workdir, tmp_path, capsys):
    """As after ``git clone`` of a data set with git-annex."""
    folder = tmp_path / "in" / ("imagesTs" if layout == "nnunet" else "")
    for name in "ac":
        save_nifti(folder / f"{name}_0000.nii.gz", ord(name))
    (folder / "b_0000.nii.gz").symlink_to("../.git/annex/objects/b")
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert names_in(tmp_path / "out") == {"a", "c"} and "b_0000.nii.gz" in capsys.readouterr().out


def test_a_name_that_is_too_long_is_a_failure_of_its_case(workdir, tmp_path, capsys):
    """Folders in Cyrillic letters, which have two bytes each."""
    save_nifti(tmp_path / "in" / "a.nii.gz", 0)
    save_nifti(tmp_path / "in" / ("П" * 80) / ("ф" * 80) / "ct.nii.gz", 1)
    run(workdir, tmp_path / "in", tmp_path / "out", code=1)
    assert names_in(tmp_path / "out") == {"a"} and "bytes" in capsys.readouterr().out


def test_the_same_command_can_be_repeated_with_the_output_below_a_data_set(workdir, tmp_path, capsys):
    for name in "ab":
        save_nifti(tmp_path / "in" / "imagesTs" / f"{name}_0000.nii.gz", ord(name))
    for _ in range(2):
        run(workdir, tmp_path / "in", tmp_path / "in" / "predictions")
    assert names_in(tmp_path / "in" / "predictions") == {"a", "b"}
    assert "2 of 2 cases" in capsys.readouterr().out  # up to date


@pytest.mark.parametrize(("unit", "usable"), [("mm", True), ("unknown", True), ("micron", False), ("meter", False)])
def test_voxel_sizes_in_other_units_than_mm_are_an_error(unit, usable, tmp_path):
    image = nib.Nifti1Image(volume_of(0, (4, 4, 4)), np.diag([25, 25, 25, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    if usable:
        assert read_grid(tmp_path / "a.nii.gz").spacing == (25, 25, 25)
    else:
        with pytest.raises(UserError, match=r"a\.nii\.gz.*metres.*mm"):
            read_grid(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", ["camus", "brats"])
def test_workdirs_inside_the_data_are_not_data(name, tmp_path):
    """Predictions of a run have the names of images, and their folder may be sorted before those of the patients."""
    root = tmp_path / "data"
    write = {"camus": phantom.write_camus, "brats": phantom.write_brats}[name]
    write(
        root, **({"cases": 2, "shape": (64, 64), "frames": 2} if name == "camus" else {"cases": 2, "shape": (32,) * 3})
    )
    options = {"camus": {}, "brats": {"convention": "brats2021"}}[name]
    data = get_dataset({"dataset": name, "root": str(root)} | options)
    before = scan_cases(data, root, need_labels=True)
    for folder, marks in (("a_run", ("config.json", "split.json")), ("a_fit", ("recipe.json", "recipe.py"))):
        for case in before.cases:
            save_nifti(root / folder / "predictions" / f"{case.case_id}.nii.gz", 1)
        for mark in marks:
            (root / folder / mark).write_text("{}")
    (root / "a_crossval" / "fold0").mkdir(parents=True)
    (root / "a_crossval" / "fold0" / "split.json").write_text("{}")
    save_nifti(root / "a_crossval" / "predictions" / f"{before.cases[0].case_id}.nii.gz", 1)
    after = scan_cases(data, root, need_labels=True)
    assert after.cases == before.cases and after.problems == before.problems and len(before.cases) >= 2


def test_ct_for_a_network_that_was_trained_on_mr_is_a_warning(tmp_path, capsys):
    network = make_workdir(tmp_path / "run", flat=True, channels=("T2",))
    for modality in ("CT", "MR"):
        save_series(tmp_path / "in" / modality, volume_of(0, (3, 40, 36)), patient=modality, Modality=modality)
    run(network, tmp_path / "in", tmp_path / "out")
    assert names_in(tmp_path / "out") == {"CT_2", "MR_2"}
    warned = [line for line in capsys.readouterr().out.splitlines() if "not trained on CT" in line]
    assert len(warned) == 1 and "CT_2" in warned[0]
    venous = make_workdir(tmp_path / "venous", flat=True, channels=("CT_venous",))
    run(venous, tmp_path / "in", tmp_path / "other")
    assert "not trained on" not in capsys.readouterr().out


def test_a_series_that_cannot_be_used_leaves_the_prediction_of_an_image_with_its_name(workdir, tmp_path, capsys):
    save_series(tmp_path / "in" / "series", volume_of(0, (5, 40, 36)), patient="P1")
    nib.save(nib.Nifti1Image(volume_of(0, (36, 40, 3)), np.eye(4)), tmp_path / "in" / "P1_2.nii.gz")
    (tmp_path / "in" / "series" / "002.dcm").unlink()
    for _ in range(2):
        run(workdir, tmp_path / "in", tmp_path / "out", code=1)
        assert names_in(tmp_path / "out") == {"P1_2"}


def test_an_unknown_orientation_is_a_warning(workdir, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(volume_of(0, (36, 40, 3)), None), tmp_path / "in" / "a.nii.gz")
    nib.save(nib.Nifti1Image(volume_of(0, (36, 40, 3)), np.eye(4)), tmp_path / "in" / "b.nii.gz")
    run(workdir, tmp_path / "in", tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if "sform" in line]
    assert len(lines) == 1 and "a.nii.gz" in lines[0]


@pytest.mark.parametrize("layout", ["table", "nnunet"])
def test_prediction_does_not_need_the_references_of_a_data_set(layout, tmp_path):
    """Missing, twice, and damaged."""
    card = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    rows = ["image,label"]
    for name in "abc":
        save_nifti(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", ord(name))
        rows.append(f"imagesTr/{name}_0000.nii.gz,labelsTr/{name}.nii.gz")
    for name in ("b.nii.gz", "b.nii"):
        save_nifti(tmp_path / "labelsTr" / name, 1)
    (tmp_path / "labelsTr" / "c.nii.gz").write_bytes(b"x")
    if layout == "table":
        (tmp_path / "cases.csv").write_text("\n".join(rows))
    cases, problems = inputs.find_cases(get_dataset({"dataset": layout, "root": str(tmp_path)}), [tmp_path])
    assert len(cases) == 3 and not problems


# -- unusual headers and contents ---------------------------------------------------------------------------------


def test_patients_with_one_series_uid_are_not_merged(tmp_path):
    """As after a poor anonymisation: one UID for all, at other positions."""
    save_series(tmp_path / "a", volume_of(0), uid="1.2.3", patient="A")
    for k, plane in enumerate(volume_of(1)):
        save_slice(tmp_path / "b" / f"{k}.dcm", plane, 100 + 2.5 * k, "1.2.3", patient="B")
    volumes, _, _ = found_in(tmp_path)
    assert list(volumes) == ["A_2", "B_2"]
    for i, name in enumerate(volumes):
        np.testing.assert_array_equal(volumes[name], volume_of(i))


@pytest.mark.parametrize(
    "tags", [{"Modality": "SEG"}, {"Modality": "RTDOSE"}, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, {"number": 9}]
)
def test_what_is_no_scan_is_left_out_beside_one(tags, tmp_path):
    """A segmentation, a dose, a screenshot, and a planning image of one slice."""
    save_series(tmp_path, volume_of(0), order=RANDOM)
    options = {"number": 8} | tags
    save_slice(tmp_path / "other", volume_of(1)[0], 0, generate_uid(), **options)
    volumes, left_out, _ = found_in(tmp_path)
    assert list(volumes) == ["P1_2"] and set(left_out) == {"other"}


ODD = {
    "EchoTime with a comma": ("EchoTime", b"1,0 "),
    "two echo times": ("EchoTime", b"1\\2 "),
    "empty Rows": ("Rows", b""),
    "a position without a number": ("ImagePositionPatient", b"0\\\\0"),
    "PixelSpacing that is no number": ("PixelSpacing", b"x "),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_odd_headers_fail_only_their_own_series(name, tmp_path):
    """The bytes of a tag are replaced, because pydicom would refuse to write them."""
    tag, value = ODD[name]
    save_series(tmp_path, volume_of(0), order=RANDOM)
    save_series(tmp_path / "odd", volume_of(1), patient="ODD", EchoTime=1)
    for path in files_below(tmp_path / "odd"):
        content = path.read_bytes()
        group, element = divmod(pydicom.datadict.tag_for_keyword(tag), 65536)
        at = content.index(group.to_bytes(2, "little") + element.to_bytes(2, "little"))
        size = int.from_bytes(content[at + 6 : at + 8], "little")
        path.write_bytes(content[: at + 6] + len(value).to_bytes(2, "little") + value + content[at + 8 + size :])
    series = find_series(tmp_path, list(files_below(tmp_path))).series
    whole = next(s for s in series if s.name == "P1_2")
    np.testing.assert_array_equal(read_image(whole.files)[0][..., 0], volume_of(0))
    assert whole.problems == ()


def test_an_image_that_fails_does_not_delete_what_is_not_its_prediction(workdir, tmp_path, capsys):
    """A hand-made file, and the prediction of another image, of the name of a series with a gap."""
    save_series(tmp_path / "a", volume_of(0, (5, 40, 36)), patient="P")
    run(workdir, tmp_path / "a", tmp_path / "out")
    before = (tmp_path / "out" / "P_2.nii.gz").read_bytes()
    for part in ("b", "c"):
        save_series(tmp_path / part, volume_of(1, (5, 40, 36)), patient="P")
        (tmp_path / part / "002.dcm").unlink()
    run(workdir, tmp_path / "b", tmp_path / "out", code=1)
    assert (tmp_path / "out" / "P_2.nii.gz").read_bytes() == before and "is kept" in capsys.readouterr().out
    (tmp_path / "a" / "002.dcm").unlink()  # of the same image: the old prediction is not that of the current files
    run(workdir, tmp_path / "a", tmp_path / "out", code=1)
    assert not (tmp_path / "out" / "P_2.nii.gz").exists()
    save_nifti(tmp_path / "out" / "P_2.nii.gz", 3)
    run(workdir, tmp_path / "c", tmp_path / "out", code=1)
    assert (tmp_path / "out" / "P_2.nii.gz").exists()


def test_a_shard_does_not_make_way_for_another(workdir, tmp_path):
    """Four images, of which the output has others of the same names: neither shard replaces any."""
    for folder in ("a", "b"):
        for i in range(4):
            save_nifti(tmp_path / folder / f"{i}.nii.gz", i)
    run(workdir, tmp_path / "a", tmp_path / "out")
    for path in (tmp_path / "out").glob("[02].nii.gz"):
        path.unlink()
    for shard in ("0/2", "1/2", "1/2"):
        with pytest.raises(UserError, match="would replace it"):
            run(workdir, tmp_path / "b", tmp_path / "out", f"--shard={shard}")


def test_images_beside_folders_are_all_predicted(workdir, tmp_path):
    """A plain folder whose names look like nnU-Net's."""
    save_nifti(tmp_path / "in" / "p1_0000.nii.gz", 0)
    save_nifti(tmp_path / "in" / "p2" / "ct.nii.gz", 1)
    run(workdir, tmp_path / "in", tmp_path / "out")
    assert names_in(tmp_path / "out") == {"p1", "p2_ct"}


def test_a_root_above_is_searched(tmp_path, monkeypatch):
    phantom.write_brats(tmp_path / "data", cases=1, shape=(32, 32, 32))
    (tmp_path / "data" / "x").mkdir()
    (tmp_path / "data" / "x" / "readme.txt").touch()
    monkeypatch.chdir(tmp_path / "data" / "x")
    data = get_dataset({"dataset": "brats", "root": "..", "convention": "brats2021"})
    assert len(scan_cases(data, Path(".."), need_labels=True).cases) == 1


def test_names_that_cannot_be_encoded_are_logged(tmp_path):
    """Latin-1 names from an archive made on Windows, on a terminal with UTF-8 and one with ASCII."""
    script = (
        "from xdim_jax.base import log; log.say(chr(0xDCFC) + chr(0xE4)); log.write_result(chr(0xDCFC) + chr(0xE4))"
    )
    for encoding in ("utf-8", "ascii"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0 and done.stdout.count(b"\\udcfc") == 2


# -- what a case is -----------------------------------------------------------------------------------------------


def write_metaimage(path, array):
    """A header with its pixels in another file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    assert path.with_suffix(".raw").is_file()


def test_the_pixels_of_a_metaimage_belong_to_its_case(tmp_path):
    """The header does not change when the pixels are corrected."""
    write_metaimage(tmp_path / "imagesTr" / "a_0000.mhd", volume_of(0, (4, 8, 8)).astype(np.int16))
    label = np.zeros((4, 8, 8), np.uint8)
    label[0, 0, 0] = 1
    write_metaimage(tmp_path / "labelsTr" / "a.mhd", label)
    card = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".mhd"}
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    data = get_dataset({"dataset": "nnunet", "root": str(tmp_path)})
    (case,) = scan_cases(data, tmp_path, need_labels=True).cases
    assert {p.name for p in case.files} == {"a_0000.mhd", "a_0000.raw", "a.mhd", "a.raw"}

    (before,) = prepare_cases(data, [case], Preparation(), tmp_path / "store")
    note = output_folder.make_note("digest", case)
    label[:, 0] = 1
    write_metaimage(tmp_path / "labelsTr" / "a.mhd", label)
    write_metaimage(tmp_path / "imagesTr" / "a_0000.mhd", volume_of(1, (4, 8, 8)).astype(np.int16))
    (after,) = prepare_cases(data, [case], Preparation(), tmp_path / "store")
    assert [int((e.load().label == 1).sum()) for e in (before, after)] == [1, 32]
    assert output_folder.make_note("digest", case) != note


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("ElementDataFile = LOCAL\nbinary", []),
        ("ObjectType = Image\nElementDataFile = x.zraw\n", ["x.zraw"]),
        ("ElementDataFile = LIST\na.raw\nb.raw\n", ["a.raw", "b.raw"]),
        ("ElementDataFile = s%03d.raw 1 5 2\n", ["s001.raw", "s003.raw", "s005.raw"]),
        ("no header", []),
        ("ElementDataFile =\n", []),
        ("ElementDataFile = s%03d.raw 1 5 x\n", []),
        ("ElementDataFile = s%03d.raw 1 5 0\n", []),
    ],
)
def test_files_that_a_metaimage_header_names(text, files, tmp_path):
    (tmp_path / "a.mhd").write_text(text)
    assert files_of(tmp_path / "a.mhd") == (tmp_path / "a.mhd", *(tmp_path / name for name in files))


def test_other_label_values_or_another_modality_are_another_prediction(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"x")
    labels = [brats.get_convention(name).labels for name in ("brats2021", "brats2023")]
    cases = [Case("a", "a", (tmp_path / "a.nii.gz",), ("T1",), None, label) for label in labels]
    cases += [dataclasses.replace(cases[0], info={"modality": m}) for m in ("CT", "MR")]
    assert len({output_folder.make_note("digest", case) for case in cases}) == 4


def test_a_convention_with_other_regions_is_refused(tmp_path):
    """BraTS 2024 has a region more than the network."""
    config = load_config("configs/brats_dxnet.py:scratch", [])
    config.model.encoder.name, config.model.filters = "efficientnet_toy", (8, 8, 8, 8, 8)
    config.data.patch = (32, 32, 32)
    write_json(tmp_path / CONFIG_FILE, config.to_dict())
    write_json(tmp_path / DATA_FILE, describe(get_dataset(config.data)))
    _, params, stats = split_model(networks.build(config.model, seed=0))
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    checkpoint.save_best(checkpoints, 1, params, stats, 0.5)
    checkpoint.close(checkpoints)
    assert xdim_jax.Predictor(tmp_path, convention="brats2023").names == ("WT", "TC", "ET")
    with pytest.raises(UserError, match=r"--convention=brats2024.*RC"):
        xdim_jax.Predictor(tmp_path, convention="brats2024")


def test_two_cases_of_one_name_are_an_error(tmp_path, capsys):
    """Patient 1 of two hospitals: one prediction would replace the other."""
    for site in ("a", "b"):
        phantom.write_chaos(tmp_path / "raw" / site, cases=1, shape=(64, 64, 16))
        part = next(p for p in (tmp_path / "raw" / site).rglob("CT") if p.is_dir()).parent
        part.rename(tmp_path / f"site_{site}")
    data = get_dataset({"dataset": "chaos", "task": 2})
    root = tmp_path / "all"
    root.mkdir()
    for site in ("a", "b"):
        (tmp_path / f"site_{site}").rename(root / site)
    scan = scan_cases(data, root, need_labels=False)
    (problem,) = [p for p in scan.problems if p.kind == "duplicate_case"]
    assert problem.severity == "error" and "CT_1" in problem.found
    assert {part for part in ("a", "b") if f"/{part}/" in f"{problem.path} {problem.found}"} == {"a", "b"}
    cases, problems = inputs.find_cases(data, [root])
    assert cases == [] and list(problems) == ["CT_1"]


def test_predictions_inside_the_input_are_no_images(workdir, tmp_path):
    for name in ("a", "b/c"):
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", 0)
    for _ in range(2):
        run(workdir, tmp_path / "in", tmp_path / "in" / "pred")
    assert names_in(tmp_path / "in" / "pred") == {"a", "b_c"}


def test_predictions_are_never_read_as_cases(workdir, tmp_path):
    """Neither next to the images, nor inside a folder in the layout of a data set, where they would be cases."""
    write_series(tmp_path / "series", volume_of(0, (3, 36, 40)).astype(np.int16), (2.0, 0.7, 0.7))
    with pytest.raises(UserError, match="is the folder of the images"):
        run(workdir, tmp_path / "series", tmp_path / "series")
    assert not list((tmp_path / "series").glob("*.nii.gz"))
    data = get_dataset({"dataset": "brats", "convention": "brats2021"})
    phantom.write_brats(tmp_path / "brats", cases=2, shape=(32, 32, 32))
    output = tmp_path / "brats" / "pred"
    assert len(inputs.find_cases(data, [tmp_path / "brats"], output=output)[0]) == 2
    save_nifti(output / "BraTS2021_00000.nii.gz", 0)
    with pytest.raises(UserError, match=r"pred is inside .*brats"):
        inputs.find_cases(data, [tmp_path / "brats"], output=output)
    shutil.rmtree(output)
    assert len(inputs.find_cases(data, [tmp_path / "brats"], output=tmp_path)[0]) == 2, "the images are in the output"


def test_images_of_any_quality_are_predicted(tmp_path):
    phantom.write_camus(tmp_path, cases=4, shape=(96, 64))
    data = get_dataset({"dataset": "camus", "quality": ("Good",)})
    everything = {c.case_id for c in scan_cases(get_dataset({"dataset": "camus"}), tmp_path, need_labels=False).cases}
    assert {c.case_id for c in scan_cases(data, tmp_path, need_labels=False).cases} == everything
    assert {c.info["ImageQuality"] for c in scan_cases(data, tmp_path, need_labels=True).cases} == {"Good"}


def test_files_of_brats_need_no_name_of_a_case(tmp_path, monkeypatch):
    """The command in docs/prediction.md: the case is named after its folder."""
    (tmp_path / "P7").mkdir()
    for name in ("flair", "t1", "t1ce", "t2"):
        (tmp_path / "P7" / f"{name}.nii.gz").touch()
    monkeypatch.chdir(tmp_path / "P7")
    paths = [Path(f"{name}.nii.gz") for name in ("flair", "t1", "t1ce", "t2")]
    assert brats.case_from_files(paths, brats.get_convention("brats2021")).case_id == "P7"
    with pytest.raises(UserError, match="by its name"):
        brats.case_from_files(paths[::-1], brats.get_convention("brats2021"))


def test_the_current_folder_can_be_a_case(tmp_path, monkeypatch):
    (case, *_) = phantom.write_brats(tmp_path, cases=1, shape=(32, 32, 32))
    data = get_dataset({"dataset": "brats", "convention": "brats2021"})
    monkeypatch.chdir(case)
    for path in (Path(), Path("..") / Path(case).name):
        cases, problems = inputs.find_cases(data, [path])
        assert [c.case_id for c in cases] == [Path(case).name] and not problems


def test_images_in_folders_without_meaning_are_mentioned(tmp_path):
    write_nnunet(tmp_path)
    shutil.copytree(tmp_path / "imagesTr", tmp_path / "imagesVal")
    problems = scan_cases(
        get_dataset({"dataset": "nnunet", "root": str(tmp_path)}), tmp_path, need_labels=True
    ).problems
    (problem,) = [p for p in problems if p.kind == "extra_file"]
    assert problem.path == tmp_path / "imagesVal"


def test_patients_in_no_list_are_mentioned(tmp_path, capsys):
    write_nnunet(tmp_path)
    folds = json.loads((tmp_path / "splits_final.json").read_text())
    named = [name for fold in folds[:1] for name in fold["train"][:1] + fold["val"][:1]]
    lists = [{"train": named[:1], "val": named[1:]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(lists))
    data = get_dataset({"dataset": "nnunet", "root": str(tmp_path)})
    section = ConfigDict({"split": "official", "fold": 0, "train_patients": 0})
    train, validation = run_data._split(section, 0, data, tmp_path)
    assert [c.case_id for c in train + validation] == named
    out = capsys.readouterr().out
    assert "2 patients are in none of the official folds" in out and not any(
        f" {name}" in out.split("not used:")[1] for name in named
    )


def test_more_structures_than_a_byte_can_number_are_refused(tmp_path):
    write_nnunet(tmp_path)
    card = json.loads((tmp_path / "dataset.json").read_text())
    for count in (254, 255):
        labels = {"background": 0} | {f"s{i}": i for i in range(1, count + 1)}
        (tmp_path / "dataset.json").write_text(json.dumps(card | {"labels": labels}))
        if count == 254:
            assert len(get_dataset({"dataset": "nnunet", "root": str(tmp_path)}).labels.structures) == 255
            continue
        with pytest.raises(UserError, match="255 structures"):
            get_dataset({"dataset": "nnunet", "root": str(tmp_path)})


def test_what_is_chosen_for_other_regions_remains(workdir):
    config = load_config("configs/brats_dxnet.py:scratch", [])
    chosen = PostProcessing({"WT": 0.4, "ET": 0.3}, (), {"WT": 1.0, "ET": 0.1})
    given = Settings(threshold={"TC": 0.6}, min_volume={"ET": 0.2})
    found = resolve(given, config, regions.BRATS, chosen)
    assert found.threshold == {"WT": 0.4, "TC": 0.6, "ET": 0.3}
    assert found.min_volume == {"WT": 1.0, "ET": 0.2}
    assert resolve(Settings(min_volume={}), config, regions.BRATS, chosen).min_volume == {}
    assert resolve(Settings(threshold=0.7), config, regions.BRATS, chosen).threshold == dict.fromkeys(
        ("WT", "TC", "ET"), 0.7
    )


@pytest.mark.parametrize("first", ["a", "b"])
def test_runs_that_differ_in_what_remains_are_no_ensemble(first, tmp_path):
    """The order of the workdirs does not decide."""
    choices = {"a": ({"WT": 0.3, "TC": 0.4}, {"WT": 1.0}), "b": ({"WT": 0.7, "TC": 0.5}, {"WT": 5.0})}
    for name, (threshold, volume) in choices.items():
        chosen = {"threshold": threshold, "largest": [], "min_volume": volume}
        write_json(tmp_path / name / POSTPROCESSING_FILE, {"chosen": chosen, "tried": []})
    workdirs = [tmp_path / first, tmp_path / ("b" if first == "a" else "a")]
    for given, words in (
        ({}, "threshold, min_volume"),
        ({"threshold": {"TC": 0.6}, "min_volume": {}}, "threshold"),
        ({"threshold": 0.5}, "min_volume"),
        ({"threshold": {"TC": 0.6, "WT": 0.2}, "min_volume": {"ET": 1.0}}, "min_volume"),
    ):
        with pytest.raises(UserError, match=rf"in {words}; give"):
            common_postprocessing(workdirs, Settings(**given))
    for given in ({"threshold": {"TC": 0.6, "WT": 0.2}, "min_volume": {"": 2.0}}, {"threshold": 0.5, "min_volume": {}}):
        common_postprocessing(workdirs, Settings(**given))


def test_other_outputs_of_the_same_prediction_are_kept(tmp_path):
    for path in ("a.nii.gz", "probabilities/a.nii", "uncertainty/a.nii"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        note = "xdim_jax old" if path.startswith("uncertainty") else "xdim_jax new"
        image = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
        image.header["descrip"] = note
        nib.save(image, tmp_path / path)
    note = output_folder.read_note(tmp_path / "a.nii.gz")
    output_folder.remove_prediction(tmp_path, "a", keep=("probabilities", "uncertainty"), note=note)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.nii*")} == {"probabilities/a.nii"}
    output_folder.remove_prediction(tmp_path, "a")
    assert not list(tmp_path.rglob("*.nii*"))
