"""The cost of a policy on given traces: its loss relative to the full cache's, and golden overlap.

Tokens count if they are generated (after the prompt) and come after the first `B + L`: no eviction
changes earlier ones. Low-entropy tokens are those of lowest full-cache entropy, per trace, as in
the rewards of the reinforcement stage.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.engine import beginnings, replay
from fkv.engine.batch import Batch
from fkv.engine.memory_maps import make_room
from fkv.learning import golden
from fkv.learning.tokens import TokenLosses, low_entropy, token_losses
from fkv.models import LM
from fkv.policies.base import Policy, View, common_statistics, trained_at
from fkv.runs import parallel


@flax.struct.dataclass
class Watched(Policy):
    """Runs `actor`, while `watchers` report what they would have dropped instead."""

    actor: Policy
    watchers: tuple[Policy, ...]

    @property
    def statistics(self) -> str | None:
        return common_statistics(self.actor, *self.watchers)

    def evict(self, view: View) -> Array:
        return self.actor.evict(view)


@flax.struct.dataclass
class OneOf(Policy):
    """Runs `choices[index]`, chosen at run time: one compilation serves them all."""

    choices: tuple[Policy, ...]
    index_y: Array

    @property
    def statistics(self) -> str | None:
        return common_statistics(*self.choices)

    def evict(self, view: View) -> Array:
        return jax.lax.switch(self.index_y, [p.evict for p in self.choices], view)


def _kinds(policies: Sequence[Policy]) -> list[list[int]]:
    """Indices of policies, those together that differ in their arrays' values only."""
    found: dict[Any, list[int]] = {}
    for i, policy in enumerate(policies):
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(policy)]
        found.setdefault((jax.tree.structure(policy), *shapes), []).append(i)
    return list(found.values())


def one_of(policies: Sequence[Policy], index: int, layers: int) -> OneOf:
    """A policy as one of as many as there are kinds, so that one program runs all of them."""
    kinds = _kinds(policies)
    own = next((i for i, kind in enumerate(kinds) if index in kind), 0)  # of none, none
    choices = tuple(policies[index if i == own else kind[0]] for i, kind in enumerate(kinds))
    return OneOf(choices, jnp.full(layers, own))


def _evictions(policies: Sequence[Policy], view: View) -> list[Array]:
    """What each of the policies would drop; those of one kind are compiled once."""
    found = {}
    for kind in _kinds(policies):
        if len(kind) == 1:
            found[kind[0]] = policies[kind[0]].evict(view)
            continue
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(policies[i] for i in kind))
        chosen = jax.lax.map(lambda policy: policy.evict(view), stacked)
        found |= dict(zip(kind, chosen, strict=True))
    return [found[i] for i in range(len(policies))]


@dataclasses.dataclass(frozen=True)
class Losses:
    """One policy at one budget on n traces.

    Attributes:
      policy, budget, interval: of the run.
      protect_prompt: of the cadence.
      rule: whether it is rule-based: an evicting policy without parameters.
      trained: the budget of its scorers in training, by `Trained.at`; else empty.
      evicted, full: loss per trace, summed over the counted tokens, nats, each [n, 3]: all,
        low-entropy and high-entropy tokens.
      tokens: number of tokens in each of these sums, [n, 3].
      recall_nyk: share of the golden evictions that the policy, given the golden cache, would
        choose too; mean over evictions, per trace, layer and KV head; None for the full cache and
        policies that run alone (`shares`).
      regret_nyk: summed future scores of what the policy would drop, minus those of what golden
        eviction drops (attention probability per eviction); mean and shape as above.
      excess_nt: evicted minus full loss of every counted token, nats, NaN elsewhere.
    """

    policy: str
    budget: int
    interval: int
    evicted: np.ndarray
    full: np.ndarray
    tokens: np.ndarray
    recall_nyk: np.ndarray | None = None
    regret_nyk: np.ndarray | None = None
    excess_nt: np.ndarray | None = None
    trained: str = ""
    rule: bool = False
    protect_prompt: int = 0

    def __repr__(self) -> str:
        ratio, error = self.ratio()
        where = f"B = {self.budget}, L = {self.interval}" if self.budget else "full cache"
        traces = f"{len(self.full)} traces"
        return f"Losses({self.policy!r}, {where}, {traces}, loss ratio {ratio:.3f} ± {error:.3f})"

    @property
    def overlap(self) -> np.ndarray | None:
        """Recall of the golden evictions, mean over layers and heads, [n]."""
        return None if self.recall_nyk is None else self.recall_nyk.mean((1, 2))

    def ratio(self, kind: int = 0) -> tuple[float, float]:
        """Loss over the full cache's, and its standard error (delta method, over traces)."""
        evicted, full = self.evicted[:, kind], self.full[:, kind]
        ratio = evicted.sum() / full.sum()
        return ratio, standard_error((evicted - ratio * full) / full.mean())

    def added(self, kind: int = 0) -> tuple[float, float]:
        """Nats added per token by eviction, and its standard error."""
        added, tokens = self.evicted[:, kind] - self.full[:, kind], self.tokens[:, kind]
        mean = added.sum() / tokens.sum()
        return mean, standard_error((added - mean * tokens) / tokens.mean())

    def mean_overlap(self) -> tuple[float, float]:
        """Golden overlap and its standard error."""
        if self.overlap is None:
            return float("nan"), float("nan")
        return float(self.overlap.mean()), standard_error(self.overlap)


def standard_error(part_n: np.ndarray) -> float:
    """Of a mean over traces; NaN for one trace."""
    n = len(part_n)
    return float(part_n.std(ddof=1) / n**0.5) if n > 1 else float("nan")


@dataclasses.dataclass(frozen=True)
class Traces:
    """The traces that losses are measured on.

    Attributes:
      batch: right-padded traces, each longer than `B + L`.
      key_b: one PRNG key per trace, for policies that sample.
      width_b: padded width of each trace; those of equal width run together.
      high_fraction: see `tokens.low_entropy`.
      at_once: traces per pass.
    """

    batch: Batch
    key_b: Array
    width_b: np.ndarray
    high_fraction: float = 0.2
    at_once: int = 32

    __repr__ = kinds.one_line


def measure(
    lm: LM, policies: Mapping[str, Policy], traces: Traces, cadence: Cadence, alone: bool = False
) -> list[Losses]:
    """Runs every policy and golden eviction over the traces at one budget.

    All share what comes before the first eviction, except for those that `shares` leaves out.
    Processes share the work, and all get the results. Programs are compiled once for all calls
    with the same policies, sizes and cadence.

    Args:
      policies: by reported name; `full` and `golden` are always added.
      alone: this process does all of it, and others may measure something else meanwhile.

    Returns:
      One `Losses` per policy: full, golden, then `policies` in their order.
    """
    batch, config = traces.batch, lm.config
    for policy in policies.values():
        replay.check(policy, config, cadence, traces.at_once)
    replay.check_lengths(batch.length_b, cadence)
    n, t = batch.token_bt.shape
    together = {name: p for name, p in policies.items() if shares(p, cadence)}
    names, several = list(together), tuple(together.values())
    apart = {name: p for name, p in policies.items() if name not in together}
    first = cadence.first_evicting_token

    nll = {name: np.zeros((n, t - 1), np.float32) for name in ("full", "golden", *policies)}
    entropy = np.zeros((n, t - 1), np.float32)
    shape = (1 + len(names), n, config.layers, config.kv_heads)
    recalls, regrets = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    processes, mine = (1, 0) if alone else (jax.process_count(), jax.process_index())
    turns = enumerate(batches(traces.width_b, traces.at_once))
    for turn, (rows, wanted) in turns:  # other rows stay zero: other processes fill them in
        if turn % processes != mine:
            continue
        width, key_b = traces.width_b[rows[0]], traces.key_b[rows]
        if width <= first:  # no token counts
            continue
        part = Batch.of(batch.token_bt[rows, :width], batch.length_b[rows], batch.prompt_b[rows])

        def put(table, found, wanted=wanted, width=width):
            table[wanted, first - 1 : width - 1] = np.asarray(found)[: len(wanted)]

        make_room()
        full, gold, recall, regret, begun = _run_golden(lm, several, part, key_b, cadence)
        put(nll["full"], full.nll_bt)
        put(nll["golden"], gold.nll_bt)
        put(entropy, full.entropy_bt)
        recalls[:, wanted] = np.asarray(recall)[:, : len(wanted)]
        regrets[:, wanted] = np.asarray(regret)[:, : len(wanted)]
        for i, name in enumerate(names):
            one = one_of(several, i, config.layers)
            put(nll[name], _run_from(lm, begun, one, part, key_b))
        for name, policy in apart.items():
            make_room()
            put(nll[name], _run(lm, policy, part, key_b, cadence))

    found = [*nll.values(), entropy, recalls, regrets]
    *found, entropy, recalls, regrets = found if alone else parallel.total(found)
    nll = dict(zip(nll, found, strict=True))
    recall = dict(zip(("golden", *names), recalls, strict=True))
    regret = dict(zip(("golden", *names), regrets, strict=True))
    counted = batch.counted_bt(first)
    low = np.asarray(low_entropy(entropy, counted, traces.high_fraction))
    masks = np.stack([counted, low, counted & ~low], axis=-1)  # [n, t - 1, 3]

    def sums(x):
        return (x[..., None] * masks).sum(1)

    full = sums(nll["full"])
    return [
        Losses(
            policy=name,
            budget=cadence.budget,
            interval=cadence.interval,
            evicted=sums(x),
            full=full,
            tokens=masks.sum(1),
            recall_nyk=recall.get(name),
            regret_nyk=regret.get(name),
            excess_nt=np.where(counted, x - nll["full"], np.nan),
            trained=trained_at(policies.get(name), cadence.interval),
            rule=is_rule(policies.get(name)),
            protect_prompt=cadence.protect_prompt,
        )
        for name, x in nll.items()
    ]


def _losses(lm: LM, hidden: Array, part: Batch, cadence: Cadence) -> TokenLosses:
    """Of tokens after the first `B + L`, from hidden states that end with the last token."""
    before = part.token_bt[:, cadence.first_evicting_token - 1 :]
    return token_losses(lm, hidden[:, -before.shape[1] :], before)


@functools.partial(jax.jit, static_argnames="cadence")
def _run_golden(lm, several, part, key_b, cadence):
    """The full cache, and golden eviction watched by all policies that share its pass."""
    config = lm.config
    one = one_of(several, 0, config.layers)
    forced, labels, full, begun = golden.policy_and_beginning(lm, part, cadence, one)
    scores = jnp.concatenate([labels.future_score_ebkn, labels.newest_score_ebkl], axis=-1)

    def observe(acc, policy, view, evict):
        live_b = golden.at(labels.valid_eb[0], view.eviction)
        future = golden.at(jnp.take(scores, view.layer, axis=0), view.eviction)

        def lost(slots):
            return jnp.take_along_axis(future, slots, axis=-1).sum(-1)

        recall, regret = [jnp.ones(evict.shape[:2])], [jnp.zeros(evict.shape[:2])]
        for chosen in _evictions(policy.watchers, view):
            recall.append((chosen[..., :, None] == evict[..., None, :]).any(-1).mean(-1))
            regret.append(lost(chosen) - lost(evict))
        both = jnp.stack([jnp.stack(recall), jnp.stack(regret)])
        return acc + jnp.where(live_b[None, None, :, None], both, 0.0), ()

    watched = Watched(forced, several)
    start = jnp.zeros((2, 1 + len(several), len(key_b), config.kv_heads))
    hidden, both, _ = beginnings.replay_from(lm, part, begun, watched, key_b, observe, start)
    events = jnp.maximum(labels.valid_eb[0].sum(0), 1)[None, None, None, :, None]
    recall, regret = jnp.moveaxis(both / events, 0, 3)  # each [w, b, y, k]
    full, gold = (_losses(lm, x, part, cadence) for x in (full, hidden))
    return full, gold, recall, regret, begun


@functools.partial(jax.jit, static_argnames="cadence")
def _run(lm, policy, part, key_b, cadence):
    return _losses(lm, replay.replay(lm, part, policy, cadence, key_b)[0], part, cadence).nll_bt


@jax.jit
def _run_from(lm, begun, policy, part, key_b):
    hidden, _, _ = beginnings.replay_from(lm, part, begun, policy, key_b)
    return _losses(lm, hidden, part, begun.cadence).nll_bt


def shares(policy: Policy, cadence: Cadence) -> bool:
    """Whether a policy can share a beginning, a pass and the golden cache with others.

    Those that need more than B slots, or numbers of entries when they come, run alone.
    """
    return policy.capacity(cadence.budget) == cadence.budget and policy.arrive is None


def is_rule(policy: Policy | None) -> bool:
    return policy is not None and policy.evicts and not jax.tree.leaves(policy)


def batches(width_b: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of equal width, `batch` at a time, and which of them are new.

    The last batch of a width is filled up with repeated rows, so that all have one shape.
    """
    for width in np.unique(width_b):
        ids = np.flatnonzero(width_b == width)
        for start in range(0, len(ids), batch):
            rows = ids[np.arange(start, start + batch) % len(ids)]
            yield rows, ids[start : start + batch]
