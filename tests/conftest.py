"""Shared fixtures. Real networks are slow to differentiate: tests use the toy encoder and small volumes."""

from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from xdim_jax.data import phantom

flags.FLAGS.mark_as_parsed()  # grain asks absl for its flags

CONVENTION = "brats2021"


@pytest.fixture
def quick_compile():
    """Programs without LLVM's optimisations, which take longer than the run where each program runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def doubles():
    """64-bit numbers, in JAX and in PyTorch."""
    import torch

    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(kind)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantom cases of 64^3 in the layout of BraTS 2021. Read only."""
    root = tmp_path_factory.mktemp("phantoms")
    phantom.write_brats(root, cases=6, convention=CONVENTION, shape=(64, 64, 64))
    return root


def toy_model(**encoder):
    """The toy DX-Net with another encoder option."""
    return TOY_MODEL | {"encoder": TOY_MODEL["encoder"] | encoder}


TOY_MODEL = {
    "name": "dxnet",
    "in_channels": 4,
    "out_channels": 3,
    "encoder": {"name": "efficientnet_toy", "eps": 1e-5, "padding": "symmetric", "drop_path": 0.1},
    "norm": "instance",
    "activation": "silu",
    "upsampling": "transposed",
    "filters": (16, 16, 8, 8, 8),
}
