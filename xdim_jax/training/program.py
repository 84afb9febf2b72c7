"""Build the functions of a run from its config: network, output, learning-rate schedule and training step."""

import dataclasses
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
    """The functions of a run, not compiled.

    Attributes:
        graphdef: Static part of the network, see `xdim_jax.nets.functional.split_model`.
        output: Meaning of the network's channels.
        schedule: Learning rate as a function of the step.
        step: Training step, see `xdim_jax.training.step.make_train_step`.
        forward: ``forward((params, stats), image) -> logits``, in evaluation mode.
        config: The whole config.
    """

    graphdef: Any
    output: Output
    schedule: optim.Schedule
    step: Step
    forward: Any
    config: Any

    def init(self, params: Any, stats: Any) -> TrainState:
        """Return the training state before the first step.

        Args:
            params: Initial parameters.
            stats: Initial running statistics.
        """
        options = self.config.optim
        tx = optim.make_optimizer(options, self.schedule)
        return init_state(optim.init_params(options, params), stats, tx, ema=bool(options.ema))


def make_network(
    model: Mapping[str, Any], *, seed: int, remat: str = "", axis: str | None = None, abstract: bool = False
) -> tuple[Any, Any, Any]:
    """Build a network for training, and split it as `xdim_jax.nets.functional.split_model` does.

    Args:
        model: The ``model`` section of a config.
        seed: Seed of the random weights.
        remat: Stages whose activations are recomputed in the backward pass (``train.remat``).
        axis: Name of the ``pmap`` axis over which batch statistics are averaged; None without ``pmap``.
        abstract: True for shapes in place of random weights.

    Returns:
        Static part, parameters, running statistics.

    Raises:
        UserError: ``remat`` names a stage that the network does not have.
    """
    module = networks.build_abstract(model) if abstract else networks.build(model, seed=seed)
    networks.set_remat(module, remat)
    if axis is not None:
        for _, part in nnx.iter_modules(module):
            if isinstance(part, Norm):
                part.axis = axis
    return split_model(module)


def make_program(
    config: Any,
    dataset: Dataset,
    *,
    per_epoch: int,
    axis: str | None = None,
    abstract: bool = False,
    network: tuple[Any, Any, Any] | None = None,
) -> tuple[Program, Any, Any]:
    """Build the program of a config, and its network.

    Args:
        config: Config of a recipe, as `xdim_jax.training.check.resolve_config` returns it.
        dataset: Data set on which the network is trained.
        per_epoch: Steps per epoch.
        axis: See `make_network`.
        abstract: See `make_network`.
        network: Result of `make_network`; None to build the network here.

    Returns:
        The program, and parameters and running statistics of the network.

    Raises:
        UserError: Values of the config are unknown, or cannot be combined.
    """
    output = make_output(config.output, dataset)
    graphdef, params, stats = network or make_network(
        config.model, seed=config.seed, remat=config.train.remat, axis=axis, abstract=abstract
    )
    schedule = optim.make_schedule(config.optim.schedule, epochs=config.train.epochs, per_epoch=per_epoch)
    optim.rates_of(params, config.optim.rates)  # raises UserError if a pattern matches no parameter
    step = make_step(config, graphdef, output, schedule, axis=axis)
    forward = ops.with_implementation(config.train.ops, make_forward(graphdef, precision(config.train)))
    return Program(graphdef, output, schedule, step, forward, config), params, stats


def make_step(
    config: Any,
    graphdef: Any,
    output: Output,
    schedule: optim.Schedule,
    *,
    axis: str | None = None,
    traced: Mapping[str, Any] | None = None,
) -> Step:
    """Build the training step of a config.

    Args:
        config: Config of a recipe.
        graphdef: Static part of the network.
        output: Meaning of the network's channels.
        schedule: Learning rate as a function of the step.
        axis: See `make_network`.
        traced: Dotted key, such as ``optim.b1`` -> value that replaces that of the ``optim`` or ``loss`` section. With
            traced values, one program can be used for several runs (`xdim_jax.training.pack`).
    """
    traced = traced or {}
    optimiser = optim.make_optimizer(config.optim, schedule, _without_prefix("optim.", traced))
    loss = make_loss(config.loss, output.activation, len(output.channels), _without_prefix("loss.", traced))
    step = make_train_step(
        graphdef,
        loss,
        output,
        optimiser,
        make_augment(config.augment, networks.spatial_axes(config.model), networks.depth_axis(config.model)),
        dtype=precision(config.train),
        accumulate=config.train.accumulate,
        ema=traced.get("optim.ema", config.optim.ema),
        axis=axis,
    )
    return ops.with_implementation(config.train.ops, step)


def _without_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items whose key begins with a prefix, without this prefix."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def step_arguments(program: Program, dataset: Dataset, params: Any, stats: Any) -> tuple[Any, Any, Any]:
    """Return the shapes of the arguments of a training step: state, batch and key."""
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
