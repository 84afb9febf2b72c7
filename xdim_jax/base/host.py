"""Cores and memory of the machine that this process may use."""

import math
import os
import platform
from pathlib import Path, PurePosixPath

_CGROUP = Path("/proc/self/cgroup")  # the groups of this process
_CGROUPS = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """Return the number of cores that this process may use.

    It is that of the machine, or less if a scheduler allows only some of its cores, or if a container may use only part
    of their time. Parts of a core are rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, version in _groups("cpu"):
        if version == 2:
            words = _words(folder / "cpu.max")  # microseconds in a period, and the period
        else:
            words = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # no limit: "max", or -1
            cores = min(cores, math.ceil(int(words[0]) / int(words[1])))
    return cores


def memory_bytes() -> int:
    """Return the memory in bytes that this process may use.

    It is that of the machine, or the limit of the container or of the job of a scheduler, if this is smaller.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder, version in _groups("memory"):
        words = _words(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        found += [int(word) for word in words if word.isdecimal()]  # no limit: "max"
    return min(found)


def _groups(controller: str) -> list[tuple[Path, int]]:
    """Return the folders that may hold limits of this process, and the version of control groups of each.

    They are the control groups of the process and all groups around them. A line of ``/proc/self/cgroup`` is
    ``number:controllers:path``; in version 2 of cgroups, the number is 0 and there are no controllers.
    """
    try:
        lines = _CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    folders = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, version = _CGROUPS, 2
        elif controller in controllers.split(","):
            root, version = _CGROUPS / controller, 1
        else:
            continue
        # in a container, the path may be that of the host, which does not exist; the root is then that of the container
        inner = PurePosixPath(path).relative_to("/")
        folders += [(root / group, version) for group in (inner, *inner.parents)]
    return folders


def _words(path: Path) -> list[str]:
    """Return the words of a file of a control group; none if there is no such file."""
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
