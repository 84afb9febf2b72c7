"""The training state and one optimisation step, as pure functions on plain trees of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xdim_jax.inference.output import Output
from xdim_jax.runs.state import TrainState, fast
from xdim_jax.training.loss import Loss, hard_dice
from xdim_jax.training.optim import ema_decay, is_on

_SMALL = 4096  # numbers


Batch = dict[str, jax.Array]
Augment = Callable[[Batch], Batch]
Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    output: Output,
    tx: optax.GradientTransformation,
    augment: Augment | None = None,
    *,
    dtype: Any = jnp.float32,
    accumulate: int = 1,
    ema: float | jax.Array = 0.0,
    axis: str | None = None,
) -> Step:
    """``step(state, batch, key) -> state, metrics``; randomness is ``fold_in(key, state.step)``.

    Args:
        graphdef: of the network, see `split_model`.
        loss: of logits, the masks of ``output``, and ``batch["annotated"]`` if there is one.
        output: what the channels mean.
        tx: the optimiser.
        augment: changes the batch first; its randomness is in the batch.
        dtype: of the image, hence of all activations but norms, losses and logits, which are float32 or better.
        accumulate: the batch is taken in so many parts, one after the other, and their losses and gradients are
            averaged. The result is that of the whole batch, but for what a loss or a norm takes over the batch: batch
            norm, a Dice per batch, and means over channels that only some samples show.
        ema: decay of the moving average, 0: none.
        axis: name of the ``pmap`` axis over whose devices gradients, statistics and metrics are averaged.

    Metrics: ``loss`` and its parts, ``grad_norm``, ``update_norm``, and ``score``: the hard Dice per region, averaged
    over the samples whose reference shows it, NaN where none does. ``ask`` of a batch, one number per sample, comes
    back as its maximum: what one process asks for, all learn at the same step.
    """

    def gradients(state: TrainState, stats: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict[str, Any], Any]:
        masks = output.encode(batch["label"])

        def objective(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, stats)
            model.train()
            image = batch["image"].astype(dtype) if dtype != jnp.float32 else batch["image"]
            logits, *coarse = model(image, rngs=nnx.Rngs(dropout=key), levels=True)
            annotated = batch.get("annotated")
            value, parts = loss(logits, masks, annotated)
            if coarse:
                losses = [loss(c, resized(masks, c.shape[1:-1]), annotated)[0] for c in coarse]
                value = _with_levels(value, losses)
            metrics = {"loss": value, **parts} | _scores(logits, batch)
            return value, (metrics, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        grads, (metrics, stats) = jax.grad(objective, has_aux=True)(fast(state.params))
        return grads, metrics, stats

    def _scores(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Per region: the sum of the Dice over samples whose reference shows it, and their number."""
        dice = hard_dice(output.predicted_regions(logits), output.regions.encode(batch["label"], jnp))
        shown = batch.get("annotated_regions", jnp.ones(dice.shape, bool))
        return {"score": jnp.sum(dice * shown, 0), "scored": jnp.sum(shown, 0).astype(dice.dtype)}

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        batch, ask = {k: v for k, v in batch.items() if k != "ask"}, batch.get("ask")
        batch = batch if augment is None else augment(batch)
        key = jax.random.fold_in(key, state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        if accumulate == 1:
            grads, metrics, stats = gradients(state, state.stats, batch, key)
        else:
            grads, metrics, stats = _accumulated(gradients, state, batch, key, accumulate)
        if axis is not None:
            grads, metrics, stats = jax.lax.pmean((grads, metrics, stats), axis)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": _norm(grads), "update_norm": _norm(fast(updates))}
        metrics["score"] = metrics["score"] / metrics.pop("scored")
        if ask is not None:
            metrics["ask"] = jnp.max(ask) if axis is None else jax.lax.pmax(jnp.max(ask), axis)
        average = state.ema
        if is_on(ema):
            new, decay = {"params": fast(params), "stats": stats}, ema_decay(ema, state.step)
            average = jax.tree.map(lambda a, b: (a + (1 - decay) * (b - a)).astype(a.dtype), average, new)
        return TrainState(state.step + 1, params, stats, opt_state, average), metrics

    return step


def _norm(tree: Any) -> jax.Array:
    """The global norm. Small arrays are put end to end first: hundreds of sums take long to compile, and to start."""
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size < _SMALL]
    parts = [leaf for leaf in leaves if leaf.size >= _SMALL] + ([jnp.concatenate(small)] if small else [])
    return jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in parts))


def _accumulated(
    gradients: Callable[..., Any], state: TrainState, batch: Batch, key: jax.Array, parts: int
) -> tuple[Any, dict[str, Any], Any]:
    """The mean of the gradients and metrics of ``parts`` parts of the batch; statistics go from part to part.

    Part i has every sample ``i + k * parts``, so that each part lies on all devices that the batch lies on.
    """

    def take(stats: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        number, part = numbered
        grads, metrics, stats = gradients(state, stats, part, jax.random.fold_in(key, number))
        return stats, (grads, metrics)

    def sums(carry: Any, numbered: Any) -> tuple[Any, None]:
        stats, total = carry
        stats, new = take(stats, numbered)
        return (stats, jax.tree.map(jnp.add, total, new)), None

    split = {k: jnp.moveaxis(v.reshape(len(v) // parts, parts, *v.shape[1:]), 1, 0) for k, v in batch.items()}
    numbers = jnp.arange(parts)
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(lambda: take(state.stats, jax.tree.map(lambda a: a[0], (numbers, split)))[1]),
    )
    (stats, total), _ = jax.lax.scan(sums, (state.stats, zeros), (numbers, split))
    grads, metrics = jax.tree.map(lambda a: a / parts, total)
    return grads, metrics, stats


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
