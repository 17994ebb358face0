"""VaSE: values of large magnitude stay, and eviction is random."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache import attention
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.models.numerics import einsum_f32
from fkv.policies.base import Policy, View, register, row_by_row, setting
from fkv.policies.snapkv import ODD, by_position, mean_pool, widest


def later_attention(view: View) -> Array:
    """Attention of the last L queries on the entries before the newest L, [b, k, s].

    Softmax over these entries alone; mean over the queries except padding, and over the group.
    """

    def one(view):
        slots = view.cache.position_bks.shape[-1]
        before = (jnp.arange(slots) < view.capacity)[None, None, None]
        at = view.query_position_bl
        seen = attention.visible(at, view.cache.position_bks) & before
        x = attention.logits(view.query_blhd, view.cache.key_bksd, seen)
        p = jnp.where(seen[:, :, None], jax.nn.softmax(x, axis=-1), 0.0).mean(2).sum(2)
        return p / jnp.maximum((at >= 0).sum(-1), 1)[:, None, None]

    heads = view.query_blhd.shape[2]
    return row_by_row(one, view, 4 * heads * view.interval * view.cache.position_bks.shape[-1])


@register("vase")
class VaSE(Policy):
    """Keeps values of large range, and draws the rest by attention (VaSE-AttnV, arXiv 2606.03928).

    Of the entries before the newest L, `large * B` stay: the first `sinks` positions, then those
    with the largest `max(v) - min(v)` over channels. The others are drawn without replacement, with
    probabilities in proportion to `later_attention`, mean-pooled over `kernel` neighbours. The draw
    depends only on the row's key. The released code (mode `range_sink_sample_attn`, with a buffer
    of 64 tokens for our L, and B / 4 large values) pools over slots of its cache as they lie, this
    over positions; it never evicts while it reads the prompt.
    """

    large: float = setting(kinds.number(0, 1), 0.25)
    sinks: int = setting(kinds.whole(0), 4)
    kernel: int = setting(ODD, 5)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {
            "large": 1 - cadence.interval / cadence.budget,
            "sinks": cadence.budget - cadence.interval,
            "kernel": widest(cadence.slots),
        }

    def score(self, view: View) -> Array:
        position = view.cache.position_bks
        _b, k, s = position.shape
        candidate = (position >= 0) & (jnp.arange(s) < view.capacity)[None, None]
        most = view.budget - view.interval
        value = view.value_bksd.astype(jnp.float32)
        spread = jnp.where(candidate, value.max(-1) - value.min(-1), -jnp.inf)
        spread = jnp.where(candidate & (position < min(self.sinks, most)), jnp.inf, spread)
        rank = jnp.argsort(jnp.argsort(-spread, axis=-1), axis=-1)
        large = candidate & (rank < min(round(self.large * view.budget), most))
        order, inverse = by_position(position)
        weight = jnp.take_along_axis(later_attention(view), order, axis=-1)
        weight = mean_pool(weight, min(self.kernel, widest(s)))
        weight = jnp.take_along_axis(weight, inverse, axis=-1)
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (k, s)))(view.random_b)
        drawn = jnp.log(weight) + gumbel  # Gumbel top-k
        # Finite, so that protected prompts come first.
        return jnp.where(large, 1e6 + (s - rank).astype(jnp.float32), drawn)


@register("vase_dkv")
class VaSEDKV(Policy):
    """Keeps what random projections of keys and values rate high (VaSE-DKV, arXiv 2606.03928).

    Importance is |k G|^2 |v G|^2, with the rotated key, and G [d, rank] drawn from a normal of
    variance 1 / rank at every eviction, one for the heads of a row. The first `sinks` positions
    stay. As the released code does in its mode `cur_resample_gauss`, whose rank is 20.
    """

    rank: int = setting(kinds.whole(1, 2**16), 20)
    sinks: int = setting(kinds.whole(0), 4)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"sinks": cadence.budget - cadence.interval}

    def score(self, view: View) -> Array:
        position, key, value = view.cache.position_bks, view.key_bksd, view.value_bksd
        shape = (key.shape[-1], self.rank)
        draw = jax.vmap(lambda key: jax.random.normal(key, shape))(view.random_b)
        draw = draw / self.rank**0.5

        def energy(x):
            x = einsum_f32("bksd,bdr->bksr", x.astype(jnp.float32), draw)
            return (x * x).sum(-1)

        sinks = min(self.sinks, view.budget - view.interval)
        return jnp.where(position < sinks, jnp.inf, energy(key) * energy(value))
