"""TOVA: what the newest query attends to."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.policies.base import Policy, View, register


@register("tova")
class TOVA(Policy):
    """Keeps what the last query attends to, mean over all heads (arXiv 2401.06104).

    All heads of a layer keep the same positions.
    """

    def score(self, view: View) -> Array:
        query, position = view.query_blhd[:, -1:], view.query_position_bl[:, -1:]
        seen = attention.visible(position, view.cache.position_bks)
        p = jax.nn.softmax(attention.logits(query, view.cache.key_bksd, seen), axis=-1)
        mean = p.mean((1, 2, 3))[:, None]
        return jnp.broadcast_to(mean, view.cache.position_bks.shape)

    def evict(self, view: View) -> Array:
        # Chosen once per layer, as heads may round the same mean differently.
        importance, position = self.importance(view)[:, :1], view.cache.position_bks
        slots = kv.choose(importance, position[:, :1], view.interval)
        return jnp.broadcast_to(slots, (*position.shape[:2], view.interval))
