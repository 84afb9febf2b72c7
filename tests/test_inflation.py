"""Dimensional transfer: what each inflation rule preserves, in float64 to 1e-12; and rules for input channels."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax

from tests.conftest import TOY_MODEL
from tests.random_weights import make_encoder, make_omnianet
from weight_port.sources import import_timm
from xdim_jax.base.errors import UserError
from xdim_jax.inference.model import make_model
from xdim_jax.nets import inflate, input_channels, layers, networks, unet
from xdim_jax.nets.functional import split_model
from xdim_jax.nets.inflate import Inflation
from xdim_jax.nets.layers import Depth
from xdim_jax.nets.weights import abstract_encoder, adapt_encoder, inflate_network, replace_leaves

EXACT = 1e-12
pytestmark = pytest.mark.usefixtures("float64")


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def inflated(weights, rule, *, axis=0, **options):
    """The encoder in 3D; fields of Inflation and of Depth by keyword."""
    fields = {f.name for f in dataclasses.fields(Inflation)}
    depth = dataclasses.asdict(Depth(axis=axis, **{k: v for k, v in options.items() if k not in fields}))
    inflation = Inflation(rule, **{k: v for k, v in options.items() if k in fields})
    return adapt_encoder(weights, {**weights.model, "ndim": 3, "depth": depth}, inflation=inflation)[0]


def features(weights, image):
    return [np.asarray(f) for f in make_model(weights, "test").features(image) if f is not None]


def repeated(image, depth, axis):
    """A volume whose every slice is the image."""
    return np.repeat(np.expand_dims(image, axis + 1), depth, axis + 1)


def worst_slice(flat, deep, axis):
    """Largest relative error over feature levels and all slices against the 2D features."""
    return max(relative(b, np.expand_dims(a, axis + 1)) for a, b in zip(flat, deep, strict=True))


# -- taps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("mean", {}, [0.2] * 5),
        ("repeat", {}, [1] * 5),
        ("repeat_uncorrected", {}, [1] * 5),
        ("centre", {}, [0, 0, 1, 0, 0]),
        ("spacing", {"spacing": 1}, [0.2] * 5),
        # slices 2 pixels thick: a kernel 5 pixels long holds the middle one, and 1.5 pixels of its neighbours
        ("spacing", {"spacing": 2}, [0, 0.3, 0.4, 0.3, 0]),
        ("spacing", {"spacing": 5}, [0, 0, 1, 0, 0]),
        ("spacing", {"spacing": 0.5}, [0.2] * 5),
        # exp(-1/2 (offset / 2)^2) for offsets 0, 1, 2 is 1, 0.8824969, 0.6065307
        ("gaussian", {"sigma": 2}, [0.1524691, 0.2218413, 0.2513792, 0.2218413, 0.1524691]),
    ],
)
def test_taps_by_hand(rule, options, expected):
    np.testing.assert_allclose(inflate.profile(rule, 5, **options), expected, atol=1e-7)


def test_even_kernels():
    np.testing.assert_array_equal(inflate.profile("gaussian", 4, sigma=0.01), [0, 0.5, 0.5, 0])
    np.testing.assert_array_equal(inflate.profile("centre", 4), [0, 0, 1, 0])
    np.testing.assert_allclose(inflate.profile("spacing", 4, spacing=4), [0, 0.5, 0.5, 0])


def test_kernel_keeps_its_dtype_and_place():
    kernel = np.arange(7, dtype=np.float32).reshape(1, 7, 1, 1)
    assert inflate.inflate_kernel(kernel, 3, axis=1, rule="mean").dtype == np.float32
    for axis in range(3):
        out = inflate.inflate_kernel(kernel, 3, axis=axis, rule="centre")
        assert out.shape[axis] == 3 and np.delete(out.shape, axis).tolist() == [1, 7, 1, 1]
        np.testing.assert_array_equal(np.take(out, 1, axis), kernel)
        assert out.sum() == kernel.sum()


def conv(x, kernel, strides, pads):
    """A convolution over any number of axes, as one sum of shifted products."""
    ndim = len(strides)
    numbers = lax.ConvDimensionNumbers(
        (0, ndim + 1, *range(1, ndim + 1)), (ndim + 1, ndim, *range(ndim)), (0, ndim + 1, *range(1, ndim + 1))
    )
    return np.asarray(lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=numbers))


@pytest.mark.quick
@pytest.mark.parametrize("case", range(12))
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolution_of_any_rank_sees_the_slice(ndim, case):
    """1D to 2D, 2D to 3D, 3D to 4D (a film of volumes): random kernels (square or not), sizes, strides and axes."""
    rng = np.random.default_rng([ndim, case])
    window = tuple(int(k) for k in rng.choice([1, 2, 3, 5, 7], ndim))
    strides = tuple(int(s) for s in rng.choice([1, 2, 3], ndim))
    size = tuple(int(rng.integers(k, 9) if k < 9 else 9) for k in window)
    taps, stride, axis = int(rng.choice([1, 2, 3, 5])), int(rng.choice([1, 2])), int(rng.integers(0, ndim + 1))
    depth, pad = int(rng.integers(taps + 1, 9)), taps // 2
    x, kernel = rng.normal(size=(2, *size, 3)), rng.normal(size=(*window, 3, 4))
    pads = [(k // 2, k // 2) for k in window]
    flat = conv(x, kernel, strides, pads)
    volume = repeated(x, depth, axis)
    wide = [(pad, pad) if i == axis + 1 else (0, 0) for i in range(volume.ndim)]
    sizes = [*strides[:axis], stride, *strides[axis:]]
    for rule, mode in [
        ("mean", "edge"),
        ("gaussian", "edge"),
        ("spacing", "edge"),
        ("centre", "edge"),
        ("centre", "constant"),
    ]:
        if mode == "constant" and taps % 2 == 0:
            continue  # the middle tap of an even kernel, padded by half, leaves the volume at the end
        deep = conv(
            np.pad(volume, wide, mode=mode),
            inflate.inflate_kernel(kernel, taps, axis=axis, rule=rule, sigma=0.7, spacing=1.6),
            sizes,
            [*pads[:axis], (0, 0), *pads[axis:]],
        )
        assert deep.shape[axis + 1] > 1 or depth + 2 * pad - taps < stride
        assert relative(deep, np.expand_dims(flat, axis + 1)) < EXACT, (rule, window, taps, strides, stride, axis)
    raw = inflate.inflate_kernel(kernel, taps, axis=axis, rule="repeat_uncorrected")
    deep = conv(np.pad(volume, wide, mode="edge"), raw, sizes, [*pads[:axis], (0, 0), *pads[axis:]])
    assert relative(deep, taps * np.expand_dims(flat, axis + 1)) < EXACT


# -- encoders -------------------------------------------------------------------------------------------------------

SIZES = [((33, 40), 9), ((34, 32), 16)]


EXACT_CASES = [  # rule, depth padding, options, padding in the plane
    ("mean", "edge", {}, "symmetric"),
    ("repeat", "renorm", {}, "same"),
    ("centre", "zero", {}, "symmetric"),
    ("spacing", "edge", {"spacing": 2.5, "squeeze": "slice"}, "symmetric"),
]
SLOW_EXACT_CASES = [
    ("mean", "renorm", {}, "symmetric"),
    ("repeat", "edge", {}, "symmetric"),
    ("centre", "edge", {"squeeze": "slice"}, "symmetric"),
    ("centre", "renorm", {}, "same"),
    ("gaussian", "edge", {"sigma": 0.8}, "symmetric"),
    ("gaussian", "renorm", {"sigma": 0.8}, "same"),
    ("spacing", "renorm", {"spacing": 2.5}, "symmetric"),
    ("mean", "edge", {"strides": (1, 2, 1, 2, 1)}, "symmetric"),
]


@pytest.mark.parametrize(
    ("rule", "depth_padding", "options", "padding"),
    [*EXACT_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_EXACT_CASES)],
)
def test_a_depth_constant_volume_gives_the_slices_features(rule, depth_padding, options, padding):
    """Every slice of every feature level equals the 2D encoder's, on odd, even and non-cubic sizes."""
    flat = make_encoder(padding=padding)
    rng = np.random.default_rng(0)
    (size, depth) = SIZES[padding == "same"]
    image = rng.normal(size=(2, *size, 3))
    deep = inflated(flat, rule, padding=depth_padding, **options)
    found = features(deep, repeated(image, depth, 0))
    assert max(f.shape[1] for f in found) >= 5
    assert worst_slice(features(flat, image), found, 0) < EXACT


@pytest.mark.parametrize(
    ("rule", "axis"), [("mean", 1), ("repeat", 2), pytest.param("centre", 1, marks=pytest.mark.slow)]
)
def test_the_new_axis_may_be_any(rule, axis):
    flat = make_encoder()
    image = np.random.default_rng(0).normal(size=(1, 33, 40, 3))
    deep = inflated(flat, rule, axis=axis, padding="edge")
    assert worst_slice(features(flat, image), features(deep, repeated(image, 12, axis)), axis) < EXACT


@pytest.mark.parametrize(
    ("name", "rule", "padding"),
    [
        ("resnet18", "mean", "renorm"),
        ("efficientnet_lite_toy", "repeat", "edge"),
        pytest.param("resnet50", "repeat", "edge", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "mean", "renorm", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "centre", "zero", marks=pytest.mark.slow),
    ],
)
def test_other_families_keep_the_theorem(name, rule, padding):
    flat = make_encoder(name)
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3))
    deep = inflated(flat, rule, padding=padding)
    assert worst_slice(features(flat, image), features(deep, repeated(image, 32, 0)), 0) < EXACT


@pytest.mark.parametrize(("norm", "bound"), [("batch", EXACT), ("instance", 1e-2)])
def test_repetition_is_exact_with_batch_norm_and_up_to_eps_without(norm, bound):
    flat = make_encoder(norm=norm, eps=1e-5)
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 3))
    error = worst_slice(
        features(flat, image), features(inflated(flat, "repeat", padding="edge"), repeated(image, 8, 0)), 0
    )
    assert error < bound
    assert norm == "batch" or error > 1e-9


@pytest.mark.parametrize("rule", ["mean", "repeat"])
def test_a_network_with_another_eps_is_the_2d_network_with_that_eps(rule):
    """The recipe of the paper: the weights were trained with eps 1e-3, the network has 1e-5, which is accepted."""
    flat = make_encoder(eps=1e-3)
    section = {**flat.model, "eps": 1e-5}
    image = np.random.default_rng(0).normal(size=(1, 64, 64, 3))
    expected = features(dataclasses.replace(flat, model=section), image)
    assert worst_slice(features(flat, image), [np.expand_dims(f, 1) for f in expected], 0) > 1e-4, "eps matters"
    depth = dataclasses.asdict(Depth(padding="edge"))
    deep, _ = adapt_encoder(flat, {**section, "ndim": 3, "depth": depth}, inflation=Inflation(rule), accept=("eps",))
    assert worst_slice(expected, features(deep, repeated(image, 8, 0)), 0) < EXACT


def test_an_inflated_network_with_another_eps():
    flat = make_omnianet()
    model = {**flat.model, "encoder": {**flat.model["encoder"], "eps": 1e-5}}
    image = np.random.default_rng(0).normal(size=(1, 64, 32, 2))
    deep, _ = inflate_network(flat, {"padding": "edge"}, Inflation("repeat"), eps=1e-5)
    deep = dataclasses.replace(deep, model={**deep.model, "encoder": model["encoder"]})
    logits = np.asarray(make_model(deep, "test")(repeated(image, 32, 0)))
    expected = np.asarray(make_model(dataclasses.replace(flat, model=model), "test")(image))
    assert relative(logits, expected[:, None]) < EXACT


@pytest.mark.parametrize(
    ("rule", "depth_padding"),
    [
        ("mean", "zero"),
        *(pytest.param(r, "edge", marks=pytest.mark.slow) for r in ("repeat_uncorrected", "random", "acs")),
    ],
)
def test_what_is_not_preserved(rule, depth_padding):
    """The rule of other tools, mean with zero padding, is right on no slice at the coarsest level."""
    flat = make_encoder()
    image = np.random.default_rng(0).normal(size=(1, 33, 40, 3))
    exact = features(flat, image)
    found = features(inflated(flat, rule, padding=depth_padding), repeated(image, 64, 0))
    slices = [relative(found[-1][:, d], exact[-1]) for d in range(found[-1].shape[1])]
    assert len(slices) == 2 and min(slices) > 0.02


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_toy",
        "efficientnet_lite_toy",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "vgg16_bn", "convnext_tiny")),
    ],
)
def test_centre_without_depth_strides_is_the_2d_network_on_every_slice(name):
    """An arbitrary volume; squeeze-excite per slice."""
    flat = make_encoder(name)
    volume = np.random.default_rng(0).normal(size=(1, 3, 64, 32, 3))
    deep = features(inflated(flat, "centre", squeeze="slice", strides=(1,) * 5), volume)
    for found, expected in zip(deep, features(flat, volume[0]), strict=True):  # the slices are a batch
        assert relative(found[0], expected) < EXACT
    if name == "efficientnet_toy":
        pooled = features(inflated(flat, "centre", squeeze="volume", strides=(1,) * 5), volume)
        assert relative(pooled[-1], deep[-1]) > 1e-3


def test_depth_constant_training_statistics_are_the_2d_ones():
    """In training mode too: batch statistics of a depth-constant volume are those of the image."""
    flat = make_encoder()
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3))

    def train(weights, x):
        graphdef, params, stats = split_model(abstract_encoder(weights.model))

        def forward(params, stats, x):
            model = nnx.merge(graphdef, params, stats)
            model.train()
            return model(x)

        return jax.jit(forward)(replace_leaves(params, weights.arrays), replace_leaves(stats, weights.arrays), x)

    deep = train(inflated(flat, "mean", padding="edge"), repeated(image, 32, 0))
    assert worst_slice(train(flat, image), deep, 0) < 1e-10


def test_acs_keeps_a_plane_per_third():
    """Each third of the filters: on a volume that is constant along its own axis it is the 2D convolution."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 2, 7))
    cube = inflate.inflate_kernel(kernel, 3, axis=0, rule="acs")
    image = rng.normal(size=(1, 6, 8, 2))
    flat = conv(image, kernel, (1, 1), [(0, 0)] * 2)
    thirds = np.array_split(np.arange(7), 3)
    for axis, members in enumerate(thirds):
        deep = conv(repeated(image, 5, axis), cube, (1, 1, 1), [(0, 0)] * 3)
        assert relative(deep[..., members], np.expand_dims(flat, axis + 1)[..., members].repeat(3, axis + 1)) < EXACT
        others = np.setdiff1d(np.arange(7), members)
        assert relative(deep[..., others], np.expand_dims(flat, axis + 1)[..., others]) > 0.1
    with pytest.raises(ValueError, match=r"square 2D kernel .* \(1, 7\)"):
        inflate.inflate_kernel(np.zeros((1, 7, 1, 3)), 3, axis=0, rule="acs")


def test_random_draws_anew_and_resets_norms():
    flat = make_encoder()
    one, again, other = (inflated(flat, "random", seed=s).arrays for s in (0, 0, 1))
    name = "blocks.1.0.conv_dw.kernel"
    assert (one[name] == again[name]).all() and (one[name] != other[name]).all()
    assert abs(one["blocks.6.0.conv_pwl.kernel"].std() / np.sqrt(2 / 288) - 1) < 0.05  # He, fan-in 6 x 48
    assert (one["blocks.1.0.bn2.scale"] == 1).all() and (one["blocks.1.0.bn2.mean"] == 0).all()
    assert (one["blocks.1.0.bn2.var"] == 1).all()


def test_layers_may_have_rules_of_their_own():
    flat = make_encoder()
    deep = inflated(flat, "mean", layers=(("blocks.0.*", "centre"), ("blocks.*.conv_dw", "repeat")), padding="edge")
    assert (deep.arrays["blocks.0.0.conv_dw.kernel"][0] == 0).all()
    np.testing.assert_array_equal(deep.arrays["blocks.1.0.conv_dw.kernel"][2], flat.arrays["blocks.1.0.conv_dw.kernel"])
    np.testing.assert_allclose(deep.arrays["conv_stem.kernel"][0], flat.arrays["conv_stem.kernel"] / 3)
    image = np.random.default_rng(0).normal(size=(1, 33, 40, 3))
    assert worst_slice(features(flat, image), features(deep, repeated(image, 9, 0)), 0) < EXACT
    with pytest.raises(UserError, match=r"'bloks.\*'.* blocks"):
        inflated(flat, "mean", layers=(("bloks.*", "centre"),))


def test_spacing_is_that_of_the_level():
    """Slices are 4 pixels thick. With depth strides of 1, the inputs of levels 1 and 2 have slices of 2 and 1 pixels.

    A kernel of 3 pixels then contains one slice; a slice and half a pixel of both neighbours; or three slices.
    """
    flat = make_encoder()
    options = {"spacing": 4.0, "strides": (1, 1, 2, 2, 2), "padding": "edge"}
    deep = inflated(flat, "spacing", **options)
    for name, taps in {
        "conv_stem": [0, 1, 0],
        "blocks.0.0.conv_dw": [1 / 6, 2 / 3, 1 / 6],
        "blocks.1.0.conv_dw": [1 / 6, 2 / 3, 1 / 6],
        "blocks.2.0.conv_dw": [0.2] * 5,
        "blocks.6.0.conv_dw": [1 / 3] * 3,
    }.items():
        kernel = flat.arrays[f"{name}.kernel"]
        np.testing.assert_allclose(deep.arrays[f"{name}.kernel"], np.multiply.outer(taps, kernel), atol=1e-12)
    image = np.random.default_rng(0).normal(size=(1, 33, 40, 3))
    assert worst_slice(features(flat, image), features(deep, repeated(image, 9, 0)), 0) < EXACT


@pytest.mark.parametrize("name", ["efficientnet_toy", "resnet34", "resnet50", "vgg16_bn", "convnext_tiny"])
def test_every_layer_knows_the_ratio_of_its_input(name, monkeypatch):
    """The sizes of the inputs of all convolutions of a DX-Net, against the size of the image."""
    section = {**TOY_MODEL, "encoder": {"name": name}, "in_channels": 1, "depth": {"axis": 1, "strides": (1,) * 5}}
    sizes = {}

    def record(conv, shape):
        sizes.setdefault(id(conv.kernel), (conv, set()))[1].add(shape)

    def call(self, x):
        record(self, x.shape)
        return original(self, x)

    def upsampled(conv, x, skip, factors, **options):
        record(conv, (1, *(n * f for n, f in zip(x.shape[1:-1], factors, strict=True)), 1))
        return combine(conv, x, skip, factors, **options)

    original, combine = layers.Conv.__call__, layers.conv_upsampled
    monkeypatch.setattr(layers.Conv, "__call__", call)
    monkeypatch.setattr(unet, "conv_upsampled", upsampled)
    network = networks.build(section, seed=None)
    network.eval()
    jax.eval_shape(lambda: network(np.zeros((1, 64, 32, 64, 1))))
    found = [(conv, shapes) for conv, shapes in sizes.values() if len(conv.kernel.shape) == 5]
    assert len(found) > 20
    for conv, shapes in found:
        if max(conv.kernel.shape[:3]) > 1:
            (shape,) = shapes
            expected = 3.0 * (32 / shape[2]) / (64 / shape[1])
            assert inflate.input_ratio(3.0, conv) == expected, (conv.kernel.shape, shape)


def test_what_was_done_is_told():
    flat = make_encoder()
    section = {**flat.model, "ndim": 3, "depth": dataclasses.asdict(Depth()), "in_channels": 5, "norm": "instance"}
    _, done = adapt_encoder(flat, section, inflation=Inflation("repeat"))
    assert set(done) == set(flat.arrays)
    assert done["conv_stem.kernel"] == "channels by cycle then repeat"
    assert done["blocks.1.0.conv_dw.kernel"] == "repeat" and done["blocks.1.0.conv_pw.kernel"] == "axis added"
    assert done["bn1.mean"].startswith("dropped") and done["bn1.scale"] == "copied"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "median"}, "unknown inflation rule 'median'; known: mean, repeat"),
        ({"sigma": 0.0}, "sigma of an inflation must be a number of at least 1e-06; got 0.0"),
        ({"sigma": 1e-200}, "sigma of an inflation"),
        ({"spacing": float("inf")}, "spacing of an inflation must be a number of at least 1e-06; got inf"),
        ({"rule": "random", "seed": -1}, "seed of at least 0; got -1"),
        ({"layers": (("*", "half"),)}, "unknown inflation rule 'half'"),
    ],
)
def test_wrong_inflations_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Inflation(**options)


# -- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "upsampling"),
    [
        ("mean", "nearest"),
        pytest.param("mean", "transposed", marks=pytest.mark.slow),
        pytest.param("repeat", "transposed", marks=pytest.mark.slow),
        pytest.param("centre", "nearest", marks=pytest.mark.slow),
    ],
)
def test_a_whole_network_inflates_exactly(rule, upsampling):
    """Decoder included: on a depth-constant volume every slice of the logits is the 2D network's output."""
    flat = make_omnianet(upsampling=upsampling)
    image = np.random.default_rng(0).normal(size=(1, 64, 32, 2))
    deep, _ = inflate_network(flat, {"padding": "edge"}, Inflation(rule))
    assert deep.model["name"] == "dxnet"
    logits = np.asarray(make_model(deep, "test")(repeated(image, 32, 0)))
    assert relative(logits, np.asarray(make_model(flat, "test")(image))[:, None]) < EXACT


@pytest.mark.parametrize("axis", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_whole_network_on_any_volume_slice_by_slice(axis):
    flat = make_omnianet(upsampling="transposed", activation="silu")
    volume = np.random.default_rng(0).normal(size=(1, 5, 64, 32, 2))
    volume = np.moveaxis(volume, 1, axis + 1)
    deep, _ = inflate_network(flat, {"axis": axis, "strides": (1,) * 5, "squeeze": "slice"}, Inflation("centre"))
    logits = np.asarray(make_model(deep, "test")(volume))
    expected = np.asarray(make_model(flat, "test")(np.moveaxis(volume[0], axis, 0)))  # the slices are a batch
    assert relative(np.moveaxis(logits[0], axis, 0), expected) < EXACT


def test_only_a_whole_omnianet_inflates():
    with pytest.raises(UserError, match=r"Omnia-Net.* encoder efficientnet_toy"):
        inflate_network(make_encoder(), {}, Inflation())


# -- input channels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_cycle_is_timms_rule(channels):
    import torch

    import_timm()
    from timm.models._manipulate import adapt_input_conv

    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 8)).astype(np.float32)  # HWIO
    theirs = adapt_input_conv(channels, torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())).numpy()
    np.testing.assert_allclose(
        input_channels.adapt_channels(kernel, channels, "cycle"), theirs.transpose(2, 3, 1, 0), rtol=1e-6
    )


@pytest.mark.parametrize(("rule", "channels"), [("sum", 1), ("sum", 4), ("cycle", 1), ("cycle", 6)])
def test_grey_is_answered_as_before(rule, channels):
    """All channels hold the same image: the response is that of the RGB stem to a grey one."""
    rng = np.random.default_rng(0)
    kernel, grey = rng.normal(size=(3, 3, 3, 8)), rng.normal(size=(1, 9, 9, 1))
    before = conv(grey.repeat(3, -1), kernel, (2, 2), [(1, 1)] * 2)
    after = conv(grey.repeat(channels, -1), input_channels.adapt_channels(kernel, channels, rule), (2, 2), [(1, 1)] * 2)
    assert relative(after, before) < EXACT


@pytest.mark.parametrize(("rule", "channel_map"), [("mean", ()), ("map", (0, 0, 1, 2, 2, 1))])
def test_variance_over_independent_channels_is_kept(rule, channel_map):
    """Measured on white noise; rule cycle, which does not claim it, loses half at 6 channels."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 3, 16)) + 0.3
    noise = rng.normal(size=(8, 64, 64, 6))

    def variance(kernel):
        return conv(noise[..., : kernel.shape[2]], kernel, (1, 1), [(0, 0)] * 2).var()

    before = variance(kernel)
    assert variance(input_channels.adapt_channels(kernel, 6, rule, channel_map=channel_map)) == pytest.approx(
        before, rel=0.02
    )
    assert variance(input_channels.adapt_channels(kernel, 6, "cycle")) == pytest.approx(before / 2, rel=0.02)


def test_a_map_names_channels():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 4))
    np.testing.assert_allclose(input_channels.adapt_channels(kernel, 3, "map", channel_map=(0, 1, 2)), kernel)
    picked = input_channels.adapt_channels(kernel, 2, "map", channel_map=(2, 0))
    np.testing.assert_allclose(picked[..., 0, :] / picked[..., 1, :], kernel[..., 2, :] / kernel[..., 0, :])
    for wrong in ((0, 1), (0, 1, 3), (0, 1, -1)):
        with pytest.raises(ValueError, match=r"0 to 2.* 3 channels"):
            input_channels.adapt_channels(kernel, 3, "map", channel_map=wrong)


def test_randn_in_3d_has_independent_slices():
    """The released DX-Net draws a stem of unit variance; inflation must neither scale it nor repeat a slice."""
    flat = make_encoder()
    section = {**flat.model, "in_channels": 16, "ndim": 3, "depth": dataclasses.asdict(Depth())}
    deep, done = adapt_encoder(flat, section, inflation=Inflation("mean"), channel_rule="randn")
    kernel = deep.arrays["conv_stem.kernel"]
    assert kernel.std() == pytest.approx(1, abs=0.03) and done["conv_stem.kernel"].endswith("channels by randn")
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.1


def test_randn_is_the_released_codes_rule():
    kernel = input_channels.adapt_channels(np.zeros((3, 3, 3, 64), np.float32), 16, "randn", seed=3)
    assert kernel.shape == (3, 3, 16, 64) and kernel.std() == pytest.approx(1, abs=0.02)
