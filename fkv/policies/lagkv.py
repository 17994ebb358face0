"""LagKV: entries that stand out from those that follow them."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View, register, setting


def lag_scores(x_bkpld: Array) -> Array:
    """Scores of the entries in all partitions but the last, [b, k, p - 1, l].

    Every channel is scaled by its range over the next partition; the score is the standard
    deviation over channels, softmax over the partition.
    """
    low = x_bkpld[:, :, 1:].min(3, keepdims=True)
    high = x_bkpld[:, :, 1:].max(3, keepdims=True)
    scaled = (x_bkpld[:, :, :-1] - low) / jnp.maximum(high - low, 1e-6)
    return jax.nn.softmax(scaled.std(-1, ddof=1), axis=-1)


@register("lagkv")
class LagKV(Policy):
    """Keeps the entries of each partition least like the next partition (arXiv 2504.04704).

    The entries held, in order of position and without the first `sinks`, are cut into partitions
    of `lag`; the last complete one and what follows it are kept. Entries compete by their rank
    within their partition, so that all partitions lose equally many; of equal ranks the older goes
    first.

    Attributes:
      lag: size of a partition; 0 for the interval.
    """

    sinks: int = setting(kinds.whole(0), 4)
    lag: int = setting(kinds.whole(0), 0)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        most = cadence.budget - cadence.interval
        two_partitions = (cadence.slots - min(self.sinks, most)) // 2
        return {"sinks": most, "lag": two_partitions}

    def score(self, view: View) -> Array:
        cache, slots = view.cache, view.cache.position_bks.shape[-1]
        lag = self.lag or view.interval
        sinks = min(self.sinks, view.budget - view.interval)
        empty = cache.position_bks < 0
        order = jnp.argsort(jnp.where(empty, jnp.iinfo(jnp.int32).max, cache.position_bks), axis=-1)
        partitions = -(-(slots - sinks) // lag)
        pad = partitions * lag - (slots - sinks)

        def split(x):
            x = jnp.take_along_axis(x, order[..., None], axis=2)[:, :, sinks:]
            x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, pad), (0, 0)))
            return x.reshape(*x.shape[:2], partitions, lag, -1)

        score = (lag_scores(split(view.key_bksd)) + lag_scores(split(view.value_bksd))) / 2
        rank = jnp.argsort(jnp.argsort(score, axis=-1), axis=-1).astype(jnp.float32)
        rank = rank.reshape(*rank.shape[:2], -1)
        index = jnp.arange(slots)[None, None]
        held = (~empty).sum(-1, keepdims=True)
        complete = (held - sinks) // lag
        compete = (index >= sinks) & (index < sinks + (complete - 1) * lag)
        pads = ((0, 0), (0, 0), (sinks, slots - sinks - rank.shape[-1]))
        rank = jnp.pad(rank, pads, constant_values=jnp.inf)
        # If fewer compete than must be dropped, the oldest of the rest follow, and sinks go last.
        rest = jnp.where(index < sinks, slots, lag) + index / slots
        importance = jnp.where(compete, rank + index / slots, rest.astype(jnp.float32))
        return jnp.take_along_axis(importance, jnp.argsort(order, axis=-1), axis=-1)
