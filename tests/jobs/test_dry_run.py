"""What a job would take, told without its weights, its traces or a run directory."""

import json
import re
import subprocess
import sys

import pytest

from configs import qwen3_4b, tiny
from fkv import policies
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.jobs import common, dry_run, programs
from fkv.learning import sft
from fkv.runs import costs, parallel, targets
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
    config.dry_run_json = str(tmp_path / "figures.json")
    return config


def figures(config):
    """What was written as JSON, by the names of programs."""
    with open(config.dry_run_json) as file:
        found = json.load(file)
    return found, {one["name"]: one for one in found["programs"]}


def numbers(text, line):
    """The numbers of the line that starts so."""
    (found,) = (row for row in text.splitlines() if row.startswith(line))
    return [
        float(x.replace(",", "")) for x in re.findall(r"[\d.,]*\d(?:e[-+]\d+)?", found[len(line) :])
    ]


def check_stage(text, steps):
    assert "(traces.new_tokens; there are none at data/qwen3_4b_train yet)" in text
    assert "traces of 256 tokens" in text and "compiled, not measured" in text
    best, likely, hours = numbers(text, "H100 ")
    assert likely == pytest.approx(best / 0.4, rel=0.02)
    assert hours == pytest.approx(likely * steps / 3600, rel=0.02)


def test_the_supervised_stage(described):
    check_stage(dry_run.run("sft", described), described.sft.steps)
    about, (one,) = figures(described)[0], figures(described)[0]["programs"]
    assert about["job"] == "sft" and about["devices"] == 1 and one["fits"] is None
    memory = one["memory"]
    parts = [value for kind, value in memory.items() if kind != "total"]
    assert memory["total"] == sum(parts) > memory["temporaries"] > 0
    model = common.model_config(described)
    assert memory["language model"] == 2 * costs.parameters(model)  # in bfloat16
    # The program does at least the work that counts, and not much more at this size.
    assert 0.8 * one["ideal_flops"] < one["flops"] < 4 * one["ideal_flops"]


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
    check_stage(dry_run.run("grpo", described), described.grpo.steps)
    (little,) = figures(described)[0]["programs"]
    described.grpo.rollouts_at_once = 4
    dry_run.run("grpo", described)
    (more,) = figures(described)[0]["programs"]
    assert more["memory"]["temporaries"] > 1.3 * little["memory"]["temporaries"]


def test_generation_s_programs_and_caches(described):
    text = dry_run.run("evaluate", described)
    assert "512 and up to 64 new tokens" in text
    _, programs_ = figures(described)
    model = common.model_config(described)
    sums = policies.get("h2o")  # what scorers keep of an entry, too
    full, evicting = programs_["full, batch 4, 576 slots"], programs_["foresight 32, batch 4"]
    # And the ring of L slots, which is no part of what a step has to read.
    assert full["memory"]["caches"] == 4 * costs.cache_bytes(model, 512 + 64 + 16, "bfloat16")
    assert evicting["memory"]["caches"] == 4 * costs.cache_bytes(model, 48, "bfloat16", sums)
    for one, slots in ((full, 576), (evicting, 48)):
        assert one["ideal_bytes"] == costs.decode_bytes(model, 4, slots, "bfloat16")
        assert one["ideal_flops"] == costs.decode_flops(model, 4, slots)
        assert one["flops"] == pytest.approx(one["ideal_flops"], rel=0.05)  # of a step, not of L
    assert {name.partition(": ")[2].partition(" of")[0] for name in programs_} == {
        "", "eviction", "border", "prefill", "a prompt gets a row",
    }  # fmt: skip
    assert "full, batch 4: eviction" not in programs_
    two = programs_["full, batch 4: prefill of 2 x 512 tokens"]  # read together
    assert two["memory"]["prompts"] == 2 * costs.cache_bytes(model, 2048, "bfloat16")
    assert two["flops"] == pytest.approx(two["ideal_flops"], rel=0.2)
    # Prompts of several pieces: the last one attends to those before it.
    described.traces.batch, described.traces.new_tokens = 1, 32
    where = dry_run.Setup("traces", described, model, targets.find("cpu"), parallel.make_mesh(1))
    arm = dry_run.Arm("full", policies.get("full"), 0, 1, 2560, 32)
    made = dry_run.Generation(where, arm, Sampling(0.6, 20, 0.95)).reading()
    assert [x.name.partition(", batch 1: ")[2] for x in made] == [
        "prefill, first 512 tokens of 2,560", "prefill, last 1,024 tokens of 2,560",
        "a prompt gets a row",
    ]  # fmt: skip
    assert made[1].trips == 3  # tiles of 512 keys
    last = where.compile(made[1])
    assert last.flops == pytest.approx(last.program.flops, rel=0.3)


def test_an_int8_cache_is_sized_as_one(described):
    described.cache_dtype = "int8"
    described.evaluate.scorers, described.evaluate.policies = (), ("streaming_llm",)
    text = dry_run.run("evaluate", described)
    assert "in bfloat16, cache in int8, B = 32" in text
    # 2 layers, 2 KV heads, 48 slots; key and value of 8 numbers and a scale each, and a position.
    caches = figures(described)[1]["streaming_llm 32, batch 4"]["memory"]["caches"]
    assert caches == 4 * 2 * 2 * 48 * (2 * (8 + 4) + 4)


def test_other_jobs_that_generate(described):
    dry_run.run("traces", described)
    assert any(name.startswith("full, batch 4, ") for name in figures(described)[1])
    config = tiny.get_config()
    config.generate.policy, config.dry_run_json = "foresight", described.dry_run_json
    dry_run.run("generate", config)
    assert "foresight 64, batch 1" in figures(config)[1]


def test_the_benchmark_s_sections(described):
    described.benchmark.update(
        random_weights=True, sections=("decode", "prefill", "steps"), budgets=(32,), layers=1,
        policies=("full", "snapkv"), batches=(1,), lengths=(128,), new_tokens=16,
        prefill_lengths=(64,), step_length=128,
    )  # fmt: skip
    dry_run.run("benchmark", described)
    found = list(figures(described)[1])
    assert found == [
        "full, batch 1, 128 slots", "snapkv 32, batch 1", "full, batch 1: border",
        "snapkv 32, batch 1: eviction", "full, batch 1: prefill of 64 tokens",
        "full, batch 1: a prompt gets a row", "snapkv 32, batch 1: prefill of 64 tokens",
        "snapkv 32, batch 1: a prompt gets a row",
        "supervised, 1 x 128 tokens", "grpo, 4 x 128 tokens",
    ]  # fmt: skip
    described.benchmark.sections = ("growth",)
    with pytest.raises(UserError, match=r"has no section with a dry run: decode, prefill"):
        dry_run.run("benchmark", described)


def test_a_model_split_over_devices_that_one_machine_lacks(tmp_path):
    figures = tmp_path / "figures.json"
    command = [
        sys.executable, "-m", "launch.traces", "--config=configs/tiny.py", "--config.dry_run=True",
        "--config.model_axis=2", f"--config.dry_run_json={figures}",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    steps, _, prefill, _ = json.loads(figures.read_text())["programs"]
    assert {x["op"] for x in steps["collectives"]} >= {"all-reduce"}
    # Half of the matrices, whole norms.
    size = 4 * costs.parameters(common.model_config(tiny.get_config()))
    assert 0.5 * size < steps["memory"]["language model"] < 0.52 * size
    assert prefill["memory"]["caches"] == steps["memory"]["caches"]


def test_the_command_runs_nothing_else(tmp_path, monkeypatch, capsys):
    def main(config, workdir):
        raise AssertionError("the job itself ran")

    monkeypatch.setattr(dry_run, "run", lambda job, config: print(job, config.budget))
    app.run(main, ["launch/sft.py", "--config=configs/tiny.py", "--config.dry_run=True"])
    assert capsys.readouterr().out == "sft 64\n"
    for field in ("target=v5e", "dry_run_json=x.json"):
        with pytest.raises(SystemExit):
            app.run(main, ["launch/sft.py", "--config=configs/tiny.py", f"--config.{field}"])
        assert "is for dry runs: add --config.dry_run=True" in capsys.readouterr().err


def test_wrong_input_is_refused(described, monkeypatch):
    with pytest.raises(UserError, match=r"launch.export has no dry run; sft, grpo, evaluate"):
        dry_run.run("export", tiny.get_config())
    for name in ("v7", "v5e:two", "h100:0", "H100", "v5e:2x2x2x2", "tpu", "h100:1000"):
        with pytest.raises(UserError, match=rf"target = '{name}' must be one of: cpu, v5e:2x2"):
            targets.find(name)
    with pytest.raises(UserError, match=r"a slice of v6e has at most 256 chips"):
        targets.find("v6e:1000x1000")
    real = targets.importlib.util.find_spec
    absent = ("libtpu", "jax_plugins")
    monkeypatch.setattr(
        targets.importlib.util, "find_spec", lambda x: None if x in absent else real(x)
    )
    for name, extra in (("v5e", "tpu"), ("v6e:4x4", "tpu"), ("h200", "gpu-compiler")):
        described.target = name
        with pytest.raises(UserError, match=rf'^target = .* pip install "fkv\[{extra}\]"$'):
            dry_run.run("sft", described)
    described.target = ""
    with monkeypatch.context() as patch:
        patch.setattr(dry_run.Setup, "compile", None)  # before anything is compiled
        described.dry_run_json = "nowhere/figures.json"
        with pytest.raises(UserError, match=r"dry_run_json = 'nowhere/figures.json': its directo"):
            dry_run.run("sft", described)
    described.dry_run_json = ""
    described.traces.new_tokens = 40
    with pytest.raises(UserError, match=r"40 tokens .* not longer than budget \+ interval = 48"):
        dry_run.run("sft", described)
    described.budget = 24
    with pytest.raises(UserError, match=r"budget = 24 must be a multiple of interval = 16"):
        dry_run.run("sft", described)
