"""Write a report as one HTML file: scores, training curves, and pictures of cases with their errors.

The tables have the scores of the paper next to those of the evaluation. Pictures show the best case, the 75th
percentile, the median, the 25th percentile and the worst case by mean Dice. Training curves need --workdir.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import bucket, log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import read_json, write_json, write_text
from xdim_jax.pages.report import render, rules_of
from xdim_jax.runs import environment
from xdim_jax.runs.records import read_records
from xdim_jax.runs.workdir import DATA_FILE, find_members, read_config
from xdim_jax.scoring import results
from xdim_jax.scoring.results import number


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    options = _parser().parse_args(argv)
    members = find_members([bucket.fetch(options.workdir)]) if options.workdir else []
    config = read_config(members[0]).to_dict() if members else None
    records = read_records(members[0]) if len(members) == 1 else []
    channels = read_json(members[0] / DATA_FILE)["channels"] if members else []
    summary = read_json(options.eval / results.SUMMARY_FILE)
    evaluation = results.read_record(options.eval)
    if not isinstance(summary, dict) or {"rules", "structures", "groups", "empty", "unreadable"} - summary.keys():
        raise UserError(
            f"{options.eval / results.SUMMARY_FILE} is not the summary of an evaluation; create it with "
            "python -m xdim_jax.evaluate"
        )
    environments = _environments(members[0] if members else None, Path(evaluation["pred"]))
    patients = {case: v["patient"] for case, v in evaluation["cases"].items()}
    scored = results.read_cases(options.eval / results.CASES_FILE, patients)
    calibrated = options.eval / results.CALIBRATION_FILE
    calibration = read_json(calibrated) if calibrated.is_file() else None
    write_text(options.out, render(config, records, channels, summary, scored, evaluation, environments, calibration))
    sources = {
        k: str(v if bucket.is_address(v) else Path(v).absolute()) for k, v in vars(options).items() if v is not None
    }
    write_json(options.out.with_name(f"{options.out.name.removesuffix('.html')}.report.json"), sources)
    log.say(f"report     {options.out.absolute()}")
    columns = rules_of(evaluation).columns
    title = columns["dice"].title if "dice" in columns else "Dice"
    for structure, metrics in summary["structures"].items():
        log.say(f"{title} {structure}    {number(metrics['dice']['mean'], 3) if 'dice' in metrics else '-'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser("xdim_jax.report", __doc__ or "", "Exit status: 0 done; 2 unusable input.")
    parser.add_argument("--workdir", help="workdir of the training run (also gs://, s3://)")
    parser.add_argument("--eval", required=True, type=bucket.local_path, help="output folder of xdim_jax.evaluate")
    parser.add_argument("--out", required=True, type=bucket.local_path, help="HTML file to write")
    return parser


def _environments(workdir: Path | None, pred: Path) -> dict[str, Mapping[str, Any]]:
    """Return the recorded environments of training (at the last start of the run) and of prediction."""
    found: dict[str, Mapping[str, Any]] = {}
    if workdir and (starts := environment.read_starts(workdir)):
        several = f", last of {len(starts)} starts" if len(starts) > 1 else ""
        found[f"training{several}"] = starts[-1]
    record = pred / results.PREDICT_FILE
    try:
        entry = read_json(record).get("environment") if record.is_file() else None
    except (UserError, AttributeError):
        entry = None  # `render` reports a damaged file if it draws a case
    if isinstance(entry, dict):
        found["prediction"] = entry
    return found


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
