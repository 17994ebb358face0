"""The shape of a decoder, read from a Hugging Face `config.json`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fkv.errors import UserError

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
CACHE_DTYPES = ("", "int8")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder of the Qwen3, Qwen2 or Llama family. Hashable, so it can be a static argument.

    Attributes:
      family: `qwen3`, `qwen2` or `llama`.
      vocab_size, width, layers, heads, kv_heads, head_dim, mlp_width: sizes.
      rms_eps: epsilon of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: sorted (name, value) pairs of the scaling with its `rope_type`; empty for none.
      qk_norm: RMSNorm on queries and keys per head before the rotation (Qwen3).
      qkv_bias, out_bias, mlp_bias: which projections have biases.
      tied_embeddings: the unembedding is the embedding transposed.
      max_positions: the length the checkpoint was made for.
      kernel: of attention while decoding, see `attention.attend_one`; not of the checkpoint.
      cache_dtype: of cached keys and values, what no checkpoint says: empty for the model's own, or
        `int8`, see `fkv.cache.Int8`.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rms_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, float | str], ...] = ()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    max_positions: int = 32_768
    cache_dtype: str = ""
    kernel: str = "plain"

    def __post_init__(self):
        if self.cache_dtype not in CACHE_DTYPES:
            raise UserError(
                f"cache_dtype = {self.cache_dtype!r} must be '' (the model's own) or 'int8'"
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head, `G`."""
        return self.heads // self.kv_heads

    def inv_frequencies(self) -> tuple[np.ndarray, float]:
        """Rotary inverse frequencies [head_dim / 2] and the factor on cos and sin (float64)."""
        return _inv_frequencies(self)


def from_hf(config: Mapping, where: str = "config.json") -> ModelConfig:
    """Reads the dictionary of a Hugging Face `config.json`.

    Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and
    `rope_parameters` (transformers 5).

    Raises:
      UserError: the architecture or a setting of it is not supported, or a field is missing.
    """
    names = config.get("architectures") or [config.get("model_type")]
    name = names[0]
    family = ARCHITECTURES.get(name, name if name in ARCHITECTURES.values() else None)
    if family is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{where}: architecture {name!r} is not supported; supported are {known}")

    def need(key):
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{where}: the field {key!r} must be a positive integer, not {value!r}")
        return value

    if config.get("quantization_config"):
        raise UserError(f"{where}: quantised checkpoints are not supported; use the bfloat16 one")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{where}: hidden_act {config['hidden_act']!r} is not supported, only 'silu'"
        )
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise UserError(f"{where}: sliding-window attention is not supported")

    # As transformers: `rope_scaling` goes first, and does not mix with `rope_parameters`.
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{where}: rotary settings that differ by layer are not supported")
    spelled = (rope, config, config.get("rope_parameters") or {})
    theta = next((s["rope_theta"] for s in spelled if s.get("rope_theta")), 10_000.0)
    rope.pop("rope_theta", None)
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise UserError(
            f"{where}: rope_type {rope['rope_type']!r} is not supported; known: {known}"
        )
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", need("max_position_embeddings"))
    for key in _SCALINGS[rope["rope_type"]]:
        if not isinstance(rope.get(key), (int, float)):
            raise UserError(f"{where}: rope scaling {rope['rope_type']!r} needs a number {key!r}")
    scaling = () if rope["rope_type"] == "default" else tuple(sorted(rope.items()))

    width, heads = need("hidden_size"), need("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    bias = bool(config.get("attention_bias", False)) and family != "qwen2"
    return ModelConfig(
        family=family,
        vocab_size=need("vocab_size"),
        width=width,
        layers=need("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or width // heads,
        mlp_width=need("intermediate_size"),
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        rope_scaling=scaling,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config.get("max_position_embeddings", 32_768)),
    )


def read(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory.

    Raises:
      UserError: the file is missing, is not JSON, or describes a decoder that is not supported.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise UserError(
            f"{path}: no such file; a Hugging Face checkpoint directory is needed"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; take the config.json of a checkpoint")
    return from_hf(config, str(path))


# The scaling forms and the fields each one needs.
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _inv_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    half = config.head_dim // 2
    inv = config.rope_theta ** -(np.arange(half) / half)
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return inv / scaling["factor"], 1.0
    if kind == "llama3":
        # Long wavelengths are stretched, short ones kept, those between are blended.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv / (2 * math.pi)
        blend = np.clip((turns - low) / (high - low), 0, 1)
        return inv * (blend + (1 - blend) / scaling["factor"]), 1.0
    if kind == "yarn":
        factor, length = scaling["factor"], scaling["original_max_position_embeddings"]

        def dim_of_turns(turns):
            return half * math.log(length / (turns * 2 * math.pi)) / math.log(config.rope_theta)

        low = dim_of_turns(scaling.get("beta_fast") or 32)
        high = dim_of_turns(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.head_dim - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        inv = inv * ((1 - ramp) + ramp / factor)

        def scale(m=1.0):
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention = scaling.get("attention_factor")
        if attention is None:
            mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
            attention = scale(mscale) / scale(all_dim) if mscale and all_dim else scale()
        return inv, float(attention)
    return inv, 1.0
