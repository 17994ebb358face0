"""Budget advice against brute force: every budget, every allocation, every resample."""

import itertools
import math

import numpy as np
import pytest

from fkv.evaluation import advice
from fkv.evaluation.advice import MORE, Curve

LADDER, INTERVAL = (32, 64, 128, 256), 16


def curve(budgets=LADDER, n=40, scale=30.0, power=2.0, seed=0):
    """Excess that falls with the budget, from traces of different lengths and hardness."""
    rng = np.random.default_rng(seed)
    full, hard = 100 * rng.gamma(5, 0.2, n), rng.gamma(2, 0.5, n)
    return Curve({b: full * hard * scale / b**power for b in budgets}, full)


def plainly(one, limit):
    """The answer by the definition, budget by budget."""
    for budget in sorted(one.excess):
        later = [b for b in one.excess if b >= budget]
        if all(100 * one.excess[b].sum() / one.full_n.sum() <= limit for b in later):
            return budget
    return MORE


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.2, 0.5, 1, 3, 5])
def test_the_smallest_budget_is_that_of_its_definition(limit):
    for one in (curve(), curve(seed=1), curve(power=1.5)):
        # A larger budget may be worse: then it decides.
        worse = Curve({**one.excess, 128: one.excess[32]}, one.full_n)
        for some in (one, worse):
            assert advice.advise(some, limit).budget == plainly(some, limit)


@pytest.mark.parametrize("limit", [0.1, 0.3, 1, 2])
def test_halving_ends_where_every_multiple_of_the_interval_would(limit):
    every = curve(range(32, 257, INTERVAL))
    some, asked = Curve({b: every.excess[b] for b in LADDER}, every.full_n), 0
    while (new := advice.halfway(some, limit, INTERVAL)) is not None:
        assert new % INTERVAL == 0 and new not in some.excess and 32 < new < 256
        some, asked = Curve({**some.excess, new: every.excess[new]}, every.full_n), asked + 1
    assert advice.advise(some, limit).budget == plainly(every, limit)
    assert asked <= 3  # log2 of the widest step in intervals


def test_nothing_is_said_beyond_what_was_measured():
    one = curve()
    none = advice.advise(one, 1e-4)
    assert (none.budget, none.low, none.high, none.added) == (MORE, MORE, MORE, None)
    assert none.said(none.budget) == "more than 256"
    least = advice.advise(one, 1e4)
    assert least.said(least.budget) == "at most 32" and least.added is not None
    assert advice.halfway(one, 1e-4, INTERVAL) is None is advice.halfway(one, 1e4, INTERVAL)
    inside = advice.advise(one, 0.5)
    assert inside.said(inside.budget) == str(int(inside.budget))


def test_intervals_hold_the_share_of_resamples_that_they_say():
    one, limit = curve(n=12, seed=3), 1.0
    found, rng = advice.advise(one, limit), np.random.default_rng(0)
    again = []
    for _ in range(1000):
        again.append(plainly(one.take(rng.integers(0, 12, 12)), limit))
    within = np.mean([found.low <= x <= found.high for x in again])
    assert within >= 0.95 and found.low < found.high
    assert advice.advise(one, limit) == found  # deterministic
    value, low, high = found.added
    assert low < value < high and value <= limit


def test_budgets_by_head_are_the_cheapest():
    rng, ladder = np.random.default_rng(0), (16, 32, 48)
    for _ in range(20):
        # Curves that flatten, as the gains of retained attention do.
        gain = np.sort(rng.random((2, 2, 2)), axis=0)[::-1]
        lost = dict(
            zip(ladder, 3 - np.concatenate([np.zeros((1, 2, 2)), gain.cumsum(0)]), strict=True)
        )
        most = float(lost[32].sum())
        found = advice.per_head(lost, most)

        def total(budgets, lost=lost):
            return sum(lost[b][i] for b, i in zip(budgets, np.ndindex(2, 2), strict=True))

        allowed = [x for x in itertools.product(ladder, repeat=4) if total(x) <= most + 1e-9]
        best = min(map(sum, allowed))
        assert total(found.ravel().tolist()) <= most + 1e-9
        assert best <= found.sum() <= best + 16  # up to the last step
        assert found.sum() <= 4 * 32  # never dearer than one budget for all


def test_heads_that_gain_nothing_keep_the_least():
    lost = {16: np.array([[0.5, 0.0]]), 32: np.array([[0.1, 0.0]]), 64: np.array([[0.0, 0.1]])}
    assert advice.per_head(lost, 0.1).tolist() == [[32, 16]]
    assert advice.per_head(lost, 0.0).tolist() == [[64, 16]]
    assert math.isinf(MORE)
