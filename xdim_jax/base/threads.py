"""Long calls of compiled code, during which signals are handled.

Python handles signals in the main thread, between two bytecode instructions. While the main thread executes compiled
code, for example XLA's compiler, signals are not handled. `call_in_thread` therefore makes the call in a second thread.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")
_abandoned: list[threading.Thread] = []  # threads whose callers no longer wait for them


class StoppedError(Exception):
    """A function has ended early because its caller asked it to stop."""


def call_in_thread(function: Callable[[], _Result], stopped: Callable[[], bool] = lambda: False) -> _Result:
    """Call ``function`` in a second thread, and return its result or raise its exception.

    Args:
        function: Function to call.
        stopped: Function that returns True if the result is no longer needed.

    Raises:
        StoppedError: ``stopped`` has returned True. The thread continues until the process ends.
    """
    outcome: list[_Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            if stopped():
                raise StoppedError
            thread.join(0.2)
    except BaseException:  # also a second Ctrl-C
        _abandoned.append(thread)
        raise
    if errors:
        raise errors[0]
    return outcome[0]


def is_abandoned_call_running() -> bool:
    """Return whether a call is still running for which `call_in_thread` no longer waits."""
    return any(thread.is_alive() for thread in _abandoned)
