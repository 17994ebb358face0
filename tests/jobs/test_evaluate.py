"""Evaluation from a config to tables: the shipped reasoner on its task, a word model on text."""

import collections
import contextlib
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import warnings

import flax.struct
import jax
import numpy as np
import pytest
import tokenizers
import transformers

from fkv import api, models, policies
from fkv.errors import UserError
from fkv.evaluation import answers, loss_ratio
from fkv.jobs import answering, evaluate, generate, pipeline, sft
from fkv.models import ModelConfig
from fkv.policies import base
from fkv.runs import preemption, rundir
from fkv.tasks import ledger
from tests import figures
from tests.jobs import queue_of
from tests.jobs.test_sft import SEED, small
from tests.serve import fake

PNG = b"\x89PNG"
PICTURES = ("accuracy", "loss_ratio", "loss_by_position", "regret", "retention",
            "attention_patterns")  # fmt: skip
TABLES = ("accuracy.txt", "accuracy.md", "accuracy.csv", "regressions.csv", "loss_ratio.txt",
          "loss_ratio.md", "loss_ratio.csv", "trace_losses.csv", "diagnosis.csv", "metrics.jsonl",
          "provenance.json")  # fmt: skip


@pytest.fixture(scope="module")
def scorer_dir(tmp_path_factory):
    """Scorers of the reasoner after two steps."""
    path = tmp_path_factory.mktemp("sft")
    changes = dict(steps=2, checkpoint_every=2)
    config = small("embedded", **{f"sft__{name}": value for name, value in changes.items()})
    config.eval.budgets, config.eval.traces, config.eval.policies = (16,), 2, ()
    sft.run(config, str(path))
    return path


def recipe(scorer_dir, **changes):
    """Five problems, two samples of each, batches of four: the last batch is not full."""
    fields = dict(
        scorers=(f"foresight={scorer_dir}",),
        policies=("full", "streaming_llm"),
        budgets=(16,),
        problems=5,
        samples=2,
        batch=4,
        new_tokens=40,
        traces=0,
        deadline=30.0,
    )
    given = {f"evaluate__{name}": value for name, value in fields.items()}
    config = small("embedded", **{**given, **changes})
    config.eval.batch = 2
    return config


@pytest.fixture(scope="module")
def finished(scorer_dir, tmp_path_factory):
    """A finished run, not to be changed, and its results."""
    path = tmp_path_factory.mktemp("finished")
    return path, evaluate.run(recipe(scorer_dir, evaluate__traces=3), str(path))


@pytest.fixture
def finished_copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture
def fake_model(monkeypatch):
    """Decoding in no time: tokens that depend on prompt, key and limit alone. Lists the batches."""
    batches = []

    def fake(lm, policy, plan, prompts, keys, limit):
        batches.append([(prompt.tolist(), n) for prompt, n in zip(prompts, limit, strict=True)])
        found = []
        for prompt, key, n in zip(prompts, keys, limit, strict=True):
            data = np.asarray(jax.random.key_data(key))
            seed = hashlib.sha256(data.tobytes() + prompt.tobytes()).digest()
            rng = np.random.default_rng(list(seed))
            found.append(rng.integers(3, lm.config.vocab_size, n).astype(np.int32))
        return found

    monkeypatch.setattr(answering, "queue", queue_of(fake))
    return batches


def samples(path):
    return [json.loads(line) for line in (path / "samples.jsonl").open()]


def by_key(rows):
    """Rows by what names them, which no two may share."""
    found = {(r["policy"], r["budget"], r["problem"], r["sample"]): r for r in rows}
    assert len(found) == len(rows)
    return found


# ---- losses only


def test_without_a_benchmark_the_losses_are_those_of_a_whole_run(
    finished, scorer_dir, tmp_path, fake_model
):
    path = tmp_path / "losses"
    config = recipe(scorer_dir, evaluate__traces=3, evaluate__benchmark="")
    assert evaluate.run(config, str(path)) == [] and not fake_model
    for name in ("loss_ratio.csv", "trace_losses.csv", "diagnosis.csv"):
        assert (path / name).read_text() == (finished[0] / name).read_text()
    assert not [*path.glob("samples.jsonl"), *path.glob("accuracy.*")]
    config.evaluate.compare = str(finished[0])
    evaluate.run(config, str(path))
    rows = [line.split(",")[:2] for line in (path / "compared.csv").read_text().splitlines()]
    assert [name for name, _ in rows[1:]] == ["golden", "foresight", "streaming_llm"]
    config.evaluate.traces = 2
    with pytest.raises(UserError, match="has other traces, and there are no answers"):
        evaluate.run(config, str(path))
    config.evaluate.compare = ""
    for changes in (dict(traces=0), dict(traces=2, budgets=())):
        config.evaluate.update(changes)
        with pytest.raises(UserError, match=r"evaluate.benchmark is empty, so only losses|budgets"):
            evaluate.run(config, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


# ---- a whole run


def test_run_writes_all_that_it_promises(finished):
    path, results = finished
    cells = [("full", 0), ("foresight", 16), ("streaming_llm", 16)]
    assert [(r.policy, r.budget) for r in results] == cells
    rows = by_key(samples(path))
    assert set(rows) == {(n, b, str(i), j) for n, b in cells for i in range(5) for j in range(2)}
    assert all((path / name).read_text().strip() for name in TABLES)
    for name in PICTURES:
        assert (path / f"{name}.png").read_bytes().startswith(PNG), name
    assert json.loads((path / "config.json").read_text())["evaluate"]["problems"] == 5
    steps = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    assert [line["step"] for line in steps] == [0, 16, 16]
    assert steps[0]["pass_at_1/full"] == results[0].pass_at_1
    assert steps[2]["pass_at_1/streaming_llm_16"] == results[2].pass_at_1

    lines = list(csv.DictReader((path / "accuracy.csv").open()))
    for line, r in zip(lines, results, strict=True):
        assert (line["policy"], int(line["budget"]), line["answers"]) == (r.policy, r.budget, "10")
        assert float(line["pass_at_1"]) == r.pass_at_1
        assert [float(line["low"]), float(line["high"])] == list(r.interval())
    heads = list(csv.DictReader((path / "diagnosis.csv").open()))
    assert collections.Counter(h["policy"] for h in heads) == dict.fromkeys(
        ("golden", "foresight", "streaming_llm"), 3 * 2
    )


FIGURES = {
    "full, 0": ["++++++++--", 0.8, 30.9, 0.0, 0.0, 0, 0],
    "foresight, 16": ["----------", 0.0, 40.0, 1.0, 8.2, 8, 0],
    "streaming_llm, 16": ["----------", 0.0, 40.0, 1.0, 8.2, 8, 0],
    "words, full, 0": "hmm gal kan mule 8 8 well kan",
    "words, foresight, 16": "hmm gal then gal boat 4 4 well",
    "words, streaming_llm, 16": "hmm gal hmm gal men cart 9 so",
    "traces, full, 16": [1.0, 0.0],
    "traces, golden, 16": [1.18091, 0.181937, 1.0],
    "traces, foresight, 16": [5.61856, 4.71206, 0.491443],
    "traces, streaming_llm, 16": [5.73413, 4.80533, 0.378472],
}  # fmt: skip


def test_figures_of_a_seeded_run(finished):
    path, results = finished
    found = {
        f"{r.policy}, {r.budget}": [
            "".join("-+"[int(right)] for right in r.right_pn.ravel()),
            r.pass_at_1, r.tokens, r.truncated, r.evictions, r.lost, r.gained,
        ]
        for r in results
    }  # fmt: skip
    for (name, budget, problem, sample), row in by_key(samples(path)).items():
        if (problem, sample) == ("4", 1):  # the last of all
            found[f"words, {name}, {budget}"] = " ".join(row["text"].split()[:8])
    for line in csv.DictReader((path / "loss_ratio.csv").open()):
        numbers = [float(line[name]) for name in ("ratio", "added_low", "overlap")]
        found[f"traces, {line['policy']}, {line['budget']}"] = [x for x in numbers if x == x]
    figures.check(found, FIGURES)


def test_answers_are_judged_counted_and_compared(finished, scorer_dir):
    path, results = finished
    spec = {name: tuple(b) for name, b in recipe(scorer_dir).task.items()}
    problems = ledger.problems(SEED, "eval", 0, 5, ledger.Spec(**spec))
    rows = samples(path)
    assert {r["verdict"] for r in rows} == {"right", "wrong"}  # or the rest would say nothing
    for r in rows:
        words, problem = r["text"].split(), problems[int(r["problem"])]
        assert r["reference"] == " ".join(problem.answer[1:-1])
        answer = words[words.index("</think>") + 1 :] if "</think>" in words else []
        assert r["answer"] == (" ".join(answer) or None)
        # An answer that was cut off before its <eos> doesn't count.
        ended = r["tokens"] < 40
        assert (r["verdict"] == "right") == (answer == list(problem.answer[1:-1]) and ended)
        assert r["truncated"] == (not ended) and r["interval"] == 8
        cached, held = len(problem.prompt) + r["tokens"] - 1, (len(problem.prompt) - 1) % 8 + 1
        seen = sum(n > 16 for n in range(held, cached, 8))
        assert r["evictions"] == (0 if r["policy"] == "full" else seen)

    right = {key: r["verdict"] == "right" for key, r in by_key(rows).items()}
    lost = []
    for r in results:
        own = [right[r.policy, r.budget, str(i), j] for i in range(5) for j in range(2)]
        full = [right["full", 0, str(i), j] for i in range(5) for j in range(2)]
        assert r.pass_at_1 == np.mean(own)
        pairs = collections.Counter(zip(own, full, strict=True))
        assert (r.lost, r.gained) == (pairs[False, True], pairs[True, False])
        lost += [
            (r.policy, str(i), str(j))
            for (i, j), ours, theirs in zip(np.ndindex(5, 2), own, full, strict=True)
            if theirs and not ours
        ]
    lines = list(csv.DictReader((path / "regressions.csv").open()))
    assert lost and [(li["policy"], li["problem"], li["sample"]) for li in lines] == lost


def test_answers_are_those_of_the_library(finished, scorer_dir):
    # The same prompts in another batch, by the call that a notebook makes.
    path, _ = finished
    model, config = api.load(api.EMBEDDED, np.float32), recipe(scorer_dir)
    spec = ledger.Spec(**{name: tuple(b) for name, b in config.task.items()})
    prompts = [ledger.encode(p.prompt) for p in ledger.problems(SEED, "eval", 0, 5, spec)]
    longest = max(range(5), key=lambda i: len(prompts[i]))
    first = prompts[longest] if longest else prompts[1]  # keys go by place: problem 0 and another
    out = api.generate(model, [prompts[0], first], "streaming_llm", 16, 8, 40, samples=2, seed=SEED)
    rows = by_key(samples(path))
    for i, j in np.ndindex(1, 2):
        one, row = out[i][j], rows["streaming_llm", 16, str(i), j]
        assert (one.text, len(one.tokens)) == (row["text"], row["tokens"])
        assert (one.truncated, one.evictions) == (row["truncated"], row["evictions"])


# ---- going on


def test_interrupted_and_resumed_equals_uninterrupted(finished, scorer_dir, tmp_path, monkeypatch):
    config, path, calls = recipe(scorer_dir, evaluate__traces=3), tmp_path / "run", []
    real, ended = answering.queue, []

    def die(*args):
        calls.append(args)
        for some in real(*args):
            if len(ended) > 14:  # among the answers of the second of three policies
                raise KeyboardInterrupt
            ended.extend(some)
            yield some

    monkeypatch.setattr(answering, "queue", die)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, str(path))
    assert len(samples(path)) == len(ended) < 20 and len(calls) == 2
    monkeypatch.setattr(answering, "queue", real)
    # As a kill in the middle of writing leaves it.
    text = (path / "samples.jsonl").read_text()
    (path / "samples.jsonl").write_text(text[:-20])
    evaluate.run(config, str(path))

    for name in ("samples.jsonl", *TABLES):
        assert (finished[0] / name).read_bytes() == (path / name).read_bytes(), name


def test_sigterm_ends_it_after_the_part_at_hand(
    finished, scorer_dir, tmp_path, fake_model, sigterm_in
):
    sigterm_in(evaluate, "_next", 2)
    with pytest.raises(preemption.Preempted, match="143"):
        evaluate.run(recipe(scorer_dir), str(tmp_path))
    assert len(samples(tmp_path)) == 8 and len(fake_model) == 2


def test_nothing_is_answered_twice(finished_copy, scorer_dir, fake_model):
    before = (finished_copy / "samples.jsonl").read_bytes()
    evaluate.run(recipe(scorer_dir), str(finished_copy))
    assert fake_model == [] and (finished_copy / "samples.jsonl").read_bytes() == before


def test_more_is_added_to_what_is_there(finished, finished_copy, scorer_dir, fake_model):
    old = samples(finished[0])
    more = dict(
        evaluate__policies=("full", "streaming_llm", "knorm"),
        evaluate__budgets=(16, 24),
        evaluate__problems=6,
        evaluate__samples=3,
        evaluate__batch=7,
    )
    results = evaluate.run(recipe(scorer_dir, **more), str(finished_copy))
    rows = samples(finished_copy)
    assert [row for row in rows if row in old] == old
    assert rows == sorted(
        rows, key=lambda row: (rows.index(row) // 18, row["problem"], row["sample"])
    )
    names = ("foresight", "streaming_llm", "knorm")
    cells = [("full", 0), *((name, b) for b in (16, 24) for name in names)]
    assert [(r.policy, r.budget, r.right_pn.shape) for r in results] == [
        (*cell, (6, 3)) for cell in cells
    ]
    wanted = {(n, b, str(i), j) for n, b in cells for i in range(6) for j in range(3)}
    assert set(by_key(rows)) == wanted
    assert sum(n > 0 for batch in fake_model for _, n in batch) == len(rows) - len(old)

    # Less again: what is not asked for stays in the file and out of the tables.
    results = evaluate.run(recipe(scorer_dir, evaluate__samples=1), str(finished_copy))
    assert [(r.policy, r.budget, r.right_pn.shape) for r in results] == [
        (n, b, (5, 1)) for n, b in cells[:3]
    ]
    assert samples(finished_copy) == rows
    table = (finished_copy / "accuracy.txt").read_text()
    assert "knorm" not in table and "24" not in table


def test_added_answers_are_those_of_a_run_that_asked_at_once(scorer_dir, tmp_path, fake_model):
    less = dict(evaluate__problems=2, evaluate__samples=1, evaluate__batch=3)
    evaluate.run(recipe(scorer_dir, **less), str(tmp_path / "two"))
    for name in ("one", "two"):
        evaluate.run(recipe(scorer_dir), str(tmp_path / name))
    one, two = (by_key(samples(tmp_path / name)) for name in ("one", "two"))
    assert one == two


def test_scorers_can_be_added(scorer_dir, finished_copy, fake_model):
    more = (f"foresight={scorer_dir}", f"second={scorer_dir}")
    results = evaluate.run(recipe(scorer_dir, evaluate__scorers=more), str(finished_copy))
    assert [r.policy for r in results] == ["full", "foresight", "second", "streaming_llm"]
    inputs = rundir.read_inputs(finished_copy)
    one, two = (inputs[rundir.answers_of(name)] for name in ("foresight", "second"))
    assert one == two


def test_the_limit_on_answers_does_not_depend_on_how_many_are_asked(tmp_path, fake_model):
    for problems in (1, 40):
        config = recipe("", evaluate__scorers=(), evaluate__policies=("full",))
        config.evaluate.new_tokens, config.evaluate.problems = 0, problems
        evaluate.run(config, str(tmp_path))
    assert len({n for batch in fake_model for _, n in batch if n}) == 1


def without(name):
    def change(row):
        del row[name]

    return change


def having(**fields):
    return lambda row: row.update(fields)


@pytest.mark.parametrize("name", answers.FIELDS)
def test_samples_without_a_field_are_named(finished_copy, name):
    path = finished_copy / "samples.jsonl"
    rows = samples(finished_copy)
    for change, why in (
        (without(name), f"it has no field '{name}'"),
        (having(**{name: [3]}), rf"its field '{name}' is \[3\]"),
        (having(**{name: 0.5}), f"its field '{name}' is 0.5"),
    ):
        changed = [dict(row) for row in rows]
        change(changed[6])
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(UserError) as raised:
            answers.read(path)
        said = str(raised.value)
        assert re.search(rf"{path}, line 7 is not a sample: delete that line \({why}\)$", said)


@pytest.mark.parametrize(
    "fields, why",
    [
        (dict(verdict="Right"), "its field 'verdict' is \"Right\""),
        (dict(verdict=None), "its field 'verdict' is null"),
        (dict(budget=-16), "its field 'budget' is -16"),
        (dict(sample=True), "its field 'sample' is true"),
        (dict(problem=3), "its field 'problem' is 3"),
        (dict(truncated=0), "its field 'truncated' is 0"),
        (dict(text=["x" * 999]), "its field 'text' is [\"xxxxx"),
        (dict(policy="full", budget=0, problem="0", sample=1), "it repeats the answer of line 2"),
    ],
)
def test_samples_with_a_wrong_field_are_named(finished_copy, fields, why):
    path = finished_copy / "samples.jsonl"
    rows = samples(finished_copy)
    rows[2].update(fields)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as raised:
        answers.read(path)
    said = str(raised.value)
    assert f"line 3 is not a sample: delete that line ({why}" in said and len(said) < 400


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "line 2 is not a sample: delete that line"),
        ("", "line 2 is not a sample: delete that line"),
        ("[3]", r"line 2 is not a sample: delete that line \(it is not a JSON object"),
        ("[" * 100_000, r"line 2 is not a sample: delete that line \(it is not JSON in UTF-8"),
        (
            '{"policy": "\xff"}',
            r"line 2 is not a sample: delete that line \(it is not JSON in UTF-8",
        ),
        ('{"policy": "full"}', "line 2 is not a sample: delete that line"),
        ('{"policy": "full", "interval": 16}', "line 2 is of interval 16, not 8"),
    ],
)
def test_damaged_samples_are_named(finished_copy, line, message):
    lines = (finished_copy / "samples.jsonl").read_text().splitlines()
    text = "\n".join([lines[0], line, *lines[2:]]) + "\n"
    (finished_copy / "samples.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        answers.read(finished_copy / "samples.jsonl", 8)


def test_damaged_samples_are_refused_before_more_are_added(scorer_dir, finished_copy, fake_model):
    with (finished_copy / "samples.jsonl").open("a") as file:
        file.write('{"policy": "full", "interval": 8}\n')
    with pytest.raises(UserError, match=r"line 31 is not a sample: .*\(it has no field 'budget'\)"):
        evaluate.run(recipe(scorer_dir, evaluate__budgets=(16, 24)), str(finished_copy))
    assert not fake_model


def test_a_line_that_was_cut_within_a_character_is_dropped(finished_copy):
    path = finished_copy / "samples.jsonl"
    data = path.read_bytes()
    path.write_bytes(data + '{"policy": "caf\xe9'.encode()[:-1])
    rows, unfinished = answers.read(path)
    assert len(rows) == 30 and unfinished == 16


def test_other_settings_or_scorers_are_not_mixed(scorer_dir, finished_copy, tmp_path, fake_model):
    with pytest.raises(UserError, match=r"evaluate\.temperature: 0\.6 -> 1\.0"):
        evaluate.run(recipe(scorer_dir, evaluate__temperature=1.0), str(finished_copy))
    with pytest.raises(UserError, match=r"another config \(cache_dtype:  -> int8\)"):
        evaluate.run(recipe(scorer_dir, cache_dtype="int8"), str(finished_copy))
    assert len(samples(finished_copy)) == 30 and not fake_model


def changed_input(path, name, value):
    inputs = rundir.read_inputs(path)
    assert name in inputs
    rundir.write_inputs(path, {**inputs, name: value})


def test_all_that_has_changed_is_named_before_the_model_is_loaded(
    scorer_dir, finished_copy, fake_model, monkeypatch
):
    before = samples(finished_copy)
    for name in ("foresight", "streaming_llm", "full"):
        changed_input(finished_copy, rundir.answers_of(name), "0" * 64)
    monkeypatch.setattr(api, "load", None)
    kept = (finished_copy / "provenance.json").read_text()
    with pytest.raises(UserError) as refused:
        evaluate.run(recipe(scorer_dir, evaluate__temperature=1.0), str(finished_copy))
    names = "; ".join(
        f"evaluate.scorers or .policies: '{name}'"
        for name in ("foresight", "full", "streaming_llm")
    )
    assert str(refused.value) == (
        f"{finished_copy} holds a run with another config (evaluate.temperature: 0.6 -> 1.0) and "
        f"with other inputs, which have changed since ({names}): use another --workdir"
    )
    assert samples(finished_copy) == before and not fake_model
    assert (finished_copy / "provenance.json").read_text() == kept


def test_scorers_that_have_been_trained_on_are_refused_or_answer_anew(
    scorer_dir, finished, finished_copy, fake_model, capsys
):
    changed_input(finished_copy, rundir.answers_of("foresight"), "0" * 64)
    message = r"changed since \(evaluate.scorers or .policies: 'foresight'\): use another"
    with pytest.raises(UserError, match=message):
        evaluate.run(recipe(scorer_dir), str(finished_copy))
    evaluate.run(recipe(scorer_dir), str(finished_copy), anew=("foresight", "other"))
    assert "foresight has been trained further and answers anew" in capsys.readouterr().out
    old, new = (by_key(samples(path)) for path in (finished[0], finished_copy))
    assert old.keys() == new.keys()
    assert {key[0] for key in old if old[key] != new[key]} == {"foresight"}
    assert sum(n > 0 for batch in fake_model for _, n in batch) == 10
    # Others may not change beside them.
    changed_input(finished_copy, rundir.answers_of("streaming_llm"), "0" * 64)
    with pytest.raises(
        UserError, match=r"since \(evaluate.scorers or .policies: 'streaming_llm'\)"
    ):
        evaluate.run(recipe(scorer_dir), str(finished_copy), anew=("foresight",))


def test_a_pipeline_lets_the_scorers_of_a_longer_stage_answer_anew(
    scorer_dir, finished_copy, fake_model
):
    config = recipe(scorer_dir, evaluate__scorers=(f"grpo={scorer_dir}",))
    evaluate.run(config, str(finished_copy))
    before = len(samples(finished_copy))
    changed_input(finished_copy, rundir.answers_of("grpo"), "0" * 64)
    fake_model.clear()
    pipeline.STAGES["evaluate"](config, str(finished_copy))
    assert len(samples(finished_copy)) == before
    assert sum(n > 0 for batch in fake_model for _, n in batch) == 10


def test_a_run_from_before_digests_were_recorded(scorer_dir, finished, finished_copy, fake_model):
    """It knew of its scorers only, and the references are in its samples."""
    (finished_copy / "provenance.json").unlink()
    evaluate.run(recipe(scorer_dir), str(finished_copy))
    assert rundir.read_inputs(finished_copy) == rundir.read_inputs(finished[0])

    (finished_copy / "provenance.json").unlink()
    old = finished_copy / "scorers.json"
    sha256 = rundir.read_inputs(finished[0])[rundir.answers_of("foresight")]
    old.write_text(json.dumps({"foresight": {"from": "there", "sha256": "0" * 64}}))
    with pytest.raises(UserError, match=r"since \(evaluate.scorers or .policies: 'foresight'\)"):
        evaluate.run(recipe(scorer_dir), str(finished_copy))
    old.write_text(json.dumps({"foresight": {"from": "there", "sha256": sha256}}))
    evaluate.run(recipe(scorer_dir), str(finished_copy))
    assert rundir.read_inputs(finished_copy) == rundir.read_inputs(finished[0])

    (finished_copy / "provenance.json").unlink()
    rows = samples(finished_copy)
    rows[3]["reference"] = "another"
    (finished_copy / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"samples.jsonl: the answer to problem .* with 'another'"):
        evaluate.run(recipe(scorer_dir), str(finished_copy))
    assert not fake_model


@pytest.fixture
def own_policy():
    """A function that registers a policy whose scores are those times a number."""

    def register(by):
        base._REGISTRY.pop("own", None)

        @base.register("own")
        @flax.struct.dataclass
        class Own(base.Policy):
            def score(self, view):
                return by * view.cache.position_bks.astype(float)

    yield register
    base._REGISTRY.pop("own", None)


def test_a_policy_that_was_edited_is_not_the_one_that_answered(tmp_path, own_policy, fake_model):
    config = recipe("", evaluate__scorers=(), evaluate__policies=("full", "own"))
    own_policy(1)
    evaluate.run(config, str(tmp_path))
    own_policy(1)
    evaluate.run(config, str(tmp_path))
    answered = len(fake_model)
    own_policy(-1)
    with pytest.raises(UserError, match=r"since \(code of 'own' \(Python 3\.\d+\)\): use another"):
        evaluate.run(config, str(tmp_path))
    # A policy may not take the place of scorers either, nor another policy.
    config.evaluate.policies = ("full",)
    base._REGISTRY.pop("own")
    evaluate.run(config, str(tmp_path))
    base._REGISTRY["own"] = base._REGISTRY["knorm"]
    config.evaluate.policies = ("full", "own")
    with pytest.raises(UserError, match=r"since \(evaluate.scorers or .policies: 'own'; code of"):
        evaluate.run(config, str(tmp_path))
    assert len(fake_model) == answered


# ---- beside another


def test_another_evaluation_is_compared_with(finished, scorer_dir, tmp_path, capsys, fake_model):
    """With int8 caches: the same problems and traces, answers and losses of their own."""
    path = tmp_path / "int8"
    more = dict(evaluate__traces=3, evaluate__compare=str(finished[0]), cache_dtype="int8")
    more["evaluate__policies"] = ("full", "streaming_llm", "knorm")
    results = evaluate.run(recipe(scorer_dir, **more), str(path))
    assert "has none of it: knorm at 16\n" in capsys.readouterr().out
    lines = list(csv.DictReader((path / "compared.csv").open()))
    assert [(line["policy"], line["budget"]) for line in lines] == [
        ("full", "0"), ("foresight", "16"), ("streaming_llm", "16"), ("golden", "16"),
    ]  # fmt: skip
    before, now = (by_key(samples(p)) for p in (finished[0], path))
    ours = {(r.policy, r.budget): r for r in results}
    for line in lines[:3]:
        cell = line["policy"], int(line["budget"])
        pairs = collections.Counter(
            (now[key]["verdict"] == "right", row["verdict"] == "right")
            for key, row in before.items()
            if key[:2] == cell
        )
        assert (int(line["lost"]), int(line["gained"])) == (pairs[False, True], pairs[True, False])
        assert float(line["here"]) == ours[cell].pass_at_1
        gap = (pairs[True, False] - pairs[False, True]) / 10
        assert float(line["difference"]) == pytest.approx(gap)
        assert float(line["difference_low"]) < gap < float(line["difference_high"])
    table = csv.DictReader((finished[0] / "loss_ratio.csv").open())
    measured = {(r["policy"], r["budget"]): r for r in table}
    for line in lines[1:]:
        there = measured[line["policy"], line["budget"]]
        assert float(line["ratio_there"]) == pytest.approx(float(there["ratio"]), rel=1e-5)
    for name in ("txt", "md"):
        assert f"there: {finished[0]}" in (path / f"compared.{name}").read_text()

    # Refused before work starts where it does not fit.
    more["evaluate__compare"] = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone' has no samples\.jsonl"):
        evaluate.run(recipe(scorer_dir, **more), str(tmp_path / "new"))
    more |= dict(evaluate__compare=str(path), evaluate__problems=6)
    answered = len(fake_model)
    with pytest.raises(UserError, match="no answer of full to problem '5', sample 0"):
        evaluate.run(recipe(scorer_dir, **more), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists() and len(fake_model) == answered

    # Questions may be others though their right answers are not.
    more["evaluate__problems"] = 5
    record = json.loads((path / "provenance.json").read_text())
    record["evaluate.benchmark: questions"][3] = "another"
    (path / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match="int8 has other questions: its problem '3' is a different one"
    ):
        evaluate.check(recipe(scorer_dir, **more), str(tmp_path / "new"))
    more["evaluate__chat"] = not recipe(scorer_dir).evaluate.chat  # prompts are made otherwise
    evaluate.check(recipe(scorer_dir, **more), str(tmp_path / "new"))


# ---- bad input, and things to say


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(evaluate__budgets=(16, 20)), r"evaluate\.budgets: budget = 20 must be a multiple"),
        (dict(evaluate__budgets=(8,)), r"evaluate\.budgets: budget = 8 must be larger"),
        (dict(evaluate__policies=("full", "snapkw")), "choose from .*snapkv"),
        (dict(evaluate__policies=("foresight",)), "'foresight' needs"),
        (dict(evaluate__scorers=("nowhere/at/all",)), "must be of the form name=workdir"),
        (dict(evaluate__scorers=("mine=nowhere/at/all",)), "nowhere/at/all"),
        (dict(evaluate__scorers=("h2o=nowhere",)), "'h2o' names a rule-based policy"),
        (dict(evaluate__action="best"), "action = 'best' must be one of top, sample, multinomial"),
        (dict(evaluate__temperature=-1.0), r"temperature = -1\.0"),
        (dict(evaluate__top_p=0.0), r"top_p = 0\.0"),
        (dict(evaluate__problems=0), r"evaluate\.problems must be at least 1: the embedded task"),
        (dict(evaluate__benchmark="gone.jsonl"), "gone.jsonl: no such file"),
        (dict(model="nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_bad_input_is_refused_before_work_starts(scorer_dir, tmp_path, fake_model, change, message):
    with pytest.raises(UserError, match=message) as raised:
        evaluate.run(recipe(scorer_dir, **change), str(tmp_path / "run"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists() and not fake_model


def test_says_when_nothing_was_evicted(scorer_dir, tmp_path, capsys, fake_model):
    results = evaluate.run(recipe(scorer_dir, evaluate__budgets=(16, 512)), str(tmp_path))
    assert [r.evictions > 0 for r in results] == [False, True, True, False, False]
    assert "no evictions at budget 512: answers are short" in capsys.readouterr().out


def test_the_full_cache_alone_can_be_measured(tmp_path, monkeypatch, fake_model):
    # As measured with no other policy; the pictures are what may fail.
    some = np.ones((2, 3))
    losses = [
        loss_ratio.Losses("full", 16, 8, some, some, some, excess_nt=np.ones((2, 9))),
        loss_ratio.Losses("golden", 16, 8, some, some, some, *np.ones((2, 2, 3, 2)), some),
    ]
    monkeypatch.setattr(loss_ratio, "measure", lambda *args, **kwargs: losses)
    config = recipe("", evaluate__scorers=(), evaluate__policies=("full",), evaluate__traces=2)
    evaluate.run(config, str(tmp_path))
    assert (tmp_path / "retention.png").exists()


# ---- questions in words

BOXES = {r"\boxed{1/2}": "1/2", r"\boxed{2}": "2", r"\boxed{\frac{3}{2}}": r"\frac{3}{2}"}
WORDS = ("<unk>", "<eos>", "<user>", "<answer>", "one", "half", "</think>", *BOXES)
TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<answer>"


@pytest.fixture(scope="module")
def word_model(tmp_path_factory):
    """A random decoder of ten words, some of which are answers, with a chat template."""
    path = tmp_path_factory.mktemp("words")
    config = ModelConfig("qwen3", len(WORDS), 16, 1, 2, 1, 8, 16, qk_norm=True)
    models.save(path, models.LM(jax.device_get(models.init(jax.random.key(0), config)), config))
    ids = {word: i for i, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"q": "one half", "a": "0.5", "id": "first"},
        {"q": "one one", "a": None, "id": "none"},
        {"q": "half", "a": "1.5", "id": "second"},
        {"q": "", "a": "7", "id": "empty"},
        {"q": "one", "a": "2", "id": "third"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_recipe(model, questions, **changes):
    fields = dict(
        benchmark=str(questions), question="q", answer="a", scorers=(), policies=("knorm",),
        samples=8, problems=3, batch=12, new_tokens=24, temperature=1.0, instruction="half half",
    )  # fmt: skip
    given = {f"evaluate__{name}": value for name, value in fields.items()}
    config = recipe("", **{**given, **changes})
    config.model = model
    return config


def last_box(text):
    """By words: what is in the last box after the last `</think>`."""
    words = text.split()
    words = words[max((i + 1 for i, w in enumerate(words) if w == "</think>"), default=0) :]
    return next((BOXES[w] for w in reversed(words) if w in BOXES), None)


def test_a_benchmark_of_questions(word_model, questions, tmp_path, capsys, monkeypatch):
    asked, real = [], answering.queue

    def spy(model, policy, plan, shape, given):
        asked.extend(tuple(prompt.tolist()) for prompt, _ in given)
        return real(model, policy, plan, shape, given)

    monkeypatch.setattr(answering, "queue", spy)
    path = tmp_path / "run"
    results = evaluate.run(words_recipe(word_model, questions, evaluate__traces=4), str(path))
    said = capsys.readouterr().out
    assert "questions.jsonl: row 1 left out, a is None" in said
    assert "questions.jsonl: row 3 left out, q is ''" in said
    assert "2 rows left out" in said
    # The embedded task is nothing to measure the losses of another model on.
    assert "set data.eval_path to held-out traces" in said
    assert not (path / "loss_ratio.csv").exists()

    user, answer, one, half = (WORDS.index(w) for w in ("<user>", "<answer>", "one", "half"))
    assert set(asked) == {
        (user, half, half, *body, answer) for body in ((one, half), (half,), (one,))
    }
    truth = {"first": ("0.5", "1/2"), "second": ("1.5", r"\frac{3}{2}"), "third": ("2", "2")}
    rows = samples(path)
    assert {r["verdict"] for r in rows} == {"right", "wrong", "no answer"}
    for r in rows:
        reference, right = truth[r["problem"]]
        box = last_box(r["text"])
        assert (r["answer"], r["reference"]) == (box, reference)
        want = "no answer" if box is None else "right" if box == right else "wrong"
        assert r["verdict"] == want, r
    assert [(r.policy, r.right_pn.shape) for r in results] == [("knorm", (3, 8))]


def rewrite(path, **changes):
    """Changes columns of the rows that are numbered from 1: `q3="..."`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for name, value in changes.items():
        rows[int(name[1:]) - 1][name[0]] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_questions_that_were_replaced_are_not_those_answered(
    word_model, questions, tmp_path, fake_model
):
    path = str(tmp_path / "run")
    evaluate.run(words_recipe(word_model, questions, evaluate__problems=2), path)
    evaluate.run(words_recipe(word_model, questions), path)  # one problem more
    evaluate.run(words_recipe(word_model, questions, evaluate__problems=1), path)  # two less
    answered, text = len(fake_model), questions.read_text()
    for changes, which in (
        (dict(a1="0.25"), "1"),  # an answer alone
        (dict(q3="half half"), "2"),  # a question alone; the second row can't be used
        (dict(a3="7", a5="7"), "2 and 1 more"),
        (dict(q1=""), "1 and 1 more"),  # all move up
        (dict(a2="7"), "2 and 1 more"),  # all move down
    ):
        rewrite(questions, **changes)
        with pytest.raises(UserError, match=rf"benchmark: questions, number {which}\): use an"):
            evaluate.run(words_recipe(word_model, questions), path)
        questions.write_text(text)
    evaluate.run(words_recipe(word_model, questions), path)
    assert len(fake_model) == answered


def test_a_model_that_was_replaced_is_not_the_one_that_answered(
    word_model, questions, tmp_path, fake_model
):
    model = shutil.copytree(word_model, tmp_path / "model")
    path = str(tmp_path / "run")
    evaluate.run(words_recipe(str(model), questions), path)
    answered = len(fake_model)
    lm = jax.device_get(models.load(model))
    models.save(model, jax.tree.map(lambda x: x * np.float32(1.5), lm))
    with pytest.raises(UserError, match=r"changed since \(model: its weights\): use another"):
        evaluate.run(words_recipe(str(model), questions), path)
    models.save(model, lm)
    evaluate.run(words_recipe(str(model), questions), path)
    # Another template makes other prompts of the same questions.
    (model / "chat_template.jinja").write_text(TEMPLATE + " one")
    with pytest.raises(
        UserError, match=r"\(model: its tokenizer; .*questions, number 1 and 2 more"
    ):
        evaluate.run(words_recipe(str(model), questions), path)
    assert len(fake_model) == answered


@pytest.mark.parametrize("special", [False, True], ids=["words", "special tokens"])
@pytest.mark.parametrize("opens", [False, True], ids=["closed", "opened"])
def test_a_box_in_an_unfinished_thought_is_no_answer(tmp_path, monkeypatch, opens, special):
    words = [*WORDS, "<think>"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        chat_template=TEMPLATE + " <think>" * opens,
        additional_special_tokens=["<think>", "</think>"] * special,
    )
    config = ModelConfig("qwen3", len(words), 16, 1, 2, 1, 8, 16, qk_norm=True)
    params = jax.device_get(models.init(jax.random.key(0), config))
    model = api.Model(models.LM(params, config), tokenizer, (1,), "thinker")
    monkeypatch.setattr(evaluate.common, "load_language_model", lambda config, **_: model)
    monkeypatch.setattr(evaluate.common, "model_config", lambda _: model.config)
    said = {
        r"\boxed{2} <eos>": not opens,
        r"one \boxed{2}": not opens,
        r"<think> \boxed{2}": False,
        r"<think> half </think> \boxed{2} <eos>": True,
        r"half </think> \boxed{2} <eos>": True,
        r"half </think> \boxed{2} <think> \boxed{1/2}": True,
    }
    texts = iter(said)

    def generate(lm, policy, plan, prompts, *args):
        return [np.array([words.index(w) for w in next(texts).split()]) for _ in prompts]

    monkeypatch.setattr(answering, "queue", queue_of(generate))
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"q": "what does <think> one", "a": r"So $\boxed{2}$."}) + "\n")
    config = words_recipe("thinker", path, evaluate__samples=len(said), evaluate__batch=len(said))
    evaluate.run(config, str(tmp_path / "run"))
    found = [row["verdict"] for row in samples(tmp_path / "run")]
    assert found == ["right" if right else "no answer" for right in said.values()]
    for row, text in zip(samples(tmp_path / "run"), said, strict=True):
        shown = text.replace(" <eos>", "")
        assert row["reference"] == "2"  # of a solution, what is in its box
        assert row["text"] == (
            shown.replace("<think> ", "").replace("</think> ", "") if special else shown
        )


def test_a_chat_needs_a_template(questions, tmp_path):
    config = words_recipe("embedded", questions)
    with pytest.raises(UserError, match=r"model embedded has no chat template: .* chat off"):
        evaluate.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_embedded_task_needs_its_vocabulary(word_model, tmp_path):
    config = recipe("", evaluate__scorers=())
    config.model = word_model
    with pytest.raises(
        UserError, match=r"has 10 tokens, that of the embedded task 72: .*benchmark"
    ):
        evaluate.run(config, str(tmp_path / "run"))


# ---- one answer


def one_answer(**changes):
    return small("embedded", generate__new_tokens=12, **changes)


@pytest.fixture(scope="module")
def answered(scorer_dir, tmp_path_factory):
    """The answer to problem 0 by the trained scorers, the run directory, and what was printed."""
    path, said = tmp_path_factory.mktemp("answer"), io.StringIO()
    config = one_answer(generate__policy="foresight", generate__scorer=str(scorer_dir))
    config.generate.new_tokens = 40
    with contextlib.redirect_stdout(said):
        return generate.run(config, str(path)), path, said.getvalue()


def test_generate_answers_as_evaluate_does(finished, answered):
    text, path, said = answered
    # The same problem, key and sampling, though in no batch.
    row = by_key(samples(finished[0]))["foresight", 16, "0", 0]
    assert text == row["text"] and len(text.split()) > 3
    assert (path / "answer.txt").read_text() == text + "\n"
    assert text in said and f"the right answer: {row['reference']}" in said
    assert "foresight, B = 16, L = 8: " in said


ANSWER = "well rel pen m1 boat 3 0 m1 0 now"


def test_the_answer_of_a_seeded_run(answered):
    begin = " ".join(answered[0].split()[:10])
    figures.check({"text": begin}, {"text": ANSWER})


def test_generate_counts_what_it_wrote(finished, answered):
    row = by_key(samples(finished[0]))["foresight", 16, "0", 0]
    cut_off = ", cut off" * row["truncated"]
    assert f" + {row['tokens']} tokens{cut_off}, {row['evictions']} evictions" in answered[2]


def test_generate_takes_the_prompt_and_settings_given(tmp_path, capsys, monkeypatch):
    given = []

    def stream(model, ids, *args, protect_prompt, min_p):
        given.append((api.decode(model, ids), *args, protect_prompt, min_p))
        yield from ("fan ", "", "</think> total 3")
        return api.Generation("fan </think> total 3", np.arange(5), "stop", 2)

    monkeypatch.setattr(api, "stream", stream)
    config = one_answer(generate__policy="h2o", generate__prompt="start fan <think>", seed=5)
    config.protect_prompt, config.generate.min_p = 7, 0.25
    config.generate.temperature, config.generate.top_k, config.generate.top_p = 0.0, 3, 0.5
    assert generate.run(config, str(tmp_path)) == "fan </think> total 3"
    ((prompt, policy, *settings),) = given
    assert prompt == "start fan <think>" and policy == policies.get("h2o")
    assert settings == [16, 8, 12, 0.0, 3, 0.5, 5, 7, 0.25]
    said = capsys.readouterr().out
    assert "fan </think> total 3" in said and "3 + 5 tokens, 2 evictions" in said
    assert "the right answer" not in said  # no one knows it
    # Another prompt may be tried in the same place.
    config.generate.prompt = "start gol <think>"
    generate.run(config, str(tmp_path))
    assert len(given) == 2


@pytest.mark.parametrize(("new_tokens", "lines"), [(2045, 0), (2046, 1)])
def test_generate_warns_of_more_than_the_model_was_made_for_once(
    new_tokens, lines, tmp_path, capsys, monkeypatch
):
    fake.instead(monkeypatch, api, script=[5, 2])
    config = one_answer(generate__prompt="start fan <think>")
    config.generate.new_tokens = new_tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate.run(config, str(tmp_path))
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert len(said) == lines
    for line in said:
        assert "generate.new_tokens = 2049 tokens, beyond max_position_embeddings = 2048" in line


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(generate__policy="foresight"), "'foresight' needs"),
        (dict(generate__policy="snapkw"), "choose from"),
        (dict(generate__scorer="runs/x"), "generate.scorer needs a generate.policy with weights"),
        (dict(generate__scorer="no/run", generate__policy="foresight"), "no/run"),
        (dict(generate__prompt="hi", generate__chat=True), "no chat template"),
        (dict(generate__prompt="  "), "generate.prompt is empty"),
        (dict(budget=20), "budget = 20 must be a multiple of interval = 8"),
    ],
)
def test_generate_refuses_bad_input(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as raised:
        generate.run(one_answer(**change), str(tmp_path / "run"))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


# ---- the command lines


def command(job, workdir, *overrides):
    task = ("task.facts=(4, 6)", "task.hops=(3, 4)", "task.remarks=(0, 1)", "task.marks=(0, 1)")
    line = [sys.executable, "-m", f"launch.{job}", "--config=configs/tiny.py"]
    line += [f"--workdir={workdir}"]
    line += [
        f"--config.{o}" for o in (*task, f"seed={SEED}", "budget=16", "interval=8", *overrides)
    ]
    return subprocess.run(line, capture_output=True, text=True)


def test_command_line_of_evaluate(finished, tmp_path):
    done = command(
        "evaluate", tmp_path, "evaluate.scorers=()", "evaluate.policies=('full',)",
        "evaluate.budgets=(16,)", "evaluate.problems=5", "evaluate.samples=2", "evaluate.batch=4",
        "evaluate.traces=0", "evaluate.new_tokens=40",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pass@1" in done.stdout and "full: 100%" in done.stderr
    assert samples(tmp_path) == samples(finished[0])[:10]


def test_command_line_of_generate(scorer_dir, answered, tmp_path):
    done = command(
        "generate", tmp_path, "generate.policy=foresight", f"generate.scorer={scorer_dir}",
        "generate.new_tokens=40",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "answer.txt").read_text() == answered[0] + "\n"
    assert answered[0] in done.stdout and "foresight, B = 16, L = 8" in done.stdout
