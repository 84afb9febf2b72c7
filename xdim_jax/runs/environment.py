"""What a program runs on: versions, devices, machine. For records, so that a number can be traced to what made it."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json

FILE = "environment.json"  # in the workdir of a run: one entry for every start
PACKAGES = ("xdim_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "nibabel")


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
            found[name] = "not installed"
    return found


def describe() -> dict[str, Any]:
    """Versions, interpreter, machine and the devices of JAX, which is started by this."""
    import jax

    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "devices": devices(),
        "processes": jax.process_count(),
    }


def devices() -> str:
    """``8 x NVIDIA H100 (gpu)``: those of all processes, as JAX names them."""
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"


def record_start(workdir: Path, step: int) -> None:
    """Adds an entry to the run's file."""
    write_json(workdir / FILE, [*read_starts(workdir), {"step": step, **describe()}])


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The entries of a run's file; none for a run without one, or with one that is damaged."""
    try:
        entries = read_json(workdir / FILE)
    except (OSError, UserError):
        return []
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
