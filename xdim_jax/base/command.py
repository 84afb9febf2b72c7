"""Functions that all command-line programs use: argument parsers and error messages."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from xdim_jax.base.errors import UserError, first_line


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command with the arguments of the process, and exit.

    The exit status is the return value of ``main``, 2 after an error that the user can correct, or 130 after Ctrl-C.
    Any other exception is a bug of this package and is raised with its traceback.

    Args:
        main: Function that takes the arguments of the command line and returns the exit status.
    """
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
        if text is None:
            raise
        sys.stdout.flush()
        print(f"error: {text}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def explain(error: Exception) -> str | None:
    """Return a message if the machine lacks memory or devices; None for other errors."""
    text = str(error)
    line = first_line(error)
    smaller = (
        "Reduce --config.data.patch or --config.data.batch, process a batch in parts with --config.train.accumulate, "
        "or give --config.train.precision=bfloat16 or --config.train.remat='decoder*'. To find the largest patch that "
        "fits: python -m xdim_jax.plan --config=<recipe> --budget=<memory> --largest=patch"
    )
    if isinstance(error, MemoryError):
        return f"out of memory on the host: {line}. {smaller}"
    if isinstance(error, RuntimeError) and ("RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()):
        return f"out of memory on the device: {line}. {smaller}"
    if isinstance(error, RuntimeError) and ("Unable to initialize backend" in text or "No visible" in text):
        platform = os.environ.get("JAX_PLATFORMS")
        step = f"JAX_PLATFORMS={platform} selects this platform: unset it, or install" if platform else "Install"
        return (
            f"no device to compute on: {line}. {step} JAX for the device (pip install 'xdim_jax[cuda12]' or '[tpu]'); "
            "python -m xdim_jax.doctor checks this machine"
        )
    return None


def make_parser(module: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return an argument parser that keeps the line breaks of its description and epilog.

    Args:
        module: Name of the module that is run with ``python -m``.
        description: Text before the options in ``--help``.
        epilog: Text after the options.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
