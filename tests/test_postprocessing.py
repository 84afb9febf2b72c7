"""Post-processing chosen by cross-validation: what helps is kept, what does not is not; and how it is applied."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

import xdim_jax
from tests.test_predictor import make_workdir
from xdim_jax import predict
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_json
from xdim_jax.data.case import scan_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.reading import read_label
from xdim_jax.data.regions import BRATS, Regions, drop_small_components, keep_largest
from xdim_jax.inference.settings import POSTPROCESSING_FILE, PostProcessing
from xdim_jax.inference.validation_cases import predict_validation
from xdim_jax.nets import networks
from xdim_jax.nets.functional import split_model
from xdim_jax.planning import postprocessing
from xdim_jax.runs import checkpoint
from xdim_jax.runs.workdir import CONFIG_FILE, SPLIT_FILE

pytestmark = pytest.mark.usefixtures("one_convolution")
TWO = Regions({"organ": (1,), "lesion": (2,)})
SHAPE = (10, 24, 24)
CHOSEN = {"threshold": {}, "largest": ["organ"], "min_volume": {"lesion": 0.012}}


# -- small components -------------------------------------------------------------------------------------------------


def test_components_below_the_size_become_what_encloses_them():
    label = np.zeros((4, 12, 12), np.uint8)
    label[:, 1:8, 1:8] = 2  # edema
    label[1:3, 2:4, 2:4] = 3  # ET: 8 voxels
    label[1, 6, 6] = 3  # one voxel of ET inside edema
    label[0, 11, 11] = 3  # and one outside of everything
    found = drop_small_components(label, BRATS, {"ET": 2})
    assert found[1, 6, 6] == 1, "ET is enclosed by TC, whose own label is NCR"
    assert found[0, 11, 11] == 1 and (found == 3).sum() == 8
    found = drop_small_components(label, BRATS, {"WT": 2})
    assert found[0, 11, 11] == 0 and found[1, 6, 6] == 3
    assert drop_small_components(label, BRATS, {}) is label and drop_small_components(label, BRATS, {"ET": 1}) is label
    assert drop_small_components(np.zeros_like(label), BRATS, {"ET": 9}).sum() == 0


def test_diagonal_neighbours_are_one_component():
    label = np.zeros((3, 5, 5), np.uint8)
    label[0, 0, 0], label[1, 1, 1] = 2, 2
    assert drop_small_components(label, TWO, {"lesion": 2}) is label


# -- what is chosen ---------------------------------------------------------------------------------------------------


def save(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label.transpose(2, 1, 0), np.diag([-1.0, -1.0, 2.0, 1.0])), path)


@pytest.fixture
def data(tmp_path):
    """Six cases with an organ of one piece and two lesions of 12 voxels; two folds."""
    root = tmp_path / "data"
    root.mkdir()
    card = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "organ": 1, "lesion": 2}}
    (root / "dataset.json").write_text(json.dumps(card))
    for number in range(6):
        label = np.zeros(SHAPE, np.uint8)
        label[2:8, 4:14, 4:14] = 1
        label[1:4, 18:20, 2:4], label[1:4, 18:20, 18:20] = 2, 2
        save(root / "labelsTr" / f"c{number}.nii.gz", label)
        image = (100 * label + np.random.default_rng(number).normal(0, 5, SHAPE)).astype(np.float32)
        save(root / "imagesTr" / f"c{number}_0000.nii.gz", image)
    dataset = get_dataset({"dataset": "nnunet", "root": str(root)})
    cases = scan_cases(dataset, root, need_labels=True).cases
    return dataset, [(number % 2, case) for number, case in enumerate(cases)]


def predictions(data, folder, change):
    for number, (_, case) in enumerate(data[1]):
        label = read_label(case).copy()
        change(number, label)
        save(folder / f"{case.case_id}.nii.gz", label)
    return folder


def choose(data, folder):
    trials, largest, smallest = postprocessing._choose_components(data[1], data[0], folder)
    return {(t.region, t.setting, t.value): t for t in trials}, largest, smallest


def test_nothing_is_chosen_for_perfect_predictions(data, tmp_path):
    _, largest, smallest = choose(data, predictions(data, tmp_path / "pred", lambda number, label: None))
    assert not largest and not smallest


def test_stray_pieces_are_removed_where_that_helps(data, tmp_path):
    """A second piece of the organ; and single voxels of lesion: keeping the largest lesion would lose the other one."""

    def add(number, label):
        label[0:3, 20:23, 10:14] = 1  # 36 voxels
        label[9, 1, 1 + number] = 2

    trials, largest, smallest = choose(data, predictions(data, tmp_path / "pred", add))
    assert largest == ["organ"] and list(smallest) == ["lesion"]
    # two lesions of 12 voxels of 2 mm3 are 0.024 ml each; a quarter of that is enough
    assert smallest["lesion"] == pytest.approx(0.024 * 0.25)
    organ = trials["organ", "largest", 1.0]
    before = 2 * 600 / (600 + 636)
    assert organ.gain == pytest.approx((1 - before) / 2), "the mean over two regions, of which one gains"
    assert trials["lesion", "largest", 1.0].gain < -0.1


def test_a_setting_that_harms_a_fold_is_not_chosen(data, tmp_path):
    """In the first fold a stray piece; in the second one the smaller piece is a part of the organ."""

    def add(number, label):
        if number % 2 == 0:
            label[0:5, 18:23, 6:18] = 1  # 300 voxels: without them, the Dice rises from 0.8 to 1
        else:
            label[3] = (
                0  # the organ falls into pieces of 100 and 400 voxels: with one of them, it falls from 0.91 to 0.8
            )

    trials, largest, _ = choose(data, predictions(data, tmp_path / "pred", add))
    organ = trials["organ", "largest", 1.0]
    assert organ.gain > 0.01 and organ.worst < -0.01 and "organ" not in largest


def test_the_best_setting_that_harms_no_fold_is_chosen(data, tmp_path):
    """Keeping the largest piece gains most, but harms the second fold; removing small pieces harms none."""

    def add(number, label):
        if number % 2 == 0:
            label[0:5, 18:23, 6:18] = 1  # 300 voxels
        elif number == 1:
            label[4] = 0  # the organ falls into pieces of 200 and 300 voxels
        label[9, 14:20, 14:20] = 1  # 36 voxels; the smallest size that is tried is a quarter of the organ, 150

    trials, largest, smallest = choose(data, predictions(data, tmp_path / "pred", add))
    best = max((t for t in trials.values() if t.region == "organ"), key=lambda t: t.gain)
    assert best.setting == "largest" and not best.helps
    assert "organ" not in largest and smallest["organ"] == pytest.approx(150 * 0.002)


# -- thresholds -------------------------------------------------------------------------------------------------------


def test_the_dice_of_every_threshold(data, tmp_path):
    """Counted in intervals of the probability, and computed from the whole map of probabilities."""
    workdir = make_workdir(tmp_path / "run", channels=("T1",), seed=4)
    config = json.loads((workdir / CONFIG_FILE).read_text())
    config["output"] = "sigmoid"
    config["model"]["out_channels"] = 2
    config["data"]["patch"] = [32, 32, 32]
    write_json(workdir / CONFIG_FILE, config)
    shutil.rmtree(workdir / "best")
    _, params, stats = split_model(networks.build(networks.plain_dict(config["model"]), seed=4))
    checkpoints = checkpoint.open_checkpoints(workdir)
    checkpoint.save_best(checkpoints, 1, params, stats, 0.5)
    checkpoint.close(checkpoints)
    predictor = xdim_jax.Predictor(workdir, probabilities=True)
    case = data[1][0][1]
    found = postprocessing._dice_by_threshold(predictor, case, postprocessing._THRESHOLDS)
    probabilities = predictor.predict_case(case).probabilities
    truth = read_label(case)
    for r in (0, 1):
        reference = truth == r + 1
        for i, threshold in enumerate(postprocessing._THRESHOLDS):
            mask = probabilities[..., r] >= np.float32(threshold / 100)
            expected = 2 * (mask & reference).sum() / (mask.sum() + reference.sum())
            assert found[r, i] == pytest.approx(expected, abs=2e-3), (r, threshold)


NESTED, DISJOINT = {"whole": [1, 2], "core": 2}, {"whole": 1, "core": 2}


def columns(*parts):
    """Return an array with values in ranges of columns, given as (start, stop, value)."""
    found = np.zeros((2, 2, 100), np.float32)
    for start, stop, value in parts:
        found[..., start:stop] = value
    return found


# labels; reference; probabilities of whole and core; thresholds that help each region alone; those that are kept
INNER = ((0, 10, 0.9), (40, 80, 0.55))
THRESHOLDS = {
    # whole contains core, which remains where whole is no longer predicted
    "hidden": (NESTED, ((0, 40, 1), (0, 10, 2)), ((0, 40, 0.95), (40, 80, 0.6)), INNER, {"whole": 0.65}, ()),
    "both help": (
        NESTED, ((0, 40, 1), (0, 10, 2)), ((0, 40, 0.95), (40, 80, 0.6)), INNER,
        {"whole": 0.65, "core": 0.6}, ("whole", "core"),
    ),
    # core improves, but its false voxels are outside of whole
    "harms another": (
        NESTED, ((0, 40, 1), (0, 10, 2)), ((0, 40, 0.95),), ((0, 10, 0.3), (40, 50, 0.3)), {"core": 0.25}, ()
    ),
    # core is above its threshold, but below whole, to which the voxels would belong
    "not the highest": (
        DISJOINT, ((0, 40, 1), (40, 80, 2)), ((0, 40, 0.6), (40, 80, 0.4)), ((40, 80, 0.3),), {"core": 0.25}, ()
    ),
    "helps": (DISJOINT, ((0, 40, 1), (40, 80, 2)), ((0, 40, 0.6),), ((40, 80, 0.3),), {"core": 0.25}, ("core",)),
}  # fmt: skip


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_are_kept_only_if_they_help_in_label_maps(name, tmp_path, monkeypatch):
    labels, reference, whole, core, tried, kept = THRESHOLDS[name]
    root, output = tmp_path / "data", tmp_path / "predictions"
    for case in ("a", "b"):
        save(root / "labelsTr" / f"{case}.nii.gz", columns(*reference).astype(np.uint8))
        save(root / "imagesTr" / f"{case}_0000.nii.gz", columns((0, 40, 1)))
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1"}, "labels": {"background": 0} | labels}))
    dataset = get_dataset({"dataset": "nnunet", "root": str(root)})
    cases = list(enumerate(scan_cases(dataset, root, need_labels=True).cases))
    scores = np.stack([columns(*whole), columns(*core)], -1)

    def predict(workdir, output, settings):
        limits = dict.fromkeys(dataset.regions.names, 0.5) | (settings.threshold or {})
        for _, case in cases:
            save(output / f"{case.case_id}.nii.gz", dataset.regions.decode(scores, limits))

    monkeypatch.setattr(postprocessing, "predict_validation", predict)
    truth = dataset.regions.encode(columns(*reference))
    for r, region in enumerate(dataset.regions.names):  # alone, every one of these thresholds helps
        dice = [2 * (m & truth[..., r]).sum() / (m.sum() + truth[..., r].sum())
                for m in (scores[..., r] > 0.5, scores[..., r] > tried.get(region, 0.5))]  # fmt: skip
        assert (dice[1] > dice[0] + 0.1) == (region in tried)
    network = SimpleNamespace(output=SimpleNamespace(activation="sigmoid"), dataset=dataset)
    monkeypatch.setattr(postprocessing, "find_validation", lambda *_: ([(network, [c]) for _, c in cases], root))
    alone = [postprocessing.Trial(region, "threshold", value, 0.2, 0.2) for region, value in tried.items()]
    monkeypatch.setattr(postprocessing, "_choose_thresholds", lambda workdir: (tried, alone))
    chosen, trials = postprocessing._choose(tmp_path)
    found = chosen.threshold
    assert found == {region: tried[region] for region in kept}
    recorded = {trial.region: trial for trial in trials if trial.setting == "threshold"}
    assert recorded.keys() == set(tried) and all(recorded[region].helps for region in kept)
    assert not any(trial in trials for trial in alone), "the gain is that in the label maps"
    label = read_label(dataclasses.replace(cases[0][1], label=output / "a.nii.gz"))
    expected = dataset.regions.decode(scores, dict.fromkeys(dataset.regions.names, 0.5) | found)
    np.testing.assert_array_equal(label, expected)


# -- how it is applied ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, data):
    workdir = make_workdir(tmp_path / "run", channels=("T1",), seed=4)
    root = data[1][0][1].files[0].parents[1]
    config = json.loads((workdir / CONFIG_FILE).read_text())
    config["data"]["root"] = str(root)
    write_json(workdir / CONFIG_FILE, config)
    write_json(workdir / SPLIT_FILE, {"root": str(root), "train": ["c1"], "validation": ["c0", "c2"], "patients": {}})
    return workdir


def label_of(predictor, case):
    return predictor.predict_case(case).label


def test_prediction_uses_what_was_chosen_for_the_run(run, data):
    case = data[1][0][1]
    plain = xdim_jax.Predictor(run)
    before = label_of(plain, case)
    write_json(run / POSTPROCESSING_FILE, {"chosen": CHOSEN, "tried": []})
    chosen = xdim_jax.Predictor(run)
    assert chosen.resolved.largest == ("organ",) and chosen.resolved.min_volume == {"lesion": 0.012}
    assert chosen.digest != plain.digest
    explicit = xdim_jax.Predictor(run, largest="organ", min_volume={"lesion": 0.012})
    assert explicit.digest == chosen.digest
    off = xdim_jax.Predictor(run, largest="none", min_volume={})
    assert off.digest == plain.digest
    np.testing.assert_array_equal(label_of(off, case), before)
    after = label_of(chosen, case)
    expected = xdim_jax.Predictor(run, largest="none", min_volume={"": 0.0}).postprocess(before, 0.002)
    np.testing.assert_array_equal(expected, before)
    # 0.012 ml are six voxels of 2 mm3
    by_hand = drop_small_components(keep_largest(before, TWO, ["organ"]), TWO, {"lesion": 6})
    np.testing.assert_array_equal(after, by_hand)
    assert (after != before).any()


def test_flags_of_predict(run, data, tmp_path, capsys):
    image = data[1][0][1].files[0]
    base = [f"--workdir={run}", f"--input={image}", f"--output={tmp_path / 'out'}"]
    assert predict.main([*base, "--min_volume=lesion=0.012,organ=0.1"]) == 0
    record = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert record["settings"]["min_volume"] == {"lesion": 0.012, "organ": 0.1}
    for flag, words in (
        ("--min_volume=heart=1", "heart unknown"),
        ("--min_volume=organ=-1", "0 or more ml"),
        ("--min_volume=x", "expected a number of ml"),
        ("--largest=heart", "heart unknown"),
    ):
        with pytest.raises(UserError, match=words):
            predict.main([*base, flag])


@pytest.mark.parametrize(
    "text", ['{"chosen": {}}', "[]", '{"chosen": {"threshold": 1, "largest": [], "min_volume": {}}}']
)
def test_a_damaged_choice_is_an_error(text, run):
    (run / POSTPROCESSING_FILE).write_text(text)
    with pytest.raises(UserError, match=POSTPROCESSING_FILE):
        xdim_jax.Predictor(run)


def test_runs_with_different_choices_are_no_ensemble(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    write_json(other / POSTPROCESSING_FILE, {"chosen": CHOSEN, "tried": []})
    with pytest.raises(UserError, match=rf"{POSTPROCESSING_FILE}.*largest, min_volume"):
        xdim_jax.Predictor([run, other])
    both = xdim_jax.Predictor([run, other], largest="none", min_volume={})
    assert both.resolved.largest == () and not both.resolved.min_volume


def test_the_validation_predictions_are_those_of_predict(run, tmp_path, capsys):
    """Chosen, applied to the label maps without computing them again, and the same as if predicted anew."""
    chosen = postprocessing.choose_postprocessing(run)
    assert isinstance(chosen, PostProcessing) and (run / POSTPROCESSING_FILE).is_file()
    record = json.loads((run / POSTPROCESSING_FILE).read_text())
    write_json(run / POSTPROCESSING_FILE, record | {"chosen": CHOSEN})
    assert postprocessing.choose_postprocessing(run) == PostProcessing({}, ("organ",), {"lesion": 0.012})
    capsys.readouterr()
    postprocessing.apply_postprocessing(run)
    found = {p.name: p.read_bytes() for p in (run / "predictions").glob("*.nii.gz")}
    shutil.rmtree(run / "predictions")
    predict_validation(run, run / "predictions")
    assert {p.name: p.read_bytes() for p in (run / "predictions").glob("*.nii.gz")} == found and len(found) == 2
    postprocessing.apply_postprocessing(run)  # nothing left to do
    assert {p.name: p.read_bytes() for p in (run / "predictions").glob("*.nii.gz")} == found
