"""Groups of networks that one program can evaluate, and the average of the probabilities of several groups."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xdim_jax import ops
from xdim_jax.base.errors import UserError
from xdim_jax.data.case import Dataset
from xdim_jax.data.prepare import Preparation, Prepared
from xdim_jax.inference.output import Output
from xdim_jax.inference.settings import (
    POSTPROCESSING_FILE,
    PostProcessing,
    ResolvedSettings,
    Settings,
    read_postprocessing,
    resolve,
    without_given,
)
from xdim_jax.inference.sliding_window import Segmenter, Sink, all_flips, make_segmenter
from xdim_jax.nets import networks
from xdim_jax.nets.functional import PRECISIONS, make_forward, split_model
from xdim_jax.runs import checkpoint
from xdim_jax.runs.workdir import read_config

_MAX_SIZES = 16  # number of sizes of images for which programs are kept: each needs some MiB of memory


@dataclasses.dataclass(frozen=True)
class Group:
    """Networks with the same architecture, patch, preparation, precision and defaults of prediction.

    Attributes:
        config: Config of the first network.
        resolved: Settings of the prediction.
        preparation: How cases are prepared.
        segmenter: Function that segments prepared cases.
        weights: Weights of the network; for several networks, stacked along a new first axis.
        members: Number of networks.
        sources: For each network, its workdir and a text that names its checkpoint.
        digest: Hexadecimal digest of the weights and of all settings that affect predictions.
    """

    config: Any
    resolved: ResolvedSettings
    preparation: Preparation
    segmenter: Segmenter
    weights: Any
    members: int
    sources: dict[Path, str]
    digest: str

    def describe(self) -> str:
        """Return a line of text about windows, test-time flips and the number of networks."""
        patch = " x ".join(map(str, self.config.data.patch))
        axes = ", ".join("DHW"[a] for a in self.resolved.flips)
        windows = self.segmenter.windows
        count = f"up to {windows.patch[0]} slices" if windows.slices else str(windows.batch)
        parts = [
            f"windows of {patch}, overlap {self.resolved.overlap:g}, {count} at once",
            f"flipped along {axes}" if axes else "not flipped",
            f"{self.members} networks" if self.members > 1 else "1 network",
        ]
        return "; ".join(parts)


def divide(workdirs: Sequence[Path], configs: Sequence[Any]) -> list[tuple[list[Path], Any]]:
    """Divide networks into groups that one program can evaluate.

    Args:
        workdirs: Workdirs of the networks.
        configs: Their configs.

    Returns:
        For each group, its workdirs and the config of its first network, in the order of the workdirs.
    """
    groups: dict[str, tuple[list[Path], Any]] = {}
    for workdir, config in zip(workdirs, configs, strict=True):
        sections = {"model": config.model, "predict": config.predict, "prepare": config.data.prepare}
        values = {name: section.to_dict() for name, section in sections.items()} | {
            "patch": list(config.data.patch),
            "precision": config.train.precision,
            "flip": list(config.augment.flip.axes) if config.augment.flip.p > 0 else [],
        }
        groups.setdefault(json.dumps(values, sort_keys=True, default=str), ([], config))[0].append(workdir)
    return list(groups.values())


def load_group(
    workdirs: Sequence[Path],
    config: Any,
    output: Output,
    settings: Settings,
    extra_outputs: frozenset[str],
    chosen: PostProcessing,
) -> Group:
    """Load the networks of a group.

    Args:
        workdirs: Workdirs of the networks.
        config: Config of the first network.
        output: Meaning of the channels.
        settings: Settings that the user gave.
        extra_outputs: See `xdim_jax.inference.sliding_window.Segmenter`.
        chosen: Post-processing that was chosen for the runs by cross-validation.

    Raises:
        UserError: A workdir has no weights, or a setting cannot be used.
    """
    resolved = resolve(settings, config, output.regions, chosen)
    graphdef, params, stats = split_model(networks.build(config.model, seed=0))
    loaded = [checkpoint.load_weights(w, params, stats) for w in workdirs]
    members = [(params, stats) for params, stats, _ in loaded]
    segmenter = make_segmenter(
        ops.with_implementation(
            config.train.get("ops", "auto"), make_forward(graphdef, PRECISIONS[resolved.precision])
        ),
        output,
        config.data.patch,
        resolved.overlap,
        batch=settings.batch or (1 if jax.default_backend() == "cpu" else 4),
        flips=all_flips(resolved.flips),
        threshold=resolved.threshold,
        members=len(members) if len(members) > 1 else 0,
        extra_outputs=extra_outputs,
    )
    segmenter.max_sizes, segmenter.require_finite = _MAX_SIZES, True
    return Group(
        config,
        resolved,
        Preparation.from_config(config.data.prepare.to_dict()),
        segmenter,
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *members) if len(members) > 1 else members[0],
        len(members),
        {workdir: source for workdir, (_, _, source) in zip(workdirs, loaded, strict=True)},
        weights_digest(config, members, resolved),
    )


def common_postprocessing(workdirs: Sequence[Path], settings: Settings) -> PostProcessing:
    """Return the post-processing that cross-validation chose for the runs.

    Raises:
        UserError: It differs between the runs in a value that ``settings`` does not give.
    """
    found = [read_postprocessing(workdir) for workdir in workdirs]
    used = [without_given(chosen, settings) for chosen in found]
    for workdir, other in zip(workdirs[1:], used[1:], strict=True):
        keys = [f.name for f in dataclasses.fields(other) if getattr(other, f.name) != getattr(used[0], f.name)]
        if keys:
            raise UserError(
                f"{POSTPROCESSING_FILE} differs between {workdirs[0]} and {workdir} in {', '.join(keys)}; give "
                f"{' and '.join(f'--{key}' for key in keys)} for the ensemble"
            )
    return found[0]


def network_digest(workdir: Path, dataset: Dataset) -> str:
    """Return a digest of the weights and the config of a run, without the post-processing that was chosen for it."""
    config = read_config(workdir)
    _, params, stats = split_model(networks.build(config.model, seed=0))
    params, stats, _ = checkpoint.load_weights(workdir, params, stats)
    return weights_digest(config, [(params, stats)], resolve(Settings(), config, dataset.regions))


def weights_digest(config: Any, members: Sequence[Any], resolved: ResolvedSettings) -> str:
    """Return a hexadecimal digest of the weights of networks and of all settings that affect predictions.

    Args:
        config: Config of the networks.
        members: For each network, its parameters and statistics.
        resolved: Settings of the prediction.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(members):
        digest.update(np.asarray(leaf).tobytes())
    facts = {
        "model": config.model.to_dict(),
        "output": config.output,
        "prepare": config.data.prepare.to_dict(),
        "predict": resolved.predict,
        "patch": list(config.data.patch),
        "rest": [resolved.threshold, sorted(resolved.largest), resolved.precision, resolved.flips],
    }
    if len(config.data.patch) == 2:
        # earlier versions also applied Gaussian weights along D, so their predictions must have another digest
        facts["blending"] = "in the plane"
    if resolved.min_volume:
        facts["min_volume"] = resolved.min_volume
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def common_digest(groups: Sequence[Group]) -> str:
    """Return the digest of all groups."""
    if len(groups) == 1:
        return groups[0].digest
    return hashlib.sha256(" ".join(group.digest for group in groups).encode()).hexdigest()[:16]


def segment_with_groups(
    groups: Sequence[Group],
    output: Output,
    prepared: Sequence[Prepared],
    sink: Sink | None = None,
    extra_outputs: frozenset[str] = frozenset(),
) -> np.ndarray:
    """Segment a case with several groups, whose probabilities are averaged on the source grid.

    Every network has the same weight. The probabilities of all voxels are kept in memory.

    Args:
        groups: Groups. Their segmenters must compute ``probabilities`` and all outputs in ``extra_outputs``.
        output: Meaning of the channels.
        prepared: For each group, the case as the group prepares it.
        sink: Function that receives the extra outputs, slice by slice.
        extra_outputs: Names of the values that the sink receives: ``probabilities``, ``uncertainty``.

    Returns:
        Label indices uint8 (D, H, W) on the source grid.
    """
    average = _Average(output, prepared[0].source, uncertainty="uncertainty" in extra_outputs)
    networks_in_all = sum(group.members for group in groups)
    for group, own in zip(groups, prepared, strict=True):
        average.share = group.members / networks_in_all
        average.add_outside(own.box)
        group.segmenter(group.weights, own, average)
    label = np.empty(prepared[0].source, np.uint8)
    plane = (slice(0, label.shape[1]), slice(0, label.shape[2]))
    for index in range(len(label)):
        part = slice(index, index + 1)
        label[part] = output.decode(average.mean[part], groups[0].resolved.threshold)
        if sink is not None and extra_outputs:
            values = {"probabilities": average.mean[part]} if "probabilities" in extra_outputs else {}
            if average.second is not None:
                spread = average.second[part] - np.square(average.mean[part]).mean(-1)
                values["uncertainty"] = np.maximum(spread, 0)
            sink(part, plane, values)
    return label


class _Average:
    """A sink that adds up probabilities, and their second moments averaged over channels if uncertainty is needed.

    Attributes:
        share: Weight of the group whose probabilities are being added.
        mean: Running sum of the weighted probabilities, float32 (D, H, W, channels).
        second: Running sum of the weighted second moments, float32 (D, H, W); None if they are not needed.
    """

    def __init__(self, output: Output, shape: Sequence[int], *, uncertainty: bool):
        self.share = 0.0
        self.mean = np.zeros((*shape, len(output.channels)), np.float32)
        self.second = np.zeros(tuple(shape), np.float32) if uncertainty else None
        self._background = output.activation == "softmax"

    def add_outside(self, box: Sequence[slice]) -> None:
        """Add the probabilities outside of the box to which preparation cropped: 1 for the background of a softmax."""
        if not self._background:
            return
        outside = np.ones(self.mean.shape[:3], np.float32)
        outside[tuple(box)] = 0
        self.mean[..., 0] += self.share * outside
        if self.second is not None:
            self.second += self.share * outside / self.mean.shape[-1]

    def __call__(self, slices: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        part = (slices, *box)
        self.mean[part] += self.share * values["probabilities"]
        if self.second is not None:
            squares = np.square(values["probabilities"]).mean(-1)
            self.second[part] += self.share * (squares + values["uncertainty"])
