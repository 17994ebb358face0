"""Training of the embedded reasoner, a few steps of it, and the reasoner that is shipped."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import tiny
from fkv import models, tasks
from fkv.engine.batch import Batch
from fkv.errors import DivergedError, UserError
from fkv.jobs import pretrain as job
from fkv.learning import pretrain
from fkv.models import LM
from fkv.runs import checkpoint, preemption
from fkv.tasks import ledger
from tests import figures


def small(**changes):
    config = tiny.get_config()
    config.seed = 3
    config.task.facts, config.task.hops = (3, 4), (2, 3)
    config.task.remarks, config.task.marks = (0, 1), (0, 1)
    settings = config.pretrain
    settings.model.width, settings.model.layers, settings.model.mlp_width = 16, 2, 16
    settings.model.heads, settings.model.kv_heads, settings.model.head_dim = 2, 1, 8
    settings.cycles = (5, 3)
    settings.warmup, settings.log_every, settings.checkpoint_every = 1, 1, 2
    settings.eval_problems, settings.eval_batch = 6, 4
    settings.clip, settings.weight_decay = 0.3, 1.0  # so that both can be seen in eight steps
    for name in "abcd":
        settings.stages[name].update(
            steps=2, batch=4, facts=(3, 4), hops=(2, 3), remarks=(0, 1), marks=(0, 1)
        )
    settings.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    job.run(small(), str(path))
    return path


FIGURES = {
    "loss": [4.791915, 4.871162, 4.660133, 4.581667, 4.716725, 4.675199, 4.797855, 4.435875],
    "accuracy": [0.02150538, 0.0, 0.0106383, 0.04587156, 0.02702703, 0.01149425, 0.03529412,
        0.03157895],
    "stage": [0, 0, 1, 1, 2, 2, 3, 3],
    "answers": [0.0],
    "sizes": [8.143988, 5.671679],
}  # fmt: skip


def test_figures_of_a_seeded_run(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    names = ("loss", "accuracy", "stage", "answers")
    found = {name: figures.column(rows, name) for name in names}
    params = models.load(finished / "model").params
    size = lambda x: float(np.linalg.norm(x))  # noqa: E731
    found["sizes"] = [size(params["embed_vm"]), size(params["layers"]["q_hdm"])]
    figures.check(found, FIGURES)


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, sigterm_in):
    straight, broken = finished, tmp_path
    sigterm_in(pretrain, "train_step", 5)
    with pytest.raises(preemption.Preempted):
        job.run(small(), str(broken))
    assert checkpoint.latest_step(broken) == 5
    sigterm_in.undo()
    job.run(small(), str(broken))

    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert (straight / name).read_bytes() == (broken / name).read_bytes(), name
    lm = models.load(broken / "model")
    assert lm.config == job.plan_of(small()).config
    assert lm.params["layers"]["q_hdm"].shape == (2, 2, 8, 16)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch):
    """Their loss is that of the step before; it may not be looked at for long."""
    step = pretrain.train_step

    def overflows(*args):
        state, metrics = step(*args)
        return jax.tree.map(lambda x: x * jnp.inf, state), metrics

    monkeypatch.setattr(pretrain, "train_step", overflows)
    with pytest.raises(DivergedError, match="weights of step 1 is NaN or infinite"):
        job.run(small(log_every=100), str(tmp_path))
    assert checkpoint.latest_step(tmp_path) is None and not (tmp_path / "model").exists()


def test_cycles_must_cover_the_stages(tmp_path):
    with pytest.raises(UserError, match=r"cycles = \(4, 3\) must add up to the 8 steps"):
        job.run(small(cycles=(4, 3)), str(tmp_path))


def test_problems_longer_than_the_model_are_refused(tmp_path):
    config = small()
    config.pretrain.model.max_positions = 32
    with pytest.raises(UserError, match="max_positions = 32, but problems can have"):
        job.run(config, str(tmp_path))


def test_optimizer_is_clipped_adam_with_decoupled_decay_on_cycles():
    rate, warmup, cycles, clip, decay = 0.2, 2, (5, 4), 1.0, 0.3
    changes = dict(learning_rate=rate, warmup=warmup, clip=clip, weight_decay=decay)
    plan = dataclasses.replace(
        job.plan_of(small()),
        **changes,
        cycles=cycles,
        stages=(pretrain.Stage(9, 1, ledger.Spec((3, 4), (2, 3), (0, 1), (0, 1))),),
    )
    optimiser = plan.optimiser
    x, rng = np.linspace(-1, 1, 8), np.random.default_rng(0)
    state, update = optimiser.init(jnp.zeros(8)), jax.jit(optimiser.update)
    mean, square = np.zeros(8), np.zeros(8)
    for step in range(9):
        g = rng.normal(size=8) * (10.0 if step % 2 else 0.1)  # clipped, and not
        got, state = update(jnp.asarray(g, jnp.float32), state, jnp.asarray(x, jnp.float32))
        assert (np.linalg.norm(g) > clip) == (step % 2 == 1)
        g = g * min(1.0, clip / np.linalg.norm(g))
        mean, square = 0.9 * mean + 0.1 * g, 0.98 * square + 0.02 * g**2
        adam = mean / (1 - 0.9 ** (step + 1))
        adam /= np.sqrt(square / (1 - 0.98 ** (step + 1))) + 1e-8
        at, steps = (step, 5) if step < 5 else (step - 5, 4)
        cosine = (1 + np.cos(np.pi * (at - warmup) / (steps - warmup))) / 2
        lr = rate * (at / warmup if at < warmup else 0.02 + 0.98 * cosine)
        np.testing.assert_allclose(got, -lr * (adam + decay * x), rtol=1e-4, atol=1e-7)
        x = x + got


def test_the_optimiser_is_that_of_the_config():
    plan = job.plan_of(small(learning_rate=0.2))
    found = plan.learning_rate, plan.warmup, plan.cycles, plan.clip, plan.weight_decay
    assert found == (0.2, 1, (5, 3), 0.3, 1.0)


def test_loss_is_of_the_tokens_after_the_prompt_alone():
    config = job.plan_of(small()).config
    params = models.init(jax.random.key(0), config)
    problem = ledger.problem(0, "test", 0, ledger.Spec((3, 4), (2, 3), (0, 1), (0, 1)))
    token, length = ledger.pad([problem.tokens, problem.tokens[:-3]], 80)
    prompt = np.full(2, len(problem.prompt))
    value, accuracy = pretrain.loss(params, config, Batch.of(token, length, prompt))

    nll, hits = [], []
    for ids in (problem.tokens, problem.tokens[:-3]):
        x = pretrain.logits(LM(params, config), Batch.of(ids[None], np.array([len(ids)])))[0]
        log_p = np.asarray(jax.nn.log_softmax(x))
        for i in range(len(problem.prompt), len(ids)):
            nll.append(-log_p[i - 1, ids[i]])
            hits.append(log_p[i - 1].argmax() == ids[i])
    np.testing.assert_allclose(value, np.mean(nll), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(hits), rtol=1e-6)


def test_shipped_reasoner_answers():
    """The embedded default, at the sizes of its config: right answers with the full cache."""
    lm = models.load(tasks.REASONER, dtype=jnp.float32)
    recipe = tiny.get_config()
    recipe.pretrain.eval_problems, recipe.pretrain.eval_batch = 64, 64
    plan = job.plan_of(recipe)
    assert lm.config == plan.config
    right, interval = job.answers(recipe, plan, lm)
    exact = stats.binomtest(round(64 * right), 64).proportion_ci(0.95, "exact")
    assert interval == pytest.approx(tuple(exact)) and interval[0] < interval[1]
    assert right >= 60 / 64  # 98 % are expected: fewer than 60 of 64 happens once in 300
