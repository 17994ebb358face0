"""Programs as the jobs run them: the benchmark times them, dry runs compile them for shapes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from fkv import models, policies
from fkv.cache import slots as kv
from fkv.cache.slots import Cache
from fkv.engine import decoding, replay
from fkv.engine.batch import Batch
from fkv.jobs import groups, variants
from fkv.jobs import grpo as grpo_job
from fkv.jobs import sft as sft_job
from fkv.keys import Purpose, key_of, keys_of
from fkv.learning import fit, grpo, sft
from fkv.models import LM, ModelConfig, forms
from fkv.models.decoder import MODEL, param_shapes, sharding
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


@dataclasses.dataclass(frozen=True)
class Decode:
    """Prefill and decoding of a batch, as the programs to lower, from shapes alone; see `decode`.

    Attributes:
      lm: with separate layers.
      policy, plan: as given.
      width, new_tokens: of the prompts, padded; and the most that are added.
      hidden_btm, position_bt: of the prompts, before a layer.
      state: after prefill.
      asked: what `decoding.steps` leaves for the eviction of a layer.
      site: of an eviction.
    """

    lm: LM
    policy: Policy
    plan: decoding.Plan
    width: int
    new_tokens: int
    hidden_btm: jax.ShapeDtypeStruct
    position_bt: jax.ShapeDtypeStruct
    state: decoding.State
    asked: decoding.Asked
    site: replay.Site

    def prefill_layer(self) -> Lowered:
        """A layer of `decoding.prefill`; called once for each."""
        interval, first = self.plan.cadence.interval, self.lm.params["layers"][0]
        inputs = first, self.policy, self.site, self.hidden_btm, self.position_bt
        return decoding.prefill_layer.lower(
            *inputs, room=-(-self.new_tokens // interval) * interval
        )

    def first_token(self) -> Lowered:
        """The end of `decoding.prefill`."""
        inputs = self.hidden_btm, self.position_bt, self.state.key_b, self.state.left_b
        return decoding.first_token.lower(self.lm, self.plan, *inputs)

    def steps(self) -> Lowered:
        """`L` steps of decoding."""
        return decoding.steps.lower(self.lm, self.policy, self.plan, self.state, self.width)

    def evict_layer(self) -> Lowered:
        """An eviction; called once for each layer after the steps, if the policy evicts."""
        inputs = self.policy, self.state.caches[0], self.asked, self.site
        return decoding.evict_layer.lower(*inputs)

    def chunk(self) -> Lowered:
        """`L` steps and all evictions in one program, as shallow models stream."""
        inputs = self.lm, self.policy, self.plan, self.state, self.width
        return decoding.one_chunk.lower(*inputs)

    def at_once(self) -> Lowered:
        """All chunks in one program, as shallow models generate."""
        inputs = self.lm, self.policy, self.plan, self.state, self.width
        return decoding.decode_at_once.lower(*inputs, self.new_tokens)


def decode(
    lm: LM,
    policy: Policy,
    plan: decoding.Plan,
    shape: tuple[int, int],
    new_tokens: int,
    mesh: Mesh | None = None,
) -> Decode:
    """The programs of decoding, for models of any size.

    Args:
      lm: arrays or shapes, in either form; shapes from `model_shapes`.
      policy: arrays or shapes.
      shape: rows, and tokens of the prompts, a multiple of `L` if the policy evicts.
      new_tokens: at most; a full cache has room for them.
      mesh: devices to compile for, with an axis `model`; by default those of `lm`.
    """
    config, cadence, (rows, width) = lm.config, plan.cadence, shape
    if not models.is_separate(lm):
        lm = lm.replace(params=lm.params | {"layers": forms.separate_shapes(lm)})
    dtype = lm.params["embed_vm"].dtype
    heads, group, interval = config.kv_heads, config.group_size, cadence.interval

    def on(shape, dtype=jnp.int32, sharded=None):
        """A shape; over the mesh, the axis `sharded` of heads is."""
        if mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        spec = [MODEL if i == sharded else None for i in range(len(shape))]
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def cache():
        if policy.evicts:
            return replay.init_cache(policy, rows, config, cadence, dtype)
        slots, held_as = width + -(-new_tokens // interval) * interval, config.cache_dtype or dtype
        return kv.init(rows, heads, slots, config.head_dim, held_as)

    one = jax.tree.map(lambda x: on(x.shape, x.dtype, 1), jax.eval_shape(cache))
    row, none = on((rows,)), on(())
    key = jax.eval_shape(lambda: keys_of(key_of(0, Purpose.ANSWER), rows))
    key = on(key.shape, key.dtype)
    if mesh is not None:
        policy = jax.tree.map(lambda x: on(x.shape, x.dtype), policy)
    return Decode(
        lm, policy, plan, width, new_tokens,
        hidden_btm=on((rows, width, config.width), dtype),
        position_bt=on((rows, width)),
        state=decoding.State((one,) * config.layers, row, row, row, key, row, none),
        asked=decoding.Asked(
            on((interval, rows, config.heads, config.head_dim), dtype, 2),
            on((interval, rows, heads, group), jnp.float32, 2), on((interval, rows)), none,
        ),
        site=replay.Site(config, cadence, none, key, row),
    )  # fmt: skip


def model_shapes(
    config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None = None, separate: bool = True
) -> LM:
    """Shapes of a language model, over a mesh as `models.load` shards it."""

    def one(path, x):
        there = sharding(path[-1].key, x.shape, mesh)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=there)

    on_cpu = mesh is not None and forms.is_on_cpu(mesh)
    shapes = param_shapes(config, separate, on_cpu)
    return LM(jax.tree_util.tree_map_with_path(one, shapes), config)


def prefill_layer(
    lm: LM, policy: Policy, plan: decoding.Plan, prompts: Batch, key_b: Array, new_tokens: int
) -> tuple[Callable[[], Lowered], tuple[Cache, ...]]:
    """A function that lowers one layer of a prefill, and the shapes of all caches."""
    one = decode(lm, policy, plan, prompts.token_bt.shape, new_tokens)
    return one.prefill_layer, one.state.caches
