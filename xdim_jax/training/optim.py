"""Learning-rate schedules, the optimisers and LookAhead, from the ``optim`` section of a config."""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xdim_jax.base.errors import UserError

Schedule = Callable[[Any], Any]


# -- schedules ----------------------------------------------------------------------------------------------------


def _constant_then_cosine(options: Mapping[str, Any], epochs: float, per_epoch: int) -> Schedule:
    """``peak`` for ``constant_epochs``, then half a cosine down to ``final`` at the end (paper, Sect. 3.1.3)."""
    constant = round(options["constant_epochs"] * per_epoch)
    decay = max(round(epochs * per_epoch) - constant, 1)
    cosine = optax.cosine_decay_schedule(options["peak"], decay, alpha=options["final"] / options["peak"])
    return optax.join_schedules([optax.constant_schedule(options["peak"]), cosine], [constant])


def _exponential(options: Mapping[str, Any], epochs: float, per_epoch: int) -> Schedule:
    """``peak`` times ``factor`` after every epoch, never below ``final`` (paper, Sect. 3.1.1 and 3.1.2)."""
    del epochs
    return lambda step: jnp.maximum(options["peak"] * options["factor"] ** (step // per_epoch), options["final"])


def _polynomial(options: Mapping[str, Any], epochs: float, per_epoch: int) -> Schedule:
    """``final + (peak - final) * (1 - t)^power``; t is the share of the run that is done (as nnU-Net's, power 0.9)."""
    steps = max(round(epochs * per_epoch), 1)
    return optax.polynomial_schedule(options["peak"], options["final"], options["power"], steps)


SCHEDULES: dict[str, Callable[[Mapping[str, Any], float, int], Schedule]] = {
    "constant_then_cosine": _constant_then_cosine,
    "exponential": _exponential,
    "polynomial": _polynomial,
}


def make_schedule(config: Mapping[str, Any], *, epochs: float, per_epoch: int) -> Schedule:
    """Step to learning rate; with ``warmup_epochs``, it rises to the schedule's value in equal steps first.

    Raises:
        UserError: an unknown name, or rates that are not positive.
    """
    name = config["name"]
    if name not in SCHEDULES:
        raise UserError(f"config.optim.schedule.name={name!r} is unknown; known: {', '.join(SCHEDULES)}")
    for key in ("peak", "final"):
        if not (config[key] > 0 and math.isfinite(config[key])):
            raise UserError(f"config.optim.schedule.{key}={config[key]}: expected a positive learning rate")
    schedule = SCHEDULES[name](config, epochs, per_epoch)
    warmup = round(config["warmup_epochs"] * per_epoch)
    return (lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / warmup)) if warmup else schedule


# -- Nadam --------------------------------------------------------------------------------------------------------


class NadamState(NamedTuple):
    """``product`` of the momenta so far (Dozat's ``mu``); the two moments."""

    count: jax.Array
    product: jax.Array
    mu: Any
    nu: Any


def scale_by_scheduled_nadam(
    b1: float, b2: float, eps: float, momentum_decay: float, *, warm: bool
) -> optax.GradientTransformation:
    """Nadam with a momentum that grows: ``mu_t = b1 (1 - 0.5 * 0.96^(t * momentum_decay))``.

    The direction is ``(c_t g + d_t m_t) / (sqrt(v_t / (1 - b2^t)) + eps)`` with ``m`` and ``v`` as in Adam,
    ``d_t = mu_(t+1) / (1 - mu_1 ... mu_(t+1))``, and, with ``P_t = mu_1 ... mu_t``, ``c_t = (1 - mu_t) / (1 - P_t)``
    as in ``torch.optim.NAdam``. With ``warm`` it is ``(1 - b1) / (1 - P_t)``, as in the authors' code: the weights do
    not sum to one, so that steps are short at first and reach full length after some 10^4 (spec: architecture,
    section 9).
    """

    def momentum(t: jax.Array) -> jax.Array:
        return b1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    def init(params: Any) -> NadamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        kind = jnp.result_type(float)
        return NadamState(jnp.zeros((), jnp.int32), jnp.ones((), kind), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, NadamState]:
        del params
        grads = updates
        t = (state.count + 1).astype(state.product.dtype)
        now, after = momentum(t), momentum(t + 1)
        product = state.product * now
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        c = ((1 - b1) if warm else (1 - now)) / (1 - product)
        d = after / (1 - product * after)
        bias = 1 - b2**t

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return ((c * g + d * m) / (jnp.sqrt(v / bias) + eps)).astype(g.dtype)

        return jax.tree.map(direction, grads, mu, nu), NadamState(state.count + 1, product, mu, nu)

    return optax.GradientTransformation(init, update)


# name -> b1, b2, eps, momentum_decay -> transformation
OPTIMIZERS: dict[str, Callable[[float, float, float, float], optax.GradientTransformation]] = {
    # Dozat's with constant momentum, as in optax: full steps from the first on
    "nadam": lambda b1, b2, eps, _: optax.scale_by_adam(b1, b2, eps, nesterov=True),
    # torch.optim.NAdam
    "nadam_torch": lambda b1, b2, eps, decay: scale_by_scheduled_nadam(b1, b2, eps, decay, warm=False),
    # the class in the authors' code; its eps is 1e-5
    "nadam_authors": lambda b1, b2, eps, decay: scale_by_scheduled_nadam(b1, b2, eps, decay, warm=True),
}


# -- parts of a network -------------------------------------------------------------------------------------------


def leaf_name(path: tuple[Any, ...]) -> str:
    """The key path of a leaf as ``encoder.blocks.0.1.bn1.scale``."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def rates_of(params: Any, rates: str) -> Any:
    """A tree of factors of the learning rate, from e.g. ``"encoder.*=0.1,conv.*=0"``; others are 1.

    A pattern is of a leaf's whole name, with ``*`` for anything; where several fit, the last counts.

    Raises:
        UserError: a word that is not ``pattern=factor``, a factor below zero, or a pattern that fits no leaf.
    """
    words, problems = [], []
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for word in filter(None, (w.strip() for w in rates.split(","))):
        pattern, _, value = (w.strip() for w in word.rpartition("="))
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if not pattern or not 0 <= factor < math.inf:
            problems.append(f"{word!r} is not <pattern>=<factor>, with a factor of 0 (frozen) or more")
        elif not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            known = ", ".join(f"{n}.*" for n in sorted({name.partition(".")[0] for name in names}))
            problems.append(f"{pattern!r} fits no parameter; parts of this network: {known}")
        words.append((pattern, factor))
    if problems:
        raise UserError(f"config.optim.rates={rates}: " + "; ".join(problems))

    def factor_of(path: tuple[Any, ...], _: Any) -> float:
        fitting = [factor for pattern, factor in words if fnmatch.fnmatchcase(leaf_name(path), pattern)]
        return fitting[-1] if fitting else 1.0

    return jax.tree_util.tree_map_with_path(factor_of, params)


def _scale_by_rates(rates: str) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # a frozen leaf takes exactly nothing, whatever its gradient
        scaled = jax.tree.map(lambda u, r: u * r if r else jnp.zeros_like(u), updates, rates_of(updates, rates))
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _without_frozen(rates: str) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u, r: u if r else jnp.zeros_like(u), updates, rates_of(updates, rates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decayed(params: Any) -> Any:
    """Which leaves weight decay takes: kernels; neither biases nor the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_name(path).rpartition(".")[2] == "kernel", params)


# -- the whole optimiser ------------------------------------------------------------------------------------------

DECAYS = ("decoupled", "l2")


def is_on(value: Any) -> bool:
    """Whether a value that is off at zero is on. One that only the program knows (of several runs at once) is."""
    return isinstance(value, jax.Array) or value != 0


def make_optimizer(config: Mapping[str, Any], schedule: Schedule) -> optax.GradientTransformation:
    """One of the Nadams, inside LookAhead when ``lookahead.period`` is above 0.

    In this order: gradients of frozen parts are dropped; the others are clipped to ``clip_norm`` (by their global norm;
    0: not); weight decay of kind ``l2`` is added to them; Nadam; ``decoupled`` weight decay (Loshchilov and Hutter
    2019); the factors of ``rates`` (see `rates_of`); the learning rate. Weight decay takes kernels alone unless
    ``decay_all``.

    With LookAhead the parameters are a pair: see `init_params`, `fast` and `slow`.

    Raises:
        UserError: unknown names.
    """
    if config["name"] not in OPTIMIZERS:
        raise UserError(f"config.optim.name={config['name']!r} is unknown; known: {', '.join(OPTIMIZERS)}")
    if config["decay"] not in DECAYS:
        raise UserError(f"config.optim.decay={config['decay']!r} is unknown; known: {', '.join(DECAYS)}")
    mask = None if config["decay_all"] else _decayed
    decay = [optax.add_decayed_weights(config["weight_decay"], mask)] if is_on(config["weight_decay"]) else []
    nadam = OPTIMIZERS[config["name"]](config["b1"], config["b2"], config["eps"], config["momentum_decay"])
    rates = config["rates"]
    tx = optax.chain(
        *([_without_frozen(rates)] if rates else []),
        *([optax.clip_by_global_norm(config["clip_norm"])] if is_on(config["clip_norm"]) else []),
        *(decay if config["decay"] == "l2" else []),
        nadam,
        *(decay if config["decay"] == "decoupled" else []),
        *([_scale_by_rates(rates)] if rates else []),
        optax.scale_by_learning_rate(schedule),
    )
    ahead = config["lookahead"]
    return optax.lookahead(tx, ahead["period"], ahead["step_size"]) if ahead["period"] else tx


def init_params(config: Mapping[str, Any], params: Any) -> Any:
    """The parameters in the form the optimiser updates: a LookAhead pair, or as they are."""
    return optax.LookaheadParams.init_synced(params) if config["lookahead"]["period"] else params


def ema_decay(decay: float | jax.Array, step: jax.Array) -> jax.Array:
    """Decay of the moving average after ``step`` steps: short at first, ``(1 + t) / (10 + t)``, then ``decay``."""
    t = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + t) / (10 + t))
