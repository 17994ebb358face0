"""Metrics of policies on the tasks of a harness: values, errors, differences to the full cache.

All are over documents, and differences are paired by document. Errors of what is no plain mean (a
perplexity over all words) are by the jackknife: a document, or one of 400 groups, is left out at a
time.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from fkv.cache.cadence import said_budget
from fkv.evaluation import accuracy, tables
from fkv.evaluation.accuracy import Difference

Cell = tuple[str, int]  # policy and budget, 0 for the full cache
# Of a policy and budget: by task and filter the metrics of each document.
Judged = Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]
_GROUPS = 400
_ABSENT = -1.0  # where a synthetic task has no value for a document of another length


@dataclasses.dataclass(frozen=True)
class Part:
    """A task of a column: its metric, of which filter, and how values of documents become one."""

    task: str
    metric: str
    filter: str
    aggregate: Callable[[Sequence[Any]], float]


@dataclasses.dataclass(frozen=True)
class Column:
    """What a column shows.

    Attributes:
      name: of the task or group.
      metric: of it.
      parts: the task, or those of the group.
      by_size: tasks of a group count by their documents, or alike.
      higher: is better; None where it is not known.
    """

    name: str
    metric: str
    parts: tuple[Part, ...]
    by_size: bool = True
    higher: bool | None = None

    @property
    def measure(self) -> str:
        """The metric, and of which filter unless that is lm-eval's `none`."""
        chosen = self.parts[0].filter
        return self.metric if chosen == "none" else f"{self.metric},{chosen}"

    @property
    def label(self) -> str:
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher]
        return f"{self.name} {self.measure}{arrow}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One policy at one budget in one column.

    Attributes:
      documents: how many have a value.
      value, error: and its standard error, NaN for a single document.
      difference: to the full cache, with a 95 % interval; None without one, or of one document.
    """

    documents: int
    value: float
    error: float
    difference: Difference | None = None


def measure(column: Column, ours: Judged, full: Judged | None) -> Measured | None:
    """A policy in a column; None where no document has a value.

    Args:
      full: of the full cache; None for the full cache itself, or if it did not run.
    """
    valued = [(part, x) for part in column.parts if (x := _values(part, ours))]
    if not valued:
        return None
    parts, mine = zip(*valued, strict=True)
    count = sum(map(len, mine))
    shares = [len(x) / count if column.by_size else 1 / len(mine) for x in mine]
    value = sum(w * p.aggregate([*x.values()]) for w, p, x in zip(shares, parts, mine, strict=True))
    spread = [_jackknife(p.aggregate, [[*x.values()]]) for p, x in zip(parts, mine, strict=True)]
    error = float(np.sqrt(sum((w * s) ** 2 for w, s in zip(shares, spread, strict=True))))
    difference = None
    if full is not None:
        theirs = [_values(part, full) for part in parts]
        pairs = [
            [(x[doc], y[doc]) for doc in x if doc in y] for x, y in zip(mine, theirs, strict=True)
        ]
        difference = _difference(parts, shares, pairs)
    return Measured(count, float(value), error, difference)


def _values(part: Part, judged: Judged) -> dict[int, Any]:
    """The values of documents; lists, as files have them, are pairs of a value and a weight."""
    found = {}
    for doc, metrics in judged.get((part.task, part.filter), {}).items():
        value = metrics.get(part.metric)
        if value is not None and not (part.metric.isdigit() and value == _ABSENT):
            found[doc] = tuple(value) if isinstance(value, list) else value
    return found


def _difference(
    parts: Sequence[Part], shares: Sequence[float], pairs: Sequence[Sequence[tuple]]
) -> Difference | None:
    kept = [
        (part, share, some) for part, share, some in zip(parts, shares, pairs, strict=True) if some
    ]
    count = sum(len(some) for _, _, some in kept)
    if count < 2:
        return None
    pooled = [pair for _, _, some in kept for pair in some]
    even = len(kept) == 1 or np.allclose(
        [w for _, w, _ in kept], [len(x) / count for *_, x in kept]
    )
    if even and all(_is_share_of(part, some) for part, _, some in kept):
        return accuracy.difference(*np.array(pooled, float).T)
    value, spread, squares = 0.0, 0.0, 0.0
    for part, share, some in kept:
        sides = [list(side) for side in zip(*some, strict=True)]
        value += share * (part.aggregate(sides[0]) - part.aggregate(sides[1]))
        own = (share * _jackknife(part.aggregate, sides)) ** 2
        spread += own
        squares += own**2 / max(min(len(some), _GROUPS) - 1, 1)
    free = spread**2 / squares if squares else 1.0  # by Welch and Satterthwaite
    half = special.stdtrit(free, 0.975) * spread**0.5
    if not np.isfinite(half):
        return None
    return Difference(float(value), float(value - half), float(value + half))


def _is_share_of(part: Part, pairs: Sequence[tuple]) -> bool:
    """Whether a metric is the mean of values from 0 to 1."""
    if not all(
        isinstance(x, int | float | np.number) and 0 <= x <= 1 for one in pairs for x in one
    ):
        return False
    ours = [float(x) for x, _ in pairs]
    return bool(np.isclose(part.aggregate(ours), np.mean(ours)))


def _jackknife(aggregate: Callable, sides: Sequence[Sequence[Any]]) -> float:
    """The standard error of a metric, or of the difference of two on the same documents."""
    count = len(sides[0])
    groups = min(count, _GROUPS)
    if groups < 2:
        return float("nan")
    left_out = np.arange(count) * groups // count
    found = []
    for group in range(groups):
        some = [[x for x, at in zip(side, left_out, strict=True) if at != group] for side in sides]
        value, *other = (aggregate(one) for one in some)
        found.append(value - sum(other))
    found = np.asarray(found, float)
    return float(np.sqrt((groups - 1) / groups * ((found - found.mean()) ** 2).sum()))


def _shown(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 1000 else f"{x:.4g}"


def head(columns: Sequence[Column], compared: bool) -> list[str]:
    """The table's head; with differences where the full cache ran."""
    names = [
        name for one in columns for name in ([one.label, "to full"] if compared else [one.label])
    ]
    return ["policy", "budget", "evictions", *names]


def row(
    cell: Cell, evictions: float, measured: Sequence[Measured | None], compared: bool, kept: int = 0
) -> list[str]:
    """A row of the table, as text.

    Args:
      evictions: of a head, mean over requests.
      kept: tokens of the prompt that are protected.
    """
    cells = [cell[0], said_budget(cell[1], kept), f"{evictions:.1f}"]
    for one in measured:
        if one is None:
            cells += [""] * (1 + compared)
            continue
        error = "" if np.isnan(one.error) else f" ± {_shown(one.error)}"
        cells.append(f"{_shown(one.value)}{error}")
        if compared:
            d = one.difference
            cells.append("" if d is None else f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})")
    return cells


CSV = (
    "policy", "budget", "task", "metric", "filter", "documents", "value", "standard_error",
    "difference", "difference_low", "difference_high", "evictions",
)  # fmt: skip


def csv_rows(
    cell: Cell, evictions: float, columns: Sequence[Column], measured: Sequence[Measured | None]
) -> list[list[Any]]:
    """One row for each column."""
    found = []
    for column, one in zip(columns, measured, strict=True):
        if one is None:
            continue
        d = dataclasses.astuple(one.difference) if one.difference else (None,) * 3
        error = None if np.isnan(one.error) else one.error
        which = column.name, column.metric, column.parts[0].filter
        found.append([*cell, *which, one.documents, one.value, error, *d, evictions])
    return found


def csv(rows: Sequence[Sequence[Any]]) -> str:
    """`csv_rows` of all policies, as a file's content."""
    return tables.comma_separated(CSV, rows)
