"""Estimate memory and floating-point operations of a training step and of prediction.

Programs are compiled for the devices of this machine, or for a target: devices that it does not have, see
`xdim_jax.training.absent_devices`. Compilation needs the shapes of the arrays only, so neither data nor device memory
is needed. The memory is the amount that the compiler reserves per device for state, batch and temporaries. XLA counts
the operations in the uncompiled program of the reference implementation, and they are summed over all devices. So they
do not depend on how the program is compiled. A multiply-add counts as two operations.
"""

import contextlib
import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from xdim_jax.training.absent_devices import Target, exhausted_bytes, without_optimisation
from xdim_jax.training.kernels import Totals, count_kinds, read_kernels, sum_by_part
from xdim_jax.training.mesh import Devices, make_devices
from xdim_jax.training.program import Program, make_program, step_arguments
from xdim_jax.training.roofline import Product, find_products

_UNITS = {"": 1, "B": 1, **{f"{k}B": 10 ** (3 * i) for i, k in enumerate("kMGT", 1)}}
_UNITS |= {f"{k}iB": 2 ** (10 * i) for i, k in enumerate("KMGT", 1)}
_SIDE_STEP = 32  # a search tries patches whose sides are multiples of this
_MAX_SIZE = 1024  # largest side, and largest batch, that a search tries


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """A choice of the settings of a training step that a plan varies.

    Attributes:
        patch: Size of a patch: (D, H, W), or (H, W).
        batch: Number of samples in a batch, over all devices.
        precision: ``float32`` or ``bfloat16``.
        remat: Stages whose activations are recomputed (``train.remat``); empty for none.
    """

    patch: tuple[int, ...]
    batch: int
    precision: str
    remat: str

    @property
    def voxels(self) -> int:
        """Number of voxels of a batch."""
        return math.prod(self.patch) * self.batch

    def __str__(self) -> str:
        """Return the settings as one line of text."""
        patch = "x".join(map(str, self.patch))
        return f"patch {patch}, batch {self.batch}, {self.precision}, remat {self.remat or 'none'}"


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory and floating-point operations that a choice of `StepSettings` needs.

    Attributes:
        step_bytes: Memory of a training step, in bytes per device.
        step_flops: Floating-point operations of a training step, on all devices.
        predict_bytes: Memory of the prediction of one patch, in bytes.
        predict_flops: Floating-point operations of the prediction of one patch.
        seconds: Time of compiling the training step.
        kernels: Kind of kernel -> how many kernels of this kind the training step has. Empty for the devices of this
            machine, and for a target on which the step does not fit.
        by_part: Part of the network -> sums over its kernels in the training step; empty if ``kernels`` is.
    """

    step_bytes: int
    step_flops: float
    predict_bytes: int
    predict_flops: float
    seconds: float = 0.0
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    by_part: Mapping[str, Totals] = dataclasses.field(default_factory=dict)


def make_settings(
    config: Config,
    patches: Sequence[tuple[int, ...]] = (),
    batches: Sequence[int] = (),
    precisions: Sequence[str] = (),
    remats: Sequence[str] = (),
) -> list[StepSettings]:
    """Return every combination of the given settings. If a list is empty, the setting of the config is used."""
    lists = (
        patches or [tuple(config.data.patch)],
        batches or [config.data.batch],
        precisions or [config.train.precision],
        remats or [config.train.remat],
    )
    return [StepSettings(*settings) for settings in itertools.product(*lists)]


def measure(
    config: Config, dataset: Dataset, choice: StepSettings, target: Target | None = None, *, optimise: bool = True
) -> Need:
    """Compile training step and prediction for the devices of the config, and return their memory and operations.

    Args:
        config: Config of a recipe.
        dataset: Data set of the config.
        choice: Settings that replace those of the config.
        target: Devices that this machine does not have; None for those of this machine.
        optimise: False to compile for the target without optimisation, which takes less time.

    Raises:
        UserError: The choice does not fit the network or the devices.
    """
    config = _apply(config, choice)
    try:
        networks.check_patch(config.model, choice.patch, choice.batch // config.train.accumulate)
    except ValueError as error:
        raise UserError(str(error)) from error
    mesh = config.mesh
    devices = make_devices(
        mesh.data,
        mesh.space,
        batch=choice.batch,
        parallel=mesh.parallel,
        accumulate=config.train.accumulate,
        absent=target.devices if target else None,
    )
    networks.check_space(config.model, choice.patch, devices.mesh.shape["space"])
    program, params, stats = make_program(config, dataset, per_epoch=1, axis=devices.axis, abstract=True)
    state, shapes, key = step_arguments(program, dataset, params, stats)
    weights = (slow(state.params), state.stats)
    image = jax.ShapeDtypeStruct((1, *choice.patch, config.model.in_channels), jnp.float32)
    flops = _count_program(config, dataset, (state, shapes, key), (weights, image))
    if target is not None:
        one = make_program(config, dataset, per_epoch=1, abstract=True)[0]  # without the axis name of pmap
        arguments = ((state, shapes, key), (weights, image))
        return _measure_target(config, devices, target, one, *arguments, flops, optimise=optimise)
    begin = time.monotonic()
    step = ops.compile_program(devices.lower(program.step, state, devices.abstract_batch(shapes), key))
    seconds = time.monotonic() - begin
    predict = ops.compile_program(jax.jit(_prediction(program)).lower(weights, image))
    return Need(needed_bytes(step), flops[0], needed_bytes(predict), flops[1], seconds)


def _prediction(program: Program) -> Callable[..., jax.Array]:
    """Return the function that predicts the probabilities of a batch of patches."""
    return lambda weights, image: program.output.probabilities(program.forward(weights, image))


def _measure_target(
    config: Config,
    devices: Devices,
    target: Target,
    program: Program,
    step_arguments: tuple[Any, Any, Any],
    predict_arguments: tuple[Any, Any],
    flops: tuple[float, float],
    *,
    optimise: bool,
) -> Need:
    """Compile training step and prediction for devices that this machine does not have."""
    state, shapes, key = step_arguments
    sharding = target.one_device()
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), predict_arguments)

    def step(*given: Any) -> Any:  # a new function, because JAX would reuse the trace for this machine
        return program.step(*given)

    parts = networks.part_names(config.model)
    # without a measurement, accelerators use `library`; if volumes are distributed, `devices.lower` selects `sharded`
    default = contextlib.nullcontext() if devices.mesh.shape["space"] > 1 else ops.use_implementation("library")
    with default, without_optimisation(active=not optimise):
        begin = time.monotonic()
        lowered = devices.lower(step, state, devices.abstract_batch(shapes), key)
        memory, text = _compile(lowered)
        seconds = time.monotonic() - begin
        with ops.use_implementation("library"):
            predicted, _ = _compile(jax.jit(_prediction(program)).lower(*placed))
    found = read_kernels(text, parts)
    return Need(
        memory,
        flops[0],
        predicted,
        flops[1],
        seconds,
        count_kinds(found),
        sum_by_part(found, parts),
    )


def _compile(lowered: Any) -> tuple[int, str]:
    """Compile a program; return its memory in bytes and its text. The text is empty if the program does not fit."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = exhausted_bytes(error)
        if memory is None:
            raise
        return memory, ""
    return needed_bytes(compiled), compiled.as_text()


def _count_program(
    config: Config, dataset: Dataset, step: Sequence[Any], predict: Sequence[Any]
) -> tuple[float, float]:
    """Return the floating-point operations of a training step and of a prediction, given their arguments.

    The step processes its batch in one part, without a loop, and ``train.ops`` of the config has no effect.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.accumulate = 1
        config.train.ops = "auto"
    program = make_program(config, dataset, per_epoch=1, abstract=True)[0]
    return count_flops(program.step, *step), count_flops(_prediction(program), *predict)


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the floating-point operations of a function; the arguments may be shapes. Nothing is compiled.

    The reference implementation is counted because it has no loops: XLA counts the body of a loop only once.
    """
    with ops.use_implementation("reference"):
        cost = jax.jit(lambda *a: function(*a)).lower(*arguments).cost_analysis()
    return float((cost or {}).get("flops", math.nan))


def step_products(config: Config, dataset: Dataset, choice: StepSettings) -> tuple[list[Product], tuple[str, ...]]:
    """Return the convolutions and matrix products of a step on one device, and the names of the network's parts."""
    config = _apply(config, choice)
    config.train.ops = "auto"  # any other value would replace the reference implementation
    program, params, stats = make_program(config, dataset, per_epoch=1, abstract=True)
    parts = networks.part_names(config.model)
    return find_products(program.step, *step_arguments(program, dataset, params, stats), parts=parts), parts


def _apply(config: Config, choice: StepSettings) -> Config:
    """Return a copy of the config with the settings of a choice."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.patch = choice.patch
    config.data.batch, config.train.precision, config.train.remat = choice.batch, choice.precision, choice.remat
    return config


# -- search -------------------------------------------------------------------------------------------------------


def search_largest(
    config: Config,
    choices: Iterable[StepSettings],
    setting: str,
    fits: Callable[[StepSettings], bool],
    say: Callable[[str], None] = lambda line: None,
    target: Target | None = None,
) -> list[StepSettings]:
    """Find the largest patch or batch that fits, for each combination of the other settings.

    Args:
        config: Config of a recipe.
        choices: One choice for each combination of the settings except ``setting``.
        setting: The setting to maximise: ``patch`` or ``batch``.
        fits: Function that returns True if a choice fits.
        say: Function that logs a line.
        target: Devices over which a batch is divided; None for those of this machine.
    """
    starts = (dataclasses.replace(choice, batch=1) if setting == "batch" else choice for choice in choices)
    found = []
    for start in dict.fromkeys(starts):
        best = bisect_largest(increasing_settings(config, start, setting, target), fits, say=say)
        if best is None:
            say(f"           nothing fits with {start.precision}, remat {start.remat or 'none'}")
        else:
            found.append(best)
    return found


def bisect_largest(
    candidates: Sequence[StepSettings],
    fits: Callable[[StepSettings], bool],
    say: Callable[[str], None] = lambda line: None,
) -> StepSettings | None:
    """Return the last candidate that fits, by bisection.

    Args:
        candidates: Choices in increasing order.
        fits: Function that returns True if a choice fits.
        say: Function that logs a line.

    Returns:
        The choice; None if the first candidate does not fit.
    """
    low, high = -1, len(candidates)
    # start with small programs and double the index, because large programs take long to compile
    at = 0
    while low + 1 < high:
        at = min(max(low + 1, at), high - 1)
        ok = fits(candidates[at])
        say(f"           {candidates[at]}: {'fits' if ok else 'does not fit'}")
        low, high = (at, high) if ok else (low, at)
        at = 2 * at + 1 if high == len(candidates) else (low + high) // 2
    return candidates[low] if low >= 0 else None


def increasing_settings(
    config: Config, start: StepSettings, setting: str, target: Target | None = None
) -> list[StepSettings]:
    """Return valid choices with increasing batches, or with increasing patches of equal sides.

    Args:
        config: Config of a recipe.
        start: Choice from which all settings except ``setting`` are taken. For DS-Net, D of the patch is also taken
            from it, so that only H and W increase.
        setting: ``patch`` or ``batch``.
        target: Devices over which a batch is divided; None for those of this machine.

    Raises:
        UserError: No patch is valid, or the mesh of the config does not fit the devices.
    """
    if setting == "batch":
        mesh, devices = config.mesh, target.devices if target else jax.devices()
        sizes = make_devices(mesh.data, mesh.space, batch=_MAX_SIZE * len(devices), absent=devices).mesh.shape
        unit = sizes["data"] * config.train.accumulate
        return [dataclasses.replace(start, batch=unit * n) for n in range(1, _MAX_SIZE // unit + 1)]
    fixed = start.patch[: networks.get_network(config.model).fixed_axes]
    choices = []
    for side in range(_SIDE_STEP, _MAX_SIZE + 1, _SIDE_STEP):
        patch = (*fixed, *(side,) * (len(start.patch) - len(fixed)))
        try:
            networks.check_patch(config.model, patch)
            networks.check_space(config.model, patch, config.mesh.space)
        except ValueError:  # UserError is a ValueError
            continue
        choices.append(dataclasses.replace(start, patch=patch))
    if not choices:
        raise UserError(f"no patch with equal sides up to {_MAX_SIZE} fits {config.model.name}")
    return choices


# -- text ---------------------------------------------------------------------------------------------------------


def parse_bytes(text: str, flag: str = "--budget") -> int:
    """Return the number of bytes that the value of a flag states, such as ``16GiB``, ``80 GB`` or ``500000000``.

    Raises:
        UserError: The text does not have this form.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(
            f"{flag}={text}: expected a number, alone or with {', '.join(filter(None, _UNITS))}, e.g. 16GiB"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def format_rows(rows: Sequence[tuple[StepSettings, Need]], budget: int | None) -> list[str]:
    """Return a table of choices with their memory and operations, as aligned lines of text.

    Args:
        rows: Choices and their needs.
        budget: Memory of a device in bytes, or None. If given, a column states whether a choice fits.
    """
    head = ("patch", "batch", "precision", "remat", "step memory", "step GFLOP", "predict memory", "predict GFLOP")
    table: list[tuple[str, ...]] = [(*head, *(["fits"] if budget else []))]
    for c, n in rows:
        cells = ("x".join(map(str, c.patch)), str(c.batch), c.precision, c.remat or "none", gib(n.step_bytes))
        rest = (f"{n.step_flops / 1e9:.1f}", gib(n.predict_bytes), f"{n.predict_flops / 1e9:.1f}")
        fits = [("yes" if n.step_bytes <= budget else "no")] if budget else []
        table.append((*cells, *rest, *fits))
    return _aligned(table)


def format_best(rows: Sequence[tuple[StepSettings, Need]], budget: int) -> str:
    """Return the choice with the most voxels per batch among those whose step fits the budget, as text."""
    fitting = [choice for choice, need in rows if need.step_bytes <= budget]
    best = max(fitting, key=lambda choice: choice.voxels, default=None)
    return str(best) if best else "none of them fits"


def format_parts(
    products: Sequence[Product], parts: Sequence[str], ceilings: tuple[float, float] | None = None
) -> list[str]:
    """Return a table with the operations and bytes of each part of the network, as aligned lines of text.

    Args:
        products: Convolutions and matrix products of a step.
        parts: Names of the parts, in order.
        ceilings: Peak operations and bytes per second of a device. If given, the table has a lower bound of the time of
            each part.
    """
    head = ("part", "forward GFLOP", "GB", "backward GFLOP", "GB", "% of GFLOP")
    rows: list[tuple[str, ...]] = [(*head, *(["lower bound, ms"] if ceilings else []))]
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


def format_kernels(by_part: Mapping[str, Totals]) -> list[str]:
    """Return a table with the kernels of each part of the network, as aligned lines of text.

    Args:
        by_part: Part -> sums over its kernels, see `xdim_jax.training.kernels.sum_by_part`.
    """
    rows: list[tuple[str, ...]] = [("part", "kernels", "GB moved", "M cycles")]
    for part, found in by_part.items():
        cycles = f"{found.cycles / 1e6:.2f}" if found.cycles else "-"
        rows.append((part or "others", str(found.kernels), f"{found.bytes / 1e9:.2f}", cycles))
    sums = [sum(getattr(found, key) for found in by_part.values()) for key in ("kernels", "bytes", "cycles")]
    rows.append(("all", str(sums[0]), f"{sums[1] / 1e9:.2f}", f"{sums[2] / 1e6:.2f}" if sums[2] else "-"))
    return _aligned(rows)


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows of a table as lines of text. Each column is as wide as its widest cell, and right-aligned."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in table]
