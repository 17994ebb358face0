"""Answers of a batcher, for tests."""

from collections.abc import Sequence

import jax
import numpy as np

from fkv.engine.batcher import Batcher
from fkv.engine.requests import Event, Plan, Request
from fkv.models import LM
from fkv.policies.base import Policy


def batcher(
    lm: LM,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[np.ndarray],
    keys: jax.Array,
    limits: Sequence[int],
    **sizes,
) -> Batcher:
    """A batcher with these requests, by default a row for each."""
    length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    sizes = {"rows": len(prompts), "length": length, "top": None} | sizes
    made = Batcher(lm, policy, plan.cadence, **sizes)
    for prompt, key, limit in zip(prompts, keys, limits, strict=True):
        made.submit(Request(prompt, key, limit, plan.sampling, plan.stop))
    return made


def steps(batch: Batcher) -> list[list[Event]]:
    """The events of every step."""
    found = []
    while batch.waiting or batch.live:
        found.append(batch.step())
    return found


def rows(stepped: Sequence[Sequence[Event]], count: int) -> list[np.ndarray]:
    """The tokens of so many requests."""
    found = [[] for _ in range(count)]
    for event in (event for events in stepped for event in events):
        assert event.finish != "error"
        found[event.id] += event.tokens.tolist()
    return [np.array(x, np.int32) for x in found]


def generate(lm, policy, plan, prompts, keys, limits, **sizes) -> list[np.ndarray]:
    """The tokens of answers, stop tokens included."""
    return rows(steps(batcher(lm, policy, plan, prompts, keys, limits, **sizes)), len(prompts))
