"""Networks as pure functions of parameters and arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xdim_jax.base.errors import UserError


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """Split a module into its static part and two nested dicts of arrays: parameters and running statistics."""
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def make_forward(graphdef: nnx.GraphDef, dtype: Any = jnp.float32) -> Callable[[tuple[Any, Any], jax.Array], jax.Array]:
    """Return the function ``forward((params, stats), image) -> logits`` of a network in evaluation mode.

    Args:
        graphdef: Static part of the network, see `split_model`.
        dtype: dtype of the activations.
    """

    def forward(weights: tuple[Any, Any], image: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, *weights)
        model.eval()
        return model(image.astype(dtype) if dtype != jnp.float32 else image)

    return forward


PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def precision(train: Mapping[str, Any]) -> Any:
    """Return the dtype of activations with the name ``train["precision"]``.

    Args:
        train: The ``train`` section of a config.

    Raises:
        UserError: The name of the dtype is unknown.
    """
    if train["precision"] not in PRECISIONS:
        raise UserError(f"config.train.precision={train['precision']!r} is unknown; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[train["precision"]]
