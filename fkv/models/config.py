"""The shape of a decoder, read from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fkv import files
from fkv.errors import UserError
from fkv.kinds import said

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
CACHE_DTYPES = ("", "int8")
KERNELS = ("plain", "gpu", "tpu", "interpret")
# Beyond any model of these families: a wrong size is found before anything is made of it.
_LARGEST, _MOST_LAYERS = 2**24, 4096
# `max_position_embeddings` where a config has none.
_POSITIONS = {"qwen3": 32_768, "qwen2": 32_768, "llama": 2048}
# Settings of related families that change the numbers, and the value that does not.
_NEUTRAL = {
    "alibi": False,
    "attention_chunk_size": None,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "dim_model_base": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": None,
    "is_causal": True,
    "logit_scale": 1,
    "logits_scaling": 1,
    "no_rope_layers": None,
    "parallel_residual": False,
    "partial_rotary_factor": 1,
    "query_pre_attn_scalar": None,
    "residual_multiplier": 1,
    "rope_interleave": False,
    "rope_interleaved": False,
    "rotary_pct": 1,
    "scale_attn_weights": True,
    "scale_depth": None,
    "scale_emb": 1,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_parallel_residual": False,
}


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
      kernel: of attention while decoding; no checkpoint says it. `plain` is `attention.attend`,
        `gpu` and `tpu` are the Pallas kernels of `fkv.cache.kernels`; `interpret` runs the first of
        these on any device, slowly, for tests.
      cache_dtype: of cached keys and values; no checkpoint says it. Empty is the model's own,
        `int8` makes them `fkv.cache.slots.Int8`.
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
        if self.kernel not in KERNELS:
            raise UserError(f"kernel = {self.kernel!r} must be one of {', '.join(KERNELS)}")
        if self.cache_dtype and self.kernel != "plain":
            raise UserError(
                f"kernel = {self.kernel!r} reads caches in the model's dtype only: set kernel to "
                "'plain', or cache_dtype to ''"
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head, `G`."""
        return self.heads // self.kv_heads

    def beyond(self, tokens: int, what: str) -> str:
        """A warning where so many tokens are more than the model was made for; else empty."""
        positions = _reach(self.max_positions, self.rope_scaling)
        if tokens <= positions:
            return ""
        scaled = "" if positions == self.max_positions else f", scaled to {positions}"
        return (
            f"{what} = {tokens} tokens, beyond max_position_embeddings = {self.max_positions}"
            f"{scaled}: what it says there is not to be relied on"
        )

    def inv_frequencies(self) -> tuple[np.ndarray, float]:
        """Rotary inverse frequencies [head_dim / 2] and the factor on cos and sin (float64)."""
        return _inv_frequencies(self)


def _reach(positions: int, scaling: tuple[tuple[str, float | str], ...]) -> int:
    """The length that a model of so many positions was made for, its scaling included."""
    rope = dict(scaling)
    if rope.get("rope_type") == "linear":
        return int(positions * rope["factor"])
    if rope.get("rope_type") == "yarn":
        return max(positions, int(rope[_LENGTH] * rope["factor"]))
    return positions


def from_hf(config: Mapping, where: str = "config.json") -> ModelConfig:
    """Reads the dictionary of a Hugging Face `config.json`.

    Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and
    `rope_parameters` (transformers 5). What is absent has the default that transformers gives it.

    Raises:
      UserError: the architecture or a setting of it is not supported, or a field is missing or of
        the wrong kind.
    """

    def wrong(key, wanted):
        return UserError(
            f"{where}: the field {key!r} must be {wanted}, not {said(config.get(key))}"
        )

    def need(key, default=None, most=_LARGEST):
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise wrong(key, "a positive integer")
        if value > most:
            raise wrong(key, f"{most:,} at most")
        return value

    def flag(key):
        if not isinstance(config.get(key, False), bool):
            raise wrong(key, "true or false")
        return config.get(key, False)

    family = _family(config, where)
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: quantised checkpoints (quantization_config) are not supported; "
            "use the bfloat16 one"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(
            f"{where}: hidden_act {said(config['hidden_act'])} is not supported, only 'silu'"
        )
    for key, neutral in _NEUTRAL.items():
        if config.get(key) is not None and config[key] != neutral:
            raise UserError(
                f"{where}: the field {key!r} = {said(config[key])} would change what the model "
                "computes, and is not supported"
            )
    layers = need("num_hidden_layers", most=_MOST_LAYERS)
    positions = need("max_position_embeddings", _POSITIONS[family], 2**31 - 1)
    theta, scaling = _rope(config, positions, where)
    reach = _reach(positions, scaling)
    if _slides(config, family, layers, reach, flag("use_sliding_window"), where):
        raise UserError(
            f"{where}: sliding-window attention is not supported, and some layers slide by "
            "layer_types, or use_sliding_window, sliding_window and max_window_layers"
        )
    eps = config.get("rms_norm_eps", 1e-6)
    if not _is_number(eps) or not 0 <= eps < 1:
        raise wrong("rms_norm_eps", "a number from 0 to 1")

    width, heads = need("hidden_size"), need("num_attention_heads")
    kv_heads = need("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    head_dim = need("head_dim", 128 if family == "qwen3" else max(width // heads, 1))
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd, and rotary embeddings need pairs")
    bias = flag("attention_bias") and family != "qwen2"
    return ModelConfig(
        family=family,
        vocab_size=need("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=need("intermediate_size"),
        rms_eps=float(eps),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=flag("mlp_bias") and family == "llama",
        tied_embeddings=flag("tie_word_embeddings"),
        max_positions=positions,
    )


def _family(config: Mapping, where: str) -> str:
    """The family that `architectures` or else `model_type` names."""
    names, kind = config.get("architectures"), config.get("model_type")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise UserError(
            f"{where}: the field 'architectures' must be a list of names, not {said(names)}"
        )
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{where}: the field 'model_type' must be a name, not {said(kind)}")
    name = names[0] if names else kind
    family = ARCHITECTURES.get(name, name if name in ARCHITECTURES.values() else None)
    if family is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"{where}: architecture {said(name)} is not supported; supported are {known}"
        )
    if kind not in (None, family):
        raise UserError(
            f"{where}: architectures say {family!r}, but model_type {said(kind)}: "
            "take the config.json of the checkpoint"
        )
    return family


def _slides(config: Mapping, family: str, layers: int, reach: int, asked: bool, where: str) -> bool:
    """Whether a window hides anything from any layer, by the rules of transformers."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise UserError(
                f"{where}: the field 'layer_types' must list {layers} layers, not {said(kinds)}"
            )
        if unknown := [x for x in kinds if x not in ("full_attention", "sliding_attention")]:
            raise UserError(f"{where}: layer_types {said(unknown[0])} is not supported")
    for key in ("sliding_window", "max_window_layers"):
        value = config.get(key, 0)
        if type(value) is not int and (value is not None or key == "max_window_layers"):
            raise UserError(f"{where}: the field {key!r} must be an integer, not {said(value)}")
    window = config.get("sliding_window")
    if kinds is not None:
        slides = "sliding_attention" in kinds
    elif family == "llama":
        # Not a field of Llama: transformers ignores it, other engines go by it.
        slides = asked or (window is not None and "use_sliding_window" not in config)
    else:
        has_window = window is not None or "sliding_window" not in config
        slides = asked and has_window and config.get("max_window_layers", 28) < layers
    # A window as wide as the context hides nothing.
    return slides and (window is None or window < reach)


def _rope(
    config: Mapping, positions: int, where: str
) -> tuple[float, tuple[tuple[str, float | str], ...]]:
    """The base of the rotary frequencies, and their scaling as sorted pairs."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            raise UserError(
                f"{where}: the field {key!r} must be an object or null, not {said(config[key])}"
            )
    # As transformers: `rope_scaling` goes first, and does not mix with `rope_parameters`.
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    spelled = config.get(field) or {}
    if any(isinstance(value, Mapping) for value in spelled.values()):
        raise UserError(f"{where}: rotary settings that differ by layer are not supported")
    bases = [
        place["rope_theta"]
        for place in (spelled, config, config.get("rope_parameters") or {})
        if "rope_theta" in place
    ]
    theta = next((x for x in bases if x is not None), None if bases else 10_000.0)
    if not _is_number(theta) or theta <= 1:
        raise UserError(
            f"{where}: the field 'rope_theta' must be a number above 1, not {said(theta)}"
        )

    kind = spelled.get("rope_type", spelled.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise UserError(
            f"{where}: rope_type {said(kind)} of {field} is not supported; known: {known}"
        )
    for key, neutral in {"partial_rotary_factor": 1, "mrope_section": None}.items():
        if spelled.get(key) not in (None, neutral):
            raise UserError(
                f"{where}: {field} with {key!r} = {said(spelled[key])} is not supported"
            )
    if kind == "default":
        if spelled.get("factor") not in (None, 1):
            raise UserError(
                f"{where}: {field} with 'factor' = {said(spelled['factor'])} needs a "
                f"'rope_type': one of {', '.join(_SCALINGS)}"
            )
        return float(theta), ()
    needed = _SCALINGS[kind]
    # Others are ignored, as transformers does: DeepSeek-R1-0528-Qwen3-8B has `attn_factor`.
    rope = {k: spelled[k] for k in (*needed, *_OPTIONAL) if spelled.get(k) is not None}
    if _LENGTH in needed:
        outside = config.get(_LENGTH)  # goes first, as in transformers
        rope[_LENGTH] = rope.get(_LENGTH, positions) if outside is None else outside
    if kind == "yarn" and "factor" in spelled and _is_number(rope[_LENGTH]) and rope[_LENGTH] > 0:
        rope.setdefault("factor", positions / rope[_LENGTH])
    if not isinstance(rope.pop("truncate", True), bool):
        raise UserError(
            f"{where}: 'truncate' of {field} must be true or false, not {said(spelled['truncate'])}"
        )
    # Without both of them there is no scale, and 0 is none.
    for key in ("mscale", "mscale_all_dim"):
        if type(rope.get(key)) in (int, float) and rope[key] == 0:
            del rope[key]
    for key in dict.fromkeys((*needed, *rope)):
        if not _is_number(rope.get(key)) or rope[key] <= 0:
            raise UserError(
                f"{where}: {field} {kind!r} needs a number {key!r} above 0, "
                f"not {said(rope.get(key))}"
            )
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise UserError(
            f"{where}: {field} 'llama3' needs a 'high_freq_factor' above its "
            f"'low_freq_factor' {rope['low_freq_factor']}, not {rope['high_freq_factor']}"
        )
    if "truncate" in spelled:
        rope["truncate"] = spelled["truncate"]
    return float(theta), tuple(sorted({**rope, "rope_type": kind}.items()))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # neither infinite nor NaN


def read(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory.

    Raises:
      UserError: the file is missing, is not JSON, or describes a decoder that is not supported.
    """
    path = files.expand(directory) / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; a Hugging Face checkpoint directory is needed")
    return from_hf(files.read_json(path), str(path))


_LENGTH = "original_max_position_embeddings"
# The scaling forms and the fields each one needs.
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        _LENGTH,
    ),
    "yarn": ("factor", _LENGTH),
}
# Of YaRN, if they are there and not null.
_OPTIONAL = (
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


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
