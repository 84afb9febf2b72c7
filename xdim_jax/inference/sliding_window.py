"""Sliding-window prediction of whole volumes, in bounded memory.

Windows are blended on the device with Gaussian weights, from the first slices of the volume to the last. A buffer on
the device holds the weighted sums of the slices to which later windows still contribute. Complete slices are resampled
to the source grid, decoded to labels, and removed from the buffer. Therefore only label indices are copied to the host,
and no array has the size of the volume times the number of classes, unless probabilities are asked for.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax import ops
from xdim_jax.base.errors import UserError
from xdim_jax.base.threads import StoppedError, call_in_thread
from xdim_jax.data.prepare import Prepared
from xdim_jax.inference.output import Output
from xdim_jax.inference.windows import Layout, Windows, batched, gaussian_weights, make_layout, read_window

_DECODED = 8  # number of slices of a volume that are decoded to labels at once
SLICES = 8  # a window of a 2D network has at most SLICES * batch slices, see `make_segmenter`

# weights, images (B, *patch, C) -> logits (B, *patch, channels)
Forward = Callable[[Any, jax.Array], jax.Array]


class Sink(Protocol):
    """Function that receives the slices of a volume on the source grid, in order, as soon as they are complete."""

    def __call__(self, slices: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        """Receive some slices.

        Args:
            slices: Indices of the n slices along D on the source grid.
            box: Part of the plane (H, W) of the source grid that was predicted.
            values: ``probabilities``, float32 (n, H, W, channels), and ``uncertainty``, float32 (n, H, W), in the box.
        """


class Segmenter:
    """Segments whole volumes.

    Args:
        forward: Forward pass of the network, see `Forward`.
        output: Meaning of the channels.
        windows: How volumes are divided into windows.
        threshold: Threshold of the probabilities, for all regions or by region; not used with softmax.
        members: Number of networks (e.g. folds) whose weights are stacked along a first axis, and whose probabilities
            are averaged. 0 for one network, whose weights are not stacked.
        extra_outputs: Any of ``probabilities`` and ``uncertainty`` (the variance over members and flips, averaged over
            channels, and blended like the probabilities). A sink receives these values.

    Attributes:
        max_sizes: Number of sizes of images for which compiled programs are kept; 0 for no limit.
        require_finite: True to raise UserError if probabilities are not finite; otherwise, NaN becomes background.
    """

    max_sizes = 0
    require_finite = False

    def __init__(
        self,
        forward: Forward,
        output: Output,
        windows: Windows,
        *,
        threshold: float | Mapping[str, float] = 0.5,
        members: int = 0,
        extra_outputs: frozenset[str] = frozenset(),
    ):
        self.windows, self.output, self.extra_outputs, self.members = windows, output, extra_outputs, members
        self._forward, self._threshold = forward, threshold
        # a 2D network segments each slice independently, so the Gaussian weights do not vary along D
        self._gauss = gaussian_weights((1, *windows.patch[1:]) if windows.slices else windows.patch)[..., None]
        # forward passes: index of the network, and for each axis whether the window is flipped along it
        self._passes = [
            (np.int32(member), np.array([axis in flip for axis in range(3)]))
            for member in range(max(members, 1))
            for flip in windows.flips
        ]
        self._compiled: dict[tuple[int, ...], Any] = {}  # shape of a batch of windows -> compiled network
        self._sum = jax.jit(_sum, donate_argnums=0)
        self._blend = jax.jit(self._blend_windows, donate_argnums=0)
        self._shift = jax.jit(_shift_slices, donate_argnums=0)
        self._decode = jax.jit(self._decode_slices)
        self._sizes: set[Any] = set()  # sizes of the images for which these programs have been compiled

    @property
    def channels(self) -> int:
        """Number of channels of the buffer: the channels of the output, uncertainty if computed, and sum of weights."""
        return len(self.output.channels) + ("uncertainty" in self.extra_outputs) + 1

    def _drop_programs(self, layout: Layout) -> None:
        """Drop the programs for earlier sizes of images if there are many, because each needs some MiB of memory."""
        size = (layout.plane, layout.target, layout.buffer_slices)
        if self.max_sizes and size not in self._sizes and len(self._sizes) == self.max_sizes:
            self._sizes.clear()
            programs: Any = (self._blend, self._shift, self._decode)
            for program in programs:
                program.clear_cache()
        self._sizes.add(size)

    def __call__(
        self,
        weights: Any,
        prepared: Prepared,
        sink: Sink | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Segment a volume.

        Args:
            weights: Weights of the network, or stacked weights of several networks.
            prepared: The prepared case.
            sink: Function that receives the extra outputs.
            stopped: Function that returns True if the segmentation is no longer needed. It is called after each
                batch of windows, and while the network is compiled.

        Returns:
            Label indices uint8 (D, H, W) on the source grid; 0 outside of the box to which preparation cropped.

        Raises:
            StoppedError: ``stopped`` has returned True.
            UserError: Probabilities are not finite, see `require_finite`.
        """
        layout = make_layout(self.windows, prepared.shape, tuple(b.stop - b.start for b in prepared.box))
        self._drop_programs(layout)
        label = np.zeros(prepared.source, np.uint8)
        inside = label[prepared.box]
        buffer = jnp.zeros((layout.buffer_slices, *layout.plane, self.channels), jnp.float32)
        planes = jax.tree.map(jnp.asarray, layout.plane_matrices)
        slices, taps = layout.taps
        top = done = 0  # first slice in the buffer; first slice of the source grid that is not decoded yet
        decoded = _decoded_slices(layout)
        last_total = None
        for i, start in enumerate(layout.starts[0]):
            for batch in batched(itertools.product([start], *layout.starts[1:]), layout.batch):
                total = self._predict_windows(weights, prepared, layout, batch, stopped)
                # at most two batches still run when the segmentation is stopped
                jax.block_until_ready(last_total)
                if stopped():
                    raise StoppedError
                last_total = total[0]
                buffer = self._blend(buffer, total, *self._placement(layout, batch, top))
            last = i + 1 == len(layout.starts[0])
            complete = layout.patch[0] + start if last else layout.starts[0][i + 1]
            ready = layout.target[0] if last else int(np.searchsorted(slices.max(1), complete))
            while done < ready:
                index = np.minimum(np.arange(done, done + decoded), ready - 1)
                values = self._decode(buffer, jnp.asarray(slices[index] - top), jnp.asarray(taps[index]), planes)
                if not values.pop("finite") and self.require_finite:
                    raise UserError(
                        "the network has computed NaN or infinity; if --precision is bfloat16, give "
                        "--precision=float32, else check the weights and the intensities of the image"
                    )
                count = min(decoded, ready - done)
                cropped = {name: _crop(np.asarray(v), count, layout) for name, v in values.items()}
                inside[done : done + count] = cropped.pop("label")
                if sink is not None:
                    first = prepared.box[0].start + done
                    sink(slice(first, first + count), prepared.box[1:], cropped)
                done += count
            if not last:
                needed = min(int(slices[done].min()) if done < layout.target[0] else complete, complete)
                buffer, top = self._shift(buffer, needed - top), needed
        return label

    def device_bytes(
        self, weights: Any, volumes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], in_channels: int
    ) -> int:
        """Estimate the peak memory on the device in bytes, if the volumes are segmented one after the other.

        Args:
            weights: Weights of the network.
            volumes: For each volume, its size (D, H, W) after preparation, and its size on the source grid.
            in_channels: Number of channels of the images.
        """
        layouts = [make_layout(self.windows, *sizes) for sizes in volumes]
        largest = max(layouts, key=lambda p: p.batch * math.prod(p.patch))
        memory = self._network(weights, (largest.batch, *largest.patch, in_channels)).memory_analysis()
        network = (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else 0
        )
        buffer = max(layout.buffer_slices * math.prod(layout.plane) for layout in layouts) * self.channels * 4
        slices = (
            self.channels
            * 4
            * max(_decoded_slices(p) * (3 * math.prod(p.plane) + 2 * math.prod(p.out)) for p in layouts)
        )
        # the sums of a batch, their mean, and the weighted windows
        blending = 4 * largest.batch * math.prod(largest.patch) * self.channels * 4
        return network + buffer + max(slices, blending)

    def _predict_windows(
        self,
        weights: Any,
        prepared: Prepared,
        layout: Layout,
        batch: Sequence[tuple[int, ...]],
        stopped: Callable[[], bool],
    ) -> tuple[jax.Array, jax.Array]:
        """Return the sum over all passes of the probabilities of a batch of windows, and the sum of their squares."""
        image = jnp.asarray(np.stack([read_window(prepared, layout, s) for s in _fill(batch, layout.batch)]))
        network, total = self._network(weights, image.shape, stopped), None
        for member, flips in self._passes:
            p = network(weights, image, member, flips)
            total = (p, p * p) if total is None else self._sum(total, p)
        assert total is not None
        return total

    def _placement(
        self, layout: Layout, batch: Sequence[tuple[int, ...]], top: int
    ) -> tuple[jax.Array, np.ndarray, np.ndarray]:
        """Return the Gaussian weights, and for each window of a batch its start in the buffer and a factor.

        The factor is 0 for copies that fill the batch (see `_fill`), and 1 for other windows.
        """
        starts = np.array(_fill(batch, layout.batch), np.int32) - np.array([top, 0, 0], np.int32)
        return jnp.asarray(self._gauss), starts, (np.arange(layout.batch) < len(batch)).astype(np.float32)

    def _network(self, weights: Any, shape: tuple[int, ...], stopped: Callable[[], bool] = lambda: False) -> Any:
        """Return the compiled network for a batch of windows ``(B, *patch, C)``."""
        if shape not in self._compiled:
            image, flips = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((3,), jnp.bool_)
            member = jax.ShapeDtypeStruct((), jnp.int32)
            lowered = jax.jit(self._probabilities).lower(weights, image, member, flips)
            self._compiled[shape] = call_in_thread(lambda: ops.compile_program(lowered), stopped)
        return self._compiled[shape]

    # The following methods are traced: they run on the device.

    def _probabilities(self, weights: Any, image: jax.Array, member: jax.Array, flips: jax.Array) -> jax.Array:
        """Return the probabilities that one network computes for a batch of flipped windows, flipped back."""
        if self.members:
            weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, member, 0, keepdims=False), weights)
        if not any(self.windows.flips):
            return self.output.probabilities(self._forward(weights, image))
        return _mirror(self.output.probabilities(self._forward(weights, _mirror(image, flips))), flips)

    def _blend_windows(
        self, buffer: jax.Array, total: Any, gauss: jax.Array, starts: jax.Array, valid: jax.Array
    ) -> jax.Array:
        """Add windows to the buffer: the mean probabilities over all passes, and the uncertainty if it is wanted.

        Both are multiplied by the Gaussian weights, which are added to the last channel of the buffer.
        """
        mean = total[0] / len(self._passes)
        parts = [mean]
        if "uncertainty" in self.extra_outputs:
            parts.append(jnp.maximum(total[1] / len(self._passes) - mean**2, 0).mean(-1, keepdims=True))
        part = jnp.concatenate([*parts, jnp.ones_like(mean[..., :1])], -1) * gauss
        for b in range(part.shape[0]):
            index = (starts[b, 0], starts[b, 1], starts[b, 2], 0)
            old = jax.lax.dynamic_slice(buffer, index, part.shape[1:])
            buffer = jax.lax.dynamic_update_slice(buffer, old + part[b] * valid[b], index)
        return buffer

    def _decode_slices(
        self, buffer: jax.Array, slices: jax.Array, taps: jax.Array, planes: Any
    ) -> dict[str, jax.Array]:
        """Resample slices of the buffer to the source grid, and return their labels and the extra outputs."""

        def add_tap(t: jax.Array | int, total: jax.Array | float) -> jax.Array:
            part = jnp.take(buffer, slices[:, t], axis=0)  # (slices, H, W, self.channels)
            norm = part[..., -1:]
            part = jnp.where(norm > 0, part[..., :-1] / jnp.where(norm > 0, norm, 1), 0)
            return total + part * taps[:, t, None, None, None]

        found = add_tap(0, 0.0)
        if slices.shape[1] > 1:
            found = jax.lax.fori_loop(1, slices.shape[1], add_tap, found)
        if planes is not None:
            exact = jax.lax.Precision.HIGHEST
            found = jnp.einsum("kyxc,Yy->kYxc", found, planes[0], precision=exact)
            found = jnp.einsum("kyxc,Xx->kyXc", found, planes[1], precision=exact)
        channels = len(self.output.channels)
        values = {"label": self.output.decode(found[..., :channels], self._threshold, jnp)}
        values["finite"] = jnp.isfinite(found).all()
        if "probabilities" in self.extra_outputs:
            values["probabilities"] = found[..., :channels]
        if "uncertainty" in self.extra_outputs:
            values["uncertainty"] = found[..., channels]
        return values


def _decoded_slices(layout: Layout) -> int:
    """Return the number of slices that are decoded at once."""
    return 1 if layout.target[0] == 1 else _DECODED


def make_segmenter(
    forward: Forward,
    output: Output,
    patch: Sequence[int],
    overlap: float,
    *,
    batch: int = 1,
    flips: tuple[tuple[int, ...], ...] = ((),),
    **options: Any,
) -> Segmenter:
    """Return the segmenter for a 2D or 3D network.

    Args:
        forward: Forward pass of the network; in 2D, images are ``(B, H, W, C)``.
        output: Meaning of the channels.
        patch: Size of a window, (D, H, W) or, for a 2D network, (H, W).
        overlap: Fraction of a window that its neighbour covers, in [0, 1); slices of a 2D network do not overlap.
        batch: Number of windows that are computed at once; for a 2D network, one of ``SLICES * batch`` slices.
        flips: For each forward pass, the axes along which the window is flipped, see `Windows`. For a 2D network, only
            1 (H) and 2 (W) are possible.
        options: The other arguments of `Segmenter`.
    """
    if len(patch) == 3:
        d, h, w = patch
        return Segmenter(forward, output, Windows((d, h, w), (overlap, overlap, overlap), batch, flips), **options)

    def forward_slices(weights: Any, volume: jax.Array) -> jax.Array:
        logits = forward(weights, volume.reshape(-1, *volume.shape[2:]))
        return logits.reshape(*volume.shape[:-1], logits.shape[-1])

    h, w = patch
    windows = Windows((SLICES * batch, h, w), (0.0, overlap, overlap), 1, flips, slices=True)
    return Segmenter(forward_slices, output, windows, **options)


def all_flips(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return all subsets of the given axes, the empty one first."""
    return tuple(c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n))


def _fill(batch: Sequence[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """Fill a batch up to ``size`` with copies of its last window."""
    return [*batch, *[batch[-1]] * (size - len(batch))]


def _sum(total: tuple[jax.Array, jax.Array], p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add probabilities to their sum, and their squares to the sum of squares."""
    return total[0] + p, total[1] + p * p


def _mirror(array: jax.Array, flips: jax.Array) -> jax.Array:
    """Flip ``(B, D, H, W, C)`` along the spatial axes for which ``flips`` (3,) is True."""
    for axis in range(3):
        array = jnp.where(flips[axis], jnp.flip(array, axis + 1), array)
    return array


def _shift_slices(buffer: jax.Array, by: jax.Array) -> jax.Array:
    """Shift the slices of the buffer towards index 0 by ``by``, in place; the last ``by`` slices become 0."""
    slices = buffer.shape[0]

    def move(i: jax.Array, buffer: jax.Array) -> jax.Array:
        moved = jax.lax.dynamic_slice_in_dim(buffer, jnp.minimum(i + by, slices - 1), 1)
        return jax.lax.dynamic_update_slice_in_dim(buffer, jnp.where(i + by < slices, moved, 0), i, 0)

    return jax.lax.fori_loop(0, slices, move, buffer)


def _crop(values: np.ndarray, count: int, layout: Layout) -> np.ndarray:
    """Return the first ``count`` slices of decoded values, without the padding along H and W."""
    y, x = (0, 0) if layout.resized else layout.before[1:]
    return values[:count, y : y + layout.target[1], x : x + layout.target[2]]
