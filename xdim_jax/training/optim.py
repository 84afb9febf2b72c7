"""Learning-rate schedules and optimisers, from the ``optim`` section of a config."""

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
    """Return a schedule: ``peak`` for ``constant_epochs``, then a cosine decay to ``final`` (paper, Sect. 3.1.3)."""
    constant = round(options["constant_epochs"] * per_epoch)
    decay = max(round(epochs * per_epoch) - constant, 1)
    cosine = optax.cosine_decay_schedule(options["peak"], decay, alpha=options["final"] / options["peak"])
    return optax.join_schedules([optax.constant_schedule(options["peak"]), cosine], [constant])


def _exponential(options: Mapping[str, Any], epochs: float, per_epoch: int) -> Schedule:
    """Return a schedule: ``peak``, multiplied by ``factor`` after each epoch, but at least ``final``.

    The paper uses it for CAMUS and CHAOS (Sect. 3.1.1 and 3.1.2).
    """
    del epochs
    return lambda step: jnp.maximum(options["peak"] * options["factor"] ** (step // per_epoch), options["final"])


def _polynomial(options: Mapping[str, Any], epochs: float, per_epoch: int) -> Schedule:
    """Return a schedule: ``final + (peak - final) * (1 - t)^power`` at the fraction t of the run (nnU-Net: 0.9)."""
    steps, final = max(round(epochs * per_epoch), 1), options["final"]

    def rate(step: Any) -> Any:
        # not optax.polynomial_schedule: in a compiled program, 1 - t may be -6e-8 at the end, and its power is NaN
        left = jnp.clip(1 - step / steps, 0, 1)
        return final + (options["peak"] - final) * left ** options["power"]

    return rate


SCHEDULES: dict[str, Callable[[Mapping[str, Any], float, int], Schedule]] = {
    "constant_then_cosine": _constant_then_cosine,
    "exponential": _exponential,
    "polynomial": _polynomial,
}


def make_schedule(config: Mapping[str, Any], *, epochs: float, per_epoch: int) -> Schedule:
    """Return the learning rate as a function of the step.

    During the first ``warmup_epochs``, the rate of the schedule is multiplied by a factor that rises linearly to 1.

    Args:
        config: The ``optim.schedule`` section of a config.
        epochs: Number of epochs of the run.
        per_epoch: Steps per epoch.

    Raises:
        UserError: The name is unknown, or a rate is not positive.
    """
    name = config["name"]
    if name not in SCHEDULES:
        raise UserError(f"config.optim.schedule.name={name!r} is unknown; known: {', '.join(SCHEDULES)}")
    for key in ("peak", "final"):
        if not (config[key] > 0 and math.isfinite(config[key])):
            raise UserError(f"config.optim.schedule.{key}={config[key]}: expected a positive learning rate")
    if config["final"] > config["peak"]:
        raise UserError(
            f"config.optim.schedule.final={config['final']} is above config.optim.schedule.peak={config['peak']}; "
            "lower final, or raise peak"
        )
    schedule = SCHEDULES[name](config, epochs, per_epoch)
    warmup = round(config["warmup_epochs"] * per_epoch)
    return (lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / warmup)) if warmup else schedule


# -- Nadam --------------------------------------------------------------------------------------------------------


class NadamState(NamedTuple):
    """State of `scale_by_scheduled_nadam`.

    Attributes:
        count: Number of updates.
        product: Product of the momenta of all updates so far (``P_t``).
        mu: First moment of the gradients.
        nu: Second moment of the gradients.
    """

    count: jax.Array
    product: jax.Array
    mu: Any
    nu: Any


def scale_by_scheduled_nadam(
    b1: float, b2: float, eps: float, momentum_decay: float, *, as_authors: bool
) -> optax.GradientTransformation:
    """Build Nadam with Dozat's momentum schedule, ``mu_t = b1 (1 - 0.5 * 0.96^(t * momentum_decay))``.

    The update is ``(c_t g + d_t m_t) / (sqrt(v_t / (1 - b2^t)) + eps)``, where ``m`` and ``v`` are the moments of Adam,
    ``P_t = mu_1 ... mu_t`` and ``d_t = mu_(t+1) / (1 - P_(t+1))``.

    Args:
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Number that is added to the denominator.
        momentum_decay: Speed of the momentum schedule.
        as_authors: False for ``c_t = (1 - mu_t) / (1 - P_t)``, as in ``torch.optim.NAdam``. True for
            ``c_t = (1 - b1) / (1 - P_t)``, as in the authors' code. In this case, the weights of ``g`` and ``m`` do not
            sum to one, and updates reach their full length only after some 10^4 steps.
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
        c = ((1 - b1) if as_authors else (1 - now)) / (1 - product)
        d = after / (1 - product * after)
        bias = 1 - b2**t

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            return ((c * g + d * m) / (jnp.sqrt(v / bias) + eps)).astype(g.dtype)

        return jax.tree.map(direction, grads, mu, nu), NadamState(state.count + 1, product, mu, nu)

    return optax.GradientTransformation(init, update)


# name -> b1, b2, eps, momentum_decay -> transformation
OPTIMIZERS: dict[str, Callable[[float, float, float, float], optax.GradientTransformation]] = {
    # Dozat's Nadam with constant momentum, as in optax: updates have their full length from the first step
    "nadam": lambda b1, b2, eps, _: optax.scale_by_adam(b1, b2, eps, nesterov=True),
    # torch.optim.NAdam
    "nadam_torch": lambda b1, b2, eps, decay: scale_by_scheduled_nadam(b1, b2, eps, decay, as_authors=False),
    # the authors' code, which uses an eps of 1e-5
    "nadam_authors": lambda b1, b2, eps, decay: scale_by_scheduled_nadam(b1, b2, eps, decay, as_authors=True),
}


# -- parts of a network -------------------------------------------------------------------------------------------


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the path of a leaf in a tree as a dotted name, such as ``encoder.blocks.0.1.bn1.scale``."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def rates_of(params: Any, rates: str) -> Any:
    """Return a tree with the learning-rate factor of each parameter.

    Args:
        params: Tree of parameters.
        rates: Comma-separated ``pattern=factor`` words, such as ``"encoder.*=0.1,conv.*=0"``. A pattern is compared
            with the whole dotted name of a parameter; ``*`` matches anything. If several patterns match, the last one
            counts; if none does, the factor is 1. A factor of 0 freezes the parameter.

    Raises:
        UserError: A word is not ``pattern=factor``, a factor is negative, or a pattern matches no parameter.
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
            problems.append(f"{word!r}: expected <pattern>=<factor>, with a factor of 0 (frozen) or more")
        elif not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            known = ", ".join(f"{n}.*" for n in sorted({name.partition(".")[0] for name in names}))
            problems.append(f"{pattern!r} matches no parameter; parts of this network: {known}")
        words.append((pattern, factor))
    if problems:
        raise UserError(f"config.optim.rates={rates}: " + "; ".join(problems))

    def factor_of(path: tuple[Any, ...], _: Any) -> float:
        fitting = [factor for pattern, factor in words if fnmatch.fnmatchcase(leaf_name(path), pattern)]
        return fitting[-1] if fitting else 1.0

    return jax.tree_util.tree_map_with_path(factor_of, params)


def _scale_by_rates(rates: str) -> optax.GradientTransformation:
    """Multiply updates by the learning-rate factors of their parameters."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # the update of a frozen parameter is exactly zero, even if its gradient is not finite
        scaled = jax.tree.map(lambda u, r: u * r if r else jnp.zeros_like(u), updates, rates_of(updates, rates))
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _without_frozen(rates: str) -> optax.GradientTransformation:
    """Set the gradients of frozen parameters to zero."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u, r: u if r else jnp.zeros_like(u), updates, rates_of(updates, rates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decayed(params: Any) -> Any:
    """Return a tree of booleans: True for kernels, which have weight decay, and False for all other parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaf_name(path).rpartition(".")[2] == "kernel", params)


# -- the whole optimiser ------------------------------------------------------------------------------------------

DECAYS = ("decoupled", "l2")


def make_optimizer(
    config: Mapping[str, Any], schedule: Schedule, traced: Mapping[str, jax.Array] | None = None
) -> optax.GradientTransformation:
    """Build the optimiser: one of the Nadam variants, inside LookAhead if ``lookahead.period`` is above 0.

    The operations are applied in this order:

    1. The gradients of frozen parameters are set to zero.
    2. The gradients are clipped to the global norm ``clip_norm`` (0: no clipping).
    3. Weight decay of kind ``l2`` is added to the gradients.
    4. Nadam computes the update.
    5. Weight decay of kind ``decoupled`` is added to the update (Loshchilov and Hutter 2019).
    6. The update is multiplied by the factors of ``rates`` (see `rates_of`) and by the learning rate.

    Weight decay applies to kernels only, unless ``decay_all`` is set. With LookAhead the parameters are a pair, see
    `init_params`, `xdim_jax.runs.state.fast` and `xdim_jax.runs.state.slow`.

    Args:
        config: The ``optim`` section of a config.
        schedule: Learning rate as a function of the step.
        traced: Dotted key, such as ``lookahead.step_size`` -> value that replaces that of the config, and may be
            traced. Only the config determines which of the operations above are part of the program.

    Raises:
        UserError: A name is unknown.
    """
    numbers = {"lookahead.step_size": config["lookahead"]["step_size"], **config, **(traced or {})}
    if config["name"] not in OPTIMIZERS:
        raise UserError(f"config.optim.name={config['name']!r} is unknown; known: {', '.join(OPTIMIZERS)}")
    if config["decay"] not in DECAYS:
        raise UserError(f"config.optim.decay={config['decay']!r} is unknown; known: {', '.join(DECAYS)}")
    mask = None if config["decay_all"] else _decayed
    decay = [optax.add_decayed_weights(numbers["weight_decay"], mask)] if config["weight_decay"] else []
    nadam = OPTIMIZERS[config["name"]](numbers["b1"], numbers["b2"], numbers["eps"], numbers["momentum_decay"])
    rates = config["rates"]
    tx = optax.chain(
        *([_without_frozen(rates)] if rates else []),
        *([optax.clip_by_global_norm(numbers["clip_norm"])] if config["clip_norm"] else []),
        *(decay if config["decay"] == "l2" else []),
        nadam,
        *(decay if config["decay"] == "decoupled" else []),
        *([_scale_by_rates(rates)] if rates else []),
        optax.scale_by_learning_rate(schedule),
    )
    period = config["lookahead"]["period"]
    return optax.lookahead(tx, period, numbers["lookahead.step_size"]) if period else tx


def init_params(config: Mapping[str, Any], params: Any) -> Any:
    """Return the parameters that the optimiser updates: a pair for LookAhead, or the given ones without LookAhead."""
    return optax.LookaheadParams.init_synced(params) if config["lookahead"]["period"] else params


def ema_decay(decay: float | jax.Array, step: jax.Array) -> jax.Array:
    """Return the decay of the moving average after ``step`` = t steps: ``(1 + t) / (10 + t)``, at most ``decay``."""
    t = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + t) / (10 + t))
