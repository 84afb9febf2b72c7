"""Cores and memory of the machine that this process may use."""

import os
import platform
from pathlib import Path, PurePosixPath

_CGROUP = Path("/proc/self/cgroup")  # the groups of this process
_CGROUPS = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """Return the number of cores that this process may use. A scheduler may allow only some cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the memory in bytes that this process may use.

    It is that of the machine, or the limit of the container or of the job of a scheduler, if this is smaller.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _limit_files():
        try:
            found.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is no such file, or no limit ("max")
            continue
    return min(found)


def _limit_files() -> list[Path]:
    """Return the files that may hold a memory limit of this process: its control groups and all groups around them.

    A line of ``/proc/self/cgroup`` is ``number:controllers:path``; in version 2 of cgroups, the number is 0 and there
    are no controllers.
    """
    try:
        lines = _CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    files = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        # in a container, the path may be that of the host, which does not exist; the root is then that of the container
        inner = PurePosixPath(path).relative_to("/")
        files += [root / group / name for group in (inner, *inner.parents)]
    return files


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
