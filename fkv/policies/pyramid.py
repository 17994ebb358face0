"""PyramidKV: lower layers keep more, higher layers less."""

import flax.struct
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.policies.base import View, name_of, register
from fkv.policies.wrapper import Wrapper


@register("pyramid")
@flax.struct.dataclass
class Pyramid(Wrapper):
    """A budget that falls linearly over the layers, B on average (arXiv 2406.02069).

    The last layer keeps `B / beta` entries (what `policy` protects at least), the first `2 B` less
    that. The shape is fixed, so every layer has room for as many as the first: up to `2 B`.
    """

    beta: float = flax.struct.field(pytree_node=False, default=20.0)

    def __post_init__(self):
        super().__post_init__()
        kinds.check_fields(f"{name_of(self)}: ", self, beta=kinds.number(1))

    def _last(self, budget: int, protected: int) -> int:
        window = getattr(self.policy, "window", 1)  # what SnapKV and R-KV protect
        return min(budget, max(round(budget / self.beta), window, protected))

    def capacity(self, budget: int) -> int:
        return 2 * budget - self._last(budget, 0)

    def keep(self, view: View, importance_bks: Array) -> Array:
        last = self._last(view.budget, self.policy.protected(view))
        first = 2 * view.budget - last
        steps = max(view.config.layers - 1, 1)
        share = first - (first - last) * view.layer / steps
        if view.config.layers == 1:
            share = view.budget
        return jnp.full(importance_bks.shape[:2], jnp.round(share).astype(jnp.int32))
