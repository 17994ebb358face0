"""Attention retained: the share of the full cache's attention that falls on what a policy holds.

A number per trace, layer and KV head, for every policy alike, as it is used: in states of its own
cache, where golden overlap is taken in those of the golden one. 1 is the full cache.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import models
from fkv.cache import attention
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.engine.memory_maps import make_room
from fkv.evaluation.loss_ratio import one_of, shares
from fkv.learning import golden
from fkv.models import LM
from fkv.policies.base import Policy


def retained(
    lm: LM, policies: Mapping[str, Policy], batch: Batch, cadence: Cadence, key_b: Array
) -> dict[str, np.ndarray]:
    """Attention retained under golden eviction and policies that evict.

    Memory is that of the positions held, `(B + L) T / L` whole numbers per policy, layer and head.

    Args:
      batch: traces of a multiple of `L` tokens, padding included.
      key_b: one PRNG key per trace, for policies that sample.

    Returns:
      By name, [b, layers, KV heads]: of the probabilities that generated tokens after the first
      `B + L` give to entries in the full cache, the sum over those that the policy still holds,
      mean over these tokens and the query heads of a group. NaN for traces without such tokens.
    """
    make_room()
    forced, _, _ = _golden(lm, batch, cadence)
    evicting = {"golden": forced, **{name: p for name, p in policies.items() if p.evicts}}
    together = [name for name, policy in evicting.items() if shares(policy, cadence)]
    several = tuple(evicting[name] for name in together)
    for i, name in enumerate(together):  # they share one program
        evicting[name] = one_of(several, i, lm.config.layers)
    held = {name: _held(lm, batch, p, cadence, key_b) for name, p in evicting.items()}
    return {name: np.asarray(x) for name, x in _retained(lm, batch, held, cadence).items()}


_golden = jax.jit(golden.policy, static_argnums=2)


@functools.partial(jax.jit, static_argnames="cadence")
def _held(lm, batch, policy, cadence, key_b):
    """Positions that the queries of each counted chunk can see, [y, c, b, k, s]; -1 is empty."""
    t = batch.token_bt.shape[1]
    # Observers are called at evictions: a chunk of padding, for the one after the last chunk.
    padded = batch.replace(token_bt=jnp.pad(batch.token_bt, ((0, 0), (0, cadence.interval))))

    def observe(acc, policy, view, evict):
        return acc, view.cache.position_bks

    found = replay.replay(lm, padded, policy, cadence, key_b, observe)[2]
    return found[:, found.shape[1] - (t // cadence.interval - cadence.fill_chunks - 1) :]


@functools.partial(jax.jit, static_argnames="cadence")
def _retained(lm, batch, held, cadence):
    position, interval = batch.position_bt, cadence.interval
    first = cadence.first_evicting_token
    # A token is predicted by the query before it.
    last = jnp.arange(position.shape[1])[None] + 1
    counts = (last > first) & (last >= batch.prompt_b[:, None]) & (last < batch.length_b[:, None])

    def layer(hidden, inputs):
        weights, held = inputs
        q, k, v = models.project(lm.config, weights, hidden, position)
        out, lse = attention.full_attention(q, k, v, position)
        key_bktd = jnp.moveaxis(k, 1, 2)

        def of_chunk(inputs):
            index, held = inputs
            start = first + index * interval
            query, at, weight = (
                jax.lax.dynamic_slice_in_dim(x, start, interval, axis=1)
                for x in (q, position, counts)
            )
            total = jax.lax.dynamic_slice_in_dim(lse, start, interval, axis=3)

            def share(held_bks):
                slot = jnp.maximum(held_bks, 0)[..., None]
                key = jnp.take_along_axis(key_bktd, slot, axis=2)
                seen = attention.visible(at, held_bks)
                p = jnp.exp(attention.logits(query, key, seen) - total[..., None])
                p = jnp.where(seen[:, :, None], p, 0.0).sum(-1).mean(2)  # [b, k, q]
                return (p * weight[:, None]).sum(-1)

            return jax.tree.map(share, held)

        chunks = jnp.arange(jax.tree.leaves(held)[0].shape[0])
        found = jax.lax.map(of_chunk, (chunks, held))
        found = jax.tree.map(lambda x: x.sum(0), found)
        return models.finish(lm.config, weights, hidden, out), found

    hidden = models.embed(lm, batch.token_bt)
    _, found = jax.lax.scan(layer, hidden, (models.stacked(lm), held))
    number = counts.sum(-1)[:, None, None]
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0) / number, found)
