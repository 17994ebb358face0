"""Decoding: at equal batch, by tokens generated, and at the largest batch that fits."""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fkv.cache import slots as kv
from fkv.engine import decoding, replay
from fkv.jobs import common
from fkv.jobs.benchmark.base import Arm, Bench, failure, measure, spread
from fkv.jobs.benchmark.device import timed
from fkv.keys import fold, keys_of
from fkv.runs import costs


def decode(bench: Bench) -> list[dict]:
    """Every policy at every budget, batch and length."""
    s = bench.settings
    return _measure(bench, bench.arms(s.batches, s.lengths))


def _measure(bench: Bench, arms: Sequence[Arm]) -> list[dict]:
    if bench.settings.compile_threads > 1:
        shapes = {_shape(arm): arm for arm in arms}.values()
        with concurrent.futures.ThreadPoolExecutor(bench.settings.compile_threads) as pool:
            makers = [(make, arm) for make in (_program, _eviction) for arm in shapes]
            # The measurement reports errors.
            list(pool.map(lambda one: bench.late or failure(one[0], bench, one[1]), makers))

    def prepare(arm):
        _, about = _program(bench, arm)
        return lambda: (_run_decode(bench, arm, _chunks(bench)), _run_evictions(bench, arm)), about

    return measure(bench, arms, prepare, functools.partial(_record, bench))


def _record(bench: Bench, arm: Arm, found: dict[Arm, list[tuple[list[float], float]]]) -> dict:
    policy, config = bench.policy(arm.policy), bench.lm.config
    slots = policy.capacity(arm.budget) + bench.interval if policy.evicts else arm.length
    seconds = np.array([chunks for chunks, _ in found[arm]]) / bench.interval  # per token
    token = np.median(seconds, axis=1)
    ideal, bound = bench.peaks.roofline(
        costs.decode_flops(config, arm.batch, slots),
        costs.decode_bytes(config, arm.batch, slots, bench.config.dtype),
    )
    middle, evicting = float(np.median(token)), np.median([seconds for _, seconds in found[arm]])
    return {
        "slots": slots,
        **spread("tokens_per_s", arm.batch / token),
        "ms_p50": 1e3 * float(np.median(seconds)),
        "ms_p99": 1e3 * float(np.percentile(seconds, 99)),
        "roofline": ideal / middle,
        "bound": bound,
        "eviction": float(evicting) / (middle * bench.interval),
    }


def _chunks(bench: Bench) -> int:
    """Timed chunks of `L` decoding steps in a repeat; one before them warms up."""
    return -(-bench.settings.new_tokens // bench.interval)


def _prompt(bench: Bench, arm: Arm) -> int:
    """Tokens before the first that is decoded."""
    return arm.length - (_chunks(bench) + 1) * bench.interval


def _shape(arm: Arm) -> Arm:
    """Equal for arms that share a program: under eviction, those of all lengths."""
    return dataclasses.replace(arm, length=0 if arm.budget else arm.length)


def _program(bench: Bench, arm: Arm) -> tuple[Callable, dict]:
    """`L` decoding steps with their eviction, see `Bench.compiled`."""
    policy = bench.policy(arm.policy)
    state = jax.eval_shape(functools.partial(synthetic_state, bench, arm), bench.key)
    bench.check_fits(costs.size((bench.lm.params, state.caches)))

    def lower():
        width = bench.interval if policy.evicts else _prompt(bench, arm)
        call = jax.jit(decoding.decode_chunk, static_argnums=(2, 4), donate_argnums=3)
        return call.lower(bench.lm, policy, bench.plan(arm.budget), state, width)

    program, about = bench.compiled(("decode", _shape(arm)), lower)
    return functools.partial(program, bench.lm, policy), about


def synthetic_state(bench: Bench, arm: Arm, key: jax.Array) -> decoding.State:
    """A state in the middle of decoding, of random entries, which cost what real ones do.

    Caches are as full as after a prompt that leaves room for the timed chunks.
    """
    policy, config, interval = bench.policy(arm.policy), bench.lm.config, bench.interval
    prompt, dtype = _prompt(bench, arm), bench.config.dtype
    if policy.evicts:
        empty = replay.init_cache(policy, arm.batch, config, bench.plan(arm.budget).cadence, dtype)
    else:
        held_as = config.cache_dtype or dtype
        empty = kv.init(arm.batch, config.kv_heads, arm.length, config.head_dim, held_as)
    shape = empty.position_bks.shape
    held = shape[-1] - interval if policy.evicts else prompt
    index = jnp.arange(shape[-1], dtype=jnp.int32)
    position = jnp.where(index < held, jnp.maximum(index + prompt - held, -1), -1)
    position = jnp.broadcast_to(position, shape)

    def one(layer):
        keys = (fold(key, 1, layer, kind) for kind in range(2))
        k, v = (jax.random.normal(x, empty.key_bksd.shape, dtype) for x in keys)
        k, v = (kv.stored(x, config.cache_dtype) for x in (k, v))
        return empty.replace(key_bksd=k, value_bksd=v, position_bks=position)

    row = jnp.zeros((arm.batch,), jnp.int32)
    return decoding.State(
        tuple(one(i) for i in range(config.layers)), row, row + prompt, row + jnp.int32(2**30),
        keys_of(fold(key, 0), arm.batch), row + prompt, jnp.asarray(-(-prompt // interval)),
    )  # fmt: skip


def _state(bench: Bench, arm: Arm) -> decoding.State:
    return jax.jit(functools.partial(synthetic_state, bench, arm))(bench.key)


def _run_decode(bench: Bench, arm: Arm, chunks: int) -> list[float]:
    """Seconds of each of `chunks` chunks, after one that warms up."""
    call, _ = _program(bench, arm)
    state, found = _state(bench, arm), []
    for _ in range(chunks + 1):
        start = time.perf_counter()
        state, tokens = call(state)
        np.asarray(tokens)
        found.append(time.perf_counter() - start)
    return found[1:]


def _eviction(bench: Bench, arm: Arm) -> Callable:
    """The evictions of all layers as a program of their own, from caches to caches."""
    policy, config, interval = bench.policy(arm.policy), bench.lm.config, bench.interval
    if not policy.evicts:
        return lambda caches: caches
    state = jax.eval_shape(functools.partial(synthetic_state, bench, arm), bench.key)

    def evict(policy, caches, chunks, site):
        ring = np.s_[..., -interval:]  # which the steps have filled
        newest = chunks[0].position_bl[:, None]
        full = [x.replace(position_bks=x.position_bks.at[ring].set(newest)) for x in caches]
        return decoding.evict(policy, full, chunks, site)

    shape = (arm.batch, interval, config.heads, config.head_dim)
    query = jax.random.normal(fold(bench.key, 2), shape, bench.config.dtype)
    lse = jnp.zeros((arm.batch, config.kv_heads, config.group_size, interval))
    position = jnp.broadcast_to(_prompt(bench, arm) + jnp.arange(interval), (arm.batch, interval))
    index = jnp.asarray(-(-_prompt(bench, arm) // interval))
    chunks = [replay.Chunk(query, lse, position, index)] * config.layers
    rows = bench.row_keys(arm.batch), jnp.full(arm.batch, _prompt(bench, arm))
    site = replay.Site(config, bench.plan(arm.budget).cadence, 0, *rows)
    program, _ = bench.compiled(
        ("evict", _shape(arm)),
        lambda: jax.jit(evict, donate_argnums=1).lower(policy, state.caches, chunks, site),
    )
    return lambda caches: program(policy, caches, chunks, site)


def _run_evictions(bench: Bench, arm: Arm) -> float:
    """Median seconds of the evictions of all layers."""
    if not bench.policy(arm.policy).evicts:
        return 0.0
    call = _eviction(bench, arm)
    caches, found = _state(bench, arm).caches, []
    for _ in range(max(_chunks(bench), 3) + 1):
        seconds, caches = timed(call, caches)
        found.append(seconds)
    return float(np.median(found[1:]))


# ---- the largest batch


def largest_batch(bench: Bench) -> list[dict]:
    """The largest batch of every policy and budget, and its speed: of the full cache at every
    length, under eviction, where caches do not grow, at the longest.
    """
    s = bench.settings
    arms = []
    for arm in bench.arms((1,), s.lengths):
        if bench.late or (arm.budget and arm.length < max(s.lengths)):
            continue

        def fits(batch, arm=arm):
            return not failure(_run_decode, bench, dataclasses.replace(arm, batch=batch), 0)

        if best := largest(fits, _guess(bench, arm), s.largest_limit, s.largest_within):
            arms.append(dataclasses.replace(arm, batch=best))
            common.say(f"  {arms[-1]} is the largest")
    found = _measure(bench, arms)
    full = {str(r["length"]): r["tokens_per_s"] for r in found if r["fits"] and not r["budget"]}
    for record in found:
        if record["fits"]:
            record["limited"] = record["batch"] == s.largest_limit
            record["times_full"] = {n: record["tokens_per_s"] / x for n, x in full.items()}
    return found


def _guess(bench: Bench, arm: Arm) -> int:
    """Rows whose caches fill nine tenths of the memory beside the weights, at least one."""
    slots = bench.policy(arm.policy).capacity(arm.budget) + bench.interval
    config, dtype = bench.lm.config, bench.config.dtype
    row = costs.cache_bytes(config, slots if arm.budget else arm.length, dtype)
    return max(1, int(0.9 * (bench.limit - costs.parameter_bytes(config, dtype)) / row))


def largest(fits: Callable[[int], bool], start: int, limit: int, within: float) -> int:
    """The largest batch that fits, by doubling (or halving) and bisection.

    Args:
      start: tried first.
      limit: the largest to try.
      within: bisection stops when the smallest that does not fit is this share above the largest
        that does.

    Returns:
      The batch; 0 if not one row fits.
    """
    low, high, batch = 0, limit + 1, min(start, limit)
    while low < batch < high:
        if fits(batch):
            low, batch = batch, min(2 * batch, limit)
        else:
            high, batch = batch, batch // 2
    while high - low > max(1, within * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- growth


def growth(bench: Bench) -> list[dict]:
    """Milliseconds per token by tokens generated, in one long generation.

    A full cache is allocated at its final size, so it is left to `decode`.
    """
    s, interval = bench.settings, bench.interval
    arms = [arm for arm in bench.arms((s.growth_batch,), (s.growth_tokens,)) if arm.budget]

    def run(arm, chunks):
        """Seconds of every chunk of `L` decoding steps after the first, its eviction included."""
        prompts, keys = bench.tokens(arm.batch, interval), bench.row_keys(arm.batch)
        limit = [chunks * interval] * arm.batch
        policy, plan = bench.policy(arm.policy), bench.plan(arm.budget)
        steps = decoding.stream(bench.lm, policy, plan, prompts, keys, limit)
        ends = [time.perf_counter() for _ in steps]  # the tokens are on the host
        return np.diff(ends)

    def prepare(arm):
        run(arm, 2)
        return functools.partial(run, arm, -(-arm.length // interval)), {}

    def record(arm, found):
        return growth_record(np.array(found[arm]), interval)

    return measure(bench, arms, prepare, record)


def growth_record(seconds_rc: np.ndarray, interval: int) -> dict:
    """Medians over repeats; `ms_per_token` is by tokens generated."""
    # The first chunk, with the prefill, is not among the times.
    generated = interval * (2 + np.arange(seconds_rc.shape[1]))
    marks = [n for n in (2**i * 1024 for i in range(10)) if n <= generated[-1]]
    marks = marks or [int(generated[0]), int(generated[-1])]
    window = max(1, seconds_rc.shape[1] // 32)
    by_mark = {}
    for mark in marks:
        at = int(np.searchsorted(generated, mark))
        part = seconds_rc[:, max(0, at - window) : at + 1]
        by_mark[mark] = np.median(part, axis=1) / interval  # per repeat
    return {
        "ms_per_token": {str(n): float(1e3 * np.median(x)) for n, x in by_mark.items()},
        **spread("growth", by_mark[marks[-1]] / by_mark[marks[0]]),
    }
