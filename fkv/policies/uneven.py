"""Budgets of one's own for every layer and KV head."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies.base import View, name_of, register, setting
from fkv.policies.wrapper import Wrapper


@register("uneven")
class Uneven(Wrapper):
    """Each KV head keeps a budget of its own of what `policy` scores highest.

    `launch.advise` finds such budgets. Shapes are fixed, so every head allocates `most`; a head
    evicts from when it holds more than its own budget, whatever the cadence's is.

    Attributes:
      budget_yk: entries that each head keeps after an eviction, whole numbers [layers, KV heads],
        larger than the interval, with room for it beside a protected prompt.
      most: at least the largest of them.
    """

    budget_yk: Array = flax.struct.field(kw_only=True)
    most: int = setting(kinds.whole(1), 1)

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        x, wanted = self.budget_yk, (config.layers, config.kv_heads)
        if not (hasattr(x, "shape") and x.shape == wanted and jnp.issubdtype(x.dtype, jnp.integer)):
            given = f"{x.dtype} {list(x.shape)}" if hasattr(x, "shape") else kinds.said(x)
            raise UserError(
                f"{name_of(self)}: budget_yk is {given}, but must be whole numbers "
                f"{list(wanted)}, [layers, KV heads]"
            )
        super().check(config, cadence)
        if isinstance(x, np.ndarray | Array) and not isinstance(x, jax.core.Tracer):
            self._check_values(np.asarray(x), cadence)

    def _check_values(self, budget_yk: np.ndarray, cadence: Cadence) -> None:
        """Refuses budgets that an eviction would silently cut."""
        interval, prompt = cadence.interval, cadence.protect_prompt
        least = interval + max(prompt, 1)
        wrong_yk = (budget_yk < least) | (budget_yk > self.most)
        if not wrong_yk.any():
            return
        layer, head = np.argwhere(wrong_yk)[0].tolist()
        value = int(budget_yk[layer, head])
        given = f"{name_of(self)}: budget_yk[{layer}, {head}] = {value}"
        if value < least:
            beside = f" and protect_prompt = {prompt}" if prompt else ""
            raise UserError(
                f"{given} must be at least {least} at interval = {interval}{beside}: raise it, or "
                "evict more often"
            )
        raise UserError(
            f"{given} is more than most = {self.most}, for which memory is allocated: give "
            f"most={int(budget_yk.max())}"
        )

    def capacity(self, budget: int) -> int:
        return max(self.most, budget + 1)

    def keep(self, view: View, importance_bks: Array) -> Array:
        lead = importance_bks.shape[:2]
        return jnp.broadcast_to(self.budget_yk[None].astype(jnp.int32), lead)  # of this layer
