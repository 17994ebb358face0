"""The supervised stage: scorers learn the golden order by pairwise ranking.

ForesightKV, arXiv 2602.03203, section 3.3. The language model is frozen and the features carry no
gradient, so the loss is a sum of independent terms, one per eviction: value and gradient are
computed inside the scan over chunks and summed. Golden labels never leave their layer: one scan
over layers carries the hidden states of both the full and the evicted pass, which are the same up
to the first eviction.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
from fkv.policies import Forced, Foresight, View, scorer

WEIGHTINGS = ("plain", "sqrt_gap")
UPDATES = ("batch", "eviction")
STATES = ("golden", "own", "mixed")


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
      updates: one a `batch`, as in the paper, or one an `eviction`: every layer's scorers are
        updated at each, on the way, and `clip` is of the layer's norm.
      states: the caches that scorers see: those of `golden` evictions, as in the paper, or their
        `own`, or `mixed`: for about half of the traces, always the same ones, their own.
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
    updates: str = setting(kinds.one_of(UPDATES), "batch")
    states: str = setting(kinds.one_of(STATES), "golden")
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
        if self.updates == "eviction" and self.micro_batches > 1:
            raise UserError(
                f"sft.at_once = {self.at_once}: with sft.updates = 'eviction' micro-batches would "
                "be batches of their own: set sft.batch lower, and sft.at_once to 0"
            )

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate of a step."""
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup, self.steps)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam after clipping; with updates at evictions, of one layer, without learning rate."""
        if self.updates == "batch":
            return adam(self.schedule, self.clip, self.micro_batches)
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.scale_by_adam())

    def start(self, params: dict) -> TrainState:
        """The state of new scorers."""
        state = TrainState.init(params, self.optimiser)
        if self.updates == "batch":
            return state
        return state.replace(opt_state=jax.vmap(self.optimiser.init)(params))


def pair_weights(
    future_xn: Array, weighting: str, candidate_xn: Array | None = None
) -> tuple[Array, Array]:
    """Weights of all pairs, known from the labels.

    Args:
      candidate_xn: which entries may be evicted, by default all; others are in no pair.

    Returns:
      [x, n, n], antisymmetric: of i and j positive where the future score of i is strictly below
      that of j; and the sums over these [x].
    """
    one, other = future_xn[..., :, None], future_xn[..., None, :]
    weight = (one < other).astype(jnp.float32) - (one > other)
    if weighting == "sqrt_gap":
        weight = weight * jnp.sqrt(jnp.abs(other - one))
    if candidate_xn is not None:
        weight = jnp.where(candidate_xn[..., :, None] & candidate_xn[..., None, :], weight, 0.0)
    return weight, jnp.abs(weight).sum((-2, -1)) / 2


def hinge_loss(importance_xn: Array, pairs: tuple[Array, Array], margin: float) -> Array:
    """`ranking_loss` [x] of weighted pairs, from `pair_weights`."""
    weight, total = pairs
    # Each pair is seen from both its entries, so that the two sums over one axis have the loss, in
    # which importances are linear, and by that its gradient.
    above = importance_xn[..., :, None] - importance_xn[..., None, :]
    wrong = jnp.where(jnp.where(weight > 0, above, -above) > -margin, weight, 0.0)
    centred = importance_xn - jax.lax.stop_gradient(importance_xn.mean(-1, keepdims=True))
    loss = (centred * wrong.sum(-1)).sum(-1) + margin * jnp.abs(wrong).sum((-2, -1)) / 2
    return loss / jnp.where(total > 0, total, 1.0)


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
    pairs = pair_weights(future_xn, config.weighting)
    return hinge_loss(importance_xn, pairs, config.margin), pairs[1] > 0


def has_pair(future_xn: Array, candidate_xn: Array | None = None) -> Array:
    """Whether two candidates of a group, by default all entries, differ in future score."""
    high = low = future_xn
    if candidate_xn is not None:
        high, low = (jnp.where(candidate_xn, future_xn, x) for x in (-jnp.inf, jnp.inf))
    return high.max(-1) > low.min(-1)


@flax.struct.dataclass
class Sums:
    """Sums over one pass of a batch, per layer.

    Attributes:
      traces: number of traces long enough to count.
      weight: number of traces with a group that has a pair.
      loss: ranking loss, mean over the evictions and heads of a trace, summed over traces.
      overlap: share of the `L` of lowest future score among the scorer's, averaged and summed
        alike.
      grads: gradient of `loss` in the layer's scorer parameters.
    """

    traces: Array
    weight: Array
    loss: Array
    overlap: Array
    grads: dict

    @classmethod
    def zero(cls, traces: Array, params: dict) -> "Sums":
        """Before the first eviction."""
        none = jnp.zeros(())
        return cls(traces, none, none, none, jax.tree.map(jnp.zeros_like, params))


@flax.struct.dataclass
class Learner:
    """What a plan carries from eviction to eviction, of one layer or stacked over layers.

    Attributes:
      params: of the scorers.
      sums: see `Sums`; without gradients if there are updates at evictions.
      opt_state, rate: of these updates: the layer's, and the learning rate.
      norm, updates: the sum of the squared norms of their gradients, and their number.
    """

    params: dict
    sums: Sums | None = None
    opt_state: optax.OptState = ()
    rate: Array | None = None
    norm: Array | None = None
    updates: Array | None = None


def loss_and_grads(
    plans: Sequence[Plan], params: Sequence[dict], lm: LM, batch: Batch
) -> list[Sums]:
    """Ranking losses, overlaps and gradients of a batch of traces, [layers] and [layers, ...].

    Rows too short for a token after an eviction do not count.

    Args:
      plans: of scorers that learn side by side, from one golden pass; each gets what it would get
        alone, bit for bit on a CPU.
      params: of these scorers.
    """

    found = _learn(plans, [Learner(x) for x in params], lm, batch, lambda plan, *x: _added(*x))
    return [learner.sums for learner in found]


def _added(learner: Learner, found: Sums) -> Learner:
    return learner.replace(sums=jax.tree.map(jnp.add, learner.sums, found))


def _learn(
    plans: Sequence[Plan],
    learners: Sequence[Learner],
    lm: LM,
    batch: Batch,
    learn: Callable[[Plan, Learner, Sums], Learner],
) -> list[Learner]:
    """Runs the full pass and the evicted ones; the scorers learn at every eviction.

    Args:
      learners: stacked over layers; their sums are set.
      learn: from a learner of one layer, and what an eviction adds to its sums, to the learner
        after it.
    """
    cadence = plans[0].cadence
    replay.check_lengths([batch.token_bt.shape[1]], cadence)
    position, first = batch.position_bt, cadence.first_evicting_token
    counted = (batch.length_b > first).astype(jnp.float32).sum()
    # These evictions need no PRNG keys and have even budgets.
    unused = replay.row_keys(key_of(0, Purpose.REPLAY), len(position))
    site = replay.Site(lm.config, cadence, 0, unused, batch.prompt_b)
    (form,) = {plan.scorer.form for plan in plans}
    # What plans see: features do not depend on the hidden width.
    seen = [dataclasses.replace(plan.scorer, hidden=1) for plan in plans]
    # All that learn from golden states share one evicted stream.
    golds = tuple(i for i, plan in enumerate(plans) if plan.states == "golden")
    owns = [(i,) for i, plan in enumerate(plans) if plan.states != "golden"]
    streams = [golds, *owns] if golds else owns
    # As good as a coin for each trace, and the same in every batch.
    even_b = jnp.where(position >= 0, batch.token_bt, 0).sum(-1) % 2 == 0

    def layer(hiddens, inputs):
        weights, learners = inputs
        full, begun, evicted = hiddens
        full, labels, (qkv, lse) = golden.layer_labels(
            lm.config, weights, full, position, cadence, batch.prompt_b
        )
        if owns:
            future_jbkt = golden.future_scores(qkv[0], qkv[1], lse, position, cadence)
        golden_policy = Forced(labels.evict_position_ebkl, form)

        # Weights of each eviction's groups, known from the labels: a mean over a trace's groups.
        free = None
        if cadence.protect_prompt:
            free = ~golden.protected(labels.candidate_position_ebkn, cadence, batch.prompt_b)
        pairs = has_pair(labels.future_score_ebkn, free) & labels.valid_eb[..., None]
        loss_weight = pairs / jnp.maximum(pairs.sum((0, 2), keepdims=True), 1)
        valid = jnp.broadcast_to(labels.valid_eb[..., None], pairs.shape)
        overlap_weight = valid / jnp.maximum(valid.sum((0, 2), keepdims=True), 1)

        def observe(stream, acc: list[Learner], view: View, future, best, shares):
            counts = shares[1].any()
            free = view.candidate_bkn if view.protect_prompt else None

            # XLA compiles what is under a condition by itself: what one plan gets does not depend
            # on what is computed beside it, down to the last bit.
            def apart(function, *arguments):
                shapes = jax.eval_shape(function, *arguments)
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                return jax.lax.cond(counts, function, lambda *_: zeros, *arguments)

            features = {
                how: apart(functools.partial(scorer.features, how), view)
                for how in dict.fromkeys(seen[i] for i in stream)
            }
            pairs = {
                name: apart(lambda x, free, name=name: pair_weights(x, name, free), future, free)
                for name in dict.fromkeys(plans[i].loss.weighting for i in stream)
            }
            found = []
            for i, learner in zip(stream, acc, strict=True):
                own = (features[seen[i]], pairs[plans[i].loss.weighting], *shares, best, free)
                one = functools.partial(_one_eviction, plans[i])
                found.append(apart(one, learner.params, *own))
            # Statistics are in use whatever is seen of them: without, XLA rounds hidden states
            # otherwise.
            if view.statistics is not None:
                unseen = 0.0 * view.statistics.total[0, 0, 0, 0]
                found[0] = found[0].replace(traces=unseen)
            learned = zip(stream, acc, found, strict=True)
            return [learn(plans[i], learner, one) for i, learner, one in learned]

        def on_golden(stream, acc, policy, view, evict):
            by_eviction = (labels.future_score_ebkn, loss_weight, overlap_weight)
            future, *shares = (golden.at(x, view.eviction) for x in by_eviction)
            return observe(stream, acc, view, future, evict, shares), ()

        def on_own(stream, acc, policy, view):
            policy = policy.replace(params=acc[0].params)
            position = view.cache.position_bks[..., : view.capacity]
            future = jax.lax.dynamic_index_in_dim(future_jbkt, view.chunk + 1, keepdims=False)
            future = jnp.take_along_axis(future, jnp.maximum(position, 0), axis=-1)
            future = jnp.where(view.candidate_bkn, future, 0.0)
            best = jnp.where(view.candidate_bkn, future, jnp.inf)
            best = jax.lax.top_k(-best, view.interval)[1]
            shares = 2 * [golden.at(overlap_weight, view.eviction)]
            evict = policy.evict(view)
            if plans[stream[0]].states == "mixed":
                evict = jnp.where(even_b[:, None, None], golden_policy.evict(view), evict)
            return observe(stream, acc, view, future, best, shares), evict, ()

        before, after = position[:, :first], position[:, first:]
        if lm.config.cache_dtype:  # quantised, which the full pass is not
            qkv = models.project(lm.config, weights, begun, before)
        else:
            qkv, lse = [x[:, :first] for x in qkv], lse[..., :first]
        learned, outs = {}, []
        for stream, hidden in zip(streams, evicted, strict=True):
            acc = []
            for i in stream:
                summed = learners[i].params if plans[i].updates == "batch" else {}
                acc.append(learners[i].replace(sums=Sums.zero(counted, summed)))
            if stream == golds:
                policy, see = golden_policy, functools.partial(on_golden, stream)
            else:
                policy = Foresight(acc[0].params, plans[stream[0]].scorer)
                see = replay.Chooser(functools.partial(on_own, stream))
            if lm.config.cache_dtype:
                out, staged = replay.begin_layer(policy, lm.config, cadence, qkv, before)
            else:
                staged = replay.stage(policy, lm.config, cadence, qkv, lse, before)
            rest = models.project(lm.config, weights, hidden, after)
            after_out, _, acc, _ = replay.pass_from(policy, site, staged, rest, after, see, acc)
            outs.append(models.finish(lm.config, weights, hidden, after_out))
            learned |= dict(zip(stream, acc, strict=True))
        if lm.config.cache_dtype:
            begun = models.finish(lm.config, weights, begun, out)
        return (full, begun, outs), [learned[i] for i in range(len(plans))]

    hidden = models.embed(lm, batch.token_bt)
    begun = hidden[:, :first] if lm.config.cache_dtype else ()
    hiddens = (hidden, begun, [hidden[:, first:]] * len(streams))
    return jax.lax.scan(layer, hiddens, (models.stacked(lm), list(learners)))[1]


def _one_eviction(plan, params, feature_bknf, pairs, loss_weight_bk, overlap_weight_bk, *chosen):
    """The sums of one layer's eviction; `chosen` are the slots evicted, and the candidates."""
    evict, free = chosen

    def objective(importance):
        return (hinge_loss(importance, pairs, plan.loss.margin) * loss_weight_bk).sum()

    apply = functools.partial(scorer.apply, plan.scorer, feature_bknf=feature_bknf)
    importance, pull = jax.vjp(apply, params)
    loss, slope = jax.value_and_grad(objective)(importance)
    (grads,) = pull(slope)
    # Shifting all scores of a head does not change the loss; Adam would amplify the rounding error
    # in the gradient of that shift.
    grads = {**grads, "b2": jnp.zeros_like(grads["b2"])}
    if free is not None:
        importance = jnp.where(free, importance, jnp.inf)
    chosen = jax.lax.top_k(-importance, evict.shape[-1])[1]
    agree = (chosen[..., :, None] == evict[..., None, :]).any(-1).mean(-1)
    weight, overlap = loss_weight_bk.sum(), (agree * overlap_weight_bk).sum()
    return Sums(jnp.zeros(()), weight, loss, overlap, grads)


def train_step(
    plans: Sequence[Plan], states: Sequence[TrainState], lm: LM, batch: Batch, axis: str
) -> tuple[list[TrainState], list[dict]]:
    """One step of each plan's scorers on this device's part of the batch.

    Collectives are over `axis`.

    Returns:
      The new states, and of each plan metrics: loss [layers], overlap [layers], grad_norm (of the
      mean of the micro-batches so far; with updates at evictions, root mean square over these).
    """

    def learn(plan, learner, found):
        if plan.updates == "batch":
            return _added(learner, found)
        return _at_eviction(plan, learner, found, axis)

    learners = []
    for plan, state in zip(plans, states, strict=True):
        learners.append(Learner(state.params))
        if plan.updates == "eviction":
            zero = jnp.zeros(lm.config.layers)
            rate = zero + plan.schedule(state.step)
            learners[-1] = Learner(state.params, None, state.opt_state, rate, zero, zero)
    found = _learn(plans, learners, lm, batch, learn)
    updated = [_update(*parts, axis) for parts in zip(plans, states, found, strict=True)]
    return [state for state, _ in updated], [metrics for _, metrics in updated]


def _at_eviction(plan: Plan, learner: Learner, found: Sums, axis: str) -> Learner:
    """A learner after an update by the mean over the groups of this eviction that count."""
    weight, grads = jax.lax.psum((found.weight, found.grads), axis)
    learner = _added(learner, found.replace(grads={}))

    def update(learner):
        mean = jax.tree.map(lambda x: x / weight, grads)
        change, opt_state = plan.optimiser.update(mean, learner.opt_state, learner.params)
        change = jax.tree.map(lambda x: -learner.rate * x, change)
        norm, updates = learner.norm + optax.tree.norm(mean, squared=True), learner.updates + 1
        params = optax.apply_updates(learner.params, change)
        return learner.replace(params=params, opt_state=opt_state, norm=norm, updates=updates)

    return jax.lax.cond(weight > 0, update, lambda learner: learner, learner)


def _update(plan: Plan, state: TrainState, learner: Learner, axis: str) -> tuple[TrainState, dict]:
    sums = jax.lax.psum(learner.sums, axis)
    sums = jax.tree.map(lambda x: x / jnp.maximum(sums.traces[0], 1.0), sums)
    if plan.updates == "batch":
        updates, opt_state = plan.optimiser.update(sums.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(mean_so_far(sums.grads, state.opt_state))
    else:
        params, opt_state = learner.params, learner.opt_state
        norm = jnp.sqrt(learner.norm.sum() / jnp.maximum(learner.updates.max(), 1))
    metrics = {"loss": sums.loss, "overlap": sums.overlap, "grad_norm": norm}
    return TrainState(updates_made(state.step, opt_state), params, opt_state), metrics
