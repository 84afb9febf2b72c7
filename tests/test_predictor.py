"""Networks from Python: arrays in any order of their axes, files of every kind, ensembles that do not go together."""

import concurrent.futures
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import xdim_jax
from tests.dicom_files import write_series
from xdim_jax import predict
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_json
from xdim_jax.data import case as data_case
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.data.images.grid import Grid
from xdim_jax.data.images.image import read_volume
from xdim_jax.data.labels import Labels
from xdim_jax.inference import folder, memory
from xdim_jax.inference import group as group_module
from xdim_jax.inference.predict_cases import predict_cases, predict_paths
from xdim_jax.inference.predictor import _check_common as check_common
from xdim_jax.inference.settings import Settings
from xdim_jax.nets import networks
from xdim_jax.nets.functional import split_model
from xdim_jax.runs import checkpoint
from xdim_jax.runs.workdir import CONFIG_FILE, DATA_FILE, read_config
from xdim_jax.scoring.results import PREDICT_FILE

pytestmark = pytest.mark.usefixtures("one_convolution")
CHANNELS = ("T1", "T2")


def make_workdir(folder, *, flat=False, channels=CHANNELS, seed=0, **changes):
    """A run that never trained: its config, its data set's description, and random weights."""
    config = load_config(f"configs/own_{'omnianet' if flat else 'dxnet'}.py", [])
    with config.unlocked():
        config.data.dataset, config.output, config.data.prepare.size = "nnunet", "softmax", ()
        config.data.patch = (32, 32) if flat else (32, 32, 32)
        config.model.encoder.name, config.model.filters = "efficientnet_toy", (16, 16, 8, 8, 8)
        config.model.in_channels, config.model.out_channels = len(channels), 3
        for key, value in changes.items():
            config.data.prepare[key] = value
    labels = Labels("own", ("background", "organ", "lesion"), (0, 1, 2))
    description = {
        "dataset": "own",
        "channels": list(channels),
        "labels": labels.to_json(),
        "regions": {"organ": [1], "lesion": [2]},
    }
    write_json(folder / CONFIG_FILE, config.to_dict())
    write_json(folder / DATA_FILE, description)
    trained_dataset(config.data.to_dict(), description)  # can be read
    _, params, stats = split_model(networks.build(config.model, seed=seed))
    checkpoints = checkpoint.open_checkpoints(folder)
    checkpoint.save_best(checkpoints, 1, params, stats, 0.5)
    checkpoint.close(checkpoints)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("own") / "run")


@pytest.fixture(scope="module")
def predictor(workdir):
    return xdim_jax.Predictor(workdir, probabilities=True, uncertainty=True, flips=(2,))


@pytest.fixture(scope="module")
def image():
    """(z, y, x, c), not cubic."""
    return np.random.default_rng(0).normal(100, 30, (20, 36, 28, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def found(predictor, image):
    return predictor.predict(image, spacing=(2.0, 1.0, 1.0))


def process_state():
    """What belongs to the process that uses this package as a library, and must not be changed by it."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict))]
    return {
        "levels": {logger.name: logger.level for logger in loggers},
        "handlers": {logger.name: list(logger.handlers) for logger in loggers},
        "log filters": {logger.name: list(logger.filters) for logger in loggers},
        "warnings": list(warnings.filters),
        "hooks": (sys.unraisablehook, sys.excepthook, threading.excepthook),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "environment": dict(os.environ),
        "jax": dict(jax.config.values),
    }


def test_library_calls_leave_the_process_as_it_was(workdir, image, monkeypatch):
    monkeypatch.setattr(logging.getLogger("absl"), "level", logging.INFO)
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.DEBUG)
    before = process_state()
    xdim_jax.load_model(workdir)
    xdim_jax.Predictor(workdir).predict(image)
    after = process_state()
    new = after["levels"].keys() - before["levels"].keys()  # libraries may create loggers of their own
    for key in ("levels", "handlers", "log filters"):
        after[key] = {name: value for name, value in after[key].items() if name not in new}
    assert {key for key in before if before[key] != after[key]} == set()


@pytest.mark.quick
def test_an_array_gives_labels_probabilities_and_uncertainty(predictor, found, image):
    assert found.label.shape == image.shape[:3] and found.label.dtype == np.uint8
    assert found.probabilities.shape == (*image.shape[:3], 3) and found.names == ("background", "organ", "lesion")
    np.testing.assert_allclose(found.probabilities.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(found.probabilities.argmax(-1), found.label)
    assert found.uncertainty.shape == image.shape[:3] and found.uncertainty.max() > 0
    assert "flipped along W" in predictor.groups[0].describe() and "1 network" in predictor.groups[0].describe()


@pytest.mark.parametrize("axes", ["xyzc", "cyzx", "zcxy"])
def test_the_order_of_axes_does_not_matter(axes, predictor, found, image):
    order = ["zyxc".index(a) for a in axes]
    spacing = [{"z": 2.0, "y": 1.0, "x": 1.0}[a] for a in axes if a != "c"]
    other = predictor.predict(np.transpose(image, order), axes, spacing)
    spatial = ["zyx".index(a) for a in axes if a != "c"]
    np.testing.assert_array_equal(other.label, found.label.transpose(spatial))
    np.testing.assert_allclose(other.probabilities, found.probabilities.transpose(*spatial, 3), atol=1e-5)
    np.testing.assert_allclose(other.uncertainty, found.uncertainty.transpose(spatial), atol=1e-6)


def test_a_file_is_predicted_as_its_array(predictor, found, image, tmp_path, workdir):
    """Stored the other way round along two axes: labels come back on the file's own grid."""
    flipped = image[::-1, :, ::-1].transpose(2, 1, 0, 3)  # x to the right, z to inferior
    affine = np.diag([1.0, -1.0, -2.0, 1.0])
    for c in range(2):
        nib.save(nib.Nifti1Image(flipped[..., c], affine), tmp_path / f"a_{c:04d}.nii.gz")
    files = [tmp_path / f"a_{c:04d}.nii.gz" for c in range(2)]
    case = data_case.case_from_files(files, predictor.dataset)
    np.testing.assert_array_equal(predictor.predict_case(case).label, found.label)
    array = predictor.predict(flipped, "xyzc", affine=affine)
    np.testing.assert_array_equal(array.label, found.label[::-1, :, ::-1].transpose(2, 1, 0))

    status = predict.main(
        [f"--workdir={workdir}", "--input", *map(str, files), f"--output={tmp_path / 'out'}", "--flips=W"]
    )
    assert status == 0
    written = nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_array_equal(written.affine, affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj), array.label)


@pytest.fixture(scope="module")
def flat_two(tmp_path_factory):
    """A 2D network with the channels of `workdir`, another patch and another spacing."""
    return make_workdir(tmp_path_factory.mktemp("flat_two") / "run", flat=True, seed=3, spacing=(0, 1.2, 1.2))


def test_2d_and_3d_networks_are_averaged_on_the_grid_of_the_image(workdir, flat_two, image):
    spacing = (2.0, 1.0, 1.0)
    alone = [xdim_jax.Predictor(w, probabilities=True).predict(image, spacing=spacing) for w in (workdir, flat_two)]
    assert np.abs(alone[0].probabilities - alone[1].probabilities).max() > 1e-3
    both = xdim_jax.Predictor([workdir, flat_two], probabilities=True, uncertainty=True)
    assert len(both.groups) == 2
    together = both.predict(image, spacing=spacing)
    each = [a.probabilities for a in alone]
    np.testing.assert_allclose(together.probabilities, np.mean(each, 0), atol=1e-6)
    np.testing.assert_allclose(together.uncertainty, np.var(each, 0).mean(-1), atol=1e-6)
    np.testing.assert_array_equal(together.label, np.mean(each, 0).argmax(-1))
    reverse = xdim_jax.Predictor([flat_two, workdir]).predict(image, spacing=spacing)
    np.testing.assert_array_equal(reverse.label, together.label)
    assert both.digest not in {xdim_jax.Predictor(w).digest for w in (workdir, flat_two)}


def test_every_network_has_the_same_weight(workdir, flat_two, image, tmp_path):
    """Two networks of one kind and one of another."""
    image = image[:, :32]  # one window in 3D: the mean of two networks is then exact
    other = make_workdir(tmp_path / "other", seed=7)
    three = (workdir, flat_two, other)
    alone = [xdim_jax.Predictor(w, probabilities=True).predict(image).probabilities for w in three]
    together = xdim_jax.Predictor(list(three), probabilities=True)
    assert [group.members for group in together.groups] == [2, 1]
    assert [source.split(",")[0] for source in together.sources] == [str(w) for w in three]
    np.testing.assert_allclose(together.predict(image).probabilities, np.mean(alone, 0), atol=1e-5)


def test_a_cropped_border_is_background_in_an_average(workdir, flat_two, image, tmp_path):
    """One network crops to the voxels that are not zero, the other one sees the whole image."""
    cropping = make_workdir(tmp_path / "cropping", crop="nonzero")
    framed = np.pad(image, ((2, 2), (6, 6), (5, 5), (0, 0)))
    alone = [xdim_jax.Predictor(w, probabilities=True).predict(framed).probabilities for w in (cropping, flat_two)]
    assert (alone[0][:, :6] == [1, 0, 0]).all(), "outside of the crop, the network predicts the background"
    np.testing.assert_allclose(alone[0].sum(-1), 1, atol=1e-5)
    together = xdim_jax.Predictor([cropping, flat_two], probabilities=True).predict(framed).probabilities
    border = np.array([1, 0, 0])
    np.testing.assert_allclose(together[:, :6], (alone[1][:, :6] + border) / 2, atol=1e-6)
    np.testing.assert_allclose(together[2:-2, 6:-6, 5:-5], np.mean(alone, 0)[2:-2, 6:-6, 5:-5], atol=1e-6)


@pytest.mark.parametrize(
    ("section", "key", "value"), [("train", "precision", "bfloat16"), ("augment", "flip", {"p": 0.5, "axes": [1]})]
)
def test_networks_with_other_defaults_of_prediction_keep_them(section, key, value, workdir, tmp_path):
    """Precision and test-time flips are those of each network, not those of the first one."""
    other = make_workdir(tmp_path / "other", seed=7)
    config = json.loads((other / CONFIG_FILE).read_text())
    config[section][key] = value
    write_json(other / CONFIG_FILE, config)
    groups = xdim_jax.Predictor([workdir, other], preset="best").groups
    own = [xdim_jax.Predictor(w, preset="best").groups[0].resolved for w in (workdir, other)]
    assert [group.resolved for group in groups] == own and own[0] != own[1]


def test_networks_of_other_data_are_no_ensemble(workdir, flat, tmp_path):
    sigmoid = make_workdir(tmp_path / "sigmoid")
    config = json.loads((sigmoid / CONFIG_FILE).read_text())
    config["output"] = "sigmoid"
    write_json(sigmoid / CONFIG_FILE, config)
    with pytest.raises(UserError, match=r"output: 'softmax' in .*, 'sigmoid' in"):
        xdim_jax.Predictor([workdir, sigmoid])
    with pytest.raises(UserError, match=r"model\.in_channels: 2 in .*, 1 in"):
        xdim_jax.Predictor([workdir, flat])


def test_networks_of_the_same_data_in_other_folders_are_an_ensemble(workdir, tmp_path):
    """In the description of the data, only the name of the folder differs."""
    other = make_workdir(tmp_path / "other", seed=7)
    described = json.loads((other / DATA_FILE).read_text())
    described["labels"]["name"] = "job7"
    write_json(other / DATA_FILE, described)
    assert len(xdim_jax.Predictor([workdir, other]).workdirs) == 2
    described["labels"]["values"] = [0, 1, 3]
    write_json(other / DATA_FILE, described)
    with pytest.raises(UserError, match="labels of the data differ"):
        xdim_jax.Predictor([workdir, other])


def write_inputs(folder, names, image):
    """Cases in the layout of nnU-Net's imagesTs, with an affine of another voxel size."""
    folder.mkdir()
    for name in names:
        for c in range(2):
            array = nib.Nifti1Image(image[..., c].transpose(2, 1, 0), np.diag([-1.0, -1.0, 2.0, 1.0]))
            nib.save(array, folder / f"{name}_{c:04d}.nii.gz")
    return folder


def test_what_is_there_already_is_skipped_and_other_settings_are_refused(workdir, image, tmp_path, capsys):
    images, out = write_inputs(tmp_path / "images", "ab", image), tmp_path / "out"
    command = [f"--workdir={workdir}", f"--input={images}", f"--output={out}"]
    assert predict.main([*command, "--shard=1/2"]) == 0
    assert {p.name for p in out.glob("*.nii.gz")} == {"b.nii.gz"}
    stamp = (out / "b.nii.gz").stat().st_mtime_ns
    capsys.readouterr()
    assert predict.main(command) == 0
    assert "skipped    1 of 2 cases" in capsys.readouterr().out and (out / "a.nii.gz").is_file()
    assert (out / "b.nii.gz").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=rf"(?s){re.escape(str(out))}.*--overwrite"):
        predict.main([*command, "--overlap=0.6"])
    # images at another place would replace the predictions of these
    shutil.copytree(images, tmp_path / "other")
    os.utime(tmp_path / "other" / "a_0000.nii.gz", (1, 1))
    with pytest.raises(UserError, match="would replace it"):
        predict.main([f"--workdir={workdir}", f"--input={tmp_path / 'other'}", f"--output={out}"])
    # a label map whose image has changed since is predicted anew
    os.utime(images / "a_0001.nii.gz", (1, 1))
    assert predict.main(command) == 0
    assert "skipped    1 of 2 cases" in capsys.readouterr().out
    assert predict.main(command) == 0
    assert "skipped    2 of 2 cases" in capsys.readouterr().out


def test_an_ensemble_with_probabilities_and_uncertainty(workdir, image, tmp_path, capsys):
    """Two runs with the same weights: the probabilities of one; mirror images differ, so there is uncertainty."""
    shutil.copytree(workdir, tmp_path / "twin")
    images = write_inputs(tmp_path / "images", "a", image)
    extra = ["--probabilities", "--uncertainty"]
    both = ["--workdir", str(workdir), str(tmp_path / "twin"), f"--input={images}", f"--output={tmp_path / 'two'}"]
    assert predict.main([*both, *extra]) == 0
    alone = [f"--workdir={workdir}", f"--input={images}"]
    assert predict.main([*alone, f"--output={tmp_path / 'one'}"]) == 0
    capsys.readouterr()
    assert predict.main([*alone, f"--output={tmp_path / 'mirrored'}", *extra, "--flips=W"]) == 0
    assert "flipped along W" in capsys.readouterr().out

    def read(folder, kind=""):
        found = nib.load(tmp_path / folder / kind / f"a.nii{'' if kind else '.gz'}")
        source = nib.load(images / "a_0000.nii.gz")
        np.testing.assert_array_equal(found.affine, source.affine)
        assert found.shape[:3] == source.shape
        return np.asarray(found.dataobj)

    np.testing.assert_array_equal(read("two"), read("one"))
    np.testing.assert_array_equal(read("two", "probabilities").argmax(-1), read("two"))
    assert np.abs(read("two", "uncertainty")).max() < 1e-6 < read("mirrored", "uncertainty").max()


def test_compressed_probabilities_are_rounded_to_16_bits(workdir, found, image, tmp_path):
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    for c in range(2):
        nib.save(nib.Nifti1Image(image[..., c].transpose(2, 1, 0), affine), tmp_path / f"a_{c:04d}.nii.gz")
    files = [str(tmp_path / f"a_{c:04d}.nii.gz") for c in range(2)]
    out = tmp_path / "out"
    command = [f"--workdir={workdir}", "--input", *files, f"--output={out}", "--flips=W", "--probabilities"]
    assert predict.main([*command, "--uncertainty"]) == 0
    sizes = {kind: (out / kind / "a.nii").stat().st_size for kind in ("probabilities", "uncertainty")}
    assert predict.main([*command, "--uncertainty", "--compress"]) == 0
    for kind, step in (("probabilities", 1 / 65535), ("uncertainty", 0.25 / 65535)):
        assert [p.name for p in (out / kind).iterdir()] == ["a.nii.gz"], "the earlier file, and nothing temporary"
        stored = nib.load(out / kind / "a.nii.gz")
        np.testing.assert_array_equal(stored.affine, affine)
        assert (out / kind / "a.nii.gz").stat().st_size < sizes[kind] / 2
        exact = getattr(found, kind)
        np.testing.assert_allclose(np.swapaxes(stored.get_fdata(), 0, 2), exact, atol=step / 2 + 1e-6)
        by_simpleitk = sitk.ReadImage(str(out / kind / "a.nii.gz"))  # applies the slope of the header too
        np.testing.assert_allclose(
            np.squeeze(sitk.GetArrayFromImage(by_simpleitk)),
            np.moveaxis(exact, -1, 0) if kind == "probabilities" else exact,
            atol=step,
        )
    with pytest.raises(UserError, match="--compress"):
        predict.main([*command[:-1], "--compress", "--overwrite"])


@pytest.mark.slow
def test_two_networks_are_the_mean_of_both(workdir, image, tmp_path):
    other = make_workdir(tmp_path / "other", seed=7)
    image = image[:, :32]  # one window: where windows overlap, the variances of each are blended
    alone = [xdim_jax.Predictor(w, probabilities=True).predict(image) for w in (workdir, other)]
    assert np.abs(alone[0].probabilities - alone[1].probabilities).max() > 1e-3
    both = xdim_jax.Predictor([workdir, other], probabilities=True, uncertainty=True)
    together = both.predict(image)
    each = [a.probabilities for a in alone]
    np.testing.assert_allclose(together.probabilities, np.mean(each, 0), atol=1e-5)
    np.testing.assert_allclose(together.uncertainty, np.var(each, 0).mean(-1), atol=1e-5)
    assert "2 networks" in both.groups[0].describe()
    (tmp_path / "folds").mkdir()
    shutil.copytree(workdir, tmp_path / "folds" / "fold0")
    shutil.copytree(other, tmp_path / "folds" / "fold1")
    folds = xdim_jax.Predictor(tmp_path / "folds", probabilities=True).predict(image)
    np.testing.assert_allclose(folds.probabilities, together.probabilities, atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"preset": "quick"}, "--preset=quick: expected one of fast, default, best"),
        ({"overlap": 1.0}, "--overlap=1.0: expected 0 <= overlap < 1"),
        ({"precision": "float16"}, "--precision=float16"),
        ({"min_et": 5}, "--min_et is not a setting"),
        ({"largest": ("heart",)}, "--largest: heart unknown; the regions are organ, lesion"),
        ({"threshold": 0.4}, "--threshold needs sigmoid outputs"),
        ({"flips": (3,)}, "expected axes of 0 (D), 1 (H), 2 (W)"),
        ({"batch": -1}, "--batch=-1"),
    ],
)
def test_settings_that_cannot_be(keywords, words, workdir):
    with pytest.raises(UserError) as error:
        xdim_jax.Predictor(workdir, **keywords)
    assert words in str(error.value)


@pytest.mark.quick
def test_arrays_that_do_not_fit(predictor, image):
    for arguments, words in [
        ((image, "zyx"), "has 4 axes, but axes='zyx' names 3"),
        ((image, "zzxc"), "expected y and x"),
        ((image[..., :1],), "has 1 channels; expected T1, T2"),
        ((image, "zyxc", (1.0, 0.0, 1.0)), "expected mm above 0 along z, y, x"),
        ((image, "zyxc", (1.0, np.inf, 1.0)), "expected mm above 0 along z, y, x"),
        ((image, "zyxc", 1.0), "expected one number for each of z, y, x"),
        ((image, "zyxc", None, np.eye(3)), "affine has the shape (3, 3)"),
        ((image, "zyxc", None, np.zeros((4, 4))), "singular affine"),
        ((image, "zyxc", None, np.full((4, 4), np.nan)), "singular affine"),
        ((image[:, :0],), "is empty"),
        ((np.where(image > 150, -1.797e308, image.astype(np.float64)),), "too large for 32 bits"),
        ((image, "zyxc", None, None, "CT"), "would apply to all channels"),
        ((image, "zyxc", None, None, "ct"), "expected CT or MR"),
    ]:
        with pytest.raises(UserError) as error:
            predictor.predict(**dict(zip(("image", "axes", "spacing", "affine", "modality"), arguments, strict=False)))
        assert words in str(error.value)


def test_a_bfloat16_array_is_read_as_its_values(predictor, image):
    half = jnp.asarray(image, jnp.bfloat16)
    np.testing.assert_array_equal(predictor.predict(half).label, predictor.predict(np.asarray(half, np.float32)).label)


def test_models_that_are_loaded_at_the_same_time_leave_the_loggers_as_they_were(workdir, monkeypatch):
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.DEBUG)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: xdim_jax.load_model(workdir), range(8)))
    assert logging.getLogger("asyncio").level == logging.DEBUG


def test_programs_for_many_sizes_of_images_are_not_kept(flat, monkeypatch):
    monkeypatch.setattr(group_module, "_MAX_SIZES", 2)
    predictor = xdim_jax.Predictor(flat)
    (group,) = predictor.groups
    kept = []
    for side in (40, 80, 120, 160, 200, 240):
        predictor.predict(np.zeros((side, side), np.float32), "yx")
        kept.append(group.segmenter._decode._cache_size())
    assert max(kept) <= 2
    first = predictor.predict(np.ones((40, 40), np.float32), "yx").label
    np.testing.assert_array_equal(first, xdim_jax.Predictor(flat).predict(np.ones((40, 40), np.float32), "yx").label)


def test_a_saved_segmentation_is_no_image(flat, tmp_path):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 3), np.float32), np.eye(4)), path)
    predictor = xdim_jax.Predictor(flat)
    predictor.predict(path).save(tmp_path / "a_labels.nii.gz")
    assert [case.case_id for case in predictor.find_cases(tmp_path)[0]] == ["a"]


def test_copies_of_folds_are_no_networks_and_missing_folds_are_named(workdir, tmp_path, capsys):
    for name in ("fold0", "fold1", "fold1_backup"):
        shutil.copytree(workdir, tmp_path / "cv" / name)
    predictor = xdim_jax.Predictor(tmp_path / "cv")
    assert [path.name for path in predictor.workdirs] == ["fold0", "fold1"]
    assert "has 2 of 5 folds" in capsys.readouterr().out
    official = shutil.copytree(workdir, tmp_path / "official") / "config.json"
    config = json.loads(official.read_text())
    config["data"]["split"] = "official"
    official.write_text(json.dumps(config))
    xdim_jax.Predictor([tmp_path / "official", tmp_path / "cv"])
    assert capsys.readouterr().out.count("has 2 of 5 folds") == 1


def test_weights_that_may_not_be_read_are_not_absent(workdir, tmp_path, monkeypatch):
    folder = shutil.copytree(workdir, tmp_path / "run")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("best"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"run/best cannot be read: Permission denied.*permissions"):
        xdim_jax.Predictor(folder)


# -- a 2D network on one slice, MetaImage, DICOM ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("flat") / "run", flat=True, channels=("CT",))


def test_a_2d_network_on_a_picture_and_on_slices(flat):
    predictor = xdim_jax.Predictor(flat, probabilities=True)
    picture = np.random.default_rng(0).normal(0, 1, (40, 50)).astype(np.float32)
    found = predictor.predict(picture, "yx", (1.0, 1.0))
    assert found.label.shape == (40, 50) and found.probabilities.shape == (40, 50, 3)
    turned = predictor.predict(picture.T, "xy", (1.0, 1.0))
    np.testing.assert_array_equal(turned.label, found.label.T)


def test_dicom_metaimage_and_nifti_of_one_volume_give_one_segmentation(flat, tmp_path):
    volume = np.random.default_rng(1).integers(-500, 500, (5, 40, 36)).astype(np.int16)
    write_series(tmp_path / "series", volume, (2.0, 0.7, 0.7))
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((0.7, 0.7, 2.0))
    sitk.WriteImage(image, str(tmp_path / "volume.mha"))
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([-0.7, -0.7, 2.0, 1.0])), tmp_path / "volume.nii.gz")
    labels = {}
    for name in ("series", "volume.mha", "volume.nii.gz"):
        out = tmp_path / f"out_{name}"
        assert predict.main([f"--workdir={flat}", f"--input={tmp_path / name}", f"--output={out}"]) == 0
        (path,) = out.glob("*.nii.gz")
        labels[name] = read_volume(path)[0]
    assert labels["series"].shape == (5, 40, 36) and len(np.unique(labels["series"])) > 1
    np.testing.assert_array_equal(labels["series"], labels["volume.nii.gz"])
    np.testing.assert_array_equal(labels["volume.mha"], labels["volume.nii.gz"])
    record = json.loads((tmp_path / "out_series" / "predict.json").read_text())
    in_order = [str(tmp_path / "series" / f"{number:03d}.dcm") for number in (5, 4, 3, 2, 1)]  # by position
    assert record["images"] == {f"{tmp_path.name}_series": [in_order]}


def test_a_folder_of_loose_images(flat, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        volume = np.random.default_rng(ord(name)).integers(0, 100, (36, 40, 3)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "in" / f"{name}.nii.gz")
    assert predict.main([f"--workdir={flat}", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}"]) == 0
    assert {p.name for p in (tmp_path / "out").glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz"}


def test_paths_from_python(flat, predictor, found, image, tmp_path):
    """A file, the files of one case, a folder of slices; saved on the image's own grid."""
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    files = [tmp_path / f"a_{c:04d}.nii.gz" for c in range(2)]
    for c, path in enumerate(files):
        nib.save(nib.Nifti1Image(image[..., c].transpose(2, 1, 0), affine), path)
    of_files = predictor.predict([str(path) for path in files])
    np.testing.assert_array_equal(of_files.label, found.label)
    of_files.save(tmp_path / "saved.nii.gz")
    saved = nib.load(tmp_path / "saved.nii.gz")
    np.testing.assert_array_equal(saved.affine, affine)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), found.label.transpose(2, 1, 0))
    with pytest.raises(UserError, match=r"array.*predict from a file"):
        found.save(tmp_path / "no.nii.gz")
    with pytest.raises(UserError, match=r"\.nii\.gz or \.nii"):
        of_files.save(tmp_path / "no.png")

    volume = np.random.default_rng(1).integers(-500, 500, (5, 40, 36)).astype(np.int16)
    write_series(tmp_path / "series", volume, (2.0, 0.7, 0.7))
    by_slice = xdim_jax.Predictor(flat)
    expected = by_slice.predict(volume.astype(np.float32), "zyx", (2.0, 0.7, 0.7)).label
    np.testing.assert_array_equal(by_slice.predict(tmp_path / "series").label, expected)

    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        shutil.copy(files[0], tmp_path / "two" / f"{name}.nii.gz")
    cases, problems = by_slice.find_cases(tmp_path / "two")
    assert [c.case_id for c in cases] == ["a", "b"] and not problems
    with pytest.raises(UserError, match=r"has 2 cases \(a, b\)"):
        by_slice.predict(tmp_path / "two")
    with pytest.raises(UserError, match="absent: no such file"):
        by_slice.predict(tmp_path / "absent")
    with pytest.raises(UserError, match="files have their own"):
        by_slice.predict(tmp_path / "series", spacing=(9, 9, 9))
    for nothing, words in (([], "shape (0,)"), (None, "object"), ("", "a path is empty")):
        with pytest.raises(UserError, match=re.escape(words)):
            by_slice.predict(nothing)
    of_device = by_slice.predict(jnp.asarray(volume, jnp.float32), "zyx", (2.0, 0.7, 0.7))
    np.testing.assert_array_equal(of_device.label, expected)


def test_one_axis_and_one_region_for_several(workdir):
    one = xdim_jax.Predictor(workdir, flips=2, largest="all")
    assert one.settings.flips == (2,) and one.settings.largest == ("all",)
    assert one.digest == xdim_jax.Predictor(workdir, flips=(2,), largest=("all",)).digest


def test_memory_is_said_before_and_grows_with_the_largest(flat, tmp_path, capsys):
    ready = xdim_jax.Predictor(flat)
    sizes = []
    for name, side in (("small", 64), ("large", 128)):
        nib.save(nib.Nifti1Image(np.zeros((side, side, 10), np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
        sizes.append(
            memory.required_bytes(ready, [data_case.case_from_files([tmp_path / f"{name}.nii.gz"], ready.dataset)])
        )
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    cases, _ = ready.find_cases(tmp_path)
    host, device = memory.required_bytes(ready, cases)
    assert sizes[0][0] == 64 * 64 * 10 * 6, "int16 as read and float32; float32 and the int16 that stays"
    assert sizes[1][0] == 4 * sizes[0][0] and device == sizes[1][1] > sizes[0][1]
    # the next is read while one is predicted and the last is written
    assert host == 128 * 128 * 10 * (6 + 2 + 4 + 4)
    assert memory.required_bytes(ready, cases[:1]) == (0, 0), "broken"
    assert memory.log_required_memory(ready, cases) > host + device
    assert "memory     at most" in capsys.readouterr().out


def test_weights_that_a_run_replaces_meanwhile_are_read_again(workdir, tmp_path, monkeypatch):
    """The folder goes away while it is read, as when a better validation is saved: the new one is taken."""
    run = shutil.copytree(workdir, tmp_path / "run")
    read = checkpoint._read

    def replaced(folder, weights):
        if folder.parent.name == "1":
            folder.parent.rename(run / "best" / "7")
        return read(folder, weights)

    monkeypatch.setattr(checkpoint, "_read", replaced)
    assert xdim_jax.Predictor(run).sources == [f"{run}, best validation, step 7"]

    def half_gone(folder, weights):
        """Files go before folders do."""
        if folder.parent.name == "7":
            shutil.copytree(folder.parent, run / "best" / "9")
            for file in folder.rglob("*"):
                if file.is_file():
                    file.unlink()
        return read(folder, weights)

    monkeypatch.setattr(checkpoint, "_read", half_gone)
    assert xdim_jax.Predictor(run).sources == [f"{run}, best validation, step 9"]

    def damaged(folder, weights):
        raise OSError("bad sector")

    monkeypatch.setattr(checkpoint, "_read", damaged)
    with pytest.raises(UserError, match="or is damaged: bad sector"):
        xdim_jax.Predictor(run)


def test_what_a_killed_run_left_half_written_is_removed(flat, tmp_path):
    volume = np.random.default_rng(1).integers(0, 100, (36, 40, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    (out / "uncertainty").mkdir(parents=True)
    left = [out / ".0a1b2c3d.partial.a.nii.gz", out / "uncertainty" / ".0a1b2c3d.partial.a.nii"]
    other = out / ".0a1b2c3d.partial.ab.nii.gz"  # of another case, which another host may be writing
    for path in (*left, other):
        path.write_bytes(b"half")
    assert predict.main([f"--workdir={flat}", f"--input={tmp_path / 'a.nii.gz'}", f"--output={out}"]) == 0
    assert not any(path.exists() for path in left) and other.exists()


@pytest.mark.parametrize("order", ["<", ">"])
def test_probabilities_of_files_of_either_byte_order(order, flat, tmp_path):
    volume = np.random.default_rng(1).integers(0, 100, (36, 40, 3)).astype(f"{order}i2")
    image = nib.Nifti1Image(volume, np.eye(4), nib.Nifti1Header(endianness=order))
    nib.save(image, tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").header.endianness == order
    out = tmp_path / "out"
    assert (
        predict.main([f"--workdir={flat}", f"--input={tmp_path / 'a.nii.gz'}", f"--output={out}", "--probabilities"])
        == 0
    )
    found = nib.load(out / "probabilities" / "a.nii").get_fdata()
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_a_bad_case_does_not_keep_the_memory_from_being_said(flat, tmp_path, monkeypatch, capsys):
    ready = xdim_jax.Predictor(flat)

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room")

    monkeypatch.setattr(ready.groups[0].segmenter, "device_bytes", full)
    nib.save(nib.Nifti1Image(np.zeros((36, 40, 3), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    assert predict_cases(ready, ready.find_cases(tmp_path / "a.nii.gz")[0], tmp_path / "out") == []
    assert re.search("warning: .*memory.*RuntimeError", capsys.readouterr().out)


def test_settings_that_are_given_may_differ_between_the_runs_of_an_ensemble(tmp_path):
    workdirs = [make_workdir(tmp_path / name) for name in "ab"]
    config = json.loads((workdirs[1] / CONFIG_FILE).read_text())
    config["predict"]["threshold"] = 0.4
    write_json(workdirs[1] / CONFIG_FILE, config)
    assert len(xdim_jax.Predictor(workdirs).workdirs) == 2, "a softmax does not use the threshold"
    configs = [read_config(workdir) for workdir in workdirs]
    for c in configs:
        c.output = "sigmoid"
    with pytest.raises(UserError, match=r"predict\.threshold.*--threshold"):
        check_common(workdirs, configs, Settings())
    check_common(workdirs, configs, Settings(threshold=0.5))
    check_common(workdirs, configs, Settings(threshold={"organ": 0.5, "lesion": 0.3}))
    with pytest.raises(UserError, match=r"predict\.threshold.*--threshold"):  # the lesion has no threshold in common
        check_common(workdirs, configs, Settings(threshold={"organ": 0.5}))


def test_regions_in_another_order_are_other_channels_of_sigmoids(tmp_path):
    workdirs = [make_workdir(tmp_path / name) for name in "ab"]
    described = json.loads((workdirs[1] / DATA_FILE).read_text())
    described["regions"] = dict(reversed(described["regions"].items()))
    write_json(workdirs[1] / DATA_FILE, described)
    configs = [read_config(workdir) for workdir in workdirs]
    check_common(workdirs, configs, Settings())  # the channels of a softmax are in the order of the labels
    for c in configs:
        c.output = "sigmoid"
    with pytest.raises(UserError, match="regions of the data differ"):
        check_common(workdirs, configs, Settings())


def test_a_network_that_computes_nan_fails(flat, tmp_path, capsys):
    """Damaged weights: no case gets a label map without structures."""
    broken = shutil.copytree(flat, tmp_path / "run")
    config = read_config(broken)
    _, params, stats = split_model(networks.build(config.model, seed=0))
    shutil.rmtree(broken / "best")
    checkpoints = checkpoint.open_checkpoints(broken)
    checkpoint.save_best(checkpoints, 1, jax.tree.map(lambda a: a * np.nan, params), stats, 0.5)
    checkpoint.close(checkpoints)
    nib.save(nib.Nifti1Image(np.zeros((36, 40, 3), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    command = [f"--workdir={broken}", f"--input={tmp_path / 'a.nii.gz'}", f"--output={tmp_path / 'out'}"]
    assert predict.main(command) == 1
    assert "case a omitted" in (out := capsys.readouterr().out) and "NaN" in out
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_an_image_with_the_name_size_and_time_of_another_is_not_skipped(flat, tmp_path, capsys):
    """Two patients, exported to files of the same name, as some archives do."""
    for patient, value in (("p", 1), ("q", 2)):
        (tmp_path / patient).mkdir()
        path = tmp_path / patient / "CT.nii"
        nib.save(nib.Nifti1Image(np.full((36, 40, 3), value, np.int16), np.eye(4)), path)
        os.utime(path, (1, 1))
    command = [f"--workdir={flat}", f"--output={tmp_path / 'out'}"]
    assert predict.main([*command, f"--input={tmp_path / 'p' / 'CT.nii'}"]) == 0
    with pytest.raises(UserError, match=r"p.CT\.nii; .*q.CT\.nii would replace it"):
        predict.main([*command, f"--input={tmp_path / 'q' / 'CT.nii'}"])
    shutil.copytree(tmp_path / "p", tmp_path / "r")  # a copy of the image
    capsys.readouterr()
    assert predict.main([*command, f"--input={tmp_path / 'r' / 'CT.nii'}"]) == 0
    assert "skipped    1 of 1" in capsys.readouterr().out


def test_one_volume_for_the_components_of_all_regions(workdir):
    settings = Settings(min_volume=0.5)
    assert xdim_jax.Predictor(workdir, settings).resolved.min_volume == {"organ": 0.5, "lesion": 0.5}
    with pytest.raises(UserError, match="min_volume"):
        xdim_jax.Predictor(workdir, min_volume=-1)


def test_a_warning_about_a_file_is_given_in_python_too(flat, tmp_path, capsys):
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 3), np.float32), None), tmp_path / "a.nii.gz")
    xdim_jax.Predictor(flat).predict(tmp_path / "a.nii.gz")
    assert "sform" in capsys.readouterr().out


def test_an_address_in_a_bucket_is_no_local_path():
    with pytest.raises(UserError, match=r"gs://bucket/run.*xdim_jax\.predict"):
        xdim_jax.Predictor("gs://bucket/run")


def test_components_are_measured_by_the_volume_of_sheared_voxels(flat):
    """A gantry tilt of 60 degrees halves the volume of a voxel: 4 voxels of 1 ml are then 2 ml."""
    predictor = xdim_jax.Predictor(flat, min_volume=3)
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    affine[1:3, 2] = 10 * np.sqrt(0.75), 5
    label = np.zeros((3, 20, 20), np.uint8)
    label[0, 2:4, 2:4] = 1
    predictor.groups = [dataclasses.replace(predictor.groups[0], segmenter=lambda *_: label.copy())]
    for grid, kept in ((Grid((20, 20, 3), np.diag([10.0, 10.0, 10.0, 1.0])), 4), (Grid((20, 20, 3), affine), 0)):
        assert np.count_nonzero(predictor.segment([None], grid)) == kept


@pytest.mark.parametrize("name", ["a.nii.gz", "probabilities/a.nii", "uncertainty/a.nii"])
@pytest.mark.parametrize("other", ["a hand-drawn label map", "another network"])
def test_a_file_that_another_process_writes_meanwhile_is_kept(name, other, flat, tmp_path, monkeypatch, capsys):
    ready, out = xdim_jax.Predictor(flat, probabilities=True, uncertainty=True, flips=(2,)), tmp_path / "out"
    nib.save(nib.Nifti1Image(np.zeros((36, 40, 3), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    theirs = nib.Nifti1Image(np.ones((36, 40, 3), np.uint8), np.eye(4))
    if other == "another network":
        theirs.header["descrip"] = b"xdim_jax 0123456789abcdef 0123456789abcdef"
    segment = ready.segment

    def meanwhile(*arguments):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(theirs, out / name)
        return segment(*arguments)

    monkeypatch.setattr(ready, "segment", meanwhile)
    assert predict_paths(ready, [tmp_path / "a.nii.gz"], out) == ["a"]
    assert "written by another process" in capsys.readouterr().out
    np.testing.assert_array_equal(nib.load(out / name).get_fdata(), 1)
    assert sorted(p for p in out.rglob("*.nii*")) == [out / name]  # no file of the case that does not belong to it


def test_processes_that_predict_into_one_folder_at_the_same_time_record_all_cases(flat, tmp_path, monkeypatch):
    for name in "abcdef":
        nib.save(nib.Nifti1Image(np.zeros((36, 40, 3), np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    write, ready = folder.write_json, xdim_jax.Predictor(flat)
    monkeypatch.setattr(folder, "write_json", lambda *a: (time.sleep(0.2), write(*a)))  # after the record was read
    found = [ready.find_cases(tmp_path / f"{name}.nii.gz")[0] for name in "abcdef"]
    with concurrent.futures.ThreadPoolExecutor(6) as jobs:  # a lock is of an open file, so threads are like processes
        list(jobs.map(lambda cases: folder.claim_output(tmp_path / "out", ready, cases, cases), found))
    assert set(json.loads((tmp_path / "out" / PREDICT_FILE).read_text())["images"]) == set("abcdef")
