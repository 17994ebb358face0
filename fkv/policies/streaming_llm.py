"""StreamingLLM: attention sinks and the newest tokens."""

import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View, register, setting


@register("streaming_llm")
class StreamingLLM(Policy):
    """Keeps the first `sinks` positions and the newest `B - sinks` (arXiv 2309.17453)."""

    sinks: int = setting(kinds.whole(0), 4)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"sinks": cadence.budget - cadence.interval}

    def score(self, view: View) -> Array:
        position = view.cache.position_bks
        sinks = min(self.sinks, view.budget - view.interval)
        return jnp.where(position < sinks, jnp.inf, position.astype(jnp.float32))
