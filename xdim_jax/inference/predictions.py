"""Segments cases with a trained network: images in, label maps out on the source grid.

The input is a folder in the layout that the network was trained on (one BraTS case folder too; of nnU-Net's layout, any
folder of images), a folder of DICOM slices, or the files of one case, one per channel (BraTS: in the order flair t1
t1ce t2). Reference labels are not needed. Every case becomes <output>/<case id>.nii.gz with the affine, the header and
the label values of its source; with --probabilities and --uncertainty, <output>/probabilities/<case id>.nii (float32,
channels along the fourth axis) and <output>/uncertainty/<case id>.nii.

Several --workdir, or that of a cross-validation, are an ensemble: probabilities are averaged. Cases that are there
already, of the same networks and settings, are skipped.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import partial_files, read_json, write_json
from xdim_jax.data.case import (
    Case,
    Volume,
    encode_label,
    read_case,
    scan_cases,
    without_label,
)
from xdim_jax.data.images.image import files_of, where
from xdim_jax.data.images.nifti import read_note, write_volume
from xdim_jax.data.images.stream import stream_volume
from xdim_jax.data.prepare import Prepared
from xdim_jax.inference import memory
from xdim_jax.inference.predictor import Predictor
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import environment
from xdim_jax.runs.workdir import SPLIT_FILE, find_members, read_config
from xdim_jax.scoring import results
from xdim_jax.scoring.rules import EXTRA_OUTPUTS


def predict_validation(workdir: Path, output: Path) -> tuple[Path, set[str]]:
    """Predicts the validation cases of a run into a folder; those that are there, of the same weights, are skipped.

    Of a cross-validation, each fold predicts the cases that it did not train on.

    Returns:
        where the references are, and their ids as scoring knows them.

    Raises:
        UserError: the data are not where they were, a case cannot be predicted, or folds lie apart or share cases.
    """
    cache_programs()
    members = find_members([workdir])
    splits = {member: read_json(member / SPLIT_FILE) for member in members}
    roots = {split["root"] for split in splits.values()}
    names = [name for split in splits.values() for name in split["validation"]]
    if len(roots) > 1 or len(set(names)) < len(names):
        what = (
            "validate on the same cases"
            if len(roots) == 1
            else f"have their data in several places: {shorten(sorted(roots))}"
        )
        raise UserError(f"the folds of {workdir} {what}; give the workdir of one")
    configured = read_config(members[0]).data.get("folds", 0)
    if len(members) > 1 and len(members) < configured:
        log.warn(f"{workdir} has {len(members)} of {configured} folds: cases of the others are not scored")
    root = Path(*roots)
    work = [(predictor := Predictor(member), _cases_of(predictor, root, split)) for member, split in splits.items()]
    for predictor, cases in work:
        log.say(f"weights    {predictor.sources[0]}")
        todo = claim_output(output, predictor, cases, cases, replace=True)
        if failures := predict_cases(predictor, todo, output):
            raise UserError(f"{len(failures)} of {len(cases)} cases cannot be predicted: {shorten(failures)}")
    labels = root / "labelsTr"  # of nnU-Net's layout, whose images are beside them
    return labels if labels.is_dir() else root, {name.removesuffix("_in") for name in names}


def _cases_of(predictor: Predictor, root: Path, split: Mapping[str, Any]) -> list[Case]:
    """The validation cases of a split."""
    found = {c.case_id: c for c in scan_cases(predictor.dataset, root, need_labels=True).cases}
    if absent := [name for name in split["validation"] if name not in found]:
        raise UserError(
            f"{root} lacks {len(absent)} of the run's {len(split['validation'])} validation cases: {shorten(absent)}"
        )
    return [found[name] for name in split["validation"]]


# -- what is there ------------------------------------------------------------------------------------------------


def claim_output(
    output: Path,
    predictor: Predictor,
    mine: Sequence[Case],
    every: Sequence[Case],
    *,
    overwrite: bool = False,
    replace: bool = False,
) -> list[Case]:
    """Writes the record of what predicts what; returns the cases that are not there yet, whose old files are removed.

    Every file says in its header what it was made of (see `note_of`), so that nothing stale is taken for done, however
    an earlier run ended and whichever host made it.

    Args:
        output: the folder.
        predictor: what predicts.
        mine: what this process is to predict.
        every: what all processes are, for the record.
        overwrite: whatever is there counts for nothing.
        replace: what other networks or settings made counts for nothing.

    Raises:
        UserError: the folder holds predictions of other networks or settings.
    """
    paths = {case.case_id: _files(output, predictor, case.case_id) for case in mine}
    notes = {case.case_id: {read_note(path) for path in paths[case.case_id]} for case in mine}
    ours = f"{_MARK} {predictor.digest} "
    others = [
        name for name, found in notes.items() if any(n.startswith(_MARK) and not n.startswith(ours) for n in found)
    ]
    if others and not (overwrite or replace):
        raise UserError(
            f"{output} holds predictions of other networks or settings ({shorten(others)}); give another --output, or "
            "--overwrite"
        )
    todo = [case for case in mine if overwrite or notes[case.case_id] != {note_of(predictor, case)}]
    path = output / results.PREDICT_FILE
    known = read_json(path) if path.is_file() else {}
    images, made_by = (dict(known.get(k, {})) if isinstance(known, dict) else {} for k in ("images", "made_by"))
    record = {
        "workdirs": [str(w.absolute()) for w in predictor.workdirs],
        "weights": predictor.sources,
        "digest": predictor.digest,
        "convention": predictor.dataset.labels.name,
        "predict": predictor.config.predict.to_dict(),
        "settings": dataclasses.asdict(predictor.settings),
        "environment": environment.describe(),
        "made_by": made_by | {c.case_id: predictor.sources for c in every},
        "images": images | {c.case_id: [str(where(s).absolute()) for s in c.images] for c in every},
    }
    write_json(path, record)
    for case in todo:
        remove_prediction(output, case.case_id)
    return todo


_MARK = "xdim_jax"


def note_of(predictor: Predictor, case: Case) -> str:
    """What a prediction was made of: networks and settings, and names, sizes and times of the images."""
    facts = [
        (p.name, s.st_size, s.st_mtime_ns) if (s := _stat(p)) else p.name
        for source in case.images
        for p in files_of(source)
    ]
    return f"{_MARK} {predictor.digest} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def _files(output: Path, predictor: Predictor, case_id: str) -> list[Path]:
    """What is written for a case."""
    wanted = sorted(predictor.segmenter.want)
    return [output / f"{case_id}.nii.gz", *(output / name / f"{case_id}.nii" for name in wanted)]


def _stat(path: Path) -> Any:
    try:
        return path.stat()
    except OSError:
        return None


def remove_prediction(output: Path, case_id: str) -> None:
    """What an earlier run left of a case, also one that was killed while it wrote."""
    for path in (output / f"{case_id}.nii.gz", *(output / name / f"{case_id}.nii" for name in EXTRA_OUTPUTS)):
        path.unlink(missing_ok=True)
        for partial in partial_files(path):
            partial.unlink(missing_ok=True)


# -- the work -----------------------------------------------------------------------------------------------------


def predict_cases(predictor: Predictor, cases: Sequence[Case], output: Path) -> list[str]:
    """Predicts and writes cases; while one is predicted the next is read and the last is written.

    Returns:
        the cases that failed, each with a warning; whatever goes wrong with one does not stop the others.
    """
    failures: list[str] = []
    memory.say_needs(predictor, cases)

    def failed(case: Case, error: Exception) -> None:
        failures.append(case.case_id)
        remove_prediction(output, case.case_id)
        log.warn(f"case {case.case_id} left out: {_reason(error)}")

    def finish(writing: list[tuple[Case, concurrent.futures.Future[str]]]) -> None:
        while writing:
            case, future = writing.pop()
            try:
                log.say(future.result())
            except Exception as error:  # the write of that case
                failed(case, error)

    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
        tqdm(total=len(cases), unit="case", disable=None if len(cases) > 1 else True) as bar,
    ):
        ahead = reader.submit(_read, predictor, cases[0]) if cases else None
        writing: list[tuple[Case, concurrent.futures.Future[str]]] = []
        for number, case in enumerate(cases, 1):
            begin = time.monotonic()
            assert ahead is not None
            reading, ahead = ahead, reader.submit(_read, predictor, cases[number]) if number < len(cases) else None
            try:
                prepared, volume = reading.result()
                note = note_of(predictor, case)
                with _sink(predictor, volume, output, case.case_id, note) as sink:
                    label = predictor.segment(prepared, sink)
                finish(writing)
                title = f"case {number}/{len(cases)}"
                writing.append((case, writer.submit(_write, output, case, label, volume, note, title, begin)))
            except Exception as error:  # damaged files, memory, a device that refuses: of this case alone
                failed(case, error)
            bar.update()
        finish(writing)
    return failures


def _write(output: Path, case: Case, label: np.ndarray, volume: Volume, note: str, title: str, begin: float) -> str:
    path = output / f"{case.case_id}.nii.gz"
    write_volume(path, encode_label(case, label), volume.grid, note)
    return f"{title} {path}  {time.monotonic() - begin:.1f} s"


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    first = (str(error).splitlines() or [""])[0][:200]
    full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first
    hint = "; give --batch=1, --precision=bfloat16 or --preset=fast" if full else ""
    return f"{type(error).__name__}: {first}{hint}"


def _read(predictor: Predictor, case: Case) -> tuple[Prepared, Volume]:
    """A case as the networks see it; of the source only what writing needs is kept."""
    volume = read_case(without_label(case))
    prepared = predictor.prepare(case, volume)
    return prepared, dataclasses.replace(volume, image=np.zeros((0, 0, 0, 0), np.float32))


@contextlib.contextmanager
def _sink(predictor: Predictor, volume: Volume, output: Path, case_id: str, note: str) -> Iterator[Any]:
    """Writes probabilities and uncertainty as they come; None where neither is wanted."""
    with contextlib.ExitStack() as stack:
        files = {}
        for name in sorted(predictor.segmenter.want):
            channels = len(predictor.names) if name == "probabilities" else 0
            path = output / name / f"{case_id}.nii"
            files[name] = stack.enter_context(stream_volume(path, volume.grid, channels, note))

        def keep(rows: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
            for name, part in values.items():
                files[name]((rows, *box), part)

        yield keep if files else None
