"""Draw docs/phantoms.png: synthetic cases of the three data sets, read by the functions that training uses.

python docs/draw_phantoms.py --out=docs/phantoms.png
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from xdim_jax.base.files import atomic_path
from xdim_jax.data import phantom
from xdim_jax.data.case import Case, list_cases
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.reading import read_case
from xdim_jax.pages.colours import PALETTE
from xdim_jax.pages.figures import overlay_labels


def show(
    axes, case: Case, title: str, *, channel: int = 0, height: float = 0.5, window=None, label: bool = False
) -> None:
    """Draw one slice at the fraction ``height`` of the depth; ``label`` overlays the reference."""
    volume = read_case(case)
    assert volume.label is not None
    k = int(height * (len(volume.image) - 1))
    image = volume.image[k, ..., channel]
    image = image if window is None else np.clip(image, *window)
    rgb = overlay_labels(image, volume.label[k] if label else None, PALETTE)
    axes.imshow(rgb, aspect=volume.grid.spacing[1] / volume.grid.spacing[2])
    axes.set_title(title, fontsize=9, color="white")
    axes.set_axis_off()


def main() -> None:
    """Write phantoms into a temporary folder and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure = Figure(figsize=(12, 8.4), layout="constrained", facecolor="black")
    rows = figure.subplots(3, 5)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        phantom.write_camus(root / "camus", cases=1)
        phantom.write_chaos(root / "chaos", cases=1)
        phantom.write_brats(root / "brats", cases=1)
        camus = {
            c.case_id[12:]: c for c in list_cases(get_dataset({"dataset": "camus"}), root / "camus", need_labels=True)
        }
        for axes, (view, label) in zip(
            rows[0],
            (("2CH_ED", False), ("2CH_ED", True), ("4CH_ED", False), ("4CH_ED", True), ("4CH_ES", True)),
            strict=True,
        ):
            show(axes, camus[view], f"CAMUS {view.replace('_', ' ')}", label=label)
        data = {"dataset": "chaos", "task": 4, "phase": "each"}
        chaos = {c.case_id: c for c in list_cases(get_dataset(data), root / "chaos", need_labels=True)}
        for axes, (case, title, label) in zip(
            rows[1],
            (
                ("CT_1", "CHAOS CT", True),
                ("MR_1_T1DUAL_in", "MR T1 in-phase", False),
                ("MR_1_T1DUAL_out", "MR T1 out-phase", False),
                ("MR_1_T2SPIR", "MR T2-SPIR", False),
                ("MR_1_T2SPIR", "MR T2-SPIR", True),
            ),
            strict=True,
        ):
            show(axes, chaos[case], title, height=0.42, window=(-160, 240) if case == "CT_1" else None, label=label)
        data = {"dataset": "brats", "convention": "brats2021"}
        (brats,) = list_cases(get_dataset(data), root / "brats", need_labels=True)
        reference = read_case(brats).label
        assert reference is not None
        height = float(np.argmax((reference > 0).sum((1, 2)))) / (len(reference) - 1)
        for c, (axes, title) in enumerate(zip(rows[2], ("FLAIR", "T1", "T1ce", "T2", "T1ce"), strict=True)):
            show(axes, brats, f"BraTS {title}", channel=min(c, 3) if c < 4 else 2, height=height, label=c == 4)
    with atomic_path(options.out) as temporary:
        figure.savefig(temporary, dpi=72, facecolor="black", format="png")


if __name__ == "__main__":
    main()
