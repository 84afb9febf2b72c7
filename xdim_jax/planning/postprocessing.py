"""Post-processing chosen by cross-validation: thresholds, largest components, and smallest components.

Every validation case of a fold is predicted by the network of that fold, which was not trained on it. A setting is kept
only if it helps: if the mean Dice over all cases becomes better by 0.001 or more, and in no fold worse by 0.001.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import label as connected

from xdim_jax.base import log
from xdim_jax.base.files import read_json, write_json
from xdim_jax.data.case import Case, Dataset, annotated_regions, encode_label, read_case, read_label
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.data.images.image import read_grid
from xdim_jax.data.images.nifti import read_note, write_volume
from xdim_jax.data.labels import IGNORE
from xdim_jax.data.regions import Regions, drop_small_components, keep_largest
from xdim_jax.inference.folder import make_note
from xdim_jax.inference.group import network_digest
from xdim_jax.inference.predictor import Predictor
from xdim_jax.inference.settings import POSTPROCESSING_FILE, PostProcessing, Settings
from xdim_jax.inference.validation_cases import find_validation, predict_validation
from xdim_jax.runs.workdir import DATA_FILE, PREDICTIONS_FOLDER, find_members, read_config
from xdim_jax.scoring import masks

_GAIN = 1e-3  # smallest gain of the mean Dice for which a setting is kept, and largest loss in a fold
_BINS = 100  # number of intervals of the probabilities
_THRESHOLDS = tuple(range(10, 91, 5))  # thresholds that are tried, in hundredths
_SHARES = (0.25, 0.5, 1.0)  # smallest components that are tried, as shares of the smallest one in the references


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting that was tried for a region.

    Attributes:
        region: Name of the region.
        setting: ``threshold``, ``largest`` or ``min_volume``.
        value: The value that was tried.
        gain: Change of the mean Dice over all cases.
        worst: Smallest change of the mean Dice of a fold.
    """

    region: str
    setting: str
    value: float
    gain: float
    worst: float

    @property
    def helps(self) -> bool:
        """True if the setting is good enough to be kept."""
        return self.gain >= _GAIN and self.worst > -_GAIN


def choose_postprocessing(workdir: Path) -> PostProcessing:
    """Choose the post-processing of a cross-validation, and write it and the validation predictions that result.

    The choice is written to ``postprocessing.json`` in the workdir and in those of all folds, where prediction reads
    it. If there is such a file for the same networks in the workdir, nothing is chosen again.

    Args:
        workdir: Workdir of a cross-validation whose folds are all trained.

    Raises:
        UserError: A case cannot be read or predicted, or a file cannot be written.
    """
    path, members = workdir / POSTPROCESSING_FILE, find_members([workdir])
    digests = [_digest(member) for member in members]
    record = read_json(path) if path.is_file() else None
    if not isinstance(record, dict) or record.get("networks") != digests:
        for folder in (workdir, *members):  # chosen for other networks
            (folder / POSTPROCESSING_FILE).unlink(missing_ok=True)
        chosen, trials = _choose(workdir)
        tried = [dataclasses.asdict(trial) for trial in trials]
        record = {"networks": digests, "chosen": dataclasses.asdict(chosen), "tried": tried}
        write_json(path, record)
    for member in members:
        write_json(member / POSTPROCESSING_FILE, record)
    values = record["chosen"]
    return PostProcessing(values["threshold"], tuple(values["largest"]), values["min_volume"])


def _digest(workdir: Path) -> str:
    """Return a digest of the network of a fold."""
    dataset = trained_dataset(read_config(workdir).data.to_dict(), read_json(workdir / DATA_FILE))
    return network_digest(workdir, dataset)


def _choose(workdir: Path) -> tuple[PostProcessing, list[Trial]]:
    """Return the post-processing, and everything that was tried."""
    trials: list[Trial] = []
    work, _ = find_validation(workdir)
    threshold: dict[str, float] = {}
    if work[0][0].output.activation == "sigmoid":
        threshold, found = _choose_thresholds(workdir)
        trials += found
    output = workdir / PREDICTIONS_FOLDER
    predict_validation(workdir, output, Settings(threshold=threshold or None))
    cases = [(fold, case) for fold, (_, found) in enumerate(work) for case in found]
    dataset = work[0][0].dataset
    found, largest, volumes = _choose_components(cases, dataset, output)
    chosen = PostProcessing(threshold, tuple(largest), volumes)
    return chosen, [*trials, *found]


# -- thresholds ---------------------------------------------------------------------------------------------------


def _choose_thresholds(workdir: Path) -> tuple[dict[str, float], list[Trial]]:
    """Return the thresholds that help, and all trials. Every validation case is predicted once."""
    work, _ = find_validation(workdir, Settings(probabilities=True))
    regions = work[0][0].output.regions
    default = float(work[0][0].groups[0].config.predict.threshold)
    tried_thresholds = sorted({*_THRESHOLDS, round(100 * default)})
    rows, folds = [], []
    total = sum(len(cases) for _, cases in work)
    show = log.progress_bar("thresholds")
    for fold, (predictor, cases) in enumerate(work):
        for case in cases:
            rows.append(_dice_by_threshold(predictor, case, tried_thresholds))
            folds.append(fold)
            show(len(rows), total)
    dice = np.array(rows)  # (cases, regions, thresholds); NaN for regions that are not annotated
    before = tried_thresholds.index(round(100 * default))
    trials, chosen = [], {}
    for r, name in enumerate(regions.names):
        tried = [
            _trial(name, "threshold", t / 100, dice[:, r, i] - dice[:, r, before], folds)
            for i, t in enumerate(tried_thresholds)
            if i != before
        ]
        trials += tried
        best = max(tried, key=lambda t: t.gain)
        if best.helps:
            chosen[name] = best.value
    return chosen, trials


def _dice_by_threshold(predictor: Predictor, case: Case, thresholds: Sequence[int]) -> np.ndarray:
    """Return the Dice of every region for every threshold (in hundredths), float64 (regions, thresholds)."""
    volume = read_case(case)
    assert volume.label is not None
    regions = predictor.output.regions
    truth, annotated = regions.encode(volume.label), volume.label != IGNORE
    # voxels by region, by whether they belong to it, and by probability; voxels outside of the sink's boxes have 0
    counts = np.zeros((len(regions.names), 2, _BINS), np.int64)

    def count(slices: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        inside, known = truth[(slices, *box)], annotated[(slices, *box)]
        bins = np.minimum((values["probabilities"] * _BINS).astype(np.int64), _BINS - 1)
        for r in range(len(regions.names)):
            for member in (0, 1):
                chosen = bins[..., r][(inside[..., r] == member) & known]
                counts[r, member] += np.bincount(chosen, minlength=_BINS)

    predictor.segment(predictor.prepare(case, volume), count)
    dice = np.full((len(regions.names), len(thresholds)), np.nan)
    shown = annotated_regions(predictor.dataset, case)
    for r, name in enumerate(regions.names):
        if name not in shown:
            continue
        reference = int(truth[..., r].sum())
        for i, threshold in enumerate(thresholds):
            wrong, right = (int(n) for n in counts[r, :, threshold:].sum(1))
            dice[r, i] = 2 * right / (wrong + right + reference) if wrong + right + reference else 1.0
    return dice


def _trial(region: str, setting: str, value: float, gains: np.ndarray, folds: Sequence[int]) -> Trial:
    """Return the trial with the gain of every case."""
    folds_of = np.array(folds)
    means = [float(np.nanmean(part)) for fold in set(folds) if np.isfinite(part := gains[folds_of == fold]).any()]
    gain = float(np.nanmean(gains)) if np.isfinite(gains).any() else 0.0
    return Trial(region, setting, value, gain, min(means, default=0.0))


# -- components ---------------------------------------------------------------------------------------------------


def _choose_components(
    cases: Sequence[tuple[int, Case]], dataset: Dataset, output: Path
) -> tuple[list[Trial], list[str], dict[str, float]]:
    """Return all trials, the regions of which the largest component is kept, and the smallest volumes in ml.

    Args:
        cases: Fold and case of every validation case.
        dataset: Data set of the cases.
        output: Folder of their label maps.
    """
    regions = dataset.regions
    volumes = _smallest_volumes([case for _, case in cases], regions)
    tried = [(name, "largest", 1.0) for name in regions.names]
    tried += [(n, "min_volume", float(f"{s * v:.3g}")) for n, v in volumes.items() for s in _SHARES]
    gains = np.zeros((len(tried), len(cases)))
    show = log.progress_bar("components")
    for c, (_, case) in enumerate(cases):
        truth, label = read_label(case), read_label(dataclasses.replace(case, label=output / f"{case.case_id}.nii.gz"))
        voxel = _voxel_volume(case)
        before = _mean_dice(label, truth, dataset, case)
        for t, (name, setting, value) in enumerate(tried):
            if setting == "largest":
                changed = keep_largest(label, regions, [name])
            else:
                changed = drop_small_components(label, regions, {name: int(np.ceil(value / voxel - 1e-6))})
            gains[t, c] = _mean_dice(changed, truth, dataset, case) - before
        show(c + 1, len(cases))
    folds = [fold for fold, _ in cases]
    trials = [_trial(*setting, row, folds) for setting, row in zip(tried, gains, strict=True)]
    largest, smallest = [], {}
    for name in regions.names:
        best = max((t for t in trials if t.region == name), key=lambda t: t.gain)
        if best.helps and best.setting == "largest":
            largest.append(name)
        elif best.helps:
            smallest[name] = best.value
    return trials, largest, smallest


def _mean_dice(label: np.ndarray, truth: np.ndarray, dataset: Dataset, case: Case) -> float:
    """Return the mean Dice over the annotated regions; 1 for a region that is empty in both."""
    values = masks.region_dice(dataset, case, label, truth).values()
    return float(np.mean([1.0 if np.isnan(v) else v for v in values]))


def _smallest_volumes(cases: Sequence[Case], regions: Regions) -> dict[str, float]:
    """Return, by region, the volume in ml of the smallest 26-connected component in the references that have it."""
    smallest: dict[str, float] = {}
    for case in cases:
        truth, voxel = regions.encode(read_label(case)), _voxel_volume(case)
        for r, name in enumerate(regions.names):
            if truth[..., r].any():
                found: Any = connected(truth[..., r], np.ones((3, 3, 3), bool))
                volume = float(np.bincount(found[0].ravel())[1:].min() * voxel)
                smallest[name] = min(smallest.get(name, volume), volume)
    return {name: smallest[name] for name in regions.names if name in smallest}


def _voxel_volume(case: Case) -> float:
    """Return the volume of a voxel in ml."""
    return float(np.prod(read_grid(case.images[0], case.axes).spacing)) / 1000


# -- result -------------------------------------------------------------------------------------------------------


def apply_postprocessing(workdir: Path) -> None:
    """Apply the chosen post-processing to the validation predictions, as if they had been predicted with it."""
    output = workdir / PREDICTIONS_FOLDER
    work, _ = find_validation(workdir)
    final = [case for predictor, cases in work for case in cases if _is_final(output, predictor, case)]
    if len(final) == sum(len(cases) for _, cases in work):
        return
    predict_validation(workdir, output, Settings(largest=("none",), min_volume={}))
    for predictor, cases in work:
        for case in cases:
            path = output / f"{case.case_id}.nii.gz"
            label = predictor.postprocess(read_label(dataclasses.replace(case, label=path)), _voxel_volume(case))
            grid = read_grid(case.images[0], case.axes)
            write_volume(path, encode_label(case, label), grid, make_note(predictor.digest, case))


def _is_final(output: Path, predictor: Predictor, case: Case) -> bool:
    """Return whether the prediction of a case has been post-processed already."""
    return read_note(output / f"{case.case_id}.nii.gz") == make_note(predictor.digest, case)


def describe(chosen: PostProcessing) -> str:
    """Return the chosen post-processing as text."""
    parts = [f"threshold {name} {value:g}" for name, value in chosen.threshold.items()]
    parts += [f"largest component of {name}" for name in chosen.largest]
    parts += [f"components of {name} from {value:g} ml" for name, value in chosen.min_volume.items()]
    return ", ".join(parts) or "none, because nothing that was tried helps"
