"""Lines on the terminal."""

import contextlib
import contextvars
import math
import sys
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    pass
LOG_FILE = "train.log"  # what a run said that had no terminal of its own


_quiet = False


def quieten() -> None:
    """From now on this process says only warnings: of several processes, the first speaks."""
    global _quiet
    _quiet = True


_file: contextvars.ContextVar[IO[str] | None] = contextvars.ContextVar("file", default=None)


@contextlib.contextmanager
def into(file: IO[str]) -> Iterator[None]:
    """Inside the block, what this thread says goes into a file: of one run of several in a process."""
    token = _file.set(file)
    try:
        yield
    finally:
        _file.reset(token)


def say(line: str) -> None:
    """One line on the terminal, at once."""
    if not _quiet:
        print(line, file=_file.get(), flush=True)


def warn(line: str) -> None:
    """A warning line."""
    print(f"warning: {line}", file=_file.get(), flush=True)


def bar(title: str) -> Callable[[int, int], None]:
    """``show(done, total)``: a progress bar on a terminal; elsewhere a line for every tenth."""
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
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 4 h``."""
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
