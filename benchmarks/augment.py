"""Compare the time of augmenting one sample with batchgeneratorsv2, the library of nnU-Net.

    pip install batchgeneratorsv2        # or in a separate environment; give its interpreter as --peer-python
    python benchmarks/augment.py [--size=128] [--rounds=5] [--threads=2] [--json=FILE]

Two sets of transforms are measured on samples with 4 channels: those of the paper for CHAOS (scaling, rotation,
translation, shearing, window, noise), and those of nnU-Net (rotation, scaling, elastic, noise, blur, brightness,
contrast, low resolution, gamma, flips). All transforms of a set are applied to every sample. batchgeneratorsv2 has
neither shearing nor a window. Its version of the paper's set is scaling, rotation and translation (a random crop) in
one resampling, and contrast instead of the window. Both libraries interpolate the image linearly and the label by
nearest neighbour. They run alternately in separate processes; the result is the median over rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from xdim_jax.base.files import write_json

REPEATS = 3  # number of samples of a measurement


def measure_ours(which: str, size: int) -> float:
    """Return the seconds per sample of our augmentation, without compilation."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from xdim_jax.training.augment import make_augment

    sets = {
        "paper": ("scale", "rotate", "translate", "shear", "window", "noise"),
        "nnunet": (
            "scale", "rotate", "elastic", "flip", "noise", "blur", "brightness", "contrast", "lowres", "gamma"
        ),
    }  # fmt: skip
    section = {name: {"p": 1.0} for name in sets[which]}
    if "flip" in section:
        section["flip"]["axes"] = (0, 1, 2)
    function = jax.jit(make_augment(section, 3))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.standard_normal((1, size, size, size, 4), np.float32)),
        "label": jnp.asarray(rng.integers(0, 4, (1, size, size, size), np.uint8)),
    }
    keys = [jnp.asarray(rng.integers(0, 2**32, (1, 2), np.uint32)) for _ in range(REPEATS + 1)]
    jax.block_until_ready(function(batch | {"key": keys[0]}))
    begin = time.perf_counter()
    for key in keys[1:]:
        jax.block_until_ready(function(batch | {"key": key}))
    return (time.perf_counter() - begin) / REPEATS


def measure_peer(which: str, size: int) -> float:
    """Return the seconds per sample of batchgeneratorsv2."""
    import numpy as np
    import torch
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    angle = np.pi / 12
    shared = {"p_rotation": 1.0, "rotation": (-angle, angle), "p_scaling": 1.0, "scaling": (0.8, 1.25)}
    shared |= {"p_synchronize_scaling_across_axes": 1.0, "mode_seg": "nearest"}
    contrast = ContrastTransform((0.75, 1.25), preserve_range=True, synchronize_channels=False)
    noise = GaussianNoiseTransform((0, 0.01))
    if which == "paper":
        transforms = [SpatialTransform((size,) * 3, 0, random_crop=True, **shared), contrast, noise]
    else:
        transforms = [
            SpatialTransform((size,) * 3, 0, random_crop=False, p_elastic_deform=1.0, **shared),
            noise,
            GaussianBlurTransform((0.5, 1.5)),
            MultiplicativeBrightnessTransform((0.75, 1.25), synchronize_channels=False),
            contrast,
            SimulateLowResolutionTransform(
                (0.5, 1.0), synchronize_channels=False, synchronize_axes=True, ignore_axes=None, allowed_channels=None
            ),
            GammaTransform((0.7, 1.5), p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=0),
            MirrorTransform((0, 1, 2)),
        ]
    torch.manual_seed(0)
    image, label = torch.randn(4, size, size, size), torch.randint(0, 4, (1, size, size, size), dtype=torch.int16)

    def run() -> None:
        sample = {"image": image.clone(), "segmentation": label.clone()}
        for transform in transforms:
            sample = transform(**sample)

    run()
    begin = time.perf_counter()
    for _ in range(REPEATS):
        run()
    return (time.perf_counter() - begin) / REPEATS


def main() -> None:
    """Run the command line, see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="voxels per side of a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter of an environment with batchgeneratorsv2"
    )
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # internal: library and set that a separate process measures
    options = parser.parse_args()
    if options.only:
        side, which = options.only.split(":")
        print((measure_ours if side == "ours" else measure_peer)(which, options.size))
        return
    threads = str(options.threads)
    here = str(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": here}
    times: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for which in ("paper", "nnunet"):
            for side, python in (("ours", sys.executable), ("peer", options.peer_python)):
                command = ["taskset", "-c", f"0-{options.threads - 1}", python, __file__, f"--only={side}:{which}"]
                done = subprocess.run(
                    [*command, f"--size={options.size}"], env=environment, capture_output=True, text=True
                )
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr}")
                times.setdefault(f"{side}:{which}", []).append(float(done.stdout.split()[-1]))
    print(f"| set | xdim_jax, ms | batchgeneratorsv2, ms | ratio |   ({options.size}^3 x 4, {threads} threads)")
    print("|---|---|---|---|")
    for which in ("paper", "nnunet"):
        a, b = (statistics.median(times[f"{side}:{which}"]) for side in ("ours", "peer"))
        print(f"| {which} | {1000 * a:.0f} | {1000 * b:.0f} | {a / b:.2f} |")
    if options.json:
        write_json(options.json, {"size": options.size, "threads": options.threads, "seconds": times})


if __name__ == "__main__":
    main()
