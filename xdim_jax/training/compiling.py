"""Compilation of the training step."""

import threading
import time
from collections.abc import Callable
from typing import Any

from xdim_jax import ops
from xdim_jax.base.log import duration, say


def compile_step(lower: Callable[..., Any], *arguments: Any) -> Any:
    """Compile a training step, and log how long that takes.

    XLA compiles in a second thread. Otherwise Python could not handle signals until the program is compiled.

    Args:
        lower: Function that lowers the step for the devices, such as `xdim_jax.training.mesh.Devices.lower`.
        arguments: Arguments of ``lower``.

    Returns:
        The compiled step.
    """
    say("compile    train step ...")
    begin = time.monotonic()
    with ops.count_implementations() as counts:
        lowered = lower(*arguments)
    for words, count in counts.most_common():
        say(f"           {count:4d} {words}")
    outcome: list[Any] = []

    def compile_lowered() -> None:
        try:
            outcome.append((ops.compile_program(lowered), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=compile_lowered, name="compile", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    compiled, error = outcome[0]
    if error is not None:
        raise error
    ops.keep_freed_memory()
    say(f"compile    train step took {duration(time.monotonic() - begin)}")
    return compiled
