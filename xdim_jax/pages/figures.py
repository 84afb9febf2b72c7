"""The figures of a report: calibration, training curves, box plots, agreement of EF and volumes, and cases.

`render_template` puts the figures into an HTML page.
"""

import base64
import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xdim_jax.pages.colours import BLUE, GREEN, PALETTE, RED, YELLOW, to_grey, to_rgb
from xdim_jax.scoring.masks import bounding_box
from xdim_jax.scoring.rules import Column, Masks, ScoredCase

# colours of the structures of the three challenges, as in the paper
COLOURS = {
    "LV_endo": RED, "LV_epi": BLUE, "LA": GREEN,
    "liver": RED, "right kidney": YELLOW, "left kidney": BLUE, "spleen": GREEN,
    "WT": GREEN, "SNFH": GREEN, "TC": RED, "NETC": RED, "ET": YELLOW, "RC": BLUE,
}  # fmt: skip
# structures that are partly covered by others -> name in the legend, which describes the part that remains visible
LEGEND_NAMES = {"WT": "edema (of WT)", "TC": "necrosis / non-enhancing (of TC)", "LV_epi": "myocardium (of LV_epi)"}
ERROR_COLOURS = {"missed": "#ff00ff", "false positive": "#00ffff", "another structure": "#ff7f0e"}
_OPACITY = 0.55  # opacity of labels that are drawn over an image
_MARGIN = 4  # margin around the structures and the body in a picture, in voxels


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure for an HTML page.

    Attributes:
        png: PNG file in base64.
        alt: Alternative text.
        caption: Caption below the figure.
    """

    png: str
    alt: str
    caption: str


def encode_png(figure: Figure, alt: str, caption: str) -> Picture:
    """Return a Matplotlib figure as a picture for an HTML page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=figure.get_facecolor())
    return Picture(base64.b64encode(buffer.getvalue()).decode("ascii"), alt, caption)


def render_template(template: str, **values: Any) -> str:
    """Return the HTML page of a template in ``xdim_jax/pages/templates``.

    Args:
        template: File name of the template.
        values: Variables of the template; all of them are needed.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xdim_jax.pages", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def structure_colours(structures: Sequence[str]) -> dict[str, str]:
    """Return the colour of each structure: that in `COLOURS`, or else one of `PALETTE` that is not yet used."""
    known = {*ERROR_COLOURS.values(), *(COLOURS[name] for name in structures if name in COLOURS)}
    others = itertools.cycle([colour for colour in PALETTE if colour not in known] or PALETTE)
    return {name: COLOURS.get(name) or next(others) for name in structures}


# -- calibration --------------------------------------------------------------------------------------------------


def draw_calibration(found: Mapping[str, Any]) -> list[Picture]:
    """Draw reliability diagrams: the observed fraction of a structure's voxels against the predicted probability.

    Args:
        found: Content of ``calibration.json``, see `xdim_jax.scoring.calibration.calibrate`; empty if there is
            none.

    Returns:
        A list with one picture; empty if there is nothing to draw.
    """
    structures = found.get("structures", {})
    if not structures:
        return []
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="dashed", label="calibrated")
    colours = structure_colours(list(structures))
    for name, values in structures.items():
        points = [
            (p, y)
            for p, y in zip(values["bins"]["probability"], values["bins"]["fraction"], strict=True)
            if p is not None
        ]
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            color=colours[name],
            label=f"{name}, ECE {values['ece']['mean']:.3f}",
        )
    axes.set(xlabel="predicted probability", ylabel="fraction that belongs to the structure", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=9)
    caption = (
        f"Reliability: below the dashed line, probabilities are too high. {len(found['cases'])} cases; voxels in the "
        f"box around all structures with a margin of {found['margin']} voxels."
    )
    return [encode_png(figure, "reliability diagram", caption)]


# -- curves -------------------------------------------------------------------------------------------------------


def _to_float(value: Any) -> float:
    """Return a number from a record as float; records store NaN as None."""
    return math.nan if value is None else float(value)


def draw_curves(records: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draw loss, loss terms and learning rate against the epoch, and beside them training and validation Dice.

    Args:
        records: Records of a run, see `xdim_jax.runs.records.read_records`.

    Returns:
        A list with one picture; empty if the run has no training record.
    """
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        return []
    per_epoch = train[-1]["step"] / train[-1]["epoch"]
    validation = [r for r in records if r["kind"] == "validation"]
    epochs = [r["epoch"] for r in train]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss_axes, dice_axes = figure.subplots(1, 2)
    for name in ["loss", *sorted(k for k in train[0] if k.endswith("_loss"))]:
        values = [_to_float(r.get(name)) for r in train]
        loss_axes.plot(epochs, values, label=name.replace("_loss", " term"), lw=2 if name == "loss" else 1)
    loss_axes.set(xlabel="epoch", ylabel="loss", title="Loss", ylim=(0, None))
    rate_axes = loss_axes.twinx()
    rate_axes.plot(epochs, [r["learning_rate"] for r in train], color="#8a929b", ls=":", label="learning rate")
    rate_axes.set(yscale="log")
    loss_axes.legend(handles=[*loss_axes.get_lines(), *rate_axes.get_lines()], fontsize=8)
    structures = [k.removeprefix("score_") for k in train[-1] if k.startswith("score_")]
    for i, name in enumerate(structures):
        values = [_to_float(r.get(f"score_{name}")) for r in train]
        dice_axes.plot(epochs, values, color=f"C{i}", lw=1, alpha=0.7, label=f"{name} training")
        found = [(r["step"] / per_epoch, _to_float(r.get(f"dice_{name}"))) for r in validation]
        dice_axes.plot(
            [x for x, _ in found],
            [y for _, y in found],
            color=f"C{i}",
            marker="o",
            ms=4,
            lw=2,
            label=f"{name} validation",
        )
    dice_axes.set(xlabel="epoch", ylabel="Dice", title="Dice", ylim=(0, 1))
    dice_axes.legend(fontsize=8, loc="lower right", ncols=2)
    alt = f"loss from {_to_float(train[0]['loss']):.2f} to {_to_float(train[-1]['loss']):.2f}"
    alt += f"; last validation Dice {validation[-1]['dice']:.3f}" if validation else ""
    caption = "Training: means over the logging interval, on training patches. Validation: whole images."
    return [encode_png(figure, alt, caption)]


# -- scores over cases --------------------------------------------------------------------------------------------


def draw_boxes(groups: Mapping[str, Sequence[ScoredCase]], metrics: Mapping[str, Column]) -> list[Picture]:
    """Draw box plots over cases.

    Args:
        groups: Name of each group -> its scored cases.
        metrics: Metrics to draw, by name. A metric that no case has is omitted.

    Returns:
        A list with one picture, which has a panel for every metric, a box for every structure and group, and a dot for
        every case. The list is empty if there is nothing to draw.
    """
    structures = list(dict.fromkeys(s for cases in groups.values() for c in cases for s in c.values))
    shown = [m for m in metrics if any(m in v for cases in groups.values() for c in cases for v in c.values.values())]
    if not structures or not shown or max(map(len, groups.values())) < 2:  # a box needs at least two cases
        return []
    boxes = len(structures) * len(groups)
    figure = Figure(figsize=(10, 3.2 * len(shown)), layout="constrained")
    colours = structure_colours(structures)
    rng = np.random.default_rng(0)
    for axes, metric in zip(np.atleast_1d(np.asarray(figure.subplots(len(shown), 1))), shown, strict=True):
        position, names = 0, []
        for structure in structures:
            for group, cases in groups.items():
                values = [c.values[structure].get(metric, math.nan) for c in cases if structure in c.values]
                known = np.array([v for v in values if math.isfinite(v)])
                position += 1
                names.append(f"{structure}\n{group}" if len(groups) > 1 else structure)
                if not known.size:
                    continue
                axes.boxplot(known, positions=[position], widths=0.6, showfliers=False, medianprops={"color": "black"})
                spread = rng.uniform(-0.2, 0.2, known.size)
                axes.scatter(
                    position + spread, known, s=16, alpha=0.8, color=colours[structure], edgecolors="black", lw=0.4
                )
        c = metrics[metric]
        axes.set(ylabel=f"{c.title}{f' ({c.unit})' if c.unit else ''}", xlim=(0.3, boxes + 0.7))
        axes.set_xticks(range(1, boxes + 1), names, fontsize=8)
    alt = f"box plots of {', '.join(metrics[m].title for m in shown)}"
    return [
        encode_png(
            figure, alt, "Boxes: quartiles and median. Whiskers: up to 1.5 times the interquartile range. Dots: cases."
        )
    ]


def draw_agreement(values: Sequence[Mapping[str, float]]) -> list[Picture]:
    """Draw the agreement between prediction and reference in ejection fraction (EF) and volumes (EDV, ESV).

    Args:
        values: For each patient, the predicted values ``ef`` (%), ``edv`` and ``esv`` (ml), and the reference values
            ``ef_ref``, ``edv_ref`` and ``esv_ref``. Patients with a value that is not finite are omitted.

    Returns:
        A list with one picture of scatter plots and a Bland-Altman plot of EF; empty if no patient remains.
    """
    usable = [v for v in values if all(math.isfinite(v[f"{n}{s}"]) for n in ("ef", "edv", "esv") for s in ("", "_ref"))]
    if not usable:
        return []
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    ejection, volumes, bland = figure.subplots(1, 3)
    _scatter(ejection, usable, {"ef": ("EF", "C0")}, "%")
    _scatter(volumes, usable, {"edv": ("EDV", "C1"), "esv": ("ESV", "C2")}, "ml")
    pred, ref = (np.array([v[f"ef{s}"] for v in usable]) for s in ("", "_ref"))
    difference, mean = pred - ref, (pred + ref) / 2
    bias, sd = difference.mean(), difference.std(ddof=1) if len(usable) > 1 else 0.0
    bland.scatter(mean, difference, s=14, color="C0", alpha=0.7)
    for level, style in ((bias, "-"), (bias - 1.96 * sd, "--"), (bias + 1.96 * sd, "--")):
        bland.axhline(level, color="black", lw=1, ls=style)
        bland.annotate(
            f"{level:.1f}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    bland.set(xlabel="mean of both EF (%)", ylabel="prediction - reference (%)", title="Bland-Altman, EF")
    caption = "Bland-Altman: bias (line) and limits of agreement, bias ± 1.96 sd (dashed)."
    return [encode_png(figure, f"EF of {len(usable)} patients: bias {bias:.1f} %, sd {sd:.1f} %", caption)]


def _scatter(
    axes: Axes, values: Sequence[Mapping[str, float]], names: Mapping[str, tuple[str, str]], unit: str
) -> None:
    """Plot predicted values against reference values. ``names``: key of a quantity -> its title and colour."""
    for name, (title, colour) in names.items():
        ref, pred = [v[f"{name}_ref"] for v in values], [v[name] for v in values]
        axes.scatter(ref, pred, s=14, color=colour, alpha=0.7, label=title)
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, color="#8a929b", lw=1)
    axes.set(xlabel=f"reference ({unit})", ylabel=f"prediction ({unit})", xlim=ends, ylim=ends)
    axes.set_title(", ".join(title for title, _ in names.values()))
    axes.set_aspect("equal")
    if len(names) > 1:
        axes.legend(fontsize=8)


# -- cases --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """The arrays that the picture of a case shows.

    Attributes:
        images: Arrays (D, H, W) by title. If there are none, labels are drawn on black.
        pred: Predicted masks (D, H, W) by structure.
        ref: Reference masks (D, H, W) by structure.
        spacing: Spacing in mm along D, H, W.
        volumetric: True to draw three orthogonal planes, False to draw up to two slices. An image with a single slice
            is always drawn as one slice.
    """

    images: Mapping[str, np.ndarray]
    pred: Masks
    ref: Masks
    spacing: tuple[float, float, float]
    volumetric: bool


def label_map(masks: Masks, order: Sequence[str]) -> np.ndarray:
    """Return a label map (uint16): labels 1, 2, ... for the structures in ``order``, later ones over earlier ones."""
    label = np.zeros(next(iter(masks.values())).shape, np.uint16)
    for number, name in enumerate(order, 1):
        label[masks[name]] = number
    return label


def drawing_order(ref: Masks, pred: Masks) -> list[str]:
    """Return the structures by decreasing volume, so that inner structures are drawn over outer ones."""
    return sorted(ref, key=lambda name: -sum(int(np.count_nonzero(masks[name])) for masks in (ref, pred)))


def draw_case(view: View, title: str, scores: str, colours: Mapping[str, str]) -> Picture:
    """Draw image, reference, prediction and errors of a case side by side, with one row for each slice or plane.

    Args:
        view: The case.
        title: Title for the caption.
        scores: Scores of the structures as text, for the caption.
        colours: Colour of each structure, see `structure_colours`.
    """
    order = drawing_order(view.ref, view.pred)
    ref, pred = label_map(view.ref, order), label_map(view.pred, order)
    planes = _choose_planes(ref, pred, volumetric=view.volumetric)
    last = list(view.images)[-1] if view.images else ""
    back = view.images[last] if last else np.zeros(ref.shape, np.float32)
    box = _crop_box(back, ref, pred)
    columns = [*view.images, "reference", "prediction", "errors"]
    spacing = view.spacing
    heights, widths = [], []
    for axis, _ in planes:
        y, x = (a for a in range(3) if a != axis)
        heights.append((box[y].stop - box[y].start) * spacing[y])
        widths.append((box[x].stop - box[x].start) * spacing[x])
    size = 10 / len(columns)
    figure = Figure(
        figsize=(10, max(0.35 + sum(size * h / w for h, w in zip(heights, widths, strict=True)), 1.5)),
        layout="constrained",
        facecolor="black",
    )
    panels = np.atleast_2d(np.asarray(figure.subplots(len(planes), len(columns), squeeze=False)))
    errors = _error_map(ref, pred)
    for row, (axis, index) in enumerate(planes):
        y, x = (a for a in range(3) if a != axis)

        def cut(array: np.ndarray, axis: int = axis, index: int = index) -> np.ndarray:
            plane = np.take(array[box], index - box[axis].start, axis)
            return plane if axis == 0 else plane[::-1]  # superior on top

        for column, name in enumerate(columns):
            image = view.images.get(name, back)
            label, palette = {
                "reference": (cut(ref), [colours[s] for s in order]),
                "prediction": (cut(pred), [colours[s] for s in order]),
                "errors": (cut(errors), list(ERROR_COLOURS.values())),
            }.get(name, (None, []))
            panel = panels[row, column]
            shown = overlay_labels(cut(image), label, palette, image)
            panel.imshow(shown, aspect=spacing[y] / spacing[x], interpolation="nearest")
            panel.set_axis_off()
            if row == 0:
                panel.set_title(name, color="white", fontsize=9)
            if column == 0 and len(planes) > 1:
                plane_name = ("axial", "coronal", "sagittal")[axis] if view.volumetric else f"slice {index + 1}"
                panel.text(0.02, 0.02, plane_name, color="white", transform=panel.transAxes, fontsize=8)
    return encode_png(figure, f"{title}: image, reference, prediction and errors", f"{title}. {scores}.")


def _choose_planes(ref: np.ndarray, pred: np.ndarray, *, volumetric: bool) -> list[tuple[int, int]]:
    """Return axis and index of the planes to draw.

    For a volume, these are three planes, one perpendicular to each axis: the plane with the largest area of structures
    in the reference (in the prediction if the reference is empty). Otherwise, these are the slice chosen in this way,
    and the slice with the most errors, which may be the same.
    """
    if ref.shape[0] == 1:
        return [(0, 0)]
    shown = ref > 0 if ref.any() else pred > 0
    if not volumetric:
        largest, errors = int(np.argmax(shown.sum((1, 2)))), (ref != pred).sum((1, 2))
        return [(0, i) for i in dict.fromkeys((largest, int(np.argmax(errors)) if errors.any() else largest))]
    found = []
    for axis in (0, 2, 1):
        others = tuple(a for a in range(3) if a != axis)
        found.append((axis, int(np.argmax(shown.sum(others))) if shown.any() else shown.shape[axis] // 2))
    return found


def _crop_box(back: np.ndarray, *labels: np.ndarray) -> tuple[slice, ...]:
    """Return the box around all structures and the body, with a margin. Body: voxels unlike the image's first voxel."""
    mask = np.any([label > 0 for label in labels], 0) | (back != back.flat[0])
    return bounding_box(mask, _MARGIN) if mask.any() else tuple(slice(0, n) for n in back.shape)


def _error_map(ref: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Return a label map of the errors: the label 1, 2, ... for each kind of error in the order of `ERROR_COLOURS`."""
    return np.select([(ref > 0) & (pred == 0), (ref == 0) & (pred > 0), ref != pred], [1, 2, 3], 0).astype(np.uint8)


def overlay_labels(
    plane: np.ndarray, label: np.ndarray | None, palette: Sequence[str], image: np.ndarray | None = None
) -> np.ndarray:
    """Draw translucent labels over a grey plane.

    Args:
        plane: (H, W), see `xdim_jax.pages.colours.to_grey` for the grey values.
        label: Label map (H, W) with labels from 1, and 0 for background; None to draw the image alone.
        palette: Colours ``#rrggbb`` of the labels 1, 2, ...
        image: The whole image of the plane, from whose values CT is recognised; None for the plane itself.

    Returns:
        RGB (H, W, 3) from 0 to 1.
    """
    rgb = np.repeat(to_grey(plane, image)[..., None], 3, -1)
    if label is not None:
        for number, colour in enumerate(palette, 1):
            value = np.array(to_rgb(colour)) / 255
            mask = label == number
            rgb[mask] = (1 - _OPACITY) * rgb[mask] + _OPACITY * value
    return rgb
