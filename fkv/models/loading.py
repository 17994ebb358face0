"""Checkpoints: loads a Hugging Face directory, a GGUF file or a hub id into our parameters, and
saves them as Hugging Face directories.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fkv import files, hub
from fkv.errors import UserError
from fkv.kinds import said
from fkv.models import config as hf_config
from fkv.models import forms, gguf
from fkv.models.config import ARCHITECTURES, ModelConfig, from_hf
from fkv.models.decoder import LM, OUTPUTS_FIRST, WIDTH_LAST, param_shapes, sharding

# Our names to Hugging Face's, for arrays that are the same on both sides.
_TOP = {
    "embed_vm": "model.embed_tokens.weight",
    "final_norm_m": "model.norm.weight",
    "head_vm": "lm_head.weight",
}
# Our names to those under `model.layers.N.`.
_LAYER = {
    "attn_norm_m": "input_layernorm.weight",
    "q_hdm": "self_attn.q_proj.weight",
    "k_kdm": "self_attn.k_proj.weight",
    "v_kdm": "self_attn.v_proj.weight",
    "o_hdm": "self_attn.o_proj.weight",
    "mlp_norm_m": "post_attention_layernorm.weight",
    "gate_mf": "mlp.gate_proj.weight",
    "up_mf": "mlp.up_proj.weight",
    "down_fm": "mlp.down_proj.weight",
    "q_norm_d": "self_attn.q_norm.weight",
    "k_norm_d": "self_attn.k_norm.weight",
    "q_bias_hd": "self_attn.q_proj.bias",
    "k_bias_kd": "self_attn.k_proj.bias",
    "v_bias_kd": "self_attn.v_proj.bias",
    "o_bias_m": "self_attn.o_proj.bias",
    "gate_bias_f": "mlp.gate_proj.bias",
    "up_bias_f": "mlp.up_proj.bias",
    "down_bias_m": "mlp.down_proj.bias",
}
# So many of our first axes are last in a checkpoint: a Linear's weight is [*out, *in] there.
_INPUTS = {"gate_mf": 1, "up_mf": 1, "down_fm": 1, "o_hdm": 2}
JUDGE = "model.layers.{}.self_attn.judge_model."
# What a checkpoint may hold besides the decoder: ForesightKV's released scorers, and the rotary
# buffers of old versions of transformers.
_BESIDE = re.compile(
    r"model\.layers\.\d+\.self_attn\.judge_model\..+|model\..*rotary_emb\.inv_freq"
)
# Files to download: the weights, the configs, and every file of a tokenizer.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "trimkv*.pth"]
_AT_ONCE = 2**23  # numbers of a matrix held in memory while two are compared
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class _Names(NamedTuple):
    """Names of tensors in one kind of checkpoint: at the top, and of a layer after a prefix."""

    top: Mapping[str, str]
    layer: Mapping[str, str]
    prefix: str


_HF = _Names(_TOP, _LAYER, "model.layers.{}.")
_GGUF = _Names(gguf.TOP, gguf.LAYER, gguf.PREFIX)


class _Tensor(NamedTuple):
    """A tensor of the decoder: its name and shape in the checkpoint, our name and the layer."""

    name: str
    shape: tuple[int, ...]
    ours: str
    layer: int | None


class _Stored(NamedTuple):
    """A tensor in the header of a safetensors file."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self, _: Any = None) -> np.ndarray:
        """Its numbers, in the dtype that they are stored in."""
        with _open(self.path) as file:
            return file.get_tensor(self.name)


def load(
    path_or_hub_id: str | Path,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
    separate: bool = False,
) -> LM:
    """Loads a Qwen3, Qwen2 or Llama checkpoint tensor by tensor.

    Args:
      path_or_hub_id: a directory with `config.json` and `model.safetensors` or its shards, a GGUF
        file, the id of a model on the Hugging Face hub (`owner/name`, or `owner/name/file.gguf`),
        downloaded to the hub's cache, or `pip:` and the name of a package that brings a GGUF file.
      dtype: float32, bfloat16 or float16; None for that of the checkpoint (the widest if it
        mixes several; quantised tensors count as float32).
      revision: branch, tag or commit on the hub.
      mesh: devices of this process, from `parallel.make_mesh`, over which tensors are sharded;
        by default all go to the default device.
      separate: the form of the layers, see `LM`: False for replay and training, True to decode.

    Returns:
      The model. `tied_embeddings` follows the tensors, not the config: an `lm_head.weight` that
      differs from the embedding is used.

    Raises:
      UserError: the checkpoint is missing, damaged, not finite, or not the decoder its config
        describes.
    """
    if dtype is not None and dtype not in map(jnp.dtype, _DTYPES.values()):
        raise UserError(f"dtype {dtype!r} is not supported; use {_some(_DTYPES.values())}")
    if not isinstance(mesh, Mesh | None):
        raise UserError(f"mesh = {said(mesh)} must be devices, from fkv.runs.parallel.make_mesh()")
    place = find(path_or_hub_id, revision)
    config, stored, names = read(place), _stored(place), _GGUF if place.is_file() else _HF
    head, embedding = names.top["head_vm"], names.top["embed_vm"]
    if config.tied_embeddings and head in stored and embedding not in stored:
        stored[embedding] = stored.pop(head)
    both = config.tied_embeddings and head in stored
    untied = dataclasses.replace(config, tied_embeddings=False)
    wanted = list(_tensors(untied if both else config, names))
    tensors = {t.name: t for t in wanted}
    strangers = [n for n in stored if n not in tensors and not _BESIDE.fullmatch(n)]
    _refuse(place, "tensors that do not belong to this decoder", strangers)
    _check(place, {t.name: t.shape for t in wanted}, stored)
    if both:
        # As in transformers 5: a head that differs from the embedding is used, tied or not.
        config = dataclasses.replace(config, tied_embeddings=_same(stored[head], stored[embedding]))
        if config.tied_embeddings:
            del tensors[head]
    if dtype is None:
        found = {_DTYPES.get(stored[name].dtype, "float32") for name in tensors}
        dtype = jnp.result_type(*map(jnp.dtype, found))
    dtype = jnp.dtype(dtype)

    shapes = param_shapes(config, separate, separate and forms.is_on_cpu(mesh))
    layers = shapes.pop("layers")
    shapes |= layers[0] if separate else layers
    split = {name: sharding(name, x.shape, mesh) for name, x in shapes.items()}
    if separate:
        layers = tuple({} for _ in layers)
    else:
        layers = {n: jnp.zeros(x.shape, dtype, device=split[n]) for n, x in layers.items()}
    params, finite = {"layers": layers}, {}
    for t in sorted(tensors.values(), key=lambda t: stored[t.name].path):
        name = t.ours if t.ours in shapes else OUTPUTS_FIRST[t.ours]
        ours, turn = split[name], name in _INPUTS
        place = _as_stored(name, ours, t.layer is not None and not separate)
        tensor = jax.device_put(stored[t.name].read(dtype), place)
        if t.layer is None:
            x = params[t.ours] = tensor.astype(dtype)
            finite[t.name] = _finite(x)
        elif separate:
            x, finite[t.name] = _arrange(tensor, shapes[name].shape, dtype, ours, turn)
            layers[t.layer][name] = x
        else:
            x, finite[t.name] = _insert(layers.pop(t.ours), tensor, t.layer, ours, turn)
            layers[t.ours] = x
        x.block_until_ready()  # reading outruns the device: host memory would fill up
    finite = jax.device_get(finite)
    for t in tensors.values():
        if not finite[t.name]:
            raise UserError(
                f"{stored[t.name].path}: {stored[t.name].name} holds NaN or infinity in {dtype}: "
                "the checkpoint is damaged, or needs a wider dtype (bfloat16 or float32)"
            )
    return LM(params, config)


def _as_stored(name: str, ours: NamedSharding | None, stacked: bool) -> NamedSharding | None:
    """The sharding of a checkpoint's tensor whose shards are those of our parameter."""
    if ours is None:
        return None
    axes, inputs = ours.spec[stacked:], _INPUTS.get(name, 0)
    # Of several axes merged in the checkpoint, only the first may be sharded.
    stored = (axes[inputs], axes[0]) if inputs else axes[:1]
    return NamedSharding(ours.mesh, PartitionSpec(*stored))


@jax.jit
def _finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "place", "turn"))
def _arrange(
    tensor: Array, shape: Sequence[int], dtype: jnp.dtype, place: NamedSharding | None, turn: bool
) -> tuple[Array, Array]:
    """A tensor of a checkpoint as the parameter of its layer, and whether it is finite."""
    x = (tensor.T if turn else tensor).reshape(shape).astype(dtype)
    return x if place is None else jax.lax.with_sharding_constraint(x, place), _finite(x)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("place", "turn"))
def _insert(
    stack: Array, tensor: Array, layer: Array, place: NamedSharding | None, turn: bool
) -> tuple[Array, Array]:
    """Writes it into its layer of the stacked parameter, in place."""
    x, finite = _arrange(tensor, stack.shape[1:], stack.dtype, None, turn)
    stack = jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)
    return stack if place is None else jax.lax.with_sharding_constraint(stack, place), finite


def save(directory: str | Path, lm: LM) -> None:
    """Writes a Hugging Face directory that `transformers` (4 and 5) and `load` read.

    Raises:
      UserError: no Hugging Face config of the family describes this decoder.
    """
    config, params = lm.config, lm.params
    chex.assert_trees_all_equal_shapes(params, forms.shapes(lm))
    dtype = jnp.result_type(*jax.tree.leaves(params)).name
    description = _describe(config, dtype)
    if from_hf(description) != config:
        raise UserError(f"no {config.family} config.json can describe {config}")

    host, tensors = jax.device_get(lm), {}
    for t in _tensors(config):
        if t.layer is None:
            tensor = host.params[t.ours]
        else:
            x = forms.parameter(host, t.layer, t.ours)
            tensor = x.reshape(t.shape[::-1]).T if t.ours in _INPUTS else x.reshape(t.shape)
        tensors[t.name] = np.ascontiguousarray(tensor)  # safetensors ignores strides
    directory = files.expand(directory)
    with files.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with files.whole(directory / "model.safetensors") as temporary:
        write_tensors(temporary, tensors, "pt")
    files.write_text(directory / "config.json", json.dumps(description, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, np.ndarray], kind: str) -> None:
    """Writes a safetensors file; `kind` is the format in its metadata (`pt`, `fkv`).

    Raises:
      OSError: the file system fails.
    """
    try:
        save_file(tensors, path, metadata={"format": kind})
    except SafetensorError as error:  # has no errno
        raise OSError(str(error)) from error


def load_judges(path_or_hub_id: str | Path, revision: str | None = None) -> dict[str, np.ndarray]:
    """Reads the scorers of a released ForesightKV checkpoint, as released.

    Their output is an *eviction* score (higher is evicted first): negate `w2` and `b2` for ours.

    Returns:
      float32 arrays `w1 [layers, K, F, 16]`, `b1 [layers, K, 16]`, `w2 [layers, K, 16]` and
      `b2 [layers, K]`, for K KV heads and `F = 2 * head_dim + 8 * group_size` features.

    Raises:
      UserError: the checkpoint has no scorers, or not those of its decoder.
    """
    directory = find(path_or_hub_id, revision)
    if directory.is_file():
        raise UserError(f"{directory}: a file, and scorers are read from directories")
    config, stored = read(directory), _stored(directory)
    k, features = config.kv_heads, 2 * config.head_dim + 8 * config.group_size
    shapes = {"fc1.weight": (k, features, 16), "fc1.bias": (k, 16),
              "fc2.weight": (k, 16, 1), "fc2.bias": (k, 1)}  # fmt: skip
    layers = [JUDGE.format(i) for i in range(config.layers)]
    _check(directory, {p + name: shape for p in layers for name, shape in shapes.items()}, stored)

    w1, b1, w2, b2 = (
        np.stack([stored[p + name].read().astype(np.float32) for p in layers]) for name in shapes
    )
    return {"w1": w1, "b1": b1, "w2": w2[..., 0], "b2": b2[..., 0]}


def files_of_tensors(directory: Path) -> tuple[dict[str, str], int]:
    """The file name of every tensor of a checkpoint, and the bytes of all tensors."""
    stored = _stored(directory)
    bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16}
    size = sum(math.prod(t.shape) * bits.get(t.dtype, 8) // 8 for t in stored.values())
    return {name: t.path.name for name, t in stored.items()}, size


def _tensors(config: ModelConfig, names: _Names = _HF) -> Iterator[_Tensor]:
    """Every tensor of a checkpoint of this decoder."""
    shapes = param_shapes(config)
    for ours, name in names.top.items():
        if ours in shapes:
            yield _Tensor(name, shapes[ours].shape, ours, None)
    for ours, leaf in shapes["layers"].items():
        inputs = _INPUTS.get(ours, 0)
        shape = (math.prod(leaf.shape[1 + inputs :]),)
        if inputs:
            shape += (math.prod(leaf.shape[1 : 1 + inputs]),)
        elif ours in WIDTH_LAST:
            shape = (math.prod(leaf.shape[1:-1]), leaf.shape[-1])
        for layer in range(config.layers):
            name = names.prefix.format(layer) + names.layer[ours]
            yield _Tensor(name, shape, ours, layer)


def read(place: str | Path) -> ModelConfig:
    """The decoder of a directory or GGUF file, as `find` returns them; no weights are read."""
    place = files.expand(place)
    return gguf.read(place) if place.is_file() else hf_config.read(place)


def find(path_or_hub_id: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The directory or GGUF file itself, or the downloaded one of a hub id.

    Args:
      weights: without them only `config.json` of a directory is downloaded.
    """
    name, path = str(path_or_hub_id), files.expand(path_or_hub_id)
    pip = name.startswith(gguf.PIP)
    if pip or path.exists():
        what = "a pip package" if pip else "a directory" if path.is_dir() else "a file"
        if revision is not None:
            raise UserError(f"{path}: revision {revision!r} is for a hub id; this is {what}")
        return gguf.of_pip(name.removeprefix(gguf.PIP)) if pip else _complete(path)
    if found := re.fullmatch(rf"({hub.ID})/(.+\.gguf)", name):
        repo, file = found.groups()
        download = functools.partial(huggingface_hub.hf_hub_download, repo, file)
    elif re.fullmatch(hub.ID, name):
        repo, wanted = name, _FILES if weights else ["config.json"]
        snapshot = huggingface_hub.snapshot_download
        download = functools.partial(snapshot, name, allow_patterns=wanted)
    elif name.endswith(".gguf"):
        raise UserError(f"{path}: no such file, and not one on the hub, owner/name/file.gguf")
    else:
        raise UserError(f"{path}: no such directory, and not a hub id of the form owner/name")
    return _downloaded(name, repo, revision, download)


def _complete(path: Path) -> Path:
    """The path; a directory that holds nothing but GGUF files is refused."""
    if path.is_dir() and not (path / "config.json").exists():
        if found := sorted(path.glob("*.gguf")):
            raise UserError(f"{path}: no config.json; for a GGUF file give its path: {found[0]}")
    return path


def _downloaded(name: str, repo: str, revision: str | None, download: Callable[..., str]) -> Path:
    what = "file" if name.endswith(".gguf") else "directory"
    try:
        return Path(download(revision=revision))
    except GatedRepoError:
        reason = f"access is gated; accept the terms at https://huggingface.co/{repo} and log in"
    except RepositoryNotFoundError:
        reason = f"no such {what} or model on the Hugging Face hub; check the spelling, or log in"
    except RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no revision {revision!r} of this model") from None
    # Offline, the hub's client raises whatever its HTTP library raises.
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(f"{name}: the model is on the hub, but has no such file") from None
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: no such {what}, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}: {reason}); check the network, or give a local {what}"
        ) from error
    raise UserError(f"{name}: {reason} with `hf auth login`")


def _stored(directory: Path) -> dict[str, _Stored | gguf.Stored]:
    """The tensors of a checkpoint by name, from the headers of its files only."""
    if directory.is_file():
        return gguf.stored(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    paths, places = [single], {}
    if index.is_file() and not single.is_file():
        places = files.read_json(index).get("weight_map")
        # In a hub snapshot a shard is a symlink out of the directory, but its name is a plain one.
        if not isinstance(places, dict) or not all(map(_is_plain, places.values())):
            raise UserError(
                f"{index}: not an index of shards, whose 'weight_map' gives every tensor a file in "
                "the same directory; download it again"
            )
        paths = [directory / shard for shard in sorted(set(places.values()))]
    elif not single.is_file():
        both = f"neither {single.name} nor {index.name} is here"
        raise UserError(f"{directory}: {both}; only safetensors and GGUF files are read")
    stored = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {index.name} names it; download it")
        with _open(path) as file:
            for name in file.keys():
                if name in stored:
                    raise UserError(f"{path}: {name} is in {stored[name].path.name}, too")
                view = file.get_slice(name)
                stored[name] = _Stored(name, path, tuple(view.get_shape()), view.get_dtype())
    astray = [n for n, shard in places.items() if n not in stored or stored[n].path.name != shard]
    _refuse(index, "tensors that are not in the files it names", astray)
    return stored


def _is_plain(name: Any) -> bool:
    """Whether this is a plain file name, not a path to elsewhere."""
    return isinstance(name, str) and bool(re.fullmatch(r"(?!\.\.?$)[^/\\\0]{1,255}", name))


def _same(one: _Stored, other: _Stored) -> bool:
    """Whether two stored matrices are equal, compared a few rows at a time."""
    count, width = one.shape
    rows = max(1, _AT_ONCE // width)
    with _open(one.path) as first, _open(other.path) as second:
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        return all(
            np.array_equal(*(x[i : min(i + rows, count)].astype(np.float32) for x in (a, b)))
            for i in range(0, count, rows)
        )


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: unreadable ({error}); download the file again") from None


def _check(directory: Path, wanted: dict[str, tuple[int, ...]], stored: dict[str, _Stored]):
    """Refuses a checkpoint in which wanted tensors are missing, of the wrong shape or quantised."""
    _refuse(directory, "missing tensors", [n for n in wanted if n not in stored])
    shapes = [(n, list(stored[n].shape), list(shape)) for n, shape in wanted.items()]
    misshapen = [f"{n} {is_} instead of {shape}" for n, is_, shape in shapes if is_ != shape]
    _refuse(directory, "tensors of the wrong shape", misshapen)
    if directory.is_file():
        others = gguf.undequantised({n: stored[n] for n in wanted})
        return _refuse(directory, "tensors of types that the package gguf can't dequantise", others)
    others = [f"{n} {stored[n].dtype}" for n in wanted if stored[n].dtype not in _DTYPES]
    _refuse(directory, f"tensors that are not {_some(_DTYPES.values())}", others)


def _refuse(place: Path, what: str, names: list[str]):
    if names:
        hint = "is config.json that of this checkpoint, and is the checkpoint complete?"
        if place.is_file() and place.suffix != ".json":
            hint = "convert the model again, or give another file"
        raise UserError(f"{place}: {what} ({len(names)}): {_some(names)}; {hint}")


def _some(names: Iterable[str]) -> str:
    names = [" ".join(name.split())[:200] for name in names]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _describe(config: ModelConfig, dtype: str) -> dict:
    """The `config.json` of a decoder."""
    c, scaling = config, dict(config.rope_scaling)
    return {
        "architectures": [{v: k for k, v in ARCHITECTURES.items()}[c.family]],
        "model_type": c.family, "vocab_size": c.vocab_size, "hidden_size": c.width,
        "intermediate_size": c.mlp_width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim, "hidden_act": "silu", "rms_norm_eps": c.rms_eps,
        # transformers 4 reads the first two, 5 and later the third.
        "rope_theta": c.rope_theta, "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": c.rope_theta},
        "attention_bias": c.out_bias, "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tied_embeddings, "max_position_embeddings": c.max_positions,
        "torch_dtype": dtype, "dtype": dtype,
        # Llama's defaults (1 and 2) belong to another vocabulary.
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
