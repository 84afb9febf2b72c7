"""Looks at this machine: versions, devices, memory, precision, caches, the speed of reading, a training step.

Every line is ok, a warning (it works, but could be better), or a failure (something will not work), the last two with
what to do. Nothing is downloaded, and nothing written but to the compilation cache.
"""

if __name__ == "__main__":  # see xdim_jax/train.py
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
    """The command line, see ``--help``."""
    parser = make_parser(
        "xdim_jax.doctor", __doc__ or "", "exit status: 0 nothing fails, 1 something does, 2 unusable input"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="measure how fast its files are read")
    parser.add_argument(
        "--quick", action="store_true", help="leave out the training step, which must be compiled first"
    )
    parser.add_argument("--json", metavar="FILE", help="write all findings there as well; -: to the terminal, alone")
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
                log.say("step       ...      compiles two programs, a minute or two on a CPU; --quick leaves it out")
    text = json.dumps({"verdict": verdict(findings), "findings": [dataclasses.asdict(f) for f in findings]}, indent=2)
    if options.json == "-":
        print(text)
    else:
        log.say(f"verdict    {verdict(findings)}")
        if options.json:
            write_text(Path(options.json), text + "\n")
    return int(any(f.status == FAILURE for f in findings))


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
