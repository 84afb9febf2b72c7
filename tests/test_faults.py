"""Real training processes under faults of disk and clock: nothing is lost, one message, the documented status.

docs/reliability.md has the table of faults. Faults of writing are injected by a preloaded library (tests/faults.c).
"""

import errno
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.test_resume import _PROCESS, REPO, arguments, assert_same_end, small, straight, train_small
from xdim_jax.runs import checkpoint

__all__ = ["small", "straight"]  # fixtures


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    path = tmp_path_factory.mktemp("library") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, REPO / "tests" / "faults.c", "-ldl"], check=True)
    return path


def train_process(workdir, data, store, **environment):
    command = [sys.executable, "-c", _PROCESS, "steps", *arguments(workdir, data, f"--config.data.store={store}")]
    usual = {"JAX_PLATFORMS": "cpu", "XDIM_JAX_CACHE": "off"}
    return subprocess.run(
        command, cwd=REPO, env=os.environ | usual | environment, capture_output=True, text=True, timeout=200
    )


# the first write to the workdir that fails (of some 200), and how many fail; 0: all from then on
FAULTS = {
    "full from the first write": (1, 0, errno.ENOSPC),
    "full in a checkpoint": (40, 0, errno.ENOSPC),
    "one error in a checkpoint": (50, 1, errno.EIO),
    "full in the best weights": (90, 0, errno.ENOSPC),
    "full in the records": (120, 0, errno.ENOSPC),
    "one error late": (150, 1, errno.EIO),
    "quota": (170, 0, errno.EDQUOT),
}


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("full in a checkpoint", "full in the records") else pytest.param(n, marks=pytest.mark.slow)
        for n in FAULTS
    ],
)
def test_writes_that_fail_lose_nothing(name, library, small, camus4, straight, tmp_path):
    """The process ends with one message, or goes on if the write did not matter; then the run has the same end."""
    first, count, code = FAULTS[name]
    run = tmp_path / "run"
    environment = {"FAULT_FOLDER": str(run), "FAULT_FIRST": str(first), "FAULT_COUNT": str(count)}
    environment |= {"LD_PRELOAD": str(library), "FAULT_ERRNO": str(code)}
    done = train_process(run, camus4, tmp_path / "store", **environment)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    if count and not done.returncode:
        assert "done       predict with" in done.stdout
    else:
        assert done.returncode == 2, done.stdout + done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and str(run) in errors[0]
        assert os.strerror(code) in errors[0] or "Error writing" in errors[0]
    train_small(run, camus4, f"--config.data.store={tmp_path / 'store'}")
    assert_same_end(run, straight, 6)


@pytest.mark.parametrize("jump", [-86400, 300])
def test_a_clock_that_jumps_changes_nothing(jump, small, camus4, straight, tmp_path, monkeypatch):
    """Once, in the middle of the run: backwards by a day, forwards by five minutes."""
    real, calls = time.time, []

    def jumping():
        calls.append(1)
        return real() + (jump if len(calls) > 40 else 0)

    monkeypatch.setattr(time, "time", jumping)
    train_small(tmp_path / "run", camus4, "--config.train.overlays=2")
    assert len(calls) > 80
    assert_same_end(tmp_path / "run", straight, 6)


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "case.json"])
def test_a_store_entry_that_is_damaged_between_two_starts_is_prepared_again(name, small, camus4, straight, tmp_path):
    store = f"--config.data.store={tmp_path / 'store'}"
    train_small(tmp_path / "run", camus4, store, "--config.train.epochs=1")
    for path in (tmp_path / "store").rglob(name):
        path.write_bytes(path.read_bytes()[:-20])
    train_small(tmp_path / "run", camus4, store)
    assert checkpoint.exists(tmp_path / "run")
    assert_same_end(tmp_path / "run", straight, 6)
