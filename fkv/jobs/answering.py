"""Answers in batches of one shape, for the jobs that ask many questions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fkv.engine import decoding
from fkv.jobs import common
from fkv.models import LM
from fkv.policies.base import Policy


class Shape(NamedTuple):
    """Of every batch: rows, tokens of the longest prompt, and the most tokens of an answer."""

    rows: int
    width: int
    new_tokens: int


def new_tokens(config: ConfigDict, job: str, embedded: bool) -> int:
    """The most tokens of an answer: by default what the embedded task needs, or 32,768."""
    default = common.spec(config).max_new_tokens() if embedded else 32_768
    return config[job].new_tokens or default


def answer(
    lm: LM,
    policy: Policy,
    plan: decoding.Plan,
    shape: Shape,
    prompts: Sequence[np.ndarray],
    keys: Sequence[jax.Array],
) -> list[np.ndarray]:
    """Token ids of answers to a batch; copies of its first row fill it up, for a single program."""
    count, empty = len(prompts), shape.rows - len(prompts)
    prompts, keys = ([*rows, *[rows[0]] * empty] for rows in (prompts, keys))
    limit = [shape.new_tokens] * count + [0] * empty
    out = decoding.generate(lm, policy, plan, prompts, jnp.stack(keys), limit, shape.width)
    return out[:count]
