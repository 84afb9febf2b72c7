"""Config files: loading, overriding and comparing them."""

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from xdim_jax.base.errors import UserError

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types


# -- config files -------------------------------------------------------------------------------------------------


def load_config(spec: str, overrides: Sequence[str]) -> Config:
    """Load ``path/to/config.py[:variant,...]`` and apply ``--config.key=value`` overrides.

    If the path does not exist, the recipe of the package with this name is loaded.

    Args:
        spec: Path or name of a config file, and after a colon its variants, separated by commas. The path may contain
            colons.
        overrides: Arguments ``--config.key=value``. If a key occurs twice, the last value applies.

    Returns:
        The config, locked.

    Raises:
        UserError: The file does not exist, a variant or key is unknown (the message suggests the most similar key), or
            a value has a wrong type.
    """
    path, variant = _find_config(spec)
    # a recipe imports configs._shared; another folder with the name configs must not hide ours
    ours, others = str(shipped_configs().parent), str(path.parent.parent.absolute())
    rest = [folder for folder in sys.path if folder != ours]
    sys.path[:] = [ours, *([] if others in (ours, *rest) else [others]), *rest]
    module_spec = importlib.util.spec_from_file_location("xdim_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file; expected one with a function get_config(variants)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(variant)
    except (ValueError, SyntaxError, ImportError, AttributeError, NameError) as error:
        raise UserError(f"--config={spec}: {error}") from error
    _check_overrides(config, overrides)
    overrides = list({o.partition("=")[0]: o for o in overrides}.values())  # the last value of a key applies
    try:
        return _overridden(config, overrides)
    except (flags.Error, TypeError, ValueError) as error:
        wrong = [o for o in overrides if not _fits(module.get_config(variant), o)]
        raise UserError(f"{' '.join(wrong or overrides)}: {error}") from error


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Return the config with overrides. Raises an error of absl or Python if a value has a wrong type."""
    values = flags.FlagValues()
    argv = ["config", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def _fits(config: Config, override: str) -> bool:
    try:
        _overridden(config, [override])
    except (flags.Error, TypeError, ValueError):
        return False
    return True


def shipped_configs() -> Path:
    """Return the folder of the recipes: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes" / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_recipes() -> list[str]:
    """Return the names of the recipes, for ``--config``. Files whose names start with an underscore are not recipes."""
    return sorted(path.stem for path in shipped_configs().glob("*.py") if not path.stem.startswith("_"))


def _find_config(spec: str) -> tuple[Path, str]:
    """Return the config file and the variants that an argument of `load_config` names.

    The path is the longest beginning of ``spec``, up to a colon or the end, that is a file. If there is none, the text
    before the first colon is the name of a shipped recipe.
    """
    shipped = shipped_configs()
    ends = [len(spec), *(i for i in reversed(range(len(spec))) if spec[i] == ":")]
    paths = [(Path(spec[:end]), end) for end in ends]
    name = Path(spec[: ends[-1]]).name
    paths += [(shipped / name, ends[-1]), (shipped / f"{name}.py", ends[-1])]
    for path, end in paths:
        if path.is_file():
            return path, spec[end + 1 :]
    known = ", ".join(f"configs/{recipe}.py" for recipe in shipped_recipes())
    raise UserError(f"--config: {spec[: ends[-1]]} does not exist; available recipes: {known}")


def _check_overrides(config: Config, overrides: Sequence[str]) -> None:
    known = [key for key, _ in leaves(config)]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not key.startswith("--config."):
            raise UserError(f"unknown argument {override}; expected overrides --config.<key>=<value>, see --help")
        if not equals:
            raise UserError(f"{override} has no value; write {override}=<value>")
        key = key.removeprefix("--config.")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean --config.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"--config.{key} is not a key of this config; {hint}")


def leaves(config: Config, prefix: str = "") -> list[tuple[str, Any]]:
    """Return all keys of a config with their values; keys of sections are dotted, e.g. ``optim.schedule.peak``."""
    found = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def differences(a: Config, b: Config, *, ignored: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Compare two configs.

    Args:
        a, b: The configs.
        ignored: Dotted keys that are not compared.

    Returns:
        Each key whose values differ, with the value in ``a`` and the value in ``b``; None for a key that is missing.
    """
    x, y = dict(leaves(a)), dict(leaves(b))
    keys = [key for key in sorted(x.keys() | y.keys()) if key not in ignored]
    return [(k, x.get(k), y.get(k)) for k in keys if _plain(x.get(k)) != _plain(y.get(k))]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
