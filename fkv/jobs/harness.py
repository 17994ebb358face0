"""Tasks of lm-evaluation-harness under every policy at every budget, from a config to a table."""

import ast
import dataclasses
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fkv import api, files, kinds, policies
from fkv.cache.cadence import FULL
from fkv.errors import UserError
from fkv.evaluation import answers, tables
from fkv.harness import table
from fkv.harness.asking import Subject
from fkv.jobs import common, evaluate, groups
from fkv.policies.base import Policy
from fkv.runs import preemption, rundir
from fkv.runs.rundir import Run, open_run

# What a run may be asked for more of; everything else must stay as it was.
MAY_DIFFER = (
    *(name for name in common.other_jobs("harness") if name != "evaluate"),
    *(f"evaluate.{name}" for name in groups.Evaluate.kinds() if not name.startswith("action")),
    "eval", *(f"harness.{x}" for x in "tasks include_path metrics limit rows unsafe_code".split()),
)  # fmt: skip
_COUNT = kinds.whole(0)
# Answers by request: `request` is one of a document's, `sample` one of several to it.
SAMPLE = answers.Form(
    "an answer",
    {
        "policy": kinds.TEXT,
        "budget": _COUNT,
        "interval": _COUNT,
        "task": kinds.TEXT,
        "doc": _COUNT,
        "request": _COUNT,
        "sample": _COUNT,
        "prompt": kinds.TEXT,
        "answer": kinds.Kind("an answer", lambda x: isinstance(x, str | float | int | list)),
        "tokens": _COUNT,
        "context": _COUNT,
        "evictions": _COUNT,
        "cut": _COUNT,
    },
    ("policy", "budget", "task", "doc", "request", "sample"),
)
_COSTS = "tokens", "context", "evictions", "cut"
_AT_ONCE = 32  # answers that are written together


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task, asked before there are weights.

    Attributes:
      requests: lm-eval's, as often as samples are asked for.
      names: of each document, request and sample.
      asked: what each asks of the model.
      digest: of what is asked about each document.
    """

    task: Any
    requests: Sequence[Any]
    names: Sequence[tuple[int, int, int]]
    asked: Sequence[Any]
    digest: Mapping[int, str]

    @property
    def room(self) -> int:
        """Tokens of the longest prompt and its answer, of those that go on."""
        sizes = [len(x.prompt) + x.limit for x in self.asked if hasattr(x, "prompt")]
        return max(sizes, default=0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known before the weights are loaded.

    Attributes:
      named: the policies, by the name they are reported under.
      inputs: digests for `open_run`.
      lm: of lm-eval, without weights.
      how: the settings that tasks are asked with.
      columns: of the table.
      asked: what is asked, by task.
    """

    named: dict[str, Policy]
    inputs: dict[str, str | list[str]]
    lm: Any
    how: Any
    columns: list[table.Column]
    asked: dict[str, Asked]


def run(config: ConfigDict, workdir: str) -> None:
    """Asks tasks of every policy of `evaluate` at every budget, and judges the answers.

    Resumes, and adds to earlier answers when asked for more policies, budgets, tasks or documents.
    Writes `samples.jsonl` (an answer a line), `documents.jsonl` (lm-eval's metrics of each
    document) and `harness.{txt,md,csv}`.
    """
    groups.check(config, "harness")
    _check_installed()
    if jax.process_count() > 1:
        raise UserError("launch.harness runs in one process: start one for each policy")
    plan = _plan(config, workdir)
    run = open_run(workdir, config, MAY_DIFFER, plan.inputs)
    samples = answers.Samples(run.path / "samples.jsonl", config.interval, SAMPLE)
    for name, one in plan.asked.items():
        _check_prompts(samples, name, one)
    run.resume({})  # metrics are written again from all answers
    cells = evaluate.cells_of(config, plan.named)
    with preemption.noticed() as asked_to_end:

        def rest() -> None:
            if asked_to_end():
                run.close()
                raise preemption.Preempted(f"{len(samples.rows)} answers are in {workdir}")

        _answer_all(config, plan, samples, cells, rest)
    judged, lines = {}, []
    for name, budget, _ in cells:
        found = judged[name, budget] = {}
        for line in _judged(plan, samples, name, budget):
            lines.append(json.dumps(line, default=_plain) + "\n")
            found.setdefault((line["task"], line["filter"]), {})[line["doc"]] = line["metrics"]
    files.write_text(run.path / "documents.jsonl", "".join(lines))
    _write(run, config, plan.columns, judged, _costs(samples, cells, plan.asked))
    run.close()


def _plan(config: ConfigDict, workdir: str) -> Plan:
    """Checks everything, loads the tasks and asks them; the cheapest first."""
    from fkv.harness import prompts
    from fkv.harness import tasks as harness

    settings, template = config.harness, template_of(config.harness.template)
    at = common.cadences(config, "evaluate.budgets")
    named, inputs = evaluate.policies_of(config)
    rundir.check_run(workdir, config, MAY_DIFFER, inputs)
    shape = common.model_config(config)
    common.check_policies(config, shape, named, at)
    budgets, tasks = config.evaluate.budgets, f"tasks {', '.join(settings.tasks)}"
    what = f"{len(named)} policies", common.said_cadence(config, budgets), tasks
    common.announce("harness", config, workdir, shape, what)
    model = api.without_weights(config.model, common.revision(config))
    lm = _lm(config, model, ("full", FULL, policies.get("full")))
    if settings.chat:
        prompts.check_chat(model, settings.system, template)
    how = harness.Settings(
        config.seed, settings.limit, settings.num_fewshot, settings.chat, settings.system,
        settings.multiturn, tuple(settings.lengths), settings.unsafe_code,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        own = harness.tokenizer_directory(lm, Path(scratch))
        loaded = harness.load(settings.tasks, settings.include_path, how, own)
    columns = harness.columns(loaded, settings.metrics, settings.lengths)
    asked = {}
    for name, task in loaded.leaves.items():
        requests = harness.requests(name, task, lm, how)
        digests = harness.digests(requests)
        inputs[f"harness.tasks: {name!r}"] = digests
        by_doc = dict(zip(dict.fromkeys(x.doc_id for x in requests), digests, strict=True))
        asked[name] = Asked(task, requests, harness.names(requests), lm.asked(requests), by_doc)
        _say_lengths(name, asked[name], lm.max_length)
    return Plan(named, inputs | common.language_inputs(model), lm, how, columns, asked)


def _lm(
    config: ConfigDict, model: api.Model, cell: evaluate.Cell, rest: Callable = lambda: None
) -> Any:
    """lm-eval's face of a model under a policy."""
    from fkv.harness.lm import EvictedLM

    settings, (_, budget, policy) = config.harness, cell
    cadence = common.cadence(config, budget)
    subject = Subject(model, policy, cadence, settings.rows, config.seed, rest)
    return EvictedLM(
        subject, settings.max_length, settings.new_tokens, template_of(settings.template),
        settings.think_end,
    )  # fmt: skip


def _answer_all(
    config: ConfigDict, plan: Plan, samples: answers.Samples, cells: Sequence[evaluate.Cell],
    rest: Callable[[], None],
) -> None:  # fmt: skip
    """Has everything answered that has no answer yet; weights are loaded for that only."""
    model = None
    for cell in cells:
        for task, one in plan.asked.items():
            keys = [(*cell[:2], task, *name) for name in one.names]
            some = [i for i, key in enumerate(keys) if key not in samples.rows]
            if not some:
                continue
            model = model or common.load_language_model(config)
            _answer(samples, _lm(config, model, cell, rest), (*cell[:2], task), one, some)
    cell_rank, task_rank = (
        {name: i for i, name in enumerate(some)}
        for some in ([cell[:2] for cell in cells], plan.asked)
    )

    def rank(key):
        cell, task = key[:2], key[2]
        ranks = cell_rank.get(cell, len(cells)), task_rank.get(task, len(task_rank))
        return ranks[0], cell, ranks[1], *key[2:]

    samples.settle(rank)


def _judged(plan: Plan, samples: answers.Samples, name: str, budget: int) -> Iterator[dict]:
    """What lm-eval says of each document, task after task, as lines of `documents.jsonl`."""
    from fkv.harness import tasks as harness

    for task, one in plan.asked.items():
        known = {key: _given(samples.rows[name, budget, task, *key]) for key in one.names}
        for found in harness.metrics(task, one.task, plan.lm, plan.how, known):
            yield {"policy": name, "budget": budget, "task": task, **found}


def _answer(
    samples: answers.Samples, lm: Any, cell: tuple[str, int, str], one: Asked, some: Sequence[int]
) -> None:
    """Has these requests of a task answered, and writes the answers as they come."""
    policy, budget, task = cell
    given = {"policy": policy, "budget": budget, "interval": lm.subject.cadence.interval}
    label = f"{policy} {budget or ''}".strip() + f", {task}"
    rows: list[dict[str, Any]] = []

    def keep(least: int) -> None:
        if len(rows) >= least:
            samples.add(rows)
            bar.update(len(rows))
            rows.clear()

    total, done = len(one.asked), len(one.asked) - len(some)
    with common.progress(total=total, initial=done, desc=label) as bar:
        try:
            for i, reply in lm.replies([one.asked[i] for i in some], one.room):
                doc, request, sample = one.names[some[i]]
                rows.append({
                    **given, "task": task, "doc": doc, "request": request, "sample": sample,
                    "prompt": one.digest[doc],
                    "answer": lm.answer(one.requests[some[i]], reply),
                    **{name: getattr(reply, name) for name in _COSTS},
                })  # fmt: skip
                keep(_AT_ONCE)
        finally:
            keep(1)


def _given(row: Mapping[str, Any]) -> Any:
    """An answer as the harness had it."""
    answer = row["answer"]
    return tuple(answer) if isinstance(answer, list) else answer


def _plain(value: Any) -> Any:
    """JSON of what metrics may hold."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _check_installed() -> None:
    try:
        importlib.import_module("fkv.harness.tasks")
    except ImportError as error:  # absent, or older
        raise UserError(
            "launch.harness needs lm_eval: pip install 'lm_eval>=0.4.13', or "
            'pip install -e ".[harness]"'
        ) from error


def template_of(entries: Sequence[str]) -> dict[str, Any]:
    """Variables of a chat template: Python's constants, or else text."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"harness.template: {entry!r} must be of the form name=value")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _say_lengths(name: str, one: Asked, most: int) -> None:
    cut = [x.cut for x in one.asked if x.cut]
    if cut:
        common.say(
            f"warning: {name}: {len(cut)} of {len(one.asked)} requests are longer than max_length ="
            f" {most}: of each, up to {max(cut)} tokens are cut off its beginning"
        )


def _check_prompts(samples: answers.Samples, name: str, one: Asked) -> None:
    """Refuses answers to other prompts, also in runs that recorded no digests."""
    for row in samples.rows.values():
        if row["task"] == name and one.digest.get(row["doc"], row["prompt"]) != row["prompt"]:
            raise UserError(
                f"{samples.path}: document {row['doc']} of {name} has changed since it was "
                "answered: use another --workdir"
            )


def _costs(samples, cells, asked) -> dict[tuple[str, int], dict[str, float]]:
    """Means over requests, by policy and budget."""
    found = {}
    for name, budget, _ in cells:
        rows = [
            samples.rows[name, budget, task, *key] for task, one in asked.items()
            for key in one.names
        ]  # fmt: skip
        found[name, budget] = {x: float(np.mean([row[x] for row in rows])) for x in _COSTS}
    return found


def _write(
    run: Run, config: ConfigDict, columns: Sequence[table.Column], judged: Mapping, costs: Mapping
) -> None:
    """The table, its files and metrics."""
    full, body, rows = judged.get(("full", FULL)), [], []
    for cell, found in judged.items():
        against = None if found is full else full
        measured = [table.measure(column, found, against) for column in columns]
        evictions = costs[cell]["evictions"]
        kept = config.protect_prompt if cell[1] else 0
        body.append(table.row(cell, evictions, measured, full is not None, kept))
        rows += table.csv_rows(cell, evictions, columns, measured)
        name = f"{cell[0]}_{cell[1]}" if cell[1] else cell[0]
        values = {
            f"{column.name}/{column.measure}/{name}": one.value
            for column, one in zip(columns, measured, strict=True) if one is not None
        }  # fmt: skip
        run.log(cell[1], values | {f"evictions/{name}": evictions})
    note = "± one standard error over documents"
    if full is not None:
        note += "; to full: differences paired by document, with 95 % intervals"
    head = table.head(columns, full is not None)
    shown = tables.write(run.path / "harness", head, body, table.csv(rows), note)
    common.say(f"\n{shown}\n\n{note}")
    idle = sorted({b for (_, b), cost in costs.items() if b and not cost["evictions"]})
    if idle:
        common.say(f"no evictions at budget {', '.join(map(str, idle))}: documents are short")
    common.say(f"written to {run.path}: harness.(txt md csv), documents.jsonl, samples.jsonl")
