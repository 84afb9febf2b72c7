"""Prepared cases on disk, memory-mapped: made once, read by every run.

    <folder>/<key>/store.json                    the settings that the key stands for
    <folder>/<key>/<case id>/image.npy           int16 or float32 (D, H, W, C), as `Prepared.raw`
                            /label.npy           uint8 (D, H, W)
                            /voxels.npy          int32: flat indices of labelled voxels, by structure
                            /case.json           what the rest of `Prepared` holds, and the sources

The key is a digest of data set, label convention and preparation, so that other settings never meet. A case is prepared
again when the content of its sources has changed; size and time of modification tell that nothing has, and where they
differ a digest of the content decides. Cases are written whole or not at all, so an interrupted preparation goes on
where it was, and several processes may prepare into one folder.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.data.case import Case, Dataset, read_case
from xdim_jax.data.prepare import Preparation, Prepared, prepare
from xdim_jax.data.problem import DataError, Problem, data_error
from xdim_jax.errors import UserError
from xdim_jax.files import atomic_path, read_json, write_json, write_text

_VERSION = 1  # of the files' format and of what preparation computes
_FILE = "case.json"


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
        facts = read_json(self.folder / _FILE)
        box = tuple(slice(*b) for b in facts["box"])
        arrays = {}
        for name in ("image", "label"):
            path = self.folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r") if path.exists() else None
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path} cannot be read ({error}); remove {self.folder} and prepare it again"
                ) from error
        if arrays["image"] is None:
            raise UserError(f"{self.folder} has no image.npy; remove it and prepare it again")
        return Prepared(
            arrays["image"],
            arrays["label"],
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
        voxels = np.load(self.folder / "voxels.npy", mmap_mode="r")
        return tuple(int(i) for i in np.unravel_index(int(voxels[rng.integers(start, stop)]), self.shape))


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
    """Beside the data: ``<root>_prepared``."""
    root = root.absolute()
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

    The size of what is to be written is estimated from the first case and said before the others begin. Each of
    ``jobs`` threads holds one case in memory.

    Raises:
        DataError: every case that cannot be used, at once; the others are prepared.
        UserError: not enough room on the disk, or it cannot be written to.
    """
    key, facts = store_key(dataset, settings)
    base = Path(folder) / key
    if not (base / "store.json").is_file():
        write_json(base / "store.json", facts)
    found = {case.case_id: _find(base, case) for case in cases}
    todo = [case for case in cases if found[case.case_id] is None]
    say(f"store      {base}: {len(cases) - len(todo)} of {len(cases)} cases prepared")
    if todo:
        problems: list[Problem] = []
        done = 0

        def run(case: Case) -> Entry | DataError:
            try:
                return _write(base, case, settings)
            except DataError as error:
                return error

        def take(case: Case, outcome: Entry | DataError) -> None:
            nonlocal done
            done += 1
            if isinstance(outcome, DataError):
                problems.extend(outcome.problems)
            else:
                found[case.case_id] = outcome
            progress(done, len(todo))

        outcome = run(todo[0])
        take(todo[0], outcome)
        if len(todo) > 1 and isinstance(outcome, Entry):
            _announce(base, outcome, len(todo) - 1, say)
        with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
            try:
                for case, outcome in zip(todo[1:], pool.map(run, todo[1:]), strict=True):
                    take(case, outcome)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if problems:
            raise data_error(problems, f"problems in {len(todo)} cases; the others are prepared")
    return [entry for case in cases if (entry := found[case.case_id]) is not None]


def _announce(base: Path, first: Entry, others: int, say: Callable[[str], None]) -> None:
    size = sum(p.stat().st_size for p in first.folder.iterdir())
    free = shutil.disk_usage(base).free
    say(f"store      {others} cases to prepare, about {_gib(size * others)}; {_gib(free)} free")
    if size * others > free:
        raise UserError(
            f"{base}: the {others} cases left need about {_gib(size * others)}, but only {_gib(free)} are free; make "
            "room, or choose another folder with --config.data.store=<folder>, and run the same command again"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


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


def _find(base: Path, case: Case) -> Entry | None:
    """The entry of a case if it is there and its sources have not changed."""
    folder = base / case.case_id
    if not (folder / _FILE).is_file():
        return None
    try:
        facts = read_json(folder / _FILE)
        signature = _signature(case)
        if facts["axes"] != case.axes or facts["patient"] != case.patient:
            return None
        if facts["signature"] != signature:
            if facts["content"] != _content(case):
                return None
            write_json(folder / _FILE, facts | {"signature": signature})
        return _entry(case, folder, facts)
    except (UserError, KeyError, OSError):  # damaged, or a source is gone: preparing it says what is wrong
        return None


def _entry(case: Case, folder: Path, facts: dict[str, Any]) -> Entry:
    structures = tuple((int(i), int(start)) for i, start in facts["structures"])
    return Entry(case.case_id, case.patient, folder, tuple(facts["shape"]), structures)


def _write(base: Path, case: Case, settings: Preparation) -> Entry:
    folder = base / case.case_id
    signature, content = _signature(case), _content(case)
    prepared = prepare(case, read_case(case), settings)
    voxels, structures = _voxels(prepared.label)
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
    if folder.exists():  # of other sources
        shutil.rmtree(folder)
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            np.save(temporary / "image.npy", prepared.raw)
            if prepared.label is not None:
                np.save(temporary / "label.npy", prepared.label)
            np.save(temporary / "voxels.npy", voxels)
            write_text(temporary / _FILE, json.dumps(facts, indent=1))
    except UserError:
        with contextlib.suppress(Exception):  # another process has prepared the same case meanwhile
            if (entry := _find(base, case)) is not None:
                return entry
        raise
    return _entry(case, folder, facts)


def _voxels(label: np.ndarray | None) -> tuple[np.ndarray, list[list[int]]]:
    """Flat indices of labelled voxels by structure; structures with their first places, then -1 with the end."""
    if label is None:
        return np.zeros(0, np.int32), [[-1, 0]]
    flat = label.ravel()
    parts, structures, start = [], [], 0
    for index in np.unique(flat)[np.unique(flat) > 0].tolist():
        places = np.flatnonzero(flat == index).astype(np.int32)
        parts.append(places)
        structures.append([index, start])
        start += len(places)
    return np.concatenate([np.zeros(0, np.int32), *parts]), [*structures, [-1, start]]
