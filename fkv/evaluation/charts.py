"""Figures of leaderboards and of budget advice, in the style of `plots`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fkv.evaluation import plots
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
