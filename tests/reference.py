"""Compares fkv with vectors computed by the released ForesightKV code.

  python -m tests.reference --dir DIR

DIR holds `losses.npz`, `baselines.npz` and checkpoint directories with `replay.npz`, any part of
them. Prints the largest error of every comparison and exits with 1 when one is beyond tolerance.
Sets of positions are compared through what decides them: a wrong set is excused only where the
entries that differ tie with the last one chosen.
"""

import argparse
import dataclasses
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from fkv import files, models, policies
from fkv.cache import attention
from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.engine import replay
from fkv.engine.batch import Batch
from fkv.learning import golden, sft, surrogate
from fkv.learning.tokens import low_entropy, token_losses
from fkv.policies import scorer
from fkv.runs import sharing
from tests import oracles

LOGITS = 1e-4  # logits, losses per token, scorer scores
SCORES = 1e-5  # future scores: probabilities
TIE = 1e-6

# Programs: op by op, hundreds would be compiled.
unembed, losses_of = jax.jit(models.unembed), jax.jit(token_losses)
ranking_loss = jax.jit(sft.ranking_loss, static_argnums=2)
choose = jax.jit(lambda policy, view: (policy.evict(view), policy.score(view)))


@functools.partial(jax.jit, static_argnums=0)
def scores_of(config, params, feature):
    """Of all layers and evictions."""
    apply = jax.vmap(jax.vmap(scorer.apply, (None, None, 0)), (None, 0, 0))
    return apply(config, params, feature)


@functools.partial(jax.jit, static_argnums=3)
def view_of(query, key, value, cadence):
    """What a policy sees of B + L entries [k, n, d], all of whose queries [h, n, d] are known."""
    interval, slots = cadence.interval, key.shape[1]
    position = jnp.arange(slots)[None]
    query = jnp.moveaxis(query, 0, 1)[None]
    empty = kv.init(1, key.shape[0], slots, key.shape[2], key.dtype)
    held = kv.append(
        empty, 0, jnp.moveaxis(key, 0, 1)[None], jnp.moveaxis(value, 0, 1)[None], position
    )
    seen = attention.visible(position, held.position_bks)
    lse = attention.attend(query, held.key_bksd, held.value_bksd, seen)[1]
    stats = attention.statistics(query, position, held.key_bksd, held.position_bks, lse)
    return policies.View(
        held.replace(entry={"cumulative": stats.total, "decayed": stats.total}),
        query[:, -interval:],
        position[:, -interval:],
        jnp.int32(cadence.budget // interval),
        replay.row_keys(jax.random.key(0), 1),
        stats,
        cadence,
    )


@dataclasses.dataclass(frozen=True)
class OneEviction(Cadence):
    """A cadence of a single eviction, whose budget need be no multiple of the interval."""

    def __post_init__(self):
        pass


@dataclasses.dataclass
class Row:
    """One comparison: its error (a count for sets) and what is allowed."""

    where: str
    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def error(ours, theirs) -> float:
    """Largest absolute difference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise SystemExit(f"error: shapes differ, ours {ours.shape} and theirs {theirs.shape}")
    if not ours.size:
        return 0.0
    return float(np.abs(ours - theirs).max())


def wrong_sets(ours, theirs, position, score, tie=TIE) -> int:
    """How many groups choose another set than the reference, ties aside.

    Args:
      ours, theirs: chosen positions [..., l].
      position, score: the reference's candidates [..., n] and what it chose the lowest of.
    """
    wrong = 0
    for index in np.ndindex(ours.shape[:-1]):
        difference = set(ours[index].tolist()) ^ set(theirs[index].tolist())
        if not difference:
            continue
        of = dict(zip(position[index].tolist(), score[index].tolist(), strict=True))
        border = np.sort(score[index])[ours.shape[-1] - 1]
        wrong += any(abs(of.get(p, np.inf) - border) > tie for p in difference)
    return wrong


def in_order(position, value):
    """Positions sorted along the last axis, and the values that go with them."""
    order = np.argsort(position, axis=-1)
    return (np.take_along_axis(x, order, axis=-1) for x in (position, value))


def check_replay(directory: Path) -> list[Row]:
    """Full pass, golden search, forced replay, scorer and ranking loss of one checkpoint."""
    vectors = np.load(directory / "replay.npz")
    lm = models.load(directory, dtype=jnp.float32)
    cadence = Cadence(int(vectors["budget"]), int(vectors["interval"]))
    token = jnp.asarray(vectors["input_ids"], jnp.int32)
    batch = Batch.of(token, jnp.array([token.shape[1]]))
    rows = []

    def row(what, ours, theirs, allowed=LOGITS):
        rows.append(Row(directory.name, what, error(ours, theirs), allowed))

    _, labels, hidden = jax.jit(golden.policy, static_argnums=2)(lm, batch, cadence)
    row("full logits", unembed(lm, hidden)[0], vectors["full_logits"])
    losses = losses_of(lm, hidden, token)
    row("full nll", losses.nll_bt[0], vectors["full_nll"])

    # Ours in the order of slots [layers, e, k, n], theirs in the order of positions.
    position = np.asarray(labels.candidate_position_ebkn[:, :, 0])
    future = np.asarray(labels.future_score_ebkn[:, :, 0])
    evict = np.asarray(labels.evict_position_ebkl[:, :, 0])
    position, future = in_order(position, future)
    theirs, their_future = in_order(vectors["candidate_positions"], vectors["future_scores"])
    different = 0 if position.shape == theirs.shape else np.inf
    rows.append(Row(directory.name, "number of evictions and candidates", different, 0))
    if different:
        return rows
    # After a tie broken the other way the two searches hold different entries, and rightly so:
    # from then on that group can't be compared.
    tied = (np.sort(evict) != np.sort(vectors["evict_positions"])).any(-1)
    before = np.cumsum(tied, axis=1) - tied > 0
    wrong = wrong_sets(
        evict[~before], vectors["evict_positions"][~before], theirs[~before], their_future[~before]
    )
    rows.append(Row(directory.name, "evicted sets", wrong, 0))
    moved = int((position != theirs)[~before].any(-1).sum())
    rows.append(Row(directory.name, "candidate sets", moved, 0))
    row("future scores", future[~before], their_future[~before], SCORES)

    # From here on under the reference's evictions, as its vectors are.
    drop = jnp.asarray(vectors["evict_positions"])[:, :, None]
    learned, about = sharing.load(directory)
    scorer_config = learned.config
    policy = policies.Forced(drop, "reference")

    def observe(acc, policy, view, evicted):
        return acc, (
            scorer.features(scorer_config, view),
            view.cache.position_bks[..., : cadence.budget],
        )

    hidden, _, (feature, held) = jax.jit(
        lambda lm: replay.replay(lm, batch, policy, cadence, observe=observe)
    )(lm)
    row("evicted logits", unembed(lm, hidden)[0], vectors["evicted_logits"])
    losses = losses_of(lm, hidden, token)
    row("evicted nll", losses.nll_bt[0], vectors["evicted_nll"])

    held = np.asarray(held[:, :, 0])
    moved = int((np.sort(held) != theirs).any(-1).sum())
    rows.append(Row(directory.name, "entries held at evictions", moved, 0))
    _, their_score = in_order(vectors["candidate_positions"], vectors["scorer_scores"])
    for how, params in [("", learned.params), *round_trips(directory, learned, about)]:
        score = scores_of(scorer_config, params, feature)
        _, score = in_order(held, np.asarray(score[:, :, 0]))
        row(f"scorer scores{how}", -score, their_score)  # theirs are eviction scores
    loss, has_pair = ranking_loss(score, their_future)
    per_layer = (loss * has_pair).sum((1, 2)) / has_pair.sum((1, 2))
    row("ranking loss per layer", per_layer, vectors["ranking_loss_per_layer"])
    return rows


def round_trips(directory: Path, learned: policies.Foresight, about: dict):
    """The scorers after they were written and read again, in both layouts."""
    files = sorted(directory.glob("*.safetensors"))
    stored = {name: x for file in files for name, x in load_file(file).items()}
    bare = {name: x for name, x in stored.items() if "judge_model" not in name}
    with tempfile.TemporaryDirectory() as folder:
        base, shared, released = (Path(folder) / name for name in ("base", "shared", "released"))
        sharing.export(learned, shared, about)
        yield ", exported and read", sharing.load(shared)[0].params
        base.mkdir()
        save_file(bare, base / "model.safetensors", {"format": "pt"})
        shutil.copy(directory / "config.json", base)
        sharing.export_released(learned, base, released)
        yield ", in the released layout", sharing.load(released)[0].params


def check_losses(path: Path) -> list[Row]:
    """Ranking loss, GRPO loss, KL, advantages and reward."""
    z = np.load(path)
    v = {name: jnp.asarray(z[name]) for name in z.files}
    rows = []

    def row(what, ours, theirs):
        rows.append(Row(path.name, what, error(ours, theirs), LOGITS))

    loss_config = sft.LossConfig(margin=float(v["rank_margin"]))
    # Theirs score eviction, and so does this oracle; ours score importance.
    loss, has_pair = ranking_loss(-v["rank_scores"], -v["rank_oracle"], loss_config)
    row("ranking loss", loss.sum() / has_pair.sum(), v["rank_loss"])
    row("advantages", surrogate.advantages(v["grpo_returns"]), v["grpo_advantages"])
    index = v["grpo_indices"]
    new, old, ref = (
        surrogate.independent_log_prob(v[f"grpo_scores_{name}"], index)
        for name in ("new", "old", "ref")
    )
    advantage = v["grpo_advantages"][None, :, None, None]
    loss, kl = oracles.grpo_loss(
        new, old, ref, advantage, float(v["grpo_clip"]), float(v["grpo_kl_weight"])
    )
    row("grpo loss", loss, v["grpo_loss"])
    row("grpo kl", kl, v["grpo_kl"])
    entropy, fraction = v["reward_entropy"][None], float(v["reward_high_entropy_fraction"])
    late = np.arange(entropy.shape[1])[None] >= int(v["reward_skip"])
    counted = low_entropy(entropy, late, fraction)[0]
    ours = oracles.reward(
        v["reward_evicted_nll"], v["reward_full_nll"], counted, float(v["reward_eta"])
    )
    row("reward", ours, v["reward"])
    return rows


def check_baselines(path: Path) -> list[Row]:
    """Positions kept by one compression of B + L entries."""
    z = np.load(path)
    query, key, value = (jnp.asarray(z[name]) for name in ("q", "k", "v"))
    budget, interval = int(z["budget"]), int(z["interval"])
    slots, view = budget + interval, view_of(query, key, value, OneEviction(budget, interval))
    window = {"window": int(z["window"]), "kernel": int(z["kernel"])}
    rows = []
    for name in sorted(n for n in z.files if n.startswith("kept_")):
        method = name.removeprefix("kept_")
        if method == "streaming_llm":
            policy = policies.get("streaming_llm", sinks=int(z["first_tokens"]))
        elif method == "snapkv":
            policy = policies.get("snapkv", **window)
        elif method.startswith("rkv_lambda"):
            policy = policies.get("rkv", mix=float(method.removeprefix("rkv_lambda")), **window)
        elif method == "h2o_first":
            policy = policies.get("h2o")
        else:
            rows.append(Row(path.name, f"{name}: a method not known here", np.inf, 0))
            continue
        evict, score = (np.asarray(x)[0] for x in choose(policy, view))
        gone = np.stack([np.setdiff1d(np.arange(slots), kept) for kept in z[name]])
        newest = np.arange(slots) >= slots - policy.protected(view)
        score = np.where(newest, np.inf, score)
        every = np.broadcast_to(np.arange(slots), score.shape)
        rows.append(Row(path.name, name, wrong_sets(np.sort(evict), gone, every, score), 0))
    return rows


def check(directory: Path) -> list[Row]:
    """All comparisons that the directory has vectors for."""
    rows = []
    for path in sorted(directory.glob("*/replay.npz")):
        rows += check_replay(path.parent)
    for name, one in (("losses.npz", check_losses), ("baselines.npz", check_baselines)):
        if (directory / name).exists():
            rows += one(directory / name)
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=files.expand, required=True, help="directory of vectors")
    directory = parser.parse_args(argv).dir
    jax.config.update("jax_default_matmul_precision", "highest")
    rows = check(directory)
    if not rows:
        print(f"error: {directory}: no replay.npz, losses.npz or baselines.npz", file=sys.stderr)
        return 2
    for row in rows:
        mark = "ok" if row.passed else "FAILED"
        print(f"{row.where:16} {row.what:36} {row.error:10.3g}  allowed {row.allowed:<8.0e} {mark}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
