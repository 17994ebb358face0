"""Evictions given beforehand, such as the golden ones."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv.policies.base import Policy, View, register


@register("forced")
@flax.struct.dataclass
class Forced(Policy):
    """Drops the listed absolute positions.

    Attributes:
      position_yebkl: positions to drop per layer, eviction, row and head (`golden.Labels` stacked
        over layers); the first eviction is the one after `B + L` tokens. After the last one
        listed, the lowest slots go.
      statistics: what an observer wants to see, as in `Policy`.
    """

    position_yebkl: Array
    statistics: str | None = flax.struct.field(pytree_node=False, default=None)

    def score(self, view: View) -> Array:
        evictions = self.position_yebkl.shape[0]  # the engine took the layer axis
        position = view.cache.position_bks
        if not evictions:
            return jnp.zeros(position.shape)
        event = view.chunk - view.budget // view.interval
        index = jnp.clip(event, 0, evictions - 1)
        drop = jax.lax.dynamic_index_in_dim(self.position_yebkl, index, axis=0, keepdims=False)
        listed = (position[..., :, None] == drop[..., None, :]).any(-1)
        return jnp.where(listed & (event >= 0) & (event < evictions), -1.0, 0.0)
