"""The meaning of a network's channels: sigmoids of regions, or a softmax over labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Dataset
from xdim_jax.data.labels import IGNORE
from xdim_jax.data.regions import Regions, drop_small_components, drop_small_et, keep_largest

ACTIVATIONS = ("sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class Output:
    """The channels of a network.

    Attributes:
        activation: ``sigmoid`` for one channel per region; regions may be nested (BraTS; paper, Sect. 3.1.3).
            ``softmax`` for one channel per label, background first (CAMUS and CHAOS; paper, Sect. 2.1.1).
        regions: Regions that are scored, with either activation.
        labels: Names of the labels, background first.
        ignores: True if label maps may have unannotated voxels (`xdim_jax.data.labels.IGNORE`).
    """

    activation: str
    regions: Regions
    labels: tuple[str, ...]
    ignores: bool = False

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the network's channels."""
        return self.labels if self.activation == "softmax" else self.regions.names

    def structure_channels(self) -> dict[str, list[int]]:
        """Return region -> indices of the channels whose probabilities add up to that of the region."""
        if self.activation == "softmax":
            return {name: sorted(int(i) for i in indices) for name, indices in self.regions.sets.items()}
        return {name: [index] for index, name in enumerate(self.regions.names)}

    def encode(self, label: jax.Array) -> jax.Array:
        """Return a target mask for each channel, bool ``(..., channels)``, given label indices ``(...)``."""
        if self.activation == "softmax":
            return label[..., None] == jnp.arange(len(self.labels), dtype=label.dtype)
        return self.regions.encode(label, jnp)

    def annotated_voxels(self, label: jax.Array) -> jax.Array | None:
        """Return a mask of the annotated voxels, bool ``(...)``, given label indices; None if all are annotated."""
        return label != IGNORE if self.ignores else None

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Return the probabilities of the channels, float32, given logits."""
        logits = logits.astype(jnp.float32)
        return jax.nn.softmax(logits) if self.activation == "softmax" else jax.nn.sigmoid(logits)

    def predicted_regions(self, logits: jax.Array) -> jax.Array:
        """Return predicted masks of the regions, bool ``(..., regions)``.

        With sigmoids, a region consists of the voxels with a probability above 0.5. With a softmax, it consists of the
        voxels whose most probable label belongs to the region.
        """
        if self.activation == "softmax":
            return self.regions.encode(jnp.argmax(logits, -1), jnp)
        return logits > 0

    def decode(self, scores: Any, threshold: float | Mapping[str, float], xp: Any = np) -> Any:
        """Return label indices (uint8), given the probabilities of the channels.

        Args:
            scores: Probabilities ``(..., channels)``.
            threshold: Threshold of the probabilities, for all regions or by region; not used with softmax.
            xp: Array library: ``numpy``, or ``jax.numpy`` inside a jitted program.
        """
        if self.activation == "softmax":
            return xp.argmax(scores, -1).astype(np.uint8)
        return self.regions.decode(scores, threshold, xp)

    def annotated_channels(self, regions: Sequence[str]) -> np.ndarray:
        """Return a mask of the annotated channels, bool ``(channels,)``, given the annotated regions of a case.

        A label is annotated if one of its regions is. The background is always annotated.
        """
        if self.activation == "sigmoid":
            return np.array([name in regions for name in self.regions.names])
        known = {0, *(index for name in regions for index in self.regions.sets[name])}
        return np.array([index in known for index in range(len(self.labels))])


def make_output(activation: str, dataset: Dataset) -> Output:
    """Return the output with the given activation for a data set. Raises UserError if the activation is unknown."""
    if activation not in ACTIVATIONS:
        raise UserError(f"config.output={activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    return Output(activation, dataset.regions, dataset.labels.structures, dataset.labels.ignore is not None)


def postprocess(
    label: np.ndarray,
    regions: Regions,
    *,
    largest: Sequence[str] = (),
    smallest: Mapping[str, int] | None = None,
    min_et: int = 0,
) -> np.ndarray:
    """Keep the largest component of some regions, drop small components, then relabel a small enhancing tumour.

    Args:
        label: Label indices (D, H, W).
        regions: Regions of the data set.
        largest: Names of regions. Only their largest connected component is kept.
        smallest: Name of a region -> number of voxels of the smallest component that is kept.
        min_et: Smallest number of voxels of the enhancing tumour (BraTS). If there are fewer, they are relabelled as
            NCR. 0 for no limit.

    Returns:
        Label indices (D, H, W).
    """
    label = drop_small_components(keep_largest(label, regions, largest), regions, smallest or {})
    return drop_small_et(label, min_et)
