"""Find, check, split and prepare the data of a run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import read_json, write_json
from xdim_jax.data import case as data_case
from xdim_jax.data import pipeline, reading, store
from xdim_jax.data.case import Case, Dataset
from xdim_jax.data.datasets import write_phantoms
from xdim_jax.data.prepare import Preparation
from xdim_jax.data.splits import limit_patients, official_split, split_cases
from xdim_jax.inference.output import Output
from xdim_jax.runs.workdir import DATA_FILE, SPLIT_FILE
from xdim_jax.training import mesh
from xdim_jax.training.check import patch_size_3d


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        train: Prepared training cases.
        validation: Validation cases: the case on disk, and the prepared case.
        facts: Case id -> name -> array. The arrays state which channels and which regions are annotated in the case.
            Every sample of the case has them as entries.
    """

    train: list[store.Entry]
    validation: list[tuple[Case, store.Entry]]
    facts: Mapping[str, Mapping[str, np.ndarray]]

    def steps_per_epoch(self, data: Any) -> int:
        """Return the number of steps per epoch, given the ``data`` section of a config."""
        if data.epoch_steps:
            return data.epoch_steps
        samples = pipeline.epoch_samples(self.train, data.sampling, data.patches_per_case)
        return pipeline.steps_per_epoch(len(samples), data.batch)

    def open_stream(
        self, data: Any, *, seed: int, start_step: int, activity: pipeline.Activity
    ) -> Iterator[dict[str, Any]]:
        """Return the batches of this process, beginning with that of step ``start_step + 1``.

        Args:
            data: The ``data`` section of a config.
            seed: Seed of the run.
            start_step: Number of completed steps.
            activity: Record of the current tasks of the reading threads.
        """
        return pipeline.make_stream(
            self.train,
            sampling=data.sampling,
            size=patch_size_3d(data.patch),
            flat=len(data.patch) == 2,
            foreground=data.foreground,
            patches_per_case=data.patches_per_case,
            batch=data.batch,
            seed=seed,
            start_step=start_step,
            threads=data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            extras=self.facts,
            activity=activity,
        )


def find_data(
    data: Any,
    seed: int,
    dataset: Dataset,
    output: Output,
    workdir: Path,
    *,
    started: bool,
    first: bool,
    separate_disks: bool = False,
) -> RunData:
    """Find, split and prepare the cases of a run.

    If ``data.root`` is empty, phantoms are written into the workdir and used as data.

    Args:
        data: The ``data`` section of a config.
        seed: Seed of the run.
        dataset: Data set that the section names.
        output: Meaning of the network's channels.
        workdir: Folder of the run.
        started: True if the run has a checkpoint.
        first: True if this process writes to the workdir.
        separate_disks: True if each process has its own workdir; then each writes the phantoms.

    Raises:
        UserError: The data cannot be used; or the run has ``started`` with other channels, labels, regions or
            annotations, or with another split, whose training cases might now be validation cases.
    """
    root = Path(data.root or workdir / "phantom" / "train")
    if not data.root and (first or separate_disks):
        write_phantoms(data, root.parent, seed=seed, progress=log.say)
    mesh.barrier("phantoms")
    train, validation = _split(data, seed, dataset, root)
    check_annotated(dataset, validation, data.fold)
    if first:
        if started:
            _check_description(workdir, root, dataset)
        _record_split(workdir, root, train, validation, started=started)
        write_json(workdir / DATA_FILE, data_case.describe(dataset))
    entries = _prepare(data, dataset, root, [*train, *validation])
    if first:
        _record_contents(workdir, root, entries, started=started)
    chosen = entries[: len(train)]
    pipeline.check_size(chosen, data.sampling, patch_size_3d(data.patch))
    facts = _annotations(dataset, output, train)
    return RunData(chosen, list(zip(validation, entries[len(train) :], strict=True)), facts)


def check_sizes(data: Any, dataset: Dataset, root: Path, cases: list[Case]) -> None:
    """Prepare the training cases of a cross-validation. Raises UserError if one is too large for the sampling.

    Nothing is done for the sampling ``patches``, which accepts every size.
    """
    if data.sampling != "patches":
        pipeline.check_size(_prepare(data, dataset, root, cases), data.sampling, patch_size_3d(data.patch))


def check_annotated(dataset: Dataset, validation: Sequence[Case], fold: int) -> None:
    """Raise UserError if no region is annotated in the validation cases of a fold."""
    if not any(data_case.annotated_regions(dataset, case) for case in validation):
        raise UserError(
            f"no region is annotated in the validation cases of fold {fold} "
            f"({shorten([case.case_id for case in validation])}), so that the fold has no validation score: expected "
            "at least one annotated region; change config.data.fold or config.data.folds, or remove these cases"
        )


def _split(data: Any, seed: int, dataset: Dataset, root: Path) -> tuple[list[Case], list[Case]]:
    """Return the training and the validation cases. Warnings about files are logged."""
    train, validation = split_found_cases(data, seed, *find_cases(data, dataset, root))
    return limit_patients(train, data.train_patients, seed), validation


def find_cases(data: Any, dataset: Dataset, root: Path) -> tuple[list[Case], Sequence[Mapping[str, Sequence[str]]]]:
    """Return the cases below a folder, and the official folds that come with them. Warnings about files are logged.

    Args:
        data: The ``data`` section of a config.
        dataset: Data set that the section names.
        root: Folder of the data.

    Raises:
        UserError: There is no case, or a case cannot be used.
    """
    scan = data_case.scan_cases(dataset, root, need_labels=True)
    cases = data_case.usable_cases(scan, root)
    for problem in scan.problems:
        log.warn(str(problem))
    reading.check_grids(cases)
    if data.split == "official":
        listed = {patient for split in scan.splits for names in split.values() for patient in names}
        if unlisted := sorted({case.patient for case in cases} - listed):
            log.warn(
                f"{len(unlisted)} patients are in none of the official folds of {root}, and are not used: "
                f"{shorten(unlisted)}"
            )
    elif scan.splits:
        log.say(
            f"split      random, into config.data.folds folds; --config.data.split=official uses the folds in {root}"
        )
    return cases, scan.splits


def split_found_cases(
    data: Any, seed: int, cases: list[Case], official: Sequence[Mapping[str, Sequence[str]]]
) -> tuple[list[Case], list[Case]]:
    """Return the training cases (``data.train_patients`` is not applied) and the validation cases.

    Args:
        data: The ``data`` section of a config.
        seed: Seed of the run.
        cases: The cases, see `find_cases`.
        official: The official folds.

    Raises:
        UserError: The fold does not exist, or there are too few patients.
    """
    if data.split == "official":
        return official_split(cases, official, data.fold)
    return split_cases(cases, fold=data.fold, folds=data.folds, seed=seed)


def _annotations(dataset: Dataset, output: Output, cases: list[Case]) -> dict[str, dict[str, np.ndarray]]:
    """Return the annotated channels and regions of each case; empty if all regions are annotated in all cases."""
    if dataset.annotated is None:
        return {}
    facts = {}
    for case in cases:
        shown = dataset.annotated(case)
        facts[case.case_id] = {
            "annotated": output.annotated_channels(shown),
            "annotated_regions": np.array([name in shown for name in dataset.regions.names]),
        }
    return facts


def _prepare(data: Any, dataset: Dataset, root: Path, cases: list[Case]) -> list[store.Entry]:
    """Prepare cases, unless they are in the store already. Several processes divide the work among themselves."""
    folder = data.store or store.default_folder(root)
    settings = Preparation.from_config(data.prepare)
    index, count = jax.process_index(), jax.process_count()
    if count > 1:
        store.prepare_cases(dataset, cases[index::count], settings, folder, jobs=data.threads)
        mesh.barrier("prepared")
    entries = store.prepare_cases(
        dataset, cases, settings, folder, jobs=data.threads, say=log.say, progress=log.progress_bar("prepare")
    )
    store.describe_cases(entries, dataset, settings)
    return entries


def _check_description(workdir: Path, root: Path, dataset: Dataset) -> None:
    """Raise UserError if the data of a started run have other channels, labels, regions or annotations than before."""
    path = workdir / DATA_FILE
    if not path.exists():
        return
    before, now = data_case.meaning(read_json(path)), data_case.meaning(data_case.describe(dataset))
    if changed := [key for key, value in now.items() if value != before[key]]:
        values = "; ".join(f"{key} {str(before[key])[:200]} before, {str(now[key])[:200]} now" for key in changed)
        raise UserError(
            f"the run in {workdir} was started with other {', '.join(changed)} than those of {root} ({values}). "
            "Restore the description of the data to resume the run, or give another --workdir"
        )


def _record_split(workdir: Path, root: Path, train: list[Case], validation: list[Case], *, started: bool) -> None:
    """Write ``split.json``. Raises UserError if the run has ``started`` with another split."""
    sides = {"train": train, "validation": validation}
    split: dict[str, Any] = {"root": str(root.absolute())}
    split |= {side: [case.case_id for case in cases] for side, cases in sides.items()}
    split["patients"] = {case.case_id: case.patient for case in [*train, *validation]}
    path = workdir / SPLIT_FILE
    if started and path.exists():
        before = read_json(path)
        for side in ("train", "validation"):
            if changed := sorted(set(before[side]) ^ set(split[side])):
                raise UserError(
                    f"the run in {workdir} was started with other {side} cases than those in {root}: {len(changed)} "
                    f"differ ({shorten(changed)}). Restore the data to resume the run, or give another --workdir"
                )
        split["contents"] = before.get("contents", {})
    write_json(path, split)


def _record_contents(workdir: Path, root: Path, entries: Sequence[store.Entry], *, started: bool) -> None:
    """Add digests of the files of all cases to ``split.json``.

    Raises:
        UserError: The run has ``started`` with other contents of these files, such as labels before a correction.
    """
    path = workdir / SPLIT_FILE
    split = read_json(path)
    before = split.get("contents", {}) if started else {}
    now = {entry.case_id: entry.content for entry in entries}
    if changed := sorted(case for case, content in now.items() if before.get(case, content) != content):
        raise UserError(
            f"the run in {workdir} was started before the files of {len(changed)} cases in {root} changed "
            f"({shorten(changed)}). To train on the new files, give another --workdir; to resume, restore the files"
        )
    write_json(path, split | {"contents": now})
