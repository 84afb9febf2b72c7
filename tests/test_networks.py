"""The encoders and the three networks: sizes, parameter counts, modes, forms, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import TOY_MODEL
from tests.parity import ds_case, timm, unet_case
from weight_port import authors
from xdim_jax import ops
from xdim_jax.base.config import load_config, shipped_recipes
from xdim_jax.base.errors import UserError
from xdim_jax.nets import encoders, layers, networks
from xdim_jax.nets.functional import split_model
from xdim_jax.nets.layers import Depth, ShapesOnly, Style
from xdim_jax.nets.weights import encoder_section, flatten
from xdim_jax.pages import report

# parameters without head and classifier, counted on timm 1.0.31; feature channels
ENCODERS = {
    "efficientnet_b0": (3_595_388, (32, 24, 40, 112, 320)),
    "efficientnet_b1": (6_101_024, (32, 24, 40, 112, 320)),
    "efficientnet_b2": (7_202_562, (32, 24, 48, 120, 352)),
    "efficientnet_b3": (10_103_336, (40, 32, 48, 136, 384)),
    "efficientnet_b4": (16_742_216, (48, 32, 56, 160, 448)),
    "efficientnet_b5": (27_288_112, (48, 40, 64, 176, 512)),
    "efficientnet_b6": (39_403_992, (56, 40, 72, 200, 576)),
    "efficientnet_b7": (62_143_440, (64, 48, 80, 224, 640)),
    "efficientnet_lite0": (2_958_848, (32, 24, 40, 112, 320)),
    "efficientnet_lite1": (3_723_520, (32, 24, 40, 112, 320)),
    "efficientnet_lite2": (4_357_952, (32, 24, 48, 120, 352)),
    "efficientnet_lite3": (6_422_016, (32, 32, 48, 136, 384)),
    "efficientnet_lite4": (11_149_568, (32, 32, 56, 160, 448)),
    "efficientnet_toy": (140_680, (8, 8, 16, 32, 80)),
    "efficientnet_lite_toy": (120_864, (32, 8, 16, 32, 80)),
    "resnet18": (11_176_512, (64, 64, 128, 256, 512)),
    "resnet34": (21_284_672, (64, 64, 128, 256, 512)),
    "resnet50": (23_508_032, (64, 256, 512, 1024, 2048)),
    "vgg16_bn": (14_723_136, (128, 256, 512, 512, 512)),
    "vgg19_bn": (20_035_392, (128, 256, 512, 512, 512)),
    "convnext_tiny": (27_818_592, (0, 96, 192, 384, 768)),
}
BLOCKS = {"b0": 16, "b1": 23, "b2": 23, "b3": 26, "b4": 32, "b5": 39, "b6": 45, "b7": 55, "toy": 8}
BLOCKS |= {"lite0": 16, "lite1": 21, "lite2": 21, "lite3": 24, "lite4": 30, "lite_toy": 8}

# whole networks: parameters counted in PyTorch, minus the head that is never called (docs/networks.md, section Sizes)
HEAD_B0, HEAD_B4 = 412_160, 806_400
NETWORKS = {
    "encoder-b0": 4_007_548 - HEAD_B0,  # with three input channels, as in DS-Net
    "encoder-b4": 17_548_616 - HEAD_B4,
    "encoder3d-b0": 4_690_108 - HEAD_B0,
    "omnianet-b0": 6_258_128 - HEAD_B0,
    "omnianet-b4": 20_234_365 - HEAD_B4,
    "dxnet": 12_954_991 - HEAD_B0,
    "dsnet": 8_080_278 - HEAD_B0,
}
SE_B0 = ENCODERS["efficientnet_b0"][0] - ENCODERS["efficientnet_lite0"][0]  # of 1x1 kernels, the same in 3D
CONFIGS = {
    "brats_dxnet": 12_954_991 - HEAD_B0,
    "brats_dsnet": 8_080_278 - HEAD_B0,
    "camus_omnianet": 6_258_128 - HEAD_B0,
    "chaos_omnianet": 20_234_365 - 806_400,
    # the data decide their channels; with those of BraTS. The total of Omnia-Net is of one input and four outputs:
    # three inputs more of 16 filters of 3x3 at full resolution, and one output of 16 kernels of 3x3 and a bias less
    "own_dxnet": 12_954_991 - HEAD_B0,
    "own_omnianet": 6_258_128 - HEAD_B0 + 3 * 16 * 9 - (16 * 9 + 1),
    "camus_best": 6_258_128 - HEAD_B0 - SE_B0,
    "brats_best": 12_954_991 - HEAD_B0 - SE_B0,
    # as brats_best without transposed convolutions, with three inputs less and one output more
    "camus_sequence": 12_954_991
    - HEAD_B0
    - SE_B0
    - sum(8 * n * n + n for n in (320, 256, 128, 64, 32))
    - 3 * 16 * 27
    + (16 * 27 + 1),
}


def make_encoder(name="efficientnet_toy", *, channels=3, ndim=2, **options):
    return encoders.make_encoder(name, channels, ndim=ndim, eps=1e-3, **{"rngs": nnx.Rngs(0), **options})


def count(module):
    return networks.count_parameters(nnx.state(module, nnx.Param))


def test_no_encoder_network_or_config_is_missing_from_the_tables():
    assert set(ENCODERS) == set(encoders.ENCODERS)
    assert set(NETWORKS) == set(authors.NETWORKS)
    shipped = set(shipped_recipes())
    assert set(CONFIGS) == shipped


@pytest.mark.quick
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_has_timms_parameters(name):
    encoder = nnx.eval_shape(lambda: make_encoder(name, rngs=ShapesOnly()))
    parameters, channels = ENCODERS[name]
    assert count(encoder) == parameters
    assert encoder.channels == channels


@pytest.mark.parametrize("size", BLOCKS)
def test_efficientnets_have_timms_blocks(size):
    encoder = nnx.eval_shape(lambda: make_encoder(f"efficientnet_{size}", rngs=ShapesOnly()))
    assert sum(len(stage) for stage in encoder.blocks) == BLOCKS[size]


@pytest.mark.parametrize("name", NETWORKS)
def test_released_networks_have_their_parameters(name):
    """The sizes in docs/networks.md, with the numbers of channels of the released networks."""
    section = dict(authors.NETWORKS[name])
    if "ndim" in section:
        options = {k: v for k, v in section.items() if k != "name"}
        module = nnx.eval_shape(lambda: encoders.make_encoder(section["name"], 3, rngs=ShapesOnly(), **options))
    else:
        filters = {"filters": (256, 128, 64, 32, 16)}
        channels = {"omnianet-b0": (1, 4), "omnianet-b4": (1, 5)}.get(name, (4, 3))
        section |= {"in_channels": channels[0], "out_channels": channels[1]}
        if name == "dsnet":
            section |= {"filters": (16, 32, 48, 96), "images": 4, "affine": False}
            section["inner"] = section["inner"] | filters | {"norm": "batch"}
        else:
            section |= filters | {"norm": "batch"}
        module = networks.build_abstract(section)
    assert count(module) == NETWORKS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_have_the_papers_parameters(name):
    config = load_config(f"configs/{name}.py", [])
    channels = {"camus": (1, 4), "chaos": (1, 5)}.get(name.partition("_")[0], (4, 3))
    for key, number in zip(("in_channels", "out_channels"), channels, strict=True):
        assert config.model[key] == (0 if name.startswith("own") else number)
        config.model[key] = number
    assert count(networks.build_abstract(config.model)) == CONFIGS[name]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("omnianet-b0", "camus_omnianet:scratch"),
        ("omnianet-b4", "chaos_omnianet:scratch"),
        ("dxnet", "brats_dxnet:released"),
        ("dsnet", "brats_dsnet:released"),
    ],
)
def test_released_variants_are_what_released_files_hold(name, recipe):
    """The recipes and the port, which does not import them, agree."""
    held = flatten(networks.plain_dict(authors.NETWORKS[name]))
    stated = flatten(networks.plain_dict(load_config(recipe, []).model))
    read = {"in_channels", "out_channels", "norm", "filters", "images", "inner.norm", "inner.filters"}
    assert {k: v for k, v in stated.items() if k not in read} == held


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brats_dxnet", "dxnet, encoder efficientnet_b0, instance norm"),
        ("brats_dsnet", "dsnet, encoder efficientnet_b0, batch norm"),
    ],
)
def test_the_report_can_name_every_network(name, words):
    assert report.describe_network(load_config(f"configs/{name}.py", []).model.to_dict()) == words


@pytest.mark.parametrize(
    ("name", "widths", "residuals", "largest"),
    [
        ("b0", [8, 4, 6, 6, 10, 10, 20, 20, 20, 28, 28, 28, 48, 48, 48, 48], 9, 0.35),
        ("b4", [12, 6, 6, *[8] * 4, *[14] * 4, *[28] * 6, *[40] * 6, *[68] * 8, 112], 25, 0.3875),
    ],
)
def test_blocks_have_the_published_widths_and_rates(name, widths, residuals, largest):
    """Squeeze-excite widths, residual blocks and drop-path rates."""
    encoder = nnx.eval_shape(lambda: make_encoder(f"efficientnet_{name}", drop_path=0.4, rngs=ShapesOnly()))
    blocks = [b for stage in encoder.blocks for b in stage]
    assert [b.se.conv_reduce.kernel.shape[-1] for b in blocks] == widths
    assert sum(b.residual for b in blocks) == residuals
    assert max(b.drop_path.rate for b in blocks if b.residual) == pytest.approx(largest)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("size", [(64, 96), (65, 71), (64, 32, 64)])
def test_features_halve_upwards(size, padding):
    encoder = make_encoder(ndim=len(size), padding=padding)
    encoder.eval()
    features = jax.jit(lambda x: encoder(x))(jnp.ones((2, *size, 3)))
    for level, (feature, channels) in enumerate(zip(features, encoder.channels, strict=True), 1):
        assert feature.shape == (2, *(-(-n // 2**level) for n in size), channels)


def test_symmetric_and_same_padding_differ():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)
    features = []
    for padding in ("symmetric", "same"):
        encoder = make_encoder(padding=padding)
        encoder.eval()
        features.append(jax.jit(lambda x, encoder=encoder: encoder(x)[-1])(x))
    assert float(jnp.abs(features[0] - features[1]).max()) > 1e-3


def test_batch_norm_keeps_running_statistics_as_torch_does():
    x = np.random.default_rng(0).normal(2, 3, size=(2, 3, 2, 2)).astype(np.float32)  # 12 values per channel
    norm = layers.Norm(2, Style(2, "batch", 1e-5))
    norm(jnp.asarray(x))
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    norm.eval()
    expected = (x - 0.1 * x.mean((0, 1, 2))) / np.sqrt(0.9 + 0.1 * x.var((0, 1, 2), ddof=1) + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_instance_norm_ignores_the_other_samples():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 4, 3)), jnp.float32)
    norm = layers.Norm(3, Style(3, "instance", 1e-5))
    np.testing.assert_array_equal(norm(x)[:1], norm(x[:1]))
    np.testing.assert_allclose(jnp.mean(norm(x), (1, 2, 3)), 0, atol=1e-6)


def test_drop_path_drops_samples_and_keeps_the_mean():
    drop = layers.DropPath(0.25)
    y = np.asarray(drop(jnp.ones((4000, 1, 1, 2)), nnx.Rngs(dropout=0)))
    assert set(np.unique(y.round(5))) == {0.0, np.float32(1.33333)}
    assert (y[..., 0] == y[..., 1]).all()
    assert abs(y.mean() - 1) < 0.05
    drop.eval()
    np.testing.assert_array_equal(drop(jnp.ones((2, 1, 1, 2)), None), 1)
    drop.train()
    with pytest.raises(ValueError, match="rngs"):
        drop(jnp.ones((2, 1, 1, 2)), None)


def test_dxnet_gives_logits_at_full_resolution():
    network = networks.build(TOY_MODEL, seed=0)
    network.eval()
    logits = jax.jit(lambda x: network(x))(jnp.ones((2, 64, 32, 64, 4)))
    assert logits.shape == (2, 64, 32, 64, 3)


@pytest.mark.slow
def test_a_network_is_the_same_function_in_both_forms():
    """float64, so that only the order of sums may differ: logits and every gradient, in training mode.

    In 3D, `test_doctor` compares a step of DX-Net, `test_parity` the fast form with PyTorch, `test_ops` the operations.
    """
    section, _, shape = unet_case("omnianet", upsampling="transposed", activation="silu", norm="instance")
    with jax.enable_x64(True):
        graphdef, params, stats = split_model(networks.build(section, seed=0))
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape))

        def loss(params):
            model = nnx.merge(graphdef, params, stats)
            model.train()
            logits = model(x, rngs=nnx.Rngs(dropout=0))
            return jnp.mean(jnp.square(logits - 1)), logits

        results = []
        for form in ("fast", "reference"):
            with ops.use_implementation(form):
                results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    (loss_f, logits_f), grads_f = results[0]
    (loss_r, logits_r), grads_r = results[1]
    assert float(loss_f) == pytest.approx(float(loss_r), rel=1e-12)
    np.testing.assert_allclose(logits_f, logits_r, atol=1e-9)
    for path, fast in jax.tree_util.tree_leaves_with_path(grads_f):
        plain = grads_r
        for key in path:
            plain = plain[key.key]
        np.testing.assert_allclose(fast, plain, atol=1e-8, err_msg=jax.tree_util.keystr(path))
        if path[-1].key == "kernel":  # a bias that only meets an instance norm has no gradient
            assert np.abs(fast).max() > 0, jax.tree_util.keystr(path)


def test_seed_decides_the_weights():
    leaves = [jax.tree.leaves(split_model(networks.build(TOY_MODEL, seed=s))[1]) for s in (0, 0, 1)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any((a != b).any() for a, b in zip(leaves[0], leaves[2], strict=True))


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ((64, 70, 64), "axis H is 70: 35 at level 1/2 cannot be halved; use 64 or 96"),
        (
            (20, 64, 65),
            "axis D is 20: 5 at level 1/4 cannot be halved; use 32 or 64; "
            "axis W is 65: 65 at level 1/1 cannot be halved",
        ),
        ((0, 64, 64), "axis D is 0: 0 at level 1/1 cannot be halved; use 32 or 64"),
        ((64, 64), "3 \\(D, H, W\\)"),
        ((32, 32, 32), "one voxel"),
    ],
)
def test_illegal_patches_are_explained(patch, words):
    with pytest.raises(ValueError, match=words):
        networks.check_patch(TOY_MODEL, patch)
    networks.check_patch(TOY_MODEL, (64, 32, 32))


OMNIANET, DSNET = unet_case("omnianet")[0], ds_case()[0]


@pytest.mark.quick
@pytest.mark.parametrize("section", [OMNIANET, TOY_MODEL, DSNET], ids=lambda section: section["name"])
def test_an_abstract_network_has_the_arrays_of_the_network(section):
    """Names, shapes and dtypes."""
    found, built = (nnx.state(m) for m in (networks.build_abstract(section), networks.build(section, seed=0)))
    shapes = [[(jax.tree_util.keystr(k), a.shape, a.dtype) for k, a in jax.tree_util.tree_leaves_with_path(s)]
              for s in (found, built)]  # fmt: skip
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20


@pytest.mark.parametrize(
    ("section", "patch", "words"),
    [
        (
            OMNIANET,
            (256, 250),
            "data.patch=(256, 250) does not fit omnianet; axis W is 250: 125 at level 1/2 cannot be halved",
        ),
        (OMNIANET, (64, 64, 64), "2 (H, W)"),
        (
            DSNET,
            (96, 64, 64),
            "2 planes, not 3; use 97 to 144",
        ),
        (DSNET, (145, 64, 64), "4 planes, not 3; use 97 to 144"),
        (DSNET, (128, 64, 72), "axis W is 72: 9 at level 1/8 cannot be halved; use 64 or 96"),
        (
            TOY_MODEL | {"depth": {"strides": (1, 1, 2, 2, 2)}},
            (12, 64, 64),
            "axis D is 12: 3 at level 1/4 cannot be halved; use 8 or 16",
        ),
    ],
)
def test_illegal_sizes_are_explained_for_every_network(section, patch, words):
    with pytest.raises(ValueError) as error:
        networks.check_patch(section, patch)
    assert words in str(error.value)


class Wrapped(nnx.Module):
    """A network with an inner network, like DS-Net. No other file refers to it."""

    ndim, fixed_axes, encoder_path, remat = 2, 0, ("body", "encoder"), ()
    stages, parts = ("body", "body.encoder", "body.decoder5"), ("body",)

    def __init__(self, *, body, rngs):
        self.body = networks.OmniaNet(rngs=rngs, **body)

    @classmethod
    def size_problems(cls, section, size):
        return [f"axis H is {size[0]}, not {section['body']['filters'][0]}"] if size[0] != 8 else []

    @classmethod
    def check_space(cls, section, size, devices):
        raise UserError(f"{devices} devices")


def test_a_new_network_needs_only_a_class_and_an_entry(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "wrapped", Wrapped)
    body = {key: value for key, value in OMNIANET.items() if key != "name"} | {"filters": (8,) * 5}
    section = {"name": "wrapped", "body": body}
    assert networks.spatial_axes(section) == 2 and networks.part_names(section) == ("body",)
    prefix, encoder = encoder_section(section)
    assert prefix == "body.encoder."
    assert (encoder["name"], encoder["ndim"], encoder["in_channels"]) == ("efficientnet_toy", 2, 8)
    networks.check_patch(section, (8, 9))
    with pytest.raises(ValueError, match=r"wrapped.* H is 9, not 8"):
        networks.check_patch(section, (9, 9))
    with pytest.raises(UserError, match="2 devices"):
        networks.check_space(section, (8, 9), 2)
    model = networks.build_abstract(section)
    networks.set_remat(model, "body.dec*")
    assert model.remat == ("body.decoder5",) and model.body.remat == ("decoder5",)


def test_legal_sizes_pass():
    networks.check_patch(OMNIANET, (32, 64))
    for depth in (97, 128, 144):
        networks.check_patch(DSNET, (depth, 32, 32))
    networks.check_patch(TOY_MODEL | {"depth": {"strides": (1,) * 5}}, (7, 64, 64))


def test_a_wrong_image_is_refused_when_the_program_is_traced():
    for section, shape, words in (
        (OMNIANET, (1, 64, 40, 3), "axis W is 40: 5 at level 1/8 cannot be halved"),
        (DSNET, (1, 90, 32, 32, 4), "axis D is 90"),
    ):
        model = networks.build_abstract(section)
        with pytest.raises(ValueError, match=words):
            nnx.eval_shape(lambda m, s=shape: m(jnp.zeros(s), rngs=nnx.Rngs(0)), model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "unet"}, "unknown network 'unet'; known: omnianet, dxnet, dsnet"),
        ({"norm": "group"}, "unknown norm 'group'; known: batch, instance"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; known: relu, silu"),
        ({"upsampling": "cubic"}, "unknown upsampling 'cubic'; known: nearest, transposed"),
        ({"filters": (8, 8)}, "filters=(8, 8): expected 5 numbers"),
        ({"depth": {"padding": "wrap"}}, "unknown depth padding 'wrap'; known: zero, edge, renorm"),
        ({"depth": {"strides": (2, 2, 3, 2, 2)}}, "each 1 or 2, finest level first"),
        (
            {"norm": "batch", "encoder": {"name": "resnet18", "eps": -1.0}},
            "eps of a norm must be above 0 and below 1; got -1.0",
        ),
        ({"name": "omnianet", "depth": {"axis": 1}}, "a 2D network has no depth options"),
        ({"width": 3}, "dxnet: got an unexpected keyword argument 'width'"),
        ({"encoder": {"name": "b9", "eps": 1e-5}}, "unknown encoder 'b9'; known: efficientnet_b0"),
        ({"encoder": {"name": "resnet18", "padding": "valid"}}, "unknown padding 'valid'; known: symmetric, same"),
        ({"encoder": {"name": "resnet18", "drop_path": 1.0}}, "a drop-path rate must be in [0, 1); got 1.0"),
    ],
)
def test_unknown_choices_list_the_known_ones(change, words):
    with pytest.raises(ValueError) as error:
        networks.build_abstract(TOY_MODEL | change)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "resnet50", "convnext_tiny"))],
)
def test_stochastic_depth_is_timms_schedule_and_at_work(name):
    """Rates block by block as timm's; and in training two keys give two results."""
    model = timm.create_model(name, pretrained=False, drop_path_rate=0.4)
    owners = [m for m in model.modules() if type(getattr(m, "drop_path", None)).__name__ == "DropPath"]
    theirs = [m.drop_path.drop_prob for m in owners if getattr(m, "has_skip", True)]
    runs = name in ("resnet18", "convnext_tiny")  # the others are slow to compile; test_training runs EfficientNet's
    make = lambda: make_encoder(name, drop_path=0.4, norm="instance")  # noqa: E731
    encoder = make() if runs else nnx.eval_shape(make)
    blocks = [m for _, m in nnx.iter_modules(encoder) if hasattr(m, "drop_path") and getattr(m, "residual", True)]
    rates = sorted(b.drop_path.rate for b in blocks if b.drop_path.rate > 0)
    assert rates == pytest.approx(sorted(theirs))
    if not runs:
        return
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
    if name.startswith("convnext"):
        for _, module in nnx.iter_modules(encoder):
            if hasattr(module, "gamma"):
                module.gamma[...] = jnp.ones(module.gamma.shape)
    run = jax.jit(lambda key: encoder(x, nnx.Rngs(dropout=key))[-1])
    a, again, b = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(3))
    assert (a == again).all() and not (a == b).all()


def test_ds_nets_heads_go_from_fine_to_coarse():
    model = networks.build_abstract(DSNET | {"deep_supervision": True})
    x = jnp.zeros((1, 128, 32, 32, 4))
    levels = nnx.eval_shape(lambda m: m(x, rngs=nnx.Rngs(0), levels=True), model)
    assert [level.shape[1] for level in levels] == [128, 43, 22, 11]


def test_renormalised_padding_keeps_constants():
    """A convolution whose taps sum to 1 along depth answers a constant with that constant, at the borders too."""
    style = Style(3, depth=Depth(padding="renorm"))
    conv = layers.Conv(1, 1, (3, 1, 1), style=style, strides=(2, 1, 1), rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.full(conv.kernel.shape, 1 / 3)
    np.testing.assert_allclose(conv(jnp.full((1, 6, 2, 2, 1), 5.0)), 5.0, rtol=1e-6)


def test_a_network_without_depth_strides_keeps_every_slice():
    section = TOY_MODEL | {"depth": {"strides": (1, 2, 1, 1, 1)}}
    model = networks.build(section, seed=0)
    model.eval()
    features, logits = jax.jit(lambda x: (model.features(x), model(x)))(jnp.ones((1, 6, 64, 32, 4)))
    assert [f.shape[1:4] for f in features] == [(6, 32, 16), (3, 16, 8), (3, 8, 4), (3, 4, 2), (3, 2, 1)]
    assert logits.shape == (1, 6, 64, 32, 3)


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "convnext_tiny"])
@pytest.mark.parametrize("network", ["omnianet", "dxnet"])
def test_other_families_make_whole_networks(network, name):
    """Shapes only: the encoders' numbers are compared with timm's elsewhere."""
    section = unet_case(network, upsampling="transposed")[0]
    section["encoder"] = section["encoder"] | {"name": name, "drop_path": 0.1}
    model = networks.build_abstract(section)
    shape = (1, 64, 32, 3) if network == "omnianet" else (1, 64, 32, 32, 4)
    logits = nnx.eval_shape(lambda m: m(jnp.zeros(shape), rngs=nnx.Rngs(dropout=0)), model)
    assert logits.shape == (*shape[:-1], 3)
    assert all(
        f is None or f.shape[1] == 32 // 2**i
        for i, f in enumerate(nnx.eval_shape(lambda m: m.features(jnp.zeros(shape), nnx.Rngs(dropout=0)), model))
    )


def test_cpu_program_holds_no_native_depthwise_or_transposed_convolution():
    """XLA's own are ten times slower on CPU: the compiled gradient must hold neither grouped nor dilated ones in 3D."""
    graphdef, params, stats = split_model(networks.build(TOY_MODEL, seed=0))

    def loss(params, x):
        model = nnx.merge(graphdef, params, stats)
        model.train()
        return jnp.mean(jnp.square(model(x, rngs=nnx.Rngs(dropout=0))))

    def hlo(form):
        with ops.use_implementation(form):
            step = jax.jit(lambda p, x: jax.grad(loss)(p, x))
            return step.lower(params, jnp.ones((1, 64, 64, 32, 4))).as_text("hlo")

    def native(text):
        lines = [line for line in text.splitlines() if " convolution(" in line]
        assert lines
        grouped = [x for x in lines if "feature_group_count" in x or "batch_group_count" in x]
        return grouped, [x for x in lines if "lhs_dilate" in x or "rhs_dilate" in x or "b012f" in x]

    assert native(hlo("fast")) == ([], [])
    assert all(native(hlo("reference"))), "the check sees the native forms where they are"
