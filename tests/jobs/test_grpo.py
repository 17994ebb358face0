"""The reinforcement job from a config to a table, on a reasoner too small to reason."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

import fkv
from fkv import checkpoint, grpo, parallel, preemption
from fkv.errors import UserError
from fkv.jobs import common, sft
from fkv.jobs import grpo as job
from tests.jobs.test_sft import model_dir, same_training, small

__all__ = ["model_dir"]  # a fixture


def shrink(config, scorer_dir):
    config.grpo.scorer = str(scorer_dir)
    config.grpo.steps, config.grpo.traces, config.grpo.rollouts = 4, 2, 3
    config.grpo.epochs, config.grpo.checkpoint_every, config.grpo.eta = 1, 2, 1e-4
    config.grpo.answers = 0
    config.eval.budgets, config.eval.policies = (16,), ("random",)
    return config


@pytest.fixture(scope="module")
def supervised(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("supervised")
    config = small(model_dir, sft__steps=2, eval__budgets=(16,), eval__policies=("random",))
    sft.run(config, str(path))
    return path


@pytest.fixture(scope="module")
def finished(model_dir, supervised, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    config = shrink(small(model_dir), supervised)
    config.grpo.answers, config.evaluate.new_tokens = 3, 24
    return path, job.run(config, str(path))


def test_run_writes_all_that_it_promises(finished, supervised):
    path, results = finished
    assert [r.policy for r in results] == ["full", "golden", "supervised", "grpo", "random"]
    assert all((path / f"loss_ratio.{kind}").exists() for kind in ("txt", "md", "csv", "png"))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    told = {
        "reward", "reward_spread", "groups_without_spread", "clip_fraction", "kl", "entropy",
        "loss_ratio_low", "loss_ratio_high", "grad_norm", "loss", "ratio_off",
    }  # fmt: skip
    assert told <= rows[0].keys()
    assert all(row["ratio_off/epoch_0"] == 0 for row in rows)
    answers = list(csv.DictReader((path / "answers" / "accuracy.csv").open()))
    assert [(a["policy"], a["budget"], a["answers"]) for a in answers] == [
        ("full", "0", "3"), ("supervised", "16", "3"), ("grpo", "16", "3"),
    ]  # fmt: skip
    # Either stage's scorers load alike, and these have moved.
    before, after = fkv.load_scorer(supervised), fkv.load_scorer(path)
    assert before.config == after.config
    assert abs(before.params["w1"] - after.params["w1"]).max() > 1e-4


def test_interrupted_and_resumed_equals_uninterrupted(
    model_dir, supervised, finished, tmp_path, sigterm_in
):
    config = shrink(small(model_dir), supervised)
    sigterm_in(common, "parts", 3)  # once a step
    with pytest.raises(preemption.Preempted):
        job.run(config, str(tmp_path))
    assert checkpoint.latest_step(tmp_path) == 3
    sigterm_in.undo()
    job.run(config, str(tmp_path))
    for name in ("metrics.jsonl", "loss_ratio.csv"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name
    one, two = (checkpoint.load(path).state for path in (tmp_path, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_step_in_parts_is_the_step(model_dir, supervised, finished, tmp_path):
    config = shrink(small(model_dir), supervised)
    config.grpo.traces_at_once = 1
    job.run(config, str(tmp_path))
    names = ("reward", "loss", "kl", "entropy", "added_low")
    same_training(tmp_path, finished[0], 4, names, rel=1e-3, abs=1e-6)


def test_infinity_stops_the_run_and_names_the_traces(model_dir, supervised, tmp_path, monkeypatch):
    step = grpo.train_step

    def poisoned(*args):
        state, metrics = step(*args)
        late = state.step == 3
        return state, {**metrics, "reward": jax.numpy.where(late, jax.numpy.nan, 0.0)}

    monkeypatch.setattr(grpo, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"reward of step 3 not finite.*traces \[\d+, \d+"):
        job.run(shrink(small(model_dir), supervised), str(tmp_path))
    assert checkpoint.latest_step(tmp_path) == 2
    assert fkv.load_scorer(tmp_path).params["w1"].shape == (2, 1, 32, 16)


def test_rewards_compare_with_the_model_itself_whatever_its_cache(model_dir):
    config, mesh = shrink(small(model_dir), ""), parallel.make_mesh()
    model, params = common.load_model(config)
    found = common.load_traces(config, "train", 4, config.budget, model.vocab_size)
    plain, int8 = (
        job.FullCache(config, dataclasses.replace(model, cache_dtype=name), params, found, mesh)
        for name in ("", "int8")
    )
    jax.tree.map(np.testing.assert_array_equal, int8(np.arange(2)), plain(np.arange(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(grpo__scorer="nowhere"), r"grpo.scorer = 'nowhere': no checkpoint .* launch.sft"),
        (dict(scorer__hidden=8), r"holds scorers of .*hidden=16.* config.scorer says .*hidden=8"),
        (dict(grpo__reward="most"), "grpo.reward = 'most' must be one of"),
        (
            dict(grpo__traces=3, grpo__traces_at_once=2),
            "traces_at_once: 6 rows at once must divide",
        ),
        (dict(grpo__traces_at_once=1, grpo__epochs=2), "grpo.epochs must be 1 where a step is"),
        (dict(grpo__traces=64), "batch = 64 is larger than the 16 traces"),
        (dict(budget=12), "budget = 12 must be a multiple of interval = 8"),
    ],
)
def test_bad_input_is_refused_before_work_starts(model_dir, supervised, tmp_path, change, message):
    config = shrink(small(model_dir), supervised)
    for name, value in change.items():
        *path, leaf = name.split("__")
        group = config[path[0]] if path else config
        group[leaf] = value
    with pytest.raises(UserError, match=message):
        job.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
