"""Scorers as people share them: a directory of safetensors and a card, or ForesightKV's own layout.

A shared directory holds `scorer.safetensors` (w1, b1, w2, b2, stacked over layers), `scorer.json`
(what the scorers are made of, and for which model, budget and interval) and `README.md` (a model
card). It can be put on the Hugging Face hub as it is.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

import fkv
from fkv import files, models, policies
from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models import loading
from fkv.policies import scorer
from fkv.policies.foresight import Foresight, Trained
from fkv.policies.scorer import ScorerConfig
from fkv.runs import checkpoint

WEIGHTS, ABOUT, CARD = "scorer.safetensors", "scorer.json", "README.md"
KNOWN = ("model", "revision", "budget", "interval")  # of the training, see `Trained`
_BASE, _JUDGES = "model-base.safetensors", "model-judges.safetensors"
_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def load(source: str | os.PathLike, revision: str | None = None) -> tuple[Foresight, dict]:
    """Scorers from where they are, as a policy.

    Args:
      source: the workdir of an sft or grpo run, a shared directory, a checkpoint of the released
        PyTorch code, or the hub id of one of the last two.
      revision: branch, tag or commit of a hub id.

    Returns:
      The policy, and what is known of the scorers (`model`, `budget`, `interval`...).

    Raises:
      UserError: there are no scorers, or they are damaged.
    """
    path = files.expand(source)
    # A hub id looks like a path of two parts; that of a run which is not there is no hub id.
    local = path.exists() or path.parent.is_dir() or path.parts[0] == "runs"
    if str(source).count("/") == 1 and not local:
        path = models.find(str(source), revision)
        return _shared(path, source) if _is_shared(path) else _released(path, source)
    if _is_shared(path):
        return _shared(path, source)
    if any(path.glob("*.safetensors")):
        return _released(path, source)
    return _of_run(path, source)


def _is_shared(path: Path) -> bool:
    return (path / ABOUT).exists() or (path / WEIGHTS).exists()


def _shared(path: Path, source: str | os.PathLike) -> tuple[Foresight, dict]:
    try:
        about = files.read_json(path / ABOUT)
        if not (path / WEIGHTS).is_file():  # a pipe would never end
            raise UserError(f"{path / WEIGHTS}: no such file, or not a regular one")
        if not isinstance(rules := about.get("scorer"), dict):
            raise UserError(f"{ABOUT} does not say what they are made of: scorer is {rules!r:.40}")
        params = load_file(path / WEIGHTS)
    except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: these scorers can't be read ({error})") from error
    config = _scorer_config(path / ABOUT, rules)
    policy = _policy(path / WEIGHTS, params, config, _trained(path / ABOUT, source, about))
    return policy, about


def _of_run(path: Path, source: str | os.PathLike) -> tuple[Foresight, dict]:
    saved = checkpoint.load(path)
    where = f"{path}: its checkpoints"
    try:
        config = saved.info["config"]
        params, rules = saved.state["params"], dict(config["scorer"])
        about = {name: config[name] for name in KNOWN if name in config}
        about["steps"] = saved.step
        if "data" in config:
            about["data"] = config["data"]["path"] or "the embedded task"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} hold no scorers (no {error})") from error
    trained = _trained(where, source, about)
    return _policy(where, params, _scorer_config(where, rules), trained), about


def _released(path: Path, source: str | os.PathLike) -> tuple[Foresight, dict]:
    judges = models.load_judges(path)
    # Theirs are eviction scores, ours importances.
    params = judges | {"w2": -judges["w2"], "b2": -judges["b2"]}
    about = {"model": str(source)}
    trained = _trained(path, source, about)
    return _policy(path, params, ScorerConfig(form="reference"), trained), about


def _scorer_config(where: str | Path, rules: dict) -> ScorerConfig:
    names = {field.name for field in dataclasses.fields(ScorerConfig)}
    if wrong := sorted(map(str, names ^ rules.keys())):
        is_in = "has an unknown" if wrong[0] in rules else "lacks"
        raise UserError(f"{where}: scorer {is_in} {wrong[0]!r}: it has {', '.join(sorted(names))}")
    try:
        return ScorerConfig(**rules)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _trained(where: str | Path, source: str | os.PathLike, about: Mapping[str, Any]) -> Trained:
    """What is known; older directories lack some of it, and `null` stands for the same."""
    known = {name: about[name] for name in KNOWN if about.get(name) is not None}
    try:
        return Trained(str(source), **known)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _policy(where: str | Path, params: Any, config: ScorerConfig, trained: Trained) -> Foresight:
    scorer.check_params(f"{where}:", params, config.hidden)
    if wrong := {name: str(x.dtype) for name, x in params.items() if x.dtype != np.float32}:
        raise UserError(f"{where}: {wrong} are not float32, as scorers are")
    return Foresight(params, config, trained=trained)


def check_directory(directory: str | os.PathLike, released: bool = False) -> Path:
    """The directory, if scorers can be written there; a shared one may be written again.

    Raises:
      UserError: it is a file, or holds something else.
    """
    path = files.expand(directory)
    with files.writing(path):
        kept = [file.name for file in path.iterdir()] if os.path.lexists(path) else []
    if released and kept:
        raise UserError(f"{path} is there already: give another directory")
    ours = (WEIGHTS, ABOUT, CARD, *(f"{name}.tmp" for name in (WEIGHTS, ABOUT, CARD)))
    ours += ("log.txt", "sweep_point.json")  # a sweep keeps them beside what its points write
    others = sorted(name for name in kept if name not in ours and not name.startswith("."))
    if others and ABOUT not in kept:
        raise UserError(f"{path} holds other files ({others[0]}): give another directory")
    return path


def export(
    policy: Foresight,
    directory: str | os.PathLike,
    about: Mapping[str, Any],
    metrics: str = "",
) -> None:
    """Writes a shared directory.

    Args:
      about: JSON data: `model`, `revision`, `budget`, `interval`, and what else should be known.
      metrics: a Markdown table for the card.

    Raises:
      UserError: `directory` can't be written, or holds something else.
    """
    path = check_directory(directory)
    with files.writing(path):
        path.mkdir(parents=True, exist_ok=True)
    params = {name: np.ascontiguousarray(x, np.float32) for name, x in policy.params.items()}
    data = {"fkv": fkv.__version__, "scorer": dataclasses.asdict(policy.config), **about}
    # All three or none: weights beside what is said of others would be read wrongly.
    with (
        files.whole(path / WEIGHTS) as weights,
        files.whole(path / ABOUT) as what,
        files.whole(path / CARD) as card,
    ):
        with files.writing(path / WEIGHTS):
            loading.write_tensors_into(weights, params, "fkv")
        with files.writing(path / ABOUT):
            what.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        card.write_text(_card(data, metrics), encoding="utf-8")


def _card(data: Mapping[str, Any], metrics: str) -> str:
    model, revision = data.get("model", "unknown"), data.get("revision") or "main"
    base = f"base_model: {model}\n" if "/" in model and not files.expand(model).exists() else ""
    rest = {k: v for k, v in data.items() if k not in ("scorer", "fkv", "model", "revision")}
    rows = "\n".join(f"| {name} | {value} |" for name, value in {**rest, **data["scorer"]}.items())
    return f"""---
library_name: fkv
{base}tags:
- kv-cache-eviction
- foresightkv
---

# KV-eviction scorers for {model}

One small MLP per layer and KV head, trained to foresee which KV pairs later tokens will attend to
(ForesightKV, arXiv 2602.03203). Made with fkv {data["fkv"]} for revision `{revision}`.

```python
policy = fkv.load_scorer("this directory or hub id")
fkv.generate(fkv.load("{model}"), "...", policy=policy, budget={data.get("budget", 1024)},
             interval={data.get("interval", 256)})
```

| | |
|---|---|
{rows}

{metrics}
"""


def export_released(policy: Foresight, model: str | os.PathLike, directory: str | os.PathLike):
    """Writes a checkpoint that the released PyTorch code can load: the base model and the scorers.

    The files of the base model are linked where the file system can, copied otherwise.

    Args:
      model: directory of the base model.

    Raises:
      UserError: the released code has no such scorers (see `ScorerConfig`), or `directory` exists
        or can't be written.
    """
    config = policy.config
    if (config.inputs, config.norm, config.hidden) != ("both", "none", 16):
        raise UserError(
            f"the released code has scorers of 16 hidden units on plain features of both kinds; "
            f"these are {config}"
        )
    source, target = files.expand(model), check_directory(directory, released=True)
    places, size = loading.files_of_tensors(source)
    if theirs := [name for name in places if ".judge_model." in name]:
        raise UserError(f"{source} has scorers of its own ({theirs[0]}): give the base model")
    shapes = Cadence(2, 1)  # only shapes count here
    policies.check(policy.replace(any_interval=True), models.read(source), shapes)
    params = {name: np.asarray(x, np.float32) for name, x in policy.params.items()}
    tensors = {}
    for layer in range(params["w1"].shape[0]):
        for name, x in {
            "fc1.weight": params["w1"][layer],
            "fc1.bias": params["b1"][layer],
            "fc2.weight": -params["w2"][layer][..., None],  # theirs are eviction scores
            "fc2.bias": -params["b2"][layer][..., None],
            # Declared there and never applied; without them loading complains.
            "feature_norm.weight": np.ones(params["w1"].shape[2], np.float32),
            "feature_norm.bias": np.zeros(params["w1"].shape[2], np.float32),
        }.items():
            tensors[loading.JUDGE.format(layer) + name] = np.ascontiguousarray(x)
    places = {n: _BASE if f == "model.safetensors" else f for n, f in places.items()}
    places |= dict.fromkeys(tensors, _JUDGES)
    size += sum(x.nbytes for x in tensors.values())
    data = {"metadata": {"total_size": size}, "weight_map": places}
    index = "model.safetensors.index.json"
    with files.whole_directory(target) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in _FILES and file.name != index:
                # A file of this name alone would be taken for the whole.
                _link(file, temporary / (_BASE if file.name == "model.safetensors" else file.name))
        loading.write_tensors_into(temporary / _JUDGES, tensors, "pt")
        (temporary / index).write_text(json.dumps(data, indent=1) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
