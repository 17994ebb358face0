"""How long a token takes: decoding speed against what has been generated, policy by policy."""

import json
import platform
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import cache as kv
from fkv import decoding, parallel, policies, replay
from fkv.errors import UserError
from fkv.evaluation import tables
from fkv.jobs import common, fields
from fkv.models import ModelConfig
from fkv.rundir import open_run


def run(config: ConfigDict, workdir: str) -> list[dict]:
    """Decodes `benchmark.new_tokens` tokens under every policy, and times every chunk of `L`.

    Arms are interleaved over `benchmark.repeats`; compilation is timed apart. A full cache has its
    final size from the start, so its time per token does not depend on how full it is.

    Returns:
      One record per policy, as written to `benchmark.json`.
    """
    fields.check(config, "benchmark")
    settings = config.benchmark
    kv.check_sizes(config.budget, config.interval)
    if settings.new_tokens < 2 * config.interval:
        raise UserError(f"benchmark.new_tokens = {settings.new_tokens} must be at least 2 L")
    arms = {name: policies.get(name) for name in settings.policies}
    model, params = common.load_model(config)
    run = open_run(workdir, config, common.other_jobs("benchmark"))

    rng = np.random.default_rng(config.seed)
    prompts = [rng.integers(model.vocab_size, size=settings.prompt) for _ in range(settings.batch)]
    times = {name: [] for name in arms}
    compiled = {}
    for name, policy in arms.items():
        start = time.perf_counter()
        _chunks(config, model, params, policy, prompts, 2)
        compiled[name] = time.perf_counter() - start
    for repeat in range(settings.repeats):
        for name, policy in arms.items():
            common.say(f"repeat {repeat + 1} of {settings.repeats}: {name}")
            chunks = -(-settings.new_tokens // config.interval)
            times[name].append(_chunks(config, model, params, policy, prompts, chunks))

    records = [_record(config, name, np.array(times[name]), compiled[name]) for name in arms]
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "backend": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "budget": config.budget,
        "interval": config.interval,
        "batch": settings.batch,
        "prompt": settings.prompt,
        "repeats": settings.repeats,
    }
    if parallel.first():
        (run.path / "benchmark.json").write_text(
            json.dumps({"about": about, "records": records}, indent=1) + "\n"
        )
    lengths = list(records[0]["ms_per_token"])
    head = ["policy", "tokens/s", *(f"ms at {n}" for n in lengths), "last / first", "compile s"]
    rows = [
        [
            r["policy"],
            f"{r['tokens_per_s']:.0f}",
            *(f"{r['ms_per_token'][n]:.3f}" for n in lengths),
            f"{r['growth']:.2f} ({r['growth_low']:.2f}-{r['growth_high']:.2f})",
            f"{r['compile_s']:.1f}",
        ]
        for r in records
    ]
    table = tables.text(head, rows)
    if parallel.first():
        (run.path / "benchmark.txt").write_text(table + "\n")
    common.say(
        f"\nbatch {settings.batch}, B = {config.budget}, L = {config.interval}, "
        f"{settings.prompt} prompt tokens, {device.device_kind}; medians of {settings.repeats}\n"
        f"\n{table}\n\nwritten to {run.path}: benchmark.(txt json)"
    )
    run.close()
    return records


def _chunks(config, model: ModelConfig, params, policy, prompts, chunks: int) -> list[float]:
    """Seconds of every chunk of `L` decoding steps, its eviction included."""
    steps = decoding.stream(
        model,
        params,
        policy,
        prompts,
        replay.row_keys(jax.random.key(config.seed), len(prompts)),
        # The size of a full cache, the same for the trial run as for the timed ones.
        -(-config.benchmark.new_tokens // config.interval) * config.interval,
        config.budget,
        config.interval,
        decoding.Sampling(0.0),
    )
    found, start = [], None
    for _, _ in zip(range(chunks), steps, strict=False):  # the tokens are on the host
        now = time.perf_counter()
        if start is not None:
            found.append(now - start)
        start = now
    return found


def _record(config: ConfigDict, name: str, seconds_rc: np.ndarray, compiled: float) -> dict:
    """Medians over repeats; `ms_per_token` by how many tokens had been generated."""
    interval, batch = config.interval, config.benchmark.batch
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
        "policy": name,
        "tokens_per_s": float(batch * interval / np.median(seconds_rc)),
        "ms_per_token": {int(n): float(1e3 * np.median(x)) for n, x in by_mark.items()},
        "growth": float(np.median(growth)),
        "growth_low": float(growth.min()),
        "growth_high": float(growth.max()),
        "compile_s": compiled,
    }
