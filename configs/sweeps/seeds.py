"""Search space of five seeds, which measures the variation of a recipe's result by chance.

Use it with ``--sampler=grid --trials=5``; ``--pack=5`` trains the five together.
"""

from typing import Any


def suggest(trial: Any) -> None:
    """Draw the parameters of a trial."""
    trial.suggest_int("seed", 0, 4, step=1)
