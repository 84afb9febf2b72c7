"""The stream of training batches from prepared cases. A batch is a pure function of the seed and the step.

There are three kinds of sampling. In each of them, all samples have the same size.

    patches     3D patches at random positions; with patch depth 1, random slices
    slices      every slice of every volume once per epoch, in random order; for 2D networks
    volumes     every volume once per epoch, padded to a common size
"""

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.store import Entry

SAMPLINGS = ("patches", "slices", "volumes")

Size = tuple[int, int, int]
Sample = tuple[np.ndarray, np.ndarray]  # image float32 (D, H, W, C), label uint8 (D, H, W)


def epoch_samples(entries: Sequence[Entry], sampling: str, per_case: int) -> list[tuple[Entry, int]]:
    """Return the samples of one epoch, in a fixed order.

    Args:
        entries: Prepared cases.
        sampling: One of `SAMPLINGS`.
        per_case: Patches per case and epoch, for ``patches``.

    Returns:
        For each sample its entry, and the index of its slice (or of its patch).
    """
    if sampling == "slices":
        return [(entry, k) for entry in entries for k in range(entry.shape[0])]
    return [(entry, k) for k in range(1 if sampling == "volumes" else per_case) for entry in entries]


def steps_per_epoch(count: int, batch: int) -> int:
    """Return the number of full batches in ``count`` samples; at least 1."""
    return max(count // batch, 1)


def check_size(entries: Sequence[Entry], sampling: str, size: Size) -> None:
    """Raise UserError if sampling uses whole images and one of them is larger than ``size`` (D, H, W)."""
    if sampling == "patches":
        return
    axes = (0, 1, 2) if sampling == "volumes" else (1, 2)
    patch = size if sampling == "volumes" else size[1:]
    for entry in entries:
        if any(entry.shape[a] > size[a] for a in axes):
            raise UserError(
                f"case {entry.case_id} is {'x'.join(map(str, entry.shape))} after preparation, larger than "
                f"config.data.patch={patch}, but config.data.sampling={sampling} needs whole images: resample with "
                "config.data.prepare.size or .spacing, enlarge the patch, or use config.data.sampling=patches"
            )


def read_part(entry: Entry, start: Sequence[int], size: Size) -> Sample:
    """Read a part of a case.

    Args:
        entry: The prepared case.
        start: First voxel along D, H, W.
        size: Size along D, H, W. If it is larger than the case along an axis, zeros are added on both sides.

    Returns:
        The standardised image, float32 (D, H, W, C), and the label indices, uint8 (D, H, W).

    Raises:
        UserError: The case has no label, or cannot be read.
    """
    prepared = entry.load()
    if prepared.label is None:
        raise UserError(f"case {entry.case_id} in {entry.location} has no label; training needs one")
    box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    image, label = prepared.image(box), np.asarray(prepared.label[box])
    pads = [((p - n) // 2, p - n - (p - n) // 2) for p, n in zip(size, label.shape, strict=True)]
    if any(low or high for low, high in pads):
        image, label = np.pad(image, [*pads, (0, 0)]), np.pad(label, pads)
    return image, np.ascontiguousarray(label)


def random_start(entry: Entry, size: Size, foreground: float, rng: np.random.Generator) -> list[int]:
    """Return the first voxel (D, H, W) of a random patch.

    With probability ``foreground`` the patch is placed on a voxel of a structure: a structure of the case is chosen at
    random, then one of its voxels, then one of the positions at which the patch contains this voxel. Otherwise all
    positions are equally likely.

    Args:
        entry: The prepared case.
        size: Size of the patch along D, H, W.
        foreground: Probability that the patch is placed on a voxel of a structure, 0 to 1.
        rng: Source of random numbers.
    """
    spans = [max(n - p, 0) for n, p in zip(entry.shape, size, strict=True)]  # largest start along each axis
    starts = [int(rng.integers(0, span + 1)) for span in spans]
    if rng.random() < foreground and (voxel := entry.random_voxel(rng)) is not None:
        starts = [
            int(rng.integers(max(0, v - p + 1), min(v, span) + 1))
            for v, p, span in zip(voxel, size, spans, strict=True)
        ]
    return starts


def _sampler(
    sampling: str, size: Size, foreground: float
) -> Callable[[tuple[Entry, int], np.random.Generator], Sample]:
    def read(sample: tuple[Entry, int], rng: np.random.Generator) -> Sample:
        entry, number = sample
        if sampling == "patches":
            return read_part(entry, random_start(entry, size, foreground, rng), size)
        return read_part(entry, (number if sampling == "slices" else 0, 0, 0), size)

    return read


class Activity:
    """Record of the current tasks of the reading threads, which `xdim_jax.training.watchdog` logs."""

    def __init__(self) -> None:
        self._busy: dict[int, tuple[str, float]] = {}

    def begin(self, task: str) -> None:
        """Record that the calling thread begins a task."""
        self._busy[threading.get_ident()] = (task, time.monotonic())

    def end(self) -> None:
        """Record that the calling thread has finished its task."""
        self._busy.pop(threading.get_ident(), None)

    def lines(self) -> list[str]:
        """Return one line per busy thread, the longest task first."""
        now = time.monotonic()
        busy = sorted(self._busy.copy().values(), key=lambda item: item[1])
        return [f"reading {task} for {now - since:.0f} s" for task, since in busy]


def make_stream(
    entries: Sequence[Entry],
    *,
    sampling: str,
    size: Size,
    flat: bool = False,
    foreground: float,
    patches_per_case: int,
    batch: int,
    seed: int,
    start_step: int,
    threads: int,
    process_index: int = 0,
    process_count: int = 1,
    extras: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    activity: Activity | None = None,
) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over batches.

    The stream visits all samples of an epoch (see `epoch_samples`) in a new random order, then those of the next epoch;
    a batch may contain samples of both. The random numbers of a sample depend only on the seed and its index in the
    stream. Batches are therefore the same for any number of threads and processes, and resuming needs only the step.
    The iterator raises the exceptions of its threads, with their tracebacks.

    Args:
        entries: Prepared cases.
        sampling: One of `SAMPLINGS`.
        size: Size of a sample along D, H, W.
        flat: True to remove the axis D, whose size must be 1.
        foreground: Probability that a patch is placed on a voxel of a structure, see `random_start`.
        patches_per_case: Patches per case and epoch.
        batch: Samples per batch, over all processes.
        seed: Seed of the order and of all random numbers.
        start_step: Index of the first batch.
        threads: Number of reading threads.
        process_index: Index of this process.
        process_count: Number of processes, each of which reads an equal part of a batch. The parts are in the order of
            the processes.
        extras: Further arrays by case id and name, which are added to every sample of the case.
        activity: Record of the tasks of the threads.

    Returns:
        An iterator over dictionaries with the keys:

        - ``image``, float32 (B, D, H, W, C), or (B, H, W, C) if ``flat``
        - ``label``, uint8 (B, D, H, W), or (B, H, W) if ``flat``
        - ``key``, uint32 (B, 2): random bits for the augmentation of each sample
        - ``digest``, uint32 (B,): CRC-32 of the three arrays of each sample
        - the names in ``extras``
    """
    read = _sampler(sampling, size, foreground)

    def load(sample: tuple[Entry, int], rng: np.random.Generator) -> dict[str, Any]:
        entry, number = sample
        if activity:
            activity.begin(f"case {entry.case_id}" + (f", slice {number}" if sampling == "slices" else ""))
        try:
            key = rng.integers(0, 2**32, 2, np.uint32)
            image, label = read(sample, rng)
            arrays: dict[str, Any] = {
                "image": image[0] if flat else image,
                "label": label[0] if flat else label,
                "key": key,
            }
            digest = 0
            for array in arrays.values():
                digest = zlib.crc32(np.ascontiguousarray(array).data, digest)
            return arrays | {"digest": np.uint32(digest)} | dict((extras or {}).get(entry.case_id, {}))
        finally:
            if activity:
                activity.end()

    source = epoch_samples(entries, sampling, patches_per_case)
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(load)
    stream = stream.batch(batch // process_count, drop_remainder=True)  # parts of batches, in the order of processes
    stream = stream[process_index::process_count][start_step:]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    return iter(stream.to_iter_dataset(options))
