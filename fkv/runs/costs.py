"""What a model costs by its shape, before anything runs: parameters, bytes, operations.

A multiplication and an addition are two operations (FLOPs). Only matrix products are counted, and
of causal attention only the half that is not masked, so a share of the peak that is computed with
these figures is never flattered by wasted work. Temporary memory is what the compiler says.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from fkv import files
from fkv.errors import UserError
from fkv.models import ModelConfig, read
from fkv.models.decoder import param_shapes
from fkv.policies import scorer


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator as its maker describes it.

    Attributes:
      memory: bytes.
      flops: dense bfloat16 operations a second.
      bandwidth: of its memory, bytes a second.
    """

    memory: float
    flops: float
    bandwidth: float


DEVICES = {
    "TPU v4": Device(32e9, 275e12, 1.228e12),
    "TPU v5e": Device(16e9, 197e12, 0.819e12),
    "TPU v5p": Device(95e9, 459e12, 2.765e12),
    "TPU v6e": Device(32e9, 918e12, 1.64e12),
    "A100": Device(80e9, 312e12, 2.04e12),
    "H100": Device(80e9, 989e12, 3.35e12),
    "H200": Device(141e9, 989e12, 4.8e12),
}
# What is left for a program beside the runtime and what fragments.
USABLE = 0.9

# Shapes of models that the recipes name, so that they can be timed without their weights.
_QWEN3 = {"family": "qwen3", "qk_norm": True, "tied_embeddings": True, "rope_theta": 1e6}
SHAPES = {
    "Qwen/Qwen3-4B": ModelConfig(
        **_QWEN3, vocab_size=151_936, width=2560, layers=36, heads=32, kv_heads=8, head_dim=128,
        mlp_width=9728, max_positions=40_960,
    ),
    "Qwen/Qwen3-1.7B": ModelConfig(
        **_QWEN3, vocab_size=151_936, width=2048, layers=28, heads=16, kv_heads=8, head_dim=128,
        mlp_width=6144, max_positions=40_960,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ModelConfig(
        "qwen2", vocab_size=152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128,
        mlp_width=18_944, qkv_bias=True, max_positions=131_072,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ModelConfig(
        "llama", vocab_size=128_256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
        mlp_width=14_336, rms_eps=1e-5, rope_theta=500_000.0, max_positions=131_072,
        rope_scaling=(
            ("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
            ("original_max_position_embeddings", 8192), ("rope_type", "llama3"),
        ),
    ),
    # No one's model: a hundred million parameters, for machines without an accelerator.
    "random-100m": ModelConfig(
        **_QWEN3, vocab_size=32_000, width=768, layers=10, heads=12, kv_heads=4, head_dim=64,
        mlp_width=2304, max_positions=40_960,
    ),
}  # fmt: skip


def shape_of(model: str | Path, layers: int = 0) -> ModelConfig:
    """The shape of a model: of a directory with `config.json`, or one of `SHAPES` by its name.

    Args:
      layers: how many of its layers; 0 for all.
    """
    if (files.expand(model) / "config.json").is_file():
        config = read(files.expand(model))
    elif model in SHAPES:
        config = SHAPES[model]
    else:
        known = ", ".join(SHAPES)
        raise UserError(
            f"model = {model!r}: no directory with a config.json; shapes known by name are {known}"
        )
    if not 0 <= layers <= config.layers:
        raise UserError(f"benchmark.layers = {layers} must be 0 (all) to {config.layers}")
    return dataclasses.replace(config, layers=layers or config.layers)


# ---- counting


def parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(config)))


def layer_weights(config: ModelConfig) -> int:
    """Entries of the matrices that a token meets in all layers: FLOPs per token are twice that."""
    shapes = param_shapes(config)["layers"]
    small = [name for name in shapes if "norm" in name or "bias" in name]
    return sum(math.prod(x.shape) for name, x in shapes.items() if name not in small)


def parameter_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters."""
    return parameters(config) * jnp.dtype(dtype).itemsize


def cache_bytes(config: ModelConfig, slots: int, dtype: str, statistics: bool = False) -> int:
    """Keys, values and positions of one row in all layers, and sums of attention if it has them.

    Args:
      dtype: the model's; its `cache_dtype` goes first.
    """
    entry = 2 * config.head_dim * jnp.dtype(config.cache_dtype or dtype).itemsize + 4
    entry += 2 * 4 if config.cache_dtype == "int8" else 0  # scales
    entry += 8 * config.group_size if statistics else 0
    return config.layers * config.kv_heads * slots * entry


def decode_bytes(config: ModelConfig, batch: int, slots: int, dtype: str) -> int:
    """Bytes that one decoding step can't avoid reading: each weight once, each row's cache once.

    Of an embedding that is not the unembedding, a step reads `batch` rows, which are left out.
    """
    read = parameters(config)
    if not config.tied_embeddings:
        read -= config.vocab_size * config.width
    weights = read * jnp.dtype(dtype).itemsize
    return weights + batch * cache_bytes(config, slots, dtype)


def decode_flops(config: ModelConfig, batch: int, slots: int) -> int:
    """FLOPs of one decoding step: every matrix once per row, and `4 h d` per layer and slot."""
    matrices = layer_weights(config) + config.vocab_size * config.width
    attended = 4 * config.layers * config.heads * config.head_dim * slots
    return batch * (2 * matrices + attended)


def pass_flops(config: ModelConfig, length: int, slots: int = 0) -> int:
    """FLOPs of a trace through all layers, without the unembedding.

    Args:
      slots: entries that every token attends to under eviction (B + L); 0 for the full cache,
        where it attends to half the trace on average.
    """
    seen = min(slots, length / 2) if slots else length / 2
    attended = 4 * config.layers * config.heads * config.head_dim * seen
    return int(length * (2 * layer_weights(config) + attended))


def label_flops(config: ModelConfig, length: int) -> int:
    """FLOPs of golden labels: a full pass, and every query against every key before it again."""
    again = config.layers * config.heads * config.head_dim * length**2
    return pass_flops(config, length) + again


def _observed_flops(config, rules: scorer.ScorerConfig, length, budget, interval, passes) -> float:
    """Per trace and eviction: the statistics, and `passes` over the scorer's weights."""
    events = max(0, length // interval - budget // interval)
    looked = 2 * config.layers * config.heads * config.head_dim * length * (budget + interval)
    weights = rules.hidden * (scorer.feature_size(config, rules) + 1)
    scored = 2 * passes * config.layers * config.kv_heads * budget * weights * events
    return scored + (looked if rules.statistics else 0)


def sft_flops(
    config: ModelConfig, rules: scorer.ScorerConfig, length: int, budget: int, interval: int
) -> int:
    """FLOPs of a trace in a supervised step: labels, the evicted pass, the scorers forward and
    their weights' gradient. The features carry no gradient, so that is two passes and not three.
    """
    evicted = pass_flops(config, length, budget + interval)
    observed = _observed_flops(config, rules, length, budget, interval, 2)
    return int(label_flops(config, length) + evicted + observed)


def grpo_flops(
    config: ModelConfig,
    rules: scorer.ScorerConfig,
    length: int,
    budget: int,
    interval: int,
    epochs: int = 1,
) -> int:
    """FLOPs of a rollout: its replay with one pass over the scorers and the losses of its tokens;
    and per epoch the replay again with three, the reference being the third.
    """
    evicted = pass_flops(config, length, budget + interval)
    drawn = _observed_flops(config, rules, length, budget, interval, 1)
    updated = _observed_flops(config, rules, length, budget, interval, 3)
    losses = unembedding_flops(config, length)
    return int(evicted + drawn + losses + epochs * (evicted + updated))


def unembedding_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the logits of so many tokens."""
    return 2 * tokens * config.vocab_size * config.width


# ---- memory


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
