"""Sections about whole passes: reading prompts, golden labels, training steps."""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fkv import models
from fkv.cache.cadence import Cadence
from fkv.engine import decoding, replay
from fkv.engine.batch import Batch
from fkv.jobs import common
from fkv.jobs.benchmark.base import (
    Arm,
    Bench,
    DoesNotFit,
    interleaved,
    name_of,
    only_memory,
    random_tokens,
    spread,
)
from fkv.keys import Purpose, key_of
from fkv.learning import fit, golden, grpo, sft
from fkv.policies import scorer
from fkv.runs import costs, parallel


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
        common.say(f"  {name_of(arm)}")
        try:
            call, size, seconds = prepare(arm)
            if size > bench.limit:
                raise DoesNotFit
            jax.block_until_ready(call())
        except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
            only_memory(error)
            records.append({**arm.record(), "fits": False, "left_out": False})
            continue
        calls[arm] = call
        about[arm] = {"program_bytes": size, "compile_s": seconds}
    for arm, seconds in interleaved(bench, calls).items():
        middle = float(np.median(seconds))
        records.append(
            {
                **arm.record(),
                "fits": True,
                **spread(seconds),
                "tokens_per_s": arm.batch * arm.length / middle,
                "mfu": flops(arm) / middle / bench.peaks.flops,
                **about[arm],
            }
        )
    return records


def prefill(bench: Bench) -> list[dict]:
    """Reading prompts, up to the first token that is drawn."""
    interval, s, model = bench.interval, bench.settings, bench.model
    arms = bench.arms(s.prefill_batches, s.prefill_lengths)

    def prepare(arm):
        policy, plan = bench.policy(arm.policy), bench.plan(arm)
        row, token = np.zeros(arm.batch, np.int32), random_tokens(bench, arm.batch, arm.length)
        batch, keys = Batch(token, row + arm.length, row, row), bench.row_keys(arm.batch)
        call = functools.partial(
            decoding.prefill, bench.lm, policy, plan, batch, keys, row, interval
        )
        hidden = jax.eval_shape(models.embed, bench.lm, token)
        site, position = replay.Site(model, plan.cadence, 0, keys), jnp.asarray(token)
        inputs = (bench.lm.params["layers"], policy, site, hidden, position)
        _, seconds, size = bench.compiled(
            arm, lambda: decoding.prefill_layer.lower(*inputs, room=interval)
        )
        cache = costs.size(jax.eval_shape(call).caches[0])
        rest = costs.size(bench.lm) - costs.size(bench.lm.params["layers"])
        return call, size + (model.layers - 1) * cache + rest, seconds

    def flops(arm):
        seen = arm.budget + interval if arm.budget else 0
        head = 2 * model.vocab_size * model.width
        return arm.batch * (costs.pass_flops(model, arm.length, seen) + head)

    return _pass_section(bench, arms, prepare, flops)


def labels(bench: Bench) -> list[dict]:
    """Golden evictions of all layers of a trace."""
    cadence = Cadence(bench.config.budget, bench.interval)
    label = jax.jit(golden.policy, static_argnums=2)

    def prepare(arm):
        length = np.array([arm.length], np.int32)
        args = bench.lm, Batch.of(random_tokens(bench, 1, arm.length), length)
        program, seconds, size = bench.compiled(arm, lambda: label.lower(*args, cadence))
        return functools.partial(program, *args), size, seconds

    arms = [Arm("golden", cadence.budget, 1, n) for n in bench.settings.label_lengths]
    return _pass_section(
        bench, arms, prepare, lambda arm: costs.label_flops(bench.model, arm.length)
    )


def steps(bench: Bench) -> list[dict]:
    """A supervised and a reinforcement step, as the jobs make them."""
    config, model, s = bench.config, bench.model, bench.settings
    mesh, length = parallel.make_mesh(), s.step_length
    traces = s.step_traces * parallel.device_count(mesh)
    shared = {
        "cadence": Cadence(config.budget, config.interval),
        "scorer": scorer.ScorerConfig(**config.scorer),
    }
    loss = sft.LossConfig.of(config.sft)
    plan = sft.Plan.of({**config.sft, "warmup": 1, "steps": 100}, loss=loss, **shared)
    settings = grpo.GRPOConfig.of({**config.grpo, "rollouts": s.step_rollouts})
    grpo_plan = grpo.Plan.of({**config.grpo, "warmup": 1}, grpo=settings, **shared)
    params = scorer.init(key_of(config.seed, Purpose.SCORER), model, plan.scorer)

    batch = Batch.of(random_tokens(bench, traces, length), np.full(traces, length, np.int32))
    rollouts = traces * settings.rollouts
    losses = np.ones((rollouts, length - 1), np.float32)
    rows = grpo.Rollouts(
        jax.tree.map(lambda x: np.repeat(x, settings.rollouts, axis=0), batch),
        losses,
        losses,
        np.asarray(jax.random.key_data(bench.row_keys(rollouts))),
    )
    first = fit.TrainState.init(params, plan.optimiser)
    drawn = grpo.TrainState.init(params, grpo_plan.optimiser, reference=params)
    first, drawn, lm = parallel.replicate((first, drawn, bench.lm), mesh)

    def mapped(step, plan):
        step = functools.partial(step, plan, axis=parallel.AXIS)
        return parallel.pmap(step, mesh, constants=2, batched=1)

    calls = {
        "supervised": functools.partial(mapped(sft.train_step, plan), first, lm, batch),
        "grpo": functools.partial(mapped(grpo.train_step, grpo_plan), drawn, lm, rows),
    }
    cadence, epochs = plan.cadence, settings.epochs
    work = {
        "supervised": traces * costs.sft_flops(model, plan.scorer, length, cadence),
        "grpo": rollouts * costs.grpo_flops(model, plan.scorer, length, cadence, epochs),
    }
    compiled = {}
    for name, step in calls.items():
        common.say(f"  {name}, {length} tokens")
        start = time.perf_counter()
        jax.block_until_ready(step())
        compiled[name] = time.perf_counter() - start
    records = []
    for name, seconds in interleaved(bench, calls).items():
        middle = float(np.median(seconds))
        records.append(
            {
                "step": name,
                "traces": traces,
                "rows": rollouts if name == "grpo" else traces,
                "length": length,
                **spread(seconds),
                "mfu": work[name] / middle / bench.peaks.flops / mesh.size,
                "compile_s": compiled[name] - middle,  # what the first call took longer
            }
        )
    return records
