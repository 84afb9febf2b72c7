"""The results of a study as tables and as one self-contained HTML file."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from xdim_jax.pages.figures import Picture, encode_png, render_template
from xdim_jax.scoring.tables import Table
from xdim_jax.studies.plan import Plan
from xdim_jax.studies.results import Scores, Test, verdict

_MARKERS = "os^Dvx*P"


def make_tables(plan: Plan, scores: Mapping[tuple[str, int], Scores], tests: Sequence[Test]) -> list[Table]:
    """Return the tables of a study, without those that would have no rows.

    They contain the scores, the differences from the baseline, the differences between the other arms, the Dice at
    several steps, and the training time.
    """
    baseline = [t for t in tests if plan.baseline in (t.a, t.b)]
    tables = [
        _score_table(plan, scores, tests),
        _test_table(f"Difference from {plan.baseline}", [_from(t, plan.baseline) for t in baseline]),
        _test_table("Difference between the other arms", [t for t in tests if t not in baseline]),
        _step_table(plan, scores),
        _cost_table(plan, scores),
    ]
    return [table for table in tables if table.rows]


def _score_table(plan: Plan, scores: Mapping[tuple[str, int], Scores], tests: Sequence[Test]) -> Table:
    arms, sizes = list(plan.arms), [n for n in plan.sizes if any((arm, n) in scores for arm in plan.arms)]
    rows = [(arm, *(_cell(scores.get((arm, n))) for n in sizes)) for arm in arms]
    rows.append(("verdict", *(verdict(n, arms, scores, tests) for n in sizes)))
    return Table(
        title=f"Dice after {plan.steps} steps",
        header=("arm", *(f"{n} training patients" for n in sizes)),
        rows=tuple(rows),
        note="Mean over regions, cases, validation patients and seeds; in brackets its 95 % confidence interval over "
        "seeds and patients; in parentheses the number of finished runs. The arm with the highest mean over the seeds "
        "and patients that all arms have is called best if it differs from every other arm: the p-value of the paired "
        "test is below 0.05 after Holm's correction, and the confidence interval of the difference does not contain 0.",
    )


def _cell(scores: Scores | None) -> str:
    return "-" if scores is None else f"{scores.mean} ({scores.runs})"


def _from(test: Test, baseline: str) -> Test:
    """Return the test with the baseline as its arm ``a``, so that the difference is the other arm minus it."""
    if test.a == baseline:
        return test
    d = test.difference
    turned = dataclasses.replace(d, mean=-d.mean, low=-d.high, high=-d.low)
    return dataclasses.replace(test, a=test.b, b=test.a, difference=turned)


def _test_table(title: str, tests: Sequence[Test]) -> Table:
    rows = [
        (
            str(t.size),
            t.b,
            t.a,
            t.difference.signed(),
            f"{t.seeds}",
            f"{t.patients}",
            f"{t.p:.2g}",
            f"{t.p_holm:.2g}",
            "yes" if t.significant else "no",
        )
        for t in tests
    ]
    return Table(
        title=title,
        header=(
            *("training patients", "arm A", "arm B", "Dice A - B", "seeds", "validation patients"),
            *("p", "p (Holm)", "significant"),
        ),
        rows=tuple(rows),
        note="Dice A - B: mean difference, paired by seed and patient, with its 95 % confidence interval. p: "
        "Wilcoxon's signed-rank test over patients. p (Holm): p after Holm's correction over all pairs of arms and all "
        "numbers of training patients. Significant: p (Holm) is below 0.05, and the interval does not contain 0.",
    )


def _step_table(plan: Plan, scores: Mapping[tuple[str, int], Scores]) -> Table:
    steps = next(iter(scores.values())).steps
    chosen = [s for i, s in enumerate(steps) if i in {0, 1, 3, 7, 15, 31, 63, len(steps) - 1}]
    rows = []
    for n in plan.sizes:
        for arm in plan.arms:
            if found := scores.get((arm, n)):
                rows.append((str(n), arm, *(f"{found.mean_at(s):.3f}" for s in chosen)))
    return Table(
        "Dice over steps",
        ("training patients", "arm", *(f"step {s}" for s in chosen)),
        tuple(rows),
        "Mean Dice at validations during training.",
    )


def _cost_table(plan: Plan, scores: Mapping[tuple[str, int], Scores]) -> Table:
    rows = []
    for (arm, n), s in sorted(scores.items(), key=lambda item: (list(plan.arms).index(item[0][0]), item[0][1])):
        known = s.seconds_per_step[np.isfinite(s.seconds_per_step)]
        times = (f"{plan.steps * known.mean():.0f}", f"{known.mean():.3f}") if len(known) else ("-", "-")
        rows.append((arm, str(n), f"{s.runs}", *times))
    return Table(
        "Cost",
        ("arm", "training patients", "runs", "seconds per run", "seconds per step"),
        tuple(rows),
        "Time of training without compilation and validation, on the machine of the runs: mean over the runs that were "
        "trained alone. The time of a run that was trained together with others (--pack) is not known. A dash means "
        "that no time is known.",
    )


def draw_sizes(plan: Plan, scores: Mapping[tuple[str, int], Scores]) -> Picture:
    """Draw the Dice over the number of training patients, with confidence intervals."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(plan.arms):
        sizes = [n for n in plan.sizes if (arm, n) in scores]
        found = [scores[arm, n].mean for n in sizes]
        shift = 1 + 0.02 * (i - (len(plan.arms) - 1) / 2)  # so that intervals do not cover each other
        errors = np.array([[m.mean - m.low, m.high - m.mean] for m in found]).T
        axes.errorbar(
            [n * shift for n in sizes],
            [m.mean for m in found],
            errors if len(found) else None,
            color=f"C{i % 10}",
            marker=_MARKERS[i % len(_MARKERS)],
            ms=5,
            capsize=3,
            lw=1.5,
            label=arm,
        )
    axes.set_xscale("log")
    axes.set_xticks(plan.sizes, [str(n) for n in plan.sizes])
    axes.minorticks_off()
    axes.set(xlabel="training patients", ylabel=f"validation Dice after {plan.steps} steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return encode_png(figure, f"Dice over the number of training patients for {', '.join(plan.arms)}", _SIZES_CAPTION)


_SIZES_CAPTION = (
    "Dice over the number of training patients. Error bars: 95 % confidence interval over seeds and validation "
    "patients."
)


def draw_steps(plan: Plan, scores: Mapping[tuple[str, int], Scores]) -> Picture:
    """Draw the Dice over training steps, with one panel for each number of training patients."""
    sizes = [n for n in plan.sizes if any((arm, n) in scores for arm in plan.arms)]
    figure = Figure(figsize=(max(3.2 * len(sizes), 5), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, n in zip(panels, sizes, strict=True):
        for i, arm in enumerate(plan.arms):
            if found := scores.get((arm, n)):
                by_seed = np.nanmean(found.dice, -1)
                axes.plot(found.steps, by_seed.mean(0), color=f"C{i % 10}", lw=1.8, label=arm)
                if len(found.seeds) > 1:
                    axes.fill_between(found.steps, by_seed.min(0), by_seed.max(0), color=f"C{i % 10}", alpha=0.15, lw=0)
        axes.set(title=f"{n} training patients", xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation Dice")
    panels[-1].legend(fontsize=8, loc="lower right")
    caption = (
        "Dice over training steps. Line: mean over seeds. Shaded: from the Dice of the worst seed to that of "
        "the best seed at each step."
    )
    return encode_png(figure, "Dice over training steps", caption)


def render(plan: Plan, plan_text: str, scores: Mapping[tuple[str, int], Scores], tests: Sequence[Test]) -> str:
    """Return the page as HTML."""
    runs = list(plan.runs())
    finished = sum(s.runs for s in scores.values())
    facts = {
        "recipe": plan.recipe,
        "runs": f"{finished} of {len(runs)} are finished",
        "steps": f"{plan.steps}, with a validation every {plan.validate_steps} steps",
        "score": "validation Dice after the last step, even if an earlier validation was better",
        "settings of all runs": json.dumps(dict(plan.settings)),
        "notes": plan.notes,
    }
    return render_template(
        "study.html.j2",
        title=plan.title,
        facts=[(name, value) for name, value in facts.items() if value],
        pictures=[draw_sizes(plan, scores), draw_steps(plan, scores)],
        tables=make_tables(plan, scores, tests),
        plan=plan_text,
    )


def format_lines(plan: Plan, scores: Mapping[tuple[str, int], Scores], tests: Sequence[Test]) -> list[str]:
    """Return the mean Dice of all arms and the verdict for every number of training patients as lines of text."""
    lines = []
    for n in plan.sizes:
        found: list[tuple[str, Any]] = [(arm, scores[arm, n]) for arm in plan.arms if (arm, n) in scores]
        for arm, s in found:
            lines.append(f"{n:>5} training patients  {arm:<20} Dice {s.mean}, {s.runs} runs")
        if found:
            lines.append(f"{n:>5} training patients  {verdict(n, list(plan.arms), scores, tests)}")
    return lines
