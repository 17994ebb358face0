"""What a setting may be, in words and as a test of values."""

import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fkv.errors import UserError


class Kind(NamedTuple):
    """What a field may be: in words, and a function that says whether a value is that."""

    said: str
    fits: Callable[[Any], bool]


def whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Whole numbers of a range, inclusive."""

    def fits(value):
        integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return integral and least <= value <= most

    return Kind(f"a whole number from {least} to {most}", fits)


def number(least: float, most: float = math.inf, above: bool = False, below: bool = False) -> Kind:
    """Finite numbers of a range, inclusive; `above` leaves out the least, `below` the most."""

    def fits(value):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        if (above and value == least) or (below and value == most):
            return False
        return least <= value <= most and abs(value) < math.inf

    said = f"a number {'above' if above else 'of at least'} {least:g}"
    upper = f" and {'below' if below else 'at most'} {most:g}" if most < math.inf else ""
    return Kind(said + upper, fits)


def several(kind: Kind, what: str, count: int | None = None) -> Kind:
    """Tuples of a kind, of `count` entries if it is given."""

    def fits(value):
        sized = isinstance(value, tuple | list) and count in (None, len(value))
        return sized and all(map(kind.fits, value))

    return Kind(what, fits)


def one_of(known: Sequence[str]) -> Kind:
    """One of these words."""
    return Kind(
        f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known
    )


def said(value: Any) -> str:
    """A value in a message: short, and in one line."""
    return " ".join(reprlib.repr(value).split())


def check(name: str, value: Any, kind: Kind) -> None:
    """Refuses a value that is not of the kind; `name` is the field's."""
    if not kind.fits(value):
        raise UserError(f"{name} = {said(value)} must be {kind.said}")


def check_fields(where: str, owner: Any, **kinds: Kind) -> None:
    """Refuses attributes of `owner` that are not of their kinds; `where` goes before the name."""
    for name, kind in kinds.items():
        check(where + name, getattr(owner, name), kind)


TEXT = Kind("text", lambda value: isinstance(value, str))
SWITCH = Kind("True or False", lambda value: isinstance(value, bool))
