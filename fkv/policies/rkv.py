"""R-KV: importance against redundancy."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv.policies.base import Policy, View, register
from fkv.policies.snapkv import pooled_attention


def redundancy(key_bksd: Array, position_bks: Array, threshold: float) -> Array:
    """How much each key repeats the others, [b, k, s]; sums to one over the slots.

    Cosine similarities with the diagonal at zero; in each row the newest key more similar than
    the threshold is spared (the oldest where there is none); mean over rows, softmax over slots.
    """
    held = position_bks >= 0
    key = key_bksd.astype(jnp.float32)
    key = key / (jnp.linalg.norm(key, axis=-1, keepdims=True) + 1e-8)
    similarity = jnp.einsum("bkid,bkjd->bkij", key, key)
    slots = similarity.shape[-1]
    pair = held[..., :, None] & held[..., None, :] & ~jnp.eye(slots, dtype=bool)[None, None]
    similarity = jnp.where(pair, similarity, 0.0)
    position = position_bks[..., None, :]
    newest = jnp.where(similarity > threshold, position, -1).argmax(-1)
    oldest = jnp.where(held, position_bks, jnp.iinfo(jnp.int32).max).argmin(-1)
    spared = jnp.where((similarity > threshold).any(-1), newest, oldest[..., None])
    spared = jnp.arange(slots)[None, None, None] == spared[..., None]
    rows = jnp.maximum(held.sum(-1, keepdims=True), 1)
    mean = jnp.where(spared, 0.0, similarity).sum(-2) / rows
    return jax.nn.softmax(jnp.where(held, mean, -jnp.inf), axis=-1)


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
        repeats = redundancy(view.key_bksd, view.cache.position_bks, self.threshold)
        return self.mix * importance - (1 - self.mix) * repeats
