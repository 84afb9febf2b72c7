"""The kernels of a compiled program, read from its text: number, bytes and estimated cycles for each part of a network.

The text is what ``compiled.as_text()`` of JAX returns, in the format HLO of XLA. Every instruction of the entry
computation, and of the bodies of its loops, is one kernel, except those that only name or regroup arrays.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from xdim_jax.training.roofline import part_of

# instructions that start no kernel
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|token|[sufbc]\w*\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|\w+_computations?)=\{?([^,}]+(?:, ?%[^,}]+)*)")
_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a compiled program.

    Attributes:
        kind: Name of the instruction, such as ``fusion``, or of the library function that it calls.
        part: Part of the network, see `xdim_jax.training.roofline.part_of`; empty if it belongs to none.
        times: How often it runs; loops with an unknown number of iterations count once.
        bytes: Size of its operands and results, without padding.
        cycles: Cycles by the compiler's estimate; 0 if it does not state them (only the TPU compiler does).
    """

    kind: str
    part: str
    times: int
    bytes: float
    cycles: int


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over kernels: ``kernels`` (how many run), ``bytes`` and ``cycles``."""

    kernels: int
    bytes: float
    cycles: int


def read_kernels(text: str, parts: Sequence[str] = ()) -> list[Kernel]:
    """Return the kernels of a compiled program.

    Args:
        text: Text of the program.
        parts: Names of the parts of the network.
    """
    computations = dict(_computations(text))
    entry = next((name for name, (is_entry, _) in computations.items() if is_entry), None)
    return list(_kernels(computations, entry, 1, parts)) if entry else []


def count_kinds(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Return how often each kind of kernel occurs in the program, the most frequent first."""
    return dict(Counter(kernel.kind for kernel in kernels).most_common())


def sum_by_part(kernels: Sequence[Kernel], parts: Sequence[str]) -> dict[str, Totals]:
    """Return the sums over the kernels of each part, in the order of ``parts``, then of those in no part (``""``)."""
    found = {}
    for part in (*parts, ""):
        own = [kernel for kernel in kernels if kernel.part == part]
        if own:
            found[part] = Totals(
                sum(k.times for k in own), sum(k.bytes * k.times for k in own), sum(k.cycles * k.times for k in own)
            )
    return found


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """Yield the name of every computation, whether it is the entry, and its lines."""
    name, is_entry, lines = "", False, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            is_entry, name, lines = bool(match[1]), match[2], []
        elif line.startswith("}") and name:
            yield name, (is_entry, lines)
            name = ""
        elif name:
            lines.append(line.strip())


def _kernels(
    computations: Mapping[str, tuple[bool, list[str]]], name: str, times: int, parts: Sequence[str]
) -> Iterator[Kernel]:
    """Yield the kernels of a computation and of the loops and branches in it."""
    sizes: dict[str, float] = {}
    for line in computations[name][1]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, shape, kind, rest = match.groups()
        sizes[result] = _size(shape)
        if kind in _FREE:
            continue
        if kind in ("while", "conditional", "call"):
            trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
            for called in _called(line):
                if called in computations:
                    yield from _kernels(computations, called, times * trips, parts)
            continue
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ", 1)[0])
        scope = found[1] if (found := _NAME.search(line)) else ""
        target = found[1] if (found := _TARGET.search(line)) else kind
        cycles = int(found[1]) if (found := _CYCLES.search(line)) else 0
        read = sum(sizes.get(operand, 0) for operand in operands)
        yield Kernel(target, part_of(scope, parts), times, sizes[result] + read, cycles)


def _called(line: str) -> list[str]:
    """Return the names of the computations that a loop, a branch or a call runs."""
    names = [name.strip().lstrip("%") for found in _CALLED.findall(line) for name in found.split(",")]
    return names + re.findall(r"to_apply=%?([\w.\-]+)", line)


def _size(shape: str) -> float:
    """Return the bytes of a shape such as ``f32[8,128]{1,0}`` or ``(f32[8], s32[])``, without padding."""
    total = 0.0
    for kind, sides in _SHAPE.findall(shape):
        bits = re.search(r"\d+", kind)
        each = _BYTES[kind] if kind in _BYTES else int(bits[0]) / 8 if bits else 0
        total += each * math.prod(int(side) for side in sides.split(",") if side)
    return total
