"""The formulas of the reinforcement stage against loops over their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fkv.learning import surrogate
from tests import oracles

SHAPE = (3, 4, 2)  # evictions, rollouts, KV heads
N, DROPPED = 12, 5


def random_scores(seed):
    """Scores [..., n], and the candidates dropped [..., l]."""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(*SHAPE, N))
    return score, np.argsort(rng.random(score.shape), axis=-1)[..., :DROPPED]


def log_softmax(x):
    return x - np.log(np.exp(x).sum())


def log_probs(score, index):
    out = np.zeros(index.shape)
    for place in np.ndindex(SHAPE):
        for j, candidate in enumerate(index[place]):
            out[(*place, j)] = log_softmax(score[place])[candidate]
    return out


def random_log_probs(seed, spread):
    """Three sets of log-probabilities at some distance from each other, and advantages."""
    rng = np.random.default_rng(seed)
    new = -3 * rng.random((*SHAPE, DROPPED))
    old = new + spread * rng.normal(size=new.shape)
    reference = new + min(spread, 1) * rng.normal(size=new.shape)  # training stays near it
    advantage = np.broadcast_to(rng.normal(size=(1, SHAPE[1], 1, 1)), new.shape)
    return new, old, reference, advantage


def plain_loss(new, old, reference, advantage, clip, kl_weight):
    """Loss and KL, one dropped entry at a time."""
    terms, kls = [], []
    for n, o, ref, a in zip(*(x.ravel() for x in (new, old, reference, advantage)), strict=True):
        ratio = np.exp(min(max(n - o, -10), 10))
        terms.append(-min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
        kls.append(np.exp(ref - n) - (ref - n) - 1)
    return np.mean(terms) + kl_weight * np.mean(kls), np.mean(kls)


# ---- rewards


@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_advantages(size):
    reward = -np.random.default_rng(size).gamma(1, 2, size)
    mean = sum(reward) / size
    std = (sum((r - mean) ** 2 for r in reward) / size) ** 0.5
    want = [(r - mean) / (std + 1e-8) for r in reward]
    np.testing.assert_allclose(surrogate.advantages(jnp.asarray(reward)), want, atol=2e-6)


def test_a_group_without_spread_teaches_nothing():
    log_p = jnp.log(jnp.linspace(0.1, 0.9, 4))
    for reward in (0.0, -0.5, -2.0):
        advantage = surrogate.advantages(jnp.full(4, reward))
        np.testing.assert_array_equal(advantage, np.zeros(4))
        gradient = jax.grad(
            lambda x, a=advantage: oracles.grpo_loss(x, log_p, log_p, a, 0.2, 0.05)[0]
        )(log_p)
        np.testing.assert_array_equal(gradient, np.zeros(4))


@pytest.mark.parametrize("size", [3, 8, 32])
def test_equal_rewards_are_no_spread(size):
    for reward in np.linspace(-3, -0.1, 30):
        advantage = surrogate.advantages(jnp.full(size, reward))
        np.testing.assert_allclose(advantage, np.zeros(size), atol=1e-3, err_msg=str(reward))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.5])
def test_reward(eta):
    rng = np.random.default_rng(0)
    evicted, full = 3 * rng.random((2, 80))
    counted = rng.random(80) < 0.7
    total = 0.0
    for e, f, c in zip(evicted, full, counted, strict=True):
        if c and e - f > eta:
            total -= (e - f) ** 2
    assert total < 0
    got = oracles.reward(jnp.asarray(evicted), jnp.asarray(full), jnp.asarray(counted), eta)
    assert float(got) == pytest.approx(total / counted.sum(), rel=1e-5)


def test_reward_is_zero_where_eviction_does_no_harm():
    full = jnp.linspace(1, 4, 7)
    counted = jnp.arange(7) > 2
    # Large losses where they do not count, gains and losses of just eta where they do.
    evicted = full + jnp.array([9.0, 9.0, 9.0, 0.5, 0.25, 0.0, -3.0])
    assert oracles.reward(evicted, full, counted, 0.5) == 0
    assert oracles.reward(evicted, full, counted, 0.25) == -0.25 / 4


# ---- the loss


def test_independent_log_prob():
    score, index = random_scores(0)
    got = surrogate.independent_log_prob(jnp.asarray(score), jnp.asarray(index))
    np.testing.assert_allclose(got, log_probs(score, index), atol=2e-6)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(("clip", "kl_weight"), [(0.2, 0.05), (0.1, 0.0), (0.5, 1.0)])
def test_loss(spread, clip, kl_weight):
    arrays = random_log_probs(1, spread)
    new, old, _, _ = arrays
    assert (abs(np.exp(new - old) - 1) > clip).any() or spread < clip
    assert (abs(new - old) > 10).any() == (spread == 6)  # there log-ratios are clamped
    want = plain_loss(*arrays, clip, kl_weight)
    got = oracles.grpo_loss(*map(jnp.asarray, arrays), clip, kl_weight)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_kl_estimate_is_zero_at_the_reference_and_positive_beside_it():
    new, _, reference, advantage = map(jnp.asarray, random_log_probs(2, 0.3))
    assert oracles.grpo_loss(new, new, new, advantage, 0.2, 0.05)[1] == 0
    assert oracles.grpo_loss(new, new, reference, advantage, 0.2, 0.05)[1] > 0


def test_gradient_at_ratio_one_is_that_of_the_weighted_log_probability():
    score, index = random_scores(3)
    _, _, _, advantage = random_log_probs(3, 1.0)
    old = jnp.asarray(log_probs(score, index), jnp.float32)

    def objective(score):
        new = surrogate.independent_log_prob(score, jnp.asarray(index))
        new = new - jax.lax.stop_gradient(new) + old  # exactly ratio 1
        return oracles.grpo_loss(new, old, old, jnp.asarray(advantage), 0.2, 0.05)[0]

    want = np.zeros(score.shape)
    for place in np.ndindex(SHAPE):
        p = np.exp(log_softmax(score[place]))
        for j, candidate in enumerate(index[place]):
            gradient_of_log_p = np.eye(N)[candidate] - p
            want[place] -= advantage[(*place, j)] * gradient_of_log_p / index.size
    np.testing.assert_allclose(jax.grad(objective)(jnp.asarray(score)), want, atol=1e-7)


def test_clipping_stops_the_gradient_only_where_the_step_went_too_far():
    # Rows: ratio far above, above, below and far below one; columns: a good and a bad rollout.
    new = jnp.log(jnp.array([3.0, 1.1, 0.9, 0.3]))[:, None] * jnp.ones((1, 2))
    advantage = jnp.array([[1.0, -1.0]]) * jnp.ones((4, 1))
    gradient = jax.grad(lambda x: oracles.grpo_loss(x, 0 * x, x, advantage, 0.2, 0.0)[0])(new)
    ratio = np.exp(new)
    want = -ratio * advantage / 8 * np.array([[0, 1], [1, 1], [1, 1], [1, 0]])
    np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_ratios_beyond_the_clamp_stay_finite():
    new, old = jnp.array([-200.0, -1.0, -3.0]), jnp.array([-1.0, -200.0, -3.0])
    advantage = jnp.array([1.0, -1.0, 1.0])
    value, gradient = jax.value_and_grad(
        lambda x: oracles.grpo_loss(x, old, jax.lax.stop_gradient(x), advantage, 0.2, 0.05)[0]
    )(new)
    want, _ = plain_loss(*map(np.asarray, (new, old, new, advantage)), 0.2, 0.05)
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert np.isfinite(gradient).all()


def test_kl_far_from_the_reference_stays_finite():
    reference = jnp.array([-1.0, -2.0])
    value, gradient = jax.value_and_grad(
        lambda x: oracles.grpo_loss(x, jax.lax.stop_gradient(x), reference, jnp.ones(2), 0.2, 0.05)[
            0
        ]
    )(jnp.array([-100.0, -2.0]))
    assert np.isfinite(value) and np.isfinite(gradient).all()
