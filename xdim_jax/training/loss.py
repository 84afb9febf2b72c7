"""Losses, which are functions of logits with the channels last. Each loss also returns its parts, for the log.

Every loss is one minus a soft Dice, plus a cross-entropy. Channels can have weights. If a channel is not annotated in a
sample, a loss with sigmoids excludes it, and a loss with a softmax adds its probability to the background. Voxels that
are not annotated are excluded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.base.errors import UserError

# loss(logits (B, *spatial, C), masks bool (B, *spatial, C), annotated channels bool (B, C) or None, annotated voxels
# bool (B, *spatial) or None) -> loss, parts
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]

NAMES = ("dice_bce", "dice_ce")
DICES = ("sample", "batch")
REDUCTIONS = ("mean", "sum")
_MASKED = -1e9  # logit of a channel with probability 0; with -inf the gradient would be NaN


def _spatial(x: jax.Array) -> tuple[int, ...]:
    """Return the spatial axes of ``(B, *spatial, C)``."""
    return tuple(range(1, x.ndim - 1))


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return ``-[g log y + (1 - g) log(1 - y)]`` with ``y = sigmoid(logits)`` and targets g, elementwise."""
    return jax.nn.softplus(logits) - logits * targets


def soft_dice(probs: jax.Array, targets: jax.Array, eps: float | jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """Return ``2 sum(y g) / (sum y + sum g + eps)`` for probabilities y and targets g, summed over ``axes``."""
    overlap = jnp.sum(probs * targets, axes)
    return 2 * overlap / (jnp.sum(probs, axes) + jnp.sum(targets, axes) + eps)


def one_vs_rest_logits(logits: jax.Array) -> jax.Array:
    """Return the logits ``log(p / (1 - p))`` of the probability p of each channel, given softmax logits."""
    n = logits.shape[-1]
    others = [jax.nn.logsumexp(jnp.delete(logits, c, axis=-1), axis=-1) for c in range(n)]
    return logits - jnp.stack(others, -1)


def merge_unannotated(logits: jax.Array, annotated: jax.Array) -> jax.Array:
    """Return softmax logits with the probabilities of unannotated channels added to that of the background.

    Voxels of unannotated structures are background in the reference, so the cross-entropy of these logits is the
    negative log-likelihood of the reference (the marginal loss of Shi et al. 2021).

    Args:
        logits: ``(B, *spatial, C)``; channel 0 is the background.
        annotated: bool ``(B, C)``.
    """
    shown = annotated.reshape(annotated.shape[0], *(1,) * (logits.ndim - 2), -1)
    hidden = jnp.where(shown, _MASKED, logits).at[..., 0].set(logits[..., 0])
    return jnp.where(shown, logits, _MASKED).at[..., 0].set(jax.nn.logsumexp(hidden, axis=-1))


def merge_unannotated_targets(targets: jax.Array, annotated: jax.Array) -> jax.Array:
    """Return softmax targets with the targets of unannotated channels added to the background (channel 0)."""
    shown = annotated.reshape(annotated.shape[0], *(1,) * (targets.ndim - 2), -1)
    hidden = jnp.sum(jnp.where(shown, 0, targets), -1)
    return jnp.where(shown, targets, 0).at[..., 0].add(hidden)


def make_loss(
    config: Mapping[str, Any], activation: str, channels: int, traced: Mapping[str, jax.Array] | None = None
) -> Loss:
    """Build the loss that the ``loss`` section of a config describes.

    ``dice_bce`` is Eq. 5 of the paper: one minus the mean soft Dice, plus the mean binary cross-entropy of the channels
    (with a softmax, of each channel against all others), with two deviations. Eq. 5 as printed has the logarithm of the
    binary ground truth, which may be 0; here it is that of the prediction. Eq. 5 sums the cross-entropy over voxels;
    here it is averaged, so that both terms are of order one (``cross_entropy=sum`` restores the sum).

    ``dice_ce``, for softmax outputs only, is one minus the mean soft Dice, plus the categorical cross-entropy.

    The config also has these keys:

    - ``eps`` is added to the denominator of the Dice.
    - ``dice`` is ``sample`` to compute the Dice of each sample, ``batch`` to compute it over all voxels of the batch.
    - ``background`` is True to include channel 0 of a softmax in the Dice.
    - ``weights`` has one number per channel; empty for equal weights. Means over channels are weighted, and the
      categorical cross-entropy is weighted as in PyTorch's ``CrossEntropyLoss(weight)``.

    Args:
        config: The ``loss`` section of a config.
        activation: ``sigmoid`` or ``softmax``.
        channels: Number of channels of the logits.
        traced: Values, possibly traced, that replace ``eps`` and ``weights`` of the config.

    Returns:
        A function of logits ``(B, *spatial, C)``, masks of the same shape, and optionally ``annotated``, bool
        ``(B, C)``, and ``voxels``, bool ``(B, *spatial)``, the annotated voxels. It returns the loss and its parts
        ``dice_loss`` and ``entropy_loss``. With sigmoids, channels that are not annotated in a sample are excluded;
        with a softmax, their probability is added to the background (see `merge_unannotated`). Voxels that are not
        annotated are excluded; all their masks must be False.

    Raises:
        UserError: A name is unknown, or the weights do not fit the channels.
    """
    try:
        weights = np.asarray(config["weights"] or (1.0,) * channels, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.loss.weights={config['weights']!r}: expected {channels} numbers") from error
    if problems := _problems(config, activation, channels, weights):
        raise UserError("\n  ".join(problems))
    numbers: dict[str, Any] = {"eps": config["eps"], "weights": weights, **(traced or {})}
    softmax, per_batch = activation == "softmax", config["dice"] == "batch"
    entropy_loss = _categorical_entropy if config["name"] == "dice_ce" else _binary_entropy
    in_dice = np.ones(channels, np.float32)
    if softmax and not config["background"]:
        in_dice[0] = 0

    def loss(
        logits: jax.Array, masks: jax.Array, annotated: jax.Array | None = None, voxels: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        targets = masks.astype(logits.dtype)
        channel_weights = jnp.broadcast_to(jnp.asarray(numbers["weights"]), (logits.shape[0], channels))  # (B, C)
        if annotated is not None:
            channel_weights = channel_weights * annotated
            if softmax:
                logits, targets = merge_unannotated(logits, annotated), merge_unannotated_targets(targets, annotated)
        probs = jax.nn.softmax(logits) if softmax else jax.nn.sigmoid(logits)
        axes = _spatial(logits)
        if voxels is not None:  # the targets of the other voxels are 0
            probs = probs * voxels[..., None]
        if per_batch:
            shown = channel_weights.reshape(channel_weights.shape[0], *(1,) * len(axes), channels) > 0
            dice = soft_dice(probs * shown, targets * shown, numbers["eps"], axes=(0, *axes))
            share = jnp.max(channel_weights, 0) * in_dice
        else:
            dice, share = soft_dice(probs, targets, numbers["eps"], axes=axes), channel_weights * in_dice
        dice_loss = 1 - _mean(dice, share)
        summed = config["cross_entropy"] == "sum"
        entropy = entropy_loss(
            logits, targets, numbers["weights"], channel_weights, voxels, softmax=softmax, summed=summed
        )
        return dice_loss + entropy, {"dice_loss": dice_loss, "entropy_loss": entropy}

    return loss


def _problems(config: Mapping[str, Any], activation: str, channels: int, weights: np.ndarray) -> list[str]:
    """Return a message for each value of the ``loss`` section that cannot be used."""
    problems = [
        f"config.loss.{key}={config[key]!r} is unknown; known: {', '.join(known)}"
        for key, known in (("name", NAMES), ("dice", DICES), ("cross_entropy", REDUCTIONS))
        if config[key] not in known
    ]
    if config["name"] == "dice_ce" and activation != "softmax":
        problems.append("config.loss.name=dice_ce needs config.output=softmax; for sigmoid outputs use dice_bce")
    if weights.shape != (channels,) or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        problems.append(
            f"config.loss.weights={tuple(config['weights'])}: expected one number for each of the {channels} channels, "
            "none negative or infinite and not all zero"
        )
    if not config["eps"] > 0:
        problems.append(f"config.loss.eps={config['eps']}: expected a small positive number")
    return problems


def _categorical_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: Any,
    channel_weights: jax.Array,
    voxels: jax.Array | None,
    *,
    softmax: bool,
    summed: bool,
) -> jax.Array:
    """Return the categorical cross-entropy: the mean over voxels, or the sum over voxels averaged over samples."""
    del channel_weights, voxels, softmax  # all targets of a voxel that is not annotated are 0
    entropy = -jnp.sum(targets * jax.nn.log_softmax(logits) * weights, -1)
    weight = len(logits) if summed else jnp.sum(targets * weights)
    return jnp.sum(entropy) / jnp.where(weight > 0, weight, 1)  # 0 if all targets have the weight 0


def _binary_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: Any,
    channel_weights: jax.Array,
    voxels: jax.Array | None,
    *,
    softmax: bool,
    summed: bool,
) -> jax.Array:
    """Return the binary cross-entropy: the mean or sum over voxels, averaged over samples and channels."""
    del weights
    entropy = binary_cross_entropy(one_vs_rest_logits(logits) if softmax else logits, targets)
    axes = _spatial(logits)
    if voxels is None:
        return _mean((jnp.sum if summed else jnp.mean)(entropy, axes), channel_weights)
    total = jnp.sum(entropy * voxels[..., None], axes)
    count = 1 if summed else jnp.maximum(jnp.sum(voxels, axes), 1)[:, None]
    return _mean(total / count, channel_weights)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted mean; zero if all weights are zero."""
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1)


def hard_dice(predicted: jax.Array, reference: jax.Array, voxels: jax.Array | None = None) -> jax.Array:
    """Return the Dice of masks ``(B, *spatial, R)`` for each sample and region, ``(B, R)``; 1 if both are empty.

    Voxels that are not annotated (``voxels``, bool ``(B, *spatial)``) are excluded.
    """
    axes = _spatial(predicted)
    if voxels is not None:
        predicted = predicted & voxels[..., None]
    total = jnp.sum(predicted, axes) + jnp.sum(reference, axes)
    overlap = jnp.sum(predicted & reference, axes)
    return jnp.where(total > 0, 2 * overlap / jnp.maximum(total, 1), 1.0)
