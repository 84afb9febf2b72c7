"""Compares two evaluations case by case: mean difference with its 95 % confidence interval (paired bootstrap over
patients), and Wilcoxon's signed-rank test with Holm's correction over all structures and metrics shown.

    python -m xdim_jax.compare eval_a eval_b --metrics=dice,hd95 --out=comparison.md
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.errors import UserError, shorten
from xdim_jax.base.files import write_json, write_text
from xdim_jax.scoring import challenges, paired, results
from xdim_jax.scoring.comparison import make_table
from xdim_jax.scoring.rules import Scored


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = make_parser("xdim_jax.compare", __doc__ or "", "exit status: 0 done, 2 unusable input")
    parser.add_argument("a", type=Path, help="folder that xdim_jax.evaluate wrote")
    parser.add_argument("b", type=Path, help="another one, of the same references")
    parser.add_argument("--metrics", default="", help="with commas (default: all; fewer make a milder correction)")
    parser.add_argument("--out", type=Path, help="Markdown file to write; beside it .tex and .json")
    options = parser.parse_args(argv)
    if options.out and options.out.suffix in (".json", ".tex"):
        raise UserError(
            f"--out={options.out}: expected a Markdown file, e.g. comparison.md; .tex and .json come beside it"
        )
    records = [results.read_record(folder) for folder in (options.a, options.b)]
    settings = [{"rules": r["rules"]} | {k: r["options"].get(k) for k in challenges.OPTIONS} for r in records]
    if apart := [k for k in settings[0] if settings[0][k] != settings[1][k]]:
        shown = "; ".join(f"{k}: {settings[0][k]} and {settings[1][k]}" for k in apart)
        raise UserError(f"{options.a} and {options.b} were scored differently ({shown}); evaluate both in the same way")
    sides = [
        results.read_cases(folder / results.CASES_FILE, {c: v["patient"] for c, v in record["cases"].items()})
        for folder, record in zip((options.a, options.b), records, strict=True)
    ]
    sides = [_errors_of_volumes(side) for side in sides]
    moved = [
        case
        for case, v in records[0]["cases"].items()
        if case in records[1]["cases"] and v.get("ref") != records[1]["cases"][case].get("ref")
    ]
    if moved:
        log.warn(
            f"{len(moved)} cases were scored against references in other places ({shorten(moved)}): are they the same?"
        )
    wanted = tuple(m.strip() for m in options.metrics.split(",") if m.strip())
    known = {m for side in sides for case in side for values in case.values.values() for m in values}
    if unknown := set(wanted) - known:
        raise UserError(
            f"--metrics: {', '.join(sorted(unknown))} not in the results; they have {', '.join(sorted(known))}"
        )
    try:
        found = paired.compare(sides[0], sides[1], wanted)
    except ValueError as error:
        raise UserError(f"{options.a} and {options.b}: {error}; evaluate both on the same references") from error
    for side, other, folder in ((*sides, options.a), (*reversed(sides), options.b)):
        if alone := sorted({c.case_id for c in side} - {c.case_id for c in other}):
            log.warn(f"{len(alone)} cases are in {folder} alone, and left out: {shorten(alone)}")
    one, two = ({m for case in side for values in case.values.values() for m in values} for side in sides)
    if only := sorted((one ^ two) & set(wanted or one | two)):
        log.warn(f"scored in one of the two alone, and left out: {', '.join(only)}")
    table = make_table(found, str(options.a), str(options.b))
    for line in table.markdown().splitlines():
        log.say(line)
    if options.out:
        write_text(options.out, table.markdown())
        write_text(options.out.with_suffix(".tex"), table.latex())
        record = {"a": str(options.a.absolute()), "b": str(options.b.absolute())}
        write_json(options.out.with_suffix(".json"), record | {"differences": [dataclasses.asdict(d) for d in found]})
    return 0


def _errors_of_volumes(cases: Sequence[Scored]) -> list[Scored]:
    """Volumes and EF beside those of the reference (``edv``, ``edv_ref``) become errors (``edv_error``)."""
    found = []
    for case in cases:
        values = {}
        for structure, metrics in case.values.items():
            pairs = {m for m in metrics if f"{m}_ref" in metrics}
            references = {f"{m}_ref" for m in pairs}
            kept = {m: v for m, v in metrics.items() if m not in pairs | references}
            errors = {f"{m}_error": abs(metrics[m] - metrics[f"{m}_ref"]) for m in pairs if not m.endswith("_raw")}
            values[structure] = kept | dict(sorted(errors.items()))
        found.append(dataclasses.replace(case, values=values))
    return found


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
