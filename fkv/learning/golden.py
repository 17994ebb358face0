"""Golden Eviction: the best evictions in hindsight, from full-cache attention.

The future score of a cached entry after a chunk is the largest block score it will get from any
later chunk of `L` queries; a block score is the mean full-cache attention probability over the
block's queries and the group's heads. Every eviction drops the `L` candidates of lowest future
score (ForesightKV, arXiv 2602.03203, section 3).

The search keeps, for each of the `B + L` cached entries, a row of its future scores after every
chunk, computed when the entry arrives from the keys of its chunk and all later queries, and dropped
with it. So memory is `(B + L) * T / L` floats per group plus one chunk of keys against the queries:
linear in T, where the table of all block scores is `T * T / L` and the attention matrix `T * T`.

Letters: b batch, e evictions, t tokens, k KV heads, g query heads per KV head, j query blocks,
l interval (L), n candidates (B).
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv import models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import beginnings, replay
from fkv.engine.batch import Batch
from fkv.engine.beginnings import Begun
from fkv.engine.replay import Projections
from fkv.models import LM, ModelConfig
from fkv.policies.base import Policy
from fkv.policies.forced import Forced


@flax.struct.dataclass
class Labels:
    """Golden evictions of one layer.

    Attributes:
      evict_position_ebkl: absolute positions to drop, int32, lowest future score first.
      candidate_position_ebkn: absolute positions of the candidates, in the slot order of
        `fkv.engine.replay` when these evictions are forced.
      future_score_ebkn: their future scores, float32.
      newest_score_ebkl: future scores of the newest `L`, in order of arrival.
      valid_eb: whether the row is long enough for this eviction and a token after it.
    """

    evict_position_ebkl: Array
    candidate_position_ebkn: Array
    future_score_ebkn: Array
    newest_score_ebkl: Array
    valid_eb: Array


def at(x_e: Array, eviction: Array) -> Array:
    """The entry of one eviction along the first axis; zeros before the first and after the last."""
    known = (eviction >= 0) & (eviction < len(x_e))
    one = x_e[jnp.clip(eviction, 0, len(x_e) - 1)]
    return jnp.where(known, one, jnp.zeros_like(one))


def search(
    future_rows: Callable[[Array], Array], length_b: Array, blocks: int, cadence: Cadence
) -> Labels:
    """The search, a `lax.scan` over chunks for all rows and heads.

    Args:
      future_rows: maps a chunk's index c to [b, k, l, j]: for each of the chunk's entries, the
        largest block score in blocks j and later (only j > c is read).
      length_b: tokens of each row.
      blocks: number of query blocks, `ceil(T / L)`.
    """
    budget, interval, first = cadence.budget, cadence.interval, cadence.fill_chunks
    b, k, _, _ = jax.eval_shape(future_rows, jax.ShapeDtypeStruct((), jnp.int32)).shape

    def step(state, chunk):
        score, position = state  # [b, k, s, j] and [b, k, s]
        score = jax.lax.dynamic_update_slice(score, future_rows(chunk), (0, 0, budget, 0))
        arrived = chunk * interval + jnp.arange(interval)
        arrived = jnp.where(arrived[None] < length_b[:, None], arrived[None], -1)
        arrived = jnp.broadcast_to(arrived[:, None], (b, k, interval))
        position = jax.lax.dynamic_update_slice(position, arrived, (0, 0, budget))

        future = jax.lax.dynamic_index_in_dim(score, chunk + 1, axis=3, keepdims=False)
        (future, newest), candidate = jnp.split(future, [budget], -1), position[..., :budget]
        evict = kv.choose(future, candidate, interval)
        labels = Labels(
            jnp.take_along_axis(candidate, evict, axis=-1),
            candidate,
            future,
            newest,
            length_b > (chunk + 1) * interval,
        )
        target, source = kv.moves(evict, cadence.slots)
        state = (kv.move(score, target, source), kv.move(position, target, source))
        return state, labels

    state = (
        jnp.zeros((b, k, cadence.slots, blocks)),
        jnp.full((b, k, cadence.slots), -1, jnp.int32),
    )
    filling = jnp.arange(min(first, blocks))
    state, _ = jax.lax.scan(lambda s, c: (step(s, c)[0], None), state, filling)
    # No token attends after the last chunk's eviction.
    return jax.lax.scan(step, state, jnp.arange(first, max(first, blocks - 1)))[1]


def suffix_max(score_bktj: Array) -> Array:
    """Largest score in this block or a later one."""
    return jax.lax.cummax(score_bktj, axis=score_bktj.ndim - 1, reverse=True)


def from_attention(
    q_bthd: Array,
    k_btkd: Array,
    lse_bkgt: Array,
    position_bt: Array,
    cadence: Cadence,
    queries: int = 4096,
) -> Labels:
    """Golden evictions of one layer, streamed from the queries and keys of its full pass.

    Args:
      q_bthd, k_btkd: rotated queries and keys of the full-cache pass.
      lse_bkgt: log-sum-exp of every query's logits, from `attention.full_attention`.
      position_bt: `arange(T)` where the row has a token, -1 after its end.
      queries: number of queries multiplied with a chunk of keys at a time; memory is
        `b * h * queries * L` floats.
    """
    (b, t, k, _), interval = k_btkd.shape, cadence.interval
    blocks = -(-t // interval)
    at_once = min(blocks, max(1, queries // interval))
    slabs = -(-blocks // at_once)
    length = slabs * at_once * interval

    def fit(x, axis, value=0):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, length - t)
        return jnp.pad(x, pad, constant_values=value)

    q, key, lse = fit(q_bthd, 1), fit(k_btkd, 1), fit(lse_bkgt, 3)
    position = fit(position_bt, 1, -1)
    width = at_once * interval

    def rows(chunk):
        start = chunk * interval
        own = jnp.moveaxis(jax.lax.dynamic_slice_in_dim(key, start, interval, axis=1), 1, 2)
        own_position = jax.lax.dynamic_slice_in_dim(position, start, interval, axis=1)

        def slab(i, scores):
            def part(x, axis):
                return jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=axis)

            seen = attention.visible(part(position, 1), own_position[:, None])
            x = attention.logits(part(q, 1), own, seen)  # [b, k, g, queries, l]
            p = jnp.exp(x - part(lse, 3)[..., None]).mean(2) * seen
            p = p.reshape(b, k, at_once, interval, interval).sum(3) / interval
            return jax.lax.dynamic_update_slice(
                scores, jnp.moveaxis(p, 2, 3), (0, 0, 0, i * at_once)
            )

        scores = jnp.zeros((b, k, interval, slabs * at_once))
        first = jnp.minimum((chunk + 1) // at_once, slabs)
        scores = jax.lax.fori_loop(first, slabs, slab, scores)
        return suffix_max(scores)[..., :blocks]

    length_b = (position_bt >= 0).sum(-1)
    return search(rows, length_b, blocks, cadence)


def layer_labels(
    config: ModelConfig,
    weights: models.Params,
    hidden_btm: Array,
    position_bt: Array,
    cadence: Cadence,
) -> tuple[Array, Labels, tuple[Projections, Array]]:
    """One layer of the full pass: its output, its golden evictions, and its attention.

    It has no cache: keys and values are in the model's dtype, whatever `cache_dtype` is.

    Returns:
      Hidden states [b, t, m]; the labels; and queries, keys and values with the log-sum-exps of the
      attention [b, k, g, t].
    """
    q, k, v = models.project(config, weights, hidden_btm, position_bt)
    out, lse = attention.full_attention(q, k, v, position_bt)
    labels = from_attention(q, k, lse, position_bt, cadence)
    return models.finish(config, weights, hidden_btm, out), labels, ((q, k, v), lse)


def policy(lm: LM, batch: Batch, cadence: Cadence) -> tuple[Forced, Labels, Array]:
    """The golden evictions of all layers, from one full pass.

    Returns:
      The policy that forces them, the labels [layers, e, ...], and the full-cache hidden states
      (whatever `config.cache_dtype` is).
    """
    return _policy(lm, batch, cadence, lambda *attended: ())[:3]


def policy_and_beginning(
    lm: LM, batch: Batch, cadence: Cadence, others: Policy
) -> tuple[Forced, Labels, Array, Begun]:
    """`policy`, and the beginning of replays under evictions, from the same pass.

    Where caches are quantised, the full pass is not: then the beginning is a pass of its own.

    Args:
      others: see `beginnings.begin`.
    """
    if lm.config.cache_dtype:
        begun = beginnings.begin(lm, batch, others, cadence)
        return *policy(lm, batch, cadence), begun
    first = replay.beginning(others, cadence, batch.token_bt.shape[1])
    position = batch.position_bt[:, :first]

    def keep(qkv, lse):
        qkv = [x[:, :first] for x in qkv]
        return replay.stage(others, lm.config, cadence, qkv, lse[..., :first], position)

    forced, labels, hidden, staged = _policy(lm, batch, cadence, keep)
    return forced, labels, hidden, Begun(hidden[:, :first], staged, cadence)


def _policy(lm, batch, cadence, keep):
    position = batch.position_bt

    def layer(hidden, weights):
        hidden, labels, attended = layer_labels(lm.config, weights, hidden, position, cadence)
        return hidden, (labels, keep(*attended))

    hidden = models.embed(lm, batch.token_bt)
    hidden, (labels, kept) = jax.lax.scan(layer, hidden, lm.params["layers"])
    return Forced(labels.evict_position_ebkl), labels, hidden, kept
