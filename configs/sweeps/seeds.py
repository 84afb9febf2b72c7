"""The same recipe from five seeds: what chance alone does. --sampler=grid --trials=5; --pack=5 trains them together."""

from typing import Any


def suggest(trial: Any) -> None:
    """Draws the parameters of a trial."""
    trial.suggest_int("seed", 0, 4, step=1)
