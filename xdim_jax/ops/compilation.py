"""Compilation: XLA options, the persistent compilation cache, and memory that a compiled program needs."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from xdim_jax.base.files import cache_folder

# -- the process --------------------------------------------------------------------------------------------------


def cache_programs() -> None:
    """Turns on the persistent compilation cache; call before the first JAX computation.

    It lies under the user's cache folder (``JAX_COMPILATION_CACHE_DIR`` moves it, and
    ``XDIM_JAX_CACHE=off`` turns it off), parted by processor, because CPU programs hold its instructions.
    """
    import jax

    if os.environ.get("XDIM_JAX_CACHE") != "off" and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla" / _processor_key()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor_key() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Options that every program of the networks is compiled with.

    On CPU jaxlib 0.10 hands convolutions to YNNPACK, which runs those of few channels on one thread; without it they go
    to Eigen, which takes all. Sums over space stay with it: there it is ten times faster than XLA's own loops.
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


def needed_bytes(compiled: Any) -> int:
    """Arguments, results that do not lie in arguments, temporaries and code, per device."""
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + results + m.temp_size_in_bytes + m.generated_code_size_in_bytes
