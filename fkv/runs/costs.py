"""The cost of a model, from its shape alone: parameters, bytes, FLOPs.

A multiply-add is two FLOPs. Only matrix products count, and only the unmasked half of causal
attention, so wasted work never inflates utilisation.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from fkv import files
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import ModelConfig, find, read
from fkv.models.decoder import param_shapes
from fkv.policies import arrival
from fkv.policies.base import Policy
from fkv.policies.scorer import ScorerConfig, feature_size


@dataclasses.dataclass(frozen=True)
class Device:
    """The data sheet of an accelerator."""

    memory: float  # bytes
    flops: float  # dense bfloat16 FLOPs per second
    bandwidth: float  # of its memory, bytes per second


DEVICES = {
    "TPU v4": Device(32 * 2**30, 275e12, 1.228e12),
    "TPU v5e": Device(16 * 2**30, 197e12, 0.819e12),
    "TPU v5p": Device(95 * 2**30, 459e12, 2.765e12),
    "TPU v6e": Device(32 * 2**30, 918e12, 1.64e12),
    "A100": Device(85.1e9, 312e12, 2.04e12),
    "H100": Device(84.9e9, 989e12, 3.35e12),
    "H200": Device(150.1e9, 989e12, 4.8e12),
}
USABLE = 0.9  # of a device's memory, after runtime and fragmentation

# Model shapes of the recipes, to time them without weights.
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
    # A hundred million random parameters, for machines without an accelerator.
    "random-100m": ModelConfig(
        **_QWEN3, vocab_size=32_000, width=768, layers=10, heads=12, kv_heads=4, head_dim=64,
        mlp_width=2304, max_positions=40_960,
    ),
}  # fmt: skip


def shape_of(model: str | Path, layers: int = 0) -> ModelConfig:
    """The shape of a model, from its files here or `SHAPES`; 0 `layers` for all."""
    path = files.expand(model)
    if (path / "config.json").is_file() or path.is_file() or str(model).startswith("pip:"):
        config = read(find(model))
    elif model in SHAPES:
        config = SHAPES[model]
    else:
        raise UserError(
            f"model = {model!r}: no directory with a config.json, and no GGUF file; shapes known "
            "by name are " + ", ".join(SHAPES)
        )
    if not 0 <= layers <= config.layers:
        raise UserError(f"benchmark.layers = {layers} must be 0 (all) to {config.layers}")
    return dataclasses.replace(config, layers=layers or config.layers)


# ---- counting


def parameters(config: ModelConfig) -> int:
    """Number of parameters of the model."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(config)))


def layer_weights(config: ModelConfig) -> int:
    """Number of entries in all layers' matrices: half the FLOPs per token."""
    shapes = param_shapes(config)["layers"]
    matrices = [name for name in shapes if "norm" not in name and "bias" not in name]
    return sum(math.prod(shapes[name].shape) for name in matrices)


def parameter_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters."""
    return parameters(config) * jnp.dtype(dtype).itemsize


def cache_bytes(config: ModelConfig, slots: int, dtype: str, policy: Policy | None = None) -> int:
    """Bytes of one row's cache in all layers: keys, values and positions.

    The config's `cache_dtype` takes precedence over the model's `dtype`.

    Args:
      policy: whose numbers of entries count, too: attention sums, and what its `arrive` gives.
    """
    entry = 2 * config.head_dim * jnp.dtype(config.cache_dtype or dtype).itemsize + 4
    entry += 2 * 4 if config.cache_dtype == "int8" else 0  # scales
    if policy is not None:
        entry += 8 * config.group_size if policy.statistics else 0
        entry += size(arrival.shapes(policy, config, jnp.dtype(dtype)))
    return config.layers * config.kv_heads * slots * entry


def evicted_bytes(config: ModelConfig, policy: Policy, cadence: Cadence, dtype: str) -> int:
    """`cache_bytes` under a policy that evicts: of all slots that it allocates."""
    slots = policy.capacity(cadence.budget) + cadence.interval
    return cache_bytes(config, slots, dtype, policy)


def decode_bytes(config: ModelConfig, batch: int, slots: int, dtype: str) -> int:
    """Bytes that a decoding step has to read: each weight once, each row's cache once.

    The `batch` rows of an untied embedding are left out.
    """
    read = parameters(config)
    if not config.tied_embeddings:
        read -= config.vocab_size * config.width
    return read * jnp.dtype(dtype).itemsize + batch * cache_bytes(config, slots, dtype)


def decode_flops(config: ModelConfig, batch: int, slots: int) -> int:
    """FLOPs of a decoding step: each matrix once per row, and `4 h d` per layer and slot."""
    matrices = layer_weights(config) + config.vocab_size * config.width
    attended = 4 * config.layers * config.heads * config.head_dim * slots
    return batch * (2 * matrices + attended)


def pass_flops(config: ModelConfig, length: int, slots: int = 0) -> int:
    """FLOPs of a trace through all layers, without the unembedding.

    Under eviction a token attends to `slots` entries (B + L); with a full cache (0), to half the
    trace on average.
    """
    seen = min(slots, length / 2) if slots else length / 2
    attended = 4 * config.layers * config.heads * config.head_dim * seen
    return int(length * (2 * layer_weights(config) + attended))


def unembedding_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the logits of this many tokens."""
    return 2 * tokens * config.vocab_size * config.width


def label_flops(config: ModelConfig, length: int) -> int:
    """FLOPs of golden labels: a full pass, then every query against all earlier keys again."""
    again = config.layers * config.heads * config.head_dim * length**2
    return pass_flops(config, length) + again


def sft_flops(
    config: ModelConfig,
    scorers: Sequence[ScorerConfig],
    length: int,
    cadence: Cadence,
    owns: Sequence[ScorerConfig] = (),
) -> int:
    """FLOPs per trace of a supervised step: labels, and passes under eviction with the scorers.

    Up to the first eviction they are the pass of the labels, or, if the cache is quantised, one of
    their own. Scorers take two passes, forward and weight gradient: features carry no gradient.
    Those that evict take a third, and scores of what they hold, every query against all earlier
    keys once more.

    Args:
      scorers: that learn side by side from one pass, of golden evictions.
      owns: that learn from passes of their own, one each.
    """
    found = label_flops(config, length)
    if scorers:
        first, *rest = sorted(scorers, key=lambda x: x.statistics is None)
        found += _evicted_flops(config, first, length, cadence, 2)
        found += sum(_scorer_flops(config, x, length, cadence, 2) for x in rest)
    if owns:
        found += label_flops(config, length) - pass_flops(config, length)
        found += sum(_evicted_flops(config, x, length, cadence, 3) for x in owns)
    shared = bool(scorers) + len(owns) - bool(config.cache_dtype)
    return int(found - shared * pass_flops(config, min(length, cadence.slots)))


def grpo_flops(
    config: ModelConfig,
    scorers: ScorerConfig,
    length: int,
    cadence: Cadence,
    rollouts: int,
    epochs: int = 1,
) -> int:
    """FLOPs per rollout: sampled and its losses measured; then replayed in each of several epochs.

    One epoch is a single pass, whose beginning the `rollouts` of a trace share. In it scorers take
    four: two as above, one of the reference, and one for the gradient of the KL. In one of several
    epochs they take three.
    """
    losses = unembedding_flops(config, length - cadence.slots)
    if epochs == 1:
        return int(losses + _evicted_flops(config, scorers, length, cadence, 4, rollouts))
    drawn = _evicted_flops(config, scorers, length, cadence, 1)
    updated = _evicted_flops(config, scorers, length, cadence, 3)
    return int(losses + drawn + epochs * updated)


def _evicted_flops(config, scorers, length, cadence: Cadence, passes, rollouts=1) -> float:
    """FLOPs of a row under eviction, with statistics and `passes` over the scorers.

    Of `rollouts` rows, which share what comes before the first eviction.
    """
    begun = min(length, cadence.slots)
    later = length - begun
    per_slot = config.layers * config.heads * config.head_dim * cadence.slots
    found = pass_flops(config, begun) / rollouts
    found += later * (2 * layer_weights(config) + 4 * per_slot)
    found += _scorer_flops(config, scorers, length, cadence, passes)
    if scorers.statistics:
        found += 2 * per_slot * (begun / rollouts + later)
    return found


def _scorer_flops(config, scorers, length, cadence: Cadence, passes) -> int:
    """FLOPs of `passes` over the scorers, for a trace."""
    events = max(0, (length - 1) // cadence.interval - cadence.fill_chunks)
    weights = scorers.hidden * (feature_size(config, scorers) + 1)
    return 2 * passes * config.layers * config.kv_heads * cadence.budget * weights * events


# ---- memory


def temporaries(step: Callable, *arguments) -> int:
    """Bytes that a step needs besides its arguments (shapes) and results, as compiled here."""
    compiled = jax.jit(step).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def size(tree) -> int:
    """Bytes of a pytree of arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest(points: Sequence[tuple[int, float]], memory: float, multiple: int = 1) -> int:
    """The largest x that fits, by the line through two points (x, bytes), rounded down; else 0."""
    (x, low), (y, high) = points
    slope = (high - low) / (y - x)
    most = (memory * USABLE - low) / slope + x
    return max(int(most // multiple) * multiple, 0)
