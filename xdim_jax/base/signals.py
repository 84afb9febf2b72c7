"""Signals, and the exit statuses that a scheduler reads.

Schedulers send SIGTERM or SIGUSR1 some time before they kill a process. Both save the run and end it with the exit
status `REQUEUE`, which means: run the same command again. Ctrl-C saves and ends the run with status 130.
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
    """The signals that a process has received.

    Attributes:
        signal: Number of the signal that asked the run to stop; 0 if there is none.
        busy: True while there are training steps that are not saved. A signal then waits until the loop has saved them;
            otherwise it ends the process at once.
    """

    signal: int = 0
    busy: bool = False

    @property
    def status(self) -> int:
        """The exit status for the signal."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else REQUEUE


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside the block, signals are recorded in the `StopRequest` that is yielded. A second Ctrl-C interrupts."""
    stop = StopRequest()
    old = {number: signal.getsignal(number) for number in SIGNALS}
    listen(stop)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def listen(stop: StopRequest) -> None:
    """Install the signal handlers. Call it again after a library has installed handlers of its own."""

    def handle(number: int, _frame: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        if stop.busy:
            say(f"{signal.Signals(number).name}: saving after this step")
            return
        say(f"stopped    by {signal.Signals(number).name}; nothing to save; run the same command again to resume")
        sys.stdout.flush()
        os._exit(stop.status)

    for number in SIGNALS:
        signal.signal(number, handle)
