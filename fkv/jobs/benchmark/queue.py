"""Requests of mixed lengths: rows that come and go beside static batches, here and by a peer."""

import collections
import contextlib
import dataclasses
import functools
import math
import statistics
import time

import numpy as np

from fkv.jobs.benchmark import peers
from fkv.jobs.benchmark.base import Bench, measure, spread

ROWS, BATCHES = "rows come and go", "static batches"
PAGED, DYNAMIC = "paged", "dynamic"  # caches of `transformers`
_CLIP = 8  # times the median, about the 99th percentile


@dataclasses.dataclass(frozen=True)
class Arm:
    """Requests answered by `fkv` or a peer.

    Attributes:
      cache: the policy, or how a peer caches.
      how: `ROWS` or `BATCHES`, each of which is waited for.
      rows: answered at a time.
    """

    who: str
    cache: str
    how: str
    rows: int
    requests: int

    def __str__(self) -> str:
        return f"{self.who} {self.cache}, {self.how}"


def lengths(seed: int, count: int, median: int) -> np.ndarray:
    """Tokens [count] of answers: log-normal, with ten times as many at the 90th percentile as at
    the 10th, clipped at eight times the median.
    """
    sigma = math.log(10) / (2 * statistics.NormalDist().inv_cdf(0.9))
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return np.clip(np.rint(drawn), 1, _CLIP * median).astype(np.int32)


def queue(bench: Bench) -> list[dict]:
    """Greedy answers to requests that are all there at the start, each of a length of its own."""
    s, sizes = bench.settings, (bench.settings.queue_rows, bench.settings.queue_requests)
    prompts = bench.tokens(s.queue_requests, s.queue_prompt)
    limits = lengths(bench.config.seed, s.queue_requests, s.queue_tokens)
    calls = {
        arm: functools.partial(_answer, bench, arm, prompts)
        for name in s.peer_policies
        for arm in (Arm("fkv", name, ROWS, *sizes), Arm("fkv", name, BATCHES, *sizes))
    }
    with contextlib.ExitStack() as stack:
        for peer in peers.start(bench, stack, ("transformers",)):
            for cache, how in ((PAGED, ROWS), (DYNAMIC, BATCHES)):
                arm = Arm(peer.name, cache, how, *sizes)
                calls[arm] = functools.partial(_answer_by, peer, arm, prompts)
        return _measured(bench, calls, limits)


def _measured(bench: Bench, calls: dict, limits: np.ndarray) -> list[dict]:
    def prepare(arm):
        # Compiles, and is not counted.
        first = calls[arm](np.minimum(limits, 2 * bench.interval))["seconds"]
        return lambda: calls[arm](limits), {"first_call_s": first}

    def ratios(found, arm, other):
        pairs = zip(found[arm], found[other], strict=False)  # in the same repeat
        return [mine["seconds"] / its["seconds"] for mine, its in pairs]

    def record(arm, found):
        seconds, row = np.array([r["seconds"] for r in found[arm]]), {}
        own = arm.who == "fkv"
        rows = dataclasses.replace(arm, how=ROWS, cache=arm.cache if own else PAGED)
        for name, other in (("over_rows", rows), ("over_ours", next(iter(calls)))):
            if other != arm and found[other]:
                row |= spread(name, ratios(found, arm, other))
        other = rows if own else dataclasses.replace(rows, who="fkv", cache="full")
        if other != arm and found[other]:
            both = zip(found[arm][-1]["tokens"], found[other][-1]["tokens"], strict=True)
            row["same_answers"] = float(np.mean([a == b for a, b in both]))
        if steps := found[arm][-1].get("steps"):
            row["rows_in_use"] = float((limits - 1).sum() / steps)
        return {
            **row, **spread("seconds", seconds), **spread("tokens_per_s", limits.sum() / seconds),
        }  # fmt: skip

    return measure(bench, calls, prepare, record)


def _answer(bench: Bench, arm: Arm, prompts: np.ndarray, limits: np.ndarray) -> dict:
    """Answers here."""
    plan = dataclasses.replace(bench.plan(bench.config.budget), sampling=peers.GREEDY)
    shape = arm.rows, prompts.shape[1], int(limits.max())
    batcher, found, steps = bench.batcher(arm.cache, plan, shape), collections.defaultdict(list), 0
    batcher.wait()
    size = arm.rows if arm.how == BATCHES else len(prompts)
    start = time.perf_counter()
    for i in range(0, len(prompts), size):
        bench.submit(batcher, plan, prompts[i : i + size], limits[i : i + size])
        while batcher.waiting or batcher.live:
            for event in batcher.step():
                found[event.id] += event.tokens.tolist()
            steps += bench.interval
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "steps": steps, "tokens": [found[id] for id in sorted(found)]}


def _answer_by(peer: peers.Peer, arm: Arm, prompts: np.ndarray, limits: np.ndarray) -> dict:
    """Answers of a peer."""
    if arm.how == ROWS:
        asked = {"prompts": prompts.tolist(), "limits": limits.tolist(), "rows": arm.rows}
        return peer.ask(arm.cache, **asked)
    seconds, steps, tokens = 0.0, 0, []
    for i in range(0, len(prompts), arm.rows):
        at = slice(i, i + arm.rows)
        most = int(limits[at].max())
        one = peer.ask(arm.cache, prompts=prompts[at].tolist(), new_tokens=most)
        seconds, steps = seconds + one["prefill_s"] + one["decode_s"], steps + most - 1
        tokens += [some[:n] for some, n in zip(one["tokens"], limits[at], strict=True)]
    return {"seconds": seconds, "steps": steps, "tokens": tokens}
