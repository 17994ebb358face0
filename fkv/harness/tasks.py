"""Tasks of lm-evaluation-harness, loaded and asked before any weights are, and their metrics."""

import contextlib
import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import seed as seed_python
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from fkv import files
from fkv.errors import UserError, suggest
from fkv.harness.lm import EvictedLM, Replayed, names
from fkv.harness.table import Column, Part
from fkv.kinds import said
from fkv.models.texts import reason
from fkv.runs import provenance

# lm-eval's own seeds, for seed 0.
_NUMPY = _EXAMPLES = 1234


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are asked; defaults are lm-eval's.

    Attributes:
      seed: 0 for the seeds that lm-eval has by default.
      limit: documents of each task, 0 for all.
      num_fewshot: examples before a question; -1 for a task's own number.
      chat: apply the chat template, with `system` and, if `multiturn`, examples as turns.
      lengths: of synthetic tasks, tokens.
      unsafe: run code that models write.
    """

    seed: int = 0
    limit: int = 0
    num_fewshot: int = -1
    chat: bool = False
    system: str = ""
    multiturn: bool = True
    lengths: tuple[int, ...] = (4096,)
    unsafe: bool = False


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Loaded tasks.

    Attributes:
      asked: the names that were asked for, with the task or group of each.
      leaves: all tasks by name.
    """

    asked: dict[str, Task | Group]
    leaves: dict[str, Task]


@contextlib.contextmanager
def _of(name: str, doing: str) -> Iterator[None]:
    """Errors of a task's own code, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tasks are programs
        raise UserError(f"harness.tasks: {name!r} {doing} ({reason(error)})") from error


def load(wanted: Sequence[str], include: str, settings: Settings, tokenizer: str) -> Tasks:
    """Finds tasks, groups and tags by name, and loads their data.

    Args:
      wanted: names, with * for any characters.
      include: a directory with task YAMLs, which come before lm-eval's own; may be empty.
      tokenizer: the directory of one, by which synthetic tasks measure their texts.

    Raises:
      UserError: a name is not known, or a task can't be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not wanted:
        raise UserError("harness.tasks is empty: name at least one task, group or tag of lm-eval")
    if include and not files.expand(include).is_dir():
        raise UserError(f"harness.include_path = {include!r}: no such directory")
    metadata = {"tokenizer": tokenizer, "pretrained": tokenizer}
    metadata["max_seq_lengths"] = list(settings.lengths)
    manager = _manager(wanted, include, metadata)
    asked: dict[str, Task | Group] = {}
    for name in wanted:
        matched = manager.match_tasks([name]) if "*" in name else [name]
        if not matched or not all(x in manager.task_index for x in matched):
            raise UserError(_unknown(name, manager, include))
        for one in matched:
            _seed(settings.seed)  # some tasks make up their documents
            with _of(one, "can't be loaded"):
                found = manager.load([one])
            if one in found.get("groups", {}):
                asked[one] = found["groups"][one]
            else:
                asked |= found["tasks"]
    leaves = {}
    for one in asked.values():
        for task in one.get_all_tasks() if isinstance(one, Group) else [one]:
            leaves[task.task_name] = task
    for name, task in leaves.items():
        _prepare(name, task, settings)
    return Tasks(asked, leaves)


def _manager(wanted: Sequence[str], include: str, metadata: dict[str, Any]) -> TaskManager:
    if include:  # reading all of lm-eval's own takes a while
        path = str(files.expand(include))
        own = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
        kinds = [own.task_index[x].kind for x in wanted if x in own.task_index]
        if len(kinds) == len(wanted) and Kind.GROUP not in kinds:
            return own
    return TaskManager(include_path=path if include else None, metadata=metadata)


def _unknown(name: str, manager: TaskManager, include: str) -> str:
    told = f"harness.tasks: {name!r} is no task, group or tag{suggest(name, manager.all_tasks)}"
    for path in sorted(files.expand(include).rglob("*.yaml")) if include else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # lm-eval leaves such files out without a word
            return f"{told}; and {path} can't be read ({reason(error)})"
    return told + ("" if include else "; set harness.include_path for tasks of your own")


def _prepare(name: str, task: Task, settings: Settings) -> None:
    """Sets what settings ask for, and refuses what can't be asked."""
    if getattr(task, "UNSAFE_CODE", False) and not settings.unsafe:
        raise UserError(
            f"harness.tasks: {name!r} runs code that the model writes: set harness.unsafe_code to "
            "True where that is safe"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"harness.tasks: {name!r} asks about pictures or sound, not only text")
    own = task.get_config("num_fewshot")
    # As lm-eval has it, a task that says 0 stays at 0.
    if settings.num_fewshot >= 0 and own != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _seed(seed: int) -> None:
    seed_python(seed)
    np.random.seed((_NUMPY + seed) % 2**32)  # noqa: NPY002, which tasks draw by


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's own progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _how(lm: EvictedLM, settings: Settings) -> dict[str, Any]:
    chat = settings.chat
    return dict(
        limit=settings.limit or None, system_instruction=settings.system or None,
        apply_chat_template=chat, fewshot_as_multiturn=chat and settings.multiturn,
    )  # fmt: skip


def requests(name: str, task: Task, lm: EvictedLM, settings: Settings) -> list[Instance]:
    """All requests of a task, as often as samples are asked for; always the same.

    Raises:
      UserError: the task fails.
    """
    _seed(settings.seed)
    task.set_fewshot_seed(seed=_EXAMPLES + settings.seed)
    with _of(name, "can't write its prompts"), _quiet():
        task.build_all_requests(
            **_how(lm, settings),
            chat_template=lm.apply_chat_template if settings.chat else None,
            tokenizer_name=lm.tokenizer_name if settings.chat else "",
        )
    return [one for one in task.instances for _ in range(one.repeats or 1)]


def digests(some: Sequence[Instance]) -> list[str]:
    """What is asked about each document, in short."""
    told: dict[int, str] = {}
    for one in some:
        told[one.doc_id] = told.get(one.doc_id, "") + json.dumps(one.args, default=str)
    return [provenance.of_text(text) for text in told.values()]


def metrics(
    name: str, task: Task, lm: EvictedLM, settings: Settings, known: Mapping[tuple, Any]
) -> list[dict[str, Any]]:
    """lm-eval's metrics of answers.

    Args:
      known: answers by `lm.names` of the requests.

    Returns:
      For each document and filter a dict of `doc`, `filter`, `answers` (filtered), `target` and
      `metrics`.

    Raises:
      UserError: the task's metrics fail.
    """
    _seed(settings.seed)
    task.set_fewshot_seed(seed=_EXAMPLES + settings.seed)
    with _of(name, "can't judge its answers"), _quiet():
        found = evaluator.evaluate(
            lm=Replayed(known, lm), task_dict={"tasks": {name: task}}, bootstrap_iters=0,
            log_samples=True, confirm_run_unsafe_code=settings.unsafe, **_how(lm, settings),
        )  # fmt: skip
    return [
        {
            "doc": one["doc_id"],
            "filter": one["filter"],
            "answers": one["filtered_resps"],
            "target": one["target"],
            "metrics": {metric: one[metric] for metric in one["metrics"]},
        }
        for one in found["samples"][name]
    ]


def columns(tasks: Tasks, chosen: Sequence[str], lengths: Sequence[int]) -> list[Column]:
    """The columns of the table: the main metric of each name that was asked for, or those chosen.

    Args:
      chosen: `name=metric` or `name=metric,filter`.
      lengths: of synthetic tasks, which have a metric for each.

    Raises:
      UserError: there is no such task, metric or filter.
    """
    picked: dict[str, list[tuple[str, str]]] = {}
    for entry in chosen:
        name, equals, metric = entry.partition("=")
        if not equals or not metric:
            raise UserError(f"harness.metrics: {said(entry)} must be of the form task=metric")
        known = list(dict.fromkeys([*tasks.asked, *tasks.leaves]))
        if name not in known:
            raise UserError(f"harness.metrics: {name!r} is not in tasks{suggest(name, known)}")
        metric, _, filtered = metric.partition(",")
        picked.setdefault(name, []).append((metric, filtered))
    found = []
    for name, one in tasks.asked.items():
        inner = one.get_all_tasks() if isinstance(one, Group) else [one]
        whole = not isinstance(one, Group) or one.has_aggregation or name in picked
        for label, some in [(name, inner)] if whole else [(x.task_name, [x]) for x in inner]:
            group = one if isinstance(one, Group) and label == name else None
            for metric, filtered in picked.get(label) or _main(some, group, lengths):
                found.append(_column(label, metric, filtered, some, group))
    for name in [name for name in picked if name not in tasks.asked]:
        for metric, filtered in picked[name]:
            found.append(_column(name, metric, filtered, [tasks.leaves[name]], None))
    return list(dict.fromkeys(found))


def _main(
    some: Sequence[Task], group: Group | None, lengths: Sequence[int]
) -> list[tuple[str, str]]:
    """The first metric; where metrics are lengths, those that are measured."""
    known = [str(x) for x in some[0].aggregation()]
    if known and all(x.isdigit() for x in known):
        return [(str(x), "") for x in lengths if str(x) in known] or [(known[0], "")]
    if group is not None:
        one = group.aggregate_metric_list[0]
        return [(one.metric, (one.filter_list or [""])[0])]
    return [(known[0], "")]


def _column(
    name: str, metric: str, filtered: str, some: Sequence[Task], group: Group | None
) -> Column:
    parts = []
    for task in some:
        filters = [one.name for one in getattr(task, "_filters", [])] or ["none"]
        known: dict[str, Callable] = {str(k): x for k, x in task.aggregation().items()}
        here = filtered or filters[0]
        if metric in known and here in filters:
            parts.append(Part(task.task_name, metric, here, known[metric]))
    if not parts:
        has = ", ".join(f"{x},{y}" for x in known for y in filters)
        raise UserError(f"harness.metrics: {name!r} has no {metric},{here}, but {has}")
    better = {str(k): x for k, x in some[0].higher_is_better().items()}.get(metric)
    by_size = True
    if group is not None and group.aggregate_metric_list:
        all_of = group.aggregate_metric_list
        by_size = next((x for x in all_of if x.metric == metric), all_of[0]).weight_by_size
    return Column(name, metric, tuple(parts), by_size, better)


def tokenizer_directory(lm: EvictedLM, path: Path) -> str:
    """Writes the tokenizer for synthetic tasks, which load one by name; returns where."""
    try:
        lm.tokenizer.save_pretrained(path)
    except Exception as error:  # some can't be written
        raise UserError(f"the tokenizer can't be written to {path} ({reason(error)})") from error
    return str(path)


__all__ = [
    "Settings", "Tasks", "columns", "digests", "load", "metrics", "names", "requests",
    "tokenizer_directory",
]  # fmt: skip
