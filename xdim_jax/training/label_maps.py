"""Label maps of the best validation. ``evaluate --workdir`` uses them, so it need not predict these cases again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax.base import log
from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Case, Dataset
from xdim_jax.data.images.image import read_grid
from xdim_jax.data.images.nifti import write_volume
from xdim_jax.data.reading import encode_label
from xdim_jax.inference.folder import is_replaceable, make_note
from xdim_jax.inference.group import weights_digest
from xdim_jax.inference.settings import Settings, resolve
from xdim_jax.runs.workdir import PREDICTIONS_FOLDER


class LabelMapWriter:
    """Writes the label maps of each validation, and keeps those of the best validation so far.

    They are the same files as ``python -m xdim_jax.predict`` writes with the same weights and the default settings. If
    one of them cannot be written, a warning is logged, and training continues.

    Args:
        workdir: Workdir of the run. The maps are written to its folder ``predictions``.
        digest: Function that returns the digest of networks and settings for ``(parameters, statistics)``.
    """

    def __init__(self, workdir: Path, digest: Callable[[Any], str]):
        self._folder = workdir / PREDICTIONS_FOLDER
        self._new = workdir / ".validation" / str(jax.process_index())
        self._digest_of = digest
        self._digest = ""

    def begin(self, weights: Any) -> None:
        """Begin a validation with the given weights, ``(parameters, statistics)``."""
        self.discard()
        self._digest = self._digest_of(weights)

    def write(self, case: Case, label: np.ndarray) -> None:
        """Write the label map of a case.

        Args:
            case: The case.
            label: Label indices (D, H, W) on the source grid, after post-processing.
        """
        if not self._digest:
            return
        try:
            grid = read_grid(case.images[0], case.axes)
            note = make_note(self._digest, case)
            write_volume(self._new / f"{case.case_id}.nii.gz", encode_label(case, label), grid, note)
        except UserError as error:
            log.warn(f"the label maps of this validation are not kept: {error}")
            self.discard()

    def keep(self) -> None:
        """Replace the label maps in ``predictions`` by those of this validation, except files of other programs."""
        try:
            for path in sorted(self._new.glob("*.nii.gz")):
                self._folder.mkdir(exist_ok=True)
                target = self._folder / path.name
                if is_replaceable(target):
                    path.replace(target)
                else:
                    log.warn(f"{target} is not a prediction of xdim_jax, and is kept; move it to another folder")
        except OSError as error:
            log.warn(f"the label maps of this validation are not kept: {error}")
        self.discard()

    def discard(self) -> None:
        """Delete the label maps of a validation that was interrupted, or whose weights are not the best."""
        shutil.rmtree(self._new, ignore_errors=True)
        self._digest = ""


def make_label_maps(config: Any, dataset: Dataset, workdir: Path) -> LabelMapWriter:
    """Return the writer of the label maps of a run, given its config, data set and workdir."""
    resolved = resolve(Settings(), config, dataset.regions)
    return LabelMapWriter(workdir, lambda weights: weights_digest(config, [weights], resolved))
