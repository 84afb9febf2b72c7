"""Checks of a config before anything is read or compiled, and the values in it that depend on the data set."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdim_jax import ops
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.data import pipeline
from xdim_jax.data.case import Dataset
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.prepare import Preparation, check_preparation
from xdim_jax.data.splits import ALL_FOLDS, check_fold
from xdim_jax.inference.output import make_output
from xdim_jax.nets import inflate, input_channels, networks
from xdim_jax.training.program import make_network, make_program

# keys that may change when a run is resumed, because they influence neither the data nor the numbers
FREE_KEYS = (
    "data.root",
    "data.store",
    "data.threads",
    *(
        f"train.{key}"
        for key in (
            "log_every",
            "checkpoint_minutes",
            "checkpoint_steps",
            "overlays",
            "profile_start",
            "profile_steps",
            "watchdog_seconds",
            "wandb",
            "mlflow",
        )
    ),
)

# smallest and largest allowed value of a key
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "init.sigma": (1e-3, 1e3),
    "init.spacing": (1e-3, 1e3),
    "data.batch": (1, math.inf),
    "data.patches_per_case": (1, math.inf),
    "data.threads": (1, math.inf),
    "data.foreground": (0, 1),
    "data.phantom.cases": (0, math.inf),
    "data.phantom.held_out": (0, math.inf),
    "optim.b1": (0, 0.9999),
    "optim.b2": (0, 0.99999),
    "optim.eps": (1e-16, 1),
    "optim.momentum_decay": (0, 1),
    "optim.weight_decay": (0, 10),
    "optim.clip_norm": (0, math.inf),
    "optim.ema": (0, 0.999999),
    "optim.lookahead.period": (0, math.inf),
    "optim.lookahead.step_size": (0, 1),
    "optim.schedule.constant_epochs": (0, math.inf),
    "optim.schedule.warmup_epochs": (0, math.inf),
    "optim.schedule.factor": (1e-3, 1),
    "optim.schedule.power": (0, 10),
    "train.epochs": (1, math.inf),
    "train.accumulate": (1, math.inf),
    "train.log_every": (1, math.inf),
    "train.validate_every": (1, math.inf),
    "train.patience": (0, math.inf),
    "train.checkpoint_minutes": (0, math.inf),
    "train.checkpoint_steps": (0, math.inf),
    "train.overlays": (0, 100),
    "train.profile_start": (0, math.inf),
    "train.profile_steps": (0, 1000),
    "train.watchdog_seconds": (0, math.inf),
    "predict.overlap": (0, 0.99),
    "predict.threshold": (0, 1),
    "predict.min_et": (0, math.inf),
}

# allowed names of a key; networks, encoders, losses and optimisers check their own
CHOICES: dict[str, Sequence[str]] = {
    "data.sampling": pipeline.SAMPLINGS,
    "data.split": ("folds", "official"),
    "init.inflate": inflate.RULES,
    "init.channels": tuple(rule for rule in input_channels.RULES if rule != "map"),  # a map is given to weight_port
    "init.part": ("all", "encoder"),
    # the program chooses "sharded" by itself
    "train.ops": tuple(name for name in ops.IMPLEMENTATIONS if name != "sharded"),
}


def resolve_config(config: Config, *, needs_data: bool = True) -> tuple[Config, Dataset]:
    """Check a config and fill in the values that depend on the data set. Nothing is read or compiled.

    Args:
        config: Config of a recipe; it is not changed.
        needs_data: True if a config without data (and without phantoms) is an error.

    Returns:
        A copy of the config in which ``model.in_channels`` and ``model.out_channels`` are set, and the data set.

    Raises:
        UserError: A value is unknown, out of range, or does not go together with another one.
    """
    config = config.copy_and_resolve_references()
    dataset = _find_dataset(config.data, needs_data=needs_data)
    _set_channels(config, dataset)
    check_preparation(dataset, Preparation.from_config(config.data.prepare))
    if problems := [*_range_problems(config), *_choice_problems(config), *_combination_problems(config)]:
        raise join_problems(problems, "values of the config cannot be used")
    network = _check_network(config)
    make_program(config, dataset, per_epoch=1, network=network)  # raises for what the loss or the optimiser cannot use
    if config.data.split == "folds" and config.data.fold != ALL_FOLDS:
        check_fold(config.data.fold, config.data.folds)  # before any phantom is written
    return config, dataset


def _find_dataset(data: Any, *, needs_data: bool) -> Dataset:
    if data.root and not Path(data.root).is_dir():
        raise UserError(f"--config.data.root={data.root} is not a folder; give the folder of the {data.dataset} data")
    dataset = get_dataset(data)
    if needs_data and not data.root and not data.phantom.cases:
        raise UserError(
            "no data: give --config.data.root=<folder> with cases laid out as\n"
            f"  {dataset.layout}\n"
            "or use the variant that needs no data, --config=<recipe>.py:phantom"
        )
    return dataset


def _set_channels(config: Config, dataset: Dataset) -> None:
    """Set the numbers of channels of the model; 0 in a config means the number that the data set needs."""
    output = make_output(config.output, dataset)
    for key, expected in (("in_channels", len(dataset.channels)), ("out_channels", len(output.channels))):
        config.model[key] = config.model[key] or expected
        if config.model[key] != expected:
            names = f" with output={config.output}: {', '.join(output.channels)}" if key == "out_channels" else ""
            raise UserError(f"config.model.{key}={config.model[key]}: {dataset.name} needs {expected}{names}")


def _value(config: Config, key: str) -> Any:
    """Return the value of a dotted key. Raises KeyError if this recipe does not have it."""
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


def _range_problems(config: Config) -> list[str]:
    problems = []
    for key, (low, high) in RANGES.items():
        try:
            value = _value(config, key)
        except KeyError:
            continue
        if not low <= value <= high:
            problems.append(f"config.{key}={value}: expected {low:g} to {high:g}")
    return problems


def _choice_problems(config: Config) -> list[str]:
    return [
        f"config.{key}={value!r} is unknown; known: {', '.join(known)}"
        for key, known in CHOICES.items()
        if (value := _value(config, key)) not in known
    ]


def _combination_problems(config: Config) -> list[str]:
    problems = []
    data = config.data
    if data.sampling == "slices" and whole_size(data.patch)[0] != 1:
        problems.append(
            f"config.data.sampling=slices does not go with a 3D patch, {tuple(data.patch)}: sample patches or volumes"
        )
    if config.mesh.space > 1 and config.train.ops in ("fast", "reference"):
        problems.append(
            f"config.train.ops={config.train.ops}: with volumes distributed over devices (mesh.space="
            f"{config.mesh.space}) it must be auto"
        )
    return problems


def _check_network(config: Config) -> tuple[Any, Any, Any]:
    """Return the network with shapes in place of arrays, see `xdim_jax.training.program.make_network`."""
    try:
        network = make_network(config.model, seed=config.seed, remat=config.train.remat, abstract=True)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    try:
        networks.check_patch(config.model, config.data.patch)
    except ValueError as error:
        raise UserError(str(error)) from error
    return network


def whole_size(patch: Sequence[int]) -> pipeline.Size:
    """Return a patch with three axes (D, H, W); a patch with two axes is one slice."""
    d, h, w = (*(1,) * (3 - len(patch)), *patch)
    return d, h, w
