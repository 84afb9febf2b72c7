"""The fast forms equal the plain ones, and the plain ones equal scipy and sums written out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from xdim_jax import ops
from xdim_jax.ops import dense, slabs, upsampled, winograd

pytestmark = pytest.mark.usefixtures("float64")


def both_forms(function, *args):
    """Largest relative difference of the two forms: value, and gradient of a nonlinear sum for every argument."""

    def loss(*args):
        return jnp.sum(jnp.sin(function(*args)))

    results = []
    for form in ("fast", "reference"):
        with ops.use_implementation(form):
            value = jax.jit(lambda *a: function(*a))(*args)
            grads = jax.jit(lambda *a: jax.grad(loss, tuple(range(len(args))))(*a))(*args)
        results.append(jax.tree.leaves((value, grads)))
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(*results, strict=True))


def random_shape(rng, ndim):
    kernel = tuple(int(k) for k in rng.choice([1, 2, 3, 5], ndim))
    strides = tuple(int(s) for s in rng.choice([1, 2, 3, 4], ndim)) if rng.random() < 0.6 else (1,) * ndim
    size = tuple(int(rng.integers(k + 2, 11)) for k in kernel)
    padding = ops.symmetric_padding(kernel) if rng.random() < 0.5 else ops.same_padding(size, kernel, strides)
    return kernel, strides, size, padding


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_fast_convolution_equals_reference(kind, ndim, case):
    rng = np.random.default_rng([case, ndim])
    kernel, strides, size, padding = random_shape(rng, ndim)
    channels, filters = (int(n) for n in rng.integers(1, 5, 2))
    x = rng.normal(size=(int(rng.integers(1, 3)), *size, channels))
    groups = channels if kind == "depthwise" else 1
    shape = (*kernel, 1, channels) if kind == "depthwise" else (*kernel, channels, filters)
    w = rng.normal(size=shape)
    error = both_forms(lambda x, w: ops.conv(x, w, strides=strides, padding=padding, groups=groups), x, w)
    assert error < 1e-12, (kernel, strides, size, padding)


@pytest.mark.slow
def test_slabs_and_loops_are_exercised(rng):
    """Large enough that the weight gradients take several slabs, and a kernel of 125 taps the loop."""
    x = rng.normal(size=(1, 16, 64, 64, 16))
    assert 2 * slabs._SLAB_BYTES < 16 * 64 * 64 * (3 * 16 + 9 * 8) * 8
    same = ops.symmetric_padding((3, 3, 3))
    dense = rng.normal(size=(3, 3, 3, 16, 8))
    assert both_forms(lambda x, w: ops.conv(x, w, strides=(1, 1, 1), padding=same), x, dense) < 1e-12
    x = rng.normal(size=(2, 9, 8, 10, 3))
    for strides in ((1, 1, 1), (2, 2, 2)):
        wide = rng.normal(size=(5, 5, 5, 1, 3))
        pads = ops.symmetric_padding((5, 5, 5))
        assert (
            both_forms(lambda x, w, s=strides, p=pads: ops.conv(x, w, strides=s, padding=p, groups=3), x, wide) < 1e-12
        )


@pytest.mark.quick
@pytest.mark.parametrize("form", ["fast", "reference"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_convolution_is_scipys_correlation(form, ndim, rng):
    size, kernel = (7, 6, 8)[:ndim], (3, 5, 3)[:ndim]
    x, w = rng.normal(size=(1, *size, 2)), rng.normal(size=(*kernel, 2, 3))
    with ops.use_implementation(form):
        y = ops.conv(jnp.asarray(x), jnp.asarray(w), strides=(1,) * ndim, padding=ops.symmetric_padding(kernel))
    for o in range(3):
        expected = sum(ndimage.correlate(x[0, ..., i], w[..., i, o], mode="constant") for i in range(2))
        np.testing.assert_allclose(y[0, ..., o], expected, atol=1e-12)


@pytest.mark.quick
@pytest.mark.parametrize("form", ["fast", "reference"])
@pytest.mark.parametrize("window", [(2, 2, 2), (3, 1, 2), (2, 3)])
def test_conv_transpose_scatters_like_torch(form, window, rng):
    """out[s i + t] = x[i] w[t], summed voxel by voxel; the convention that a plain lax.conv_transpose does not have."""
    ndim = len(window)
    size = (3, 2, 4)[:ndim]
    x, w = rng.normal(size=(1, *size, 2)), rng.normal(size=(*window, 2, 3))
    expected = np.zeros((*(n * k for n, k in zip(size, window, strict=True)), 3))
    for i in itertools.product(*map(range, size)):
        for t in itertools.product(*map(range, window)):
            expected[tuple(a * k + b for a, k, b in zip(i, window, t, strict=True))] = x[0][i] @ w[t]
    with ops.use_implementation(form):
        np.testing.assert_allclose(ops.conv_transpose(jnp.asarray(x), jnp.asarray(w))[0], expected, atol=1e-12)


def test_conv_transpose_gradients(rng):
    x, w = rng.normal(size=(2, 3, 4, 2, 5)), rng.normal(size=(2, 2, 2, 5, 3))
    assert both_forms(ops.conv_transpose, x, w) < 1e-12


# kernel, stride, PyTorch's padding, output: overlapping taps, gaps, cropped short, continued past the last tap
OVERLAPS = [
    (5, 3, 0, 11),
    (5, 3, 0, 9),
    (5, 3, 0, 12),
    (3, 2, 1, 6),
    (4, 3, 1, 8),
    (4, 3, 1, 9),
    (2, 3, 0, 8),
    (3, 1, 1, 3),
]


@pytest.mark.parametrize("form", ["fast", "reference"])
@pytest.mark.parametrize(("k", "s", "p", "m"), OVERLAPS)
def test_conv_transpose_along_depth(form, k, s, p, m, rng):
    x, w = rng.normal(size=(2, 3, 2, 2, 4)), rng.normal(size=(k, 1, 1, 4, 3))
    expected = np.zeros((2, m, 2, 2, 3))
    for i, t in itertools.product(range(3), range(k)):
        if 0 <= s * i - p + t < m:
            expected[:, s * i - p + t] += x[:, i] @ w[t, 0, 0]
    with ops.use_implementation(form):
        y = ops.conv_transpose(jnp.asarray(x), jnp.asarray(w), strides=(s, 1, 1), crop=(p, 0, 0), size=(m, 2, 2))
    np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize(("k", "s", "p", "m"), OVERLAPS)
def test_overlapping_conv_transpose_gradients(k, s, p, m, rng):
    x, w = rng.normal(size=(2, 3, 4, 2, 3)), rng.normal(size=(k, 2, 1, 3, 2))

    def function(x, w):
        return ops.conv_transpose(x, w, strides=(s, 2, 1), crop=(p, 0, 0), size=(m, 8, 2))

    assert both_forms(function, x, w) < 1e-12


def test_upsample_repeats_and_crops(rng):
    x = rng.normal(size=(1, 2, 3, 4))
    expected = np.repeat(np.repeat(x, 3, 1)[:, :5], 2, 2)
    np.testing.assert_array_equal(ops.upsample(jnp.asarray(x), (3, 2), (5, 6)), expected)
    with pytest.raises(ValueError, match=r"axis 0 has 4 .* size=\(5, 6\)"):
        ops.upsample(jnp.asarray(x), (2, 2), (5, 6))


@pytest.mark.quick
def test_max_pool_ignores_padding():
    x = -jnp.arange(1.0, 7.0).reshape(1, 6, 1)
    np.testing.assert_array_equal(ops.max_pool(x, (3,), (2,), ((1, 1),)).ravel(), [-1, -2, -4])


def test_layer_norm_standardises_every_voxel(rng):
    y = ops.layer_norm(jnp.asarray(rng.normal(3, 2, size=(2, 4, 5, 8))), jnp.ones(8), jnp.zeros(8), eps=0.0)
    np.testing.assert_allclose(np.mean(y, -1), 0, atol=1e-12)
    np.testing.assert_allclose(np.std(y, -1), 1, rtol=1e-12)


@pytest.mark.parametrize("axes", [(1, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("activation", [None, "silu", "relu", "relu6", "gelu"])
def test_normalise_equals_plain_autodiff(axes, activation, rng):
    x, scale, bias = rng.normal(3, 2, size=(2, 4, 3, 5, 6)), 4 * rng.normal(size=6), rng.normal(size=6)

    def norm(x, scale, bias):
        return ops.normalise(x, scale, bias, axes=axes, eps=1e-3, activation=activation)[0]

    assert both_forms(norm, x, scale, bias) < 1e-11


def test_normalise_keeps_digits_of_a_large_mean(rng):
    """E[x^2] - E[x]^2 would lose them in float32."""
    x = (rng.normal(size=(1, 16, 16, 16, 2)) + 3000).astype(np.float32)
    one = jnp.ones(2, jnp.float32)
    y, mean, var = ops.normalise(jnp.asarray(x), one, 0 * one, axes=(1, 2, 3), eps=0.0, activation=None)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean[0, 0, 0, 0], exact.mean((0, 1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(var[0, 0, 0, 0], exact.var((0, 1, 2, 3)), rtol=1e-3)
    assert abs(float(jnp.std(y)) - 1) < 1e-3


@pytest.mark.quick
def test_squeeze_and_excitation_by_hand():
    """Means of 2 and 4 over the voxels; a gate of log 3 lets through three quarters."""
    x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])
    seen = []
    y = ops.squeeze_excite(x, lambda m: seen.append(m) or jnp.full_like(m, np.log(3)), axes=(1,))
    np.testing.assert_allclose(seen[0], [[[2.0, 4.0]]])
    np.testing.assert_allclose(y, 0.75 * x, rtol=1e-6)


@pytest.mark.quick
def test_same_padding_by_hand():
    # 224 at stride 2: k 3 needs 1 pixel, after; k 5 needs 3; odd 65 with k 3 needs 2
    assert ops.same_padding((224, 224, 65), (3, 5, 3), (2, 2, 2)) == ((0, 1), (1, 2), (1, 1))
    assert ops.symmetric_padding((3, 5)) == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    ("x", "w", "groups", "word"),
    [
        ((1, 4, 4, 2), (3, 3, 3, 2, 1), 1, "spatial"),
        ((1, 4, 4, 6), (3, 3, 3, 6), 2, "groups=2"),
        ((1, 4, 4, 2), (3, 3, 5, 1), 1, "fit"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, w, groups, word):
    with pytest.raises(ValueError, match=word):
        ops.conv(jnp.zeros(x), jnp.zeros(w), strides=(1, 1), padding=((1, 1), (1, 1)), groups=groups)


def test_forms_that_were_taken_are_counted(rng):
    """A network of one convolution each, in the fast form and in the plain one."""
    x = jnp.asarray(rng.normal(size=(1, 8, 32, 32, 64)))

    def network(x):
        for window, groups in (((3, 3, 3), 1), ((1, 1, 1), 1), ((3, 3, 3), 64)):
            padding = ops.symmetric_padding(window)
            x = ops.conv(x, jnp.zeros((*window, 64 // groups, 64)), strides=(1,) * 3, padding=padding, groups=groups)
        x = ops.conv_upsampled(x, None, jnp.zeros((3, 3, 3, 64, 8)), factors=(2, 2, 2))
        return ops.conv_transpose(x, jnp.zeros((2, 2, 2, 8, 8)))

    with ops.count_implementations() as fast:
        jax.eval_shape(network, x)
    with ops.count_implementations() as plain, ops.use_implementation("reference"):
        jax.eval_shape(lambda x: network(x), x)
    words = ["dense by Winograd", "1x1 as matrix products", "depthwise as shifted sums", "composed with upsampling"]
    assert fast == dict.fromkeys([*words, "transposed as matrix products"], 1)
    assert plain == {"dense by XLA": 2, "1x1 as matrix products": 1, "depthwise by XLA": 1, "transposed by XLA": 1}


def test_forms_are_a_closed_set():
    with pytest.raises(ValueError, match="fastest"), ops.use_implementation("fastest"):
        pass
    with pytest.raises(ValueError, match="tanh"):
        ops.activate(jnp.zeros(3), "tanh")
    with ops.use_implementation("reference"):
        assert ops.active_implementation() == "reference"
    assert ops.active_implementation() == "fast"  # these tests run on CPU


def test_a_form_stays_with_its_function(rng):
    """Traced inside another form, a function that was given one keeps it; auto takes that of its surroundings."""
    x, w = jnp.asarray(rng.normal(size=(1, 4, 4, 4, 2))), jnp.asarray(rng.normal(size=(3, 3, 3, 1, 2)))

    def native(form, around):
        def depthwise(x, w):  # a new one: JAX keeps what it traced of a function
            return ops.conv(x, w, strides=(1, 1, 1), padding=((1, 1),) * 3, groups=2)

        with ops.use_implementation(around):
            text = jax.jit(ops.with_implementation(form, depthwise)).lower(x, w).as_text("hlo")
        return "feature_group_count=2" in text

    assert native("reference", "fast") and native("auto", "reference") and native("reference", "auto")
    assert not native("fast", "reference") and not native("auto", "fast") and not native("auto", "auto")
    with pytest.raises(ValueError, match="fastest"):
        ops.with_implementation("fastest", abs)
    assert ops.describe_implementation().startswith("fast (cpu): ")
    assert ops.describe_implementation("reference").startswith("reference (")


def test_programs_with_our_compiler_options_compute_the_same(rng):
    """On CPU there are some, and a compiler that does not know them is not asked twice."""
    x, w = rng.normal(size=(1, 6, 8, 8, 4)), rng.normal(size=(3, 3, 3, 4, 8))
    assert ops.compiler_options()

    def conv(x, w):
        return ops.conv(x, w, strides=(1, 1, 1), padding=((1, 1),) * 3).sum((1, 2, 3))

    np.testing.assert_allclose(ops.compile_program(jax.jit(conv).lower(x, w))(x, w), jax.jit(conv)(x, w), rtol=1e-12)


@pytest.mark.parametrize(("channels", "filters"), [(8, 2), (2, 8), (4, 4)])
@pytest.mark.parametrize("padding", [((1, 1),) * 3, ((0, 0), (1, 1), (1, 1)), ((2, 0), (0, 2), (1, 1))])
def test_depth_taps_as_outputs_and_as_inputs(channels, filters, padding, rng):
    """More channels out than in, and fewer: the two ways of a dense 3D convolution, with every kind of padding."""
    x, w = rng.normal(size=(2, 5, 6, 7, channels)), rng.normal(size=(3, 3, 3, channels, filters))
    assert both_forms(lambda x, w: ops.conv(x, w, strides=(1, 1, 1), padding=padding), x, w) < 1e-12


def spied(monkeypatch, module, name):
    """Calls of a function are counted: the form under test was taken."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: calls.append(1) or function(*a))
    return calls


@pytest.mark.parametrize("depth_padding", [1, 0])
@pytest.mark.parametrize("size", [(4, 3, 5), (7, 3, 4), (9, 4, 4), (4, 5), (10, 6)])
def test_winograd_equals_reference(size, depth_padding, rng, monkeypatch):
    """Whole tiles of four and parts of one; another padding is not Winograd's, and right as well."""
    monkeypatch.setattr(winograd, "_MIN_CHANNELS", {4: 1, 5: 1})
    monkeypatch.setattr(winograd, "_MIN_PRODUCTS", 1)
    forward, backward = (spied(monkeypatch, dense, name) for name in ("winograd", "winograd_gradient"))
    ndim = len(size)
    padding = ((depth_padding,) * 2, *[(1, 1)] * (ndim - 1))
    x, w = rng.normal(size=(2, *size, 3)), rng.normal(size=(*(3,) * ndim, 3, 2))
    assert both_forms(lambda x, w: ops.conv(x, w, strides=(1,) * ndim, padding=padding), x, w) < 1e-12
    assert (len(forward), len(backward)) == ((3, 1) if depth_padding else (0, 0))  # twice forward, once backward


def test_winograd_loses_few_digits_in_float32(rng, monkeypatch):
    """Against scipy's sum in float64: 2 to 4 times the rounding of a float32 sum, by processor."""
    monkeypatch.setattr(winograd, "_MIN_PRODUCTS", 1)
    x, w = rng.normal(size=(1, 8, 6, 6, 48)).astype("f4"), rng.normal(size=(3, 3, 3, 48, 16)).astype("f4")
    assert winograd.is_suitable(x, w, ((1, 1),) * 3)
    assert not winograd.is_suitable(jnp.asarray(x, jnp.bfloat16), w, ((1, 1),) * 3)
    wide = x.astype("f8")[0], w.astype("f8")
    exact = sum(ndimage.correlate(wide[0][..., i], wide[1][..., i, 0], mode="constant") for i in range(48))
    errors = []
    for form in ("fast", "reference"):
        with ops.use_implementation(form):
            found = jax.jit(lambda *a: ops.conv(*a, strides=(1, 1, 1), padding=((1, 1),) * 3))(x, w)
        errors.append(np.sqrt(np.mean((np.asarray(found)[0, ..., 0] - exact) ** 2)))
    assert errors[0] < 5 * errors[1], errors


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("factors", [(2, 2), (2, 2, 2), (1, 2, 2), (2, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_behind_an_upsampling(transposed, factors, skip, rng, monkeypatch):
    """The composed form against upsampling, concatenation, convolution: value and every gradient, borders included."""
    monkeypatch.setattr(upsampled, "_MIN_SAVING", -np.inf)
    taken = spied(monkeypatch, upsampled, "_composed")
    ndim, channels = len(factors), 3
    middle = 2 if transposed else channels
    x = rng.normal(size=(2, *(3, 2, 4)[:ndim], channels))
    size = tuple(n * f for n, f in zip(x.shape[1:-1], factors, strict=True))
    arguments = [x, rng.normal(size=(*(3,) * ndim, middle + skip, 2))]
    arguments += [rng.normal(size=(2, *size, skip))] * bool(skip)
    if transposed:
        arguments += [rng.normal(size=(*factors, channels, middle)), rng.normal(size=middle)]

    def function(x, kernel, *rest):
        rest = list(rest)
        beside = rest.pop(0) if skip else None
        expand = ops.TransposedConv(*rest, (0,) * ndim) if transposed else None
        return ops.conv_upsampled(x, beside, kernel, factors=factors, transposed=expand)

    assert both_forms(function, *arguments) < 1e-12
    assert len(taken) == 2, "for the value and for the gradients"


@pytest.mark.parametrize(("k", "s", "p", "m"), OVERLAPS)
def test_convolution_behind_an_overlapping_upsampling(k, s, p, m, rng, monkeypatch):
    """What the transposed convolution has beyond the crop does not leak into the outermost planes."""
    monkeypatch.setattr(upsampled, "_MIN_SAVING", -np.inf)
    taken = spied(monkeypatch, upsampled, "_composed")
    x, skip, kernel = (rng.normal(size=n) for n in ((2, 3, 4, 2, 3), (2, m, 4, 2, 2), (3, 3, 3, 4, 2)))

    def function(x, skip, kernel, *expand):
        expand = ops.TransposedConv(*expand, (p, 0, 0))
        return ops.conv_upsampled(x, skip, kernel, factors=(s, 1, 1), size=(m, 4, 2), transposed=expand)

    assert both_forms(function, x, skip, kernel, rng.normal(size=(k, 1, 1, 3, 2)), rng.normal(size=2)) < 1e-12
    assert len(taken) == 2, "for the value and for the gradients"


def test_composing_kernels_is_left_where_it_costs_more_than_it_saves(monkeypatch):
    """A deep, small stage: 256 channels on 4^3 voxels would compose 5e11 products to save 1e8."""
    taken = spied(monkeypatch, upsampled, "_composed")

    def trace(side, channels):
        shapes = [(1, *(side,) * 3, channels), (3, 3, 3, channels, 16), (2, 2, 2, channels, channels), (channels,)]
        x, kernel, expand, bias = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
        jax.eval_shape(
            lambda x, k, e, b: ops.conv_upsampled(
                x, None, k, factors=(2, 2, 2), transposed=ops.TransposedConv(e, b, (0, 0, 0))
            ),
            *(x, kernel, expand, bias),
        )

    trace(4, 256)
    assert not taken
    trace(32, 32)
    assert taken
    with pytest.raises(ValueError, match=r"kernel\(3, 3, 5, 2\) .* 2 \+ 2 input channels"):
        ops.conv_upsampled(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 5, 2)), factors=(2, 2))


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding", "own"),
    [
        ((8, 6), 3, (2, 2), (1, 1), True),
        ((8, 8), 7, (2, 2), (3, 3), True),
        ((8, 4), 4, (4, 4), (0, 0), True),
        ((8, 6), 3, (2, 2), (0, 1), True),
        ((9, 6), 3, (3, 3), (1, 1), False),  # the last tap lies before the last place of a stride
        ((9, 6), 3, (2, 2), (1, 1), False),  # a side that the stride does not divide
        ((6, 8, 6), 3, (2, 2, 2), (1, 1), True),
        ((5, 8, 6), 3, (1, 2, 2), (1, 1), True),
        ((6, 4, 4), 3, (3, 1, 1), (1, 1), False),
    ],
)
def test_strided_convolutions(size, kernel, strides, padding, own, rng, monkeypatch):
    taken = spied(monkeypatch, dense, "_strided")
    ndim = len(size)
    x, w = rng.normal(size=(2, *size, 3)), rng.normal(size=(*(kernel,) * ndim, 3, 2))
    assert both_forms(lambda x, w: ops.conv(x, w, strides=strides, padding=(padding,) * ndim), x, w) < 1e-12
    assert bool(taken) == own


def test_the_gradient_of_a_kernel_in_bfloat16_is_summed_in_float32(rng, monkeypatch):
    """A sum of many slabs in bfloat16 would stop growing: with 128 parts its error was 7 %."""
    monkeypatch.setattr(slabs, "_SLAB_BYTES", 20_000)
    x, g = (jnp.asarray(1 + rng.normal(size=(1, 64, 16, 16, 8)), jnp.bfloat16) for _ in range(2))
    found = slabs.kernel_gradient(x, g, (3, 3, 3), ((1, 1),) * 3)
    wide, grad = np.pad(np.asarray(x, np.float64), [(0, 0), *[(1, 1)] * 3, (0, 0)]), np.asarray(g, np.float64)
    taps = itertools.product(range(3), repeat=3)
    expected = [np.tensordot(wide[:, a : a + 64, b : b + 16, c : c + 16], grad, [range(4)] * 2) for a, b, c in taps]
    expected = np.reshape(expected, (3, 3, 3, 8, 8))
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max() < 0.005


@pytest.mark.parametrize("products", [5e8, 0])
def test_a_layer_keeps_its_input_and_what_its_norm_takes(products, rng, monkeypatch, optimised):
    """Temporaries of a gradient grow by two arrays for a layer of convolution, norm and activation, and not by more:
    neither normalised values, nor Winograd's parts of what comes in, which are computed behind it again."""
    monkeypatch.setattr(winograd, "_MIN_PRODUCTS", products)
    monkeypatch.setattr(winograd, "_MIN_CHANNELS", {5: 1})
    x, w = rng.normal(size=(1, 24, 24, 24, 8)), rng.normal(size=(3, 3, 3, 8, 8))
    scale, bias = jnp.asarray(rng.normal(size=(2, 8)))

    def loss(kernels, scale, bias):
        y = x
        for kernel in kernels:
            y = ops.conv(y, kernel, strides=(1,) * 3, padding=((1, 1),) * 3)
            y, _, _ = ops.normalise(y, scale, bias, axes=(0, 1, 2, 3), eps=1e-5, activation="silu")
        return jnp.sum(y * y)

    def temporaries(layers):
        with ops.use_implementation("fast"):
            lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower([w] * layers, scale, bias)
        return ops.compile_program(lowered).memory_analysis().temp_size_in_bytes

    assert temporaries(4) - temporaries(2) == pytest.approx(2 * 2 * x.nbytes, rel=0.05)
