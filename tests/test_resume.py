"""Stopping, resuming and recording of the training program.

Whole runs train a network that is one linear map of each pixel (`Pixelwise`), whose programs compile at once; the
kills of the slow test are of the real one.
"""

import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import save_file
from tensorboardX.proto import event_pb2

from tests import conftest
from tests.conftest import damage_checkpoint, records, small_state
from tests.small_runs import RECIPE, SMALL, use_pixelwise
from xdim_jax import evaluate, predict, train, verify_run
from xdim_jax.base import lock, log
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.data import case as data_case
from xdim_jax.data import pipeline
from xdim_jax.data.case import Scan
from xdim_jax.data.images import nifti
from xdim_jax.data.images.image import read_volume
from xdim_jax.data.labels import Labels
from xdim_jax.data.prepare import Prepared
from xdim_jax.inference import predictor, sliding_window
from xdim_jax.inference.output import make_output
from xdim_jax.inference.validation_cases import predict_validation
from xdim_jax.nets import networks
from xdim_jax.nets.functional import split_model
from xdim_jax.nets.weights import Weights, flatten, write_weights
from xdim_jax.runs import checkpoint, trackers
from xdim_jax.runs import records as records_module
from xdim_jax.runs.records import close_recorder
from xdim_jax.training import (
    check,
    crossval,
    initial_weights,
    label_maps,
    loop,
    open_run,
    step_metrics,
    validation,
    watchdog,
)
from xdim_jax.training import train as training
from xdim_jax.training.run_data import find_data

REPO = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch):
    use_pixelwise(monkeypatch.setattr)
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")


def arguments(workdir, data, *more, words=""):
    return [f"--config={RECIPE}{words}", f"--workdir={workdir}", *SMALL, f"--config.data.root={data}", *more]


def train_small(workdir, data, *more, words="", code=0):
    """Trains in this process; what it said."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = train.main(arguments(workdir, data, *more, words=words))
    assert status == code, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def straight(camus4, tmp_path_factory):
    """A whole run that nothing disturbed. Read only."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_pixelwise(patch.setattr)
        patch.setenv("XDIM_JAX_CACHE", "off")
        out = train_small(workdir, camus4, "--config.train.overlays=2")
    (workdir / "out.txt").write_text(out)
    return workdir


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def arrays_of(folder):
    """Every array of a checkpoint, without the package's reader."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder.absolute()).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = reader.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=args))
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_end(a, b, at):
    """The last states of two workdirs have the same bits, and so have all their steps on record."""
    found, expected = (arrays_of(w / "checkpoints" / str(at) / "state") for w in (a, b))
    assert found.keys() == expected.keys() and len(found) > 8
    for part in ("['params']['fast']", "['params']['slow']", "['opt_state']", "['ema']"):
        assert any(name.startswith(part) for name in found), part
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
    assert lines_of(a / "steps.jsonl") == lines_of(b / "steps.jsonl")
    assert [r["step"] for r in lines_of(a / "steps.jsonl")] == list(range(1, at + 1))


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(small, camus4, tmp_path):
    with pytest.raises(UserError, match=r"not finite at step [1-9] \(last losses: "):
        train_small(tmp_path / "run", camus4, "--config.optim.schedule.peak=1e38")


# -- kills --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """The command with a network that compiles in seconds; the states are read here, without verify_run."""
    folder = tmp_path / "kills"
    command = [sys.executable, "-m", "tests.kill_and_resume", "--kills=2", "--seed=1", f"--folder={folder}", "--small"]
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}  # with all cores, as users do
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills in" in done.stdout and "0 runs differ" in done.stdout
    killed = sorted(folder.glob("killed*"))
    assert killed, "no run was killed"
    for workdir in killed:
        assert_same_end(workdir, folder / "straight", 24)
        validations = [
            [{k: v for k, v in r.items() if k != "time"} for r in records(w, "validation")]
            for w in (workdir, folder / "straight")
        ]
        assert validations[0] == validations[1] and [r["step"] for r in validations[0]] == [8, 16, 24]


def test_what_the_whole_run_says_and_leaves(straight):
    out = (straight / "out.txt").read_text()
    assert "starting at step 0" in out and "done       predict with" in out
    kept = sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert kept == ["4", "6"], "the ends of the last two epochs"
    assert [r["step"] for r in lines_of(straight / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records(straight, "validation")] == [2, 4, 6]
    batches = [tuple(r["batch"]) for r in lines_of(straight / "steps.jsonl")]
    assert len(set(batches)) == 6 and all(len(b) == 4 for b in batches)


# -- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)],
    ids=["TERM", "USR1", "HUP", "INT"],
)
def test_a_signal_in_the_loop_saves_and_the_same_command_goes_on(
    number, code, small, camus4, straight, tmp_path, monkeypatch, capfd
):
    """It comes in the middle of the second epoch."""
    heard = []

    def say(line):
        if line.startswith("step 3/6") and not heard:
            heard.append(line)
            os.kill(os.getpid(), number)
        log.say(line)

    monkeypatch.setattr(step_metrics, "say", say)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)}
    out = train_small(tmp_path / "run", camus4, "--config.train.overlays=2", code=code)
    name = signal.Signals(number).name
    assert f"{name}: saving after this step" in capfd.readouterr().out
    assert f"stopped    by {name}" in out and "everything is saved" in out
    assert {n: signal.getsignal(n) for n in before} == before
    at = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert at in (3, 4), "this step, or the one after it"
    assert [r["step"] for r in lines_of(tmp_path / "run" / "steps.jsonl")] == list(range(1, at + 1))

    out = train_small(tmp_path / "run", camus4, "--config.train.overlays=2")
    assert f"resume     from step {at}" in out
    assert_same_end(tmp_path / "run", straight, 6)
    assert [r["dice"] for r in records(tmp_path / "run", "validation")] == [
        r["dice"] for r in records(straight, "validation")
    ]
    out = train_small(tmp_path / "run", camus4, "--config.train.overlays=2")
    assert "resume     from step 6" in out and "compile" not in out, "nothing is left to do"


_WINDOWS = 8  # of the validation: two patients with four images, each of one window


@pytest.mark.parametrize(("owner", "name"), [(validation, "postprocess"), (sliding_window, "read_window")])
def test_a_signal_in_a_validation_ends_it_and_the_resumed_run_makes_it(
    owner, name, small, camus4, straight, tmp_path, monkeypatch
):
    """At step 4, an epoch's end; between two cases, and inside the last case."""
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        if checkpoint.exists(tmp_path / "run") and len(records(tmp_path / "run", "epoch")) == 2:
            calls.append(1)
            if name == "postprocess" or len(calls) == _WINDOWS:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    out = train_small(tmp_path / "run", camus4, code=75)
    assert [r["step"] for r in records(tmp_path / "run", "validation")] == [2] and "validation at step 4" not in out
    monkeypatch.setattr(owner, name, original)
    out = train_small(tmp_path / "run", camus4)
    assert "resume     from step 4" in out and "validation at step 4" in out
    assert [(r["step"], r["dice"]) for r in records(tmp_path / "run", "validation")] == [
        (r["step"], r["dice"]) for r in records(straight, "validation")
    ]
    assert_same_end(tmp_path / "run", straight, 6)


# what a process does with its main; a long call of C cannot be interrupted by Python's handlers, as compiling cannot
_LONG = "lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
_PROCESS = """
import hashlib, sys, time
from tests.small_runs import use_pixelwise
from xdim_jax import train
from xdim_jax.base.command import run
from xdim_jax.data import pipeline, store
from xdim_jax.training import mesh
use_pixelwise(setattr)
long, moment = LONG, sys.argv.pop(1)
if moment == "prepare":
    original = store.read_case
    def read_case(case):
        print("reading now", flush=True)
        time.sleep(600)
    store.read_case = read_case
elif moment == "compile":
    class Lowered:
        def compile(self, **options):
            print("compiling now", flush=True)
            long()
    mesh.Devices.lower = lambda *arguments: Lowered()
else:
    original = pipeline.read_part
    def slow(*arguments):
        time.sleep(0.3)
        return original(*arguments)
    pipeline.read_part = slow
run(train.main)
""".replace("LONG", _LONG)


@pytest.mark.parametrize(
    ("moment", "line", "number", "code"),
    [
        pytest.param("prepare", "reading now", signal.SIGTERM, 75, marks=pytest.mark.slow),
        pytest.param("compile", "compiling now", signal.SIGUSR1, 75, marks=pytest.mark.slow),
        ("compile", "compiling now", signal.SIGINT, 130),
        ("steps", "step 2/6", signal.SIGTERM, 75),
        ("steps without a reader", "step 2/6", signal.SIGHUP, 75),
    ],
)
def test_a_signal_to_the_process_is_heard_at_every_moment(
    moment, line, number, code, small, camus4, straight, tmp_path
):
    """Within the 30 seconds that schedulers give at least; then the same command goes on to the same end."""
    store = f"--config.data.store={tmp_path / 'store'}"
    command = [sys.executable, "-c", _PROCESS, moment, *arguments(tmp_path / "run", camus4, store)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDIM_JAX_CACHE": "off"}
    process = subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        seen = ""
        for text in process.stdout:
            seen += text
            if text.startswith(line):
                break
        time.sleep(0.5 if moment != "steps" else 0)  # until it is in the middle of it
        if moment == "steps without a reader":  # as with ``| tee log``, when Ctrl-C has ended tee
            process.stdout.close()
            process.stderr.close()
        process.send_signal(number)
        out, err = ("", "") if process.stdout.closed else process.communicate(timeout=30)
        process.wait(30)
    finally:
        process.kill()
    assert process.returncode == code, seen + out + err
    assert "Traceback" not in err
    stopped = [text for text in out.splitlines() if text.startswith("stopped ")]
    if moment != "steps without a reader":
        assert len(stopped) == 1 and signal.Signals(number).name in stopped[0] and "same command" in stopped[0]
        assert ("everything is saved" if moment == "steps" else "nothing to save") in stopped[0]
    trains = moment.startswith("steps")
    assert checkpoint.exists(tmp_path / "run") == trains
    out = train_small(tmp_path / "run", camus4, store)
    assert ("resume     from step" in out) == trains
    assert_same_end(tmp_path / "run", straight, 6)


# -- the lock of the workdir --------------------------------------------------------------------------------------


def test_two_processes_never_train_in_one_workdir(small, camus4, straight, tmp_path, monkeypatch, capsys):
    """The second one names the first, waits, and takes over when the first is killed, without losing a step."""
    store = f"--config.data.store={tmp_path / 'store'}"
    command = [sys.executable, "-c", _PROCESS, "steps", *arguments(tmp_path / "run", camus4, store)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDIM_JAX_CACHE": "off"}
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for text in process.stdout:
            if text.startswith("step 2/6"):
                break
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(open_run, "lock_workdir", functools.partial(lock.lock_workdir, wait=1))
        with pytest.raises(UserError, match=f"in use by process {process.pid} on") as error:
            train.main(arguments(tmp_path / "run", camus4, store))
        assert str(tmp_path / "run") in str(error.value)
        monkeypatch.setattr(open_run, "lock_workdir", functools.partial(lock.lock_workdir, wait=60))
        threading.Timer(1, process.kill).start()
        out = train_small(tmp_path / "run", camus4, store)
        assert f"waiting    for process {process.pid}" in out
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    assert_same_end(tmp_path / "run", straight, 6)


def test_a_lock_is_released_when_a_run_fails(tmp_path):
    for _ in range(2):
        file = lock.lock_workdir(tmp_path, wait=0)
        with pytest.raises(UserError, match="in use"):
            lock.lock_workdir(tmp_path, wait=0)
        file.close()


# -- the loop alone -----------------------------------------------------------------------------------------------


def batches(values=None):
    """The loss of a step is its batch's value."""
    at = 0
    while values is None or at < len(values):
        value = 0.5 if values is None else values[at]
        yield {"image": np.full((1, 1, 1, 1), value, np.float32), "digest": np.array([at], np.uint32)}
        at += 1


def count(state, batch, key):
    """A step that only counts."""
    numbers = {"loss": jnp.mean(batch["image"]), "grad_norm": jnp.float32(1), "update_norm": jnp.float32(1)}
    return state._replace(step=state.step + 1), numbers | {"score": jnp.array([0.25, jnp.nan])}


def make_run(workdir, first=0, **options):
    return conftest.make_run(workdir, count, ("a", "b"), first=first, **options)


def go_on(workdir, stream=None, **options):
    """Resumes or begins a run; the step that it ends at."""
    with contextlib.closing(batches() if stream is None else stream) as stream:
        found = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
        run = make_run(workdir, max(found, default=0), **options)
        try:
            restored = checkpoint.restore_latest(run.checkpoints, small_state(0.0), print)
            state, progress = (
                (restored[0], loop.Progress(**restored[1]))
                if restored
                else (small_state(1.0), loop.Progress([0.0] * 2, [0] * 2))
            )
            done = [r["step"] for r in records(workdir, "validation")]
            return int(loop.fit(run, state, progress, stream, validated=int(state.step) in done).step)
        finally:
            close_recorder(run.recorder)
            checkpoint.close(run.checkpoints)


@pytest.fixture
def saves(monkeypatch):
    """The steps at which a state is saved."""
    found, original = [], checkpoint.save_latest

    def save_latest(checkpoints, state, progress):
        found.append(int(state.step))
        original(checkpoints, state, progress)

    monkeypatch.setattr(checkpoint, "save_latest", save_latest)
    return found


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [4, 8, 12]), (3, [3, 4, 6, 8, 9, 12]), (5, [4, 5, 8, 10, 12]), (1, [*range(1, 13)])]
)
def test_states_are_saved_by_steps_and_at_epochs_ends(every, expected, saves, tmp_path):
    go_on(tmp_path, config={"checkpoint_steps": every})
    assert saves == expected


def test_states_are_saved_by_the_clock(saves, tmp_path, monkeypatch):
    """A step takes a minute; more than 2.5 minutes after the save before, the next is made. Epochs have 9 steps."""
    clock = [0.0]

    def slow():
        for batch in batches():
            clock[0] += 60
            yield batch

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    go_on(tmp_path, slow(), per_epoch=9, config={"epochs": 2, "checkpoint_minutes": 2.5})
    assert saves == [4, 7, 9, 12, 15, 18]


def validations(*scores):
    """A validation that gives one score after the other."""
    left = list(scores)

    def validate(weights, stop):
        if stop.signal:
            raise validation.InterruptedValidationError
        dice = left.pop(0)
        return validation.ValidationResult({"a": dice, "b": dice}, {}, {})

    return validate


@pytest.mark.parametrize(
    ("patience", "scores", "ends"),
    [
        (3, [0.5, 0.6, 0.55, 0.58, 0.59, 0.9, 0.9, 0.9], 5),
        (3, [0.5, 0.6, 0.55, 0.58, 0.61, 0.6, 0.6, 0.7], 8),
        (2, [0.6, 0.6, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9], 3),  # an equal score is no better one
        (1, [0.5, 0.6, 0.7, 0.69, 0.9, 0.9, 0.9, 0.9], 4),
        (0, [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1], 8),
    ],
)
def test_patience_ends_a_run_early(patience, scores, ends, tmp_path, capsys):
    config = {"epochs": 8, "patience": patience}
    assert go_on(tmp_path, per_epoch=1, config=config, validate=validations(*scores)) == ends
    assert [r["dice"] for r in records(tmp_path, "validation")] == pytest.approx(scores[:ends])
    assert ("config.train.patience" in capsys.readouterr().out) == (patience > 0 and ends < 8)


def test_patience_is_that_of_process_0_where_others_have_no_record(tmp_path, monkeypatch, capsys):
    """With a workdir in a bucket, only process 0 writes a record: 0.6 was the best, three validations ago."""
    monkeypatch.setattr(loop, "read_records", lambda workdir: [])
    of_process_0 = np.array([[3.0, 0.6]])
    monkeypatch.setattr(loop.mesh, "gather", lambda values: of_process_0 if values.shape == (2,) else values[None])
    assert go_on(tmp_path, per_epoch=1, config={"epochs": 8, "patience": 3}, validate=validations()) == 0
    assert "0.600" in capsys.readouterr().out


def test_patience_is_counted_across_a_resume(tmp_path, capsys):
    """Best at 2; stopped while step 4 runs, whose validation the resumed run makes."""
    config, stop = {"epochs": 8, "patience": 3}, loop.StopRequest()

    def stopping():
        for at, batch in enumerate(batches(), 1):
            if at == 4:
                stop.signal = signal.SIGTERM
            yield batch

    options = {"per_epoch": 1, "config": config}
    assert go_on(tmp_path, stopping(), validate=validations(0.5, 0.6, 0.55, 0.0), stop=stop, **options) == 4
    assert [r["step"] for r in records(tmp_path, "validation")] == [1, 2, 3]
    assert go_on(tmp_path, validate=validations(0.58, 0.59, 0.9), **options) == 5
    assert [r["dice"] for r in records(tmp_path, "validation")] == pytest.approx([0.5, 0.6, 0.55, 0.58, 0.59])
    assert "0.600" in capsys.readouterr().out
    assert go_on(tmp_path, batches([]), validate=validations(), **options) == 5, "it has ended, and stays so"
    assert "ends early" in capsys.readouterr().out


def test_scores_that_are_unknown_are_null_in_the_record(tmp_path):
    """No sample has region b."""
    go_on(tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [r for r in (json.loads(line, parse_constant=refuse) for line in lines) if r["kind"] == "train"]
    assert [(r["score_a"], r["score_b"]) for r in found] == [(0.25, None)] * 3
    assert [r["score"] for r in records(tmp_path, "epoch")] == [0.25] * 3, "the mean of what is known"


def test_the_record_is_cut_back_to_the_resumed_step(tmp_path):
    """A kill comes after steps that no checkpoint holds, in the middle of a line."""
    stop = loop.StopRequest()

    def stopping():
        for at, batch in enumerate(batches([0.1 * i for i in range(1, 13)]), 1):
            if at == 6:
                stop.signal = signal.SIGTERM
            yield batch

    assert go_on(tmp_path, stopping(), config={"log_every": 1}, stop=stop) == 6
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    for name in ("metrics.jsonl", "steps.jsonl"):
        with open(tmp_path / name, "a", encoding="utf-8") as file:
            file.write('{"step": 7, "lo')
    assert go_on(tmp_path, batches([9.0] * 8), config={"log_every": 1}) == 12
    steps = lines_of(tmp_path / "steps.jsonl")
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["loss"] for r in steps] == pytest.approx([0.1, 0.2, 0.3, 0.4] + [9.0] * 8)
    assert [(r["step"], r["loss"]) for r in records(tmp_path, "train")] == [
        (i, pytest.approx(0.1 * i if i <= 4 else 9.0)) for i in range(1, 13)
    ]
    assert [r["step"] for r in records(tmp_path, "validation")] == [4, 8, 12]


def broken_after(values):
    yield from batches(values)
    raise UserError("broken.nii.gz")


def test_a_file_that_cannot_be_read_does_not_lose_the_steps_before_it(tmp_path):
    with pytest.raises(UserError, match=r"broken\.nii\.gz"):
        go_on(tmp_path, broken_after([0.5] * 6))
    progress = json.loads(next((tmp_path / "checkpoints" / "6" / "progress").glob("metadata")).read_text())
    assert progress["score_steps"] == [2, 0] and progress["score_sum"] == [0.5, 0.0]
    assert go_on(tmp_path) == 12


def test_a_signal_ends_slow_steps_soon(tmp_path):
    """JAX returns before a step has ended. Without a limit, dozens of steps would be in the queue and have to end."""
    run = make_run(tmp_path, config={"log_every": 1000}, per_epoch=1000)
    matrix = jnp.eye(800)

    def slow(state, batch, key):
        busy = jax.lax.fori_loop(0, 30, lambda _, x: x @ matrix, jnp.full((800, 800), batch["image"].sum()))
        return count(state, batch | {"image": busy}, key)

    run = dataclasses.replace(run, step=slow)
    times = []

    def stop():
        times.append(time.monotonic())
        run.stop.signal = signal.SIGTERM

    def read():
        for number, batch in enumerate(batches()):
            if number == 2:  # the first step is compiled
                times.append(time.monotonic())
                threading.Timer(2, stop).start()
            yield batch

    with contextlib.closing(read()) as stream:
        state = loop.fit(run, small_state(1.0), loop.Progress([0.0] * 2, [0] * 2), stream, validated=False)
    times.append(time.monotonic())
    close_recorder(run.recorder)
    checkpoint.close(run.checkpoints)
    begin, signalled, end = times
    seconds_per_step = (end - begin) / (int(state.step) - 2)
    assert end - signalled < 4 * seconds_per_step + 0.5, f"{seconds_per_step:.2f} s per step"


@pytest.mark.parametrize("log_every", [100, 3])
def test_the_steps_before_an_unreadable_file_are_on_record(log_every, tmp_path):
    """The file is that of step 7; with 3, all steps before it are on record already when it is read."""
    with pytest.raises(UserError, match=r"broken\.nii\.gz"):
        go_on(tmp_path, broken_after([0.5] * 6), config={"log_every": log_every})
    go_on(tmp_path)
    assert [r["step"] for r in lines_of(tmp_path / "steps.jsonl")] == list(range(1, 13))


def test_a_state_that_a_nan_broke_is_not_saved_when_a_file_cannot_be_read(tmp_path):
    """The NaN is at step 5; states are looked at every 100 steps."""
    with contextlib.suppress(UserError):
        go_on(tmp_path, broken_after([0.5] * 4 + [math.nan, math.nan]))
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 4


def test_a_loss_that_is_not_finite_leaves_the_states_before_it(tmp_path):
    with pytest.raises(UserError, match="not finite at step 6"):
        go_on(tmp_path, batches([0.5] * 5 + [math.nan] * 9))
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 4


_EXPONENTIAL = ("--config.optim.schedule.name=exponential", "--config.optim.schedule.constant_epochs=1")


# -- damaged checkpoints ------------------------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_skipped_and_a_damaged_one_moved_aside(small, camus4, straight, tmp_path):
    """What is newest of a finished run is damaged, and a kill came while one more was written."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    newest = workdir / "checkpoints" / "6"
    shutil.copytree(newest, workdir / "checkpoints" / "7.orbax-checkpoint-tmp-123")
    damage_checkpoint(newest)
    before = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name in "12345")
    out = train_small(workdir, camus4)
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert any("checkpoints/7 is incomplete" in line for line in warnings), out
    assert any("checkpoint 6" in line and "cannot be read" in line for line in warnings), out
    assert f"resume     from step {before}" in out
    assert (workdir / "damaged-checkpoint-6").is_dir()
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert_same_end(workdir, straight, 6)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("RESOURCE_EXHAUSTED: 8 GiB"),
        ValueError('PERMISSION_DENIED: Error opening "cast" driver: Error reading Byte range'),  # as tensorstore says
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(error, tmp_path, monkeypatch):
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    for step in (1, 2):
        checkpoint.save_latest(checkpoints, small_state(float(step), step), {})
    restore = ocp.CheckpointManager.restore
    calls = []

    def fail_once(self, step, **options):
        calls.append(step)
        if len(calls) == 1:
            raise error
        return restore(self, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail_once)
    with pytest.raises(UserError, match=r"checkpoint 2 .*run the same command again"):
        checkpoint.restore_latest(checkpoints, small_state(0.0), print)
    state, _ = checkpoint.restore_latest(checkpoints, small_state(0.0), print)
    checkpoint.close(checkpoints)
    assert int(state.step) == 2 and not list(tmp_path.glob("damaged*"))


@pytest.mark.parametrize("part", ["image", "reference"])
def test_data_that_changed_since_a_run_was_started_are_an_error(part, small, camus4, tmp_path):
    """A corrected reference: the run would be trained on both, and its earlier folds on the old one."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(camus4, data)
    train_small(workdir, data, "--config.train.epochs=2", *_EXPONENTIAL)
    suffix = "_gt.nii.gz" if part == "reference" else "ED.nii.gz"
    path = sorted(p for p in data.rglob(f"*{suffix}"))[0]
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[:4, :4] = 1
    nib.save(nib.Nifti1Image(array, image.affine, image.header), path)
    more = ("--config.train.epochs=3", *_EXPONENTIAL)
    with pytest.raises(UserError, match=path.name.split("_")[0]):
        train.main(arguments(workdir, data, *more))
    shutil.copy(camus4 / path.relative_to(data), path)  # another time, the same content
    train_small(workdir, data, *more)
    train_small(tmp_path / "new", camus4, *more)


def test_half_written_alone_is_a_new_run(tmp_path):
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not checkpoint.exists(tmp_path)
    said = []
    checkpoints = checkpoint.open_checkpoints(tmp_path, said.append)
    assert checkpoint.restore_latest(checkpoints, small_state(0.0), said.append) is None
    checkpoint.close(checkpoints)
    assert len(said) == 1 and "checkpoints/3 is incomplete" in said[0]


def test_every_file_of_a_save_that_fails_is_one_clear_error(tmp_path, monkeypatch):
    """One save writes arrays and JSON files in several threads; each error of them waits to be raised."""
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    state = small_state(1.0)

    def full(path, *args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            return write(path, *args, **kwargs)
        time.sleep(0.0 if "METADATA" in path.name else 0.5)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    write = epath.abstract_path.Path.write_text
    monkeypatch.setattr(epath.abstract_path.Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_best(checkpoints, 1, state.params, state.stats, 0.5)
    with contextlib.suppress(UserError):  # whether one more error waits depends on the threads
        checkpoint.save_latest(checkpoints, state, {})
    with contextlib.suppress(UserError):
        checkpoint.close(checkpoints)
    assert not [t for t in threading.enumerate() if "async_checkpoint" in t.name or "finalize" in t.name.lower()]
    monkeypatch.undo()
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    assert checkpoint.save_best(checkpoints, 1, state.params, state.stats, 0.5)
    checkpoint.close(checkpoints)


# -- pictures, TensorBoard, profile -------------------------------------------------------------------------------


def events_of(workdir):
    """Every event of the TensorBoard files, in order: records of length, CRC, bytes, CRC."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event()
            event.ParseFromString(content[at + 12 : at + 12 + length])
            found.append(event)
            at += length + 16
    return found


def test_the_label_maps_of_the_best_validation_are_evaluated(small, straight, camus4, tmp_path, capsys):
    """They are the bytes that predict writes, and evaluate --workdir predicts nothing."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    cases = json.loads((workdir / "split.json").read_text())["validation"]
    kept = {p.name: p.read_bytes() for p in (workdir / "predictions").iterdir()}
    assert sorted(kept) == sorted(f"{case}.nii.gz" for case in cases)
    assert not [p for p in workdir.rglob(".validation*") if p.is_dir() and any(p.iterdir())]
    assert evaluate.main([f"--workdir={workdir}", "--jobs=1"]) == 0
    assert f"skipped    {len(cases)} of {len(cases)} cases" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (workdir / "predictions").glob("*.nii.gz")} == kept
    structures = json.loads((workdir / "evaluation" / "summary.json").read_text())["structures"]
    best = max(records(workdir, "validation"), key=lambda r: r["dice"])
    with open(workdir / "evaluation" / "cases.csv", newline="") as file:
        scores = list(csv.DictReader(file))
    for name in structures:
        mean = np.mean([float(r["value"]) for r in scores if (r["structure"], r["metric"]) == (name, "dice")])
        assert mean == pytest.approx(best[f"dice_{name}"], abs=1e-9)
    # the same with the two other commands, on the folder of the data
    command = [f"--workdir={workdir}", f"--input={camus4}", f"--output={tmp_path / 'all'}"]
    assert predict.main(command) == 0
    command = ["--rules=camus", f"--pred={tmp_path / 'all'}", f"--ref={camus4}", f"--out={tmp_path / 'eval'}"]
    assert evaluate.main([*command, "--jobs=1"]) == 0
    with open(tmp_path / "eval" / "cases.csv", newline="") as file:
        again = list(csv.DictReader(file))
    first, second = (
        {(r["case_id"], r["structure"], r["metric"]): r["value"] for r in rows if r["case_id"] in cases}
        for rows in (scores, again)
    )
    assert first == second and len(first) >= 3 * len(cases)

    predict_validation(workdir, tmp_path / "again")
    corrected = workdir / "predictions" / f"{cases[0]}.nii.gz"  # by hand: another program writes another description
    image = nib.load(corrected)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), corrected)
    before = corrected.read_bytes()
    shutil.copytree(workdir / "predictions", tmp_path / "own")
    for folder in (workdir / "predictions", tmp_path / "own"):
        with pytest.raises(UserError, match="not a prediction"):
            predict_validation(workdir, folder)
        assert (folder / corrected.name).read_bytes() == before
    shutil.rmtree(workdir / "predictions")
    predict_validation(workdir, tmp_path / "anew")
    for folder in ("again", "anew"):
        assert {p.name: p.read_bytes() for p in (tmp_path / folder).glob("*.nii.gz")} == kept


def test_only_the_label_maps_of_the_best_weights_are_kept(tmp_path, capsys):
    """Worse weights, an interrupted validation and a full disk leave those of the best weights."""
    image = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), image)
    case = data_case.Case("a", "a", (image,), ("T1",), None, Labels("own", ("background", "organ"), (0, 1)))
    maps = label_maps.LabelMapWriter(tmp_path / "run", lambda weights: f"digest{weights}")

    def validate(number, *, kept):
        maps.begin(number)
        maps.write(case, np.full((6, 5, 4), number % 2, np.uint8))
        maps.keep() if kept else maps.discard()

    def found():
        path = tmp_path / "run" / "predictions" / "a.nii.gz"
        return nifti.read_note(path).split()[1], int(nib.load(path).get_fdata().max())

    validate(1, kept=True)
    assert found() == ("digest1", 1)
    validate(2, kept=False)
    assert found() == ("digest1", 1)
    staging = tmp_path / "run" / ".validation" / "0"
    shutil.rmtree(staging, ignore_errors=True)
    staging.write_text("a file, so that no file can be written below it")
    validate(4, kept=True)
    assert found() == ("digest1", 1) and "not kept" in capsys.readouterr().out
    staging.unlink()
    validate(6, kept=True)
    assert found() == ("digest6", 0)
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), 7, np.uint8), np.eye(4)), tmp_path / "run" / "predictions" / "a.nii.gz")
    before = (tmp_path / "run" / "predictions" / "a.nii.gz").read_bytes()
    validate(8, kept=True)
    assert (tmp_path / "run" / "predictions" / "a.nii.gz").read_bytes() == before
    assert "predictions/a.nii.gz" in capsys.readouterr().out


def test_validation_cases_are_drawn(straight, camus4):
    """Image, reference, prediction side by side, twice as large, above legend and Dice; the first two cases."""
    cases = json.loads((straight / "split.json").read_text())["validation"][:2]
    assert sorted(p.name for p in (straight / "overlays").iterdir()) == [f"{c}.png" for c in sorted(cases)]
    for case in cases:
        picture = np.asarray(Image.open(straight / "overlays" / f"{case}.png"))
        (path,) = camus4.rglob(f"{case}.nii.gz")
        (truth,) = camus4.rglob(f"{case}_gt.nii.gz")
        pixels = np.asarray(nib.load(path).dataobj).squeeze().T  # files are (x, y)
        assert pixels.shape == (64, 96) and picture.shape[1] == 2 * 3 * 96 and picture.dtype == np.uint8
        caption, picture = picture[128:], picture[:128:2, ::2]
        red, white = (caption.astype(int) @ weights for weights in ([1, -1, -1], [-1, 1, 1]))
        assert red.max() > 60 and white.max() > 120, "a name in red, and white numbers"
        image, reference = picture[:, :96].astype(int), picture[:, 96:192].astype(int)
        assert np.corrcoef(image[..., 0].ravel(), pixels.ravel())[0, 1] > 0.95
        assert (image == image[..., :1]).all(), "the image is grey"
        coloured = (reference != image).any(-1)
        mask = np.asarray(nib.load(truth).dataobj).squeeze().T > 0
        assert mask.any() and not (coloured & ~mask).any(), "only what is labelled is coloured"
        assert coloured[mask].mean() > 0.95, "but for pixels that are of that colour already"


def test_tensorboard_has_scalars_and_pictures(straight):
    values = [(e.step, v) for e in events_of(straight) for v in e.summary.value]
    losses = {s: v.simple_value for s, v in values if v.tag == "train/loss"}
    assert losses == pytest.approx({r["step"]: r["loss"] for r in records(straight, "train")})
    cases = json.loads((straight / "split.json").read_text())["validation"][:2]
    for case in cases:
        pictures = [(s, v.image) for s, v in values if v.tag == f"validation/{case}"]
        assert [s for s, _ in pictures] == [2, 4, 6]
        kept = np.asarray(Image.open(straight / "overlays" / f"{case}.png"))
        shown = np.asarray(Image.open(io.BytesIO(pictures[-1][1].encoded_image_string)).convert("RGB"))
        np.testing.assert_array_equal(shown, kept)


def test_an_early_prediction_does_not_choose_the_slice():
    image, predicted = np.zeros((2, 4, 4), np.float32), np.ones((2, 4, 4), np.uint8)
    reference = np.zeros((2, 4, 4), np.uint8)
    reference[1, 2, 2] = 1
    assert validation.draw(image, reference, predicted)[2, 4 + 2].tolist() == [107, 20, 20]
    predicted[0, 0, 0] = 0
    shown = validation.draw(image, np.zeros_like(reference), predicted)  # no structure: where most was predicted
    assert (shown[:, 4:8] == 0).all() and (shown[:, 8:] != 0).any(-1).all()


def test_ct_is_drawn_in_the_window_for_soft_tissue():
    """-140 HU is black, 260 HU white, and 60 HU in the middle, whatever else is in the slice."""
    image = np.full((1, 8, 8), -1000, np.float32)
    image[0, 0, :4] = (-140, 60, 260, 3000)
    picture = validation.draw(image, np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 8), np.uint8))
    assert picture[0, :4, 0].tolist() == [0, 128, 255, 255] and not picture[1:, :8].any()


def test_the_slice_with_most_structure_is_drawn():
    """By hand: slice 1 of 2, which has the values 0 and 100."""
    image = np.zeros((2, 4, 6), np.float32)
    image[1, :, 3:] = 100
    reference, predicted = np.zeros((2, 2, 4, 6), np.uint8)
    reference[1, 0, 0], reference[1, 0, 5], predicted[1, 3, 1] = 1, 2, 3
    reference[0, 0, 0] = 1
    picture = validation.draw(image, reference, predicted)
    assert picture.shape == (4, 18, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[:, :3], 0)
    np.testing.assert_array_equal(picture[:, 3:6], 255)
    assert picture[0, 6].tolist() == [107, 20, 20]  # half of red (214, 39, 40) on black
    green = picture[0, 11].astype(float)  # half of green (44, 160, 44) on white
    np.testing.assert_allclose(green, (255 + np.array([44, 160, 44])) / 2, atol=0.5)
    yellow = picture[3, 13].astype(float)
    np.testing.assert_allclose(yellow, np.array([255, 215, 0]) / 2, atol=0.5)


def test_a_profile_is_written(tmp_path, capsys):
    """Steps 3 and 4 of this start."""
    go_on(tmp_path, config={"profile_start": 2, "profile_steps": 2, "epochs": 1})
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "profile    of 2 steps" in capsys.readouterr().out


def test_no_profile_is_written_unasked(straight):
    assert not (straight / "profile").exists()


# -- the watchdog -------------------------------------------------------------------------------------------------


class SlowEntry:
    """A case that takes its time."""

    folder, patient, structures, shape = Path("/nowhere"), "p", (), (1, 4, 4)

    def __init__(self, case_id, seconds):
        self.case_id, self._seconds = case_id, seconds

    def load(self):
        time.sleep(self._seconds)
        zeros, box = np.zeros((1, 4, 4, 1), np.float32), (slice(0, 1), slice(0, 4), slice(0, 4))
        return Prepared(zeros, zeros[..., 0].astype(np.uint8), (0.0,), (1.0,), False, box, (1, 4, 4), (1.0,) * 3)


def watched(entries, seconds, steps):
    """What the watchdog says over some batches of one sample, read by one thread."""
    said, activity = [], pipeline.Activity()
    stream = pipeline.make_stream(
        entries, sampling="slices", size=(1, 4, 4), foreground=0.0, patches_per_case=1, batch=1, seed=0, start_step=0,
        threads=1, activity=activity,
    )  # fmt: skip
    with watchdog.Watchdog(seconds, activity, said.append) as dog:
        for _ in range(steps):
            dog.next(stream)
    return said


def test_the_watchdog_names_the_case_that_a_reader_is_busy_with():
    said = watched([SlowEntry("patient0007_2CH_ED", 1.6)], 0.4, 1)
    assert said and all("patient0007_2CH_ED" in line and line.startswith("waiting ") for line in said)
    assert 2 <= len(said) <= 4, "again after every further so many seconds"


def test_the_watchdog_is_quiet_while_batches_come_and_when_it_is_off():
    assert watched([SlowEntry("quick", 0.0)], 2.0, 20) == []
    assert watched([SlowEntry("slow", 0.5)], 0.0, 1) == []


def test_the_watchdog_is_quiet_between_batches():
    """A long validation is no lack of data."""
    said = []
    with watchdog.Watchdog(0.1, pipeline.Activity(), said.append) as dog:
        dog.next(iter([{}]))
        time.sleep(0.5)
    assert said == []


def test_the_loop_has_a_watchdog(tmp_path, capsys):
    def slow():
        for at, batch in enumerate(batches()):
            if at == 2:
                time.sleep(0.8)
            yield batch

    go_on(tmp_path, slow(), config={"epochs": 1, "watchdog_seconds": 0.3})
    assert "for a batch: no thread is reading" in capsys.readouterr().out


# -- trackers -----------------------------------------------------------------------------------------------------


class Wandb:
    """Writes down what it is told."""

    def __init__(self):
        self.calls, self.modes = [], []

    def module(self):
        def init(**options):
            self.calls.append(("init", options))
            self.modes.append(os.environ.get("WANDB_MODE"))
            return types.SimpleNamespace(
                log=lambda values, step: self.calls.append(("log", step, values)),
                finish=lambda: self.calls.append(("finish",)),
            )

        return types.SimpleNamespace(init=init, Image=lambda array: ("image", array.shape))

    def named(self, name):
        return [call for call in self.calls if call[0] == name]


class Mlflow(Wandb):
    def module(self):
        def keep(name):
            return lambda *values, **options: self.calls.append((name, values, options))

        def start_run(run_id=None, run_name=None):
            self.calls.append(("start_run", run_id, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or f"id{len(self.calls)}"))

        def set_tracking_uri(uri):
            self.calls.append(("set_tracking_uri", (uri,), {}))
            os.environ["MLFLOW_TRACKING_URI"] = uri  # as MLflow does

        names = (
            *("set_experiment", "get_experiment_by_name", "create_experiment"),
            *("log_params", "log_metrics", "log_image", "end_run"),
        )
        return types.SimpleNamespace(
            start_run=start_run, set_tracking_uri=set_tracking_uri, **{name: keep(name) for name in names}
        )


@pytest.fixture
def fakes(monkeypatch):
    """Both packages; and an environment that says nothing of them, put back afterwards."""
    found = {"wandb": Wandb(), "mlflow": Mlflow()}
    for name, fake in found.items():
        monkeypatch.setitem(sys.modules, name, fake.module())
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return found


def test_a_tracker_that_fails_is_closed(fakes, tmp_path):
    """Else the next run of the process, such as the next fold, would be logged into this one."""
    closed = []

    class Failing:
        def scalars(self, step, values):
            raise ConnectionError("no server")

        def close(self):
            closed.append(1)

    recorder = records_module.open_recorder(tmp_path, 0, writes=True, trackers=[Failing()])
    records_module.record(recorder, "train", 1, {"loss": 1.0})
    records_module.record(recorder, "train", 2, {"loss": 1.0})
    close_recorder(recorder)
    assert closed == [1]


def test_a_workdir_whose_name_is_a_pattern_is_refused(small, camus4, tmp_path):
    """orbax could not read its checkpoints again."""
    with pytest.raises(UserError, match=r"run\[lr=1\], has one of the characters"):
        train_small(tmp_path / "run[lr=1]", camus4)


def test_trackers_get_everything_and_go_on_after_a_resume(fakes, small, camus4, tmp_path, monkeypatch):
    wandb, mlflow = fakes["wandb"], fakes["mlflow"]
    workdir, options = tmp_path / "my_run", ("--config.train.wandb=hearts", "--config.train.mlflow=echo")
    original = step_metrics.say

    def say(line):
        if line.startswith("step 3/6"):
            os.kill(os.getpid(), signal.SIGTERM)
        original(line)

    monkeypatch.setattr(step_metrics, "say", say)
    train_small(workdir, camus4, *options, code=75)
    monkeypatch.setattr(step_metrics, "say", original)
    train_small(workdir, camus4, *options)

    config = json.loads((workdir / "config.json").read_text())
    inits = [call[1] for call in wandb.named("init")]
    assert len(inits) == 2 and inits[0]["id"] == inits[1]["id"] and inits[0]["id"]
    assert inits[1]["resume"] == "allow" and inits[0]["project"] == "hearts"
    assert Path(inits[0]["dir"]) == workdir
    assert json.loads(json.dumps(inits[0]["config"])) == config
    assert wandb.modes == ["offline"] * 2
    assert len(wandb.named("finish")) == 2 and wandb.calls[-1] == ("finish",)
    logged = {}
    for _, at, values in wandb.named("log"):
        logged.setdefault(at, {}).update(values)
    for kind, keys in {
        "train": ("loss", "learning_rate"),
        "validation": ("dice", "dice_LA"),
        "epoch": ("score",),
    }.items():
        for r in records(workdir, kind):
            for key in keys:
                assert logged[r["step"]][f"{kind}/{key}"] == pytest.approx(r[key])
    case = json.loads((workdir / "split.json").read_text())["validation"][0]
    assert logged[6][f"validation/{case}"] == (
        "image",
        np.asarray(Image.open(workdir / "overlays" / f"{case}.png")).shape,
    )
    assert all(
        math.isfinite(v) for _, _, values in wandb.named("log") for v in values.values() if not isinstance(v, tuple)
    )

    starts = mlflow.named("start_run")
    assert starts[0][1] is None and len(starts) == 2
    assert starts[1][1] == (workdir / "mlflow_run").read_text().strip() and starts[1][1].startswith("id")
    assert {call[1] for call in mlflow.named("set_tracking_uri")} == {(f"sqlite:///{workdir.absolute()}/mlflow.db",)}
    assert mlflow.named("set_experiment")[0][1] == ("echo",)
    (params,) = mlflow.named("log_params")
    assert params[1][0]["optim.b1"] == "0.95" and params[1][0]["train.epochs"] == "3"
    metrics = {call[2]["step"]: call[1][0] for call in mlflow.named("log_metrics") if "validation/dice" in call[1][0]}
    assert {k: v["validation/dice"] for k, v in metrics.items()} == pytest.approx(
        {r["step"]: r["dice"] for r in records(workdir, "validation")}
    )
    assert any(case in call[1][1] for call in mlflow.named("log_image"))
    assert len(mlflow.named("end_run")) == 2


def tracker_config(**names):
    return load_config(RECIPE, [f"--config.train.{key}={value}" for key, value in names.items()])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_its_extra(name, fakes, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # what import finds where there is no such package
    with pytest.raises(UserError, match=rf"config\.train\.{name} needs the package {name}.*xdim_jax\[{name}\]"):
        trackers.open_trackers(tracker_config(**{name: "x"}), tmp_path)


def test_the_extras_that_the_message_names_exist():
    import tomllib

    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"wandb", "mlflow"} <= extras.keys()


def test_a_tracker_that_cannot_be_opened_is_one_message(fakes, monkeypatch, tmp_path):
    def refuse(**options):
        raise RuntimeError("no account\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(
        UserError, match=r"config\.train\.wandb=x: cannot be opened: no account; .*config\.train\.wandb="
    ):
        trackers.open_trackers(tracker_config(wandb="x"), tmp_path)


def test_trackers_are_online_where_the_environment_says_so(fakes, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    opened = trackers.open_trackers(tracker_config(wandb="x", mlflow="y"), tmp_path)
    assert len(opened) == 2 and fakes["wandb"].modes == ["online"]
    assert not fakes["mlflow"].named("set_tracking_uri"), "mlflow reads the variable itself"
    assert trackers.open_trackers(tracker_config(), tmp_path) == []


def test_runs_of_the_same_name_elsewhere_are_other_runs_of_wandb(fakes, tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "fold0").mkdir(parents=True)
        trackers.open_trackers(tracker_config(wandb="x"), tmp_path / parent / "fold0")
    first, second = (call[1]["id"] for call in fakes["wandb"].named("init"))
    assert first != second


# -- verify_run ---------------------------------------------------------------------------------------------------


def make_workdir(workdir, *, seed=0, log_every=5, value=1.0, steps=4):
    """A workdir as a run leaves it, of small arrays."""
    workdir.mkdir(parents=True)
    config = {
        "seed": seed,
        "model": {"name": "x"},
        "data": {"batch": 2},
        "predict": {},
        "train": {"log_every": log_every},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    entries = [
        {"step": i, "loss": 1 / i, "grad_norm": 1.5, "update_norm": 0.25, "batch": [10 * i, 10 * i + 1]}
        for i in range(1, steps + 1)
    ]
    (workdir / "steps.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    checkpoints = checkpoint.open_checkpoints(workdir)
    checkpoint.save_latest(checkpoints, small_state(value, steps), {})
    checkpoint.close(checkpoints)
    return workdir


def verified(a, b, capsys):
    code = verify_run.main([str(a), str(b)])
    return code, capsys.readouterr().out


def test_the_same_run_is_the_same(tmp_path, capsys):
    a, b = (make_workdir(tmp_path / n, log_every=i) for i, n in enumerate("ab", 1))
    code, out = verified(a, b, capsys)
    assert (
        code == 0 and "the runs are equal" in out and "4 recorded" in out and "checkpoints/4: all bits are equal" in out
    )
    assert "log_every" not in out


def change_step(workdir, at, **values):
    path = workdir / "steps.jsonl"
    entries = [e | (values if e["step"] >= at else {}) for e in lines_of(path)]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": 0.75}, "at step 3: loss: 0.33333"),
        ({"grad_norm": math.nextafter(1.5, 2)}, "at step 3: grad_norm: 1.5 and 1.5000000000000002"),
        ({"update_norm": 0.5}, "at step 3: update_norm: 0.25 and 0.5"),
        ({"batch": [30, 7]}, "at step 3: batch: samples 1"),
    ],
)
def test_the_first_step_where_runs_part_is_named(values, words, tmp_path, capsys):
    a, b = make_workdir(tmp_path / "a"), make_workdir(tmp_path / "b")
    change_step(b, 3, **values)
    for pair in ((a, b), (b, a)):
        code, out = verified(*pair, capsys)
        assert code == 1 and "at step 3:" in out and next(iter(values)) in out and "the runs differ" in out
        assert "checkpoints/4: all bits are equal" in out
        others = {"loss", "grad_norm", "update_norm", "batch"} - values.keys()
        assert not any(f"{other}:" in out for other in others)
        if pair[0] is a:
            assert words in out


def test_an_array_that_differs_is_named(tmp_path, capsys):
    """One bit of one array, in a checkpoint that is written anew."""
    a, b = make_workdir(tmp_path / "a"), make_workdir(tmp_path / "b")
    shutil.rmtree(b / "checkpoints")
    state = small_state(1.0, 4)
    slow = state.params.slow["w"].at[2].set(np.nextafter(np.float32(0.5), np.float32(1)))
    checkpoints = checkpoint.open_checkpoints(b)
    checkpoint.save_latest(checkpoints, state._replace(params=state.params._replace(slow={"w": slow})), {})
    checkpoint.close(checkpoints)
    code, out = verified(a, b, capsys)
    assert code == 1 and "checkpoints/4: 1 arrays differ: params.slow.w" in out
    assert "4 recorded in both runs, all equal" in out


def test_a_run_that_stopped_half_way_is_not_equal_to_one_that_finished(tmp_path, capsys):
    a, b = make_workdir(tmp_path / "a"), make_workdir(tmp_path / "b")
    path = b / "steps.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in lines_of(path) if e["step"] <= 2))
    for pair in ((a, b), (b, a)):
        code, out = verified(*pair, capsys)
        assert code == 1 and "2 recorded in only one of the runs: 3, 4" in out and "the runs differ" in out


def test_zeros_of_another_sign_differ(tmp_path, capsys):
    a, b = make_workdir(tmp_path / "a", value=0.0), make_workdir(tmp_path / "b", value=-0.0)
    code, out = verified(a, b, capsys)
    assert code == 1 and "params.fast.w" in out


def test_a_finished_run_is_continued_to_more_epochs(small, camus4, tmp_path):
    """With a schedule that does not depend on the length, the result is that of a run of that length."""
    train_small(tmp_path / "long", camus4, *_EXPONENTIAL, "--config.train.epochs=4")
    train_small(tmp_path / "run", camus4, *_EXPONENTIAL, "--config.train.epochs=2")
    out = train_small(tmp_path / "run", camus4, *_EXPONENTIAL, "--config.train.epochs=4")
    assert "changed    config.train.epochs: 2 before, 4 from now on" in out and "resume     from step 4" in out
    assert_same_end(tmp_path / "run", tmp_path / "long", 8)
    scores = [[(r["step"], r["dice"]) for r in records(w, "validation")] for w in (tmp_path / "run", tmp_path / "long")]
    assert scores[0] == scores[1] and len(scores[0]) == 4
    with pytest.raises(UserError, match=r"train\.epochs: 4 in config\.json, 2 now"):
        train.main(arguments(tmp_path / "run", camus4, *_EXPONENTIAL, "--config.train.epochs=2"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["epochs"] == 4


def test_validation_may_become_rarer_in_a_run_that_goes_on(small, camus4, tmp_path):
    train_small(tmp_path / "run", camus4, "--config.train.epochs=1")
    more = ("--config.train.epochs=4", "--config.train.validate_every=3", "--config.train.patience=9")
    out = train_small(tmp_path / "run", camus4, *more)
    assert "validate   every 3 epochs (6 steps), and at the end" in out
    assert [r["step"] for r in records(tmp_path / "run", "validation")] == [2, 6, 8]


def test_another_seed_parts_at_the_first_step(small, camus4, straight, tmp_path, capsys):
    train_small(tmp_path / "run", camus4, "--config.seed=1")
    code, out = verified(straight, tmp_path / "run", capsys)
    assert code == 1 and "seed: 0 and 1" in out and "at step 1: " in out and "loss" in out
    assert "arrays differ" in out


def test_runs_that_were_only_told_otherwise_are_the_same(small, camus4, straight, tmp_path, capsys):
    train_small(tmp_path / "run", camus4, "--config.train.log_every=5", "--config.train.checkpoint_steps=1")
    code, out = verified(straight, tmp_path / "run", capsys)
    assert code == 0 and "6 recorded in both runs, all equal" in out and "checkpoints/6: all bits" in out


def unusable(name, folder):
    good = make_workdir(folder / "good")
    bad = folder / "bad"
    if name == "empty":
        bad.mkdir()
    elif name == "config":
        shutil.copytree(good, bad)
        (bad / "config.json").write_text("{")
    elif name == "nothing in common":
        make_workdir(bad, steps=3)
        (bad / "steps.jsonl").unlink()
    elif name == "damaged":
        shutil.copytree(good, bad)
        for path in (bad / "checkpoints").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:10])
    elif name == "emptied":
        shutil.copytree(good, bad)
        shutil.rmtree(bad / "checkpoints" / "4")
        (bad / "checkpoints" / "4").mkdir()
    return good, bad


UNUSABLE = {
    "absent": "is not the workdir of a run",
    "empty": "is not the workdir of a run",
    "config": r"config\.json is not JSON",
    "nothing in common": "no step and no checkpoint in common",
    "damaged": r"bad/checkpoints/4 cannot be read",
    "emptied": r"bad/checkpoints/4 cannot be read",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_folders_are_one_clear_message(name, tmp_path, monkeypatch, capsys):
    good, bad = unusable(name, tmp_path)
    for pair in ((good, bad), (bad, good)):
        monkeypatch.setattr(sys, "argv", ["verify_run", *map(str, pair)])
        with pytest.raises(SystemExit) as ended:
            verify_run.command()
        assert ended.value.code == 2
        assert re.search(rf"^error: .*{UNUSABLE[name]}", capsys.readouterr().err)


# -- cross-validation ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_fold_is_trained_and_summed_up(small, camus4, tmp_path):
    workdir, all_folds = tmp_path / "cv", {"words": ",fold=all"}
    train_small(workdir, camus4, **all_folds)
    splits = [json.loads((workdir / f"fold{i}" / "split.json").read_text()) for i in (0, 1)]
    assert len(splits[0]["validation"]) == 8 and set(splits[0]["validation"]) == set(splits[1]["train"])
    best = []
    for i in (0, 1):
        assert json.loads((workdir / f"fold{i}" / "config.json").read_text())["data"]["fold"] == i
        best.append(max(records(workdir / f"fold{i}", "validation"), key=lambda r: r["dice"]))
    found = json.loads((workdir / "crossval.json").read_text())
    for key in ("dice", "dice_LV_endo", "dice_LV_epi", "dice_LA"):
        a, b = best[0][key], best[1][key]
        assert found["mean"][key] == pytest.approx((a + b) / 2, abs=1e-12)
        assert found["sd"][key] == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-12)
        assert [found["folds"][f"fold{i}"][key] for i in (0, 1)] == [a, b]
    assert [found["folds"][f"fold{i}"]["step"] for i in (0, 1)] == [r["step"] for r in best]

    # every case is predicted by the fold that did not train on it
    assert evaluate.main([f"--workdir={workdir}", "--jobs=1"]) == 0
    record = json.loads((workdir / "evaluation" / "evaluate.json").read_text())
    assert set(record["cases"]) == {*splits[0]["validation"], *splits[1]["validation"]} and len(record["cases"]) == 16
    for i in (0, 1):
        digest = predictor.Predictor(workdir / f"fold{i}").digest
        for name in splits[i]["validation"]:
            assert digest in nifti.read_note(workdir / "predictions" / f"{name}.nii.gz")

    kept = arrays_of(workdir / "fold1" / "checkpoints" / "6" / "state")
    shutil.rmtree(workdir / "fold1")
    out = train_small(workdir, camus4, **all_folds)
    assert out.count("compile    train step took") == 1 and "resume     from step 6" in out, "fold 0 is done"
    again = arrays_of(workdir / "fold1" / "checkpoints" / "6" / "state")
    assert all(again[n].tobytes() == a.tobytes() for n, a in kept.items())
    assert json.loads((workdir / "crossval.json").read_text()) == found

    # a fold that is a job of its own is the same run
    train_small(tmp_path / "alone", camus4, words=",fold=1")
    alone = arrays_of(tmp_path / "alone" / "checkpoints" / "6" / "state")
    assert all(alone[n].tobytes() == a.tobytes() for n, a in kept.items())


def write_validations(workdir, *scores):
    workdir.mkdir(parents=True)
    lines = [{"kind": "train", "step": 1, "loss": 9.0}]
    lines += [{"kind": "validation", "step": s, "time": 1.0, "dice": d, "dice_a": a} for s, d, a in scores]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))


def test_the_summary_of_records_made_by_hand(tmp_path):
    """Best Dice 0.8, 0.6, 0.7: mean 0.7, sd 0.1; of region a 0.9, 0.3, 0.6: mean 0.6, sd 0.3."""
    write_validations(tmp_path / "fold0", (4, 0.5, 0.95), (8, 0.8, 0.9), (12, 0.7, 0.99))
    write_validations(tmp_path / "fold1", (4, 0.6, 0.3))
    write_validations(tmp_path / "fold2", (4, 0.1, 0.2), (8, 0.7, 0.6))
    found = crossval.summarise(tmp_path, 3)
    assert found["folds"] == {
        "fold0": {"step": 8, "dice": 0.8, "dice_a": 0.9},
        "fold1": {"step": 4, "dice": 0.6, "dice_a": 0.3},
        "fold2": {"step": 8, "dice": 0.7, "dice_a": 0.6},
    }
    assert found["mean"] == pytest.approx({"dice": 0.7, "dice_a": 0.6})
    assert found["sd"] == pytest.approx({"dice": 0.1, "dice_a": 0.3})
    lines = crossval.format_summary(found)
    assert [line.split() for line in lines] == [
        ["dice", "dice_a"],
        ["fold0", "0.800", "0.900"],
        ["fold1", "0.600", "0.300"],
        ["fold2", "0.700", "0.600"],
        ["mean", "0.700", "0.600"],
        ["sd", "0.100", "0.300"],
    ]
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(UserError, match=r"fold3 has no .*train fold 3"):
        crossval.summarise(tmp_path, 4)


def test_the_summary_if_folds_lack_a_region(tmp_path):
    """Region a is annotated in one fold, and b in two of three. A value that does not exist is not in the JSON file."""
    scores = [{"dice_a": 0.5, "dice_b": 0.7}, {"dice_b": 0.9}, {"dice_c": 0.3}]
    for number, values in enumerate(scores):
        folder = tmp_path / f"fold{number}"
        folder.mkdir()
        line = {"kind": "validation", "step": 4, "time": 1.0, "dice": np.mean([*values.values()]), **values}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = crossval.summarise(tmp_path, 3)
    assert found["mean"] == pytest.approx({"dice": 0.6, "dice_a": 0.5, "dice_b": 0.8, "dice_c": 0.3})
    assert found["sd"] == pytest.approx({"dice": 0.3, "dice_b": 0.2 / math.sqrt(2)})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    lines = [line.split() for line in crossval.format_summary(found)]
    assert lines[0] == ["dice", "dice_a", "dice_b", "dice_c"] and lines[3] == ["fold2", "0.300", "-", "-", "0.300"]
    assert lines[-1] == ["sd", "0.300", "-", "0.141", "-"]


def test_all_folds_of_a_list_that_came_with_the_data(tmp_path, monkeypatch):
    config = load_config(f"{RECIPE},fold=all", ["--config.data.split=official"])
    begun = []
    every = lambda runs: begun.extend((c.data.fold, w.name) for c, w in runs) or 75  # noqa: E731
    with pytest.raises(UserError, match=r"give --config\.data\.root"):
        crossval.train_folds(config, tmp_path, every)
    config.data.root = str(tmp_path)
    for count in (1, 3):
        lists = [{"training": ("a",), "validation": ("b",)}] * count
        monkeypatch.setattr(crossval, "scan_cases", lambda *_, lists=lists, **__: Scan([], [], tuple(lists)))
        monkeypatch.setattr(crossval, "_check_cases", lambda *_: None)
        if count == 1:
            with pytest.raises(UserError, match="1 folds"):
                crossval.train_folds(config, tmp_path, every)
    assert crossval.train_folds(config, tmp_path, every) == 75
    assert begun == [(0, "fold0"), (1, "fold1"), (2, "fold2")]


def test_a_case_that_is_too_large_is_found_before_the_first_fold(camus4, tmp_path):
    """Every case is a training case of a fold, so its size matters even if the first fold only validates it."""
    own = [
        f"--config.data.root={camus4}",
        f"--config.data.store={tmp_path / 'store'}",
        "--config.data.prepare.size=(64,64)",
    ]
    config, begun = (
        load_config(f"{RECIPE},fold=all", [*own, "--config.data.patch=(32,32)", "--config.data.folds=2"]),
        [],
    )
    with pytest.raises(UserError, match=r"1x64x64 .*config\.data\.patch=\(32, 32\)"):
        crossval.train_folds(config, tmp_path / "cv", lambda runs: begun.append(runs) or 0)
    assert not begun


def test_every_process_with_a_disk_of_its_own_writes_the_phantoms(tmp_path):
    """As with a workdir in a bucket, which the processes read before the first one has written to it."""
    config, dataset = check.resolve_config(
        load_config(RECIPE, ["--config.data.phantom.cases=5", "--config.data.phantom.held_out=0"])
    )
    found = []
    for name, first in (("a", True), ("b", False)):
        output, workdir = make_output(config.output, dataset), tmp_path / name
        options = {"started": False, "first": first, "separate_disks": True}
        found.append(find_data(config.data, 0, dataset, output, workdir, **options))
    images = [sorted((tmp_path / name / "phantom" / "train").rglob("*.nii.gz")) for name in "ab"]
    assert len(images[0]) > 2 and len(images[0]) == len(images[1])
    for a, b in zip(*images, strict=True):
        np.testing.assert_array_equal(read_volume(a)[0], read_volume(b)[0])
    assert [e.case_id for e in found[0].train] == [e.case_id for e in found[1].train]


def test_a_fold_that_is_stopped_stops_all(tmp_path, monkeypatch):
    config = load_config(f"{RECIPE},fold=all", [])
    begun = []

    def one(chosen, workdir):
        begun.append((chosen.data.fold, workdir.name))
        return 75 if chosen.data.fold == 1 else 0

    def train_one(chosen, dataset, workdir, stop, **options):
        return one(chosen, workdir)

    monkeypatch.setattr(training, "train_run", train_one)
    monkeypatch.setattr(training, "resolve_config", lambda chosen: (chosen, None))
    every = lambda runs: training.train_one_by_one(runs, loop.StopRequest())  # noqa: E731
    assert crossval.train_folds(config, tmp_path, every) == 75
    assert begun == [(0, "fold0"), (1, "fold1")] and not (tmp_path / "crossval.json").exists()
    assert config.data.fold == -1, "the config given is as it was"


def test_what_has_no_folds_is_refused(small, camus4, tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.split=official"):
        train_small(tmp_path / "a", camus4, "--config.data.split=official", words=",fold=all")
    make_workdir(tmp_path / "single")
    with pytest.raises(UserError, match=r"/single .* single run.* fold=all"):
        train_small(tmp_path / "single", camus4, words=",fold=all")
    with pytest.raises(UserError, match=r"config\.data\.folds=1"):
        train_small(tmp_path / "b", camus4, "--config.data.folds=1", words=",fold=all")


# -- what a run starts from ---------------------------------------------------------------------------------------


def no_network(monkeypatch):
    def ask(*arguments, **options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)


def assert_says_what_to_do(name):
    with pytest.raises(UserError) as error:
        initial_weights.read_named(name)
    text = str(error.value)
    assert "Name or service not known" in text and "--from-file" in text and ":scratch" in text
    assert f"--model={name}" in text and "--config.init.weights=" in text


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    no_network(monkeypatch)
    assert_says_what_to_do("tf_efficientnet_b0_ns")


def test_without_a_network_the_message_for_the_recipes_own_name_says_what_to_do(monkeypatch):
    no_network(monkeypatch)
    name = load_config("configs/camus_omnianet.py", []).init.weights
    assert name == "tf_efficientnet_b0.ns_jft_in1k"
    assert_says_what_to_do(name)


def test_a_file_or_a_path_is_not_looked_for_in_the_hub(monkeypatch, tmp_path):
    no_network(monkeypatch)
    for name in ("weights.safetensors", "some/where", str(tmp_path / "w")):
        with pytest.raises(UserError, match="does not exist"):
            initial_weights.read_named(name)


RESNET = ["--config.model.encoder.name=resnet18", "--config.model.filters=(8,8,8,8,8)"]


@pytest.fixture(scope="module")
def ported(tmp_path_factory):
    """timm's ResNet-18 of seeded random weights: its state, and the files before and after weight_port."""
    import torch

    from weight_port.__main__ import main as port
    from weight_port.sources import import_timm

    torch.manual_seed(0)
    model = import_timm().create_model("resnet18", pretrained=False)
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    folder = tmp_path_factory.mktemp("ported")
    save_file(state, folder / "model.safetensors")
    source = [f"--from-file={folder / 'model.safetensors'}", f"--out={folder / 'resnet.safetensors'}"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert port(["--source=timm", "--model=resnet18.a1_in1k", *source]) == 0
    return state, folder


def load_resnet(path, *options):
    """Puts a file into an Omnia-Net of zeros."""
    config = load_config(RECIPE, [*RESNET, f"--config.init.weights={path}", *options])
    _, params, stats = split_model(networks.build_abstract(config.model))
    zeros = [jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree) for tree in (params, stats)]
    params, stats, report = initial_weights.initialise(config.init, config.model, config.seed, *zeros)
    return params, stats, json.loads(json.dumps(report))


def test_a_ported_file_fills_the_encoder_and_the_report_says_how(ported, capsys):
    state, folder = ported
    params, stats, report = load_resnet(folder / "resnet.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert report["coverage"] == 1.0 and report["random"] == []
    assert report["source"]["sha256"] == digest and report["weights"] == str(folder / "resnet.safetensors")
    arrays = flatten(params) | flatten(stats)
    inside = {name for name in arrays if name.startswith("encoder.")}
    assert report["arrays"].keys() == inside, "what was done to every array, and to nothing else"
    stem = "encoder.conv1.kernel"
    assert report["arrays"].pop(stem).startswith("channels by cycle") and set(report["arrays"].values()) == {"copied"}
    # the stem's input is not RGB: channels in turn, scaled so that equal channels sum to the same
    kernel, channels = state["conv1.weight"].transpose(2, 3, 1, 0), arrays[stem].shape[2]
    expected = kernel[:, :, np.arange(channels) % 3] * 3 / channels
    np.testing.assert_allclose(arrays[stem], expected, rtol=1e-5)
    deep = "encoder.layer1.0.conv1.kernel"
    np.testing.assert_array_equal(arrays[deep], state["layer1.0.conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(arrays["encoder.layer4.1.bn2.var"], state["layer4.1.bn2.running_var"])
    assert not any(a.any() for name, a in arrays.items() if name not in inside), "the decoder is as it was"
    out = capsys.readouterr().out
    assert "100 % of the encoder" in out and digest in out


def test_a_file_that_lacks_an_array_fails_unless_it_may(ported, tmp_path):
    _, folder = ported
    whole = initial_weights.read_named(str(folder / "resnet.safetensors"))
    arrays = {n: a for n, a in whole.arrays.items() if n != "layer1.0.conv1.kernel"}
    path = tmp_path / "lacking.safetensors"
    write_weights(path, Weights(whole.kind, whole.model, arrays, whole.unused, whole.source))
    with pytest.raises(UserError, match=r"config\.init\.weights=.*\n?(.*\n)*.*encoder\.layer1\.0\.conv1\.kernel"):
        load_resnet(path)
    params, _, report = load_resnet(path, "--config.init.require=False")
    assert report["random"] == ["encoder.layer1.0.conv1.kernel"]
    assert "encoder.layer1.0.conv1.kernel" not in report["arrays"]
    # of ResNet-18 without its head, scalars: (all - 64 * 64 * 9) / all, with the stem of this network's channels
    inside = {n: a.size for n, a in flatten(params).items() if n.startswith("encoder.")}
    running = sum(a.size for n, a in whole.arrays.items() if n.endswith((".mean", ".var")))
    total = sum(inside.values()) + running
    assert report["coverage"] == pytest.approx((total - 64 * 64 * 9) / total) and report["coverage"] < 1


def test_validation_patients_of_earlier_training_are_named(small, straight, camus4, tmp_path):
    """Whether the weights come from the workdir, from a file, or by way of another run; not for the same fold."""
    split = json.loads((straight / "split.json").read_text())
    trained = {split["patients"][case] for case in split["train"]}

    def warnings(name, weights, fold):
        arguments = (f"--config.init.weights={weights}", f"--config.data.fold={fold}")
        out = train_small(tmp_path / name, camus4, *arguments)
        return [line for line in out.splitlines() if "training patients of" in line]

    assert not warnings("same", straight, 0)
    (line,) = warnings("other", straight, 1)
    assert all(patient in line for patient in trained) and "2 of 2" in line and "config.data.fold=0" in line, line
    write_weights(tmp_path / "net.safetensors", initial_weights.read_named(str(straight)))
    (line,) = warnings("file", tmp_path / "net.safetensors", 1)
    assert str(straight) in line
    (line,) = warnings("twice", tmp_path / "other", 1)
    assert str(straight) in line, "the run between was not trained on these patients"
    (line,) = warnings("other", straight, 1)
    assert str(straight) in line, "also when the run is resumed"


def test_a_run_without_its_state_starts_again_from_its_initial_weights(small, straight, camus4, tmp_path):
    """A run may be killed between its first best weights and its first state, or a user deletes ``checkpoints``."""
    weights = f"--config.init.weights={straight}"
    train_small(tmp_path / "run", camus4, weights)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    out = train_small(tmp_path / "again", camus4, weights)
    assert "from the last checkpoint" not in out
    assert_same_end(tmp_path / "again", tmp_path / "run", 6)
    best = [[p.name for p in (tmp_path / name / "best").iterdir()] for name in ("run", "again")]
    assert best[0] == best[1]
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    with pytest.raises(UserError, match="another config"):
        train_small(tmp_path / "again", camus4, weights, "--config.seed=7")


def test_the_origin_of_the_weights_is_that_of_this_start(small, straight, camus4, tmp_path):
    """A run that ended before its first checkpoint leaves no report of its weights to the next one in its folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pretrained.json").write_text(json.dumps({"source": {"workdir": str(straight)}}))
    out = train_small(tmp_path / "run", camus4, "--config.data.fold=1")
    assert "training patients of" not in out and not (tmp_path / "run" / "pretrained.json").exists()


def test_a_run_starts_from_a_network_file_that_fits_in_part(small, camus4, tmp_path):
    """Through the main: without ``require`` it trains from what there is; with it, nothing begins."""
    config = load_config(RECIPE, SMALL)
    config, _ = check.resolve_config(config, needs_data=False)
    kernel = np.linspace(-1, 1, 4, dtype=np.float32).reshape(1, 4)
    path = tmp_path / "part.safetensors"
    write_weights(path, Weights("network", networks.plain_dict(config.model), {"kernel": kernel}, {}, {"from": "here"}))
    name = f"--config.init.weights={path}"
    with pytest.raises(UserError, match=r"only in the network \(1\): bias"):
        train_small(tmp_path / "run", camus4, name)
    assert not checkpoint.exists(tmp_path / "run")
    still = ("--config.optim.rates=*=0", "--config.init.require=False")  # every part frozen: the start is the end
    out = train_small(tmp_path / "run", camus4, name, *still)
    report = json.loads((tmp_path / "run" / "pretrained.json").read_text())
    assert report["random"] == ["bias"] and report["arrays"] == {"kernel": "copied"}
    assert report["coverage"] == 0.5 and "50 %" in out
    found = arrays_of(tmp_path / "run" / "checkpoints" / "6" / "state")
    np.testing.assert_array_equal(found["['params']['slow']['kernel']"], kernel)
    path.unlink()
    out = train_small(tmp_path / "run", camus4, name, *still)
    assert "resume     from step 6" in out, "the file is not needed again"
