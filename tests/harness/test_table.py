"""Errors and differences of metrics, against closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from fkv.evaluation import accuracy
from fkv.harness import table
from fkv.harness.table import Column, Part


def mean(values):
    return sum(values) / len(values)


def perplexity(pairs):
    logprobs, words = zip(*pairs, strict=True)
    return math.exp(-sum(logprobs) / sum(words))


def judged(**tasks):
    return {
        (name, "none"): {i: {"m": x} for i, x in enumerate(values)}
        for name, values in tasks.items()
    }


def column(*names, aggregate=mean, by_size=True):
    return Column("c", "m", tuple(Part(x, "m", "none", aggregate) for x in names), by_size)


RNG = np.random.default_rng(0)
OURS, FULL = RNG.normal(size=(2, 12)) * 3


def test_a_mean_has_the_errors_of_the_textbook():
    one = table.measure(column("t"), judged(t=OURS), judged(t=FULL))
    assert one.documents == 12
    assert one.value == pytest.approx(OURS.mean())
    assert one.error == pytest.approx(stats.sem(OURS))
    low, high = stats.ttest_rel(OURS, FULL).confidence_interval(0.95)
    assert one.difference.value == pytest.approx((OURS - FULL).mean())
    assert (one.difference.low, one.difference.high) == pytest.approx((low, high))


def test_shares_have_the_intervals_of_accuracies():
    ours, full = RNG.integers(2, size=(2, 30))
    one = table.measure(column("t"), judged(t=ours.tolist()), judged(t=full.tolist()))
    assert one.difference == accuracy.difference(ours, full)
    same = table.measure(column("t"), judged(t=[1] * 9), judged(t=[1] * 9)).difference
    assert same.value == 0 and same.low < 0 < same.high  # few documents are not certain


def test_a_perplexity_has_the_errors_of_the_delta_method():
    words = RNG.integers(50, 150, 400)
    ours, full = (-RNG.normal(2 * words, words**0.5) for _ in range(2))
    pairs = [list(zip(x.tolist(), words.tolist(), strict=True)) for x in (ours, full)]
    one = table.measure(
        column("t", aggregate=perplexity), judged(t=[list(x) for x in pairs[0]]), judged(t=pairs[1])
    )

    def parts(logprobs):
        value = perplexity(list(zip(logprobs, words, strict=True)))
        return value, value * (-logprobs - math.log(value) * words) / words.mean()

    (value, mine), (other, theirs) = parts(ours), parts(full)
    assert one.value == pytest.approx(value)
    assert one.error == pytest.approx(stats.sem(mine), rel=0.02)
    assert one.difference.value == pytest.approx(value - other)
    half = stats.sem(mine - theirs) * stats.t.ppf(0.975, 399)
    assert one.difference.high - one.difference.value == pytest.approx(half, rel=0.02)


def test_documents_are_left_out_in_groups_where_there_are_many():
    many = RNG.normal(size=5000)
    error = table.measure(column("t"), judged(t=many), None).error
    assert error == pytest.approx(stats.sem(many), rel=0.1)


def test_differences_are_of_the_documents_that_both_have():
    full = {("t", "none"): {i: {"m": x} for i, x in enumerate(FULL) if i != 3}}
    some = np.delete(OURS - FULL, 3)
    one = table.measure(column("t"), judged(t=OURS), full)
    assert one.difference.value == pytest.approx(some.mean()) and one.documents == 12


def test_tasks_of_a_group_count_by_size_or_alike():
    ours = judged(a=[1.0, 3.0, 5.0], b=[10.0])
    for by_size, value in ((True, 4.75), (False, 6.5)):
        got = table.measure(column("a", "b", by_size=by_size), ours, None)
        assert got.value == pytest.approx(value) and got.documents == 4
    ours, full = ({"a": x[:7], "b": x[7:]} for x in (OURS, FULL))
    one = table.measure(column("a", "b", by_size=False), judged(**ours), judged(**full))
    gains = [ours[x] - full[x] for x in "ab"]
    assert one.difference.value == pytest.approx(np.mean([x.mean() for x in gains]))
    error = sum(stats.sem(x) ** 2 for x in gains) ** 0.5 / 2
    # Of two means with different errors, as Welch's test has it.
    free = stats.ttest_ind(gains[0], -gains[1], equal_var=False).df
    half = error * stats.t.ppf(0.975, free)
    assert one.difference.high - one.difference.value == pytest.approx(half)


def test_what_has_no_values_or_one():
    assert table.measure(column("t"), judged(u=[1]), None) is None
    one = table.measure(column("t"), judged(t=[2.0]), judged(t=[1.0]))
    assert one.value == 2 and math.isnan(one.error) and one.difference is None
    assert table.measure(column("t", "gone"), judged(t=[2.0, 4.0]), None).value == 3


def test_a_length_counts_its_own_documents():
    """Synthetic tasks say -1 for those of others."""
    part = Part("t", "128", "none", lambda values: mean([x for x in values if x != -1]))
    found = {("t", "none"): {i: {"128": x} for i, x in enumerate([-1.0, 0.5, 1.0, -1.0])}}
    one = table.measure(Column("t", "128", (part,)), found, found)
    assert (one.documents, one.value) == (2, 0.75)
    assert one.difference.value == 0


def test_a_row_says_values_errors_and_differences():
    columns = [column("t"), column("gone")]
    ours, full = judged(t=[1, 0, 1, 1]), judged(t=[1, 1, 1, 1])
    measured = [table.measure(one, ours, full) for one in columns]
    head = table.head(columns, True)
    row = table.row(("h2o", 32), 1.25, measured, True, 4)
    assert len(head) == len(row) == 7
    assert row[:4] == ["h2o", "32, prompt 4", "1.2", "0.750 ± 0.250"]
    assert row[4].startswith("-0.250 (-") and row[5:] == ["", ""]
    (line,) = table.csv_rows(("h2o", 32), 1.25, columns, measured)
    assert line[:7] == ["h2o", 32, "c", "m", "none", 4, 0.75] and len(line) == len(table.CSV)
