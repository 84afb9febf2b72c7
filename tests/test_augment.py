"""Augmentation against scipy and by hand, and as a pure function of a sample's own random bits."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import ndimage

from configs import _shared
from xdim_jax.base.errors import UserError
from xdim_jax.data import regions
from xdim_jax.inference import output
from xdim_jax.nets.functional import split_model
from xdim_jax.runs.state import init_state
from xdim_jax.training import augment, augment_table, loss, step

AFFINE = {"scale": {"p": 1.0}, "rotate": {"p": 1.0, "degrees": 40.0}, "translate": {"p": 1.0}, "shear": {"p": 1.0}}
ELASTIC = {"elastic": {"p": 1.0}}


def sample(rng, ndim, channels=2):
    shape = (24, 20, 17)[-ndim:]
    return rng.normal(size=(*shape, channels)).astype(np.float32), rng.integers(0, 4, shape).astype(np.uint8)


def on(section, ndim):
    return {k: v for k, v in augment_table.settings(section, ndim).items() if v["p"] > 0}


def keys_of(seed):
    root = jax.random.wrap_key_data(jnp.asarray([0, seed], jnp.uint32))
    return {name: jax.random.fold_in(root, number) for name, number in augment_table.STREAMS.items()}


@functools.cache
def compiled(section, ndim):
    return jax.jit(augment.make_augment(json.loads(section), ndim))


def one(section, seed, image, label):
    """A sample through the function that the training step calls."""
    batch = {"image": image[None], "label": label[None], "key": np.array([[0, seed]], np.uint32)}
    out = compiled(json.dumps(section), label.ndim)(batch)
    return np.asarray(out["image"][0]), np.asarray(out["label"][0])


@pytest.mark.quick
def test_random_streams_keep_their_numbers():
    """With another number, the same seed would give other samples."""
    released = "scale rotate translate shear flip elastic blur noise brightness contrast lowres gamma window cutout"
    assert [augment_table.STREAMS[name] for name in released.split()] == list(range(14))
    assert augment_table.STREAMS.keys() == augment_table.DEFAULTS.keys()
    assert len(set(augment_table.STREAMS.values())) == len(augment_table.STREAMS)


# -- geometry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_one_resampling_is_scipys_affine_transform(ndim, seed, rng):
    """Image linearly, label by nearest neighbour, through the map that the drawn matrix and shift describe."""
    image, label = sample(rng, ndim)
    settings, keys = on(AFFINE, ndim), keys_of(seed)
    linear = np.asarray(augment.transform_matrix(settings, keys, ndim), np.float64)
    at = np.stack([np.asarray(a, np.float64) for a in augment.coordinates(settings, keys, label.shape)])
    centre = (np.array(label.shape) - 1) / 2
    middle = at[(slice(None), *([0] * ndim))] - linear @ (0 - centre)  # where the centre comes from
    offset = middle - linear @ centre
    got, got_label = one(AFFINE, seed, image, label)
    for c in range(image.shape[-1]):
        expected = ndimage.affine_transform(
            image[..., c].astype(np.float64), linear, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(got[..., c], expected, atol=2e-4)
    expected = ndimage.affine_transform(label, linear, offset, order=0, mode="grid-constant")
    assert (got_label == expected).mean() > 0.999, "but for ties in rounding"
    assert (got_label != label).mean() > 0.2, "and the sample was moved"


@pytest.mark.parametrize("ndim", [2, 3])
def test_elastic_displacement_is_smooth_and_read_as_scipy_does(ndim, rng):
    image, label = sample(rng, ndim)
    at = [np.asarray(a, np.float64) for a in augment.coordinates(on(ELASTIC, ndim), keys_of(1), label.shape)]
    moved = np.stack([a - g for a, g in zip(at, np.indices(label.shape), strict=True)])
    assert 0.1 < moved.std() < 2
    steps = [np.abs(np.diff(moved, axis=axis)).max() for axis in range(1, ndim + 1)]
    assert max(steps) < 1, "no folding: neighbours move alike"
    got, got_label = one(ELASTIC, 1, image, label)
    for c in range(image.shape[-1]):
        expected = ndimage.map_coordinates(image[..., c].astype(np.float64), at, order=1, mode="grid-constant")
        np.testing.assert_allclose(got[..., c], expected, atol=2e-4)
    expected = ndimage.map_coordinates(label, at, order=0, mode="grid-constant")
    assert (got_label == expected).mean() > 0.999


def test_a_right_angle_a_scale_and_a_shift_by_hand(rng):
    """The map's parts one by one, where the answer needs no resampler."""
    image, label = rng.normal(size=(9, 9, 1)).astype(np.float32), rng.integers(0, 3, (9, 9)).astype(np.uint8)
    turn = np.asarray(augment._rotation(2, (0, 1), jnp.float32(np.pi / 2)))
    centre = 4.0
    at = [turn[i, 0] * (np.arange(9)[:, None] - centre) + turn[i, 1] * (np.arange(9) - centre) + centre for i in (0, 1)]
    got = np.asarray(augment.sample_linear(jnp.asarray(image), [jnp.asarray(a) for a in at]))
    np.testing.assert_allclose(got[..., 0], np.rot90(image[..., 0], -1), atol=1e-5)
    shifted = [np.broadcast_to(np.arange(9.0)[:, None] + 2, (9, 9)), np.broadcast_to(np.arange(9.0), (9, 9))]
    got = np.asarray(augment.sample_nearest(jnp.asarray(label), [jnp.asarray(a) for a in shifted]))
    np.testing.assert_array_equal(got[:7], label[2:])
    assert not got[7:].any(), "beyond the edge lies background"


def test_rotations_are_rotations():
    full = np.asarray(augment.transform_matrix(on({"rotate": {"p": 1.0}}, 3), keys_of(0), 3), np.float64)
    np.testing.assert_allclose(full @ full.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(full) == pytest.approx(1, abs=1e-5) and abs(full[0, 1:]).max() > 1e-3


@pytest.mark.parametrize("depth_axis", [0, 1, 2])
def test_rotations_stay_in_the_plane_of_the_slices_when_told(depth_axis):
    """The sum over all other axes of a volume does not change, and each plane does."""
    image = np.zeros((1, 16, 16, 16, 1), np.float32)
    image[0, 4:9, 5:9, 6:12] = 1
    batch = {"image": image, "label": image[..., 0].astype(np.uint8), "key": np.zeros((1, 2), np.uint32)}
    section = {"rotate": {"p": 1.0, "plane": True, "degrees": 45.0}}
    got = np.asarray(augment.make_augment(section, 3, depth_axis)(batch)["image"][0, ..., 0])
    others = tuple(axis for axis in range(3) if axis != depth_axis)
    np.testing.assert_allclose(got.sum(others), image[0, ..., 0].sum(others), rtol=0.05, atol=0.01)
    for axis in others:
        rest = tuple(a for a in range(3) if a != axis)
        assert abs(got.sum(rest) - image[0, ..., 0].sum(rest)).max() > 0.5


@pytest.mark.parametrize("ndim", [2, 3])
def test_flips_are_exact(ndim, rng):
    image, label = sample(rng, ndim)
    section = {"flip": {"p": 0.5, "axes": tuple(range(ndim))}}
    seen = set()
    for seed in range(24):
        got, got_label = one(section, seed, image, label)
        for axes in itertools.chain.from_iterable(itertools.combinations(range(ndim), n) for n in range(ndim + 1)):
            if np.allclose(got, np.flip(image, axes), atol=1e-5):
                np.testing.assert_array_equal(got_label, np.flip(label, axes))
                seen.add(axes)
                break
        else:
            pytest.fail("not a flip")
    assert len(seen) == {2: 4, 3: 7}[ndim], "of the four and eight ways to flip"
    got, _ = one({"flip": {"p": 1.0, "axes": (ndim - 1,)}}, 0, image, label)
    np.testing.assert_allclose(got, np.flip(image, ndim - 1), atol=1e-5)


def test_scale_grows_what_it_says():
    """A disc's area grows with the square of the factor, which lies between the limits."""
    y, x = np.mgrid[:128, :128] - 63.5
    label = (y**2 + x**2 < 30**2).astype(np.uint8)
    factors = []
    for seed in range(12):
        _, got = one({"scale": {"p": 1.0, "low": 0.5, "high": 1.5}}, seed, label[..., None].astype(np.float32), label)
        factors.append(np.sqrt(got.sum() / label.sum()))
    assert 0.49 < min(factors) < 0.8 and 1.1 < max(factors) < 1.51


def test_factors_of_scale_are_as_often_above_one_as_below():
    """Drawn on a logarithmic scale: growing to twice the size is as likely as shrinking to half."""
    settings = on({"scale": {"p": 1.0, "low": 0.5, "high": 2.0}}, 2)
    draw = jax.jit(lambda seed: augment.transform_matrix(settings, keys_of(seed), 2)[0, 0])
    factors = 1 / np.array([float(draw(s)) for s in range(200)])
    assert 0.5 <= factors.min() < 0.56 and 1.8 < factors.max() <= 2.0
    assert 0.4 < (factors > 1).mean() < 0.6


def test_translation_is_a_share_of_each_side():
    settings = on({"translate": {"p": 1.0, "share": 0.1}}, 2)
    draw = jax.jit(lambda seed: jnp.stack([a[0, 0] for a in augment.coordinates(settings, keys_of(seed), (40, 400))]))
    shifts = np.abs([draw(s) for s in range(100)]).max(0)
    assert 3 < shifts[0] <= 4 and 30 < shifts[1] <= 40


def test_elastic_leaves_some_samples_alone(rng):
    image, label = sample(rng, 2)
    moved = [
        not np.allclose(one({"elastic": {"p": 0.5}}, seed, image, label)[0], image, atol=1e-4) for seed in range(20)
    ]
    assert 3 < sum(moved) < 17


# -- intensities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("ndim", [2, 3])
def test_blur_is_scipys(sigma, ndim, rng):
    image, _ = sample(rng, ndim)
    got = np.asarray(augment.gaussian_blur(jnp.asarray(image), jnp.float32(sigma), 1.7))
    for c in range(image.shape[-1]):
        # both cut far out: 4 x 1.7 voxels here
        expected = ndimage.gaussian_filter(image[..., c].astype(np.float64), sigma, mode="nearest", truncate=7 / sigma)
        np.testing.assert_allclose(got[..., c], expected, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.37])
def test_coarsening_is_nearest_down_and_linear_up(share, rng):
    image = rng.normal(size=(24, 20, 2)).astype(np.float32)
    got = np.asarray(augment.coarsen(jnp.asarray(image), jnp.float32(share)))
    if share == 1.0:
        np.testing.assert_allclose(got, image, atol=1e-6)
        return
    n, m = (max(round(s * share), 1) for s in image.shape[:2])
    rows = np.floor((np.arange(n) + 0.5) * 24 / n).astype(int)
    columns = np.floor((np.arange(m) + 0.5) * 20 / m).astype(int)
    small = image[np.ix_(rows, columns)]
    at = np.meshgrid((np.arange(24) + 0.5) * n / 24 - 0.5, (np.arange(20) + 0.5) * m / 20 - 0.5, indexing="ij")
    for c in range(2):
        expected = ndimage.map_coordinates(small[..., c].astype(np.float64), at, order=1, mode="nearest")
        np.testing.assert_allclose(got[..., c], expected, atol=1e-4)


def test_window_clips_and_keeps_the_range():
    ramp = np.linspace(-2, 6, 257, dtype=np.float32).reshape(1, 257, 1)
    label = np.zeros((1, 257), np.uint8)
    for seed in range(5):
        got, _ = one({"window": {"p": 1.0, "level": 0.1, "low": 0.5, "high": 0.8}}, seed, ramp, label)
        line = got.ravel()
        assert line.min() == pytest.approx(-2, abs=1e-4) and line.max() == pytest.approx(6, abs=1e-4)
        inner = (line > -2 + 1e-3) & (line < 6 - 1e-3)
        slope = np.diff(line[inner]) / np.diff(ramp.ravel()[inner])
        width = 1 / slope.mean()
        np.testing.assert_allclose(slope, slope.mean(), rtol=1e-2)  # linear between the two ends
        assert 0.49 < width < 0.81 and 0.45 < inner.mean() < 0.85


@pytest.mark.parametrize("shape", [(7,), (5, 4, 2), (3, 5, 4, 6, 2)])
def test_noise_has_the_values_of_jax(shape):
    key = jax.random.key(3)
    np.testing.assert_array_equal(augment._normal(key, shape), jax.random.normal(key, shape))


def test_noise_gamma_brightness_and_contrast_by_hand(rng):
    image = rng.normal(size=(64, 64, 2)).astype(np.float32)
    label = np.zeros((64, 64), np.uint8)
    noise = one({"noise": {"p": 1.0, "sd": 0.3}}, 3, image, label)[0] - image
    assert 0 < noise.std() <= 0.3 and abs(noise.mean()) < 0.02 and abs(np.corrcoef(noise.T.reshape(2, -1))[0, 1]) < 0.05
    ratio = one({"brightness": {"p": 1.0}}, 3, image, label)[0] / image
    for c in range(2):
        np.testing.assert_allclose(ratio[..., c], ratio[0, 0, c], rtol=1e-3)
        assert 0.75 <= ratio[0, 0, c] <= 1.25
    assert abs(ratio[0, 0, 0] - ratio[0, 0, 1]) > 1e-3, "channels are drawn apart"
    low, high = image.min((0, 1)), image.max((0, 1))
    bent = (one({"gamma": {"p": 1.0}}, 3, image, label)[0] - low) / (high - low)
    inner = ((image - low) / (high - low))[20:40, 20:40]
    exponent = np.log(bent[20:40, 20:40]) / np.log(inner)
    for c in range(2):
        np.testing.assert_allclose(exponent[..., c], exponent[0, 0, c], rtol=1e-2)
        assert 0.7 <= exponent[0, 0, c] <= 1.5
    stretched = one({"contrast": {"p": 1.0}}, 3, image, label)[0]
    assert (stretched.max((0, 1)) <= high + 1e-5).all() and (stretched.min((0, 1)) >= low - 1e-5).all()
    middle = np.abs(image - image.mean((0, 1))) < 0.5
    factor = ((stretched - image.mean((0, 1))) / (image - image.mean((0, 1))))[..., 0][middle[..., 0]]
    np.testing.assert_allclose(factor, factor[0], rtol=1e-2)


def test_cutout_is_off_by_default_and_a_box_when_on():
    assert augment_table.DEFAULTS["cutout"]["p"] == 0
    image = np.ones((20, 20, 1), np.float32)
    got, _ = one({"cutout": {"p": 1.0, "share": 0.3}}, 0, image, np.zeros((20, 20), np.uint8))
    rows, columns = np.nonzero(got[..., 0] == 0)
    assert np.ptp(rows) == np.ptp(columns) == 5 and len(rows) == 36


# -- as a whole ---------------------------------------------------------------------------------------------------

EVERYTHING = {
    name: {"p": 0.5} | ({"axes": (0, 1)} if name == "flip" else {})
    for name in augment_table.DEFAULTS
    if name != "cutout"
}


def test_a_sample_depends_on_its_own_random_bits_alone(rng):
    """Not on its place in the batch, nor on its neighbours; so not on devices, processes or threads either.

    Rounding may depend on the place, because the last elements of an array are not computed with vector instructions.
    """
    pairs = [sample(rng, 2) for _ in range(4)]
    batch = {
        "image": np.stack([p[0] for p in pairs]),
        "label": np.stack([p[1] for p in pairs]),
        "key": rng.integers(0, 2**32, (4, 2), np.uint32),
    }
    function = jax.jit(augment.make_augment(EVERYTHING, 2))
    whole = function(batch)
    turned = function({k: v[::-1] for k, v in batch.items()})
    np.testing.assert_array_equal(whole["label"], turned["label"][::-1])
    np.testing.assert_allclose(whole["image"], turned["image"][::-1], rtol=0, atol=5e-6)
    again = function(batch)
    np.testing.assert_array_equal(whole["image"], again["image"])
    other = function(batch | {"key": batch["key"] + 1})
    assert (np.asarray(other["image"]) != np.asarray(whole["image"])).any((1, 2, 3)).all()


def test_other_random_generators_of_the_process_do_not_matter(rng):
    """JAX_DEFAULT_PRNG_IMPL=rbg is usual on TPUs."""
    image, label = sample(rng, 2)
    batch = {"image": image[None], "label": label[None], "key": rng.integers(0, 2**32, (1, 2), np.uint32)}
    function = augment.make_augment({"flip": EVERYTHING["flip"], "noise": EVERYTHING["noise"] | {"p": 1.0}}, 2)
    expected = function(batch)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(function(batch)["image"], expected["image"])


def test_turning_one_transform_off_leaves_the_others_as_they_were(rng):
    image, label = sample(rng, 2)
    with_noise = {**AFFINE, "noise": {"p": 1.0}}
    _, moved = one(AFFINE, 5, image, label)
    _, same = one(with_noise, 5, image, label)
    np.testing.assert_array_equal(moved, same)


def test_half_of_the_samples_get_each_transform():
    n = 400
    batch = {"image": jnp.ones((n, 4, 4, 1)), "label": jnp.zeros((n, 4, 4), jnp.uint8)}
    batch["key"] = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (n, 2), np.uint32))
    out = jax.jit(augment.make_augment({"noise": {"p": 0.5}}, 2))(batch)
    share = float((out["image"] != 1).any((1, 2, 3)).mean())
    assert 0.4 < share < 0.6


def test_nothing_on_is_no_function():
    assert augment.make_augment({}, 3) is None
    assert augment.make_augment({"noise": {"p": 0.0}}, 3) is None


def test_wrong_settings_are_named_at_once():
    section = {
        "elastic": {"cells": 0}, "blur": {"high": 1000.0}, "cutout": {"share": 2.0},
        "rotat": {"p": 1.0}, "scale": {"p": 2.0, "low": 2.0}, "noise": {"size": 1.0}, "flip": {"p": 0.5, "axes": (2,)}
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        augment_table.settings(section, 2)
    for words in ("augment.rotat is unknown", "scale.p=2.0", "low <= high", "noise.size is unknown", "flip.axes=(2,)",
        "elastic.cells=0", "blur.high=1000.0", "cutout.share=2.0"):  # fmt: skip
        assert words in str(error.value)


PLANE = output.Output("sigmoid", regions.Regions({"one": (1,)}), ("background", "one"))


class Scale(nnx.Module):
    """The smallest network: one factor."""

    def __init__(self):
        self.factor = nnx.Param(jnp.ones(1))

    def __call__(self, image, rngs, levels):
        return [image * self.factor[...]]


def test_the_step_trains_on_what_augmentation_gives(rng):
    """A step with a function that blanks the labels is the step on blank labels."""
    graphdef, params, stats = split_model(Scale())
    tx = optax.sgd(0.1)
    parts = graphdef, loss.make_loss(_shared.get_config({}).loss, "sigmoid", 1), PLANE, tx
    batch = {"image": rng.normal(size=(2, 8, 8, 1)).astype(np.float32), "label": np.ones((2, 8, 8), np.uint8)}
    blank = batch | {"label": np.zeros((2, 8, 8), np.uint8)}

    def after(batch, **options):
        state = init_state(params, stats, tx)
        return step.make_train_step(*parts, **options)(state, batch, jax.random.key(0))[1]

    changed = after(batch, augment=lambda b: b | {"label": jnp.zeros_like(b["label"])})
    assert float(changed["loss"]) == float(after(blank)["loss"]) != float(after(batch)["loss"])
