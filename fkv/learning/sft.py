"""The supervised stage: scorers learn the golden order by pairwise ranking.

ForesightKV, arXiv 2602.03203, section 3.3. The language model is frozen and the features carry no
gradient, so the loss is a sum of independent terms, one per eviction: value and gradient are
computed inside the scan over chunks and summed. Golden labels never leave their layer: one scan
over layers carries the hidden states of both the full and the evicted pass, which are the same up
to the first eviction.
"""

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from fkv import kinds, models
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.kinds import setting
from fkv.learning import golden
from fkv.learning.fit import Fit, TrainState, adam, mean_so_far, updates_made
from fkv.models import LM
from fkv.policies import Forced, View, scorer

WEIGHTINGS = ("plain", "sqrt_gap")


@dataclasses.dataclass(frozen=True)
class LossConfig(kinds.Settings):
    """The ranking loss.

    Attributes:
      margin: of the hinge, in units of the score.
      weighting: `plain` as in the paper, or `sqrt_gap`, which weights pairs by the square root of
        the gap between their future scores.
    """

    group: ClassVar[str] = "sft"
    margin: float = setting(kinds.number(0), 0.01)
    weighting: str = setting(kinds.one_of(WEIGHTINGS), "plain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Fit):
    """The supervised stage.

    Attributes:
      batch: traces per step, `at_once` (0: all) per micro-batch of a device.
      learning_rate, warmup: of Adam: linear warm-up, then cosine to zero at `steps`.
      clip: of the gradient's global norm.
      cadence: of evictions.
      scorer: what is trained.
      loss: the ranking loss.
      micro_batches: per step, see `fit.adam`.
    """

    group: ClassVar[str] = "sft"
    steps: int = setting(kinds.whole(1))
    batch: int = setting(kinds.whole(1))
    at_once: int = setting(kinds.whole(0))
    learning_rate: float = setting(kinds.POSITIVE)
    warmup: int = setting(kinds.whole(0))
    clip: float = setting(kinds.POSITIVE)
    cadence: Cadence
    scorer: scorer.ScorerConfig
    loss: LossConfig
    micro_batches: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.warmup >= self.steps:
            raise UserError(
                f"sft.warmup = {self.warmup} must be less than sft.steps = {self.steps}"
            )

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam after clipping."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup, self.steps
        )
        return adam(schedule, self.clip, self.micro_batches)


def ranking_loss(
    importance_xn: Array, future_xn: Array, config: LossConfig = LossConfig()
) -> tuple[Array, Array]:
    """Pairwise hinge loss of each group.

    Over all ordered pairs in which the future score of i is strictly below that of j, the mean of
    `max(0, margin - (importance_j - importance_i))`.

    Args:
      importance_xn: the scorer's importances, higher is kept.
      future_xn: golden future scores.

    Returns:
      The loss [x], zero for groups without a pair, and whether the group has a pair [x].
    """
    below = future_xn[..., :, None] < future_xn[..., None, :]
    hinge = jax.nn.relu(config.margin + importance_xn[..., :, None] - importance_xn[..., None, :])
    weight = below.astype(jnp.float32)
    if config.weighting == "sqrt_gap":
        gap = future_xn[..., None, :] - future_xn[..., :, None]
        weight = jnp.sqrt(jnp.where(below, gap, 0.0))
    total = weight.sum((-2, -1))
    has_pair = total > 0
    loss = (hinge * weight).sum((-2, -1)) / jnp.where(has_pair, total, 1.0)
    return loss, has_pair


def has_pair(future_xn: Array) -> Array:
    """Whether two candidates of a group differ in future score."""
    return future_xn.max(-1) > future_xn.min(-1)


@flax.struct.dataclass
class Sums:
    """Sums over one pass of a batch, per layer.

    Attributes:
      traces: number of traces long enough to count.
      loss: ranking loss, mean over the evictions and heads of a trace, summed over traces.
      overlap: share of the golden `L` among the scorer's top `L`, averaged and summed alike.
      grads: gradient of `loss` in the layer's scorer parameters.
    """

    traces: Array
    loss: Array
    overlap: Array
    grads: dict


def loss_and_grads(plan: Plan, params: dict, lm: LM, batch: Batch) -> Sums:
    """Ranking loss, overlap and gradient of a batch of traces, [layers] and [layers, ...].

    Rows too short for a token after an eviction do not count.
    """
    cadence = plan.cadence
    replay.check_lengths([batch.token_bt.shape[1]], cadence)
    position, first = batch.position_bt, cadence.first_evicting_token
    counted = (batch.length_b > first).astype(jnp.float32).sum()
    # Golden evictions need no PRNG keys and have even budgets.
    unused = replay.row_keys(key_of(0, Purpose.REPLAY), len(position))
    site = replay.Site(lm.config, cadence, 0, unused)

    def layer(hiddens, inputs):
        weights, params = inputs
        full, begun, evicted = hiddens
        full, labels, (qkv, lse) = golden.layer_labels(lm.config, weights, full, position, cadence)
        policy = Forced(labels.evict_position_ebkl, plan.scorer.statistics)

        # Weights of each eviction's groups, known from the labels: a mean over a trace's groups.
        pairs = has_pair(labels.future_score_ebkn) & labels.valid_eb[..., None]
        loss_weight = pairs / jnp.maximum(pairs.sum((0, 2), keepdims=True), 1)
        valid = jnp.broadcast_to(labels.valid_eb[..., None], pairs.shape)
        overlap_weight = valid / jnp.maximum(valid.sum((0, 2), keepdims=True), 1)

        def observe(acc: Sums, policy: Forced, view: View, evict: Array):
            future = golden.at(labels.future_score_ebkn, view.eviction)
            feature = scorer.features(plan.scorer, view)

            def objective(params):
                importance = scorer.apply(plan.scorer, params, feature)
                loss, _ = ranking_loss(importance, future, plan.loss)
                return (loss * golden.at(loss_weight, view.eviction)).sum(), importance

            (loss, importance), grads = jax.value_and_grad(objective, has_aux=True)(params)
            # Shifting all scores of a head does not change the loss; Adam would amplify the
            # rounding error in the gradient of that shift.
            grads = {**grads, "b2": jnp.zeros_like(grads["b2"])}
            chosen = jax.lax.top_k(-importance, view.interval)[1]
            agree = (chosen[..., :, None] == evict[..., None, :]).any(-1).mean(-1)
            overlap = (agree * golden.at(overlap_weight, view.eviction)).sum()
            return jax.tree.map(jnp.add, acc, Sums(0.0, loss, overlap, grads)), ()

        zero = Sums(counted, jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        before, after = position[:, :first], position[:, first:]
        if lm.config.cache_dtype:  # quantised, which the full pass is not
            qkv = models.project(lm.config, weights, begun, before)
            out, staged = replay.begin_layer(policy, lm.config, cadence, qkv, before)
            begun = models.finish(lm.config, weights, begun, out)
        else:
            qkv, lse = [x[:, :first] for x in qkv], lse[..., :first]
            staged = replay.stage(policy, lm.config, cadence, qkv, lse, before)
        qkv = models.project(lm.config, weights, evicted, after)
        out, _, sums, _ = replay.pass_from(policy, site, staged, qkv, after, observe, zero)
        return (full, begun, models.finish(lm.config, weights, evicted, out)), sums

    hidden = models.embed(lm, batch.token_bt)
    begun = hidden[:, :first] if lm.config.cache_dtype else ()
    return jax.lax.scan(layer, (hidden, begun, hidden[:, first:]), (lm.params["layers"], params))[1]


def train_step(
    plan: Plan, state: TrainState, lm: LM, batch: Batch, axis: str
) -> tuple[TrainState, dict]:
    """One update on this device's part of the batch, with collectives over `axis`.

    Returns:
      The new state and metrics: loss [layers], overlap [layers], grad_norm (of the mean of the
      micro-batches so far).
    """
    sums = jax.lax.psum(loss_and_grads(plan, state.params, lm, batch), axis)
    sums = jax.tree.map(lambda x: x / jnp.maximum(sums.traces[0], 1.0), sums)
    updates, opt_state = plan.optimiser.update(sums.grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": sums.loss,
        "overlap": sums.overlap,
        "grad_norm": optax.tree.norm(mean_so_far(sums.grads, state.opt_state)),
    }
    return TrainState(updates_made(state.step, opt_state), params, opt_state), metrics
