"""What a user sees when something he gave is wrong, and how the mains turn it into one message."""

from collections.abc import Sequence


class UserError(ValueError):
    """Input that cannot be used: the message names the file or flag, what was found and expected, the next step."""


def join_problems(problems: list[str], summary: str) -> UserError:
    """One error that lists every problem found, not only the first."""
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError("\n  - ".join([f"{len(problems)} {summary}:", *problems]))


def shorten(names: Sequence[object], most: int = 5) -> str:
    """The first names of a list, with commas, and dots for the others."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def gib(count: float) -> str:
    """Bytes, as a message has them."""
    return f"{count / 2**30:.2f} GiB"
