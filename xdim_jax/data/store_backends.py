"""Storage of prepared cases: a folder with ``.npy`` files, or a bucket with zarr arrays.

Each entry has a name, the arrays ``image``, ``label`` and ``voxels``, and the metadata in ``case.json``. This file is
written last and contains the sizes of the other files, so that incomplete entries are recognised and ignored.

A folder is renamed when it is complete. Objects in a bucket cannot be renamed together. Therefore every attempt to
write an entry has a folder of its own inside the entry, and ``case.json`` contains its name. If several processes write
the same entry, the last ``case.json`` selects the attempt that is read, and no process deletes objects of another one.
"""

import functools
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xdim_jax.base.bucket import bucket_errors, is_address, open_filesystem
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_error, write_json, write_text

METADATA_FILE = "case.json"
_OTHER_FOLDER = "to use another folder, give --config.data.store=<folder>, or --store=<folder> of xdim_jax.data prepare"
_CHUNK = (32, 64, 64)  # shape of a zarr chunk; small, because a patch is read in whole chunks
_CHUNK_VOXELS = 2**16  # number of elements of a chunk of the array ``voxels``
_CACHE = 2**29  # bytes of chunks that are cached in memory

Location = Path | str  # location of an entry or a store: a folder, or an address in a bucket
_NPY_LOCK = threading.Lock()  # see `_open_npy`


class StoreBackend(Protocol):
    """Interface of a store: all prepared cases with one key, see `xdim_jax.data.store.store_key`."""

    def exists(self) -> bool:
        """Return whether the store contains store.json."""
        ...

    def create(self, key: dict[str, Any]) -> None:
        """Create the store if it does not exist, and write store.json.

        Args:
            key: Contents of store.json.

        Raises:
            UserError: The store cannot be written.
        """

    def find_entries(self, case_id: str) -> list[Location]:
        """Return the entries of a case that existed when the backend was opened."""
        ...

    def location(self, name: str) -> Location:
        """Return the location of the entry with this name, whether it exists or not."""
        ...

    def read_metadata(self, entry: Location) -> dict[str, Any] | None:
        """Read case.json; None if the entry is incomplete."""
        ...

    def write_metadata(self, entry: Location, metadata: dict[str, Any]) -> None:
        """Replace case.json."""

    def write(
        self,
        entry: Location,
        arrays: Mapping[str, np.ndarray],
        metadata: dict[str, Any],
        is_valid: Callable[[Any], bool],
    ) -> dict[str, Any]:
        """Write an entry, unless another process has written it in the meantime.

        Args:
            entry: Location of the entry.
            arrays: Arrays by name.
            metadata: Contents of case.json, without the sizes of files.
            is_valid: ``is_valid(metadata)`` returns True if an existing entry can be used instead.

        Returns:
            The metadata with the sizes of files.
        """
        ...

    def size(self, entry: Location) -> int:
        """Return the number of bytes of an entry."""
        ...

    def free(self) -> int | None:
        """Return the number of bytes that can still be written; None if there is no limit."""


def open_backend(base: Location, key: str) -> StoreBackend:
    """Return the store with a key below a folder or an address."""
    return ZarrBackend(f"{base}/{key}") if is_address(base) else FolderBackend(Path(base) / key)


def open_entry(entry: Location) -> tuple[dict[str, Any], Any, Any]:
    """Open an entry. Its arrays are read when they are indexed.

    Returns:
        The metadata, the image, and the label or None.
    """
    if is_address(entry):
        return _open_zarr_entry(str(entry))[:3]
    folder = Path(entry)
    metadata = read_json(folder / METADATA_FILE)
    label = _open_npy(folder / "label.npy") if "label.npy" in metadata["files"] else None
    return metadata, _open_npy(folder / "image.npy"), label


def open_voxels(entry: Location) -> Any:
    """Return the array of labelled voxels of an entry, which is read when it is indexed."""
    return _open_zarr_entry(str(entry))[3] if is_address(entry) else _open_npy(Path(entry) / "voxels.npy")


def _open_npy(path: Path) -> np.ndarray:
    """Map an array into memory, in one thread at a time.

    NumPy parses the header with `ast.literal_eval`, which raised ``SystemError`` (AST constructor recursion depth
    mismatch) in CPython 3.11.7 if several threads called it concurrently.
    """
    with _NPY_LOCK:
        return np.load(path, mmap_mode="r")


# -- folders ------------------------------------------------------------------------------------------------------


class FolderBackend:
    """Prepared cases in a folder."""

    def __init__(self, base: Path):
        self.base = base
        self._entries: dict[str, list[Location]] = {}
        for path in sorted(base.glob("*/")):
            self._entries.setdefault(path.name.rpartition("-")[0], []).append(path)

    def __str__(self) -> str:
        return str(self.base)

    def exists(self) -> bool:
        return (self.base / "store.json").is_file()

    def create(self, key: dict[str, Any]) -> None:
        if not self.exists():
            try:
                write_json(self.base / "store.json", key)
            except UserError as error:
                raise UserError(f"{error} ({_OTHER_FOLDER})") from error

    def find_entries(self, case_id: str) -> list[Location]:
        return self._entries.get(case_id, [])

    def location(self, name: str) -> Location:
        return self.base / name

    def read_metadata(self, entry: Location) -> dict[str, Any] | None:
        folder = Path(entry)
        try:
            metadata = read_json(folder / METADATA_FILE)
            complete = all((folder / name).stat().st_size == size for name, size in metadata["files"].items())
            return metadata if complete else None
        except (UserError, UnicodeDecodeError, KeyError, TypeError, AttributeError, OSError):
            return None

    def write_metadata(self, entry: Location, metadata: dict[str, Any]) -> None:
        write_json(Path(entry) / METADATA_FILE, metadata)

    def write(
        self,
        entry: Location,
        arrays: Mapping[str, np.ndarray],
        metadata: dict[str, Any],
        is_valid: Callable[[Any], bool],
    ) -> dict[str, Any]:
        folder = Path(entry)
        temporary = _temporary_name(folder)
        try:
            temporary.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            metadata = metadata | {"files": {p.name: p.stat().st_size for p in temporary.iterdir()}}
            write_text(temporary / METADATA_FILE, json.dumps(metadata, indent=1))
            self._move(temporary, folder, is_valid)
        except OSError as error:
            raise UserError(f"{write_error(folder, error)} ({_OTHER_FOLDER})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return metadata

    def _move(self, temporary: Path, folder: Path, is_valid: Callable[[Any], bool]) -> None:
        """Rename a complete entry to its final name. An existing valid entry is kept; a damaged one is replaced."""
        try:
            temporary.rename(folder)
        except OSError:
            if is_valid(self.read_metadata(folder)):  # another process was first
                return
            old = _temporary_name(folder)
            folder.rename(old)
            temporary.rename(folder)
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink()

    def size(self, entry: Location) -> int:
        return sum(p.stat().st_size for p in Path(entry).iterdir())

    def free(self) -> int | None:
        return shutil.disk_usage(self.base).free


def _temporary_name(folder: Path) -> Path:
    return folder.with_name(f".{uuid.uuid4().hex[:8]}.partial.{folder.name}")


# -- buckets ------------------------------------------------------------------------------------------------------


class ZarrBackend:
    """Prepared cases in a bucket, as zarr arrays.

    The key ``prefix`` of case.json is the folder of the arrays inside the entry. Stores of earlier versions do not have
    the key, and their arrays are in the entry itself.
    """

    def __init__(self, base: str):
        self.base = base
        self._fs, self._root = open_filesystem(base)
        self._sizes: dict[str, dict[str, int]] = {}  # entry -> object -> bytes
        with bucket_errors(base, "read"):
            self._list_objects("")

    def _list_objects(self, name: str) -> None:
        """Update the sizes of the objects of one entry, or of all entries if the name is empty."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(f"{self._root}/{name}".rstrip("/"), detail=True)
        except FileNotFoundError:
            found = {}
        self._sizes.pop(name, None)
        for path, metadata in found.items():
            entry, _, inner = path.removeprefix(self._root).lstrip("/").partition("/")
            if inner:
                self._sizes.setdefault(entry, {})[inner] = metadata["size"]

    def __str__(self) -> str:
        return self.base

    def exists(self) -> bool:
        with bucket_errors(self.base, "read"):
            return self._fs.exists(f"{self._root}/store.json")

    def create(self, key: dict[str, Any]) -> None:
        if not self.exists():
            with bucket_errors(self.base, "written"):
                self._fs.pipe_file(f"{self._root}/store.json", json.dumps(key, indent=2).encode())

    def find_entries(self, case_id: str) -> list[Location]:
        return [f"{self.base}/{name}" for name in sorted(self._sizes) if name.rpartition("-")[0] == case_id]

    def location(self, name: str) -> Location:
        return f"{self.base}/{name}"

    def read_metadata(self, entry: Location) -> dict[str, Any] | None:
        name = _entry_name(entry)
        sizes = self._sizes.get(name, {})
        if METADATA_FILE not in sizes:
            return None
        with bucket_errors(self.base, "read"):
            try:
                metadata = json.loads(self._fs.cat_file(f"{self._root}/{name}/{METADATA_FILE}"))
                complete = all(sizes.get(path) == size for path, size in metadata["files"].items())
                return metadata if complete else None
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                return None

    def write_metadata(self, entry: Location, metadata: dict[str, Any]) -> None:
        with bucket_errors(self.base, "written"):
            path = f"{self._root}/{_entry_name(entry)}/{METADATA_FILE}"
            self._fs.pipe_file(path, json.dumps(metadata, indent=1).encode())

    def write(
        self,
        entry: Location,
        arrays: Mapping[str, np.ndarray],
        metadata: dict[str, Any],
        is_valid: Callable[[Any], bool],
    ) -> dict[str, Any]:
        name = _entry_name(entry)
        with bucket_errors(self.base, "written"):
            self._list_objects(name)
            existing = self.read_metadata(entry)
            if existing is not None and is_valid(existing):  # another process was first
                return existing
            prefix = f"{uuid.uuid4().hex}/"
            for kind, array in arrays.items():
                _zarr(f"{entry}/{prefix}{kind}", array)[...].write(array).result()
            self._list_objects(name)
        files = {path: size for path, size in self._sizes[name].items() if path.startswith(prefix)}
        metadata = metadata | {"prefix": prefix, "files": files}
        self.write_metadata(entry, metadata)
        self._sizes[name][METADATA_FILE] = 0
        _open_zarr_entry.cache_clear()  # it may contain the arrays of an earlier attempt
        return metadata

    def size(self, entry: Location) -> int:
        return sum(self._sizes[_entry_name(entry)].values())

    def free(self) -> int | None:
        return None


def _entry_name(entry: Location) -> str:
    return str(entry).rpartition("/")[2]


@functools.lru_cache(maxsize=4096)
def _open_zarr_entry(entry: str) -> tuple[dict[str, Any], Any, Any, Any]:
    """Return metadata, image, label and labelled voxels."""
    fs, root = open_filesystem(entry)
    with bucket_errors(entry, "read"):
        metadata = json.loads(fs.cat_file(f"{root}/{METADATA_FILE}"))
        prefix = metadata.get("prefix", "")
        arrays = {name.removeprefix(prefix).partition("/")[0] for name in metadata["files"]}
        label = _LazyArray(f"{entry}/{prefix}label") if "label" in arrays else None
        return metadata, _LazyArray(f"{entry}/{prefix}image"), label, _LazyArray(f"{entry}/{prefix}voxels")


class _LazyArray:
    """An array in a bucket, parts of which are read when it is indexed."""

    def __init__(self, address: str):
        self._address, self._array = address, _zarr(address)
        self.shape = tuple(self._array.shape)
        self.dtype, self.ndim = np.dtype(self._array.dtype.numpy_dtype), len(self.shape)

    def __getitem__(self, part: Any) -> np.ndarray:
        with bucket_errors(self._address, "read"):
            return self._array[part].read().result()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[...]
        return found if dtype is None else found.astype(dtype)


@functools.cache
def _context() -> Any:
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE}})


def _zarr(address: str, like: np.ndarray | None = None) -> Any:
    """Open the zarr array (version 3) at an address, or create it, chunked and compressed, for an array ``like``."""
    import tensorstore

    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": _kvstore(address)}
    if like is None:
        return tensorstore.open(spec, read=True, context=_context()).result()
    chunk = [min(n, c) for n, c in zip(like.shape, _CHUNK if like.ndim > 1 else (_CHUNK_VOXELS,), strict=False)]
    chunk = [max(n, 1) for n in chunk + list(like.shape[len(chunk) :])]
    spec["metadata"] = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 3, "shuffle": "shuffle"}},
        ],
    }
    spec["store_data_equal_to_fill_value"] = True  # a chunk that is absent is then damage, not zeros
    new = {"create": True, "dtype": like.dtype, "shape": like.shape}
    return tensorstore.open(spec, context=_context(), **new).result()


def _kvstore(address: str) -> dict[str, Any]:
    """Return the description of an address for tensorstore.

    An emulator of a store is selected by the environment variable that the store's own client reads.
    """
    scheme, _, rest = address.partition("://")
    if scheme == "file":
        return {"driver": "file", "path": f"{rest}/"}
    bucket, _, path = rest.partition("/")
    if scheme == "gs":
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    if scheme == "s3":
        found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{path}/"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            found |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"}
        return found
    raise UserError(f"{address}: prepared cases can be stored in a folder, or at an address gs:// or s3://")
