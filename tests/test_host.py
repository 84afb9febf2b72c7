"""Cores and memory that a container or a scheduler allows."""

import os

import pytest

from xdim_jax.base import host

pytestmark = pytest.mark.quick


def test_memory_is_that_of_the_machine_or_less_in_a_container(tmp_path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(host, "_MEMORY_LIMITS", (limit, tmp_path / "none"))
    assert host.memory_bytes() == machine
    for text, expected in (("max\n", machine), (f"{2**28}\n", 2**28), (f"{2**62}\n", machine)):
        limit.write_text(text)
        assert host.memory_bytes() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_are_those_that_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host.count_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert host.count_cores() == len(before) and host.processor()
