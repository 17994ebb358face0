"""pass@1 of each policy, with confidence intervals.

Intervals are over problems, as samples of one problem are not independent. They are exact
(Clopper-Pearson) for one sample per problem, and bootstrapped for several. Differences are paired
by problem; their intervals are Wald's after adding one problem won and one lost (Bonett and Price,
J. Educ. Behav. Stat. 37, 2012), which keeps the coverage when few problems differ.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fkv.cache.cadence import said_budget
from fkv.evaluation import answers, tables
from fkv.evaluation.math_answers import FAILED, NO_ANSWER, TIMEOUT

Cell = tuple[str, int]  # policy and budget, 0 for the full cache


def exact_interval(right: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share, observed as `right` of `n`."""
    from scipy import special  # slow to import

    tail = (1 - level) / 2
    low = special.betaincinv(right, n - right + 1, tail) if right > 0 else 0.0
    high = special.betaincinv(right + 1, n - right, 1 - tail) if right < n else 1.0
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of two accuracies on the same problems, as shares, with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In points."""
        return f"{100 * self.value:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def difference(ours_p: np.ndarray, theirs_p: np.ndarray, level: float = 0.95) -> Difference:
    """Our accuracy minus theirs, from the share of right answers per problem."""
    from scipy import special

    gain_p = np.subtract(ours_p, theirs_p, dtype=float)
    shrunk_p = np.append(gain_p, [1.0, -1.0])
    half = special.ndtri((1 + level) / 2) * shrunk_p.std() / len(shrunk_p) ** 0.5
    low, high = np.clip([shrunk_p.mean() - half, shrunk_p.mean() + half], -1, 1)
    return Difference(float(gain_p.mean()), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """One policy at one budget; shares and means are over all of its answers."""

    policy: str
    budget: int  # 0 is the full cache
    right_pn: np.ndarray  # verdicts, [problems, samples] bool
    tokens: float  # mean length
    truncated: float  # share that hit the limit on new tokens
    evictions: float  # mean number of those that a later token attends after
    lost: int | None = None  # samples that only the full cache answers right, if it ran
    gained: int | None = None  # samples that only this policy answers right
    no_answer: float = 0.0  # share without an answer
    undecided: tuple[int, int] = (0, 0)  # counted as wrong: deadline exceeded, math-verify failed
    difference: Difference | None = None  # to the full cache, if it ran
    trained: str = ""  # the scorers' budget in training, see `Trained.at`
    protect_prompt: int = 0  # of the cadence

    def __repr__(self) -> str:
        problems, samples = self.right_pn.shape
        where = f"B = {self.budget}" if self.budget else "full cache"
        asked = f"{problems} problems" + (f" x {samples} samples" if samples > 1 else "")
        return f"Accuracy({self.policy!r}, {where}, {asked}, pass@1 {100 * self.pass_at_1:.1f} %)"

    @property
    def pass_at_1(self) -> float:
        """Mean over problems and samples."""
        return float(self.right_pn.mean())

    def interval(self, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of `pass_at_1` over problems, deterministic.

        Where a bootstrap is degenerate, as all problems have one share, it is `exact_interval`.
        """
        per_problem = self.right_pn.mean(1)
        n = len(per_problem)
        if self.right_pn.shape[1] == 1 or np.ptp(per_problem) == 0:
            return exact_interval(float(per_problem.sum()), n, level)
        rng = np.random.default_rng(0)
        means = per_problem[rng.integers(0, n, (resamples, n))].mean(1)
        return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist())


def verdicts(rows: Iterable[Mapping]) -> dict[tuple[str, int], bool]:
    """Whether each answer is right, by problem and sample."""
    return {(row["problem"], row["sample"]): answers.right(row) for row in rows}


def by_cell(rows: Iterable[Mapping]) -> dict[Cell, list[Mapping]]:
    """Rows of `samples.jsonl`, by policy and budget."""
    found = {}
    for row in rows:
        found.setdefault((row["policy"], row["budget"]), []).append(row)
    return found


def paired(
    ours: Mapping[tuple[str, int], bool], theirs: Mapping[tuple[str, int], bool]
) -> tuple[int, int, Difference | None]:
    """Compares `verdicts` on common samples.

    Returns:
      How many only they answer right, how many only we do, and the difference paired by problem;
      None without common samples.
    """
    common = [key for key in ours if key in theirs]
    pairs, both = [(ours[key], theirs[key]) for key in common], {}
    for (problem, _), pair in zip(common, pairs, strict=True):
        both.setdefault(problem, []).append(pair)
    lost, gained = pairs.count((False, True)), pairs.count((True, False))
    if not both:
        return lost, gained, None
    here_p, there_p = np.array([np.mean(found, axis=0) for found in both.values()]).T
    return lost, gained, difference(here_p, there_p)


def summarise(rows: Iterable[Mapping]) -> list[Accuracy]:
    """Accuracies of all policies and budgets, in order, from rows of `samples.jsonl`."""
    cells = by_cell(rows)
    full = cells.get(("full", 0))
    return [_summary(cell, found, full) for cell, found in cells.items()]


def _summary(cell: Cell, rows: Sequence[Mapping], full: Sequence[Mapping] | None) -> Accuracy:
    own = verdicts(rows)
    problems = dict.fromkeys(problem for problem, _ in own)
    samples = sorted({sample for _, sample in own})
    lost, gained, against = (None,) * 3 if full is None else paired(own, verdicts(full))
    says = [row["verdict"] for row in rows]
    # The embedded task counts a missing answer as wrong.
    mute = [r["verdict"] == NO_ANSWER or r.get("answer", "") is None for r in rows]
    means = ([row[name] for row in rows] for name in ("tokens", "truncated", "evictions"))
    return Accuracy(
        *cell,
        np.array([[own[p, s] for s in samples] for p in problems]),
        *(float(np.mean(values)) for values in means),
        lost=lost,
        gained=gained,
        no_answer=float(np.mean(mute)),
        undecided=(says.count(TIMEOUT), says.count(FAILED)),
        difference=None if rows is full else against,
    )


HEAD = (
    "policy", "budget", "pass@1", "95 % interval", "tokens", "cut off", "no answer", "evictions",
    "points to full", "lost", "gained", "trained at",
)  # fmt: skip


def cells(result: Accuracy) -> list[str]:
    """One row of the table, as text."""
    low, high = result.interval()
    return [
        result.policy,
        said_budget(result.budget, result.protect_prompt),
        f"{100 * result.pass_at_1:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        f"{result.tokens:.0f}",
        f"{100 * result.truncated:.1f} %",
        f"{100 * result.no_answer:.1f} %",
        f"{result.evictions:.1f}",
        *("" if x is None else str(x) for x in (result.difference, result.lost, result.gained)),
        result.trained,
    ]


def csv(results: Sequence[Accuracy]) -> str:
    """CSV, with shares instead of points."""
    head = (
        "policy,budget,answers,pass_at_1,low,high,tokens,cut off,no answer,evictions,difference,"
        "difference_low,difference_high,lost,gained,trained_at,protect_prompt"
    )
    rows = []
    for r in results:
        against = (None,) * 3 if r.difference is None else dataclasses.astuple(r.difference)
        means = (r.tokens, r.truncated, r.no_answer, r.evictions)
        row = [r.policy, r.budget, r.right_pn.size, r.pass_at_1, *r.interval(), *means, *against]
        rows.append([*row, r.lost, r.gained, r.trained, r.protect_prompt])
    return tables.comma_separated(head.split(","), rows)


def warnings(results: Sequence[Accuracy], deadline: float) -> list[str]:
    """Reasons to doubt the results, one line each."""
    lines = []
    mute = [r for r in results if r.no_answer == 1]
    if mute:
        cut = " (all of them cut off: raise evaluate.new_tokens?)"
        names = [f"{r.policy} {r.budget or ''}".strip() + cut * (r.truncated == 1) for r in mute]
        lines.append(f"no answer was found in any text of {', '.join(names)}")
    late, failed = (sum(r.undecided[i] for r in results) for i in range(2))
    if late:
        lines.append(f"{late} answers count as wrong: evaluate.deadline = {deadline:g} s exceeded")
    if failed:
        lines.append(f"{failed} answers count as wrong: math-verify failed on them")
    return lines
