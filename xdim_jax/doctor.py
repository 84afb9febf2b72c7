"""Check this machine: versions, devices, memory, compilation cache, operations, precision, reading, training step.

The result of a check is ok, a warning (everything works, but not as well as it could) or a failure (something does not
work). Warnings and failures are followed by advice. Nothing is downloaded, and only the compilation cache is written.
"""

if __name__ == "__main__":  # this may restart the process, so it comes before the imports, which take seconds
    from xdim_jax.base.huge_pages import prefer_huge_pages

    prefer_huge_pages()

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.files import write_text
from xdim_jax.training.diagnosis import (
    FAILURE,
    Finding,
    cache,
    devices,
    examine,
    memory,
    operations,
    precision,
    reading,
    training_step,
    verdict,
    versions,
)


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    parser = make_parser("xdim_jax.doctor", __doc__ or "", "exit status: 0 no failure, 1 a failure, 2 unusable input")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="also measure how fast the files of this folder are read"
    )
    parser.add_argument(
        "--quick", action="store_true", help="skip the training step, whose compilation takes a minute or two"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all findings to this file; with -, print only JSON")
    options = parser.parse_args(argv)
    checks: list[Callable[[], Finding]] = [versions, devices, memory, cache, operations, precision]
    if options.data is not None:
        checks.append(lambda: reading(options.data))
    if not options.quick:
        checks.append(training_step)
    findings = []
    for finding in examine(checks):
        findings.append(finding)
        if options.json != "-":
            log.say(f"{finding.check:<10} {finding.status:<8} {finding.text}")
            if finding.advice:
                log.say(f"{'':<10} {'':<8} {finding.advice}")
            if len(findings) == len(checks) - 1 and not options.quick:
                log.say("step       ...      compiling takes a minute or two on a CPU; --quick skips this check")
    text = json.dumps({"verdict": verdict(findings), "findings": [dataclasses.asdict(f) for f in findings]}, indent=2)
    if options.json == "-":
        log.write_result(text)
    else:
        log.say(f"verdict    {verdict(findings)}")
        if options.json:
            write_text(Path(options.json), text + "\n")
    return int(any(f.status == FAILURE for f in findings))


def command() -> NoReturn:
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
