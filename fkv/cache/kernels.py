"""Attention with one query per row, as one Pallas kernel for GPUs (Triton) and TPUs (Mosaic).

Each cell of the grid reads the keys and values of one block of slots of one KV head once, for all
query heads of the group, and writes the softmax over this block; the blocks are combined outside
the kernel. Keys and values are never copied: what the last block reads past the cache is masked.

Letters: b batch, q queries (one), s cache slots, h query heads, k KV heads, g query heads per KV
head, d head dim, n blocks of slots.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from fkv.cache.slots import Cache
from fkv.errors import UserError
from fkv.models.numerics import MASKED, group_queries, precision

# The fewest rows of a product of tiles (Triton), and of a bfloat16 tile on a TPU: a group with
# fewer query heads is padded with zeros.
ROWS = 16
# Largest number of slots in a block. On a GPU a power of two whose keys fit into registers; on a
# TPU half a megabyte or more, to amortise the overhead of a cell.
GPU_BLOCK, GPU_BYTES = 128, 2**15
TPU_BLOCK = 2048


def block_slots(slots: int, key_bytes: int, platform: str) -> int:
    """Slots that a cell of the grid reads: on a TPU, all of them or equal blocks of whole tiles."""
    if platform == "gpu":
        return max(ROWS, min(GPU_BLOCK, GPU_BYTES // key_bytes))
    blocks = -(-slots // TPU_BLOCK)
    return slots if blocks == 1 else -(-slots // (128 * blocks)) * 128


def decode_attention(
    q_bqhd: Array, cache: Cache, position_b: Array, platform: str, block: int = 0,
    interpret: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`attention.attend` with one query per row at `position_b`, masked as by `attention.visible`.

    Args:
      platform: `gpu` or `tpu`.
      block: slots that a cell of the grid reads; 0 for the platform's default.
      interpret: run on any device as plain JAX; for tests.

    Raises:
      UserError: the kernel does not support the platform, head dim or dtype.
    """
    k_bksd, v_bksd = cache.key_bksd, cache.value_bksd
    b, kv_heads, slots, d = k_bksd.shape
    if platform == "tpu" and not interpret and k_bksd.dtype == jnp.float16:
        raise UserError(
            "attention_kernel 'pallas' does not support float16 on a TPU: set dtype to 'bfloat16', "
            "or attention_kernel to 'plain'"
        )
    if platform == "gpu" and not interpret and (d < ROWS or d & (d - 1)):
        raise UserError(
            f"attention_kernel 'pallas' needs a head dim that is a power of two from {ROWS} on a "
            f"GPU, and that of the model is {d}: set it to 'plain'"
        )
    load, store, compiler_params = for_platform(platform)
    group = q_bqhd.shape[2] // kv_heads
    block = block or block_slots(slots, d * k_bksd.dtype.itemsize, platform)
    blocks = -(-slots // block)
    rows = max(ROWS, 1 << (group - 1).bit_length())  # a power of two

    q_bkgd = group_queries(q_bqhd, kv_heads)[:, 0]
    q_bkgd = jnp.pad(q_bkgd, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    key_position = jnp.broadcast_to(cache.position_bks, (b, kv_heads, slots))
    beyond = blocks * block - slots
    key_position = jnp.pad(key_position, ((0, 0), (0, 0), (0, beyond)), constant_values=-1)
    key_position = key_position.reshape(b, kv_heads, blocks, 1, block)

    def of_cell(*shape):
        return pl.BlockSpec((None, None, None, *shape), lambda i, j, n: (i, j, n, 0, 0))

    lead = (b, kv_heads, blocks, group)
    of_row = pl.BlockSpec((None, 1, 1), lambda i, j, n: (i, 0, 0))
    of_queries = pl.BlockSpec((None, None, rows, d), lambda i, j, n: (i, j, 0, 0))
    of_block = pl.BlockSpec((None, None, block, d), lambda i, j, n: (i, j, n, 0))
    # Triton's arrays have the padded rows, of which only the group's are written.
    written = rows if platform == "gpu" else group
    out, top, total = pl.pallas_call(
        functools.partial(_cell, (load, store), slots, group),
        grid=(b, kv_heads, blocks),
        in_specs=[of_queries, of_block, of_block, of_row, of_cell(1, block)],
        out_specs=[of_cell(written, width) for width in (d, 1, 1)],
        out_shape=[jax.ShapeDtypeStruct((*lead, width), jnp.float32) for width in (d, 1, 1)],
        compiler_params=compiler_params,
        interpret=interpret,
        name="decode_attention",
    )(q_bkgd, k_bksd, v_bksd, position_b[:, None, None], key_position)

    highest = top.max(2, keepdims=True)
    weight = jnp.exp(top - highest)
    total = (weight * total).sum(2)
    out = (weight * out).sum(2) / total
    return out.reshape(q_bqhd.shape).astype(v_bksd.dtype), highest[:, :, 0] + jnp.log(total)


def _cell(memory, slots, group, *refs):
    """One block: the largest logit [g, 1], sum of weights [g, 1], and weighted values [g, d]."""
    load, store = memory
    q_ref, k_ref, v_ref, position_ref, key_position_ref, *out = refs
    block, d = k_ref.shape

    def inside(shape, axis):
        """Which slots lie within the cache; None if all do."""
        slot = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return pl.program_id(2) * block + slot < slots if slots % block else None

    k, v = (load(ref, inside((block, d), 0)) for ref in (k_ref, v_ref))
    q, over = q_ref[...], (((1,), (1,)), ((), ()))
    x = jax.lax.dot_general(q, k, over, precision(q, k), preferred_element_type=jnp.float32)
    key_position = key_position_ref[...]
    seen = (key_position >= 0) & (key_position <= position_ref[...])
    x = jnp.where(seen, x * d**-0.5, MASKED)
    top = x.max(-1, keepdims=True)
    p = jnp.exp(x - top)
    if (real := inside(p.shape, 1)) is not None:  # matters where a query sees no key at all
        p = jnp.where(real, p, 0.0)
    p_v = p.astype(v.dtype)
    values = jnp.dot(p_v, v, precision=precision(p_v, v), preferred_element_type=jnp.float32)
    for ref, value in zip(out, (values, top, p.sum(-1, keepdims=True)), strict=True):
        store(ref, value, group)


def for_platform(platform: str) -> tuple[Callable, Callable, Any]:
    """How a cell loads and stores its blocks, and the compiler's parameters."""
    if platform == "gpu":
        try:
            from jax.experimental.pallas import triton
        except ImportError:
            raise UserError(
                f"attention_kernel 'pallas' needs Triton on a GPU, which Pallas of JAX "
                f"{jax.__version__} lacks: set it to 'plain'"
            ) from None

        def load(ref, inside):
            # Memory past the cache may not be readable.
            return ref[...] if inside is None else triton.load(ref, mask=inside, other=0)

        def store(ref, value, rows):
            row = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
            triton.store(ref, value, mask=row < rows)

        return load, store, triton.CompilerParams(num_warps=4)
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        def load(ref, inside):
            # Past the cache a block holds arbitrary values, NaN included.
            return ref[...] if inside is None else jnp.where(inside, ref[...], 0)

        def store(ref, value, rows):
            ref[...] = value[:rows]

        return load, store, tpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    raise UserError(
        f"attention_kernel 'pallas' needs a GPU or a TPU, and JAX runs on the {platform.upper()} "
        "here: set it to 'plain'"
    )
