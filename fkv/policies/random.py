"""Uniformly random eviction."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View, register, setting


@register("random")
class Random(Policy):
    """Keeps the first `sinks` positions and of the rest a uniform sample.

    The sample depends only on the row's key. With sinks it is the floor that other policies have to
    beat (arXiv 2609.03430): without, it loses the first positions, which most heads attend to.
    """

    sinks: int = setting(kinds.whole(0), 0)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"sinks": cadence.budget - cadence.interval}

    def score(self, view: View) -> Array:
        position = view.cache.position_bks
        shape = position.shape[1:]
        drawn = jax.vmap(lambda key: jax.random.uniform(key, shape))(view.random_b)
        return jnp.where(position < self.sinks, jnp.inf, drawn) if self.sinks else drawn
