"""Traces from the model's own answers, and from answers that are there."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest

import fkv
from configs import tiny
from fkv import api, models
from fkv.data import traces as data
from fkv.errors import UserError
from fkv.jobs import traces
from fkv.keys import Purpose, key_of
from fkv.models import ModelConfig, chat
from fkv.runs import preemption
from fkv.tasks import ledger
from tests import figures
from tests.jobs.test_evaluate import WORDS, word_model
from tests.jobs.test_sft import SEED
from tests.models import test_texts

__all__ = ["word_model"]  # a fixture


def recipe(**changes):
    config = tiny.get_config()
    config.seed = SEED
    config.task.facts, config.task.hops = (4, 6), (3, 4)
    config.task.remarks, config.task.marks = (0, 1), (0, 1)
    config.traces.count, config.traces.batch = 5, 4
    for name, value in changes.items():
        config.traces[name] = value
    return config


def rows(path):
    return [
        row for file in sorted(path.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces")
    assert traces.run(recipe(), str(path)) == 5
    return path


def test_traces_are_the_model_s_own_answers(finished, monkeypatch):
    found = rows(finished)
    # Drawn anew: an answer to be judged shares no key with one to learn from.
    key = lambda seed, i, j: key_of(seed, Purpose.TRACE, i, j)  # noqa: E731
    monkeypatch.setattr(api, "sample_key", key)
    assert [(r["id"], r["sample"]) for r in found] == [(str(i), 0) for i in range(5)]
    spec = ledger.Spec(**{name: tuple(bounds) for name, bounds in recipe().task.items()})
    problems = ledger.problems(SEED, "train", 0, 5, spec)
    model = fkv.load("embedded", "float32")
    answers = fkv.generate(
        model, [ledger.encode(p.prompt) for p in problems], new_tokens=spec.max_new_tokens(),
        budget=32, interval=16, temperature=0.6, top_k=20, top_p=0.95, seed=SEED,
    )  # fmt: skip
    for row, problem, (answer,) in zip(found, problems, answers, strict=True):
        prompt = ledger.encode(problem.prompt)
        assert row["input_ids"] == [*prompt.tolist(), *answer.tokens.tolist()]
        assert (row["prompt_tokens"], row["tokens"]) == (len(prompt), len(row["input_ids"]))
        assert row["truncated"] == answer.truncated and row["source"] == "embedded"
    assert len(list(finished.glob("*.parquet"))) == 2  # a file a batch
    about = pq.read_schema(next(finished.glob("*.parquet"))).metadata[b"fkv"]
    assert json.loads(about)["traces"]["temperature"] == 0.6


FIGURES = {
    "prompt_tokens": [44, 40, 45, 44, 41],
    "tokens": [75, 72, 73, 68, 68],
    "truncated": [False, False, False, False, False],
    "last answer": "okay bon tal m1 boat 5 5 m1 5 next tal lal mule 2 7 okay lal home mule 2 9 "
        "</think> m1 5 total 9 <eos>",
}  # fmt: skip


def test_figures_of_a_seeded_run(finished):
    found = rows(finished)
    names = ("prompt_tokens", "tokens", "truncated")
    told = {name: figures.column(found, name) for name in names}
    answer = found[-1]["input_ids"][found[-1]["prompt_tokens"] :]
    told["last answer"] = " ".join(ledger.decode(answer))
    figures.check(told, FIGURES)


def test_what_is_written_is_what_training_reads(finished):
    sequences, prompts = data.read(str(finished), prompt_column="prompt_tokens")
    assert [s.tolist() for s in sequences] == [r["input_ids"] for r in rows(finished)]
    assert prompts == [r["prompt_tokens"] for r in rows(finished)]


@pytest.mark.parametrize(
    "name", ["traces-000-00000 (copy).parquet", "traces-x.parquet", "traces-000-00009.parquet"]
)
def test_a_copied_file_is_named(finished, tmp_path, name):
    directory = shutil.copytree(finished, tmp_path / "traces")
    shutil.copy(directory / "traces-000-00000.parquet", directory / name)
    with pytest.raises(
        UserError, match=re.escape(f"{name} is not one of this run's files, or is a copy")
    ):
        traces.run(recipe(), str(directory))
    with pytest.raises(UserError, match=r"trace '0', sample 0, is also in .*, and would count twi"):
        data.read(str(directory))
    (directory / name).unlink()
    assert traces.run(recipe(), str(directory)) == 0


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, sigterm_in):
    sigterm_in(traces, "_row", 1)
    with pytest.raises(preemption.Preempted):
        traces.run(recipe(), str(tmp_path))
    ended = len(rows(tmp_path))
    assert 0 < ended < 5  # what has ended is written
    sigterm_in.undo()
    assert traces.run(recipe(), str(tmp_path)) == 5 - ended
    assert sorted(rows(tmp_path), key=lambda row: row["id"]) == rows(finished)
    assert traces.run(recipe(), str(tmp_path)) == 0
    with pytest.raises(UserError, match=r"another config \(traces.temperature: 0.6 -> 1.0\)"):
        traces.run(recipe(temperature=1.0), str(tmp_path))


@pytest.fixture
def answered(tmp_path):
    found = [
        {"q": "one half", "r": "half </think> \\boxed{2}"},
        {"q": "one", "r": None},
        {"q": "", "r": "half"},
        {"q": "half", "r": "one"},
    ]
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_answers_that_are_there_become_traces(word_model, answered, tmp_path, capsys):
    config = recipe(questions=str(answered), question="q", response="r", instruction="", count=0)
    config.model = word_model
    assert traces.run(config, str(tmp_path / "out")) == 2
    said = capsys.readouterr().out
    assert "row 1 left out, r is None" in said and "row 2 left out, q is ''" in said
    words = [[WORDS[i] for i in r["input_ids"]] for r in rows(tmp_path / "out")]
    assert words == [
        ["<user>", "one", "half", "<answer>", "half", "</think>", "\\boxed{2}", "<eos>"],
        ["<user>", "half", "<answer>", "one", "<eos>"],
    ]
    assert [r["prompt_tokens"] for r in rows(tmp_path / "out")] == [4, 3]
    assert not any(r["truncated"] for r in rows(tmp_path / "out"))


def test_words_that_the_tokenizer_does_not_know_are_warned_of_in_one_line(
    word_model, tmp_path, capsys
):
    rows = [{"q": "one", "r": "zwei half"}, {"q": "drei", "r": "half"}]
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(questions=str(path), question="q", response="r", instruction="", count=0)
    config.model = word_model
    traces.run(config, str(tmp_path / "out"))
    [said] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert said.startswith(f"warning: {path}: the answer of row 0: 1 of its 3 tokens are ")
    assert said.endswith(" (likewise in 2 of 4 texts)")


def answers(template, stop, **settings):
    """A function that makes the tokens of an answer to "one", and the words of its prompt."""
    tokenizer = test_texts.make(template)
    config = ModelConfig("qwen3", len(test_texts.WORDS), 16, 1, 2, 1, 8, 16)
    ids = tuple(test_texts.IDS[word] for word in stop)
    model = fkv.api.Model(models.LM({}, config), tokenizer, ids, "x")
    prompt = fkv.api.encode(model, "one", chat=True)
    end = chat.end_of_answer(tokenizer, ids, True)
    return (
        lambda text: test_texts.words(traces._answer(model, prompt, text, end, "x")),
        test_texts.words(prompt),
    )


LLAMA = (
    "<s> {% for m in messages %} <{{ m.role }}> {{ m.content }} <eot> {% endfor %}"
    "{% if add_generation_prompt %} <bot> {% endif %}"
)


@pytest.mark.parametrize(
    "text", ["two six", "two six <eot>", "two six <eot>\n", "two six </s>", "two six <eot> </s> "]
)
def test_an_answer_ends_once_and_with_the_token_of_its_template(text):
    answer, prompt = answers(LLAMA, ("</s>", "<eot>"))
    assert prompt == "<s> <user> one <eot> <bot>"
    assert answer(text) == "two six <eot>"
    # Without a template that says so, with the tokenizer's.
    answer, _ = answers(LLAMA.replace("<eot>", ""), ("<eot>", "</s>"))
    assert answer(text) == "two six </s>"
    answer, _ = answers(LLAMA, ())
    assert answer(text) == text.strip()


@pytest.mark.parametrize(
    "text", ["<think> two </think> six", "\n<think>\n\ntwo </think> six", "two </think> six"]
)
@pytest.mark.parametrize("opening", ["<bot> <think>", "<bot><think>\n\n"])
def test_a_thought_is_opened_by_the_prompt_or_by_the_answer(text, opening):
    answer, prompt = answers(LLAMA.replace("<bot>", opening.replace("><", "> <")), ("<eot>",))
    assert prompt.endswith("<bot> <think>")
    assert answer(text) == "two </think> six <eot>"
    answer, _ = answers(LLAMA, ("<eot>",))
    assert answer(text) == f"{' '.join(text.split())} <eot>"


def test_answers_of_another_tokenizer_are_refused():
    lm = models.LM({}, ModelConfig("qwen3", 9, 16, 1, 2, 1, 8, 16))
    model = fkv.api.Model(lm, test_texts.make(), (2,), "x")
    with pytest.raises(UserError, match="the answer of row 3 has token 9, and the model's are 0"):
        traces._answer(model, fkv.api.encode(model, "one"), "two", 2, "the answer of row 3")


def test_traces_longer_than_the_model_was_made_for_are_warned_of(
    word_model, answered, tmp_path, capsys
):
    model = shutil.copytree(word_model, tmp_path / "model")
    about = json.loads((model / "config.json").read_text())
    for positions, warned in ((8, False), (7, True)):
        (model / "config.json").write_text(
            json.dumps(about | {"max_position_embeddings": positions})
        )
        config = recipe(
            questions=str(answered), question="q", response="r", instruction="", count=0
        )
        config.model = str(model)
        traces.run(config, str(tmp_path / f"out_{positions}"))
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
        assert len(lines) == warned
    assert "= 8 tokens, beyond max_position_embeddings = 7: " in lines[0]


def test_the_model_answers_questions_of_a_file(word_model, answered, tmp_path):
    config = recipe(questions=str(answered), question="q", instruction="", count=2, samples=2,
                    new_tokens=6, temperature=1.0)  # fmt: skip
    config.model = word_model
    traces.run(config, str(tmp_path / "out"))
    found = rows(tmp_path / "out")
    assert [(r["id"], r["sample"]) for r in found] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert found[0]["input_ids"] != found[1]["input_ids"]
    for r in found:
        assert r["truncated"] == (r["input_ids"][-1] != WORDS.index("<eos>"))
        assert r["tokens"] <= r["prompt_tokens"] + 6


def test_questions_that_were_replaced_are_refused(word_model, answered, tmp_path):
    config = recipe(questions=str(answered), question="q", response="r", instruction="", count=1)
    config.model = word_model
    path = tmp_path / "out"
    assert traces.run(config, str(path)) == 1
    config.traces.count = 0
    text = answered.read_text()
    for old, new in (("half </think>", "one </think>"), ("one half", "half one")):
        answered.write_text(text.replace(old, new))
        with pytest.raises(
            UserError, match=r"since \(traces.questions: questions, number 1\): use"
        ):
            traces.run(config, str(path))
    answered.write_text(text)
    assert traces.run(config, str(path)) == 1  # the other one
    assert len(rows(path)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(samples=0), "traces.samples = 0 must be a whole number from 1"),
        (dict(questions="none.jsonl"), "none.jsonl: no such file"),
        (dict(temperature=-1.0), "temperature = -1.0"),
    ],
)
def test_bad_input_is_refused_before_work_starts(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        traces.run(recipe(**changes), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_columns_and_damage_are_named(word_model, answered, tmp_path):
    config = recipe(questions=str(answered), question="problem")
    config.model = word_model
    with pytest.raises(UserError, match="no column 'problem'; it has q, r"):
        traces.run(config, str(tmp_path / "out"))
    config = recipe(questions=str(answered), question="q", response="nope")
    config.model = word_model
    with pytest.raises(UserError, match="no column 'nope'"):
        traces.run(config, str(tmp_path / "out"))
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "traces-000-00000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"traces-000-00000\.parquet can't be read .* delete it"):
        traces.run(recipe(), str(bad))
