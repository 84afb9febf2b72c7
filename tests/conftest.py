"""Shared fixtures. Real networks are slow to differentiate: tests use the toy encoder and small volumes."""

import multiprocessing.process
import os
import signal
import socket
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags

from configs import _shared
from xdim_jax.base.signals import StopRequest
from xdim_jax.data import phantom
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import open_recorder, read_records
from xdim_jax.runs.state import TrainState
from xdim_jax.training import label_maps, loop, mesh, validation

pytest.register_assert_rewrite("tests.packed_runs", "tests.processes")
flags.FLAGS.mark_as_parsed()  # grain reads its absl flags, which is an error until they have been parsed

CONVENTION = "brats2021"
_EMITTERS = "--xla_cpu_use_fusion_emitters"


@pytest.fixture(scope="session", autouse=True)
def _orbax_is_quiet():
    """Silence orbax: after a test of a failing save, its threads print messages that would disturb a later test."""
    checkpoint.silence_orbax()


@pytest.fixture(autouse=True)
def _environment_is_restored():
    """Check that a test restores the environment variables, which would otherwise affect later tests."""

    def ours():  # libraries set variables of their own when they are imported
        return {k: v for k, v in os.environ.items() if k.startswith(("XDIM_", "XDG_", "JAX_", "XLA_", "SLURM_"))}

    before = ours()
    yield
    assert ours() == before


@pytest.fixture(autouse=True)
def _programs_are_dropped(request):
    """Clear JAX's caches after a slow test: its compiled programs are large, and no other test uses them."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _quick_tests_start_no_process(_environment_is_restored, request, monkeypatch):
    if request.node.get_closest_marker("quick"):

        def refuse(*arguments, **options):
            raise AssertionError("a test that is marked quick starts a process")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


def pytest_configure():
    """Compile without LLVM's optimisations, also in processes that tests start: most programs run once.

    Let XLA use one thread, and reset SIGHUP.

    XLA's older emitters compile CPU kernels in a third of the time. The flag that selects them does not exist since JAX
    0.11. To keep the optimisations, run ``JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test``.
    """
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
    jax.config.update("jax_disable_most_optimizations", quick)
    if quick and jax.__version_info__ < (0, 11):
        flags = os.environ.get("XLA_FLAGS", "")
        if _EMITTERS not in flags:  # xdist's workers inherit the variable
            os.environ["XLA_FLAGS"] = f"{flags} {_EMITTERS}=false".strip()
    # XLA compiles other programs, with other roundings, for one core than for several. Tests compare the results of
    # this process with those of processes that it starts: all of them see one core.
    os.environ.setdefault("NPROC", "1")
    if hasattr(signal, "SIGHUP"):  # nohup ignores it, and runs that tests start would inherit this
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def optimised():
    """Compile with all optimisations, as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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


@pytest.fixture(scope="module")
def one_convolution():
    """Replace every network by a convolution: it is compiled in no time."""
    from tests.small_runs import use_one_convolution

    with pytest.MonkeyPatch.context() as patch:
        use_one_convolution(patch.setattr)
        yield


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantom cases of 64^3 in the layout of BraTS 2021. Read only."""
    root = tmp_path_factory.mktemp("phantoms")
    phantom.write_brats(root, cases=6, convention=CONVENTION, shape=(64, 64, 64))
    return root


@pytest.fixture(scope="module")
def camus4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantom patients of CAMUS, 96 x 64 pixels. Read only; runs prepare cases in a folder next to it."""
    root = tmp_path_factory.mktemp("camus") / "data"
    phantom.write_camus(root, cases=4, shape=(96, 64))
    return root


@pytest.fixture(scope="module")
def camus10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten phantom patients of CAMUS, 96 x 64 pixels. Read only; runs prepare cases in a folder next to it."""
    root = tmp_path_factory.mktemp("camus") / "data"
    phantom.write_camus(root, cases=10, shape=(96, 64))
    return root


@pytest.fixture(scope="module")
def runs_alone(camus4: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The workdirs of the runs ``packed_runs.RUNS``, each trained by itself. Read only."""
    from tests import packed_runs

    root = tmp_path_factory.mktemp("alone")
    with packed_runs.small_network():
        return [packed_runs.train_alone(camus4, root / f"run{i}", own) for i, own in enumerate(packed_runs.RUNS)]


@pytest.fixture
def float64():
    """64-bit numbers in JAX."""
    with jax.enable_x64(True):
        yield


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def records(workdir, kind):
    """Return the records of one kind ("train", "epoch" or "validation") of a run."""
    return [record for record in read_records(workdir) if record["kind"] == kind]


def damage_checkpoint(folder):
    """Truncate every array file of a checkpoint."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files, f"{folder} holds no array files"
    for path in files:
        path.write_bytes(path.read_bytes()[:10])


def small_state(value, at=0):
    """A training state of a few numbers, after ``at`` steps."""
    params = optax.LookaheadParams(fast={"w": jnp.full(4, value)}, slow={"w": jnp.full(4, value / 2)})
    return TrainState(jnp.int32(at), params, {"n": {"mean": jnp.full(2, value)}}, {"mu": jnp.zeros(4)}, {})


def make_run(workdir, step, regions, *, first=0, config=None, **options):
    """Return a run of 3 epochs of 4 steps. ``first`` is the number of completed steps; ``options`` replace fields."""
    settings = {"epochs": 3, "checkpoint_minutes": 99.0, "log_every": 100, "watchdog_seconds": 0.0}
    settings = _shared.get_config({}).train.to_dict() | settings | (config or {})
    fields = {
        "per_epoch": 4,
        "step": step,
        "key": jax.random.key(0),
        "schedule": lambda at: 1e-3,
        "devices": mesh.make_devices(1, 1, batch=1),
        "checkpoints": checkpoint.open_checkpoints(workdir),
        "recorder": open_recorder(workdir, first, writes=True),
        "validate": lambda weights, stop: validation.ValidationResult(dict.fromkeys(regions, 0.5), {}, {}),
        "label_maps": label_maps.LabelMapWriter(workdir, lambda weights: "digest"),
        "stop": StopRequest(),
        "regions": regions,
        "workdir": workdir,
    }
    return loop.Run(config=settings, **(fields | options))


def toy_model(**encoder):
    """Return the config of the toy DX-Net with other options of the encoder."""
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
