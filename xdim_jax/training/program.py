"""From a config to what is compiled: the network, what its channels mean, the optimiser and the training step."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xdim_jax import ops
from xdim_jax.data.case import Dataset
from xdim_jax.inference.output import Output, make_output
from xdim_jax.nets import networks
from xdim_jax.nets.functional import make_forward, precision, split_model
from xdim_jax.nets.layers import Norm
from xdim_jax.runs.state import TrainState, init_state
from xdim_jax.training import optim
from xdim_jax.training.augment import make_augment
from xdim_jax.training.loss import make_loss
from xdim_jax.training.step import Step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes; nothing is compiled yet.

    Attributes:
        graphdef: of the network.
        output: what its channels mean.
        schedule: step to learning rate.
        step: see `xdim_jax.training.step.make_train_step`.
        forward: ``forward((params, stats), image)`` to logits, in evaluation mode.
        config: the whole config.
    """

    graphdef: Any
    output: Output
    schedule: optim.Schedule
    step: Step
    forward: Any
    config: Any

    def init(self, params: Any, stats: Any) -> TrainState:
        """The state before the first step."""
        options = self.config.optim
        tx = optim.make_optimizer(options, self.schedule)
        return init_state(optim.init_params(options, params), stats, tx, ema=bool(options.ema))


def make_network(config: Any, *, axis: str | None = None, abstract: bool = False) -> tuple[Any, Any, Any]:
    """The network of a config, split (see `xdim_jax.nets.functional.split_model`), as its training needs it.

    Args:
        config: of a recipe.
        axis: of `xdim_jax.training.mesh.Devices`.
        abstract: shapes in place of random weights.

    Raises:
        UserError: ``config.train.remat`` names a stage that the network does not have.
    """
    model = networks.build_abstract(config.model) if abstract else networks.build(config.model, seed=config.seed)
    networks.set_remat(model, config.train.remat)
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
        config: of a recipe, as `xdim_jax.training.check.check_config` leaves it.
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
    optim.rates_of(params, config.optim.rates)  # raises for a pattern that fits nothing
    step = make_step(config, graphdef, output, schedule, axis=axis)
    forward = ops.in_form(config.train.ops, make_forward(graphdef, precision(config.train)))
    return Program(graphdef, output, schedule, step, forward, config), params, stats


def make_step(
    config: Any,
    graphdef: Any,
    output: Output,
    schedule: optim.Schedule,
    *,
    axis: str | None = None,
    values: Mapping[str, jax.Array] | None = None,
) -> Step:
    """The training step of a config.

    Args:
        config: of a recipe.
        graphdef: of the network.
        output: what its channels mean.
        schedule: step to learning rate.
        axis: of `make_network`.
        values: in place of those of the config, by dotted key of ``optim`` or ``loss``; they may be traced.
    """
    sections = {name: config[name].to_dict() for name in ("optim", "loss")}
    for key, value in (values or {}).items():
        *path, last = key.split(".")
        functools.reduce(lambda section, name: section[name], path, sections)[last] = value
    step = make_train_step(
        graphdef,
        make_loss(sections["loss"], output.activation, len(output.channels)),
        output,
        optim.make_optimizer(sections["optim"], schedule),
        make_augment(config.augment, networks.spatial_axes(config.model)),
        dtype=precision(config.train),
        accumulate=config.train.accumulate,
        ema=sections["optim"]["ema"],
        axis=axis,
    )
    return ops.in_form(config.train.ops, step)


def _average_statistics_over(model: nnx.Module, axis: str) -> None:
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Norm):
            module.axis = axis


def step_arguments(program: Program, dataset: Dataset, params: Any, stats: Any) -> tuple[Any, Any, Any]:
    """State, batch and key of a training step, as shapes."""
    data = program.config.data
    shapes = {
        "image": jax.ShapeDtypeStruct((data.batch, *data.patch, program.config.model.in_channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((data.batch, *data.patch), jnp.uint8),
        "key": jax.ShapeDtypeStruct((data.batch, 2), jnp.uint32),
    }
    if dataset.annotated is not None:
        shapes["annotated"] = jax.ShapeDtypeStruct((data.batch, len(program.output.channels)), jnp.bool_)
        shapes["annotated_regions"] = jax.ShapeDtypeStruct((data.batch, len(dataset.regions.names)), jnp.bool_)
    return jax.eval_shape(program.init, params, stats), shapes, jax.eval_shape(lambda: jax.random.key(0))
