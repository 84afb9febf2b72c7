"""Calibration of probabilities, and uncertainty maps that find errors or do not."""

import argparse
import dataclasses
import json
import re

import nibabel as nib
import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from tests.test_predictor import make_workdir
from xdim_jax import evaluate, predict, report
from xdim_jax.base.errors import UserError
from xdim_jax.data.images.image import read_volume
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.data.images.stream import stream_volume
from xdim_jax.scoring import calibration, camus, challenges
from xdim_jax.scoring.rules import Job, LabelMap, ScoredCase

pytestmark = pytest.mark.usefixtures("one_convolution")


def test_the_expected_calibration_error_by_hand():
    """Eight voxels in two bins: 0.1 with one of four in the structure, 0.9 with two of four: (0.15 + 0.4) / 2."""
    p = np.array([0.1] * 4 + [0.9] * 4)
    y = np.array([1, 0, 0, 0, 1, 1, 0, 0], bool)
    counts = calibration.count_bins(p, y)
    assert counts.shape == (15, 3) and counts[:, 0].tolist() == [0, 4, *[0] * 11, 4, 0]
    assert calibration.expected_error(counts) == pytest.approx((0.15 + 0.4) / 2)
    edges = calibration.count_bins(np.array([0.0, 1.0]), np.array([False, True]))
    assert edges[0].tolist() == [1, 0, 0] and edges[-1].tolist() == [1, 1, 1], "1 is in the last bin"
    assert calibration.expected_error(edges) == 0


def test_errors_are_ranked_as_by_mann_and_whitney():
    rng = np.random.default_rng(0)
    wrong = rng.random(500) < 0.1
    uncertainty = np.round(rng.random(500) + 0.3 * wrong, 1)  # with ties
    area, _ = calibration.rank_errors(uncertainty, wrong)
    expected = mannwhitneyu(uncertainty[wrong], uncertainty[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    assert area == pytest.approx(expected)
    perfect = calibration.rank_errors(wrong.astype(float), wrong)
    assert perfect[0] == 1 and perfect[1] == pytest.approx(25 / wrong.sum()), "5 % of 500 voxels are 25"
    assert calibration.rank_errors(-uncertainty, wrong)[0] == pytest.approx(1 - expected)
    assert all(np.isnan(calibration.rank_errors(uncertainty, np.full(500, value))).all() for value in (True, False))


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), path)


@pytest.fixture
def folders(tmp_path):
    """Four cases of 24 x 24 x 10 with a cube; the prediction lacks one plane of it, about which it is undecided."""
    rng = np.random.default_rng(0)
    for i in range(4):
        ref = np.zeros((24, 24, 10), np.uint8)
        ref[8:16, 8:16, 3:7] = 1
        pred = ref.copy()
        pred[8] = 0
        p = np.where(pred == 1, 0.9, 0.05)
        p[8][ref[8] == 1] = 0.45
        p += rng.normal(0, 0.01, p.shape)
        uncertainty = 0.01 + 0.1 * (np.abs(p - 0.45) < 0.1)
        write(tmp_path / "ref" / f"c{i}.nii.gz", ref)
        write(tmp_path / "pred" / f"c{i}.nii.gz", pred)
        write(tmp_path / "pred" / "probabilities" / f"c{i}.nii", p[..., None].astype(np.float32))
        write(tmp_path / "pred" / "uncertainty" / f"c{i}.nii", uncertainty.astype(np.float32))
    (tmp_path / "ref" / "dataset.json").write_text('{"labels": {"background": 0, "organ": 1}}')
    (tmp_path / "pred" / "predict.json").write_text(json.dumps({"structures": {"organ": [0]}}))
    return tmp_path


def run(folder, *options):
    command = [f"--pred={folder / 'pred'}", f"--ref={folder / 'ref'}", f"--out={folder / 'out'}", "--rules=generic"]
    return evaluate.main([*command, "--metrics=dice", "--calibration", "--jobs=1", *options])


def test_a_folder_with_probabilities(folders, capsys):
    assert run(folders) == 0
    found = json.loads((folders / "out" / "calibration.json").read_text())
    values = found["structures"]["organ"]
    # with the margin, the box is the whole image: 5760 voxels; 224 predicted with 0.9, 32 with 0.45, the rest with 0.05
    ece = (224 * 0.1 + 32 * 0.55 + (5760 - 256) * 0.05) / 5760
    assert values["ece"]["mean"] == pytest.approx(ece, abs=2e-3) and values["ece"]["count"] == 4
    brier = (224 * 0.1**2 + 32 * 0.55**2 + (5760 - 256) * 0.05**2) / 5760
    assert values["brier"]["mean"] == pytest.approx(brier, abs=2e-3)
    assert sum(values["bins"]["voxels"]) == 4 * 5760
    assert found["ranking"]["uncertainty"]["auroc"]["mean"] == pytest.approx(1)
    assert found["ranking"]["uncertainty"]["found"]["mean"] == 1
    said = capsys.readouterr()
    assert re.search(r"calibration organ: ECE 0\.05", said.out) and "do not use" not in said.out
    assert report.main([f"--eval={folders / 'out'}", f"--out={folders / 'report.html'}"]) == 0
    text = (folders / "report.html").read_text()
    assert "reliability diagram" in text and "AUROC 1.000" in text


def test_an_uncertainty_that_finds_no_errors_is_warned_of(folders, capsys):
    for i in range(4):
        path = folders / "pred" / "uncertainty" / f"c{i}.nii"
        array = np.asarray(nib.load(path).dataobj)
        write(path, array.max() - array)
    run(folders)
    assert "better than chance" in capsys.readouterr().out
    for i in range(4):  # better than chance, and clearly worse than the probabilities
        rng = np.random.default_rng(i)
        path = folders / "pred" / "uncertainty" / f"c{i}.nii"
        write(path, (rng.random((24, 24, 10)) + 0.3 * (np.arange(24) == 8)[:, None, None]).astype(np.float32))
    run(folders)
    assert "use the probabilities instead" in capsys.readouterr().out


def test_a_later_evaluation_without_it_leaves_no_old_result(folders):
    run(folders)
    command = [f"--pred={folders / 'pred'}", f"--ref={folders / 'ref'}", f"--out={folders / 'out'}", "--rules=generic"]
    assert evaluate.main([*command, "--jobs=1"]) == 0
    assert not (folders / "out" / "calibration.json").exists()


def test_a_folder_without_uncertainty(folders, capsys):
    for path in (folders / "pred" / "uncertainty").iterdir():
        path.unlink()
    run(folders)
    found = json.loads((folders / "out" / "calibration.json").read_text())
    assert list(found["ranking"]) == [calibration.AMBIGUITY]


def _drop(folder):
    (folder / "pred" / "probabilities" / "c1.nii").unlink()
    (folder / "pred" / "probabilities" / "c2.nii").unlink()


def _no_folder(folder):
    (folder / "pred" / "probabilities").rename(folder / "elsewhere")


def _other_size(folder):
    write(folder / "pred" / "probabilities" / "c1.nii", np.zeros((24, 24, 9, 1), np.float32))


def _mirrored(folder):
    """The first voxel of 24 along an axis is where the label map has the last one: 23 voxels away."""
    path = folder / "pred" / "uncertainty" / "c1.nii"
    image = nib.load(path, mmap=False)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1.0, 1.0, 2.0, 1.0])), path)


def _other_channels(folder):
    (folder / "pred" / "predict.json").write_text(json.dumps({"structures": {"organ": [1]}}))


def _other_names(folder):
    (folder / "pred" / "predict.json").write_text(json.dumps({"structures": {"liver": [0]}}))


def _not_finite(folder):
    write(folder / "pred" / "probabilities" / "c3.nii", np.full((24, 24, 10, 1), np.nan, np.float32))


def _of_other_networks(folder):
    for path, note in (("c0.nii.gz", "xdim_jax one"), ("probabilities/c0.nii", "xdim_jax two")):
        image = nib.load(folder / "pred" / path, mmap=False)  # the file is replaced below
        image.header["descrip"] = note
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), folder / "pred" / path)


def _old_record(folder):
    (folder / "pred" / "predict.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop, ["2 probabilities cannot", "c1", "c2", "predict it again"]),
        (_no_folder, ["has no probabilities", "--probabilities"]),
        (_other_size, ["c1", "(24, 24, 9)", "(24, 24, 10)", "predict it again"]),
        (_mirrored, ["c1", "displaced by up to 23.00 voxels", "predict it again"]),
        (_other_channels, ["1 channels", "at least 2"]),
        (_other_names, ["liver", "--rules=generic"]),
        (_old_record, ["does not name the structures"]),
        (_not_finite, ["c3", "finite"]),
        (_of_other_networks, ["c0", "was not predicted together"]),
    ],
)
def test_probabilities_that_cannot_be_used(damage, words, folders):
    damage(folders)
    with pytest.raises(UserError) as error:
        run(folders)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_image_with_two_axes(tmp_path):
    """A file with two axes is read as it is stored, and its probabilities and uncertainty have to be, too."""
    ref = np.zeros((20, 30), np.uint8)
    ref[2:6, 3:9] = 1
    for folder, array in (("ref", ref), ("pred", ref)):
        path = tmp_path / folder / "c0.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    for name, array in (
        ("probabilities", ref[..., None, None].astype(np.float32)),
        ("uncertainty", np.float32(ref)[..., None]),
    ):
        (tmp_path / "pred" / name).mkdir()
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "pred" / name / "c0.nii")
    (tmp_path / "pred" / "predict.json").write_text(json.dumps({"structures": {"organ": [0]}}))
    assert run(tmp_path, "--labels", "organ=1") == 0
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert found["structures"]["organ"]["brier"]["mean"] == 0


def test_the_outputs_of_an_image_with_two_axes_have_one_orientation(tmp_path):
    """An affine with positive voxel sizes flips volumes, but not images with two axes."""
    ref = np.zeros((20, 30), np.uint8)
    ref[2:6, 3:9] = 1
    pred = ref.copy()
    pred[2] = 0
    for folder in ("ref", "pred/probabilities", "pred/uncertainty"):
        (tmp_path / folder).mkdir(parents=True)
    for name, array in (("image", np.float32(pred)), ("ref/c0", ref)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    values, grid = read_volume(tmp_path / "image.nii.gz")
    write_volume(tmp_path / "pred" / "c0.nii.gz", values.astype(np.uint8), grid)
    wrong = (ref != pred).T[None]
    with stream_volume(tmp_path / "pred" / "probabilities" / "c0.nii", grid, 1) as write_part:
        write_part((slice(0, 1), slice(0, 30), slice(0, 20)), values[..., None])
    with stream_volume(tmp_path / "pred" / "uncertainty" / "c0.nii.gz", grid, maximum=0.25) as write_part:
        write_part((slice(0, 1), slice(0, 30), slice(0, 20)), 0.25 * wrong)
    found = {p.parent.name: nib.load(p).get_fdata() for p in (tmp_path / "pred").rglob("c0.nii*")}
    np.testing.assert_array_equal(found["pred"], pred)
    np.testing.assert_array_equal(found["probabilities"], pred[..., None, None])
    np.testing.assert_allclose(found["uncertainty"], 0.25 * (ref != pred), atol=1e-6)
    again, _ = read_volume(tmp_path / "pred" / "uncertainty" / "c0.nii.gz")
    np.testing.assert_allclose(again, 0.25 * wrong, atol=1e-6)

    (tmp_path / "pred" / "predict.json").write_text(json.dumps({"structures": {"organ": [0]}}))
    assert run(tmp_path, "--labels", "organ=1") == 0
    result = json.loads((tmp_path / "out" / "calibration.json").read_text())
    # 6 wrong pixels in the box of the structure, which is 16 x 19 pixels with its margin inside of the image
    assert result["structures"]["organ"]["brier"]["mean"] == pytest.approx(6 / (16 * 19))
    assert result["ranking"]["uncertainty"]["auroc"]["mean"] == 1


def make_job(folder, structures=None, case="c0"):
    ref, pred = (LabelMap(case, folder / part / f"{case}.nii.gz", "p") for part in ("ref", "pred"))
    return Job(ref, pred, {}, structures)


def make_rules(**labels):
    options = dict.fromkeys(challenges.OPTIONS) | {"labels": [f"{k}={v}" for k, v in labels.items()]}
    return challenges.make_rules("generic", argparse.Namespace(**options, ref="absent", metrics=("dice",)))


RULES = make_rules(organ="1", both="1,2")


def test_the_probability_of_a_structure_is_the_sum_of_its_labels(tmp_path):
    """A softmax over background and two labels; `both` is their union."""
    ref = np.zeros((8, 8, 8), np.uint8)
    ref[2:4], ref[4:6] = 1, 2
    write(tmp_path / "ref" / "c0.nii.gz", ref)
    write(tmp_path / "pred" / "c0.nii.gz", ref)
    p = np.stack([ref == 0, 0.6 * (ref == 1) + 0.4 * (ref == 2), 0.4 * (ref == 1) + 0.6 * (ref == 2)], -1)
    write(tmp_path / "pred" / "probabilities" / "c0.nii", p.astype(np.float32))
    channels = {"organ": [1], "both": [1, 2]}
    found = calibration.measure_case(RULES, tmp_path / "pred", channels, make_job(tmp_path))
    assert found.brier["both"] == pytest.approx(0, abs=1e-12)
    assert found.brier["organ"] == pytest.approx((0.4**2 * 128 + 0.4**2 * 128) / 512, rel=1e-5)
    assert found.without == ()
    part = calibration.measure_case(RULES, tmp_path / "pred", {"organ": [1]}, make_job(tmp_path))
    assert part.without == ("both",) and list(part.brier) == ["organ"]
    # a structure that is not annotated in this case is neither evaluated nor an error
    only = calibration.measure_case(RULES, tmp_path / "pred", channels, make_job(tmp_path, ("both",)))
    assert list(only.counts) == ["both"]


def test_a_case_of_several_tasks_is_counted_once(folders):
    rules = make_rules(organ="1")
    jobs = [make_job(folders, s, "c1") for s in ((), ("organ",), None, ("organ",))] + [make_job(folders, None, "c2")]
    found = calibration.calibrate(rules, jobs, folders / "pred", folders / "out")
    assert found["cases"] == ["c1", "c2"] and found["structures"]["organ"]["ece"]["count"] == 2


def test_the_file_of_a_case_whose_id_differs_from_its_name(folders):
    """CHAOS: the reference of both phases is MR_1_T1DUAL, and the prediction MR_1_T1DUAL_in.nii.gz."""
    for part in (folders / "pred", folders / "pred" / "probabilities", folders / "pred" / "uncertainty"):
        for path in part.glob("c1.*"):
            path.rename(path.with_name(path.name.replace("c1", "c1_in")))
    job = make_job(folders, None, "c1")
    job = dataclasses.replace(job, pred=dataclasses.replace(job.pred, source=folders / "pred" / "c1_in.nii.gz"))
    assert calibration.measure_case(RULES, folders / "pred", {"organ": [0]}, job).case_id == "c1"


def test_nothing_to_evaluate(tmp_path):
    for part in ("ref", "pred"):
        write(tmp_path / part / "c0.nii.gz", np.zeros((8, 8, 8), np.uint8))
    write(tmp_path / "pred" / "probabilities" / "c0.nii", np.zeros((8, 8, 8, 1), np.float32))
    assert calibration.measure_case(RULES, tmp_path / "pred", {"organ": [0]}, make_job(tmp_path)) is None


def test_skipped_cases_are_not_evaluated(folders):
    (folders / "pred" / "c2.nii.gz").unlink()
    assert run(folders, "--missing=skip") == 0
    assert json.loads((folders / "out" / "calibration.json").read_text())["cases"] == ["c0", "c1", "c3"]


def test_what_predict_writes_is_evaluated(tmp_path, monkeypatch):
    """Predictions, compressed or not, of a softmax network with two structures."""
    workdir = make_workdir(tmp_path / "run")
    rng = np.random.default_rng(0)
    for c in range(2):
        write(tmp_path / "cases" / f"a_{c:04d}.nii.gz", rng.normal(size=(12, 14, 10)).astype(np.float32))
    write(tmp_path / "ref" / "a.nii.gz", rng.integers(0, 3, (12, 14, 10)).astype(np.uint8))
    values = {}
    for more in ((), ("--compress",)):
        out = tmp_path / f"pred{len(more)}"
        command = [f"--workdir={workdir}", f"--input={tmp_path / 'cases'}", f"--output={out}", "--flips=W"]
        assert predict.main([*command, "--probabilities", "--uncertainty", *more]) == 0
        names = list(json.loads((out / "predict.json").read_text())["structures"])
        labels = [f"{name}={i}" for i, name in enumerate(names, 1)]
        command = [f"--pred={out}", f"--ref={tmp_path / 'ref'}", f"--out={out}/eval", "--rules=generic", "--jobs=1"]
        assert evaluate.main([*command, "--metrics=dice", "--calibration", "--labels", *labels]) == 0
        found = json.loads((out / "eval" / "calibration.json").read_text())
        values[more] = [found["structures"][name]["ece"]["mean"] for name in names]
        assert "uncertainty" in found["ranking"]
    np.testing.assert_allclose(*values.values(), atol=1e-4)


def test_contours_beyond_the_differences_of_cardiologists():
    """Limits of the paper's Table 2: 3.3 and 8.2 mm for the endocardium at ED, 4.0 and 8.8 mm at ES."""

    def case(name, instant, mad, hd, empty=None):
        values = {"LV_endo": {"dice": 0.9, "mad": mad, "hd": hd}, "LV_epi": {"dice": 0.9, "mad": 1.0, "hd": 2.0}}
        return ScoredCase(name, name, {"instant": instant, "view": "4CH"}, values, empty or {})

    nan = float("nan")
    scored = [
        case("good", "ED", 3.3, 8.2),
        case("mad", "ED", 3.4, 5.0),
        case("hd", "ED", 1.0, 8.3),
        case("missing", "ED", nan, nan, {"LV_endo": "pred"}),
        case("no reference", "ED", nan, nan, {"LV_endo": "ref"}),
        case("later", "ES", 3.9, 8.7),
    ]
    found = camus.find_outliers(scored)
    assert found["ED LV_endo"] == {"images": 4, "count": 3, "cases": ["hd", "mad", "missing"]}
    assert found["ES LV_endo"] == {"images": 1, "count": 0, "cases": []}
    assert found["ED LV_epi"]["count"] == 0 and found["ED LV_epi"]["images"] == 5
