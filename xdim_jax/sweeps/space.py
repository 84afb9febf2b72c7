"""What a sweep varies: a Python file with a function ``suggest(trial)`` of ``suggest_*`` calls on config paths.

    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-4, 3e-3, log=True)
        if trial.suggest_categorical("optim.name", ["nadam", "nadam_torch"]) == "nadam_torch":
            trial.suggest_float("optim.momentum_decay", 1e-3, 1e-2, log=True)

Values are applied as ``--config.<path>=<value>`` overrides are; a tuple is written as a string: ``"(64,64,64)"``.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base.config import leaves, load_config, shipped_configs
from xdim_jax.base.errors import UserError
from xdim_jax.training.check import resolve_config

Suggest = Callable[[Any], object]
Params = Mapping[str, Any]

_MOST = 2000  # settings that are looked at


def load_space(path: Path) -> tuple[Suggest, str]:
    """The function ``suggest`` of a file, or of one that ships, and the file's text.

    Raises:
        UserError: there is no such file, it cannot be read, or it has no such function.
    """
    shipped = shipped_configs() / "sweeps"
    found = next((p for p in (path, shipped / path.name, shipped / f"{path.name}.py") if p.is_file()), None)
    if found is None:
        known = ", ".join(f"configs/sweeps/{p.name}" for p in sorted(shipped.glob("[!_]*.py")))
        raise UserError(
            f"--space={path} does not exist; give a Python file with a function suggest(trial), or one that ships: "
            + known
        )
    spec = importlib.util.spec_from_file_location("xdim_space", found)
    if spec is None or spec.loader is None:
        raise UserError(f"--space={path} is not a Python file; give one with a function suggest(trial)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--space={path}: {type(error).__name__}: {error}") from error
    suggest = getattr(module, "suggest", None)
    if not callable(suggest):
        raise UserError(f"--space={path} has no function suggest(trial), which names what is varied; see --help")
    return suggest, found.read_text(encoding="utf-8")


class _Probe:
    """Stands for a trial: notes what is asked for, and answers with one end of a range, or a choice."""

    def __init__(self, picks: Params, *, high: bool):
        self.picks, self.high = picks, high
        self.params: dict[str, Any] = {}
        self.found: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> Any:
        """As optuna's."""
        from optuna.distributions import FloatDistribution

        return self._note(name, FloatDistribution(low, high, step=step, log=log))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any:
        """As optuna's."""
        from optuna.distributions import IntDistribution

        return self._note(name, IntDistribution(low, high, step=step, log=log))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """As optuna's."""
        from optuna.distributions import CategoricalDistribution

        for choice in choices:
            if not isinstance(choice, (str, bool, int, float)):
                raise ValueError(f"{name}: a choice is text or a number, not {choice!r}; write a tuple as text")
        return self._note(name, CategoricalDistribution(choices))

    def _note(self, name: str, distribution: Any) -> Any:
        if self.found.setdefault(name, distribution) != distribution:
            raise ValueError(f"{name} is asked for twice, with different ranges")
        if hasattr(distribution, "choices"):
            value = self.picks.get(name, distribution.choices[0])
        else:
            value = distribution.high if self.high else distribution.low
        self.params[name] = value
        return value


def explore(suggest: Suggest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Both ends of every branch that choices open, one choice changed at a time, and all distributions by name.

    Raises:
        ValueError: an impossible range; one name with two ranges.
    """
    branches: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    waiting: list[tuple[dict[str, Any], set[str]]] = [({}, set())]  # picks, and the names asked for without the last
    while waiting and len(branches) < _MOST:
        picks, before = waiting.pop(0)
        probes = [_Probe(picks, high=high) for high in (False, True)]
        for probe in probes:
            suggest(probe)
            branches.append(probe.params)
        asked = probes[0].found | probes[1].found
        for name, distribution in asked.items():
            if found.setdefault(name, distribution) != distribution:
                raise ValueError(f"{name} has different ranges in different branches")
            if name not in before:
                waiting += [(picks | {name: c}, set(asked)) for c in getattr(distribution, "choices", ())[1:]]
    return branches, found


def settings(suggest: Suggest, picks: Params, names: set[str]) -> Iterator[dict[str, Any]]:
    """Both ends of every combination of the choices of these names; other choices are as picked, or the first."""
    low = _Probe(picks, high=False)
    suggest(low)
    is_open = next((n for n in low.found if n in names and n not in picks), None)
    if is_open is not None:
        for choice in low.found[is_open].choices:
            yield from settings(suggest, {**picks, is_open: choice}, names)
        return
    yield low.params
    high = _Probe(picks, high=True)
    suggest(high)
    yield high.params


def overrides_of(params: Params) -> list[str]:
    """The arguments of a main."""
    return [f"--config.{name}={value}" for name, value in params.items()]


def check_space(suggest: Suggest, path: Path, spec: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The distributions by name, after every branch has been tried on the config.

    Raises:
        UserError: paths that the config does not have, values of a wrong type, choices that do not go together.
    """
    try:
        branches, found = explore(suggest)
    except Exception as error:
        raise UserError(f"--space={path}: {type(error).__name__}: {error}") from error
    if not found:
        raise UserError(
            f"--space={path}: suggest(trial) asks for nothing; call trial.suggest_float(<config path>, ...)"
        )
    problems = dict.fromkeys(_problems(branches, spec, overrides))
    if problems:
        raise UserError(f"--space={path} does not fit --config={spec}:\n  " + "\n  ".join(problems))
    return found


def _problems(branches: Sequence[Params], spec: str, overrides: Sequence[str]) -> Iterator[str]:
    known = {key for key, _ in leaves(load_config(spec, overrides))}
    unknown = {name for params in branches for name in params if name not in known}
    for name in sorted(unknown):
        try:
            load_config(spec, [f"--config.{name}=0"])
        except UserError as error:
            yield str(error)
    for params in branches:
        usable = {name: value for name, value in params.items() if name not in unknown}
        try:
            resolve_config(load_config(spec, [*overrides, *overrides_of(usable)]), needs_data=False)
        except UserError as error:
            yield f"with {' '.join(overrides_of(usable))}: {error}"
