"""Devices that this machine does not have, for which XLA can compile: GPUs, and slices of TPU pods.

Compilation for a GPU needs the package ``jax-cuda12-plugin`` (the extra ``cuda12``), and for a TPU the package
``libtpu`` (the extra ``tpu``); neither needs a driver. Programs are compiled but not run. The compiler reports the
memory of a program, except for what depends on measurements on the device: on GPUs, the choice of cuDNN algorithms and
their workspace.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xdim_jax.base.errors import UserError, first_line

_GPUS = Path(__file__).with_name("gpus.json")
_GPU_FRACTION = 0.75  # of the memory of a GPU that JAX allocates by default
# memory of a chip in GiB that programs can use, as reported by the compiler of libtpu 0.0.42
_TPU_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
_MEGACORE = ("v4", "v5p")  # kinds whose two cores are used as one device
# the memory that a program needs, in the compiler's message if it does not fit
_EXHAUSTED = re.compile(r"Used ([\d.]+)([MGT]) of")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices for which programs are compiled.

    Attributes:
        name: Name of the kind, such as ``h100`` or ``v5e``.
        title: Description for the log.
        platform: ``cuda`` or ``tpu``.
        devices: The devices; programs can be compiled for them, but not run.
        memory: Memory of a device in bytes that programs can use. On GPUs it is 75 % of the memory, which JAX allocates
            by default (``XLA_PYTHON_CLIENT_MEM_FRACTION``).
    """

    name: str
    title: str
    platform: str
    devices: tuple[Any, ...]
    memory: int

    @property
    def optimised(self) -> bool:
        """True if programs are optimised by default; for a TPU, optimisation takes several times longer."""
        return self.platform != "tpu"

    def caution(self, *, optimised: bool) -> str:
        """Return how the reported memory differs from that on the device, for programs with or without optimisation."""
        if self.platform == "cuda":
            return (
                "the memory does not include the workspace of cuDNN, whose algorithms are chosen by autotuning on the "
                "GPU itself"
            )
        if optimised:
            return "compiled with optimisation"
        return "compiled without optimisation, which overestimates the memory by up to a quarter"

    def one_device(self) -> NamedSharding:
        """Return the sharding of an array on the first device."""
        mesh = Mesh(np.asarray(self.devices[:1]), ("data",), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec())


def names() -> str:
    """Return the known targets as text."""
    chips = ", ".join(f"{kind}:<topology>" for kind in _TPU_GIB)
    return f"{', '.join(_read_gpus())} (with :N for N GPUs), {chips}, e.g. v5e:2x2"


def open_target(text: str) -> Target:
    """Return the devices for a text such as ``h100``, ``h100:8`` or ``v5e:2x2``.

    Raises:
        UserError: The name is unknown, the package of the compiler is not installed, or the topology does not exist.
    """
    kind, _, size = text.partition(":")
    if kind in _read_gpus():
        return _open_gpus(kind, size)
    if kind in _TPU_GIB:
        return _open_tpus(kind, size)
    raise UserError(f"--target={text} is unknown; known: {names()}")


def _read_gpus() -> dict[str, dict[str, Any]]:
    return json.loads(_GPUS.read_text(encoding="utf-8"))["gpus"]


def _open_gpus(kind: str, size: str) -> Target:
    if size and not (size.isascii() and size.isdigit() and int(size)):
        raise UserError(f"--target={kind}:{size}: expected the number of GPUs, e.g. {kind}:8")
    gpu, count = _read_gpus()[kind], int(size or 1)
    options = {"topology": f"1x1x{count}", "target_config": gpu_description(gpu)}
    devices = _topology(f"{kind}:{count}", "cuda", "", options, "cuda12")
    return Target(kind, f"{count} x {gpu['name']}", "cuda", devices, int(_GPU_FRACTION * gpu["memory"]))


def gpu_description(gpu: dict[str, Any]) -> str:
    """Return the description of a GPU for the compiler, a ``GpuTargetConfigProto`` in text format."""
    major, minor = gpu["capability"]
    values = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu["shared_per_core"],
        "threads_per_core_limit": gpu["threads_per_core"],
        "core_count": gpu["cores"],
        "fpus_per_core": gpu["fpus_per_core"],
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": gpu["bandwidth"],
        "l2_cache_size": gpu["l2"],
        "clock_rate_ghz": gpu["ghz"],
        "device_memory_size": gpu["memory"],
        "shared_memory_per_block_optin": gpu["shared_per_block"],
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in values.items())
    return (
        f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
        "runtime_version { major: 12 minor: 9 patch: 0 }\n"
        f'device_description_str: "{gpu["name"]}"\n'
    )


def _open_tpus(kind: str, size: str) -> Target:
    if not re.fullmatch(r"\d+(x\d+){1,2}", size):
        example = "2x2x1" if kind in _MEGACORE else "2x2"
        given = f"{kind}:{size}" if size else kind
        raise UserError(f"--target={given}: expected a topology, e.g. {kind}:{example}, or {kind}:1x1 for a chip")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    single = set(size.split("x")) == {"1"}
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    if kind in _MEGACORE:
        options["chip_config_name"] = "megacore"
    devices = _topology(f"{kind}:{size}", "tpu", f"{kind}:{size}", options, "tpu")
    return Target(kind, f"{len(devices)} x TPU {kind}", "tpu", devices, int(_TPU_GIB[kind] * 2**30))


def _topology(text: str, platform: str, name: str, options: dict[str, Any], extra: str) -> tuple[Any, ...]:
    try:
        named = {"topology_name": name} if name else {}
        found = topologies.get_topology_desc(platform=platform, **named, **options)
    except Exception as error:  # JAX raises different errors for a missing plugin and for a wrong topology
        if isinstance(error, NotImplementedError) or re.search("not installed|not implemented", str(error)):
            raise UserError(
                f"--target={text} needs the compiler for {platform}: pip install 'xdim_jax[{extra}]' "
                f"({first_line(error)})"
            ) from error
        raise UserError(f"--target={text} does not exist: {first_line(error)}") from error
    return tuple(found.devices)


@contextlib.contextmanager
def without_optimisation(active: bool) -> Iterator[None]:
    """Compile programs in the block without optimisation, which is three to five times faster for a TPU."""
    before = jax.config.jax_optimization_level  # pyright: ignore[reportAttributeAccessIssue]
    if active:
        jax.config.update("jax_optimization_level", "O0")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def exhausted_bytes(error: Exception) -> int | None:
    """Return the memory in bytes that a program needs, from the compiler's error.

    It is 2**62 if the error does not state it, and None for an error of another kind.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    if re.search(r"memory space (?!hbm)\w+", text):  # another memory than HBM is exhausted
        return 2**62
    match = _EXHAUSTED.search(text)
    return int(float(match[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[match[2]]) if match else 2**62


def describe_kernels(counts: dict[str, int], shown: int = 6) -> str:
    """Return the most frequent kernels as text."""
    parts: Sequence[str] = [f"{n} {name}" for name, n in list(counts.items())[:shown]]
    return ", ".join(parts) or "none"
