"""Programs as the jobs run them: the benchmark times them, dry runs compile them for shapes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fkv import models, policies
from fkv.cache.slots import Cache
from fkv.engine import decoding, replay
from fkv.engine.batch import Batch
from fkv.jobs import groups, variants
from fkv.jobs import grpo as grpo_job
from fkv.jobs import sft as sft_job
from fkv.keys import Purpose, key_of, keys_of
from fkv.learning import fit, grpo, sft
from fkv.models import LM, ModelConfig
from fkv.policies import scorer
from fkv.policies.base import Policy
from fkv.runs import costs, parallel


@dataclasses.dataclass(frozen=True)
class Stage:
    """The training step of a stage.

    Attributes:
      plan: of the stage.
      traces, rows: of a step; rows are its traces or rollouts.
      init: makes the state of new scorers.
      step: of one device, from (state, lm, batch).
      batch: synthetic, from its tokens, int32 [rows, t].
      flops: of a row, from its number of tokens.
    """

    plan: fit.Fit
    traces: int
    rows: int
    init: Callable[[], fit.TrainState]
    step: Callable
    batch: Callable[[Array], Any]
    flops: Callable[[int], float]

    def device_rows(self, mesh: Mesh) -> int:
        """Rows of a device in a micro-batch."""
        return self.rows // self.plan.micro_batches // parallel.device_count(mesh)


def stage(job: str, config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Stage:
    """The step of `launch.sft` or `launch.grpo`, from the losses of the full cache on."""
    if job == "sft":
        plans = sft_job.plans_of(variants.resolve(config, groups.FIELDS) or {"": config}, mesh)
        plan, traces, rollouts = plans[0], plans[0].batch, 1
        step = functools.partial(sft.train_step, plans, axis=parallel.AXIS)
        golden, owns = ([x.scorer for x in plans if (x.states != "golden") == y] for y in (0, 1))
        more = {"cadence": plan.cadence, "owns": owns}
        flops = functools.partial(costs.sft_flops, model, golden, **more)
    else:
        plan = grpo_job.plan_of(config, mesh)
        traces, rollouts = plan.traces, plan.grpo.rollouts
        step = functools.partial(grpo_job.step_of(plan), plan, axis=parallel.AXIS)
        more = {"cadence": plan.cadence, "rollouts": rollouts, "epochs": plan.grpo.epochs}
        flops = functools.partial(costs.grpo_flops, model, plan.scorer, **more)

    def init():
        if job == "sft":
            key = key_of(config.seed, Purpose.SCORER)
            return [x.start(scorer.init(key, model, x.scorer)) for x in plans]
        params = new_scorers(config, model).params
        return grpo.TrainState.init(params, plan.optimiser, reference=params)

    def batch(token):
        rows, tokens = token.shape
        found = Batch.of(token, np.full(rows, tokens, np.int32))
        if job == "sft":
            return found
        losses = np.ones((rows, tokens - 1), np.float32)
        keys = keys_of(key_of(config.seed, Purpose.BENCHMARK), rows)
        return grpo.Rollouts(found, losses, losses, jax.random.key_data(keys))

    return Stage(plan, traces, traces * rollouts, init, step, batch, flops)


def new_scorers(config: ConfigDict, model: ModelConfig) -> policies.Foresight:
    """Untrained scorers, which cost what trained ones do."""
    how = scorer.ScorerConfig(**config.scorer)
    return policies.Foresight(scorer.init(key_of(config.seed, Purpose.SCORER), model, how), how)


def prefill_layer(
    lm: LM, policy: Policy, plan: decoding.Plan, prompts: Batch, key_b: Array, new_tokens: int
) -> tuple[Callable[[], jax.stages.Lowered], tuple[Cache, ...]]:
    """A function that lowers one layer of a prefill, and the shapes of all caches."""
    run = functools.partial(decoding.prefill, plan=plan, new_tokens=new_tokens)
    state = jax.eval_shape(run, lm, policy, prompts=prompts, key_b=key_b, limit_b=prompts.length_b)
    hidden, position = jax.eval_shape(
        lambda lm, prompts: (models.embed(lm, prompts.token_bt), prompts.position_bt), lm, prompts
    )
    room = -(-new_tokens // plan.cadence.interval) * plan.cadence.interval
    site = replay.Site(lm.config, plan.cadence, 0, key_b, prompts.prompt_b)
    inputs = lm.params["layers"], policy, site, hidden, position
    return functools.partial(decoding.prefill_layer.lower, *inputs, room=room), state.caches
