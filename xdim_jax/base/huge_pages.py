"""Restarts a command with an allocator setting that must be in place before the program starts."""

import os
import sys
from pathlib import Path


def prefer_huge_pages() -> None:
    """On CPU, starts this command anew with glibc's allocator on huge pages, unless it runs so already.

    XLA asks for all temporaries anew at every step, and in pages of 4 KiB the kernel spends a tenth of a step handing
    them out. glibc reads the setting before the program starts, hence the restart. It has no effect where the kernel
    gives huge pages always or never.
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
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
