"""The store of prepared cases. A case is prepared once and read by every run.

The store is a folder of memory-mapped files:

    <folder>/<key>/store.json                       the settings from which the key is computed
    <folder>/<key>/<case id>-<content>/image.npy    int16 or float32 (D, H, W, C), as `Prepared.raw`
                                      /label.npy    uint8 (D, H, W)
                                      /voxels.npy   int32: flat indices of labelled voxels, sorted by structure
                                      /case.json    the other attributes of `Prepared`, and the source files

A store in a bucket has zarr arrays, in a subfolder of each entry (`xdim_jax.data.store_backends`). The key is a digest
of this format's version, the name, channels and labels of the data set, and the settings of the preparation. The name
of an entry contains a digest of the case's source files. The arrays of a valid entry are therefore never replaced, and
runs can read them while other processes prepare cases. An entry is found by the names, sizes and modification times of
the source files; if these differ, the contents are compared. An entry is written completely or not at all, so an
interrupted preparation can be resumed, and several processes can prepare cases into one folder. The entries of source
files that have changed are not deleted. To free their space, delete ``<folder>/<key>`` while no run uses it; the next
run prepares the cases again.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.problem import DataError, Problem, data_error
from xdim_jax.data import facts
from xdim_jax.data.case import Case, Dataset
from xdim_jax.data.images.image import read_grid
from xdim_jax.data.labels import is_structure
from xdim_jax.data.prepare import Preparation, Prepared, check_preparation, prepare, target_shape
from xdim_jax.data.reading import read_case
from xdim_jax.data.store_backends import Location, StoreBackend, open_backend, open_entry, open_voxels

_ADDED = ("ct_statistics",)  # settings of a preparation that were added without a new version, see `store_key`
_VERSION = 1  # increased when the file format or the result of a preparation changes


@dataclasses.dataclass(frozen=True)
class Entry:
    """One prepared case.

    Attributes:
        case_id: Name of the case.
        patient: Name of the patient.
        location: Folder or address of the entry.
        shape: Shape (D, H, W) of the prepared image.
        structures: Pairs (label index of a structure, position of its first voxel in voxels.npy). The last pair is
            (-1, number of all labelled voxels).
        facts: Result of `xdim_jax.data.facts.measure`; None if an earlier version of the package prepared the case.
    """

    case_id: str
    patient: str
    location: Location
    shape: tuple[int, ...]
    structures: tuple[tuple[int, int], ...]
    facts: Mapping[str, Any] | None = None

    @property
    def content(self) -> str:
        """Digest of the names and contents of the source files, which is the end of the name of the entry."""
        return str(self.location).rstrip("/").rpartition("-")[2]

    def load(self) -> Prepared:
        """Open the case. Its arrays are read when they are indexed.

        Raises:
            UserError: Files are missing or damaged.
        """
        with self._reading():
            metadata, image, label = open_entry(self.location)
            box = tuple(slice(*b) for b in metadata["box"])
            return Prepared(
                image,
                label,
                tuple(metadata["shift"]),
                tuple(metadata["scale"]),
                metadata["masked"],
                (box[0], box[1], box[2]),
                tuple(metadata["source"]),
                tuple(metadata["spacing"]),
            )

    def random_voxel(self, rng: np.random.Generator) -> tuple[int, ...] | None:
        """Return the indices (D, H, W) of a random voxel of a random structure; None if the case contains no structure.

        Raises:
            UserError: Files are missing or damaged.
        """
        count = len(self.structures) - 1
        if count < 1:
            return None
        chosen = int(rng.integers(count))
        start, stop = self.structures[chosen][1], self.structures[chosen + 1][1]
        with self._reading():
            flat = int(open_voxels(self.location)[int(rng.integers(start, stop))])
            return tuple(int(i) for i in np.unravel_index(flat, self.shape))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # UserError is a ValueError
            raise UserError(
                f"the prepared case {self.location} cannot be read, or is damaged ({type(error).__name__}: {error}); "
                "delete it, and run the same command again to prepare it again"
            ) from error


def store_key(dataset: Dataset, settings: Preparation, *, named: bool = False) -> tuple[str, dict[str, Any]]:
    """Return the key of a store, and the values from which it is computed.

    Args:
        dataset: Data set of the cases.
        settings: How they are prepared.
        named: True for the key of earlier versions, which depends on the name of the labels. For data with a
            ``dataset.json``, this is the name of the folder.

    Returns:
        A digest of 12 hexadecimal digits; and the contents of store.json.
    """
    values = {
        "version": _VERSION,
        "dataset": dataset.name,
        "channels": list(dataset.channels),
        "labels": {k: v for k, v in dataset.labels.to_json().items() if named or k != "name"},
        # settings in _ADDED change the key only if they are used, so that older stores remain valid
        "prepare": {k: v for k, v in dataclasses.asdict(settings).items() if v or k not in _ADDED},
    }
    if settings.ct_statistics and settings.normalise == "zscore_nonzero":
        values["ct_zero"] = "water"  # changes the key: earlier stores treated 0 HU as background
    values = json.loads(json.dumps(values))  # tuples become lists, as in store.json
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12], values


def open_store(dataset: Dataset, settings: Preparation, base: Location) -> StoreBackend:
    """Return the store for a data set and settings. It is created if it does not exist.

    A store of an earlier version is used if there is no other one.

    Args:
        dataset: Data set of the cases.
        settings: How they are prepared.
        base: Parent folder (or address) of the stores, which has one store for each key.

    Raises:
        UserError: The store cannot be written.
    """
    key, values = store_key(dataset, settings)
    store = open_backend(base, key)
    if not store.exists():
        earlier = open_backend(base, store_key(dataset, settings, named=True)[0])
        if earlier.exists():
            return earlier
        store.create(values)
    return store


def default_folder(root: Path) -> Path:
    """Return ``<root>_prepared``, in the parent folder of the data. Raises UserError if the root has no parent."""
    root = root.resolve()
    if not root.name:
        raise UserError(f"{root} has no parent folder: give --config.data.store=<folder>, or --store=<folder>")
    return root.with_name(f"{root.name}_prepared")


def prepare_cases(
    dataset: Dataset,
    cases: Sequence[Case],
    settings: Preparation,
    base: Location,
    *,
    jobs: int = 2,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Entry]:
    """Return the entries of all cases, and prepare the cases whose entries are missing or out of date.

    Args:
        dataset: Data set of the cases.
        cases: Cases to prepare.
        settings: How they are prepared.
        base: Parent folder (or address) of the stores, which has one store for each key.
        jobs: Number of threads; each has one case in memory.
        say: Called with lines for the log. After the first case, a line estimates the size of the other cases.
        progress: Called with the number of prepared cases and the number of cases to prepare.

    Raises:
        DataError: Lists all cases that cannot be used; the others have been prepared.
        UserError: The store cannot be written, or there is not enough free space.
    """
    check_preparation(dataset, settings)
    backend = open_store(dataset, settings, base)
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        entries = list(pool.map(lambda case: _find(backend, case), cases))
    missing = [i for i, entry in enumerate(entries) if entry is None]
    say(f"store      {backend}: {len(cases) - len(missing)} of {len(cases)} cases prepared")
    problems: list[Problem] = []
    prepared = _prepare_missing(backend, [cases[i] for i in missing], settings, jobs, say)
    with contextlib.closing(prepared):
        for done, (i, outcome) in enumerate(zip(missing, prepared, strict=True), 1):
            if isinstance(outcome, DataError):
                problems += outcome.problems
            else:
                entries[i] = outcome
            progress(done, len(missing))
    if problems:
        failed = sum(entry is None for entry in entries)
        raise data_error(
            *problems, summary=f"problems in {failed} of {len(missing)} cases; the other cases are prepared"
        )
    return [entry for entry in entries if entry is not None]


def describe_cases(entries: Sequence[Entry], dataset: Dataset, settings: Preparation) -> None:
    """Log the lines and warnings of `xdim_jax.data.facts.describe`."""
    known = [entry.facts for entry in entries if entry.facts is not None]
    lines, warnings = facts.describe(known, dataset.channels, settings)
    for line in lines:
        log.say(line)
    for warning in warnings:
        log.warn(warning)


def _prepare_missing(
    backend: StoreBackend, cases: Sequence[Case], settings: Preparation, jobs: int, say: Callable[[str], None]
) -> Generator[Entry | DataError]:
    """Prepare cases, and yield the entry or the error of each, in their order.

    The first case that can be prepared is finished before the others begin, because the space that the others need is
    estimated from its size.
    """

    def run(case: Case) -> Entry | DataError:
        try:
            return _write(backend, case, settings)
        except DataError as error:
            return error

    rest = list(cases)
    while rest:
        case = rest.pop(0)
        outcome = run(case)
        yield outcome
        if isinstance(outcome, Entry):
            if rest:
                _check_space(backend, case, outcome, rest, settings, say)
            break
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        try:
            yield from pool.map(run, rest)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_space(
    backend: StoreBackend,
    case: Case,
    entry: Entry,
    others: Sequence[Case],
    settings: Preparation,
    say: Callable[[str], None],
) -> None:
    """Estimate the size of cases that are not yet prepared, from headers and the bytes per voxel of a prepared case.

    Args:
        backend: Store of the cases.
        case: A case that has been prepared.
        entry: Its entry.
        others: Cases to prepare.
        settings: How they are prepared.
        say: Called with a line for the log.

    Raises:
        UserError: The estimate exceeds the free space.
    """
    first = _prepared_voxels(case, settings)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        voxels = list(pool.map(lambda other: _prepared_voxels(other, settings) or first, others))
    size = int(backend.size(entry.location) * sum(voxels) / first)
    free = backend.free()
    room = "" if free is None else f"; {gib(free)} free"
    say(f"store      {len(others)} cases to prepare, about {gib(size)}{room}")
    if free is not None and size > free:
        raise UserError(
            f"{backend}: the remaining {len(others)} cases need about {gib(size)}, but only {gib(free)} are free; free "
            "some space, or give another --config.data.store=<folder>, and run the same command again"
        )


def _prepared_voxels(case: Case, settings: Preparation) -> int:
    """Return the number of voxels of a case after resampling, if it is not cropped; 0 if its header cannot be read."""
    try:
        grid = read_grid(case.images[0], case.axes)
    except UserError:
        return 0
    return math.prod(target_shape(grid.memory_geometry[0][::-1], grid.spacing, settings))


def _signature(case: Case) -> list[list[Any]]:
    """Return name, size and modification time of every source file, in their order."""
    return [[p.name, (s := p.stat()).st_size, s.st_mtime_ns] for p in case.files]


def _content_digest(case: Case) -> str:
    """Return a digest of the names and the contents of all source files."""
    digest = hashlib.blake2b(digest_size=20)
    for path in case.files:
        digest.update(path.name.encode(errors="surrogateescape") + b"\0")
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _find(backend: StoreBackend, case: Case) -> Entry | None:
    """Return the complete entry that was prepared from the current source files of a case; None if there is none."""
    known = {entry: backend.read_metadata(entry) for entry in backend.find_entries(case.case_id)}
    valid = {entry: metadata for entry, metadata in known.items() if metadata and _is_valid(metadata, case)}
    if not valid:
        return None
    try:
        signature = _signature(case)
        for location, metadata in valid.items():
            if metadata["signature"] == signature and _has_sources(metadata, case):
                return _entry(case, location, metadata)
        location = _location(backend, case, _content_digest(case))
        if location in valid:
            with contextlib.suppress(UserError):  # a read-only store can be used, too
                sources = [str(path.absolute()) for path in case.files]
                backend.write_metadata(location, valid[location] | {"signature": signature, "sources": sources})
            return _entry(case, location, valid[location])
    except OSError:  # a source file is missing, which is reported when the case is prepared
        return None
    return None


def _has_sources(metadata: Mapping[str, Any], case: Case) -> bool:
    """Return whether an entry was prepared from files in folders of the same names.

    Archives give many files the same time, and uncompressed files of one shape have the same size: ``r1/c0.nii`` and
    ``r2/c0.nii`` of two raters differ only in the folder. Only these two names are compared, so
    that the data can be moved.
    """
    return [Path(s).parts[-2:] for s in metadata["sources"]] == [path.absolute().parts[-2:] for path in case.files]


def _location(backend: StoreBackend, case: Case, content: str) -> Location:
    return backend.location(f"{case.case_id}-{content[:16]}")


def _is_valid(metadata: Any, case: Case) -> bool:
    """Return whether an entry is complete, and has the axes and the patient of the case."""
    try:
        same = metadata["axes"] == case.axes and metadata["patient"] == case.patient
        return same and metadata["structures"] is not None
    except (KeyError, TypeError):
        return False


def _entry(case: Case, location: Location, metadata: dict[str, Any]) -> Entry:
    structures = tuple((int(i), int(start)) for i, start in metadata["structures"])
    return Entry(case.case_id, case.patient, location, tuple(metadata["shape"]), structures, metadata.get("facts"))


def _write(backend: StoreBackend, case: Case, settings: Preparation) -> Entry:
    try:
        signature, content = _signature(case), _content_digest(case)
    except OSError as error:
        path = Path(error.filename or case.files[0])
        raise data_error(
            Problem(
                "unreadable",
                path,
                found=f"cannot be read ({error.strerror or error})",
                expected="a file",
                suggestion="download it again",
                case_id=case.case_id,
            )
        ) from error
    location = _location(backend, case, content)
    metadata = backend.read_metadata(location)
    if metadata is not None and _is_valid(metadata, case):  # another process has prepared it in the meantime
        return _entry(case, location, metadata)
    volume = read_case(case)
    prepared = prepare(case, volume, settings)
    voxels, structures = _labelled_voxels(prepared.label)
    arrays = {"image": prepared.raw, "label": prepared.label, "voxels": voxels}
    metadata = {
        "case_id": case.case_id,
        "patient": case.patient,
        "axes": case.axes,
        "info": dict(case.info),
        "sources": [str(p.absolute()) for p in case.files],
        "signature": signature,
        "content": content,
        "shape": list(prepared.shape),
        "spacing": list(prepared.spacing),
        "source": list(prepared.source),
        "box": [[b.start, b.stop] for b in prepared.box],
        "shift": list(prepared.shift),
        "scale": list(prepared.scale),
        "masked": prepared.masked if isinstance(prepared.masked, bool) else list(prepared.masked),
        "structures": structures,
        "facts": facts.measure(case, volume, settings),
    }
    present = {name: array for name, array in arrays.items() if array is not None}
    return _entry(case, location, backend.write(location, present, metadata, lambda other: _is_valid(other, case)))


def _labelled_voxels(label: np.ndarray | None) -> tuple[np.ndarray, list[list[int]]]:
    """Return the flat indices of labelled voxels, sorted by structure, and `Entry.structures`."""
    if label is None:
        return np.zeros(0, np.int32), [[-1, 0]]
    flat = label.ravel()
    dtype = np.int32 if flat.size <= np.iinfo(np.int32).max else np.int64
    parts, structures, start = [], [], 0
    for index in np.unique(flat[is_structure(flat)]).tolist():
        indices = np.flatnonzero(flat == index).astype(dtype)
        parts.append(indices)
        structures.append([index, start])
        start += len(indices)
    return np.concatenate([np.zeros(0, dtype), *parts]), [*structures, [-1, start]]
