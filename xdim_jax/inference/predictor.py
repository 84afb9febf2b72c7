"""Prediction with trained networks, alone or as an ensemble, from Python and for ``python -m xdim_jax.predict``."""

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
from xdim_jax.base.config import differences
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import read_json
from xdim_jax.data import regions
from xdim_jax.data.case import Case, Dataset, Volume, encode_label, read_case, without_label
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.data.images.grid import Grid
from xdim_jax.data.images.nifti import SUFFIXES, write_volume
from xdim_jax.data.prepare import Preparation, Prepared, prepare
from xdim_jax.inference import inputs, sliding_window
from xdim_jax.inference.output import make_output
from xdim_jax.nets import networks
from xdim_jax.nets.functional import PRECISIONS, make_forward, split_model
from xdim_jax.runs import checkpoint
from xdim_jax.runs.workdir import DATA_FILE, find_members, read_config
from xdim_jax.scoring.rules import EXTRA_OUTPUTS

PRESETS = ("fast", "default", "best")
_FAST_OVERLAP, _BEST_OVERLAP = 0.25, 0.5
# what members of an ensemble must have in common
_COMMON = ("model", "output", "predict", "data.dataset", "data.patch", "data.prepare", "data.convention", "data.phase")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a prediction.

    Attributes:
        preset: ``fast``: little overlap. ``default``: the overlap of the config. ``best``: windows overlap by half, and
            are mirrored along the axes along which training has mirrored them. (Mirrored anatomy that a network has
            never been trained on makes predictions worse.)
        overlap: Overlap of windows, in [0, 1); None for that of the preset.
        flips: Axes (0: D, 1: H, 2: W) along which windows are mirrored, in all combinations; None for those of the
            preset.
        precision: ``float32`` or ``bfloat16``; empty for that of the config.
        batch: Number of windows that are computed at once; 0 for one on CPU and four on other devices.
        threshold: Threshold of the probabilities, for all regions or by region; None for that of the config.
        min_et: Smallest enhancing tumour in voxels (BraTS); None for that of the config.
        largest: Regions of which only the largest connected component is kept; ``("all",)`` for all regions.
        probabilities, uncertainty: True to compute them in addition to labels.
    """

    preset: str = "default"
    overlap: float | None = None
    flips: tuple[int, ...] | None = None
    precision: str = ""
    batch: int = 0
    threshold: float | Mapping[str, float] | None = None
    min_et: int | None = None
    largest: tuple[str, ...] = ()
    probabilities: bool = False
    uncertainty: bool = False

    def __post_init__(self) -> None:
        """Accept a single name or axis in place of a tuple."""
        if isinstance(self.largest, str):
            object.__setattr__(self, "largest", (self.largest,) if self.largest else ())
        if isinstance(self.flips, int):
            object.__setattr__(self, "flips", (self.flips,))


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """What a network makes of an image: of an array with the array's axes, of files as (D, H, W).

    Attributes:
        label: values of the data set's convention.
        names: of ``probabilities``' last axis: regions, or labels.
        probabilities: float32 with a last axis of channels, or None.
        uncertainty: variance of the probabilities over networks and mirror images, mean over channels; or None.
        grid: of files: where the voxels lie.
    """

    label: np.ndarray
    names: tuple[str, ...]
    probabilities: np.ndarray | None
    uncertainty: np.ndarray | None
    grid: Grid | None = None

    def save(self, path: str | Path) -> None:
        """Writes the label map as NIfTI on the grid of the image, with its affine and header.

        Raises:
            UserError: it was made of an array, whose place is not known; or the file cannot be written.
        """
        if self.grid is None:
            raise UserError(f"{path}: made of an array, whose place in space is not known; predict a file, or save it")
        if not str(path).endswith(SUFFIXES):
            raise UserError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
        write_volume(Path(path), self.label, self.grid)


class Predictor:
    """Segments images with a trained network, or with several whose probabilities are averaged.

    Args:
        workdir: of a run, of a cross-validation (all its folds), or several of either.
        settings: how to predict; keywords of `Settings` may be given instead.
        convention: of BraTS input; empty: the training data's.

    Raises:
        UserError: no such run, runs that do not go together, or settings that cannot be.
    """

    def __init__(
        self,
        workdir: str | Path | Sequence[str | Path],
        settings: Settings | None = None,
        *,
        convention: str = "",
        **keywords: Any,
    ):
        several = [workdir] if isinstance(workdir, str | Path) else list(workdir)
        if settings is not None and keywords:
            raise UserError(f"settings and {', '.join(keywords)} were given: put them into the settings")
        self.workdirs = find_members([Path(w) for w in several])
        self.settings = settings or Settings(**keywords)
        configs = [read_config(w) for w in self.workdirs]
        _check_common(self.workdirs, configs)
        self.config = config = configs[0]
        self.dataset = _dataset(config, self.workdirs[0], convention)
        threshold = _apply(config, self.settings, self.dataset)
        self.output = make_output(config.output, self.dataset)
        graphdef, params, stats = split_model(networks.build(config.model, seed=0))
        loaded = [checkpoint.load_weights(w, params, stats) for w in self.workdirs]
        self.sources = [f"{w}, {source}" for w, (_, _, source) in zip(self.workdirs, loaded, strict=True)]
        members = [(p, s) for p, s, _ in loaded]
        self.weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members) if len(members) > 1 else members[0]
        self.flips = _flips(config, self.settings)
        self.digest = _digest(config, members, threshold, self.settings, self.flips)
        if self.settings.uncertainty and len(members) * 2 ** len(self.flips) == 1:
            raise UserError(
                "--uncertainty is the variance over networks and mirror images: give several --workdir, --flips, or "
                "--preset=best for a run that was trained on mirror images"
            )
        precision = PRECISIONS[self.settings.precision or config.train.precision]
        self.segmenter = sliding_window.make_segmenter(
            config,
            ops.in_form(config.train.get("ops", "auto"), make_forward(graphdef, precision)),
            self.output,
            batch=self.settings.batch or (1 if jax.default_backend() == "cpu" else 4),
            flips=sliding_window.all_flips(self.flips),
            threshold=threshold,
            members=len(members) if len(members) > 1 else 0,
            want=frozenset(name for name in EXTRA_OUTPUTS if getattr(self.settings, name)),
        )
        self.preparation = Preparation.from_config(config.data.prepare.to_dict())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels of the probabilities."""
        return self.output.channels

    def describe(self) -> str:
        """Return a line of text that says how images are predicted."""
        windows = self.segmenter.windows
        patch = " x ".join(map(str, self.config.data.patch))
        axes = ", ".join("DHW"[a] for a in self.flips)
        parts = [f"windows of {patch}, overlap {self.config.predict.overlap:g}, {windows.batch} at once"]
        parts.append(f"mirrored along {axes}" if axes else "not mirrored")
        parts.append(f"{len(self.workdirs)} networks" if len(self.workdirs) > 1 else "1 network")
        return "; ".join(parts)

    def prepare(self, case: Case, volume: Volume) -> Prepared:
        """Return a case as it is given to the networks."""
        return prepare(case, volume, self.preparation)

    def segment(self, prepared: Prepared, sink: sliding_window.Sink | None = None) -> np.ndarray:
        """Return label indices uint8 (D, H, W) on the source grid, after post-processing."""
        label = self.segmenter(self.weights, prepared, sink)
        sets = self.output.regions
        largest = sets.names if "all" in self.settings.largest else self.settings.largest
        return sliding_window.finish_label(regions.keep_largest(label, sets, largest), self.config.predict)

    def predict_case(self, case: Case) -> Segmentation:
        """Reads and segments a case; arrays come as (D, H, W) in memory's orientation.

        Raises:
            DataError: the case cannot be read.
        """
        volume = read_case(without_label(case))
        prepared = self.prepare(case, volume)
        found = _Whole(prepared)
        values = encode_label(case, self.segment(prepared, found))
        return Segmentation(values, self.names, found.get("probabilities"), found.get("uncertainty"), volume.grid)

    def find_cases(
        self, paths: str | Path | Sequence[str | Path], modality: str = ""
    ) -> tuple[list[Case], dict[str, list[str]]]:
        """The cases of a path, or of the files of one case, and what is wrong with others; see `inputs.find_cases`."""
        several = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
        return inputs.find_cases(self.dataset, several, modality=modality)

    def _only_case(self, paths: str | Path | Sequence[str | Path], modality: str) -> Case:
        cases, problems = self.find_cases(paths, modality)
        if problems:
            raise UserError("\n".join(line for lines in problems.values() for line in lines))
        if len(cases) != 1:
            ids = shorten([case.case_id for case in cases])
            raise UserError(f"{paths} holds {len(cases)} cases ({ids}): give one, or predict_case each of find_cases()")
        return cases[0]

    def predict(
        self,
        image: Any,
        axes: str = "zyxc",
        spacing: Sequence[float] | None = None,
        *,
        affine: np.ndarray | None = None,
        modality: str = "",
    ) -> Segmentation:
        """Segments an array, or one case on disk.

        Args:
            image: a file, the files of one case (one per channel), a case folder or one of DICOM slices; or an array in
                any order of the axes ``z`` (to superior), ``y`` (to posterior; of 2D images: down), ``x`` (to the
                patient's left; of 2D images: to the right) and ``c`` (channels, in the order of training).
            axes: names of the array's axes; without ``c`` there is one channel, without ``z`` one slice.
            spacing: mm along z, y, x, in the order of ``axes``; None: 1 mm.
            affine: instead of ``spacing``: of an array with the axes ``xyz`` or ``xyzc`` as a file has them, to RAS+
                mm; the array is turned as a file would be.
            modality: CT or MR, where training had both.

        Raises:
            UserError: axes, spacing or channels that do not fit; files that cannot be read, or several cases.
        """
        several = isinstance(image, list | tuple) and image and all(isinstance(p, str | Path) for p in image)
        if isinstance(image, str | Path) or several:
            if axes != "zyxc" or spacing is not None or affine is not None:
                raise UserError(f"{image}: axes, spacing and affine are of arrays; files have their own")
            return self.predict_case(self._only_case(image, modality))
        image = np.asarray(image)
        if image.dtype.kind not in "biuf":
            raise UserError(f"image holds {image.dtype}: expected an array of real numbers, or paths of images")
        spatial = [a for a in axes if a != "c"]
        if len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes) <= set("zyxc"):
            raise UserError(f"axes={axes!r}: expected y and x, and z and c where there are such axes, each once")
        if image.ndim != len(axes):
            raise UserError(f"image of shape {image.shape} has {image.ndim} axes, but axes={axes!r} names {len(axes)}")
        spacing = tuple(spacing) if spacing is not None else (1.0,) * len(spatial)
        if affine is None and (len(spacing) != len(spatial) or not all(s > 0 for s in spacing)):
            raise UserError(f"spacing={tuple(spacing)}: expected mm above 0 along {', '.join(spatial)}")
        array = image if "c" in axes else image[..., None]
        order = axes if "c" in axes else axes + "c"
        if "z" not in order:
            array, order = array[None], "z" + order
        channels = len(self.dataset.channels)
        if array.shape[order.index("c")] != channels:
            known = ", ".join(self.dataset.channels)
            raise UserError(
                f"image of shape {image.shape} has {array.shape[order.index('c')]} channels; expected {known}"
            )
        if not np.isfinite(image).all():
            raise UserError(f"image holds {np.count_nonzero(~np.isfinite(image))} NaN or infinite values; repair it")
        if self.dataset.holds_ct and modality not in ("CT", "MR"):
            raise UserError(f"modality={modality!r}: expected CT or MR; the network was trained on both")
        array = array.transpose([order.index(a) for a in "xyzc"])
        if affine is None:
            sizes = dict(zip(spatial, spacing, strict=True))
            affine = np.diag([-sizes["x"], -sizes["y"], sizes.get("z", 1.0), 1.0])  # LPS, as in memory
        grid = Grid(array.shape[:3], np.asarray(affine, np.float64), None, self.dataset.axes)
        info = {"modality": modality} if modality else {}
        case = Case(
            "array", "array", (), self.dataset.channels, None, self.dataset.labels, self.dataset.axes, info=info
        )
        volume = Volume("array", np.ascontiguousarray(grid.to_memory(array), np.float32), None, grid)
        prepared = self.prepare(case, volume)
        found = _Whole(prepared)
        label = encode_label(case, self.segment(prepared, found))
        back = [a for a in axes if a != "c"]

        def restore(values: np.ndarray) -> np.ndarray:
            more = values.shape[3:]
            parts = values.reshape(*values.shape[:3], -1)
            turned = np.stack([grid.to_file(parts[..., k]) for k in range(parts.shape[3])], -1)  # x, y, z
            turned = turned.transpose(*("xyz".index(a) for a in "zyx"), 3)
            turned = turned if "z" in axes else turned[0]
            names = "zyx" if "z" in axes else "yx"
            turned = turned.transpose(*(names.index(a) for a in back), len(back))
            return turned if more else turned[..., 0]

        probabilities, uncertainty = found.get("probabilities"), found.get("uncertainty")
        return Segmentation(
            restore(label),
            self.names,
            None if probabilities is None else restore(probabilities),
            None if uncertainty is None else restore(uncertainty),
        )


class _Whole(dict[str, np.ndarray]):
    """A sink that keeps all rows, in float32 arrays on the source grid; 0 outside of the box that preparation kept."""

    def __init__(self, prepared: Prepared):
        super().__init__()
        self.shape = tuple(prepared.source)

    def __call__(self, rows: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        for name, part in values.items():
            if name not in self:
                self[name] = np.zeros((*self.shape, *part.shape[3:]), np.float32)
            self[name][(rows, *box)] = part


def _digest(config: Any, members: Sequence[Any], threshold: Any, settings: Settings, flips: tuple[int, ...]) -> str:
    """Return a digest of everything but the image that a prediction depends on."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(members):
        digest.update(np.asarray(leaf).tobytes())
    facts = {
        "model": config.model.to_dict(),
        "output": config.output,
        "prepare": config.data.prepare.to_dict(),
        "predict": config.predict.to_dict(),
        "patch": list(config.data.patch),
        "rest": [threshold, sorted(settings.largest), settings.precision or config.train.precision, flips],
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _check_common(workdirs: Sequence[Path], configs: Sequence[Any]) -> None:
    problems = []
    for workdir, config in zip(workdirs[1:], configs[1:], strict=True):
        for key, a, b in differences(configs[0], config, free=()):
            if any(key == name or key.startswith(f"{name}.") for name in _COMMON):
                problems.append(f"{key}: {a!r} in {workdirs[0]}, {b!r} in {workdir}")
    described = [read_json(w / DATA_FILE) for w in workdirs]
    for workdir, other in zip(workdirs[1:], described[1:], strict=True):
        if apart := [k for k in ("channels", "labels", "regions") if described[0].get(k) != other.get(k)]:
            problems.append(f"{', '.join(apart)} of the data differ between {workdirs[0]} and {workdir}")
    if problems:
        raise UserError("the runs cannot be an ensemble:\n  - " + "\n  - ".join(problems))


def _dataset(config: Any, workdir: Path, convention: str) -> Dataset:
    data = config.data.to_dict()
    if convention:
        if "convention" not in data:
            raise UserError(f"--convention is of BraTS, but the network was trained on {data['dataset']}")
        data["convention"] = convention
    return trained_dataset(data, read_json(workdir / DATA_FILE))


def _apply(config: Any, settings: Settings, dataset: Dataset) -> float | dict[str, float]:
    """Writes the settings into the config's ``predict`` section, but for the threshold, which is returned.

    Raises:
        UserError: what cannot be.
    """
    if settings.preset not in PRESETS:
        raise UserError(f"--preset={settings.preset}: expected one of {', '.join(PRESETS)}")
    if settings.precision and settings.precision not in PRECISIONS:
        raise UserError(f"--precision={settings.precision}: expected one of {', '.join(PRECISIONS)}")
    if settings.preset != "default":
        config.predict.overlap = _FAST_OVERLAP if settings.preset == "fast" else _BEST_OVERLAP
    if settings.overlap is not None:
        config.predict.overlap = settings.overlap
    if not 0 <= config.predict.overlap < 1:
        raise UserError(f"--overlap={config.predict.overlap}: expected 0 <= overlap < 1")
    if settings.batch < 0:
        raise UserError(f"--batch={settings.batch}: expected 1 or more windows, or 0")
    if settings.min_et is not None:
        if "min_et" not in config.predict:
            raise UserError(f"--min_et is not a setting of this run's data set, {config.data.dataset}")
        config.predict.min_et = settings.min_et
    if config.predict.get("min_et", 0) < 0:
        raise UserError(f"--min_et={config.predict.min_et}: expected 0 or more voxels")
    names = dataset.regions.names
    if unknown := set(settings.largest) - {*names, "all"}:
        raise UserError(f"--largest: {', '.join(sorted(unknown))} unknown; the regions are {', '.join(names)}")
    if settings.threshold is not None:
        if config.output == "softmax":
            raise UserError("--threshold is for sigmoid outputs; this network has a softmax, whose largest label wins")
        given = settings.threshold
        limits = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, float(given))
        if unknown := set(limits) - set(names):
            raise UserError(f"--threshold: {', '.join(sorted(unknown))} unknown; the regions are {', '.join(names)}")
        if not all(0 < v < 1 for v in limits.values()):
            raise UserError(f"--threshold: {limits}: expected values between 0 and 1")
        return {name: limits.get(name, float(config.predict.threshold)) for name in names}
    return config.predict.threshold


def _flips(config: Any, settings: Settings) -> tuple[int, ...]:
    """Return the axes of a volume along which windows are mirrored; axes 0 and 1 of a 2D network are H and W."""
    flat = len(config.data.patch) == 2
    if settings.flips is not None:
        allowed = (1, 2) if flat else (0, 1, 2)
        if set(settings.flips) - set(allowed):
            known = ", ".join(f"{a} ({'DHW'[a]})" for a in allowed)
            raise UserError(f"--flips={settings.flips}: expected axes of {known}")
        return tuple(sorted(set(settings.flips)))
    trained = config.augment.flip
    if settings.preset != "best" or not trained.p:
        return ()
    return tuple(sorted(a + flat for a in trained.axes))
