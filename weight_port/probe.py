"""Comparison of converted weights with their source, by the features of one forward pass of both."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from weight_port.sources import import_timm, import_torch
from weight_port.timm_models import TimmName
from xdim_jax.inference.model import make_model
from xdim_jax.nets.encoders import get_family
from xdim_jax.nets.weights import Weights

SIZE = 64  # side of the test image in pixels


def timm_features(model: Any, encoder: str, image: Any) -> list[Any]:
    """Return the outputs of the layers of a timm model that correspond to the five features of an encoder.

    The outputs are collected by hooks, because timm's own ``features_only`` uses other layers than the networks of the
    paper.

    Args:
        model: timm model.
        encoder: Name of the encoder, see `xdim_jax.nets.encoders.ENCODERS`.
        image: Tensor ``(batch, channels, H, W)``.

    Returns:
        One tensor for each level; None for a level without a feature.
    """
    layers = get_family(encoder).feature_layers[encoder]
    found: dict[str, Any] = {}
    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: found.__setitem__(layer, output.clone())
        )
        for layer in layers
        if layer
    ]
    try:
        model.forward_features(image)
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(layer) if layer else None for layer in layers]


def probe_timm(weights: Weights, state: Mapping[str, np.ndarray], name: TimmName) -> dict[str, Any]:
    """Compare the features of timm's model with those of the encoder, in float32 on a noise image.

    Args:
        weights: Weights of the encoder.
        state: State_dict of timm's model.
        name: Name of timm's model.

    Returns:
        The entry of the report: what was compared, and the largest difference of each feature.
    """
    timm = import_timm()
    if timm is None:
        return {"skipped": "torch and timm are not installed"}
    torch = import_torch("the probe")
    channels = weights.model["in_channels"]
    model = timm.create_model(name.architecture, pretrained=False, in_chans=channels, num_classes=0)
    model.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in state.items()}, strict=False)
    image = np.random.default_rng(0).standard_normal((1, SIZE, SIZE, channels)).astype(np.float32)
    with torch.no_grad():
        expected = timm_features(model.eval(), weights.model["name"], torch.from_numpy(image.transpose(0, 3, 1, 2)))
    pairs = zip(make_model(weights, "the converted weights").features(image), expected, strict=True)
    return {
        "against": f"timm {timm.__version__} {name.architecture}, noise of {SIZE}x{SIZE}, float32",
        "features": [None if b is None else _differences(a, b.numpy().transpose(0, 2, 3, 1)) for a, b in pairs],
    }


def probe_inflation(flat: Weights, inflated: Weights) -> dict[str, Any]:
    """Compare the 2D encoder on a noise image with the inflated encoder on 32 slices that are copies of the image.

    Args:
        flat: Weights of the 2D encoder.
        inflated: Weights of the inflated encoder.

    Returns:
        The entry of the report: what was compared, and the largest difference of each feature.
    """
    axis, channels = inflated.model["depth"]["axis"], inflated.model["in_channels"]
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, SIZE, SIZE, channels)).astype(np.float32)
    volume = np.repeat(np.expand_dims(image, axis + 1), 32, axis + 1)
    features_3d = make_model(inflated, "the inflated weights").features(volume)
    features_2d = make_model(flat, "the 2D weights").features(image)
    pairs = zip(features_3d, features_2d, strict=True)
    return {
        "against": f"the 2D encoder, on a volume of 32 identical slices of {SIZE}x{SIZE} noise, float32",
        "features": [
            None if a is None or b is None else _differences(a, np.expand_dims(np.asarray(b), axis + 1))
            for a, b in pairs
        ],
    }


def _differences(found: jax.Array | None, expected: Any) -> dict[str, float]:
    """Return the largest absolute difference, and its ratio to the largest expected value."""
    assert found is not None
    largest = float(np.abs(np.asarray(found) - expected).max())
    return {"largest": largest, "relative": largest / max(float(np.abs(expected).max()), 1e-30)}
