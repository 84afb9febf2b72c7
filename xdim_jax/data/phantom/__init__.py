"""Synthetic cases in the data sets' real layouts, to try everything without licensed data.

Each data set has a module that draws a case and writes it. All depends on the seed and the case's number alone, whole
cases that exist are kept, and the settings lie beside the cases in ``phantom.json``.
"""

from collections.abc import Callable
from pathlib import Path

from xdim_jax.data.phantom.brats import brats_case, write_brats
from xdim_jax.data.phantom.camus import write_camus
from xdim_jax.data.phantom.chaos import write_chaos
from xdim_jax.data.phantom.common import SETTINGS_FILE, Difficulty

# data set -> its writer, and the number of its first case
WRITERS: dict[str, tuple[Callable[..., list[Path]], int]] = {
    "brats": (write_brats, 0),
    "camus": (write_camus, 1),
    "chaos": (write_chaos, 1),
}

__all__ = ["SETTINGS_FILE", "WRITERS", "Difficulty", "brats_case", "write_brats", "write_camus", "write_chaos"]
