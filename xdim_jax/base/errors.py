"""What a user sees when something that was given is wrong; `xdim_jax.base.command.run` makes it one message."""

from collections.abc import Sequence


class UserError(ValueError):
    """Input that cannot be used: the message names the file or flag, what was found and expected, the next step."""


def join_problems(problems: list[str], summary: str) -> UserError:
    """One error that lists every problem found, not only the first."""
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError("\n  - ".join([f"{len(problems)} {summary}:", *problems]))


def first_line(error: BaseException, most: int = 300) -> str:
    """What a library said, at a length that fits a message; the kind of the error where it said nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def shorten(names: Sequence[object], most: int = 5) -> str:
    """The first names of a list, with commas, and dots for the others."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def gib(count: float) -> str:
    """Bytes, as a message has them."""
    return f"{count / 2**30:.2f} GiB"
