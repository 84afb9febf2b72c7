"""A sweep before it begins: every distinct program of its space compiled, and held against the memory of a device."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from xdim_jax.base import log
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.sweeps.space import Suggest, explore, overrides_of, settings
from xdim_jax.training import pack
from xdim_jax.training.check import resolve_config
from xdim_jax.training.needs import Choice, measure

MOST = 200  # programs


def distinct(suggest: Suggest, spec: str, overrides: Sequence[str]) -> dict[str, tuple[dict[str, Any], Config]]:
    """One setting and its config for every program that the space can ask for, by what sets it apart.

    All choices of the keys that a program is made of are combined; of ranges, both ends are taken.

    Raises:
        UserError: there are more than `MOST`.
    """
    branches, found = explore(suggest)
    made_of = pack.signature(load_config(spec, overrides))
    shaping = {name for name in found if name in made_of and hasattr(found[name], "choices")}
    programs: dict[str, tuple[dict[str, Any], Config]] = {}
    starts = {repr(p): p for b in branches for p in [{k: v for k, v in b.items() if k not in shaping}]}
    combined = (s for start in starts.values() for s in settings(suggest, start, shaping))
    for params in itertools.chain(branches, combined):
        config, _ = resolve_config(load_config(spec, [*overrides, *overrides_of(params)]), needs_data=False)
        programs.setdefault(repr(pack.signature(config)), (params, config))
        if len(programs) > MOST:
            raise UserError(f"the space asks for more than {MOST} programs; fix some of: {', '.join(sorted(shaping))}")
    # of a number that every run of a pack has for itself, whether it is 0 is all that counts
    own = {name for name in found if name in made_of and (name in shaping or name not in pack.STACKED_KEYS)}
    return {_name(params, own): (params, config) for params, config in programs.values()}


def _name(params: Mapping[str, Any], own: set[str]) -> str:
    return " ".join(f"{k}={v}" for k, v in params.items() if k in own) or "the only one"


def rehearse(
    suggest: Suggest, spec: str, overrides: Sequence[str], *, slots: int, layout: str, budget: int | None
) -> None:
    """Compiles every program of a sweep, and says what it takes on a device.

    Args:
        suggest, spec, overrides: of the sweep.
        slots, layout: of its pack; 0: each trial alone.
        budget: bytes of a device; None: what this one has.

    Raises:
        UserError: some do not fit; all are named.
    """
    programs = distinct(suggest, spec, overrides)
    room = device_bytes() if budget is None else budget
    log.say(f"programs   {len(programs)}, for {jax.device_count()} x {jax.devices()[0].device_kind} with {gib(room)}")
    tight = []
    for name, (_, config) in programs.items():
        step, predict = _needs(config, slots, layout)
        fits = max(step, predict) <= room
        log.say(f"           {name}: step {gib(step)}, validation {gib(predict)}{'' if fits else ': does not fit'}")
        if not fits:
            tight.append(f"{name}: {gib(max(step, predict))}")
    if tight:
        smaller = "a smaller --pack, " if slots > 1 else ""
        raise UserError(
            f"{len(tight)} of {len(programs)} programs need more than {gib(room)}:\n  "
            + "\n  ".join(tight)
            + f"\nTake them out of the space, or give {smaller}a smaller --config.data.batch or --config.data.patch, "
            "or --config.train.remat; see python -m xdim_jax.plan"
        )


def _needs(config: Config, slots: int, layout: str) -> tuple[int, int]:
    """Bytes per device of the training step and of validation."""
    config, dataset = resolve_config(config, needs_data=False)
    choice = Choice(tuple(config.data.patch), config.data.batch, config.train.precision, config.train.remat)
    need = measure(config, dataset, choice)
    step = pack.step_bytes(config, dataset, slots, layout) if slots else need.step_bytes
    return step, need.predict_bytes


def device_bytes() -> int:
    """What a device has for programs: its allocator's limit; of a CPU, the memory that is free now."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    raise UserError("how much memory is free cannot be told on this system; give --budget=<size>, e.g. 16GiB")
