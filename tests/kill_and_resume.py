"""Kills a tiny training run with SIGKILL at random moments, resumes it, and compares its end with an undisturbed one.

    python -m tests.kill_and_resume --kills=50 --folder=/tmp/kills

The run has everything that a resume must restore: LookAhead, a moving average, augmentation, stochastic depth, batch
statistics, validations, and a checkpoint after every third step. A killed run is started again by the same command
until it ends; then `xdim_jax.verify_run` compares it with the undisturbed one, and a new run begins, until all kills
are done.
Exit status: 0 all the same bits, 1 not.
"""

import argparse
import collections
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
RECIPE = "configs/camus_omnianet.py:phantom"
OPTIONS = [
    "--config.model.encoder.name=efficientnet_toy",
    "--config.model.filters=(8,8,8,8,8)",
    "--config.data.patch=(32,32)",
    "--config.data.prepare.size=(32,32)",
    "--config.data.batch=4",
    "--config.augment.rotate.p=0.5",
    "--config.augment.noise.p=0.5",
    "--config.optim.lookahead.period=6",
    "--config.optim.ema=0.9",
    "--config.train.epochs=3",
    "--config.train.log_every=1",
    "--config.train.checkpoint_steps=3",
    "--config.train.validate_every=1",
]
# lines of the log after which a kill comes, 0 to `_DELAY` seconds later; the first is the start of the process
MOMENTS = ("", "data ", "compile    train step ...", "step ", "step ", "step ", "validation at step")
_DELAY = 1.5


def command(module: str, workdir: Path, root: Path) -> list[str]:
    """The training command."""
    main = [sys.executable, "-m", module, f"--config={RECIPE}", f"--workdir={workdir}"]
    return [*main, *OPTIONS, f"--config.data.root={root}"]


def run_and_kill(arguments: list[str], environment: dict[str, str], moment: str, skip: int, delay: float) -> int | None:
    """Starts the command and kills it; returns its exit status if it ended by itself before, else None.

    The kill comes ``delay`` seconds after the line number ``skip`` (from 0) that begins with ``moment``.
    """
    process = subprocess.Popen(
        arguments, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    timer = None if moment else _kill_later(process, delay)
    for line in process.stdout:
        lines.append(line)
        if moment and timer is None and line.startswith(moment):
            if skip == 0:
                timer = _kill_later(process, delay)
            skip -= 1
    status = process.wait()
    if timer is not None:
        timer.cancel()
    if status not in (0, -9):
        raise RuntimeError(f"the run ended with {status}:\n{''.join(lines[-30:])}")
    return None if status == -9 else status


def _kill_later(process: subprocess.Popen, delay: float) -> threading.Timer:
    timer = threading.Timer(delay, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def verify(a: Path, b: Path, environment: dict[str, str]) -> tuple[bool, str]:
    """What ``xdim_jax.verify_run`` says."""
    done = subprocess.run(
        [sys.executable, "-m", "xdim_jax.verify_run", str(a), str(b)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode == 0, done.stdout + done.stderr


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, required=True, help="for data and runs; made anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="train a network of one convolution: quicker")
    options = parser.parse_args()
    module = "tests.packed_runs" if options.small else "xdim_jax.train"
    shutil.rmtree(options.folder, ignore_errors=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = options.folder / "data"
    phantom = ["phantom", "--dataset=camus", f"--root={root}", "--cases=10", "--shape=96,64"]
    subprocess.run([sys.executable, "-m", "xdim_jax.data", *phantom], cwd=REPO, env=environment, check=True)
    straight = options.folder / "straight"
    begin = time.monotonic()
    subprocess.run(command(module, straight, root), cwd=REPO, env=environment, check=True, stdout=subprocess.DEVNULL)
    print(f"undisturbed run: {time.monotonic() - begin:.0f} s", flush=True)

    chance, kills, runs, failures = random.Random(options.seed), 0, 0, 0
    moments: collections.Counter[str] = collections.Counter()
    while kills < options.kills:
        workdir, killed = options.folder / f"killed{runs}", 0
        while True:
            if kills >= options.kills:  # the last run is let end
                moment, skip, delay = "", 0, 1e6
            else:
                moment, skip, delay = chance.choice(MOMENTS), chance.randrange(6), chance.uniform(0, _DELAY)
                skip = skip if moment == "step " else 0
            if run_and_kill(command(module, workdir, root), environment, moment, skip, delay) is not None:
                break
            kills, killed = kills + 1, killed + 1
            moments[moment.strip() or "start"] += 1
        same, text = verify(straight, workdir, environment)
        runs, failures = runs + 1, failures + (not same)
        steps = re.findall(r"steps .*", text)
        print(f"run {runs}: killed {killed} times, {'the same bits' if same else 'DIFFERS'}; {steps}", flush=True)
        if not same:
            print(text, flush=True)
    print(f"{kills} kills in {runs} runs ({dict(moments)}), {failures} runs differ", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
