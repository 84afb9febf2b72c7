"""Errors in the input of a user. `xdim_jax.base.command.run` turns them into one message and exit status 2."""

from collections.abc import Sequence


class UserError(ValueError):
    """Unusable input. The message names the file or flag, what was found, what was expected, and the next step."""


def join_problems(problems: list[str], summary: str) -> UserError:
    """Return one error that lists all problems."""
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError("\n  - ".join([f"{len(problems)} {summary}:", *problems]))


def first_line(error: BaseException, most: int = 300) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def shorten(names: Sequence[object], most: int = 5) -> str:
    """Return the first names of a list, separated by commas, and dots if there are more."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def gib(count: float) -> str:
    """Return a number of bytes as text, in GiB."""
    return f"{count / 2**30:.2f} GiB"
