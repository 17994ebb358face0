"""The groups of a config as dataclasses, and the check that every job makes before it loads.

Stages, policies and the task own theirs (`sft.Plan`, `grpo.GRPOConfig`, `scorer.ScorerConfig`,
`ledger.Spec`, `sampling.Sampling`); those of jobs are here. `configs/base.py` documents all fields.
How they must fit one another (a budget and its interval, a batch and the devices) is checked where
they are used.
"""

import dataclasses
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

from fkv import kinds
from fkv.data import pieces
from fkv.engine.sampling import Sampling
from fkv.errors import UserError, suggest
from fkv.jobs import READS
from fkv.kinds import POSITIVE, SIZES, SWITCH, TEXT, Kind, Settings, number, setting, whole
from fkv.learning import grpo, pretrain, sft
from fkv.models.config import CACHE_DTYPES
from fkv.policies.scorer import ScorerConfig
from fkv.tasks import ledger

Names = tuple[str, ...]
Sizes = tuple[int, ...]
NAMES, COUNT, ANY = kinds.several(TEXT, "a tuple of text"), whole(1), whole(0)
ORIGINS = kinds.several(
    Kind("", lambda x: isinstance(x, str) and (x == "*" or re.fullmatch(r"https?://[^/\s]+", x))),
    "a tuple of '*' or of origins such as 'https://example.org'",
)
CACHED = Kind("'' (the model's dtype) or 'int8'", lambda value: value in CACHE_DTYPES)
settings = dataclasses.dataclass(frozen=True, kw_only=True)


@settings
class Shared(Settings):
    """Fields outside of groups."""

    seed: int = setting(whole(0, 2**32 - 1))
    model: str = setting(TEXT)
    revision: str = setting(TEXT)
    dtype: str = setting(TEXT)
    cache_dtype: str = setting(CACHED)
    model_axis: int = setting(COUNT)
    budget: int = setting(COUNT)
    interval: int = setting(COUNT)
    protect_prompt: int = setting(ANY)
    dry_run: bool = setting(SWITCH)
    target: str = setting(TEXT)
    dry_run_json: str = setting(TEXT)


@settings
class Reasoner(Settings):
    group: ClassVar[str] = "pretrain.model"
    width: int = setting(COUNT)
    layers: int = setting(COUNT)
    heads: int = setting(COUNT)
    kv_heads: int = setting(COUNT)
    head_dim: int = setting(COUNT)
    mlp_width: int = setting(COUNT)
    max_positions: int = setting(COUNT)


@settings
class Data(Settings):
    group: ClassVar[str] = "data"
    path: str = setting(TEXT)
    eval_path: str = setting(TEXT)
    column: str = setting(TEXT)
    prompt_column: str = setting(TEXT)
    traces: int = setting(COUNT)
    buckets: int = setting(COUNT)
    strict: bool = setting(SWITCH)


@settings
class Answers(Sampling):
    """Fields of every job that answers questions."""

    split: str = setting(TEXT)
    subset: str = setting(TEXT)
    question: str = setting(TEXT)
    instruction: str = setting(TEXT)
    chat: bool = setting(SWITCH)
    new_tokens: int = setting(ANY)
    samples: int = setting(COUNT)
    batch: int = setting(COUNT)


@settings
class Traces(Answers):
    group: ClassVar[str] = "traces"
    questions: str = setting(TEXT)
    response: str = setting(TEXT)
    count: int = setting(ANY)
    text: Names = setting(NAMES)
    text_column: str = setting(TEXT)
    length: int = setting(whole(8))
    documents: str = setting(kinds.one_of(pieces.WAYS))
    prompt_tokens: int = setting(ANY)
    held_out: float = setting(number(0, 1, below=True))
    held_out_count: int = setting(ANY)
    dev: float = setting(number(0, 1, below=True))
    dev_count: int = setting(ANY)


@settings
class Supervised(Settings):
    """Fields of `sft` that the stage itself does not read."""

    group: ClassVar[str] = "sft"
    scorer_seed: int = setting(whole(0, 2**32 - 1))
    variants: Names = setting(NAMES)


@settings
class Reinforcement(Settings):
    """Fields of `grpo` that the stage itself does not read."""

    group: ClassVar[str] = "grpo"
    scorer: str = setting(TEXT)
    answers: int = setting(ANY)


@settings
class Eval(Settings):
    group: ClassVar[str] = "eval"
    budgets: Sizes = setting(SIZES)
    traces: int = setting(COUNT)
    batch: int = setting(COUNT)
    policies: Names = setting(NAMES)
    baseline: str = setting(TEXT)


@settings
class Evaluate(Answers):
    group: ClassVar[str] = "evaluate"
    scorers: Names = setting(NAMES)
    any_interval: bool = setting(SWITCH)
    action: str = setting(TEXT)
    action_temperature: float = setting(POSITIVE)
    policies: Names = setting(NAMES)
    budgets: Sizes = setting(SIZES)
    benchmark: str = setting(TEXT)
    answer: str = setting(TEXT)
    problems: int = setting(ANY)
    deadline: float = setting(number(0, 86_400, above=True))
    traces: int = setting(ANY)
    compare: str = setting(TEXT)


@settings
class Recall(Settings):
    group: ClassVar[str] = "recall"
    prompts: int = setting(ANY)
    prompt_tokens: int = setting(COUNT)
    new_tokens: int = setting(COUNT)
    lookups: int = setting(ANY)
    context: int = setting(COUNT)
    batch: int = setting(COUNT)


@settings
class Leaderboard(Settings):
    group: ClassVar[str] = "leaderboard"
    calibrate: int = setting(ANY)
    retained: int = setting(ANY)
    benchmark: str = setting(TEXT)


@settings
class Advise(Settings):
    group: ClassVar[str] = "advise"
    percent: tuple[float, ...] = setting(kinds.several(POSITIVE, "a tuple of numbers above 0"))
    budgets: Sizes = setting(SIZES)
    halvings: int = setting(ANY)
    policies: Names = setting(NAMES)
    groups: Names = setting(NAMES)
    traces: int = setting(COUNT)
    heads: int = setting(ANY)


@settings
class Harness(Settings):
    group: ClassVar[str] = "harness"
    tasks: Names = setting(NAMES)
    include_path: str = setting(TEXT)
    metrics: Names = setting(NAMES)
    limit: int = setting(ANY)
    num_fewshot: int = setting(whole(-1))
    chat: bool = setting(SWITCH)
    system: str = setting(TEXT)
    multiturn: bool = setting(SWITCH)
    template: Names = setting(NAMES)
    max_length: int = setting(ANY)
    new_tokens: int = setting(COUNT)
    think_end: str = setting(TEXT)
    lengths: Sizes = setting(SIZES)
    unsafe_code: bool = setting(SWITCH)
    rows: int = setting(COUNT)


@settings
class Pipeline(Settings):
    group: ClassVar[str] = "pipeline"
    stages: Names = setting(NAMES)


@settings
class Benchmark(Sampling):
    group: ClassVar[str] = "benchmark"
    sections: Names = setting(NAMES)
    random_weights: bool = setting(SWITCH)
    layers: int = setting(ANY)
    peaks: str = setting(TEXT)
    memory_gib: float = setting(number(0))
    minutes: float = setting(number(0))
    repeats: int = setting(COUNT)
    compile_threads: int = setting(COUNT)
    policies: Names = setting(NAMES)
    budgets: Sizes = setting(SIZES)
    batches: Sizes = setting(SIZES)
    lengths: Sizes = setting(SIZES)
    new_tokens: int = setting(COUNT)
    growth_tokens: int = setting(COUNT)
    growth_batch: int = setting(COUNT)
    prefill_batches: Sizes = setting(SIZES)
    prefill_lengths: Sizes = setting(SIZES)
    label_lengths: Sizes = setting(SIZES)
    step_length: int = setting(COUNT)
    step_traces: int = setting(COUNT)
    step_rollouts: int = setting(COUNT)
    step_replayed: bool = setting(SWITCH)
    largest_limit: int = setting(COUNT)
    largest_within: float = setting(POSITIVE)
    peers: Mapping[str, str]  # see `Peers`
    peer_policies: Names = setting(NAMES)
    peer_batches: Sizes = setting(SIZES)
    peer_prompt: int = setting(COUNT)
    peer_tokens: int = setting(COUNT)
    queue_rows: int = setting(COUNT)
    queue_requests: int = setting(COUNT)
    queue_prompt: int = setting(COUNT)
    queue_tokens: int = setting(COUNT)


@settings
class Peers(Settings):
    """The Python of an environment for each peer."""

    group: ClassVar[str] = "benchmark.peers"
    transformers: str = setting(TEXT)
    kvpress: str = setting(TEXT)


@settings
class Export(Settings):
    group: ClassVar[str] = "export"
    scorer: str = setting(TEXT)
    layout: str = setting(TEXT)
    push: str = setting(TEXT)
    private: bool = setting(SWITCH)
    license: str = setting(TEXT)
    datasets: str = setting(TEXT)


@settings
class Generate(Sampling):
    group: ClassVar[str] = "generate"
    prompt: str = setting(TEXT)
    policy: str = setting(TEXT)
    scorer: str = setting(TEXT)
    any_interval: bool = setting(SWITCH)
    new_tokens: int = setting(COUNT)
    chat: bool = setting(SWITCH)


@settings
class Serve(Sampling):
    group: ClassVar[str] = "serve"
    host: str = setting(TEXT)
    port: int = setting(whole(0, 65_535))
    key_variable: str = setting(TEXT)
    origins: Names = setting(ORIGINS)
    name: str = setting(TEXT)
    policies: Names = setting(NAMES)
    scorers: Names = setting(NAMES)
    any_interval: bool = setting(SWITCH)
    budgets: Sizes = setting(SIZES)
    rows: int = setting(COUNT)
    queue: int = setting(ANY)
    length: int = setting(whole(2))
    every: int = setting(COUNT)
    logprobs: int = setting(whole(0, 20))
    sessions: int = setting(ANY)
    seconds: float = setting(POSITIVE)
    drain: float = setting(number(0))
    body_kib: int = setting(COUNT)


# In the order of `configs/base.py`, which errors list them in.
GROUPS = (
    Shared, ledger.Spec, Reasoner, pretrain.Plan, Data, Traces, ScorerConfig, sft.Plan,
    sft.LossConfig, Supervised, Reinforcement, grpo.GRPOConfig, grpo.Plan, Eval, Evaluate, Recall,
    Harness, Leaderboard, Advise, Pipeline, Benchmark, Peers, Export, Generate, Serve,
)  # fmt: skip
FIELDS = {
    f"{cls.group}.{name}".lstrip("."): kind for cls in GROUPS for name, kind in cls.kinds().items()
}
_STAGE = {"steps": COUNT, "batch": COUNT, **ledger.Spec.kinds()}


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
    """Refuses a config with an unknown field, or in which one of the job's is missing or invalid.

    Raises:
      UserError: names the first such field.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"the config is a {type(config).__name__}: give a ConfigDict, as get_config() of "
            "configs/tiny.py does"
        )
    _check_names("config", config, _TREE)
    for used in READS[job]:
        if used == "task" and "task" not in config:
            continue  # with traces and questions from files
        if used == "grpo.high_fraction" and "grpo" not in config:
            continue  # tables then have the paper's
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
    """Refuses unknown fields, at any depth, and values in place of groups."""
    if not isinstance(group, Mapping | ConfigDict):
        raise UserError(
            f"{where} = {reprlib.repr(group)} must be a group of fields, as in configs/base.py"
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
    """Refuses changes of fields that a stage of the pipeline does not have."""
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
            raise UserError(f"config has no field {name}: configs/base.py has all of them")
        value = value[part]
    return value
