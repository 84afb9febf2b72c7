"""Workdirs in buckets, against servers on this machine that speak the protocols of the stores."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from tests import test_pack as packs
from tests.conftest import free_port
from tests.test_pack import OWN, RECIPE, alone, assert_same, data, overrides, shrunk  # noqa: F401  (two fixtures)
from xdim_jax import sweep, train
from xdim_jax.base import bucket
from xdim_jax.base.errors import UserError
from xdim_jax.data import case as data_case
from xdim_jax.data import store_backends
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.store import prepare_cases
from xdim_jax.nets.functional import split_model
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.training import check


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
    with pytest.raises(UserError, match=r"no run.*give the --workdir of xdim_jax\.train"):
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
    with pytest.raises(UserError, match="cannot be written: ConnectionError: the host is gone"):
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
    with mirror.following(every=0.05):
        (mirror.folder / "a").write_text("a")
        deadline = time.monotonic() + 20
        while not (tmp_path / "bucket" / bucket.MANIFEST).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads((tmp_path / "bucket" / bucket.MANIFEST).read_text()) == {"a": 1}


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
    with mirror.following(every=0.05):
        (mirror.folder / "a").write_text("a")
        assert tried.wait(20)
        away.clear()
    assert "cannot be written: TimeoutError: no answer" in capsys.readouterr().out
    assert mirror._read_manifest() == {"a": 1}
    (mirror.folder / "b").write_text("b")
    away.set()
    refused = pytest.raises(UserError, match=rf"{mirror.folder}; run the same command again")
    with refused, mirror.following():
        pass


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


def prepared(data, folder, **options):  # noqa: F811
    """The entries of the phantoms, and what was said."""
    config = packs.load(data, OWN[0])
    config, dataset = check.resolve_config(config)
    cases = data_case.usable_cases(data_case.scan_cases(dataset, data, need_labels=True), data)
    said = []
    settings = Preparation.from_config(config.data.prepare)
    return prepare_cases(dataset, cases, settings, folder, say=said.append, **options), said


@everywhere
def test_cases_in_a_bucket_are_those_of_a_folder(store, data, tmp_path):  # noqa: F811
    local, _ = prepared(data, tmp_path / "local")
    remote, said = prepared(data, store)
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
        draws = [entry.voxel(np.random.default_rng(3)) for entry in (a, b)]
        assert draws[0] == draws[1]
    assert f"store      {store}/" in prepared(data, store)[1][0] and "16 of 16" in prepared(data, store)[1][0]


def test_what_another_host_wrote_meanwhile_stays(plain, tmp_path):
    """Two see an empty store; what the second would write is there when it comes to it, and may be read by a run."""
    first, second = (store_backends.open_backend(plain, "key") for _ in range(2))
    place, arrays = (
        first.location("case-0"),
        {"image": np.arange(24, dtype=np.int16).reshape(2, 3, 4), "voxels": np.arange(5)},
    )
    kept = first.write(place, arrays, {"by": "first"}, lambda facts: True)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "bucket").rglob("*") if p.is_file()}
    assert second.read_facts(place) is None
    assert second.write(place, arrays, {"by": "second"}, lambda facts: facts["by"] == "first") == kept
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "bucket").rglob("*") if p.is_file()}
    assert second.write(place, arrays, {"by": "second"}, lambda facts: False)["by"] == "second"
    assert store_backends.open_entry(place)[0]["by"] == "second" and second.size(place) >= first.size(place)


def test_a_chunk_that_is_gone_is_missed(plain, data, tmp_path, monkeypatch):  # noqa: F811
    """zarr itself would read zeros."""
    entries, _ = prepared(data, plain)
    folder = tmp_path / "bucket" / entries[0].location.removeprefix(plain + "/")
    assert json.loads((folder / "image" / "zarr.json").read_text())["zarr_format"] == 3
    chunk = next(p for p in (folder / "image" / "c").rglob("*") if p.is_file())
    chunk.unlink()
    assert "15 of 16" in prepared(data, plain)[1][0]
    assert chunk.exists()
    (folder / "case.json").unlink()  # written last: the entry was not finished
    assert "15 of 16" in prepared(data, plain)[1][0]
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
    chunks = [p for p in (tmp_path / "bucket" / "key" / "case-0" / "image" / "c").rglob("*") if p.is_file()]
    assert len(chunks) == 27
    for path in chunks:
        if path.relative_to(tmp_path / "bucket" / "key" / "case-0" / "image" / "c").as_posix() != "1/0/2/0":
            path.unlink()
    _, found, label = store_backends.open_entry(place)
    assert label is None and store_backends.open_voxels(place)[3] == 3 and found.shape == image.shape
    np.testing.assert_array_equal(found[40:60, 10:50, 129:], image[40:60, 10:50, 129:])


def test_prepared_cases_are_stored_in_known_stores_only():
    with pytest.raises(UserError, match=r"az://a/b.*gs://.*s3://"):
        store_backends._kvstore("az://a/b")


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["gcs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_run_in_a_bucket_goes_on_on_another_host(store, data, alone, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Stopped after a few steps; taken up where nothing of it is on the disk; what reads runs reads it there."""
    command = [f"--config={RECIPE}", f"--workdir={store}/run", *overrides(data, OWN[0])]
    command += [f"--config.data.store={store}/prepared"]
    compiled = packs.original

    def stops(*arguments):
        program = compiled(*arguments)

        def run(*values):
            os.kill(os.getpid(), 15)
            return program(*values)

        return run

    with shrunk():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("xdim_jax.training.loop.compile_step", stops)
            assert train.main(command) == 75
        other_host(monkeypatch, tmp_path)
        assert train.main(command) == 0
        assert "resume     from step 1" in capsys.readouterr().out
        other_host(monkeypatch, tmp_path)
        found = bucket.fetch(f"{store}/run")
        assert_same(found, alone[0])
        assert checkpoint.exist(found) and not list(found.rglob("*.orbax-checkpoint-tmp*"))


def start_processes(tmp_path, plain, data, name):  # noqa: F811
    """Two processes of one run, each with a scratch folder of its own, as hosts have."""
    port, running = free_port(), []
    for index in range(2):
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(packs.REPO),
            "XDIM_JAX_SCRATCH": str(tmp_path / f"{name}{index}"),
        }
        command = [sys.executable, "-m", "tests.test_bucket", f"--config={RECIPE}", f"--workdir={plain}"]
        command += [*overrides(data, OWN[0]), f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}"]
        with open(tmp_path / f"{name}{index}.txt", "wb") as out:
            running.append(
                subprocess.Popen(command, cwd=packs.REPO, env=environment, stdout=out, stderr=subprocess.STDOUT)
            )
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
def test_hosts_with_disks_of_their_own_train_one_run(data, alone, plain, tmp_path):  # noqa: F811
    """Two processes that share nothing but the bucket; stopped, and gone on with on two other hosts."""
    running = start_processes(tmp_path, plain, data, "first")
    kept = tmp_path / "first0"
    deadline = time.monotonic() + 200
    while not list(kept.rglob("steps.jsonl")) or not next(kept.rglob("steps.jsonl")).read_text():
        assert time.monotonic() < deadline and running[0].poll() is None, (tmp_path / "first0.txt").read_text()
        time.sleep(0.02)
    running[1].send_signal(15)
    statuses, said = ended(running, tmp_path, "first")
    assert statuses == [75, 75], said
    assert not list((tmp_path / "first1").rglob("checkpoints")), "process 0 alone saves"
    statuses, said = ended(start_processes(tmp_path, plain, data, "second"), tmp_path, "second")
    assert statuses == [0, 0] and "resume     from step" in said, said
    found = bucket.fetch(plain)
    steps, expected = (read_records(w, STEPS_FILE) for w in (found, alone[0]))
    assert [s["step"] for s in steps] == [s["step"] for s in expected]
    # which process has a sample tells its place in the batch, and so what drop path takes from it
    assert [sorted(s["batch"]) for s in steps] == [sorted(s["batch"]) for s in expected]
    assert [r["step"] for r in read_records(found) if r["kind"] == "validation"] == [6]
    weights = checkpoint.load_weights(found, *split_small())
    assert weights[2].startswith("best validation")


def split_small():
    """Trees of the shapes of the toy's parameters and statistics."""
    return split_model(packs.Small(4, 0))[1:]


def test_trials_of_a_sweep_lie_in_a_bucket(data, tmp_path, plain, monkeypatch):  # noqa: F811
    space = tmp_path / "space.py"
    space.write_text("def suggest(trial):\n    trial.suggest_float('optim.schedule.peak', 1e-3, 1e-1, log=True)\n")
    own = {k: v for k, v in OWN[1].items() if k != "optim.schedule.peak"}
    command = [f"--config={RECIPE}", f"--space={space}", "--trials=2", f"--workdir={plain}", "--pack=2"]
    with pytest.raises(UserError, match=r"bucket.*--storage"):
        sweep.main([*command, *overrides(data, own)])
    with shrunk():
        assert sweep.main([*command, f"--storage={tmp_path / 'study'}", *overrides(data, own)]) == 0
    other_host(monkeypatch, tmp_path)
    for trial in ("trial0000", "trial0001"):
        found = bucket.fetch(f"{plain}/{trial}")
        assert any(r["kind"] == "validation" for r in read_records(found))


if __name__ == "__main__":  # a process of a run of two, with the toy network
    with shrunk():
        sys.exit(train.main(sys.argv[1:]))
