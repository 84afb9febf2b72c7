"""Functions that all command-line programs use: argument parsers and error messages."""

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import DISK_FULL
from xdim_jax.base.threads import is_abandoned_call_running

# errors of disks, network drives and file permissions, for which `explain` has a message; code that expects such an
# error raises a UserError with a more specific one
_OF_THE_FILE_SYSTEM = (
    *(*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ELOOP, errno.ENAMETOOLONG),
)


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command with the arguments of the process, and exit.

    The exit status is the return value of ``main``, 2 after an error that the user can correct, or 130 after Ctrl-C.
    Any other exception is a bug of this package and is raised with its traceback. Log lines and error messages that
    cannot be written are dropped, without an effect on the status; only `xdim_jax.base.log.write_result` treats this as
    an error.

    Args:
        main: Function that takes the arguments of the command line and returns the exit status.
    """
    _open_streams()
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        code = _fail("stopped by Ctrl-C", 130)
    except Exception as error:
        text = explain(error)
        if text is None:
            raise
        code = _fail(f"error: {text}", 2)
    _flush_streams()
    if is_abandoned_call_running():  # e.g. XLA is compiling; Python crashes if it ends this thread
        os._exit(code)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    """Print an error message to standard error if possible, and return the exit status ``code``."""
    _flush_streams()
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    return code


def _open_streams() -> None:
    """Connect standard streams that are closed (``>&-``) to the null device.

    Otherwise a file that is opened later would get the file descriptor of the stream, and messages could be written
    into it.
    """
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _flush_streams() -> None:
    """Flush the standard streams. A stream that cannot be written is connected to the null device.

    Otherwise Python would flush it again at exit, print a message, and change the exit status to 120.
    """
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), number)


def explain(error: Exception) -> str | None:
    """Return a message if the machine lacks memory, devices, disk space or permissions; None for other errors."""
    text = str(error)
    line = first_line(error)
    smaller = (
        "Reduce --config.data.patch or --config.data.batch, process a batch in parts with --config.train.accumulate, "
        "or give --config.train.precision=bfloat16 or --config.train.remat='decoder*'. To find the largest patch that "
        "fits: python -m xdim_jax.plan --config=<recipe> --budget=<memory> --largest=patch"
    )
    if isinstance(error, OSError) and error.errno in _OF_THE_FILE_SYSTEM and error.filename:
        path = os.fsdecode(error.filename)
        return (
            f"{path} cannot be read or written: {error.strerror}. Give yourself permission, make room, or choose "
            "another path; then run the same command again"
        )
    if isinstance(error, MemoryError):
        return f"out of memory on the host: {line}. {smaller}"
    if isinstance(error, RuntimeError) and ("RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()):
        return f"out of memory on the device: {line}. {smaller}"
    absent = _is_no_device(error)
    if absent or (isinstance(error, RuntimeError) and ("Unable to initialize backend" in text or "No visible" in text)):
        platform = os.environ.get("JAX_PLATFORMS")
        line = f"this machine has no visible device of the platform {platform}" if absent else line
        step = f"JAX_PLATFORMS={platform} selects this platform: unset it, or install" if platform else "Install"
        return (
            f"no device to compute on: {line}. {step} JAX for the device (pip install 'xdim_jax[cuda12]' or '[tpu]'); "
            "python -m xdim_jax.doctor checks this machine"
        )
    return None


def _is_no_device(error: Exception) -> bool:
    """Return whether JAX found no device of the platforms in JAX_PLATFORMS, which it reports as an AssertionError."""
    if not isinstance(error, AssertionError) or error.__traceback__ is None:
        return False
    place = traceback.extract_tb(error.__traceback__)[-1]
    return place.name == "backends" and place.filename.endswith("xla_bridge.py")


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
