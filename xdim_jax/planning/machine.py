"""The choices of a recipe that depend on the machine: patch and batch by memory, number of steps by time."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax import ops
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.files import read_json, write_json
from xdim_jax.data.case import Dataset
from xdim_jax.data.fingerprint import Fingerprint
from xdim_jax.planning.choices import Choices
from xdim_jax.runs import environment
from xdim_jax.training import needs
from xdim_jax.training.mesh import make_devices
from xdim_jax.training.program import make_program, step_arguments

_HOST_SHARE = 0.6  # share of the host's memory for a training step on CPU; the rest is for reading and the system
_DEVICE_SHARE = 0.9  # share of the memory of an accelerator
_MIN_SIDES = {"omnianet": 128, "dxnet": 64}  # a patch is not made smaller than this as long as something else helps
# steps below which the patch becomes smaller, for pre-trained and random weights. With pre-trained weights, 400 steps
# gave a Dice of 0.93 with 200 patients, and with up to 50 patients they gained 0.003 after 200 (docs/transfer.md)
_MIN_STEPS = {True: 400, False: 1000}
_MAX_STEPS = 50_000
_STEPS_PER_CASE = 100  # steps for each training case beyond the first 2000
_EPOCH_STEPS = 50  # smallest number of steps of an epoch
_MAX_EPOCHS = 100
_VALIDATION_SHARE = 0.2  # largest share of the time for validations
_MAX_VALIDATIONS = 10
_OTHER = 0.1  # share of the time for compiling, reading and writing
_TIMED = 3  # number of steps whose median time is taken

# choices -> config and data set of the recipe
Build = Callable[[Choices], tuple[Config, Dataset]]


def default_memory() -> int:
    """Return the memory in bytes that a training step may use: of the device, or a share of the host's on CPU."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and jax.default_backend() != "cpu":
        return int(limit * _DEVICE_SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _HOST_SHARE)


def fit_memory(choices: Choices, budget: int, build: Build, say: Callable[[str], None]) -> Choices:
    """Make the batch, then the patch smaller until a training step fits into the memory.

    Args:
        choices: The choices so far.
        budget: Memory in bytes.
        build: Function that returns the config of choices.
        say: Called with a line for the log.

    Raises:
        UserError: The smallest patch does not fit.
    """
    reductions = []
    while True:
        config, dataset = build(choices)
        needed = needs.measure(config, dataset, needs.make_choices(config)[0]).step_bytes
        text = f"patch {'x'.join(map(str, choices.patch))}, batch {choices.batch}: a step needs {gib(needed)}"
        say(f"memory     {text} of {gib(budget)}")
        if needed <= budget:
            reason = f"{text}, as compiled for this machine, of {gib(budget)}"
            return choices.change({"batch": "; ".join([*reductions, reason])})
        reductions.append(f"{text}, which is too much")
        smaller = _smaller(choices, needed / budget)
        if smaller is None:
            raise UserError(
                f"--memory={gib(budget)}: nothing fits; the smallest choice, {text}: give more --memory, or train on "
                "another machine"
            )
        choices = smaller


def _smaller(choices: Choices, excess: float) -> Choices | None:
    """Return choices that need about ``excess`` times less memory; None if there are none.

    The batch becomes smaller down to 2, then the largest side of the patch down to 64 (2D: 128), then the batch down to
    one sample for each device, and finally the sides down to the smallest ones that the network accepts.
    """
    unit = choices.devices
    if choices.batch > max(2, unit):
        fewer = min(choices.batch // 2, int(choices.batch / excess)) // unit * unit
        return choices.change(batch=max(2, unit, fewer))
    patch = _smaller_patch(choices, _MIN_SIDES[choices.network])
    if patch is None and choices.batch > unit:
        return choices.change(batch=unit)
    patch = patch or _smaller_patch(choices, 1)
    return _with_patch(choices, patch) if patch else None


def _smaller_patch(choices: Choices, minimum: int) -> tuple[int, ...] | None:
    """Return the patch with its largest side reduced by one step; None if all sides are at most ``minimum``,
    or if the network does not accept a smaller patch.

    The other side of a 2D patch is reduced by the same factor, because the patch then covers a coarser image.
    """
    if choices.flat:
        unit, side = choices.factors[0], max(choices.patch)
        if side - unit < max(unit, minimum):
            return None
        return tuple(math.ceil(n * (side - unit) / side / unit) * unit for n in choices.patch)
    able = [a for a, f in enumerate(choices.factors) if choices.patch[a] - f >= max(f, minimum)]
    if not able:
        return None
    axis = max(able, key=lambda a: choices.patch[a])
    patch = tuple(n - choices.factors[a] * (a == axis) for a, n in enumerate(choices.patch))
    return patch if choices.accepts(patch) else None


def fit_time(
    choices: Choices,
    found: Fingerprint,
    hours: float,
    seconds: Callable[[Choices], float],
    say: Callable[[str], None],
) -> Choices:
    """Choose the number of steps, and make a patch smaller with which there would be too few steps.

    Args:
        choices: Choices that fit into the memory.
        found: Fingerprint of the data set.
        hours: Time for the training of all folds.
        seconds: Function that returns the time of a training step in seconds.
        say: Called with a line for the log.

    Raises:
        UserError: There is not enough time for ten steps.
    """
    available = 3600 * hours / choices.folds * (1 - _OTHER)
    step = seconds(choices)
    text = ""
    smallest, enough = _MIN_SIDES[choices.network], _MIN_STEPS[choices.pretrained]
    wanted = available * (1 - _VALIDATION_SHARE) / enough  # seconds per step with which there are enough steps
    while step > wanted and (patch := _smaller_patch(choices, smallest)):
        smaller = choices.change(patch=patch)
        while (next_patch := _smaller_patch(smaller, smallest)) and step * _ratio(smaller, choices) > wanted:
            smaller = smaller.change(patch=next_patch)
        smaller = _with_patch(choices, smaller.patch)
        text = (
            f"; with {'x'.join(map(str, choices.patch))}, a step takes {step:.2g} s, and there would be "
            f"{available * (1 - _VALIDATION_SHARE) / step:.0f} steps in the given time, fewer than {enough}"
        )
        choices, step = smaller, seconds(smaller)
    cap = min(_MAX_STEPS, 2000 + _STEPS_PER_CASE * len(found.cases))
    validation = _validation_seconds(choices, found, step)
    validations = int(np.clip(available * _VALIDATION_SHARE / validation, 1, _MAX_VALIDATIONS))
    steps = int(min((available - validations * validation) / step, cap))
    if steps < 10:
        raise UserError(
            f"--hours={hours:g}: a training step takes {step:.2g} s and a validation about {validation:.0f} s, so "
            f"there is no time to train {choices.folds} folds; give more --hours, or --folds=2"
        )
    epochs = int(np.clip(steps // _EPOCH_STEPS, 1, _MAX_EPOCHS))
    every = math.ceil(epochs / validations)
    say(f"time       a step takes {step:.2g} s: {steps} steps for each of {choices.folds} folds in {hours:g} h")
    return choices.change(
        {
            "patch": choices.reasons["patch"] + text,
            "epochs": f"{hours:g} h for {choices.folds} folds; a step takes {step:.2g} s here and a validation about "
            f"{validation:.0f} s; at most {cap} steps for {len(found.cases)} cases",
        },
        epochs=epochs,
        epoch_steps=max(steps // epochs, 1),
        validate_every=every,
    )


def _ratio(smaller: Choices, choices: Choices) -> float:
    return math.prod(smaller.patch) / math.prod(choices.patch)


def _with_patch(before: Choices, patch: tuple[int, ...]) -> Choices:
    """Return choices with a smaller patch. In 2D, the spacing becomes coarser, so that the patch covers the same."""
    if not before.flat:
        return before.change(patch=patch)
    factor = max(b / s for b, s in zip(before.patch, patch, strict=True))
    spacing = before.prepare["spacing"]
    coarser = (spacing[0], *(_rounded_up(v * factor) for v in spacing[1:]))
    reason = f"{before.reasons['spacing']}; then {factor:.2g} times as coarse, because the patch became smaller"
    return before.change({"spacing": reason}, patch=patch, prepare={**before.prepare, "spacing": coarser})


def _rounded_up(value: float) -> float:
    """Return the next larger number with three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.3g}")


def _validation_seconds(choices: Choices, found: Fingerprint, step: float) -> float:
    """Estimate the time of a validation of one fold: a window takes a third of the time of a sample in training."""
    sizes = found.prepared_sizes(choices.prepare["spacing"], cropped=choices.prepare["crop"] == "nonzero")
    patch = np.array([1, *choices.patch] if choices.flat else choices.patch)
    overlap = np.array([1, 2, 2] if choices.flat else [2, 2, 2])  # windows overlap by half, where there are several
    windows = np.where(sizes > patch, np.ceil(sizes / patch * overlap), 1).prod(1)
    return float(windows.sum() / choices.folds * step / choices.batch / 3)


class StepTimes:
    """Times of training steps on this machine. They are kept in a file, so that a plan can be repeated.

    Args:
        path: The file.
        build: Function that returns the config of choices.
    """

    def __init__(self, path: Path, build: Build):
        self._path, self._build = path, build

    def __call__(self, choices: Choices) -> float:
        """Return the time of a training step in seconds, measured with random numbers in place of images."""
        setting = {
            "devices": environment.devices(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "jax": jax.__version__,
            **{
                f.name: getattr(choices, f.name)
                for f in dataclasses.fields(choices)
                if f.name in ("network", "patch", "batch", "strides", "pretrained", "precision", "output")
            },
        }
        key = json.dumps(setting, sort_keys=True)
        known: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}
        if key not in known:
            known[key] = float(f"{measure_step(*self._build(choices)):.2g}")
            write_json(self._path, known)
        return known[key]


def measure_step(config: Config, dataset: Dataset) -> float:
    """Return the time of a training step in seconds, without compiling: the median of three."""
    mesh = config.mesh
    devices = make_devices(mesh.data, mesh.space, batch=config.data.batch, parallel=mesh.parallel)
    program, params, stats = make_program(config, dataset, per_epoch=1, axis=devices.axis)
    _, shapes, _ = step_arguments(program, dataset, params, stats)
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
    arrays["image"] = rng.standard_normal(arrays["image"].shape, np.float32)
    for name in ("annotated", "annotated_regions"):
        if name in arrays:
            arrays[name] = np.ones_like(arrays[name])
    batch = devices.put_batch(arrays)
    state, key = devices.put_state(program.init(params, stats)), devices.put_state(jax.random.key(0))
    step = ops.compile_program(devices.lower(program.step, state, batch, key))
    times = []
    for _ in range(_TIMED + 1):
        begin = time.perf_counter()
        state, metrics = step(state, batch, key)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))
