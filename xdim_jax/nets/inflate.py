"""Dimensional transfer: the kernels of a 2D network become those of a 3D one (paper, Sect. 2.2.1).

A kernel gains an axis of ``k`` taps; ``profile`` gives the weight of each, and the sum over them is what a volume that
is constant along that axis meets. What each rule preserves (each line is a test in tests/test_inflation.py; "exact":
up to rounding; "depth-constant": every slice of the volume is the same image; networks in evaluation mode):

=====================  ==========================================  ===================================================
rule                   taps along the new axis                     preserves
=====================  ==========================================  ===================================================
mean                   1/k each (Carreira and Zisserman 2017)      depth-constant volumes, exact with ``edge`` or
                                                                   ``renorm`` padding along depth
repeat                 1 each, as the paper words it; the norm     the same, with ``edge`` or ``renorm``, if a batch
                       that follows has its statistics scaled      norm follows every kernel; else up to its eps
repeat_uncorrected     1 each and nothing else                     nothing in evaluation mode; under batch or instance
                                                                   statistics the same up to eps
centre                 1 in the middle, else 0                     depth-constant volumes with any padding; with depth
                                                                   strides 1 and squeeze ``slice`` any volume, slice by
                                                                   slice
gaussian               a Gaussian of ``sigma`` taps, sum 1         depth-constant volumes with ``edge`` or ``renorm``
spacing                shares of a box as long as the 2D kernel    the same; ratio 1 is ``mean``, a ratio of k or more
                       in millimetres, slices ``spacing`` times    is ``centre``
                       as thick as pixels are wide
acs                    a third of the filters each in the axial,   each third: a volume that is constant along the axis
                       coronal and sagittal plane (Yang et al.     it has no extent in
                       2021)
random                 none: drawn anew, with its norm; a control  nothing
=====================  ==========================================  ===================================================

The kernel of a transposed convolution is repeated under every rule but ``random``: its stride is as long as the kernel,
so an output meets one tap along the new axis. Where a kernel has one tap along it, all rules but ``random`` agree.
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
AXES = {"depth": 0, "time": 0, "height": 1, "width": 2}


@dataclasses.dataclass(frozen=True)
class Inflation:
    """How to inflate; along which axis, the target network's `xdim_jax.nets.layers.Depth` says.

    Attributes:
        rule: see the table above.
        sigma: of ``gaussian``, in taps.
        spacing: of ``spacing``: slice distance divided by pixel width.
        seed: of ``random``.
        layers: exceptions, pairs of a pattern for layer names (``blocks.0.*``) and a rule; the first that fits counts.
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
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} of an inflation is a number above 0; got {getattr(self, name)}")

    def rule_of(self, layer: str) -> str:
        """The rule for one layer."""
        return next((rule for pattern, rule in self.layers if fnmatch.fnmatchcase(layer, pattern)), self.rule)


def profile(rule: str, taps: int, *, sigma: float = 1.0, spacing: float = 1.0) -> np.ndarray:
    """Weights of the taps along the new axis, ``(taps,)`` in float64; for the rules that have such weights."""
    offset = np.arange(taps) - (taps - 1) / 2
    if rule in ("repeat", "repeat_uncorrected"):
        return np.ones(taps)
    if rule == "centre":
        return (np.arange(taps) == taps // 2).astype(float)
    if rule == "mean":
        weights = np.ones(taps)
    elif rule == "gaussian":
        weights = np.exp(-(offset**2 - (offset**2).min()) / (2 * sigma**2))
    elif rule == "spacing":  # overlap of each slice with the kernel's extent, both in pixel widths
        low, high = (offset - 0.5) * spacing, (offset + 0.5) * spacing
        weights = np.clip(np.minimum(high, taps / 2) - np.maximum(low, -taps / 2), 0, None)
    else:
        raise ValueError(f"rule {rule!r} has no weights along one axis")
    return weights / weights.sum()


def inflate_kernel(
    kernel: np.ndarray, taps: int, *, axis: int, rule: str, sigma: float = 1.0, spacing: float = 1.0
) -> np.ndarray:
    """Gives a kernel a further spatial axis, any number of axes to one more.

    Args:
        kernel: ``(*kernel, in / groups, out)``.
        taps: length of the new axis.
        axis: its place among the spatial axes.
        rule: all of `RULES` but ``random``. ``acs`` takes cubes: the 2D kernel's sides and ``taps`` are equal.

    Returns:
        The kernel in the dtype it had.
    """
    if rule == "acs" and taps > 1:
        return _acs(kernel, taps, axis)
    weights = profile("mean" if rule == "acs" else rule, taps, sigma=sigma, spacing=spacing).astype(kernel.dtype)
    shape = [taps if i == axis else 1 for i in range(kernel.ndim + 1)]
    return np.expand_dims(kernel, axis) * weights.reshape(shape)


def _acs(kernel: np.ndarray, taps: int, axis: int) -> np.ndarray:
    """Filters in three nearly equal groups; group g keeps its plane perpendicular to axis ``axis + g``."""
    window, filters = kernel.shape[:-2], kernel.shape[-1]
    if set(window) != {taps} or len(window) != 2:
        raise ValueError(f"acs turns a square kernel into a cube; this one is {window} with {taps} taps to gain")
    out = np.zeros((taps,) * 3 + kernel.shape[-2:], kernel.dtype)
    for group, members in enumerate(np.array_split(np.arange(filters), 3)):
        plane: list[slice | int] = [slice(None)] * 3
        plane[(axis + group) % 3] = taps // 2
        out[tuple(plane)][..., members] = kernel[..., members]
    return out


def named_layers(module: nnx.Module) -> dict[str, Any]:
    """Every layer with weights, by its path."""
    kinds = (Conv, ConvTranspose, Dense, Norm, LayerNorm)
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(module) if isinstance(m, kinds)}


def inflate_arrays(
    arrays: Mapping[str, np.ndarray], source: nnx.Module, target: nnx.Module, inflation: Inflation, axis: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The weights of a 2D network for its 3D counterpart.

    Args:
        arrays: weights of ``source`` by name.
        source, target: the networks, with shapes in place of arrays; layers correspond by name.
        inflation: the rules.
        axis: place of the new axis among the spatial axes; 0 is depth, or time.

    Returns:
        Weights by name, and what was done to each: ``mean``, ``copied``, ...

    Raises:
        UserError: a pattern of ``inflation.layers`` fits no layer; a layer cannot be inflated by its rule.
    """
    layers, wanted = named_layers(source), named_layers(target)
    convs = {name: layer for name, layer in layers.items() if isinstance(layer, Conv | ConvTranspose)}
    problems = [
        f"the pattern {pattern!r} fits no layer; layers read {', '.join(list(convs)[:3])}, ..."
        for pattern, _ in inflation.layers
        if not any(fnmatch.fnmatchcase(name, pattern) for name in convs)
    ]
    out, done = dict(arrays), dict.fromkeys(arrays, "copied")
    options: dict[str, Any] = {"axis": axis, "sigma": inflation.sigma, "spacing": inflation.spacing}
    for name, layer in layers.items():
        rule, norm = inflation.rule_of(name), _sibling(name, getattr(layer, "norm", None))
        if isinstance(layer, Norm | LayerNorm) or (isinstance(layer, Dense) and rule != "random"):
            continue
        shape = wanted[name].kernel.shape
        if rule == "random":
            _draw(out, done, name, shape, norm, inflation.seed)
            continue
        if isinstance(layer, ConvTranspose):
            rule = "repeat_uncorrected"
        elif rule == "repeat" and not norm:
            rule = "mean"  # nothing behind it takes the factor out
        taps = shape[axis]
        try:
            out[f"{name}.kernel"] = inflate_kernel(arrays[f"{name}.kernel"], taps, rule=rule, **options)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        done[f"{name}.kernel"] = rule if taps > 1 else "axis added"
        if rule == "repeat" and taps > 1:
            _correct(out, done, name, norm, layers[norm].eps, taps)
    if problems:
        raise join_problems(problems, "layers cannot be inflated")
    return out, done


def _sibling(name: str, sibling: str | None) -> str:
    """Path of the layer beside another; empty where there is none."""
    parent = name.rpartition(".")[0]
    return "" if sibling is None else f"{parent}.{sibling}" if parent else sibling


def _correct(out: dict[str, np.ndarray], done: dict[str, str], conv: str, norm: str, eps: float, taps: int) -> None:
    """The norm meets ``taps`` times what it met: mean and standard deviation grow by that factor, eps does not.

    The variance takes up what the constant eps would lack, so the norm's output is the same exactly.
    """
    if f"{conv}.bias" in out:
        out[f"{conv}.bias"] = out[f"{conv}.bias"] * taps
        done[f"{conv}.bias"] = f"times {taps}"
    if f"{norm}.var" in out:
        out[f"{norm}.mean"] = out[f"{norm}.mean"] * taps
        out[f"{norm}.var"] = out[f"{norm}.var"] * taps**2 + (taps**2 - 1) * eps
        done[f"{norm}.mean"] = done[f"{norm}.var"] = f"corrected for {taps} taps"


def _draw(
    out: dict[str, np.ndarray], done: dict[str, str], name: str, shape: tuple[int, ...], norm: str, seed: int
) -> None:
    """A kernel as He et al. draw it, no bias, and the norm behind it as it is built."""
    dtype = out[f"{name}.kernel"].dtype
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    out[f"{name}.kernel"] = (rng.standard_normal(shape) * HE_GAIN / np.sqrt(np.prod(shape[:-1]))).astype(dtype)
    done[f"{name}.kernel"] = "random"
    built = {f"{name}.bias": 0, f"{norm}.scale": 1, f"{norm}.bias": 0, f"{norm}.mean": 0, f"{norm}.var": 1}
    for leaf in built.keys() & out.keys():
        out[leaf] = np.full_like(out[leaf], built[leaf])
        done[leaf] = "reset"
