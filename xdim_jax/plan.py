"""Report the memory and the floating-point operations that a recipe needs for a training step and for prediction.

Every combination of the given settings is compiled for the devices of this machine. Compilation needs the shapes of the
arrays only, so neither data nor device memory is needed. The memory is the amount that the compiler reserves per device
for state, batch and temporaries. Operations are counted from the definitions of the layers, not from the compiled
program, and summed over all devices. A multiply-add counts as two.

--parts adds a table for each combination: for each part of the network, the operations of a training step, and a lower
bound of the bytes that its convolutions and matrix products read and write. --ceilings adds a column with a lower bound
of the time on a device with the given peak rates.

With --target, programs are compiled for devices that this machine does not have: GPUs (h100, h200, a100, l4, rtx4090;
h100:8 for eight) and TPUs (v5e:2x2, v6e:4x4, v5p:2x2x1, ...). This needs the extra cuda12 or tpu in addition to the CPU
version of JAX, but no driver. The output also lists the kernels that the compiler chose. The default of --budget is
then the memory of the target.

With --budget, the command reports which combinations fit into the memory of a device. --largest=patch or
--largest=batch then searches for the largest one that fits.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax.base import log
from xdim_jax.base.command import make_parser, run
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError, gib
from xdim_jax.base.files import write_json
from xdim_jax.ops.compilation import cache_programs
from xdim_jax.runs import environment
from xdim_jax.training import needs
from xdim_jax.training.absent_devices import describe_kernels, names, open_target
from xdim_jax.training.check import resolve_config


def main(argv: Sequence[str]) -> int:
    """Run the command line, see ``--help``."""
    options, overrides = _parser().parse_known_args(argv)
    if options.full and not options.target:
        raise UserError("--full needs --target: programs for this machine are always optimised")
    config, dataset = resolve_config(load_config(options.config, overrides), needs_data=False)
    target = open_target(options.target) if options.target else None
    if target and not options.budget:
        options.budget = gib(target.memory)
    optimise = options.full or target is None or target.optimised
    budget = needs.parse_bytes(options.budget) if options.budget else None
    if options.largest and budget is None:
        raise UserError(f"--largest={options.largest} needs --budget=<memory of a device>, e.g. --budget=16GiB")
    if options.ceilings and not options.parts:
        raise UserError(f"--ceilings={options.ceilings} needs --parts: it adds a column to the table of the parts")
    ceilings = _ceilings(options.ceilings) if options.ceilings else None
    choices = needs.make_settings(
        config,
        [_numbers("--patch", text) for text in options.patch],
        _numbers("--batch", options.batch) if options.batch else (),
        options.precision.split(",") if options.precision else (),
        options.remat or (),
    )
    cache_programs()
    log.say(f"devices    programs are compiled for {target.title if target else environment.devices()}")
    if target:
        log.say(f"           {target.caution(optimised=optimise)}")
    measure = functools.cache(functools.partial(needs.measure, config, dataset, target=target, optimise=optimise))
    if options.largest and budget is not None:
        log.say(f"search     for the largest {options.largest} in {options.budget}")
        fits = lambda choice: measure(choice).step_bytes <= budget  # noqa: E731
        choices = needs.search_largest(config, choices, options.largest, fits, say=log.say, target=target)
    rows = [(choice, measure(choice)) for choice in choices]
    log.write_result("\n".join(needs.format_rows(rows, budget)))
    for choice, need in rows if target else ():
        log.say(f"compiled   {choice}: {need.seconds:.0f} s; kernels: {describe_kernels(dict(need.kernels))}")
    for choice in choices if options.parts else ():
        log.say(f"parts      {choice}")
        for line in needs.format_parts(*needs.step_products(config, dataset, choice), ceilings):
            log.say(line)
    for choice, need in rows if target and options.parts else ():
        log.say(f"kernels    {choice}, as compiled")
        for line in needs.format_kernels(need.by_part):
            log.say(line)
    if budget is not None and not options.largest:
        log.say(f"largest    {needs.format_best(rows, budget)} (budget {options.budget})")
    if options.json:
        write_json(options.json, [dataclasses.asdict(c) | dataclasses.asdict(n) for c, n in rows])
    return 2 if target and not any(need.step_bytes <= (budget or 0) for _, need in rows) else 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(
        "xdim_jax.plan",
        __doc__ or "",
        "Exit status: 0 done; 2 unusable input, or nothing fits the --target.\n\nexamples:\n"
        "  python -m xdim_jax.plan --config=configs/brats_dxnet.py --patch=96,96,96 --patch=128,128,128 \\\n"
        "      --precision=float32,bfloat16 --budget=16GiB\n"
        "  python -m xdim_jax.plan --config=configs/brats_dxnet.py --budget=16GiB --largest=patch\n"
        "  python -m xdim_jax.plan --config=configs/brats_dxnet.py:scratch --target=h100 --precision=bfloat16",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT,...]", help="a recipe, e.g. configs/brats_dxnet.py"
    )
    parser.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="D,H,W",
        help="size of a patch (2D: H,W); may be given several times",
    )
    parser.add_argument("--batch", metavar="N,N,...", help="numbers of samples in a batch, over all devices")
    parser.add_argument("--precision", metavar="P,P", help="float32, bfloat16 or both")
    parser.add_argument(
        "--remat",
        action="append",
        metavar="STAGES",
        help="stages whose activations are recomputed (config.train.remat); may be given several times",
    )
    parser.add_argument("--target", metavar="DEVICE", help=f"devices that this machine does not have: {names()}")
    parser.add_argument("--full", action="store_true", help="with --target for a TPU: compile with optimisation")
    parser.add_argument(
        "--budget", metavar="SIZE", help="memory of a device, e.g. 16GiB; with --target, default: that of the target"
    )
    parser.add_argument(
        "--largest", choices=("patch", "batch"), help="search for the largest one that fits into --budget"
    )
    parser.add_argument("--parts", action="store_true", help="show the operations of each part of the network")
    parser.add_argument(
        "--ceilings",
        metavar="TFLOP/S,TB/S",
        help="peak rates of a device, e.g. 989,4.8 (H200, bfloat16): adds lower bounds of the time to --parts",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """Return the positive integers in a comma-separated list. Raises UserError for anything else."""
    try:
        numbers = tuple(int(word) for word in text.strip("()").split(",") if word.strip())
    except ValueError as error:
        raise UserError(f"{flag}={text}: expected integers separated by commas") from error
    if not numbers or min(numbers) < 1:
        raise UserError(f"{flag}={text}: expected integers above 0 separated by commas")
    return numbers


def _ceilings(text: str) -> tuple[float, float]:
    """Return operations and bytes per second from ``<TFLOP/s>,<TB/s>``. Raises UserError for anything else."""
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
    """Run the console script."""
    run(main)


if __name__ == "__main__":
    command()
