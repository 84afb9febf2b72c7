"""Workdirs in object stores: ``gs://bucket/path``, ``s3://bucket/path``, and any other address that fsspec knows.

A run works in a local folder. Its files are uploaded to the bucket every 30 seconds and at the end. If an upload is
interrupted, the bucket may contain a part of a checkpoint. Therefore each upload ends with a manifest of all files, and
a machine that resumes the run downloads only the files of the manifest.
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

MANIFEST = ".manifest.json"  # file in the bucket: path -> size, for all files of the last complete upload
UPLOAD_SECONDS = 30.0  # time between uploads
_UNFINISHED = (".orbax-checkpoint-tmp", ".partial.")  # parts of the names of files that are being written


def is_address(text: object) -> bool:
    """Return True for an address in a bucket, and False for a path."""
    return "://" in str(text)


def local_folder(address: str) -> Path:
    """Return the local folder of an address, inside ``XDIM_JAX_SCRATCH`` or the cache folder."""
    scheme, _, path = address.rstrip("/").partition("://")
    root = Path(os.environ.get("XDIM_JAX_SCRATCH") or cache_folder() / "buckets")
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:8]
    return root / f"{scheme}-{digest}" / path.rpartition("/")[2]


def fetch(text: str | Path) -> Path:
    """Return the path of a workdir for reading; a workdir in a bucket is downloaded first.

    Args:
        text: A path, or an address in a bucket.

    Returns:
        The path, or the local folder with the downloaded files.

    Raises:
        UserError: The bucket cannot be reached, or there is no run at the address.
    """
    if not is_address(text):
        return Path(text)
    mirror = Mirror(str(text))
    if not mirror.pull():
        raise UserError(f"--workdir={text}: there is no run at this address; give the --workdir of xdim_jax.train")
    return mirror.folder


@contextlib.contextmanager
def workdir(text: str | Path, *, writes: bool = True) -> Iterator[Path]:
    """Context manager that yields the path of a workdir for training.

    Args:
        text: A path, or an address in a bucket. Files of a bucket are downloaded at the beginning.
        writes: True if this process uploads the files.

    Raises:
        UserError: The bucket cannot be reached, or the last files cannot be uploaded.
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
    with mirror.uploading():
        yield mirror.folder


def open_filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it.

    Raises:
        UserError: No installed package supports this kind of address.
    """
    import fsspec

    local = {"auto_mkdir": True} if address.startswith("file://") else {}
    try:
        return fsspec.core.url_to_fs(address.rstrip("/"), **local)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address}: {error}; pip install 'xdim_jax[cloud]' for gs:// and s3://") from error


@contextlib.contextmanager
def bucket_errors(address: str, action: str) -> Iterator[None]:
    """Inside the block, turn any error into a UserError.

    Args:
        address: Address in a bucket, for the message.
        action: Participle for the message "<address> cannot be <action>", i.e. "read" or "written".

    Raises:
        UserError: The block has raised an error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # no such bucket, no credentials, no network
        reason = first_line(error)
        raise UserError(
            f"{address} cannot be {action}: {type(error).__name__}: {reason}; check the name of the bucket and your "
            "credentials (gcloud auth application-default login; aws configure)"
        ) from error


class Mirror:
    """A local folder and its copy in a bucket.

    Args:
        address: Address of the folder in the bucket.

    Raises:
        UserError: No installed package supports this kind of address.
    """

    def __init__(self, address: str):
        self.address, self.folder = address.rstrip("/"), local_folder(address)
        self._fs, self._root = open_filesystem(self.address)
        self._sent: dict[str, tuple[int, int]] = {}  # path -> size and modification time when it was uploaded

    def pull(self) -> bool:
        """Download the files of the manifest, and delete all other local files.

        Returns:
            False if the bucket has no manifest, that is, no run.

        Raises:
            UserError: The bucket cannot be read.
        """
        with bucket_errors(self.address, "read"):
            # another process may have changed the bucket since it was listed
            self._fs.invalidate_cache()
            manifest = self._read_manifest()
            wanted = manifest or {}
            for path in self._files():
                if path not in wanted and path != LOG_FILE:  # the process that launched this one may be writing its log
                    (self.folder / path).unlink()
            for path, size in wanted.items():
                here = self.folder / path
                # small files may change without changing their size; large ones are written only once
                if not here.is_file() or here.stat().st_size != size or size < 2**20:
                    here.parent.mkdir(parents=True, exist_ok=True)
                    part = here.with_name(f".partial.{here.name}")
                    self._fs.get_file(f"{self._root}/{path}", str(part))
                    part.replace(here)
            self._drop_empty()
            self._sent = {path: self._state(path) for path in wanted}
        if manifest is not None:
            say(f"bucket     {self.address}: {len(wanted)} files, local copy in {self.folder}")
        return manifest is not None

    def push(self) -> None:
        """Upload changed files, then the manifest; then delete files in the bucket that no longer exist locally.

        Raises:
            UserError: The bucket cannot be written.
        """
        with bucket_errors(self.address, "written"):
            for _ in range(5):
                try:
                    state = {path: self._state(path) for path in self._files()}
                    for path, found in state.items():
                        if self._sent.get(path) != found:
                            self._fs.put_file(str(self.folder / path), f"{self._root}/{path}")
                    break
                except FileNotFoundError:  # an old checkpoint has just been deleted: list the files again
                    continue
            else:
                raise OSError(errno.EBUSY, "files change too fast", str(self.folder))
            if state == self._sent:
                return
            manifest = {path: size for path, (size, _) in state.items()}
            self._fs.pipe_file(f"{self._root}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
            gone, self._sent = self._sent.keys() - state.keys(), state
            for path in gone:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{path}")

    @contextlib.contextmanager
    def uploading(self, every: float = UPLOAD_SECONDS) -> Iterator[None]:
        """Inside the block, upload changed files every ``every`` seconds, and once more at its end.

        Raises:
            UserError: The last upload failed. Earlier failures are logged, and the upload is tried again.
        """
        done = threading.Event()

        def upload() -> None:
            while not done.wait(every):
                try:
                    self.push()
                except UserError as error:
                    warn(f"{error}; trying again in {every:.0f} s")

        thread = threading.Thread(target=upload, name="bucket", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            try:
                self.push()
            except UserError as error:
                text = f"{error}. All files are in {self.folder}; run the same command again on this machine"
                raise UserError(text) from error

    def _read_manifest(self) -> dict[str, int] | None:
        try:
            return json.loads(self._fs.cat_file(f"{self._root}/{MANIFEST}"))
        except FileNotFoundError:
            return None

    def _files(self) -> list[str]:
        """Return the relative paths of all complete files of the folder, with slashes."""
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
        """Delete folders without files: a folder named after a step would be taken for a checkpoint."""
        for folder in sorted((p for p in self.folder.rglob("*") if p.is_dir()), reverse=True):
            if not any(p.is_file() for p in folder.rglob("*")):
                shutil.rmtree(folder)
