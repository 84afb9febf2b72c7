"""Weights files, load_model, and weights in a training run's network."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import xdim_jax
from tests import twins
from tests.conftest import toy_model
from tests.parity import ds_case
from tests.random_weights import make_encoder, make_omnianet
from weight_port import authors
from weight_port.sources import Source
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.nets import networks, weights
from xdim_jax.nets.functional import split_model
from xdim_jax.nets.inflate import Inflation
from xdim_jax.nets.weights import Weights, read_weights, write_weights
from xdim_jax.train import main as train_main
from xdim_jax.training.initial_weights import read_named


def float32(w):
    return Weights(w.kind, w.model, {n: a.astype(np.float32) for n, a in w.arrays.items()}, w.unused, w.source)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """An Omnia-Net's weights in a file."""
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    write_weights(path, float32(make_omnianet()))
    return path


def test_a_file_keeps_everything(tmp_path):
    w = float32(make_encoder())
    w = Weights(
        w.kind, w.model, w.arrays, {"fc.weight": np.ones((2, 3)), "n": np.int64(7) * np.ones((), int)}, {"file": "x"}
    )
    write_weights(tmp_path / "w.safetensors", w)
    back = read_weights(tmp_path / "w.safetensors")
    assert (back.kind, back.model, back.source, back.names) == (w.kind, w.model, w.source, None)
    for found, kept in ((back.arrays, w.arrays), (back.unused, w.unused)):
        assert found.keys() == kept.keys()
        assert all(
            found[n].dtype == kept[n].dtype and (found[n] == kept[n]).all() and found[n].shape == kept[n].shape
            for n in kept
        )


def test_two_lines_from_a_file_to_a_prediction(network):
    """Two lines; the twin in PyTorch agrees; and the model is a pure function that JAX can transform."""
    image = np.random.default_rng(0).normal(size=(2, 64, 96, 2)).astype(np.float32)
    model = xdim_jax.load_model(network)
    logits = model(image)
    assert logits.shape == (2, 64, 96, 3)
    features = model.features(image)
    assert [f.shape[1:3] for f in features] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    assert model.config["name"] == "omnianet" and model.config["encoder"]["eps"] == 1e-3
    np.testing.assert_allclose(jax.jit(model)(image), logits, rtol=1e-5, atol=1e-4)
    grad = jax.grad(lambda x: jnp.sum(model(x)))(jnp.asarray(image))
    assert grad.shape == image.shape and float(jnp.abs(grad).max()) > 0


@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_images_of_either_byte_order(network, order):
    model = xdim_jax.load_model(network)
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 2)).astype(np.float32)
    np.testing.assert_array_equal(model(image.astype(order)), model(image))


def test_a_twins_weights_predict_what_the_twin_does(tmp_path):
    import torch

    twin = twins.randomise(twins.Omnia("b0", 1, 4, filters=(8,) * 5), 0).eval()
    state = {n: t.numpy() for n, t in twin.state_dict().items()}
    write_weights(tmp_path / "w.safetensors", authors.convert(Source(state, {"file": "x"}), "omnianet-b0"))
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 1)).astype(np.float32)
    with torch.no_grad():
        expected = twin(torch.from_numpy(image.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    found = xdim_jax.load_model(str(tmp_path / "w.safetensors"))(image)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_an_encoder_has_features_but_no_logits(tmp_path):
    write_weights(tmp_path / "enc.safetensors", float32(make_encoder()))
    model = xdim_jax.load_model(tmp_path / "enc.safetensors")
    assert len(model.features(np.zeros((1, 33, 47, 3), np.float32))) == 5
    with pytest.raises(ValueError, match=r"enc.safetensors .* efficientnet_toy.* features"):
        model(np.zeros((1, 32, 32, 3), np.float32))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((64, 64, 2), np.float32), r"shape \(64, 64, 2\).*\(batch, H, W, 2\)"),
        (np.zeros((1, 2, 64, 64), np.float32), r"shape \(1, 2, 64, 64\).*\(batch, H, W, 2\)"),
        (np.zeros((1, 64, 64, 2), np.int16), "int16"),
        (np.zeros((1, 64, 80, 2), np.float32), r"axis W is 80: 5 at level 1/16 cannot be halved; use 64 or 96"),
    ],
)
def test_a_wrong_image_is_explained(network, image, words):
    with pytest.raises(ValueError, match=words):
        xdim_jax.load_model(network)(image)


def test_a_file_that_is_not_weights_is_explained(network, tmp_path):
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(network.read_bytes()[:5000])
    for name, words in {
        "none.safetensors": "none.safetensors does not exist.*python -m weight_port",
        "other.safetensors": "other.safetensors.*python -m weight_port",
        "cut.safetensors": "cut.safetensors is not a complete",
    }.items():
        with pytest.raises(UserError, match=words):
            xdim_jax.load_model(tmp_path / name)
    with pytest.raises(UserError, match=f"{tmp_path} is not the workdir"):
        xdim_jax.load_model(tmp_path)


def test_a_file_that_lacks_a_leaf_is_not_loaded(network, tmp_path):
    w = read_weights(network)
    w.arrays.pop("encoder.blocks.0.0.bn1.scale")
    write_weights(tmp_path / "w.safetensors", w)
    with pytest.raises(UserError, match=r"only in the network \(1\): encoder.blocks.0.0.bn1.scale"):
        xdim_jax.load_model(tmp_path / "w.safetensors")


def test_import_is_light():
    """The package alone imports neither JAX nor torch; load_model is there when asked for."""
    code = "import sys, xdim_jax; print('jax' in sys.modules, 'torch' in sys.modules); xdim_jax.load_model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# -- into a network ---------------------------------------------------------------------------------------------------


def built(section):
    """Parameters and statistics of a network; each network is built once."""
    return jax.tree.map(lambda a: a, _built(json.dumps(section, sort_keys=True)))


@functools.cache
def _built(text):
    _, params, stats = split_model(networks.build(json.loads(text), seed=0))
    return params, stats


def test_an_encoder_goes_into_a_3d_network():
    """Inflated, 3 channels to the 8 of the first block, batch norm to instance norm; the rest stays as it was."""
    encoder = float32(make_encoder(eps=1e-3))
    section = toy_model(eps=1e-3)
    params, stats = built(section)
    new, new_stats, done = weights.load(section, params, stats, encoder, inflation=Inflation("mean"))
    kernel = encoder.arrays["blocks.2.0.conv_dw.kernel"]
    for tap in range(5):
        np.testing.assert_allclose(new["encoder"]["blocks"][2][0]["conv_dw"]["kernel"][tap], kernel / 5, rtol=1e-6)
    assert (new["encoder"]["bn1"]["scale"] == encoder.arrays["bn1.scale"]).all()
    assert new_stats == {} == stats
    stem = np.asarray(new["encoder"]["conv_stem"]["kernel"])
    np.testing.assert_allclose(stem[1, :, :, 7], encoder.arrays["conv_stem.kernel"][:, :, 1] * 3 / 8 / 3, rtol=1e-6)
    assert (new["last"]["kernel"] == params["last"]["kernel"]).all()
    assert done["encoder.bn1.var"].startswith("dropped")


def test_a_file_of_every_network_is_read_again(tmp_path):
    for recipe in ("camus_omnianet", "brats_dsnet", "brats_dxnet"):
        model = load_config(f"{recipe}:scratch", []).model.to_dict()
        source = weights.Weights("network", model, {"a": np.zeros(1)})
        weights.write_weights(tmp_path / "a.safetensors", source)
        again = weights.read_weights(tmp_path / "a.safetensors")
        assert again.kind == "network" and again.model == networks.plain_dict(model)
        shorter = {k: v for k, v in model.items() if k != "deep_supervision"}
        assert not weights.network_differences(source, shorter), recipe


def test_an_encoder_without_its_stem_is_an_error():
    encoder = float32(make_encoder(eps=1e-3))
    part = {name: a for name, a in encoder.arrays.items() if name != "conv_stem.kernel"}
    section = toy_model(eps=1e-3)
    with pytest.raises(UserError, match=r"lack conv_stem\.kernel"):
        weights.load(section, *built(section), dataclasses.replace(encoder, arrays=part))


def test_an_affine_norm_becomes_one_without_scale():
    encoder = float32(make_encoder(norm="instance"))
    section = toy_model(eps=1e-3) | {"norm": "instance_noaffine"}
    new, _, done = weights.load(section, *built(section), encoder, inflation=Inflation("centre"))
    assert done["encoder.bn1.bias"].startswith("dropped") and "bn1" not in new["encoder"]
    with pytest.raises(UserError, match=r"statistics for batch norm are missing.*model\.norm=instance"):
        section = toy_model(eps=1e-3) | {"norm": "batch"}
        weights.load(section, *built(section), encoder)


@pytest.mark.parametrize(
    ("options", "encoder", "words"),
    [
        ({"eps": 1e-5}, {}, "trained with eps=0.001, the network has eps=1e-05: .*accept=eps"),
        ({"eps": 1e-3}, {"padding": "same"}, "trained with padding=same, the network has padding=symmetric"),
        (
            {"eps": 1e-3, "name": "efficientnet_b0"},
            {},
            "efficientnet_toy, but the network's encoder is efficientnet_b0",
        ),
    ],
)
def test_an_encoder_trained_otherwise_is_refused(options, encoder, words):
    section = toy_model(**options)
    params, stats = built(section)
    with pytest.raises(UserError, match=words):
        weights.load(section, params, stats, make_encoder(**encoder))


@pytest.mark.parametrize("axis", [0, 2])
def test_the_networks_depth_axis_decides_where_taps_go(axis):
    section = toy_model(eps=1e-3) | {"depth": {"axis": axis, "padding": "edge"}}
    params, stats = built(section)
    new, _, _ = weights.load(section, params, stats, float32(make_encoder()), inflation=Inflation("centre"))
    kernel = np.asarray(new["encoder"]["blocks"][2][0]["conv_dw"]["kernel"])
    held = np.abs(kernel).sum(tuple(i for i in range(5) if i != axis))
    assert (held[[0, 1, 3, 4]] == 0).all() and held[2] > 0


def test_a_3d_encoder_with_another_depth_treatment_is_refused():
    flat = float32(make_encoder())
    section = {
        **flat.model,
        "ndim": 3,
        "depth": {"axis": 0, "padding": "edge", "squeeze": "volume", "strides": (2,) * 5},
    }
    deep, _ = weights.adapt_encoder(flat, section, inflation=Inflation())
    params, stats = built(toy_model(eps=1e-3))
    with pytest.raises(UserError, match=r"depth=.*'edge'.*depth=.*'zero'"):
        weights.load(toy_model(eps=1e-3), params, stats, deep)
    weights.load(toy_model(eps=1e-3), params, stats, deep, accept=("depth",))


def test_kernels_that_were_inflated_along_another_axis_are_never_accepted():
    flat = float32(make_encoder())
    depth = {"axis": 0, "padding": "zero", "squeeze": "volume", "strides": (2,) * 5}
    deep, _ = weights.adapt_encoder(flat, {**flat.model, "ndim": 3, "depth": depth}, inflation=Inflation())
    section = toy_model(eps=1e-3) | {"depth": {"axis": 2}}
    params, stats = built(section)
    with pytest.raises(UserError, match=r"along axis 0.*is 2"):
        weights.load(section, params, stats, deep, accept=("depth",))


def test_an_encoder_with_layer_norms_fits_a_network_with_batch_norm():
    """ConvNeXt has no batch norm, whatever the config of the network says."""
    section = {"name": "convnext_tiny", "in_channels": 3, "ndim": 2, "padding": "symmetric", "eps": 1e-6}
    assert not weights.has_batch_norm({**section, "norm": "batch"})
    assert weights.has_batch_norm({**section, "name": "efficientnet_toy", "norm": "batch"})
    assert not weights.has_batch_norm({**section, "name": "efficientnet_toy", "norm": "instance"})


def test_differences_between_networks_can_be_accepted_and_are_listed():
    made = float32(make_omnianet())
    section = {**made.model, "encoder": {**made.model["encoder"], "eps": 0.5}, "activation": "silu"}
    assert len(weights.network_differences(made, section)) == 2
    (left,) = weights.network_differences(made, section, accept=("eps",))
    assert "activation" in left
    params, stats = built(section)
    with pytest.raises(UserError, match=r"(?s)activation.*config\.init\.accept"):
        weights.load(section, params, stats, made, accept=("eps",))
    same_activation = {**section, "activation": made.model["activation"]}
    weights.load(same_activation, params, stats, made, accept=("eps",))
    with pytest.raises(UserError, match="unknown property to accept: foo"):
        weights.load(section, params, stats, made, accept=("foo",))


def test_an_absent_depth_section_is_the_default_one():
    volume = toy_model() | {"name": "dxnet"}
    params, stats = built(volume)
    arrays = {n: np.asarray(a) for n, a in (weights.flatten(params) | weights.flatten(stats)).items()}
    made = Weights("network", {k: v for k, v in volume.items() if k != "depth"}, arrays)
    assert weights.network_differences(made, {**volume, "depth": {"axis": 0}}) == []
    with pytest.raises(UserError, match="axis"):
        weights.load({**volume, "depth": {"axis": 1}}, params, stats, made, require=False)
    plane = float32(make_omnianet())
    weights.load(
        volume | {"norm": plane.model["norm"]}, *built(volume | {"norm": plane.model["norm"]}), plane, require=False
    )


@pytest.mark.parametrize("name", ["earlier", "b0.safetensor"])
def test_a_name_that_is_nothing_says_what_is_expected(name):
    with pytest.raises(UserError, match=r"no file or folder.*workdir of a run") as error:
        read_named(name)
    assert "--from-file" not in str(error.value)


def test_a_cross_validation_is_no_single_run(tmp_path):
    (tmp_path / "fold0").mkdir()
    (tmp_path / "fold0" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cross-validation.*fold0"):
        read_named(f"{tmp_path}")


def test_a_damaged_description_is_explained(network, tmp_path):
    w = read_weights(network)
    write_weights(tmp_path / "w.safetensors", Weights(w.kind, {**w.model, "name": "unet"}, w.arrays))
    with pytest.raises(UserError, match=r"w.safetensors: .*'unet'"):
        xdim_jax.load_model(tmp_path / "w.safetensors")
    save_file(
        {"a": np.zeros(3)}, tmp_path / "v.safetensors", metadata={"xdim_jax": json.dumps({"format": weights.FORMAT})}
    )
    with pytest.raises(UserError, match=r"v.safetensors.* kind, model, source"):
        xdim_jax.load_model(tmp_path / "v.safetensors")


def test_a_file_with_damaged_names_is_explained(tmp_path):
    w = float32(make_omnianet())
    record = {"format": weights.FORMAT, "kind": w.kind, "model": w.model, "source": {}}
    for names in ({"channels": ["a", "b"]}, 3):
        header = {"xdim_jax": json.dumps(record | {"names": names})}
        save_file({"a": np.zeros(3)}, tmp_path / "w.safetensors", metadata=header)
        with pytest.raises(UserError, match=r"w.safetensors.*channels, outputs, activation"):
            read_weights(tmp_path / "w.safetensors")


def test_a_difference_may_be_accepted():
    section = toy_model(eps=1e-5)
    params, stats = built(section)
    source = float32(make_encoder(padding="same"))
    with pytest.raises(UserError, match="2 properties"):
        weights.load(section, params, stats, source)
    weights.load(section, params, stats, source, accept=("eps", "padding"))
    with pytest.raises(UserError, match=r"stride.* padding, eps, depth"):
        weights.load(section, params, stats, source, accept=("stride",))


def test_a_network_goes_into_the_same_network_only():
    w = float32(make_omnianet())
    section = {**w.model, "encoder": {**w.model["encoder"], "drop_path": 0.2}}
    params, stats = built(section)
    new, _, done = weights.load(section, params, stats, w)
    assert (new["last"]["bias"] == w.arrays["last.bias"]).all() and set(done.values()) == {"copied"}
    with pytest.raises(UserError, match=r"activation.*'relu'.*'silu'"):
        weights.load({**section, "activation": "silu"}, params, stats, w)
    encoder = weights.encoder_weights(w)
    assert encoder.kind == "encoder" and encoder.model["in_channels"] == 8
    weights.load({**section, "activation": "silu"}, params, stats, encoder)


def test_dsnets_encoder_is_found():
    section = ds_case()[0]
    prefix, encoder = weights.encoder_section(section)
    assert prefix == "inner.encoder." and (encoder["ndim"], encoder["in_channels"]) == (2, 3)
    params, stats = built(section)
    new, _, _ = weights.load(section, params, stats, float32(make_encoder(eps=1e-5)))
    np.testing.assert_array_equal(
        new["inner"]["encoder"]["conv_stem"]["kernel"], float32(make_encoder()).arrays["conv_stem.kernel"]
    )


# -- through the mains ------------------------------------------------------------------------------------------------

RECIPE = "configs/brats_dxnet.py:phantom"
TOY = [
    "--config.model.encoder.name=efficientnet_toy",
    "--config.model.filters=16,16,8,8,8",
    "--config.data.patch=32,32,64",
    "--config.data.phantom.cases=5",
    "--config.data.phantom.held_out=0",
    "--config.data.phantom.shape=40,48,40",
    "--config.train.epochs=1",
    "--config.optim.schedule.constant_epochs=1",
]


def train(workdir, *arguments):
    command = [sys.executable, "-m", "xdim_jax.train", f"--config={RECIPE}", f"--workdir={workdir}", *TOY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_training_starts_from_ported_weights_and_its_workdir_is_a_model(tmp_path):
    """An encoder into training; the run resumes without the file; its workdir loads; and goes back to a file."""
    from weight_port.__main__ import main as port

    path = tmp_path / "enc.safetensors"
    write_weights(path, float32(make_encoder(eps=1e-5)))
    text = train(tmp_path / "run", f"--config.init.weights={path}", "--config.init.inflate=repeat")
    assert f"weights    {path}: fills 100 % " in text and "31 axis added, 1 channels by cycle then repeat" in text
    path.unlink()
    assert "weights    from the last checkpoint" in train(
        tmp_path / "run", f"--config.init.weights={path}", "--config.init.inflate=repeat"
    )
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 64, 4)).astype(np.float32)
    logits = xdim_jax.load_model(tmp_path / "run")(image)
    assert logits.shape == (1, 32, 32, 64, 3)
    out = tmp_path / "net.safetensors"
    assert port(["--source=xdim", f"--from-file={tmp_path / 'run'}", f"--out={out}"]) == 0
    np.testing.assert_array_equal(xdim_jax.load_model(out)(image), logits)
    assert json.loads(out.with_suffix(".json").read_text())["source"]["from"] == "xdim_jax"
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.init.weights=/nowhere.safetensors"], ["/nowhere.safetensors does not exist"]),
        (["--config.init.weights={enc}"], ["eps=0.001, the network has eps=1e-05", "config.init.accept"]),
        (["--config.init.inflate=median"], ["config.init.inflate='median'", "mean, repeat"]),
    ],
)
def test_weights_that_do_not_fit_are_explained(arguments, words, tmp_path):
    write_weights(tmp_path / "enc.safetensors", float32(make_encoder(eps=1e-3)))
    options = [a.format(enc=tmp_path / "enc.safetensors") for a in arguments]
    with pytest.raises(UserError) as error:
        train_main([f"--config={RECIPE}", f"--workdir={tmp_path / 'run'}", *TOY, *options])
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "run" / "phantom").exists()
