"""The shape of a decoder, read from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fkv import files, kinds
from fkv.errors import UserError
from fkv.kinds import Kind, said

ARCHITECTURES = {f"{name}ForCausalLM": name.lower() for name in ("Qwen3", "Qwen2", "Llama")}
CACHE_DTYPES = ("", "int8")
# `max_position_embeddings` where a config has none.
_POSITIONS = {"qwen3": 32_768, "qwen2": 32_768, "llama": 2048}
# Settings of related families that would change the logits, and their neutral values.
_NEUTRAL = {
    **dict.fromkeys((
        "attention_chunk_size", "attention_multiplier", "attn_logit_softcapping", "clip_qkv",
        "dim_model_base", "final_logit_softcapping", "no_rope_layers", "query_pre_attn_scalar",
        "scale_depth",
    )),
    **dict.fromkeys((
        "embedding_multiplier", "logit_scale", "logits_scaling", "partial_rotary_factor",
        "residual_multiplier", "rotary_pct", "scale_emb",
    ), 1),
    **dict.fromkeys((
        "alibi", "parallel_residual", "rope_interleave", "rope_interleaved",
        "use_bidirectional_attention", "use_mrope", "use_parallel_residual",
    ), False),
    **dict.fromkeys(("is_causal", "scale_attn_weights"), True),
}  # fmt: skip
_LENGTH = "original_max_position_embeddings"
# Rotary scalings with their required fields, and the optional fields of YaRN.
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "yarn": ("factor", _LENGTH),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_POSITIVE = kinds.number(0, 1e30, above=True)
_INTEGER = kinds.whole(-(2**31))
_OBJECT = Kind("an object", lambda x: isinstance(x, Mapping))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder of the Qwen3, Qwen2 or Llama family. Hashable, so it can be a static argument.

    Attributes:
      family: `qwen3`, `qwen2` or `llama`.
      vocab_size, width, layers, heads, kv_heads, head_dim, mlp_width: sizes.
      rms_eps: epsilon of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: sorted (name, value) pairs, `rope_type` among them; empty for none. A GGUF file
        may have `factors` [head_dim / 2], which divide the frequencies.
      qk_norm: RMSNorm on queries and keys per head before the rotation (Qwen3).
      qkv_bias, out_bias, mlp_bias: which projections have biases.
      tied_embeddings: the unembedding is the embedding transposed.
      max_positions: the context length the checkpoint was trained for.
      cache_dtype: of cached keys and values; not part of a checkpoint. Empty for the model's own,
        `int8` for `fkv.cache.slots.Int8`.
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
    rope_scaling: tuple[tuple[str, float | str | tuple[float, ...]], ...] = ()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    max_positions: int = 32_768
    cache_dtype: str = ""

    def __post_init__(self):
        if self.cache_dtype not in CACHE_DTYPES:
            raise UserError(
                f"cache_dtype = {self.cache_dtype!r} must be '' (the model's own) or 'int8'"
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head, `G`."""
        return self.heads // self.kv_heads

    def beyond(self, tokens: int, what: str) -> str:
        """A warning if these are more tokens than the model's context length; else empty."""
        positions = _reach(self.max_positions, self.rope_scaling)
        if tokens <= positions:
            return ""
        scaled = "" if positions == self.max_positions else f", scaled to {positions}"
        return (
            f"{what} = {tokens} tokens, beyond max_position_embeddings = {self.max_positions}"
            f"{scaled}: expect degraded text there"
        )

    def inv_frequencies(self) -> tuple[np.ndarray, float]:
        """Rotary inverse frequencies [head_dim / 2] and the factor on cos and sin (float64)."""
        half = self.head_dim // 2
        inv = self.rope_theta ** -(np.arange(half) / half)
        rope = dict(self.rope_scaling)
        kind = rope.get("rope_type", "default")
        if kind == "linear":
            return inv / rope["factor"], 1.0
        if kind == "factors":
            return inv / np.array(rope["factors"]), 1.0
        if kind == "llama3":
            # Long wavelengths are stretched, short ones kept, those between are blended.
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope[_LENGTH] * inv / (2 * math.pi)
            blend = np.clip((turns - low) / (high - low), 0, 1)
            return inv * (blend + (1 - blend) / rope["factor"]), 1.0
        return _yarn(inv, rope, self) if kind == "yarn" else (inv, 1.0)


def _yarn(inv: np.ndarray, rope: dict[str, Any], config: ModelConfig) -> tuple[np.ndarray, float]:
    half, factor = len(inv), rope["factor"]

    def dim_of_turns(turns):
        return half * math.log(rope[_LENGTH] / (turns * 2 * math.pi)) / math.log(config.rope_theta)

    def scale(m=1.0):
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dim_of_turns(rope.get("beta_fast", 32)), dim_of_turns(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    attention = rope.get("attention_factor")
    if attention is None:
        both = "mscale" in rope and "mscale_all_dim" in rope
        attention = scale(rope["mscale"]) / scale(rope["mscale_all_dim"]) if both else scale()
    return inv * ((1 - ramp) + ramp / factor), float(attention)


def _reach(positions: int, scaling: tuple[tuple[str, float | str], ...]) -> int:
    """The context length of a model with `positions`, rotary scaling included."""
    rope = dict(scaling)
    if rope.get("rope_type") == "linear":
        return int(positions * rope["factor"])
    if rope.get("rope_type") == "yarn":
        return max(positions, int(rope[_LENGTH] * rope["factor"]))
    return positions


def read(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory.

    Raises:
      UserError: the file is missing, is not JSON, or describes a decoder that is not supported.
    """
    path = files.expand(directory) / "config.json"
    return from_hf(files.read_json(path), str(path))


def from_hf(config: Mapping, where: str = "config.json") -> ModelConfig:
    """Reads the dictionary of a Hugging Face `config.json`.

    Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and
    `rope_parameters` (transformers 5). Absent fields take transformers' defaults.

    Raises:
      UserError: a field is missing or of the wrong kind, or the architecture is not supported.
    """

    def integer(key, default=None, most=2**24):
        value = config.get(key)
        return _checked(where, key, default if value is None else value, kinds.whole(1, most))

    def flag(key):
        return _checked(where, key, config.get(key, False), kinds.SWITCH)

    family = _family(config, where)
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantised checkpoints are not supported; use the bfloat16 one")
    _checked(where, "hidden_act", config.get("hidden_act", "silu"), kinds.one_of(("silu", "swish")))
    for key, neutral in _NEUTRAL.items():
        _check_neutral(where, key, config.get(key), neutral)
    layers = integer("num_hidden_layers", most=4096)
    positions = integer("max_position_embeddings", _POSITIONS[family], 2**31 - 1)
    theta, scaling = _rope(config, positions, where)
    if _slides(config, family, layers, flag("use_sliding_window"), where):
        # A window as wide as the context masks nothing.
        if (config.get("sliding_window") or 0) < _reach(positions, scaling):
            raise UserError(f"{where}: sliding-window attention is not supported")
    below_one = kinds.number(0, 1, below=True)
    eps = _checked(where, "rms_norm_eps", config.get("rms_norm_eps", 1e-6), below_one)
    width, heads = integer("hidden_size"), integer("num_attention_heads")
    kv_heads = integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"{where}: {heads} heads are not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = integer("head_dim", 128 if family == "qwen3" else max(width // heads, 1))
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd, and rotary embeddings need pairs")
    bias = flag("attention_bias") and family != "qwen2"
    return ModelConfig(
        family, integer("vocab_size"), width, layers, heads, kv_heads, head_dim,
        mlp_width=integer("intermediate_size"), rms_eps=float(eps), rope_theta=theta,
        rope_scaling=scaling, qk_norm=family == "qwen3", qkv_bias=family == "qwen2" or bias,
        out_bias=bias, mlp_bias=flag("mlp_bias") and family == "llama",
        tied_embeddings=flag("tie_word_embeddings"), max_positions=positions,
    )  # fmt: skip


def _checked(where: str, key: str, value: Any, kind: Kind) -> Any:
    """The value of a field, checked to be of this kind."""
    kinds.check(f"{where}: {key}", value, kind)
    return value


def _check_neutral(where: str, key: str, value: Any, neutral: Any) -> None:
    if value is not None and value != neutral:
        raise UserError(f"{where}: {key} = {said(value)} is not supported, only {neutral!r}")


def _family(config: Mapping, where: str) -> str:
    """The family, from `architectures` or else `model_type`."""
    names, model_type = config.get("architectures"), config.get("model_type")
    if names is not None:
        _checked(where, "architectures", names, kinds.several(kinds.TEXT, "a list of names"))
    if model_type is not None:
        _checked(where, "model_type", model_type, kinds.TEXT)
    name = names[0] if names else model_type
    family = ARCHITECTURES.get(name, name if name in ARCHITECTURES.values() else None)
    if family is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{where}: architecture {said(name)} is not supported; use one of {known}")
    if model_type not in (None, family):
        raise UserError(f"{where}: architectures say {family!r}, but model_type {said(model_type)}")
    return family


def _slides(config: Mapping, family: str, layers: int, asked: bool, where: str) -> bool:
    """Whether any layer has a sliding window, as transformers decides it."""
    window = config.get("sliding_window")
    if window is not None:
        _checked(where, "sliding_window", window, _INTEGER)
    most = _checked(where, "max_window_layers", config.get("max_window_layers", 28), _INTEGER)
    if (of_layers := config.get("layer_types")) is not None:
        known = kinds.one_of(("full_attention", "sliding_attention"))
        what = f"a list of {layers} full_attention or sliding_attention"
        _checked(where, "layer_types", of_layers, kinds.several(known, what, layers))
        return "sliding_attention" in of_layers
    if family == "llama":
        # Not a field of Llama: transformers ignores it, other engines may not.
        return asked or (window is not None and "use_sliding_window" not in config)
    return asked and (window is not None or "sliding_window" not in config) and most < layers


def _rope(
    config: Mapping, positions: int, where: str
) -> tuple[float, tuple[tuple[str, float | str], ...]]:
    """The base of the rotary frequencies, and their scaling as sorted pairs."""
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None:
            _checked(where, key, config[key], _OBJECT)
    # As in transformers, `rope_scaling` takes precedence and does not mix with `rope_parameters`.
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    spelled = config.get(field) or {}
    if any(isinstance(value, Mapping) for value in spelled.values()):
        raise UserError(f"{where}: rotary settings that differ by layer are not supported")

    places = (spelled, config, config.get("rope_parameters") or {})
    bases = [place["rope_theta"] for place in places if "rope_theta" in place] or [10_000.0]
    theta = next((x for x in bases if x is not None), None)
    theta = float(_checked(where, "rope_theta", theta, kinds.number(1, 1e30, above=True)))
    kind = spelled.get("rope_type", spelled.get("type", "default"))
    _checked(where, f"{field}.rope_type", kind, kinds.one_of(list(_SCALINGS)))
    for key, neutral in {"partial_rotary_factor": 1, "mrope_section": None}.items():
        _check_neutral(where, f"{field}.{key}", spelled.get(key), neutral)
    if kind == "default":
        if spelled.get("factor") not in (None, 1):
            raise UserError(f"{where}: {field}.factor needs a rope_type: {', '.join(_SCALINGS)}")
        return theta, ()

    # Other fields are ignored, as by transformers: DeepSeek-R1-0528-Qwen3-8B has `attn_factor`.
    needed = _SCALINGS[kind]
    rope = {k: spelled[k] for k in (*needed, *_OPTIONAL) if spelled.get(k) is not None}

    def positive(key):
        return _checked(where, f"{field}.{key}", rope.get(key), _POSITIVE)

    if _LENGTH in needed:
        outside = config.get(_LENGTH)  # takes precedence, as in transformers
        rope[_LENGTH] = rope.get(_LENGTH, positions) if outside is None else outside
        length = positive(_LENGTH)
        if kind == "yarn" and "factor" in spelled:
            rope.setdefault("factor", positions / length)
    for key in ("mscale", "mscale_all_dim"):  # 0 means none
        if rope.get(key) == 0:
            del rope[key]
    for key in dict.fromkeys((*needed, *rope)):
        positive(key)
    if kind == "llama3":
        above = kinds.number(rope["low_freq_factor"], above=True)
        _checked(where, f"{field}.high_freq_factor", rope["high_freq_factor"], above)
    if "truncate" in spelled:
        truncate = spelled["truncate"] or False  # null is false, as in transformers
        rope["truncate"] = _checked(where, f"{field}.truncate", truncate, kinds.SWITCH)
    return theta, tuple(sorted({**rope, "rope_type": kind}.items()))
