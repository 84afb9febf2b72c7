"""Measure the time of HD95, the 95th percentile of surface distances, and compare it with two other implementations.

    python benchmarks/distances.py [--scattered=20] [--repeat=3]

The masks are three balls of different size in 240 x 240 x 155 voxels. The other implementations are DeepMind's
surface-distance, and distance maps of the whole volume, as in MedPy. All of them run in this process. The values of the
distance maps must equal ours; those of surface-distance differ, because it weights distances by area.
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter, generate_binary_structure

from xdim_jax.scoring import masks

SHAPE = (155, 240, 240)


def main() -> int:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scattered", type=int, default=20, help="number of small false positives in the prediction")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    pairs = [(_tumour(r, 1, options.scattered), _tumour(r, 2, 0)) for r in (14, 20, 29)]
    print("voxels of the reference:", *(int(g.sum()) for _, g in pairs))
    implementations = {"ours": _ours, "surface-distance": _surfels, "whole distance maps": _maps}
    best: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    for _ in range(options.repeat):  # alternately, so that other load affects all of them
        for name, hd95 in implementations.items():
            seconds, values[name] = _timed(hd95, pairs)
            best[name] = min(best.get(name, seconds), seconds)
    for name, seconds in best.items():
        found = ", ".join(f"{v:.3f}" for v in values[name])
        print(f"{name:20} {seconds:6.2f} s, {seconds / best['ours']:5.1f} x  ({found} mm)")
    return 0 if np.allclose(values["ours"], values["whole distance maps"]) else 1


def _tumour(radius: float, seed: int, scattered: int) -> np.ndarray:
    """Return the mask of a ball with an uneven surface, and of ``scattered`` cubes of 27 voxels."""
    rng = np.random.default_rng(seed)
    place = np.meshgrid(*(np.arange(n) - n / 2 for n in SHAPE), indexing="ij", sparse=True)
    noise = gaussian_filter(rng.normal(size=SHAPE), 4)
    mask = np.sqrt(sum(p**2 for p in place)) + 3 * noise / noise.std() < radius
    for _ in range(scattered):
        z, y, x = (int(rng.integers(20, n - 20)) for n in SHAPE)
        mask[z : z + 3, y : y + 3, x : x + 3] = True
    return mask


def _timed(hd95: Callable[[np.ndarray, np.ndarray], float], pairs: list) -> tuple[float, list[float]]:
    """Return the seconds and the results of an implementation for all pairs of masks."""
    begin = time.perf_counter()
    values = [hd95(p, g) for p, g in pairs]
    return time.perf_counter() - begin, values


def _ours(p: np.ndarray, g: np.ndarray) -> float:
    """Return HD95 as this package computes it."""
    return masks.measure(masks.Pair(p, g), ["hd95_pooled"])["hd95_pooled"]


def _surfels(p: np.ndarray, g: np.ndarray) -> float:
    """Return HD95 of surface-distance."""
    return masks.measure(masks.Pair(p, g), ["hd95_surfel"])["hd95_surfel"]


def _maps(p: np.ndarray, g: np.ndarray) -> float:
    """Return HD95 from distance maps of the whole volume."""
    cross = generate_binary_structure(3, 1)
    p, g = (m & ~np.asarray(binary_erosion(m, cross)) for m in (p, g))
    found = [np.asarray(distance_transform_edt(~a))[b] for a, b in ((g, p), (p, g))]
    return float(np.percentile(np.concatenate(found), 95))


if __name__ == "__main__":
    sys.exit(main())
