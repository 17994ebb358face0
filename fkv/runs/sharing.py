"""Sharing scorers: as safetensors with a model card, or in the layout of the released code.

A shared directory holds `scorer.safetensors` (w1, b1, w2, b2, stacked over layers), `scorer.json`
(their `ScorerConfig`, and the model, budget and interval of their training) and `README.md` (a
model card). It can be uploaded to the Hugging Face hub as it is.
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
from fkv.policies import Policy, scorer
from fkv.policies.base import name_of
from fkv.policies.foresight import Foresight, Trained
from fkv.policies.scorer import ScorerConfig
from fkv.runs import cards, checkpoint, imported

WEIGHTS, ABOUT, CARD = _SHARED = "scorer.safetensors", "scorer.json", "README.md"
# Of the training, see `Trained`.
KNOWN = ("model", "revision", "budget", "interval", "protect_prompt")
_WEIGHTED = policies.KVzap, policies.TrimKV, policies.TriAttention
# Policies whose weights are loaded, by name.
METHODS = ("foresight", *(cls.registered_as for cls in _WEIGHTED))
_BASE, _JUDGES = "model-base.safetensors", "model-judges.safetensors"
_INDEX = "model.safetensors.index.json"
_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def load(source: str | os.PathLike, revision: str | None = None) -> tuple[Policy, dict]:
    """Loads scorers as a policy, with their metadata (`model`, `budget`, `interval`...).

    Args:
      source: the workdir of an sft or grpo run, a shared directory, a checkpoint of the released
        PyTorch code or of another method (`imported`), or the hub id of one of the last three.
      revision: branch, tag or commit of a hub id.
    """
    path = files.expand(source)
    # A hub id looks like a path of two parts; a missing run is not taken for a hub id.
    local = path.exists() or path.parent.is_dir() or path.parts[0] == "runs"
    if on_hub := str(source).count("/") == 1 and not local:
        path = models.find(str(source), revision)
    if (path / ABOUT).exists() or (path / WEIGHTS).exists():
        return _of_directory(path, source)
    if imported.is_imported(path):
        return imported.load(path, str(source))
    if on_hub or any(path.glob("*.safetensors")):
        return _of_released(path, source)
    return _of_run(path, source)


def _of_directory(path: Path, source: str | os.PathLike) -> tuple[Policy, dict]:
    try:
        about = files.read_json(path / ABOUT)
        if not (path / WEIGHTS).is_file():  # reading a pipe may never end
            raise UserError(f"{path / WEIGHTS}: no such file, or not a regular one")
        rules = about.get("policy", about.get("scorer"))
        if not isinstance(rules, dict):
            raise UserError(f"{ABOUT} does not describe the scorers: scorer is {rules!r:.40}")
        params = load_file(path / WEIGHTS)
    except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: these scorers can't be read ({error})") from error
    if "policy" in about:
        return _weighted(path / ABOUT, source, params, rules, about), about
    return _policy(path / ABOUT, source, params, rules, about), about


def _weighted(where: Any, source: Any, params: Any, rules: dict, about: Mapping) -> Policy:
    """The policy of another method that `export` wrote."""
    name = rules.get("name")
    if name not in METHODS[1:]:
        known = ", ".join(METHODS[1:])
        raise UserError(f"{where}: policy.name = {name!r:.40} must be one of {known}")
    fields = {field: value for field, value in rules.items() if field != "name"}
    said = {key: about[key] for key in ("model", "revision") if about.get(key) is not None}
    try:
        return policies.get(name, params=params, trained=Trained(str(source), **said), **fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def settings(policy: Policy) -> dict[str, Any]:
    """The name and the static settings of a policy with weights."""
    own = [f.name for f in dataclasses.fields(policy)]
    other = ("params", "trained", "kind")
    return {"name": name_of(policy)} | {n: getattr(policy, n) for n in own if n not in other}


def said_settings(policy: Policy) -> str:
    """Those of scorers, or of the policy of another method, as one text."""
    return str(policy.config if isinstance(policy, Foresight) else settings(policy))


def origin(policy: Policy) -> dict[str, Any]:
    """What is known of where a policy's weights come from."""
    trained = getattr(policy, "trained", None)
    known = {name: getattr(trained, name, None) for name in ("source", *KNOWN)}
    return {name: value for name, value in known.items() if value}


def _of_run(path: Path, source: str | os.PathLike) -> tuple[Foresight, dict]:
    saved, where = checkpoint.load(path), f"{path}: its checkpoints"
    try:
        config = saved.info["config"]
        params, rules = saved.state["params"], dict(config["scorer"])
        about = {name: config[name] for name in KNOWN if name in config} | {"steps": saved.step}
        if "data" in config:
            about["data"] = config["data"]["path"] or "the embedded task"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} hold no scorers (no {error})") from error
    return _policy(where, source, params, rules, about), about


def _of_released(path: Path, source: str | os.PathLike) -> tuple[Foresight, dict]:
    judges, about = models.load_judges(path), {"model": str(source)}
    # Theirs are eviction scores, ours are importances.
    params = judges | {"w2": -judges["w2"], "b2": -judges["b2"]}
    rules = dataclasses.asdict(ScorerConfig(form="reference"))
    return _policy(path, source, params, rules, about), about


def _policy(where: Any, source: Any, params: Any, rules: dict, about: Mapping) -> Foresight:
    """The policy; `where` names the record in errors."""
    names = {field.name for field in dataclasses.fields(ScorerConfig)}
    if wrong := sorted(map(str, names ^ rules.keys())):
        is_in = "has an unknown" if wrong[0] in rules else "lacks"
        raise UserError(f"{where}: scorer {is_in} {wrong[0]!r}: it has {', '.join(sorted(names))}")
    # Older directories lack some fields, or have null.
    known = {name: about[name] for name in KNOWN if about.get(name) is not None}
    try:
        config, trained = ScorerConfig(**rules), Trained(str(source), **known)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    scorer.check_params(f"{source}:", params, config.hidden)
    if wrong := {name: str(x.dtype) for name, x in params.items() if x.dtype != np.float32}:
        raise UserError(f"{source}: {wrong} are not float32, as scorers are")
    return Foresight(params, config, trained=trained)


def check_directory(directory: str | os.PathLike, released: bool = False) -> Path:
    """The directory; refused unless new, empty or, if not `released`, with shared scorers."""
    path = files.expand(directory)
    with files.writing(path):
        kept = [file.name for file in path.iterdir()] if os.path.lexists(path) else []
    if released and kept:
        raise UserError(f"{path} exists already: give another directory")
    ours = (*_SHARED, *(f"{name}.tmp" for name in _SHARED))
    ours += ("log.txt", "sweep_point.json")  # a sweep keeps them in its points' directories
    others = sorted(name for name in kept if name not in ours and not name.startswith("."))
    if others and ABOUT not in kept:
        raise UserError(f"{path} holds other files ({others[0]}): give another directory")
    return path


def export(
    policy: Policy,
    directory: str | os.PathLike,
    about: Mapping[str, Any],
    metrics: str = "",
    place: str = ".",
) -> None:
    """Writes a directory to share.

    Args:
      policy: `foresight`, or one of another method that has weights.
      about: JSON data: `model`, `revision`, `budget`, `interval`, `license`, `datasets`, `source`,
        and other metadata.
      metrics: Markdown tables for the card.
      place: the hub id that it will have, for the card.
    """
    if not isinstance(policy, (Foresight, *_WEIGHTED)):
        raise UserError(f"{name_of(policy)} has no weights of its own to write")
    path = check_directory(directory)
    with files.writing(path):
        path.mkdir(parents=True, exist_ok=True)
    params = {name: np.ascontiguousarray(x, np.float32) for name, x in policy.params.items()}
    if isinstance(policy, Foresight):
        rules = {"scorer": dataclasses.asdict(policy.config)}
    else:
        rules = {"policy": settings(policy)}
    data = {"fkv": fkv.__version__, **rules, **about}
    # All three or none: weights with another record would be misread.
    with (
        files.whole(path / WEIGHTS) as weights,
        files.whole(path / ABOUT) as record,
        files.whole(path / CARD) as card,
    ):
        with files.writing(path / WEIGHTS):
            loading.write_tensors(weights, params, "fkv")
        with files.writing(path / ABOUT):
            record.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        card.write_text(cards.card(data, metrics, place), encoding="utf-8")


def push(directory: str | os.PathLike, hub_id: str, private: bool = False) -> str:
    """Uploads a directory that `export` wrote to the Hugging Face hub; returns its address.

    Raises:
      UserError: nobody is logged in, the hub refuses, or the network is down.
    """
    import huggingface_hub

    path, api = files.expand(directory), huggingface_hub.HfApi()
    names = [name for name in _SHARED if (path / name).exists()]
    try:
        address = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id,
            folder_path=path,
            allow_patterns=names,
            commit_message=f"Scorers of fkv {fkv.__version__}",
        )
    except Exception as error:  # offline, whatever its HTTP library raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{hub_id}: the upload to the Hugging Face hub failed ({type(error).__name__}: "
            f"{reason}): check the network, and that `hf auth login` has a token that may write, "
            f"and rerun; the files are in {path}"
        ) from error
    return str(address)


def export_released(policy: Foresight, model: str | os.PathLike, directory: str | os.PathLike):
    """Writes a checkpoint that the released PyTorch code loads: the base model with the scorers.

    `model` is the directory of the base model, whose files are linked if possible, else copied.
    Scorers that the released code can't run (see `ScorerConfig`) are refused.
    """
    config = policy.config
    if (config.inputs, config.norm, config.hidden) != ("both", "none", 16):
        plain = "scorers of 16 hidden units on plain features of both kinds"
        raise UserError(f"the released code has {plain}; these are {config}")
    source, target = files.expand(model), check_directory(directory, released=True)
    if source.is_file():
        raise UserError(f"{source}: the released code reads no GGUF files: give a directory")
    places, size = loading.files_of_tensors(source)
    if theirs := [name for name in places if ".judge_model." in name]:
        raise UserError(f"{source} has scorers of its own ({theirs[0]}): give the base model")
    shapes = Cadence(2, 1)  # only shapes matter here
    policies.check(policy.replace(any_interval=True), models.read(source), shapes)
    params = {name: np.asarray(x, np.float32) for name, x in policy.params.items()}
    features, tensors = params["w1"].shape[2], {}
    for layer in range(len(params["w1"])):
        for name, x in {
            "fc1.weight": params["w1"][layer],
            "fc1.bias": params["b1"][layer],
            "fc2.weight": -params["w2"][layer][..., None],  # theirs are eviction scores
            "fc2.bias": -params["b2"][layer][..., None],
            # Declared there but never applied; loading complains without them.
            "feature_norm.weight": np.ones(features, np.float32),
            "feature_norm.bias": np.zeros(features, np.float32),
        }.items():
            tensors[loading.JUDGE.format(layer) + name] = np.ascontiguousarray(x)
    places = {n: _BASE if f == "model.safetensors" else f for n, f in places.items()}
    places |= dict.fromkeys(tensors, _JUDGES)
    size += sum(x.nbytes for x in tensors.values())
    data = {"metadata": {"total_size": size}, "weight_map": places}
    with files.whole(target, directory=True) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in _FILES and file.name != _INDEX:
                # A file named model.safetensors would be taken for all weights.
                _link(file, temporary / (_BASE if file.name == "model.safetensors" else file.name))
        loading.write_tensors(temporary / _JUDGES, tensors, "pt")
        (temporary / _INDEX).write_text(json.dumps(data, indent=1) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
