"""What this library costs: time and memory of decoding, prefill, labels and training steps, against
what the device could do and beside others.
"""

import dataclasses
import json
import time
from collections.abc import Callable

from ml_collections import ConfigDict

from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.errors import UserError
from fkv.evaluation import plots, tables
from fkv.files import write_text
from fkv.jobs import common, fields
from fkv.jobs.benchmark import decode, device, passes, peers, report
from fkv.jobs.benchmark.base import Bench
from fkv.models import LM, ModelConfig
from fkv.runs import costs
from fkv.runs.rundir import open_run


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
        lm = common.load_model(config)
    run = open_run(workdir, config, common.other_jobs("benchmark"))
    if settings.random_weights:
        lm = LM(device.random_weights(model, config.dtype, config.seed), model)
    common.say("measuring what the device can do")
    bench = Bench(
        config,
        lm,
        device.peaks(settings.peaks, config.dtype),
        device.memory_limit(settings.memory_gib),
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
        about = report.about(bench)
        write_text(
            run.path / "benchmark.json", json.dumps({"about": about, **found}, indent=1) + "\n"
        )
    write = {"txt": tables.text, "md": tables.markdown}
    for suffix, table in write.items():
        parts = [report.title(about)]
        parts += [_section(name, found[name], table) for name in found]
        text = "\n\n".join([*parts, report.FORMULAS]) + "\n"
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
    cadence = Cadence(config.budget, config.interval)
    common.cadences(s.budgets, config.interval, "benchmark.budgets")
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
        replay.check_lengths([min(lengths)], cadence)


def _check_policies(config: ConfigDict, model: ModelConfig) -> None:
    s = config.benchmark
    named = {name: policies.get(name) for name in (*s.policies, *s.peer_policies)
             if name != "foresight"}  # fmt: skip
    at = common.cadences(s.budgets, config.interval, "benchmark.budgets")
    common.check_policies(config, model, named, at)


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the benchmark: its title, how it is measured, and its table."""

    title: str
    measure: Callable[[Bench], list[dict]]
    rows: Callable[[list[dict]], tuple[list[str], list[list[str]]]]


SECTIONS = {
    "decode": Section("Decoding at equal batch", decode.decode, report.decode_rows),
    "growth": Section(
        "Decoding against what has been generated", decode.growth, report.growth_rows
    ),
    "prefill": Section("Prefill", passes.prefill, report.pass_rows),
    "labels": Section("Golden labels", passes.labels, report.pass_rows),
    "steps": Section("Training steps", passes.steps, report.step_rows),
    "largest_batch": Section(
        "Decoding at the largest batch that fits", decode.largest_batch, report.decode_rows
    ),
    "peers": Section(
        "Beside the peers: greedy decoding, equal batch", peers.peers, report.peer_rows
    ),
}


def _section(name: str, records: list[dict], table) -> str:
    section = SECTIONS[name]
    if not records:
        return f"{section.title}: nothing was measured (nothing asked for, or no time left)"
    return f"{section.title}\n\n{table(*section.rows(records))}"
