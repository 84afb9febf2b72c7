"""Dimensional transfer: inflation of the kernels of a 2D network to the kernels of a 3D network (paper, Sect. 2.2.1).

A kernel gains an axis of ``k`` taps, and `profile` returns the weight of each tap. On a volume of identical slices, the
3D kernel acts as the 2D kernel times the sum of the weights. For each rule, the table states the volumes for which a 3D
network in evaluation mode gives the output of the 2D network. The outputs are equal up to rounding. Where the table
says "up to eps", they also differ because the eps of a norm is not scaled with its input. Each rule has a test in
tests/test_inflation.py.

=====================  ==========================================  ===================================================
rule                   taps along the new axis                     output of the 2D network is preserved for
=====================  ==========================================  ===================================================
mean                   1/k each (Carreira and Zisserman 2017)      volumes of identical slices with ``edge`` or
                                                                   ``renorm`` padding along depth
repeat                 1 each, as in the paper, and the            the same as ``mean``, up to eps if the norm is not a
                       statistics of the norm that follows are     batch norm
                       scaled; 1/k each if no norm follows
repeat_uncorrected     1 each; the norm is not changed             layers whose output goes into an instance norm, as
                                                                   for ``mean`` up to eps; into a batch norm, the same
                                                                   in training mode only; the outputs of a layer
                                                                   without a norm, such as the logits, are k times as
                                                                   large
centre                 1 in the middle, else 0                     volumes of identical slices with any padding; with
                                                                   batch norm, depth strides 1 and squeeze ``slice``
                                                                   any volume, slice by slice
gaussian               a Gaussian of ``sigma`` taps, sum 1         volumes of identical slices with ``edge`` or
                                                                   ``renorm`` padding
spacing                sum 1, proportional to the overlap of each  the same as ``gaussian``; ratio 1 gives ``mean``,
                       slice with a box that has the length of     and a ratio of k or more gives ``centre`` if k is
                       the 2D kernel in mm; the ratio of slice     odd
                       spacing and in-plane spacing is that of
                       the input of the layer, see `input_ratio`
acs                    a third of the filters each in the axial,   nothing for a network. In a single convolution, the
                       coronal and sagittal plane (Yang et al.     outputs of each third of the filters are preserved
                       2021)                                       for volumes that are constant along the axis
                                                                   perpendicular to its plane
random                 random values, and the norm is reset; for   nothing
                       control experiments
=====================  ==========================================  ===================================================

The kernel of a transposed convolution is repeated under every rule except ``random``: its stride equals its length, so
each output depends on one tap along the new axis. If a kernel has one tap along the new axis, all rules except
``random`` give the same kernel.
"""

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from xdim_jax.base.errors import join_problems
from xdim_jax.nets.layers import HE_GAIN, Conv, ConvTranspose, Dense, LayerNorm, Norm, check_choice

RULES = ("mean", "repeat", "repeat_uncorrected", "centre", "gaussian", "spacing", "acs", "random")
_SMALLEST = 1e-6  # smallest sigma and spacing
AXES = {"depth": 0, "time": 0, "height": 1, "width": 2}


@dataclasses.dataclass(frozen=True)
class Inflation:
    """The rules of an inflation. The `xdim_jax.nets.layers.Depth` of the 3D network defines the new axis.

    Attributes:
        rule: One of `RULES`; see the table above.
        sigma: Standard deviation for ``gaussian``, in taps.
        spacing: Slice spacing divided by in-plane spacing, of the image, for ``spacing``.
        seed: Random seed for ``random``.
        layers: Other rules for some layers: pairs (pattern of layer names as in `fnmatch`, rule), such as
            ``("blocks.0.*", "centre")``. The first pattern that matches is used.
    """

    rule: str = "mean"
    sigma: float = 1.0
    spacing: float = 1.0
    seed: int = 0
    layers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for rule in (self.rule, *(rule for _, rule in self.layers)):
            check_choice("inflation rule", rule, RULES)
        for name in ("sigma", "spacing"):
            if not _SMALLEST <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} of an inflation must be a number of at least {_SMALLEST:g}; got {getattr(self, name)}"
                )
        if self.seed < 0 and "random" in (self.rule, *(rule for _, rule in self.layers)):
            raise ValueError(f"the rule random needs a seed of at least 0; got {self.seed}")

    def rule_of(self, layer: str) -> str:
        """Return the rule for one layer."""
        return next((rule for pattern, rule in self.layers if fnmatch.fnmatchcase(layer, pattern)), self.rule)


def profile(rule: str, taps: int, *, sigma: float = 1.0, spacing: float = 1.0) -> np.ndarray:
    """Return the weights of the taps along the new axis, ``(taps,)`` in float64.

    Args:
        rule: One of `RULES` except ``acs`` and ``random``.
        taps: Number of taps.
        sigma: See `Inflation`.
        spacing: Slice spacing divided by in-plane spacing, of the input of the layer.

    Raises:
        ValueError: The rule has no such weights (``acs`` and ``random``).
    """
    offset = np.arange(taps) - (taps - 1) / 2
    if rule in ("repeat", "repeat_uncorrected"):
        return np.ones(taps)
    if rule == "centre":
        return (np.arange(taps) == taps // 2).astype(float)
    if rule == "mean":
        weights = np.ones(taps)
    elif rule == "gaussian":
        weights = np.exp(-(offset**2 - (offset**2).min()) / (2 * sigma**2))
    elif rule == "spacing":  # overlap of each slice with the extent of the 2D kernel, both in units of in-plane spacing
        low, high = (offset - 0.5) * spacing, (offset + 0.5) * spacing
        weights = np.clip(np.minimum(high, taps / 2) - np.maximum(low, -taps / 2), 0, None)
    else:
        raise ValueError(f"rule {rule!r} has no weights along one axis")
    return weights / weights.sum()


def inflate_kernel(
    kernel: np.ndarray, taps: int, *, axis: int, rule: str, sigma: float = 1.0, spacing: float = 1.0
) -> np.ndarray:
    """Add a spatial axis to a kernel.

    Args:
        kernel: Array ``(*kernel, in / groups, out)`` with any number of spatial axes.
        taps: Length of the new axis.
        axis: Position of the new axis among the spatial axes.
        rule: One of `RULES` except ``random``. ``acs`` needs a 2D kernel whose sides are both equal to ``taps``.
        sigma: See `Inflation`.
        spacing: Slice spacing divided by in-plane spacing, of the input of the layer.

    Returns:
        The kernel with the new axis, in the same dtype.

    Raises:
        ValueError: The rule cannot be applied to this kernel.
    """
    if rule == "acs" and taps > 1:
        return _acs(kernel, taps, axis)
    weights = profile("mean" if rule == "acs" else rule, taps, sigma=sigma, spacing=spacing).astype(kernel.dtype)
    shape = [taps if i == axis else 1 for i in range(kernel.ndim + 1)]
    return np.expand_dims(kernel, axis) * weights.reshape(shape)


def _acs(kernel: np.ndarray, taps: int, axis: int) -> np.ndarray:
    """Inflate by rule ``acs``.

    The filters are split into three groups g = 0, 1, 2. Those of group g lie in the plane perpendicular to axis
    ``(axis + g) % 3``.
    """
    window, filters = kernel.shape[:-2], kernel.shape[-1]
    if set(window) != {taps} or len(window) != 2:
        raise ValueError(f"acs needs a square 2D kernel with as many taps as the new axis; found {window} and {taps}")
    out = np.zeros((taps,) * 3 + kernel.shape[-2:], kernel.dtype)
    for group, members in enumerate(np.array_split(np.arange(filters), 3)):
        plane: list[slice | int] = [slice(None)] * 3
        plane[(axis + group) % 3] = taps // 2
        out[tuple(plane)][..., members] = kernel[..., members]
    return out


def input_ratio(spacing: float, layer: Conv) -> float:
    """Return slice spacing divided by in-plane spacing, of the input of a layer.

    A level doubles the in-plane spacing. It doubles the slice spacing only if its depth stride is 2.

    Args:
        spacing: The ratio of the image.
        layer: A layer of the 3D network.
    """
    return spacing * math.prod(layer.depth.strides[: layer.level]) / 2**layer.level


def named_layers(module: nnx.Module) -> dict[str, Any]:
    """Return every layer that has weights, by its path."""
    kinds = (Conv, ConvTranspose, Dense, Norm, LayerNorm)
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(module) if isinstance(m, kinds)}


def inflate_arrays(
    arrays: Mapping[str, np.ndarray], source: nnx.Module, target: nnx.Module, inflation: Inflation, axis: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Inflate the weights of a 2D network for its 3D counterpart.

    Args:
        arrays: Weights of ``source`` by name.
        source: The 2D network, with shapes in place of arrays.
        target: The 3D network, with shapes in place of arrays. Its layers have the same names.
        inflation: The rules.
        axis: Position of the new axis among the spatial axes; 0 is depth, or time.

    Returns:
        Two dicts by name: the weights; and a description of how each array was obtained, such as ``mean`` or
        ``copied``.

    Raises:
        UserError: A pattern of ``inflation.layers`` matches no layer, or a layer cannot be inflated by its rule.
    """
    layers, wanted = named_layers(source), named_layers(target)
    inflatable = [name for name, layer in layers.items() if isinstance(layer, Conv | ConvTranspose | Dense)]
    problems = [
        f"the pattern {pattern!r} matches no layer; names of layers are {', '.join(inflatable[:3])}, ..."
        for pattern, _ in inflation.layers
        if not any(fnmatch.fnmatchcase(name, pattern) for name in inflatable)
    ]
    out, done = dict(arrays), dict.fromkeys(arrays, "copied")
    for name, layer in layers.items():
        rule, norm = inflation.rule_of(name), _sibling(name, getattr(layer, "norm", None))
        if isinstance(layer, Norm | LayerNorm) or (isinstance(layer, Dense) and rule != "random"):
            continue
        shape = wanted[name].kernel.shape
        if rule == "random":
            _randomise(out, done, name, shape, norm, inflation.seed)
            continue
        if isinstance(layer, ConvTranspose):
            rule = "repeat_uncorrected"
        elif rule == "repeat" and not norm:
            rule = "mean"  # no norm follows that could correct the scale
        taps = shape[axis]
        options: dict[str, Any] = {"axis": axis, "rule": rule, "sigma": inflation.sigma}
        if isinstance(layer, Conv):
            options["spacing"] = input_ratio(inflation.spacing, wanted[name])
        try:
            out[f"{name}.kernel"] = inflate_kernel(arrays[f"{name}.kernel"], taps, **options)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        done[f"{name}.kernel"] = rule if taps > 1 else "axis added"
        if rule == "repeat" and taps > 1:
            _correct_norm(out, done, name, norm, wanted[norm].eps, taps)
    if problems:
        raise join_problems(problems, "layers cannot be inflated")
    return out, done


def _sibling(name: str, sibling: str | None) -> str:
    """Return the path of the layer ``sibling`` in the same module as the layer ``name``; "" if it is None."""
    parent = name.rpartition(".")[0]
    return "" if sibling is None else f"{parent}.{sibling}" if parent else sibling


def _correct_norm(
    out: dict[str, np.ndarray], done: dict[str, str], conv: str, norm: str, eps: float, taps: int
) -> None:
    """Correct the running statistics of a norm whose input is now ``taps`` times as large.

    The mean is multiplied by ``taps``. The new variance is ``taps^2 * (var + eps) - eps``, so that the output of the
    norm is the same up to rounding, although ``eps`` does not change. The bias of the convolution, if it has one, is
    also multiplied by ``taps``.
    """
    if f"{conv}.bias" in out:
        out[f"{conv}.bias"] = out[f"{conv}.bias"] * taps
        done[f"{conv}.bias"] = f"times {taps}"
    if f"{norm}.var" in out:
        out[f"{norm}.mean"] = out[f"{norm}.mean"] * taps
        out[f"{norm}.var"] = out[f"{norm}.var"] * taps**2 + (taps**2 - 1) * eps
        done[f"{norm}.mean"] = done[f"{norm}.var"] = f"corrected for {taps} taps"


def _randomise(
    out: dict[str, np.ndarray], done: dict[str, str], name: str, shape: tuple[int, ...], norm: str, seed: int
) -> None:
    """Replace a kernel by random values (He et al.), its bias by 0, and reset the norm that follows."""
    dtype = out[f"{name}.kernel"].dtype
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    out[f"{name}.kernel"] = (rng.standard_normal(shape) * HE_GAIN / np.sqrt(np.prod(shape[:-1]))).astype(dtype)
    done[f"{name}.kernel"] = "random"
    initial = {f"{name}.bias": 0, f"{norm}.scale": 1, f"{norm}.bias": 0, f"{norm}.mean": 0, f"{norm}.var": 1}
    for leaf in initial.keys() & out.keys():
        out[leaf] = np.full_like(out[leaf], initial[leaf])
        done[leaf] = "reset"
