"""Decoding: at equal batch, against what has been generated, at the largest batch that fits."""

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
from fkv.jobs.benchmark.base import Arm, Bench, DoesNotFit, name_of, only_memory
from fkv.keys import fold, keys_of
from fkv.runs import costs


def _decode_program(bench: Bench, arm: Arm):
    """`L` decoding steps with their eviction, and how to make the state that they start from."""
    policy, interval = bench.policy(arm.policy), bench.interval
    make = functools.partial(made_up_state, bench, arm)
    held = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves((bench.lm, jax.eval_shape(lambda: make(bench.key).caches)))
    )
    if held > bench.limit:
        raise DoesNotFit
    width = interval if policy.evicts else _prompt(arm, interval, bench.chunks)
    call = jax.jit(
        decoding.decode_chunk, static_argnames=("plan", "prompt_width"), donate_argnames="state"
    )
    lm = bench.lm.replace(
        config=dataclasses.replace(bench.model, kernel=common.kernel_here(arm.kernel))
    )
    plan = bench.plan(arm)

    def lower():
        state = jax.eval_shape(make, bench.key)
        return call.lower(lm, policy, plan, state, prompt_width=width)

    # Under eviction the program knows nothing of the length.
    name = ("decode", dataclasses.replace(arm, length=0 if policy.evicts else arm.length))
    program, seconds, size = bench.compiled(name, lower)
    if size > bench.limit:
        raise DoesNotFit
    return functools.partial(program, lm, policy), jax.jit(make), seconds, size


def _prompt(arm: Arm, interval: int, chunks: int) -> int:
    """Tokens before the first that is decoded: one chunk of `L` warms up, `chunks` are timed."""
    return arm.length - (chunks + 1) * interval


def made_up_state(bench: Bench, arm: Arm, key: jax.Array) -> decoding.State:
    """A state in the middle of decoding, of random entries: what a step costs they do not change.

    Caches are as full as after a prompt that leaves room for the chunks to come.
    """
    policy, model, dtype = bench.policy(arm.policy), bench.model, bench.config.dtype
    prompt, interval = _prompt(arm, bench.interval, bench.chunks), bench.interval
    if policy.evicts:
        empty = replay.init_cache(policy, arm.batch, model, bench.plan(arm).cadence, dtype)
        held = empty.position_bks.shape[-1] - interval
    else:
        held_as = model.cache_dtype or dtype
        empty = kv.init(arm.batch, model.kv_heads, arm.length, model.head_dim, held_as)
        held = prompt
    index = jnp.arange(empty.position_bks.shape[-1], dtype=jnp.int32)
    position = jnp.where(index < held, jnp.maximum(index + prompt - held, -1), -1)
    position = jnp.broadcast_to(position[None, None], empty.position_bks.shape)

    def one(layer):
        keys = (fold(key, 1, layer, kind) for kind in range(2))
        k, v = (jax.random.normal(x, empty.key_bksd.shape, dtype) for x in keys)
        k, v = (kv.stored(x, model.cache_dtype) for x in (k, v))
        return empty.replace(key_bksd=k, value_bksd=v, position_bks=position)

    row = jnp.zeros((arm.batch,), jnp.int32)
    return decoding.State(
        tuple(one(i) for i in range(model.layers)),
        row,
        row + prompt,
        row + jnp.int32(2**30),
        keys_of(fold(key, 0), arm.batch),
        jnp.asarray(-(-prompt // interval)),
    )


def _run_decode(bench: Bench, arm: Arm, chunks: int) -> list[float]:
    """Seconds of each of `chunks` chunks, after one that warms up."""
    call, make, _, _ = _decode_program(bench, arm)
    state, found = make(bench.key), []
    for _ in range(chunks + 1):
        start = time.perf_counter()
        state, tokens = call(state)
        np.asarray(tokens)
        found.append(time.perf_counter() - start)
    return found[1:]


def _run_evictions(bench: Bench, arm: Arm) -> float:
    """Median seconds of the evictions of all layers, run as a program of their own."""
    policy, model, interval = bench.policy(arm.policy), bench.model, bench.interval
    if not policy.evicts:
        return 0.0
    call = jax.jit(decoding.evict, donate_argnames="caches")
    _, make, _, _ = _decode_program(bench, arm)
    state = make(bench.key)
    prompt = _prompt(arm, interval, bench.chunks)
    arrived = prompt + jnp.arange(interval, dtype=jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(caches):
        start = caches[0].position_bks.shape[-1] - interval
        return tuple(
            x.replace(position_bks=x.position_bks.at[..., start:].set(arrived[None, None]))
            for x in caches
        )

    shape = (arm.batch, interval, model.heads, model.head_dim)
    query = jax.random.normal(fold(bench.key, 2), shape, bench.config.dtype)
    lse = jnp.zeros((arm.batch, model.kv_heads, model.group_size, interval))
    position = jnp.broadcast_to(arrived[None], (arm.batch, interval))
    chunks = [replay.Chunk(query, lse, position, state.chunk)] * model.layers
    caches, found = fill(state.caches), []
    rest = (chunks, replay.Site(model, bench.plan(arm).cadence, 0, state.key_b))
    program, _, _ = bench.compiled(
        ("evict", arm.policy, arm.budget, arm.batch),
        lambda: call.lower(policy, caches, *rest),
    )
    for _ in range(max(bench.chunks, 3) + 1):
        jax.block_until_ready(caches)
        start = time.perf_counter()
        caches = jax.block_until_ready(program(policy, caches, *rest))
        found.append(time.perf_counter() - start)
        caches = fill(caches)
    return float(np.median(found[1:]))


def _time_decode(bench: Bench, arms: Sequence[Arm]) -> list[dict]:
    """Records of decoding arms, interleaved over the repeats."""
    seconds, evicting = {arm: [] for arm in arms}, {arm: [] for arm in arms}
    does_not_fit = set()
    # Arms of equal shape share a program: under eviction, all lengths.
    shapes = {dataclasses.replace(a, length=0 if a.budget else a.length): a for a in arms}
    if bench.settings.compile_threads > 1:
        with concurrent.futures.ThreadPoolExecutor(bench.settings.compile_threads) as pool:
            list(pool.map(functools.partial(_compile_ahead, bench), shapes.values()))
    for repeat in range(bench.settings.repeats):
        for arm in arms:
            if arm in does_not_fit or bench.late:
                continue
            common.say(f"  repeat {repeat + 1}: {name_of(arm)}")
            try:
                seconds[arm].append(_run_decode(bench, arm, bench.chunks))
                evicting[arm].append(_run_evictions(bench, arm))
            except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
                only_memory(error)
                does_not_fit.add(arm)
    records = []
    for arm in arms:
        if arm in does_not_fit or not seconds[arm]:
            records.append({**arm.record(), "fits": False, "left_out": arm not in does_not_fit})
            continue
        *_, compiled, size = _decode_program(bench, arm)
        evictions = float(np.median(evicting[arm]))
        records.append(_decode_record(bench, arm, seconds[arm], evictions, compiled, size))
    return records


def _compile_ahead(bench: Bench, arm: Arm) -> None:
    try:
        if not bench.late:
            _decode_program(bench, arm)
    except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
        only_memory(error)  # and met again when the arm is run


def _decode_record(bench, arm, seconds_rc, evicting, compiled, size) -> dict:
    policy, interval = bench.policy(arm.policy), bench.interval
    slots = policy.capacity(arm.budget) + interval if policy.evicts else arm.length
    seconds = np.array(seconds_rc) / interval  # per token
    token = np.median(seconds, axis=1)
    ideal, bound = bench.peaks.roofline(
        costs.decode_flops(bench.model, arm.batch, slots),
        costs.decode_bytes(bench.model, arm.batch, slots, bench.config.dtype),
    )
    middle = float(np.median(token))
    return {
        **arm.record(),
        "fits": True,
        "slots": slots,
        "tokens_per_s": arm.batch / middle,
        "tokens_per_s_low": arm.batch / float(token.max()),
        "tokens_per_s_high": arm.batch / float(token.min()),
        "ms_p50": 1e3 * float(np.median(seconds)),
        "ms_p99": 1e3 * float(np.percentile(seconds, 99)),
        "roofline": ideal / middle,
        "bound": bound,
        "eviction": evicting / (middle * interval),
        "program_bytes": size,
        "compile_s": compiled,
    }


def decode(bench: Bench) -> list[dict]:
    s = bench.settings
    return _time_decode(bench, bench.arms(s.batches, s.lengths, s.kernels))


def largest_batch(bench: Bench) -> list[dict]:
    """The largest batch of every policy and budget, and how fast it is: of the full cache at every
    length, of all others at the longest, as their caches do not grow.
    """
    s = bench.settings
    arms = []
    for arm in bench.arms((1,), s.lengths):
        if bench.late or (arm.budget and arm.length < max(s.lengths)):
            continue
        best = largest(
            lambda batch, arm=arm: _fits(bench, dataclasses.replace(arm, batch=batch)),
            _guess(bench, arm),
            s.largest_limit,
            s.largest_within,
        )
        if best:
            arms.append(dataclasses.replace(arm, batch=best))
            common.say(f"  {name_of(arms[-1])} is the largest")
    records = _time_decode(bench, arms)
    full = [r for r in records if not r["budget"] and r["fits"]]
    for record in records:
        if record["fits"]:
            record["limited"] = record["batch"] == s.largest_limit
            record["times_full"] = {
                str(r["length"]): record["tokens_per_s"] / r["tokens_per_s"] for r in full
            }
    return records


def _guess(bench: Bench, arm: Arm) -> int:
    """Rows whose caches fill nine tenths of the memory that the weights leave, at least one."""
    slots = bench.policy(arm.policy).capacity(arm.budget) + bench.interval
    row = costs.cache_bytes(bench.model, slots if arm.budget else arm.length, bench.config.dtype)
    free = bench.limit - costs.parameter_bytes(bench.model, bench.config.dtype)
    return max(1, int(0.9 * free / row))


def largest(fits: Callable[[int], bool], start: int, limit: int, within: float) -> int:
    """The largest batch that fits, by doubling (or halving) and bisection.

    Args:
      start: the first that is tried.
      limit: none above this is tried.
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


def _fits(bench: Bench, arm: Arm) -> bool:
    try:
        _run_decode(bench, arm, 0)
        return True
    except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
        only_memory(error)
        return False


def growth(bench: Bench) -> list[dict]:
    """Milliseconds per token against what has been generated, in one long generation.

    A full cache has its final size from the start, so it is left to the section `decode`.
    """
    s, interval = bench.settings, bench.interval
    arms = [
        Arm(name, budget, s.growth_batch, s.growth_tokens, bench.config.attention_kernel)
        for name in s.policies
        if bench.policy(name).evicts
        for budget in s.budgets
    ]
    rng = np.random.default_rng(bench.config.seed)
    prompts = [rng.integers(bench.model.vocab_size, size=interval) for _ in range(s.growth_batch)]
    chunks = -(-s.growth_tokens // interval)
    seconds = {arm: [] for arm in arms}
    for repeat in range(s.repeats):
        for arm in arms:
            if not repeat:
                _chunks(bench, arm, prompts, 2)
            seconds[arm].append(_chunks(bench, arm, prompts, chunks))
    return [_growth_record(arm, np.array(seconds[arm]), interval) for arm in arms]


def _chunks(bench: Bench, arm: Arm, prompts, chunks: int) -> list[float]:
    """Seconds of every chunk of `L` decoding steps after the first, its eviction included."""
    key_b, limit = bench.row_keys(len(prompts)), [chunks * bench.interval] * len(prompts)
    policy, plan = bench.policy(arm.policy), bench.plan(arm)
    steps = decoding.stream(bench.lm, policy, plan, prompts, key_b, limit)
    found, start = [], None
    for _, _ in zip(range(chunks), steps, strict=False):  # the tokens are on the host
        now = time.perf_counter()
        if start is not None:
            found.append(now - start)
        start = now
    return found


def _growth_record(arm: Arm, seconds_rc: np.ndarray, interval: int) -> dict:
    """Medians over repeats; `ms_per_token` by how many tokens had been generated."""
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
    growth = by_mark[marks[-1]] / by_mark[marks[0]]
    return {
        **arm.record(),
        "ms_per_token": {str(n): float(1e3 * np.median(x)) for n, x in by_mark.items()},
        "growth": float(np.median(growth)),
        "growth_low": float(growth.min()),
        "growth_high": float(growth.max()),
    }
