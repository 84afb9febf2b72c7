"""Leaving cleanly: signals, and the exit statuses that a scheduler reads.

SIGTERM and SIGUSR1 (schedulers send one of the two some time before they kill) save and end the run with `REQUEUE`,
which means: run the same command again. Ctrl-C does the same with 130.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from xdim_jax.base.log import say

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclasses.dataclass
class StopRequest:
    """The signal that asked the run to stop; 0: none.

    While ``busy``, steps are taken that only a save keeps, and the request waits for the loop. Else nothing can be
    lost, and a signal ends the process at once.
    """

    signal: int = 0
    busy: bool = False

    @property
    def status(self) -> int:
        """The exit status that goes with the signal."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else REQUEUE


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside the block, signals set the request; a second Ctrl-C kills."""
    stop = StopRequest()
    old = {number: signal.getsignal(number) for number in SIGNALS}
    listen(stop)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def listen(stop: StopRequest) -> None:
    """Signals set the request from now on; again after a library has put a handler of its own there."""

    def handle(number: int, _frame: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        if stop.busy:
            say(f"{signal.Signals(number).name}: saving after this step")
            return
        say(f"stopped    by {signal.Signals(number).name}; nothing to save; run the same command to go on")
        sys.stdout.flush()
        os._exit(stop.status)

    for number in SIGNALS:
        signal.signal(number, handle)
