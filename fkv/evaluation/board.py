"""A leaderboard: every policy at every budget, its losses, answers, attention retained and costs.

95 % intervals: Student's t over traces for losses (standard errors as in `paired`), overlap and
attention; for answers as in `accuracy`. Differences are to one baseline, on the same
traces and problems; a tie is one whose interval contains zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fkv.cache.cadence import FULL, said_budget
from fkv.evaluation import accuracy, paired, tables
from fkv.evaluation.accuracy import Accuracy
from fkv.evaluation.loss_ratio import Losses, standard_error

Cell = tuple[str, int]  # a policy at a budget (or `FULL`)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value, and its 95 % interval; NaN where one trace tells nothing."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @classmethod
    def of(cls, estimate: paired.Estimate, n: int) -> "Interval":
        """From a value and its standard error over n traces."""
        from scipy import special  # slow to import

        value, error = map(float, estimate)
        half = float(special.stdtrit(n - 1, 0.975)) * error if n > 1 else float("nan")
        return cls(value, value - half, value + half)

    @property
    def tie(self) -> bool:
        """Whether a difference may be zero."""
        return not (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a policy costs, by its shapes alone.

    Attributes:
      cache_bytes: of a row, in all layers, with the numbers that travel with entries.
      share: of the bytes of the full cache.
      flops, bytes: of evictions, per token: operations, and what they read and write; None where
        the compiler counts none.
      ms: per token of decoding, if measured.
    """

    cache_bytes: int
    share: float
    flops: float | None = None
    bytes: float | None = None
    ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A policy at a budget; what was not measured is None.

    Attributes:
      ratio: loss over the full cache's.
      difference: of the ratio, to the baseline's.
      right: share of answers that are right.
      points: difference of that share to the baseline's.
      overlap: with golden evictions, in states of the golden cache.
      retained: attention retained, mean over layers and heads.
    """

    policy: str
    budget: int
    cost: Cost
    baseline: str = ""
    ratio: Interval | None = None
    difference: Interval | None = None
    right: Interval | None = None
    points: Interval | None = None
    overlap: Interval | None = None
    retained: Interval | None = None
    protect_prompt: int = 0


def entries(
    losses: Sequence[Losses],
    answers: Sequence[Accuracy],
    retained: Mapping[Cell, np.ndarray],
    costs: Mapping[Cell, Cost],
    baseline: str = "",
) -> list[Entry]:
    """The full cache, then budget by budget every policy, lowest loss first.

    Args:
      losses: of golden eviction and all policies.
      answers: of some of them, and the full cache.
      retained: attention retained [n, layers, KV heads] of some of them.
      costs: of all, and the full cache.
      baseline: see `paired.against_baseline`.
    """
    right = {(r.policy, r.budget): r for r in answers}
    pairs = dict(zip(map(id, losses), paired.against_baseline(losses, baseline), strict=True))
    full = right.get(("full", FULL))
    found = [Entry("full", FULL, costs["full", FULL], right=_right(full))]
    for budget in dict.fromkeys(r.budget for r in losses):
        some = sorted((r for r in losses if r.budget == budget), key=lambda r: r.ratio()[0])
        for r in some:
            n, cell, pair = len(r.full), (r.policy, budget), pairs[id(r)]
            theirs, ours = right.get((pair.baseline, budget)), right.get(cell)
            against = None
            if theirs and ours and theirs is not ours:
                shares = (x.right_pn.mean(1) for x in (ours, theirs))
                against = Interval(*dataclasses.astuple(accuracy.difference(*shares)))
            difference = None
            if pair.difference is not None and r.policy != pair.baseline:
                difference = Interval.of(pair.difference, n)
            found.append(
                Entry(
                    *cell, costs[cell], pair.baseline, Interval.of(r.ratio(), n), difference,
                    _right(ours), against,
                    None if r.overlap is None else Interval.of(r.mean_overlap(), n),
                    _mean(retained.get(cell)), r.protect_prompt,
                )
            )  # fmt: skip
    return found


def _right(found: Accuracy | None) -> Interval | None:
    return None if found is None else Interval(found.pass_at_1, *found.interval())


def _mean(share_nyk: np.ndarray | None) -> Interval | None:
    if share_nyk is None:
        return None
    share_n = share_nyk.mean((1, 2))
    share_n = share_n[~np.isnan(share_n)]
    if not len(share_n):
        return None
    return Interval.of((float(share_n.mean()), standard_error(share_n)), len(share_n))


_COLUMNS = {
    "policy": lambda e: e.policy,
    "budget": lambda e: said_budget(e.budget, e.protect_prompt),
    "loss ratio": lambda e: _said(e.ratio, "{:.3f}"),
    "to baseline": lambda e: _against(e, e.difference, "{:+.3f}"),
    "right, %": lambda e: _said(e.right, "{:.1f}", 100),
    "points to baseline": lambda e: _against(e, e.points, "{:+.1f}", 100),
    "golden overlap": lambda e: _said(e.overlap, "{:.2f}"),
    "attention retained, %": lambda e: _said(e.retained, "{:.1f}", 100),
    "cache, KiB": lambda e: f"{e.cost.cache_bytes / 2**10:,.0f}",
    "of full, %": lambda e: f"{100 * e.cost.share:.1f}",
    "eviction, kFLOP a token": lambda e: _number(e.cost.flops),
    "eviction, kB a token": lambda e: _number(e.cost.bytes),
    "ms a token": lambda e: "" if e.cost.ms is None else f"{e.cost.ms:.2f}",
}


def _said(x: Interval | None, form: str, scale: float = 1) -> str:
    if x is None:
        return ""
    middle, low, high = (form.format(scale * value) for value in (x.value, x.low, x.high))
    return middle if np.isnan(x.low) else f"{middle} ({low} to {high})"


def _against(entry: Entry, x: Interval | None, form: str, scale: float = 1) -> str:
    if entry.policy == entry.baseline:
        return "baseline"
    return "" if x is None else _said(x, form, scale) + (" tie" if x.tie else "")


def _number(x: float | None) -> str:
    return "" if x is None else f"{x / 1e3:,.0f}"


def table(board: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, without columns that are empty throughout."""
    columns = {name: [cell(e) for e in board] for name, cell in _COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if {*cells} - {"", "baseline"}}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def records(board: Sequence[Entry]) -> list[dict]:
    """JSON data: all figures by name, shares instead of percent; null where there is none."""
    found = []
    for entry in board:
        row = dataclasses.asdict(entry)
        for name in ("difference", "points"):
            x = getattr(entry, name)
            row[f"{name}_tie"] = None if x is None else x.tie
        found.append(_without_nan(row))
    return found


def _without_nan(x):
    if isinstance(x, dict):
        return {name: _without_nan(value) for name, value in x.items()}
    return None if isinstance(x, float) and np.isnan(x) else x


def csv(board: Sequence[Entry]) -> str:
    """`records` as CSV, names of nested figures joined by underscores."""
    rows = []
    for record in records(board):
        row = {}
        for name, value in record.items():
            if name in ("ratio", "difference", "right", "points", "overlap", "retained"):
                value = value or dict.fromkeys(("value", "low", "high"))
                row |= {name: value["value"], f"{name}_low": value["low"]}
                row[f"{name}_high"] = value["high"]
            elif name == "cost":
                names = {"flops": "eviction_flops", "bytes": "eviction_bytes"}
                row |= {names.get(key, key): x for key, x in value.items()}
            else:
                row[name] = value
        rows.append(row)
    return tables.comma_separated(list(rows[0]), [list(row.values()) for row in rows])
