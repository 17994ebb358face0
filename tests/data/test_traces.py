"""Traces from files and from the embedded task, and the batches made of them."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import tiny
from fkv.data import sources, traces
from fkv.errors import UserError
from fkv.jobs import common
from fkv.tasks import ledger

ROWS = [[5, 6, 7], [8], [2**31 - 1, 0]]


@pytest.fixture(autouse=True)
def no_files_at_home(tmp_path, monkeypatch):
    """`datasets` keeps what it read in the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ranges(*lengths):
    return [np.arange(n, dtype=np.int32) + 1 for n in lengths]


def write(path, rows, column="input_ids"):
    """A Parquet or JSONL file of one column."""
    data = datasets.Dataset.from_dict({column: rows})
    data.to_parquet(path) if path.suffix == ".parquet" else data.to_json(path)
    return str(path)


# ---- collect


def test_collect_skips_what_no_eviction_touches():
    sequences = ranges(24, 25, 3, 40, 24, 31)  # B + L = 24
    found = traces.collect(sequences, 24, 8, "here")
    assert found.length_n.tolist() == [25, 40, 31] and found.skipped == 3 and len(found) == 3
    assert found.token_nt.shape == (3, 40)
    assert found.token_nt.dtype == found.length_n.dtype == np.int32
    for row, n in zip(found.token_nt, found.length_n, strict=True):
        assert row.tolist() == [*range(1, n + 1), *[ledger.PAD] * (40 - n)]


@pytest.mark.parametrize(("longest", "padded"), [(31, 32), (32, 32), (33, 40)])
def test_collect_pads_to_a_multiple(longest, padded):
    found = traces.collect(ranges(25, longest), 24, 8, "here")
    assert found.token_nt.shape == (2, padded) and found.skipped == 0


def test_collect_keeps_the_prompts_of_what_it_keeps():
    found = traces.collect(ranges(24, 25, 40), 24, 8, "here", [3, 5, 7])
    assert found.prompt_n.tolist() == [5, 7]
    assert traces.collect(ranges(25), 24, 8, "here").prompt_n.tolist() == [0]


def test_read_prompts(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"input_ids": [1, 2], "n": 1}\n{"input_ids": [3], "n": null}\n')
    with pytest.raises(UserError, match="row 1 of 'n' is None, not a whole number"):
        traces.read(str(path), prompt_column="n")
    corrupt = []
    sequences, prompts = traces.read(str(path), prompt_column="n", corrupt=corrupt)
    assert ([x.tolist() for x in sequences], prompts) == ([[1, 2]], [1])
    assert corrupt == [(1, "row 1 of 'n' is None, not a whole number")]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_rows_whose_prompt_does_not_fit_are_named_and_left_out(tmp_path, suffix):
    """None, negative, of the trace or beyond; the length of an empty trace's is 0."""
    path = tmp_path / f"traces.{suffix}"
    rows = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7], [], [], [5]]
    data = datasets.Dataset.from_dict({"input_ids": rows, "n": [2, -1, 3, 99, 0, 1, 0]})
    data.to_parquet(path) if suffix == "parquet" else data.to_json(path)
    corrupt = []
    sequences, prompts = traces.read(str(path), prompt_column="n", corrupt=corrupt)
    assert [x.tolist() for x in sequences] == [[5, 6, 7], [], [5]] and prompts == [2, 0, 0]
    assert corrupt == [
        (i, f"row {i} of 'n' is {n}, not a prompt length for {length} tokens")
        for i, n, length in ((1, -1, 3), (2, 3, 3), (3, 99, 3), (5, 1, 0))
    ]
    with pytest.raises(UserError, match=r"traces\.\w+: row 1 of 'n' is -1, not a prompt length"):
        traces.read(str(path), prompt_column="n")
    # What is left can be collected.
    assert traces.collect(sequences, 2, 1, "here", prompts).prompt_n.tolist() == [2]


def test_lengths_read_with_gaps_are_whole_numbers(tmp_path):
    path = tmp_path / "traces.parquet"
    data = {"input_ids": [[1, 2]] * 4, "n": [1.0, None, 0.5, float("nan")]}
    datasets.Dataset.from_dict(data).to_parquet(path)
    corrupt = []
    assert traces.read(str(path), prompt_column="n", corrupt=corrupt)[1] == [1]
    assert [wrong for _, wrong in corrupt] == [
        f"row {i} of 'n' is {n}, not a whole number" for i, n in ((1, None), (2, 0.5), (3, "nan"))
    ]


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_lengths_in_single_precision_are_whole_numbers(tmp_path, kind):
    table = pa.table({"input_ids": [[1, 2]] * 2, "n": np.array([1, 0.5], kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    corrupt = []
    assert traces.read(str(tmp_path / "x.parquet"), "input_ids", "n", corrupt)[1] == [1]
    assert len(corrupt) == 1 and "row 1 of 'n' is " in corrupt[0][1]


def test_ids_beyond_the_vocabulary_are_named_and_left_out(tmp_path):
    path, corrupt = write(tmp_path / "traces.jsonl", [[1, 9], [10, 1], [3], []]), []
    sequences, _ = traces.read(path, corrupt=corrupt, vocabulary=10)
    assert [x.tolist() for x in sequences] == [[1, 9], [3], []]
    wrong = "row 1 of 'input_ids' has token id 10, beyond the model's 10 tokens"
    assert corrupt == [(1, wrong)]
    with pytest.raises(UserError, match=wrong):
        traces.read(path, vocabulary=10)


def test_no_usable_row_is_an_error_that_names_the_first(tmp_path):
    path = write(tmp_path / "traces.jsonl", [[-1], [-2]])
    with pytest.raises(
        UserError, match=r"none of its 2 rows can be used \(row 0 of 'input_ids' is"
    ):
        traces.read(path, corrupt=[])


def test_a_bad_prompt_ends_a_strict_run_alone(tmp_path, capsys):
    config = tiny.get_config()
    path = tmp_path / "traces.jsonl"
    rows = [{"input_ids": [3] * 40, "n": n} for n in (4, 40, -2, None)]
    rows += [{"input_ids": [3] * 39 + [99], "n": 4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.path, config.data.prompt_column = str(path), "n"
    config.budget, config.interval = 16, 8
    found = common.load_traces(config, "train", 9, 16, 72)
    assert found.prompt_n.tolist() == [4] and found.skipped == 0
    said = capsys.readouterr().out
    assert [f"left out, row {i} of" in said for i in range(5)] == [False, *[True] * 4]
    config.data.strict = True
    with pytest.raises(UserError, match="row 1 of 'n' is 40, not a prompt length"):
        common.load_traces(config, "train", 9, 16, 72)


def test_corrupt_rows_are_named_and_left_out(tmp_path):
    path, corrupt = write(tmp_path / "traces.jsonl", [[1, 2], [-1], [3]]), []
    sequences, prompts = traces.read(path, corrupt=corrupt)
    assert [x.tolist() for x in sequences] == [[1, 2], [3]] and prompts is None
    assert corrupt == [(1, "row 1 of 'input_ids' is not a list of token ids (0, 1, ...)")]


def test_a_directory_is_its_parquet_files(tmp_path):
    write(tmp_path / "b.parquet", [[2]])
    write(tmp_path / "a.parquet", [[1], [5]])
    assert [x.tolist() for x in traces.read(str(tmp_path))[0]] == [[1], [5], [2]]


def test_copies_in_a_directory_are_named(tmp_path):
    """Files of ids are told apart by these, others by all that is in them."""
    rows = {"input_ids": [[1, 2]], "id": ["0"], "sample": [0]}
    for name, changes in {
        "a": {}, "b": {"sample": [1]}, "c": {"id": ["1"]}, "d": {"id": [None]}, "e": {"id": [None]},
    }.items():  # fmt: skip
        datasets.Dataset.from_dict(rows | changes).to_parquet(str(tmp_path / f"{name}.parquet"))
    assert len(traces.read(str(tmp_path))[0]) == 5
    again = rows | {"input_ids": [[3, 4]]}
    datasets.Dataset.from_dict(again).to_parquet(str(tmp_path / "f.parquet"))
    with pytest.raises(UserError) as error:
        traces.read(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}/f.parquet: trace '0', sample 0, is also in a.parquet, and would count twice: "
        "move one of them out of the directory"
    )
    twice = {"input_ids": [[1], [1]], "id": ["0", "0"], "sample": [0, 0]}
    (tmp_path / "one").mkdir()
    datasets.Dataset.from_dict(twice).to_parquet(str(tmp_path / "one" / "a.parquet"))
    with pytest.raises(UserError, match=r"trace '0', sample 0, is also in a\.parquet"):
        traces.read(str(tmp_path / "one"))

    (tmp_path / "bare").mkdir()
    for name in "ab":
        rows = {"input_ids": [[1, 2], [1, 2]]}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "bare" / f"{name}.parquet"))
    with pytest.raises(UserError, match=r"bare/b.parquet: its content is also in a.parquet"):
        traces.read(str(tmp_path / "bare"))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows"])
def test_home_is_where_a_shell_has_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / name
    if name == "rows":
        path.mkdir()
        path = path / "a.parquet"
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    rows.to_json(str(path)) if path.suffix == ".jsonl" else rows.to_parquet(str(path))
    assert traces.read(f"~/{name}")[0][0].tolist() == [1, 2]
    assert sources.open_rows(f"~/{name}", "train").column_names == ["input_ids"]
    with pytest.raises(UserError, match="no home directory is known for ~nosuchuser"):
        traces.read(f"~nosuchuser/{name}")


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((24, 7), r"here: none of the 2 traces \(longest: 24 tokens\) is longer than .* = 24;"),
        ((), r"here: none of the 0 traces \(longest: 0 tokens\)"),
    ],
)
def test_collect_names_the_longest_when_all_are_too_short(lengths, message):
    with pytest.raises(UserError, match=message) as raised:
        traces.collect(ranges(*lengths), 24, 8, "here")
    assert "\n" not in str(raised.value)


# ---- read


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_read(tmp_path, suffix):
    got, prompts = traces.read(write(tmp_path / f"traces.{suffix}", ROWS))
    assert prompts is None
    assert [ids.tolist() for ids in got] == ROWS
    assert all(ids.dtype == np.int32 and ids.ndim == 1 for ids in got)
    path = write(tmp_path / f"other.{suffix}", ROWS, "tokens")
    assert [ids.tolist() for ids in traces.read(path, "tokens")[0]] == ROWS


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_read_sees_that_a_file_has_changed(tmp_path, suffix):
    path = tmp_path / f"traces.{suffix}"
    traces.read(write(path, [[1, 2]]))
    assert [ids.tolist() for ids in traces.read(write(path, [[3, 4]]))[0]] == [[3, 4]]


def refused(path, message):
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}") as raised:
        traces.read(str(path))
    assert "\n" not in str(raised.value)


def test_read_refuses_a_path_that_leads_to_no_traces(tmp_path):
    refused(tmp_path / "traces.csv", r"rows are read from \.parquet or \.jsonl files")
    refused(tmp_path, r"this directory has no \.parquet files")
    refused(tmp_path / "traces.parquet", "no such file")
    refused(tmp_path / "traces.jsonl", "no such file")
    (tmp_path / "folder.parquet").mkdir()
    refused(tmp_path / "folder.parquet", r"this directory has no \.parquet files")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_read_names_the_columns_there_are(tmp_path, suffix):
    path = tmp_path / f"traces.{suffix}"
    data = datasets.Dataset.from_dict({"text": ["a"], "tokens": [[1]]})
    data.to_parquet(path) if suffix == "parquet" else data.to_json(path)
    refused(path, r"no column 'input_ids'; it has text, tokens$")


@pytest.mark.parametrize("spoil", ["garbage", "cut", "blank", "hole"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_read_refuses_a_corrupt_file(tmp_path, suffix, spoil):
    path = tmp_path / f"traces.{suffix}"
    whole = Path(write(path, ROWS)).read_bytes()
    spoiled = {
        "garbage": b"\xff\xfe no traces",
        "cut": whole[:-9],
        "blank": b"\n",
        "hole": whole[:4] + bytes(16) + whole[20:],
    }
    path.write_bytes(spoiled[spoil])
    refused(path, "can't be read as")


# Files that `datasets` reads without complaint, and that are no traces.
NO_TRACES = {
    "text": ["so", "12"],
    "lists of text": [["1", "2"]],
    "fractions": [[1.5, 2.0]],
    "an entry that is null": [[1, 2], None],
    "an id that is null": [[1, None, 2]],
    "a negative id": [[1, -2]],
    "an id beyond int32": [[1, 2**31]],
    "lists of lists": [[[1, 2], [3, 4]]],
    "numbers": [3, 4],
}


def test_truth_values_are_no_token_ids(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"input_ids": [true, 2]}\n')
    refused(path, "row 0 of 'input_ids' is not a list of token ids")


def test_long_and_short_lists_of_json_are_the_same(tmp_path):
    rows = [list(range(n)) for n in (3, 64, 65, 300)]
    found, _ = traces.read(write(tmp_path / "traces.jsonl", rows))
    assert [x.tolist() for x in found] == rows and {x.dtype for x in found} == {np.dtype("int32")}
    path = tmp_path / "more.jsonl"
    path.write_text(json.dumps({"input_ids": [2**70] * 70}) + "\n")
    refused(path, "row 0 of 'input_ids' is not a list of token ids")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("rows", NO_TRACES.values(), ids=NO_TRACES.keys())
def test_read_refuses_entries_that_are_no_token_ids(tmp_path, suffix, rows):
    path = tmp_path / f"traces.{suffix}"
    write(path, rows)
    refused(path, ".*input_ids")


@pytest.mark.parametrize("case", ["empty", "damaged footer"])
def test_read_refuses_files_that_break_datasets_another_way(tmp_path, case):
    path = tmp_path / ("traces.jsonl" if case == "empty" else "traces.parquet")
    whole = Path(write(path, ROWS)).read_bytes()
    path.write_bytes(b"" if case == "empty" else whole[:4] + bytes(len(whole) - 12) + whole[-8:])
    refused(path, "")


def test_read_takes_a_path_as_it_is(tmp_path):
    path = write(tmp_path / "traces[1].jsonl", ROWS)
    assert [ids.tolist() for ids in traces.read(path)[0]] == ROWS


# ---- batches


@pytest.fixture
def seven():
    return traces.collect(ranges(30, 26, 40, 25, 33, 28, 39), 24, 8, "here")


def test_rows_are_the_traces(seven):
    token, length, _ = seven.rows(np.array([2, 0]))
    assert token.shape == (2, 40) and length.tolist() == [40, 30]
    for row, n in zip(token, length, strict=True):
        assert row.tolist() == [*range(1, n + 1), *[ledger.PAD] * (40 - n)]


def in_order(found, steps, batch=3, seed=1):
    order = traces.batches(found, batch, seed)
    return [order[step].tolist() for step in steps]


def test_a_batch_depends_on_its_step_alone(seven):
    assert in_order(seven, range(12)) == in_order(seven, range(11, -1, -1))[::-1]


def test_every_trace_comes_once_an_epoch_in_another_order(seven):
    rows = [i for batch in in_order(seven, range(14)) for i in batch]
    epochs = [rows[i : i + 7] for i in range(0, 42, 7)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 6
    assert len(set(map(tuple, epochs))) > 3  # 7! orders


def test_seeds_shuffle_differently(seven):
    assert len({str(in_order(seven, range(2), seed=seed)) for seed in range(5)}) > 3


def test_a_batch_can_hold_all_traces_and_no_more(seven):
    assert sorted(traces.batches(seven, 7, seed=0)[0]) == list(range(7))
    with pytest.raises(UserError, match=r"^batch = 8 is larger than the number of traces, 7$"):
        traces.batches(seven, 8, seed=0)


def test_a_batch_can_be_one_trace(seven):
    order = traces.iterate(traces.batches(seven, 1, seed=0))
    assert sorted(next(order).tolist() for _ in range(7)) == [[i] for i in range(7)]


# ---- buckets

MIXED = (90, 30, 26, 200, 45, 50, 101, 33, 99, 40, 130, 160)


@pytest.mark.parametrize(
    ("buckets", "at_least", "widths"),
    [
        (1, 1, {200: 12}),
        (2, 1, {200: 3, 104: 9}),
        (4, 1, {200: 3, 104: 3, 56: 4, 32: 2}),
        (4, 3, {200: 3, 104: 3, 56: 6}),  # two traces are no batch of three
        (4, 4, {200: 6, 56: 6}),
        (2, 4, {200: 12}),  # three of the longest are no batch of four
        (40, 1, {200: 3, 104: 3, 56: 4, 32: 2}),  # none is longer than an interval only
    ],
)
def test_buckets_halve_and_small_ones_are_joined(buckets, at_least, widths):
    found = traces.collect(ranges(*MIXED), 24, 8, "here", None, buckets, at_least)
    width, count = np.unique(found.padded_n, return_counts=True)
    assert dict(zip(width.tolist(), count.tolist(), strict=True)) == widths
    assert (found.padded_n >= found.length_n).all()
    assert found.token_nt.shape == (12, 200)


def test_a_batch_comes_from_one_bucket_and_buckets_take_turns():
    found = traces.collect(ranges(*MIXED), 24, 8, "here", None, 2, 3)
    batches = in_order(found, range(200))
    shapes = [found.rows(np.array(batch))[0].shape for batch in batches]
    assert set(shapes) == {(3, 200), (3, 104)}
    counts = np.bincount(np.concatenate(batches))
    assert counts.min() >= 49 and counts.max() <= 51  # 600 places for 12 traces


def test_an_iterator_goes_on_where_another_was():
    found = traces.collect(ranges(*MIXED), 24, 8, "here", None, 2, 3)
    batches = traces.batches(found, 3, 1)
    first = traces.iterate(batches)
    taken = [next(first).tolist() for _ in range(7)]
    state = json.loads(json.dumps(first.get_state()))
    second = traces.iterate(batches, state)
    rest = [[next(it).tolist() for _ in range(9)] for it in (first, second)]
    assert rest[0] == rest[1]
    assert taken + rest[0] == in_order(found, range(16))


def test_no_bucket_is_refused():
    with pytest.raises(UserError, match=r"data.buckets = 0 must be a whole number from 1"):
        traces.collect(ranges(30), 24, 8, "here", None, 0)


# ---- embedded


def test_embedded_traces_are_solved_problems():
    spec = ledger.Spec((3, 5), (2, 3), (0, 1), (0, 1))
    got, prompts = traces.embedded(2, "eval", 4, spec)
    assert prompts == [len(p.prompt) for p in ledger.problems(2, "eval", 0, 4, spec)]
    assert len(got) == 4
    for i, ids in enumerate(got):
        problem = ledger.problem(2, "eval", i, spec)
        assert ledger.decode(ids) == [*problem.prompt, *problem.thought, *problem.answer]
    longer, _ = traces.embedded(2, "eval", 6, spec)  # more traces are the same ones and others
    assert [ids.tolist() for ids in longer[:4]] == [ids.tolist() for ids in got]
