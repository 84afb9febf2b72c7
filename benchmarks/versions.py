"""Compare two or more environments, for example an older and a newer JAX: time, compilation and memory of our networks.

    python benchmarks/versions.py --pythons=.venv/bin/python,.venv-newest/bin/python
                                  [--networks=dxnet:64,omnia_b0:256] [--phases=infer,train] [--threads=2] [--rounds=5]
                                  [--xla='{"OPTION": "VALUE"}'] [--out=FOLDER]

Each environment runs benchmarks/sides.py in its own process. The processes compile one after the other, without the
compilation cache. In every round, each process then runs twice, and the second run is measured. Ratios are relative to
the first environment. With --xla, every environment is also measured with these compiler options instead of ours.

Writes versions.json and versions.md to --out.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare import Side
from benchmarks.sides import find_case
from xdim_jax.base.files import write_json, write_text

HEAD = (
    "| network, batch | phase | libraries | median ms | fastest ms | ratio | trace s | compile s "
    "| program needs GiB | peak of the process GiB | load average |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def main() -> int:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pythons", required=True, help="comma-separated interpreters of the environments")
    add("--networks", default="dxnet:64,omnia_b0:256", help="comma-separated name:size[@batch]; default: %(default)s")
    add("--phases", default="infer,train", help="comma-separated: infer, train")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--precision", default="float32", choices=["float32", "bfloat16"])
    add("--xla", default="", help="compiler options as JSON, measured in addition to ours")
    add("--out", type=Path, default=Path("runs/versions"))
    options = parser.parse_args()
    options.remat = ""
    cases = options.networks.split(",")
    for case in cases:
        find_case(case)
    os.environ["XDIM_JAX_CACHE"] = "off"  # inherited by the processes
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    print(HEAD, end="")
    for case, phase in itertools.product(cases, options.phases.split(",")):
        found = compare(case, phase, options)
        print("".join(format_row(row, found[0]) for row in found), end="", flush=True)
        rows += found
        write_json(options.out / "versions.json", rows)
    firsts = {(r["case"], r["phase"]): r for r in reversed(rows)}
    table = HEAD + "".join(format_row(r, firsts[r["case"], r["phase"]]) for r in rows)
    write_text(options.out / "versions.md", table)
    return 0


def compare(case: str, phase: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a case, and return a row of results for each environment and set of compiler options."""
    variants = [(python, xla) for python in options.pythons.split(",") for xla in dict.fromkeys(("", options.xla))]
    before = os.getloadavg()[0]
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as cache:
        try:
            facts = []
            for python, xla in variants:  # one after the other, so that compilations do not slow each other down
                sides.append(Side("ours", case, phase, cache, options, python=python, xla=xla))
                facts.append(sides[-1].read())
            times: list[list[float]] = [[] for _ in sides]
            for _ in range(options.rounds):
                for side, values in zip(sides, times, strict=True):
                    side.request("run")  # not measured: it restores the memory pages that an idle process has lost
                    values.append(side.request("run")["cpu" if options.threads == 1 else "wall"])
            peaks = [side.request("quit")["peak"] for side in sides]
        finally:
            for side in sides:
                side.close()
    load = [before, os.getloadavg()[0]]
    return [
        {
            "case": case,
            "phase": phase,
            "jax": fact["versions"]["jax"],
            "xla": xla,
            "median": statistics.median(values),
            "times": values,
            "peak": peak,
            "facts": fact,
            "load": load,
        }
        for (_, xla), values, fact, peak in zip(variants, times, facts, peaks, strict=True)
    ]


def format_row(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Return a row of results as a row of the Markdown table, with the ratio to the first environment."""
    batch, facts = find_case(row["case"]), row["facts"]
    cells = [f"{row['case'].partition(':')[0]} {batch.batch}x{'x'.join(map(str, batch.patch))}", row["phase"]]
    cells += [f"jax {row['jax']}" + (f", {row['xla']}" if row["xla"] else "")]
    cells += [
        f"{1000 * row['median']:.0f}",
        f"{1000 * min(row['times']):.0f}",
        f"{row['median'] / first['median']:.2f}",
    ]
    cells += [f"{facts['lower_s']:.1f}", f"{facts['compile_s']:.1f}", f"{facts['needed'] / 2**30:.2f}"]
    cells += [f"{row['peak'] / 2**30:.2f}", " to ".join(f"{load:.1f}" for load in row["load"])]
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
