"""Selection of the implementation of the operations while a program is traced.

`IMPLEMENTATIONS` has the names of the implementations. ``config.train.ops`` can be any of them except ``sharded``;
its ``auto`` measures them on GPUs and TPUs (`xdim_jax.training.choose_ops`).
"""

import contextlib
import contextvars
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from xdim_jax.ops.compilation import compiler_options

IMPLEMENTATIONS = ("auto", "fast", "library", "reference", "sharded")
_requested: contextvars.ContextVar[str] = contextvars.ContextVar("requested", default="auto")
_counts: contextvars.ContextVar[Counter[str] | None] = contextvars.ContextVar("counts", default=None)


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Select the implementation of the operations in programs that are traced inside the block.

    Args:
        name: ``fast``; ``reference``; ``library``, which is ``reference`` except that transposed convolutions are
            matrix products; ``sharded``, for arrays whose spatial axes are distributed over several devices; or
            ``auto``, which is ``fast`` on CPU and ``library`` elsewhere. ``sharded`` is ``library`` with two
            exceptions: 1x1 and transposed convolutions have no reshapes for which XLA would gather whole arrays on each
            device; and depthwise convolutions, and dense ones along a short first axis, are computed per tap, because
            XLA's partitioner computes wrong values for them.

    Raises:
        ValueError: The name is unknown.
    """
    _check_name(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def with_implementation(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``function`` inside `use_implementation`.

    Args:
        name: See `use_implementation`. ``auto`` returns the function itself, which uses the caller's implementation.
        function: Function that is traced later.

    Raises:
        ValueError: The name is unknown.
    """
    _check_name(name)
    if name == "auto":
        return function

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with use_implementation(name):
            return function(*arguments, **options)

    return traced


def _check_name(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(IMPLEMENTATIONS)}")


def describe_implementation(name: str = "auto") -> str:
    """Describe the implementation of a program's operations on this platform, in one line for the log."""
    with use_implementation(name):
        fast = active_implementation() == "fast"
    own = (
        "dense convolutions by Winograd's algorithm or in 2D, depthwise as shifted sums, transposed as matrix products"
    )
    convolution = own if fast else "convolutions of XLA"
    library = "; XLA's own convolutions use the threads of Eigen" if compiler_options() else ""
    reason = "requested" if name != "auto" else jax.default_backend()
    shown = ("fast" if fast else "library") if name == "auto" else name
    return f"{shown} ({reason}): {convolution}{library}"


@contextlib.contextmanager
def count_implementations() -> Iterator[Counter[str]]:
    """Count how often each implementation of a convolution is used by the programs traced inside the block.

    Yields:
        Counts by the description of the implementation, such as ``dense by Winograd``.
    """
    counts: Counter[str] = Counter()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def count_use(implementation: str) -> None:
    """Count one use of an implementation, see `count_implementations`."""
    counts = _counts.get()
    if counts is not None:
        counts[implementation] += 1


def active_implementation() -> str:
    """Return the implementation of convolutions and norms in a program that is traced: ``fast`` or ``reference``."""
    name = _requested.get()
    if name == "auto":
        return "fast" if jax.default_backend() == "cpu" else "reference"
    return "reference" if name in ("library", "sharded") else name


def requested_implementation() -> str:
    """Return the argument of the enclosing `use_implementation`; ``auto`` outside of such a block."""
    return _requested.get()
