"""Prediction with one trained network or an ensemble, used from Python and by ``python -m xdim_jax.predict``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base import log
from xdim_jax.base.bucket import is_address
from xdim_jax.base.config import differences
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import read_json
from xdim_jax.base.problem import data_error, errors
from xdim_jax.data.case import Case, Dataset, Volume, without_label
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.data.images.grid import Grid
from xdim_jax.data.images.nifti import SUFFIXES, write_volume
from xdim_jax.data.prepare import Prepared, prepare
from xdim_jax.data.reading import encode_label, load_case
from xdim_jax.inference import inputs
from xdim_jax.inference.arrays import array_case
from xdim_jax.inference.group import common_digest, common_postprocessing, divide, load_group, segment_with_groups
from xdim_jax.inference.output import make_output, postprocess
from xdim_jax.inference.settings import ResolvedSettings, Settings
from xdim_jax.inference.sliding_window import Sink
from xdim_jax.runs.workdir import DATA_FILE, find_members, read_config
from xdim_jax.scoring.rules import EXTRA_OUTPUTS

# config keys whose values must be the same for all networks of an ensemble
_COMMON = (
    "output",
    "predict.threshold",
    "predict.min_et",
    "data.dataset",
    "data.convention",
    "data.phase",
    "model.in_channels",
    "model.out_channels",
)

Paths = str | Path | Sequence[str | Path]


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The segmentation of an image.

    Arrays have the spatial axes of the image if it was an array, and the axes (D, H, W) if it was read from files.

    Attributes:
        label: Label values, in the convention of the data set.
        names: Names of the channels of ``probabilities``: regions, or labels.
        probabilities: float32, with the channels as last axis; None if the setting ``probabilities`` is False.
        uncertainty: Variance of the probabilities over networks and test-time flips, averaged over channels, float32;
            None if the setting ``uncertainty`` is False.
        grid: Voxel grid of the files; None for an array.
    """

    label: np.ndarray
    names: tuple[str, ...]
    probabilities: np.ndarray | None
    uncertainty: np.ndarray | None
    grid: Grid | None = None

    def save(self, path: str | Path) -> None:
        """Write the label map as NIfTI on the grid of the image, with its affine and header.

        Raises:
            UserError: The image was an array; or the file cannot be written.
        """
        if self.grid is None:
            raise UserError(
                f"{path}: the image was an array, and only files have a header to copy; predict from a file"
            )
        if not str(path).endswith(SUFFIXES):
            raise UserError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
        write_volume(Path(path), self.label, self.grid, f"{inputs.PREDICTION_MARK} Segmentation.save")


class Predictor:
    """Segments images with a trained network, or with several networks whose probabilities are averaged.

    The networks may differ in architecture, patch and preparation, and may be 2D and 3D; their probabilities are then
    averaged on the voxel grid of the image.

    Args:
        workdir: Workdir of a run or of a cross-validation (all its folds), or several of them.
        settings: Settings of the prediction; None to give the attributes of `Settings` as keyword arguments.
        convention: Convention of the file names and label values of BraTS input; empty for that of the training data.

    Attributes:
        workdirs: Workdirs of the networks.
        sources: For each network, a line of text with its workdir and checkpoint.
        groups: Groups of networks that one program can evaluate, see `xdim_jax.inference.group.Group`.
        dataset: Data set on which the networks were trained.
        extra_outputs: Names of the outputs in addition to labels: ``probabilities``, ``uncertainty``.
        digest: Hexadecimal digest of the weights and of all settings that affect predictions.

    Raises:
        UserError: There is no such run, the runs cannot be an ensemble, or a setting cannot be used.
    """

    def __init__(
        self,
        workdir: Paths,
        settings: Settings | None = None,
        *,
        convention: str = "",
        **keywords: Any,
    ):
        if settings is not None and keywords:
            raise UserError(f"settings and {', '.join(keywords)} were given; put all of them into the settings")
        self.workdirs = find_members(_as_paths(workdir))
        self.settings = settings or Settings(**keywords)
        configs = [read_config(w) for w in self.workdirs]
        _warn_of_missing_folds(_as_paths(workdir), self.workdirs, configs)
        _check_common(self.workdirs, configs, self.settings)
        config = configs[0]
        self.dataset = _dataset(config, self.workdirs[0], convention)
        self.output = make_output(config.output, self.dataset)
        if convention and len(self.output.channels) != config.model.out_channels:
            raise UserError(
                f"--convention={convention} has the regions {', '.join(self.output.channels)}, but the network of "
                f"{self.workdirs[0]} has {config.model.out_channels} output channels; give the convention of its "
                f"training, {config.data.get('convention', '')}, or one with the same regions"
            )
        names = frozenset(name for name in EXTRA_OUTPUTS if getattr(self.settings, name))
        self.extra_outputs = names
        divided = divide(self.workdirs, configs)
        several = frozenset({"probabilities"}) if len(divided) > 1 else frozenset()
        chosen = common_postprocessing(self.workdirs, self.settings)
        self.groups = [
            load_group(w, first, self.output, self.settings, names | several, chosen) for w, first in divided
        ]
        if self.settings.uncertainty and len(self.workdirs) == 1 and not self.resolved.flips:
            raise UserError(
                "--uncertainty is the variance over networks and test-time flips: give several --workdir, --flips, or "
                "--preset=best for a run that was trained with flips"
            )
        known = {workdir: source for group in self.groups for workdir, source in group.sources.items()}
        self.sources = [f"{workdir}, {known[workdir]}" for workdir in self.workdirs]
        self.digest = common_digest(self.groups)

    @property
    def resolved(self) -> ResolvedSettings:
        """Settings of the first group. Overlap, flips and precision of other groups may differ."""
        return self.groups[0].resolved

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels of the probabilities."""
        return self.output.channels

    def find_cases(
        self, paths: Paths, modality: str = "", series: Sequence[str] = (), output: Path | None = None
    ) -> tuple[list[Case], dict[str, list[str]]]:
        """Find the cases in the given paths, see `xdim_jax.inference.inputs.find_cases`."""
        return inputs.find_cases(self.dataset, _as_paths(paths), modality=modality, series=series, output=output)

    def prepare(self, case: Case, volume: Volume) -> list[Prepared]:
        """Prepare a case for each group, as the training cases of the group were prepared."""
        return [prepare(case, volume, group.preparation) for group in self.groups]

    def segment(self, prepared: Sequence[Prepared], grid: Grid, sink: Sink | None = None) -> np.ndarray:
        """Return label indices uint8 (D, H, W) on the source grid, after post-processing.

        Args:
            prepared: Result of `prepare`.
            grid: Source grid.
            sink: Function that receives `extra_outputs`, if there are any. With one group and a softmax, it first
                receives the voxels outside of the box to which preparation cropped, as background with probability 1.

        Raises:
            UserError: The network has computed NaN or infinity.
        """
        if len(self.groups) == 1:
            group = self.groups[0]
            if sink is not None and "probabilities" in self.extra_outputs and self.output.activation == "softmax":
                _fill_background(sink, prepared[0], len(self.names))
            label = group.segmenter(group.weights, prepared[0], sink)
        else:
            label = segment_with_groups(self.groups, self.output, prepared, sink, self.extra_outputs)
        return self.postprocess(label, grid.voxel_volume)

    def postprocess(self, label: np.ndarray, voxel: float) -> np.ndarray:
        """Return a label map after post-processing.

        Args:
            label: Label indices (D, H, W).
            voxel: Volume of a voxel in ml.
        """
        resolved = self.resolved
        smallest = {name: math.ceil(volume / voxel - 1e-6) for name, volume in resolved.min_volume.items()}
        return postprocess(
            label, self.output.regions, largest=resolved.largest, smallest=smallest, min_et=resolved.min_et
        )

    def predict_case(self, case: Case) -> Segmentation:
        """Read and segment a case. Arrays are (D, H, W), see `xdim_jax.data.images.grid`.

        Raises:
            DataError: The case cannot be read.
        """
        return self._segment_volume(case, read_image(case))

    def predict(
        self,
        image: Any,
        axes: str = "zyxc",
        spacing: Sequence[float] | None = None,
        *,
        affine: np.ndarray | None = None,
        modality: str = "",
    ) -> Segmentation:
        """Segment an array, or one case on disk.

        Args:
            image: A file, the files of one case (one per channel), a case folder, or a folder of DICOM slices; or an
                array with the axes, in any order, ``z`` (towards superior), ``y`` (towards posterior; in 2D images
                down), ``x`` (towards the patient's left; in 2D images to the right) and ``c`` (channels, in the order
                of training).
            axes: Names of the axes of an array. An array without ``c`` has one channel; one without ``z`` is one slice.
            spacing: Voxel size of an array in mm, along its spatial axes in the order of ``axes``; None for 1 mm.
            affine: Affine from voxel indices (x, y, z) of an array to mm in the RAS+ frame, as in a NIfTI file. It
                replaces ``spacing`` and the directions above.
            modality: CT or MR. Needed if the network was trained on both.

        Returns:
            The segmentation, see `Segmentation` for the order of its axes.

        Raises:
            UserError: Axes, spacing or channels do not fit, files cannot be read, or there are several cases.
        """
        several = isinstance(image, list | tuple) and image and all(isinstance(p, str | Path) for p in image)
        if isinstance(image, str | Path) or several:
            if axes != "zyxc" or spacing is not None or affine is not None:
                raise UserError(f"{image}: axes, spacing and affine can be given for arrays only; files have their own")
            return self.predict_case(self._find_one_case(image, modality))
        converted = array_case(np.asarray(image), axes, spacing, affine, self.dataset, modality)
        found = self._segment_volume(converted.case, converted.volume)
        return Segmentation(
            converted.restore(found.label),
            found.names,
            None if found.probabilities is None else converted.restore(found.probabilities),
            None if found.uncertainty is None else converted.restore(found.uncertainty),
        )

    def _find_one_case(self, paths: Paths, modality: str) -> Case:
        """Return the only case in the given paths. Raises UserError if there is not exactly one, or any problem."""
        cases, problems = self.find_cases(paths, modality)
        if problems:
            raise UserError("\n".join(line for lines in problems.values() for line in lines))
        if len(cases) != 1:
            ids = shorten([case.case_id for case in cases])
            raise UserError(
                f"{paths} has {len(cases)} cases ({ids}), expected one; use find_cases() and predict_case()"
            )
        return cases[0]

    def _segment_volume(self, case: Case, volume: Volume) -> Segmentation:
        """Segment a case that has been read."""
        prepared = self.prepare(case, volume)
        collected = _Collector(volume.image.shape[:3])
        label = encode_label(case, self.segment(prepared, volume.grid, collected))
        return Segmentation(
            label, self.names, collected.get("probabilities"), collected.get("uncertainty"), volume.grid
        )


def read_image(case: Case) -> Volume:
    """Read the image of a case, without its reference, and log warnings about its files.

    Raises:
        DataError: The image cannot be used.
    """
    volume, problems = load_case(without_label(case))
    if volume is None or errors(problems):
        raise data_error(*errors(problems), summary=f"problems in case {case.case_id}")
    for problem in problems:
        log.warn(str(problem))
    return volume


def _fill_background(sink: Sink, prepared: Prepared, channels: int) -> None:
    """Send a probability of 1 for the background of all voxels to a sink, if preparation has cropped the case."""
    depth, height, width = prepared.source
    if all(b.stop - b.start == n for b, n in zip(prepared.box, prepared.source, strict=True)):
        return
    background = np.zeros((1, height, width, channels), np.float32)
    background[..., 0] = 1
    for index in range(depth):
        sink(slice(index, index + 1), (slice(0, height), slice(0, width)), {"probabilities": background})


class _Collector(dict[str, np.ndarray]):
    """A sink that collects all slices in float32 arrays on the source grid; voxels that it does not receive are 0."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)

    def __call__(self, slices: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        for name, part in values.items():
            if name not in self:
                self[name] = np.zeros((*self.shape, *part.shape[3:]), np.float32)
            self[name][(slices, *box)] = part


def _as_paths(paths: Paths) -> list[Path]:
    """Return one or several paths as a list. Raises UserError if one of them is empty or an address in a bucket."""
    several = [paths] if isinstance(paths, str | Path) else list(paths)
    if "" in several:
        raise UserError("a path is empty; expected a file or a folder")
    if addresses := [str(p) for p in several if is_address(p)]:
        raise UserError(
            f"{shorten(addresses)}: expected a local path; python -m xdim_jax.predict downloads a --workdir"
        )
    return [Path(p) for p in several]


def _warn_of_missing_folds(given: Sequence[Path], workdirs: Sequence[Path], configs: Sequence[Any]) -> None:
    """Warn if a workdir of a cross-validation lacks folds."""
    for workdir in given:
        folds = [c.data for w, c in zip(workdirs, configs, strict=True) if w.parent == workdir]
        if folds and len(folds) < folds[0].get("folds", 0) and folds[0].get("split") == "folds":
            log.warn(
                f"{workdir} has {len(folds)} of {folds[0].folds} folds; the ensemble consists of these networks only"
            )


def _check_common(workdirs: Sequence[Path], configs: Sequence[Any], settings: Settings) -> None:
    """Raise UserError if the runs differ in the config values of `_COMMON`, or in channels, labels or regions.

    A value may differ if ``settings`` gives it. With a softmax, the threshold may differ, because it is not used. The
    name of the labels may differ, because it can be the name of the folder of the data.
    """
    problems = []
    given = {"predict.min_et"} if settings.min_et is not None else set()
    described = [read_json(w / DATA_FILE) for w in workdirs]
    names = described[0].get("regions", {}).keys()
    for_all = not isinstance(settings.threshold, Mapping) or settings.threshold.keys() >= names
    if (settings.threshold is not None and for_all) or configs[0].output == "softmax":
        given.add("predict.threshold")
    for workdir, config in zip(workdirs[1:], configs[1:], strict=True):
        for key, a, b in differences(configs[0], config, ignored=()):
            if any(key == name or key.startswith(f"{name}.") for name in _COMMON if name not in given):
                flag = key.removeprefix("predict.")
                step = f"; give --{flag}" if flag != key else ""
                problems.append(f"{key}: {a!r} in {workdirs[0]}, {b!r} in {workdir}{step}")
    for data in described:
        if isinstance(labels := data.get("labels"), dict):
            labels.pop("name", None)
        if isinstance(regions := data.get("regions"), dict) and configs[0].output == "sigmoid":
            data["regions"] = list(regions.items())  # in the order of the channels of the network
    for workdir, other in zip(workdirs[1:], described[1:], strict=True):
        if different := [k for k in ("channels", "labels", "regions") if described[0].get(k) != other.get(k)]:
            problems.append(f"{', '.join(different)} of the data differ between {workdirs[0]} and {workdir}")
    if problems:
        raise UserError("the runs cannot be an ensemble:\n  - " + "\n  - ".join(problems))


def _dataset(config: Any, workdir: Path, convention: str) -> Dataset:
    """Return the data set on which a run was trained, with another convention if one is given."""
    data = config.data.to_dict()
    if convention:
        if "convention" not in data:
            raise UserError(f"--convention is for BraTS data, but the network was trained on {data['dataset']}")
        data["convention"] = convention
    return trained_dataset(data, read_json(workdir / DATA_FILE))
