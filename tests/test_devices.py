"""How a training step is laid out on devices, and what may not change its numbers: precision, parts, recomputation."""

import functools
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.conftest import free_port
from tests.kill_and_resume import OPTIONS
from tests.processes import device_flags, one_device_environment
from xdim_jax import ops
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import StopRequest
from xdim_jax.inference.output import Output
from xdim_jax.nets import networks
from xdim_jax.nets.functional import PRECISIONS, split_model
from xdim_jax.nets.layers import Conv, DropPath, Norm, Style
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import STEPS_FILE, read_records
from xdim_jax.runs.state import TrainState, evaluation_weights, init_state
from xdim_jax.training import check, mesh, program
from xdim_jax.training.loss import make_loss
from xdim_jax.training.step import make_train_step
from xdim_jax.training.train import train_run

REPO = Path(__file__).parent.parent
TOY = ["--config.model.filters=(8,8,8,8,8)"]
NETWORKS = {
    "dxnet": [
        "configs/brats_dxnet.py:phantom",
        "--config.model.encoder.name=efficientnet_toy",
        "--config.model.encoder.drop_path=0.0",
        "--config.model.depth.strides=(2,2,1,1,1)",
        "--config.data.patch=(32,32,32)",
        *TOY,
    ],
    "omnianet": [
        "configs/camus_omnianet.py:phantom",
        "--config.model.encoder.name=efficientnet_toy",
        "--config.model.encoder.drop_path=0.0",
        "--config.data.patch=(256,32)",
        "--config.loss.name=dice_ce",
        *TOY,
    ],
    "dsnet": [
        "configs/brats_dsnet.py:phantom",
        "--config.model.inner.encoder.name=efficientnet_toy",
        "--config.model.inner.encoder.drop_path=0.0",
        "--config.model.inner.filters=(8,8,8,8,8)",
        "--config.model.filters=(4,4,4,4)",
        "--config.data.patch=(97,32,32)",
    ],
}


def configured(network, *overrides):
    """The config and the data set of a toy network."""
    name, *options = NETWORKS[network]
    config = load_config(name, [*options, *(f"--config.{o}" for o in overrides)])
    return check.resolve_config(config)


def keep_gradients():
    """An optimiser that changes nothing and keeps the gradients, exactly, as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def make_step(config, dataset, *, axis=None, logits=False):
    """A step whose new ``opt_state`` is the gradients, and the state before it."""
    made, params, stats = program.make_program(config, dataset, per_epoch=1, axis=axis)
    tx = keep_gradients()
    one = make_train_step(
        made.graphdef,
        make_loss(config.loss, made.output.activation, len(made.output.channels)),
        made.output,
        tx,
        dtype=PRECISIONS[config.train.precision],
        accumulate=config.train.accumulate,
        axis=axis,
    )

    def with_logits(state, batch, key):
        out = made.forward((state.params, state.stats), batch["image"])
        state, metrics = one(state, batch, key)
        return state, metrics | {"logits": out}

    state = TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params), {})
    return with_logits if logits else one, state


def make_batch(config, samples, *, uneven=False):
    """Noise of an image's size; ``uneven``: the samples differ greatly in mean and in spread."""
    rng = np.random.default_rng(0)
    shape = (samples, *config.data.patch)
    image = rng.normal(size=(*shape, config.model.in_channels)).astype(np.float32)
    if uneven:
        number = np.arange(samples, dtype=np.float32).reshape(-1, *(1,) * (image.ndim - 1))
        image = image * (1 + number) + 3 * number
    label = rng.integers(0, 4, (samples, *(n // 4 + 1 for n in config.data.patch)), np.uint8)
    for axis, n in enumerate(config.data.patch, 1):
        label = np.take(label, np.arange(n) // 4, axis)
    return {"image": image, "label": label}


def run_step(one, state, batch, data=1, space=1, parallel="jit"):
    devices = mesh.make_devices(data, space, batch=len(batch["image"]), parallel=parallel)
    # a step is donated its state
    placed = devices.put_state(jax.tree.map(jnp.copy, state))
    key = devices.put_state(jax.random.key(0))
    at = devices.put_batch(batch)
    return jax.device_get(devices.lower(one, placed, at, key).compile()(placed, at, key))


def differences(found, expected):
    """Per part of a step's results, the largest difference relative to the largest value of that part's tree."""
    result = {}
    for name in expected:
        pairs = zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True)
        pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
        scale = max((np.abs(b).max() for _, b in pairs), default=0.0) or 1.0
        result[name] = float(max((np.abs(a - b).max() for a, b in pairs), default=0.0) / scale)
    return result


def numbers(new, metrics):
    return {"grads": new.opt_state, "stats": new.stats, **metrics}


def print_layouts(network, overrides, layouts):
    """Runs in a process with several devices and 64-bit numbers: compares layouts with one device."""
    config, dataset = configured(network, *overrides)
    one, state = make_step(config, dataset, logits=True)
    sixty_four = functools.partial(jax.tree.map, lambda a: a.astype(np.promote_types(a.dtype, a.dtype.kind + "8")))
    state = state._replace(**{k: sixty_four(getattr(state, k)) for k in ("params", "stats", "opt_state")})
    batch = make_batch(config, config.data.batch, uneven=True)
    batch["image"] = batch["image"].astype(np.float64)
    expected = numbers(*run_step(one, state, batch))
    result = []
    for data, space, parallel in layouts:
        if parallel == "pmap":
            expected = {k: v for k, v in expected.items() if k != "logits"}  # each device has those of its samples
            one, _ = make_step(config, dataset, axis="data")
        found = numbers(*run_step(one, state, batch, data, space, parallel))
        result.append(differences({k: found[k] for k in expected}, expected))
    print(json.dumps(result))


@pytest.fixture(scope="module")
def printed():
    """What the functions below print in one process with eight devices: call -> content of the line."""
    calls = [
        *(f"print_depthwise{case}" for case in DEPTHWISE),
        *(f"print_dense{case}" for case in DENSE),
        "print_norms()",
        f"print_refusals({LAYOUTS!r})",
    ]
    code = "from tests import test_devices as t\nimport json\n"
    code += "".join(f"t.{call}\n" for call in calls)
    return dict(zip(calls, run_python(code, lines=len(calls)), strict=True))


def run_python(code, *, devices=8, x64=False, timeout=280, lines=0):
    """The last line that the code prints, in a process with so many CPU devices; or the last ``lines`` in a list."""
    environment = os.environ | {
        "XLA_FLAGS": device_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": str(int(x64)),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(REPO),
    }
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()[-max(lines, 1) :]]
    return found if lines else found[0]


def compare_layouts(network, overrides, layouts, timeout=280):
    code = f"from tests import test_devices as t; t.print_layouts({network!r}, {overrides!r}, {layouts!r})"
    for layout, found in zip(layouts, run_python(code, x64=True, timeout=timeout), strict=True):
        assert {"loss", "grads", "stats", "score", "grad_norm"} <= found.keys()
        for name, difference in found.items():
            assert difference < 1e-9, (layout, name, difference)


# -- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_omnianet_on_a_mesh_and_under_pmap_computes_what_one_device_does():
    """Batch norm; the samples, which differ greatly, lie on different devices: statistics are of the whole batch.

    A device has two rows at the coarsest level of the mesh.
    """
    compare_layouts("omnianet", ["data.batch=4", "data.patch=(128,32)"], [(2, 2, "jit"), (4, 1, "pmap")])


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_dxnet_on_a_mesh_computes_what_one_device_does():
    compare_layouts("dxnet", ["data.batch=4", "model.deep_supervision=True"], [(2, 2, "jit")], timeout=650)


def print_depthwise(data, space, depth, side):
    """Differences of a depthwise convolution and of its gradients on a mesh from those on one device."""
    devices = mesh.make_devices(data, space, batch=4)
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 4, depth, side, side, 48)).astype(np.float32)
    kernel = rng.normal(size=(5, 5, 5, 1, 48)).astype(np.float32)

    def both(kernel, batch, key):
        def conv(x, kernel):
            return ops.conv(x, kernel, strides=(1, 1, 1), padding=((2, 2),) * 3, groups=48)

        y, pull = jax.vjp(conv, batch["x"], kernel)
        dx, dkernel = pull(batch["g"])
        return kernel, {"y": y, "dx": dx, "dkernel": dkernel}

    placed, batch = devices.put_state(jnp.asarray(kernel)), devices.put_batch({"x": x, "g": g})
    found = jax.device_get(devices.lower(both, placed, batch, None).compile()(placed, batch, None)[1])
    with ops.use_implementation("reference"):
        expected = jax.device_get(jax.jit(both)(kernel, {"x": x, "g": g}, None)[1])
    print(json.dumps(differences(found, expected)))


DEPTHWISE = [(2, 2, 8, 1), (1, 2, 4, 1), (2, 4, 8, 2), (2, 2, 4, 1)]  # data, space, depth, side


@pytest.mark.parametrize("case", DEPTHWISE)
def test_a_depthwise_convolution_spread_over_both_axes_has_the_right_gradients(case, printed):
    found = printed[f"print_depthwise{case}"]
    assert set(found) == {"y", "dx", "dkernel"} and max(found.values()) < 1e-5, found


def print_dense(cast, taps, stride):
    """As `print_depthwise`, for a dense convolution in a loop, with a kernel that is cast to bfloat16 or not."""
    devices = mesh.make_devices(2, 2, batch=2)
    rng = np.random.default_rng(0)
    planes = 2 * stride
    x = rng.normal(size=(2, planes, 8, 8, 16)).astype(np.float32)
    kernel = rng.normal(size=(taps, taps, taps, 16, 8)).astype(np.float32) / taps**1.5

    def both(kernel, batch, key):
        def loss(x, kernel):
            kernel, x = (kernel.astype(jnp.bfloat16), x.astype(jnp.bfloat16)) if cast else (kernel, x)
            y = ops.conv(x, kernel, strides=(stride,) * 3, padding=((taps // 2,) * 2,) * 3)
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        def step(total, _):
            (_, y), pulled = jax.value_and_grad(loss, (0, 1), has_aux=True)(batch["x"], kernel)
            return jax.tree.map(jnp.add, total, (y.astype(jnp.float32), *pulled)), None

        (_, y), grads = jax.eval_shape(jax.value_and_grad(loss, (0, 1), has_aux=True), batch["x"], kernel)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (y, *grads))
        (y, dx, dkernel), _ = jax.lax.scan(step, zero, None, length=2)
        return kernel, {"y": y, "dx": dx, "dkernel": dkernel}

    placed, batch = devices.put_state(jnp.asarray(kernel)), devices.put_batch({"x": x})
    found = jax.device_get(devices.lower(both, placed, batch, None).compile()(placed, batch, None)[1])
    with ops.use_implementation("reference"):
        expected = jax.device_get(jax.jit(both)(kernel, {"x": x}, None)[1])
    print(json.dumps(differences(found, expected)))


DENSE = [(True, 3, 1), (False, 3, 1), (True, 3, 2), (True, 7, 2)]  # cast, taps, stride


@pytest.mark.parametrize("case", DENSE)
def test_a_dense_convolution_with_one_plane_on_a_device_is_that_of_one_device(case, printed):
    found = printed[f"print_dense{case}"]
    assert set(found) == {"y", "dx", "dkernel"} and max(found.values()) < (0.05 if case[0] else 1e-5), found


def print_norms():
    """Batch norm alone, jit and pmap on 4 devices, against numpy: result, mean and variance."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 8, 8, 3)) * np.array([1, 5, 0.1, 2]).reshape(4, 1, 1, 1) + 10.0).astype(np.float32)
    x += 4 * np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    flat = x.reshape(-1, 3).astype(np.float64)
    y = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    expected = {"y": y, "mean": 0.1 * flat.mean(0), "var": 0.9 + 0.1 * flat.var(0, ddof=1)}
    result = []
    for parallel in ("jit", "pmap"):
        devices = mesh.make_devices(4, 1, batch=4, parallel=parallel)
        norm = Norm(3, Style(2))
        norm.axis = devices.axis
        graphdef, params, stats = split_model(norm)

        def apply(state, batch, key, graphdef=graphdef):
            model = nnx.merge(graphdef, *state)
            y = model(batch["x"])
            if model.axis:
                y = jax.lax.all_gather(y, model.axis, tiled=True)
            return state, {"y": y, "mean": model.mean[...], "var": model.var[...]}

        arguments = devices.put_state((params, stats)), devices.put_batch({"x": x}), None
        _, found = jax.device_get(devices.lower(apply, *arguments).compile()(*arguments))
        result.append(differences(found, expected))
    print(json.dumps(result))


def test_batch_norm_takes_the_statistics_of_the_whole_batch_on_all_devices(printed):
    for found in printed["print_norms()"]:
        assert max(found.values()) < 1e-5, found


def print_memory(overrides, spaces):
    """Per number of devices along depth: bytes of temporary memory on each, and the shapes that are gathered."""
    config, dataset = configured("dxnet", "model.depth.strides=(2,2,2,2,2)", *overrides)
    one, state = make_step(config, dataset)
    result = []
    for space in spaces:
        devices = mesh.make_devices(1, space, batch=1)
        spread = NamedSharding(devices.mesh, PartitionSpec("data", "space"))
        whole = NamedSharding(devices.mesh, PartitionSpec())
        size = (1, *config.data.patch)
        shapes = {
            "image": jax.ShapeDtypeStruct((*size, 4), np.float32, sharding=spread),
            "label": jax.ShapeDtypeStruct(size, np.uint8, sharding=spread),
        }
        abstract = jax.tree.map(lambda a, s=whole: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state)
        key = jax.eval_shape(lambda: jax.random.key(0))
        with ops.use_implementation("sharded"):
            compiled = devices.lower(one, abstract, shapes, key).compile()
        lines = [line.partition(" all-gather")[0] for line in compiled.as_text().splitlines() if " all-gather" in line]
        gathered = [[int(n) for n in shape.split(",")] for line in lines for shape in re.findall(r"\[([\d,]+)\]", line)]
        result.append({"bytes": compiled.memory_analysis().temp_size_in_bytes, "gathered": gathered})
    print(json.dumps(result))


def check_nothing_large_is_gathered(programs, voxels):
    for found in programs:
        for shape in found["gathered"]:
            assert np.prod(shape) < voxels / 10, shape


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_brain_compiles_on_one_and_on_five_devices():
    """240 x 240 x 155 voxels, padded to what the network can halve; compiled, not run. Memory falls with devices."""
    code = (
        "from tests import test_devices as t\n"
        "t.print_memory(['data.patch=(160,256,256)', 'data.sampling=volumes'], (1, 5))"
    )
    one, five = run_python(code, devices=5, timeout=800)
    assert five["bytes"] < 0.4 * one["bytes"]
    check_nothing_large_is_gathered([one, five], 160 * 256 * 256)


# -- refusals -----------------------------------------------------------------------------------------------------


def print_refusals(calls):
    result = []
    for arguments in calls:
        try:
            devices = mesh.make_devices(*arguments[:2], batch=arguments[2], **(arguments[3] if arguments[3:] else {}))
            result.append([dict(devices.mesh.shape), devices.parallel])
        except UserError as error:
            result.append(str(error))
    print(json.dumps(result))


LAYOUTS = [
    (-1, 1, 6),
    (-1, 3, 8),
    (16, 1, 16),
    (0, 1, 8),
    (-1, 0, 8),
    (2, 1, 6, {"accumulate": 2}),
    (-1, 2, 8, {"parallel": "pmap"}),
    (-1, 1, 8, {"parallel": "xmap"}),
    (-1, 2, 8),
    (2, 2, 6),
    (4, 1, 8, {"accumulate": 2, "parallel": "pmap"}),
]


def test_layouts_that_do_not_fit_are_refused_with_the_numbers(printed):
    found = printed[f"print_refusals({LAYOUTS!r})"]
    words = [
        ("config.data.batch=6 ", "8 data-parallel", "--config.data.batch=8 or --config.mesh.data=6"),
        ("config.mesh.space=3 ", "8 devices"),
        ("16 x 1 devices", "there are 8"),
        ("0 x 1 devices", "there are 8"),
        ("config.mesh.space=0 ", "8 devices"),
        ("config.data.batch=6 ", "2 data-parallel", "2 parts", "config.train.accumulate", "--config.data.batch=4"),
        ("config.mesh.space=2", "pmap", "--config.mesh.parallel=jit"),
        ("config.mesh.parallel='xmap'", "jit, pmap"),
    ]
    for call, message, expected in zip(LAYOUTS, found, words, strict=False):
        assert all(word in message for word in expected), (call, message)
    assert found[len(words) :] == [
        [{"data": 4, "space": 2}, "jit"],
        [{"data": 2, "space": 2}, "jit"],
        [{"data": 4, "space": 1}, "pmap"],
    ]


def test_following_the_advice_helps():
    with pytest.raises(UserError, match=r"in 4 parts .*set --config.data.batch=4$"):
        mesh.make_devices(1, 1, batch=6, accumulate=4)
    mesh.make_devices(1, 1, batch=4, accumulate=4)


def test_a_depth_that_cannot_be_spread_at_every_level_is_refused():
    config, _ = configured("dxnet")
    networks.check_space(config.model, (16, 32, 32), 4)
    networks.check_space(config.model, (18, 32, 32), 1)
    with pytest.raises(UserError, match=r"mesh\.space=4 .* 6 planes .*data\.patch=\(24, 32, 32\).* 16 or 32"):
        networks.check_space(config.model, (24, 32, 32), 4)
    for side in (16, 32):
        networks.check_space(config.model, (side, 32, 32), 4)
    flat, _ = configured("omnianet")
    with pytest.raises(UserError, match="the 3 planes"):
        networks.check_space(flat.model, (96, 32), 2)
    networks.check_space(flat.model, (128, 32), 2)
    folded, _ = configured("dsnet")
    with pytest.raises(UserError, match=r"mesh.space=2.*DS-Net.*mesh.space=1"):
        networks.check_space(folded.model, (97, 32, 32), 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", 2, None), "--processes and --process need --coordinator"),
        (("", None, 0), "--processes and --process need --coordinator"),
        (("localhost:1234", None, None), "found None and None"),
        (("localhost:1234", 2, None), "found 2 and None"),
        (("localhost:1234", 2, 2), "found 2 and 2"),
        (("localhost:1234", 2, -1), "found 2 and -1"),
        (("localhost", 2, 0), "expected host:port"),
        (("localhost:port", 2, 0), "expected host:port"),
        (("auto", None, None), "could not be joined"),  # JAX has its devices by now
    ],
)
def test_processes_that_cannot_be_joined(arguments, words):
    jax.devices()
    with pytest.raises(UserError, match=words):
        mesh.join_processes(*arguments)
    mesh.join_processes("", None, None)


def test_a_batch_that_does_not_divide_is_refused_at_the_start_of_a_run(tmp_path):
    config, dataset = configured("omnianet", "data.batch=6", "train.accumulate=4")
    with pytest.raises(UserError, match=r"config.data.batch=6 .* 4 parts .*config.train.accumulate"):
        train_run(config, dataset, tmp_path / "run", StopRequest())
    assert not (tmp_path / "run").exists()


# -- restoring ----------------------------------------------------------------------------------------------------


def sample_state(value):
    params = optax.LookaheadParams.init_synced({"w": value * jnp.arange(6.0).reshape(2, 3), "b": value * jnp.ones(5)})
    stats = {"norm": {"mean": value * jnp.arange(3.0)}}
    tx = optax.lookahead(optax.adam(0.1), 6, 0.5)
    state = init_state(params, stats, tx, ema=True)
    return jax.tree.map(jnp.copy, state._replace(step=jnp.int32(7)))


def keep_state(workdir, data):
    """Saves or, where there is a state, restores one on so many devices."""
    devices = mesh.make_devices(data, 1, batch=data)
    checkpoints = checkpoint.open_checkpoints(Path(workdir))
    if not checkpoint.exists(Path(workdir)):
        checkpoint.save_latest(checkpoints, devices.put_state(sample_state(0.3)), {"score_steps": [3]})
        checkpoint.close(checkpoints)
        print(json.dumps("saved"))
        return
    like = devices.put_state(sample_state(0.0))
    state, progress = checkpoint.restore_latest(checkpoints, like, print)
    checkpoint.close(checkpoints)
    assert progress == {"score_steps": [3]}
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(sample_state(0.3)), strict=True):
        assert found.dtype == expected.dtype and len(found.sharding.device_set) == data
        np.testing.assert_array_equal(found, expected)
    print(json.dumps("restored"))


@pytest.mark.slow
def test_a_state_saved_on_four_devices_is_restored_on_one_and_on_two(tmp_path):
    code = f"from tests import test_devices as t; t.keep_state({str(tmp_path)!r}, %d)"
    assert run_python(code % 4, devices=4) == "saved"
    assert run_python(code % 1, devices=1) == "restored"
    assert run_python(code % 2, devices=2) == "restored"


# -- parts of a batch ---------------------------------------------------------------------------------------------


class Small(nnx.Module):
    """Convolution, norm, stochastic depth, convolution: what a network has, at a size that compiles in a second."""

    stages = ("middle",)

    def __init__(self, norm, drop_path=0.0):
        style, rngs = Style(2, norm), nnx.Rngs(0)
        self.first = Conv(2, 6, 3, style=style, rngs=rngs)
        self.norm = Norm(6, style, "silu")
        self.drop_path = DropPath(drop_path)
        self.last = Conv(6, 3, 3, style=style, bias=True, rngs=rngs)

    def __call__(self, image, rngs=None, levels=False):
        x = self.norm(self.first(image))
        logits = self.last(x + self.drop_path(jnp.square(x), rngs))
        return [logits] if levels else logits


def small_step(norm, *, tx=None, **options):
    config, dataset = configured("omnianet")
    graphdef, params, stats = split_model(Small(norm))
    output = Output("softmax", dataset.regions, ("background", "LV_endo", "LV_epi"))
    tx = tx or keep_gradients()
    made = make_train_step(graphdef, make_loss(config.loss, "softmax", 3), output, tx, **options)
    return made, init_state(params, stats, tx, ema=bool(options.get("ema")))


def small_batch(samples):
    rng = np.random.default_rng(3)
    image = rng.normal(size=(samples, 8, 8, 2)) * (1 + np.arange(samples)).reshape(-1, 1, 1, 1) + 2
    return {"image": image.astype(np.float32), "label": rng.integers(0, 3, (samples, 8, 8)).astype(np.uint8)}


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_what_the_whole_batch_gives(parts):
    whole, state = small_step("instance")
    split, _ = small_step("instance", accumulate=parts)
    batch, key = small_batch(8), jax.random.key(0)
    expected, found = (numbers(*jax.jit(s)(state, batch, key)) for s in (whole, split))
    assert {"loss", "dice_loss", "entropy_loss", "grad_norm", "score"} <= found.keys()
    for name, difference in differences(found, expected).items():
        assert difference < 1e-5, name


def test_batch_norm_of_a_batch_in_parts_sees_one_part_after_the_other():
    """Part i has the samples i, i + 2, ...; against PyTorch, gradients too."""
    split, state = small_step("batch", accumulate=2)
    batch = small_batch(6)
    new, metrics = jax.jit(split)(state, batch, jax.random.key(0))

    first = torch.nn.Conv2d(2, 6, 3, padding=1, bias=False)
    norm, last = torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 3, 3, padding=1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor(np.asarray(state.params["first"]["kernel"])).permute(3, 2, 0, 1))
        last.weight.copy_(torch.tensor(np.asarray(state.params["last"]["kernel"])).permute(3, 2, 0, 1))
        last.bias.zero_()
    losses = []
    for i in range(2):
        image = torch.tensor(batch["image"][i::2]).permute(0, 3, 1, 2)
        x = torch.nn.functional.silu(norm(first(image)))
        logits = last(x + x * x)
        label = torch.tensor(batch["label"][i::2].astype(np.int64))
        target = torch.nn.functional.one_hot(label, 3).permute(0, 3, 1, 2)
        probs = logits.softmax(1)
        dice = 2 * (probs * target).sum((2, 3)) / (probs.sum((2, 3)) + target.sum((2, 3)) + 1e-5)
        loss = 1 - dice.mean() + torch.nn.functional.cross_entropy(logits, label)
        (loss / 2).backward()
        losses.append(loss.item())
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    np.testing.assert_allclose(new.stats["norm"]["mean"], norm.running_mean, rtol=1e-5)
    np.testing.assert_allclose(new.stats["norm"]["var"], norm.running_var, rtol=1e-5)
    np.testing.assert_allclose(new.opt_state["norm"]["scale"], norm.weight.grad, rtol=1e-4, atol=1e-6)
    expected = first.weight.grad.permute(2, 3, 1, 0).numpy()
    np.testing.assert_allclose(new.opt_state["first"]["kernel"], expected, atol=1e-5 * np.abs(expected).max())


# -- moving average, buffers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_the_moving_average_by_hand(decay):
    """Its decay is (1 + t) / (10 + t) until that reaches the one that is asked for."""
    one, state = small_step("batch", tx=optax.sgd(0.5), ema=decay)
    one = jax.jit(one)
    average = jax.tree.map(np.asarray, {"params": state.params, "stats": state.stats})
    for t in range(4):
        state, _ = one(state, small_batch(4), jax.random.key(0))
        d = min(decay, (1 + t) / (10 + t))
        now = {"params": state.params, "stats": state.stats}
        average = jax.tree.map(lambda a, b, d=d: d * a + (1 - d) * np.asarray(b), average, now)
    assert max(differences({"ema": state.ema}, {"ema": average}).values()) < 1e-6
    assert differences({"ema": state.ema}, {"ema": now})["ema"] > 1e-3
    params, stats = evaluation_weights(state)
    assert params is state.ema["params"] and stats is state.ema["stats"]


def test_the_memory_of_the_state_is_used_again():
    one, state = small_step("batch", tx=optax.adam(0.1), ema=0.9)
    devices = mesh.make_devices(1, 1, batch=4)
    placed = devices.put_state(jax.tree.map(jnp.copy, state))
    batch, key = devices.put_batch(small_batch(4)), devices.put_state(jax.random.key(0))
    compiled = devices.lower(one, placed, batch, key).compile()
    new, _ = compiled(placed, batch, key)
    assert all(a.is_deleted() for a in jax.tree.leaves(placed))
    assert not any(a.is_deleted() for a in (*jax.tree.leaves(new), *batch.values(), key))
    compiled(new, batch, key)


# -- precision ----------------------------------------------------------------------------------------------------


PLAIN = ["data.patch=(32,32)", "model.encoder.drop_path=0.6", "model.deep_supervision=True"]


@pytest.fixture(scope="module")
def plain():
    """Config, batch, state and results of an ordinary step of Omnia-Net with stochastic depth and deep supervision."""
    config, dataset = configured("omnianet", *PLAIN)
    made, state = make_step(config, dataset)
    batch = make_batch(config, 2)
    results = numbers(*jax.jit(made)(state, batch, jax.random.key(0)))
    return config, dataset, batch, state, results


def is_float32(tree):
    return all(a.dtype == jnp.float32 and bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(tree))


def products(lowered, dtype):
    """The types of all convolutions and matrix products whose first operand has this dtype."""
    found = re.findall(r"stablehlo\.(?:convolution|dot_general)[^\n]*: (\(tensor<[^\n]*)", lowered.as_text())
    return sorted(types for types in found if re.match(rf"\(tensor<[\dx]*{dtype}>", types))


@pytest.mark.slow
@pytest.mark.xdist_group("plain")
def test_bfloat16_is_for_activations_alone(plain):
    config, dataset, batch, _, expected = plain
    config = config.copy_and_resolve_references()
    config.train.precision = "bfloat16"
    made, params, stats = program.make_program(config, dataset, per_epoch=1)
    before = made.init(params, stats)
    lowered = jax.jit(made.step).lower(before, batch, jax.random.key(0))
    more = jax.jit(made.step).lower(before, make_batch(config, 4), jax.random.key(0))
    assert len(products(lowered, "bf16")) > 50
    # in float32: kernels that are put together. What has samples in it would grow with them
    assert products(lowered, "f32") == products(more, "f32") and products(lowered, "bf16") != products(more, "bf16")
    new, metrics = lowered.compile()(before, batch, jax.random.key(0))
    floats = [a for a in jax.tree.leaves((new.opt_state, metrics)) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert is_float32((new.params, new.stats, floats)) and len(floats) > 100
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=0.05)
    assert float(metrics["loss"]) != float(expected["loss"])


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("form", ["fast", "reference"])
def test_norms_compute_in_float32_whatever_the_input(rng, kind, form):
    """A mean of 100 with a deviation of 1 has two digits in bfloat16; sums of it would have none."""
    x = jnp.asarray(rng.normal(100, 1, (2, 32, 32, 4)), jnp.bfloat16)
    graphdef, params, stats = split_model(Norm(4, Style(2, kind), "silu"))

    def apply(x):
        model = nnx.merge(graphdef, params, stats)
        y = model(x)
        return y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    exact = x.astype(jnp.float32)
    with ops.use_implementation(form):
        y, pull, found = jax.vjp(apply, x, has_aux=True)
        (dx,) = pull(y)
        y32, pull32, _ = jax.vjp(apply, exact, has_aux=True)
        (dx32,) = pull32(y.astype(jnp.float32))
    assert y.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, y32.astype(jnp.bfloat16))
    np.testing.assert_allclose(dx.astype(np.float32), dx32, rtol=2**-8, atol=2**-6 * float(jnp.abs(dx32).max()))
    if kind == "batch":
        flat = np.asarray(exact, np.float64).reshape(-1, 4)
        assert found["mean"].dtype == found["var"].dtype == jnp.float32
        np.testing.assert_allclose(found["mean"], 0.1 * flat.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)


# -- rematerialisation --------------------------------------------------------------------------------------------


def convolutions(lowered):
    return len(re.findall(r"stablehlo\.convolution", lowered.as_text()))


def check_remat(network, overrides, names, expected=None):
    """Same loss, gradients and statistics to rounding, with stochastic depth; more convolutions."""
    samples, results = 2, []
    for remat in ("", names):
        config, dataset = configured(network, *overrides, f"train.remat={remat}")
        made, state = make_step(config, dataset)
        lowered = jax.jit(made).lower(state, make_batch(config, samples), jax.random.key(0))
        if remat == "" and expected is not None:
            results.append((convolutions(lowered), expected))
            continue
        compiled = lowered.compile()
        new = compiled(state, make_batch(config, samples), jax.random.key(0))
        results.append((convolutions(lowered), numbers(*new)))
    (few, plainly), (many, again) = results
    assert many > few
    for name, difference in differences(again, plainly).items():
        # gradients in float32: a batch norm over as few values as there are samples multiplies rounding
        assert difference < (1e-4 if name in ("grads", "grad_norm") else 1e-5), (name, difference)


@pytest.mark.slow
@pytest.mark.xdist_group("plain")
def test_recomputing_all_of_omnianet_changes_no_number(plain):
    """The recomputation draws the same stochastic depth, which here decides much of the result."""
    check_remat("omnianet", PLAIN, "*", plain[-1])


@pytest.mark.slow
def test_recomputing_all_of_dsnet_changes_no_number():
    """Its stages are nested: those of the inner network are inside one of them. DX-Net has the code of Omnia-Net."""
    check_remat("dsnet", ["model.inner.encoder.drop_path=0.6"], "*")


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_every_stage_that_a_network_names_is_one(network):
    """Recomputing it adds a `remat` to the program; none is there without."""
    config, _ = configured(network)
    stages = networks.build_abstract(config.model).stages
    assert len(stages) == {"omnianet": 6, "dxnet": 6, "dsnet": 15}[network]

    def count(names):
        model = networks.build_abstract(config.model)
        networks.set_remat(model, names)
        graphdef, params, stats = split_model(model)

        def forward(params, stats, image):
            return nnx.merge(graphdef, params, stats)(image, rngs=nnx.Rngs(dropout=jax.random.key(0)))

        image = jax.ShapeDtypeStruct((1, *config.data.patch, config.model.in_channels), np.float32)
        return len(re.findall(r"\b(?:checkpoint|remat2?)\[", str(jax.make_jaxpr(forward)(params, stats, image))))

    assert count("") == 0
    for stage in ("enc4", "dec2", "inner", "inner.decoder5") if network == "dsnet" else stages[:2]:
        assert count(stage) == 1, stage
    assert count("*") == len(stages)


def test_a_stage_that_is_not_there_is_an_error_with_those_that_are():
    with pytest.raises(UserError) as caught:
        configured("omnianet", "train.remat=decoder5, bottleneck,enc?")
    given, wrong, *_, known = str(caught.value).split(": ")
    assert given == "config.train.remat=decoder5, bottleneck,enc?" and wrong.startswith("bottleneck, enc? ")
    assert known == "encoder, decoder1, decoder2, decoder3, decoder4, decoder5"
    config, _ = configured("omnianet")
    model = networks.build_abstract(config.model)
    networks.set_remat(model, " decoder5 , encoder,")
    assert model.remat == ("encoder", "decoder5")


def test_a_pattern_that_fits_stages_of_the_inner_network_reaches_them():
    config, _ = configured("dsnet")
    model = networks.build_abstract(config.model)
    networks.set_remat(model, "*decoder5")
    assert model.inner.remat == ("decoder5",)


# -- processes ----------------------------------------------------------------------------------------------------


def start_processes(root, workdir, code):
    """Two processes of one training run of 24 steps, each with one CPU device; ``code`` runs the command."""
    environment = os.environ | one_device_environment(root)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    options = [*OPTIONS, "--config.train.checkpoint_steps=0", "--config.model.encoder.drop_path=0.0"]
    run = ["--config=configs/camus_omnianet.py:phantom", f"--workdir={workdir}", f"--config.data.root={root}", *options]
    run += [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    processes = []
    for index in range(2):
        with open(f"{workdir}.{index}.txt", "a") as out:
            command = [sys.executable, "-c", code, *run, f"--process={index}"]
            processes.append(subprocess.Popen(command, cwd=REPO, env=environment, stdout=out, stderr=out))
    return processes


def end(processes, workdir, statuses, timeout=200):
    """Waits; processes that hang are killed."""
    deadline = time.monotonic() + timeout
    try:
        found = [p.wait(max(deadline - time.monotonic(), 1)) for p in processes]
    except subprocess.TimeoutExpired:
        found = [p.poll() for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [Path(f"{workdir}.{i}.txt").read_text()[-3000:] for i in range(len(processes))]
    assert found == statuses, "\n-----\n".join([str(found), *texts])


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["validation.postprocess", "loop.RunController._end_epoch"])
def test_a_signal_to_one_process_is_agreed_upon_in_a_validation_and_at_an_epochs_end(camus10, tmp_path, moment):
    """Process 1 sends itself the signal; all must leave together, none may wait for the other for ever."""
    place, _, name = moment.rpartition(".")
    code = f"""
import os, signal, sys
from tests.packed_runs import small_network
from xdim_jax import train
from xdim_jax.base.command import run
from xdim_jax.training import loop, validation
original = {moment}
def signalled(*arguments, **options):
    if "--process=1" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments, **options)
{place}.{name} = signalled
sys.argv[0] = "train"
with small_network():
    run(train.main)
"""
    workdir = tmp_path / "run"
    processes = start_processes(camus10, workdir, code)
    end(processes, workdir, [75, 75])
    assert saved_steps(workdir)[-1] == read_records(workdir, STEPS_FILE)[-1]["step"] < 24
