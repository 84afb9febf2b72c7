"""Losses on logits, channels last. Every reduction is stated; loss functions return their parts for the log."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xdim_jax.errors import UserError

Loss = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def _spatial(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over samples, voxels and channels of ``-[g log y + (1 - g) log(1 - y)]``, ``y = sigmoid(logits)``."""
    return jnp.mean(jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def soft_dice(probs: jax.Array, targets: jax.Array, eps: float) -> jax.Array:
    """``2 sum(y g) / (sum y + sum g + eps)`` per sample and channel: ``(B, *spatial, C)`` to ``(B, C)``."""
    axes = _spatial(probs)
    overlap = jnp.sum(probs * targets, axes)
    return 2 * overlap / (jnp.sum(probs, axes) + jnp.sum(targets, axes) + eps)


def make_dice_bce(*, eps: float) -> Loss:
    """Eq. 5 of the paper: one minus the Dice, averaged over samples and channels, plus binary cross-entropy.

    DEVIATION from Eq. 5 as printed, which cannot be computed: it takes the logarithm of the binary ground truth. The
    logarithm here is the prediction's, and the cross-entropy is a mean over voxels instead of a sum, so that both
    terms are of order one.
    """

    def loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets = targets.astype(logits.dtype)
        dice = 1 - jnp.mean(soft_dice(jax.nn.sigmoid(logits), targets, eps))
        bce = binary_cross_entropy(logits, targets)
        return dice + bce, {"dice_loss": dice, "bce_loss": bce}

    return loss


LOSSES: dict[str, Callable[..., Loss]] = {"dice_bce": make_dice_bce}


def make_loss(config: Mapping[str, Any]) -> Loss:
    """The loss that the ``loss`` section of a config names.

    Raises:
        UserError: unknown name.
    """
    options = dict(config)
    name = options.pop("name")
    if name not in LOSSES:
        raise UserError(f"config.loss.name={name!r} is unknown; known: {', '.join(LOSSES)}")
    return LOSSES[name](**options)


def hard_dice(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Dice of ``logits > 0`` per sample and channel, 1 where both are empty: the training score, ``(B, C)``."""
    predicted = logits > 0
    axes = _spatial(predicted)
    total = jnp.sum(predicted, axes) + jnp.sum(targets, axes)
    overlap = jnp.sum(predicted & targets, axes)
    return jnp.where(total > 0, 2 * overlap / jnp.maximum(total, 1), 1.0)
