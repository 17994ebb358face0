"""Generation with eviction: prefill through replay, then decoding on the device.

Decoding is step-outer: unrolled layers with one cache each, an inner `scan` of exactly `L` steps,
one eviction, and an outer `while_loop` that ends when every row is done. A new token is written at
the same slot of every row: prompts are left-padded to a multiple of `L`, padding being empty slots
that nothing attends to and that are the first to be dropped. So what happens to a row depends on
its own tokens alone, whatever else is in the batch.

A policy that does not evict (`full`) has a cache as long as prompt and answer; all else is shared.
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
from fkv.engine import replay
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.models import ModelConfig
from fkv.policies.base import Policy

NO_TOKEN = -1
_NOT_FINITE = -2  # in place of a token where logits are NaN or infinite; ends the row
SAMPLING = {
    "temperature": kinds.number(0),
    "top_k": kinds.whole(0),
    "top_p": kinds.number(0, 1, above=True),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; in this order, as in `transformers`.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only the `k` likeliest tokens can be drawn; 0 for all.
      top_p: of these, the smallest set of likeliest tokens with at least this much of their
        probability; 1 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        kinds.check_fields("", self, **SAMPLING)


def sample(logits_bv: Array, key_b: Array, sampling: Sampling) -> Array:
    """Draws one token per row [b], int32, each with its own key.

    The vocabulary is never sorted when `top_k` is given.
    """
    if sampling.temperature == 0:
        return logits_bv.argmax(-1).astype(jnp.int32)
    x = logits_bv.astype(jnp.float32) / sampling.temperature
    token = None
    if sampling.top_k and sampling.top_k < x.shape[-1]:
        x, token = jax.lax.top_k(x, sampling.top_k)
    elif sampling.top_p < 1:
        token = jnp.argsort(-x, axis=-1)
        x = jnp.take_along_axis(x, token, axis=-1)
    if sampling.top_p < 1:
        p = jax.nn.softmax(x, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # of the likelier ones: the first always stays
        x = jnp.where(before < sampling.top_p, x, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(key_b, x)
    if token is not None:
        drawn = jnp.take_along_axis(token, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


def left_pad(
    prompts: Sequence[np.ndarray], multiple: int = 1, value: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Aligns prompts at their ends.

    Args:
      multiple: the width is rounded up to a multiple of this.

    Returns:
      Ids [b, t] and the padding in front of each row [b], int32.
    """
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // multiple) * multiple
    token = np.full((len(prompts), width), value, np.int32)
    padding = np.array([width - len(prompt) for prompt in prompts], np.int32)
    for row, prompt, start in zip(token, prompts, padding, strict=True):
        row[start:] = prompt
    return token, padding


@flax.struct.dataclass
class State:
    """Everything that changes while decoding.

    Attributes:
      caches: one per layer.
      token_b: the newest token of each row, drawn but not yet in the cache.
      position_b: its absolute position.
      left_b: how many more tokens each row may add after `token_b`; 0 when it is done.
      key_b: one PRNG key per row; a draw depends on it and on the position alone.
      chunk: chunks processed, prompt included, int32.
    """

    caches: tuple[kv.Cache, ...]
    token_b: Array
    position_b: Array
    left_b: Array
    key_b: Array
    chunk: Array


def _next(hidden_bm, config, params, key_b, position_b, sampling):
    logits = models.unembed(config, params, hidden_bm[:, None])[:, 0]
    key_b = jax.vmap(lambda key, at: key_of(key, Purpose.TOKEN, at))(key_b, position_b)
    token = sample(logits, key_b, sampling)
    return jnp.where(jnp.isfinite(logits.max(-1)), token, _NOT_FINITE)


def _left(token_b, left_b, stop):
    """Tokens left after drawing `token_b`: none after a stop token, or if it is none."""
    stopped = (token_b == _NOT_FINITE) | (
        token_b[:, None] == jnp.asarray(stop, jnp.int32).reshape(1, -1)
    ).any(-1)
    return jnp.where(stopped, 0, jnp.maximum(left_b - 1, 0))


def prefill(
    config: ModelConfig,
    params: models.Params,
    policy: Policy,
    token_bt: Array,
    padding_b: Array,
    key_b: Array,
    limit_b: Array,
    budget: int,
    interval: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    new_tokens: int,
) -> State:
    """Runs the prompts and draws the first token of each row.

    One program runs layer after layer: each leaves its cache where decoding will have it, so that
    no cache is there twice.

    Args:
      token_bt, padding_b: from `left_pad`; with a policy that evicts, `t` is a multiple of `L`.
      key_b: one PRNG key per row.
      limit_b: tokens that each row may add, at most `new_tokens` (which sizes the full cache).
    """
    t = token_bt.shape[1]
    hidden, position = _begin(params, token_bt, padding_b)
    caches = []
    for index in range(config.layers):
        hidden, cache = prefill_layer(
            config, params["layers"], policy, index, hidden, position, key_b,
            budget=budget, interval=interval, new_tokens=new_tokens,
        )  # fmt: skip
        caches.append(cache)
    token, position_b, left = _first_token(
        config, params, hidden, position, key_b, limit_b, sampling=sampling, stop=stop
    )
    chunk = jnp.asarray(-(-t // interval), jnp.int32)
    # Decoding takes the state's place in memory, and the keys are the caller's.
    return State(tuple(caches), token, position_b, left, jnp.copy(key_b), chunk)


@jax.jit
def _begin(params, token_bt, padding_b):
    position = replay.row_positions(token_bt, token_bt.shape[1] - padding_b, padding_b)
    return models.embed(params, token_bt), position


@functools.partial(
    jax.jit,
    static_argnames=("config", "budget", "interval", "new_tokens"),
    donate_argnames="hidden_btm",
)
def prefill_layer(
    config: ModelConfig,
    layers: models.Params,
    policy: Policy,
    index: Array | int,
    hidden_btm: Array,
    position_bt: Array,
    key_b: Array,
    budget: int,
    interval: int,
    new_tokens: int,
) -> tuple[Array, kv.Cache]:
    """One layer of `prefill`: its output, which takes the place of its input, and its cache.

    Args:
      layers, policy: of all layers, of which `index` says which one it is.
    """
    b, t = position_bt.shape
    weights, policy = jax.tree.map(lambda x: x[index], (layers, policy))
    q, k, v = models.project(config, weights, hidden_btm, position_bt)
    if policy.evicts:
        out, cache, _, _ = replay.layer_pass(
            config, policy, index, q, k, v, position_bt, key_b, budget, interval
        )
    else:
        out, k, v = replay.full_pass(config, q, k, v, position_bt)
        slots = t + -(-new_tokens // interval) * interval
        dtype = config.cache_dtype or q.dtype
        cache = kv.init(b, config.kv_heads, slots, config.head_dim, dtype)
        cache = kv.append(cache, 0, k, v, position_bt)
    return models.finish(config, weights, hidden_btm, out), cache


@functools.partial(jax.jit, static_argnames=("config", "sampling", "stop"))
def _first_token(config, params, hidden, position, key_b, limit_b, sampling, stop):
    position_b = position[:, -1] + 1
    token = _next(hidden[:, -1], config, params, key_b, position_b, sampling)
    return token, position_b, _left(token, limit_b, stop)


def decode_chunk(
    config: ModelConfig,
    params: models.Params,
    policy: Policy,
    state: State,
    prompt_width: int,
    budget: int,
    interval: int,
    sampling: Sampling,
    stop: tuple[int, ...],
) -> tuple[State, Array]:
    """`L` decoding steps and the eviction after them.

    Args:
      prompt_width: padded width of the prompts, which a full cache holds in front.

    Returns:
      The state, and the tokens [b, L] that were put into the cache, `NO_TOKEN` for rows that were
      done: the first is the one drawn last time.
    """
    weights = models.unstack(config, params)
    prompt_chunks = -(-prompt_width // interval)
    start = prompt_width + (state.chunk - prompt_chunks) * interval
    if policy.evicts:
        start = state.caches[0].position_bks.shape[-1] - interval
    axes = kv.unit_axes(state.caches[0].position_bks)

    def step(carry, i):
        caches, token, position, left, done = carry
        caches = jax.tree.map(lambda x: jnp.expand_dims(x, axes), caches)
        at = jnp.where(done, -1, position)[:, None]
        hidden, held, queries = models.embed(params, token[:, None]), [], []
        for layer, cache in zip(weights, caches, strict=True):
            q, k, v = models.project(config, layer, hidden, at)
            cache = kv.append(cache, start + i, k, v, at)
            out, lse = attention.attend_one(config.kernel, q, cache, at)
            hidden = models.finish(config, layer, hidden, out)
            held.append(cache)
            queries.append((q[:, 0], lse[..., 0]))
        drawn = _next(hidden[:, 0], config, params, state.key_b, position + 1, sampling)
        emitted = jnp.where(done, NO_TOKEN, token)
        done = left == 0  # the token just put in was the last one
        left = jnp.where(done, 0, _left(drawn, left, stop))
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
        queries = [(jnp.moveaxis(q, 0, 1), jnp.moveaxis(lse, 0, -1)) for q, lse in queries]
        caches = evict(config, policy, caches, queries, at.T, state.chunk, state.key_b, budget)
    token = jnp.where(done, NO_TOKEN, token)
    state = State(caches, token, position, left, state.key_b, state.chunk + 1)
    return state, tokens.T


def evict(
    config: ModelConfig,
    policy: Policy,
    caches: Sequence[kv.Cache],
    query_y: Sequence[tuple[Array, Array]],
    position_bl: Array,
    chunk: Array,
    key_b: Array,
    budget: int,
) -> tuple[kv.Cache, ...]:
    """The eviction of every layer, when the staging rings are full.

    Args:
      query_y: each layer's last `L` queries [b, l, h, d] and the log-sum-exps of their attention
        [b, k, g, l].
      position_bl: their positions, -1 for rows that were done.
    """
    held = []
    for i, (cache, query) in enumerate(zip(caches, query_y, strict=True)):
        one = jax.tree.map(lambda x, i=i: x[i], policy)
        _, _, cache = replay.evict(config, one, cache, *query, position_bl, chunk, key_b, budget, i)
        held.append(cache)
    return tuple(held)


_STATIC = ("config", "prompt_width", "budget", "interval", "sampling", "stop")
_decode_chunk = jax.jit(
    decode_chunk,
    static_argnames=_STATIC,
    donate_argnames="state",
)


@functools.partial(
    jax.jit,
    static_argnames=(*_STATIC, "new_tokens"),
    donate_argnames="state",
)
def decode(
    config: ModelConfig,
    params: models.Params,
    policy: Policy,
    state: State,
    prompt_width: int,
    budget: int,
    interval: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    new_tokens: int,
) -> tuple[Array, State]:
    """Decodes until every row is done, in one program on the device.

    Returns:
      Tokens [b, n], `NO_TOKEN` after a row's last one, `n` being `new_tokens` rounded up to a
      multiple of `L`; and the last state, whose caches took the place of those given.
    """
    chunks = -(-new_tokens // interval)
    batch = state.token_b.shape[0]
    out = jnp.full((batch, chunks * interval), NO_TOKEN, jnp.int32)

    def going(carry):
        n, _, state = carry
        return (n < chunks) & (state.token_b != NO_TOKEN).any()

    def body(carry):
        n, out, state = carry
        state, tokens = decode_chunk(
            config, params, policy, state, prompt_width, budget, interval, sampling, stop
        )
        return n + 1, jax.lax.dynamic_update_slice(out, tokens, (0, n * interval)), state

    _, out, state = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), out, state))
    return out, state


def _start(
    config,
    params,
    policy,
    prompts,
    keys,
    new_tokens,
    budget,
    interval,
    sampling,
    stop,
    width=0,
    limit=None,
):
    if not len(prompts):
        raise UserError("no prompts given")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty: give at least one token")
        unknown = [int(x) for x in prompt if not 0 <= x < config.vocab_size]
        if unknown:
            raise UserError(
                f"prompt {i} has token {unknown[0]}, beyond the model's {config.vocab_size}"
            )
    if new_tokens < 1:
        raise UserError(f"new_tokens = {new_tokens} must be at least 1")
    replay.check(config, policy, budget, interval, len(prompts))
    token, padding = left_pad(prompts, interval)
    if width > token.shape[1]:
        extra = -(-width // interval) * interval - token.shape[1]
        token, padding = np.pad(token, ((0, 0), (extra, 0))), padding + extra
    limit = np.full(len(prompts), new_tokens) if limit is None else np.asarray(limit)
    if limit.shape != (len(prompts),) or limit.min() < 0 or limit.max() > new_tokens:
        raise UserError(f"limit must be {len(prompts)} numbers from 0 to new_tokens = {new_tokens}")
    state = prefill(
        config,
        params,
        policy,
        token,
        padding,
        keys,
        limit.astype(np.int32),
        budget=budget,
        interval=interval,
        sampling=sampling,
        stop=stop,
        new_tokens=new_tokens,
    )
    return state, token.shape[1]


def generate(
    config: ModelConfig,
    params: models.Params,
    policy: Policy,
    prompts: Sequence[np.ndarray],
    keys: Array,
    new_tokens: int,
    budget: int,
    interval: int,
    sampling: Sampling = Sampling(),
    stop: tuple[int, ...] = (),
    width: int = 0,
    limit: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Continues prompts of any lengths under a policy.

    Args:
      prompts: token ids of each row; longer ones than `B + L` are evicted from as they are read.
      keys: one PRNG key per row: equal rows with different keys are different samples.
      new_tokens: at most this many are added.
      stop: tokens that end a row.
      width: pad prompts to at least this width, so that batches share a program.
      limit: per row, at most this many tokens (no more than `new_tokens`); 0 leaves a row out.

    Returns:
      The new tokens of each row, the stop token included.

    Raises:
      UserError: a prompt is empty or has a token that the model does not know, or sizes are wrong.
    """
    state, width = _start(
        config, params, policy, prompts, keys, new_tokens, budget, interval, sampling, stop,
        width, limit,
    )  # fmt: skip
    out, _ = decode(
        config, params, policy, state, width, budget, interval, sampling, stop, new_tokens
    )
    limit = [new_tokens] * len(prompts) if limit is None else limit
    rows = [
        row[: min(n, most)]
        for row, n, most in zip(
            np.asarray(out), (np.asarray(out) != NO_TOKEN).sum(1), limit, strict=True
        )
    ]
    _check_finite(rows, params)
    return rows


def _check_finite(rows: Sequence[np.ndarray], params: models.Params) -> None:
    """Refuses rows in which a token could not be drawn."""
    if bad := [i for i, row in enumerate(rows) if (row == _NOT_FINITE).any()]:
        dtype = params["embed_vm"].dtype
        other = "float32" if dtype == jnp.bfloat16 else "bfloat16 or float32"
        cure = "check its weights" if dtype == jnp.float32 else f"set dtype to {other}"
        raise UserError(
            f"the language model's logits are NaN or infinite in {dtype} (row {bad[0]}, and "
            f"{len(bad) - 1} more of {len(rows)}): {cure}"
        )


def stream(
    config: ModelConfig,
    params: models.Params,
    policy: Policy,
    prompts: Sequence[np.ndarray],
    keys: Array,
    new_tokens: int,
    budget: int,
    interval: int,
    sampling: Sampling = Sampling(),
    stop: tuple[int, ...] = (),
) -> Iterator[list[np.ndarray]]:
    """As `generate`, but yields the new tokens of every row after each `L` steps."""
    state, width = _start(
        config, params, policy, prompts, keys, new_tokens, budget, interval, sampling, stop
    )
    for _ in range(-(-new_tokens // interval)):
        state, tokens = _decode_chunk(
            config, params, policy, state, width, budget, interval, sampling, stop
        )
        rows = [row[row != NO_TOKEN] for row in np.asarray(tokens)]
        _check_finite(rows, params)
        yield rows
        if (np.asarray(state.token_b) == NO_TOKEN).all():
            return


def evictions(prompt: int, generated: int, budget: int, interval: int) -> int:
    """How many evictions of a row of generation dropped an entry that a later token missed.

    Counted for heads that keep B entries; where budgets are shared unevenly, some drop earlier.

    Args:
      prompt, generated: tokens of the row. The last generated token never enters attention.
    """
    cached = prompt + generated - 1
    first = (prompt - 1) % interval + 1  # the prompt's first chunk is the incomplete one
    ends = range(first, cached, interval)
    return sum(end > budget for end in ends)
