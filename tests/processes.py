"""Training runs of several processes on one machine, for test_devices and test_launch."""

import os
import time
from pathlib import Path

from xdim_jax.runs.records import STEPS_FILE, read_records

REPO = Path(__file__).parent.parent


def device_flags(count):
    """The variable ``XLA_FLAGS`` of a process with so many CPU devices, which compiles as these tests do."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()


def one_device_environment(root):
    """Environment variables of a process with one CPU device; the processes of a module share compiled programs."""
    return {
        "XLA_FLAGS": device_flags(1),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(root.parent / "cache"),
        "PYTHONPATH": str(REPO),
    }


def wait_for_step(workdir, processes, number, timeout=200):
    deadline = time.monotonic() + timeout
    while not any(r["step"] >= number for r in read_records(workdir, STEPS_FILE)):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
