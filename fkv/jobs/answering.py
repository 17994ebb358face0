"""Answers by a batcher of one shape, for the jobs that ask many questions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import api
from fkv.api import Model
from fkv.engine.batcher import Batcher
from fkv.engine.requests import Plan, Request
from fkv.jobs import common
from fkv.policies.base import Policy


class Shape(NamedTuple):
    """Rows at a time, tokens of the longest prompt, and the most tokens of an answer."""

    rows: int
    width: int
    new_tokens: int


def new_tokens(config: ConfigDict, job: str, embedded: bool) -> int:
    """The most tokens of an answer: by default what the embedded task needs, or 32,768."""
    default = common.spec(config).max_new_tokens() if embedded else 32_768
    return config[job].new_tokens or default


def queue(
    model: Model,
    policy: Policy,
    plan: Plan,
    shape: Shape,
    asked: Sequence[tuple[np.ndarray, jax.Array]],
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Answers prompts by a batcher: a row that ends takes the next.

    Args:
      asked: prompts, and the PRNG keys of their answers.

    Yields:
      The answers that have ended, after every `L` steps in which some did: index and token ids.

    Raises:
      UserError: the model's logits are no numbers.
    """
    if not asked:
        return
    sizes = shape.rows, shape.width + shape.new_tokens
    batcher = Batcher(model.lm, policy, plan.cadence, *sizes, top=None)
    for prompt, key in asked:
        batcher.submit(Request(prompt, key, shape.new_tokens, plan.sampling, plan.stop))
    tokens = [[] for _ in asked]
    while batcher.live or batcher.waiting:
        ended = []
        for event in batcher.step():
            tokens[event.id].append(event.tokens)
            if event.finish == "error":
                raise api.not_finite(model)
            if event.finish:
                ended.append((event.id, np.concatenate(tokens[event.id])))
        if ended:
            yield ended
