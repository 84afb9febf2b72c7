"""Workdirs in buckets, against servers on this machine that speak the protocols of the stores."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from tests import packed_runs
from tests.conftest import free_port, records
from tests.packed_runs import RECIPE, RUNS, assert_same_run, overrides, small_network
from tests.processes import device_flags
from xdim_jax import evaluate, sweep, train
from xdim_jax.base import bucket, lock
from xdim_jax.base.errors import UserError
from xdim_jax.data import case as data_case
from xdim_jax.data import store_backends
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.store import prepare_cases
from xdim_jax.nets.functional import split_model
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.training import check, loop
from xdim_jax.training import train as training

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gcs():
    """``gs://`` on a server that keeps objects in memory."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    # it takes one connection at a time, but two clients hold theirs open; its store takes one request at a time
    http = types.SimpleNamespace(**{n: getattr(server.server, n) for n in dir(server.server)})
    http.HTTPServer = http.ThreadingHTTPServer
    lock, handle = threading.Lock(), server.Router.handle

    def one_by_one(self, method):
        with lock:
            handle(self, method)

    def end_headers(self):
        self.send_header("x-goog-generation", "1")  # which the store sends, and tensorstore wants
        http.BaseHTTPRequestHandler.end_headers(self)

    server.server, server.Router.handle, server.RequestHandler.end_headers = http, one_by_one, end_headers
    running = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        yield "gs://bucket"
    running.stop()


@pytest.fixture(scope="module")
def s3():
    """``s3://`` on moto's server."""
    moto = pytest.importorskip("moto.server")
    import boto3

    running = moto.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    running.stop()


@pytest.fixture
def plain(tmp_path):
    """A folder by its address: the same code, quickly."""
    return f"file://{tmp_path / 'bucket'}"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDIM_JAX_SCRATCH", str(tmp_path / "host"))
    return tmp_path / "host"


@pytest.fixture
def store(request):
    return f"{request.getfixturevalue(request.param)}/{request.node.name.replace('[', '-').replace(']', '')}"


everywhere = pytest.mark.parametrize("store", ["plain", "gcs", "s3"], indirect=True)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def other_host(monkeypatch, tmp_path):
    monkeypatch.setenv("XDIM_JAX_SCRATCH", str(tmp_path / f"host{time.monotonic_ns()}"))


# -- a folder and its like in a bucket ----------------------------------------------------------------------------


@everywhere
def test_what_is_written_is_found_on_another_host(store, tmp_path, monkeypatch):
    with bucket.workdir(store) as here:
        (here / "a" / "b").mkdir(parents=True)
        (here / "a" / "b" / "c.txt").write_text("one")
        (here / "log").write_text("1\n")
        (here / "old").write_text("x")
    with bucket.workdir(store) as here:
        with open(here / "log", "a") as file:
            file.write("2\n")
        (here / "old").unlink()
        (here / "a" / "b" / "c.txt").write_text("two")  # as long as before
    other_host(monkeypatch, tmp_path)
    there = bucket.fetch(store)
    assert there != here
    assert tree(there) == {"a/b/c.txt": "two", "log": "1\n2\n"}


@everywhere
def test_a_host_that_comes_back_has_what_the_other_left(store, tmp_path, monkeypatch, scratch):
    with bucket.workdir(store) as first:
        (first / "checkpoints" / "1").mkdir(parents=True)
        (first / "checkpoints" / "1" / "data").write_text("1")
    other_host(monkeypatch, tmp_path)
    with bucket.workdir(store) as second:
        shutil.move(second / "checkpoints" / "1", second / "checkpoints" / "2")
    monkeypatch.setenv("XDIM_JAX_SCRATCH", str(scratch))
    with bucket.workdir(store) as again:
        assert again == first
        assert [p.name for p in (again / "checkpoints").iterdir()] == ["2"], "no empty folder stands for a checkpoint"


def test_a_bucket_that_was_emptied_is_a_new_start(plain, tmp_path):
    with bucket.workdir(plain) as here:
        (here / "config.json").write_text("{}")
    shutil.rmtree(tmp_path / "bucket")
    with bucket.workdir(plain) as here:
        assert tree(here) == {}
    with pytest.raises(UserError, match=r"/nothing.*--workdir"):
        bucket.fetch(f"{plain}/nothing")


def test_what_is_half_written_stays_here(plain, tmp_path):
    with bucket.workdir(plain) as here:
        (here / "5.orbax-checkpoint-tmp").mkdir()
        (here / "5.orbax-checkpoint-tmp" / "data").write_text("half")
        (here / ".1234abcd.partial.config.json").write_text("half")
        (here / "whole").write_text("whole")
    assert tree(tmp_path / "bucket").keys() == {"whole", bucket.MANIFEST}


def test_a_host_that_dies_while_it_uploads_leaves_what_was_whole_before(plain, tmp_path, monkeypatch):
    """The next state is in the bucket in part; the manifest still is of the one before."""
    mirror = bucket.Mirror(plain)
    mirror.pull()
    (mirror.folder / "1").mkdir(parents=True)
    (mirror.folder / "1" / "data").write_text("one")
    mirror.push()
    shutil.move(mirror.folder / "1", mirror.folder / "2")
    (mirror.folder / "2" / "more").write_text("m")
    put = mirror._fs.put_file

    def dies(here, there, **more):
        if there.endswith("more"):
            raise ConnectionError("the host is gone")
        put(here, there, **more)

    monkeypatch.setattr(mirror._fs, "put_file", dies)
    with pytest.raises(UserError, match="ConnectionError: the host is gone"):
        mirror.push()
    monkeypatch.setattr(mirror._fs, "put_file", put)
    assert (tmp_path / "bucket" / "2" / "data").exists()
    other_host(monkeypatch, tmp_path)
    assert tree(bucket.fetch(plain)) == {"1/data": "one"}
    mirror.push()
    other_host(monkeypatch, tmp_path)
    assert tree(bucket.fetch(plain)) == {"2/data": "one", "2/more": "m"}
    assert not (tmp_path / "bucket" / "1" / "data").exists()


def test_it_follows_while_the_block_goes_on(plain, tmp_path):
    mirror = bucket.Mirror(plain)
    mirror.folder.mkdir(parents=True)
    with mirror.uploading(every=0.05):
        (mirror.folder / "a").write_text("a")
        deadline = time.monotonic() + 20
        while not (tmp_path / "bucket" / bucket.MANIFEST).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads((tmp_path / "bucket" / bucket.MANIFEST).read_text())["files"] == {"a": 1}


def test_a_bucket_that_is_away_for_a_while_is_waited_for(plain, monkeypatch, capsys):
    mirror = bucket.Mirror(plain)
    mirror.folder.mkdir(parents=True)
    away, tried = threading.Event(), threading.Event()
    away.set()
    put = mirror._fs.put_file

    def flaky(*arguments, **more):
        if away.is_set():
            tried.set()
            raise TimeoutError("no answer")
        put(*arguments, **more)

    monkeypatch.setattr(mirror._fs, "put_file", flaky)
    with mirror.uploading(every=0.05):
        (mirror.folder / "a").write_text("a")
        assert tried.wait(20)
        away.clear()
    assert "TimeoutError: no answer" in capsys.readouterr().out
    assert mirror._read_manifest()[1] == {"a": 1}
    (mirror.folder / "b").write_text("b")
    away.set()
    refused = pytest.raises(UserError, match=rf"{mirror.folder}; run the same command again")
    with refused, mirror.uploading():
        pass


# -- files that are not uploaded yet ------------------------------------------------------------------------------


def write(folder, **files):
    """Write files; ``__`` in a name stands for a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def begin(plain):
    """Upload step 10."""
    with bucket.workdir(plain) as here:
        write(here, checkpoints__10__data="ten", metrics="10\n", config="{}")


def fail_last_upload(plain, name="put_file", *, arrives=False):
    """Train to step 500, which the bucket does not take. With ``arrives``, only its answer is lost."""
    with pytest.MonkeyPatch.context() as patch:
        fs = bucket.open_filesystem(plain)[0]
        original = getattr(fs, name)

        def fails(*arguments, **more):
            if arrives:
                original(*arguments, **more)
            raise TimeoutError("no answer")

        with (
            pytest.raises(UserError, match=r"no answer.*run the same command again on this machine"),
            bucket.workdir(plain) as here,
        ):
            shutil.rmtree(here / "checkpoints" / "10")
            write(here, checkpoints__500__data="five hundred", metrics="10\n500\n")
            patch.setattr(fs, name, fails)


AT_500 = {"checkpoints/500/data": "five hundred", "metrics": "10\n500\n", "config": "{}"}


@pytest.mark.parametrize(("name", "arrives"), [("put_file", False), ("pipe_file", False), ("pipe_file", True)])
def test_the_same_command_uploads_what_the_last_upload_has_left(name, arrives, plain, tmp_path, monkeypatch, capsys):
    begin(plain)
    fail_last_upload(plain, name, arrives=arrives)
    with bucket.workdir(plain) as here:
        assert tree(here).items() >= AT_500.items()
        other_host(monkeypatch, tmp_path)
        assert tree(bucket.fetch(plain)).items() >= AT_500.items(), "before the run goes on"
    said = capsys.readouterr().out
    assert "uploading the files that an earlier command could not upload" in said and "warning" not in said


def test_an_upload_whose_answer_is_lost_twice_is_still_our_own(plain, capsys):
    """The last upload fails; that of the next command arrives, but its answer does not."""
    begin(plain)
    fail_last_upload(plain)
    fs = bucket.open_filesystem(plain)[0]
    original = fs.pipe_file

    def arrives(*arguments, **more):
        original(*arguments, **more)
        raise TimeoutError("no answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "pipe_file", arrives)
        with pytest.raises(UserError, match=r"no answer.*run the same command again"), bucket.workdir(plain):
            pass
    with bucket.workdir(plain) as here:
        assert tree(here).items() >= AT_500.items()
    assert "warning" not in capsys.readouterr().out


def test_the_log_of_a_resumed_trial_has_the_lines_of_both_machines(plain, tmp_path, monkeypatch):
    """A worker opens the log for its process, which then downloads the workdir, and writes on."""
    begin(plain)
    for number in (1, 2):
        if number == 2:
            other_host(monkeypatch, tmp_path)
        here = bucket.local_folder(plain)
        here.mkdir(parents=True, exist_ok=True)
        with open(here / "train.log", "ab") as log, bucket.workdir(plain):
            log.write(b"machine %d\n" % number)
            log.flush()
    for _ in range(2):  # the same machine again
        with open(here / "train.log", "ab") as log, bucket.workdir(plain):
            log.write(b"again\n")
            log.flush()
    assert tree(bucket.fetch(plain))["train.log"] == "machine 1\nmachine 2\nagain\nagain\n"


def test_a_bucket_that_does_not_exist_is_named(plain, monkeypatch):
    """Its file systems report a missing file; the local files are all there."""
    fs = bucket.open_filesystem(plain)[0]

    def absent(*arguments, **more):
        raise FileNotFoundError("no such bucket")

    monkeypatch.setattr(fs, "put_file", absent)
    with pytest.raises(UserError, match=f"{plain} cannot be written.*no such bucket"), bucket.workdir(plain) as here:
        write(here, a="a")


def test_a_workdir_of_an_earlier_version_is_read_and_written(plain, tmp_path, monkeypatch):
    """Its manifest has only paths and sizes."""
    begin(plain)
    fs, root = bucket.open_filesystem(plain)
    files = json.loads(fs.cat_file(f"{root}/{bucket.MANIFEST}"))["files"]
    fs.pipe_file(f"{root}/{bucket.MANIFEST}", json.dumps(files).encode())
    other_host(monkeypatch, tmp_path)
    before = tree(bucket.fetch(plain))
    assert before.keys() == files.keys()
    with bucket.workdir(plain) as here:
        write(here, more="x")
    assert tree(bucket.fetch(plain)) == before | {"more": "x"}


def test_a_first_upload_that_failed_is_made_up_for(plain, tmp_path, monkeypatch):
    put = bucket.open_filesystem(plain)[0].put_file
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError), bucket.workdir(plain) as here:
        patch.setattr(bucket.open_filesystem(plain)[0], "put_file", lambda *_: put("/no such file", "there"))
        write(here, a="a")
    with bucket.workdir(plain):
        pass
    other_host(monkeypatch, tmp_path)
    assert tree(bucket.fetch(plain)) == {"a": "a"}


def test_what_was_left_is_moved_aside_if_the_bucket_has_changed(plain, tmp_path, monkeypatch, scratch, capsys):
    """Another host has trained on from step 10; the log is that of the process that launched this one."""
    begin(plain)
    fail_last_upload(plain)
    other_host(monkeypatch, tmp_path)
    with bucket.workdir(plain) as there:
        write(there, checkpoints__20__data="twenty", metrics="10\n20\n")
    monkeypatch.setenv("XDIM_JAX_SCRATCH", str(scratch))
    with open(bucket.local_folder(plain) / "train.log", "a") as log:
        for _ in range(2):  # the second time, nothing is left
            with bucket.workdir(plain) as here:
                print("a line", file=log, flush=True)
                found = tree(here)
            assert found.pop("train.log").startswith("a line\n")
            files = {"checkpoints/10/data": "ten", "checkpoints/20/data": "twenty", "metrics": "10\n20\n"}
            assert found == files | {"config": "{}"}
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    (aside,) = (p for p in here.parent.iterdir() if p.is_dir() and p != here)
    assert tree(aside) == AT_500
    assert len(warnings) == 1 and f"{aside}," in warnings[0] and plain in warnings[0]


def test_a_killed_process_leaves_its_files_to_the_next_command(plain, tmp_path, monkeypatch):
    """Meanwhile, a program that cleans the disk has deleted an old file, which stays in the bucket."""
    begin(plain)
    script = f"""
import os
from xdim_jax.base import bucket
with bucket.workdir({plain!r}) as here:
    (here / "metrics").write_text("10\\n11\\n")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO, timeout=60).returncode == -9
    here = bucket.local_folder(plain)
    assert tree(here)["metrics"] == "10\n11\n"
    (here / "config").unlink()
    with bucket.workdir(plain):
        expected = {"checkpoints/10/data": "ten", "metrics": "10\n11\n", "config": "{}"}
        assert tree(here) == expected
    other_host(monkeypatch, tmp_path)
    assert tree(bucket.fetch(plain)) == expected


def test_a_bucket_that_is_emptied_during_a_run_gets_all_files_again(plain, tmp_path, monkeypatch):
    begin(plain)
    with bucket.workdir(plain) as here:
        shutil.rmtree(tmp_path / "bucket")
        write(here, metrics="10\n11\n")
    other_host(monkeypatch, tmp_path)
    assert tree(bucket.fetch(plain)) == {"checkpoints/10/data": "ten", "metrics": "10\n11\n", "config": "{}"}


# -- several commands on one bucket -------------------------------------------------------------------------------


def test_two_hosts_that_write_keep_the_files_of_each_other(plain, tmp_path, monkeypatch):
    """A run goes on and ends while another host evaluates its first checkpoint."""
    begin(plain)
    mirror = bucket.Mirror(plain)
    mirror.pull()
    other_host(monkeypatch, tmp_path)
    with bucket.workdir(plain) as there:
        shutil.move(mirror.folder / "checkpoints" / "10", mirror.folder / "checkpoints" / "20")
        write(mirror.folder, metrics="10\n20\n")
        mirror.push()
        write(there, evaluation__cases="1", evaluation__old="2")
        bucket_now = tree(tmp_path / "bucket")
    assert "checkpoints/10/data" not in bucket_now and "checkpoints/20/data" in bucket_now
    of_run = {"checkpoints/20/data": "ten", "metrics": "10\n20\n", "config": "{}"}
    other_host(monkeypatch, tmp_path)
    assert tree(bucket.fetch(plain)) == of_run | {"evaluation/cases": "1", "evaluation/old": "2"}
    with bucket.workdir(plain) as there:
        (there / "evaluation" / "old").unlink()
    write(mirror.folder, metrics="10\n20\n30\n")
    mirror.push()
    other_host(monkeypatch, tmp_path)
    assert tree(bucket.fetch(plain)) == of_run | {"evaluation/cases": "1", "metrics": "10\n20\n30\n"}


def test_a_command_that_reads_leaves_the_files_of_a_running_run_alone(plain):
    begin(plain)
    with bucket.workdir(plain) as here, open(here / "metrics", "a") as metrics:
        write(here, checkpoints__600__data="six hundred")
        there = bucket.fetch(plain)
        with bucket.workdir(plain, writes=False) as also_there:  # a process of the run that is not the first
            assert also_there == there != here
        assert tree(there) == {"checkpoints/10/data": "ten", "metrics": "10\n", "config": "{}"}
        print("600", file=metrics, flush=True)
        assert (here / "checkpoints" / "600" / "data").exists() and (here / "metrics").read_text() == "10\n600\n"
    assert tree(bucket.fetch(plain))["metrics"] == "10\n600\n"


def test_a_checkpoint_that_is_replaced_during_a_download_is_read_again(plain, monkeypatch):
    begin(plain)
    with bucket.workdir(plain) as here:
        mirror = bucket.Mirror(plain, writes=False)
        original, calls = mirror._fs.get_file, []

        def meanwhile(there, to, **more):
            if not calls:  # the run saves another checkpoint, and deletes this one
                calls.append(there)
                write(here, checkpoints__20__data="twenty")
                (here / "checkpoints" / "10" / "data").unlink()
                bucket_of_run.push()
            return original(there, to, **more)

        bucket_of_run = bucket.Mirror(plain)
        bucket_of_run.resume()
        monkeypatch.setattr(mirror._fs, "get_file", meanwhile)
        assert mirror.pull()
        assert tree(mirror.folder)["checkpoints/20/data"] == "twenty" and "checkpoints/10/data" not in tree(
            mirror.folder
        )


def test_what_an_interrupted_download_and_wandb_leave_is_removed(plain):
    begin(plain)
    there = bucket.fetch(plain)
    write(there, best__100__x="x")
    (there / "best" / "100" / "x").rename(there / "best" / "100" / ".partial.x")
    (there / "wandb" / "run-1").mkdir(parents=True)
    (there / "wandb" / "latest-run").symlink_to("run-1")
    bucket.fetch(plain)
    assert not (there / "best").exists() and not (there / "wandb").exists()


def test_a_full_disk_is_no_lack_of_credentials(plain, monkeypatch):
    begin(plain)
    mirror = bucket.Mirror(plain, writes=False)

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mirror._fs, "get_file", full)
    with pytest.raises(UserError, match="disk of the local copy is full") as error:
        mirror.pull()
    assert "credentials" not in str(error.value)


def test_a_second_command_that_writes_waits_for_the_first(plain, monkeypatch, capsys):
    begin(plain)
    monkeypatch.setattr(bucket, "lock_file", lambda path, workdir, wait: lock.lock_file(path, workdir, min(wait, 1)))
    in_use = rf"{plain} is in use by process {os.getpid()} on "
    with bucket.workdir(plain) as here:
        write(here, checkpoints__600__data="six hundred")
        with pytest.raises(UserError, match=in_use):
            evaluate.main([f"--workdir={plain}"])
        assert f"waiting    for process {os.getpid()}" in capsys.readouterr().out
        push = bucket.Mirror.push

        def during_last_upload(mirror):
            with pytest.raises(UserError, match=in_use), bucket.workdir(plain):
                pass
            push(mirror)

        monkeypatch.setattr(bucket.Mirror, "push", during_last_upload)
    monkeypatch.setattr(bucket.Mirror, "push", push)
    with bucket.workdir(plain) as here:
        assert (here / "checkpoints" / "600" / "data").exists()


def test_the_lock_of_a_workdir_is_not_copied(plain, tmp_path):
    with bucket.workdir(plain) as here, lock.lock_workdir(here):
        write(here, a="a")
        bucket.Mirror(plain).push()
        bucket.Mirror(plain).pull()
        with pytest.raises(UserError, match="in use"):
            lock.lock_workdir(here, wait=0)
    assert tree(tmp_path / "bucket").keys() == {"a", bucket.MANIFEST}


def test_a_signal_during_the_last_upload_does_not_end_it(plain, camus4, tmp_path, monkeypatch, capsys):
    """The run has stopped after a first signal; the second one comes while its files are uploaded."""

    def fit(run, *rest, **options):
        run.stop.busy = True
        write(run.workdir, checkpoints__7__data="seven")
        os.kill(os.getpid(), 10)

    def open_run(config, dataset, workdir, stop, devices, **options):
        run = types.SimpleNamespace(stop=stop, workdir=workdir)
        nothing = lambda: None  # noqa: E731
        return types.SimpleNamespace(
            run=run, state=0, progress=0, validated=True, open_stream=nothing, close=nothing, lock=None
        )

    def exits(status):
        raise AssertionError(f"the process ends with status {status}")

    push = bucket.Mirror.push

    def slow_push(mirror):
        os.kill(os.getpid(), 15)
        push(mirror)
        print("uploaded")

    monkeypatch.setattr(training, "_make_devices", lambda config: None)
    monkeypatch.setattr(training, "open_run", open_run)
    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(os, "_exit", exits)
    monkeypatch.setattr(bucket.Mirror, "push", slow_push)
    assert train.main([f"--config={RECIPE}", f"--workdir={plain}", *overrides(camus4, RUNS[0])]) == 75
    said = capsys.readouterr().out.splitlines()
    (saved,) = (index for index, line in enumerate(said) if "everything is saved" in line)
    assert said[saved].startswith("stopped    by SIGTERM") and said.index("uploaded") < saved
    assert "checkpoints/7/data" in tree(tmp_path / "bucket")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://no-such-bucket/run", r"gs://no-such-bucket/run cannot be (read|written)"),
        ("nonsense://a/b", r"nonsense://a/b: .*pip install 'xdim_jax\[cloud\]'"),
    ],
)
def test_addresses_that_lead_nowhere(address, message, gcs):
    with pytest.raises(UserError, match=message), bucket.workdir(address) as here:
        (here / "a").write_text("a")


# -- prepared cases -----------------------------------------------------------------------------------------------


def prepared(data, folder, **options):
    """The entries of the phantoms, and what was said."""
    config = packed_runs.load(data, RUNS[0])
    config, dataset = check.resolve_config(config)
    cases = data_case.usable_cases(data_case.scan_cases(dataset, data, need_labels=True), data)
    said = []
    settings = Preparation.from_config(config.data.prepare)
    return prepare_cases(dataset, cases, settings, folder, say=said.append, **options), said


@everywhere
def test_cases_in_a_bucket_are_those_of_a_folder(store, camus4, tmp_path):
    local, _ = prepared(camus4, tmp_path / "local")
    remote, said = prepared(camus4, store)
    assert "0 of 16 cases prepared" in said[0]
    assert [e.case_id for e in remote] == [e.case_id for e in local]
    for a, b in zip(remote, local, strict=True):
        assert a.shape == b.shape and a.structures == b.structures
        x, y = a.load(), b.load()
        assert x.raw.dtype == y.raw.dtype and x.shape == y.shape
        np.testing.assert_array_equal(x.image(), y.image())
        part = (slice(0, 1), slice(3, 20), slice(5, 9))
        np.testing.assert_array_equal(x.image(part), y.image(part))
        np.testing.assert_array_equal(np.asarray(x.label), y.label)
        draws = [entry.random_voxel(np.random.default_rng(3)) for entry in (a, b)]
        assert draws[0] == draws[1]
    assert f"store      {store}/" in prepared(camus4, store)[1][0] and "16 of 16" in prepared(camus4, store)[1][0]


def test_what_another_host_wrote_meanwhile_stays(plain, tmp_path):
    """Two see an empty store; what the second would write is there when it comes to it, and may be read by a run."""
    first, second = (store_backends.open_backend(plain, "key") for _ in range(2))
    place, arrays = (
        first.location("case-0"),
        {"image": np.arange(24, dtype=np.int16).reshape(2, 3, 4), "voxels": np.arange(5)},
    )
    kept = first.write(place, arrays, {"by": "first"}, lambda facts: True)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "bucket").rglob("*") if p.is_file()}
    assert second.read_metadata(place) is None
    assert second.write(place, arrays, {"by": "second"}, lambda facts: facts["by"] == "first") == kept
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "bucket").rglob("*") if p.is_file()}
    assert second.write(place, arrays, {"by": "second"}, lambda facts: False)["by"] == "second"
    assert store_backends.open_entry(place)[0]["by"] == "second" and second.size(place) >= first.size(place)


def written_meanwhile(monkeypatch, action):
    """Call ``action`` once, between the image and the label of the next entry that is written."""
    original = store_backends._zarr

    def zarr(address, like=None):
        if like is not None and address.endswith("/label"):
            monkeypatch.setattr(store_backends, "_zarr", original)
            action()
        return original(address, like)

    monkeypatch.setattr(store_backends, "_zarr", zarr)


def case_arrays(value):
    image, label = np.full((2, 3, 4, 1), value, np.int16), np.full((2, 3, 4), value, np.uint8)
    return {"image": image, "label": label, "voxels": np.arange(24, dtype=np.int32)}


def test_a_host_that_begins_a_case_and_dies_removes_nothing_of_another_host(plain, monkeypatch):
    first, second = (store_backends.open_backend(plain, "key") for _ in range(2))
    place = first.location("case-0")

    def begin_and_die():
        with monkeypatch.context() as patch:
            patch.setattr(store_backends, "_zarr", lambda *rest: (_ for _ in ()).throw(ConnectionError("gone")))
            with pytest.raises(UserError, match="gone"):
                second.write(place, case_arrays(2), {}, lambda facts: True)

    written_meanwhile(monkeypatch, begin_and_die)
    first.write(place, case_arrays(1), {}, lambda facts: True)
    third = store_backends.open_backend(plain, "key")
    assert third.read_metadata(place) is not None
    _, image, label = store_backends.open_entry(place)
    assert (np.asarray(image) == 1).all() and (np.asarray(label) == 1).all()


def test_of_two_hosts_that_write_one_case_the_last_one_counts(plain, monkeypatch):
    """The arrays of an entry are those of one host, and a run that reads those of the other host can continue."""
    first, second = (store_backends.open_backend(plain, "key") for _ in range(2))
    place, opened = first.location("case-0"), []

    def write_all():
        second.write(place, case_arrays(2), {"by": "second"}, lambda facts: True)
        opened.append(store_backends.open_entry(place))

    written_meanwhile(monkeypatch, write_all)
    first.write(place, case_arrays(1), {"by": "first"}, lambda facts: True)
    for backend in (first, store_backends.open_backend(plain, "key")):
        assert backend.read_metadata(place)["by"] == "first"
    for value, (_, image, label) in ((1, store_backends.open_entry(place)), (2, opened[0])):
        assert (np.asarray(image) == value).all() and (np.asarray(label) == value).all()


def test_an_entry_of_an_earlier_version_is_read(plain, tmp_path):
    """Its arrays are in the folder of the entry itself."""
    place, folder = f"{plain}/key/case-0", tmp_path / "bucket" / "key" / "case-0"
    for name, array in case_arrays(3).items():
        store_backends._zarr(f"{place}/{name}", array)[...].write(array).result()
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    (folder / "case.json").write_text(json.dumps({"files": sizes}))
    assert store_backends.open_backend(plain, "key").read_metadata(place) == {"files": sizes}
    _, image, label = store_backends.open_entry(place)
    assert (np.asarray(image) == 3).all() and (np.asarray(label) == 3).all()


def test_a_chunk_that_is_gone_is_missed(plain, camus4, tmp_path, monkeypatch):
    """zarr itself would read zeros."""
    entries, _ = prepared(camus4, plain)
    folder = tmp_path / "bucket" / entries[0].location.removeprefix(plain + "/")
    (array,) = folder.glob("*/image")
    assert json.loads((array / "zarr.json").read_text())["zarr_format"] == 3
    whole = entries[0].load().image()
    next(p for p in (array / "c").rglob("*") if p.is_file()).unlink()
    assert "15 of 16" in prepared(camus4, plain)[1][0]
    np.testing.assert_array_equal(entries[0].load().image(), whole)
    (folder / "case.json").unlink()  # written last: the entry was not finished
    assert "15 of 16" in prepared(camus4, plain)[1][0]
    refuse = lambda self, *rest: (_ for _ in ()).throw(ConnectionError("gone"))  # noqa: E731
    store_backends._open_zarr_entry.cache_clear()
    monkeypatch.setattr(store_backends, "_zarr", refuse)
    with pytest.raises(UserError, match="is damaged"):
        entries[0].load()
    store_backends._open_zarr_entry.cache_clear()


def test_a_volume_is_read_by_the_chunk(plain, tmp_path):
    """Of a volume of three chunks a side, what a small patch needs is opened: the others may be gone."""
    image = np.random.default_rng(0).integers(-9, 9, (70, 130, 130, 2)).astype(np.int16)
    backend = store_backends.open_backend(plain, "key")
    place = backend.location("case-0")
    backend.write(place, {"image": image, "voxels": np.arange(5, dtype=np.int32)}, {"a": 1}, lambda facts: True)
    (folder,) = (tmp_path / "bucket" / "key" / "case-0").glob("*/image/c")
    chunks = [p for p in folder.rglob("*") if p.is_file()]
    assert len(chunks) == 27
    for path in chunks:
        if path.relative_to(folder).as_posix() != "1/0/2/0":
            path.unlink()
    _, found, label = store_backends.open_entry(place)
    assert label is None and store_backends.open_voxels(place)[3] == 3 and found.shape == image.shape
    np.testing.assert_array_equal(found[40:60, 10:50, 129:], image[40:60, 10:50, 129:])


def test_prepared_cases_are_stored_in_known_stores_only():
    with pytest.raises(UserError, match=r"az://a/b.*gs://.*s3://"):
        store_backends._kvstore("az://a/b")


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["gcs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_run_in_a_bucket_goes_on_on_another_host(store, camus4, runs_alone, tmp_path, monkeypatch, capsys):
    """Stopped after a few steps; taken up where nothing of it is on the disk; what reads runs reads it there."""
    command = [f"--config={RECIPE}", f"--workdir={store}/run", *overrides(camus4, RUNS[0])]
    command += [f"--config.data.store={store}/prepared"]
    compiled = loop.compile_step

    def stops(*arguments):
        program = compiled(*arguments)

        def run(*values):
            os.kill(os.getpid(), 15)
            return program(*values)

        return run

    with small_network():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "compile_step", stops)
            assert train.main(command) == 75
        other_host(monkeypatch, tmp_path)
        assert train.main(command) == 0
        assert "resume     from step 1" in capsys.readouterr().out
        other_host(monkeypatch, tmp_path)
        found = bucket.fetch(f"{store}/run")
        assert_same_run(found, runs_alone[0])
        assert checkpoint.exists(found) and not list(found.rglob("*.orbax-checkpoint-tmp*"))


def start_processes(tmp_path, plain, data, name):
    """Two processes of one run, each with a scratch folder of its own, as hosts have."""
    port, running = free_port(), []
    for index in range(2):
        environment = os.environ | {
            "XLA_FLAGS": device_flags(1),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(REPO),
            "XDIM_JAX_SCRATCH": str(tmp_path / f"{name}{index}"),
        }
        command = [sys.executable, "-m", "tests.packed_runs", f"--config={RECIPE}", f"--workdir={plain}"]
        command += [*overrides(data, RUNS[0]), f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}"]
        with open(tmp_path / f"{name}{index}.txt", "wb") as out:
            running.append(subprocess.Popen(command, cwd=REPO, env=environment, stdout=out, stderr=subprocess.STDOUT))
    return running


def ended(running, tmp_path, name):
    """Their exit statuses, and what the first said."""
    try:
        statuses = [process.wait(200) for process in running]
    finally:
        for process in running:
            process.kill()
    return statuses, (tmp_path / f"{name}0.txt").read_text() + (tmp_path / f"{name}1.txt").read_text()


@pytest.mark.slow
def test_hosts_with_disks_of_their_own_train_one_run(camus4, runs_alone, plain, tmp_path):
    """Two processes that share nothing but the bucket; stopped, and gone on with on two other hosts."""
    running = start_processes(tmp_path, plain, camus4, "first")
    kept = tmp_path / "first0"
    deadline = time.monotonic() + 200
    while not list(kept.rglob("steps.jsonl")) or not next(kept.rglob("steps.jsonl")).read_text():
        assert time.monotonic() < deadline and running[0].poll() is None, (tmp_path / "first0.txt").read_text()
        time.sleep(0.02)
    running[1].send_signal(15)
    statuses, said = ended(running, tmp_path, "first")
    assert statuses == [75, 75], said
    assert not list((tmp_path / "first1").rglob("checkpoints")), "process 0 alone saves"
    statuses, said = ended(start_processes(tmp_path, plain, camus4, "second"), tmp_path, "second")
    assert statuses == [0, 0] and "resume     from step" in said, said
    found = bucket.fetch(plain)
    steps, expected = (read_records(w, STEPS_FILE) for w in (found, runs_alone[0]))
    assert [s["step"] for s in steps] == [s["step"] for s in expected]
    # which process has a sample tells its place in the batch, and so what drop path takes from it
    assert [sorted(s["batch"]) for s in steps] == [sorted(s["batch"]) for s in expected]
    assert [r["step"] for r in records(found, "validation")] == [6]
    weights = checkpoint.load_weights(found, *split_small())
    assert weights[2].startswith("best validation")


def split_small():
    """Trees of the shapes of the toy's parameters and statistics."""
    return split_model(packed_runs.SmallNetwork(4, 0))[1:]


def test_trials_of_a_sweep_lie_in_a_bucket(camus4, tmp_path, plain, monkeypatch):
    space = tmp_path / "space.py"
    space.write_text("def suggest(trial):\n    trial.suggest_float('optim.schedule.peak', 1e-3, 1e-1, log=True)\n")
    own = {k: v for k, v in RUNS[1].items() if k != "optim.schedule.peak"}
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=2", f"--workdir={plain}", "--pack=2"]
    with pytest.raises(UserError, match=r"bucket.*--storage"):
        sweep.main([*command, *overrides(camus4, own)])
    with small_network():
        assert sweep.main([*command, f"--storage={tmp_path / 'study'}", *overrides(camus4, own)]) == 0
    other_host(monkeypatch, tmp_path)
    for trial in ("trial0000", "trial0001"):
        found = bucket.fetch(f"{plain}/{trial}")
        assert [r["step"] for r in records(found, "validation")] == [4]
