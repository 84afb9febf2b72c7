"""The output folder of a prediction: its record, and which of its files are up to date."""

import contextlib
import dataclasses
import filecmp
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, join_problems, shorten
from xdim_jax.base.files import partial_files, read_json, write_json
from xdim_jax.base.lock import LOCK_FILE, lock_file
from xdim_jax.data.case import Case
from xdim_jax.data.images.image import files_of, source_from_json, source_to_json
from xdim_jax.data.images.nifti import read_note
from xdim_jax.inference.inputs import PREDICTION_MARK, is_prediction
from xdim_jax.inference.predictor import Predictor
from xdim_jax.runs import environment
from xdim_jax.scoring import results
from xdim_jax.scoring.rules import EXTRA_OUTPUTS


def claim_output(
    output: Path,
    predictor: Predictor,
    own_cases: Sequence[Case],
    all_cases: Sequence[Case],
    *,
    overwrite: bool = False,
    replace: bool = False,
) -> list[Case]:
    """Write the record of a prediction, and delete outdated files of the cases that must be predicted.

    Every output file has a note in its header, see `make_note`. A case is up to date if all its files exist and have
    the note of the current networks, settings and images, no matter which process has written them.

    Args:
        output: The output folder.
        predictor: The networks and settings.
        own_cases: Cases that this process predicts.
        all_cases: Cases that all processes predict, for the record.
        overwrite: True to predict all cases again.
        replace: True to replace predictions of other networks, settings or images.

    Returns:
        The cases that must be predicted.

    Raises:
        UserError: The folder contains predictions of other networks or settings, and neither ``overwrite`` nor
            ``replace`` is set; or files of the same name that are not predictions; or, unless ``replace`` is set,
            predictions of other images.
    """
    notes = {c.case_id: {read_note(path) for path in expected_files(output, predictor, c.case_id)} for c in own_cases}
    prefix = f"{PREDICTION_MARK} {predictor.digest} "
    others = [
        name
        for name, found in notes.items()
        if any(n.startswith(PREDICTION_MARK) and not n.startswith(prefix) for n in found)
    ]
    if others and not (overwrite or replace):
        raise UserError(
            f"{output} contains predictions of other networks or settings ({shorten(others)}); give another --output, "
            "or --overwrite"
        )
    todo = [case for case in own_cases if overwrite or notes[case.case_id] != {make_note(predictor.digest, case)}]
    _check_replaced(output, predictor, all_cases, replace=replace)
    _write_record(output / results.PREDICT_FILE, predictor, all_cases)
    for case in todo:
        others = () if overwrite else tuple(name for name in EXTRA_OUTPUTS if name not in predictor.extra_outputs)
        remove_prediction(output, case.case_id, keep=others, note=make_note(predictor.digest, case))
    return todo


def expected_files(output: Path, predictor: Predictor, case_id: str) -> list[Path]:
    """Return the label map of a case, and its files of probabilities and uncertainty if the predictor writes them."""
    compressed = predictor.settings.compress
    extra = [extra_file(output, name, case_id, compressed=compressed) for name in sorted(predictor.extra_outputs)]
    return [output / f"{case_id}.nii.gz", *extra]


def _check_replaced(output: Path, predictor: Predictor, cases: Sequence[Case], *, replace: bool) -> None:
    """Raise UserError if cases would replace files that are not predictions.

    Predictions of other images are refused as well, unless ``replace`` is set.
    """
    recorded = _recorded_images(output)
    problems = []
    for case in cases:
        path, *extra = expected_files(output, predictor, case.case_id)
        note, own_note = read_note(path), make_note(predictor.digest, case)
        images = [source_to_json(source) for source in case.images]
        if others := [str(file) for file in (path, *extra) if not is_replaceable(file)]:
            problems.append(
                f"{shorten(others)}: exists, but is not a prediction of xdim_jax; move it to another folder"
            )
            continue
        known = recorded.get(case.case_id)
        if replace or not note:
            continue
        if note.split()[-1] == own_note.split()[-1] and (known is None or _same_content(known, images)):
            continue
        if known is None or (known != images and not _same_paths(known, images)):
            source = _shown(known) if known else f"other images, which {results.PREDICT_FILE} does not list"
            problems.append(
                f"{path} is the prediction of {source}; the prediction of {_shown(images)} would replace it. Give "
                "another --output, or delete the file"
            )
    if problems:
        raise join_problems(problems, "predictions would be lost")


def is_replaceable(path: Path) -> bool:
    """Return False if a file exists that is not a prediction of this package; an empty file can be replaced."""
    return not path.exists() or not path.stat().st_size or is_prediction(path)


def _recorded_images(output: Path) -> dict[str, Any]:
    """Return case id -> images from ``predict.json``; empty if there is no such file."""
    record = output / results.PREDICT_FILE
    known = read_json(record) if record.is_file() else {}
    return dict(known.get("images", {})) if isinstance(known, dict) else {}


def _files(value: Any) -> list[Path]:
    """Return the files of a recorded image; a folder stands for its DICOM files."""
    return list(files_of(source_from_json(value)))


def _same_paths(recorded: Sequence[Any], images: Sequence[Any]) -> bool:
    """Return whether two lists of images name the same files.

    A series to which slices were added, or from which some were removed, is the same series.
    """
    a, b = ({path.resolve() for value in values for path in _files(value)} for values in (recorded, images))
    return bool(a & b) and (a <= b or b <= a)


def _same_content(recorded: Sequence[Any], images: Sequence[Any]) -> bool:
    """Return whether images whose names, sizes and times are equal are the same: False if their contents differ.

    Recorded files that do not exist have been moved, and count as the same.
    """
    pairs = zip(
        (path for value in recorded for path in _files(value)),
        (path for value in images for path in _files(value)),
        strict=False,
    )
    return all(
        a.resolve() == b.resolve() or not (a.is_file() and b.is_file()) or filecmp.cmp(a, b, shallow=False)
        for a, b in pairs
    )


def _shown(images: Sequence[Any]) -> str:
    """Return the path of the first image; of a series, its folder."""
    return str(Path(images[0][0]).parent if isinstance(images[0], list) else images[0])


def make_note(digest: str, case: Case) -> str:
    """Return a text that identifies the networks, the settings, and the case.

    The case is identified by the names, sizes and times of its image files, the label values that are written, the
    orientation in which it is read, and its modality.

    Args:
        digest: Digest of networks and settings, see `xdim_jax.inference.group.weights_digest`.
        case: The case.
    """
    files = [_identify(path) for source in case.images for path in files_of(source)]
    facts = [files, case.labels.to_json(), case.axes, case.info.get("modality", "")]
    return f"{PREDICTION_MARK} {digest} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def remove_outdated(output: Path, case_id: str, inputs: Sequence[Path]) -> None:
    """Delete an earlier prediction of a case that now cannot be predicted, so that it is not mistaken for a new one.

    A file that is not a prediction, or is the prediction of an image outside of ``inputs``, is kept, with a warning.
    """
    path = output / f"{case_id}.nii.gz"
    if path.exists() and path.stat().st_size:
        below = [folder.resolve() for folder in inputs]
        files = [f.resolve() for value in _recorded_images(output).get(case_id, []) for f in _files(value)]
        own = bool(files) and all(set(below) & {f, *f.parents} for f in files)
        if not is_prediction(path) or not own:
            log.warn(f"{path} is kept, because it is not a prediction of this input")
            return
    remove_prediction(output, case_id)


def remove_prediction(output: Path, case_id: str, keep: Sequence[str] = (), note: str = "") -> None:
    """Delete all predictions of a case, including partial files of a run that was killed while it wrote them.

    Args:
        output: The output folder.
        case_id: The case.
        keep: Names of extra outputs whose files are kept if they have the note ``note``.
        note: See `make_note`.
    """
    kept = {extra_file(output, name, case_id, compressed=c) for name in keep for c in (False, True)}
    for path in (output / f"{case_id}.nii.gz", *_extra_files(output, case_id)):
        if is_replaceable(path) and (path not in kept or read_note(path) != note):
            path.unlink(missing_ok=True)
        for partial in partial_files(path):
            partial.unlink(missing_ok=True)


def extra_file(output: Path, name: str, case_id: str, *, compressed: bool) -> Path:
    """Return the file of the probabilities or the uncertainty (``name``) of a case."""
    return output / name / f"{case_id}{'.nii.gz' if compressed else '.nii'}"


def _extra_files(output: Path, case_id: str) -> list[Path]:
    """Return the files of all extra outputs that a case may have."""
    return [extra_file(output, name, case_id, compressed=c) for name in EXTRA_OUTPUTS for c in (False, True)]


def _identify(path: Path) -> tuple[str, int, int] | str:
    """Return name, size and time of a file, or only its name if it cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return path.name
    return path.name, found.st_size, found.st_mtime_ns


def _write_record(path: Path, predictor: Predictor, cases: Sequence[Case]) -> None:
    """Write predict.json: networks and settings, and for each case the networks and images.

    The entries of other cases are kept, also those that another process writes at the same time.
    """
    with lock_file(path.with_name(f".{path.name}{LOCK_FILE}"), path) or contextlib.nullcontext():
        known = read_json(path) if path.is_file() else {}
        images, made_by = (dict(known.get(k, {})) if isinstance(known, dict) else {} for k in ("images", "made_by"))
        record = {
            "workdirs": [str(w.absolute()) for w in predictor.workdirs],
            "weights": predictor.sources,
            "digest": predictor.digest,
            "convention": predictor.dataset.labels.name,
            "structures": predictor.output.structure_channels(),
            "predict": predictor.resolved.predict,
            "settings": dataclasses.asdict(predictor.settings),
            "environment": environment.describe(),
            "made_by": made_by | {c.case_id: predictor.sources for c in cases},
            "images": images | {c.case_id: [source_to_json(s) for s in c.images] for c in cases},
        }
        write_json(path, record)
