"""KeyDiff: distinctive keys are important."""

import jax.numpy as jnp
from jax import Array

from fkv.policies.base import Policy, View, register


@register("keydiff")
class KeyDiff(Policy):
    """Keeps the keys least similar to the mean of all normalised keys held (arXiv 2504.15364)."""

    def score(self, view: View) -> Array:
        held = (view.cache.position_bks >= 0)[..., None]
        key = view.key_bksd.astype(jnp.float32)
        key = key / jnp.maximum(jnp.linalg.norm(key, axis=-1, keepdims=True), 1e-12)
        anchor = jnp.where(held, key, 0.0).sum(-2, keepdims=True)
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -(key * anchor).sum(-1)
