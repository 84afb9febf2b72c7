"""Which PyTorch leaf is which of ours, and how its array is laid out. One table serves both directions.

A path is renamed by the family of files; the leaf's name and layout follow from the layer it belongs to: dense and
depthwise kernels ``(O, I / groups, *k)`` are ours as ``(*k, I / groups, O)``, transposed ones ``(I, O, *k)`` as
``(*k, I, O)`` (same tap order), linear ones ``(O, I)`` as ``(I, O)``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from xdim_jax.nets.inflate import named_layers
from xdim_jax.nets.layers import Conv, ConvTranspose, Dense
from xdim_jax.nets.weights import check_leaves, module_leaves

COUNTER = "num_batches_tracked"  # of PyTorch's batch norms; of no use without cumulative averages
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class Leaf(NamedTuple):
    """One array here and there; ``layout`` is ``conv``, ``transposed``, ``linear`` or ``vector``."""

    ours: str
    theirs: str
    layout: str
    shape: tuple[int, ...]


def leaves(module: nnx.Module, rename: Callable[[str], str]) -> list[Leaf]:
    """The table for one network (abstract or not); ``rename`` maps paths of layers here to paths there."""
    layers, table = named_layers(module), []
    for name, array in module_leaves(module).items():
        path, _, leaf = name.rpartition(".")
        layout = "vector"
        if leaf == "kernel":
            kinds = {Conv: "conv", ConvTranspose: "transposed", Dense: "linear"}
            layout = kinds[type(layers[path])]
        theirs = f"{rename(path)}.{_LEAVES.get(leaf, leaf)}"
        table.append(Leaf(name, theirs, layout, tuple(array.shape)))
    return table


def to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    """PyTorch's layout to ours."""
    if layout == "conv":
        return np.moveaxis(array, (0, 1), (-1, -2))
    if layout == "transposed":
        return np.moveaxis(array, (0, 1), (-2, -1))
    return array.T if layout == "linear" else array


def to_theirs(array: np.ndarray, layout: str) -> np.ndarray:
    """Our layout to PyTorch's."""
    if layout == "conv":
        return np.moveaxis(array, (-1, -2), (0, 1))
    if layout == "transposed":
        return np.moveaxis(array, (-2, -1), (0, 1))
    return array.T if layout == "linear" else array


class _Shape(NamedTuple):
    shape: tuple[int, ...]


def import_state(
    state: Mapping[str, np.ndarray],
    module: nnx.Module,
    rename: Callable[[str], str],
    unused: Sequence[str],
    what: str,
    hint: str = "",
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A state_dict to our arrays and to the parts that no network calls.

    Args:
        state: arrays by PyTorch name.
        module: the network, with shapes in place of arrays.
        rename: see `leaves`.
        unused: prefixes of names that belong to no layer here; the counters of batch norms are always such.
        what, hint: of the message: what does not fit, and the next step.

    Raises:
        UserError: a leaf without a partner or of another shape, on either side.
    """
    table = leaves(module, rename)
    apart = {n: a for n, a in state.items() if n.startswith(tuple(unused)) or n.endswith(COUNTER)}
    wanted = {leaf.theirs: _Shape(to_theirs_shape(leaf)) for leaf in table}
    check_leaves({n: a for n, a in state.items() if n not in apart}, wanted, what, hint)
    arrays = {leaf.ours: np.asarray(to_ours(state[leaf.theirs], leaf.layout), order="C") for leaf in table}
    return arrays, apart


def to_theirs_shape(leaf: Leaf) -> tuple[int, ...]:
    """The shape that a leaf has in PyTorch."""
    return to_theirs(np.broadcast_to(np.float32(0), leaf.shape), leaf.layout).shape


def export_state(
    arrays: Mapping[str, np.ndarray], unused: Mapping[str, np.ndarray], module: nnx.Module, rename: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """Our arrays to a state_dict; a counter that was not kept is 0. Order: as the layers are built.

    Raises:
        UserError: the arrays are not those of the network.
    """
    check_leaves(arrays, module_leaves(module), "the weights")
    state: dict[str, Any] = {}
    for leaf in leaves(module, rename):
        state[leaf.theirs] = np.asarray(to_theirs(arrays[leaf.ours], leaf.layout), order="C")
        if leaf.theirs.endswith("running_var"):
            counter = leaf.theirs.removesuffix("running_var") + COUNTER
            state[counter] = unused.get(counter, np.zeros((), np.int64))
    return state | {n: a for n, a in unused.items() if n not in state}
