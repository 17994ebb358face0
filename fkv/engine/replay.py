"""Replay: whole traces through the model under an eviction policy, chunk by chunk.

The tokens are known, so replay is layer-outer: a layer projects all `T` tokens at once, then scans
over chunks of `L` for attention and eviction alone, and only one layer's cache is live. Every
chunk attends to the survivors and itself, so hidden states are those of an evicted cache.

Nothing is evicted before `B + L` tokens are held, whatever the policy: this beginning is causal
attention in one pass, which replays of the same traces can share (`fkv.engine.beginnings`).

The result of a row depends on its own tokens and key only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fkv import models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine.batch import Batch
from fkv.engine.state import Chooser, Chunk, Observer, Projections, Site, Staged, ignore
from fkv.errors import UserError
from fkv.keys import Purpose, key_of, keys_of
from fkv.models import LM, ModelConfig, numerics
from fkv.policies import arrival, base
from fkv.policies.arrival import Arrival
from fkv.policies.base import Policy, View, check_given

DECAY = 0.9
SUMS = "cumulative", "decayed"  # of attention, in `Cache.entry`


def _accumulate(
    cache: kv.Cache, stats: attention.Statistics, newest_b: Array, cadence: Cadence
) -> kv.Cache:
    """Adds an interval's attention to the sums stored with the entries."""
    # Nothing decays while the first B tokens fill the cache.
    decay = jnp.where(newest_b >= cadence.budget, DECAY, 1.0)[:, None, None, None]
    slots = cache.position_bks.shape[-1]
    staged = (jnp.arange(slots) >= slots - cadence.interval)[None, None, :, None]
    before = {name: jnp.where(staged, 0.0, cache.entry[name]) for name in SUMS}
    sums = {
        "cumulative": before["cumulative"] + stats.total,
        "decayed": decay * before["decayed"] + stats.total,
    }
    return cache.replace(entry={**cache.entry, **sums})


def init_cache(
    policy: Policy, batch: int, config: ModelConfig, cadence: Cadence, dtype: jnp.dtype
) -> kv.Cache:
    """An empty cache of one layer, in the model's `cache_dtype` if set, else in `dtype`.

    Args:
      policy: with the arrays of all layers.
    """
    entry = {}
    if policy.statistics:
        entry = dict.fromkeys(SUMS, jax.ShapeDtypeStruct((config.group_size,), jnp.float32))
    if asked := arrival.shapes(policy, config, dtype):
        entry["arrived"] = asked
    slots = policy.capacity(cadence.budget) + cadence.interval
    dtype = config.cache_dtype or dtype
    return kv.init(batch, config.kv_heads, slots, config.head_dim, dtype, entry)


def look(policy: Policy, cache: kv.Cache, chunk: Chunk, site: Site) -> View:
    """What a policy sees at an eviction; its cache has the interval's attention in its sums."""
    stats, newest_b = None, chunk.position_bl.max(-1)
    if policy.statistics:
        stats = attention.statistics(
            chunk.query_blhd, chunk.position_bl, cache.key_bksd, cache.position_bks,
            chunk.lse_bkgl, policy.statistics,
        )  # fmt: skip
        cache = _accumulate(cache, stats, newest_b, site.cadence)

    def draw_key(key, newest):
        # By position, not by chunk: draws of a row do not depend on the padding of the batch.
        return key_of(key, Purpose.EVICTION, site.layer, newest)

    random_b = jax.vmap(draw_key)(site.key_b, newest_b)
    layer = jnp.asarray(site.layer)
    return View(
        cache, chunk.query_blhd, chunk.position_bl, chunk.index, random_b, stats, site.cadence,
        layer, site.config, site.prompt_b, site.cadence.protect_prompt,
    )  # fmt: skip


def evict(
    policy: Policy, cache: kv.Cache, chunk: Chunk, site: Site
) -> tuple[View, Array, kv.Cache]:
    """One layer's eviction, when its staging ring is full; shared by replay and decoding.

    Args:
      policy: with its arrays sliced to this layer.

    Returns:
      What the policy saw, the slots it freed [b, k, l], and the cache after it.
    """
    view = look(policy, cache, chunk, site)
    cache, lead = view.cache, view.cache.position_bks.shape[:2]
    if view.capacity == view.budget:
        slots = policy.evict(view)
        check_given(policy, "evict", slots, (*lead, view.interval), jnp.integer)
        slots = slots.astype(jnp.int32)  # narrower types may overflow
    else:  # dropped entries leave empty slots, which are freed
        drop = policy.drop(view)
        check_given(policy, "drop", drop, cache.position_bks.shape, jnp.bool_)
        position = jnp.where(drop, -1, cache.position_bks)
        cache = cache.replace(position_bks=position)
        slots = kv.choose(jnp.zeros(position.shape), position, view.interval)
    return view, slots, kv.admit(cache, slots)


def check(policy: Policy, config: ModelConfig, cadence: Cadence, rows: int = 2) -> None:
    """Refuses a policy that does not fit the model or the sizes, before anything is run.

    Besides the policy's own check, one eviction is traced on shapes alone.

    Args:
      policy: what the user gave as one.
      rows: of the batch, for policies made for a certain batch.

    Raises:
      UserError: one line that names the policy and both sides.
    """
    base.check(policy, config, cadence)
    if not policy.evicts:
        return
    _one_eviction.eval_shape(policy, config, cadence, rows)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # JAX remembers what it has traced
def _one_eviction(policy, config, cadence, rows):
    cache = init_cache(policy, rows, config, cadence, jnp.float32)
    policy = jax.tree.map(lambda x: x[0], policy)
    chunk = Chunk(
        jnp.zeros((rows, cadence.interval, config.heads, config.head_dim)),
        jnp.zeros((rows, config.kv_heads, config.group_size, cadence.interval)),
        jnp.zeros((rows, cadence.interval), jnp.int32),
        jnp.int32(0),
    )
    key_b, none = row_keys(key_of(0, Purpose.REPLAY), rows), jnp.zeros(rows, jnp.int32)
    site = Site(config, cadence, jnp.int32(0), key_b, none)
    return evict(policy, cache, chunk, site)[1]


def beginning(policy: Policy, cadence: Cadence, length: int) -> int:
    """How many of the first tokens of a batch are held before anything is evicted.

    The first `B + L`, or all of a batch that is shorter. Heads that share a budget unevenly may
    evict earlier: the first `L`.

    Args:
      length: padded length of the batch.
    """
    even = policy.capacity(cadence.budget) == cadence.budget
    return min(length, cadence.slots if even else cadence.interval)


def project(
    policy: Policy,
    config: ModelConfig,
    layer: Array | int,
    weights: models.Params,
    hidden_btm: Array,
    position_bt: Array,
) -> Projections:
    """`models.project` of a layer, and what the policy's `arrive` gives, if it has one.

    Args:
      policy: with its arrays sliced to this layer.
      layer: its index.
      weights: of this layer.
    """
    if policy.arrive is None:
        return models.project(config, weights, hidden_btm, position_bt)

    def some(hidden, at):
        x, q, k, v = models.unrotated(config, weights, hidden)
        asked = arrival.ask(policy, Arrival(hidden, x, q, k, v, at, layer, config))
        return models.rotate(q, at, config), models.rotate(k, at, config), v, asked

    return numerics.in_pieces(some, hidden_btm, position_bt)


def stage(
    policy: Policy,
    config: ModelConfig,
    cadence: Cadence,
    qkv: Projections,
    lse_bkgt: Array,
    position_bt: Array,
) -> Staged:
    """A layer before its first eviction, from a causal pass over the `beginning` of the traces.

    Args:
      policy: any of the same capacity and statistics; its arrays are not read.
      qkv: keys and values as the cache stores them, and what arrived.
      lse_bkgt: log-sum-exps, as `attention.full_attention` returns them.
      position_bt: absolute positions, -1 for padding.
    """
    t, interval = position_bt.shape[1], cadence.interval
    kept = (-(-t // interval) - 1) * interval  # the rest is in the staging ring
    room = policy.capacity(cadence.budget)
    # Evicted chunk by chunk, a row fills its empty slots in order: those of whole chunks of
    # padding, then what the padding left of its first chunk.
    padding = jnp.argmax(position_bt >= 0, axis=1).astype(jnp.int32)[:, None]
    whole, part = padding // interval, padding % interval
    slot = jnp.arange(room, dtype=jnp.int32)[None]
    token = jnp.where(slot < interval, slot + (whole + (slot < part)) * interval, slot + padding)

    def place(x, value=0):
        """[b, t, ...] by slot: [b, room + L, ...]."""
        lead = [(0, 0)] * (x.ndim - 2)
        held = jnp.pad(x[:, :kept], [(0, 0), (0, room - kept), *lead], constant_values=value)
        index = jnp.minimum(token, room - 1).reshape(*token.shape, *[1] * len(lead))
        held = jnp.take_along_axis(held, index, axis=1)
        held = jnp.where((token < room).reshape(index.shape), held, jnp.asarray(value, x.dtype))
        ring = [(0, 0), (0, kept + interval - t), *lead]
        return jnp.concatenate([held, jnp.pad(x[:, kept:], ring, constant_values=value)], axis=1)

    def entries(x):
        return jax.tree.map(lambda x: jnp.moveaxis(place(x), 1, 2), x)

    query, key, value, *arrived = qkv
    lead = (len(position_bt), config.kv_heads, room + interval)
    position = jnp.broadcast_to(place(position_bt, -1)[:, None], lead)
    entry = {"arrived": entries(*arrived)} if arrived else {}
    key, value = entries(key), entries(value)
    if policy.statistics:
        sums = jnp.zeros((*lead, config.group_size))
        if kept:
            total = attention.statistics(
                query[:, :kept], position_bt[:, :kept],
                jax.tree.map(lambda x: x[:, :, :room], key), position[..., :room],
                lse_bkgt[..., :kept], policy.statistics,
            ).total  # fmt: skip
            sums = sums.at[:, :, :room].set(total)
        entry |= dict.fromkeys(SUMS, sums)  # nothing decays yet
    cache = kv.Cache(key, value, position, entry)
    query, at, lse = (
        jnp.moveaxis(_whole(jnp.moveaxis(x, axis, 1)[:, kept:], interval, value), 1, axis)
        for x, axis, value in ((query, 1, 0), (position_bt, 1, -1), (lse_bkgt, 3, 0))
    )
    return Staged(cache, Chunk(query, lse, at, jnp.int32(kept // interval)))


def _whole(x_bt: Array, interval: int, value: int = 0) -> Array:
    """Padded along the second axis to whole chunks."""
    pad = [(0, 0)] * x_bt.ndim
    pad[1] = (0, -x_bt.shape[1] % interval)
    return jnp.pad(x_bt, pad, constant_values=value)


def pass_from(
    policy: Policy,
    site: Site,
    staged: Staged,
    qkv: Projections,
    position_bt: Array,
    observe: Observer | Chooser = ignore,
    acc: Any = (),
) -> tuple[Array, Staged, Any, Any]:
    """Attention of one layer over an evicted cache, from an eviction on.

    Args:
      policy: with its arrays sliced to this layer.
      staged: the layer before that eviction.
      qkv, position_bt: of the tokens after it.

    Returns:
      As `layer_pass`.
    """
    (b, t, h, d), interval = qkv[0].shape, site.cadence.interval
    chunks = -(-t // interval)

    def split(x, value=0):
        x = _whole(x, interval, value)
        return jnp.moveaxis(x.reshape(b, chunks, interval, *x.shape[2:]), 1, 0)

    def step(state, inputs):
        staged, acc = state
        q, k, v, position, *arrived = inputs
        if isinstance(observe, Chooser):
            view = look(policy, staged.cache, staged.chunk, site)
            acc, slots, observed = observe.act(acc, policy, view)
            cache = kv.admit(view.cache, slots)
        else:
            view, slots, cache = evict(policy, staged.cache, staged.chunk, site)
            acc, observed = observe(acc, policy, view, slots)
        out, staged = _take_in(cache, (q, k, v, *arrived), position, staged.chunk.index + 1)
        return (staged, acc), (out, observed)

    q, k, v, *arrived = jax.tree.map(split, qkv)
    needed = (*(SUMS if policy.statistics else ()), *(["arrived"] if arrived else ()))
    if missing := set(needed) - staged.cache.entry.keys():
        raise ValueError(f"the replay began without {sorted(missing)}, for another policy")
    entry = {name: staged.cache.entry[name] for name in needed}  # it may have begun for several
    staged = staged.replace(cache=staged.cache.replace(entry=entry))
    inputs = (q, k, v, split(position_bt, -1), *arrived)
    (staged, acc), (out, observed) = jax.lax.scan(step, (staged, acc), inputs)
    out = jnp.moveaxis(out, 0, 1).reshape(b, chunks * interval, h, d)
    return out[:, :t], staged, acc, observed


def _take_in(cache, qkv, position_bl, index):
    """The attended values of a chunk, and a layer whose empty staging ring has taken it in."""
    q, k, v, *arrived = qkv
    capacity = cache.position_bks.shape[-1] - position_bl.shape[1]
    cache = kv.append(cache, capacity, k, v, position_bl, *arrived)
    seen = attention.visible(position_bl, cache.position_bks)
    out, lse = attention.attend(q, cache.key_bksd, cache.value_bksd, seen)
    return out, Staged(cache, Chunk(q, lse, position_bl, index))


def pass_after(
    policy: Policy,
    site: Site,
    cache: kv.Cache,
    qkv: Projections,
    position_bt: Array,
    index: Array | int,
) -> tuple[Array, Staged]:
    """`pass_from` of a layer whose eviction is done: its staging ring is empty.

    Args:
      qkv, position_bt: of whole chunks of tokens.
      index: of the first of these chunks.

    Returns:
      Attended values [b, t, h, d], and the layer before the eviction that follows.
    """
    chunk, rest = (
        jax.tree.map(lambda x, part=part: x[:, part], (qkv, position_bt))
        for part in (slice(site.cadence.interval), slice(site.cadence.interval, None))
    )
    out, staged = _take_in(cache, *chunk, index)
    if rest[1].shape[1]:
        more, staged, _, _ = pass_from(policy, site, staged, *rest)
        out = jnp.concatenate([out, more], axis=1)
    return out, staged


def layer_pass(
    policy: Policy,
    site: Site,
    qkv: Projections,
    position_bt: Array,
    observe: Observer | Chooser = ignore,
    acc: Any = (),
) -> tuple[Array, Staged, Any, Any]:
    """Attention of one layer over an evicted cache.

    Args:
      policy: with its arrays sliced to this layer.
      qkv: from `project`.
      position_bt: absolute positions, -1 for padding.
      observe: called at every eviction that a token attends after. `View.eviction` says which one
        it is; heads that share a budget unevenly have some before eviction 0.
      acc: initial value of its accumulator.

    Returns:
      Attended values [b, t, h, d], the layer before the eviction that no token attends after, the
      accumulator, and the outputs of `observe` stacked over evictions.
    """
    first = beginning(policy, site.cadence, position_bt.shape[1])
    begun, rest = (
        jax.tree.map(lambda x, part=part: x[:, part], qkv)
        for part in (slice(first), slice(first, None))
    )
    out, staged = begin_layer(policy, site.config, site.cadence, begun, position_bt[:, :first])
    after, *found = pass_from(policy, site, staged, rest, position_bt[:, first:], observe, acc)
    return jnp.concatenate([out, after], axis=1), *found


def begin_layer(
    policy: Policy, config: ModelConfig, cadence: Cadence, qkv: Projections, position_bt: Array
) -> tuple[Array, Staged]:
    """Attention of one layer over the `beginning` of traces, and the layer after it."""
    query, k, v, *arrived = qkv
    k, v = (kv.stored(x, config.cache_dtype) for x in (k, v))
    out, lse = attention.full_attention(query, k, v, position_bt)
    return out, stage(policy, config, cadence, (query, k, v, *arrived), lse, position_bt)


def full_pass(
    config: ModelConfig, qkv: Projections, position_bt: Array
) -> tuple[Array, Array | kv.Int8, Array | kv.Int8]:
    """Attention of one layer over a full cache: the attended values, and the cache's entries."""
    k, v = (kv.stored(x, config.cache_dtype) for x in qkv[1:3])
    return attention.full_attention(qkv[0], k, v, position_bt)[0], k, v


def row_keys(key: Array, batch: int) -> Array:
    """One PRNG key per row of a batch; those of a row do not depend on the number of rows."""
    return keys_of(key, batch)


def replay(
    lm: LM,
    batch: Batch,
    policy: Policy,
    cadence: Cadence,
    key_b: Array | None = None,
    observe: Observer | Chooser = ignore,
    acc: Any = (),
) -> tuple[Array, Any, Any]:
    """Runs traces under a policy.

    Args:
      policy: any policy; `full` runs one pass over the whole sequence.
      key_b: one PRNG key per row, for policies that sample; by default those of seed 0.
      observe, acc: see `layer_pass`; not called by `full`.

    Returns:
      Hidden states after the last layer [b, t, m], accumulators [layers, ...], and outputs of
      `observe` [layers, evictions, ...].
    """
    base.check(policy, lm.config, cadence)
    position = batch.position_bt
    if key_b is None:
        key_b = row_keys(key_of(0, Purpose.REPLAY), batch.token_bt.shape[0])

    def layer(hidden, inputs):
        index, weights, layer_policy = inputs
        qkv = project(layer_policy, lm.config, index, weights, hidden, position)
        if policy.evicts:
            site = Site(lm.config, cadence, index, key_b, batch.prompt_b)
            out, _, layer_acc, observed = layer_pass(
                layer_policy, site, qkv, position, observe, acc
            )
        else:
            out, _, _ = full_pass(lm.config, qkv, position)
            layer_acc, observed = acc, ()
        return models.finish(lm.config, weights, hidden, out), (layer_acc, observed)

    inputs = (jnp.arange(lm.config.layers), models.stacked(lm), policy)
    hidden, (accs, observed) = jax.lax.scan(layer, models.embed(lm, batch.token_bt), inputs)
    return hidden, accs, observed


def check_lengths(lengths: Array, cadence: Cadence) -> None:
    """Refuses a batch in which no row is long enough to see an eviction."""
    if max(lengths) <= cadence.first_evicting_token:
        raise UserError(
            f"the longest trace has {max(lengths)} tokens, but nothing is evicted before "
            f"budget + interval = {cadence.slots}; use longer traces or a smaller budget"
        )
