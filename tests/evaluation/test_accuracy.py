"""pass@1, differences and their intervals against plain counting and exact sums; tables."""

import csv
import dataclasses
import io
import math

import numpy as np
import pytest
from scipy import stats

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
        answer=None if verdict == "no answer" else "3",
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
    # By problem: of the full cache 1, 1/2 and 1/2.
    assert full.difference is None
    assert h2o.difference == accuracy.difference([0.5, 0.5, 0], [0.5, 1, 0.5])
    assert h2o.difference.value == pytest.approx(-1 / 3)
    assert small.difference.value == pytest.approx(1 / 3)
    assert (h2o.no_answer, full.no_answer) == (pytest.approx(1 / 6), 0)
    assert (h2o.undecided, full.undecided) == ((1, 1), (0, 0))


def test_samples_may_come_in_any_order():
    rows = rows_of("h2o", 64, {"a": "+-+", "b": "--+"}) + rows_of("full", 0, {"a": "--+"})
    (one, _), (two, _) = accuracy.summarise(rows), accuracy.summarise(rows[2::-1] + rows[3:])
    np.testing.assert_array_equal(one.right_pn, [[1, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(one.right_pn, two.right_pn)
    # Samples that the full cache did not answer are not compared.
    assert (one.lost, one.gained) == (0, 1)
    assert one.difference == two.difference
    assert one.difference == accuracy.difference([2 / 3], [1 / 3])


def test_nothing_to_compare_with_without_a_full_cache():
    (one,) = accuracy.summarise(rows_of("h2o", 64, {"a": "+-"}))
    assert one.lost is None and one.gained is None and one.difference is None
    assert accuracy.cells(one)[-3:] == ["", "", ""]


def test_an_answer_that_is_not_there_is_none_whatever_its_verdict():
    rows = [{**r, "answer": None} for r in rows_of("full", 0, {"a": "-0"})]
    (one,) = accuracy.summarise(rows + rows_of("full", 0, {"b": "-+"}))
    assert one.no_answer == 0.5


def result(right_pn, **fields):
    return Accuracy("h2o", 64, np.asarray(right_pn, bool), 1234.4, 0.125, 7.25, **fields)


def test_interval_is_the_same_every_time():
    right = np.random.default_rng(3).random((50, 4)) < 0.6
    assert result(right).interval() == result(right.copy()).interval()
    low, high = result(right).interval()
    assert 0 < low < right.mean() < high < 1


@pytest.mark.parametrize("level", [0.95, 0.68])
@pytest.mark.parametrize("right, n", [(0, 512), (512, 512), (0, 1), (1, 1), (7, 30), (381, 512)])
def test_interval_of_one_sample_a_problem_is_exact(right, n, level):
    found = result((np.arange(n) < right)[:, None]).interval(level=level)
    exact = stats.binomtest(right, n).proportion_ci(level, "exact")
    assert found == pytest.approx(tuple(exact), abs=1e-12)
    assert (found[0] == 0) == (right == 0) and (found[1] == 1) == (right == n)
    assert found[0] < found[1]


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_equal_problems_leave_as_much_in_doubt_as_one_sample_of_each(share):
    many = np.tile(np.arange(8) < 8 * share, (40, 1))
    exact = stats.binomtest(int(40 * share), 40).proportion_ci(0.95, "exact")
    assert result(many).interval() == pytest.approx(tuple(exact), abs=1e-12)


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
        # Problems of their own difficulty, two samples of each.
        chance = rng.choice([0.5, 0.9], (60, 1))
        low, high = result(rng.random((60, 2)) < chance).interval(resamples=400)
        hits += low <= truth <= high
    assert 0.90 < hits / 300 < 0.98  # a standard error is 0.013; the bootstrap is a bit short


@pytest.mark.parametrize("p", [0.01, 0.5, 0.97])
def test_the_exact_interval_covers_the_truth_at_least_as_often_as_it_says(p):
    bounds = [result((np.arange(50) < k)[:, None]).interval() for k in range(51)]
    held = [low <= p <= high for low, high in bounds]
    assert stats.binom.pmf(np.arange(51), 50, p)[held].sum() >= 0.95


def test_samples_of_a_problem_are_no_evidence_of_their_own():
    # Problems that are always or never solved: 16 samples each say no more than one.
    solved = (np.arange(40) % 2 == 0)[:, None]
    one, many = result(solved), result(np.repeat(solved, 16, axis=1))
    two = result(np.repeat(solved, 2, axis=1))
    assert many.interval() == two.interval() == pytest.approx(one.interval(), abs=0.03)


# ---- differences


def brute(both):
    """Bonett and Price's interval by the counts of the four-fold table, 95 %."""
    n, lost, gained = len(both), both.count((0, 1)), both.count((1, 0))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (gained - lost) / n, max(p - q - half, -1), min(p - q + half, 1)


@pytest.mark.parametrize("seed", range(4))
def test_differences_are_those_of_the_four_fold_table(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 60))
    ours, theirs = rng.random((2, n)) < rng.random((2, 1))
    found = accuracy.difference(ours, theirs)
    both = list(zip(ours.tolist(), theirs.tolist(), strict=True))
    assert dataclasses.astuple(found) == pytest.approx(brute(both), abs=1e-6)
    keys = [(str(i), 0) for i in range(n)]
    lost, gained, same = accuracy.paired(
        dict(zip(keys, ours, strict=True)), dict(zip(keys, theirs, strict=True))
    )
    assert (lost, gained, same) == (both.count((False, True)), both.count((True, False)), found)
    back = accuracy.difference(theirs, ours)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("lost, gained", [(0, 0), (0.02, 0), (0.3, 0), (0.1, 0.1), (0.7, 0.05)])
def test_intervals_of_differences_hold_the_truth_as_often_as_they_say(lost, gained):
    """Summed over all that thirty problems can do; none of none would be sure, (0, 0)."""
    n, covered = 30, 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            chance = stats.multinomial.pmf([i, j, n - i - j], n, [lost, gained, 1 - lost - gained])
            found = accuracy.difference(np.repeat([-1, 1, 0], [i, j, n - i - j]), np.zeros(n))
            assert -1 <= found.low < found.high <= 1
            covered += chance * (found.low <= gained - lost <= found.high)
    assert covered >= 0.93


def test_samples_of_a_problem_are_one_difference():
    ours = {("a", j): j < 3 for j in range(4)} | {("b", 0): True, ("c", 0): True}
    theirs = {("a", j): False for j in range(4)} | {("b", 0): False, ("d", 0): True}
    lost, gained, found = accuracy.paired(ours, theirs)
    assert (lost, gained) == (0, 4) and found == accuracy.difference([0.75, 1], [0, 0])
    assert accuracy.paired(ours, {}) == (0, 0, None)


def test_cells_and_tables():
    low, high = result([[1, 1], [0, 1], [1, 1], [0, 0]]).interval()
    against = accuracy.Difference(-0.25, -0.5, 0.0625)
    one = result(
        [[1, 1], [0, 1], [1, 1], [0, 0]], lost=3, gained=0, no_answer=0.25, difference=against
    )
    cells = accuracy.cells(one)
    assert cells == [
        "h2o", "64", "62.5", f"{100 * low:.1f}-{100 * high:.1f}", "1234", "12.5 %", "25.0 %", "7.2",
        "-25.0 (-50.0 to +6.2)", "3", "0", "",
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
        "no answer | evictions | points to full | lost | gained | trained at |"
    )
    assert marked[1].split("|")[1:-1] == [" --- ", *[" ---: "] * 11]
    assert marked[2] == f"| {' | '.join(cells)} |"

    lines = list(csv.DictReader(io.StringIO(accuracy.csv([full, one]))))
    assert lines[1] == {
        "policy": "h2o", "budget": "64", "answers": "8", "pass_at_1": "0.625", "low": str(low),
        "high": str(high), "tokens": "1234.4", "cut off": "0.125", "no answer": "0.25",
        "evictions": "7.25", "difference": "-0.25", "difference_low": "-0.5",
        "difference_high": "0.0625", "lost": "3", "gained": "0", "trained_at": "",
        "protect_prompt": "0",
    }  # fmt: skip
    assert lines[0]["difference"] == lines[0]["lost"] == ""


def test_what_may_say_nothing_of_policies_is_warned_of():
    assert accuracy.warnings([result([[1]], no_answer=0.5)], 10.0) == []
    full = dataclasses.replace(result([[0]], no_answer=1.0), policy="full", budget=0, truncated=1)
    mute = result([[0]], no_answer=1.0, undecided=(2, 0))
    assert accuracy.warnings([full, mute, result([[1]], undecided=(1, 4))], 10.0) == [
        "no answer was found in any text of full (all of them cut off: raise "
        "evaluate.new_tokens?), h2o 64",
        "3 answers count as wrong: evaluate.deadline = 10 s exceeded",
        "4 answers count as wrong: math-verify failed on them",
    ]


def test_comma_separated_survives_any_text():
    rows = [["a, b", 1.5, None], ['say "x"\nand more', 2, r"\frac{1}{2}"]]
    text = tables.comma_separated(["name", "n", "answer"], rows)
    assert text.startswith("name,n,answer\n") and text.endswith("\n")
    assert list(csv.reader(io.StringIO(text)))[1:] == [
        ["a, b", "1.5", ""], ['say "x"\nand more', "2", r"\frac{1}{2}"],
    ]  # fmt: skip
