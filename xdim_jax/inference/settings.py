"""Settings of a prediction, and the values that result from them and from the config of the run."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json
from xdim_jax.data.regions import Regions
from xdim_jax.nets.functional import PRECISIONS

POSTPROCESSING_FILE = "postprocessing.json"  # in the workdir of a run, see `read_postprocessing`
PRESETS = ("fast", "default", "best")
_OVERLAPS = {"fast": 0.25, "best": 0.5}  # preset -> overlap; the preset "default" uses the overlap of the config


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a prediction.

    Attributes:
        preset: ``fast``: overlap 0.25. ``default``: overlap as in the config. ``best``: overlap 0.5, and test-time
            flips along the axes along which augmentation flipped patches in training. (Flips along other axes make
            predictions worse, because the network has not been trained on such images.)
        overlap: Overlap of neighbouring windows, as a fraction in [0, 1); None for the overlap of the preset.
        flips: Axes (0: D, 1: H, 2: W) of the test-time flips, which are made in all combinations; None for the axes of
            the preset.
        precision: ``float32`` or ``bfloat16``; empty for the precision in the config.
        batch: Number of windows that are computed at once; 0 for one on CPU and four on other devices.
        threshold: Threshold of the probabilities, for all regions or by region; None for the thresholds that
            `xdim_jax.fit` chose for the run, otherwise that in the config.
        min_et: Smallest number of voxels of the enhancing tumour (BraTS); None for the value in the config.
        largest: Names of regions, ``("all",)``, or ``("none",)``. Of each of them, only the largest connected component
            is kept. Empty for the regions that ``python -m xdim_jax.fit`` has chosen for this run, if any.
        min_volume: Volume in ml of the smallest component that is kept, for all regions or by region; None for the
            volumes that ``python -m xdim_jax.fit`` has chosen for this run, if any.
        probabilities: True to compute the probabilities of all channels in addition to labels.
        uncertainty: True to compute the variance of the probabilities in addition to labels.
        compress: True to write probabilities and uncertainty as compressed files with 16 bits per voxel, rounded to
            multiples of 1 / 65535 and 0.25 / 65535. Arrays in memory are not rounded.
    """

    preset: str = "default"
    overlap: float | None = None
    flips: tuple[int, ...] | None = None
    precision: str = ""
    batch: int = 0
    threshold: float | Mapping[str, float] | None = None
    min_et: int | None = None
    largest: tuple[str, ...] = ()
    min_volume: float | Mapping[str, float] | None = None
    probabilities: bool = False
    uncertainty: bool = False
    compress: bool = False

    def __post_init__(self) -> None:
        """Accept a single name or axis in place of a tuple."""
        if isinstance(self.largest, str):
            object.__setattr__(self, "largest", (self.largest,) if self.largest else ())
        if isinstance(self.flips, int):
            object.__setattr__(self, "flips", (self.flips,))

    @property
    def min_volumes(self) -> Mapping[str, float] | None:
        """``min_volume`` by region; with the empty name for all regions."""
        return {"": float(self.min_volume)} if isinstance(self.min_volume, int | float) else self.min_volume


@dataclasses.dataclass(frozen=True)
class ResolvedSettings:
    """The values that a prediction uses.

    Attributes:
        predict: The ``predict`` section of the run's config, with the overlap and the ``min_et`` of the settings. It
            is written to ``predict.json``.
        threshold: Threshold of the probabilities, for all regions or by region; not used with softmax.
        flips: Axes of a volume (0: D, 1: H, 2: W) of the test-time flips.
        precision: ``float32`` or ``bfloat16``.
        largest: Names of regions. Of each of them, only the largest connected component is kept.
        min_volume: Name of a region -> volume in ml of the smallest component that is kept.
    """

    predict: dict[str, Any]
    threshold: float | dict[str, float]
    flips: tuple[int, ...]
    precision: str
    largest: tuple[str, ...]
    min_volume: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def overlap(self) -> float:
        """Overlap of windows, in [0, 1)."""
        return self.predict["overlap"]

    @property
    def min_et(self) -> int:
        """Smallest number of voxels of the enhancing tumour; 0 for no limit."""
        return self.predict.get("min_et", 0)


@dataclasses.dataclass(frozen=True)
class PostProcessing:
    """Post-processing that `xdim_jax.planning.postprocessing` has chosen for a run by cross-validation.

    Attributes:
        threshold: Name of a region -> threshold of its probabilities; empty for that of the config.
        largest: Names of regions. Of each of them, only the largest connected component is kept.
        min_volume: Name of a region -> volume in ml of the smallest component that is kept.
    """

    threshold: dict[str, float] = dataclasses.field(default_factory=dict)
    largest: tuple[str, ...] = ()
    min_volume: dict[str, float] = dataclasses.field(default_factory=dict)


def read_postprocessing(workdir: Path) -> PostProcessing:
    """Return the post-processing that was chosen for a run; an empty one if the workdir has no such file.

    Raises:
        UserError: The file cannot be used.
    """
    path = workdir / POSTPROCESSING_FILE
    if not path.is_file():
        return PostProcessing()
    try:
        values = read_json(path)["chosen"]
        return PostProcessing(
            {str(k): float(v) for k, v in values["threshold"].items()},
            tuple(map(str, values["largest"])),
            {str(k): float(v) for k, v in values["min_volume"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}); delete it, and run python -m xdim_jax.fit again") from error


def without_given(chosen: PostProcessing, settings: Settings) -> PostProcessing:
    """Return the chosen post-processing without the values that ``settings`` gives."""

    def rest(values: dict[str, float], given: Any) -> dict[str, float]:
        if given is None:
            return values
        return {k: v for k, v in values.items() if k not in given} if isinstance(given, Mapping) else {}

    min_volume = settings.min_volumes
    if min_volume is not None and (not min_volume or "" in min_volume):  # for all regions
        min_volume = dict.fromkeys(chosen.min_volume, 0.0)
    largest = () if settings.largest else chosen.largest
    return PostProcessing(rest(chosen.threshold, settings.threshold), largest, rest(chosen.min_volume, min_volume))


def resolve(
    settings: Settings, config: Any, regions: Regions, chosen: PostProcessing | None = None
) -> ResolvedSettings:
    """Check the settings of a prediction, and complete them by the defaults of a run.

    Args:
        settings: Settings that the user gave.
        config: Config of the run.
        regions: Regions of the data set.
        chosen: Post-processing that was chosen for the run; None for none.

    Raises:
        UserError: A value is out of range, or is not a setting of this network or data set.
    """
    if settings.preset not in PRESETS:
        raise UserError(f"--preset={settings.preset}: expected one of {', '.join(PRESETS)}")
    if settings.precision and settings.precision not in PRECISIONS:
        raise UserError(f"--precision={settings.precision}: expected one of {', '.join(PRECISIONS)}")
    if settings.batch < 0:
        raise UserError(f"--batch={settings.batch}: expected 1 or more windows, or 0 for the default")
    chosen = chosen or PostProcessing()
    chosen = without_given(chosen, settings)
    min_volume = {**chosen.min_volume, **(settings.min_volumes or {})}
    if "" in min_volume:  # one volume for all regions
        min_volume = dict.fromkeys(regions.names, min_volume[""])
    for flag, names in (("--largest", set(settings.largest) - {"all", "none"}), ("--min_volume", set(min_volume))):
        if unknown := names - set(regions.names):
            raise UserError(f"{flag}: {_names(unknown)} unknown; the regions are {', '.join(regions.names)}")
    if wrong := {name: v for name, v in min_volume.items() if not 0 <= v < math.inf}:
        raise UserError(f"--min_volume: {wrong}: expected 0 or more ml")
    if settings.compress and not (settings.probabilities or settings.uncertainty):
        raise UserError("--compress is for the files of --probabilities and --uncertainty; give one of them")
    predict = config.predict.to_dict()
    predict["overlap"] = _overlap(settings, predict["overlap"])
    if settings.min_et is not None:
        if "min_et" not in predict:
            raise UserError(f"--min_et is not a setting of this run's data set, {config.data.dataset}")
        predict["min_et"] = settings.min_et
    if predict.get("min_et", 0) and config.data.dataset != "brats":
        raise UserError(
            f"min_et={predict['min_et']} is a rule of the data set brats, and this run's data set is "
            f"{config.data.dataset}; give --min_et=0"
        )
    if predict.get("min_et", 0) < 0:
        raise UserError(f"--min_et={predict['min_et']}: expected 0 or more voxels")
    default = float(predict["threshold"])
    threshold: float | dict[str, float] = default
    if settings.threshold is not None:
        given = settings.threshold
        if isinstance(given, Mapping):
            given = {**chosen.threshold, **given}
        threshold = _thresholds(given, config.output, regions, default=default)
    elif chosen.threshold:
        threshold = _thresholds(chosen.threshold, config.output, regions, default=default)
    return ResolvedSettings(
        predict=predict,
        threshold=threshold,
        flips=_flips(settings, config.augment.flip, slices=len(config.data.patch) == 2),
        precision=settings.precision or config.train.precision,
        largest=_largest(settings, regions, chosen),
        min_volume={name: float(v) for name, v in sorted(min_volume.items()) if v > 0},
    )


def _largest(settings: Settings, regions: Regions, chosen: PostProcessing) -> tuple[str, ...]:
    """Return the names of the regions of which only the largest component is kept."""
    if not settings.largest:
        return chosen.largest
    if "none" in settings.largest:
        return ()
    return regions.names if "all" in settings.largest else settings.largest


def _overlap(settings: Settings, default: float) -> float:
    """Return the overlap of the settings or of their preset. Raises UserError if it is out of range."""
    overlap = _OVERLAPS.get(settings.preset, default) if settings.overlap is None else settings.overlap
    if not 0 <= overlap < 1:
        raise UserError(f"--overlap={overlap}: expected 0 <= overlap < 1")
    return overlap


def _thresholds(
    given: float | Mapping[str, float], output: str, regions: Regions, *, default: float
) -> dict[str, float]:
    """Return the threshold of every region."""
    if output == "softmax":
        raise UserError(
            "--threshold needs sigmoid outputs; this network has a softmax, whose most probable label is used"
        )
    limits = dict(given) if isinstance(given, Mapping) else dict.fromkeys(regions.names, float(given))
    if unknown := set(limits) - set(regions.names):
        raise UserError(f"--threshold: {_names(unknown)} unknown; the regions are {', '.join(regions.names)}")
    if not all(0 < v < 1 for v in limits.values()):
        raise UserError(f"--threshold: {limits}: expected values between 0 and 1")
    return {name: limits.get(name, default) for name in regions.names}


def _flips(settings: Settings, trained: Any, *, slices: bool) -> tuple[int, ...]:
    """Return the axes of a volume of the test-time flips.

    Args:
        settings: Settings that the user gave.
        trained: The ``augment.flip`` section of the config.
        slices: True for a 2D network, whose axes 0 and 1 are H and W of a volume.
    """
    if settings.flips is not None:
        allowed = (1, 2) if slices else (0, 1, 2)
        if set(settings.flips) - set(allowed):
            known = ", ".join(f"{a} ({'DHW'[a]})" for a in allowed)
            raise UserError(f"--flips={settings.flips}: expected axes of {known}")
        return tuple(sorted(set(settings.flips)))
    if settings.preset != "best" or not trained.p:
        return ()
    return tuple(sorted(axis + slices for axis in trained.axes))


def _names(names: set[str]) -> str:
    """Return names as text."""
    return ", ".join(sorted(names))
