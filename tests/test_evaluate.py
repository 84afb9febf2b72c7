"""The command lines of evaluate and compare on tiny label maps: what they read, write, and say to misuse."""

import csv
import gzip
import json
import math
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from tests.reference_scores import CAMUS_IMAGES, brute, slow_volumes, ventricle
from xdim_jax import compare, evaluate
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_json
from xdim_jax.data.phantom import write_chaos
from xdim_jax.runs.workdir import CONFIG_FILE, SPLIT_FILE
from xdim_jax.scoring import challenges, tables

FILES = {"cases.csv", "summary.json", "tables.md", "tables.tex", "evaluate.json"}


def run(rules, pred, ref, out, *options):
    """Runs the main; the rows of cases.csv by case, structure, metric (and task), and the summary."""
    arguments = [f"--rules={rules}", f"--pred={pred}", f"--ref={ref}", f"--out={out}", "--jobs=1", *options]
    assert evaluate.main(arguments) == 0
    assert {p.name for p in out.iterdir()} == FILES
    return read(out), json.loads((out / "summary.json").read_text())


def read(out):
    with open(out / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        key = (row["case_id"], row["structure"], row["metric"])
        found[(*key, row["task"]) if "task" in row else key] = float(row["value"])
    return found


def refused(match, rules, pred, ref, out, *options):
    """The main raises UserError, whose message has all of the words."""
    with pytest.raises(UserError) as error:
        run(rules, pred, ref, out, *options)
    said(error, match)
    return str(error.value)


def said(error, words):
    for word in [words] if isinstance(words, str) else words:
        assert word in str(error.value), str(error.value)


def save(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


# -- generic ---------------------------------------------------------------------------------------------------------

SPACING = (1.5, 0.8, 2.0)
AFFINE = np.diag([-1.5, -0.8, 2.0, 1.0])  # stored LPS, as ITK has it
AFFINE[:3, 3] = (20, -7, 3)


def blobs(seed, shape=(16, 14, 10)):
    """Labels 0, 1, 2: a blob within a blob."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return ((field > np.quantile(field, 0.7)).astype(np.uint8) + (field > np.quantile(field, 0.9))).astype(np.uint8)


@pytest.fixture
def pair(tmp_path):
    """Two folders with cases a and b; predictions are references moved by a voxel."""
    for n, case in enumerate("ab"):
        save(tmp_path / "ref" / f"{case}.nii.gz", blobs(n), AFFINE)
        save(tmp_path / "pred" / f"{case}.nii.gz", np.roll(blobs(n), 1, 0), AFFINE)
    return tmp_path / "pred", tmp_path / "ref", tmp_path / "out"


def by_hand(seed, members):
    ref = np.isin(blobs(seed), members)
    return brute(np.isin(np.roll(blobs(seed), 1, 0), members), ref, np.diag(SPACING), True)


def test_generic_scores_every_value(pair):
    found, summary = run("generic", *pair)
    expected = {}
    for n, case in enumerate("ab"):
        for value in (1, 2):
            values = by_hand(n, [value])
            for metric in ("dice", "assd_pooled", "hd95_pooled"):
                expected[case, str(value), metric] = values[metric]
    assert found == pytest.approx(expected, abs=1e-6)
    assert (summary["rules"], summary["cases"], summary["unreadable"]) == ("generic", 2, [])
    dice = [expected[case, "1", "dice"] for case in "ab"]
    assert summary["structures"]["1"]["dice"]["mean"] == pytest.approx(np.mean(dice))
    assert summary["structures"]["1"]["dice"]["sd"] == pytest.approx(np.std(dice, ddof=1))
    assert summary["structures"]["1"]["dice"]["low"] == pytest.approx(min(dice))
    assert summary["empty"] == {"1": {"pred": 0, "ref": 0, "both": 0}, "2": {"pred": 0, "ref": 0, "both": 0}}


def test_generic_columns_and_record(pair):
    pred, ref, out = pair
    run("generic", *pair, "--labels", "tumour=1,2", "core=2")
    lines = (out / "cases.csv").read_text().splitlines()
    assert lines[0] == "case_id,structure,metric,value"
    assert len(lines) == 1 + 2 * 2 * 3
    record = json.loads((out / "evaluate.json").read_text())
    assert (record["pred"], record["ref"], record["rules"]) == (str(pred), str(ref), "generic")
    assert record["options"]["labels"] == ["tumour=1,2", "core=2"]
    assert record["cases"]["a"] == {"patient": "a", "ref": str(ref / "a.nii.gz"), "pred": [str(pred / "a.nii.gz")]}
    found = read(out)
    assert found["b", "tumour", "dice"] == pytest.approx(by_hand(1, [1, 2])["dice"])
    assert found["b", "core", "dice"] == pytest.approx(by_hand(1, [2])["dice"])


def test_generic_tables(pair):
    _, _, out = pair
    found, _ = run("generic", *pair, "--labels", "a&b_1%=1")
    mean = np.mean([found[case, "a&b_1%", "dice"] for case in "ab"])
    (row,) = [line for line in (out / "tables.md").read_text().splitlines() if line.startswith("| a&b_1% | Dice |")]
    assert row.split(" | ")[2] == f"{mean:.3f}"
    latex = (out / "tables.tex").read_text()
    assert r"a\&b\_1\% & Dice" in latex and f"{mean:.3f}" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1


@pytest.mark.parametrize(("name", "latex"), [("a^b", "a^b"), ("a{b", "a{b"), ("a~b", "a~b")])
def test_tables_escape_what_latex_reads_otherwise(pair, name, latex):
    run("generic", *pair, f"--labels={name}=1")
    assert f" {latex} &" not in (pair[2] / "tables.tex").read_text()


LABELS = [
    {"labels": {"background": 0, "tumour": [1, 2], "core": 2, "ignore": 9}},
    {"labels": {"0": "background", "1": "ring", "2": "core"}},
]


@pytest.mark.parametrize("where", ["ref", "."])
@pytest.mark.parametrize("form", [0, 1])
def test_generic_reads_dataset_json(pair, form, where):
    (pair[1].parent / where / "dataset.json").write_text(json.dumps(LABELS[form]))
    found, summary = run("generic", *pair)
    assert set(summary["structures"]) == ({"tumour", "core"} if form == 0 else {"ring", "core"})
    assert found["a", "core", "dice"] == pytest.approx(by_hand(0, [2])["dice"])
    if form == 0:
        assert found["a", "tumour", "dice"] == pytest.approx(by_hand(0, [1, 2])["dice"])


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nii"])
def test_generic_reads_other_formats(pair, suffix):
    pred, ref, out = pair
    expected, _ = run("generic", *pair)
    for case in "ab":
        image = sitk.ReadImage(str(pred / f"{case}.nii.gz"))
        (pred / f"{case}.nii.gz").unlink()
        sitk.WriteImage(image, str(pred / f"{case}{suffix}"))
    found, _ = run("generic", pred, ref, out)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("codes", ["RAS", "PIR", "SAL"])
def test_generic_does_not_mind_the_stored_order_of_axes(pair, codes):
    pred, ref, out = pair
    expected, _ = run("generic", *pair)
    image = nib.load(pred / "a.nii.gz")
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    nib.save(nib.Nifti1Image.from_bytes(image.as_reoriented(turn).to_bytes()), pred / "a.nii.gz")
    found, _ = run("generic", pred, ref, out)
    assert found == pytest.approx(expected, abs=1e-6)


def test_generic_metrics_and_border(pair):
    pred, ref, out = pair
    edge = np.zeros((8, 8, 8), np.uint8)
    edge[:4] = 1
    for folder, array in ((ref, edge), (pred, np.roll(edge, 1, 0) | edge)):
        shutil.rmtree(folder)
        save(folder / "a.nii.gz", array, np.eye(4))
    names = ("hd", "assd_mean", "volume", "ravd", "hd95_surfel", "nsd_0.5")
    for border in ("outside", "inside"):
        found, _ = run("generic", pred, ref, out, f"--metrics={','.join(names)}", f"--border={border}")
        assert {metric for _, _, metric in found} == set(names)
        expected = brute((np.roll(edge, 1, 0) | edge) > 0, edge > 0, np.eye(3), border == "outside")
        for name in set(names) - {"hd95_surfel"}:
            assert found["a", "1", name] == pytest.approx(expected[name]), name
    assert found["a", "1", "assd_mean"] == 1  # two planes
    assert found["a", "1", "volume"] == pytest.approx(5 * 64 / 1000)


def test_generic_images_of_one_slice_are_flat(pair):
    pred, ref, out = pair
    plane = blobs(3)[:, :, 4]
    for folder, array in ((ref, plane), (pred, np.roll(plane, 1, 1))):
        shutil.rmtree(folder)
        save(folder / "a_seg.nii.gz", array, AFFINE)
    found, _ = run("generic", pred, ref, out, "--metrics=dice,assd_mean,hd")
    expected = brute(np.roll(plane, 1, 1) == 1, plane == 1, np.diag([1.5, 0.8]), True)
    for metric in ("dice", "assd_mean", "hd"):
        assert found["a", "1", metric] == pytest.approx(expected[metric], abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_generic_images_of_one_slice_are_flat_along_any_axis(axis, pair):
    """Sagittal, coronal and axial images of one slice, as files of three axes."""
    pred, ref, out = pair
    plane = blobs(3)[:, :, 4]
    spacing = np.insert([1.5, 0.8], axis, 6.0)
    for folder, array in ((ref, plane), (pred, np.roll(plane, 1, 1))):
        shutil.rmtree(folder)
        save(folder / "a_seg.nii.gz", np.expand_dims(array, axis), np.diag([*spacing, 1]))
    found, _ = run("generic", pred, ref, out, "--metrics=dice,assd_mean,hd,volume")
    expected = brute(np.roll(plane, 1, 1) == 1, plane == 1, np.diag([1.5, 0.8]), True)
    for metric in ("dice", "assd_mean", "hd"):
        assert found["a", "1", metric] == pytest.approx(expected[metric], abs=1e-6)
    assert math.isnan(found["a", "1", "volume"]), "areas are not volumes"


def test_generic_missing_prediction(pair):
    pred, ref, _ = pair
    (pred / "b.nii.gz").unlink()
    refused([str(pred), str(ref), "b", "--missing=penalise", "1 of 2"], "generic", *pair)
    found, summary = run("generic", *pair, "--missing=penalise")
    assert found["b", "1", "dice"] == 0
    assert math.isnan(found["b", "1", "assd_pooled"]) and math.isnan(found["b", "1", "hd95_pooled"])
    assert summary["structures"]["1"]["dice"]["count"] == 2
    assert summary["structures"]["1"]["hd95_pooled"]["missing"] == 1


@pytest.mark.parametrize("rules", ["generic", "brats2022"])
def test_further_metrics_of_a_missing_prediction_are_the_worst(rules, tmp_path):
    """Overlaps are 0; metrics with a unit have no worst value."""
    label = np.zeros((24, 24, 24), np.uint8)
    label[4:12, 4:12, 4:12] = 1
    for name in ("a", "b"):
        save(tmp_path / "ref" / f"{name}.nii.gz", label, np.eye(4))
    save(tmp_path / "pred" / "a.nii.gz", label, np.eye(4))
    options = ("--metrics=iou,nsd_1.0,hd95_pooled", "--missing=penalise", "--convention=brats2021")
    options = options[:2] if rules == "generic" else options
    found, _ = run(rules, tmp_path / "pred", tmp_path / "ref", tmp_path / "out", *options)
    structure = "1" if rules == "generic" else "WT"
    assert (found["b", structure, "iou"], found["b", structure, "nsd_1.0"]) == (0, 0)
    assert math.isnan(found["b", structure, "hd95_pooled"]) and found["a", structure, "iou"] == 1


def test_structures_that_are_not_annotated_are_not_empty(tmp_path, capsys):
    """Case b has only the organ annotated, so nothing is known of its tumour."""
    label = np.zeros((12, 12, 12), np.uint8)
    label[2:8, 2:8, 2:8], label[4:6, 4:6, 4:6] = 1, 2
    card = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1, "tumour": 2}}
    card |= {"file_ending": ".nii.gz", "annotated": {"b": ["organ"]}}
    for folder in ("ref", "pred"):
        save(tmp_path / folder / "a.nii.gz", label, np.eye(4))
        save(tmp_path / folder / "b.nii.gz", np.minimum(label, 1), np.eye(4))
    (tmp_path / "ref" / "dataset.json").write_text(json.dumps(card))
    found, summary = run("generic", tmp_path / "pred", tmp_path / "ref", tmp_path / "out", "--metrics=dice")
    assert math.isnan(found["b", "tumour", "dice"]) and found["a", "tumour", "dice"] == 1
    assert summary["empty"]["tumour"] == {"pred": 0, "ref": 0, "both": 0}
    assert "tumour is not in the reference" not in capsys.readouterr().out


def test_generic_surplus_predictions_are_named(pair, capsys):
    (pair[1] / "b.nii.gz").unlink()
    found, _ = run("generic", *pair)
    assert {case for case, _, _ in found} == {"a"}
    said_out = capsys.readouterr()
    assert "b" in (said_out.out + said_out.err) and "without a reference" in said_out.out + said_out.err


@pytest.mark.slow
def test_several_processes_give_the_same(pair):
    pred, ref, out = pair
    expected, _ = run("generic", *pair)
    assert evaluate.main(["--rules=generic", f"--pred={pred}", f"--ref={ref}", f"--out={out}", "--jobs=2"]) == 0
    assert read(out) == expected


# -- misuse, any rules -----------------------------------------------------------------------------------------------


def test_nsd_does_not_depend_on_rounding_errors_of_the_affine(pair):
    """Masks one voxel of 1 mm apart, on a grid along the axes and on rotated ones."""
    ref, pred = np.zeros((12, 12, 12), np.uint8), np.zeros((12, 12, 12), np.uint8)
    ref[3:8, 3:8, 3:8] = 1
    pred[3:9, 3:8, 3:8] = 1
    for seed in range(6):
        affine = np.eye(4)
        if seed:
            turn = Rotation.from_rotvec(np.random.default_rng(seed).uniform(-0.5, 0.5, 3)).as_matrix()
            affine[:3, :3] = turn.astype(np.float32)
        for folder, mask in zip(pair, (pred, ref), strict=False):
            save(folder / f"r{seed}.nii.gz", mask, affine)
    found, _ = run("generic", *pair, "--metrics=nsd_1.0", "--labels", "organ=1")
    assert {found[f"r{seed}", "organ", "nsd_1.0"] for seed in range(6)} == {1.0}


def test_specificity_is_of_the_annotated_voxels(pair):
    """Half of the image is not annotated."""
    pred, ref, out = pair
    label, guess = np.zeros((10, 10, 4), np.uint8), np.zeros((10, 10, 4), np.uint8)
    label[5:] = 255
    label[:2] = 1
    guess[:3] = 1
    for folder, array in ((ref, label), (pred, guess)):
        for path in folder.iterdir():
            path.unlink()
        save(folder / "a.nii.gz", array, AFFINE)
    (ref / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1, "ignore": 255}}))
    found, _ = run("generic", pred, ref, out, "--metrics=specificity")
    assert found["a", "organ", "specificity"] == pytest.approx(1 - 1 / 3)  # of three rows outside, one is wrong


def test_metrics_that_the_rules_name_otherwise_are_not_ignored_silently(tmp_path, capsys):
    run("brats2023", *brats_tree(tmp_path, "brats2023"), "--metrics=dice,iou")
    lines = [line for line in capsys.readouterr().out.splitlines() if "--metrics" in line]
    assert len(lines) == 1 and "dice" in lines[0] and "iou" not in lines[0]


def test_files_that_are_not_read_are_named(pair, capsys):
    """A download that is not complete, a format that is not read, and copies in hidden folders."""
    pred, ref, out = pair
    (ref / "c.nii.gz.part").write_bytes(b"x")
    (ref / "d.hdr").write_bytes(b"x")
    (ref / "notes.txt").write_text("x")
    for folder in (pred, ref):
        shutil.copytree(folder, folder / ".backup")
    found, _ = run("generic", pred, ref, out)
    assert {key[0] for key in found} == {"a", "b"}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert "c.nii.gz.part" in line and "d.hdr" in line and "notes" not in line


def test_label_maps_too_far_below_are_an_error(pair):
    pred, ref, out = pair
    save(ref / "site" / "2024" / "P7" / "session" / "c.nii.gz", blobs(3), AFFINE)
    refused(["c.nii.gz", "4 folders below"], "generic", pred, ref, out)


def test_a_table_of_a_data_set_is_not_replaced_by_results(pair):
    """Both are called cases.csv."""
    pred, ref, _ = pair
    run("generic", *pair)
    run("generic", *pair)  # results are replaced
    (ref.parent / "cases.csv").write_text("image,label\na.nii.gz,ref/a.nii.gz\n")
    refused([str(ref.parent / "cases.csv"), "--out"], "generic", pred, ref, ref.parent)
    assert (ref.parent / "cases.csv").read_text().startswith("image")
    assert not (ref.parent / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task=1"], "--task"),
        (["--rules=brats2024", "--convention=brats2021"], "brats2021"),
        (["--rules=generic", "--labels=x"], "--labels"),
        (["--cases=a,c"], "c are not validation cases"),
        (["--tune_min_et"], "min_et"),
    ],
)
def test_options_of_a_run_are_checked_before_its_cases_are_predicted(arguments, words, tmp_path):
    """The run has no weights: an error about them would come first if prediction started."""
    config = load_config("configs/brats_dxnet.py:scratch", [])
    write_json(tmp_path / CONFIG_FILE, config.to_dict())
    write_json(tmp_path / SPLIT_FILE, {"train": ["b"], "validation": ["a"]})
    with pytest.raises(UserError) as error:
        evaluate.main([f"--workdir={tmp_path}", *arguments])
    said(error, words)


def test_half_sequences_are_refused_before_they_are_predicted(tmp_path):
    config = load_config("configs/camus_sequence.py", [])
    write_json(tmp_path / CONFIG_FILE, config.to_dict())
    write_json(tmp_path / SPLIT_FILE, {"train": ["b"], "validation": ["a"]})
    with pytest.raises(UserError, match=r"half sequences.*--rules=generic"):
        evaluate.main([f"--workdir={tmp_path}"])


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("rules", ["generic", "camus", "chaos", "brats2022", "brats2023", "brats2024"])
def test_unusable_folders(pair, rules, side):
    """A folder that does not exist, a file, an empty folder, and one without label maps."""
    folders = list(pair[:2])
    nowhere = pair[0].parent / "nowhere"
    for kind in ("missing", "file", "empty", "other"):
        folders[side] = nowhere
        if kind == "file":
            nowhere.write_text("x")
        elif kind == "empty":
            nowhere.unlink()
            nowhere.mkdir()
        elif kind == "other":
            (nowhere / "notes.txt").write_text("x")
        if rules != "generic" and side == 0:  # the reference is looked at first; give a usable one
            folders[1] = usable_reference(rules, pair[0].parent / "usable")
        message = refused("nowhere", rules, *folders, pair[2])
        if kind == "other":
            assert "notes.txt" in message and "expected" in message


def usable_reference(rules, folder):
    name = {"camus": "patient0001_2CH_ED_gt", "chaos": "CT_1"}.get(rules, "BraTS2021_00000_seg")
    save(folder / f"{name}.nii.gz", np.zeros((6, 6, 6) if rules != "camus" else (6, 6), np.uint8), AFFINE)
    return folder


def test_shapes_that_differ(pair):
    save(pair[0] / "b.nii.gz", blobs(1)[:-1], AFFINE)
    refused(["b.nii.gz", "(15, 14, 10)", "(16, 14, 10)"], "generic", *pair)
    found, summary = run("generic", *pair, "--missing=penalise")
    assert summary["unreadable"] == ["b"]
    assert found["b", "1", "dice"] == 0


def test_spacings_that_differ(pair):
    save(pair[0] / "b.nii.gz", blobs(1), AFFINE @ np.diag([1, 1, 1.5, 1]))
    refused(["b.nii.gz", "3", "2"], "generic", *pair)


def test_affines_that_differ(pair):
    moved = AFFINE.copy()
    moved[0, 3] += 1
    save(pair[0] / "b.nii.gz", blobs(1), moved)
    refused(["b.nii.gz", "affine"], "generic", *pair)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [0.5, math.nan, math.inf])
@pytest.mark.parametrize("options", [[], ["--labels=t=1"]])
def test_labels_that_are_no_labels(pair, side, value, options):
    array = blobs(1).astype(np.float32)
    array[0, 0, 0] = value
    save(pair[side] / "b.nii.gz", array, AFFINE)
    message = refused([str(pair[side] / "b.nii.gz"), f"{value:g}"], "generic", *pair, *options)
    assert len(message) < 600  # not a list of all 256 labels


def test_labels_off_by_rounding_are_labels(pair):
    expected, _ = run("generic", *pair)
    save(pair[0] / "b.nii.gz", np.roll(blobs(1), 1, 0).astype(np.float32) * np.float32(1.0001), AFFINE)
    assert run("generic", *pair)[0] == pytest.approx(expected)


@pytest.mark.parametrize("side", [0, 1])
def test_two_files_for_one_case(pair, side):
    sitk.WriteImage(sitk.ReadImage(str(pair[side] / "b.nii.gz")), str(pair[side] / "b.mha"))
    refused(["b.nii.gz", "b.mha", "keep one"], "generic", *pair)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("missing", ["error", "penalise"])
@pytest.mark.parametrize("name", ["b.nii.gz", "b.nii", "b.mha", "b.nrrd"])
def test_damaged_files(pair, name, side, missing):
    """Truncated, empty, or of another kind. A damaged reference is never a matter of --missing."""
    path = pair[side] / "b.nii.gz"
    whole = path.read_bytes()
    if name != path.name:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(pair[side] / name))
        path.unlink()
        path = pair[side] / name
        whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x00\x01 not an image", gzip.compress(b"x" * 400)):
        path.write_bytes(content)
        if side == 0 and missing == "penalise":
            found, summary = run("generic", *pair, "--missing=penalise")
            assert found["b", "1", "dice"] == 0 and summary["unreadable"] == ["b"]
        else:
            refused([name], "generic", *pair, f"--missing={missing}")


def test_a_label_map_of_several_volumes(pair):
    save(pair[0] / "b.nii.gz", np.stack([blobs(1)] * 2, -1), AFFINE)
    refused(["b.nii.gz", "(16, 14, 10, 2)"], "generic", *pair)


@pytest.mark.parametrize(
    ("rules", "option"),
    [
        ("generic", "--convention=brats2021"),
        ("camus", "--convention=brats2021"),
        ("brats2023", "--platform_2022"),
        ("brats2022", "--cohort=GLI"),
        ("brats2024", "--cohort=GLI"),
        ("camus", "--task=1"),
        ("chaos", "--step=largest"),
        ("generic", "--contour=official"),
        ("chaos", "--labels=a=1"),
        ("brats2022", "--border=inside"),
    ],
)
def test_options_of_other_rules(pair, rules, option):
    refused([option.split("=")[0], rules], rules, *pair, option)


@pytest.mark.parametrize(
    ("rules", "convention"),
    [("brats2024", "brats2021"), ("brats2024", "brats2023"), ("brats2023", "brats2024"), ("brats2022", "brats2024")],
)
def test_conventions_of_other_years(pair, rules, convention):
    refused(["--convention", convention, rules], rules, *pair, f"--convention={convention}")


@pytest.mark.parametrize("metrics", ["hd96", "dice,hd96", "Dice"])
def test_unknown_metrics(pair, metrics):
    """The message lists the known ones."""
    refused(["--metrics", metrics.split(",")[-1], "hd95_pooled"], "generic", *pair, f"--metrics={metrics}")


@pytest.mark.parametrize("word", ["liver", "=1", "liver=", "liver=one", "liver=1,", "liver=1.5", "liver=-1", "liver=²"])
def test_words_of_labels_that_cannot_be_read(pair, word):
    refused(["--labels", word], "generic", *pair, f"--labels={word}")


def test_a_label_given_twice(pair):
    """The first meaning must not vanish without a word."""
    refused(["--labels", "liver"], "generic", *pair, "--labels", "liver=1", "liver=2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"labels": []}',
        '{"labels": {"a": "one"}}',
        '{"labels": {"a": null}}',
        '{"labels": 3}',
        "\x00",
    ],
)
def test_dataset_json_that_cannot_be_read(pair, text):
    path = pair[1] / "dataset.json"
    path.write_text(text)
    refused([str(path)], "generic", *pair)


def test_a_name_of_two_values_is_refused(pair):
    """In the format value -> name, one of the two would be lost."""
    (pair[1] / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "a", "2": "a"}}))
    refused(["dataset.json", "same name"], "generic", *pair)


def test_images_in_place_of_label_maps_are_refused(pair):
    image = np.random.default_rng(0).normal(0, 500, (16, 14, 10)).astype(np.int16)
    save(pair[1] / "a.nii.gz", image, AFFINE)
    refused(["a.nii.gz", "probably an image"], "generic", *pair)
    refused("has unknown labels", "generic", *pair, "--labels", "tumour=1")


def test_a_prediction_that_is_an_image_can_be_omitted(pair, capsys):
    image = np.random.default_rng(0).normal(0, 500, (16, 14, 10)).astype(np.int16)
    save(pair[0] / "a.nii.gz", image, AFFINE)
    refused("probably an image", "generic", *pair)
    found, summary = run("generic", *pair, "--missing=skip")
    assert summary["skipped"] == ["a"] and {case for case, _, _ in found} == {"b"}


def test_label_maps_with_rounding_errors_and_negative_values_are_label_maps(pair):
    expected, _ = run("generic", *pair)
    for folder in pair[:2]:
        for n, case in enumerate("ab"):
            label = np.asarray(nib.load(folder / f"{case}.nii.gz").dataobj).astype(np.float32)
            noise = np.random.default_rng(n).uniform(-1e-4, 1e-4, label.shape).astype(np.float32)
            save(folder / f"{case}.nii.gz", label + noise, AFFINE)
    assert run("generic", *pair)[0] == expected
    for folder in pair[:2]:
        label = np.asarray(nib.load(folder / "a.nii.gz").dataobj)
        save(folder / "a.nii.gz", np.where(label > 1.5, -1, label), AFFINE)
    assert ("a", "-1", "dice") in run("generic", *pair)[0]


def test_a_folder_of_predictions_may_have_the_name_of_an_extra_output(pair):
    pred, ref, out = pair
    expected, _ = run("generic", *pair)
    pred.rename(pred.with_name("uncertainty"))
    assert run("generic", pred.with_name("uncertainty"), ref, out.with_name("again"))[0] == expected


def test_an_address_in_a_bucket_is_no_folder_for_results(pair, capsys):
    for option in ("--out", "--pred", "--ref"):
        with pytest.raises(SystemExit):
            evaluate.main(["--rules=generic", f"{option}=gs://bucket/eval"])
        assert "gs://bucket/eval: expected a local path" in capsys.readouterr().err


def test_an_interrupted_evaluation_has_no_record_of_an_earlier_one(pair, monkeypatch):
    run("generic", *pair)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xdim_jax.scoring.folders.write_evaluation", full)
    with pytest.raises(OSError, match="No space"):
        run("generic", *pair)
    with pytest.raises(UserError, match=r"evaluate\.json"):
        compare.main([str(pair[2]), str(pair[2])])


def test_a_metric_that_is_given_twice_is_one_column():
    assert challenges.parse_metrics("dice, hd95,hd95_pooled,dice") == ("dice", "hd95_pooled")


@pytest.mark.parametrize("text", ['{"labels": {}}', '{"labels": {"background": 0}}'])
def test_dataset_json_without_a_structure(pair, text):
    """There is nothing to score: not an empty table, which looks like success."""
    path = pair[1] / "dataset.json"
    path.write_text(text)
    refused([str(path)], "generic", *pair)


def test_results_that_cannot_be_written(pair):
    pred, ref, out = pair
    out.write_text("a file")
    with pytest.raises(UserError, match="out"):
        evaluate.main(["--rules=generic", f"--pred={pred}", f"--ref={ref}", f"--out={out}", "--jobs=1"])


def test_failure_leaves_no_results(pair):
    (pair[0] / "b.nii.gz").write_bytes(b"x")
    refused("b.nii.gz", "generic", *pair)
    assert not pair[2].exists()


def test_all_damaged_files_are_named_at_once(pair):
    for side in (0, 1):
        for case in "ab":
            (pair[side] / f"{case}.nii.gz").write_bytes(b"x")
    refused([str(pair[1] / "a.nii.gz"), str(pair[1] / "b.nii.gz")], "generic", *pair)
    shutil.rmtree(pair[1])
    for n, case in enumerate("ab"):
        save(pair[1] / f"{case}.nii.gz", blobs(n), AFFINE)
    refused([str(pair[0] / "a.nii.gz"), str(pair[0] / "b.nii.gz")], "generic", *pair)


def test_the_parser_refuses(capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.main(["--rules=brats2019", "--pred=a", "--ref=b", "--out=c"])
    assert error.value.code == 2
    assert "brats2022" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--rules=camus"], ["--rules=generic", "--pred=a", "--ref=b"]])
def test_flags_that_are_missing_are_named(given, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        evaluate.main(given)
    message = str(error.value) + capsys.readouterr().err
    assert all(flag in message for flag in ("--rules", "--pred", "--ref", "--out"))


# -- CAMUS -----------------------------------------------------------------------------------------------------------

PIXEL = (0.9, 1.1)  # row, column, mm
PICTURE = np.diag([-PIXEL[1], -PIXEL[0], 1.0, 1.0])


def heart(patient, key):
    """Labels (rows, columns): the cavity, muscle around it, and the atrium below."""
    shape, n = (104, 70), 4 * patient + CAMUS_IMAGES.index(key)
    shrink = 0.85 if key[1] == "ES" else 1.0
    inner = ventricle(shape, PIXEL, length=62 * shrink + n, width=20 * shrink + n / 2)
    outer = ventricle(shape, PIXEL, length=70 * shrink + n, width=28 * shrink + n / 2)
    label = np.where(inner, 1, np.where(outer, 2, 0))
    label[92:98, 25:45] = 3
    return label.astype(np.uint8)


def predicted(patient, key):
    return np.roll(heart(patient, key), (1, 2), (0, 1))


def camus_tree(root, form="nifti", patients=(1, 2)):
    """References beside images, as released."""
    for patient in patients:
        for key in CAMUS_IMAGES:
            name = f"patient{patient:04d}_{key[0]}_{key[1]}"
            label = heart(patient, key)
            if form == "nifti":
                folder = root / "database_nifti" / f"patient{patient:04d}"
                save(folder / f"{name}_gt.nii.gz", label.T, PICTURE)
                save(folder / f"{name}.nii.gz", label.T * 50, PICTURE)
                (folder / f"Info_{key[0]}.cfg").write_text("ED: 1\n")
                (folder / "MANDATORY_CITATION.md").write_text("x")
                save(
                    folder / f"patient{patient:04d}_{key[0]}_half_sequence_gt.nii.gz",
                    np.stack([label.T] * 3, -1),
                    np.eye(4),
                )
            else:
                folder = root / "training" / f"patient{patient:04d}"
                folder.mkdir(parents=True, exist_ok=True)
                metaimage(folder / f"{name}_gt.mhd", label[None])
                metaimage(folder / f"{name}.mhd", label[None] * 50)
    return root


def metaimage(path, array):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((PIXEL[1], PIXEL[0], 1.0)[: array.ndim])
    sitk.WriteImage(image, str(path))


def camus_predictions(folder, form="nifti", patients=(1, 2), ending=""):
    for patient in patients:
        for key in CAMUS_IMAGES:
            path = folder / f"patient{patient:04d}_{key[0]}_{key[1]}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if form == "nifti":
                save(path.with_name(f"{path.name}.nii.gz"), predicted(patient, key).T, PICTURE)
            else:
                metaimage(path.with_name(f"{path.name}.mhd"), predicted(patient, key)[None])
    return folder


MEMBERS = {"LV_endo": [1], "LV_epi": [1, 2], "LA": [3]}


@pytest.mark.parametrize("form", ["nifti", "metaimage"])
def test_camus_by_hand(tmp_path, form):
    ref = camus_tree(tmp_path / "ref", form)
    pred = camus_predictions(tmp_path / "pred", form)
    found, summary = run("camus", pred, ref, tmp_path / "out")
    pooled = {}
    for patient in (1, 2):
        for key in CAMUS_IMAGES:
            for name, members in MEMBERS.items():
                masks = (np.isin(f(patient, key), members) for f in (predicted, heart))
                expected = brute(*masks, np.diag(PIXEL), True)
                case = (f"patient{patient:04d}_{key[0]}_{key[1]}", name)
                assert found[*case, "dice"] == pytest.approx(expected["dice"])
                assert found[*case, "mad"] == pytest.approx(expected["assd_mean"], rel=1e-5)
                assert found[*case, "hd"] == pytest.approx(expected["hd"], rel=1e-5)
                pooled.setdefault((key[1], name), []).append(expected["assd_mean"])
                pooled.setdefault((f"{key[0]} {key[1]}", name), []).append(expected["assd_mean"])
    assert set(summary["groups"]) == {"ED", "ES", "2CH ED", "2CH ES", "4CH ED", "4CH ES"}
    for (group, name), values in pooled.items():
        assert len(values) == (4 if " " not in group else 2)
        assert summary["groups"][group][name]["mad"]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        assert summary["groups"][group][name]["mad"]["count"] == len(values)
    check_volumes(found, summary)


def check_volumes(found, summary):
    agreement = []
    for patient in (1, 2):
        values = {}
        for suffix, draw in (("", predicted), ("_ref", heart)):
            edv, esv = slow_volumes({key: (draw(patient, key) == 1, PIXEL) for key in CAMUS_IMAGES})
            values |= {f"edv_raw{suffix}": edv, f"esv_raw{suffix}": esv}
            edv, esv = round(edv), round(esv)
            values |= {f"edv{suffix}": edv, f"esv{suffix}": esv, f"ef{suffix}": 100 * (edv - esv) / edv}
        agreement.append(values)
        for name, value in values.items():
            assert found[f"patient{patient:04d}", "LV volume", name] == pytest.approx(value, rel=1e-5), name
    volumes = summary["volumes"]
    assert (volumes["patients"], volumes["failed"], volumes["incomplete"]) == (2, [], [])
    for name in ("edv", "esv", "ef"):
        difference = [v[name] - v[f"{name}_ref"] for v in agreement]
        assert volumes["agreement"][name]["bias"] == pytest.approx(np.mean(difference))
        assert volumes["agreement"][name]["sd"] == pytest.approx(np.std(difference, ddof=1))


def test_camus_files(tmp_path):
    out = tmp_path / "out"
    run("camus", camus_predictions(tmp_path / "pred"), camus_tree(tmp_path / "ref"), out)
    lines = (out / "cases.csv").read_text().splitlines()
    assert lines[0] == "case_id,view,instant,structure,metric,value"
    assert lines[1].startswith("patient0001_2CH_ED,2CH,ED,LV_endo,dice,")
    record = json.loads((out / "evaluate.json").read_text())
    assert record["cases"]["patient0002_4CH_ES"]["patient"] == "patient0002"
    tables = (out / "tables.md").read_text()
    assert "Table 2" in tables and "Table 3" in tables and "0.945" in tables and "0.896" in tables


def test_camus_more_metrics_are_those_of_the_plane(tmp_path):
    """MAD is assd_mean and HD is hd, in 2D with the same border: by name they must give the same numbers."""
    ref, pred = camus_tree(tmp_path / "ref", patients=(1,)), camus_predictions(tmp_path / "pred", patients=(1,))
    found, _ = run("camus", pred, ref, tmp_path / "out", "--metrics=assd_mean")
    for key in CAMUS_IMAGES:
        case = f"patient0001_{key[0]}_{key[1]}"
        for name in MEMBERS:
            assert found[case, name, "assd_mean"] == pytest.approx(found[case, name, "mad"])


def test_camus_predictions_may_be_called_gt_or_lie_in_folders(tmp_path):
    ref = camus_tree(tmp_path / "ref", patients=(1,))
    expected, _ = run("camus", camus_predictions(tmp_path / "pred", patients=(1,)), ref, tmp_path / "out")
    named = camus_predictions(tmp_path / "named" / "patient0001", patients=(1,), ending="_gt").parent
    assert run("camus", named, ref, tmp_path / "out")[0] == expected
    perfect, summary = run("camus", shutil.copytree(ref, tmp_path / "same"), ref, tmp_path / "out")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in ref.rglob("patient0001"):
        (linked / "patient0001").symlink_to(path)
    assert run("camus", named, linked, tmp_path / "out")[0] == expected
    assert {v for (_, s, m), v in perfect.items() if m == "dice"} == {1}
    assert summary["volumes"]["agreement"]["edv"]["mae"] == 0


def test_camus_test_patients_of_the_old_release_are_others(tmp_path):
    """Their numbers start again at 1."""
    ref = camus_tree(tmp_path / "ref", "metaimage", patients=(1,))
    (ref / "testing").mkdir()
    shutil.copytree(ref / "training" / "patient0001", ref / "testing" / "patient0001")
    _, summary = run("camus", shutil.copytree(ref, tmp_path / "same"), ref, tmp_path / "out")
    assert summary["cases"] == 8 and summary["volumes"]["patients"] == 2


def test_camus_volumes_of_stray_pieces_and_implausible_ones_are_said(tmp_path, capsys):
    """A patient whose first contour is a stray piece, and one whose ES is larger than its ED."""
    ref, pred = camus_tree(tmp_path / "ref"), camus_predictions(tmp_path / "pred")
    for view in ("2CH", "4CH"):
        ed, es = (pred / f"patient0002_{view}_{instant}.nii.gz" for instant in ("ED", "ES"))
        ed.rename(tmp_path / "x.nii.gz")
        es.rename(ed)
        (tmp_path / "x.nii.gz").rename(es)
    stray = predicted(1, ("2CH", "ED")).copy()
    stray[:2] = 0
    stray[1, 1:4] = 1
    save(pred / "patient0001_2CH_ED.nii.gz", stray.T, PICTURE)
    found, summary = run("camus", pred, ref, tmp_path / "out")
    said = capsys.readouterr().out
    volumes = summary["volumes"]
    assert list(volumes["reasons"]) == ["patient0001"] == volumes["failed"]
    assert list(volumes["implausible"]) == ["patient0002"]
    assert "prediction: 2CH ED: the first contour encloses a stray piece" in volumes["reasons"]["patient0001"]
    assert math.isnan(found["patient0001", "LV volume", "edv"])
    assert all(f"warning: patient000{i}: " in said for i in (1, 2))


@pytest.mark.parametrize("rules", ["camus", "brats2022", "generic"])
def test_references_that_are_given_as_predictions(rules, tmp_path, capsys):
    """The same files are refused; copies of them are scored with a warning in the log, the summary and the report."""
    tree = {"camus": camus_tree, "brats2022": lambda root: brats_tree(root, "brats2022")[1]}
    ref = tree.get(rules, tree["brats2022"])(tmp_path / "data")
    if rules == "generic":
        flat = tmp_path / "flat"
        flat.mkdir()
        for path in ref.rglob("*seg.nii.gz"):
            shutil.copy(path, flat)
        ref = flat
    linked = tmp_path / "linked"
    linked.symlink_to(ref)
    for same in (ref, linked):
        refused(["also given as predictions", "_"], rules, same, ref, tmp_path / "out")
    _, summary = run(rules, shutil.copytree(ref, tmp_path / "copy"), ref, tmp_path / "out")
    assert len(summary["identical"]) == summary["cases"]
    assert (
        f"{summary['cases']} of {summary['cases']} predictions are identical to their reference"
        in capsys.readouterr().out
    )


def test_cases_can_be_chosen_by_a_list_or_a_file(tmp_path):
    pred, ref, out = brats_tree(tmp_path, "brats2022", cases=3)
    everything, _ = run("brats2022", pred, ref, out)
    names = [brats_case(n, "brats2022") for n in (0, 2)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    for chosen in (", ".join(names), tmp_path / "list.txt"):
        found, summary = run("brats2022", pred, ref, out, f"--cases={chosen}")
        assert found == {key: value for key, value in everything.items() if key[0] in names}
        assert summary["cases"] == 2
    refused(["BraTS_absent", "no reference"], "brats2022", pred, ref, out, f"--cases={names[0]},BraTS_absent")


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_cases_without_a_usable_prediction_can_be_left_out(fault, tmp_path, capsys):
    """The other cases have the values that they have without it, also those that are computed over all cases."""
    ref, pred = camus_tree(tmp_path / "ref"), camus_predictions(tmp_path / "pred")
    alone = camus_predictions(tmp_path / "alone", patients=(2,))
    path = pred / "patient0001_4CH_ES.nii.gz"
    others = camus_predictions(tmp_path / "others")
    (others / path.name).unlink()
    path.unlink() if fault == "missing" else path.write_bytes(b"damaged")
    found, summary = run("camus", pred, ref, tmp_path / "out", "--missing=skip")
    assert "patient0001_4CH_ES" in capsys.readouterr().out
    assert summary["cases"] == 7 and not any(key[0] == "patient0001_4CH_ES" for key in found)
    record = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert record["skipped"] == ["patient0001_4CH_ES"] and "patient0001_4CH_ES" not in record["cases"]
    cases = ",".join(f"patient0002_{view}_{instant}" for view, instant in CAMUS_IMAGES)
    expected, _ = run("camus", alone, ref, tmp_path / "out2", f"--cases={cases}")
    assert {key: value for key, value in found.items() if key[0].startswith("patient0002")} == expected
    (tmp_path / "none").mkdir()
    save(tmp_path / "none" / "patient0009_2CH_ED.nii.gz", predicted(1, ("2CH", "ED")).T, PICTURE)
    refused("no reference", "camus", tmp_path / "none", ref, tmp_path / "out", "--missing=skip")


def test_plain_names_of_metrics(tmp_path):
    found, _ = run("brats2022", *brats_tree(tmp_path, "brats2022"), "--metrics=hd95,assd,hd95_pooled")
    assert {"hd95_pooled", "assd_pooled"} <= {metric for _, _, metric in found}


def test_camus_missing_image(tmp_path):
    ref, pred = camus_tree(tmp_path / "ref"), camus_predictions(tmp_path / "pred")
    (pred / "patient0001_4CH_ES.nii.gz").unlink()
    refused(["patient0001_4CH_ES", "--missing=penalise"], "camus", pred, ref, tmp_path / "out")
    found, summary = run("camus", pred, ref, tmp_path / "out", "--missing=penalise")
    assert found["patient0001_4CH_ES", "LA", "dice"] == 0
    assert math.isnan(found["patient0001_4CH_ES", "LA", "mad"])
    assert summary["groups"]["ES"]["LA"]["dice"]["count"] == 4
    assert summary["groups"]["ES"]["LA"]["hd"]["missing"] == 1
    assert summary["volumes"]["incomplete"] == ["patient0001"] and summary["volumes"]["patients"] == 1


def test_camus_empty_cavity_fails_the_volumes(tmp_path):
    ref, pred = camus_tree(tmp_path / "ref"), camus_predictions(tmp_path / "pred")
    none = np.where(predicted(1, CAMUS_IMAGES[0]) == 1, 0, predicted(1, CAMUS_IMAGES[0]))
    save(pred / "patient0001_2CH_ED.nii.gz", none.T, PICTURE)
    found, summary = run("camus", pred, ref, tmp_path / "out")
    assert found["patient0001_2CH_ED", "LV_endo", "dice"] == 0
    assert math.isnan(found["patient0001", "LV volume", "ef"])
    assert not math.isnan(found["patient0001", "LV volume", "ef_ref"])
    assert summary["volumes"]["failed"] == ["patient0001"] and summary["volumes"]["patients"] == 1
    assert summary["empty"]["LV_endo"] == {"pred": 1, "ref": 0, "both": 0}


def test_camus_step_and_contour(tmp_path):
    ref, pred = camus_tree(tmp_path / "ref", patients=(1,)), camus_predictions(tmp_path / "pred", patients=(1,))
    found, summary = run("camus", pred, ref, tmp_path / "out", "--step=per_instant", "--contour=largest_part")
    masks = {key: (heart(1, key) == 1, PIXEL) for key in CAMUS_IMAGES}
    expected = slow_volumes(masks, "per_instant")
    assert found["patient0001", "LV volume", "esv_raw_ref"] == pytest.approx(expected[1], rel=1e-5)
    assert (summary["volumes"]["step"], summary["volumes"]["contour"]) == ("per_instant", "largest_part")


def test_camus_transposed_prediction(tmp_path):
    """The classic mistake: rows for columns."""
    ref, pred = camus_tree(tmp_path / "ref", patients=(1,)), camus_predictions(tmp_path / "pred", patients=(1,))
    save(pred / "patient0001_2CH_ED.nii.gz", predicted(1, CAMUS_IMAGES[0]), PICTURE)
    refused(["patient0001_2CH_ED.nii.gz", "(104, 70)", "(70, 104)"], "camus", pred, ref, tmp_path / "out")


@pytest.mark.parametrize("value", [4, 255])
def test_camus_unknown_label(tmp_path, value):
    ref, pred = camus_tree(tmp_path / "ref", patients=(1,)), camus_predictions(tmp_path / "pred", patients=(1,))
    wrong = predicted(1, CAMUS_IMAGES[0])
    wrong[0, 0] = value
    save(pred / "patient0001_2CH_ED.nii.gz", wrong.T, PICTURE)
    refused(["patient0001_2CH_ED.nii.gz", str(value), "CAMUS"], "camus", pred, ref, tmp_path / "out")


# -- CHAOS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def abdomen(tmp_path_factory):
    """Two CT and two MR patients. Read only."""
    root = tmp_path_factory.mktemp("chaos") / "Train_Sets"
    write_chaos(root, cases=2, shape=(64, 64, 16))
    return root


SERIES = {
    **{f"CT_{n}": (f"CT/{n}", "DICOM_anon") for n in (1, 2)},
    **{f"MR_{n}_T1DUAL": (f"MR/{n}/T1DUAL", "DICOM_anon/InPhase") for n in (1, 2)},
    **{f"MR_{n}_T2SPIR": (f"MR/{n}/T2SPIR", "DICOM_anon") for n in (1, 2)},
}
GREYS = {"liver": 63, "right kidney": 126, "left kidney": 189, "spleen": 252}


def truth(root, case):
    """Greys (slices, rows, columns) in the order of names, spacing, and the affine (columns, rows, slices) in RAS."""
    series, dicom = SERIES[case]
    planes = [np.asarray(Image.open(p)) for p in sorted((root / series / "Ground").glob("*.png"))]
    grey = np.stack([np.where(p > 0, 63, 0) if case.startswith("CT") else p for p in planes]).astype(np.uint8)
    headers = [pydicom.dcmread(p) for p in sorted((root / series / dicom).glob("*.dcm"))]
    first, last = (np.array([float(v) for v in headers[k].ImagePositionPatient]) for k in (0, -1))
    step = (last - first) / (len(headers) - 1)
    side = float(headers[0].PixelSpacing[0])
    affine = np.eye(4)
    affine[:3] = np.stack([[side, 0, 0], [0, side, 0], step, first], 1)
    return grey, (float(np.linalg.norm(step)), side, side), np.diag([-1, -1, 1, 1]) @ affine


def shifted(grey):
    return np.roll(grey, 1, 2)


def chaos_predictions(folder, root, codes="", change=shifted):
    for case in SERIES:
        grey, _, affine = truth(root, case)
        image = nib.Nifti1Image(change(grey).transpose(2, 1, 0), affine)
        if codes:
            turn = nib.orientations.ornt_transform(
                nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
            )
            image = image.as_reoriented(turn)
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.ascontiguousarray(image.dataobj), image.affine), folder / f"{case}.nii.gz")
    return folder


def chaos_pngs(folder, root, task, cases=SERIES, change=shifted):
    for case in cases:
        results = folder / f"Task{task}" / SERIES[case][0] / "Results"
        results.mkdir(parents=True)
        for k, plane in enumerate(change(truth(root, case)[0])):
            Image.fromarray(plane).save(results / f"img{k:03d}.png")
    return folder


def chaos_by_hand(root, case, name):
    grey, spacing, _ = truth(root, case)
    found = brute(shifted(grey) == GREYS[name], grey == GREYS[name], np.diag(spacing), False)
    raw = {"dice": found["dice"], "ravd": found["ravd"], "assd": found["assd_pooled"], "mssd": found["hd"]}
    scores = {
        "dice_score": 100 * raw["dice"] * (raw["dice"] >= 0.8),
        "ravd_score": max(100 - 20 * raw["ravd"], 0),
        "assd_score": max(100 - 20 / 3 * raw["assd"], 0),
        "mssd_score": max(100 - 5 / 3 * raw["mssd"], 0),
    }
    return raw | scores | {"score": sum(scores.values()) / 4}


def check_chaos(found, root, tasks):
    for task, cases, organs in (
        ("1", SERIES, ["liver"]),
        ("2", [c for c in SERIES if c[0] == "C"], ["liver"]),
        ("3", [c for c in SERIES if c[0] == "M"], ["liver"]),
        ("4", SERIES, GREYS),
        ("5", [c for c in SERIES if c[0] == "M"], GREYS),
    ):
        expected = {}
        for case in cases if task in tasks else ():
            for name in organs if case.startswith("MR") else ["liver"]:
                values = chaos_by_hand(root, case, name)
                expected |= {(case, name, metric, task): value for metric, value in values.items()}
        assert {k: v for k, v in found.items() if k[3] == task} == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_chaos_by_hand(tmp_path, abdomen):
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    found, summary = run("chaos", pred, abdomen, tmp_path / "out")
    check_chaos(found, abdomen, "12345")
    assert {t: v["cases"] for t, v in summary["tasks"].items()} == {"1": 6, "2": 2, "3": 4, "4": 6, "5": 4}
    ct = [chaos_by_hand(abdomen, case, "liver")["score"] for case in SERIES if case[0] == "C"]
    mr = [np.mean([chaos_by_hand(abdomen, c, o)["score"] for o in GREYS]) for c in SERIES if c[0] == "M"]
    assert summary["tasks"]["4"]["score"]["mean"] == pytest.approx(np.mean([*ct, *mr]), rel=1e-4)
    assert summary["tasks"]["4"]["score"]["sd"] == pytest.approx(np.std([*ct, *mr], ddof=1), rel=1e-4)
    assert summary["tasks"]["5"]["score"]["mean"] == pytest.approx(np.mean(mr), rel=1e-4)
    mean = np.mean([t["score"]["mean"] for t in summary["tasks"].values()])
    assert summary["average"]["score"] == pytest.approx(mean)
    assert summary["groups"]["task 4"]["spleen"]["dice"]["count"] == 4
    header = (tmp_path / "out" / "cases.csv").read_text().splitlines()[0]
    assert header == "case_id,task,modality,sequence,structure,metric,value"
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "Table 4" in tables and "82.98 ± 6.12" in tables


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL"])
def test_chaos_does_not_mind_the_stored_order_of_axes(tmp_path, abdomen, codes):
    pred = chaos_predictions(tmp_path / "pred", abdomen, codes)
    found, _ = run("chaos", pred, abdomen, tmp_path / "out", "--task=2", "--task=5")
    check_chaos(found, abdomen, "25")


def test_chaos_results_as_png(tmp_path, abdomen):
    """Masks as in a submission, in the order of names, which on CT is downwards."""
    pred = chaos_pngs(tmp_path / "pred", abdomen, 2, [c for c in SERIES if c[0] == "C"])
    chaos_pngs(pred, abdomen, 5, [c for c in SERIES if c[0] == "M"])
    found, summary = run("chaos", pred, abdomen, tmp_path / "out")
    check_chaos(found, abdomen, "25")
    assert set(summary["tasks"]) == {"2", "5"}


def test_chaos_pngs_in_folders_that_name_the_case(tmp_path, abdomen):
    """Folders named after the case ids; and for a single case, the folder itself."""
    pngs = chaos_pngs(tmp_path / "pred", abdomen, 2, ["CT_1", "CT_2"])
    expected, _ = run("chaos", pngs, abdomen, tmp_path / "out", "--task=2")
    named = tmp_path / "named"
    for case, folder in (("CT_1", "1"), ("CT_2", "2")):
        shutil.copytree(pngs / "Task2" / "CT" / folder / "Results", named / case)
    assert run("chaos", named, abdomen, tmp_path / "out", "--task=2")[0] == expected
    alone = tmp_path / "alone" / "CT"
    shutil.copytree(abdomen / "CT" / "1", alone / "1")
    found, _ = run("chaos", named / "CT_1", alone.parent, tmp_path / "out", "--task=2")
    assert found == {key: value for key, value in expected.items() if key[0] == "CT_1"}
    shutil.copytree(named / "CT_1", tmp_path / "masks")
    words = ["PNG files", "CT_1, CT_2", "named after the case id"]
    refused(words, "chaos", tmp_path / "masks", abdomen, tmp_path / "out", "--task=2")
    assert run("chaos", tmp_path / "masks", alone.parent, tmp_path / "out", "--task=2")[0] == found


def test_the_average_of_the_paper_stands_only_beside_all_five_tasks(tmp_path, abdomen):
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    for tasks, shown in (("5",), False), (("1", "2", "3", "4", "5"), True):
        run("chaos", pred, abdomen, tmp_path / "out", *(f"--task={task}" for task in tasks))
        table = tables.paper_tables(json.loads((tmp_path / "out" / "summary.json").read_text()))[0]
        assert any(row[0] == "average" for row in table.rows) == shown


def test_chaos_references_as_label_maps(tmp_path, abdomen):
    ref = chaos_predictions(tmp_path / "ref", abdomen, "RAS", change=lambda grey: grey)
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    found, _ = run("chaos", pred, ref, tmp_path / "out", "--task=5")
    check_chaos(found, abdomen, "5")


def test_chaos_missing_case(tmp_path, abdomen):
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    (pred / "CT_2.nii.gz").unlink()
    refused(["CT_2", "--missing=penalise", "1 of 2"], "chaos", pred, abdomen, tmp_path / "out", "--task=2")
    found, summary = run("chaos", pred, abdomen, tmp_path / "out", "--task=2", "--missing=penalise")
    _, spacing, _ = truth(abdomen, "CT_2")
    diagonal = math.hypot(16 * spacing[0], 64 * spacing[1], 64 * spacing[2])
    values = {m: found["CT_2", "liver", m, "2"] for m in ("score", "dice", "ravd", "assd", "mssd")}
    assert values == pytest.approx({"score": 0, "dice": 0, "ravd": 100, "assd": diagonal, "mssd": diagonal}, rel=1e-4)
    assert summary["tasks"]["2"]["cases"] == 2
    assert summary["tasks"]["2"]["score"]["mean"] == pytest.approx(found["CT_1", "liver", "score", "2"] / 2)


def test_chaos_missing_case_is_counted_once(tmp_path, abdomen):
    """One of six series is missing, though three tasks ask for it."""
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    (pred / "CT_2.nii.gz").unlink()
    message = refused("CT_2", "chaos", pred, abdomen, tmp_path / "out")
    assert "1 of 6" in message and message.count("CT_2") == 1


def test_chaos_case_that_one_task_lacks_is_omitted_there_alone(tmp_path, abdomen):
    mr = [case for case in SERIES if case[0] == "M"]
    pred = chaos_pngs(tmp_path / "pred", abdomen, 3, mr[1:])
    chaos_pngs(pred, abdomen, 5, mr)
    found, summary = run("chaos", pred, abdomen, tmp_path / "out", "--missing=skip")
    assert {task: value["cases"] for task, value in summary["tasks"].items()} == {"3": 3, "5": 4}
    assert (mr[0], "liver", "dice", "5") in found and (mr[0], "liver", "dice", "3") not in found


def test_chaos_reference_without_an_organ(tmp_path, abdomen, capsys):
    """Not evaluated, and said."""
    root = tmp_path / "Train_Sets"
    shutil.copytree(abdomen, root)
    for path in (root / "MR/1/T2SPIR/Ground").iterdir():
        grey = np.asarray(Image.open(path))
        Image.fromarray(np.where(grey == 252, 0, grey).astype(np.uint8)).save(path)
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    found, summary = run("chaos", pred, root, tmp_path / "out", "--task=5")
    assert math.isnan(found["MR_1_T2SPIR", "spleen", "score", "5"])
    assert summary["tasks"]["5"]["cases"] == 4
    assert summary["groups"]["task 5"]["spleen"]["score"]["count"] == 3
    assert summary["empty"]["spleen"] == {"pred": 0, "ref": 1, "both": 0}
    text = capsys.readouterr()
    assert "spleen 1 in the reference" in text.out + text.err


def test_chaos_masks_of_another_number(tmp_path, abdomen):
    pred = chaos_pngs(tmp_path / "pred", abdomen, 2, ["CT_1", "CT_2"])
    (pred / "Task2/CT/1/Results/img003.png").unlink()
    refused(["Task2/CT/1/Results", "15", "16"], "chaos", pred, abdomen, tmp_path / "out", "--task=2")


def test_chaos_masks_of_another_size(tmp_path, abdomen):
    pred = chaos_pngs(tmp_path / "pred", abdomen, 2, ["CT_1", "CT_2"], lambda grey: grey[:, :60])
    refused(["Task2/CT/1/Results", "60", "64"], "chaos", pred, abdomen, tmp_path / "out", "--task=2")


def test_chaos_damaged_mask(tmp_path, abdomen):
    pred = chaos_pngs(tmp_path / "pred", abdomen, 2, ["CT_1", "CT_2"])
    (pred / "Task2/CT/1/Results/img003.png").write_bytes(b"\x89PNG")
    refused(["img003.png"], "chaos", pred, abdomen, tmp_path / "out", "--task=2")


def test_chaos_two_results_for_one_case(tmp_path, abdomen):
    pred = chaos_pngs(tmp_path / "pred", abdomen, 2, ["CT_1", "CT_2"])
    shutil.copytree(pred / "Task2/CT/1/Results", pred / "Task2/CT/1/again")
    refused(["CT_1", "Results", "again"], "chaos", pred, abdomen, tmp_path / "out", "--task=2")


def test_chaos_task_without_a_folder(tmp_path, abdomen):
    """What is asked for and not there is named, not passed over."""
    pred = chaos_pngs(tmp_path / "pred", abdomen, 2, ["CT_1", "CT_2"])
    refused(["Task5"], "chaos", pred, abdomen, tmp_path / "out", "--task=5")
    refused(["Task5"], "chaos", pred, abdomen, tmp_path / "out", "--task=2", "--task=5")


def test_chaos_indices_in_place_of_greys(tmp_path, abdomen):
    """Labels 1 to 4 are no structure of CHAOS: not a score of 0 without a word."""
    pred = chaos_predictions(tmp_path / "pred", abdomen, change=lambda grey: (grey // 63).astype(np.uint8))
    refused(["MR_1_T1DUAL.nii.gz", "63"], "chaos", pred, abdomen, tmp_path / "out", "--task=5")


def test_chaos_incomplete_reference(tmp_path, abdomen):
    """A series whose masks do not fit its slices must not leave the task without a word."""
    root = tmp_path / "Train_Sets"
    shutil.copytree(abdomen, root)
    next((root / "MR/1/T2SPIR/Ground").glob("*.png")).unlink()
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    refused(["MR/1/T2SPIR"], "chaos", pred, root, tmp_path / "out", "--task=5")


def test_chaos_reference_of_a_test_set(tmp_path, abdomen):
    root = tmp_path / "Test_Sets"
    shutil.copytree(abdomen, root, ignore=shutil.ignore_patterns("Ground"))
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    refused(["Test_Sets", "Ground"], "chaos", pred, root, tmp_path / "out")


# -- BraTS -----------------------------------------------------------------------------------------------------------

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LPS[1, 3] = 239
REGIONS = {
    "brats2022": {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]},
    "brats2023": {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]},
    "brats2024": {"WT": [1, 2, 3], "TC": [1, 3], "NETC": [1], "SNFH": [2], "ET": [3], "RC": [4]},
}


def tumour(seed, et=4, shape=(24, 20, 22)):
    """Edema around necrosis around the enhancing part."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3)
    label = np.zeros(shape, np.uint8)
    for share, value in ((0.6, 2), (0.8, 1), (0.9, et)):
        label[field > np.quantile(field, share)] = value
    return label


def brats_case(n, rules):
    return f"BraTS2021_{n:05d}" if rules == "brats2022" else f"BraTS-GLI-{n:05d}-{n:03d}"


def brats_tree(root, rules, cases=2):
    """References with images beside them, and flat predictions."""
    et = 4 if rules == "brats2022" else 3
    mark, image = ("_", "t1ce") if rules == "brats2022" else ("-", "t1c")
    for n in range(cases):
        name = brats_case(n, rules)
        save(root / "ref" / name / f"{name}{mark}seg.nii.gz", tumour(n, et), LPS)
        save(root / "ref" / name / f"{name}{mark}{image}.nii.gz", tumour(n, et) * 9, LPS)
        save(root / "pred" / f"{name}.nii.gz", np.roll(tumour(n, et), 1, 2), LPS)
    return root / "pred", root / "ref", root / "out"


def test_brats_2022_by_hand(tmp_path):
    found, summary = run("brats2022", *brats_tree(tmp_path, "brats2022"))
    expected = {}
    for n in range(2):
        for name, members in REGIONS["brats2022"].items():
            ref = np.isin(tumour(n), members)
            values = brute(np.roll(ref, 1, 2), ref, np.eye(3), True)
            row = {"hd95": values["hd95_pooled"]} | {k: values[k] for k in ("dice", "sensitivity", "specificity")}
            expected |= {(brats_case(n, "brats2022"), name, k): v for k, v in row.items()}
    assert found == pytest.approx(expected)
    assert "platform_2022" not in summary
    assert "Tables 5 and 6" in (tmp_path / "out" / "tables.md").read_text()


def test_brats_2022_platform_rows(tmp_path):
    found, summary = run("brats2022", *brats_tree(tmp_path, "brats2022", 3), "--platform_2022")
    column = [found[brats_case(n, "brats2022"), "WT", "hd95"] for n in range(3)]
    column.append(np.mean(column))
    column.append(np.std(column, ddof=1))
    column.append(np.median(column))
    column.append(np.quantile(column, 0.25))
    column.append(np.quantile(column, 0.75))
    rows = summary["platform_2022"]["WT"]["hd95"]
    assert [rows[k] for k in ("mean", "sd", "median", "q25", "q75")] == pytest.approx(column[3:])


def test_smallest_et_by_hand(tmp_path):
    """False ET of 30 voxels, true ET of 200 that is found, and a case without: between 31 and 200 all have Dice 1."""
    for name, predicted, true in (("a", 30, 0), ("b", 200, 200), ("c", 0, 0)):
        for side, count in (("pred", predicted), ("ref", true)):
            label = np.ones((8, 8, 8), np.uint8)
            label.ravel()[:count] = 4
            save(tmp_path / side / f"{name}.nii.gz", label, np.eye(4))
    _, summary = run("brats2022", tmp_path / "pred", tmp_path / "ref", tmp_path / "out", "--tune_min_et")
    tuned = summary["min_et"]
    assert list(tuned["dice"]) == [str(t) for t in range(0, 751, 10)]
    for t in range(0, 751, 10):
        assert tuned["dice"][str(t)] == pytest.approx(2 / 3 if t <= 30 or t > 200 else 1)
    assert tuned["best"] == 40


@pytest.mark.parametrize("rules", ["brats2023", "brats2024"])
def test_brats_of_later_years(tmp_path, rules):
    pred, ref, out = brats_tree(tmp_path, rules)
    found, summary = run(rules, shutil.copytree(ref, tmp_path / "same"), ref, out)
    assert set(summary["structures"]) == set(REGIONS[rules])
    assert {v for (_, _, m), v in found.items() if m == "dice"} == {1}
    assert {v for (_, _, m), v in found.items() if m == "hd95"} == {0}
    found, _ = run(rules, pred, ref, out)
    assert all(0 < v < 1 for (_, s, m), v in found.items() if m == "dice" and s == "WT")
    record = json.loads((out / "evaluate.json").read_text())
    assert record["cases"]["BraTS-GLI-00001-001"]["patient"] == "BraTS-GLI-00001"


def test_brats_2023_whole_image_by_hand(tmp_path):
    found, _ = run("brats2023", *brats_tree(tmp_path, "brats2023", 1), "--metrics=hd95_pooled")
    for name, members in REGIONS["brats2023"].items():
        ref = np.isin(tumour(0, 3), members)
        values = brute(np.roll(ref, 1, 2), ref, np.eye(3), True)
        case = ("BraTS-GLI-00000-000", name)
        assert found[*case, "dice_whole"] == pytest.approx(values["dice"])
        assert found[*case, "sensitivity"] == pytest.approx(values["sensitivity"])
        assert found[*case, "specificity"] == pytest.approx(values["specificity"])
        assert found[*case, "hd95_pooled"] == pytest.approx(values["hd95_pooled"])


@pytest.mark.parametrize(
    ("rules", "values"),
    [
        ("brats2022", {"dice": 0, "hd95": 374, "sensitivity": 0, "specificity": 0}),
        ("brats2023", {"dice": 0, "hd95": 374, "dice_whole": 0, "hd95_whole": 374}),
        ("brats2024", {"dice": 0, "hd95": 337}),
    ],
)
@pytest.mark.parametrize("how", ["missing", "unreadable"])
def test_brats_penalties(tmp_path, rules, values, how):
    pred, ref, out = brats_tree(tmp_path, rules)
    path = pred / f"{brats_case(1, rules)}.nii.gz"
    path.unlink() if how == "missing" else path.write_bytes(b"x")
    refused(brats_case(1, rules), rules, pred, ref, out)
    found, summary = run(rules, pred, ref, out, "--missing=penalise")
    for metric, value in values.items():
        assert found[brats_case(1, rules), "WT", metric] == value
    assert summary["structures"]["WT"]["dice"]["count"] == 2
    assert summary["unreadable"] == [brats_case(1, rules)]


def test_brats_stored_order_of_axes(tmp_path):
    pred, ref, out = brats_tree(tmp_path, "brats2023")
    expected, _ = run("brats2023", pred, ref, out)
    for path in pred.iterdir():
        image = nib.as_closest_canonical(nib.load(path))
        nib.save(nib.Nifti1Image(np.ascontiguousarray(image.dataobj), image.affine), path)
    assert run("brats2023", pred, ref, out)[0] == expected


@pytest.mark.parametrize(
    ("rules", "files", "label"), [("brats2022", "brats2023", "3"), ("brats2023", "brats2022", "4")]
)
def test_brats_wrong_convention(tmp_path, rules, files, label):
    """The message names the file, its label, and the flag that sets the convention."""
    pred, ref, out = brats_tree(tmp_path, files)
    refused(["seg.nii.gz", f": {label};", "--convention"], rules, pred, ref, out)


def test_brats_2022_of_files_of_2023(tmp_path):
    pred, ref, out = brats_tree(tmp_path, "brats2023")
    found, _ = run("brats2022", pred, ref, out, "--convention=brats2023")
    ref = tumour(0, 3) == 3
    expected = brute(np.roll(ref, 1, 2), ref, np.eye(3), True)
    assert found["BraTS-GLI-00000-000", "ET", "hd95"] == pytest.approx(expected["hd95_pooled"])


def test_brats_case_355_of_2020(tmp_path):
    """In a common copy of the data, the reference of this case has another name (docs/challenges.md, BraTS: files)."""
    name = "BraTS20_Training_355"
    ref, pred = tmp_path / "ref", tmp_path / "pred"
    for n in (354, 355):
        case = f"BraTS20_Training_{n}"
        seg = f"{case}_seg.nii" if n == 354 else "W39_1998.09.19_Segm.nii"
        save(ref / case / seg, tumour(n), LPS)
        save(ref / case / f"{case}_t1.nii", tumour(n), LPS)
        save(pred / f"{case}.nii.gz", tumour(n), LPS)
    found, _ = run("brats2022", pred, ref, tmp_path / "out")
    assert found[name, "WT", "dice"] == 1


def test_brats_of_2019_in_two_folders(tmp_path):
    for grade, case in (("HGG", "BraTS19_CBICA_AAB_1"), ("LGG", "BraTS19_2013_0_1")):
        save(tmp_path / "ref" / grade / case / f"{case}_seg.nii.gz", tumour(1), LPS)
        save(tmp_path / "pred" / f"{case}.nii.gz", tumour(1), LPS)
    found, _ = run("brats2022", tmp_path / "pred", tmp_path / "ref", tmp_path / "out")
    assert {case for case, _, _ in found} == {"BraTS19_CBICA_AAB_1", "BraTS19_2013_0_1"}


def test_brats_labels_as_floats(tmp_path):
    pred, ref, out = brats_tree(tmp_path, "brats2022")
    expected, _ = run("brats2022", pred, ref, out)
    for path in pred.iterdir():
        save(path, np.asanyarray(nib.load(path).dataobj).astype(np.float32) + np.float32(2e-4), LPS)
    assert run("brats2022", pred, ref, out)[0] == expected


# -- compare ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Evaluations of two methods on six cases, the second moved by two voxels in place of one. Read only."""
    root = tmp_path_factory.mktemp("evaluated")
    for n in range(6):
        save(root / "ref" / f"c{n}.nii.gz", blobs(n), AFFINE)
        for name, move in (("a", 1), ("b", 2)):
            save(root / f"pred_{name}" / f"c{n}.nii.gz", np.roll(blobs(n), move, 0), AFFINE)
    for name in "ab":
        run("generic", root / f"pred_{name}", root / "ref", root / name)
    return root


@pytest.fixture
def two(evaluated, tmp_path):
    """Copies of them."""
    return tuple(shutil.copytree(evaluated / name, tmp_path / name) for name in "ab")


def test_compare_by_hand(two, tmp_path, capsys):
    a, b = (read(folder) for folder in two)
    assert compare.main([*map(str, two), f"--out={tmp_path / 'c.md'}", "--metrics=dice"]) == 0
    found = {d["structure"]: d for d in json.loads((tmp_path / "c.json").read_text())["differences"]}
    assert set(found) == {"1", "2"}
    for name, d in found.items():
        difference = [b[f"c{n}", name, "dice"] - a[f"c{n}", name, "dice"] for n in range(6)]
        assert d["mean"] == pytest.approx(np.mean(difference)) and d["mean"] < 0
        assert d["cases"] == 6
        assert d["p"] == pytest.approx(2 / 64)  # all six are worse
        assert d["p_holm"] == pytest.approx(4 / 64)
        assert min(difference) <= d["low"] <= d["mean"] <= d["high"] <= max(difference)
    assert (tmp_path / "c.tex").read_text().count(r"\begin{tabular}") == 1
    assert "0.0625" in (tmp_path / "c.md").read_text()
    assert "0.0625" in "".join(capsys.readouterr())
    assert compare.main([*map(str, two), f"--out={tmp_path / 'c.md'}", "--metrics=hd95"]) == 0
    found = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert {d["metric"] for d in found} == {"hd95_pooled"}, "the same short names as in evaluate"


def test_compare_says_what_it_leaves_out(evaluated, two, tmp_path, capsys):
    """Cases and metrics that one of the two has alone."""
    pred = shutil.copytree(evaluated / "pred_b", tmp_path / "pred")
    (pred / "c5.nii.gz").unlink()
    (tmp_path / "ref").mkdir()
    for n in range(5):
        shutil.copy(evaluated / "ref" / f"c{n}.nii.gz", tmp_path / "ref")
    run("generic", pred, tmp_path / "ref", tmp_path / "d", "--metrics=dice,volume")
    table = tmp_path / "d" / "cases.csv"  # a structure that only one of them has
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, *(line.replace(",1,", ",7,") for line in lines if ",1," in line)]) + "\n")
    capsys.readouterr()
    assert compare.main([str(two[0]), str(tmp_path / "d")]) == 0
    said = "".join(capsys.readouterr())
    assert f"1 cases are only in {two[0]}" in said and "c5" in said
    assert f"structures that are only in {tmp_path / 'd'} are excluded: 7" in said
    assert "assd_pooled, hd95_pooled" in said
    assert compare.main([str(two[0]), str(two[1]), "--metrics=dice"]) == 0
    assert "excluded" not in "".join(capsys.readouterr())


def test_compare_takes_every_metric(two, tmp_path):
    assert compare.main([*map(str, two), f"--out={tmp_path / 'c.md'}"]) == 0
    found = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert {d["metric"] for d in found} == {"dice", "assd_pooled", "hd95_pooled"} and len(found) == 6


def test_compare_of_one_network_and_one_per_task(tmp_path, abdomen):
    """Each task of the second one has its own predictions: the tasks are compared one by one."""
    run("chaos", chaos_predictions(tmp_path / "pred", abdomen), abdomen, tmp_path / "a")
    several = tmp_path / "several"
    for task, move in ((3, 1), (5, 2)):
        chaos_predictions(several / f"Task{task}", abdomen, change=lambda grey, move=move: np.roll(grey, move, 2))
    run("chaos", several, abdomen, tmp_path / "b")
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--metrics=dice", f"--out={tmp_path / 'c.md'}"])
    found = {d["structure"] for d in json.loads((tmp_path / "c.json").read_text())["differences"]}
    assert {"task 3 liver", "task 5 liver", "task 5 spleen"} <= found


def test_tasks_whose_modalities_have_no_reference_are_not_scored(tmp_path, abdomen, capsys):
    """Only MR: tasks 3 and 5. Task 4, if it is asked for, says what it lacks."""
    shutil.copytree(abdomen / "MR", tmp_path / "ref" / "MR")
    pred = chaos_predictions(tmp_path / "pred", abdomen)
    for path in pred.glob("CT*"):
        path.unlink()
    _, summary = run("chaos", pred, tmp_path / "ref", tmp_path / "out")
    assert set(summary["tasks"]) == {"3", "5"}
    capsys.readouterr()
    run("chaos", pred, tmp_path / "ref", tmp_path / "out", "--task=4")
    assert "task 4 is scored without CT" in capsys.readouterr().out
    assert "without CT" in (tmp_path / "out" / "tables.md").read_text()


def test_compare_ignores_options_without_effect_on_the_scores(tmp_path):
    pred, ref, _ = brats_tree(tmp_path, "brats2022")
    (pred / "predict.json").write_text("{}")
    run("brats2022", pred, ref, tmp_path / "a", "--tune_min_et", "--platform_2022")
    run("brats2022", pred, ref, tmp_path / "b")
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--metrics=dice"]) == 0


def test_compare_ignores_the_order_of_repeated_options(tmp_path, abdomen):
    pred = chaos_predictions(tmp_path / "pred", abdomen, change=shifted)
    for name, tasks in (("a", "21"), ("b", "122"), ("c", "1")):
        run("chaos", pred, abdomen, tmp_path / name, *(f"--task={task}" for task in tasks))
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--metrics=dice"]) == 0
    compare_refused("task", tmp_path / "a", tmp_path / "c")


def test_compare_counts_a_case_of_chaos_once(tmp_path, abdomen):
    """The same label map scored for several tasks is no further observation: six series, so six cases."""
    for name, change in (("a", shifted), ("b", lambda grey: np.roll(grey, 2, 2))):
        pred = chaos_predictions(tmp_path / f"pred_{name}", abdomen, change=change)
        run("chaos", pred, abdomen, tmp_path / name)
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--metrics=dice", f"--out={tmp_path / 'c.md'}"])
    found = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert {d["structure"]: d["cases"] for d in found} == {
        "liver": 6, "right kidney": 4, "left kidney": 4, "spleen": 4
    }  # fmt: skip


@pytest.mark.parametrize("name", ["c.json", "c.tex"])
def test_compare_keeps_what_it_writes(two, tmp_path, name):
    """The Markdown file and those beside it must not be one and the same."""
    compare_refused(["--out", name], *two, f"--out={tmp_path / name}")


def compare_refused(words, *arguments):
    with pytest.raises(UserError) as error:
        compare.main([*map(str, arguments)])
    said(error, words)


def test_compare_of_what_is_not_there(two, tmp_path):
    compare_refused("nowhere", two[0], tmp_path / "nowhere")
    (two[1] / "cases.csv").unlink()
    compare_refused([str(two[1] / "cases.csv"), "evaluate"], *two)
    compare_refused(["--metrics", "hd96", "dice"], two[0], two[0], "--metrics=hd96")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe\x00", b'{"rules": "generic"}'])
def test_compare_of_a_damaged_record(two, content):
    (two[1] / "evaluate.json").write_bytes(content)
    compare_refused(str(two[1] / "evaluate.json"), *two)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00\x01",
        b"case_id,structure,metric\nc0,1,dice\n",
        b"case_id,structure,metric,value\n",
        b"case_id,structure,metric,value\nc0,1,dice,good\n",
        b"case_id,structure,metric,value\nc0,1\n",
        b"case_id,structure,metric,value\nc0,1,dice,0.5,0.7\n",
        b"name,structure,metric,value\nc0,1,dice,0.5\n",
    ],
)
def test_compare_of_a_damaged_table(two, content):
    (two[1] / "cases.csv").write_bytes(content)
    compare_refused("cases.csv", *two)


def test_compare_of_other_rules_or_cases(two, tmp_path):
    run("brats2022", *brats_tree(tmp_path / "brats", "brats2022"))
    compare_refused(["generic", "brats2022"], two[0], tmp_path / "brats" / "out")
    text = (two[1] / "cases.csv").read_text().replace("\nc", "\nd")
    (two[1] / "cases.csv").write_text(text)
    compare_refused([str(two[0]), str(two[1]), "common"], *two)


def test_compare_of_other_cohorts(tmp_path):
    """Lesion-wise scores of two cohorts have other thresholds: they are not to be compared."""
    pred, ref, out = brats_tree(tmp_path, "brats2023")
    run("brats2023", pred, ref, out / "a", "--cohort=GLI")
    run("brats2023", pred, ref, out / "b", "--cohort=MET")
    compare_refused(["GLI", "MET"], out / "a", out / "b")
