"""Adapting the weights of a trained network to other image channels, other structures, or other depth strides.

Most arrays have the same shape in both networks and are copied. These are adapted:

- The first convolution, if the image channels differ. The kernel of a channel that both networks have is copied. The
  kernel of a new channel is the mean over the channels of the trained network.
- The last convolution and those of deep supervision, if the outputs differ. Kernel and bias of an output that both
  networks have are copied. Those of a new output are randomly initialised.
- The transposed convolutions of the decoder, if the depth strides differ. From stride 2 to 1, the kernel is averaged
  over its two planes; from 1 to 2, its plane is repeated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xdim_jax.base.errors import UserError, shorten

# keys of the model section that may differ between the two networks
FREE = ("in_channels", "out_channels", "deep_supervision", "depth.strides", "depth.padding")


@dataclasses.dataclass(frozen=True)
class Names:
    """The meaning of the channels of a network.

    Attributes:
        channels: Names of the image channels.
        outputs: Names of the logits: regions, or labels.
        activation: ``sigmoid`` or ``softmax``.
    """

    channels: tuple[str, ...]
    outputs: tuple[str, ...]
    activation: str


def adapt_arrays(
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, Any],
    first: str,
    source: Names,
    target: Names,
    *,
    require: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Adapt the arrays of a trained network.

    Args:
        arrays: Arrays of the trained network by name.
        wanted: Arrays of the new network by name, randomly initialised.
        first: Name of the kernel of the first convolution.
        source: Meaning of the channels of the trained network.
        target: Meaning of the channels of the new network.
        require: True to raise an error if an array exists on one side only (except those of deep supervision), or has
            another shape and cannot be adapted as described in the docstring of this module; False to omit this array.

    Returns:
        Two dicts by name: the arrays of the new network that have a counterpart in the trained network; and a
        description of how each array was obtained, or why it was omitted.

    Raises:
        UserError: ``require`` is True, and an array exists on one side only, or cannot be adapted; or several image
            channels have the same name.
    """
    out, done = {}, {}
    odd = [name for name in wanted.keys() ^ arrays.keys() if not name.startswith("heads.")]
    if require and odd:
        more, fewer = (sorted(n for n in odd if n in side) for side in (arrays, wanted))
        raise UserError(
            f"the weights lack {len(fewer)} arrays of the network ({shorten(fewer) or 'none'}), and have {len(more)} "
            f"that it lacks ({shorten(more) or 'none'}): the file is incomplete, or belongs to another network. Take a "
            "complete file, or omit such arrays with config.init.require=False"
        )
    for name, leaf in wanted.items():
        if name not in arrays:
            done[name] = "random: not in the weights"
            continue
        array, shape = arrays[name], tuple(leaf.shape)
        done[name] = "copied"
        if _is_output(name) and (source.outputs, source.activation) != (target.outputs, target.activation):
            if array.shape[:-1] == shape[:-1]:
                array, done[name] = _outputs(array, np.asarray(leaf), source, target)
        elif name == first and source.channels != target.channels:
            array, done[name] = adapt_inputs(array, source.channels, target.channels)
        elif ".trans." in name and array.shape != shape:
            array = _planes(array, shape)
            done[name] = "adapted to other depth strides"
        if array.shape == shape:
            out[name] = array
        elif require:
            raise UserError(
                f"{name} is {array.shape} in the weights, expected {shape}, and cannot be adapted. Give the network "
                "the same layers (with ConvNeXt also the same depth strides), or omit such arrays with "
                "config.init.require=False"
            )
        else:
            done[name] = "omitted: another shape"
    for name in arrays.keys() - wanted.keys():
        done[name] = "omitted: not in the network"
    return out, done


def _is_output(name: str) -> bool:
    """Return whether an array belongs to a convolution that computes logits."""
    return name.startswith(("last.", "heads."))


def _outputs(array: np.ndarray, random: np.ndarray, source: Names, target: Names) -> tuple[np.ndarray, str]:
    """Return a kernel or bias of a convolution that computes logits, and how it was obtained."""
    if source.activation != target.activation:
        return random, f"random: the output is {target.activation} instead of {source.activation}"
    kept = [name for name in target.outputs if name in source.outputs]
    new = [name for name in target.outputs if name not in source.outputs]
    out = random.copy()
    for index, name in enumerate(target.outputs):
        if name in source.outputs:
            out[..., index] = array[..., source.outputs.index(name)]
    return out, f"kept {', '.join(kept) or 'nothing'}" + (f"; random {', '.join(new)}" if new else "")


def adapt_inputs(array: np.ndarray, source: Sequence[str], target: Sequence[str]) -> tuple[np.ndarray, str]:
    """Return the kernel of the first convolution for other channels, and how it was obtained.

    Args:
        array: Kernel ``(*kernel, channels, out)``.
        source: Names of its channels.
        target: Names of the wanted channels.

    Raises:
        UserError: Several channels have the same name, so that they cannot be matched.
    """
    if repeated := sorted({name for names in (source, target) for name in names if names.count(name) > 1}):
        raise UserError(
            f"channels cannot be matched by name, because several have the name {', '.join(repeated)}; give the "
            "channels of the data different names, and train the earlier network with these names too"
        )
    kept = [name for name in target if name in source]
    new = [name for name in target if name not in source]
    mean = array.mean(-2)
    parts = [array[..., source.index(name), :] if name in source else mean for name in target]
    return np.stack(parts, -2), f"kept {', '.join(kept) or 'nothing'}" + (
        f"; mean of all channels for {', '.join(new)}" if new else ""
    )


def _planes(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the kernel of a transposed convolution with another number of planes."""
    for axis, (found, wanted) in enumerate(zip(array.shape[:-2], shape[:-2], strict=False)):
        if (found, wanted) == (2, 1):
            array = array.mean(axis, keepdims=True)
        elif (found, wanted) == (1, 2):
            array = np.repeat(array, 2, axis)
    return array
