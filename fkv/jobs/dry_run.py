"""What a job would take, before it is run: memory of a device, operations, time at best."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import api, files, models, policies
from fkv.cache.cadence import FULL, Cadence
from fkv.engine import decoding, replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import tables
from fkv.jobs import common, fields
from fkv.jobs import grpo as grpo_job
from fkv.jobs import sft as sft_job
from fkv.keys import Purpose, key_of
from fkv.learning import fit, grpo, sft
from fkv.models import LM, ModelConfig
from fkv.models.decoder import param_shapes
from fkv.policies import scorer
from fkv.policies.base import Policy
from fkv.runs import costs, parallel
from fkv.tasks import ledger

# Of what an accelerator can do at most; what is reached depends on it and on the compiler.
SHARE = 0.4
SHOWN = ("TPU v5e", "TPU v6e", "H100", "H200")  # 16, 32, 80 and 141 GB


def run(job: str, config: ConfigDict) -> str:
    """Prints what `launch.<job>` would take with this config; nothing is allocated or written.

    Raises:
      UserError: the config is wrong, or nothing is known of this job.
    """
    known = {"sft": _sft, "grpo": _grpo, "evaluate": _generation, "traces": _generation}
    if job not in known:
        raise UserError(f"launch.{job} has no dry run; {', '.join(known)} have")
    fields.check(config, job)
    Cadence(config.budget, config.interval)
    model = common.model_config(config)
    lines = [
        f"launch.{job}, {config.model}: {costs.parameters(model) / 1e6:,.2f} million parameters in "
        f"{config.dtype}, cache in {config.cache_dtype or config.dtype}, B = {config.budget}, "
        f"L = {config.interval}"
    ]
    text = "\n".join([*lines, *known[job](config, model, job)])
    common.say(text)
    return text


# ---- the stages


def _sft(config: ConfigDict, model: ModelConfig, job: str) -> list[str]:
    mesh = parallel.make_mesh(config.model_axis)
    plan = sft_job.plan_of(config, mesh)
    rows = plan.batch // plan.micro_batches // parallel.device_count(mesh)
    params = _scorers(model, plan.scorer)
    state = jax.eval_shape(lambda: fit.TrainState.init(params(), plan.optimiser))
    step = _on_axis(functools.partial(sft.train_step, plan, axis=parallel.AXIS))

    def needed(tokens):
        batch = _batch(rows, tokens)
        return costs.temporaries(step, state, _lm(config, model), batch) + costs.size(batch)

    def operations(tokens):
        trace = costs.sft_flops(model, plan.scorer, tokens, plan.cadence)
        return trace * plan.batch

    what = f"{plan.batch} a step, {rows} at once on each of {_devices(mesh)}"
    return _stage(config, model, Stage(state, needed, operations, what, plan.steps, mesh))


def _grpo(config: ConfigDict, model: ModelConfig, job: str) -> list[str]:
    mesh = parallel.make_mesh(config.model_axis)
    plan = grpo_job.plan_of(config, mesh)
    all_rows = plan.traces * plan.grpo.rollouts
    rows = all_rows // plan.micro_batches // parallel.device_count(mesh)
    params = _scorers(model, plan.scorer)
    state = jax.eval_shape(
        lambda: grpo.TrainState.init(params(), plan.optimiser, reference=params())
    )
    step = _on_axis(functools.partial(grpo.train_step, plan, axis=parallel.AXIS))

    def needed(tokens):
        per_token = jax.ShapeDtypeStruct((1, rows, tokens - 1), jnp.float32)
        keys = jax.ShapeDtypeStruct((1, rows, 2), jnp.uint32)
        batch = grpo.Rollouts(_batch(rows, tokens), per_token, per_token, keys)
        return costs.temporaries(step, state, _lm(config, model), batch) + costs.size(batch)

    def operations(tokens):
        rollout = costs.grpo_flops(model, plan.scorer, tokens, plan.cadence, plan.grpo.epochs)
        full = costs.pass_flops(model, tokens) + costs.unembedding_flops(model, tokens)
        return plan.traces * (full + plan.grpo.rollouts * rollout)

    at_once = min(plan.grpo.rollouts_at_once or rows, rows)
    what = f"{all_rows} rollouts a step, {at_once} at once on each of {_devices(mesh)}"
    return _stage(config, model, Stage(state, needed, operations, what, plan.steps, mesh))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage: its state, what a step needs and does by the length of traces, in words."""

    state: fit.TrainState
    needed: Callable[[int], int]
    operations: Callable[[int], float]
    what: str
    steps: int
    mesh: Mesh


def _stage(config: ConfigDict, model: ModelConfig, stage: Stage) -> list[str]:
    state, needed, operations = stage.state, stage.needed, stage.operations
    what, steps, mesh = stage.what, stage.steps, stage.mesh
    tokens, why = _trace_length(config, model)
    half = tokens // 2 // config.interval * config.interval
    # Nothing is evicted from one that is too short.
    other = half if half > config.budget + config.interval else 2 * tokens
    shorter, longer = sorted((tokens, other))
    common.say(f"compiling for traces of {shorter:,} and {longer:,} tokens")
    weights = costs.parameter_bytes(model, config.dtype) // config.model_axis
    fixed = costs.size(state)
    points = [(n, weights + fixed + needed(n)) for n in (shorter, longer)]
    total = dict(points)[tokens]
    step = operations(tokens)
    rows = [
        ["language model", _gb(weights)],
        ["scorers and optimiser", _gb(fixed)],
        ["a step's batch and temporaries", _gb(total - weights - fixed)],
        ["in all", _gb(total)],
    ]
    lines = [
        f"traces of {tokens:,} tokens ({why}); {what}",
        "",
        tables.text(("memory of a device", "GB"), rows),
        _compiled(config),
        "",
        f"a step: {step:.3g} operations, {steps:,} steps",
        "",
    ]
    rows = []
    for name in SHOWN:
        device = costs.DEVICES[name]
        best = step / device.flops / mesh.size
        rows.append(
            [
                name,
                f"{device.memory / 1e9:.0f}",
                "yes" if total <= device.memory * costs.USABLE else "no",
                f"{costs.largest(points, device.memory, config.interval):,}",
                f"{best:.3g}",
                f"{best / SHARE:.3g}",
                f"{best / SHARE * steps / 3600:.3g}",
            ]
        )
    head = (
        "device",
        "GB",
        "fits",
        "longest trace",
        "s a step, at best",
        "at 40 %",
        "hours, at 40 %",
    )
    return [*lines, tables.text(head, rows), _usable()]


def _trace_length(config: ConfigDict, model: ModelConfig) -> tuple[int, str]:
    """Padded length of the longest trace, and how it is known."""
    if config.data.path and not files.expand(config.data.path).exists():
        tokens = config.traces.new_tokens
        why = f"traces.new_tokens; there are none at {config.data.path} yet"
    else:
        found = common.load_traces(
            config, "train", config.data.traces, config.budget, model.vocab_size
        )
        tokens, why = int(found.padded_n.max()), "the longest there is"
    if tokens <= config.budget + config.interval:
        raise UserError(
            f"traces of {tokens} tokens ({why}) are not longer than budget + interval = "
            f"{config.budget + config.interval}"
        )
    return _up(tokens, config.interval), why


# ---- generation


def _generation(config: ConfigDict, model: ModelConfig, job: str) -> list[str]:
    settings = config[job]
    sampling, lm = decoding.Sampling.of(settings), _lm(config, model)
    prompt, new_tokens = _answer_length(config, model, settings)
    if job == "traces":
        cells = [("full", FULL, policies.get("full"))]
    else:
        cells = _cells(config, model)
    batch = settings.batch
    weights = costs.parameter_bytes(model, config.dtype) // config.model_axis
    common.say(f"compiling for {len(cells)} kinds of cache and two batches")
    memory, speed, devices = [], [], [costs.DEVICES[name] for name in SHOWN]
    for name, budget, policy in cells:
        points = []
        for rows in (batch, 2 * batch):
            plan = decoding.Plan(Cadence.of(budget, config.interval), sampling, (0,))
            needed = _generating(config, lm, policy, plan, (rows, prompt, new_tokens))
            points.append((rows, weights + needed))
        slots = policy.capacity(budget) + config.interval if budget else prompt + new_tokens
        label = f"{name} {budget or ''}".strip()
        held = batch * costs.cache_bytes(model, slots, config.dtype, bool(policy.statistics))
        memory.append([label, f"{slots:,}", _gb(held), _gb(points[0][1])])
        memory[-1] += [f"{costs.largest(points, d.memory):,}" for d in devices]
        moved = costs.decode_bytes(model, batch, slots, config.dtype)
        done = costs.decode_flops(model, batch, slots)
        best = [max(moved / d.bandwidth, done / d.flops) for d in devices]
        speed.append([label, f"{moved / 1e9:.2f}", *(f"{batch / s:,.0f}" for s in best)])
    return [
        f"{batch} answers at once, prompts of {prompt} and up to {new_tokens:,} new tokens; "
        f"the language model takes {_gb(weights)} GB",
        "",
        "memory of a device in GB, and the largest batch of each",
        tables.text(("cache", "slots", "caches", "in all", *SHOWN), memory),
        _compiled(config),
        "",
        "GB read a step, and tokens a second at best (all slots in use)",
        tables.text(("cache", "GB", *SHOWN), speed),
        _usable(),
    ]


def _cells(config: ConfigDict, model: ModelConfig) -> list[tuple[str, int, Policy]]:
    """The full cache if asked for, and one policy at every budget: scorers, which need most."""
    settings, cells = config.evaluate, []
    at = common.cadences(settings.budgets, config.interval, "evaluate.budgets")
    if "full" in settings.policies:
        cells.append(("full", FULL, policies.get("full")))
    rules = [name for name in settings.policies if name != "full"]
    named = {name: policies.get(name) for name in rules}
    common.check_policies(config, model, named, at)
    if settings.scorers:
        scorer_config = scorer.ScorerConfig(**config.scorer)
        key = key_of(0, Purpose.SCORER)
        params = jax.eval_shape(lambda: scorer.init(key, model, scorer_config))
        name, policy = "foresight", policies.Foresight(params, scorer_config)
    elif rules:
        name, policy = next(iter(named.items()))
    else:
        return cells
    return cells + [(name, budget, policy) for budget in settings.budgets]


def _answer_length(config: ConfigDict, model: ModelConfig, settings) -> tuple[int, int]:
    """Padded length of prompts, and the most new tokens."""
    if config.model == api.EMBEDDED:
        spec = common.spec(config)
        longest = max(len(p.prompt) for p in ledger.problems(config.seed, "eval", 0, 64, spec))
        return _up(longest, config.interval), settings.new_tokens or spec.max_new_tokens()
    return _up(512, config.interval), settings.new_tokens or 32_768


def _generating(
    config: ConfigDict, lm: LM, policy: Policy, plan: decoding.Plan, size: tuple[int, int, int]
) -> int:
    """Bytes of caches and temporaries at the worst time, which is while the prompts are read."""
    rows, prompt, new_tokens = size
    keys = jax.eval_shape(lambda: replay.row_keys(key_of(0, Purpose.ANSWER), rows))
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts = Batch(jax.ShapeDtypeStruct((rows, prompt), jnp.int32), row, row, row)

    def prefill(lm, policy, prompts, keys, limit):
        return decoding.prefill(lm, policy, plan, prompts, keys, limit, new_tokens)

    state = jax.eval_shape(prefill, lm, policy, prompts, keys, row)
    hidden = jax.eval_shape(models.embed, lm, prompts.token_bt)
    layer = functools.partial(decoding.prefill_layer, room=_up(new_tokens, config.interval))
    site = replay.Site(lm.config, plan.cadence, 0, keys)
    inputs = (lm.params["layers"], policy, site, hidden, prompts.token_bt)
    needed = costs.temporaries(layer, *inputs)
    return needed + costs.size(hidden) + costs.size(_caches(config, state.caches))


# ---- what they share


def _compiling(config: ConfigDict) -> str:
    """CPUs multiply bfloat16 as float32, in copies of all weights that no accelerator needs."""
    return "float32" if parallel.platform() == "cpu" else config.dtype


def _compiled(config: ConfigDict) -> str:
    where = parallel.platform()
    if where == "cpu" and config.dtype != "float32":
        return f"(temporaries as compiled for the CPU in float32: in {config.dtype} less)"
    return f"(temporaries as compiled for the {where})"


def _usable() -> str:
    return f"({costs.USABLE:.0%} of the memory taken as usable; nothing here was measured)"


def _lm(config: ConfigDict, model: ModelConfig) -> LM:
    """Shapes of the language model, as they are compiled."""
    dtype = jnp.dtype(_compiling(config))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), param_shapes(model))
    return LM(shapes, model)


def _caches(config: ConfigDict, caches):
    """Shapes of caches as they will be: keys and values in the run's dtype."""
    if config.cache_dtype:
        return caches

    def one(layer):
        key, value = (
            jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype))
            for x in (layer.key_bksd, layer.value_bksd)
        )
        return layer.replace(key_bksd=key, value_bksd=value)

    return tuple(one(layer) for layer in caches)


def _scorers(model: ModelConfig, scorer_config: scorer.ScorerConfig) -> Callable[[], dict]:
    return lambda: scorer.init(key_of(0, Purpose.SCORER), model, scorer_config)


def _on_axis(step: Callable) -> Callable:
    """One device's program of a mapped step of (state, lm, batch): it speaks to itself alone."""
    return jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=parallel.AXIS)


def _batch(rows: int, tokens: int) -> Batch:
    row = _ints(rows)
    return Batch(_ints(rows, tokens), row, row, row)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), jnp.int32)


def _devices(mesh: Mesh) -> str:
    """Those that share a copy of the model count as one."""
    count, shared = parallel.device_count(mesh), mesh.size // parallel.device_count(mesh)
    each = f" group{'s' * (count > 1)} of {shared}" if shared > 1 else ""
    return f"{count}{each} device{'s' * (mesh.size > 1)}"


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
