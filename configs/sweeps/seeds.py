"""Search space of five seeds, to measure the variation of the result of a recipe between seeds.

Use it with ``--sampler=grid --trials=5``; ``--pack=5`` trains the five runs together.
"""

from typing import Any


def suggest(trial: Any) -> None:
    """Suggest the config values of a trial."""
    trial.suggest_int("seed", 0, 4, step=1)
