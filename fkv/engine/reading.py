"""The programs that read prompts into rows, see `fkv.engine.steps`.

Prompts are read in pieces, short ones several at a time. A program takes row after row, so that
what becomes of a row is the same to the bit however many are read beside it: products of other
shapes would add up in another order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fkv import models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.engine import replay, steps
from fkv.engine.replay import Site, Staged
from fkv.models import LM
from fkv.policies.base import Policy


def _in_turn(function: Callable[..., Any], *arrays_b: Any) -> Any:
    """`function` of pytrees of arrays [b, ...], one row after the other."""
    rows = len(jax.tree.leaves(arrays_b)[0])
    if rows == 1:
        return function(*arrays_b)

    def one(arrays):
        found = function(*jax.tree.map(lambda x: x[None], arrays))
        return jax.tree.map(lambda x: x[0], found)

    return jax.lax.map(one, arrays_b)


@jax.jit
def embed(lm: LM, token_bt: Array) -> Array:
    """Hidden states [b, t, m] before the first layer."""
    return models.embed(lm, token_bt)


@functools.partial(jax.jit, static_argnames="room", donate_argnames=("hidden_btm", "held"))
def read_layer(
    weights: models.Params,
    policy: Policy,
    site: Site,
    hidden_btm: Array,
    position_bt: Array,
    held: Staged | kv.Cache | None = None,
    room: int = 0,
) -> tuple[Array, Staged | kv.Cache]:
    """One layer over a piece of each row's prompt, whole chunks of it.

    Args:
      weights: of this layer.
      policy: of all layers; `site.layer` selects one.
      hidden_btm, position_bt: of the pieces; only before them there is padding.
      held: what the pieces before them left; None at the beginning. For a policy that evicts, a
        cache without a chunk is one whose eviction is done.
      room: slots of a full cache that begins here, see `room_to_read`.

    Returns:
      The layer's output, in the buffer of its input; and the layer before the eviction that
      follows, or a full cache without a ring.
    """
    one = jax.tree.map(lambda x: x[site.layer], policy)

    def read(hidden_btm, position_bt, held, key_b, prompt_b):
        at = site.replace(key_b=key_b, prompt_b=prompt_b)
        qkv = replay.project(one, at.config, at.layer, weights, hidden_btm, position_bt)
        if policy.evicts:
            out, held = _read_evicting(one, at, qkv, position_bt, held)
        else:
            out, held = _read_full(at.config, qkv, position_bt, held, room)
        return models.finish(at.config, weights, hidden_btm, out), held

    return _in_turn(read, hidden_btm, position_bt, held, site.key_b, site.prompt_b)


def _read_evicting(policy, site, qkv, position_bt, held):
    """Attention of a piece, and the layer before the eviction that follows."""
    if isinstance(held, kv.Cache):
        index = steps.age(position_bt[:, : site.cadence.interval])
        return replay.pass_after(policy, site, held, qkv, position_bt, index)
    if held is not None:
        out, held, _, _ = replay.pass_from(policy, site, held, qkv, position_bt)
        return out, held
    first = replay.beginning(policy, site.cadence, position_bt.shape[1])
    begun, rest = (
        jax.tree.map(lambda x, part=part: x[:, part], qkv)
        for part in (slice(first), slice(first, None))
    )
    at = position_bt[:, :first]
    out, held = replay.begin_layer(policy, site.config, site.cadence, begun, at)
    held = held.replace(chunk=held.chunk.replace(index=steps.age(held.chunk.position_bl)))
    if first < position_bt.shape[1]:
        at = position_bt[:, first:]
        more, held, _, _ = replay.pass_from(policy, site, held, rest, at)
        out = jnp.concatenate([out, more], axis=1)
    return out, held


# Earlier keys, and queries of a piece, that meet at a time.
_KEYS, _QUERIES = 512, 256


def room_to_read(room: int, piece: int) -> int:
    """Slots of a row's full cache while its prompt is read: whole tiles, and room for padding."""
    return -(-(room + piece) // _KEYS) * _KEYS


def tiles(earlier: int) -> int:
    """How many tiles of keys a piece attends to that so many tokens come before."""
    return -(-earlier // _KEYS)


def _read_full(config, qkv, position_bt, held, room):
    """Attention of a piece to what is held and itself, and the full cache: slot i has token i."""
    k, v = (kv.stored(x, config.cache_dtype) for x in qkv[1:])
    out, lse = attention.full_attention(qkv[0], k, v, position_bt)
    padding = jnp.argmax(position_bt[0] >= 0)
    start = position_bt[0, padding]
    if held is None:
        dtype = config.cache_dtype or qkv[0].dtype
        held = kv.init(1, config.kv_heads, room, config.head_dim, dtype)
    else:
        out = _with_earlier(qkv[0], position_bt, held, start, (out, lse))
    k, v, position = jax.tree.map(lambda x: jnp.roll(x, -padding, axis=1), (k, v, position_bt))
    return out, kv.append(held, start, k, v, position)


def _with_earlier(q_bthd, position_bt, held, count, own):
    """Attention to the first `count` entries, joined with that of `own`."""

    def block(inputs):
        q, position, out, lse = inputs

        def tile(carry):
            i, out, lse = carry
            part = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=i * _KEYS, slice_size=_KEYS, axis=2
            )
            some = jax.tree.map(part, held)
            seen = attention.visible(position, some.position_bks)
            more, other = attention.attend(q, some.key_bksd, some.value_bksd, seen)
            both = jnp.logaddexp(lse, other)
            out = out * share(lse, both) + more.astype(jnp.float32) * share(other, both)
            return i + 1, out, both

        def share(lse, both):  # [b, k, g, q] to [b, q, h, 1]
            return jnp.moveaxis(jnp.exp(lse - both), 3, 1).reshape(*q.shape[:3], 1)

        begun = jnp.int32(0), out.astype(jnp.float32), lse
        return jax.lax.while_loop(lambda carry: carry[0] * _KEYS < count, tile, begun)[1]

    t, (out, lse) = q_bthd.shape[1], own
    blocks = -(-t // _QUERIES)
    size = -(-t // blocks)

    def split(x, axis, value=0):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, blocks * size - t)
        x = jnp.pad(x, pad, constant_values=value)
        x = x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    arrays = split(q_bthd, 1), split(position_bt, 1, -1), split(out, 1), split(lse, 3)
    joined = jnp.moveaxis(jax.lax.map(block, arrays), 0, 1)
    return joined.reshape(1, blocks * size, *out.shape[2:])[:, :t].astype(out.dtype)


@functools.partial(jax.jit, static_argnames="top")
def first_token(
    lm: LM, rows: steps.Rows, hidden_bm: Array, position_b: Array, top: int | None
) -> steps.Drawn:
    """What is drawn after prompts.

    Args:
      hidden_bm, position_b: after the last layer, of each prompt's last token.
    """

    def draw(hidden_bm, rows, position_b):
        return steps.draw(lm, hidden_bm, rows, position_b + 1, top)

    drawn = _in_turn(draw, hidden_bm, rows, position_b)
    return jax.tree.map(lambda x: x[:, None], drawn)


@functools.partial(jax.jit, donate_argnames="cache")
def place_layer(
    policy: Policy,
    cache: kv.Cache,
    held: Staged | kv.Cache,
    site: Site,
    read_r: Array,
    row_r: Array,
) -> kv.Cache:
    """Puts a layer of prompts, after the eviction at their end, into rows of a batch, in place.

    Args:
      held: of the rows that were read together.
      read_r: which of them.
      row_r: of the batch, for each; the same one several times does no harm.
    """
    evicting = jax.tree.map(lambda x: x[site.layer], policy)
    rings = [(0, 0), (0, 0), (0, site.cadence.interval)]

    def place(i, cache):
        some = held, site.key_b, site.prompt_b
        one, key_b, prompt_b = jax.tree.map(lambda x: x[read_r[i]][None], some)
        if policy.evicts:
            at = site.replace(key_b=key_b, prompt_b=prompt_b)
            one = replay.evict(evicting, one.cache, one.chunk, at)[2]
        else:
            room = cache.position_bks.shape[-1] - site.cadence.interval
            one = jax.tree.map(lambda x: x[:, :, :room], one)
            one = one.replace(position_bks=jnp.pad(one.position_bks, rings, constant_values=-1))

        def put(x, new):
            return jax.lax.dynamic_update_slice(x, new, (row_r[i], *[0] * (x.ndim - 1)))

        return jax.tree.map(put, cache, one)

    if len(read_r) == 1:
        return place(0, cache)
    return jax.lax.fori_loop(0, len(read_r), place, cache)


@functools.partial(jax.jit, static_argnames="room")
def take_layer(
    policy: Policy,
    cache: kv.Cache,
    asked: steps.Asked | None,
    site: Site,
    row: Array | int,
    room: int,
) -> Staged | kv.Cache:
    """A layer of one row of a batch, anywhere between two borders, as `read_layer` leaves it.

    Args:
      room: slots of a full cache, see `room_to_read`.
    """
    interval = site.cadence.interval

    def take(x, axis=0):
        return jax.lax.dynamic_slice_in_dim(x, row, 1, axis)

    one = jax.tree.map(take, cache)
    if policy.evicts:
        asked = jax.tree.map(functools.partial(take, axis=1), asked)
        return Staged(one, asked.chunk(one.position_bks[:, 0, -interval:]))
    more = room - one.position_bks.shape[-1]
    start = one.position_bks[0, 0, -interval]

    def moved(x, value=0):
        ring = x[:, :, -interval:]
        x = jnp.pad(
            x[:, :, :-interval],
            [(0, 0)] * 2 + [(0, more + interval)] + [(0, 0)] * (x.ndim - 3),
            constant_values=value,
        )
        return jax.lax.dynamic_update_slice_in_dim(x, ring, start, axis=2)

    moves = jax.tree.map(moved, one)
    return moves.replace(position_bks=moved(one.position_bks, -1))


@jax.jit
def continue_layer(held: Staged | kv.Cache, count: Array | int) -> Staged | kv.Cache:
    """A copy of a layer as `read_layer` left it, without the tokens from that position on.

    None of them may have been seen by an eviction.
    """

    def cut(position):
        return jnp.where(position < count, position, -1)

    held = jax.tree.map(jnp.copy, held)  # reading on reuses the buffers
    if isinstance(held, kv.Cache):
        return held.replace(position_bks=cut(held.position_bks))
    cache = held.cache.replace(position_bks=cut(held.cache.position_bks))
    position = cut(held.chunk.position_bl)
    return Staged(cache, held.chunk.replace(position_bl=position, index=steps.age(position)))
