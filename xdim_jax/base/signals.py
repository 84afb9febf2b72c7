"""Signal handlers, and the exit statuses that a scheduler reads.

Schedulers send SIGTERM or SIGUSR1 some time before they kill a process, and a terminal that is closed sends SIGHUP.
After such a signal, the run is saved and exits with the status `REQUEUE`, which means that the same command should be
run again. After Ctrl-C, the run is saved and exits with status 130.
"""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

from xdim_jax.base.log import say, say_in_handler

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@dataclasses.dataclass
class StopRequest:
    """Record of received signals.

    Attributes:
        signal: Number of the last signal that requests a stop; 0 if there is none.
        busy: True while there is unsaved work. A signal is then only recorded, and the process saves its work before it
            exits; otherwise a signal ends the process at once.
    """

    signal: int = 0
    busy: bool = False

    @property
    def status(self) -> int:
        """The exit status for the signal."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else REQUEUE


def say_stopped(stop: StopRequest) -> None:
    """Log that a signal has stopped the run. Call it when everything is saved and, with a bucket, uploaded."""
    name = signal.Signals(stop.signal).name
    say(f"stopped    by {name}; everything is saved, run the same command again to resume")


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Context manager that yields a `StopRequest`. Signals that arrive inside the block are recorded in it.

    Ctrl-C after an earlier signal raises KeyboardInterrupt.
    """
    stop = StopRequest()
    old = {number: signal.getsignal(number) for number in SIGNALS}
    install_handlers(stop)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def install_handlers(stop: StopRequest) -> None:
    """Install the signal handlers. Call it again after a library has installed its own handlers.

    A SIGHUP that the process was started to ignore, as with ``nohup``, is still ignored.

    Args:
        stop: Record of received signals. If it is not busy, a signal ends the process at once.
    """

    def handle(number: int, _frame: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        name = signal.Signals(number).name
        if stop.busy:
            say_in_handler(f"{name}: saving after this step")
            return
        say_in_handler(f"stopped    by {name}; nothing to save; run the same command again to resume")
        os._exit(stop.status)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)
