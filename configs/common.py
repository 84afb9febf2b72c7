"""Run settings that all recipes share, and the words after the colon of ``--config=configs/x.py:words``."""

from typing import Any

from ml_collections import ConfigDict

from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.training.augment_table import DEFAULTS

Words = dict[str, int]


def parse(arg: str, flags: tuple[str, ...], numbers: tuple[str, ...] = ("fold",)) -> Words:
    """``"phantom,fold=2"`` to ``{"phantom": 1, "fold": 2}``; ``fold=all`` is -1; other words raise ValueError."""
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


def data(words: dict[str, int]) -> dict[str, Any]:
    """Keys of the ``data`` section that mean the same for every data set."""
    return {
        "sampling": "patches",  # patches, slices or volumes (xdim_jax/data/pipeline.py)
        "split": "folds",  # folds: by patient, from the seed; official: the list that comes with the data
        "folds": 5,
        "fold": words.get("fold", 0),
        "threads": 4,
        "store": "",  # folder of the prepared cases; "": <root>_prepared, beside the data
    }


def augmentation(**probabilities: float) -> Any:
    """The ``augment`` section: every transform with its settings (see there), those named with their probability.

    The keys and values come from the code that uses them, so that all are in the run's record and can be overridden.
    """
    table = {name: dict(values) for name, values in DEFAULTS.items()}
    for name, p in probabilities.items():
        table[name]["p"] = p
    return ConfigDict(table)


def schedule(name: str, *, peak: float, **values: float) -> Any:
    """The ``optim.schedule`` section: of its keys, each schedule uses some (xdim_jax/training/optim.py)."""
    section = {
        "name": name,  # constant_then_cosine, exponential or polynomial
        "peak": peak,
        "final": 1e-5,
        "warmup_epochs": 0.0,
        "constant_epochs": 0.0,  # of constant_then_cosine
        "factor": 0.95,  # of exponential, per epoch
        "power": 0.9,  # of polynomial
    }
    assert values.keys() <= section.keys()
    return ConfigDict(section | values)


def nadam(learning_rate: Any, *, b1: float, b2: float, lookahead: int = 0) -> Any:
    """The ``optim`` section, with LookAhead where it has a period."""
    return ConfigDict(
        {
            # nadam: Dozat's, as in optax; nadam_torch: torch.optim.NAdam; nadam_authors: the released code's, whose
            # steps grow over some 10^4, with eps 1e-5. The paper says only "Nadam"
            "name": "nadam",
            "b1": b1,
            "b2": b2,
            "eps": 1e-8,  # optax's and PyTorch's; released code: 1e-5
            "momentum_decay": 4e-3,  # of nadam_torch and nadam_authors: the value of both
            "weight_decay": 0.0,
            "decay": "decoupled",  # decoupled, or l2 (as in the released code)
            "decay_all": False,  # biases and the scales of norms too
            "clip_norm": 0.0,  # of the gradients' global norm; 0: not clipped
            "rates": "",  # factors of the learning rate by part, e.g. "encoder.*=0.1,conv.*=0"; 0 freezes
            "ema": 0.0,  # decay of the moving average of the weights, which is then evaluated and kept; 0: none
            "lookahead": {"period": lookahead, "step_size": 0.5},  # period in steps, 0: off
            "schedule": learning_rate,
        }
    )


def nadam_lookahead(*, constant_epochs: float) -> Any:
    """The optimiser and the schedule of the 3D networks (Sect. 3.1.3)."""
    rate = schedule("constant_then_cosine", peak=1e-3, constant_epochs=constant_epochs)
    return nadam(rate, b1=0.95, b2=0.99, lookahead=6)


def dice_and_entropy(name: str = "dice_bce") -> Any:
    """The ``loss`` section: Eq. 5 of the paper, see xdim_jax/training/loss.py for what is corrected in it."""
    return ConfigDict(
        {
            "name": name,  # dice_bce (the paper's), dice_ce (softmax alone)
            "eps": 1e-5,  # in the Dice's denominator; the paper gives no value
            "dice": "sample",  # over each sample alone, or over the batch as one volume
            "cross_entropy": "mean",  # over voxels; sum: as Eq. 5 is printed
            "background": True,  # of a softmax, in the Dice: Eq. 5 counts classes from 0
            "weights": (),  # of the channels; empty: equal
        }
    )


def pretrained(config: Any, section: Any, size: str, words: Words) -> None:
    """Starts an encoder from the paper's noisy-student weights, unless the words say ``scratch`` (or ``phantom``).

    The first use fetches them from the Hugging Face hub. They were trained with eps 1e-3, which is set, and with
    TensorFlow's padding, which is not: features lose nothing but a shift of less than a pixel of their scale.
    """
    if {"scratch", "phantom"} & words.keys():
        return
    config.init.weights = f"tf_efficientnet_{size}.ns_jft_in1k"
    config.init.accept = "padding,eps" if "released" in words else "padding"
    if "released" not in words:
        section.eps = 1e-3


def get_config() -> Any:
    """Settings that no recipe of the paper prescribes."""
    config: Any = ConfigDict()
    config.seed = 0
    config.output = "sigmoid"  # sigmoid: a channel per region; softmax: a channel per label, background first
    # data=-1: all devices that space leaves. parallel: jit, or pmap (over data alone)
    config.mesh = ConfigDict({"data": -1, "space": 1, "parallel": "jit"})
    # what the network starts from
    config.init = ConfigDict(
        {
            # "": random; a name of timm's; a file of weight_port, of an encoder or a network; or a workdir
            "weights": "",
            "require": True,  # all of it must fit; False: what does not fit stays random, and the log says what
            "part": "all",  # of a network's weights: all, or encoder
            "inflate": "mean",  # rule when a 2D encoder meets a 3D network (nets/inflate.py); the paper: repeat
            "sigma": 1.0,  # of rule gaussian, in taps
            "spacing": 1.0,  # of rule spacing: slice distance / pixel width
            "channels": "cycle",  # rule when the numbers of input channels differ (xdim_jax/nets/input_channels.py)
            "accept": "",  # of padding, eps, depth, with commas: what may differ from how the weights were trained
        }
    )
    config.train = ConfigDict(
        {
            "epochs": 0,  # every recipe sets it
            "precision": "float32",  # of activations; bfloat16: weights, norms, losses stay float32
            "accumulate": 1,  # parts of a batch that are taken one after the other, where memory is short
            "remat": "",  # stages whose activations are computed again in the backward pass, e.g. "decoder5,encoder"
            "ops": "auto",  # form of the operations: by platform; fast, reference: for debugging (xdim_jax/ops)
            "validate_after_score": 0.0,  # mean training Dice of an epoch over the regions, before validation begins
            "validate_every": 1,  # epochs, once validation has begun
            "patience": 0,  # validations without a better score before the run ends; 0: all epochs
            "log_every": 50,  # steps
            "checkpoint_minutes": 10.0,  # between checkpoints inside an epoch; every epoch ends with one
            "checkpoint_steps": 0,  # as well every so many steps; 0: not
            "overlays": 3,  # validation cases that are drawn at every validation
            "profile_start": 10,  # steps of this start before the profile begins
            "profile_steps": 0,  # to profile, into <workdir>/profile; 0: none
            "watchdog_seconds": 60.0,  # without a batch, before the log says what each reader is doing
            "wandb": "",  # project; offline unless WANDB_MODE says otherwise; "": not used
            "mlflow": "",  # experiment; into <workdir>/mlflow.db unless MLFLOW_TRACKING_URI says otherwise
        }
    )
    return config
