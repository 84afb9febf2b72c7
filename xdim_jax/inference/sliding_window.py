"""Sliding-window prediction of whole volumes, in bounded memory.

Windows are blended on the device with Gaussian weights, from the first slices of the volume to the last. A ring buffer
has the weighted sums of those slices ("rows") that further windows may still change. Complete rows are resampled to the
source grid and decoded to labels on the device. So only label indices are copied to the host, and there is never an
array of the size classes times volume.
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

SIGMA = 1 / 8  # relative to the patch; the weight falls to 3e-4 at the middle of its faces (as in nnU-Net)
_FLOOR = 1e-3  # smallest weight, so that a corner that is in one window only is not divided by zero
_BUCKET = 32  # sides of the ring and of resampled slices are multiples of it, so that few programs are compiled
_ROWS = 8  # rows that are decoded to labels at once
SLICES = 8  # batch of a 2D network: the number of slices of a volume that are computed at once

# weights, images (B, *patch, C) -> logits (B, *patch, channels)
Forward = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How volumes are divided into windows, and how each window is mirrored.

    Attributes:
        patch: Size of a window, D, H, W.
        overlap: For each axis, the share of a window that its neighbour covers, in [0, 1).
        batch: Number of windows that are computed at once.
        flips: For each forward pass, the axes (0: D, 1: H, 2: W) along which the window is mirrored. ``((),)`` for one
            pass without mirroring.
        slices: True if the network is 2D; a window may then have fewer slices than the patch.
    """

    patch: tuple[int, int, int]
    overlap: tuple[float, float, float]
    batch: int = 1
    flips: tuple[tuple[int, ...], ...] = ((),)
    slices: bool = False


class Sink(Protocol):
    """Function that receives the rows of a volume on the source grid as soon as they are complete, in order."""

    def __call__(self, rows: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        """Receive probabilities (n, H, W, channels) or uncertainty (n, H, W) of n rows, inside of the box."""


def gaussian_weights(patch: Sequence[int]) -> np.ndarray:
    """Return the weight of every voxel of a window, float32 of shape ``patch``, with 1 at the centre."""
    weights = np.ones((), np.float64)
    for n in patch:
        profile = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (SIGMA * n)) ** 2)
        weights = weights[..., None] * profile
    return np.maximum(weights / weights.max(), _FLOOR).astype(np.float32)


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Return the starts of the fewest evenly spaced windows that cover ``size`` and overlap by at least ``overlap``."""
    if size <= patch:
        return [0]
    count = -(-(size - patch) // max(int(patch * (1 - overlap)), 1)) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


@functools.lru_cache(64)
def resampling(old: int, new: int) -> np.ndarray:
    """Return the matrix ``(new, old)`` that `xdim_jax.data.prepare.resample` applies along an axis."""
    identity = np.eye(old, dtype=np.float32).reshape(old, 1, 1, old)
    return resample(identity, (new, 1, 1))[:, 0, 0]


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Sizes for one volume. A volume that is smaller than the patch is centred by ``before`` voxels of padding."""

    size: tuple[int, ...]
    target: tuple[int, ...]
    patch: tuple[int, int, int]
    before: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    plane: tuple[int, int]  # H, W of the ring
    batch: int  # number of windows at once

    @property
    def resized(self) -> bool:
        """True if slices are resized to the source grid."""
        return self.size[1:] != self.target[1:]

    @property
    def out(self) -> tuple[int, int]:
        """H and W of rows when they are decoded to labels."""
        if not self.resized:
            return self.plane
        return _up(self.target[1], _BUCKET), _up(self.target[2], _BUCKET)

    @functools.cached_property
    def taps(self) -> tuple[np.ndarray, np.ndarray]:
        """For each row of the source grid, the rows of the volume and the weights that give it, ``(D, T)`` each."""
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
        """Number of rows of the ring: a window's, and those above it that a row of the source grid may still need."""
        return _up(self.patch[0] + (self.taps[0].shape[1] if self.size[0] != self.target[0] else 0), 8)


class Segmenter:
    """Segments whole volumes.

    Args:
        forward: Forward pass of the network, see `Forward`.
        output: Meaning of the channels.
        windows: How volumes are divided into windows.
        threshold: Threshold of the probabilities, for all regions or by region; not used with softmax.
        members: Number of networks (e.g. folds) whose weights are stacked along a first axis, and whose probabilities
            are averaged. 0 for one network, whose weights are not stacked.
        want: What a sink receives in addition to labels: ``probabilities``, and ``uncertainty`` (the variance over
            members and flips, averaged over channels, and blended like the probabilities).
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
        """Return the sizes for a volume of ``size``, which has the size ``target`` on the source grid."""
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
        """Number of channels of the ring."""
        return len(self.output.channels) + ("uncertainty" in self.want) + 1

    def __call__(self, weights: Any, prepared: Prepared, sink: Sink | None = None) -> np.ndarray:
        """Return label indices uint8 (D, H, W) on the source grid; 0 outside of the box that preparation has kept."""
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
        top = done = 0  # first row of the ring; first row of the source grid that is not decoded yet
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
        """Compute a batch of windows, and add them to the ring."""
        count = len(batch)
        batch = batch + batch[-1:] * (plan.batch - count)  # fill the last batch with copies, whose weight is 0
        image = jnp.asarray(np.stack([_window(prepared, plan, start) for start in batch]))
        look, total = self._program(weights, image.shape), None
        for member, flips in self.looks:
            p = look(weights, image, member, flips)
            total = (p, p * p) if total is None else self._sums(total, p)
        starts = np.array(batch, np.int32) - np.array([top, 0, 0], np.int32)
        valid = (np.arange(len(batch)) < count).astype(np.float32)
        return self._add(ring, total, gauss, starts, valid)

    def _program(self, weights: Any, shape: tuple[int, ...]) -> Any:
        """Return the compiled network for windows of a shape."""
        if shape not in self._programs:
            image, flips = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((3,), jnp.bool_)
            member = jax.ShapeDtypeStruct((), jnp.int32)
            self._programs[shape] = ops.compile_program(self._look.lower(weights, image, member, flips))
        return self._programs[shape]

    def device_bytes(self, weights: Any, volumes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], image: int) -> int:
        """Return the bytes that volumes need on the device, one after the other, as the compiler reports them.

        Args:
            weights: Weights of the network.
            volumes: Of each volume, its size after preparation and its size on the source grid.
            image: Number of channels of the images.
        """
        plans = [self.layout(*sizes) for sizes in volumes]
        largest = max(plans, key=lambda p: p.batch * math.prod(p.patch))
        memory = self._program(weights, (largest.batch, *largest.patch, image)).memory_analysis()
        network = (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else 0
        )
        ring = max(plan.ring * math.prod(plan.plane) for plan in plans) * self.channels * 4
        rows = _ROWS * self.channels * 4 * max(3 * math.prod(p.plane) + 2 * math.prod(p.out) for p in plans)
        parts = (
            4 * largest.batch * math.prod(largest.patch) * self.channels * 4
        )  # sums, their mean, and the weighted windows
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
