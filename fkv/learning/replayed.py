"""GRPO with several updates per batch of rollouts: their evictions are recorded, and replayed.

Every epoch replays the recorded evictions, so the states are those of the rollout, and computes
loss and gradient inside the scan over chunks, as in `fkv.learning.sft`: no state outlives its
eviction. Letters are those of `fkv.learning.grpo`.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.learning import fit, grpo, surrogate
from fkv.models import LM
from fkv.policies import Foresight, View, scorer
from fkv.policies.base import Policy


@flax.struct.dataclass
class Recorded(Policy):
    """Replays the drops of a rollout, for observers that update scorers.

    Attributes:
      slots_yebkm: the pool of `2L` slots of every layer and eviction, the dropped ones first, in
        the order of the draw.
      old_yebkl: log-probabilities of the drops when they were drawn.
      params, reference: the scorers being trained, and those they started from.
      config: of the scorers.
    """

    slots_yebkm: Array
    old_yebkl: Array
    params: dict
    reference: dict
    config: scorer.ScorerConfig = flax.struct.field(pytree_node=False)

    @property
    def statistics(self) -> str | None:
        return self.config.statistics

    def pool(self, view: View) -> Array:
        """Slots of this eviction's pool [b, k, m]."""
        return jax.lax.dynamic_index_in_dim(self.slots_yebkm, view.eviction, 0, keepdims=False)

    def evict(self, view: View) -> Array:
        return self.pool(view)[..., : view.interval]


def record(
    plan: grpo.Plan, params: dict, lm: LM, batch: Batch, random_b: Array
) -> tuple[Array, Array]:
    """Samples one eviction trace of every row, to be replayed.

    Returns:
      The pools [layers, evictions, b, k, 2L], see `Recorded`, and the losses per token [b, t - 1].
    """
    policy = Foresight(params, plan.scorer, "sample", plan.grpo.temperature)

    def observe(acc, policy, view, evict):
        # The draw takes the lowest after perturbation, so sorting gives the pool in its order.
        return acc, jax.lax.top_k(-policy.importance(view), 2 * view.interval)[1]

    key_b = jax.random.wrap_key_data(random_b)
    hidden, _, pools = replay.replay(lm, batch, policy, plan.cadence, key_b, observe)
    return pools, grpo.losses(lm, hidden[:, plan.cadence.first_evicting_token - 1 :], batch)


@flax.struct.dataclass
class Step:
    """What an update needs besides the rollouts.

    Attributes:
      first: whether the parameters are those of the rollouts: then the ratios are exactly 1, and
        `Recorded.old_yebkl` is not read.
      kl_weight: at this step.
      advantage_b: of each rollout.
    """

    first: Array
    kl_weight: Array
    advantage_b: Array


def loss_and_grads(
    plan: grpo.Plan, policy: Recorded, step: Step, lm: LM, batch: Batch
) -> tuple[grpo.Sums, Array]:
    """Loss and gradient of a batch of rollouts.

    Args:
      policy: the recorded evictions and the scorers.

    Returns:
      The sums, and the current log-probabilities of the drops [layers, evictions, b, k, l].
    """
    config = plan.grpo

    def observe(acc: grpo.Sums, policy: Recorded, view: View, evict: Array):
        weight = grpo.drop_weight(plan, batch, view)
        pool = policy.pool(view)
        pool = jnp.minimum(pool, view.budget - 1)  # after a row's end, some are in the ring
        feature = scorer.features(plan.scorer, view)
        old = jax.lax.dynamic_index_in_dim(policy.old_yebkl, view.eviction, 0, keepdims=False)

        def log_prob(params):
            importance = scorer.apply(plan.scorer, params, feature)
            score = grpo.scores(importance, view, config.temperature)
            return surrogate.log_prob(config.log_prob, score, pool), score

        reference, _ = log_prob(policy.reference)

        def objective(params):
            new, score = log_prob(params)
            before = jnp.where(step.first, jax.lax.stop_gradient(new), old)
            advantage = step.advantage_b[:, None, None]
            ratio, gain, kl = surrogate.terms(new, before, reference, advantage, config.clip)
            loss = ((step.kl_weight * kl - gain) * weight).sum()
            drawn = jnp.take_along_axis(score, pool, axis=-1)
            entropy = surrogate.first_entropy(drawn) * view.interval
            off = jnp.abs(ratio - 1)
            aux = (
                (kl * weight).sum(),
                ((off > config.clip) * weight).sum(),
                (entropy * weight[..., 0]).sum(),
                jnp.max(jnp.where(weight > 0, off, 0.0)),
            )
            return loss, (aux, new)

        (loss, (aux, new)), grads = jax.value_and_grad(objective, has_aux=True)(policy.params)
        return acc.plus(grpo.Sums(loss, *aux, grads)), new

    start = grpo.Sums.zero(jax.tree.map(lambda x: x[0], policy.params))
    _, sums, new = replay.replay(lm, batch, policy, plan.cadence, observe=observe, acc=start)
    return sums, new


def train_step(
    plan: grpo.Plan, state: grpo.TrainState, lm: LM, rows: grpo.Rollouts, axis: str
) -> tuple[grpo.TrainState, dict]:
    """`grpo.train_step` for any number of epochs; at one, it does the same in twice the time."""
    number, epochs = len(rows.full_bt), plan.grpo.epochs
    split = grpo.parts(plan, number)
    batch = jax.tree.map(split, rows.batch)
    pools, nll = jax.lax.map(
        lambda part: record(plan, state.params, lm, *part), (batch, split(rows.random_b))
    )
    advantage, metrics = grpo.outcome(plan, rows, nll.reshape(rows.full_bt.shape), axis)
    advantage, kl_weight = split(advantage), grpo.kl_weight(plan, state)

    def update(carry, epoch):
        state, old = carry

        def gradient(sums, part):
            pools, old, advantage, batch = part
            policy = Recorded(pools, old, state.params, state.reference, plan.scorer)
            step = Step(epoch == 0, kl_weight, advantage)
            more, new = loss_and_grads(plan, policy, step, lm, batch)
            # A single epoch never needs the log-probabilities of its drops again.
            return sums.plus(more), new if epochs > 1 else old

        sums, new = jax.lax.scan(
            gradient, grpo.Sums.zero(state.params), (pools, old, advantage, batch)
        )
        state, metrics = grpo.update(plan, state, sums, number, axis)
        return (state, jnp.where(epoch == 0, new, old)), metrics

    kept = pools.shape[:-1] if epochs > 1 else (*pools.shape[:2], 1, 1, 1)
    empty = jnp.zeros((*kept, plan.cadence.interval))
    (state, _), more = jax.lax.scan(update, (state, empty), jnp.arange(epochs))
    metrics |= more
    return state.replace(step=fit.updates_made(state.step, state.opt_state)), metrics
