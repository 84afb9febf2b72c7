"""Schedules, the three Nadams, LookAhead and parts of a network against PyTorch's optimisers and by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from configs import _shared
from tests.conftest import TOY_MODEL
from xdim_jax.base.errors import UserError
from xdim_jax.nets import networks
from xdim_jax.nets.functional import split_model
from xdim_jax.runs import state as runs_state
from xdim_jax.training import open_run, optim

RATE = 0.05
STEPS = 14
NADAMS = tuple(optim.OPTIMIZERS)
CONSTANT = 1e6  # momentum_decay with which PyTorch's momentum is b1 from the first step on, hence Dozat's Nadam


def make_config(name="nadam", *, b1=0.9, b2=0.999, lookahead=0, rate=None, **keys):
    config = _shared.get_config({}).optim
    config.update({"b1": b1, "b2": b2, "lookahead": {"period": lookahead}, "name": name, **keys})
    if rate is not None:
        config.schedule = rate
    return config


def weights_and_gradients(rng, steps=STEPS):
    """Two parts of a network; the gradients' sizes differ from step to step, so that clipping them shows."""
    shapes = {"encoder": {"kernel": (2, 3), "scale": (3,)}, "decoder": {"kernel": (3, 2), "bias": (2,)}}

    def tree(size):
        return jax.tree.map(lambda shape: size * rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))

    return tree(1.0), [tree(10.0 ** rng.uniform(-2, 2)) for _ in range(steps)]


def path_of(config, weights, grads, rate=lambda count: RATE):
    """The fast and slow weights after every step."""
    tx = optim.make_optimizer(config, rate)
    params = optim.init_params(config, jax.tree.map(jnp.asarray, weights))
    state, found = tx.init(params), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
        found.append(jax.tree.map(np.asarray, (runs_state.fast(params), runs_state.slow(params))))
    return found


def pytorchs_path(weights, grads, rate=lambda count: RATE, *, clip=0.0, groups=None, **options):
    """The weights after every step of ``torch.optim.NAdam``; ``groups``: options of a leaf, by its name."""
    names = ["encoder.kernel", "encoder.scale", "decoder.kernel", "decoder.bias"]
    tensors = {n: torch.tensor(weights[n.split(".")[0]][n.split(".")[1]]) for n in names}
    parts = [{"params": [t], "factor": 1.0, **(groups or {}).get(n, {})} for n, t in tensors.items()]
    tx = torch.optim.NAdam(parts, **options)
    found = []
    for count, g in enumerate(grads):
        for (n, t), group in zip(tensors.items(), tx.param_groups, strict=True):
            t.grad = torch.tensor(g[n.split(".")[0]][n.split(".")[1]])
            group["lr"] = rate(count) * group["factor"]
        if clip:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), clip)
        tx.step()
        found.append({"encoder": {}, "decoder": {}})
        for n, t in tensors.items():
            found[-1][n.split(".")[0]][n.split(".")[1]] = t.numpy().copy()
    return found


def assert_same_path(found, expected, **tolerance):
    for now, then in zip(found, expected, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, **({"rtol": 1e-10} | tolerance)), now[0], then)


class ByHand:
    """The formulas of docs/networks.md, section Nadam, on one array, in numpy."""

    def __init__(self, name, weights, b1, b2, eps):
        self.name, self.w, self.b1, self.b2, self.eps = name, weights.copy(), b1, b2, eps
        self.m, self.v, self.t = np.zeros_like(weights), np.zeros_like(weights), 0

    def momenta(self, n):
        return [self.b1 * (1 - 0.5 * 0.96 ** (i / 250)) for i in range(1, n + 1)]

    def direction(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        *_, now, after = mu = self.momenta(self.t + 1)
        to_now, to_after = math.prod(mu[:-1]), math.prod(mu)
        of_gradient = {
            "nadam": (1 - self.b1) / (1 - self.b1**self.t),
            "nadam_torch": (1 - now) / (1 - to_now),
            "nadam_authors": (1 - self.b1) / (1 - to_now),
        }
        of_momentum = after / (1 - to_after) if self.name != "nadam" else self.b1 / (1 - self.b1 ** (self.t + 1))
        numerator = of_gradient[self.name] * g + of_momentum * self.m
        return numerator / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)

    def step(self, g, rate=RATE, l2=0.0, decoupled=0.0):
        self.w = self.w - rate * (self.direction(g + l2 * self.w) + decoupled * self.w)


# -- the Nadams ---------------------------------------------------------------------------------------------------


def test_defaults_are_pytorchs():
    config, theirs = make_config(), torch.optim.NAdam([torch.zeros(1)]).defaults
    assert (config.eps, config.momentum_decay) == (theirs["eps"], theirs["momentum_decay"])
    assert theirs["betas"] == (0.9, 0.999), "as in this file"


@pytest.mark.parametrize("clip", [0.0, 1.5])
@pytest.mark.parametrize(
    ("decay", "decay_all"), [(None, False), ("l2", False), ("l2", True), ("decoupled", False), ("decoupled", True)]
)
@pytest.mark.parametrize("name", ["nadam", "nadam_torch"])
def test_nadam_is_pytorchs(rng, doubles, name, decay, decay_all, clip):
    """Betas and momentum decay of PyTorch; a rate that changes; clipped before weight decay is added."""
    weights, grads = weights_and_gradients(rng)
    keys = {"weight_decay": 0.1, "decay": decay} if decay else {}
    none = {"weight_decay": 0.0}
    theirs = pytorchs_path(
        weights,
        grads,
        lambda count: RATE / (1 + count),
        clip=clip,
        weight_decay=0.1 if decay else 0.0,
        decoupled_weight_decay=decay == "decoupled",
        groups={} if decay_all else {"encoder.scale": none, "decoder.bias": none},
        **({"momentum_decay": CONSTANT} if name == "nadam" else {}),
    )
    config = make_config(name, decay_all=decay_all, clip_norm=clip, **keys)
    # PyTorch adds 1e-6 to the norm when it clips
    assert_same_path(
        path_of(config, weights, grads, lambda count: RATE / (1 + count)), theirs, rtol=3e-6 if clip else 1e-10
    )


@pytest.mark.parametrize("momentum_decay", [1e-3, 0.1])
def test_momentum_decay_and_betas_reach_the_optimiser(rng, doubles, momentum_decay):
    weights, grads = weights_and_gradients(rng)
    config = make_config("nadam_torch", b1=0.8, b2=0.95, eps=0.1, momentum_decay=momentum_decay)
    theirs = pytorchs_path(weights, grads, betas=(0.8, 0.95), eps=0.1, momentum_decay=momentum_decay)
    assert_same_path(path_of(config, weights, grads), theirs)


def test_single_precision_is_pytorchs(rng):
    weights, grads = jax.tree.map(np.float32, weights_and_gradients(rng))
    found = path_of(make_config("nadam_torch"), weights, grads)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
    assert_same_path(found, pytorchs_path(weights, grads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [None, "l2", "decoupled"])
@pytest.mark.parametrize("name", NADAMS)
def test_nadams_by_hand(rng, doubles, name, decay):
    """The authors' with their eps (1e-5) and b1, b2 of the paper."""
    w0, grads = rng.normal(size=4), rng.normal(size=(STEPS, 4))
    keys = {"weight_decay": 0.1, "decay": decay} if decay else {}
    config = make_config(name, b1=0.95, b2=0.99, eps=1e-5, **keys)
    hand = ByHand(name, w0, 0.95, 0.99, 1e-5)
    found = path_of(config, {"kernel": w0}, [{"kernel": g} for g in grads])
    for g, (fast, _) in zip(grads, found, strict=True):
        hand.step(g, **({decay: 0.1} if decay else {}))
        np.testing.assert_allclose(fast["kernel"], hand.w, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "eps", "lengths"),
    [
        ("nadam_authors", 1e-5, (0.13, 0.18, 0.36, 0.53, 0.60, 0.79, 0.91, 0.98, 1.00)),
        ("nadam_torch", 1e-8, (1.03, 0.66, 0.83, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00)),
        ("nadam", 1e-8, (1.49, 1.02, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00)),
    ],
)
def test_steps_under_a_constant_gradient(name, eps, lengths):
    """Step lengths in units of the learning rate, b1 = 0.95; in single precision, as trained."""
    tx = optim.make_optimizer(make_config(name, b1=0.95, b2=0.99, eps=eps), lambda count: 0.5)
    params = {"w": jnp.ones(())}

    def one(state, _):
        updates, state = tx.update({"w": jnp.float32(3)}, state, params)
        return state, updates["w"] / -0.5

    _, found = jax.lax.scan(one, tx.init(params), length=50_000)
    at = np.array([1, 6, 20, 100, 1000, 5000, 10_000, 20_000, 50_000])
    np.testing.assert_allclose(found[at - 1], lengths, atol=0.0055)


def test_the_optimiser_follows_the_schedule():
    """A rate of zero from the second step on leaves the weights where the first step put them."""
    rate = lambda count: jnp.where(count < 1, 0.1, 0.0)  # noqa: E731
    path = [fast["w"][0] for fast, _ in path_of(make_config(), {"w": np.ones(2)}, [{"w": np.ones(2)}] * 3, rate)]
    assert path[0] < 1 and path[0] == path[1] == path[2]


# -- clipping and weight decay ------------------------------------------------------------------------------------


def test_clipping_is_by_the_norm_of_all_gradients(doubles):
    """3-4-12-84-85: a norm of 85 is cut to 17, a fifth; a large eps keeps the steps' lengths apart."""
    grads = {
        "encoder": {"kernel": np.array([3.0, 4.0])},
        "decoder": {"kernel": np.array([12.0]), "bias": np.array([84.0])},
    }
    fifth = jax.tree.map(lambda g: g / 5, grads)
    weights = jax.tree.map(np.zeros_like, grads)
    plain, clipped, loose = (
        path_of(make_config(eps=10.0, clip_norm=norm), weights, [g])[0][0]
        for norm, g in ((0.0, fifth), (17.0, grads), (86.0, fifth))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), clipped, plain)
    jax.tree.map(np.testing.assert_array_equal, loose, plain)
    unclipped = path_of(make_config(eps=10.0), weights, [grads])[0][0]
    assert abs(unclipped["encoder"]["kernel"][0] / plain["encoder"]["kernel"][0]) > 2


@pytest.fixture(scope="module")
def network():
    """Parameters of a toy DX-Net."""
    return split_model(networks.build(TOY_MODEL, seed=0))[1]


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_takes_kernels_or_all(network, decay_all):
    """Without gradients, weights of convolutions (of more than one dimension) shrink by rate x decay, or all do."""
    config = make_config(weight_decay=0.1, decay_all=decay_all)
    ones = jax.tree.map(lambda leaf: jnp.ones((1,) * leaf.ndim), network)  # few shapes, few programs
    tx = optim.make_optimizer(config, lambda count: 0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        expected = -0.05 if decay_all or update.ndim > 1 else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=optim.leaf_name(path))
    assert {leaf.ndim for leaf in jax.tree.leaves(updates)} >= {1, 5}


# -- parts of a network -------------------------------------------------------------------------------------------


def test_names_and_rates_of_a_network(network):
    """Everything of the encoder and nothing else is a tenth; names are those of modules and lists."""
    rates = optim.rates_of(network, "encoder.*=0.1")
    assert jax.tree.structure(rates) == jax.tree.structure(network)
    assert set(jax.tree.leaves(rates["encoder"])) == {0.1}
    assert {r for part in rates if part != "encoder" for r in jax.tree.leaves(rates[part])} == {1.0}
    names = {optim.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(network)}
    assert {"conv.kernel", "decoder.0.conv1.norm.bias", "decoder.1.trans.kernel"} <= names


def test_the_last_pattern_wins():
    params = {"a": {"kernel": 1.0, "bias": 1.0}, "b": {"kernel": 1.0, "bias": 1.0}, "ab": {"kernel": 1.0}}
    found = optim.rates_of(params, " *=0.5, a.*=0.1 ,*.bias=2,b.bias=0,")
    assert found == {"a": {"kernel": 0.1, "bias": 2}, "b": {"kernel": 0.5, "bias": 0}, "ab": {"kernel": 0.5}}
    assert optim.rates_of(params, "a.*=0.1,*=0.5")["a"]["kernel"] == 0.5
    assert optim.rates_of(params, "a.kernel=0.1")["a"] == {"kernel": 0.1, "bias": 1.0}
    assert set(jax.tree.leaves(optim.rates_of(params, ""))) == {1.0}


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ("encoder.*", r"'encoder.\*'.*<pattern>=<factor>"),
        ("=0.1", "'=0.1'.*<pattern>=<factor>"),
        ("a.*=", r"'a.\*='"),
        ("a.*=slow", r"'a.\*=slow'"),
        ("a.*=-0.1", r"'a.\*=-0.1'.* 0 \(frozen\) or more"),
        ("a.*=inf", "=inf.*0 .frozen. or more"),
        ("a.*=nan", "=nan.*0 .frozen. or more"),
        ("a=0.1", r"'a' .*no parameter; parts of this network: a\.\*, b\.\*"),
        ("A.*=0.1", r"'A.\*' .*no parameter"),
        ("encodr.*=0,b.*=-1", r"optim.rates=encodr.*'encodr.\*' .*no parameter.*'b.\*=-1'"),
    ],
)
def test_rates_that_mean_nothing_are_refused(rates, words):
    with pytest.raises(UserError, match=words):
        optim.rates_of({"a": {"kernel": 1.0}, "b": {"kernel": 1.0}}, rates)


@pytest.mark.parametrize(("decay", "lookahead"), [("decoupled", 0), ("l2", 3)])
@pytest.mark.parametrize("name", NADAMS)
def test_a_frozen_part_keeps_every_bit(rng, name, decay, lookahead):
    """Also zeros, and where gradients are not numbers; the other part moves as without."""
    weights, grads = jax.tree.map(np.float32, weights_and_gradients(rng, 7))
    weights["encoder"]["scale"][:] = [0.0, 1e-30, 1e30]
    keys = {"lookahead": lookahead, "weight_decay": 0.1, "decay": decay, "decay_all": True}
    plain = path_of(make_config(name, **keys), weights, grads)
    for g in grads[3:]:
        g["encoder"]["kernel"][0] = np.nan, np.inf, -np.inf
    frozen = path_of(make_config(name, rates="encoder.*=0", **keys), weights, grads)
    for now, then in zip(frozen, plain, strict=True):
        for part, other in zip(now, then, strict=True):
            for leaf in ("kernel", "scale"):
                assert part["encoder"][leaf].tobytes() == weights["encoder"][leaf].tobytes()
                assert (part["decoder"]["kernel"] == other["decoder"]["kernel"]).all()
    assert (plain[-1][0]["encoder"]["kernel"] != weights["encoder"]["kernel"]).all()


@pytest.mark.parametrize("decay", optim.DECAYS)
def test_a_slower_part_is_pytorchs_group_with_a_lower_rate(rng, doubles, decay):
    weights, grads = weights_and_gradients(rng)
    tenth, none = {"factor": 0.1}, {"weight_decay": 0.0}
    theirs = pytorchs_path(
        weights,
        grads,
        weight_decay=0.1,
        decoupled_weight_decay=decay == "decoupled",
        groups={"encoder.kernel": tenth, "encoder.scale": tenth | none, "decoder.bias": none},
    )
    config = make_config("nadam_torch", weight_decay=0.1, decay=decay, rates="encoder.*=0.1")
    assert_same_path(path_of(config, weights, grads), theirs)


@pytest.mark.parametrize("name", NADAMS)
def test_a_slower_part_moves_by_exactly_that_factor(rng, name):
    """A quarter is exact in binary; the gradients do not depend on the weights here."""
    weights, grads = jax.tree.map(np.float32, weights_and_gradients(rng, 3))
    weights = jax.tree.map(np.zeros_like, weights)
    plain, slower = (path_of(make_config(name, rates=r), weights, grads) for r in ("", "encoder.*=0.25"))
    jax.tree.map(np.testing.assert_array_equal, slower[0][0]["decoder"], plain[0][0]["decoder"])
    for (now, _), (then, _) in zip(slower, plain, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b / 4), now["encoder"], then["encoder"])
        jax.tree.map(np.testing.assert_array_equal, now["decoder"], then["decoder"])


# -- LookAhead ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("period", "size"), [(6, 0.5), (4, 0.25)])
@pytest.mark.parametrize("name", NADAMS)
def test_lookahead_by_hand(rng, doubles, name, period, size):
    """After every sixth step slow += 0.5 (fast - slow), fast = slow; the moments are kept."""
    w0, grads = rng.normal(size=3), rng.normal(size=(14, 3))
    config = make_config(name, b1=0.95, b2=0.99, lookahead=period)
    config.lookahead.step_size = size
    hand, slow = ByHand(name, w0, 0.95, 0.99, 1e-8), w0.copy()
    for t, (g, found) in enumerate(zip(grads, path_of(config, {"w": w0}, [{"w": g} for g in grads]), strict=True), 1):
        hand.step(g)
        if t % period == 0:
            slow = slow + size * (hand.w - slow)
            hand.w = slow.copy()
        np.testing.assert_allclose(found[0]["w"], hand.w, rtol=1e-9)
        np.testing.assert_allclose(found[1]["w"], slow, rtol=1e-9)
    assert not np.allclose(hand.w, slow)


def test_lookahead_around_pytorchs_nadam(rng, doubles):
    """With weight decay, which is of the fast weights."""
    w0, grads = rng.normal(size=3), rng.normal(size=(13, 3))
    config = make_config("nadam_torch", lookahead=6, weight_decay=0.1)
    fast, slow = torch.tensor(w0), w0.copy()
    tx = torch.optim.NAdam([fast], lr=RATE, weight_decay=0.1, decoupled_weight_decay=True)
    found = path_of(config, {"kernel": w0}, [{"kernel": g} for g in grads])
    for t, (g, now) in enumerate(zip(grads, found, strict=True), 1):
        fast.grad = torch.tensor(g)
        tx.step()
        if t % 6 == 0:
            slow = (slow + fast.numpy()) / 2
            fast.copy_(torch.tensor(slow))
        np.testing.assert_allclose(now[0]["kernel"], fast, rtol=1e-10)
        np.testing.assert_allclose(now[1]["kernel"], slow, rtol=1e-10)


def test_a_lookahead_pair_starts_equal_and_without_there_is_one_copy():
    params = {"w": jnp.arange(2.0)}
    pair = optim.init_params(make_config(lookahead=6), params)
    np.testing.assert_array_equal(runs_state.fast(pair)["w"], [0, 1])
    np.testing.assert_array_equal(runs_state.slow(pair)["w"], [0, 1])
    alone = optim.init_params(make_config(), params)
    assert runs_state.fast(alone) is runs_state.slow(alone) is alone is params


# -- schedules ----------------------------------------------------------------------------------------------------


def make_schedule(name, *, epochs, per_epoch, **keys):
    section = _shared.get_config({}).optim.schedule.to_dict()
    assert keys.keys() <= section.keys()
    return optim.make_schedule(section | {"name": name, **keys}, epochs=epochs, per_epoch=per_epoch)


def rates_at(schedule, steps):
    """As in training, where the step is an array."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(list(steps), jnp.int32)))


def pytorchs_rates(make, peak, count):
    tx = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler, rates = make(tx), []
    for _ in range(count):
        rates.append(tx.param_groups[0]["lr"])
        tx.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize(("peak", "epochs"), [(3e-4, 66.3), (1e-3, 89.8)])
def test_exponential_schedule(peak, epochs):
    """Per epoch PyTorch's ExponentialLR, until the floor is reached, and constant then."""
    schedule = make_schedule("exponential", peak=peak, epochs=50, per_epoch=7)
    found = rates_at(schedule, range(120 * 7)).reshape(120, 7)
    assert (found == found[:, :1]).all(), "one rate in an epoch"
    theirs = pytorchs_rates(lambda tx: torch.optim.lr_scheduler.ExponentialLR(tx, 0.95), peak, 120)
    floor = math.ceil(epochs)
    np.testing.assert_allclose(found[:floor, 0], theirs[:floor], rtol=1e-5)
    assert (found[:floor, 0] > 1e-5).all()
    np.testing.assert_allclose(found[floor:], 1e-5, rtol=1e-6)
    assert peak * 0.95**epochs == pytest.approx(1e-5, rel=5e-3)
    if peak == 3e-4:
        assert found[50, 0] == pytest.approx(2.3e-5, abs=5e-7), "where the paper's CAMUS run ends"


def test_polynomial_schedule():
    """PyTorch's PolynomialLR, nnU-Net's: to zero there, to the final rate here."""
    per_epoch, epochs = 5, 8
    theirs = pytorchs_rates(lambda tx: torch.optim.lr_scheduler.PolynomialLR(tx, 40, 0.9), 1e-2, 45)
    schedule = make_schedule("polynomial", peak=1e-2, final=1e-12, epochs=epochs, per_epoch=per_epoch)
    np.testing.assert_allclose(rates_at(schedule, range(40)), theirs[:40], rtol=1e-5)
    found = rates_at(make_schedule("polynomial", peak=1e-2, epochs=epochs, per_epoch=per_epoch), range(60))
    np.testing.assert_allclose(found[:40], theirs[:40], atol=1e-5)
    assert (np.diff(found[:41]) < 0).all()
    np.testing.assert_allclose(found[40:], 1e-5, rtol=1e-6)
    line = make_schedule("polynomial", peak=1.0, final=1e-9, power=1.0, epochs=1, per_epoch=4)
    np.testing.assert_allclose(rates_at(line, range(5)), [1, 0.75, 0.5, 0.25, 0], atol=1e-6)


def test_constant_then_cosine_is_the_papers():
    """1e-3 to epoch 40, PyTorch's CosineAnnealingLR to 1e-5 at epoch 90, then constant; row 22."""
    schedule = make_schedule("constant_then_cosine", peak=1e-3, constant_epochs=40, epochs=90, per_epoch=10)
    found = rates_at(schedule, range(1000))
    np.testing.assert_allclose(found[:401], 1e-3, rtol=1e-6)
    assert found[650] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-5), "half way down: the mean"
    theirs = pytorchs_rates(lambda tx: torch.optim.lr_scheduler.CosineAnnealingLR(tx, 500, 1e-5), 1e-3, 501)
    np.testing.assert_allclose(found[400:901], theirs, rtol=1e-4)
    np.testing.assert_allclose(found[900:], 1e-5, rtol=1e-4)
    # a run that is shorter than the constant part never falls
    short = make_schedule("constant_then_cosine", peak=1e-3, constant_epochs=40, epochs=5, per_epoch=10)
    np.testing.assert_allclose(rates_at(short, range(50)), 1e-3, rtol=1e-6)


def test_warm_up_rises_in_equal_steps():
    """PyTorch's LinearLR over the first 6 steps; the schedule's own clock runs on below it."""
    theirs = pytorchs_rates(lambda tx: torch.optim.lr_scheduler.LinearLR(tx, 1 / 6, total_iters=5), 1e-3, 20)
    keys = {"peak": 1e-3, "warmup_epochs": 1.5, "epochs": 30, "per_epoch": 4}
    found = rates_at(make_schedule("constant_then_cosine", constant_epochs=20, **keys), range(20))
    np.testing.assert_allclose(found, theirs, rtol=1e-5)
    np.testing.assert_allclose(found[:7], np.array([1, 2, 3, 4, 5, 6, 6]) / 6e3, rtol=1e-5)
    found = rates_at(make_schedule("exponential", factor=0.5, **keys), (0, 3, 4, 5, 6, 8))
    np.testing.assert_allclose(found, np.array([1 / 6, 4 / 6, 5 / 12, 1 / 2, 1 / 2, 1 / 4]) * 1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "keys", "epochs", "warned"),
    [
        ("constant_then_cosine", {"constant_epochs": 40}, 40, "constant_epochs"),
        ("constant_then_cosine", {"constant_epochs": 40}, 41, ""),
        ("exponential", {"constant_epochs": 40}, 10, ""),
        ("exponential", {"warmup_epochs": 6}, 5, "warmup_epochs"),
        ("exponential", {"warmup_epochs": 5}, 5, ""),
    ],
)
def test_a_run_that_is_too_short_for_its_schedule_is_named(name, keys, epochs, warned):
    """A rate that is constant for 40 of 40 epochs never decreases; a warm-up of 5 epochs ends with the fifth."""
    schedule = make_config().schedule
    schedule.update({"name": name, "warmup_epochs": 0.0, "constant_epochs": 0.0} | keys)
    found = list(open_run._schedule_problems(schedule, epochs))
    assert len(found) == bool(warned) and all(warned in text for text in found)


def test_schedules_take_plain_numbers():
    """The log asks for the rate of a step that is an int."""
    for name in optim.SCHEDULES:
        for warmup in (0.0, 1.0):
            schedule = make_schedule(name, peak=1e-3, warmup_epochs=warmup, epochs=4, per_epoch=2)
            np.testing.assert_allclose([float(schedule(s)) for s in range(9)], rates_at(schedule, range(9)), rtol=1e-6)


# -- moving average -----------------------------------------------------------------------------------------------


def test_ema_is_short_at_first():
    found = [float(optim.ema_decay(0.999, jnp.int32(t))) for t in (0, 1, 8, 90, 8989, 8990, 10**6)]
    assert found == pytest.approx([1 / 10, 2 / 11, 9 / 18, 91 / 100, 8990 / 8999, 0.999, 0.999], rel=1e-6)
    assert float(optim.ema_decay(0.3, jnp.int32(50))) == pytest.approx(0.3)


# -- misuses ------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UserError, match=r"optim.name='sgd'.* nadam, nadam_torch, nadam_authors"):
        optim.make_optimizer(make_config("sgd"), lambda count: 1e-3)
    with pytest.raises(UserError, match=r"optim.decay='L2'.* decoupled, l2"):
        optim.make_optimizer(make_config(decay="L2"), lambda count: 1e-3)
    with pytest.raises(UserError, match=r"schedule.name='warmup'.* constant_then_cosine, exponential, polynomial"):
        make_schedule("warmup", peak=1e-3, epochs=1, per_epoch=1)


@pytest.mark.parametrize("key", ["peak", "final"])
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf])
def test_rates_that_are_not_positive_are_refused(key, value):
    config = _shared.get_config({}).optim.schedule.to_dict() | {key: value}
    with pytest.raises(UserError, match=f"optim.schedule.{key}={value}: expected a positive learning rate"):
        optim.make_schedule(config, epochs=1, per_epoch=1)
