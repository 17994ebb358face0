"""What each field of a config may be; every job checks its own before it loads anything.

How fields must fit one another (a budget and its interval, a batch and the devices), and which
names there are, is seen to where they are used.
"""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from ml_collections import ConfigDict

from fkv import kinds
from fkv.engine import decoding
from fkv.errors import UserError, suggest
from fkv.jobs import READS
from fkv.kinds import POSITIVE, SIZES, SWITCH, TEXT, Kind, number, setting, several, whole
from fkv.learning import grpo, pretrain, sft
from fkv.models.config import CACHE_DTYPES
from fkv.tasks import ledger

NAMES = several(TEXT, "a tuple of text")
RANGE = several(whole(0), "a range (low, high) of whole numbers", 2)


def _in(group: str, fields: Mapping[str, Kind]) -> dict[str, Kind]:
    return {f"{group}.{name}": kind for name, kind in fields.items()}


def _those(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


@dataclasses.dataclass(frozen=True)
class Benchmark(kinds.Settings):
    """The group `benchmark`; configs/base.py says what each setting is."""

    group: ClassVar[str] = "benchmark"
    sections: Sequence[str] = setting(NAMES)
    random_weights: bool = setting(SWITCH)
    layers: int = setting(whole(0))
    peaks: str = setting(TEXT)
    memory_gib: float = setting(number(0))
    minutes: float = setting(number(0))
    repeats: int = setting(whole(1))
    compile_threads: int = setting(whole(1))
    kernels: Sequence[str] = setting(NAMES)
    policies: Sequence[str] = setting(NAMES)
    budgets: Sequence[int] = setting(SIZES)
    batches: Sequence[int] = setting(SIZES)
    lengths: Sequence[int] = setting(SIZES)
    new_tokens: int = setting(whole(1))
    temperature: float = setting(number(0))
    top_k: int = setting(whole(0))
    top_p: float = setting(number(0, 1, above=True))
    growth_tokens: int = setting(whole(1))
    growth_batch: int = setting(whole(1))
    prefill_batches: Sequence[int] = setting(SIZES)
    prefill_lengths: Sequence[int] = setting(SIZES)
    label_lengths: Sequence[int] = setting(SIZES)
    step_length: int = setting(whole(1))
    step_traces: int = setting(whole(1))
    step_rollouts: int = setting(whole(1))
    largest_limit: int = setting(whole(1))
    largest_within: float = setting(POSITIVE)
    peers: Mapping[str, str]
    peer_policies: Sequence[str] = setting(NAMES)
    peer_batches: Sequence[int] = setting(SIZES)
    peer_prompt: int = setting(whole(1))
    peer_tokens: int = setting(whole(1))


_TASK = _those(RANGE, " ".join(field.name for field in dataclasses.fields(ledger.Spec)))
_STAGE = {**_TASK, **_those(whole(1), "steps batch")}
FIELDS = {
    "seed": whole(0, 2**32 - 1),
    "dry_run": SWITCH,
    **_those(TEXT, "model revision dtype attention_kernel"),
    "cache_dtype": Kind("'' (the model's dtype) or 'int8'", lambda value: value in CACHE_DTYPES),
    **_those(whole(1), "budget interval model_axis"),
    **_in("task", _TASK),
    **_in(
        "pretrain",
        {
            **_in(
                "model",
                _those(whole(1), "width layers heads kv_heads head_dim mlp_width max_positions"),
            ),
            **pretrain.Plan.kinds(),
        },
    ),
    **_in(
        "data",
        {
            **_those(TEXT, "path eval_path column prompt_column"),
            **_those(whole(1), "traces buckets"),
        },
    ),
    "data.strict": SWITCH,
    **_in(
        "traces",
        {
            **_those(TEXT, "questions split subset question response instruction"),
            "chat": SWITCH,
            **_those(whole(0), "count new_tokens"),
            **_those(whole(1), "samples batch"),
            **decoding.Sampling.kinds(),
        },
    ),
    **_in("scorer", {"hidden": whole(1), **_those(TEXT, "inputs norm form")}),
    **_in(
        "sft",
        {
            **sft.Plan.kinds(),
            **sft.LossConfig.kinds(),
        },
    ),
    **_in(
        "grpo",
        {
            "scorer": TEXT,
            **grpo.GRPOConfig.kinds(),
            **grpo.Plan.kinds(),
            "answers": whole(0),
        },
    ),
    **_in(
        "eval",
        {"budgets": SIZES, **_those(whole(1), "traces batch"), "policies": NAMES},
    ),
    **_in(
        "evaluate",
        {
            **_those(NAMES, "scorers policies"),
            "any_interval": SWITCH,
            **_those(TEXT, "action benchmark split subset question answer instruction compare"),
            "action_temperature": POSITIVE,
            "budgets": SIZES,
            "chat": SWITCH,
            **_those(whole(1), "samples batch"),
            **_those(whole(0), "problems new_tokens traces"),
            **decoding.Sampling.kinds(),
            "deadline": number(0, 86_400, above=True),
        },
    ),
    "pipeline.stages": NAMES,
    **_in("benchmark", {**Benchmark.kinds(), **_those(TEXT, "peers.transformers peers.kvpress")}),
    **_in("export", _those(TEXT, "scorer layout")),
    **_in(
        "generate",
        {
            **_those(TEXT, "prompt policy scorer"),
            "any_interval": SWITCH,
            "new_tokens": whole(1),
            "chat": SWITCH,
            **decoding.Sampling.kinds(),
        },
    ),
}


def _tree(names: Iterable[str]) -> dict:
    """Dotted names as groups within groups; a field is None."""
    tree = {}
    for name in names:
        *path, leaf = name.split(".")
        group = tree
        for part in path:
            group = group.setdefault(part, {})
        group[leaf] = None
    return tree


STAGES = ("pretrain", "sft", "grpo", "evaluate")  # of the pipeline
_ANY = ""  # in a tree: names that are free, and what is below each of them
_CHANGES = "config.pipeline.changes"
_TREE = _tree(FIELDS)
_TREE["pretrain"]["stages"] = {_ANY: _tree(_STAGE)}
_TREE["pipeline"]["changes"] = {stage: {} for stage in STAGES}  # see `_check_changes`


def check(config: ConfigDict, job: str) -> None:
    """Refuses a config that has a field nobody knows, or in which one of the job's is missing or
    is not what it may be.

    Raises:
      UserError: the message names the first such field.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"the config is a {type(config).__name__}: give a ConfigDict, as get_config() of "
            "configs/tiny.py does"
        )
    _check_names("config", config, _TREE)
    for used in READS[job]:
        if used == "task" and "task" not in config:
            continue  # traces and questions are from files
        if used == "grpo.high_fraction" and "grpo" not in config:
            continue  # the paper's then, in tables
        for name, kind in FIELDS.items():
            if name == used or name.startswith(f"{used}."):
                kinds.check(name, _value(config, name), kind)
    if job == "pipeline":
        _value(config, "pipeline.changes")
    if job == "pretrain":
        stages = _value(config, "pretrain.stages")
        for stage in stages:
            where = f"pretrain.stages.{stage}"
            for name in ("steps", "batch", *stages[stage]):
                kinds.check(f"{where}.{name}", _value(config, f"{where}.{name}"), _STAGE[name])


def _check_names(where: str, group: Any, known: Mapping[str, Any]) -> None:
    """Refuses fields that are not known, at any depth, and values in place of groups."""
    if not isinstance(group, Mapping | ConfigDict):
        raise UserError(
            f"{where} = {reprlib.repr(group)} must be a group of fields, as in configs/tiny.py"
        )
    for name, value in group.items():
        if name not in known and _ANY not in known:
            what = "stage" if where == _CHANGES else "field"
            raise UserError(f"{where} has no {what} {name!r}{suggest(str(name), list(known))}")
        below = known.get(name, known.get(_ANY))
        if where == _CHANGES:
            _check_changes(name, value)
        elif below is not None:
            _check_names(f"{where}.{name}", value, below)
        elif isinstance(value, Mapping | ConfigDict):
            raise UserError(f"{where}.{name} must be one value, not a group of fields")


def _check_changes(stage: str, changes: Any) -> None:
    """Refuses what a stage of the pipeline can't be told to do otherwise."""
    where = f"{_CHANGES.removeprefix('config.')}.{stage}"
    read = {name: _TREE[name] for name in READS[stage] if name in _TREE}
    if isinstance(changes, Mapping | ConfigDict):
        for name in changes:
            if name in _TREE and name not in read:
                raise UserError(f"{where}: {stage} does not read {name}")
    try:
        _check_names("config", changes, read)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _value(config: ConfigDict, name: str) -> Any:
    value = config
    for part in name.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            raise UserError(f"config has no field {name}: configs/tiny.py has all there are")
        value = value[part]
    return value
