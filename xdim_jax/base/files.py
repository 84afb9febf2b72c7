"""Atomic writes of files, and JSON."""

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk, a quota, or a limit of the file size


def cache_folder() -> Path:
    """Return the package's folder inside the user's cache folder, for compiled programs and local copies of buckets."""
    if parent := os.environ.get("XDG_CACHE_HOME"):
        return Path(parent) / "xdim_jax"
    try:
        return Path.home() / ".cache" / "xdim_jax"
    except RuntimeError:  # a container whose user has no home
        return Path(tempfile.gettempdir()) / f"xdim_jax-{os.getuid()}"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path with the same suffixes, and renames it to ``path`` at the end.

    If the block raises, the temporary file or folder is removed, and ``path`` remains unchanged.

    Raises:
        UserError: The file cannot be written (disk full, read-only, quota); the message names the file and the reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        raise write_error(path, error) from error
    except BaseException:
        _remove(temporary)
        raise


def partial_files(path: Path) -> list[Path]:
    """Return temporary files of `atomic_path` that remained next to ``path`` because the process was killed."""
    return list(path.parent.glob(f".{'[0-9a-f]' * 8}.partial.{glob.escape(path.name)}"))


def write_error(path: Path, error: OSError) -> UserError:
    """Return the error for a failed write; if the disk or a quota is full, the message says how much space is free."""
    reason = error.strerror or str(error)
    if error.errno not in DISK_FULL:
        return UserError(f"cannot write {path}: {reason}; choose another path")
    folder = next((p for p in [path, *path.parents] if p.is_dir()), Path("/"))
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free there"
    except OSError:
        free = "free space unknown"
    step = "make room, or choose another folder, and run the same command again"
    return UserError(f"cannot write {path}: {reason} ({free}); {step}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # if a parent is a file, there is nothing to remove
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: The file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); write it again with the command that created it") from error
