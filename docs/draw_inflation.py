"""Draw docs/inflation.png: the 3D kernel that each inflation rule makes, and the error of the inflated encoder.

    python docs/draw_inflation.py --weights=b0.safetensors --out=docs/inflation.png

The weights are a 2D EfficientNet encoder written by weight_port. Left: one 5x5 kernel of its third stage and the five
slices that each rule gives. Right: the relative error of the 3D encoder's features on a volume with 64 identical
slices, for each slice, against the 2D encoder's features of that slice.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from xdim_jax.base.files import atomic_path
from xdim_jax.inference.model import make_model
from xdim_jax.nets.inflate import Inflation, inflate_kernel
from xdim_jax.nets.layers import Depth
from xdim_jax.nets.weights import adapt_encoder, read_weights

LAYER, CHANNEL = "blocks.2.1.conv_dw.kernel", 100  # of 240 channels; in the second third, which acs rotates
ROWS = [
    ("mean", {}),
    ("repeat", {}),
    ("centre", {}),
    ("gaussian", {"sigma": 1.0}),
    ("spacing", {"spacing": 2.0}),
    ("acs", {}),
    ("random", {"seed": 1}),
]
LEVEL = 1  # feature level of the right panel: 1/4 of the input size
CURVES = [
    ("mean", "zero", "#d62728", "-"),
    ("repeat_uncorrected", "edge", "#9467bd", "-"),
    ("random", "edge", "#7f7f7f", "-"),
    ("mean", "edge", "#1f77b4", "-"),
    ("repeat", "renorm", "#2ca02c", "--"),
    ("centre", "zero", "#ff7f0e", ":"),
]
SIZE, DEPTH = 64, 64


def main() -> None:
    """Read the weights, run the encoders and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    flat = read_weights(options.weights)
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    draw_kernels(left, flat)
    draw_errors(right, flat)
    with atomic_path(options.out) as temporary:
        figure.savefig(temporary, dpi=110)


def draw_kernels(figure, flat) -> None:
    """Draw the 2D kernel and one row of five slices per rule, all with one colour scale."""
    kernel = flat.arrays[LAYER]
    limit = float(np.abs(kernel[..., CHANNEL]).max())
    axes = figure.subplots(len(ROWS), 6)
    for row, (rule, extra) in zip(axes, ROWS, strict=True):
        if rule == "random":
            deep = inflated(flat, rule, "zero", **extra).arrays[LAYER]
        else:
            deep = inflate_kernel(kernel, 5, axis=0, rule=rule, **{k: v for k, v in extra.items() if k != "seed"})
        pictures = [kernel[..., 0, CHANNEL], *deep[..., 0, CHANNEL]]
        for column, (axis, picture) in enumerate(zip(row, pictures, strict=True)):
            axis.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            if column == 0:
                label = rule + "".join(f"\n({k} {v:g})" for k, v in extra.items() if k != "seed")
                axis.set_ylabel(label, rotation=0, ha="right", va="center")
    titles = ["2D kernel", *(f"slice {i}" for i in range(5))]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.suptitle(f"{LAYER}, channel {CHANNEL}: five slices along depth", fontsize=10)


def draw_errors(figure, flat) -> None:
    """Draw the relative error per slice on a volume of identical slices."""
    image = np.random.default_rng(0).standard_normal((1, SIZE, SIZE, 3)).astype(np.float32)
    volume = np.repeat(image[:, None], DEPTH, 1)
    exact = np.asarray(make_model(flat, "2D").features(image)[LEVEL])
    axis = figure.subplots()
    for rule, padding, colour, line in CURVES:
        found = np.asarray(make_model(inflated(flat, rule, padding), "3D").features(volume)[LEVEL])
        error = [np.abs(found[:, d] - exact).max() / np.abs(exact).max() for d in range(found.shape[1])]
        axis.semilogy(np.maximum(error, 1e-9), line, color=colour, label=f"{rule}, {padding} padding")
    axis.axhline(np.finfo(np.float32).eps, color="k", linewidth=0.5)
    axis.text(0, np.finfo(np.float32).eps * 1.1, "float32 rounding", fontsize=8, va="bottom")
    axis.set(
        xlabel=f"slice of the feature at 1/{2 ** (LEVEL + 1)}", ylabel="largest error / largest value", ylim=(1e-8, 1e4)
    )
    axis.legend(fontsize=8, ncols=2, loc="upper center")
    axis.set_title(f"3D encoder on {DEPTH} identical slices against the 2D encoder", fontsize=10)


def inflated(flat, rule: str, padding: str, **options):
    """Return the encoder inflated to 3D."""
    section = {**flat.model, "ndim": 3, "depth": dataclasses.asdict(Depth(padding=padding))}
    return adapt_encoder(flat, section, inflation=Inflation(rule, **options))[0]


if __name__ == "__main__":
    main()
