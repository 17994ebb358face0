"""ForesightKV: the trained scorers choose."""

import flax.struct
import jax.numpy as jnp
from jax import Array

from fkv import scorer
from fkv.policies.base import Policy, View, register


@register("foresight")
@flax.struct.dataclass
class Foresight(Policy):
    """Drops the candidates to which the scorers give the least importance (arXiv 2602.03203).

    Attributes:
      params: scorer parameters of all layers, stacked.
      config: what the scorers are made of.
    """

    params: dict
    config: scorer.ScorerConfig = flax.struct.field(pytree_node=False)

    @property
    def statistics(self) -> str | None:
        return self.config.statistics

    def score(self, view: View) -> Array:
        importance = scorer.apply(self.config, self.params, scorer.features(self.config, view))
        return jnp.pad(importance, ((0, 0), (0, 0), (0, view.interval)))
