"""Array products: their precision, and everything that differs by platform.

The choice is made when a program is lowered, not when it is traced: one trace compiles for CPU,
GPU and TPU, with or without the device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a query that sees no key (padding) gives numbers, not NaN.
MASKED = -1e30


def precision(x: Array, y: Array) -> jax.lax.Precision | None:
    """The precision of a product: by default TPUs round float32 to bfloat16, and GPUs to TF32.

    Products of two bfloat16 (or float16) are exact by default, and fast.
    """
    return jax.lax.Precision.HIGHEST if jnp.result_type(x, y) == jnp.float32 else None


def einsum(spec: str, x: Array, y: Array) -> Array:
    """`einsum` in the dtype of the inputs; all float32 products of this package use it."""
    return jnp.einsum(spec, x, y, precision=precision(x, y))


def einsum_f32(spec: str, x: Array, y: Array) -> Array:
    """`einsum` accumulated and returned in float32, whatever the inputs are.

    XLA on a CPU has no bfloat16 product accumulated in float32: there, the inputs are cast.
    """

    def product(x, y):
        return jnp.einsum(spec, x, y, precision=precision(x, y), preferred_element_type=jnp.float32)

    def cast(x, y):
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    if jnp.result_type(x, y) == jnp.float32:  # the same everywhere
        return cast(x, y)
    return jax.lax.platform_dependent(x, y, cpu=cast, default=product)


# A TPU multiplies fewer rows on its vector unit, several times slower than it reads the matrix.
ROWS = 8


def linear(spec: str, x_bt: Array, weight: Array, product: Callable[..., Array] = einsum) -> Array:
    """`product` of [b, t, ...] with a weight; on a TPU, of at least eight rows.

    On a CPU, of matrices: of more axes, XLA transposes the weight at every call.
    """
    b, t = x_bt.shape[:2]

    def padded(x_bt, weight):
        more = -(-ROWS // t) - b
        x_bt = jnp.pad(x_bt, [(0, more), *[(0, 0)] * (x_bt.ndim - 1)])
        return product(spec, x_bt, weight)[:b]

    default = functools.partial(product, spec)
    branches = {"tpu": padded} if 0 < b * t < ROWS else {}
    cpu = functools.partial(_matrices, spec, product)
    return jax.lax.platform_dependent(x_bt, weight, cpu=cpu, default=default, **branches)


# Rows up to which a CPU multiplies a weight by them, and not them by the weight: XLA packs the
# right factor anew at every call.
_FEW = 32


def _matrices(spec, product, x_bt, weight):
    """`linear` as a product of two matrices."""
    given, letters = spec.partition("->")[0].split(",")
    inputs = [i for i, letter in enumerate(letters) if letter in given]
    size = math.prod(weight.shape[i] for i in inputs)
    x = x_bt.reshape(-1, size)
    if inputs[0] == 0:
        outputs = weight.shape[len(inputs) :]
        out = product("rk,kn->rn", x, weight.reshape(size, -1))
    else:
        outputs = weight.shape[: inputs[0]]
        weight = weight.reshape(-1, size)
        if 1 < len(x) <= _FEW:
            # Without the barrier, XLA swaps the factors back.
            out = jax.lax.optimization_barrier(product("nk,rk->nr", weight, x)).T
        else:
            out = product("rk,nk->rn", x, weight)
    return out.reshape(*x_bt.shape[: -len(inputs)], *outputs)


def einsum_int8(spec: str, x_bk: Array, y_bk: Array) -> Array:
    """`einsum_f32` of [b, k, ...] floats with [b, k, ...] int8.

    XLA on a CPU does not multiply integers by floats: it materialises the integers as floats, and
    copies the whole cache on the way. One KV head at a time, it copies nothing.
    """

    def together(x_bk, y_bk):
        return einsum_f32(spec, x_bk, y_bk.astype(x_bk.dtype))  # bfloat16 holds them exactly

    def in_turn(x_bk, y_bk):
        def one(head):
            x, y = (jax.lax.dynamic_slice_in_dim(z, head, 1, axis=1) for z in (x_bk, y_bk))
            return together(x, y)[:, 0]

        return jnp.moveaxis(jax.lax.map(one, jnp.arange(y_bk.shape[1])), 0, 1)

    return jax.lax.platform_dependent(x_bk, y_bk, cpu=in_turn, default=together)


def head_by_head(product: Callable[..., Array], q_bkgqd: Array, k_bksd: Array) -> Array:
    """`product` of one query per head with the keys.

    A CPU reads keys twice as fast for a vector as for a matrix of few rows: there, the query heads
    of a group are processed one by one.
    """

    def in_turn(q_bkgqd, k_bksd):
        heads = [product(x, k_bksd) for x in jnp.split(q_bkgqd, q_bkgqd.shape[2], axis=2)]
        return jnp.concatenate(heads, axis=2)

    return jax.lax.platform_dependent(q_bkgqd, k_bksd, cpu=in_turn, default=product)


_BLOCK = 128  # of a vocabulary, of whose blocks a GPU sorts only the maxima


def top_k(x_bv: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest numbers and their indices, [b, k] each; ties go to the lower index.

    XLA on a GPU sorts the whole row: there, the numbers of the `k` blocks with the largest maxima,
    among which they are.
    """
    size = x_bv.shape[-1]
    blocks = -(-size // _BLOCK)
    if k >= blocks:
        return jax.lax.top_k(x_bv, k)

    def in_blocks(x_bv):
        x = jnp.pad(x_bv, ((0, 0), (0, blocks * _BLOCK - size)), constant_values=-jnp.inf)
        largest = x.reshape(-1, blocks, _BLOCK).max(-1)
        block = jnp.sort(jax.lax.top_k(largest, k)[1], axis=-1)
        index = (block[..., None] * _BLOCK + jnp.arange(_BLOCK)[None, None]).reshape(-1, k * _BLOCK)
        some = jnp.take_along_axis(x_bv, jnp.minimum(index, size - 1), axis=-1)
        value, at = jax.lax.top_k(jnp.where(index < size, some, -jnp.inf), k)
        return value, jnp.take_along_axis(index, at, axis=-1)

    def at_once(x_bv):
        return tuple(jax.lax.top_k(x_bv, k))

    return jax.lax.platform_dependent(x_bv, cuda=in_blocks, default=at_once)


def log_sums_to_end(x: Array) -> Array:
    """Log-sum-exps of each entry and all later ones, along the last axis.

    As `lax.cumlogsumexp`, which XLA compiles for minutes on a TPU, a window of the whole axis.
    """
    axis = x.ndim - 1

    def scanned(x):
        return jax.lax.associative_scan(jnp.logaddexp, x, reverse=True, axis=axis)

    def at_once(x):
        return jax.lax.cumlogsumexp(x, axis=axis, reverse=True)

    return jax.lax.platform_dependent(x, tpu=scanned, default=at_once)


# Bytes that an accelerator's on-chip memory holds: 128 MB on a TPU, 50 MB (level 2) on an H100.
ON_CHIP = 2**26


def whole_groups(
    attend: Callable[..., tuple[Array, Array]], q_bqhd: Array, *cached_bk: Any
) -> tuple[Array, Array]:
    """`attend` with one query per head; on a TPU, with at least eight a KV head, as in `linear`.

    Not if the logits of eight don't fit on the chip: to write them costs more.

    Args:
      attend: of queries [b, q, h, d] and what is cached; gives [b, q, h, d] and [b, k, g, q].
      cached_bk: keys first.
    """
    b, q, h, d = q_bqhd.shape
    kv_heads = cached_bk[0].shape[1]
    group = h // kv_heads

    def padded(q_bqhd, *cached_bk):
        x = q_bqhd.reshape(b, q, kv_heads, group, d)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, ROWS - group), (0, 0)))
        out, lse = attend(x.reshape(b, q, -1, d), *cached_bk)
        out = out.reshape(b, q, kv_heads, ROWS, d)[:, :, :, :group]
        return out.reshape(b, q, h, d), lse[:, :, :group]

    slots = cached_bk[0].shape[2]
    if q * group >= ROWS or 4 * b * q * kv_heads * ROWS * slots > ON_CHIP:
        return attend(q_bqhd, *cached_bk)
    return jax.lax.platform_dependent(q_bqhd, *cached_bk, tpu=padded, default=attend)


def row_by_row(
    function: Callable[..., Any],
    *arrays_b: Any,
    of_one: Callable[..., Any] | None = None,
    row_bytes: int = 0,
) -> Any:
    """`function` of pytrees of arrays [b, ...], whose rows are independent.

    Intermediates for one row fit into a CPU's cache, those for eight rows do not: there, rows are
    processed one by one (evictions 1.2 to 1.4 times faster with eight rows). Accelerators take as
    many rows at a time as their on-chip memory holds.

    Args:
      of_one: the same function, written for a CPU's single rows.
      row_bytes: of a row's largest intermediate; 0 to take all rows at a time on accelerators.
    """
    rows = len(jax.tree.leaves(arrays_b)[0])
    most = ON_CHIP // row_bytes if row_bytes else rows
    at_once = next(n for n in range(max(min(most, rows), 1), 0, -1) if rows % n == 0)

    def in_turn(*arrays_b, function=of_one or function, count=1):
        def split(x):
            return x.reshape(-1, count, *x.shape[1:])

        def join(x):
            return x.reshape(rows, *x.shape[2:])

        found = jax.lax.map(lambda some: function(*some), jax.tree.map(split, arrays_b))
        return jax.tree.map(join, found)

    together = functools.partial(in_turn, function=function, count=at_once)
    default = function if at_once == rows else together
    return jax.lax.platform_dependent(*arrays_b, cpu=in_turn, default=default)


def once(function: Callable[[Array], Any], x_bts: Array) -> Any:
    """An elementwise function of numbers [b, t, ...] that others, many to each, are multiplied by.

    On a CPU XLA would compute it again for each of those, were it not in a loop.
    """
    size = x_bts.shape[-1]

    def halves(x_bts):
        parts = jnp.stack(jnp.split(x_bts, 2, axis=-1))
        found = jax.lax.map(function, parts)
        return jax.tree.map(lambda x: jnp.concatenate(list(x), axis=-1), found)

    if size % 2 or math.prod(x_bts.shape[:2]) < _LEAST:
        return function(x_bts)
    return jax.lax.platform_dependent(x_bts, cpu=halves, default=function)


# Tokens that a CPU takes at a time through a layer's products, most and least, and the bytes up to
# which it takes all: they fit into its cache.
_MOST, _LEAST, _FITS = 512, 128, 2**22


def in_pieces(function: Callable[..., Any], *arrays_bt: Array) -> Any:
    """`function` of arrays [b, t, ...], of whose tokens it treats each alone.

    Of all but the first, b may be 1. A CPU takes some at a time: what they leave between products
    stays in its cache, and in memory that is in use already.
    """
    b, t = arrays_bt[0].shape[:2]
    size = next((n for n in range(_MOST, _LEAST - 1, -1) if b * t % n == 0), b * t)
    if b * t <= size or arrays_bt[0].size * arrays_bt[0].dtype.itemsize <= _FITS:
        return function(*arrays_bt)

    def in_turn(*arrays_bt):
        def split(x):
            x = jnp.broadcast_to(x, (b, *x.shape[1:]))
            return x.reshape(-1, 1, size, *x.shape[2:])

        def join(x):
            return x.reshape(b, t, *x.shape[3:])

        found = jax.lax.map(lambda some: function(*some), jax.tree.map(split, arrays_bt))
        return jax.tree.map(join, found)

    return jax.lax.platform_dependent(*arrays_bt, cpu=in_turn, default=function)


def group_queries(q_bqhd: Array, kv_heads: int) -> Array:
    """Query heads grouped by the KV head they share: [b, q, h, d] -> [b, q, k, g, d]."""
    b, q, h, d = q_bqhd.shape
    return q_bqhd.reshape(b, q, kv_heads, h // kv_heads, d)
