"""Budget advice: from losses at some budgets to the smallest that keeps the full cache's loss.

One budget for all heads. What eviction adds is measured by replay at a ladder of budgets, in % of
the full cache's loss, on the same tokens at every budget: those that the smallest could harm. The
answer is the smallest measured budget from which on, upwards, every one is within the limit; steps
of the ladder that contain an answer are halved by more replays, as a loss can be measured and
need not be interpolated. Nothing is said beyond what was measured: more than the largest, or at
most the smallest. The interval is a bootstrap's over traces, 95 %; its ends are measured budgets.

Budgets per layer and KV head. Evicting one head at a time tells what each may lose alone, takes a
replay per head and budget, and doesn't add up: heads that each add 1 % together add far more. So
one number is measured for all heads at once, the attention retained (`retained`), at every budget
of the ladder: the advised budgets are the cheapest of it that together lose no more attention than
the one budget for all. It is a rule of thumb, so the loss under these budgets is measured, too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

MORE = math.inf  # than the largest budget measured
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a policy's evictions add on n traces, at several budgets.

    Attributes:
      excess: by budget, nats per trace that eviction adds, summed over the tokens counted, [n].
      full_n: nats of the full cache on these tokens.
    """

    excess: Mapping[int, np.ndarray]
    full_n: np.ndarray

    budgets = property(lambda self: sorted(self.excess))

    def take(self, rows: np.ndarray) -> "Curve":
        """On some of the traces."""
        return Curve({b: x[rows] for b, x in self.excess.items()}, self.full_n[rows])

    def percent(self, count_rn: np.ndarray | None = None) -> np.ndarray:
        """Added loss in % of the full cache's, [budgets], or [r, budgets] of resamples.

        Args:
          count_rn: how often each trace is in each resample.
        """
        excess_nb = np.stack([self.excess[b] for b in self.budgets], axis=-1)
        count_rn = np.ones(len(self.full_n)) if count_rn is None else count_rn
        return 100 * (count_rn @ excess_nb) / (count_rn @ self.full_n)[..., None]

    def again(self) -> np.ndarray:
        """`percent` of bootstrap resamples over traces, [RESAMPLES, budgets]; always the same."""
        n = len(self.full_n)
        return self.percent(np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES))

    def ends(self) -> np.ndarray:
        """Ends of the 95 % intervals of `percent`, [2, budgets]."""
        return np.quantile(self.again(), (0.025, 0.975), axis=0)


def smallest(budgets: Sequence[int], percent_xb: np.ndarray, limit: float) -> np.ndarray:
    """The smallest budget from which on all are within the limit, [...]; `MORE` if none is.

    Args:
      budgets: measured, ascending.
      percent_xb: loss added at each.
    """
    within = percent_xb <= limit
    from_here = np.logical_and.accumulate(within[..., ::-1], axis=-1)[..., ::-1]
    values = np.append(np.array(budgets, float), MORE)
    index = np.where(from_here.any(-1), from_here.argmax(-1), len(budgets))
    return values[index]


@dataclasses.dataclass(frozen=True)
class Advice:
    """The smallest budget of a policy within a limit.

    Attributes:
      limit: loss that may be added, % of the full cache's.
      budget: `MORE` if no measured budget is within.
      low, high: its 95 % interval over traces.
      added: loss added at `budget` with its 95 % interval, %; None for `MORE`.
      least, most: the measured budgets it was found among.
    """

    limit: float
    budget: float
    low: float
    high: float
    added: tuple[float, float, float] | None
    least: int
    most: int

    def said(self, budget: float) -> str:
        """A budget in words, never one that was not measured."""
        if budget == MORE:
            return f"more than {self.most}"
        return f"at most {int(budget)}" if budget == self.least else str(int(budget))


def advise(curve: Curve, limit: float) -> Advice:
    """The smallest budget within a limit, and its interval."""
    budgets, percent_b = curve.budgets, curve.percent()
    found = float(smallest(budgets, percent_b, limit))
    again_rb = curve.again()
    ends = np.sort(smallest(budgets, again_rb, limit))
    low, high = ends[int(0.025 * RESAMPLES)], ends[-1 - int(0.025 * RESAMPLES)]
    added = None
    if found != MORE:
        at = budgets.index(int(found))
        added = (float(percent_b[at]), *np.quantile(again_rb[:, at], (0.025, 0.975)).tolist())
    return Advice(limit, found, float(low), float(high), added, budgets[0], budgets[-1])


def halfway(curve: Curve, limit: float, interval: int) -> int | None:
    """A budget between the answer and the next smaller one measured, a multiple of `L`, if any."""
    found = float(smallest(curve.budgets, curve.percent(), limit))
    if found in (MORE, curve.budgets[0]):
        return None
    below = max(b for b in curve.budgets if b < found)
    middle = (below + int(found)) // 2 // interval * interval
    middle = middle if middle > below else middle + interval
    return middle if middle < found else None


def per_head(lost: Mapping[int, np.ndarray], most: float) -> np.ndarray:
    """The cheapest budgets per head that together lose no more attention than `most`.

    From the smallest budget on, the head that gains most attention per slot is raised, until enough
    is retained; of curves that flatten, as these do, that is the cheapest, up to the last step.

    Args:
      lost: by budget, attention lost by each head, [layers, KV heads].
      most: their sum that is allowed.

    Returns:
      A budget for each, whole numbers [layers, KV heads].
    """
    budgets = sorted(lost)
    lost_bx = np.stack([lost[b].ravel() for b in budgets]).astype(float)
    lost_bx = np.minimum.accumulate(lost_bx, axis=0)  # a larger budget is never worse
    slots = np.array(budgets)
    at_x = np.zeros(lost_bx.shape[1], int)
    heads = np.arange(len(at_x))
    while lost_bx[at_x, heads].sum() > most + 1e-9 and (at_x < len(budgets) - 1).any():
        gain_bx = lost_bx[at_x, heads][None] - lost_bx
        more_bx = slots[:, None] - slots[at_x][None]
        rate_bx = np.where(more_bx > 0, gain_bx / np.maximum(more_bx, 1), -1.0)
        to, head = np.unravel_index(rate_bx.argmax(), rate_bx.shape)
        at_x[head] = to
    return slots[at_x].reshape(lost[budgets[0]].shape)
