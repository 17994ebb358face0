"""Uniformly random eviction."""

import jax
from jax import Array

from fkv.policies.base import Policy, View, register


@register("random")
class Random(Policy):
    """Keeps a uniform sample, which depends only on the row's key."""

    def score(self, view: View) -> Array:
        shape = view.cache.position_bks.shape[1:]
        return jax.vmap(lambda key: jax.random.uniform(key, shape))(view.random_b)
