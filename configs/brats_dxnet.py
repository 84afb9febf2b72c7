"""DX-Net on BraTS: dimensional transfer (Messaoudi et al. 2023, Sect. 2.2.1, 3.1.3 and 3.2).

    python -m xdim_jax.train --config=configs/brats_dxnet.py --config.data.root=/data/BraTS2021_Training_Data \\
        --workdir=runs/dxnet
    python -m xdim_jax.train --config=configs/brats_dxnet.py:phantom --workdir=runs/demo      # no data needed, CPU

Words after the colon: ``phantom`` (small phantoms, small patches, minutes on two CPU cores), ``fold=K`` (0 to 4).

Hardware: one GPU of 16 GB (the paper used a Tesla P100), patch 128^3, batch 1. Time: the paper reports 1.5 s per image;
1251 cases in 5 folds are 1000 steps an epoch, 90 epochs, so about 38 hours there. Not measured by us on a GPU yet.
Paper's score (Table 6, BraTS 2022 validation), Dice mean / median: WT 91.22 / 94.15, TC 84.77 / 93.46,
ET 83.88 / 89.74.

Said by the paper: everything below that has no comment. Where paper and released code differ, the value follows the
paper and the comment names the other.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> Any:
    """The recipe; ``arg`` holds the words after the colon."""
    words = common.parse(arg, flags=("phantom",))
    config = common.get_config()
    config.model = ConfigDict(
        {
            "name": "dxnet",
            "in_channels": 4,  # flair, t1, t1ce, t2; released code: 1
            "out_channels": 3,  # WT, TC, ET; released code: 5
            "encoder": {
                "name": "efficientnet_b0",
                "eps": 1e-5,  # as in the released code; weights of timm's tf_* models were trained with 1e-3
                "padding": "symmetric",  # as in the released code; the tf_* weights were trained with "same"
                "drop_path": 0.4,  # as in the released code; the paper does not say
            },
            "norm": "instance",  # affine; released code: batch
            "activation": "silu",
            "upsampling": "transposed",
            "filters": (256, 128, 64, 32, 16),
            "deep_supervision": False,  # logits of the four coarser decoder stages in the loss; not in the paper
            # the axis that the 2D encoder lacks. Zero padding and pooling over the volume are the released code's;
            # "edge" and "slice" make inflation exact (see xdim_jax/inflate.py)
            "depth": {"axis": 0, "padding": "zero", "squeeze": "volume", "strides": (2, 2, 2, 2, 2)},
        }
    )
    config.data = ConfigDict(
        {
            "dataset": "brats",
            "root": "",  # the folder that holds the case folders
            "convention": "brats2021",  # brats2021: BraTS 2019 to 2022, label 4 = ET; brats2023: label 3 = ET
            "patch": (128, 128, 128),
            "batch": 1,
            "patches_per_case": 1,  # in an epoch
            "tumour_probability": 0.67,  # share of patches that must hold a lesion voxel; the paper does not say
            "folds": 5,
            "fold": words.get("fold", 0),
            "threads": 4,
            # phantom cases to write when there is no root; 0 cases: a root is needed
            "phantom": {"cases": 0, "held_out": 0, "shape": (240, 240, 155), "noise": 0.06, "bias": 0.1},
        }
    )
    config.loss = ConfigDict({"name": "dice_bce", "eps": 1e-5})
    config.optim = ConfigDict(
        {
            "name": "nadam",
            "b1": 0.95,
            "b2": 0.99,
            "eps": 1e-8,  # optax's; released code: 1e-5
            "lookahead": {"period": 6, "step_size": 0.5},
            "schedule": {"name": "constant_then_cosine", "peak": 1e-3, "final": 1e-5, "constant_epochs": 40},
        }
    )
    config.train.epochs = 90
    config.train.validate_after_score = 0.85  # mean training Dice of an epoch, over the three regions
    config.predict = ConfigDict(
        {
            "overlap": 0.5,  # of neighbouring windows; the paper does not say
            "threshold": 0.5,
            "min_et": 200,  # voxels; fewer are relabelled NCR. The paper gives no number: nnU-Net's of BraTS 2020
        }
    )
    return shrink(config) if "phantom" in words else config


def shrink(config: Any) -> Any:
    """The same network and recipe at a size that a laptop trains in minutes."""
    config.data.phantom = ConfigDict({"cases": 10, "held_out": 4, "shape": (80, 96, 72), "noise": 0.06, "bias": 0.1})
    config.data.patch = (32, 64, 64)
    config.data.patches_per_case = 2
    config.data.threads = 2
    config.model.encoder.drop_path = 0.1
    config.optim.schedule.constant_epochs = 10
    config.train.epochs = 16
    config.train.log_every = 8
    config.train.checkpoint_minutes = 0.5
    config.train.validate_after_score = 0.7
    config.train.validate_every = 4
    config.predict.overlap = 0.25
    config.predict.min_et = 50
    return config
