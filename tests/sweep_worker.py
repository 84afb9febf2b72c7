"""A toy that replaces training, and a worker that trains it; quick enough for many workers on two cores.

python -m tests.sweep_worker train --config=C --workdir=W --config.x=0.3       five epochs of a toy
python -m tests.sweep_worker work STORAGE ROOT TRIALS [PRUNER]
"""

import json
import signal
import sys
import time
from pathlib import Path

from xdim_jax.base.signals import REQUEUE, catch_signals

EPOCHS = 5


def train(argv):
    """Train for five epochs, in which the Dice rises to 1 - |x - 0.5|; fail if x is above 0.9.

    Every epoch is saved, and a resumed trial does not repeat it. While the folder of the trials has a file ``hold``,
    the toy waits after its first epoch.
    """
    values = dict(word.removeprefix("--").split("=", 1) for word in argv)
    workdir, x = Path(values["workdir"]), float(values["config.x"])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    state = workdir / "checkpoint"
    done = int(state.read_text()) if state.is_file() else 0
    if x > 0.9:
        (workdir / "steps.jsonl").write_text("{}\n")  # it fails after its first step
        print("error: the learning rate is too high")
        return 2
    for epoch in range(done + 1, EPOCHS + 1):
        while epoch > 1 and not stopped and (workdir.parent / "hold").exists():
            time.sleep(0.05)
        time.sleep(0.15)
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": "validation", "step": epoch, "dice": (1 - abs(x - 0.5)) * epoch / EPOCHS}))
            file.write("\n")
        with open(workdir / "epochs", "a") as file:
            file.write(f"{epoch}\n")
        state.write_text(str(epoch))
        if stopped:
            return REQUEUE
    return 0


def suggest(trial):
    """Draw one number."""
    trial.suggest_float("x", 0.0, 1.0)


def main(argv):
    """Train the toy, or run a worker."""
    if argv[0] == "train":
        return train(argv[1:])
    # not needed for training, and slow to import
    from xdim_jax.sweeps import optuna_study as studies
    from xdim_jax.sweeps.worker import Job, run_worker

    storage, root, trials, *pruner = argv[1:]
    study = studies.open_study(
        studies.open_storage(storage), "toy", pruner=studies.make_pruner(*(pruner or ["none"]), warmup=1)
    )
    command = (sys.executable, "-m", "tests.sweep_worker", "train")
    with catch_signals() as stop:
        stop.busy = True
        job = Job("C", (), suggest, Path(root), int(trials), command)
        return run_worker(study, job, stop, heartbeat=0.5, grace=8.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
