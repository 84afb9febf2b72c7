"""Compares two evaluations case by case: mean difference with its 95 % confidence interval (paired bootstrap over
patients), and Wilcoxon's signed-rank test with Holm's correction over all structures and metrics shown.

    python -m xdim_jax.compare eval_a eval_b --metrics=dice,hd95 --out=comparison.md
"""

import math
from collections.abc import Sequence

from xdim_jax.scoring import paired, tables
from xdim_jax.scoring.results import number


def make_table(found: Sequence[paired.Difference], a: str, b: str) -> tables.Table:
    """One row per structure and metric."""
    header = ("", "metric", "cases", "A", "B", "B - A", "95 % interval", "p", "p (Holm)")
    rows = []
    for d in found:
        digits = 3 if max(abs(d.a), abs(d.b)) <= 1 else 2
        within = "-" if d.low is None else f"{number(d.low, digits)} to {number(d.high, digits)}"
        ends = (number(d.a, digits), number(d.b, digits), f"{d.mean:+.{digits}f}", within, _p(d.p), _p(d.p_holm))
        rows.append((d.structure, d.metric, str(d.cases), *ends))
    return tables.Table(f"A: {a}, B: {b}", header, tuple(rows), f"Holm's correction is for {len(found)} tests.")


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
