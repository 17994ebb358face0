"""StreamingLLM: attention sinks and the newest tokens."""

import flax.struct
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View, check_sinks, name_of, register


@register("streaming_llm")
@flax.struct.dataclass
class StreamingLLM(Policy):
    """Keeps the first `sinks` positions and the newest `B - sinks` (arXiv 2309.17453).

    The default gives way where fewer fit beside the newest `L`, with every policy that has sinks.
    """

    sinks: int = flax.struct.field(pytree_node=False, default=4)

    def __post_init__(self):
        kinds.check_fields(f"{name_of(self)}: ", self, sinks=kinds.whole(0))

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        super().check(config, cadence)
        check_sinks(self, cadence)

    def score(self, view: View) -> Array:
        position = view.cache.position_bks
        sinks = min(self.sinks, view.budget - view.interval)
        return jnp.where(position < sinks, jnp.inf, position.astype(jnp.float32))
