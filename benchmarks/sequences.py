"""Compare a network in 2D + time with the 2D network from which it was inflated, on half sequences of CAMUS phantoms.

    python benchmarks/sequences.py --folder=runs/sequences

For every seed, a 2D network is trained on the frames at ED and ES. Then two networks start from it, and are trained for
the same number of epochs on the same half sequences: the 2D network on single frames, and the network in 2D + time
(configs/camus_sequence.py), which is inflated by the rule ``centre``. Both predict the half sequences of patients on
which neither was trained.

For every sequence: the mean Dice of all structures at ED, at ES, and over all frames; the mean Dice between consecutive
frames; and the roughness of the area curve of the ventricle, which is the mean absolute second difference of the area
over the frames, divided by the mean area. The last two are also given for the reference. The networks are compared by
`xdim_jax.scoring.paired.compare`, over all seeds and patients.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from xdim_jax.data.images.image import source_path
from xdim_jax.data.layouts.camus import REGIONS, dataset
from xdim_jax.data.phantom.camus import write_camus
from xdim_jax.data.phantom.common import Difficulty
from xdim_jax.scoring.paired import compare
from xdim_jax.scoring.rules import ScoredCase

REPO = Path(__file__).parent.parent
SHAPE = (128, 96)  # pixels of a phantom
SIZE = "--config.data.prepare.size=(96,96)"
NETWORKS = ("2D", "2D + time")


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean Dice over LV_endo, LV_epi and LA of two label maps; 1 for a structure that both lack."""
    x, y = REGIONS.encode(a), REGIONS.encode(b)
    both, total = np.logical_and(x, y).sum((0, 1)), x.sum((0, 1)) + y.sum((0, 1))
    return float(np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0).mean())


def consecutive(frames: np.ndarray) -> float:
    """Return the mean Dice between consecutive frames of a label map ``(frames, H, W)``."""
    return float(np.mean([mean_dice(a, b) for a, b in itertools.pairwise(frames)]))


def roughness(frames: np.ndarray) -> float:
    """Return the mean absolute second difference of the area of the ventricle, as a fraction of its mean area."""
    area = (frames == 1).sum((1, 2)).astype(float)
    return float(np.abs(np.diff(area, 2)).mean() / area.mean())


def measure(prediction: np.ndarray, reference: np.ndarray, ed: int, es: int) -> dict[str, float]:
    """Return all measures of a sequence.

    Args:
        prediction: Label map ``(frames, H, W)``.
        reference: Label map of the same shape.
        ed: Index of the frame at ED.
        es: Index of the frame at ES.
    """
    return {
        "Dice at ED": mean_dice(prediction[ed], reference[ed]),
        "Dice at ES": mean_dice(prediction[es], reference[es]),
        "Dice, all frames": float(np.mean([mean_dice(a, b) for a, b in zip(prediction, reference, strict=True)])),
        "Dice between consecutive frames": consecutive(prediction),
        "roughness of the area": roughness(prediction),
    }


def run(*arguments: object) -> None:
    """Run a command of the package; it skips what an earlier call has finished."""
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=REPO, check=True, stdout=subprocess.DEVNULL)


def train_and_predict(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Path]:
    """Train the networks of one seed, and return the folders of their predictions."""
    frames = folder / f"seed{seed}" / "frames"
    common = [f"--config.data.root={folder / 'train'}", f"--config.seed={seed}", "--config.train.overlays=0", SIZE]
    train = ("xdim_jax.train", *common)
    best = ["--config=configs/camus_best.py", "--config.data.patch=(96,96)"]
    run(*train, *best, f"--workdir={frames}", f"--config.train.epochs={options.frame_epochs}")
    # the same number of frames in a batch and in an epoch, the same learning rates
    tuned = [f"--config.init.weights={frames}", f"--config.train.epochs={options.epochs}"]
    tuned += ["--config.optim.schedule.peak=3e-4", "--config.optim.schedule.constant_epochs=0.0"]
    recipes = {
        "2D": [*best, "--config.data.instants=('half_sequence',)", "--config.data.batch=12"],
        "2D + time": ["--config=configs/camus_sequence.py", "--config.data.patch=(12,96,96)"],
    }
    found = {}
    for name, recipe in recipes.items():
        workdir = folder / f"seed{seed}" / name.replace(" + ", "_")
        run(*train, *recipe, *tuned, f"--workdir={workdir}")
        found[name] = workdir / "predictions"
        run("xdim_jax.predict", f"--workdir={workdir}", f"--input={folder / 'held_out'}", f"--output={found[name]}")
    return found


def read_label(path: Path) -> np.ndarray:
    """Read a label map as ``(frames, H, W)``."""
    return np.asarray(nib.load(path, mmap=False).dataobj).transpose(2, 1, 0)  # type: ignore[attr-defined]


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/sequences"), help="for phantoms and runs; default: %(default)s")
    add("--patients", type=int, default=30, help="for training; default: %(default)s")
    add("--held-out", type=int, default=20, help="patients that are predicted; default: %(default)s")
    add("--seeds", type=int, default=3, help="default: %(default)s")
    add("--noise", type=float, default=0.8, help="of the phantoms; default: %(default)s")
    add("--contrast", type=float, default=0.4, help="of the phantoms; default: %(default)s")
    add("--frame-epochs", type=int, default=32, help="of the first 2D network; default: %(default)s")
    add("--epochs", type=int, default=8, help="on sequences; default: %(default)s")
    options = parser.parse_args()
    folder = options.folder.absolute()
    difficulty = Difficulty(noise=options.noise, contrast=options.contrast)
    write_camus(folder / "train", cases=options.patients, shape=SHAPE, difficulty=difficulty)
    write_camus(folder / "held_out", cases=options.held_out, shape=SHAPE, difficulty=difficulty, first=1001)
    cases = dataset(views=("4CH",), instants=("half_sequence",)).scan(folder / "held_out", True).cases
    scored: dict[str, list[ScoredCase]] = {name: [] for name in (*NETWORKS, "reference")}
    for seed in range(options.seeds):
        predictions = train_and_predict(folder, seed, options)
        for case in cases:
            assert case.label is not None
            reference = read_label(source_path(case.label))
            maps = {n: read_label(path / f"{case.case_id}.nii.gz") for n, path in predictions.items()}
            for name, label in (maps | {"reference": reference}).items():
                values = measure(label, reference, int(case.info["ED"]) - 1, int(case.info["ES"]) - 1)
                table = {measure: {"value": value} for measure, value in values.items()}
                scored[name].append(ScoredCase(f"{case.case_id}_{seed}", case.patient, {}, table, {}))
    smooth = {d.structure: d.b for d in compare(scored["2D"], scored["reference"])}
    print("| | reference | 2D | 2D + time | difference | p (Holm) |\n|---|---|---|---|---|---|")
    rows = []
    for d in compare(scored["2D"], scored["2D + time"]):
        interval = f"{d.mean:+.4f} [{d.low:.4f}, {d.high:.4f}]"
        print(f"| {d.structure} | {smooth[d.structure]:.4f} | {d.a:.4f} | {d.b:.4f} | {interval} | {d.p_holm:.2g} |")
        rows.append(vars(d) | {"reference": smooth[d.structure]})
    (folder / "result.json").write_text(json.dumps({"options": vars(options), "rows": rows}, default=str, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
