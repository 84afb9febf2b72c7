"""What a recipe needs, before it runs."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.small_runs import use_three_convolutions
from xdim_jax import plan
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.training import check, mesh, needs
from xdim_jax.training.absent_devices import Target
from xdim_jax.training.program import make_program

# multiply-adds of one image (docs/networks.md, section Sizes), counted on PyTorch's modules: convolutions alone
PUBLISHED = {
    "camus_omnianet": ((256, 256), 3.21e9),
    "chaos_omnianet": ((512, 512), 19.6e9),
    "brats_dxnet": ((128, 128, 128), 124e9),
    "brats_dsnet": ((128, 128, 128), 377e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_of_a_prediction_are_those_published(name):
    """XLA leaves out the products with padding, which PyTorch's count has; norms and activations come on top."""
    patch, multiply_adds = PUBLISHED[name]
    config = load_config(f"configs/{name}.py:scratch", [])
    config, dataset = check.resolve_config(config, needs_data=False)
    program, params, stats = make_program(config, dataset, per_epoch=1, abstract=True)
    image = jax.ShapeDtypeStruct((1, *patch, config.model.in_channels), jnp.float32)
    flops = needs.count_flops(program.forward, (params, stats), image)
    assert flops == pytest.approx(2 * multiply_adds, rel=0.04)


TOY = [
    "--config.model.encoder.name=efficientnet_toy",
    "--config.model.filters=(8,8,8,8,8)",
    "--config.model.encoder.drop_path=0.0",
]
RECIPE = "configs/camus_omnianet.py:scratch"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setenv("XDIM_JAX_CACHE", "off")


@pytest.fixture
def small(quick, monkeypatch):
    use_three_convolutions(monkeypatch.setattr)


def test_the_needs_of_a_step_grow_with_its_batch(small, tmp_path):
    """Twice the samples take twice the operations, and more memory."""
    arguments = [f"--config={RECIPE}", *TOY, "--patch=64,64", "--batch=2,4"]
    assert plan.main([*arguments, f"--json={tmp_path / 'plan.json'}"]) == 0
    small, large = json.loads((tmp_path / "plan.json").read_text())
    in_parts = [*arguments[:-1], "--batch=4", "--config.train.accumulate=2", f"--json={tmp_path / 'parts.json'}"]
    assert plan.main(in_parts) == 0
    (parts,) = json.loads((tmp_path / "parts.json").read_text())
    assert parts["step_flops"] == large["step_flops"] and parts["step_bytes"] < large["step_bytes"]
    assert (small["batch"], large["batch"]) == (2, 4) and small["patch"] == [64, 64]
    assert large["step_flops"] == pytest.approx(2 * small["step_flops"], rel=0.05)
    assert large["step_flops"] > 2.5 * large["predict_flops"] * 4, "three times the forward pass, but for the rest"
    assert large["predict_flops"] == small["predict_flops"] and large["predict_bytes"] == small["predict_bytes"]
    assert 1e6 < small["step_bytes"] < large["step_bytes"]


def test_operations_do_not_depend_on_the_implementation(small):
    choice = needs.StepSettings((64, 64), 2, "float32", "")
    found = []
    for implementation in ("auto", "fast"):
        config = load_config(RECIPE, [*TOY, f"--config.train.ops={implementation}"])
        config, dataset = check.resolve_config(config, needs_data=False)
        products, _ = needs.step_products(config, dataset, choice)
        config = needs._apply(config, choice)
        program, params, stats = make_program(config, dataset, per_epoch=1, abstract=True)
        step = needs.step_arguments(program, dataset, params, stats)
        image = jax.ShapeDtypeStruct((1, 64, 64, config.model.in_channels), jnp.float32)
        flops = needs._count_program(config, dataset, step, ((params, stats), image))
        found.append((flops, sum(product.flops for product in products)))
    assert found[0] == found[1] and min(found[0][0]) > 1e6


def test_the_table_says_what_fits():
    choices = [needs.StepSettings((64, 64), batch, "float32", "") for batch in (2, 4)]
    rows = list(zip(choices, (needs.Need(2**30, 3e9, 2**20, 1e9), needs.Need(2**31, 6e9, 2**20, 1e9)), strict=True))
    lines = needs.format_rows(rows, budget=2**30)
    assert lines[1].split() == ["64x64", "2", "float32", "none", "1.00", "GiB", "3.0", "0.00", "GiB", "1.0", "yes"]
    assert lines[2].endswith("no") and len({len(line) for line in lines}) == 1
    assert "fits" not in needs.format_rows(rows, budget=None)[0]


def fitting(limit, seen):
    def fits(choice):
        seen.append(choice)
        return choice <= limit

    return fits


@pytest.mark.quick
@pytest.mark.parametrize("limit", [-1, 0, 1, 2, 3, 7, 30, 31, 32, 99])
def test_the_largest_that_fits_is_found_in_few_steps(limit, monkeypatch):
    seen = []
    found = needs.bisect_largest(list(range(32)), fitting(limit, seen))
    assert found == (None if limit < 0 else min(limit, 31))
    assert len(seen) == len(set(seen)) <= 10, "nothing is compiled twice"
    assert max(seen) <= max(2 * limit + 2, 1), "nor anything far beyond what fits"


def test_candidates_are_legal_and_rise():
    config = load_config("configs/brats_dsnet.py:scratch", [])
    patches = [
        c.patch
        for c in needs.increasing_settings(config, needs.StepSettings((128, 128, 128), 1, "float32", ""), "patch")
    ]
    assert patches[:2] == [(128, 32, 32), (128, 64, 64)] and patches == sorted(patches)
    batches = needs.increasing_settings(config, needs.StepSettings((128, 64, 64), 1, "float32", ""), "batch")
    assert [c.batch for c in batches[:3]] == [1, 2, 3] and {c.patch for c in batches} == {(128, 64, 64)}


def test_batches_for_absent_devices_divide_over_them(monkeypatch):
    """Eight devices that this machine does not have; a mesh needs no more of a device than its identity."""
    target = Target("toy", "8 x toy chip", "cpu", tuple(jax.devices()[:1] * 8), 2**30)

    def make_mesh(grid, names, **options):
        return SimpleNamespace(shape=dict(zip(names, grid.shape, strict=True)))

    monkeypatch.setattr(mesh, "Mesh", make_mesh)
    config = load_config("configs/camus_omnianet.py:scratch", ["--config.train.accumulate=2"])
    choice = needs.StepSettings((64, 64), 1, "float32", "")
    assert [c.batch for c in needs.increasing_settings(config, choice, "batch", target)[:3]] == [16, 32, 48]
    config.mesh.space = 2
    assert [c.batch for c in needs.increasing_settings(config, choice, "batch", target)[:2]] == [8, 16]


@pytest.mark.parametrize(
    ("text", "count"), [("16GiB", 16 * 2**30), ("80 GB", 80 * 10**9), ("1.5MiB", 3 * 2**19), ("1000", 1000)]
)
def test_budgets(text, count):
    assert needs.parse_bytes(text) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget=16Gb"], ["--budget=16Gb: expected a number", "16GiB"]),
        (["--budget=0"], ["--budget=0"]),
        (["--largest=patch"], ["--largest=patch needs --budget"]),
        (["--patch=64"], ["data.patch=(64,) has 1 axes"]),
        (["--patch=64,x"], ["--patch=64,x: expected integers"]),
        (["--batch=0"], ["--batch=0: expected integers above 0"]),
        (["--patch=40,64"], ["axis H is 40"]),
        (["--precision=half"], ["config.train.precision='half' is unknown; known: float32, bfloat16"]),
        (["--ceilings=989,4.8"], ["--ceilings=989,4.8 needs --parts"]),
        (["--parts", "--ceilings=989"], ["--ceilings=989: expected TFLOP/s and TB/s"]),
        (["--parts", "--ceilings=0,4.8"], ["--ceilings=0,4.8: expected two numbers above 0"]),
        (["--remat=decoder9"], ["decoder9 matches no stage of this network; its stages are: encoder, decoder1"]),
    ],
)
def test_misuse_is_one_clear_message(arguments, words, quick):
    with pytest.raises(UserError) as error:
        plan.main([f"--config={RECIPE}", *TOY, "--config.data.patch=(32,32)", "--config.data.batch=2", *arguments])
    for word in words:
        assert word in str(error.value)
