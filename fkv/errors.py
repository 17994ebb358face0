"""Errors that the user can fix."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Bad input: one line that names the file, field or value and says what to do about it."""


class DivergedError(UserError, FloatingPointError):
    """Training reached NaN or infinity."""


def suggest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the closest known names, or all of them."""
    if near := difflib.get_close_matches(name, known):
        return f": did you mean {' or '.join(near)}?"
    return f": choose from {', '.join(known)}" if known else ""
