"""A whole trace through the model under an eviction policy, chunk by chunk.

The tokens are known, so replay is layer-outer: a layer projects all `T` tokens at once, then scans
over chunks of `L` for attention and eviction alone, and only one layer's cache is alive. Every
chunk attends to the survivors plus itself, so hidden states are those of an evicted cache.

Rows are right-padded: `length_b` says how many tokens of each are real, and what happens to a row
depends on its own tokens alone. Eviction `e` of a row happens after `B + L + e * L` tokens.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.keys import Purpose, key_of, keys_of
from fkv.models import ModelConfig
from fkv.policies import base
from fkv.policies.base import Policy, View, check_given

DECAY = 0.9

Observer = Callable[[Any, Policy, View, Array], tuple[Any, Any]]


def row_positions(token_bt: Array, length_b: Array, padding_b: Array | int = 0) -> Array:
    """Absolute positions [b, t], -1 before a row's first token and after its last.

    Args:
      length_b: tokens of each row.
      padding_b: padding in front of each row.
    """
    index = jnp.arange(token_bt.shape[1], dtype=jnp.int32)[None]
    index = index - jnp.reshape(padding_b, (-1, 1))
    return jnp.where(index < length_b[:, None], jnp.maximum(index, -1), -1)


def _accumulate(
    cache: kv.Cache, stats: attention.Statistics, position_bl: Array, budget: int
) -> kv.Cache:
    """Adds an interval's attention to the sums that travel with the entries."""
    slots, interval = cache.position_bks.shape[-1], position_bl.shape[-1]
    # Nothing decays while the first B tokens fill the cache.
    full = position_bl.max(-1) >= budget
    decay = jnp.where(full, DECAY, 1.0)[:, None, None, None]
    staged = (jnp.arange(slots) >= slots - interval)[None, None, :, None]
    before = jax.tree.map(lambda x: jnp.where(staged, 0.0, x), cache.entry)
    entry = {
        "cumulative": before["cumulative"] + stats.total,
        "decayed": decay * before["decayed"] + stats.total,
    }
    return cache.replace(entry=entry)


def _ignore(acc, policy, view, evict):
    return acc, ()


def init_cache(
    policy: Policy, batch: int, config: ModelConfig, budget: int, interval: int, dtype: jnp.dtype
) -> kv.Cache:
    """An empty cache of one layer, in the model's `cache_dtype` or else in `dtype`."""
    kv.check_sizes(budget, interval)
    entry = ()
    if policy.statistics:
        sums = jax.ShapeDtypeStruct((config.group_size,), jnp.float32)
        entry = {"cumulative": sums, "decayed": sums}
    slots = policy.capacity(budget) + interval
    return kv.init(
        batch, config.kv_heads, slots, config.head_dim, config.cache_dtype or dtype, entry
    )


def evict(
    config: ModelConfig,
    policy: Policy,
    cache: kv.Cache,
    query_blhd: Array,
    lse_bkgl: Array,
    position_bl: Array,
    chunk: Array,
    random_b: Array,
    budget: int,
    layer: Array | int,
) -> tuple[View, Array, kv.Cache]:
    """One layer's eviction, when its staging ring is full: replay and decoding both come here.

    Args:
      policy: with its arrays sliced to this layer.
      query_blhd, position_bl: the chunk's queries and positions, -1 for padding.
      lse_bkgl: log-sum-exps of their attention, as `attention.attend` returns them.
      random_b: one PRNG key per row.

    Returns:
      What the policy saw, the slots it freed [b, k, l], and the cache after it.
    """
    stats = None
    if policy.statistics:
        stats = attention.statistics(
            query_blhd,
            position_bl,
            cache.key_bksd,
            cache.position_bks,
            lse_bkgl,
            policy.statistics,
        )
        cache = _accumulate(cache, stats, position_bl, budget)

    def draw_key(key, newest):
        # By position, not by chunk: a row draws the same however the batch is padded.
        return key_of(key, Purpose.EVICTION, layer, newest)

    random = jax.vmap(draw_key)(random_b, position_bl.max(-1))
    cadence = Cadence(budget, position_bl.shape[1])
    view = View(
        cache, query_blhd, position_bl, chunk, random, stats, cadence, jnp.asarray(layer), config
    )
    lead = cache.position_bks.shape[:2]
    if view.capacity == budget:
        slots = policy.evict(view)
        check_given(policy, "evict", slots, (*lead, view.interval), jnp.integer)
        slots = slots.astype(jnp.int32)  # others may be too small to count in
    else:  # what is dropped leaves empty slots, and those are freed
        drop = policy.drop(view)
        check_given(policy, "drop", drop, cache.position_bks.shape, jnp.bool_)
        position = jnp.where(drop, -1, cache.position_bks)
        cache = cache.replace(position_bks=position)
        slots = kv.choose(jnp.zeros(position.shape), position, view.interval)
    return view, slots, kv.admit(cache, slots)


def check(config: ModelConfig, policy: Policy, budget: int, interval: int, rows: int = 2) -> None:
    """Refuses a policy that does not fit the model or the sizes, before anything is run.

    Beside what the policy says itself, one eviction is traced on shapes alone.

    Args:
      policy: what was given as such, be it one or not.
      rows: of the batch, for policies that know them.

    Raises:
      UserError: one line that names the policy and both sides.
    """
    base.check(policy, config, Cadence(budget, interval))
    if not policy.evicts:
        return

    def one(policy):
        policy = jax.tree.map(lambda x: x[0], policy)
        cache = init_cache(policy, rows, config, budget, interval, jnp.float32)
        query = jnp.zeros((rows, interval, config.heads, config.head_dim))
        lse = jnp.zeros((rows, config.kv_heads, config.group_size, interval))
        position = jnp.zeros((rows, interval), jnp.int32)
        random = row_keys(key_of(0, Purpose.REPLAY), rows)
        return evict(
            config, policy, cache, query, lse, position, jnp.int32(0), random, budget, jnp.int32(0)
        )[1]

    jax.eval_shape(one, policy)


def layer_pass(
    config: ModelConfig,
    policy: Policy,
    layer: Array | int,
    q_bthd: Array,
    k_btkd: Array,
    v_btkd: Array,
    position_bt: Array,
    random_b: Array,
    budget: int,
    interval: int,
    observe: Observer = _ignore,
    acc: Any = (),
) -> tuple[Array, kv.Cache, Any, Any]:
    """Attention of one layer over an evicted cache.

    Args:
      policy: with its arrays sliced to this layer.
      layer: index of the layer.
      random_b: one PRNG key per row.
      observe: called at every eviction with (acc, policy, view, evicted slots [b, k, l]);
        returns the new accumulator and something to stack over chunks. The first `B / L`
        evictions only take the first `B` tokens in.
      acc: the accumulator's start.

    Returns:
      Attended values [b, t, h, d], the cache in the end, the accumulator, and what was stacked
      over `ceil(T / L)` chunks.
    """
    b, t, h, d = q_bthd.shape
    chunks = -(-t // interval)

    def split(x, value=0):
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, chunks * interval - t)
        x = jnp.pad(x, pad, constant_values=value)
        return jnp.moveaxis(x.reshape(b, chunks, interval, *x.shape[2:]), 1, 0)

    def step(state, inputs):
        cache, acc = state
        chunk, q, key, value, position = inputs
        slot = cache.position_bks.shape[-1] - interval
        cache = kv.append(cache, slot, key, value, position)
        seen = attention.visible(position, cache.position_bks)
        out, lse = attention.attend(q, cache.key_bksd, cache.value_bksd, seen)
        view, evicted, cache = evict(
            config, policy, cache, q, lse, position, chunk, random_b, budget, layer
        )
        acc, seen = observe(acc, policy, view, evicted)
        return (cache, acc), (out, seen)

    cache = init_cache(policy, b, config, budget, interval, k_btkd.dtype)
    inputs = (jnp.arange(chunks), split(q_bthd), split(k_btkd), split(v_btkd))
    inputs += (split(position_bt, -1),)
    (cache, acc), (out, observed) = jax.lax.scan(step, (cache, acc), inputs)
    out = jnp.moveaxis(out, 0, 1).reshape(b, chunks * interval, h, d)
    return out[:, :t], cache, acc, observed


def full_pass(
    config: ModelConfig, q_bthd: Array, k_btkd: Array, v_btkd: Array, position_bt: Array
) -> tuple[Array, Array | kv.Int8, Array | kv.Int8]:
    """Attention of one layer over a full cache: the attended values, and the cache's entries."""
    k, v = (kv.stored(x, config.cache_dtype) for x in (k_btkd, v_btkd))
    return attention.full_attention(q_bthd, k, v, position_bt)[0], k, v


def row_keys(key: Array, batch: int) -> Array:
    """One PRNG key per row of a batch, the same whatever the number of rows."""
    return keys_of(key, batch)


def replay(
    config: ModelConfig,
    params: models.Params,
    token_bt: Array,
    length_b: Array,
    policy: Policy,
    budget: int,
    interval: int,
    random_b: Array | None = None,
    observe: Observer = _ignore,
    acc: Any = (),
    padding_b: Array | int = 0,
) -> tuple[Array, Any, Any]:
    """Runs traces under a policy.

    Args:
      token_bt: padded token ids.
      length_b: tokens of each row.
      policy: any policy; `full` runs one pass over the whole sequence.
      random_b: one PRNG key per row, for policies that draw; those of seed 0 if not given.
      observe, acc: see `layer_pass`; not called by `full`.
      padding_b: padding in front of each row, as generation has it; the rest is at the end.

    Returns:
      Hidden states after the last layer [b, t, m], accumulators [layers, ...], and what was
      observed [layers, chunks, ...].
    """
    base.check(policy, config, Cadence(budget, interval))
    position = row_positions(token_bt, length_b, padding_b)
    if random_b is None:
        random_b = row_keys(key_of(0, Purpose.REPLAY), token_bt.shape[0])

    def layer(hidden, inputs):
        index, weights, layer_policy = inputs
        q, k, v = models.project(config, weights, hidden, position)
        if policy.evicts:
            out, _, layer_acc, observed = layer_pass(
                config,
                layer_policy,
                index,
                q,
                k,
                v,
                position,
                random_b,
                budget,
                interval,
                observe,
                acc,
            )
        else:
            out, _, _ = full_pass(config, q, k, v, position)
            layer_acc, observed = acc, ()
        return models.finish(config, weights, hidden, out), (layer_acc, observed)

    inputs = (jnp.arange(config.layers), params["layers"], policy)
    hidden, (accs, observed) = jax.lax.scan(layer, models.embed(params, token_bt), inputs)
    return hidden, accs, observed


@flax.struct.dataclass
class TokenLosses:
    """Per-token results of a pass: entry i is about predicting token i + 1 from its prefix.

    Attributes:
      nll_bt: negative log-likelihood of the next token, nats, [b, t - 1].
      entropy_bt: entropy of the prediction, nats, [b, t - 1].
    """

    nll_bt: Array
    entropy_bt: Array


def token_losses(
    config: ModelConfig, params: models.Params, hidden_btm: Array, token_bt: Array, block: int = 512
) -> TokenLosses:
    """Losses of a pass from its last hidden states; logits exist for one block at a time."""
    b, t, m = hidden_btm.shape
    block = min(block, t - 1)
    blocks = -(-(t - 1) // block)
    pad = ((0, 0), (0, blocks * block - (t - 1)))
    hidden = jnp.pad(hidden_btm[:, :-1], (*pad, (0, 0))).reshape(b, blocks, block, m)
    target = jnp.pad(token_bt[:, 1:], pad).reshape(b, blocks, block)

    def one(inputs):
        hidden, target = inputs
        log_p = jax.nn.log_softmax(models.unembed(config, params, hidden))
        nll = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
        return TokenLosses(nll, -(jnp.exp(log_p) * log_p).sum(-1))

    losses = jax.lax.map(one, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(target, 1, 0)))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(b, blocks * block)[:, : t - 1], losses
    )


def low_entropy(entropy_bt: Array, counted_bt: Array, high_fraction: float) -> Array:
    """Which tokens count as low-entropy, bool [b, t].

    Of each row's counted tokens all but the `high_fraction` (rounded down to a whole number) with
    the largest entropy; among equals the earlier is high. The one place that says so: rewards and
    tables split alike, token for token.
    """
    entropy = jnp.where(counted_bt, entropy_bt, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-entropy, axis=-1, stable=True), axis=-1)
    # Of every possible number, by float64: a hair more, as 0.29 * 100 falls short of 29.
    high = np.floor(np.arange(entropy.shape[-1] + 1) * high_fraction + 1e-9).astype(np.int32)
    return counted_bt & (rank >= jnp.asarray(high)[counted_bt.sum(-1, keepdims=True)])


def check_lengths(lengths, budget: int, interval: int) -> None:
    """Refuses a batch in which no row is long enough to see an eviction."""
    if max(lengths) <= budget + interval:
        raise UserError(
            f"the longest trace has {max(lengths)} tokens, but nothing is evicted before "
            f"budget + interval = {budget + interval}; use longer traces or a smaller budget"
        )
