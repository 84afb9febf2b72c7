"""Writes one self-contained HTML file: scores, training curves, and the best, median and worst case in three planes."""

import base64
import dataclasses
import importlib.metadata
import io
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
from matplotlib.figure import Figure

from xdim_jax import cli, log, results
from xdim_jax.data import brats
from xdim_jax.data.image import read_volume
from xdim_jax.data.prepare import nonzero_box
from xdim_jax.errors import UserError
from xdim_jax.files import read_json, write_json, write_text
from xdim_jax.regions import ED, ET, NCR

# the paper's colours (Fig. 7 and 12)
COLOURS = {ED: ("edema", "#2ca02c"), ET: ("enhancing tumour", "#ffd700"), NCR: ("necrosis / non-enhancing", "#d62728")}
_OPACITY = 0.55
_MARGIN = 4  # voxels around the brain

# Dice in percent on the BraTS 2022 validation set: WT, TC, ET
PAPER = {
    "dxnet": (
        "Table 6, DX-Net on the BraTS 2022 validation set",
        {
            "mean": (91.22, 84.77, 83.88),
            "median": (94.15, 93.46, 89.74),
            "25 % quantile": (90.08, 85.56, 83.49),
            "75 % quantile": (96.46, 96.48, 94.92),
        },
    ),
    "dsnet": (
        "Table 5, DS-Net on the BraTS 2022 validation set",
        {
            "mean": (91.69, 83.23, 81.75),
            "median": (93.45, 93.10, 89.17),
            "25 % quantile": (89.51, 83.89, 81.98),
            "75 % quantile": (96.09, 96.34, 94.11),
        },
    ),
}
_STATISTICS = {"mean": "mean", "sd": "sd", "median": "median", "25 % quantile": "q25", "75 % quantile": "q75"}


def describe_network(model: Mapping[str, Any]) -> str:
    """``dxnet, encoder efficientnet_b0, instance norm``; of DS-Net, the 2D network inside."""
    outer = model.get("inner", model)
    return f"{model['name']}, encoder {outer['encoder']['name']}, {outer['norm']} norm"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG in base64, with what it says in words."""

    png: str
    alt: str
    caption: str


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = cli.make_parser("xdim_jax.report", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the training run")
    parser.add_argument("--eval", required=True, type=Path, help="folder that xdim_jax.evaluate wrote")
    parser.add_argument("--out", required=True, type=Path, help="the HTML file to write")
    options = parser.parse_args(argv)
    config = cli.read_config(options.workdir)
    summary = read_json(options.eval / results.SUMMARY_FILE)
    compared = read_json(options.eval / results.EVALUATE_FILE)
    scores = results.read_cases(options.eval / results.CASES_FILE)
    html = render(
        config=config.to_dict(),
        records=log.read_records(options.workdir),
        summary=summary,
        scores=scores,
        compared=compared,
    )
    write_text(options.out, html)
    sources = {k: str(v.absolute()) for k, v in vars(options).items()}
    write_json(options.out.with_name(f"{options.out.stem}.report.json"), sources)
    log.say(f"report     {options.out.absolute()}")
    for structure, metrics in summary["structures"].items():
        log.say(f"Dice {structure}    {metrics['dice']['mean']:.3f}")
    return 0


def render(
    *,
    config: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    scores: results.Scores,
    compared: Mapping[str, Any],
) -> str:
    """The page. ``compared`` is what ``evaluate.json`` holds; the pictures are read from the files it names."""
    structures = list(summary["structures"])
    table = summary["structures"]
    paper_source, paper = PAPER.get(config["model"]["name"], ("", {}))
    chosen, left_out = choose_cases(scores, summary["unreadable"])
    overlays = []
    for role, case in chosen.items():
        try:
            overlays.append(draw_case(role, case, scores[case], compared))
        except (UserError, KeyError) as error:
            left_out.append(f"No picture of {case}: {error}.")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xdim_jax", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    phantom = not config["data"]["root"]
    return environment.get_template("report.html.j2").render(
        title=f"{config['model']['name']} on {config['data']['dataset']}" + (" phantoms" if phantom else ""),
        lead=("Synthetic cases: these scores show that the program works, not how well it segments patients." if phantom
              else f"{compared['pred']} against {compared['ref']}"),
        facts=_facts(config, records, compared),
        structures=structures,
        cases=summary["cases"],
        rules=summary["rules"],
        unreadable=summary["unreadable"],
        dice_rows=[
            [name, *(results.percent(table[s]["dice"][key]) for s in structures)] for name, key in _STATISTICS.items()
        ],
        paper_rows=[[f"paper, {name}", *(f"{v:.2f}" for v in row)] for name, row in paper.items()],
        paper_source=paper_source,
        metric_rows=_metric_rows(table),
        curves=draw_curves(records, structures),
        legend=list(COLOURS.values()),
        overlays=overlays,
        left_out=" ".join(left_out),
        case_rows=[
            [case, *(f"{regions[s][m]:.{d}f}" for s in structures for m, d in (("dice", 3), ("hd95", 1)))]
            for case, regions in sorted(scores.items())
        ],
        config=json.dumps(config, indent=2),
    )  # fmt: skip


def _facts(
    config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], compared: Mapping[str, Any]
) -> list[tuple[str, str]]:
    steps = [r for r in records if r["kind"] == "train"]
    best = max((r for r in records if r["kind"] == "validation"), key=lambda r: r["dice"], default=None)
    facts = [
        ("predictions", compared["pred"]),
        ("references", compared["ref"]),
        ("network", describe_network(config["model"])),
        ("patch, batch", f"{' x '.join(map(str, config['data']['patch']))}, {config['data']['batch']}"),
    ]
    if steps:
        seconds = float(np.median([r["seconds_per_step"] for r in steps]))
        facts.append(
            ("training", f"{steps[-1]['step']} steps, {steps[-1]['epoch']:.0f} epochs, {seconds:.2f} s a step")
        )
    if best:
        facts.append(("best validation", f"Dice {best['dice']:.3f} at step {best['step']}"))
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "optax", "numpy"))
    return [*facts, ("written with", f"{versions}; Python {platform.python_version()}")]


def _metric_rows(table: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for metric, digits in (("dice", 3), ("hd95", 2), ("sensitivity", 3), ("specificity", 4)):
        row = [metric]
        for values in table.values():
            v = values[metric]
            spread = "" if v["sd"] is None else f" \u00b1 {v['sd']:.{digits}f}"
            row += [f"{v['mean']:.{digits}f}{spread}", f"{v['median']:.{digits}f}"]
        rows.append(row)
    return rows


def choose_cases(scores: results.Scores, unreadable: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Best, median and worst case by mean Dice over the structures (fewer for fewer cases), and what was left out."""
    means = {
        case: float(np.mean([r["dice"] for r in regions.values()]))
        for case, regions in scores.items()
        if case not in unreadable
    }
    ranked = sorted(means, key=lambda case: (-means[case], case))
    left_out = [f"{len(unreadable)} cases without a readable prediction have no picture."] if unreadable else []
    if not ranked:
        return {}, left_out
    roles = {"Best": ranked[0], "Median": ranked[(len(ranked) - 1) // 2], "Worst": ranked[-1]}
    return {
        role: case for i, (role, case) in enumerate(roles.items()) if case not in list(roles.values())[:i]
    }, left_out


# -- pictures -----------------------------------------------------------------------------------------------------


def _encode(figure: Figure, alt: str, caption: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=figure.get_facecolor())
    return Picture(base64.b64encode(buffer.getvalue()).decode("ascii"), alt, caption)


def draw_curves(records: Sequence[Mapping[str, Any]], structures: Sequence[str]) -> list[Picture]:
    """Loss with its two parts and learning rate, and Dice in training and validation, over epochs."""
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        return []
    per_epoch = train[-1]["step"] / train[-1]["epoch"]
    validation = [r for r in records if r["kind"] == "validation"]
    epochs = [r["epoch"] for r in train]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss_axes, dice_axes = figure.subplots(1, 2)
    parts = ["loss", *sorted(k for k in train[0] if k.endswith("_loss"))]
    for name in parts:
        loss_axes.plot(
            epochs, [r[name] for r in train], label=name.replace("_loss", " term"), lw=2 if name == "loss" else 1
        )
    loss_axes.set(xlabel="epoch", ylabel="loss", title="Loss", ylim=(0, None))
    rate_axes = loss_axes.twinx()
    rate_axes.plot(epochs, [r["learning_rate"] for r in train], color="#8a929b", ls=":", label="learning rate")
    rate_axes.set(ylabel="learning rate", yscale="log")
    handles = [*loss_axes.get_lines(), *rate_axes.get_lines()]
    loss_axes.legend(handles=handles, fontsize=8)
    for i, name in enumerate(structures):
        dice_axes.plot(
            epochs, [r[f"score_{name}"] for r in train], color=f"C{i}", lw=1, alpha=0.7, label=f"{name} training"
        )
        values = [r[f"dice_{name}"] for r in validation]
        at = [r["step"] / per_epoch for r in validation]
        dice_axes.plot(at, values, color=f"C{i}", marker="o", lw=2, label=f"{name} validation")
    dice_axes.set(
        xlabel="epoch", ylabel="Dice", title="Dice (training: patches; validation: whole volumes)", ylim=(0, 1)
    )
    dice_axes.legend(fontsize=8, loc="lower right", ncols=2)
    last = validation[-1]["dice"] if validation else None
    alt = f"loss falls from {train[0]['loss']:.2f} to {train[-1]['loss']:.2f}"
    alt += f"; last validation Dice {last:.3f}" if last is not None else ""
    return [_encode(figure, alt, "Training values are means over the logging interval.")]


def draw_case(role: str, case: str, scores: Mapping[str, Mapping[str, float]], compared: Mapping[str, Any]) -> Picture:
    """Three planes of a case: T2, T1ce, and T1ce under the reference and under the prediction.

    Raises:
        UserError: a file is gone or cannot be read.
    """
    pred_folder = Path(compared["pred"])
    images = read_json(pred_folder / results.PREDICT_FILE)["images"][case]
    convention = brats.get_convention(compared["convention"])
    named = dict(zip(brats.MODALITIES, images, strict=True))
    t1ce, grid = read_volume(Path(named["t1ce"]))
    t2, _ = read_volume(Path(named["t2"]))
    maps = {}
    for name, path in (("reference", Path(compared["labels"][case])), ("prediction", pred_folder / f"{case}.nii.gz")):
        values, _ = read_volume(path)
        maps[name] = convention.labels.decode(values)[0]
    shown = maps["reference"] if maps["reference"].any() else maps["prediction"]
    box = tuple(slice(max(b.start - _MARGIN, 0), b.stop + _MARGIN) for b in nonzero_box(np.stack([t1ce, t2], -1)))
    figure = Figure(figsize=(10, 7.6), layout="constrained", facecolor="black")
    axes = figure.subplots(3, 4)
    for row, (plane, axis) in enumerate((("axial", 0), ("sagittal", 2), ("coronal", 1))):
        others = tuple(a for a in range(3) if a != axis)
        index = int(np.argmax((shown > 0).sum(others))) if shown.any() else shown.shape[axis] // 2

        def cut(volume: np.ndarray, axis: int = axis, index: int = index) -> np.ndarray:
            flat = np.take(volume[box], index - box[axis].start, axis)
            return flat if axis == 0 else flat[::-1]  # superior on top

        height, width = (grid.spacing[a] for a in others)
        for column, (title, volume, labels) in enumerate(
            (
                ("T2", t2, None),
                ("T1ce", t1ce, None),
                ("reference", t1ce, "reference"),
                ("prediction", t1ce, "prediction"),
            )
        ):
            panel = axes[row, column]
            picture = shade(cut(volume), cut(maps[labels]) if labels else None)
            panel.imshow(picture, aspect=height / width, interpolation="nearest")
            panel.set_axis_off()
            if row == 0:
                panel.set_title(title, color="white")
            if column == 0:
                panel.text(0.02, 0.02, plane, color="white", transform=panel.transAxes, fontsize=9)
    dice = ", ".join(f"{name} {values['dice']:.3f}" for name, values in scores.items())
    return _encode(figure, f"{case} in three planes", f"{role}: {case}. Dice {dice}.")


def shade(image: np.ndarray, label: np.ndarray | None) -> np.ndarray:
    """Grey image (1st to 99.5th percentile of its non-zero values) under translucent tissues: RGB in [0, 1]."""
    inside = image[image != 0]
    low, high = np.percentile(inside, [1, 99.5]) if inside.size else (0.0, 1.0)
    grey = np.clip((image.astype(np.float32) - low) / max(float(high - low), 1e-6), 0, 1) * (image != 0)
    rgb = np.repeat(grey[..., None], 3, -1)
    if label is not None:
        for tissue, (_, colour) in COLOURS.items():
            value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            mask = label == tissue
            rgb[mask] = (1 - _OPACITY) * rgb[mask] + _OPACITY * value
    return rgb


def command() -> NoReturn:
    """The console entry point."""
    cli.run(main)


if __name__ == "__main__":
    command()
