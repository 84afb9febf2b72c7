"""EfficientNet and DX-Net: sizes, parameter counts, modes, and forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import TOY_MODEL
from xdim_jax import efficientnet, layers, models, ops
from xdim_jax.step import split_model

# parameters without head and classifier, feature channels, blocks: counted on timm 1.0.31's tf_efficientnet_b*
TIMM = {
    "b0": (3_595_388, (32, 24, 40, 112, 320), 16),
    "b1": (6_101_024, (32, 24, 40, 112, 320), 23),
    "b2": (7_202_562, (32, 24, 48, 120, 352), 23),
    "b3": (10_103_336, (40, 32, 48, 136, 384), 26),
    "b4": (16_742_216, (48, 32, 56, 160, 448), 32),
    "b5": (27_288_112, (48, 40, 64, 176, 512), 39),
    "b6": (39_403_992, (56, 40, 72, 200, 576), 45),
    "b7": (62_143_440, (64, 48, 80, 224, 640), 55),
}


def make_encoder(name="toy", *, channels=3, ndim=2, norm="batch", padding="symmetric", drop_path=0.0):
    return efficientnet.EfficientNet(
        name, channels, ndim=ndim, norm=norm, eps=1e-3, padding=padding, drop_path=drop_path, rngs=nnx.Rngs(0)
    )


def test_no_member_is_missing_from_the_table():
    assert set(TIMM) | {"toy"} == set(efficientnet.SCALING)


@pytest.mark.parametrize("name", TIMM)
def test_encoder_has_timms_parameters(name):
    encoder = nnx.eval_shape(lambda: make_encoder(name))
    count, channels, blocks = TIMM[name]
    assert models.count_parameters(nnx.state(encoder, nnx.Param)) == count
    assert encoder.channels == channels
    assert sum(len(stage) for stage in encoder.blocks) == blocks


@pytest.mark.parametrize(
    ("name", "widths", "residuals", "largest"),
    [
        ("b0", [8, 4, 6, 6, 10, 10, 20, 20, 20, 28, 28, 28, 48, 48, 48, 48], 9, 0.35),
        ("b4", [12, 6, 6, *[8] * 4, *[14] * 4, *[28] * 6, *[40] * 6, *[68] * 8, 112], 25, 0.3875),
    ],
)
def test_blocks_as_the_specification_lists_them(name, widths, residuals, largest):
    """Squeeze-excite widths, residual blocks and drop-path rates (spec: architecture, section 2)."""
    encoder = nnx.eval_shape(lambda: make_encoder(name, drop_path=0.4))
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
    norm = layers.Norm(2, kind="batch", eps=1e-5)
    norm(jnp.asarray(x))
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    norm.eval()
    expected = (x - 0.1 * x.mean((0, 1, 2))) / np.sqrt(0.9 + 0.1 * x.var((0, 1, 2), ddof=1) + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_instance_norm_ignores_the_other_samples():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 4, 3)), jnp.float32)
    norm = layers.Norm(3, kind="instance", eps=1e-5)
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


def test_dxnet_b0_has_the_papers_parameters():
    """12,954,991 in the released code, of which 412,160 are a head that is never called (spec, section 6)."""
    config = TOY_MODEL | {"encoder": "b0", "filters": (256, 128, 64, 32, 16)}
    network = nnx.eval_shape(lambda: models.build(config, seed=0))
    assert models.count_parameters(nnx.state(network, nnx.Param)) == 12_954_991 - 412_160


def test_dxnet_gives_logits_at_full_resolution():
    network = models.build(TOY_MODEL, seed=0)
    network.eval()
    logits = jax.jit(lambda x: network(x))(jnp.ones((2, 64, 32, 64, 4)))
    assert logits.shape == (2, 64, 32, 64, 3)


def test_dxnet_is_the_same_function_in_both_forms():
    """float64, so that only the order of sums may differ: logits and every gradient, in training mode."""
    with jax.enable_x64(True):
        graphdef, params, stats = split_model(models.build(TOY_MODEL | {"drop_path": 0.0}, seed=0))
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 32, 4)))

        def loss(params):
            model = nnx.merge(graphdef, params, stats)
            model.train()
            logits = model(x, rngs=nnx.Rngs(dropout=0))
            return jnp.mean(jnp.square(logits - 1)), logits

        results = []
        for form in ("fast", "reference"):
            with ops.use_form(form):
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
    leaves = [jax.tree.leaves(split_model(models.build(TOY_MODEL, seed=s))[1]) for s in (0, 0, 1)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any((a != b).any() for a, b in zip(leaves[0], leaves[2], strict=True))


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ((64, 70, 64), "axis H is 70: use 64 or 96"),
        ((20, 64, 65), "axis D is 20: use 32; axis W is 65: use 64 or 96"),
        ((64, 64), "3 \\(D, H, W\\)"),
        ((32, 32, 32), "one voxel"),
    ],
)
def test_illegal_patches_are_explained(patch, words):
    with pytest.raises(ValueError, match=words):
        models.check_patch(TOY_MODEL, patch)
    models.check_patch(TOY_MODEL, (64, 32, 32))


@pytest.mark.parametrize(
    ("key", "value"), [("name", "unet"), ("encoder", "b9"), ("norm", "group"), ("padding", "valid")]
)
def test_unknown_choices_list_the_known_ones(key, value):
    with pytest.raises(ValueError, match=f"{value}.*known: "):
        models.build(TOY_MODEL | {key: value}, seed=0)


def test_cpu_program_holds_no_native_depthwise_or_transposed_convolution():
    """XLA's own are ten times slower on CPU: the compiled gradient must hold neither grouped nor dilated ones in 3D."""
    graphdef, params, stats = split_model(models.build(TOY_MODEL, seed=0))

    def loss(params, x):
        model = nnx.merge(graphdef, params, stats)
        model.train()
        return jnp.mean(jnp.square(model(x, rngs=nnx.Rngs(dropout=0))))

    def hlo(form):
        with ops.use_form(form):
            step = jax.jit(lambda p, x: jax.grad(loss)(p, x))
            return step.lower(params, jnp.ones((1, 64, 64, 32, 4))).as_text("hlo")

    def native(text):
        lines = [line for line in text.splitlines() if " convolution(" in line]
        assert lines
        grouped = [x for x in lines if "feature_group_count" in x or "batch_group_count" in x]
        return grouped, [x for x in lines if "lhs_dilate" in x or "rhs_dilate" in x or "b012f" in x]

    assert native(hlo("fast")) == ([], [])
    assert all(native(hlo("reference"))), "the check sees the native forms where they are"
