"""Networks and encoders with their weights, which can be called with arrays."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from xdim_jax import ops
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json
from xdim_jax.data.case import Dataset
from xdim_jax.data.datasets import trained_dataset
from xdim_jax.inference.output import make_output
from xdim_jax.nets import networks
from xdim_jax.nets.fine_tuning import Names
from xdim_jax.nets.functional import split_model
from xdim_jax.nets.weights import (
    Weights,
    abstract_encoder,
    check_leaves,
    flatten,
    module_leaves,
    read_weights,
    replace_leaves,
)
from xdim_jax.runs import checkpoint
from xdim_jax.runs.workdir import CONFIG_FILE, DATA_FILE, find_members, read_config


class Model:
    """A network with its weights, in evaluation mode.

    A call is a pure function of the image, so it can be used inside ``jax.jit``, ``jax.vmap`` and ``jax.grad``.

    Attributes:
        config: Description of the network (the ``model`` section of a config) or of the encoder.
        params: Trainable weights, nested dicts of arrays.
        stats: Running statistics of the norms, nested dicts of arrays.
        source: Path from which the weights were read, or another name of them for messages.
    """

    def __init__(self, config: dict[str, Any], graphdef: Any, params: Any, stats: Any, source: str, *, encoder: bool):
        self.config, self.params, self.stats, self.source = config, params, stats, source
        self._graphdef, self._encoder = graphdef, encoder
        methods = ("__call__", "__call__" if encoder else "features")
        functions = [functools.partial(self._apply, method) for method in methods]
        # JAX allows compiler options only in a jitted function that is not called inside another one
        self._inner = [jax.jit(f) for f in functions]
        self._outer = [jax.jit(f, compiler_options=ops.compiler_options()) for f in functions]

    def _apply(self, method: str, params: Any, stats: Any, image: jax.Array) -> Any:
        """Call a method of the network in evaluation mode."""
        model = nnx.merge(self._graphdef, params, stats)
        model.eval()
        return getattr(model, method)(image)

    def __call__(self, image: Any) -> jax.Array:
        """Return logits ``(batch, *spatial, out_channels)`` for a float image ``(batch, *spatial, in_channels)``.

        Raises:
            ValueError: The image has a wrong rank, dtype, number of channels or size; or this is an encoder.
        """
        if self._encoder:
            raise ValueError(
                f"{self.source} contains the encoder {self.config['name']}, which has no logits; call features()"
            )
        return self._run(0, image)

    def features(self, image: Any) -> list[jax.Array | None]:
        """Return the five feature maps of the encoder for a float image, finest first; None for levels it lacks.

        Raises:
            ValueError: The image has a wrong rank, dtype, number of channels or size.
        """
        return self._run(1, image)

    def _run(self, which: int, image: Any) -> Any:
        """Compute logits (``which`` 0) or features (1)."""
        image = self._checked(image)
        function = (self._inner if isinstance(image, Tracer) else self._outer)[which]
        return function(self.params, self.stats, image)

    def _checked(self, image: Any) -> jax.Array:
        """Return the image as an array of at least float32. Raises ValueError if the network cannot use it."""
        if isinstance(image, np.ndarray) and not image.dtype.isnative:  # as in NIfTI files of the other byte order
            image = image.astype(image.dtype.newbyteorder("="))
        image = jnp.asarray(image)
        ndim = self.config["ndim"] if self._encoder else networks.spatial_axes(self.config)
        shape = ("batch", *("DHW"[3 - ndim :]), self.config["in_channels"])
        if image.ndim != ndim + 2 or image.shape[-1] != self.config["in_channels"]:
            raise ValueError(f"image has shape {image.shape}; expected ({', '.join(map(str, shape))})")
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(f"image has dtype {image.dtype}; expected floats, normalised as the images in training")
        return image.astype(jnp.promote_types(image.dtype, jnp.float32))


def load_model(path: str | Path) -> Model:
    """Load a network or an encoder with its weights.

    Args:
        path: A weights file of ``weight_port``, or the workdir of a run, whose best weights are loaded.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: The path has no weights, or they do not fit the network that it describes.
    """
    return make_model(read_file_or_workdir(Path(path)), str(path))


def make_model(weights: Weights, source: str) -> Model:
    """Build a model from weights in memory.

    Args:
        weights: Weights, with the description of their network or encoder.
        source: Name of the weights in messages.

    Raises:
        UserError: The weights do not fit the network that they describe.
    """
    encoder = weights.kind == "encoder"
    try:
        module = abstract_encoder(weights.model) if encoder else networks.build_abstract(weights.model)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}: the network that it describes cannot be built: {error}") from error
    check_leaves(weights.arrays, module_leaves(module), f"the weights of {source}")
    graphdef, params, stats = split_model(module)
    arrays = {n: jnp.asarray(a, jnp.promote_types(a.dtype, jnp.float32)) for n, a in weights.arrays.items()}
    return Model(
        weights.model, graphdef, replace_leaves(params, arrays), replace_leaves(stats, arrays), source, encoder=encoder
    )


def read_file_or_workdir(path: Path) -> Weights:
    """Read weights, given a weights file of ``weight_port``, or the workdir of a run, whose best weights are read.

    Raises:
        UserError: The path has no weights, or they cannot be read.
    """
    if not path.is_dir():
        return read_weights(path)
    if not (path / CONFIG_FILE).is_file():
        if (first := find_members([path])[0]) != path:
            raise UserError(f"{path} is a cross-validation of several runs; give one of its folds, e.g. {first}")
        raise UserError(f"{path} is not the workdir of a run (it has no {CONFIG_FILE}), nor a weights file")
    config = networks.plain_dict(read_config(path)["model"])
    try:
        _, params, stats = split_model(networks.build(config, seed=0))
    except ValueError as error:
        raise UserError(f"{path / CONFIG_FILE}: model: {error}") from error
    params, stats, source = checkpoint.load_weights(path, params, stats)
    arrays = {name: np.asarray(array) for name, array in (flatten(params) | flatten(stats)).items()}
    record = {"from": "xdim_jax", "workdir": str(path.absolute()), "weights": source}
    return Weights("network", config, arrays, {}, record, _names(path))


def _names(workdir: Path) -> Names | None:
    """Return the meaning of the channels of a run; None if the workdir lacks the description of the data."""
    if not (workdir / DATA_FILE).is_file():
        return None
    config = read_config(workdir)
    return make_names(trained_dataset(config.data.to_dict(), read_json(workdir / DATA_FILE)), config.output)


def make_names(dataset: Dataset, activation: str) -> Names:
    """Return the meaning of the channels of a network that is trained on a data set."""
    return Names(tuple(dataset.channels), make_output(activation, dataset).channels, activation)
