"""Packed predictions read back: every submission is scored against the phantoms it was made from."""

import json
import zipfile

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from xdim_jax import evaluate, submit
from xdim_jax.base.errors import UserError
from xdim_jax.data import datasets, phantom
from xdim_jax.data.case import scan_cases
from xdim_jax.data.images.image import source_path
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.data.reading import encode_label, read_case

pytestmark = pytest.mark.quick

OPTIONS = {
    "camus": {"dataset": "camus"},
    "chaos": {"dataset": "chaos", "task": 4, "phase": "in"},
    "brats": {"dataset": "brats", "convention": "brats2021"},
}
WRITE = {
    "camus": lambda root: phantom.write_camus(root, cases=2, shape=(96, 72), frames=2),
    "chaos": lambda root: phantom.write_chaos(root, cases=2, shape=(64, 64, 16)),
    "brats": lambda root: phantom.write_brats(root, cases=2, convention="brats2021", shape=(48, 48, 40)),
}
RULES = {"camus": "camus", "chaos": "chaos", "brats": "brats2022"}


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    """Phantoms of each challenge, and the references as predictions: files named by case, with predict's record."""
    made = {}
    for name, options in OPTIONS.items():
        root = tmp_path_factory.mktemp(name)
        WRITE[name](root / "data")
        dataset = datasets.get_dataset(options)
        record = {"images": {}, "convention": dataset.labels.name}
        for case in scan_cases(dataset, root / "data", need_labels=True).cases:
            volume = read_case(case)
            write_volume(root / "pred" / f"{case.case_id}.nii.gz", encode_label(case, volume.label), volume.grid)
            record["images"][case.case_id] = [str(source_path(s)) for s in case.images]
        (root / "pred" / "predict.json").write_text(json.dumps(record))
        made[name] = root
    return made


def scores(rules, pred, ref, out, *more):
    evaluate.main([f"--rules={rules}", f"--pred={pred}", f"--ref={ref}", f"--out={out}", "--jobs=1", *more])
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("camus", ["--format=mhd"]),
        ("camus", ["--format=nii.gz"]),
        ("chaos", ["--task=1", "--task=2", "--task=3", "--task=4", "--task=5"]),
        ("brats", ["--zip"]),
    ],
)
def test_what_is_packed_is_what_was_predicted(name, options, perfect, tmp_path):
    root = perfect[name]
    out = tmp_path / "upload"
    submit.main([f"--challenge={name}", f"--pred={root / 'pred'}", f"--out={out}", *options])
    summary = scores(RULES[name], out, root / "data", tmp_path / "eval")
    assert summary["structures"]
    for structure, metrics in summary["structures"].items():
        assert metrics["dice"]["mean"] == 1.0, structure
    if name == "chaos":
        assert {t: v["score"]["mean"] for t, v in summary["tasks"].items()} == dict.fromkeys("12345", 100.0)
    if name == "brats":
        with zipfile.ZipFile(f"{out}.zip") as archive:
            assert sorted(archive.namelist()) == sorted(p.name for p in out.iterdir())


def test_camus_files_are_flat_images_with_the_sources_spacing(perfect, tmp_path):
    submit.main(["--challenge=camus", f"--pred={perfect['camus'] / 'pred'}", f"--out={tmp_path / 'up'}"])
    path = sorted((tmp_path / "up").glob("*.mhd"))[0]
    packed = sitk.ReadImage(str(path))
    source = nib.load(perfect["camus"] / "pred" / f"{path.stem}.nii.gz")
    assert packed.GetDimension() == 2 and path.with_suffix(".raw").is_file()
    assert packed.GetSpacing() == pytest.approx(source.header.get_zooms()[:2])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(packed), np.asarray(source.dataobj).squeeze().T)


def test_chaos_slices_are_in_the_order_of_the_dicom_names(perfect, tmp_path):
    root = perfect["chaos"]
    submit.main(["--challenge=chaos", f"--pred={root / 'pred'}", f"--out={tmp_path / 'up'}", "--task=5", "--task=2"])
    assert sorted(p.name for p in (tmp_path / "up").iterdir()) == ["Task2", "Task5"]
    series = [p for p in (root / "data").rglob("Ground") if "MR" in p.parts]
    assert len(series) == 4, "T1-DUAL and T2-SPIR of two patients"
    for ground in series:
        number, sequence = ground.parts[-3], ground.parts[-2]
        packed = sorted((tmp_path / "up" / "Task5" / "MR" / number / sequence / "Results").glob("img*.png"))
        references = sorted(ground.glob("*.png"))
        assert len(packed) == len(references) == 6
        for a, b in zip(packed, references, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))
    for ground in (p for p in (root / "data").rglob("Ground") if "CT" in p.parts):
        packed = sorted((tmp_path / "up" / "Task2" / "CT" / ground.parts[-2] / "Results").glob("img*.png"))
        for a, b in zip(packed, sorted(ground.glob("*.png")), strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(a)), 63 * (np.asarray(Image.open(b)) > 0))


def test_every_grey_level_of_an_organ_is_packed(perfect, tmp_path):
    """CT of 255 and MR of 60 are the liver by the ranges of the challenge, as evaluation reads them."""
    root, pred = perfect["chaos"], tmp_path / "pred"
    pred.mkdir()
    (pred / "predict.json").write_text((root / "pred" / "predict.json").read_text())
    for path in (root / "pred").glob("*.nii.gz"):
        image = nib.load(path)
        label = np.asarray(image.dataobj)
        other = np.where(label == 63, 255 if "CT" in path.name else 60, label).astype(np.uint8)
        nib.save(nib.Nifti1Image(other, image.affine, image.header), pred / path.name)
    for source, name in ((root / "pred", "a"), (pred, "b")):
        submit.main(["--challenge=chaos", f"--pred={source}", f"--out={tmp_path / name}", "--task=4"])
    packed = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in "ab"]
    assert packed[0] == packed[1] and packed[0]


def test_a_task_without_cases_of_a_modality_is_refused(perfect, tmp_path):
    root, pred = perfect["chaos"], tmp_path / "pred"
    pred.mkdir()
    record = json.loads((root / "pred" / "predict.json").read_text())
    images = {case: files for case, files in record["images"].items() if case.startswith("MR")}
    (pred / "predict.json").write_text(json.dumps(record | {"images": images}))
    for case in images:
        (pred / f"{case}.nii.gz").write_bytes((root / "pred" / f"{case}.nii.gz").read_bytes())
    arguments = ["--challenge=chaos", f"--pred={pred}", f"--out={tmp_path / 'up'}"]
    with pytest.raises(UserError, match=r"task 1 needs CT, task 2 needs CT.*only MR"):
        submit.main([*arguments, "--task=1", "--task=2", "--task=5"])
    assert not (tmp_path / "up").exists()
    assert submit.main([*arguments, "--task=3", "--task=5"]) == 0


@pytest.mark.parametrize(
    ("name", "option"),
    [("brats", "--task=1"), ("brats", "--format=mhd"), ("camus", "--convention=brats2021"), ("chaos", "--format=mhd")],
)
def test_options_of_other_challenges_are_refused(name, option, perfect, tmp_path):
    arguments = [f"--challenge={name}", f"--pred={perfect[name] / 'pred'}", f"--out={tmp_path / 'up'}"]
    with pytest.raises(UserError, match=option.partition("=")[0]):
        submit.main([*arguments, option])
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_told_and_nothing_is_written(perfect, tmp_path):
    pred = perfect["brats"] / "pred"
    arguments = ["--challenge=brats", f"--pred={pred}", f"--out={tmp_path / 'up'}"]
    with pytest.raises(UserError, match="brats2023 has only"):
        submit.main([*arguments, "--convention=brats2023"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "up").mkdir()
    with pytest.raises(UserError, match="exists already"):
        submit.main(arguments)
    with pytest.raises(UserError, match="--task"):
        submit.main(["--challenge=chaos", f"--pred={perfect['chaos'] / 'pred'}", f"--out={tmp_path / 'x'}"])
    with pytest.raises(UserError, match=r"predict\.json"):
        submit.main(["--challenge=camus", f"--pred={tmp_path}", f"--out={tmp_path / 'x'}"])


@pytest.mark.parametrize(("name", "mark"), [("camus", "testing_"), ("chaos", "test_")])
def test_test_patients_have_numbers_of_their_own(name, mark, perfect, tmp_path, capsys):
    """Training patients of the same numbers were predicted too, and wrongly: they are not what is uploaded."""
    root, pred = perfect[name], tmp_path / "pred"
    pred.mkdir()
    record = json.loads((root / "pred" / "predict.json").read_text())
    images = {}
    for case, files in record["images"].items():
        image = nib.load(root / "pred" / f"{case}.nii.gz")
        nib.save(image, pred / f"{mark}{case}.nii.gz")
        empty = np.zeros_like(np.asarray(image.dataobj))
        nib.save(nib.Nifti1Image(empty, image.affine, image.header), pred / f"{case}.nii.gz")
        images |= {case: files, f"{mark}{case}": files}
    (pred / "predict.json").write_text(json.dumps(record | {"images": images}))
    tasks = ["--task=4"] if name == "chaos" else []
    submit.main([f"--challenge={name}", f"--pred={pred}", f"--out={tmp_path / 'up'}", *tasks])
    assert f"{len(record['images'])} cases are not in the test set" in capsys.readouterr().out
    summary = scores(RULES[name], tmp_path / "up", root / "data", tmp_path / "eval", *tasks)
    assert all(metrics["dice"]["mean"] == 1.0 for metrics in summary["structures"].values())
    if name == "camus":
        packed = {path.stem for path in (tmp_path / "up").glob("*.mhd")}
    else:
        folder = tmp_path / "up" / "Task4"
        packed = {"_".join(path.relative_to(folder).parts[:-1]) for path in folder.rglob("Results")}
    assert packed == set(record["images"]), "the numbers of the test patients, without the mark of the folder"
