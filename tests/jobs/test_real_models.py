"""The recipes of real models from questions to answers, on small checkpoints of their families."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers

import fkv
from fkv import models
from fkv.jobs import evaluate, export, grpo, sft, traces
from launch import flags
from tests.models import torch_model

AIME = Path(__file__).parents[3] / "shared" / "data" / "aime24.jsonl"
RECIPES = {"qwen2": "r1_qwen", "qwen3": "qwen3_1p7b", "llama": "r1_llama"}
WHOLE = "qwen2"
QUESTIONS = [f"What is {a} plus {a * a}? Think before you answer." for a in range(3, 19)]
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(params=RECIPES)
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, tmp_path_factory):
    """As users have it: from `save_pretrained`, in bfloat16, with a tokenizer trained on text."""
    path = tmp_path_factory.mktemp(family)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.train_from_iterator(
        QUESTIONS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|eos|>", "<|user|>", "<|assistant|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|eos|>", chat_template=TEMPLATE
    )
    model = torch_model(
        family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=None, max_position_embeddings=4096,
    )  # fmt: skip
    model.bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_from_questions_to_answers(family, checkpoint, tmp_path):
    """All stages of one family; of the others, whose recipes name another model alone, the first.

    Compiling takes the time.
    """
    rows = [{"problem": q, "answer": "7"} for q in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def launch(job, name, *values):
        """What the command line does, in this process."""
        shared = [
            f"model={checkpoint}", "budget=16", "interval=8", "eval.budgets=(16,)",
            "eval.policies=('snapkv',)", f"data.path={tmp_path}/train",
            f"data.eval_path={tmp_path}/held_out", f"grpo.scorer={tmp_path}/sft", "eval.traces=4",
            f"traces.questions={tmp_path}/questions.jsonl", "traces.question=problem",
            "traces.new_tokens=40", "traces.batch=8", "traces.instruction=",
        ]  # fmt: skip
        command = [
            f"launch/{name}.py",
            f"--config=configs/{RECIPES[family]}.py",
            f"--workdir={tmp_path}/{name}",
        ]
        config, workdir = flags.parse([*command, *(f"--config.{v}" for v in (*shared, *values))])
        return job.run(config, workdir)

    benchmark = AIME if AIME.exists() else tmp_path / "questions.jsonl"
    assert launch(traces, "train", "traces.count=8") == 8
    assert launch(traces, "held_out", "traces.count=8", "seed=1") == 8
    for row in pq.read_table(tmp_path / "train" / "traces-000-00000.parquet").to_pylist():
        tokens = fkv.load(checkpoint).tokenizer.decode(row["input_ids"][: row["prompt_tokens"]])
        assert tokens == f"<|user|>{QUESTIONS[int(row['id'])]}<|assistant|>"

    results = launch(sft, "sft", "sft.steps=4", "sft.warmup=1")
    assert [r.policy for r in results] == ["full", "golden", "foresight", "snapkv"]
    last, steps, trained = "sft", 4, fkv.load_scorer(tmp_path / "sft")
    assert trained.config.norm == "none"
    if family == WHOLE:
        small = (
            "grpo.steps=2", "grpo.traces=2", "grpo.rollouts=4", "grpo.rollouts_at_once=2",
            "grpo.eta=0.0001",
        )  # fmt: skip
        results = launch(grpo, "grpo", *small)
        last, steps, before, trained = "grpo", 2, trained, fkv.load_scorer(tmp_path / "grpo")
        assert before.config == trained.config
        assert abs(before.params["w1"] - trained.params["w1"]).max() > 1e-5

        answers = launch(
            evaluate, "evaluate", f"evaluate.benchmark={benchmark}",
            f"evaluate.scorers=('sft={tmp_path}/sft', 'grpo={tmp_path}/grpo')",
            "evaluate.policies=('full',)", "evaluate.budgets=(16,)", "evaluate.problems=3",
            "evaluate.samples=2", "evaluate.new_tokens=24", "evaluate.batch=6",
        )  # fmt: skip
        assert [(a.policy, a.right_pn.shape) for a in answers] == [
            ("full", (3, 2)), ("sft", (3, 2)), ("grpo", (3, 2)),
        ]  # fmt: skip
        assert answers[1].evictions > 0
    assert all(np.isfinite(r.ratio()[0]) for r in results)

    launch(export, "shared", f"export.scorer={tmp_path}/{last}")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert f"| data | {tmp_path}/train |" in card and f"| steps | {steps} |" in card
    assert "| snapkv | 16 |" in card and "±" in card
    launch(export, "released", f"export.scorer={tmp_path}/{last}", "export.layout=released")
    for name in ("shared", "released"):
        again = fkv.load_scorer(tmp_path / name)
        for key, x in trained.params.items():
            np.testing.assert_array_equal(again.params[key], x)
    assert models.load(tmp_path / "released").config == models.load(checkpoint).config
