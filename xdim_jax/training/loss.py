"""Losses on logits, channels last. Every reduction is stated; loss functions return their parts for the log.

All of them are one minus a soft Dice, plus a cross-entropy. Both are first computed per sample and channel, so that
channels can be weighted, and left out of samples whose reference does not show them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.base.errors import UserError

# logits (B, *spatial, C), masks bool (B, *spatial, C), annotated bool (B, C) or None -> loss, parts
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]

NAMES = ("dice_bce", "dice_ce")
DICES = ("sample", "batch")
REDUCTIONS = ("mean", "sum")
_NEVER = -1e9  # the logit of a channel that takes no part; infinite would make its gradient NaN


def _spatial(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``-[g log y + (1 - g) log(1 - y)]`` with ``y = sigmoid(logits)``, elementwise."""
    return jax.nn.softplus(logits) - logits * targets


def soft_dice(probs: jax.Array, targets: jax.Array, eps: float | jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """``2 sum(y g) / (sum y + sum g + eps)`` over ``axes``."""
    overlap = jnp.sum(probs * targets, axes)
    return 2 * overlap / (jnp.sum(probs, axes) + jnp.sum(targets, axes) + eps)


def against_the_rest(logits: jax.Array) -> jax.Array:
    """Softmax logits to the logits of the same probabilities, one channel against all others."""
    n = logits.shape[-1]
    others = [jax.nn.logsumexp(jnp.delete(logits, c, axis=-1), axis=-1) for c in range(n)]
    return logits - jnp.stack(others, -1)


def merge_unannotated(logits: jax.Array, annotated: jax.Array) -> jax.Array:
    """Softmax logits whose background (channel 0) takes the probability of the channels that are not ``annotated``.

    What a reference does not show is background in it, so this is the likelihood of such a reference (the marginal
    loss of Shi et al. 2021).
    """
    shown = annotated.reshape(annotated.shape[0], *(1,) * (logits.ndim - 2), -1)
    hidden = jnp.where(shown, _NEVER, logits).at[..., 0].set(logits[..., 0])
    return jnp.where(shown, logits, _NEVER).at[..., 0].set(jax.nn.logsumexp(hidden, axis=-1))


def merge_unannotated_targets(targets: jax.Array, annotated: jax.Array) -> jax.Array:
    """Return softmax targets with the targets of unannotated channels added to the background (channel 0)."""
    shown = annotated.reshape(annotated.shape[0], *(1,) * (targets.ndim - 2), -1)
    hidden = jnp.sum(jnp.where(shown, 0, targets), -1)
    return jnp.where(shown, targets, 0).at[..., 0].add(hidden)


def make_loss(config: Mapping[str, Any], activation: str, channels: int) -> Loss:
    """The loss that the ``loss`` section of a config describes.

    ``dice_bce``: Eq. 5 of the paper: one minus the mean soft Dice, plus the mean binary cross-entropy of every channel
    against the rest.

    DEVIATION from Eq. 5 as printed, which cannot be computed: it takes the logarithm of the binary ground truth. The
    logarithm here is the prediction's, and the cross-entropy is a mean over voxels instead of a sum, so that both
    terms are of order one (``cross_entropy=sum`` sums).

    ``dice_ce`` (softmax only): one minus the mean soft Dice, plus the categorical cross-entropy.

    Other keys: ``eps`` in the Dice's denominator; ``dice``: over each ``sample`` alone, or over the ``batch`` as one;
    ``background``: whether channel 0 of a softmax counts in the Dice; ``weights`` of the channels (empty: equal): in
    means over channels, and in the cross-entropy as PyTorch's ``CrossEntropyLoss(weight)`` has them.

    The loss takes logits ``(B, *spatial, C)``, masks of the same shape, and optionally ``annotated``, bool ``(B, C)``:
    the channels that the sample's reference shows. Others take no part: with sigmoids they are left out, with softmax
    their probability counts as background (see `merge_unannotated`).

    Args:
        activation: ``sigmoid`` or ``softmax``.
        channels: of the logits.

    Raises:
        UserError: unknown name or choice, or weights that do not fit the channels.
    """
    name, softmax = config["name"], activation == "softmax"
    problems = [
        f"config.loss.{key}={config[key]!r} is unknown; known: {', '.join(known)}"
        for key, known in (("name", NAMES), ("dice", DICES), ("cross_entropy", REDUCTIONS))
        if config[key] not in known
    ]
    if name == "dice_ce" and not softmax:
        problems.append("config.loss.name=dice_ce is of config.output=softmax; sigmoids go with dice_bce")
    eps, weights = config["eps"], config["weights"]
    if isinstance(weights, jax.Array):  # of several runs at once, whose own configs were looked at
        chosen = np.ones(weights.shape)
    else:
        chosen = weights = np.asarray(weights or (1.0,) * channels, np.float32)
    if chosen.shape != (channels,) or not (np.isfinite(chosen) & (chosen >= 0)).all() or not chosen.any():
        problems.append(
            f"config.loss.weights={tuple(config['weights'])}: expected one number for each of the {channels} channels, "
            "none negative or infinite and not all zero"
        )
    if not isinstance(eps, jax.Array) and not eps > 0:
        problems.append(f"config.loss.eps={eps}: expected a small positive number")
    if problems:
        raise UserError("\n  ".join(problems))
    per_batch, summed = config["dice"] == "batch", config["cross_entropy"] == "sum"
    counted = np.ones(channels, np.float32)
    if softmax and not config["background"]:
        counted[0] = 0

    def loss(
        logits: jax.Array, masks: jax.Array, annotated: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        targets = masks.astype(logits.dtype)
        taken = jnp.broadcast_to(jnp.asarray(weights), (logits.shape[0], channels))  # (B, C)
        if annotated is not None:
            taken = taken * annotated
            if softmax:
                logits, targets = merge_unannotated(logits, annotated), merge_unannotated_targets(targets, annotated)
        probs = jax.nn.softmax(logits) if softmax else jax.nn.sigmoid(logits)
        axes = _spatial(logits)
        if per_batch:
            shown = taken.reshape(taken.shape[0], *(1,) * len(axes), channels) > 0
            dice = soft_dice(probs * shown, targets * shown, eps, axes=(0, *axes))
            share = jnp.max(taken, 0) * counted
        else:
            dice, share = soft_dice(probs, targets, eps, axes=axes), taken * counted
        dice_loss = 1 - _mean(dice, share)
        if name == "dice_ce":
            entropy = -jnp.sum(targets * jax.nn.log_softmax(logits) * weights, -1)
            weight = len(logits) if summed else jnp.sum(targets * weights)
            entropy = jnp.sum(entropy) / jnp.where(weight > 0, weight, 1)  # no voxel of a class that counts: zero
        else:
            entropy = binary_cross_entropy(against_the_rest(logits) if softmax else logits, targets)
            entropy = _mean((jnp.sum if summed else jnp.mean)(entropy, axes), taken)
        return dice_loss + entropy, {"dice_loss": dice_loss, "entropy_loss": entropy}

    return loss


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted; where no channel has a weight (nothing annotated that counts), zero."""
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1)


def hard_dice(predicted: jax.Array, reference: jax.Array) -> jax.Array:
    """Dice of masks ``(B, *spatial, R)`` per sample and region, 1 where both are empty: the training score, (B, R)."""
    axes = _spatial(predicted)
    total = jnp.sum(predicted, axes) + jnp.sum(reference, axes)
    overlap = jnp.sum(predicted & reference, axes)
    return jnp.where(total > 0, 2 * overlap / jnp.maximum(total, 1), 1.0)
