"""From a config to what is compiled: the network, what its channels mean, the optimiser and the training step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from xdim_jax import models, ops, optim
from xdim_jax.augment import make_augment
from xdim_jax.data.case import Dataset
from xdim_jax.errors import UserError
from xdim_jax.layers import Norm
from xdim_jax.loss import make_loss
from xdim_jax.output import Output, make_output
from xdim_jax.step import Step, TrainState, init_state, make_forward, make_train_step, split_model

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes; nothing is compiled yet.

    Attributes:
        graphdef: of the network.
        output: what its channels mean.
        schedule: step to learning rate.
        tx: the optimiser.
        step: see `xdim_jax.step.make_train_step`.
        forward: ``forward((params, stats), image)`` to logits, in evaluation mode.
        config: the whole config.
    """

    graphdef: Any
    output: Output
    schedule: optim.Schedule
    tx: optax.GradientTransformation
    step: Step
    forward: Any
    config: Any

    def init(self, params: Any, stats: Any) -> TrainState:
        """The state before the first step."""
        options = self.config.optim
        return init_state(optim.init_params(options, params), stats, self.tx, ema=bool(options.ema))


def make_network(config: Any, *, axis: str | None = None, abstract: bool = False) -> tuple[Any, Any, Any]:
    """The network of a config, split (see `xdim_jax.step.split_model`), as its training needs it.

    Args:
        config: of a recipe.
        axis: of `xdim_jax.mesh.Devices`.
        abstract: shapes in place of random weights.

    Raises:
        UserError: ``config.train.remat`` names a stage that the network does not have.
    """
    model = models.build_abstract(config.model) if abstract else models.build(config.model, seed=config.seed)
    models.set_remat(model, config.train.remat)
    if axis is not None:
        _average_statistics_over(model, axis)
    return split_model(model)


def make_program(
    config: Any,
    dataset: Dataset,
    *,
    per_epoch: int,
    axis: str | None = None,
    abstract: bool = False,
    network: tuple[Any, Any, Any] | None = None,
) -> tuple[Program, Any, Any]:
    """A program, and the parameters and running statistics of its network.

    Args:
        config: of a recipe, as `xdim_jax.recipe.check_config` leaves it.
        dataset: what the network is trained on.
        per_epoch: steps in an epoch.
        axis, abstract: of `make_network`.
        network: of `make_network`, where there is one already.

    Raises:
        UserError: choices that are unknown or do not go together.
    """
    output = make_output(config.output, dataset)
    graphdef, params, stats = network or make_network(config, axis=axis, abstract=abstract)
    schedule = optim.make_schedule(config.optim.schedule, epochs=config.train.epochs, per_epoch=per_epoch)
    tx = optim.make_optimizer(config.optim, schedule)
    optim.rates_of(params, config.optim.rates)  # raises for a pattern that fits nothing
    dtype = precision(config.train)
    step = make_train_step(
        graphdef,
        make_loss(config.loss, output.activation, len(output.channels)),
        output,
        tx,
        make_augment(config.augment, models.spatial_axes(config.model)),
        dtype=dtype,
        accumulate=config.train.accumulate,
        ema=config.optim.ema,
        axis=axis,
    )
    step, forward = (ops.in_form(config.train.ops, f) for f in (step, make_forward(graphdef, dtype)))
    return Program(graphdef, output, schedule, tx, step, forward, config), params, stats


def precision(train: Mapping[str, Any]) -> Any:
    """The dtype of activations. Raises UserError for an unknown name."""
    if train["precision"] not in PRECISIONS:
        raise UserError(f"config.train.precision={train['precision']!r} is unknown; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[train["precision"]]


def _average_statistics_over(model: nnx.Module, axis: str) -> None:
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Norm):
            module.axis = axis
