"""A lower bound of the time of a program, from its convolutions and matrix products (roofline, Williams et al. 2009).

A product must compute its operations, and must read its operands and write its result once. Elementwise operations
(norms, activations, sums) are assumed to be fused into the products, and to cost nothing. The products of the reference
implementation are counted. The faster implementations use Winograd's transform, and merge an upsampling with the
convolution that follows. They need fewer operations, and can be faster than this bound.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from xdim_jax import ops

_PRODUCTS = ("conv_general_dilated", "dot_general")


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or a matrix product.

    Attributes:
        part: Part of the network that has the product, such as ``decoder5`` or ``inner.encoder``; empty if none has it.
        backward: True if it computes a gradient.
        flops: Floating-point operations, including those on padding; a multiply-add counts as two.
        bytes: Size of operands and result in bytes.
    """

    part: str
    backward: bool
    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return the least time in seconds on a device with ``flops`` operations and ``bandwidth`` bytes per second."""
        return max(self.flops / flops, self.bytes / bandwidth)


def find_products(function: Callable[..., Any], *arguments: Any, parts: Sequence[str]) -> list[Product]:
    """Return the products of a function.

    Args:
        function: The function.
        arguments: Its arguments; they may be shapes.
        parts: Names of the parts of the network.
    """
    with ops.use_implementation("reference"):
        # a new function each time, because JAX caches traces by function
        jaxpr = jax.make_jaxpr(lambda *a: function(*a))(*arguments)
    return [
        Product(
            part_of(name, parts),
            is_backward(name),
            _flops(eqn) * times,
            sum(map(_bytes, (*eqn.invars, eqn.outvars[0]))) * times,
        )
        for name, eqn, times in _equations(jaxpr.jaxpr, "", 1)
        if eqn.primitive.name in _PRODUCTS
    ]


def part_of(name: str, parts: Iterable[str]) -> str:
    """Return the part of the network that an operation belongs to.

    Args:
        name: Name of the operation, such as ``jit(step)/transpose(jvp(inner))/decoder5/add``.
        parts: Names of the parts, such as ``inner.decoder5``.
    """
    known = {word for part in parts for word in part.split(".")}
    return ".".join(dict.fromkeys(word for word in re.findall(r"\w+", name) if word in known))


def is_backward(name: str) -> bool:
    """Return whether an operation, given by its name, computes a gradient or recomputes an activation for one."""
    return "transpose(" in name or "rematted_computation" in name


def _equations(jaxpr: Any, outer: str, times: int) -> Iterator[tuple[str, Any, int]]:
    """Yield all equations, also nested ones: name, equation, and how often it runs."""
    for eqn in jaxpr.eqns:
        name = f"{outer}/{eqn.source_info.name_stack}"
        yield name, eqn, times
        for inner in _nested_jaxprs(eqn.params.values()):
            yield from _equations(inner, name, times * eqn.params.get("length", 1))


def _nested_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, jex.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jex.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _nested_jaxprs(value)


def _flops(eqn: Any) -> float:
    """Return the floating-point operations of a product."""
    out, operand = eqn.outvars[0].aval, eqn.invars[1].aval
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[a] for a in contracted)
    _, features, *window = (operand.shape[a] for a in eqn.params["dimension_numbers"].rhs_spec)
    # products with the zeros that dilate the input are not counted
    return 2.0 * math.prod(out.shape) * features * math.prod(window) / math.prod(eqn.params["lhs_dilation"])


def _bytes(variable: Any) -> int:
    """Return the size of an operand or result in bytes."""
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
