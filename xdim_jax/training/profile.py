"""Profiles of training steps."""

from pathlib import Path
from typing import Any

import jax

from xdim_jax.base.log import say


class Profile:
    """Context manager that writes a profile of steps ``first`` to ``first + count - 1`` to a folder.

    Args:
        folder: Folder of the profile.
        first: Number of the first profiled step.
        count: Number of profiled steps; 0 for no profile.
    """

    def __init__(self, folder: Path, first: int, count: int):
        self._folder, self._first, self._last = folder, first, first + count - 1
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Call before each step: start the profile before the first profiled step."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Call after each step: stop the profile after the last profiled step, when its results are computed."""
        if self._running and step == self._last:
            jax.block_until_ready(results)
            self._stop()
            count = self._last - self._first + 1
            say(f"profile    of {count} steps written to {self._folder}; open it with TensorBoard or Perfetto")

    def _stop(self) -> None:
        """Stop the profile if it is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
