"""The report of a study as one self-contained HTML file.

The page shows a table of the trials from best to worst, the validation curves, the importance of the parameters, and
all parameters in parallel coordinates.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xdim_jax.pages import figures
from xdim_jax.pages.figures import Picture
from xdim_jax.sweeps import optuna_study as studies

_MIN_TRIALS = 4  # smallest number of complete trials for a comparison of parameters
_COLOUR_MAP = "viridis"


def rank_trials(groups: dict[int, list[Any]]) -> list[tuple[int, Any]]:
    """Return the origin and the deciding attempt of every trial, from best to worst; trials without a Dice are last.

    See `xdim_jax.sweeps.optuna_study` for the meaning of origin and attempt.

    Args:
        groups: Result of `xdim_jax.sweeps.optuna_study.group_attempts`.
    """
    found = [(origin, studies.deciding_attempt(attempts)) for origin, attempts in groups.items()]
    return sorted(found, key=lambda item: (-_score_or(-math.inf, item[1]), item[0]))


def complete_trials(ranked: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Return the complete trials among the results of `rank_trials`, in the same order."""
    return [(origin, trial) for origin, trial in ranked if trial.state.name == "COMPLETE"]


def format_parameters(trial: Any) -> str:
    """Return the parameters of a trial as text."""
    return ", ".join(f"{name}={studies.format_value(value)}" for name, value in trial.params.items())


def _score(trial: Any) -> float | None:
    """Return the best validation Dice so far; None before the first validation."""
    if trial.state.name == "COMPLETE":
        return trial.value
    return max(trial.intermediate_values.values(), default=None)


def _score_or(missing: float, trial: Any) -> float:
    """Return the score of a trial, or ``missing`` if it has none."""
    score = _score(trial)
    return missing if score is None else score


def render(study: Any) -> str:
    """Return the page of a study (`optuna.Study`) as HTML."""
    groups = studies.group_attempts(study)
    ranked = rank_trials(groups)
    complete = complete_trials(ranked)
    names = _names(ranked)
    rows, failed, left_out = [], [], []
    for origin, trial in ranked:
        score = _score(trial)
        attempts = len(groups[origin])
        minutes = [s / 60 for s in map(studies.training_seconds, groups[origin]) if s is not None]
        cells = [studies.trial_name(origin), trial.state.name.lower(), "-" if score is None else f"{score:.4f}"]
        cells += [f"{sum(minutes):.1f}" if minutes else "-", str(attempts)]
        rows.append([*cells, *(studies.format_value(trial.params.get(name, "-")) for name in names)])
        if error := trial.user_attrs.get("error"):
            failed.append(f"{studies.trial_name(origin)}: {error}")
    pictures: list[tuple[str, Picture]] = []
    curves = [(origin, trial) for origin, trial in ranked if trial.intermediate_values]
    if curves:
        pictures.append(("Validation", draw_curves(curves)))
    if len(complete) >= _MIN_TRIALS:
        pictures += [("Importance of parameters", picture) for picture in draw_importance(study, left_out)]
        pictures.append(("Parameters of all trials", draw_parallel(complete, _names(complete))))
    else:
        left_out.append(
            f"Importance and parallel coordinates of the parameters: fewer than {_MIN_TRIALS} trials are complete."
        )
    states = [trial.state.name.lower() for _, trial in ranked]
    facts = [("config", study.user_attrs.get("config", "-"))]
    if overrides := study.user_attrs.get("overrides"):
        facts.append(("overrides", " ".join(overrides)))
    facts.append(("trials", ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "none"))
    best = "No trial is complete yet."
    if complete:
        origin, trial = complete[0]
        best = f"Best: {studies.trial_name(origin)}, Dice {trial.value:.4f}"
    return figures.render_template(
        "sweep.html.j2",
        title=f"Sweep {study.study_name}",
        lead=best,
        facts=facts,
        header=["trial", "state", "Dice", "minutes", "attempts", *names],
        rows=rows,
        failed=failed,
        figures=pictures,
        left_out=left_out,
        space=study.user_attrs.get("space", ""),
    )


def draw_curves(trials: Sequence[tuple[int, Any]]) -> Picture:
    """Draw the validation Dice of trials, given as `rank_trials` returns them; the best five are in colour."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    for rank, (origin, trial) in reversed(list(enumerate(trials))):
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        style: dict[str, Any] = {"color": f"C{rank}", "label": studies.trial_name(origin), "lw": 2} if rank < 5 else {}
        axes.plot(steps, values, **({"color": "#b6bdc5", "lw": 1} | style), marker="o", ms=3)
    axes.set(xlabel="validation", ylabel="Dice")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="lower right")
    best = _score_or(math.nan, trials[0][1])
    return figures.encode_png(
        figure, f"validation Dice of {len(trials)} trials, the best {best:.3f}", "The best five trials are in colour."
    )


def draw_importance(study: Any, left_out: list[str]) -> list[Picture]:
    """Draw the importance of each parameter by PED-ANOVA (Watanabe et al. 2023).

    A warning of Optuna, for example about a parameter that too few trials have, is shown in the caption.

    Returns:
        A list with one picture. If the importance cannot be computed, the list is empty, and a message is added to
        ``left_out``.
    """
    optuna = studies.import_optuna()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            )
    except (ValueError, RuntimeError) as error:
        left_out.append(f"Importance of parameters: {error}")
        return []
    if not found:
        left_out.append("Importance of parameters: no parameter occurs in every trial.")
        return []
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color="#1f77b4")
    axes.set(xlabel="importance")
    first = next(iter(found))
    caption = (
        "Divergence between the distribution of each parameter in the best quarter of the trials and that in all "
        "trials (PED-ANOVA)."
    )
    about_data = (str(warning.message) for warning in warned if issubclass(warning.category, UserWarning))
    caption = " ".join(dict.fromkeys([caption, *about_data]))
    return [figures.encode_png(figure, f"{first} is the most important: {found[first]:.2f}", caption)]


def _names(trials: Sequence[tuple[int, Any]]) -> list[str]:
    """Return the names of the parameters of the trials."""
    return list(dict.fromkeys(name for _, trial in trials for name in trial.params))


def draw_parallel(trials: Sequence[tuple[int, Any]], names: Sequence[str]) -> Picture:
    """Draw the parameters and the Dice of every trial as a line in parallel coordinates."""
    columns = [*names, "Dice"]
    figure = Figure(figsize=(max(8.0, 1.7 * len(columns)), 4.6), layout="constrained")
    axes = figure.subplots()
    scores = np.array([trial.value for _, trial in trials])
    low, high = scores.min(), scores.max()
    heights = np.full((len(trials), len(columns)), np.nan)
    for c, name in enumerate(columns):
        values = [trial.value if name == "Dice" else trial.params.get(name) for _, trial in trials]
        log_scale = any(getattr(trial.distributions.get(name), "log", False) for _, trial in trials)
        heights[:, c], marks = _axis_positions(values, log_scale)
        for height, mark in marks:
            style: dict[str, Any] = {"ha": "left", "va": "center", "xytext": (3, 0), "textcoords": "offset points"}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            axes.annotate(mark, (c, height), fontsize=7, bbox=box, zorder=3, **style)
    for row, score in sorted(zip(heights, scores, strict=True), key=lambda pair: pair[1]):
        share = (score - low) / (high - low) if high > low else 1.0
        axes.plot(row, color=colormaps[_COLOUR_MAP](share), lw=1 + share, alpha=0.8, marker="o", ms=3)
    axes.set(xticks=range(len(columns)), yticks=[], ylim=(-0.06, 1.06))
    axes.set_xticklabels([name.replace(".", ".\n") for name in columns], fontsize=8)
    for c in range(len(columns)):
        axes.axvline(c, color="#8a929b", lw=0.8, zorder=0)
    caption = "Each line is a trial; yellow is the best Dice. A line has a gap where the trial lacks the parameter."
    return figures.encode_png(figure, f"parameters of {len(trials)} trials, Dice {low:.3f} to {high:.3f}", caption)


def _axis_positions(values: Sequence[Any], log_scale: bool) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Return the positions of values on an axis from 0 to 1 (NaN for no value), and its ticks: position and label."""
    known = [v for v in values if v is not None]
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known):
        scale = math.log if log_scale and min(known) > 0 else float
        low, high = scale(min(known)), scale(max(known))
        span = high - low or 1.0
        heights = np.array([np.nan if v is None else (scale(v) - low) / span for v in values])
        ends = studies.format_value(min(known)), studies.format_value(max(known))
        return heights, [(0.0, ends[0]), ((high - low) / span, ends[1])]
    words = sorted({str(v) for v in known})
    positions = {word: i / max(len(words) - 1, 1) for i, word in enumerate(words)}
    heights = np.array([np.nan if v is None else positions[str(v)] for v in values])
    return heights, [(position, word) for word, position in positions.items()]
