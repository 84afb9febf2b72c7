"""The implementation of the operations is chosen by measurement. A CPU with a slow implementation stands for a GPU."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.packed_runs import RECIPE, overrides, read_state, small_network
from xdim_jax import train
from xdim_jax.base.config import load_config
from xdim_jax.ops import convolution
from xdim_jax.runs.records import STEPS_FILE
from xdim_jax.training import choose_ops, mesh, open_run
from xdim_jax.training import train as train_module
from xdim_jax.training.check import resolve_config

OWN = {"train.epochs": 1, "optim.schedule.peak": 1e-2}


@pytest.fixture
def measured(tmp_path):
    """Small networks, devices that count as GPUs, and a cache folder of the test. Yields the measured times."""
    calls = []
    seconds = choose_ops._seconds

    def count(*arguments):
        calls.append(seconds(*arguments))
        return calls[-1]

    with small_network(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDIM_JAX_CACHE", "on")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        patch.setattr(choose_ops, "_seconds", count)
        for module in (open_run, train_module):
            patch.setattr(module, "is_measured", lambda setting, devices: setting == "auto")
        yield calls
    jax.config.update("jax_compilation_cache_dir", None)


def slow(function):
    """Return the convolution with a delay of 30 ms, computing the same values."""

    def wait(*ignored):
        time.sleep(0.03)
        return np.float32(0)

    def convolution_with_delay(x, *arguments, **options):
        delay = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(x[(0,) * x.ndim]))
        return function(x, *arguments, **options) + jax.lax.stop_gradient(delay)

    return convolution_with_delay


def run(data, workdir, own=OWN):
    assert train.main([f"--config={RECIPE}", f"--workdir={workdir}", *overrides(data, own)]) == 0
    return workdir


def assert_equal(a, b):
    """Two runs have the same records of steps and the same state, bit by bit."""
    assert (a / STEPS_FILE).read_bytes() == (b / STEPS_FILE).read_bytes()
    states = [jax.tree.leaves(read_state(workdir)) for workdir in (a, b)]
    assert len(states[0]) > 5
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*states, strict=True))


@pytest.mark.parametrize(("slow_one", "best"), [("conv_reference", {"fast"}), ("dense", {"library", "reference"})])
def test_the_faster_one_is_used_and_recorded(slow_one, best, camus4, tmp_path, measured, monkeypatch, capsys):
    monkeypatch.setattr(convolution, slow_one, slow(getattr(convolution, slow_one)))
    first = run(camus4, tmp_path / "first")
    record = json.loads((first / choose_ops.FILE).read_text())
    chosen, seconds = record["implementation"], record["seconds"]
    assert chosen in best and seconds[chosen] == min(seconds.values()) > 0
    assert {name for name, found in seconds.items() if found > 0.03} == set(choose_ops.CANDIDATES) - best
    assert len(measured) == 3 and f"operations {chosen} is used" in capsys.readouterr().out
    again = run(camus4, tmp_path / "again")
    assert len(measured) == 3, "the choice is cached"
    forced = run(camus4, tmp_path / "forced", OWN | {"train.ops": chosen})
    assert len(measured) == 3 and not (forced / choose_ops.FILE).exists()
    assert_equal(first, again)
    assert_equal(first, forced)


def test_a_resumed_run_keeps_its_choice(camus4, tmp_path, measured, monkeypatch):
    """The record in the workdir counts, even if it names the slower implementation and the cache is gone."""
    workdir = run(camus4, tmp_path / "run")
    record = json.loads((workdir / choose_ops.FILE).read_text())
    record["implementation"] = other = "reference" if record["implementation"] == "fast" else "fast"
    (workdir / choose_ops.FILE).write_text(json.dumps(record))
    for path in (tmp_path / "cache" / "xdim_jax" / "ops").glob("*.json"):
        path.unlink()
    run(camus4, workdir, OWN | {"train.epochs": 2})
    assert len(measured) == 3
    assert json.loads((workdir / choose_ops.FILE).read_text())["implementation"] == other


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": "another", "implementation": "fast"}'])
def test_a_damaged_record_is_measured_again(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / choose_ops.FILE).write_text(damage)
    assert choose_ops._read(tmp_path / choose_ops.FILE, "key") is None


def test_what_fails_is_not_used(camus4, tmp_path, measured, monkeypatch, capsys):
    """One implementation needs too much memory, then all do."""
    failing, seconds, tried = {2}, choose_ops._seconds, []

    def fail(*arguments):
        tried.append(arguments)
        if len(tried) in failing:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 GiB")
        return seconds(*arguments)

    monkeypatch.setattr(choose_ops, "_seconds", fail)
    workdir = run(camus4, tmp_path / "run")
    record = json.loads((workdir / choose_ops.FILE).read_text())
    first, lost, last = choose_ops.CANDIDATES
    assert record["implementation"] in (first, last) and record["seconds"][lost] is None
    assert record["seconds"][first] > 0 and record["seconds"][last] > 0
    assert "99 GiB" in "".join(capsys.readouterr())
    failing |= {4, 5, 6}
    other = run(camus4, tmp_path / "other", OWN | {"data.batch": 2})
    assert len(tried) == 6 and not (other / choose_ops.FILE).exists(), "used without a measurement, and measured again"
    assert "--config.train.ops" in "".join(capsys.readouterr())


def test_all_processes_skip_what_one_cannot_compile(monkeypatch):
    """Running the step needs all processes."""
    monkeypatch.setattr(mesh, "agree", lambda flag: True)
    monkeypatch.setattr(choose_ops, "_seconds", lambda *arguments: pytest.fail("the others would wait"))
    compiled, seconds = choose_ops._try(lambda name: "compiled", "fast", None, None, None, None)
    assert compiled == "compiled" and np.isinf(seconds)


def test_without_the_cache_nothing_is_read_from_it_or_written_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    record = {"key": "key", "implementation": "fast"}
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")
    choose_ops._record(record, tmp_path / "first", "key")
    assert (tmp_path / "first" / choose_ops.FILE).is_file() and not (tmp_path / "cache").exists()
    monkeypatch.setenv("XDIM_JAX_CACHE", "on")
    choose_ops._record(record, tmp_path / "second", "key")
    assert choose_ops._read(choose_ops._cache_file("key"), "key") == record
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")
    assert choose_ops._read(choose_ops._cache_file("key"), "key") is None


def test_the_key_is_that_of_program_and_devices(camus4, monkeypatch):
    def key(**own):
        named = {name.replace("__", "."): value for name, value in own.items()}
        config, _ = resolve_config(load_config(RECIPE, overrides(camus4, named)))
        return choose_ops.program_key(config, mesh.make_devices(1, 1, batch=4))

    first = key()
    assert first == key() == key(optim__schedule__peak=0.5, seed=7, train__epochs=9)
    assert len({first, key(data__batch=2), key(train__precision="bfloat16"), key(data__patch="(64,64)")}) == 4
    monkeypatch.setattr(jax, "__version__", "99.0")
    assert key() != first


def test_only_accelerators_without_a_distributed_depth_are_measured(monkeypatch):
    devices = mesh.make_devices(1, 1, batch=1)
    assert not choose_ops.is_measured("auto", devices), "a CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_ops.is_measured("auto", devices)
    assert not choose_ops.is_measured("fast", devices) and not choose_ops.is_measured("reference", devices)


def test_processes_use_the_record_of_the_first(monkeypatch):
    monkeypatch.setattr(mesh, "gather", lambda value: np.array([1, -1, 0]))
    assert choose_ops._from_first_process(None) == choose_ops.CANDIDATES[1]
    monkeypatch.setattr(mesh, "gather", lambda value: np.array([-1, 1, 0]))
    assert choose_ops._from_first_process("fast") is None
