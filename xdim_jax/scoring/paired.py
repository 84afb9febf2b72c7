"""Two runs case by case: is one better, and by how much?"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from xdim_jax.scoring.results import interval
from xdim_jax.scoring.rules import Scored


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one metric of one structure, B minus A, over the cases that both have a value for.

    Attributes:
        cases: how many.
        a, b: means.
        mean: of the differences; low, high: its 95 % confidence interval (paired bootstrap over patients).
        p: of Wilcoxon's signed-rank test over cases, two-sided; 1 where no case differs; NaN for no case.
        p_holm: the same after Holm's correction for all tests of the comparison.
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


def compare(a: Sequence[Scored], b: Sequence[Scored], metrics: Sequence[str] = ()) -> list[Difference]:
    """Every structure and metric that both have (only ``metrics``, where given), over common cases.

    Raises:
        ValueError: there is nothing in common.
    """
    first, second = _values(a), _values(b)
    patients = {c.case_id: c.patient for c in a}
    names = [key for key in first if key in second and (not metrics or key[1] in metrics)]
    found = []
    for structure, metric in names:
        x, y = first[structure, metric], second[structure, metric]
        keys = [k for k in x if k in y and math.isfinite(x[k]) and math.isfinite(y[k])]
        if not keys:
            continue
        left, right = np.array([x[k] for k in keys]), np.array([y[k] for k in keys])
        difference = right - left
        low, high = interval(difference, np.array([patients[k[0]] for k in keys]))
        test: Any = wilcoxon(difference) if difference.any() else None
        p = float(test.pvalue) if test else 1.0
        found.append(
            Difference(
                structure,
                metric,
                len(keys),
                float(left.mean()),
                float(right.mean()),
                float(difference.mean()),
                low,
                high,
                p,
                p_holm=1.0,
            )
        )
    if not found:
        raise ValueError("the two have no case, structure and metric in common")
    corrected = holm([d.p for d in found])
    return [dataclasses.replace(d, p_holm=p) for d, p in zip(found, corrected, strict=True)]


def _values(cases: Sequence[Scored]) -> Mapping[tuple[str, str], dict[tuple[str, ...], float]]:
    """(structure, metric) to case to value. A case that counts for several tasks counts once, unless its predictions
    differ by task: then every task has structures of its own."""
    tasks: dict[tuple[str, ...], dict[str, dict[str, Mapping[str, float]]]] = {}
    for case in cases:
        key = (case.case_id, *(v for k, v in case.facts.items() if k != "task"))
        for structure, values in case.values.items():
            tasks.setdefault(key, {}).setdefault(structure, {})[case.facts.get("task", "")] = values
    apart = any(not _equal(list(v.values())) for found in tasks.values() for v in found.values())
    result: dict[tuple[str, str], dict[tuple[str, ...], float]] = {}
    for key, structures in tasks.items():
        for structure, by_task in structures.items():
            for task, values in by_task.items() if apart else list(by_task.items())[:1]:
                name = f"task {task} {structure}" if apart else structure
                for metric, value in values.items():
                    result.setdefault((name, metric), {})[key] = value
    return result


def _equal(several: Sequence[Mapping[str, float]]) -> bool:
    first = several[0]
    return all(v.keys() == first.keys() and all(np.array_equal(v[k], first[k], True) for k in v) for v in several)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values, in the order given."""
    order = np.argsort(values, kind="stable")
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected
