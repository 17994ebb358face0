"""Loss ratios of policies against a baseline's, paired by trace.

Policies share traces, and a trace that is hard for one is hard for all: a difference taken trace by
trace has a much smaller error than the two ratios have. Errors are standard errors over traces, by
the delta method.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fkv.evaluation.loss_ratio import Losses, standard_error

Estimate = tuple[float, float]  # a value and its standard error, NaN for one trace


@dataclasses.dataclass(frozen=True)
class Paired:
    """One policy against the baseline of its budget.

    Attributes:
      baseline: the name of the baseline, empty if there is none.
      difference: the policy's loss ratio minus the baseline's; None for the full cache, or without
        a baseline.
      gap_closed: the share of the gap between the baseline and golden eviction that the policy
        closes; None likewise, for golden eviction itself, and where it is no better than the
        baseline.
    """

    baseline: str = ""
    difference: Estimate | None = None
    gap_closed: Estimate | None = None


def difference(ours: Losses, theirs: Losses, kind: int = 0) -> Estimate:
    """Our loss ratio minus theirs on the same traces.

    Args:
      kind: of tokens: all (0), low-entropy (1) or high-entropy (2).
    """
    (our_ratio, our_part), (their_ratio, their_part) = (_parts(x, kind) for x in (ours, theirs))
    return our_ratio - their_ratio, standard_error(our_part - their_part)


def gap_closed(ours: Losses, baseline: Losses, golden: Losses, kind: int = 0) -> Estimate | None:
    """The share of the gap between a baseline and golden eviction that we close.

    Returns:
      (baseline - ours) / (baseline - golden) of loss ratios, and its error; None if the gap is not
      above zero.
    """
    (our, our_part), (base, base_part), (gold, gold_part) = (
        _parts(x, kind) for x in (ours, baseline, golden)
    )
    gap = base - gold
    if not gap > 0:
        return None
    share = (base - our) / gap
    return share, standard_error((base_part - our_part - share * (base_part - gold_part)) / gap)


def _parts(losses: Losses, kind: int) -> tuple[float, np.ndarray]:
    """A loss ratio, and by how much each trace moves it: the ratio's linearisation, [n]."""
    evicted, full = losses.evicted[:, kind], losses.full[:, kind]
    ratio = float(evicted.sum() / full.sum())
    return ratio, (evicted - ratio * full) / full.mean()


def against_baseline(results: Sequence[Losses], baseline: str = "") -> list[Paired]:
    """Every policy against the baseline of its budget, in the order of `results`.

    Args:
      results: full, golden and policies at several budgets.
      baseline: the name of one of the policies; empty for the rule-based policy of lowest loss
        ratio at each budget. It is chosen on the same traces, so it looks better than it is, and
        what is compared with it rather worse.
    """
    cells = {(r.policy, r.budget): r for r in results}
    best: dict[int, Losses] = {}
    for r in results:
        wanted = r.policy == baseline if baseline else r.rule
        held = best.get(r.budget)
        if wanted and (held is None or r.ratio()[0] < held.ratio()[0]):
            best[r.budget] = r
    found = []
    for r in results:
        base, golden = best.get(r.budget), cells.get(("golden", r.budget))
        if base is None:
            found.append(Paired())
        elif r.policy == "full":
            found.append(Paired(base.policy))
        else:
            has_gap = golden is not None and r is not golden
            closed = gap_closed(r, base, golden) if has_gap else None
            found.append(Paired(base.policy, difference(r, base), closed))
    return found
