"""Kinds of values that settings accept: a description and a predicate each."""

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from fkv.errors import UserError


class Kind(NamedTuple):
    """A kind of values: its description, and a predicate."""

    said: str
    fits: Callable[[Any], bool]


def whole(least: int, most: int = 2**31 - 1) -> Kind:
    """Integers in a range, inclusive."""

    def fits(value):
        integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return integral and least <= value <= most

    return Kind(f"a whole number from {least} to {most}", fits)


def number(least: float, most: float = math.inf, above: bool = False, below: bool = False) -> Kind:
    """Finite numbers in a range, inclusive; `above` excludes the least, `below` the most."""

    def fits(value):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        if (above and value == least) or (below and value == most):
            return False
        return least <= value <= most and abs(value) < math.inf

    described = f"a number {'above' if above else 'of at least'} {least:g}"
    upper = f" and {'below' if below else 'at most'} {most:g}" if most < math.inf else ""
    return Kind(described + upper, fits)


def several(kind: Kind, what: str, count: int | None = None) -> Kind:
    """Sequences of a kind, of `count` entries if given."""

    def fits(value):
        sized = isinstance(value, tuple | list) and count in (None, len(value))
        return sized and all(map(kind.fits, value))

    return Kind(what, fits)


def one_of(known: Sequence[str]) -> Kind:
    """One of these strings."""
    return Kind(f"one of {', '.join(known)}", lambda x: isinstance(x, str) and x in known)


def said(value: Any) -> str:
    """A value as messages show it: short, and on one line."""
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def shown(value: Any) -> str:
    """A value as a `repr` of one line shows it: of arrays dtype and shape, of many their number."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, Mapping):
        if len(value) > 2 and all(hasattr(x, "size") for x in value.values()):
            return f"<{len(value)} arrays of {sum(x.size for x in value.values()):,} numbers>"
        return f"{{{', '.join(f'{key}: {shown(x)}' for key, x in value.items())}}}"
    return " ".join(repr(value).split())


def one_line(owner: Any) -> str:
    """`Class(field=value, ...)` of a dataclass, to be its `__repr__`."""
    fields = [field.name for field in dataclasses.fields(owner) if field.repr]
    said = ", ".join(f"{name}={shown(getattr(owner, name))}" for name in fields)
    return f"{type(owner).__name__}({said})"


def check(name: str, value: Any, kind: Kind) -> None:
    """Raises a `UserError` unless the value is of this kind; `name` is the field's."""
    if not kind.fits(value):
        raise UserError(f"{name} = {said(value)} must be {kind.said}")


def check_fields(where: str, owner: Any, **kinds: Kind) -> None:
    """Checks attributes of `owner`; `where` prefixes their names in errors."""
    for name, kind in kinds.items():
        check(where + name, getattr(owner, name), kind)


TEXT = Kind("text", lambda value: isinstance(value, str))
POSITIVE = number(0, above=True)
SIZES = several(whole(1), "a tuple of whole numbers from 1")
SWITCH = Kind("True or False", lambda value: isinstance(value, bool))


def setting(kind: Kind, default: Any = dataclasses.MISSING) -> Any:
    """A field of `Settings`."""
    return dataclasses.field(default=default, metadata={"kind": kind})


@dataclasses.dataclass(frozen=True)
class Settings:
    """A group of settings, checked on construction; fields are declared by `setting`.

    Attributes:
      group: their place in a config; errors put it before the name of a field.
    """

    group: ClassVar[str] = ""

    def __post_init__(self):
        for name, kind in self.kinds().items():
            check(f"{self.group}.{name}".lstrip("."), getattr(self, name), kind)

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """The kind of each field, in order."""
        found = {field.name: field.metadata.get("kind") for field in dataclasses.fields(cls)}
        return {name: kind for name, kind in found.items() if kind is not None}

    @classmethod
    def of(cls, config: Mapping[str, Any], /, **more: Any) -> Self:
        """Reads the settings from a group of a config; fields without a kind come as `more`.

        Raises:
          UserError: a field is missing or of the wrong kind.
        """
        for name in cls.kinds():
            if name not in config:
                where = f"{cls.group}.{name}".lstrip(".")
                raise UserError(f"config has no field {where}: configs/base.py has all of them")
        return cls(**{name: config[name] for name in cls.kinds()}, **more)
