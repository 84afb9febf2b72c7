"""Compare time, memory and compilation of our networks with PyTorch implementations of the same networks.

    python benchmarks/compare.py [--networks=dxnet:64,omnia_b0:256] [--phases=infer,train] [--sides=ours,torch,torch-cl]
                                 [--threads=2] [--rounds=5] [--precision=float32] [--out=FOLDER]

Each implementation (a *side*) runs in its own process, see benchmarks/sides.py. In every round, each process runs
twice, one process after the other, and the second run is measured. Other load on the machine thus affects all sides.
The result is the median over rounds, relative to the fastest PyTorch side. With one thread, the process is pinned to
one core, and its CPU time is measured. With several threads, the wall time is measured, which is reliable only if
nothing else runs on the machine (the load average is part of the result).

    ours                              our network
    naive                             our network with XLA's own operations
    torch, torch-cl                   PyTorch, contiguous or with channels last
    torch-compile, torch-cl-compile   the same with torch.compile

Writes results.json and results.md to --out, and scaling.png if a network is measured at several sizes.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sides import find_case
from xdim_jax.base.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "dxnet:64,dxnet:96,dxnet:128,dsnet:64,omnia_b0:256,omnia_b4:512"


def main() -> int:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", default=DEFAULT, help="comma-separated name:size[@batch]; default: %(default)s")
    add(
        "--phases",
        default="infer,train",
        help="comma-separated: infer, train, or predict (a whole volume; dxnet:128 only)",
    )
    add("--sides", default="ours,torch,torch-cl", help="comma-separated; default: %(default)s")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--precision", default="float32", choices=["float32", "bfloat16"])
    add("--remat", default="", help="ours: stages whose activations are recomputed")
    add("--out", type=Path, default=Path("runs/compare"))
    options = parser.parse_args()
    cases, phases = options.networks.split(","), options.phases.split(",")
    for case in cases:
        find_case(case)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case, phase in itertools.product(cases, phases):
        rows.append(compare(case, phase, options))
        print(format_row(rows[-1]), flush=True)
        write_results(options, rows)
    return 0


def compare(case: str, phase: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all sides of a case, and return the row of the results."""
    metric = "cpu" if options.threads == 1 else "wall"
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as cache:
        sides: dict[str, Side] = {}
        facts: dict[str, dict[str, Any]] = {}
        try:
            for name in options.sides.split(
                ","
            ):  # one after the other, so that compilations do not slow each other down
                sides[name] = Side(name, case, phase, cache, options)
                facts[name] = sides[name].read()
            times: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(options.rounds):
                for name, side in sides.items():
                    side.request("run")  # not measured: it restores the memory pages that an idle process has lost
                    times[name].append(side.request("run")[metric])
            peaks = {name: side.request("quit")["peak"] for name, side in sides.items()}
        finally:
            for side in sides.values():
                side.close()
        again = {}
        if (
            "ours" in sides and "compile_s" in facts["ours"]
        ):  # time of loading the same program from the compilation cache
            second = Side("ours", case, phase, cache, options)
            again = second.read()
            second.close()
    median = {name: statistics.median(values) for name, values in times.items()}
    peers = [name for name in sides if name.startswith("torch")]
    best = min(peers, key=lambda n: median[n], default=None)
    return {
        "case": case,
        "phase": phase,
        "metric": metric,
        "median": median,
        "times": times,
        "best_peer": best,
        "ratio": {name: median[name] / median[best] for name in sides if best and not name.startswith("torch")},
        "peak": peaks,
        "facts": facts,
        "cached": {k: again[k] for k in ("lower_s", "compile_s") if k in again},
        "load": [before, os.getloadavg()[0]],
    }


class Side:
    """A process of benchmarks/sides.py.

    Args:
        name: Name of the side, such as ``ours``.
        case: Network, size and batch, see `benchmarks.sides.find_case`.
        phase: ``infer``, ``train`` or ``predict``.
        cache: Folder of the compilation cache.
        options: Options of the command line.
        python: Interpreter of the process.
        xla: Compiler options as JSON; empty for ours.
    """

    def __init__(
        self,
        name: str,
        case: str,
        phase: str,
        cache: str,
        options: argparse.Namespace,
        python: str = sys.executable,
        xla: str = "",
    ):
        command = [python, str(ROOT / "benchmarks" / "sides.py"), f"--side={name}", f"--case={case}"]
        command += [f"--phase={phase}", f"--threads={options.threads}", f"--precision={options.precision}"]
        command += [f"--remat={options.remat}", f"--xla={xla or '{}'}"]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"XDG_CACHE_HOME": cache, "PYTHONPATH": paths}
        self.title = f"{name} {case} {phase}"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def read(self) -> dict[str, Any]:
        """Return the next answer of the process."""
        assert self.process.stdout is not None
        while text := self.process.stdout.readline():
            if text.startswith("{"):
                return json.loads(text)
        raise SystemExit(f"{self.title} ended with status {self.process.wait()}")

    def request(self, word: str) -> dict[str, Any]:
        """Send a command, and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


def format_row(row: dict[str, Any]) -> str:
    """Return a row of the results as one line of text."""
    times = ", ".join(
        f"{name} {1000 * m:.0f} ms ({1000 * min(row['times'][name]):.0f} to {1000 * max(row['times'][name]):.0f})"
        for name, m in row["median"].items()
    )
    ratios = ", ".join(f"{name} / {row['best_peer']} {r:.2f}" for name, r in row["ratio"].items())
    peaks = ", ".join(f"{name} {p / 2**30:.2f}" for name, p in row["peak"].items())
    return f"{row['case']:14} {row['phase']:7} {times} | {ratios} | peak GiB {peaks} | load {row['load'][0]:.1f}"


def write_results(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the results as JSON, as a Markdown table and as a plot."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.platform()}",
        "threads": options.threads,
        "precision": options.precision,
    }
    write_json(options.out / "results.json", {**facts, "rows": rows})
    lines = [f"{k}: {v}  " for k, v in facts.items()]
    lines += ["", "| network | phase | side | median ms | spread | to best PyTorch | peak GiB | compile s (cached) |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        for name, median in row["median"].items():
            values = row["times"][name]
            ratio = f"{row['ratio'][name]:.2f}" if name in row["ratio"] else ""
            compiled = f"{row['facts'][name]['compile_s']:.1f}" if "compile_s" in row["facts"][name] else ""
            compiled += f" ({row['cached']['compile_s']:.1f})" if name == "ours" and row["cached"] else ""
            cells = [row["case"], row["phase"], name, f"{1000 * median:.0f}"]
            cells += [f"{1000 * min(values):.0f} to {1000 * max(values):.0f}", ratio]
            lines.append("| " + " | ".join([*cells, f"{row['peak'][name] / 2**30:.2f}", compiled]) + " |")
    write_text(options.out / "results.md", "\n".join(lines) + "\n")
    draw_scaling(options.out / "scaling.png", rows)


def draw_scaling(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot time over voxels for networks that were measured at several sizes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for network, phase in dict.fromkeys((r["case"].partition(":")[0], r["phase"]) for r in rows):
        found = [r for r in rows if r["case"].startswith(f"{network}:") and r["phase"] == phase]
        if len(found) < 2:
            continue
        for name in found[0]["median"]:
            points = sorted((voxels(r["case"]), r["median"][name]) for r in found if name in r["median"])
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{network} {phase}, {name}")
    if not axes.lines:
        return
    axes.set(xscale="log", yscale="log", xlabel="voxels in a batch", ylabel="seconds")
    low, high = axes.get_xlim()
    first = axes.lines[0].get_xydata()[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    axes.plot([low, high], [first[1] * v / first[0] for v in (low, high)], color="#8a929b", ls=":", label="linear")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def voxels(name: str) -> int:
    """Return the number of voxels in a batch of a case."""
    case = find_case(name)
    return case.batch * math.prod(case.patch)


def _processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((li.partition(": ")[2] for li in lines if li.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
