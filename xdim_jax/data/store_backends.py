"""Where prepared cases lie: a folder with ``.npy`` files, or a bucket with zarr arrays.

An entry of either has a name, the arrays ``image``, ``label`` and ``voxels``, and ``case.json``, which is written last
and tells the sizes of the others: an entry that was not written to its end is not there.
"""

import contextlib
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

from xdim_jax.base.bucket import is_address, no_answer, open_filesystem
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_error, write_json, write_text

FACTS = "case.json"
ELSEWHERE = "--config.data.store=<folder>, or prepare --store=<folder>, puts prepared cases elsewhere"
_CHUNK = (32, 64, 64)  # voxels of a zarr chunk: what a patch reads beside itself stays below that
_CHUNK_VOXELS = 2**16  # of the list of labelled voxels
_CACHE = 2**29  # bytes of chunks that are kept in memory

Place = Path | str  # of an entry: a folder, or an address
_PARSER = threading.Lock()  # see `_open_npy`


class Shelf(Protocol):
    """Entries of one key."""

    def begin(self, key: dict[str, Any]) -> None:
        """Makes it, with what the key is a digest of. Raises UserError if that cannot be written."""

    def places(self, case_id: str) -> list[Place]:
        """Entries of a case that were there when the shelf was opened."""
        ...

    def place(self, name: str) -> Place:
        """Where an entry of this name is, or would be."""
        ...

    def facts(self, place: Place) -> dict[str, Any] | None:
        """What case.json says, if the entry is whole."""
        ...

    def keep(self, place: Place, facts: dict[str, Any]) -> None:
        """Replaces case.json."""

    def write(
        self, place: Place, arrays: Mapping[str, np.ndarray], facts: dict[str, Any], whole: Callable[[Any], bool]
    ) -> dict[str, Any]:
        """Writes an entry, and returns its facts with the sizes; ``whole(facts)`` tells whether another one serves."""
        ...

    def size(self, place: Place) -> int:
        """Bytes of an entry."""
        ...

    def free(self) -> int | None:
        """Bytes that are left; None where there is no end."""


def open_shelf(base: Place, key: str) -> Shelf:
    """The shelf of a key below a folder or an address."""
    return _Bucket(f"{base}/{key}") if is_address(base) else _Folder(Path(base) / key)


def open_entry(place: Place) -> tuple[dict[str, Any], Any, Any]:
    """Facts, image and label (None without one); the arrays are read when they are indexed."""
    if is_address(place):
        return _open_zarr(str(place))[:3]
    folder = Path(place)
    facts = read_json(folder / FACTS)
    label = _open_npy(folder / "label.npy") if "label.npy" in facts["files"] else None
    return facts, _open_npy(folder / "image.npy"), label


def open_voxels(place: Place) -> Any:
    """The list of labelled voxels, read when it is indexed."""
    return _open_zarr(str(place))[3] if is_address(place) else _open_npy(Path(place) / "voxels.npy")


def _open_npy(path: Path) -> np.ndarray:
    """Memory-mapped. One thread at a time: numpy has Python parse the header, and CPython 3.11.7 raised ``SystemError``
    (AST constructor recursion depth mismatch) where threads did that at once."""
    with _PARSER:
        return np.load(path, mmap_mode="r")


# -- folders ------------------------------------------------------------------------------------------------------


class _Folder:
    def __init__(self, base: Path):
        self.base = base
        self._there: dict[str, list[Place]] = {}
        for path in sorted(base.glob("*/")):
            self._there.setdefault(path.name.rpartition("-")[0], []).append(path)

    def __str__(self) -> str:
        return str(self.base)

    def begin(self, key: dict[str, Any]) -> None:
        if not (self.base / "store.json").is_file():
            try:
                write_json(self.base / "store.json", key)
            except UserError as error:
                raise UserError(f"{error} ({ELSEWHERE})") from error

    def places(self, case_id: str) -> list[Place]:
        return self._there.get(case_id, [])

    def place(self, name: str) -> Place:
        return self.base / name

    def facts(self, place: Place) -> dict[str, Any] | None:
        folder = Path(place)
        try:
            facts = read_json(folder / FACTS)
            whole = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
            return facts if whole else None
        except (UserError, UnicodeDecodeError, KeyError, TypeError, AttributeError, OSError):
            return None

    def keep(self, place: Place, facts: dict[str, Any]) -> None:
        write_json(Path(place) / FACTS, facts)

    def write(
        self, place: Place, arrays: Mapping[str, np.ndarray], facts: dict[str, Any], whole: Callable[[Any], bool]
    ) -> dict[str, Any]:
        folder = Path(place)
        temporary = _aside(folder)
        try:
            temporary.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            facts = facts | {"files": {p.name: p.stat().st_size for p in temporary.iterdir()}}
            write_text(temporary / FACTS, json.dumps(facts, indent=1))
            self._take_place(temporary, folder, whole)
        except OSError as error:
            raise UserError(f"{write_error(folder, error)} ({ELSEWHERE})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return facts

    def _take_place(self, temporary: Path, folder: Path, whole: Callable[[Any], bool]) -> None:
        """Another process may have been first with the same content: then that one stays. What is damaged goes."""
        try:
            temporary.rename(folder)
        except OSError:
            if whole(self.facts(folder)):
                return
            old = _aside(folder)
            folder.rename(old)
            temporary.rename(folder)
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink()

    def size(self, place: Place) -> int:
        return sum(p.stat().st_size for p in Path(place).iterdir())

    def free(self) -> int | None:
        return shutil.disk_usage(self.base).free


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{uuid.uuid4().hex[:8]}.partial.{folder.name}")


# -- buckets ------------------------------------------------------------------------------------------------------


class _Bucket:
    def __init__(self, base: str):
        self.base = base
        self._fs, self._root = open_filesystem(base)
        self._sizes: dict[str, dict[str, int]] = {}  # bytes of the objects of every entry, by name
        with no_answer(base, "read"):
            self._look("")

    def _look(self, name: str) -> None:
        """What is there now, of one entry or (empty) of all."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(f"{self._root}/{name}".rstrip("/"), detail=True)
        except FileNotFoundError:
            found = {}
        self._sizes.pop(name, None)
        for path, facts in found.items():
            entry, _, inner = path.removeprefix(self._root).lstrip("/").partition("/")
            if inner:
                self._sizes.setdefault(entry, {})[inner] = facts["size"]

    def __str__(self) -> str:
        return self.base

    def begin(self, key: dict[str, Any]) -> None:
        with no_answer(self.base, "written"):
            if not self._fs.exists(f"{self._root}/store.json"):
                self._fs.pipe_file(f"{self._root}/store.json", json.dumps(key, indent=2).encode())

    def places(self, case_id: str) -> list[Place]:
        return [f"{self.base}/{name}" for name in sorted(self._sizes) if name.rpartition("-")[0] == case_id]

    def place(self, name: str) -> Place:
        return f"{self.base}/{name}"

    def facts(self, place: Place) -> dict[str, Any] | None:
        name = str(place).rpartition("/")[2]
        sizes = self._sizes.get(name, {})
        if FACTS not in sizes:
            return None
        with no_answer(self.base, "read"):
            try:
                facts = json.loads(self._fs.cat_file(f"{self._root}/{name}/{FACTS}"))
                return facts if {k: v for k, v in sizes.items() if k != FACTS} == facts["files"] else None
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                return None

    def keep(self, place: Place, facts: dict[str, Any]) -> None:
        name = str(place).rpartition("/")[2]
        with no_answer(self.base, "written"):
            self._fs.pipe_file(f"{self._root}/{name}/{FACTS}", json.dumps(facts, indent=1).encode())

    def write(
        self, place: Place, arrays: Mapping[str, np.ndarray], facts: dict[str, Any], whole: Callable[[Any], bool]
    ) -> dict[str, Any]:
        name = str(place).rpartition("/")[2]
        with no_answer(self.base, "written"):
            self._look(name)
            there = self.facts(place)
            if there is not None and whole(there):  # another process was first with the same content
                return there
            with contextlib.suppress(FileNotFoundError):  # what an interrupted preparation left
                self._fs.rm(f"{self._root}/{name}", recursive=True)
            for kind, array in arrays.items():
                _zarr(f"{place}/{kind}", array)[...].write(array).result()
            self._look(name)
        facts = facts | {"files": {k: v for k, v in self._sizes[name].items() if k != FACTS}}
        self.keep(place, facts)
        self._sizes[name][FACTS] = 0
        return facts

    def size(self, place: Place) -> int:
        return sum(self._sizes[str(place).rpartition("/")[2]].values())

    def free(self) -> int | None:
        return None


@functools.lru_cache(maxsize=4096)
def _open_zarr(place: str) -> tuple[dict[str, Any], Any, Any, Any]:
    fs, root = open_filesystem(place)
    with no_answer(place, "read"):
        facts = json.loads(fs.cat_file(f"{root}/{FACTS}"))
        kinds = {name.partition("/")[0] for name in facts["files"]}
        label = _Lazy(f"{place}/label") if "label" in kinds else None
        return facts, _Lazy(f"{place}/image"), label, _Lazy(f"{place}/voxels")


class _Lazy:
    """An array of a bucket; a part of it is read when it is asked for."""

    def __init__(self, address: str):
        self._address, self._array = address, _zarr(address)
        self.shape = tuple(self._array.shape)
        self.dtype, self.ndim = np.dtype(self._array.dtype.numpy_dtype), len(self.shape)

    def __getitem__(self, part: Any) -> np.ndarray:
        with no_answer(self._address, "read"):
            return self._array[part].read().result()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[...]
        return found if dtype is None else found.astype(dtype)


@functools.cache
def _context() -> Any:
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE}})


def _zarr(address: str, like: np.ndarray | None = None) -> Any:
    """A zarr array (version 3): a new one like an array, chunked and compressed, or the one that is there."""
    import tensorstore

    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": _store(address)}
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
    spec["store_data_equal_to_fill_value"] = True  # so that a chunk that is gone is missed
    made = {"create": True, "dtype": like.dtype, "shape": like.shape}
    return tensorstore.open(spec, context=_context(), **made).result()


def _store(address: str) -> dict[str, Any]:
    """tensorstore's description of an address. The stores' emulators are found by what their own clients read."""
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
    raise UserError(f"{address}: prepared cases may lie in a folder, gs:// or s3://")
