"""Standard output and standard error that cannot be written: a reader that has ended, a full disk, closed streams."""

import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from xdim_jax.base import threads

REPO = Path(__file__).parent.parent

# logs, shows progress, writes a file, and ends in the way that the first argument names
_MAIN = """
import sys
from xdim_jax.base import log
from xdim_jax.base.command import run
from xdim_jax.base.errors import UserError

def main(argv):
    how, path = argv
    for _ in range(3):
        log.say("a line " * 2000)
        log.warn("a warning")
    show = log.progress_bar("work")
    show(1, 2)
    with open(path, "w") as file:
        file.write("the work")
    show(2, 2)
    if how == "result":
        log.write_result("the result")
    if how == "error":
        raise UserError("unusable")
    if how == "interrupt":
        raise KeyboardInterrupt
    return 75 if how == "stopped" else 0

run(main)
"""
_CODES = {"done": 0, "stopped": 75, "error": 2, "interrupt": 130, "result": 0}


@pytest.mark.parametrize("how", _CODES)
@pytest.mark.parametrize(
    "streams", ["{} | true", "{} 2>&1 | true", "{} > /dev/full 2>&1", "{} >&- 2>&- <&-", "{} 2>&-"]
)
def test_the_work_and_the_exit_status_do_not_depend_on_the_streams(streams, how, tmp_path):
    """Only text that is the result of a command is missed: where the disk is full, the status is 2."""
    script, file = tmp_path / "main.py", tmp_path / "file"
    script.write_text(_MAIN)
    line = streams.format(f"{sys.executable} {script} {how} {file}") + "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", line], cwd=REPO, capture_output=True, text=True, timeout=60)
    expected = 2 if how == "result" and "/dev/full" in streams else _CODES[how]
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert file.read_text() == "the work"


def test_every_console_script_ends_through_the_same_function(monkeypatch):
    """So that what holds for one main holds for all."""
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    for script, target in scripts.items():
        module, function = target.split(":")
        ended = []
        owner = import_module(f"xdim_jax.{function}") if module == "xdim_jax.entry" else import_module(module)
        monkeypatch.setattr(owner, "run", ended.append)
        owner.command()
        assert ended == [owner.main], script
    monkeypatch.undo()
    for path in [*(REPO / "xdim_jax").rglob("*.py"), *(REPO / "weight_port").rglob("*.py")]:
        assert not re.search(r"(?<!\w)print\(", path.read_text()) or path.name in ("log.py", "command.py"), path


def test_a_call_in_a_thread_returns_raises_or_is_abandoned():
    assert threads.call_in_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        threads.call_in_thread(lambda: 1 // 0)
    end = threading.Event()
    began = time.monotonic()
    with pytest.raises(threads.StoppedError):
        threads.call_in_thread(end.wait, lambda: time.monotonic() - began > 0.3)
    assert threads.is_abandoned_call_running()
    end.set()
    while threads.is_abandoned_call_running():
        time.sleep(0.01)


def test_a_process_with_an_abandoned_call_ends_at_once():
    """A long call of compiled code, which Python can neither interrupt nor wait for."""
    script = """
import hashlib
from xdim_jax.base import command, threads
def main(argv):
    try:
        threads.call_in_thread(lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9), lambda: True)
    except threads.StoppedError:
        return 75
command.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, timeout=60)
    assert done.returncode == 75


def test_a_hangup_that_is_ignored_stays_ignored():
    """As with nohup."""
    script = """
import os, signal, sys
from xdim_jax.base.signals import catch_signals
with catch_signals() as stop:
    stop.busy = True
    os.kill(os.getpid(), signal.SIGHUP)
    print(stop.signal, flush=True)
"""
    for prefix, expected in (("trap '' HUP;", 0), ("", signal.SIGHUP)):
        line = f"{prefix} {sys.executable} -c '{script}'"
        done = subprocess.run(["bash", "-c", line], cwd=REPO, capture_output=True, text=True, timeout=60)
        assert done.stdout.split()[-1] == str(int(expected)), done.stderr
