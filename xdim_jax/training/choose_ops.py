"""Choose the implementation of the operations by measurement, on GPUs and TPUs.

With ``train.ops=auto``, the first run of a program on a GPU or TPU compiles its training step with each of
`CANDIDATES`, measures the time of a step, and uses the fastest. The choice is recorded in the workdir, and in the cache
folder by program, devices and versions. A run that finds a record uses its choice, so both runs compute with the
same operations. On a CPU, the implementation ``fast`` is used without a measurement, because it was fastest in all
measurements (docs/performance.md).
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax import ops
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import cache_folder, read_json, write_json
from xdim_jax.base.log import say, warn
from xdim_jax.runs import environment
from xdim_jax.training import mesh
from xdim_jax.training.compiling import compile_step
from xdim_jax.training.mesh import SPACE, Devices
from xdim_jax.training.signature import signature

CANDIDATES = ("library", "reference", "fast")
FILE = "ops.json"  # in the workdir of a run
_STEPS = 3  # number of measured steps, after one that is not measured


def is_measured(setting: str, devices: Devices) -> bool:
    """Return whether the implementation is chosen by measurement.

    Args:
        setting: ``train.ops`` of the config.
        devices: Devices of the run. If volumes are distributed over devices, only one implementation exists.
    """
    return setting == "auto" and jax.default_backend() != "cpu" and devices.mesh.shape[SPACE] == 1


def program_key(config: Config, devices: Devices) -> str:
    """Return a digest of all that affects the speed of a training step: program, devices, and versions."""
    described = {
        "program": signature(config),
        "devices": environment.devices(),
        "mesh": [*devices.mesh.shape.items(), devices.parallel, jax.process_count()],
        "versions": [jax.__version__, jax.devices()[0].client.platform_version, *environment.versions().items()],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def compile_fastest(
    workdir: Path, key: str, devices: Devices, step: Callable[..., Any], state: Any, batch: Any, rng: Any
) -> Any:
    """Compile a training step with the recorded implementation, or, without a record, with the fastest one.

    Every process of a run must call this function. All of them use the same implementation.

    Args:
        workdir: Folder of the run.
        key: Result of `program_key`.
        devices: Devices of the run.
        step: Training step, see `xdim_jax.training.step.make_train_step`.
        state: Training state. It is copied for the measurement. An implementation is not measured if the memory does
            not suffice for two states.
        batch: Batch on the devices.
        rng: Random key of the run.

    Returns:
        The compiled step.
    """

    def compile_with(name: str) -> Any:
        # a new function for each name, because JAX would reuse the trace of another one
        return compile_step(devices.lower, ops.with_implementation(name, step), state, batch, rng)

    found = _read(workdir / FILE, key) or _read(_cache_file(key), key)
    name = _from_first_process(found["implementation"] if found else None)
    if name is not None:
        say(f"operations {name}, as chosen by an earlier measurement")
        _record(found, workdir, key)
        return compile_with(name)
    compiled, seconds = {}, {}
    for name in CANDIDATES:
        say(f"operations {name} is measured")
        compiled[name], seconds[name] = _try(compile_with, name, devices, state, batch, rng)
    best = min(seconds, key=lambda name: seconds[name])
    if math.isinf(seconds[best]):  # a measurement needs a second state, which training does not
        warn(f"operations {CANDIDATES[0]} is used, without a measurement; select another one with --config.train.ops")
        return compiled[CANDIDATES[0]] or compile_with(CANDIDATES[0])
    measured = {name: s if math.isfinite(s) else None for name, s in seconds.items()}
    times = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in measured.items() if s is not None)
    say(f"operations {best} is used; time of a training step: {times}")
    _record({"implementation": best, "seconds": measured, "key": key}, workdir, key)
    return compiled[best]


def _try(
    compile_with: Callable[[str], Any], name: str, devices: Devices, state: Any, batch: Any, rng: Any
) -> tuple[Any, float]:
    """Return the compiled step and its time in seconds, the maximum over all processes; infinite if it fails."""
    compiled, seconds, failed = None, math.inf, False
    try:
        compiled = compile_with(name)
    except jax.errors.JaxRuntimeError as error:  # not supported by the compiler, or too large for it
        failed = True
        warn(f"operations {name} cannot be compiled: {first_line(error)}")
    if not mesh.agree(failed):  # a process that runs the step waits for the others
        try:
            seconds = _seconds(compiled, devices, state, batch, rng)
        except jax.errors.JaxRuntimeError as error:
            warn(f"operations {name} cannot be measured: {first_line(error)}")
    return compiled, float(mesh.gather(np.array(seconds, np.float32)).max())


def _seconds(compiled: Any, devices: Devices, state: Any, batch: Any, rng: Any) -> float:
    """Return the shortest of `_STEPS` measured times of a compiled step in seconds. ``state`` is copied."""
    own, metrics = compiled(devices.put_state(state), batch, rng)
    jax.block_until_ready(metrics)
    times = []
    for _ in range(_STEPS):
        begin = time.perf_counter()
        own, metrics = compiled(own, batch, rng)
        jax.block_until_ready((own, metrics))
        times.append(time.perf_counter() - begin)
    return min(times)


def _from_first_process(name: str | None) -> str | None:
    """Return the name that process 0 has."""
    number = CANDIDATES.index(name) if name in CANDIDATES else -1
    chosen = int(mesh.gather(np.array(number))[0])
    return CANDIDATES[chosen] if chosen >= 0 else None


def _cache_file(key: str) -> Path | None:
    """Return the file of a program in the cache folder; None if the cache is disabled."""
    return None if os.environ.get("XDIM_JAX_CACHE") == "off" else cache_folder() / "ops" / f"{key}.json"


def _read(path: Path | None, key: str) -> dict[str, Any] | None:
    """Return a record of this program; None if there is none, or if it is damaged."""
    if path is None:
        return None
    try:
        record = read_json(path)
    except (UserError, OSError):
        return None
    usable = isinstance(record, dict) and record.get("key") == key and record.get("implementation") in CANDIDATES
    return record if usable else None


def _record(record: dict[str, Any] | None, workdir: Path, key: str) -> None:
    """Write the record to the workdir and to the cache folder, in process 0."""
    if record is None or jax.process_index() != 0:
        return
    write_json(workdir / FILE, record)
    path = _cache_file(key)
    if path is None:
        return
    try:
        write_json(path, record)
    except UserError as error:
        warn(f"the choice of operations cannot be cached, so the next run measures again: {error}")
