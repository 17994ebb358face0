"""Questions from files made on the spot, and every way in which they can be wrong."""

import decimal
import json
import reprlib

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from configs.base import INSTRUCTION
from fkv.data import benchmarks
from fkv.errors import UserError

ROWS = [
    {"problem": "1 + 1?", "answer": "2", "id": "p1"},
    {"problem": "What is\nhalf?", "answer": r"\frac{1}{2}", "id": "p2"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(tmp_path, kind, rows):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        return jsonl(path, rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def load(path, split="test", instruction=INSTRUCTION, **columns):
    columns = dict(subset="", question="problem", answer="answer") | columns
    return benchmarks.load(benchmarks.known(path, split, **columns), instruction)


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as raised:
        load(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_is_read(tmp_path, kind):
    found = load(write(tmp_path, kind, ROWS))
    assert found.unusable == []
    assert [(q.id, q.answer) for q in found.questions] == [("p1", "2"), ("p2", r"\frac{1}{2}")]
    # The paper's instruction, a blank, the question as it is.
    assert found.questions[1].text == (
        "Please solve the following problem step by step and put the final answer within "
        "\\boxed{}. What is\nhalf?"
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_and_instruction_can_be_others(tmp_path, kind):
    rows = [{"question": "2 * 3?", "solution": 6, "problem": "no"}]  # a number is an answer too
    path = write(tmp_path, kind, rows)
    found = load(path, question="question", answer="solution", instruction="")
    assert found.questions == [benchmarks.Question("0", "2 * 3?", "6")]


def test_rows_without_an_id_are_numbered(tmp_path):
    rows = [{"problem": f"{i}?", "answer": None if i == 1 else str(i)} for i in range(3)]
    found = load(jsonl(tmp_path / "rows.jsonl", rows))
    assert [(q.id, q.answer) for q in found.questions] == [("0", "0"), ("2", "2")]


@pytest.mark.parametrize("ids", [[None, None, "x"], ["x", "y", "x"]])
def test_no_two_questions_share_an_id(tmp_path, ids):
    rows = [{"problem": "x?", "answer": "3", "id": name} for name in ids]
    found = load(jsonl(tmp_path / "rows.jsonl", rows))
    assert len({q.id for q in found.questions}) == 3


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("First 48/2 = <<48/2=24>>24.\nThen 72.\n#### 72", "72"),
        ("A #### in between\n#### 1,024 ", "1,024"),
        ("no marks", "no marks"),
        ("A #### in between\n#### 3\n#### 4", "4"),
        ("####5", "5"),
    ],
)
def test_answers_of_gsm8k_are_cut(tmp_path, answer, reference):
    rows = [{"question": "How many?", "answer": answer}]
    found = load(jsonl(tmp_path / "rows.jsonl", rows), question="question")
    assert found.questions[0].answer == reference


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_unusable_rows_are_named(tmp_path, kind):
    rows = [
        ROWS[0],
        {"problem": "no answer", "answer": None, "id": "p3"},
        {"problem": "an empty one", "answer": "  ", "id": "p4"},
        {"problem": None, "answer": "3", "id": "p5"},
        {"problem": " ", "answer": "3", "id": "p6"},
        ROWS[1],
    ]
    found = load(write(tmp_path, kind, rows))
    assert [q.id for q in found.questions] == ["p1", "p2"]
    assert found.unusable == [
        (1, "answer is None"), (2, "answer is '  '"), (3, "problem is None"), (4, "problem is ' '"),
    ]  # fmt: skip


PLAIN = [
    (12, "12"), (-3, "-3"), (12.0, "12"), (-0.5, "-0.5"), (1e-05, "0.00001"),
    (2.5e-7, "0.00000025"), (1e22, "10000000000000000000000"), (10**30 + 1, str(10**30 + 1)),
    (["42"], "42"), ([7], "7"), ([1e-05], "0.00001"), ([["x"]], "x"), ("12.0", "12.0"),
    (" 5 ", "5"), ("2020-01-01", "2020-01-01"),
]  # fmt: skip
NO_ANSWERS = [
    None, "", " ", [], ["1", "2"], [1, 2], [None], [""], {}, {"value": "5"}, {"a": 1, "b": 2}, True,
    False, float("nan"), float("inf"), "Add.\n####", "Add.\n####  \n", "#### 5\n####",
]  # fmt: skip


def test_answers_that_are_no_text_are_written_out(tmp_path):
    rows = [{"problem": f"{i}?", "answer": answer} for i, (answer, _) in enumerate(PLAIN)]
    found = load(jsonl(tmp_path / "rows.jsonl", rows))
    assert [q.answer for q in found.questions] == [text for _, text in PLAIN]
    assert found.unusable == []


def test_answers_that_say_nothing_plain_are_left_out(tmp_path):
    rows = [{"problem": f"{i}?", "answer": answer} for i, answer in enumerate(NO_ANSWERS)]
    path = jsonl(tmp_path / "rows.jsonl", [*rows, {"problem": "x?", "answer": 3}])
    found = load(path)
    assert [q.text[-2:] for q in found.questions] == ["x?"]
    assert found.unusable == [
        (i, f"answer is {reprlib.repr(answer)}") for i, answer in enumerate(NO_ANSWERS)
    ]


@pytest.mark.parametrize(
    ("column", "answers"),
    [
        (pyarrow.array([12.0, None, 0.5], pyarrow.float64()), ["12", None, "0.5"]),  # by pandas
        (pyarrow.array([0.1, 1e-05, 3.0], pyarrow.float32()), ["0.1", "0.00001", "3"]),
        (pyarrow.array([0.5, 3.0, None], pyarrow.float16()), ["0.5", "3", None]),
        (pyarrow.array([b"42", b"\xff", None], pyarrow.binary()), ["42", None, None]),
        (pyarrow.array([["1"], ["1", "2"], []]), ["1", None, None]),
        (pyarrow.array([{"a": 1}, None, {"a": 2}]), [None, None, None]),
        (pyarrow.array([True, False, None]), [None, None, None]),
        (pyarrow.array([0, 2**60 + 1, -1], pyarrow.int64()), ["0", str(2**60 + 1), "-1"]),
        (
            pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("2.00"), None]),
            ["1.5", "2", None],
        ),
        (pyarrow.array([0, 1, None], pyarrow.timestamp("s")), [None, None, None]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_answers_of_parquet(tmp_path, column, answers):
    path = tmp_path / "rows.parquet"
    table = {"problem": list("abcd"), "answer": pyarrow.concat_arrays([column, column[:1]])}
    parquet.write_table(pyarrow.table(table), path)
    wanted = [answer for answer in [*answers, answers[0]] if answer]
    if not wanted:
        refused(r"none of its 4 rows has problem and answer \(row 0: answer is", str(path))
        return
    found = load(str(path))
    assert [q.answer for q in found.questions] == wanted
    assert len(found.unusable) == 4 - len(wanted)


@pytest.mark.parametrize("asked", [5, 0.5, True, ["a", "b"], {"role": "user"}, [{"role": "user"}]])
def test_questions_are_words(tmp_path, asked):
    rows = [{"problem": x, "answer": "3"} for x in (asked, ["a?"], "b?")]
    found = load(jsonl(tmp_path / "rows.jsonl", rows), instruction="")
    assert [q.text for q in found.questions] == ["a?", "b?"]
    assert found.unusable == [(0, f"problem is {reprlib.repr(asked)}")]


def test_what_is_wrong_is_said_in_short(tmp_path):
    rows = [{"problem": "x?", "answer": ["long"] * 10_000}, {"problem": "y?", "answer": 3}]
    ((row, why),) = load(jsonl(tmp_path / "rows.jsonl", rows)).unusable
    assert row == 0 and len(why) < 100


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ([3, 1, 2], ["3", "1", "2"]),
        ([3.0, 1.0, 2.0], ["3", "1", "2"]),
        (["a", ["b"], 2], ["a", "b", "2"]),
        ([["a", "b"], ["a", "c"], ["b"]], ["0", "1", "2"]),
        ([{"n": 1}, {"n": 2}, {"n": 3}], ["0", "1", "2"]),
        ([None, 1, 2], ["0", "1", "2"]),
        (["", 1, 2], ["0", "1", "2"]),
        ([1, "1", 2], ["0", "1", "2"]),
    ],
)
def test_ids_are_text_or_numbers(tmp_path, ids, names):
    rows = [{"problem": "x?", "answer": "3", "id": name} for name in ids]
    assert [q.id for q in load(jsonl(tmp_path / "rows.jsonl", rows)).questions] == names


def test_no_usable_row_is_an_error(tmp_path):
    rows = [{"problem": "x?", "answer": ""}, {"problem": "", "answer": "3"}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    refused(r"rows\.jsonl: none of its 2 rows has problem and answer", path)


def test_a_missing_column_names_those_there_are(tmp_path):
    path = write(tmp_path, "parquet", ROWS)
    refused(r"no column 'question'; it has problem, answer, id", path, question="question")
    refused(r"no column 'target'; it has problem, answer, id", path, answer="target")


def test_files_that_cannot_be_read(tmp_path):
    refused(r"gone\.jsonl: no such file", str(tmp_path / "gone.jsonl"))
    refused(r"gone\.parquet: no such file", str(tmp_path / "gone.parquet"))
    for name, text in (("a.jsonl", '{"problem": '), ("b.parquet", "no parquet"), ("c.jsonl", "")):
        (tmp_path / name).write_text(text)
        message = refused("can't be read as", str(tmp_path / name))
        assert name in message


def test_data_sets_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, subset, split):
        asked.append((path, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("HuggingFaceH4/MATH-500").questions) == 2
    load("openai/gsm8k", "train", subset="main")
    assert asked == [("HuggingFaceH4/MATH-500", None, "test"), ("openai/gsm8k", "main", "train")]


def test_known_names_have_their_columns(monkeypatch):
    asked = []

    def load_dataset(path, subset, split):
        asked.append((path, subset, split))
        return datasets.Dataset.from_list([{"question": "3 + 4?", "answer": "Add.\n#### 7"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (question,) = load("gsm8k", "ignored", question="ignored").questions
    assert asked == [("openai/gsm8k", "main", "test")]
    assert question.text.endswith("3 + 4?") and question.answer == "7" and not question.choice


def test_one_of_several_answers_is_chosen_by_its_letter(monkeypatch):
    rows = [
        {"Question": f"{i}? ", "Correct Answer": f"right {i}"}
        | {f"Incorrect Answer {j}": f"wrong {i} {j}" for j in (1, 2, 3)}
        for i in range(12)
    ]
    rows[3]["Incorrect Answer 2"] = ""
    rows[5]["Incorrect Answer 3"] = "right 5 "
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows)
    )
    found, again = load("gpqa"), load("gpqa")
    assert found == again
    assert found.unusable == [
        (3, "Incorrect Answer 2 is ''"), (5, "Incorrect Answer 3 is also the right one"),
    ]  # fmt: skip
    for question in found.questions:
        asked, blank, *choices, other, last = question.text.split("\n")
        assert asked == f"{INSTRUCTION} {question.id}?" and blank == other == ""
        assert last == "Answer with the letter of the right choice." and question.choice
        assert [line[:3] for line in choices] == ["A) ", "B) ", "C) ", "D) "]
        (right,) = (line for line in choices if "right" in line)
        assert right == f"{question.answer}) right {question.id}"
        assert len(set(choices)) == 4
    assert len({question.answer for question in found.questions}) > 2


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub\nTraceback: and so on"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist"),
        ValueError("Unknown split 'tset'. Should be one of ['test']."),
    ],
)
def test_what_the_hub_says_is_one_line(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused("no/such: not a .parquet or .jsonl file, and the hub", "no/such")
    assert type(error).__name__ in message and str(error).split("\n")[0] in message
    assert "Traceback" not in message
