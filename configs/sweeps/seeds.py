"""Search space of five seeds, to measure how much the result of a recipe varies by chance.

Use it with ``--sampler=grid --trials=5``; ``--pack=5`` trains the five runs together.
"""

from typing import Any


def suggest(trial: Any) -> None:
    """Suggest the config values of a trial."""
    trial.suggest_int("seed", 0, 4, step=1)
