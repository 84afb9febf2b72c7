"""Results of a study: Dice by arm, number of training patients and step, and paired tests between arms.

The score of a patient is the mean Dice over regions and cases (images) at the last validation; a better validation
before it is not selected. Confidence intervals come from a bootstrap that resamples seeds and patients. Tests compare
two arms with the same number of training patients: Wilcoxon's signed-rank test over patients, of the differences
averaged over seeds, with Holm's correction over all pairs of arms and all numbers of training patients.
"""

import csv
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_text
from xdim_jax.runs.records import VALIDATIONS_FILE, read_records
from xdim_jax.runs.workdir import SPLIT_FILE
from xdim_jax.scoring.paired import holm
from xdim_jax.scoring.results import BOOTSTRAP_SAMPLES
from xdim_jax.studies.plan import Plan, PlannedRun
from xdim_jax.studies.train import is_finished

RESULTS_FILE = "results.csv"
LEVEL = 0.05  # significance level, after Holm's correction


@dataclasses.dataclass(frozen=True)
class Scores:
    """Validation Dice of all finished runs that have the same arm and the same number of training patients.

    The validation patients of all folds of a seed form one row, because each patient is in one fold.

    Attributes:
        seeds: Seeds of the runs.
        patients: Names of the patients.
        steps: Steps of the validations.
        dice: Array (seeds, steps, patients); NaN for patients that no finished run of a seed has validated.
        seconds_per_step: Array (runs); mean of each run, without compilation and validation; NaN if it is not recorded,
            or if other runs were trained at the same time.
    """

    seeds: tuple[int, ...]
    patients: tuple[str, ...]
    steps: tuple[int, ...]
    dice: np.ndarray
    seconds_per_step: np.ndarray

    @property
    def runs(self) -> int:
        """Number of finished runs."""
        return len(self.seconds_per_step)

    @property
    def last(self) -> np.ndarray:
        """Dice after the last step, (seeds, patients)."""
        return self.dice[:, -1]

    @functools.cached_property
    def mean(self) -> "Mean":
        """Mean Dice after the last step, with its confidence interval."""
        return interval(self.last)

    def mean_at(self, step: int) -> float:
        """Return the mean Dice at a validation."""
        return _mean(self.dice[:, self.steps.index(step)])


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean with its 95 % confidence interval over seeds and patients; the limits are NaN if there is no interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return self._format(".3f")

    def signed(self) -> str:
        """Return the text of a difference, with plus signs."""
        return self._format("+.3f")

    def _format(self, spec: str) -> str:
        limits = "-" if math.isnan(self.low) else f"{self.low:{spec}}, {self.high:{spec}}"
        return f"{self.mean:{spec}} [{limits}]"


@dataclasses.dataclass(frozen=True)
class Test:
    """The comparison of two arms with the same number of training patients.

    Attributes:
        size: Number of training patients.
        a, b: Names of the arms.
        seeds: Number of seeds that both arms have.
        patients: Number of validation patients that both arms have.
        difference: Mean of the Dice of b minus that of a.
        p: Two-sided p-value.
        p_holm: ``p`` after Holm's correction.
    """

    size: int
    a: str
    b: str
    seeds: int
    patients: int
    difference: Mean
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        """True if the corrected p-value is below 0.05, and the confidence interval does not contain 0."""
        return self.p_holm < LEVEL and self.difference.low * self.difference.high > 0


def collect(plan: Plan, workdir: Path) -> dict[tuple[str, int], Scores]:
    """Read the finished runs of a study.

    Returns:
        The scores by arm and number of training patients.

    Raises:
        UserError: No run is finished.
    """
    found: dict[tuple[str, int], list[PlannedRun]] = {}
    for run in plan.runs():
        if is_finished(run, plan, workdir):
            found.setdefault((run.arm, run.size), []).append(run)
    if not found:
        raise UserError(f"{workdir} has no finished run of this plan; train it first: python -m xdim_jax.study run ...")
    return {key: _read(plan, runs, workdir) for key, runs in found.items()}


def _read(plan: Plan, runs: Sequence[PlannedRun], workdir: Path) -> Scores:
    steps = tuple(range(plan.validate_steps, plan.steps + 1, plan.validate_steps))
    tables: dict[int, dict[int, dict[str, float]]] = {}  # Dice by seed, step and patient
    for run in runs:
        table = tables.setdefault(run.seed, {step: {} for step in steps})
        for step, found in _by_patient(run.workdir(workdir)).items():
            table.setdefault(step, {}).update(found)
    patients = tuple(sorted({patient for table in tables.values() for patient in table[plan.steps]}))
    dice = np.array([[[table[s].get(p, np.nan) for p in patients] for s in steps] for table in tables.values()])
    seconds = np.array([_seconds_per_step(run.workdir(workdir)) for run in runs])
    return Scores(tuple(tables), patients, steps, dice, seconds)


def _by_patient(workdir: Path) -> dict[int, dict[str, float]]:
    """Return the mean Dice over regions and cases, by step and patient."""
    patients = read_json(workdir / SPLIT_FILE)["patients"]
    table = {}
    for record in read_records(workdir, VALIDATIONS_FILE):
        values: dict[str, list[float]] = {}
        for case, regions in record["cases"].items():
            if regions:
                values.setdefault(patients[case], []).append(float(np.mean(list(regions.values()))))
        table[record["step"]] = {patient: float(np.mean(v)) for patient, v in values.items()}
    return table


def _seconds_per_step(workdir: Path) -> float:
    """Return the mean time of a step in the record of a run; NaN if there is none, or if steps were shared."""
    found = [r for r in read_records(workdir) if r["kind"] == "train"]
    shared = any(r.get("runs", 1) > 1 for r in found)
    return float(np.mean([r["seconds_per_step"] for r in found])) if found and not shared else float("nan")


def interval(values: np.ndarray) -> Mean:
    """Return the mean of ``values`` (seeds, patients) over patients and then over seeds, with its bootstrap interval.

    The bootstrap resamples seeds and patients; with a single seed, this resamples the patients alone. NaN values are
    ignored. The limits are NaN if there is only one seed and one patient.
    """
    rng = np.random.default_rng(0)
    values = values[np.isfinite(values).any(1)][:, np.isfinite(values).any(0)]
    seeds, patients = values.shape
    if values.size < 2:
        return Mean(_mean(values), math.nan, math.nan)
    means = []
    for _ in range(BOOTSTRAP_SAMPLES):
        sample = values[rng.integers(seeds, size=seeds)][:, rng.integers(patients, size=patients)]
        means.append(_mean(sample))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    mean = _mean(values)
    return Mean(mean, min(float(low), mean), max(float(high), mean))  # for equal values, rounding may exclude the mean


def _mean(values: np.ndarray) -> float:
    known = np.isfinite(values)
    counts = known.sum(1)
    rows = np.where(known, values, 0).sum(1)[counts > 0] / counts[counts > 0]
    return float(rows.mean()) if len(rows) else float("nan")


def compare_arms(scores: Mapping[tuple[str, int], Scores], sizes: Sequence[int], arms: Sequence[str]) -> list[Test]:
    """Compare all pairs of arms with each number of training patients, over the seeds and patients that both have."""
    found = []
    for size, (a, b) in itertools.product(sizes, itertools.combinations(arms, 2)):
        if (a, size) not in scores or (b, size) not in scores:
            continue
        difference = paired_difference(scores[a, size], scores[b, size])
        if difference.size == 0:
            continue
        with_value = difference[:, np.isfinite(difference).any(0)]
        by_patient = np.nanmean(with_value, 0)
        test: Any = wilcoxon(by_patient) if by_patient.any() else None
        p = float(test.pvalue) if test else 1.0
        seeds = difference.shape[0]
        found.append(Test(size, a, b, seeds, len(by_patient), interval(with_value), p, 1.0))
    return [dataclasses.replace(t, p_holm=p) for t, p in zip(found, holm([t.p for t in found]), strict=True)]


def paired_difference(a: Scores, b: Scores) -> np.ndarray:
    """Return the Dice of b minus that of a, after the last step, (seeds, patients), where both have a score."""
    first, second = _common([a, b])
    return second - first


def _common(several: Sequence[Scores]) -> list[np.ndarray]:
    """Return the Dice after the last step, (seeds, patients), over the seeds and patients that all have.

    A value that one of them does not have is NaN in all. Seeds without any value are left out.
    """
    seeds = [seed for seed in several[0].seeds if all(seed in s.seeds for s in several)]
    patients = [patient for patient in several[0].patients if all(patient in s.patients for s in several)]
    values = np.array(
        [s.last[np.ix_([s.seeds.index(i) for i in seeds], [s.patients.index(p) for p in patients])] for s in several]
    )
    known = np.isfinite(values).all(0)
    return list(np.where(known, values, np.nan)[:, known.any(-1)])


def verdict(size: int, arms: Sequence[str], scores: Mapping[tuple[str, int], Scores], tests: Sequence[Test]) -> str:
    """Return which arm is best with a number of training patients, or between which arms no difference was found.

    Means are compared over the seeds and validation patients that all arms have.
    """
    known = [arm for arm in arms if (arm, size) in scores]
    if len(known) < 2:
        return f"only {known[0]} has finished runs" if known else "no run is finished"
    common = _common([scores[arm, size] for arm in known])
    if not common[0].size:
        return "the arms have no seed and validation patient in common"
    means = {arm: _mean(values) for arm, values in zip(known, common, strict=True)}
    best = max(means, key=lambda arm: means[arm])
    unclear = [arm for arm in known if arm != best and not _is_better(best, arm, size, tests)]
    if not unclear:
        of = f" of the arms with finished runs ({', '.join(known)})" if len(known) < len(arms) else ""
        return f"{best} is best{of}"
    return (
        f"no difference found between {best} (highest mean) and {', '.join(sorted(unclear, key=lambda a: -means[a]))}"
    )


def _is_better(arm: str, other: str, size: int, tests: Sequence[Test]) -> bool:
    """Return whether a test finds that an arm has a higher Dice than another one."""
    return any(
        t.significant and (t.difference.mean > 0) == (t.b == arm)
        for t in tests
        if t.size == size and {t.a, t.b} == {arm, other}
    )


def write_results(path: Path, plan: Plan, workdir: Path) -> None:
    """Write the Dice of every finished run, validation, case and region as CSV.

    The column ``fold`` is empty if the plan has no folds.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "patients", "seed", "fold", "step", "case", "patient", "region", "dice"])
    for run in plan.runs():
        if not is_finished(run, plan, workdir):
            continue
        folder = run.workdir(workdir)
        place = [run.arm, run.size, run.seed, "" if run.fold is None else run.fold]
        patients = read_json(folder / SPLIT_FILE)["patients"]
        for record in read_records(folder, VALIDATIONS_FILE):
            for case, regions in record["cases"].items():
                for region, dice in regions.items():
                    writer.writerow([*place, record["step"], case, patients[case], region, f"{dice:.6f}"])
    write_text(path, buffer.getvalue())
