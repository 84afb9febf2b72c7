"""Compilation of the training step."""

import time
from collections.abc import Callable
from typing import Any

from xdim_jax import ops
from xdim_jax.base.log import duration, say
from xdim_jax.base.threads import call_in_thread


def compile_step(lower: Callable[..., Any], *arguments: Any) -> Any:
    """Compile a training step, and log how long that takes.

    Signals are handled while XLA compiles, see `xdim_jax.base.threads`.

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
    compiled = call_in_thread(lambda: ops.compile_program(lowered))
    ops.keep_freed_memory()
    say(f"compile    train step took {duration(time.monotonic() - begin)}")
    return compiled
