"""The settings of a config that determine the program of a training step."""

from typing import Any

from xdim_jax.base.config import Config, leaves
from xdim_jax.training.check import FREE_KEYS

# keys whose values may differ between the runs of a pack, because they are arguments of the program. An operation whose
# value is 0 is not part of the program, so a value must be 0 in all runs or in none
STACKED_KEYS = (
    *(f"optim.{key}" for key in ("b1", "b2", "eps", "momentum_decay", "weight_decay", "clip_norm", "ema")),
    "optim.lookahead.step_size",
    "loss.eps",
    "loss.weights",
)
# keys that do not influence the program. They may change learning rates and batches, which are arguments of the program
_NOT_IN_PROGRAM = (
    *FREE_KEYS,
    "seed",
    "train.epochs",
    "train.patience",
    "train.validate_after_score",
    "train.validate_every",
    *(
        f"data.{key}"
        for key in ("fold", "folds", "split", "train_patients", "epoch_steps", "foreground", "patches_per_case")
    ),
)
_SECTIONS_NOT_IN_PROGRAM = ("optim.schedule.", "init.", "data.phantom.", "data.prepare.")


def signature(config: Config) -> dict[str, Any]:
    """Return the settings that determine the program, and must therefore be equal in all runs of a pack."""
    found: dict[str, Any] = {}
    for key, value in leaves(config):
        if key in _NOT_IN_PROGRAM or key.startswith(_SECTIONS_NOT_IN_PROGRAM):
            continue
        if key in STACKED_KEYS:
            found[key] = value != 0 if isinstance(value, (int, float)) else None
        else:
            found[key] = tuple(value) if isinstance(value, (list, tuple)) else value
    return found
