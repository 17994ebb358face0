"""The programs of decoding: rows of fixed shape that come and go.

Decoding is step-outer: unrolled layers with one cache each, a `scan` of steps, and after `L` of
them the border: one eviction of every layer. The steps are a program, and an eviction is another,
compiled once and called layer after layer: that compiles quickly, and only one layer's temporaries
are alive.

A new token is written to the same slot of the staging ring in every row, so rows come at borders:
their prompts are padded on the left to whole chunks, and padding leaves empty slots, which nothing
attends to and which are dropped first. What happens to a row depends on its own tokens, key and
settings only. A policy that does not evict (`full`) has the same ring; at the border it is copied
to the row's own next slots, of which there are enough for prompt and answer.

How prompts are read is in `fkv.engine.reading`.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fkv import models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.replay import Chunk, Site
from fkv.engine.sampling import Samplings, sample
from fkv.keys import Purpose, key_of
from fkv.models import LM, ModelConfig
from fkv.models.decoder import MODEL
from fkv.models.numerics import top_k
from fkv.policies.base import Policy

NO_TOKEN = -1
NOT_FINITE = -2  # stands for a token where logits are NaN or infinite; ends the row


@dataclasses.dataclass(frozen=True)
class Program:
    """What the programs of decoding are compiled for; static under `jit`.

    Attributes:
      cadence: of evictions; for a policy that does not evict, only the interval is used.
      count: steps of a call, at most those up to the border.
      top: so many of the likeliest tokens come with their logprobs; None for no logprobs at all.
    """

    cadence: Cadence
    count: int
    top: int | None = None


@flax.struct.dataclass
class Asked:
    """What the steps since the last eviction asked a layer's cache; see `replay.Chunk`.

    As the scan over steps writes it, the axis of tokens first: each eviction turns its own.
    Position -1 marks rows that were done, and steps to come.
    """

    query_lbhd: Array
    lse_lbkg: Array

    def chunk(self, position_bl: Array) -> Chunk:
        query, lse = jnp.moveaxis(self.query_lbhd, 0, 1), jnp.moveaxis(self.lse_lbkg, 0, -1)
        return Chunk(query, lse, position_bl, age(position_bl))


def age(position_bl: Array) -> Array:
    """Chunks of a row before this one, [b] int32; whole chunks of padding don't count."""
    return -(-(position_bl.max(-1) + 1) // position_bl.shape[-1]) - 1


@flax.struct.dataclass
class Rows:
    """What requests set, of each row; nothing is compiled for it.

    Attributes:
      key_b: one PRNG key per row; a draw depends only on it and on the position.
      prompt_b: tokens of each row's prompt.
      stop_bz: tokens that end a row, filled up with `NO_TOKEN`.
      sampling: of each row.
    """

    key_b: Array
    prompt_b: Array
    stop_bz: Array
    sampling: Samplings


@flax.struct.dataclass
class State:
    """The state of decoding.

    Attributes:
      caches: one per layer.
      asked: one per layer of a policy that evicts.
      token_b: the newest token of each row, drawn but not yet in the cache.
      position_b: its absolute position.
      left_b: how many more tokens each row may draw after `token_b`; 0 when done.
    """

    caches: tuple[kv.Cache, ...]
    asked: tuple[Asked, ...]
    token_b: Array
    position_b: Array
    left_b: Array


@flax.struct.dataclass
class Drawn:
    """Tokens that were drawn, [b, n].

    Attributes:
      token: `NO_TOKEN` for rows that were done, `NOT_FINITE` where there is none.
      logprob: of each, by the model's own distribution, float32; None if not asked for.
      top_token, top_logprob: of the likeliest tokens, [b, n, top].
    """

    token: Array
    logprob: Array | None = None
    top_token: Array | None = None
    top_logprob: Array | None = None


def draw(lm: LM, hidden_bm: Array, rows: Rows, position_b: Array, top: int | None) -> Drawn:
    """One token of each row, at these positions; arrays [b, ...]."""
    logits = models.unembed(lm, hidden_bm[:, None])[:, 0]
    key_b = jax.vmap(lambda key, at: key_of(key, Purpose.TOKEN, at))(rows.key_b, position_b)
    token = sample(logits, key_b, rows.sampling)
    token = jnp.where(jnp.isfinite(logits.max(-1)), token, NOT_FINITE)
    if top is None:
        return Drawn(token)
    total = jax.nn.logsumexp(logits, axis=-1)
    drawn = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0] - total
    if not top:
        return Drawn(token, drawn)
    likeliest, at = top_k(logits, top)
    return Drawn(token, drawn, at, likeliest - total[:, None])


def _left(token_b, left_b, stop_bz):
    """Tokens left after `token_b`: none if it is a stop token or not a token."""
    stopped = (token_b == NOT_FINITE) | (token_b[:, None] == stop_bz).any(-1)
    return jnp.where(stopped, 0, jnp.maximum(left_b - 1, 0))


# ---- steps


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def steps(
    lm: LM, policy: Policy, program: Program, state: State, rows: Rows, start: Array | int
) -> tuple[State, Drawn]:
    """Decoding steps, without the eviction at the border.

    Args:
      lm: with separate layers, which are read in place; stacked ones are copied, all of them.
      rows: what their requests set.
      start: steps since the last border.

    Returns:
      The state, and what was drawn.
    """
    config, interval = lm.config, program.cadence.interval
    weights = [models.layer(lm, i) for i in range(config.layers)]
    ring = state.caches[0].position_bks.shape[-1] - interval
    axes = kv.unit_axes(state.caches[0].position_bks)

    def step(carry, i):
        caches, asked, token, position, left = carry
        caches = jax.tree.map(lambda x: jnp.expand_dims(x, axes), caches)
        live = left > 0
        at = jnp.where(live, position, -1)[:, None]
        hidden, held, queries = models.embed(lm, token[:, None]), [], []
        for n, (layer, cache) in enumerate(zip(weights, caches, strict=True)):
            one = policy if policy.arrive is None else jax.tree.map(lambda x, n=n: x[n], policy)
            q, k, v, *arrived = replay.project(one, config, n, layer, hidden, at)
            cache = kv.append(cache, ring + start + i, k, v, at, *arrived)
            out, lse = attention.attend_one(q, cache, at)
            hidden = models.finish(config, layer, hidden, out)
            held.append(cache)
            queries.append(Asked(q[:, 0], lse[..., 0]))

        def put(x, new):
            return jax.lax.dynamic_update_index_in_dim(x, new, start + i, 0)

        if policy.evicts:
            asked = jax.tree.map(put, asked, tuple(queries))
        drawn = draw(lm, hidden[:, 0], rows, position + 1, program.top)
        token = jnp.where(live, drawn.token, token)
        drawn = drawn.replace(token=jnp.where(live, drawn.token, NO_TOKEN))
        left = jnp.where(live, _left(token, left, rows.stop_bz), 0)
        held = jax.tree.map(lambda x: jnp.squeeze(x, axes), tuple(held))
        return (held, asked, token, jnp.where(live, position + 1, position), left), drawn

    caches = jax.tree.map(lambda x: jnp.squeeze(x, axes), state.caches)
    carry = (caches, state.asked, state.token_b, state.position_b, state.left_b)
    carry, drawn = jax.lax.scan(step, carry, jnp.arange(program.count))
    caches, asked, token, position, left = carry
    caches = jax.tree.map(lambda x: jnp.expand_dims(x, axes), caches)
    drawn = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drawn)
    return State(caches, asked, token, position, left), drawn


@functools.partial(jax.jit, donate_argnames="cache")
def evict_layer(policy: Policy, cache: kv.Cache, asked: Asked | None, site: Site) -> kv.Cache:
    """The border of one layer, whose staging ring is full, in place.

    Its eviction; without a policy that evicts, the ring is moved to each row's own next slots.

    Args:
      policy: of all layers; `site.layer` selects one.
    """
    interval = site.cadence.interval
    if not policy.evicts:
        return kv.flush(cache, interval)
    one = jax.tree.map(lambda x: x[site.layer], policy)
    position_bl = cache.position_bks[:, 0, -interval:]
    return replay.evict(one, cache, asked.chunk(position_bl), site)[2]


def evict(
    config: ModelConfig,
    policy: Policy,
    cadence: Cadence,
    state: State,
    rows: Rows,
    program: Callable[..., kv.Cache] | None = None,
) -> State:
    """The border after `steps`, layer after layer.

    Args:
      program: what `evict_layer` was compiled to, to call in its place.
    """
    program = program or evict_layer
    site = Site(config, cadence, 0, rows.key_b, rows.prompt_b)
    caches, asked = list(state.caches), state.asked or (None,) * config.layers
    for i, one in enumerate(asked):
        caches[i] = program(policy, caches[i], one, site.replace(layer=np.int32(i)))
    return state.replace(caches=tuple(caches))


# ---- shapes


@functools.partial(jax.jit, static_argnames=("rows", "config", "cadence", "room", "dtype", "mesh"))
def empty(
    policy: Policy,
    rows: int,
    config: ModelConfig,
    cadence: Cadence,
    room: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> tuple[tuple[kv.Cache, ...], tuple[Asked, ...]]:
    """`State.caches` without entries, and `State.asked`.

    Args:
      room: entries of a full cache, before its staging ring.
      mesh: devices that the heads are split over.
    """
    heads, interval = config.kv_heads, cadence.interval
    lead = interval, rows, heads
    caches, asked = [], []
    for _ in range(config.layers):
        if policy.evicts:
            caches.append(replay.init_cache(policy, rows, config, cadence, dtype))
            query = jnp.zeros((interval, rows, config.heads, config.head_dim), dtype)
            asked.append(Asked(query, jnp.zeros((*lead, config.group_size))))
        else:
            held_as = config.cache_dtype or dtype
            caches.append(kv.init(rows, heads, room + interval, config.head_dim, held_as))
    made = tuple(caches), tuple(asked)
    if mesh is None:
        return made
    places = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, MODEL), (None, None, MODEL))
    )
    return tuple(
        jax.tree.map(lambda x, place=place: jax.lax.with_sharding_constraint(x, place), part)
        for part, place in zip(made, places, strict=True)
    )


def mesh_of(lm: LM) -> Mesh | None:
    """The devices that a model is split over, if it is."""
    there = getattr(lm.params["embed_vm"], "sharding", None)
    return there.mesh if isinstance(there, NamedSharding) else None
