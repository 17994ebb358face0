"""Evictions given beforehand, such as the golden ones."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies.base import STATISTICS, Policy, View, name_of, register

_NONE_OR_FORM = kinds.Kind(
    f"None or one of {', '.join(STATISTICS[1:])}", lambda value: value in STATISTICS
)


@register("forced")
@flax.struct.dataclass
class Forced(Policy):
    """Drops the listed absolute positions.

    Attributes:
      position_yebkl: positions to drop per layer, eviction, row and head (`golden.Labels` stacked
        over layers); the first eviction is the one after `B + L` tokens. After the last one
        listed, the lowest slots go.
      statistics: what an observer wants to see, as in `Policy`.
    """

    position_yebkl: Array
    statistics: str | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self):
        kinds.check_fields(f"{name_of(self)}: ", self, statistics=_NONE_OR_FORM)

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        x = self.position_yebkl
        if not hasattr(x, "shape") or x.ndim != 5 or not jnp.issubdtype(x.dtype, jnp.integer):
            got = f"{x.dtype} {list(x.shape)}" if hasattr(x, "shape") else repr(x)
            raise UserError(
                f"{name_of(self)}: position_yebkl = {got} must be whole numbers "
                "[layers, evictions, batch, KV heads, interval]"
            )
        layers, _, _, heads, dropped = x.shape
        interval = cadence.interval
        if (layers, heads, dropped) != (config.layers, config.kv_heads, interval):
            raise UserError(
                f"{name_of(self)}: position_yebkl is of {layers} layers, {heads} KV heads and "
                f"interval = {dropped}, the model of {config.layers} layers and {config.kv_heads} "
                f"KV heads, at interval = {interval}"
            )
        super().check(config, cadence)

    def score(self, view: View) -> Array:
        evictions = self.position_yebkl.shape[0]  # the engine took the layer axis
        position = view.cache.position_bks
        if not evictions:
            return jnp.zeros(position.shape)
        event = view.chunk - view.budget // view.interval
        index = jnp.clip(event, 0, evictions - 1)
        rows = self.position_yebkl.shape[1]
        if rows != position.shape[0]:
            raise UserError(
                f"{name_of(self)}: position_yebkl lists a batch of {rows}, this one has "
                f"{position.shape[0]} rows"
            )
        drop = jax.lax.dynamic_index_in_dim(self.position_yebkl, index, axis=0, keepdims=False)
        listed = (position[..., :, None] == drop[..., None, :]).any(-1)
        return jnp.where(listed & (event >= 0) & (event < evictions), -1.0, 0.0)
