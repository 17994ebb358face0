"""Expected attention: attention of near-future queries, estimated from recent ones."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds, models
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig, numerics
from fkv.policies.base import Policy, View, register, setting


def future_queries(view: View, horizon: int) -> Array:
    """The last `L` queries, moved to the next `horizon` positions on average.

    The rotation of each query is replaced by the mean rotation of these positions.
    """
    q = view.query_blhd.astype(jnp.float32)
    _, scale = view.config.inv_frequencies()
    q = models.rotate(q, -view.query_position_bl, view.config) / scale**2
    newest = view.query_position_bl.max(-1, keepdims=True)
    ahead = newest + 1 + jnp.arange(horizon)[None]
    half = q.shape[-1] // 2
    unit = jnp.broadcast_to(jnp.repeat(jnp.array([1.0, 0.0]), half), (*ahead.shape, 1, 2 * half))
    cos, sin = jnp.split(models.rotate(unit, ahead, view.config).mean(1)[:, None], 2, axis=-1)
    low, high = jnp.split(q, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def expected_logits(view: View, horizon: int) -> Array:
    """Logarithm of the expected `exp(q k / sqrt(d))` of future queries, [b, k, g, s].

    Future queries are modelled as normal, with the mean and covariance of the last `L` queries
    before the rotation, at the mean rotation of the next `horizon` positions: mean + variance / 2.
    """
    key = view.key_bksd
    q = numerics.group_queries(future_queries(view, horizon), key.shape[1])
    x = numerics.einsum_f32("bqkgd,bksd->bkgqs", q, key) * q.shape[-1] ** -0.5
    real = (view.query_position_bl >= 0)[:, None, None, :, None]
    count = jnp.maximum(real.sum(3), 1)
    mean = jnp.where(real, x, 0.0).sum(3) / count
    variance = jnp.where(real, (x - mean[:, :, :, None]) ** 2, 0.0).sum(3) / count
    return mean + variance / 2


def by_moments(view: View, horizon: int, sinks: int) -> Array:
    """`expected_logits` from the moments of the queries, of which there may be many.

    Args:
      sinks: the queries of so many first positions are left out.
    """
    key = view.key_bksd.astype(jnp.float32)
    q = numerics.group_queries(future_queries(view, horizon), key.shape[1]) * key.shape[-1] ** -0.5
    real = (view.query_position_bl >= sinks)[:, :, None, None, None]
    count = jnp.maximum(real.sum(1), 1)
    mean = jnp.where(real, q, 0.0).sum(1) / count
    centred = jnp.where(real, q - mean[:, None], 0.0)
    spread = numerics.einsum_f32("blkgd,blkge->bkgde", centred, centred) / count[..., None]
    along = numerics.einsum_f32("bkgde,bkse->bkgsd", spread, key)
    variance = (along * key[:, :, None]).sum(-1)
    return numerics.einsum_f32("bkgd,bksd->bkgs", mean, key) + variance / 2


@register("expected_attention")
class ExpectedAttention(Policy):
    """Keeps entries with large expected attention times value norm (arXiv 2510.00636).

    That is the softmax of `by_moments` over the entries held but for the first `sinks`
    positions, which are kept; mean over the group. As `ExpectedAttentionPress` of kvpress, which
    takes its queries from the whole prompt; this from the last L, or from a whole text that is
    evicted once at its end.
    """

    all_queries = True

    horizon: int = setting(kinds.whole(1, 2**20), 512)
    sinks: int = setting(kinds.whole(0), 4)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"sinks": cadence.budget - cadence.interval}

    def score(self, view: View) -> Array:
        position = view.cache.position_bks
        sinks = min(self.sinks, view.budget - view.interval)
        x = by_moments(view, self.horizon, sinks)
        x = jnp.where((position >= sinks)[:, :, None], x, numerics.MASKED)
        expected = jax.nn.softmax(x, axis=-1).mean(2)
        score = expected * jnp.linalg.norm(view.value_bksd.astype(jnp.float32), axis=-1)
        return jnp.where(position < sinks, jnp.inf, score)
