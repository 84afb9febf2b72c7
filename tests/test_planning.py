"""Planning a recipe: measurements with known geometry, rules with known data, memory and time of invented machines."""

import dataclasses
import json
import re
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.data import facts
from xdim_jax.data import fingerprint as fingerprint_module
from xdim_jax.data.case import scan_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.fingerprint import Fingerprint, measure, measure_cases
from xdim_jax.data.labels import Labels
from xdim_jax.data.prepare import Preparation, check_preparation, prepare, target_shape
from xdim_jax.data.reading import read_case
from xdim_jax.data.regions import Regions
from xdim_jax.data.splits import assign_folds
from xdim_jax.data.store import store_key
from xdim_jax.nets import networks
from xdim_jax.planning import machine, page, plan_data
from xdim_jax.planning.choices import check, choose, small_structures
from xdim_jax.planning.recipe import render
from xdim_jax.training.check import resolve_config
from xdim_jax.training.needs import Need


def write_case(root, case, image, label, spacing, channel=0):
    """Arrays are (D, H, W) in the reader's memory."""
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    for folder, name, array in (("imagesTr", f"{case}_{channel:04d}", image), ("labelsTr", case, label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), root / folder / f"{name}.nii.gz")


def write_card(root, channels=("T1",), structures=("organ", "lesion")):
    labels = {"background": 0} | {name: i for i, name in enumerate(structures, 1)}
    root.mkdir(parents=True, exist_ok=True)
    card = {"channel_names": {str(i): n for i, n in enumerate(channels)}, "labels": labels}
    (root / "dataset.json").write_text(json.dumps(card))


@pytest.fixture
def root(tmp_path):
    """Two cases: a box of 6 x 8 x 10 voxels (organ) with two separate voxels, and one lesion of 2 x 2 x 2."""
    root = tmp_path / "Dataset001_Own"
    write_card(root)
    for number, case in enumerate("ab"):
        image = np.zeros((16, 40, 40), np.int16)
        image[2:14, 4:36, 5:35] = 100
        label = np.zeros(image.shape, np.uint8)
        label[4:10, 10:18, 10:20] = 1
        label[12, 30, 30], label[2, 30, 30] = 1, 1
        label[5:7, 11:13, 11:13] = 2
        image[label == 1], image[label == 2] = 200 + 10 * number, 300
        write_case(root, case, image, label, (3.0, 1.0, 0.5))
    return root


def cases_of(root, name="nnunet"):
    dataset = get_dataset({"dataset": name, "root": str(root)})
    return dataset, scan_cases(dataset, root, need_labels=True).cases


# -- the fingerprint --------------------------------------------------------------------------------------------------


def test_measurements_of_boxes(root):
    _, cases = cases_of(root)
    found = measure(cases[0], read_case(cases[0]))
    assert found["size"] == [16, 40, 40] and found["spacing"] == [3.0, 1.0, 0.5]
    assert found["nonzero"] == [12, 32, 30]
    organ, lesion = found["structures"]["organ"], found["structures"]["lesion"]
    assert (organ["voxels"], organ["components"]) == (6 * 8 * 10 - 8 + 2, 3)
    assert organ["largest"] == pytest.approx(472 / 474, abs=1e-6)
    assert organ["extent"] == [11 * 3.0, 21 * 1.0, 21 * 0.5] and organ["slices"] == 8
    assert (lesion["voxels"], lesion["components"], lesion["slices"]) == (8, 1, 2)
    channel = found["channels"][0]
    assert channel["mean"] == pytest.approx((474 * 200 + 8 * 300) / 482)
    assert (channel["foreground"][0], channel["foreground"][-1], channel["image"][0]) == (200, 300, 0)


def test_cases_have_equal_weights(root):
    dataset, cases = cases_of(root)
    facts = {c.case_id: measure(c, read_case(c)) for c in cases}
    found = Fingerprint(facts, dataset.channels, ("organ", "lesion"))
    means = [(474 * v + 8 * 300) / 482 for v in (200, 210)]
    squares = [(474 * v**2 + 8 * 300**2) / 482 for v in (200, 210)]
    mean, sd = found.moments(0)
    assert mean == pytest.approx(np.mean(means)) and sd == pytest.approx(
        np.sqrt(np.mean(squares) - np.mean(means) ** 2)
    )
    assert found.percentile(0, 25) == 200 and found.percentile(0, 75) == 210
    assert found.volume("lesion") == pytest.approx([8 * 1.5 / 1000] * 2)
    assert found.share("lesion") == pytest.approx(8 / (16 * 40 * 40))
    np.testing.assert_array_equal(found.prepared_sizes((0, 2.0, 1.0), cropped=False), [[16, 20, 20]] * 2)
    np.testing.assert_array_equal(found.prepared_sizes((1.5, 0, 0), cropped=True), [[24, 32, 30]] * 2)


def test_the_deviation_of_equal_intensities_is_zero():
    """A difference of squares would be slightly negative for some of these numbers."""
    for value in np.linspace(-50, 300, 400).tolist():
        channel = facts_of()["channels"][0] | {"mean": value, "sd": 0.0}
        for count in (2, 3, 5, 7):
            cases = {f"c{i}": facts_of(channels=[channel]) for i in range(count)}
            assert Fingerprint(cases, ("CT",), ("organ",)).moments(0) == pytest.approx((value, 0), abs=1e-9)


def test_the_voxels_of_a_microscope(tmp_path):
    """Pixels of 10 nm are read, measured, planned and prepared like those of a millimetre."""
    write_card(tmp_path, ("T1",), ("cell",))
    label = np.zeros((1, 40, 48), np.uint8)
    label[0, 10:30, 8:30] = 1
    image = np.random.default_rng(0).normal(0, 5, label.shape).astype(np.float32) + 50 * label
    for case in "ab":
        write_case(tmp_path, case, image, label, (1e-5, 1e-5, 1e-5))
    dataset, cases = cases_of(tmp_path)
    found = Fingerprint(measure_cases(dataset, cases, tmp_path / "store"), dataset.channels, ("cell",))
    np.testing.assert_allclose(found.spacing, 1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.extent(), (1e-5, 20e-5, 22e-5), rtol=1e-5)
    choices = choose(found, dataset, platform="cpu", weights=True)
    volume = read_case(cases[0])
    prepared = prepare(cases[0], volume, Preparation.from_config(choices.prepare))
    assert prepared.raw.shape[:3] == (1, 40, 48) and choices.prepare["spacing"][1:] == (1e-5, 1e-5)
    with pytest.raises(UserError, match="mm along D,H,W"):
        Preparation(spacing=(1e-6, 1, 1))


def test_percentiles_are_those_of_all_columns(monkeypatch):
    """Every 64th voxel would lie in one column, because the width is 16."""
    monkeypatch.setattr(facts, "_SAMPLES", 400)
    columns = np.broadcast_to(np.arange(16.0), (100, 16, 16))
    found = facts.sample(columns.reshape(-1))
    assert found.size == 400 and columns.size // 400 % 16 == 0
    np.testing.assert_allclose(np.percentile(found, (10, 50, 90)), (1.5, 7.5, 13.5), atol=1.01)
    assert (facts.sample(columns.reshape(-1)) == found).all(), "the seed is fixed"
    assert facts.sample(found) is found, "few values are used as they are"


def test_unchanged_cases_are_measured_once(root, tmp_path, monkeypatch):
    dataset, cases = cases_of(root)
    first = measure_cases(dataset, cases, tmp_path / "store")
    calls = []
    monkeypatch.setattr(
        "xdim_jax.data.fingerprint.measure", lambda case, volume: calls.append(case.case_id) or measure(case, volume)
    )
    assert measure_cases(dataset, cases, tmp_path / "store") == first and not calls
    label = root / "labelsTr" / "b.nii.gz"
    changed = nib.load(label)
    array = np.asarray(changed.dataobj).copy()
    array[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(array, changed.affine), label)
    again = measure_cases(dataset, cases, tmp_path / "store")
    assert calls == ["b"] and again["a"] == first["a"]
    assert again["b"]["structures"]["organ"]["voxels"] == 475


def test_measurements_of_a_stopped_command_are_kept(root, tmp_path, monkeypatch):
    dataset, cases = cases_of(root)
    monkeypatch.setattr(fingerprint_module, "_SAVE_SECONDS", 0)
    measured, measure = [], fingerprint_module.measure

    def stopped(case, volume):
        if measured:
            raise KeyboardInterrupt
        measured.append(case.case_id)
        return measure(case, volume)

    monkeypatch.setattr(fingerprint_module, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_cases(dataset, cases, tmp_path / "store", jobs=1)
    last = lambda case, volume: measured.append(case.case_id) or measure(case, volume)  # noqa: E731
    monkeypatch.setattr(fingerprint_module, "measure", last)
    measure_cases(dataset, cases, tmp_path / "store", jobs=1)
    assert sorted(measured) == sorted(case.case_id for case in cases), "each once"


def test_a_case_that_cannot_be_read_is_named(root, tmp_path):
    (root / "imagesTr" / "b_0000.nii.gz").write_bytes(b"\x1f\x8bnothing")
    dataset, cases = cases_of(root)
    with pytest.raises(UserError, match="b_0000"):
        measure_cases(dataset, cases, tmp_path / "store")


# -- the rules --------------------------------------------------------------------------------------------------------


def facts_of(**changes):
    """One invented case of MR."""
    levels = np.linspace(0, 400, 201).tolist()
    values = {
        "patient": "p",
        "size": [64, 200, 200],
        "spacing": [1.0, 1.0, 1.0],
        "nonzero": [64, 200, 200],
        "ct": [],
        "channels": [{"image": levels, "foreground": levels, "mean": 100.0, "sd": 20.0}],
        "foreground": {"voxels": 9000, "slices": 20, "extent": [20.0, 40.0, 40.0]},
        "structures": {"organ": {"voxels": 64000, "slices": 40, "extent": [40.0] * 3, "components": 1, "largest": 1.0}},
    }
    return values | changes


def fingerprint(count=12, structures=("organ",), channels=("T1",), **changes):
    cases = {}
    if "size" in changes:
        changes = {"nonzero": changes["size"]} | changes
    for i in range(count):
        own = {k: v[i % len(v)] if isinstance(v, Each) else v for k, v in changes.items()}
        cases[f"c{i:02d}"] = facts_of(patient=f"p{i}") | own
    return Fingerprint(cases, channels, structures)


class Each(list):
    """Values for the cases in turn."""


def dataset_of(structures=("organ",), regions=None):
    labels = Labels("own", ("background", *structures), tuple(range(len(structures) + 1)))
    sets = regions or {name: (i,) for i, name in enumerate(structures, 1)}
    return dataclasses.replace(_TEMPLATE, labels=labels, regions=Regions(sets))


@pytest.fixture(autouse=True, scope="module")
def _template(tmp_path_factory):
    global _TEMPLATE
    root = tmp_path_factory.mktemp("template")
    write_card(root)
    _TEMPLATE = get_dataset({"dataset": "nnunet", "root": str(root)})


def chosen(found, structures=("organ",), regions=None, **options):
    return choose(found, dataset_of(structures, regions), **({"platform": "cpu", "weights": True} | options))


def ct_channel(low=-1000, high=800):
    levels = np.linspace(low, high, 201).tolist()
    return {
        "image": levels,
        "foreground": np.linspace(-60, 140, 201).tolist(),
        "mean": 40.0,
        "sd": 30.0,
    }


@pytest.mark.quick
@pytest.mark.parametrize(("slices", "network"), [(1, "omnianet"), (11, "omnianet"), (12, "dxnet"), (900, "dxnet")])
def test_few_slices_make_a_2d_network(slices, network):
    assert chosen(fingerprint(size=[slices, 200, 200])).network == network


def test_a_few_large_images_do_not_decide():
    """One of twelve pictures is a scan of 4096 pixels: the others keep their pixels, and it gets several patches."""
    sizes = Each([[1, 256, 256]] * 11 + [[1, 4096, 4096]])
    found = chosen(fingerprint(12, size=sizes, spacing=[1.0, 0.5, 0.5]))
    assert found.prepare["spacing"] == (0.0, 0.5, 0.5) and found.patch == (256, 256)
    volumes = chosen(fingerprint(6, size=Each([[30, 64, 64]] * 5 + [[2000, 1500, 1500]])))
    assert volumes.patch == (32, 64, 64)


def test_images_that_are_cropped_are_planned_by_the_size_after_cropping():
    found = chosen(fingerprint(size=[1, 2000, 2000], nonzero=[1, 500, 500], spacing=[1.0, 0.5, 0.5]))
    assert found.prepare["crop"] == "nonzero" and found.prepare["spacing"] == (0.0, 0.5, 0.5)


@pytest.mark.parametrize("spacing", [1.40625, 1.0547, 0.9765625])
def test_data_with_one_spacing_are_not_resampled(spacing):
    found = chosen(fingerprint(spacing=[spacing] * 3, size=[64, 256, 256]))
    settings = Preparation(spacing=found.prepare["spacing"])
    assert target_shape((64, 256, 256), (spacing,) * 3, settings) == (64, 256, 256)


def test_the_window_of_several_ct_channels_contains_the_structures_of_all():
    """Native and contrast phase: structures of 0 to 60 and of 150 to 400 HU."""
    channels = [
        ct_channel() | {"foreground": np.linspace(0, 60, 201).tolist(), "mean": 30.0, "sd": 10.0},
        ct_channel() | {"foreground": np.linspace(150, 400, 201).tolist(), "mean": 270.0, "sd": 40.0},
    ]
    cases = {f"c{i}": facts_of(patient=f"p{i}", ct=[0, 1], channels=channels) for i in range(6)}
    found = chosen(Fingerprint(cases, ("CT", "CT2"), ("organ",)))
    centre, width = found.prepare["window"]
    assert centre - width / 2 < 1 and centre + width / 2 > 395
    assert found.prepare["ct_statistics"][0] == 150.0
    assert found.prepare["ct_statistics"][1] == pytest.approx(np.sqrt((10**2 + 40**2) / 2 + 120**2), abs=0.1)


def test_isotropic_mr():
    found = chosen(fingerprint())
    assert found.prepare["spacing"] == (1.0, 1.0, 1.0) and found.patch == (64, 96, 96)
    assert found.strides == (2, 2, 2, 2, 1), "64 slices: four after the fourth stride"
    assert chosen(fingerprint(size=[155, 200, 200])).strides == (2,) * 5
    assert found.rule == "mean" and found.output == "softmax"
    assert found.prepare["normalise"] == "zscore" and found.prepare["window"] == () and found.folds == 5
    assert found.mirror is None and found.dice == "sample" and found.foreground == 0.5


def test_thick_slices_keep_their_depth():
    """Slices 5 to 8 mm apart, pixels of 0.7 mm: the distance is that of thin cases, and the depth is halved late."""
    found = chosen(fingerprint(spacing=Each([[5.0, 0.7, 0.7], [8.0, 0.7, 0.7]]), size=[32, 400, 400]))
    depth, height, width = found.prepare["spacing"]
    assert depth == 5.0 and height == width == 0.7
    # 7.1 times as coarse: 7.1, 3.6, then 1.8, which is less than 2
    assert found.strides == (1, 1, 2, 2, 2) and found.rule == "spacing" and found.ratio == pytest.approx(5 / 0.7)
    assert found.patch[0] == 56, "32 slices of 8 mm are 51 of 5 mm, and the patch is a multiple of 8"


@pytest.mark.parametrize("axis", [1, 2])
def test_thick_slices_may_lie_along_any_axis(axis, tmp_path):
    """A sagittal or coronal series is planned as an axial one with its axes exchanged."""

    def moved(values):
        values = list(values)
        values.insert(axis, values.pop(0))
        return values

    large = {"voxels": 9000, "slices": 20, "extent": [60.0, 180.0, 180.0]}
    found = chosen(fingerprint(spacing=[4.0, 0.5, 0.5], size=[20, 512, 512], foreground=large))
    turned = {**large, "extent": moved(large["extent"])}
    turned = chosen(fingerprint(spacing=moved([4.0, 0.5, 0.5]), size=moved([20, 512, 512]), foreground=turned))
    assert turned.axis == axis and found.axis == 0
    assert list(turned.prepare["spacing"]) == moved(found.prepare["spacing"]) and max(turned.prepare["spacing"]) == 4
    assert list(turned.patch) == moved(found.patch) and list(turned.factors) == moved(found.factors)
    assert (turned.strides, turned.rule, turned.ratio) == (found.strides, found.rule, found.ratio)
    model = _model(turned, tmp_path)
    assert model["depth"]["axis"] == axis
    networks.check_patch(model, turned.patch)


def test_a_single_thick_slice_along_width_is_planned(tmp_path):
    found = chosen(fingerprint(spacing=[1.4, 1.4, 8.0], size=[256, 256, 1]))
    assert found.network == "dxnet" and found.axis == 2 and found.strides == (1,) * 5
    assert found.prepare["spacing"] == (1.4, 1.4, 8.0) and found.patch[2] == 1
    networks.check_patch(_model(found, tmp_path), found.patch)


def test_small_volumes_get_a_patch_that_the_network_accepts(tmp_path):
    """32 voxels along every side, halved five times, would be a single voxel, whose variance is 0."""
    found = chosen(fingerprint(size=[32, 30, 30], spacing=[1.0] * 3))
    networks.check_patch(_model(found, tmp_path), found.patch)
    tiny = chosen(fingerprint(size=[13, 10, 10], spacing=[1.0] * 3))
    networks.check_patch(_model(tiny, tmp_path), tiny.patch)


def _model(choices, tmp_path):
    (tmp_path / "r.py").write_text(render(choices, {"dataset": "nnunet", "root": ""}, "A recipe."))
    model = load_config(str(tmp_path / "r.py"), []).model
    return model.to_dict() | {"in_channels": 1, "out_channels": 2}


def test_few_slices_are_not_halved_away():
    assert chosen(fingerprint(size=[20, 200, 200])).strides == (2, 2, 1, 1, 1)


def test_ct_is_clipped_and_standardised_by_the_foreground():
    found = chosen(_ct(12))
    centre, width = found.prepare["window"]
    # labelled voxels are uniform from -60 to 140: the percentiles 0.5 and 99.5 are -59 and 139
    assert (centre, width) == (40.0, pytest.approx(198, abs=1)) and found.prepare["ct_statistics"] == (40.0, 30.0)
    assert found.prepare["normalise"] == "zscore"


def _ct(count, **changes):
    cases = {f"c{i:02d}": facts_of(patient=f"p{i}", ct=[0], channels=[ct_channel()]) | changes for i in range(count)}
    return Fingerprint(cases, ("CT",), ("organ",))


def test_black_inside_of_an_image_is_no_removed_background():
    """Ultrasound: half of the pixels are 0, but the sector reaches all edges."""
    assert chosen(fingerprint(size=[1, 300, 420], nonzero=[1, 290, 410])).prepare["normalise"] == "zscore"


def test_a_removed_background_is_cropped():
    levels = np.linspace(0, 400, 201).tolist()
    channel = {"image": levels, "foreground": levels, "mean": 1.0, "sd": 1.0}
    cases = {f"c{i}": facts_of(patient=f"p{i}", channels=[channel], nonzero=[60, 120, 130]) for i in range(5)}
    found = chosen(Fingerprint(cases, ("T1",), ("organ",)))
    assert (found.prepare["normalise"], found.prepare["crop"]) == ("zscore_nonzero", "nonzero")
    assert found.largest == (64, 128, 160)


@pytest.mark.parametrize(
    ("voxels", "foreground", "dice"), [(64000, 0.5, "sample"), (2000, 0.67, "batch"), (200, 0.9, "batch")]
)
def test_rare_structures_are_sampled_more_often(voxels, foreground, dice):
    """200 of 2.56 million voxels are one in ten thousand."""
    structures = {"organ": {"voxels": voxels, "slices": 9, "extent": [9.0] * 3, "components": 1, "largest": 1.0}}
    found = chosen(_with(structures))
    assert (found.foreground, found.dice) == (foreground, dice)


def _with(structures):
    cases = {f"c{i}": facts_of(patient=f"p{i}", structures=structures) for i in range(6)}
    return Fingerprint(cases, ("T1",), tuple(structures))


def test_a_spacing_becomes_coarser_for_large_structures():
    """Structures over 300 mm, patches of 96 voxels of 1 mm: twice as coarse, unless a small structure forbids it."""
    foreground = {"voxels": 9000, "slices": 20, "extent": [200.0, 300.0, 300.0]}
    large = chosen(fingerprint(foreground=foreground, size=[300, 400, 400]))
    assert large.prepare["spacing"] == (2.0, 2.0, 2.0)
    # a sphere of 8 mm has 268 mm3: 1.6 times as coarse, it has five voxels along its diameter
    small = {"organ": {"voxels": 268, "slices": 8, "extent": [8.0] * 3, "components": 1, "largest": 1.0}}
    cases = {f"c{i}": facts_of(patient=f"p{i}", structures=small, foreground=foreground) for i in range(6)}
    found = chosen(Fingerprint(cases, ("T1",), ("organ",)))
    assert found.prepare["spacing"] == pytest.approx((1.6, 1.6, 1.6), abs=0.02)


def test_pictures_are_not_mirrored_and_seen_whole():
    found = chosen(fingerprint(size=[1, 300, 420], spacing=[1.0, 0.3, 0.3]))
    assert found.sampling == "slices" and found.patch == (320, 448) and found.mirror == () and found.foreground == 0
    wide = chosen(fingerprint(size=[1, 600, 1024], spacing=[1.0, 0.3, 0.3]))
    assert wide.prepare["spacing"] == (0.0, 0.6, 0.6) and wide.patch == (320, 512)


def test_nested_regions_have_channels_of_their_own():
    structures = ("core", "edema")
    found = chosen(
        _with({n: facts_of()["structures"]["organ"] for n in structures}), structures, {"whole": (1, 2), "core": (1,)}
    )
    assert found.output == "sigmoid"


@pytest.mark.parametrize(("count", "official", "folds"), [(3, 0, 3), (12, 0, 5), (12, 4, 4), (12, 1, 5)])
def test_folds(count, official, folds):
    found = chosen(fingerprint(count), official=official)
    assert found.folds == folds and found.official == (official > 1)


@pytest.mark.parametrize("annotated", [2, 3, 5, 8, 12])
def test_every_fold_has_an_annotated_patient(annotated):
    """Of twelve patients; the others are declared as not annotated, and are no missing structures."""
    found = fingerprint(12)
    halves = assign_folds(found.patients, 2, seed=0)
    order = sorted(found.cases, key=lambda case: halves[found.cases[case]["patient"]])
    order = [case for pair in zip(order, reversed(order), strict=True) for case in pair][
        :12
    ]  # from both halves in turn
    none = dict.fromkeys(order[annotated:], ())
    for case in none:
        found.cases[case] |= {"foreground": {"voxels": 0}, "structures": {}}
    dataset = dataclasses.replace(dataset_of(), partly_annotated=none)
    choices = choose(found, dataset, platform="cpu", weights=True)
    numbers = assign_folds(found.patients, choices.folds, seed=0)
    assert {numbers[found.cases[c]["patient"]] for c in order[:annotated]} == set(range(choices.folds))
    assert f"{annotated} annotated patients" in choices.reasons["folds"]
    assert not any("labelled voxel" in note for note in choices.notes)


def test_annotated_patients_that_cannot_be_divided():
    found = fingerprint(12)
    numbers = assign_folds(found.patients, 2, seed=0)
    one, other = sorted(p for p, n in numbers.items() if n == 0)[:2]
    every = {c: () for c, facts in found.cases.items() if facts["patient"] not in (one, other)}
    with pytest.raises(UserError, match="only 2 of 12 patients are annotated"):
        choose(found, dataclasses.replace(dataset_of(), partly_annotated=every), platform="cpu", weights=True)
    first = {c: () for c, facts in found.cases.items() if facts["patient"] != one}
    with pytest.raises(UserError, match=r"at least two.*another patient"):
        choose(found, dataclasses.replace(dataset_of(), partly_annotated=first), platform="cpu", weights=True)


def test_images_with_a_wrong_third_voxel_size_stay_2d():
    assert chosen(fingerprint(size=[1, 1024, 512], spacing=[0.001, 0.00195, 0.0117])).network == "omnianet"


def test_large_images_have_at_most_as_many_pixels_as_the_patch():
    """1024 pixels of 0.1232 mm: twice this spacing is 0.2464, which must not be rounded down."""
    found = fingerprint(size=[1, 1024, 1024], spacing=[1.0, 0.1232, 0.1232])
    choices = chosen(found)
    assert choices.patch == (512, 512) and choices.sampling == "slices" and choices.foreground == 0
    assert (found.prepared_sizes(choices.prepare["spacing"], cropped=False)[:, 1:] <= 512).all()
    assert "whole image" in choices.reasons["foreground"]


def test_small_structures_of_large_images_are_mentioned():
    """A disc of 80 pixels has a diameter of 10 pixels of 1 mm, and 1.7 at a spacing of 5.86 mm."""
    part = facts_of()["structures"]["organ"] | {"voxels": 80, "slices": 1}
    found = fingerprint(size=[1, 3000, 3000])
    for values in found.cases.values():
        values["structures"] = {"organ": part}
    assert not small_structures(found, (1.0, 2.0))
    (note,) = small_structures(found, chosen(found).prepare["spacing"][1:])
    assert "organ: 1.7" in note


@pytest.mark.quick
def test_the_page_of_voxel_sizes_that_differ_by_rounding():
    more, less = np.nextafter(0.7, 1), np.nextafter(0.7, 0)
    assert page.draw_grids(fingerprint(spacing=Each([[1.0, 0.7, 0.7], [1.0, more, 0.7], [1.0, 0.7, less]]))).png


def test_without_weights_the_reason_names_the_command():
    found = chosen(fingerprint(), weights=False)
    assert not found.pretrained and "xdim_jax[weights]" in found.reasons["pretrained"]


def test_every_choice_is_a_function_of_the_fingerprint():
    assert chosen(fingerprint()) == chosen(fingerprint())


# -- data that cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: fingerprint(1), "at least two"),
        (lambda: fingerprint(0), "at least two"),
        (
            lambda: fingerprint(foreground={"voxels": 0, "slices": 0, "extent": [0.0] * 3}, structures={}),
            "labelled voxel",
        ),
        (lambda: _mixed_ct(), "modalities are mixed"),
    ],
)
def test_data_without_a_recipe(found, words):
    with pytest.raises(UserError) as error:
        check(found(), dataset_of())
    assert words in str(error.value)


def _mixed_ct():
    cases = dict(_ct(4).cases)
    cases["c00"] = facts_of(patient="p0", ct=[0], channels=[ct_channel(0, 255)])
    return Fingerprint(cases, ("CT",), ("organ",))


def _mixed_mr():
    cases = dict(fingerprint(4).cases)
    cases["c00"] = facts_of(patient="p0", channels=[ct_channel()])
    return Fingerprint(cases, ("T1",), ("organ",))


def test_all_problems_are_listed_at_once():
    found = Fingerprint({"a": facts_of(foreground={"voxels": 0}, structures={})}, ("T1",), ("organ",))
    with pytest.raises(UserError, match="at least") as error:
        check(found, dataset_of())
    assert "labelled voxel" in str(error.value)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: fingerprint(structures=("organ", "vessel")), "vessel occurs in no case"),
        (lambda: _in_one_case(), "occurs in one patient only (p2)"),
        (lambda: fingerprint(foreground=Each([facts_of()["foreground"], {"voxels": 0}])), "no labelled voxel"),
        (lambda: fingerprint(spacing=Each([[6.0, 1.0, 1.0], [1.0, 6.0, 1.0]])), "different axes"),
        (lambda: _unnamed_ct(), "seems to be CT"),
        (lambda: _mixed_mr(), "modalities are mixed"),
    ],
)
def test_doubtful_data_are_mentioned(found, words):
    assert any(words in note for note in check(found(), dataset_of()))


def _in_one_case():
    part = facts_of()["structures"]["organ"]
    cases = {f"c{i}": facts_of(patient=f"p{i}") for i in range(4)}
    cases["c2"]["structures"] = {"organ": part, "lesion": part}
    return Fingerprint(cases, ("T1",), ("organ", "lesion"))


def _unnamed_ct():
    cases = {f"c{i}": facts_of(patient=f"p{i}", channels=[ct_channel()]) for i in range(4)}
    return Fingerprint(cases, ("T1",), ("organ",))


# -- memory and time --------------------------------------------------------------------------------------------------


@pytest.fixture
def linear_memory(monkeypatch):
    """A step needs 4 KiB for every voxel of a batch."""
    monkeypatch.setattr(machine.needs, "make_settings", lambda config: [config])
    monkeypatch.setattr(
        machine.needs, "measure", lambda config, dataset, c: Need(4096 * np.prod(c.patch) * c.batch, 0, 0, 0)
    )
    return lambda choices: (choices, None)


def test_the_batch_then_the_patch_is_reduced(linear_memory):
    large = chosen(fingerprint(), platform="gpu")
    assert large.patch == (64, 128, 128) and large.batch == 2
    whole = 4096 * 64 * 128 * 128 * 2
    assert machine.fit_memory(large, whole, linear_memory, lambda line: None).patch == large.patch
    lines = []
    half = machine.fit_memory(large, whole // 2, linear_memory, lines.append)
    assert sorted(half.patch) == [64, 64, 96] and half.batch == 2
    assert len(lines) == 4 and "too much" in half.reasons["batch"]
    small = machine.fit_memory(large, 4096 * 64**3, linear_memory, lambda line: None)
    assert small.patch == (64, 64, 64) and small.batch == 1
    with pytest.raises(UserError, match=r"--memory=.*is not enough.*32x32x32, batch 1"):
        machine.fit_memory(large, 4096 * 32 * 32 * 32 - 1, linear_memory, lambda line: None)


def test_a_smaller_picture_is_a_coarser_picture(linear_memory):
    picture = chosen(fingerprint(size=[1, 512, 512], spacing=[1.0, 0.5, 0.5]))
    assert picture.patch == (512, 512) and picture.batch == 8
    found = machine.fit_memory(picture, 4096 * 256 * 256 * 2, linear_memory, lambda line: None)
    assert found.batch == 2 and found.patch == (256, 256)
    assert found.prepare["spacing"][1:] == pytest.approx((1.0, 1.0), rel=0.02), "never below, so that pictures fit"
    assert min(found.prepare["spacing"][1:]) >= 1.0
    sizes = fingerprint(size=[1, 512, 512], spacing=[1.0, 0.5, 0.5]).prepared_sizes(
        found.prepare["spacing"], cropped=False
    )
    assert (sizes[:, 1:] <= found.patch).all(), "with sampling by slices, every picture must fit"


def test_a_picture_that_does_not_fit_is_an_error_of_the_memory(linear_memory):
    """With one sample, batch norm needs two pixels at the coarsest level: not 32x32."""
    picture = chosen(fingerprint(size=[1, 512, 512], spacing=[1.0, 0.5, 0.5]))
    with pytest.raises(UserError, match=r"--memory=.*is not enough.*64x64, batch 1"):
        machine.fit_memory(picture, 4096 * 32 * 32, linear_memory, lambda line: None)
    small = chosen(fingerprint(size=[1, 32, 32]))
    with pytest.raises(UserError, match=r"--memory=.*is not enough.*32x32, batch 2"):
        machine.fit_memory(small, 4096 * 32 * 32, linear_memory, lambda line: None)


def slower(found, choices, hours, factor):
    """Plan for a machine that needs so many seconds for a voxel of a batch."""
    return machine.fit_time(choices, found, hours, lambda c: factor * np.prod(c.patch) * c.batch, lambda line: None)


def test_more_time_is_more_steps():
    found, choices = fingerprint(), chosen(fingerprint())
    quick = machine.fit_time(choices, found, 0.25, lambda c: 0.1, lambda line: None)
    slow = machine.fit_time(choices, found, 4.0, lambda c: 0.1, lambda line: None)
    steps = [c.epochs * c.epoch_steps for c in (quick, slow)]
    assert steps[0] < steps[1] <= 2000 + 100 * 12
    assert 0.5 * 900 / 5 / 0.1 < steps[0] < 900 / 5 / 0.1, "the rest is for validation and compiling"
    assert quick.validate_every >= 1 and quick.patch == choices.patch


def test_a_slow_machine_gets_smaller_patches():
    found, choices = fingerprint(), chosen(fingerprint())
    voxels = np.prod(choices.patch)
    slow = slower(found, choices, 2.0, 6.0 / voxels)
    reason = slow.reasons["patch"]
    assert slow.patch[1:] == (64, 64) and slow.batch == 1 and "minimum 400" in reason
    assert reason.count("reduced from") == 1 and f"from {'x'.join(map(str, choices.patch))}:" in reason


def test_a_slow_machine_gets_a_smaller_batch_before_a_smaller_patch():
    found, choices = fingerprint(), chosen(fingerprint())
    assert choices.batch == 2
    slow = machine.fit_time(choices, found, 2.0, lambda c: 1.6 * c.batch, lambda line: None)
    assert slow.batch == 1 and slow.patch == choices.patch and slow.prepare == choices.prepare
    assert "batch of 2" in slow.reasons["batch"] and "reduced" not in slow.reasons["patch"]
    on_four = chosen(fingerprint(), devices=4)
    assert machine.fit_time(on_four, found, 2.0, lambda c: 1.6 * c.batch, lambda line: None).batch == 4


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_smaller_patch_of_thick_slices_has_larger_pixels(axis):
    """The slice spacing of 5 mm stays; patches of 64 instead of 96 pixels of 1 mm become 64 pixels of 1.5 mm."""
    size, spacing = [256] * 3, [1.0] * 3
    size[axis], spacing[axis] = 30, 5.0
    found = fingerprint(size=size, spacing=spacing)
    choices = chosen(found)
    slow = slower(found, choices, 2.0, 3e-5)
    plane = [a for a in range(3) if a != axis]
    assert choices.prepare["spacing"][axis] == slow.prepare["spacing"][axis] == 5.0
    assert {choices.patch[a] for a in plane} == {96} and {slow.patch[a] for a in plane} == {64}
    assert {choices.prepare["spacing"][a] for a in plane} == {1.0} and {slow.prepare["spacing"][a] for a in plane} == {
        1.5
    }
    assert slow.ratio == pytest.approx(5 / 1.5) and all(
        p % f == 0 for p, f in zip(slow.patch, slow.factors, strict=True)
    )


def test_a_smaller_patch_of_a_volume_keeps_its_size_in_mm():
    """96 voxels of 1 mm become 64 of 1.5 mm; five voxels of 1.2 mm along a sphere of 6 mm are the limit."""
    found = fingerprint(size=[160] * 3, foreground={"voxels": 9000, "slices": 20, "extent": [60.0, 60.0, 60.0]})
    choices = chosen(found)
    assert choices.patch == (96, 96, 96) and choices.prepare["spacing"] == (1.0, 1.0, 1.0)
    slow = slower(found, choices, 2.0, 1e-5)
    assert slow.patch == (64, 64, 64) and slow.prepare["spacing"] == (1.5, 1.5, 1.5)
    assert "increased to 1.5 mm" in slow.reasons["spacing"]
    small = {"organ": {"voxels": 113, "slices": 6, "extent": [6.0] * 3, "components": 1, "largest": 1.0}}
    found = fingerprint(
        size=[160] * 3, structures=("organ",), foreground={"voxels": 113, "slices": 6, "extent": [6.0] * 3}
    )
    cases = {name: facts | {"structures": small} for name, facts in found.cases.items()}
    found = Fingerprint(cases, ("T1",), ("organ",))
    slow = slower(found, chosen(found), 2.0, 1e-5)
    assert slow.patch == (64, 64, 64) and slow.prepare["spacing"] == pytest.approx((1.2, 1.2, 1.2), abs=0.01)


def test_coarser_voxels_do_not_leave_a_patch_that_is_larger_than_the_image():
    """50 slices of 1 mm become 25 of 2 mm, which a patch of 28 covers."""
    thin = fingerprint(size=[50, 300, 300], spacing=[1.0, 1.0, 1.0])
    large = chosen(thin, platform="gpu")
    assert large.patch == (56, 128, 128)
    slow = slower(thin, large, 2.0, 1e-5)
    assert slow.prepare["spacing"] == (2.0, 2.0, 2.0) and slow.patch == (28, 64, 64)


def test_axes_that_are_coarse_already_keep_their_spacing():
    """A sagittal series: 64 voxels of 1.5 mm along D and H, and slices of 2.9 mm along W, which one patch covers."""
    found = fingerprint(size=[256, 256, 20], spacing=[1.0, 1.0, 2.9])
    choices = chosen(found)
    assert choices.patch[:2] == (96, 96) and choices.prepare["spacing"] == (1.0, 1.0, 2.9)
    slow = slower(found, choices, 2.0, 3e-5)
    assert slow.patch[:2] == (64, 64) and slow.prepare["spacing"] == (1.5, 1.5, 2.9)
    wide = {"voxels": 9000, "slices": 20, "extent": [40.0, 144.0, 40.0]}
    found = fingerprint(size=[256, 256, 20], spacing=[1.0, 1.0, 2.9], foreground=wide)
    assert chosen(found).prepare["spacing"] == (1.5, 1.5, 2.9), "144 mm in 96 voxels"
    long = {"voxels": 9000, "slices": 20, "extent": [40.0, 80.0, 200.0]}
    found = fingerprint(size=[256, 256, 90], spacing=[1.0, 1.0, 2.9], foreground=long)
    assert chosen(found).prepare["spacing"] == (1.0, 1.0, 2.9), "200 mm in 69 voxels"


def test_a_finer_axis_does_not_make_the_others_coarser():
    """Slices of 0.5 mm: the first reduction is along them, and pixels of 1 mm keep their size."""
    found = fingerprint(size=[400, 200, 200], spacing=[0.5, 1.0, 1.0])
    slow = slower(found, chosen(found), 5.0, 1e-5)
    assert chosen(found).patch == (96, 96, 96) and slow.patch == (64, 96, 96)
    assert slow.prepare["spacing"] == (0.5, 1.0, 1.0)


def test_a_patch_that_was_larger_than_the_image_covers_as_much_after_it_is_reduced():
    """70 voxels in a patch of 96 or of 64: the factor 70 / 64 is too small for larger voxels."""
    found = fingerprint(size=[64, 70, 70])
    assert chosen(found).patch == (64, 96, 96)
    slow = slower(found, chosen(found), 2.0, 3e-5)
    assert slow.patch == (64, 64, 64) and slow.prepare["spacing"] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("hours", "patch"), [(5.0, (64, 96, 96)), (3.5, (64, 64, 96)), (2.0, (64, 64, 64))])
def test_a_reduced_patch_of_a_large_volume_covers_the_same_volume(hours, patch):
    found = fingerprint(size=[400] * 3)
    slow = slower(found, chosen(found), hours, 1e-5)
    assert chosen(found).patch == (96, 96, 96) and slow.patch == patch
    assert np.prod(np.multiply(slow.patch, slow.prepare["spacing"])) == pytest.approx(96**3, rel=0.02)
    assert len(set(slow.prepare["spacing"])) == 1


def test_the_reasons_tell_what_was_done():
    """50 slices of 1 mm, 25 of 2 mm; a step of 1e-5 s for a voxel."""
    found = fingerprint(size=[50, 300, 1300], structures=("organ",))
    found = Fingerprint({n: f | {"structures": _rare_organ()} for n, f in found.cases.items()}, ("T1",), ("organ",))
    first = chosen(found, platform="gpu")
    assert "50 x 300 x 1300 voxels" in first.reasons["patch"] and first.dice == "batch"
    slow = slower(found, first, 2.0, 1e-5)
    spacing, patch = slow.prepare["spacing"], slow.reasons["patch"]
    assert slow.batch == 1 and "with one sample in a batch" in slow.reasons["dice"]
    assert f"at a spacing of {' x '.join(f'{v:.3g}' for v in spacing)} mm" in patch and spacing[0] > 1.1
    assert f"is {round(50 / spacing[0])} x {round(300 / spacing[1])} x" in patch
    assert "reduced from 56x128x128: " in patch and not slow.notes
    few = slower(found, first, 2.0, 1e-4)
    assert len(few.notes) == 1 and "--hours=2" in few.notes[0] and str(few.epochs * few.epoch_steps) in few.notes[0]


def _rare_organ():
    return {"organ": {"voxels": 2000, "slices": 20, "extent": [16.0] * 3, "components": 1, "largest": 1.0}}


def test_a_validation_has_the_windows_of_prediction():
    """Counted by hand, with an overlap of half a patch: 3, 4 and 1 windows of 64 along 128, 160 and 50 voxels."""
    found = fingerprint(count=10, size=[128, 160, 50])
    choices = chosen(found).change(patch=(64, 64, 64), batch=1, folds=5)
    assert machine._validation_seconds(choices, found, 3.0) == pytest.approx(2 * 3 * 4 * 1)
    picture = fingerprint(count=10, size=[20, 128, 100], spacing=[1.0, 1.0, 1.0])
    flat = chosen(fingerprint(size=[1, 128, 128])).change(patch=(64, 64), batch=1, folds=5)
    assert machine._validation_seconds(flat, picture, 3.0) == pytest.approx(2 * 20 * 3 * 3)


def test_the_reason_names_the_first_patch_if_the_patch_is_reduced_twice():
    """A step is slower than its number of voxels predicts, so the reduced patch is measured, and reduced again."""
    found, choices = fingerprint(), chosen(fingerprint())
    measured, seconds = [], iter([20.0, 12.0, 6.0, 5.0])
    slow = machine.fit_time(choices, found, 6.0, lambda c: measured.append(c.patch) or next(seconds), lambda line: None)
    assert measured[0] == choices.patch and len(set(measured[:3])) == 3, "a third patch, after the second measurement"
    first = f"reduced from {'x'.join(map(str, choices.patch))}: "
    assert first in slow.reasons["patch"] and "a step takes 20 s" in slow.reasons["patch"]


@pytest.mark.parametrize(("devices", "batch"), [(1, 2), (2, 2), (3, 3), (8, 8)])
def test_every_device_has_a_sample(devices, batch, linear_memory):
    found = chosen(fingerprint(), platform="gpu", devices=devices)
    assert found.batch == batch
    small = machine.fit_memory(found, 4096 * 64 * 64 * 96 * batch, linear_memory, lambda line: None)
    assert small.batch == batch and sorted(small.patch) == [64, 64, 96], "the patch, not the batch, becomes smaller"


def test_validations_keep_to_their_share():
    """19 epochs, and time for at most ten validations."""
    found, choices = fingerprint(), chosen(fingerprint())
    for hours in (0.5, 1.0, 3.0):
        planned = machine.fit_time(choices, found, hours, lambda c: 0.1, lambda line: None)
        assert -(-planned.epochs // planned.validate_every) <= 10


SPLITS = [{"training": ("p0",), "validation": ("p1",)}, {"training": ("p1",), "validation": ("p0",)}]


@pytest.mark.parametrize(
    ("count", "splits", "number", "words"),
    [
        (2, SPLITS, 2, ""),
        (2, SPLITS[:1], 0, "single fold"),
        (2, [], 0, ""),
        (3, SPLITS, 0, "validates on p2"),
        (2, [SPLITS[0], SPLITS[0]], 0, "validates on p0"),
        (2, [*SPLITS, SPLITS[0]], 0, "the same patient"),
        (2, [*SPLITS, {"training": ("p0", "p1"), "validation": ()}], 0, "validates on none"),
        (2, [SPLITS[0], SPLITS[1] | {"training": ()}], 0, "no training cases for fold 1"),
        (2, [{"validation": ("p1",)}, SPLITS[1]], 0, "no training cases for fold 0"),
        (2, [SPLITS[0], SPLITS[1] | {"training": ("absent",)}], 0, "no training cases for fold 1"),
    ],
)
def test_a_list_of_folds_is_used_if_it_validates_on_everybody_once(count, splits, number, words):
    found, note = plan_data._usable_folds(splits, fingerprint(count))
    assert found == number and words in note and bool(note) == bool(words)


def test_a_corrected_table_is_believed(root, tmp_path):
    """The patients are those of the table now, and not those when the files were measured."""
    (root / "cases.csv").write_text(_table("P", "P"))
    dataset, cases = cases_of(root, "table")
    assert Fingerprint(measure_cases(dataset, cases, tmp_path / "store"), ("T1",), ()).patients == {"P"}
    (root / "cases.csv").write_text(_table("P", "Q"))
    dataset, cases = cases_of(root, "table")
    assert Fingerprint(measure_cases(dataset, cases, tmp_path / "store"), ("T1",), ()).patients == {"P", "Q"}


def _table(*patients):
    rows = [f"imagesTr/{c}_0000.nii.gz,labelsTr/{c}.nii.gz,{p}" for c, p in zip("ab", patients, strict=True)]
    return "\n".join(["image,label,patient", *rows])


def test_a_recipe_names_every_option_of_its_data_set():
    section = plan_data.complete_section({"dataset": "chaos", "root": "/data"})
    assert section["task"] == 5 and section["phase"] == "in"
    assert plan_data.complete_section({"dataset": "nnunet", "root": "/d"}) == {"dataset": "nnunet", "root": "/d"}


def test_no_time_is_an_error():
    with pytest.raises(UserError, match=r"--hours=0\.01.*--folds=2"):
        machine.fit_time(chosen(fingerprint()), fingerprint(), 0.01, lambda c: 5.0, lambda line: None)


def test_step_times_are_measured_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "measure_step", lambda *_: calls.append(1) or 0.123456)
    model = SimpleNamespace(in_channels=1, out_channels=2)
    build = lambda choices: (SimpleNamespace(model=model), None)  # noqa: E731
    times = machine.StepTimes(tmp_path / "times.json", build)
    one = chosen(fingerprint())
    assert times(one) == times(one) == 0.12 and len(calls) == 1
    machine.StepTimes(tmp_path / "times.json", build)(one.change(patch=(32, 32, 32)))
    assert len(calls) == 2
    model.out_channels = 3  # a structure was added to dataset.json
    times(one)
    assert len(calls) == 3


# -- the recipe -------------------------------------------------------------------------------------------------------

KINDS = {
    "3D": lambda: chosen(fingerprint()),
    "thick": lambda: chosen(fingerprint(spacing=[5.0, 0.7, 0.7], size=[32, 400, 400])),
    "2D": lambda: chosen(fingerprint(size=[1, 300, 420])),
    "random": lambda: chosen(fingerprint(), weights=False),
    "CT": lambda: chosen(_ct(4)),
    "GPU": lambda: chosen(fingerprint(), platform="gpu"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_can_be_read_by_training(kind, tmp_path):
    choices = KINDS[kind]().change(epochs=7, epoch_steps=11, validate_every=2)
    write_card(tmp_path / "data", ("CT",) if kind == "CT" else ("T1",), ("organ",))
    section = {"dataset": "nnunet", "root": str(tmp_path / "data")}
    path = tmp_path / "recipe.py"
    path.write_text(render(choices, section, "A recipe."))
    config, _ = resolve_config(load_config(f"{path}:fold=1", ["--config.train.epochs=3"]))
    assert config.data.fold == 1 and config.train.epochs == 3 and config.data.epoch_steps == 11
    assert tuple(config.data.patch) == choices.patch and config.data.folds == choices.folds
    assert Preparation.from_config(config.data.prepare) == Preparation(**choices.prepare)
    assert config.init.weights == ("tf_efficientnet_lite0.pypi" if choices.pretrained else "")
    assert config.model.name == choices.network and config.output == choices.output
    if not choices.flat:
        assert tuple(config.model.depth.strides) == choices.strides and config.init.inflate == choices.rule
    assert load_config(f"{path}:scratch", []).init.weights == ""
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) <= 120
    for reason in (r for name, r in choices.reasons.items() if r and name != "mirror"):
        words = re.sub(r"[^a-z0-9]", "", reason.lower())
        assert words in re.sub(r"[^a-z0-9]", "", path.read_text().lower()), reason


def test_the_page_has_every_choice():
    found = fingerprint()
    text = page.render(found, chosen(found), "the recipe", plan_data.Path("data"))
    for words in ("the recipe", "64 x 96 x 96", "softmax", "data:image/png;base64,", "12 of 12 patients"):
        assert words in text


# -- preparation of CT ------------------------------------------------------------------------------------------------


def test_ct_is_standardised_with_the_given_numbers(tmp_path):
    root = tmp_path / "data"
    write_card(root, ("CT",))
    image = np.full((4, 8, 8), -1000, np.int16)
    image[1:3], image[1, 0, 0] = 40, 3000
    write_case(root, "a", image, np.zeros(image.shape, np.uint8), (2.0, 1.0, 1.0))
    _, cases = cases_of(root)
    settings = Preparation(window=(40.0, 400.0), ct_statistics=(20.0, 10.0))
    found = prepare(cases[0], read_case(cases[0]), settings).image()[..., 0]
    assert found[1, 4, 4] == pytest.approx(2.0) and found[0, 0, 0] == pytest.approx(-18.0)
    assert found[1, 0, 0] == pytest.approx(22.0)


def test_water_is_a_value_of_ct_and_background_of_others(tmp_path):
    """0 HU is standardised as every other value; in a channel without a unit, 0 is the background and remains 0."""
    root = tmp_path / "data"
    write_card(root, ("CT", "PET"))
    image = np.full((4, 8, 8, 2), 40, np.int16)
    image[0, 0, 0], image[1:3, :, :, 1] = 0, 60
    label = np.zeros(image.shape[:3], np.uint8)
    for channel in range(2):
        write_case(root, "a", image[..., channel], label, (2.0, 1.0, 1.0), channel=channel)
    _, cases = cases_of(root)
    settings = Preparation(ct_statistics=(20.0, 10.0), normalise="zscore_nonzero")
    prepared = prepare(cases[0], read_case(cases[0]), settings)
    np.testing.assert_allclose(prepared.image()[0, 0, 0], (-2.0, 0.0), atol=1e-6)
    np.testing.assert_allclose(prepared.image()[0, 0, 1, 0], 2.0, atol=1e-6)
    # interpolation between water and tissue is not replaced by water
    fine = prepare(cases[0], read_case(cases[0]), dataclasses.replace(settings, spacing=(1.0, 0.5, 0.5)))
    found = np.asarray(fine.raw)[..., 0]
    assert ((found > 1) & (found < 39)).any()
    # stores of earlier versions, in which 0 HU was background, are not used
    dataset, _ = cases_of(root)
    keys = [store_key(dataset, dataclasses.replace(settings, normalise=n))[1] for n in ("zscore", "zscore_nonzero")]
    assert ["ct_zero" in key for key in keys] == [False, True]


def test_ct_statistics_are_for_ct_only(tmp_path):
    root = tmp_path / "data"
    write_card(root)
    image = np.random.default_rng(0).normal(500, 50, (4, 8, 8)).astype(np.float32)
    write_case(root, "a", image, np.zeros(image.shape, np.uint8), (2.0, 1.0, 1.0))
    dataset, cases = cases_of(root)
    settings = Preparation(ct_statistics=(20.0, 10.0))
    found = prepare(cases[0], read_case(cases[0]), settings).image()
    assert found.mean() == pytest.approx(0, abs=1e-4) and found.std() == pytest.approx(1, abs=1e-4)
    with pytest.raises(UserError, match=r"ct_statistics.*CT"):
        check_preparation(dataset, settings)


@pytest.mark.parametrize("value", [(1.0,), (0.0, 0.0), (0.0, -1.0), ("a", 1.0)])
def test_ct_statistics_are_two_numbers(value):
    with pytest.raises(UserError, match="ct_statistics"):
        Preparation(ct_statistics=value)


def test_the_new_setting_keeps_the_keys_of_older_stores(root):
    """The key of a store of version 1, computed by the code before the setting existed."""
    dataset, _ = cases_of(root)
    values = store_key(dataset, Preparation())[1]
    assert set(values["prepare"]) == {"crop", "spacing", "size", "window", "normalise"}
    assert "ct_statistics" in store_key(dataset, Preparation(ct_statistics=(0.0, 1.0)))[1]["prepare"]
