"""Score label maps against references, by the rules of a challenge or by any metrics.

    camus      Dice, MAD, HD (mm) of LV_endo, LV_epi, LA at ED and ES; volumes and EF by Simpson's biplane rule
    chaos      DICE, RAVD, ASSD, MSSD and their scores of 0 to 100, per case, organ and task
    brats2022  Dice, HD95 (voxels), sensitivity, specificity of WT, TC, ET, as on the platform of 2021 and 2022
    brats2023  lesion-wise Dice and HD95 (mm) of WT, TC, ET, and Dice, HD95, sensitivity, specificity of the whole image
    brats2024  lesion-wise Dice, HD95 (mm) and NSD of WT, TC, NETC, SNFH, ET, RC; for glioma after treatment
    generic    any metrics (--metrics) of any two folders of label maps

With --workdir instead of --pred and --ref, the validation cases of a run are predicted into <workdir>/predictions and
scored, by default with the rules of the run's data set. Cases with up-to-date predictions, e.g. those that training
wrote at its best validation, are not predicted again. The default of --out is then <workdir>/evaluation.

The command writes to --out: cases.csv (case_id,...,structure,metric,value), summary.json (means with 95 % confidence
intervals from a bootstrap over patients, quartiles, numbers of empty masks), tables.md and tables.tex (tables of all
metrics; for camus, chaos and brats2022 also the tables of the paper, with the values of the paper and of this
evaluation), and evaluate.json (files and options). With --calibration, it also evaluates the probabilities and
uncertainty maps in --pred, and writes calibration.json. Compare two evaluations with python -m xdim_jax.compare.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import read_json
from xdim_jax.base.host import count_cores
from xdim_jax.base.huge_pages import prefer_huge_pages
from xdim_jax.data.datasets import scoring_rules
from xdim_jax.data.images.names import normalised
from xdim_jax.runs.workdir import PREDICTIONS_FOLDER, SPLIT_FILE, find_members, read_config
from xdim_jax.scoring import challenges, generic
from xdim_jax.scoring.folders import check_small_et_kept, evaluate_folders
from xdim_jax.scoring.masks import METRICS


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    options = _parser().parse_args(argv)
    options.metrics = challenges.parse_metrics(options.metrics)
    if not options.workdir:
        _evaluate(options)
    else:
        with bucket.workdir(options.workdir) as workdir:
            _set_defaults_of_run(options, workdir)
            challenges.check_options(options.rules, options)  # prediction can take hours
            if options.cases:
                _check_cases(_read_cases(options.cases), _validation_cases(workdir))
            from xdim_jax.inference.settings import Settings  # imports JAX, scoring does not need it
            from xdim_jax.inference.validation_cases import predict_validation
            from xdim_jax.ops.compilation import cache_programs

            cache_programs()
            settings = Settings(probabilities=True) if options.calibration else None
            options.ref, cases = predict_validation(workdir, options.pred, settings)
            _evaluate(options, cases, _patients(workdir) if options.rules == "generic" else {})
    return 0


def _splits(workdir: Path) -> list[dict[str, Any]]:
    """Return the recorded split of a run, or those of all folds of a cross-validation."""
    return [read_json(member / SPLIT_FILE) for member in find_members([workdir])]


def _validation_cases(workdir: Path) -> set[str]:
    """Return the ids of the validation cases of a run or a cross-validation."""
    cases = {case for split in _splits(workdir) for case in split["validation"]}
    return cases | {case.removesuffix("_in") for case in cases}  # the phases of CHAOS T1-DUAL are scored as one case


def _check_cases(chosen: set[str], cases: set[str]) -> None:
    """Raise UserError if some of the chosen cases are not validation cases."""
    if absent := sorted(chosen - cases):
        raise UserError(
            f"--cases: {shorten(absent)} are not validation cases of this run; they are {shorten(sorted(cases))}"
        )


def _patients(workdir: Path) -> dict[str, str]:
    """Return case id -> patient for the cases of a run or a cross-validation."""
    return {case: patient for split in _splits(workdir) for case, patient in split.get("patients", {}).items()}


def _evaluate(options: Any, cases: set[str] | None = None, patients: Mapping[str, str] | None = None) -> None:
    """Score the cases with the given ids, or all cases, and write the results."""
    if absent := [f"--{name}" for name in ("rules", "pred", "ref", "out") if getattr(options, name) is None]:
        raise UserError(f"{' and '.join(absent)} missing: give either --rules, --pred, --ref and --out, or --workdir")
    rules = challenges.make_rules(options.rules, options)
    if options.cases:
        chosen = _read_cases(options.cases)
        if cases is not None:
            _check_cases(chosen, cases)
        cases = chosen
    if options.tune_min_et:
        check_small_et_kept(options.pred)
    if options.rules == "generic" and not patients:
        log.say("patients   not known, so every case counts as a patient in confidence intervals and tests")
    evaluate_folders(
        rules,
        options.pred,
        options.ref,
        options.out,
        options=challenges.resolve_options(rules.name, options),
        cases=cases,
        metrics=options.metrics,
        missing=options.missing,
        processes=options.jobs,
        patients=patients,
        calibrated=options.calibration,
    )


def _read_cases(text: str) -> set[str]:
    """Return the case ids in a comma-separated list, or in a file with one id per line."""
    try:
        is_file = os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises OSError for a very long list
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines() if is_file else text.split(",")
    except UnicodeDecodeError as error:
        raise UserError(f"--cases={text} is not a text file; expected one case id per line") from error
    cases = {normalised(line.strip()) for line in lines if line.strip()}
    if not cases:
        raise UserError(f"--cases={text} has no case id; expected case ids, or a file with one per line")
    return cases


def _set_defaults_of_run(options: Any, workdir: Path) -> None:
    """Set the folders, rules and rule options to those of a run. Values that the user gave are kept."""
    if options.pred or options.ref:
        raise UserError("--workdir sets --pred and --ref; give either --workdir, or --pred and --ref")
    config = read_config(find_members([workdir])[0])
    rules, rule_options = scoring_rules(config.data.to_dict())
    options.rules = options.rules or rules
    for key, value in rule_options.items():
        if challenges.accepts(options.rules, key) and not getattr(
            options, key
        ):  # --rules may name rules without this option
            setattr(options, key, value)
    if options.tune_min_et and (minimum := config.predict.get("min_et", 0)):
        raise UserError(
            f"--tune_min_et: this run removes ET of fewer than {minimum} voxels (config.predict.min_et). Predict "
            "with --min_et=0 into another folder, and give it as --pred, with --ref"
        )
    if rules == options.rules == "camus" and "half_sequence" in config.data.instants:
        raise UserError(
            "the rules of CAMUS score ED and ES, but this run predicts half sequences (config.data.instants). Predict "
            "them, copy their references (*_half_sequence_gt) into a folder, and give both folders with --rules=generic"
        )
    options.pred = workdir / PREDICTIONS_FOLDER
    options.out = options.out or workdir / "evaluation"


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser("xdim_jax.evaluate", __doc__ or "", "exit status: 0 done, 2 unusable input")
    add = parser.add_argument
    add("--rules", choices=challenges.NAMES, help="rules of a challenge, or generic")
    add("--pred", type=bucket.local_path, help="folder of predicted label maps")
    add("--ref", type=bucket.local_path, help="folder of references; may be the data set itself")
    add("--workdir", help="workdir of a run or a cross-validation (also gs://, s3://); sets --pred and --ref")
    add("--out", type=bucket.local_path, help="folder for the results, created if it does not exist")
    add(
        "--missing",
        choices=["error", "penalise", "skip"],
        default="error",
        help="what to do if a prediction is missing or cannot be used (unreadable, on another grid, or with unknown "
        "labels): stop with an error, give the case the worst values of the challenge, or omit the case with a warning "
        "(default: %(default)s)",
    )
    add(
        "--cases",
        default="",
        help="ids of the cases to score, separated by commas, or a text file with one id per line; default: all",
    )
    add(
        "--metrics",
        default="",
        help="comma-separated metrics in addition to those of the challenge; for generic, the only metrics (default: "
        f"{','.join(generic.DEFAULT_METRICS)}). Distances are in mm; hd95 and assd mean hd95_pooled and assd_pooled, "
        f"which pool the distances of both directions. Available: {', '.join(METRICS)}",
    )
    add(
        "--calibration",
        action="store_true",
        help="also evaluate the probabilities that predict --probabilities wrote, and the uncertainty maps that "
        "predict --uncertainty wrote, if there are any; with --workdir, the probabilities are predicted",
    )
    add("--jobs", type=int, default=count_cores(), help="number of scoring processes (default: one per core)")
    challenges.add_options(parser)
    return parser


def command() -> NoReturn:
    """Run the console script."""
    if any(word.startswith("--workdir") for word in sys.argv):  # the command uses a network only in this case
        prefer_huge_pages()
    run(main)


if __name__ == "__main__":
    command()
