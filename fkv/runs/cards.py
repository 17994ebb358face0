"""Model cards of shared scorers, as the Hugging Face hub reads them."""

import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fkv import files, hub

_FORESIGHT = (
    "foresightkv",
    "One small MLP per layer and KV head, trained to predict which KV pairs later tokens "
    "will attend to\n([ForesightKV](https://arxiv.org/abs/2602.03203)).",
)
_METHODS = {  # a tag and a description, by the policy's name
    "kvzap": (
        "kvzap",
        "Surrogates of KVzip+ scores on hidden states ([KVzap](https://arxiv.org/abs/2601.07891)).",
    ),
    "trimkv": (
        "trim-kv",
        "Gates that say how fast an entry is forgotten ([TRIM-KV](https://arxiv.org/abs/2512.03324)).",
    ),
    "triattention": (
        "triattention",
        "Centres and norms of the model's queries "
        "([TriAttention](https://arxiv.org/abs/2604.04921)).",
    ),
}
_METRICS = {"loss ratio": "loss_ratio", "pass@1": "accuracy"}  # that tables may hold


def card(data: Mapping[str, Any], tables: str = "", place: str = ".") -> str:
    """The card as Markdown, with the metadata that the hub reads at its top.

    Args:
      data: what `scorer.json` holds; `license` and `datasets` also go into the metadata.
      tables: of results, in Markdown.
      place: the hub id that the directory will have, if it is known.
    """
    model = data.get("model") or "owner/name"
    rules = data.get("policy") or data["scorer"]
    tag, what = _METHODS.get(rules.get("name"), _FORESIGHT)
    here = files.expand(model).exists()
    # Elsewhere it may be the path of a model on the machine that trained.
    hub_id = re.fullmatch(rf"{hub.ID}(/.+\.gguf)?", data.get("model") or "")
    on_hub = bool(hub_id) and not here
    front = {
        "base_model": "/".join(model.split("/")[:2]) if on_hub else "",  # a GGUF file is in it
        "license": data.get("license"),
        "datasets": data.get("datasets"),
        "metrics": [metric for word, metric in _METRICS.items() if word in tables],
    }
    above = ("scorer", "policy", "fkv", "model", "revision", "datasets")
    rest = {k: v for k, v in data.items() if k not in above}
    rows = {"model": model, "revision": data.get("revision"), **rest, **rules, "fkv": data["fkv"]}
    revision = data.get("revision") or "main"
    text = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return string.Template(text).substitute(
        front="".join(_field(name, value) for name, value in front.items() if value),
        tag=tag,
        what=what,
        model=model,
        revision=f', revision="{revision}"' if on_hub and revision != "main" else "",
        place=place,
        budget=data.get("budget", 1024),
        interval=data.get("interval", 256),
        chat=", chat=True" if on_hub else "",
        rows="\n".join(f"| {k} | {_cell(v)} |" for k, v in rows.items() if v not in (None, "")),
        results=f"\n## Results\n\n{tables.strip()}\n\n" if tables.strip() else "",
    )


def _field(name: str, value: Any) -> str:
    """A field of the metadata, YAML."""
    if isinstance(value, str):
        return f"{name}: {_scalar(value)}\n"
    return f"{name}:\n" + "".join(f"- {_scalar(one)}\n" for one in value)


def _scalar(value: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in ("true", "false")
    return value if plain else json.dumps(value)  # JSON is YAML


def _cell(value: Any) -> str:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    text = ", ".join(map(str, value)) if listed else str(value)
    return " ".join(text.replace("|", "\\|").split())
