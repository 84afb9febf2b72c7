"""Post-processing chosen by cross-validation: thresholds, largest components, and the smallest size of a component.

Every validation case of a fold is predicted by the network of that fold, which was not trained on it. A setting is kept
only if the mean Dice over all cases increases by at least 0.001, and the mean Dice of no fold decreases by 0.001 or
more. For a threshold, this is the Dice of its region, and no other region may lose 0.001 or more in a fold; for
components, it is the mean Dice of all regions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import find_objects
from scipy.ndimage import label as connected

from xdim_jax.base import log
from xdim_jax.base.files import read_json, write_json
from xdim_jax.data.case import Case, Dataset, annotated_regions
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.data.images.image import read_grid
from xdim_jax.data.images.nifti import read_note, write_volume
from xdim_jax.data.labels import IGNORE
from xdim_jax.data.reading import encode_label, read_case, read_label
from xdim_jax.data.regions import Regions, drop_small_components, keep_largest
from xdim_jax.inference.folder import make_note
from xdim_jax.inference.group import network_digest
from xdim_jax.inference.predictor import Predictor
from xdim_jax.inference.settings import POSTPROCESSING_FILE, PostProcessing, Settings
from xdim_jax.inference.validation_cases import find_validation, predict_validation
from xdim_jax.runs.workdir import DATA_FILE, PREDICTIONS_FOLDER, find_members, read_config
from xdim_jax.scoring import masks

_GAIN = 1e-3  # smallest increase of the mean Dice for which a setting is kept; a fold must lose less than this
_BINS = 100  # number of bins of the probabilities
_THRESHOLDS = tuple(range(10, 91, 5))  # thresholds that are tried, in hundredths
_SHARES = (0.25, 0.5, 1.0)  # minimum volumes that are tried, as fractions of the smallest component in the references


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting that was tried for a region.

    Attributes:
        region: Name of the region.
        setting: ``threshold``, ``largest`` or ``min_volume``.
        value: The value that was tried: probability, 1 for ``largest``, or volume in ml.
        gain: Change of the mean Dice over all cases.
        worst: Smallest change of the mean Dice of a fold; negative if the Dice decreases.
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
    """Choose the post-processing of a cross-validation. Write the choice and, if it is new, the validation predictions.

    The choice is written to ``postprocessing.json`` in the workdir and in those of all folds, where prediction reads
    it. If the workdir has such a file for the same networks, its choice is used.

    Args:
        workdir: Workdir of a cross-validation whose folds are all trained.

    Raises:
        UserError: A case cannot be read or predicted, or a file cannot be written.
    """
    path, members = workdir / POSTPROCESSING_FILE, find_members([workdir])
    digests = [_digest(member) for member in members]
    record = read_json(path) if path.is_file() else None
    if not isinstance(record, dict) or record.get("networks") != digests:
        for folder in (workdir, *members):  # existing files were chosen for other networks
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
    """Return the chosen post-processing, and all trials."""
    trials: list[Trial] = []
    work, _ = find_validation(workdir)
    output = workdir / PREDICTIONS_FOLDER
    cases = [(fold, case) for fold, (_, found) in enumerate(work) for case in found]
    dataset = work[0][0].dataset
    threshold: dict[str, float] = {}
    if work[0][0].output.activation == "sigmoid":
        threshold, trials = _choose_thresholds(workdir)
    threshold, checked = _check_thresholds(workdir, threshold, cases, dataset, output)
    trials = [checked.get((trial.region, trial.value), trial) for trial in trials]
    found, largest, volumes = _choose_components(cases, dataset, output)
    chosen = PostProcessing(threshold, tuple(largest), volumes)
    return chosen, [*trials, *found]


# -- thresholds ---------------------------------------------------------------------------------------------------


def _choose_thresholds(workdir: Path) -> tuple[dict[str, float], list[Trial]]:
    """Return region -> threshold, where a threshold helps, and all trials. Every validation case is predicted once."""
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
        best = max((t for t in tried if t.helps), key=lambda t: t.gain, default=None)
        if best is not None:
            chosen[name] = best.value
    return chosen, trials


def _check_thresholds(
    workdir: Path, chosen: Mapping[str, float], cases: Sequence[tuple[int, Case]], dataset: Dataset, output: Path
) -> tuple[dict[str, float], dict[tuple[str, float], Trial]]:
    """Predict label maps with the chosen thresholds, and drop thresholds that do not help there.

    `_choose_thresholds` considers each region alone. In a label map, a voxel belongs to only one of several disjoint
    regions, and a region contains the regions nested inside it, so that a threshold also changes other regions, or may
    change nothing.

    Args:
        workdir: Workdir of the cross-validation.
        chosen: Region -> threshold.
        cases: Fold and case of every validation case.
        dataset: Data set of the cases.
        output: Folder for the label maps, which are those of the returned thresholds.

    Returns:
        Region -> threshold for those that are kept; and (region, threshold) -> trial, measured on label maps.
    """
    kept, checked = dict(chosen), {}
    folds = [fold for fold, _ in cases]
    predict_validation(workdir, output, Settings())
    before = _dice_of_label_maps(cases, dataset, output) if kept else np.zeros(0)
    while kept:
        predict_validation(workdir, output, Settings(threshold=dict(kept)))
        gains = _dice_of_label_maps(cases, dataset, output) - before
        after = {
            name: _trial(name, "threshold", kept.get(name, 0.0), gains[:, r], folds)
            for r, name in enumerate(dataset.regions.names)
        }
        checked |= {(name, kept[name]): after[name] for name in kept}
        wrong = [name for name in kept if not after[name].helps]
        if not wrong and any(trial.worst <= -_GAIN for trial in after.values()):  # another region becomes worse
            wrong = [min(kept, key=lambda name: after[name].gain)]
        if not wrong:
            return kept, checked
        kept = {name: value for name, value in kept.items() if name not in wrong}
    if chosen:
        predict_validation(workdir, output, Settings())
    return {}, checked


def _dice_of_label_maps(cases: Sequence[tuple[int, Case]], dataset: Dataset, output: Path) -> np.ndarray:
    """Return the Dice (cases, regions) of label maps in a folder: 1 if empty in both, NaN if not annotated."""
    names = dataset.regions.names
    found = np.full((len(cases), len(names)), np.nan)
    for c, (_, case) in enumerate(cases):
        label = read_label(dataclasses.replace(case, label=output / f"{case.case_id}.nii.gz"))
        for name, value in masks.region_dice(dataset, case, label, read_label(case)).items():
            found[c, names.index(name)] = 1.0 if np.isnan(value) else value
    return found


def _dice_by_threshold(predictor: Predictor, case: Case, thresholds: Sequence[int]) -> np.ndarray:
    """Return the Dice of every region for every threshold (in hundredths), float64 (regions, thresholds)."""
    volume = read_case(case)
    assert volume.label is not None
    regions = predictor.output.regions
    truth, annotated = regions.encode(volume.label), volume.label != IGNORE
    # number of voxels by region, membership in the reference, and bin of the probability. Voxels outside of the boxes
    # that `count` receives have probability 0
    counts = np.zeros((len(regions.names), 2, _BINS), np.int64)

    def count(slices: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
        inside, known = truth[(slices, *box)], annotated[(slices, *box)]
        bins = np.minimum((values["probabilities"] * _BINS).astype(np.int64), _BINS - 1)
        for r in range(len(regions.names)):
            for member in (0, 1):
                chosen = bins[..., r][(inside[..., r] == member) & known]
                counts[r, member] += np.bincount(chosen, minlength=_BINS)

    predictor.segment(predictor.prepare(case, volume), volume.grid, count)
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
    """Return a trial.

    Args:
        region: Name of the region.
        setting: See `Trial`.
        value: See `Trial`.
        gains: Change of the Dice of every case; NaN where the region is not annotated.
        folds: Fold of every case.
    """
    folds_of = np.array(folds)
    means = [float(np.nanmean(part)) for fold in set(folds) if np.isfinite(part := gains[folds_of == fold]).any()]
    gain = float(np.nanmean(gains)) if np.isfinite(gains).any() else 0.0
    return Trial(region, setting, value, gain, min(means, default=0.0))


# -- components ---------------------------------------------------------------------------------------------------


def _choose_components(
    cases: Sequence[tuple[int, Case]], dataset: Dataset, output: Path
) -> tuple[list[Trial], list[str], dict[str, float]]:
    """Return all trials, the regions of which only the largest component is kept, and region -> minimum volume in ml.

    Args:
        cases: Fold and case of every validation case.
        dataset: Data set of the cases.
        output: Folder of the predicted label maps.
    """
    regions = dataset.regions
    volumes = _smallest_volumes([case for _, case in cases], regions)
    tried = [(name, "largest", 1.0) for name in regions.names]
    tried += [(n, "min_volume", float(f"{s * v:.3g}")) for n, v in volumes.items() for s in _SHARES]
    gains = np.zeros((len(tried), len(cases)))
    show = log.progress_bar("components")
    for c, (_, case) in enumerate(cases):
        truth, label = read_label(case), read_label(dataclasses.replace(case, label=output / f"{case.case_id}.nii.gz"))
        voxel = read_grid(case.images[0], case.axes).voxel_volume
        counts = masks.count_labels(label, truth)
        before = _mean_dice(counts, dataset, case)
        for t, (name, setting, value) in enumerate(tried):
            if setting == "largest":
                changed = keep_largest(label, regions, [name])
            else:
                changed = drop_small_components(label, regions, {name: int(np.ceil(value / voxel - 1e-6))})
            where = changed != label
            new, old = (masks.count_labels(values[where], truth[where]) for values in (changed, label))
            gains[t, c] = _mean_dice(counts + new - old, dataset, case) - before
        show(c + 1, len(cases))
    folds = [fold for fold, _ in cases]
    trials = [_trial(*setting, row, folds) for setting, row in zip(tried, gains, strict=True)]
    largest, smallest = [], {}
    for name in regions.names:
        best = max((t for t in trials if t.region == name and t.helps), key=lambda t: t.gain, default=None)
        if best is not None and best.setting == "largest":
            largest.append(name)
        elif best is not None:
            smallest[name] = best.value
    return trials, largest, smallest


def _mean_dice(counts: np.ndarray, dataset: Dataset, case: Case) -> float:
    """Return the mean Dice over the annotated regions, given the counts of labels; NaN if there are none.

    A region that is empty in both label maps has a Dice of 1.
    """
    values = masks.dice_of_counts(dataset, case, counts).values()
    return float(np.mean([1.0 if np.isnan(v) else v for v in values])) if values else np.nan


def _smallest_volumes(cases: Sequence[Case], regions: Regions) -> dict[str, float]:
    """Return region -> volume in ml of its smallest 26-connected component in any reference."""
    smallest: dict[str, float] = {}
    for case in cases:
        truth, voxel = read_label(case), read_grid(case.images[0], case.axes).voxel_volume
        for name in regions.names:
            mask = regions.mask(truth, name)
            if boxes := find_objects(mask.view(np.uint8)):
                found: Any = connected(mask[boxes[0]], np.ones((3, 3, 3), bool))
                volume = float(np.bincount(found[0].ravel())[1:].min() * voxel)
                smallest[name] = min(smallest.get(name, volume), volume)
    return {name: smallest[name] for name in regions.names if name in smallest}


# -- result -------------------------------------------------------------------------------------------------------


def apply_postprocessing(workdir: Path) -> None:
    """Apply the chosen post-processing to the validation predictions.

    The files are then the same as predictions with this post-processing.
    """
    output = workdir / PREDICTIONS_FOLDER
    work, _ = find_validation(workdir)
    final = [case for predictor, cases in work for case in cases if _is_final(output, predictor, case)]
    if len(final) == sum(len(cases) for _, cases in work):
        return
    predict_validation(workdir, output, Settings(largest=("none",), min_volume={}))
    for predictor, cases in work:
        for case in cases:
            path = output / f"{case.case_id}.nii.gz"
            grid = read_grid(case.images[0], case.axes)
            label = predictor.postprocess(read_label(dataclasses.replace(case, label=path)), grid.voxel_volume)
            write_volume(path, encode_label(case, label), grid, make_note(predictor.digest, case))


def _is_final(output: Path, predictor: Predictor, case: Case) -> bool:
    """Return whether the prediction of a case has been post-processed already."""
    return read_note(output / f"{case.case_id}.nii.gz") == make_note(predictor.digest, case)


def describe(chosen: PostProcessing) -> str:
    """Return the chosen post-processing as text."""
    parts = [f"threshold {name} {value:g}" for name, value in chosen.threshold.items()]
    parts += [f"largest component of {name}" for name in chosen.largest]
    parts += [f"components of {name} of at least {value:g} ml" for name, value in chosen.min_volume.items()]
    return (
        ", ".join(parts)
        or f"none: no setting that was tried increases the mean Dice by at least {_GAIN:g} and harms no fold as much"
    )
