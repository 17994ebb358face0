"""Attention over a cache, full causal attention in query blocks, and what an eviction looks at.

Letters: b batch, t tokens, q queries, s cache slots, h query heads, k KV heads, g query heads per
KV head, d head dim. A key is visible to a query when its position is known (-1 = empty or padding)
and not later than the query's. Softmax and statistics are float32 whatever the inputs are.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv.errors import UserError

# Finite, so that a query that sees nothing (padding) gives numbers and not NaN.
MASKED = -1e30


def einsum_f32(spec: str, x: Array, y: Array) -> Array:
    """`einsum` accumulated and returned in float32, whatever the inputs are."""
    if jax.default_backend() == "cpu":  # which has no dot of two bfloat16 into a float32
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def group_queries(q_bqhd: Array, kv_heads: int) -> Array:
    """Query heads sorted by the KV head they share: [b, q, h, d] -> [b, q, k, g, d]."""
    b, q, h, d = q_bqhd.shape
    return q_bqhd.reshape(b, q, kv_heads, h // kv_heads, d)


def logits(q_bqhd: Array, k_bksd: Array, visible_bkqs: Array) -> Array:
    """Scaled, masked attention logits [b, k, g, q, s] in float32."""
    # The queries are transposed, which are few: left to XLA, the CPU transposes the product.
    q = jnp.moveaxis(group_queries(q_bqhd, k_bksd.shape[1]), 1, 3)
    x = einsum_f32("bkgqd,bksd->bkgqs", q, k_bksd)
    return jnp.where(visible_bkqs[:, :, None], x * q.shape[-1] ** -0.5, MASKED)


def visible(query_position_bq: Array, key_position_bks: Array) -> Array:
    """Which keys each query may see, [b, k, q, s] (k is 1 when the heads share positions)."""
    key = key_position_bks[:, :, None, :]
    return (key >= 0) & (key <= query_position_bq[:, None, :, None])


def attend(q_bqhd: Array, k_bksd: Array, v_bksd: Array, visible_bkqs: Array) -> tuple[Array, Array]:
    """Softmax attention.

    Returns:
      The attended values [b, q, h, d] in the dtype of the values, and the log-sum-exp of the
      logits [b, k, g, q] (float32).
    """
    x = logits(q_bqhd, k_bksd, visible_bkqs)
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    p = jnp.exp(x - top)
    total = p.sum(-1)
    # Heads first: asked for queries first, XLA on the CPU transposes the cache before multiplying.
    out = einsum_f32("bkgqs,bksd->bkgqd", p.astype(v_bksd.dtype), v_bksd) / total[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(q_bqhd.shape).astype(v_bksd.dtype), top[
        ..., 0
    ] + jnp.log(total)


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
      kernel: `plain` for `attend` itself, `pallas` for `fkv.kernels`, on a GPU or a TPU;
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
    from fkv import kernels  # Pallas takes a while, and few ask for it

    interpret = kernel == "interpret"
    platform = "gpu" if interpret else jax.default_backend()
    return kernels.decode_attention(
        q_bqhd, k_bksd, v_bksd, query_position_bq[:, 0], key_position_bks, platform,
        interpret=interpret,
    )  # fmt: skip


def full_attention(
    q_bthd: Array, k_btkd: Array, v_btkd: Array, position_bt: Array, block: int = 256
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
    k_bktd, v_bktd = jnp.moveaxis(k_btkd, 1, 2), jnp.moveaxis(v_btkd, 1, 2)
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


def statistics(
    q_bqhd: Array,
    query_position_bq: Array,
    k_bksd: Array,
    key_position_bks: Array,
    form: str = "windowed",
) -> Statistics:
    """Attention statistics of the queries since the last eviction (paper section 3.2).

    Args:
      form: `windowed` sums over the newest queries as the names say; `reference` reproduces the
        released code, in which all of these windows are the sum over all queries.
    """
    seen = visible(query_position_bq, key_position_bks)
    p = jax.nn.softmax(logits(q_bqhd, k_bksd, seen), axis=-1)  # [b, k, g, q, s]
    p = jnp.where(seen[:, :, None], p, 0.0)  # padding queries give nothing
    real = (query_position_bq >= 0)[:, None, None, :, None]

    def last(n):
        return p.sum(3) if form == "reference" else p[..., -n:, :].sum(3)

    stats = Statistics(
        largest=p.max(3),
        smallest=jnp.where(real, p, 1.0).min(3),
        total=p.sum(3),
        last_8=last(8),
        last_16=last(16),
        last_32=last(32),
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 2, 3), stats)
