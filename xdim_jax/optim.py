"""Learning-rate schedules, the optimiser and LookAhead, from the ``optim`` section of a config."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optax

from xdim_jax.errors import UserError

Schedule = Callable[[Any], Any]


def constant_then_cosine(
    *, peak: float, final: float, constant_epochs: float, epochs: float, per_epoch: int
) -> Schedule:
    """``peak`` for ``constant_epochs``, then half a cosine down to ``final`` at ``epochs`` (paper, Sect. 3.1.3)."""
    constant = round(constant_epochs * per_epoch)
    decay = max(round(epochs * per_epoch) - constant, 1)
    cosine = optax.cosine_decay_schedule(peak, decay, alpha=final / peak)
    return optax.join_schedules([optax.constant_schedule(peak), cosine], [constant])


SCHEDULES: dict[str, Callable[..., Schedule]] = {"constant_then_cosine": constant_then_cosine}


def make_schedule(config: Mapping[str, Any], *, epochs: float, per_epoch: int) -> Schedule:
    """Step to learning rate. Raises UserError for an unknown name or rates that are not positive."""
    options = dict(config)
    name = options.pop("name")
    if name not in SCHEDULES:
        raise UserError(f"config.optim.schedule.name={name!r} is unknown; known: {', '.join(SCHEDULES)}")
    for key in ("peak", "final"):
        if not (options[key] > 0 and math.isfinite(options[key])):
            raise UserError(f"config.optim.schedule.{key}={options[key]}: expected a positive learning rate")
    return SCHEDULES[name](**options, epochs=epochs, per_epoch=per_epoch)


def make_optimizer(config: Mapping[str, Any], schedule: Schedule) -> optax.GradientTransformation:
    """Nadam (Dozat 2016, as in optax), inside LookAhead when ``lookahead.period`` is above 0.

    With LookAhead the parameters are a pair: see `init_params`, `fast` and `slow`.
    """
    if config["name"] != "nadam":
        raise UserError(f"config.optim.name={config['name']!r} is unknown; known: nadam")
    tx = optax.nadam(schedule, b1=config["b1"], b2=config["b2"], eps=config["eps"])
    ahead = config["lookahead"]
    return optax.lookahead(tx, ahead["period"], ahead["step_size"]) if ahead["period"] else tx


def init_params(config: Mapping[str, Any], params: Any) -> Any:
    """The parameters in the form the optimiser updates: a LookAhead pair, or as they are."""
    return optax.LookaheadParams.init_synced(params) if config["lookahead"]["period"] else params


def fast(params: Any) -> Any:
    """The weights that gradients are taken at."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def slow(params: Any) -> Any:
    """The weights that are evaluated, exported and kept."""
    return params.slow if isinstance(params, optax.LookaheadParams) else params
