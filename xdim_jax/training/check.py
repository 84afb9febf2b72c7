"""Check a config before data are read or programs are compiled, and set its values that depend on the data set."""

import functools
import math
import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from xdim_jax import ops
from xdim_jax.base.config import Config, leaves
from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.data import pipeline
from xdim_jax.data.case import Dataset
from xdim_jax.data.datasets import get_dataset
from xdim_jax.data.prepare import Preparation, check_preparation
from xdim_jax.data.splits import ALL_FOLDS, check_fold
from xdim_jax.inference.output import make_output
from xdim_jax.nets import inflate, input_channels, networks
from xdim_jax.training.program import make_network, make_program

# keys that may change when a run is resumed, because they influence neither the samples nor the computed numbers
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

# keys that may change when a run is resumed or a finished run is continued: they determine how long it trains and when
# it validates (train.epochs may only increase), and on which devices, which changes rounding errors
CONTINUE_KEYS = (
    *("train.epochs", "train.patience", "train.validate_every", "train.validate_after_score"),
    *("mesh.data", "mesh.space", "mesh.parallel"),
)

# key -> smallest and largest allowed value
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
    "optim.schedule.constant_epochs": (0, 1e6),
    "optim.schedule.warmup_epochs": (0, 1e6),
    "optim.schedule.factor": (1e-3, 1),
    "optim.schedule.power": (0, 10),
    "data.train_patients": (0, math.inf),
    "data.epoch_steps": (0, math.inf),
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

# key -> allowed names; names of networks, encoders, losses and optimisers are checked where these are built
CHOICES: dict[str, Sequence[str]] = {
    "data.sampling": pipeline.SAMPLINGS,
    "data.split": ("folds", "official"),
    "init.inflate": inflate.RULES,
    "init.channels": tuple(
        rule for rule in input_channels.RULES if rule != "map"
    ),  # "map" is possible in weight_port only
    "init.part": ("all", "encoder"),
    "train.ops": tuple(form for form in ops.IMPLEMENTATIONS if form != "sharded"),  # "sharded" is chosen automatically
}


def _no_pmap(config: Config, dataset: Dataset) -> str:
    """Return why ``pmap`` would compute other gradients than one device; empty if it computes the same."""
    if dataset.annotated is not None or dataset.labels.ignore is not None:
        return "not everything is annotated in every case"
    if config.loss.dice == "batch":
        return "config.loss.dice=batch is computed over all voxels of a batch"
    if config.loss.name == "dice_ce" and config.loss.weights:
        return "config.loss.weights weights the voxels of config.loss.name=dice_ce"
    return ""


def resolve_config(config: Config, *, needs_data: bool = True) -> tuple[Config, Dataset]:
    """Check a config, and set its values that depend on the data set. Nothing is read or compiled.

    Args:
        config: Config of a recipe; it is not changed.
        needs_data: True if a config without data (and without phantoms) is an error.

    Returns:
        A copy of the config in which ``model.in_channels``, ``model.out_channels`` and ``augment.flip.axes`` are set,
        and the data set.

    Raises:
        UserError: A value is unknown, out of range, or cannot be combined with another one.
    """
    config = config.copy_and_resolve_references()
    dataset = _find_dataset(config.data, needs_data=needs_data)
    _set_channels(config, dataset)
    _set_flip_axes(config, dataset)
    if (
        config.output == "softmax"
        and dataset.partly_annotated
        and any(len(v) > 1 for v in dataset.regions.sets.values())
    ):
        raise UserError(
            "config.output=softmax: regions are nested, and some cases lack annotations of some of them; give "
            "--config.output=sigmoid with --config.loss.name=dice_bce"
        )
    check_preparation(dataset, Preparation.from_config(config.data.prepare))
    if config.mesh.parallel == "pmap" and (reason := _no_pmap(config, dataset)):
        raise UserError(
            f"config.mesh.parallel=pmap: {reason}, so the loss of a batch is not the mean over devices; give "
            "--config.mesh.parallel=jit"
        )
    if problems := [*_range_problems(config), *_choice_problems(config), *_combination_problems(config)]:
        raise join_problems(problems, "values of the config cannot be used")
    network = _check_network(config)
    make_program(
        config, dataset, per_epoch=1, network=network
    )  # raises UserError for values that loss or optimiser do not accept
    if config.data.split == "folds" and config.data.fold != ALL_FOLDS:
        check_fold(config.data.fold, config.data.folds)  # before any phantom is written
    return config, dataset


def _find_dataset(data: Any, *, needs_data: bool) -> Dataset:
    """Return the data set of the ``data`` section. Raises UserError if the data are missing."""
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
    """Set the numbers of channels of the network to those of the data set, where the config has 0; check the others."""
    output = make_output(config.output, dataset)
    for key, expected in (("in_channels", len(dataset.channels)), ("out_channels", len(output.channels))):
        config.model[key] = config.model[key] or expected
        if config.model[key] != expected:
            names = f" with output={config.output}: {', '.join(output.channels)}" if key == "out_channels" else ""
            raise UserError(f"config.model.{key}={config.model[key]}: {dataset.name} needs {expected}{names}")


# words in the name of a structure that exists on one side of the body; and capitals, as in LKidney and HippocampusR
_SIDES = re.compile(r"(?i:left|right|(?<![a-z])(l|r|lt|rt|lh|rh)(?![a-z]))|^[LR](?=[A-Z][a-z])|(?<=[a-z])[LR]$")


def _set_flip_axes(config: Config, dataset: Dataset) -> None:
    """Set the flip axes if images are flipped and the config has no axes.

    They are all axes, except W if structures have sides, see `_have_sides`: a flip along W exchanges left and right, so
    the network could not learn the difference.
    """
    flip = config.augment.flip
    if flip.p > 0 and not flip.axes:
        sided = _have_sides({*dataset.labels.structures, *dataset.regions.names})
        flip.axes = tuple(range(len(config.data.patch) - sided))


def _have_sides(names: Set[str]) -> bool:
    """Return whether the names of structures contain a side, or two names differ only by l and r, as LUL and RUL do."""
    lower = {name.lower() for name in names}
    swapped = {f"{n[:i]}r{n[i + 1 :]}" for n in lower for i, letter in enumerate(n) if letter == "l"}
    return any(_SIDES.search(name) for name in names) or bool(lower & swapped)


def _value(config: Config, key: str) -> Any:
    """Return the value of a dotted key. Raises KeyError if this recipe does not have it."""
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


def _range_problems(config: Config) -> list[str]:
    """Return a message for each value outside of `RANGES`, and for each number that is NaN or infinite."""
    problems = [
        f"config.{key}={value}: expected a finite number"
        for key, value in leaves(config)
        if isinstance(value, float) and not math.isfinite(value)
    ]
    for key, (low, high) in RANGES.items():
        try:
            value = _value(config, key)
        except KeyError:
            continue
        if not low <= value <= high and math.isfinite(value):
            problems.append(f"config.{key}={value}: expected {low:g} to {high:g}")
    return problems


def _choice_problems(config: Config) -> list[str]:
    """Return a message for each name that is not in `CHOICES`."""
    return [
        f"config.{key}={value!r} is unknown; known: {', '.join(known)}"
        for key, known in CHOICES.items()
        if (value := _value(config, key)) not in known
    ]


def _combination_problems(config: Config) -> list[str]:
    """Return a message for each pair of values that cannot be combined."""
    problems = []
    data = config.data
    if data.sampling == "slices" and len(data.patch) <= 3 and patch_size_3d(data.patch)[0] != 1:
        problems.append(
            f"config.data.sampling=slices needs a 2D patch, found config.data.patch={tuple(data.patch)}; use "
            "patches or volumes"
        )
    if config.predict.get("min_et", 0) and data.dataset != "brats":
        problems.append(
            f"config.predict.min_et={config.predict.min_et} is a rule of the data set brats, found "
            f"config.data.dataset={data.dataset}; give --config.predict.min_et=0"
        )
    if config.mesh.space > 1 and config.train.ops != "auto":
        problems.append(
            f"config.train.ops={config.train.ops}: expected auto if volumes are distributed over devices "
            f"(config.mesh.space={config.mesh.space})"
        )
    return problems


def _check_network(config: Config) -> tuple[Any, Any, Any]:
    """Return the network with shapes in place of arrays. Raises UserError if model or patch cannot be used."""
    try:
        network = make_network(config.model, seed=config.seed, remat=config.train.remat, abstract=True)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    try:
        networks.check_patch(config.model, config.data.patch, config.data.batch // config.train.accumulate)
    except ValueError as error:
        raise UserError(str(error)) from error
    return network


def patch_size_3d(patch: Sequence[int]) -> pipeline.Size:
    """Return the size D, H, W of a patch, given (D, H, W), or (H, W) for a patch of one slice."""
    d, h, w = (*(1,) * (3 - len(patch)), *patch)
    return d, h, w
