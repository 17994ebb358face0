"""A leaderboard: every policy at every budget under one protocol, from a config to one table.

Answers are an evaluation of its own, in `answers/`; losses and attention retained are measured
trace by trace, so that a run resumes, and adds policies, budgets and traces to what it has.
"""

import functools
import json

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fkv import api, files, policies
from fkv.api import Model
from fkv.cache.cadence import FULL, Cadence
from fkv.engine import calibration, replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import board, charts, tables
from fkv.evaluation.board import Cost
from fkv.evaluation.recall import GOLDEN
from fkv.files import write_text
from fkv.jobs import common, evaluate, groups, losses
from fkv.jobs.losses import Given
from fkv.jobs.measuring import Job
from fkv.keys import Purpose, key_of
from fkv.models import ModelConfig
from fkv.policies.base import Policy
from fkv.policies.foresight import Trained
from fkv.runs import costs, parallel, preemption, rundir, sharing
from fkv.runs.rundir import open_run

# What a run may be asked for more of; everything else must stay as it was.
MAY_DIFFER = (
    *(name for name in common.other_jobs("leaderboard") if name not in ("evaluate", "eval")),
    *evaluate.MAY_DIFFER, "eval", "leaderboard.retained", "leaderboard.benchmark",
)  # fmt: skip
CALIBRATED = "triattention"


def run(config: ConfigDict, workdir: str) -> list[board.Entry]:
    """Measures the policies, scorers and budgets of `evaluate`; writes `leaderboard.*`.

    Golden eviction is added, the full cache stands on top. With `evaluate.benchmark` all but golden
    eviction answer it, in `answers/`.
    """
    groups.check(config, "leaderboard")
    settings = config.leaderboard
    named, inputs = evaluate.policies_of(config)
    at = common.cadences(config, "evaluate.budgets")
    if not at or not config.evaluate.traces:
        raise UserError("a leaderboard needs evaluate.budgets, and evaluate.traces above 0")
    shape = common.model_config(config)
    if settings.calibrate and CALIBRATED in named:
        raise UserError(
            f"leaderboard.calibrate reports its policy as {CALIBRATED!r}: rename yours, or set it "
            "to 0"
        )
    common.check_baseline(config, [*named, *([CALIBRATED] if settings.calibrate else [])])
    what = f"{len(named)} policies", common.said_cadence(config, config.evaluate.budgets)
    common.announce("leaderboard", config, workdir, shape, what)
    common.check_policies(config, shape, named, at)
    rundir.check_run(workdir, config, MAY_DIFFER, inputs)
    times = _times(config)
    answers = _answers(config, [])
    if answers is not None:
        evaluate.check(answers, f"{workdir}/answers")

    held_out = common.load_traces(
        config, "eval", config.evaluate.traces, max(config.evaluate.budgets), shape.vocab_size
    )
    model = common.load_language_model(config, separate=False)
    given = Given(held_out, held_out.digests())
    inputs |= common.language_inputs(model)
    train = None
    if settings.calibrate:
        count, least = settings.calibrate, 1 - config.interval
        train = common.load_traces(config, "train", count, least, shape.vocab_size)
        inputs["data.path: traces to calibrate on"] = train.digests()
    opened = open_run(workdir, config, MAY_DIFFER, inputs)
    opened.resume({})
    own = [] if train is None else [_calibrate(config, model, train, opened.path)]
    if own:
        part = ConfigDict(config).copy_and_resolve_references()
        part.evaluate.scorers = (*config.evaluate.scorers, *own)
        named, _ = evaluate.policies_of(part)
    with preemption.noticed() as asked_to_end:
        job = Job(config, opened, model, named, asked_to_end)
        store = losses.measure(job, given, at)
        some = given.first(settings.retained)
        held = losses.measure_retained(job, some, at) if settings.retained else None
    del model, job  # answers load one of their own
    answered = []
    if (part := _answers(config, own)) is not None:
        answered = evaluate.run(part, f"{workdir}/answers")

    measured = [x for c in at for x in losses.results(store, named, given.names, c)]
    retained = {}
    if held is not None:
        cells = [(name, c.budget) for c in at for name in (GOLDEN, *named)]
        retained = {cell: losses.shares(held, *cell, some.names) for cell in cells}
    length = round(float(held_out.length_n.mean()))
    found = board.entries(
        measured, answered, retained, _costs(config, shape, named, at, length, times),
        config.eval.baseline,
    )  # fmt: skip
    if parallel.first():
        _write(opened.path, config, found, len(given.names), len(some.names), length)
    opened.close()
    return found


def _answers(config: ConfigDict, scorers: list[str]) -> ConfigDict | None:
    """The config of the evaluation of answers, if there are any."""
    if not config.evaluate.benchmark:
        return None
    part = ConfigDict(config).copy_and_resolve_references()
    part.evaluate.scorers = (*config.evaluate.scorers, *scorers)
    part.evaluate.traces = 0
    part.eval.baseline = ""  # of losses
    if "full" not in part.evaluate.policies:
        part.evaluate.policies = ("full", *part.evaluate.policies)
    return part


def _calibrate(config: ConfigDict, model: Model, train, path) -> str:
    """TriAttention for this model, from training traces, as an entry of `evaluate.scorers`."""
    place = path / CALIBRATED

    def make():
        if not (place / sharing.ABOUT).exists():
            batch = Batch.of(train.token_nt, train.length_n)
            params = jax.device_get(calibration.query_statistics(model.lm, batch))
            policy = policies.TriAttention(
                params, trained=Trained(model=model.name, revision=model.revision)
            )
            api.save_scorer(policy, place, source=f"{len(train)} training traces")

    parallel.on_first(make, f"calibrate {place}")
    return f"{CALIBRATED}={place}"


# ---- costs


def _costs(
    config: ConfigDict, shape: ModelConfig, named: dict[str, Policy], at, length: int, times: dict
) -> dict[board.Cell, Cost]:
    """Costs of all policies; those of the full cache at this many tokens."""
    full = costs.cache_bytes(shape, length, config.dtype)
    found = {("full", FULL): Cost(full, 1.0, ms=times.get(("full", FULL)))}
    for cadence in at:
        # Golden eviction is known in hindsight only; its cache is that of a policy without numbers.
        for name, policy in {GOLDEN: policies.get("knorm"), **named}.items():
            cell = name, cadence.budget
            own = costs.evicted_bytes(shape, policy, cadence, config.dtype)
            work = (None, None)
            if name != GOLDEN:
                work = eviction_work(policy, shape, cadence, config.dtype)
            found[cell] = Cost(own, own / full, *work, times.get(cell))
    return found


def eviction_work(
    policy: Policy, shape: ModelConfig, cadence: Cadence, dtype: str
) -> tuple[float | None, float | None]:
    """Operations, and bytes read and written, of a row's evictions in all layers, per token.

    As XLA counts them in the program compiled for this device; loops count once, and there are none
    around a row's work. None where it counts nothing.
    """

    def shapes():
        cache = replay.init_cache(policy, 1, shape, cadence, jnp.dtype(dtype))
        chunk = replay.Chunk(
            jnp.zeros((1, cadence.interval, shape.heads, shape.head_dim), dtype),
            jnp.zeros((1, shape.kv_heads, shape.group_size, cadence.interval)),
            jnp.zeros((1, cadence.interval), jnp.int32),
            jnp.int32(0),
        )
        return jax.tree.map(lambda x: x[0], policy), cache, chunk

    compiled = _evict.lower(*jax.eval_shape(shapes), shape, cadence).compile()
    counted = compiled.cost_analysis() or {}
    found = (counted.get(name) for name in ("flops", "bytes accessed"))
    return tuple(x and shape.layers * x / cadence.interval for x in found)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _evict(policy, cache, chunk, shape, cadence):
    key_b = replay.row_keys(key_of(0, Purpose.REPLAY), 1)
    site = replay.Site(shape, cadence, jnp.int32(0), key_b, jnp.zeros(1, jnp.int32))
    return replay.evict(policy, cache, chunk, site)[2]


def _times(config: ConfigDict) -> dict[board.Cell, float]:
    """Milliseconds per token of decoding one row, of a run of `launch.benchmark`, if given."""
    place = config.leaderboard.benchmark
    if not place:
        return {}
    path = files.expand(place) / "benchmark.json"
    with common.of_field(f"leaderboard.benchmark = {place!r}"):
        data = files.read_json(path)
        try:
            for name in ("model", "dtype", "interval"):
                if (theirs := data["about"][name]) != config[name]:
                    raise UserError(
                        f"{path} was measured with {name} = {theirs!r}, not {config[name]!r}"
                    )
            rows = [r for r in data["decode"] if r["fits"]]
            batch = min(r["batch"] for r in rows)
            rows.sort(key=lambda r: r["length"])  # the longest counts
            return {
                (r["policy"], r["budget"]): 1e3 * batch / r["tokens_per_s"]
                for r in rows
                if r["batch"] == batch
            }
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path} has no times of decoding ({error!r})") from None


# ---- the table


def _write(path, config: ConfigDict, found, traces: int, some: int, length: int) -> None:
    head, rows = board.table(found)
    baseline = config.eval.baseline or "the best rule-based policy at that budget"
    note = (
        f"{config.model}, L = {config.interval}, {traces} held-out traces; 95 % intervals. Loss "
        "ratio: loss under eviction over the full cache's, on the generated tokens after the first "
        f"B + L. To baseline: minus the figure of {baseline}, paired by trace and by problem; tie: "
        f"the interval contains zero. Attention retained: on {some} of the traces. The full cache "
        f"is that of {length} tokens. Evictions: operations and bytes as XLA counts them on "
        f"{jax.devices()[0].platform}, all layers, per token of a row. Golden eviction is "
        "hindsight."
    )
    if any(e.cost.ms is not None for e in found):
        note += f" ms a token: decoding, from {config.leaderboard.benchmark}."
    table = tables.write(path / "leaderboard", head, rows, board.csv(found), note)
    about = {"model": config.model, "interval": config.interval, "traces": traces, "note": note}
    data = {**about, "entries": board.records(found)}
    write_text(path / "leaderboard.json", json.dumps(data, indent=1) + "\n")
    charts.leaderboard(found, path / "leaderboard.png", f"{config.model}, L = {config.interval}")
    common.say(f"\n{table}\n\n{note}\nwritten to {path}: leaderboard.(txt md csv json png pdf)")
