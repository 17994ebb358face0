"""Golden Eviction: the best evictions in hindsight, from full-cache attention.

The future score of a cached entry after a chunk is the largest block score it will get from any
later chunk of `L` queries; a block score is the mean full-cache attention probability over the
block's queries and the group's heads. Every eviction drops the `L` candidates of lowest future
score (ForesightKV, arXiv 2602.03203, section 3).

The search keeps, for each of the `B + L` cached entries, a row of its future scores after every
chunk, computed when the entry arrives from its key and all later queries, and dropped with it. So
memory is `(B + L) * T / L` floats per group plus one group of keys against a slab of queries:
linear in T, where the table of all block scores is `T * T / L` and the attention matrix `T * T`.

Letters: b batch, e evictions, t tokens, k KV heads, g query heads per KV head, j query blocks,
l interval (L), n candidates (B).
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds, models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import beginnings, replay
from fkv.engine.batch import Batch
from fkv.engine.beginnings import Begun
from fkv.engine.replay import Projections
from fkv.models import LM, ModelConfig, numerics
from fkv.policies.base import Policy
from fkv.policies.forced import Forced


@flax.struct.dataclass
class Labels:
    """Golden evictions of one layer.

    Attributes:
      evict_position_ebkl: absolute positions to drop, int32, lowest future score first.
      candidate_position_ebkn: absolute positions of the candidates, in the slot order of
        `fkv.engine.replay` when these evictions are forced.
      future_score_ebkn: their future scores, float32.
      newest_score_ebkl: future scores of the newest `L`, in order of arrival.
      valid_eb: whether the row is long enough for this eviction and a token after it.
    """

    evict_position_ebkl: Array
    candidate_position_ebkn: Array
    future_score_ebkn: Array
    newest_score_ebkl: Array
    valid_eb: Array

    __repr__ = kinds.one_line


def at(x_e: Array, eviction: Array) -> Array:
    """The entry of one eviction along the first axis; zeros before the first and after the last."""
    known = (eviction >= 0) & (eviction < len(x_e))
    one = x_e[jnp.clip(eviction, 0, len(x_e) - 1)]
    return jnp.where(known, one, jnp.zeros_like(one))


def protected(position_xbkn: Array, cadence: Cadence, prompt_b: Array) -> Array:
    """Which positions are of protected tokens of the prompt."""
    kept_bkn = jnp.minimum(prompt_b, cadence.protect_prompt)[:, None, None]
    return position_xbkn < jnp.expand_dims(kept_bkn, range(position_xbkn.ndim - 3))


def search(
    future_rows: Callable[[Array, int], Array],
    length_b: Array,
    blocks: int,
    cadence: Cadence,
    at_once: int = 1,
    prompt_b: Array | None = None,
) -> Labels:
    """The search, a `lax.scan` over chunks for all rows and heads.

    Args:
      future_rows: maps the index c of a chunk, and a number of chunks, to [b, k, number * l, j]:
        for each entry of these chunks, the largest block score in blocks j and later (only blocks
        after the entry's own are read). Chunks may lie beyond the last block: any numbers do.
      length_b: tokens of each row.
      blocks: number of query blocks, `ceil(T / L)`.
      at_once: number of chunks that `future_rows` is asked for at a time.
      prompt_b: tokens of each row's prompt; read if the cadence protects prompts.
    """
    budget, interval, first = cadence.budget, cadence.interval, cadence.fill_chunks
    b = len(length_b)
    k = jax.eval_shape(lambda c: future_rows(c, 1), jax.ShapeDtypeStruct((), jnp.int32)).shape[1]

    def step(state, inputs):
        score, position = state  # [b, k, s, j] and [b, k, s]
        chunk, rows = inputs
        score = jax.lax.dynamic_update_slice(score, rows, (0, 0, budget, 0))
        arrived = chunk * interval + jnp.arange(interval)
        arrived = jnp.where(arrived[None] < length_b[:, None], arrived[None], -1)
        arrived = jnp.broadcast_to(arrived[:, None], (b, k, interval))
        position = jax.lax.dynamic_update_slice(position, arrived, (0, 0, budget))

        future = jax.lax.dynamic_index_in_dim(score, chunk + 1, axis=3, keepdims=False)
        (future, newest), candidate = jnp.split(future, [budget], -1), position[..., :budget]
        importance = future
        if cadence.protect_prompt:
            importance = jnp.where(protected(candidate, cadence, prompt_b), jnp.inf, future)
        evict = kv.choose(importance, candidate, interval)
        labels = Labels(
            jnp.take_along_axis(candidate, evict, axis=-1),
            candidate,
            future,
            newest,
            length_b > (chunk + 1) * interval,
        )
        target, source = kv.moves(evict, cadence.slots)
        state = (kv.move(score, target, source), kv.move(position, target, source))
        return state, labels

    def group(state, start):
        # Of as many chunks each: equal keys get equal scores whenever they arrive.
        rows = future_rows(start, at_once).reshape(b, k, at_once, interval, blocks)
        return jax.lax.scan(step, state, (start + jnp.arange(at_once), jnp.moveaxis(rows, 2, 0)))

    # No token attends after the last chunk's eviction.
    chunks = blocks - 1 if blocks - 1 > first else 0
    groups = -(-chunks // at_once)
    state = (
        jnp.zeros((b, k, cadence.slots, blocks)),
        jnp.full((b, k, cadence.slots), -1, jnp.int32),
    )
    _, labels = jax.lax.scan(group, state, at_once * jnp.arange(groups))
    # The first chunks only fill the cache.
    return jax.tree.map(lambda x: x.reshape(groups * at_once, *x.shape[2:])[first:chunks], labels)


def suffix_max(score_bktj: Array) -> Array:
    """Largest score in this block or a later one."""
    return jax.lax.cummax(score_bktj, axis=score_bktj.ndim - 1, reverse=True)


# Keys whose scores are computed at a time, and a CPU's queries: matrix products want many of both,
# caches few.
_KEYS, _QUERIES = 256, 256


def from_attention(
    q_bthd: Array,
    k_btkd: Array,
    lse_bkgt: Array,
    position_bt: Array,
    cadence: Cadence,
    queries: int = 1024,
    prompt_b: Array | None = None,
) -> Labels:
    """Golden evictions of one layer, streamed from the queries and keys of its full pass.

    Args:
      q_bthd, k_btkd: rotated queries and keys of the full-cache pass.
      lse_bkgt: log-sum-exp of every query's logits, from `attention.full_attention`.
      position_bt: `arange(T)` where the row has a token, -1 after its end.
      queries: number of queries multiplied with a group of keys at a time, at least `L`; memory is
        `b * h * queries * max(L, 256)` floats. On a CPU rows go one by one, at most 256 queries
        at a time.
      prompt_b: see `search`.
    """
    rows, blocks, at_once = _future_rows(q_bthd, k_btkd, lse_bkgt, position_bt, cadence, queries)
    length_b = (position_bt >= 0).sum(-1)
    return search(rows, length_b, blocks, cadence, at_once, prompt_b)


def future_scores(
    q_bthd: Array, k_btkd: Array, lse_bkgt: Array, position_bt: Array, cadence: Cadence
) -> Array:
    """Future scores of every token, whatever is evicted, from block j on: [j, b, k, t].

    That is `T * T / L` floats per KV head, of one layer.

    Args:
      q_bthd, k_btkd, lse_bkgt, position_bt: see `from_attention`.
    """
    arrays = (q_bthd, k_btkd, lse_bkgt, position_bt)
    rows, blocks, at_once = _future_rows(*arrays, cadence, 1024)
    groups = jnp.arange(-(-blocks // at_once))
    found = jax.lax.map(lambda i: rows(i * at_once, at_once), groups)  # [i, b, k, n, j]
    found = jnp.moveaxis(found, (4, 1, 2), (0, 1, 2))
    return found.reshape(*found.shape[:3], -1)[..., : position_bt.shape[1]]


def _future_rows(q_bthd, k_btkd, lse_bkgt, position_bt, cadence, queries):
    """What `search` asks for: `future_rows`, the number of blocks, and of chunks at a time."""
    (b, t, k, _), interval = k_btkd.shape, cadence.interval
    blocks = -(-t // interval)
    at_once = max(1, _KEYS // interval)
    # The keys of the last group may lie beyond the end.
    length = blocks + at_once

    def fit(x, chunks, value=0):
        pad = [(0, 0), (0, chunks * interval - t)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad, constant_values=value)

    def by_block(x_btkg, value=0):
        """[b, k, j, g * l, ...]"""
        x = fit(x_btkg, blocks, value)
        x = x.reshape(b, blocks, interval, *x.shape[2:])
        x = jnp.moveaxis(x, (3, 1, 4, 2), (1, 2, 3, 4))
        return x.reshape(b, k, blocks, -1, *x.shape[5:])

    q = by_block(numerics.group_queries(q_bthd, k))
    never = -numerics.MASKED  # queries after the end give no attention
    lse = jnp.where((position_bt >= 0)[:, None, None], lse_bkgt, never)
    lse = by_block(jnp.moveaxis(lse, 3, 1), never)
    keys, real = jnp.moveaxis(fit(k_btkd, length), 1, 2), fit(position_bt >= 0, length, False)

    def scores(queries):
        return functools.partial(_block_scores, max(1, queries // interval))

    def rows(chunk, count):
        own, own_real = (
            jax.lax.dynamic_slice_in_dim(x, chunk * interval, count * interval, axis=axis)
            for x, axis in ((keys, 2), (real, 1))
        )
        score = numerics.row_by_row(
            functools.partial(scores(queries), chunk), q, lse, own,
            of_one=functools.partial(scores(min(queries, _QUERIES)), chunk),
        )  # fmt: skip
        own_chunk = chunk + jnp.arange(count * interval) // interval
        later = jnp.arange(blocks)[None] > own_chunk[:, None]
        score = jnp.where(own_real[:, None, :, None] & later[None, None], score, 0.0)
        return suffix_max(score)

    return rows, blocks, at_once


def _block_scores(at_once, chunk, q_bkjzd, lse_bkjz, key_bknd):
    """Scores [b, k, n, j] of keys in blocks after `chunk`, those of `at_once` blocks at a time.

    Scores of blocks that are not after the key's own may be anything, infinity too.
    """
    b, k, blocks, queries, d = q_bkjzd.shape
    n = key_bknd.shape[2]
    at_once = min(at_once, blocks)
    q_bkqd = q_bkjzd.reshape(b, k, blocks * queries, d)

    def slab(i, score_bkjn):
        start = jnp.minimum(i * at_once, blocks - at_once)
        # A TPU reads a slice in place, but copies a reshaped one.
        q = jax.lax.dynamic_slice_in_dim(q_bkqd, start * queries, at_once * queries, axis=2)
        lse = jax.lax.dynamic_slice_in_dim(lse_bkjz, start, at_once, axis=2)
        p = jax.lax.platform_dependent(q, lse, key_bknd, tpu=_sums_by_product, default=_sums)
        return jax.lax.dynamic_update_slice(score_bkjn, p / queries, (0, 0, start, 0))

    score = jnp.zeros((b, k, blocks, n))
    first = jnp.minimum((chunk + 1) // at_once, blocks)
    score = jax.lax.fori_loop(first, -(-blocks // at_once), slab, score)
    return jnp.moveaxis(score, 2, 3)


def _sums(q_bkqd, lse_bkjz, key_bknd):
    """Sums of probabilities [b, k, j, n] over the queries of each block."""
    x = numerics.einsum_f32("bkqd,bknd->bkqn", q_bkqd, key_bknd)
    x = x.reshape(*lse_bkjz.shape, -1) * q_bkqd.shape[-1] ** -0.5
    return jnp.exp(x - lse_bkjz[..., None]).sum(3)


def _sums_by_product(q_bkqd, lse_bkjz, key_bknd):
    """`_sums`, as a product with the blocks' membership.

    On a TPU both products are one program, and no logit is written to HBM. Probabilities are
    rounded to the dtype of the queries.
    """
    blocks, queries = lse_bkjz.shape[2:]
    x = numerics.einsum_f32("bknd,bkqd->bknq", key_bknd, q_bkqd) * q_bkqd.shape[-1] ** -0.5
    x = x - lse_bkjz.reshape(*lse_bkjz.shape[:2], 1, -1)
    # A key after the query may overflow, and infinity times zero would spoil other blocks.
    p = jnp.exp(jnp.minimum(x, 1.0)).astype(q_bkqd.dtype)
    member_qj = jnp.repeat(jnp.eye(blocks, dtype=q_bkqd.dtype), queries, axis=0)
    return numerics.einsum_f32("bknq,qj->bkjn", p, member_qj)


def layer_labels(
    config: ModelConfig,
    weights: models.Params,
    hidden_btm: Array,
    position_bt: Array,
    cadence: Cadence,
    prompt_b: Array | None = None,
) -> tuple[Array, Labels, tuple[Projections, Array]]:
    """One layer of the full pass: its output, its golden evictions, and its attention.

    It has no cache: keys and values are in the model's dtype, whatever `cache_dtype` is.

    Returns:
      Hidden states [b, t, m]; the labels; and queries, keys and values with the log-sum-exps of the
      attention [b, k, g, t].
    """
    q, k, v = models.project(config, weights, hidden_btm, position_bt)
    out, lse = attention.full_attention(q, k, v, position_bt)
    labels = from_attention(q, k, lse, position_bt, cadence, prompt_b=prompt_b)
    return models.finish(config, weights, hidden_btm, out), labels, ((q, k, v), lse)


def policy(lm: LM, batch: Batch, cadence: Cadence) -> tuple[Forced, Labels, Array]:
    """The golden evictions of all layers, from one full pass.

    Returns:
      The policy that forces them, the labels [layers, e, ...], and the full-cache hidden states
      (whatever `config.cache_dtype` is).
    """
    return _policy(lm, batch, cadence, lambda *attended: ())[:3]


def policy_and_beginning(
    lm: LM, batch: Batch, cadence: Cadence, others: Policy
) -> tuple[Forced, Labels, Array, Begun]:
    """`policy`, and the beginning of replays under evictions, from the same pass.

    Where caches are quantised, the full pass is not: then the beginning is a pass of its own.

    Args:
      others: see `beginnings.begin`.
    """
    if lm.config.cache_dtype:
        begun = beginnings.begin(lm, batch, others, cadence)
        return *policy(lm, batch, cadence), begun
    first = replay.beginning(others, cadence, batch.token_bt.shape[1])
    position = batch.position_bt[:, :first]

    def keep(qkv, lse):
        qkv = [x[:, :first] for x in qkv]
        return replay.stage(others, lm.config, cadence, qkv, lse[..., :first], position)

    forced, labels, hidden, staged = _policy(lm, batch, cadence, keep)
    return forced, labels, hidden, Begun(hidden[:, :first], staged, cadence)


def _policy(lm, batch, cadence, keep):
    position = batch.position_bt

    def layer(hidden, weights):
        hidden, labels, attended = layer_labels(
            lm.config, weights, hidden, position, cadence, batch.prompt_b
        )
        return hidden, (labels, keep(*attended))

    hidden = models.embed(lm, batch.token_bt)
    hidden, (labels, kept) = jax.lax.scan(layer, hidden, models.stacked(lm))
    return Forced(labels.evict_position_ebkl), labels, hidden, kept
