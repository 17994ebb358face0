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
from fkv.cache.slots import Cache
from fkv.engine import reading, replay, steps
from fkv.engine.batch import Batch
from fkv.engine.requests import STOPS, Plan, cut, piece_of, together
from fkv.engine.sampling import Samplings
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
    """What a batcher runs, as the programs to lower, from shapes alone; see `decode`.

    Attributes:
      lm: with separate layers.
      policy, plan: as given.
      pieces: widths of the pieces that a prompt is read in.
      together: prompts that are read at a time.
      room: entries of a full cache.
      state: of all rows.
      rows: what their requests set.
      site: of their evictions.
      place: of an array whose axis of heads is the second, third, or none.
    """

    lm: LM
    policy: Policy
    plan: Plan
    pieces: tuple[int, ...]
    together: int
    room: int
    state: steps.State
    rows: steps.Rows
    site: replay.Site
    place: Callable[..., Any]

    def steps(self) -> Lowered:
        """`L` steps of decoding."""
        program = steps.Program(self.plan.cadence, self.plan.cadence.interval)
        start = self.place(jax.ShapeDtypeStruct((), jnp.int32))
        return steps.steps.lower(self.lm, self.policy, program, self.state, self.rows, start)

    def evict_layer(self) -> Lowered:
        """The border of a layer; called once for each after the steps."""
        asked = self.state.asked[0] if self.state.asked else None
        return steps.evict_layer.lower(self.policy, self.state.caches[0], asked, self.site)

    def read_layer(self, first: bool = True) -> Lowered:
        """A layer of the first piece of prompts, or of a later one; called once for each layer."""
        *inputs, room = self._read(first)
        return reading.read_layer.lower(*inputs, room=room)

    def place_layer(self) -> Lowered:
        """The end of reading prompts, called once for each layer."""
        index = self.place(jax.ShapeDtypeStruct((self.together,), jnp.int32))
        inputs = self.held(), self._some(self.site), index, index
        return reading.place_layer.lower(self.policy, self.state.caches[0], *inputs)

    def first_token(self) -> Lowered:
        """What is drawn after prompts, once they are read."""
        rows, hidden = self._some(self.rows), self.hidden(1)
        hidden = self.place(jax.ShapeDtypeStruct((self.together, hidden.shape[2]), hidden.dtype))
        return reading.first_token.lower(self.lm, rows, hidden, rows.prompt_b, None)

    def held(self) -> replay.Staged | Cache:
        """A layer of what has been read of prompts."""
        *inputs, room = self._read(True)
        read = functools.partial(reading.read_layer, room=room)
        held = jax.eval_shape(read, *inputs)[1]
        if isinstance(held, Cache):
            return jax.tree.map(functools.partial(self.place, heads=1), held)
        chunk = replay.Chunk(
            self.place(held.chunk.query_blhd, heads=2), self.place(held.chunk.lse_bkgl, heads=1),
            self.place(held.chunk.position_bl), self.place(held.chunk.index),
        )  # fmt: skip
        cache = jax.tree.map(functools.partial(self.place, heads=1), held.cache)
        return replay.Staged(cache, chunk)

    def hidden(self, width: int) -> jax.ShapeDtypeStruct:
        """Of pieces, before a layer."""
        dtype = self.lm.params["embed_vm"].dtype
        shape = self.together, width, self.lm.config.width
        return self.place(jax.ShapeDtypeStruct(shape, dtype))

    def _read(self, first):
        """Arguments of `reading.read_layer`."""
        width = self.pieces[0 if first else -1]
        position = self.place(jax.ShapeDtypeStruct((self.together, width), jnp.int32))
        held = None if first else self.held()
        room = reading.room_to_read(self.room, piece_of(self.plan.cadence.interval))
        site, layer = self._some(self.site), self.lm.params["layers"][0]
        return layer, self.policy, site, self.hidden(width), position, held, room

    def _some(self, rows):
        """Of the prompts that are read together, what there is of all rows."""
        return jax.tree.map(
            lambda x: self.place(jax.ShapeDtypeStruct((self.together, *x.shape[1:]), x.dtype))
            if x.shape else x, rows,
        )  # fmt: skip


def decode(
    lm: LM,
    policy: Policy,
    plan: Plan,
    shape: tuple[int, int],
    new_tokens: int,
    mesh: Mesh | None = None,
) -> Decode:
    """The programs of a batcher that answers prompts of one length.

    Args:
      lm: arrays or shapes, in either form; shapes from `model_shapes`.
      policy: arrays or shapes.
      shape: rows, and tokens of a prompt.
      new_tokens: at most; a full cache has room for them.
      mesh: devices to compile for, with an axis `model`; by default those of `lm`.
    """
    config, cadence, (rows, prompt) = lm.config, plan.cadence, shape
    if not models.is_separate(lm):
        lm = lm.replace(params=lm.params | {"layers": forms.separate_shapes(lm)})
    dtype, room = lm.params["embed_vm"].dtype, max(prompt + new_tokens, cadence.interval)

    def place(x, heads=None):
        """A shape; over the mesh, its axis of heads is split."""
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)
        spec = [MODEL if i == heads else None for i in range(len(x.shape))]
        there = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    def of_rows():
        none, key = jnp.zeros(rows, jnp.int32), keys_of(key_of(0, Purpose.ANSWER), rows)
        how = Samplings.of([plan.sampling] * rows)
        stop = jnp.zeros((rows, STOPS), jnp.int32)
        return steps.Rows(key, none, stop, jax.tree.map(jnp.asarray, how))

    sizes = rows, config, cadence, room, dtype
    caches, asked = jax.eval_shape(lambda: steps.empty(policy, *sizes))
    settings = jax.tree.map(place, jax.eval_shape(of_rows))
    if mesh is not None:
        policy = jax.tree.map(place, policy)
    row, layer = settings.prompt_b, place(jax.ShapeDtypeStruct((), jnp.int32))
    piece = piece_of(cadence.interval)
    pieces = tuple(x.shape[1] for x, _ in cut(np.zeros(prompt, np.int32), cadence.interval, piece))
    return Decode(
        lm, policy, plan, pieces,
        together=together(rows, pieces[0], piece) if len(pieces) == 1 else 1,
        room=room,
        state=steps.State(
            jax.tree.map(functools.partial(place, heads=1), caches),
            jax.tree.map(functools.partial(place, heads=2), asked), row, row, row,
        ),
        rows=settings,
        site=replay.Site(config, cadence, layer, settings.key_b, row),
        place=place,
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
