"""Scores a run on CAMUS: Dice, MAD and HD (mm, on the original grid) of its validation cases, by structure and instant.

    python benchmarks/camus.py --workdir=runs/camus [--workdir=runs/other ...] [--json=FILE]

With each mean stands its 95 % confidence interval over patients (bootstrap, 10,000 draws). Of several workdirs, which
must have the same validation cases (e.g. seeds of one recipe), the means of each are given, and of all together. The
rules are those of the challenge (spec: challenges, section 1.2): a structure that is missing in prediction or reference
has no MAD and HD, and is counted.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

from xdim_jax import checkpoint, cli, infer, log, metrics
from xdim_jax.data import case as data_case
from xdim_jax.data import store
from xdim_jax.data.case import scan_cases, usable_cases
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.data.prepare import Preparation
from xdim_jax.files import DATA_FILE, read_json, write_json
from xdim_jax.program import make_program

DRAWS = 10_000


def score(workdir: Path) -> list[dict]:
    """One row per case and structure: case_id, patient, view, instant, structure, dice, mad, hd."""
    config = cli.read_config(workdir)
    dataset = trained_dataset(config.data.to_dict(), read_json(workdir / DATA_FILE))
    split = read_json(workdir / "split.json")
    root = Path(split["root"])
    cases = {c.case_id: c for c in usable_cases(scan_cases(dataset, root, need_labels=True), root)}
    chosen = [cases[name] for name in split["validation"]]
    folder = Path(config.data.store) if config.data.store else store.default_folder(root)
    entries = store.prepare_cases(dataset, chosen, Preparation.from_config(config.data.prepare), folder)
    program, params, stats = make_program(config, dataset, per_epoch=1)
    params, stats, source = checkpoint.load_weights(workdir, params, stats)
    log.say(f"weights    {workdir}, {source}")
    predict = infer.make_network_predictor(config, program.forward, program.output)
    rows = []
    for case, entry in zip(chosen, entries, strict=True):
        label = infer.segment(predict, (params, stats), entry.load(), program.output, config.predict)
        volume = data_case.read_case(case)
        found, truth = dataset.regions.encode(label[0]), dataset.regions.encode(volume.label[0])
        spacing = volume.grid.spacing[:2][::-1]
        for r, name in enumerate(dataset.regions.names):
            p, g = found[..., r], truth[..., r]
            both = p.any() and g.any()
            rows.append(
                {
                    "case_id": case.case_id,
                    "patient": case.patient,
                    "view": case.info["view"],
                    "instant": case.info["instant"],
                    "structure": name,
                    "dice": metrics.dice(p, g),
                    "mad": metrics.assd_mean(p, g, spacing) if both else math.nan,
                    "hd": metrics.hausdorff(p, g, spacing) if both else math.nan,
                }
            )
    return rows


def interval(rows: list[dict], metric: str, rng: np.random.Generator) -> tuple[float, float, float, int]:
    """Mean, and the 2.5 and 97.5 percentiles of means over patients drawn with replacement; how many have no value."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if math.isfinite(row[metric]):
            values.setdefault(row["patient"], []).append(row[metric])
    sums = np.array([(sum(v), len(v)) for v in values.values()])
    draws = rng.integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[draws, 0].sum(1) / sums[draws, 1].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return sums[:, 0].sum() / sums[:, 1].sum(), low, high, sum(not math.isfinite(r[metric]) for r in rows)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, action="append", required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = {str(workdir): score(workdir) for workdir in options.workdir}
    if len(runs) > 1:
        runs["together"] = [row for rows in runs.values() for row in rows]
    table = {}
    print("| run | structure | instant | Dice | MAD (mm) | HD (mm) | no MAD |\n|---|---|---|---|---|---|---|")
    for run, rows in runs.items():
        for structure in dict.fromkeys(r["structure"] for r in rows):
            for instant in ("ED", "ES"):
                these = [r for r in rows if r["structure"] == structure and r["instant"] == instant]
                found = {m: interval(these, m, np.random.default_rng(0)) for m in ("dice", "mad", "hd")}
                cells = [
                    f"{m:.{d}f} ({a:.{d}f}-{b:.{d}f})"
                    for (m, a, b, _), d in zip(found.values(), (3, 2, 2), strict=True)
                ]
                print(f"| {run} | {structure} | {instant} | {' | '.join(cells)} | {found['mad'][3]} |")
                table[f"{run} {structure} {instant}"] = {m: [float(x) for x in v] for m, v in found.items()}
    if options.json:
        write_json(options.json, {"table": table, "rows": json.loads(json.dumps(runs))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
