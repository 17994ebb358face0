"""The supervised stage: scorers learn the golden order by pairwise ranking.

ForesightKV, arXiv 2602.03203, section 3.3. The language model is frozen and the features carry no
gradient, so the loss is a sum of independent terms, one an eviction: its value and gradient are
taken inside the scan over chunks and added up. Golden labels never leave their layer: one scan
over layers carries the hidden states of the full pass and of the evicted pass side by side.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from fkv import kinds, models
from fkv.engine import replay
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.learning import golden
from fkv.models import ModelConfig
from fkv.policies import Forced, View, scorer

WEIGHTINGS = ("plain", "sqrt_gap")
SETTINGS = {"margin": kinds.number(0), "weighting": kinds.one_of(WEIGHTINGS)}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The ranking loss.

    Attributes:
      margin: of the hinge, in units of the score.
      weighting: `plain` as in the paper, or `sqrt_gap`: pairs are weighted by the square root of
        the gap between their future scores.
    """

    margin: float = 0.01
    weighting: str = "plain"

    def __post_init__(self):
        kinds.check_fields("sft.", self, **SETTINGS)


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
    """What one pass over a batch adds up, per layer.

    Attributes:
      traces: traces long enough to count.
      loss: ranking loss, mean over the evictions and heads of a trace, summed over traces.
      overlap: share of the golden `L` among the scorer's top `L`, likewise.
      grads: gradient of `loss` in the layer's scorer parameters.
    """

    traces: Array
    loss: Array
    overlap: Array
    grads: dict


def loss_and_grads(
    config: ModelConfig,
    scorer_config: scorer.ScorerConfig,
    loss_config: LossConfig,
    model_params: models.Params,
    scorer_params: dict,
    token_bt: Array,
    length_b: Array,
    budget: int,
    interval: int,
) -> Sums:
    """Ranking loss, overlap and gradient of a batch of traces, [layers] and [layers, ...].

    Rows too short to have an eviction followed by a token count for nothing.
    """
    replay.check_lengths([token_bt.shape[1]], budget, interval)
    position = replay.row_positions(token_bt, length_b)
    first = budget // interval
    # Golden evictions draw nothing.
    random_b = replay.row_keys(key_of(0, Purpose.REPLAY), token_bt.shape[0])
    counted = (length_b > budget + interval).astype(jnp.float32).sum()

    def layer(hiddens, inputs):
        weights, params = inputs
        full, evicted = hiddens
        full, labels = golden.layer_labels(config, weights, full, position, budget, interval)
        policy = Forced(labels.evict_position_ebkl, scorer_config.statistics)

        # Weights of each eviction's groups, known from the labels: a mean over the trace's groups.
        pairs = has_pair(labels.future_score_ebkn) & labels.valid_eb[..., None]
        loss_weight = pairs / jnp.maximum(pairs.sum((0, 2), keepdims=True), 1)
        valid = jnp.broadcast_to(labels.valid_eb[..., None], pairs.shape)
        overlap_weight = valid / jnp.maximum(valid.sum((0, 2), keepdims=True), 1)

        def observe(acc: Sums, policy: Forced, view: View, evict: Array):
            event = jnp.clip(view.chunk - first, 0, len(labels.valid_eb) - 1)
            live = (view.chunk >= first) & (view.chunk - first < len(labels.valid_eb))
            pick = lambda x: jnp.where(live, x[event], 0)  # noqa: E731
            future = labels.future_score_ebkn[event]
            feature = scorer.features(scorer_config, view)

            def objective(params):
                importance = scorer.apply(scorer_config, params, feature)
                loss, _ = ranking_loss(importance, future, loss_config)
                return (loss * pick(loss_weight)).sum(), importance

            (loss, importance), grads = jax.value_and_grad(objective, has_aux=True)(params)
            # The loss does not change when all scores of a head shift; the rounding noise that is
            # computed for that shift would be blown up by Adam.
            grads = {**grads, "b2": jnp.zeros_like(grads["b2"])}
            chosen = jax.lax.top_k(-importance, interval)[1]
            agree = (chosen[..., :, None] == evict[..., None, :]).any(-1).mean(-1)
            overlap = (agree * pick(overlap_weight)).sum()
            return jax.tree.map(jnp.add, acc, Sums(0.0, loss, overlap, grads)), ()

        zero = Sums(counted, jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        q, k, v = models.project(config, weights, evicted, position)
        out, _, sums, _ = replay.layer_pass(
            config,
            policy,
            0,  # golden evictions draw nothing and share evenly
            q,
            k,
            v,
            position,
            random_b,
            budget,
            interval,
            observe,
            zero,
        )
        return (full, models.finish(config, weights, evicted, out)), sums

    hidden = models.embed(model_params, token_bt)
    inputs = (model_params["layers"], scorer_params)
    return jax.lax.scan(layer, (hidden, hidden), inputs)[1]


@flax.struct.dataclass
class TrainState:
    """Everything a training step changes.

    Attributes:
      step: updates made, int32.
      params: scorer parameters of all layers, stacked.
      opt_state: the optimiser's.
    """

    step: Array
    params: dict
    opt_state: optax.OptState


def optimizer(
    learning_rate: float, warmup: int, steps: int, clip: float
) -> optax.GradientTransformation:
    """Adam after clipping by global norm; linear warm-up, then cosine to zero at `steps`."""
    if not 0 <= warmup < steps:
        raise UserError(
            f"sft.warmup = {warmup} must be less than sft.steps = {steps}, and not negative"
        )
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))


def accumulated(
    optimiser: optax.GradientTransformation, parts: int
) -> optax.GradientTransformation:
    """Updates once in `parts` calls, by the mean of their gradients; clipping sees the mean."""
    if parts == 1:
        return optimiser
    return optax.MultiSteps(optimiser, parts).gradient_transformation()


def mean_so_far(grads: dict, opt_state: optax.OptState) -> dict:
    """The mean of these gradients and those of the parts of a step before them.

    Args:
      opt_state: before `grads` came; with the last part of a step this is what clipping sees.
    """
    if not isinstance(opt_state, optax.MultiStepsState):
        return grads
    share = 1 / (opt_state.mini_step + 1)
    return jax.tree.map(lambda old, new: old + (new - old) * share, opt_state.acc_grads, grads)


def updates_made(step: Array, opt_state: optax.OptState) -> Array:
    """Updates after a call that had made `step` of them before."""
    if isinstance(opt_state, optax.MultiStepsState):
        return opt_state.gradient_step
    return step + 1


def init_state(params: dict, optimiser: optax.GradientTransformation) -> TrainState:
    """A training state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimiser.init(params))


def train_step(
    config: ModelConfig,
    scorer_config: scorer.ScorerConfig,
    loss_config: LossConfig,
    optimiser: optax.GradientTransformation,
    budget: int,
    interval: int,
    axis: str,
    state: TrainState,
    model_params: models.Params,
    token_bt: Array,
    length_b: Array,
) -> tuple[TrainState, dict]:
    """One update on this device's part of the batch; speaks to the others over `axis`.

    Returns:
      The new state and metrics: loss [layers], overlap [layers], grad_norm (of the mean of the
      parts so far, see `accumulated`).
    """
    sums = loss_and_grads(
        config,
        scorer_config,
        loss_config,
        model_params,
        state.params,
        token_bt,
        length_b,
        budget,
        interval,
    )
    sums = jax.lax.psum(sums, axis)
    sums = jax.tree.map(lambda x: x / jnp.maximum(sums.traces[0], 1.0), sums)
    updates, opt_state = optimiser.update(sums.grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": sums.loss,
        "overlap": sums.overlap,
        "grad_norm": optax.tree.norm(mean_so_far(sums.grads, state.opt_state)),
    }
    return TrainState(updates_made(state.step, opt_state), params, opt_state), metrics
