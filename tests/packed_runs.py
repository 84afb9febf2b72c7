"""Settings of three runs of a toy network, trained in one pack or each by itself, for test_pack and test_bucket.

``python -m tests.packed_runs`` is ``python -m xdim_jax.train`` with the toy network.
"""

import contextlib
import io

import jax
import numpy as np
import pytest
from flax import nnx

from tests import small_runs
from tests.small_runs import RECIPE
from xdim_jax import ops, train
from xdim_jax.base import command, signals
from xdim_jax.base.config import load_config
from xdim_jax.nets import layers, networks
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.training import pack

SHAPES = [
    *small_runs.SHAPES,
    "--config.optim.name=nadam_torch",
    "--config.train.overlays=0",
]
# the settings in which runs of one pack may differ
RUNS = [
    {
        "seed": 0, "train.epochs": 3, "optim.schedule.peak": 1e-2, "optim.b1": 0.9, "optim.b2": 0.99, "optim.eps": 1e-8,
        "optim.momentum_decay": 4e-3, "optim.weight_decay": 1e-3, "optim.clip_norm": 0.5, "optim.ema": 0.9,
        "optim.lookahead.step_size": 0.5, "loss.eps": 1e-5, "loss.weights": "(1.0,2.0,3.0,4.0)", "data.fold": 0,
    },
    {
        "seed": 5, "train.epochs": 2, "optim.schedule.peak": 3e-2, "optim.b1": 0.8, "optim.b2": 0.9, "optim.eps": 1e-3,
        "optim.momentum_decay": 4e-2, "optim.weight_decay": 1e-1, "optim.clip_norm": 0.1, "optim.ema": 0.5,
        "optim.lookahead.step_size": 0.8, "loss.eps": 1e-1, "loss.weights": "()", "data.fold": 1,
    },
    {
        "seed": 5, "train.epochs": 4, "optim.schedule.peak": 1e-3, "optim.b1": 0.95, "optim.b2": 0.99, "optim.eps": 0.9,
        "optim.momentum_decay": 1e-3, "optim.weight_decay": 1e-2, "optim.clip_norm": 9.0, "optim.ema": 0.99,
        "optim.lookahead.step_size": 0.1, "loss.eps": 1.0, "loss.weights": "(0.0,1.0,1.0,1.0)", "data.fold": 1,
    },
]  # fmt: skip


class SmallNetwork(nnx.Module):
    """A convolution, batch norm with SiLU, drop path, and a linear map."""

    stages = parts = ()

    def __init__(self, channels, seed, drop=0.3):
        rngs = nnx.Rngs(seed)
        self.kernel = nnx.Param(0.3 * jax.random.normal(rngs.params(), (3, 3, 1, 6)))
        self.norm = layers.Norm(6, layers.Style(2, eps=1e-3), "silu")
        self.drop = layers.DropPath(drop)
        self.head = nnx.Param(0.3 * jax.random.normal(rngs.params(), (6, channels)))

    def __call__(self, image, rngs=None, levels=False):
        y = ops.conv(image, self.kernel[...], strides=(1, 1), padding=((1, 1), (1, 1)))
        y = self.drop(self.norm(y), rngs)
        logits = y @ self.head[...]
        return [logits] if levels else logits


@contextlib.contextmanager
def small_network():
    """Replace every network by `SmallNetwork`, without drop path if the config has none."""

    def build(config, seed):
        return SmallNetwork(config["out_channels"], seed or 0, drop=0.3 if config["encoder"]["drop_path"] else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "build", build)
        patch.setenv("XDIM_JAX_CACHE", "off")
        yield


def overrides(data, own):
    return [*SHAPES, f"--config.data.root={data}", *(f"--config.{k}={v}" for k, v in own.items())]


def load(data, own, *more):
    return load_config(RECIPE, [*overrides(data, own), *more])


def train_alone(data, workdir, own):
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([f"--config={RECIPE}", f"--workdir={workdir}", *overrides(data, own)]) == 0
    return workdir


def make_pack(data, slots, layout="scan"):
    return pack.Pack(load(data, RUNS[0]), slots, layout, signals.StopRequest())


def finish_runs(group):
    """Step until every run has ended, and remove each run when it ends."""
    while any(group.members):
        group.step()
        for member in [m for m in group.members if m is not None and not m.running]:
            group.remove(member)


def assert_same_run(found, expected):
    """Check that two workdirs have the same records and, to rounding, the same final weights."""
    steps = [read_records(w, STEPS_FILE) for w in (found, expected)]
    assert [s["step"] for s in steps[0]] == [s["step"] for s in steps[1]]
    assert [s["batch"] for s in steps[0]] == [s["batch"] for s in steps[1]], "other batches"
    for key, far in (("loss", 2e-4), ("grad_norm", 2e-3), ("update_norm", 2e-3)):
        np.testing.assert_allclose([s[key] for s in steps[0]], [s[key] for s in steps[1]], rtol=far, err_msg=key)
    scores = [[r for r in read_records(w) if r["kind"] == "validation"] for w in (found, expected)]
    assert len(scores[0]) == len(scores[1]) > 0
    np.testing.assert_allclose([r["dice"] for r in scores[0]], [r["dice"] for r in scores[1]], atol=2e-3)
    rates = [[r["learning_rate"] for r in read_records(w) if r["kind"] == "train"] for w in (found, expected)]
    assert rates[0] == rates[1]
    states = [read_state(w) for w in (found, expected)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def read_state(workdir):
    """Read the newest state with orbax, not with the package."""
    import orbax.checkpoint as ocp

    newest = max((workdir / checkpoint.LATEST_FOLDER).glob("[0-9]*"), key=lambda p: int(p.name))
    with ocp.StandardCheckpointer() as reader:
        return reader.restore((newest / "state").absolute())


if __name__ == "__main__":
    with small_network():
        command.run(train.main)
