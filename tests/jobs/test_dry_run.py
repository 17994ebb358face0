"""What a job would take, told without its weights, its traces or a run directory."""

import json
import re

import pytest

from configs import qwen3_4b, tiny
from fkv.errors import UserError
from fkv.jobs import common, dry_run, programs
from fkv.learning import sft
from fkv.runs import costs, parallel
from launch import app


@pytest.fixture
def described(tmp_path):
    """A directory with the description of a model and nothing else: no weights, no tokenizer."""
    small = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=64, hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=True, hidden_act="silu",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(small))
    config = qwen3_4b.get_config()
    config.model = str(tmp_path)
    config.budget, config.interval = 32, 16
    config.traces.new_tokens = 256
    config.grpo.traces, config.grpo.rollouts, config.grpo.rollouts_at_once = 2, 4, 2
    config.evaluate.budgets, config.evaluate.new_tokens = (32,), 64
    config.evaluate.batch = config.traces.batch = 4
    return config


def numbers(text, line):
    """The numbers of the line that starts so."""
    (found,) = (row for row in text.splitlines() if row.startswith(line))
    return [
        float(x.replace(",", "")) for x in re.findall(r"[\d.,]*\d(?:e[-+]\d+)?", found[len(line) :])
    ]


def check_stage(text, steps):
    assert "(traces.new_tokens; there are none at data/qwen3_4b_train yet)" in text
    assert "traces of 256 tokens" in text and "as compiled for the" in text
    gb, longest, best, likely, hours = numbers(text, "H100")
    assert gb == 80 and longest > 256 and longest % 16 == 0
    assert likely == pytest.approx(best / 0.4, rel=0.01)
    assert hours == pytest.approx(likely * steps / 3600, rel=0.02)


def test_the_supervised_stage(described):
    check_stage(dry_run.run("sft", described), described.sft.steps)


def test_states_of_their_own_take_another_pass(described):
    mesh, steps = parallel.make_mesh(1), {}
    for states in sft.STATES:
        described.sft.states = states
        model = common.model_config(described)
        steps[states] = programs.stage("sft", described, model, mesh).flops(256)
    assert steps["own"] == steps["mixed"] > steps["golden"]
    described.sft.variants = ("a", "b:sft.states=golden", "c:sft.states=own")  # a is mixed
    both = programs.stage("sft", described, model, mesh).flops(256)
    evicted = costs.pass_flops(model, 256) - costs.pass_flops(model, 48)
    assert both - steps["own"] > 1.5 * evicted  # a pass each


def test_traces_of_which_half_is_too_short_to_evict_from(described):
    described.traces.new_tokens = 64  # and B + L = 48
    assert "traces of 64 tokens" in dry_run.run("sft", described)


def test_the_reinforcement_stage_needs_more_for_more_rows_at_once(described):
    little = dry_run.run("grpo", described)
    check_stage(little, described.grpo.steps)
    described.grpo.rollouts_at_once = 4
    more = dry_run.run("grpo", described)
    assert numbers(more, "TPU v5e")[1] < 0.8 * numbers(little, "TPU v5e")[1]


def test_generation_s_caches_and_largest_batches(described):
    text = dry_run.run("evaluate", described)
    assert "512 and up to 64 new tokens" in text
    memory, _, speed = text.partition("GB read")
    assert numbers(memory, "full  ")[0] == 576
    assert len(numbers(speed, "full  ")) == 5
    slots, *_, v5e, v6e, h100, h200 = numbers(memory, "foresight 32")
    assert slots == 48 and 0 < v5e < v6e < h100 < h200


def test_an_int8_cache_is_sized_as_one(described):
    described.cache_dtype = "int8"
    described.evaluate.scorers, described.evaluate.policies = (), ("streaming_llm",)
    # 2 layers, 2 KV heads, 48 slots; key and value of 8 numbers and a scale each, and a position.
    described.evaluate.batch = 40_000
    text = dry_run.run("evaluate", described)
    assert "in bfloat16, cache in int8, B = 32" in text
    memory, _, _ = text.partition("GB read")
    caches = numbers(memory, "streaming_llm 32")[1]
    assert caches == round(40_000 * 2 * 2 * 48 * (2 * (8 + 4) + 4) / 1e9, 2) == 0.22


def test_the_command_runs_nothing_else(tmp_path, monkeypatch, capsys):
    def main(config, workdir):
        raise AssertionError("the job itself ran")

    monkeypatch.setattr(dry_run, "run", lambda job, config: print(job, config.budget))
    app.run(main, ["launch/sft.py", "--config=configs/tiny.py", "--config.dry_run=True"])
    assert capsys.readouterr().out == "sft 64\n"


def test_wrong_input_is_refused(described):
    with pytest.raises(UserError, match=r"launch.export has no dry run; sft, grpo, evaluate"):
        dry_run.run("export", tiny.get_config())
    described.traces.new_tokens = 40
    with pytest.raises(UserError, match=r"40 tokens .* not longer than budget \+ interval = 48"):
        dry_run.run("sft", described)
    described.budget = 24
    with pytest.raises(UserError, match=r"budget = 24 must be a multiple of interval = 16"):
        dry_run.run("sft", described)
