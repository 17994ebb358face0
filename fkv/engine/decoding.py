"""Generation with eviction: prefill through replay, then decoding on the device.

Decoding is step-outer: unrolled layers with one cache each, an inner `scan` of exactly `L` steps,
one eviction, and an outer `while_loop` that ends when every row is done. A new token is written to
the same slot in every row: prompts are left-padded to a multiple of `L`, and padding leaves empty
slots, which nothing attends to and which are dropped first. So the output of a row depends on its
own tokens only, whatever else is in the batch.

A policy that does not evict (`full`) has a cache for prompt and answer; the rest is shared.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds, models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.engine.replay import Chunk, Site
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.models import LM
from fkv.models.numerics import top_k
from fkv.policies.base import Policy

NO_TOKEN = -1
_NOT_FINITE = -2  # stands for a token where logits are NaN or infinite; ends the row


@dataclasses.dataclass(frozen=True)
class Sampling(kinds.Settings):
    """How the next token is sampled; applied in this order, as in `transformers`.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: only the `k` likeliest tokens can be sampled; 0 for all.
      top_p: of these, the smallest set of likeliest tokens with at least this share of the
        probability; 1 for all.
    """

    temperature: float = kinds.setting(kinds.number(0), 1.0)
    top_k: int = kinds.setting(kinds.whole(0), 0)
    top_p: float = kinds.setting(kinds.number(0, 1, above=True), 1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of decoding; static under `jit`.

    Attributes:
      cadence: of evictions; for a policy that does not evict, only the interval is used.
      sampling: of the tokens.
      stop: tokens that end a row.
    """

    cadence: Cadence
    sampling: Sampling = Sampling()
    stop: tuple[int, ...] = ()


def sample(logits_bv: Array, key_b: Array, sampling: Sampling) -> Array:
    """Samples one token per row [b], int32, each with its own key.

    The vocabulary is never sorted when `top_k` is given.
    """
    if sampling.temperature == 0:
        return logits_bv.argmax(-1).astype(jnp.int32)
    x, token = logits_bv.astype(jnp.float32), None
    if sampling.top_k and sampling.top_k < x.shape[-1]:
        x, token = top_k(x, sampling.top_k)
    elif sampling.top_p < 1:
        token = jnp.argsort(-x, axis=-1)
        x = jnp.take_along_axis(x, token, axis=-1)
    x = x / sampling.temperature
    if sampling.top_p < 1:
        p = jax.nn.softmax(x, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # of likelier tokens: the first always stays
        x = jnp.where(before < sampling.top_p, x, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(key_b, x)
    if token is not None:
        drawn = jnp.take_along_axis(token, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


def left_pad(prompts: Sequence[np.ndarray], multiple: int = 1, width: int = 0) -> Batch:
    """Left-pads prompts.

    Args:
      multiple: the width is rounded up to a multiple of this.
      width: least width of the batch.
    """
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-max(width, *length) // multiple) * multiple
    token = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(token, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return Batch(token, length, length, width - length)


@flax.struct.dataclass
class State:
    """The state of decoding.

    Attributes:
      caches: one per layer.
      token_b: the newest token of each row, sampled but not yet in the cache.
      position_b: its absolute position.
      left_b: how many more tokens each row may add after `token_b`; 0 when done.
      key_b: one PRNG key per row; a draw depends only on it and on the position.
      prompt_b: tokens of each row's prompt.
      chunk: chunks processed, prompt included, int32.
    """

    caches: tuple[kv.Cache, ...]
    token_b: Array
    position_b: Array
    left_b: Array
    key_b: Array
    prompt_b: Array
    chunk: Array


def _next(lm, hidden_bm, key_b, position_b, sampling):
    logits = models.unembed(lm, hidden_bm[:, None])[:, 0]
    key_b = jax.vmap(lambda key, at: key_of(key, Purpose.TOKEN, at))(key_b, position_b)
    token = sample(logits, key_b, sampling)
    return jnp.where(jnp.isfinite(logits.max(-1)), token, _NOT_FINITE)


def _left(token_b, left_b, stop):
    """Tokens left after `token_b`: none if it is a stop token or not a token."""
    stopped = (token_b == _NOT_FINITE) | (
        token_b[:, None] == jnp.asarray(stop, jnp.int32).reshape(1, -1)
    ).any(-1)
    return jnp.where(stopped, 0, jnp.maximum(left_b - 1, 0))


def prefill(
    lm: LM,
    policy: Policy,
    plan: Plan,
    prompts: Batch,
    key_b: Array,
    limit_b: Array,
    new_tokens: int,
) -> State:
    """Runs the prompts and samples the first token of each row.

    One program runs layer after layer; each leaves its cache where decoding uses it, so that no
    cache exists twice.

    Args:
      prompts: from `left_pad`; with a policy that evicts, `t` is a multiple of `L`.
      key_b: one PRNG key per row.
      limit_b: tokens that each row may add, at most `new_tokens` (which sizes the full cache).
    """
    hidden, position = _begin(lm, prompts)
    room = -(-new_tokens // plan.cadence.interval) * plan.cadence.interval
    caches = []
    for layer in range(lm.config.layers):
        site = Site(lm.config, plan.cadence, layer, key_b, prompts.prompt_b)
        hidden, cache = prefill_layer(lm.params["layers"], policy, site, hidden, position, room)
        caches.append(cache)
    token, position_b, left = _first_token(lm, plan, hidden, position, key_b, limit_b)
    chunk = jnp.asarray(-(-position.shape[1] // plan.cadence.interval), jnp.int32)
    # Copied, as decoding donates the state and the keys are the caller's.
    kept = jnp.copy(key_b), jnp.array(prompts.prompt_b)
    return State(tuple(caches), token, position_b, left, *kept, chunk)


@jax.jit
def _begin(lm, prompts):
    return models.embed(lm, prompts.token_bt), prompts.position_bt


@functools.partial(jax.jit, static_argnames="room", donate_argnames="hidden_btm")
def prefill_layer(
    layers: models.Params,
    policy: Policy,
    site: Site,
    hidden_btm: Array,
    position_bt: Array,
    room: int,
) -> tuple[Array, kv.Cache]:
    """One layer of `prefill`: its output, in the buffer of its input, and its cache.

    Args:
      layers, policy: of all layers; `site.layer` selects one.
      room: slots of a full cache for new tokens.
    """
    (b, t), config = position_bt.shape, site.config
    weights, policy = jax.tree.map(lambda x: x[site.layer], (layers, policy))
    qkv = models.project(config, weights, hidden_btm, position_bt)
    if policy.evicts:
        out, staged, _, _ = replay.layer_pass(policy, site, qkv, position_bt)
        cache = replay.evict(policy, staged.cache, staged.chunk, site)[2]
    else:
        out, k, v = replay.full_pass(config, qkv, position_bt)
        dtype = config.cache_dtype or qkv[0].dtype
        cache = kv.init(b, config.kv_heads, t + room, config.head_dim, dtype)
        cache = kv.append(cache, 0, k, v, position_bt)
    return models.finish(config, weights, hidden_btm, out), cache


@functools.partial(jax.jit, static_argnames="plan")
def _first_token(lm, plan, hidden, position, key_b, limit_b):
    position_b = position[:, -1] + 1
    token = _next(lm, hidden[:, -1], key_b, position_b, plan.sampling)
    return token, position_b, _left(token, limit_b, plan.stop)


def decode_chunk(
    lm: LM, policy: Policy, plan: Plan, state: State, prompt_width: int
) -> tuple[State, Array]:
    """`L` decoding steps and the eviction that follows.

    Args:
      prompt_width: padded width of the prompts, the first slots of a full cache.

    Returns:
      The state, and the tokens [b, L] that entered the cache, `NO_TOKEN` for rows that were done;
      the first was sampled in the previous call.
    """
    config, interval = lm.config, plan.cadence.interval
    weights = models.unstack(lm)
    prompt_chunks = -(-prompt_width // interval)
    start = prompt_width + (state.chunk - prompt_chunks) * interval
    if policy.evicts:
        start = state.caches[0].position_bks.shape[-1] - interval
    axes = kv.unit_axes(state.caches[0].position_bks)

    def step(carry, i):
        caches, token, position, left, done = carry
        caches = jax.tree.map(lambda x: jnp.expand_dims(x, axes), caches)
        at = jnp.where(done, -1, position)[:, None]
        hidden, held, queries = models.embed(lm, token[:, None]), [], []
        for layer, cache in zip(weights, caches, strict=True):
            q, k, v = models.project(config, layer, hidden, at)
            cache = kv.append(cache, start + i, k, v, at)
            out, lse = attention.attend_one(q, cache, at)
            hidden = models.finish(config, layer, hidden, out)
            held.append(cache)
            queries.append((q[:, 0], lse[..., 0]))
        drawn = _next(lm, hidden[:, 0], state.key_b, position + 1, plan.sampling)
        emitted = jnp.where(done, NO_TOKEN, token)
        done = left == 0  # the token just cached was the last one
        left = jnp.where(done, 0, _left(drawn, left, plan.stop))
        held = jax.tree.map(lambda x: jnp.squeeze(x, axes), tuple(held))
        carry = (held, drawn, position + 1, left, done)
        return carry, (emitted, at[:, 0], tuple(queries) if policy.evicts else ())

    done = state.token_b == NO_TOKEN
    caches = jax.tree.map(lambda x: jnp.squeeze(x, axes), state.caches)
    carry = (caches, state.token_b, state.position_b, state.left_b, done)
    carry, (tokens, at, queries) = jax.lax.scan(step, carry, jnp.arange(interval))
    caches, token, position, left, done = carry
    caches = jax.tree.map(lambda x: jnp.expand_dims(x, axes), caches)
    if policy.evicts:
        chunks = [
            Chunk(jnp.moveaxis(q, 0, 1), jnp.moveaxis(lse, 0, -1), at.T, state.chunk)
            for q, lse in queries
        ]
        site = Site(config, plan.cadence, 0, state.key_b, state.prompt_b)
        caches = evict(policy, caches, chunks, site)
    token = jnp.where(done, NO_TOKEN, token)
    state = State(caches, token, position, left, state.key_b, state.prompt_b, state.chunk + 1)
    return state, tokens.T


def evict(
    policy: Policy, caches: Sequence[kv.Cache], chunks: Sequence[Chunk], site: Site
) -> tuple[kv.Cache, ...]:
    """Evicts in every layer, when the staging rings are full.

    Args:
      chunks: the last `L` tokens in each layer; positions are -1 for finished rows.
      site: of any layer.
    """
    held = []
    for i, (cache, chunk) in enumerate(zip(caches, chunks, strict=True)):
        one = jax.tree.map(lambda x, i=i: x[i], policy)
        held.append(replay.evict(one, cache, chunk, site.replace(layer=i))[2])
    return tuple(held)


_decode_chunk = jax.jit(
    decode_chunk, static_argnames=("plan", "prompt_width"), donate_argnames="state"
)


@functools.partial(
    jax.jit, static_argnames=("plan", "prompt_width", "new_tokens"), donate_argnames="state"
)
def decode(
    lm: LM, policy: Policy, plan: Plan, state: State, prompt_width: int, new_tokens: int
) -> tuple[Array, State]:
    """Decodes until every row is done, in one program on the device.

    Returns:
      Tokens [b, n], `NO_TOKEN` after a row's last one, with `n` being `new_tokens` rounded up to a
      multiple of `L`; and the last state, whose caches reuse the buffers of those given.
    """
    interval = plan.cadence.interval
    chunks = -(-new_tokens // interval)
    out = jnp.full((state.token_b.shape[0], chunks * interval), NO_TOKEN, jnp.int32)

    def going(carry):
        n, _, state = carry
        return (n < chunks) & (state.token_b != NO_TOKEN).any()

    def body(carry):
        n, out, state = carry
        state, tokens = decode_chunk(lm, policy, plan, state, prompt_width)
        return n + 1, jax.lax.dynamic_update_slice(out, tokens, (0, n * interval)), state

    _, out, state = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), out, state))
    return out, state


def _start(lm, policy, plan, prompts, key_b, limit, width=0):
    """The state after prefill, and the width of the prompts."""
    if not len(prompts):
        raise UserError("no prompts given")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: give at least one token")
        unknown = [int(x) for x in prompt if not 0 <= x < lm.config.vocab_size]
        if unknown:
            raise UserError(
                f"prompt {i} has token {unknown[0]}, beyond the model's {lm.config.vocab_size}"
            )
    limit_b = np.asarray(limit, np.int32)
    if limit_b.shape != (len(prompts),) or limit_b.min() < 0 or limit_b.max() < 1:
        raise UserError(f"limit = {list(limit)} must be a number of tokens for every prompt")
    replay.check(policy, lm.config, plan.cadence, len(prompts))
    batch = left_pad(prompts, plan.cadence.interval, width)
    state = prefill(lm, policy, plan, batch, key_b, limit_b, int(limit_b.max()))
    return state, batch.token_bt.shape[1]


def generate(
    lm: LM,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[np.ndarray],
    key_b: Array,
    limit: Sequence[int],
    width: int = 0,
) -> list[np.ndarray]:
    """Continues prompts of any length under a policy.

    Args:
      prompts: token ids of each row; prefill evicts from those longer than `B + L`.
      key_b: one PRNG key per row: equal rows with different keys are different samples.
      limit: largest number of new tokens for each row; 0 leaves a row out.
      width: least padded width of the prompts, so that batches share a program.

    Returns:
      The new tokens of each row, the stop token included.

    Raises:
      UserError: a prompt is empty or has an id outside the vocabulary, or sizes are wrong.
    """
    state, width = _start(lm, policy, plan, prompts, key_b, limit, width)
    out, _ = decode(lm, policy, plan, state, width, max(limit))
    rows = [
        row[: min((row != NO_TOKEN).sum(), most)]
        for row, most in zip(np.asarray(out), limit, strict=True)
    ]
    _check_finite(rows, lm)
    return rows


def _check_finite(rows: Sequence[np.ndarray], lm: LM) -> None:
    """Refuses rows in which a token could not be sampled."""
    if bad := [i for i, row in enumerate(rows) if (row == _NOT_FINITE).any()]:
        dtype = lm.params["embed_vm"].dtype
        other = "float32" if dtype == jnp.bfloat16 else "bfloat16 or float32"
        cure = "check its weights" if dtype == jnp.float32 else f"set dtype to {other}"
        raise UserError(
            f"the language model's logits are NaN or infinite in {dtype} (row {bad[0]}, and "
            f"{len(bad) - 1} more of {len(rows)}): {cure}"
        )


def stream(
    lm: LM,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[np.ndarray],
    key_b: Array,
    limit: Sequence[int],
) -> Iterator[list[np.ndarray]]:
    """`generate`, but yields the new tokens of every row after every `L` steps."""
    state, width = _start(lm, policy, plan, prompts, key_b, limit)
    for _ in range(-(-max(limit) // plan.cadence.interval)):
        state, tokens = _decode_chunk(lm, policy, plan, state, width)
        rows = [row[row != NO_TOKEN] for row in np.asarray(tokens)]
        _check_finite(rows, lm)
        yield rows
        if (np.asarray(state.token_b) == NO_TOKEN).all():
            return


def evictions(prompt: int, generated: int, cadence: Cadence) -> int:
    """How many evictions of a generated row a later token attends after.

    Counted for heads that keep B entries; with uneven budgets some evict earlier.

    Args:
      prompt, generated: tokens of the row. The last generated token never enters attention.
    """
    cached = prompt + generated - 1
    first = (prompt - 1) % cadence.interval + 1  # the prompt's first chunk is the partial one
    return sum(end > cadence.budget for end in range(first, cached, cadence.interval))
