"""Compare packed trials of a sweep with trials that are trained in separate processes: trials per hour.

    python benchmarks/pack.py [--cases=toy:32,b0:96] [--trials=8] [--epochs=5] [--ways=workers:1,workers:2,scan,vmap]
                              [--devices=1] [--out=FOLDER]

A case is an encoder (``toy``, or an EfficientNet) and the size of its 2D images. The trials differ in learning rate and
beta, so that each separate process must compile its own program. A way of training is either a number of workers (such
as ``workers:2``), each of which trains its trials one after the other, or the layout of one pack with all trials (such
as ``scan``). Each way runs ``python -m xdim_jax.sweep``, beginning with an empty compilation cache. The results are

- start_s: seconds of a start (imports, compilation, saving), without its training steps;
- steps_per_s: training steps of all trials per second (median over the records of the trials);
- trials_per_hour: trials per hour, as measured;
- long_trials_per_hour: trials of 1000 steps per hour, computed from the first two numbers.
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
LONG_STEPS = 1000  # steps of a long trial, whose rate is computed


def main() -> None:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", default="toy:32,b0:96", help="comma-separated encoder:size")
    add("--trials", type=int, default=8)
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=4)
    add("--ways", default="workers:1,workers:2,scan,vmap", help="comma-separated workers:N or layout of a pack")
    add("--devices", type=int, default=1, help="number of devices into which JAX divides a CPU")
    add("--out", type=Path, default=Path("runs/pack"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / "data"
    phantom.write_camus(data, cases=10, shape=(160, 128))
    rows = []
    for case in options.cases.split(","):
        for way in options.ways.split(","):
            rows.append(measure(case, way, data, options))
            print(format_row(rows[-1]), flush=True)
            write_json(options.out / "results.json", rows)


def measure(case: str, way: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train the trials of a case in one way, and return the row of the results."""
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
    # the first record of each trial is omitted; later ones include the time of saving checkpoints
    seconds = statistics.median(r["seconds_per_step"] for trial in records for r in trial[1:])
    parallel = options.trials if kind != "workers" else workers
    rate = parallel / seconds
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
        "long_trials_per_hour": 3600 * options.trials / (wall + (LONG_STEPS - steps) * options.trials / rate),
    }


def format_row(row: dict[str, Any]) -> str:
    """Return a row of the results as one line of text."""
    return (
        f"{row['case']:8} {row['way']:10} {row['trials']} trials of {row['steps']} steps: {row['wall_s']:.0f} s, "
        f"{row['start_s']:.0f} s for a start, {row['steps_per_s']:.2f} steps/s; trials per hour "
        f"{row['trials_per_hour']:.0f}, of {LONG_STEPS} steps {row['long_trials_per_hour']:.1f}"
    )


if __name__ == "__main__":
    main()
