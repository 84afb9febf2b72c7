"""What the two recipes for a user's own data share. Nothing here is from the paper but the optimiser."""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config(words: common.Words) -> Any:
    """Everything but the network, the patch and the sampling."""
    config = common.get_config()
    config.data = ConfigDict(
        {
            "dataset": "nnunet",  # nnunet or decathlon: a folder with dataset.json, imagesTr and labelsTr
            "root": "",
            "patch": (),
            "batch": 2,
            "patches_per_case": 4,  # in an epoch
            "foreground": 0.5,  # share of patches that must hold a structure
            # spacing: mm along D,H,W to resample to, 0 keeps an axis; size: pixels H,W of every slice; window: centre
            # and width in HU. Empty: as stored
            "prepare": {"crop": "none", "spacing": (), "size": (), "window": (), "normalise": "zscore"},
            "phantom": {"cases": 0},
            **common.data(words),
        }
    )
    config.augment = common.augmentation(
        scale=0.3, rotate=0.3, translate=0.3, noise=0.3, brightness=0.3, contrast=0.3, gamma=0.3, blur=0.1, lowres=0.1
    )
    config.augment.rotate.plane = True  # slices are often thicker than wide: stay in their plane
    config.loss = common.dice_and_entropy()
    config.optim = common.nadam_lookahead(constant_epochs=50)
    config.train.epochs = 100
    config.train.validate_after_score = 0.5  # mean training Dice of an epoch
    config.predict = ConfigDict({"overlap": 0.5, "threshold": 0.5})
    return config
