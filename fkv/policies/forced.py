"""Precomputed evictions, such as the golden ones."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies.base import STATISTICS, Policy, View, name_of, register, setting


@register("forced")
class Forced(Policy):
    """Drops the listed absolute positions.

    Attributes:
      position_yebkl: positions to drop per layer, eviction, row and head (`golden.Labels` stacked
        over layers); the first eviction is the one after `B + L` tokens. Evictions after the
        last one listed drop the lowest slots.
      statistics: those an observer needs, as in `Policy`.
    """

    position_yebkl: Array
    statistics: str | None = setting(STATISTICS, None)

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        x, where = self.position_yebkl, f"{name_of(self)}: position_yebkl"
        if not hasattr(x, "shape") or x.ndim != 5 or not jnp.issubdtype(x.dtype, jnp.integer):
            got = f"{x.dtype} {list(x.shape)}" if hasattr(x, "shape") else repr(x)
            raise UserError(
                f"{where} = {got} must be whole numbers "
                "[layers, evictions, batch, KV heads, interval]"
            )
        given, wanted = (
            f"{layers} layers, {heads} KV heads and interval = {interval}"
            for layers, heads, interval in (
                (x.shape[0], *x.shape[3:]),
                (config.layers, config.kv_heads, cadence.interval),
            )
        )
        if given != wanted:
            raise UserError(f"{where} is of {given}, the model of {wanted}")
        super().check(config, cadence)

    def score(self, view: View) -> Array:
        evictions, rows = self.position_yebkl.shape[:2]  # the engine took the layer axis
        position = view.cache.position_bks
        if not evictions:
            return jnp.zeros(position.shape)
        if rows != position.shape[0]:
            raise UserError(
                f"{name_of(self)}: position_yebkl lists a batch of {rows}, this one has "
                f"{position.shape[0]} rows"
            )
        event = view.chunk - view.cadence.fill_chunks
        index = jnp.clip(event, 0, evictions - 1)
        drop = jax.lax.dynamic_index_in_dim(self.position_yebkl, index, axis=0, keepdims=False)
        listed = (position[..., :, None] == drop[..., None, :]).any(-1)
        return jnp.where(listed & (event >= 0) & (event < evictions), -1.0, 0.0)
