"""Search spaces: Python files with a function ``suggest(trial)``, which calls the ``suggest_*`` methods of Optuna.

    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-4, 3e-3, log=True)
        if trial.suggest_categorical("optim.name", ["nadam", "nadam_torch"]) == "nadam_torch":
            trial.suggest_float("optim.momentum_decay", 1e-3, 1e-2, log=True)

The names of parameters are config keys. Their values are applied as overrides ``--config.<key>=<value>``, so tuples are
written as strings: ``"(64,64,64)"``.

Before a sweep starts, `check_space` checks that the config accepts every branch of the search space. To this end,
`explore` calls the function with probes instead of trials. A probe records all parameters, and returns a given choice
or an end of the range as their values.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base.config import leaves, load_config, shipped_configs
from xdim_jax.base.errors import UserError
from xdim_jax.data.splits import ALL_FOLDS
from xdim_jax.training.check import resolve_config

Suggest = Callable[[Any], object]
Params = Mapping[str, Any]

_MAX_SETTINGS = 2000  # number of settings after which `explore` stops


def load_space(path: Path) -> tuple[Suggest, str]:
    """Load a space.

    Args:
        path: A Python file, or the name of a space in ``configs/sweeps`` of the package, with or without this folder.

    Returns:
        The function ``suggest``, and the text of the file.

    Raises:
        UserError: The file does not exist, cannot be imported, or has no function ``suggest``.
    """
    shipped = shipped_configs() / "sweeps"
    own = path.parent in (Path(), Path("configs/sweeps"))  # otherwise, the path names another folder
    names = (path, shipped / path.name, shipped / f"{path.name}.py") if own else (path,)
    found = next((p for p in names if p.is_file()), None)
    if found is None:
        known = ", ".join(f"configs/sweeps/{p.name}" for p in sorted(shipped.glob("[!_]*.py")))
        raise UserError(
            f"--space={path} does not exist; give a Python file with a function suggest(trial), or one of {known}"
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
        raise UserError(f"--space={path} has no function suggest(trial); --help shows an example")
    return suggest, found.read_text(encoding="utf-8")


class _Probe:
    """A replacement for a trial, which records the parameters of a space.

    Args:
        fixed: Name of a parameter -> its choice. All other parameters take their first choice.
        high: True to return the upper end of every range, False for the lower end.

    Attributes:
        params: Values of the parameters by name.
        distributions: Distributions of the parameters by name.
    """

    def __init__(self, fixed: Params, *, high: bool):
        self.fixed, self.high = fixed, high
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> Any:
        """Same as `optuna.Trial.suggest_float`."""
        from optuna.distributions import FloatDistribution

        return self._answer(name, FloatDistribution(low, high, step=step, log=log))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any:
        """Same as `optuna.Trial.suggest_int`."""
        from optuna.distributions import IntDistribution

        return self._answer(name, IntDistribution(low, high, step=step, log=log))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Same as `optuna.Trial.suggest_categorical`."""
        from optuna.distributions import CategoricalDistribution

        for choice in choices:
            if not isinstance(choice, (str, bool, int, float)):
                raise ValueError(f"{name}: choices must be strings or numbers, not {choice!r}; write a tuple as string")
        return self._answer(name, CategoricalDistribution(choices))

    def _answer(self, name: str, distribution: Any) -> Any:
        """Record a parameter, and return its value."""
        if self.distributions.setdefault(name, distribution) != distribution:
            raise ValueError(f"{name} is suggested twice with different ranges")
        if hasattr(distribution, "choices"):
            value = self.fixed.get(name, distribution.choices[0])
        else:
            value = distribution.high if self.high else distribution.low
        self.params[name] = value
        return value


def explore(suggest: Suggest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Visit every branch of a search space, up to a limit of settings.

    The search starts with the first choice of every parameter. A choice may lead to further parameters, whose choices
    are then tried one at a time. Not all combinations are tried, because their number grows exponentially.

    Returns:
        The settings that were tried: for each branch one with the lower ends of all ranges, and one with the upper
        ends; and the distribution of every parameter by name.

    Raises:
        ValueError: A range is impossible, or a parameter has two different ranges.
    """
    tried: list[dict[str, Any]] = []
    distributions: dict[str, Any] = {}
    # pairs: fixed choices of a setting to try, and the parameters whose other choices are already in the queue
    queue: list[tuple[dict[str, Any], set[str]]] = [({}, set())]
    while queue and len(tried) < _MAX_SETTINGS:
        fixed, known = queue.pop(0)
        probes = [_Probe(fixed, high=high) for high in (False, True)]
        for probe in probes:
            suggest(probe)
            tried.append(probe.params)
        suggested = probes[0].distributions | probes[1].distributions
        for name, distribution in suggested.items():
            if distributions.setdefault(name, distribution) != distribution:
                raise ValueError(f"{name} has different ranges in different branches")
            if name not in known:
                queue += [(fixed | {name: c}, set(suggested)) for c in getattr(distribution, "choices", ())[1:]]
    return tried, distributions


def combine(suggest: Suggest, fixed: Params, names: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the settings for all combinations of the choices of some parameters.

    Each combination is yielded twice: with the lower ends of all ranges, and with the upper ends.

    Args:
        suggest: Function of the space.
        fixed: Name of a parameter -> its choice.
        names: Parameters whose choices are combined, unless they are in ``fixed``. All others take their first choice.
    """
    low = _Probe(fixed, high=False)
    suggest(low)
    name = next((n for n in low.distributions if n in names and n not in fixed), None)
    if name is not None:
        for choice in low.distributions[name].choices:
            yield from combine(suggest, {**fixed, name: choice}, names)
        return
    yield low.params
    high = _Probe(fixed, high=True)
    suggest(high)
    yield high.params


def overrides_of(params: Params) -> list[str]:
    """Return the parameters of a trial as command-line arguments."""
    return [f"--config.{name}={value}" for name, value in params.items()]


def check_space(suggest: Suggest, path: Path, spec: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Check that a config accepts every branch of a space that `explore` visits.

    Args:
        suggest: Function of the space.
        path: File of the space, for messages.
        spec: Recipe, as ``FILE[:VARIANT,...]``.
        overrides: Arguments ``--config.<key>=<value>``.

    Returns:
        The distribution of every parameter by name.

    Raises:
        UserError: The config does not accept a setting: a key is unknown, a value has a wrong type, or values exclude
            each other. The message lists all problems.
    """
    try:
        tried, distributions = explore(suggest)
    except Exception as error:
        raise UserError(f"--space={path}: {type(error).__name__}: {error}") from error
    if not distributions:
        raise UserError(
            f"--space={path}: suggest(trial) has no parameters; call e.g. trial.suggest_float(<config key>, ...)"
        )
    problems = dict.fromkeys(_problems(tried, spec, overrides))
    if problems:
        raise UserError(f"--space={path} does not fit --config={spec}:\n  " + "\n  ".join(problems))
    return distributions


def _problems(tried: Sequence[Params], spec: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a message for every unknown config key, and for every setting that the config does not accept."""
    known = {key for key, _ in leaves(load_config(spec, overrides))}
    unknown = {name for params in tried for name in params if name not in known}
    for name in sorted(unknown):
        try:
            load_config(spec, [f"--config.{name}=0"])
        except UserError as error:
            yield str(error)
    for params in tried:
        usable = {name: value for name, value in params.items() if name not in unknown}
        try:
            config, _ = resolve_config(load_config(spec, [*overrides, *overrides_of(usable)]), needs_data=False)
            if config.data.fold == ALL_FOLDS:
                raise UserError("a trial trains one fold, not all")
        except UserError as error:
            yield f"with {' '.join(overrides_of(usable))}: {error}"
