"""What the two BraTS recipes share: data, loss, optimiser and schedule (Messaoudi et al. 2023, Sect. 3.1.3 and 3.2).

Said by the paper: every value that has no comment. Where paper and released code differ, the value follows the paper,
and the comment names the other.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def parse(arg: str) -> common.Words:
    """The words after the colon."""
    return common.parse(arg, flags=("phantom", "released", "scratch"))


def get_config(words: common.Words) -> Any:
    """Everything but the network."""
    config = common.get_config()
    config.data = ConfigDict(
        {
            "dataset": "brats",
            "root": "",  # the folder that holds the case folders
            # brats2021: BraTS 2019 to 2022, label 4 = ET; brats2023: label 3 = ET; brats2024: 4 = resection cavity
            "convention": "brats2021",
            "patch": (128, 128, 128),
            "batch": 1,
            "patches_per_case": 1,  # in an epoch
            "foreground": 0.67,  # share of patches that must hold a lesion voxel; the paper does not say
            "prepare": {"crop": "nonzero", "spacing": (), "size": (), "window": (), "normalise": "zscore_nonzero"},
            **common.data(words),
            # phantom cases to write when there is no root; 0 cases: a root is needed
            "phantom": {"cases": 0, "held_out": 0, "shape": (240, 240, 155), "noise": 0.06, "bias": 0.1},
        }
    )
    config.augment = common.augmentation()  # none (Sect. 3.1.3)
    config.loss = common.dice_and_entropy()
    config.optim = common.nadam_lookahead(constant_epochs=40)
    config.train.epochs = 90
    config.train.validate_after_score = 0.85  # mean training Dice of an epoch, over the three regions
    config.predict = ConfigDict(
        {
            "overlap": 0.5,  # of neighbouring windows; the paper does not say
            "threshold": 0.5,
            "min_et": 200,  # voxels; fewer are relabelled NCR. The paper gives no number: nnU-Net's of BraTS 2020
        }
    )
    return config


def shrink(config: Any, *, patch: tuple[int, int, int], shape: tuple[int, int, int], epochs: int) -> None:
    """The same network and recipe at a size that a laptop trains in minutes, on phantoms of a shape."""
    config.data.phantom = ConfigDict({"cases": 10, "held_out": 4, "shape": shape, "noise": 0.06, "bias": 0.1})
    config.data.patch = patch
    config.data.patches_per_case = 2
    config.data.threads = 2
    config.optim.schedule.constant_epochs = 10
    config.train.epochs = epochs
    config.train.log_every = 8
    config.train.checkpoint_minutes = 0.5
    config.train.validate_after_score = 0.7
    config.train.validate_every = 4
    config.predict.overlap = 0.25
    config.predict.min_et = 50
