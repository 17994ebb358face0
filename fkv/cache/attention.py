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

# An accelerator's tiles: at most so many keys. Their float32 logits must stay on the chip, or XLA
# writes them to HBM, several times.
_KEYS = 2048


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
    arrays = q_bqhd, k_bksd, v_bksd, visible_bkqs
    if q_bqhd.shape[1] == 1 or isinstance(v_bksd, kv.Int8):
        return _attend(False, *arrays)
    row_bytes = 4 * math.prod(q_bqhd.shape[1:3]) * s
    summed = functools.partial(_attend, True)
    tpu = functools.partial(numerics.row_by_row, summed, row_bytes=row_bytes)
    return jax.lax.platform_dependent(*arrays, tpu=tpu, default=functools.partial(_attend, False))


def _attend(summed, q_bqhd, k_bksd, v_bksd, visible_bkqs):
    """`attend`; `summed`: whether the weights are summed by `_with_ones`."""
    d = q_bqhd.shape[-1]
    x = logits(q_bqhd, k_bksd, visible_bkqs)
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    p = jnp.exp(x - top)
    if not summed:
        total = p.sum(-1)
    dtype = q_bqhd.dtype if isinstance(v_bksd, kv.Int8) else v_bksd.dtype
    weight = _scale(p, v_bksd).astype(dtype)
    # Heads first: with queries first, XLA on a CPU transposes the cache before multiplying.
    out = _multiply("bkgqs,bksd->bkgqd", weight, _with_ones(v_bksd) if summed else v_bksd)
    if summed:
        total = out[..., d]
    out = out[..., :d] / total[..., None]
    out = jnp.moveaxis(out, 3, 1).reshape(q_bqhd.shape).astype(dtype)
    return out, top[..., 0] + jnp.log(total)


def _with_ones(v_bksd: Array) -> Array:
    """Values with a column of ones, whose product sums the weights as they are rounded for it.

    On a TPU another pass over the weights takes longer than that column.
    """
    ones = jnp.ones((*v_bksd.shape[:3], 1), v_bksd.dtype)
    return jnp.concatenate([v_bksd, ones], axis=-1)


def attend_one(q_bqhd: Array, cache: kv.Cache, position_bq: Array) -> tuple[Array, Array]:
    """`attend` with one query per row at `position_bq`, masked as by `visible`."""
    seen = visible(position_bq, cache.position_bks)
    return numerics.whole_groups(attend, q_bqhd, cache.key_bksd, cache.value_bksd, seen)


# A CPU's blocks of queries that share a prefix of the keys, each prefix a loop to compile: at most
# so many prefixes (of 6, 7/12 of all products are computed, where half would do), of at least so
# many blocks. (XLA unrolls a loop of one, and is then slower.)
_PREFIXES, _SHARED = 6, 2


def full_attention(
    q_bthd: Array, k_btkd: Array | kv.Int8, v_btkd: Array | kv.Int8, position_bt: Array,
    block: int = 256,
) -> tuple[Array, Array]:  # fmt: skip
    """Causal attention of a whole sequence, one block of queries at a time, never T x T.

    Args:
      position_bt: absolute positions, -1 for padding; no token is before an earlier one.
      block: largest number of queries in a block. A CPU takes a quarter of that and all earlier
        keys, a TPU 2048 keys at a time, a GPU 1024. Rows go one by one.

    Returns:
      Attended values [b, t, h, d] and log-sum-exps [b, k, g, t].
    """
    b, t, h, d = q_bthd.shape
    chex.assert_shape(k_btkd, (b, t, None, d))
    chex.assert_shape(position_bt, (b, t))
    k_bktd, v_bktd = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), (k_btkd, v_btkd))

    def tiles(keys, logits, summed):
        keys = min(keys, t)
        queries = min(block, max(logits // (4 * h * keys), 8), t)
        return functools.partial(_in_tiles, queries, keys, summed)

    def on_accelerators(*arrays):
        tpu = tiles(_KEYS, numerics.ON_CHIP, isinstance(v_bktd, Array))
        # The level-2 cache of an H100 is 50 MB.
        return jax.lax.platform_dependent(
            *arrays, tpu=tpu, default=tiles(_KEYS // 2, numerics.ON_CHIP // 2, False)
        )

    return numerics.row_by_row(
        on_accelerators, q_bthd, k_bktd, v_bktd, position_bt,
        of_one=functools.partial(_in_prefixes, -(-block // 4)),
    )  # fmt: skip


def _in_tiles(queries, keys, summed, q_bthd, k_bktd, v_bktd, position_bt):
    """One loop over all tiles of `queries` x `keys` of which any may be seen.

    A block of queries meets its keys tile by tile; the softmax so far is rescaled when a larger
    logit comes (Milakov and Gimelshein, arXiv 1805.02867).

    Args:
      summed: whether the weights are summed by `_with_ones`.
    """
    (b, t, h, d), dtype = q_bthd.shape, q_bthd.dtype
    k = k_bktd.shape[1]
    blocks, parts = -(-t // queries), -(-t // keys)

    def fit(x, length, axis, value=0):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, length - t)
        return jnp.pad(x, pad, constant_values=value)

    q = fit(q_bthd, blocks * queries, 1).reshape(b, blocks, queries, k, h // k, d)
    q = jnp.moveaxis(q, 2, 4)  # [b, n, k, g, q, d]
    query_position = fit(position_bt, blocks * queries, 1, -1)
    key_position = fit(position_bt, parts * keys, 1, -1)
    key, value = jax.tree.map(lambda x: fit(x, parts * keys, 2), (k_bktd, v_bktd))
    if summed:
        value = _with_ones(value)
    pairs = [(i, j) for i in range(blocks) for j in range(-(-min((i + 1) * queries, t) // keys))]
    steps = [(row, *pair) for row in range(b) for pair in pairs]

    def part(x, row, start, count, axis):
        one = jax.lax.dynamic_slice_in_dim(x, row, 1, 0)
        return jax.lax.dynamic_slice_in_dim(one, start, count, axis)

    def put(x, new, row, i):
        return jax.lax.dynamic_update_slice(x, new[:, None], (row, i, *[0] * (x.ndim - 2)))

    def step(state, at):
        (top, total, out), (out_bn, lse_bn) = state
        row, i, j = at
        seen = visible(
            part(query_position, row, i * queries, queries, 1),
            part(key_position, row, j * keys, keys, 1)[:, None],
        )
        one_key, one_value = jax.tree.map(lambda x: part(x, row, j * keys, keys, 2), (key, value))
        x = _multiply("bkgqd,bksd->bkgqs", part(q, row, i, 1, 1)[:, 0], one_key)
        x = _scale(x, one_key) * d**-0.5
        x = jnp.where(seen[:, :, None], x, numerics.MASKED)
        before = jnp.where(j == 0, numerics.MASKED, top)  # another block of queries
        top = jax.lax.stop_gradient(jnp.maximum(before, x.max(-1)))
        kept = jnp.where(j == 0, 0.0, jnp.exp(before - top))
        p = jnp.exp(x - top[..., None])
        weight = _scale(p, one_value).astype(dtype if summed else q.dtype)
        out = out * kept[..., None] + _multiply("bkgqs,bksd->bkgqd", weight, one_value)
        total = out[..., d] if summed else total * kept + p.sum(-1)
        # What the block's last keys leave is the result.
        done = (out[..., :d] / total[..., None]).astype(out_bn.dtype)
        lse = top + jnp.log(total)
        return ((top, total, out), (put(out_bn, done, row, i), put(lse_bn, lse, row, i))), ()

    shape = (k, h // k, queries)
    none = jnp.zeros((1, *shape))
    state = (none, none, jnp.zeros((1, *shape, d + summed)))
    found = jnp.zeros((b, blocks, *shape, d), dtype), jnp.zeros((b, blocks, *shape))
    (_, (out, lse)), _ = jax.lax.scan(step, (state, found), tuple(jnp.asarray(steps).T))
    out = jnp.moveaxis(out, 4, 2).reshape(b, blocks * queries, h, d)
    lse = jnp.moveaxis(lse, 1, 3).reshape(b, k, h // k, blocks * queries)
    return out[:, :t], lse[..., :t]


def _in_prefixes(block, q_bthd, k_bktd, v_bktd, position_bt):
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
