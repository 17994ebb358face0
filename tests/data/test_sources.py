"""Rows of files: in every form that is one, and one line about every file that is none."""

import json
import os
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fkv.data import sources
from fkv.errors import UserError

LINES = b'{"q": "caf\xc3\xa9", "a": 5}\n{"q": "b", "a": 6}\n'
ROWS = {"q": ["caf\xe9", "b"], "a": [5, 6]}


@pytest.fixture(autouse=True)
def no_files_at_home(tmp_path, monkeypatch):
    """`datasets` keeps what it read in the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(tmp_path, data, suffix="jsonl"):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(data)
    return str(path)


def refusal(path):
    with pytest.raises(UserError) as raised:
        rows = sources.open_file(str(path))
        for name in rows.column_names:
            sources.column(rows, name, str(path))
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    return message.removeprefix(f"{path}: ")


FORMS = {
    "plain": LINES,
    "byte order mark": b"\xef\xbb\xbf" + LINES,
    "carriage returns": LINES.replace(b"\n", b"\r\n"),
    "old Macintosh": LINES.replace(b"\n", b"\r"),
    "no end": LINES[:-1],
    "blank lines": b"\n \n" + LINES.replace(b"\n", b"\n\n"),
    "array": b'[{"q": "caf\xc3\xa9", "a": 5}, {"q": "b", "a": 6}]',
    "array on lines": b'[\n{"q": "caf\xc3\xa9",\n "a": 5},\n{"q": "b", "a": 6}\n]\n',
    "escaped": json.dumps([{"q": q, "a": a} for q, a in zip(*ROWS.values(), strict=True)]).encode(),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())
def test_forms_of_json(tmp_path, data, suffix):
    rows = sources.open_file(write(tmp_path, data, suffix))
    assert len(rows) == 2 and rows.column_names == ["q", "a"]
    assert {name: sources.column(rows, name, "here") for name in rows.column_names} == ROWS


def test_a_single_object_may_take_many_lines(tmp_path):
    rows = sources.open_file(write(tmp_path, json.dumps({"q": "x", "a": 5}, indent=1).encode()))
    assert rows["q"] == ["x"] and rows["a"] == [5]


def test_values_are_what_stands_there(tmp_path):
    """None becomes another because of its neighbours, its size or its looks."""
    values = [12, 0.5, "x", 10**30 + 1, [5], {"a": 5}, True, None, "2020-01-01", 1e-05, 12.0]
    data = "".join(json.dumps({"a": value}) + "\n" for value in values) + '{"b": 1}\n'
    rows = sources.open_file(write(tmp_path, data.encode()))
    assert rows.column_names == ["a", "b"] and rows["b"] == [*[None] * len(values), 1]
    assert list(map(repr, rows["a"])) == list(map(repr, [*values, None]))


BROKEN = {
    "latin-1": (LINES.decode().encode("latin-1"), r"line 1: not UTF-8, as byte 10 is 0xe9"),
    "not at the start": (LINES * 3 + b'{"q": "\xff"}\n', "line 7: not UTF-8, as byte 7 is 0xff"),
    "in a name": (b'{"q\xff": 3}\n', "line 1: not UTF-8"),
    "utf-16": (LINES.decode().encode("utf-16"), "line 1: not UTF-8, as byte 0 is 0xff"),
    "utf-16 without a mark": (LINES.decode().encode("utf-16-be"), "line 1: "),
    "utf-32": (LINES.decode().encode("utf-32"), "line 1: not UTF-8"),
    "no JSON": (b"hello\n", "line 1: Expecting value"),
    "no JSON later": (LINES + b"oops\n", "line 3: Expecting value"),
    "cut": (LINES[:-8], "line 2: "),
    "zeros": (bytes(100), "line 1: "),
    "lists": (b"[1, 2]\n[3]\n", "line 1 is not a JSON object"),
    "numbers": (b"1\n2\n", "line 1 is not a JSON object"),
    "null": (b"null\n", "not a JSON object"),
    "null later": (LINES + b"null\n", "line 3 is not a JSON object"),
    "array of numbers": (b"[1,\n2]", "entry 0 is not a JSON object"),
    "text": (b'"a"\n', "not a JSON object"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1: nested too deeply"),
    "half a character": (b'{"a": "\\ud800"}\n', "line 1: half of a surrogate pair"),
    "one name twice": (b'{"a": 1, "a": 2}\n', "line 1: an object repeats a name"),
    "number too long": (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: .*digits"),
    "nothing": (b"", "empty"),
    "blanks": (b" \n\n", "empty"),
    "a mark alone": (b"\xef\xbb\xbf", "empty"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_json_is_named_by_its_line(tmp_path, data, message):
    assert re.match(rf"can't be read as json \(.*{message}", refusal(write(tmp_path, data)))


def test_objects_without_names_have_no_column(tmp_path):
    rows = sources.open_file(write(tmp_path, b"{}\n"))
    with pytest.raises(UserError, match="here: no column 'q'; it has none"):
        sources.column(rows, "q", "here")


def parquet(path, table):
    pq.write_table(pa.table(table), path)
    return path.read_bytes()


SPOILED = {
    "cut": lambda data: data[:-20],
    "half": lambda data: data[: len(data) // 2],
    "a hole": lambda data: data[:40] + bytes(40) + data[80:],
    "more at the end": lambda data: data + b"x",
    "ends alone": lambda data: b"PAR1PAR1",
    "a footer too long": lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
    "JSON": lambda data: LINES,
    "nothing": lambda data: b"",
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_broken_parquet(tmp_path, spoil):
    path = tmp_path / "rows.parquet"
    path.write_bytes(spoil(parquet(path, {"a": [str(i) for i in range(100)]})))
    assert "can't be read" in refusal(path)


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet(path, {"a": pa.array([], pa.string())})
    assert refusal(path) == "can't be read as parquet (empty)"


def test_text_of_parquet_that_is_not_utf8(tmp_path):
    """Arrow keeps it as it is, and it would break whoever reads that row."""
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])
    path = tmp_path / "rows.parquet"
    parquet(path, {"n": [1, 2], "q": bad})
    rows = sources.open_file(str(path))
    assert list(sources.column(rows, "n", "here")) == [1, 2]
    assert "column 'q' can't be read (Invalid UTF8" in refusal(path)


def test_files_of_a_directory_are_named(tmp_path):
    parquet(tmp_path / "a.parquet", {"a": [1]})
    data = parquet(tmp_path / "b.parquet", {"b": [1]})
    with pytest.raises(
        UserError, match=r"b\.parquet: .* \(its columns differ from .*a\.parquet\)$"
    ):
        sources.open_file(str(tmp_path))
    (tmp_path / "b.parquet").write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"b\.parquet: can't be read as parquet"):
        sources.open_file(str(tmp_path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_files_of_a_directory_are_regular_files(tmp_path, make):
    """A pipe that nobody writes to would never end."""
    parquet(tmp_path / "a.parquet", {"a": [1]})
    make(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: can't be read .*\(not a regular file\)$"):
        sources.open_file(str(tmp_path))


@pytest.mark.parametrize("name", ["questions.csv", "questions.jsonl.gz", "questions"])
def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path, name):
    path = tmp_path / name
    path.write_text("problem,answer\n1 + 1,2\n")
    with pytest.raises(UserError, match=r"rows are read from \.parquet or \.jsonl files"):
        sources.open_rows(str(path), "train")


def test_single_precision_stays_that(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet(path, {"a": pa.array([0.1, None], pa.float32())})
    found = sources.column(sources.open_file(str(path)), "a", "here")
    assert found == [np.float32(0.1), None] and str(found[0]) == "0.1"
