"""Memory, FLOPs and time of a job, estimated before it runs."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import api, files, policies
from fkv.cache.cadence import FULL
from fkv.engine import decoding
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.evaluation import tables
from fkv.jobs import answering, common, groups, programs
from fkv.keys import Purpose, key_of, keys_of
from fkv.models import LM, ModelConfig
from fkv.models.decoder import param_shapes
from fkv.policies.base import Policy
from fkv.runs import costs, parallel
from fkv.tasks import ledger

SHARE = 0.4  # of the peak FLOP/s, as is typical
SHOWN = ("TPU v5e", "TPU v6e", "H100", "H200")  # 16, 32, 80 and 141 GB
DEVICES = {name: costs.DEVICES[name] for name in SHOWN}


def run(job: str, config: ConfigDict) -> str:
    """Prints the costs of `launch.<job>` with this config; allocates and writes nothing.

    Raises:
      UserError: the config is wrong, or the job has no dry run.
    """
    known = {"sft": _training, "grpo": _training, "evaluate": _generation, "traces": _generation}
    if job not in known:
        raise UserError(f"launch.{job} has no dry run; {', '.join(known)} have")
    groups.check(config, job)
    if job == "traces" and config.traces.text:
        raise UserError("launch.traces has no dry run for traces.text, which runs no model")
    if job == "evaluate" and not config.evaluate.benchmark:
        raise UserError("launch.evaluate has a dry run of answers, and evaluate.benchmark is empty")
    cadence = common.cadence(config)
    model = common.model_config(config)
    lines = [
        f"launch.{job}, {config.model}: {costs.parameters(model) / 1e6:,.2f} million parameters in "
        f"{config.dtype}, cache in {config.cache_dtype or config.dtype}, B = {cadence.budget}, "
        f"L = {cadence.interval}",
        *known[job](config, model, job),
        f"({costs.USABLE:.0%} of the memory taken as usable; nothing here was measured)",
    ]
    text = "\n".join(lines)
    common.say(text)
    return text


# ---- the stages


def _training(config: ConfigDict, model: ModelConfig, job: str) -> list[str]:
    mesh, interval = parallel.make_mesh(config.model_axis), config.interval
    stage = programs.stage(job, config, model, mesh)
    rows, state = stage.device_rows(mesh), jax.eval_shape(stage.init)
    tokens, why = _trace_length(config, model)
    half = tokens // 2 // interval * interval
    # A shorter one would have no eviction.
    other = half if half > stage.plan.cadence.slots else 2 * tokens
    shorter, longer = sorted((tokens, other))
    common.say(f"compiling for traces of {shorter:,} and {longer:,} tokens")
    weights = costs.parameter_bytes(model, config.dtype) // config.model_axis
    fixed = weights + costs.size(state)
    # The program of one device; its collectives are over an axis of size one.
    step = jax.vmap(stage.step, (None, None, 0), out_axes=None, axis_name=parallel.AXIS)

    def needed(tokens):
        token = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        batch = jax.eval_shape(lambda x: jax.tree.map(lambda x: x[None], stage.batch(x)), token)
        return costs.temporaries(step, state, _lm(config, model), batch) + costs.size(batch)

    points = [(n, fixed + needed(n)) for n in (shorter, longer)]
    total, steps = dict(points)[tokens], stage.plan.steps
    memory = [
        ["language model", _gb(weights)],
        ["scorers and optimiser", _gb(fixed - weights)],
        ["a step's batch and temporaries", _gb(total - fixed)],
        ["in all", _gb(total)],
    ]
    flops, what = stage.rows * stage.flops(tokens), f"{stage.rows} a step, micro-batches of {rows}"
    if job == "grpo":
        full = costs.pass_flops(model, tokens) + costs.unembedding_flops(model, tokens)
        flops += stage.traces * full
        at_once = min(stage.plan.grpo.rollouts_at_once or rows, rows)
        what = f"{stage.rows} rollouts a step, micro-batches of {at_once}"
    devices = []
    for name, device in DEVICES.items():
        best = flops / device.flops / mesh.size
        fits = "yes" if total <= device.memory * costs.USABLE else "no"
        longest = costs.largest(points, device.memory, interval)
        times = [f"{x:.3g}" for x in (best, best / SHARE, best / SHARE * steps / 3600)]
        devices.append([name, f"{device.memory / 1e9:.0f}", fits, f"{longest:,}", *times])
    head = ("device", "GB", "fits", "longest trace", "s a step, at best", "at 40 %",
            "hours, at 40 %")  # fmt: skip
    return [
        f"traces of {tokens:,} tokens ({why}); {what} on each of {_devices(mesh)}",
        "",
        tables.text(("memory of a device", "GB"), memory),
        _compiled(config),
        "",
        f"a step: {flops:.3g} operations, {steps:,} steps",
        "",
        tables.text(head, devices),
    ]


def _trace_length(config: ConfigDict, model: ModelConfig) -> tuple[int, str]:
    """Padded length of the longest trace, and its source."""
    if config.data.path and not files.expand(config.data.path).exists():
        field = "length" if config.traces.text else "new_tokens"
        tokens = config.traces[field]
        why = f"traces.{field}; there are none at {config.data.path} yet"
    else:
        found = common.load_traces(
            config, "train", config.data.traces, config.budget, model.vocab_size
        )
        tokens, why = int(found.padded_n.max()), "the longest one"
    if tokens <= config.budget + config.interval:
        raise UserError(
            f"traces of {tokens} tokens ({why}) are not longer than budget + interval = "
            f"{config.budget + config.interval}"
        )
    return _up(tokens, config.interval), why


# ---- generation


def _generation(config: ConfigDict, model: ModelConfig, job: str) -> list[str]:
    settings, batch = config[job], config[job].batch
    embedded, prompt = config.model == api.EMBEDDED, 512
    if embedded:
        problems = ledger.problems(config.seed, "eval", 0, 64, common.spec(config))
        prompt = max(len(p.prompt) for p in problems)
    prompt = _up(prompt, config.interval)
    new_tokens = answering.new_tokens(config, job, embedded)
    cells = [("full", FULL, policies.get("full"))] if job == "traces" else _cells(config, model)
    weights = costs.parameter_bytes(model, config.dtype) // config.model_axis
    common.say(f"compiling for {len(cells)} kinds of cache and two batches")
    memory, speed, lm = [], [], _lm(config, model)
    for name, budget, policy in cells:
        plan = decoding.Plan(common.cadence(config, budget), decoding.Sampling.of(settings), (0,))
        slots = prompt + _up(new_tokens, config.interval)
        slots = policy.capacity(budget) + config.interval if budget else slots
        row = costs.cache_bytes(model, slots, config.dtype, bool(policy.statistics))
        points = []
        for rows in (batch, 2 * batch):
            layer = _prefill_layer(lm, policy, plan, (rows, prompt), new_tokens)
            points.append((rows, weights + rows * row + layer))
        label = f"{name} {budget or ''}".strip()
        largest = [f"{costs.largest(points, device.memory):,}" for device in DEVICES.values()]
        memory.append([label, f"{slots:,}", _gb(batch * row), _gb(points[0][1]), *largest])
        moved = costs.decode_bytes(model, batch, slots, config.dtype)
        done = costs.decode_flops(model, batch, slots)
        best = (max(moved / d.bandwidth, done / d.flops) for d in DEVICES.values())
        speed.append([label, f"{moved / 1e9:.2f}", *(f"{batch / s:,.0f}" for s in best)])
    return [
        f"batches of {batch} answers, prompts of {prompt} and up to {new_tokens:,} new tokens; "
        f"the language model takes {_gb(weights)} GB",
        "",
        "memory of a device in GB, and the largest batch of each",
        tables.text(("cache", "slots", "caches", "in all", *SHOWN), memory),
        _compiled(config),
        "",
        "GB read a step, and tokens a second at best (all slots in use)",
        tables.text(("cache", "GB", *SHOWN), speed),
    ]


def _cells(config: ConfigDict, model: ModelConfig) -> list[tuple[str, int, Policy]]:
    """The full cache if asked for, and one policy at every budget: scorers, which need most."""
    settings, cells = config.evaluate, []
    at = common.cadences(config, "evaluate.budgets")
    named = {name: policies.get(name) for name in settings.policies}
    if full := named.pop("full", None):
        cells.append(("full", FULL, full))
    common.check_policies(config, model, named, at)
    if settings.scorers:
        named = {"foresight": jax.eval_shape(lambda: programs.new_scorers(config, model))}
    for name, policy in list(named.items())[:1]:
        cells += [(name, budget, policy) for budget in settings.budgets]
    return cells


def _prefill_layer(
    lm: LM, policy: Policy, plan: decoding.Plan, shape: tuple[int, int], new_tokens: int
) -> int:
    """Bytes beside weights and caches at the peak, which is during prefill."""
    keys = jax.eval_shape(lambda: keys_of(key_of(0, Purpose.ANSWER), shape[0]))
    row, token = (jax.ShapeDtypeStruct(x, jnp.int32) for x in (shape[:1], shape))
    prompts = Batch(token, row, row, row)
    lower, _ = programs.prefill_layer(lm, policy, plan, prompts, keys, new_tokens)
    hidden = math.prod(shape) * lm.config.width * lm.params["embed_vm"].dtype.itemsize
    return lower().compile().memory_analysis().temp_size_in_bytes + hidden


def _compiled(config: ConfigDict) -> str:
    where = parallel.platform()
    if where == "cpu" and config.dtype != "float32":
        return f"(temporaries as compiled for the CPU in float32: in {config.dtype} less)"
    return f"(temporaries as compiled for the {where})"


def _lm(config: ConfigDict, model: ModelConfig) -> LM:
    """Shapes of the language model.

    CPUs multiply bfloat16 as float32, in copies of all weights that no accelerator needs.
    """
    dtype = jnp.dtype("float32" if parallel.platform() == "cpu" else config.dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), param_shapes(model))
    return LM(shapes, model)


def _devices(mesh: Mesh) -> str:
    count, shared = parallel.device_count(mesh), mesh.size // parallel.device_count(mesh)
    each = f" group{'s' * (count > 1)} of {shared}" if shared > 1 else ""
    return f"{count}{each} device{'s' * (mesh.size > 1)}"


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
