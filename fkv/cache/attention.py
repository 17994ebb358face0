"""Attention over a cache, full causal attention in query blocks, and the statistics of an eviction.

Letters: b batch, t tokens, q queries, s cache slots, h query heads, k KV heads, g query heads per
KV head, d head dim. A query attends to keys at its own position or earlier; position -1 marks
empty slots and padding. Softmax and statistics are float32 whatever the inputs are. Keys and values
may be `slots.Int8`: the integers are multiplied, the scales are applied to logits and weights.
"""

import functools
import math

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv.cache import slots as kv
from fkv.models import numerics


def _multiply(spec: str, x_bkgqz: Array, y_bksd: Array | kv.Int8) -> Array:
    """The float32 product of queries or weights with keys or values; of `Int8`, the integers."""
    if isinstance(y_bksd, kv.Int8):
        return numerics.einsum_int8(spec, x_bkgqz, y_bksd.value)
    axes = kv.unit_axes(y_bksd)
    spec = spec.translate({ord("bk"[axis]): None for axis in axes})
    out = numerics.einsum_f32(spec, jnp.squeeze(x_bkgqz, axes), jnp.squeeze(y_bksd, axes))
    return jnp.expand_dims(out, axes)


def _scale(x_bkgqs: Array, y_bksd: Array | kv.Int8) -> Array:
    """Logits or weights, times the scales of their entries if these are `Int8`."""
    return x_bkgqs * y_bksd.scale[:, :, None, None] if isinstance(y_bksd, kv.Int8) else x_bkgqs


def logits(q_bqhd: Array, k_bksd: Array | kv.Int8, visible_bkqs: Array) -> Array:
    """Scaled, masked attention logits [b, k, g, q, s] in float32."""
    # Transposes the few queries; left to XLA, a CPU transposes the product.
    q = jnp.moveaxis(numerics.group_queries(q_bqhd, k_bksd.shape[1]), 1, 3)
    multiply = functools.partial(_multiply, "bkgqd,bksd->bkgqs")
    if q.shape[3] == 1 and isinstance(k_bksd, Array):
        x = numerics.head_by_head(multiply, q, k_bksd)
    else:
        x = _scale(multiply(q, k_bksd), k_bksd)
    return jnp.where(visible_bkqs[:, :, None], x * q.shape[-1] ** -0.5, numerics.MASKED)


def visible(query_position_bq: Array, key_position_bks: Array) -> Array:
    """Which keys each query sees, [b, k, q, s] (k is 1 when the heads share positions)."""
    key = key_position_bks[:, :, None, :]
    return (key >= 0) & (key <= query_position_bq[:, None, :, None])


def attend(
    q_bqhd: Array, k_bksd: Array | kv.Int8, v_bksd: Array | kv.Int8, visible_bkqs: Array
) -> tuple[Array, Array]:
    """Softmax attention.

    Returns:
      Attended values [b, q, h, d] in the dtype of the values (of the queries, for `Int8`), and
      log-sum-exps of the logits [b, k, g, q] (float32).
    """
    b, k, s, d = k_bksd.shape
    chex.assert_shape(q_bqhd, (b, None, None, d))
    chex.assert_shape(visible_bkqs, (b, {1, k}, q_bqhd.shape[1], s))
    x = logits(q_bqhd, k_bksd, visible_bkqs)
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    p = jnp.exp(x - top)
    total = p.sum(-1)
    dtype = q_bqhd.dtype if isinstance(v_bksd, kv.Int8) else v_bksd.dtype
    weight = _scale(p, v_bksd).astype(dtype)
    # Heads first: with queries first, XLA on a CPU transposes the cache before multiplying.
    out = _multiply("bkgqs,bksd->bkgqd", weight, v_bksd) / total[..., None]
    out = jnp.moveaxis(out, 3, 1).reshape(q_bqhd.shape).astype(dtype)
    return out, top[..., 0] + jnp.log(total)


def attend_one(q_bqhd: Array, cache: kv.Cache, position_bq: Array) -> tuple[Array, Array]:
    """`attend` with one query per row at `position_bq`, masked as by `visible`."""
    seen = visible(position_bq, cache.position_bks)
    return numerics.whole_groups(attend, q_bqhd, cache.key_bksd, cache.value_bksd, seen)


# Blocks of queries that share a prefix of the keys, each prefix a loop to compile: at most so many
# prefixes (of 6, 7/12 of all products are computed, where half would do), of at least so many
# blocks. (XLA unrolls a loop of one, and is then slower.)
_PREFIXES, _SHARED = 6, 2


def full_attention(
    q_bthd: Array, k_btkd: Array | kv.Int8, v_btkd: Array | kv.Int8, position_bt: Array,
    block: int = 256,
) -> tuple[Array, Array]:  # fmt: skip
    """Causal attention of a whole sequence, one block of queries at a time, never T x T.

    Args:
      position_bt: absolute positions, -1 for padding; no token is before an earlier one.
      block: largest number of queries in a block, a quarter of that on a CPU, where rows go one by
        one; memory is `b * h * block * t` floats.

    Returns:
      Attended values [b, t, h, d] and log-sum-exps [b, k, g, t].
    """
    b, t, _, _ = q_bthd.shape
    chex.assert_shape(k_btkd, (b, t, None, q_bthd.shape[-1]))
    chex.assert_shape(position_bt, (b, t))
    k_bktd, v_bktd = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), (k_btkd, v_btkd))
    return numerics.row_by_row(
        functools.partial(_full_attention, block), q_bthd, k_bktd, v_bktd, position_bt,
        of_one=functools.partial(_full_attention, -(-block // 4)),
    )  # fmt: skip


def _full_attention(block, q_bthd, k_bktd, v_bktd, position_bt):
    t = q_bthd.shape[1]
    blocks = -(-t // block)
    at_once = max(_SHARED, -(-blocks // _PREFIXES)) * block
    parts = []
    for start in range(0, t, at_once):
        end = min(start + at_once, t)

        def prefix(x, axis=2, end=end):
            return jax.lax.slice_in_dim(x, 0, end, axis=axis)

        keys, values = jax.tree.map(prefix, (k_bktd, v_bktd))
        queries = (x[:, start:end] for x in (q_bthd, position_bt))
        parts.append(_in_blocks(block, *queries, keys, values, prefix(position_bt, 1)))
    out, lse = zip(*parts, strict=True)
    return jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=3)


def _in_blocks(block, q_bqhd, position_bq, k_bksd, v_bksd, position_bs):
    """`attend` for a block of queries at a time."""
    b, queries, h, d = q_bqhd.shape
    blocks = -(-queries // block)
    block = -(-queries // blocks)  # equal blocks: fewer padding queries than blocks

    def one(inputs):
        q, position = inputs
        return attend(q, k_bksd, v_bksd, visible(position, position_bs[:, None]))

    if blocks == 1:
        return one((q_bqhd, position_bq))
    pad = blocks * block - queries
    q = jnp.pad(q_bqhd, ((0, 0), (0, pad), (0, 0), (0, 0)))
    position = jnp.pad(position_bq, ((0, 0), (0, pad)), constant_values=-1)
    q, position = (
        jnp.moveaxis(x.reshape(b, blocks, block, *x.shape[2:]), 1, 0) for x in (q, position)
    )
    out, lse = jax.lax.map(one, (q, position))
    out = jnp.moveaxis(out, 0, 1).reshape(b, queries + pad, h, d)
    lse = jnp.moveaxis(lse, 0, 3).reshape(*lse.shape[1:4], queries + pad)
    return out[:, :queries], lse[..., :queries]


@flax.struct.dataclass
class Statistics:
    """Attention of the last `L` queries to each cached entry, per query head, [b, k, s, g] each.

    `last_8`, `last_16` and `last_32` sum over that many newest queries; `total` over all `L`.
    """

    largest: Array
    smallest: Array
    total: Array
    last_8: Array
    last_16: Array
    last_32: Array


# Queries whose probabilities are held at a time: at least the largest window, and few enough for a
# CPU's cache.
_BLOCK = 64


def statistics(
    q_bqhd: Array, query_position_bq: Array, k_bksd: Array | kv.Int8, key_position_bks: Array,
    lse_bkgq: Array, form: str = "windowed",
) -> Statistics:  # fmt: skip
    """Attention statistics of the queries since the last eviction (paper section 3.2).

    Memory is that of the attention of 64 queries, whatever `q` is.

    Args:
      lse_bkgq: the log-sum-exps of these queries, as `attend` returns them.
      form: `windowed` sums over the newest queries as the names say; `reference` reproduces the
        released code, in which every window is the sum over all queries.
    """
    b, k, s, d = k_bksd.shape
    chex.assert_shape(q_bqhd, (b, None, None, d))
    chex.assert_shape(query_position_bq, q_bqhd.shape[:2])
    chex.assert_shape(key_position_bks, (b, {1, k}, s))
    chex.assert_shape(lse_bkgq, (b, k, None, q_bqhd.shape[1]))
    arrays = (q_bqhd, query_position_bq, k_bksd, key_position_bks, lse_bkgq)
    row_bytes = 4 * q_bqhd.shape[2] * min(_BLOCK, q_bqhd.shape[1]) * s
    return numerics.row_by_row(functools.partial(_statistics, form), *arrays, row_bytes=row_bytes)


def _statistics(form, q_bqhd, query_position_bq, k_bksd, key_position_bks, lse_bkgq):
    queries = q_bqhd.shape[1]
    before = max(queries - _BLOCK, 0)
    block = math.gcd(before, _BLOCK)

    def add(sums, start, count):
        """The sums plus those of queries [start, start + count), and their probabilities."""
        largest, smallest, total = sums
        q = jax.lax.dynamic_slice_in_dim(q_bqhd, start, count, 1)
        position = jax.lax.dynamic_slice_in_dim(query_position_bq, start, count, 1)
        lse = jax.lax.dynamic_slice_in_dim(lse_bkgq, start, count, 3)
        seen = visible(position, key_position_bks)
        p = jnp.exp(logits(q, k_bksd, seen) - lse[..., None])
        p = jnp.where(seen[:, :, None], p, 0.0)  # padding queries add nothing
        real = (position >= 0)[:, None, None, :, None]
        largest = jnp.maximum(largest, p.max(3))
        smallest = jnp.minimum(smallest, jnp.where(real, p, 1.0).min(3))
        return (largest, smallest, total + p.sum(3)), p

    nothing = jnp.zeros((*lse_bkgq.shape[:3], k_bksd.shape[2]), jnp.float32)
    sums = (nothing, nothing + 1.0, nothing)
    if before:
        starts = jnp.arange(0, before, block)
        sums, _ = jax.lax.scan(lambda sums, i: (add(sums, i, block)[0], None), sums, starts)
    (largest, smallest, total), p = add(sums, before, queries - before)
    last = [total if form == "reference" else p[..., -n:, :].sum(3) for n in (8, 16, 32)]
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 2, 3), Statistics(largest, smallest, total, *last)
    )
