"""The paper's networks from the ``model`` section of a config: `build` makes one, `check_patch` checks a size."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from xdim_jax.base.errors import UserError
from xdim_jax.nets.dsnet import DSNet, volume_problems
from xdim_jax.nets.layers import LEVELS, Depth, Style
from xdim_jax.nets.unet import UNet, side_problems

NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "omnianet": lambda **options: UNet(ndim=2, **options),
    "dxnet": lambda **options: UNet(ndim=3, **options),
    "dsnet": DSNet,
}


def build(config: Mapping[str, Any], *, seed: int) -> nnx.Module:
    """The network that the ``model`` section of a config describes, with random weights, in training mode.

    Raises:
        ValueError: unknown network, encoder, norm or other choice; missing or unknown key.
    """
    return _builder(config)(rngs=nnx.Rngs(seed))


def build_abstract(config: Mapping[str, Any]) -> nnx.Module:
    """The same with shapes in place of arrays: what a weights file is compared with."""
    return nnx.eval_shape(lambda: build(config, seed=0))


def parts_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that the operations of a network have in profiles, in order; see `xdim_jax.training.roofline`."""
    network: Any = build_abstract(config)
    return network.parts


def set_remat(model: Any, names: str) -> None:
    """Makes a network compute the activations of some stages again in the backward pass, for memory.

    Args:
        model: of `build`.
        names: of its ``stages``, with commas; ``*`` stands for anything. ``"*"`` is all.

    Raises:
        UserError: a name that fits no stage.
    """
    patterns = tuple(name.strip() for name in names.split(",") if name.strip())
    if unknown := [p for p in patterns if not any(fnmatch.fnmatchcase(s, p) for s in model.stages)]:
        raise UserError(
            f"config.train.remat={names}: {', '.join(unknown)} fits no stage of this network; it has: "
            f"{', '.join(model.stages)}"
        )
    model.remat = patterns
    if inner := getattr(model, "inner", None):
        inner.remat = tuple(s for s in inner.stages if any(fnmatch.fnmatchcase(f"inner.{s}", p) for p in patterns))


def _builder(config: Mapping[str, Any]) -> Callable[..., nnx.Module]:
    options = plain(config)
    name = options.pop("name", None)
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")

    def make(rngs: nnx.Rngs) -> nnx.Module:
        try:
            return NETWORKS[name](rngs=rngs, **options)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise ValueError(f"{name}: {str(error).partition('__init__() ')[2] or error}") from error

    return make


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A section as nested dicts of plain values, lists as tuples."""
    return {
        key: plain(value) if isinstance(value, Mapping) or hasattr(value, "to_dict") else _tuple(value)
        for key, value in config.items()
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def spatial_axes(config: Mapping[str, Any]) -> int:
    """2 or 3."""
    return 2 if config["name"] == "omnianet" else 3


def check_patch(config: Mapping[str, Any], patch: Sequence[int]) -> None:
    """Raises ValueError, naming level, axis and nearest legal sizes, if the network cannot take such a patch."""
    name, ndim = config["name"], spatial_axes(config)
    axes = "DHW"[3 - ndim :]
    if len(patch) != ndim:
        raise ValueError(f"data.patch has {len(patch)} axes, {tuple(patch)}; {name} takes {ndim} ({', '.join(axes)})")
    if name == "dsnet":
        strides = _level_strides(2, {})
        problems = volume_problems(patch, strides)
    else:
        strides = _level_strides(ndim, plain(config.get("depth") or {}))
        problems = side_problems(patch, strides)
    if problems:
        raise ValueError(f"data.patch={tuple(patch)} does not fit {name}; " + "; ".join(problems))
    coarsest = [n // math.prod(s[i] for s in strides) for i, n in enumerate(patch[-len(strides[0]) :])]
    if name != "dsnet" and config["norm"] != "batch" and set(coarsest) == {1}:
        raise ValueError(
            f"data.patch={tuple(patch)} leaves one voxel at the coarsest level, where a norm over space has "
            f"nothing to normalise; make at least one side {2 * max(patch)}"
        )


def check_space(config: Mapping[str, Any], patch: Sequence[int], space: int) -> None:
    """Raises UserError unless the first axis of a patch can be spread over ``space`` devices at every level."""
    if space == 1:
        return
    if config["name"] == "dsnet":
        raise UserError(
            f"config.mesh.space={space}: DS-Net folds the depth into colour channels; spread the batch instead "
            "(mesh.space=1)"
        )
    strides = _level_strides(spatial_axes(config), plain(config.get("depth") or {}))
    coarsest = patch[0] // math.prod(s[0] for s in strides)
    if coarsest % space:
        step = patch[0] // coarsest * space
        low = max(patch[0] // step, 1) * step
        raise UserError(
            f"config.mesh.space={space} does not divide the {coarsest} planes that the coarsest level has of "
            f"config.data.patch={tuple(patch)}; make the first side {low} or {low + step}"
        )


def _level_strides(ndim: int, depth: Mapping[str, Any]) -> list[tuple[int, ...]]:
    style = Style(ndim, depth=Depth(**depth))
    return [style.strides(level) for level in range(LEVELS)]


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
