"""Paired differences and shares of the gap to golden, against jackknife and bootstrap."""

import csv
import dataclasses
import io

import numpy as np
import pytest
from matplotlib.axes import Axes

from fkv.evaluation import loss_table, paired, plots
from fkv.evaluation.loss_ratio import Losses
from tests.evaluation.test_loss_ratio import jackknife

N = 400
COST = {"full": 0, "golden": 0.05, "foresight": 0.12, "snapkv": 0.2, "h2o": 0.21}


def losses(policy, budget, n=N, **fields):
    """Traces of very different lengths, of which some are hard for all policies."""
    shared, own = np.random.default_rng([budget, n]), np.random.default_rng([budget, len(policy)])
    tokens = shared.integers(20, 200, size=(n, 3))
    full = tokens * shared.gamma(9, 0.1, size=(n, 3))
    hard = shared.gamma(2, 0.5, size=(n, 1))
    evicted = full * (1 + COST[policy] * hard * own.gamma(20, 0.05, size=(n, 3)))
    overlap = None if policy == "full" else own.random((n, 2, 2))
    rule = policy in ("snapkv", "h2o")
    return Losses(policy, budget, 8, evicted, full, tokens, overlap, rule=rule, **fields)


def sums(*several, kind=0):
    """Losses of several policies [n, policies], and of the full cache [n]."""
    evicted = np.stack([one.evicted[:, kind] for one in several], axis=-1)
    return evicted, several[0].full[:, kind]


def gap(evicted, full):
    ours, base = evicted.sum(0) / full.sum()
    return ours - base


def share(evicted, full):
    ours, base, golden = evicted.sum(0) / full.sum()
    return (base - ours) / (base - golden)


@pytest.mark.parametrize("kind", range(3))
def test_errors_are_those_of_the_jackknife(kind):
    ours, base, golden = (losses(name, 16) for name in ("foresight", "snapkv", "golden"))
    value, error = paired.difference(ours, base, kind)
    data = sums(ours, base, kind=kind)
    assert value == pytest.approx(gap(*data))
    assert error == pytest.approx(jackknife(gap, *data), rel=0.05)
    # Unpaired, it would be far larger.
    apart = np.hypot(ours.ratio(kind)[1], base.ratio(kind)[1])
    assert error < 0.7 * apart
    value, error = paired.gap_closed(ours, base, golden, kind)
    data = sums(ours, base, golden, kind=kind)
    assert value == pytest.approx(share(*data)) and 0.3 < value < 0.7
    assert error == pytest.approx(jackknife(share, *data), rel=0.05)


def test_errors_are_the_spread_over_samples_of_traces():
    ours, base, golden = (losses(name, 16) for name in ("foresight", "snapkv", "golden"))
    index = np.random.default_rng(0).integers(N, size=(2000, N))
    for found, statistic, data in (
        (paired.difference(ours, base), gap, sums(ours, base)),
        (paired.gap_closed(ours, base, golden), share, sums(ours, base, golden)),
    ):
        drawn = [statistic(*(x[i] for x in data)) for i in index]
        assert found[1] == pytest.approx(np.std(drawn), rel=0.1)


def test_the_baseline_is_the_best_rule_of_each_budget_or_the_one_named():
    several = [losses(name, budget) for budget in (16, 32) for name in COST]
    better = losses("golden", 32)  # now h2o is the best rule at 32
    several[-1] = dataclasses.replace(several[-1], evicted=0.2 * better.full + 0.8 * better.evicted)
    found = paired.against_baseline(several)
    assert [p.baseline for p in found] == ["snapkv"] * 5 + ["h2o"] * 5
    by_name = {(r.policy, r.budget): (r, p) for r, p in zip(several, found, strict=True)}
    for budget in (16, 32):
        at = {name: by_name[name, budget] for name in COST}
        golden, base = at["golden"], at[at["full"][1].baseline]
        assert at["full"][1].difference is None and at["full"][1].gap_closed is None
        assert base[1].difference == (0, 0)
        # h2o at 32 is better than golden eviction: no gap.
        assert base[1].gap_closed == ((0, 0) if budget == 16 else None)
        assert golden[1].gap_closed is None
        for name in ("golden", "foresight", "snapkv"):
            assert at[name][1].difference == paired.difference(at[name][0], base[0])
        ours, pair = at["foresight"]
        assert pair.gap_closed == paired.gap_closed(ours, base[0], golden[0])
    named = paired.against_baseline(several, "foresight")
    assert {p.baseline for p in named} == {"foresight"}
    assert named[3].difference == paired.difference(several[3], several[2])


def test_without_a_baseline_or_a_gap_cells_are_empty():
    full, golden, ours, *_ = several = [losses(name, 16) for name in COST]
    alone = paired.against_baseline([full, golden, ours])
    assert alone == [paired.Paired()] * 3
    assert paired.against_baseline(several, "rkv") == [paired.Paired()] * 5
    assert loss_table.cells(ours, alone[2])[3:5] == ["", ""]
    same = dataclasses.replace(golden, policy="snapkv", rule=True)
    found = paired.against_baseline([full, golden, ours, same])
    assert found[2].gap_closed is None and found[2].difference is not None
    # One trace has no errors.
    one = [losses(name, 16, n=1) for name in COST]
    pairs = paired.against_baseline(one)
    to, closed = loss_table.cells(one[2], pairs[2])[3:5]
    assert to == f"{pairs[2].difference[0]:+.3f}" and closed and "±" not in closed
    text = loss_table.csv(one, pairs)
    line = list(csv.DictReader(io.StringIO(text)))[2]
    assert line["difference"] and line["difference_se"] == line["gap_closed_se"] == ""


def test_table_says_what_is_compared(tmp_path):
    several = [losses(name, budget) for budget in (16, 32) for name in COST]
    pairs = paired.against_baseline(several)
    printed = loss_table.write(tmp_path / "loss_ratio", several)
    text, markdown = ((tmp_path / f"loss_ratio.{x}").read_text() for x in ("txt", "md"))
    assert printed == text.strip() and "minus the loss ratio of the best rule-based" in markdown
    head, _, *lines = text.splitlines()
    assert max(map(len, lines[:10])) <= 110
    for line, r, p in zip(lines, several, pairs, strict=False):
        at, end = (head.index(x) + len(x) for x in ("loss ratio", "gap closed"))
        shown = line[at:end].split()
        if r.policy == "full":
            assert shown == []
        elif r.policy == p.baseline:
            assert shown == ["baseline"]
        else:
            value, error = p.difference
            assert shown[:3] == [f"{value:+.3f}", "±", f"{error:.3f}"]
            share = p.gap_closed and [f"{100 * x:.1f}" for x in p.gap_closed]
            assert shown[3:] == ([share[0], "±", share[1], "%"] if share else [])
    rows = list(csv.DictReader((tmp_path / "loss_ratio.csv").open()))
    for row, p in zip(rows, pairs, strict=True):
        assert row["baseline"] == p.baseline
        for name in ("difference", "gap_closed"):
            estimate, found = getattr(p, name), (row[name], row[f"{name}_se"])
            if estimate is None:
                assert found == ("", "")
            else:
                assert [float(x) for x in found] == pytest.approx(estimate, rel=1e-5)
    assert "that of snapkv" not in text
    assert "minus the loss ratio of h2o," in loss_table.write(tmp_path / "x", several, "h2o")


def test_differences_are_drawn(tmp_path, monkeypatch):
    several = [losses(name, budget) for budget in (32, 16) for name in COST]
    drawn, errorbar = [], Axes.errorbar

    def spy(axis, x, y, yerr, label, **style):
        drawn.append((axis.get_title(), label, x, y, yerr))
        return errorbar(axis, x, y, yerr=yerr, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", spy)
    plots.loss_ratios(several, tmp_path / "a.png", "a title")
    last = drawn[3 * 4 :]
    assert [name for _, name, *_ in last] == ["golden", "foresight", "snapkv", "h2o"]
    by_name = {(r.policy, r.budget): r for r in several}
    for _, name, x, y, yerr in last:
        assert x == [16, 32]
        for budget, value, error in zip(x, y, yerr, strict=True):
            want = paired.difference(by_name[name, budget], by_name["snapkv", budget])
            assert (value, error) == pytest.approx((want[0], want[1]))
