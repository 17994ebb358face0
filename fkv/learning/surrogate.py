"""The terms of the GRPO loss: advantages, log-probabilities of drops, probability ratios, KL.

ForesightKV, arXiv 2602.03203, section 3.4. Letters: r rollouts of a group, n candidates, m the pool
drawn from, l dropped entries, x any leading axes.
"""

import jax
import jax.numpy as jnp
from jax import Array

from fkv.models import numerics

LOG_PROBS = ("plackett_luce", "independent")


def advantages(reward_r: Array) -> Array:
    """Rewards of a group, centred and divided by their (population) standard deviation."""
    # Relative to the first, so that equal rewards give exact zeros, not amplified rounding errors.
    reward_r = reward_r - reward_r[:1]
    return (reward_r - reward_r.mean()) / (reward_r.std() + 1e-8)


def independent_log_prob(score_xn: Array, index_xl: Array) -> Array:
    """Log-probability of each drop under an independent softmax over all candidates.

    Args:
      score_xn: eviction scores, higher is dropped.
      index_xl: dropped candidates.
    """
    return jnp.take_along_axis(jax.nn.log_softmax(score_xn, axis=-1), index_xl, axis=-1)


def plackett_luce_log_prob(score_xm: Array, draws: int) -> Array:
    """Log-probability of each of the first `draws` entries, drawn in order without replacement.

    Args:
      score_xm: eviction scores of the pool: those drawn, in order, then the rest.
    """
    left = numerics.log_sums_to_end(score_xm)
    return (score_xm - left)[..., :draws]


def log_prob(kind: str, score_xn: Array, pool_xm: Array) -> Array:
    """Log-probability of each drop [x, l], nats.

    Args:
      kind: one of `LOG_PROBS`.
      score_xn: eviction scores.
      pool_xm: the `2L` candidates drawn from: the `L` dropped ones, in order, then the rest.
    """
    drops = pool_xm.shape[-1] // 2
    if kind == "independent":
        return independent_log_prob(score_xn, pool_xm[..., :drops])
    return plackett_luce_log_prob(jnp.take_along_axis(score_xn, pool_xm, axis=-1), drops)


def first_entropy(score_xm: Array) -> Array:
    """Entropy [x] of the first draw from a pool, nats."""
    log_p = jax.nn.log_softmax(score_xm, axis=-1)
    return -(jnp.exp(log_p) * log_p).sum(-1)


def kl_estimate(new_x: Array, reference_x: Array) -> Array:
    """k3 estimate of the KL to the reference policy for each dropped entry, nats."""
    log_ratio = jnp.clip(reference_x - new_x, -10, 10)
    return jnp.exp(log_ratio) - log_ratio - 1


def terms(
    new_x: Array, old_x: Array, reference_x: Array, advantage_x: Array, clip: float
) -> tuple[Array, Array, Array]:
    """Probability ratio, PPO-clip surrogate and KL estimate for each dropped entry, [x] each.

    Args:
      new_x, old_x, reference_x: log-probabilities.
      advantage_x: advantages, broadcast to them.
    """
    ratio = jnp.exp(jnp.clip(new_x - old_x, -10, 10))
    surrogate = jnp.minimum(ratio * advantage_x, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage_x)
    return ratio, surrogate, kl_estimate(new_x, reference_x)
