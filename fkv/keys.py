"""PRNG keys, and what each is for: no two draws of a run share one.

A key is folded from its root (the seed of a run, or the key of a row), a purpose and indices, such
as a step or a position. Purposes of one root are different numbers, and every use of a purpose has
the same number of indices, so two keys are equal only where purpose and indices are.
"""

import enum
import numbers

import jax
import jax.numpy as jnp
from jax import Array

from fkv.errors import UserError


class Purpose(enum.IntEnum):
    """What is drawn, and the indices that follow. A new number changes the draws of a seed.

    Of a seed:
      MODEL: weights of a language model that starts from scratch or is made up; parameter.
      SCORER: scorers before training; layer.
      ROLLOUT: evictions of a rollout; step, row.
      REPLAY: evictions where losses are measured; row.
      ANSWER: answers of `generate`, `stream` and `evaluate`; prompt, sample.
      TRACE: answers that become traces; question, sample.
      PRETRAIN: answers of the embedded reasoner after its training; problem.
      BENCHMARK: what a benchmark makes up; 0 and row, 1 and layer and keys or values, or 2 for
        queries.

    Of the key of a row:
      TOKEN: the next token; its position.
      EVICTION: what a policy draws; layer, newest position.
    """

    MODEL = 1
    SCORER = 2
    ROLLOUT = 3
    REPLAY = 4
    ANSWER = 5
    TRACE = 6
    PRETRAIN = 7
    BENCHMARK = 8
    TOKEN = 9
    EVICTION = 10


def key_of(root: int | Array, purpose: Purpose, *index: int | Array) -> Array:
    """The key of a purpose.

    Args:
      root: a seed, or a key.
      index: whole numbers of 32 bits, see `Purpose`; those that are left out are folded in later.

    Raises:
      UserError: the seed is none: one of more bits would be cut to another's.
    """
    if not isinstance(root, Array):
        whole = isinstance(root, numbers.Integral) and not isinstance(root, bool)
        if not whole or not 0 <= root < 2**32:
            raise UserError(f"seed = {root!r} must be a whole number from 0 to {2**32 - 1}")
        root = jax.random.key(root)
    return fold(root, int(purpose), *index)


def fold(key: Array, *index: int | Array) -> Array:
    """The key at these indices."""
    for i in index:
        key = jax.random.fold_in(key, i)
    return key


def keys_of(key: Array, count: int) -> Array:
    """The keys [count] at the indices from 0, the same whatever `count` is."""
    return jax.vmap(lambda i: fold(key, i))(jnp.arange(count))
