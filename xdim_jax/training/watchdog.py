"""A watchdog for the input pipeline. If no batch arrives for a while, it logs the activity of the reading threads."""

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from xdim_jax.data.pipeline import Activity


class Watchdog:
    """Context manager around the training loop. Inside it, call the method `next` instead of the builtin ``next``.

    Args:
        seconds: Interval of log lines while the loop waits for a batch; 0 for none.
        activity: Current activity of the reading threads.
        say: Function that logs a line.
    """

    def __init__(self, seconds: float, activity: Activity, say: Callable[[str], None]):
        self._seconds, self._activity, self._say = seconds, activity, say
        self._since: float | None = None
        self._said = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def next(self, stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return the next batch of the stream."""
        self._said, self._since = 0, time.monotonic()
        try:
            return next(stream)
        finally:
            self._since = None

    def _watch(self) -> None:
        """Log a line for each interval that the loop has waited for a batch."""
        while not self._done.wait(min(self._seconds / 4, 1.0)):
            since = self._since
            waited = 0.0 if since is None else time.monotonic() - since
            if waited < (self._said + 1) * self._seconds:
                continue
            self._said += 1
            lines = self._activity.lines() or ["no thread is reading; all of them wait for the stream"]
            self._say(f"waiting    {waited:.0f} s for a batch: " + "; ".join(lines))
