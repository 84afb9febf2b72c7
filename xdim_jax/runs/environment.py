"""Description of the environment of a run: package versions, devices and machine."""

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json
from xdim_jax.base.host import count_cores

FILE = "environment.json"  # in the workdir of a run, with one entry for every start
PACKAGES = ("xdim_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "nibabel")


def versions() -> dict[str, str]:
    """Return the versions of the packages on which results depend."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            found[name] = "not installed"
    return found


def describe() -> dict[str, Any]:
    """Return versions, interpreter, machine, and the devices of JAX. This initialises JAX."""
    import jax

    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {count_cores()} cores",
        "devices": devices(),
        "processes": jax.process_count(),
    }


def devices() -> str:
    """Return the devices of all processes as text, such as ``8 x NVIDIA H100 (gpu)``."""
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"


def record_start(workdir: Path, step: int) -> None:
    """Append the current environment to `FILE` of a run.

    Args:
        workdir: Folder of the run.
        step: Number of completed steps at this start.
    """
    write_json(workdir / FILE, [*read_starts(workdir), {"step": step, **describe()}])


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Return the entries of `FILE` of a run; an empty list if the file is missing or damaged."""
    try:
        entries = read_json(workdir / FILE)
    except (OSError, UserError):
        return []
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
