"""Calibration of predicted probabilities, and whether the uncertainty map finds the errors of a prediction.

A network is calibrated if, of all voxels with a probability of p, the fraction p belongs to the structure. The expected
calibration error (ECE) is the mean absolute difference between the predicted probability and the fraction of voxels
that belong to the structure, over bins of the probability, weighted by the number of voxels (Guo et al. 2017). An
uncertainty map is useful if erroneous voxels have higher values than correct ones. The area under the ROC curve is the
probability of this for a random erroneous and a random correct voxel: 0.5 is chance.

Most voxels of an image are background that is predicted with high confidence. They would hide the errors. Therefore
only the voxels in the bounding box of the predicted and the reference structures, enlarged by `MARGIN` voxels, are
evaluated. Errors are those of the label maps, after post-processing.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.base.files import read_json, write_json
from xdim_jax.data.images.grid import Axes, Grid, compare_grids
from xdim_jax.data.images.image import read_image, strip_suffix
from xdim_jax.data.images.nifti import read_note
from xdim_jax.scoring.evaluation import parallel_map
from xdim_jax.scoring.masks import bounding_box
from xdim_jax.scoring.results import CALIBRATION_FILE, PREDICT_FILE, number, statistics
from xdim_jax.scoring.rules import EXTRA_OUTPUTS, Job, Rules, find_coding

BINS = 15  # bins of the probability, of equal width
MARGIN = 10
MOST_UNCERTAIN = 0.05  # the "most uncertain" voxels are this fraction of the voxels, with the highest uncertainty
PROBABILITIES, UNCERTAINTY = EXTRA_OUTPUTS
AMBIGUITY = "p (1 - p)"  # uncertainty that needs only the probabilities; an uncertainty map should be better


@dataclasses.dataclass(frozen=True)
class CaseCalibration:
    """The calibration of one case.

    Attributes:
        case_id: Id of the case.
        patient: Id of the patient.
        counts: Structure -> array (BINS, 3): number of voxels, sum of the probabilities, number of voxels that belong
            to the structure.
        brier: Structure -> mean squared difference between the probability and 1 or 0 of the reference.
        ranking: ``uncertainty`` and `AMBIGUITY` -> area under the ROC curve, and fraction of the erroneous voxels that
            are among the most uncertain voxels. NaN if no voxel or every voxel is erroneous.
        without: Structures without a channel of the probabilities.
    """

    case_id: str
    patient: str
    counts: Mapping[str, np.ndarray]
    brier: Mapping[str, float]
    ranking: Mapping[str, tuple[float, float]]
    without: tuple[str, ...] = ()


def check_probabilities(pred: Path) -> dict[str, list[int]]:
    """Return structure -> channels of the probabilities in a folder, whose sum is the probability of the structure.

    Raises:
        UserError: The folder has no probabilities, or they do not name their structures.
    """
    record = pred / PREDICT_FILE
    step = "predict with: python -m xdim_jax.predict --workdir=... --input=... --probabilities --output=<new folder>"
    if not (pred / PROBABILITIES).is_dir() or not record.is_file():
        raise UserError(f"--calibration: {pred} has no probabilities; {step}")
    known = read_json(record)
    structures = known.get("structures") if isinstance(known, dict) else None
    if not structures:
        raise UserError(f"--calibration: {record} does not name the structures of the probabilities; {step}")
    return structures


def calibrate(rules: Rules, jobs: Sequence[Job], pred: Path, out: Path, *, processes: int = 1) -> dict[str, Any]:
    """Evaluate the probabilities and the uncertainty maps of a folder, and write ``calibration.json``.

    Args:
        rules: Rules whose structures are evaluated.
        jobs: Cases with usable predictions. If a case occurs several times (tasks of CHAOS), the job with the most
            structures is evaluated.
        pred: Output folder of ``predict --probabilities``, with or without ``--uncertainty``.
        out: Folder for the result.
        processes: Maximum number of processes.

    Returns:
        The content of the file. ``structures``: structure -> ``ece`` and ``brier`` (`results.statistics` over cases)
        and ``bins`` (number of voxels, mean probability, fraction that belongs to the structure; over all cases).
        ``ranking``: kind of uncertainty -> ``auroc`` and ``found``, the fraction of the errors that are among the most
        uncertain voxels (statistics over cases), and for the uncertainty maps ``gain``: the difference of the AUROC to
        that of `AMBIGUITY`. ``without_channel``: structures that have no probability. ``without_uncertainty``: number
        of cases without an uncertainty map, if others have one.

    Raises:
        UserError: Some probabilities cannot be used. The message lists all problems.
    """
    channels = check_probabilities(pred)
    unique: dict[str, Job] = {}
    for job in jobs:
        known = unique.get(job.ref.case_id)
        if known is None or _number_of_structures(job) > _number_of_structures(known):
            unique[job.ref.case_id] = job
    measure = functools.partial(_measure_or_error, rules, pred, channels)
    with parallel_map(max(min(processes, len(unique)), 1)) as run:
        outcomes = list(run(measure, unique.values()))
    if problems := [str(error) for error in outcomes if isinstance(error, UserError)]:
        raise join_problems(list(dict.fromkeys(problems)), "probabilities cannot be evaluated")
    found = summarise([case for case in outcomes if isinstance(case, CaseCalibration)])
    if not found["structures"]:
        raise UserError(
            f"the probabilities in {pred / PROBABILITIES} are those of {', '.join(channels)}; no evaluated case has a "
            f"structure with one of these names under --rules={rules.name}"
        )
    write_json(out / CALIBRATION_FILE, found)
    return found


def _number_of_structures(job: Job) -> float:
    """Return the number of structures of a job; infinity if all are evaluated."""
    return math.inf if job.structures is None else len(job.structures)


def _measure_or_error(
    rules: Rules, pred: Path, channels: Mapping[str, Sequence[int]], job: Job
) -> CaseCalibration | UserError | None:
    """Return the calibration of a case, or the error if a file cannot be used."""
    try:
        return measure_case(rules, pred, channels, job)
    except UserError as error:
        return error


def measure_case(rules: Rules, pred: Path, channels: Mapping[str, Sequence[int]], job: Job) -> CaseCalibration | None:
    """Measure the calibration of a case.

    Args:
        rules: Rules whose structures are evaluated.
        pred: Output folder of ``predict``.
        channels: Structure -> channels of the probabilities, see `check_probabilities`.
        job: The case.

    Returns:
        The result; None if neither label map has a structure, so that there is no box.

    Raises:
        UserError: A file cannot be read, or does not belong to the label map.
    """
    assert job.pred is not None
    values, _ = job.ref.load()
    predicted, grid = job.prediction_with_grid().load()
    axes = "stored" if grid.flat else job.ref.axes
    arrays = {name: _read_extra(pred, name, job, axes, grid) for name in EXTRA_OUTPUTS}
    probabilities, uncertainty = arrays[PROBABILITIES], arrays[UNCERTAINTY]
    if probabilities is None:
        raise UserError(f"{pred / PROBABILITIES} has no file of {job.ref.case_id}; predict it again")
    if predicted.shape != values.shape:
        raise UserError(
            f"the label map of {job.ref.case_id} has {predicted.shape} voxels (D, H, W), and its reference "
            f"{values.shape}; predict it again"
        )
    count = 1 + max(index for indices in channels.values() for index in indices)
    if probabilities.shape[3] < count or not np.isfinite(probabilities).all():
        raise UserError(
            f"the probabilities of {job.ref.case_id} in {pred / PROBABILITIES} are not those of {', '.join(channels)} "
            f"({probabilities.shape[3]} channels; expected at least {count}, and finite numbers); predict it again"
        )
    coding = find_coding(rules, job.ref, values, predicted)
    masks, other = coding.masks(values, job.ref.path), coding.masks(predicted, job.pred.path)
    names = [name for name in masks if job.structures is None or name in job.structures]
    scored = coding.scored_voxels(values)
    evaluated = np.any([masks[n] | other[n] for n in names], 0) & scored if names else np.zeros(values.shape, bool)
    if not evaluated.any():
        return None
    box = bounding_box(evaluated, MARGIN)
    inside = scored[box]
    cut = np.clip(probabilities[box][inside].astype(np.float64), 0, 1)  # (N, channels)
    counts, brier = {}, {}
    for name in names:
        if name in channels:
            p = np.minimum(cut[:, list(channels[name])].sum(-1), 1)
            y = masks[name][box][inside]
            counts[name] = count_bins(p, y)
            brier[name] = float(np.square(p - y).mean())
    wrong = np.any([masks[name] != other[name] for name in names], 0)[box][inside]
    maps = {AMBIGUITY: (cut * (1 - cut)).max(-1)}
    if uncertainty is not None:
        maps[UNCERTAINTY] = uncertainty[(*box, 0)][inside]
    ranking = {name: rank_errors(found, wrong) for name, found in maps.items()}
    without = tuple(name for name in names if name not in channels)
    return CaseCalibration(job.ref.case_id, job.ref.patient, counts, brier, ranking, without)


def _read_extra(pred: Path, name: str, job: Job, axes: Axes, grid: Grid) -> np.ndarray | None:
    """Return the probabilities or the uncertainty of a case, (D, H, W, channels); None if there is no file.

    Raises:
        UserError: The file cannot be read, comes from other networks than the label map, or is not on its grid.
    """
    assert job.pred is not None
    path = job.pred.path
    stem = (strip_suffix(path.name) if isinstance(job.pred.source, Path) else None) or job.pred.case_id
    for ending in (".nii", ".nii.gz"):
        extra = pred / name / f"{stem}{ending}"
        if extra.is_file():
            notes = {read_note(path), read_note(extra)} - {""}
            if len(notes) > 1:
                raise UserError(f"{extra} was not predicted together with {path}; predict it again with --overwrite")
            array, own_grid = read_image(extra, axes)
            if problems := compare_grids(extra, own_grid, path, grid):
                raise UserError(f"{extra} {problems[0].found}; predict it again with --overwrite")
            return array
    return None


def count_bins(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return (BINS, 3): number of voxels, sum of the probabilities and number of true voxels in each bin.

    Args:
        probabilities: Array (N,) from 0 to 1.
        truth: Boolean array (N,).
    """
    index = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    columns = [np.bincount(index, weights, BINS) for weights in (None, probabilities, truth.astype(float))]
    return np.stack(columns, 1)


def expected_error(counts: np.ndarray) -> float:
    """Return the expected calibration error of the result of `count_bins`."""
    n, p, y = counts.T
    return float(np.abs(p - y).sum() / n.sum())


def rank_errors(uncertainty: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """Return how well an uncertainty map finds erroneous voxels.

    Args:
        uncertainty: Array (N,).
        wrong: Boolean array (N,).

    Returns:
        The area under the ROC curve; and, of all erroneous voxels, the fraction that is among the most uncertain voxels
        (the fraction `MOST_UNCERTAIN` of all), where ties are resolved by the order of the voxels. NaN if no voxel or
        every voxel is erroneous.
    """
    errors = int(wrong.sum())
    if errors in (0, wrong.size):
        return float("nan"), float("nan")
    ranks = rankdata(uncertainty)
    area = (ranks[wrong].sum() - errors * (errors + 1) / 2) / (errors * (wrong.size - errors))
    most = np.argsort(-uncertainty, kind="stable")[: max(round(MOST_UNCERTAIN * wrong.size), 1)]
    return float(area), float(wrong[most].sum() / errors)


def summarise(cases: Sequence[CaseCalibration]) -> dict[str, Any]:
    """Return the content of ``calibration.json``, see `calibrate`."""
    structures: dict[str, Any] = {}
    for name in dict.fromkeys(name for case in cases for name in case.counts):
        having = [case for case in cases if name in case.counts]
        patients = [case.patient for case in having]
        n, p, y = np.sum([case.counts[name] for case in having], 0).T
        used = np.maximum(n, 1)
        structures[name] = {
            "ece": statistics([expected_error(case.counts[name]) for case in having], patients),
            "brier": statistics([case.brier[name] for case in having], patients),
            "bins": {
                "voxels": n.astype(int).tolist(),
                "probability": [float(v) if c else None for v, c in zip(p / used, n, strict=True)],
                "fraction": [float(v) if c else None for v, c in zip(y / used, n, strict=True)],
            },
        }
    ranking: dict[str, Any] = {}
    for name in dict.fromkeys(name for case in cases for name in case.ranking):
        having = [case for case in cases if name in case.ranking]
        patients = [case.patient for case in having]
        ranking[name] = {
            key: statistics([case.ranking[name][i] for case in having], patients)
            for i, key in enumerate(("auroc", "found"))
        }
    both = [case for case in cases if UNCERTAINTY in case.ranking]
    if both:
        gains = [case.ranking[UNCERTAINTY][0] - case.ranking[AMBIGUITY][0] for case in both]
        ranking[UNCERTAINTY]["gain"] = statistics(gains, [case.patient for case in both])
    return {
        "cases": [case.case_id for case in cases],
        "margin": MARGIN,
        "structures": structures,
        "ranking": ranking,
        "without_channel": sorted({name for case in cases for name in case.without}),
        "without_uncertainty": len(cases) - len(both) if both else 0,
    }


def describe(found: Mapping[str, Any]) -> list[str]:
    """Return log lines about the content of ``calibration.json``."""
    lines = [
        f"calibration {name}: ECE {_with_interval(values['ece'])}, Brier score {number(values['brier']['mean'], 4)}"
        for name, values in found["structures"].items()
    ]
    for name, values in found["ranking"].items():
        if values["auroc"]["mean"] is not None:
            kind = "ambiguity " if name == AMBIGUITY else ""
            lines.append(
                f"{kind}{name} finds errors with AUROC {_with_interval(values['auroc'])}; the "
                f"{100 * MOST_UNCERTAIN:g} % most uncertain voxels have {100 * values['found']['mean']:.0f} % of the "
                "errors"
            )
    return lines


def doubts(found: Mapping[str, Any]) -> list[str]:
    """Return warnings: what was not evaluated, and uncertainty maps that do not find errors."""
    lines = []
    if found["without_channel"]:
        lines.append(f"calibration: the probabilities have no channel of {', '.join(found['without_channel'])}")
    if found["without_uncertainty"]:
        lines.append(f"calibration: {found['without_uncertainty']} cases have no uncertainty map")
    own = found["ranking"].get(UNCERTAINTY, {"auroc": {"mean": None}})
    if own["auroc"]["mean"] is None:
        return lines
    low = own["auroc"]["mean"] if own["auroc"]["low"] is None else own["auroc"]["low"]
    gain = own["gain"]
    if low <= 0.5:
        lines.append(
            "do not use the uncertainty maps: it is not shown that they find errors better than chance (AUROC "
            f"{_with_interval(own['auroc'])}; chance is 0.5)"
        )
    elif gain["high"] is not None and gain["high"] < 0:
        lines.append(
            f"the uncertainty maps find errors less well than {AMBIGUITY} of the probabilities (AUROC lower by "
            f"{-gain['mean']:.3f} [{-gain['high']:.3f}, {-gain['low']:.3f}]); use the probabilities instead"
        )
    return lines


def _with_interval(values: Mapping[str, Any]) -> str:
    """Return a mean with its confidence interval as text."""
    if values["low"] is None:
        return number(values["mean"], 3)
    return f"{number(values['mean'], 3)} [{values['low']:.3f}, {values['high']:.3f}]"
