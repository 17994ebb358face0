"""PRNG keys and their purposes: no two draws of a run share a key.

A key is folded from a root (the seed of a run, or the key of a row), a purpose and indices. Every
use of a purpose has the same number of indices, so keys are equal only if purpose and indices are.
"""

import enum
import numbers

import jax
import jax.numpy as jnp
from jax import Array

from fkv.errors import UserError


class Purpose(enum.IntEnum):
    """What is drawn, and its indices. A new number changes the draws of a seed."""

    # From a seed:
    MODEL = 1  # weights of a language model from scratch; parameter
    SCORER = 2  # scorers before training; layer
    ROLLOUT = 3  # evictions of a rollout; step, row
    REPLAY = 4  # evictions while losses are measured; row
    ANSWER = 5  # answers of `generate`, `stream` and `evaluate`; prompt, sample
    TRACE = 6  # answers collected as traces; question, sample
    PRETRAIN = 7  # answers of the embedded reasoner after its training; problem
    BENCHMARK = 8  # inputs of a benchmark; 0 and row, 1, layer and keys or values, 2 for queries
    LOOKUP = 11  # evictions before and in look-ups; context
    # From the key of a row:
    TOKEN = 9  # the next token; its position
    EVICTION = 10  # what a policy draws; layer, newest position


def key_of(root: int | Array, purpose: Purpose, *index: int | Array) -> Array:
    """The key for a purpose.

    Args:
      root: a seed (0 to 2**32 - 1: higher bits would be dropped), or a key.
      index: 32-bit integers, see `Purpose`; omitted ones can be folded in later.

    Raises:
      UserError: the seed is out of range.
    """
    if not isinstance(root, Array):
        whole = isinstance(root, numbers.Integral) and not isinstance(root, bool)
        if not whole or not 0 <= root < 2**32:
            raise UserError(f"seed = {root!r} must be a whole number from 0 to {2**32 - 1}")
        root = jax.random.key(root)
    return fold(root, int(purpose), *index)


def fold(key: Array, *index: int | Array) -> Array:
    """The key with these indices folded in."""
    for i in index:
        key = jax.random.fold_in(key, i)
    return key


def keys_of(key: Array, count: int) -> Array:
    """The keys [count] of indices 0, 1, ...; key i does not depend on `count`."""
    return jax.vmap(lambda i: fold(key, i))(jnp.arange(count))
