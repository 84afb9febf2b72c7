"""A trained network as the start for other channels, other structures and other depth strides."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TOY_MODEL
from tests.test_predictor import make_workdir
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.inference.model import read_file_or_workdir
from xdim_jax.nets import fine_tuning, networks, weights
from xdim_jax.nets.fine_tuning import Names
from xdim_jax.nets.functional import make_forward, split_model
from xdim_jax.nets.inflate import Inflation
from xdim_jax.nets.weights import flatten
from xdim_jax.runs.workdir import CONFIG_FILE
from xdim_jax.training.initial_weights import initialise

OUTPUTS = ("background", "organ", "lesion")  # of make_workdir
rng = np.random.default_rng(0)


def section_of(workdir, **changes):
    section = json.loads((workdir / CONFIG_FILE).read_text())["model"]
    return section | changes


def with_depth(section, **changes):
    return section | {"depth": section["depth"] | changes}


def forward_of(section):
    """The forward function, parameters and statistics of a network; each network is built and compiled once."""
    forward, *trees = _forward_of(json.dumps(section, sort_keys=True))
    return forward, *jax.tree.map(lambda a: a, trees)


@functools.cache
def _forward_of(text):
    graphdef, params, stats = split_model(networks.build(json.loads(text), seed=5))
    return jax.jit(make_forward(graphdef, jnp.float32)), params, stats


def adapted(workdir, section, names, **options):
    forward, params, stats = forward_of(section)
    source = read_file_or_workdir(workdir)
    params, stats, done = weights.load(section, params, stats, source, names=names, **options)
    return lambda image: np.asarray(forward((params, stats), jnp.asarray(image))), flatten(params), done


@pytest.fixture(scope="module", params=[True, False], ids=["2D", "3D"])
def trained(request, tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("tuned") / "run", flat=request.param, seed=1)


def image_for(workdir, channels):
    size = (32, 32) if len(json.loads((workdir / CONFIG_FILE).read_text())["data"]["patch"]) == 2 else (32, 32, 32)
    return rng.standard_normal((1, *size, channels)).astype(np.float32)


def test_other_order_of_channels_and_structures(trained):
    """The same network: channels and structures exchanged on both sides give the same logits."""
    image = image_for(trained, 2)
    before, _, _ = adapted(trained, section_of(trained), Names(("T1", "T2"), OUTPUTS, "softmax"))
    names = Names(("T2", "T1"), ("background", "lesion", "organ"), "softmax")
    after, _, done = adapted(trained, section_of(trained), names)
    np.testing.assert_allclose(after(image[..., ::-1]), before(image)[..., [0, 2, 1]], rtol=1e-4, atol=1e-5)
    assert done["last.kernel"] == "kept background, lesion, organ" and done["conv.kernel"] == "kept T2, T1"


def test_new_channels_and_structures_leave_the_shared_part(trained):
    """Without a signal in the new channel, the outputs that both networks have are the same."""
    image = image_for(trained, 2)
    before, _, _ = adapted(trained, section_of(trained), Names(("T1", "T2"), OUTPUTS, "softmax"))
    names = Names(("T1", "PET", "T2"), ("background", "vessel", "organ", "nerve", "lesion"), "softmax")
    section = section_of(trained, in_channels=3, out_channels=5)
    after, params, done = adapted(trained, section, names)
    wider = np.stack([image[..., 0], np.zeros_like(image[..., 0]), image[..., 1]], -1)
    np.testing.assert_allclose(after(wider)[..., [0, 2, 4]], before(image), rtol=1e-4, atol=1e-5)
    _, fresh, _ = forward_of(section)
    np.testing.assert_array_equal(params["last.kernel"][..., [1, 3]], flatten(fresh)["last.kernel"][..., [1, 3]])
    kernel = np.asarray(params["conv.kernel"])
    np.testing.assert_allclose(kernel[..., 1, :], (kernel[..., 0, :] + kernel[..., 2, :]) / 2, atol=1e-6)
    assert "random vessel, nerve" in done["last.bias"] and "PET" in done["conv.kernel"]


def test_another_activation_draws_the_outputs_anew(trained):
    section = section_of(trained, out_channels=2)
    _, params, done = adapted(trained, section, Names(("T1", "T2"), ("organ", "lesion"), "sigmoid"))
    _, fresh, _ = forward_of(section)
    np.testing.assert_array_equal(params["last.kernel"], flatten(fresh)["last.kernel"])
    assert done["last.kernel"].startswith("random: ") and done["conv.kernel"] == "copied"


def test_more_depth_strides_give_the_same_for_equal_slices(tmp_path):
    """With stride 2 instead of 1, both planes of a transposed kernel are equal: constant volumes remain constant."""
    workdir = make_workdir(tmp_path / "run", seed=2)
    config = json.loads((workdir / CONFIG_FILE).read_text())
    config["model"] = with_depth(config["model"], strides=(1, 1, 2, 2, 2), padding="edge", squeeze="slice")
    names = Names(("T1", "T2"), OUTPUTS, "softmax")
    # weights of a network with these strides, in the workdir of another one
    section = networks.plain_dict(config["model"])
    more = networks.plain_dict(with_depth(section, strides=(2, 2, 2, 2, 2)))
    forward, params, stats = forward_of(section)
    other, new, new_stats = forward_of(more)
    arrays = {name: np.asarray(a) for name, a in (flatten(params) | flatten(stats)).items()}
    for name in arrays:  # random planes would make equal slices different
        if ".trans." in name:
            arrays[name] = np.broadcast_to(arrays[name].mean(0, keepdims=True), arrays[name].shape)
    params = weights.replace_leaves(params, arrays)
    source = weights.Weights("network", section, arrays, names=names)
    new, new_stats, done = weights.load(more, new, new_stats, source, names=names)
    image = np.repeat(rng.standard_normal((1, 1, 32, 32, 2)).astype(np.float32), 32, 1)
    expected = np.asarray(forward((params, stats), jnp.asarray(image)))
    np.testing.assert_allclose(np.asarray(other((new, new_stats), jnp.asarray(image))), expected, rtol=1e-3, atol=1e-4)
    assert sum(what == "adapted to other depth strides" for what in done.values()) == 2

    # and back: the mean over the planes, which are equal here, is the kernel itself
    back, back_stats, _ = weights.load(
        section,
        params,
        stats,
        weights.Weights(
            "network", more, {n: np.asarray(a) for n, a in (flatten(new) | flatten(new_stats)).items()}, names=names
        ),
        names=names,
    )
    for name, array in (flatten(back) | flatten(back_stats)).items():
        np.testing.assert_allclose(array, arrays[name], atol=1e-6, err_msg=name)


def test_the_planes_of_a_transposed_kernel_are_averaged(tmp_path):
    workdir = make_workdir(tmp_path / "run", seed=2)
    section = section_of(workdir)
    fewer = with_depth(section, strides=(1, 2, 2, 2, 2))
    names = Names(("T1", "T2"), OUTPUTS, "softmax")
    _, params, _ = adapted(workdir, fewer, names)
    before = read_file_or_workdir(workdir).arrays["decoder.4.trans.kernel"]
    assert before.shape[0] == 2
    np.testing.assert_allclose(params["decoder.4.trans.kernel"][0], (before[0] + before[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("known", [True, False], ids=["new structure", "weights file"])
def test_a_trained_2d_network_is_inflated_with_its_decoder(known, tmp_path):
    """By the rule centre, with strides of 1, the 3D network begins with the 2D network's logits on every slice."""
    workdir = make_workdir(tmp_path / "run", flat=True, seed=1)
    flat, params, stats = forward_of(section_of(workdir))
    source = read_file_or_workdir(workdir)
    params, stats, _ = weights.load(section_of(workdir), params, stats, source)
    volume = rng.standard_normal((1, 3, 32, 32, 2)).astype(np.float32)
    expected = np.stack([np.asarray(flat((params, stats), jnp.asarray(volume[:, d]))) for d in range(3)], 1)

    depth = {"axis": 0, "padding": "zero", "squeeze": "slice", "strides": (1,) * 5}
    section = section_of(workdir, name="dxnet", depth=depth, out_channels=4 if known else 3)
    names = Names(("T1", "T2"), ("background", "lesion", "vessel", "organ"), "softmax") if known else None
    deep, params, stats = forward_of(section)
    params, stats, done = weights.load(section, params, stats, source, names=names, inflation=Inflation("centre"))
    logits = np.asarray(deep((params, stats), jnp.asarray(volume)))[..., [0, 3, 1] if known else [0, 1, 2]]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert done["conv.kernel"] == "centre" and done["decoder.0.conv1.conv.kernel"] == "centre"
    assert ("random vessel" in done["last.kernel"]) == known


def test_a_2d_network_is_inflated_only_into_its_3d_counterpart(tmp_path):
    workdir = make_workdir(tmp_path / "run", flat=True, seed=1)
    section = section_of(workdir, name="dxnet", depth={}, filters=(16, 16, 8, 8, 16))
    with pytest.raises(UserError, match="filters"):
        adapted(workdir, section, None, inflation=Inflation("centre"))


def test_an_incomplete_file_is_an_error_although_channels_are_named(trained):
    section, source = section_of(trained), read_file_or_workdir(trained)
    names = Names(("T1", "T2"), OUTPUTS, "softmax")
    _, params, stats = forward_of(section)
    part = {name: a for name, a in source.arrays.items() if not name.startswith("encoder.blocks.")}
    with pytest.raises(UserError, match=r"lack .*encoder\.blocks.*incomplete"):
        weights.load(section, params, stats, dataclasses.replace(source, arrays=part), names=names)
    _, _, done = weights.load(
        section, params, stats, dataclasses.replace(source, arrays=part), names=names, require=False
    )
    assert {how for name, how in done.items() if name.startswith("encoder.blocks.")} == {"random: not in the weights"}


def test_absent_keys_have_the_values_of_the_network(trained):
    source, section = read_file_or_workdir(trained), networks.plain_dict(section_of(trained))
    shorter = {k: v for k, v in source.model.items() if k != "full_resolution"}
    shorter["encoder"] = {k: v for k, v in shorter["encoder"].items() if k != "padding"}
    section |= {"full_resolution": True, "encoder": {**section["encoder"], "padding": "symmetric"}}
    assert not weights.network_differences(dataclasses.replace(source, model=shorter), section)
    section["full_resolution"] = False
    (text,) = weights.network_differences(dataclasses.replace(source, model=shorter), section)
    assert text.startswith("full_resolution is True")


def test_channels_of_an_encoder_that_reads_the_image_are_matched_by_name():
    """Without a block before the encoder, its stem has one kernel for each image channel."""
    section = TOY_MODEL | {"name": "omnianet", "in_channels": 2, "full_resolution": False}
    _, params, stats = split_model(networks.build(section, seed=1))
    arrays = {name: np.asarray(a) for name, a in (flatten(params) | flatten(stats)).items()}
    source = weights.Weights("network", section, arrays, names=Names(("T1", "T2"), ("a", "b", "c"), "sigmoid"))
    wanted = {**section, "in_channels": 3}
    _, params, stats = split_model(networks.build(wanted, seed=2))
    names = Names(("T2", "FLAIR", "T1"), ("d",) * 3, "sigmoid")
    new, _, done = weights.load(wanted, params, stats, weights.encoder_weights(source), names=names)
    kernel, before = np.asarray(new["encoder"]["conv_stem"]["kernel"]), arrays["encoder.conv_stem.kernel"]
    np.testing.assert_array_equal(kernel[:, :, [2, 0]], before)
    np.testing.assert_allclose(kernel[:, :, 1], before.mean(2), rtol=1e-6)
    assert done["encoder.conv_stem.kernel"] == "kept T2, T1; mean of all channels for FLAIR"
    encoder = weights.encoder_weights(source)
    for changes in ({"channel_rule": "sum"}, {"names": Names(("MR",) * 3, ("d",) * 3, "sigmoid")}):
        new, _, done = weights.load(wanted, params, stats, encoder, **({"names": names} | changes))
        assert done["encoder.conv_stem.kernel"].startswith("channels by"), "by the rule that is given, or as before"


def test_another_network_is_still_an_error(trained):
    section = section_of(trained, filters=(16, 16, 8, 8, 16))
    with pytest.raises(UserError, match="filters"):
        adapted(trained, section, Names(("T1", "T2"), OUTPUTS, "softmax"))


@pytest.mark.parametrize("key", ["activation", "filters"])
def test_channels_are_matched_by_name_in_a_network_that_differs_otherwise(key, trained):
    """With ``require=False``: what has the same shape is loaded, at the place of its name, and the rest is random."""
    section = section_of(trained)
    other = "silu" if section["activation"] == "relu" else "relu"
    section |= {"activation": other} if key == "activation" else {"filters": (16, 16, 8, 8, 16)}
    names = Names(("T2", "T1"), ("background", "lesion", "organ"), "softmax")
    _, params, done = adapted(trained, section, names, require=False)
    before, (_, fresh, _) = read_file_or_workdir(trained).arrays, forward_of(section)
    for name, order in (("conv.kernel", (..., [1, 0], slice(None))), ("last.kernel", (..., [0, 2, 1]))):
        if before[name].shape == params[name].shape:
            np.testing.assert_array_equal(params[name], before[name][order], err_msg=name)
        else:
            assert done[name] == "omitted: another shape"
            np.testing.assert_array_equal(params[name], flatten(fresh)[name], err_msg=name)
    different = {name for name, array in flatten(fresh).items() if array.shape != before[name].shape}
    assert bool(different) == (key == "filters")
    assert {name for name, what in done.items() if what.startswith("omitted")} >= different


def test_the_log_and_the_report_list_what_was_done(trained, capsys):
    """As the training calls it: a new structure, and a channel less."""
    config = load_config("configs/own_omnianet.py", [])
    config.init.weights = str(trained)
    section = section_of(trained, in_channels=1, out_channels=2)
    _, params, stats = split_model(networks.build(section, seed=0))
    names = Names(("T2",), ("background", "tumour"), "softmax")
    new, _, report = initialise(config.init, section, 0, params, stats, names)
    out = capsys.readouterr().out
    assert "last.kernel: kept background; random tumour" in out and "conv.kernel: kept T2" in out
    kept = read_file_or_workdir(trained).arrays
    np.testing.assert_array_equal(flatten(new)["conv.kernel"], kept["conv.kernel"][..., 1:, :])
    np.testing.assert_array_equal(flatten(new)["last.bias"][0], kept["last.bias"][0])
    assert report["arrays"]["last.bias"] == "kept background; random tumour"


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_file_of_a_network_is_used_as_its_workdir(activation, trained, tmp_path, capsys):
    """As weight_port writes it: channels and structures are matched by name; a file without names by position."""
    source, section = read_file_or_workdir(trained), section_of(trained)
    names = Names(("T2", "T1"), ("background", "lesion", "organ"), activation)
    expected, _, done = adapted(trained, section, names)
    config = load_config("configs/own_omnianet.py", [])
    for known in (True, False):
        config.init.weights = str(tmp_path / "net.safetensors")
        kept = source if known else dataclasses.replace(source, names=None)
        weights.write_weights(tmp_path / "net.safetensors", kept)
        forward, params, stats = forward_of(section)
        params, stats, report = initialise(config.init, section, 0, params, stats, names)
        assert ("by position" in capsys.readouterr().out) != known
        assert report is not None and (report["arrays"] == done) == known
        image = image_for(trained, 2)
        same = np.allclose(forward((params, stats), jnp.asarray(image)), expected(image), rtol=1e-4, atol=1e-5)
        assert same == known


@pytest.mark.parametrize("rule", ["random", "centre"])
def test_random_arrays_are_not_counted_as_loaded(rule, tmp_path):
    """Arrays that a rule or an unknown name makes random are in the list of random ones, and not in the coverage."""
    flat = make_workdir(tmp_path / "run", flat=True, seed=1)
    config = load_config("configs/own_omnianet.py", [])
    config.init.weights, config.init.inflate = str(flat), rule
    section = section_of(flat, name="dxnet", depth={"axis": 0, "padding": "zero", "squeeze": "slice"})
    _, params, stats = forward_of(section)
    sizes = {name: array.size for name, array in (flatten(params) | flatten(stats)).items()}
    names = Names(("T1", "T2"), ("air", "vessel", "nerve"), "softmax")
    _, _, report = initialise(config.init, section, 0, params, stats, names)
    assert report is not None
    expected = {"last.kernel", "last.bias"} if rule == "centre" else set(sizes)
    assert set(report["random"]) == expected
    assert report["coverage"] == pytest.approx(1 - sum(sizes[n] for n in expected) / sum(sizes.values()))


def test_a_stem_that_the_rule_randn_draws_is_not_counted_as_loaded(trained):
    config = load_config("configs/own_omnianet.py", [])
    config.init.weights, config.init.part, config.init.channels = str(trained), "encoder", "randn"
    section = section_of(trained, filters=(24,) * 5)  # and therefore the input of the encoder
    _, params, stats = forward_of(section)
    _, _, report = initialise(config.init, section, 0, params, stats)
    assert report is not None and report["random"] == ["encoder.conv_stem.kernel"] and 0 < report["coverage"] < 1


@pytest.mark.parametrize(("source", "target"), [(("MRI", "MRI"), ("MRI", "CT")), (("MRI", "CT"), ("CT", "CT"))])
def test_channels_of_one_name_cannot_be_matched(source, target):
    with pytest.raises(UserError, match="several have the name"):
        fine_tuning.adapt_inputs(np.zeros((3, 3, 2, 4), np.float32), source, target)


def test_files_without_names_need_the_same_channels(trained):
    source = read_file_or_workdir(trained)
    bare = weights.Weights(source.kind, source.model, source.arrays, {}, source.source)
    section = section_of(trained, out_channels=4)
    _, params, stats = split_model(networks.build(section, seed=0))
    names = Names(("T1", "T2"), ("background", "a", "b", "c"), "softmax")
    with pytest.raises(UserError, match="out_channels"):
        weights.load(section, params, stats, bare, names=names)
