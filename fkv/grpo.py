"""The reinforcement stage's pure parts: reward, advantages, log-probabilities, loss.

ForesightKV, arXiv 2602.03203, section 3.4. Letters: r rollouts of one trace, t tokens, n
candidates, l dropped entries.
"""

import jax
import jax.numpy as jnp
from jax import Array


def low_entropy(entropy_t: Array, skip: int, high_fraction: float) -> Array:
    """Which tokens count as low-entropy, bool [t].

    Of the tokens after the first `skip`, all but the `high_fraction` (rounded down to a whole
    number) with the largest full-cache entropy.
    """
    index = jnp.arange(entropy_t.shape[0])
    entropy = jnp.where(index >= skip, entropy_t, -jnp.inf)
    high = int((entropy_t.shape[0] - skip) * high_fraction)
    rank = jnp.argsort(jnp.argsort(-entropy, stable=True))
    return (index >= skip) & (rank >= high)


def reward(evicted_nll_t: Array, full_nll_t: Array, counted_t: Array, eta: float) -> Array:
    """Minus the mean over the counted tokens of the squared losses larger than `eta` nats."""
    excess = evicted_nll_t - full_nll_t
    penalty = jnp.where(excess > eta, excess**2, 0.0)
    return -(penalty * counted_t).sum() / counted_t.sum()


def advantages(reward_r: Array) -> Array:
    """Rewards of a group, centred and divided by their (population) standard deviation."""
    # From the first on, so that equal rewards give zeros and not rounding over rounding.
    reward_r = reward_r - reward_r[:1]
    return (reward_r - reward_r.mean()) / (reward_r.std() + 1e-8)


def independent_log_prob(score_xn: Array, index_xl: Array) -> Array:
    """Log-probability of each drop as if drawn alone from a softmax over all candidates.

    Args:
      score_xn: eviction scores, higher is dropped.
      index_xl: dropped candidates.
    """
    return jnp.take_along_axis(jax.nn.log_softmax(score_xn, axis=-1), index_xl, axis=-1)


def loss(
    new_x: Array,
    old_x: Array,
    reference_x: Array,
    advantage_x: Array,
    clip: float,
    kl_weight: float,
) -> tuple[Array, Array]:
    """PPO-clip loss plus the k3 estimate of the KL to the reference policy.

    Args:
      new_x, old_x, reference_x: log-probabilities of the dropped entries.
      advantage_x: advantages, broadcast to them.

    Returns:
      The loss and the mean KL estimate, nats.
    """
    ratio = jnp.exp(jnp.clip(new_x - old_x, -10, 10))
    surrogate = jnp.minimum(ratio * advantage_x, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage_x)
    log_ratio = jnp.clip(reference_x - new_x, -10, 10)
    kl = (jnp.exp(log_ratio) - log_ratio - 1).mean()
    return -surrogate.mean() + kl_weight * kl, kl
