"""The training step, a pure function of trees of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from xdim_jax.inference.output import Output
from xdim_jax.runs.state import TrainState, fast
from xdim_jax.training.loss import Loss, hard_dice
from xdim_jax.training.optim import ema_decay

Batch = dict[str, jax.Array]
Augment = Callable[[Batch], Batch]
Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]

_SMALL = 4096  # arrays with fewer elements are concatenated before their norm is computed


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
    """Build the training step ``step(state, batch, key) -> state, metrics``.

    The batch has ``image`` (batch, spatial axes, channels) and ``label`` (batch, spatial axes), and optionally
    ``annotated`` (batch, channels), ``annotated_regions`` (batch, regions) and ``request`` (batch,), which tells
    whether a process asks to save or to stop. The random key for dropout is ``fold_in(key, state.step)``; the index of
    the device (``axis``) and that of the part (``accumulate``) are folded in as well.

    The metrics are ``loss`` and its parts, ``grad_norm``, ``update_norm``, and ``score``: for each region, the hard
    Dice averaged over the samples in which it is annotated, NaN if there is none. If the batch has ``request``, the
    metric ``request`` is its maximum over all processes, see `xdim_jax.training.agreement`.

    Args:
        graphdef: Static part of the network, see `xdim_jax.nets.functional.split_model`.
        loss: Function of the logits, the masks ``output.encode(batch["label"])``, ``batch["annotated"]`` (None if
            absent), and the mask of annotated voxels (None if all voxels are annotated).
        output: Regions or labels that the output channels of the network predict.
        tx: Optimiser.
        augment: Augmentation of the batch; its random keys are part of the batch. None for no augmentation.
        dtype: Type of image and activations. Normalisation layers and losses are computed at least in
            float32.
        accumulate: Number of parts of the batch that are processed one after the other. Losses and gradients are
            averaged over the parts. The result equals that of the whole batch, except for stochastic depth, whose
            random numbers differ, and for values that depend on all samples: batch norm, a Dice per batch, a
            categorical cross-entropy with weights or unannotated voxels, and means over channels that are annotated in
            some samples only.
        ema: Decay of the moving average of the weights and of the running statistics, if the state has one.
        axis: Name of the ``pmap`` axis over whose devices gradients, statistics and metrics are averaged.
    """

    def gradients(state: TrainState, stats: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict[str, Any], Any]:
        """Return gradients, metrics and new running statistics."""
        masks, voxels = output.encode(batch["label"]), output.annotated_voxels(batch["label"])

        def objective(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, params, stats)
            model.train()
            image = batch["image"].astype(dtype) if dtype != jnp.float32 else batch["image"]
            logits, *coarse = model(image, rngs=nnx.Rngs(dropout=key), levels=True)
            annotated = batch.get("annotated")
            value, parts = loss(logits, masks, annotated, voxels)
            if coarse:
                value = _with_levels(value, [coarse_loss(c, masks, annotated, voxels) for c in coarse])
            metrics = {"loss": value, **parts} | _scores(logits, batch)
            return value, (metrics, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        def coarse_loss(logits: jax.Array, masks: jax.Array, annotated: Any, voxels: jax.Array | None) -> jax.Array:
            size = logits.shape[1:-1]
            shown = None if voxels is None else resized(voxels[..., None], size)[..., 0]
            return loss(logits, resized(masks, size), annotated, shown)[0]

        grads, (metrics, stats) = jax.grad(objective, has_aux=True)(fast(state.params))
        return grads, metrics, stats

    def _scores(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return, for each region, the sum of the Dice over the samples in which it is annotated, and their number."""
        label = batch["label"]
        predicted, voxels = output.predicted_regions(logits), output.annotated_voxels(label)
        dice = hard_dice(predicted, output.regions.encode(label, jnp), voxels)
        shown = batch.get("annotated_regions", jnp.ones(dice.shape, bool))
        return {"score": jnp.sum(dice * shown, 0), "scored": jnp.sum(shown, 0).astype(dice.dtype)}

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        batch, request = {k: v for k, v in batch.items() if k != "request"}, batch.get("request")
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
        if request is not None:
            metrics["request"] = jnp.max(request) if axis is None else jax.lax.pmax(jnp.max(request), axis)
        average = state.ema
        if average:
            new, decay = {"params": fast(params), "stats": stats}, ema_decay(ema, state.step)
            average = jax.tree.map(lambda a, b: (a + (1 - decay) * (b - a)).astype(a.dtype), average, new)
        return TrainState(state.step + 1, params, stats, opt_state, average), metrics

    return step


def _norm(tree: Any) -> jax.Array:
    """Return the global norm. Small arrays are concatenated first, because hundreds of sums are slow to compile."""
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size < _SMALL]
    parts = [leaf for leaf in leaves if leaf.size >= _SMALL] + ([jnp.concatenate(small)] if small else [])
    return jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in parts))


def _accumulated(
    gradients: Callable[..., Any], state: TrainState, batch: Batch, key: jax.Array, parts: int
) -> tuple[Any, dict[str, Any], Any]:
    """Return gradients and metrics averaged over ``parts`` parts of the batch, and the statistics after the last part.

    Part i has the samples ``i + k * parts``. Each part is therefore distributed over the same devices as the batch.
    """

    def process(stats: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        number, part = numbered
        grads, metrics, stats = gradients(state, stats, part, jax.random.fold_in(key, number))
        return stats, (grads, metrics)

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        stats, total = carry
        stats, new = process(stats, numbered)
        return (stats, jax.tree.map(jnp.add, total, new)), None

    split = {k: jnp.moveaxis(v.reshape(len(v) // parts, parts, *v.shape[1:]), 1, 0) for k, v in batch.items()}
    numbers = jnp.arange(parts)
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(lambda: process(state.stats, jax.tree.map(lambda a: a[0], (numbers, split)))[1]),
    )
    (stats, total), _ = jax.lax.scan(add, (state.stats, zeros), (numbers, split))
    grads, metrics = jax.tree.map(lambda a: a / parts, total)
    return grads, metrics, stats


def _with_levels(value: jax.Array, coarse: list[jax.Array]) -> jax.Array:
    """Return the loss with deep supervision: the weighted mean of the losses of all levels.

    As in nnU-Net, each level has half the weight of the next finer one.

    Args:
        value: Loss at full resolution.
        coarse: Losses of the other levels, finest first.
    """
    weights = [0.5**i for i in range(len(coarse) + 1)]
    return sum((w * v for w, v in zip(weights[1:], coarse, strict=True)), value) / sum(weights)


def resized(masks: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resample masks to a coarser grid by nearest neighbour, at the centres of its voxels.

    Args:
        masks: ``(batch, *spatial, channels)``.
        size: Spatial size of the coarser grid.
    """
    for axis, (n, m) in enumerate(zip(masks.shape[1:-1], size, strict=True), 1):
        index = [(2 * i + 1) * n // (2 * m) for i in range(m)]
        masks = jnp.take(masks, jnp.asarray(index), axis)
    return masks
