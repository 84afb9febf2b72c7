"""Workdirs in object stores: ``gs://bucket/path``, ``s3://bucket/path``, and any other address that fsspec knows.

A run works in a folder of this machine, and what it writes follows to the bucket: every so often while it goes on, and
at its end. Object stores have neither renames nor appends, so what belongs together is told by a manifest, which is
written last: whoever takes up the run finds all files of one moment, or of the one before, and never a part of a
checkpoint.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import cache_folder
from xdim_jax.base.log import LOG_FILE, say, warn

MANIFEST = ".manifest.json"  # in the bucket: sizes by path
EVERY = 30.0  # seconds between uploads
_UNFINISHED = (".orbax-checkpoint-tmp", ".partial.")  # in names of what is being written


def is_address(text: object) -> bool:
    """Whether this is an address in a bucket, and not a path."""
    return "://" in str(text)


def local_folder(address: str) -> Path:
    """The folder of this machine that stands for an address; ``XDIM_JAX_SCRATCH`` says below what."""
    scheme, _, path = address.rstrip("/").partition("://")
    root = Path(os.environ.get("XDIM_JAX_SCRATCH") or cache_folder() / "buckets")
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:8]
    return root / f"{scheme}-{digest}" / path.rpartition("/")[2]


def fetch(text: str | Path) -> Path:
    """A workdir to read: the path itself, or that of a copy of what is in the bucket.

    Raises:
        UserError: the bucket cannot be reached, or holds no run there.
    """
    if not is_address(text):
        return Path(text)
    mirror = Mirror(str(text))
    if not mirror.pull():
        raise UserError(f"--workdir={text}: there is no run; give the --workdir of xdim_jax.train")
    return mirror.folder


@contextlib.contextmanager
def workdir(text: str | Path, *, writes: bool = True) -> Iterator[Path]:
    """A workdir to train in; what is written into it follows to the bucket, if it is in one and this process writes.

    Raises:
        UserError: the bucket cannot be reached, or what was written at last could not follow.
    """
    if not is_address(text):
        yield Path(text)
        return
    mirror = Mirror(str(text))
    mirror.pull()
    mirror.folder.mkdir(parents=True, exist_ok=True)
    if not writes:
        yield mirror.folder
        return
    with mirror.following():
        yield mirror.folder


def open_filesystem(address: str) -> tuple[Any, str]:
    """What fsspec has for an address, and the path in it.

    Raises:
        UserError: the address is of a kind that no installed package knows.
    """
    import fsspec

    local = {"auto_mkdir": True} if address.startswith("file://") else {}
    try:
        return fsspec.core.url_to_fs(address.rstrip("/"), **local)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address}: {error}; pip install 'xdim_jax[cloud]' for gs:// and s3://") from error


@contextlib.contextmanager
def no_answer(address: str, what: str) -> Iterator[None]:
    """Inside the block, an error of a store's client becomes a UserError: that the address cannot be ``what``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # no such bucket, no credentials, no network
        reason = first_line(error)
        raise UserError(
            f"{address} cannot be {what}: {type(error).__name__}: {reason}; look at the bucket's name and at your "
            "credentials (gcloud auth application-default login; aws configure)"
        ) from error


class Mirror:
    """A folder of this machine and the same in a bucket.

    Args:
        address: of the folder in the bucket.

    Raises:
        UserError: the address is of a kind that no installed package knows.
    """

    def __init__(self, address: str):
        self.address, self.folder = address.rstrip("/"), local_folder(address)
        self._fs, self._root = open_filesystem(self.address)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what is in the bucket as it is here

    def pull(self) -> bool:
        """Makes the folder what the manifest says; False if there is none in the bucket: the folder is empty then."""
        with no_answer(self.address, "read"):
            # a listing that another process has changed since would be stale
            self._fs.invalidate_cache()
            manifest = self._read_manifest()
            wanted = manifest or {}
            for path in self._files():
                if path not in wanted and path != LOG_FILE:  # which whoever started this process may be writing
                    (self.folder / path).unlink()
            for path, size in wanted.items():
                here = self.folder / path
                # small files may change and keep their length; large ones are written once
                if not here.is_file() or here.stat().st_size != size or size < 2**20:
                    here.parent.mkdir(parents=True, exist_ok=True)
                    part = here.with_name(f".partial.{here.name}")
                    self._fs.get_file(f"{self._root}/{path}", str(part))
                    part.replace(here)
            self._drop_empty()
            self._sent = {path: self._state(path) for path in wanted}
        if manifest is not None:
            say(f"bucket     {self.address}: {len(wanted)} files, as {self.folder}")
        return manifest is not None

    def push(self) -> None:
        """Uploads what has changed, then the manifest, then removes what is here no longer."""
        with no_answer(self.address, "written"):
            for _ in range(5):
                try:
                    state = {path: self._state(path) for path in self._files()}
                    for path, found in state.items():
                        if self._sent.get(path) != found:
                            self._fs.put_file(str(self.folder / path), f"{self._root}/{path}")
                    break
                except FileNotFoundError:  # an old checkpoint has just been removed: look again
                    continue
            else:
                raise OSError(errno.EBUSY, "files come and go too fast", str(self.folder))
            if state == self._sent:
                return
            manifest = {path: size for path, (size, _) in state.items()}
            self._fs.pipe_file(f"{self._root}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
            gone, self._sent = self._sent.keys() - state.keys(), state
            for path in gone:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{path}")

    @contextlib.contextmanager
    def following(self, every: float = EVERY) -> Iterator[None]:
        """Inside the block, what is written follows every so many seconds; at its end, the last of it."""
        done = threading.Event()

        def follow() -> None:
            while not done.wait(every):
                try:
                    self.push()
                except UserError as error:
                    warn(f"{error}; tried again in {every:.0f} s")

        thread = threading.Thread(target=follow, name="bucket", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            try:
                self.push()
            except UserError as error:
                raise UserError(f"{error}. All of it is in {self.folder}; run the same command again here") from error

    def _read_manifest(self) -> dict[str, int] | None:
        try:
            return json.loads(self._fs.cat_file(f"{self._root}/{MANIFEST}"))
        except FileNotFoundError:
            return None

    def _files(self) -> list[str]:
        """Of the folder, but for what is being written; relative, with slashes."""
        found = []
        for path in self.folder.rglob("*"):
            relative = path.relative_to(self.folder).as_posix()
            if path.is_file() and not any(mark in relative for mark in _UNFINISHED):
                found.append(relative)
        return sorted(found)

    def _state(self, path: str) -> tuple[int, int]:
        stat = (self.folder / path).stat()
        return stat.st_size, stat.st_mtime_ns

    def _drop_empty(self) -> None:
        """Folders that hold no file any more: a checkpoint is known by its folder."""
        for folder in sorted((p for p in self.folder.rglob("*") if p.is_dir()), reverse=True):
            if not any(p.is_file() for p in folder.rglob("*")):
                shutil.rmtree(folder)
