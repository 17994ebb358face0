"""What this library costs: time and memory of decoding, prefill, labels and training steps, against
what the device could do and beside others.
"""

import concurrent.futures
import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fkv import models, policies
from fkv.cache import slots as kv
from fkv.engine import decoding, replay
from fkv.errors import UserError
from fkv.evaluation import peers, plots, tables, throughput
from fkv.files import write_text
from fkv.jobs import common, fields
from fkv.jobs.grpo import settings_of
from fkv.keys import Purpose, fold, key_of, keys_of
from fkv.learning import golden, grpo, sft
from fkv.models import ModelConfig
from fkv.policies import scorer
from fkv.policies.base import Policy
from fkv.runs import costs, parallel
from fkv.runs.rundir import open_run

FORMULAS = """\
roofline: the larger of bytes / bandwidth and FLOPs / peak, over the measured time of a step
  bytes a step: every weight once (no input embedding), and the keys, values and positions of all
    slots of every row; FLOPs a step: 2 a weight and row, 4 h d a layer, slot and row
MFU: FLOPs / peak over the measured time
  a pass: 2 a weight of the layers and token, 4 h d a layer, token and entry attended to (half the
    prompt for the full cache, B + L under eviction); labels: 2 h d T²/2 a layer more; a supervised
    step: labels, the evicted pass, the statistics of every eviction, two passes over the scorers;
    a rollout: the evicted pass twice, the losses once, four passes over the scorers
memory: of the compiled program, its arguments (weights, caches) included
a model that fits into the processor's own cache can pass the roofline of the memory"""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing to time.

    Attributes:
      policy: its name.
      budget: B; 0 for the full cache.
      batch: rows.
      length: tokens that the longest context has: what a full cache has room for.
      kernel: of attention while decoding.
    """

    policy: str
    budget: int
    batch: int
    length: int
    kernel: str = "plain"

    def record(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Bench:
    """What every section works with.

    Attributes:
      config: the recipe.
      model, params: the language model.
      peaks: what the device can do.
      limit: bytes that a program may hold.
      path: the run directory.
      end: when nothing more is begun, as `time.perf_counter` has it.
      programs: compiled programs, with the seconds that compiling took and what they hold.
    """

    config: ConfigDict
    model: ModelConfig
    params: models.Params
    peaks: throughput.Peaks
    limit: int
    path: Path
    end: float = float("inf")
    programs: dict = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> ConfigDict:
        return self.config.benchmark

    @property
    def interval(self) -> int:
        return self.config.interval

    @property
    def late(self) -> bool:
        """Whether `benchmark.minutes` are over."""
        return time.perf_counter() > self.end

    @property
    def chunks(self) -> int:
        """Timed chunks of `L` decoding steps in a repeat."""
        return -(-self.settings.new_tokens // self.interval)

    @property
    def sampling(self) -> decoding.Sampling:
        s = self.settings
        return decoding.Sampling(s.temperature, s.top_k, s.top_p)

    @property
    def key(self) -> jax.Array:
        return key_of(self.config.seed, Purpose.BENCHMARK)

    def row_keys(self, count: int) -> jax.Array:
        return keys_of(fold(self.key, 0), count)

    def policy(self, name: str) -> Policy:
        if name != "foresight":
            return policies.get(name)
        rules = scorer.ScorerConfig(**self.config.scorer)
        params = scorer.init(key_of(self.config.seed, Purpose.SCORER), self.model, rules)
        return policies.Foresight(params, rules)  # what untrained scorers cost, trained ones do

    def arms(
        self, batches: Sequence[int], lengths: Sequence[int], kernels: Sequence[str] = ()
    ) -> list[Arm]:
        """Every policy at every budget (the full cache once), batch, length and kernel."""
        s = self.settings
        return [
            Arm(name, budget, batch, length, kernel)
            for length in lengths
            for batch in batches
            for name in s.policies
            for budget in (s.budgets if self.policy(name).evicts else (0,))
            for kernel in kernels or (self.config.attention_kernel,)
        ]

    def compiled(self, key: Any, lower: Callable[[], Any]) -> tuple[Any, float, int]:
        """A program, the seconds that compiling it took, and the bytes that it holds."""
        if key not in self.programs:
            start = time.perf_counter()
            program = lower().compile()
            seconds = time.perf_counter() - start
            self.programs[key] = (program, seconds, throughput.program_bytes(program))
        return self.programs[key]


def run(config: ConfigDict, workdir: str) -> dict:
    """Measures the sections of `benchmark.sections`.

    Arms are interleaved over `benchmark.repeats`, and compiling is timed apart. Figures are medians
    over repeats with the smallest and the largest.

    Returns:
      Lists of records by section, as written to `benchmark.json` beside tables and pictures.
    """
    fields.check(config, "benchmark")
    settings = config.benchmark
    _check(config)
    end = time.perf_counter() + 60 * (settings.minutes or float("inf"))
    if settings.random_weights:
        shape = costs.shape_of(common.model_path(config), settings.layers)
        model = common.as_configured(config, shape)
        _check_policies(config, model)
    else:
        if settings.layers:
            raise UserError("benchmark.layers is for benchmark.random_weights = True")
        _check_policies(config, common.model_config(config))
        model, params = common.load_model(config)
    run = open_run(workdir, config, common.other_jobs("benchmark"))
    if settings.random_weights:
        params = throughput.random_weights(model, config.dtype, config.seed)
    common.say("measuring what the device can do")
    bench = Bench(
        config,
        model,
        params,
        throughput.peaks(settings.peaks, config.dtype),
        throughput.memory_limit(settings.memory_gib),
        run.path,
        end,
    )

    # ---- measuring
    found = {}
    for name in settings.sections:
        start = time.perf_counter()
        common.say(f"\n{name}")
        found[name] = [] if bench.late else SECTIONS[name].measure(bench)
        bench.programs.clear()
        common.say(f"  {time.perf_counter() - start:.0f} s")
        about = _about(bench)
        write_text(
            run.path / "benchmark.json", json.dumps({"about": about, **found}, indent=1) + "\n"
        )
    write = {"txt": tables.text, "md": tables.markdown}
    for suffix, table in write.items():
        parts = [_title(about)]
        parts += [_section(name, found[name], table) for name in found]
        text = "\n\n".join([*parts, FORMULAS]) + "\n"
        write_text(run.path / f"benchmark.{suffix}", text)
        if suffix == "txt":
            common.say(f"\n{text}")
    pictures = plots.costs(found, run.path)
    common.say(f"written to {run.path}: benchmark.(txt md json) {' '.join(pictures)}")
    run.close()
    return found


def _check(config: ConfigDict) -> None:
    s = config.benchmark
    for name in s.sections:
        if name not in SECTIONS:
            raise UserError(
                f"benchmark.sections has {name!r}; known sections are {', '.join(SECTIONS)}"
            )
    kv.check_sizes(config.budget, config.interval)
    common.check_budgets(s.budgets, config.interval, "benchmark.budgets")
    common.check_kernel(config, config.attention_kernel)
    for name in s.kernels:
        common.check_kernel(config, name, "benchmark.kernels")
    for name in s.policies:
        if name != "foresight":
            policies.get(name)
    chunks = -(-s.new_tokens // config.interval)
    least = (chunks + 2) * config.interval
    if {"decode", "largest_batch"} & set(s.sections) and min(s.lengths) < least:
        raise UserError(
            f"benchmark.lengths: {min(s.lengths)} must be at least {least}, room for "
            f"benchmark.new_tokens = {s.new_tokens}, a warm-up of L and a prompt"
        )
    if "peers" in s.sections:
        for name in s.peers:
            if name not in peers.ARMS:
                known = ", ".join(peers.ARMS)
                raise UserError(f"benchmark.peers.{name}: known peers are {known}")
        for name in s.peer_policies:
            policies.get(name)
    if "growth" in s.sections and s.growth_tokens < 2 * config.interval:
        raise UserError(f"benchmark.growth_tokens = {s.growth_tokens} must be at least 2 L")
    if {"labels", "steps"} & set(s.sections):
        lengths = (*s.label_lengths, s.step_length)
        replay.check_lengths([min(lengths)], config.budget, config.interval)


def _check_policies(config: ConfigDict, model: ModelConfig) -> None:
    s = config.benchmark
    named = {name: policies.get(name) for name in (*s.policies, *s.peer_policies)
             if name != "foresight"}  # fmt: skip
    common.check_policies(config, model, named, s.budgets)


def _about(bench: Bench) -> dict:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "backend": device.platform,
        "machine": platform.machine(),
        "cores": throughput.cores(),
        "load": throughput.load(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "model": bench.config.model,
        "random_weights": bench.settings.random_weights,
        "layers": bench.model.layers,
        "parameters": costs.parameters(bench.model),
        "dtype": bench.config.dtype,
        "cache_dtype": bench.config.cache_dtype or bench.config.dtype,
        "budget": bench.config.budget,
        "interval": bench.interval,
        "attention_kernel": bench.config.attention_kernel,
        "repeats": bench.settings.repeats,
        "peak_flops": bench.peaks.flops,
        "bandwidth": bench.peaks.bandwidth,
        "peaks": bench.peaks.source,
        "peak_memory": throughput.peak_memory(),
        "memory_limit": bench.limit,
    }


def _title(about: dict) -> str:
    memory = about["peak_memory"]
    return (
        f"{about['model']}, {about['parameters'] / 1e6:.2f} M parameters in {about['layers']} "
        f"layers, {about['dtype']}, cache in {about['cache_dtype']}; L = {about['interval']}\n"
        f"{about['devices']} x {about['device']}, {about['cores']} cores, load {about['load']}, "
        f"JAX {about['jax']}\n"
        f"{about['peak_flops'] / 1e9:.0f} GFLOP/s, {about['bandwidth'] / 1e9:.1f} GB/s "
        f"({about['peaks']})\n"
        f"peak memory {memory['bytes'] / 2**30:.2f} GiB ({memory['of']}); "
        f"medians of {about['repeats']} interleaved repeats (smallest-largest)"
    )


# ---- decoding


def _decode_program(bench: Bench, arm: Arm):
    """`L` decoding steps with their eviction, and how to make the state that they start from."""
    policy, interval = bench.policy(arm.policy), bench.interval
    make = functools.partial(
        made_up_state, bench.model, policy, arm, interval, bench.chunks, bench.config.dtype
    )
    held = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves((bench.params, jax.eval_shape(lambda: make(bench.key).caches)))
    )
    if held > bench.limit:
        raise DoesNotFit
    width = interval if policy.evicts else _prompt(arm, interval, bench.chunks)
    call = jax.jit(
        decoding.decode_chunk,
        static_argnames=("config", "prompt_width", "budget", "interval", "sampling", "stop"),
        donate_argnames="state",
    )

    def lower():
        state = jax.eval_shape(make, bench.key)
        model = dataclasses.replace(bench.model, kernel=arm.kernel)
        return call.lower(
            model, bench.params, policy, state, prompt_width=width, budget=arm.budget,
            interval=interval, sampling=bench.sampling, stop=(),
        )  # fmt: skip

    # Under eviction the program knows nothing of the length.
    name = ("decode", dataclasses.replace(arm, length=0 if policy.evicts else arm.length))
    program, seconds, size = bench.compiled(name, lower)
    if size > bench.limit:
        raise DoesNotFit
    return functools.partial(program, bench.params, policy), jax.jit(make), seconds, size


class DoesNotFit(Exception):
    """A program needs more memory than there is."""


def _prompt(arm: Arm, interval: int, chunks: int) -> int:
    """Tokens before the first that is decoded: one chunk of `L` warms up, `chunks` are timed."""
    return arm.length - (chunks + 1) * interval


def made_up_state(
    model: ModelConfig,
    policy: Policy,
    arm: Arm,
    interval: int,
    chunks: int,
    dtype: str,
    key: jax.Array,
) -> decoding.State:
    """A state in the middle of decoding, of random entries: what a step costs they do not change.

    Caches are as full as after a prompt that leaves room for the chunks to come.
    """
    prompt = _prompt(arm, interval, chunks)
    if policy.evicts:
        empty = replay.init_cache(policy, arm.batch, model, arm.budget, interval, dtype)
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
    call = jax.jit(decoding.evict, static_argnames=("config", "budget"), donate_argnames="caches")
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
    queries = [(query, lse)] * model.layers
    position = jnp.broadcast_to(arrived[None], (arm.batch, interval))
    caches, found = fill(state.caches), []
    rest = (queries, position, state.chunk, state.key_b)
    program, _, _ = bench.compiled(
        ("evict", arm.policy, arm.budget, arm.batch),
        lambda: call.lower(model, policy, caches, *rest, budget=arm.budget),
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
            common.say(f"  repeat {repeat + 1}: {_name(arm)}")
            try:
                seconds[arm].append(_run_decode(bench, arm, bench.chunks))
                evicting[arm].append(_run_evictions(bench, arm))
            except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
                _only_memory(error)
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
        _only_memory(error)  # and met again when the arm is run


def _only_memory(error: Exception) -> None:
    """Raises again what is not about memory."""
    text = str(error).lower()
    if not isinstance(error, DoesNotFit) and not (
        "resource_exhausted" in text or "out of memory" in text
    ):
        raise error


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


def _name(arm: Arm) -> str:
    budget = f" B={arm.budget}" if arm.budget else ""
    kernel = "" if arm.kernel == "plain" else f", {arm.kernel}"
    return f"{arm.policy}{budget}, batch {arm.batch}, length {arm.length}{kernel}"


def _decode(bench: Bench) -> list[dict]:
    s = bench.settings
    return _time_decode(bench, bench.arms(s.batches, s.lengths, s.kernels))


def _largest_batch(bench: Bench) -> list[dict]:
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
            common.say(f"  {_name(arms[-1])} is the largest")
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
        _only_memory(error)
        return False


def _growth(bench: Bench) -> list[dict]:
    """Milliseconds per token against what has been generated, in one long generation.

    A full cache has its final size from the start, so it is left to the section `decode`.
    """
    s, interval = bench.settings, bench.interval
    arms = [
        Arm(name, budget, s.growth_batch, s.growth_tokens, bench.model.kernel)
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
    steps = decoding.stream(
        bench.model,
        bench.params,
        bench.policy(arm.policy),
        prompts,
        bench.row_keys(len(prompts)),
        chunks * bench.interval,
        arm.budget,
        bench.interval,
        bench.sampling,
    )
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


# ---- whole passes


def _interleaved(bench: Bench, calls: dict[Any, Callable[[], Any]]) -> dict[Any, np.ndarray]:
    """Seconds of each call in every repeat, after one that is not counted."""
    found = {name: [] for name in calls}
    for repeat in range(bench.settings.repeats + 1):
        if repeat > 1 and bench.late:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                found[name].append(time.perf_counter() - start)
    return {name: np.array(x) for name, x in found.items()}


def _spread(seconds_r: np.ndarray) -> dict:
    return {
        "seconds": float(np.median(seconds_r)),
        "seconds_low": float(seconds_r.min()),
        "seconds_high": float(seconds_r.max()),
    }


def _tokens(bench: Bench, rows: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(bench.config.seed)
    return rng.integers(bench.model.vocab_size, size=(rows, length)).astype(np.int32)


def _pass_section(bench: Bench, arms: Sequence[Arm], prepare, flops) -> list[dict]:
    """Records of passes over whole sequences.

    Args:
      prepare: from an arm to a function that makes the pass, the bytes that it holds, and the
        seconds that compiling took.
      flops: from an arm to what one pass takes.
    """
    calls, about, records = {}, {}, []
    for arm in arms:
        if bench.late:
            records.append({**arm.record(), "fits": False, "left_out": True})
            continue
        common.say(f"  {_name(arm)}")
        try:
            call, size, seconds = prepare(arm)
            if size > bench.limit:
                raise DoesNotFit
            jax.block_until_ready(call())
        except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
            _only_memory(error)
            records.append({**arm.record(), "fits": False, "left_out": False})
            continue
        calls[arm] = call
        about[arm] = {"program_bytes": size, "compile_s": seconds}
    for arm, seconds in _interleaved(bench, calls).items():
        middle = float(np.median(seconds))
        records.append(
            {
                **arm.record(),
                "fits": True,
                **_spread(seconds),
                "tokens_per_s": arm.batch * arm.length / middle,
                "mfu": flops(arm) / middle / bench.peaks.flops,
                **about[arm],
            }
        )
    return records


def _prefill(bench: Bench) -> list[dict]:
    """Reading prompts, up to the first token that is drawn."""
    interval, s, model = bench.interval, bench.settings, bench.model
    arms = bench.arms(s.prefill_batches, s.prefill_lengths)

    def prepare(arm):
        policy = bench.policy(arm.policy)
        row = np.zeros(arm.batch, np.int32)
        token = _tokens(bench, arm.batch, arm.length)
        keys = bench.row_keys(arm.batch)
        sizes = dict(budget=arm.budget, interval=interval, new_tokens=interval)
        call = functools.partial(
            decoding.prefill, model, bench.params, policy, token, row, keys, row,
            **sizes, sampling=bench.sampling, stop=(),
        )  # fmt: skip
        layers = (bench.params["layers"], policy)
        hidden = jax.eval_shape(models.embed, bench.params, token)
        _, seconds, size = bench.compiled(
            arm,
            lambda: decoding.prefill_layer.lower(
                model, *layers, 0, hidden, jax.eval_shape(jnp.asarray, token), keys, **sizes
            ),
        )
        cache = costs.size(jax.eval_shape(call).caches[0])
        rest = costs.size(bench.params) - costs.size(bench.params["layers"])
        return call, size + (model.layers - 1) * cache + rest, seconds

    def flops(arm):
        seen = arm.budget + interval if arm.budget else 0
        head = 2 * model.vocab_size * model.width
        return arm.batch * (costs.pass_flops(model, arm.length, seen) + head)

    return _pass_section(bench, arms, prepare, flops)


def _labels(bench: Bench) -> list[dict]:
    """Golden evictions of all layers of a trace."""
    config = bench.config
    label = jax.jit(golden.policy, static_argnames=("config", "budget", "interval"))
    fixed = dict(budget=config.budget, interval=config.interval)

    def prepare(arm):
        args = (bench.params, _tokens(bench, 1, arm.length), np.array([arm.length], np.int32))
        program, seconds, size = bench.compiled(
            arm, lambda: label.lower(bench.model, *args, **fixed)
        )
        return functools.partial(program, *args), size, seconds

    arms = [Arm("golden", config.budget, 1, n) for n in bench.settings.label_lengths]
    return _pass_section(
        bench, arms, prepare, lambda arm: costs.label_flops(bench.model, arm.length)
    )


def _steps(bench: Bench) -> list[dict]:
    """A supervised and a reinforcement step, as the jobs make them."""
    config, model, s = bench.config, bench.model, bench.settings
    rules, sizes = scorer.ScorerConfig(**config.scorer), (config.budget, config.interval)
    params = scorer.init(key_of(config.seed, Purpose.SCORER), model, rules)
    length = s.step_length
    mesh = parallel.make_mesh()
    traces = s.step_traces * parallel.device_count(mesh)
    everywhere = parallel.replicate(bench.params, mesh)

    optimiser = sft.optimizer(config.sft.learning_rate, 1, 100, config.sft.clip)
    loss = sft.LossConfig(config.sft.margin, config.sft.weighting)

    def supervised(state, model_params, token, rows):
        return sft.train_step(
            model, rules, loss, optimiser, *sizes, parallel.AXIS, state, model_params, token, rows
        )

    settings = dataclasses.replace(settings_of(config), rollouts=s.step_rollouts)
    clipped = grpo.optimizer(config.grpo.learning_rate, 1, config.grpo.clip_norm)

    def reinforced(state, model_params, reference, batch):
        return grpo.train_step(
            model, rules, settings, clipped, *sizes, parallel.AXIS, state, model_params, reference,
            batch,
        )  # fmt: skip

    token = _tokens(bench, traces, length)
    rollouts = traces * settings.rollouts
    many = np.repeat(token, settings.rollouts, axis=0)
    losses = np.ones((rollouts, length - 1), np.float32)
    batch = grpo.Batch(
        many,
        np.full(rollouts, length, np.int32),
        losses,
        losses,
        np.broadcast_to(np.arange(length - 1) >= sum(sizes), losses.shape),
        np.asarray(jax.random.key_data(bench.row_keys(rollouts))),
    )
    first = sft.init_state(params, optimiser), sft.init_state(params, clipped)
    first, reference = parallel.replicate((first, params), mesh)
    steps = {
        "supervised": functools.partial(
            parallel.pmap(supervised, mesh, constants=2, batched=2),
            first[0], everywhere, token, np.full(traces, length, np.int32),
        ),
        "grpo": functools.partial(
            parallel.pmap(reinforced, mesh, constants=3, batched=1),
            first[1], everywhere, reference, batch,
        ),
    }  # fmt: skip
    work = {
        "supervised": traces * costs.sft_flops(model, rules, length, *sizes),
        "grpo": rollouts * costs.grpo_flops(model, rules, length, *sizes, settings.epochs),
    }
    compiled = {}
    for name, step in steps.items():
        common.say(f"  {name}, {length} tokens")
        start = time.perf_counter()
        jax.block_until_ready(step())
        compiled[name] = time.perf_counter() - start
    records = []
    for name, seconds in _interleaved(bench, steps).items():
        middle = float(np.median(seconds))
        records.append(
            {
                "step": name,
                "traces": traces,
                "rows": rollouts if name == "grpo" else traces,
                "length": length,
                **_spread(seconds),
                "mfu": work[name] / middle / bench.peaks.flops / mesh.size,
                "compile_s": compiled[name] - middle,  # what the first call took longer
            }
        )
    return records


# ---- beside others


def _peers(bench: Bench) -> list[dict]:
    """Decoding here and by others: the same weights, prompts, lengths, dtype and cores."""
    s = bench.settings
    if s.random_weights:
        directory = bench.path / "model"
        models.save(directory, bench.model, bench.params)
    else:
        directory = models.find(common.model_path(bench.config), common.revision(bench.config))
    others = []
    try:
        for name, python in s.peers.items():
            if python:
                common.say(f"  starting {name}")
                others.append(peers.Peer(name, python, str(directory), bench.config.dtype))
                common.say(f"    {others[-1].about}")
        return [r for batch in s.peer_batches for r in _beside(bench, others, batch)]
    finally:
        for peer in others:
            peer.close()


def _beside(bench: Bench, others: Sequence[peers.Peer], batch: int) -> list[dict]:
    """Records of all arms at one batch, interleaved over the repeats."""
    s, interval = bench.settings, bench.interval
    prompts = _tokens(bench, batch, s.peer_prompt)
    snapkv = policies.get("snapkv")
    request = {
        "prompts": prompts.tolist(), "new_tokens": s.peer_tokens, "budget": bench.config.budget,
        "interval": interval, "window": min(snapkv.window, interval), "kernel": snapkv.kernel,
    }  # fmt: skip
    calls = {
        ("fkv", name): functools.partial(_own_decode, bench, name, prompts)
        for name in s.peer_policies
    }
    for peer in others:
        for arm in peers.ARMS[peer.name]:
            calls[(peer.name, arm)] = functools.partial(peer.decode, arm, **request)
    found = {arm: [] for arm in calls}
    errors = {}
    for repeat in range(s.repeats + 1):  # the first compiles and is not counted
        for arm, call in calls.items():
            if arm not in errors:
                common.say(f"  repeat {repeat}: {' '.join(arm)}, batch {batch}")
                result = call()
                if "error" in result:
                    errors[arm] = result["error"]
                else:
                    found[arm].append(result)
    # What generation with eviction is compared by: the first policy of ours that evicts.
    ours = next((a for a in calls if a[0] == "fkv" and bench.policy(a[1]).evicts), None)
    full = next((a for a in calls if a[0] == "fkv" and not bench.policy(a[1]).evicts), None)
    step = {a: np.array([r["decode_s"] / r["steps"] for r in found[a][1:]]) for a in calls}
    records = []
    for arm in calls:
        record = {"who": arm[0], "arm": arm[1], "batch": batch, "prompt": s.peer_prompt,
                  "new_tokens": s.peer_tokens}  # fmt: skip
        if arm in errors:
            records.append({**record, "error": errors[arm]})
            continue
        keeps_all = arm[1] == "full" or arm[0] == "transformers"
        middle, results = float(np.median(step[arm])), found[arm]
        if ours:
            ratio = step[arm] / step[ours]  # of the same repeat, so minutes apart at most
            record |= {
                "ours_is_faster": float(np.median(ratio)),
                "ours_is_faster_low": float(ratio.min()),
                "ours_is_faster_high": float(ratio.max()),
            }
        if full and keeps_all:
            same = np.array(results[-1]["tokens"]) == np.array(found[full][-1]["tokens"])
            record["same_tokens"] = float(same.mean())
        records.append(
            {
                **record,
                "tokens_per_s": batch / middle,
                "tokens_per_s_low": batch / float(step[arm].max()),
                "tokens_per_s_high": batch / float(step[arm].min()),
                "ms_per_step": 1e3 * middle,
                "prefill_s": float(np.median([r["prefill_s"] for r in results[1:]])),
                "first_call_s": results[0]["prefill_s"] + results[0]["decode_s"],
                "held": results[-1]["held"],
            }
        )
    return records


def _own_decode(bench: Bench, name: str, prompts: np.ndarray) -> dict:
    """Greedy decoding here, with what a peer answers."""
    policy, model, interval = bench.policy(name), bench.model, bench.interval
    new, budget, greedy = bench.settings.peer_tokens, bench.config.budget, decoding.Sampling(0.0)
    token, padding = decoding.left_pad(prompts, interval)
    keys = bench.row_keys(len(prompts))
    limit = np.full(len(prompts), new, np.int32)
    fixed = dict(budget=budget, interval=interval, sampling=greedy, stop=(), new_tokens=new)
    start = time.perf_counter()
    state = jax.block_until_ready(
        decoding.prefill(model, bench.params, policy, token, padding, keys, limit, **fixed)
    )
    first = time.perf_counter()
    out, state = decoding.decode(model, bench.params, policy, state, token.shape[1], **fixed)
    tokens = np.asarray(out)
    end = time.perf_counter()
    return {
        "prefill_s": first - start,
        "decode_s": end - first,
        "steps": tokens.shape[1],  # a multiple of L
        "tokens": tokens[:, :new].tolist(),
        "held": int((state.caches[0].position_bks >= 0).sum(-1).max()),
    }


# ---- tables


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1e9 else f"{count / 2**20:.1f} MiB"


def _not_measured(record: dict) -> str:
    return "no time was left" if record.get("left_out") else "does not fit"


def _decode_rows(records):
    head = ["policy", "B", "batch", "length", "tokens/s", "ms p50", "p99", "roofline", "bound",
            "eviction", "memory", "compile s"]  # fmt: skip
    several = len({r["kernel"] for r in records}) > 1
    if several:
        head.insert(4, "kernel")
    measured = [r for r in records if r["fits"]]
    times_full = measured[0].get("times_full") if measured else None
    if times_full:
        head.append("x full at " + " / ".join(times_full))
    rows = []
    for r in records:
        start = [r["policy"], str(r["budget"] or "-"), str(r["batch"]), str(r["length"])]
        if r.get("limited"):
            start[2] += " (the limit)"
        if several:
            start.append(r["kernel"])
        if not r["fits"]:
            rows.append([*start, _not_measured(r), *[""] * (len(head) - len(start) - 1)])
            continue
        low, high = r["tokens_per_s_low"], r["tokens_per_s_high"]
        rows.append(
            [
                *start,
                f"{r['tokens_per_s']:.0f} ({low:.0f}-{high:.0f})",
                f"{r['ms_p50']:.3f}",
                f"{r['ms_p99']:.3f}",
                f"{100 * r['roofline']:.0f} %",
                r["bound"],
                f"{100 * r['eviction']:.1f} %" if r["budget"] else "",
                _bytes(r["program_bytes"]),
                f"{r['compile_s']:.1f}",
            ]
        )
        if times_full:
            rows[-1].append(" / ".join(f"{x:.2f}" for x in r["times_full"].values()))
    return head, rows


def _growth_rows(records):
    lengths = list(records[0]["ms_per_token"]) if records else []
    head = ["policy", "B", "batch", *(f"ms at {n}" for n in lengths), "last / first"]
    rows = [
        [
            r["policy"],
            str(r["budget"]),
            str(r["batch"]),
            *(f"{r['ms_per_token'][n]:.3f}" for n in lengths),
            f"{r['growth']:.2f} ({r['growth_low']:.2f}-{r['growth_high']:.2f})",
        ]
        for r in records
    ]
    return head, rows


def _seconds(r: dict) -> str:
    return f"{r['seconds']:.3g} ({r['seconds_low']:.3g}-{r['seconds_high']:.3g})"


def _pass_rows(records):
    head = ["policy", "B", "batch", "length", "seconds", "tokens/s", "MFU", "memory", "compile s"]
    rows = []
    for r in records:
        start = [r["policy"], str(r["budget"] or "-"), str(r["batch"]), str(r["length"])]
        if not r["fits"]:
            rows.append([*start, _not_measured(r), *[""] * 4])
            continue
        rows.append(
            [
                *start,
                _seconds(r),
                f"{r['tokens_per_s']:.0f}",
                f"{100 * r['mfu']:.1f} %",
                _bytes(r["program_bytes"]),
                f"{r['compile_s']:.1f}",
            ]
        )
    return head, rows


def _step_rows(records):
    head = ["step", "traces", "rows", "length", "seconds", "MFU", "compile s"]
    rows = [
        [r["step"], str(r["traces"]), str(r["rows"]), str(r["length"]), _seconds(r),
         f"{100 * r['mfu']:.1f} %", f"{r['compile_s']:.1f}"]
        for r in records
    ]  # fmt: skip
    return head, rows


def _peer_rows(records):
    head = ["who", "cache", "batch", "tokens/s", "ms a step", "ours is faster", "same tokens",
            "held", "prefill s", "first call s"]  # fmt: skip
    rows = []
    for r in records:
        start = [r["who"], r["arm"], str(r["batch"])]
        if "error" in r:
            rows.append([*start, r["error"][:60], *[""] * 6])
            continue
        low, high = r["tokens_per_s_low"], r["tokens_per_s_high"]
        ratio = [f"{r[f'ours_is_faster{x}']:.2f}" for x in ("", "_low", "_high")
                 if f"ours_is_faster{x}" in r]  # fmt: skip
        rows.append(
            [
                *start,
                f"{r['tokens_per_s']:.0f} ({low:.0f}-{high:.0f})",
                f"{r['ms_per_step']:.2f}",
                f"{ratio[0]} ({ratio[1]}-{ratio[2]})" if ratio else "",
                f"{100 * r['same_tokens']:.0f} %" if "same_tokens" in r else "",
                str(r["held"]),
                f"{r['prefill_s']:.3f}",
                f"{r['first_call_s']:.1f}",
            ]
        )
    return head, rows


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the benchmark: its title, how it is measured, and its table."""

    title: str
    measure: Callable[[Bench], list[dict]]
    rows: Callable[[list[dict]], tuple[list[str], list[list[str]]]]


SECTIONS = {
    "decode": Section("Decoding at equal batch", _decode, _decode_rows),
    "growth": Section("Decoding against what has been generated", _growth, _growth_rows),
    "prefill": Section("Prefill", _prefill, _pass_rows),
    "labels": Section("Golden labels", _labels, _pass_rows),
    "steps": Section("Training steps", _steps, _step_rows),
    "largest_batch": Section(
        "Decoding at the largest batch that fits", _largest_batch, _decode_rows
    ),
    "peers": Section("Beside the peers: greedy decoding, equal batch", _peers, _peer_rows),
}


def _section(name: str, records: list[dict], table) -> str:
    section = SECTIONS[name]
    if not records:
        return f"{section.title}: nothing was measured (nothing asked for, or no time left)"
    return f"{section.title}\n\n{table(*section.rows(records))}"
