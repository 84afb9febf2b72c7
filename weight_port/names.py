"""Names and layouts of arrays in PyTorch and in this package. One table is used in both directions.

The modules for timm and for the authors' files rename the paths of layers. The name and the layout of an array follow
from the kind of its layer:

======================  =======================  =======================================
layer                   PyTorch                  this package
======================  =======================  =======================================
convolution             ``(O, I / groups, *k)``  ``(*k, I / groups, O)``
transposed convolution  ``(I, O, *k)``           ``(*k, I, O)``, taps in the same order
linear                  ``(O, I)``               ``(I, O)``
======================  =======================  =======================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from xdim_jax.nets.inflate import named_layers
from xdim_jax.nets.layers import Conv, ConvTranspose, Dense
from xdim_jax.nets.weights import check_leaves, module_leaves

COUNTER = "num_batches_tracked"  # in PyTorch's batch norms; used only for cumulative averages
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class Leaf(NamedTuple):
    """One array: its name in this package, its name in PyTorch, its layout and its shape in this package.

    The layout is ``conv``, ``transposed``, ``linear`` or ``vector``.
    """

    ours: str
    theirs: str
    layout: str
    shape: tuple[int, ...]


def leaves(module: nnx.Module, rename: Callable[[str], str]) -> list[Leaf]:
    """Return the table for a network (abstract or not). ``rename`` maps the path of a layer to its path in PyTorch."""
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
    """Convert an array from PyTorch's layout to that of this package."""
    if layout == "conv":
        return np.moveaxis(array, (0, 1), (-1, -2))
    if layout == "transposed":
        return np.moveaxis(array, (0, 1), (-2, -1))
    return array.T if layout == "linear" else array


def to_theirs(array: np.ndarray, layout: str) -> np.ndarray:
    """Convert an array from the layout of this package to PyTorch's."""
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
    """Convert a state_dict.

    Args:
        state: Arrays by PyTorch name.
        module: The network, with shapes in place of arrays.
        rename: See `leaves`.
        unused: Prefixes of the names of arrays that belong to no layer of ``module``. The counters of batch norms are
            always unused.
        what: Subject of the error message.
        hint: Next step, for the error message.

    Returns:
        The arrays of ``module`` by name, and the unused arrays by PyTorch name.

    Raises:
        UserError: An array has no counterpart or another shape, on either side.
    """
    table = leaves(module, rename)
    apart = {n: a for n, a in state.items() if n.startswith(tuple(unused)) or n.endswith(COUNTER)}
    wanted = {leaf.theirs: _Shape(to_theirs_shape(leaf)) for leaf in table}
    check_leaves({n: a for n, a in state.items() if n not in apart}, wanted, what, hint)
    arrays = {leaf.ours: np.asarray(to_ours(state[leaf.theirs], leaf.layout), order="C") for leaf in table}
    return arrays, apart


def to_theirs_shape(leaf: Leaf) -> tuple[int, ...]:
    """Return the shape of an array in PyTorch."""
    return to_theirs(np.broadcast_to(np.float32(0), leaf.shape), leaf.layout).shape


def export_state(
    arrays: Mapping[str, np.ndarray], unused: Mapping[str, np.ndarray], module: nnx.Module, rename: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """Convert arrays to a state_dict, in the order in which the layers are built.

    Args:
        arrays: Arrays of ``module`` by name.
        unused: Unused arrays from `import_state`. A counter of batch norm that is missing is 0.
        module: The network, with shapes in place of arrays.
        rename: See `leaves`.

    Raises:
        UserError: The arrays are not those of the network.
    """
    check_leaves(arrays, module_leaves(module), "the weights")
    state: dict[str, Any] = {}
    for leaf in leaves(module, rename):
        state[leaf.theirs] = np.asarray(to_theirs(arrays[leaf.ours], leaf.layout), order="C")
        if leaf.theirs.endswith("running_var"):
            counter = leaf.theirs.removesuffix("running_var") + COUNTER
            state[counter] = unused.get(counter, np.zeros((), np.int64))
    return state | {n: a for n, a in unused.items() if n not in state}
