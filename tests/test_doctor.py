"""The doctor tells what is wrong with a machine, and goes on where a check breaks."""

import json
import math
import sys

import jax
import pytest

from tests.small_runs import use_three_convolutions
from xdim_jax import doctor, ops
from xdim_jax.training import diagnosis


def run(capsys, *arguments):
    status = doctor.main(arguments)
    return status, capsys.readouterr().out


def test_a_machine_that_is_well(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "case.nii.gz").write_bytes(b"x" * 30_000_000)
    status, out = run(capsys, "--quick", f"--data={tmp_path / 'data'}", f"--json={tmp_path / 'found.json'}")
    lines = {line.split()[0]: line for line in out.splitlines() if line[:1].strip()}
    assert status == 0 and lines["verdict"].split()[1].startswith("ready")
    assert set(lines) == {
        "versions", "devices", "memory", "cache", "operations", "precision", "reading", "verdict"
    }  # fmt: skip
    assert jax.__version__ in lines["versions"] and "1 x cpu" in lines["devices"] and "port" in lines["versions"]
    assert "1 files" in lines["reading"] and ops.active_implementation() in lines["operations"]
    assert str(tmp_path / "cache") in lines["cache"]
    found = json.loads((tmp_path / "found.json").read_text())
    facts = {f["check"]: f["facts"] for f in found["findings"]}
    assert facts["reading"]["bytes"] == 30_000_000 and facts["reading"]["files"] == 1
    assert facts["precision"]["tflops"]["float32"] > 0 and 0 < facts["precision"]["bfloat16_error"] < 0.05
    assert not list((tmp_path / "cache").rglob(".doctor*"))


def test_the_programs_of_the_cache_are_counted(tmp_path, monkeypatch):
    for name, size in (("a", 10), ("b", 32)):
        (tmp_path / name).write_bytes(b"x" * size)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        found = diagnosis.cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found.status == diagnosis.OK
    assert found.facts == {"folder": str(tmp_path), "programs": 2, "bytes": 42}


def test_the_terminal_gets_json_alone(capsys):
    status, out = run(capsys, "--quick", "--json=-")
    assert status == 0 and json.loads(out)["verdict"].startswith("ready")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "no files"),
    ],
)
def test_data_that_cannot_be_read(make, text, tmp_path, capsys, monkeypatch):
    make(tmp_path / "data")
    monkeypatch.setattr(doctor, "precision", lambda: diagnosis.Finding("precision", diagnosis.OK, ""))
    status, out = run(capsys, "--quick", f"--data={tmp_path / 'data'}")
    assert status == 1 and text in out and out.splitlines()[-1] == "verdict    not ready: reading"


def test_a_check_that_breaks_is_a_failure_of_its_own(capsys, monkeypatch):
    def precision():
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(doctor, "precision", precision)
    status, out = run(capsys, "--quick")
    assert status == 1 and "precision  failure  RuntimeError: no kernel image is available" in out
    assert "please report it" in out and "not ready: precision" in out


def test_versions_that_do_not_go_together(monkeypatch):
    usual = diagnosis.environment.versions()
    monkeypatch.setattr(diagnosis.environment, "versions", lambda: usual | {"jaxlib": "0.4.1"})
    assert diagnosis.versions().status == diagnosis.FAILURE and "jaxlib 0.4.1" in diagnosis.versions().text
    monkeypatch.setattr(diagnosis.environment, "versions", lambda: usual | {"grain": "not installed"})
    assert diagnosis.versions().text == "not installed: grain"
    file = "constraints-newest.txt" if sys.version_info >= (3, 12) else "constraints.txt"
    assert f"pip install -c {file} ." in diagnosis.versions().advice


def test_an_accelerator_that_is_not_used(monkeypatch):
    exists = diagnosis.Path.exists
    monkeypatch.setattr(diagnosis.Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    found = diagnosis.devices()
    assert found.status == diagnosis.WARNING and "xdim_jax[cuda12]" in found.advice


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    try:
        found = diagnosis.cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found.status == diagnosis.WARNING and "XDG_CACHE_HOME" in found.advice


@pytest.mark.slow
def test_the_training_step(monkeypatch):
    monkeypatch.setattr(diagnosis, "_STEP_SECONDS", 3.0)
    found = diagnosis.training_step()
    assert found.status == diagnosis.OK, found
    assert found.facts["apart"] < 1e-3 and found.facts["loss"] < found.facts["first_loss"]
    assert found.facts["steps"] >= 2 and math.isfinite(found.facts["median_s"])
    # a form that computes something else is seen; a small network shows it as well
    use_three_convolutions(monkeypatch.setattr)
    conv = ops.convolution.dense
    monkeypatch.setattr(ops.convolution, "dense", lambda *a: 1.05 * conv(*a))
    broken = diagnosis.training_step()
    assert broken.status == diagnosis.FAILURE and "reference implementation" in broken.text
