"""The training state and one optimisation step, as pure functions on plain trees of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xdim_jax.loss import Loss, hard_dice
from xdim_jax.optim import fast


class TrainState(NamedTuple):
    """Everything that a step changes. ``params`` is a LookAhead pair or a dict; ``stats`` the running statistics."""

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


Targets = Callable[[jax.Array], jax.Array]
Augment = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """A module to its static part and two plain nested dicts: parameters and running statistics."""
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def init_state(params: Any, stats: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    targets: Targets,
    tx: optax.GradientTransformation,
    augment: Augment | None = None,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """``step(state, batch, key) -> state, metrics``; randomness is ``fold_in(key, state.step)``.

    ``augment`` changes the batch first; its randomness is in the batch.

    Metrics: ``loss`` and its parts, ``grad_norm``, ``update_norm``, and ``score``: the hard Dice per channel,
    averaged over samples.
    """

    def step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = batch if augment is None else augment(batch)
        masks = targets(batch["label"])
        key = jax.random.fold_in(key, state.step)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, state.stats)
            model.train()
            logits, *coarse = model(batch["image"], rngs=nnx.Rngs(dropout=key), levels=True)
            value, parts = loss(logits, masks)
            if coarse:
                value = _with_levels(value, [loss(c, resized(masks, c.shape[1:-1]))[0] for c in coarse])
            metrics = {"loss": value, **parts, "score": jnp.mean(hard_dice(logits, masks), 0)}
            return value, (metrics, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        grads, (metrics, stats) = jax.grad(objective, has_aux=True)(fast(state.params))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(fast(updates))}
        return TrainState(state.step + 1, params, stats, opt_state), metrics

    return step


def _with_levels(value: jax.Array, coarse: list[jax.Array]) -> jax.Array:
    """Deep supervision: the mean of the levels' losses, each weighing half of the one that is finer (as in nnU-Net)."""
    weights = [0.5**i for i in range(len(coarse) + 1)]
    return sum((w * v for w, v in zip(weights[1:], coarse, strict=True)), value) / sum(weights)


def resized(masks: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Nearest-neighbour sampling of ``(batch, *spatial, channels)`` on a coarser grid, at the voxels' centres."""
    for axis, (n, m) in enumerate(zip(masks.shape[1:-1], size, strict=True), 1):
        index = [(2 * i + 1) * n // (2 * m) for i in range(m)]
        masks = jnp.take(masks, jnp.asarray(index), axis)
    return masks


def make_forward(graphdef: nnx.GraphDef) -> Callable[[tuple[Any, Any], jax.Array], jax.Array]:
    """``forward((params, stats), image) -> logits`` in evaluation mode."""

    def forward(weights: tuple[Any, Any], image: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, *weights)
        model.eval()
        return model(image)

    return forward
