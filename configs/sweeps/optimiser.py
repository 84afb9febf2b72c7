"""Search space for the optimiser of any recipe: learning rate, variant and betas of Nadam, LookAhead, weight decay."""

from typing import Any


def suggest(trial: Any) -> None:
    """Suggest the config values of a trial."""
    trial.suggest_float("optim.schedule.peak", 1e-4, 3e-3, log=True)
    trial.suggest_float("optim.b1", 0.85, 0.98)
    trial.suggest_float("optim.b2", 0.98, 0.9999)
    trial.suggest_float("optim.weight_decay", 1e-6, 1e-2, log=True)
    trial.suggest_categorical("optim.lookahead.period", [0, 6])
    if trial.suggest_categorical("optim.name", ["nadam", "nadam_torch"]) == "nadam_torch":
        trial.suggest_float("optim.momentum_decay", 1e-3, 1e-2, log=True)
