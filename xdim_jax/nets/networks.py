"""The interface of a network, the table of all networks, and functions that build one from a ``model`` section.

To add a network, write a class with the members of `Network` into a new file, add it to `NETWORKS`, and add a test.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
from flax import nnx

from xdim_jax.base.errors import UserError
from xdim_jax.nets.dsnet import DSNet
from xdim_jax.nets.layers import ShapesOnly
from xdim_jax.nets.unet import DXNet, OmniaNet


class Network(Protocol):
    """A network: a ``flax.nnx.Module`` with these members.

    The constructor takes the keys of the ``model`` section of a config, without ``name``, as keyword arguments, and
    ``rngs``. The class methods take the same section; they need no built network.

    Attributes:
        ndim: Number of spatial axes, 2 or 3.
        fixed_axes: Number of leading spatial axes that `xdim_jax.plan` does not vary when it searches for the largest
            patch: 1 for DS-Net, whose depth is limited; else 0.
        encoder_path: Keys that lead to the encoder, outermost first; the same in the section and in the parameters.
        remat: Names of the stages whose activations the backward pass recomputes; see `set_remat`.
    """

    ndim: ClassVar[int]
    fixed_axes: ClassVar[int]
    encoder_path: ClassVar[tuple[str, ...]]
    remat: tuple[str, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the parts whose activations can be recomputed. ``a.b`` is the stage ``b`` of the attribute ``a``."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the network in profiles, in the order of the forward pass."""
        ...

    @classmethod
    def size_problems(cls, section: Mapping[str, Any], size: Sequence[int]) -> list[str]:
        """Return one sentence for each reason why the network cannot process a size; an empty list if there is none.

        The sentences give the axis, the level and valid sizes.

        Args:
            section: The ``model`` section.
            size: Spatial sides of a training image, ``ndim`` numbers.
        """
        ...

    @classmethod
    def check_space(cls, section: Mapping[str, Any], size: Sequence[int], devices: int) -> None:
        """Check that the first spatial axis of an image can be divided among devices at every level.

        Args:
            section: The ``model`` section.
            size: Spatial sides of an image.
            devices: Number of devices.

        Raises:
            UserError: The axis cannot be divided; the message gives the config key ``mesh.space``, and the nearest
                valid sizes if there are any.
        """
        ...

    def features(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> list[jax.Array | None]:
        """Return the five features of the encoder, finest first; None for a level without a feature."""
        ...

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None, *, levels: bool = False) -> Any:
        """Return the logits ``(batch, *spatial, out_channels)`` of an image ``(batch, *spatial, in_channels)``.

        With ``levels``, return a list: the logits, and then the logits of the deep-supervision heads, finest first.
        """
        ...


NETWORKS: dict[str, type[Network]] = {"omnianet": OmniaNet, "dxnet": DXNet, "dsnet": DSNet}


def get_network(config: Mapping[str, Any]) -> type[Network]:
    """Return the class of the network that a ``model`` section names.

    Raises:
        ValueError: The name is unknown; the message lists the known names.
    """
    name = config.get("name")
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[name]


def build(config: Mapping[str, Any], *, seed: int | None) -> nnx.Module:
    """Build the network that a ``model`` section describes, randomly initialised, in training mode.

    Args:
        config: The ``model`` section.
        seed: Seed of the weights; None if only the shapes of the arrays are needed.

    Raises:
        ValueError: A key is missing or unknown, or a network, encoder, norm or other choice is unknown.
    """
    make: Any = get_network(config)
    try:
        return make(rngs=ShapesOnly() if seed is None else nnx.Rngs(seed), **_options(config))
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{config['name']}: {str(error).partition('__init__() ')[2] or error}") from error


def build_abstract(config: Mapping[str, Any]) -> nnx.Module:
    """Build the same network as `build`, with shapes in place of arrays, for example to compare it with a file."""
    return nnx.eval_shape(lambda: build(config, seed=None))


def part_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the parts of a network in profiles; see `xdim_jax.training.roofline`."""
    network: Any = build_abstract(config)
    return network.parts


def spatial_axes(config: Mapping[str, Any]) -> int:
    """Return the number of spatial axes of a network, 2 or 3."""
    return get_network(config).ndim


def depth_axis(config: Mapping[str, Any]) -> int:
    """Return the spatial axis of a 3D network along which slices are stacked; 0 for a 2D network."""
    return (config.get("depth") or {}).get("axis", 0)


def set_remat(model: Any, names: str) -> None:
    """Select the stages whose activations are recomputed in the backward pass, which saves memory.

    Args:
        model: Network from `build`, changed in place.
        names: Names among its ``stages``, separated by commas; ``*`` matches any characters, so ``"*"`` selects all.

    Raises:
        UserError: A name matches no stage.
    """
    patterns = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [p for p in patterns if not fnmatch.filter(model.stages, p)]:
        raise UserError(
            f"config.train.remat={names}: {', '.join(unknown)} matches no stage of this network; its stages are: "
            f"{', '.join(model.stages)}"
        )
    model.remat = tuple(s for s in model.stages if any(fnmatch.fnmatchcase(s, p) for p in patterns))
    for owner in {stage.rpartition(".")[0] for stage in model.stages} - {""}:
        prefix = f"{owner}."
        getattr(model, owner).remat = tuple(s.removeprefix(prefix) for s in model.remat if s.startswith(prefix))


def plain_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config section as nested dicts, with tuples instead of lists."""
    return {
        key: plain_dict(value) if isinstance(value, Mapping) or hasattr(value, "to_dict") else _tuple(value)
        for key, value in config.items()
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the network's constructor."""
    return {key: value for key, value in plain_dict(config).items() if key != "name"}


def check_patch(config: Mapping[str, Any], patch: Sequence[int], batch: int | None = None) -> None:
    """Check that a network can be trained with patches of a given size.

    Args:
        config: The ``model`` section.
        patch: Spatial sides of a patch.
        batch: Number of samples of a training step that are processed together; None for evaluation mode.

    Raises:
        ValueError: The size is not valid; the message gives the axis, the level and the nearest valid sizes.
    """
    network, name = get_network(config), config["name"]
    if len(patch) != network.ndim:
        raise ValueError(
            f"data.patch={tuple(patch)} has {len(patch)} axes; {name} needs {network.ndim} "
            f"({', '.join('DHW'[3 - network.ndim :])})"
        )
    if wrong := [side for side in patch if isinstance(side, bool) or not isinstance(side, int)]:
        raise ValueError(f"data.patch={tuple(patch)}: {wrong} are not integers")
    options = _options(config)
    if batch == 1 and options.get("norm") == "batch":
        # with one sample, batch norm uses the statistics of instance norm, and needs the same smallest size
        options = {**options, "norm": "instance"}
    if problems := network.size_problems(options, patch):
        raise ValueError(f"data.patch={tuple(patch)} does not fit {name}; " + "; ".join(problems))


def check_space(config: Mapping[str, Any], patch: Sequence[int], space: int) -> None:
    """Check that the first axis of a patch can be divided among devices at every level of a network.

    Args:
        config: The ``model`` section.
        patch: Spatial sides of a patch.
        space: Number of devices, ``config.mesh.space``.

    Raises:
        UserError: The axis cannot be divided; the message gives the nearest valid sizes, if there are any.
    """
    if space > 1:
        get_network(config).check_space(_options(config), patch, space)


def count_parameters(params: Any) -> int:
    """Return the number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
