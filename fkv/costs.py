"""What a run costs before it runs: memory, floating-point operations, time at best.

Temporary memory is what the compiler says of the very step. The rest is arithmetic; "matrix" means
the weights that a token is multiplied with: all but norms, biases and the embedding that is only
looked up. A multiplication with an addition is two operations.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fkv.models import ModelConfig
from fkv.models.decoder import param_shapes


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator as its maker describes it.

    Attributes:
      memory: bytes.
      flops: dense bfloat16 operations a second.
      bandwidth: of its memory, bytes a second.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float


DEVICES = (
    Device("TPU v5e", 16e9, 197e12, 0.819e12),
    Device("TPU v6e", 32e9, 918e12, 1.64e12),
    Device("H100", 80e9, 989e12, 3.35e12),
    Device("H200", 141e9, 989e12, 4.8e12),
)
# What is left for a program beside the runtime and what fragments.
USABLE = 0.9


def parameters(config: ModelConfig) -> int:
    """How many parameters the decoder has."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(config)))


def parameter_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the decoder's parameters."""
    return parameters(config) * jnp.dtype(dtype).itemsize


def matrix(config: ModelConfig) -> int:
    """Weights of all layers that every token is multiplied with."""
    layers = param_shapes(config)["layers"]
    return sum(
        math.prod(x.shape) for name, x in layers.items() if not ("norm" in name or "bias" in name)
    )


def unembedding(config: ModelConfig) -> int:
    """Operations of one token's logits."""
    return 2 * config.vocab_size * config.width


def attention(config: ModelConfig, pairs: float) -> float:
    """Operations of attention, scores and values, over so many pairs of a query and a key."""
    return 4 * config.layers * config.heads * config.head_dim * pairs


def full_pass(config: ModelConfig, tokens: int) -> float:
    """Operations of all layers over a sequence with the full cache."""
    return 2 * matrix(config) * tokens + attention(config, tokens * (tokens + 1) / 2)


def evicted_pass(config: ModelConfig, tokens: int, budget: int, interval: int) -> float:
    """Operations of all layers over a sequence whose queries see `B + L` slots, and statistics."""
    pairs = tokens * (budget + interval)
    return 2 * matrix(config) * tokens + 1.5 * attention(config, pairs)


def scoring(
    config: ModelConfig, features: int, hidden: int, tokens: int, budget: int, interval: int
) -> float:
    """Operations of the scorers over a sequence, forward."""
    events = max(tokens // interval - budget // interval, 0)
    return 2 * events * config.layers * config.kv_heads * budget * hidden * (features + 1)


def sft_trace(
    config: ModelConfig, scorer: tuple[int, int], tokens: int, budget: int, interval: int
):
    """Operations of the supervised stage on one trace.

    The full pass, its scores once more for the labels, the pass under golden evictions, and the
    scorers forward and backward.

    Args:
      scorer: features and hidden units.
    """
    labels = attention(config, tokens * (tokens + 1) / 2) / 2
    learned = 3 * scoring(config, *scorer, tokens, budget, interval)
    evicted = evicted_pass(config, tokens, budget, interval)
    return full_pass(config, tokens) + labels + evicted + learned


def grpo_trace(
    config: ModelConfig,
    scorer: tuple[int, int],
    tokens: int,
    budget: int,
    interval: int,
    rollouts: int,
    epochs: int,
) -> float:
    """Operations of the reinforcement stage on one trace.

    One full pass with logits, `rollouts` passes with evictions and logits, and `epochs` more of
    each without logits, with the scorers twice forward (theirs and the reference) and once back.
    """
    logits = unembedding(config) * tokens
    evicted = evicted_pass(config, tokens, budget, interval)
    score = scoring(config, *scorer, tokens, budget, interval)
    each = evicted + logits + score + epochs * (evicted + 4 * score)
    return full_pass(config, tokens) + logits + rollouts * each


def cache_bytes(config: ModelConfig, slots: int, dtype: str, statistics: bool = False) -> int:
    """Bytes of one row's caches: keys and values of all layers, positions, and running sums."""
    entry = 2 * config.head_dim * jnp.dtype(dtype).itemsize + 4
    entry += 8 * config.group_size if statistics else 0
    return config.layers * config.kv_heads * slots * entry


def decode_bytes(config: ModelConfig, batch: int, slots: int, dtype: str) -> float:
    """Bytes that one decoding step must read: the weights once, and every row's keys and values."""
    size = jnp.dtype(dtype).itemsize
    read = matrix(config) + config.vocab_size * config.width
    kept = 2 * config.layers * config.kv_heads * slots * config.head_dim
    return size * (read + batch * kept)


def decode_flops(config: ModelConfig, batch: int, slots: int) -> float:
    """Operations of one decoding step."""
    return batch * (2 * matrix(config) + unembedding(config) + attention(config, slots))


def temporaries(step: Callable, *arguments, donate: tuple[int, ...] = ()) -> int:
    """Bytes that a step needs beside its arguments and its results.

    Compiled for the device at hand from shapes alone; nothing is allocated.

    Args:
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      donate: which of them the results take the place of.
    """
    compiled = jax.jit(step, donate_argnums=donate).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def size(tree) -> int:
    """Bytes of a pytree of arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest(points: Sequence[tuple[int, float]], memory: float, multiple: int = 1) -> int:
    """The largest x that fits, by the line through two points (x, bytes).

    Returns:
      A multiple of `multiple`; 0 if none fits.
    """
    (x, low), (y, high) = points
    slope = (high - low) / (y - x)
    most = (memory * USABLE - low) / slope + x
    return max(int(most // multiple) * multiple, 0)
