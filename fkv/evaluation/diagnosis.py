"""Diagnosis of a policy: regret and recall per head, retention over time, attention patterns.

Regret and recall are measured by `loss_ratio.measure`, in states of the golden cache.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fkv import models
from fkv.cache import attention
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.engine.memory_maps import make_room
from fkv.evaluation import tables
from fkv.evaluation.loss_ratio import Losses, OneOf, shares
from fkv.learning import golden
from fkv.models import LM
from fkv.policies.base import Policy


def csv(results: Sequence[Losses]) -> str:
    """Regret and recall of every policy, budget, layer and KV head, mean over traces, as CSV."""
    rows = []
    for r in results:
        if r.recall_nyk is None:
            continue
        recall, regret = r.recall_nyk.mean(0), r.regret_nyk.mean(0)
        for layer, head in np.ndindex(recall.shape):
            numbers = (f"{x[layer, head]:.6g}" for x in (regret, recall))
            rows.append([r.policy, r.budget, layer, head, *numbers, r.protect_prompt])
    columns = ["policy", "budget", "layer", "kv_head", "regret", "recall", "protect_prompt"]
    return tables.comma_separated(columns, rows)


def retention(
    lm: LM, policies: Mapping[str, Policy], trace: Batch, cadence: Cadence
) -> dict[str, np.ndarray]:
    """Which tokens each head holds over time, under golden eviction and every policy.

    Args:
      trace: one, [1, t].

    Returns:
      For each name, bool [layers, KV heads, chunks, t]: held when the chunk's queries ran. The
      full cache holds all tokens so far.
    """
    rows, t = trace.token_bt.shape
    if rows != 1:
        raise ValueError(f"retention is drawn for one trace, not {rows}")
    for policy in policies.values():
        replay.check(policy, lm.config, cadence, rows=1)

    make_room()
    forced, _, _ = jax.jit(golden.policy, static_argnums=2)(lm, trace, cadence)
    # Most policies share one program.
    evicting = {"golden": forced, **{name: p for name, p in policies.items() if p.evicts}}
    together = [name for name, policy in evicting.items() if shares(policy, cadence)]
    choices = tuple(evicting[name] for name in together)
    for i, name in enumerate(together):
        evicting[name] = OneOf(choices, jnp.full(lm.config.layers, i))

    # Observers are called at evictions: a chunk of padding, for the one after the last chunk.
    padded = trace.replace(token_bt=np.pad(trace.token_bt, ((0, 0), (0, cadence.interval))))

    @jax.jit
    def run(lm, policy):
        def observe(acc, policy, view, evict):
            position = view.cache.position_bks
            row = jnp.zeros((*position.shape[:2], t + 1), bool)
            row = jnp.put_along_axis(row, position, True, axis=-1, inplace=False)
            return acc, row[0, :, :t]  # position -1 sets the last index, which is cut off

        return jnp.moveaxis(replay.replay(lm, padded, policy, cadence, observe=observe)[2], 1, 2)

    chunks = -(-t // cadence.interval)
    come = np.minimum(cadence.interval * (1 + np.arange(chunks)), trace.length_b[0])
    come = np.arange(t)[None] < come[:, None]
    everything = np.broadcast_to(come, (lm.config.layers, lm.config.kv_heads, chunks, t))
    found = {}
    for name in ("golden", *policies):
        held = np.asarray(run(lm, evicting[name])) if name in evicting else everything
        # Before the first eviction a head holds everything.
        found[name] = np.concatenate([everything[:, :, : chunks - held.shape[2]], held], axis=2)
    return found


def lookups(score_tq: np.ndarray, interval: int, share: float = 0.3) -> np.ndarray:
    """Where a head attends to a single distant token, which eviction can break.

    Args:
      score_tq: full-cache attention of one head from every query, of `block_scores` at interval 1.
      share: least attention of the query on the one key.

    Returns:
      Queries and keys [n, 2], with keys more than `2 * interval` tokens older.
    """
    key, query = np.nonzero(score_tq >= share)
    far = query - key > 2 * interval
    order = np.argsort(query[far], kind="stable")
    return np.stack([query[far], key[far]], axis=-1)[order]


def block_scores(lm: LM, trace: Batch, interval: int) -> np.ndarray:
    """Mean full-cache attention to every token from each block of `L` queries.

    Memory is `layers * KV heads * t * t / L` floats; meant for a trace or two.

    Returns:
      [layers, KV heads, t, blocks] of the single trace given.
    """
    t = trace.token_bt.shape[1]
    blocks = -(-t // interval)
    position = trace.position_bt

    @jax.jit
    def run(lm):
        def layer(hidden, weights):
            q, k, v = models.project(lm.config, weights, hidden, position)
            out, _ = attention.full_attention(q, k, v, position)
            pad = blocks * interval - t
            queries = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
            at = jnp.pad(position, ((0, 0), (0, pad)), constant_values=-1)
            keys = jnp.moveaxis(k, 1, 2)

            def block(i):
                q = jax.lax.dynamic_slice_in_dim(queries, i * interval, interval, axis=1)
                rows = jax.lax.dynamic_slice_in_dim(at, i * interval, interval, axis=1)
                seen = attention.visible(rows, position[:, None])
                p = jax.nn.softmax(attention.logits(q, keys, seen), axis=-1)
                return jnp.where(seen[:, :, None], p, 0.0).mean((2, 3))[0]

            score = jax.lax.map(block, jnp.arange(blocks))
            return models.finish(lm.config, weights, hidden, out), jnp.moveaxis(score, 0, -1)

        return jax.lax.scan(layer, models.embed(lm, trace.token_bt), models.stacked(lm))[1]

    return np.asarray(run(lm))


def patterns(score_yktj: np.ndarray, share: float = 0.5) -> dict[str, np.ndarray]:
    """Three patterns of attention to a token over time, each with its clearest tokens.

    A token is attended to in a block if its score there is at least `share` of its largest.
    `steady`: in most blocks after its own; `local`: only in its own block and the next; `recalled`:
    not for at least four blocks after its own, then again.

    Returns:
      For each pattern, the scores [tokens, blocks] of its clearest tokens, at most six.
    """
    *_, t, blocks = score_yktj.shape
    rows = score_yktj.reshape(-1, blocks)
    interval = -(-t // blocks)
    own = np.tile(np.arange(t) // interval, len(rows) // t)
    after = np.arange(blocks)[None] - own[:, None]
    alive = after >= 0
    strong = (rows >= share * rows.max(1, keepdims=True)) & alive & (rows > 0)
    later = np.where(after > 1, rows, 0.0)
    best = rows.max(1)
    enough = blocks - own > 4  # with enough blocks to follow
    first_later = np.where((after > 4) & strong, after, blocks).min(1)
    quiet = np.where((after >= 1) & (after < first_later[:, None]), rows, 0.0).max(1)
    clear = {
        "steady": np.where(enough, strong.sum(1) / np.maximum(alive.sum(1), 1) * (best > 0.01), -1),
        "local": np.where(enough, best - 10 * later.max(1), -1),
        "recalled": np.where(enough & (first_later < blocks), later.max(1) - 10 * quiet, -1),
    }
    found = {}
    for name, score in clear.items():
        top = np.argsort(-score, kind="stable")[:6]
        found[name] = np.where(alive[top], rows[top], np.nan)[score[top] > 0]
    return found
