"""SnapKV: what the newest queries attend to, pooled along the sequence."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache import attention
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.policies.base import (
    Policy,
    View,
    by_position,
    is_default,
    max_pool,
    name_of,
    register,
)


def window_attention(view: View, window: int) -> Array:
    """Attention of the last `window` queries on the entries before them, [b, k, s].

    The max over the group's heads is taken before the softmax, the softmax over the keys before
    the window alone; the mean over the window's queries, padding aside. Zero inside the window.
    """
    slots = view.cache.position_bks.shape[-1]
    before = (jnp.arange(slots) < slots - window)[None, None, None]
    query, position = view.query_blhd[:, -window:], view.query_position_bl[:, -window:]
    seen = attention.visible(position, view.cache.position_bks) & before
    x = attention.logits(query, view.cache.key_bksd, seen).max(2)  # [b, k, q, s]
    number = jnp.maximum((position >= 0).sum(-1), 1)[:, None, None]
    return jnp.where(seen, jax.nn.softmax(x, axis=-1), 0.0).sum(2) / number


def pooled_attention(view: View, window: int, kernel: int) -> Array:
    """`window_attention`, max-pooled over neighbours in the order of positions, [b, k, s]."""
    score = window_attention(view, window)
    kernel = min(kernel, widest(score.shape[-1]))
    order, inverse = by_position(view.cache.position_bks)
    score = max_pool(jnp.take_along_axis(score, order, axis=-1), kernel)
    return jnp.take_along_axis(score, inverse, axis=-1)


ODD = kinds.Kind(
    "an odd whole number of at least 1", lambda value: kinds.whole(1).fits(value) and value % 2 == 1
)


def widest(slots: int) -> int:
    """The largest kernel that does not pool over all slots wherever it is."""
    return 2 * slots - 3


def check_kernel(policy: Policy, cadence: Cadence) -> None:
    """Refuses a kernel that would make all slots as important, unless nobody asked for it."""
    slots = policy.capacity(cadence.budget) + cadence.interval
    if policy.kernel > widest(slots) and not is_default(policy, "kernel"):
        raise UserError(
            f"{name_of(policy)}: kernel = {policy.kernel} must be at most {widest(slots)}, "
            f"as it pools over {slots} slots"
        )


@register("snapkv")
@flax.struct.dataclass
class SnapKV(Policy):
    """Keeps the entries that the last `window` queries attend to, and the window itself.

    arXiv 2404.14469, compressing at every eviction.
    """

    window: int = flax.struct.field(pytree_node=False, default=8)
    kernel: int = flax.struct.field(pytree_node=False, default=7)

    def __post_init__(self):
        kinds.check_fields(f"{name_of(self)}: ", self, window=kinds.whole(1), kernel=ODD)

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        super().check(config, cadence)
        check_kernel(self, cadence)

    def protected(self, view: View) -> int:
        return min(self.window, view.interval)

    def score(self, view: View) -> Array:
        return pooled_attention(view, self.protected(view), self.kernel)
