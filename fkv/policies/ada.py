"""AdaKV: the heads of a layer compete for its budget."""

import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View, register, setting
from fkv.policies.pyramid import Pyramid
from fkv.policies.wrapper import Wrapper


@register("ada")
class Ada(Wrapper):
    """Heads compete for the layer's `K B` entries by the scores of `policy` (arXiv 2407.11550).

    Each head keeps its best `safeguard * B`; the rest goes to the most important entries of the
    layer, whichever head they are in, up to `room * B` per head: shapes are fixed, so that much
    memory is allocated. Around `pyramid`, B is the layer's budget.
    """

    safeguard: float = setting(kinds.number(0, 1), 0.2)
    room: float = setting(kinds.number(1), 2.0)

    def fits(self, policy: Policy) -> bool:
        return super().fits(policy) or isinstance(policy, Pyramid)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"room": max(config.kv_heads, 2)}  # all of the layer's budget

    def _most(self, budget: int) -> int:
        return round(self.room * self.policy.capacity(budget))

    def capacity(self, budget: int) -> int:
        return max(budget + 1, self._most(budget))

    def keep(self, view: View, importance_bks: Array) -> Array:
        even_bk = self.policy.keep(view, importance_bks)
        b, k, s = importance_bks.shape
        slot = jnp.arange(s)[None, None]
        best = -jnp.sort(-importance_bks, axis=-1)
        none = jnp.isneginf(best) | (slot >= min(view.capacity, self._most(view.budget)))
        best = jnp.where(slot < jnp.round(self.safeguard * even_bk)[..., None], jnp.inf, best)
        best = jnp.where(none, -jnp.inf, best)
        rank = jnp.argsort(jnp.argsort(-best.reshape(b, k * s), axis=-1), axis=-1)
        kept = rank.reshape(b, k, s) < even_bk.sum(-1)[:, None, None]
        return (kept & ~none).sum(-1).astype(jnp.int32)
