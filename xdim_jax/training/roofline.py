"""The least time that a program can take: its convolutions and matrix products, by the part of the network they are in.

Each of them has to do its operations, and to bring its operands in and its result out once; what is element by element
(norms, activations, sums) is counted as if fused into these (Williams et al. 2009, the roofline model). Counted are the
products of the plain form; Winograd's way, and kernels composed with upsampling, need fewer.
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
        part: of the network, e.g. ``decoder5`` or ``inner.encoder``; empty outside of all parts.
        backward: whether it computes a gradient.
        flops: operations; a multiply-add counts two, those with padding included.
        bytes: of operands and result, each once.
    """

    part: str
    backward: bool
    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """The least time on a device of ``flops`` operations and ``bandwidth`` bytes a second."""
        return max(self.flops / flops, self.bytes / bandwidth)


def find_products(function: Callable[..., Any], *arguments: Any, parts: Sequence[str]) -> list[Product]:
    """The products of a function, in the plain form; arguments may be shapes. ``parts``: names of `part_of`."""
    with ops.use_form("reference"):  # a function of its own: JAX keeps what it traced of one, whatever the form
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
    """The part in the name of an operation, as in ``jit(step)/transpose(jvp(inner))/decoder5/add``."""
    known = {word for part in parts for word in part.split(".")}
    return ".".join(dict.fromkeys(word for word in re.findall(r"\w+", name) if word in known))


def is_backward(name: str) -> bool:
    """Whether the operation of a name computes a gradient, or an activation again for one."""
    return "transpose(" in name or "rematted_computation" in name


def _equations(jaxpr: Any, outer: str, times: int) -> Iterator[tuple[str, Any, int]]:
    """All equations with their names, and how often each runs."""
    for eqn in jaxpr.eqns:
        name = f"{outer}/{eqn.source_info.name_stack}"
        yield name, eqn, times
        for inner in _inside(eqn.params.values()):
            yield from _equations(inner, name, times * eqn.params.get("length", 1))


def _inside(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, jex.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jex.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inside(value)


def _flops(eqn: Any) -> float:
    out, operand = eqn.outvars[0].aval, eqn.invars[1].aval
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[a] for a in contracted)
    _, features, *window = (operand.shape[a] for a in eqn.params["dimension_numbers"].rhs_spec)
    # of the taps on a stretched input, most meet the zeros in between
    return 2.0 * math.prod(out.shape) * features * math.prod(window) / math.prod(eqn.params["lhs_dilation"])


def _bytes(variable: Any) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
