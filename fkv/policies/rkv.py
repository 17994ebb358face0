"""R-KV: importance against redundancy."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import attention
from fkv.policies.base import Policy, View, by_position, register
from fkv.policies.snapkv import pooled_attention

# Keys compared with all others at once: their similarities stay in a processor's cache, and no
# S x S matrix is ever held (three times faster on a CPU).
_BLOCK = 128


def redundancy(threshold: float, key_bksd: Array, position_bks: Array) -> Array:
    """How much each key repeats the others, [b, k, s]; sums to one over the slots.

    Cosine similarities with the diagonal at zero; in each row the newest key more similar than
    the threshold is spared (the oldest where there is none); mean over rows, softmax over slots.
    """
    # In the order of positions, empty slots first: the newest is what has the largest index.
    order, inverse = by_position(position_bks)
    held = jnp.take_along_axis(position_bks, order, axis=-1) >= 0
    key = jnp.take_along_axis(key_bksd.astype(jnp.float32), order[..., None], axis=-2)
    key = key / (jnp.linalg.norm(key, axis=-1, keepdims=True) + 1e-8)
    key = jnp.where(held[..., None], key, 0.0)  # similar to nothing
    slots = key.shape[-2]
    index = jnp.arange(slots)
    block = min(_BLOCK, slots)
    rows = jnp.pad(key, ((0, 0), (0, 0), (0, -slots % block), (0, 0)))

    def newer(newest, start):
        some = jax.lax.dynamic_slice_in_dim(rows, start, block, 2)
        row = start + jnp.arange(block)[:, None]
        alike = jnp.einsum("bkid,bkjd->bkij", some, key) > threshold
        alike &= (row != index[None])[None, None]
        return jnp.maximum(newest, jnp.where(alike, row[None, None], -1).max(-2)), None

    none = jnp.full(held.shape, -1)
    newest, _ = jax.lax.scan(newer, none, jnp.arange(0, slots, block))
    number = held.sum(-1, keepdims=True)
    spared = jnp.where(newest < 0, jnp.minimum(slots - number, slots - 1), newest)
    # The sum over rows of all similarities is a key's product with the sum of all keys; what is
    # spared is one similarity of each row.
    value = (key * jnp.take_along_axis(key, spared[..., None], axis=-2)).sum(-1)
    value = jnp.where(spared == index[None, None], 0.0, value)
    less = jax.vmap(jax.vmap(lambda at, x: jnp.zeros(slots).at[at].add(x)))(spared, value)
    total = (key * (key.sum(-2, keepdims=True) - key)).sum(-1)
    mean = (total - less) / jnp.maximum(number, 1)
    share = jax.nn.softmax(jnp.where(held, mean, -jnp.inf), axis=-1)
    return jnp.take_along_axis(share, inverse, axis=-1)


@register("rkv")
@flax.struct.dataclass
class RKV(Policy):
    """Keeps large `mix * importance - (1 - mix) * redundancy` (arXiv 2505.24133).

    Importance is SnapKV's pooled attention; the last `window` entries stay.
    """

    mix: float = flax.struct.field(pytree_node=False, default=0.1)
    window: int = flax.struct.field(pytree_node=False, default=8)
    kernel: int = flax.struct.field(pytree_node=False, default=7)
    threshold: float = flax.struct.field(pytree_node=False, default=0.5)

    def protected(self, view: View) -> int:
        return min(self.window, view.interval)

    def score(self, view: View) -> Array:
        importance = pooled_attention(view, self.protected(view), self.kernel)
        repeats = attention.row_by_row(
            functools.partial(redundancy, self.threshold), view.key_bksd, view.cache.position_bks
        )
        return self.mix * importance - (1 - self.mix) * repeats
