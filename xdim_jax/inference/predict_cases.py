"""Prediction of many cases into a folder. Reading, prediction and writing of consecutive cases are concurrent."""

import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from xdim_jax.base import log
from xdim_jax.base.errors import UserError, first_line, shorten
from xdim_jax.base.files import read_json
from xdim_jax.data.case import Case, Dataset, Volume
from xdim_jax.data.images.nifti import read_note, write_volume
from xdim_jax.data.images.stream import stream_volume
from xdim_jax.data.prepare import Prepared
from xdim_jax.data.reading import encode_label, read_label
from xdim_jax.inference import memory
from xdim_jax.inference.folder import (
    claim_output,
    expected_files,
    extra_file,
    make_note,
    remove_outdated,
    remove_prediction,
)
from xdim_jax.inference.predictor import Predictor, read_image
from xdim_jax.inference.sliding_window import Sink
from xdim_jax.runs import environment
from xdim_jax.runs.workdir import SPLIT_FILE
from xdim_jax.scoring import masks

_MAXIMA = {"probabilities": 1.0, "uncertainty": 0.25}  # largest possible values; 0.25 is the variance of 0 and 1


class _OutputTakenError(UserError):
    """The file of a case belongs to another process, and must be kept."""


def predict_paths(
    predictor: Predictor,
    paths: Sequence[Path],
    output: Path,
    *,
    modality: str = "",
    series: Sequence[str] = (),
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
) -> list[str]:
    """Find the cases in the given paths, and predict those that are not up to date in the output folder.

    Args:
        predictor: The networks and settings.
        paths: A folder of cases, or the files of one case, see `xdim_jax.inference.inputs.find_cases`.
        output: Folder for the predictions.
        modality: CT or MR. Needed if the networks were trained on both and the paths do not specify it.
        series: Names, numbers, descriptions or UIDs of the DICOM series to predict; all series if empty.
        shard: ``(i, n)``: predict every n-th case, starting with case i.
        overwrite: True to predict all cases again.

    Returns:
        The ids of the cases that failed, and the paths of unusable files that belong to no case. Each failure is logged
        with its reason; the other cases are predicted.

    Raises:
        UserError: There is no case, or the output folder contains predictions of other networks or settings.
    """
    cases, problems = predictor.find_cases(paths, modality=modality, series=series, output=output)
    for source in predictor.sources:
        log.say(f"weights    {source}")
    log.say(f"devices    {environment.devices()}")
    for group in predictor.groups:
        log.say(f"predict    {group.describe()}")
    _warn_of_training_cases(predictor, cases)
    first, step = shard
    own_cases = cases[first::step]
    todo = claim_output(output, predictor, own_cases, cases, overwrite=overwrite)
    ids = {case.case_id for case in cases}
    for name, messages in problems.items():
        log.warn(f"case {name} omitted: {'; '.join(messages)}")
        # a case id, not the path of a file that belongs to no case; another file may have the same id and be usable
        if Path(name).name == name and name not in ids:
            remove_outdated(output, name, paths)
    if len(todo) < len(own_cases):
        log.say(f"skipped    {len(own_cases) - len(todo)} of {len(own_cases)} cases, whose predictions are up to date")
    failures = [*problems, *predict_cases(predictor, todo, output)]
    if failures:
        log.warn(f"{len(failures)} of {len(own_cases) + len(problems)} cases failed: {', '.join(failures)}")
    return failures


def predict_cases(predictor: Predictor, cases: Sequence[Case], output: Path) -> list[str]:
    """Predict cases and write them to the output folder.

    While a case is predicted, the next one is read and the previous one is written.

    Returns:
        The ids of the cases that failed. Each failure is logged with its reason; the other cases are predicted.
    """
    failures: list[str] = []
    show = log.progress_bar("predict", lines=False)
    memory.log_required_memory(predictor, cases)

    def fail(case: Case, error: Exception) -> None:
        failures.append(case.case_id)
        if not isinstance(error, _OutputTakenError):
            remove_prediction(output, case.case_id)
        log.warn(f"case {case.case_id} omitted: {_reason(error, predictor)}")

    def wait_for_writer(writing: list[tuple[Case, concurrent.futures.Future[str]]]) -> None:
        while writing:
            case, future = writing.pop()
            try:
                log.say(future.result())
            except Exception as error:
                fail(case, error)

    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
    ):
        reading = reader.submit(_read, predictor, cases[0]) if cases else None
        writing: list[tuple[Case, concurrent.futures.Future[str]]] = []
        for number, case in enumerate(cases, 1):
            begin = time.monotonic()
            assert reading is not None
            current = reading
            reading = reader.submit(_read, predictor, cases[number]) if number < len(cases) else None
            try:
                prepared, volume = current.result()
                note = make_note(predictor.digest, case)
                with _open_sink(predictor, volume, output, case.case_id, note) as sink:
                    label = predictor.segment(prepared, volume.grid, sink)
                    _check_not_taken(expected_files(output, predictor, case.case_id), note)
                wait_for_writer(writing)
                title = f"case {number}/{len(cases)}"
                arguments = (predictor.dataset, output, case, label, volume, note, title, begin)
                writing.append((case, writer.submit(_write, *arguments)))
            except Exception as error:  # a damaged file, lack of memory, or a device error: only this case fails
                fail(case, error)
            show(number, len(cases))
        wait_for_writer(writing)
    return failures


def _warn_of_training_cases(predictor: Predictor, cases: Sequence[Case]) -> None:
    """Warn about cases that were used for training. They are recognised by case id and by the folder of the data."""
    found: set[str] = set()
    for workdir in predictor.workdirs:
        if (workdir / SPLIT_FILE).is_file():
            split = read_json(workdir / SPLIT_FILE)
            names, root = set(split["train"]), Path(split["root"])
            found |= {c.case_id for c in cases if c.case_id in names and root in c.files[0].absolute().parents}
    if found:
        log.warn(
            f"{len(found)} of {len(cases)} cases were used to train these networks ({shorten(sorted(found))}), so "
            "their scores are not those of new patients. python -m xdim_jax.evaluate --workdir=... predicts and scores "
            "the validation cases"
        )


def _read(predictor: Predictor, case: Case) -> tuple[list[Prepared], Volume]:
    """Read and prepare a case, and log warnings about its files.

    To save memory, the returned volume has the grid of the case, but no voxels.
    """
    volume = read_image(case)
    prepared = predictor.prepare(case, volume)
    return prepared, dataclasses.replace(volume, image=np.zeros((0, 0, 0, 0), np.float32))


@contextlib.contextmanager
def _open_sink(predictor: Predictor, volume: Volume, output: Path, case_id: str, note: str) -> Iterator[Sink | None]:
    """Yield a sink that writes the extra outputs of the predictor to files; None if there are none."""
    with contextlib.ExitStack() as stack:
        files = {}
        for name in sorted(predictor.extra_outputs):
            channels = len(predictor.names) if name == "probabilities" else 0
            path = extra_file(output, name, case_id, compressed=predictor.settings.compress)
            writer = stream_volume(path, volume.grid, channels, note, maximum=_MAXIMA[name])
            files[name] = stack.enter_context(writer)

        def write_slices(slices: slice, box: tuple[slice, slice], values: Mapping[str, np.ndarray]) -> None:
            for name, part in values.items():
                files[name]((slices, *box), part)

        yield write_slices if files else None


def _write(
    dataset: Dataset,
    output: Path,
    case: Case,
    label: np.ndarray,
    volume: Volume,
    note: str,
    title: str,
    begin: float,
) -> str:
    """Write a label map, and return a line for the log, with the Dice if the case has a reference."""
    path = output / f"{case.case_id}.nii.gz"
    _check_not_taken([path], note)
    write_volume(path, encode_label(case, label), volume.grid, note)
    return f"{title} {path}  {time.monotonic() - begin:.1f} s{_overlap(dataset, case, label)}"


def _check_not_taken(paths: Sequence[Path], note: str) -> None:
    """Raise _OutputTakenError if one of the output files of a case has appeared since its prediction started."""
    if taken := [str(path) for path in paths if path.exists() and path.stat().st_size and read_note(path) != note]:
        raise _OutputTakenError(
            f"{shorten(taken)}: written by another process while this case was predicted, and kept. Give each process "
            "its own --output"
        )


def _overlap(dataset: Dataset, case: Case, label: np.ndarray) -> str:
    """Return the Dice of every annotated region as text; empty if the case has no reference that can be read."""
    if case.label is None:
        return ""
    try:
        truth = read_label(case)
    except UserError as error:
        log.warn(f"the reference of case {case.case_id} is not compared: {error}")
        return ""
    values = masks.region_dice(dataset, case, label, truth)
    shown = [f"{name} {value:.3f}" for name, value in values.items() if not math.isnan(value)]
    return f"  Dice {', '.join(shown)}" if shown else ""


def _reason(error: Exception, predictor: Predictor) -> str:
    """Return the reason why a case failed, with advice if memory was exhausted."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {first_line(error, 200)}"
    if isinstance(error, MemoryError):
        omit = " without --probabilities and --uncertainty, or" if predictor.extra_outputs else ""
        return f"{text}; the case needs more memory than this machine has: predict it{omit} on a larger machine"
    return f"{text}; try --batch=1, --precision=bfloat16 or --preset=fast" if "RESOURCE_EXHAUSTED" in text else text
