"""What a model costs by its shape: parameters, bytes, floating-point operations; and what a device
can do, by table or measured on the spot.

A multiplication and an addition are two operations (FLOPs). Only matrix products are counted, and
of causal attention only the half that is not masked, so a share of the peak that is computed with
these figures is never flattered by wasted work.
"""

import dataclasses
import math
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from fkv import models, scorer
from fkv.errors import UserError
from fkv.models import ModelConfig
from fkv.models.config import read
from fkv.models.decoder import param_shapes

# Peak bfloat16 FLOP/s (dense) and bytes/s of memory, from the makers' data sheets, by a part of
# the name that the device gives itself.
DEVICES = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
    "TPU v6": (918e12, 1.64e12),
    "TPU v5p": (459e12, 2.765e12),
    "TPU v5": (197e12, 0.819e12),
    "TPU v4": (275e12, 1.228e12),
}

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
    if (Path(model).expanduser() / "config.json").is_file():
        config = read(Path(model).expanduser())
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


def random_weights(config: ModelConfig, dtype: str, seed: int = 0) -> models.Params:
    """Random parameters of a shape, drawn on the device."""
    cast = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(dtype), models.init(key, config)),
    )
    return cast(jax.random.key(seed))


# ---- counting


def parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(config)))


def layer_weights(config: ModelConfig) -> int:
    """Entries of the matrices that a token meets in all layers: FLOPs per token are twice that."""
    shapes = param_shapes(config)["layers"]
    small = [name for name in shapes if "norm" in name or "bias" in name]
    return sum(math.prod(x.shape) for name, x in shapes.items() if name not in small)


def cache_bytes(config: ModelConfig, slots: int, dtype: str) -> int:
    """Keys, values and positions of one row in all layers."""
    entry = 2 * config.head_dim * jnp.dtype(dtype).itemsize + 4
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
    losses = 2 * length * config.vocab_size * config.width
    return int(evicted + drawn + losses + epochs * (evicted + updated))


# ---- what the device can do


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The most that a device does in a second.

    Attributes:
      flops, bandwidth: FLOP/s, and bytes/s read from memory.
      source: where the figures are from.
    """

    flops: float
    bandwidth: float
    source: str

    def roofline(self, flops: float, bytes_read: float) -> tuple[float, str]:
        """Seconds that work can't beat, and whether `memory` or `compute` sets them."""
        by = {"compute": flops / self.flops, "memory": bytes_read / self.bandwidth}
        bound = max(by, key=by.get)
        return by[bound], bound


def peaks(source: str, dtype: str, repeats: int = 5) -> Peaks:
    """What the device can do.

    Args:
      source: `measured`, or a name of `DEVICES` for what its maker says.
    """
    if source in DEVICES:
        return Peaks(*DEVICES[source], f"data sheet of {source}, bfloat16")
    if source != "measured":
        known = ", ".join(["measured", *DEVICES])
        raise UserError(f"benchmark.peaks = {source!r} must be one of {known}")
    on_cpu = jax.default_backend() == "cpu"
    size, side = (2**26, 1024) if on_cpu else (2**30, 8192)

    def best(function, *args):
        function(*args).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            function(*args).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    many = jnp.ones((size,), jnp.float32)  # 256 MiB, or 4 GiB: more than any processor's cache
    read = size * 4 / best(jax.jit(jnp.sum), many)
    # A sum on the CPU may run on one core, a copy reads and writes: take what is larger.
    copied = 2 * size * 4 / best(jax.jit(lambda x: x + 1), many)
    del many
    square = jnp.ones((side, side), dtype)
    work = 2 * side**3 / best(jax.jit(jnp.matmul), square, square)
    return Peaks(work, max(read, copied), f"measured: {size * 4 >> 20} MiB read or copied, {side}² "
                 f"{dtype} matrices multiplied")  # fmt: skip


def memory_limit(given: float = 0.0) -> int:
    """Bytes that programs may use: `given` GiB, else the device's, else 80 % of the host's."""
    if given:
        return int(given * 2**30)
    stats = jax.devices()[0].memory_stats()
    if stats and stats.get("bytes_limit"):
        return stats["bytes_limit"]
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
        return int(0.8 * pages * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return 8 * 2**30


def peak_memory() -> dict:
    """The most that this process has used: of the device where it says, else of the host."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "device, whole run"}
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak * (1 if sys.platform == "darwin" else 1024), "of": "host, whole run"}


def cores() -> int:
    """Processor cores that this process may use, as JAX and the peers do."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load() -> float:
    """Processes that wanted to run in the last minute, on average; nan where unknown."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else math.nan


def program_bytes(compiled) -> int:
    """What a compiled program holds at its peak, arguments included; donated ones count once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
