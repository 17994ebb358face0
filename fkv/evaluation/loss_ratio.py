"""What a policy costs on given traces: its loss against the full cache's, and golden overlap.

The tokens that count are those after the first `B + L`, the only ones that an eviction can change.
Low-entropy tokens are the share of them with the lowest full-cache entropy, per trace.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import models, replay
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View, common_statistics


@flax.struct.dataclass
class Watched(Policy):
    """Runs `actor`, while `watchers` say what they would have done in its place."""

    actor: Policy
    watchers: tuple[Policy, ...]

    @property
    def statistics(self) -> str | None:
        return common_statistics(self.actor, *self.watchers)

    def evict(self, view: View) -> Array:
        return self.actor.evict(view)


@flax.struct.dataclass
class OneOf(Policy):
    """Runs `choices[index]`, chosen at run time: one compilation serves all of them."""

    choices: tuple[Policy, ...]
    index_y: Array

    @property
    def statistics(self) -> str | None:
        return common_statistics(*self.choices)

    def evict(self, view: View) -> Array:
        return jax.lax.switch(self.index_y, [p.evict for p in self.choices], view)


@dataclasses.dataclass(frozen=True)
class Losses:
    """One policy at one budget on n traces.

    Attributes:
      policy, budget, interval: what ran.
      evicted, full: summed loss per trace over the counted tokens, nats, each [n, 3]: of all,
        low-entropy and high-entropy tokens.
      tokens: how many tokens each of these sums is over, [n, 3].
      overlap: share of the golden evictions that the policy would choose too, given the golden
        cache, mean over layers, heads and evictions, [n]; None for the full cache.
    """

    policy: str
    budget: int
    interval: int
    evicted: np.ndarray
    full: np.ndarray
    tokens: np.ndarray
    overlap: np.ndarray | None

    def ratio(self, kind: int = 0) -> tuple[float, float]:
        """Loss over the full cache's loss, and its standard error (delta method, over traces)."""
        evicted, full = self.evicted[:, kind], self.full[:, kind]
        ratio = evicted.sum() / full.sum()
        n = len(full)
        return ratio, float((evicted - ratio * full).std(ddof=1) / (full.mean() * n**0.5))

    def added(self, kind: int = 0) -> tuple[float, float]:
        """Nats added per token by eviction, and its standard error."""
        added, tokens = self.evicted[:, kind] - self.full[:, kind], self.tokens[:, kind]
        mean = added.sum() / tokens.sum()
        n = len(tokens)
        return mean, float((added - mean * tokens).std(ddof=1) / (tokens.mean() * n**0.5))

    def mean_overlap(self) -> tuple[float, float]:
        """Golden overlap and its standard error."""
        if self.overlap is None:
            return float("nan"), float("nan")
        return float(self.overlap.mean()), float(
            self.overlap.std(ddof=1) / len(self.overlap) ** 0.5
        )


def low_entropy(entropy_bt: np.ndarray, counted_bt: np.ndarray, share: float) -> np.ndarray:
    """Of each row's counted tokens, the `share` with the lowest entropy (bool [b, t])."""
    entropy = np.where(counted_bt, entropy_bt, np.inf)
    rank = np.argsort(np.argsort(entropy, axis=1, kind="stable"), axis=1, kind="stable")
    high = (counted_bt.sum(1, keepdims=True) * (1 - share) + 1e-9).astype(int)
    return counted_bt & (rank < counted_bt.sum(1, keepdims=True) - high)


def measure(
    config: ModelConfig,
    params: models.Params,
    policies: Mapping[str, Policy],
    token_bt: np.ndarray,
    length_b: np.ndarray,
    budget: int,
    interval: int,
    key: Array,
    batch: int = 32,
    low_share: float = 0.8,
) -> list[Losses]:
    """Runs every policy and golden eviction over the traces at one budget.

    Args:
      policies: by the name to report; `full` and `golden` are always added.
      token_bt, length_b: right-padded traces, each longer than `B + L`.
      key: PRNG key for policies that draw.
      batch: traces at once.

    Returns:
      One `Losses` per policy: full, golden, then `policies` in their order.
    """
    replay.check_lengths(length_b, budget, interval)
    n, t = token_bt.shape
    names, several = list(policies), tuple(policies.values())

    @jax.jit
    def golden(params, several, token, length):
        forced, labels, full = replay.golden_policy(config, params, token, length, budget, interval)
        first, layers = budget // interval, config.layers

        def observe(acc, policy, view, evict):
            event = view.chunk - first
            index = jnp.clip(event, 0, labels.valid_eb.shape[1] - 1)
            live = (event >= 0) & (event < labels.valid_eb.shape[1]) & labels.valid_eb[0, index]
            agree = [
                (watcher.evict(view)[..., :, None] == evict[..., None, :]).any(-1).mean((1, 2))
                for watcher in policy.watchers
            ]
            agree = jnp.stack([jnp.ones(len(length)), *agree])
            return acc + jnp.where(live, agree, 0.0), ()

        watched = Watched(forced, several)
        start = jnp.zeros((1 + len(several), len(length)))
        hidden, agree, _ = replay.replay(
            config, params, token, length, watched, budget, interval, observe=observe, acc=start
        )
        events = jnp.maximum(labels.valid_eb[0].sum(0), 1)
        overlap = agree.sum(0) / (layers * events)[None]
        token_losses = lambda h: replay.token_losses(config, params, h, token)  # noqa: E731
        return token_losses(full), token_losses(hidden), overlap

    @jax.jit
    def run(params, policy, token, length, random):
        hidden, _, _ = replay.replay(
            config, params, token, length, policy, budget, interval, random
        )
        return replay.token_losses(config, params, hidden, token).nll_bt

    random = replay.row_keys(key, n)
    nll = {name: [] for name in ("full", "golden", *names)}
    entropy, overlaps = [], []
    for start in range(0, n, batch):
        rows = np.arange(start, start + batch) % n  # the last batch wraps round, one shape for all
        token, length = token_bt[rows], length_b[rows]
        keep = min(batch, n - start)
        full, gold, overlap = golden(params, several, token, length)
        nll["full"].append(np.asarray(full.nll_bt)[:keep])
        nll["golden"].append(np.asarray(gold.nll_bt)[:keep])
        entropy.append(np.asarray(full.entropy_bt)[:keep])
        overlaps.append(np.asarray(overlap)[:, :keep])
        for i, name in enumerate(names):
            one = OneOf(several, jnp.full(config.layers, i))
            nll[name].append(np.asarray(run(params, one, token, length, random[rows]))[:keep])

    nll = {name: np.concatenate(rows) for name, rows in nll.items()}
    overlap = dict(zip(("golden", *names), np.concatenate(overlaps, axis=1), strict=True))
    index = np.arange(t - 1)[None]
    counted = (index >= budget + interval - 1) & (index < length_b[:, None] - 1)
    low = low_entropy(np.concatenate(entropy), counted, low_share)
    masks = np.stack([counted, low, counted & ~low], axis=-1)  # [n, t - 1, 3]

    def sums(x):
        return (x[..., None] * masks).sum(1)

    full = sums(nll["full"])
    return [
        Losses(name, budget, interval, sums(x), full, masks.sum(1), overlap.get(name))
        for name, x in nll.items()
    ]


def table(results: Sequence[Losses]) -> str:
    """A text table, one line per policy and budget."""
    head = (
        f"{'policy':<14} {'budget':>6}  {'loss ratio':^15} {'low-entropy':^17} "
        f"{'high-entropy':^15}  {'added nats, low':^17} {'overlap':^13}"
    )
    lines = [head, "-" * len(head)]
    for r in results:
        cells = [f"{v:8.3f} ±{e:6.3f}" for v, e in (r.ratio(0), r.ratio(1), r.ratio(2))]
        value, std = r.added(1)
        mean, overlap_error = r.mean_overlap()
        overlap = f"{mean:6.3f} ±{overlap_error:5.3f}" if r.overlap is not None else ""
        lines.append(
            f"{r.policy:<14} {r.budget:>6}  {cells[0]} {cells[1]:>17} {cells[2]}  "
            f"{value:9.4f} ±{std:6.4f} {overlap}"
        )
    return "\n".join(lines)


def csv(results: Sequence[Losses]) -> str:
    """The same as comma-separated values, with a header."""
    lines = [
        "policy,budget,interval,traces,ratio,ratio_se,ratio_low,ratio_low_se,ratio_high,"
        "ratio_high_se,added_low,added_low_se,overlap,overlap_se"
    ]
    for r in results:
        numbers = [*r.ratio(0), *r.ratio(1), *r.ratio(2), *r.added(1), *r.mean_overlap()]
        cells = [r.policy, r.budget, r.interval, len(r.full), *(f"{x:.6g}" for x in numbers)]
        lines.append(",".join(map(str, cells)))
    return "\n".join(lines) + "\n"
