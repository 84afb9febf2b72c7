"""Omnia-Net B4 on CHAOS (Messaoudi et al. 2023, Sect. 3.1.2).

    python -m xdim_jax.train --config=configs/chaos_omnianet.py --config.data.root=/data/CHAOS/Train_Sets \\
        --workdir=runs/chaos
    python -m xdim_jax.train --config=configs/chaos_omnianet.py:task=2 ...                         # liver on CT alone
    python -m xdim_jax.train --config=configs/chaos_omnianet.py:phantom --workdir=runs/chaos-demo  # no data needed, CPU

Words after the colon: ``task=K``: 1 liver on CT and MR, 2 liver on CT, 3 liver on MR, 4 all organs on CT and MR
(default: the paper has one network for all tasks), 5 all organs on MR; ``phantom`` (small phantoms and encoder, minutes
on two CPU cores; random weights), ``fold=K`` (0 to 4) or ``fold=all``, ``scratch`` (random weights instead of
noisy-student ones).

In task 4, kidneys and spleen are not annotated on CT: there they count as background in the loss (training/loss.py).

Said by the paper: every value that has no comment. Hardware: one GPU of 16 GB. Not measured by us on a GPU yet.
Paper's score (Table 4, CHAOS test set), mean score of the tasks 1 to 5: 73.62, 82.98, 72.88, 61.80, 69.32.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, networks

STRUCTURES = {1: 1, 2: 1, 3: 1, 4: 4, 5: 4}  # of each task


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` holds the words after the colon."""
    words = common.parse(arg, flags=("phantom", "scratch"), numbers=("fold", "task"))
    task = words.get("task", 4)
    if task not in STRUCTURES:
        raise ValueError(f"task={task}: CHAOS has the tasks 1 to 5")
    config = common.get_config()
    config.data = ConfigDict(
        {
            "dataset": "chaos",
            "root": "",  # the folder Train_Sets
            "task": task,
            "phase": "each",  # of T1-DUAL, whose two images share a reference: in, out, each; the paper does not say
            "patch": (512, 512),
            "batch": 8,
            "patches_per_case": 1,
            "foreground": 0.0,
            # the window, in HU, is abdominal soft tissue's; the paper names none. MR is standardised as it is
            "prepare": {
                "crop": "none",
                "spacing": (),
                "size": (512, 512),
                "window": () if task in (3, 5) else (60.0, 400.0),
                "normalise": "zscore",
            },
            **common.data(words),
            "sampling": "slices",
            "phantom": {"cases": 0, "held_out": 0, "shape": (512, 512, 80), "noise": 0.06, "bias": 0.1},
        }
    )
    # each with probability 0.5; their strengths are not said (xdim_jax/training/augment_table.py)
    config.augment = common.augmentation(scale=0.5, rotate=0.5, translate=0.5, shear=0.5, window=0.5, noise=0.5)
    config.output = "softmax"  # as on CAMUS
    config.loss = common.dice_and_entropy()
    # -5 % an epoch reach 1e-5 after 89.8 epochs; the paper does not say how many there were
    config.optim = common.nadam(common.schedule("exponential", peak=1e-3), b1=0.95, b2=0.99)
    config.train.epochs = 100
    config.model = networks.omnianet("b4", in_channels=1, out_channels=1 + STRUCTURES[task])
    config.predict = ConfigDict({"overlap": 0.5, "threshold": 0.5})
    common.pretrained(config, config.model.encoder, "b4", words)
    if "phantom" in words:
        config.data.update({"phantom": {"cases": 6, "held_out": 2, "shape": (96, 96, 16)}, "patch": (96, 96)})
        config.data.update({"prepare": {"size": (96, 96)}})
        config.data.folds = 3
        config.data.threads = 2
        config.model = networks.omnianet("b0", in_channels=1, out_channels=1 + STRUCTURES[task])
        config.model.encoder.drop_path = 0.1
        config.train.epochs = 8
        config.train.log_every = 10
        config.train.validate_every = 2
    return config
