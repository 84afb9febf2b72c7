"""What a recipe needs: memory and floating-point operations of its step and of prediction, before anything runs.

Every combination of the choices given is compiled for the devices that are here, with shapes in place of arrays, so
neither data nor room for the arrays is needed. Memory is what the compiler reserves, per device: state, batch and
temporaries. Operations are those of the mathematics, for all devices together; a multiply-add counts two.

With --parts, a table follows for each choice of what the parts of the network do in a step: operations, and the bytes
that its convolutions and matrix products bring in and out at the least (see `xdim_jax.training.roofline`). With
--ceilings as well, the least time that these take on a device of so many operations and bytes a second.

With --budget, each line says whether it fits; with --largest=patch or --largest=batch as well, the choices are not
listed but searched for the largest that fits.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.files import write_json
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.training.check import resolve_config
from xdim_jax.training.needs import (
    Choice,
    Need,
    format_parts,
    format_rows,
    growing,
    largest,
    measure,
    name_of,
    parse_bytes,
    step_products,
)


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    config = load_config(options.config, overrides)
    config, dataset = resolve_config(config, needs_data=False)
    budget = parse_bytes(options.budget) if options.budget else None
    if options.largest and budget is None:
        raise UserError(f"--largest={options.largest} needs --budget=<memory of a device>, e.g. --budget=16GiB")
    if options.ceilings and not options.parts:
        raise UserError(f"--ceilings={options.ceilings} needs --parts, the table that has the times")
    ceilings = _ceilings(options.ceilings) if options.ceilings else None
    cache_programs()
    patches = [_numbers("--patch", text) for text in options.patch] or [tuple(config.data.patch)]
    batches = _numbers("--batch", options.batch) if options.batch else (config.data.batch,)
    precisions = options.precision.split(",") if options.precision else [config.train.precision]
    remats = options.remat or [config.train.remat]
    choices = [Choice(*c) for c in itertools.product(patches, batches, precisions, remats)]
    device = jax.devices()[0]
    log.say(f"devices    {jax.device_count()} x {device.device_kind} ({device.platform}): numbers are of its programs")
    rows: list[tuple[Choice, Need]] = []
    known: dict[Choice, Need] = {}

    def need(choice: Choice) -> Need:
        if choice not in known:
            known[choice] = measure(config, dataset, choice)
        return known[choice]

    if options.largest and budget is not None:
        for start in dict.fromkeys(_without(c, options.largest) for c in choices):
            log.say(f"search     for the largest {options.largest} in {options.budget}")
            found = largest(
                growing(config, start, options.largest), lambda c: need(c).step_bytes <= budget, say=log.say
            )
            if found is None:
                log.say(f"           nothing fits with {start.precision}, remat {start.remat or 'none'}")
            else:
                rows.append((found, need(found)))
    else:
        rows = [(choice, need(choice)) for choice in choices]
    for line in format_rows(rows, budget):
        log.say(line)
    for choice, _ in rows if options.parts else ():
        log.say(f"parts      {name_of(choice)}")
        for line in format_parts(*step_products(config, dataset, choice), ceilings):
            log.say(line)
    if budget is not None and not options.largest:
        fitting = [c for c, n in rows if n.step_bytes <= budget]
        best = max(fitting, key=lambda c: c.voxels, default=None)
        log.say("largest    " + (name_of(best) if best else "none of them fits") + f" (budget {options.budget})")
    if options.json:
        write_json(options.json, [dataclasses.asdict(c) | dataclasses.asdict(n) for c, n in rows])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "xdim_jax.plan",
        __doc__ or "",
        "exit status: 0 done, 2 unusable input\n\nexamples:\n"
        "  python -m xdim_jax.plan --config=configs/brats_dxnet.py --patch=96,96,96 --patch=128,128,128 \\\n"
        "      --precision=float32,bfloat16 --budget=16GiB\n"
        "  python -m xdim_jax.plan --config=configs/brats_dxnet.py --budget=16GiB --largest=patch",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:WORDS]", help="a recipe, e.g. configs/brats_dxnet.py")
    parser.add_argument("--patch", action="append", default=[], metavar="D,H,W", help="may be given several times")
    parser.add_argument("--batch", metavar="N,N,...", help="samples of all devices together")
    parser.add_argument("--precision", metavar="P,P", help="of float32 and bfloat16")
    parser.add_argument("--remat", action="append", metavar="STAGES", help="see config.train.remat; several times")
    parser.add_argument("--budget", metavar="SIZE", help="memory of a device, e.g. 16GiB")
    parser.add_argument("--largest", choices=("patch", "batch"), help="search for it within the budget")
    parser.add_argument("--parts", action="store_true", help="what the parts of the network do in a step")
    parser.add_argument(
        "--ceilings",
        metavar="TFLOP/S,TB/S",
        help="of a device, e.g. 989,4.8 (H200, bfloat16): least times beside --parts",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return parser


def _without(choice: Choice, what: str) -> Choice:
    """A choice of which only the rest counts."""
    return dataclasses.replace(choice, batch=1) if what == "batch" else choice


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.strip("()").split(",") if word.strip())
    except ValueError as error:
        raise UserError(f"{flag}={text}: expected whole numbers with commas between them") from error
    if not numbers or min(numbers) < 1:
        raise UserError(f"{flag}={text}: expected whole numbers above 0 with commas between them")
    return numbers


def _ceilings(text: str) -> tuple[float, float]:
    """``989,4.8`` to operations and bytes a second."""
    try:
        flops, bandwidth = (1e12 * float(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--ceilings={text}: expected TFLOP/s and TB/s of a device, e.g. 989,4.8 for an H200"
        ) from error
    if not (0 < flops < math.inf and 0 < bandwidth < math.inf):
        raise UserError(f"--ceilings={text}: expected two numbers above 0, e.g. 989,4.8 for an H200")
    return flops, bandwidth


def command() -> NoReturn:
    """The console entry point."""
    run(main)


if __name__ == "__main__":
    command()
