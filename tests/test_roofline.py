"""What the products of a program do, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from xdim_jax import ops
from xdim_jax.base.config import load_config
from xdim_jax.training import check, needs
from xdim_jax.training.roofline import Product, find_products, is_backward, part_of


def shape(*size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


def test_a_strided_convolution_and_its_gradients():
    """16 output voxels of 2 x 4 x 4 taps, 3 channels in, 5 out; both gradients do the same products."""
    x, w = shape(1, 4, 8, 8, 3), shape(2, 4, 4, 3, 5)

    def loss(x, w):
        with jax.named_scope("stem"):
            y = ops.conv(x, w, strides=(2, 4, 4), padding=((0, 0),) * 3)
        return y.sum()

    forward, *gradients = find_products(jax.value_and_grad(loss, (0, 1)), x, w, parts=("stem",))
    voxels, taps = 2 * 2 * 2, 2 * 4 * 4
    sizes = 4 * np.array([4 * 8 * 8 * 3, taps * 3 * 5, voxels * 5])
    assert forward == Product("stem", False, 2 * voxels * 5 * taps * 3, sizes.sum())
    assert len(gradients) == 2 and all(p.part == "stem" and p.backward for p in gradients)
    assert [p.bytes for p in gradients] == [sizes.sum()] * 2
    # windows do not overlap, so both gradients multiply as often; the zeros of the dilated input do not count
    assert [p.flops for p in gradients] == [forward.flops] * 2


def test_depthwise_products_and_matrices():
    x, w = shape(2, 6, 6, 8, dtype=jnp.bfloat16), shape(3, 3, 1, 8, dtype=jnp.bfloat16)
    (found,) = find_products(
        lambda x, w: ops.conv(x, w, strides=(1, 1), padding=((1, 1),) * 2, groups=8), x, w, parts=()
    )
    assert found == Product("", False, 2 * 2 * 6 * 6 * 8 * 9, 2 * (2 * 2 * 6 * 6 * 8 + 9 * 8))
    (found,) = find_products(jnp.matmul, shape(4, 5, 6), shape(4, 6, 7), parts=())
    assert found == Product("", False, 2 * 4 * 5 * 6 * 7, 4 * 4 * (30 + 42 + 35))
    (found,) = find_products(lambda x: jax.lax.map(lambda a: a @ a, x), shape(10, 3, 3), parts=())
    assert found.flops == 10 * 2 * 27, "a loop's body counts as often as it runs"


def test_the_least_time_is_of_operations_or_of_bytes():
    assert Product("", False, 100.0, 10).seconds(flops=10.0, bandwidth=10.0) == 10.0
    assert Product("", False, 100.0, 10).seconds(flops=1e9, bandwidth=10.0) == 1.0


@pytest.mark.parametrize(
    ("name", "part", "backward"),
    [
        ("jit(step)/jvp(decoder5)/conv_general_dilated", "decoder5", False),
        ("jit(step)/transpose(jvp(inner))/decoder5/dot_general", "inner.decoder5", True),
        ("jit(step)/jvp(inner)/inner/encoder/add", "inner.encoder", False),
        ("jit(step)/rematted_computation/encoder/mul", "encoder", True),
        ("jit(step)/add", "", False),
    ],
)
def test_parts_in_names(name, part, backward):
    assert part_of(name, ("encoder", "decoder5", "inner.encoder", "inner.decoder5")) == part
    assert is_backward(name) == backward


@pytest.mark.parametrize("remat", ["", "decoder*"])
@pytest.mark.parametrize("name", ["brats_dxnet", pytest.param("brats_dsnet", marks=pytest.mark.slow)])
def test_every_product_of_a_step_is_in_a_part(name, remat):
    """Forward as in docs/networks.md, section Sizes: 124 and 377 G multiply-adds at 128^3. Backward twice that,
    but for the image's gradient; computing a part again adds its forward products."""
    config = load_config(f"configs/{name}.py:scratch", [])
    remat = remat.replace("decoder", "dec") if name == "brats_dsnet" else remat
    choice = needs.StepSettings((128, 128, 128), 1, "float32", remat)
    products, parts = needs.step_products(*check.resolve_config(config, needs_data=False), choice)
    forward = sum(p.flops for p in products if not p.backward)
    backward = sum(p.flops for p in products if p.backward)
    assert forward == pytest.approx(2 * (124e9 if name == "brats_dxnet" else 377e9), rel=0.01)
    again = sum(p.flops for p in products if not p.backward and p.part.startswith("dec")) if remat else 0
    assert backward == pytest.approx(2 * forward + again, rel=0.04)
    assert {p.part for p in products} == set(parts) - {"inner.conv"} and len(products) > 250
    lines = needs.format_parts(products, parts)
    assert lines[-1].split()[0] == "all" and lines[-1].endswith("100.0 %") and len({len(line) for line in lines}) == 1


def test_least_times_of_parts():
    """By hand: 2 TFLOP at 1 TFLOP/s are 2 s, though 1 TB at 2 TB/s takes half of one; the other the reverse."""
    products = [Product("encoder", False, 2e12, 1e12), Product("last", True, 1e12, 8e12)]
    table = needs.format_parts(products, ("encoder", "last"), (1e12, 2e12))
    assert [line.split()[-1] for line in table] == ["ms", "2000.000", "4000.000", "6000.000"]


# a type of jaxlib's profile reader lacks __module__: newer Python warns, and as an error this would end the process
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_a_profile_tells_the_parts(tmp_path):
    """Operations of a profile are found again in the program, under the name of their part."""

    def f(x):
        with jax.named_scope("decoder5"):
            return jnp.tanh(x @ x)

    x = jnp.ones((300, 300))
    program = jax.jit(f).lower(x).compile()
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(program(x))
    times = gpu.operation_times(next(tmp_path.rglob("*.xplane.pb")))
    names = gpu.operation_names(program.as_text())
    found = {name: times[name] for name in names if name in times and part_of(names[name], ("decoder5",)) == "decoder5"}
    assert found and all(0 < seconds < 10 for seconds in found.values())
