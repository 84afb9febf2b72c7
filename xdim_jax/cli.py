"""What the mains share: one message per error, the config flag, and the settings of the process."""

import argparse
import difflib
import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from xdim_jax.errors import UserError, first_line
from xdim_jax.files import CONFIG_FILE, cache_folder, read_json, write_json

_NOT_RECIPES = ("__init__", "common", "networks", "brats", "own")  # what the recipes in configs/ import

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a main on the command line's arguments and exits: 0 done, 2 with one message for unusable input."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        code = 130
    except Exception as error:
        text = explain(error)
        if text is None:  # a fault of this package: its traceback is needed
            raise
        sys.stdout.flush()
        print(f"error: {text}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def explain(error: Exception) -> str | None:
    """A message for what the machine lacks, which JAX or Python say in their own way; None for anything else."""
    said = str(error)
    line = first_line(error)
    smaller = (
        "python -m xdim_jax.plan --config=<recipe> --budget=<memory> --largest=patch says what fits; or a smaller "
        "--config.data.patch, --config.data.batch (or in parts: --config.train.accumulate), "
        "--config.train.precision=bfloat16, --config.train.remat='decoder*'"
    )
    if isinstance(error, MemoryError):
        return f"out of memory on the host: {line}. {smaller}"
    if isinstance(error, RuntimeError) and ("RESOURCE_EXHAUSTED" in said or "out of memory" in said.lower()):
        return f"out of memory on the device: {line}. {smaller}"
    if isinstance(error, RuntimeError) and ("Unable to initialize backend" in said or "No visible" in said):
        asked = os.environ.get("JAX_PLATFORMS")
        reason = f"JAX_PLATFORMS={asked} asks for it: unset it, or install" if asked else "Install"
        return (
            f"no device to compute on: {line}. {reason} what it needs (pip install 'xdim_jax[cuda12]' or '[tpu]'); "
            "python -m xdim_jax.doctor looks at this machine"
        )
    return None


def make_parser(module: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """An argument parser that shows the description as written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# -- config files -------------------------------------------------------------------------------------------------


def load_config(spec: str, overrides: Sequence[str]) -> Config:
    """Reads ``path/to/config.py[:variant,...]`` and applies ``--config.key=value`` overrides; the result is locked.

    A path that does not exist here is looked up among the recipes that ship with the package.

    Raises:
        UserError: no such file, unknown variant, unknown key (with the nearest known one), value of a wrong type.
    """
    name, _, variant = spec.partition(":")
    path = _find_config(name)
    for folder in (shipped_configs().parent, path.parent.parent.absolute()):  # a config imports configs.common
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    module_spec = importlib.util.spec_from_file_location("xdim_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file; a recipe is one with a function get_config(words)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(variant)
    except (ValueError, SyntaxError, ImportError, AttributeError, NameError) as error:
        raise UserError(f"--config={spec}: {error}") from error
    _check_overrides(config, overrides)
    overrides = list({o.partition("=")[0]: o for o in overrides}.values())  # the last one of a key counts
    try:
        return _overridden(config, overrides)
    except (flags.Error, TypeError, ValueError) as error:
        wrong = [o for o in overrides if not _fits(module.get_config(variant), o)]
        raise UserError(f"{' '.join(wrong or overrides)}: {error}") from error


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    """The config with values of its own types. Raises what absl and Python do for others."""
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
    """The folder of the recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_recipes" / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_recipes() -> list[str]:
    """Their names, for ``--config``."""
    return sorted(path.stem for path in shipped_configs().glob("*.py") if path.stem not in _NOT_RECIPES)


def _find_config(name: str) -> Path:
    shipped = shipped_configs()
    for path in (Path(name), shipped / Path(name).name, shipped / f"{Path(name).name}.py"):
        if path.is_file():
            return path
    known = ", ".join(f"configs/{recipe}.py" for recipe in shipped_recipes())
    raise UserError(f"--config: {name} does not exist; recipes that ship: {known}")


def _check_overrides(config: Config, overrides: Sequence[str]) -> None:
    known = [key for key, _ in leaves(config)]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not key.startswith("--config."):
            raise UserError(f"unknown argument {override}; overrides read --config.<key>=<value>, see --help")
        if not equals:
            raise UserError(f"{override} has no value; write {override}=<value>")
        key = key.removeprefix("--config.")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean --config.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"--config.{key} is not a key of this config; {hint}")


def leaves(config: Config, prefix: str = "") -> list[tuple[str, Any]]:
    """Every key of a config, dotted, with its value."""
    found = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def claim_workdir(workdir: Path, config: Config, *, free: Sequence[str], started: bool) -> None:
    """Writes the resolved config; a run that has ``started`` must have the same one, but for the ``free`` keys.

    Raises:
        UserError: the workdir belongs to another config (every difference is listed), or cannot be written.
    """
    path = workdir / CONFIG_FILE
    if started:
        differing = [
            f"{key}: {found!r} there, {wanted!r} asked for"
            for key, found, wanted in differences(read_config(workdir), config, free=free)
        ]
        if differing:
            raise UserError(
                f"{workdir} holds a run of another config; give another --workdir, or the same config to resume it. "
                "Differences:\n  " + "\n  ".join(differing)
            )
    write_json(path, config.to_dict())


def differences(a: Config, b: Config, *, free: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Keys, but for the ``free`` ones, whose values differ between two configs, with both values; lists are tuples."""
    x, y = dict(leaves(a)), dict(leaves(b))
    keys = [key for key in sorted(x.keys() | y.keys()) if key not in free]
    return [(k, x.get(k), y.get(k)) for k in keys if _plain(x.get(k)) != _plain(y.get(k))]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_config(workdir: Path) -> Config:
    """The resolved config of a run. Raises UserError if the folder is not a workdir."""
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(
            f"{workdir} is not the workdir of a run: it has no {CONFIG_FILE}; give the --workdir of xdim_jax.train"
        )
    config = read_json(workdir / CONFIG_FILE)
    if not isinstance(config, dict) or not {"model", "data", "predict"} <= config.keys():
        raise UserError(f"{workdir / CONFIG_FILE} is not the config of a run: it lacks model, data or predict")
    return ConfigDict(config)


# -- the process --------------------------------------------------------------------------------------------------


def cache_programs() -> None:
    """Turns on the persistent compilation cache; call before the first JAX computation.

    It lies under the user's cache folder (``JAX_COMPILATION_CACHE_DIR`` moves it, and
    ``XDIM_JAX_CACHE=off`` turns it off), parted by processor, because CPU programs hold its instructions.
    """
    import jax

    if os.environ.get("XDIM_JAX_CACHE") != "off" and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla" / _processor_key()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor_key() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
