"""Tables of `fkv.evaluation.recall`: agreement by prompt, look-ups by document, both paired.

Errors are over prompts, and over documents, as the look-ups of a document are not independent.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fkv.cache.cadence import said_budget
from fkv.evaluation import tables
from fkv.evaluation.accuracy import Difference, exact_interval

Estimate = tuple[float, float]  # a value and its standard error, NaN for one cluster


def share(sum_n: np.ndarray, count_n: np.ndarray) -> Estimate:
    """A sum over n clusters per counted thing, and its standard error (delta method)."""
    value, n = float(np.sum(sum_n) / np.sum(count_n)), len(sum_n)
    rest = np.asarray(sum_n) - value * np.asarray(count_n)
    error = rest.std(ddof=1) / (np.mean(count_n) * n**0.5) if n > 1 else np.nan
    return value, float(error)


def by_document(value_n: Sequence[float], document_n: Sequence[str]) -> np.ndarray:
    """Sums of each document, in order of their first look-up."""
    index = {name: i for i, name in enumerate(dict.fromkeys(document_n))}
    return np.bincount([index[name] for name in document_n], np.asarray(value_n, float))


# ---- agreement


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A policy at a budget along the full cache's continuations of n prompts.

    Attributes:
      budget: 0 for the full cache.
      tokens_n, first_n, same_n: of each continuation the tokens, those before the first that is not
        the policy's likeliest, and those that are.
      kl_n: KL(full || policy), nats, summed over its tokens.
      rule: whether the policy is rule-based.
      trained, protect_prompt: see `loss_ratio.Losses`.
    """

    policy: str
    budget: int
    tokens_n: np.ndarray
    first_n: np.ndarray
    same_n: np.ndarray
    kl_n: np.ndarray
    rule: bool = False
    trained: str = ""
    protect_prompt: int = 0

    @property
    def first(self) -> Estimate:
        """Tokens before the first difference; all of them where there is none."""
        return share(self.first_n, np.ones(len(self.first_n)))

    @property
    def never_n(self) -> np.ndarray:
        """Which continuations are equal to the end."""
        return self.first_n == self.tokens_n

    @property
    def kl(self) -> Estimate:
        """KL per token, nats."""
        return share(self.kl_n, self.tokens_n)

    @property
    def same(self) -> Estimate:
        """Share of tokens on which both agree, given the same past."""
        return share(self.same_n, self.tokens_n)


def best(results: Sequence, worth, baseline: str = "") -> dict[int, object]:
    """The baseline of each budget: that of this name, or the rule-based policy of highest worth."""
    found = {}
    for r in results:
        wanted = r.policy == baseline if baseline else r.rule
        if wanted and (r.budget not in found or worth(r) > worth(found[r.budget])):
            found[r.budget] = r
    return found


AGREEMENT_HEAD = (
    "policy", "budget", "tokens to the first difference", "median", "never", "same token", "KL",
    "KL to baseline", "trained at",
)  # fmt: skip


def agreement(results: Sequence[Agreement], baseline: str = "") -> tuple[list[list[str]], str]:
    """Rows of the table, and CSV; see `best` for the baseline."""
    bases = best(results, lambda r: -r.kl[0], baseline)
    rows, lines = [], []
    for r in results:
        base, n = bases.get(r.budget), len(r.first_n)
        never = share(r.never_n, np.ones(n))
        pairs = (None,) * 3
        if base is not None and r is not base:
            ones = np.ones(n)
            pairs = (
                share(r.kl_n - base.kl_n, r.tokens_n),
                share(r.same_n - base.same_n, r.tokens_n),
                share(r.first_n - base.first_n, ones),
            )
        rows.append(
            [
                r.policy,
                said_budget(r.budget, r.protect_prompt),
                _said("{:.1f}", r.first),
                f"{np.median(r.first_n):g}",
                _said("{:.0f}", never, 100, " %"),
                _said("{:.1f}", r.same, 100, " %"),
                _said("{:.3f}", r.kl),
                "baseline" if r is base else _said("{:+.3f}", pairs[0]),
                r.trained,
            ]
        )
        numbers = [*r.first, np.median(r.first_n), *never, *r.same, *r.kl]
        numbers += [x for pair in pairs for x in pair or (np.nan, np.nan)]
        lines.append([r.policy, r.budget, n, int(r.tokens_n.sum()), *map(_number, numbers)])
        lines[-1] += ["" if base is None else base.policy, r.trained, r.protect_prompt]
    head = (
        "policy,budget,prompts,tokens,first,first_se,first_median,never,never_se,same,same_se,kl,"
        "kl_se,kl_difference,kl_difference_se,same_difference,same_difference_se,first_difference,"
        "first_difference_se,baseline,trained_at,protect_prompt"
    ).split(",")
    return rows, tables.comma_separated(head, lines)


# ---- look-ups


@dataclasses.dataclass(frozen=True)
class Found:
    """A policy at a budget on n look-ups.

    Attributes:
      budget: 0 for the full cache.
      right_n: whether the answer is the greedy one.
      nll_n: negative log-likelihood of the answer, nats.
      document_n, kind_n: of each look-up.
      rule, trained, protect_prompt: see `Agreement`.
    """

    policy: str
    budget: int
    right_n: np.ndarray
    nll_n: np.ndarray
    document_n: Sequence[str]
    kind_n: Sequence[str]
    rule: bool = False
    trained: str = ""
    protect_prompt: int = 0

    @property
    def right(self) -> float:
        """Share of right answers."""
        return float(np.mean(self.right_n))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Exact interval of the share, with the effective number of look-ups.

        That is, those that would have the same error if they were independent (Korn and Graubard,
        Surv. Methodol. 24, 1998).
        """
        n, p = len(self.right_n), self.right
        error = share(self._sums(self.right_n), self._sums(np.ones(n)))[1]
        if error > 0:
            n = min(n, p * (1 - p) / error**2)
        return exact_interval(p * n, n, level)

    def nll(self) -> Estimate:
        """Mean over look-ups."""
        return share(self._sums(self.nll_n), self._sums(np.ones(len(self.nll_n))))

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Right answers and look-ups of each kind."""
        kinds, right = np.asarray(self.kind_n), np.asarray(self.right_n)
        return {
            kind: (int(right[kinds == kind].sum()), int((kinds == kind).sum()))
            for kind in sorted(set(self.kind_n))
        }

    def _sums(self, value_n):
        return by_document(value_n, self.document_n)


def difference(ours: Found, theirs: Found, level: float = 0.95) -> Difference:
    """Our share minus theirs, paired by document.

    The interval is Wald's after adding a document in which a look-up is won and one in which one is
    lost, as `accuracy.difference` adds problems.
    """
    from scipy import special  # slow to import

    gain = ours.right_n.astype(float) - theirs.right_n
    sums, counts = (by_document(x, ours.document_n) for x in (gain, np.ones(len(gain))))
    value = float(gain.mean())
    middle, error = share(
        np.append(sums, [1.0, -1.0]), np.append(counts, [counts.mean(), counts.mean()])
    )
    half = special.ndtri((1 + level) / 2) * error
    low, high = np.clip([middle - half, middle + half], -1, 1)
    return Difference(value, float(low), float(high))


LOOKUPS_HEAD = (
    "policy", "budget", "right", "95 % interval", "points to baseline", "nats of the answer",
)  # fmt: skip


def lookups(results: Sequence[Found], baseline: str = "") -> tuple[list[str], list[list[str]], str]:
    """Head and rows of the table, and CSV; see `best` for the baseline."""
    bases = best(results, lambda r: (r.right, -r.nll()[0]), baseline)
    kinds = list(results[0].by_kind()) if results else []
    rows, lines = [], []
    for r in results:
        base, (low, high) = bases.get(r.budget), r.interval()
        against = None if base is None or r is base else difference(r, base)
        by_kind = r.by_kind()
        rows.append(
            [
                r.policy,
                said_budget(r.budget, r.protect_prompt),
                f"{100 * r.right:.1f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                "baseline" if r is base else "" if against is None else str(against),
                _said("{:.2f}", r.nll()),
                *(f"{100 * x / n:.0f}" for x, n in by_kind.values()),
                r.trained,
            ]
        )
        pair = (None,) * 3 if against is None else dataclasses.astuple(against)
        lines.append([r.policy, r.budget, len(r.right_n), r.right, low, high, *pair, *r.nll()])
        lines[-1] += [x / n for x, n in by_kind.values()]
        lines[-1] += ["" if base is None else base.policy, r.trained, r.protect_prompt]
    head = ("policy,budget,lookups,right,low,high,difference,difference_low,difference_high").split(
        ","
    )
    head += ["nll", "nll_se", *(f"right_{kind}" for kind in kinds)]
    head += ["baseline", "trained_at", "protect_prompt"]
    shown = [*LOOKUPS_HEAD, *(f"{kind} %" for kind in kinds), "trained at"]
    return shown, rows, tables.comma_separated(head, lines)


def note(tried: Sequence[Mapping], chosen: int) -> str:
    """How the look-ups were chosen, and what the columns are."""
    right = sum(row["right"] for row in tried)
    return (
        f"{chosen} look-ups: of {len(tried)} candidates the full cache answers {right}, and these "
        "not without the line that has the answer; the full cache alone chose them, so it has all "
        "of them right. Right: all tokens of the answer are the greedy ones, in %; points to "
        "baseline with 95 % intervals, both over documents; golden eviction knows all questions."
    )


def _number(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.6g}"


def _said(form: str, estimate: Estimate | None, scale: float = 1, unit: str = "") -> str:
    if estimate is None or np.isnan(estimate[0]):
        return ""
    value, error = (scale * x for x in estimate)
    plus = "" if np.isnan(error) else f" ± {form.replace('+', '').format(error)}"
    return f"{form.format(value)}{plus}{unit}"
