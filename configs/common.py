"""Run settings that all recipes share, and the words after the colon of ``--config=configs/x.py:words``."""

from typing import Any

from ml_collections import ConfigDict

from xdim_jax.data.augmentation import DEFAULTS


def parse(arg: str, flags: tuple[str, ...], numbers: tuple[str, ...] = ("fold",)) -> dict[str, int]:
    """``"phantom,fold=2"`` to ``{"phantom": 1, "fold": 2}``; other words raise ValueError."""
    known = ", ".join([*flags, *(f"{n}=<number>" for n in numbers)])
    words: dict[str, int] = {}
    for word in filter(None, arg.split(",")):
        name, equals, value = word.partition("=")
        if not equals and name in flags:
            words[name] = 1
        elif equals and name in numbers and value.isdigit():
            words[name] = int(value)
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


def nadam_lookahead(*, constant_epochs: int) -> Any:
    """The optimiser and the schedule of the 3D networks (Sect. 3.1.3)."""
    return ConfigDict(
        {
            "name": "nadam",
            "b1": 0.95,
            "b2": 0.99,
            "eps": 1e-8,  # optax's; released code: 1e-5
            "lookahead": {"period": 6, "step_size": 0.5},
            "schedule": {
                "name": "constant_then_cosine",
                "peak": 1e-3,
                "final": 1e-5,
                "constant_epochs": constant_epochs,
            },
        }
    )


def get_config() -> Any:
    """Settings that no recipe of the paper prescribes."""
    config: Any = ConfigDict()
    config.seed = 0
    config.mesh = ConfigDict({"data": -1, "space": 1})  # data=-1: all devices that space leaves
    # what the network starts from; the numbers in the paper are with pre-trained encoders
    config.init = ConfigDict(
        {
            "weights": "",  # a file of weight_port, of an encoder or a network, or a workdir; "": random
            "part": "all",  # of a network's weights: all, or encoder
            "inflate": "mean",  # rule when a 2D encoder meets a 3D network (xdim_jax/inflate.py); the paper: repeat
            "sigma": 1.0,  # of rule gaussian, in taps
            "spacing": 1.0,  # of rule spacing: slice distance / pixel width
            "channels": "cycle",  # rule when the numbers of input channels differ (xdim_jax/stem.py)
            "accept": "",  # of padding, eps, depth, with commas: what may differ from how the weights were trained
        }
    )
    config.train = ConfigDict(
        {
            "log_every": 50,  # steps
            "checkpoint_minutes": 10.0,  # between checkpoints inside an epoch; every epoch ends with one
            "validate_every": 1,  # epochs, once validation has begun
        }
    )
    return config
