"""Restart of a command with huge pages, because glibc reads this setting only when a process starts."""

import contextlib
import os
import sys
from pathlib import Path


def prefer_huge_pages() -> None:
    """On CPU, restart this process with huge pages for glibc's allocator, unless they are already in use.

    XLA allocates the temporaries of a step again at every step. With pages of 4 KiB, a tenth of the time of a step is
    spent on page faults. If the operating system always or never uses huge pages, the setting has no effect, and the
    process is not restarted.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    setting = "glibc.malloc.hugetlb=1"
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    accelerators = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
    if (
        {"-h", "--help"} & set(sys.argv)
        or "glibc.malloc.hugetlb" in tunables
        or not mode.is_file()
        or "[madvise]" not in mode.read_text(encoding="ascii")
        or any(Path(p).exists() for p in accelerators)
    ):
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{setting}" if tunables else setting
    if sys.stdout is not None:  # it is None if standard output is closed
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
