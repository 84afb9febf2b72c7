"""Errors in the input of a user. `xdim_jax.base.command.run` turns them into one message and exit status 2."""

from collections.abc import Sequence


class UserError(ValueError):
    """Unusable input. The message names the file or flag, what was found, what was expected, and the next step."""


def join_problems(problems: list[str], summary: str) -> UserError:
    """Return one error that lists all problems.

    Args:
        problems: One or more messages. A single message is returned unchanged.
        summary: Noun after the number of problems in the first line, e.g. "files that cannot be read".
    """
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError("\n  - ".join([f"{len(problems)} {summary}:", *problems]))


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of an error's message, at most ``limit`` characters; its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def shorten(names: Sequence[object], limit: int = 5) -> str:
    """Return the first ``limit`` names, separated by commas, and an ellipsis if there are more."""
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


def gib(count: float) -> str:
    """Return a number of bytes as text, in GiB."""
    return f"{count / 2**30:.2f} GiB"
