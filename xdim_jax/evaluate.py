"""Scores label maps against references by the rules of BraTS 2022.

Dice, HD95 (voxels), sensitivity and specificity of WT, TC and ET per case, and their mean, sd, median and quartiles.
Writes to --out: cases.csv (case_id,structure,metric,value), summary.json and evaluate.json (what was compared).
"""

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from xdim_jax import cli, log, metrics, results
from xdim_jax.data.image import read_volume
from xdim_jax.errors import UserError, join_problems, shorten
from xdim_jax.files import write_json

_SUFFIXES = (".nii.gz", ".nii")
_LABEL_ENDINGS = ("_seg", "-seg")
_MODALITIES = tuple(f"{s}{m}" for s in "_-" for m in ("flair", "t1", "t1ce", "t2", "t2f", "t1n", "t1c", "t2w"))
_AFFINE_TOLERANCE = 1e-2  # mm
_LABEL_TOLERANCE = 1e-3  # copies exist whose labels are floats, off by rounding


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = cli.make_parser("xdim_jax.evaluate", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument("--pred", required=True, type=Path, help="folder of label maps, <case id>.nii.gz")
    parser.add_argument(
        "--ref",
        required=True,
        type=Path,
        help="folder of references: <case id>/<case id>_seg.nii.gz, or <case id>.nii.gz",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the results; made if it does not exist")
    parser.add_argument(
        "--rules", choices=["brats2022"], default="brats2022", help="of the challenge (default %(default)s)"
    )
    parser.add_argument(
        "--convention",
        choices=sorted(metrics.BRATS_REGIONS),
        default="brats2021",
        help="label values of both folders: ET is 4 in brats2021, 3 in brats2023 (default %(default)s)",
    )
    parser.add_argument(
        "--missing",
        choices=["error", "penalise"],
        default="error",
        help="a reference whose prediction is missing or unreadable: stop, or score it as the platform does "
        "(Dice 0, HD95 374, sensitivity 0, specificity 0) (default %(default)s)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(argv)

    predictions, references = find_labels(options.pred), find_labels(options.ref)
    common = sorted(references)
    missing = [case for case in common if case not in predictions]
    if missing and options.missing == "error":
        raise UserError(
            f"{len(missing)} of {len(common)} references in {options.ref} have no prediction in {options.pred}: "
            f"{shorten(missing)}. Predict them, or give --missing=penalise to score them 0"
        )
    surplus = sorted(predictions.keys() - references.keys())
    if surplus:
        log.warn(f"{len(surplus)} predictions without a reference are left out: {shorten(surplus)}")

    score = functools.partial(score_case, convention=options.convention)
    pairs = [(predictions.get(case), references[case]) for case in common]
    workers, context = max(min(options.jobs, len(pairs)), 1), multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        outcomes = list(pool.map(score, *zip(*pairs, strict=True)))
    problems = [problem for _, problem in outcomes if problem]
    unreadable = [case for case, (_, problem) in zip(common, outcomes, strict=True) if problem]
    if problems and options.missing == "error":
        raise join_problems(problems, "cases that cannot be scored")
    for problem in problems:
        log.warn(f"{problem}: scored as unreadable")

    scores: results.Scores = {case: result for case, (result, _) in zip(common, outcomes, strict=True)}
    summary = results.summarise(scores, rules=options.rules, convention=options.convention)
    summary["unreadable"] = unreadable
    record = {
        **{key: str(value.absolute()) for key, value in vars(options).items() if isinstance(value, Path)},
        "rules": options.rules,
        "convention": options.convention,
        "missing": options.missing,
        "labels": {case: str(references[case].absolute()) for case in common},
    }
    write_json(options.out / results.EVALUATE_FILE, record)
    results.write_cases(options.out / results.CASES_FILE, scores)
    write_json(options.out / results.SUMMARY_FILE, summary)
    for line in results.format_summary(summary):
        log.say(line)
    log.say(f"done       {options.out / results.CASES_FILE} and {results.SUMMARY_FILE}")
    return 0


def find_labels(folder: Path) -> dict[str, Path]:
    """Case id to label file: ``<id>.nii.gz``, ``<id>_seg.nii.gz``, flat or one folder per case.

    Raises:
        UserError: no such folder, no label map in it, or two files for one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of label maps")
    found: dict[str, Path] = {}
    flat = [p for p in sorted(folder.iterdir()) if (stem := _stem(p)) and not stem.endswith(_MODALITIES)]
    nested = [
        p for p in sorted([*folder.glob("*/*"), *folder.glob("*/*/*")]) if (_stem(p) or "").endswith(_LABEL_ENDINGS)
    ]
    for path in [*flat, *nested]:
        case = _stem(path) or ""
        for ending in _LABEL_ENDINGS:
            case = case.removesuffix(ending)
        if case in found:
            raise UserError(f"two label maps for case {case}: {found[case]} and {path}; keep one")
        found[case] = path
    if not found:
        raise UserError(f"no label map in {folder}: expected <case id>.nii.gz or <case id>/<case id>_seg.nii.gz")
    return found


def _stem(path: Path) -> str | None:
    if path.name.startswith(".") or not path.is_file():
        return None
    return next((path.name.removesuffix(s) for s in _SUFFIXES if path.name.endswith(s)), None)


def score_case(pred: Path | None, ref: Path, convention: str) -> tuple[dict[str, dict[str, float]], str]:
    """Region to metrics, and what is wrong with the prediction ("" for nothing; then the metrics are the worst ones).

    Raises:
        UserError: the reference cannot be used.
    """
    regions = metrics.BRATS_REGIONS[convention]
    known = {0, *(v for values in regions.values() for v in values)}
    reference, grid = read_volume(ref)
    if unknown := _unknown(reference, known):
        raise UserError(f"{ref} holds label {unknown}; {convention} has only {sorted(known)}")
    worst = {name: dict(metrics.BRATS_UNREADABLE) for name in regions}
    if pred is None:
        return worst, f"no prediction for {ref}"
    try:
        predicted, pred_grid = read_volume(pred)
    except UserError as error:
        return worst, str(error)
    if unknown := _unknown(predicted, known):
        return worst, f"{pred} holds label {unknown}; {convention} has only {sorted(known)}"
    if pred_grid.shape != grid.shape:
        return worst, f"{pred} has shape {pred_grid.shape}, but {ref} has {grid.shape}: resample it to the source grid"
    if not np.allclose(pred_grid.affine, grid.affine, atol=_AFFINE_TOLERANCE):
        return worst, f"{pred} and {ref} have different affines: copy the source's header"
    return metrics.brats2022_case(np.rint(predicted), np.rint(reference), convention), ""


def _unknown(values: np.ndarray, known: set[int]) -> str:
    found = np.unique(values).astype(np.float64)
    unknown = [v for v in found if min(abs(v - k) for k in known) > _LABEL_TOLERANCE or not np.isfinite(v)]
    return shorten([f"{v:g}" for v in unknown])


def command() -> NoReturn:
    """The console entry point."""
    cli.run(main)


if __name__ == "__main__":
    command()
