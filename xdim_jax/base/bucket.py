"""Workdirs in object stores: ``gs://bucket/path``, ``s3://bucket/path``, and all other addresses that fsspec supports.

A run works in a local folder. Its files are uploaded to the bucket every 30 seconds and at the end. If an upload is
interrupted, the bucket may contain a part of a checkpoint. Therefore each upload ends with a manifest of all files, and
a machine that resumes the run downloads only the files of the manifest.

Next to the local folder there are two files: a lock, and a record of the last complete upload. A command that writes
holds the lock until its final upload has ended, and deletes the record when all files are uploaded. If the final upload
fails or the process is killed, the record remains, and the next command that writes uploads the remaining files first.
Commands that only read use another local folder.
"""

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import DISK_FULL, cache_folder, read_json, write_json
from xdim_jax.base.lock import LOCK_FILE, WAIT_SECONDS, lock_file
from xdim_jax.base.log import LOG_FILE, say, warn

# file in the bucket: the id of the `Mirror` that wrote it, and path -> size for all files of the last complete upload
MANIFEST = ".manifest.json"
UPLOAD_SECONDS = 30.0  # time between uploads
_TRIES = 5  # attempts to download or upload files while another machine changes them
_UNFINISHED = (".orbax-checkpoint-tmp", ".partial.")  # parts of the names of files that are being written


def is_address(text: object) -> bool:
    """Return True for an address in a bucket, and False for a path."""
    return "://" in str(text)


def local_folder(address: str, *, writes: bool = True) -> Path:
    """Return the local folder of an address, inside ``XDIM_JAX_SCRATCH`` or the cache folder.

    Args:
        address: Address in a bucket.
        writes: True for the folder whose files are uploaded; False for the folder of commands that only read.
    """
    scheme, _, path = address.rstrip("/").partition("://")
    root = Path(os.environ.get("XDIM_JAX_SCRATCH") or cache_folder() / "buckets")
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:8]
    return root / f"{scheme}-{digest}{'' if writes else '-read'}" / path.rpartition("/")[2]


def local_path(text: str) -> Path:
    """Return a path, for an option of a command. Raises ArgumentTypeError if the text is an address in a bucket."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{text}: expected a local path, not an address in a bucket")
    return Path(text)


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
    folder, found = _download(str(text))
    if not found:
        raise UserError(f"--workdir={text}: there is no run at this address; give the --workdir of xdim_jax.train")
    return folder


def _download(address: str) -> tuple[Path, bool]:
    """Download a workdir for reading; return its local folder, and whether there is a run at the address."""
    mirror = Mirror(address, writes=False)
    with mirror.lock(wait=math.inf):  # wait for another command that downloads the same files
        found = mirror.pull()
        mirror.folder.mkdir(parents=True, exist_ok=True)
    return mirror.folder, found


@contextlib.contextmanager
def workdir(text: str | Path, *, writes: bool = True) -> Iterator[Path]:
    """Context manager that yields the local path of a workdir, and uploads changed files to its bucket if ``writes``.

    Args:
        text: A path, or an address in a bucket. Files of a bucket are downloaded at the beginning.
        writes: True if this process uploads the files. No other process on this machine can then write to the same
            address until the block has ended.

    Raises:
        UserError: The bucket cannot be reached, another process on this machine writes to the same address, or the last
            files cannot be uploaded.
    """
    if not is_address(text):
        yield Path(text)
        return
    if not writes:
        yield _download(str(text))[0]
        return
    mirror = Mirror(str(text))
    with mirror.lock():
        mirror.resume()
        mirror.folder.mkdir(parents=True, exist_ok=True)
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
    """Context manager that converts all errors of the block to UserError.

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
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"{address} cannot be {action}: {reason}; the disk of the local copy is full") from error
        raise UserError(
            f"{address} cannot be {action}: {type(error).__name__}: {reason}; check the name of the bucket and your "
            "credentials (gcloud auth application-default login; aws configure)"
        ) from error


class Mirror:
    """A local folder and its copy in a bucket.

    Args:
        address: Address of the folder in the bucket.
        writes: False if files are only downloaded, see `local_folder`.

    Raises:
        UserError: No installed package supports this kind of address.
    """

    def __init__(self, address: str, *, writes: bool = True):
        self.address, self.folder = address.rstrip("/"), local_folder(address, writes=writes)
        self._fs, self._root = open_filesystem(self.address)
        self._id = uuid.uuid4().hex
        self._found = ""  # id of the manifest that was last downloaded or uploaded; "" if there was none
        self._sent: dict[str, tuple[int, int]] = {}  # path -> size and modification time when it was uploaded
        # record of the last complete upload; it is deleted when all local files are uploaded
        self._record = self.folder.with_name(f"{self.folder.name}.unsent.json")

    def lock(self, wait: float = WAIT_SECONDS) -> contextlib.AbstractContextManager[Any]:
        """Lock the local folder. The lock is released when the returned context manager exits.

        Args:
            wait: Time in seconds to wait for another process that has the lock.

        Raises:
            UserError: Another process still has the lock.
        """
        path = self.folder.with_name(f"{self.folder.name}.lock")
        return lock_file(path, self.address, wait) or contextlib.nullcontext()

    def resume(self) -> None:
        """Upload the files that an earlier command could not upload, and then download those of the manifest.

        If another machine has changed the bucket since then, the files are moved to a new folder next to the local
        folder instead. Files that are missing in the local folder are not deleted in the bucket.

        Raises:
            UserError: The bucket cannot be read or written.
        """
        if self._record.is_file():
            record = read_json(self._record)
            sent = {path: tuple(state) for path, state in record["files"].items() if (self.folder / path).is_file()}
            # the log is ignored: the process that launched this one, such as a sweep worker, may have written to it
            if any(self._state(path) != sent.get(path) for path in self._files() if path != LOG_FILE):
                with bucket_errors(self.address, "read"):
                    found, _ = self._read_manifest()
                if found in record["manifests"]:
                    say(f"bucket     {self.address}: uploading the files that an earlier command could not upload")
                    self._found, self._sent = found, sent
                    # this upload may write its manifest and still fail; with our id in the record, a later `resume`
                    # recognises the manifest
                    write_json(self._record, record | {"manifests": [*record["manifests"], self._id]})
                    self._push_all()
                else:
                    self._move_aside()
            self._record.unlink(missing_ok=True)
        self.pull()

    def _move_aside(self) -> None:
        """Move the local folder, without the log of the process that launched this one, to a new name."""
        names = (self.folder.with_name(f"{self.folder.name}.unsent-{n}") for n in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        self.folder.rename(aside)
        if (aside / LOG_FILE).is_file():
            self.folder.mkdir()
            (aside / LOG_FILE).rename(self.folder / LOG_FILE)
        warn(
            f"{self.address} was changed by another machine before all files of this machine were uploaded; they are "
            f"now in {aside}, and this command continues with the files of the bucket. Copy what you need from that "
            "folder, and delete it"
        )

    def pull(self) -> bool:
        """Download the files of the manifest, and delete other local files except the log, locks and unfinished files.

        A local log is extended in place, because the process that launched this one may have opened it.

        Returns:
            False if the bucket has no manifest, that is, no run.

        Raises:
            UserError: The bucket cannot be read.
        """
        with bucket_errors(self.address, "read"):
            for part in self.folder.rglob(".partial.*"):  # of a download that was interrupted
                part.unlink(missing_ok=True)
            for _ in range(_TRIES - 1):
                with contextlib.suppress(FileNotFoundError):  # the run has replaced a checkpoint in the meantime
                    return self._pull_once()
            return self._pull_once()

    def _pull_once(self) -> bool:
        """Download the files of the manifest as it is now, see `pull`."""
        self._found, wanted = self._read_manifest()
        for path in self._files():
            if path not in wanted and path != LOG_FILE:
                (self.folder / path).unlink()
        for path, size in wanted.items():
            here = self.folder / path
            # small files may change without a change of size; large files are written only once
            if not here.is_file() or here.stat().st_size != size or size < 2**20:
                here.parent.mkdir(parents=True, exist_ok=True)
                part = here.with_name(f".partial.{here.name}")
                self._fs.get_file(f"{self._root}/{path}", str(part))
                if path == LOG_FILE and here.is_file():
                    _merge_log(part, here)
                else:
                    part.replace(here)
        self._drop_empty()
        # a log to which this machine has added lines is larger than in the manifest, and counts as not uploaded
        self._sent = {path: self._state(path) for path in wanted if self._state(path)[0] == wanted[path]}
        if self._found:
            say(f"bucket     {self.address}: {len(wanted)} files, local copy in {self.folder}")
        return bool(self._found)

    def push(self) -> None:
        """Upload changed files, then the manifest; then delete files in the bucket that no longer exist locally.

        In the manifest, only the entries of files that were added, changed or deleted here since the last upload are
        changed, because another machine may have changed others (`evaluate` during training). There is no lock between
        machines: if two of them replace the manifest at the same moment, the entries of one are lost.

        Raises:
            UserError: The bucket cannot be written.
        """
        with bucket_errors(self.address, "written"):
            for _ in range(_TRIES):
                changed: list[str] = []
                try:
                    state = {path: self._state(path) for path in self._files()}
                    changed = [path for path, found in state.items() if self._sent.get(path) != found]
                    for path in changed:
                        self._fs.put_file(str(self.folder / path), f"{self._root}/{path}")
                    break
                except FileNotFoundError:
                    if changed and all((self.folder / path).exists() for path in changed):
                        raise  # there is no such bucket
                    continue  # an old checkpoint has just been deleted: list the files again
            else:
                raise OSError(errno.EBUSY, "files change too fast", str(self.folder))
            if state == self._sent:
                return
            gone = self._sent.keys() - state.keys()
            found, files = self._read_manifest()
            if self._sent and not found:  # the bucket has been emptied: upload all files
                self._sent = {}
                self.push()
                return
            files = {path: size for path, size in files.items() if path not in gone}
            files |= {path: state[path][0] for path in changed}
            manifest = {"id": self._id, "files": dict(sorted(files.items()))}
            self._fs.pipe_file(f"{self._root}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
            self._found, self._sent = self._id, state
            self._write_record()
            for path in gone:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{path}")

    @contextlib.contextmanager
    def uploading(self, every: float = UPLOAD_SECONDS) -> Iterator[None]:
        """Context manager that uploads changed files every ``every`` seconds, and once more at its end.

        Until the last upload has ended, there is a record for `resume`.

        Raises:
            UserError: The last upload failed. Earlier failures are logged, and the upload is tried again.
        """
        done = threading.Event()
        self._write_record()

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
            self._push_all()
            self._record.unlink(missing_ok=True)

    def _push_all(self) -> None:
        """Upload all changed files. If this fails, the error message names the local folder of the files."""
        try:
            self.push()
        except UserError as error:
            text = f"{error}. All files are in {self.folder}; run the same command again on this machine"
            raise UserError(text) from error

    def _read_manifest(self) -> tuple[str, dict[str, int]]:
        """Return the id of the manifest and its files; ``""`` and no files if there is no manifest."""
        self._fs.invalidate_cache()  # another process may have changed the bucket since it was listed
        try:
            manifest = json.loads(self._fs.cat_file(f"{self._root}/{MANIFEST}"))
        except FileNotFoundError:
            return "", {}
        if "files" not in manifest:  # written by an earlier version of this package, as path -> size
            return "earlier", manifest
        return manifest["id"], manifest["files"]

    def _write_record(self) -> None:
        """Record the manifests that are known to this machine, and the state of the uploaded files, for `resume`.

        An upload may have written its manifest even if it failed. Therefore the record also has the id of this mirror.
        """
        write_json(self._record, {"manifests": [self._found, self._id], "files": self._sent})

    def _files(self) -> list[str]:
        """Return the relative paths of all complete files of the folder, with slashes. Locks are not files of a run."""
        found = []
        for path in self.folder.rglob("*"):
            relative = path.relative_to(self.folder).as_posix()
            if (
                path.is_file()
                and not path.name.endswith(LOCK_FILE)
                and not any(mark in relative for mark in _UNFINISHED)
            ):
                found.append(relative)
        return sorted(found)

    def _state(self, path: str) -> tuple[int, int]:
        stat = (self.folder / path).stat()
        return stat.st_size, stat.st_mtime_ns

    def _drop_empty(self) -> None:
        """Delete folders without files, because an empty folder named after a step would be read as a checkpoint."""
        for folder in sorted((p for p in self.folder.rglob("*") if p.is_dir()), reverse=True):
            if folder.is_symlink():  # e.g. of wandb, to its latest run
                folder.unlink(missing_ok=True)
            elif not any(p.is_file() for p in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)


def _merge_log(downloaded: Path, log: Path) -> None:
    """Insert the downloaded log before the lines that only the local log has, and delete the downloaded file.

    The local file is changed in place: other processes that append to it continue at its end.
    """
    earlier, here = downloaded.read_bytes(), log.read_bytes()
    if not here.startswith(earlier):  # else the local log has all lines of the downloaded one
        with open(log, "r+b") as file:
            file.write(earlier if earlier.startswith(here) else earlier + here)
    downloaded.unlink()
