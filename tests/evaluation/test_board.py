"""Leaderboards: intervals, ties, order and files, from losses and answers that are known."""

import csv as csv_module
import io
import json
import math

import numpy as np
import pytest
from scipy import stats

from fkv.evaluation import accuracy, board, charts, paired
from fkv.evaluation.accuracy import Accuracy
from fkv.evaluation.board import Cost, Interval
from tests.evaluation.test_paired import losses

POLICIES = ("golden", "foresight", "snapkv", "h2o")
N, PROBLEMS = 20, 50


def answers(policy, budget, share):
    right = np.random.default_rng([len(policy), budget]).random((PROBLEMS, 1)) < share
    return Accuracy(policy, budget, right, 10.0, 0.0, 2.0)


@pytest.fixture(scope="module")
def found():
    measured = [losses(p, b, N) for b in (16, 32) for p in reversed(POLICIES)]
    share = {"full": 1.0, "foresight": 0.8, "snapkv": 0.3, "h2o": 0.3}
    cells = [("full", 0), *((p, b) for b in (16, 32) for p in POLICIES[1:])]
    answered = [answers(p, b, share[p]) for p, b in cells]
    held = {("snapkv", 16): np.full((3, 2, 2), [[[0.25]], [[0.75]], [[math.nan]]])}
    costs = {cell: Cost(1000, 0.5, 2e6, 3e3) for cell in [*cells, ("golden", 16), ("golden", 32)]}
    return measured, answered, board.entries(measured, answered, held, costs)


def test_rows_are_sorted_by_loss_below_the_full_cache(found):
    _, _, entries = found
    assert [e.policy for e in entries[:3]] == ["full", "golden", "foresight"]
    assert [e.budget for e in entries] == [0, 16, 16, 16, 16, 32, 32, 32, 32]
    for budget in (16, 32):
        ratios = [e.ratio.value for e in entries if e.budget == budget]
        assert ratios == sorted(ratios)


def test_intervals_are_student_s_and_ties_contain_zero(found):
    measured, _, entries = found
    for e in entries[1:]:
        of = {r.policy: r for r in measured if r.budget == e.budget}
        value, error = of[e.policy].ratio()
        low, high = stats.t.interval(0.95, N - 1, value, error)
        assert (e.ratio.value, e.ratio.low, e.ratio.high) == pytest.approx((value, low, high))
        if e.policy == e.baseline:
            assert e.difference is None and e.points is None
            continue
        value, error = paired.difference(of[e.policy], of[e.baseline])
        low, high = stats.t.interval(0.95, N - 1, value, error)
        assert (e.difference.low, e.difference.high) == pytest.approx((low, high))
        assert e.difference.tie == (low <= 0 <= high)
    by_name = {(e.policy, e.budget): e for e in entries}
    assert not by_name["golden", 16].difference.tie
    assert {by_name[p, 16].baseline for p in POLICIES} <= {"snapkv", "h2o"}


def test_answers_are_paired_by_problem(found):
    _, answered, entries = found
    of = {(a.policy, a.budget): a for a in answered}
    one = next(e for e in entries if e.policy == "foresight" and e.budget == 16)
    ours, base = of["foresight", 16], of[one.baseline, 16]
    want = accuracy.difference(ours.right_pn.mean(1), base.right_pn.mean(1))
    assert (one.points.value, one.points.low) == (want.value, want.low)
    assert one.right == Interval(ours.pass_at_1, *ours.interval())
    assert not one.points.tie
    assert next(e for e in entries if e.policy == "golden").right is None


def test_attention_retained_leaves_out_traces_that_count_nothing(found):
    _, _, entries = found
    one = next(e for e in entries if e.policy == "snapkv" and e.budget == 16).retained
    low, high = stats.t.interval(0.95, 1, 0.5, 0.25)
    assert (one.value, one.low, one.high) == pytest.approx((0.5, low, high))


def test_one_trace_has_no_interval_and_ties_with_all():
    one = Interval.of((1.5, math.nan), 1)
    assert one.value == 1.5 and math.isnan(one.low) and one.tie


def test_tables_say_baselines_and_ties_and_leave_empty_columns_out(found):
    _, _, entries = found
    head, rows = board.table(entries)
    assert "ms a token" not in head and "right, %" in head
    to = [row[head.index("to baseline")] for row in rows]
    assert to.count("baseline") == 2 and to[0] == ""
    for row, e in zip(rows, entries, strict=True):
        assert row[head.index("to baseline")].endswith("tie") == bool(
            e.difference and e.difference.tie
        )


def test_files_have_the_same_figures_and_no_nan(found, tmp_path):
    _, _, entries = found
    data = json.loads(json.dumps(board.records(entries), allow_nan=False))
    table = list(csv_module.DictReader(io.StringIO(board.csv(entries))))
    for row, record, e in zip(table, data, entries, strict=True):
        assert (row["policy"], int(row["budget"])) == (e.policy, e.budget)
        if e.ratio:
            assert float(row["ratio_low"]) == record["ratio"]["low"] == e.ratio.low
        assert float(row["eviction_flops"]) == record["cost"]["flops"] == 2e6
    charts.leaderboard(entries, tmp_path / "x.png")
    assert (tmp_path / "x.png").exists() and (tmp_path / "x.pdf").exists()
