"""Generation with eviction, of a batch that waits for its longest row; see `fkv.engine.batcher`.

It is what the benchmark times and dry runs compile. Prefill is replay. Decoding is step-outer:
unrolled layers with one cache each, a `scan` of exactly `L` steps, and one eviction of every layer;
so on until every row is done. The steps are a program, and an eviction is another, compiled once
and called layer after layer: that compiles quickly, and only one layer's temporaries are alive. Of
shallow models all of it is a single program, see `SHALLOW`.

A new token is written to the same slot in every row: prompts are left-padded to a multiple of `L`,
and padding leaves empty slots, which nothing attends to and which are dropped first. So the output
of a row depends on its own tokens only, whatever else is in the batch.

A policy that does not evict (`full`) has a cache for prompt and answer; the rest is shared.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from fkv import models
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch, left_pad
from fkv.engine.replay import Chunk, Site
from fkv.engine.sampling import FREE, Sampling
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.models import LM, ModelConfig
from fkv.models.numerics import top_k
from fkv.policies.base import Policy

NO_TOKEN = -1
# Layers up to which decoding is one program with an outer `while_loop`: a small model's steps take
# less time than the calls of several programs.
SHALLOW = 8
_NOT_FINITE = -2  # stands for a token where logits are NaN or infinite; ends the row


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of decoding; static under `jit`.

    Attributes:
      cadence: of evictions; for a policy that does not evict, only the interval is used.
      sampling: of the tokens.
      stop: tokens that end a row.
    """

    cadence: Cadence
    sampling: Sampling = FREE
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
    if sampling.min_p:
        least = x.max(-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        x = jnp.where(x >= least, x, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(key_b, x)
    if token is not None:
        drawn = jnp.take_along_axis(token, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)


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
      lm: with separate layers; of stacked ones each is copied in its turn.
      prompts: from `batch.left_pad`; with a policy that evicts, `t` is a multiple of `L`.
      key_b: one PRNG key per row.
      limit_b: tokens that each row may add, at most `new_tokens` (which sizes the full cache).
    """
    hidden, position = _begin(lm, prompts)
    room = -(-new_tokens // plan.cadence.interval) * plan.cadence.interval
    caches = []
    for layer in range(lm.config.layers):
        site = Site(lm.config, plan.cadence, layer, key_b, prompts.prompt_b)
        weights = models.layer(lm, layer)
        hidden, cache = prefill_layer(weights, policy, site, hidden, position, room)
        caches.append(cache)
    token, position_b, left = first_token(lm, plan, hidden, position, key_b, limit_b)
    chunk = jnp.asarray(-(-position.shape[1] // plan.cadence.interval), jnp.int32)
    # Copied, as decoding donates the state and the keys are the caller's.
    kept = jnp.copy(key_b), jnp.array(prompts.prompt_b)
    return State(tuple(caches), token, position_b, left, *kept, chunk)


@jax.jit
def _begin(lm, prompts):
    return models.embed(lm, prompts.token_bt), prompts.position_bt


@functools.partial(jax.jit, static_argnames="room", donate_argnames="hidden_btm")
def prefill_layer(
    weights: models.Params,
    policy: Policy,
    site: Site,
    hidden_btm: Array,
    position_bt: Array,
    room: int,
) -> tuple[Array, kv.Cache]:
    """One layer of `prefill`: its output, in the buffer of its input, and its cache.

    Args:
      weights: of this layer.
      policy: of all layers; `site.layer` selects one.
      room: slots of a full cache for new tokens.
    """
    (b, t), config = position_bt.shape, site.config
    policy = jax.tree.map(lambda x: x[site.layer], policy)
    qkv = replay.project(policy, config, site.layer, weights, hidden_btm, position_bt)
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
def first_token(
    lm: LM, plan: Plan, hidden_btm: Array, position_bt: Array, key_b: Array, limit_b: Array
) -> tuple[Array, Array, Array]:
    """The end of `prefill`: `token_b`, `position_b` and `left_b` of a `State`."""
    position_b = position_bt[:, -1] + 1
    token = _next(lm, hidden_btm[:, -1], key_b, position_b, plan.sampling)
    return token, position_b, _left(token, limit_b, plan.stop)


@flax.struct.dataclass
class Asked:
    """What the steps since the last eviction asked a layer's cache; see `replay.Chunk`.

    As the scan over steps leaves it, the axis of tokens first: each eviction turns its own.
    """

    query_lbhd: Array
    lse_lbkg: Array
    position_lb: Array
    index: Array

    def chunk(self) -> Chunk:
        query, lse = jnp.moveaxis(self.query_lbhd, 0, 1), jnp.moveaxis(self.lse_lbkg, 0, -1)
        return Chunk(query, lse, self.position_lb.T, self.index)


@functools.partial(jax.jit, static_argnames=("plan", "prompt_width"), donate_argnames="state")
def steps(
    lm: LM, policy: Policy, plan: Plan, state: State, prompt_width: int
) -> tuple[State, Array, tuple[Asked, ...]]:
    """`L` decoding steps, without the eviction that follows.

    Args:
      lm: with separate layers, which are read in place; stacked ones are copied, all of them.
      prompt_width: padded width of the prompts, the first slots of a full cache.

    Returns:
      The state; the tokens [b, L] that entered the cache, `NO_TOKEN` for rows that were done; and,
      for a policy that evicts, what `evict_layer` needs of each layer, whose staging rings are
      full. The first token was sampled before.
    """
    config, interval = lm.config, plan.cadence.interval
    weights = [models.layer(lm, i) for i in range(config.layers)]
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
        for n, (layer, cache) in enumerate(zip(weights, caches, strict=True)):
            one = policy if policy.arrive is None else jax.tree.map(lambda x, n=n: x[n], policy)
            q, k, v, *arrived = replay.project(one, config, n, layer, hidden, at)
            cache = kv.append(cache, start + i, k, v, at, *arrived)
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
    asked = tuple(Asked(q, lse, at, state.chunk) for q, lse in queries)
    token = jnp.where(done, NO_TOKEN, token)
    state = State(caches, token, position, left, state.key_b, state.prompt_b, state.chunk + 1)
    return state, tokens.T, asked


@functools.partial(jax.jit, donate_argnames="cache")
def evict_layer(policy: Policy, cache: kv.Cache, asked: Asked, site: Site) -> kv.Cache:
    """The eviction of one layer, whose staging ring is full, in place.

    Args:
      policy: of all layers; `site.layer` selects one.
    """
    one = jax.tree.map(lambda x: x[site.layer], policy)
    return replay.evict(one, cache, asked.chunk(), site)[2]


def evict(
    config: ModelConfig,
    policy: Policy,
    plan: Plan,
    state: State,
    asked: Sequence[Asked],
    program: Callable[..., kv.Cache] = evict_layer,
) -> State:
    """The evictions after `steps`, layer after layer.

    Args:
      program: `evict_layer`, or what it was compiled to.
    """
    site = Site(config, plan.cadence, 0, state.key_b, state.prompt_b)
    caches = list(state.caches)
    for i, one in enumerate(asked):
        caches[i] = program(policy, caches[i], one, site.replace(layer=np.int32(i)))
    return state.replace(caches=tuple(caches))


def decode_chunk(
    lm: LM, policy: Policy, plan: Plan, state: State, prompt_width: int
) -> tuple[State, Array]:
    """`steps` and `evict`: the programs of both, or under `jit` a single one.

    Returns:
      The state, which reuses the buffers of that given, and the tokens of `steps`.
    """
    state, tokens, asked = steps(lm, policy, plan, state, prompt_width)
    return evict(lm.config, policy, plan, state, asked), tokens


one_chunk = jax.jit(decode_chunk, static_argnames=("plan", "prompt_width"), donate_argnames="state")


def _settled(state: State) -> State:
    """With what is not a cache replicated over a mesh, if there is one.

    Programs leave it so, but under several names of that sharding: each would be compiled for.
    """
    there = state.caches[0].position_bks.sharding
    if not isinstance(there, NamedSharding):
        return state
    rest = jax.device_put(state.replace(caches=()), NamedSharding(there.mesh, PartitionSpec()))
    return rest.replace(caches=state.caches)


def chunks(
    lm: LM, policy: Policy, plan: Plan, state: State, prompt_width: int, new_tokens: int
) -> Iterator[tuple[State, np.ndarray]]:
    """Decodes chunk by chunk until every row is done, each as `decode_chunk` returns it.

    The state is valid until the next chunk is asked for.
    """
    run = one_chunk if lm.config.layers <= SHALLOW else decode_chunk
    for _ in range(-(-new_tokens // plan.cadence.interval)):
        state, tokens = run(lm, policy, plan, _settled(state), prompt_width)
        tokens, newest = jax.device_get((tokens, state.token_b))  # evictions may still run
        yield state, tokens
        if (newest == NO_TOKEN).all():
            return


def decode(
    lm: LM, policy: Policy, plan: Plan, state: State, prompt_width: int, new_tokens: int
) -> tuple[Array | np.ndarray, State]:
    """Decodes until every row is done.

    Returns:
      Tokens [b, n], `NO_TOKEN` after a row's last one, with `n` being `new_tokens` rounded up to a
      multiple of `L`; and the last state, whose caches reuse the buffers of those given.
    """
    if lm.config.layers <= SHALLOW:
        return decode_at_once(lm, policy, plan, state, prompt_width, new_tokens)
    interval = plan.cadence.interval
    out = np.full((len(state.token_b), -(-new_tokens // interval) * interval), NO_TOKEN, np.int32)
    for i, (last, tokens) in enumerate(chunks(lm, policy, plan, state, prompt_width, new_tokens)):
        state, out[:, i * interval : (i + 1) * interval] = last, tokens
    return out, state


@functools.partial(
    jax.jit, static_argnames=("plan", "prompt_width", "new_tokens"), donate_argnames="state"
)
def decode_at_once(
    lm: LM, policy: Policy, plan: Plan, state: State, prompt_width: int, new_tokens: int
) -> tuple[Array, State]:
    """`decode` as one program, which never returns to the host."""
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
      lm: with separate layers; if they are stacked, a second copy is made.
      prompts: token ids of each row; prefill evicts from those longer than `B + L`.
      key_b: one PRNG key per row: equal rows with different keys are different samples.
      limit: largest number of new tokens for each row; 0 leaves a row out.
      width: least padded width of the prompts, so that batches share a program.

    Returns:
      The new tokens of each row, the stop token included.

    Raises:
      UserError: a prompt is empty or has an id outside the vocabulary, or sizes are wrong.
    """
    lm = models.separate(lm, consume=False)
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
    lm = models.separate(lm, consume=False)
    state, width = _start(lm, policy, plan, prompts, key_b, limit)
    for _, tokens in chunks(lm, policy, plan, state, width, max(limit)):
        rows = [row[row != NO_TOKEN] for row in tokens]
        _check_finite(rows, lm)
        yield rows
