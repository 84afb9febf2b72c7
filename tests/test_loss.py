"""Losses against PyTorch and by hand; what the channels of a network mean, against arrays made by hand."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import _shared
from xdim_jax.base.errors import UserError
from xdim_jax.data import regions
from xdim_jax.inference.output import make_output
from xdim_jax.training import loss

LOSSES = [("dice_bce", "sigmoid"), ("dice_bce", "softmax"), ("dice_ce", "softmax")]

CHANNELS = 4
WEIGHTS = (0.5, 2.0, 1.0, 0.25)
# of three samples: nothing hidden, one channel, all but the first
ANNOTATED = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0]], bool)


def section(**keys):
    """The ``loss`` section of a config."""
    return _shared.get_config({}).loss.to_dict() | keys


def make(name, activation, channels, **keys):
    return loss.make_loss(section(name=name, **keys), activation, channels)


def sample(rng, activation, annotated=None):
    """Logits and masks of three samples of 2 x 3 x 2 voxels; a softmax has one channel per voxel, an annotated one."""
    logits = rng.normal(0, 2, (3, 2, 3, 2, CHANNELS))
    if activation == "sigmoid":
        return logits, rng.random(logits.shape) < 0.4
    masks = np.zeros(logits.shape, bool)
    for b, index in np.ndenumerate(rng.integers(0, CHANNELS, (3, 2, 3, 2))):
        masks[(*b, index if annotated is None or annotated[b[0], index] else 0)] = True
    return logits, masks


def expected(logits, masks, annotated, activation, config):
    """Both terms with PyTorch, sample by sample, with the probabilities of merged classes added."""
    weights = config["weights"] or (1.0,) * CHANNELS
    annotated = np.ones((len(logits), CHANNELS), bool) if annotated is None else annotated
    dices, entropies, categorical, at_batch = [], [], [], {}
    for z, g, shown in zip(logits, torch.tensor(masks), annotated, strict=True):
        z, g = z.reshape(-1, CHANNELS), g.reshape(-1, CHANNELS).to(z.dtype)
        kept = np.flatnonzero(shown)
        if activation == "softmax":
            every = torch.softmax(z, 1)
            y = torch.stack([every[:, c] + (every[:, ~shown].sum(1) if c == 0 else 0) for c in kept], 1).clamp(max=1)
            criterion = torch.nn.CrossEntropyLoss(z.new_tensor([weights[c] for c in kept]), reduction="sum")
            truth = g[:, kept].argmax(1)
            categorical.append((criterion(y.log(), truth), sum(weights[kept[i]] for i in truth.tolist())))
        else:
            y = torch.sigmoid(z[:, kept])
        for i, c in enumerate(kept):
            entropy = torch.nn.functional.binary_cross_entropy(y[:, i], g[:, c], reduction=config["cross_entropy"])
            entropies.append((entropy, weights[c]))
            if c or activation == "sigmoid" or config["background"]:
                at_batch.setdefault(c, []).append((y[:, i], g[:, c]))
                dices.append((2 * (y[:, i] @ g[:, c]) / (y[:, i].sum() + g[:, c].sum() + config["eps"]), weights[c]))
    if config["dice"] == "batch":
        dices = []
        for c, pairs in at_batch.items():
            y, g = (torch.cat(part) for part in zip(*pairs, strict=True))
            dices.append((2 * (y @ g) / (y.sum() + g.sum() + config["eps"]), weights[c]))
    dice_loss = 1 - sum(d * w for d, w in dices) / sum(w for _, w in dices)
    if config["name"] == "dice_bce":
        return dice_loss, sum(e * w for e, w in entropies) / sum(w for _, w in entropies)
    total = len(logits) if config["cross_entropy"] == "sum" else sum(w for _, w in categorical)
    return dice_loss, sum(e for e, _ in categorical) / total


# -- against PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entropy", "background", "weights"),
    [("mean", True, ()), ("mean", True, WEIGHTS), ("mean", False, WEIGHTS), ("sum", False, ()), ("sum", True, WEIGHTS)],
)
@pytest.mark.parametrize("dice", loss.DICES)
@pytest.mark.parametrize("annotated", [None, ANNOTATED], ids=["all", "annotated"])
@pytest.mark.parametrize(("name", "activation"), LOSSES)
def test_values_and_gradients_are_pytorchs(
    rng, doubles, name, activation, annotated, dice, entropy, background, weights
):
    """A softmax with hidden classes is a smaller softmax in the reference."""
    logits, masks = sample(rng, activation, annotated)
    config = {
        "name": name, "eps": 0.1, "dice": dice, "cross_entropy": entropy, "background": background, "weights": weights
    }  # fmt: skip
    function = jax.value_and_grad(loss.make_loss(config, activation, CHANNELS), has_aux=True)
    (value, parts), grads = function(jnp.asarray(logits), jnp.asarray(masks), annotated)
    z = torch.tensor(logits, requires_grad=True)
    dice_loss, entropy_loss = expected(z, masks, annotated, activation, config)
    (dice_loss + entropy_loss).backward()
    assert parts.keys() == {"dice_loss", "entropy_loss"}
    assert float(parts["dice_loss"]) == pytest.approx(dice_loss.item(), rel=1e-9)
    assert float(parts["entropy_loss"]) == pytest.approx(entropy_loss.item(), rel=1e-9)
    assert float(value) == pytest.approx(dice_loss.item() + entropy_loss.item(), rel=1e-9)
    np.testing.assert_allclose(grads, z.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("weights", [(), WEIGHTS])
def test_cross_entropy_is_pytorchs_function(rng, doubles, weights):
    """In one call, as a user has it: channels second, indices."""
    logits, masks = sample(rng, "softmax")
    _, parts = make("dice_ce", "softmax", CHANNELS, weights=weights)(jnp.asarray(logits), jnp.asarray(masks))
    criterion = torch.nn.CrossEntropyLoss(torch.tensor(weights) if weights else None)
    value = criterion(torch.tensor(np.moveaxis(logits, -1, 1)), torch.tensor(masks.argmax(-1)))
    assert float(parts["entropy_loss"]) == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize(("name", "activation"), LOSSES)
def test_single_precision_jit_and_2d(rng, name, activation):
    logits, masks = sample(rng, activation, ANNOTATED)
    logits, masks = logits[:, 0], masks[:, 0]
    config = section(name=name)
    function = jax.jit(loss.make_loss(config, activation, CHANNELS))
    value, _ = function(jnp.asarray(logits, jnp.float32), masks, ANNOTATED)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(
        float(sum(expected(torch.tensor(logits), masks, ANNOTATED, activation, config))), 1e-5
    )


def test_the_rest_is_one_channel_of_the_same_probability(rng, doubles):
    logits = rng.normal(0, 3, (5, CHANNELS))
    odds = torch.logit(torch.softmax(torch.tensor(logits), 1))
    np.testing.assert_allclose(loss.one_vs_rest_logits(jnp.asarray(logits)), odds, rtol=1e-9)


# -- by hand ------------------------------------------------------------------------------------------------------


def test_dice_bce_by_hand():
    """Two samples of two voxels, one channel; probabilities 0.5 and 0.9, 0.5 and 0.1; truth 1 1 and 0 0."""
    logits = jnp.array([[0.0, math.log(9)], [0.0, -math.log(9)]]).reshape(2, 2, 1)
    targets = jnp.array([[1, 1], [0, 0]], bool).reshape(2, 2, 1)
    value, parts = make("dice_bce", "sigmoid", 1, eps=0.1)(logits, targets)
    dice = 1 - (2 * 1.4 / (1.4 + 2 + 0.1) + 0) / 2
    bce = -(math.log(0.5) + math.log(0.9)) / 2  # the same for both samples
    assert float(parts["dice_loss"]) == pytest.approx(dice, rel=1e-6)
    assert float(parts["entropy_loss"]) == pytest.approx(bce, rel=1e-6)
    assert float(value) == pytest.approx(dice + bce, rel=1e-6)
    _, parts = make("dice_bce", "sigmoid", 1, eps=0.1, dice="batch", cross_entropy="sum")(logits, targets)
    assert float(parts["dice_loss"]) == pytest.approx(1 - 2 * 1.4 / (1.4 + 0.6 + 2 + 0.1), rel=1e-6)
    assert float(parts["entropy_loss"]) == pytest.approx(2 * bce, rel=1e-6), "two voxels, mean over samples"


@pytest.mark.parametrize(("dice", "value"), [("sample", (1 / 2 + 3 / 4) / 2), ("batch", 20 / 32)])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_dice_of_squares(activation, dice, value):
    """Sure predictions: 4 x 4 squares, overlapping in 4 x 2 in one sample and in 4 x 3 in the other."""
    truth, found = np.zeros((2, 2, 8, 8), bool)
    truth[:, 2:6, :4] = True
    found[0, 2:6, 2:6] = found[1, 2:6, 1:5] = True
    masks = np.stack([truth] if activation == "sigmoid" else [~truth, truth], -1)
    logits = 40.0 * np.stack([2 * found - 1] if activation == "sigmoid" else [~found, found], -1)
    function = make("dice_bce", activation, masks.shape[-1], dice=dice, background=False)
    _, parts = function(jnp.asarray(logits), jnp.asarray(masks))
    assert float(parts["dice_loss"]) == pytest.approx(1 - value, abs=1e-6)
    assert float(parts["entropy_loss"]) == pytest.approx(40 * (16 + 8) / 2 / 64, rel=1e-6), "40 per wrong pixel"


def test_a_perfect_prediction_costs_nothing(rng):
    for name, activation in LOSSES:
        _, masks = sample(rng, activation)
        value, _ = make(name, activation, CHANNELS)(jnp.where(masks, 40.0, -40.0), jnp.asarray(masks))
        assert float(value) == pytest.approx(0, abs=1e-5), (name, activation)


def test_hard_dice_counts_two_empty_masks_as_one():
    found = np.array([[1, 1, 0, 0], [0] * 4, [0, 1, 0, 0]], bool).reshape(3, 4, 1)
    truth = np.array([[1, 0, 0, 0], [0] * 4, [0] * 4], bool).reshape(3, 4, 1)
    np.testing.assert_allclose(loss.hard_dice(jnp.asarray(found), jnp.asarray(truth)), [[2 / 3], [1], [0]], rtol=1e-6)


def test_hard_dice_of_boxes_per_region():
    """A 4^3 box moved by one and by four voxels: 3/4 of it overlaps, and none."""
    truth, found = np.zeros((2, 1, 8, 4, 4, 2), bool)
    truth[:, :4] = True
    found[:, 1:5, ..., 0] = found[:, 4:, ..., 1] = True
    np.testing.assert_allclose(loss.hard_dice(jnp.asarray(found), jnp.asarray(truth)), [[0.75, 0]], rtol=1e-6)


# -- channels that a reference does not show ----------------------------------------------------------------------


@pytest.mark.parametrize("dice", loss.DICES)
def test_undrawn_sigmoids_are_left_out(rng, doubles, dice):
    """Whatever their logits and masks are: no gradient, and the loss of the others alone."""
    logits, masks = sample(rng, "sigmoid")
    logits[..., 2] *= 1e4
    two = [0, 3]
    annotated = np.tile([True, False, False, True], (3, 1))
    function = make("dice_bce", "sigmoid", CHANNELS, dice=dice, weights=WEIGHTS)
    grads, parts = jax.grad(function, has_aux=True)(jnp.asarray(logits), jnp.asarray(masks), annotated)
    grads = np.asarray(grads)
    assert not grads[..., 1:3].any() and grads[..., two].all()
    alone = make("dice_bce", "sigmoid", 2, dice=dice, weights=(WEIGHTS[0], WEIGHTS[3]))
    grads_alone, parts_alone = jax.grad(alone, has_aux=True)(
        jnp.asarray(logits[..., two]), jnp.asarray(masks[..., two])
    )
    np.testing.assert_allclose(grads[..., two], grads_alone, rtol=1e-10)
    assert parts == {k: pytest.approx(float(v), rel=1e-10) for k, v in parts_alone.items()}


def test_per_batch_dice_adds_up_the_samples_that_show_a_channel(rng):
    """The other samples' sure and wrong voxels of the channel change nothing."""
    logits, masks = sample(rng, "sigmoid")
    annotated = np.ones((3, CHANNELS), bool)
    annotated[1, 2] = False
    function = make("dice_bce", "sigmoid", CHANNELS, dice="batch")
    first = function(jnp.asarray(logits), jnp.asarray(masks), annotated)[0]
    logits[1, ..., 2], masks[1, ..., 2] = 30.0, False
    assert float(function(jnp.asarray(logits), jnp.asarray(masks), annotated)[0]) == float(first)
    assert float(function(jnp.asarray(logits), jnp.asarray(masks))[0]) > float(first) + 1


@pytest.mark.parametrize("name", loss.NAMES)
def test_undrawn_classes_of_a_softmax_are_background(rng, doubles, name):
    """CHAOS, task 4: a CT shows the liver alone. Two classes in the reference, and PyTorch merges the logits."""
    logits, _ = sample(rng, "softmax")
    liver = rng.random(logits.shape[:-1]) < 0.5
    masks = np.stack([~liver, liver, *np.zeros((2, *liver.shape), bool)], -1)
    annotated = np.tile([True, True, False, False], (3, 1))
    grads, parts = jax.grad(make(name, "softmax", CHANNELS), has_aux=True)(
        jnp.asarray(logits), jnp.asarray(masks), annotated
    )
    z = torch.tensor(logits, requires_grad=True)
    two = torch.stack([torch.logsumexp(z[..., [0, 2, 3]], -1), z[..., 1]], 1)
    probs, truth = torch.softmax(two, 1), torch.tensor(np.stack([~liver, liver], 1)).double()
    overlap = torch.einsum("bcxyz,bcxyz->bc", probs, truth)
    dice_loss = 1 - (2 * overlap / (probs.sum((2, 3, 4)) + truth.sum((2, 3, 4)) + 1e-5)).mean()
    entropy = (
        torch.nn.functional.cross_entropy(two, truth.argmax(1))
        if name == "dice_ce"
        else torch.nn.functional.binary_cross_entropy_with_logits(two[:, 1] - two[:, 0], truth[:, 1])
    )
    (dice_loss + entropy).backward()
    assert float(parts["dice_loss"]) == pytest.approx(dice_loss.item(), rel=1e-9)
    assert float(parts["entropy_loss"]) == pytest.approx(entropy.item(), rel=1e-9)
    np.testing.assert_allclose(grads, z.grad, rtol=1e-8, atol=1e-11)
    assert np.asarray(grads[..., 2:]).any(), "hidden classes learn that they are background"


def test_all_drawn_is_as_without_drawn(rng, doubles):
    for name, activation in LOSSES:
        logits, masks = map(jnp.asarray, sample(rng, activation))
        function = make(name, activation, CHANNELS, dice="batch", weights=WEIGHTS)
        with_drawn = function(logits, masks, np.ones((3, CHANNELS), bool))[0]
        assert float(with_drawn) == pytest.approx(float(function(logits, masks)[0]), rel=1e-6)


def test_a_batch_that_shows_nothing_teaches_nothing(rng, doubles):
    logits, masks = sample(rng, "sigmoid")
    for dice in loss.DICES:
        function = make("dice_bce", "sigmoid", CHANNELS, dice=dice)
        grads, parts = jax.grad(function, has_aux=True)(
            jnp.asarray(logits), jnp.asarray(masks), np.zeros((3, CHANNELS), bool)
        )
        assert not np.asarray(grads).any() and float(parts["entropy_loss"]) == 0


# -- numbers at the edge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("annotated", [None, ANNOTATED], ids=["all", "annotated"])
@pytest.mark.parametrize(("name", "activation"), LOSSES)
def test_extreme_logits_stay_finite(rng, name, activation, annotated, dtype):
    """Sure and right, sure and wrong, all equal; the loss is computed in single precision whatever the logits are."""
    _, masks = sample(rng, activation, annotated)
    size = 6e4 if dtype == jnp.float16 else 1e8
    for logits in (
        size * rng.choice([-1, 0, 1], masks.shape),
        np.where(masks, size, -size),
        np.full(masks.shape, size),
    ):
        for entropy in loss.REDUCTIONS:
            function = make(name, activation, CHANNELS, cross_entropy=entropy)
            (value, parts), grads = jax.value_and_grad(function, has_aux=True)(
                jnp.asarray(logits, dtype), jnp.asarray(masks), annotated
            )
            assert grads.dtype == dtype and value.dtype == jnp.float32
            assert np.isfinite(grads.astype(jnp.float32)).all() and np.isfinite([value, *parts.values()]).all()


def test_half_precision_logits_are_the_same_numbers(rng):
    """Logits that bfloat16 holds exactly: nothing else is rounded."""
    for name, activation in LOSSES:
        logits, masks = sample(rng, activation)
        logits = jnp.asarray(np.round(logits * 4) / 4)
        function = make(name, activation, CHANNELS)
        assert function(logits.astype(jnp.bfloat16), masks)[0] == function(logits.astype(jnp.float32), masks)[0]


def test_cross_entropy_is_finite_for_sure_and_wrong_logits():
    """Its gradient is sigmoid - truth."""
    value, grad = jax.vmap(jax.value_and_grad(loss.binary_cross_entropy))(
        jnp.array([1e4, -1e4, 0.0, -1e4]), jnp.array([0.0, 0.0, 0.0, 1.0])
    )
    np.testing.assert_allclose(value, [1e4, 0, math.log(2), 1e4], rtol=1e-6)
    np.testing.assert_array_equal(grad[np.array([0, 1, 3])], [1, 0, -1])


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_cross_entropy_has_the_right_slope_at_zero(truth):
    """JAX takes the slope of the absolute value at 0 as 1; exact zeros come from bfloat16 and from dead features."""
    z = torch.zeros((), requires_grad=True)
    torch.nn.functional.binary_cross_entropy_with_logits(z, torch.tensor(truth)).backward()
    assert float(jax.grad(loss.binary_cross_entropy)(0.0, truth)) == pytest.approx(z.grad.item())


def test_a_sure_and_wrong_softmax_still_learns():
    """Logits 1e4, 0, -1e4 where the last is right: against the rest 1e4, -1e4, -2e4, whose slopes are by hand."""
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    masks = jnp.array([[[False, False, True]]])
    grads, parts = jax.grad(make("dice_bce", "softmax", 3), has_aux=True)(logits, masks)
    assert float(parts["entropy_loss"]) == pytest.approx((1e4 + 0 + 2e4) / 3)
    np.testing.assert_allclose(grads, np.array([[[2, -1, -1]]]) / 3, atol=1e-6)
    grads, parts = jax.grad(make("dice_ce", "softmax", 3), has_aux=True)(logits, masks)
    assert float(parts["entropy_loss"]) == pytest.approx(2e4)
    np.testing.assert_allclose(grads, [[[1, 0, -1]]], atol=1e-6)


def test_voxels_of_classes_without_weight_do_not_make_the_loss_nan():
    """Weights (0, 1) are allowed, and a patch of background alone is common."""
    masks = jnp.array([[[True, False]] * 4])
    function = make("dice_ce", "softmax", 2, weights=(0.0, 1.0))
    (value, _), grads = jax.value_and_grad(function, has_aux=True)(jnp.zeros((1, 4, 2)), masks)
    assert np.isfinite(value) and np.isfinite(grads).all()


# -- misuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "activation", "words"),
    [
        ({"name": "dicee"}, "sigmoid", r"loss.name='dicee' is unknown; known: dice_bce, dice_ce"),
        ({"dice": "volume"}, "softmax", r"loss.dice='volume' is unknown; known: sample, batch"),
        ({"cross_entropy": "max"}, "sigmoid", r"loss.cross_entropy='max' is unknown; known: mean, sum"),
        ({"name": "dice_ce"}, "sigmoid", r"dice_ce.*softmax.*dice_bce"),
        ({"weights": (1.0, 2.0)}, "softmax", r"weights=\(1.0, 2.0\): expected one number for each of the 3 channels"),
        ({"weights": (1.0, -1.0, 1.0)}, "softmax", "none negative"),
        ({"weights": (0.0, 0.0, 0.0)}, "softmax", "not all zero"),
        ({"weights": (1.0, math.nan, 1.0)}, "softmax", "none negative"),
        ({"eps": 0.0}, "sigmoid", r"loss.eps=0.0: expected a small positive number"),
        ({"eps": -1e-5}, "sigmoid", r"loss.eps=-1e-05"),
        ({"eps": math.nan}, "sigmoid", r"loss.eps=nan"),
    ],
)
def test_misuses_are_refused(keys, activation, words):
    config = section() | keys
    with pytest.raises(UserError, match=words):
        loss.make_loss(config, activation, 3)


def test_every_problem_is_told_at_once():
    config = section() | {"dice": "x", "cross_entropy": "y", "eps": 0.0, "weights": (1.0,)}
    with pytest.raises(UserError) as error:
        loss.make_loss(config, "softmax", 3)
    assert all(f"config.loss.{key}=" in str(error.value) for key in ("dice", "cross_entropy", "eps", "weights"))


def test_infinite_weights_are_refused():
    config = section() | {"weights": (1.0, math.inf)}
    with pytest.raises(UserError):
        loss.make_loss(config, "softmax", 2)


# -- what the channels mean ---------------------------------------------------------------------------------------

TISSUES = SimpleNamespace(
    labels=SimpleNamespace(structures=regions.TISSUES, ignore=None), regions=regions.BRATS
)  # nested
ORGANS = SimpleNamespace(
    labels=SimpleNamespace(structures=("background", "liver", "spleen"), ignore=None),
    regions=regions.Regions({"liver": (1,), "spleen": (2,)}),
)
CAVITY = SimpleNamespace(
    labels=SimpleNamespace(structures=("background", "LV_endo", "wall", "LA"), ignore=None),
    regions=regions.Regions({"LV_endo": (1,), "LV_epi": (1, 2), "LA": (3,)}),
)


def test_channels_are_regions_or_labels():
    assert make_output("sigmoid", TISSUES).channels == ("WT", "TC", "ET")
    assert make_output("softmax", TISSUES).channels == ("background", "NCR", "ED", "ET")
    with pytest.raises(UserError, match=r"config.output='tanh'.* sigmoid, softmax"):
        make_output("tanh", TISSUES)


@pytest.mark.parametrize(
    ("activation", "masks"),
    [
        ("sigmoid", [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]),  # WT, TC, ET of background, NCR, ED, ET
        ("softmax", [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_encode_and_decode(activation, masks, dtype):
    output = make_output(activation, TISSUES)
    label = np.array([[[0, 1], [2, 3]]], dtype)
    encoded = jax.jit(output.encode)(label)
    assert encoded.dtype == bool and encoded.shape == (1, 2, 2, len(output.channels))
    np.testing.assert_array_equal(encoded.reshape(4, -1), masks)
    decoded = output.decode(np.where(encoded, 0.9, 0.1).astype(np.float32), 0.5)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, label)


def test_decode_takes_the_threshold_or_the_largest():
    """WT, TC, ET: an inner region counts where it is above the threshold, whatever the outer one is."""
    nested = make_output("sigmoid", TISSUES)
    scores = np.array([[0.6, 0.4, 0.1], [0.6, 0.55, 0.1], [0.2, 0.1, 0.7], [0.4, 0.4, 0.4], [0.95, 0.9, 0.85]])
    np.testing.assert_array_equal(nested.decode(scores, 0.5), [2, 1, 3, 0, 3])
    np.testing.assert_array_equal(nested.decode(scores, 0.3), [1, 1, 3, 3, 3])
    np.testing.assert_array_equal(nested.decode(scores, 0.88), [0, 0, 0, 0, 1])
    labels = make_output("softmax", ORGANS)
    scores = np.array([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])
    for threshold in (0.1, 0.5, 0.9):
        np.testing.assert_array_equal(labels.decode(scores, threshold), [0, 1, 2])


def test_probabilities_are_float32():
    logits = jnp.array([[0.0, math.log(3), 0.0]], jnp.float32)
    sigmoids = make_output("sigmoid", TISSUES).probabilities(logits)
    np.testing.assert_allclose(sigmoids, [[0.5, 0.75, 0.5]], rtol=1e-6)
    softmax = make_output("softmax", ORGANS).probabilities(logits)
    np.testing.assert_allclose(softmax, [[0.2, 0.6, 0.2]], rtol=1e-6)
    for activation in ("sigmoid", "softmax"):
        probs = make_output(activation, ORGANS).probabilities(jnp.array([[1e4, -1e4, 0.5]], jnp.bfloat16))
        assert probs.dtype == jnp.float32 and np.isfinite(probs).all()


def test_predicted_regions():
    """Nested regions with either; with a softmax TC is where NCR or ET has the largest logit."""
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 0.1, -0.5, 0.0], [-3.0, -2.0, -1.0, -2.0], [0.0, 1.0, 2.0, 3.0]])
    found = jax.jit(make_output("softmax", TISSUES).predicted_regions)(logits)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    found = make_output("sigmoid", TISSUES).predicted_regions(logits[:, :3])
    assert found.dtype == bool
    np.testing.assert_array_equal(found, [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]])
    found = make_output("softmax", CAVITY).predicted_regions(logits)
    np.testing.assert_array_equal(found, [[0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_what_is_predicted_is_what_is_written(rng, activation):
    """The regions of the label map that is decoded are those of the training score, where they are nested."""
    output = make_output(activation, TISSUES)
    logits = np.concatenate([rng.normal(size=(50, 1)), np.zeros((50, len(output.channels) - 1))], 1)
    logits[:, 1:] = rng.normal(size=logits[:, 1:].shape) if activation == "softmax" else logits[:, :1] - [[1, 2]]
    label = output.decode(np.asarray(output.probabilities(jnp.asarray(logits))), 0.5)
    np.testing.assert_array_equal(regions.BRATS.encode(label), output.predicted_regions(jnp.asarray(logits)))
    assert np.unique(label).tolist() == ([0, 1, 2] if activation == "sigmoid" else [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("activation", "dataset", "shown", "channels"),
    [
        ("sigmoid", ORGANS, ("liver",), [1, 0]),
        ("softmax", ORGANS, ("liver",), [1, 1, 0]),
        ("softmax", ORGANS, ("spleen", "liver"), [1, 1, 1]),
        ("softmax", ORGANS, (), [1, 0, 0]),
        ("sigmoid", ORGANS, (), [0, 0]),
        ("sigmoid", TISSUES, ("TC",), [0, 1, 0]),
        ("softmax", TISSUES, ("TC",), [1, 1, 0, 1]),  # background, NCR, ET
        ("softmax", CAVITY, ("LV_epi",), [1, 1, 1, 0]),
        ("softmax", CAVITY, ("LA",), [1, 0, 0, 1]),
    ],
)
def test_drawn_channels(activation, dataset, shown, channels):
    annotated = make_output(activation, dataset).annotated_channels(shown)
    assert annotated.dtype == bool
    np.testing.assert_array_equal(annotated, channels)
