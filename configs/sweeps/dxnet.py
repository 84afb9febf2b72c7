"""Search space for DX-Net: design choices that the paper does not justify, and the peak learning rate."""

from typing import Any


def suggest(trial: Any) -> None:
    """Suggest the config values of a trial."""
    trial.suggest_float("optim.schedule.peak", 2e-4, 3e-3, log=True)
    trial.suggest_categorical("model.activation", ["relu", "silu"])
    trial.suggest_categorical("model.upsampling", ["transposed", "nearest"])
    trial.suggest_categorical("model.deep_supervision", [False, True])
    trial.suggest_categorical("optim.lookahead.period", [0, 6])
    trial.suggest_float("data.foreground", 0.0, 0.8)
