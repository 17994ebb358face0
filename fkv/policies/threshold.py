"""A threshold: as many entries as pass it."""

import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import View, register, setting
from fkv.policies.wrapper import Wrapper


@register("threshold")
class Threshold(Wrapper):
    """Keeps the entries of which `policy` gives at least `at`, up to `room * B` per head.

    As `DMSPress` of kvpress does, for scores that mean the same in any cache. What is dropped is
    gone; what `policy` protects stays. Entries may go as soon as L tokens are held, and a head may
    hold far fewer than B. Shapes are fixed: B is the most that a head keeps at `room=1`, and memory
    is allocated for that (and one slot).

    Attributes:
      at: least importance that stays.
      room: the most entries of a head, as a multiple of B; beyond, the most important stay.
    """

    at: float = setting(kinds.number(-float("inf")), 0.0)
    room: float = setting(kinds.number(1), 1.0)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"room": max(config.kv_heads, 2)}

    def capacity(self, budget: int) -> int:
        return max(budget + 1, round(self.room * budget))

    def keep(self, view: View, importance_bks: Array) -> Array:
        most = round(self.room * view.budget)
        return jnp.minimum((importance_bks >= self.at).sum(-1), most).astype(jnp.int32)
