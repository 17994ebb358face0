"""PyramidKV: lower layers keep more, higher layers less."""

import flax.struct
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.policies.base import View, name_of, register
from fkv.policies.snapkv import SnapKV


@register("pyramid")
@flax.struct.dataclass
class Pyramid(SnapKV):
    """SnapKV with a budget that falls linearly over the layers, B on average (arXiv 2406.02069).

    The last layer keeps `B / beta` entries (the window at least), the first `2 B` less that. The
    shape is fixed, so every layer has room for as many as the first: memory is up to `2 B`.
    """

    beta: float = flax.struct.field(pytree_node=False, default=20.0)

    def __post_init__(self):
        super().__post_init__()
        kinds.check_fields(f"{name_of(self)}: ", self, beta=kinds.number(1))

    def _last(self, budget: int) -> int:
        return min(budget, max(round(budget / self.beta), self.window))

    def capacity(self, budget: int) -> int:
        return 2 * budget - self._last(budget)

    def keep(self, view: View, importance_bks: Array) -> Array:
        last, first = self._last(view.budget), view.capacity
        steps = max(view.config.layers - 1, 1)
        share = first - (first - last) * view.layer / steps
        if view.config.layers == 1:
            share = view.budget
        return jnp.full(importance_bks.shape[:2], jnp.round(share).astype(jnp.int32))
