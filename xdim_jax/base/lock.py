"""A lock that prevents two processes from writing to one workdir at the same time."""

import contextlib
import errno
import os
import socket
import time
from pathlib import Path
from typing import IO

from xdim_jax.base import log
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_error

LOCK_FILE = ".lock"  # process id and host of the process that writes in the folder; it is not copied to buckets
WAIT_SECONDS = 60.0  # default time to wait for a lock; a killed process may still hold it for some time


def lock_workdir(workdir: Path, wait: float = WAIT_SECONDS) -> IO[bytes] | None:
    """Lock a workdir until the returned file is closed, or the process ends in any way.

    Args:
        workdir: Folder of a run; created if it does not exist.
        wait: Time in seconds to wait for another process that has the lock.

    Returns:
        The locked file; None, with a warning, if the file system has no locks.

    Raises:
        UserError: Another process still has the lock, or the folder cannot be written.
    """
    return lock_file(workdir / LOCK_FILE, workdir, wait)


def lock_file(path: Path, workdir: Path | str, wait: float = WAIT_SECONDS) -> IO[bytes] | None:
    """Lock a file that represents a workdir or another path, see `lock_workdir`.

    Args:
        path: The file; created, with its folder, if it does not exist.
        workdir: Path or address that the lock protects, for messages.
        wait: Time in seconds to wait for another process that has the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise write_error(path, error) from error
    end, waiting = time.monotonic() + wait, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warn(f"{path} cannot be locked ({error.strerror}): make sure that only one run uses {workdir}")
                file.close()
                return None
        if not waiting:
            log.say(f"waiting    for {_owner(file)}, which uses {workdir}")
            waiting = True
        if time.monotonic() >= end:
            owner = _owner(file)
            file.close()
            raise UserError(f"{workdir} is in use by {owner}; wait until it ends, stop it, or choose another path")
        time.sleep(0.5)
    with contextlib.suppress(OSError):  # the lock is valid even if the disk is full
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}".encode())
    return file


def _owner(file: IO[bytes]) -> str:
    """Return the process that has locked a file, as text."""
    file.seek(0)
    number, _, host = file.read().decode(errors="replace").partition(" ")
    return f"process {number or '?'} on {host or 'another host'}"
