"""`launch.recall` from a config to its tables, with a random model that reads letters."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from configs import base
from fkv import models
from fkv.errors import UserError
from fkv.evaluation import recall as measured
from fkv.jobs import lookups, recall
from fkv.models import ModelConfig
from fkv.runs import preemption

SIGNS = "abcdefghijklmnopqrstuvwxyzABCDE0123456789_=(),:'# \n"
FILES = ("agreement", "lookups")
TABLES = [f"{name}.{suffix}" for name in FILES for suffix in ("txt", "md", "csv")]


def save_letters(path):
    """A random decoder of single letters; returns its directory."""
    config = ModelConfig("qwen3", 64, 16, 2, 2, 1, 8, 16, qk_norm=True)
    models.save(path, models.LM(jax.device_get(models.init(jax.random.key(0), config)), config))
    ids = {sign: i for i, sign in enumerate(("<unk>", "<eos>", *SIGNS))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    return str(path)


def save_text(path):
    """Small modules, four constants each, then calls, and traces; returns their directory."""
    rng = np.random.default_rng(0)
    for i in range(24):
        names = ["".join(rng.choice(list("abcdef"), 4)) for _ in range(4)]
        lines = ["# begin"] + [f"{name} = {rng.integers(100, 1000)}" for name in names]
        lines += [f"go({''.join(rng.choice(list('abcdef'), 6))})" for _ in range(40)]
        (path / f"{i}.py").write_text("\n".join(lines))
    rows = [{"input_ids": rng.integers(2, 50, 70).tolist()} for _ in range(5)]
    (path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return save_letters(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text"))


def recipe(letters, text, **changes):
    config = base.recipe("data", "traces", "eval", "evaluate", "recall")
    config.model, config.interval, config.budget, config.seed = letters, 16, 32, 3
    config.data.eval_path = str(text / "traces.jsonl")
    config.traces.text, config.traces.held_out = (f"code={text}/*.py",), 0.5
    config.evaluate.policies, config.evaluate.budgets = ("full", "h2o", "random:sinks=4"), (32,)
    fields = dict(prompts=5, prompt_tokens=64, new_tokens=16, lookups=10, context=128, batch=2)
    fields = {f"recall.{name}": value for name, value in fields.items()}
    for name, value in {**fields, **changes}.items():
        group, _, leaf = name.rpartition(".")
        (config[group] if group else config)[leaf] = value
    return config


@pytest.fixture(autouse=True)
def every_candidate(monkeypatch):
    """A random model knows nothing: what it gets wrong counts, too."""
    monkeypatch.setattr(lookups, "_is_lookup", lambda row: True)


@pytest.fixture(scope="module")
def finished(letters, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookups, "_is_lookup", lambda row: True)
        recall.run(recipe(letters, text), str(path))
    return path


def rows_of(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").open()]


def test_all_policies_are_measured_at_all_budgets(finished):
    cells = {(n, b) for n in ("golden", "h2o", "random:sinks=4") for b in (32,)}
    assert len(rows_of(finished, "continuations")) == 5
    for name, key, count in (("agreement", "prompt", 5), ("lookups", "lookup", 10)):
        rows = rows_of(finished, name)
        assert {(r["policy"], r["budget"]) for r in rows} == cells
        assert len({(r["policy"], r["budget"], r[key]) for r in rows}) == len(rows) == 3 * count
        lines = list(csv.DictReader((finished / f"{name}.csv").open()))
        named = [(line["policy"], int(line["budget"])) for line in lines]
        assert set(named) == cells | ({("full", 0)} if name == "lookups" else set())
    line = next(x for x in lines if (x["policy"], x["budget"]) == ("h2o", "32"))
    right = [r["right"] for r in rows if (r["policy"], r["budget"]) == ("h2o", 32)]
    assert float(line["right"]) == pytest.approx(np.mean(right))
    assert "10 look-ups: of " in (finished / "lookups.txt").read_text()


def test_candidates_are_of_held_out_documents(finished, letters, text):
    candidates = rows_of(finished, "candidates")
    found = lookups.text_traces.of_split(recipe(letters, text), "heldout", finished)
    assert {row["source"] for row in candidates} <= {document.source for document in found}
    for row in candidates:
        whole = (row["question"] + row["answer"]).partition("\n")[2]
        assert row["kind"] == "constant" and whole in open(row["source"]).read()


def test_resumed_equals_uninterrupted(finished, letters, text, tmp_path, monkeypatch):
    real, calls = measured._recall, []

    def die(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measured, "_recall", die)
    with pytest.raises(KeyboardInterrupt):
        recall.run(recipe(letters, text), str(tmp_path))
    done = len(rows_of(tmp_path, "lookups"))
    assert 0 < done < 30
    with (tmp_path / "lookups.jsonl").open("a") as file:
        file.write('{"policy": "h2o", "bud')  # as a kill in the middle of writing leaves it
    recall.run(recipe(letters, text), str(tmp_path))
    for name in TABLES:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    for name in (*FILES, "candidates", "continuations"):
        ours, theirs = (sorted(map(str, rows_of(path, name))) for path in (tmp_path, finished))
        assert ours == theirs


def test_sigterm_ends_it_and_what_was_measured_stays(letters, text, tmp_path, sigterm_in):
    sigterm_in(measured, "_agree", 2)
    with pytest.raises(preemption.Preempted, match="143"):
        recall.run(recipe(letters, text), str(tmp_path))
    assert len(rows_of(tmp_path, "agreement")) == 3 * 2  # golden and two policies on two prompts


def test_more_is_added(finished, letters, text, tmp_path):
    path = shutil.copytree(finished, tmp_path / "more")
    before = {name: rows_of(path, name) for name in FILES}
    named = ("full", "h2o", "random:sinks=4", "tova")
    more = {"evaluate.policies": named, "recall.lookups": 13, "recall.prompts": 4}
    recall.run(recipe(letters, text, **more), str(path))
    for name, count in (("agreement", 5 * 3 + 4), ("lookups", 13 * 4)):
        rows = rows_of(path, name)
        assert rows[: len(before[name])] == before[name] and len(rows) == count
    lines = list(csv.DictReader((path / "agreement.csv").open()))
    assert [line["policy"] for line in lines] == ["golden", *named[1:]]
    assert {line["prompts"] for line in lines} == {"4"}


def test_less_than_asked_for_is_said(letters, text, tmp_path, capsys):
    config = recipe(letters, text, **{"recall.prompts": 0, "recall.lookups": 500})
    config.evaluate.policies = ("streaming_llm",)
    recall.run(config, str(tmp_path))
    count = len({row["lookup"] for row in rows_of(tmp_path, "lookups")})
    assert 10 < count < 500
    assert f"{count} look-ups found of 500: the text has no more" in capsys.readouterr().out
    assert not (tmp_path / "agreement.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recall.prompt_tokens": 60}, r"^recall.prompt_tokens = 60 must be a multiple of inter"),
        ({"recall.prompt_tokens": 32}, r"^recall.prompt_tokens = 32 .* at least 48, .* budgets"),
        ({"recall.context": 80}, r"^recall.context = 80 must .* at least 96"),
        ({"recall.batch": 0}, r"^recall.batch = 0 must be a whole number from 1"),
        ({"recall.lookups": -1}, r"^recall.lookups = -1 must be"),
        ({"evaluate.budgets": ()}, r"^evaluate.budgets is empty"),
        ({"evaluate.budgets": (40,)}, r"^evaluate.budgets: budget = 40 must be a multiple"),
        ({"evaluate.policies": ("h20",)}, r"^policy 'h20' is not known"),
        ({"evaluate.scorers": ("a=nowhere",)}, r"^evaluate.scorers = 'a=nowhere': .*nowhere"),
        ({"eval.baseline": "rkv"}, r"^eval.baseline = 'rkv' is not one of the pol"),
        ({"data.eval_path": "none.jsonl"}, r"^data.eval_path = 'none.jsonl': no such file"),
        ({"recall.prompt_tokens": 80}, r"none of the 5 traces .* is longer than"),
        ({"traces.text": ("code=none/*.py",)}, r"^traces.text: 'code=none/\*.py': "),
        ({"traces.held_out": 0.0}, r"^traces.text: none of 24 documents is heldout"),
        ({"seed": 4}, r"with another config \(seed: 3 -> 4\)"),
        ({"recall.new_tokens": 17}, r"with another config \(recall.new_tokens: 16 -> 17\)"),
        ({"evaluate.action": "top"}, r"with another config \(evaluate.action: sample -> top\)"),
        ({"traces.held_out": 0.4}, r"with other inputs, which have changed since \(traces.text"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_work_starts(
    finished, letters, text, tmp_path, monkeypatch, changes, message
):
    def never(*args):
        raise AssertionError("work has started")

    path = tmp_path / "new"
    if message.startswith("with "):  # what a finished run refuses
        shutil.copytree(finished, path)
    files = {x.name: x.read_bytes() for x in path.glob("*.*")}
    for name in ("agree", "select", "recall", "full_hidden"):
        monkeypatch.setattr(measured, name, never)
    with pytest.raises(UserError, match=message):
        recall.run(recipe(letters, text, **changes), str(path))
    assert {x.name: x.read_bytes() for x in path.glob("*.*")} == files


@pytest.mark.parametrize("name", ["agreement", "lookups", "candidates", "continuations"])
def test_damaged_results_are_named(finished, letters, text, tmp_path, name):
    path = shutil.copytree(finished, tmp_path / "copy")
    file = path / f"{name}.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    named = "prompt" if name == "continuations" else "lookup" if name == "candidates" else "policy"
    for row in ([], {**first, named: 7}, {}, first):
        file.write_text((finished / file.name).read_text() + json.dumps(row) + "\n")
        with pytest.raises(UserError, match=rf"{name}.jsonl, line \d+ is not a .*: delete that"):
            recall.run(recipe(letters, text), str(path))


def test_without_text_or_tokenizer(letters, text, tmp_path, capsys):
    config = recipe(letters, text, **{"traces.text": (), "recall.prompts": 0})
    recall.run(config, str(tmp_path / "none"))
    assert "no look-ups: set traces.text" in capsys.readouterr().out
    bare = tmp_path / "bare"
    shutil.copytree(letters, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: set recall.lookups to 0"):
        recall.run(recipe(str(bare), text), str(tmp_path / "run"))
