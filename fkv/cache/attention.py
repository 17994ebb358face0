"""Attention over a cache, full causal attention in query blocks, and what an eviction looks at.

Letters: b batch, t tokens, q queries, s cache slots, h query heads, k KV heads, g query heads per
KV head, d head dim. A key is visible to a query when its position is known (-1 = empty or padding)
and not later than the query's. Softmax and statistics are float32 whatever the inputs are. Keys and
values may be `slots.Int8`: their integers are multiplied, their scales go to logits and weights.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv.cache import slots as kv
from fkv.errors import UserError
from fkv.models.numerics import (
    MASKED,
    einsum_f32,
    einsum_int8,
    group_queries,
    head_by_head,
    row_by_row,
)


def product(spec: str, x_bkgqz: Array, y_bksd: Array | kv.Int8) -> Array:
    """`einsum_f32` of queries or weights with keys or values: of `Int8` the integers alone."""
    if isinstance(y_bksd, kv.Int8):
        return einsum_int8(spec, x_bkgqz, y_bksd.value)
    axes = kv.unit_axes(y_bksd)
    spec = spec.translate({ord("bk"[axis]): None for axis in axes})
    out = einsum_f32(spec, jnp.squeeze(x_bkgqz, axes), jnp.squeeze(y_bksd, axes))
    return jnp.expand_dims(out, axes)


def scaled(x_bkgqs: Array, by_bksd: Array | kv.Int8) -> Array:
    """Logits or weights, times the scales of the entries that they meet if these have some."""
    return x_bkgqs * by_bksd.scale[:, :, None, None] if isinstance(by_bksd, kv.Int8) else x_bkgqs


def logits(q_bqhd: Array, k_bksd: Array | kv.Int8, visible_bkqs: Array) -> Array:
    """Scaled, masked attention logits [b, k, g, q, s] in float32."""
    # The queries are transposed, which are few: left to XLA, the CPU transposes the product.
    q = jnp.moveaxis(group_queries(q_bqhd, k_bksd.shape[1]), 1, 3)
    multiply = functools.partial(product, "bkgqd,bksd->bkgqs")
    if q.shape[3] == 1 and isinstance(k_bksd, Array):
        x = head_by_head(multiply, q, k_bksd)
    else:
        x = scaled(multiply(q, k_bksd), k_bksd)
    return jnp.where(visible_bkqs[:, :, None], x * q.shape[-1] ** -0.5, MASKED)


def visible(query_position_bq: Array, key_position_bks: Array) -> Array:
    """Which keys each query may see, [b, k, q, s] (k is 1 when the heads share positions)."""
    key = key_position_bks[:, :, None, :]
    return (key >= 0) & (key <= query_position_bq[:, None, :, None])


def attend(
    q_bqhd: Array, k_bksd: Array | kv.Int8, v_bksd: Array | kv.Int8, visible_bkqs: Array
) -> tuple[Array, Array]:
    """Softmax attention.

    Returns:
      The attended values [b, q, h, d] in the dtype of the values (of the queries, for `Int8`), and
      the log-sum-exp of the logits [b, k, g, q] (float32).
    """
    x = logits(q_bqhd, k_bksd, visible_bkqs)
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    p = jnp.exp(x - top)
    total = p.sum(-1)
    dtype = q_bqhd.dtype if isinstance(v_bksd, kv.Int8) else v_bksd.dtype
    weight = scaled(p, v_bksd).astype(dtype)
    # Heads first: asked for queries first, XLA on the CPU transposes the cache before multiplying.
    out = product("bkgqs,bksd->bkgqd", weight, v_bksd) / total[..., None]
    out = jnp.moveaxis(out, 3, 1).reshape(q_bqhd.shape).astype(dtype)
    return out, top[..., 0] + jnp.log(total)


def attend_one(
    kernel: str,
    q_bqhd: Array,
    k_bksd: Array,
    v_bksd: Array,
    query_position_bq: Array,
    key_position_bks: Array,
) -> tuple[Array, Array]:
    """`attend` of one query a row, masked as by `visible`.

    Args:
      kernel: `plain` for `attend` itself, `pallas` for `fkv.cache.kernels`, on a GPU or a TPU;
        `interpret` for the one of GPUs on any device, slowly, for tests.

    Raises:
      UserError: the kernel is not for this device, or not for this cache.
    """
    if kernel == "plain":
        seen = visible(query_position_bq, key_position_bks)
        return attend(q_bqhd, k_bksd, v_bksd, seen)
    if not isinstance(k_bksd, Array):
        raise UserError(
            "attention_kernel 'pallas' reads caches in the model's dtype only: set it to 'plain'"
        )
    from fkv.cache import kernels  # Pallas takes a while, and few ask for it

    interpret = kernel == "interpret"
    platform = "gpu" if interpret else jax.default_backend()
    return kernels.decode_attention(
        q_bqhd, k_bksd, v_bksd, query_position_bq[:, 0], key_position_bks, platform,
        interpret=interpret,
    )  # fmt: skip


def full_attention(
    q_bthd: Array,
    k_btkd: Array | kv.Int8,
    v_btkd: Array | kv.Int8,
    position_bt: Array,
    block: int = 256,
) -> tuple[Array, Array]:
    """Causal attention of a whole sequence, one block of queries at a time: never T x T.

    Args:
      position_bt: absolute positions, -1 for padding.
      block: queries handled at once, at most; memory is `b * h * block * t` floats.

    Returns:
      Attended values [b, t, h, d] and log-sum-exps [b, k, g, t].
    """
    b, t, h, d = q_bthd.shape
    block = -(-t // -(-t // block))  # even blocks: no more padding than blocks
    pad = -t % block
    k_bktd, v_bktd = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), (k_btkd, v_btkd))
    key_position = position_bt[:, None]

    def one(inputs):
        q, position = inputs
        return attend(q, k_bktd, v_bktd, visible(position, key_position))

    if t == block:
        return one((q_bthd, position_bt))
    q = jnp.pad(q_bthd, ((0, 0), (0, pad), (0, 0), (0, 0)))
    position = jnp.pad(position_bt, ((0, 0), (0, pad)), constant_values=-1)
    blocks = (t + pad) // block
    out, lse = jax.lax.map(
        one,
        (
            jnp.moveaxis(q.reshape(b, blocks, block, h, d), 1, 0),
            jnp.moveaxis(position.reshape(b, blocks, block), 1, 0),
        ),
    )
    out = jnp.moveaxis(out, 0, 1).reshape(b, t + pad, h, d)
    lse = jnp.moveaxis(lse, 0, 3).reshape(*lse.shape[1:4], t + pad)
    return out[:, :t], lse[..., :t]


@flax.struct.dataclass
class Statistics:
    """What the last `L` queries gave to each cached entry, per query head, [b, k, s, g] each.

    `last_8` and its like are sums over the newest 8, 16 and 32 queries; `total` over all `L`.
    """

    largest: Array
    smallest: Array
    total: Array
    last_8: Array
    last_16: Array
    last_32: Array


# Queries looked at together: no fewer than the largest window, and few enough that what they give
# stays in a processor's cache.
_BLOCK = 64


def statistics(
    q_bqhd: Array,
    query_position_bq: Array,
    k_bksd: Array | kv.Int8,
    key_position_bks: Array,
    lse_bkgq: Array,
    form: str = "windowed",
) -> Statistics:
    """Attention statistics of the queries since the last eviction (paper section 3.2).

    Memory is that of the attention of 64 queries, whatever `q` is.

    Args:
      lse_bkgq: what `attend` returned for these queries.
      form: `windowed` sums over the newest queries as the names say; `reference` reproduces the
        released code, in which all of these windows are the sum over all queries.
    """
    arrays = (q_bqhd, query_position_bq, k_bksd, key_position_bks, lse_bkgq)
    return row_by_row(functools.partial(_statistics, form), *arrays)


def _statistics(form, q_bqhd, query_position_bq, k_bksd, key_position_bks, lse_bkgq):
    queries = q_bqhd.shape[1]
    before = max(queries - _BLOCK, 0)
    block = math.gcd(before, _BLOCK)

    def given(start, count):
        """What queries [start, start + count) give, [b, k, g, count, s], and which are real."""
        q = jax.lax.dynamic_slice_in_dim(q_bqhd, start, count, 1)
        position = jax.lax.dynamic_slice_in_dim(query_position_bq, start, count, 1)
        lse = jax.lax.dynamic_slice_in_dim(lse_bkgq, start, count, 3)
        seen = visible(position, key_position_bks)
        p = jnp.exp(logits(q, k_bksd, seen) - lse[..., None])
        p = jnp.where(seen[:, :, None], p, 0.0)  # padding queries give nothing
        return p, (position >= 0)[:, None, None, :, None]

    def gather(sums, p, real):
        largest, smallest, total = sums
        return (
            jnp.maximum(largest, p.max(3)),
            jnp.minimum(smallest, jnp.where(real, p, 1.0).min(3)),
            total + p.sum(3),
        )

    def older(sums, i):
        return gather(sums, *given(i * block, block)), None

    nothing = jnp.zeros((*lse_bkgq.shape[:3], k_bksd.shape[2]), jnp.float32)
    sums = (nothing, nothing + 1.0, nothing)
    if before:
        sums, _ = jax.lax.scan(older, sums, jnp.arange(before // block))
    p, real = given(before, queries - before)
    largest, smallest, total = gather(sums, p, real)

    def last(n):
        return total if form == "reference" else p[..., -n:, :].sum(3)

    stats = Statistics(largest, smallest, total, last(8), last(16), last(32))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 3), stats)
