"""Checks of a machine: versions, devices, memory, compilation cache, operations, precision, reading, training step."""

import dataclasses
import importlib.metadata
import itertools
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.command import explain
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import first_line, gib
from xdim_jax.base.host import memory_bytes
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import environment

OK, WARNING, FAILURE = "ok", "warning", "failure"
EXTRAS = {
    "port": ("torch", "timm"),
    "sweep": ("optuna", "psycopg"),
    "cloud": ("gcsfs", "s3fs"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
_READ_SECONDS = 5.0  # the check of reading ends after this time
_STEP_SECONDS = 10.0  # duration of the training steps, without compilation
_PATCH = (32, 32, 64)  # patch of the training steps


@dataclasses.dataclass
class Finding:
    """The result of a check.

    Attributes:
        check: Name of the check.
        status: ``ok``; ``warning`` if everything works but could be better; ``failure`` if something does not work.
        text: The result in words.
        advice: What to do; empty if the status is ``ok``.
        facts: The numbers and names in the text, by key, for the JSON output.
    """

    check: str
    status: str
    text: str
    advice: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def examine(checks: Sequence[Callable[[], Finding]]) -> Iterator[Finding]:
    """Run checks, and yield their findings. An exception in a check becomes a failure of this check only."""
    explained: dict[str, str] = {}  # message -> name of the check that failed first with it
    for check in checks:
        try:
            yield check()
        except Exception as error:
            name = getattr(check, "__name__", "check").strip("<>")
            name = "reading" if name == "lambda" else name.replace("training_step", "step")
            text, advice = explain(error), ""
            if text is None:
                text = f"{type(error).__name__}: {first_line(error)}"
                advice = "this check should work on every machine; please report it with the output of --json"
            elif explained.setdefault(text, name) != name:
                text = f"for the same reason as {explained[text]}"
            yield Finding(name, FAILURE, text, advice)


def verdict(findings: Sequence[Finding]) -> str:
    """Return a line of text: whether the machine is ready, and which checks have failed or have a warning."""
    failed = [f.check for f in findings if f.status == FAILURE]
    warned = [f.check for f in findings if f.status == WARNING]
    if failed:
        return f"not ready: {', '.join(failed)}"
    return "ready" + (f"; warnings: {', '.join(warned)}" if warned else "")


def versions() -> Finding:
    """Check the versions of Python, the packages and the extras."""
    found = environment.versions()
    python = sys.version.split()[0]
    facts = {"python": python, "packages": found, "extras": {k: _installed(v) for k, v in EXTRAS.items()}}
    extras = [name for name, installed in facts["extras"].items() if installed]
    text = f"Python {python}, jax {found['jax']}, flax {found['flax']}, xdim_jax {found['xdim_jax']}; extras: " + (
        ", ".join(extras) or "none"
    )
    if found["jax"] != found["jaxlib"]:
        return Finding(
            "versions", FAILURE, f"jax {found['jax']} does not match jaxlib {found['jaxlib']}", _INSTALL, facts
        )
    missing = [name for name, version in found.items() if version == "not installed" and name != "xdim_jax"]
    if missing:
        return Finding("versions", FAILURE, f"not installed: {', '.join(missing)}", _INSTALL, facts)
    return Finding("versions", OK, text, facts=facts)


_CONSTRAINTS = "constraints-newest.txt" if sys.version_info >= (3, 12) else "constraints.txt"
_INSTALL = f"install the versions that were tested together: pip install -c {_CONSTRAINTS} ."


def _installed(names: Sequence[str]) -> bool:
    """Return whether all packages are installed."""
    try:
        return all(importlib.metadata.version(name) for name in names)
    except importlib.metadata.PackageNotFoundError:
        return False


def devices() -> Finding:
    """Check the devices that JAX uses."""
    import jax

    text = environment.devices()
    facts = {"devices": text, "platform": jax.default_backend(), "count": jax.device_count()}
    accelerators = {"/dev/nvidiactl": "cuda12", "/dev/accel0": "tpu"}  # device file -> extra that supports it
    for path, extra in accelerators.items():
        if jax.default_backend() == "cpu" and Path(path).exists():
            advice = f"pip install 'xdim_jax[{extra}]', and check that JAX_PLATFORMS is not set to cpu"
            return Finding("devices", WARNING, f"{text}, but this machine has an accelerator", advice, facts)
    return Finding("devices", OK, text, facts=facts)


def memory() -> Finding:
    """Check the memory of the host and of a device, and the free space of the disk."""
    import jax

    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    free = shutil.disk_usage(Path.cwd()).free
    host = memory_bytes()
    facts = {"host_bytes": host, "device_bytes": limit, "disk_free_bytes": free}
    text = (
        f"{gib(host)} on the host, "
        + (f"{gib(limit)} per device, " if limit else "")
        + f"{gib(free)} free on the disk of this folder"
    )
    if free < 5 * 2**30:
        return Finding("memory", WARNING, text, "checkpoints and prepared cases need space: use another disk", facts)
    if host < 8 * 2**30:
        advice = "python -m xdim_jax.plan shows how much a recipe needs; a smaller --config.data.patch needs less"
        return Finding("memory", WARNING, text, advice, facts)
    return Finding("memory", OK, text, facts=facts)


def cache() -> Finding:
    """Check the cache of compiled programs."""
    import jax

    cache_programs()
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not folder:
        advice = "XDIM_JAX_CACHE=off is set: unset it, so that programs are compiled only once"
        return Finding("cache", WARNING, "compiled programs are not kept", advice, {"folder": None})
    path = Path(folder)
    files = [p for p in path.glob("*") if p.is_file()] if path.is_dir() else []
    facts = {"folder": folder, "programs": len(files), "bytes": sum(p.stat().st_size for p in files)}
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".doctor{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        advice = "every start compiles all programs; set XDG_CACHE_HOME to a folder that you can write to"
        return Finding("cache", WARNING, f"{folder} cannot be written ({error.strerror})", advice, facts)
    return Finding("cache", OK, f"{folder}: {len(files)} files, {gib(facts['bytes'])}", facts=facts)


def operations() -> Finding:
    """Check which implementation of the operations is used on this machine, see `xdim_jax.ops`."""
    import jax

    from xdim_jax import ops

    text = ops.describe_implementation()
    facts = {"implementation": ops.active_implementation(), "compiler_options": ops.compiler_options()}
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if jax.default_backend() == "cpu" and huge.is_file() and "[never]" in huge.read_text(encoding="ascii"):
        advice = f"huge pages are off, which makes steps about 10 % slower: write madvise to {huge}"
        return Finding("operations", WARNING, text, advice, facts)
    return Finding("operations", OK, text, facts=facts)


def precision() -> Finding:
    """Check the accuracy of bfloat16 products, and measure their speed."""
    import jax
    import jax.numpy as jnp

    side = 1024 if jax.default_backend() == "cpu" else 8192
    seconds = {}
    for kind in (jnp.float32, jnp.bfloat16):
        a = jax.random.normal(jax.random.key(0), (side, side), kind)
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        seconds[jnp.dtype(kind).name] = min(
            _timed(lambda f=product, a=a: f(a, a).block_until_ready()) for _ in range(3)
        )
    small = jax.random.normal(jax.random.key(1), (64, 64))
    exact = jnp.matmul(small, small, precision="highest")
    error = float(
        jnp.abs((small.astype(jnp.bfloat16) @ small.astype(jnp.bfloat16)) - exact).max() / jnp.abs(exact).max()
    )
    speed = seconds["float32"] / seconds["bfloat16"]
    rate = {name: 2 * side**3 / s / 1e12 for name, s in seconds.items()}
    facts = {"tflops": rate, "bfloat16_speed": speed, "bfloat16_error": error}
    text = f"float32 {rate['float32']:.2g} TFLOP/s, bfloat16 {rate['bfloat16']:.2g} (products of {side} x {side})"
    if not error < 0.05:
        return Finding("precision", FAILURE, f"bfloat16 products have an error of {error:.1%}", "use float32", facts)
    if speed > 1.3:
        return Finding("precision", OK, f"{text}; --config.train.precision=bfloat16 is faster", facts=facts)
    return Finding("precision", OK, f"{text}; float32, the default, is the better choice", facts=facts)


def _timed(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def reading(folder: Path) -> Finding:
    """Measure how fast the files of a folder are read."""
    if not folder.is_dir():
        return Finding("reading", FAILURE, f"--data={folder} is not a folder", "give the folder of your data")
    begin, count, total = time.perf_counter(), 0, 0
    files = itertools.islice((p for p in folder.rglob("*") if p.is_file()), 100_000)
    for path in files:
        try:
            with open(path, "rb") as file:
                while (chunk := file.read(2**22)) and time.perf_counter() - begin < _READ_SECONDS:
                    total += len(chunk)
        except OSError as error:
            return Finding("reading", FAILURE, f"{path} cannot be read ({error.strerror})", "check its permissions")
        count += 1
        if time.perf_counter() - begin > _READ_SECONDS:
            break
    seconds = time.perf_counter() - begin
    if not count:
        return Finding("reading", FAILURE, f"{folder} contains no files", "give the folder of your data")
    rate = total / seconds
    facts = {"folder": str(folder), "files": count, "bytes": total, "seconds": seconds, "bytes_per_second": rate}
    text = f"{folder}: {count} files, {rate / 1e6:.0f} MB/s (files that were read recently may be cached)"
    if rate < 20e6 and total > 20e6:
        advice = "slow: prepare the cases on a local disk with python -m xdim_jax.data prepare --store=<folder>"
        return Finding("reading", WARNING, text, advice, facts)
    return Finding("reading", OK, text, facts=facts)


def _small_config() -> Config:
    """Return the config of a small DX-Net without stochastic depth."""
    overrides = {
        "model.encoder.name": "efficientnet_toy",
        "model.encoder.drop_path": 0.0,
        "model.filters": "(16,16,8,8,8)",
        "data.patch": str(_PATCH).replace(" ", ""),
        "data.batch": 1,
    }
    return load_config("brats_dxnet:phantom", [f"--config.{key}={value}" for key, value in overrides.items()])


def _random_batch() -> dict[str, Any]:
    """Return a batch with one random sample."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((1, *_PATCH, 4), np.float32),
        "label": rng.integers(0, 4, (1, *_PATCH), np.uint8),
        "key": rng.integers(0, 2**32, (1, 2), np.uint32),
    }


def training_step() -> Finding:
    """Train a small DX-Net for ten seconds, and compare its first step with the reference implementation.

    The step must compile, its loss must fall, and its first loss and gradient norm must be those of the
    reference implementation.
    """
    import jax

    from xdim_jax import ops
    from xdim_jax.training.check import resolve_config
    from xdim_jax.training.mesh import make_devices
    from xdim_jax.training.program import make_program

    config, dataset = resolve_config(_small_config())
    mesh = make_devices(1, 1, batch=1)
    batch = mesh.put_batch(_random_batch())
    norms = {}
    begin = time.perf_counter()
    for name in ("reference", "auto"):
        config.train.ops = name
        program, params, stats = make_program(config, dataset, per_epoch=1)
        state = mesh.put_state(program.init(params, stats))
        key = mesh.put_state(jax.random.key(0))
        step = ops.compile_program(mesh.lower(program.step, state, batch, key))
        state, metrics = step(state, batch, key)
        norms[name] = [float(metrics[k]) for k in ("loss", "grad_norm")]
    compiled = time.perf_counter() - begin
    times: list[float] = []
    end = time.perf_counter() + _STEP_SECONDS
    while time.perf_counter() < end and len(times) < 1000:
        start = time.perf_counter()
        state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    difference = max(abs(a - b) / abs(b) for a, b in zip(norms["auto"], norms["reference"], strict=True))
    loss = float(metrics["loss"])
    facts = {"compile_s": compiled, "steps": len(times), "median_s": statistics.median(times), "loss": loss}
    facts |= {"first_loss": norms["auto"][0], "apart": difference}
    text = (
        f"small DX-Net, {'x'.join(map(str, _PATCH))}: {1000 * facts['median_s']:.0f} ms per step over {len(times)} "
        f"steps, loss {norms['auto'][0]:.3f} to {loss:.3f}; two programs compiled in {compiled:.0f} s"
    )
    if not (math.isfinite(loss) and difference < 1e-3):
        text = (
            f"loss or gradient norm differs by {difference:.1%} from the reference implementation"
            if math.isfinite(loss)
            else "the loss is not finite"
        )
        advice = "--config.train.ops=reference avoids it; please report it with the output of --json"
        return Finding("step", FAILURE, text, advice, facts)
    if not loss < norms["auto"][0]:
        advice = "please report it with the output of --json"
        return Finding("step", FAILURE, f"{text}: the loss does not fall", advice, facts)
    return Finding("step", OK, text, facts=facts)
