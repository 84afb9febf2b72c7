"""The dry run of a sweep. It compiles every distinct program of the search space, and checks whether it fits."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from xdim_jax.base import log
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.host import memory_bytes
from xdim_jax.sweeps.space import Suggest, combine, explore, overrides_of
from xdim_jax.training import pack
from xdim_jax.training.absent_devices import Target
from xdim_jax.training.check import resolve_config
from xdim_jax.training.needs import StepSettings, measure
from xdim_jax.training.signature import STACKED_KEYS, signature

MAX_PROGRAMS = 200  # maximum number of programs that a dry run compiles


def distinct_programs(
    suggest: Suggest, spec: str, overrides: Sequence[str]
) -> dict[str, tuple[dict[str, Any], Config]]:
    """Return the distinct programs of a search space. Programs are distinct if their signatures differ.

    All combinations of the parameters that have choices and change the program are tried. For ranges, both ends are
    tried. See `xdim_jax.training.signature.signature`.

    Args:
        suggest: Function of the search space.
        spec: Recipe, as ``FILE[:VARIANT,...]``.
        overrides: Arguments ``--config.<key>=<value>``.

    Returns:
        A dictionary with one item per program. Its key is a text with the parameters that distinguish the program; its
        value is a setting of the search space with this program, and the config of this setting.

    Raises:
        UserError: There are more than `MAX_PROGRAMS`.
    """
    tried, distributions = explore(suggest)
    program_keys = signature(load_config(spec, overrides))
    combined_names = {name for name, d in distributions.items() if name in program_keys and hasattr(d, "choices")}
    other_choices = [{k: v for k, v in params.items() if k not in combined_names} for params in tried]
    starts = {repr(fixed): fixed for fixed in other_choices}.values()  # without repetitions
    combinations = (params for fixed in starts for params in combine(suggest, fixed, combined_names))
    programs: dict[str, tuple[dict[str, Any], Config]] = {}
    for params in itertools.chain(tried, combinations):
        config, _ = resolve_config(load_config(spec, [*overrides, *overrides_of(params)]), needs_data=False)
        programs.setdefault(repr(signature(config)), (params, config))
        if len(programs) > MAX_PROGRAMS:
            raise UserError(
                f"the search space has more than {MAX_PROGRAMS} programs; fix some of the parameters "
                + ", ".join(sorted(combined_names))
            )
    # numbers in STACKED_KEYS are inputs of the program, so their ranges do not distinguish programs
    shown = {name for name in distributions if name in program_keys and name not in STACKED_KEYS} | combined_names
    named: dict[str, tuple[dict[str, Any], Config]] = {}
    for params, config in programs.values():
        name = _program_name(params, shown)
        if name in named:  # programs that differ in whether a number is 0
            name = _program_name(params, set(params))
        named[name] = (params, config)
    return named


def _program_name(params: Mapping[str, Any], shown: set[str]) -> str:
    """Return the shown parameters as text."""
    return " ".join(f"{k}={v}" for k, v in params.items() if k in shown) or "the only program"


def dry_run(
    suggest: Suggest,
    spec: str,
    overrides: Sequence[str],
    *,
    slots: int,
    layout: str,
    budget: int | None,
    target: Target | None = None,
) -> None:
    """Compile every program of a sweep, and log the memory that it needs per device.

    Args:
        suggest: Function of the search space.
        spec: Recipe, as ``FILE[:VARIANT,...]``.
        overrides: Arguments ``--config.<key>=<value>``.
        slots: Number of trials in one program; 0 if trials are trained one by one.
        layout: Layout of a pack, one of `xdim_jax.training.pack.LAYOUTS`.
        budget: Memory of a device in bytes; None for the memory of ``target``, or of the devices of this machine.
        target: Devices that this machine does not have, for which the programs are compiled; None for those of this
            machine. Packs (``slots`` above 0) are compiled for this machine only.

    Raises:
        UserError: Programs need more memory than ``budget``. The message lists all of them.
    """
    programs = distinct_programs(suggest, spec, overrides)
    if budget is not None:
        available = budget
    else:
        available = target.memory if target else available_bytes()
    title = target.title if target else f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    log.say(f"programs   {len(programs)}, for {title}, {gib(available)}")
    if target:
        log.say(f"           {target.caution(optimised=target.optimised)}")
    too_large = []
    for name, (_, config) in programs.items():
        try:
            step, validation = _needed_bytes(config, slots, layout, target)
        except UserError as error:
            log.say(f"           {name}: cannot be used")
            too_large.append(f"{name}: {error}")
            continue
        fits = max(step, validation) <= available
        log.say(f"           {name}: step {gib(step)}, validation {gib(validation)}{'' if fits else ': does not fit'}")
        if not fits:
            too_large.append(f"{name}: {gib(max(step, validation))}")
    if too_large:
        smaller = "a smaller --pack, " if slots > 1 else ""
        raise UserError(
            f"{len(too_large)} of {len(programs)} programs need more than {gib(available)}, or cannot be used:\n  "
            + "\n  ".join(too_large)
            + f"\nRemove them from the search space, or give {smaller}a smaller --config.data.batch or "
            "--config.data.patch, or --config.train.remat; see python -m xdim_jax.plan"
        )


def _needed_bytes(config: Config, slots: int, layout: str, target: Target | None) -> tuple[int, int]:
    """Return the bytes per device of the training step and of validation."""
    config, dataset = resolve_config(config, needs_data=False)
    choice = StepSettings(tuple(config.data.patch), config.data.batch, config.train.precision, config.train.remat)
    need = measure(config, dataset, choice, target, optimise=target is None or target.optimised)
    step = pack.step_bytes(config, dataset, slots, layout) if slots else need.step_bytes
    return step, need.predict_bytes


def available_bytes() -> int:
    """Return the memory limit of a device; on a CPU, the memory that is available now, or the limit of the job.

    Raises:
        UserError: The system does not report how much memory is available.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return min(available, memory_bytes())
    except (OSError, StopIteration):
        pass
    raise UserError("the available memory of this system is unknown; give --budget=<size>, e.g. 16GiB")
