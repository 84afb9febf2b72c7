"""Log lines and progress bars."""

import contextlib
import contextvars
import math
import sys
from collections.abc import Callable, Iterator
from typing import IO

from tqdm import tqdm

LOG_FILE = "train.log"  # in the workdir: log of a run that shares a process with others or is trained by a sweep


_quiet = False


def quieten() -> None:
    """Log only warnings from now on. In a run with several processes, only the first one logs everything."""
    global _quiet
    _quiet = True


_file: contextvars.ContextVar[IO[str] | None] = contextvars.ContextVar("file", default=None)


@contextlib.contextmanager
def redirect_to(file: IO[str]) -> Iterator[None]:
    """Inside the block, write the log lines of this thread to a file. Processes that train several runs use it."""
    token = _file.set(file)
    try:
        yield
    finally:
        _file.reset(token)


def say(line: str) -> None:
    """Print one line, without buffering."""
    if not _quiet:
        print(line, file=_file.get(), flush=True)


def warn(line: str) -> None:
    """Print a warning, without buffering."""
    print(f"warning: {line}", file=_file.get(), flush=True)


def progress_bar(title: str) -> Callable[[int, int], None]:
    """Return a function ``show(done, total)`` that reports how many cases are done.

    On a terminal it draws a progress bar. Otherwise it logs a line after each tenth of the cases.
    """
    shown: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            if not shown:
                shown.append(tqdm(total=total, desc=title, unit="case"))
            shown[0].update(done - shown[0].n)
            if done == total:
                shown[0].close()
        elif done == total or done * 10 // total > (done - 1) * 10 // total:
            say(f"{title:<10} {done}/{total} cases")

    return show


def duration(seconds: float) -> str:
    """Return a duration as text, such as ``42 s``, ``3 min 05 s``, ``2 h 10 min`` or ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    minutes, s = divmod(total, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"
