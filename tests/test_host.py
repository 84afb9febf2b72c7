"""Cores and memory that a container or a scheduler allows."""

import os
from pathlib import Path

import pytest

from xdim_jax.base import host
from xdim_jax.sweeps import dry_run

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/\n", "memory.max"),  # a container
        ("0::/system.slice/slurmstepd.scope/job_7/step_0\n", "system.slice/slurmstepd.scope/job_7/memory.max"),
        ("0::/user.slice/run-r1.scope\n", "user.slice/run-r1.scope/memory.max"),  # systemd-run
        ("0::/docker/of/the/host\n", "memory.max"),  # the path of the host, which the container does not see
        ("5:cpu,cpuacct:/job\n4:memory:/slurm/uid_1/job_7\n0::/\n", "memory/slurm/uid_1/job_7/memory.limit_in_bytes"),
        ("4:hugetlb,memory:/slurm\n", "memory/memory.limit_in_bytes"),
    ],
)
def test_memory_is_that_of_the_machine_or_less_in_a_container_or_job(groups, file, tmp_path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "cgroup").write_text(groups)
    limit = tmp_path / "groups" / file
    limit.parent.mkdir(parents=True)
    monkeypatch.setattr(host, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "groups")
    assert host.memory_bytes() == machine
    for text, expected in (("max\n", machine), (f"{2**28}\n", 2**28), (f"{2**62}\n", machine)):
        limit.write_text(text)
        assert host.memory_bytes() == expected


def test_the_limit_of_another_job_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "cgroup").write_text("3:memory:/slurm/job_7\n")
    other = tmp_path / "memory" / "slurm" / "job_8" / "memory.limit_in_bytes"
    other.parent.mkdir(parents=True)
    other.write_text("1024\n")
    monkeypatch.setattr(host, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    assert host.memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/\n", ["cpu.max"]),  # a container
        ("0::/kubepods.slice/pod7/box\n", ["kubepods.slice/pod7/cpu.max"]),
        ("5:cpu,cpuacct:/job\n0::/\n", ["cpu/job/cpu.cfs_quota_us", "cpu/job/cpu.cfs_period_us"]),
        ("5:cpuacct,cpu:/docker/of/the/host\n", ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]),
    ],
)
def test_cores_are_limited_by_the_time_that_a_container_may_use(groups, files, tmp_path, monkeypatch):
    (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(host, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert host.count_cores() == 64
    for quota, period, expected in ((400000, 100000, 4), (150000, 100000, 2), (5000, 50000, 1), (9900000, 100000, 64)):
        for file, text in zip(
            files, [f"{quota}", f"{period}"] if len(files) == 2 else [f"{quota} {period}"], strict=True
        ):
            path = tmp_path / "groups" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        assert host.count_cores() == expected
    (tmp_path / "groups" / files[0]).write_text("max 100000\n" if len(files) == 1 else "-1\n")
    assert host.count_cores() == 64


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_are_those_that_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host.count_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert host.count_cores() == len(before) and host.processor()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_a_dry_run_on_a_cpu_has_no_more_memory_than_the_job(monkeypatch):
    assert 2**20 < dry_run.available_bytes() <= host.memory_bytes()
    monkeypatch.setattr(dry_run, "memory_bytes", lambda: 2**20)
    assert dry_run.available_bytes() == 2**20
