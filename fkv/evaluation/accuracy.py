"""pass@1: how many answers are right under each policy, and how sure that figure is.

Intervals are over problems, which are drawn; samples of one problem are no evidence of their own.
One sample a problem has the exact (Clopper-Pearson) interval, several the bootstrap's. Differences
are paired by problem; theirs are Wald intervals after a problem won and one lost have been added
(Bonett and Price, J. Educ. Behav. Stat. 37, 2012), which hold what they promise for few
differences, too.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from fkv.evaluation import tables
from fkv.evaluation.math_answers import FAILED, NO_ANSWER, RIGHT, TIMEOUT


def exact_interval(right: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share of which `right` in `n` has been seen."""
    tail = (1 - level) / 2
    low = special.betaincinv(right, n - right + 1, tail) if right > 0 else 0.0
    high = special.betaincinv(right + 1, n - right, 1 - tail) if right < n else 1.0
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two shares of right answers to the same problems, with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In points."""
        return f"{100 * self.value:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def difference(ours_p: np.ndarray, theirs_p: np.ndarray, level: float = 0.95) -> Difference:
    """What ours have over theirs, from the share of right answers to each problem."""
    gain_p = np.subtract(ours_p, theirs_p, dtype=float)
    shrunk_p = np.append(gain_p, [1.0, -1.0])
    half = special.ndtri((1 + level) / 2) * shrunk_p.std() / len(shrunk_p) ** 0.5
    low, high = np.clip([shrunk_p.mean() - half, shrunk_p.mean() + half], -1, 1)
    return Difference(float(gain_p.mean()), float(low), float(high))


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
      no_answer: share in which no answer was found.
      undecided: how many were not checked to the end, and count as wrong: beyond the deadline, and
        those that broke the parser.
      difference: to the full cache; None for itself, and without it.
      trained: at which budget its scorers were trained, as `Trained.at` says it; else empty.
    """

    policy: str
    budget: int
    right_pn: np.ndarray
    tokens: float
    truncated: float
    evictions: float
    lost: int | None = None
    gained: int | None = None
    no_answer: float = 0.0
    undecided: tuple[int, int] = (0, 0)
    difference: Difference | None = None
    trained: str = ""

    @property
    def pass_at_1(self) -> float:
        """Mean over problems and samples."""
        return float(self.right_pn.mean())

    def interval(self, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of `pass_at_1`, over problems; the same every time.

        A bootstrap of equal problems says nothing: such have the exact interval, too, as if there
        were one sample of each.
        """
        per_problem = self.right_pn.mean(1)
        n = len(per_problem)
        if self.right_pn.shape[1] == 1 or np.ptp(per_problem) == 0:
            return exact_interval(float(per_problem.sum()), n, level)
        rng = np.random.default_rng(0)
        means = per_problem[rng.integers(0, n, (resamples, n))].mean(1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def paired(
    ours: Mapping[tuple[str, int], bool], theirs: Mapping[tuple[str, int], bool]
) -> tuple[int, int, Difference | None]:
    """Compares verdicts on the same samples, by (problem, sample); others are left out.

    Returns:
      How many theirs answer and ours don't, how many ours do and theirs don't, and the difference
      paired by problem, None without a common sample.
    """
    both = {}
    for key in ours:
        if key in theirs:
            both.setdefault(key[0], []).append((ours[key], theirs[key]))
    pairs = [pair for found in both.values() for pair in found]
    lost = sum(there and not here for here, there in pairs)
    gained = sum(here and not there for here, there in pairs)
    if not both:
        return lost, gained, None
    here_p, there_p = np.array([np.mean(found, axis=0) for found in both.values()]).T
    return lost, gained, difference(here_p, there_p)


def summarise(rows: Sequence[Mapping]) -> list[Accuracy]:
    """Accuracies of all policies and budgets, in the order in which they come.

    Args:
      rows: of `samples.jsonl`: policy, budget, problem, sample, verdict, tokens, truncated,
        evictions.
    """
    cells = {}
    for row in rows:
        cells.setdefault((row["policy"], row["budget"]), {})[row["problem"], row["sample"]] = row
    right = {
        name: {key: row["verdict"] == RIGHT for key, row in cell.items()}
        for name, cell in cells.items()
    }
    full = right.get(("full", 0))
    found = []
    for (policy, budget), cell in cells.items():
        problems = list(dict.fromkeys(problem for problem, _ in cell))
        samples = sorted({sample for _, sample in cell})
        own = right[policy, budget]
        lost, gained, against = (None, None, None) if full is None else paired(own, full)
        mean = {
            name: float(np.mean([row[name] for row in cell.values()]))
            for name in ("tokens", "truncated", "evictions")
        }
        verdicts = [row["verdict"] for row in cell.values()]
        found.append(
            Accuracy(
                policy,
                budget,
                np.array([[own[p, s] for s in samples] for p in problems]),
                lost=lost,
                gained=gained,
                no_answer=float(np.mean([_unanswered(row) for row in cell.values()])),
                undecided=(verdicts.count(TIMEOUT), verdicts.count(FAILED)),
                difference=None if own is full else against,
                **mean,
            )
        )
    return found


def _unanswered(row: Mapping) -> bool:
    # The embedded task calls an answer wrong that isn't there.
    return row["verdict"] == NO_ANSWER or row.get("answer", "") is None


HEAD = (
    "policy",
    "budget",
    "pass@1",
    "95 % interval",
    "tokens",
    "cut off",
    "no answer",
    "evictions",
    "points to full",
    "lost",
    "gained",
    "trained at",
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
        f"{100 * result.no_answer:.1f} %",
        f"{result.evictions:.1f}",
        "" if result.difference is None else str(result.difference),
        *("" if n is None else str(n) for n in (result.lost, result.gained)),
        result.trained,
    ]


def csv(results: Sequence[Accuracy]) -> str:
    """The same as comma-separated values; shares and differences of shares, not points."""
    head = (
        "policy,budget,answers,pass_at_1,low,high,tokens,cut off,no answer,evictions,difference,"
        "difference_low,difference_high,lost,gained,trained_at"
    ).split(",")
    rows = []
    for r in results:
        against = (None,) * 3 if r.difference is None else dataclasses.astuple(r.difference)
        mean = (r.tokens, r.truncated, r.no_answer, r.evictions)
        shares = (r.pass_at_1, *r.interval(), *mean, *against)
        rows.append([r.policy, r.budget, r.right_pn.size, *shares, r.lost, r.gained])
        rows[-1].append(r.trained)
    return tables.comma_separated(head, rows)


def warnings(results: Sequence[Accuracy], deadline: float) -> list[str]:
    """What to be told of results that may say nothing about the policies, a line each."""
    lines = []
    mute = [r for r in results if r.no_answer == 1]
    if mute:
        cut = " (all of them cut off: raise evaluate.new_tokens?)"
        names = [f"{r.policy} {r.budget or ''}".strip() + cut * (r.truncated == 1) for r in mute]
        lines.append(f"no answer was found in any text of {', '.join(names)}")
    late, failed = (sum(r.undecided[i] for r in results) for i in range(2))
    if late:
        lines.append(
            f"{late} answers count as wrong that could not be checked within evaluate.deadline = "
            f"{deadline:g} s"
        )
    if failed:
        lines.append(f"{failed} answers count as wrong that broke the parser")
    return lines
