"""StreamingLLM: attention sinks and the newest tokens."""

import flax.struct
import jax.numpy as jnp
from jax import Array

from fkv.policies.base import Policy, View, register


@register("streaming_llm")
@flax.struct.dataclass
class StreamingLLM(Policy):
    """Keeps the first `sinks` positions and the newest `B - sinks` (arXiv 2309.17453)."""

    sinks: int = flax.struct.field(pytree_node=False, default=4)

    def score(self, view: View) -> Array:
        position = view.cache.position_bks
        return jnp.where(position < self.sinks, jnp.inf, position.astype(jnp.float32))
