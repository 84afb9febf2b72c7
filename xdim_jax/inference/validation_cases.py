"""Prediction of the validation cases of a run or a cross-validation."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import atomic_path, read_json, write_json
from xdim_jax.data.case import Case, Dataset, scan_cases
from xdim_jax.data.images.image import read_grid
from xdim_jax.data.images.nifti import read_note, write_volume
from xdim_jax.data.reading import read_label
from xdim_jax.inference.folder import claim_output, is_replaceable, make_note
from xdim_jax.inference.predict_cases import predict_cases
from xdim_jax.inference.predictor import Predictor
from xdim_jax.inference.settings import Settings
from xdim_jax.runs.workdir import PREDICTIONS_FOLDER, SPLIT_FILE, find_members, read_config

# folder next to that of the predictions, for the references of a table; its dataset.json lists the files written there
REFERENCES_FOLDER = "evaluation_references"
_WRITTEN = "written_by_xdim_jax"


def predict_validation(workdir: Path, output: Path, settings: Settings | None = None) -> tuple[Path, set[str]]:
    """Predict the validation cases of a run into a folder. Predictions that are up to date are kept.

    Label maps that training has kept from its best validation are copied if they are up to date. In a cross-validation,
    each fold predicts the cases on which it was not trained.

    Args:
        workdir: Workdir of a run or a cross-validation.
        output: Folder for the predictions.
        settings: Settings of the prediction; None for the defaults.

    Returns:
        The folder of the references, and the ids of the validation cases for scoring. With
        ``data.phase=each`` of CHAOS, only the in-phase cases of T1-DUAL are scored, without the ending ``_in`` of their
        ids, because both phases have the same reference.

    Raises:
        UserError: The data have been moved, a case cannot be predicted, the folds use different data folders, or two
            folds have the same validation cases.
    """
    work, root = find_validation(workdir, settings)
    for predictor, cases in work:
        log.say(f"weights    {predictor.sources[0]}")
        _copy_predictions(predictor.workdirs[0] / PREDICTIONS_FOLDER, output, predictor, cases)
        todo = claim_output(output, predictor, cases, cases, replace=True)
        if len(todo) < len(cases):
            log.say(f"skipped    {len(cases) - len(todo)} of {len(cases)} cases, whose predictions are up to date")
        if failures := predict_cases(predictor, todo, output):
            raise UserError(f"{len(failures)} of {len(cases)} cases cannot be predicted: {shorten(failures)}")
    names = {case.case_id for _, cases in work for case in cases}
    if work[0][0].dataset.name == "table":
        folder = output.parent / REFERENCES_FOLDER
        _write_references(folder, work[0][0].dataset, [case for _, cases in work for case in cases])
        return folder, names
    if read_config(work[0][0].workdirs[0]).data.dataset == "chaos":
        # with data.phase=each, both phases are predicted; that of the in-phase image is scored, as in the challenge
        names = {name.removesuffix("_in") for name in names if not name.endswith("_out")}
    labels = root / "labelsTr"  # folder of the references in nnU-Net's layout
    return labels if labels.is_dir() else root, names


def _write_references(folder: Path, dataset: Dataset, cases: Sequence[Case]) -> None:
    """Write the references of a ``table`` data set, whose files can have any name and format, as ``<case id>.nii.gz``.

    A JSON file describes them.

    References of an earlier call are deleted. Other files are never deleted.

    Raises:
        UserError: The folder contains files that this function did not write.
    """
    path = folder / "dataset.json"
    written = set(_written_references(path))
    own = {*written, path.name} if written else set()
    if others := sorted(p.name for p in folder.glob("*") if p.name not in own and not p.name.startswith(".")):
        raise UserError(
            f"{folder} contains files that xdim_jax did not write there ({shorten(others)}): expected a folder for the "
            "references of the evaluation; move these files to another folder"
        )
    labels = dataset.labels
    values = {name: [labels.values[i] for i in sorted(indices)] for name, indices in dataset.regions.sets.items()}
    described: dict[str, Any] = {"labels": {"background": 0, **values}}
    if labels.ignore is not None:
        described["labels"]["ignore"] = labels.ignore
    if dataset.partly_annotated:
        described["annotated"] = {case: list(names) for case, names in dataset.partly_annotated.items()}
    files = {f"{case.case_id}.nii.gz" for case in cases}
    # before the label maps, so that a killed process leaves no file that is not listed
    write_json(path, described | {_WRITTEN: sorted(files | written)})
    for name in written - files:
        (folder / name).unlink(missing_ok=True)
    for case in cases:
        values = labels.encode(read_label(case))
        write_volume(folder / f"{case.case_id}.nii.gz", values, read_grid(case.images[0], case.axes))


def _written_references(path: Path) -> list[str]:
    """Return the names of the files that `_write_references` has written, as listed in its JSON file."""
    known = read_json(path) if path.is_file() else {}
    return known.get(_WRITTEN, []) if isinstance(known, dict) else []


def find_validation(workdir: Path, settings: Settings | None = None) -> tuple[list[tuple[Predictor, list[Case]]], Path]:
    """Return the predictor and the validation cases of every fold, and the folder of the data.

    See `predict_validation` for the arguments and errors.
    """
    members = find_members([workdir])
    splits = {member: read_json(member / SPLIT_FILE) for member in members}
    names = [name for split in splits.values() for name in split["validation"]]
    root = _common_root(workdir, splits)
    if len(set(names)) < len(names):
        raise UserError(f"the folds of {workdir} validate on the same cases; give the workdir of one fold")
    folds = read_config(members[0]).data.get("folds", 0)
    if 1 < len(members) < folds:
        log.warn(f"{workdir} has {len(members)} of {folds} folds; the validation cases of the others are not scored")
    work = []
    for member, split in splits.items():  # all data are checked before the first case is predicted
        predictor = Predictor(member, settings)
        work.append((predictor, _find_validation_cases(predictor, root, split)))
    return work, root


def _copy_predictions(folder: Path, output: Path, predictor: Predictor, cases: Sequence[Case]) -> None:
    """Copy the predictions of training that are up to date, unless they are already in the output folder.

    Files of the output folder that are not predictions are kept; `claim_output` refuses them.
    """
    if folder.resolve() == output.resolve():
        return
    for case in cases:
        source, target = folder / f"{case.case_id}.nii.gz", output / f"{case.case_id}.nii.gz"
        note = make_note(predictor.digest, case)
        if read_note(source) == note != read_note(target) and is_replaceable(target):
            with atomic_path(target) as temporary:
                shutil.copyfile(source, temporary)


def _common_root(workdir: Path, splits: Mapping[Path, Mapping[str, Any]]) -> Path:
    """Return the data folder of all folds. Raises UserError if they have different folders."""
    roots = sorted({split["root"] for split in splits.values()})
    if len(roots) > 1:
        raise UserError(f"the folds of {workdir} have their data in {shorten(roots)}; give the workdir of one fold")
    return Path(roots[0])


def _find_validation_cases(predictor: Predictor, root: Path, split: Mapping[str, Any]) -> list[Case]:
    """Return the validation cases of a split."""
    found = {c.case_id: c for c in scan_cases(predictor.dataset, root, need_labels=True).cases}
    if absent := [name for name in split["validation"] if name not in found]:
        raise UserError(
            f"{root} lacks {len(absent)} of the run's {len(split['validation'])} validation cases: {shorten(absent)}"
        )
    return [found[name] for name in split["validation"]]
