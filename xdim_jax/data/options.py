"""Flags for the options of data sets, used by several command-line programs."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from xdim_jax.base.errors import UserError
from xdim_jax.data.datasets import DATASETS, REQUIRED, Option

# data set -> name -> option, without --root, which is a flag for all data sets
OPTIONS = {name: {k: o for k, o in entry.options.items() if k != "root"} for name, entry in DATASETS.items()}


def add_options(
    parser: argparse.ArgumentParser,
    options: Mapping[str, Mapping[str, Option]] = OPTIONS,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Add a flag for each option. Options of the same name of several data sets have one flag.

    Args:
        parser: Parser of a command.
        options: Data set -> name -> option; default: the options of all data sets.
        defaults: Data set -> name -> default that replaces the default of the option.
    """
    for key in _keys(options):
        by_dataset = {name: of_dataset[key] for name, of_dataset in options.items() if key in of_dataset}
        for name, values in (defaults or {}).items():
            if key in values:
                by_dataset[name] = dataclasses.replace(by_dataset[name], default=values[key])
        parser.add_argument(
            f"--{key}",
            type=int if all(isinstance(option.default, int) for option in by_dataset.values()) else str,
            choices=list(dict.fromkeys(c for option in by_dataset.values() for c in option.choices)) or None,
            help="; ".join(_option_help(name, option) for name, option in by_dataset.items()),
        )


def _keys(options: Mapping[str, Mapping[str, Option]]) -> list[str]:
    """Return the names of all options, without repetitions."""
    return list(dict.fromkeys(key for of_dataset in options.values() for key in of_dataset))


def _option_help(name: str, option: Option) -> str:
    """Return the help of an option of a data set, with its default."""
    if isinstance(option.default, tuple):
        return f"{name}: {option.help}, separated by commas (default {','.join(option.default)})"
    return f"{name}: {option.help} ({'required' if option.default == REQUIRED else f'default {option.default}'})"


def read_section(options: argparse.Namespace, dataset: str) -> dict[str, Any]:
    """Return the given flags as the ``data`` section of a config.

    Args:
        options: Parsed flags: ``root`` and those of `add_options`.
        dataset: Name of the data set.

    Raises:
        UserError: The data set does not have an option that was given.
    """
    known = DATASETS[dataset].options
    section: dict[str, Any] = {"dataset": dataset, "root": str(options.root or "")}
    for key, value in given_options(options).items():
        if key not in known:
            raise UserError(f"--{key} is not an option of --dataset={dataset}; its options are: {', '.join(known)}")
        section[key] = tuple(value.split(",")) if isinstance(known[key].default, tuple) else value
    return section


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of data sets that were given as flags."""
    return {key: value for key in _keys(OPTIONS) if (value := getattr(options, key)) is not None}
