"""Compare two evaluations case by case.

    python -m xdim_jax.compare eval_a eval_b --metrics=dice,hd95 --out=comparison.md

The table has one row for each structure and metric: the mean difference (second minus first evaluation) with its 95 %
confidence interval (paired bootstrap over patients), the p-value of Wilcoxon's signed-rank test over patients, and this
p-value after Holm's correction for all rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xdim_jax.base import log
from xdim_jax.base.bucket import local_path
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import write_json, write_text
from xdim_jax.scoring import challenges, paired, results
from xdim_jax.scoring.challenges import METRIC_ALIASES
from xdim_jax.scoring.comparison import make_table
from xdim_jax.scoring.rules import ScoredCase


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    parser = make_parser("xdim_jax.compare", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument("a", type=local_path, help="output folder of xdim_jax.evaluate")
    parser.add_argument("b", type=local_path, help="output folder of another evaluation, with the same references")
    parser.add_argument(
        "--metrics",
        default="",
        help="comma-separated metrics (default: all); with fewer metrics, Holm's correction is less strict",
    )
    parser.add_argument(
        "--out", type=local_path, help="Markdown file to write; .tex and .json files are written next to it"
    )
    options = parser.parse_args(argv)
    if options.out and options.out.suffix in (".json", ".tex"):
        raise UserError(
            f"--out={options.out}: expected a Markdown file, e.g. comparison.md; .tex and .json files are written next "
            "to it"
        )
    folders = (options.a, options.b)
    records = [results.read_record(folder) for folder in folders]
    _check_same_options(folders, records)
    evaluations = [_read_cases(folder, record) for folder, record in zip(folders, records, strict=True)]
    metrics = _parse_metrics(options.metrics, evaluations)
    try:
        found = paired.compare(evaluations[0], evaluations[1], metrics)
    except ValueError as error:
        raise UserError(f"{options.a} and {options.b}: {error}; evaluate both on the same references") from error
    _warn_about_references(records)
    _warn_about_exclusions(folders, evaluations, metrics)
    single = paired.count_single(evaluations[0], evaluations[1], metrics)
    _warn_about_single_values(folders, single)
    table = make_table(found, str(options.a), str(options.b), single)
    log.write_result(table.markdown().rstrip("\n"))
    if options.out:
        write_text(options.out, table.markdown())
        name = options.out.name.removesuffix(".md")  # another suffix is a part of the name, as in baseline_0.5
        write_text(options.out.with_name(f"{name}.tex"), table.latex())
        record = {"a": str(options.a.absolute()), "b": str(options.b.absolute())}
        write_json(
            options.out.with_name(f"{name}.json"), record | {"differences": [dataclasses.asdict(d) for d in found]}
        )
    return 0


def _check_same_options(folders: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if the two evaluations have different rules, or different options that affect the scores."""
    names = [name for name in challenges.OPTIONS if name not in ("platform_2022", "tune_min_et")]
    a, b = ({"rules": r["rules"]} | {k: _unordered(r["options"].get(k)) for k in names} for r in records)
    if different := [k for k in a if a[k] != b[k]]:
        shown = "; ".join(f"{k}: {a[k]} and {b[k]}" for k in different)
        raise UserError(
            f"{folders[0]} and {folders[1]} were scored with different options ({shown}); evaluate both with the same "
            "options"
        )


def _unordered(value: Any) -> Any:
    """Return the values of an option that can be given several times, sorted and without duplicates."""
    return sorted(set(value)) if isinstance(value, list) else value


def _read_cases(folder: Path, record: Mapping[str, Any]) -> list[ScoredCase]:
    """Return the scored cases of an evaluation. Volumes are replaced by their absolute errors.

    See `_with_volume_errors`.
    """
    patients = {case: entry["patient"] for case, entry in record["cases"].items()}
    return [_with_volume_errors(case) for case in results.read_cases(folder / results.CASES_FILE, patients)]


def _with_volume_errors(case: ScoredCase) -> ScoredCase:
    """Replace a predicted value and its reference value (``edv``, ``edv_ref``) by the absolute error (``edv_error``).

    Unrounded volumes (``edv_raw``) are removed.
    """
    values = {}
    for structure, metrics in case.values.items():
        with_reference = {m for m in metrics if f"{m}_ref" in metrics}
        replaced = with_reference | {f"{m}_ref" for m in with_reference}
        kept = {m: v for m, v in metrics.items() if m not in replaced}
        rounded = sorted(m for m in with_reference if not m.endswith("_raw"))
        values[structure] = kept | {f"{m}_error": abs(metrics[m] - metrics[f"{m}_ref"]) for m in rounded}
    return dataclasses.replace(case, values=values)


def _metrics_of(cases: Sequence[ScoredCase]) -> set[str]:
    """Return the names of all metrics of an evaluation."""
    return {metric for case in cases for values in case.values.values() for metric in values}


def _parse_metrics(text: str, evaluations: Sequence[Sequence[ScoredCase]]) -> tuple[str, ...]:
    """Return the metrics in a comma-separated list. Raises UserError if a metric is in neither of the evaluations."""
    known = set().union(*map(_metrics_of, evaluations))
    names = tuple(m.strip() for m in text.split(",") if m.strip())
    metrics = tuple(name if name in known else METRIC_ALIASES.get(name, name) for name in names)
    if unknown := set(metrics) - known:
        raise UserError(
            f"--metrics: the results have no {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(known))}"
        )
    return metrics


def _warn_about_references(records: Sequence[Mapping[str, Any]]) -> None:
    """Warn if the references of the same cases have different paths."""
    a, b = (record["cases"] for record in records)
    if moved := [case for case, entry in a.items() if case in b and entry.get("ref") != b[case].get("ref")]:
        log.warn(
            f"the references of {len(moved)} cases have different paths in the two evaluations: {shorten(moved)}; "
            "check that they are the same"
        )


def _warn_about_single_values(folders: Sequence[Path], single: Mapping[tuple[str, str], tuple[int, int]]) -> None:
    """Warn about cases with a value of a metric in one of the evaluations only."""
    for index, folder in enumerate(folders):
        counts = [f"{structure} {metric}: {n[index]}" for (structure, metric), n in single.items() if n[index]]
        if counts:
            log.warn(
                f"some cases have a value in {folder} only, for example because the other prediction is empty. They "
                f"are not compared, which can reverse a comparison: {shorten(counts)}. Compare also how often masks "
                "are empty (summary.json of both evaluations)"
            )


def _warn_about_exclusions(
    folders: Sequence[Path], evaluations: Sequence[Sequence[ScoredCase]], metrics: Sequence[str]
) -> None:
    """Warn about cases, structures and metrics that only one of the evaluations has."""
    ids = [{case.case_id for case in evaluation} for evaluation in evaluations]
    for folder, here, other in ((folders[0], ids[0], ids[1]), (folders[1], ids[1], ids[0])):
        if extra := sorted(here - other):
            log.warn(f"{len(extra)} cases are only in {folder} and are excluded: {shorten(extra)}")
    structures = [{name for case in evaluation for name in case.values} for evaluation in evaluations]
    for folder, here, other in ((folders[0], *structures), (folders[1], *structures[::-1])):
        if extra := sorted(here - other):
            log.warn(f"structures that are only in {folder} are excluded: {shorten(extra)}")
    a, b = map(_metrics_of, evaluations)
    if single := sorted((a ^ b) & set(metrics or a | b)):
        log.warn(f"only one of the evaluations has these metrics, which are excluded: {', '.join(single)}")


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
