"""Weights of other methods, in the layouts that their authors release.

| method | what is read |
|---|---|
| KVzap | `config.json` of `model_type` `kvzap`, and `model.safetensors` (kvpress: `KVzapModel`) |
| TRIM-KV | `config.json` with `retention_gate`, and `trimkv_weights.pth` |
| TriAttention | a `.pt` file of statistics, as its `scripts/calibrate.py` writes |
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fkv import files
from fkv.errors import UserError
from fkv.policies import KVzap, Policy, TriAttention, TrimKV
from fkv.policies.foresight import Trained
from fkv.runs import torch_files

GATES = "trimkv_weights.pth"


def is_imported(path: Path) -> bool:
    """Whether this is a file or directory in one of the layouts."""
    if path.is_file():
        return path.suffix in (".pt", ".pth")
    return (path / GATES).is_file() or _config(path).get("model_type") == "kvzap"


def load(path: Path, source: str) -> tuple[Policy, dict]:
    """The policy with these weights, and what is known of them.

    Args:
      source: the path or hub id that the user gave.

    Raises:
      UserError: one line that names the file and what is wrong with it.
    """
    if path.is_file():
        return _triattention(path, source)
    config = _config(path)
    read = _trimkv if (path / GATES).is_file() else _kvzap
    return read(path, config, {"source": source} | _license(path))


def _config(path: Path) -> dict:
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        found = files.read_json(file)
    except (UserError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _license(path: Path) -> dict[str, str]:
    """`license` of a model card's header."""
    card = path / "README.md"
    try:
        text = files.read_text(card) if card.is_file() else ""
    except UserError:
        return {}
    header = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    found = header and re.search(r"^license:\s*(\S.*?)\s*$", header[1], re.MULTILINE)
    return {"license": found[1].strip("'\"")} if found else {}


class _Tensors:
    """Tensors by name, all of which have to be used."""

    def __init__(self, where: Path, tensors: Mapping[str, Any]):
        self._where, self._left = where, dict(tensors)

    def take(self, name: str, ndim: int) -> np.ndarray:
        x = self._left.pop(name, None)
        if not isinstance(x, np.ndarray) or x.ndim != ndim:
            said = f"has {list(x.shape)}" if isinstance(x, np.ndarray) else "is missing"
            raise UserError(f"{self._where}: {name} {said}, but must have {ndim} axes")
        return np.asarray(x, np.float32)

    def stack(self, layers: int, name: str, ndim: int, transpose: bool = False) -> np.ndarray:
        """[layers, ...], of names with a layer's index."""
        found = [self.take(name.format(i), ndim) for i in range(layers)]
        if len({x.shape for x in found}) > 1:
            raise UserError(f"{self._where}: the layers' {name} differ in shape")
        x = np.stack(found)
        return np.ascontiguousarray(np.swapaxes(x, -1, -2)) if transpose else x

    def done(self) -> None:
        if self._left:
            raise UserError(f"{self._where}: {min(map(str, self._left))} is not a known tensor")


def _kvzap(path: Path, config: dict, about: dict) -> tuple[Policy, dict]:
    file = path / "model.safetensors"
    try:
        tensors = _Tensors(file, load_file(file))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{file}: these surrogates can't be read ({error})") from error
    layers, hidden = config.get("n_modules"), config.get("hidden_dim")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise UserError(f"{path / 'config.json'}: n_modules = {layers!r} must be a whole number")
    first = "layers.{}." if hidden is None else "layers.{}.0."
    params = {
        "w1": tensors.stack(layers, first + "weight", 2, transpose=True),
        "b1": tensors.stack(layers, first + "bias", 1),
    }
    if hidden is not None:
        params["w2"] = tensors.stack(layers, "layers.{}.2.weight", 2, transpose=True)
        params["b2"] = tensors.stack(layers, "layers.{}.2.bias", 1)
    tensors.done()
    return KVzap(params, trained=Trained(about["source"])), about


def _trimkv(path: Path, config: dict, about: dict) -> tuple[Policy, dict]:
    where, gate = path / "config.json", config.get("retention_gate")
    if gate not in ("rg", "rg2", "rg3"):
        raise UserError(f"{where}: retention_gate = {gate!r} must be one of rg, rg2, rg3")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act = {config['hidden_act']!r} must be silu")
    found = torch_files.read(path / GATES)
    names = found if isinstance(found, Mapping) else {}
    pattern = r"(?:model\.)?layers\.(\d+)\.self_attn\.retention_gate\.(\S+)"
    parts = {name: re.fullmatch(pattern, str(name)) for name in names}
    gates = {f"{m[1]}.{m[2]}" if m else str(name): names[name] for name, m in parts.items()}
    layers = 1 + max((int(m[1]) for m in parts.values() if m), default=-1)
    if not 0 < layers <= len(gates):
        raise UserError(f"{path / GATES}: it holds no retention gates of layers")
    tensors = _Tensors(path / GATES, gates)
    if gate == "rg3":
        both = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    else:
        both = {"w1": "linear1", "w2": "linear2"}
    params = {
        ours: tensors.stack(layers, "{}." + theirs + ".weight", 2, transpose=True)
        for ours, theirs in both.items()
    }
    if gate != "rg3":
        params["b1"] = tensors.stack(layers, "{}.linear1.bias", 1)
    params["b2"] = tensors.stack(layers, "{}.bias", 1)
    tensors.done()
    model = config.get("base_model")
    about |= {"model": model} if isinstance(model, str) else {}
    knorm = config.get("compress_strategy") == "knorm_alpha"
    trained = Trained(about["source"], about.get("model", ""))
    return TrimKV(params, gate, knorm=knorm, trained=trained), about


def _triattention(path: Path, source: str) -> tuple[Policy, dict]:
    found = torch_files.read(path)
    try:
        metadata, stats = found["metadata"], dict(found["stats"])
        style = metadata.get("rope_style", "half")
        places = [re.fullmatch(r"layer(\d+)_head(\d+)", name) for name in stats]
        layers, heads = (1 + max(int(m[i]) for m in places) for i in (1, 2))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: it holds no statistics of TriAttention") from error
    if style != "half":
        raise UserError(f"{path}: rope_style = {style!r} must be half")
    if len(stats) != layers * heads:
        raise UserError(
            f"{path}: it has statistics of {len(stats)} of {layers} x {heads} query heads: "
            "calibrate all of them"
        )
    parts = {}
    for name in ("q_mean_real", "q_mean_imag", "q_abs_mean"):
        given = [
            one.get(name) if isinstance(one, Mapping) else None
            for _, one in sorted(
                stats.items(), key=lambda item: [int(x) for x in re.findall(r"\d+", item[0])]
            )
        ]
        tensors = _Tensors(path, {f"{i}.{name}": x for i, x in enumerate(given)})
        x = tensors.stack(len(given), "{}." + name, 1)
        parts[name] = x.reshape(layers, heads, -1)
    mean = np.concatenate([parts["q_mean_real"], parts["q_mean_imag"]], axis=-1)
    model = metadata.get("model_name")
    about = {"source": source} | ({"model": model} if isinstance(model, str) else {})
    trained = Trained(source, about.get("model", ""))
    return TriAttention({"mean": mean, "norm": parts["q_abs_mean"]}, trained=trained), about
