"""TriAttention: attention by distance, from calibrated queries."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig, rotate
from fkv.models.numerics import einsum_f32
from fkv.policies.base import Policy, View, register, setting
from fkv.policies.foresight import TRAINED, Trained
from fkv.policies.weights import check_arrays


@register("triattention")
class TriAttention(Policy):
    """Keeps keys that the mean query attends to from various distances (arXiv 2604.04921).

    Before their rotation, the queries of a head lie around a centre, which is measured once
    (`fkv.calibrate`). With the pairs f of channels as complex numbers and w_f the frequencies of
    the rotation, the score of a key k at position p after n tokens, for one query head, is
      mean over offsets o of sum_f |E q_f| |k_f| cos((n - p + o) w_f + arg(E q_f conj(k_f)))
      + sum_f (E |q_f| - |E q_f|) |k_f|
    with o = 1, 2, 4, ... up to `reach`. The mean over o is linear in the rotated key, so the first
    sum is its product with one expected query. Scores are standardised over the entries held
    (without protected ones of the prompt), per query head; importance is the largest of the group.

    The released code computes this for its option `per_layer_perhead_pruning`; by default it also
    takes the mean over all layers, which a replay that runs layer by layer can't. It keeps the
    prompt: `prompt(triattention)`. It protects no newest entries (`window`).

    Attributes:
      params: of all layers: mean [y, h, d], E q in the layout of queries; and norm [y, h, d / 2],
        E |q_f|.
      trained: where they come from.
    """

    params: dict
    reach: int = setting(kinds.whole(1, 2**24), 2**16)
    window: int = setting(kinds.whole(0), 0)
    trained: Trained = setting(TRAINED, Trained())

    def check(self, config: ModelConfig, cadence: Cadence) -> None:
        lead = config.layers, config.heads
        check_arrays(
            self, {"mean": (*lead, config.head_dim), "norm": (*lead, config.head_dim // 2)}
        )
        super().check(config, cadence)

    def protected(self, view: View) -> int:
        return min(self.window, view.interval)

    def score(self, view: View) -> Array:
        position, key = view.cache.position_bks, view.key_bksd.astype(jnp.float32)
        b, k, _s, d = key.shape
        frequency, scale = view.config.inv_frequencies()
        mean = self.params["mean"].astype(jnp.float32)
        now = view.query_position_bl.max(-1, keepdims=True) + 1
        x = jnp.broadcast_to(mean[None, None], (b, 1, *mean.shape))
        low, high = jnp.split(rotate(x, now, view.config)[:, 0], 2, axis=-1)
        offsets = 2.0 ** np.arange(int(self.reach).bit_length())
        ahead = np.exp(1j * np.outer(offsets, np.asarray(frequency, np.float64))).mean(0)
        cos, sin = (jnp.asarray(x, jnp.float32)[None, None] for x in (ahead.real, ahead.imag))
        query = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        score = einsum_f32("bkgd,bksd->bkgs", query.reshape(b, k, -1, d), key)
        rest = self.params["norm"] - _magnitude(mean)
        rest = rest.astype(jnp.float32).reshape(k, -1, d // 2) * scale
        score += einsum_f32("kgf,bksf->bkgs", rest, _magnitude(key))
        counted = ((position >= 0) & ~view.kept_prompt_bks)[:, :, None]
        number = jnp.maximum(counted.sum(-1, keepdims=True), 1)
        centre = jnp.where(counted, score, 0.0).sum(-1, keepdims=True) / number
        score = score - centre
        spread = jnp.where(counted, score**2, 0.0).sum(-1, keepdims=True) / number
        return (score / jnp.maximum(jnp.sqrt(spread), 1e-6)).max(2)


def _magnitude(x_xd: Array) -> Array:
    """Of the pairs of channels (f, f + d / 2)."""
    low, high = jnp.split(x_xd, 2, axis=-1)
    return jnp.sqrt(low * low + high * high)


def statistics(query_bthd: Array, counted_bt: Array) -> dict[str, Array]:
    """`mean` [h, d] and `norm` [h, d / 2] of one layer's queries before their rotation."""
    weight = (counted_bt / counted_bt.sum())[..., None, None]
    query = query_bthd.astype(jnp.float32)
    return {"mean": (query * weight).sum((0, 1)), "norm": (_magnitude(query) * weight).sum((0, 1))}
