"""Decoding: at equal batch, by tokens generated, and at the largest batch that fits."""

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv.cache import slots as kv
from fkv.engine import steps
from fkv.engine.requests import STOPS
from fkv.engine.sampling import Samplings
from fkv.engine.steps import NO_TOKEN
from fkv.jobs import common, programs
from fkv.jobs.benchmark.base import Arm, Bench, failure, measure, spread
from fkv.jobs.benchmark.device import timed
from fkv.keys import fold, keys_of
from fkv.models import ModelConfig
from fkv.runs import costs


def decode(bench: Bench) -> list[dict]:
    """Every policy at every budget and batch."""
    return _measure(bench, _arms(bench, bench.settings.batches))


def _arms(bench: Bench, batches: Sequence[int]) -> list[Arm]:
    """The full cache at every length; under eviction, where caches do not grow, the longest."""
    longest = max(bench.settings.lengths)
    arms = bench.arms(batches, bench.settings.lengths)
    return [arm for arm in arms if not arm.budget or arm.length == longest]


def _measure(bench: Bench, arms: Sequence[Arm]) -> list[dict]:
    shapes = {_shape(arm): arm for arm in arms}.values()
    # The measurement reports errors.
    _in_threads(bench, lambda arm: failure(_program, bench, arm), shapes)

    def prepare(arm):
        _, about = _program(bench, arm)
        return lambda: (_run_decode(bench, arm, _chunks(bench)), _run_evictions(bench, arm)), about

    return measure(bench, arms, prepare, functools.partial(_record, bench))


def _in_threads(bench: Bench, compiling: Callable[[Arm], Any], arms: Iterable[Arm]) -> list:
    """Results by arm, of several at a time; None of those for which it is too late."""
    with concurrent.futures.ThreadPoolExecutor(bench.settings.compile_threads) as pool:
        return list(pool.map(lambda arm: None if bench.late else compiling(arm), arms))


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


def _lowered(bench: Bench, arm: Arm) -> programs.Decode:
    """The programs of an arm."""
    policy, plan, interval = bench.policy(arm.policy), bench.plan(arm.budget), bench.interval
    prompt = interval if policy.evicts else _prompt(bench, arm)
    new_tokens = (_chunks(bench) + 1) * interval
    return programs.decode(bench.lm, policy, plan, (arm.batch, prompt), new_tokens)


def _program(bench: Bench, arm: Arm) -> tuple[Callable, dict]:
    """`L` decoding steps and their border, from state to state, see `Bench.compiled`."""
    one = _lowered(bench, arm)
    bench.check_fits(costs.size((one.lm.params, one.state)))
    program, about = bench.compiled(_shape(arm), one.steps)
    evict_layer, more = bench.compiled(("evict", _shape(arm)), one.evict_layer)
    about = about | {"compile_s": about["compile_s"] + more["compile_s"]}
    rows = _rows(bench, arm)

    def call(state):
        state, drawn = program(one.lm, one.policy, state, rows, np.int32(0))
        cadence = one.plan.cadence
        return steps.evict(one.lm.config, one.policy, cadence, state, rows, evict_layer), drawn

    return call, about


def _rows(bench: Bench, arm: Arm) -> steps.Rows:
    """What requests without an end would set."""
    how = Samplings.of([bench.plan(arm.budget).sampling] * arm.batch)
    none = np.zeros(arm.batch, np.int32)
    stop = np.full((arm.batch, STOPS), NO_TOKEN, np.int32)
    prompt = none + _prompt(bench, arm)
    return jax.device_put(steps.Rows(keys_of(fold(bench.key, 0), arm.batch), prompt, stop, how))


def synthetic_state(bench: Bench, arm: Arm) -> steps.State:
    """A state in the middle of decoding, of random entries, which cost what real ones do.

    Caches are as full as after a prompt that leaves room for the timed chunks.
    """
    policy, config, interval = bench.policy(arm.policy), bench.lm.config, bench.interval
    prompt, dtype, key = _prompt(bench, arm), bench.config.dtype, bench.key
    cadence, room = bench.plan(arm.budget).cadence, arm.length
    empty = functools.partial(
        steps.empty, policy, arm.batch, dataclasses.replace(config, layers=1), cadence, room, dtype
    )
    (one,), _ = empty()
    held = one.position_bks.shape[-1] - interval if policy.evicts else prompt
    random = functools.partial(_random_entries, config, one, held, prompt, dtype)
    asked = [empty()[1] for _ in range(config.layers)]
    # One after the other: an accelerator waits ten seconds before it says that memory is full.
    caches = [jax.block_until_ready(random(fold(key, 1, i))) for i in range(config.layers)]
    row = jnp.zeros((arm.batch,), jnp.int32)
    return steps.State(
        tuple(caches), tuple(x for some in asked for x in some), row, row + prompt,
        row + jnp.int32(2**30),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "held", "prompt", "dtype"))
def _random_entries(
    config: ModelConfig, empty: kv.Cache, held: int, prompt: int, dtype: str, key: Array
) -> kv.Cache:
    """A cache of a layer whose first `held` slots hold the last positions of a prompt."""
    index = jnp.arange(empty.position_bks.shape[-1], dtype=jnp.int32)
    position = jnp.where(index < held, jnp.maximum(index + prompt - held, -1), -1)
    position_bks = jnp.broadcast_to(position, empty.position_bks.shape)
    shape = *position_bks.shape, config.head_dim
    k, v = (jax.random.normal(fold(key, i), shape, dtype) for i in range(2))
    k, v = (kv.stored(x, config.cache_dtype) for x in (k, v))
    return empty.replace(key_bksd=k, value_bksd=v, position_bks=position_bks)


def _run_decode(bench: Bench, arm: Arm, chunks: int) -> list[float]:
    """Seconds of each of `chunks` chunks, after one that warms up."""
    call, _ = _program(bench, arm)
    state, found = synthetic_state(bench, arm), []
    for _ in range(chunks + 1):
        start = time.perf_counter()
        state, drawn = call(state)
        np.asarray(drawn.token)
        found.append(time.perf_counter() - start)
    return found[1:]


@functools.partial(jax.jit, donate_argnames="caches")
def _filled(caches: tuple[kv.Cache, ...], position_b1l: Array) -> tuple[kv.Cache, ...]:
    """With staging rings as the steps leave them."""
    at = np.s_[..., -position_b1l.shape[-1] :]
    full = (x.position_bks.at[at].set(position_b1l) for x in caches)
    return tuple(x.replace(position_bks=y) for x, y in zip(caches, full, strict=True))


def _run_evictions(bench: Bench, arm: Arm) -> float:
    """Median seconds of the evictions of all layers, after random queries."""
    one = _lowered(bench, arm)
    if not one.policy.evicts:
        return 0.0
    program, _ = bench.compiled(("evict", _shape(arm)), one.evict_layer)
    rows, config, found = _rows(bench, arm), one.lm.config, []
    state = synthetic_state(bench, arm)
    query = state.asked[0].query_lbhd
    query = jax.random.normal(fold(bench.key, 2), query.shape, query.dtype)
    state = state.replace(asked=tuple(x.replace(query_lbhd=query) for x in state.asked))
    position = _prompt(bench, arm) + jnp.arange(bench.interval, dtype=jnp.int32)[None, None]
    position = jnp.broadcast_to(position, (arm.batch, 1, bench.interval))
    again = functools.partial(steps.evict, config, one.policy, one.plan.cadence)
    for _ in range(max(_chunks(bench), 3) + 1):
        caches = _filled(state.caches, position)
        state = jax.block_until_ready(state.replace(caches=caches))
        seconds, state = timed(again, state, rows, program)
        found.append(seconds)
    return float(np.median(found[1:]))


# ---- the largest batch


def largest_batch(bench: Bench) -> list[dict]:
    """The largest batch of every policy and budget, and its speed, at the lengths of `decode`."""
    s, arms, asked = bench.settings, [], _arms(bench, (1,))
    starts = _in_threads(bench, functools.partial(_guess, bench), asked)
    for arm, start in zip(asked, starts, strict=True):
        if bench.late or not start:
            continue

        def fits(batch, arm=arm):
            one = dataclasses.replace(arm, batch=batch)
            return _bytes(bench, one) <= bench.limit and not failure(_run_decode, bench, one, 0)

        if best := largest(fits, start, s.largest_limit, s.largest_within):
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
    """The batch whose program is as large as the memory, at least one row.

    By the program of a batch whose caches fill nine tenths of it; compiles those of both batches.
    """
    slots = bench.policy(arm.policy).capacity(arm.budget) + bench.interval
    config, dtype = bench.lm.config, bench.config.dtype
    row = costs.cache_bytes(config, slots if arm.budget else arm.length, dtype)
    weights = costs.parameter_bytes(config, dtype)
    for share in (0.9, 1.0):
        batch = int((share * bench.limit - weights) / row)
        batch = min(max(1, batch), bench.settings.largest_limit)
        arm = dataclasses.replace(arm, batch=batch)
        failure(_program, bench, arm)  # the search reports errors
        row = (_bytes(bench, arm) - weights) / batch or row
    return batch


def _bytes(bench: Bench, arm: Arm) -> float:
    """Bytes that the program of an arm holds, or would by that of the nearest batch compiled."""
    weights, found = costs.parameter_bytes(bench.lm.config, bench.config.dtype), {}
    for key, (_, about) in bench.programs.items():
        if isinstance(key, Arm) and dataclasses.replace(key, batch=arm.batch) == _shape(arm):
            found[key.batch] = about["program_bytes"]
    if not found:
        return weights
    nearest = min(found, key=lambda batch: abs(batch - arm.batch))
    return weights + (found[nearest] - weights) * arm.batch / nearest


def largest(fits: Callable[[int], bool], start: int, limit: int, within: float) -> int:
    """The largest batch that fits, by doubling, or by smaller steps down, and bisection.

    A good guess is a little too large, as memory is fragmented, so the first step down is `within`;
    each further one is the square of the last, at most a half.

    Args:
      start: tried first.
      limit: the largest to try.
      within: bisection stops when the smallest that does not fit is this share above the largest
        that does.

    Returns:
      The batch; 0 if not one row fits.
    """
    low, high, batch, down = 0, limit + 1, min(start, limit), max(1 + within, 1.1)
    while low < batch < high:
        if fits(batch):
            low, batch = batch, min(2 * batch, limit)
        else:
            high, batch = batch, min(batch - 1, math.ceil(batch / down))
            down = min(down**2, 2)
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
        plan, new = bench.plan(arm.budget), chunks * interval
        batcher = bench.batcher(arm.policy, plan, (arm.batch, interval, new))
        bench.submit(batcher, plan, bench.tokens(arm.batch, interval), new)
        ends = []
        while batcher.waiting or batcher.live:
            batcher.step()
            ends.append(time.perf_counter())  # the tokens are on the host
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
