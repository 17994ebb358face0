"""A text that is read once and asked about many times: its cache after the eviction at its end.

It is evicted as it comes, as any prompt is; or once at its end, from the full cache down to the
budget, as the prefill presses of kvpress do. Either way nothing of it depends on what is asked.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds, models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import reading, replay
from fkv.engine.batch import rounded
from fkv.engine.memory_maps import make_room
from fkv.engine.requests import cut, piece_of
from fkv.engine.state import Chunk, Site
from fkv.errors import UserError
from fkv.models import LM
from fkv.policies.base import Policy, check_given, defines, name_of, setting
from fkv.policies.wrapper import Wrapper

STREAM, END = "stream", "end"
WHEN = kinds.one_of((STREAM, END))


@dataclasses.dataclass(frozen=True)
class Compressed:
    """The cache of a text.

    Attributes:
      tokens: of the text, int32 [t].
      held: per layer the entries of one row, with an empty staging ring; of a full cache token i in
        slot i.
      policy, cadence: that evict what comes after it.
      evictions: of a head so far.
    """

    tokens: np.ndarray
    held: tuple[kv.Cache, ...]
    policy: Policy
    cadence: Cadence
    evictions: int

    @property
    def bytes(self) -> int:
        """That it takes, empty slots included."""
        return sum(x.nbytes for x in jax.tree.leaves(self.held))

    def positions(self) -> list[list[np.ndarray]]:
        """Positions of the entries of each layer and KV head, ascending, int32."""
        found = []
        for one in self.held:
            heads = np.sort(np.asarray(one.position_bks[0]), axis=-1)
            found.append([head[head >= 0] for head in heads])
        return found

    @property
    def entries(self) -> int:
        """Most that a head holds."""
        return max(int((one.position_bks >= 0).sum(-1).max()) for one in self.held)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a text is read.

    Attributes:
      when: `stream`, evicted as it comes, or `end`, once at its end.
      room: entries that a head can hold beyond the budget before more is evicted: for the tokens of
        questions and answers.
      newest: with `end`, how many of the newest tokens stay whatever their scores; None for what
        the policy protects. Presses of kvpress that score all tokens have 0.
    """

    when: str = STREAM
    room: int = 0
    newest: int | None = None

    def __post_init__(self):
        kinds.check("when", self.when, WHEN)
        kinds.check("room", self.room, kinds.whole(0))
        if self.newest is not None:
            kinds.check("newest", self.newest, kinds.whole(0))
            if self.when != END:
                raise UserError(f"newest = {self.newest} is for when = 'end' only")


def compress(
    lm: LM,
    policy: Policy,
    cadence: Cadence,
    tokens: np.ndarray,
    key: Array,
    reading: Reading = Reading(),
) -> Compressed:
    """Reads a text.

    Memory is linear in its length; with `end`, one layer's full cache is held at a time.

    Args:
      lm: with separate or stacked layers, one of which is read at a time.
      key: for policies that draw.

    Raises:
      UserError: the policy doesn't fit the model, or the budget holds the whole text.
    """
    replay.check(policy, lm.config, cadence, 1)
    make_room()
    tokens = np.asarray(tokens, np.int32)
    site = Site(lm.config, cadence, 0, key[None], np.array([len(tokens)], np.int32))
    if not policy.evicts:
        return Compressed(tokens, tuple(_streamed(lm, policy, site, tokens)), policy, cadence, 0)
    if len(tokens) <= cadence.budget:
        raise UserError(
            f"budget = {cadence.budget} holds all {len(tokens)} tokens of the text: give a smaller "
            "one, or policy = 'full'"
        )
    if reading.when == STREAM:
        held = _streamed(lm, policy, site, tokens)
        held = [_evict(policy, one, site.replace(layer=np.int32(i))) for i, one in enumerate(held)]
        fired = cadence.evictions_generating(len(tokens), 2)
    else:
        held, fired = _at_end(lm, _with_newest(policy, reading.newest), site, tokens), 1
    after = cadence
    if reading.room:
        more = -(-reading.room // cadence.interval) * cadence.interval
        after = dataclasses.replace(cadence, budget=cadence.budget + more)
        replay.check(policy, lm.config, after, 1)
        slots = policy.capacity(after.budget) + cadence.interval
        held = [widened(one, slots) for one in held]
    return Compressed(tokens, tuple(held), policy, after, fired)


def read_on(lm: LM, compressed: Compressed, tokens: np.ndarray, prompt: int, key: Array) -> Array:
    """Hidden states after the last layer [t, m] of tokens that follow a text that was evicted.

    Evictions come where decoding would have them.

    Args:
      tokens: [t]; the first `prompt` are read as a prompt, the others came one by one.
      key: of the row.
    """
    interval = compressed.cadence.interval
    padding, first = -prompt % interval, len(compressed.tokens)
    width = -(-(padding + len(tokens)) // interval) * interval
    token, position = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
    here = slice(padding, padding + len(tokens))
    token[0, here], position[0, here] = tokens, first + np.arange(len(tokens))
    hidden = reading.embed(lm, token)
    length = np.array([first + prompt], np.int32)
    site = Site(lm.config, compressed.cadence, 0, key[None], length)
    for i, held in enumerate(compressed.held):
        at = site.replace(layer=np.int32(i))
        hidden, _ = reading.read_layer(
            models.layer(lm, i), compressed.policy, at, hidden, position,
            jax.tree.map(jnp.copy, held),  # as reading on reuses the buffers
        )  # fmt: skip
    return hidden[0, here]


def _streamed(lm, policy, site, tokens):
    """Per layer what reading a text in pieces leaves: `Staged`, or a full cache."""
    interval, piece = site.cadence.interval, piece_of(site.cadence.interval)
    held, room = [None] * lm.config.layers, reading.room_to_read(len(tokens), piece)
    for token, position in cut(tokens, interval, piece):
        hidden = reading.embed(lm, token)
        for i in range(lm.config.layers):
            at = site.replace(layer=np.int32(i))
            hidden, held[i] = reading.read_layer(
                models.layer(lm, i), policy, at, hidden, position, held[i], room
            )
    return held


@jax.jit
def _evict(policy, staged, site):
    one = jax.tree.map(lambda x: x[site.layer], policy)
    return replay.evict(one, staged.cache, staged.chunk, site)[2]


def _at_end(lm, policy, site, tokens):
    """Per layer the entries that one eviction of the full cache leaves."""
    if defines(policy, "drop") or not defines(policy, "score"):
        raise UserError(
            f"{name_of(policy)} does not choose by score(view), as when = 'end' needs: "
            "set when = 'stream'"
        )
    interval = site.cadence.interval
    width, held = rounded(len(tokens), interval), []
    token = np.pad(tokens, (width - len(tokens), 0))[None]
    position = np.arange(width, dtype=np.int32)[None] - (width - len(tokens))
    hidden, position = reading.embed(lm, token), np.maximum(position, -1)
    for i in range(lm.config.layers):
        at = site.replace(layer=np.int32(i))
        hidden, one = _layer_at_end(models.layer(lm, i), policy, at, hidden, position)
        held.append(one)
    return held


@functools.partial(jax.jit, donate_argnames="hidden_btm")
def _layer_at_end(weights, policy, site, hidden_btm, position_bt):
    """One layer over a text with the full cache, and what is left of that."""
    config, cadence = site.config, site.cadence
    policy = jax.tree.map(lambda x: x[site.layer], policy)
    q, *rest = replay.project(policy, config, site.layer, weights, hidden_btm, position_bt)
    k, v = (kv.stored(x, config.cache_dtype) for x in rest[:2])
    out, lse = attention.full_attention(q, k, v, position_bt)
    hidden = models.finish(config, weights, hidden_btm, out)
    key, value, *arrived = (
        jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), x) for x in (k, v, *rest[2:])
    )
    lead = key.shape[:3]
    entry = {"arrived": arrived[0]} if arrived else {}
    if policy.statistics:
        entry |= dict.fromkeys(replay.SUMS, jnp.zeros((*lead, config.group_size)))
    cache = kv.Cache(key, value, jnp.broadcast_to(position_bt[:, None], lead), entry)
    view = replay.look(
        policy, cache, Chunk(q, lse, position_bt, jnp.int32(cadence.fill_chunks)), site
    )
    if not policy.all_queries:
        newest = {n: getattr(view, n)[:, -cadence.interval :] for n in _QUERIES}
        view = view.replace(**newest)
    return hidden, _kept(policy, view)


_QUERIES = "query_blhd", "query_position_bl"


def _kept(policy, view):
    """The entries that stay, in order of their positions, before an empty staging ring."""
    room = policy.capacity(view.budget)
    importance, position = policy.importance(view), view.cache.position_bks
    keep = policy.keep(view, importance)
    check_given(policy, "keep", keep, importance.shape[:2], jnp.integer)
    rank = jnp.argsort(jnp.argsort(-importance, axis=-1), axis=-1)
    kept = (rank < jnp.minimum(keep, room)[..., None]) & (position >= 0)
    slot = jnp.argsort(~kept, axis=-1, stable=True)[..., :room]
    there = jnp.take_along_axis(kept, slot, axis=-1)

    def take(x, value=0):
        lead = (...,) + (None,) * (x.ndim - 3)
        x = jnp.take_along_axis(x, slot[lead], axis=2)
        return jnp.where(there[lead], x, jnp.asarray(value, x.dtype))

    left = jax.tree.map(take, view.cache).replace(position_bks=take(position, -1))
    return widened(left, room + view.interval)


def widened(cache: kv.Cache, slots: int) -> kv.Cache:
    """The cache with at least so many slots, the new ones empty."""
    more = slots - cache.position_bks.shape[-1]
    if more <= 0:
        return cache

    def pad(x, value=0):
        ends = [(0, 0), (0, 0), (0, more), *[(0, 0)] * (x.ndim - 3)]
        return jnp.pad(x, ends, constant_values=value)

    return jax.tree.map(pad, cache).replace(position_bks=pad(cache.position_bks, -1))


class Newest(Wrapper):
    """As `policy`, but so many of the newest entries stay whatever their scores."""

    newest: int = setting(kinds.whole(0), 0)

    def protected(self, view):
        return self.newest

    def importance(self, view):
        return Policy.importance(self, view)


def _with_newest(policy: Policy, newest: int | None) -> Policy:
    if newest is None:
        return policy
    inner: Any = getattr(policy, "policy", None)
    if isinstance(inner, Policy):
        return policy.replace(policy=_with_newest(inner, newest))
    return Newest(policy, newest)
