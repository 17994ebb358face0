"""pass@1 and its interval against plain counting and the normal approximation; its tables."""

import csv
import dataclasses
import io

import numpy as np
import pytest

from fkv.evaluation import accuracy, tables
from fkv.evaluation.accuracy import Accuracy


def row(policy, budget, problem, sample, verdict, tokens=10, truncated=False, evictions=0):
    return dict(
        policy=policy,
        budget=budget,
        problem=problem,
        sample=sample,
        verdict=verdict,
        tokens=tokens,
        truncated=truncated,
        evictions=evictions,
    )


def rows_of(policy, budget, verdicts, **fields):
    """Rows of {problem: verdicts of its samples}, `+` for right."""
    names = {"+": "right", "-": "wrong", "0": "no answer", "t": "timeout", "f": "failed"}
    return [
        row(policy, budget, problem, j, names[mark], **fields)
        for problem, marks in verdicts.items()
        for j, mark in enumerate(marks)
    ]


def test_summary_counts_by_hand():
    rows = [
        *rows_of("h2o", 64, {"b": "+-", "a": "0+", "c": "tf"}, evictions=3),
        *rows_of("full", 0, {"a": "++", "b": "-+", "c": "+-"}, tokens=20),
        *rows_of("h2o", 32, {"a": "++", "b": "++", "c": "++"}),
    ]
    rows[0] = {**rows[0], "tokens": 40, "truncated": True, "evictions": 9}
    h2o, full, small = accuracy.summarise(rows)
    assert [(r.policy, r.budget) for r in (h2o, full, small)] == [
        ("h2o", 64), ("full", 0), ("h2o", 32),
    ]  # fmt: skip
    # Problems in their order, samples too.
    np.testing.assert_array_equal(h2o.right_pn, [[1, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(full.right_pn, [[1, 1], [0, 1], [1, 0]])
    assert h2o.pass_at_1 == pytest.approx(2 / 6) and full.pass_at_1 == pytest.approx(4 / 6)
    assert (h2o.tokens, h2o.truncated, h2o.evictions) == (
        pytest.approx(90 / 6), pytest.approx(1 / 6), pytest.approx(24 / 6),
    )  # fmt: skip
    assert (full.tokens, full.truncated, full.evictions) == (20, 0, 0)
    # By sample, wherever it stands: a0, b1 and c0 were right with the full cache; b0 was not.
    assert (h2o.lost, h2o.gained) == (3, 1)
    assert (full.lost, full.gained) == (0, 0)
    assert (small.lost, small.gained) == (0, 2)


def test_samples_may_come_in_any_order():
    rows = rows_of("h2o", 64, {"a": "+-+", "b": "--+"}) + rows_of("full", 0, {"a": "--+"})
    (one, _), (two, _) = accuracy.summarise(rows), accuracy.summarise(rows[2::-1] + rows[3:])
    np.testing.assert_array_equal(one.right_pn, [[1, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(one.right_pn, two.right_pn)
    # Samples that the full cache did not answer are not compared.
    assert (one.lost, one.gained) == (0, 1)


def test_nothing_to_compare_with_without_a_full_cache():
    (one,) = accuracy.summarise(rows_of("h2o", 64, {"a": "+-"}))
    assert one.lost is None and one.gained is None
    assert accuracy.cells(one)[-2:] == ["", ""]


def result(right_pn, **fields):
    return Accuracy("h2o", 64, np.asarray(right_pn, bool), 1234.4, 0.125, 7.25, **fields)


def test_interval_is_the_same_every_time():
    right = np.random.default_rng(3).random((50, 4)) < 0.6
    assert result(right).interval() == result(right.copy()).interval()
    low, high = result(right).interval()
    assert 0 < low < right.mean() < high < 1
    assert result(np.ones((30, 2))).interval() == (1, 1)
    assert result(np.zeros((30, 2))).interval() == (0, 0)


@pytest.mark.parametrize("level, z", [(0.95, 1.96), (0.68, 0.994)])
@pytest.mark.parametrize("p", [0.5, 0.8])
def test_width_is_that_of_the_normal_approximation(level, z, p):
    right = (np.arange(400) < p * 400)[:, None]
    low, high = result(right).interval(level=level)
    half = z * np.sqrt(p * (1 - p) / 400)
    assert [low, high] == pytest.approx([p - half, p + half], abs=0.12 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng, hits, truth = np.random.default_rng(0), 0, 0.7
    for _ in range(300):
        low, high = result(rng.random((60, 1)) < truth).interval(resamples=400)
        hits += low <= truth <= high
    assert 0.90 < hits / 300 < 0.98  # a standard error is 0.013; the bootstrap is a bit short


def test_samples_of_a_problem_are_no_evidence_of_their_own():
    # Problems that are always or never solved: 16 samples each say no more than one.
    solved = (np.arange(40) % 2 == 0)[:, None]
    one, many = result(solved), result(np.repeat(solved, 16, axis=1))
    assert many.interval() == one.interval()
    # Samples that differ within each problem, but not between problems, leave nothing in doubt.
    low, high = result(np.tile([True, False], (40, 8))).interval()
    assert (low, high) == (0.5, 0.5)


def test_cells_and_tables():
    low, high = result([[1, 1], [0, 1], [1, 1], [0, 0]]).interval()
    cells = accuracy.cells(result([[1, 1], [0, 1], [1, 1], [0, 0]], lost=3, gained=0))
    assert cells == [
        "h2o", "64", "62.5", f"{100 * low:.1f}-{100 * high:.1f}", "1234", "12.5 %", "7.2", "3", "0",
    ]  # fmt: skip
    full = dataclasses.replace(result([[1]]), policy="full", budget=0)
    assert accuracy.cells(full)[:3] == ["full", "", "100.0"]

    head, rule, *lines = tables.text(accuracy.HEAD, [accuracy.cells(full), cells]).splitlines()
    assert set(rule) == {"-"} and len({len(x) for x in (head, rule, *lines)}) == 1
    assert head.startswith("policy  ") and lines[0].startswith("full    ")
    # Numbers end where their heads end.
    for name, cell in zip(accuracy.HEAD[1:], cells[1:], strict=True):
        end = head.index(name) + len(name)
        assert lines[1][:end].endswith(cell)
    assert "62.5" in lines[1] and "3" in lines[1].split()

    marked = tables.markdown(accuracy.HEAD, [cells]).splitlines()
    assert marked[0] == "| policy | budget | pass@1 | 95 % interval | tokens | cut off | " + (
        "evictions | lost | gained |"
    )
    assert marked[1].split("|")[1:-1] == [" --- ", *[" ---: "] * 8]
    assert marked[2] == f"| {' | '.join(cells)} |"


def test_comma_separated_survives_any_text():
    rows = [["a, b", 1.5, None], ['say "x"\nand more', 2, r"\frac{1}{2}"]]
    text = tables.comma_separated(["name", "n", "answer"], rows)
    assert text.startswith("name,n,answer\n") and text.endswith("\n")
    assert list(csv.reader(io.StringIO(text)))[1:] == [
        ["a, b", "1.5", ""], ['say "x"\nand more', "2", r"\frac{1}{2}"],
    ]  # fmt: skip
