"""AdaKV: the heads of a layer share its budget by need."""

import flax.struct
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies.base import View, name_of, register
from fkv.policies.snapkv import SnapKV


@register("ada")
@flax.struct.dataclass
class Ada(SnapKV):
    """SnapKV whose heads compete for the layer's `K B` entries (arXiv 2407.11550).

    Each head is sure of its best `safeguard * B`; the rest goes to the most important entries of
    the layer, whichever head they are in, up to `room * B` a head: the shape is fixed, so that
    much memory is allocated.
    """

    safeguard: float = flax.struct.field(pytree_node=False, default=0.2)
    room: float = flax.struct.field(pytree_node=False, default=2.0)

    def __post_init__(self):
        super().__post_init__()
        kinds.check_fields(
            f"{name_of(self)}: ", self, safeguard=kinds.number(0, 1), room=kinds.number(1)
        )

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        super().check(config, cadence)
        most = max(config.kv_heads, 2)
        if self.room > most:
            raise UserError(
                f"{name_of(self)}: room = {self.room:g} must be at most {most}: the "
                f"{config.kv_heads} KV heads of a layer hold no more together"
            )

    def capacity(self, budget: int) -> int:
        return max(budget + 1, round(self.room * budget))

    def keep(self, view: View, importance_bks: Array) -> Array:
        b, k, s = importance_bks.shape
        best = -jnp.sort(-importance_bks, axis=-1)
        index = jnp.arange(s)[None, None]
        best = jnp.where(index < round(self.safeguard * view.budget), jnp.inf, best)
        best = jnp.where(index < view.capacity, best, -jnp.inf)
        best = jnp.where(jnp.isneginf(-jnp.sort(-importance_bks, axis=-1)), -jnp.inf, best)
        flat = best.reshape(b, k * s)
        rank = jnp.argsort(jnp.argsort(-flat, axis=-1), axis=-1).reshape(b, k, s)
        return ((rank < k * view.budget) & ~jnp.isneginf(best)).sum(-1).astype(jnp.int32)
