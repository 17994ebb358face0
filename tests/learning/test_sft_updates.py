"""Updates at every eviction, and caches of the scorers' own, against plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fkv import policies
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.learning import sft
from fkv.policies import scorer
from tests import oracles
from tests.learning import sft_plan
from tests.learning.test_sft import (
    BUDGET,
    CADENCE,
    EVENTS,
    INTERVAL,
    LENGTHS,
    collect,
    grads_fn,
    halves,
    model,
)  # fmt: skip

RULES, LOSS = scorer.ScorerConfig(norm="rms", hidden=5), sft.LossConfig(1.0, "sqrt_gap")
PLAN = sft_plan(RULES, LOSS, updates="eviction", learning_rate=0.03, clip=0.05)


def start():
    lm = model("qwen3", 4, 2)
    batch = Batch.of(*oracles.make_tokens(lm.config, LENGTHS))
    return lm, scorer.init(jax.random.key(3), lm.config, RULES), batch


@jax.jit
def two_devices(state, lm, batch):
    step = functools.partial(sft.train_step, (PLAN,), axis="data")
    step = jax.vmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    (state,), (metrics,) = step([state], lm, halves(batch))
    return state, metrics


def shares(has_pair_eb):
    """Weight of each group of an eviction [e, b, k]: a trace's groups share its own."""
    return has_pair_eb / np.maximum(has_pair_eb.sum((0, 2), keepdims=True), 1)


def test_every_eviction_updates_the_scorers_that_the_next_one_asks():
    lm, params, batch = start()
    labels, (_, feature, _) = collect(RULES, lm, batch, CADENCE)
    valid = np.array([[e < n for n in EVENTS] for e in range(max(EVENTS))])[..., None]
    rule = optax.chain(optax.clip_by_global_norm(PLAN.clip), optax.scale_by_adam())

    @jax.jit
    def gradient(params, feature, future, share):
        def mean(params):
            loss, _ = sft.ranking_loss(scorer.apply(RULES, params, feature), future, LOSS)
            return (loss * share).sum() / share.sum(), (loss * share).sum()

        (_, loss), grads = jax.value_and_grad(mean, has_aux=True)(params)
        return loss, {**grads, "b2": jnp.zeros_like(grads["b2"])}

    want, losses, norms = [], [], []
    for layer in range(lm.config.layers):
        own = {name: x[layer] for name, x in params.items()}
        future, opt_state = labels.future_score_ebkn[layer], rule.init(own)
        share = shares(np.asarray(sft.has_pair(future)) & valid)
        losses.append(0.0)
        for event in range(max(EVENTS)):
            of_event = (feature[layer, event], future[event], share[event])
            loss, grads = gradient(own, *of_event)
            losses[-1] += float(loss) / 4
            norms.append(optax.tree.norm(grads, squared=True))
            change, opt_state = rule.update(grads, opt_state, own)
            own = {name: x - PLAN.learning_rate * change[name] for name, x in own.items()}
        want.append(own)

    state, metrics = two_devices(PLAN.start(params), lm, batch)
    assert int(state.step) == 1
    for name in params:
        ours = np.stack([own[name] for own in want])
        np.testing.assert_allclose(state.params[name], ours, atol=1e-5)
        assert name == "b2" or abs(ours - params[name]).max() > 0.05
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)
    norm = np.sqrt(np.sum(norms) / max(EVENTS))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    counts = [x.count for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))]
    np.testing.assert_array_equal(counts, [[max(EVENTS)] * lm.config.layers])
    # The next step goes on with the optimiser's state, at the next step's rate.
    after, _ = two_devices(state, lm, batch)
    assert int(after.step) == 2 and not np.allclose(after.params["w1"], state.params["w1"])


def test_micro_batches_would_be_batches():
    with pytest.raises(UserError, match=r"sft.at_once = 1: with sft.updates = 'eviction'"):
        dataclasses.replace(PLAN, at_once=1, micro_batches=2)


# ---- states of their own


def futures(lm, token_t):
    """Future scores [layers, k, t, e] of every token, by brute force."""
    _, attention = oracles.full(lm.config, lm.params, token_t)
    found = []
    for p in attention:
        score = oracles.block_scores(p, lm.config.kv_heads, INTERVAL)
        events = range(score.shape[2] - 1 - BUDGET // INTERVAL)
        first = 1 + BUDGET // INTERVAL
        found.append(np.stack([score[..., first + e :].max(-1) for e in events], axis=-1))
    return found


@functools.partial(jax.jit, static_argnums=0)
def own_states(rules, params, lm, batch):
    def look(acc, policy, view, evict):
        return acc, (view.cache.position_bks[..., :BUDGET], scorer.features(rules, view))

    policy = policies.Foresight(params, rules)
    return replay.replay(lm, batch, policy, CADENCE, None, look, 0)[2]


@pytest.mark.parametrize("cache_dtype", ["", "int8"])
def test_scorers_learn_from_the_caches_that_they_leave(cache_dtype):
    _, params, batch = start()
    lm = model("qwen3", 4, 2, cache_dtype)
    plan = sft_plan(RULES, LOSS, states="own")
    sums = grads_fn(plan, params, lm, batch)
    position, feature = own_states(RULES, params, lm, batch)
    token, (layers, events, _, heads) = np.asarray(batch.token_bt), position.shape[:4]
    loss, overlap = np.zeros((2, layers))
    future = np.zeros((layers, events, len(LENGTHS), heads, BUDGET))
    weight = np.zeros(future.shape[:-1])
    for row, count in enumerate(EVENTS):
        full = futures(model("qwen3", 4, 2), token[row, : LENGTHS[row]]) if count else []
        for layer, event, head in np.ndindex(layers * bool(count), count, heads):
            at = layer, event, row, head
            future[at] = full[layer][head, np.asarray(position[at]), event]
            weight[at] = 1 / (count * heads)

    @jax.jit
    def total(params, layer_feature, future, weight):
        importance = scorer.apply(RULES, params, layer_feature)
        return (sft.ranking_loss(importance, future, LOSS)[0] * weight).sum(), importance

    for layer in range(layers):
        own = {name: x[layer] for name, x in params.items()}
        flat = [x[layer].reshape(-1, *x.shape[3:]) for x in (feature, future, weight)]
        (loss[layer], score), grads = jax.value_and_grad(total, has_aux=True)(own, *flat)
        chosen, best = (np.argsort(x, -1, kind="stable")[..., :INTERVAL] for x in (score, flat[1]))
        agree = (chosen[..., None] == best[..., None, :]).any(-1).mean(-1)
        overlap[layer] = (agree * flat[2]).sum()
        for name in ("w1", "b1", "w2"):
            ours, theirs = np.asarray(sums.grads[name][layer]), np.asarray(grads[name])
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * abs(theirs).max())
    np.testing.assert_array_equal(sums.traces, [4] * layers)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(sums.overlap, overlap, rtol=1e-2)  # equal scores may go either way
    golden_sums = grads_fn(sft_plan(RULES, LOSS), params, lm, batch)
    assert not np.allclose(golden_sums.loss, sums.loss, rtol=1e-3)


def test_mixed_states_are_golden_or_own_trace_by_trace():
    lm, params, batch = start()
    plans = {x: sft_plan(RULES, LOSS, states=x) for x in sft.STATES}
    found = []
    for i, count in enumerate(EVENTS):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        sums = {x: grads_fn(plan, params, lm, one) for x, plan in plans.items()}
        own = int(batch.token_bt[i, : LENGTHS[i]].sum()) % 2
        # Losses of golden states leave out groups whose entries are all alike.
        want = sums["own" if own else "golden"]
        np.testing.assert_allclose(sums["mixed"].overlap, want.overlap, rtol=1e-5)
        if own:
            np.testing.assert_allclose(sums["mixed"].loss, want.loss, rtol=1e-5)
        found += [bool(own)] * (count > 1)
    assert len(set(found)) == 2  # the batch has both
    whole = grads_fn(plans["mixed"], params, lm, batch)
    np.testing.assert_array_equal(whole.traces, [(np.array(EVENTS) > 0).sum()] * lm.config.layers)


def test_a_plan_with_own_states_asks_the_scorers_as_they_are_now():
    """With updates on the way, evictions are those of the updated scorers."""
    lm, params, batch = start()
    plan = dataclasses.replace(PLAN, states="own", learning_rate=1.0)

    def losses(plan, state):
        step = functools.partial(sft.train_step, (plan,), axis="data")
        step = jax.vmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None)
        whole = jax.tree.map(lambda x: x[None], batch)
        return jax.jit(lambda state: step([state], lm, whole))(state)[1][0]["loss"]

    still = dataclasses.replace(plan, learning_rate=1e-9)
    batches = dataclasses.replace(still, updates="batch")
    moved, unmoved, want = (losses(p, p.start(params)) for p in (plan, still, batches))
    np.testing.assert_allclose(unmoved, want, rtol=1e-4)
    assert (abs(moved - want) > 1e-3).all()
