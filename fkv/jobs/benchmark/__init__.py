"""Time and memory of decoding, prefill, golden labels and training steps, beside the device's peaks
and other implementations.
"""

import dataclasses
import json
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from fkv import models, policies
from fkv.engine import replay
from fkv.errors import UserError
from fkv.evaluation import plots, tables
from fkv.files import write_text
from fkv.jobs import common, groups
from fkv.jobs.benchmark import decode, device, passes, peers, queue, report
from fkv.jobs.benchmark.base import Bench
from fkv.keys import Purpose, key_of
from fkv.models import LM, ModelConfig
from fkv.runs import costs, parallel
from fkv.runs.rundir import open_run


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the benchmark: title, measurement and table.

    Attributes:
      decodes: whether it needs the layers of the language model separate, not stacked.
    """

    title: str
    measure: Callable[[Bench], list[dict]]
    rows: Callable[[list[dict]], report.Table]
    decodes: bool = True

    def text(self, records: list[dict], table: Callable) -> str:
        if not records:
            return f"{self.title}: not measured (no arms, or deadline exceeded)"
        return f"{self.title}\n\n{table(*self.rows(records))}"


SECTIONS = {
    "decode": Section("Decoding at equal batch", decode.decode, report.decode_rows),
    "growth": Section("Decoding by tokens generated", decode.growth, report.growth_rows),
    "prefill": Section("Prefill", passes.prefill, report.pass_rows),
    "labels": Section("Golden labels", passes.labels, report.pass_rows, decodes=False),
    "steps": Section("Training steps", passes.steps, report.step_rows, decodes=False),
    "largest_batch": Section(
        "Decoding at the largest batch that fits", decode.largest_batch, report.decode_rows
    ),
    "queue": Section("Requests of mixed lengths", queue.queue, report.queue_rows),
    "peers": Section("Greedy decoding beside the peers", peers.peers, report.peer_rows),
}


def run(config: ConfigDict, workdir: str) -> dict:
    """Measures the sections of `benchmark.sections`.

    Arms are interleaved over `benchmark.repeats`; compilation is timed separately. Figures are
    medians over repeats, with the range.

    Returns:
      Lists of records by section, as written to `benchmark.json` beside tables and plots.
    """
    groups.check(config, "benchmark")
    settings = groups.Benchmark.of(config.benchmark, peers=config.benchmark.peers)
    end = time.perf_counter() + 60 * (settings.minutes or float("inf"))
    model = _check(config, settings)
    what = (f"sections {', '.join(settings.sections)}",)
    common.announce("benchmark", config, workdir, model, what)
    lm = None if settings.random_weights else common.load_model(config)
    run = open_run(workdir, config, common.other_jobs("benchmark"))
    if settings.random_weights:

        @jax.jit
        def draw(key):
            return jax.tree.map(lambda x: x.astype(config.dtype), models.init(key, model))

        lm = LM(draw(key_of(config.seed, Purpose.MODEL)), model)
    common.say("measuring the device")
    peaks = device.peaks(settings.peaks, config.dtype)
    limit = device.memory_limit(settings.memory_gib)
    bench = Bench(config, settings, lm, peaks, limit, run.path, end)

    found = {}
    for name in settings.sections:
        start = time.perf_counter()
        common.say(f"\n{name}")
        section = SECTIONS[name]
        bench.lm = (models.separate if section.decodes else models.stack)(bench.lm)
        found[name] = [] if bench.late else section.measure(bench)
        bench.programs.clear()
        common.say(f"  {time.perf_counter() - start:.0f} s")
        about = report.about(bench)
        text = json.dumps({"about": about, **found}, indent=1)
        write_text(run.path / "benchmark.json", text + "\n")
    for suffix, table in {"md": tables.markdown, "txt": tables.text}.items():
        parts = [SECTIONS[name].text(found[name], table) for name in found]
        text = "\n\n".join([report.title(about), *parts, report.FORMULAS])
        write_text(run.path / f"benchmark.{suffix}", text + "\n")
    common.say(f"\n{text}\n")
    measured = {name: [r for r in rows if r["fits"]] for name, rows in found.items()}
    pictures = plots.costs(measured, run.path)
    common.say(f"written to {run.path}: benchmark.(txt md json) {' '.join(pictures)}")
    run.close()
    return found


def _check(config: ConfigDict, s: groups.Benchmark) -> ModelConfig:
    """Refuses bad settings before weights are loaded; returns the model's config."""
    for name in s.sections:
        if name not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise UserError(f"benchmark.sections has {name!r}; known sections are {known}")
    cadence, interval = common.cadence(config), config.interval
    least = (-(-s.new_tokens // interval) + 2) * interval
    if {"decode", "largest_batch"} & set(s.sections) and min(s.lengths) < least:
        raise UserError(
            f"benchmark.lengths: {min(s.lengths)} must be at least {least}: a prompt, L tokens of "
            f"warm-up and benchmark.new_tokens = {s.new_tokens}"
        )
    if "growth" in s.sections and s.growth_tokens < 2 * interval:
        raise UserError(f"benchmark.growth_tokens = {s.growth_tokens} must be at least 2 L")
    lengths = {"labels": s.label_lengths, "steps": (s.step_length,)}
    if asked := [n for name in s.sections for n in lengths.get(name, ())]:
        replay.check_lengths([min(asked)], cadence)
    if s.layers and not s.random_weights:
        raise UserError("benchmark.layers is for benchmark.random_weights = True")
    if s.random_weights:
        shape = costs.shape_of(common.model_path(config), s.layers)
        model = common.as_configured(config, shape)
    else:
        model = common.model_config(config)
    names = sorted({*s.policies, *s.peer_policies} - {"foresight"})
    named = {name: policies.get(name) for name in names}
    at = common.cadences(config, "benchmark.budgets")
    common.check_policies(config, model, named, at)
    if "steps" in s.sections:
        passes.stages_of(config, model, parallel.make_mesh())
    return model
