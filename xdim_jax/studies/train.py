"""Training of the runs of a study, one after the other or several in one program."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xdim_jax.base import log
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.base.signals import StopRequest
from xdim_jax.data.datasets import get_entry
from xdim_jax.data.splits import limit_patients
from xdim_jax.runs.records import VALIDATIONS_FILE, read_records
from xdim_jax.studies.plan import Plan, PlannedRun
from xdim_jax.training.check import FREE_KEYS, resolve_config
from xdim_jax.training.earlier_runs import describe_split, earlier_runs, find_seen_patients
from xdim_jax.training.initial_weights import read_initial_weights
from xdim_jax.training.pack import Pack, finish, train_in_pack
from xdim_jax.training.run_data import find_cases, split_found_cases
from xdim_jax.training.signature import signature


def check_plan(plan: Plan, overrides: list[str]) -> None:
    """Check the configs, the initial weights and the data of all arms before the first run.

    Raises:
        UserError: A config or initial weights cannot be used; there are too few training patients; two arms have
            different training or validation cases with the same seed; or weights come from a run that was trained on
            validation patients of the study. The message lists the problems of all arms.
    """
    for override in overrides:
        if not override.startswith("--config."):
            raise UserError(f"{override} is unknown; see python -m xdim_jax.study run --help")
        key = override.partition("=")[0].removeprefix("--config.")
        if key not in FREE_KEYS:
            free = ", ".join(key for key in FREE_KEYS if key.startswith("data."))
            raise UserError(
                f"{override}: settings of the runs must be in the plan; the command line may only set keys that do "
                f"not change results: {free}, train.overlays, ..."
            )
    problems: list[str] = []
    sources: dict[str, dict[str, Any]] = {}  # origin of the weights, by their name
    first = next(iter(plan.runs()))
    for arm in plan.arms:
        try:
            for fold in dict.fromkeys(run.fold for run in plan.runs()):
                config, _ = resolve_config(plan.config(dataclasses.replace(first, arm=arm, fold=fold), overrides))
                name = config.init.weights
                if name and name not in sources:
                    sources[name] = read_initial_weights(config.init).source
        except UserError as error:
            problems.append(f"arm {arm}: {error}")
    problems = problems or list(_data_problems(plan, overrides, sources))
    if problems:
        raise join_problems(problems, "arms of the plan cannot be trained")


def _data_problems(plan: Plan, overrides: list[str], sources: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the problems of the splits of all seeds and arms. ``sources``: name of weights -> their origin."""
    found: dict[str, Any] = {}  # cases, by the options of the data set
    largest: dict[tuple[int, int | None], int] = {}  # number of training patients, by seed and fold
    for run in plan.runs():
        largest[run.seed, run.fold] = max(run.size, largest.get((run.seed, run.fold), 0))
    scored: dict[tuple[int, str], int | None] = {}  # fold that validates a patient, by seed and patient
    for (seed, fold), size in largest.items():
        first: tuple[str, dict[str, set[str]]] | None = None
        for arm in plan.arms:
            config, dataset = resolve_config(plan.config(PlannedRun(arm, size, seed, fold), overrides))
            data = config.data
            if not data.root:  # every run has phantoms of its own
                return
            root = Path(data.root)
            name = f"arm {arm}: seed {seed}" + ("" if fold is None else f", fold {fold}")
            keys = ("dataset", "root", "split", *get_entry(data.dataset).options)
            options = repr([(key, data.get(key)) for key in keys])
            if options not in found:
                try:
                    found[options] = find_cases(data, dataset, root)
                except UserError as error:
                    found[options] = None
                    yield f"arm {arm}: {error}"
            if found[options] is None:
                continue
            try:
                train, validation = split_found_cases(data, seed, *found[options])
                train = limit_patients(train, data.train_patients, seed)
            except UserError as error:
                yield f"{name}: {error}"
                continue
            sides = {"training": {c.case_id for c in train}, "validation": {c.case_id for c in validation}}
            if first is None:
                first = (arm, sides)
                patients = sorted({c.patient for c in validation})
                if twice := [p for p in patients if scored.setdefault((seed, p), fold) != fold]:
                    yield (
                        f"{name}: validation patients of another fold are validated again ({shorten(twice)}), so that "
                        "they would have two scores; give folds without common validation patients"
                    )
            for side, ids in sides.items():
                if other := sorted(ids ^ first[1][side]):
                    yield (
                        f"{name}: {len(other)} {side} cases differ from those of arm {first[0]} ({shorten(other)}), so "
                        "that the arms cannot be compared; give the keys that select cases, such as data.fold, in "
                        "[settings]"
                    )
            source = sources.get(config.init.weights, {})
            if any(earlier_runs(source)) and (seen := find_seen_patients(source, root, validation)):
                yield (
                    f"{name}: {seen.text}. Use only the split of that run ({describe_split(seen.workdir, config)}) "
                    "in the plan, or weights that were not trained on these patients"
                )


def is_finished(run: PlannedRun, plan: Plan, workdir: Path) -> bool:
    """Return True if the last step of a run has been validated."""
    records = read_records(run.workdir(workdir), VALIDATIONS_FILE)
    return bool(records) and records[-1]["step"] == plan.steps


def train_plan(
    plan: Plan, workdir: Path, overrides: list[str], stop: StopRequest, *, slots: int = 1, layout: str = "auto"
) -> int:
    """Train all runs that are not finished. Runs that were interrupted are resumed.

    Args:
        plan: The plan.
        workdir: Folder of the study.
        overrides: Arguments ``--config.<key>=<value>`` for all runs, such as the folder of the data.
        stop: Record of received signals.
        slots: Largest number of runs that are trained in one program.
        layout: Layout of a pack, see `xdim_jax.training.pack`.

    Returns:
        The exit status of the process.

    Raises:
        UserError: Some runs have failed, for example because memory was exhausted. It is raised after the other runs
            have ended.
    """
    packs: dict[str, Pack] = {}  # by program, so that each program is compiled once
    errors: list[str] = []
    left = [run for run in plan.runs() if not is_finished(run, plan, workdir)]
    log.say(f"study      {plan.title}: {len(left)} of {len(list(plan.runs()))} runs remain, {plan.steps} steps each")
    while left and not stop.signal:
        block = [run for run in left if dataclasses.replace(run, arm=left[0].arm) == left[0]]
        left = [run for run in left if run not in block]
        groups: dict[str, list[tuple[Config, Path]]] = {}
        for run in block:
            config = plan.config(run, overrides)
            key = json.dumps(signature(resolve_config(config)[0]), sort_keys=True, default=str)
            groups.setdefault(key, []).append((config, run.workdir(workdir)))
        for key, runs in groups.items():
            if key not in packs:
                packs[key] = Pack(runs[0][0], slots, layout, stop)
            errors += train_in_pack(packs[key], runs, stop)
            if packs[key].failed:
                del packs[key]
    return finish(errors, stop)
