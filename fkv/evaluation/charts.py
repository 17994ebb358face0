"""Figures of leaderboards and of budget advice, in the style of `plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fkv.evaluation import plots
from fkv.evaluation.advice import MORE, RESAMPLES, Curve, smallest
from fkv.evaluation.board import Entry

_PANELS = {
    "ratio": ("loss / full-cache loss", 1),
    "right": ("right, %", 100),
    "retained": ("attention retained, %", 100),
}


def leaderboard(board: Sequence[Entry], path: Path, title: str) -> None:
    """Loss, answers and attention retained against budget, then loss against bytes of the cache."""
    names = list(dict.fromkeys(e.policy for e in board if e.budget))
    styles = plots._styles(names)
    panels = [x for x in _PANELS if any(getattr(e, x) is not None for e in board if e.budget)]
    size, grid = (4.4 * (len(panels) + 1) + 2.6, 4.8), (1, len(panels) + 1)
    title = f"{title}: 95 % intervals, golden eviction dashed"
    with plots._figure(path, size, grid, title) as axes:
        for axis, name in zip(axes[0], [*panels, "ratio"], strict=True):
            label, scale = _PANELS[name]
            by_cost = axis is axes[0, -1]
            for policy, style in styles.items():
                points = []
                for e in board:
                    x = getattr(e, name)
                    if e.policy == policy and x is not None:
                        at = e.cost.cache_bytes / 2**10 if by_cost else e.budget
                        ends = (np.nan_to_num(x.value - x.low), np.nan_to_num(x.high - x.value))
                        points.append((at, scale * x.value, *(scale * max(y, 0.0) for y in ends)))
                if points:
                    plots._curve(axis, points, policy, **style)
            _log_budgets(axis, None if by_cost else sorted({e.budget for e in board if e.budget}))
            axis.set(ylabel=label, xlabel="cache of a row, KiB" if by_cost else plots._BUDGET)
            if name == "ratio":
                plots._horizontal(axis, 1)


def _log_budgets(axis, budgets: Sequence[int] | None) -> None:
    axis.set_xscale("log", base=2)
    if budgets:
        axis.set_xticks(budgets, [str(x) for x in budgets])
        axis.minorticks_off()


def advice(curves: Mapping[str, Mapping[str, Curve]], limits: Sequence[float], path: Path) -> None:
    """Loss added against budget, a panel per group of traces, with the limits and the answers.

    Args:
      curves: by group and policy.
      limits: loss that may be added, %.
    """
    styles = plots._styles(list(dict.fromkeys(name for one in curves.values() for name in one)))
    size, title = (
        (5.2 * len(curves) + 2.4, 4.8),
        "loss added by eviction, 95 % intervals; rings: advised",
    )
    labels = plots._BUDGET, "% of the full cache's loss"
    with plots._figure(path, size, (1, len(curves)), title, *labels) as axes:
        for axis, (group, some) in zip(axes[0], curves.items(), strict=True):
            for name, curve in some.items():
                n = len(curve.full_n)
                rng = np.random.default_rng(0)
                again = curve.percent(rng.multinomial(n, np.full(n, 1 / n), RESAMPLES))
                low, high = np.quantile(again, (0.025, 0.975), axis=0)
                value = curve.percent()
                ends = (np.maximum(value - low, 0), np.maximum(high - value, 0))
                points = list(zip(curve.budgets, value, *ends, strict=True))
                plots._curve(axis, points, name, **styles[name])
                for limit in limits:
                    found = float(smallest(curve.budgets, value, limit))
                    if found != MORE:
                        at = value[curve.budgets.index(int(found))]
                        ring = {"markersize": 9, "markerfacecolor": "none"}
                        axis.plot(found, at, "o", color=styles[name]["color"], **ring)
            for limit in limits:
                plots._horizontal(axis, limit)
            axis.set_yscale("symlog", linthresh=min(limits))
            axis.set_title(group)
            _log_budgets(axis, sorted({b for c in some.values() for b in c.budgets}))
