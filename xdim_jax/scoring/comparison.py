"""The table of the differences of two evaluations, see `xdim_jax.scoring.paired`."""

import math
from collections.abc import Mapping, Sequence

from xdim_jax.scoring import paired, tables
from xdim_jax.scoring.results import number


def make_table(
    found: Sequence[paired.Difference], a: str, b: str, single: Mapping[tuple[str, str], tuple[int, int]]
) -> tables.Table:
    """Return a table with one row for each structure and metric.

    Args:
        found: Differences of all structures and metrics, from `xdim_jax.scoring.paired.compare`.
        a: Name of evaluation A.
        b: Name of evaluation B.
        single: Numbers of cases with a value in one evaluation only, from `xdim_jax.scoring.paired.count_single`.
    """
    header = ("", "metric", "cases", "A", "B", "B - A", "95 % confidence interval", "p", "p (Holm)")
    rows = []
    for d in found:
        digits = 3 if max(abs(d.a), abs(d.b)) <= 1 else 2
        interval = "-" if d.low is None else f"{number(d.low, digits)} to {number(d.high, digits)}"
        cells = (number(d.a, digits), number(d.b, digits), f"{d.mean:+.{digits}f}", interval, _p(d.p), _p(d.p_holm))
        rows.append((d.structure, d.metric, str(d.cases), *cells))
    notes = [f"Holm's correction is for {len(found)} tests."]
    if single:
        counts = "; ".join(f"{s} {m} {x} in A, {y} in B" for (s, m), (x, y) in single.items())
        notes.append(f"Numbers of cases that have a value in one evaluation only, and are not compared: {counts}.")
    return tables.Table(f"A: {a}, B: {b}", header, tuple(rows), " ".join(notes))


def _p(value: float) -> str:
    """Format a p-value."""
    return "-" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
