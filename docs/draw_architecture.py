"""Draw docs/architecture.png: the folders in the order of their imports, and three paths through them.

python docs/draw_architecture.py
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROWS = [  # from the bottom up: (folder, what it has) from left to right
    [("base", "errors, files, configs,\nsignals, terminal lines")],
    [("data", "files, cases, layouts,\npreparation, batches"), ("ops", "convolutions, norms,\ncompilation"),
     ("runs", "workdir, records,\ntraining state, checkpoints")],
    [("scoring", "metrics, challenge rules,\ntables, comparison"),
     ("nets", "layers, encoders, networks,\ninflation, weights")],
    [("pages", "figures, HTML reports"), ("inference", "windows, output,\nmodel, predictor")],
    [("weight_port", "PyTorch weights to ours and back")],
    [("training", "loss, optimiser, step, devices,\nthe loop, folds, packs")],
    [("sweeps", "search spaces,\ntrials, workers"), ("studies", "plans, runs,\nstatistics"),
     ("planning", "recipes for\nyour own data")],
    [("entry points", "train, predict, evaluate, compare, report, submit, plan, sweep, study, doctor, verify_run")],
    [("fit", "all steps, from a folder of cases to a report")],
]  # fmt: skip
COLOURS = {"image": "#1b7f4b", "kernel": "#b3541e", "config": "#3456a8"}
WIDTH, HEIGHT, GAP = 12.0, 0.92, 0.34


def main() -> None:
    """Draw the picture."""
    figure = Figure(figsize=(10.5, 9.4), layout="constrained")
    axes = figure.add_subplot()
    for row, boxes in enumerate(ROWS):
        wide = (WIDTH - 0.3 * (len(boxes) - 1)) / len(boxes)
        for column, (name, text) in enumerate(boxes):
            x, y = column * (wide + 0.3), row * (HEIGHT + GAP)
            axes.add_patch(
                FancyBboxPatch(
                    (x, y), wide, HEIGHT, boxstyle="round,pad=0.02", facecolor="#f3f4f6", edgecolor="#9aa3ad"
                )
            )
            axes.text(x + 0.15, y + HEIGHT / 2, name, va="center", ha="left", fontsize=12, fontweight="bold")
            axes.text(x + wide - 0.15, y + HEIGHT / 2, text, va="center", ha="right", fontsize=8.5, color="#333333")
    top = len(ROWS) * (HEIGHT + GAP) - GAP
    axes.annotate(
        "", (12.55, 0.1), (12.55, top - 0.1), arrowprops={"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.6}
    )
    axes.text(12.7, top / 2, "imports go down only", rotation=270, va="center", fontsize=10, color="#555555")
    ways = {
        "image": "file - data (read, prepare, batch) - training (augment, step) - nets - inference (windows) - file",
        "kernel": "PyTorch file - weight_port (names) - nets (inflate, load) - training (start) - runs (checkpoint)",
        "config": "configs/*.py - base (load, override) - training (check) - a section to each user - runs (workdir)",
    }
    for line, (name, text) in enumerate(ways.items()):
        y = -0.55 - 0.45 * line
        axes.text(0, y, name, fontsize=10.5, fontweight="bold", color=COLOURS[name], va="center")
        axes.text(1.15, y, text.replace(" - ", "  →  "), fontsize=8.6, color=COLOURS[name], va="center")
    axes.set_xlim(-0.15, 13.1)
    axes.set_ylim(-1.75, top + 0.15)
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("architecture.png"), dpi=110)


if __name__ == "__main__":
    main()
