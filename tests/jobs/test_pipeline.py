"""What the pipeline hands from stage to stage."""

import pytest

from configs import tiny
from fkv.errors import UserError
from fkv.jobs import pipeline
from fkv.runs import rundir


def recipe(**fields):
    config = tiny.get_config().lock()
    for name, value in fields.items():
        config.pipeline[name] = value
    return config


def test_stages_build_on_each_other(monkeypatch, tmp_path):
    ran = []
    for name in pipeline.STAGES:
        monkeypatch.setitem(
            pipeline.STAGES, name, lambda config, path, name=name: ran.append((name, config, path))
        )
    root = str(tmp_path)
    pipeline.run(recipe(), root)
    assert [(name, path) for name, _, path in ran] == [
        (name, f"{root}/{name}") for name in ("sft", "grpo", "evaluate")
    ]
    sft, grpo, evaluate = (config for _, config, _ in ran)
    assert (sft.budget, grpo.budget, evaluate.budget) == (64, 48, 64)
    assert sft.model == "embedded" and grpo.grpo.scorer == f"{root}/sft"
    assert evaluate.evaluate.scorers == (f"supervised={root}/sft", f"grpo={root}/grpo")
    assert evaluate.evaluate.problems == 128 and grpo.evaluate.problems == 512


def test_a_reasoner_of_ones_own_and_stages_left_out(tmp_path):
    plan = pipeline.plan(recipe(stages=("pretrain", "sft", "evaluate")), str(tmp_path))
    assert list(plan) == ["pretrain", "sft", "evaluate"]
    assert plan["pretrain"].model == "embedded"
    assert plan["sft"].model == plan["evaluate"].model == str(tmp_path / "pretrain" / "model")
    assert plan["evaluate"].evaluate.scorers == (f"supervised={tmp_path}/sft",)
    # Stages that begin with scorers made before take those of the config.
    plan = pipeline.plan(recipe(stages=("grpo",)), str(tmp_path))
    assert plan["grpo"].grpo.scorer == "runs/sft_tiny"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(stages=("sft", "rl")), r"\('sft', 'rl'\) must be some of pretrain, sft"),
        (dict(stages=("grpo", "sft")), "must be some of pretrain, sft, .*in this order"),
        (dict(stages=("sft", "sft")), "in this order"),
        (dict(changes={"sft": {"budgt": 3}}), r"pipeline.changes.sft: .*budgt"),
        (dict(changes={"sft": {"budget": "many"}}), "pipeline.changes.sft"),
        (dict(changes={"rl": {}}), "no stage 'rl'"),
    ],
)
def test_bad_input_is_refused_before_work_starts(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        pipeline.plan(recipe(**fields), str(tmp_path))


def test_what_a_late_stage_will_refuse_is_found_out_before_the_first(tmp_path, monkeypatch):
    def started(*_):
        raise AssertionError("a stage has started")

    monkeypatch.setattr(pipeline, "STAGES", dict.fromkeys(pipeline.STAGES, started))
    monkeypatch.setattr(pipeline.evaluate, "check", lambda *_: None)
    for stage, field in (("grpo", "grpo.eta"), ("evaluate", "evaluate.temperature")):
        root = tmp_path / stage
        config = pipeline.plan(recipe(), str(root))[stage]
        group, name = field.split(".")
        config[group][name] = 0.3
        rundir.open_run(root / stage, config)
        with pytest.raises(UserError, match=rf"{stage} holds a run .*{field}: 0.3 -> 0"):
            pipeline.run(recipe(), str(root))


def test_scorers_that_no_stage_will_make_are_asked_for_before_the_first(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "STAGES", dict.fromkeys(pipeline.STAGES, lambda *_: None))
    monkeypatch.setattr(pipeline.evaluate, "check", lambda *args: asked.append(args))
    changes = {"evaluate": {"evaluate": {"scorers": (f"a={tmp_path}/sft", f"b={tmp_path}/grpo")}}}
    pipeline.run(recipe(stages=("sft", "evaluate"), changes=changes), str(tmp_path))
    ((config, path, later),) = asked
    assert (path, later) == (f"{tmp_path}/evaluate", ["a"])
    assert len(config.evaluate.scorers) == 2


@pytest.mark.parametrize(
    "stages, field", [(("sft", "grpo"), "grpo.scorer"), (("sft", "evaluate"), "evaluate.scorers")]
)
def test_stages_read_one_of_several_scorers(stages, field, tmp_path):
    config = tiny.get_config()
    config.sft.variants, config.pipeline.stages = ("a",), stages
    with pytest.raises(UserError, match=rf"several scorers, .* pipeline.changes.*{field} to one"):
        pipeline.plan(config, str(tmp_path))
