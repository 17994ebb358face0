"""R-KV: importance traded off against redundancy."""

import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds
from fkv.models.numerics import einsum_f32
from fkv.policies.base import View, register, row_by_row, setting
from fkv.policies.snapkv import SnapKV, by_position

# Keys compared with all others at a time: their similarities fit into a CPU's cache, and no S x S
# matrix is held (three times faster on a CPU).
_BLOCK = 128


def redundancy(threshold: float, key_bksd: Array, position_bks: Array) -> Array:
    """Redundancy of each key with the others, [b, k, s]; sums to one over the slots.

    Cosine similarities with a zero diagonal; in each row the newest key more similar than the
    threshold is spared (the oldest if there is none); mean over rows, softmax over slots.
    """
    order, age = by_position(position_bks)  # grows with the position; empty slots come first
    held = position_bks >= 0
    key = key_bksd.astype(jnp.float32)
    norm = jnp.linalg.norm(key, axis=-1)
    key = jnp.where(held[..., None], key / (norm[..., None] + 1e-8), 0.0)  # 0 if empty
    slots = key.shape[-2]
    index = jnp.arange(slots)
    block = min(_BLOCK, slots)
    after = -slots % block
    rows = jnp.pad(key, ((0, 0), (0, 0), (0, after), (0, 0)))
    ages = jnp.pad(jnp.where(held, age, -1), ((0, 0), (0, 0), (0, after)), constant_values=-1)

    def newer(best, start):
        some = jax.lax.dynamic_slice_in_dim(rows, start, block, 2)
        some_age = jax.lax.dynamic_slice_in_dim(ages, start, block, 2)
        similarity = einsum_f32("bkid,bkjd->bkij", some, key)
        other = (start + jnp.arange(block))[:, None] != index[None]
        alike = (similarity > threshold) & other[None, None]
        newest = jnp.where(alike, some_age[..., None], -1).max(-2)
        row = jnp.take_along_axis(order, newest, axis=-1, mode="clip") - start
        row = jnp.clip(row, 0, block - 1)
        value = jnp.take_along_axis(similarity, row[:, :, None], axis=-2)[:, :, 0]
        found = newest > best[0]
        return (jnp.where(found, newest, best[0]), jnp.where(found, value, best[1])), None

    none = (jnp.full(held.shape, -1), jnp.zeros(held.shape))
    (newest, value), _ = jax.lax.scan(newer, none, jnp.arange(0, slots, block))
    number = held.sum(-1, keepdims=True)
    first = jnp.take_along_axis(order, jnp.minimum(slots - number, slots - 1), axis=-1)
    oldest = jnp.take_along_axis(key, first[..., None], axis=-2)[:, :, 0]
    spared = jnp.where(newest < 0, first, jnp.take_along_axis(order, newest, -1, mode="clip"))
    value = jnp.where(newest < 0, einsum_f32("bkid,bkd->bki", key, oldest), value)
    value = jnp.where(spared == index[None, None], 0.0, value)
    less = jax.vmap(jax.vmap(lambda at, x: jnp.zeros(slots).at[at].add(x)))(spared, value)
    # A key's similarities sum to its product with the sum of all keys, minus that with itself and
    # those spared, one in each row.
    own = jnp.where(held, norm / (norm + 1e-8), 0.0) ** 2
    total = einsum_f32("bkid,bkd->bki", key, key.sum(-2)) - own
    mean = (total - less) / jnp.maximum(number, 1)
    return jax.nn.softmax(jnp.where(held, mean, -jnp.inf), axis=-1)


@register("rkv")
class RKV(SnapKV):
    """Keeps the largest `mix * importance - (1 - mix) * redundancy` (arXiv 2505.24133).

    Importance is SnapKV's pooled attention; the last `window` entries are kept.
    """

    mix: float = setting(kinds.number(0, 1), 0.1)
    threshold: float = setting(kinds.number(-1, 1), 0.5)

    def score(self, view: View) -> Array:
        def one(view):
            repeats = redundancy(self.threshold, view.key_bksd, view.cache.position_bks)
            return self.mix * SnapKV.score(self, view) - (1 - self.mix) * repeats

        _, heads, slots = view.cache.position_bks.shape
        return row_by_row(one, view, 8 * heads * min(_BLOCK, slots) * slots)
