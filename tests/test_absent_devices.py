"""Compiling for devices that are not here: their description, messages, and every recipe for both platforms."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from xdim_jax import ops, plan
from xdim_jax.base.config import load_config, shipped_recipes
from xdim_jax.base.errors import UserError
from xdim_jax.data.labels import Labels
from xdim_jax.data.layouts.nnunet import Description, nnunet_from_description
from xdim_jax.data.regions import Regions
from xdim_jax.training import absent_devices as targets
from xdim_jax.training import kernels, needs
from xdim_jax.training.check import resolve_config
from xdim_jax.training.mesh import make_devices
from xdim_jax.training.program import make_program, step_arguments

HAS_TPU = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None


@pytest.mark.parametrize("kind", ["h100", "h200", "a100", "l4", "rtx4090"])
def test_a_gpu_is_described_as_the_compiler_expects(kind):
    """Memory and bandwidth of the data sheets: 80, 141, 80, 24, 24 GB; 3.35, 4.8, 2.04, 0.3, 1.01 TB/s."""
    gpu = targets._read_gpus()[kind]
    size = {"h100": 80, "h200": 141, "a100": 80, "l4": 24, "rtx4090": 24}[kind]
    speed = {"h100": 3.35, "h200": 4.8, "a100": 2.04, "l4": 0.3, "rtx4090": 1.01}[kind]
    assert size * 0.93 * 2**30 < gpu["memory"] <= size * 2**30 and gpu["bandwidth"] / 1e12 == pytest.approx(
        speed, rel=0.01
    )
    text = targets.gpu_description(gpu)
    assert f"core_count: {gpu['cores']}" in text and text.count("{") == text.count("}")
    assert gpu["shared_per_block"] + 1024 == gpu["shared_per_core"], "CUDA reserves 1 KiB of every block"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h1000", "known: h100"),
        ("v5e", "expected a topology, e.g. v5e:2x2"),
        ("v5p:2", "e.g. v5p:2x2x1"),
        ("h100:x", "number of GPUs"),
        ("h100:0", "number of GPUs"),
        pytest.param("h100", "xdim_jax[cuda12]", marks=pytest.mark.skipif(HAS_CUDA, reason="the compiler is here")),
        pytest.param("v5e:2x2", "xdim_jax[tpu]", marks=pytest.mark.skipif(HAS_TPU, reason="the compiler is here")),
    ],
)
def test_targets_that_cannot_be(text, words):
    with pytest.raises(UserError) as error:
        targets.open_target(text)
    assert words in str(error.value) and text in str(error.value)


def test_full_is_for_targets():
    with pytest.raises(UserError, match="--full needs --target"):
        plan.main(["--config=configs/camus_omnianet.py:scratch", "--full"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 17.38G of 15.75G hbm.", int(17.38 * 2**30)),
        ("RESOURCE_EXHAUSTED: Used 900.00M of 500.00M", 900 * 2**20),
        ("RESOURCE_EXHAUSTED: out of memory", 2**62),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.", 2**62),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2.00G of 1.00G hbm.", 2**31),
        ("INTERNAL: something else", None),
    ],
)
def test_the_memory_of_a_program_that_does_not_fit(text, found):
    assert targets.exhausted_bytes(RuntimeError(text)) == found


HLO = """
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %t = bf16[8,128]{1,0} tanh(%p)
}

%body (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %f = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%fused, METADATA_1
  ROOT %r = (s32[], bf16[8,128]{1,0}) tuple(%i, %f)
}

%condition (s: (s32[], bf16[8,128])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: f32[4,128], w: f32[128,128]) -> f32[4,128] {
  %x = f32[4,128]{1,0} parameter(0)
  %w = f32[128,128]{1,0} parameter(1)
  %conv = (f32[4,128]{1,0}, u8[0]{0}) custom-call(%x, %w), custom_call_target="__cudnn$convForward", METADATA_2
  %y = f32[4,128]{1,0} get-tuple-element(%conv), index=0
  %loop = (s32[], bf16[8,128]) while(%init), condition=%condition, body=%body, METADATA_3
  ROOT %z = f32[4,128]{1,0} add(%y, %x), metadata={op_name="jit(step)/add"}, backend_config={"estimated_cycles":"11"}
}
"""
HLO = HLO.replace(
    "METADATA_1", 'metadata={op_name="jit(step)/jvp(decoder1)/tanh"}, backend_config={"estimated_cycles":"100"}'
)
HLO = HLO.replace("METADATA_2", 'metadata={op_name="jit(step)/encoder/conv"}')
HLO = HLO.replace("METADATA_3", 'backend_config={"known_trip_count":{"n":"7"}}')


def test_kernels_are_read_from_the_text_of_a_program():
    """Bytes by hand: operands and results of the convolution, of the loop that runs seven times, and of the sum."""
    found = kernels.read_kernels(HLO, ("encoder", "decoder1"))
    assert kernels.count_kinds(found) == {"__cudnn$convForward": 1, "fusion": 1, "add": 1}
    sums = kernels.sum_by_part(found, ("encoder", "decoder1"))
    assert sums["encoder"] == kernels.Totals(1, 4 * (2 * 4 * 128 + 128 * 128), 0)
    assert sums["decoder1"] == kernels.Totals(7, 7 * 2 * 2 * 8 * 128, 700)
    assert sums[""] == kernels.Totals(1, 3 * 4 * 4 * 128, 11)
    table = needs.format_kernels(sums)
    assert [line.split()[0] for line in table] == ["part", "encoder", "decoder1", "others", "all"]
    assert targets.describe_kernels(kernels.count_kinds(found)).startswith("1 ")
    assert targets.describe_kernels({}) == "none" and kernels.read_kernels("", ()) == []


def test_kernels_of_a_compiled_program():
    """What XLA prints here: a matrix product of one part, and a loop of another part that runs five times."""

    def function(x, w):
        with jax.named_scope("encoder"):
            x = x @ w
        with jax.named_scope("decoder1"):
            x, _ = jax.lax.scan(lambda c, _: (jnp.sin(c) @ w, None), x, length=5)
        return x.sum()

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(function).lower(shape, shape).compile().as_text()
    found = kernels.sum_by_part(kernels.read_kernels(text, ("encoder", "decoder1")), ("encoder", "decoder1"))
    assert found["encoder"].bytes >= 3 * 4 * 64 * 64
    assert found["decoder1"].kernels % 5 == 0 and found["decoder1"].bytes >= 5 * 3 * 4 * 64 * 64


def test_optimisation_is_restored():
    before = jax.config.jax_optimization_level
    with targets.without_optimisation(active=True):
        assert jax.config.jax_optimization_level != before or before == "O0"
    assert jax.config.jax_optimization_level == before


def test_absent_devices_make_a_mesh():
    """The mesh has the given devices, and not those of JAX."""
    devices = jax.devices()
    found = make_devices(-1, 1, batch=2, absent=devices[:1])
    assert found.mesh.shape == {"data": 1, "space": 1}
    with pytest.raises(UserError, match="does not divide the 1 devices"):
        make_devices(-1, 2, batch=2, absent=devices[:1])


# the networks of the others, up to the encoder: one precision each
LIKE_OTHERS = {"camus_best": "bfloat16", "brats_best": "float32", "camus_sequence": "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "precision"),
    [(r, p) for r in shipped_recipes() for p in ("float32", "bfloat16") if LIKE_OTHERS.get(r, p) == p],
)
def test_every_recipe_is_lowered_for_gpu_and_tpu(recipe, precision):
    """Lowering needs no package: an operation without a rule for a platform would be an error here."""
    config = load_config(f"configs/{recipe}.py:scratch", [f"--config.train.precision={precision}"])
    if not config.model.in_channels:
        config.model.in_channels = config.model.out_channels = 2  # these recipes take them from the data
        config.augment.flip.axes = (1,)
        dataset = _own_dataset()
    else:
        config, dataset = resolve_config(config, needs_data=False)
    program, params, stats = make_program(config, dataset, per_epoch=10, abstract=True)
    state, shapes, key = step_arguments(program, dataset, params, stats)
    with ops.use_implementation("reference"):
        traced = jax.jit(lambda *a: program.step(*a)).trace(state, shapes, key)
        text = traced.lower(lowering_platforms=("cuda", "tpu")).as_text()
    assert "stablehlo.convolution" in text


def _own_dataset():
    labels = Labels("own", ("background", "organ"), (0, 1))
    return nnunet_from_description(Description(("A", "B"), labels, Regions({"organ": (1,), "background": (0,)})))


@pytest.mark.accelerator
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("h100", marks=pytest.mark.skipif(not HAS_CUDA, reason="needs the extra cuda12")),
        pytest.param("v5e:1x1", marks=pytest.mark.skipif(not HAS_TPU, reason="needs the extra tpu")),
    ],
)
@pytest.mark.parametrize("recipe", ["brats_dsnet", "brats_dxnet", "camus_omnianet", "chaos_omnianet"])
def test_every_recipe_of_the_paper_fits_a_device(recipe, name):
    config, dataset = resolve_config(load_config(f"configs/{recipe}.py:scratch", []), needs_data=False)
    (choice,) = needs.make_settings(config, precisions=("bfloat16",))
    target = targets.open_target(name)
    need = needs.measure(config, dataset, choice, target, optimise=target.platform != "tpu")
    assert 2**28 < need.step_bytes < target.memory and need.predict_bytes < need.step_bytes
    assert sum(need.kernels.values()) > 100


@pytest.mark.accelerator
@pytest.mark.skipif(not HAS_TPU, reason="needs the extra tpu")
def test_too_large_for_a_chip_is_told(capsys):
    status = plan.main(
        ["--config=configs/brats_dxnet.py:scratch", "--target=v5e:1x1", "--precision=bfloat16", "--batch=4"]
    )
    assert status == 2 and " no" in capsys.readouterr().out
