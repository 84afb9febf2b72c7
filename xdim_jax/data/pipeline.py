"""From cases to batches. The stream of training batches is a pure function of (seed, step)."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from xdim_jax.data.brats import Case, Volume, read_case
from xdim_jax.data.transforms import brain_box, random_patch, zscore_nonzero


def prepare(volume: Volume) -> tuple[np.ndarray, tuple[slice, slice, slice]]:
    """Brain crop and z-score of the non-zero voxels: the network's image, and where it lies in the volume."""
    box = brain_box(volume.image)
    return zscore_nonzero(volume.image[box]), box


def _load(case: Case) -> tuple[np.ndarray, np.ndarray]:
    volume = read_case(case)
    image, box = prepare(volume)
    assert volume.label is not None, "list_cases(need_labels=True) admits no case without labels"
    return image, volume.label[box]


def steps_per_epoch(cases: int, patches_per_case: int, batch: int) -> int:
    """Full batches in one pass; at least one."""
    return max(cases * patches_per_case // batch, 1)


def make_stream(
    cases: Sequence[Case],
    *,
    patch: tuple[int, int, int],
    tumour_probability: float,
    patches_per_case: int,
    batch: int,
    seed: int,
    start_step: int,
    threads: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, Any]]:
    """Batches from ``start_step`` on, without end: ``image`` f32 (B, D, H, W, C), ``label`` uint8 (B, D, H, W).

    Every pass visits each case ``patches_per_case`` times in a new order. ``batch`` counts all processes; each gets
    its share. A record's random numbers depend on the seed and its index in the stream, so batches are the same for
    any number of threads, and resuming needs only the step.
    """

    def cut(record: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, label = random_patch(*record, patch, tumour_probability, rng)
        return {"image": np.ascontiguousarray(image), "label": np.ascontiguousarray(label)}

    stream = grain.MapDataset.source(list(cases) * patches_per_case).seed(seed).shuffle().repeat()
    stream = stream.map(_load).random_map(cut)
    stream = stream[process_index::process_count].batch(batch // process_count, drop_remainder=True)[start_step:]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    return iter(stream.to_iter_dataset(options))
