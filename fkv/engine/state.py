"""What passes through a layer under eviction: its chunk, its cache, and who looks on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
from jax import Array

from fkv.cache import slots as kv
from fkv.cache.cadence import Cadence
from fkv.models import ModelConfig
from fkv.policies.base import Policy, View

# (accumulator, policy, view, evicted slots [b, k, l]) of an eviction -> the new accumulator, and
# outputs to stack over evictions.
Observer = Callable[[Any, Policy, View, Array], tuple[Any, Any]]
# Of one layer: q [b, t, h, d], k and v [b, t, k, d]; fourth, what the policy's `arrive` gave of
# these tokens, if it has one.
Projections = tuple[Array, Array, Array] | tuple[Array, Array, Array, dict[str, Array]]


def ignore(acc, policy, view, evict):
    return acc, ()


@dataclasses.dataclass(frozen=True)
class Chooser:
    """An observer that also chooses, so that nothing is computed twice; for even budgets.

    Attributes:
      act: (accumulator, policy, view) of an eviction -> the new accumulator, the slots to drop
        [b, k, l] in place of those of `policy.evict`, and outputs to stack over evictions.
    """

    act: Callable[[Any, Policy, View], tuple[Any, Array, Any]]


@flax.struct.dataclass
class Chunk:
    """The tokens since the last eviction.

    Attributes:
      query_blhd: their queries, rotated.
      lse_bkgl: log-sum-exps of their attention, as `attention.attend` returns them.
      position_bl: their positions, -1 for padding.
      index: number of chunks before this one, int32.
    """

    query_blhd: Array
    lse_bkgl: Array
    position_bl: Array
    index: Array


@flax.struct.dataclass
class Staged:
    """A layer before an eviction.

    Attributes:
      cache: its entries; the staging ring is full.
      chunk: the tokens in the ring. Their attention is not yet part of the sums in `cache.entry`.
    """

    cache: kv.Cache
    chunk: Chunk


@flax.struct.dataclass
class Site:
    """Where an eviction happens.

    Attributes:
      config: of the model.
      cadence: of the evictions.
      layer: index of the layer.
      key_b: one PRNG key per row.
      prompt_b: tokens of each row's prompt.
    """

    config: ModelConfig = flax.struct.field(pytree_node=False)
    cadence: Cadence = flax.struct.field(pytree_node=False)
    layer: Array | int
    key_b: Array
    prompt_b: Array
