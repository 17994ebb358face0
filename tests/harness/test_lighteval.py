"""The file for lighteval's custom backend, by its own command, beside lighteval's own model."""

import json
import os
import shutil

import pytest

pytest.importorskip("lighteval", reason="lighteval is in an environment of its own")

from pathlib import Path

from fkv.errors import UserError
from fkv.harness import lighteval_model
from tests.harness import local

FILE = lighteval_model.__file__
TASKS = "pages|0,choose|0,write|0"
THEIRS = "choose|0,write|0"  # lighteval's own model fails at documents without choices


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return local.save_checkpoint(tmp_path_factory.mktemp("checkpoint"), begin=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory for each task, as data sets are; caches of lighteval go here, too."""
    path = tmp_path_factory.mktemp("light")
    given = local.write_tasks(path / "given", local.documents(4))
    for name in ("pages", "choose", "write"):
        (path / name).mkdir()
        shutil.copy(f"{given}/{name}_test.jsonl", path / name / "test.jsonl")
    os.environ["FKV_LIGHT_TASKS"] = str(path)
    os.environ["HF_HOME"] = str(path / "home")
    return path


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch):
    """lighteval reads all of its tasks to run one, and some of them download files as they load."""
    from lighteval.tasks.registry import Registry

    for name in ("_load_from_files", "_load_from_subdirs"):
        monkeypatch.setattr(Registry, name, staticmethod(lambda *args: {}))


def details(root, out, run, *args, tasks=TASKS):
    """What each document got, by task, from the files that lighteval writes."""
    import pyarrow.parquet

    run(*args, tasks, custom_tasks=str(Path(__file__).with_name("light_tasks.py")),
        output_dir=str(out), save_details=True)  # fmt: skip
    found = {}
    for path in sorted(out.rglob("*.parquet")):
        name = path.name.split("|")[0].removeprefix("details_")
        found[name] = pyarrow.parquet.read_table(path).to_pylist()
    return found, json.loads(next(out.rglob("results_*.json")).read_text())["results"]


def responses(rows):
    some = [row["model_response"] for row in rows]
    return [(x["text"], x["logprobs"], x["argmax_logits_eq_gold"]) for x in some]


def test_the_full_cache_answers_as_lighteval_s_own_model(saved, root, tmp_path):
    from lighteval import main_accelerate, main_custom

    ours, results = details(root, tmp_path / "a", main_custom.custom, f"{saved}@chat=0", FILE)
    settings = f"model_name={saved},batch_size=1,dtype=float32,override_chat_template=False"
    run = main_accelerate.accelerate
    theirs, others = details(root, tmp_path / "b", run, settings, tasks=THEIRS)
    for name in ("choose", "write"):
        for mine, other in zip(*map(responses, (ours[name], theirs[name])), strict=True):
            assert mine[0] == other[0] and mine[2] == other[2]
            assert mine[1] == pytest.approx(other[1], abs=1e-3)
    assert results["choose|0"] == pytest.approx(others["choose|0"])
    assert results["pages|0"]["word_perplexity"] > 1


def test_evictions_change_what_is_long(saved, root, tmp_path):
    from lighteval import main_custom

    name = f"{saved}@chat=0@policy=streaming_llm:sinks=2@budget=32@interval=16"
    some, _ = details(root, tmp_path / "a", main_custom.custom, name, FILE)
    full, _ = details(root, tmp_path / "b", main_custom.custom, f"{saved}@chat=0", FILE)
    assert responses(some["pages"]) != responses(full["pages"])


def test_the_name_of_a_model_says_everything():
    model, settings = lighteval_model.parse("a/b@policy=rkv:mix=0.1,kernel=1@budget=64@top_p=0.9")
    assert model == "a/b" and settings.policy == "rkv:mix=0.1,kernel=1"
    assert (settings.budget, settings.interval, settings.top_p) == (64, 256, 0.9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a@polcy=h2o", "'polcy=h2o' must be field=value, of policy, .*did you mean policy"),
        ("a@policy", "'policy' must be field=value"),
        ("a@budget=many", "budget = 'many' must be a whole number"),
        ("a@budget=0", "budget = 0 must be a whole number"),
        ("a@chat=yes", "chat = 'yes' must be a whole number"),
    ],
)
def test_a_name_that_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        lighteval_model.parse(name)
