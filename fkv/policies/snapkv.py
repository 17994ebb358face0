"""SnapKV: attention of the newest queries, pooled along the sequence."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.cache import attention
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View, register, setting

ODD = kinds.Kind(
    "an odd whole number of at least 1", lambda value: kinds.whole(1).fits(value) and value % 2 == 1
)


def window_attention(view: View, window: int, mean: bool = False) -> Array:
    """Attention of the last `window` queries on the entries before them, [b, k, s].

    Max over the group's heads before the softmax, which is over the keys before the window; mean
    over the window's queries except padding. Zero inside the window.

    Args:
      mean: over the group's heads after the softmax, which is over all keys.
    """
    slots = view.cache.position_bks.shape[-1]
    before = (jnp.arange(slots) < slots - window)[None, None, None]
    query, position = view.query_blhd[:, -window:], view.query_position_bl[:, -window:]
    number = jnp.maximum((position >= 0).sum(-1), 1)[:, None, None]
    seen = attention.visible(position, view.cache.position_bks)
    if mean:
        x = attention.logits(query, view.cache.key_bksd, seen)
        p = jnp.where(seen[:, :, None], jax.nn.softmax(x, axis=-1), 0.0).mean(2)
        return jnp.where(before, p, 0.0).sum(2) / number
    seen &= before
    x = attention.logits(query, view.cache.key_bksd, seen).max(2)  # [b, k, q, s]
    return jnp.where(seen, jax.nn.softmax(x, axis=-1), 0.0).sum(2) / number


def pooled_attention(view: View, window: int, kernel: int, mean: bool = False) -> Array:
    """`window_attention`, pooled over neighbouring positions, [b, k, s].

    Args:
      mean: that of `window_attention`; and means are pooled, not maxima.
    """
    score = window_attention(view, window, mean)
    kernel = min(kernel, widest(score.shape[-1]))
    order, inverse = by_position(view.cache.position_bks)
    pool = mean_pool if mean else max_pool
    score = pool(jnp.take_along_axis(score, order, axis=-1), kernel)
    return jnp.take_along_axis(score, inverse, axis=-1)


def widest(slots: int) -> int:
    """The largest kernel that does not always pool over all slots."""
    return 2 * slots - 3


def by_position(position_bks: Array) -> tuple[Array, Array]:
    """The permutation that sorts slots by position, and its inverse, [b, k, s] each."""
    order = jnp.argsort(position_bks, axis=-1)
    slot = jnp.arange(order.shape[-1])

    def inverse(order):  # takes half the time of another sort
        return jnp.zeros_like(order).at[order].set(slot, unique_indices=True)

    return order, jax.vmap(jax.vmap(inverse))(order)


def max_pool(x_bks: Array, kernel: int) -> Array:
    """Max over a centred window of `kernel` (odd) along the last axis, same length."""
    window, side = (1, 1, kernel), (kernel // 2, kernel // 2)
    pads = ((0, 0), (0, 0), side)
    return jax.lax.reduce_window(x_bks, -jnp.inf, jax.lax.max, window, (1, 1, 1), pads)


def mean_pool(x_bks: Array, kernel: int) -> Array:
    """Mean over a centred window of `kernel` (odd) along the last axis; zeros beyond the ends."""
    window, side = (1, 1, kernel), (kernel // 2, kernel // 2)
    pads = ((0, 0), (0, 0), side)
    return jax.lax.reduce_window(x_bks, 0.0, jax.lax.add, window, (1, 1, 1), pads) / kernel


@register("snapkv")
class SnapKV(Policy):
    """Keeps what the last `window` queries attend to, and the window itself (arXiv 2404.14469).

    Attributes:
      mean: means over a group's heads and over neighbours, where there are maxima otherwise, and a
        softmax over all keys: `SnapKVPress` of kvpress, by default with a window of 64 and a kernel
        of 5.
    """

    window: int = setting(kinds.whole(1), 8)
    kernel: int = setting(ODD, 7)
    mean: bool = setting(kinds.SWITCH, False)

    def limits(self, config: ModelConfig, cadence: Cadence) -> dict[str, float]:
        return {"kernel": widest(cadence.slots)}

    def protected(self, view: View) -> int:
        return min(self.window, view.interval)

    def score(self, view: View) -> Array:
        return pooled_attention(view, self.protected(view), self.kernel, self.mean)
