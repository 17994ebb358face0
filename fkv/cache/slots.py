"""The fixed-shape masked KV cache of one layer.

Of the `B + L` slots per KV head, [0, B) hold the kept entries and [B, B + L) are the staging ring
into which the newest tokens are written. When the ring is full, `admit` drops exactly `L` entries
and moves the staged entries that survive into the freed slots: at most `L` rows move. A cache that
is still filling runs the same code, as empty slots are dropped first. The order of slots does not
matter, as keys are cached after rotation; `position` says which token a slot holds.

Keys and values are held in the model's dtype, or as `Int8`: quantised once, on arrival. An eviction
moves integers and their scales, bit for bit.

Letters: b batch, k KV heads, s slots (B + L), l interval (L), d head dim.
"""

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import kinds


@flax.struct.dataclass
class Int8:
    """Vectors quantised to 8 bits with a scale each: approximately `value * scale`.

    Attributes:
      value: [..., d], int8.
      scale: [...], float32: the largest magnitude in the vector over 127.
    """

    value: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def quantise(x: Array) -> Int8:
    """Rounds vectors [..., d] to the nearest of 255 multiples of their scale."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    value = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return Int8(value.astype(jnp.int8), scale)


def stored(x: Array, cache_dtype: str) -> Array | Int8:
    """Vectors [..., d] as a cache of this `ModelConfig.cache_dtype` holds them."""
    return quantise(x) if cache_dtype == "int8" else x


def dense(x: Array | Int8) -> Array:
    """Vectors [..., d] as floats: float32 for `Int8`, others unchanged."""
    return x.value * x.scale[..., None] if isinstance(x, Int8) else x


@flax.struct.dataclass
class Cache:
    """One layer's cache.

    Attributes:
      key_bksd, value_bksd: entries, in the model's dtype or `Int8`; zeros where empty.
      position_bks: absolute position of each entry, int32, -1 where empty.
      entry: a pytree of [b, k, s, ...] arrays that travel with the entries (statistics).
    """

    key_bksd: Array | Int8
    value_bksd: Array | Int8
    position_bks: Array
    entry: Any = ()

    __repr__ = kinds.one_line


def init(
    batch: int, kv_heads: int, slots: int, head_dim: int, dtype: jnp.dtype, entry: Any = ()
) -> Cache:
    """An empty cache.

    Args:
      slots: B + L.
      dtype: of keys and values; int8 makes them `Int8`.
      entry: pytree of `jax.ShapeDtypeStruct` with the trailing shape of each statistic; the
        cache holds zeros of shape [batch, kv_heads, slots, *trailing].
    """
    lead = (batch, kv_heads, slots)

    def empty():
        # Zeros, not uninitialised memory: a NaN times a zero weight is NaN.
        x = jnp.zeros((*lead, head_dim), dtype)
        return Int8(x, jnp.zeros(lead)) if x.dtype == jnp.int8 else x

    entry = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), entry)
    return Cache(empty(), empty(), jnp.full(lead, -1, jnp.int32), entry)


def unit_axes(array_bk: Array | Int8) -> tuple[int, ...]:
    """Which of the axes b and k have length one.

    XLA drops such axes from products. On a CPU, a cache whose updates still have them is copied at
    every token, so updates, products and the carry of the decoding loop all drop them.
    """
    return tuple(axis for axis in (0, 1) if array_bk.shape[axis] == 1)


def append(
    cache: Cache, slot: int | Array, key_btkd: Array | Int8, value_btkd: Array | Int8,
    position_bt: Array, arrived: Any = None,
) -> Cache:  # fmt: skip
    """Writes `t` new tokens at slots [slot, slot + t), the same slots for every row and head.

    Args:
      key_btkd, value_btkd: quantised here for an `Int8` cache, unless they already are.
      position_bt: absolute positions, -1 for padding (the slot is then empty).
      arrived: a pytree of [b, t, k, ...], written to `cache.entry["arrived"]`.
    """
    b, t, k, d = key_btkd.shape
    chex.assert_shape([cache.key_bksd, cache.value_bksd], (b, k, None, d))
    chex.assert_shape(value_btkd, key_btkd.shape)
    chex.assert_shape(position_bt, ({1, b}, t))
    position = jnp.broadcast_to(position_bt[:, None], (b, k, t))
    axes = unit_axes(cache.position_bks)

    def write(array, new):
        array, new = jnp.squeeze(array, axes), jnp.squeeze(new.astype(array.dtype), axes)
        array = jax.lax.dynamic_update_slice_in_dim(array, new, slot, axis=2 - len(axes))
        return jnp.expand_dims(array, axes)

    def take_in(held, new):
        if isinstance(held, Int8) and not isinstance(new, Int8):
            new = quantise(new)
        new = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), new)
        return jax.tree.map(write, held, new)

    key, value = take_in(cache.key_bksd, key_btkd), take_in(cache.value_bksd, value_btkd)
    entry = cache.entry
    if arrived:
        entry = {**entry, "arrived": jax.tree.map(take_in, entry["arrived"], arrived)}
    return Cache(key, value, write(cache.position_bks, position), entry)


def flush(cache: Cache, interval: int) -> Cache:
    """Moves the staging ring of a cache that does not evict to each row's own next slots.

    Slot i holds token i, and the ring those from its first one's position on. Rows that are done
    may lose what they hold.
    """
    b, k, slots = cache.position_bks.shape
    room = slots - interval
    start_b = jnp.maximum(cache.position_bks[:, 0, room], 0)

    def one(row, cache):
        def put(x):
            at, size = (row, 0, room, *[0] * (x.ndim - 3)), (1, k, interval, *x.shape[3:])
            ring = jax.lax.dynamic_slice(x, at, size)
            return jax.lax.dynamic_update_slice(x, ring, (row, 0, start_b[row], *at[3:]))

        return jax.tree.map(put, cache)

    cache = one(0, cache) if b == 1 else jax.lax.fori_loop(0, b, one, cache)
    empty = jnp.full((b, k, interval), -1, jnp.int32)
    position = jax.lax.dynamic_update_slice(cache.position_bks, empty, (0, 0, room))
    return cache.replace(position_bks=position)


def choose(importance_bks: Array, position_bks: Array, interval: int) -> Array:
    """Slots of the `interval` least important entries [b, k, interval], lowest first.

    Empty slots come before all entries; ties go to the lower slot.
    """
    importance = jnp.maximum(importance_bks, jnp.finfo(importance_bks.dtype).min)  # -inf is "empty"
    importance = jnp.where(position_bks < 0, -jnp.inf, importance)
    return jax.lax.top_k(-importance, interval)[1]


def moves(evict_bkl: Array, slots: int) -> tuple[Array, Array]:
    """Which staged entry `admit` moves into which freed slot.

    Args:
      evict_bkl: exactly `L` distinct slots to drop, in any order.
      slots: B + L.

    Returns:
      target [b, k, l]: the kept slot that receives the j-th row moved, or an index out of bounds
        (distinct ones) where nothing moves; source [b, k, l]: its slot in the staging ring.
    """
    interval = evict_bkl.shape[-1]
    budget = slots - interval
    offset = jnp.arange(interval, dtype=evict_bkl.dtype)
    # Sorted, so that placement depends only on the set of evicted slots.
    freed = jnp.sort(evict_bkl, axis=-1)
    dropped = (evict_bkl[..., :, None] == budget + offset[None, None, None]).any(-2)
    survivors_first = jnp.argsort(dropped, axis=-1, stable=True)
    # As many kept slots are freed as staged entries survive, so they pair up.
    target = jnp.where(freed < budget, freed, slots + offset[None, None])
    return target, budget + survivors_first


def admit(cache: Cache, evict_bkl: Array) -> Cache:
    """Drops the entries in the given slots, keeps the staged survivors, and empties the ring.

    Args:
      evict_bkl: exactly `L` distinct slots per row and head, in either region.
    """
    chex.assert_shape(evict_bkl, (*cache.position_bks.shape[:2], None))
    slots, interval = cache.position_bks.shape[-1], evict_bkl.shape[-1]
    target, source = moves(evict_bkl, slots)
    moved = jax.tree.map(lambda x: move(x, target, source), cache)
    empty = jnp.full((*evict_bkl.shape[:2], interval), -1, jnp.int32)
    position = jax.lax.dynamic_update_slice(moved.position_bks, empty, (0, 0, slots - interval))
    return moved.replace(position_bks=position)


def move(array_bks: Array, target_bkl: Array, source_bkl: Array) -> Array:
    """Copies rows `source` to rows `target` along the slot axis of [b, k, s, ...]."""

    def over_heads(function):
        return jax.vmap(jax.vmap(function))

    def put(array, target, row):
        return array.at[target].set(row, mode="drop", unique_indices=True, indices_are_sorted=True)

    row_bkl = over_heads(lambda array, source: array[source])(array_bks, source_bkl)
    # Read before the first is written: else a TPU copies the whole cache, twice.
    row_bkl = jax.lax.optimization_barrier(row_bkl)
    return over_heads(put)(array_bks, target_bkl, row_bkl)
