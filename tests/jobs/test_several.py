"""The jobs in several processes: what is computed is faked, who writes what is not."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fkv
from fkv.evaluation import loss_ratio, plots, recall
from fkv.jobs import answering, traces
from fkv.jobs import grpo as grpo_job
from fkv.jobs import recall as recall_job
from fkv.jobs import sft as sft_job
from fkv.learning import grpo, sft
from fkv.runs import checkpoint, rundir
from tests.jobs import queue_of, test_grpo, test_recall, test_sft, test_traces
from tests.runs.test_parallel import finish, start


def fake_decoding(lm, policy, plan, prompts, keys, limit):
    """Tokens that depend on prompt, key and limit alone."""
    found = []
    for prompt, key, n in zip(prompts, keys, limit, strict=True):
        data = np.asarray(jax.random.key_data(key))
        seed = hashlib.sha256(data.tobytes() + prompt.tobytes()).digest()
        rng = np.random.default_rng(list(seed))
        found.append(rng.integers(3, lm.config.vocab_size, n).astype(np.int32))
    return found


def moved(state, token, axis):
    """The state after a step that all rows of all devices have a say in."""
    shift = jax.lax.psum(token.sum(), axis) / 1e5
    params = jax.tree.map(lambda x: x + shift, state.params)
    return state.replace(step=state.step + 1, params=params), shift


def fake_sft(plans, states, lm, batch, axis):
    found = [moved(state, batch.token_bt, axis) for state in states]
    layers = [jnp.full(lm.config.layers, shift) for _, shift in found]
    metrics = [dict(loss=x, overlap=x, grad_norm=x[0]) for x in layers]
    return [state for state, _ in found], metrics


def fake_grpo(plan, state, lm, rows, axis):
    state, shift = moved(state, rows.batch.token_bt, axis)
    kinds = [f"{x}_{y}" for x in ("evicted", "full", "tokens") for y in ("low", "high")]
    return state, {"reward": shift, "entropy": shift[None], **dict.fromkeys(kinds, 1 + shift)}


def fake_measure(lm, named, traces, cadence):
    sums = np.outer(traces.batch.length_b, [1.0, 2.0, 3.0])
    return [
        loss_ratio.Losses(name, cadence.budget, cadence.interval, sums * (1 + i), sums, sums)
        for i, name in enumerate(named)
    ]


def fake_hidden(lm, rows, count):
    return np.zeros((len(rows.length_b), count, 0))


def fake_agree(lm, named, given, cadence, wanted):
    token_bc = np.asarray(given.rows.token_bt)[:, -given.full_bcm.shape[1] :]
    for name in wanted:
        yield name, token_bc % 7 > 0, token_bc / len(name)


def fake_recall(lm, named, asked, key_c, cadence, wanted):
    total_b = (asked.rows.token_bt[:, -asked.answer_bw.shape[1] :] * asked.answer_bw).sum(1)
    for name in wanted:
        yield name, total_b % 2 > 0, total_b / len(name)


def fake_select(lm, contexts, shape, interval):
    asked = [one for context in contexts for one in context.lookups]
    return [(True, bool(sum(one.ids) % 3 == 0)) for one in asked]


def run_jobs(root):
    """The supervised job; the reinforcement stage with its answers, stopped once; recall; traces.

    `root` is beside a model and its text.
    """
    save = checkpoint.save

    def save_and_stop(run_dir, step, *args, **kwargs):
        save(run_dir, step, *args, **kwargs)
        if step == 2:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "queue", queue_of(fake_decoding))
        patch.setattr(sft, "train_step", fake_sft)
        patch.setattr(grpo, "train_step", fake_grpo)
        patch.setattr(loss_ratio, "measure", fake_measure)
        patch.setattr(recall, "agree", fake_agree)
        patch.setattr(recall, "recall", fake_recall)
        patch.setattr(recall, "select", fake_select)
        patch.setattr(recall, "full_hidden", fake_hidden)
        for picture in ("loss_ratios", "accuracy"):
            patch.setattr(plots, picture, lambda results, path, *title: path.touch())
        patch.setattr(rundir.Run, "_write_events", lambda self, events: None)
        recipe = test_sft.small("embedded", eval__policies=("random",))
        sft_job.run(recipe, str(root / "sft"))
        patch.setattr(checkpoint, "save", save_and_stop)
        recipe = test_grpo.shrink(recipe, root / "sft")
        recipe.grpo.answers, recipe.evaluate.batch, recipe.evaluate.new_tokens = 5, 2, 8
        with pytest.raises(InterruptedError):
            grpo_job.run(recipe, str(root / "grpo"))
        patch.setattr(checkpoint, "save", save)
        grpo_job.run(recipe, str(root / "grpo"))
        recipe = test_recall.recipe(str(root.parent / "letters"), root.parent / "text")
        recall_job.run(recipe, str(root / "recall"))
        places = tuple(
            f"code={Path(fkv.__file__).parent}/{room}/*.py" for room in ("data", "models")
        )
        changes = dict(text=places, length=100, held_out=0.4, count=20, held_out_count=3)
        of_text = traces.run(test_traces.recipe(**changes), str(root / "text"))
        return of_text, traces.run(test_traces.recipe(batch=2), str(root / "traces"))


SCRIPT = """
import sys
from pathlib import Path
from launch import app

app.join()
from tests.jobs.test_several import run_jobs

print("said:", run_jobs(Path(sys.argv[1])))
"""


def test_two_processes_write_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for name, save in (("letters", test_recall.save_letters), ("text", test_recall.save_text)):
        (tmp_path / name).mkdir()
        save(tmp_path / name)
    started = start(SCRIPT, two, processes=2)
    assert run_jobs(one) == (23, 5)
    assert finish(started) == [["(23, 3)"], ["(0, 2)"]]  # traces written by each

    def files(root):
        found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        return {path for path in found if not {"tb", "state"} & set(path.parts)}

    def whole(root):
        return {path for path in files(root) if path.suffix != ".parquet"}

    assert whole(one) == whole(two)
    for path in whole(one):
        if path.suffix not in (".jsonl", ".csv", ".md", ".txt") or path.name == "times.jsonl":
            continue
        texts = [(one / path).read_text().replace(str(one), str(two)), (two / path).read_text()]
        if path.suffix == ".jsonl" and path.parts[0] == "recall":  # in the order of batches
            texts = [{*text.splitlines()} for text in texts]
        if path.name == "candidates.jsonl":  # both processes try some before they are counted
            assert texts[0] <= texts[1]
        else:
            assert texts[0] == texts[1], path
    lines = [json.loads(line) for line in (two / "recall" / "lookups.jsonl").open()]
    assert len(lines) == 3 * 10 == 3 * len({line["lookup"] for line in lines})
    for job in ("sft", "grpo"):
        states = (checkpoint.load(root / job).state for root in (one, two))
        jax.tree.map(np.testing.assert_array_equal, *states)
    for part in ("train/code", "heldout/code"):
        assert test_traces.rows(one / "text" / part) == test_traces.rows(two / "text" / part)
    rows = [sorted(test_traces.rows(root / "traces"), key=lambda r: r["id"]) for root in (one, two)]
    assert rows[0] == rows[1]
    assert len(list((two / "traces").glob("traces-001-*"))) == 1
