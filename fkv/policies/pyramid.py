"""PyramidKV: lower layers keep more, higher layers less."""

import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.policies.base import View, register, setting
from fkv.policies.wrapper import Wrapper


@register("pyramid")
class Pyramid(Wrapper):
    """A budget that falls linearly over the layers, B on average (arXiv 2406.02069).

    The last layer keeps `B / beta` entries (at least those that `policy` protects), the first `2 B`
    minus that. Shapes are fixed, so every layer allocates as many as the first: up to `2 B`.
    """

    beta: float = setting(kinds.number(1), 20.0)

    def _last(self, budget: int, protected: int) -> int:
        window = getattr(self.policy, "window", 1)  # what SnapKV and R-KV protect
        return min(budget, max(round(budget / self.beta), window, protected))

    def capacity(self, budget: int) -> int:
        return 2 * budget - self._last(budget, 0)

    def keep(self, view: View, importance_bks: Array) -> Array:
        protected = self.policy.protected(view) + view.protect_prompt
        last = self._last(view.budget, protected)
        first, steps = 2 * view.budget - last, view.config.layers - 1
        share = first - (first - last) * view.layer / steps if steps else view.budget
        return jnp.full(importance_bks.shape[:2], jnp.round(share).astype(jnp.int32))
