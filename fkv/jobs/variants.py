"""Variants of a supervised run: scorers that learn side by side from one golden pass.

`sft.variants` names them, each with the fields that it changes. What is not in `FIELDS` decides
what the pass is, or which traces it sees, so it is the same for all.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from fkv import kinds
from fkv.errors import UserError, suggest

FIELDS = (
    "scorer.inputs", "scorer.hidden", "scorer.norm", "sft.margin", "sft.weighting",
    "sft.updates", "sft.states", "sft.learning_rate", "sft.warmup", "sft.clip", "sft.scorer_seed",
)  # fmt: skip
_TAKEN = ("checkpoints", "tb")  # directories of a run


def scorer_seed(config: ConfigDict) -> int:
    """The seed of the scorers' initial parameters."""
    return (config.seed + config.sft.scorer_seed) % 2**32


def resolve(config: ConfigDict, known: Mapping[str, kinds.Kind]) -> dict[str, ConfigDict]:
    """The config of each variant, by name, as a run of its own would have it; empty without any.

    Args:
      known: the kinds of fields, by dotted names.

    Raises:
      UserError: a variant has no directory or row of its own, an unknown field or a bad value, or
        is equal to another.
    """
    found: dict[str, ConfigDict] = {}
    rows = ("full", "golden", *config.eval.policies)
    for text in config.sft.variants:
        name, _, changes = text.partition(":")
        where = f"sft.variants: {kinds.said(text)}"
        if not re.fullmatch(r"[\w+-]{1,100}", name):
            raise UserError(f"{where}: a name has at most 100 letters, digits and _ + -")
        if name in _TAKEN or name in rows:
            what = "a folder of run directories" if name in _TAKEN else "a row of the table"
            raise UserError(f"{where}: {name!r} is the name of {what}: use another name")
        if name.casefold() in map(str.casefold, found):  # one directory on some disks
            raise UserError(f"{where}: two variants have this name")
        one = ConfigDict(config).copy_and_resolve_references()
        with one.unlocked():
            one.sft.variants = ()
            for field, value in _values(where, changes):
                group, leaf = field.split(".")
                old = config[group][leaf]
                try:
                    value = type(old)(value)
                except ValueError:
                    pass  # as refused below
                kinds.check(f"{where}: {field}", value, known[field])
                one[group][leaf] = value
        found[name] = one.lock()
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        if _compared(one) == _compared(other):
            raise UserError(f"sft.variants: {a!r} and {b!r} are the same: leave one out")
    return found


def _values(where: str, text: str) -> list[tuple[str, str]]:
    """Fields and values of `field=value,...`."""
    found: dict[str, str] = {}
    for part in text.split(",") if text else ():
        field, equals, value = map(str.strip, part.partition("="))
        if not equals:
            raise UserError(f"{where}: {part!r} must be of the form field=value, as {FIELDS[0]}=kv")
        if field not in FIELDS:
            ends = [x for x in FIELDS if x.endswith(f".{field}")]
            said = f": did you mean {ends[0]}?" if ends else suggest(field, FIELDS)
            raise UserError(f"{where} can't change {field!r}{said}")
        if field in found:
            raise UserError(f"{where}: {field} is given twice")
        found[field] = value
    return list(found.items())


def _compared(config: ConfigDict) -> list[Any]:
    return [scorer_seed(config), *(config[x.split(".")[0]][x.split(".")[1]] for x in FIELDS[:-1])]


def shared(config: ConfigDict) -> dict[str, Any]:
    """What runs that may share a pass have in common: all fields but those that variants change."""
    one = ConfigDict(config).copy_and_resolve_references()
    with one.unlocked():
        for field in FIELDS:
            group, leaf = field.split(".")
            del one[group][leaf]
    return one.to_dict()
