"""Sections about whole passes: reading prompts, golden labels, training steps."""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fkv import models
from fkv.cache.cadence import Cadence
from fkv.engine import decoding
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
from fkv.jobs.grpo import settings_of
from fkv.keys import Purpose, key_of
from fkv.learning import golden, grpo, sft
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
        policy = bench.policy(arm.policy)
        row = np.zeros(arm.batch, np.int32)
        token = random_tokens(bench, arm.batch, arm.length)
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


def labels(bench: Bench) -> list[dict]:
    """Golden evictions of all layers of a trace."""
    config = bench.config
    label = jax.jit(golden.policy, static_argnames=("config", "budget", "interval"))
    fixed = dict(budget=config.budget, interval=config.interval)

    def prepare(arm):
        args = (bench.params, random_tokens(bench, 1, arm.length), np.array([arm.length], np.int32))
        program, seconds, size = bench.compiled(
            arm, lambda: label.lower(bench.model, *args, **fixed)
        )
        return functools.partial(program, *args), size, seconds

    arms = [Arm("golden", config.budget, 1, n) for n in bench.settings.label_lengths]
    return _pass_section(
        bench, arms, prepare, lambda arm: costs.label_flops(bench.model, arm.length)
    )


def steps(bench: Bench) -> list[dict]:
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

    token = random_tokens(bench, traces, length)
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
    calls = {
        "supervised": functools.partial(
            parallel.pmap(supervised, mesh, constants=2, batched=2),
            first[0], everywhere, token, np.full(traces, length, np.int32),
        ),
        "grpo": functools.partial(
            parallel.pmap(reinforced, mesh, constants=3, batched=1),
            first[1], everywhere, reference, batch,
        ),
    }  # fmt: skip
    cadence = Cadence(*sizes)
    work = {
        "supervised": traces * costs.sft_flops(model, rules, length, cadence),
        "grpo": rollouts * costs.grpo_flops(model, rules, length, cadence, settings.epochs),
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
