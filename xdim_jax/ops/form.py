"""Which form of an operation a program is traced with."""

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
_taken: contextvars.ContextVar[Counter[str] | None] = contextvars.ContextVar("taken", default=None)


@contextlib.contextmanager
def use_form(form: str) -> Iterator[None]:
    """Forces a form for programs traced inside the block: ``fast``, ``reference``, or ``sharded``, for arrays whose
    spatial axes lie on several devices: ``reference``, but for what XLA could then only do by gathering whole arrays
    (``auto``: by platform)."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


def in_form(form: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function traced in a form; ``auto`` leaves the choice to where it is called."""
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
    """What the operations of a program are traced to on this platform, in a line."""
    with use_form(form):
        fast = active_form() == "fast"
    own = "Winograd and 2D convolutions, composed with upsampling, depthwise as shifted sums"
    convolution = own if fast else "the platform's convolutions"
    library = ", Eigen's threads" if compiler_options() else ""
    kind = "asked for" if form != "auto" else jax.default_backend()
    return f"{active_form() if form == 'auto' else form} ({kind}): {convolution}{library}; others as matrix products"


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each form of a convolution is taken by what is traced inside the block, by a few words."""
    taken: Counter[str] = Counter()
    token = _taken.set(taken)
    try:
        yield taken
    finally:
        _taken.reset(token)


def take(words: str) -> None:
    """Counts a form, see `counted`."""
    taken = _taken.get()
    if taken is not None:
        taken[words] += 1


def active_form() -> str:
    """The form of the convolutions in a program traced now: ``"fast"`` or ``"reference"``."""
    form = _form.get()
    if form == "auto":
        return "fast" if jax.default_backend() == "cpu" else "reference"
    return "reference" if form == "sharded" else form


def forced_form() -> str:
    """The form that `use_form` asks for, or ``"auto"``."""
    return _form.get()
