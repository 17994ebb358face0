import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.learning import fit, golden, sft
from fkv.models import LM
from fkv.policies import scorer
from tests import oracles
from tests.learning import sft_plan

BUDGET, INTERVAL = 16, 8
CADENCE = Cadence(BUDGET, INTERVAL)
# Evictions that a token follows: 5, 3, 2, two traces too short to have one, and 5.
LENGTHS, EVENTS = [61, 45, 40, 24, 9, 61], [5, 3, 2, 0, 0, 5]


# Programs that run a few times: compiling is what takes the time.
@functools.partial(jax.jit, static_argnums=0)
def grads_fn(plan, params, lm, batch):
    return sft.loss_and_grads((plan,), (params,), lm, batch)[0]


# ---- the ranking loss


def plain_ranking_loss(importance, future, margin, weighting):
    """Of one group: the loss, its gradient in the importance, and whether a pair exists."""
    total, loss, grad = 0.0, 0.0, np.zeros(len(future))
    for low in range(len(future)):
        for high in range(len(future)):
            if future[low] < future[high]:
                weight = (future[high] - future[low]) ** 0.5 if weighting == "sqrt_gap" else 1.0
                total += weight
                hinge = margin - (importance[high] - importance[low])
                if hinge > 0:
                    loss += weight * hinge
                    grad[low] += weight
                    grad[high] -= weight
    return loss / (total or 1.0), grad / (total or 1.0), total > 0


@pytest.mark.parametrize("weighting", sft.WEIGHTINGS)
@pytest.mark.parametrize("margin", [0.01, 1.0])
def test_ranking_loss_is_a_loop_over_pairs(weighting, margin):
    rng = np.random.default_rng(0)
    importance = rng.normal(size=(2, 3, 9)).astype(np.float32)
    future = rng.random((2, 3, 9), dtype=np.float32)
    future[0, 1] = np.round(future[0, 1] * 2)  # ties
    future[0, 2] = 0.25  # no pair
    future[1, 0] = 0
    future[1, 0, 4] = 1  # one entry above the others
    importance[1, 1, 3:6] = importance[1, 1, 2]  # the scorer ties
    importance[1, 2] = 10 * future[1, 2]  # right: no loss where the gaps are wide
    config = sft.LossConfig(margin, weighting)

    def total(importance):
        loss, has_pair = sft.ranking_loss(importance, future, config)
        return loss.sum(), (loss, has_pair)

    (_, (loss, has_pair)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(importance)
    assert loss.shape == has_pair.shape == (2, 3)
    np.testing.assert_array_equal(has_pair, sft.has_pair(future))
    for index in np.ndindex(2, 3):
        want, want_grad, pair = plain_ranking_loss(
            importance[index].astype(float), future[index].astype(float), margin, weighting
        )
        np.testing.assert_allclose(loss[index], want, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(grad[index], want_grad, rtol=1e-5, atol=1e-6)
        assert has_pair[index] == pair
    assert loss[0, 2] == 0 and not grad[0, 2].any() and not has_pair[0, 2]


def test_loss_of_the_right_order_beyond_the_margin_is_zero():
    future = jnp.arange(5.0)
    assert sft.ranking_loss(future, future, sft.LossConfig(0.9))[0] == 0
    np.testing.assert_allclose(
        sft.ranking_loss(-future, future, sft.LossConfig(0.5))[0], 0.5 + 2, rtol=1e-6
    )  # the mean distance of the ten pairs is 2


def test_refuses_an_unknown_weighting():
    with pytest.raises(UserError, match=r"sft.weighting = 'gap' must be one of plain, sqrt_gap"):
        sft.LossConfig(weighting="gap")


# ---- loss, overlap and gradient of a batch


@functools.cache
def model(family, heads, kv_heads, cache_dtype=""):
    """A model whose first scorer has nothing to learn: queries of zero attend uniformly."""
    config, params = oracles.make_model(family, heads, kv_heads, cache_dtype=cache_dtype)
    layers = params["layers"]
    own = slice(0, heads // kv_heads)
    layers["q_hdm"] = layers["q_hdm"].at[0, own].set(0.0)
    if config.qkv_bias:
        layers["q_bias_hd"] = layers["q_bias_hd"].at[0, own].set(0.0)
    return LM(params, config)


@functools.partial(jax.jit, static_argnums=(0, 3))
def collect(rules, lm, batch, cadence):
    """Labels of every eviction, and what an observer sees at it, [layers, e, b, k, ...]."""

    def look(acc, policy, view, evict):
        position = view.cache.position_bks
        dropped = jnp.take_along_axis(position, evict, axis=-1)
        return acc, (position[..., :BUDGET], scorer.features(rules, view), dropped)

    policy, labels, _ = golden.policy(lm, batch, cadence)
    policy = policies.Forced(policy.position_yebkl, rules.statistics)
    _, _, seen = replay.replay(lm, batch, policy, cadence, observe=look)
    return labels, seen


RULES, LOSS = scorer.ScorerConfig(norm="rms"), sft.LossConfig(margin=1.0)
CASES = {
    "normalised": (("qwen3", 4, 2), RULES, LOSS),
    "reference, weighted": (
        ("qwen2", 4, 1),
        scorer.ScorerConfig(hidden=5, form="reference"),
        sft.LossConfig(0.3, "sqrt_gap"),
    ),
    "int8": (("qwen2", 4, 2, "int8"), RULES, LOSS),  # labels and the full pass are not quantised
    "keys and values": (("qwen2", 2, 2), scorer.ScorerConfig(inputs="kv"), sft.LossConfig()),
    "prompts are kept": (("qwen3", 4, 2), RULES, sft.LossConfig(1.0, "sqrt_gap"), 5),
}
PROMPTS = np.array([9, 3, 5, 2, 9, 0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sums_are_those_of_the_plain_objective(case):
    of_model, rules, loss_config, *protect = case
    lm, cadence = model(*of_model), Cadence(BUDGET, INTERVAL, *protect)
    config, batch = lm.config, Batch.of(*oracles.make_tokens(lm.config, LENGTHS), PROMPTS)
    scorers = scorer.init(jax.random.key(1), config, rules)
    plan = dataclasses.replace(sft_plan(rules, loss_config), cadence=cadence)
    sums = grads_fn(plan, scorers, lm, batch)
    labels, (position, feature, dropped) = collect(rules, lm, batch, cadence)

    def apply(scorers):  # all evictions at once
        batches = feature.reshape(config.layers, -1, *feature.shape[3:])
        importance = jax.vmap(functools.partial(scorer.apply, rules))(scorers, batches)
        return importance.reshape(feature.shape[:-1])

    seen = labels, position, dropped, jax.jit(apply)(scorers)
    labels, position, dropped, score = jax.device_get(seen)
    loss, overlap = np.zeros((2, config.layers))
    by_importance = np.zeros(score.shape)  # gradient of the loss
    for layer, row in np.ndindex(config.layers, len(LENGTHS)):
        found, agree = [], []
        for event, head in np.ndindex(EVENTS[row], config.kv_heads):
            group = layer, event, row, head
            np.testing.assert_array_equal(position[group], labels.candidate_position_ebkn[group])
            free = position[group] >= min(PROMPTS[row], cadence.protect_prompt)
            one, grad, has_pair = plain_ranking_loss(
                score[group][free].astype(float),
                labels.future_score_ebkn[group][free].astype(float),
                loss_config.margin,
                loss_config.weighting,
            )
            if has_pair:
                whole = np.zeros(BUDGET)
                whole[free] = grad
                found.append((group, one, whole))
            lowest = position[group][free][np.argsort(score[group][free])[:INTERVAL]]
            agree.append(len({*lowest.tolist()} & {*dropped[group].tolist()}) / INTERVAL)
        for group, one, grad in found:
            loss[layer] += one / len(found)
            by_importance[group] = grad / len(found)
        overlap[layer] += np.mean(agree) if agree else 0
    by_importance = by_importance.astype(np.float32)
    (grads,) = jax.jit(lambda *args: jax.vjp(apply, args[0])[1](args[1]))(scorers, by_importance)

    np.testing.assert_array_equal(sums.traces, [4] * config.layers)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(sums.overlap, overlap, rtol=1e-5)
    assert sums.grads.keys() == grads.keys()
    for name, want in grads.items():
        if name == "b2":  # moves the scores of a group together
            assert not sums.grads[name].any()
            continue
        np.testing.assert_allclose(sums.grads[name], want, rtol=1e-5, atol=1e-5 * abs(want).max())
        assert not sums.grads[name][0, 0].any()  # no pair, no gradient


def test_refuses_batches_without_an_eviction():
    lm, rules = model("qwen3", 4, 2), scorer.ScorerConfig()
    batch = Batch.of(*oracles.make_tokens(lm.config, [24]))
    scorers = scorer.init(jax.random.key(0), lm.config, rules)
    with pytest.raises(UserError, match="longest trace has 24 tokens"):
        sft.loss_and_grads((sft_plan(rules),), (scorers,), lm, batch)


# ---- the optimiser


def optimiser_of(rate, warmup, steps, clip, **changes):
    sizes = dict(learning_rate=rate, warmup=warmup, steps=steps, clip=clip)
    return sft_plan(scorer.ScorerConfig(), **sizes, **changes).optimiser


def test_optimizer_is_clipped_adam_on_a_warm_up_and_a_cosine():
    rate, warmup, steps, clip = 0.2, 3, 8, 1.0
    optimiser = optimiser_of(rate, warmup, steps, clip)
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    mean, square = np.zeros(8), np.zeros(8)
    for step in range(steps + 2):
        g = rng.normal(size=8) * (10.0 if step % 2 else 0.1)  # clipped, and not
        grads = {"w": g[:6].reshape(3, 2), "b": g[6:]}
        grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
        updates, state = update(grads, state, params)
        assert (np.linalg.norm(g) > clip) == (step % 2 == 1)
        g = g * min(1.0, clip / np.linalg.norm(g))
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        adam = mean / (1 - 0.9 ** (step + 1))
        adam /= np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        if step < warmup:
            lr = rate * step / warmup
        else:
            lr = rate * (1 + np.cos(np.pi * min(1, (step - warmup) / (steps - warmup)))) / 2
        got = np.concatenate([np.ravel(updates["w"]), updates["b"]])
        np.testing.assert_allclose(got, -lr * adam, rtol=1e-4, atol=1e-7)
    assert lr == 0 and not got.any()


def test_optimizer_without_warm_up_starts_at_the_peak():
    optimiser = optimiser_of(0.2, 0, 5, 1.0)
    updates, _ = optimiser.update(jnp.full(3, 0.1), optimiser.init(jnp.zeros(3)))
    np.testing.assert_allclose(updates, -0.2, rtol=1e-5)


@pytest.mark.parametrize(
    ("warmup", "steps", "message"),
    [
        (10, 10, "sft.warmup = 10 must be less than sft.steps = 10"),
        (11, 10, "sft.warmup = 11 must be less than sft.steps = 10"),
        (-1, 10, "sft.warmup = -1 must be a whole number from 0"),
        (0, 0, "sft.steps = 0 must be a whole number from 1"),
    ],
)
def test_optimizer_refuses_a_warm_up_that_does_not_fit(warmup, steps, message):
    with pytest.raises(UserError, match=re.escape(message)):
        optimiser_of(1e-2, warmup, steps, 1.0)


def test_parts_of_a_step_count_by_their_mean():
    whole = optimiser_of(0.2, 1, 5, 1.0)
    parts = optimiser_of(0.2, 1, 5, 1.0, micro_batches=3)
    params = jnp.zeros(4)
    state, whole_state, rng = parts.init(params), whole.init(params), np.random.default_rng(0)
    for step in range(3):
        grads = rng.normal(size=(3, 4)).astype(np.float32)
        for i, grad in enumerate(grads):
            mean = fit.mean_so_far(grad, state)
            np.testing.assert_allclose(mean, grads[: i + 1].mean(0), rtol=1e-5)
            updates, state = parts.update(grad, state, params)
            assert fit.updates_made(jnp.int32(step), state) == step + (i == 2)
            assert i == 2 or not updates.any()
        want, whole_state = whole.update(grads.mean(0), whole_state, params)
        np.testing.assert_allclose(updates, want, rtol=1e-4, atol=1e-6)
        assert fit.updates_made(jnp.int32(step), whole_state) == step + 1
        assert fit.mean_so_far(grad, whole_state) is grad


# ---- the training step

RATE, WARMUP, STEPS, CLIP = 3e-2, 2, 200, 0.5


PLAN = sft_plan(RULES, LOSS, learning_rate=RATE, warmup=WARMUP, steps=STEPS, clip=CLIP)


@functools.cache
def step_fn():
    """The step of two devices, with `vmap` in their place: the axis is all that it knows."""
    step = functools.partial(sft.train_step, (PLAN,), axis="data")
    mapped = jax.vmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None)

    @jax.jit
    def of_one(state, lm, batch):
        (state,), (metrics,) = mapped([state], lm, batch)
        return state, metrics

    return of_one


def start(seed):
    lm = model("qwen3", 4, 2)
    scorers = scorer.init(jax.random.key(seed), lm.config, RULES)
    return lm, fit.TrainState.init(scorers, PLAN.optimiser)


def halves(batch):
    return jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)


def test_train_step_applies_the_mean_gradient_of_the_traces_that_count():
    lm, state = start(2)
    # Three traces that count on one device, one on the other.
    batch = Batch.of(*oracles.make_tokens(lm.config, LENGTHS))
    assert int(state.step) == 0
    update, opt_state, want = jax.jit(PLAN.optimiser.update), state.opt_state, state.params
    for step in range(3):
        sums = grads_fn(PLAN, want, lm, batch)
        mean = jax.tree.map(lambda x: x / 4, sums.grads)
        updates, opt_state = update(mean, opt_state, want)
        want = optax.apply_updates(want, updates)
        state, metrics = step_fn()(state, lm, halves(batch))
        assert int(state.step) == step + 1
        for name, x in want.items():
            np.testing.assert_allclose(state.params[name], x, atol=1e-6)
        assert metrics.keys() == {"loss", "overlap", "grad_norm"}
        np.testing.assert_allclose(metrics["loss"], sums.loss / 4, rtol=1e-5)
        np.testing.assert_allclose(metrics["overlap"], sums.overlap / 4, rtol=1e-5)
        norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in mean.values()))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)  # before the clip
        assert 0 < metrics["overlap"].min() and metrics["overlap"].max() <= 1


def test_train_step_without_a_trace_that_counts_changes_no_scorer():
    lm, state = start(2)
    token, _ = oracles.make_tokens(lm.config, [61] * 6)
    batch = Batch.of(token, jnp.array([24, 9, 3, 1, 20, 24]))
    new, metrics = step_fn()(state, lm, halves(batch))
    assert int(new.step) == 1
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    for x in metrics.values():
        assert (x == 0).all()


def test_training_lowers_the_loss():
    lm, state = start(3)
    batch = Batch.of(*oracles.make_tokens(lm.config, [61, 45, 40, 61, 61, 50], seed=3))
    losses, overlaps = [], []
    for _ in range(40):
        state, metrics = step_fn()(state, lm, halves(batch))
        losses.append(float(metrics["loss"].sum()))
        overlaps.append(float(metrics["overlap"].mean()))
    assert losses[-1] < 0.7 * losses[0], losses
    assert overlaps[-1] > overlaps[0] + 0.05, overlaps
