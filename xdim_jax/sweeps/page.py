"""One self-contained HTML file of a study: the trials from best to worst, what matters, and how they learnt."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xdim_jax.base import log
from xdim_jax.base.command import make_parser
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_text
from xdim_jax.pages import figures
from xdim_jax.pages.figures import Picture
from xdim_jax.sweeps import study as studies

_ENOUGH = 4  # ended trials, before it is said what matters
_COLOURS = "viridis"


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    from xdim_jax.sweeps.arguments import add_study_arguments, storage_of

    parser = make_parser("xdim_jax.sweep report", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument("--workdir", default=".", help="folder of the trials, where the storage is in it")
    add_study_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, help="the HTML file to write")
    options = parser.parse_args(argv)
    text = storage_of(options)
    if "://" not in text and not Path(text).is_file():
        raise UserError(f"--storage={text} does not exist; give the --workdir of a sweep, or its --storage")
    study = studies.open_study(studies.open_storage(text), options.study, create=False)
    write_text(options.out, render(study))
    log.say(f"report     {options.out.absolute()}")
    best = _ended(_standing(studies.by_origin(study)))[:1]
    for origin, trial in best:
        log.say(f"best       trial {origin}: Dice {trial.value:.4f}, {_settings(trial.params)}")
    return 0


def _settings(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={studies.shown(value)}" for name, value in params.items())


def _standing(groups: dict[int, list[Any]]) -> list[tuple[int, Any]]:
    """Of every origin, the trial that tells how it stands; best first, those without a Dice last."""
    found = [(origin, studies.outcome(trials)) for origin, trials in groups.items()]
    return sorted(found, key=lambda item: (-(_score(item[1]) or -math.inf), item[0]))


def _ended(standing: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(origin, trial) for origin, trial in standing if trial.state.name == "COMPLETE"]


def _score(trial: Any) -> float | None:
    """The best validation Dice so far."""
    if trial.state.name == "COMPLETE":
        return trial.value
    return max(trial.intermediate_values.values(), default=None)


def render(study: Any) -> str:
    """The page."""
    groups = studies.by_origin(study)
    standing = _standing(groups)
    ended = _ended(standing)
    names = list(dict.fromkeys(name for _, trial in standing for name in trial.params))
    rows, failed, left_out = [], [], []
    for origin, trial in standing:
        score = _score(trial)
        attempts = len(groups[origin])
        minutes = (trial.datetime_complete - trial.datetime_start).total_seconds() / 60 if trial.duration else None
        cells = [studies.name_of(origin), trial.state.name.lower(), "-" if score is None else f"{score:.4f}"]
        cells += ["-" if minutes is None else f"{minutes:.1f}", str(attempts)]
        rows.append([*cells, *(studies.shown(trial.params.get(name, "-")) for name in names)])
        if error := trial.user_attrs.get("error"):
            failed.append(f"{studies.name_of(origin)}: {error}")
    pictures: list[tuple[str, Picture]] = []
    curves = [(origin, trial) for origin, trial in standing if trial.intermediate_values]
    if curves:
        pictures.append(("Validation", draw_curves(curves)))
    if len(ended) >= _ENOUGH:
        pictures += [("What matters", picture) for picture in draw_importance(study, left_out)]
        pictures.append(("Parameters of all trials", draw_parallel(ended, names)))
    else:
        left_out.append(f"What matters, and the parameters side by side: fewer than {_ENOUGH} trials have ended.")
    states = [trial.state.name.lower() for _, trial in standing]
    facts = [("config", study.user_attrs.get("config", "-"))]
    if overrides := study.user_attrs.get("overrides"):
        facts.append(("overrides", " ".join(overrides)))
    facts.append(("trials", ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "none"))
    best = f"Best: {studies.name_of(ended[0][0])}, Dice {ended[0][1].value:.4f}" if ended else "No trial has ended yet."
    return figures.fill(
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
    """Dice over validations; the best trials in colour."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    for rank, (origin, trial) in reversed(list(enumerate(trials))):
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        style: dict[str, Any] = {"color": f"C{rank}", "label": studies.name_of(origin), "lw": 2} if rank < 5 else {}
        axes.plot(steps, values, **({"color": "#b6bdc5", "lw": 1} | style), marker="o", ms=3)
    axes.set(xlabel="validation", ylabel="Dice")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="lower right")
    best = _score(trials[0][1]) or math.nan
    return figures.encode(
        figure, f"validation Dice of {len(trials)} trials, the best {best:.3f}", "Best five in colour."
    )


def draw_importance(study: Any, left_out: list[str]) -> list[Picture]:
    """How much each parameter says of being among the best (PED-ANOVA: Watanabe et al. 2023)."""
    optuna = studies.import_optuna()
    try:
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        )
    except (ValueError, RuntimeError) as error:
        left_out.append(f"What matters: {error}")
        return []
    if not found:
        left_out.append("What matters: no parameter is drawn in every trial.")
        return []
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color="#1f77b4")
    axes.set(xlabel="importance")
    first = next(iter(found))
    caption = "How far each parameter's distribution in the best quarter of the trials is from that in all (PED-ANOVA)."
    return [figures.encode(figure, f"{first} matters most: {found[first]:.2f}", caption)]


def draw_parallel(trials: Sequence[tuple[int, Any]], names: Sequence[str]) -> Picture:
    """Every trial a line over its parameters to its Dice."""
    columns = [*names, "Dice"]
    figure = Figure(figsize=(max(8.0, 1.7 * len(columns)), 4.6), layout="constrained")
    axes = figure.subplots()
    scores = np.array([trial.value for _, trial in trials])
    low, high = scores.min(), scores.max()
    heights = np.full((len(trials), len(columns)), np.nan)
    for c, name in enumerate(columns):
        values = [trial.value if name == "Dice" else trial.params.get(name) for _, trial in trials]
        log_scale = any(getattr(trial.distributions.get(name), "log", False) for _, trial in trials)
        heights[:, c], marks = _place(values, log_scale)
        for height, mark in marks:
            place: dict[str, Any] = {"ha": "left", "va": "center", "xytext": (3, 0), "textcoords": "offset points"}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            axes.annotate(mark, (c, height), fontsize=7, bbox=box, zorder=3, **place)
    for row, score in sorted(zip(heights, scores, strict=True), key=lambda pair: pair[1]):
        share = (score - low) / (high - low) if high > low else 1.0
        axes.plot(row, color=colormaps[_COLOURS](share), lw=1 + share, alpha=0.8, marker="o", ms=3)
    axes.set(xticks=range(len(columns)), yticks=[], ylim=(-0.06, 1.06))
    axes.set_xticklabels([name.replace(".", ".\n") for name in columns], fontsize=8)
    for c in range(len(columns)):
        axes.axvline(c, color="#8a929b", lw=0.8, zorder=0)
    caption = "One line a trial; yellow: the best Dice. A gap: the parameter does not belong to that trial."
    return figures.encode(figure, f"parameters of {len(trials)} trials, Dice {low:.3f} to {high:.3f}", caption)


def _place(values: Sequence[Any], log_scale: bool) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights in 0 to 1 (NaN: no value), and what is written at some of them."""
    known = [v for v in values if v is not None]
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known):
        turn = math.log if log_scale and min(known) > 0 else float
        low, high = turn(min(known)), turn(max(known))
        span = high - low or 1.0
        heights = np.array([np.nan if v is None else (turn(v) - low) / span for v in values])
        return heights, [(0.0, studies.shown(min(known))), ((high - low) / span, studies.shown(max(known)))]
    words = sorted({str(v) for v in known})
    at = {word: i / max(len(words) - 1, 1) for i, word in enumerate(words)}
    return np.array([np.nan if v is None else at[str(v)] for v in values]), [(h, w) for w, h in at.items()]
