"""What all command-line programs share: argument parsers, and one message per error."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from xdim_jax.base.errors import UserError, first_line


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command with the arguments of the process and exit: status 0 if it is done, 2 for unusable input."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        code = 130
    except Exception as error:
        text = explain(error)
        if text is None:  # a bug of this package: print the traceback
            raise
        sys.stdout.flush()
        print(f"error: {text}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def explain(error: Exception) -> str | None:
    """Return a message if the machine lacks memory or devices; None for other errors."""
    said = str(error)
    line = first_line(error)
    smaller = (
        "python -m xdim_jax.plan --config=<recipe> --budget=<memory> --largest=patch says what fits; or a smaller "
        "--config.data.patch, --config.data.batch (or in parts: --config.train.accumulate), "
        "--config.train.precision=bfloat16, --config.train.remat='decoder*'"
    )
    if isinstance(error, MemoryError):
        return f"out of memory on the host: {line}. {smaller}"
    if isinstance(error, RuntimeError) and ("RESOURCE_EXHAUSTED" in said or "out of memory" in said.lower()):
        return f"out of memory on the device: {line}. {smaller}"
    if isinstance(error, RuntimeError) and ("Unable to initialize backend" in said or "No visible" in said):
        asked = os.environ.get("JAX_PLATFORMS")
        reason = f"JAX_PLATFORMS={asked} asks for it: unset it, or install" if asked else "Install"
        return (
            f"no device to compute on: {line}. {reason} what it needs (pip install 'xdim_jax[cuda12]' or '[tpu]'); "
            "python -m xdim_jax.doctor checks this machine"
        )
    return None


def make_parser(module: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return an argument parser that prints its description and epilog as they are written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
