"""The exceptions that are the user's to fix, and how they offer what was meant."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Bad input: one line that names the file, field or value and says what to do about it."""


class DivergedError(UserError, FloatingPointError):
    """Training has come to NaN or infinity."""


def suggest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: what is near it, or all there are."""
    if near := difflib.get_close_matches(name, known):
        return f": did you mean {' or '.join(near)}?"
    return f": there are {', '.join(known)}" if known else ""
