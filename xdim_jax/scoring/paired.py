"""Statistics of two evaluations of the same cases: mean difference, confidence interval, and significance test."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from xdim_jax.scoring.results import bootstrap_interval
from xdim_jax.scoring.rules import ScoredCase


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference B - A of one metric of one structure, over the cases that have a value in both evaluations.

    Attributes:
        structure: Name of the structure.
        metric: Name of the metric.
        cases: Number of cases.
        a: Mean in evaluation A.
        b: Mean in evaluation B.
        mean: Mean of the differences.
        low: Lower limit of the 95 % confidence interval of ``mean``, by a bootstrap over patients. None if there is
            only one patient.
        high: Upper limit of this interval.
        p: Two-sided p-value of Wilcoxon's signed-rank test over patients, of the mean difference of the cases of each
            patient; 1 if no patient differs.
        p_holm: ``p`` after Holm's correction for all tests of the comparison.
    """

    structure: str
    metric: str
    cases: int
    a: float
    b: float
    mean: float
    low: float | None
    high: float | None
    p: float
    p_holm: float


_MetricValues = Mapping[tuple[str, str], dict[tuple[str, ...], float]]  # (structure, metric) -> case -> value


def compare(a: Sequence[ScoredCase], b: Sequence[ScoredCase], metrics: Sequence[str] = ()) -> list[Difference]:
    """Compare two evaluations over the cases that they have in common.

    Args:
        a: Cases of evaluation A.
        b: Cases of evaluation B.
        metrics: Names of the metrics to compare; empty for all that both have.

    Returns:
        A difference for each structure and metric.

    Raises:
        ValueError: There is no case, structure and metric in common, or a case belongs to two patients.
    """
    first, second = _both_by_metric(a, b)
    patients = _patients(a, b)
    names = [key for key in first if key in second and (not metrics or key[1] in metrics)]
    found = []
    for structure, metric in names:
        x, y = first[structure, metric], second[structure, metric]
        keys = [k for k in x if k in y and math.isfinite(x[k]) and math.isfinite(y[k])]
        if not keys:
            continue
        left, right = np.array([x[k] for k in keys]), np.array([y[k] for k in keys])
        difference = right - left
        low, high = bootstrap_interval(difference, np.array([patients[k[0]] for k in keys]))
        by_patient: dict[str, list[float]] = {}
        for key, value in zip(keys, difference, strict=True):
            by_patient.setdefault(patients[key[0]], []).append(float(value))
        means = np.array([np.mean(values) for values in by_patient.values()])
        test: Any = wilcoxon(means) if means.any() else None
        found.append(
            Difference(
                structure=structure,
                metric=metric,
                cases=len(keys),
                a=float(left.mean()),
                b=float(right.mean()),
                mean=float(difference.mean()),
                low=low,
                high=high,
                p=float(test.pvalue) if test else 1.0,
                p_holm=1.0,
            )
        )
    if not found:
        raise ValueError("they have no case, structure and metric in common")
    corrected = holm([d.p for d in found])
    return [dataclasses.replace(d, p_holm=p) for d, p in zip(found, corrected, strict=True)]


def count_single(
    a: Sequence[ScoredCase], b: Sequence[ScoredCase], metrics: Sequence[str] = ()
) -> dict[tuple[str, str], tuple[int, int]]:
    """Return, for each structure and metric, the numbers of cases with a value in A only, and in B only.

    Only cases that both evaluations have are counted, and only structures and metrics for which a number is not 0.
    """
    first, second = _both_by_metric(a, b)
    counts = {}
    for key in [key for key in first if key in second and (not metrics or key[1] in metrics)]:
        pairs = [(math.isfinite(x), math.isfinite(second[key][k])) for k, x in first[key].items() if k in second[key]]
        counts[key] = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    return {key: count for key, count in counts.items() if any(count)}


def _both_by_metric(a: Sequence[ScoredCase], b: Sequence[ScoredCase]) -> list[_MetricValues]:
    """Return the values of both evaluations by structure and metric, separately for the tasks of CHAOS if needed."""
    tasks = [_values_by_task(cases) for cases in (a, b)]
    separate = any(map(_differ_between_tasks, tasks))
    return [_values_by_metric(found, separate=separate) for found in tasks]


def _patients(a: Sequence[ScoredCase], b: Sequence[ScoredCase]) -> dict[str, str]:
    """Return the patient of every case. An evaluation that does not know the patients names them after the cases.

    Raises:
        ValueError: The evaluations name different patients.
    """
    patients: dict[str, str] = {}
    for case in [*a, *b]:
        known = patients.setdefault(case.case_id, case.patient)
        if known == case.case_id:
            patients[case.case_id] = case.patient
        elif case.patient not in (known, case.case_id):
            raise ValueError(f"the case {case.case_id} belongs to the patients {known} and {case.patient}")
    return patients


_TaskValues = dict[tuple[str, ...], dict[str, dict[str, Mapping[str, float]]]]  # case -> structure -> task -> values


def _values_by_task(cases: Sequence[ScoredCase]) -> _TaskValues:
    """Return the values of every case and structure by task; the task is empty for other data sets than CHAOS."""
    tasks: _TaskValues = {}
    for case in cases:
        key = (case.case_id, *(v for k, v in case.attributes.items() if k != "task"))
        for structure, values in case.values.items():
            tasks.setdefault(key, {}).setdefault(structure, {})[case.attributes.get("task", "")] = values
    return tasks


def _differ_between_tasks(tasks: _TaskValues) -> bool:
    """Return whether the tasks of CHAOS use different predictions of a case."""
    return any(not _all_equal(list(v.values())) for found in tasks.values() for v in found.values())


def _values_by_metric(tasks: _TaskValues, *, separate: bool) -> _MetricValues:
    """Return (structure, metric) -> case -> value.

    Args:
        tasks: Result of `_values_by_task`.
        separate: True to compare each task of CHAOS separately; its structures are then named ``task <task>
            <structure>``. False if all tasks use the same predictions; a case then counts once.
    """
    result: dict[tuple[str, str], dict[tuple[str, ...], float]] = {}
    for key, structures in tasks.items():
        for structure, by_task in structures.items():
            for task, values in by_task.items() if separate else list(by_task.items())[:1]:
                name = f"task {task} {structure}" if separate else structure
                for metric, value in values.items():
                    result.setdefault((name, metric), {})[key] = value
    return result


def _all_equal(several: Sequence[Mapping[str, float]]) -> bool:
    """Return whether all dictionaries have the same keys and values; NaN equals NaN."""
    first = several[0]
    return all(v.keys() == first.keys() and all(np.array_equal(v[k], first[k], True) for k in v) for v in several)


def holm(values: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's step-down correction, in the same order."""
    order = np.argsort(values, kind="stable")
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected
