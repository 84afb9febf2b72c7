"""Prepared cases, made once and read by every run: on disk, memory-mapped, or in a bucket, as zarr arrays.

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.problem import DataError, Problem, data_error
from xdim_jax.data.case import Case, Dataset, read_case
from xdim_jax.data.prepare import Preparation, Prepared, check_preparation, prepare
from xdim_jax.data.store_backends import Place, Shelf, open_entry, open_shelf, open_voxels

_VERSION = 1  # of the files' format and of what preparation computes


@dataclasses.dataclass(frozen=True)
class Entry:
    """One prepared case."""

    case_id: str
    patient: str
    folder: Place
    shape: tuple[int, ...]  # D, H, W
    structures: tuple[tuple[int, int], ...]  # label index and its first place in voxels.npy, in order; the end last

    def load(self) -> Prepared:
        """The case with its arrays, read as they are indexed. Raises UserError if its files are gone or damaged."""
        with self._reading():
            facts, image, label = open_entry(self.folder)
            box = tuple(slice(*b) for b in facts["box"])
            return Prepared(
                image,
                label,
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
            flat = int(open_voxels(self.folder)[int(rng.integers(start, stop))])
            return tuple(int(i) for i in np.unravel_index(flat, self.shape))

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
    folder: Place,
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
    shelf = open_shelf(folder, key)
    shelf.begin(facts)
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        found = list(pool.map(lambda case: _find(shelf, case), cases))
    todo = [i for i, entry in enumerate(found) if entry is None]
    say(f"store      {shelf}: {len(cases) - len(todo)} of {len(cases)} cases prepared")
    problems: list[Problem] = []
    done = 0

    def run(i: int) -> Entry | DataError:
        try:
            return _write(shelf, cases[i], settings)
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
                _announce(shelf, outcome, len(rest), say)
            break
    with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
        try:
            for i, outcome in zip(rest, pool.map(run, rest), strict=True):
                take(i, outcome)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        raise data_error(*problems, summary=f"problems in {len(todo)} cases; the others are prepared")
    return [entry for entry in found if entry is not None]


def _announce(shelf: Shelf, first: Entry, others: int, say: Callable[[str], None]) -> None:
    size, free = shelf.size(first.folder), shelf.free()
    room = "" if free is None else f"; {gib(free)} free"
    say(f"store      {others} cases to prepare, about {gib(size * others)}{room}")
    if free is not None and size * others > free:
        raise UserError(
            f"{shelf}: the {others} cases left need about {gib(size * others)}, but only {gib(free)} are free; make "
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


def _find(shelf: Shelf, case: Case) -> Entry | None:
    """The entry of a case that was made of these sources, if there is one and it is whole."""
    known = {place: shelf.facts(place) for place in shelf.places(case.case_id)}
    facts = {place: found for place, found in known.items() if found is not None and _serves(found, case)}
    if not facts:
        return None
    try:
        signature = _signature(case)
        for place, found in facts.items():
            if found["signature"] == signature:
                return _entry(case, place, found)
        place = _place(shelf, case, _content(case))
        if place in facts:
            with contextlib.suppress(UserError):  # a store that one may only read serves as well
                shelf.keep(place, facts[place] | {"signature": signature})
            return _entry(case, place, facts[place])
    except OSError:  # a source is gone: preparing it says which
        return None
    return None


def _place(shelf: Shelf, case: Case, content: str) -> Place:
    return shelf.place(f"{case.case_id}-{content[:16]}")


def _serves(facts: Any, case: Case) -> bool:
    """Whether what case.json says is of this case as it is read now."""
    try:
        same = facts["axes"] == case.axes and facts["patient"] == case.patient
        return same and facts["structures"] is not None
    except (KeyError, TypeError):
        return False


def _entry(case: Case, folder: Place, facts: dict[str, Any]) -> Entry:
    structures = tuple((int(i), int(start)) for i, start in facts["structures"])
    return Entry(case.case_id, case.patient, folder, tuple(facts["shape"]), structures)


def _write(shelf: Shelf, case: Case, settings: Preparation) -> Entry:
    try:
        signature, content = _signature(case), _content(case)
    except OSError as error:
        path = Path(error.filename or case.files[0])
        raise data_error(
            Problem(
                "unreadable",
                path,
                found=f"cannot be read ({error.strerror or error})",
                expected="a file",
                suggestion="fetch it again",
                case_id=case.case_id,
            )
        ) from error
    place = _place(shelf, case, content)
    facts = shelf.facts(place)
    if facts is not None and _serves(facts, case):  # another process has prepared it meanwhile
        return _entry(case, place, facts)
    prepared = prepare(case, read_case(case), settings)
    voxels, structures = _voxels(prepared.label)
    arrays = {"image": prepared.raw, "label": prepared.label, "voxels": voxels}
    facts = {
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
        "masked": prepared.masked,
        "structures": structures,
    }
    present = {name: array for name, array in arrays.items() if array is not None}
    return _entry(case, place, shelf.write(place, present, facts, lambda other: _serves(other, case)))


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
