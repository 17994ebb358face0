"""The step of one epoch, gathered in one pass, against the step that replays its rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.learning import fit, grpo, replayed, tokens
from fkv.policies import scorer
from fkv.runs import costs
from tests import oracles
from tests.learning import CADENCE, grpo_plan

ROLLOUTS = 4
KEPT = Cadence(20, 4, 6)  # of prompts, the first 6 tokens
LENGTHS = [45, 61, 24, 33]  # that of 24 sees no eviction


class Plan(grpo.Plan):
    """Its optimiser keeps the gradients of a step and moves nothing."""

    @property
    def optimiser(self):
        keep = optax.chain(optax.trace(0.0), optax.scale(0.0))
        if self.micro_batches == 1:
            return keep
        return optax.MultiSteps(keep, self.micro_batches).gradient_transformation()


RULES = scorer.ScorerConfig(norm="rms")


def plan_of(rules=RULES, micro_batches=1, cadence=CADENCE, **settings):
    config = grpo.GRPOConfig(
        **dict(rollouts=ROLLOUTS, eta=0.01, temperature=0.5, kl_weight=0.1) | settings
    )
    plan = grpo_plan(rules, config)
    return Plan(**vars(plan) | {"micro_batches": micro_batches, "cadence": cadence})


@jax.jit
def full_losses(lm, batch):
    hidden, _, _ = replay.replay(lm, batch, policies.get("full"), CADENCE)
    return tokens.token_losses(lm, hidden, batch.token_bt)


def make(plan, seed=0, lengths=LENGTHS, **model):
    """A state whose scorers have moved from the reference, the model and rows of some traces."""
    lm = oracles.make_lm(**model)
    params, noise = (
        scorer.init(jax.random.key(10 * seed + i), lm.config, plan.scorer) for i in range(2)
    )
    reference = jax.tree.map(lambda x, y: x + 0.1 * y, params, noise)
    token, length = oracles.make_tokens(lm.config, lengths, seed)
    batch = Batch.of(token, length, length // 8)
    losses = full_losses(lm, batch)
    rows = (batch, losses.nll_bt, losses.entropy_bt)
    rows = jax.tree.map(lambda x: np.repeat(np.asarray(x), ROLLOUTS, axis=0), rows)
    keys = replay.row_keys(jax.random.key(seed), ROLLOUTS * len(lengths))
    rows = grpo.Rollouts(*rows, np.asarray(jax.random.key_data(keys)))
    state = grpo.TrainState.init(params, plan.optimiser, reference=reference)
    return state, lm, rows


def stepper(module, plan):
    """A step on one device, of (state, lm, rows)."""
    step = functools.partial(module.train_step, plan, axis="data")
    step = jax.vmap(step, (None, None, 0), out_axes=None, axis_name="data")
    return jax.jit(lambda state, lm, rows: step(state, lm, jax.tree.map(lambda x: x[None], rows)))


def gradients(state):
    """Those of the last step of a `Plan`."""
    (found,) = (
        x.trace
        for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, optax.TraceState))
        if isinstance(x, optax.TraceState)
    )
    return found


def same(one, two):
    """Two steps, each a state and metrics."""
    grads, want = gradients(one[0]), gradients(two[0])
    for name in ("w1", "b1", "w2"):
        off = np.linalg.norm(np.subtract(grads[name], want[name]))
        assert 0 < np.linalg.norm(want[name]) and off < 1e-5 * np.linalg.norm(want[name]), name
    for found in (grads, want):  # a shift of all scores changes nothing
        np.testing.assert_array_equal(found["b2"], np.zeros_like(found["b2"]))
    assert one[1].keys() == two[1].keys()
    for name, x in two[1].items():
        assert one[1][name].shape == x.shape
        np.testing.assert_allclose(one[1][name], x, rtol=1e-5, atol=1e-6, err_msg=name)
    assert one[0].step == two[0].step


@pytest.mark.parametrize(
    ("seed", "norm", "inputs", "settings", "model"),
    [
        (1, "none", "attention", dict(log_prob="independent", kl_weight=0.0), dict(family="qwen2")),
        (2, "rms", "kv", dict(rollouts_at_once=2, reward="all", clip=1e-6), {}),
        (
            3, "none", "both", dict(rollouts_at_once=8, kl_steps=0, cadence=KEPT),
            dict(cache_dtype="int8"),
        ),
    ],
)  # fmt: skip
def test_gradients_and_metrics_are_those_of_a_replay(seed, norm, inputs, settings, model):
    plan = plan_of(scorer.ScorerConfig(norm=norm, inputs=inputs), **settings)
    state, lm, rows = make(plan, seed, **model)
    one, two = (stepper(module, plan)(state, lm, rows) for module in (grpo, replayed))
    same(one, two)
    assert one[1]["kl"][0] > 1e-3 and one[1]["reward_spread"] > 1e-3
    assert one[1]["groups_without_spread"] == 0.25  # of the trace without evictions
    np.testing.assert_array_equal(one[1]["clip_fraction"], [0])
    np.testing.assert_array_equal(one[1]["ratio_off"], [0])


def test_micro_batches_of_traces_are_those_of_a_replay():
    plan = plan_of(micro_batches=2)
    state, lm, rows = make(plan)
    found = []
    for module in (grpo, replayed):
        step, now = stepper(module, plan), state
        for part in fit.micro_batches(rows, 2):
            now, metrics = step(now, lm, part)
        found.append((now, metrics))
    same(*found)
    assert found[0][0].step == 1


def test_the_weight_of_the_kl_ends_with_its_steps():
    plan = plan_of(kl_steps=3, eta=1e6)  # no reward has spread
    state, lm, rows = make(plan)
    step = stepper(grpo, plan)
    before, _ = step(state.replace(step=jnp.int32(2)), lm, rows)
    after, metrics = step(state.replace(step=jnp.int32(3)), lm, rows)
    assert optax.tree.norm(gradients(before)) > 1e-3
    assert optax.tree.norm(gradients(after)) == metrics["loss"] == 0 < metrics["kl"]


def test_the_step_of_one_epoch_takes_no_more():
    plan = plan_of(epochs=2)
    with pytest.raises(ValueError, match=r"use replayed.train_step"):
        stepper(grpo, plan)(*make(plan))


# ---- what it costs


def work(jaxpr, times=1):
    """(name, multiply-adds, shapes) of the products of a program, with the turns of its loops."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            x, y = (v.aval.shape for v in eqn.invars)
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([x[i] for i in contracted])
            yield times * np.prod(eqn.outvars[0].aval.shape) * inner, (x, y)
        turns = times * eqn.params.get("length", 1)
        inner = list(eqn.params.values())
        if "branches" in eqn.params:
            inner = [eqn.params["branches"][0]]
        for value in jax.tree.leaves(inner, is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from work(value, turns)


@functools.cache
def products(module, at_once):
    """Multiply-adds of a step: all, and those of two matrices of each layer; and its arguments."""
    plan = plan_of(scorer.ScorerConfig(hidden=2), rollouts_at_once=at_once)
    args = make(plan)
    matrix = args[1].params["layers"]["gate_mf"].shape[1:]  # as that of `up_mf`
    found = list(work(jax.make_jaxpr(stepper(module, plan))(*args).jaxpr))
    of_matrices = sum(n for n, shapes in found if matrix in shapes)
    return sum(n for n, _ in found), of_matrices, matrix, args


@pytest.mark.parametrize("at_once", [0, 2, 8])
def test_the_language_model_is_passed_once(at_once):
    ours, theirs = products(grpo, at_once), products(replayed, 0)
    totals, counts, (matrix, _), (args, _) = zip(ours, theirs, strict=True)
    # Rollouts of a trace share what comes before its first eviction.
    traces, shared, length = len(LENGTHS), CADENCE.slots, max(LENGTHS)
    per_token = args[1].config.layers * 2 * np.prod(matrix)
    assert counts[0] == traces * (shared + ROLLOUTS * (length - shared)) * per_token
    assert counts[1] == traces * 2 * ROLLOUTS * length * per_token
    assert totals[0] < 0.6 * totals[1]


def arrays(jaxpr):
    """Shapes and dtypes of all that a program computes, in its loops too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for value in values:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from arrays(value)


def test_memory_is_no_more_than_that_of_a_replay_and_holds_no_pools():
    plan, length = plan_of(rollouts_at_once=2), 1200
    args = make(plan, lengths=[length, length])
    steps = [stepper(module, plan) for module in (grpo, replayed)]
    one, two = (costs.temporaries(step, *args) for step in steps)
    assert one <= two
    config, evictions = args[1].config, length // CADENCE.interval - CADENCE.fill_chunks - 1
    drops = 2 * ROLLOUTS * config.layers * evictions * config.kv_heads * CADENCE.interval
    one, two = (
        max(x.size for x in arrays(jax.make_jaxpr(step)(*args).jaxpr) if x.dtype == jnp.int32)
        for step in steps
    )
    assert one < drops < two
