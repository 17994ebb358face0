"""Rollouts and updates of the reinforcement stage on a tiny model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.jobs import grpo as job
from fkv.learning import grpo, replayed, surrogate, tokens
from fkv.policies import scorer
from fkv.runs import parallel
from tests import oracles
from tests.learning import grpo_plan

BUDGET, INTERVAL = 16, 8
CADENCE = Cadence(BUDGET, INTERVAL)
LENGTHS, EVENTS = [45, 61], [3, 5]  # evictions that a token follows
RULES = scorer.ScorerConfig(norm="rms")
CONFIG = grpo.GRPOConfig(rollouts=4, epochs=2, eta=0.01, temperature=0.5, kl_weight=0.1)
PLAN = grpo_plan(RULES, CONFIG)


@pytest.fixture(scope="module")
def setup():
    """A model, scorers, and the rows of two traces with four rollouts each."""
    lm = oracles.make_lm()
    scorers = scorer.init(jax.random.key(0), lm.config, RULES)
    batch = Batch.of(*oracles.make_tokens(lm.config, LENGTHS))
    hidden, _, _ = replay.replay(lm, batch, policies.get("full"), CADENCE)
    losses = tokens.token_losses(lm, hidden, batch.token_bt)
    rows = jax.tree.map(
        lambda x: np.repeat(np.asarray(x), 4, axis=0), (batch, losses.nll_bt, losses.entropy_bt)
    )
    keys = replay.row_keys(jax.random.key(1), 8)
    return lm, scorers, grpo.Rollouts(*rows, np.asarray(jax.random.key_data(keys)))


@pytest.fixture(scope="module")
def rolled(setup):
    """Pools and losses of the rollouts."""
    lm, scorers, rows = setup
    return jax.jit(replayed.record, static_argnums=0)(PLAN, scorers, lm, rows.batch, rows.random_b)


# ---- the law of the draw


def test_plackett_luce_is_the_probability_of_the_order():
    rng = np.random.default_rng(0)
    score = rng.normal(size=(3, 5)).astype(np.float32)
    got = surrogate.plackett_luce_log_prob(jnp.asarray(score), 3)
    for row, want in zip(score, np.asarray(got), strict=True):
        left = list(np.exp(row))
        for j in range(3):
            np.testing.assert_allclose(want[j], np.log(left[0] / sum(left)), rtol=1e-5)
            left.pop(0)
    # Over all orders the probabilities add up to one.
    orders = np.array(list(itertools.permutations(range(5))))
    total = np.exp(surrogate.plackett_luce_log_prob(jnp.asarray(score[0][orders]), 5).sum(-1)).sum()
    np.testing.assert_allclose(total, 1, rtol=1e-5)


# ---- rollouts


def test_pools_are_the_least_important_and_the_drops_come_first(setup, rolled):
    lm, scorers, rows = setup
    pools, nll = rolled
    policy = policies.Foresight(scorers, RULES, "sample", CONFIG.temperature)
    keys = jax.random.wrap_key_data(rows.random_b)

    def look(acc, policy, view, evict):
        return acc, (evict, policy.replace(action="top").importance(view))

    _, _, (evict, importance) = jax.jit(
        lambda policy: replay.replay(lm, rows.batch, policy, CADENCE, keys, look)
    )(policy)
    np.testing.assert_array_equal(pools[..., :INTERVAL], evict)
    for layer, event, row, head in np.ndindex(*pools.shape[:-1]):
        if rows.batch.length_b[row] <= BUDGET + (event + 1) * INTERVAL:
            continue
        lowest = np.argsort(np.asarray(importance)[layer, event, row, head])[: 2 * INTERVAL]
        assert set(np.asarray(pools)[layer, event, row, head]) == set(lowest)
    drawn = np.asarray(pools)[0, 0, :4, 0, :INTERVAL]
    assert len({tuple(sorted(x)) for x in drawn.tolist()}) > 1  # rollouts differ
    assert len({float(x) for x in np.asarray(nll).sum(1)}) == 8


# ---- the loss and its gradient


@pytest.mark.parametrize("log_prob", surrogate.LOG_PROBS)
def test_loss_and_gradient_are_those_of_the_plain_objective(setup, rolled, log_prob):
    lm, scorers, rows = setup
    pools, _ = rolled
    settings, config = dataclasses.replace(CONFIG, log_prob=log_prob), lm.config
    rng = np.random.default_rng(0)
    # Scorers that have moved since the draw, and a reference elsewhere.
    now, reference = (
        jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), scorers)
        for _ in range(2)
    )
    advantage = jnp.asarray(rng.normal(size=8), jnp.float32)
    old = jnp.asarray(-2 - rng.random((*pools.shape[:-1], INTERVAL)), jnp.float32)
    recorded = replayed.Recorded(pools, old, now, reference, RULES)
    step = replayed.Step(jnp.bool_(False), jnp.float32(0.1), advantage)
    run = jax.jit(replayed.loss_and_grads, static_argnums=0)
    sums, new = run(grpo_plan(RULES, settings), recorded, step, lm, rows.batch)

    def look(acc, policy, view, evict):
        return acc, scorer.features(RULES, view)

    features = jax.jit(
        lambda policy: replay.replay(lm, rows.batch, policy, CADENCE, observe=look)[2]
    )(recorded)

    def log_p(params, layer, event, row):
        """Of one eviction's drops [k, l]."""
        one = jax.tree.map(lambda x: x[layer], params)
        score = -scorer.apply(RULES, one, features[layer, event, row][None])[0]
        score, pool = score / settings.temperature, pools[layer, event, row]
        if log_prob == "independent":
            score = jax.nn.log_softmax(score, axis=-1)
            return jnp.take_along_axis(score, pool[:, :INTERVAL], axis=-1)
        s = jnp.take_along_axis(score, pool, axis=-1)
        left = [jax.nn.logsumexp(s[:, j:], axis=-1) for j in range(INTERVAL)]
        return s[:, :INTERVAL] - jnp.stack(left, axis=-1)

    @jax.jit
    def plain(now, layer, event, row):
        """Loss and gradient of one eviction of one row."""

        def objective(now):
            log_prob = log_p(now, layer, event, row)
            loss, _ = oracles.grpo_loss(
                log_prob, old[layer, event, row], log_p(reference, layer, event, row),
                advantage[row], settings.clip, 0.1,
            )  # fmt: skip
            return loss, log_prob

        return jax.value_and_grad(objective, has_aux=True)(now)

    # Row by row, eviction by eviction, without a scan.
    total, log_probs = np.zeros(config.layers), {}
    grads = jax.tree.map(np.zeros_like, now)
    for layer in range(config.layers):
        for row, events in enumerate(np.repeat(EVENTS, 4)):
            for event in range(events):
                (loss, log_probs[layer, event, row]), grad = plain(now, layer, event, row)
                total[layer] += loss / events
                grads = jax.tree.map(lambda x, g, n=events: x + np.asarray(g) / n, grads, grad)
    np.testing.assert_allclose(sums.loss, total, rtol=2e-5)
    for place, want in log_probs.items():
        np.testing.assert_allclose(new[place], want, atol=2e-5)
    for name in ("w1", "b1", "w2"):
        scale = abs(grads[name]).max()
        np.testing.assert_allclose(sums.grads[name], grads[name], rtol=1e-4, atol=1e-5 * scale)
    assert abs(sums.grads["b2"]).max() < 1e-5 and abs(grads["b2"]).max() < 1e-5


# ---- the step


def step_fn(setup, settings=CONFIG, learning_rate=1e-2):
    """The step of all devices (state, lm, rows), and the state it starts from."""
    plan, scorers = grpo_plan(RULES, settings, learning_rate=learning_rate), setup[1]
    step = functools.partial(job.step_of(plan), plan, axis=parallel.AXIS)
    step = parallel.pmap(step, parallel.make_mesh(), constants=2, batched=1)
    return step, grpo.TrainState.init(scorers, plan.optimiser, reference=scorers)


def make_step(setup, settings=CONFIG, learning_rate=1e-2):
    lm, _, rows = setup
    step, state = step_fn(setup, settings, learning_rate)
    return step(state, lm, rows)


def test_ratios_of_the_drawing_parameters_are_exactly_one(setup):
    # At a vanishing learning rate the second epoch computes them anew, against those of the first.
    state, metrics = make_step(setup, learning_rate=1e-30)
    np.testing.assert_array_equal(metrics["ratio_off"], [0, 0])
    np.testing.assert_array_equal(metrics["clip_fraction"], [0, 0])
    assert metrics["loss"][0] == metrics["loss"][1]
    np.testing.assert_allclose(metrics["kl"], [0, 0], atol=1e-8)
    assert metrics["grad_norm"][0] > 1e-3 and metrics["reward_spread"] > 0
    np.testing.assert_allclose(*metrics["grad_norm"], rtol=1e-5)
    assert int(state.step) == 1
    for name, want in setup[1].items():
        np.testing.assert_allclose(state.params[name], want, rtol=0, atol=1e-20)


def test_ratios_are_to_the_scorers_that_drew(setup):
    # And not to those of the epoch before: small steps in one direction add up.
    _, metrics = make_step(setup, dataclasses.replace(CONFIG, epochs=3), learning_rate=1e-4)
    first, second, third = metrics["ratio_off"]
    assert first == 0 < 1.3 * second < third


def test_a_step_moves_the_scorers_and_reports(setup):
    state, metrics = make_step(setup)
    assert metrics["ratio_off"][0] == 0 < metrics["ratio_off"][1]
    assert metrics["kl"][1] > 0
    assert 0 < metrics["entropy"][0] <= np.log(2 * INTERVAL)
    assert abs(state.params["w1"] - setup[1]["w1"]).max() > 1e-3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


def test_rollouts_in_parts_are_the_rollouts(setup):
    # At one epoch nothing is kept of the first, at two the parts must find their own again.
    for settings in (CONFIG, dataclasses.replace(CONFIG, epochs=1)):
        whole, told = make_step(setup, settings)
        parts, metrics = make_step(setup, dataclasses.replace(settings, rollouts_at_once=2))
        for name, want in told.items():
            np.testing.assert_allclose(metrics[name], want, rtol=1e-4, atol=1e-6, err_msg=name)
        for name, want in whole.params.items():
            got = parts.params[name]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)
    with pytest.raises(UserError, match=r"grpo.rollouts_at_once = 3 must divide the 8 rollouts"):
        make_step(setup, dataclasses.replace(CONFIG, rollouts_at_once=3))


def test_the_kl_counts_for_as_many_steps_as_are_said(setup):
    # Without spread in the rewards, the loss is the KL alone; the reference is elsewhere.
    settings = dataclasses.replace(CONFIG, eta=1e6, epochs=1, kl_steps=3)
    step, state = step_fn(setup, settings)
    state = state.replace(reference={**setup[1], "w2": 2 * setup[1]["w2"]})
    for done, weight in ((0, 0.1), (2, 0.1), (3, 0.0)):
        now = state.replace(step=jnp.int32(done))
        new, metrics = step(now, setup[0], setup[2])
        assert metrics["kl"][0] > 1e-3
        layers = setup[0].config.layers
        np.testing.assert_allclose(
            metrics["loss"][0], weight * layers * metrics["kl"][0], rtol=1e-5
        )
        assert int(new.step) == done + 1


def test_losses_are_told_of_low_and_of_high_entropy_tokens(setup, rolled):
    batch, nll = setup[2], np.asarray(rolled[1])
    _, metrics = make_step(setup)
    sums, rewards = {"low": np.zeros(3), "high": np.zeros(3)}, []
    for row, counted in enumerate(np.asarray(batch.batch.counted_bt(CADENCE.first_evicting_token))):
        by_entropy = sorted(np.flatnonzero(counted), key=lambda i: -batch.entropy_bt[row, i])
        high = len(by_entropy) // 5
        for name, index in (("low", by_entropy[high:]), ("high", by_entropy[:high])):
            evicted, full = nll[row, index], batch.full_bt[row, index]
            sums[name] += [evicted.sum(), full.sum(), len(index)]
            if name == "low":
                added = evicted - full
                rewards.append(-np.mean(added**2 * (added > CONFIG.eta)))
    for name, (evicted, full, number) in sums.items():
        np.testing.assert_allclose(metrics[f"evicted_{name}"], evicted, rtol=1e-4)
        np.testing.assert_allclose(metrics[f"full_{name}"], full, rtol=1e-4)
        assert metrics[f"tokens_{name}"] == number
    groups = np.reshape(rewards, (2, 4))
    np.testing.assert_allclose(metrics["reward"], groups.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_spread"], groups.std(1).mean(), rtol=1e-4)


def test_a_group_without_spread_teaches_nothing(setup):
    # Nothing is beyond this eta, so every reward is zero; and the weight of the KL has ended.
    settings = dataclasses.replace(CONFIG, eta=1e6, kl_weight=10.0, kl_steps=0)
    state, metrics = make_step(setup, settings)
    assert metrics["groups_without_spread"] == 1 and metrics["reward"] == 0
    np.testing.assert_array_equal(metrics["loss"], [0, 0])
    np.testing.assert_array_equal(metrics["grad_norm"], [0, 0])
    jax.tree.map(np.testing.assert_array_equal, state.params, setup[1])


# ---- rewards


def test_rewards_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    full, entropy = rng.random((2, 3, 40))
    evicted = full + rng.normal(size=full.shape) * 0.5
    counted = np.arange(40)[None] >= np.array([[0], [7], [20]])
    for kind in grpo.REWARDS:
        config = grpo.GRPOConfig(reward=kind, eta=0.3, high_fraction=0.25)
        got = np.asarray(grpo.rollout_reward(config, evicted, full, entropy, counted))
        for row in range(3):
            tokens = [i for i in range(40) if counted[row, i]]
            by_entropy = sorted(tokens, key=lambda i: -entropy[row, i])
            high = set(by_entropy[: len(tokens) // 4])
            d = {i: evicted[row, i] - full[row, i] for i in tokens}
            chosen = {
                "all": d,
                "high": {i: x for i, x in d.items() if i in high},
            }.get(kind, {i: x for i, x in d.items() if i not in high})
            value = {
                "low_large": lambda x: x if x > 0.3 else 0,
                "low_large_squared": lambda x: x * x if x > 0.3 else 0,
            }.get(kind, lambda x: x)
            want = -np.mean([value(x) for x in chosen.values()])
            np.testing.assert_allclose(got[row], want, rtol=1e-5, err_msg=kind)


def test_reward_agrees_with_the_released_form():
    rng = np.random.default_rng(1)
    full, entropy = rng.random((2, 1, 60))
    evicted = full + 3 * rng.random((1, 60))
    config = grpo.GRPOConfig(eta=1.5, high_fraction=0.2)
    counted = np.arange(60)[None] >= 10
    low = tokens.low_entropy(entropy, counted, 0.2)
    want = oracles.reward(evicted[0], full[0], low[0], 1.5)
    got = grpo.rollout_reward(config, evicted, full, jnp.asarray(entropy), counted)
    np.testing.assert_allclose(got[0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(reward="some"), r"grpo.reward = 'some' must be one of all, low, high"),
        (dict(log_prob="exact"), r"grpo.log_prob = 'exact' must be one of plackett_luce"),
        (dict(rollouts=1), r"grpo.rollouts = 1 must be a whole number from 2"),
        (dict(epochs=0), r"grpo.epochs = 0 must be a whole number from 1"),
        (dict(high_fraction=1), r"grpo.high_fraction = 1 must be a number of at least 0 and below"),
        (dict(temperature=0.0), r"grpo.temperature = 0.0 must be a number above 0"),
        (dict(temperature=float("inf")), r"grpo.temperature = inf must be a number above 0"),
        (dict(clip=0), r"grpo.clip = 0 must be a number above 0"),
        (dict(eta=-1.0), r"grpo.eta = -1.0 must be a number of at least 0"),
        (dict(kl_weight=float("nan")), r"grpo.kl_weight = nan must be a number of at least 0"),
        (dict(kl_steps=1.5), r"grpo.kl_steps = 1.5 must be a whole number from 0"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(UserError, match=message):
        grpo.GRPOConfig(**fields)


def test_optimizer_is_clipped_adam_on_a_warm_up():
    rate, warmup, clip = 0.2, 3, 1.0
    changes = dict(learning_rate=rate, warmup=warmup, clip_norm=clip)
    optimiser = grpo_plan(RULES, CONFIG, **changes).optimiser
    state, rng = optimiser.init(jnp.zeros(8)), np.random.default_rng(0)
    update = jax.jit(optimiser.update)
    mean, square = np.zeros(8), np.zeros(8)
    for step in range(8):
        g = rng.normal(size=8) * (10.0 if step % 2 else 0.1)  # clipped, and not
        got, state = update(jnp.asarray(g, jnp.float32), state)
        assert (np.linalg.norm(g) > clip) == (step % 2 == 1)
        g = g * min(1.0, clip / np.linalg.norm(g))
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        adam = mean / (1 - 0.9 ** (step + 1))
        adam /= np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        lr = rate * min(1, (step + 1) / (warmup + 1))
        np.testing.assert_allclose(got, -lr * adam, rtol=1e-4, atol=1e-7)
