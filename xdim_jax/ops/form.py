"""The choice between the implementations of an operation while a program is traced.

The names of the choices (`FORMS`) are the values of ``config.train.ops``.
"""

import contextlib
import contextvars
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from xdim_jax.ops.compilation import compiler_options

FORMS = ("auto", "fast", "reference", "sharded")
_form: contextvars.ContextVar[str] = contextvars.ContextVar("form", default="auto")
_counts: contextvars.ContextVar[Counter[str] | None] = contextvars.ContextVar("counts", default=None)


@contextlib.contextmanager
def use_form(form: str) -> Iterator[None]:
    """Select the implementation of the operations in programs that are traced inside the block.

    Args:
        form: ``fast``; ``reference``; ``sharded``, for arrays whose spatial axes are distributed over several devices;
            or ``auto``, which is ``fast`` on CPU and ``reference`` elsewhere. ``sharded`` is ``reference`` except for
            the operations that XLA would compute by gathering whole arrays on each device.

    Raises:
        ValueError: The name is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


def in_form(form: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, traced with `use_form` of ``form``; ``auto`` keeps the choice of the caller."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if form == "auto":
        return function

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with use_form(form):
            return function(*arguments, **options)

    return traced


def describe_forms(form: str = "auto") -> str:
    """Describe the implementation of a program's operations on this platform, in one line for the log."""
    with use_form(form):
        fast = active_form() == "fast"
    own = "Winograd and 2D convolutions, composed with upsampling, depthwise as shifted sums"
    convolution = own if fast else "the platform's convolutions"
    library = ", Eigen's threads" if compiler_options() else ""
    kind = "requested" if form != "auto" else jax.default_backend()
    return f"{active_form() if form == 'auto' else form} ({kind}): {convolution}{library}; others as matrix products"


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
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
    """Count one use of an implementation, see `counted`."""
    counts = _counts.get()
    if counts is not None:
        counts[implementation] += 1


def active_form() -> str:
    """Return the implementation of convolutions in a program that is traced now: ``fast`` or ``reference``."""
    form = _form.get()
    if form == "auto":
        return "fast" if jax.default_backend() == "cpu" else "reference"
    return "reference" if form == "sharded" else form


def forced_form() -> str:
    """Return the value that `use_form` was called with; ``auto`` outside of such a block."""
    return _form.get()
