"""Answers in batches of one shape, for the jobs that ask many questions."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fkv.engine import decoding
from fkv.jobs import common
from fkv.models import LM
from fkv.policies.base import Policy


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of all batches, which so have one program.

    Attributes:
      rows: prompts of a batch.
      width: tokens of the longest prompt.
      new_tokens: the most that an answer may have.
    """

    rows: int
    width: int
    new_tokens: int

    @classmethod
    def of(cls, config: ConfigDict, job: str, embedded: bool, prompts: Sequence) -> "Shape":
        """For these prompts; an answer has a default length where `new_tokens` is 0."""
        longest = max(map(len, prompts))
        return cls(config[job].batch, longest, new_tokens(config, job, embedded))


def new_tokens(config: ConfigDict, job: str, embedded: bool) -> int:
    """The most tokens of an answer; by default what the embedded task needs, or 32,768."""
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
    """Token ids of answers to one batch, which copies of its first row fill up."""
    count, empty = len(prompts), shape.rows - len(prompts)
    prompts, keys = ([*rows, *[rows[0]] * empty] for rows in (prompts, keys))
    limit = [shape.new_tokens] * count + [0] * empty
    out = decoding.generate(lm, policy, plan, prompts, jnp.stack(keys), limit, shape.width)
    return out[:count]
