"""Encoders and networks with seeded random weights, for test_inflation and test_loading."""

import numpy as np

from xdim_jax.nets import networks
from xdim_jax.nets.weights import Weights, abstract_encoder, module_leaves


def draw(module, seed=0):
    """Draw seeded values of the usual magnitude for every leaf of a module."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, leaf in module_leaves(module).items():
        kind = name.rpartition(".")[2]
        if kind == "kernel":
            arrays[name] = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif kind in ("scale", "var", "gamma"):
            arrays[name] = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            arrays[name] = 0.1 * rng.normal(size=leaf.shape)
    return arrays


def make_encoder(name="efficientnet_toy", *, norm="batch", padding="symmetric", eps=1e-3):
    section = {"name": name, "in_channels": 3, "ndim": 2, "norm": norm, "eps": eps, "padding": padding}
    return Weights("encoder", section, draw(abstract_encoder(section)))


def make_omnianet(**options):
    encoder = {"name": "efficientnet_toy", "eps": 1e-3, "padding": "symmetric", "drop_path": 0.0}
    section = {"name": "omnianet", "in_channels": 2, "out_channels": 3, "norm": "batch", "activation": "relu"}
    section |= {"upsampling": "nearest", "filters": (16, 16, 8, 8, 8), "deep_supervision": False, "encoder": encoder}
    section |= options
    return Weights("network", section, draw(networks.build_abstract(section)))
