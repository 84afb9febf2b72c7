"""Checks a config before anything is read or compiled, and fills in what the data decide."""

import functools
import math
from pathlib import Path
from typing import Any

from xdim_jax import ops
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.data import pipeline
from xdim_jax.data.case import Dataset
from xdim_jax.data.layouts.datasets import get_dataset
from xdim_jax.data.prepare import Preparation, check_preparation
from xdim_jax.data.splits import ALL_FOLDS, check_fold
from xdim_jax.inference.output import make_output
from xdim_jax.nets import inflate, input_channels, networks
from xdim_jax.training.program import make_program

# keys that may differ when a run is resumed: they change neither data nor numbers
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

# smallest and largest value of a key, both allowed
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


OPERATIONS = tuple(form for form in ops.FORMS if form != "sharded")  # that is for the program to say


def check_config(config: Config, *, needs_data: bool = True) -> Dataset:
    """Finds what cannot work before anything is read or compiled, and fills in what the data decide.

    Raises:
        UserError: every kind of thing that cannot work.
    """
    data = config.data
    if data.root and not Path(data.root).is_dir():
        raise UserError(f"--config.data.root={data.root} is not a folder; give the folder of the {data.dataset} data")
    dataset = get_dataset(data)
    if needs_data and not data.root and not data.phantom.cases:
        raise UserError(
            "no data: give --config.data.root=<folder> with cases laid out as\n"
            f"  {dataset.layout}\n"
            "or take the variant that needs no data, --config=<recipe>.py:phantom"
        )
    output = make_output(config.output, dataset)
    for key, expected in (("in_channels", len(dataset.channels)), ("out_channels", len(output.channels))):
        config.model[key] = config.model[key] or expected
        if config.model[key] != expected:
            raise UserError(
                f"config.model.{key}={config.model[key]}: {dataset.name} needs {expected}"
                + (f" with output={config.output}: {', '.join(output.channels)}" if key == "out_channels" else "")
            )
    check_preparation(dataset, Preparation.from_config(data.prepare))
    problems = []
    for key, (low, high) in RANGES.items():
        try:
            value: Any = functools.reduce(lambda section, name: section[name], key.split("."), config)
        except KeyError:  # not a key of this recipe
            continue
        if not low <= value <= high:
            problems.append(f"config.{key}={value}: expected {low:g} to {high:g}")
    if data.sampling == "slices" and whole_size(data.patch)[0] != 1:
        problems.append(f"config.data.sampling=slices: with a 3D patch, {tuple(data.patch)}, sample patches or volumes")
    for key, known in (("sampling", pipeline.SAMPLINGS), ("split", ("folds", "official"))):
        if data[key] not in known:
            problems.append(f"config.data.{key}={data[key]!r}: known: {', '.join(known)}")
    channel_rules = tuple(rule for rule in input_channels.RULES if rule != "map")  # a map is for weight_port
    for key, known in (("inflate", inflate.RULES), ("channels", channel_rules), ("part", ("all", "encoder"))):
        if config.init[key] not in known:
            problems.append(f"config.init.{key}={config.init[key]!r}: known: {', '.join(known)}")
    if config.train.ops not in OPERATIONS:
        problems.append(f"config.train.ops={config.train.ops!r}: known: {', '.join(OPERATIONS)}")
    elif config.train.ops != "auto" and config.mesh.space > 1:
        problems.append(
            f"config.train.ops={config.train.ops}: volumes spread by mesh.space={config.mesh.space} need auto"
        )
    if problems:
        raise join_problems(problems, "values out of range")
    try:
        networks.build_abstract(config.model)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    try:
        networks.check_patch(config.model, config.data.patch)
    except ValueError as error:
        raise UserError(str(error)) from error
    make_program(config, dataset, per_epoch=1, abstract=True)
    if data.split == "folds" and data.fold != ALL_FOLDS:
        check_fold(data.fold, data.folds)  # before any phantom is written
    return dataset


def whole_size(patch: Any) -> pipeline.Size:
    """A patch with three axes; of a 2D network, one slice."""
    d, h, w = (*(1,) * (3 - len(patch)), *patch)
    return d, h, w
