"""Which form of an operation a program is traced with."""

import contextlib
import contextvars
import ctypes
import functools
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

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


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Options that every program of the networks is compiled with.

    On CPU jaxlib 0.10 hands convolutions to YNNPACK, which runs those of few channels on one thread; without it they go
    to Eigen, which takes all. Sums over space stay with it: there it is ten times faster than XLA's own loops. jaxlib
    0.12 runs more of them on all threads, but a step of DX-Net is still faster without, and takes less memory.
    """
    if jax.default_backend() != "cpu":
        return {}
    kinds = ("REDUCE", "INDIVIDUAL_DOT")
    options = {"xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except Exception:  # a jaxlib that does not know the option has its own way
        return {}
    return options


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Trace and lower a program inside the block: a third faster without the garbage collector, as tracing makes much
    and leaves little to collect."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def compile_program(lowered: Any) -> Any:
    """Compiles with `compiler_options`, and gives the memory that the compiler leaves free back to the system.

    A training step leaves half a GiB to one and a half. Beside the program's own arrays that would count for as long as
    the process lives.
    """
    compiled = lowered.compile(compiler_options=compiler_options())
    if glibc := _glibc():
        glibc.malloc_trim(0)
    return compiled


def keep_freed_memory() -> None:
    """On CPU, what a program frees stays with the process from now on: for a step that is taken over and over.

    XLA asks for a step's temporaries anew each time, in one piece; glibc would hand them back to the kernel at its end,
    which fills them with zeros before the next: a tenth of a step of DX-Net at 64^3. The peak stays what it is.
    """
    if jax.default_backend() == "cpu" and (glibc := _glibc()):
        mmap_max, trim_threshold = -4, -1  # of mallopt(3)
        glibc.mallopt(mmap_max, 0)
        glibc.mallopt(trim_threshold, -1)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None
