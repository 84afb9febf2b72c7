"""Incomplete annotations: an ignore label, structures that are annotated in some cases only, cases in a table."""

import csv
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from xdim_jax import evaluate
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.problem import errors
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.case import describe, scan_cases, usable_cases
from xdim_jax.data.datasets import get_dataset, trained_dataset
from xdim_jax.data.labels import IGNORE, Labels
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.reading import read_case, read_label
from xdim_jax.data.regions import Regions
from xdim_jax.data.splits import official_split
from xdim_jax.data.store import prepare_cases
from xdim_jax.data.verify import verify
from xdim_jax.inference.inputs import find_cases
from xdim_jax.inference.output import Output
from xdim_jax.inference.validation_cases import REFERENCES_FOLDER, _write_references
from xdim_jax.scoring import generic
from xdim_jax.training.check import resolve_config
from xdim_jax.training.label_maps import LabelMapWriter
from xdim_jax.training.loss import hard_dice, make_loss
from xdim_jax.training.run_data import find_data
from xdim_jax.training.validation import draw, make_validation

SHAPE = (12, 10, 6)


def loss_section(name, **changes):
    return {
        "name": name, "eps": 1e-5, "dice": "sample", "cross_entropy": "mean", "background": True, "weights": ()
    } | changes  # fmt: skip


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), path)


def make_root(root, cases=("a", "b", "c"), *, ignore=9, annotated=None):
    """nnU-Net's layout: organ 1, lesion 2, and voxels that nobody has annotated."""
    card = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "organ": 1, "lesion": 2}}
    if ignore is not None:
        card["labels"]["ignore"] = ignore
    if annotated is not None:
        card["annotated"] = annotated
    rng = np.random.default_rng(0)
    for case in cases:
        label = np.zeros(SHAPE, np.uint8)
        label[2:8, 2:8, 1:5], label[4:6, 4:6, 2:4] = 1, 2
        if ignore is not None:
            label[9:] = ignore
        write_image(root / "imagesTr" / f"{case}_0000.nii.gz", (rng.normal(0, 10, SHAPE) + 50 * label).astype(np.int16))
        write_image(root / "labelsTr" / f"{case}.nii.gz", label)
    (root / "dataset.json").write_text(json.dumps(card))
    return root


def find(root):
    dataset = get_dataset({"dataset": "nnunet", "root": str(root)})
    return dataset, scan_cases(dataset, root, need_labels=True).cases


# -- the ignore label -------------------------------------------------------------------------------------------------


def test_the_value_is_read_and_is_no_structure(tmp_path):
    dataset, cases = find(make_root(tmp_path / "data"))
    assert dataset.labels.ignore == 9 and dataset.regions.names == ("organ", "lesion")
    label = read_label(cases[0])
    assert sorted(np.unique(label)) == [0, 1, 2, IGNORE]
    assert (label == IGNORE).sum() == 3 * 10 * 6
    # the workdir of a run keeps the convention
    again = trained_dataset({"dataset": "nnunet"}, json.loads(json.dumps(describe(dataset))))
    assert again.labels == dataset.labels
    assert not verify(dataset, tmp_path / "data").problems


def test_labels_without_ignore_keep_their_record():
    """The key of a store is computed from it."""
    assert "ignore" not in Labels("own", ("background", "organ"), (0, 1)).to_json()


@pytest.mark.parametrize("value", ["x", 1, [9], 0])
def test_an_ignore_label_must_have_a_value_of_its_own(value, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json.*ignore"):
        find(make_root(tmp_path / "data", ignore=value) if isinstance(value, int) else _with_ignore(tmp_path, value))


def _with_ignore(tmp_path, value):
    root = make_root(tmp_path / "data", ignore=None)
    card = json.loads((root / "dataset.json").read_text())
    card["labels"]["ignore"] = value
    (root / "dataset.json").write_text(json.dumps(card))
    return root


def test_labels_of_a_description_are_named_by_their_values(tmp_path):
    """The message about a region of the labels 2 and 4 names these, and not their positions."""
    root = make_root(tmp_path / "data", ignore=None)
    card = json.loads((root / "dataset.json").read_text())
    card["labels"] = {"background": 0, "necrosis": 1, "tumour": [2, 4]}
    (root / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"tumour.*2, 4"):
        find(root)


@pytest.mark.parametrize("labels", [{"0": "background", "1": "ignore"}, {"background": 0, "ignore": 1}, {"organ": 1}])
def test_a_description_names_at_least_one_structure(labels, tmp_path):
    root = make_root(tmp_path / "data", ignore=None)
    card = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(card | {"labels": labels}))
    with pytest.raises(UserError, match=r"dataset\.json names its labels"):
        find(root)


@pytest.mark.quick
def test_the_rule_for_small_tumours_is_for_brats_alone(tmp_path):
    """Label 1 is edema in the Decathlon's brains, and necrosis in those of BraTS."""
    card = {"channel_names": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}}
    card["labels"] = {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    options = ["--config.data.dataset=nnunet", f"--config.data.root={tmp_path}"]
    with pytest.raises(
        UserError, match=r"config\.predict\.min_et=200 is a rule of the data set brats, found .*=nnunet"
    ):
        resolve_config(load_config("configs/brats_dxnet.py:scratch", options))
    resolve_config(load_config("configs/brats_dxnet.py:scratch", [*options, "--config.predict.min_et=0"]))


def test_images_to_predict_are_found_without_training_images(tmp_path):
    root = make_root(tmp_path / "data", ignore=None)
    dataset, _ = find(root)
    (root / "imagesTr").rename(root / "imagesTs")
    shutil.rmtree(root / "labelsTr")
    assert [c.case_id for c in scan_cases(dataset, root, need_labels=False).cases] == ["a", "b", "c"]


def test_sampling_never_chooses_an_unannotated_voxel(tmp_path):
    dataset, cases = find(make_root(tmp_path / "data"))
    (entry,) = prepare_cases(dataset, cases[:1], Preparation(), tmp_path / "store")
    assert [index for index, _ in entry.structures] == [1, 2, -1]
    assert entry.structures[-1][1] == 6 * 6 * 4
    rng, label = np.random.default_rng(0), entry.load().label
    assert {int(label[entry.random_voxel(rng)]) for _ in range(200)} == {1, 2}


OUTPUTS = {
    "dice_ce": Output("softmax", Regions({"organ": (1,), "lesion": (2,)}), ("background", "organ", "lesion"), True),
    "dice_bce": Output("sigmoid", Regions({"organ": (1, 2), "lesion": (2,)}), ("background", "organ", "lesion"), True),
}


@pytest.mark.parametrize("dice", ["sample", "batch"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_the_loss_is_that_of_the_annotated_part(name, dice):
    """Half of every image is not annotated: the loss and its gradient are those of the other half alone."""
    rng, output = np.random.default_rng(1), OUTPUTS[name]
    logits = jnp.asarray(rng.standard_normal((2, 8, 6, len(output.channels))), jnp.float32)
    label = rng.integers(0, 3, (2, 8, 6)).astype(np.uint8)
    label[:, 4:] = IGNORE
    loss = make_loss(loss_section(name, dice=dice), output.activation, len(output.channels))

    def whole(x):
        return loss(x, output.encode(jnp.asarray(label)), None, output.annotated_voxels(jnp.asarray(label)))[0]

    def half(x):
        return loss(x, output.encode(jnp.asarray(label[:, :4])))[0]

    np.testing.assert_allclose(whole(logits), half(logits[:, :4]), rtol=1e-6)
    gradient = np.asarray(jax.grad(whole)(logits))
    np.testing.assert_allclose(gradient[:, :4], jax.grad(half)(logits[:, :4]), rtol=1e-5, atol=1e-8)
    assert not gradient[:, 4:].any()
    predicted = output.predicted_regions(logits)
    reference = output.regions.encode(jnp.asarray(label), jnp)
    found = hard_dice(predicted, reference, jnp.asarray(label != IGNORE))
    np.testing.assert_allclose(found, hard_dice(predicted[:, :4], reference[:, :4]), rtol=1e-6)


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_image_without_annotation_has_no_gradient(name):
    output = OUTPUTS[name]
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((1, 4, 4, len(output.channels))), jnp.float32)
    label = jnp.full((1, 4, 4), IGNORE, jnp.uint8)
    loss = make_loss(loss_section(name), output.activation, len(output.channels))
    gradient = jax.grad(lambda x: loss(x, output.encode(label), None, output.annotated_voxels(label))[0])(logits)
    assert np.isfinite(gradient).all() and not np.asarray(gradient).any()


def test_scores_leave_out_unannotated_voxels(tmp_path):
    """A prediction that is right where the reference is annotated, and full of organ elsewhere, has a Dice of 1."""
    root = make_root(tmp_path / "data")
    for case in "abc":
        label = np.asarray(nib.load(root / "labelsTr" / f"{case}.nii.gz").dataobj).copy()
        label[label == 9] = 1
        if case == "b":
            label[2:8, 2:8, 1] = 0  # a slice of the organ is missed: 36 of 144 - 8 voxels
        write_image(tmp_path / "pred" / f"{case}.nii.gz", label)
    arguments = [f"--pred={tmp_path / 'pred'}", f"--ref={root / 'labelsTr'}", f"--out={tmp_path / 'out'}", "--jobs=1"]
    assert evaluate.main(["--rules=generic", "--metrics=dice", *arguments]) == 0
    found = {(r["case_id"], r["structure"]): float(r["value"]) for r in rows(tmp_path / "out" / "cases.csv")}
    assert found["a", "organ"] == found["c", "lesion"] == 1
    assert found["b", "organ"] == pytest.approx(2 * 100 / (136 + 100))
    assert evaluate.main(["--rules=generic", "--metrics=dice", *arguments, "--labels", "organ=1", "lesion=2"]) == 0
    found = {(r["case_id"], r["structure"]): float(r["value"]) for r in rows(tmp_path / "out" / "cases.csv")}
    assert found["a", "organ"] == pytest.approx(2 * 136 / (136 + 136 + 180)), "without the name, it is background"


def test_ignored_values_with_rounding_errors_are_not_scored(tmp_path):
    """Label maps may be floats, for example after a conversion."""
    root = make_root(tmp_path / "data")
    for case in "abc":
        label = np.asarray(nib.load(root / "labelsTr" / f"{case}.nii.gz").dataobj)
        write_image(tmp_path / "pred" / f"{case}.nii.gz", np.where(label == 9, 1, label).astype(np.uint8))
        write_image(root / "labelsTr" / f"{case}.nii.gz", label.astype(np.float32) * np.float32(0.99999))
    arguments = [f"--pred={tmp_path / 'pred'}", f"--ref={root / 'labelsTr'}", f"--out={tmp_path / 'out'}", "--jobs=1"]
    assert evaluate.main(["--rules=generic", "--metrics=dice", *arguments]) == 0
    assert {float(r["value"]) for r in rows(tmp_path / "out" / "cases.csv")} == {1.0}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_unannotated_voxels_are_not_drawn():
    reference = np.zeros((3, 8, 8), np.uint8)
    reference[0], reference[1, 2:4, 2:4] = IGNORE, 1
    picture = draw(np.zeros((3, 8, 8), np.float32), reference, np.zeros_like(reference))
    shown = picture[:, 8:16].reshape(8, 8, 3)
    assert (shown != shown[0, 0]).any(-1).sum() == 4, "the slice with the structure, and only the structure"


# -- structures that are annotated in some cases ----------------------------------------------------------------------


def test_annotated_structures_of_a_case_are_used_everywhere(tmp_path):
    root = make_root(tmp_path / "data", annotated={"b": ["organ"], "c": []})
    dataset, cases = find(root)
    assert [dataset.annotated(case) for case in cases] == [("organ", "lesion"), ("organ",), ()]
    again = trained_dataset({"dataset": "nnunet"}, json.loads(json.dumps(describe(dataset))))
    assert [again.annotated(case) for case in cases] == [("organ", "lesion"), ("organ",), ()]
    for case in "abc":
        write_image(tmp_path / "pred" / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    arguments = [f"--pred={tmp_path / 'pred'}", f"--ref={root / 'labelsTr'}", f"--out={tmp_path / 'out'}", "--jobs=1"]
    assert evaluate.main(["--rules=generic", "--metrics=dice", *arguments]) == 0
    found = {(r["case_id"], r["structure"]): r["value"] for r in rows(tmp_path / "out" / "cases.csv")}
    assert float(found["a", "lesion"]) == float(found["b", "organ"]) == 0
    scored = {key for key, value in found.items() if value not in ("", "nan")}
    assert scored == {("a", "organ"), ("a", "lesion"), ("b", "organ")}


def test_a_region_that_no_validation_case_annotates_has_no_score(tmp_path):
    """Neither is it a perfect score, nor does it count in the mean of the fold."""
    root = make_root(tmp_path / "data", annotated={"b": ["organ"], "c": []})
    dataset, cases = find(root)
    entry = SimpleNamespace(load=lambda: None)

    def validate(*chosen):
        nothing = lambda *_, **__: np.zeros(SHAPE[::-1], np.uint8)  # noqa: E731
        pairs = [(cases[i], entry) for i in chosen]
        maps = LabelMapWriter(tmp_path, lambda weights: "")
        return make_validation(nothing, dataset, pairs, label_maps=maps, min_et=0, overlays=0)({}, StopRequest())

    assert validate(1, 2).scores == {"organ": 0.0} and validate(1, 2).cases == {"b": {"organ": 0.0}, "c": {}}
    assert validate(0, 1).scores == {"organ": 0.0, "lesion": 0.0}

    # a fold without any annotation cannot be validated
    (root / "splits.json").write_text(json.dumps([{"training": ["a", "b"], "validation": ["c"]}]))
    words = [f"--config.data.root={root}", "--config.data.split=official", "--config.data.fold=0"]
    config = load_config("configs/own_omnianet.py", words)
    output = Output("sigmoid", dataset.regions, ("background", "organ", "lesion"), False)
    with pytest.raises(UserError, match=r"no region is annotated .*\(c\)"):
        find_data(config.data, 0, dataset, output, tmp_path / "run", started=False, first=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [{"b": ["heart"]}, ["b"], {"b": "organ"}])
def test_annotated_must_name_structures(value, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json.*annotated"):
        find(make_root(tmp_path / "data", annotated=value))


def test_without_incomplete_annotations_nothing_changes(tmp_path):
    """Programs are the same as before: no mask of voxels or channels."""
    dataset, _ = find(make_root(tmp_path / "data", ignore=None))
    assert dataset.annotated is None and dataset.labels.ignore is None and "annotated" not in describe(dataset)


# -- a table of cases -------------------------------------------------------------------------------------------------


def make_table(root, lines, *, channels=("T1",), labels=None):
    root.mkdir(parents=True, exist_ok=True)
    card = {"channel_names": {str(i): n for i, n in enumerate(channels)}}
    card["labels"] = labels or {"background": 0, "organ": 1, "lesion": 2}
    (root / "dataset.json").write_text(json.dumps(card))
    (root / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return root


def scan_table(root, *, need_labels=True):
    dataset = get_dataset({"dataset": "table", "root": str(root)})
    return dataset, scan_cases(dataset, root, need_labels=need_labels)


@pytest.fixture
def files(tmp_path):
    """Images and references of four examinations of three patients, with names of a hospital."""
    make_root(tmp_path / "raw", ("p1_jan", "p1_may", "p2", "p3"), ignore=None)
    return tmp_path


IMAGE, LABEL = "../raw/imagesTr/p2_0000.nii.gz", "../raw/labelsTr/p2.nii.gz"
OTHER = "../raw/imagesTr/p3_0000.nii.gz,../raw/labelsTr/p3.nii.gz"

FOUR = (
    "case,image,label,patient,fold,annotated",
    "one,../raw/imagesTr/p1_jan_0000.nii.gz,../raw/labelsTr/p1_jan.nii.gz,P1,0,",
    "two,../raw/imagesTr/p1_may_0000.nii.gz,../raw/labelsTr/p1_may.nii.gz,P1,0,organ",
    ",../raw/imagesTr/p2_0000.nii.gz,../raw/labelsTr/p2.nii.gz,P2,1,organ|lesion",
    ",../raw/imagesTr/p3_0000.nii.gz,../raw/labelsTr/p3.nii.gz,,1,",
)


def test_a_table_names_cases_patients_folds_and_annotations(files):
    root = make_table(files / "table", FOUR)
    dataset, scan = scan_table(root)
    assert not scan.problems
    assert [(c.case_id, c.patient) for c in scan.cases] == [("one", "P1"), ("p2", "P2"), ("p3", "p3"), ("two", "P1")]
    assert [dataset.annotated(c) for c in scan.cases] == [
        ("organ", "lesion"), ("organ", "lesion"), ("organ", "lesion"), ("organ",)
    ]  # fmt: skip
    train, validation = official_split(scan.cases, scan.splits, 1)
    assert {c.case_id for c in train} == {"one", "two"} and {c.case_id for c in validation} == {"p2", "p3"}
    volume = read_case(scan.cases[0])
    assert volume.image.shape == (6, 10, 12, 1) and (volume.label == 2).sum() == 8
    assert not verify(dataset, root).problems


def test_a_table_with_semicolons_and_two_channels(files):
    paths = (IMAGE, "../raw/imagesTr/p3_0000.nii.gz", LABEL)
    lines = ["image_0;image_1;label", ";".join(paths)]
    _, scan = scan_table(make_table(files / "table", lines, channels=("T1", "T2")))
    (case,) = scan.cases
    assert case.case_id == "p2" and read_case(case).image.shape[-1] == 2 and not scan.splits


def test_rows_without_label_are_predicted_and_not_trained(files):
    lines = ["image,label,annotated", f"{IMAGE},,", f"{OTHER},none"]
    root = make_table(files / "table", lines)
    _, scan = scan_table(root, need_labels=False)
    assert [(c.case_id, c.label is None) for c in scan.cases] == [("p2", True), ("p3", False)]
    dataset, scan = scan_table(root)
    (problem,) = scan.problems
    assert [c.case_id for c in usable_cases(scan, root)] == ["p3"] and "no label" in problem.found
    assert dataset.annotated(scan.cases[0]) == ()


def test_rows_to_predict_need_no_fold(files):
    """Training rows have folds, and the new row has neither label nor fold."""
    lines = ["case,image,label,patient,fold", f"one,{IMAGE},{LABEL},P,0", f"two,{OTHER},Q,1", f"new,{IMAGE},,R,"]
    root = make_table(files / "table", lines)
    dataset, scan = scan_table(root)
    assert [c.case_id for c in usable_cases(scan, root)] == ["one", "two"]
    assert [split["validation"] for split in scan.splits] == [("P",), ("Q",)]
    cases, problems = find_cases(dataset, [root])
    assert [c.case_id for c in cases] == ["new", "one", "two"] and not problems
    root = make_table(files / "table", [*lines[:2], f"two,{OTHER},Q,x", f"new,{IMAGE},,P,1"])
    with pytest.raises(UserError, match="has the fold 'x'"):
        usable_cases(scan_table(root)[1], root)
    cases, problems = find_cases(dataset, [root])
    assert [c.case_id for c in cases] == ["new", "one", "two"] and not problems


def test_splits_that_cannot_be_read_do_not_prevent_prediction(tmp_path):
    root = make_root(tmp_path / "data")
    dataset, _ = find(root)
    for text in ('{"training": 1}', "no JSON", '[{"training": ["a"], "validation": ["a"]}]'):
        (root / "splits.json").write_text(text)
        with pytest.raises(UserError, match=r"splits\.json"):
            usable_cases(scan_cases(dataset, root, need_labels=True), root)
        cases, problems = find_cases(dataset, [root])
        assert [c.case_id for c in cases] == ["a", "b", "c"] and not problems


def test_a_table_of_rows_without_label_limits_the_images_that_are_predicted(tmp_path):
    """The images are next to the table, and the ids of the cases are their names."""
    for name in ("a", "b", "other"):
        write_image(tmp_path / "table" / f"{name}.nii.gz", np.zeros(SHAPE, np.int16))
    root = make_table(tmp_path / "table", ["image,label", "a.nii.gz,", "b.nii.gz,"])
    dataset = get_dataset({"dataset": "table", "root": str(root)})
    assert [c.case_id for c in find_cases(dataset, [root])[0]] == ["a", "b"]
    (root / "cases.csv").unlink()
    assert [c.case_id for c in find_cases(dataset, [root])[0]] == ["a", "b", "other"]


def test_structures_with_blanks_and_the_key_of_dataset_json(files):
    lines = ["image,label,annotated", f"{IMAGE},{LABEL},left kidney", f"{OTHER},"]
    root = make_table(files / "table", lines, labels={"background": 0, "left kidney": 1, "lesion": 2})
    card = json.loads((root / "dataset.json").read_text()) | {"annotated": {"p3": ["lesion"]}}
    (root / "dataset.json").write_text(json.dumps(card))
    dataset, scan = scan_table(root)
    assert [dataset.annotated(c) for c in scan.cases] == [("left kidney",), ("lesion",)]


def test_a_name_in_annotated_that_is_no_case(tmp_path):
    dataset = get_dataset(
        {"dataset": "nnunet", "root": str(make_root(tmp_path / "data", annotated={"a_0000": ["organ"]}))}
    )
    with pytest.raises(UserError, match=r"annotated.*a_0000"):
        usable_cases(scan_cases(dataset, tmp_path / "data", need_labels=True), tmp_path / "data")


def test_annotated_in_the_dataset_json_of_a_table_names_cases_of_the_table(files):
    """A row without a label is a case as well."""
    root = make_table(files / "table", ["image,label", f"{IMAGE},{LABEL}", "../raw/imagesTr/p1_jan_0000.nii.gz,"])
    card = json.loads((root / "dataset.json").read_text())
    for names, wrong in (({"p2": ["organ"], "p1_jan": []}, False), ({"P2": ["organ"], "p2": []}, True)):
        (root / "dataset.json").write_text(json.dumps(card | {"annotated": names}))
        _, scan = scan_table(root)
        assert [p.kind for p in errors(scan.problems)] == ["dataset_json"] * wrong
        assert not wrong or "P2" in errors(scan.problems)[0].found
        assert not errors(scan_table(root, need_labels=False)[1].problems)


@pytest.mark.parametrize("ending", ["_seg", "-seg", "_gt"])
def test_names_that_evaluation_would_not_find_are_errors(ending, tmp_path):
    root = make_root(tmp_path / "data", ("a", f"b{ending}"))
    dataset = get_dataset({"dataset": "nnunet", "root": str(root)})
    (problem,) = errors(verify(dataset, root).problems)
    assert problem.case_id == f"b{ending}" and ending in problem.expected
    cases, problems = find_cases(dataset, [root])  # prediction accepts them
    assert [c.case_id for c in cases] == ["a", f"b{ending}"] and not problems


@pytest.mark.parametrize("name", ["old/b.nii.gz", "old/b_gt.nii", "b_seg.nii.gz"])
def test_a_second_label_map_that_evaluation_would_find_is_an_error(name, tmp_path):
    root = make_root(tmp_path / "data")
    dataset = get_dataset({"dataset": "nnunet", "root": str(root)})
    generic.find(root / "labelsTr")
    write_image(root / "labelsTr" / "old" / "other.nii.gz", np.zeros(SHAPE, np.uint8))
    assert not errors(verify(dataset, root).problems)
    write_image(root / "labelsTr" / name, np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match="two label maps for case b"):
        generic.find(root / "labelsTr")
    (problem,) = errors(verify(dataset, root).problems)
    assert problem.case_id == "b" and str(problem.path) == str(root / "labelsTr" / name)


def test_names_in_annotated_are_found_in_both_forms_of_unicode(tmp_path):
    """macOS writes an accent as a character of its own."""
    (tmp_path / "dataset.json").write_text(json.dumps({"annotated": {"Mu\u0308ller": ["organ"]}}))
    assert generic.read_annotated(tmp_path) == {"M\u00fcller": ("organ",)}


def test_an_ignore_value_above_255(tmp_path):
    """Written with 16 bits, and scored."""
    root = make_root(tmp_path / "data", ignore=9)
    for path in (root / "labelsTr").iterdir():
        label = np.asarray(nib.load(path).dataobj).astype(np.uint16)
        write_image(tmp_path / "pred" / path.name, np.where(label == 9, 0, label).astype(np.uint8))
        label[label == 9] = 1000
        write_image(path, label)
    card = json.loads((root / "dataset.json").read_text())
    card["labels"]["ignore"] = 1000
    (root / "dataset.json").write_text(json.dumps(card))
    arguments = [f"--pred={tmp_path / 'pred'}", f"--ref={root / 'labelsTr'}", f"--out={tmp_path / 'out'}", "--jobs=1"]
    assert evaluate.main(["--rules=generic", "--metrics=dice", *arguments]) == 0
    assert all(float(r["value"]) == 1 for r in rows(tmp_path / "out" / "cases.csv"))


def test_softmax_does_not_know_parts_of_nested_regions(tmp_path):
    root = make_root(tmp_path / "data", annotated={"b": ["whole"]})
    card = json.loads((root / "dataset.json").read_text())
    card["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    (root / "dataset.json").write_text(json.dumps(card))
    words = [f"--config.data.root={root}", "--config.output=softmax", "--config.loss.name=dice_ce"]
    with pytest.raises(UserError, match=r"softmax.*nested"):
        resolve_config(load_config("configs/own_dxnet.py", words))
    resolve_config(load_config("configs/own_dxnet.py", words[:1]))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["image", IMAGE], "lacks the columns label"),
        (["image,label,age", f"{IMAGE},{LABEL},7"], "unknown columns age"),
        (["image,label", f"absent.nii.gz,{LABEL}"], "line 2 names absent.nii.gz, which does not exist"),
        (["image,label", f",{LABEL}"], "line 2 lacks image"),
        (["image,label", f"{IMAGE},{LABEL}", "", f",{LABEL}"], "line 4 lacks image"),
        (["image,label", f"{IMAGE},{LABEL}", f"{IMAGE},{LABEL}"], "line 3 is a second row of case p2"),
        (["image,label,fold", f"{IMAGE},{LABEL},x"], "line 2 has the fold 'x'"),
        (["image,label,fold", f"{IMAGE},{LABEL},0", f"{OTHER},"], "no fold for 1 patients (p3)"),
        (["image,label,fold", f"{IMAGE},{LABEL},0", f"{OTHER},2"], "has the folds [0, 2]"),
        (["image,label,patient,fold", f"{IMAGE},{LABEL},P,0", f"{OTHER},P,1"], "another row of patient P"),
        (["image,label,annotated", f"{IMAGE},{LABEL},heart"], "rows with unknown regions in the column annotated"),
        (["case,image,label", f"site/p,{IMAGE},{LABEL}"], "has the case id 'site/p'"),
        (["case,image,label", f"../p,{IMAGE},{LABEL}"], "has the case id '../p'"),
        (["case,image,label", f"p_seg,{IMAGE},{LABEL}"], "has the case id 'p_seg'"),
        # rows and values that would be lost without a message
        (["image,label,patient", f'{IMAGE},{LABEL},"P', f"{OTHER},Q"], "line 2 on"),
        (["image,label,patient", f"{IMAGE},{LABEL},P", f'{OTHER},"Q', f'{IMAGE},{LABEL},Q"'], "line 3 on"),
        (["image,label,patient", f'{IMAGE},{LABEL},"P"Q'], "line 2 on"),
        (["image,label,patient", f'{IMAGE},{LABEL},"P', *[f"{OTHER},Q"] * 3000], "line 2 on"),
        (["image,label,patient", f"{OTHER},Q", f"{IMAGE},{LABEL},{'P' * 200_000}"], "line 3 on"),
        (["image,label,annotated", f"{IMAGE},{LABEL},organ,lesion"], "line 2 has 'lesion' in a column without"),
        (["image,label,", f"{IMAGE},{LABEL},P"], "line 2 has 'P' in a column without"),
        (["image,label,patient,patient", f"{IMAGE},{LABEL},P,Q"], "several columns patient"),
    ],
)
def test_tables_that_cannot_be_used(lines, words, files):
    root = make_table(files / "table", lines)
    with pytest.raises(UserError) as error:
        _, scan = scan_table(root)
        usable_cases(scan, root)
    assert words in str(error.value) and "cases.csv" in str(error.value)


def test_a_table_with_two_channels_names_what_is_missing(files):
    """Also a column ``image``, which would not be read."""
    channels = ("T1", "T2")
    root = make_table(files / "a", ["image_0,image_1,label", f"{IMAGE},,{LABEL}"], channels=channels)
    with pytest.raises(UserError, match="line 2 lacks image_1;"):
        usable_cases(scan_table(root)[1], root)
    root = make_table(
        files / "b", ["image,image_0,image_1,label", f"{IMAGE},{IMAGE},{IMAGE},{LABEL}"], channels=channels
    )
    with pytest.raises(UserError, match=r"unknown columns image;.*image_0, image_1"):
        scan_table(root)


def test_separators_and_line_breaks_of_a_table(files):
    """Separators at the ends of lines, quoted values, and characters at which only Python divides lines."""
    lines = ["image,label,patient,,", "", f'{IMAGE},{LABEL},"A, ""B""",,', f"{OTHER},C\u2028D\x0bE,,"]
    for line_break in ("\n", "\r\n", "\r"):
        root = make_table(files / "table", lines)
        (root / "cases.csv").write_bytes(line_break.join(lines).encode())
        _, scan = scan_table(root)
        assert [c.patient for c in scan.cases] == ['A, "B"', "C\u2028D\x0bE"] and not scan.problems


def test_a_table_that_is_not_there(files):
    root = make_table(files / "table", FOUR)
    (root / "cases.csv").unlink()
    with pytest.raises(UserError, match=r"cases\.csv does not exist"):
        scan_table(root)


def test_a_network_of_a_table_predicts_folders_too(files):
    """The data set that a workdir describes reads nnU-Net's layout where there is no table."""
    dataset, _ = scan_table(make_table(files / "table", FOUR))
    again = trained_dataset({"dataset": "table"}, json.loads(json.dumps(describe(dataset))))
    assert len(again.scan(files / "table", False).cases) == 4
    assert [c.case_id for c in again.scan(files / "raw" / "imagesTr", False).cases] == ["p1_jan", "p1_may", "p2", "p3"]


def test_references_of_a_table_are_written_into_their_own_folder(files):
    """Files that a user has put there are neither deleted nor mixed with the references."""
    dataset, scan = scan_table(make_table(files / "table", FOUR))
    folder = files / "run" / REFERENCES_FOLDER
    _write_references(folder, dataset, scan.cases)
    _write_references(folder, dataset, scan.cases[1:])  # one reference is no longer needed
    assert sorted(p.name for p in folder.iterdir()) == ["dataset.json", "p2.nii.gz", "p3.nii.gz", "two.nii.gz"]
    own = (folder / "p3.nii.gz").read_bytes()
    (folder / "manual.nii.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"manual\.nii\.gz"):
        _write_references(folder, dataset, scan.cases)
    for name in ("manual.nii.gz", "p3.nii.gz"):  # without the list of written files, all files are the user's
        (folder / "dataset.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            _write_references(folder, dataset, scan.cases)
    assert (folder / "manual.nii.gz").read_bytes() == b"mine" and (folder / "p3.nii.gz").read_bytes() == own
