"""Two evaluations side by side, against counting by hand; and what can't be compared."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest

from fkv.data import traces
from fkv.errors import UserError
from fkv.evaluation import accuracy, answers, comparison, loss_table, paired
from fkv.evaluation.loss_ratio import Losses

MARKS = {"+": "right", "-": "wrong", "0": "no answer"}


def rows_of(policy, budget, marks):
    """Two samples of each problem: `++ -+` is two right ones of problem 0, one of problem 1."""
    return [
        dict(
            policy=policy, budget=budget, interval=8, problem=str(i), sample=j, verdict=MARKS[mark],
            answer="3", reference=f"r{i}", tokens=10, truncated=False, evictions=0, text="",
        )
        for i, both in enumerate(marks.split())
        for j, mark in enumerate(both)
    ]  # fmt: skip


def losses_of(policy, budget, seed, n=6, full=None):
    rng = np.random.default_rng([seed, n])
    tokens = np.tile([10, 8, 2], (n, 1))
    full = np.random.default_rng(7).random((n, 3)) + 1 if full is None else full
    return Losses(policy, budget, 8, full * (1 + rng.random((n, 3))), full, tokens)


NAMES = [f"{i}-abc" for i in range(6)]
REFERENCES = {f"{i}": f"r{i}" for i in range(3)}


def write(path, rows, losses=()):
    path.mkdir(exist_ok=True)
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if losses:
        (path / comparison.TRACES).write_text(loss_table.traces_csv(losses, NAMES))
    return path


@pytest.fixture
def there(tmp_path):
    rows = rows_of("full", 0, "++ ++ ++") + rows_of("knorm", 16, "++ +- --")
    losses = [losses_of(*one) for one in (("full", 16, 3), ("knorm", 16, 1), ("golden", 16, 2))]
    return write(tmp_path / "there", rows, losses)


def test_answers_are_paired_by_problem(there):
    other = comparison.load(str(there), "here")
    mine = rows_of("knorm", 16, "+- ++ --") + rows_of("full", 0, "++ ++ +0")
    names = [("full", 0), ("knorm", 16), ("h2o", 16)]
    cells = comparison.shared(other, names, REFERENCES, 2)
    assert cells == [("full", 0), ("knorm", 16)]
    full, knorm = comparison.compare(other, cells, mine + rows_of("h2o", 16, "++ ++ ++"), [])
    assert (full.policy, full.budget, full.lost, full.gained) == ("full", 0, 1, 0)
    assert full.difference == accuracy.difference([1, 1, 0.5], [1, 1, 1])
    assert (knorm.policy, knorm.budget, knorm.lost, knorm.gained) == ("knorm", 16, 1, 1)
    assert knorm.difference == accuracy.difference([0.5, 1, 0], [1, 0.5, 0])
    assert (knorm.there.pass_at_1, knorm.here.pass_at_1) == (0.5, 0.5)
    assert (full.there.pass_at_1, full.here.pass_at_1) == (1, pytest.approx(5 / 6))
    cells = comparison.cells(full)
    low, high = full.here.interval()
    assert cells == [
        "full", "", "100.0 (29.2-100.0)", f"83.3 ({100 * low:.1f}-{100 * high:.1f})",
        str(full.difference), "1", "0", "", "", "",
    ]  # fmt: skip
    assert str(full.difference).startswith("-16.7 (")


def test_fewer_problems_and_samples_are_a_part_of_more(there):
    other = comparison.load(str(there), "here")
    mine = [r for r in rows_of("knorm", 16, "-- +-") if r["sample"] == 0]
    cells = comparison.shared(other, [("knorm", 16)], {"0": "r0", "1": "r1"}, 1)
    (knorm,) = comparison.compare(other, cells, mine, [])
    assert (knorm.lost, knorm.gained, knorm.there.pass_at_1) == (1, 0, 1)
    assert knorm.there.right_pn.shape == (2, 1)


def test_losses_are_paired_by_trace(there):
    other = comparison.load(str(there), "here")
    assert other.traces == NAMES
    mine = [losses_of("full", 16, 3), losses_of("knorm", 16, 4), losses_of("golden", 16, 5),
            losses_of("h2o", 16, 6)]  # fmt: skip
    found = comparison.compare(other, [("knorm", 16)], rows_of("knorm", 16, "++ ++ ++"), mine)
    assert [(one.policy, one.losses_here) for one in found] == [
        ("knorm", mine[1]), ("golden", mine[2]),
    ]  # fmt: skip
    golden = found[1]
    assert golden.here is None and comparison.cells(golden)[2:7] == [""] * 5
    a, b = mine[2], losses_of("golden", 16, 2)
    ratio_a, ratio_b = (x.evicted[:, 0].sum() / x.full[:, 0].sum() for x in (a, b))
    # The same full losses, so that the difference of ratios is the ratio of differences.
    gap = a.evicted[:, 0] - b.evicted[:, 0]
    rest = gap - (ratio_a - ratio_b) * a.full[:, 0]
    error = np.sqrt((rest**2).sum() / 5 / 6) / a.full[:, 0].mean()
    assert paired.difference(a, b) == pytest.approx((ratio_a - ratio_b, error))
    assert comparison.cells(golden)[7:] == [
        "{:.3f} ± {:.3f}".format(*b.ratio()), "{:.3f} ± {:.3f}".format(*a.ratio()),
        f"{ratio_a - ratio_b:+.3f} ± {error:.3f}",
    ]  # fmt: skip
    assert paired.difference(a, a) == (0, 0)

    lines = list(csv.DictReader(io.StringIO(comparison.csv(found))))
    assert [line["policy"] for line in lines] == ["knorm", "golden"]
    assert float(lines[1]["ratio_low_difference"]) == paired.difference(a, b, 1)[0]
    assert float(lines[1]["ratio_there_se"]) == pytest.approx(b.ratio()[1])
    assert lines[1]["here"] == "" and float(lines[0]["here"]) == 1
    assert float(lines[0]["there"]) == 0.5 and lines[0]["lost"] == "0"


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_losses_of_other_tokens_are_not_compared(there, kind):
    other = comparison.load(str(there), "here")
    mine = losses_of("golden", 16, 5)
    mine.tokens[3, kind] += 1
    assert comparison.compare(other, [], [], [mine]) == []


def test_losses_of_traces_are_read_as_written(tmp_path):
    some = [losses_of("knorm", 16, 1), losses_of("rkv:mix=0.05,kernel=1", 24, 2)]
    some[1] = dataclasses.replace(some[1], protect_prompt=5)
    path = tmp_path / "trace_losses.csv"
    path.write_text(loss_table.traces_csv(some, NAMES))
    found, names = loss_table.read_traces(path)
    assert names == NAMES
    for one, two in zip(some, found, strict=True):
        for name in ("policy", "budget", "interval", "protect_prompt"):
            assert getattr(one, name) == getattr(two, name)
        for name in ("evicted", "full", "tokens"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("config", ['{"protect_prompt": 3}', '{"protect_prompt": null}', "{}", ""])
def test_losses_of_traces_without_protected_prompts_are_those_of_the_config(there, config):
    path = there / comparison.TRACES
    new = comparison.load(str(there), "here")
    lines = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    assert lines[0].endswith("full_high")  # the header of earlier versions
    path.write_text("\n".join(lines) + "\n")
    (there / "config.json").write_text(config)
    old = comparison.load(str(there), "here")
    assert old.losses.keys() == new.losses.keys() and old.traces == new.traces
    kept = 3 if "3" in config else 0
    for cell, one in old.losses.items():
        assert one.protect_prompt == old.protect_prompt == kept
        np.testing.assert_array_equal(one.evicted, new.losses[cell].evicted)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "a,b\n1,2\n",
        lambda text: text.splitlines()[0] + "\n",
        lambda text: text[:-9],
        lambda text: text.replace("knorm,16", "knorm,x", 1),
        lambda text: text.replace(",0\n", ",x\n", 1),
        lambda text: text.replace(",0\n", "\n", 1),
        lambda text: text.replace(",protect_prompt", "", 1),
        lambda text: re.sub(r"\d+\.\d+", "nan", text, count=1),
        lambda text: re.sub(r"\d+\.\d+", "inf", text, count=1),
        lambda text: text.replace("0-abc", "1-abc", 1),
        lambda text: text + text.splitlines()[1] + "\n",
        lambda text: "\n".join(text.splitlines()[:-1]) + "\n",
        lambda text: text.encode().decode("latin-1") + "\x00",
    ],
)
def test_damaged_losses_of_traces_are_named(there, change):
    path = there / comparison.TRACES
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError) as raised:
        comparison.load(str(there), "here")
    assert str(raised.value).startswith(f"{path} ") and "\n" not in str(raised.value)


def test_traces_are_told_apart():
    def digests(tokens, prompt=1):
        return traces.collect([np.array(x) for x in tokens], 2, 4, "x", [prompt] * 2).digests()

    one = digests([[1, 2, 3], [1, 2, 3, 4, 5]])
    assert len(set(one)) == 2 and digests([[1, 2, 3], [1, 2, 3, 4, 5]]) == one
    assert digests([[1, 2, 3], [1, 2, 3, 4, 6]])[1] != one[1]
    assert digests([[1, 2, 3, 0], [1, 2, 3, 4, 5]])[0] != one[0]
    assert digests([[1, 2, 3], [1, 2, 3, 4, 5]], 2)[0] != one[0]
    assert digests([[1, 2, 3], [1, 2, 3]])[0] == one[0]


def refused(match, call, *args):
    with pytest.raises(UserError, match=match) as raised:
        call(*args)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_compared(there, tmp_path):
    other = comparison.load(str(there), "here")
    refused("there has answers of full, knorm at 16, but of no policy", comparison.shared, other,
            [("knorm", 24), ("h2o", 16)], REFERENCES, 2)  # fmt: skip
    refused("no answer of knorm at 16 to problem '3', sample 0", comparison.shared, other,
            [("knorm", 16)], REFERENCES | {"3": "r3"}, 2)  # fmt: skip
    refused("no answer of full to problem '0', sample 2", comparison.shared, other,
            [("full", 0)], REFERENCES, 3)  # fmt: skip
    refused("other problems: the answer to '1' is 'r1' there and 'x' here", comparison.shared,
            other, [("full", 0)], REFERENCES | {"1": "x"}, 2)  # fmt: skip
    refused("is the workdir of this evaluation", comparison.load, str(there), f"{there}/../there")
    refused("nowhere' has no samples.jsonl", comparison.load, "nowhere", "here")
    (there / "samples.jsonl").write_text("{}\n")
    refused("line 1 is not a sample", comparison.load, str(there), "here")
    assert set(answers.FIELDS) == set(rows_of("full", 0, "+")[0])
