"""`launch.harness` from a config to its table, on tasks from local files."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import jax

from configs import base
from fkv import models
from fkv.errors import UserError
from fkv.harness import asking, tasks
from fkv.jobs import common, harness
from fkv.models import ModelConfig
from fkv.runs import preemption
from tests.harness import local

FILES = ["samples.jsonl", "documents.jsonl", *(f"harness.{x}" for x in ("txt", "md", "csv"))]
COUNT = 4  # documents of a task


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random decoder with a tokenizer; no PyTorch is needed."""
    path = tmp_path_factory.mktemp("model")
    size = local.save_tokenizer(path, begin=True)
    config = ModelConfig("qwen3", size, 16, 2, 2, 1, 8, 16, qk_norm=True, max_positions=192)
    models.save(path, models.LM(jax.device_get(models.init(jax.random.key(0), config)), config))
    return str(path)


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    return local.write_tasks(tmp_path_factory.mktemp("tasks"), local.documents(COUNT))


def recipe(saved, include, **changes):
    config = base.recipe("evaluate", "harness")
    config.model, config.interval, config.budget = saved, 16, 32
    config.evaluate.policies, config.evaluate.budgets = ("full", "random:sinks=4"), (32,)
    fields = dict(tasks=("pages", "needle"), include_path=include, lengths=(128, 256), rows=2)
    fields = {f"harness.{name}": value for name, value in fields.items()}
    for name, value in {**fields, **changes}.items():
        group, _, leaf = name.rpartition(".")
        (config[group] if group else config)[leaf] = value
    return config


@pytest.fixture(scope="module")
def finished(saved, include, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    harness.run(recipe(saved, include), str(path))
    return path


def rows_of(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").open()]


def test_every_policy_answers_every_task(finished):
    rows = rows_of(finished, "samples")
    cells = [("full", 0), ("random:sinks=4", 32)]
    for cell in cells:
        for task in ("pages", "needle"):
            some = [r for r in rows if (r["policy"], r["budget"], r["task"]) == (*cell, task)]
            assert [r["doc"] for r in some] == list(range(COUNT))
            assert any(r["evictions"] for r in some) == bool(cell[1])
    lines = list(csv.DictReader((finished / "harness.csv").open()))
    named = [(x["policy"], int(x["budget"]), x["task"], x["metric"]) for x in lines]
    columns = [("pages", "word_perplexity"), ("needle", "128"), ("needle", "256")]
    assert named == [(*cell, *column) for cell in cells for column in columns]
    # The table by hand, from answers and documents.
    found = {}
    for cell in cells:
        logprobs = [
            r["answer"] for r in rows if (r["policy"], r["budget"], r["task"]) == (*cell, "pages")
        ]
        pages = [one["page"] for one in local.documents(COUNT)["pages"]]
        found[cell] = np.exp(-sum(logprobs) / sum(len(x.split()) for x in pages))
    full, evicted = (x for x in lines if x["task"] == "pages")
    assert float(full["value"]) == pytest.approx(found[cells[0]], rel=1e-6)
    assert float(evicted["difference"]) == pytest.approx(found[cells[1]] - found[cells[0]])
    assert not full["difference"] and float(evicted["evictions"]) > 0
    assert [x["documents"] for x in lines[:3]] == ["4", "2", "2"]
    documents = rows_of(finished, "documents")
    assert len(documents) == 2 * 2 * COUNT and documents[0]["metrics"]["word_perplexity"][1] > 0


def test_resumed_equals_uninterrupted(finished, saved, include, tmp_path, monkeypatch):
    """Answers before an interruption are kept; none is asked for again."""
    monkeypatch.setattr(harness, "_AT_ONCE", 1)
    real, calls = asking.Subject._evictions, []

    def die(*args):
        calls.append(args)
        if len(calls) == 2 + COUNT:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(asking.Subject, "_evictions", die)
    with pytest.raises(KeyboardInterrupt):
        harness.run(recipe(saved, include), str(tmp_path))
    assert len(rows_of(tmp_path, "samples")) == 1 + COUNT
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"policy": "full", "bud')  # as a kill in the middle of writing leaves it
    harness.run(recipe(saved, include), str(tmp_path))
    assert len(calls) == 1 + 4 * COUNT
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name

    # Finished, it does not even load the weights.
    monkeypatch.setattr(common, "load_language_model", None)
    harness.run(recipe(saved, include), str(tmp_path))
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


def test_sigterm_ends_it_and_answers_stay(saved, include, tmp_path, sigterm_in):
    sigterm_in(asking.Subject, "_evictions", 2)
    config = recipe(saved, include, **{"harness.tasks": ("needle",)})
    with pytest.raises(preemption.Preempted, match="143"):
        harness.run(config, str(tmp_path))
    assert 2 <= len(rows_of(tmp_path, "samples")) < 2 * COUNT


def test_more_is_added(finished, saved, include, tmp_path, monkeypatch):
    path = shutil.copytree(finished, tmp_path / "more")
    before = rows_of(path, "samples")
    more = {"harness.tasks": ("needle", "choose"), "harness.metrics": ("choose=acc_norm",)}
    harness.run(recipe(saved, include, **more), str(path))
    rows = rows_of(path, "samples")
    assert len(rows) == len(before) + 2 * COUNT * 3
    assert all(r in rows for r in before)
    head = (path / "harness.md").read_text().splitlines()[0]
    assert "choose acc_norm ↑" in head and "pages" not in head


def test_fewer_documents_and_examples_in_a_chat(saved, include, tmp_path, capsys):
    changes = {
        "harness.tasks": ("choose",), "harness.limit": 2, "harness.num_fewshot": 1,
        "harness.chat": True, "harness.system": "Be brief.", "harness.max_length": 60,
        "evaluate.policies": ("streaming_llm",),
    }  # fmt: skip
    harness.run(recipe(saved, include, **changes), str(tmp_path))
    rows = rows_of(tmp_path, "samples")
    assert [(r["doc"], r["request"]) for r in rows] == [(i, j) for i in range(2) for j in range(3)]
    out = capsys.readouterr().out
    assert "warning: choose: " in out and "longer than max_length = 60: of each, up to" in out
    assert max(r["context"] for r in rows) <= 60 and any(r["cut"] for r in rows)
    assert "to full" not in (tmp_path / "harness.md").read_text()
    assert json.loads((tmp_path / "provenance.json").read_text())["harness.tasks: 'choose'"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harness.tasks": ()}, r"^harness.tasks is empty: name at least one task"),
        ({"harness.tasks": ("page",)}, r"^harness.tasks: 'page' is no task, .* pages\?"),
        ({"harness.tasks": ("pages", "zz*")}, r"^harness.tasks: 'zz\*' is no task, group or tag"),
        ({"harness.tasks": ("spoilt",)}, r"^harness.tasks: 'spoilt' is no task.*bad.yaml can't be"),
        ({"harness.tasks": ("gone",)}, r"^harness.tasks: 'gone' can't be loaded \(FileNotFound"),
        ({"harness.tasks": ("blank",)}, r"^harness.tasks: 'blank' can't be loaded \("),
        ({"harness.tasks": ("beams",)}, r"^task beams: .* num_beams = 4 is not supported"),
        ({"harness.tasks": ("long",)}, r"^task long, document 0: 500 new tokens leave no room"),
        ({"harness.include_path": "none"}, r"^harness.include_path = 'none': no such directory"),
        ({"harness.metrics": ("pages",)}, r"^harness.metrics: 'pages' must be of the form task=me"),
        ({"harness.metrics": ("page=acc",)}, r"^harness.metrics: 'page' is not in tasks.* pages\?"),
        ({"harness.metrics": ("pages=acc",)}, r"^harness.metrics: 'pages' has no acc,none, but w"),
        ({"harness.metrics": ("pages=bits_per_byte,x",)}, r"'pages' has no bits_per_byte,x, but"),
        ({"harness.template": ("x",)}, r"^harness.template: 'x' must be of the form name=value"),
        ({"harness.chat": True, "harness.template": ("tools=1",)}, r"'tools' is an argument of"),
        ({"harness.rows": 0}, r"^harness.rows = 0 must be a whole number from 1"),
        ({"harness.limit": -1}, r"^harness.limit = -1 must be a whole number"),
        ({"harness.max_length": 4}, r"^task needle, document 0: 12 new tokens leave no room"),
        ({"evaluate.policies": ("h20",)}, r"^policy 'h20' is not known"),
        ({"evaluate.budgets": (40,)}, r"^evaluate.budgets: budget = 40 must be a multiple"),
        ({"evaluate.scorers": ("a=nowhere",)}, r"^evaluate.scorers = 'a=nowhere': .*nowhere"),
        ({"seed": 4}, r"with another config \(seed: 0 -> 4\)"),
        ({"harness.chat": True}, r"with another config \(harness.chat: False -> True\)"),
        ({"interval": 8}, r"with another config \(interval: 16 -> 8\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_model_is_loaded(
    finished, saved, include, tmp_path, monkeypatch, changes, message
):
    path = tmp_path / "new"
    if message.startswith("with "):  # what a finished run refuses
        shutil.copytree(finished, path)
    own = local.copied(include, tmp_path / "tasks")

    text = (own / "write.yaml").read_text()
    (own / "bad.yaml").write_text("task: [")
    (own / "gone.yaml").write_text(
        text.replace("task: write", "task: gone").replace("_test.jsonl", "_none.jsonl")
    )
    (own / "blank.yaml").write_text("task: blank")
    beams = text.replace("task: write", "task: beams").replace(
        "toks: 10", "toks: 10\n  num_beams: 4"
    )
    (own / "beams.yaml").write_text(beams)
    (own / "long.yaml").write_text(
        text.replace("task: write", "task: long").replace("toks: 10", "toks: 500")
    )
    monkeypatch.setattr(common, "load_language_model", None)
    manager = tasks.TaskManager  # without lm-eval's own tasks, which take a while to be read
    own_only = {"include_defaults": False}
    monkeypatch.setattr(tasks, "TaskManager", lambda **given: manager(**given | own_only))
    before = {x.name: x.read_bytes() for x in path.glob("*.*")}
    config = recipe(saved, str(own), **changes)
    with pytest.raises(UserError, match=message) as caught:
        harness.run(config, str(path))
    assert "\n" not in str(caught.value)
    assert {x.name: x.read_bytes() for x in path.glob("*.*")} == before


def test_other_documents_are_refused(finished, saved, include, tmp_path):
    path = shutil.copytree(finished, tmp_path / "copy")
    own = local.write_tasks(tmp_path / "tasks", {"pages": [{"page": "Other words."}] * 4})
    changes = {"harness.tasks": ("pages",)}
    with pytest.raises(UserError, match=r"which have changed since \(harness.tasks: 'pages'"):
        harness.run(recipe(saved, own, **changes), str(path))
    (path / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"document 0 of pages has changed since it was answered"):
        harness.run(recipe(saved, own, **changes), str(path))


def test_damaged_answers_are_named(finished, saved, include, tmp_path):
    path = shutil.copytree(finished, tmp_path / "copy")
    file = path / "samples.jsonl"
    first = json.loads(file.read_text().splitlines()[0])
    for row in ([], {**first, "doc": -1}, {**first, "doc": 9, "answer": None}, first):
        file.write_text((finished / file.name).read_text() + json.dumps(row) + "\n")
        with pytest.raises(UserError, match=r"samples.jsonl, line \d+ is not an answer: delete"):
            harness.run(recipe(saved, include), str(path))


def test_without_a_tokenizer_template_or_lm_eval(saved, include, tmp_path, monkeypatch):
    bare = local.copied(saved, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    config = recipe(str(bare), include, **{"harness.chat": True})
    with pytest.raises(UserError, match="has no chat template"):
        harness.run(config, str(tmp_path / "run"))
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer: tasks are texts"):
        harness.run(recipe(str(bare), include), str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "fkv.harness.tasks", None)
    with pytest.raises(UserError, match=r'needs lm_eval: pip install .*"\.\[harness\]"$'):
        harness.run(recipe(saved, include), str(tmp_path / "run"))


def test_variables_of_a_template_are_values_or_text():
    given = ("enable_thinking=False", "n=3", "date=26 Jul", "empty=")
    found = {"enable_thinking": False, "n": 3, "date": "26 Jul", "empty": ""}
    assert harness.template_of(given) == found
