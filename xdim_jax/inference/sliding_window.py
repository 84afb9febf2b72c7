"""Whole volumes from a network that takes windows, in bounded memory.

Windows slide over the volume with Gaussian weights and are blended on the device. They go down slab by slab: a ring of
rows holds the weighted sums that windows still to come may add to, and nothing else. Rows that are complete are
resampled to the source grid and turned into labels on the device, so that only label indices come to the host; no array
of classes times volume exists anywhere.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax import ops
from xdim_jax.data import regions
from xdim_jax.data.prepare import Prepared, resample
from xdim_jax.inference.output import Output

SIGMA = 1 / 8  # of the patch: a window's weight falls to 3e-4 at the middle of its faces (nnU-Net's choice)
_FLOOR = 1e-3  # smallest weight, so that a corner seen by one window only is not divided by zero
_BUCKET = 32  # sides of the ring and of resampled slices are rounded up to it, so that few programs are compiled
_ROWS = 8  # that become labels at once
SLICES = 8  # of a 2D network's batch: so many slices of a volume at once

# weights, images (B, *patch, C) -> logits (B, *patch, channels)
Forward = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How volumes are cut, and how often each window is looked at.

    Attributes:
        patch: D, H, W.
        overlap: share of a window that its neighbour covers, in [0, 1), by axis.
        batch: windows at once.
        flips: the axes (0: D, 1: H, 2: W) along which a window is mirrored, once for each entry; ``((),)``: as it is.
        slices: the network is 2D, so that a window may be less deep than the patch.
    """

    patch: tuple[int, int, int]
    overlap: tuple[float, float, float]
    batch: int = 1
    flips: tuple[tuple[int, ...], ...] = ((),)
    slices: bool = False


class Sink(Protocol):
    """Takes rows of a volume on the source grid as they become complete, from the first to the last."""

    def __call__(self, rows: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        """``values``: probabilities (n, H, W, channels) or uncertainty (n, H, W) of these rows, inside the box."""


def gaussian_weights(patch: Sequence[int]) -> np.ndarray:
    """Weight of every voxel of a window, float32 of shape ``patch``, 1 at the centre."""
    weights = np.ones((), np.float64)
    for n in patch:
        profile = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (SIGMA * n)) ** 2)
        weights = weights[..., None] * profile
    return np.maximum(weights / weights.max(), _FLOOR).astype(np.float32)


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Starts of the fewest evenly spread windows that cover ``size`` and overlap by at least ``overlap``."""
    if size <= patch:
        return [0]
    count = -(-(size - patch) // max(int(patch * (1 - overlap)), 1)) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


@functools.lru_cache(64)
def resampling(old: int, new: int) -> np.ndarray:
    """The matrix ``(new, old)`` by which `xdim_jax.data.prepare.resample` acts along an axis."""
    identity = np.eye(old, dtype=np.float32).reshape(old, 1, 1, old)
    return resample(identity, (new, 1, 1))[:, 0, 0]


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Sizes for one volume. ``before``: voxels of padding that centre a volume smaller than the patch."""

    size: tuple[int, ...]
    target: tuple[int, ...]
    patch: tuple[int, int, int]
    before: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    plane: tuple[int, int]  # H, W of the ring
    batch: int  # windows at once

    @property
    def resized(self) -> bool:
        """Whether slices change their size on the way back."""
        return self.size[1:] != self.target[1:]

    @property
    def out(self) -> tuple[int, int]:
        """H, W of rows as they become labels."""
        if not self.resized:
            return self.plane
        return _up(self.target[1], _BUCKET), _up(self.target[2], _BUCKET)

    @functools.cached_property
    def taps(self) -> tuple[np.ndarray, np.ndarray]:
        """For every target row: the rows of the ring's volume, and their weights, ``(D, T)``."""
        matrix = resampling(self.size[0], self.target[0]) if self.size[0] != self.target[0] else None
        if matrix is None:
            return np.arange(self.size[0])[:, None] + self.before[0], np.ones((self.size[0], 1), np.float32)
        some = matrix != 0
        first, last = some.argmax(1), self.size[0] - 1 - some[:, ::-1].argmax(1)
        rows = np.minimum(first[:, None] + np.arange(int((last - first).max()) + 1), self.size[0] - 1)
        weights = np.where(rows <= last[:, None], np.take_along_axis(matrix, rows, 1), 0)
        weights[:, 1:][rows[:, 1:] == rows[:, :-1]] = 0  # a row that was clipped to the last one counts once
        return rows + self.before[0], weights.astype(np.float32)

    @property
    def ring(self) -> int:
        """Rows that are held: a window's, and those above it that a target row may still need."""
        return _up(self.patch[0] + (self.taps[0].shape[1] if self.size[0] != self.target[0] else 0), 8)


class Segmenter:
    """Segments whole volumes.

    Args:
        forward: of the network; see `Forward`. With ``members``, its weights are taken out of the stacked ones.
        output: what the channels mean.
        windows: how volumes are cut.
        threshold: of probabilities, of all regions or by region; without use for softmax.
        members: networks whose weights are stacked along a first axis (folds); their probabilities are averaged. 0: one
            network, not stacked.
        want: of ``probabilities`` and ``uncertainty`` (variance over members and flips, mean over channels, blended as
            probabilities are): handed to a sink.
    """

    def __init__(
        self,
        forward: Forward,
        output: Output,
        windows: Windows,
        *,
        threshold: float | Mapping[str, float] = 0.5,
        members: int = 0,
        want: frozenset[str] = frozenset(),
    ):
        self.windows, self.output, self.want, self.members = windows, output, want, members
        self.gauss = gaussian_weights(windows.patch)[..., None]
        self.looks = [
            (np.int32(member), np.array([axis in flip for axis in range(3)]))
            for member in range(max(members, 1))
            for flip in windows.flips
        ]
        flipping = any(windows.flips)

        def look(weights: Any, image: jax.Array, member: jax.Array, flips: jax.Array) -> jax.Array:
            if members:
                weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, member, 0, keepdims=False), weights)
            image = _mirror(image, flips) if flipping else image
            probabilities = output.probabilities(forward(weights, image))
            return _mirror(probabilities, flips) if flipping else probabilities

        def sums(total: tuple[jax.Array, jax.Array], p: jax.Array) -> tuple[jax.Array, jax.Array]:
            return total[0] + p, total[1] + p * p

        def add(ring: jax.Array, total: Any, gauss: jax.Array, starts: jax.Array, valid: jax.Array) -> jax.Array:
            mean = total[0] / len(self.looks)
            parts = [mean]
            if "uncertainty" in want:
                parts.append(jnp.maximum(total[1] / len(self.looks) - mean**2, 0).mean(-1, keepdims=True))
            part = jnp.concatenate([*parts, jnp.ones_like(mean[..., :1])], -1) * gauss
            for b in range(part.shape[0]):
                index = (starts[b, 0], starts[b, 1], starts[b, 2], 0)
                old = jax.lax.dynamic_slice(ring, index, part.shape[1:])
                ring = jax.lax.dynamic_update_slice(ring, old + part[b] * valid[b], index)
            return ring

        def finish(ring: jax.Array, rows: jax.Array, taps: jax.Array, planes: Any) -> dict[str, jax.Array]:
            def tap(t: jax.Array | int, total: jax.Array | float) -> jax.Array:
                part = jnp.take(ring, rows[:, t], axis=0)  # (rows, H, W, channels + 1)
                norm = part[..., -1:]
                part = jnp.where(norm > 0, part[..., :-1] / jnp.where(norm > 0, norm, 1), 0)
                return total + part * taps[:, t, None, None, None]

            found = tap(0, 0.0)
            if rows.shape[1] > 1:
                found = jax.lax.fori_loop(1, rows.shape[1], tap, found)
            if planes is not None:
                exact = jax.lax.Precision.HIGHEST
                found = jnp.einsum("kyxc,Yy->kYxc", found, planes[0], precision=exact)
                found = jnp.einsum("kyxc,Xx->kyXc", found, planes[1], precision=exact)
            channels = len(output.channels)
            values = {"label": output.decode(found[..., :channels], threshold, jnp)}
            if "probabilities" in want:
                values["probabilities"] = found[..., :channels]
            if "uncertainty" in want:
                values["uncertainty"] = found[..., channels]
            return values

        self._look = jax.jit(look)
        self._sums = jax.jit(sums, donate_argnums=0)
        self._programs: dict[tuple[int, ...], Any] = {}
        self._add, self._finish = jax.jit(add, donate_argnums=0), jax.jit(finish)
        self._shift = jax.jit(_shift, donate_argnums=0)

    def layout(self, size: tuple[int, ...], target: tuple[int, ...]) -> _Layout:
        """Sizes for a volume of ``size``, and of ``target`` on the source grid."""
        patch = self.windows.patch
        patch = (min(size[0], patch[0]) if self.windows.slices else patch[0], patch[1], patch[2])
        before = tuple(max(p - n, 0) // 2 for n, p in zip(size, patch, strict=True))  # centred, as in training
        padded = [max(n, p) for n, p in zip(size, patch, strict=True)]
        starts = [window_starts(n, p, o) for n, p, o in zip(padded, patch, self.windows.overlap, strict=True)]
        plane = (_up(padded[1], _BUCKET), _up(padded[2], _BUCKET))
        batch = min(self.windows.batch, len(starts[1]) * len(starts[2]))
        return _Layout(size, target, patch, before, tuple(map(tuple, starts)), plane, batch)

    @property
    def channels(self) -> int:
        """Of the ring."""
        return len(self.output.channels) + ("uncertainty" in self.want) + 1

    def __call__(self, weights: Any, prepared: Prepared, sink: Sink | None = None) -> np.ndarray:
        """Label indices uint8 (D, H, W) on the source grid; 0 outside the box that was kept."""
        plan = self.layout(prepared.shape, tuple(b.stop - b.start for b in prepared.box))
        label = np.zeros(prepared.source, np.uint8)
        inside = label[prepared.box]
        gauss = jnp.asarray(self.gauss if plan.patch == self.windows.patch else gaussian_weights(plan.patch)[..., None])
        ring = jnp.zeros((plan.ring, *plan.plane, self.channels), jnp.float32)
        planes = None
        if plan.resized:
            planes = tuple(
                jnp.asarray(_placed(resampling(n, m), plan.before[a], plan.plane[a - 1], plan.out[a - 1]))
                for a, (n, m) in enumerate(zip(plan.size, plan.target, strict=True))
                if a
            )
        rows, taps = plan.taps
        top = done = 0  # first row of the ring; first target row that is not written yet
        for i, start in enumerate(plan.starts[0]):
            for batch in _batches(itertools.product([start], *plan.starts[1:]), plan.batch):
                ring = self._blend(weights, ring, prepared, plan, batch, top, gauss)
            last = i + 1 == len(plan.starts[0])
            complete = plan.patch[0] + start if last else plan.starts[0][i + 1]
            ready = plan.target[0] if last else int(np.searchsorted(rows.max(1), complete))
            while done < ready:
                take = np.minimum(np.arange(done, done + _ROWS), ready - 1)
                found = self._finish(ring, jnp.asarray(rows[take] - top), jnp.asarray(taps[take]), planes)
                count = min(_ROWS, ready - done)
                found = {k: _cropped(np.asarray(v), count, plan) for k, v in found.items()}
                inside[done : done + count] = found.pop("label")
                if sink is not None:
                    first = prepared.box[0].start + done
                    sink(slice(first, first + count), prepared.box[1:], found)
                done += count
            if not last:
                needed = min(int(rows[done].min()) if done < plan.target[0] else complete, complete)
                ring, top = self._shift(ring, needed - top), needed
        return label

    def _blend(
        self,
        weights: Any,
        ring: jax.Array,
        prepared: Prepared,
        plan: _Layout,
        batch: list[tuple[int, ...]],
        top: int,
        gauss: jax.Array,
    ) -> jax.Array:
        """Adds some windows to the ring."""
        count = len(batch)
        batch = batch + batch[-1:] * (plan.batch - count)  # the last batch is filled up; weight 0
        image = jnp.asarray(np.stack([_window(prepared, plan, start) for start in batch]))
        look, total = self._program(weights, image.shape), None
        for member, flips in self.looks:
            p = look(weights, image, member, flips)
            total = (p, p * p) if total is None else self._sums(total, p)
        starts = np.array(batch, np.int32) - np.array([top, 0, 0], np.int32)
        valid = (np.arange(len(batch)) < count).astype(np.float32)
        return self._add(ring, total, gauss, starts, valid)

    def _program(self, weights: Any, shape: tuple[int, ...]) -> Any:
        """The network on windows of a shape, compiled."""
        if shape not in self._programs:
            image, flips = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((3,), jnp.bool_)
            member = jax.ShapeDtypeStruct((), jnp.int32)
            self._programs[shape] = ops.compile_program(self._look.lower(weights, image, member, flips))
        return self._programs[shape]

    def device_bytes(self, weights: Any, volumes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], image: int) -> int:
        """What some volumes take on the device, one after the other, by the compiler's count of the network's
        temporaries.

        Args:
            weights: of the network.
            volumes: of each its size as prepared, and on the source grid.
            image: channels of the images.
        """
        plans = [self.layout(*sizes) for sizes in volumes]
        largest = max(plans, key=lambda p: p.batch * math.prod(p.patch))
        memory = self._program(weights, (largest.batch, *largest.patch, image)).memory_analysis()
        network = (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else 0
        )
        ring = max(plan.ring * math.prod(plan.plane) for plan in plans) * self.channels * 4
        rows = _ROWS * self.channels * 4 * max(3 * math.prod(p.plane) + 2 * math.prod(p.out) for p in plans)
        parts = 4 * largest.batch * math.prod(largest.patch) * self.channels * 4  # sums, their mean, what is added
        return network + ring + max(rows, parts)


def _mirror(array: jax.Array, flips: jax.Array) -> jax.Array:
    """``(B, D, H, W, C)`` along the axes that are set."""
    for axis in range(3):
        array = jnp.where(flips[axis], jnp.flip(array, axis + 1), array)
    return array


def _shift(ring: jax.Array, by: jax.Array) -> jax.Array:
    """Moves the ring's rows up by ``by``, row by row in place; the last ones become 0."""
    rows = ring.shape[0]

    def row(i: jax.Array, ring: jax.Array) -> jax.Array:
        moved = jax.lax.dynamic_slice_in_dim(ring, jnp.minimum(i + by, rows - 1), 1)
        return jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(i + by < rows, moved, 0), i, 0)

    return jax.lax.fori_loop(0, rows, row, ring)


def _batches(starts: Any, size: int) -> list[list[tuple[int, ...]]]:
    every = list(starts)
    return [every[i : i + size] for i in range(0, len(every), size)]


def _placed(matrix: np.ndarray, before: int, columns: int, rows: int) -> np.ndarray:
    """A resampling matrix that starts at column ``before``, in a larger one of zeros."""
    placed = np.zeros((rows, columns), np.float32)
    placed[: matrix.shape[0], before : before + matrix.shape[1]] = matrix
    return placed


def _cropped(values: np.ndarray, count: int, plan: _Layout) -> np.ndarray:
    y, x = (0, 0) if plan.resized else plan.before[1:]
    return values[:count, y : y + plan.target[1], x : x + plan.target[2]]


def _window(prepared: Prepared, plan: _Layout, start: tuple[int, ...]) -> np.ndarray:
    """What the network sees of a window, float32 ``(*patch, C)``; beyond the volume zeros."""
    low = [s - b for s, b in zip(start, plan.before, strict=True)]
    part, pads = [], []
    for first, p, n in zip(low, plan.patch, plan.size, strict=True):
        begin, end = max(first, 0), min(first + p, n)
        part.append(slice(begin, end))
        pads.append((begin - first, first + p - end))
    image = prepared.image(tuple(part))
    return np.pad(image, [*pads, (0, 0)]) if any(map(any, pads)) else image


# -- of a run -----------------------------------------------------------------------------------------------------


def make_segmenter(config: Any, forward: Forward, output: Output, **options: Any) -> Segmenter:
    """For the network of a run's config, in 2D or 3D.

    Args:
        config: of the run; its ``predict`` section has overlap and threshold.
        forward: of the network, which in 2D takes ``(B, H, W, C)``.
        output: what the channels mean.
        options: ``batch``, ``flips`` (in 2D along H and W alone) and those of `Segmenter`.
    """
    patch, overlap = tuple(config.data.patch), float(config.predict.overlap)
    batch, flips = options.pop("batch", 1), options.pop("flips", ((),))
    options.setdefault("threshold", config.predict.threshold)
    if len(patch) == 3:
        return Segmenter(forward, output, Windows(patch, (overlap, overlap, overlap), batch, flips), **options)

    def by_slices(weights: Any, volume: jax.Array) -> jax.Array:
        slices = volume.reshape(-1, *volume.shape[2:])
        logits = forward(weights, slices)
        return logits.reshape(*volume.shape[:-1], logits.shape[-1])

    windows = Windows((SLICES * batch, *patch), (0.0, overlap, overlap), 1, flips, slices=True)
    return Segmenter(by_slices, output, windows, **options)


def all_flips(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Every combination of some axes, none of them first."""
    return tuple(c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n))


def segment(segmenter: Segmenter, weights: Any, prepared: Prepared, config: Mapping[str, Any]) -> np.ndarray:
    """Label indices uint8 (D, H, W) on the source grid, after the rules for whole label maps: where the config has
    ``min_et`` (BraTS), fewer voxels of ET become NCR."""
    return finish_label(segmenter(weights, prepared), config)


def finish_label(label: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """The rules for whole label maps."""
    return regions.drop_small_et(label, config["min_et"]) if config.get("min_et") else label
