"""Log lines, results of commands, and progress bars.

A log line that cannot be written (the reader of a pipe has ended, the terminal is closed, the disk is full) is dropped,
and the command continues. Text that is the result of a command is written by `write_result`, which raises an error
instead.
"""

import contextlib
import contextvars
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO

from tqdm import tqdm

from xdim_jax.base.errors import UserError

LOG_FILE = "train.log"  # in the workdir: log of a run that shares a process with others or is trained by a sweep


_quiet = False


def quieten() -> None:
    """Log only warnings from now on. In a run with several processes, only the first one logs everything."""
    global _quiet
    _quiet = True


_file: contextvars.ContextVar[IO[str] | None] = contextvars.ContextVar("file", default=None)


@contextlib.contextmanager
def redirect_to(file: IO[str]) -> Iterator[None]:
    """Context manager in which the log lines of this thread are written to a file; for processes with several runs."""
    token = _file.set(file)
    try:
        yield
    finally:
        _file.reset(token)


def say(line: str) -> None:
    """Print one line, without buffering."""
    if not _quiet:
        _print(line)


def warn(line: str) -> None:
    """Print a warning, without buffering."""
    _print(f"warning: {line}")


def _print(line: str) -> None:
    """Print a line to the file of `redirect_to`, or else to standard output. If that fails, the line is dropped."""
    with contextlib.suppress(OSError):
        _print_encodable(line, _file.get() or sys.stdout)


def _print_encodable(line: str, file: IO[str] | None) -> None:
    """Print a line without buffering. Characters that the file cannot encode become escape sequences."""
    try:
        print(line, file=file, flush=True)
    except UnicodeEncodeError:
        encoding = getattr(file, "encoding", None) or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def say_in_handler(line: str) -> None:
    """Print one line from a signal handler.

    The line is written to the file descriptor of standard output, and dropped if it cannot be written at once. Python's
    streams must not be used in a handler, because the signal may have interrupted one of their functions.
    """
    with contextlib.suppress(OSError, ValueError):
        if not _quiet and select.select([], [1], [], 0)[1]:
            os.write(1, f"{line}\n".encode(errors="backslashreplace"))


def write_result(text: str) -> None:
    """Print text that is the result of a command.

    Raises:
        UserError: Standard output cannot be written, e.g. because the disk is full. If it is a pipe whose reader has
            ended, such as ``head``, there is no error.
    """
    try:
        _print_encodable(text, sys.stdout)
    except BrokenPipeError:
        pass
    except OSError as error:
        raise UserError(
            f"standard output cannot be written: {error.strerror or error}; redirect it to another file"
        ) from error


def progress_bar(title: str, *, lines: bool = True, interval: float = 0.0) -> Callable[[int, int], None]:
    """Return a function ``show(done, total)`` that reports how many cases are done.

    On a terminal it draws a progress bar. Otherwise, with ``lines``, it logs a line after each tenth of the cases, but
    not within ``interval`` seconds after the start or the last line.
    """
    shown: list[tqdm] = []
    logged = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal logged
        if sys.stderr is not None and sys.stderr.isatty():
            with contextlib.suppress(OSError):  # the terminal has been closed
                if not shown:
                    shown.append(tqdm(total=total, desc=title, unit="case"))
                shown[0].update(done - shown[0].n)
                if done == total:
                    shown[0].close()
        elif lines and (done == total or done * 10 // total > (done - 1) * 10 // total):
            if interval and time.monotonic() - logged < interval:
                return
            logged = time.monotonic()
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
