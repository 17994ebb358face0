"""pass@1: how many answers are right under each policy, and how sure that figure is."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fkv.evaluation.math_answers import RIGHT


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """One policy at one budget.

    Attributes:
      policy, budget: what ran; budget 0 is the full cache.
      right_pn: verdicts, [problems, samples] bool.
      tokens: mean length of the answers.
      truncated: share cut off by the limit on new tokens.
      evictions: mean number of evictions that a later token could notice.
      lost, gained: samples that the full cache answers and this one doesn't, and the reverse;
        None without a full cache to compare with.
    """

    policy: str
    budget: int
    right_pn: np.ndarray
    tokens: float
    truncated: float
    evictions: float
    lost: int | None = None
    gained: int | None = None

    @property
    def pass_at_1(self) -> float:
        """Mean over problems and samples."""
        return float(self.right_pn.mean())

    def interval(self, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap confidence interval of `pass_at_1`, over problems; the same every time."""
        per_problem = self.right_pn.mean(1)
        rng = np.random.default_rng(0)
        n = len(per_problem)
        means = per_problem[rng.integers(0, n, (resamples, n))].mean(1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def summarise(rows: Sequence[Mapping]) -> list[Accuracy]:
    """Accuracies of all policies and budgets, in the order in which they come.

    Args:
      rows: of `samples.jsonl`: policy, budget, problem, sample, verdict, tokens, truncated,
        evictions.
    """
    cells = {}
    for row in rows:
        cells.setdefault((row["policy"], row["budget"]), {})[row["problem"], row["sample"]] = row
    full = cells.get(("full", 0))
    found = []
    for (policy, budget), cell in cells.items():
        problems = list(dict.fromkeys(problem for problem, _ in cell))
        samples = sorted({sample for _, sample in cell})
        right = {key: row["verdict"] == RIGHT for key, row in cell.items()}
        lost = gained = None
        if full is not None:
            both = [(right[key], full[key]["verdict"] == RIGHT) for key in cell if key in full]
            lost = sum(theirs and not ours for ours, theirs in both)
            gained = sum(ours and not theirs for ours, theirs in both)
        mean = {
            name: float(np.mean([row[name] for row in cell.values()]))
            for name in ("tokens", "truncated", "evictions")
        }
        found.append(
            Accuracy(
                policy,
                budget,
                np.array([[right[p, s] for s in samples] for p in problems]),
                lost=lost,
                gained=gained,
                **mean,
            )
        )
    return found


HEAD = (
    "policy",
    "budget",
    "pass@1",
    "95 % interval",
    "tokens",
    "cut off",
    "evictions",
    "lost",
    "gained",
)


def cells(result: Accuracy) -> list[str]:
    """One row of the table, as text."""
    low, high = result.interval()
    return [
        result.policy,
        str(result.budget) if result.budget else "",
        f"{100 * result.pass_at_1:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        f"{result.tokens:.0f}",
        f"{100 * result.truncated:.1f} %",
        f"{result.evictions:.1f}",
        *("" if n is None else str(n) for n in (result.lost, result.gained)),
    ]
