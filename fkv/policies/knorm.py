"""Knorm: keys with a small norm are important."""

import jax.numpy as jnp
from jax import Array

from fkv.policies.base import Policy, View, register


@register("knorm")
class Knorm(Policy):
    """Keeps the entries whose keys have the smallest L2 norm (arXiv 2406.11430)."""

    def score(self, view: View) -> Array:
        return -jnp.linalg.norm(view.key_bksd.astype(jnp.float32), axis=-1)
