"""The training state: all values that a training step changes, as a pytree of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """All values that a training step changes.

    Attributes:
        step: Number of completed steps, int32.
        params: Parameters as a nested dict, or a LookAhead pair of two such dicts.
        stats: Running statistics of the normalisation layers, a nested dict.
        opt_state: State of the optimiser.
        ema: Moving average of the fast parameters and of the statistics, or an empty dict.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    ema: Any


def init_state(params: Any, stats: Any, tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Return the state before the first step.

    Args:
        params: Initial parameters, or a LookAhead pair of them.
        stats: Initial running statistics.
        tx: Optimiser.
        ema: True if the state has a moving average of the weights.
    """
    average = {"params": fast(params), "stats": stats} if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), average)


def evaluation_weights(state: TrainState) -> tuple[Any, Any]:
    """Return the parameters and statistics to evaluate: the moving average if there is one, else the slow weights."""
    return (state.ema["params"], state.ema["stats"]) if state.ema else (slow(state.params), state.stats)


def fast(params: Any) -> Any:
    """Return the fast weights of a LookAhead pair, at which gradients are computed; other parameters unchanged."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def slow(params: Any) -> Any:
    """Return the slow weights of a LookAhead pair, which are evaluated and exported; other parameters unchanged."""
    return params.slow if isinstance(params, optax.LookaheadParams) else params
