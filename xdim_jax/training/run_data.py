"""The data of a run: found, checked, split and prepared."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from xdim_jax.base import log
from xdim_jax.base.config import Config
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import read_json, write_json
from xdim_jax.data import case as data_case
from xdim_jax.data import phantom, pipeline, store
from xdim_jax.data.case import Case, Dataset
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.splits import official_split, split_cases
from xdim_jax.inference.output import Output
from xdim_jax.runs.workdir import DATA_FILE, SPLIT_FILE
from xdim_jax.training import mesh
from xdim_jax.training.check import whole_size


@dataclasses.dataclass(frozen=True)
class Found:
    """The data of a run: what trains, and what validates; facts by case id that go with every sample."""

    train: list[store.Entry]
    validation: list[tuple[Case, store.Entry]]
    facts: Mapping[str, Mapping[str, np.ndarray]]


def find_data(config: Config, dataset: Dataset, output: Output, workdir: Path, *, started: bool, first: bool) -> Found:
    """Prepared training and validation cases; without a root, phantoms are written below the workdir first.

    Args:
        config: of the run.
        dataset: that it names.
        output: of the network.
        workdir: of the run.
        started: whether the run has trained already.
        first: whether this process writes into the workdir.

    Raises:
        UserError: the data cannot be used, or a run that has ``started`` was split otherwise: cases that it trained on
            could come to validate it.
    """
    data = config.data
    root = Path(data.root or workdir / "phantom" / "train")
    if not data.root and first:
        _write_phantoms(config, root.parent)
    mesh.barrier("phantoms")
    scan = data_case.scan_cases(dataset, root, need_labels=True)
    cases = data_case.usable_cases(scan, root)
    for problem in scan.problems:
        log.warn(str(problem))
    data_case.check_grids(cases)
    if data.split == "official":
        train, validation = official_split(cases, scan.splits, data.fold)
    else:
        if scan.splits:
            log.say(f"split      by config.data.folds; the list in {root} would be --config.data.split=official")
        train, validation = split_cases(cases, fold=data.fold, folds=data.folds, seed=config.seed)
    if first:
        _keep_split(workdir, root, train, validation, started=started)
        write_json(workdir / DATA_FILE, data_case.describe(dataset))
    entries = _prepare(dataset, config, root, [*train, *validation])
    chosen = entries[: len(train)]
    pipeline.check_size(chosen, data.sampling, whole_size(data.patch))
    facts = {}
    if dataset.annotated is not None:
        for case in train:
            shown = dataset.annotated(case)
            facts[case.case_id] = {
                "annotated": output.annotated_channels(shown),
                "annotated_regions": np.array([name in shown for name in dataset.regions.names]),
            }
    return Found(chosen, list(zip(validation, entries[len(train) :], strict=True)), facts)


def _prepare(dataset: Dataset, config: Config, root: Path, cases: list[Case]) -> list[store.Entry]:
    """The entries of all cases; where there are several processes, each prepares its share first."""
    folder = config.data.store or store.default_folder(root)
    settings = Preparation.from_config(config.data.prepare)
    index, count = jax.process_index(), jax.process_count()
    if count > 1:
        store.prepare_cases(dataset, cases[index::count], settings, folder, jobs=config.data.threads)
        mesh.barrier("prepared")
    return store.prepare_cases(
        dataset, cases, settings, folder, jobs=config.data.threads, say=log.say, progress=log.bar("prepare")
    )


def _keep_split(workdir: Path, root: Path, train: list[Case], validation: list[Case], *, started: bool) -> None:
    sides = {"train": train, "validation": validation}
    split = {"root": str(root.absolute())} | {side: [case.case_id for case in cases] for side, cases in sides.items()}
    path = workdir / SPLIT_FILE
    if started and path.exists():
        before = read_json(path)
        for side in ("train", "validation"):
            if changed := sorted(set(before[side]) ^ set(split[side])):
                raise UserError(
                    f"the {side} cases are not those that {workdir} began with ({len(changed)} differ: "
                    f"{shorten(changed)}). Restore the data in {root} to go on, "
                    "or give another --workdir"
                )
    write_json(path, split)


def _write_phantoms(config: Config, folder: Path) -> None:
    options, name = config.data.phantom, config.data.dataset
    write, first = phantom.WRITERS[name]
    shared = {
        "shape": tuple(options.shape),
        "seed": config.seed,
        "difficulty": phantom.Difficulty(noise=options.noise, bias=options.bias),
        "progress": log.say,
    }
    if name == "brats":
        shared["convention"] = config.data.convention
    write(folder / "train", cases=options.cases, first=first, **shared)
    write(folder / "held_out", cases=options.held_out, first=first + options.cases, **shared)
