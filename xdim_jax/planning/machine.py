"""The choices of a recipe that depend on the machine.

The memory limits the patch and the batch. The available time limits the number of steps. If there would be too few
steps, the batch and the patch become smaller, and the voxels larger.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax import ops
from xdim_jax.base import log
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.files import read_json, write_json
from xdim_jax.base.host import count_cores, memory_bytes, processor
from xdim_jax.data.case import Dataset
from xdim_jax.data.fingerprint import Fingerprint
from xdim_jax.inference.windows import window_starts
from xdim_jax.planning.choices import Choices, coarsen, rounded_up
from xdim_jax.runs import environment
from xdim_jax.training import needs
from xdim_jax.training.mesh import make_devices
from xdim_jax.training.program import make_program, step_arguments

_HOST_SHARE = 0.6  # fraction of host memory for a training step on CPU; the rest is for reading and the system
_DEVICE_SHARE = 0.9  # fraction of the memory of an accelerator for a training step
# preferred minimum of the sides of a 3D patch, and of the largest side of a 2D patch; smaller sides are tried only if
# one sample per device does not fit otherwise
_MIN_SIDES = {"omnianet": 128, "dxnet": 64}
# preferred minimum of training steps with pre-trained (True) and with random weights. If the available time allows
# fewer, batch and patch are made smaller. With pre-trained weights and 200 training patients, 400 steps gave a Dice of
# 0.93; with up to 50 patients, Dice increased by at most 0.003 between steps 200 and 400 (docs/transfer.md)
_MIN_STEPS = {True: 400, False: 1000}
_FEW = 0.9  # a plan with fewer steps than this fraction of _MIN_STEPS has a warning
# the largest number of steps is 2000 plus _STEPS_PER_CASE for each case, but at most _MAX_STEPS
_MAX_STEPS = 50_000
_STEPS_PER_CASE = 100
_EPOCH_STEPS = 50  # smallest number of steps of an epoch, unless the whole training has fewer
_MAX_EPOCHS = 100
_VALIDATION_SHARE = 0.2  # largest fraction of the time for validations
_MAX_VALIDATIONS = 10
_OTHER = 0.1  # fraction of the time for compiling, reading and writing
_COARSER = "; then increased to "  # part of the reason for a spacing, see `_with_patch`
_TIMED = 3  # number of steps that are timed; their median time is returned

# choices -> config and data set of the recipe
Build = Callable[[Choices], tuple[Config, Dataset]]


def default_memory() -> int:
    """Return the memory in bytes that a training step may use.

    It is 90 % of the device memory that JAX allocates (by default, JAX allocates 75 % of the memory of a GPU); on CPU,
    60 % of the memory of the host, or of the limit of its container.

    Raises:
        UserError: The accelerator does not report its memory.
    """
    if jax.default_backend() != "cpu":
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if not limit:
            raise UserError(f"{device.device_kind} does not report its memory; give --memory, e.g. --memory=16GiB")
        return int(limit * _DEVICE_SHARE)
    return int(memory_bytes() * _HOST_SHARE)


def fit_memory(choices: Choices, budget: int, build: Build, say: Callable[[str], None]) -> Choices:
    """Reduce the batch and the patch until a training step fits into the memory.

    Args:
        choices: The choices so far.
        budget: Memory in bytes, per device.
        build: Function that returns the config and the data set of choices.
        say: Called with a line for the log.

    Raises:
        UserError: The smallest patch does not fit.
    """
    reductions = []
    while True:
        config, dataset = build(choices)
        needed = needs.measure(config, dataset, needs.make_settings(config)[0]).step_bytes
        text = f"patch {'x'.join(map(str, choices.patch))}, batch {choices.batch}: a step needs {gib(needed)}"
        say(f"memory     {text}; the limit is {gib(budget)}")
        if needed <= budget:
            reason = f"{text} on this machine; the limit is {gib(budget)}"
            return choices.change({"batch": "; ".join([*reductions, reason])})
        reductions.append(f"{text}, which is too much")
        smaller = _smaller(choices, needed / budget)
        if smaller is None:
            raise UserError(
                f"--memory={gib(budget)} is not enough; smallest choice: {text}; give more --memory, or train on "
                "another machine"
            )
        choices = smaller


def _smaller(choices: Choices, excess: float) -> Choices | None:
    """Return choices that need less memory; None if there are none.

    Repeated calls reduce, in this order: (1) the batch to 2 samples, or to one per device if there are more than two
    devices; (2) the sides of the patch, largest first, to at least 64 (2D: the largest side to at least 128); (3) the
    batch to one sample per device; (4) the sides of the patch to the smallest ones that the network accepts.

    Args:
        choices: Choices that need too much memory.
        excess: Needed memory divided by the available memory. The batch is divided by approximately this factor, or
            halved if the factor is below 2.
    """
    unit = choices.devices
    if choices.batch > max(2, unit):
        fewer = min(choices.batch // 2, int(choices.batch / excess)) // unit * unit
        return choices.change(batch=max(2, unit, fewer))
    patch = _smaller_patch(choices, _MIN_SIDES[choices.network])
    if patch is None and choices.batch > unit:
        one = choices.change(batch=unit)
        return one if one.accepts(one.patch) else None
    patch = patch or _smaller_patch(choices, 1)
    return _with_patch(choices, patch) if patch else None


def _smaller_patch(choices: Choices, minimum: int) -> tuple[int, ...] | None:
    """Return the patch with the largest side that can become smaller reduced by one stride of the encoder.

    In 2D, both sides are reduced by the same factor, because `_with_patch` then increases the spacing by this factor.
    The result is None if every smaller patch has a side below ``minimum`` (2D: largest side), or is too small for the
    network.
    """
    if choices.flat:
        unit, side = choices.factors[0], max(choices.patch)
        if side - unit < max(unit, minimum):
            return None
        patch = tuple(math.ceil(n * (side - unit) / side / unit) * unit for n in choices.patch)
        return patch if choices.accepts(patch) else None
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
    """Choose the number of steps, and reduce batch and patch if there would be too few steps in the given time.

    In 3D, the batch is reduced to one sample per device before the patch is reduced. If the patch is reduced, the
    spacing is increased, so that the patch covers as much of the image as before (within the limits of `coarsen`).

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
    smallest, enough = _MIN_SIDES[choices.network], _MIN_STEPS[choices.pretrained]
    wanted = available * (1 - _VALIDATION_SHARE) / enough  # longest time per step that allows enough steps
    first, first_step = choices, step
    while step > wanted and (smaller := _faster(choices, smallest)):
        while (next_smaller := _faster(smaller, smallest)) and step * _ratio(smaller, choices) > wanted:
            smaller = next_smaller
        choices = _with_patch(choices, smaller.patch).change(batch=smaller.batch)
        step = seconds(choices)
    if not choices.flat and choices.patch != first.patch:
        coarser = coarsen(choices, found, first.patch)
        step = step if coarser.patch == choices.patch and coarser.strides == choices.strides else seconds(coarser)
        choices = coarser
    text = (
        f"with a batch of {first.batch} and patches of {'x'.join(map(str, first.patch))}, a step takes "
        f"{first_step:.2g} s, so the given time would allow only "
        f"{available * (1 - _VALIDATION_SHARE) / first_step:.0f} steps (minimum {enough})"
    )
    reasons = {}
    if choices.batch != first.batch:
        reasons["batch"] = f"{choices.reasons['batch']}; then reduced to {choices.batch}: {text}"
    if choices.patch != first.patch:
        reasons["patch"] = f"{choices.reasons['patch']}; reduced from {'x'.join(map(str, first.patch))}: {text}"
    if choices.batch == 1 and choices.dice == "batch":
        reasons["dice"] = f"{choices.reasons['dice']}; with one sample in a batch, this is the Dice of each sample"
    cap = min(_MAX_STEPS, 2000 + _STEPS_PER_CASE * len(found.cases))
    validation = _validation_seconds(choices, found, step)
    validations = int(np.clip(available * _VALIDATION_SHARE / validation, 1, _MAX_VALIDATIONS))
    steps = int(min((available - validations * validation) / step, cap))
    if steps < 10:
        raise UserError(
            f"--hours={hours:g} is not enough to train {choices.folds} folds: a training step takes {step:.2g} s and a "
            f"validation about {validation:.0f} s; give more --hours" + (", or --folds=2" if choices.folds > 2 else "")
        )
    epochs = int(np.clip(steps // _EPOCH_STEPS, 1, _MAX_EPOCHS))
    every = math.ceil(epochs / validations)
    steps = epochs * (steps // epochs)
    notes = choices.notes
    if steps < _FEW * enough:
        notes += (
            f"--hours={hours:g} allows only {steps} training steps for each of {choices.folds} folds: expected at "
            f"least {enough}; give more --hours" + (", or fewer --folds" if choices.folds > 2 else ""),
        )
    say(f"time       a step takes {step:.2g} s: {steps} steps for each of {choices.folds} folds in {hours:g} h")
    return choices.change(
        {
            **reasons,
            "epochs": f"{hours:g} h for {choices.folds} folds; on this machine, a training step takes {step:.2g} s and "
            f"a validation about {validation:.0f} s; at most {cap} steps for {len(found.cases)} cases",
        },
        epochs=epochs,
        epoch_steps=steps // epochs,
        validate_every=every,
        notes=notes,
    )


def _faster(choices: Choices, minimum: int) -> Choices | None:
    """Return choices with a faster training step: in 3D, first a batch of one sample per device, then a smaller patch.

    The spacing is unchanged. The result is None if no side of the patch can be smaller, see `_smaller_patch`.
    """
    if not choices.flat and choices.batch > choices.devices:
        return choices.change(batch=choices.devices)
    patch = _smaller_patch(choices, minimum)
    return choices.change(patch=patch) if patch else None


def _ratio(smaller: Choices, choices: Choices) -> float:
    """Return the number of voxels of a batch of ``smaller``, divided by that of ``choices``."""
    return math.prod(smaller.patch) * smaller.batch / (math.prod(choices.patch) * choices.batch)


def _with_patch(before: Choices, patch: tuple[int, ...]) -> Choices:
    """Return choices with a smaller patch. In 2D, the spacing is increased, so that a patch keeps its size in mm."""
    if not before.flat:
        return before.change(patch=patch)
    factor = max(b / s for b, s in zip(before.patch, patch, strict=True))
    spacing = before.prepare["spacing"]
    coarser = (spacing[0], *(rounded_up(v * factor) for v in spacing[1:]))
    reason = before.reasons["spacing"].partition(_COARSER)[0]
    reason += f"{_COARSER}{' x '.join(f'{v:g}' for v in coarser[1:])} mm, because the patch was reduced"
    return before.change({"spacing": reason}, patch=patch, prepare={**before.prepare, "spacing": coarser})


def _validation_seconds(choices: Choices, found: Fingerprint, step: float) -> float:
    """Estimate the time of a validation of one fold in seconds.

    A window is assumed to take a third of the time of a training sample. A validation uses one device of each process.

    Args:
        step: Time of a training step in seconds.
    """
    sizes = found.prepared_sizes(choices.prepare["spacing"], cropped=choices.prepare["crop"] == "nonzero")
    patch = (1, *choices.patch) if choices.flat else choices.patch
    overlap = (0.0, 0.5, 0.5) if choices.flat else (0.5, 0.5, 0.5)
    windows = sum(
        math.prod(len(window_starts(n, p, o)) for n, p, o in zip(size, patch, overlap, strict=True))
        for size in sizes.astype(int).tolist()
    )
    # a step computes batch / devices samples on each device; a validation uses one device of each process
    samples = choices.batch / (choices.devices / jax.process_count())
    return windows / choices.folds * step / samples / 3


class StepTimes:
    """Times of training steps on this machine. They are stored in a file, so that planning again gives the same plan.

    Args:
        path: The file.
        build: Function that returns the config and the data set of choices.
    """

    def __init__(self, path: Path, build: Build):
        self._path, self._build, self._said = path, build, False

    def __call__(self, choices: Choices) -> float:
        """Return the time of a training step in seconds, measured with random images if it is not in the file."""
        config, dataset = self._build(choices)
        setting = {
            "channels": [config.model.in_channels, config.model.out_channels],
            "devices": environment.devices(),
            "cores": count_cores(),
            "processor": processor(),
            "jax": jax.__version__,
            **{
                name: getattr(choices, name)
                for name in ("network", "patch", "batch", "strides", "axis", "pretrained", "precision", "output")
            },
        }
        key = json.dumps(setting, sort_keys=True)
        known: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}
        if key not in known:
            known[key] = float(f"{measure_step(config, dataset):.2g}")
            write_json(self._path, known)
        elif not self._said:
            self._said = True
            log.say(f"time       the step time was measured earlier; to measure it again, delete {self._path}")
        return known[key]


def measure_step(config: Config, dataset: Dataset) -> float:
    """Return the time of a training step in seconds, without compilation: the median of three steps."""
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
