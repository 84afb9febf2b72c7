"""The report of an evaluation as one self-contained HTML file.

The page shows the scores next to those of the paper, training curves, pictures of five cases from best to worst, and a
table of all cases.
"""

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError
from xdim_jax.data.datasets import DATASETS
from xdim_jax.data.images.image import Source, images_in, read_image, source_from_json, strip_suffix
from xdim_jax.data.images.names import case_of_label
from xdim_jax.pages import figures
from xdim_jax.pages.figures import View
from xdim_jax.scoring import challenges, results, tables
from xdim_jax.scoring.calibration import describe as describe_calibration
from xdim_jax.scoring.calibration import doubts
from xdim_jax.scoring.results import number
from xdim_jax.scoring.rules import Job, Rules, ScoredCase, column, find_coding

# cases to draw -> rank by mean Dice: 1 for the best case, 0 for the worst case
ROLES = (("Best", 1.0), ("75th percentile", 0.75), ("Median", 0.5), ("25th percentile", 0.25), ("Worst", 0.0))
# the first table of all metrics is open if it has at most this number of rows, or if the paper has no table
_MAX_OPEN_ROWS = 12


def describe_network(model: Mapping[str, Any]) -> str:
    """Return a description such as ``dxnet, encoder efficientnet_b0, instance norm``.

    For DS-Net, encoder and normalisation are those of its 2D network.
    """
    described = model.get("inner", model)
    return f"{model['name']}, encoder {described['encoder']['name']}, {described['norm']} norm"


def rules_of(evaluation: Mapping[str, Any]) -> Rules:
    """Return the rules of an evaluation, given the content of its ``evaluate.json``."""
    options = Namespace(**dict.fromkeys(challenges.OPTIONS) | evaluation["options"] | {"ref": evaluation["ref"]})
    options.metrics = tuple(evaluation["options"].get("metrics", ()))
    return challenges.make_rules(evaluation["rules"], options)


def render(
    config: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    channels: Sequence[str],
    summary: Mapping[str, Any],
    scored: Sequence[ScoredCase],
    evaluation: Mapping[str, Any],
    environments: Mapping[str, Mapping[str, Any]],
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """Return the report as HTML.

    Args:
        config: Config of the run; None if there is no run.
        records: Records of the run, see `xdim_jax.runs.records.read_records`.
        channels: Names of the image channels.
        summary: Content of ``summary.json`` of the evaluation.
        scored: All scored cases of the evaluation.
        evaluation: Content of ``evaluate.json``. Images and label maps are read from the folders that it names.
        environments: Name, such as ``training`` -> recorded packages and devices.
        calibration: Content of ``calibration.json``; None if the evaluation has none.
    """
    rules = rules_of(evaluation)
    metrics = tuple(evaluation["options"].get("metrics", ()))
    columns = dict(rules.columns) | {m: column(m) for m in metrics if m not in rules.columns}
    cases = [c for c in scored if c.case_id in evaluation["cases"]]
    chosen, left_out = choose_cases(cases, summary["unreadable"])
    if not chosen:
        left_out.append("No pictures: this evaluation does not have the Dice of the cases, by which they are chosen.")
    overlays, legend = _draw_cases(rules, evaluation, chosen, config, channels, left_out)
    if not config:
        left_out.append("No curves and no config: --workdir was not given.")
    elif not records:
        left_out.append(
            "No curves: the run has no training record, or is a cross-validation. For the curves of a fold, give "
            "--workdir=<run>/fold<number>."
        )
    volumes = [values for c in scored for structure, values in c.values.items() if structure == "LV volume"]
    shown_tables, collapsed_tables = tables.paper_tables(summary), tables.metric_tables(summary, columns)
    if not shown_tables or len(collapsed_tables[0].rows) <= _MAX_OPEN_ROWS:
        shown_tables.append(collapsed_tables.pop(0))
    phantom = config is not None and not config["data"]["root"]
    name = f"{config['model']['name']} on {config['data']['dataset']}" if config else f"Evaluation by {rules.title}"
    return figures.render_template(
        "report.html.j2",
        title=name + (" phantoms" if phantom else ""),
        lead="Synthetic cases: these scores are no estimate of the accuracy on patients."
        if phantom
        else f"{evaluation['pred']} against {evaluation['ref']}",
        facts=_facts(config, records, evaluation, summary, environments),
        tables=[(t, [_is_paper(row) for row in t.rows]) for t in shown_tables],
        further=[(t, [_is_paper(row) for row in t.rows]) for t in collapsed_tables],
        unreadable=summary["unreadable"],
        identical=summary.get("identical", []),
        skipped=summary.get("skipped", []),
        empty=[
            (s, counts["pred"], counts["ref"], counts["both"])
            for s, counts in summary["empty"].items()
            if any(counts.values())
        ],
        boxes=figures.draw_boxes(_box_groups(rules, cases), {m: rules.columns[m] for m in rules.main_metrics}),
        agreement=figures.draw_agreement(volumes),
        calibration=figures.draw_calibration(calibration or {}),
        calibration_lines=[*describe_calibration(calibration), *doubts(calibration)] if calibration else [],
        curves=figures.draw_curves(records),
        legend=list(legend.items()),
        errors=list(figures.ERROR_COLOURS.items()),
        overlays=overlays,
        left_out=left_out,
        case_table=_case_table(rules, cases),
        config=json.dumps(config, indent=2) if config else "",
    )


def _draw_cases(
    rules: Rules,
    evaluation: Mapping[str, Any],
    chosen: Mapping[str, ScoredCase],
    config: Mapping[str, Any] | None,
    channels: Sequence[str],
    left_out: list[str],
) -> tuple[list[figures.Picture], dict[str, str]]:
    """Draw the chosen cases. For a case that cannot be drawn, add a message to ``left_out``.

    Returns:
        The pictures, and the legend: name -> colour.
    """
    jobs = _find_jobs(rules, evaluation, left_out) if chosen else {}
    views: list[tuple[str, str, View]] = []
    for role, case in chosen.items():
        try:
            job = jobs[case.case_id, case.attributes.get("task", "")]
            view = read_view(rules, job, config, channels, Path(evaluation["pred"]))
        except (UserError, KeyError, OSError) as error:
            left_out.append(f"No picture of {case.case_id}: {error}.")
            continue
        dice = ", ".join(f"{s} {number(_finite(v.get('dice')), 3)}" for s, v in case.values.items())
        scores = f"{rules.columns['dice'].title if 'dice' in rules.columns else 'Dice'}: {dice}"
        views.append((f"{role}: {case.case_id}", scores, view))
    # cases may have different structures, but a structure has the same colour in all pictures
    colours = figures.structure_colours(list(dict.fromkeys(name for _, _, view in views for name in view.ref)))
    pictures = [figures.draw_case(view, title, scores, colours) for title, scores, view in views]
    return pictures, {figures.LEGEND_NAMES.get(name, name): colour for name, colour in colours.items()}


def _finite(value: float | None) -> float | None:
    """Return the value, or None if it is not finite."""
    return value if value is not None and np.isfinite(value) else None


def _is_paper(row: Sequence[str]) -> bool:
    """Return whether a row of a table has scores of the paper."""
    return any("paper" in cell for cell in row[:2])


def _find_jobs(rules: Rules, evaluation: Mapping[str, Any], left_out: list[str]) -> dict[tuple[str, str], Job]:
    """Return (case id, task) -> job. If the jobs cannot be found, add a message to ``left_out``.

    The task is that of CHAOS, empty for other data sets.
    """
    try:
        jobs, _ = rules.jobs(Path(evaluation["pred"]), Path(evaluation["ref"]))
    except UserError as error:
        left_out.append(f"No pictures: {error}.")
        return {}
    return {(job.ref.case_id, job.attributes.get("task", "")): job for job in jobs if job.pred is not None}


def _facts(
    config: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    summary: Mapping[str, Any],
    environments: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, str]]:
    """Return names and values for the list at the top of the page."""
    facts = [
        ("predictions", evaluation["pred"]),
        ("references", evaluation["ref"]),
        ("rules", f"{summary['title']}, {summary['cases']} cases"),
    ]
    if config:
        facts.append(("network", describe_network(config["model"])))
        facts.append(("patch, batch", f"{' x '.join(map(str, config['data']['patch']))}, {config['data']['batch']}"))
    steps = [r for r in records if r["kind"] == "train"]
    best = max((r for r in records if r["kind"] == "validation"), key=lambda r: r["dice"], default=None)
    if steps:
        seconds = float(np.median([r["seconds_per_step"] for r in steps]))
        last = steps[-1]
        facts.append(("training", f"{last['step']} steps, {last['epoch']:.0f} epochs, {seconds:.2f} s per step"))
    if best:
        facts.append(("best validation", f"Dice {best['dice']:.3f} at step {best['step']}"))
    return [*facts, *((f"environment of {name}", _environment(entry)) for name, entry in environments.items())]


def _environment(entry: Mapping[str, Any]) -> str:
    """Return a recorded environment as one line of text."""
    packages = ", ".join(f"{name} {version}" for name, version in entry["packages"].items())
    return f"{entry['devices']}; {entry['machine']}; Python {entry['python']}, {packages}; {entry['time']}"


def _box_groups(rules: Rules, cases: Sequence[ScoredCase]) -> dict[str, list[ScoredCase]]:
    """Group cases for box plots by their first group in the rules, or into one group if the rules have none."""
    groups: dict[str, list[ScoredCase]] = {}
    for case in cases:
        groups.setdefault(next(iter(rules.groups(case.attributes)), "all"), []).append(case)
    return groups


def _case_table(rules: Rules, cases: Sequence[ScoredCase]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of all cases."""
    structures = list(dict.fromkeys(s for c in cases for s in c.values))
    shown = rules.main_metrics[:2]
    titles = {m: c.title + (f" ({c.unit})" if c.unit else "") for m, c in rules.columns.items()}
    header = ["case", *rules.attributes, *(f"{s} {titles[m]}" for s in structures for m in shown)]
    rows = []
    for case in sorted(cases, key=lambda c: (c.case_id, *c.attributes.values())):
        cells = [
            number(_finite(case.values.get(s, {}).get(m)), rules.columns[m].digits) for s in structures for m in shown
        ]
        rows.append([case.case_id, *(case.attributes.get(f, "") for f in rules.attributes), *cells])
    return header, rows


def choose_cases(cases: Sequence[ScoredCase], unreadable: Sequence[str]) -> tuple[dict[str, ScoredCase], list[str]]:
    """Choose the cases to draw, by their mean Dice over the structures.

    Args:
        cases: Scored cases. If a case has one result per task, the one with the most structures is used.
        unreadable: Ids of cases without a readable prediction. They are not drawn.

    Returns:
        The cases by the names in `ROLES`, each case only once; and messages about cases that are not drawn.
    """
    unique = results.unique_cases(cases)
    means: dict[str, float] = {}
    for name, case in unique.items():
        dice = [d for v in case.values.values() if (d := _finite(v.get("dice"))) is not None]
        if name not in unreadable and dice:
            means[name] = float(np.mean(dice))
    ranked = sorted(means, key=lambda name: (means[name], name))
    left_out = [f"{len(unreadable)} cases without a readable prediction are not drawn."] if unreadable else []
    chosen: dict[str, ScoredCase] = {}
    for role, share in sorted(ROLES, key=lambda r: -abs(r[1] - 0.5)):  # the extremes first
        if ranked:
            name = ranked[round(share * (len(ranked) - 1))]
            if all(name != c.case_id for c in chosen.values()):
                chosen[role] = unique[name]
    return {role: chosen[role] for role, _ in ROLES if role in chosen}, left_out


# -- pictures -----------------------------------------------------------------------------------------------------


def read_view(rules: Rules, job: Job, config: Mapping[str, Any] | None, channels: Sequence[str], pred: Path) -> View:
    """Read the images and label maps of a case for its picture.

    Args:
        rules: Rules of the evaluation.
        job: Label maps of the case.
        config: Config of the run; None if there is no run.
        channels: Names of the image channels.
        pred: Folder of the predictions.

    Raises:
        UserError: A file does not exist or cannot be read.
    """
    assert job.pred is not None, job.ref.case_id
    values, grid = job.ref.load()
    found, _ = job.prediction_with_grid().load()
    if found.shape != values.shape:
        raise UserError(f"{job.pred.path} has {found.shape} voxels, its reference {values.shape}; evaluate again")
    coding = find_coding(rules, job.ref, values, found)
    entry = DATASETS[config["data"]["dataset"]] if config else None
    images: dict[str, np.ndarray] = {}
    sources = _image_sources(job, pred)
    for i, source in enumerate(sources):
        array = read_image(source, job.ref.axes)[0]
        names = channels if len(channels) == array.shape[3] else channels[i : i + 1]
        for k in range(array.shape[3]):
            images[names[k] if k < len(names) else f"image {i + k + 1}"] = array[..., k]
    wanted = [name for name in (entry.shown_channels if entry else ()) if name in images] or list(images)[:2]
    shown = None if job.structures is None else set(job.structures)
    scored = coding.scored_voxels(values)
    pred_masks, ref_masks = coding.masks(found, job.pred.path), coding.masks(values, job.ref.path)
    return View(
        {name: images[name] for name in wanted if images[name].shape == values.shape},
        {name: mask & scored for name, mask in pred_masks.items() if shown is None or name in shown},
        {name: mask for name, mask in ref_masks.items() if shown is None or name in shown},
        grid.spacing,
        volumetric=rules.volumetric and (entry is None or entry.volumetric),
    )


def _image_sources(job: Job, pred: Path) -> list[Source]:
    """Return the images that the record of the prediction names, or else those next to the reference, if any."""
    recorded = results.read_prediction_record(pred).get("images", {}).get(job.ref.case_id, [])
    if recorded:
        return [source_from_json(value) for value in recorded]
    return [*_images_beside(job.ref.path)] if job.ref.grid is None else [job.ref.grid]


def _images_beside(reference: Path) -> list[Path]:
    """Return the images of a reference, from the first folder that has some.

    The folders are its own folder, if it is named ``case_seg`` or ``case_gt``, and the folders imagesTr, imagesTs and
    images next to its folder. An image belongs to the case if its name is the case id, optionally followed by ``_`` or
    ``-`` and a channel.
    """
    stem = strip_suffix(reference.name) or ""
    case = case_of_label(stem)
    folders = [reference.parent] if case != stem else []
    folders += [reference.parent.with_name(name) for name in ("imagesTr", "imagesTs", "images")]
    pattern = re.compile(rf"{re.escape(case)}([-_](?!seg$|gt$)[A-Za-z0-9]+)?")
    for folder in folders:
        found = {name: path for name, path in images_in(folder) if pattern.fullmatch(name) and path != reference}
        # the id of another case may begin with this one: patient P01, and its follow-up P01_2
        ending = reference.name.removeprefix(case)
        found = {n: p for n, p in found.items() if n == case or not reference.with_name(n + ending).exists()}
        if found:
            return [found[case]] if case in found else list(found.values())
    return []
