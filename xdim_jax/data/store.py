"""Prepared cases on disk, memory-mapped: made once, read by every run.

    <folder>/<key>/store.json                       the settings that the key stands for
    <folder>/<key>/<case id>-<content>/image.npy    int16 or float32 (D, H, W, C), as `Prepared.raw`
                                      /label.npy    uint8 (D, H, W)
                                      /voxels.npy   int32: flat indices of labelled voxels, by structure
                                      /case.json    what the rest of `Prepared` holds, and the sources

The key is a digest of data set, label convention and preparation, and an entry is named after a digest of the case's
source files, so other settings and other content never meet, and no entry that a run may be reading is ever replaced.
Names, sizes and times of the sources tell that they have not changed; where those differ, their content is digested
anew. Cases are written whole or not at all, so an interrupted preparation goes on where it was, and several processes
may prepare into one folder. Entries of files that have changed since stay: remove the folder to free the room.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.data.case import Case, Dataset, read_case
from xdim_jax.data.prepare import Preparation, Prepared, check_preparation, prepare
from xdim_jax.data.problem import DataError, Problem, data_error
from xdim_jax.errors import UserError, gib
from xdim_jax.files import read_json, write_error, write_json, write_text

_VERSION = 1  # of the files' format and of what preparation computes
_FILE = "case.json"
_ELSEWHERE = "--config.data.store=<folder>, or prepare --store=<folder>, puts prepared cases elsewhere"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One prepared case."""

    case_id: str
    patient: str
    folder: Path
    shape: tuple[int, ...]  # D, H, W
    structures: tuple[tuple[int, int], ...]  # label index and its first place in voxels.npy, in order; the end last

    def load(self) -> Prepared:
        """The case with its arrays memory-mapped. Raises UserError if its files are gone or damaged."""
        with self._reading():
            facts = read_json(self.folder / _FILE)
            box = tuple(slice(*b) for b in facts["box"])
            label = self.folder / "label.npy"
            return Prepared(
                np.load(self.folder / "image.npy", mmap_mode="r"),
                np.load(label, mmap_mode="r") if "label.npy" in facts["files"] else None,
                tuple(facts["shift"]),
                tuple(facts["scale"]),
                facts["masked"],
                (box[0], box[1], box[2]),
                tuple(facts["source"]),
                tuple(facts["spacing"]),
            )

    def voxel(self, rng: np.random.Generator) -> tuple[int, ...] | None:
        """A random labelled voxel: a structure that is present first, then one of its voxels; None without any."""
        count = len(self.structures) - 1
        if count < 1:
            return None
        chosen = int(rng.integers(count))
        start, stop = self.structures[chosen][1], self.structures[chosen + 1][1]
        with self._reading():
            voxels = np.load(self.folder / "voxels.npy", mmap_mode="r")
            return tuple(int(i) for i in np.unravel_index(int(voxels[rng.integers(start, stop)]), self.shape))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # a UserError is a ValueError
            raise UserError(
                f"the prepared case {self.folder} is damaged ({type(error).__name__}: {error}); run the same command "
                "again: it is prepared anew"
            ) from error


def store_key(dataset: Dataset, settings: Preparation) -> tuple[str, dict[str, Any]]:
    """The digest that names a store, and what it is a digest of."""
    facts = {
        "version": _VERSION,
        "dataset": dataset.name,
        "channels": list(dataset.channels),
        "labels": dataset.labels.to_json(),
        "prepare": dataclasses.asdict(settings),
    }
    facts = json.loads(json.dumps(facts))  # as it is read back
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12], facts


def default_folder(root: Path) -> Path:
    """Beside the data: ``<root>_prepared``. Raises UserError for a root that has no name to put it beside."""
    root = root.resolve()
    if not root.name:
        raise UserError(f"{root} has no folder beside it: give --config.data.store=<folder>, or --store")
    return root.with_name(f"{root.name}_prepared")


def prepare_cases(
    dataset: Dataset,
    cases: Sequence[Case],
    settings: Preparation,
    folder: Path,
    *,
    jobs: int = 2,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Entry]:
    """The entries of all cases; those that are missing or out of date are prepared first.

    The size of what is to be written is estimated from one case and said before the others begin. Each of
    ``jobs`` threads holds one case in memory.

    Raises:
        DataError: every case that cannot be used, at once; the others are prepared.
        UserError: not enough room on the disk, or it cannot be written to.
    """
    check_preparation(dataset, settings)
    key, facts = store_key(dataset, settings)
    base = Path(folder) / key
    if not (base / "store.json").is_file():
        try:
            write_json(base / "store.json", facts)
        except UserError as error:
            raise UserError(f"{error} ({_ELSEWHERE})") from error
    there = _list(base)
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        found = list(pool.map(lambda case: _find(base, case, there), cases))
    todo = [i for i, entry in enumerate(found) if entry is None]
    say(f"store      {base}: {len(cases) - len(todo)} of {len(cases)} cases prepared")
    problems: list[Problem] = []
    done = 0

    def run(i: int) -> Entry | DataError:
        try:
            return _write(base, cases[i], settings)
        except DataError as error:
            return error

    def take(i: int, outcome: Entry | DataError) -> None:
        nonlocal done
        done += 1
        if isinstance(outcome, DataError):
            problems.extend(outcome.problems)
        else:
            found[i] = outcome
        progress(done, len(todo))

    rest = list(todo)
    while rest:  # one whole case tells the size of the others
        first = rest.pop(0)
        outcome = run(first)
        take(first, outcome)
        if isinstance(outcome, Entry):
            if rest:
                _announce(base, outcome, len(rest), say)
            break
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        try:
            for i, outcome in zip(rest, pool.map(run, rest), strict=True):
                take(i, outcome)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise data_error(problems, f"problems in {len(todo)} cases; the others are prepared")
    return [entry for entry in found if entry is not None]


def _announce(base: Path, first: Entry, others: int, say: Callable[[str], None]) -> None:
    size = sum(p.stat().st_size for p in first.folder.iterdir())
    free = shutil.disk_usage(base).free
    say(f"store      {others} cases to prepare, about {gib(size * others)}; {gib(free)} free")
    if size * others > free:
        raise UserError(
            f"{base}: the {others} cases left need about {gib(size * others)}, but only {gib(free)} are free; make "
            "room, or choose another folder with --config.data.store=<folder>, and run the same command again"
        )


def _signature(case: Case) -> list[list[Any]]:
    """Name, size and time of every source file, and its place among them."""
    return [[p.name, (s := p.stat()).st_size, s.st_mtime_ns] for p in case.files]


def _content(case: Case) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for path in case.files:
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _list(base: Path) -> dict[str, list[Path]]:
    """Entries by case."""
    there: dict[str, list[Path]] = {}
    for path in sorted(base.glob("*/")):
        there.setdefault(path.name.rpartition("-")[0], []).append(path)
    return there


def _find(base: Path, case: Case, there: dict[str, list[Path]]) -> Entry | None:
    """The entry of a case that was made of these sources, if there is one and it is whole."""
    facts = {path: found for path in there.get(case.case_id, []) if (found := _facts(path, case)) is not None}
    if not facts:
        return None
    try:
        signature = _signature(case)
        for path, found in facts.items():
            if found["signature"] == signature:
                return _entry(case, path, found)
        path = _folder(base, case, _content(case))
        if path in facts:
            with contextlib.suppress(UserError):  # a store that one may only read serves as well
                write_json(path / _FILE, facts[path] | {"signature": signature})
            return _entry(case, path, facts[path])
    except OSError:  # a source is gone: preparing it says which
        return None
    return None


def _folder(base: Path, case: Case, content: str) -> Path:
    return base / f"{case.case_id}-{content[:16]}"


def _facts(folder: Path, case: Case) -> dict[str, Any] | None:
    """What case.json says, if all files are there and as long as they were."""
    try:
        facts = read_json(folder / _FILE)
        whole = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
        same = facts["axes"] == case.axes and facts["patient"] == case.patient
        return facts if whole and same and facts["structures"] is not None else None
    except (UserError, UnicodeDecodeError, KeyError, TypeError, AttributeError, OSError):
        return None


def _entry(case: Case, folder: Path, facts: dict[str, Any]) -> Entry:
    structures = tuple((int(i), int(start)) for i, start in facts["structures"])
    return Entry(case.case_id, case.patient, folder, tuple(facts["shape"]), structures)


def _write(base: Path, case: Case, settings: Preparation) -> Entry:
    try:
        signature, content = _signature(case), _content(case)
    except OSError as error:
        path = Path(error.filename or case.files[0])
        found = f"cannot be read ({error.strerror or error})"
        raise data_error([Problem("unreadable", path, found, "a file", "fetch it again", case.case_id)], "") from error
    folder = _folder(base, case, content)
    if (facts := _facts(folder, case)) is not None:  # another process has prepared it meanwhile
        return _entry(case, folder, facts)
    prepared = prepare(case, read_case(case), settings)
    voxels, structures = _voxels(prepared.label)
    arrays = {"image.npy": prepared.raw, "label.npy": prepared.label, "voxels.npy": voxels}
    with _whole(folder, case) as temporary:
        for name, array in arrays.items():
            if array is not None:
                np.save(temporary / name, array)
        facts = {
            "case_id": case.case_id,
            "patient": case.patient,
            "axes": case.axes,
            "info": dict(case.info),
            "sources": [str(p.absolute()) for p in case.files],
            "signature": signature,
            "content": content,
            "files": {p.name: p.stat().st_size for p in temporary.iterdir()},
            "shape": list(prepared.shape),
            "spacing": list(prepared.spacing),
            "source": list(prepared.source),
            "box": [[b.start, b.stop] for b in prepared.box],
            "shift": list(prepared.shift),
            "scale": list(prepared.scale),
            "masked": prepared.masked,
            "structures": structures,
        }
        write_text(temporary / _FILE, json.dumps(facts, indent=1))
    return _entry(case, folder, facts)


@contextlib.contextmanager
def _whole(folder: Path, case: Case) -> Iterator[Path]:
    """A folder to write, which takes its name when it is whole. Raises UserError where the system refuses to write."""
    temporary = _aside(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _take_place(temporary, folder, case)
    except OSError as error:
        raise UserError(f"{write_error(folder, error)} ({_ELSEWHERE})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, folder: Path, case: Case) -> None:
    """Another process may have been first with the same content: then that one stays. What is damaged goes."""
    try:
        temporary.rename(folder)
    except OSError:
        if _facts(folder, case) is not None:
            return
        old = _aside(folder)
        folder.rename(old)
        temporary.rename(folder)
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink()


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{uuid.uuid4().hex[:8]}.partial.{folder.name}")


def _voxels(label: np.ndarray | None) -> tuple[np.ndarray, list[list[int]]]:
    """Flat indices of labelled voxels by structure; structures with their first places, then -1 with the end."""
    if label is None:
        return np.zeros(0, np.int32), [[-1, 0]]
    flat = label.ravel()
    parts, structures, start = [], [], 0
    for index in np.unique(flat[flat > 0]).tolist():
        places = np.flatnonzero(flat == index).astype(np.int32)
        parts.append(places)
        structures.append([index, start])
        start += len(places)
    return np.concatenate([np.zeros(0, np.int32), *parts]), [*structures, [-1, start]]
