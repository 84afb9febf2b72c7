"""Compilation: the persistent cache, XLA options, and the memory that compiling and running programs need."""

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


def cache_programs() -> None:
    """Enable the persistent compilation cache. Call this before the first JAX computation.

    The cache is in the user's cache folder. ``JAX_COMPILATION_CACHE_DIR`` selects another folder, and
    ``XDIM_JAX_CACHE=off`` disables the cache. Every kind of processor has its own subfolder, because compiled CPU
    programs contain instructions that another processor may lack.
    """
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
    """Return the compiler options for all programs that contain a network.

    On CPU, jaxlib 0.10 computes convolutions with YNNPACK, which uses one thread if there are few channels. These
    options make XLA compute them with Eigen, which uses all threads. Reductions and matrix products are still computed
    with YNNPACK, whose sums over space are ten times faster than XLA's own loops. With jaxlib 0.12, YNNPACK uses more
    threads, but a step of DX-Net is still faster with Eigen and needs less memory (docs/performance.md).

    With jaxlib 0.10, the older emitters of fused kernels replace the newer ones, which are XLA's default. The older
    ones need less time and memory to compile, and their training steps are faster. Later versions cannot select them.
    """
    if jax.default_backend() != "cpu":
        return {}
    kinds = ("REDUCE", "INDIVIDUAL_DOT")
    options: dict[str, Any] = {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)
    }
    if jax.__version_info__ < (0, 11):
        options["xla_cpu_use_fusion_emitters"] = False
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except Exception:  # this jaxlib does not have the option
        return {}
    return options


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable Python's garbage collector inside the block, for tracing and lowering a program.

    This makes tracing a third faster, because tracing creates many objects, few of which can be collected.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def compile_program(lowered: Any) -> Any:
    """Compile a lowered program with `compiler_options`, and return the compiler's memory to the operating system.

    The compiler frees its memory, but without this function glibc would keep it in the process: 0.5 to 1.5 GiB for a
    training step, in addition to the arrays of the program.
    """
    compiled = lowered.compile(compiler_options=compiler_options())
    if glibc := _glibc():
        glibc.malloc_trim(0)
    return compiled


def keep_freed_memory() -> None:
    """On CPU, reuse freed memory from now on instead of returning it to the operating system.

    Call this before a step that is repeated many times. XLA allocates the temporaries of every step in one block. By
    default, glibc returns the block to the operating system after each step, and the operating system fills a new block
    with zeros before the next step. This takes a tenth of a step of DX-Net at 64^3. The peak memory does not change.
    """
    if jax.default_backend() == "cpu" and (glibc := _glibc()):
        mmap_max, trim_threshold = -4, -1  # parameters of mallopt(3)
        glibc.mallopt(mmap_max, 0)
        glibc.mallopt(trim_threshold, -1)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def needed_bytes(compiled: Any) -> int:
    """Return the memory in bytes that a compiled program needs on each device.

    It is the sum of the arguments, the temporaries, the code, and the results that do not reuse memory of arguments.
    """
    m = compiled.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + results + m.temp_size_in_bytes + m.generated_code_size_in_bytes
