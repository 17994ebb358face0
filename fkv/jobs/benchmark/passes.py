"""Whole passes: prefill, golden labels, training steps."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import models
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.jobs import common, programs
from fkv.jobs.benchmark.base import Arm, Bench, measure, spread
from fkv.jobs.benchmark.device import timed
from fkv.learning import golden, replayed
from fkv.learning.tokens import token_losses
from fkv.models import ModelConfig
from fkv.runs import costs, parallel


def _passes(
    bench: Bench,
    arms: Iterable[Arm],
    prepare: Callable[[Arm], tuple[Callable, dict]],
    flops: Callable[[Arm], float],
) -> list[dict]:
    """Records of passes.

    Args:
      prepare: from an arm to a function that makes its pass, and more fields of its record.
      flops: of a pass.
    """

    def warmed(arm):
        call, about = prepare(arm)
        bench.check_fits(about["program_bytes"])
        jax.block_until_ready(call())
        return lambda: timed(call)[0], about

    def record(arm, found):
        middle = float(np.median(found[arm]))
        return {
            **spread("seconds", found[arm]),
            "tokens_per_s": arm.batch * arm.length / middle,
            "mfu": flops(arm) / middle / bench.peaks.flops,
        }

    return measure(bench, arms, warmed, record)


def prefill(bench: Bench) -> list[dict]:
    """Prompts up to the first sampled token."""
    lm, interval, s = bench.lm, bench.interval, bench.settings

    def prepare(arm):
        policy, plan = bench.policy(arm.policy), bench.plan(arm.budget)
        made = programs.decode(lm, policy, plan, (arm.batch, arm.length), interval)
        last = functools.partial(made.read_layer, first=len(made.pieces) == 1)
        _, about = bench.compiled(arm, last)
        other = costs.size((lm.params, made.state, [made.held()] * (lm.config.layers - 1)))
        size = about["program_bytes"] + other - costs.size(models.layer(lm, 0))
        bench.check_fits(size)
        prompts, ids = bench.tokens(arm.batch, arm.length), []
        batcher = bench.batcher(arm.policy, plan, (*prompts.shape, interval))

        def call():
            for id in ids:  # the call before left them in their rows
                batcher.cancel(id)
            ids[:] = bench.submit(batcher, plan, prompts, interval)
            while batcher.waiting:
                batcher.read()
            batcher.wait()

        return call, {**about, "program_bytes": size}

    def flops(arm):
        seen = arm.budget + interval if arm.budget else 0
        head = costs.unembedding_flops(lm.config, 1)
        return arm.batch * (costs.pass_flops(lm.config, arm.length, seen) + head)

    return _passes(bench, bench.arms(s.prefill_batches, s.prefill_lengths), prepare, flops)


def labels(bench: Bench) -> list[dict]:
    """Golden evictions of all layers of a trace."""
    cadence = common.cadence(bench.config)
    label = jax.jit(golden.policy, static_argnums=2)

    def prepare(arm):
        length = np.array([arm.length], np.int32)
        args = bench.lm, Batch.of(bench.tokens(1, arm.length), length)
        program, about = bench.compiled(arm, lambda: label.lower(*args, cadence))
        return functools.partial(program, *args), about

    arms = [Arm("golden", cadence.budget, 1, n) for n in bench.settings.label_lengths]
    return _passes(bench, arms, prepare, lambda arm: costs.label_flops(bench.lm.config, arm.length))


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step to measure, and the shape of its batch."""

    step: str
    traces: int
    rows: int
    length: int

    def __str__(self) -> str:
        return f"{self.step}, {self.length} tokens"


def steps(bench: Bench) -> list[dict]:
    """A step of either training stage, as its job makes it, and passes over the same traces.

    Passes: `forward` with the full cache, `losses` with the unembedding too, and `replay` under
    scorers, whose losses are measured: what one policy costs in a table of losses.
    """
    mesh, length = parallel.make_mesh(), bench.settings.step_length
    stages = stages_of(bench.config, bench.lm.config, mesh)
    traces = next(iter(stages.values())).traces
    plain, cadence = bench.policy("full"), common.cadence(bench.config)

    @functools.partial(jax.jit, static_argnames="losses")
    def a_pass(lm, policy, batch, losses):
        hidden, _, _ = replay.replay(lm, batch, policy, cadence)
        return token_losses(lm, hidden, batch.token_bt).nll_bt if losses else hidden

    policies = {"forward": plain, "losses": plain, "replay": bench.policy("foresight")}

    def prepare(arm):
        tokens = bench.tokens(arm.traces, length)
        if arm.step in policies:
            batch = Batch.of(tokens, np.full(arm.rows, length, np.int32))
            losses = arm.step != "forward"
            args = bench.lm, policies[arm.step], batch, losses
            call = functools.partial(timed, a_pass, *args)
        else:
            stage = stages[arm.step]
            token = np.repeat(tokens, arm.rows // arm.traces, axis=0)
            state, lm = parallel.replicate((stage.init(), bench.lm), mesh)
            step = parallel.pmap(stage.step, mesh, constants=2, batched=1)
            call = functools.partial(timed, step, state, lm, stage.batch(token))
        first, again = call()[0], call()[0]
        return lambda: call()[0], {"compile_s": first - again}

    def record(arm, found):
        middle = {one: float(np.median(seconds)) for one, seconds in found.items()}
        forward = middle.get(arms[0], float("nan")) * arm.rows / traces
        more = {"forwards": middle[arm] / forward}
        if arm.step in stages:
            work = arm.rows * stages[arm.step].flops(length) / mesh.size
            more["mfu"] = work / middle[arm] / bench.peaks.flops
        return {**spread("seconds", found[arm]), **more}

    arms = [Step(name, traces, traces, length) for name in policies]
    arms += [Step(name, stage.traces, stage.rows, length) for name, stage in stages.items()]
    return measure(bench, arms, prepare, record)


def stages_of(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> dict[str, programs.Stage]:
    """The stages, with steps of `benchmark.step_traces` traces a device in one micro-batch."""
    config, s = config.copy_and_resolve_references(), config.benchmark
    traces = s.step_traces * parallel.device_count(mesh)
    config.sft.update(batch=traces, at_once=0)
    config.grpo.update(traces=traces, traces_at_once=0, rollouts=s.step_rollouts)
    jobs = {"supervised": "sft", "grpo": "grpo"}
    stages = {name: programs.stage(job, config, model, mesh) for name, job in jobs.items()}
    if s.step_replayed:
        grpo = stages["grpo"]
        again = functools.partial(replayed.train_step, grpo.plan, axis=parallel.AXIS)
        stages["grpo, replayed"] = dataclasses.replace(grpo, step=again)
    return stages
