"""Figures of leaderboards and of budget advice; see `plots`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fkv.evaluation import drawing
from fkv.evaluation.advice import MORE, Curve, smallest
from fkv.evaluation.board import Entry
from fkv.evaluation.drawing import Name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BUDGET = "budget (KV pairs per head)"
_PANELS = {
    "ratio": ("loss / full-cache loss", 1),
    "right": ("right, %", 100),
    "retained": ("attention retained, %", 100),
}


def leaderboard(board: Sequence[Entry], path: Name = None, title: str = "") -> "Figure":
    """Loss, answers and attention retained against budget, then loss against bytes of the cache."""
    evicted = [e for e in board if e.budget]
    styles = drawing.styles_of(list(dict.fromkeys(e.policy for e in evicted)))
    panels = [x for x in _PANELS if any(getattr(e, x) is not None for e in evicted)]
    grid = drawing.pages(len(panels) + 1, 5.8, 5.4)
    title = f"{title}: 95 % intervals, golden eviction dashed".removeprefix(": ")
    with drawing.figure(path, *grid, title) as axes:
        for i, (axis, name) in enumerate(zip(axes.flat, [*panels, "ratio"], strict=False)):
            label, scale = _PANELS[name]
            by_cost = i == len(panels)
            for policy, style in styles.items():
                found = [(e, getattr(e, name)) for e in evicted if e.policy == policy]
                points = [
                    (e.cost.cache_bytes / 2**10 if by_cost else e.budget, *_ends(x, scale))
                    for e, x in found
                    if x is not None
                ]
                if points:
                    drawing.curve(axis, points, policy, **style)
            axis.set(ylabel=label, xlabel="cache of a row, KiB" if by_cost else _BUDGET)
            if name == "ratio":
                drawing.horizontal(axis, 1)
                if max(e.ratio.value for e in evicted) > 2:
                    axis.set_yscale("log")
                    for which in ("major", "minor"):
                        getattr(axis.yaxis, f"set_{which}_formatter")("{x:g}")
            _ticks(axis, [] if by_cost else sorted({e.budget for e in evicted}))
            drawing.name_lines(axis)
    return drawing.figure_of(axes)


def _ends(x, scale: float) -> tuple[float, float, float]:
    """A value, and how far its interval reaches below and above."""
    below, above = np.nan_to_num([x.value - x.low, x.high - x.value]).clip(0)
    return scale * x.value, scale * below, scale * above


def advice(
    curves: Mapping[str, Mapping[str, Curve]], limits: Sequence[float], path: Name = None
) -> "Figure":
    """Loss added against budget, a panel per group of traces; rings are the answers.

    Args:
      curves: by group and policy.
      limits: loss that may be added, %.
    """
    styles = drawing.styles_of(list(dict.fromkeys(name for x in curves.values() for name in x)))
    title = "loss added by eviction, 95 % intervals; rings: advised"
    labels = _BUDGET, "% of the full cache's loss"
    with drawing.figure(path, *drawing.pages(len(curves), 5.8, 4.6), title, *labels) as axes:
        for axis, (group, some) in zip(axes.flat, curves.items(), strict=False):
            for name, curve in some.items():
                value, (low, high) = curve.percent(), curve.ends()
                ends = np.maximum(value - low, 0), np.maximum(high - value, 0)
                points = zip(curve.budgets, value, *ends, strict=True)
                drawing.curve(axis, points, name, **styles[name])
                for limit in limits:
                    found = float(smallest(curve.budgets, value, limit))
                    if found != MORE:
                        at, colour = value[curve.budgets.index(int(found))], styles[name]["color"]
                        axis.plot(found, at, "o", ms=9, mfc="none", color=colour)
            axis.set_yscale("symlog", linthresh=min(limits))
            axis.yaxis.set_major_formatter("{x:g}")
            for limit in limits:
                drawing.horizontal(axis, limit)
            axis.set_title(group)
            _ticks(axis, sorted({b for c in some.values() for b in c.budgets}))
            drawing.name_lines(axis)
    return drawing.figure_of(axes)


def _ticks(axis, budgets: Sequence[int]) -> None:
    """A logarithmic axis with these ticks, or as many plain ones as fit."""
    axis.set_xscale("log", base=2)
    if budgets:
        axis.set_xticks(budgets, map(str, budgets))
        axis.set_xticks([], minor=True)
    else:
        axis.xaxis.set_major_formatter("{x:,.0f}")
