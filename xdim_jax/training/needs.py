"""What a recipe needs: memory and floating-point operations of its step and of prediction, before anything runs.

Every combination of the choices given is compiled for the devices that are here, with shapes in place of arrays, so
neither data nor room for the arrays is needed. Memory is what the compiler reserves, per device: state, batch and
temporaries. Operations are those of the mathematics, for all devices together; a multiply-add counts two.

With --parts, a table follows for each choice of what the parts of the network do in a step: operations, and the bytes
that its convolutions and matrix products bring in and out at the least (see `xdim_jax.training.roofline`). With
--ceilings as well, the least time that these take on a device of so many operations and bytes a second.

With --budget, each line says whether it fits; with --largest=patch or --largest=batch as well, the choices are not
listed but searched for the largest that fits.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xdim_jax import ops
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.data.case import Dataset
from xdim_jax.nets import networks
from xdim_jax.ops.compilation import needed_bytes
from xdim_jax.runs.state import slow
from xdim_jax.training.mesh import make_devices
from xdim_jax.training.program import make_program, step_arguments
from xdim_jax.training.roofline import Product, find_products

_UNITS = {"": 1, "B": 1, **{f"{k}B": 10 ** (3 * i) for i, k in enumerate("kMGT", 1)}}
_UNITS |= {f"{k}iB": 2 ** (10 * i) for i, k in enumerate("KMGT", 1)}
_STEP = 32  # sides that are tried are multiples of it
_MOST = 1024  # largest side, and largest batch, that is tried


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a plan varies."""

    patch: tuple[int, ...]
    batch: int
    precision: str
    remat: str

    @property
    def voxels(self) -> int:
        """In a batch."""
        return math.prod(self.patch) * self.batch


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes per device, and operations of all devices."""

    step_bytes: int
    step_flops: float
    predict_bytes: int
    predict_flops: float


def measure(config: Config, dataset: Dataset, choice: Choice) -> Need:
    """Compiles step and prediction of a config with a choice, on the devices that the config asks for.

    Raises:
        UserError: the choice does not fit the network, or the devices.
    """
    config = _chosen(config, choice)
    try:
        networks.check_patch(config.model, choice.patch)
    except ValueError as error:
        raise UserError(str(error)) from error
    mesh = config.mesh
    devices = make_devices(
        mesh.data, mesh.space, batch=choice.batch, parallel=mesh.parallel, accumulate=config.train.accumulate
    )
    networks.check_space(config.model, choice.patch, devices.mesh.shape["space"])
    program, params, stats = make_program(config, dataset, per_epoch=1, axis=devices.axis, abstract=True)
    state, shapes, key = step_arguments(program, dataset, params, stats)
    step = ops.compile_program(devices.lower(program.step, state, devices.abstract_batch(shapes), key))

    weights = (slow(state.params), state.stats)
    image = jax.ShapeDtypeStruct((1, *choice.patch, config.model.in_channels), jnp.float32)

    def predict(weights: Any, image: jax.Array) -> jax.Array:
        return program.output.probabilities(program.forward(weights, image))

    one = make_program(config, dataset, per_epoch=1, abstract=True)[0]  # without the names of a pmap
    return Need(
        needed_bytes(step),
        _flops(one.step, state, shapes, key),
        needed_bytes(ops.compile_program(jax.jit(predict).lower(weights, image))),
        _flops(predict, weights, image),
    )


def step_products(config: Config, dataset: Dataset, choice: Choice) -> tuple[list[Product], tuple[str, ...]]:
    """The convolutions and matrix products of a step on one device, and the parts of the network in order."""
    config = _chosen(config, choice)
    program, params, stats = make_program(config, dataset, per_epoch=1, abstract=True)
    parts = networks.parts_of(config.model)
    return find_products(program.step, *step_arguments(program, dataset, params, stats), parts=parts), parts


def format_parts(
    products: Sequence[Product], parts: Sequence[str], ceilings: tuple[float, float] | None = None
) -> list[str]:
    """A table as aligned lines: of each part, forward and backward, what is done and moved; with ``ceilings``,
    operations and bytes a second, the least time that it takes."""
    head = ("part", "forward GFLOP", "GB", "backward GFLOP", "GB", "share of GFLOP")
    rows: list[tuple[str, ...]] = [(*head, *(["at least, ms"] if ceilings else []))]
    total = sum(p.flops for p in products)
    for part in (*parts, "", None):
        found = [p for p in products if part is None or p.part == part]
        if not found:
            continue
        cells = [{"": "others", None: "all"}.get(part, str(part))]
        for backward in (False, True):
            half = [p for p in found if p.backward == backward]
            cells += [f"{sum(p.flops for p in half) / 1e9:.1f}", f"{sum(p.bytes for p in half) / 1e9:.2f}"]
        cells.append(f"{100 * sum(p.flops for p in found) / total:.1f} %")
        rows.append((*cells, *([f"{1e3 * sum(p.seconds(*ceilings) for p in found):.3f}"] if ceilings else [])))
    return _aligned(rows)


def _chosen(config: Config, choice: Choice) -> Config:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.patch = choice.patch
    config.data.batch, config.train.precision, config.train.remat = choice.batch, choice.precision, choice.remat
    return config


def _flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Of the plain form, which has no loops: a compiler's count takes the body of a loop once."""
    with ops.use_form("reference"):
        cost = jax.jit(lambda *a: function(*a)).lower(*arguments).cost_analysis()
    return float((cost or {}).get("flops", math.nan))


def parse_bytes(text: str) -> int:
    """``16GiB``, ``80 GB``, ``500000000``. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"--budget={text}: expected a number with one of {', '.join(filter(None, _UNITS))}, e.g. 16GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def largest(
    candidates: Sequence[Choice], fits: Callable[[Choice], bool], say: Callable[[str], None] = lambda line: None
) -> Choice | None:
    """The last candidate that fits, of candidates in rising order, by bisection; None if the first does not."""
    low, high = -1, len(candidates)
    at = 0  # upwards in doubling steps first: large programs take long to compile, and may not fit this machine
    while low + 1 < high:
        at = min(max(low + 1, at), high - 1)
        ok = fits(candidates[at])
        say(f"           {name_of(candidates[at])}: {'fits' if ok else 'does not fit'}")
        low, high = (at, high) if ok else (low, at)
        at = 2 * at + 1 if high == len(candidates) else (low + high) // 2
    return candidates[low] if low >= 0 else None


def growing(config: Config, start: Choice, what: str) -> list[Choice]:
    """Legal choices in rising order: patches with equal sides (of DS-Net, equal sides in plane), or batches.

    Raises:
        UserError: no patch is legal.
    """
    if what == "batch":
        rows = make_devices(config.mesh.data, config.mesh.space, batch=_MOST * jax.device_count()).mesh.shape["data"]
        unit = rows * config.train.accumulate
        return [dataclasses.replace(start, batch=unit * n) for n in range(1, _MOST // unit + 1)]
    fixed = start.patch[:1] if config.model.name == "dsnet" else ()
    choices = []
    for side in range(_STEP, _MOST + 1, _STEP):
        patch = (*fixed, *(side,) * (len(start.patch) - len(fixed)))
        try:
            networks.check_patch(config.model, patch)
            networks.check_space(config.model, patch, config.mesh.space)
        except ValueError:  # a UserError is one
            continue
        choices.append(dataclasses.replace(start, patch=patch))
    if not choices:
        raise UserError(f"no patch with equal sides up to {_MOST} fits {config.model.name}")
    return choices


def name_of(choice: Choice) -> str:
    """Patch, batch, precision and rematerialisation as one line of text."""
    patch = "x".join(map(str, choice.patch))
    return f"patch {patch}, batch {choice.batch}, {choice.precision}, remat {choice.remat or 'none'}"


def format_rows(rows: Sequence[tuple[Choice, Need]], budget: int | None) -> list[str]:
    """A table as aligned lines."""
    head = ("patch", "batch", "precision", "remat", "step memory", "step GFLOP", "predict memory", "predict GFLOP")
    table: list[tuple[str, ...]] = [(*head, *(["fits"] if budget else []))]
    for c, n in rows:
        cells = ("x".join(map(str, c.patch)), str(c.batch), c.precision, c.remat or "none", gib(n.step_bytes))
        rest = (f"{n.step_flops / 1e9:.1f}", gib(n.predict_bytes), f"{n.predict_flops / 1e9:.1f}")
        fits = [("yes" if n.step_bytes <= budget else "no")] if budget else []
        table.append((*cells, *rest, *fits))
    return _aligned(table)


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in table]
