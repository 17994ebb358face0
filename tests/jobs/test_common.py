"""What jobs share: the settings that may change when one goes on, and the model they load."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import tiny
from fkv import models, policies
from fkv.cache.cadence import FULL, Cadence
from fkv.data import traces
from fkv.errors import DivergedError, UserError
from fkv.evaluation import loss_ratio
from fkv.jobs import (
    benchmark,
    common,
    evaluate,
    export,
    generate,
    grpo,
    pipeline,
    pretrain,
    sft,
    training,
)
from fkv.jobs import traces as traces_job
from fkv.learning import fit
from fkv.policies import scorer
from fkv.runs import checkpoint, costs, parallel, sharing
from fkv.runs.rundir import Run
from tests import figures
from tests.jobs.test_sft import model_dir, small

__all__ = ["model_dir"]  # a fixture


def test_other_jobs_are_the_groups_of_the_config_that_a_job_does_not_read():
    config = tiny.get_config()
    assert all(name in config for name in common.JOBS)
    assert "sft" not in common.other_jobs("sft")
    assert {*common.other_jobs("sft"), "sft"} == {*common.JOBS, "model_axis", "attention_kernel"}
    # What several jobs read is not among them.
    assert not {"data", "task", "scorer", "eval", "budget", "seed"} & set(common.JOBS)


MODEL, TASK = "embedded (0.45 M parameters, float32)", "traces of the embedded task"
ANNOUNCED = {
    pretrain: "0.45 M parameters from scratch, 3,200 steps, problems of the embedded task",
    traces_job: f"{MODEL}, full cache",
    sft: f"{MODEL}, foresight, B = 64, L = 16, {TASK}",
    grpo: f"{MODEL}, foresight, B = 64, L = 16, {TASK}",
    evaluate: f"{MODEL}, 16 policies, B = 48, 64, 96, L = 16, questions of the embedded task",
    generate: f"{MODEL}, snapkv, B = 64, L = 16",
    export: "scorers of runs/sft_tiny, layout fkv",
    benchmark: f"{MODEL}, sections decode, growth, prefill, labels, steps",
    pipeline: "stages sft, grpo, evaluate",
}


@pytest.mark.parametrize("job", ANNOUNCED)
def test_a_job_first_says_what_it_does(job, monkeypatch, tmp_path):
    def stop(message):
        raise Warned(message)

    monkeypatch.setattr(common, "say", stop)
    monkeypatch.setattr(grpo, "_supervised", lambda config: policies.get("h2o"))
    with pytest.raises(Warned) as said:
        job.run(tiny.get_config(), str(tmp_path))
    name = job.__name__.rpartition(".")[2]
    where = f"{ANNOUNCED[job]}, {parallel.describe()}, in {tmp_path}"
    assert str(said.value) == f"{name}: {where}"
    assert common.size_of(costs.SHAPES["Qwen/Qwen3-4B"]) == "4.02 B parameters"


def test_every_way_to_the_model_has_the_cache_that_is_asked_for():
    config = tiny.get_config()
    config.cache_dtype = "int8"
    assert common.load_model(config).config.cache_dtype == "int8"
    assert common.load_language_model(config).config.cache_dtype == "int8"
    assert common.model_config(config).cache_dtype == "int8"


FIGURES = {
    "full, 16": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "golden, 16": [-0.08004826, 0.01985361, -0.1058965, 0.03665722, -0.03963283, 0.01307764],
    "random, 16": [0.06825213, 0.06489312, 0.07302014, 0.06051189, 0.060794, 0.08188905],
    "full, 56": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "golden, 56": [0.02062108, 0.008511816, 0.01317313, 0.01583097, 0.03334534, 0.02947795],
    "random, 56": [-0.003049997, 0.02366449, 0.006204931, 0.02573504, -0.0188607, 0.04894659],
}  # fmt: skip


def test_losses_are_measured_after_the_prompt(model_dir):
    config = small(model_dir)
    config.eval.budgets, config.grpo.high_fraction = (16, 56), 0.4
    lm = common.load_model(config)
    held_out = common.load_traces(config, "eval", 4, 56, lm.config.vocab_size)
    results = common.measure_losses(config, lm, {"random": policies.get("random")}, held_out)
    assert [(r.policy, r.budget) for r in results] == [
        (name, budget) for budget in (16, 56) for name in ("full", "golden", "random")
    ]
    lengths = list(zip(held_out.length_n.tolist(), held_out.prompt_n.tolist(), strict=True))
    # At the smaller budget it is the prompt that says where counting begins.
    assert all(16 + 8 < prompt for _, prompt in lengths)
    for r in results:
        counted = [n - max(r.budget + 8, prompt) for n, prompt in lengths]
        assert r.tokens[:, 0].tolist() == counted
        # Tables split tokens as rewards do.
        assert r.tokens[:, 2].tolist() == [n * 4 // 10 for n in counted]
    # Nats added per token, and their standard errors: of all, low- and high-entropy ones.
    cells = {f"{r.policy}, {r.budget}": [x for i in range(3) for x in r.added(i)] for r in results}
    figures.check(cells, FIGURES)


def test_a_config_without_the_reinforcement_stage_splits_as_the_paper_does(monkeypatch):
    seen = []
    measure = lambda *args: seen.append(args[2].high_fraction) or []  # noqa: E731
    monkeypatch.setattr(loss_ratio, "measure", measure)
    config, none = tiny.get_config().unlock(), np.zeros(0, np.int32)
    held_out = traces.Traces(none[:, None], none, none, none)
    config.grpo.high_fraction = 0.35
    common.measure_losses(config, None, {}, held_out, (32,))
    del config.grpo
    common.measure_losses(config, None, {}, held_out, (32,))
    assert seen == [0.35, 0.2]


class Warned(Exception):
    """So that a job ends where it warns."""


@pytest.mark.parametrize("job", [sft, grpo, evaluate])
def test_traces_longer_than_the_model_was_made_for_are_warned_of(
    job, model_dir, tmp_path, monkeypatch, capsys
):
    config = small(model_dir)
    config.evaluate.traces, config.evaluate.budgets, config.evaluate.scorers = 2, (16,), ()
    rules = scorer.ScorerConfig(**config.scorer)
    model = models.read(model_dir)
    params = jax.device_get(scorer.init(jax.random.key(0), model, rules))
    about = {"model": model_dir, "budget": config.budget, "interval": config.interval}
    sharing.export(policies.Foresight(params, rules), tmp_path / "scorers", about)
    config.grpo.scorer = str(tmp_path / "scorers")
    short = dataclasses.replace(model, max_positions=20)
    load = models.load
    monkeypatch.setattr(models, "load", lambda *args, **kw: load(*args, **kw).replace(config=short))

    def stop(*_, **__):
        raise Warned

    monkeypatch.setattr(evaluate if job is evaluate else training, "open_run", stop)
    with pytest.raises(Warned):
        job.run(config, str(tmp_path / "run"))
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert sum("the longest trace = " in x for x in said) == 1
    assert sum("prompt + new_tokens = " in x for x in said) == (job is evaluate)
    assert all(x.count("\n") == 0 and "max_position_embeddings = 20" in x for x in said)


def test_metrics_of_micro_batches_are_those_of_the_step():
    parts = [
        {"loss": np.array([1.0, 2.0]), "ratio_off": np.float32(0.5), "grad_norm": np.float32(3.0)},
        {"loss": np.array([2.0, 6.0]), "ratio_off": np.float32(0.1), "grad_norm": np.float32(1.5)},
    ]
    found = fit.merged(parts)
    np.testing.assert_array_equal(found["loss"], [1.5, 4.0])
    assert (found["ratio_off"], found["grad_norm"]) == (np.float32(0.5), 1.5)
    assert fit.merged(parts[:1])["grad_norm"] == 3.0


def test_a_run_that_diverges_has_intact_checkpoints_only_where_it_has_some(tmp_path):
    run = Run(tmp_path, {})
    with pytest.raises(DivergedError, match=r"loss of step 1 is NaN .* use another --workdir$"):
        fit.check_finite("sft", {"loss": np.nan}, 1, run, ())
    checkpoint.save(tmp_path, 1, {"x": np.ones(3)}, {})
    with pytest.raises(DivergedError, match=f"the checkpoints in {tmp_path} are intact$"):
        fit.check_finite("sft", {"loss": np.nan}, 2, run, ())


@pytest.mark.parametrize("field", ["evicted", "full"])
def test_losses_that_are_no_numbers_are_no_table(monkeypatch, field):
    config = tiny.get_config()
    some = {"evicted": np.ones((2, 3)), "full": np.ones((2, 3))}
    some[field][1, 2] = np.nan
    losses = [loss_ratio.Losses("h2o", 48, 16, some["evicted"], some["full"], np.ones((2, 3)))]
    monkeypatch.setattr(loss_ratio, "measure", lambda *args, **kwargs: losses)
    held_out = traces.collect([np.arange(99)], 64, 16, "here")
    with pytest.raises(UserError, match=r"losses of 'h2o' at budget 48 are NaN .* in float32"):
        common.measure_losses(config, None, {}, held_out, [48])


@pytest.mark.parametrize(
    ("job", "field", "value", "command"),
    [
        (
            evaluate,
            "evaluate.scorers",
            ("a=runs/none/grpo_x",),
            "launch.grpo --config=... --workdir",
        ),
        (evaluate, "evaluate.scorers", ("a=runs/none/sft_x",), "launch.sft --config=... --workdir"),
        (grpo, "grpo.scorer", "runs/none/grpo_x", "launch.sft --config=... --workdir"),
        (generate, "generate.scorer", "runs/none/sft_x", "launch.sft --config=... --workdir"),
        (export, "export.scorer", "runs/none/grpo_x", "launch.grpo --config=... --workdir"),
        (
            sft,
            "data.path",
            "runs/none/train",
            "launch.traces --config=... --workdir=runs/none/train",
        ),
        (sft, "data.eval_path", "runs/none/x.jsonl", "launch.traces --config=... --workdir"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path, job, field, value, command
):
    config = tiny.get_config()
    config.generate.policy = "foresight"
    group, name = field.split(".")
    config[group][name] = value
    with pytest.raises(UserError) as refused:
        job.run(config, str(tmp_path / "run"))
    message = str(refused.value)
    said = value[0] if isinstance(value, tuple) else value
    assert message.startswith(f"{field} = {said!r}: no ") and command in message
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_a_baseline_that_is_not_in_the_table_is_refused():
    config = tiny.get_config()
    for fine in ("", "rkv", "foresight"):
        config.eval.baseline = fine
        common.check_baseline(config, ["foresight", "rkv"])
    config.eval.baseline = "rvk"
    with pytest.raises(UserError) as error:
        common.check_baseline(config, ["foresight", "rkv"])
    assert str(error.value) == (
        "eval.baseline = 'rvk' is not one of the policies measured: did you mean rkv?"
    )
    with pytest.raises(UserError, match=r"policies measured$"):
        common.check_baseline(config, [])


def test_a_prompt_that_leaves_too_little_is_refused_with_its_field(tmp_path):
    config = tiny.get_config()
    config.protect_prompt, config.eval.budgets = 48, (64, 48)
    with pytest.raises(UserError, match=r"eval\.budgets: protect_prompt = 48 must be at most 32:"):
        common.cadences(config, "eval.budgets")
    assert common.cadence(config) == Cadence(64, 16, 48)
    assert common.cadence(config, FULL) == Cadence(32, 16)
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"input_ids": list(range(30)) * 4}) + "\n")
    config.data.path = str(path)
    with pytest.raises(UserError, match=r"protect_prompt = 48, but no trace of .* has a prompt"):
        common.load_traces(config, "train", 1, 64, 40)
    config.protect_prompt = 0
    assert len(common.load_traces(config, "train", 1, 64, 40)) == 1
