"""Test and measure our networks on a GPU, with one command.

    python benchmarks/gpu.py [--networks=dxnet:128@4,dsnet:128@4] [--rounds=5] [--out=runs/gpu] [--rehearse]

1. Correctness: logits, loss, gradient and running statistics of small cases are compared between the device and the
   CPU, which uses another implementation of the operations. The device computes in float32 (with full precision of
   products) and in bfloat16, the CPU in float32. If they differ too much, nothing else is measured.
2. Ceilings: peak rates of the device, measured with one large matrix product and with an addition to one large array.
3. Comparison: benchmarks/compare.py in bfloat16, with PyTorch in both memory layouts, with and without torch.compile.
4. Profile: time of each part of the network in a training step, compared with a lower bound at the measured peak rates
   (`xdim_jax.training.roofline`), and the slowest operations.

Writes gpu.json, gpu.md and compare/ to --out. --rehearse runs everything on a CPU with small sizes, in a few minutes.
"""

import argparse
import collections
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import sides
from xdim_jax import ops
from xdim_jax.base.files import write_json, write_text
from xdim_jax.nets import networks
from xdim_jax.nets.functional import PRECISIONS
from xdim_jax.runs.state import init_state
from xdim_jax.training.loss import make_loss
from xdim_jax.training.roofline import Product, find_products, is_backward, part_of
from xdim_jax.training.step import make_train_step

ROOT = Path(__file__).resolve().parents[1]
CHECKED = "omnia_b0:64@2,omnia_b4:64@2,dxnet:64@1,dsnet:64@1"  # cases of step 1
# precision -> largest allowed error of logits, loss and statistics, relative to the largest value; and of the gradient,
# relative to its norm
LIMITS = {"float32": (1e-3, 1e-2), "bfloat16": (0.2, 0.5)}
_SHOWN = 15  # number of slowest operations in the report


def main() -> int:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", default="dxnet:128@4,dsnet:128@2,omnia_b0:256@8,omnia_b4:512@2")
    add("--checked", default=CHECKED, help="comma-separated cases of step 1")
    add("--sides", default="ours,torch,torch-cl,torch-compile,torch-cl-compile")
    add("--rounds", type=int, default=5)
    add("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    add("--rehearse", action="store_true", help="run on a CPU with small sizes")
    add("--out", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.rehearse:
        print(
            f"the device is a {device.platform}: install xdim_jax[cuda12] on a machine with a GPU, or give --rehearse"
        )
        return 2
    if options.rehearse:
        options.networks, options.checked, options.rounds = "omnia_b0:64@2", "omnia_b0:64@2", 1
        options.sides = "ours,torch,torch-cl"
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}

    record["correct"] = [
        row for case in options.checked.split(",") for row in check(case, list(LIMITS)[: 1 if options.rehearse else 2])
    ]
    for row in record["correct"]:
        print(f"correct    {row}")
    write_results(options.out, record)
    if not all(row["holds"] for row in record["correct"]):
        print("failed     the values differ too much, see above; nothing was timed")
        return 1

    record["ceilings"] = measure_ceilings(small=options.rehearse)
    print(f"ceilings   {record['ceilings']['flops'] / 1e12:.1f} TFLOP/s, {record['ceilings']['bytes'] / 1e9:.0f} GB/s")
    write_results(options.out, record)

    compared = options.out / "compare"
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), f"--networks={options.networks}"]
    command += [f"--sides={options.sides}", f"--rounds={options.rounds}", f"--precision={options.precision}"]
    subprocess.run([*command, f"--out={compared}"], check=True, cwd=ROOT)
    record["compare"] = json.loads((compared / "results.json").read_text())["rows"]
    write_results(options.out, record)

    record["profiles"] = {}
    for case in options.networks.split(","):
        record["profiles"][case] = profile(case, options.precision, record["ceilings"])
        write_results(options.out, record)
    print((options.out / "gpu.md").read_text())
    return 0


# -- correctness --------------------------------------------------------------------------------------------------


def check(name: str, precisions: Sequence[str]) -> list[dict[str, Any]]:
    """Compare the values of a training step on the device with those on the CPU, for each precision."""
    case = sides.find_case(name)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = _values(case, "float32", "fast")
    rows = []
    for precision in precisions:
        full = jax.default_matmul_precision("highest") if precision == "float32" else contextlib.nullcontext()
        with full:
            found = _values(case, precision, "reference" if jax.default_backend() == "cpu" else "auto")
        errors = {key: _distance(found[key], expected[key], key) for key in expected}
        values, gradient = LIMITS[precision]
        holds = all(error < (gradient if key == "gradient" else values) for key, error in errors.items())
        rows.append({"case": name, "precision": precision, **errors, "holds": holds})
    return rows


def _values(case: sides.Case, precision: str, form: str) -> dict[str, Any]:
    """Return logits in evaluation mode, and loss, gradient and new statistics of a training step."""
    with ops.use_implementation(form):
        config, program, params, stats = sides.make_our_program(case, precision)
        image, label = sides.make_data(case)
        logits = jax.jit(lambda *a: program.forward(*a))((params, stats), jnp.asarray(image))
        keep_gradient = optax.GradientTransformation(
            lambda p: p, lambda grads, _, __=None: (jax.tree.map(jnp.zeros_like, grads), grads)
        )
        output = program.output
        loss = make_loss(config.loss, output.activation, len(output.channels))
        step = make_train_step(program.graphdef, loss, output, keep_gradient, dtype=PRECISIONS[precision])
        batch = {"image": jnp.asarray(image), "label": jnp.asarray(label)}
        state, metrics = jax.jit(step)(init_state(params, stats, keep_gradient), batch, jax.random.key(0))
    return jax.device_get(
        {"logits": logits, "loss": metrics["loss"], "gradient": state.opt_state, "stats": state.stats}
    )


def _distance(found: Any, expected: Any, key: str) -> float:
    """Return the norm of the difference over the norm for gradients; otherwise, the same with the largest value."""
    found, expected = (
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(t)]) for t in (found, expected)
    )
    if key == "gradient":
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# -- ceilings -----------------------------------------------------------------------------------------------------


def measure_ceilings(*, small: bool = False) -> dict[str, float]:
    """Return the operations per second of a bfloat16 matrix product, and the bytes per second of an addition."""
    n, length = (512, 2**22) if small else (8192, 2**29)
    a = jnp.ones((n, n), jnp.bfloat16)
    x = jnp.ones((length,), jnp.bfloat16)
    product = seconds(jax.jit(lambda a: a @ a), a)
    add = seconds(jax.jit(lambda x: x + 1), x)
    return {"flops": 2 * n**3 / product, "bytes": 2 * 2 * length / add}


def seconds(run: Callable[..., Any], *arguments: Any, times: int = 10) -> float:
    """Return the median wall time of a call."""
    jax.block_until_ready(run(*arguments))
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        found.append(time.perf_counter() - begin)
    return float(np.median(found))


# -- profile ------------------------------------------------------------------------------------------------------


def profile(name: str, precision: str, ceilings: dict[str, float], steps: int = 3) -> dict[str, Any]:
    """Profile training steps. Return the device time of each part, its lower bound, and the slowest operations."""
    case = sides.find_case(name)
    config, program, params, stats = sides.make_our_program(case, precision)
    parts = networks.part_names(config.model)
    state = jax.tree.map(jnp.copy, jax.jit(program.init)(params, stats))
    image, label = sides.make_data(case)
    batch, key = {"image": jnp.asarray(image), "label": jnp.asarray(label)}, jax.random.key(0)
    products = find_products(program.step, state, batch, key, parts=parts)
    step = ops.compile_program(jax.jit(program.step, donate_argnums=0).lower(state, batch, key))
    names = operation_names(step.as_text())
    for _ in range(3):
        state, _ = step(state, batch, key)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = step(state, batch, key)
            jax.block_until_ready(state)
        wall = (time.perf_counter() - begin) / steps
        durations = operation_times(next(Path(folder).rglob("*.xplane.pb")))
    times: dict[tuple[str, bool], float] = collections.defaultdict(float)
    for operation, duration in durations.items():
        if operation in names:
            times[part_of(names[operation], parts), is_backward(names[operation])] += duration / steps
    least = {(part, backward): _least(products, part, backward, ceilings) for part, backward in times}
    slowest = sorted(((d / steps, o) for o, d in durations.items() if o in names), reverse=True)[:_SHOWN]
    return {
        "precision": precision,
        "wall_s": wall,
        "device_s": sum(times.values()),
        "least_s": sum(p.seconds(ceilings["flops"], ceilings["bytes"]) for p in products),
        "parts": [
            {"part": part or "others", "backward": backward, "seconds": t, "least": least[part, backward]}
            for (part, backward), t in sorted(times.items(), key=lambda item: -item[1])
        ],
        "slowest": [{"operation": o, "seconds": d, "name": names[o]} for d, o in slowest],
    }


def _least(products: Sequence[Product], part: str, backward: bool, ceilings: dict[str, float]) -> float:
    """Return the lower bound of the time of a part of the network, forward or backward."""
    found = [p for p in products if p.part == part and p.backward == backward]
    return sum(p.seconds(ceilings["flops"], ceilings["bytes"]) for p in found)


def operation_names(program: str) -> dict[str, str]:
    """Return operation -> name in the Python program, given the text of a compiled program."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', program, re.MULTILINE)
    return dict(found)


def operation_times(path: Path) -> dict[str, float]:
    """Return operation -> seconds on the device, given the file of a profile."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [p for p in planes if p.name.startswith("/device:GPU")] or [p for p in planes if "CPU" in p.name]
    found: dict[str, float] = collections.defaultdict(float)
    for plane in devices:
        lines = list(plane.lines)
        for line in [li for li in lines if li.name == "XLA Ops"] or lines:
            for event in line.events:
                stats = dict(event.stats)
                found[str(stats.get("hlo_op", event.name))] += event.duration_ns / 1e9
    return dict(found)


# -- the report ---------------------------------------------------------------------------------------------------


def write_results(folder: Path, record: dict[str, Any]) -> None:
    """Write gpu.json and gpu.md with the results so far."""
    write_json(folder / "gpu.json", record)
    write_text(folder / "gpu.md", format_report(record))


def format_report(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"# {record['device']}, jax {record['jax']}",
        "",
        "| case | precision | logits | loss | gradient | statistics |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in record["correct"]:
        cells = [f"{row[key]:.1e}" for key in ("logits", "loss", "gradient", "stats")]
        lines.append("| " + " | ".join([row["case"], row["precision"], *cells]) + " |")
    if "ceilings" in record:
        c = record["ceilings"]
        lines += ["", f"Ceilings: {c['flops'] / 1e12:.1f} TFLOP/s, {c['bytes'] / 1e9:.0f} GB/s"]
    if "compare" in record:
        lines += ["", "| network | phase | ours ms | best PyTorch ms (which) | ratio |", "|---|---|---|---|---|"]
        for row in record["compare"]:
            best = row["best_peer"]
            cells = [row["case"], row["phase"], f"{1000 * row['median']['ours']:.1f}"]
            lines.append(
                "| "
                + " | ".join([*cells, f"{1000 * row['median'][best]:.1f} ({best})", f"{row['ratio']['ours']:.2f}"])
                + " |"
            )
    for case, found in record.get("profiles", {}).items():
        lines += [
            "",
            f"## {case}, {found['precision']}: {1000 * found['wall_s']:.1f} ms per step, "
            f"{1000 * found['device_s']:.1f} on the device, lower bound {1000 * found['least_s']:.1f}",
            "",
        ]
        lines += ["| part | | ms | lower bound ms |", "|---|---|---|---|"]
        for row in found["parts"]:
            direction = "backward" if row["backward"] else "forward"
            lines.append(f"| {row['part']} | {direction} | {1000 * row['seconds']:.2f} | {1000 * row['least']:.2f} |")
        lines += ["", "| operation | ms | name in the program |", "|---|---|---|"]
        lines += [f"| {row['operation']} | {1000 * row['seconds']:.2f} | `{row['name']}` |" for row in found["slowest"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
