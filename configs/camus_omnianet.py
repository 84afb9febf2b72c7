"""Omnia-Net B0 on CAMUS (Messaoudi et al. 2023, Sect. 2.1.1 and 3.1.1).

    python -m xdim_jax.train --config=configs/camus_omnianet.py --config.data.root=/data/CAMUS_public \\
        --workdir=runs/camus
    python -m xdim_jax.train --config=configs/camus_omnianet.py:phantom --workdir=runs/camus-demo  # no data needed, CPU

Words after the colon: ``phantom`` (small phantoms, minutes on two CPU cores; random weights), ``fold=K`` (0 to 4) or
``fold=all``, ``scratch`` (random weights instead of noisy-student ones).

Said by the paper: every value that has no comment. Hardware: one GPU of 16 GB (the paper used a Tesla P100), or a CPU:
docs/results.md has measured results.
Paper's score (Table 2, CAMUS test set), Dice / MAD in mm: LV_endo ED 0.945 / 1.5, ES 0.922 / 1.6; LV_epi ED 0.956 /
1.8, ES 0.951 / 1.8.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, networks


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` holds the words after the colon."""
    words = common.parse(arg, flags=("phantom", "scratch"))
    config = common.get_config()
    config.data = ConfigDict(
        {
            "dataset": "camus",
            "root": "",  # the folder that holds database_nifti, or patient folders
            "views": ("2CH", "4CH"),
            "instants": ("ED", "ES"),
            "quality": ("Good", "Medium", "Poor"),
            "patch": (256, 256),  # the paper does not say
            "batch": 8,  # the paper does not say
            "patches_per_case": 1,
            "foreground": 0.0,
            # images are resampled to one size, whatever their shape
            "prepare": {"crop": "none", "spacing": (), "size": (256, 256), "window": (), "normalise": "zscore"},
            **common.data(words),
            "sampling": "slices",
            "phantom": {"cases": 0, "held_out": 0, "shape": (549, 389), "noise": 0.06, "bias": 0.1},
        }
    )
    config.augment = common.augmentation()  # none
    config.output = "softmax"  # Sect. 2.1.1; Eq. 5 says sigmoid: output=sigmoid has a channel for each structure
    config.loss = common.dice_and_entropy()
    # 1e-5 "defines the end of the training", which -5 % an epoch reach after 66.3; yet trained on "less than 50 epochs"
    rate = common.schedule("exponential", peak=3e-4)
    config.optim = common.nadam(rate, b1=0.95, b2=0.99)  # the paper says Nadam; the values are those of the 3D networks
    config.train.epochs = 50
    config.model = networks.omnianet("b0", in_channels=1, out_channels=4)  # background and three structures
    config.predict = ConfigDict({"overlap": 0.5, "threshold": 0.5})
    common.pretrained(config, config.model.encoder, "b0", words)
    if "phantom" in words:
        config.data.update({"phantom": {"cases": 10, "held_out": 4, "shape": (160, 128)}, "patch": (96, 96)})
        config.data.update({"prepare": {"size": (96, 96)}})
        config.data.threads = 2
        config.model.encoder.drop_path = 0.1
        config.optim.schedule.peak = 1e-3
        config.train.epochs = 12
        config.train.log_every = 4
        config.train.validate_every = 4
    return config
