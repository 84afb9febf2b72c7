"""The page of a planned recipe: statistics of the data, and the reason for every choice."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from xdim_jax.data.fingerprint import PERCENTILES, Fingerprint
from xdim_jax.pages.figures import Picture, encode_png, render_template, structure_colours
from xdim_jax.planning.choices import Choices
from xdim_jax.scoring.tables import Table

_NAMES = {
    "network": "network",
    "spacing": "spacing (D, H, W in mm; 0: unchanged)",
    "normalise": "intensities",
    "patch": "patch",
    "batch": "batch",
    "strides": "depth strides",
    "foreground": "probability that a patch is placed on a voxel of a structure",
    "pretrained": "initial weights",
    "rule": "inflation rule",
    "output": "output",
    "dice": "Dice in the loss",
    "mirror": "flips",
    "peak": "learning rate",
    "epochs": "epochs",
    "folds": "folds",
    "precision": "precision",
}


def render(found: Fingerprint, choices: Choices, recipe: str, root: Path) -> str:
    """Return the page as HTML.

    Args:
        found: Fingerprint of the data set.
        choices: The choices.
        recipe: Text of the recipe.
        root: Folder of the data.
    """
    facts = {
        "data": str(root.absolute()),
        "cases": f"{len(found.cases)} of {len(found.patients)} patients",
        "channels": ", ".join(found.channels),
        "structures": ", ".join(found.structures),
        "fingerprint": found.digest,
        "warnings": "; ".join(choices.notes),
    }
    return render_template(
        "plan.html.j2",
        title=f"Planned recipe for {root.name}",
        facts=[(name, value) for name, value in facts.items() if value],
        pictures=[draw_grids(found), draw_intensities(found), draw_structures(found)],
        tables=[choice_table(choices), structure_table(found)],
        recipe=recipe,
    )


def choice_table(choices: Choices) -> Table:
    """Return a table of the choices and their reasons."""
    rows = [(title, _value(choices, name), choices.reasons.get(name, "")) for name, title in _NAMES.items()]
    return Table("Choices", ("setting", "value", "reason"), tuple(r for r in rows if r[1]), "")


def _value(choices: Choices, name: str) -> str:
    prepare = choices.prepare
    special = {
        "spacing": ", ".join(f"{s:g}" for s in prepare["spacing"]),
        "normalise": f"{prepare['normalise']}, crop {prepare['crop']}"
        + (f", window {prepare['window']}, CT mean and sd {prepare['ct_statistics']}" if prepare["window"] else ""),
        "pretrained": "ImageNet" if choices.pretrained else "random",
        "mirror": "none" if choices.mirror == () else "default axes",
        "epochs": f"{choices.epochs} of {choices.epoch_steps} steps",
        "patch": " x ".join(map(str, choices.patch)),
        "strides": ", ".join(map(str, choices.strides)),
    }
    return special.get(name, str(getattr(choices, name, "")))


def structure_table(found: Fingerprint) -> Table:
    """Return a table of the structures: cases, volumes, components."""
    rows = []
    for name in found.structures:
        volumes = found.volume(name)
        parts = [f["structures"][name] for f in found.cases.values() if name in f["structures"]]
        rows.append(
            (
                name,
                f"{len(parts)} of {len(found.cases)}",
                f"{np.median(volumes):.3g} ({min(volumes):.3g} to {max(volumes):.3g})" if volumes else "-",
                f"{100 * found.share(name):.2g} %",
                f"{np.median([p['components'] for p in parts]):.0f}" if parts else "-",
                f"{np.median([p['largest'] for p in parts]):.3g}" if parts else "-",
            )
        )
    header = (
        "structure",
        "cases",
        "volume in ml: median (range)",
        "% of the image",
        "components",
        "fraction of the largest component",
    )
    return Table("Structures", header, tuple(rows), "Medians over the cases in which a structure occurs.")


def draw_grids(found: Fingerprint) -> Picture:
    """Draw histograms of the number of voxels and the voxel size along every axis."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(2, 3)
    for row, (values, unit) in enumerate(((found.size, "voxels"), (found.spacing, "mm"))):
        for axis in range(3):
            # equal voxel sizes may differ by rounding errors, for which there are no bins
            _histogram(panels[row, axis], np.array([float(f"{v:.6g}") for v in values[:, axis]]))
            panels[row, axis].set_xlabel(f"{unit} along {'DHW'[axis]}")
    return encode_png(figure, "Histograms of sizes and voxel sizes", "Number of voxels, and voxel size, of all cases.")


def _histogram(axes: object, values: np.ndarray) -> None:
    axes.hist(values, bins=min(20, max(5, int(math.sqrt(len(values)) * 2))), color="#4878a8")  # pyright: ignore
    axes.set_ylabel("cases")  # pyright: ignore


def draw_intensities(found: Fingerprint) -> Picture:
    """Draw the cumulative distribution of the intensities of every channel, for all voxels and for labelled voxels."""
    figure = Figure(figsize=(max(3.4 * len(found.channels), 5), 3), layout="constrained")
    panels = figure.subplots(1, len(found.channels), squeeze=False)[0]
    for index, (axes, name) in enumerate(zip(panels, found.channels, strict=True)):
        for kind, colour, label in (("image", "#888888", "all voxels"), ("foreground", "#c04040", "labelled voxels")):
            levels = [found.percentile(index, level, kind) for level in PERCENTILES]
            axes.plot(levels, PERCENTILES, color=colour, label=label)
        low, high = (found.percentile(index, level, "image") for level in (0.5, 99.5))
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
        axes.set(title=name, xlabel="intensity")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("% of voxels below")
    panels[0].legend(fontsize=8)
    caption = "Cumulative distribution of the intensities; every case has the same weight."
    return encode_png(figure, "Distribution of intensities", caption)


def draw_structures(found: Fingerprint) -> Picture:
    """Draw the volumes of all structures, one dot for each case."""
    names: Sequence[str] = [name for name in found.structures if found.having(name)]
    colours = structure_colours(found.structures)
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        volumes = np.array(found.volume(name))
        offsets = np.linspace(-0.25, 0.25, len(volumes)) if len(volumes) > 1 else np.zeros(1)
        axes.scatter(volumes, row + offsets, s=14, alpha=0.7, color=colours[name])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="volume in ml", xscale="log")
    axes.grid(alpha=0.3, axis="x")
    return encode_png(figure, "Volumes of the structures", "Volume of every structure; one dot for each case.")
