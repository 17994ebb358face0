"""Bad values in every field of every job: one line that names the field, before anything is loaded.

The bad values follow from the kind of value that the recipe has, and not from `fkv.jobs.groups`.
"""

import math

import pytest
from ml_collections import ConfigDict

from configs import qwen3_4b, r1_qwen, speed, tiny, tiny_ablations
from fkv import api, models
from fkv.errors import UserError
from fkv.jobs import (
    READS,
    advise,
    benchmark,
    common,
    evaluate,
    export,
    generate,
    groups,
    grpo,
    leaderboard,
    pipeline,
    pretrain,
    serve,
    sft,
    traces,
)

RUN = {
    "pretrain": pretrain.run, "traces": traces.run, "sft": sft.run, "grpo": grpo.run,
    "evaluate": evaluate.run, "benchmark": benchmark.run, "export": export.run,
    "generate": generate.run, "serve": serve.run, "leaderboard": leaderboard.run,
    "advise": advise.run,
}  # fmt: skip
TOP = (
    "seed", "model", "dtype", "cache_dtype", "model_axis", "budget", "interval",
    "task",
)  # fmt: skip
GROUPS = {
    "pretrain": ("seed", "budget", "interval", "task", "pretrain"),
    "traces": (*TOP, "traces"),
    "sft": (*TOP, "data", "scorer", "sft", "eval"),
    "grpo": (*TOP, "data", "scorer", "grpo", "eval"),
    "evaluate": (*TOP, "data", "eval", "evaluate"),
    "leaderboard": (*TOP, "data", "eval", "evaluate", "leaderboard"),
    "advise": (*TOP, "data", "advise"),
    "benchmark": (*TOP, "benchmark"),
    "export": ("model", "export"),
    "generate": (*TOP, "generate"),
    "serve": (*(name for name in TOP if name not in ("seed", "task")), "serve"),
}
# Where zero means something; elsewhere it is refused, too.
ZERO = {
    "seed", "pretrain.warmup", "pretrain.weight_decay", "pretrain.temperature", "traces.count",
    "traces.new_tokens", "traces.temperature", "traces.top_k", "traces.prompt_tokens",
    "traces.held_out", "traces.held_out_count", "traces.dev", "traces.dev_count", "sft.at_once",
    "sft.warmup",
    "sft.margin", "sft.scorer_seed", "grpo.traces_at_once", "grpo.warmup", "grpo.eta",
    "grpo.high_fraction", "grpo.kl_weight", "grpo.kl_steps", "grpo.answers",
    "grpo.rollouts_at_once",
    "evaluate.problems", "evaluate.new_tokens", "evaluate.traces",
    "evaluate.temperature", "evaluate.top_k", "generate.temperature", "generate.top_k",
    "benchmark.layers", "benchmark.top_k", "benchmark.temperature", "benchmark.memory_gib",
    "benchmark.minutes", "traces.min_p", "evaluate.min_p", "generate.min_p", "benchmark.min_p",
    "serve.min_p", "serve.temperature", "serve.top_k", "serve.port", "serve.queue",
    "serve.logprobs", "serve.sessions", "serve.drain", "leaderboard.calibrate",
    "leaderboard.retained", "advise.halvings", "advise.heads",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def loaded(*_):
        raise AssertionError("a model is being loaded")

    for module, name in (
        (models, "load"), (api, "load"), (api, "load_scorer"), (common, "load_model"),
        (common, "load_language_model"), (models, "init"), (models, "find"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, loaded)


def leaves(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def bad_values(name, value):
    """What a field of this kind can't be."""
    yield None
    if isinstance(value, bool):
        yield from (2, "yes")
    elif isinstance(value, int | float):
        yield from ("many", (1,), math.nan, math.inf, -math.inf, -1, True)
        if isinstance(value, int):
            yield from (1.5, 2**40, -(2**63), 10**400)
        if name not in ZERO:
            yield 0
    elif isinstance(value, str):
        yield from (3, ("a",))
        if name == "cache_dtype":
            yield "int4"
    else:
        yield from (5, "many", (None,), (*value, None), ((1,),))
        if all(isinstance(entry, int) for entry in value):
            yield from ((-1, 2), ("a", "b"), (2.5, 3.5), (1, 2**40))


def put(config, name, value):
    *path, leaf = name.split(".")
    for part in path:
        config = config[part]
    if leaf in config:
        del config[leaf]  # and with it the type that is asked for
    config[leaf] = value


@pytest.mark.parametrize("job", RUN)
def test_bad_values_are_refused_by_name(job, tmp_path):
    config, tried = tiny.get_config().unlock(), 0
    for name, value in list(leaves(config)):
        if name.split(".")[0] not in GROUPS[job]:
            continue
        for bad in bad_values(name, value):
            put(config, name, bad)
            try:
                with pytest.raises(UserError) as refused:
                    RUN[job](config, str(tmp_path / "run"))
            except BaseException as error:
                raise AssertionError(f"{name} = {bad!r:.40}: {error!r:.200}") from error
            message = str(refused.value)
            assert name in message and "\n" not in message and len(message) < 300, message
            tried += 1
        put(config, name, value)
    assert tried >= 9 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("job", RUN)
def test_missing_fields_are_named(job, tmp_path):
    for group in GROUPS[job]:
        config = tiny.get_config().unlock()
        if not isinstance(config[group], ConfigDict) or group == "task":
            continue
        name = next(name for name, _ in leaves(config[group]))
        *path, leaf = f"{group}.{name}".split(".")
        parent = config
        for part in path:
            parent = parent[part]
        del parent[leaf]
        with pytest.raises(UserError, match=rf"{group}\.{name}"):
            RUN[job](config, str(tmp_path / "run"))
        del config[group]
        with pytest.raises(UserError, match=rf"config has no field {group}\."):
            RUN[job](config, str(tmp_path / "run"))


UNKNOWN = {
    "sft.stpes": "config.sft has no field 'stpes': did you mean steps or states?",
    "grpo.colour": "config.grpo has no field 'colour': choose from scorer,",
    "scorer.colour": "config.scorer has no field 'colour': choose from hidden, inputs",
    "task.colour": "config.task has no field 'colour': choose from facts, hops",
    "evaluate.policy": "config.evaluate has no field 'policy': did you mean policies?",
    "bugdet": "config has no field 'bugdet': did you mean budget?",
    "mine": "config has no field 'mine': choose from seed",
    "pretrain.model.widht": "config.pretrain.model has no field 'widht': did you mean width?",
    "pretrain.stages.b.colour": "config.pretrain.stages.b has no field 'colour'",
    "benchmark.peers.vllm": "config.benchmark.peers has no field 'vllm'",
    "pipeline.changes.rl": "config.pipeline.changes has no stage 'rl'",
    "pipeline.changes.grpo.bugdet": "pipeline.changes.grpo: config has no field 'bugdet': did you",
    "pipeline.changes.grpo.grpo.colour": "pipeline.changes.grpo: config.grpo has no field 'colour'",
    "pipeline.changes.grpo.export": "pipeline.changes.grpo: grpo does not read export",
}


@pytest.mark.parametrize("job", [*RUN, "pipeline"])
def test_unknown_fields_are_refused_by_name(job, tmp_path):
    """In any group, of whatever job it is, whatever built the config, and whatever is in them."""
    run = {**RUN, "pipeline": pipeline.run}[job]
    for name, message in UNKNOWN.items():
        config = tiny.get_config().unlock()
        put(config, name, 3)
        with pytest.raises(UserError) as refused:
            run(config, str(tmp_path / "run"))
        assert str(refused.value).startswith(message)
        assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("job", [*RUN, "pipeline"])
def test_groups_are_groups_and_values_are_values(job, tmp_path):
    run = {**RUN, "pipeline": pipeline.run}[job]
    for name in ("export", "sft", "pretrain.model", "pretrain.stages.a", "pipeline.changes"):
        for bad in (3, None, "", (), [{}]):
            config = tiny.get_config().unlock()
            put(config, name, bad)
            with pytest.raises(UserError, match=rf"config\.{name} = .* must be a group of fields"):
                run(config, str(tmp_path / "run"))
    for name in ("budget", "sft.steps", "pretrain.stages.a.steps", "evaluate.scorers"):
        config = tiny.get_config().unlock()
        put(config, name, {"steps": 3})
        with pytest.raises(UserError, match=rf"config\.{name} must be one value, not a group"):
            run(config, str(tmp_path / "run"))
    with pytest.raises(UserError, match="the config is a dict: give a ConfigDict"):
        run(tiny.get_config().to_dict(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_all_fields_of_the_recipe_are_known():
    named = {name for name, _ in leaves(tiny.get_config())}
    open_ended = ("pretrain.stages.", "pipeline.changes.")
    assert {name for name in named if not name.startswith(open_ended)} == set(groups.FIELDS)


@pytest.mark.parametrize("module", [tiny, r1_qwen, qwen3_4b, speed, tiny_ablations])
def test_the_recipes_are_locked(module):
    config = module.get_config()
    for group in ("", *(name for name, value in config.items() if isinstance(value, ConfigDict))):
        with pytest.raises(AttributeError, match="colour"):
            (config[group] if group else config).colour = 3


@pytest.mark.parametrize("config", [tiny.get_config(), r1_qwen.get_config(), qwen3_4b.get_config()])
def test_the_recipes_pass(config):
    for job in READS:
        if job != "pretrain" or "pretrain" in config:
            groups.check(config, job)


def test_a_pipeline_is_checked_whole_before_it_starts(tmp_path, monkeypatch):
    def started(*_):
        raise AssertionError("a stage has started")

    monkeypatch.setattr(pipeline, "STAGES", dict.fromkeys(pipeline.STAGES, started))
    config = tiny.get_config()
    config.pipeline.changes.evaluate.evaluate.samples = 0
    with pytest.raises(UserError, match=r"evaluate\.samples = 0 must be a whole number from 1"):
        pipeline.run(config, str(tmp_path))
