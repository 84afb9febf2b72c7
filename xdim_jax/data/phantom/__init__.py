"""Phantoms: synthetic cases in the layouts of the real data sets, with which all commands run without licensed data.

A case depends only on the seed, its number and the settings, which are stored in ``phantom.json`` in the folder of the
cases. Existing complete cases are kept.
"""

from xdim_jax.data.phantom.brats import brats_case, write_brats
from xdim_jax.data.phantom.camus import LAYOUTS as CAMUS_LAYOUTS
from xdim_jax.data.phantom.camus import write_camus
from xdim_jax.data.phantom.chaos import write_chaos
from xdim_jax.data.phantom.common import SETTINGS_FILE, Difficulty

__all__ = ["CAMUS_LAYOUTS", "SETTINGS_FILE", "Difficulty", "brats_case", "write_brats", "write_camus", "write_chaos"]
