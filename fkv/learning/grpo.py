"""The reinforcement stage: GRPO over eviction traces.

ForesightKV, arXiv 2602.03203, section 3.4. A rollout is the teacher-forced replay of a trace under
sampled evictions; its reward is the negated added loss on low-entropy tokens.

A batch of rollouts usually gives one update. Its probability ratios are exactly 1, so a rollout's
gradient is that of its log-probabilities times a number, the advantage, that is known only when all
rollouts are done. So one pass is enough: at every eviction the gradients of each row are added to
sums, which are a few megabytes a row, and no state outlives its eviction. `fkv.learning.replayed`
makes several updates. Rollouts of a trace share what comes before their first eviction.

Letters: r rollouts, t tokens, e evictions, n candidates, m a pool of `2L`, l dropped entries; the
rows of a batch are the rollouts of its traces, those of a trace adjacent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.engine import beginnings, replay
from fkv.engine.batch import Batch
from fkv.engine.beginnings import Begun
from fkv.errors import UserError
from fkv.kinds import setting
from fkv.learning import fit, surrogate, tokens
from fkv.models import LM, numerics
from fkv.policies import Foresight, View, scorer
from fkv.policies.base import Policy

REWARDS = ("all", "low", "high", "low_large", "low_large_squared")


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
    log_prob: str = setting(kinds.one_of(surrogate.LOG_PROBS), "plackett_luce")
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
        self.cadence.check_protected(2)  # the pool of a draw
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


# ---- rewards


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


def outcome(plan: Plan, rows: Rollouts, nll_bt: Array, axis: str) -> tuple[Array, dict]:
    """The advantage of each of this device's rollouts [b], and metrics of losses and rewards.

    Args:
      nll_bt: their losses per token, under eviction.
    """
    grpo = plan.grpo
    counted = rows.batch.counted_bt(plan.cadence.first_evicting_token)
    reward = rollout_reward(grpo, nll_bt, rows.full_bt, rows.entropy_bt, counted)
    # A group may span several devices.
    everyone = jax.lax.all_gather(reward, axis, tiled=True).reshape(-1, grpo.rollouts)
    advantage = jax.vmap(surrogate.advantages)(everyone).reshape(-1)
    own = jax.lax.axis_index(axis) * len(reward)
    advantage = jax.lax.dynamic_slice_in_dim(advantage, own, len(reward))

    metrics = {}
    low = tokens.low_entropy(rows.entropy_bt, counted, grpo.high_fraction)
    total = lambda x, mask: jax.lax.psum(jnp.where(mask, x, 0.0).sum(), axis)  # noqa: E731
    for name, mask in (("low", low), ("high", counted & ~low)):
        metrics[f"evicted_{name}"] = total(nll_bt, mask)
        metrics[f"full_{name}"] = total(rows.full_bt, mask)
        metrics[f"tokens_{name}"] = total(jnp.ones_like(nll_bt), mask)
    spread = everyone.std(-1)
    metrics["reward"] = everyone.mean()
    metrics["reward_spread"] = spread.mean()
    metrics["groups_without_spread"] = (spread == 0).mean()
    return advantage, metrics


# ---- a step


@flax.struct.dataclass
class Sums:
    """Sums over the rows of a batch, per layer, of means over the drops of a row.

    Attributes:
      loss, kl, clipped, entropy: of the policy loss, the KL estimate, whether the ratio was
        clipped, and the entropy of the first draw.
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
        zero = jnp.zeros(params["b2"].shape[:-1])
        return cls(zero, zero, zero, zero, zero, jax.tree.map(jnp.zeros_like, params))

    def plus(self, other: "Sums") -> "Sums":
        """Both together."""
        total = jax.tree.map(jnp.add, self, other)
        return total.replace(ratio=jnp.maximum(self.ratio, other.ratio))


def train_step(
    plan: Plan, state: TrainState, lm: LM, rows: Rollouts, axis: str
) -> tuple[TrainState, dict]:
    """Rollouts and updates on this device's rows, with collectives over `axis`.

    With one epoch the ratios are exactly 1, so the gradient is that of the log-probabilities, which
    rollouts gather, times the advantages. More epochs take `replayed.train_step`.

    Returns:
      The new state and metrics. Means over the batch: reward, its spread within groups, the share
      of groups without spread, and per epoch [epochs] the loss, KL, clip fraction, entropy,
      largest deviation of a ratio and norm of the gradient (the mean of the micro-batches so far).
      Sums over the batch, for low- and high-entropy tokens: the loss under eviction and with the
      full cache, and their number.
    """
    if plan.grpo.epochs > 1:
        raise ValueError("several epochs replay their rollouts: use replayed.train_step")
    split = parts(plan, len(rows.full_bt))
    policy = Foresight(state.params, plan.scorer, "sample", plan.grpo.temperature)
    roll = functools.partial(rollout, plan, Actor(policy, state.reference), lm)
    batch = jax.tree.map(split, rows.batch)
    nll, found = in_parts(plan, lm, policy, roll, (batch, split(rows.random_b)))
    nll = nll.reshape(rows.full_bt.shape)
    advantage, metrics = outcome(plan, rows, nll, axis)
    sums = _weighted(
        plan, found, split(advantage), split(rows.batch.length_b), kl_weight(plan, state)
    )
    state, more = update(plan, state, sums, len(nll), axis)
    metrics |= jax.tree.map(lambda x: x[None], more)
    return state.replace(step=fit.updates_made(state.step, state.opt_state)), metrics


def parts(plan: Plan, rows: int) -> Callable[[Array], Array]:
    """Splits arrays of a device's rows into micro-batches, [b, ...] -> [parts, b, ...]."""
    at_once = plan.grpo.rollouts_at_once or rows
    if rows % at_once:
        raise UserError(
            f"grpo.rollouts_at_once = {at_once} must divide the {rows} rollouts of a device"
        )
    return lambda x: x.reshape(rows // at_once, at_once, *x.shape[1:])


def in_parts(plan: Plan, lm: LM, policy: Policy, act: Callable, arrays_p: tuple) -> Any:
    """Results of `act` for each micro-batch, [parts, ...]; its rows share their beginnings.

    Args:
      policy: of the capacity and statistics of the replays.
      act: of the beginnings of a micro-batch's traces, and of its part of `arrays_p`.
      arrays_p: a `Batch` of rows, and more pytrees, split as by `parts`.
    """
    number, at_once = arrays_p[0].token_bt.shape[:2]
    # This many adjacent rows are of one trace, on any device.
    run = math.gcd(number * at_once, plan.grpo.rollouts)
    if run % at_once:
        run = math.gcd(run, at_once)
    inner = max(run // at_once, 1)  # micro-batches that begin together

    def together(arrays):
        traces = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[::run], arrays[0])
        begun = beginnings.begin(lm, traces, policy, plan.cadence)
        return jax.lax.map(lambda part: act(begun, *part), arrays)

    split = lambda x: x.reshape(number // inner, inner, *x.shape[1:])  # noqa: E731
    found = jax.lax.map(together, jax.tree.map(split, arrays_p))
    return jax.tree.map(lambda x: x.reshape(number, *x.shape[2:]), found)


def kl_weight(plan: Plan, state: TrainState) -> Array:
    """Weight of the KL at the step of this state."""
    return jnp.where(state.step < plan.grpo.kl_steps, plan.grpo.kl_weight, 0.0)


def drop_weight(plan: Plan, batch: Batch, view: View) -> Array:
    """Weight of each drop of an eviction in the mean over its row's drops [b, 1, 1].

    Evictions that no token of the row attends after do not count.
    """
    interval = view.interval
    evictions = (batch.length_b - 1) // interval - plan.cadence.fill_chunks
    drops = jnp.maximum(evictions, 1) * view.config.kv_heads * interval
    live = batch.length_b > (view.chunk + 1) * interval
    return jnp.where(live, 1 / drops, 0.0)[:, None, None]


def scores(importance_bkn: Array, view: View, temperature: float) -> Array:
    """Eviction scores [b, k, n] that evictions are drawn by; those protected are never drawn."""
    score = -importance_bkn / temperature
    if view.protect_prompt:
        # Finite, as what has no weight may be infinitely unlikely, too.
        score = jnp.where(view.candidate_bkn, score, numerics.MASKED)
    return score


def losses(lm: LM, hidden: Array, batch: Batch) -> Array:
    """Losses per token under eviction [b, t - 1], from the hidden states of the last tokens.

    They are zero for earlier tokens, which no eviction changes.
    """
    before = batch.token_bt.shape[1] - hidden.shape[1]
    found = tokens.token_losses(lm, hidden, batch.token_bt[:, before:])
    return jnp.pad(found.nll_bt, ((0, 0), (before, 0)))


def update(
    plan: Plan, state: TrainState, sums: Sums, rows: int, axis: str
) -> tuple[TrainState, dict]:
    """The state after an update by this device's sums over its rows, and its metrics."""
    off = jax.lax.pmax(sums.ratio, axis)
    # A shift of all scores changes no probability: its computed gradient is rounding error.
    sums = sums.replace(grads={**sums.grads, "b2": jnp.zeros_like(sums.grads["b2"])})
    sums = jax.tree.map(lambda x: x / rows, jax.lax.pmean(sums, axis))
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
    return state.replace(params=params, opt_state=opt_state), metrics


# ---- one epoch, in one pass


@flax.struct.dataclass
class Actor(Policy):
    """Samples evictions by scorers that are compared with those they started from.

    Attributes:
      policy: what samples.
      reference: scorer parameters.
    """

    policy: Foresight
    reference: dict

    statistics = property(lambda self: self.policy.statistics)

    def evict(self, view: View) -> Array:
        return self.policy.evict(view)


@flax.struct.dataclass
class Gathered:
    """What a rollout leaves of each layer, until its advantage is known.

    Attributes:
      kl, entropy: as in `Sums`.
      kl_grads: gradient of `kl` in the layer's scorer parameters.
      grads_b: gradient of the mean log-probability of each row's drops, [b, ...].
    """

    kl: Array
    entropy: Array
    kl_grads: dict
    grads_b: dict


def gather(plan: Plan, actor: Actor, view: View, weight_b11: Array) -> tuple[Array, Gathered]:
    """The draw of an eviction, and what it adds to the sums of its layer.

    Features are read once: scores, draw and gradients come from one linearisation of the scorers.

    Args:
      weight_b11: of each drop.

    Returns:
      The pool of `2L` slots [b, k, m], the `L` dropped ones first, in the order of the draw.
    """
    feature = scorer.features(plan.scorer, view)

    def apply(params_b):
        one = lambda params, x: scorer.apply(plan.scorer, params, x[None])[0]  # noqa: E731
        return jax.vmap(one)(params_b, feature)

    def log_prob(importance):
        score = scores(importance, view, plan.grpo.temperature)
        return surrogate.log_prob(plan.grpo.log_prob, score, index)

    # Parameters of its own for each row: so the gradients are those of rows.
    params_b = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (len(feature), *x.shape)), actor.policy.params
    )
    importance, to_params = jax.vjp(apply, params_b)
    pool = actor.policy.pool(importance, view)
    index = jnp.minimum(pool, view.budget - 1)  # pools of evictions without weight may go beyond
    reference = log_prob(scorer.apply(plan.scorer, actor.reference, feature))
    new, to_importance = jax.vjp(log_prob, importance)
    kl, to_new = jax.vjp(lambda new: surrogate.kl_estimate(new, reference), new)
    weight = jnp.broadcast_to(weight_b11, new.shape)
    both = jnp.stack([weight, *to_new(weight)])
    grads = jax.vmap(lambda x: to_params(*to_importance(x))[0])(both)
    score = scores(importance, view, plan.grpo.temperature)
    drawn = jnp.take_along_axis(score, index, axis=-1)
    entropy = surrogate.first_entropy(drawn) * weight.sum(-1)
    return pool, Gathered(
        (kl * weight).sum(),
        entropy.sum(),
        jax.tree.map(lambda x: x[1].sum(0), grads),
        jax.tree.map(lambda x: x[0], grads),
    )


def rollout(
    plan: Plan, actor: Actor, lm: LM, begun: Begun, batch: Batch, random_b: Array
) -> tuple[Array, Gathered]:
    """Samples one eviction trace of every row.

    Args:
      begun: the beginnings of the traces.

    Returns:
      The losses per token [b, t - 1], and what is gathered [layers, ...].
    """

    def act(acc, actor, view):
        pool, more = gather(plan, actor, view, drop_weight(plan, batch, view))
        return jax.tree.map(jnp.add, acc, more), pool[..., : view.interval], ()

    one = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), actor.policy.params)
    per_row = jax.tree.map(lambda x: jnp.zeros((len(batch.token_bt), *x.shape)), one)
    start = Gathered(jnp.zeros(()), jnp.zeros(()), one, per_row)
    key_b = jax.random.wrap_key_data(random_b)
    chooser = replay.Chooser(act)
    hidden, found, _ = beginnings.replay_from(lm, batch, begun, actor, key_b, chooser, start)
    return losses(lm, hidden, batch), found


def _weighted(
    plan: Plan, found: Gathered, advantage_pb: Array, length_pb: Array, kl_weight: Array
) -> Sums:
    """The sums over rows, from what their micro-batches have gathered [parts, layers, ...]."""
    kl, entropy, kl_grads = (
        jax.tree.map(lambda x: x.sum(0), x) for x in (found.kl, found.entropy, found.kl_grads)
    )
    # The weights of a row's drops add up to one, if it has any.
    drops = (length_pb - 1) // plan.cadence.interval > plan.cadence.fill_chunks
    loss = kl_weight * kl - jnp.where(drops, advantage_pb, 0.0).sum()

    def weigh(kl, grads_pyb):
        rows = advantage_pb.reshape(len(grads_pyb), 1, -1, *[1] * (grads_pyb.ndim - 3))
        return kl_weight * kl - (rows * grads_pyb).sum((0, 2))

    zero = jnp.zeros_like(kl)
    return Sums(loss, kl, zero, entropy, zero, jax.tree.map(weigh, kl_grads, found.grads_b))
