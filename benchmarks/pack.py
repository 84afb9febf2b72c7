"""Trials of a sweep in one program beside trials that are processes: how many an hour.

    python benchmarks/pack.py [--cases=toy:32,b0:96] [--trials=8] [--epochs=5] [--ways=workers:1,workers:2,scan,vmap]
                              [--devices=1] [--out=FOLDER]

A case is an encoder (``toy``, or an EfficientNet) and the side of its 2D images; trials differ in learning rate and
beta, as in a sweep, so that a process of its own compiles a program of its own. A way is a number of workers whose
trials are processes, or the layout of a pack that holds all trials. Each way runs ``python -m xdim_jax.sweep`` from an
empty compilation cache. Said are: seconds that a start takes beside its steps; steps of all trials in a
second once they run (median over the trials' logs); and trials an hour, of this length as measured, and of 1000 steps
as the two numbers give it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from xdim_jax.base.files import write_json
from xdim_jax.data import phantom
from xdim_jax.runs.records import read_records

ROOT = Path(__file__).resolve().parents[1]

SPACE = """
def suggest(trial):
    trial.suggest_float("optim.schedule.peak", 1e-4, 1e-3, log=True)
    trial.suggest_float("optim.b1", 0.85, 0.95)
"""
LONG = 1000  # steps of the trial that is reckoned


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", default="toy:32,b0:96")
    add("--trials", type=int, default=8)
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=4)
    add("--ways", default="workers:1,workers:2,scan,vmap")
    add("--devices", type=int, default=1, help="that a CPU is parted into, for the layout devices")
    add("--out", type=Path, default=Path("runs/pack"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / "data"
    phantom.write_camus(data, cases=10, shape=(160, 128))
    rows = []
    for case in options.cases.split(","):
        for way in options.ways.split(","):
            rows.append(measure(case, way, data, options))
            print(line(rows[-1]), flush=True)
            write_json(options.out / "results.json", rows)


def measure(case: str, way: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One way of training the trials of a case."""
    encoder, _, side = case.partition(":")
    folder = Path(tempfile.mkdtemp(dir=options.out))
    (folder / "space.py").write_text(SPACE)
    command = [sys.executable, "-m", "xdim_jax.sweep", "--config=camus_omnianet:phantom", "--sampler=random"]
    command += [f"--space={folder / 'space.py'}", f"--trials={options.trials}", f"--workdir={folder / 'runs'}"]
    for key, value in {
        "data.root": data.absolute(),
        "data.patch": f"({side},{side})",
        "data.prepare.size": f"({side},{side})",
        "data.batch": options.batch,
        "model.encoder.name": f"efficientnet_{encoder}",
        **({"model.filters": "(8,8,8,8,8)"} if encoder == "toy" else {}),
        "train.epochs": options.epochs,
        "train.log_every": 1,
        "train.validate_every": options.epochs,
        "train.overlays": 0,
    }.items():
        command.append(f"--config.{key}={value}")
    kind, _, count = way.partition(":")
    workers = int(count) if kind == "workers" else 1
    if kind != "workers":
        command += [f"--pack={options.trials}", f"--layout={kind}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder / "cache")}
    if options.devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    begin = time.time()
    running = []
    for number in range(workers):
        with open(folder / f"worker{number}.txt", "wb") as output:
            running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
    for number, process in enumerate(running):
        if process.wait():
            raise SystemExit((folder / f"worker{number}.txt").read_text()[-2000:])
    wall = time.time() - begin
    records = [
        [r for r in read_records(folder / "runs" / f"trial{t:04d}") if r["kind"] == "train"]
        for t in range(options.trials)
    ]
    steps = len(records[0])
    # of a trial's own clock: the first step of a process holds nothing but the step; an epoch's first one, the saving
    seconds = statistics.median(r["seconds_per_step"] for trial in records for r in trial[1:])
    at_once = options.trials if kind != "workers" else workers
    rate = at_once / seconds
    starts = (wall - steps * options.trials / rate) / (1 if kind != "workers" else options.trials / workers)
    shutil.rmtree(folder)
    return {
        "case": case,
        "way": way,
        "trials": options.trials,
        "steps": steps,
        "batch": options.batch,
        "wall_s": wall,
        "start_s": starts,
        "steps_per_s": rate,
        "trials_per_hour": 3600 * options.trials / wall,
        "long_trials_per_hour": 3600 * options.trials / (wall + (LONG - steps) * options.trials / rate),
    }


def line(row: dict[str, Any]) -> str:
    """A result in a line."""
    return (
        f"{row['case']:8} {row['way']:10} {row['trials']} trials of {row['steps']} steps: {row['wall_s']:.0f} s, "
        f"{row['start_s']:.0f} s of each start beside its steps, {row['steps_per_s']:.2f} steps/s; trials an hour "
        f"{row['trials_per_hour']:.0f}, of {LONG} steps {row['long_trials_per_hour']:.1f}"
    )


if __name__ == "__main__":
    main()
