"""Names and layouts of arrays in PyTorch and in this package, for conversion in both directions.

The modules for timm, PyPI and the authors' files rename the paths of layers. The rest of an array's name and its layout
follow from the kind of its layer:

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
    """Names and layout of one array.

    Attributes:
        name: Name in this package.
        torch_name: Name in PyTorch.
        layout: ``conv``, ``transposed``, ``linear`` or ``vector``.
        shape: Shape in this package.
    """

    name: str
    torch_name: str
    layout: str
    shape: tuple[int, ...]


def leaves(module: nnx.Module, rename: Callable[[str], str]) -> list[Leaf]:
    """Return the names and layouts of all arrays of a network.

    Args:
        module: The network, which may be abstract.
        rename: Function from the path of a layer in this package to its path in PyTorch.
    """
    layers, table = named_layers(module), []
    for name, array in module_leaves(module).items():
        path, _, leaf = name.rpartition(".")
        layout = "vector"
        if leaf == "kernel":
            kinds = {Conv: "conv", ConvTranspose: "transposed", Dense: "linear"}
            layout = kinds[type(layers[path])]
        torch_name = f"{rename(path)}.{_LEAVES.get(leaf, leaf)}"
        table.append(Leaf(name, torch_name, layout, tuple(array.shape)))
    return table


def from_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """Convert an array from PyTorch's layout to the layout of this package."""
    if layout == "conv":
        return np.moveaxis(array, (0, 1), (-1, -2))
    if layout == "transposed":
        return np.moveaxis(array, (0, 1), (-2, -1))
    return array.T if layout == "linear" else array


def to_torch_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """Convert an array from the layout of this package to PyTorch's layout."""
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
        what: Subject of the error message, e.g. "the weights of model.safetensors".
        hint: Next step, for the error message.

    Returns:
        The arrays of ``module`` by name, and the unused arrays by PyTorch name.

    Raises:
        UserError: An array of the state_dict or of the network has no counterpart, or one of another shape.
    """
    table = leaves(module, rename)
    ignored = {n: a for n, a in state.items() if n.startswith(tuple(unused)) or n.endswith(COUNTER)}
    wanted = {leaf.torch_name: _Shape(torch_shape(leaf)) for leaf in table}
    check_leaves({n: a for n, a in state.items() if n not in ignored}, wanted, what, hint)
    arrays = {
        leaf.name: np.asarray(from_torch_layout(state[leaf.torch_name], leaf.layout), order="C") for leaf in table
    }
    return arrays, ignored


def torch_shape(leaf: Leaf) -> tuple[int, ...]:
    """Return the shape of an array in PyTorch."""
    return to_torch_layout(np.broadcast_to(np.float32(0), leaf.shape), leaf.layout).shape


def export_state(
    arrays: Mapping[str, np.ndarray], unused: Mapping[str, np.ndarray], module: nnx.Module, rename: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """Convert arrays to a state_dict, in the order in which the layers are built.

    Args:
        arrays: Arrays of ``module`` by name.
        unused: Unused arrays from `import_state`. Missing counters of batch norms are written as 0.
        module: The network, with shapes in place of arrays.
        rename: See `leaves`.

    Returns:
        Arrays by PyTorch name.

    Raises:
        UserError: The arrays do not fit the network.
    """
    check_leaves(arrays, module_leaves(module), "the weights")
    state: dict[str, Any] = {}
    for leaf in leaves(module, rename):
        state[leaf.torch_name] = np.asarray(to_torch_layout(arrays[leaf.name], leaf.layout), order="C")
        if leaf.torch_name.endswith("running_var"):
            counter = leaf.torch_name.removesuffix("running_var") + COUNTER
            state[counter] = unused.get(counter, np.zeros((), np.int64))
    return state | {n: a for n, a in unused.items() if n not in state}
