"""Losses and attention retained, trace by trace, in files that a run resumes from and adds to.

What `launch.advise` and `launch.leaderboard` share. A line is a policy at a budget on a trace; the
traces of a batch are measured at once, under every policy that lacks them.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from fkv import kinds
from fkv.cache.cadence import Cadence
from fkv.data.traces import Traces
from fkv.engine.batch import Batch
from fkv.evaluation import loss_ratio
from fkv.evaluation.answers import Form, Samples
from fkv.evaluation.loss_ratio import Losses
from fkv.evaluation.recall import GOLDEN
from fkv.evaluation.retained import retained
from fkv.jobs import measuring
from fkv.jobs.measuring import CELL, Job, Part
from fkv.keys import Purpose, fold, key_of
from fkv.learning import tokens
from fkv.policies.base import Policy, trained_at

_KEY = ("policy", "budget", "trace")
_THREE = kinds.several(kinds.number(0), "three numbers", 3)
_SHARE = kinds.Kind("a share or null", lambda x: x is None or kinds.number(0, 2).fits(x))
_SHARES = kinds.several(kinds.several(_SHARE, "shares"), "shares by layer and KV head")
# Tokens, and nats under eviction and with the full cache: all, low- and high-entropy tokens.
LOSS = Form(
    "losses of a trace",
    {
        **CELL, "trace": kinds.TEXT, "tokens": _THREE, "nll": _THREE, "full": _THREE,
        "overlap": _SHARE,
    },
    _KEY,
)  # fmt: skip
RETAINED = Form("attention retained", {**CELL, "trace": kinds.TEXT, "retained": _SHARES}, _KEY)


@dataclasses.dataclass(frozen=True)
class Given:
    """Traces to measure on, and the name of each."""

    traces: Traces
    names: Sequence[str]

    def first(self, count: int) -> "Given":
        """So many of them, spread evenly."""
        rows = np.linspace(0, len(self.names) - 1, min(count, len(self.names))).round().astype(int)
        return self.take(rows)

    def take(self, rows: np.ndarray) -> "Given":
        """Some of them, by index."""
        t = self.traces
        arrays = (x[rows] for x in (t.token_nt, t.length_n, t.prompt_n, t.padded_n))
        return Given(Traces(*arrays), [self.names[i] for i in rows])


def measure(job: Job, given: Given, at: Sequence[Cadence]) -> Samples:
    """Losses of golden eviction and all policies of the job, in `losses.jsonl`.

    What is there is not measured again.
    """
    lm = job.model.lm
    split = tokens.Split()  # fixed, as a run is resumed and added to

    def some(batch, key_b, policies, cadence, count):
        width_b = np.full(len(key_b), batch.token_bt.shape[1])
        traces = loss_ratio.Traces(batch, key_b, width_b, split.high_fraction, len(key_b))
        for one in loss_ratio.measure(lm, policies, traces, cadence, alone=True):
            for i in range(count):
                sums = {
                    "tokens": one.tokens[i], "nll": one.evicted[i], "full": one.full[i],
                }  # fmt: skip
                row = {name: np.asarray(x, float).tolist() for name, x in sums.items()}
                share = None if one.overlap is None else float(one.overlap[i])
                yield one.policy, i, {**row, "overlap": share}

    nothing = {**dict.fromkeys(("tokens", "nll", "full"), [0.0] * 3), "overlap": None}
    store = job.store("losses.jsonl", LOSS, interval=True)
    measuring.measure(job, _parts(job, given, some, nothing), at, store)
    return store


def measure_retained(job: Job, given: Given, at: Sequence[Cadence]) -> Samples:
    """Attention retained, in `retained.jsonl`, likewise."""

    def some(batch, key_b, policies, cadence, count):
        for name, share_byk in retained(job.model.lm, policies, batch, cadence, key_b).items():
            for i in range(count):
                shares = np.asarray(share_byk[i], float)
                nulls = np.where(np.isnan(shares), None, shares.astype(object))
                yield name, i, {"retained": nulls.tolist()}

    config = job.model.config
    nothing = {"retained": [[None] * config.kv_heads] * config.layers}
    store = job.store("retained.jsonl", RETAINED, interval=True)
    measuring.measure(job, _parts(job, given, some, nothing), at, store)
    return store


def _parts(job: Job, given: Given, some, nothing: dict) -> list[Part]:
    """Batches of equal padded width.

    Args:
      some: from a batch, its keys, policies, a cadence and how many traces count, to the name of a
        policy, the index of a trace and the row.
      nothing: the row of a trace that is too short for an eviction.
    """
    found, seed = [], key_of(job.config.seed, Purpose.REPLAY)
    for rows, wanted in loss_ratio.batches(given.traces.padded_n, job.config.eval.batch):
        batch, ids = Batch.of(*given.traces.rows(rows)), [given.names[i] for i in wanted]
        # By name, so that a trace's draws do not depend on the others.
        numbers = [zlib.crc32(given.names[i].encode()) for i in rows]
        key_b = jnp.stack([fold(seed, x) for x in numbers])

        def measure(cadence, names, batch=batch, key_b=key_b, ids=ids):
            policies = {name: job.named[name] for name in names if name in job.named}
            short = [n <= cadence.slots for n in np.asarray(batch.length_b)[: len(ids)].tolist()]
            if all(short):
                every = ((name, i, nothing) for name in names for i in range(len(ids)))
            else:
                every = some(batch, key_b, policies, cadence, len(ids))
            # All at once, so that a run that is killed measures the same ones together again.
            yield [
                {"policy": name, "trace": ids[i], **(nothing if short[i] else row)}
                for name, i, row in every
                if name in names
            ]

        found.append(Part(ids, measure))
    return found


def results(
    store: Samples, named: Mapping[str, Policy], names: Sequence[str], cadence: Cadence
) -> list[Losses]:
    """The losses of golden eviction and these policies at one budget, on the traces of `names`."""
    found = []
    for name in (GOLDEN, *named):
        rows = [store.rows[name, cadence.budget, trace] for trace in names]
        evicted, full, count = (np.array([r[x] for r in rows]) for x in ("nll", "full", "tokens"))
        overlap = [r["overlap"] for r in rows]
        shares = None if None in overlap else np.array(overlap)[:, None, None]
        policy = named.get(name)
        found.append(
            Losses(
                name, cadence.budget, cadence.interval, evicted, full, count, shares,
                trained=trained_at(policy, cadence.interval), rule=loss_ratio.is_rule(policy),
                protect_prompt=cadence.protect_prompt,
            )
        )  # fmt: skip
    return found


def shares(store: Samples, name: str, budget: int, names: Sequence[str]) -> np.ndarray:
    """Attention retained, [n, layers, KV heads]; NaN for traces without evictions."""
    return np.array([store.rows[name, budget, trace]["retained"] for trace in names], float)
