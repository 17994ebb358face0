"""The reinforcement stage: GRPO over eviction traces.

ForesightKV, arXiv 2602.03203, section 3.4. A rollout is the teacher-forced replay of a trace under
sampled evictions; its reward is the negated added loss on low-entropy tokens. The update replays
the recorded evictions, so the states are those of the rollout, and computes loss and gradient
inside the scan over chunks, as in `fkv.learning.sft`: no state outlives its eviction.

Letters: r rollouts, t tokens, e chunks, n candidates, l dropped entries; the rows of a batch are
the rollouts of its traces, those of a trace adjacent.
"""

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.errors import UserError
from fkv.kinds import setting
from fkv.learning import fit, tokens
from fkv.models import LM
from fkv.policies import Foresight, View, scorer
from fkv.policies.base import Policy

REWARDS = ("all", "low", "high", "low_large", "low_large_squared")
LOG_PROBS = ("plackett_luce", "independent")


@dataclasses.dataclass(frozen=True)
class GRPOConfig(tokens.Split):
    """Rollouts, rewards and the loss.

    Attributes:
      rollouts: per trace.
      epochs: updates per batch of rollouts.
      temperature: of sampling from the pool of `2L`.
      reward: the penalty: the added loss on `all`, `low`- or `high`-entropy tokens, on low-entropy
        tokens where it exceeds `eta` (`low_large`), or its square there (the paper's choice).
      eta: nats.
      clip: of the probability ratio.
      kl_weight, kl_steps: weight of the KL to the supervised scorer, for the first `kl_steps`.
      log_prob: `plackett_luce`, which is exact, or `independent`, as in the released code.
      rollouts_at_once: micro-batch of a device's rollouts; 0 for all.
    """

    rollouts: int = setting(kinds.whole(2), 32)  # advantages need two
    epochs: int = setting(kinds.whole(1), 1)
    temperature: float = setting(kinds.POSITIVE, 1.0)
    reward: str = setting(kinds.one_of(REWARDS), "low_large_squared")
    eta: float = setting(kinds.number(0), 1.5)
    clip: float = setting(kinds.POSITIVE, 0.2)
    kl_weight: float = setting(kinds.number(0), 0.05)
    kl_steps: int = setting(kinds.whole(0), 100)
    log_prob: str = setting(kinds.one_of(LOG_PROBS), "plackett_luce")
    rollouts_at_once: int = setting(kinds.whole(0), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(fit.Fit):
    """The reinforcement stage.

    Attributes:
      traces: per step, `traces_at_once` (0: all) per micro-batch.
      learning_rate, warmup: of Adam: linear warm-up, then constant.
      clip_norm: of the gradient's global norm.
      cadence: of evictions.
      scorer: what is trained.
      grpo: rollouts, rewards and the loss.
      micro_batches: per step, see `fit.adam`.
    """

    group: ClassVar[str] = "grpo"
    steps: int = setting(kinds.whole(1))
    traces: int = setting(kinds.whole(1))
    traces_at_once: int = setting(kinds.whole(0))
    learning_rate: float = setting(kinds.POSITIVE)
    warmup: int = setting(kinds.whole(0))
    clip_norm: float = setting(kinds.POSITIVE)
    cadence: Cadence
    scorer: scorer.ScorerConfig
    grpo: GRPOConfig
    micro_batches: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batches > 1 and self.grpo.epochs > 1:
            raise UserError("grpo.epochs must be 1 with micro-batches of traces (traces_at_once)")

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam after clipping."""
        schedule = optax.linear_schedule(
            self.learning_rate / (self.warmup + 1), self.learning_rate, self.warmup
        )
        return fit.adam(schedule, self.clip_norm, self.micro_batches)


@flax.struct.dataclass
class TrainState(fit.TrainState):
    """Everything a training step changes, and the scorers it started from.

    A checkpoint holds these, too, so that resuming does not need the supervised run.
    """

    reference: dict


@flax.struct.dataclass
class Rollouts:
    """The rows of a step: every trace repeated `rollouts` times, adjacently.

    Attributes:
      batch: the traces.
      full_bt, entropy_bt: full-cache losses and entropies per token, [b, t - 1].
      random_b: raw data of one PRNG key per row.
    """

    batch: Batch
    full_bt: Array
    entropy_bt: Array
    random_b: Array


def advantages(reward_r: Array) -> Array:
    """Rewards of a group, centred and divided by their (population) standard deviation."""
    # Relative to the first, so that equal rewards give exact zeros, not amplified rounding errors.
    reward_r = reward_r - reward_r[:1]
    return (reward_r - reward_r.mean()) / (reward_r.std() + 1e-8)


def independent_log_prob(score_xn: Array, index_xl: Array) -> Array:
    """Log-probability of each drop under an independent softmax over all candidates.

    Args:
      score_xn: eviction scores, higher is dropped.
      index_xl: dropped candidates.
    """
    return jnp.take_along_axis(jax.nn.log_softmax(score_xn, axis=-1), index_xl, axis=-1)


def terms(
    new_x: Array, old_x: Array, reference_x: Array, advantage_x: Array, clip: float
) -> tuple[Array, Array, Array]:
    """Probability ratio, PPO-clip surrogate, and k3 estimate of the KL to the reference policy
    (nats) for each dropped entry, [x] each.

    Args:
      new_x, old_x, reference_x: log-probabilities.
      advantage_x: advantages, broadcast to them.
    """
    ratio = jnp.exp(jnp.clip(new_x - old_x, -10, 10))
    surrogate = jnp.minimum(ratio * advantage_x, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage_x)
    log_ratio = jnp.clip(reference_x - new_x, -10, 10)
    return ratio, surrogate, jnp.exp(log_ratio) - log_ratio - 1


def plackett_luce_log_prob(score_xm: Array, draws: int) -> Array:
    """Log-probability of each of the first `draws` entries, drawn in order without replacement.

    Args:
      score_xm: eviction scores of the pool: those drawn, in order, then the rest.
    """
    left = jax.lax.cumlogsumexp(score_xm, axis=score_xm.ndim - 1, reverse=True)
    return (score_xm - left)[..., :draws]


# ---- rollouts


def rollout_reward(
    config: GRPOConfig, evicted_bt: Array, full_bt: Array, entropy_bt: Array, counted_bt: Array
) -> Array:
    """Reward of each rollout [b].

    Args:
      evicted_bt, full_bt: losses per token with and without eviction, nats.
      entropy_bt: full-cache entropies.
      counted_bt: which tokens count: generated, and after an eviction.
    """
    low = tokens.low_entropy(entropy_bt, counted_bt, config.high_fraction)
    excess = evicted_bt - full_bt
    over = {"all": counted_bt, "high": counted_bt & ~low}.get(config.reward, low)
    if config.reward.startswith("low_large"):
        power = 2 if config.reward.endswith("squared") else 1
        excess = jnp.where(excess > config.eta, excess**power, 0.0)
    return -jnp.where(over, excess, 0.0).sum(-1) / jnp.maximum(over.sum(-1), 1)


@flax.struct.dataclass
class Recorded(Policy):
    """Replays the drops of a rollout, for observers that update scorers.

    Attributes:
      slots_yebkm: the pool of `2L` slots of every layer and chunk, the dropped ones first, in the
        order of the draw.
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
        """Slots of this chunk's pool [b, k, m]."""
        return jax.lax.dynamic_index_in_dim(self.slots_yebkm, view.chunk, axis=0, keepdims=False)

    def evict(self, view: View) -> Array:
        return self.pool(view)[..., : view.interval]


def rollout(plan: Plan, params: dict, lm: LM, batch: Batch, key_b: Array) -> tuple[Array, Array]:
    """Samples one eviction trace of every row.

    Returns:
      The pools [layers, chunks, b, k, 2L], see `Recorded`, and the losses per token [b, t - 1].
    """
    policy = Foresight(params, plan.scorer, "sample", plan.grpo.temperature)

    def observe(acc, policy, view, evict):
        # The draw takes the lowest after perturbation, so sorting gives the pool in its order.
        return acc, jax.lax.top_k(-policy.importance(view), 2 * view.interval)[1]

    hidden, _, pools = replay.replay(lm, batch, policy, plan.cadence, key_b, observe)
    return pools, tokens.token_losses(lm, hidden, batch.token_bt).nll_bt


# ---- update


@flax.struct.dataclass
class Sums:
    """Sums over the replay of a batch, per layer, of means over the drops of a row.

    Attributes:
      loss, kl, clipped, entropy: of the policy loss, the KL estimate, whether the ratio was
        clipped, and the entropy of the first draw; summed over rows.
      ratio: largest deviation of a ratio from 1.
      grads: gradient of `loss` in the layer's scorer parameters.
    """

    loss: Array
    kl: Array
    clipped: Array
    entropy: Array
    ratio: Array
    grads: dict

    @classmethod
    def zero(cls, params: dict) -> "Sums":
        """Zeros, for scorers of such parameters (of all layers or of one)."""
        lead = params["b2"].shape[:-1]
        zero = jnp.zeros(lead)
        return cls(zero, zero, zero, zero, zero, jax.tree.map(jnp.zeros_like, params))

    def plus(self, other: "Sums") -> "Sums":
        """Both together."""
        total = jax.tree.map(jnp.add, self, other)
        return total.replace(ratio=jnp.maximum(self.ratio, other.ratio))


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
    plan: Plan, policy: Recorded, step: Step, lm: LM, batch: Batch
) -> tuple[Sums, Array]:
    """Loss and gradient of a batch of rollouts.

    Args:
      policy: the recorded evictions and the scorers.

    Returns:
      The sums, and the current log-probabilities of the drops [layers, chunks, b, k, l].
    """
    cadence, grpo = plan.cadence, plan.grpo
    interval = cadence.interval
    events = jnp.maximum((batch.length_b - 1) // interval - cadence.fill_chunks, 1)

    def observe(acc: Sums, policy: Recorded, view: View, evict: Array):
        live = (view.eviction >= 0) & (batch.length_b > (view.chunk + 1) * interval)
        weight = jnp.where(live, 1 / (events * lm.config.kv_heads * interval), 0.0)[:, None, None]
        pool = policy.pool(view)
        pool = jnp.minimum(pool, view.budget - 1)  # ignored while the cache fills
        feature = scorer.features(plan.scorer, view)
        old = jax.lax.dynamic_index_in_dim(policy.old_yebkl, view.chunk, axis=0, keepdims=False)

        def log_probs(params):
            score = -scorer.apply(plan.scorer, params, feature) / grpo.temperature
            drawn = jnp.take_along_axis(score, pool, axis=-1)
            if grpo.log_prob == "independent":
                return independent_log_prob(score, pool[..., :interval]), drawn
            return plackett_luce_log_prob(drawn, interval), drawn

        reference, _ = log_probs(policy.reference)

        def objective(params):
            new, drawn = log_probs(params)
            before = jnp.where(step.first, jax.lax.stop_gradient(new), old)
            advantage = step.advantage_b[:, None, None]
            ratio, surrogate, kl = terms(new, before, reference, advantage, grpo.clip)
            loss = ((step.kl_weight * kl - surrogate) * weight).sum()
            p = jax.nn.softmax(drawn, axis=-1)
            entropy = -(p * jax.nn.log_softmax(drawn, axis=-1)).sum(-1) * interval
            off = jnp.abs(ratio - 1)
            aux = (
                (kl * weight).sum(),
                ((off > grpo.clip) * weight).sum(),
                (entropy * weight[..., 0]).sum(),
                jnp.max(jnp.where(weight > 0, off, 0.0)),
            )
            return loss, (aux, new)

        (loss, (aux, new)), grads = jax.value_and_grad(objective, has_aux=True)(policy.params)
        return acc.plus(Sums(loss, *aux, grads)), new

    start = Sums.zero(jax.tree.map(lambda x: x[0], policy.params))
    _, sums, new = replay.replay(lm, batch, policy, cadence, observe=observe, acc=start)
    # A shift of all scores changes no probability: its computed gradient is rounding error.
    grads = {**sums.grads, "b2": jnp.zeros_like(sums.grads["b2"])}
    return sums.replace(grads=grads), new


def train_step(
    plan: Plan, state: TrainState, lm: LM, rows: Rollouts, axis: str
) -> tuple[TrainState, dict]:
    """Rollouts and updates on this device's rows, with collectives over `axis`.

    Returns:
      The new state and metrics. Means over the batch: reward, its spread within groups, the share
      of groups without spread, and per epoch [epochs] the loss, KL, clip fraction, entropy,
      largest deviation of a ratio and norm of the gradient (the mean of the micro-batches so far).
      Sums over the batch, for low- and high-entropy tokens: the loss under eviction and with the
      full cache, and their number.
    """
    grpo, number = plan.grpo, len(rows.full_bt)
    at_once = grpo.rollouts_at_once or number
    if number % at_once:
        raise UserError(
            f"grpo.rollouts_at_once = {at_once} must divide the {number} rollouts of a device"
        )

    def split(x):
        return x.reshape(number // at_once, at_once, *x.shape[1:])

    def roll(part):
        batch, random = part
        return rollout(plan, state.params, lm, batch, jax.vmap(jax.random.wrap_key_data)(random))

    batch = jax.tree.map(split, rows.batch)
    pools, nll = jax.lax.map(roll, (batch, split(rows.random_b)))
    nll = nll.reshape(rows.full_bt.shape)
    counted = rows.batch.counted_bt(plan.cadence.first_evicting_token)
    reward = rollout_reward(grpo, nll, rows.full_bt, rows.entropy_bt, counted)
    # A group may span several devices.
    everyone = jax.lax.all_gather(reward, axis, tiled=True).reshape(-1, grpo.rollouts)
    advantage = jax.vmap(advantages)(everyone).reshape(-1)
    own = jax.lax.axis_index(axis) * number
    advantage = split(jax.lax.dynamic_slice_in_dim(advantage, own, number))
    kl_weight = jnp.where(state.step < grpo.kl_steps, grpo.kl_weight, 0.0)

    def update(carry, epoch):
        state, old = carry

        def gradient(sums, part):
            pools, old, advantage, batch = part
            policy = Recorded(pools, old, state.params, state.reference, plan.scorer)
            step = Step(epoch == 0, kl_weight, advantage)
            more, new = loss_and_grads(plan, policy, step, lm, batch)
            # A single epoch never needs the log-probabilities of its drops again.
            return sums.plus(more), new if grpo.epochs > 1 else old

        sums, new = jax.lax.scan(gradient, Sums.zero(state.params), (pools, old, advantage, batch))
        off = jax.lax.pmax(sums.ratio, axis)
        sums = jax.tree.map(lambda x: x / number, jax.lax.pmean(sums, axis))
        updates, opt_state = plan.optimiser.update(sums.grads, state.opt_state, state.params)
        metrics = {
            "loss": sums.loss.sum(),
            "kl": sums.kl.mean(),
            "clip_fraction": sums.clipped.mean(),
            "entropy": sums.entropy.mean(),
            "ratio_off": off.max(),
            "grad_norm": optax.tree.norm(fit.mean_so_far(sums.grads, state.opt_state)),
        }
        params = optax.apply_updates(state.params, updates)
        old = jnp.where(epoch == 0, new, old)
        return (state.replace(params=params, opt_state=opt_state), old), metrics

    kept = pools.shape[:-1] if grpo.epochs > 1 else (*pools.shape[:2], 1, 1, 1)
    empty = jnp.zeros((*kept, plan.cadence.interval))
    (state, _), metrics = jax.lax.scan(update, (state, empty), jnp.arange(grpo.epochs))

    low = tokens.low_entropy(rows.entropy_bt, counted, grpo.high_fraction)
    total = lambda x, mask: jax.lax.psum(jnp.where(mask, x, 0.0).sum(), axis)  # noqa: E731
    for name, mask in (("low", low), ("high", counted & ~low)):
        metrics[f"evicted_{name}"] = total(nll, mask)
        metrics[f"full_{name}"] = total(rows.full_bt, mask)
        metrics[f"tokens_{name}"] = total(jnp.ones_like(nll), mask)
    spread = everyone.std(-1)
    metrics["reward"] = everyone.mean()
    metrics["reward_spread"] = spread.mean()
    metrics["groups_without_spread"] = (spread == 0).mean()
    return state.replace(step=fit.updates_made(state.step, state.opt_state)), metrics
