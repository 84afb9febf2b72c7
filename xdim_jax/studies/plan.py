"""The plan of a study: a TOML file that is written before the runs and copied into the folder of their results.

    title = "Transfer to CAMUS"
    recipe = "camus_omnianet:lite0"
    steps = 400                  # training steps of every run
    validate_steps = 50          # steps between validations; the last validation gives the score
    baseline = "random"          # the arm with which the others are compared

    [[grid]]                     # a grid adds a run for every arm, size and seed; runs are in the order of the grids
    sizes = [5, 20]              # numbers of training patients
    seeds = [0, 1, 2]
    folds = [0, 1, 2, 3, 4]      # optional: validation folds; without them, all runs have the fold of the recipe

    [settings]                   # config keys of all runs
    "data.patch" = [128, 128]

    [arms.random]                # config keys of an arm; its name is the name of its folder
    "init.weights" = ""

    [arms.pretrained]

For one seed and fold, all arms have the same training patients, validation patients and order of batches. A smaller
subset of training patients is contained in a larger one.
"""

import dataclasses
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError, join_problems
from xdim_jax.base.files import atomic_path

PLAN_FILE = "plan.toml"
_KEYS = {"title": str, "recipe": str, "steps": int, "validate_steps": int, "baseline": str, "grid": list, "arms": dict}
_OPTIONAL = {"settings": dict, "notes": str}


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a study: an arm, a number of training patients, a seed, and a validation fold.

    The fold is None if the grid of the run has no folds.
    """

    arm: str
    size: int
    seed: int
    fold: int | None = None

    def workdir(self, root: Path) -> Path:
        """Return the workdir of the run in the workdir of the study."""
        fold = "" if self.fold is None else f"_fold{self.fold}"
        return root / self.arm / f"n{self.size:03d}" / f"seed{self.seed}{fold}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Runs of a study: every combination of the numbers of training patients, the seeds and the folds."""

    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    folds: tuple[int | None, ...] = (None,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The content of a plan, see the docstring of this module.

    Attributes:
        grids: Numbers of training patients, seeds and folds.
        arms: For each arm, its config keys with their values.
    """

    title: str
    recipe: str
    steps: int
    validate_steps: int
    baseline: str
    grids: tuple[Grid, ...]
    arms: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    notes: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """All numbers of training patients, in increasing order."""
        return tuple(sorted({size for grid in self.grids for size in grid.sizes}))

    def runs(self) -> Iterator[PlannedRun]:
        """Yield all runs, grid by grid.

        All arms with the same seed, fold and number of training patients follow each other, so that they can be
        compared even if the study is stopped early.
        """
        blocks = [block for g in self.grids for block in itertools.product(g.seeds, g.folds, g.sizes)]
        for seed, fold, size in dict.fromkeys(blocks):
            for arm in self.arms:
                yield PlannedRun(arm, size, seed, fold)

    def config(self, run: PlannedRun, overrides: list[str]) -> Config:
        """Return the config of a run.

        Args:
            run: The run.
            overrides: Further arguments ``--config.<key>=<value>``, such as the folder of the data.

        Raises:
            UserError: A key is unknown, or a value has a wrong type.
        """
        values = {
            **self.settings,
            **self.arms[run.arm],
            **_own_values(run, self.steps, self.validate_steps),
        }
        return load_config(self.recipe, [*(f"--config.{k}={_format(v)}" for k, v in values.items()), *overrides])


def _own_values(run: PlannedRun, steps: int, validate_steps: int) -> dict[str, Any]:
    """Return the config keys of a run that follow from its place in the grid and from the numbers of steps."""
    fold = {} if run.fold is None else {"data.fold": run.fold}
    return fold | {
        "seed": run.seed,
        "data.train_patients": run.size,
        "data.epoch_steps": validate_steps,
        "train.epochs": steps // validate_steps,
        "train.validate_every": 1,
        "train.validate_after_score": 0.0,
        "train.patience": 0,  # all runs have the same number of steps
    }


# settings and arms must not contain these; data.root is given on the command line
_RESERVED = ("data.root", *_own_values(PlannedRun("", 1, 0), 1, 1))


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: The file cannot be read, or keys or values are missing, unknown or contradictory; lists all problems.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--plan: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--plan={path} is not a TOML file: {error}") from error
    problems = list(_problems(content))
    if problems:
        raise join_problems([f"{path}: {problem}" for problem in problems], "values of the plan cannot be used")
    grids = tuple(Grid(tuple(g["sizes"]), tuple(g["seeds"]), tuple(g.get("folds", (None,)))) for g in content["grid"])
    others = {key: content[key] for key in _KEYS if key != "grid"}
    return Plan(**others, grids=grids, settings=content.get("settings", {}), notes=content.get("notes", ""))


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    known = _KEYS | _OPTIONAL
    for key in content.keys() - known.keys():
        yield f"unknown key {key!r}; known: {', '.join(known)}"
    for key, kind in known.items():
        if key not in content:
            if key in _KEYS:
                yield f"{key} is missing"
        elif not isinstance(content[key], kind) or isinstance(content[key], bool):
            yield f"{key} = {content[key]!r}: expected {kind.__name__}"
    grids, arms, reserved = content.get("grid"), content.get("arms"), list(_RESERVED)
    if isinstance(grids, list):
        if not grids:
            yield "grid: expected at least one [[grid]] with sizes and seeds"
        for grid in grids:
            yield from _grid_problems(grid)
        with_folds = {"folds" in grid for grid in grids if isinstance(grid, dict)}
        if len(with_folds) > 1:
            yield "grid: expected folds in all grids or in none"
        if True in with_folds:
            reserved.append("data.fold")
    if isinstance(arms, dict):
        if len(arms) < 2:
            yield f"arms: expected two or more, found {len(arms)}"
        if not isinstance(content.get("baseline"), str) or content["baseline"] not in arms:
            yield f"baseline = {content.get('baseline')!r} is none of the arms {', '.join(arms)}"
        for name, values in arms.items():
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                yield f"arms.{name}: expected lower-case letters, digits, '_' and '-', because it is a folder name"
            if not isinstance(values, dict):
                yield f"arms.{name}: expected a table of config keys"
    for where, values in {"settings": content.get("settings"), **(arms if isinstance(arms, dict) else {})}.items():
        for key in values if isinstance(values, dict) else ():
            if key in reserved:
                yield f"{where}: {key} cannot be set here: it follows from the grid, the steps or --config.data.root"
            elif isinstance(values[key], dict):
                yield f'{where}: write the key in quotes, "{key}.{next(iter(values[key]), "...")}"'
    steps, every = content.get("steps"), content.get("validate_steps")
    if isinstance(steps, int) and isinstance(every, int) and not (every > 0 and steps > 0 and steps % every == 0):
        yield f"steps = {steps}: expected a multiple of validate_steps = {every}, both above 0"


def _grid_problems(grid: Any) -> Iterator[str]:
    if not isinstance(grid, dict) or grid.keys() - {"folds"} != {"sizes", "seeds"}:
        yield f"grid = {grid!r}: expected sizes, seeds, and optionally folds"
        return
    for key, numbers in grid.items():
        least = 1 if key == "sizes" else 0
        whole = isinstance(numbers, list) and all(type(n) is int and n >= least for n in numbers)
        if not whole or not numbers or len(set(numbers)) < len(numbers):
            yield f"grid: {key} = {numbers!r}: expected distinct integers of at least {least}"


def keep_plan(path: Path, workdir: Path) -> Plan:
    """Copy the plan into the workdir of the study before the first run, or check that it equals the copy there.

    Raises:
        UserError: The plan cannot be used, or differs from the copy in this workdir.
    """
    plan, kept = read_plan(path), workdir / PLAN_FILE
    if not kept.exists():
        with atomic_path(kept) as temporary:
            temporary.write_bytes(path.read_bytes())
        return plan
    before = read_plan(kept)
    if changed := [f.name for f in dataclasses.fields(Plan) if getattr(before, f.name) != getattr(plan, f.name)]:
        raise UserError(
            f"{path} differs from {kept}, with which the runs were started: {', '.join(changed)}. Give another "
            "--workdir for another plan"
        )
    return plan


def _format(value: Any) -> str:
    """Return a value as in ``--config.<key>=<value>``."""
    if isinstance(value, list):
        return "(" + "".join(f"{item!r}," for item in value) + ")"
    return str(value)
